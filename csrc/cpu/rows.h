// What the operators on plain rows share: the names of dtypes, and their threads.
#pragma once
#include <string>

#include "fastigpt/rows.h"
#include "fastigpt/threads.h"
#include "kernels.h"

namespace fastigpt {

Number number_of(const std::string& dtype);  // throws std::invalid_argument
inline size_t bytes_of(Number number) { return number == Number::f32 ? 4 : number == Number::bf16 ? 2 : 1; }

// A pool whose threads sleep at once when they have nothing to do: between two calls the cores belong to other libraries.
ThreadPool& sleeping_pool(int threads);

// body(thread) on so many threads, or just here.
template <class Body>
void on_threads(int threads, Body& body) {
  if (threads == 1)
    body(0);
  else
    sleeping_pool(threads).run(body);
}

}  // namespace fastigpt
