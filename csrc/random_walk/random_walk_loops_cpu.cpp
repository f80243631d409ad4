// The inner loops of random_walk on the CPU: no torch header, one version per instruction set, chosen at run time.
//
// Each version has vectors of its own width: on vectors wider than its registers GCC goes through memory.
#include <algorithm>
#include <cmath>

#include "random_walk/random_walk.h"

#define WSSS_INLINE inline __attribute__((always_inline))
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
};

#define LOAD(p) (*reinterpret_cast<const typename Vector<kLanes>::Loose*>(p))
#define STORE(p, v) (*reinterpret_cast<typename Vector<kLanes>::Loose*>(p) = (v))

template <int kLanes>
WSSS_INLINE void walk_weight_row_by(const float* g, const int64_t* cells, int num_cells, int64_t columns,
                                    float* weights) {
  for (int64_t x = 0; x < columns; x += kLanes) {
    typename Vector<kLanes>::Type least = LOAD(g + x);
    for (int i = 0; i < num_cells; ++i) {
      const typename Vector<kLanes>::Type other = LOAD(g + x + cells[i]);
      least = other < least ? other : least;
    }
    STORE(weights + x, least);
  }
}

template <int kLanes>
WSSS_INLINE void walk_degree_row_by(const WalkGraph& graph, const WalkGrid& p, int64_t y, float* degree,
                                    float* inverse) {
  for (int64_t x = 0; x < p.columns; x += kLanes) {
    const int64_t at = p.origin + y * p.stride + x;
    const float* weight = graph.weights + at;
    typename Vector<kLanes>::Type sum = {};
    for (int n = 0; n < graph.count; ++n, weight += p.plane) sum += LOAD(weight) + LOAD(weight - graph.jump[n]);
    sum += 1.0f;
    STORE(degree + at, sum);
    STORE(inverse + at, 1.0f / sum);
  }
}

// kChannels maps at one vector of pixels; they share each load of a weight.
template <int kLanes, int kChannels>
WSSS_INLINE void step_vector(const WalkGraph& graph, int64_t plane, const WalkStep& step, int64_t at, const float* from,
                             float* to, float* v, double* out) {
  typename Vector<kLanes>::Type centre[kChannels], ahead[kChannels], behind[kChannels];
  for (int c = 0; c < kChannels; ++c) {
    centre[c] = LOAD(from + c * plane + at);
    ahead[c] = behind[c] = typename Vector<kLanes>::Type{};
  }
  const float* weight = graph.weights + at;
  for (int n = 0; n < graph.count; ++n, weight += plane) {
    const int64_t jump = graph.jump[n];
    const typename Vector<kLanes>::Type w0 = LOAD(weight), w1 = LOAD(weight - jump);
    for (int c = 0; c < kChannels; ++c) {
      const float* u = from + c * plane + at;
      ahead[c] += w0 * (LOAD(u + jump) - centre[c]);
      behind[c] += w1 * (LOAD(u - jump) - centre[c]);
    }
  }
  const typename Vector<kLanes>::Type scale = LOAD(graph.inverse + at) * step.gain;
  for (int c = 0; c < kChannels; ++c) {
    const int64_t i = c * plane + at;
    const typename Vector<kLanes>::Type old = LOAD(v + i);
    const typename Vector<kLanes>::Type now = old * step.keep + (ahead[c] + behind[c]) * scale;
    STORE(v + i, now);
    STORE(to + i, centre[c] + now);
    if (step.tail != 0.0) {
      float first[kLanes], second[kLanes];
      STORE(first, old);
      STORE(second, now);
      for (int l = 0; l < kLanes; ++l) out[i + l] += step.tail * (static_cast<double>(first[l]) + second[l]);
    }
  }
}

template <int kLanes>
WSSS_INLINE void walk_step_row_by(const WalkGraph& graph, const WalkGrid& p, const WalkStep& step, int64_t channels,
                                  int64_t y, const float* from, float* to, float* v, double* out) {
  for (int64_t x = 0; x < p.columns; x += kLanes) {
    const int64_t at = p.origin + y * p.stride + x;
    if (channels == 4) step_vector<kLanes, 4>(graph, p.plane, step, at, from, to, v, out);
    if (channels == 3) step_vector<kLanes, 3>(graph, p.plane, step, at, from, to, v, out);
    if (channels == 2) step_vector<kLanes, 2>(graph, p.plane, step, at, from, to, v, out);
    if (channels == 1) step_vector<kLanes, 1>(graph, p.plane, step, at, from, to, v, out);
  }
}

}  // namespace

void walk_gain_row(const float* edges, float beta, int64_t width, float* g) {
  for (int64_t x = 0; x < width; ++x) {
    const float power = std::pow(std::clamp(1.0f - edges[x], 0.0f, 1.0f), beta);
    g[x] = power < kWalkSmallest ? 0.0f : power;
  }
}

WSSS_VERSIONS(walk_weight_row, (const float* g, const int64_t* cells, int num_cells, int64_t columns, float* weights),
              (g, cells, num_cells, columns, weights))
WSSS_VERSIONS(walk_degree_row,
              (const WalkGraph& graph, const WalkGrid& p, int64_t y, float* degree, float* inverse),
              (graph, p, y, degree, inverse))
WSSS_VERSIONS(walk_step_row,
              (const WalkGraph& graph, const WalkGrid& p, const WalkStep& step, int64_t channels, int64_t y,
               const float* from, float* to, float* v, double* out),
              (graph, p, step, channels, y, from, to, v, out))

}  // namespace wsss
