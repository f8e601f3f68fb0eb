// Python face of the CPU engine: checks arrays, lets go of the GIL, calls csrc/cpu.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>

#include "bindings.h"
#include "fastigpt/decode.h"
#include "fastigpt/isa.h"
#include "fastigpt/threads.h"
#include "kernels.h"

namespace py = pybind11;

namespace fastigpt {
namespace {

using Ids = py::array_t<int64_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

std::string text(const char* name, const std::string& what) { return std::string(name) + " " + what; }

void check_shape(const char* name, const Ids& ids, std::initializer_list<py::ssize_t> shape) {
  bool fits = ids.ndim() == py::ssize_t(shape.size());
  std::string wanted;
  py::ssize_t axis = 0;
  for (py::ssize_t size : shape) {
    fits = fits && ids.shape(axis++) == size;
    wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  }
  if (!fits) throw std::invalid_argument(text(name, "must have the shape [" + wanted + "]"));
}

void check_ids(const char* name, const Ids& ids, std::initializer_list<py::ssize_t> shape, int64_t low, int64_t high) {
  check_shape(name, ids, shape);
  const int64_t* p = ids.data();
  for (py::ssize_t i = 0; i < ids.size(); ++i)
    if (p[i] < low || p[i] >= high)
      throw std::invalid_argument(text(name, "must be from " + std::to_string(low) + " to " + std::to_string(high - 1) + ", found " + std::to_string(p[i])));
}

std::shared_ptr<CpuModel> make_model(int n_layer, int n_head, int n_embd, int n_inner, int n_pixels, int columns, int n_colors, int n_words,
                                     int prompt_length, float epsilon, const std::string& weights, const std::string& cache,
                                     const std::string& isa, int threads) {
  const ModelShape shape{n_layer, n_head, n_embd, n_inner, n_pixels, n_colors, n_words, prompt_length, epsilon, columns};
  for (int size : {n_layer, n_head, n_embd, n_inner, n_pixels, columns, n_colors})
    if (size < 1 || size > (1 << 24)) throw std::invalid_argument("model sizes must be from 1 to 2^24, found " + std::to_string(size));
  if (n_embd % n_head) throw std::invalid_argument("n_head must divide n_embd");
  if (n_words < 0 || prompt_length < 0 || prompt_length > (1 << 24)) throw std::invalid_argument("n_words and prompt_length must not be negative");
  if (threads < 1 || threads > kMaxThreads)
    throw std::invalid_argument("threads must be from 1 to " + std::to_string(kMaxThreads) + ", found " + std::to_string(threads));
  return std::make_shared<CpuModel>(shape, weights, cache, parse_isa(isa), threads);
}

void load(CpuModel& model, const std::string& name, const Floats& tensor) {
  const float* data = tensor.data();
  const size_t count = size_t(tensor.size());
  py::gil_scoped_release release;
  for (size_t i = 0; i < count; ++i)
    if (!std::isfinite(data[i])) throw std::invalid_argument(name + " holds a number that is not finite");
  model.load(name, data, count);
}

Floats score(const CpuModel& model, const Ids& tokens, const std::optional<Ids>& prompt, int layer) {
  model.check_complete();
  const ModelShape& shape = model.shape();
  if (tokens.ndim() != 2 || tokens.shape(1) < 1 || tokens.shape(1) > shape.n_pixels)
    throw std::invalid_argument("tokens must have the shape [batch, 1 to " + std::to_string(shape.n_pixels) + "]");
  const py::ssize_t batch = tokens.shape(0), length = tokens.shape(1);
  check_ids("tokens", tokens, {batch, length}, 0, shape.n_colors);
  if (prompt) check_ids("prompt", *prompt, {batch, shape.prompt_length}, 0, shape.n_words);
  if (layer < -1 || layer > shape.n_layer) throw std::invalid_argument("layer must be from 0 to " + std::to_string(shape.n_layer));
  Floats out({batch, length, py::ssize_t(layer < 0 ? shape.n_colors : shape.n_embd)});
  const int64_t *ids = tokens.data(), *words = prompt ? prompt->data() : nullptr;
  float* to = out.mutable_data();
  py::gil_scoped_release release;
  model.score(ids, int(batch), int(length), words, layer, to);
  return out;
}

// A job together with the model it runs on.
struct Fill {
  std::shared_ptr<CpuModel> model, draft;
  int n;
  std::unique_ptr<FillJob> job;
};

std::unique_ptr<Fill> make_fill(std::shared_ptr<CpuModel> model, const Ids& tokens, const Ids& index, const Ids& source,
                                const std::optional<Ids>& prompt, uint64_t seed, double temperature, int top_k, double top_p,
                                std::optional<double> guidance_scale, int window, std::shared_ptr<CpuModel> draft) {
  model->check_complete();
  const ModelShape& shape = model->shape();
  if (tokens.ndim() != 2 || tokens.shape(0) < 1 || tokens.shape(0) > (1 << 20)) throw std::invalid_argument("tokens must have the shape [n, " + std::to_string(shape.n_pixels) + "]");
  const py::ssize_t n = tokens.shape(0);
  check_ids("tokens", tokens, {n, shape.n_pixels}, -1, shape.n_colors);
  check_shape("index", index, {n});
  check_shape("source", source, {n});
  if (prompt) check_ids("prompt", *prompt, {n, shape.prompt_length}, 0, shape.n_words);
  const DrawSettings settings = draw_settings(seed, temperature, top_k, top_p, guidance_scale);
  if (guidance_scale && !prompt) throw std::invalid_argument("guidance_scale needs a prompt");
  if (window < 0) throw std::invalid_argument("window must not be negative");
  if (draft) {
    draft->check_complete();
    if (draft->shape().n_pixels != shape.n_pixels || draft->shape().n_colors != shape.n_colors)
      throw std::invalid_argument("draft must have as many pixels and colours as the model");
  }
  const int64_t *ids = tokens.data(), *indices = index.data(), *sources = source.data(), *words = prompt ? prompt->data() : nullptr;
  py::gil_scoped_release release;
  auto fill = std::make_unique<Fill>();
  fill->n = int(n);
  fill->job = std::make_unique<FillJob>(*model, int(n), ids, reinterpret_cast<const uint64_t*>(indices), sources, words, settings, window, draft.get());
  fill->model = std::move(model);
  fill->draft = std::move(draft);
  return fill;
}

std::unique_ptr<Fill> make_rehearsal(std::shared_ptr<CpuModel> model, int n, int position, int window) {
  model->check_complete();
  if (n < 1 || n > (1 << 20)) throw std::invalid_argument("n must be from 1 to 2^20, found " + std::to_string(n));
  const int pixels = model->shape().n_pixels;
  if (position < 0 || position >= pixels) throw std::invalid_argument("position must be from 0 to " + std::to_string(pixels - 1));
  if (window < 1) throw std::invalid_argument("window must be at least 1");
  py::gil_scoped_release release;
  auto fill = std::make_unique<Fill>();
  fill->n = n;
  fill->job = std::make_unique<FillJob>(*model, n, position, window);
  fill->model = std::move(model);
  return fill;
}

}  // namespace

DrawSettings draw_settings(uint64_t seed, double temperature, int top_k, double top_p, std::optional<double> guidance_scale) {
  // Arithmetic is float32's. What float32 cannot hold is for fastigpt/sampling.py to refuse or to make 0.
  const bool normal = temperature >= std::numeric_limits<float>::min() && temperature <= std::numeric_limits<float>::max();
  if (temperature != 0 && !normal) throw std::invalid_argument("temperature must be 0, or from 1.18e-38 to 3.40e38");
  if (top_k < 0) throw std::invalid_argument("top_k must not be negative");
  if (!(top_p > 0 && top_p <= 1)) throw std::invalid_argument("top_p must be above 0 and at most 1");
  if (guidance_scale && !(std::abs(*guidance_scale) <= std::numeric_limits<float>::max()))
    throw std::invalid_argument("guidance_scale must be finite in float32");
  DrawSettings settings;
  settings.seed = seed;
  settings.temperature = float(temperature);
  settings.top_k = top_k;
  settings.top_p = top_p;
  settings.guided = guidance_scale.has_value();
  settings.guidance_scale = float(guidance_scale.value_or(1.0));
  return settings;
}

void bind_cpu_engine(py::module_& m) {
  py::class_<CpuModel, std::shared_ptr<CpuModel>>(m, "CpuModel", "An Image GPT packed for one instruction set.")
      .def(py::init(&make_model), py::kw_only(), py::arg("n_layer"), py::arg("n_head"), py::arg("n_embd"), py::arg("n_inner"),
           py::arg("n_pixels"), py::arg("columns"), py::arg("n_colors"), py::arg("n_words"), py::arg("prompt_length"), py::arg("epsilon"),
           py::arg("weights"), py::arg("cache"), py::arg("isa"), py::arg("threads"))
      .def("load", &load, py::arg("name"), py::arg("tensor").noconvert(), "Takes one tensor, float32.")
      .def("check_complete", &CpuModel::check_complete)
      .def("score", &score, py::arg("tokens").noconvert(), py::arg("prompt").noconvert(), py::arg("layer"),
           "Logits float32 [batch, length, n_colors] (layer = −1), or normed hidden states after `layer` blocks.")
      .def_property_readonly("threads", &CpuModel::threads)
      .def_property_readonly("weight_bytes", &CpuModel::weight_bytes)
      .def("cache_bytes", &CpuModel::cache_bytes, py::arg("slots"));
  py::class_<Fill>(m, "CpuFill", "One wave of canvases being filled.")
      .def(py::init(&make_fill), py::arg("model"), py::arg("tokens").noconvert(), py::arg("index").noconvert(),
           py::arg("source").noconvert(), py::arg("prompt").noconvert(), py::kw_only(), py::arg("seed"), py::arg("temperature"),
           py::arg("top_k"), py::arg("top_p"), py::arg("guidance_scale"), py::arg("window"), py::arg("draft") = nullptr)
      .def("advance", [](Fill& f, double seconds) { return f.job->advance(seconds); }, py::arg("seconds"),
           py::call_guard<py::gil_scoped_release>(),
           "Works for about `seconds`; returns how many leading tokens are final in every image.")
      .def_static("rehearsal", &make_rehearsal, py::arg("model"), py::kw_only(), py::arg("n"), py::arg("position"), py::arg("window"),
                  "Images that stand at `position` on caches of made-up contents, for timing passes.")
      .def("rehearse", [](Fill& f) { f.job->rehearse(); }, py::call_guard<py::gil_scoped_release>(),
           "Runs one pass of a rehearsal; the images stay where they are.")
      .def("tokens", [](const Fill& f) {
        Ids out({py::ssize_t(f.n), py::ssize_t(f.model->shape().n_pixels)});
        std::copy_n(f.job->tokens(), out.size(), out.mutable_data());
        return out;
      })
      .def("pass_starts", [](const Fill& f) {
        py::array_t<bool> out({py::ssize_t(f.n), py::ssize_t(f.model->shape().n_pixels)});
        for (py::ssize_t i = 0; i < out.size(); ++i) out.mutable_data()[i] = f.job->pass_starts()[i] != 0;
        return out;
      });
  // The draw alone, for the tests of the noise contract.
  m.def("cpu_draw", [](const Floats& scores, uint64_t seed, const Ids& index, const Ids& position, const std::string& isa) {
    if (scores.ndim() != 2 || scores.shape(1) < 1) throw std::invalid_argument("scores must have the shape [rows, tokens]");
    const py::ssize_t rows = scores.shape(0), n = scores.shape(1);
    check_shape("index", index, {rows});
    check_ids("position", position, {rows}, 0, int64_t(1) << 32);
    const Kernels& kernels = kernels_for(parse_isa(isa));
    std::vector<float> padded((n + 63) / 64 * 64, -std::numeric_limits<float>::infinity());
    Ids out(rows);
    for (py::ssize_t r = 0; r < rows; ++r) {
      std::copy_n(scores.data(r, 0), n, padded.begin());
      out.mutable_data()[r] = kernels.draw(padded.data(), int(n), {seed, uint64_t(index.data()[r]), uint32_t(position.data()[r])});
    }
    return out;
  }, py::arg("scores").noconvert(), py::arg("seed"), py::arg("index").noconvert(), py::arg("position").noconvert(), py::arg("isa"),
  "argmax(scores + noise) of each row.");
  m.def("cpu_gumbel", [](const py::array_t<uint32_t, py::array::c_style>& bits, const std::string& isa) {
    if (bits.ndim() != 1 || bits.size() % 16) throw std::invalid_argument("bits must be one row, a multiple of 16");
    Floats out(bits.size());
    kernels_for(parse_isa(isa)).gumbel(bits.data(), out.mutable_data(), int(bits.size()));
    return out;
  }, py::arg("bits").noconvert(), py::arg("isa"), "Gumbel noise in float32, as the draw approximates it before it decides.");
}

}  // namespace fastigpt
