// The ops of this folder that others of it call.
#pragma once

#include "common.h"

namespace fused_preact {

std::tuple<Tensor, Tensor> bn_stats(const Tensor& x);

std::tuple<Tensor, Tensor, Tensor> bn_scale_shift(
    const Tensor& mean, const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias, double eps);

void bn_update_running(
    at::TensorList mean, at::TensorList var, at::TensorList running_mean, at::TensorList running_var,
    at::TensorList counters, std::optional<double> momentum, at::IntArrayRef count);

std::tuple<Tensor, Tensor, Tensor> conv_fprop(
    const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool stats, bool output_relu, bool relu);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_fprop_bn(
    const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& weight, const OptionalTensor& bias,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, double eps, bool relu);

std::tuple<Tensor, Tensor, Tensor> conv_dgrad(
    const Tensor& dy, const Tensor& weight, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
    const OptionalTensor& mean, const OptionalTensor& da, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool relu);

Tensor conv_wgrad(
    const Tensor& dy, const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& weight,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, bool relu);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_backward(
    const Tensor& dy, at::TensorList pending, const Tensor& weight, const Tensor& x, at::TensorList bn,
    const OptionalTensor& da, const OptionalTensor& residual_grad, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool training, bool apply, bool weight_grad, bool relu);

Tensor bn_backward_apply(
    const Tensor& g, const Tensor& x, const Tensor& mean, const Tensor& scale, const Tensor& rstd,
    const Tensor& sum_g, const Tensor& sum_gx, bool training, const OptionalTensor& residual_grad);

Tensor bn_relu_avg_pool(const Tensor& x, const Tensor& scale, const Tensor& shift);

std::tuple<Tensor, Tensor> bn_relu_avg_pool_reduce(
    const Tensor& dy, const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& mean);

Tensor bn_relu_avg_pool_apply(
    const Tensor& dy, const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& mean,
    const Tensor& rstd, const Tensor& sum_g, const Tensor& sum_gx, bool training);

} // namespace fused_preact
