// stem_conv_pool: a convolution of few channels and the max-pooling after it, whose rows never leave the cache.
//
// Of an image with few channels the S pixels that a kernel row reads lie side by side: an output row is one product per
// kernel row, whose left operand is the image itself with its zero border, read with overlapping rows of S C values.
#include "ops.h"
#include "tile_gemm.h"

namespace fused_preact {

namespace {

// Panels of [R][S C] rows, with S C padded to whole vectors as in any other panel; the product skips that.
Tensor stem_pack(const Tensor& weight) {
  const int64_t k = weight.size(0), c = weight.size(1), r = weight.size(2), s = weight.size(3);
  return pack_forward(weight.permute({0, 3, 1, 2}).reshape({k, s * c, r, 1}), at::kFloat).buffer;
}

struct Window {
  int64_t size, stride, padding;

  explicit Window(at::IntArrayRef sizes) : size(sizes[0]), stride(sizes[1]), padding(sizes[2]) {}

  int64_t outputs(int64_t inputs) const {
    return (inputs + 2 * padding - size) / stride + 1;
  }
};

template <typename T>
class StemRun {
 public:
  StemRun(const T* x, const float* weights, const float* bias, T* y, at::IntArrayRef shape, int64_t k, Window conv,
          Window pool)
      : x_(x), weights_(weights), bias_(bias), y_(y), c_(shape[1]), h_(shape[2]), w_(shape[3]), k_(k), conv_(conv),
        pool_(pool), oh_(conv.outputs(h_)), ow_(conv.outputs(w_)), ph_(pool.outputs(oh_)), pw_(pool.outputs(ow_)),
        width_(round_up(k, kLanes)), pitch_(round_up((w_ + 2 * conv.padding) * c_, kLanes) + kLanes) {}

  // Pooled rows [begin, end) of an image.
  void rows(int64_t image, int64_t begin, int64_t end) const {
    float *band = nullptr, *ring = nullptr, *out = nullptr, *base = nullptr;
    for (int pass = 0; pass < 2; pass++) {
      Arena arena(base);
      band = arena.take(conv_.size * pitch_);
      ring = arena.take(pool_.size * ow_ * width_);
      out = arena.take(pw_ * width_);
      base = pass == 0 ? thread_scratch(arena.used()) : base;
    }
    int64_t made = std::max<int64_t>(0, begin * pool_.stride - pool_.padding);
    for (int64_t row = begin; row < end; row++) {
      const int64_t first = row * pool_.stride - pool_.padding, last = std::min(first + pool_.size, oh_);
      for (made = std::max(made, first); made < last; made++) {
        convolve(image, made, band, ring + made % pool_.size * ow_ * width_);
      }
      pool(std::max<int64_t>(first, 0), last, ring, out);
      loops<T>().fprop_epilogue(
          out, width_, pw_, k_, bias_, nullptr, y_ + (image * ph_ + row) * pw_ * k_, k_, Moments{}, 0);
    }
  }

 private:
  void convolve(int64_t image, int64_t row, float* band, float* out) const {
    const int64_t border = conv_.padding * c_, values = w_ * c_;
    for (int64_t r = 0; r < conv_.size; r++) {
      float* to = band + r * pitch_;
      const int64_t from = row * conv_.stride - conv_.padding + r;
      if (from < 0 || from >= h_) {
        std::memset(to, 0, pitch_ * sizeof(float));
        continue;
      }
      // Whole vectors are stored: the right border comes after.
      operands<T, float>().activate(
          x_ + (image * h_ + from) * values, values, 1, values, {nullptr, nullptr}, to + border, pitch_);
      std::memset(to, 0, border * sizeof(float));
      std::memset(to + border + values, 0, border * sizeof(float));
    }
    const int64_t depth = conv_.size * c_, padded = round_up(depth, kLanes);
    for (int64_t column = 0; column < width_; column += PackedWeights::kPanel) {
      const int64_t n = std::min(PackedWeights::kPanel, width_ - column);
      const float* panel = weights_ + column * conv_.size * padded;
      for (int64_t r = 0; r < conv_.size; r++) {
        gemm<float>(
            ow_, n, depth, band + r * pitch_, conv_.stride * c_, panel + r * padded * n, n, out + column, width_, r > 0);
      }
    }
  }

