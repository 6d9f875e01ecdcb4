// conv_fprop: y = conv(a, W) + bias + residual, and the moments of the stored y. a is max(s x + t, 0) with relu, else
// s x + t, and x without s and t; with output_relu the sum with the bias is max(., 0), before the residual is added.
#include <ATen/ops/ones.h>

#include "ops.h"
#include "split.h"
#include "tile_gemm.h"

namespace fused_preact {

namespace {

template <typename T>
struct FpropEpilogue {
  static constexpr bool kSecondProduct = false;
  const float* bias;
  const float* ones; // with a ReLU of the output: the loop of the prologue is this epilogue's too
  const T* residual;
  T* y;
  int64_t channels;
  PartMoments* statistics; // null: none
  Moments tile{};
  int64_t range = 0, first = 0, columns = 0;

  void begin(float* scratch, int64_t range_, int64_t first_, int64_t columns_) {
    range = range_;
    first = first_;
    columns = columns_;
    if (statistics != nullptr) {
      const int64_t size = round_up(columns, kLanes);
      tile = {scratch, scratch + size, scratch + 2 * size};
    }
  }

  void panel(const TilePanel& panel, const std::vector<Run>& runs) const {
    const int64_t c = panel.column;
    const int64_t at_tile = c - first;
    const Moments moments =
        statistics == nullptr ? Moments{} : Moments{tile.high + at_tile, tile.low + at_tile, tile.m2 + at_tile};
    for (const Run& run : runs) {
      const int64_t at = run.dst_pixel * channels + c;
      const float* acc = panel.acc + run.row * panel.acc_stride;
      if (ones != nullptr) {
        operands<float, float>().activate(
            acc, panel.acc_stride, run.count, panel.channels, {ones + c, bias + c}, const_cast<float*>(acc),
            panel.acc_stride);
      }
      loops<T>().fprop_epilogue(
          acc, panel.acc_stride, run.count, panel.channels, bias == nullptr || ones != nullptr ? nullptr : bias + c,
          residual == nullptr ? nullptr : residual + at, y + at, channels,
          moments, run.row);
    }
  }

  void end(int64_t rows) const {
    if (statistics != nullptr) {
      statistics->merge(range, rows, tile, first, columns);
    }
  }
};

} // namespace

std::tuple<Tensor, Tensor, Tensor> conv_fprop(
    const Tensor& x_, const OptionalTensor& scale_, const OptionalTensor& shift_, const Tensor& weight,
    const OptionalTensor& bias_, const OptionalTensor& residual_, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool stats, bool output_relu, bool relu) {
  const bool same_dtype = weight.scalar_type() == x_.scalar_type() &&
      (!residual_.has_value() || residual_->scalar_type() == x_.scalar_type());
  if (!served(x_) || !same_dtype) {
    return call_reference<decltype(conv_fprop)>(
        "fused_preact::conv_fprop", x_, scale_, shift_, weight, bias_, residual_, stride, padding, dilation, groups,
        stats, output_relu, relu);
  }
  if (takes_split_path(x_, weight, stride, groups)) {
    return split_fprop(
        x_, scale_, shift_, weight, bias_, residual_, stride, padding, dilation, groups, stats, output_relu, relu);
  }
  const bool prologue = scale_.has_value() && shift_.has_value();
  const Tensor x = nhwc(x_), scale = prologue ? floats(*scale_) : Tensor(), shift = prologue ? floats(*shift_) : Tensor();
  const OptionalTensor residual = nhwc(residual_);
  Tensor bias = bias_.has_value() ? floats(*bias_) : Tensor();
  const ConvShape shape(x.sizes(), weight.sizes(), stride, padding, dilation);
  const Grid grid = shape.forward_grid();
  const at::ScalarType products = product_type(x.scalar_type());
  const PackedWeights packed = pack_forward(weight, products);
  const Tiling tiling(grid, packed.depth);
  const Tasks tasks(packed, tiling);
  const Tensor y = empty_nhwc({shape.n, shape.k, shape.oh, shape.ow}, x);
  Tensor ones;
  if (output_relu) {
    ones = at::ones({shape.k}, at::kFloat);
    bias = bias.defined() ? bias : at::zeros({shape.k}, at::kFloat);
  }
  std::optional<PartMoments> statistics;
  if (stats) {
    statistics.emplace(tasks.ranges, shape.k);
  }
  FUSED_PREACT_DISPATCH(x.scalar_type(), "conv_fprop", [&] {
    const Source<scalar_t> source{
        x.const_data_ptr<scalar_t>(), shape.c,
        prologue ? Affine{pointer(scale), pointer(shift), floor_of(relu)} : Affine{nullptr, nullptr}};
    const FpropEpilogue<scalar_t> epilogue{
        bias.defined() ? pointer(bias) : nullptr, output_relu ? pointer(ones) : nullptr, data<scalar_t>(residual),
        y.mutable_data_ptr<scalar_t>(), shape.k, stats ? &*statistics : nullptr};
    with_product_type<scalar_t>(products, [&](auto product) {
      run_tiles<scalar_t, decltype(product)>(
          grid, source, packed, tiling, tasks, 3 * round_up(shape.k, kLanes), epilogue);
    });
  });
  const Tensor out = like_input(y, x_);
  if (!stats) {
    return {out, at::empty({0}, at::kFloat), at::empty({0}, at::kFloat)};
  }
  const auto [mean, var] = statistics->finish();
  return {out, mean, var};
}

// conv_fprop with statistics, and the vectors of the BN that reads y: one operation for the host.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_fprop_bn(
    const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& weight, const OptionalTensor& bias,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, double eps, bool relu) {
  const auto [y, mean, var] = conv_fprop(
      x, scale, shift, weight, bias, std::nullopt, stride, padding, dilation, groups, true, false, relu);
  const auto [new_scale, new_shift, rstd] = bn_scale_shift(mean, var, bn_weight, bn_bias, eps);
  return {y, mean, var, new_scale, new_shift, rstd};
}

TORCH_LIBRARY_IMPL(fused_preact, CPU, m) {
  m.impl("conv_fprop", conv_fprop);
  m.impl("conv_fprop_bn", conv_fprop_bn);
}

} // namespace fused_preact
