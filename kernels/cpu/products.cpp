#include "tile_gemm.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace fused_preact {

namespace {

#if defined(__x86_64__) && defined(__GNUC__)
bool has_bf16() {
  return __builtin_cpu_supports("avx512bf16");
}
bool is_amd() {
  return __builtin_cpu_is("amd");
}
#else
bool has_bf16() {
  return false;
}
bool is_amd() {
  return false;
}
#endif

struct Choice {
  bool own; // or float
  std::string why;
};

// "Can pack" is how PyTorch says that its products of this dtype take AMX.
bool has_amx(at::ScalarType dtype) {
  return at::native::cpublas::could_pack(dtype);
}

// Facts about the processor, not a stopwatch: two runs give the same bits. Rates of `brgemm`, m 192, n 64, k 256, GFLOP/s
// of one core (AMD: of two), with bf16 operands and with float ones:
//   AMX (Intel Xeon with amx_bf16)                    1692   181    own
//   avx512_bf16 of AMD (EPYC, Zen 5)                   710   440    own
//   avx512_bf16 of Intel (the first without its AMX)   115   181    float
// A half is multiplied as it is where AMX does that (amx_fp16); such a processor has not been at hand.
Choice by_processor(at::ScalarType dtype) {
  if (has_amx(dtype)) {
    return {true, "AMX"};
  }
  if (dtype == at::kBFloat16 && has_bf16()) {
    return is_amd() ? Choice{true, "AMD's avx512_bf16"}
                    : Choice{false, "without AMX this avx512_bf16 multiplies slower than fp32"};
  }
  return {false, "only AMX (amx_fp16) is known to multiply this type faster than fp32"};
}

// Whether oneDNN multiplies this type here at all: ONEDNN_MAX_CPU_ISA and other builds of PyTorch may leave it out.
template <typename P>
bool multiplied() {
  constexpr int64_t m = 16, n = 16, k = 32;
  std::vector<P> a(m * k), b(k * n); // b[i / 2][j][i % 2] = j
  std::vector<float> c(m * n);
  for (int64_t i = 0; i < k * n; i++) {
    a[i] = P(1);
    b[i] = P(static_cast<float>(i / 2 % n));
  }
  try {
    gemm<P>(m, n, k, a.data(), k, b.data(), n, c.data(), n, false);
    gemm_release<P>();
  } catch (const c10::Error&) {
    return false;
  }
  for (int64_t i = 0; i < m * n; i++) {
    if (c[i] != static_cast<float>(k * (i % n))) {
      return false;
    }
  }
  return true;
}

bool can_multiply(at::ScalarType dtype) {
  static const bool bfloat16 = multiplied<at::BFloat16>(), half = multiplied<at::Half>();
  return dtype == at::kBFloat16 ? bfloat16 : half;
}

// FUSED_PREACT_CPU_PRODUCTS, empty where it is not set.
std::string asked_for() {
  const char* value = std::getenv("FUSED_PREACT_CPU_PRODUCTS");
  const std::string asked = value == nullptr ? "" : value;
  if (asked.empty() || asked == "fp32") {
    return asked;
  }
  const bool native = can_multiply(at::kBFloat16);
  TORCH_CHECK_VALUE(
      asked == "native" && native, "FUSED_PREACT_CPU_PRODUCTS: got '", asked, "', allowed here ",
      native ? "are 'fp32' and 'native'" : "is 'fp32': oneDNN has no products of bfloat16 on this processor");
  return asked;
}

Choice choose(at::ScalarType dtype) {
  if (dtype == at::kFloat) {
    return {true, "its own type"};
  }
  // It may be turned off at any time, and with it these products.
  if (!at::globalContext().userEnabledMkldnn()) {
    return {false, "oneDNN is turned off"};
  }
  static const std::string asked = asked_for();
  if (!can_multiply(dtype)) {
    return {false, "oneDNN has no products of this type on this processor"};
  }
  return asked.empty() ? by_processor(dtype) : Choice{asked == "native", "FUSED_PREACT_CPU_PRODUCTS"};
}

} // namespace

at::ScalarType product_type(at::ScalarType dtype) {
  return choose(dtype).own ? dtype : at::kFloat;
}

TORCH_LIBRARY_FRAGMENT(fused_preact, m) {
  m.def("cpu_products(ScalarType dtype) -> (bool, str)", [](at::ScalarType dtype) {
    const Choice choice = choose(dtype);
    return std::make_tuple(choice.own, choice.why);
  });
}

} // namespace fused_preact
