// Element loops: what is done to a tile between memory and the GEMM. One table of functions per storage
// type, filled with the best instruction set of the processor at hand (loops.cpp).
//
// Tiles are row-major scratch, one row a pixel, one column a channel, padded to a multiple of 16 channels; tensors are
// NHWC, so a row of a tile is a run of consecutive memory. Operands of products are of the type that is multiplied,
// results and everything else float. All strides count elements.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fused_preact {

// Channels are handled 16 at a time; scratch rows are padded to it.
constexpr int64_t kLanes = 16;

constexpr int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

// Mean and sum of squared deviations of the rows of a tile. The mean is high + low: with mean/std of 1e4 one float
// has no digits left for the differences between tiles. Of equal values they are that value, 0 and 0, exactly.
struct Moments {
  float* high;
  float* low;
  float* m2;
};

// The prologue and what the mask of a backward pass recomputes: z = scale x + shift, per channel, rounded alike in
// both, then max(z, floor). A floor of 0 is the ReLU. One of NaN, below which nothing lies, leaves every z as it is,
// infinities too, and masks nothing: a site without a ReLU.
struct Affine {
  const float* scale; // null: identity, no ReLU
  const float* shift;
  float floor = 0.0f;
};

// The gradient of a tensor y that a BN follows, held as that BN's g: dy = a g + b (y - mean) + c. With running
// statistics y is null and dy = a g: y may hold infinities, which b = 0 would make NaN.
template <typename T>
struct Pending {
  const T* y;
  const float *a, *b, *c, *mean; // a null: dy itself
};

// What makes operands of type P, rounded to it where it is narrower than float, of tensors of type T.
template <typename T, typename P>
struct Operands {
  // out[r][c] = max(z, floor), or x where scale is null; channels are padded with zeros.
  void (*activate)(
      const T* x, int64_t x_stride, int64_t rows, int64_t channels, Affine bn, P* out, int64_t out_stride);

  // out[c][r] = max(z, floor). Columns are written 16 at a time: after the last row come up to 15 zeros.
  void (*activate_transposed)(
      const T* x, int64_t x_stride, int64_t rows, int64_t channels, Affine bn, P* out, int64_t out_stride);

  // out[r][c] = a g + b (y - mean) + c, or a g where y is null; channels are padded with zeros. g and y have the same stride.
  void (*load_pending)(
      const T* g, Pending<T> pending, int64_t stride, int64_t rows, int64_t channels, P* out, int64_t out_stride);
};

template <typename T>
struct Loops {
  Operands<T, float> wide;
  Operands<T, T> own;
  Operands<float, T> narrowed; // of accumulators

  // The same as activate, stored as T and without padding: for the split path.
  void (*activate_store)(const T* x, int64_t rows, int64_t channels, Affine bn, T* out);

  // y = acc + bias + residual (both optional); moments of the stored y where moments.m2 is not null, to which
  // `seen` rows of the tile have gone before.
  void (*fprop_epilogue)(
      const float* acc, int64_t acc_stride, int64_t rows, int64_t channels, const float* bias,
      const T* residual, T* y, int64_t y_stride, Moments moments, int64_t seen);

  // g = (acc + da) [z > floor], sum g and sum g (x - mean) of the stored g. acc null: zeros; da null: none;
  // bn.scale null: g = acc, no mask and no sums.
  void (*dgrad_epilogue)(
      const float* acc, int64_t acc_stride, int64_t rows, int64_t channels, const T* x, const T* da, T* g,
      int64_t stride, Affine bn, const float* mean, float* sum_g, float* sum_gx);

  // Moments of rows of x.
  void (*moments)(const T* x, int64_t x_stride, int64_t rows, int64_t channels, Moments moments);

  // dx = a g + b (x - mean) + c + residual (optional); a g + residual where b is null. dx may be g.
  void (*apply)(
      const T* g, const T* x, const T* residual, int64_t rows, int64_t channels, const float* a,
      const float* b, const float* c, const float* mean, T* dx);

  // out = mean over rows of max(z, 0): one image of the head.
  void (*pool)(const T* x, int64_t rows, int64_t channels, Affine bn, T* out);

  // Sums of g and g (x - mean) over one image of the head, g = dy/rows [z > 0]; added to the sums.
  void (*pool_reduce)(
      const T* dy, const T* x, int64_t rows, int64_t channels, Affine bn, const float* mean, float* sum_g,
      float* sum_gx);

  // dx = a g + b (x - mean) + c over one image of the head; a g where b is null.
  void (*pool_apply)(
      const T* dy, const T* x, int64_t rows, int64_t channels, Affine bn, const float* a, const float* b,
      const float* c, const float* mean, T* dx);
};

// The loops of this storage type for this processor; T is float, c10::BFloat16 or c10::Half.
template <typename T>
const Loops<T>& loops();

template <typename T, typename P>
const Operands<T, P>& operands() {
  if constexpr (std::is_same_v<P, float>) {
    return loops<T>().wide;
  } else if constexpr (std::is_same_v<T, P>) {
    return loops<T>().own;
  } else {
    return loops<P>().narrowed;
  }
}

struct CommonLoops {
  // out[c][r] = in[r][c]
  void (*transpose)(const float* in, int64_t in_stride, int64_t rows, int64_t cols, float* out, int64_t out_stride);

  // The same of 16-bit values.
  void (*transpose_16)(
      const uint16_t* in, int64_t in_stride, int64_t rows, int64_t cols, uint16_t* out, int64_t out_stride);

  // Two rows as one of pairs, out[r / 2][c][r % 2] = in[r][c], a row of zeros after an odd number of them; columns in
  // whole vectors. The right operand of a product of 16-bit numbers.
  void (*interleave)(const uint16_t* in, int64_t in_stride, int64_t rows, int64_t cols, uint16_t* out);

  // Chan's formula: merge a tile of `tile_count` rows into (count, mean, m2).
  void (*merge)(double count, double* mean, double* m2, double tile_count, Moments tile, int64_t channels);

  // out[c] = max over p of from[p][c]; a NaN wins. Channels in whole vectors.
  void (*maximum)(const float* const* from, int64_t count, int64_t channels, float* out);

  // total += part
  void (*add)(double* total, const float* part, int64_t channels);

  // "avx512", "avx2" or "default"
  const char* name;
};

const CommonLoops& common_loops();

} // namespace fused_preact
