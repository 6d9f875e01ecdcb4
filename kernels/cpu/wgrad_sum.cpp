// Adds up the parts of dW and turns them into the weight's order.
#include "wgrad_sum.h"

namespace fused_preact {

void WgradSum::finish(const Grid& grid, const Tensor& dweight) const {
  const int64_t ranges = sums.size(0), size = channels * width, k = dweight.size(0);
  const int64_t row_floats = dweight.size(1) * channels, taps = width / depth;
  float *sum = sums.data_ptr<float>(), *to = dweight.data_ptr<float>();
  // Pieces of 16 columns of one tap: added up, then turned.
  const int64_t pieces = (k + kLanes - 1) / kLanes;
  at::parallel_for(0, taps * pieces, 1 + (1 << 14) / (channels * kLanes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t tap = i / pieces, first = i % pieces * kLanes, count = std::min(kLanes, k - first);
      float* piece = sum + tap * depth + first;
      for (int64_t range = 1; range < ranges; range++) {
        for (int64_t c = 0; c < channels; c++) {
          for (int64_t j = 0; j < count; j++) {
            piece[c * width + j] += piece[range * size + c * width + j];
          }
        }
      }
      common_loops().transpose(
          piece, width, channels, count, to + first * row_floats + grid.taps[tap].index * channels, row_floats);
    }
  });
}

} // namespace fused_preact
