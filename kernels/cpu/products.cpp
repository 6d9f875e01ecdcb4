#include "products.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <cstdlib>
#include <string>

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
  return {false, "this processor has no products of this type"};
}

// FUSED_PREACT_CPU_PRODUCTS, empty where it is not set.
std::string asked_for() {
  const char* value = std::getenv("FUSED_PREACT_CPU_PRODUCTS");
  const std::string asked = value == nullptr ? "" : value;
  const bool native = has_amx(at::kBFloat16) || has_bf16();
  TORCH_CHECK_VALUE(
      asked.empty() || asked == "fp32" || (asked == "native" && native), "FUSED_PREACT_CPU_PRODUCTS: got '", asked,
      "', allowed on this processor ", native ? "are 'fp32' and 'native'" : "is 'fp32' (it has no avx512_bf16)");
  return asked;
}

Choice choose(at::ScalarType dtype) {
  static const std::string asked = asked_for();
  if (dtype == at::kFloat) {
    return {true, "its own type"};
  }
  // It may be turned off at any time, and with it these products.
  if (!at::globalContext().userEnabledMkldnn()) {
    return {false, "oneDNN is turned off"};
  }
  const Choice choice = by_processor(dtype);
  const bool can = choice.own || (dtype == at::kBFloat16 && has_bf16());
  if (asked.empty() || (asked == "native") == choice.own || !can) {
    return choice;
  }
  return {asked == "native", "FUSED_PREACT_CPU_PRODUCTS"};
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
