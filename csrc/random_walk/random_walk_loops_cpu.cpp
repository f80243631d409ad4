// The inner loops of random_walk on the CPU: no torch header, one version per instruction set, chosen at run time.
//
// Each version has vectors of its own width: on vectors wider than its registers GCC goes through memory.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "clones.h"
#include "random_walk/random_walk.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define WSSS_VERSIONS(name, parameters, arguments)                                                                \
  __attribute__((target("avx512f"))) static void name##_avx512 parameters { name##_by<16> arguments; }            \
  __attribute__((target("avx2,fma"))) static void name##_avx2 parameters { name##_by<8> arguments; }              \
  static void name##_base parameters { name##_by<4> arguments; }                                                  \
  void name parameters {                                                                                          \
    static const auto run = pick_version(&name##_avx512, &name##_avx2, &name##_base);                             \
    run arguments;                                                                                                \
  }
#else
#define WSSS_VERSIONS(name, parameters, arguments) \
  void name parameters { name##_by<4> arguments; }
#endif

namespace wsss {
namespace {

#if defined(__x86_64__) && defined(__GNUC__)
template <class Function>
Function pick_version(Function avx512, Function avx2, Function base) {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return avx512;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2 : base;
}
#endif

template <int kLanes>
struct Vector {
  typedef float Type __attribute__((vector_size(4 * kLanes)));
  typedef float Loose __attribute__((vector_size(4 * kLanes), aligned(4)));
  typedef float Half __attribute__((vector_size(2 * kLanes)));
  typedef double Double __attribute__((vector_size(4 * kLanes), aligned(8)));
};

#define LOAD(p) (*reinterpret_cast<const typename Vector<kLanes>::Loose*>(p))
#define STORE(p, v) (*reinterpret_cast<typename Vector<kLanes>::Loose*>(p) = (v))

// Weights and degrees of kLanes pixels; `size` floats lie between those of neighbour n and n + 1.
template <int kLanes>
WSSS_INLINE void weigh(int64_t count, const int64_t* first, const int64_t* cells, const float* g, int64_t size,
                       float* weights, float* degree, float* inverse) {
  using V = typename Vector<kLanes>::Type;
  typename Vector<kLanes>::Double total[2] = {};
  typename Vector<kLanes>::Half half[2];
  for (int64_t n = 0; n < count; ++n) {
    V least = {};
    if (first[n] < first[n + 1]) least = LOAD(g + cells[first[n]]);
    for (int64_t k = first[n]; k < first[n + 1]; ++k) {
      const V other = LOAD(g + cells[k]);
      least = other < least ? other : least;
    }
    STORE(weights + n * size, least);
    std::memcpy(half, &least, sizeof(V));
    for (int h = 0; h < 2; ++h) total[h] += __builtin_convertvector(half[h], typename Vector<kLanes>::Double);
  }
  for (int h = 0; h < 2; ++h) half[h] = __builtin_convertvector(total[h], typename Vector<kLanes>::Half);
  V sum;
  std::memcpy(&sum, half, sizeof(V));
  STORE(degree, sum + 1.0f);
  STORE(inverse, 1.0f / (sum + 1.0f));
}

template <int kLanes>
WSSS_INLINE void walk_weight_row_by(const WalkGrid& p, int64_t count, const int64_t* first, const int64_t* cells,
                                    const float* g, float* weights, float* degree, float* inverse) {
  const int64_t row = p.span * p.blocks, most = kWalkTile * p.blocks;
  for (int64_t start = 0; start < row; start += most) {
    const int64_t size = std::min(most, row - start);  // a multiple of 4
    float* tile = weights + start * count;
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      weigh<kLanes>(count, first, cells, g + start + i, size, tile + i, degree + start + i, inverse + start + i);
    }
    for (; i < size; i += 4) {
      weigh<4>(count, first, cells, g + start + i, size, tile + i, degree + start + i, inverse + start + i);
    }
  }
}

// kBlocks floats, repeated to fill a vector.
template <int kLanes, int kBlocks>
WSSS_INLINE void repeat(const float* p, typename Vector<kLanes>::Type& v) {
  if constexpr (kBlocks >= kLanes) {
    v = LOAD(p);
  } else {
    static_assert(kBlocks == 4);
    const auto& four = *reinterpret_cast<const Vector<4>::Loose*>(p);
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    // GCC 12 loads and shuffles otherwise, and shuffles take a port that the arithmetic needs.
    if constexpr (kLanes == 16) {
      v = __builtin_ia32_broadcastf32x4_512(four, typename Vector<kLanes>::Type{}, static_cast<uint16_t>(-1));
    } else {
      v = __builtin_ia32_vbroadcastf128_ps256(reinterpret_cast<const Vector<4>::Type*>(&four));
    }
#else
    for (int lane = 0; lane < kLanes; ++lane) v[lane] = four[lane % 4];
#endif
  }
}

// Adds what cell `s` of a row of the disc, counted from its left end, gives to the cells [first, last) of a tile whose
// own values are `own`.
template <int kLanes, int kBlocks, int kPlanes, int kTile>
WSSS_INLINE void add_source(int64_t plane, const float* u, const float* weights, int64_t s, int first, int last,
                            const typename Vector<kLanes>::Type* own, typename Vector<kLanes>::Type* sums) {
  typename Vector<kLanes>::Type other[kPlanes];
#pragma GCC unroll 4
  for (int k = 0; k < kPlanes; ++k) other[k] = LOAD(u + k * plane + s * kWalkCell);
#pragma GCC unroll 4
  for (int t = 0; t < kTile; ++t) {
    if (t < first || t >= last) continue;
    typename Vector<kLanes>::Type w;
    repeat<kLanes, kBlocks>(weights + ((s - t) * kTile + t) * kBlocks, w);
#pragma GCC unroll 4
    for (int k = 0; k < kPlanes; ++k) sums[k * kTile + t] += w * (other[k] - own[k * kTile + t]);
  }
}

// out += tail * (old + now) in double, half a vector at a time.
template <int kLanes>
WSSS_INLINE void add_tail(const typename Vector<kLanes>::Type& old, const typename Vector<kLanes>::Type& now,
                          double tail, double* out) {
  using Double = typename Vector<kLanes>::Double;
  typename Vector<kLanes>::Half first[2], second[2];
  __builtin_memcpy(first, &old, sizeof(old));
  __builtin_memcpy(second, &now, sizeof(now));
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    Double& sum = *reinterpret_cast<Double*>(out + h * kLanes / 2);
    sum += tail * (__builtin_convertvector(first[h], Double) + __builtin_convertvector(second[h], Double));
  }
}

// kTile cells of kPlanes planes, which share each load of a weight and of a neighbour. The loops over cells and planes
// are unrolled, so that the sums stay in registers.
template <int kLanes, int kBlocks, int kPlanes, int kTile>
WSSS_INLINE void step_tile(const WalkGrid& p, const WalkGraph& graph, const WalkStep& step, const float* weights,
                           const float* inverse, const float* from, float* to, float* v, double* out) {
  using V = typename Vector<kLanes>::Type;
  const int64_t plane = p.plane * kWalkCell;
  V own[kPlanes * kTile], sums[kPlanes * kTile];
#pragma GCC unroll 16
  for (int i = 0; i < kPlanes * kTile; ++i) {
    own[i] = LOAD(from + i / kTile * plane + i % kTile * kWalkCell);
    sums[i] = V{};
  }
  for (int row = 0; row < graph.disc.rows(); ++row) {
    const int dy = WalkDisc::row(row);
    const int64_t half = graph.disc.half[std::abs(dy)];
    const float* u = from + (dy * p.stride - half) * kWalkCell;
#pragma GCC unroll 4
    for (int s = 0; s < kTile - 1; ++s) {
      add_source<kLanes, kBlocks, kPlanes, kTile>(plane, u, weights, s, 0, s + 1, own, sums);
    }
    for (int64_t s = kTile - 1; s <= 2 * half; ++s) {
      add_source<kLanes, kBlocks, kPlanes, kTile>(plane, u, weights, s, 0, kTile, own, sums);
    }
#pragma GCC unroll 4
    for (int s = 1; s < kTile; ++s) {
      add_source<kLanes, kBlocks, kPlanes, kTile>(plane, u, weights, 2 * half + s, s, kTile, own, sums);
    }
    weights += (2 * half + 1) * kTile * kBlocks;
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTile; ++t) {
    V scale;
    repeat<kLanes, kBlocks>(inverse + t * kBlocks, scale);
    scale *= step.gain;
#pragma GCC unroll 4
    for (int k = 0; k < kPlanes; ++k) {
      const int64_t i = k * plane + t * kWalkCell;
      const V old = LOAD(v + i), now = old * step.keep + sums[k * kTile + t] * scale;
      STORE(v + i, now);
      STORE(to + i, LOAD(from + i) + now);
      if (step.tail != 0.0) add_tail<kLanes>(old, now, step.tail, out + i);
    }
  }
}

template <int kLanes, int kBlocks, int kPlanes>
WSSS_INLINE void step_row(const WalkGrid& p, const WalkGraph& graph, const WalkStep& step, int64_t y, const float* from,
                          float* to, float* v, double* out) {
  for (int64_t x = 0; x < p.span; x += kWalkTile) {
    for (int64_t lane = 0; lane < kWalkCell; lane += kLanes) {
      const float* w = graph.weights + (y * p.span + x) * graph.disc.count * kBlocks + lane % kBlocks;
      const float* z = graph.inverse + (p.row(y) + x) * kBlocks + lane % kBlocks;
      const int64_t i = (p.row(y) + x) * kWalkCell + lane, left = p.span - x;
      if (left >= 4) step_tile<kLanes, kBlocks, kPlanes, 4>(p, graph, step, w, z, from + i, to + i, v + i, out + i);
      if (left == 3) step_tile<kLanes, kBlocks, kPlanes, 3>(p, graph, step, w, z, from + i, to + i, v + i, out + i);
      if (left == 2) step_tile<kLanes, kBlocks, kPlanes, 2>(p, graph, step, w, z, from + i, to + i, v + i, out + i);
      if (left == 1) step_tile<kLanes, kBlocks, kPlanes, 1>(p, graph, step, w, z, from + i, to + i, v + i, out + i);
    }
  }
}

template <int kLanes, int kBlocks>
WSSS_INLINE void step_planes(const WalkGrid& p, const WalkGraph& graph, const WalkStep& step, int64_t planes, int64_t y,
                             const float* from, float* to, float* v, double* out) {
  constexpr int64_t kMost = kLanes == 16 ? 3 : 2;  // as many as the registers hold
  for (int64_t k = 0; k < planes; k += kMost) {
    const int64_t i = k * p.plane * kWalkCell, left = planes - k;
    if (left >= kMost) step_row<kLanes, kBlocks, kMost>(p, graph, step, y, from + i, to + i, v + i, out + i);
    if (left == 2 && kMost > 2) step_row<kLanes, kBlocks, 2>(p, graph, step, y, from + i, to + i, v + i, out + i);
    if (left == 1) step_row<kLanes, kBlocks, 1>(p, graph, step, y, from + i, to + i, v + i, out + i);
  }
}

template <int kLanes>
WSSS_INLINE void walk_step_row_by(const WalkGrid& p, const WalkGraph& graph, const WalkStep& step, int64_t planes,
                                  int64_t y, const float* from, float* to, float* v, double* out) {
  if (p.blocks == 16) step_planes<kLanes, 16>(p, graph, step, planes, y, from, to, v, out);
  if (p.blocks == 4) step_planes<kLanes, 4>(p, graph, step, planes, y, from, to, v, out);
  for (int64_t k = 0; k < planes; ++k) walk_fill_halo(p, kWalkCell, to + (k * p.plane + p.row(y)) * kWalkCell);
}

}  // namespace

void walk_fill_halo(const WalkGrid& p, int64_t cell, float* row) {
  for (int64_t i = 0; i < p.halo; i += p.span) {  // more than once where the halo is wider than the row
    const int64_t size = std::min(p.span, p.halo - i) * cell;
    float *left = row - i * cell - size, *right = row + (p.span + i) * cell;
    std::memmove(left, left + p.span * cell - 1, size * sizeof(float));
    std::memmove(right, right - p.span * cell + 1, size * sizeof(float));
    for (int64_t k = 0; k < size; k += p.blocks) left[k] = right[k + p.blocks - 1] = 0.0f;
  }
}

void walk_gain_row(const WalkGrid& p, const float* edges, float beta, float* g) {
  for (int64_t x = 0; x < p.width; ++x) {
    const float power = std::pow(std::clamp(1.0f - edges[x], 0.0f, 1.0f), beta);
    g[x % p.span * p.blocks + x / p.span] = power < kWalkSmallest ? 0.0f : power;
  }
  walk_fill_halo(p, p.blocks, g);
}

WSSS_VERSIONS(walk_weight_row,
              (const WalkGrid& p, int64_t count, const int64_t* first, const int64_t* cells, const float* g,
               float* weights, float* degree, float* inverse),
              (p, count, first, cells, g, weights, degree, inverse))
WSSS_VERSIONS(walk_step_row,
              (const WalkGrid& p, const WalkGraph& graph, const WalkStep& step, int64_t planes, int64_t y,
               const float* from, float* to, float* v, double* out),
              (p, graph, step, planes, y, from, to, v, out))

}  // namespace wsss
