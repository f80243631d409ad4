// The lattice as a class: index of the vertices, threads.
#include "lattice/lattice.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <mutex>

#include "lattice/vertex_table.h"

namespace wsss {
namespace {

constexpr int64_t kPixelGrain = 4096;  // points per task of a parallel loop; a multiple of 8

// Mixed-radix strides of the keys with room for `margin` vertices beyond the lowest and the highest coordinate; 0 for
// the implied last coordinate.
std::array<int64_t, kMaxCorners> key_strides(const int32_t* low, const int32_t* high, int d, int margin) {
  std::array<int64_t, kMaxCorners> strides{};
  int64_t size = 1;
  for (int i = 0; i < d; ++i) {
    strides[i] = size;
    const bool fits = !__builtin_mul_overflow(size, int64_t{high[i]} - low[i] + 2 * margin * (d + 1) + 1, &size);
    TORCH_CHECK_VALUE(fits, kLatticeTooSmall);
  }
  return strides;
}

int num_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

}  // namespace

void over_images(int64_t batch, const std::function<void(int64_t)>& run) {
  const int64_t threads = num_threads(), whole = threads > 1 ? batch / threads * threads : 0;
  at::parallel_for(0, whole, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) run(b);
  });
  for (int64_t b = whole; b < batch; ++b) run(b);
}

Buffer<float> pixel_features(const float* image, int64_t h, int64_t w, int64_t stride, int64_t plane, float sigma_xy,
                             float sigma_rgb) {
  const int64_t n = h * w, padded = Lattice::padded_points(n), d = image == nullptr ? 2 : 5;
  Buffer<float> features(d * padded);
  at::parallel_for(0, h, kPixelGrain / w + 1, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y) {
      float* to = features.get() + y * w;
      for (int64_t x = 0; x < w; ++x) to[x] = static_cast<float>(x) / sigma_xy;
      std::fill(to + padded, to + padded + w, static_cast<float>(y) / sigma_xy);
      for (int64_t c = 2; c < d; ++c) {
        const float* from = image + (c - 2) * plane + y * stride;
        for (int64_t x = 0; x < w; ++x) to[c * padded + x] = from[x] / sigma_rgb;
      }
    }
  });
  for (int64_t c = 0; c < d; ++c) {
    float* row = features.get() + c * padded;
    std::fill(row + n, row + padded, row[n - 1]);  // surplus points repeat the last one
  }
  return features;
}

Lattice::Lattice(const Buffer<float>& features, int64_t n, int d, bool ring)
    : num_points(n), num_corners(d + 1), num_blurs(ring ? kRingBlurs : 1) {
  const int vertices = ring ? kMaxCorners * (2 * kMaxCorners + 1) : kMaxCorners;  // at most, for each point
  TORCH_CHECK_VALUE(n > 0 && n < INT32_MAX / vertices, "lattice: too many points, got ", n);
  const int64_t padded = padded_points(n);
  Buffer<int32_t> vertex(d * padded);
  Buffer<uint32_t> rank(padded);
  corner_ = Buffer<int32_t>(n * num_corners);
  weight_ = Buffer<float>(padded * num_corners);
  int32_t low[kMaxCorners], high[kMaxCorners];
  std::fill(low, low + d, INT32_MAX);
  std::fill(high, high + d, INT32_MIN);
  std::atomic<bool> fine = true;
  std::mutex mutex;
  at::parallel_for(0, padded / 8, kPixelGrain / 8, [&](int64_t begin, int64_t end) {
    int32_t lowest[kMaxCorners], highest[kMaxCorners];
    std::fill(lowest, lowest + d, INT32_MAX);
    std::fill(highest, highest + d, INT32_MIN);
    if (!lattice_simplex(features.get(), padded, d, 8 * begin, 8 * end, vertex.get(), rank.get(), weight_.get(), lowest,
                         highest)) {
      fine = false;
    }
    const std::lock_guard lock(mutex);
    for (int i = 0; i < d; ++i) {
      low[i] = std::min(low[i], lowest[i]);
      high[i] = std::max(high[i], highest[i]);
    }
  });
  TORCH_CHECK_VALUE(fine, kLatticeTooSmall);
  d == 2 ? index<2>(vertex.get(), rank.get(), low, high, ring) : index<5>(vertex.get(), rank.get(), low, high, ring);
  if (num_threads() > 1) list_entries();
}

