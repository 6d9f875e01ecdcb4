// unit_chain: a chain of residual units in eval mode, depth first.
//
// In eval mode images are independent, so a thread takes a few of them through the whole chain: activations stay in its
// second-level cache, and memory sees the input, the output and the weights. Wide maps go one image at a time; narrow
// ones a few together, so that a panel of weights serves enough rows. Where the number of images at a time changes,
// the images of a group are kept in a buffer. Images that do not make a whole round of the threads are computed by all
// threads together, each unit cut into rows.
#include <map>

#include "ops.h"
#include "tile_gemm.h"
#include "unit_run.h"

namespace fused_preact {

namespace {

// Rows of a product that several images are put together for.
constexpr int64_t kBlockPixels = 256;
constexpr int64_t kMostImages = 8;

// Units that are run on the same number of images at a time.
struct Segment {
  size_t begin, end;
  int64_t images;
  std::map<int64_t, std::vector<UnitPlan>> plans; // by number of images

  const UnitPlan& first() const {
    return plans.begin()->second.front();
  }
  const UnitPlan& last() const {
    return plans.begin()->second.back();
  }
  // Floats of one image before and after.
  int64_t in_floats() const {
    return first().in_floats() / first().images;
  }
  int64_t out_floats() const {
    return last().out_floats() / last().images;
  }
};

struct Sizes {
  int64_t stream = 0, operands = 0, tile = 0;

  void fit(const UnitPlan& plan) {
    stream = std::max({stream, plan.in_floats(), plan.out_floats()});
    operands = std::max(operands, plan.operand_floats());
    tile = std::max(tile, plan.tile_floats);
  }
};

std::vector<UnitPlan> plan_units(
    const Chain& chain, size_t begin, size_t end, int64_t images, int64_t h, int64_t w, int64_t tiles) {
  std::vector<UnitPlan> plans;
  for (size_t i = begin; i < end; i++) {
    plans.emplace_back(chain.units[i], images, h, w, tiles);
    h = plans.back().output().oh;
    w = plans.back().output().ow;
  }
  return plans;
}

// Segments for threads that take `count` images each.
std::vector<Segment> plan_segments(const Chain& chain, int64_t count, int64_t h, int64_t w) {
  std::vector<Segment> segments;
  std::vector<std::pair<int64_t, int64_t>> sizes;
  for (size_t i = 0; i < chain.units.size(); i++) {
    const UnitPlan one(chain.units[i], 1, h, w, 0);
    int64_t images = 1;
    while (2 * images <= std::min(kMostImages, count) && 2 * images * one.output().oh * one.output().ow <= kBlockPixels) {
      images *= 2;
    }
    if (segments.empty() || segments.back().images != images) {
      segments.push_back({i, i, images, {}});
      sizes.emplace_back(h, w);
    }
    segments.back().end = i + 1;
    h = one.output().oh;
    w = one.output().ow;
  }
  int64_t group = 1;
  for (const Segment& segment : segments) {
    group = std::max(group, segment.images);
  }
  for (size_t i = 0; i < segments.size(); i++) {
    Segment& segment = segments[i];
    for (const int64_t left : {group, count % group}) {
      for (const int64_t images : {std::min(segment.images, left), left % segment.images}) {
        if (images > 0) {
          segment.plans.try_emplace(
              images, plan_units(chain, segment.begin, segment.end, images, sizes[i].first, sizes[i].second, 0));
        }
      }
    }
  }
  return segments;
}

// Images [count][h][w][channels] to and from a stream, [h][count][w][round_up(channels)].
template <typename T>
void load(const T* from, int64_t count, int64_t h, int64_t w, int64_t channels, float* stream) {
  const int64_t depth = round_up(channels, kLanes);
  for (int64_t image = 0; image < count; image++) {
    for (int64_t row = 0; row < h; row++) {
      operands<T, float>().activate(
          from + (image * h + row) * w * channels, channels, w, channels, {nullptr, nullptr},
          stream + (row * count + image) * w * depth, depth);
    }
  }
}

template <typename T>
void unload(const float* stream, int64_t count, int64_t h, int64_t w, int64_t channels, T* to) {
  const int64_t depth = round_up(channels, kLanes);
  for (int64_t image = 0; image < count; image++) {
    for (int64_t row = 0; row < h; row++) {
      loops<T>().fprop_epilogue(
          stream + (row * count + image) * w * depth, depth, w, channels, nullptr, nullptr,
          to + (image * h + row) * w * channels, channels, Moments{}, false);
    }
  }
}

template <typename T, typename P>
class ChainRun {
 public:
  ChainRun(const Chain& chain, const float* packed, const T* x, T* y) : chain_(chain), packed_(packed), x_(x), y_(y) {}

