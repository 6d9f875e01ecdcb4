#include "unit_plan.h"

namespace fused_preact {

namespace {

// Rows of a product: enough to use a panel of weights often, few enough that operands stay in a 2 MiB cache.
constexpr int64_t kRows = 192;
// A larger expanded operand is kept for some rows only, which costs copying the rows that two tiles share.
constexpr int64_t kOperandFloats = 128 * 1024;
constexpr int64_t kDepth = 512;

// Whether the left operand of the unit's first convolution is gathered from the stream, tile by tile.
bool gathers(const ChainUnit& unit) {
  return unit.convs[0].one_tap();
}

} // namespace

int64_t depth_step(int64_t depth) {
  const int64_t steps = (depth + kDepth - 1) / kDepth;
  return round_up((depth + steps - 1) / steps, kLanes);
}

UnitPlan::UnitPlan(const ChainUnit& unit_, int64_t images_, int64_t h, int64_t w, int64_t tiles)
    : unit(&unit_), images(images_), left_floats(0), acc_floats(0) {
  for (const ChainConv& conv : unit_.convs) {
    const int64_t oh = (h + 2 * conv.pad_h - conv.dil_h * (conv.r - 1) - 1) / conv.stride_h + 1;
    const int64_t ow = (w + 2 * conv.pad_w - conv.dil_w * (conv.s - 1) - 1) / conv.stride_w + 1;
    TORCH_CHECK(
        h + 2 * conv.pad_h > conv.dil_h * (conv.r - 1) && w + 2 * conv.pad_w > conv.dil_w * (conv.s - 1),
        "x: got a size of which the convolutions leave nothing");
    levels.push_back({&conv, h, w, oh, ow, 0});
    h = oh;
    w = ow;
  }
  const Level &in = levels.front(), &out = levels.back();
  const int64_t step_h = unit_.shortcut == Shortcut::kIdentity ? 1 : unit_.projection.stride_h;
  const int64_t step_w = unit_.shortcut == Shortcut::kIdentity ? 1 : unit_.projection.stride_w;
  const int64_t added = unit_.shortcut == Shortcut::kProjection ? unit_.projection.k : in.conv->c;
  TORCH_CHECK(
      unit_.shortcut == Shortcut::kNone ||
          ((in.h - 1) / step_h + 1 == out.oh && (in.w - 1) / step_w + 1 == out.ow &&
           (unit_.shortcut == Shortcut::kPadding ? added <= out.conv->k : added == out.conv->k)),
      "x: got a size or spec of which a unit's shortcut and convolutions differ in shape");
  if (!gathers(unit_)) {
    phases.push_back({0, -1});
  }
  const int64_t count = static_cast<int64_t>(levels.size());
  for (int64_t first = 0; first < count;) {
    int64_t last = first;
    while (last + 1 < count && levels[last + 1].conv->pointwise()) {
      last++;
    }
    phases.push_back({first, last});
    first = last + 1;
  }
  interleaved = tiles == 0 && (unit_.shortcut != Shortcut::kIdentity || reads_ahead());

  const int64_t rows = output().oh, pixels = images * output().ow;
  rows_at_once = std::min(rows, std::max<int64_t>(1, kRows / pixels));
  if (images * rows * output().ow <= kRows + kRows / 2) {
    rows_at_once = rows;
  }
  if (tiles > 0) {
    rows_at_once = std::min(rows_at_once, (rows + tiles - 1) / tiles);
  }
  // A step of the depth would read what the step before has added to, where one convolution is the whole unit.
  const ChainConv& conv = unit_.convs[0];
  chunk = count == 1 ? conv.depth() : depth_step(conv.depth());
  // Backwards: how many rows each phase makes for one tile of the last, and at the start for the first one.
  int64_t made = rows_at_once;
  for (int64_t phase = static_cast<int64_t>(phases.size()) - 1; phase >= 0; phase--) {
    const auto [first, last] = phases[phase];
    made = std::min(made, phase_rows(phase));
    if (last < first) {
      break; // an expansion needs no scratch of its own
    }
    const int64_t m = made * row_pixels(phase);
    Level& level = levels[first];
    if (first == 0 && gathers(unit_)) {
      left_floats = std::max(left_floats, m * chunk);
    } else {
      const int64_t reach = (level.conv->r - 1) * level.conv->dil_h;
      level.slots = (level.h + 2 * level.conv->pad_h + level.conv->stride_h - 1) / level.conv->stride_h;
      if (interleaved && reach + 1 >= level.conv->stride_h && level.operand_floats(images) > kOperandFloats) {
        level.slots = std::min(level.slots, made + reach / level.conv->stride_h + 1);
      }
    }
    for (int64_t i = first; i <= last && i + 1 < count; i++) {
      acc_floats = std::max(acc_floats, m * levels[i].conv->width());
    }
    if (last + 1 == count && unit_.shortcut == Shortcut::kProjection) {
      left_floats = std::max(left_floats, m * depth_step(unit_.projection.depth()));
    }
    if (!(first == 0 && gathers(unit_))) {
      // The first tile needs the reach of the kernel too, the others a stride for each row.
      made = interleaved ? std::min(level.h, std::max(level.needed(made), made * level.conv->stride_h)) : made;
    }
  }
  tile_floats = round_up(left_floats, kLanes) + 2 * round_up(acc_floats, kLanes);
}

bool UnitPlan::reads_ahead() const {
  for (int64_t end = 1; end < output().oh; end++) {
    int64_t read = end;
    for (size_t phase = phases.size() - 1; phase > 0; phase--) {
      read = levels[phases[phase].first].needed(read);
    }
    if (read < end) {
      return false;
    }
  }
  return true;
}

int64_t UnitPlan::operand_floats() const {
  int64_t total = 0;
  for (const Level& level : levels) {
    total += round_up(level.operand_floats(images), kLanes);
  }
  return total;
}

} // namespace fused_preact
