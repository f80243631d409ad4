// The inner loops of select_regions on the CPU: no torch header.
#include <algorithm>

#include "lanes.h"
#include "select_regions/select_regions.h"

namespace wsss {
namespace {

using Vec = Lanes<float>::Vec;
using Loose = Lanes<float>::Loose;
using Index = Lanes<float>::Index;
using LooseIndex = Lanes<float>::LooseIndex;
constexpr int kLanes = Lanes<float>::count;

}  // namespace

WSSS_CLONES
void select_peaks(const float* scores, int64_t n, int64_t c, float* peak) {
  std::fill(peak, peak + c, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < c; ++k) peak[k] = scores[i * c + k] > peak[k] ? scores[i * c + k] : peak[k];
  }
  for (int64_t k = 0; k < c; ++k) peak[k] = peak[k] > 0 ? peak[k] : 1.0f;
}

WSSS_CLONES
void select_winners(const float* scores, const float* peak, int64_t n, int64_t c, int32_t* winner) {
  for (int64_t i = 0; i < n; ++i) {
    const float* row = scores + i * c;
    float best = row[0] / peak[0];
    int32_t at = 0;
    bool any = row[0] > 0, fine = best == best;
    int64_t k = 1;
    if (c > kLanes) {
      Vec top = *reinterpret_cast<const Loose*>(row) / *reinterpret_cast<const Loose*>(peak);
      Index place = {0, 1, 2, 3, 4, 5, 6, 7}, now = place, positive = {}, ordered = top == top;
      positive |= *reinterpret_cast<const Loose*>(row) > 0.0f;
      for (k = kLanes; k + kLanes <= c; k += kLanes) {
        const Vec value = *reinterpret_cast<const Loose*>(row + k);
        const Vec ratio = value / *reinterpret_cast<const Loose*>(peak + k);
        now += kLanes;
        place = ratio > top ? now : place;
        top = ratio > top ? ratio : top;
        positive |= value > 0.0f;
        ordered &= ratio == ratio;
      }
      best = top[0];
      at = place[0];
      for (int lane = 0; lane < kLanes; ++lane) {
        if (top[lane] > best || (top[lane] == best && place[lane] < at)) {
          best = top[lane];
          at = place[lane];
        }
        any |= positive[lane] != 0;
        fine &= ordered[lane] != 0;
      }
    }
    for (; k < c; ++k) {
      const float ratio = row[k] / peak[k];
      if (ratio > best) {
        best = ratio;
        at = static_cast<int32_t>(k);
      }
      any |= row[k] > 0;
      fine &= ratio == ratio;
    }
    winner[i] = any && fine ? at : -1;
  }
}

WSSS_CLONES
void select_pack(const float* values, int64_t blocks, float threshold, uint64_t* words) {
  for (int64_t b = 0; b < blocks; ++b) {
    static_assert(kSelectBlock == 32 * kLanes);
    Index bits = {}, one = Index{} + 1;
    for (int step = 0; step < 32; ++step) {  // bit `step` of lane i is value step * kLanes + i
      bits |= (*reinterpret_cast<const Loose*>(values + b * kSelectBlock + step * kLanes) > threshold) & one;
      one <<= 1;  // a sum would overflow at the last step
    }
    *reinterpret_cast<LooseIndex*>(words + b * (kSelectBlock / 64)) = bits;
  }
}

WSSS_CLONES
void select_overlaps(const uint64_t* regions, const uint64_t* seed, int64_t count, int64_t words, int64_t* shared) {
  for (int64_t t = 0; t < count; ++t) {
    int64_t sum = 0;
    for (int64_t i = 0; i < words; ++i) sum += __builtin_popcountll(regions[t * words + i] & seed[i]);
    shared[t] = sum;
  }
}

}  // namespace wsss
