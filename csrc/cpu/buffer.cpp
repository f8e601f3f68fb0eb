// Large buffers come from mmap, whose pages are zero and appear when first touched; small ones from the heap.
#include "buffer.h"

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
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    madvise(memory, bytes, MADV_HUGEPAGE);  // a wish: refused where huge pages are off
    data_ = memory;
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
    munmap(data_, size_);
    data_ = nullptr;
    return;
  }
#endif
  ::operator delete(data_, kLine);
  data_ = nullptr;
}

}  // namespace fastigpt
