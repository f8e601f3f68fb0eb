// Random numbers that are the same in every run.
#pragma once
#include <random>
#include <vector>

static std::mt19937 rng(7);

static std::vector<float> noise(size_t n, float scale, float mean = 0) {
  std::normal_distribution<float> normal(mean, scale);
  std::vector<float> x(n);
  for (auto& v : x) v = normal(rng);
  return x;
}
