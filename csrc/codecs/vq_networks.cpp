// The networks, layer by layer: a picture that ResNet blocks add to, and what is computed beside it.
#include "fastigpt/vq_networks.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <map>
#include <stdexcept>
#include <utility>

#include "codecs/convolution.h"

namespace fastigpt {
namespace {

constexpr int kGroups = 32;  // of every norm
constexpr double kEpsilon = 1e-6;
constexpr int kQueries = 64;  // places of an attention that a thread looks at once

struct Vector {
  Buffer data;  // float32, padded with zeros to a multiple of 32
  int count = 0;
};

// What images are computed in. Fresh memory of this size would cost a sixth of the time.
struct Workplace {
  Plane x, h, shortcut;
  std::vector<Padded> rooms;
};

}  // namespace

struct VqWeights {
  DType dtype;
  const Kernels& kernels;
  std::map<std::string, Convolution> convolutions{};
  std::map<std::string, Vector> vectors{};
  std::atomic<Workplace*> idle{nullptr};  // of the last image

  ~VqWeights() { delete idle.load(); }
  template <class Body>
  void in_a_workplace(const Body& body) {
    std::unique_ptr<Workplace> place(idle.exchange(nullptr));
    if (!place) place = std::make_unique<Workplace>();
    body(*place);
    place.reset(idle.exchange(place.release()));
  }

  bool has(const std::string& name) const { return convolutions.count(name) != 0; }
  const Convolution& convolution(const std::string& name) const {
    const auto found = convolutions.find(name);
    if (found == convolutions.end()) throw std::invalid_argument(name + ".weight is missing");
    return found->second;
  }
  const float* vector(const std::string& name, int count) const {
    const auto found = vectors.find(name);
    if (found == vectors.end()) throw std::invalid_argument(name + " is missing");
    if (found->second.count != count)
      throw std::invalid_argument(name + " has " + std::to_string(found->second.count) + " numbers, not " +
                                  std::to_string(count));
    return found->second.data.as<float>();
  }
};

namespace {

// Each group of channels with mean 0 and variance 1 over the picture, then scaled and shifted by channel.
class Norm {
 public:
  Norm(const VqWeights& weights, const Plane& plane, const std::string& name)
      : plane_(plane), scale_(plane.channels), shift_(plane.channels) {
    const int channels = plane.channels, size = channels / kGroups;
    const float *weight = weights.vector(name + ".weight", channels), *bias = weights.vector(name + ".bias", channels);
    for (int group = 0; group < kGroups; ++group) {
      const int first = group * size, last = first + size;
      // Of all numbers of the group: what is far from the mean in a part, and parts that are.
      const auto over_parts = [&](const auto& add) {
        for (size_t part = 0; part < plane.places.size(); ++part) {
          const float* const sums = plane.sums.data() + part * 3 * channels;
          const double n = plane.places[part];
          for (int c = first; c < last; ++c)
            add(n, sums[c], double(sums[channels + c]), double(sums[2 * channels + c]));
        }
      };
      const double count = double(plane.height) * plane.width * size;
      double sum = 0, apart = 0;
      over_parts([&](double n, double p, double above, double) { sum += n * p + above; });
      const double mean = sum / count;
      over_parts([&](double n, double p, double above, double squares) {
        const double d = p + above / n - mean;
        apart += squares - above * above / n + n * d * d;
      });
      const double inverse = 1 / std::sqrt(std::max(0.0, apart / count) + kEpsilon);
      for (int c = first; c < last; ++c) {
        scale_[c] = float(weight[c] * inverse);
        shift_[c] = float(bias[c] - mean * weight[c] * inverse);
      }
    }
  }
  LayerInput plain() const { return {plane_, scale_.data(), shift_.data(), false}; }
  LayerInput activated() const { return {plane_, scale_.data(), shift_.data(), true}; }

 private:
  const Plane& plane_;
  std::vector<float> scale_, shift_;
};

// One image on its way.
class Run {
 public:
  Run(const VqWeights& weights, Workplace& place, int threads)
      : w_(weights), threads_(threads), x_(place.x), h_(place.h), shortcut_(place.shortcut), rooms_(place.rooms) {
    rooms_.resize(threads + 1);
  }

