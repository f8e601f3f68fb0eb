// Python face of the CPU engine: checks arrays, lets go of the GIL, calls csrc/engine.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "fastigpt/decode.h"
#include "fastigpt/isa.h"
#include "fastigpt/threads.h"
#include "operators/kernels.h"

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
      throw std::invalid_argument(text(name, "must be from " + std::to_string(low) + " to " + std::to_string(high - 1) +
                                                 ", found " + std::to_string(p[i])));
}

// Which of the two names this is.
bool second(const char* what, const std::string& name, const char* one, const char* two) {
  if (name != one && name != two)
    throw std::invalid_argument(text(what, std::string("must be ") + one + " or " + two + ", not '" + name + "'"));
  return name == two;
}

std::shared_ptr<CpuModel> make_model(int n_layer, int n_head, int n_kv_head, int head_dim, int width, int n_inner,
                                     int n_positions, int columns, int n_tokens, int n_prefix_tokens, int prefix_length,
                                     float epsilon, const std::string& positions, const std::string& mlp,
                                     std::optional<int> head_inner, const std::string& weights,
                                     const std::string& cache, const std::string& isa, int threads) {
  ModelShape shape{n_layer,     n_head,   n_kv_head,       head_dim,      width,  n_inner,
                   n_positions, n_tokens, n_prefix_tokens, prefix_length, epsilon};
  shape.columns = columns;
  shape.positions = second("positions", positions, "learned", "rotary") ? Positions::rotary : Positions::learned;
  shape.mlp = second("mlp", mlp, "quick_gelu", "gated_silu") ? Mlp::gated_silu : Mlp::quick_gelu;
  shape.head_inner = head_inner.value_or(0);
  for (int size : {n_layer, n_head, n_kv_head, head_dim, width, n_inner, n_positions, columns, n_tokens,
                   n_prefix_tokens, prefix_length, head_inner.value_or(1)})
    if (size < 1 || size > (1 << 24))
      throw std::invalid_argument("model sizes must be from 1 to 2^24, found " + std::to_string(size));
  if (int64_t(n_head) * head_dim > (1 << 24)) throw std::invalid_argument("n_head · head_dim must be at most 2^24");
  if (n_head % n_kv_head) throw std::invalid_argument("n_kv_head must divide n_head");
  if (shape.positions == Positions::rotary && head_dim % 2)
    throw std::invalid_argument("head_dim must be even where positions are rotary, not " + std::to_string(head_dim));
  if (threads < 1 || threads > kMaxThreads)
    throw std::invalid_argument("threads must be from 1 to " + std::to_string(kMaxThreads) + ", found " +
                                std::to_string(threads));
  return std::make_shared<CpuModel>(shape, parse_dtype("weights", weights), parse_dtype("cache", cache), parse_isa(isa),
                                    threads);
}

// A float32 is finite, or a bfloat16's bits, if not all bits of the exponent are set.
template <class Bits>
bool all_finite(const void* data, size_t count, Bits exponent) {
  const auto bytes = static_cast<const uint8_t*>(data);
  bool finite = true;
  for (size_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, bytes + i * sizeof bits, sizeof bits);
    finite &= (bits & exponent) != exponent;
  }
  return finite;
}

void load(CpuModel& model, const std::string& name, const py::array& tensor) {
  const bool half = py::isinstance<py::array_t<uint16_t>>(tensor);
  if (!half && !py::isinstance<py::array_t<float>>(tensor))
    throw py::type_error(name + " must be float32, or bfloat16 as uint16");
  if (!(tensor.flags() & py::array::c_style)) throw std::invalid_argument(name + " must be contiguous");
  const void* data = tensor.data();
  const size_t count = size_t(tensor.size());
  // Whoever is the last to hold the numbers may be a session, without the GIL.
  const std::shared_ptr<const void> owner(new py::object(tensor), [](const void* held) {
    py::gil_scoped_acquire gil;
    delete static_cast<const py::object*>(held);
  });
  py::gil_scoped_release release;
  if (!(half ? all_finite(data, count, uint16_t(0x7f80)) : all_finite(data, count, uint32_t(0x7f800000))))
    throw std::invalid_argument(name + " holds a number that is not finite");
  model.load(name, data, half ? DType::bf16 : DType::f32, count, owner);
}

