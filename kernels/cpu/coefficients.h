// The BN backward as dx = a g + b (x - mean) + c per channel, with running statistics dx = a g alone.
#pragma once

#include "common.h"

namespace fused_preact {

struct Coefficients {
  Tensor rows; // a, b and c: [3, C], or [1, C]

  Coefficients(
      const Tensor& scale, const Tensor& rstd, const Tensor& sum_g, const Tensor& sum_gx, int64_t count,
      bool training);

  const float* a() const {
    return pointer(rows);
  }
  // Null with running statistics, and so is c.
  const float* b() const {
    return rows.size(0) == 1 ? nullptr : a() + rows.size(1);
  }
  const float* c() const {
    return rows.size(0) == 1 ? nullptr : a() + 2 * rows.size(1);
  }
};

// dx = a g + b (x - mean) + c + residual, or without b and c; all channels_last and of one dtype, dx may be g.
void apply_into(
    const Tensor& g, const Tensor& x, const Tensor& mean, const Coefficients& k, const OptionalTensor& residual,
    const Tensor& dx);

} // namespace fused_preact