  void decode(const float* entries, int height, int width, int dim, float* pixels) {
    take(entries, height, width, dim);
    convolve("post_quant_conv");
    convolve("decoder.conv_in");
    middle("decoder.mid");
    levels("decoder.conv_blocks.");
    leave("decoder.norm_out", "decoder.conv_out");
    give(pixels, 3, "decoder.conv_out");
  }

  void encode(const float* pixels, int height, int width, int dim, float* latents) {
    take(pixels, height, width, 3);
    convolve("encoder.conv_in");
    levels("encoder.conv_blocks.");
    middle("encoder.mid");
    leave("encoder.norm_out", "encoder.conv_out");
    convolve("quant_conv", DType::f32);
    give(latents, dim, "quant_conv");
  }

 private:
  // x from numbers [height][width][count], and to them.
  void take(const float* numbers, int height, int width, int count) {
    const int padded = int(round_up(count, kPanel));
    x_.become(height, width, padded, DType::f32);
    for (size_t i = 0, n = size_t(height) * width; i < n; ++i) {
      float* const to = x_.data.as<float>() + i * padded;
      std::fill(std::copy_n(numbers + i * count, count, to), to + padded, 0.0f);
    }
  }
  void give(float* numbers, int count, const std::string& name) const {
    if (w_.convolution(name).out() != count) throw std::invalid_argument(name + " is of another width");
    for (size_t i = 0, n = size_t(x_.height) * x_.width; i < n; ++i)
      std::copy_n(x_.data.as<float>() + i * x_.channels, count, numbers + i * count);
  }

  // All levels, finest first or last, up to the first that there is not.
  void levels(const std::string& name) {
    for (int level = 0;; ++level) {
      const std::string here = name + std::to_string(level);
      if (!w_.has(here + ".res.0.conv1")) return;
      for (int j = 0; w_.has(here + ".res." + std::to_string(j) + ".conv1"); ++j) {
        res(here + ".res." + std::to_string(j));
        const std::string attn = here + ".attn." + std::to_string(j);
        if (w_.has(attn + ".q")) attention(attn);
      }
      for (const char* other : {".upsample.conv", ".downsample.conv"})
        if (w_.has(here + other)) convolve(here + other);
    }
  }

  void middle(const std::string& name) {
    res(name + ".0");
    attention(name + ".1");
    res(name + ".2");
  }

  void leave(const std::string& norm_name, const std::string& name) {
    const Norm norm(w_, x_, norm_name);
    apply(norm.activated(), name, h_, DType::f32, false);
    std::swap(x_, h_);
  }

  void apply(const LayerInput& input, const std::string& name, Plane& to, DType stored, bool add) {
    const Convolution& c = w_.convolution(name);
    c.apply(w_.kernels, input, w_.vector(name + ".bias", c.out()), to, stored, add, rooms_);
  }

  // x through a convolution of its own.
  void convolve(const std::string& name) { convolve(name, w_.dtype); }
  void convolve(const std::string& name, DType stored) {
    apply({x_}, name, shortcut_, stored, false);
    std::swap(x_, shortcut_);
  }

  void res(const std::string& name) {
    const Norm first(w_, x_, name + ".norm1");
    apply(first.activated(), name + ".conv1", h_, w_.dtype, false);
    if (w_.has(name + ".nin_shortcut")) convolve(name + ".nin_shortcut");
    const Norm second(w_, h_, name + ".norm2");
    apply(second.activated(), name + ".conv2", x_, w_.dtype, true);
  }