Floats score(const CpuModel& model, const Ids& tokens, const Ids& prefix, int layer) {
  model.check_complete();
  const ModelShape& shape = model.shape();
  if (tokens.ndim() != 2 || tokens.shape(1) < 1 || tokens.shape(1) > shape.n_positions)
    throw std::invalid_argument("tokens must have the shape [batch, 1 to " + std::to_string(shape.n_positions) + "]");
  const py::ssize_t batch = tokens.shape(0), length = tokens.shape(1);
  check_ids("tokens", tokens, {batch, length}, 0, shape.n_tokens);
  if (prefix.ndim() != 2 || prefix.shape(1) < 1 || prefix.shape(1) > shape.prefix_length)
    throw std::invalid_argument("prefix must have the shape [batch, 1 to " + std::to_string(shape.prefix_length) + "]");
  check_ids("prefix", prefix, {batch, prefix.shape(1)}, 0, shape.n_prefix_tokens);
  if (layer < -1 || layer > shape.n_layer)
    throw std::invalid_argument("layer must be from 0 to " + std::to_string(shape.n_layer));
  Floats out({batch, length, py::ssize_t(layer < 0 ? shape.n_tokens : shape.width)});
  const int64_t *ids = tokens.data(), *before = prefix.data();
  const int prefix_length = int(prefix.shape(1));
  float* to = out.mutable_data();
  py::gil_scoped_release release;
  model.score(ids, int(batch), int(length), before, prefix_length, layer, to);
  return out;
}

// A request as Python has it; `tokens` stays alive with it.
struct PyRequest {
  Ids tokens;
  CanvasRequest canvas;
};

using Prefix = std::vector<int64_t>;

void check_prefix(const char* name, const Prefix& ids, const ModelShape& shape) {
  if (ids.empty() || ids.size() > size_t(shape.prefix_length))
    throw std::invalid_argument(text(
        name, "must have 1 to " + std::to_string(shape.prefix_length) + " ids, not " + std::to_string(ids.size())));
  for (int64_t id : ids)
    if (id < 0 || id >= shape.n_prefix_tokens)
      throw std::invalid_argument(text(
          name, "must be from 0 to " + std::to_string(shape.n_prefix_tokens - 1) + ", found " + std::to_string(id)));
}

// A session together with the models it runs on.
struct PySession {
  PySession(std::shared_ptr<CpuModel> model, int capacity, int window, std::shared_ptr<CpuModel> draft,
            Prefix draft_prefix)
      : model(std::move(model)), draft(std::move(draft)),
        session(*this->model, capacity, window, this->draft.get(), std::move(draft_prefix)) {}
  PySession(std::shared_ptr<CpuModel> model, int n, int position, int window)
      : model(std::move(model)), session(*this->model, n, position, window) {}
  std::shared_ptr<CpuModel> model, draft;
  Session session;

  CanvasRequest request(const Ids& tokens, uint64_t index, uint64_t seed, double temperature, int top_k, double top_p,
                        std::optional<double> guidance_scale, const Prefix& prefix, const Prefix& negative, int stop,
                        bool score) const {
    const ModelShape& shape = model->shape();
    check_ids("tokens", tokens, {shape.n_positions}, -1, shape.n_tokens);
    if (stop < 0 || stop > shape.n_positions)
      throw std::invalid_argument("stop must be from 0 to " + std::to_string(shape.n_positions));
    check_prefix("prefix", prefix, shape);
    if (guidance_scale) check_prefix("negative", negative, shape);
    if (!guidance_scale && !negative.empty()) throw std::invalid_argument("negative needs a guidance_scale");
    return {tokens.data(), index, draw_settings(seed, temperature, top_k, top_p, guidance_scale), prefix, negative,
            stop,          score};
  }
  void check_taken(int slot) const {
    if (slot < 0 || slot >= session.capacity() || !session.taken(slot))
      throw std::invalid_argument("slot " + std::to_string(slot) + " holds no canvas");
  }
};

std::unique_ptr<PySession> open_session(std::shared_ptr<CpuModel> model, int capacity, int window,
                                        std::shared_ptr<CpuModel> draft, Prefix draft_prefix) {
  model->check_complete();
  if (capacity < 1 || capacity > (1 << 20))
    throw std::invalid_argument("capacity must be from 1 to 2^20, found " + std::to_string(capacity));
  if (window < 0) throw std::invalid_argument("window must not be negative");
  if (draft) {
    draft->check_complete();
    if (draft->shape().n_positions != model->shape().n_positions || draft->shape().n_tokens != model->shape().n_tokens)
      throw std::invalid_argument("draft must have as many positions and tokens as the model");
    check_prefix("draft_prefix", draft_prefix, draft->shape());
  }
  py::gil_scoped_release release;
  return std::make_unique<PySession>(std::move(model), capacity, window, std::move(draft), std::move(draft_prefix));
}