template <int D>
void Lattice::index(const int32_t* vertex, const uint32_t* rank, const int32_t* low, const int32_t* high, bool ring) {
  const int64_t padded = padded_points(num_points);
  const int margin = ring ? 3 : 2;  // corners, their neighbours, the neighbours of those
  const auto strides = key_strides(low, high, D, margin);
  // Keys modulo 2^64: those of the vertices fit, that of the origin may not.
  uint64_t step = 0, origin = 0;
  for (int i = 0; i < D; ++i) {
    step += strides[i];
    origin += static_cast<uint64_t>(int64_t{low[i]} - margin * num_corners) * strides[i];
  }
  VertexTable table(num_points / 16);
  uint64_t codes[kFetchAhead][D + 1], previous_code = 0;
  bool repeats[kFetchAhead];  // the simplex of the point before
  int32_t ids[D + 1];
  uint32_t previous_rank = 0;
  for (int64_t begin = 0; begin < num_points; begin += kFetchAhead) {
    const int64_t end = std::min(num_points, begin + kFetchAhead);
    for (int64_t i = begin; i < end; ++i) {
      uint64_t code = -origin;
      for (int j = 0; j < D; ++j) code += static_cast<uint64_t>(int64_t{vertex[j * padded + i]}) * strides[j];
      repeats[i - begin] = i > 0 && code == previous_code && rank[i] == previous_rank;
      if (repeats[i - begin]) continue;
      previous_code = code;
      previous_rank = rank[i];
      uint64_t stride_of_rank[16];
      for (int j = 0; j <= D; ++j) stride_of_rank[rank[i] >> (4 * j) & 15] = num_corners * strides[j];
      for (int k = 0; k <= D; ++k) {
        if (k > 0) code += step - stride_of_rank[D - k + 1];
        codes[i - begin][k] = code;
        table.prefetch(code);
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      for (int k = 0; !repeats[i - begin] && k <= D; ++k) ids[k] = table.insert(codes[i - begin][k]);
      std::copy(ids, ids + D + 1, corner_.get() + i * (D + 1));
    }
  }
  std::vector<int64_t> steps;
  for (const int64_t stride : strides) steps.push_back(num_corners * stride - static_cast<int64_t>(step));
  steps.resize(num_corners);
  if (ring) table.insert_ring(steps);
  num_vertices = static_cast<int64_t>(table.keys.size());
  lines_.resize(num_corners);
  at::parallel_for(0, num_corners, 1, [&](int64_t begin, int64_t end) {
    for (int64_t axis = begin; axis < end; ++axis) lines_[axis] = table.lines(steps[axis]);
  });
}

// The points of each vertex in ascending order, so that threads can share the vertices out and sum as one would.
void Lattice::list_entries() {
  const int64_t total = num_points * num_corners;
  first_entry_ = Buffer<int32_t>(num_vertices + 1);
  entries_ = Buffer<LatticeEntry>(total);
  std::fill(first_entry_.get(), first_entry_.get() + num_vertices + 1, 0);
  for (int64_t i = 0; i < total; ++i) ++first_entry_[corner_[i] + 1];
  for (int64_t v = 0; v < num_vertices; ++v) first_entry_[v + 1] += first_entry_[v];
  over_vertices([&](int64_t first, int64_t last) {
    std::vector<int32_t> next(first_entry_.get() + first, first_entry_.get() + last);
    for (int64_t i = 0; i < num_points; ++i) {
      for (int k = 0; k < num_corners; ++k) {
        const int64_t v = corner_[i * num_corners + k];
        if (v < first || v >= last) continue;
        entries_[next[v - first]++] = {static_cast<int32_t>(i), weight_[i * num_corners + k]};
      }
    }
  }, 1);
}

// Calls run(first, last) for ranges of vertices with about the same work, `parts` to a thread.
void Lattice::over_vertices(const std::function<void(int64_t, int64_t)>& run, int parts) const {
  const int64_t tasks = int64_t{parts} * num_threads(), work = num_points * num_corners + num_vertices;
  const auto start = [&](int64_t task) {  // the first vertex with so much work before it
    int64_t low = 0, high = num_vertices;
    while (low < high) {
      const int64_t v = (low + high) / 2;
      (first_entry_[v] + v) * tasks < work * task ? low = v + 1 : high = v;
    }
    return low;
  };
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) run(start(task), start(task + 1));
  });
}

void Lattice::splat(const float* rows, int64_t width, float* table) const {
  if (entries_.get() == nullptr) {
    std::fill(table, table + table_size(width), 0.0f);
    splat_some(rows, width, 0, num_points, table);
    return;
  }
  over_vertices([&](int64_t first, int64_t last) {
    lattice_gather_entries(first_entry_.get() + first, entries_.get(), last - first, rows, width,
                           table + first * width);
  }, 4);
}

void Lattice::splat_some(const float* rows, int64_t width, int64_t begin, int64_t end, float* table) const {
  lattice_splat_rows(corner_.get() + begin * num_corners, weight_.get() + begin * num_corners, num_corners, end - begin,
                     rows, width, table);
}

void Lattice::blur(float* table, int64_t width) const {
  for (size_t pass = 0; pass < num_blurs * lines_.size(); ++pass) {
    const auto& lines = lines_[pass % lines_.size()];
    const auto n = static_cast<int64_t>(lines.size());
    const auto start_of_line = [&](int64_t i) {
      while (i > 0 && i < n && lines[i - 1] >= 0) ++i;
      return i;
    };
    at::parallel_for(0, n, std::max<int64_t>(1, (1 << 15) / width), [&](int64_t begin, int64_t end) {
      begin = start_of_line(begin);
      end = start_of_line(end);
      if (begin < end) lattice_blur_lines(lines.data() + begin, end - begin, width, table);
    });
  }
}

void Lattice::slice(const float* table, int64_t width, float factor, int64_t begin, int64_t end, const float* base,
                    float* rows) const {
  lattice_slice_rows(corner_.get() + begin * num_corners, weight_.get() + begin * num_corners, num_corners, end - begin,
                     table, width, factor, base, rows);
}

void Lattice::normalise() {
  Buffer<float> norm(num_points), table(table_size(1));
  std::fill(norm.get(), norm.get() + num_points, 1.0f);
  splat(norm.get(), 1, table.get());
  blur(table.get(), 1);
  at::parallel_for(0, num_points, kPixelGrain, [&](int64_t begin, int64_t end) {
    std::fill(norm.get() + begin, norm.get() + end, 0.0f);
    slice(table.get(), 1, slice_factor(), begin, end, norm.get() + begin, norm.get() + begin);
    for (int64_t i = begin; i < end; ++i) {
      norm[i] = 1.0f / std::sqrt(norm[i] + 1e-20f);
      for (int k = 0; k < num_corners; ++k) weight_[i * num_corners + k] *= norm[i];
    }
  });
  if (entries_.get() == nullptr) return;
  at::parallel_for(0, num_points * num_corners, kPixelGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) entries_[i].weight *= norm[entries_[i].point];
  });
}

}  // namespace wsss
