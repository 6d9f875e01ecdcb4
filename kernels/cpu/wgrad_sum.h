// The second product of the joint backward: dW^T[c, tap k] = sum over pixels of a[pixel, c] dy[pixel + tap, k], with
// the left operand of dgrad as its right one.
#pragma once

#include "tile_gemm.h"

namespace fused_preact {

// The accumulators of dW^T, one [C, taps * depth] per range of tiles. A block of columns of dgrad is a block of rows
// here, so that no two threads share one.
class WgradSum {
 public:
  WgradSum(const PackedWeights& weights, int64_t ranges)
      : channels(weights.columns), width(weights.taps * weights.depth), depth(weights.depth),
        sums(at::empty({ranges, channels, width}, at::kFloat)) {}

  float* row(int64_t range, int64_t channel) const {
    return sums.data_ptr<float>() + (range * channels + channel) * width;
  }

  // Adds the ranges in order and stores the taps of the grid into dweight [K, R S, C].
  void finish(const Grid& grid, const Tensor& dweight) const;

  int64_t channels, width, depth;

 private:
  Tensor sums;
};

} // namespace fused_preact
