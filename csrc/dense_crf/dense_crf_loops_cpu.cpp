// Loops of the dense CRF over pixels: no torch header, one clone per instruction set.
#include <cmath>

#include "dense_crf/dense_crf.h"
#include "simd.h"

namespace wsss {
namespace {

// The `count` first lanes; the others are `fill`.
WSSS_INLINE Vec load_some(const float* p, int64_t count, float fill) {
  if (count >= kLanes) return load<Vec>(p);
  Vec v = Vec{} + fill;
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

WSSS_INLINE void store_some(float* p, const Vec& v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

WSSS_INLINE float max_of_lanes(const Vec& v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

template <int NV>
WSSS_INLINE void row_max(const float* rows, int64_t n, int64_t width, float* top) {
  const int vectors = NV > 0 ? NV : static_cast<int>(width / kLanes);
  for (int64_t i = 0; i < n; ++i) {
    Vec m = load<Vec>(rows + i * width);
    for (int v = 1; v < vectors; ++v) m = larger(m, load<Vec>(rows + i * width + v * kLanes));
    const Vec a = larger(m, __builtin_shufflevector(m, m, 4, 5, 6, 7, 0, 1, 2, 3));
    const Vec b = larger(a, __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5));
    top[i] = larger(b, __builtin_shufflevector(b, b, 1, 0, 3, 2, 5, 4, 7, 6))[0];
  }
}

template <int NV>
WSSS_INLINE void row_exp(float* rows, int64_t n, int64_t width, const float* top, const float* extra, float* inverse) {
  const int vectors = NV > 0 ? NV : static_cast<int>(width / kLanes);
  for (int64_t i = 0; i < n; ++i) {
    Vec sum = {};
    for (int v = 0; v < vectors; ++v) {
      const Vec e = exp_not_positive(load<Vec>(rows + i * width + v * kLanes) - top[i]);
      store(rows + i * width + v * kLanes, e);
      sum += e;
    }
    const float scale = 1.0f / (sum_of_lanes(sum) + extra[i]);
    inverse[i] = scale;
    for (int v = 0; v < vectors; ++v) {
      store<Vec>(rows + i * width + v * kLanes, load<Vec>(rows + i * width + v * kLanes) * scale);
    }
  }
}

WSSS_INLINE Vec two_halves(float low, float high) { return Vec{low, low, low, low, high, high, high, high}; }

// Rows of four: two at a time.
WSSS_INLINE void short_row_max(const float* rows, int64_t n, float* top) {
  for (int64_t i = 0; i < n; i += 2) {
    const Vec m = load_some(rows + 4 * i, 4 * (n - i), 0.0f);
    const Vec a = larger(m, __builtin_shufflevector(m, m, 1, 0, 3, 2, 5, 4, 7, 6));
    const Vec b = larger(a, __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5));
    top[i] = b[0];
    if (i + 1 < n) top[i + 1] = b[4];
  }
}

WSSS_INLINE void short_row_exp(float* rows, int64_t n, const float* top, const float* extra, float* inverse) {
  for (int64_t i = 0; i < n; i += 2) {
    const int64_t j = i + 1 < n ? i + 1 : i;
    const Vec e = exp_not_positive(load_some(rows + 4 * i, 4 * (n - i), -INFINITY) - two_halves(top[i], top[j]));
    const Vec a = e + __builtin_shufflevector(e, e, 1, 0, 3, 2, 5, 4, 7, 6);
    const Vec b = a + __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5);
    const Vec scale = 1.0f / (b + two_halves(extra[i], extra[j]));
    store_some(rows + 4 * i, e * scale, 4 * (n - i));
    inverse[i] = scale[0];
    if (j > i) inverse[j] = scale[4];
  }
}

// NV vectors to a row; 0: by the width.
template <int NV>
WSSS_INLINE void softmax(float* rows, int64_t n, int64_t width, const float* base, const float* rest, float* top,
                         float* inverse) {
  float extra[kCrfChunk] = {};
  width == 4 ? short_row_max(rows, n, top) : row_max<NV>(rows, n, width, top);
  for (int64_t i = 0; rest != nullptr && i < n; i += kLanes) {
    const Vec dropped = load_some(base + i, n - i, 0.0f);
    const Vec most = larger(load_some(top + i, n - i, 0.0f), dropped);
    store_some(extra + i, load_some(rest + i, n - i, 0.0f) * exp_not_positive(dropped - most), n - i);
    store_some(top + i, most, n - i);
  }
  if (width == 4) return short_row_exp(rows, n, top, extra, inverse);
  row_exp<NV>(rows, n, width, top, extra, inverse);
}

}  // namespace

WSSS_CLONES
void crf_class_max(const float* unary, int64_t plane, int64_t classes, int64_t n, float* scratch, float* class_max) {
  Vec top[kCrfChunk / kLanes], sum[kCrfChunk / kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes) top[i / kLanes] = Vec{} - INFINITY;
  for (int64_t c = 0; c < classes; ++c) {
    for (int64_t i = 0; i < n; i += kLanes) {
      top[i / kLanes] = larger(top[i / kLanes], -load_some(unary + c * plane + i, n - i, 0.0f));
    }
  }
  for (int64_t c = 0; c < classes; ++c) {
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec e = exp_not_positive(-load_some(unary + c * plane + i, n - i, 0.0f) - top[i / kLanes]);
      store(scratch + c * kCrfChunk + i, e);
      sum[i / kLanes] += e;
    }
  }
  for (int64_t i = 0; i < n; i += kLanes) sum[i / kLanes] = 1.0f / sum[i / kLanes];
  for (int64_t c = 0; c < classes; ++c) {
    Vec most = {};
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec q = load<Vec>(scratch + c * kCrfChunk + i) * sum[i / kLanes];
      most = larger(most, load_some(reinterpret_cast<const float*>(&q), n - i, 0.0f));
    }
    const float m = max_of_lanes(most);
    class_max[c] = m > class_max[c] ? m : class_max[c];
  }
}

