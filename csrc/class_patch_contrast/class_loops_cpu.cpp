// Loops of class_patch_contrast on the CPU.
#include "class_patch_contrast/class_loops.h"

#include <algorithm>

#include "clones.h"
#include "simd.h"

namespace wsss {
namespace {

typedef float WideVec __attribute__((vector_size(64)));
typedef int32_t WideInt __attribute__((vector_size(64)));

// A tile of registers: kRows rows of one or two vectors, which are of 64 bytes where AVX-512 is at hand.
struct Wide {
  using V = WideVec;
  using I = WideInt;
  static constexpr int kLanes = 16, kRows = 8;
};
struct Narrow {
  using V = Vec;
  using I = IntVec;
  static constexpr int kLanes = 8, kRows = 4;
};

// Cosines of `count` <= kRows patches and the lanes [at, at + kVectors * kLanes), counted and weighted.
template <class T, int kVectors>
WSSS_INLINE void similarity_tile(const ClassPairs& p, int64_t first, int64_t count, int64_t at, double (&sums)[2]) {
  using V = typename T::V;
  using I = typename T::I;
  V tile[T::kRows][kVectors] = {};
  const float* rows[T::kRows];
  for (int r = 0; r < T::kRows; ++r) rows[r] = p.patches[first + std::min<int64_t>(r, count - 1)];
  for (int64_t k = 0; k < p.d; ++k) {
    V x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load<V>(p.classes + k * p.lanes + at + v * T::kLanes);
    for (int r = 0; r < T::kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) tile[r][v] += rows[r][k] * x[v];
    }
  }
  V positive[kVectors] = {}, negative[kVectors] = {};
  for (int64_t r = 0; r < count; ++r) {
    const float scale = p.scales[first + r];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t lane = at + v * T::kLanes;
      I labels;
      __builtin_memcpy(&labels, p.labels + lane, sizeof(I));
      const V cosine = tile[r][v] * scale, size = cosine < 0 ? -cosine : cosine;
      const I same = labels == p.patch_labels[first + r];
      positive[v] += same ? size : V{};
      negative[v] += same ? V{} : size;
      if (p.weights) {
        const V weight = (same ? V{} + p.positive : V{} + p.negative) * scale;
        store(p.weights + (first + r) * p.lanes + lane, cosine > 0 ? weight : cosine < 0 ? -weight : V{});
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    for (int l = 0; l < T::kLanes; ++l) {
      sums[0] += positive[v][l];
      sums[1] += negative[v][l];
    }
  }
}

template <class T>
WSSS_INLINE void similarity(const ClassPairs& p, int64_t first, int64_t last, double& positive, double& negative) {
  double sums[2] = {};
  for (int64_t i = first; i < last; i += T::kRows) {
    const int64_t count = std::min<int64_t>(T::kRows, last - i);
    int64_t at = 0;
    for (; at + 2 * T::kLanes <= p.lanes; at += 2 * T::kLanes) similarity_tile<T, 2>(p, i, count, at, sums);
    if (at < p.lanes) similarity_tile<T, 1>(p, i, count, at, sums);
  }
  positive = sums[0];
  negative = sums[1];
}

template <class T>
WSSS_INLINE void gradient_columns(const ClassPairs& p, int64_t rows, int64_t first, int64_t last, int64_t begin,
                                  float* gradient) {
  using V = typename T::V;
  for (int64_t i = 0; i < rows; i += T::kRows) {
    V tile[T::kRows][2] = {};
    for (int64_t j = first; j < last; ++j) {
      const float* patch = p.patches[j] + begin;
      const float* weights = p.weights + j * p.lanes + i;
      const V a = load<V>(patch), b = load<V>(patch + T::kLanes);
      for (int r = 0; r < T::kRows; ++r) {
        tile[r][0] += weights[r] * a;
        tile[r][1] += weights[r] * b;
      }
    }
    for (int64_t r = 0; r < T::kRows && i + r < rows; ++r) {
      float* to = gradient + (i + r) * p.d + begin;
      store(to, load<V>(to) + tile[r][0]);
      store(to + T::kLanes, load<V>(to + T::kLanes) + tile[r][1]);
    }
  }
}

template <class T>
WSSS_INLINE void gradient(const ClassPairs& p, int64_t rows, int64_t first, int64_t last, int64_t begin, int64_t end,
                          float* out) {
  int64_t column = begin;
  for (; column + 2 * T::kLanes <= end; column += 2 * T::kLanes) {
    gradient_columns<T>(p, rows, first, last, column, out);
  }
  for (; column < end; ++column) {  // fewer than a tile has
    for (int64_t i = 0; i < rows; ++i) {
      float sum = 0;
      for (int64_t j = first; j < last; ++j) sum += p.weights[j * p.lanes + i] * p.patches[j][column];
      out[i * p.d + column] += sum;
    }
  }
}

WSSS_CLONES
void similarity_narrow(const ClassPairs& p, int64_t first, int64_t last, double& positive, double& negative) {
  similarity<Narrow>(p, first, last, positive, negative);
}

WSSS_CLONES
void gradient_narrow(const ClassPairs& p, int64_t rows, int64_t first, int64_t last, int64_t begin, int64_t end,
                     float* out) {
  gradient<Narrow>(p, rows, first, last, begin, end, out);
}

#if defined(__x86_64__) && defined(__GNUC__)
#define WSSS_WIDE __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))
bool has_wide() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}

WSSS_WIDE
void similarity_wide(const ClassPairs& p, int64_t first, int64_t last, double& positive, double& negative) {
  similarity<Wide>(p, first, last, positive, negative);
}

WSSS_WIDE
void gradient_wide(const ClassPairs& p, int64_t rows, int64_t first, int64_t last, int64_t begin, int64_t end,
                     float* out) {
  gradient<Wide>(p, rows, first, last, begin, end, out);
}
#else
bool has_wide() { return false; }
void similarity_wide(const ClassPairs& p, int64_t first, int64_t last, double& positive, double& negative) {
  similarity_narrow(p, first, last, positive, negative);
}
void gradient_wide(const ClassPairs& p, int64_t rows, int64_t first, int64_t last, int64_t begin, int64_t end,
                     float* out) {
  gradient_narrow(p, rows, first, last, begin, end, out);
}
#endif

}  // namespace

void class_similarity(const ClassPairs& p, int64_t first, int64_t last, double& positive, double& negative) {
  has_wide() ? similarity_wide(p, first, last, positive, negative)
             : similarity_narrow(p, first, last, positive, negative);
}

void class_gradient(const ClassPairs& p, int64_t rows, int64_t first, int64_t last, int64_t begin, int64_t end,
                    float* gradient) {
  has_wide() ? gradient_wide(p, rows, first, last, begin, end, gradient)
             : gradient_narrow(p, rows, first, last, begin, end, gradient);
}

}  // namespace wsss
