#include "unit_run.h"

#include "tile_gemm.h"

namespace fused_preact {

template <typename P>
UnitRun<P>::UnitRun(
    const UnitPlan& plan, const float* packed, const float* ones, float* in, float* out, float* operands)
    : plan_(plan), packed_(packed), ones_(ones), in_(in), out_(out), base_(plan.levels.size(), 0),
      done_(plan.phases.size(), 0) {
  for (const Level& level : plan.levels) {
    operands_.push_back(level.slots > 0 ? reinterpret_cast<P*>(operands) : nullptr);
    operands += round_up(level.operand_floats(plan.images), kLanes);
  }
}

template <typename P>
void UnitRun<P>::run(float* scratch) {
  const int64_t last = static_cast<int64_t>(plan_.phases.size()) - 1;
  for (int64_t phase = plan_.interleaved ? last : 0; phase <= last; phase++) {
    const int64_t rows = plan_.phase_rows(phase);
    for (int64_t row = 0; row < rows; row += plan_.rows_at_once) {
      advance(phase, std::min(row + plan_.rows_at_once, rows), scratch);
    }
  }
}

template <typename P>
void UnitRun<P>::run_parallel(float* scratch) {
  for (int64_t phase = 0; phase < static_cast<int64_t>(plan_.phases.size()); phase++) {
    const int64_t rows = plan_.phase_rows(phase), step = plan_.rows_at_once;
    prepare(phase, 0, rows);
    at::parallel_for(0, (rows + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; tile++) {
        work(
            phase, tile * step, std::min((tile + 1) * step, rows),
            scratch + at::get_thread_num() * plan_.tile_floats);
      }
      gemm_release<P>();
    });
  }
}

template <typename P>
void UnitRun<P>::advance(int64_t phase, int64_t end, float* scratch) {
  const int64_t begin = done_[phase];
  if (end <= begin) {
    return;
  }
  if (phase > 0) {
    prepare(phase, begin, end);
    advance(phase - 1, plan_.levels[plan_.phases[phase].first].needed(end), scratch);
  }
  work(phase, begin, end, scratch);
  done_[phase] = end;
}

// Row `padded_row` (counted from the first row of padding) of a level's operand.
template <typename P>
P* UnitRun<P>::slot(int64_t index, int64_t padded_row) const {
  const Level& level = plan_.levels[index];
  const int64_t stride = level.conv->stride_h;
  return operands_[index] +
      (padded_row % stride * level.slots + padded_row / stride - base_[index]) * level.row_floats(plan_.images);
}

// Makes room in the operand of a phase for what output rows [begin, end) read, and zeroes the padding among it.
template <typename P>
void UnitRun<P>::prepare(int64_t phase, int64_t begin, int64_t end) {
  const auto [first, last] = plan_.phases[phase];
  if (last < first || operands_[first] == nullptr) {
    return;
  }
  const Level& level = plan_.levels[first];
  const ChainConv& conv = *level.conv;
  const int64_t row_size = level.row_floats(plan_.images), moved = begin - base_[first];
  const int64_t all = (level.h + 2 * conv.pad_h + conv.stride_h - 1) / conv.stride_h;
  if (moved > 0 && level.slots < all) {
    for (int64_t c = 0; c < conv.stride_h; c++) {
      P* rows = operands_[first] + c * level.slots * row_size;
      std::memmove(static_cast<void*>(rows), rows + moved * row_size, (level.slots - moved) * row_size * sizeof(P));
    }
    base_[first] = begin;
  }
  const auto stop = [&](int64_t row) { return row == 0 ? 0 : (row - 1) * conv.stride_h + (conv.r - 1) * conv.dil_h + 1; };
  const auto zero = [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; row++) {
      std::memset(static_cast<void*>(slot(first, row)), 0, row_size * sizeof(P));
    }
  };
  zero(stop(begin), std::min(stop(end), conv.pad_h));
  zero(std::max(stop(begin), conv.pad_h + level.h), stop(end));
}

