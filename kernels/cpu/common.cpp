#include "common.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

namespace fused_preact {

float* thread_scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const {
      std::free(p);
    }
  };
  static thread_local std::unique_ptr<float, Free> buffer;
  static thread_local int64_t size = 0;
  if (floats > size) {
    // A large one begins with a huge page: with small ones its addresses alone fill the processor's tables of pages.
    const bool large = floats * sizeof(float) >= 2 * kHugePage;
    size = round_up(floats, large ? kHugePage / sizeof(float) : 1024);
    buffer.reset();
    buffer.reset(static_cast<float*>(std::aligned_alloc(large ? kHugePage : 64, size * sizeof(float))));
    if (large && buffer) {
      ask_for_huge_pages(buffer.get(), size * sizeof(float));
    }
    if (!buffer) {
      size = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.get();
}

PartMoments::PartMoments(int64_t parts, int64_t channels)
    : channels_(channels),
      mean_(at::zeros({parts, channels}, at::kDouble)),
      m2_(at::zeros({parts, channels}, at::kDouble)),
      count_(at::zeros({parts, channels}, at::kDouble)) {}

void PartMoments::merge(int64_t part, int64_t rows, Moments tile, int64_t first, int64_t channels) {
  const int64_t at = part * channels_ + first;
  double* counts = count_.data_ptr<double>() + at;
  common_loops().merge(
      counts[0], mean_.data_ptr<double>() + at, m2_.data_ptr<double>() + at, static_cast<double>(rows), tile, channels);
  std::fill(counts, counts + channels, counts[0] + static_cast<double>(rows));
}

std::tuple<Tensor, Tensor> PartMoments::finish() {
  Tensor mean = at::empty({channels_}, at::kFloat), var = at::empty({channels_}, at::kFloat);
  const int64_t parts = count_.size(0);
  const double *means = mean_.data_ptr<double>(), *m2s = m2_.data_ptr<double>(), *counts = count_.data_ptr<double>();
  for (int64_t c = 0; c < channels_; c++) {
    double count = 0, mu = 0, m2 = 0;
    for (int64_t part = 0; part < parts; part++) {
      const int64_t at = part * channels_ + c;
      if (counts[at] == 0) {
        continue;
      }
      const double total = count + counts[at], delta = means[at] - mu;
      mu += delta * (counts[at] / total);
      m2 += m2s[at] + delta * delta * (count * counts[at] / total);
      count = total;
    }
    mean.data_ptr<float>()[c] = static_cast<float>(mu);
    var.data_ptr<float>()[c] = static_cast<float>(m2 / count);
  }
  return {mean, var};
}

PartSums::PartSums(int64_t parts, int64_t channels)
    : channels_(channels), total_(at::zeros({parts, channels}, at::kDouble)) {}

void PartSums::add(int64_t part, const float* tile, int64_t first, int64_t channels) {
  common_loops().add(total_.data_ptr<double>() + part * channels_ + first, tile, channels);
}

Tensor PartSums::finish() {
  Tensor out = at::empty({channels_}, at::kFloat);
  const double* totals = total_.data_ptr<double>();
  for (int64_t c = 0; c < channels_; c++) {
    double sum = 0;
    for (int64_t part = 0; part < total_.size(0); part++) {
      sum += totals[part * channels_ + c];
    }
    out.data_ptr<float>()[c] = static_cast<float>(sum);
  }
  return out;
}

namespace {

std::string cpu_instruction_set() {
  return common_loops().name;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(fused_preact, m) {
  m.def("cpu_instruction_set() -> str", cpu_instruction_set);
}

} // namespace fused_preact
