// How canvases come into a session and leave it: what is read before the first unknown token, shared where canvases
// have it in common; forks; and the interface.
#include "engine/session.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace fastigpt {
namespace {

int rows_for(int capacity, int n_positions, int window) {
  const int widest = std::min(window ? window : kWidestChoice, n_positions);
  // A window and the known tokens it takes along must fit, with and without the prefix.
  return std::max({256, 2 * (widest + kKnownRun), int(std::min<int64_t>(kPassRows, int64_t(2) * capacity * widest))});
}

// One block of keys and values of every layer and head.
void copy_blocks(const KvCache& from, int from_lane, int from_slot, const KvCache& to, int to_lane, int to_slot,
                 int count, int layer) {
  for (int head = 0; head < from.n_head; ++head) {
    const HeadCache a = from.at(layer, from_lane, head), b = to.at(layer, to_lane, head);
    std::memcpy(b.k + to.shape.k_bytes(to_slot), a.k + from.shape.k_bytes(from_slot), from.shape.k_bytes(count));
    std::memcpy(b.v + to.shape.v_bytes(to_slot), a.v + from.shape.v_bytes(from_slot), from.shape.v_bytes(count));
    if (!a.k_scale) continue;
    std::memcpy(b.k_scale + to_slot, a.k_scale + from_slot, count * sizeof(float));
    std::memcpy(b.v_scale + to_slot, a.v_scale + from_slot, count * sizeof(float));
  }
}

}  // namespace

SessionImpl::SessionImpl(const ModelImpl& model, int capacity, int window)
    : model(model), capacity(capacity), n_positions(model.shape.n_positions), fixed_window(window), slots(capacity),
      tokens(size_t(capacity) * n_positions, -1), known_(tokens.size()), pass_starts(tokens.size()),
      kinds(tokens.size()), guesses(tokens.size()), guesser(model.shape.columns), turn_tuner(model.turn_statistics()),
      ws(model.shape, model.kernels, model.weights, model.cache_shape(), rows_for(capacity, n_positions, window),
         model.shape.context(), model.pool.size()),
      filters(model.pool.size(), FilterScratch(model.shape.n_tokens)), drawn(ws.rows), nats(ws.rows),
      decode{&ws, {}, {}, {}, model.shape.n_layer, true} {
  draws.reserve(ws.rows);
  decode.inputs.reserve(ws.rows);
}

// A model may read prompts that are much longer than those people write: with room for any, most of a cache would never
// be used.
KvCache& SessionImpl::cache_of(int sequence) {
  KvCache& cache = caches[sequence];
  const int wanted = int(longest[sequence]) + n_positions - 1;
  if (cache.slots >= wanted) return cache;
  KvCache larger(model.shape, model.cache, capacity, wanted);
  for (int i = 0; i < capacity; ++i)
    if (slots[i].ready && cache.memory) carry(cache, i, larger, i, sequence);
  return cache = std::move(larger);
}

// What slot `from_slot` has read before its position.
void SessionImpl::carry(const KvCache& from, int from_slot, const KvCache& to, int to_slot, int s) const {
  const Slot& slot = slots[from_slot];
  if (s >= slot.sequences) return;
  const int inputs = slot.sequence[s].offset() + slot.position - slot.sequence[s].begin;
  if (inputs <= 0) return;
  const int count = int(round_up(inputs, kKeyBlock)), threads = model.pool.size();
  model.pool.run([&](int thread) {
    for (int layer = thread; layer < model.shape.n_layer; layer += threads)
      copy_blocks(from, from_slot, 0, to, to_slot, 0, count, layer);
  });
}

std::vector<int> SessionImpl::free_slots(size_t count) const {
  std::vector<int> found;
  for (int slot = 0; slot < capacity && found.size() < count; ++slot)
    if (!slots[slot].taken) found.push_back(slot);
  if (found.size() < count)
    throw std::invalid_argument(std::to_string(count) + " canvases for " + std::to_string(found.size()) +
                                " free slots");
  return found;
}

void SessionImpl::set_limit(Slot& slot, int which) {
  slot.limit = slot.stop;
  if (slot.score) return;
  while (slot.limit > 0 && known(which, slot.limit - 1)) --slot.limit;
}

void SessionImpl::put(int which, const CanvasRequest& request) {
  Slot& slot = slots[which] = Slot{};
  slot.taken = true;
  slot.index = request.index;
  slot.settings = request.settings;
  slot.score = request.score;
  slot.stop = request.stop;
  slot.sequences = request.settings.guided ? 2 : 1;
  slot.sequence[0].prefix = request.prefix;
  slot.sequence[1].prefix = request.negative;
  for (int s = 0; s < slot.sequences; ++s) longest[s] = std::max(longest[s], slot.sequence[s].prefix.size());
  const size_t at = size_t(which) * n_positions;
  std::copy_n(request.tokens, n_positions, tokens.begin() + at);
  std::fill_n(pass_starts.begin() + at, n_positions, 0);
  for (int i = 0; i < n_positions; ++i) {
    known_[at + i] = request.tokens[i] >= 0;
    guesses[at + i] = known_[at + i] ? int32_t(request.tokens[i]) : 0;
  }
  while (slot.position < n_positions && known(which, slot.position)) ++slot.position;
  slot.scored = slot.draft_fed = slot.draft_told = slot.position;
  set_limit(slot, which);
}

