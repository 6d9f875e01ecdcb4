#include "split.h"

#include <ATen/Context.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty_like.h>

#include "ops.h"

namespace fused_preact {

namespace {

// A k x k site at stride 1 with 2 MiB of weights in fp32: the library multiplies it 5 to 10 % faster than our tiles
// (300 GFLOP/s against 280 at 256 channels), and on maps so small BN and ReLU are 4 % of eager's time, less than that.
// Over eager, forward and backward: 256 channels at 14x14 were 0.93, 512 at 7x7 0.95 (128 at 28x28, with 576 KiB: 1.00,
// and at stride 2 we are ahead, 1.13 and 1.09). Our tiles read 16-bit tensors faster than the library does.
bool multiplies_faster(const Tensor& x, const Tensor& weight, at::IntArrayRef stride) {
  return x.scalar_type() == at::kFloat && weight.size(2) * weight.size(3) > 1 && stride[0] == 1 && stride[1] == 1 &&
      weight.numel() >= (1 << 19) && at::globalContext().hasMKLDNN() && at::globalContext().userEnabledMkldnn();
}

} // namespace

bool takes_split_path(const Tensor& x, const Tensor& weight, at::IntArrayRef stride, int64_t groups) {
  // A group has few channels: a tile of it is no matrix product worth the name.
  return groups > 1 || multiplies_faster(x, weight, stride);
}

namespace {

constexpr int64_t kRowGrain = 64;

// Whether some tap of the kernel reads only padding, whatever the output pixel.
bool tap_outside(
    at::IntArrayRef input, at::IntArrayRef weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation) {
  for (size_t i = 0; i < 2; i++) {
    const int64_t size = input[i + 2], taps = weight[i + 2], reach = dilation[i] * (taps - 1);
    const int64_t outputs = (size + 2 * padding[i] - reach - 1) / stride[i] + 1;
    for (int64_t tap = 0; tap < taps; tap++) {
      const int64_t at = tap * dilation[i] - padding[i]; // what the first output reads
      const int64_t first = at >= 0 ? 0 : (stride[i] - 1 - at) / stride[i]; // the first output that may read a pixel
      if (first >= outputs || first * stride[i] + at >= size) {
        return true;
      }
    }
  }
  return false;
}

// The operand of the library's convolution. Where a tap is outside its zeros are stored: with padding of its own oneDNN
// (torch 2.13) crashes where every tap is, and of 16-bit tensors makes wrong outputs and leaves memory of dW unwritten.
struct Padded {
  Tensor a;
  std::vector<int64_t> padding;

  Padded(
      const Tensor& a_, const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding_, at::IntArrayRef dilation)
      : a(a_), padding(padding_.vec()) {
    if (tap_outside(a.sizes(), weight.sizes(), stride, padding, dilation)) {
      a = nhwc(at::constant_pad_nd(a, {padding[1], padding[1], padding[0], padding[0]}));
      padding = {0, 0};
    }
  }
};

// The library's dgrad and wgrad, those that `mask` asks for.
std::tuple<Tensor, Tensor> library_backward(
    const Tensor& dy, const Tensor& a, const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, std::array<bool, 3> mask) {
  const Padded padded(a, weight, stride, padding, dilation);
  auto [dx, dweight, dbias] = at::convolution_backward(
      nhwc(dy), padded.a, weight, std::nullopt, stride, padded.padding, dilation, false, {0, 0}, groups, mask);
  if (dx.defined() && dx.sizes() != a.sizes()) {
    dx = dx.narrow(2, padding[0], a.size(2)).narrow(3, padding[1], a.size(3));
  }
  return {dx, dweight};
}

Tensor activated(const Tensor& x, const Tensor& scale_, const Tensor& shift_, bool relu) {
  const Tensor scale = floats(scale_), shift = floats(shift_), out = empty_nhwc(x.sizes(), x);
  const int64_t channels = x.size(1);
  FUSED_PREACT_DISPATCH(x.scalar_type(), "activated", [&] {
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, x.numel() / channels, kRowGrain, [&](int64_t begin, int64_t end) {
      loops<scalar_t>().activate_store(
          in + begin * channels, end - begin, channels, {pointer(scale), pointer(shift), floor_of(relu)},
          to + begin * channels);
    });
  });
  return out;
}

} // namespace

