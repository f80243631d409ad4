// The enclosing simplex of each point: nearest remainder-0 vertex, ranks, barycentric weights. Every operation is that
// of kernels/lattice.py in the same order and rounds by itself, so that ties fall on the same side.
#include <cmath>

#include "lattice/lattice.h"
#include "simd.h"

namespace wsss {
namespace {

template <int D>
WSSS_INLINE bool simplex(const float* features, int64_t n, int64_t begin, int64_t end, int32_t* vertex, uint32_t* rank,
                         float* weight, int32_t* low, int32_t* high) {
  constexpr int C = D + 1;
  float scale[D];
  for (int i = 0; i < D; ++i) scale[i] = static_cast<float>(C * std::sqrt(2.0 / 3.0) / std::sqrt((i + 1.0) * (i + 2.0)));
  IntVec smallest[D], largest[D], inside = IntVec{} - 1;
  for (int i = 0; i < D; ++i) {
    smallest[i] = IntVec{} + INT32_MAX;
    largest[i] = IntVec{} + INT32_MIN;
  }
  for (int64_t at = begin; at < end; at += kLanes) {
    Vec e[C], tail = {};
    for (int j = D; j > 0; --j) {
      const Vec f = load<Vec>(features + (j - 1) * n + at);
      const IntVec fits = (f <= kLatticeMaxFeature) & (f >= -kLatticeMaxFeature);
      inside &= fits;
      const Vec scaled = (fits ? f : Vec{}) * scale[j - 1];  // what follows holds for numbers in range alone
      e[j] = tail - scaled * static_cast<float>(j);
      tail = tail + scaled;
    }
    e[0] = tail;
    Vec v[C], total = {};
    for (int j = 0; j < C; ++j) {
      const Vec cell = e[j] / static_cast<float>(C);
      const Vec cut = __builtin_convertvector(__builtin_convertvector(cell, IntVec), Vec);
      const Vec floor = cut > cell ? cut - 1.0f : cut;
      const Vec ceil = cut < cell ? cut + 1.0f : cut;
      const Vec up = ceil * static_cast<float>(C), down = floor * static_cast<float>(C);
      v[j] = up - e[j] < e[j] - down ? up : down;
      total += v[j];
    }
    const IntVec excess = __builtin_convertvector(total / static_cast<float>(C), IntVec);
    IntVec r[C];
    for (int i = 0; i < C; ++i) r[i] = excess;
    for (int i = 0; i < D; ++i) {
      for (int j = i + 1; j < C; ++j) {
        const IntVec lower = e[i] - v[i] < e[j] - v[j];  // -1 where true
        r[i] -= lower;
        r[j] += lower + 1;
      }
    }
    Vec ordered[C] = {};
    IntVec packed = {};
    for (int i = 0; i < C; ++i) {
      const IntVec shift = ((r[i] > D) - (r[i] < 0)) * C;
      r[i] += shift;
      v[i] += __builtin_convertvector(shift, Vec);
      packed |= r[i] << (4 * i);
      const Vec x = (e[i] - v[i]) / static_cast<float>(C);
      for (int p = 0; p < C; ++p) ordered[p] = r[i] == D - p ? x : ordered[p];
    }
    __builtin_memcpy(rank + at, &packed, sizeof(packed));
    for (int i = 0; i < D; ++i) {
      const IntVec whole = __builtin_convertvector(v[i], IntVec);
      __builtin_memcpy(vertex + i * n + at, &whole, sizeof(whole));
      smallest[i] = whole < smallest[i] ? whole : smallest[i];
      largest[i] = whole > largest[i] ? whole : largest[i];
    }
    for (int p = 0; p < C; ++p) {
      const Vec b = p == 0 ? ordered[0] + (1.0f - ordered[D]) : ordered[p] - ordered[p == 0 ? 0 : p - 1];
      for (int lane = 0; lane < kLanes; ++lane) weight[(at + lane) * C + p] = b[lane];
    }
  }
  bool fine = true;
  for (int lane = 0; lane < kLanes; ++lane) {
    fine = fine && inside[lane] != 0;
    for (int i = 0; i < D; ++i) {
      low[i] = smallest[i][lane] < low[i] ? smallest[i][lane] : low[i];
      high[i] = largest[i][lane] > high[i] ? largest[i][lane] : high[i];
    }
  }
  return fine;
}

}  // namespace

WSSS_CLONES_UNFUSED
bool lattice_simplex(const float* features, int64_t n, int d, int64_t begin, int64_t end, int32_t* vertex,
                     uint32_t* rank, float* weight, int32_t* low, int32_t* high) {
  return d == 2 ? simplex<2>(features, n, begin, end, vertex, rank, weight, low, high)
                : simplex<5>(features, n, begin, end, vertex, rank, weight, low, high);
}

}  // namespace wsss
