// Outputs on huge pages, and a few large blocks kept between uses.
//
// The C library maps every block above 32 MiB anew and unmaps it when it is freed, so that each use pays for the
// kernel's zeroing of it: 10 ms and more for 51 MB (an activation of ResNet-50's first stage at batch 16), and 100 to
// 300 ms when the kernel has to compact memory for huge pages first (measured on a virtual machine; docs/cpu.md).
#include <ATen/EmptyTensor.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>

#include "common.h"

namespace fused_preact {

namespace {

constexpr size_t kLarge = 32 << 20; // the C library's greatest threshold for mapping a block of its own
constexpr size_t kKept = 256 << 20; // free blocks are kept up to this sum

struct Block {
  void* data;
  size_t size;
};

class LargeBlocks final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    auto* block = new Block(take((size + kHugePage - 1) / kHugePage * kHugePage));
    return {block->data, block, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }

  // Never destroyed: tensors may outlive static objects.
  static LargeBlocks& instance() {
    static auto* allocator = new LargeBlocks;
    return *allocator;
  }

 private:
  Block take(size_t size) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found =
          std::find_if(free_.rbegin(), free_.rend(), [&](const Block& block) { return block.size == size; });
      if (found != free_.rend()) {
        const Block block = *found;
        free_.erase(std::next(found).base());
        kept_ -= size;
        return block;
      }
    }
    void* data = std::aligned_alloc(kHugePage, size);
    if (data == nullptr) {
      throw std::bad_alloc();
    }
    ask_for_huge_pages(data, size);
    return {data, size};
  }

  static void give_back(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    LargeBlocks& self = instance();
    const std::lock_guard<std::mutex> lock(self.mutex_);
    self.free_.push_back(*block);
    self.kept_ += block->size;
    // The oldest go first: sizes that nobody asks for any more.
    while (self.kept_ > kKept) {
      std::free(self.free_.front().data);
      self.kept_ -= self.free_.front().size;
      self.free_.erase(self.free_.begin());
    }
  }

  std::mutex mutex_;
  std::vector<Block> free_;
  size_t kept_ = 0;
};

} // namespace

void ask_for_huge_pages(void* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = (begin + bytes) / kHugePage * kHugePage;
  if (last >= first + 2 * kHugePage) {
    // Advice: where the kernel declines it, small pages serve.
    static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE));
  }
#endif
}

Tensor empty_nhwc(at::IntArrayRef shape, const Tensor& like) {
  const size_t size = c10::multiply_integers(shape) * like.element_size();
  if (size > kLarge) {
    return at::detail::empty_generic(
        shape, &LargeBlocks::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU), like.scalar_type(),
        at::MemoryFormat::ChannelsLast);
  }
  Tensor out = at::empty(shape, like.options(), at::MemoryFormat::ChannelsLast);
  ask_for_huge_pages(out.mutable_data_ptr(), out.nbytes());
  return out;
}

} // namespace fused_preact
