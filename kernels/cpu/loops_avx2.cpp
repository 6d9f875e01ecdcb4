// The element loops for AVX2.
#include "loops_table.h"

#ifdef FUSED_PREACT_X86_VARIANTS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define ISA avx2_isa
#define FP_VECTOR_BITS 256
#include "loops_body.h"
#pragma GCC pop_options

namespace fused_preact {

Variant avx2_variant() {
  using namespace avx2_isa;
  return {common("avx2"), table<float>(), table<c10::BFloat16>(), table<c10::Half>()};
}

} // namespace fused_preact
#endif
