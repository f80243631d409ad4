// Splat, blur and slice over rows of values: no torch header, one clone per instruction set.
#include "lattice/lattice.h"
#include "simd.h"

namespace wsss {
namespace {

// Calls run.template operator()<V, NV>(c): rows are done in blocks of NV vectors from channel c on.
template <class Run>
WSSS_INLINE void for_blocks(int64_t width, const Run& run) {
  if (width == 1) return run.template operator()<float, 1>(0);
  if (width == 4) return run.template operator()<HalfVec, 1>(0);
  int64_t c = 0;
  for (; width - c >= 4 * kLanes; c += 4 * kLanes) run.template operator()<Vec, 4>(c);
  switch ((width - c) / kLanes) {
    case 3: return run.template operator()<Vec, 3>(c);
    case 2: return run.template operator()<Vec, 2>(c);
    case 1: return run.template operator()<Vec, 1>(c);
  }
}

template <class V>
constexpr int lanes_of = sizeof(V) / sizeof(float);

constexpr int kAhead = 12;  // points or vertices between a prefetch and its use

template <int C>
WSSS_INLINE void prefetch_corners(const int32_t* corner, int64_t i, int64_t n, const float* table, int64_t width) {
  if (i + kAhead >= n) return;
  for (int k = 0; k < C; ++k) {
    const float* row = table + corner[(i + kAhead) * C + k] * width;
    __builtin_prefetch(row);
    if (width > 16) __builtin_prefetch(row + 16);
  }
}

template <class V, int NV, int C>
WSSS_INLINE void splat(const int32_t* corner, const float* weight, int64_t n, const float* rows, int64_t width,
                       float* table) {
  for (int64_t i = 0; i < n; ++i) {
    if (C == kMaxCorners) prefetch_corners<C>(corner, i, n, table, width);
    V value[NV];
    for (int v = 0; v < NV; ++v) value[v] = load<V>(rows + i * width + v * lanes_of<V>);
    for (int k = 0; k < C; ++k) {
      float* to = table + corner[i * C + k] * width;
      const float share = weight[i * C + k];
      for (int v = 0; v < NV; ++v) {
        V sum = load<V>(to + v * lanes_of<V>);
        sum += value[v] * share;
        store(to + v * lanes_of<V>, sum);
      }
    }
  }
}

template <class V, int NV, int C>
WSSS_INLINE void slice(const int32_t* corner, const float* weight, int64_t n, const float* table, int64_t width,
                       float factor, const float* base, float* rows) {
  for (int64_t i = 0; i < n; ++i) {
    if (C == kMaxCorners) prefetch_corners<C>(corner, i, n, table, width);
    V sum[NV] = {};
    for (int k = 0; k < C; ++k) {
      const float* from = table + corner[i * C + k] * width;
      const float share = weight[i * C + k];
      for (int v = 0; v < NV; ++v) sum[v] += load<V>(from + v * lanes_of<V>) * share;
    }
    for (int v = 0; v < NV; ++v) {
      const int64_t at = i * width + v * lanes_of<V>;
      store<V>(rows + at, load<V>(base + at) + sum[v] * factor);
    }
  }
}

// In place: the old value of the previous vertex of the line stays in registers.
template <class V, int NV>
WSSS_INLINE void blur(const int32_t* lines, int64_t n, int64_t width, float* table) {
  V before[NV] = {}, here[NV];
  bool first = true;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t code = lines[i], later = lines[i + kAhead < n ? i + kAhead : i];
    __builtin_prefetch(table + (later < 0 ? ~later : later) * width);
    float* to = table + (code < 0 ? ~code : code) * width;
    if (first) {
      for (int v = 0; v < NV; ++v) {
        before[v] = V{};
        here[v] = load<V>(to + v * lanes_of<V>);
      }
    }
    first = code < 0;
    if (first) {
      for (int v = 0; v < NV; ++v) store<V>(to + v * lanes_of<V>, here[v] + before[v] * 0.5f);
      continue;
    }
    const int32_t next_code = lines[i + 1];
    const float* next = table + (next_code < 0 ? ~next_code : next_code) * width;
    for (int v = 0; v < NV; ++v) {
      const V after = load<V>(next + v * lanes_of<V>);
      store<V>(to + v * lanes_of<V>, here[v] + (before[v] + after) * 0.5f);
      before[v] = here[v];
      here[v] = after;
    }
  }
}

}  // namespace

WSSS_CLONES
void lattice_splat_rows(const int32_t* corner, const float* weight, int corners, int64_t n, const float* rows,
                        int64_t width, float* table) {
  if (corners == 3) {
    for_blocks(width, [&]<class V, int NV>(int64_t c) __attribute__((always_inline)) {
      splat<V, NV, 3>(corner, weight, n, rows + c, width, table + c);
    });
  } else {
    for_blocks(width, [&]<class V, int NV>(int64_t c) __attribute__((always_inline)) {
      splat<V, NV, 6>(corner, weight, n, rows + c, width, table + c);
    });
  }
}

WSSS_CLONES
void lattice_gather_entries(const int32_t* first_entry, const LatticeEntry* entries, int64_t n, const float* rows,
                            int64_t width, float* table) {
  for_blocks(width, [&]<class V, int NV>(int64_t c) __attribute__((always_inline)) {
    const int64_t end = first_entry[n];
    for (int64_t v = 0; v < n; ++v) {
      V sum[NV] = {};
      for (int64_t e = first_entry[v]; e < first_entry[v + 1]; ++e) {
        const float* later = rows + entries[e + kAhead < end ? e + kAhead : e].point * width + c;
        __builtin_prefetch(later);
        if (NV > 2) __builtin_prefetch(later + 16);
        const float* from = rows + entries[e].point * width + c;
        for (int k = 0; k < NV; ++k) sum[k] += load<V>(from + k * lanes_of<V>) * entries[e].weight;
      }
      for (int k = 0; k < NV; ++k) store<V>(table + v * width + c + k * lanes_of<V>, sum[k]);
    }
  });
}

WSSS_CLONES
void lattice_slice_rows(const int32_t* corner, const float* weight, int corners, int64_t n, const float* table,
                        int64_t width, float factor, const float* base, float* rows) {
  if (corners == 3) {
    for_blocks(width, [&]<class V, int NV>(int64_t c) __attribute__((always_inline)) {
      slice<V, NV, 3>(corner, weight, n, table + c, width, factor, base + c, rows + c);
    });
  } else {
    for_blocks(width, [&]<class V, int NV>(int64_t c) __attribute__((always_inline)) {
      slice<V, NV, 6>(corner, weight, n, table + c, width, factor, base + c, rows + c);
    });
  }
}

WSSS_CLONES
void lattice_blur_lines(const int32_t* lines, int64_t n, int64_t width, float* table) {
  for_blocks(width, [&]<class V, int NV>(int64_t c) __attribute__((always_inline)) {
    blur<V, NV>(lines, n, width, table + c);
  });
}

}  // namespace wsss
