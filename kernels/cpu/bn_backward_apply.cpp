// bn_backward_apply: dx = a g + b (x - mean) + c, with running statistics dx = a g (+ the gradient of the identity
// path), one pass.
#include "coefficients.h"
#include "ops.h"

namespace fused_preact {

Coefficients::Coefficients(
    const Tensor& scale_, const Tensor& rstd_, const Tensor& sum_g_, const Tensor& sum_gx_, int64_t count,
    bool training)
    : rows(at::empty({training ? 3 : 1, scale_.numel()}, at::kFloat)) {
  const Tensor scale = floats(scale_), rstd = floats(rstd_), sum_g = floats(sum_g_), sum_gx = floats(sum_gx_);
  const int64_t channels = scale.numel();
  float* out = rows.mutable_data_ptr<float>();
  const float *s = pointer(scale), *r = pointer(rstd), *g = pointer(sum_g), *gx = pointer(sum_gx);
  for (int64_t c = 0; c < channels; c++) {
    out[c] = s[c];
    if (training) {
      const double per_value = -static_cast<double>(s[c]) / static_cast<double>(count);
      out[channels + c] = static_cast<float>(per_value * r[c] * r[c] * gx[c]);
      out[2 * channels + c] = static_cast<float>(per_value * g[c]);
    }
  }
}

void apply_into(
    const Tensor& g, const Tensor& x, const Tensor& mean, const Coefficients& k, const OptionalTensor& residual,
    const Tensor& dx) {
  const int64_t channels = x.size(1), pixels = x.numel() / channels;
  FUSED_PREACT_DISPATCH(x.scalar_type(), "bn_backward_apply", [&] {
    const scalar_t *from = g.const_data_ptr<scalar_t>(), *raw = x.const_data_ptr<scalar_t>();
    const scalar_t* identity = data<scalar_t>(residual);
    scalar_t* to = dx.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, pixels, 1 + (1 << 14) / channels, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * channels;
      loops<scalar_t>().apply(
          from + at, raw + at, identity == nullptr ? nullptr : identity + at, end - begin, channels, k.a(), k.b(),
          k.c(), pointer(mean), to + at);
    });
  });
}

Tensor bn_backward_apply(
    const Tensor& g_, const Tensor& x_, const Tensor& mean_, const Tensor& scale, const Tensor& rstd,
    const Tensor& sum_g, const Tensor& sum_gx, bool training, const OptionalTensor& residual_grad) {
  const auto dtype = x_.scalar_type();
  if (!served(x_) || g_.scalar_type() != dtype ||
      (residual_grad.has_value() && residual_grad->scalar_type() != dtype)) {
    return call_reference<decltype(bn_backward_apply)>(
        "fused_preact::bn_backward_apply", g_, x_, mean_, scale, rstd, sum_g, sum_gx, training, residual_grad);
  }
  const Tensor g = nhwc(g_), x = nhwc(x_), dx = empty_nhwc(x.sizes(), x);
  const Coefficients k(scale, rstd, sum_g, sum_gx, x.numel() / x.size(1), training);
  apply_into(g, x, floats(mean_), k, nhwc(residual_grad), dx);
  return like_input(dx, x_);
}

TORCH_LIBRARY_IMPL(fused_preact, CPU, m) {
  m.impl("bn_backward_apply", bn_backward_apply);
}

} // namespace fused_preact
