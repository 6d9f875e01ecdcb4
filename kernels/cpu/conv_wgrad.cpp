// conv_wgrad: dW = wgrad(a, dy), the activation a = max(s x + t, 0), or s x + t, recomputed tile by tile.
//
// A sum over pixels of outer products: dW = dy^T a, with a [pixels, taps * channels] made in scratch. One
// operand has to be transposed there; the narrower one is. The work is cut into column blocks of the result (so
// that its accumulator stays in the second-level cache) times ranges of pixels (so that every thread has a
// task); partial sums over the ranges are added in order.
#include <ATen/ops/empty_like.h>

#include "gather.h"
#include "ops.h"
#include "split.h"
#include "tile_gemm.h"

namespace fused_preact {

namespace {

// 1 MiB of accumulator.
constexpr int64_t kAccFloats = 256 * 1024;
constexpr int64_t kOperandFloats = 64 * 1024;

// Columns [begin, end) of a [pixels, taps * depth] matrix, depth the padded channels, written at `out`.
template <typename T, typename P>
void gather_columns(
    const Source<T>& source, const Grid& grid, int64_t p_begin, int64_t p_end, int64_t begin, int64_t end, P* out,
    int64_t out_stride) {
  const int64_t depth = round_up(source.channels, kLanes);
  for (int64_t column = begin; column < end;) {
    const int64_t tap = column / depth, c = column % depth, count = std::min(depth - c, end - column);
    gather_tap(
        source, grid, grid.taps[tap], p_begin, p_end, c, std::min(c + count, source.channels),
        out + column - begin, out_stride);
    column += count;
  }
}

// Pixel p of a dense tensor is its row p.
Grid rows_grid(int64_t rows) {
  return {1, 1, rows, 1, rows, 1, 1, 1, rows, 1, 1, 0, 0, {{0, 0, 0}}};
}

// The result [left, right] and the tasks that it is cut into.
struct Plan {
  int64_t left, right; // rows are the transposed operand's columns; columns are padded per tap
  int64_t pixels;
  int64_t column_block, columns, ranges; // tasks are columns x ranges
  int64_t tile; // pixels of a tile

  Plan(int64_t left, int64_t right, int64_t pixels) : left(left), right(right), pixels(pixels) {
    const int64_t threads = at::get_num_threads();
    int64_t blocks = (left * right + kAccFloats - 1) / kAccFloats;
    blocks = blocks > 1 ? round_up(blocks, threads) : 1;
    column_block = round_up((right + blocks - 1) / blocks, PackedWeights::kPanel);
    columns = (right + column_block - 1) / column_block;
    ranges = std::min((threads + columns - 1) / columns, (pixels + 63) / 64);
    tile = std::min<int64_t>(256, std::max<int64_t>(64, kOperandFloats / std::max(left, column_block) / 2 * 2));
  }
};

// The accumulators of the ranges: the first is the result.
struct Accumulators {
  Tensor first, others;

  Accumulators(const Plan& plan)
      : first(at::empty({plan.left, plan.right}, at::kFloat)),
        others(at::empty({plan.ranges - 1, plan.left, plan.right}, at::kFloat)) {}

  float* data(int64_t range) const {
    return range == 0 ? first.data_ptr<float>() : others.data_ptr<float>() + (range - 1) * first.numel();
  }

  // Adds the others to the first, in order.
  Tensor finish() const {
    const int64_t count = others.size(0), size = first.numel();
    float* sum = data(0);
    at::parallel_for(0, count == 0 ? 0 : size, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t range = 1; range <= count; range++) {
        const float* part = data(range);
        for (int64_t i = begin; i < end; i++) {
          sum[i] += part[i];
        }
      }
    });
    return first;
  }
};

