// Loops of the contrast losses on the CPU: no torch header.
#include "patch_token_contrast/contrast.h"

#include <algorithm>
#include <cmath>

#include "clones.h"
#include "simd.h"

namespace wsss {
namespace {

constexpr int64_t kDepth = 256;  // rows of a panel that stay in the L1 cache

typedef float WideVec __attribute__((vector_size(64)));
typedef int32_t WideInt __attribute__((vector_size(64)));

// A tile of registers: kRows rows of kVectors vectors. Vectors of 64 bytes double the speed where AVX-512 is at hand.
struct Wide {
  using V = WideVec;
  using I = WideInt;
  static constexpr int kRows = 8, kVectors = 2, kLanes = 16;
};
struct Narrow {
  using V = Vec;
  using I = IntVec;
  static constexpr int kRows = 4, kVectors = 2, kLanes = 8;
};

template <class T>
struct Tile {
  typename T::V v[T::kRows][T::kVectors] = {};
  static constexpr int kWidth = T::kVectors * T::kLanes;
};

// Adds a [rows, steps] * b [steps, panel]; kRow and kStep are the strides of a.
template <int kRow, int kStep, class T>
WSSS_INLINE void multiply(const float* a, const float* b, int64_t steps, Tile<T>& tile) {
  for (int64_t k = 0; k < steps; ++k) {
    typename T::V x[T::kVectors];
    for (int v = 0; v < T::kVectors; ++v) x[v] = load<typename T::V>(b + k * kPanel + v * T::kLanes);
    for (int r = 0; r < T::kRows; ++r) {
      for (int v = 0; v < T::kVectors; ++v) tile.v[r][v] += a[r * kRow + k * kStep] * x[v];
    }
  }
}

template <class T>
WSSS_INLINE void similarity_tile(const Strip& s, int64_t i, int64_t j, float (&sums)[2][kPanel]) {
  using V = typename T::V;
  using I = typename T::I;
  Tile<T> tile;
  const int64_t panels = (s.d + kPanel - 1) / kPanel, column = j % kPanel;
  const float* b = s.transposed + j / kPanel * panels * kPanel * kPanel + column;
  for (int64_t p = 0; p < panels; ++p) {
    multiply<kPanel, 1>(s.units.data + (p * s.units.rows + i) * kPanel, b + p * kPanel * kPanel, kPanel, tile);
  }
  const int64_t own = i - s.begin - j;  // the diagonal runs through column own + r
  if (own > -T::kRows && own < Tile<T>::kWidth) {
    for (int r = 0; r < T::kRows; ++r) {
      for (int l = 0; l < Tile<T>::kWidth; ++l) {
        if (own + r == l) reinterpret_cast<float*>(tile.v[r])[l] = 0;
      }
    }
  }
  for (int v = 0; v < T::kVectors; ++v) {
    I columns;
    __builtin_memcpy(&columns, s.units.labels + s.begin + j + v * T::kLanes, sizeof(I));
    const int64_t at = column + v * T::kLanes;
    V positive = load<V>(sums[0] + at), negative = load<V>(sums[1] + at);
    for (int r = 0; r < T::kRows; ++r) {
      const V cosine = tile.v[r][v];
      const V size = cosine < 0 ? -cosine : cosine;
      const I same = columns == s.units.labels[i + r];
      positive += same ? size : V{};
      negative += same ? V{} : size;
      if (s.weights) {
        const V weight = same ? V{} + s.positive : V{} + s.negative;
        const V signed_weight = cosine > 0 ? weight : cosine < 0 ? -weight : V{};
        store(s.weights + (j / kPanel * s.units.rows + i + r) * kPanel + at, signed_weight);
      }
    }
    store(sums[0] + at, positive);
    store(sums[1] + at, negative);
  }
}

template <class T>
WSSS_INLINE PairSums similarity_rows(const Strip& s, int64_t first, int64_t last) {
  PairSums total;
  for (int64_t i = first; i < last; i += kGroup) {
    float sums[2][kPanel] = {};
    for (int64_t j = 0; j < s.width; j += Tile<T>::kWidth) {
      for (int64_t r = 0; r < kGroup; r += T::kRows) similarity_tile<T>(s, i + r, j, sums);
    }
    for (int64_t l = 0; l < kPanel; ++l) {
      total.positive += sums[0][l];
      total.negative += sums[1][l];
    }
  }
  return total;
}

template <class T>
WSSS_INLINE void add_tile(const Tile<T>& tile, int64_t row, int64_t count, int64_t begin, int64_t d,
                          float* const* gradient) {
  const int64_t width = std::min<int64_t>(Tile<T>::kWidth, d - begin);
  for (int r = 0; r < T::kRows && row + r < count; ++r) {
    float* to = gradient[row + r] + begin;
    if (width == Tile<T>::kWidth) {
      for (int v = 0; v < T::kVectors; ++v) {
        float* part = to + v * T::kLanes;
        store(part, load<typename T::V>(part) + tile.v[r][v]);
      }
    } else {
      const float* from = reinterpret_cast<const float*>(tile.v[r]);
      for (int64_t l = 0; l < width; ++l) to[l] += from[l];
    }
  }
}

template <class T>
WSSS_INLINE void gradient_columns(const Strip& s, int64_t last, int64_t panel, int64_t column, float* const* gradient) {
  const int64_t at = panel * kPanel + column, rows = s.units.rows;
  const float* units = s.units.data + (panel * s.units.rows + s.begin) * kPanel + column;
  for (int64_t i = 0; i < last; i += T::kRows) {
    Tile<T> tile;
    for (int64_t j = 0; j < s.width; j += kPanel) {
      multiply<kPanel, 1>(s.weights + (j / kPanel * rows + i) * kPanel, units + j * kPanel, kPanel, tile);
    }
    add_tile(tile, i, s.units.count, at, s.d, gradient);
  }
  units = s.units.data + panel * rows * kPanel + column;
  for (int64_t k = 0; k < s.begin; k += kDepth) {
    const int64_t steps = std::min(kDepth, s.begin - k);
    for (int64_t j = 0; j < s.width; j += T::kRows) {
      Tile<T> tile;
      multiply<1, kPanel>(s.weights + (j / kPanel * rows + k) * kPanel + j % kPanel, units + k * kPanel, steps, tile);
      add_tile(tile, s.begin + j, s.units.count, at, s.d, gradient);
    }
  }
}

template <class T>
WSSS_INLINE void gradient_panel(const Strip& s, int64_t last, int64_t panel, float* const* gradient) {
  for (int64_t column = 0; column < std::min(kPanel, s.d - panel * kPanel); column += Tile<T>::kWidth) {
    gradient_columns<T>(s, last, panel, column, gradient);
  }
}

WSSS_CLONES
PairSums similarity_narrow(const Strip& s, int64_t first, int64_t last) {
  return similarity_rows<Narrow>(s, first, last);
}

WSSS_CLONES
void gradient_narrow(const Strip& s, int64_t last, int64_t panel, float* const* gradient) {
  gradient_panel<Narrow>(s, last, panel, gradient);
}

#if defined(__x86_64__) && defined(__GNUC__)
#define WSSS_WIDE __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))
bool has_wide() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}

WSSS_WIDE
PairSums similarity_wide(const Strip& s, int64_t first, int64_t last) { return similarity_rows<Wide>(s, first, last); }

WSSS_WIDE
void gradient_wide(const Strip& s, int64_t last, int64_t panel, float* const* gradient) {
  gradient_panel<Wide>(s, last, panel, gradient);
}
#else
bool has_wide() { return false; }
PairSums similarity_wide(const Strip& s, int64_t first, int64_t last) { return similarity_narrow(s, first, last); }
void gradient_wide(const Strip& s, int64_t last, int64_t panel, float* const* gradient) {
  gradient_narrow(s, last, panel, gradient);
}
#endif

}  // namespace

