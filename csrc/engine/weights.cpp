// How weights come in: tensors by their names in spec.py, packed for the kernels.
#include "engine/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "engine/model.h"
#include "operators/packing.h"
#include "runtime/given.h"

namespace fastigpt {
namespace {

constexpr float kSmallest = 1e-35f;  // of a row's largest weight, that int8 tells from 0: its inverse must be a number

// One panel of a layer of `dtype` whose weights are [rows, in].
template <DType dtype, class Read>
void pack_panel(PackedLinear& p, const Read& weight, int panel) {
  const int in = p.view.in;
  const int columns = std::min(kPanel, p.view.out - panel * kPanel);
  uint8_t* to = p.data + panel * p.view.panel_bytes();
  size_t row[kPanel];
  bool there[kPanel];
  float inverse[kPanel] = {};
  int32_t sum[kPanel] = {};
  for (int c = 0; c < columns; ++c) {
    const int from = p.order[panel * kPanel + c];
    there[c] = from >= 0;
    row[c] = size_t(std::max(from, 0)) * in;
    if (dtype != DType::i8 || !there[c]) continue;
    float largest = 0;
    for (int i = 0; i < in; ++i) largest = std::max(largest, std::fabs(weight(row[c] + i)));
    if (largest < kSmallest) continue;
    p.scale.as<float>()[panel * kPanel + c] = largest / 127.0f;
    inverse[c] = 127.0f / largest;
  }
  // In pieces that stay in the processor's cache: rows are read as they lie, and written across.
  constexpr int kPiece = 64;
  for (int first = 0; first < in; first += kPiece)
    for (int c = 0; c < columns; ++c) {
      if (!there[c]) continue;
      for (int i = first; i < std::min(first + kPiece, in); ++i) {
        const float w = weight(row[c] + i);
        if constexpr (dtype == DType::i8) {
          const int8_t q = int8_t(std::nearbyint(w * inverse[c]));
          std::memcpy(place_of_weight<dtype>(to, c, i), &q, 1);
          sum[c] += q;
        } else {
          put_weight<dtype>(to, c, i, w);
        }
      }
    }
  if (dtype == DType::i8) std::copy_n(sum, kPanel, p.column_sum.as<int32_t>() + panel * kPanel);
}

void pack(PackedLinear& p, const Given& given, SpinningPool& pool) {
  const int panels = p.view.panels();
  std::memset(p.data, 0, panels * p.view.panel_bytes());
  if (p.view.dtype == DType::i8) {
    p.scale = Buffer(size_t(panels) * kPanel * 4);
    p.column_sum = Buffer(size_t(panels) * kPanel * 4);
    p.view.scale = p.scale.as<float>();
    p.view.column_sum = p.column_sum.as<int32_t>();
  }
  given.read([&](const auto& weight) {
    pool.run([&](int thread) {
      const int threads = pool.size();
      for (int panel = panels * thread / threads; panel < panels * (thread + 1) / threads; ++panel) {
        if (p.view.dtype == DType::f32)
          pack_panel<DType::f32>(p, weight, panel);
        else if (p.view.dtype == DType::bf16)
          pack_panel<DType::bf16>(p, weight, panel);
        else
          pack_panel<DType::i8>(p, weight, panel);
      }
    });
  });
  p.loaded = true;
}

// One row of floats, padded with zeros to a multiple of 32.
Buffer floats(const Given& given) {
  Buffer b(round_up(given.count, 32) * sizeof(float));
  given.read([&](const auto& number) {
    for (size_t i = 0; i < given.count; ++i) b.as<float>()[i] = number(i);
  });
  return b;
}

Table table(const Given& given, size_t width, std::shared_ptr<const void> owner) {
  Table t;
  t.dtype = given.dtype;
  t.row_bytes = width * size_of(given.dtype);
  t.data = static_cast<const uint8_t*>(given.data);
  t.owner = std::move(owner);
  if (t.owner) return t;
  const size_t bytes = given.count * size_of(given.dtype);
  auto copy = std::make_shared<Buffer>(bytes);
  std::memcpy(copy->as<>(), given.data, bytes);
  t.data = copy->as<>();
  t.owner = std::move(copy);
  return t;
}

}  // namespace

std::vector<int> plain_order(int rows) {
  std::vector<int> order(rows);
  std::iota(order.begin(), order.end(), 0);
  return order;
}

std::vector<int> qkv_order(const ModelShape& s) {
  std::vector<int> order = plain_order(s.query_width() + 2 * s.key_width());
  if (s.positions == Positions::learned) return order;
  for (int head = 0; head < s.n_head + s.n_kv_head; ++head)
    for (int i = 0; i < s.head_dim; ++i)
      order[head * s.head_dim + i] = head * s.head_dim + i / 2 + i % 2 * (s.head_dim / 2);
  return order;
}

std::vector<int> fc_order(const ModelShape& s) {
  if (s.mlp == Mlp::quick_gelu) return plain_order(s.n_inner);
  constexpr int kHalf = kPanel / 2;
  std::vector<int> order(round_up(s.n_inner, kHalf) * 2, -1);
  for (int i = 0; i < s.n_inner; ++i) {
    const int gate = i / kHalf * kPanel + i % kHalf;
    order[gate] = i;
    order[gate + kHalf] = s.n_inner + i;
  }
  return order;
}

void CpuModel::load(const std::string& name, const void* data, DType dtype, size_t count,
                    std::shared_ptr<const void> owner) {
  check_dtype(name.c_str(), dtype, {DType::f32, DType::bf16});
  ModelImpl& m = *impl_;
  const ModelShape& s = m.shape;
  const Given given{data, dtype, count};
  auto expect = [&](size_t wanted) {
    if (count != wanted)
      throw std::invalid_argument(name + " holds " + std::to_string(count) + " numbers, expected " +
                                  std::to_string(wanted));
  };
  auto embedding = [&](Table& to, int rows) {
    expect(size_t(rows) * s.width);
    to = table(given, s.width, std::move(owner));
  };
  auto row = [&](Buffer& to, int width) {
    expect(width);
    to = floats(given);
  };
  auto linear = [&](PackedLinear& to, const std::string& part) {
    const size_t rows = to.order.size() - std::count(to.order.begin(), to.order.end(), -1);
    if (part == "weight") {
      expect(rows * to.view.in);
      return pack(to, given, m.pool);
    }
    expect(rows);
    to.bias = Buffer(size_t(to.view.panels()) * kPanel * sizeof(float));
    given.read([&](const auto& number) {
      for (int o = 0; o < to.view.out; ++o)
        if (to.order[o] >= 0) to.bias.as<float>()[o] = number(to.order[o]);
    });
    to.view.bias = to.bias.as<float>();
  };
  const bool rotary = s.positions == Positions::rotary;
  if (name == "prefix.embedding") return embedding(m.prefix_embedding, s.n_prefix_tokens);
  if (name == "token.embedding") return embedding(m.token_embedding, s.n_tokens);
  if (name == (rotary ? "rotary" : "positions")) {
    expect(size_t(s.context()) * m.position_width());
    m.positions = floats(given);
    return;
  }
  if (name == "norm") return row(m.last_norm, s.width);
  if (name == "head.weight") return linear(m.head, "weight");
  if (s.head_inner > 0) {
    if (name == "head.bias") return linear(m.head, "bias");
    if (name == "head.fc.weight") return linear(m.head_fc, "weight");
    if (name == "head.fc.bias") return linear(m.head_fc, "bias");
  }
  for (int i = 0; i < s.n_layer; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".";
    if (name.compare(0, block.size(), block) != 0) continue;
    LayerWeights& w = m.layers[i];
    const std::string part = name.substr(block.size());
    if (part == "norm_1") return row(w.norm_1, s.width);
    if (part == "norm_2") return row(w.norm_2, s.width);
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
  need(bool(m.positions), m.shape.positions == Positions::rotary ? "rotary" : "positions");
  need(bool(m.last_norm), "norm");
  need(m.head.loaded, "head.weight");
  need(m.head_fc.loaded || m.shape.head_inner == 0, "head.fc.weight");
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
