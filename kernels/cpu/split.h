// The split path: activate once into a temporary, the library's convolution, a fused pass over its result.
#pragma once

#include "common.h"

namespace fused_preact {

// Whether the split path serves this convolution rather than the tiles.
bool takes_split_path(const Tensor& x, const Tensor& weight, at::IntArrayRef stride, int64_t groups);

std::tuple<Tensor, Tensor, Tensor> split_fprop(
    const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool stats, bool output_relu, bool relu);

std::tuple<Tensor, Tensor, Tensor> split_dgrad(
    const Tensor& dy, const Tensor& weight, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
    const OptionalTensor& mean, const OptionalTensor& da, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool relu);

Tensor split_wgrad(
    const Tensor& dy, const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& weight,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool relu);

} // namespace fused_preact
