// What every op of this folder needs: which tensors are served, contiguous inputs, threads, scratch.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "loops.h"

// Runs the lambda with scalar_t = float, BFloat16 or Half.
#define FUSED_PREACT_DISPATCH(DTYPE, NAME, ...)            \
  AT_DISPATCH_SWITCH(                                      \
      DTYPE, NAME,                                         \
      AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__)            \
      AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__)         \
      AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__))

namespace fused_preact {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Whether the kernels serve this tensor. float64 is the oracle's dtype and empty tensors need no kernel:
// both go to the reference.
inline bool served(const Tensor& x) {
  const auto dtype = x.scalar_type();
  return x.dim() == 4 && x.numel() > 0 && (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf);
}

// Calls the reference that fused_preact.ops registered for the op. It is registered as
// CompositeExplicitAutograd, which fills the slot of every backend without a kernel of its own; Lazy's is
// such a slot, and calling it is how a CPU kernel reaches what it has overridden.
template <typename Signature, typename... Args>
auto call_reference(const char* name, Args&&... args) {
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  return handle.redispatch(c10::DispatchKeySet(c10::DispatchKey::Lazy), std::forward<Args>(args)...);
}

inline Tensor nhwc(const Tensor& x) {
  return x.contiguous(at::MemoryFormat::ChannelsLast);
}

inline OptionalTensor nhwc(const OptionalTensor& x) {
  return x.has_value() ? OptionalTensor(nhwc(*x)) : std::nullopt;
}

// The memory format that the reference and the fake kernels give to outputs "like x".
inline Tensor like_input(const Tensor& out, const Tensor& x) {
  return x.is_contiguous(at::MemoryFormat::ChannelsLast) ? out : out.contiguous();
}

constexpr size_t kHugePage = 2 << 20;

// Advice about memory that is yet to be touched, where it holds whole huge pages (allocation.cpp).
void ask_for_huge_pages(void* memory, size_t bytes);

// Uninitialised and channels_last, on huge pages where it is large.
Tensor empty_nhwc(at::IntArrayRef shape, const Tensor& like);

// The floor of an Affine (loops.h) with a ReLU, and without.
inline float floor_of(bool relu) {
  return relu ? 0.0f : std::numeric_limits<float>::quiet_NaN();
}

// Of the channels from c on.
inline Affine from_channel(const Affine& bn, int64_t c) {
  return bn.scale == nullptr ? bn : Affine{bn.scale + c, bn.shift + c, bn.floor};
}

// A [C] vector as contiguous floats.
inline Tensor floats(const Tensor& vector) {
  return vector.to(at::kFloat).contiguous();
}

inline const float* pointer(const Tensor& vector) {
  return vector.const_data_ptr<float>();
}

template <typename T>
const T* data(const OptionalTensor& x) {
  return x.has_value() ? x->template const_data_ptr<T>() : nullptr;
}

// A fixed partition of [0, count) into as many parts as there are threads: partial results are kept per part
// and merged in order, so a result depends on the number of threads and on nothing else.
struct Parts {
  int64_t count;
  int64_t parts;

  explicit Parts(int64_t count) : count(count), parts(std::max<int64_t>(1, std::min<int64_t>(count, at::get_num_threads()))) {}

  int64_t begin(int64_t part) const {
    return part * count / parts;
  }

  // Calls body(part, begin, end) for every part.
  template <typename F>
  void run(const F& body) const {
    at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; part++) {
        body(part, begin(part), begin(part + 1));
      }
    });
  }
};

// Scratch of the calling thread, aligned to a cache line and kept: fresh memory would cost a page fault
// every 4 KiB, which for a tile is as much as the work on it.
float* thread_scratch(int64_t floats);

// How many floats of scratch hold `count` values of type P.
template <typename P>
constexpr int64_t floats_of(int64_t count) {
  return round_up(count, kLanes) * static_cast<int64_t>(sizeof(P)) / static_cast<int64_t>(sizeof(float));
}

// Hands out consecutive pieces of a scratch area, each aligned; with a null base it only measures.
class Arena {
 public:
  explicit Arena(float* base) : base_(base) {}

  template <typename P = float>
  P* take(int64_t count) {
    float* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(floats_of<P>(count), kLanes);
    return reinterpret_cast<P*>(piece);
  }

  int64_t used() const {
    return used_;
  }

 private:
  float* base_;
  int64_t used_ = 0;
};

// Running statistics of the parts of a tensor, merged by Chan's formula in a fixed order. Channels may come in
// blocks, merged by different threads.
class PartMoments {
 public:
  PartMoments(int64_t parts, int64_t channels);
  // Channels [first, first + channels); `tile` starts at the first.
  void merge(int64_t part, int64_t rows, Moments tile, int64_t first, int64_t channels);
  std::tuple<Tensor, Tensor> finish(); // mean and biased variance

 private:
  int64_t channels_;
  Tensor mean_, m2_, count_;
};

// Plain sums of the parts, in double.
class PartSums {
 public:
  PartSums(int64_t parts, int64_t channels);
  // Channels [first, first + channels); `tile` starts at the first.
  void add(int64_t part, const float* tile, int64_t first, int64_t channels);
  Tensor finish();

 private:
  int64_t channels_;
  Tensor total_;
};

} // namespace fused_preact
