// The element loops, compiled once per instruction set (so no include guard): the including file sets ISA, a
// namespace, FP_VECTOR_BITS and the compiler's target. Vectors are GCC/Clang vector extensions of 16 floats: one
// AVX-512 register, two of AVX2, four of SSE or NEON. FP_VECTOR_BITS says whose intrinsics may be used: the compiler's
// own macros (__AVX512F__) do not follow `#pragma GCC target` in C++ before GCC 13. Nothing here may instantiate a
// function of another header: the linker would keep one copy of it, perhaps the one with instructions that the
// processor lacks.

namespace fused_preact::ISA {

typedef float vf __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

#define FP_INLINE static inline __attribute__((always_inline))

// Float sums run over this many rows before they join a longer one: the error of a sum grows with its length.
constexpr int64_t kSumRows = 32;
constexpr int64_t kPivotRows = 8;

// How far ahead of a stream from memory to prefetch: about 15 % off the memory-bound ops on Emerald Rapids (best of
// three runs on a loaded machine), with 4 KiB about the same and with 1 KiB less.
constexpr int64_t kAheadBytes = 2048;

// --- loads and stores of 16 values, whole or the first n --------------------------------------------------

// Zero-extended, and the low halves. The compiler makes these of two registers of half the width, with shuffles.
FP_INLINE vu widened(vh bits) {
#if FP_VECTOR_BITS >= 512
  return (vu)_mm512_cvtepu16_epi32((__m256i)bits);
#else
  return __builtin_convertvector(bits, vu);
#endif
}

FP_INLINE vh narrowed(vu bits) {
#if FP_VECTOR_BITS >= 512
  return (vh)_mm512_cvtepi32_epi16((__m512i)bits);
#else
  return __builtin_convertvector(bits, vh);
#endif
}

FP_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

FP_INLINE vf load(const c10::BFloat16* p) {
  vh bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (vf)(widened(bits) << 16);
}

FP_INLINE vf load(const c10::Half* p) {
#if FP_VECTOR_BITS >= 512
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  vf v;
  for (int i = 0; i < 16; i++) {
    v[i] = half_to_float(p[i].x);
  }
  return v;
#endif
}

FP_INLINE void store(float* p, vf v) {
  __builtin_memcpy(p, &v, sizeof v);
}

FP_INLINE vu bf16_bits(vf v) {
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v == v ? rounded : (vu{} + 0x7fc0u); // rounding must not turn a NaN into an infinity
}

FP_INLINE void store(c10::BFloat16* p, vf v) {
  const vh bits = narrowed(bf16_bits(v));
  __builtin_memcpy((void*)p, &bits, sizeof bits);
}

FP_INLINE void store(c10::Half* p, vf v) {
#if FP_VECTOR_BITS >= 512
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < 16; i++) {
    p[i].x = float_to_half(v[i]);
  }
#endif
}

// The value that a store of v leaves in memory.
FP_INLINE vf stored(vf v, const float*) {
  return v;
}

FP_INLINE vf stored(vf v, const c10::BFloat16*) {
  return (vf)(bf16_bits(v) << 16);
}

FP_INLINE vf stored(vf v, const c10::Half*) {
  c10::Half buffer[16];
  store(buffer, v);
  return load(buffer);
}

// Asks for a later part of a stream from memory; past the end of the tensor it does nothing.
template <typename T>
FP_INLINE void ahead(const T* p, int64_t jump = kAheadBytes / (int64_t)sizeof(T)) {
  __builtin_prefetch(p + jump, 0, 2);
}

// The same distance in whole rows, for a loop over some of the columns.
template <typename T>
FP_INLINE int64_t rows_ahead(int64_t stride, const T*) {
  return stride * (1 + kAheadBytes / (stride * (int64_t)sizeof(T)));
}

template <bool TAIL, typename T>
FP_INLINE vf get(const T* p, int64_t n) {
  if (!TAIL) {
    return load(p);
  }
  T buffer[16];
  __builtin_memset((void*)buffer, 0, sizeof buffer);
  for (int64_t i = 0; i < n; i++) {
    buffer[i] = p[i];
  }
  return load(buffer);
}

template <bool TAIL, typename T>
FP_INLINE void put(T* p, vf v, int64_t n) {
  if (!TAIL) {
    store(p, v);
    return;
  }
  T buffer[16];
  store(buffer, v);
  for (int64_t i = 0; i < n; i++) {
    p[i] = buffer[i];
  }
}

