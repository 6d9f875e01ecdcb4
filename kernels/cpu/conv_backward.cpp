// conv_backward: the whole backward of a site in one pass over dy and x.
//
// da[p] = sum over taps of dy[p + tap] W[tap], and dW[tap] = sum over p of a[p]^T dy[p + tap]: both products read the
// same rows of dy, gathered once, with the BN backward that makes dy applied on load. Per tile: gather dy, multiply by
// W, mask and reduce; activate and transpose x, multiply it by the gathered dy into an accumulator of dW.
#include <ATen/ops/empty_like.h>

#include "coefficients.h"
#include "dgrad_epilogue.h"
#include "ops.h"
#include "split.h"
#include "wgrad_sum.h"

namespace fused_preact {

namespace {

// Rows of the transposed activation: the pixels of a tile and up to 15 zeros.
int64_t transposed_stride(const Grid& grid, const Tiling& tiling) {
  const int64_t rows = tiling.band ? tiling.rows * grid.w : tiling.rows;
  // Not a power of two, see left_stride.
  return round_up(rows, kLanes) + kLanes;
}

// The scratch of a joint epilogue beside that of its dgrad.
struct JointScratch {
  int64_t stride; // of the transposed activation, which has a row for each of up to `columns` channels
  int64_t columns;
  int64_t pairs; // 16-bit values of a tile's gathered dy as pairs of rows; 0 for products of floats

  JointScratch(const Grid& grid, const Tiling& tiling, const Tasks& tasks, int64_t depth, at::ScalarType products)
      : stride(transposed_stride(grid, tiling)), columns(round_up(tasks.block_panels * PackedWeights::kPanel, kLanes)),
        pairs(0) {
    if (products != at::kFloat) {
      const int64_t rows = tiling.band ? (tiling.rows + tiling.window_h - 1) * grid.w : tiling.rows;
      const int64_t taps = tiling.band ? tiling.window_w : std::min(tiling.chunk_taps, static_cast<int64_t>(grid.taps.size()));
      pairs = round_up(rows, 2) * taps * depth;
    }
  }

  template <typename P>
  int64_t floats() const {
    return 2 * columns + floats_of<P>(columns * stride) + 2 * round_up(floats_of<P>(pairs), kLanes);
  }
};

template <typename T, typename P>
struct JointEpilogue : DgradEpilogue<T> {
  static constexpr bool kSecondProduct = true;
  const WgradSum* dw;
  JointScratch sizes;
  P* transposed = nullptr; // [columns, pixels]
  P* pairs[2] = {nullptr, nullptr}; // the right operand of 16-bit products, from an even row on and from an odd one
  bool paired[2] = {false, false};
  bool fresh = true; // nothing is accumulated yet
  bool made = false; // `transposed` is this tile's

  void begin(float* scratch, int64_t range, int64_t first, int64_t columns) {
    Arena arena(scratch + 2 * sizes.columns);
    transposed = arena.take<P>(sizes.columns * sizes.stride);
    pairs[0] = arena.take<P>(sizes.pairs);
    pairs[1] = arena.take<P>(sizes.pairs);
    made = false;
    DgradEpilogue<T>::begin(scratch, range, first, columns);
  }

  // The rows of dy as the right operand of a product, and its row stride.
  std::pair<const P*, int64_t> right(const Operand<P>& dy) {
    if constexpr (std::is_same_v<P, float>) {
      return {dy.data + dy.first * dy.stride, dy.stride};
    } else {
      // Operands of a band overlap: what was paired for one serves the others that begin an even number of rows on.
      const int64_t odd = dy.first % 2;
      if (dy.first == 0) {
        paired[0] = paired[1] = false;
      }
      if (!paired[odd]) {
        common_loops().interleave(
            bits(dy.data + odd * dy.stride), dy.stride, dy.all_rows - odd, dy.columns, bits(pairs[odd]));
        paired[odd] = true;
      }
      return {pairs[odd] + (dy.first - odd) * dy.columns, dy.columns};
    }
  }