  // One head over all places.
  void attention(const std::string& name) {
    const Norm norm(w_, x_, name + ".norm");
    Plane q, k, v;
    for (auto& [part, to] : {std::pair<const char*, Plane&>{".q", q}, {".k", k}, {".v", v}})
      apply(norm.plain(), name + part, to, DType::f32, false);
    const int n = q.height * q.width, channels = q.channels, padded = int(round_up(n, kPanel));
    const auto numbers = [&](const Plane& plane, int place, int c) {
      return plane.data.as<float>()[size_t(place) * channels + c];
    };
    Buffer key_data, value_data;
    const Linear keys =
        pack_layer(key_data, n, channels, w_.dtype, threads_, [&](int place, int c) { return numbers(k, place, c); });
    const Linear values = pack_layer(value_data, channels, padded, w_.dtype, threads_,
                                     [&](int c, int place) { return place < n ? numbers(v, place, c) : 0.0f; });
    const std::vector<float> scale(channels, float(1 / std::sqrt(double(channels)))), zeros(channels, 0.0f);
    Padded& queries = rooms_.back();
    queries.become(w_.kernels, q, w_.dtype, 0, q.height);
    queries.fill(w_.kernels, {q, scale.data(), zeros.data()}, 0, q.height);
    const size_t activation_bytes = w_.kernels.activation_bytes(w_.dtype);
    h_.become(q.height, q.width, channels, DType::f32);
    const int tasks = (n + kQueries - 1) / kQueries;
    for_each_task(threads_, tasks, [&](int task, int) {
      const int first = task * kQueries, rows = std::min(kQueries, n - first);
      const Buffer scores(size_t(rows) * padded * sizeof(float)), shares(size_t(rows) * padded * activation_bytes);
      LinearOut out{};
      out.sink = Sink::store, out.floats = scores.as<float>(), out.stride = padded;
      Rows in;
      in.data = queries.at(0, first), in.stride = queries.place_bytes();
      w_.kernels.linear(keys, in, rows, 0, keys.panels(), out, nullptr);
      in.data = shares.as<>(), in.stride = padded * activation_bytes;
      w_.kernels.softmax(scores.as<float>(), rows, n, w_.dtype, in);
      out.floats = h_.data.as<float>() + size_t(first) * channels, out.stride = channels;
      w_.kernels.linear(values, in, rows, 0, values.panels(), out, nullptr);
    });
    apply({h_}, name + ".proj_out", x_, w_.dtype, true);
  }

  const VqWeights& w_;
  const int threads_;
  Plane &x_, &h_, &shortcut_;
  std::vector<Padded>& rooms_;
};

}  // namespace

VqNetworks::VqNetworks(DType dtype, Isa isa) {
  check_dtype("dtype", dtype, {DType::f32, DType::bf16});
  weights_.reset(new VqWeights{dtype, kernels_for(isa)});
}
VqNetworks::~VqNetworks() = default;

void VqNetworks::load(const std::string& name, const void* data, DType dtype, const std::vector<int64_t>& shape,
                      int threads) {
  check_dtype(name.c_str(), dtype, {DType::f32, DType::bf16});
  if (shape.size() == 4) {
    const std::string layer = name.substr(0, name.rfind(".weight"));
    const auto holds = [&](const char* part) { return layer.find(part) != std::string::npos; };
    const Sampling sampling = holds(".upsample.")     ? Sampling::up
                              : holds(".downsample.") ? Sampling::down
                                                      : Sampling::same;
    weights_->convolutions.insert_or_assign(layer, Convolution(data, dtype, int(shape[0]), int(shape[1]), int(shape[2]),
                                                               sampling, weights_->dtype, threads));
    return;
  }
  if (shape.size() != 1) throw std::invalid_argument(name + " is neither a vector nor of a convolution");
  Vector v{Buffer(round_up(size_t(shape[0]), kPanel) * sizeof(float)), int(shape[0])};
  Given{data, dtype, size_t(shape[0])}.read([&](const auto& number) {
    for (int i = 0; i < v.count; ++i) v.data.as<float>()[i] = number(i);
  });
  weights_->vectors.insert_or_assign(name, std::move(v));
}

void VqNetworks::decode(const float* entries, int height, int width, int dim, float* pixels, int threads) const {
  weights_->in_a_workplace(
      [&](Workplace& place) { Run(*weights_, place, threads).decode(entries, height, width, dim, pixels); });
}

void VqNetworks::encode(const float* pixels, int height, int width, int dim, float* latents, int threads) const {
  weights_->in_a_workplace(
      [&](Workplace& place) { Run(*weights_, place, threads).encode(pixels, height, width, dim, latents); });
}

void VqNetworks::rest() const { delete weights_->idle.exchange(nullptr); }

}  // namespace fastigpt
