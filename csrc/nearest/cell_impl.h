// The 64 colours of a cell of the table, in float64: loops that compilers turn into vectors of the instruction set.

inline uint64_t fill_cell(const Candidates& box, const double* const* axes, uint16_t* answers) {
  constexpr int kSize = 64;
  double best[kSize], second[kSize], winner[kSize];
  for (int at = 0; at < kSize; ++at) best[at] = second[at] = std::numeric_limits<double>::infinity(), winner[at] = 0;
  const size_t n = box.index.size();
  const double *const xs = box.at[0].data(), *const ys = box.at[1].data(), *const zs = box.at[2].data();
  for (size_t c = 0; c < n; ++c) {
    double plane[16];  // of the last two axes
    const double y = ys[c], z = zs[c], index = box.index[c];
    for (int at = 0; at < 16; ++at) {
      const double v = axes[1][at / 4] - y, w = axes[2][at % 4] - z;
      plane[at] = v * v + w * w;
    }
    for (int r = 0; r < 4; ++r) {
      const double u = axes[0][r] - xs[c], first = u * u;
      for (int at = 0; at < 16; ++at) {
        const double d2 = first + plane[at];
        double &low = best[16 * r + at], &next = second[16 * r + at], &who = winner[16 * r + at];
        const double old = low, above = d2 > old ? d2 : old;
        next = next < above ? next : above;
        who = d2 < old ? index : who;
        low = d2 < old ? d2 : old;
      }
    }
  }
  uint64_t close = 0;
  for (int at = 0; at < kSize; ++at) {
    close |= uint64_t(second[at] - best[at] <= 1e-14 * second[at]) << at;
    answers[at] = uint16_t(int(winner[at]));
  }
  return close;
}
