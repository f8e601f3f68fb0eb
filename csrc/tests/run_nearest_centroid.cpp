// Runs csrc/cuda/nearest_centroid_cuda.cu on the host (csrc/cuda/host) for tests/cuda_host.py, which writes the input
// and reads the output:  run_nearest_centroid INPUT OUTPUT
//
// Input, case by case, numbers int64: 0 nearest_centroid or 1 rgb_lookup; DType; dim, dim_stride; rank, then shape and
// strides; bytes of memory, where in it the first point lies, its address modulo 16; bytes of centroids or cells, bytes
// of blocks; 1 for distances; then those bytes. Output: indices, int64 [n], and distances, float32 [n]. All memory is
// exactly as large as said, so that AddressSanitizer sees every step beside it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/host/constants.h"
#include "fastigpt/nearest_centroid.h"

namespace {

using fastigpt::DType;
using fastigpt::PointsView;

struct Bytes {
  Bytes(size_t size, size_t lead = 0) : size(size), memory(static_cast<char*>(std::malloc(lead + size)), std::free) {
    data = memory.get() + lead;
  }
  size_t size;
  std::unique_ptr<char, void (*)(void*)> memory;
  char* data;
};

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "run_nearest_centroid: %s\n", what);
  std::exit(2);
}

int64_t number(FILE* in) {
  int64_t value;
  if (std::fread(&value, sizeof value, 1, in) != 1) die("the input ends early");
  return value;
}

Bytes bytes(FILE* in, size_t size, size_t lead = 0) {
  Bytes found(size, lead);
  if (size && std::fread(found.data, size, 1, in) != 1) die("the input ends early");
  return found;
}

void run_case(int64_t kind, FILE* in, FILE* out) {
  PointsView points{};
  points.dtype = DType(number(in));
  points.dim = number(in);
  points.dim_stride = number(in);
  for (int64_t rank = number(in); rank; --rank) points.shape.push_back(number(in));
  for (size_t axis = 0; axis < points.shape.size(); ++axis) points.strides.push_back(number(in));
  const int64_t size = number(in), first = number(in), lead = number(in);
  const int64_t book_bytes = number(in), block_bytes = number(in), want_distances = number(in);
  const Bytes memory = bytes(in, size, lead), book = bytes(in, book_bytes), blocks = bytes(in, block_bytes);
  points.data = memory.data + first;

  const int64_t n = points.size();
  Bytes indices(n * 8), distances(n * 4);
  std::memset(indices.data, 0xa5, indices.size);
  std::memset(distances.data, 0xa5, distances.size);
  cuda_host::constants = {{memory.data, memory.size}, {book.data, book.size}, {blocks.data, blocks.size}};
  const auto found = reinterpret_cast<int64_t*>(indices.data);
  const char* error = kind == 0
                          ? fastigpt::nearest_centroid_cuda(
                                points, reinterpret_cast<const float*>(book.data), book_bytes / (4 * points.dim), found,
                                want_distances ? reinterpret_cast<float*>(distances.data) : nullptr, nullptr)
                          : fastigpt::rgb_lookup_cuda(points, reinterpret_cast<const uint32_t*>(book.data),
                                                      reinterpret_cast<const uint16_t*>(blocks.data), found, nullptr);
  if (error) die(error);
  std::fwrite(indices.data, 1, indices.size, out);
  std::fwrite(distances.data, 1, distances.size, out);
}

}  // namespace

int main(int argc, char** argv) {
  FILE* const in = argc == 3 ? std::fopen(argv[1], "rb") : nullptr;
  FILE* const out = argc == 3 ? std::fopen(argv[2], "wb") : nullptr;
  if (!in || !out) die("INPUT OUTPUT");
  int64_t kind;
  while (std::fread(&kind, sizeof kind, 1, in) == 1) run_case(kind, in, out);
  std::fclose(in);
  return std::fclose(out);
}
