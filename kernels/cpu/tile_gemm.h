// The tile: gather and activate into scratch, multiply, hand the accumulator to an epilogue while it is hot.
//
// Two ways to build the left operand:
//  - explicit: one row a pixel, taps side by side (im2col of a tile, in cache). Serves every geometry.
//  - band: rows of one image, each pixel with the S taps of a kernel row side by side. A kernel row further down is
//    the same scratch from one image row on: every value is gathered S times, not R S, and no zero border of the
//    image is ever multiplied. For dense stride-1 windows.
#pragma once

#include "gather.h"
#include "products.h"

namespace fused_preact {

// Weights as the right operand: panels of up to 64 columns, each [taps][depth][width] and contiguous, so that a
// micro-kernel walks memory in order. 64 columns are four vector registers, the widest block that leaves
// registers for six rows. Of 16-bit weights two rows lie side by side as pairs, [depth / 2][width][2]: a product of such
// numbers sums two terms at a time.
struct PackedWeights {
  static constexpr int64_t kPanel = 64;
  Tensor buffer;
  int64_t taps, depth, columns;

  int64_t panels() const {
    return (columns + kPanel - 1) / kPanel;
  }
  int64_t channels(int64_t panel) const {
    return std::min(kPanel, columns - panel * kPanel);
  }
  int64_t width(int64_t panel) const {
    return round_up(channels(panel), kLanes);
  }
  template <typename P>
  const P* data(int64_t panel) const {
    return buffer.const_data_ptr<P>() + panel * kPanel * taps * depth;
  }
};

// For y = conv(a, W): reduction over the input channels, columns are the output channels. The type of the products is
// float or that of the weight.
PackedWeights pack_forward(const Tensor& weight, at::ScalarType products);

// For da = dgrad(dy, W): reduction over the output channels, columns are the input channels, taps of the grid.
PackedWeights pack_backward(const Tensor& weight, const Grid& grid, at::ScalarType products);

// C[m, n] (+)= A[m, k] B[k, n], row-major; of 16-bit numbers k is even and B in pairs of rows, as packed weights are.
template <typename P>
void gemm(
    int64_t m, int64_t n, int64_t k, const P* a, int64_t lda, const P* b, int64_t ldb, float* c, int64_t ldc, bool add);

// To be called at the end of a thread's work.
template <typename P>
void gemm_release();

// Where column c of a right operand begins.
template <typename P>
constexpr int64_t right_column(int64_t c) {
  return std::is_same_v<P, float> ? c : 2 * c;
}

// How a grid is cut into tiles.
struct Tiling {
  bool band;
  int64_t window_h, window_w; // the kernel, where it is a dense window
  int64_t rows; // pixels of a tile, or rows of an image for a band
  int64_t tiles;
  int64_t chunk_taps; // taps gathered at a time

  Tiling(const Grid& grid, int64_t depth);
};

// The work of an op in tasks: blocks of column panels times ranges of tiles. One block is the rule. With a second
// product, the weights and its accumulator may overflow the second-level cache, and every tile would fetch them anew:
// then a task keeps a block of both and reads all tiles of its range (3x3 of 256 channels at 14x14: 28.0 -> 26.9 ms).
// For a single product that gains nothing: the weights are a stream that the prefetchers follow (measured).
struct Tasks {
  int64_t panels, block_panels, blocks, tiles, ranges;

  // `source_floats`: with a second product, the size of what the tiles are gathered from; else 0.
  Tasks(const PackedWeights& weights, const Tiling& tiling, int64_t source_floats = 0);

