// The inner loops of max_upsampled_masks on the CPU: no torch header.
#include <cstring>

#include "max_upsampled_masks/max_upsampled_masks.h"
#include "lanes.h"

namespace wsss {
namespace {

constexpr int kRows = 8;  // rows whose maxima stay in registers while the members pass

// `count` elements between an array and a vector; a whole vector in one move.
template <class T, class V>
WSSS_INLINE void load_some(const T* from, int64_t count, V& to) {
  if (count * sizeof(T) == sizeof(V)) {
    std::memcpy(&to, from, sizeof(V));
  } else {
    std::memcpy(&to, from, count * sizeof(T));
  }
}

template <class T, class V>
WSSS_INLINE void store_some(const V& from, int64_t count, T* to) {
  if (count * sizeof(T) == sizeof(V)) {
    std::memcpy(to, &from, sizeof(V));
  } else {
    std::memcpy(to, &from, count * sizeof(T));
  }
}

template <class T>
WSSS_INLINE void upsample(const T* cells, const std::vector<TapRun>& runs, const T* low, const T* high, T* out) {
  using Loose = typename Lanes<T>::Loose;
  static_assert(Lanes<T>::count <= kUpsampleLanes);
  for (const TapRun& run : runs) {
    const T a = cells[run.low], b = cells[run.high];
    // The last vector of a run reaches into the next one, which is written later.
    for (int64_t x = run.begin; x < run.end; x += Lanes<T>::count) {
      *reinterpret_cast<Loose*>(out + x) =
          a * *reinterpret_cast<const Loose*>(low + x) + b * *reinterpret_cast<const Loose*>(high + x);
    }
  }
}

template <class T>
WSSS_INLINE void max_of_members(const Band<T>& band, T* best_out, int32_t* winner_out) {
  using Vec = typename Lanes<T>::Vec;
  using Loose = typename Lanes<T>::Loose;
  using Index = typename Lanes<T>::Index;
  constexpr int64_t lanes = Lanes<T>::count;
  for (int64_t y = 0; y < band.rows; y += kRows) {
    const int64_t rows = band.rows - y < kRows ? band.rows - y : kRows;
    Vec low[kRows] = {}, high[kRows] = {};
    for (int r = 0; r < rows; ++r) {
      low[r] += band.taps[y + r].low_weight;
      high[r] += band.taps[y + r].high_weight;
    }
    for (int64_t x = 0; x < band.width; x += lanes) {
      const int64_t count = band.width - x < lanes ? band.width - x : lanes;
      Vec best[kRows] = {}, winner[kRows] = {};  // patch numbers as T, exact below 2^24
      for (int r = 0; r < rows; ++r) {
        Index patches = {};
        load_some(best_out + (y + r) * band.width + x, count, best[r]);
        load_some(winner_out + (y + r) * band.width + x, count, patches);
        winner[r] = __builtin_convertvector(patches, Vec);
      }
      bool changed = false;
      for (int64_t k = 0; k < band.num_members; ++k) {
        const BandMember<T>& m = band.members[k];
        if (m.end <= x || m.begin >= x + lanes) continue;
        changed = true;
        const Vec top = *reinterpret_cast<const Loose*>(m.top + x), bottom = *reinterpret_cast<const Loose*>(m.bottom + x);
        const Vec patch = Vec{} + static_cast<T>(m.patch);
        for (int r = 0; r < kRows; ++r) {
          const Vec v = low[r] * top + high[r] * bottom;
          winner[r] = v > best[r] ? patch : winner[r];
          best[r] = v > best[r] ? v : best[r];
        }
      }
      if (!changed) continue;
      for (int r = 0; r < rows; ++r) {
        const Index patches = __builtin_convertvector(winner[r], Index);
        store_some(best[r], count, best_out + (y + r) * band.width + x);
        store_some(patches, count, winner_out + (y + r) * band.width + x);
      }
    }
  }
}

}  // namespace

WSSS_CLONES
void upsample_row(const float* cells, const std::vector<TapRun>& runs, const float* low, const float* high, float* out) {
  upsample(cells, runs, low, high, out);
}

WSSS_CLONES
void upsample_row(const double* cells, const std::vector<TapRun>& runs, const double* low, const double* high,
                  double* out) {
  upsample(cells, runs, low, high, out);
}

WSSS_CLONES
void max_band(const Band<float>& band, float* best, int32_t* winner) { max_of_members(band, best, winner); }

WSSS_CLONES
void max_band(const Band<double>& band, double* best, int32_t* winner) { max_of_members(band, best, winner); }

}  // namespace wsss
