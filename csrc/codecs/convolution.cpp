#include "codecs/convolution.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fastigpt {
namespace {

// Places that go through a layer at once: so many that weights are used often enough, so few that inputs stay near.
constexpr int kPlaces = 400;
// A large picture is made activations by who reads them, in the processor's cache: so many rows at a time, or some
// more.
constexpr int kRows = 4;
// Threads take strips of so many rows, more where there are enough for each: two rows of a strip's activations are made
// twice. Fewer strips than kTasks, of a small picture, share its activations, and panels are shared out as well.
constexpr int kLeastRows = 8, kMostRows = 32, kTasks = 8;

// Of the 3 weights along an axis, the first and one past the last that fall on place `tap` of two, for rows (columns)
// that are even (phase 0) or odd.
void merged(int phase, int tap, int& first, int& end) {
  first = tap == 0 ? 0 : phase == 0 ? 1 : 2;
  end = tap == 1 ? 3 : phase == 0 ? 1 : 2;
}

}  // namespace

Convolution::Convolution(const void* weight, DType stored, int out, int in, int size, Sampling sampling, DType dtype,
                         int threads)
    : dtype_(dtype), out_(out), channels_(int(round_up(in, kPanel))), size_(size),
      scale_(sampling == Sampling::up ? 2 : 1), step_(sampling == Sampling::down ? 2 : 1) {
  if (size != 3 && (size != 1 || sampling != Sampling::same))
    throw std::invalid_argument("a convolution of size " + std::to_string(size));
  const int taps = sampling == Sampling::up ? 2 : size;  // along an axis
  const Given given{weight, stored, size_t(out) * in * size * size};
  given.read([&](const auto& read) {
    for (int row = 0; row < scale_; ++row)
      for (int column = 0; column < scale_; ++column) {
        Phase phase{row, column, {}, {}};
        phase.layer = pack_layer(phase.data, out, taps * taps * channels_, dtype, threads, [&](int o, int i) {
          const int tap = i / channels_, c = i % channels_;
          if (c >= in) return 0.0f;
          int y0 = tap / taps, y1 = y0 + 1, x0 = tap % taps, x1 = x0 + 1;
          if (sampling == Sampling::up) merged(row, tap / taps, y0, y1), merged(column, tap % taps, x0, x1);
          float sum = 0;
          for (int y = y0; y < y1; ++y)
            for (int x = x0; x < x1; ++x) sum += read(((size_t(o) * in + c) * size + y) * size + x);
          return sum;
        });
        phases_.push_back(std::move(phase));
      }
  });
}

void Convolution::apply(const Kernels& kernels, const LayerInput& input, const float* bias, Plane& to, DType stored,
                        bool add, std::vector<Padded>& rooms) const {
  const Plane& from = input.plane;
  const int out = int(round_up(out_, kPanel));
  const int height = from.height * scale_ / step_, width = from.width * scale_ / step_;
  if (from.height % step_ || from.width % step_) throw std::invalid_argument("a picture of odd size is halved");
  if (from.channels != channels_) throw std::invalid_argument("a tensor of another width");
  if (add && (to.height != height || to.width != width || to.channels != out || to.dtype != stored))
    throw std::invalid_argument("tensors of different widths are added");
  if (!add) to.become(height, width, out, stored);

  const int border = size_ / 2, line = from.width + 2 * border, threads = int(rooms.size()) - 1;
  // Rows that come in: those of a band go through at once, as one run of places; where every second one does, they are
  // no run across rows.
  const int band = step_ == 2 ? 2 : std::max(1, kPlaces / line), bands = (from.height + band - 1) / band;
  const int chunk = (kRows + band - 1) / band * band;  // rows
  const int wanted = std::clamp(from.height / (4 * threads), kLeastRows, kMostRows);
  const int strip_rows = (wanted + chunk - 1) / chunk * chunk, strips = (from.height + strip_rows - 1) / strip_rows;
  const int panels = out / kPanel, shares = std::min(panels, (kTasks + strips - 1) / strips);
  to.places.clear();
  for (size_t p = 0; p < phases_.size(); ++p)
    for (int row = 0; row < from.height; row += band)
      to.places.push_back(std::min(band, from.height - row) * from.width / (step_ * step_));
  to.sums.assign(to.places.size() * 3 * out, 0.0f);

  // Places of the band at `row`, whose lines `in` holds, of one phase, through some of the panels.
  const auto compute = [&](const Padded& in, int phase_number, int row, int first, int last, const uint8_t* next) {
    const Phase& phase = phases_[phase_number];
    const int rows = std::min(band, from.height - row);
    const size_t part = size_t(phase_number) * bands + row / band;
    const size_t corner = ((size_t(row) * scale_ / step_ + phase.row) * width + phase.column) * out;
    const Picture picture{step_ == 2 ? width : line,
                          from.width / step_,
                          stored,
                          to.at(corner),
                          add ? to.at(corner) : nullptr,
                          size_t(scale_) * out,
                          size_t(scale_) * width * out,
                          to.sums.data() + part * 3 * out};
    Rows places;
    places.data = in.at(row + phase.row + step_ - 1, phase.column + step_ - 1);
    places.stride = in.place_bytes() * step_;
    places.segments = scale_ == 2 ? 2 : size_;
    places.jump = line * in.place_bytes();
    LinearOut sink{};
    sink.sink = Sink::picture, sink.picture = &picture;
    Linear layer = phase.layer;
    layer.bias = bias;
    kernels.linear(layer, places, step_ == 2 ? width : rows * line - 2 * border, first, last, sink, next);
  };

  const int phases = int(phases_.size());
  if (shares > 1) {
    Padded& whole = rooms.back();
    const int lines = from.height + 2 * border;
    whole.become(kernels, from, dtype_, border, lines);
    for_each_task(threads, lines, [&](int i, int) { whole.fill(kernels, input, i, 1); });
    for_each_task(threads, bands * shares, [&](int task, int) {
      const int share = task % shares;
      for (int p = 0; p < phases; ++p)
        compute(whole, p, task / shares * band, panels * share / shares, panels * (share + 1) / shares, nullptr);
    });
    return;
  }
  for_each_task(threads, strips, [&](int strip, int thread) {
    const int first = strip * strip_rows, last = std::min(from.height, first + strip_rows);
    Padded& some = rooms[thread];
    some.become(kernels, from, dtype_, border, chunk + 2 * border);
    int filled = first;
    for (int start = first; start < last; start += chunk) {
      const int end = std::min(last, start + chunk);
      some.slide(start, filled);
      some.fill(kernels, input, filled, end + 2 * border - filled);
      filled = end + 2 * border;
      for (int row = start; row < end; row += band)
        for (int p = 0; p < phases; ++p) {
          const int soon = row + chunk + border;
          compute(some, p, row, 0, panels,
                  p + 1 == phases && soon < from.height ? from.at(size_t(soon) * from.width * from.channels) : nullptr);
        }
    }
  });
}

}  // namespace fastigpt