// The inputs before the last decided token go into the caches; that token is fed by the first pass.
void SessionImpl::prefill(const std::vector<int>& which) {
  struct Group {
    std::vector<int64_t> ids;
    std::vector<int> members;
  };
  for (int s = 0; s < 2; ++s) {
    std::vector<Group> groups;
    std::map<std::vector<int64_t>, size_t> found;
    for (int i : which) {
      const Slot& slot = slots[i];
      if (s >= slot.sequences || !slot.working()) continue;
      const Sequence& sequence = slot.sequence[s];
      std::vector<int64_t> ids(sequence.offset() + slot.position);
      for (size_t j = 0; j < ids.size(); ++j)
        ids[j] = j < sequence.prefix.size() ? -1 - sequence.prefix[j] : tokens_of(i)[j - sequence.prefix.size()];
      if (ids.empty()) continue;
      const auto [at, isnew] = found.emplace(ids, groups.size());
      if (isnew) groups.push_back({std::move(ids), {}});
      groups[at->second].members.push_back(i);
    }
    if (groups.empty()) continue;
    KvCache& own = cache_of(s);
    std::vector<Stretch> stretches;
    std::vector<std::pair<const Sequence*, const int64_t*>> what;
    struct Tail { int slot, begin; };
    std::vector<Tail> tails;
    for (const Group& g : groups) {
      const int inputs = int(g.ids.size()), begin = inputs / kKeyBlock * kKeyBlock;
      std::shared_ptr<const SharedPrefix> shared;
      if (begin > 0) {
        const auto there = prefixes.find(g.ids);
        if (there != prefixes.end()) shared = there->second.lock();
        if (!shared && g.members.size() > 1) {
          shared = std::make_shared<const SharedPrefix>(model, g.ids);
          prefixes[g.ids] = shared;
          const Slot& first = slots[g.members[0]];
          stretches.push_back({&shared->cache, 0, nullptr, 0, 0, 0, inputs});
          what.emplace_back(&first.sequence[s], tokens_of(g.members[0]));
        }
      }
      for (int i : g.members) {
        if (shared) {
          slots[i].sequence[s].shared = shared;
          slots[i].sequence[s].begin = begin;
          if (begin < inputs) tails.push_back({i, begin});
        } else {
          stretches.push_back({&own, i, nullptr, 0, 0, 0, inputs});
          what.emplace_back(&slots[i].sequence[s], tokens_of(i));
        }
      }
    }
    read_inputs(std::move(stretches), what);
    // What is left over after the last whole block starts each canvas's own cache.
    for (const Tail& t : tails)
      for (int layer = 0; layer < model.shape.n_layer; ++layer)
        copy_blocks(slots[t.slot].sequence[s].shared->cache, 0, t.begin, own, t.slot, 0, kKeyBlock, layer);
  }
  for (int i : which) slots[i].ready = slots[i].ready || slots[i].working();
}

// Runs known inputs through the model, as many to a pass as fit. what: the sequence of each stretch, and its tokens.
void SessionImpl::read_inputs(std::vector<Stretch> stretches,
                              const std::vector<std::pair<const Sequence*, const int64_t*>>& what) {
  Pass pass{&ws, {}, {}, {}, model.shape.n_layer, false};
  size_t next = 0;
  while (next < stretches.size()) {
    pass.clear();
    for (size_t i = next; i < stretches.size() && pass.rows() < ws.rows; ++i) {
      Stretch& s = stretches[i];
      Stretch part = s;
      part.count = std::min(s.count, ws.rows - pass.rows());
      pass.add(part);
      const auto [sequence, row] = what[i];
      const int length = int(sequence->prefix.size());
      for (int slot = part.slot; slot < part.slot + part.count; ++slot)
        pass.inputs.push_back(slot < length ? model.prefix(sequence->prefix[slot], slot, length)
                                            : model.token(row[slot - length], slot - length + 1));
      s.slot += part.count;
      s.count -= part.count;
      if (s.count == 0) next = i + 1;
    }
    model.forward(pass);
  }
}

void SessionImpl::remove(int which) {
  const Slot& slot = slots[which];
  if (slot.ready && !slot.proved) clear(which, -slot.sequence[0].offset() - slot.sequence[1].offset(), slot.position);
  slots[which] = Slot{};
  for (auto at = prefixes.begin(); at != prefixes.end();)
    at = at->second.expired() ? prefixes.erase(at) : std::next(at);
  if (draft) draft->remove(which);
}

