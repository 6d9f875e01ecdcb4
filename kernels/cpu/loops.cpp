// The default instruction set's loops, and the choice of the best one at load time.
#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>

#include "loops_table.h"

#define ISA default_isa
#define FP_VECTOR_BITS 128
#include "loops_body.h"

namespace fused_preact {

float half_to_float(uint16_t bits) {
  return c10::detail::fp16_ieee_to_fp32_value(bits);
}

uint16_t float_to_half(float value) {
  return c10::detail::fp16_ieee_from_fp32_value(value);
}

namespace {

// FUSED_PREACT_CPU_ISA asks for less than the processor has: to test here what other processors run.
Variant choose() {
  const char* asked_for = std::getenv("FUSED_PREACT_CPU_ISA");
  const std::string asked = asked_for == nullptr ? "" : asked_for;
  std::string allowed;
  // Whether this set is to serve: the best that there is, or the one asked for.
  const auto serves = [&](const char* name) {
    allowed += std::string(allowed.empty() ? "'" : ", '") + name + "'";
    return asked.empty() || asked == name;
  };
#ifdef FUSED_PREACT_X86_VARIANTS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && serves("avx512")) {
    return avx512_variant();
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && serves("avx2")) {
    return avx2_variant();
  }
#endif
  TORCH_CHECK_VALUE(
      serves("default"), "FUSED_PREACT_CPU_ISA: got '", asked, "', allowed on this processor are ", allowed);
  using namespace default_isa;
  return {common("default"), table<float>(), table<c10::BFloat16>(), table<c10::Half>()};
}

const Variant& chosen() {
  static const Variant variant = choose();
  return variant;
}

} // namespace

template <>
const Loops<float>& loops<float>() {
  return chosen().f32;
}

template <>
const Loops<c10::BFloat16>& loops<c10::BFloat16>() {
  return chosen().bf16;
}

template <>
const Loops<c10::Half>& loops<c10::Half>() {
  return chosen().f16;
}

const CommonLoops& common_loops() {
  return chosen().common;
}

} // namespace fused_preact
