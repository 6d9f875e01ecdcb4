// How one unit of a chain is run on a block of images of one size.
//
// The images of a block lie side by side: a row of the block is row h of image 0, row h of image 1, ... So a run of
// rows is a run of memory whatever the number of images, and a product has as many rows as one likes.
//
// Left operands. A one-tap convolution reads what the step before has just left in cache. For any other the step
// before stores each activated pixel once per tap of a kernel row, at the output column that reads it, zeros where
// that is padding: [rows][images * OW][S][C]. Kernel row r of an output row is then one row of that operand, with no
// column to skip between two rows; a residue class of rows per vertical stride keeps them consecutive.
//
// Phases. A unit is cut where a convolution needs rows from above and below: [gather, 1x1] [3x3, 1x1] for a bottleneck
// unit, [expand] [3x3] [3x3] for a basic one. Each phase is run a few rows at a time, as soon as the one before it
// has made the rows it reads, so these are still in cache; so is the identity when the last one adds to it.
#pragma once

#include "chain.h"

namespace fused_preact {

// A convolution at the size at hand.
struct Level {
  const ChainConv* conv;
  int64_t h, w, oh, ow;
  int64_t slots; // rows that its expanded operand keeps per residue class, 0 where it has none

  int64_t row_floats(int64_t images) const {
    return images * ow * conv->s * conv->depth();
  }
  int64_t operand_floats(int64_t images) const {
    return slots == 0 ? 0 : conv->stride_h * slots * row_floats(images);
  }
  // Input rows that output rows below `end` read.
  int64_t needed(int64_t end) const {
    if (end == 0) {
      return 0;
    }
    const int64_t last = (end - 1) * conv->stride_h + (conv->r - 1) * conv->dil_h - conv->pad_h;
    return std::min(std::max<int64_t>(last + 1, 0), h);
  }
};

// Convolutions [first, last]; last < first: the input is expanded, nothing more.
struct Phase {
  int64_t first, last;
};

struct UnitPlan {
  const ChainUnit* unit;
  int64_t images;
  std::vector<Level> levels;
  std::vector<Phase> phases;
  int64_t rows_at_once; // of the last phase
  bool interleaved; // phases run in turns
  int64_t tile_floats; // scratch of a tile, whatever the phase
  int64_t left_floats, acc_floats; // its parts: one left operand, two accumulators
  int64_t chunk; // channels gathered at a time

  // `tiles` 0: one thread runs the unit; else every phase is cut into about that many tiles, for as many threads.
  UnitPlan(const ChainUnit& unit, int64_t images, int64_t h, int64_t w, int64_t tiles);

  const Level& output() const {
    return levels.back();
  }
  int64_t in_floats() const {
    return images * levels[0].h * levels[0].w * levels[0].conv->depth();
  }
  int64_t out_floats() const {
    return images * output().oh * output().ow * output().conv->width();
  }
  int64_t operand_floats() const;
  // Whether for any number of its first rows the output needs that many of the input: then a row may be written over
  // the input's, which has been read. Not so with strides, and not where rows see only padding and need nothing.
  bool reads_ahead() const;
  int64_t phase_rows(int64_t phase) const {
    return phases[phase].last < phases[phase].first ? levels[0].h : levels[phases[phase].last].oh;
  }
  int64_t row_pixels(int64_t phase) const {
    return images * (phases[phase].last < phases[phase].first ? levels[0].w : levels[phases[phase].last].ow);
  }
};

// Channels of a product's depth that are multiplied at a time: at most kDepthOfACall, and of equal size.
int64_t depth_step(int64_t depth);

} // namespace fused_preact
