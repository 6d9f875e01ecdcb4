// What the matrix products of 16-bit tensors multiply: their own numbers, where the processor does that fast, or floats.
#pragma once

#include "common.h"

namespace fused_preact {

// The type of the operands of products of tensors of this dtype: the dtype itself or float. Accumulators are float.
at::ScalarType product_type(at::ScalarType dtype);

// 16-bit numbers as their bits, for loops that only move them.
template <typename P>
const uint16_t* bits(const P* p) {
  static_assert(sizeof(P) == sizeof(uint16_t));
  return reinterpret_cast<const uint16_t*>(p);
}

template <typename P>
uint16_t* bits(P* p) {
  static_assert(sizeof(P) == sizeof(uint16_t));
  return reinterpret_cast<uint16_t*>(p);
}

// Calls body(P{}), P the type `products`: float or T.
template <typename T, typename F>
void with_product_type(at::ScalarType products, const F& body) {
  if (std::is_same_v<T, float> || products == at::kFloat) {
    body(float{});
  } else {
    body(T{});
  }
}

// The same for weights, of which those that were folded are float whatever the images are.
template <typename T, typename F>
void with_packed_type(at::ScalarType products, const F& body) {
  if constexpr (std::is_same_v<T, float>) {
    if (products == at::kBFloat16) {
      body(at::BFloat16{});
      return;
    }
    if (products == at::kHalf) {
      body(at::Half{});
      return;
    }
  }
  with_product_type<T>(products, body);
}

} // namespace fused_preact
