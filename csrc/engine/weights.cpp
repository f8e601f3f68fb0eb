// How weights come in: tensors by their names in spec.py, packed for the kernels.
#include "engine/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "engine/model.h"

namespace fastigpt {
namespace {

uint16_t round_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// data: [out, in].
void pack(PackedLinear& p, const float* data, SpinningPool& pool) {
  const DType dtype = p.view.dtype;
  const int in = p.view.in, out = p.view.out, panels = p.view.panels();
  const int group = group_size(dtype), bytes = 4 / group;
  std::memset(p.data, 0, panels * p.view.panel_bytes());
  if (dtype == DType::i8) {
    p.scale = Buffer(size_t(panels) * kPanel * 4);
    p.column_sum = Buffer(size_t(panels) * kPanel * 4);
    p.view.scale = p.scale.as<float>();
    p.view.column_sum = p.column_sum.as<int32_t>();
  }
  auto weight = [&](int i, int o) { return data[size_t(o) * in + i]; };
  pool.run([&](int thread) {
    for (int panel = panels * thread / pool.size(); panel < panels * (thread + 1) / pool.size(); ++panel) {
      uint8_t* to = p.data + panel * p.view.panel_bytes();
      const int columns = std::min(kPanel, out - panel * kPanel);
      float inverse[kPanel] = {};
      if (dtype == DType::i8)
        for (int c = 0; c < columns; ++c) {
          float largest = 0;
          for (int i = 0; i < in; ++i) largest = std::max(largest, std::fabs(weight(i, panel * kPanel + c)));
          p.scale.as<float>()[panel * kPanel + c] = largest / 127.0f;
          inverse[c] = largest > 0 ? 127.0f / largest : 0.0f;
        }
      for (int i = 0; i < in; ++i)
        for (int c = 0; c < columns; ++c) {
          const float w = weight(i, panel * kPanel + c);
          uint8_t* at = to + (size_t(i / group) * kPanel + c) * 4 + (i % group) * bytes;
          if (dtype == DType::f32) {
            std::memcpy(at, &w, 4);
          } else if (dtype == DType::bf16) {
            const uint16_t half = round_bf16(w);
            std::memcpy(at, &half, 2);
          } else {
            const int8_t q = int8_t(std::nearbyint(w * inverse[c]));
            std::memcpy(at, &q, 1);
            p.column_sum.as<int32_t>()[panel * kPanel + c] += q;
          }
        }
    }
  });
  p.loaded = true;
}

// Rows padded with zeros to a multiple of 32.
Buffer pad_rows(const float* data, int rows, int width) {
  const size_t padded = round_up(width, 32);
  Buffer b(size_t(rows) * padded * sizeof(float));
  for (int r = 0; r < rows; ++r)
    std::memcpy(b.as<float>() + r * padded, data + size_t(r) * width, width * sizeof(float));
  return b;
}

}  // namespace

void CpuModel::load(const std::string& name, const float* data, size_t count) {
  ModelImpl& m = *impl_;
  const ModelShape& s = m.shape;
  auto expect = [&](size_t wanted) {
    if (count != wanted)
      throw std::invalid_argument(name + " holds " + std::to_string(count) + " numbers, expected " +
                                  std::to_string(wanted));
  };
  auto rows = [&](Buffer& to, int n, int width) {
    expect(size_t(n) * width);
    to = pad_rows(data, n, width);
  };
  auto linear = [&](PackedLinear& to, const std::string& part) {
    if (part == "weight") {
      expect(size_t(to.view.in) * to.view.out);
      return pack(to, data, m.pool);
    }
    rows(to.bias, 1, to.view.out);
    to.view.bias = to.bias.as<float>();
  };
  if (name == "prefix.embedding") return rows(m.prefix_embedding, s.n_prefix_tokens, s.width);
  if (name == "token.embedding") return rows(m.token_embedding, s.n_tokens, s.width);
  if (name == "positions") return rows(m.positions, s.context(), s.width);
  if (name == "norm") return rows(m.last_norm, 1, s.width);
  if (name == "head.weight") return linear(m.head, "weight");
  for (int i = 0; i < s.n_layer; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".";
    if (name.compare(0, block.size(), block) != 0) continue;
    LayerWeights& w = m.layers[i];
    const std::string part = name.substr(block.size());
    if (part == "norm_1") return rows(w.norm_1, 1, s.width);
    if (part == "norm_2") return rows(w.norm_2, 1, s.width);
    for (auto& [known, to] :
         {std::pair<const char*, PackedLinear*>{"qkv.", &w.qkv}, {"proj.", &w.proj}, {"fc.", &w.fc}, {"out.", &w.out}})
      for (const char* what : {"weight", "bias"})
        if (part == std::string(known) + what) return linear(*to, what);
  }
  throw std::invalid_argument("the model has no tensor " + name);
}

void CpuModel::check_complete() const {
  const ModelImpl& m = *impl_;
  auto need = [](bool there, const std::string& name) {
    if (!there) throw std::invalid_argument(name + " is missing");
  };
  need(bool(m.prefix_embedding), "prefix.embedding");
  need(bool(m.token_embedding), "token.embedding");
  need(bool(m.positions), "positions");
  need(bool(m.last_norm), "norm");
  need(m.head.loaded, "head.weight");
  for (int i = 0; i < m.shape.n_layer; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".";
    const LayerWeights& w = m.layers[i];
    need(bool(w.norm_1), block + "norm_1");
    need(bool(w.norm_2), block + "norm_2");
    need(w.qkv.loaded, block + "qkv.weight");
    need(w.proj.loaded, block + "proj.weight");
    need(w.fc.loaded, block + "fc.weight");
    need(w.out.loaded, block + "out.weight");
  }
}

}  // namespace fastigpt