std::tuple<Tensor, Tensor, Tensor> split_fprop(
    const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool stats, bool output_relu, bool relu) {
  const bool prologue = scale.has_value() && shift.has_value();
  const Tensor a = prologue ? activated(nhwc(x), *scale, *shift, relu) : nhwc(x);
  const OptionalTensor same = bias.has_value() ? OptionalTensor(bias->to(weight.scalar_type())) : std::nullopt;
  const Padded padded(a, weight, stride, padding, dilation);
  Tensor y = nhwc(at::conv2d(padded.a, weight, same, stride, padded.padding, dilation, groups));
  if (output_relu) {
    y.relu_();
  }
  if (residual.has_value()) {
    y.add_(*residual);
  }
  const Tensor out = like_input(y, x);
  if (!stats) {
    return {out, at::empty({0}, at::kFloat), at::empty({0}, at::kFloat)};
  }
  const auto [mean, var] = bn_stats(y);
  return {out, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> split_dgrad(
    const Tensor& dy, const Tensor& weight, const Tensor& x_, const OptionalTensor& scale_,
    const OptionalTensor& shift_, const OptionalTensor& mean_, const OptionalTensor& da, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool relu) {
  const Tensor x = nhwc(x_);
  Tensor grad = nhwc(std::get<0>(
      library_backward(dy, x, weight, stride, padding, dilation, groups, {true, false, false})));
  if (!scale_.has_value() || !shift_.has_value() || !mean_.has_value()) {
    return {like_input(grad, x_), at::empty({0}, at::kFloat), at::empty({0}, at::kFloat)};
  }
  if (da.has_value()) {
    grad.add_(*da);
  }
  const Tensor scale = floats(*scale_), shift = floats(*shift_), mean = floats(*mean_);
  const int64_t channels = x.size(1), pixels = x.numel() / channels;
  const Parts tiles((pixels + kRowGrain - 1) / kRowGrain);
  PartSums sum_g(tiles.parts, channels), sum_gx(tiles.parts, channels);
  FUSED_PREACT_DISPATCH(x.scalar_type(), "split_dgrad", [&] {
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    scalar_t* g = grad.mutable_data_ptr<scalar_t>();
    tiles.run([&](int64_t part, int64_t begin, int64_t end) {
      const int64_t size = round_up(channels, kLanes);
      float* sums = thread_scratch(2 * size);
      for (int64_t tile = begin; tile < end; tile++) {
        const int64_t first = tile * kRowGrain, rows = std::min(kRowGrain, pixels - first);
        std::memset(sums, 0, 2 * size * sizeof(float));
        loops<scalar_t>().dgrad_epilogue(
            nullptr, 0, rows, channels, in + first * channels, g + first * channels, g + first * channels, channels,
            {pointer(scale), pointer(shift), floor_of(relu)}, pointer(mean), sums, sums + size);
        sum_g.add(part, sums, 0, channels);
        sum_gx.add(part, sums + size, 0, channels);
      }
    });
  });
  return {like_input(grad, x_), sum_g.finish(), sum_gx.finish()};
}

Tensor split_wgrad(
    const Tensor& dy, const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& weight,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool relu) {
  const Tensor dweight = std::get<1>(library_backward(
      dy, activated(nhwc(x), scale, shift, relu), weight, stride, padding, dilation, groups, {false, true, false}));
  return dweight.strides() == weight.strides() ? dweight : at::empty_like(weight).copy_(dweight);
}

} // namespace fused_preact