// A NaN passes, in the ReLU and in its mask ("z <= floor gives 0", not "z > floor gives g"); with a floor of NaN all do.
FP_INLINE vf rectified(vf z, vf floor) {
  return floor > z ? floor : z;
}

FP_INLINE vf relu(vf z) {
  return rectified(z, vf{});
}

FP_INLINE vf masked(vf g, vf z, vf floor) {
  return z <= floor ? vf{} : g;
}

// v, in a register: the compiler cannot contract a product and a sum across it.
FP_INLINE vf rounded(vf v) {
#if defined(__x86_64__) || defined(__aarch64__)
  typedef float part __attribute__((vector_size(FP_VECTOR_BITS / 8)));
  part parts[sizeof(vf) / sizeof(part)];
  __builtin_memcpy(parts, &v, sizeof v);
  for (part& p : parts) {
#ifdef __x86_64__
    asm("" : "+v"(p));
#else
    asm("" : "+w"(p));
#endif
  }
  __builtin_memcpy(&v, parts, sizeof v);
#endif
  return v;
}

// z = s x + t, with the roundings of PyTorch's own BN on a CPU: one of a float x, so that a mean far from zero costs no
// digits; of a 16-bit x, whose own rounding is coarser than both, the product's too, so that a constant channel is
// exactly beta = 0: t holds the rounded product mu s, and an unrounded one does not cancel it (a channel of 1e6, with
// s = 316, was off by 5).
FP_INLINE vf affine(vf scale, vf x, vf shift, const float*) {
  return scale * x + shift;
}

template <typename T>
FP_INLINE vf affine(vf scale, vf x, vf shift, const T*) {
  return rounded(scale * x) + shift;
}

// Calls f<1, true>(c, n) or f<BLOCKS, false>(c, 16 BLOCKS): blocks of 64 channels, then of 16, then the rest.
#define FP_OVER_CHANNELS(FUNCTION, CHANNELS, ...)             \
  do {                                                        \
    int64_t c = 0;                                            \
    for (; c + 64 <= (CHANNELS); c += 64) {                   \
      FUNCTION<4, false>(c, 64, __VA_ARGS__);                 \
    }                                                         \
    for (; c + 16 <= (CHANNELS); c += 16) {                   \
      FUNCTION<1, false>(c, 16, __VA_ARGS__);                 \
    }                                                         \
    if (c < (CHANNELS)) {                                     \
      FUNCTION<1, true>(c, (CHANNELS) - c, __VA_ARGS__);      \
    }                                                         \
  } while (0)

#include "loops_plain.h"

// --- statistics: runs of rows, shifted by about their mean, joined by Chan's formula -------------------------

// About the mean of the first rows, and exactly their value where they are equal. One row alone may lie some deviations
// off, and the cancellation in q - s^2 / n grows with the square of that.
template <typename F>
FP_INLINE vf pivot(const F& value, int64_t rows) {
  const int64_t few = rows < kPivotRows ? rows : kPivotRows;
  const vf first = value(0);
  vf sum{};
  for (int64_t r = 1; r < few; r++) {
    sum += value(r) - first;
  }
  return first + sum / (float)few;
}

// A run of `count` rows, s = sum of v - high and q = sum of (v - high)^2, joins `seen` rows of mean high + low. That the
// mean of what was seen is the shift of the next run keeps its cancellation below the term that Chan's formula adds for
// the distance of the two means: no outlier can hide the variance of the other rows, wherever it lies.
FP_INLINE void join(vf& high, vf& low, vf& m2, vf s, vf q, int64_t seen, int64_t count) {
  const float weight = (float)count / (float)(seen + count);
  const vf part = s * (1.0f / (float)count), delta = part - low;
  m2 += relu(q - s * part) + delta * delta * ((float)seen * weight);
  low += delta * weight;
  const vf mean = high + low;
  low -= mean - high; // what the rounding of the sum lost
  high = mean;
}

// --- prologue -----------------------------------------------------------------------------------------------

