// Part of loops_body.h: the loops of operations that are passes of their own.

template <int B, bool TAIL, typename T>
FP_INLINE void moments_block(int64_t c, int64_t n, const T* x, int64_t x_stride, int64_t rows, Moments m) {
  vf high[B], low[B], m2[B];
  for (int b = 0; b < B; b++) {
    const auto value = [&](int64_t r) __attribute__((always_inline)) {
      return get<TAIL>(x + r * x_stride + c + 16 * b, n);
    };
    high[b] = pivot(value, rows);
    low[b] = m2[b] = vf{};
  }
  for (int64_t begin = 0; begin < rows; begin += kSumRows) {
    const int64_t end = begin + kSumRows < rows ? begin + kSumRows : rows;
    vf s[B], q[B];
    for (int b = 0; b < B; b++) {
      s[b] = q[b] = vf{};
    }
    for (int64_t r = begin; r < end; r++) {
      for (int b = 0; b < B; b++) {
        const vf d = get<TAIL>(x + r * x_stride + c + 16 * b, n) - high[b];
        s[b] += d;
        q[b] += d * d;
      }
    }
    for (int b = 0; b < B; b++) {
      join(high[b], low[b], m2[b], s[b], q[b], begin, end - begin);
    }
  }
  for (int b = 0; b < B; b++) {
    put<TAIL>(m.high + c + 16 * b, high[b], n);
    put<TAIL>(m.low + c + 16 * b, low[b], n);
    put<TAIL>(m.m2 + c + 16 * b, m2[b], n);
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
    if (residual != nullptr) {
      ahead(residual + at);
    }
    vf v = get<TAIL>(a + at, n) * get<TAIL>(g + at, n);
    if (b_ != nullptr) {
      ahead(x + at);
      v += get<TAIL>(b_ + at, n) * (get<TAIL>(x + at, n) - get<TAIL>(mean + at, n)) + get<TAIL>(c_ + at, n);
    }
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
        part[b] += relu(affine(scale[b], get<TAIL>(x + r * channels + c + 16 * b, n), shift[b], x));
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
        const auto off = affine(scale[b], value, shift[b], x) <= 0.0f;
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
    const vf ag = get<TAIL>(a + at, n) * (get<TAIL>(dy + at, n) / (float)rows);
    if (b_ == nullptr) {
      for (int64_t r = 0; r < rows; r++) {
        const vf value = get<TAIL>(x + r * channels + at, n);
        put<TAIL>(dx + r * channels + at, masked(ag, affine(scale, value, shift, x), vf{}), n);
      }
      continue;
    }
    const vf mu = get<TAIL>(mean + at, n), slope = get<TAIL>(b_ + at, n), offset = get<TAIL>(c_ + at, n);
    for (int64_t r = 0; r < rows; r++) {
      const vf value = get<TAIL>(x + r * channels + at, n);
      const vf v = masked(ag, affine(scale, value, shift, x), vf{});
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