  void operand(const Operand<P>& dy, const std::vector<Run>& runs) {
    if (!made) {
      for (const Run& run : runs) {
        operands<T, P>().activate_transposed(
            this->x + run.dst_pixel * this->channels + this->first, run.dst_step * this->channels, run.count,
            this->columns, from_channel(this->bn, this->first), transposed + run.row,
            sizes.stride);
      }
      if (!std::is_same_v<P, float> && dy.rows % 2 != 0) {
        for (int64_t c = 0; c < this->columns; c++) {
          transposed[c * sizes.stride + dy.rows] = P(0); // the other half of the last pair
        }
      }
      made = true;
    }
    const auto [rows, stride] = right(dy);
    const int64_t count = std::is_same_v<P, float> ? dy.rows : round_up(dy.rows, 2);
    float* out = dw->row(this->range, this->first) + dy.tap * dw->depth;
    for (int64_t c = 0; c < dy.columns; c += PackedWeights::kPanel) {
      gemm<P>(
          this->columns, std::min(PackedWeights::kPanel, dy.columns - c), count, transposed, sizes.stride,
          rows + right_column<P>(c), stride, out + c, dw->width, !fresh);
    }
  }

  void end(int64_t rows) {
    fresh = false;
    DgradEpilogue<T>::end(rows);
  }
};

// The BN behind the convolution, whose backward makes dy: see `pending` in fused_preact/reference.py.
struct Behind {
  Tensor y, mean, scale, rstd, sum_g, sum_gx;
  bool batch; // it normalised with the statistics of the batch; else the sums are not read

  explicit Behind(at::TensorList pending) {
    TORCH_CHECK_VALUE(
        pending.size() == 4 || pending.size() == 6, "conv_backward: pending has ", pending.size(),
        " tensors, allowed are 0, 4 (y, mean, scale, rstd) and 6 (and sum_g, sum_gx)");
    batch = pending.size() == 6;
    y = pending[0];
    mean = pending[1];
    scale = pending[2];
    rstd = pending[3];
    sum_g = pending[batch ? 4 : 1];
    sum_gx = pending[batch ? 5 : 1];
  }

