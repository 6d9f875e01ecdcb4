// The element loops, compiled once per instruction set (so no include guard): the including file sets ISA, a
// namespace, and the compiler's target. Vectors are GCC/Clang vector extensions of 16 floats: one AVX-512
// register, two of AVX2, four of SSE or NEON. Nothing here may instantiate a function of another header: the
// linker would keep one copy of it, perhaps the one with instructions that the processor lacks.

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

FP_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

FP_INLINE vf load(const c10::BFloat16* p) {
  vh bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (vf)(__builtin_convertvector(bits, vu) << 16);
}

FP_INLINE vf load(const c10::Half* p) {
#if defined(__AVX512F__)
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
  const vh bits = __builtin_convertvector(bf16_bits(v), vh);
  __builtin_memcpy((void*)p, &bits, sizeof bits);
}

FP_INLINE void store(c10::Half* p, vf v) {
#if defined(__AVX512F__)
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

// "z <= 0 gives 0", not "z > 0 gives z": a NaN passes, in the ReLU and in its mask.
FP_INLINE vf relu(vf z) {
  return z <= 0.0f ? vf{} : z;
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

// --- prologue -----------------------------------------------------------------------------------------------

template <int B, bool TAIL, typename T>
FP_INLINE void activate_block(
    int64_t c, int64_t n, const T* x, int64_t x_stride, int64_t rows, Affine bn, float* out, int64_t out_stride) {
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
  for (int64_t r = 0; r < rows; r++) {
    for (int b = 0; b < B; b++) {
      ahead(x + r * x_stride + c + 16 * b);
      const vf v = get<TAIL>(x + r * x_stride + c + 16 * b, n);
      store(out + r * out_stride + c + 16 * b, relu(scale[b] * v + shift[b]));
    }
  }
}

template <typename T>
void activate(
    const T* x, int64_t x_stride, int64_t rows, int64_t channels, Affine bn, float* out, int64_t out_stride) {
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

template <int B, bool TAIL, typename T>
FP_INLINE void activate_store_block(int64_t c, int64_t n, const T* x, Affine bn, T* out) {
  for (int b = 0; b < B; b++) {
    const int64_t at = c + 16 * b;
    const vf z = get<TAIL>(bn.scale + at, n) * get<TAIL>(x + at, n) + get<TAIL>(bn.shift + at, n);
    put<TAIL>(out + at, relu(z), n);
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
    const T* residual, T* y, int64_t y_stride, Moments m, bool first) {
  const int64_t jump = rows_ahead(y_stride, y);
  vf add[B], pivot[B], s[B], q[B];
  for (int b = 0; b < B; b++) {
    const int64_t at = c + 16 * b;
    add[b] = bias == nullptr ? vf{} : get<TAIL>(bias + at, n);
    if (STATS) {
      if (first) {
        // The mean of a few rows: one value may lie some deviations off, and the cancellation in
        // q - s^2 / n grows with the square of that.
        const int64_t few = rows < kPivotRows ? rows : kPivotRows;
        vf sum{};
        for (int64_t r = 0; r < few; r++) {
          sum += load(acc + r * acc_stride + at);
          if (RESIDUAL) {
            sum += get<TAIL>(residual + r * y_stride + at, n);
          }
        }
        pivot[b] = sum / (float)few + add[b];
        put<TAIL>(m.pivot + at, pivot[b], n);
        s[b] = q[b] = vf{};
      } else {
        pivot[b] = get<TAIL>(m.pivot + at, n);
        s[b] = get<TAIL>(m.s + at, n);
        q[b] = get<TAIL>(m.q + at, n);
      }
    }
  }
  for (int64_t begin = 0; begin < rows; begin += kSumRows) {
    const int64_t end = begin + kSumRows < rows ? begin + kSumRows : rows;
    vf part_s[B], part_q[B];
    for (int b = 0; b < B; b++) {
      part_s[b] = part_q[b] = vf{};
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
          const vf d = stored(v, y) - pivot[b];
          part_s[b] += d;
          part_q[b] += d * d;
        }
      }
    }
    for (int b = 0; STATS && b < B; b++) {
      s[b] += part_s[b];
      q[b] += part_q[b];
    }
  }
  if (STATS) {
    for (int b = 0; b < B; b++) {
      put<TAIL>(m.s + c + 16 * b, s[b], n);
      put<TAIL>(m.q + c + 16 * b, q[b], n);
    }
  }
}

template <int B, bool TAIL, typename T>
FP_INLINE void fprop_epilogue_block(
    int64_t c, int64_t n, const float* acc, int64_t acc_stride, int64_t rows, const float* bias,
    const T* residual, T* y, int64_t y_stride, Moments m, bool first) {
  if (m.s != nullptr) {
    if (residual != nullptr) {
      fprop_block<true, true, B, TAIL>(c, n, acc, acc_stride, rows, bias, residual, y, y_stride, m, first);
    } else {
      fprop_block<false, true, B, TAIL>(c, n, acc, acc_stride, rows, bias, residual, y, y_stride, m, first);
    }
  } else if (residual != nullptr) {
    fprop_block<true, false, B, TAIL>(c, n, acc, acc_stride, rows, bias, residual, y, y_stride, m, first);
  } else {
    fprop_block<false, false, B, TAIL>(c, n, acc, acc_stride, rows, bias, residual, y, y_stride, m, first);
  }
}

template <typename T>
void fprop_epilogue(
    const float* acc, int64_t acc_stride, int64_t rows, int64_t channels, const float* bias, const T* residual,
    T* y, int64_t y_stride, Moments moments, bool first) {
  FP_OVER_CHANNELS(
      fprop_epilogue_block, channels, acc, acc_stride, rows, bias, residual, y, y_stride, moments, first);
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
        v = scale[b] * value + shift[b] <= 0.0f ? vf{} : v;
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

// --- passes of their own ----------------------------------------------------------------------------------------

template <int B, bool TAIL, typename T>
FP_INLINE void moments_block(int64_t c, int64_t n, const T* x, int64_t x_stride, int64_t rows, Moments m) {
  const int64_t few = rows < kPivotRows ? rows : kPivotRows;
  vf pivot[B], s[B], q[B];
  for (int b = 0; b < B; b++) {
    vf sum{};
    for (int64_t r = 0; r < few; r++) {
      sum += get<TAIL>(x + r * x_stride + c + 16 * b, n);
    }
    pivot[b] = sum / (float)few;
    s[b] = q[b] = vf{};
  }
  for (int64_t begin = 0; begin < rows; begin += kSumRows) {
    const int64_t end = begin + kSumRows < rows ? begin + kSumRows : rows;
    vf part_s[B], part_q[B];
    for (int b = 0; b < B; b++) {
      part_s[b] = part_q[b] = vf{};
    }
    for (int64_t r = begin; r < end; r++) {
      for (int b = 0; b < B; b++) {
        const vf d = get<TAIL>(x + r * x_stride + c + 16 * b, n) - pivot[b];
        part_s[b] += d;
        part_q[b] += d * d;
      }
    }
    for (int b = 0; b < B; b++) {
      s[b] += part_s[b];
      q[b] += part_q[b];
    }
  }
  for (int b = 0; b < B; b++) {
    put<TAIL>(m.pivot + c + 16 * b, pivot[b], n);
    put<TAIL>(m.s + c + 16 * b, s[b], n);
    put<TAIL>(m.q + c + 16 * b, q[b], n);
  }
}

template <typename T>
void moments(const T* x, int64_t x_stride, int64_t rows, int64_t channels, Moments m) {
  FP_OVER_CHANNELS(moments_block, channels, x, x_stride, rows, m);
}

template <int B, bool TAIL, typename T>
FP_INLINE void apply_block(
    int64_t c, int64_t n, const T* g, const T* x, const T* residual, const float* a, const float* b_,
    const float* c_, const float* mean, T* dx) {
  for (int b = 0; b < B; b++) {
    const int64_t at = c + 16 * b;
    ahead(g + at);
    ahead(x + at);
    if (residual != nullptr) {
      ahead(residual + at);
    }
    vf v = get<TAIL>(a + at, n) * get<TAIL>(g + at, n) +
        (get<TAIL>(b_ + at, n) * (get<TAIL>(x + at, n) - get<TAIL>(mean + at, n)) + get<TAIL>(c_ + at, n));
    if (residual != nullptr) {
      v += get<TAIL>(residual + at, n);
    }
    put<TAIL>(dx + at, v, n);
  }
}

template <typename T>
void apply(
    const T* g, const T* x, const T* residual, int64_t rows, int64_t channels, const float* a, const float* b,
    const float* c_, const float* mean, T* dx) {
  for (int64_t r = 0; r < rows; r++) {
    const int64_t row = r * channels;
    FP_OVER_CHANNELS(
        apply_block, channels, g + row, x + row, residual == nullptr ? nullptr : residual + row, a, b, c_, mean,
        dx + row);
  }
}

// --- the head -----------------------------------------------------------------------------------------------------

template <int B, bool TAIL, typename T>
FP_INLINE void pool_block(int64_t c, int64_t n, const T* x, int64_t rows, int64_t channels, Affine bn, T* out) {
  vf scale[B], shift[B], s[B];
  for (int b = 0; b < B; b++) {
    scale[b] = get<TAIL>(bn.scale + c + 16 * b, n);
    shift[b] = get<TAIL>(bn.shift + c + 16 * b, n);
    s[b] = vf{};
  }
  for (int64_t begin = 0; begin < rows; begin += kSumRows) {
    const int64_t end = begin + kSumRows < rows ? begin + kSumRows : rows;
    vf part[B];
    for (int b = 0; b < B; b++) {
      part[b] = vf{};
    }
    for (int64_t r = begin; r < end; r++) {
      for (int b = 0; b < B; b++) {
        part[b] += relu(scale[b] * get<TAIL>(x + r * channels + c + 16 * b, n) + shift[b]);
      }
    }
    for (int b = 0; b < B; b++) {
      s[b] += part[b];
    }
  }
  for (int b = 0; b < B; b++) {
    put<TAIL>(out + c + 16 * b, s[b] / (float)rows, n);
  }
}

template <typename T>
void pool(const T* x, int64_t rows, int64_t channels, Affine bn, T* out) {
  FP_OVER_CHANNELS(pool_block, channels, x, rows, channels, bn, out);
}

template <int B, bool TAIL, typename T>
FP_INLINE void pool_reduce_block(
    int64_t c, int64_t n, const T* dy, const T* x, int64_t rows, int64_t channels, Affine bn, const float* mean,
    float* sum_g, float* sum_gx) {
  // g is one value, dy / rows, wherever z > 0: its sum is a count, which a float holds exactly, times that value.
  vf scale[B], shift[B], mu[B], count[B], sx[B];
  for (int b = 0; b < B; b++) {
    const int64_t at = c + 16 * b;
    scale[b] = get<TAIL>(bn.scale + at, n);
    shift[b] = get<TAIL>(bn.shift + at, n);
    mu[b] = get<TAIL>(mean + at, n);
    count[b] = sx[b] = vf{};
  }
  for (int64_t begin = 0; begin < rows; begin += kSumRows) {
    const int64_t end = begin + kSumRows < rows ? begin + kSumRows : rows;
    vf part[B];
    for (int b = 0; b < B; b++) {
      part[b] = vf{};
    }
    for (int64_t r = begin; r < end; r++) {
      for (int b = 0; b < B; b++) {
        const vf value = get<TAIL>(x + r * channels + c + 16 * b, n);
        const auto off = scale[b] * value + shift[b] <= 0.0f;
        count[b] += off ? vf{} : vf{} + 1.0f;
        part[b] += off ? vf{} : value - mu[b];
      }
    }
    for (int b = 0; b < B; b++) {
      sx[b] += part[b];
    }
  }
  for (int b = 0; b < B; b++) {
    const int64_t at = c + 16 * b;
    const vf g = get<TAIL>(dy + at, n) / (float)rows;
    const auto none = count[b] == 0.0f; // then no g was NaN either
    put<TAIL>(sum_g + at, get<TAIL>(sum_g + at, n) + (none ? vf{} : count[b] * g), n);
    put<TAIL>(sum_gx + at, get<TAIL>(sum_gx + at, n) + (none ? vf{} : sx[b] * g), n);
  }
}

template <typename T>
void pool_reduce(
    const T* dy, const T* x, int64_t rows, int64_t channels, Affine bn, const float* mean, float* sum_g,
    float* sum_gx) {
  FP_OVER_CHANNELS(pool_reduce_block, channels, dy, x, rows, channels, bn, mean, sum_g, sum_gx);
}

template <int B, bool TAIL, typename T>
FP_INLINE void pool_apply_block(
    int64_t c, int64_t n, const T* dy, const T* x, int64_t rows, int64_t channels, Affine bn, const float* a,
    const float* b_, const float* c_, const float* mean, T* dx) {
  for (int b = 0; b < B; b++) {
    const int64_t at = c + 16 * b;
    const vf scale = get<TAIL>(bn.scale + at, n), shift = get<TAIL>(bn.shift + at, n);
    const vf mu = get<TAIL>(mean + at, n), slope = get<TAIL>(b_ + at, n), offset = get<TAIL>(c_ + at, n);
    const vf ag = get<TAIL>(a + at, n) * (get<TAIL>(dy + at, n) / (float)rows);
    for (int64_t r = 0; r < rows; r++) {
      const vf value = get<TAIL>(x + r * channels + at, n);
      const vf v = scale * value + shift <= 0.0f ? vf{} : ag;
      put<TAIL>(dx + r * channels + at, v + (slope * (value - mu) + offset), n);
    }
  }
}

template <typename T>
void pool_apply(
    const T* dy, const T* x, int64_t rows, int64_t channels, Affine bn, const float* a, const float* b,
    const float* c_, const float* mean, T* dx) {
  FP_OVER_CHANNELS(pool_apply_block, channels, dy, x, rows, channels, bn, a, b, c_, mean, dx);
}

// --- without a storage type ------------------------------------------------------------------------------------

FP_INLINE void transpose_16x16(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
#if defined(__AVX512F__)
  __m512 r[16], t[16];
  for (int i = 0; i < 16; i++) {
    r[i] = _mm512_loadu_ps(in + i * in_stride);
  }
  // 2x2 of floats, then of doubles, then of quarters of a register: the butterfly in four steps.
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    for (int j = 0; j < 2; j++) {
      const __m512d lo = _mm512_castps_pd(t[4 * i + j]), hi = _mm512_castps_pd(t[4 * i + j + 2]);
      r[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
      r[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
    }
  }
  // Now r[4i + k] holds in quarter q the column 4q + k of rows 4i .. 4i + 3.
  for (int k = 0; k < 4; k++) {
    const __m512 a = _mm512_shuffle_f32x4(r[k], r[4 + k], 0x88), b = _mm512_shuffle_f32x4(r[k], r[4 + k], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], 0x88),
                 d = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], 0xdd);
    _mm512_storeu_ps(out + k * out_stride, _mm512_shuffle_f32x4(a, c, 0x88));
    _mm512_storeu_ps(out + (4 + k) * out_stride, _mm512_shuffle_f32x4(b, d, 0x88));
    _mm512_storeu_ps(out + (8 + k) * out_stride, _mm512_shuffle_f32x4(a, c, 0xdd));
    _mm512_storeu_ps(out + (12 + k) * out_stride, _mm512_shuffle_f32x4(b, d, 0xdd));
  }
#else
  for (int i = 0; i < 16; i++) {
    for (int j = 0; j < 16; j++) {
      out[i * out_stride + j] = in[j * in_stride + i];
    }
  }
#endif
}

static void transpose(
    const float* in, int64_t in_stride, int64_t rows, int64_t cols, float* out, int64_t out_stride) {
  int64_t r = 0;
  for (; r + 16 <= rows; r += 16) {
    int64_t c = 0;
    for (; c + 16 <= cols; c += 16) {
      transpose_16x16(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
    }
    for (; c < cols; c++) {
      for (int64_t i = r; i < r + 16; i++) {
        out[c * out_stride + i] = in[i * in_stride + c];
      }
    }
  }
  for (; r < rows; r++) {
    for (int64_t c = 0; c < cols; c++) {
      out[c * out_stride + r] = in[r * in_stride + c];
    }
  }
}

static void merge(double count, double* mean, double* m2, double tile_count, Moments tile, int64_t channels) {
  const double total = count + tile_count, weight = tile_count / total, cross = count * weight;
  const double per_row = 1.0 / tile_count;
  for (int64_t c = 0; c < channels; c++) {
    const double s = tile.s[c];
    const double tile_m2 = (double)tile.q[c] - s * s * per_row;
    const double delta = (double)tile.pivot[c] + s * per_row - mean[c];
    mean[c] += delta * weight;
    m2[c] += (tile_m2 < 0 ? 0 : tile_m2) + delta * delta * cross;
  }
}

static void maximum(const float* const* from, int64_t count, int64_t channels, float* out) {
  for (int64_t c = 0; c < channels; c += 16) {
    vf most = load(from[0] + c);
    for (int64_t p = 1; p < count; p++) {
      const vf v = load(from[p] + c);
      most = (v > most) | (v != v) ? v : most;
    }
    store(out + c, most);
  }
}

static void add(double* total, const float* part, int64_t channels) {
  for (int64_t c = 0; c < channels; c++) {
    total[c] += part[c];
  }
}

template <typename T>
Loops<T> table() {
  return {
      activate<T>, activate_store<T>, fprop_epilogue<T>, dgrad_epilogue<T>, moments<T>,
      apply<T>,    pool<T>,           pool_reduce<T>,    pool_apply<T>,
  };
}

} // namespace fused_preact::ISA