// left^T right over each range of pixels, in products of type P.
template <typename P, typename T>
void accumulate(
    const Plan& plan, const Source<T>& left, const Grid& left_grid, const Source<T>& right, const Grid& right_grid,
    const Accumulators& acc) {
  const Parts tasks(plan.columns * plan.ranges);
  tasks.run([&](int64_t, int64_t task_begin, int64_t task_end) {
    // A row stride that is a power of two would put a column of the operand into few sets of the cache.
    const int64_t left_width = round_up(plan.left, kLanes);
    int64_t right_stride = plan.column_block + kLanes;
    Arena arena(thread_scratch(plan.tile * (2 * left_width + 2 * right_stride) + 4 * kLanes));
    P* rows = arena.take<P>(plan.tile * left_width);
    P* transposed = arena.take<P>(plan.tile * left_width);
    P* columns = arena.take<P>(plan.tile * right_stride);
    P* right_operand = columns;
    if constexpr (!std::is_same_v<P, float>) {
      right_stride = plan.column_block;
      right_operand = arena.take<P>(plan.tile * right_stride);
    }
    for (int64_t task = task_begin; task < task_end; task++) {
      const int64_t range = task / plan.columns, c_begin = task % plan.columns * plan.column_block;
      const int64_t c_end = std::min(c_begin + plan.column_block, plan.right);
      const int64_t p_begin = range * plan.pixels / plan.ranges, p_end = (range + 1) * plan.pixels / plan.ranges;
      float* out = acc.data(range) + c_begin;
      for (int64_t p = p_begin; p < p_end; p += plan.tile) {
        const int64_t count = std::min(plan.tile, p_end - p);
        gather_columns(left, left_grid, p, p + count, 0, left_width, rows, left_width);
        gather_columns(right, right_grid, p, p + count, c_begin, c_end, columns, right_stride);
        int64_t depth = count;
        if constexpr (std::is_same_v<P, float>) {
          common_loops().transpose(rows, left_width, count, left_width, transposed, plan.tile);
        } else {
          depth = round_up(count, 2);
          if (depth > count) {
            zero_rows(rows + count * left_width, 1, left_width, left_width);
          }
          common_loops().transpose_16(bits(rows), left_width, depth, left_width, bits(transposed), plan.tile);
          common_loops().interleave(bits(columns), right_stride, count, right_stride, bits(right_operand));
        }
        for (int64_t c = 0; c < c_end - c_begin; c += PackedWeights::kPanel) {
          gemm<P>(
              plan.left, std::min(PackedWeights::kPanel, c_end - c_begin - c), depth, transposed, plan.tile,
              right_operand + right_column<P>(c), right_stride, out + c, plan.right, p > p_begin);
        }
      }
    }
    gemm_release<P>();
  });
}

// [taps * depth, k] -> [k, taps, depth]
Tensor transposed(const Tensor& in, int64_t k, int64_t columns) {
  const Tensor out = at::empty({k, columns}, at::kFloat);
  const float* from = in.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  const int64_t blocks = (columns + kLanes - 1) / kLanes;
  at::parallel_for(0, blocks, 1 + (1 << 14) / (k * kLanes), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLanes, last = std::min(end * kLanes, columns);
    common_loops().transpose(from + first * in.size(1), in.size(1), last - first, k, to + first, columns);
  });
  return out;
}

} // namespace

Tensor conv_wgrad(
    const Tensor& dy_, const Tensor& x_, const Tensor& scale_, const Tensor& shift_, const Tensor& weight,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool relu) {
  const auto dtype = x_.scalar_type();
  if (!served(x_) || !served(dy_) || dy_.scalar_type() != dtype || weight.scalar_type() != dtype) {
    return call_reference<decltype(conv_wgrad)>(
        "fused_preact::conv_wgrad", dy_, x_, scale_, shift_, weight, stride, padding, dilation, groups, relu);
  }
  if (takes_split_path(x_, weight, stride, groups)) {
    return split_wgrad(dy_, x_, scale_, shift_, weight, stride, padding, dilation, groups, relu);
  }
  const Tensor dy = nhwc(dy_), x = nhwc(x_), scale = floats(scale_), shift = floats(shift_);
  const ConvShape shape(x.sizes(), weight.sizes(), stride, padding, dilation);
  const Grid grid = shape.forward_grid(), dy_grid = rows_grid(grid.pixels());
  const int64_t taps = shape.r * shape.s, depth = round_up(shape.c, kLanes);
  const int64_t k_width = round_up(shape.k, kLanes), a_width = taps * depth;
  const bool swapped = k_width > a_width;
  const Plan plan(swapped ? a_width : shape.k, swapped ? k_width : a_width, grid.pixels());
  const Accumulators acc(plan);
  FUSED_PREACT_DISPATCH(dtype, "conv_wgrad", [&] {
    const Source<scalar_t> a{
        x.const_data_ptr<scalar_t>(), shape.c, {pointer(scale), pointer(shift), floor_of(relu)}};
    const Source<scalar_t> b{dy.const_data_ptr<scalar_t>(), shape.k};
    with_product_type<scalar_t>(product_type(dtype), [&](auto product) {
      using product_t = decltype(product);
      if (swapped) {
        accumulate<product_t>(plan, a, grid, b, dy_grid, acc);
      } else {
        accumulate<product_t>(plan, b, dy_grid, a, grid, acc);
      }
    });
  });
  Tensor sum = acc.finish();
  if (swapped) {
    sum = transposed(sum, shape.k, a_width);
  }
  const Tensor result = sum.view({shape.k, shape.r, shape.s, depth}).narrow(3, 0, shape.c).permute({0, 3, 1, 2});
  if (dtype == at::kFloat && result.strides() == weight.strides()) {
    return result;
  }
  return at::empty_like(weight).copy_(result);
}

TORCH_LIBRARY_IMPL(fused_preact, CPU, m) {
  m.impl("conv_wgrad", conv_wgrad);
}

} // namespace fused_preact