std::unique_ptr<PySession> open_rehearsal(std::shared_ptr<CpuModel> model, int n, int position, int window) {
  model->check_complete();
  if (n < 1 || n > (1 << 20)) throw std::invalid_argument("n must be from 1 to 2^20, found " + std::to_string(n));
  const int positions = model->shape().n_positions;
  if (position < 0 || position >= positions)
    throw std::invalid_argument("position must be from 0 to " + std::to_string(positions - 1));
  if (window < 1) throw std::invalid_argument("window must be at least 1");
  py::gil_scoped_release release;
  return std::make_unique<PySession>(std::move(model), n, position, window);
}

py::tuple read(const PySession& s, const std::vector<int>& slots) {
  const py::ssize_t n = py::ssize_t(slots.size()), positions = s.model->shape().n_positions;
  Ids tokens({n, positions});
  py::array_t<bool> starts({n, positions});
  py::array_t<double> likelihood({n});
  for (py::ssize_t i = 0; i < n; ++i) {
    s.check_taken(slots[i]);
    std::copy_n(s.session.tokens(slots[i]), positions, tokens.mutable_data(i, 0));
    const uint8_t* from = s.session.pass_starts(slots[i]);
    std::transform(from, from + positions, starts.mutable_data(i, 0), [](uint8_t x) { return x != 0; });
    likelihood.mutable_data()[i] = s.session.log_likelihood(slots[i]);
  }
  return py::make_tuple(tokens, starts, likelihood);
}

}  // namespace