template <int B, bool TAIL, typename T, typename P>
FP_INLINE void activate_block(
    int64_t c, int64_t n, const T* x, int64_t x_stride, int64_t rows, Affine bn, P* out, int64_t out_stride) {
  if (bn.scale == nullptr) {
    for (int64_t r = 0; r < rows; r++) {
      for (int b = 0; b < B; b++) {
        store(out + r * out_stride + c + 16 * b, get<TAIL>(x + r * x_stride + c + 16 * b, n));
      }
    }
    return;
  }
  vf scale[B], shift[B];
  for (int b = 0; b < B; b++) {
    scale[b] = get<TAIL>(bn.scale + c + 16 * b, n);
    shift[b] = get<TAIL>(bn.shift + c + 16 * b, n);
  }
  const vf floor = vf{} + bn.floor;
  for (int64_t r = 0; r < rows; r++) {
    for (int b = 0; b < B; b++) {
      ahead(x + r * x_stride + c + 16 * b);
      const vf v = get<TAIL>(x + r * x_stride + c + 16 * b, n);
      store(out + r * out_stride + c + 16 * b, rectified(affine(scale[b], v, shift[b], x), floor));
    }
  }
}

template <typename T, typename P>
void activate(const T* x, int64_t x_stride, int64_t rows, int64_t channels, Affine bn, P* out, int64_t out_stride) {
  if (channels <= 64) {
    FP_OVER_CHANNELS(activate_block, channels, x, x_stride, rows, bn, out, out_stride);
    return;
  }
  // Row by row: x comes from memory, and the prefetchers follow whole rows.
  for (int64_t r = 0; r < rows; r++) {
    FP_OVER_CHANNELS(
        activate_block, channels, x + r * x_stride, x_stride, 1, bn, out + r * out_stride, out_stride);
  }
}

// In blocks of 16 pixels and 16 channels: 16 rows are streams that the prefetchers follow.
template <typename T, typename P>
void activate_transposed(
    const T* x, int64_t x_stride, int64_t rows, int64_t channels, Affine bn, P* out, int64_t out_stride) {
  for (int64_t first = 0; first < rows; first += 16) {
    const int64_t count = rows - first < 16 ? rows - first : 16;
    for (int64_t c = 0; c < channels; c += 16) {
      const int64_t n = channels - c < 16 ? channels - c : 16;
      const T* from = x + first * x_stride + c;
      const Affine affine{bn.scale + c, bn.shift + c, bn.floor};
      float block[256];
      if (n == 16) {
        activate_block<1, false>(0, n, from, x_stride, count, affine, block, 16);
      } else {
        activate_block<1, true>(0, n, from, x_stride, count, affine, block, 16);
      }
      for (int64_t r = count; r < 16; r++) {
        store(block + 16 * r, vf{});
      }
      P* to = out + c * out_stride + first;
      if constexpr (sizeof(P) == sizeof(float)) {
        transpose_16x16(block, 16, to, out_stride);
      } else {
        float turned[256];
        transpose_16x16(block, 16, turned, 16);
        for (int64_t i = 0; i < 16; i++) {
          store(to + i * out_stride, load(turned + 16 * i));
        }
      }
    }
  }
}

template <int B, bool TAIL, typename T, typename P>
FP_INLINE void pending_block(
    int64_t c, int64_t n, const T* g, Pending<T> pending, int64_t stride, int64_t rows, P* out, int64_t out_stride) {
  vf slope_g[B], slope_y[B], offset[B], mean[B];
  for (int b = 0; b < B; b++) {
    slope_g[b] = get<TAIL>(pending.a + c + 16 * b, n);
  }
  if (pending.y == nullptr) {
    for (int64_t r = 0; r < rows; r++) {
      for (int b = 0; b < B; b++) {
        const int64_t at = c + 16 * b;
        ahead(g + r * stride + at);
        store(out + r * out_stride + at, slope_g[b] * get<TAIL>(g + r * stride + at, n));
      }
    }
    return;
  }
  for (int b = 0; b < B; b++) {
    const int64_t at = c + 16 * b;
    slope_y[b] = get<TAIL>(pending.b + at, n);
    offset[b] = get<TAIL>(pending.c + at, n);
    mean[b] = get<TAIL>(pending.mean + at, n);
  }
  for (int64_t r = 0; r < rows; r++) {
    for (int b = 0; b < B; b++) {
      const int64_t at = r * stride + c + 16 * b;
      ahead(g + at);
      ahead(pending.y + at);
      const vf y = get<TAIL>(pending.y + at, n);
      const vf v = slope_g[b] * get<TAIL>(g + at, n) + (slope_y[b] * (y - mean[b]) + offset[b]);
      store(out + r * out_stride + c + 16 * b, v);
    }
  }
}

