// Part of loops_body.h: the loops without a storage type.

FP_INLINE void transpose_16x16(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
#if FP_VECTOR_BITS >= 512
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

static void transpose_16(
    const uint16_t* in, int64_t in_stride, int64_t rows, int64_t cols, uint16_t* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; r += 16) {
    const int64_t m = rows - r < 16 ? rows - r : 16;
    for (int64_t c = 0; c < cols; c += 16) {
      const int64_t n = cols - c < 16 ? cols - c : 16;
      if (m == 16 && n == 16) {
        // As floats, which are twice as wide: whatever the bits are, a shuffle leaves them alone.
        float block[256], turned[256];
        for (int64_t i = 0; i < 16; i++) {
          vh bits;
          __builtin_memcpy(&bits, in + (r + i) * in_stride + c, sizeof bits);
          store(block + 16 * i, (vf)widened(bits));
        }
        transpose_16x16(block, 16, turned, 16);
        for (int64_t i = 0; i < 16; i++) {
          const vh bits = narrowed((vu)load(turned + 16 * i));
          __builtin_memcpy(out + (c + i) * out_stride + r, &bits, sizeof bits);
        }
        continue;
      }
      for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
          out[(c + j) * out_stride + r + i] = in[(r + i) * in_stride + c + j];
        }
      }
    }
  }
}

static void interleave(const uint16_t* in, int64_t in_stride, int64_t rows, int64_t cols, uint16_t* out) {
  for (int64_t r = 0; r < rows; r += 2, in += 2 * in_stride, out += 2 * cols) {
    for (int64_t c = 0; c < cols; c += 16) {
      vh first, second{};
      __builtin_memcpy(&first, in + c, sizeof first);
      if (r + 1 < rows) {
        __builtin_memcpy(&second, in + in_stride + c, sizeof second);
      }
      const vu pairs = widened(first) | widened(second) << 16;
      __builtin_memcpy(out + 2 * c, &pairs, sizeof pairs);
    }
  }
}

static void merge(double count, double* mean, double* m2, double tile_count, Moments tile, int64_t channels) {
  const double total = count + tile_count, weight = tile_count / total, cross = count * weight;
  for (int64_t c = 0; c < channels; c++) {
    const double delta = ((double)tile.high[c] + (double)tile.low[c]) - mean[c];
    mean[c] += delta * weight;
    m2[c] += (double)tile.m2[c] + delta * delta * cross;
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