  // The maxima over rows [first, last), which the ring holds.
  void pool(int64_t first, int64_t last, const float* ring, float* out) const {
    std::vector<const float*> pixels;
    for (int64_t j = 0; j < pw_; j++) {
      const int64_t left = j * pool_.stride - pool_.padding;
      pixels.clear();
      for (int64_t row = first; row < last; row++) {
        for (int64_t i = std::max<int64_t>(left, 0); i < std::min(left + pool_.size, ow_); i++) {
          pixels.push_back(ring + (row % pool_.size * ow_ + i) * width_);
        }
      }
      common_loops().maximum(pixels.data(), static_cast<int64_t>(pixels.size()), width_, out + j * width_);
    }
  }

  const T* x_;
  const float *weights_, *bias_;
  T* y_;
  int64_t c_, h_, w_, k_;
  Window conv_, pool_;
  int64_t oh_, ow_, ph_, pw_, width_, pitch_;
};

} // namespace

// x [N,C,H,W], packed of a weight [K,C,R,R]; conv and pool are size, stride and padding, the same both ways.
Tensor stem_conv_pool(
    const Tensor& x_, const Tensor& packed, const OptionalTensor& bias_, int64_t k, at::IntArrayRef conv_,
    at::IntArrayRef pool_) {
  TORCH_CHECK(served(x_), "x: got ", x_.toString(), " of shape ", x_.sizes(), ", allowed is a non-empty [N,C,H,W] "
              "tensor in float32, bfloat16 or float16");
  TORCH_CHECK(conv_.size() == 3 && pool_.size() == 3, "conv, pool: allowed are size, stride and padding of each");
  const Window conv(conv_), pool(pool_);
  const int64_t n = x_.size(0), oh = conv.outputs(x_.size(2)), ow = conv.outputs(x_.size(3));
  TORCH_CHECK(
      std::min({x_.size(2), x_.size(3)}) + 2 * conv.padding >= conv.size &&
          std::min(oh, ow) + 2 * pool.padding >= pool.size && 2 * pool.padding <= pool.size,
      "x: got a size of which the convolution and the pooling leave nothing");
  TORCH_CHECK(
      packed.numel() == conv.size * round_up(conv.size * x_.size(1), kLanes) * round_up(k, kLanes),
      "packed: got ", packed.numel(), " values, allowed is what stem_pack made of a weight of the same sizes");
  const Tensor x = nhwc(x_), bias = bias_.has_value() ? floats(*bias_) : Tensor();
  const int64_t rows = pool.outputs(oh), threads = at::get_num_threads();
  const Tensor y = empty_nhwc({n, k, rows, pool.outputs(ow)}, x);
  // Two bands of an image share some rows of the convolution: whole images where they are shared out evenly.
  const int64_t bands = n % threads == 0 ? 1 : std::min(rows, threads);
  FUSED_PREACT_DISPATCH(x.scalar_type(), "stem_conv_pool", [&] {
    const StemRun<scalar_t> run(
        x.const_data_ptr<scalar_t>(), pointer(packed), bias.defined() ? pointer(bias) : nullptr,
        y.mutable_data_ptr<scalar_t>(), x.sizes(), k, conv, pool);
    at::parallel_for(0, n * bands, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t band = i % bands;
        run.rows(i / bands, band * rows / bands, (band + 1) * rows / bands);
      }
      gemm_release<float>();
    });
  });
  return like_input(y, x_);
}

TORCH_LIBRARY_FRAGMENT(fused_preact, m) {
  m.def("stem_pack(Tensor weight) -> Tensor");
  m.def("stem_conv_pool(Tensor x, Tensor packed, Tensor? bias, int k, int[] conv, int[] pool) -> Tensor");
}

TORCH_LIBRARY_IMPL(fused_preact, CPU, m) {
  m.impl("stem_pack", stem_pack);
  m.impl("stem_conv_pool", stem_conv_pool);
}

} // namespace fused_preact