  // Calls body(task_begin, task_end) on every thread.
  template <typename F>
  void run(const F& body) const {
    Parts(blocks * ranges).run([&](int64_t, int64_t begin, int64_t end) { body(begin, end); });
  }
};

// One column panel of a finished tile.
struct TilePanel {
  const float* acc; // null: no tap reaches these pixels
  int64_t acc_stride;
  int64_t column, channels;
};

// Rows of the left operand, for a second product with it: a row for each pixel of the tile, with `columns` values that
// belong to the taps from `tap` on. They are rows [first, first + rows) of the `all_rows` that begin at `data`, of which
// the operands of a band are overlapping parts, the one with `first` 0 before the others.
template <typename P>
struct Operand {
  const P* data;
  int64_t stride, first, rows, all_rows, columns, tap;
};

// Runs all tiles. For each one calls
//   epilogue.begin(scratch, range, column, columns)   scratch of `epilogue_floats`; the columns of the task
//   epilogue.panel(panel, runs)                       once per column panel
//   epilogue.operand(operand, runs)                   only where Epilogue::kSecondProduct: the left operand in parts
//   epilogue.end(rows)                                rows of the tile
// on a copy of `epilogue` that belongs to the task. P is the type of the products.
template <typename T, typename P, typename Epilogue>
void run_tiles(
    const Grid& grid, const Source<T>& source, const PackedWeights& weights, const Tiling& tiling,
    const Tasks& tasks, int64_t epilogue_floats, const Epilogue& epilogue);

// --- implementation ---------------------------------------------------------------------------------------

// Fills the band of image rows [i_begin, i_end).
template <typename T, typename P>
void fill_band(
    const Source<T>& source, const Grid& grid, const Tiling& tiling, int64_t image, int64_t i_begin,
    int64_t i_end, P* band) {
  const int64_t depth = round_up(source.channels, kLanes), stride = tiling.window_w * depth;
  for (int64_t row = i_begin; row < i_end + tiling.window_h - 1; row++) {
    const int64_t src_row = row + grid.taps[0].dh;
    if (src_row < 0 || src_row >= grid.src_h) {
      std::memset(static_cast<void*>(band), 0, grid.w * stride * sizeof(P));
      band += grid.w * stride;
      continue;
    }
    const int64_t src = (image * grid.src_h + src_row) * grid.src_w;
    for (int64_t tap = 0; tap < tiling.window_w; tap++, band += depth) {
      // The pixels whose source column j + dw lies inside the source.
      const int64_t dw = grid.taps[tap].dw;
      const int64_t lo = std::min(std::max(-dw, int64_t{0}), grid.w);
      const int64_t hi = std::max(std::min(grid.src_w - dw, grid.w), lo);
      zero_rows(band, lo, depth, stride);
      if (hi > lo) {
        source.load(src + lo + dw, 1, hi - lo, 0, source.channels, band + lo * stride, stride);
      }
      zero_rows(band + hi * stride, grid.w - hi, depth, stride);
    }
    band += (grid.w - 1) * stride;
  }
}

// The scratch of a thread and the tile that it works on.
template <typename T, typename P, typename Epilogue>
class TileRunner {
 public:
  TileRunner(
      const Grid& grid, const Source<T>& source, const PackedWeights& weights, const Tiling& tiling, const Tasks& tasks,
      int64_t epilogue_floats)
      : grid(grid), source(source), weights(weights), tiling(tiling), depth(weights.depth), taps(weights.taps),
        one_chunk(tiling.band || tiling.chunk_taps >= taps),
        direct(
            std::is_same_v<T, P> && grid.pointwise() && source.as_stored() && source.channels == depth &&
            !(Epilogue::kSecondProduct && depth % 512 == 0)) {
    // A row stride that is a power of two would put a column of the operand into few sets of the cache.
    left_stride = tiling.band ? tiling.window_w * depth : std::min(tiling.chunk_taps, taps) * depth + kLanes;
    int64_t left_size = 0;
    if (tiling.band) {
      left_size = (tiling.rows + tiling.window_h - 1) * grid.w * left_stride;
    } else if (!direct) {
      left_size = tiling.rows * left_stride;
    }
    // A panel at a time fits where its accumulator is final; else all panels wait for the last chunk.
    const int64_t max_rows = tiling.band ? tiling.rows * grid.w : tiling.rows;
    const int64_t acc_floats = max_rows * PackedWeights::kPanel * (one_chunk ? 1 : tasks.block_panels);
    Arena arena(thread_scratch(
        round_up(floats_of<P>(left_size), kLanes) + round_up(acc_floats, kLanes) + round_up(epilogue_floats, kLanes)));
    left = arena.take<P>(left_size);
    acc = arena.take(acc_floats);
    extra = arena.take(epilogue_floats);
  }

  // Tile `tile` times the panels [first, last).
  void run(int64_t tile, int64_t range, int64_t first, int64_t last, Epilogue& epilogue) {
    const int64_t column = first * PackedWeights::kPanel;
    epilogue.begin(
        extra, range, column, std::min(last * PackedWeights::kPanel, weights.columns) - column);
    const int64_t rows = tiling.band ? band_tile(tile, first, last, epilogue) : explicit_tile(tile, first, last, epilogue);
    epilogue.end(rows);
  }

 private:
  void finish(int64_t panel, const float* result, Epilogue& epilogue) {
    epilogue.panel({result, weights.width(panel), panel * PackedWeights::kPanel, weights.channels(panel)}, runs);
  }