WSSS_CLONES
void crf_dropped(const float* unary, int64_t plane, const int64_t* dropped, int64_t num_dropped, int64_t n, float* base,
                 float* rest) {
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec top = Vec{} - INFINITY, sum = {};
    for (int64_t c = 0; c < num_dropped; ++c) {
      top = larger(top, -load_some(unary + dropped[c] * plane + i, n - i, 0.0f));
    }
    for (int64_t c = 0; c < num_dropped; ++c) {
      sum += exp_not_positive(-load_some(unary + dropped[c] * plane + i, n - i, 0.0f) - top);
    }
    store_some(base + i, top, n - i);
    store_some(rest + i, sum, n - i);
  }
}

void crf_load(const float* unary, int64_t plane, const int64_t* live, int64_t num_live, int64_t n, int64_t width,
              float* rows) {
  for (int64_t k = 0; k < num_live; ++k) {
    const float* from = unary + live[k] * plane;
    for (int64_t i = 0; i < n; ++i) rows[i * width + k] = -from[i];
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = num_live; k < width; ++k) rows[i * width + k] = -INFINITY;
  }
}

WSSS_CLONES
void crf_softmax(float* rows, int64_t n, int64_t width, const float* base, const float* rest, float* top,
                 float* inverse) {
  switch (width / kLanes) {
    case 1: return softmax<1>(rows, n, width, base, rest, top, inverse);
    case 3: return softmax<3>(rows, n, width, base, rest, top, inverse);
    default: return softmax<0>(rows, n, width, base, rest, top, inverse);
  }
}

WSSS_CLONES
void crf_store(const float* rows, int64_t n, int64_t width, const int64_t* live, int64_t num_live,
               const int64_t* dropped, int64_t num_dropped, const float* unary, const float* top, const float* inverse,
               int64_t plane, float* out) {
  for (int64_t k = 0; k < num_live; ++k) {
    float* to = out + live[k] * plane;
    for (int64_t i = 0; i < n; ++i) to[i] = rows[i * width + k];
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec most = load_some(top + i, n - i, 0.0f), scale = load_some(inverse + i, n - i, 0.0f);
    for (int64_t c = 0; c < num_dropped; ++c) {
      const Vec logit = -load_some(unary + dropped[c] * plane + i, n - i, 0.0f);
      store_some(out + dropped[c] * plane + i, exp_not_positive(logit - most) * scale, n - i);
    }
  }
}

}  // namespace wsss
