// Loops of the dense energy over pixels: no torch header, one clone per instruction set.
#include "dense_energy/dense_energy.h"
#include "simd.h"

namespace wsss {
namespace {

// Rows to columns.
WSSS_INLINE void transpose(Vec* r) {
  Vec a[kLanes], b[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    a[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < kLanes; i += 4) {
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = __builtin_shufflevector(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[i + 2 * j + 1] = __builtin_shufflevector(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// V: what a pixel has of a vector of classes, 8 or 4.
template <class V>
WSSS_INLINE void pack(const float* tile, const float* roi, int64_t n, int64_t width, float* rows) {
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int64_t c = 0; c < width; c += kLanes) {
      Vec r[kLanes];
      for (int j = 0; j < kLanes; ++j) r[j] = load<Vec>(tile + (c + j) * kEnergyRun + i);
      transpose(r);
      for (int j = 0; j < kLanes && i + j < n; ++j) {
        const Vec value = r[j] * roi[i + j];
        __builtin_memcpy(rows + (i + j) * width + c, &value, sizeof(V));
      }
    }
  }
}

template <class V>
WSSS_INLINE void unpack(const float* rows, int64_t n, int64_t width, int64_t classes, int64_t plane, float* planes) {
  for (int64_t c = 0; c < width; c += kLanes) {
    for (int64_t i = 0; i < n; i += kLanes) {
      Vec r[kLanes] = {};
      for (int j = 0; j < kLanes && i + j < n; ++j) __builtin_memcpy(&r[j], rows + (i + j) * width + c, sizeof(V));
      transpose(r);
      for (int j = 0; j < kLanes && c + j < classes; ++j) {
        float* to = planes + (c + j) * plane + i;
        if (n - i >= kLanes) {
          store(to, r[j]);
        } else {
          for (int64_t lane = 0; lane < n - i; ++lane) to[lane] = r[j][lane];
        }
      }
    }
  }
}

template <class V>
WSSS_INLINE float close(const float* sums, const float* gate, const float* factor, int64_t n, int64_t width,
                        float* values) {
  constexpr int64_t lanes = sizeof(V) / sizeof(float);
  V total = {};
  for (int64_t i = 0; i < n; ++i) {
    V own = {};
    for (int64_t c = i * width; c < (i + 1) * width; c += lanes) {
      const V sum = load<V>(sums + c);
      own += load<V>(values + c) * sum;
      store<V>(values + c, sum * factor[i]);
    }
    total += own * gate[i];
  }
  Vec all = {};
  __builtin_memcpy(&all, &total, sizeof(V));
  return sum_of_lanes(all);
}

}  // namespace

WSSS_CLONES
void energy_mix_rows(const float* from, int64_t stride, const int32_t* index, const float* weight, int64_t terms,
                     int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = weight[0] * from[index[0] * stride + i];
  for (int64_t t = 1; t < terms; ++t) {
    const float* row = from + index[t] * stride;
    for (int64_t i = 0; i < n; ++i) out[i] += weight[t] * row[i];
  }
}

WSSS_CLONES
void energy_mix_columns(const float* from, const int32_t* index, const float* weight, int64_t step, int64_t terms,
                        int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = weight[i] * from[index[i]];
  for (int64_t t = 1; t < terms; ++t) {
    for (int64_t i = 0; i < n; ++i) out[i] += weight[t * step + i] * from[index[t * step + i]];
  }
}

WSSS_CLONES
void energy_halve(const float* low, const float* high, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec a = load<Vec>(low + 2 * i) + load<Vec>(high + 2 * i);
    const Vec b = load<Vec>(low + 2 * i + kLanes) + load<Vec>(high + 2 * i + kLanes);
    const Vec even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
    const Vec odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
    store<Vec>(out + i, (even + odd) * 0.25f);
  }
  for (; i < n; ++i) out[i] = ((low[2 * i] + high[2 * i]) + (low[2 * i + 1] + high[2 * i + 1])) * 0.25f;
}

WSSS_CLONES
void energy_double(const float* from, int64_t n, float scale, float* low, float* high) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load<Vec>(from + i) * scale;
    const Vec first = __builtin_shufflevector(v, v, 0, 0, 1, 1, 2, 2, 3, 3);
    const Vec second = __builtin_shufflevector(v, v, 4, 4, 5, 5, 6, 6, 7, 7);
    for (float* to : {low, high}) {
      store(to + 2 * i, first);
      store(to + 2 * i + kLanes, second);
    }
  }
  for (; i < n; ++i) low[2 * i] = low[2 * i + 1] = high[2 * i] = high[2 * i + 1] = from[i] * scale;
}

WSSS_CLONES
void energy_max(const float* from, int64_t n, float* top) {
  for (int64_t i = 0; i < n; ++i) top[i] = (from[i] > top[i]) | (from[i] != from[i]) ? from[i] : top[i];
}

WSSS_CLONES
void energy_pack(const float* tile, const float* roi, int64_t n, int64_t width, float* rows) {
  width == 4 ? pack<HalfVec>(tile, roi, n, width, rows) : pack<Vec>(tile, roi, n, width, rows);
}

WSSS_CLONES
void energy_unpack(const float* rows, int64_t n, int64_t width, int64_t classes, int64_t plane, float* planes) {
  width == 4 ? unpack<HalfVec>(rows, n, width, classes, plane, planes)
             : unpack<Vec>(rows, n, width, classes, plane, planes);
}

WSSS_CLONES
float energy_close(const float* sums, const float* gate, const float* factor, int64_t n, int64_t width, float* values) {
  return width == 4 ? close<HalfVec>(sums, gate, factor, n, width, values)
                    : close<Vec>(sums, gate, factor, n, width, values);
}

}  // namespace wsss
