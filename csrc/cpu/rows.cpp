// Dtypes by name, and the pools of the operators on plain rows.
#include "rows.h"

#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

namespace fastigpt {

Number number_of(const std::string& dtype) {
  if (dtype == "float32") return Number::f32;
  if (dtype == "bfloat16") return Number::bf16;
  if (dtype == "int8") return Number::i8;
  throw std::invalid_argument("dtype " + dtype);
}

ThreadPool& sleeping_pool(int threads) {
  static std::mutex mutex;
  static std::map<int, std::unique_ptr<ThreadPool>> pools;
  std::lock_guard<std::mutex> lock(mutex);
  auto& found = pools[threads];
  if (!found) found = std::make_unique<ThreadPool>(threads, 0);
  return *found;
}

}  // namespace fastigpt
