// unit_chain_pack: the folded weights of a chain as one buffer of panels and vectors.
#include "chain.h"

#include "tile_gemm.h"

namespace fused_preact {

namespace {

// Reads the integers of a description one after the other.
class Reader {
 public:
  explicit Reader(at::IntArrayRef spec) : spec_(spec) {}

  int64_t next() {
    TORCH_CHECK(at_ < spec_.size(), "spec: got ", spec_.size(), " integers, allowed is a whole description of a chain");
    return spec_[at_++];
  }
  bool done() const {
    return at_ == spec_.size();
  }

 private:
  at::IntArrayRef spec_;
  size_t at_ = 0;
};

} // namespace

Chain::Chain(at::IntArrayRef spec, at::ScalarType products) : ones(0), floats(0) {
  Reader in(spec);
  channels = in.next();
  int64_t widest = 0;
  const auto take = [&](int64_t count) {
    const int64_t at = floats;
    floats += round_up(count, kLanes);
    return at;
  };
  const auto place = [&](ChainConv& conv) {
    TORCH_CHECK(
        std::min({conv.c, conv.k, conv.r, conv.s, conv.stride_h, conv.stride_w, conv.dil_h, conv.dil_w}) > 0 &&
            std::min(conv.pad_h, conv.pad_w) >= 0,
        "spec: got a convolution whose sizes, strides or dilations are not positive");
    const int64_t bytes = conv.taps() * conv.depth() * conv.width() * static_cast<int64_t>(c10::elementSize(products));
    conv.weight = take(bytes / static_cast<int64_t>(sizeof(float)));
    widest = std::max({widest, conv.depth(), conv.width()});
  };
  int64_t c = channels;
  while (!in.done()) {
    ChainUnit unit{};
    const int64_t count = in.next(), input = c;
    unit.shortcut = static_cast<Shortcut>(in.next());
    const bool tail = in.next() != 0;
    TORCH_CHECK(count > 0, "spec: got a unit of ", count, " convolutions, allowed are 1 or more");
    unit.scale = take(c);
    unit.shift = take(c);
    for (int64_t i = 0; i < count; i++) {
      ChainConv conv{};
      conv.c = c;
      for (int64_t* field : {&conv.k, &conv.r, &conv.s, &conv.stride_h, &conv.stride_w, &conv.pad_h, &conv.pad_w,
                             &conv.dil_h, &conv.dil_w}) {
        *field = in.next();
      }
      place(conv);
      conv.bias = i + 1 < count ? take(conv.k) : -1;
      c = conv.k;
      unit.convs.push_back(conv);
    }
    if (unit.shortcut == Shortcut::kPadding || unit.shortcut == Shortcut::kProjection) {
      unit.projection = {input, in.next(), 1, 1, in.next(), in.next(), 0, 0, 1, 1};
      if (unit.shortcut == Shortcut::kProjection) {
        place(unit.projection);
      }
    }
    unit.tail = tail ? take(c) : -1;
    units.push_back(std::move(unit));
  }
  ones = take(widest);
}

// Tensors per unit: scale, shift, per convolution its weight and (but for the last) its bias, then the projection's
// weight and the tail bias where there are any. Weights are [K,C,R,S]. `dtype` is that of the images to come.
Tensor unit_chain_pack(at::TensorList tensors, at::IntArrayRef spec, at::ScalarType dtype) {
  const at::ScalarType products = product_type(dtype);
  const Chain chain(spec, products);
  const Tensor packed = at::empty({chain.floats}, at::kFloat);
  float* out = packed.mutable_data_ptr<float>();
  ask_for_huge_pages(out, packed.nbytes());
  std::memset(out, 0, packed.nbytes());
  size_t at = 0;
  const auto next = [&]() -> const Tensor& {
    TORCH_CHECK(at < tensors.size(), "tensors: got ", tensors.size(), ", allowed are as many as spec describes");
    return tensors[at++];
  };
  const auto vector = [&](int64_t offset, int64_t size) {
    const Tensor v = floats(next());
    TORCH_CHECK(v.numel() == size, "tensors: got a vector of ", v.numel(), ", allowed is ", size);
    std::memcpy(out + offset, pointer(v), size * sizeof(float));
  };
  const auto weight = [&](const ChainConv& conv) {
    const Tensor& w = next();
    TORCH_CHECK(
        w.sizes() == at::IntArrayRef({conv.k, conv.c, conv.r, conv.s}), "tensors: got a weight of shape ", w.sizes(),
        ", allowed is ", at::IntArrayRef({conv.k, conv.c, conv.r, conv.s}));
    const PackedWeights panels = pack_forward(w, products);
    std::memcpy(out + conv.weight, panels.buffer.const_data_ptr(), panels.buffer.nbytes());
  };
  for (const ChainUnit& unit : chain.units) {
    vector(unit.scale, unit.convs[0].c);
    vector(unit.shift, unit.convs[0].c);
    for (const ChainConv& conv : unit.convs) {
      weight(conv);
      if (conv.bias >= 0) {
        vector(conv.bias, conv.k);
      }
    }
    if (unit.shortcut == Shortcut::kProjection) {
      weight(unit.projection);
    }
    if (unit.tail >= 0) {
      vector(unit.tail, unit.convs.back().k);
    }
  }
  TORCH_CHECK(at == tensors.size(), "tensors: got ", tensors.size(), ", allowed are the ", at, " that spec describes");
  std::fill(out + chain.ones, out + chain.floats, 1.0f);
  return packed;
}

TORCH_LIBRARY_FRAGMENT(fused_preact, m) {
  m.def("unit_chain_pack(Tensor[] tensors, int[] spec, ScalarType dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(fused_preact, CPU, m) {
  m.impl("unit_chain_pack", unit_chain_pack);
}

} // namespace fused_preact