template <typename T, typename P>
void load_pending(
    const T* g, Pending<T> pending, int64_t stride, int64_t rows, int64_t channels, P* out, int64_t out_stride) {
  if (channels <= 64) {
    FP_OVER_CHANNELS(pending_block, channels, g, pending, stride, rows, out, out_stride);
    return;
  }
  for (int64_t r = 0; r < rows; r++) {
    const T* y = pending.y == nullptr ? nullptr : pending.y + r * stride;
    const Pending<T> row{y, pending.a, pending.b, pending.c, pending.mean};
    FP_OVER_CHANNELS(pending_block, channels, g + r * stride, row, stride, 1, out + r * out_stride, out_stride);
  }
}

template <int B, bool TAIL, typename T>
FP_INLINE void activate_store_block(int64_t c, int64_t n, const T* x, Affine bn, T* out) {
  for (int b = 0; b < B; b++) {
    const int64_t at = c + 16 * b;
    const vf z = affine(get<TAIL>(bn.scale + at, n), get<TAIL>(x + at, n), get<TAIL>(bn.shift + at, n), x);
    put<TAIL>(out + at, rectified(z, vf{} + bn.floor), n);
  }
}

template <typename T>
void activate_store(const T* x, int64_t rows, int64_t channels, Affine bn, T* out) {
  for (int64_t r = 0; r < rows; r++) {
    FP_OVER_CHANNELS(activate_store_block, channels, x + r * channels, bn, out + r * channels);
  }
}

// --- epilogues ------------------------------------------------------------------------------------------------

template <bool RESIDUAL, bool STATS, int B, bool TAIL, typename T>
FP_INLINE void fprop_block(
    int64_t c, int64_t n, const float* acc, int64_t acc_stride, int64_t rows, const float* bias,
    const T* residual, T* y, int64_t y_stride, Moments m, int64_t seen) {
  const int64_t jump = rows_ahead(y_stride, y);
  vf add[B], high[B], low[B], m2[B];
  for (int b = 0; b < B; b++) {
    const int64_t at = c + 16 * b;
    add[b] = bias == nullptr ? vf{} : get<TAIL>(bias + at, n);
    if (STATS && seen == 0) {
      const auto value = [&](int64_t r) __attribute__((always_inline)) {
        vf v = load(acc + r * acc_stride + at) + add[b];
        if (RESIDUAL) {
          v += get<TAIL>(residual + r * y_stride + at, n);
        }
        return stored(v, y);
      };
      high[b] = pivot(value, rows);
      low[b] = m2[b] = vf{};
    } else if (STATS) {
      high[b] = get<TAIL>(m.high + at, n);
      low[b] = get<TAIL>(m.low + at, n);
      m2[b] = get<TAIL>(m.m2 + at, n);
    }
  }
  for (int64_t begin = 0; begin < rows; begin += kSumRows) {
    const int64_t end = begin + kSumRows < rows ? begin + kSumRows : rows;
    vf s[B], q[B];
    for (int b = 0; b < B; b++) {
      s[b] = q[b] = vf{};
    }
    for (int64_t r = begin; r < end; r++) {
      for (int b = 0; b < B; b++) {
        const int64_t at = c + 16 * b;
        vf v = load(acc + r * acc_stride + at) + add[b];
        if (RESIDUAL) {
          ahead(residual + r * y_stride + at, jump);
          v += get<TAIL>(residual + r * y_stride + at, n);
        }
        put<TAIL>(y + r * y_stride + at, v, n);
        if (STATS) {
          const vf d = stored(v, y) - high[b];
          s[b] += d;
          q[b] += d * d;
        }
      }
    }
    for (int b = 0; STATS && b < B; b++) {
      join(high[b], low[b], m2[b], s[b], q[b], seen + begin, end - begin);
    }
  }
  if (STATS) {
    for (int b = 0; b < B; b++) {
      put<TAIL>(m.high + c + 16 * b, high[b], n);
      put<TAIL>(m.low + c + 16 * b, low[b], n);
      put<TAIL>(m.m2 + c + 16 * b, m2[b], n);
    }
  }
}

template <int B, bool TAIL, typename T>
FP_INLINE void fprop_epilogue_block(
    int64_t c, int64_t n, const float* acc, int64_t acc_stride, int64_t rows, const float* bias,
    const T* residual, T* y, int64_t y_stride, Moments m, int64_t seen) {
  if (m.m2 != nullptr) {
    if (residual != nullptr) {
      fprop_block<true, true, B, TAIL>(c, n, acc, acc_stride, rows, bias, residual, y, y_stride, m, seen);
    } else {
      fprop_block<false, true, B, TAIL>(c, n, acc, acc_stride, rows, bias, residual, y, y_stride, m, seen);
    }
  } else if (residual != nullptr) {
    fprop_block<true, false, B, TAIL>(c, n, acc, acc_stride, rows, bias, residual, y, y_stride, m, seen);
  } else {
    fprop_block<false, false, B, TAIL>(c, n, acc, acc_stride, rows, bias, residual, y, y_stride, m, seen);
  }
}

