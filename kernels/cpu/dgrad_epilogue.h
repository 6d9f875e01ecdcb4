// The epilogue of a dgrad: g = (acc + da) [z > floor], sum g and sum g (x - mean).
#pragma once

#include "tile_gemm.h"

namespace fused_preact {

template <typename T>
struct DgradEpilogue {
  static constexpr bool kSecondProduct = false;
  const T* x;
  const T* da;
  T* g;
  int64_t channels;
  Affine bn; // scale null: no mask, no sums
  const float* mean;
  PartSums *total_g, *total_gx;
  float *sum_g = nullptr, *sum_gx = nullptr;
  int64_t range = 0, first = 0, columns = 0;

  void begin(float* scratch, int64_t range_, int64_t first_, int64_t columns_) {
    range = range_;
    first = first_;
    columns = columns_;
    const int64_t size = round_up(columns, kLanes);
    sum_g = scratch;
    sum_gx = scratch + size;
    std::memset(scratch, 0, 2 * size * sizeof(float));
  }

  void panel(const TilePanel& panel, const std::vector<Run>& runs) const {
    const int64_t c = panel.column;
    for (const Run& run : runs) {
      const int64_t at = run.dst_pixel * channels + c;
      loops<T>().dgrad_epilogue(
          panel.acc == nullptr ? nullptr : panel.acc + run.row * panel.acc_stride, panel.acc_stride, run.count,
          panel.channels, x + at, da == nullptr ? nullptr : da + at, g + at, run.dst_step * channels,
          from_channel(bn, c), mean == nullptr ? nullptr : mean + c, sum_g + (c - first), sum_gx + (c - first));
    }
  }

  void end(int64_t /*rows*/) const {
    if (bn.scale != nullptr) {
      total_g->add(range, sum_g, first, columns);
      total_gx->add(range, sum_gx, first, columns);
    }
  }
};

} // namespace fused_preact