// Activated pixels of the input stream at the places that a one-tap convolution reads, channels [c, c + channels).
template <typename P>
template <typename O>
void UnitRun<P>::gather(
    const ChainConv& conv, int64_t begin, int64_t end, int64_t c, int64_t channels, O* out, int64_t out_stride) const {
  const auto activate = operands<float, O>().activate;
  const Level& level = plan_.levels[0];
  const int64_t depth = level.conv->depth(), w = level.w, images = plan_.images;
  const Affine bn{packed_ + plan_.unit->scale + c, packed_ + plan_.unit->shift + c};
  if (conv.stride_h == 1 && conv.stride_w == 1) {
    const int64_t pixels = images * w;
    activate(in_ + begin * pixels * depth + c, depth, (end - begin) * pixels, channels, bn, out, out_stride);
    return;
  }
  const int64_t ow = (w - 1) / conv.stride_w + 1;
  for (int64_t row = begin; row < end; row++) {
    for (int64_t image = 0; image < images; image++, out += ow * out_stride) {
      const int64_t pixel = (row * conv.stride_h * images + image) * w;
      activate(in_ + pixel * depth + c, conv.stride_w * depth, ow, channels, bn, out, out_stride);
    }
  }
}

// Stores row `row` of a level's input, activated, once per tap of a kernel row.
template <typename P>
void UnitRun<P>::expand(int64_t index, int64_t row, const float* from, Affine bn) const {
  const auto activate = operands<float, P>().activate;
  const Level& level = plan_.levels[index];
  const ChainConv& conv = *level.conv;
  const int64_t depth = conv.depth(), pixel = conv.s * depth;
  P* out = slot(index, row + conv.pad_h);
  for (int64_t image = 0; image < plan_.images; image++, from += level.w * depth, out += level.ow * pixel) {
    for (int64_t tap = 0; tap < conv.s; tap++) {
      // Output columns j read input column j * stride + shift.
      const int64_t step = conv.stride_w, shift = tap * conv.dil_w - conv.pad_w;
      const int64_t lo = std::min(shift >= 0 ? 0 : (-shift + step - 1) / step, level.ow);
      const int64_t inside = level.w - shift <= 0 ? 0 : (level.w - shift - 1) / step + 1;
      const int64_t hi = std::max(lo, std::min(inside, level.ow));
      P* to = out + tap * depth;
      for (int64_t j = 0; j < lo; j++) {
        std::memset(static_cast<void*>(to + j * pixel), 0, depth * sizeof(P));
      }
      if (hi > lo) {
        activate(from + (lo * step + shift) * depth, step * depth, hi - lo, depth, bn, to + lo * pixel, pixel);
      }
      for (int64_t j = hi; j < level.ow; j++) {
        std::memset(static_cast<void*>(to + j * pixel), 0, depth * sizeof(P));
      }
    }
  }
}

// c (+)= a W for `depth` rows of the weights from row `begin`, every panel of columns.
template <typename P>
void UnitRun<P>::multiply(
    const ChainConv& conv, int64_t begin, int64_t depth, int64_t m, const P* a, float* c, int64_t lda, bool add) const {
  const P* weights = reinterpret_cast<const P*>(packed_ + conv.weight);
  const int64_t all = conv.taps() * conv.depth(), step = depth_step(depth);
  for (int64_t k = 0; k < depth; k += step, add = true) {
    // The panels one after the other on the same part of the left operand: that part stays in cache.
    for (int64_t column = 0; column < conv.width(); column += PackedWeights::kPanel) {
      const int64_t width = std::min(PackedWeights::kPanel, conv.width() - column);
      gemm<P>(
          m, width, std::min(step, depth - k), a + k, lda, weights + column * all + (begin + k) * width, width,
          c + column, conv.width(), add);
    }
  }
}

