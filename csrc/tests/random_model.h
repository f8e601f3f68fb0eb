// A model of a shape with random weights, in every way that weights can be handed over.
#pragma once
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "fastigpt/decode.h"
#include "tests/noise.h"

namespace fastigpt {

inline std::unique_ptr<CpuModel> make(const ModelShape& s, DType weights, DType cache, Isa isa, int threads) {
  rng.seed(7);
  auto model = std::make_unique<CpuModel>(s, weights, cache, isa, threads);
  const int d = s.width, f = s.n_inner, q = s.query_width(), qkv = q + 2 * s.key_width();
  const int fc = s.mlp == Mlp::gated_silu ? 2 * f : f, last = s.head_inner ? s.head_inner : d;
  int given = 0;
  auto load = [&](const std::string& name, size_t n, float scale, float mean = 0) {
    // Exactly as long as the tensor: reading past its end is seen. Some are bfloat16, some stay where they are.
    const auto x = std::make_shared<std::vector<float>>(noise(n, scale, mean));
    const auto owner = ++given % 2 ? std::shared_ptr<const void>(x) : nullptr;
    if ((given + s.n_head) % 3) return model->load(name, x->data(), DType::f32, n, owner);
    const auto half = std::make_shared<std::vector<uint16_t>>(n);
    for (size_t i = 0; i < n; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &(*x)[i], 4);
      (*half)[i] = uint16_t(bits >> 16);
    }
    model->load(name, half->data(), DType::bf16, n, owner ? std::shared_ptr<const void>(half) : nullptr);
  };
  load("prefix.embedding", size_t(s.n_prefix_tokens) * d, 0.5f);
  load("token.embedding", size_t(s.n_tokens) * d, 0.5f);
  if (s.positions == Positions::rotary)
    load("rotary", size_t(s.context()) * s.head_dim, 0.7f);
  else
    load("positions", size_t(s.context()) * d, 0.5f);
  load("norm", d, 0.1f, 1);
  if (s.head_inner) {
    load("head.fc.weight", size_t(last) * d, 1 / std::sqrt(float(d)));
    load("head.fc.bias", last, 0.1f);
    load("head.bias", s.n_tokens, 0.1f);
  }
  load("head.weight", size_t(s.n_tokens) * last, 2 / std::sqrt(float(last)));
  for (int i = 0; i < s.n_layer; ++i) {
    const std::string b = "blocks." + std::to_string(i) + ".";
    load(b + "norm_1", d, 0.1f, 1);
    load(b + "norm_2", d, 0.1f, 1);
    load(b + "qkv.weight", size_t(qkv) * d, 1 / std::sqrt(float(d)));
    load(b + "qkv.bias", qkv, 0.1f);
    load(b + "proj.weight", size_t(d) * q, 1 / std::sqrt(float(q)));
    load(b + "fc.weight", size_t(d) * fc, 1 / std::sqrt(float(d)));
    load(b + "fc.bias", fc, 0.1f);
    load(b + "out.weight", size_t(d) * f, 1 / std::sqrt(float(f)));
  }
  model->check_complete();
  return model;
}

}  // namespace fastigpt