DrawSettings draw_settings(uint64_t seed, double temperature, int top_k, double top_p,
                           std::optional<double> guidance_scale) {
  // Arithmetic is float32's. What float32 cannot hold is for fastigpt/sampling.py to refuse or to make 0.
  const bool normal =
      temperature >= std::numeric_limits<float>::min() && temperature <= std::numeric_limits<float>::max();
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

void bind_engine(py::module_& m) {
  py::class_<CpuModel, std::shared_ptr<CpuModel>>(m, "CpuModel",
                                                  "A token-by-token image model packed for one instruction set.")
      .def(py::init(&make_model), py::kw_only(), py::arg("n_layer"), py::arg("n_head"), py::arg("n_kv_head"),
           py::arg("head_dim"), py::arg("width"), py::arg("n_inner"), py::arg("n_positions"), py::arg("columns"),
           py::arg("n_tokens"), py::arg("n_prefix_tokens"), py::arg("prefix_length"), py::arg("epsilon"),
           py::arg("positions"), py::arg("mlp"), py::arg("head_inner"), py::arg("weights"), py::arg("cache"),
           py::arg("isa"), py::arg("threads"))
      .def("load", &load, py::arg("name"), py::arg("tensor"),
           "Takes one tensor, float32 or the bits of bfloat16 in uint16. Embeddings are read where they lie.")
      .def("check_complete", &CpuModel::check_complete)
      .def("score", &score, py::arg("tokens").noconvert(), py::arg("prefix").noconvert(), py::arg("layer"),
           "Logits float32 [batch, length, n_tokens] (layer = −1), or normed hidden states after `layer` blocks.")
      .def_property_readonly("threads", &CpuModel::threads)
      .def_property_readonly("weight_bytes", &CpuModel::weight_bytes)
      .def("cache_bytes", &CpuModel::cache_bytes, py::arg("slots"));
  py::class_<PyRequest>(m, "CpuRequest", "One canvas, checked.");
  py::class_<PySession>(m, "CpuSession", "Slots with a canvas each, in the middle of being drawn.")
      .def(py::init(&open_session), py::arg("model"), py::kw_only(), py::arg("capacity"), py::arg("window"),
           py::arg("draft"), py::arg("draft_prefix"))
      .def(
          "request",
          [](const PySession& s, const Ids& tokens, uint64_t index, uint64_t seed, double temperature, int top_k,
             double top_p, std::optional<double> guidance_scale, const Prefix& prefix, const Prefix& negative, int stop,
             bool score) {
            return PyRequest{tokens, s.request(tokens, index, seed, temperature, top_k, top_p, guidance_scale, prefix,
                                               negative, stop, score)};
          },
          py::arg("tokens").noconvert(), py::kw_only(), py::arg("index"), py::arg("seed"), py::arg("temperature"),
          py::arg("top_k"), py::arg("top_p"), py::arg("guidance_scale"), py::arg("prefix"), py::arg("negative"),
          py::arg("stop"), py::arg("score"))
      .def(
          "add",
          [](PySession& s, const std::vector<const PyRequest*>& requests) {
            std::vector<CanvasRequest> canvases;
            for (const PyRequest* request : requests) canvases.push_back(request->canvas);
            py::gil_scoped_release release;
            return s.session.add(canvases);
          },
          py::arg("requests"), "Slots of these canvases.")
      .def(
          "step", [](PySession& s, double seconds) { s.session.step(seconds); }, py::arg("seconds"),
          py::call_guard<py::gil_scoped_release>(),
          "Draws for about `seconds`, or until a canvas has come as far as it may.")
      .def(
          "decided",
          [](const PySession& s) {
            std::vector<std::pair<int, int>> found;
            for (int slot = 0; slot < s.session.capacity(); ++slot)
              if (s.session.taken(slot)) found.emplace_back(slot, s.session.decided(slot));
            return found;
          },
          "(slot, leading tokens that are final) of every canvas.")
      .def("read", &read, py::arg("slots"), "tokens, pass_starts, log_likelihood of these slots.")
      .def(
          "resume",
          [](PySession& s, int slot, int stop) {
            s.check_taken(slot);
            if (stop < 0 || stop > s.model->shape().n_positions)
              throw std::invalid_argument("stop must be from 0 to " + std::to_string(s.model->shape().n_positions));
            py::gil_scoped_release release;
            s.session.resume(slot, stop);
          },
          py::arg("slot"), py::arg("stop"))
      .def(
          "fork",
          [](PySession& s, int slot, const std::vector<uint64_t>& indices) {
            s.check_taken(slot);
            if (indices.empty()) throw std::invalid_argument("indices must not be empty");
            py::gil_scoped_release release;
            return s.session.fork(slot, indices);
          },
          py::arg("slot"), py::arg("indices"))
      .def(
          "remove",
          [](PySession& s, int slot) {
            s.check_taken(slot);
            s.session.remove(slot);
          },
          py::arg("slot"))
      .def_static("rehearsal", &open_rehearsal, py::arg("model"), py::kw_only(), py::arg("n"), py::arg("position"),
                  py::arg("window"),
                  "Canvases that stand at `position` on caches of made-up contents, for timing passes.")
      .def(
          "rehearse", [](PySession& s) { s.session.rehearse(); }, py::call_guard<py::gil_scoped_release>(),
          "Runs one pass of a rehearsal; the canvases stay where they are.");
  // The draw alone, for the tests of the noise contract.
  m.def(
      "cpu_draw",
      [](const Floats& scores, uint64_t seed, const Ids& index, const Ids& position, const std::string& isa) {
        if (scores.ndim() != 2 || scores.shape(1) < 1)
          throw std::invalid_argument("scores must have the shape [rows, tokens]");
        const py::ssize_t rows = scores.shape(0), n = scores.shape(1);
        check_shape("index", index, {rows});
        check_ids("position", position, {rows}, 0, int64_t(1) << 32);
        const Kernels& kernels = kernels_for(parse_isa(isa));
        std::vector<float> padded((n + 63) / 64 * 64, -std::numeric_limits<float>::infinity());
        Ids out(rows);
        for (py::ssize_t r = 0; r < rows; ++r) {
          std::copy_n(scores.data(r, 0), n, padded.begin());
          out.mutable_data()[r] =
              kernels.draw(padded.data(), int(n), {seed, uint64_t(index.data()[r]), uint32_t(position.data()[r])});
        }
        return out;
      },
      py::arg("scores").noconvert(), py::arg("seed"), py::arg("index").noconvert(), py::arg("position").noconvert(),
      py::arg("isa"), "argmax(scores + noise) of each row.");
  m.def(
      "cpu_gumbel",
      [](const py::array_t<uint32_t, py::array::c_style>& bits, const std::string& isa) {
        if (bits.ndim() != 1 || bits.size() % 16) throw std::invalid_argument("bits must be one row, a multiple of 16");
        Floats out(bits.size());
        kernels_for(parse_isa(isa)).gumbel(bits.data(), out.mutable_data(), int(bits.size()));
        return out;
      },
      py::arg("bits").noconvert(), py::arg("isa"),
      "Gumbel noise in float32, as the draw approximates it before it decides.");
}

}  // namespace fastigpt