  // Images [begin, end) on this thread.
  void depth_first(const std::vector<Segment>& segments, int64_t begin, int64_t end) const {
    Sizes sizes;
    int64_t group = 1, kept = 0;
    for (const Segment& segment : segments) {
      group = std::max(group, segment.images);
      kept = std::max(kept, segment.out_floats());
      for (const auto& [images, plans] : segment.plans) {
        for (const UnitPlan& plan : plans) {
          sizes.fit(plan);
        }
      }
    }
    kept = segments.size() > 1 ? kept * group : 0;
    Buffers buffers(sizes, 1, 2 * kept);
    float *from = buffers.extra, *to = buffers.extra + kept;
    for (int64_t first = begin; first < end; first += group) {
      const int64_t count = std::min(group, end - first);
      for (size_t i = 0; i < segments.size(); i++) {
        const Segment& segment = segments[i];
        for (int64_t at = 0; at < count; at += segment.images) {
          const int64_t images = std::min(segment.images, count - at);
          const std::vector<UnitPlan>& plans = segment.plans.at(images);
          const Level &in = plans.front().levels[0], &out = plans.back().output();
          if (i == 0) {
            load(x_ + (first + at) * in.h * in.w * in.conv->c, images, in.h, in.w, in.conv->c, buffers.in);
          } else {
            load(from + at * segment.in_floats(), images, in.h, in.w, in.conv->depth(), buffers.in);
          }
          run(plans, buffers, false);
          if (i + 1 == segments.size()) {
            unload(buffers.in, images, out.oh, out.ow, out.conv->k, y_ + (first + at) * out.oh * out.ow * out.conv->k);
          } else {
            unload(buffers.in, images, out.oh, out.ow, out.conv->width(), to + at * segment.out_floats());
          }
        }
        std::swap(from, to);
      }
    }
    gemm_release<P>();
  }

  // Images [begin, end), every unit by all threads.
  void together(int64_t begin, int64_t end, int64_t h, int64_t w) const {
    const int64_t threads = at::get_num_threads(), images = end - begin;
    const std::vector<UnitPlan> plans = plan_units(chain_, 0, chain_.units.size(), images, h, w, threads);
    Sizes sizes;
    for (const UnitPlan& plan : plans) {
      sizes.fit(plan);
    }
    Buffers buffers(sizes, threads, 0);
    const Level& out = plans.back().output();
    load(x_ + begin * h * w * chain_.channels, images, h, w, chain_.channels, buffers.in);
    run(plans, buffers, true);
    unload(buffers.in, images, out.oh, out.ow, out.conv->k, y_ + begin * out.oh * out.ow * out.conv->k);
  }

 private:
  struct Buffers {
    float *in, *out, *operands, *tile, *extra;

    Buffers(const Sizes& sizes, int64_t threads, int64_t extra_floats) {
      float* base = nullptr;
      for (int pass = 0; pass < 2; pass++) {
        Arena arena(base);
        in = arena.take(sizes.stream);
        out = arena.take(sizes.stream);
        operands = arena.take(sizes.operands);
        tile = arena.take(sizes.tile * threads);
        extra = arena.take(extra_floats);
        base = pass == 0 ? thread_scratch(arena.used()) : base;
      }
    }
  };

  // Runs the units on the stream buffers.in, where the result is afterwards.
  void run(const std::vector<UnitPlan>& plans, Buffers& buffers, bool parallel) const {
    for (const UnitPlan& plan : plans) {
      const bool in_place = plan.unit->shortcut == Shortcut::kIdentity;
      UnitRun<P> unit(
          plan, packed_, packed_ + chain_.ones, buffers.in, in_place ? buffers.in : buffers.out, buffers.operands);
      if (parallel) {
        unit.run_parallel(buffers.tile);
      } else {
        unit.run(buffers.tile);
      }
      if (!in_place) {
        std::swap(buffers.in, buffers.out);
      }
    }
  }

  const Chain& chain_;
  const float* packed_;
  const T* x_;
  T* y_;
};

} // namespace

Tensor unit_chain(const Tensor& x_, const Tensor& packed, at::IntArrayRef spec) {
  const at::ScalarType products = product_type(x_.scalar_type());
  const Chain chain(spec, products);
  TORCH_CHECK(served(x_), "x: got ", x_.toString(), " of shape ", x_.sizes(), ", allowed is a non-empty [N,C,H,W] "
              "tensor in float32, bfloat16 or float16");
  TORCH_CHECK(x_.size(1) == chain.channels, "x: got ", x_.size(1), " channels, allowed are ", chain.channels);
  TORCH_CHECK(
      packed.scalar_type() == at::kFloat && packed.is_contiguous() && packed.numel() == chain.floats,
      "packed: got ", packed.numel(), " values, allowed are the ", chain.floats, " that unit_chain_pack made for images of this dtype");
  TORCH_CHECK(!chain.units.empty(), "spec: got no units, allowed are 1 or more");
  const Tensor x = nhwc(x_);
  const int64_t n = x.size(0), h = x.size(2), w = x.size(3), threads = at::get_num_threads();
  const int64_t share = n / threads, whole = share * threads;
  const Level out = plan_units(chain, 0, chain.units.size(), 1, h, w, 0).back().output();
  const Tensor y = empty_nhwc({n, out.conv->k, out.oh, out.ow}, x);
  FUSED_PREACT_DISPATCH(x.scalar_type(), "unit_chain", [&] {
    with_product_type<scalar_t>(products, [&](auto product) {
      const ChainRun<scalar_t, decltype(product)> run(
          chain, pointer(packed), x.const_data_ptr<scalar_t>(), y.mutable_data_ptr<scalar_t>());
      if (whole > 0) {
        const std::vector<Segment> segments = plan_segments(chain, share, h, w);
        at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
          for (int64_t thread = begin; thread < end; thread++) {
            run.depth_first(segments, thread * share, (thread + 1) * share);
          }
        });
      }
      if (whole < n) {
        run.together(whole, n, h, w);
      }
    });
  });
  return like_input(y, x_);
}

TORCH_LIBRARY_FRAGMENT(fused_preact, m) {
  m.def("unit_chain(Tensor x, Tensor packed, int[] spec) -> Tensor");
}

TORCH_LIBRARY_IMPL(fused_preact, CPU, m) {
  m.impl("unit_chain", unit_chain);
}

} // namespace fused_preact
