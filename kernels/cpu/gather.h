// The geometry that forward, dgrad and wgrad share.
//
// A Grid is a set of output pixels and, for each kernel tap, the source pixel it reads. A forward convolution
// is one grid: source = stride * pixel + (dilation * r - padding). The gradient of a strided convolution is
// one grid per residue class of the input pixel modulo the stride: only the taps that hit a gradient are
// listed, so no zero of an upsampled gradient is ever multiplied.
#pragma once

#include <vector>

#include "common.h"

namespace fused_preact {

struct Tap {
  int64_t index; // r * S + s in the weight
  int64_t dh, dw; // source pixel = pixel * src_stride + (dh, dw)
};

struct Grid {
  int64_t n, h, w; // the pixels
  int64_t src_h, src_w, src_stride_h, src_stride_w;
  int64_t dst_h, dst_w, dst_stride_h, dst_stride_w, dst_off_h, dst_off_w; // where pixel (i, j) is stored
  std::vector<Tap> taps;

  int64_t pixels() const {
    return n * h * w;
  }
  // Whether consecutive pixels are stored consecutively.
  bool dense() const {
    return h == dst_h && w == dst_w && dst_stride_h == 1 && dst_stride_w == 1;
  }
  // Whether pixel p reads exactly source pixel p: then a tile of the source is a run of memory.
  bool pointwise() const {
    return taps.size() == 1 && taps[0].dh == 0 && taps[0].dw == 0 && src_stride_h == 1 && src_stride_w == 1 &&
        h == src_h && w == src_w;
  }
  int64_t dst_pixel(int64_t image, int64_t i, int64_t j) const {
    return (image * dst_h + i * dst_stride_h + dst_off_h) * dst_w + j * dst_stride_w + dst_off_w;
  }
};

struct ConvShape {
  int64_t n, c, h, w; // input
  int64_t k, r, s; // weight [k, c, r, s]
  int64_t oh, ow;
  int64_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;

  ConvShape(
      at::IntArrayRef input, at::IntArrayRef weight, at::IntArrayRef stride, at::IntArrayRef padding,
      at::IntArrayRef dilation);

  Grid forward_grid() const;
  std::vector<Grid> backward_grids() const;
};

// A run of tile rows that goes to equally spaced pixels of the destination.
struct Run {
  int64_t row, count, dst_pixel, dst_step;
};

// The runs of pixels [begin, end) of the grid.
void list_runs(const Grid& grid, int64_t begin, int64_t end, std::vector<Run>& runs);

// An NHWC tensor and the prologue to be applied on load: of a BN and perhaps its ReLU (bn.scale null: none), or of a
// BN's backward (pending.a null: none).
template <typename T>
struct Source {
  const T* data;
  int64_t channels;
  Affine bn{};
  Pending<T> pending{};

  bool as_stored() const {
    return bn.scale == nullptr && pending.a == nullptr;
  }

  // Channels [c, c + count) of `rows` pixels that lie `step` apart, padded with zeros to a multiple of kLanes.
  template <typename P>
  void load(int64_t pixel, int64_t step, int64_t rows, int64_t c, int64_t count, P* out, int64_t out_stride) const {
    const int64_t at = pixel * channels + c, stride = step * channels;
    if (pending.a != nullptr) {
      const Pending<T> part = pending.y == nullptr
          ? Pending<T>{nullptr, pending.a + c, nullptr, nullptr, nullptr}
          : Pending<T>{pending.y + at, pending.a + c, pending.b + c, pending.c + c, pending.mean + c};
      operands<T, P>().load_pending(data + at, part, stride, rows, count, out, out_stride);
      return;
    }
    operands<T, P>().activate(data + at, stride, rows, count, from_channel(bn, c), out, out_stride);
  }
};

template <typename P>
void zero_rows(P* out, int64_t rows, int64_t columns, int64_t stride) {
  for (int64_t r = 0; r < rows; r++) {
    std::memset(static_cast<void*>(out + r * stride), 0, columns * sizeof(P));
  }
}

// Fills rows of `out` (row stride `out_stride`) with the channels [c_begin, c_end) of one tap's source pixels
// for the pixels [begin, end), activated; rows outside the source are zeros: padding comes after activation.
template <typename T, typename P>
void gather_tap(
    const Source<T>& source, const Grid& grid, const Tap& tap, int64_t begin, int64_t end, int64_t c_begin,
    int64_t c_end, P* out, int64_t out_stride);

} // namespace fused_preact
