// conv_dgrad: g = (dgrad(dy, W) + da) [z > 0] (without a ReLU all of it), sum g and sum g (x - mean).
#include "dgrad_epilogue.h"
#include "ops.h"
#include "split.h"

namespace fused_preact {

std::tuple<Tensor, Tensor, Tensor> conv_dgrad(
    const Tensor& dy_, const Tensor& weight, const Tensor& x_, const OptionalTensor& scale_,
    const OptionalTensor& shift_, const OptionalTensor& mean_, const OptionalTensor& da_, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool relu) {
  const auto dtype = x_.scalar_type();
  const bool same_dtype = weight.scalar_type() == dtype && dy_.scalar_type() == dtype &&
      (!da_.has_value() || da_->scalar_type() == dtype);
  if (!served(x_) || !served(dy_) || !same_dtype) {
    return call_reference<decltype(conv_dgrad)>(
        "fused_preact::conv_dgrad", dy_, weight, x_, scale_, shift_, mean_, da_, stride, padding, dilation, groups,
        relu);
  }
  const bool masked = scale_.has_value() && shift_.has_value() && mean_.has_value();
  if (takes_split_path(x_, weight, stride, groups)) {
    return split_dgrad(dy_, weight, x_, scale_, shift_, mean_, da_, stride, padding, dilation, groups, relu);
  }
  const Tensor dy = nhwc(dy_), x = nhwc(x_);
  const OptionalTensor da = masked ? nhwc(da_) : std::nullopt;
  const Tensor scale = masked ? floats(*scale_) : Tensor(), shift = masked ? floats(*shift_) : Tensor();
  const Tensor mean = masked ? floats(*mean_) : Tensor();
  const ConvShape shape(x.sizes(), weight.sizes(), stride, padding, dilation);
  const Tensor g = empty_nhwc(x.sizes(), x);
  const at::ScalarType products = product_type(dtype);
  std::optional<PartSums> sum_g, sum_gx;
  if (masked) {
    sum_g.emplace(at::get_num_threads(), shape.c);
    sum_gx.emplace(at::get_num_threads(), shape.c);
  }
  for (const Grid& grid : shape.backward_grids()) {
    const PackedWeights packed = pack_backward(weight, grid, products);
    const Tiling tiling(grid, packed.depth);
    const Tasks tasks(packed, tiling);
    FUSED_PREACT_DISPATCH(dtype, "conv_dgrad", [&] {
      const Source<scalar_t> source{dy.const_data_ptr<scalar_t>(), shape.k};
      const DgradEpilogue<scalar_t> epilogue{
          x.const_data_ptr<scalar_t>(), data<scalar_t>(da), g.mutable_data_ptr<scalar_t>(), shape.c,
          masked ? Affine{pointer(scale), pointer(shift), floor_of(relu)} : Affine{nullptr, nullptr},
          masked ? pointer(mean) : nullptr, masked ? &*sum_g : nullptr, masked ? &*sum_gx : nullptr};
      with_product_type<scalar_t>(products, [&](auto product) {
        run_tiles<scalar_t, decltype(product)>(
            grid, source, packed, tiling, tasks, 2 * round_up(shape.c, kLanes), epilogue);
      });
    });
  }
  const Tensor out = like_input(g, x_);
  if (!masked) {
    return {out, at::empty({0}, at::kFloat), at::empty({0}, at::kFloat)};
  }
  return {out, sum_g->finish(), sum_gx->finish()};
}

TORCH_LIBRARY_IMPL(fused_preact, CPU, m) {
  m.impl("conv_dgrad", conv_dgrad);
}

} // namespace fused_preact
