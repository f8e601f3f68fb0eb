// Image GPT on a CPU: weights packed for one instruction set, scoring, and the loop that fills canvases. Knows pointers and
// sizes only; the caller has checked tokens, prompts and settings (every pointer's extent is stated here).
//
// Bitwise promise: logits and tokens do not depend on how many images run together, on the window, on how a prefix was
// cut or shared, or on the number of threads.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fastigpt/isa.h"

namespace fastigpt {

struct ModelShape {
  int n_layer, n_head, n_embd, n_inner, n_pixels, n_colors, n_words, prompt_length;
  float epsilon;
  int columns = 0;  // pixels in a row, which guesses make use of; 0: not known
  int head_dim() const { return n_embd / n_head; }
  int context() const { return prompt_length + n_pixels; }
};

struct ModelImpl;
struct FillImpl;

class CpuModel {
 public:
  // weights, cache: "f32", "bf16" or "i8". Throws std::invalid_argument for anything else.
  CpuModel(const ModelShape& shape, const std::string& weights, const std::string& cache, Isa isa, int threads);
  ~CpuModel();
  CpuModel(const CpuModel&) = delete;

  // Takes one tensor under its Hugging Face name, float32, `count` numbers. Throws std::invalid_argument for a name or size
  // the shape does not have. Biases may be left out.
  void load(const std::string& name, const float* data, size_t count);
  void check_complete() const;  // throws std::invalid_argument naming a tensor that was not loaded

  // tokens [batch, length] in [0, n_colors), prompt [batch, prompt_length] in [0, n_words) or null.
  // layer < 0: out = logits [batch, length, n_colors]; else the normed hidden state [batch, length, n_embd] after `layer` blocks.
  void score(const int64_t* tokens, int batch, int length, const int64_t* prompt, int layer, float* out) const;

  const ModelShape& shape() const;
  int threads() const;
  size_t weight_bytes() const;
  size_t cache_bytes(int slots) const;  // of one image with `slots` inputs, all layers

 private:
  friend class FillJob;
  std::unique_ptr<ModelImpl> impl_;
};

struct DrawSettings {
  uint64_t seed = 0;
  float temperature = 1;
  int top_k = 0;      // 0: all
  double top_p = 1;   // 1: all
  bool guided = false;
  float guidance_scale = 1;
};

// One wave of canvases; see fastigpt/engine/__init__.py, Job.
class FillJob {
 public:
  // tokens [n, n_pixels] in [−1, n_colors); index, source [n]; prompt [n, prompt_length] or null. window ≥ 1, or 0: chosen
  // from measured times. draft: a smaller model with as many pixels and colours that guesses the windows, or null. The
  // models must outlive the job.
  FillJob(const CpuModel& model, int n, const int64_t* tokens, const uint64_t* index, const int64_t* source, const int64_t* prompt,
          const DrawSettings& settings, int window, const CpuModel* draft = nullptr);
  // n images that stand at `position` < n_pixels, on caches of made-up contents: for timing passes with rehearse().
  FillJob(const CpuModel& model, int n, int position, int window);
  ~FillJob();
  FillJob(const FillJob&) = delete;

  // Works for about `seconds`, at least one pass. Returns how many leading tokens are final in every image. Throws
  // std::runtime_error if the model's logits are not numbers.
  int advance(double seconds);
  void rehearse();                    // one pass; the images stay where they are
  const int64_t* tokens() const;      // [n, n_pixels]
  const uint8_t* pass_starts() const;  // [n, n_pixels]

 private:
  std::unique_ptr<FillImpl> impl_;
};

}  // namespace fastigpt
