// Runs a unit on one block of images, as unit_plan.h lays it out.
#pragma once

#include "unit_plan.h"

namespace fused_preact {

// P is the type of the operands of products; the streams, to which they are added, are float.
template <typename P>
class UnitRun {
 public:
  // `in` and `out` are the streams, [rows][images * W][channels], the same one for an identity shortcut; `operands`
  // holds plan.operand_floats().
  UnitRun(const UnitPlan& plan, const float* packed, const float* ones, float* in, float* out, float* operands);

  // The whole unit on this thread; `scratch` holds plan.tile_floats.
  void run(float* scratch);

  // The same by all threads, `scratch` holding plan.tile_floats for each of them.
  void run_parallel(float* scratch);

 private:
  void advance(int64_t phase, int64_t end, float* scratch);
  void prepare(int64_t phase, int64_t begin, int64_t end);
  void work(int64_t phase, int64_t begin, int64_t end, float* scratch) const;
  void shortcut(int64_t begin, int64_t end, P* left) const;
  template <typename O>
  void gather(
      const ChainConv& conv, int64_t begin, int64_t end, int64_t c, int64_t channels, O* out, int64_t out_stride) const;
  void expand(int64_t level, int64_t row, const float* from, Affine bn) const;
  void multiply(
      const ChainConv& conv, int64_t begin, int64_t depth, int64_t m, const P* a, float* c, int64_t lda,
      bool add) const;
  P* slot(int64_t level, int64_t padded_row) const;

  const UnitPlan& plan_;
  const float *packed_, *ones_;
  float *in_, *out_;
  std::vector<P*> operands_; // per level, null where it has none
  std::vector<int64_t> base_; // first row of a class that an operand holds
  std::vector<int64_t> done_; // rows made by each phase
};

} // namespace fused_preact
