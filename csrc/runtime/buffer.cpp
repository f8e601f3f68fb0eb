// Large buffers come from mmap, whose pages are zero and appear when first touched; small ones from the heap.
#include "runtime/buffer.h"

#include <cstring>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastigpt {
namespace {
constexpr std::align_val_t kLine{64};
#ifdef __linux__
constexpr size_t kHugePage = size_t(2) << 20;
#endif
}  // namespace

Buffer::Buffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
#ifdef __linux__
  if (bytes >= kHugePage) {
    // A huge page more than asked for, of which the ends are given back: mmap aligns to small pages only.
    const size_t whole = round_up(bytes, kHugePage) + kHugePage;
    void* memory = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory), aligned = round_up(start, kHugePage);
    if (aligned > start) munmap(memory, aligned - start);
    const size_t kept = round_up(bytes, kHugePage), tail = whole - (aligned - start) - kept;
    if (tail) munmap(reinterpret_cast<void*>(aligned + kept), tail);
    data_ = reinterpret_cast<void*>(aligned);
    madvise(data_, kept, MADV_HUGEPAGE);  // a wish: refused where huge pages are off
    return;
  }
#endif
  data_ = ::operator new(round_up(bytes, 64), kLine);
  std::memset(data_, 0, round_up(bytes, 64));
}

void Buffer::release() {
  if (!data_) return;
#ifdef __linux__
  if (size_ >= kHugePage) {
    munmap(data_, round_up(size_, kHugePage));
    data_ = nullptr;
    return;
  }
#endif
  ::operator delete(data_, kLine);
  data_ = nullptr;
}

}  // namespace fastigpt
