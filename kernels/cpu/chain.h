// A chain of residual units with folded, prepacked weights: what unit_chain.cpp runs in eval mode.
//
// A unit is BN -> ReLU -> conv [-> + bias -> ReLU -> conv ...] and its shortcut: the BN before each later convolution
// is folded into the one before it, so only the first has a scale. The description comes as integers:
//   channels of the input, then per unit
//     number of convolutions, Shortcut, whether a tail bias is added to the output,
//     per convolution   k, r, s, stride (2), padding (2), dilation (2)
//     for a shortcut that is kPadding or kProjection   k, stride (2)
#pragma once

#include <vector>

#include "common.h"

namespace fused_preact {

enum class Shortcut : int64_t { kNone, kIdentity, kPadding, kProjection };

struct ChainConv {
  int64_t c, k, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  // Offsets in the packed floats. The weight may be of 16-bit numbers; the last convolution of a unit has no bias.
  int64_t weight = -1, bias = -1;

  int64_t depth() const {
    return round_up(c, kLanes);
  }
  int64_t width() const {
    return round_up(k, kLanes);
  }
  int64_t taps() const {
    return r * s;
  }
  // Whether an output pixel reads one input pixel; with equal strides it is the pixel at the same place.
  bool one_tap() const {
    return taps() == 1 && pad_h == 0 && pad_w == 0;
  }
  bool pointwise() const {
    return one_tap() && stride_h == 1 && stride_w == 1;
  }
};

struct ChainUnit {
  std::vector<ChainConv> convs;
  Shortcut shortcut;
  ChainConv projection; // for kPadding its stride alone
  int64_t scale, shift; // of the first BN; offsets
  int64_t tail; // offset of the bias of the output, -1: none
};

struct Chain {
  int64_t channels;
  std::vector<ChainUnit> units;
  int64_t ones; // offset of a vector of ones
  int64_t floats; // size of the packed weights

  Chain(at::IntArrayRef spec, at::ScalarType products);
};

} // namespace fused_preact
