#include "tile_gemm.h"

#include <ATen/native/CPUBlas.h>

#include <numeric>

namespace fused_preact {

namespace {
constexpr int64_t kDepthOfACall = 256;
}

template <>
void gemm<float>(
    int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
    bool add) {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  // One call sums its k terms one after the other in float and adds C at the end. Deep reductions go in parts, so
  // that the rounding of 1,000 and more channels stays near that of the library's convolutions.
  for (int64_t first = 0; first < k; first += kDepthOfACall) {
    const int64_t depth = std::min(kDepthOfACall, k - first);
    at::native::cpublas::brgemm(
        m, n, depth, lda, ldb, ldc, add || first > 0, a + first, b + first * ldb, c, /*is_vnni=*/false);
  }
#else
  // Column-major BLAS computes the transpose of everything.
  constexpr auto plain = at::native::TransposeType::NoTranspose;
  at::native::cpublas::gemm(plain, plain, n, m, k, 1.0f, b, ldb, a, lda, add ? 1.0f : 0.0f, c, ldc);
#endif
}

template <>
void gemm_release<float>() {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  at::native::cpublas::brgemm_release(/*is_vnni=*/false);
#endif
}

#define GEMM_16(P)                                                                                                  \
  template <>                                                                                                       \
  void gemm<P>(                                                                                                     \
      int64_t m, int64_t n, int64_t k, const P* a, int64_t lda, const P* b, int64_t ldb, float* c, int64_t ldc,     \
      bool add) {                                                                                                   \
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/true);                            \
  }                                                                                                                 \
  template <>                                                                                                       \
  void gemm_release<P>() {                                                                                          \
    at::native::cpublas::brgemm_release(/*is_vnni=*/true);                                                          \
  }
GEMM_16(at::BFloat16)
GEMM_16(at::Half)
#undef GEMM_16

namespace {

// The weight as [K, R S, C], contiguous: a view where it is channels_last.
Tensor krsc(const Tensor& weight) {
  return weight.permute({0, 2, 3, 1}).contiguous();
}

PackedWeights allocate(int64_t taps, int64_t depth, int64_t columns, at::ScalarType products) {
  return {at::empty({taps * depth * round_up(columns, kLanes)}, products), taps, depth, columns};
}

// Below this many weights a second thread costs more than it saves.
constexpr int64_t kPackGrain = 1 << 15;

} // namespace

PackedWeights pack_forward(const Tensor& weight_, at::ScalarType products) {
  const Tensor weight = krsc(weight_);
  const int64_t k = weight.size(0), taps = weight.size(1) * weight.size(2), c = weight.size(3);
  const PackedWeights packed = allocate(taps, round_up(c, kLanes), k, products);
  FUSED_PREACT_DISPATCH(weight.scalar_type(), "pack_forward", [&] {
    const scalar_t* w = weight.const_data_ptr<scalar_t>();
    const int64_t depth = packed.depth;
    const auto pack = [&](auto product) {
      using P = decltype(product);
      // Of 16-bit weights a pair is turned like one float.
      constexpr int64_t kPair = sizeof(float) / sizeof(P);
      at::parallel_for(
          0, packed.panels() * taps, kPackGrain / (PackedWeights::kPanel * depth) + 1, [&](int64_t begin, int64_t end) {
            P* rows = reinterpret_cast<P*>(thread_scratch(PackedWeights::kPanel * depth));
            for (int64_t i = begin; i < end; i++) {
              const int64_t panel = i / taps, tap = i % taps;
              const int64_t count = packed.channels(panel), width = packed.width(panel);
              P* to = const_cast<P*>(packed.data<P>(panel)) + tap * depth * width;
              float* out = reinterpret_cast<float*>(to);
              const scalar_t* from = w + (panel * PackedWeights::kPanel * taps + tap) * c;
              if (count < width) {
                std::memset(out, 0, depth * width * sizeof(P));
              }
              if (std::is_same_v<scalar_t, P> && c == depth) {
                const float* in = reinterpret_cast<const float*>(from);
                common_loops().transpose(in, taps * c / kPair, count, c / kPair, out, width);
                continue;
              }
              operands<scalar_t, P>().activate(from, taps * c, count, c, {nullptr, nullptr}, rows, depth);
              common_loops().transpose(
                  reinterpret_cast<const float*>(rows), depth / kPair, count, depth / kPair, out, width);
            }
          });
    };
    with_packed_type<scalar_t>(products, pack);
  });
  return packed;
}

