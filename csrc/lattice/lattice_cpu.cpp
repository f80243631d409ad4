// The lattice as a class: index of the vertices, threads.
#include "lattice/lattice.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <mutex>

namespace wsss {
namespace {

constexpr int64_t kPixelGrain = 4096;  // points per task of a parallel loop; a multiple of 8
constexpr int kAhead = 16;             // points or vertices whose table slots are fetched together

// Key -> number of the vertex in the order of first insertion. Open addressing, at most half full.
class VertexTable {
 public:
  explicit VertexTable(int64_t expected) {
    while ((int64_t{1} << bits_) < 2 * expected) ++bits_;
    slots_.assign(int64_t{1} << bits_, {0, -1});
  }
  void prefetch(int64_t key) const { __builtin_prefetch(&slots_[home(key)]); }
  int32_t find(int64_t key) const { return slots_[probe(key)].id; }
  int32_t insert(int64_t key) {
    Slot& slot = slots_[probe(key)];
    if (slot.id >= 0) return slot.id;
    const auto id = static_cast<int32_t>(keys.size());
    slot = {key, id};
    keys.push_back(key);
    if (2 * keys.size() > slots_.size()) grow();
    return id;
  }
  std::vector<int64_t> keys;

 private:
  struct Slot {
    int64_t key;
    int32_t id;  // -1: empty
  };
  uint64_t home(int64_t key) const { return (static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15u) >> (64 - bits_); }
  uint64_t probe(int64_t key) const {
    uint64_t at = home(key);
    while (slots_[at].id >= 0 && slots_[at].key != key) at = (at + 1) & (slots_.size() - 1);
    return at;
  }
  void grow() {
    bits_ += 2;
    slots_.assign(int64_t{1} << bits_, {0, -1});
    for (size_t id = 0; id < keys.size(); ++id) slots_[probe(keys[id])] = {keys[id], static_cast<int32_t>(id)};
  }
  int bits_ = 10;
  std::vector<Slot> slots_;
};

// Mixed-radix strides of the keys with room for the corners of the simplices and their neighbours; 0 for the implied
// last coordinate.
std::array<int64_t, kMaxCorners> key_strides(const int32_t* low, const int32_t* high, int d) {
  std::array<int64_t, kMaxCorners> strides{};
  int64_t size = 1;
  for (int i = 0; i < d; ++i) {
    strides[i] = size;
    const bool fits = !__builtin_mul_overflow(size, int64_t{high[i]} - low[i] + 4 * (d + 1) + 1, &size);
    TORCH_CHECK_VALUE(fits, kLatticeTooSmall);
  }
  return strides;
}

// Number of the vertex one step along the axis, or -1; then the lines of such steps.
std::vector<int32_t> find_lines(const VertexTable& table, int64_t step) {
  const auto m = static_cast<int64_t>(table.keys.size());
  Buffer<int32_t> next(m);
  std::vector<uint8_t> has_previous(m, 0);
  int64_t links = 0, heads = 0;
  for (int64_t begin = 0; begin < m; begin += kAhead) {
    const int64_t end = std::min(m, begin + kAhead);
    for (int64_t v = begin; v < end; ++v) table.prefetch(table.keys[v] + step);
    for (int64_t v = begin; v < end; ++v) {
      next[v] = table.find(table.keys[v] + step);
      if (next[v] >= 0) {
        has_previous[next[v]] = 1;
        ++links;
      }
    }
  }
  for (int64_t v = 0; v < m; ++v) heads += next[v] >= 0 && !has_previous[v];
  std::vector<int32_t> lines;
  lines.reserve(links + heads);
  for (int64_t head = 0; head < m; ++head) {
    if (next[head] < 0 || has_previous[head]) continue;
    auto v = static_cast<int32_t>(head);
    for (; next[v] >= 0; v = next[v]) lines.push_back(v);
    lines.push_back(~v);
  }
  return lines;
}

int num_shares() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

}  // namespace

void over_images(int64_t batch, const std::function<void(int64_t)>& run) {
  const int64_t threads = num_shares(), whole = threads > 1 ? batch / threads * threads : 0;
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

Lattice::Lattice(const Buffer<float>& features, int64_t n, int d) : num_points(n), num_corners(d + 1) {
  TORCH_CHECK_VALUE(n > 0 && n < INT32_MAX / kMaxCorners, "lattice: too many points, got ", n);
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
  d == 2 ? index<2>(vertex.get(), rank.get(), low, high) : index<5>(vertex.get(), rank.get(), low, high);
  if (num_shares() > 1) share_out();
}

template <int D>
void Lattice::index(const int32_t* vertex, const uint32_t* rank, const int32_t* low, const int32_t* high) {
  const int64_t padded = padded_points(num_points);
  const auto strides = key_strides(low, high, D);
  int64_t step = 0, origin = 0;
  for (int i = 0; i < D; ++i) {
    step += strides[i];
    origin += (low[i] - 2 * num_corners) * strides[i];
  }
  VertexTable table(num_points / 16);
  int64_t codes[kAhead][kMaxCorners];
  int64_t last_code[kMaxCorners], previous_code = -1;
  int32_t last_id[kMaxCorners];
  uint32_t previous_rank = 0;
  std::fill(last_code, last_code + kMaxCorners, -1);
  for (int64_t begin = 0; begin < num_points; begin += kAhead) {
    const int64_t end = std::min(num_points, begin + kAhead);
    for (int64_t i = begin; i < end; ++i) {
      int64_t* code = codes[i - begin];
      code[0] = -origin;
      for (int j = 0; j < D; ++j) code[0] += vertex[j * padded + i] * strides[j];
      if (code[0] == previous_code && rank[i] == previous_rank) {
        code[0] = -1;  // the simplex of the point before
        continue;
      }
      previous_code = code[0];
      previous_rank = rank[i];
      int64_t stride_of_rank[16] = {};
      for (int j = 0; j < D; ++j) stride_of_rank[rank[i] >> (4 * j) & 15] = strides[j];
      for (int k = 1; k <= D; ++k) code[k] = code[k - 1] + step - (D + 1) * stride_of_rank[D - k + 1];
      for (int k = 0; k <= D; ++k) table.prefetch(code[k]);
    }
    for (int64_t i = begin; i < end; ++i) {
      const int64_t* code = codes[i - begin];
      for (int k = 0; code[0] != -1 && k <= D; ++k) {
        if (code[k] == last_code[k]) continue;
        last_code[k] = code[k];
        last_id[k] = table.insert(code[k]);
      }
      std::copy(last_id, last_id + D + 1, corner_.get() + i * (D + 1));
    }
  }
  num_vertices = static_cast<int64_t>(table.keys.size());
  lines_.resize(num_corners);
  at::parallel_for(0, num_corners, 1, [&](int64_t begin, int64_t end) {
    for (int64_t axis = begin; axis < end; ++axis) lines_[axis] = find_lines(table, num_corners * strides[axis] - step);
  });
}

// One share per thread: a range of vertices and the entries that go to it. The ranges only balance the work.
void Lattice::share_out() {
  constexpr int64_t kEvery = 8;  // every so many points are counted
  const int threads = num_shares();
  std::vector<int32_t> load(num_vertices, 0);
  int64_t total = 0;
  for (int64_t i = 0; i < num_points; i += kEvery) {
    for (int k = 0; k < num_corners; ++k, ++total) ++load[corner_[i * num_corners + k]];
  }
  std::vector<int64_t> bound{0};
  int64_t sum = 0;
  for (int64_t v = 0; v < num_vertices; ++v) {
    if (sum * threads >= total * static_cast<int64_t>(bound.size())) bound.push_back(v);
    sum += load[v];
  }
  bound.resize(threads + 1, num_vertices);
  bound.back() = num_vertices;
  shares_.resize(threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      shares_[t].reserve(num_points * num_corners / threads + num_points / 2);
      for (int64_t i = 0; i < num_points; ++i) {
        for (int k = 0; k < num_corners; ++k) {
          const int32_t v = corner_[i * num_corners + k];
          if (v < bound[t] || v >= bound[t + 1]) continue;
          shares_[t].push_back({static_cast<int32_t>(i), v, weight_[i * num_corners + k]});
        }
      }
    }
  });
}

void Lattice::splat(const float* rows, int64_t width, float* table) const {
  if (shares_.empty()) {
    std::fill(table, table + table_size(width), 0.0f);
    splat_some(rows, width, 0, num_points, table);
    return;
  }
  at::parallel_for(0, table_size(width), 1 << 16,
                   [&](int64_t begin, int64_t end) { std::fill(table + begin, table + end, 0.0f); });
  at::parallel_for(0, shares_.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      lattice_splat_entries(shares_[t].data(), shares_[t].size(), rows, width, table);
    }
  });
}

void Lattice::splat_some(const float* rows, int64_t width, int64_t begin, int64_t end, float* table) const {
  lattice_splat_rows(corner_.get() + begin * num_corners, weight_.get() + begin * num_corners, num_corners, end - begin,
                     rows, width, table);
}

void Lattice::blur(float* table, int64_t width) const {
  for (const auto& lines : lines_) {
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
  at::parallel_for(0, shares_.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (auto& entry : shares_[t]) entry.weight *= norm[entry.point];
    }
  });
}

}  // namespace wsss