void SessionImpl::resume(int which, int stop) {
  slots[which].stop = stop;
  set_limit(slots[which], which);
  if (slots[which].working() && !slots[which].ready) prefill({which});
}

void SessionImpl::copy(int from, int to, uint64_t index) {
  slots[to] = slots[from];
  slots[to].index = index;
  for (auto* bytes : {&known_, &pass_starts, &kinds})
    std::copy_n(bytes->begin() + size_t(from) * n_positions, n_positions, bytes->begin() + size_t(to) * n_positions);
  std::copy_n(tokens_of(from), n_positions, tokens_of(to));
  std::copy_n(guesses_of(from), n_positions, guesses_of(to));
  for (int s = 0; s < 2; ++s)
    if (caches[s].memory) carry(caches[s], from, caches[s], to, s);
  if (draft) draft->copy(from, to, index);
}

// --- Session ----------------------------------------------------------------------------------------------------------

Session::Session(const CpuModel& model, int capacity, int window, const CpuModel* draft,
                 std::vector<int64_t> draft_prefix)
    : impl_(new SessionImpl(*model.impl_, capacity, window)) {
  if (!draft) return;
  const ModelShape &mine = model.shape(), &theirs = draft->shape();
  impl_->draft.reset(new SessionImpl(*draft->impl_, capacity, window ? window : kWidestChoice));
  impl_->draft_prefix = std::move(draft_prefix);
  impl_->draft_reads = mine.n_prefix_tokens == theirs.n_prefix_tokens && mine.prefix_length == theirs.prefix_length;
}

Session::Session(const CpuModel& model, int capacity, int position, int window)
    : impl_(new SessionImpl(*model.impl_, capacity, window)) {
  const size_t positions = size_t(model.shape().n_positions);
  std::vector<int64_t> tokens(positions, -1);
  std::fill_n(tokens.begin(), position, 0);
  for (int i = 0; i < capacity; ++i)
    impl_->put(i, {tokens.data(), uint64_t(i), DrawSettings{}, {0}, {}, int(positions), false});
  // 0x3c3c is a small bfloat16, 0x3c3c3c3c a small float; every page is written, or reading it would cost nothing.
  KvCache& cache = impl_->cache_of(0);
  std::memset(cache.memory.as<>(), 0x3c, cache.memory.size());
}

Session::~Session() = default;

int Session::capacity() const { return impl_->capacity; }

int Session::free_slots() const {
  return int(std::count_if(impl_->slots.begin(), impl_->slots.end(), [](const Slot& slot) { return !slot.taken; }));
}

std::vector<int> Session::add(const std::vector<CanvasRequest>& requests) {
  const std::vector<int> found = impl_->free_slots(requests.size());
  SessionImpl* draft = impl_->draft.get();
  try {
    for (size_t i = 0; i < found.size(); ++i) {
      impl_->put(found[i], requests[i]);
      if (!draft) continue;
      CanvasRequest theirs = requests[i];
      theirs.stop = impl_->n_positions;
      theirs.score = false;
      if (!impl_->draft_reads)
        theirs.prefix = impl_->draft_prefix, theirs.negative.clear(), theirs.settings.guided = false;
      draft->put(found[i], theirs);
    }
    impl_->prefill(found);
    if (draft) draft->prefill(found);
  } catch (...) {  // no memory: nobody has come
    for (int slot : found) impl_->remove(slot);
    throw;
  }
  return found;
}

void Session::remove(int slot) { impl_->remove(slot); }
void Session::resume(int slot, int stop) { impl_->resume(slot, stop); }

std::vector<int> Session::fork(int slot, const std::vector<uint64_t>& indices) {
  std::vector<int> found{slot};
  const std::vector<int> others = impl_->free_slots(indices.size() - 1);
  for (size_t i = 0; i < others.size(); ++i) impl_->copy(slot, others[i], indices[i + 1]);
  impl_->slots[slot].index = indices[0];
  if (impl_->draft) impl_->draft->slots[slot].index = indices[0];
  found.insert(found.end(), others.begin(), others.end());
  return found;
}

void Session::step(double seconds) { impl_->step(seconds); }
void Session::rehearse() { impl_->rehearse(); }
bool Session::taken(int slot) const { return impl_->slots[slot].taken; }

int Session::decided(int slot) const {
  const Slot& s = impl_->slots[slot];
  return s.position >= s.limit ? std::max(s.stop, s.position) : s.position;
}

const int64_t* Session::tokens(int slot) const { return impl_->tokens_of(slot); }
const uint8_t* Session::pass_starts(int slot) const {
  return impl_->pass_starts.data() + size_t(slot) * impl_->n_positions;
}
double Session::log_likelihood(int slot) const { return impl_->slots[slot].log_likelihood; }

}  // namespace fastigpt