template <typename T>
void fprop_epilogue(
    const float* acc, int64_t acc_stride, int64_t rows, int64_t channels, const float* bias, const T* residual,
    T* y, int64_t y_stride, Moments moments, int64_t seen) {
  FP_OVER_CHANNELS(
      fprop_epilogue_block, channels, acc, acc_stride, rows, bias, residual, y, y_stride, moments, seen);
}

template <int B, bool TAIL, typename T>
FP_INLINE void dgrad_block(
    int64_t c, int64_t n, const float* acc, int64_t acc_stride, int64_t rows, const T* x, const T* da, T* g,
    int64_t stride, Affine bn, const float* mean, float* sum_g, float* sum_gx) {
  if (bn.scale == nullptr) {
    for (int64_t r = 0; r < rows; r++) {
      for (int b = 0; b < B; b++) {
        const int64_t at = c + 16 * b;
        put<TAIL>(g + r * stride + at, acc == nullptr ? vf{} : load(acc + r * acc_stride + at), n);
      }
    }
    return;
  }
  const int64_t jump = rows_ahead(stride, x);
  const vf floor = vf{} + bn.floor;
  vf scale[B], shift[B], mu[B], s[B], sx[B];
  for (int b = 0; b < B; b++) {
    const int64_t at = c + 16 * b;
    scale[b] = get<TAIL>(bn.scale + at, n);
    shift[b] = get<TAIL>(bn.shift + at, n);
    mu[b] = get<TAIL>(mean + at, n);
    s[b] = get<TAIL>(sum_g + at, n);
    sx[b] = get<TAIL>(sum_gx + at, n);
  }
  for (int64_t begin = 0; begin < rows; begin += kSumRows) {
    const int64_t end = begin + kSumRows < rows ? begin + kSumRows : rows;
    vf part_s[B], part_sx[B];
    for (int b = 0; b < B; b++) {
      part_s[b] = part_sx[b] = vf{};
    }
    for (int64_t r = begin; r < end; r++) {
      for (int b = 0; b < B; b++) {
        const int64_t at = c + 16 * b;
        vf v = acc == nullptr ? vf{} : load(acc + r * acc_stride + at);
        ahead(x + r * stride + at, jump);
        if (da != nullptr) {
          ahead(da + r * stride + at, jump);
          v += get<TAIL>(da + r * stride + at, n);
        }
        const vf value = get<TAIL>(x + r * stride + at, n);
        v = masked(v, affine(scale[b], value, shift[b], x), floor);
        put<TAIL>(g + r * stride + at, v, n);
        v = stored(v, g);
        part_s[b] += v;
        part_sx[b] += v * (value - mu[b]);
      }
    }
    for (int b = 0; b < B; b++) {
      s[b] += part_s[b];
      sx[b] += part_sx[b];
    }
  }
  for (int b = 0; b < B; b++) {
    put<TAIL>(sum_g + c + 16 * b, s[b], n);
    put<TAIL>(sum_gx + c + 16 * b, sx[b], n);
  }
}

template <typename T>
void dgrad_epilogue(
    const float* acc, int64_t acc_stride, int64_t rows, int64_t channels, const T* x, const T* da, T* g,
    int64_t stride, Affine bn, const float* mean, float* sum_g, float* sum_gx) {
  FP_OVER_CHANNELS(
      dgrad_block, channels, acc, acc_stride, rows, x, da, g, stride, bn, mean, sum_g, sum_gx);
}

#include "loops_passes.h"

template <typename T, typename P>
Operands<T, P> operand_loops() {
  return {activate<T, P>, activate_transposed<T, P>, load_pending<T, P>};
}

template <typename T>
Loops<T> table() {
  return {
      operand_loops<T, float>(), operand_loops<T, T>(), operand_loops<float, T>(), activate_store<T>, fprop_epilogue<T>,
      dgrad_epilogue<T>,         moments<T>,            apply<T>,                  pool<T>,           pool_reduce<T>,
      pool_apply<T>,
  };
}

inline CommonLoops common(const char* name) {
  return {transpose, transpose_16, interleave, merge, maximum, add, name};
}

} // namespace fused_preact::ISA
