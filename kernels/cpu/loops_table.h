// What each instruction set's file defines and loops.cpp chooses from.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "loops.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// `#pragma GCC target` is GCC's; other compilers and processors get the default alone.
#define FUSED_PREACT_X86_VARIANTS 1
#include <immintrin.h>
#endif

namespace fused_preact {

struct Variant {
  CommonLoops common;
  Loops<float> f32;
  Loops<c10::BFloat16> bf16;
  Loops<c10::Half> f16;
};

Variant avx2_variant();
Variant avx512_variant();

// Out of line on purpose, see loops_body.h.
float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);

} // namespace fused_preact
