// The networks of a VQ on pictures that are no multiple of anything and that fill several strips: for the sanitizers to
// watch, every number is written, and neither threads nor what went before change a bit.
#pragma once
#include <cassert>
#include <cmath>
#include <string>
#include <vector>

#include "fastigpt/vq_networks.h"
#include "tests/noise.h"

namespace fastigpt {

// Two levels, with a shortcut between them and attention on the coarser one.
inline void load_vq(VqNetworks& networks, int dim, int latent, int coarse, int fine) {
  auto load = [&](const std::string& name, const std::vector<int64_t>& shape, float scale, float mean) {
    size_t n = 1;
    for (int64_t side : shape) n *= size_t(side);
    const auto x = noise(n, scale, mean);  // exactly as long as the tensor
    networks.load(name, x.data(), DType::f32, shape, 3);
  };
  auto conv = [&](const std::string& name, int in, int out, int size = 3) {
    load(name + ".weight", {out, in, size, size}, 1 / std::sqrt(float(in * size * size)), 0);
    load(name + ".bias", {out}, 0.1f, 0);
  };
  auto norm = [&](const std::string& name, int width) {
    load(name + ".weight", {width}, 0.1f, 1);
    load(name + ".bias", {width}, 0.1f, 0);
  };
  auto res = [&](const std::string& name, int in, int out) {
    norm(name + ".norm1", in);
    conv(name + ".conv1", in, out);
    norm(name + ".norm2", out);
    conv(name + ".conv2", out, out);
    if (in != out) conv(name + ".nin_shortcut", in, out, 1);
  };
  auto attention = [&](const std::string& name, int width) {
    norm(name + ".norm", width);
    for (const char* part : {".q", ".k", ".v", ".proj_out"}) conv(name + part, width, width, 1);
  };
  conv("post_quant_conv", dim, latent, 1);
  conv("decoder.conv_in", latent, coarse);
  res("decoder.mid.0", coarse, coarse);
  attention("decoder.mid.1", coarse);
  res("decoder.mid.2", coarse, coarse);
  res("decoder.conv_blocks.0.res.0", coarse, coarse);
  attention("decoder.conv_blocks.0.attn.0", coarse);
  conv("decoder.conv_blocks.0.upsample.conv", coarse, coarse);
  res("decoder.conv_blocks.1.res.0", coarse, fine);
  norm("decoder.norm_out", fine);
  conv("decoder.conv_out", fine, 3);
  conv("encoder.conv_in", 3, fine);
  res("encoder.conv_blocks.0.res.0", fine, fine);
  conv("encoder.conv_blocks.0.downsample.conv", fine, fine);
  res("encoder.conv_blocks.1.res.0", fine, coarse);
  attention("encoder.conv_blocks.1.attn.0", coarse);
  res("encoder.mid.0", coarse, coarse);
  attention("encoder.mid.1", coarse);
  res("encoder.mid.2", coarse, coarse);
  norm("encoder.norm_out", coarse);
  conv("encoder.conv_out", coarse, latent);
  conv("quant_conv", latent, dim, 1);
}

inline void check_vq_networks(Isa isa) {
  for (DType dtype : {DType::f32, DType::bf16}) {
    rng.seed(7);
    VqNetworks networks(dtype, isa);
    load_vq(networks, 5, 20, 64, 32);
    std::vector<std::vector<float>> first;
    const int shapes[][2] = {{1, 1}, {3, 5}, {33, 5}, {1, 203}};
    for (int threads : {1, 3, 2}) {
      size_t seen = 0;
      const auto same = [&](const std::vector<float>& found) {
        for (float x : found) assert(std::isfinite(x));
        if (threads == 1)
          first.push_back(found);
        else
          assert(found == first[seen++]);
      };
      for (const auto& [height, width] : shapes) {
        rng.seed(unsigned(height));
        const size_t n = size_t(height) * width;
        const std::vector<float> entries = noise(n * 5, 1);
        std::vector<float> pixels(n * 4 * 3, NAN), latents(n * 5, NAN);
        networks.decode(entries.data(), height, width, 5, pixels.data(), threads);
        same(pixels);
        networks.encode(pixels.data(), 2 * height, 2 * width, 5, latents.data(), threads);
        same(latents);
      }
    }
  }
}

}  // namespace fastigpt
