// Shared memory of a block. All variables of all kernels have one place in it, given out before main; behind each, and
// behind the dynamic part, are bytes that AddressSanitizer knows nobody may touch. It is born as 0xff bytes (NaN, −1),
// or as what FASTIGPT_CUDA_BORN says (0 to 255), and no result may depend on which.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define FASTIGPT_FORBID(address, bytes) ASAN_POISON_MEMORY_REGION(address, bytes)
#define FASTIGPT_ALLOW(address, bytes) ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#else
#define FASTIGPT_FORBID(address, bytes) ((void)(address), (void)(bytes))
#define FASTIGPT_ALLOW(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace cuda_host {

struct SharedLayout {
  static constexpr size_t kAlignment = 128, kGap = 128;
  std::vector<std::pair<size_t, size_t>> variables;  // offset, bytes
  size_t end = kGap;

  size_t reserve(size_t bytes) {
    const size_t offset = end;
    variables.emplace_back(offset, bytes);
    end = (offset + bytes + kGap + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
  }
  static SharedLayout& all() {
    static SharedLayout layout;
    return layout;
  }
};

class SharedMemory {
 public:
  explicit SharedMemory(size_t dynamic_bytes)
      : dynamic_(dynamic_bytes), size_(SharedLayout::all().end + dynamic_bytes + SharedLayout::kGap),
        memory_(static_cast<unsigned char*>(std::aligned_alloc(
                    SharedLayout::kAlignment,
                    (size_ + SharedLayout::kAlignment - 1) / SharedLayout::kAlignment * SharedLayout::kAlignment)),
                std::free) {}

  // Before the block's first thread reads it and after its last thread has ended: old values are gone.
  void begin() {
    const char* born = std::getenv("FASTIGPT_CUDA_BORN");
    fill(born ? std::atoi(born) : 0xff);
    FASTIGPT_FORBID(memory_.get(), size_);
    for (const auto& [offset, bytes] : SharedLayout::all().variables) FASTIGPT_ALLOW(memory_.get() + offset, bytes);
    FASTIGPT_ALLOW(dynamic(), dynamic_);
  }
  void end() {
    fill(0xff);
    FASTIGPT_FORBID(memory_.get(), size_);
  }

  unsigned char* at(size_t offset) const { return memory_.get() + offset; }
  unsigned char* dynamic() const { return at(SharedLayout::all().end); }
  size_t dynamic_bytes() const { return dynamic_; }
  // Where `address`, in this block's shared memory, is from its start; size() or more: it is not.
  size_t offset_of(const void* address) const { return size_t(static_cast<const unsigned char*>(address) - at(0)); }
  size_t size() const { return size_; }

 private:
  void fill(int byte) {
    FASTIGPT_ALLOW(memory_.get(), size_);
    std::memset(memory_.get(), byte, size_);
  }

  size_t dynamic_, size_;
  std::unique_ptr<unsigned char, void (*)(void*)> memory_;
};

SharedMemory& shared_memory();  // of the calling thread's block

// One for each variable: Site is a type of the place where it is declared.
template <class Site, class T>
struct SharedPlace {
  static const size_t offset;
};
template <class Site, class T>
const size_t SharedPlace<Site, T>::offset = SharedLayout::all().reserve(sizeof(T));

template <class Site, class T>
T* shared_variable() {
  return reinterpret_cast<T*>(shared_memory().at(SharedPlace<Site, T>::offset));
}
template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(shared_memory().dynamic());
}

}  // namespace cuda_host
