// Boxes and cells of the table of colours, in float32 and float64. Included after the vectors, as leaf_impl.h is.

// The candidates of `box` that can win somewhere within half[d] of middle[d] go to `kept`, which has room for them all
// (Candidates::keep says when they can). In loops that compilers turn into vectors of the instruction set.
inline void keep(const Candidates& box, const double* middle, const double* half, Candidates& kept) {
  const int64_t n = box.count;
  const double *x = box.at[0].data(), *y = box.at[1].data(), *z = box.at[2].data();
  double *const d2 = kept.distance.data(), *const reach = kept.reach.data();
  const double mx = middle[0], my = middle[1], mz = middle[2], hx = half[0], hy = half[1], hz = half[2];
  double least = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < n; ++i) {
    const double u = x[i] - mx, v = y[i] - my, w = z[i] - mz;
    d2[i] = u * u + v * v + w * w;
  }
  int64_t j = 0;
  for (int64_t i = 0; i < n; ++i)
    if (d2[i] < least) least = d2[i], j = i;
  const double xj = x[j], yj = y[j], zj = z[j];
  for (int64_t i = 0; i < n; ++i) {
    const double reached = hx * std::abs(x[i] - xj) + hy * std::abs(y[i] - yj) + hz * std::abs(z[i] - zj);
    reach[i] = d2[i] - least - (2 * reached + 1e-12 * (d2[i] + least));
  }
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {  // written whether it stays or not: no branch to guess
    kept.index[count] = box.index[i];
    kept.at[0][count] = x[i], kept.at[1][count] = y[i], kept.at[2][count] = z[i];
    count += !(reach[i] > 0);
  }
  kept.count = count;
}

// The nearest of a box's candidates for the 8^3 points whose coordinates are the eight of each axis, in cells of 4^3:
// answers[8][64]. close[8]: the points, one bit each, for which float32 cannot tell. Differences are taken in float64,
// so a squared distance is off by less than 3e-7 of itself, whatever the numbers.
inline void fill_box(const Candidates& box, const double* const* axes, uint16_t* answers, uint64_t* close) {
  constexpr int kSide = 8, kChunk = 16, kRow = 4, kPlane = 16, kVecs = kPlane / kLanes;
  alignas(64) float best[kSide][kRow][kPlane], second[kSide][kRow][kPlane], winner[kSide][kRow][kPlane];
  for (int i = 0; i < kSide * kRow * kPlane; ++i) {
    (&best[0][0][0])[i] = (&second[0][0][0])[i] = std::numeric_limits<float>::infinity();
    (&winner[0][0][0])[i] = 0;
  }
  for (int64_t begin = 0; begin < box.count; begin += kChunk) {
    const int n = int(std::min<int64_t>(kChunk, box.count - begin));
    float square[kChunk][3][kSide], index[kChunk];
    for (int c = 0; c < n; ++c) {
      index[c] = float(box.index[begin + c]);
      for (int d = 0; d < 3; ++d)
        for (int i = 0; i < kSide; ++i) {
          const auto t = float(axes[d][i] - box.at[d][begin + c]);
          square[c][d][i] = t * t;
        }
    }
    for (int cell = 0; cell < kSide; ++cell) {
      const int r0 = cell >> 2 << 2, g0 = (cell >> 1 & 1) << 2, b0 = (cell & 1) << 2;
      alignas(64) float plane[kChunk][kPlane];
      for (int c = 0; c < n; ++c)
        for (int at = 0; at < kPlane; ++at) plane[c][at] = square[c][1][g0 + at / 4] + square[c][2][b0 + at % 4];
      for (int r = 0; r < kRow; ++r)
        for (int v = 0; v < kVecs; ++v) {
          const int at = v * kLanes;
          Vec low = load(best[cell][r] + at), next = load(second[cell][r] + at), who = load(winner[cell][r] + at);
          for (int c = 0; c < n; ++c) {
            const Vec d2 = plus(load(plane[c] + at), broadcast(&square[c][0][r0 + r]));
            next = min(next, max(low, d2));
            who = pick_less(d2, low, broadcast(&index[c]), who);
            low = min(low, d2);
          }
          store(best[cell][r] + at, low);
          store(second[cell][r] + at, next);
          store(winner[cell][r] + at, who);
        }
    }
  }
  for (int cell = 0; cell < kSide; ++cell) {
    const float *const low = best[cell][0], *const next = second[cell][0], *const who = winner[cell][0];
    for (int at = 0; at < kRow * kPlane; ++at) answers[64 * cell + at] = uint16_t(int(who[at]));
    uint64_t undecided = 0;
    const float minus = -1, part = 1e-6f, room = 1e-30f;
    for (int at = 0; at < kRow * kPlane; at += kLanes) {
      const Vec above = load(next + at), gap = fma(load(low + at), broadcast(&minus), above);
      undecided |= uint64_t(not_above(gap, fma(above, broadcast(&part), broadcast(&room)))) << at;
    }
    close[cell] = box.count > 1 ? undecided : 0;
  }
}
