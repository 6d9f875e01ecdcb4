// The BN backward as dx = a g + b (x - mean) + c per channel.
#pragma once

#include "common.h"

namespace fused_preact {

struct Coefficients {
  Tensor rows; // [3, C]

  Coefficients(
      const Tensor& scale, const Tensor& rstd, const Tensor& sum_g, const Tensor& sum_gx, int64_t count,
      bool training);

  const float* a() const {
    return pointer(rows);
  }
  const float* b() const {
    return a() + rows.size(1);
  }
  const float* c() const {
    return b() + rows.size(1);
  }
};

// dx = a g + b (x - mean) + c + residual; all channels_last and of one dtype, dx may be g.
void apply_into(
    const Tensor& g, const Tensor& x, const Tensor& mean, const Coefficients& k, const OptionalTensor& residual,
    const Tensor& dx);

} // namespace fused_preact
