// bn_update_running: the running statistics of a unit's BatchNorms, counters included, in one call.
#include "ops.h"

namespace fused_preact {

namespace {

// Whether update() serves; the reference serves the rest.
bool plain(
    const Tensor& mean, const Tensor& var, const Tensor& running_mean, const Tensor& running_var,
    const Tensor* counter) {
  return mean.scalar_type() == at::kFloat && mean.is_contiguous() && var.is_contiguous() &&
      running_mean.scalar_type() == at::kFloat && running_var.scalar_type() == at::kFloat &&
      running_mean.is_contiguous() && running_var.is_contiguous() &&
      (counter == nullptr || counter->scalar_type() == at::kLong);
}

void update(
    const Tensor& mean, const Tensor& var, const Tensor& running_mean, const Tensor& running_var,
    const Tensor* counter, std::optional<double> momentum, int64_t count) {
  float weight = static_cast<float>(momentum.value_or(0.0));
  if (counter != nullptr) {
    int64_t& tracked = *counter->mutable_data_ptr<int64_t>();
    tracked += 1;
    if (!momentum.has_value()) {
      weight = 1.0f / static_cast<float>(tracked);
    }
    counter->unsafeGetTensorImpl()->bump_version();
  }
  // torch.lerp's two forms, so that the bits are those of nn.BatchNorm2d's definition in the reference.
  const auto lerp = [weight](float from, float to) {
    return std::abs(weight) < 0.5f ? from + weight * (to - from) : to - (to - from) * (1.0f - weight);
  };
  const float unbiased = static_cast<float>(static_cast<double>(count) / std::max<int64_t>(count - 1, 1));
  const float *mu = mean.const_data_ptr<float>(), *v = var.const_data_ptr<float>();
  float *running_mu = running_mean.mutable_data_ptr<float>(), *running_v = running_var.mutable_data_ptr<float>();
  for (int64_t c = 0; c < mean.numel(); c++) {
    running_mu[c] = lerp(running_mu[c], mu[c]);
    running_v[c] = lerp(running_v[c], v[c] * unbiased);
  }
  // The dispatcher leaves this to an op that it did not generate: autograd must see a saved buffer change.
  running_mean.unsafeGetTensorImpl()->bump_version();
  running_var.unsafeGetTensorImpl()->bump_version();
}

} // namespace

void bn_update_running(
    at::TensorList mean, at::TensorList var, at::TensorList running_mean, at::TensorList running_var,
    at::TensorList counters, std::optional<double> momentum, at::IntArrayRef count) {
  TORCH_CHECK_VALUE(
      mean.size() == var.size() && mean.size() == running_mean.size() && mean.size() == running_var.size() &&
          mean.size() == count.size() && (counters.empty() || counters.size() == mean.size()),
      "bn_update_running: lists of different lengths, allowed are one entry a BatchNorm");
  for (size_t i = 0; i < mean.size(); i++) {
    const Tensor* counter = counters.empty() ? nullptr : &counters[i];
    if (plain(mean[i], var[i], running_mean[i], running_var[i], counter)) {
      update(mean[i], var[i], running_mean[i], running_var[i], counter, momentum, count[i]);
    } else {
      call_reference<decltype(bn_update_running)>(
          "fused_preact::bn_update_running", mean.slice(i, 1), var.slice(i, 1), running_mean.slice(i, 1),
          running_var.slice(i, 1), counters.empty() ? counters : counters.slice(i, 1), momentum, count.slice(i, 1));
    }
  }
}

TORCH_LIBRARY_IMPL(fused_preact, CPU, m) {
  m.impl("bn_update_running", bn_update_running);
}

} // namespace fused_preact