// What the last convolution adds to: out = projection or padded copy of the activated input.
template <typename P>
void UnitRun<P>::shortcut(int64_t begin, int64_t end, P* left) const {
  const ChainUnit& unit = *plan_.unit;
  const Level& level = plan_.output();
  const int64_t width = level.conv->width(), row = plan_.images * level.ow, m = (end - begin) * row;
  float* to = out_ + begin * row * width;
  const int64_t depth = plan_.levels[0].conv->depth();
  if (unit.shortcut == Shortcut::kPadding) {
    gather(unit.projection, begin, end, 0, depth, to, width);
    for (int64_t i = 0; i < m && width > depth; i++) {
      std::memset(to + i * width + depth, 0, (width - depth) * sizeof(float));
    }
  } else if (unit.shortcut == Shortcut::kProjection) {
    const int64_t step = depth_step(depth);
    for (int64_t c = 0; c < depth; c += step) {
      const int64_t channels = std::min(step, depth - c);
      gather(unit.projection, begin, end, c, channels, left, channels);
      multiply(unit.projection, c, channels, m, left, to, channels, c > 0);
    }
  }
}

// Output rows [begin, end) of a phase.
template <typename P>
void UnitRun<P>::work(int64_t phase, int64_t begin, int64_t end, float* scratch) const {
  const ChainUnit& unit = *plan_.unit;
  const auto [first, last] = plan_.phases[phase];
  const int64_t count = static_cast<int64_t>(plan_.levels.size());
  if (last < first) {
    const Level& level = plan_.levels[0];
    const int64_t floats = plan_.images * level.w * level.conv->depth();
    for (int64_t row = begin; row < end; row++) {
      expand(0, row, in_ + row * floats, {packed_ + unit.scale, packed_ + unit.shift});
    }
    return;
  }
  P* left = reinterpret_cast<P*>(scratch);
  float* acc = scratch + round_up(plan_.left_floats, kLanes);
  P* other = reinterpret_cast<P*>(acc + round_up(plan_.acc_floats, kLanes));
  const int64_t m = (end - begin) * plan_.row_pixels(phase);
  if (last + 1 == count) {
    shortcut(begin, end, left);
  }
  for (int64_t i = first; i <= last; i++) {
    const Level& level = plan_.levels[i];
    const ChainConv& conv = *level.conv;
    const bool ends = i + 1 == count;
    float* to = ends ? out_ + begin * plan_.row_pixels(phase) * conv.width() : acc;
    bool add = ends && unit.shortcut != Shortcut::kNone;
    if (i > first) {
      multiply(conv, 0, conv.depth(), m, other, to, conv.depth(), add);
    } else if (operands_[i] != nullptr) {
      const int64_t row = conv.s * conv.depth();
      for (int64_t r = 0; r < conv.r; r++, add = true) {
        multiply(conv, r * row, row, m, slot(i, begin * conv.stride_h + r * conv.dil_h), to, row, add);
      }
    } else {
      for (int64_t c = 0; c < conv.depth(); c += plan_.chunk, add = true) {
        const int64_t channels = std::min(plan_.chunk, conv.depth() - c);
        gather(conv, begin, end, c, channels, left, channels);
        multiply(conv, c, channels, m, left, to, channels, add);
      }
    }
    if (ends) {
      if (unit.tail >= 0) {
        loops<float>().fprop_epilogue(
            to, conv.width(), m, conv.width(), packed_ + unit.tail, nullptr, to, conv.width(), Moments{}, 0);
      }
      return;
    }
    const Affine bias{ones_, packed_ + conv.bias};
    if (i == last) {
      for (int64_t row = begin; row < end; row++) {
        expand(i + 1, row, acc + (row - begin) * plan_.row_pixels(phase) * conv.width(), bias);
      }
    } else {
      operands<float, P>().activate(acc, conv.width(), m, conv.width(), bias, other, conv.width());
    }
  }
}

template class UnitRun<float>;
template class UnitRun<at::BFloat16>;
template class UnitRun<at::Half>;

} // namespace fused_preact
