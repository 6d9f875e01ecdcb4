// The element loops for AVX512.
#include "loops_table.h"

#ifdef FUSED_PREACT_X86_VARIANTS
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#define ISA avx512_isa
#define FP_VECTOR_BITS 512
#include "loops_body.h"
#pragma GCC pop_options

namespace fused_preact {

Variant avx512_variant() {
  using namespace avx512_isa;
  return {common("avx512"), table<float>(), table<c10::BFloat16>(), table<c10::Half>()};
}

} // namespace fused_preact
#endif
