// The threads that all operators of a process share. They sleep while there is nothing to do: between two calls the
// cores belong to other libraries. (The engine's threads cannot afford that: spinning_pool.h says why.)
//
// A job is a body that takes its work piece by piece from a counter of its own, so that any number of threads finishes
// it. The caller begins at once; helpers that are free join until all is taken. Several callers' jobs run side by side.
#pragma once
#include <type_traits>

namespace fastigpt {

void share_erased(int threads, void (*body)(void*, int), void* context);

// Calls body(0) here and body(1), body(2), … on at most threads − 1 helpers, each number once and fewer where helpers
// are busy or the system refuses more threads. Returns when all that began have returned; throws what a body threw
// first.
template <class Body>
void share(int threads, Body&& body) {
  share_erased(
      threads, [](void* context, int thread) { (*static_cast<std::remove_reference_t<Body>*>(context))(thread); },
      &body);
}

}  // namespace fastigpt