  int64_t band_tile(int64_t tile, int64_t first, int64_t last, Epilogue& epilogue) {
    const int64_t per_image = (grid.h + tiling.rows - 1) / tiling.rows;
    const int64_t image = tile / per_image, i = tile % per_image * tiling.rows;
    const int64_t count = std::min(tiling.rows, grid.h - i);
    fill_band(source, grid, tiling, image, i, i + count, left);
    runs.clear();
    if (grid.dense()) {
      runs.push_back({0, count * grid.w, grid.dst_pixel(image, i, 0), 1});
    }
    for (int64_t row = 0; row < count && !grid.dense(); row++) {
      runs.push_back({row * grid.w, grid.w, grid.dst_pixel(image, i + row, 0), grid.dst_stride_w});
    }
    const int64_t rows = count * grid.w, next_row = grid.w * left_stride;
    for (int64_t panel = first; panel < last; panel++) {
      const int64_t width = weights.width(panel);
      for (int64_t r = 0; r < tiling.window_h; r++) {
        gemm<P>(
            rows, width, left_stride, left + r * next_row, left_stride,
            weights.template data<P>(panel) + r * left_stride * width, width, acc, width, r > 0);
      }
      finish(panel, acc, epilogue);
    }
    if constexpr (Epilogue::kSecondProduct) {
      for (int64_t r = 0; r < tiling.window_h; r++) {
        epilogue.operand(
            {left, left_stride, r * grid.w, rows, (count + tiling.window_h - 1) * grid.w, left_stride,
             r * tiling.window_w},
            runs);
      }
    }
    return rows;
  }

  int64_t explicit_tile(int64_t tile, int64_t first, int64_t last, Epilogue& epilogue) {
    const int64_t begin = tile * tiling.rows, end = std::min(begin + tiling.rows, grid.pixels()), rows = end - begin;
    list_runs(grid, begin, end, runs);
    for (int64_t tap = 0; tap < taps; tap += tiling.chunk_taps) {
      const int64_t count = std::min(tiling.chunk_taps, taps - tap), k = count * depth;
      const P* a = left;
      int64_t stride = left_stride;
      if constexpr (std::is_same_v<T, P>) {
        if (direct) {
          a = source.data + begin * depth;
          stride = depth;
        }
      }
      for (int64_t i = 0; i < count && !direct; i++) {
        gather_tap(source, grid, grid.taps[tap + i], begin, end, 0, source.channels, left + i * depth, left_stride);
      }
      for (int64_t panel = first; panel < last; panel++) {
        const int64_t width = weights.width(panel);
        float* out = one_chunk ? acc : acc + (panel - first) * PackedWeights::kPanel * tiling.rows;
        gemm<P>(
            rows, width, k, a, stride, weights.template data<P>(panel) + tap * depth * width, width, out, width, tap > 0);
        if (tap + count == taps) {
          finish(panel, out, epilogue);
        }
      }
      if constexpr (Epilogue::kSecondProduct) {
        epilogue.operand({a, stride, 0, rows, rows, k, tap}, runs);
      }
    }
    for (int64_t panel = first; taps == 0 && panel < last; panel++) {
      finish(panel, nullptr, epilogue);
    }
    return rows;
  }

  const Grid& grid;
  const Source<T>& source;
  const PackedWeights& weights;
  const Tiling& tiling;
  const int64_t depth, taps;
  const bool one_chunk;
  const bool direct; // a row of the source that is read as it is needs no scratch
  int64_t left_stride;
  P* left;
  float *acc, *extra;
  std::vector<Run> runs;
};

template <typename T, typename P, typename Epilogue>
void run_tiles(
    const Grid& grid, const Source<T>& source, const PackedWeights& weights, const Tiling& tiling,
    const Tasks& tasks, int64_t epilogue_floats, const Epilogue& epilogue) {
  tasks.run([&](int64_t task_begin, int64_t task_end) {
    TileRunner<T, P, Epilogue> runner(grid, source, weights, tiling, tasks, epilogue_floats);
    for (int64_t task = task_begin; task < task_end; task++) {
      const int64_t range = task % tasks.ranges, first = task / tasks.ranges * tasks.block_panels;
      const int64_t last = std::min(first + tasks.block_panels, tasks.panels);
      Epilogue mine = epilogue;
      for (int64_t tile = range * tasks.tiles / tasks.ranges; tile < (range + 1) * tasks.tiles / tasks.ranges; tile++) {
        runner.run(tile, range, first, last, mine);
      }
    }
    gemm_release<P>();
  });
}

} // namespace fused_preact
