// A token-by-token image model on a CPU: weights packed for one instruction set, scoring, and sessions in which
// canvases are drawn. Knows pointers and sizes only; the caller has checked tokens, prefixes and settings (every
// pointer's extent is stated here).
//
// Bitwise promise: logits and tokens do not depend on which canvases run together, on slots, on the window, on how a
// prefix was cut or shared, or on the number of threads.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fastigpt/dtype.h"
#include "fastigpt/isa.h"

namespace fastigpt {

enum class Positions { learned, rotary };
enum class Mlp { quick_gelu, gated_silu };

// As fastigpt/spec.py has it. n_kv_head divides n_head; head_dim is even where positions are rotary.
struct ModelShape {
  int n_layer, n_head, n_kv_head, head_dim, width, n_inner, n_positions, n_tokens, n_prefix_tokens, prefix_length;
  float epsilon;
  int columns = 0;  // of the canvas, which guesses make use of; 0: not known
  Positions positions = Positions::learned;
  Mlp mlp = Mlp::quick_gelu;
  int head_inner = 0;  // 0: the head is linear
  int query_width() const { return n_head * head_dim; }
  int key_width() const { return n_kv_head * head_dim; }
  int group() const { return n_head / n_kv_head; }  // query heads that share a head of keys
  int context() const { return prefix_length + n_positions - 1; }
};

struct ModelImpl;
struct SessionImpl;

class CpuModel {
 public:
  // weights, cache: f32, bf16 or i8. Throws std::invalid_argument for anything else.
  CpuModel(const ModelShape& shape, DType weights, DType cache, Isa isa, int threads);
  ~CpuModel();
  CpuModel(const CpuModel&) = delete;

  // Takes one tensor under its name in spec.py, `count` numbers, f32 or bf16, at any address; linear weights are [out,
  // in]. owner: keeps the numbers where they are, so that embeddings are read there, which are large and read by the
  // row; null: these are copied. All else is packed. Throws std::invalid_argument for a name or size the shape does not
  // have. Biases may be left out.
  void load(const std::string& name, const void* data, DType dtype, size_t count,
            std::shared_ptr<const void> owner = nullptr);
  void check_complete() const;  // throws std::invalid_argument naming a tensor that was not loaded

  // tokens [batch, length] in [0, n_tokens), prefix [batch, prefix_length] in [0, n_prefix_tokens), 1 to
  // shape().prefix_length of them. layer < 0: out = logits [batch, length, n_tokens]; else the normed hidden state
  // [batch, length, width] after `layer` blocks.
  void score(const int64_t* tokens, int batch, int length, const int64_t* prefix, int prefix_length, int layer,
             float* out) const;

  const ModelShape& shape() const;
  int threads() const;
  size_t weight_bytes() const;
  size_t cache_bytes(int slots) const;  // of one sequence with `slots` inputs, all layers

 private:
  friend class Session;
  friend const ModelImpl& impl_of(const CpuModel& model);  // engine/model.h
  std::unique_ptr<ModelImpl> impl_;
};

struct DrawSettings {
  uint64_t seed = 0;
  float temperature = 1;
  int top_k = 0;     // 0: all
  double top_p = 1;  // 1: all
  bool guided = false;
  float guidance_scale = 1;
};

// One canvas; see fastigpt/job.py.
struct CanvasRequest {
  const int64_t* tokens;  // [n_positions] in [−1, n_tokens)
  uint64_t index;
  DrawSettings settings;
  std::vector<int64_t> prefix, negative;  // negative: if settings.guided
  int stop;                               // n_positions: all
  bool score;
};

// Slots with one canvas each; see fastigpt/engine/__init__.py. Not safe to share between threads; sessions of one model
// are.
class Session {
 public:
  // window ≥ 1, or 0: chosen from measured times. draft: a smaller model with as many positions and tokens that guesses
  // the windows, or null; draft_prefix: what it reads where its prefixes are not the model's. The models must outlive
  // the session.
  Session(const CpuModel& model, int capacity, int window, const CpuModel* draft, std::vector<int64_t> draft_prefix);
  // Every slot taken, at `position` < n_positions, on caches of made-up contents: for timing passes with rehearse().
  Session(const CpuModel& model, int capacity, int position, int window);
  ~Session();
  Session(const Session&) = delete;

  int capacity() const;
  int free_slots() const;
  // Slots of these canvases. Throws std::invalid_argument if there are too few. What is read before the first unknown
  // token is read now; what canvases have in common is read and stored once.
  std::vector<int> add(const std::vector<CanvasRequest>& requests);
  void remove(int slot);
  void resume(int slot, int stop);
  // Canvases with this one's past that go on with the noise of these indices; the first keeps the slot.
  std::vector<int> fork(int slot, const std::vector<uint64_t>& indices);
  // Draws for about `seconds`, at least one pass, or until a canvas has come as far as it may. Throws
  // std::runtime_error if the model's logits are not numbers.
  void step(double seconds);
  void rehearse();  // one pass; the canvases stay where they are

  bool taken(int slot) const;
  int decided(int slot) const;                 // leading tokens that are final
  const int64_t* tokens(int slot) const;       // [n_positions], −1 = not decided
  const uint8_t* pass_starts(int slot) const;  // [n_positions]
  double log_likelihood(int slot) const;

 private:
  std::unique_ptr<SessionImpl> impl_;
};

}  // namespace fastigpt
