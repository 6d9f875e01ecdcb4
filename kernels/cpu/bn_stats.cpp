// bn_stats and bn_scale_shift: what the prologues need where no epilogue made it.
#include "ops.h"

namespace fused_preact {

std::tuple<Tensor, Tensor> bn_stats(const Tensor& x_) {
  if (!served(x_)) {
    return call_reference<decltype(bn_stats)>("fused_preact::bn_stats", x_);
  }
  const Tensor x = nhwc(x_);
  const int64_t channels = x.size(1), pixels = x.numel() / channels;
  // A tile of 64 Ki values, of at least 64 rows: merging it costs as much as a few rows. Of at most 2048 rows, so that
  // no long sum runs in float.
  const int64_t tile_rows = std::clamp<int64_t>((1 << 16) / channels, 64, 2048);
  const Parts tiles((pixels + tile_rows - 1) / tile_rows);
  PartMoments total(tiles.parts, channels);
  FUSED_PREACT_DISPATCH(x.scalar_type(), "bn_stats", [&] {
    const scalar_t* values = x.const_data_ptr<scalar_t>();
    tiles.run([&](int64_t part, int64_t begin, int64_t end) {
      const int64_t size = round_up(channels, kLanes);
      float* scratch = thread_scratch(3 * size);
      const Moments tile{scratch, scratch + size, scratch + 2 * size};
      for (int64_t i = begin; i < end; i++) {
        const int64_t first = i * tile_rows, rows = std::min(tile_rows, pixels - first);
        loops<scalar_t>().moments(values + first * channels, channels, rows, channels, tile);
        total.merge(part, rows, tile, 0, channels);
      }
    });
  });
  return total.finish();
}

std::tuple<Tensor, Tensor, Tensor> bn_scale_shift(
    const Tensor& mean_, const Tensor& var_, const OptionalTensor& weight_, const OptionalTensor& bias_, double eps) {
  if (var_.scalar_type() != at::kFloat || mean_.scalar_type() != at::kFloat) {
    return call_reference<decltype(bn_scale_shift)>(
        "fused_preact::bn_scale_shift", mean_, var_, weight_, bias_, eps);
  }
  const Tensor mean = floats(mean_), var = floats(var_);
  const Tensor weight = weight_.has_value() ? floats(*weight_) : Tensor();
  const Tensor bias = bias_.has_value() ? floats(*bias_) : Tensor();
  const int64_t channels = var.numel();
  const Tensor scale = at::empty({channels}, at::kFloat), shift = at::empty({channels}, at::kFloat),
               rstd = at::empty({channels}, at::kFloat);
  const float *mu = pointer(mean), *v = pointer(var);
  const float* gamma = weight.defined() ? pointer(weight) : nullptr;
  const float* beta = bias.defined() ? pointer(bias) : nullptr;
  float *s = scale.mutable_data_ptr<float>(), *t = shift.mutable_data_ptr<float>(), *r = rstd.mutable_data_ptr<float>();
  // 16-bit parameters go with a 16-bit x, whose prologue rounds s x before it adds t (see affine() in loops_body.h):
  // rounded here too, the two products cancel where x = mu. With beta = 0 they do so either way.
  const bool rounded = bias_.has_value() && bias_->scalar_type() != at::kFloat;
  for (int64_t c = 0; c < channels; c++) {
    // In double where it is free: with mean/std of 1e4 the shift has few digits to lose.
    const double inverse = 1.0 / std::sqrt(static_cast<double>(v[c]) + eps);
    r[c] = static_cast<float>(inverse);
    s[c] = static_cast<float>((gamma == nullptr ? 1.0 : gamma[c]) * inverse);
    double product = static_cast<double>(mu[c]) * s[c];
    if (rounded) {
      product = static_cast<float>(product);
    }
    t[c] = static_cast<float>((beta == nullptr ? 0.0 : beta[c]) - product);
  }
  return {scale, shift, rstd};
}

TORCH_LIBRARY_IMPL(fused_preact, CPU, m) {
  m.impl("bn_stats", bn_stats);
  m.impl("bn_scale_shift", bn_scale_shift);
}

} // namespace fused_preact
