// The network's head, mean over H and W of max(s x + t, 0), and the two passes of its backward.
#include "coefficients.h"
#include "ops.h"

namespace fused_preact {

Tensor bn_relu_avg_pool(const Tensor& x_, const Tensor& scale_, const Tensor& shift_) {
  if (!served(x_)) {
    return call_reference<decltype(bn_relu_avg_pool)>("fused_preact::bn_relu_avg_pool", x_, scale_, shift_);
  }
  const Tensor x = nhwc(x_), scale = floats(scale_), shift = floats(shift_);
  const int64_t images = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  const Tensor out = at::empty({images, channels}, x.options());
  FUSED_PREACT_DISPATCH(x.scalar_type(), "bn_relu_avg_pool", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        loops<scalar_t>().pool(
            from + i * pixels * channels, pixels, channels, {pointer(scale), pointer(shift)}, to + i * channels);
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> bn_relu_avg_pool_reduce(
    const Tensor& dy_, const Tensor& x_, const Tensor& scale_, const Tensor& shift_, const Tensor& mean_) {
  if (!served(x_) || dy_.scalar_type() != x_.scalar_type()) {
    return call_reference<decltype(bn_relu_avg_pool_reduce)>(
        "fused_preact::bn_relu_avg_pool_reduce", dy_, x_, scale_, shift_, mean_);
  }
  const Tensor dy = dy_.contiguous(), x = nhwc(x_), scale = floats(scale_), shift = floats(shift_),
               mean = floats(mean_);
  const int64_t images = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  const Parts parts(images);
  PartSums sum_g(parts.parts, channels), sum_gx(parts.parts, channels);
  FUSED_PREACT_DISPATCH(x.scalar_type(), "bn_relu_avg_pool_reduce", [&] {
    const scalar_t *grad = dy.const_data_ptr<scalar_t>(), *from = x.const_data_ptr<scalar_t>();
    parts.run([&](int64_t part, int64_t begin, int64_t end) {
      const int64_t size = round_up(channels, kLanes);
      float* sums = thread_scratch(2 * size);
      for (int64_t i = begin; i < end; i++) {
        std::memset(sums, 0, 2 * size * sizeof(float));
        loops<scalar_t>().pool_reduce(
            grad + i * channels, from + i * pixels * channels, pixels, channels, {pointer(scale), pointer(shift)},
            pointer(mean), sums, sums + size);
        sum_g.add(part, sums, 0, channels);
        sum_gx.add(part, sums + size, 0, channels);
      }
    });
  });
  return {sum_g.finish(), sum_gx.finish()};
}

Tensor bn_relu_avg_pool_apply(
    const Tensor& dy_, const Tensor& x_, const Tensor& scale_, const Tensor& shift_, const Tensor& mean_,
    const Tensor& rstd, const Tensor& sum_g, const Tensor& sum_gx, bool training) {
  if (!served(x_) || dy_.scalar_type() != x_.scalar_type()) {
    return call_reference<decltype(bn_relu_avg_pool_apply)>(
        "fused_preact::bn_relu_avg_pool_apply", dy_, x_, scale_, shift_, mean_, rstd, sum_g, sum_gx, training);
  }
  const Tensor dy = dy_.contiguous(), x = nhwc(x_), scale = floats(scale_), shift = floats(shift_),
               mean = floats(mean_), dx = empty_nhwc(x.sizes(), x);
  const int64_t images = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  const Coefficients k(scale, rstd, sum_g, sum_gx, images * pixels, training);
  FUSED_PREACT_DISPATCH(x.scalar_type(), "bn_relu_avg_pool_apply", [&] {
    const scalar_t *grad = dy.const_data_ptr<scalar_t>(), *from = x.const_data_ptr<scalar_t>();
    scalar_t* to = dx.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t at = i * pixels * channels;
        loops<scalar_t>().pool_apply(
            grad + i * channels, from + at, pixels, channels, {pointer(scale), pointer(shift)}, k.a(), k.b(), k.c(),
            pointer(mean), to + at);
      }
    });
  });
  return like_input(dx, x_);
}

TORCH_LIBRARY_IMPL(fused_preact, CPU, m) {
  m.impl("bn_relu_avg_pool", bn_relu_avg_pool);
  m.impl("bn_relu_avg_pool_reduce", bn_relu_avg_pool_reduce);
  m.impl("bn_relu_avg_pool_apply", bn_relu_avg_pool_apply);
}

} // namespace fused_preact