PackedWeights pack_backward(const Tensor& weight_, const Grid& grid, at::ScalarType products) {
  const Tensor weight = krsc(weight_);
  const int64_t k = weight.size(0), all_taps = weight.size(1) * weight.size(2), c = weight.size(3);
  const int64_t taps = static_cast<int64_t>(grid.taps.size());
  const PackedWeights packed = allocate(taps, round_up(k, kLanes), c, products);
  FUSED_PREACT_DISPATCH(weight.scalar_type(), "pack_backward", [&] {
    const scalar_t* w = weight.const_data_ptr<scalar_t>();
    const int64_t depth = packed.depth;
    with_product_type<scalar_t>(products, [&](auto product) {
      using P = decltype(product);
      at::parallel_for(
          0, packed.panels() * taps, kPackGrain / (PackedWeights::kPanel * depth) + 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
              const int64_t panel = i / taps, tap = i % taps, width = packed.width(panel);
              P* out = const_cast<P*>(packed.data<P>(panel)) + tap * depth * width;
              P* rows = out;
              if constexpr (!std::is_same_v<P, float>) {
                rows = reinterpret_cast<P*>(thread_scratch(PackedWeights::kPanel * depth));
              }
              operands<scalar_t, P>().activate(
                  w + grid.taps[tap].index * c + panel * PackedWeights::kPanel, all_taps * c, k, packed.channels(panel),
                  {nullptr, nullptr}, rows, width);
              std::memset(static_cast<void*>(rows + k * width), 0, (depth - k) * width * sizeof(P));
              if constexpr (!std::is_same_v<P, float>) {
                common_loops().interleave(bits(rows), width, depth, width, bits(out));
              }
            }
          });
    });
  });
  return packed;
}

namespace {

// Scratch that leaves room in a 2 MiB (1 MiB on older processors) second-level cache for a panel of weights.
constexpr int64_t kLeftFloats = 64 * 1024;
// Of a band, which keeps a kernel row's taps side by side: 256 KiB of it gathered too many rows twice.
constexpr int64_t kBandFloats = 128 * 1024;
constexpr int64_t kChunkDepth = 1152;
// Weights and accumulator of a block, where both stay in that cache.
constexpr int64_t kResidentFloats = 320 * 1024;

// The window's height and width where the taps are a dense rectangle in ascending order, else zeros.
std::pair<int64_t, int64_t> dense_window(const Grid& grid) {
  const auto& taps = grid.taps;
  if (taps.size() < 2 || grid.src_stride_h != 1 || grid.src_stride_w != 1) {
    return {0, 0};
  }
  int64_t width = 1;
  while (width < static_cast<int64_t>(taps.size()) && taps[width].dh == taps[0].dh) {
    width++;
  }
  const int64_t height = static_cast<int64_t>(taps.size()) / width;
  for (int64_t i = 0; i < static_cast<int64_t>(taps.size()); i++) {
    if (i >= height * width || taps[i].dh != taps[0].dh + i / width || taps[i].dw != taps[0].dw + i % width) {
      return {0, 0};
    }
  }
  return {height, width};
}

// As many tiles as make every thread's share the same.
int64_t balanced(int64_t total, int64_t target) {
  const int64_t threads = at::get_num_threads();
  const int64_t tiles = round_up((total + target - 1) / target, threads);
  return std::max<int64_t>(1, (total + tiles - 1) / tiles);
}

} // namespace

Tiling::Tiling(const Grid& grid, int64_t depth) {
  const int64_t taps = static_cast<int64_t>(grid.taps.size());
  std::tie(window_h, window_w) = dense_window(grid);
  band = window_w > 1;
  if (band) {
    const int64_t row_floats = grid.w * window_w * depth;
    const int64_t fitting = kBandFloats / row_floats - (window_h - 1);
    rows = std::min({std::max<int64_t>({fitting, 2 * (window_h - 1), 1}), grid.h, 512 / grid.w + 1});
    const int64_t per_image = (grid.h + rows - 1) / rows;
    rows = (grid.h + per_image - 1) / per_image;
    tiles = grid.n * ((grid.h + rows - 1) / rows);
    chunk_taps = taps;
    return;
  }
  window_h = window_w = 1;
  chunk_taps = std::max<int64_t>(1, std::min(taps, kChunkDepth / depth));
  const int64_t target = std::min<int64_t>(192, std::max<int64_t>(64, kLeftFloats / (chunk_taps * depth)));
  rows = balanced(grid.pixels(), target);
  tiles = (grid.pixels() + rows - 1) / rows;
}

Tasks::Tasks(const PackedWeights& weights, const Tiling& tiling, int64_t source_floats)
    : panels(weights.panels()), blocks(1), tiles(tiling.tiles) {
  const int64_t threads = at::get_num_threads(), panel = 2 * weights.taps * weights.depth * PackedWeights::kPanel;
  if (source_floats > 0 && panels * panel > kResidentFloats) {
    const int64_t fitting = std::max<int64_t>(1, kResidentFloats / panel);
    const int64_t wanted = std::min(panels, round_up((panels + fitting - 1) / fitting, threads));
    // What a thread reads from beyond its cache: its share of the source once per block and the weights once, or its
    // share of the source once and the weights for every tile.
    const int64_t again = panels * panel * std::max<int64_t>(0, tiles / threads - 1);
    if ((wanted - 1) * source_floats / threads < again) {
      blocks = wanted;
    }
  }
  block_panels = (panels + blocks - 1) / blocks;
  blocks = (panels + block_panels - 1) / block_panels;
  ranges = std::min(tiles, threads / std::gcd(blocks, threads));
}

} // namespace fused_preact
