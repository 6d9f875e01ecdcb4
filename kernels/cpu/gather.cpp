#include "gather.h"

namespace fused_preact {

ConvShape::ConvShape(
    at::IntArrayRef input, at::IntArrayRef weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation)
    : n(input[0]), c(input[1]), h(input[2]), w(input[3]), k(weight[0]), r(weight[2]), s(weight[3]),
      stride_h(stride[0]), stride_w(stride[1]), pad_h(padding[0]), pad_w(padding[1]), dil_h(dilation[0]),
      dil_w(dilation[1]) {
  oh = (h + 2 * pad_h - dil_h * (r - 1) - 1) / stride_h + 1;
  ow = (w + 2 * pad_w - dil_w * (s - 1) - 1) / stride_w + 1;
}

Grid ConvShape::forward_grid() const {
  Grid grid{n, oh, ow, h, w, stride_h, stride_w, oh, ow, 1, 1, 0, 0, {}};
  for (int64_t i = 0; i < r; i++) {
    for (int64_t j = 0; j < s; j++) {
      grid.taps.push_back({i * s + j, i * dil_h - pad_h, j * dil_w - pad_w});
    }
  }
  return grid;
}

std::vector<Grid> ConvShape::backward_grids() const {
  std::vector<Grid> grids;
  for (int64_t ph = 0; ph < std::min(stride_h, h); ph++) {
    for (int64_t pw = 0; pw < std::min(stride_w, w); pw++) {
      Grid grid{n, (h - ph + stride_h - 1) / stride_h, (w - pw + stride_w - 1) / stride_w, oh, ow, 1, 1,
                h, w, stride_h, stride_w, ph, pw, {}};
      // Descending taps read ascending gradient pixels, so that a dense kernel is a dense window.
      for (int64_t i = r - 1; i >= 0; i--) {
        for (int64_t j = s - 1; j >= 0; j--) {
          const int64_t dh = ph + pad_h - i * dil_h, dw = pw + pad_w - j * dil_w;
          if (dh % stride_h == 0 && dw % stride_w == 0) {
            grid.taps.push_back({i * s + j, dh / stride_h, dw / stride_w});
          }
        }
      }
      grids.push_back(std::move(grid));
    }
  }
  return grids;
}

void list_runs(const Grid& grid, int64_t begin, int64_t end, std::vector<Run>& runs) {
  runs.clear();
  if (grid.dense()) {
    runs.push_back({0, end - begin, begin, 1});
    return;
  }
  for (int64_t p = begin; p < end;) {
    const int64_t row = p / grid.w, j = p % grid.w, count = std::min(grid.w - j, end - p);
    runs.push_back({p - begin, count, grid.dst_pixel(row / grid.h, row % grid.h, j), grid.dst_stride_w});
    p += count;
  }
}

template <typename T, typename P>
void gather_tap(
    const Source<T>& source, const Grid& grid, const Tap& tap, int64_t begin, int64_t end, int64_t c_begin,
    int64_t c_end, P* out, int64_t out_stride) {
  const int64_t channels = c_end - c_begin, columns = round_up(channels, kLanes);
  if (grid.pointwise()) {
    source.load(begin, 1, end - begin, c_begin, channels, out, out_stride);
    return;
  }
  // The pixels j of a row whose source column j * stride + dw lies inside the source.
  const int64_t step = grid.src_stride_w;
  const int64_t j_first = tap.dw >= 0 ? 0 : (-tap.dw + step - 1) / step;
  const int64_t j_last = grid.src_w - 1 - tap.dw < 0 ? 0 : (grid.src_w - 1 - tap.dw) / step + 1;
  for (int64_t p = begin; p < end;) {
    const int64_t row = p / grid.w, j = p % grid.w, count = std::min(grid.w - j, end - p);
    const int64_t src_row = row % grid.h * grid.src_stride_h + tap.dh;
    int64_t lo = std::min(std::max(j_first - j, int64_t{0}), count);
    int64_t hi = std::max(std::min(j_last - j, count), lo);
    if (src_row < 0 || src_row >= grid.src_h) {
      lo = hi = count;
    }
    zero_rows(out, lo, columns, out_stride);
    if (hi > lo) {
      const int64_t pixel = (row / grid.h * grid.src_h + src_row) * grid.src_w + (j + lo) * step + tap.dw;
      source.load(pixel, step, hi - lo, c_begin, channels, out + lo * out_stride, out_stride);
    }
    zero_rows(out + hi * out_stride, count - hi, columns, out_stride);
    out += count * out_stride;
    p += count;
  }
}

#define INSTANTIATE(T, P)                                                                                    \
  template void gather_tap<T, P>(                                                                            \
      const Source<T>&, const Grid&, const Tap&, int64_t, int64_t, int64_t, int64_t, P*, int64_t)
INSTANTIATE(float, float);
INSTANTIATE(c10::BFloat16, float);
INSTANTIATE(c10::BFloat16, c10::BFloat16);
INSTANTIATE(c10::Half, float);
INSTANTIATE(c10::Half, c10::Half);
#undef INSTANTIATE

} // namespace fused_preact