WSSS_CLONES
double norm_of(const float* x, int64_t d) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += static_cast<double>(x[i + l]) * x[i + l];
  }
  for (; i < d; ++i) lanes[0] += static_cast<double>(x[i]) * x[i];
  double square = 0;
  for (const double lane : lanes) square += lane;
  return std::sqrt(square);
}

WSSS_CLONES
double normalise(float* x, int64_t d) {
  const double norm = norm_of(x, d), inverse = 1 / std::max(norm, kContrastEps);
  for (int64_t i = 0; i < d; ++i) x[i] = static_cast<float>(x[i] * inverse);
  return norm;
}

void put_row(const float* x, int64_t d, int64_t row, int64_t rows, float* panels) {
  for (int64_t begin = 0; begin < d; begin += kPanel) {
    float* to = panels + begin * rows + row * kPanel;
    const int64_t width = std::min(kPanel, d - begin);
    std::copy(x + begin, x + begin + width, to);
    std::fill(to + width, to + kPanel, 0.0f);
  }
}

WSSS_CLONES
void transpose_units(const Units& units, int64_t begin, int64_t width, int64_t d, int64_t panel, float* transposed) {
  const int64_t panels = (d + kPanel - 1) / kPanel;
  for (int64_t j = 0; j < width; j += kPanel) {
    const float* from = units.data + (panel * units.rows + begin + j) * kPanel;
    float* to = transposed + (j * panels + panel * kPanel) * kPanel;
    for (int64_t k = 0; k < kPanel; ++k) {
      for (int64_t l = 0; l < kPanel; ++l) to[k * kPanel + l] = from[l * kPanel + k];
    }
  }
}

PairSums similarity(const Strip& s, int64_t first, int64_t last) {
  return has_wide() ? similarity_wide(s, first, last) : similarity_narrow(s, first, last);
}

void add_gradient(const Strip& s, int64_t last, int64_t panel, float* const* gradient) {
  has_wide() ? gradient_wide(s, last, panel, gradient) : gradient_narrow(s, last, panel, gradient);
}

WSSS_CLONES
void through_norm(float* e, const Units& units, int64_t row, int64_t d, double norm) {
  const double inverse = 1 / std::max(norm, kContrastEps);
  double along = 0;
  if (norm >= kContrastEps) {
    double lanes[kPanel] = {};
    for (int64_t begin = 0; begin < d; begin += kPanel) {
      const float* f = units.data + begin * units.rows + row * kPanel;
      const int64_t width = std::min(kPanel, d - begin);
      for (int64_t l = 0; l < width; ++l) lanes[l] += static_cast<double>(e[begin + l]) * f[l];
    }
    for (const double lane : lanes) along += lane;
  }
  for (int64_t begin = 0; begin < d; begin += kPanel) {
    const float* f = units.data + begin * units.rows + row * kPanel;
    const int64_t width = std::min(kPanel, d - begin);
    for (int64_t l = 0; l < width; ++l) e[begin + l] = static_cast<float>((e[begin + l] - along * f[l]) * inverse);
  }
}

}  // namespace wsss