  Tensor applied(const Tensor& g) const {
    return bn_backward_apply(g, y, mean, scale, rstd, sum_g, sum_gx, batch, std::nullopt);
  }
};

// Whether one pass serves both products. With 4 MiB of weights and more a block of columns whose weights and
// accumulator fit the second-level cache is so narrow that gathering dy for each costs more than a second pass over it:
// ResNet-50's 1x1 512 -> 2048 took 16.8 ms apart and 19.4 joint, its 3x3 of 512 channels at 7x7 41.6 and 45.3.
bool takes_one_pass(const Tensor& weight, bool weight_grad) {
  return weight_grad && weight.numel() < (1 << 20);
}

// dgamma = r sum g (x - mu).
Tensor dgamma(const Tensor& rstd_, const Tensor& sum_gx) {
  const Tensor rstd = floats(rstd_), out = at::empty_like(sum_gx);
  const float *r = pointer(rstd), *s = pointer(sum_gx);
  float* to = out.mutable_data_ptr<float>();
  for (int64_t c = 0; c < out.numel(); c++) {
    to[c] = r[c] * s[c];
  }
  return out;
}

// The operations that this one joins, one after the other.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> one_by_one(
    const Tensor& dy_, at::TensorList pending, const Tensor& weight, const Tensor& x, at::TensorList bn,
    const OptionalTensor& da, const OptionalTensor& residual_grad, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool training, bool apply, bool weight_grad, bool relu) {
  const Tensor dy = pending.empty() ? dy_ : Behind(pending).applied(dy_);
  const Tensor dweight = weight_grad
      ? conv_wgrad(dy, x, bn[0], bn[1], weight, stride, padding, dilation, groups, relu)
      : at::empty({0}, weight.options());
  auto [g, sum_g, sum_gx] =
      conv_dgrad(dy, weight, x, bn[0], bn[1], bn[2], da, stride, padding, dilation, groups, relu);
  if (apply) {
    g = bn_backward_apply(g, x, bn[2], bn[0], bn[3], sum_g, sum_gx, training, residual_grad);
  }
  return {g, sum_g, sum_gx, dweight, dgamma(bn[3], sum_gx)};
}

} // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_backward(
    const Tensor& dy_, at::TensorList pending, const Tensor& weight, const Tensor& x_, at::TensorList bn,
    const OptionalTensor& da_, const OptionalTensor& residual_grad, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool training, bool apply, bool weight_grad, bool relu) {
  const auto dtype = x_.scalar_type();
  const auto of_dtype = [&](const OptionalTensor& t) { return !t.has_value() || t->scalar_type() == dtype; };
  const bool same_dtype = of_dtype(weight) && of_dtype(dy_) && of_dtype(da_) && of_dtype(residual_grad) &&
      (pending.empty() || of_dtype(pending[0]));
  if (!served(x_) || !served(dy_) || !same_dtype) {
    return call_reference<decltype(conv_backward)>(
        "fused_preact::conv_backward", dy_, pending, weight, x_, bn, da_, residual_grad, stride, padding, dilation,
        groups, training, apply, weight_grad, relu);
  }
  if (takes_split_path(x_, weight, stride, groups) || !takes_one_pass(weight, weight_grad)) {
    return one_by_one(
        dy_, pending, weight, x_, bn, da_, residual_grad, stride, padding, dilation, groups, training, apply,
        weight_grad, relu);
  }
  const Tensor dy = nhwc(dy_), x = nhwc(x_);
  const OptionalTensor da = nhwc(da_);
  const Tensor scale = floats(bn[0]), shift = floats(bn[1]), mean = floats(bn[2]);
  const ConvShape shape(x.sizes(), weight.sizes(), stride, padding, dilation);
  const Tensor g = empty_nhwc(x.sizes(), x);
  Tensor y, y_mean;
  std::optional<Coefficients> on_load;
  if (!pending.empty()) {
    const Behind behind(pending);
    y = nhwc(behind.y);
    y_mean = floats(behind.mean);
    on_load.emplace(
        behind.scale, behind.rstd, behind.sum_g, behind.sum_gx, y.numel() / shape.k, behind.batch);
  }
  const at::ScalarType products = product_type(dtype);
  PartSums sum_g(at::get_num_threads(), shape.c), sum_gx(at::get_num_threads(), shape.c);
  // Zeros where a tap reaches no pixel at all.
  const Tensor dw = at::zeros({shape.k, shape.r * shape.s, shape.c}, at::kFloat);
  for (const Grid& grid : shape.backward_grids()) {
    const PackedWeights packed = pack_backward(weight, grid, products);
    const Tiling tiling(grid, packed.depth);
    const Tasks tasks(packed, tiling, shape.n * shape.oh * shape.ow * packed.depth);
    const WgradSum sum(packed, tasks.ranges);
    const JointScratch scratch(grid, tiling, tasks, packed.depth, products);
    FUSED_PREACT_DISPATCH(dtype, "conv_backward", [&] {
      Source<scalar_t> source{dy.const_data_ptr<scalar_t>(), shape.k};
      if (on_load.has_value()) {
        const scalar_t* behind = on_load->b() == nullptr ? nullptr : y.const_data_ptr<scalar_t>();
        source.pending = {behind, on_load->a(), on_load->b(), on_load->c(), pointer(y_mean)};
      }
      with_product_type<scalar_t>(products, [&](auto product) {
        using product_t = decltype(product);
        const JointEpilogue<scalar_t, product_t> epilogue{
            {x.const_data_ptr<scalar_t>(), data<scalar_t>(da), g.mutable_data_ptr<scalar_t>(), shape.c,
             Affine{pointer(scale), pointer(shift), floor_of(relu)}, pointer(mean), &sum_g, &sum_gx},
            &sum, scratch};
        run_tiles<scalar_t, product_t>(
            grid, source, packed, tiling, tasks, scratch.template floats<product_t>(), epilogue);
      });
    });
    sum.finish(grid, dw);
  }
  const Tensor sums_g = sum_g.finish(), sums_gx = sum_gx.finish();
  if (apply) {
    // Over g itself, which nobody else has: its pages are there.
    const Coefficients k(scale, bn[3], sums_g, sums_gx, x.numel() / shape.c, training);
    apply_into(g, x, mean, k, nhwc(residual_grad), g);
  }
  const Tensor dweight = dw.view({shape.k, shape.r, shape.s, shape.c}).permute({0, 3, 1, 2});
  const bool as_it_is = dtype == at::kFloat && dweight.strides() == weight.strides();
  return {
      like_input(g, x_), sums_g, sums_gx, as_it_is ? dweight : at::empty_like(weight).copy_(dweight),
      dgamma(bn[3], sums_gx)};
}

TORCH_LIBRARY_IMPL(fused_preact, CPU, m) {
  m.impl("conv_backward", conv_backward);
}

} // namespace fused_preact
