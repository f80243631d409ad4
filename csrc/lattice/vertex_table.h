// The hash table of lattice vertices and the lines of neighbours in it. Included by the lattice alone.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "lattice/lattice.h"

namespace wsss {

constexpr int kFetchAhead = 16;  // points or vertices whose table slots are fetched together

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
  // The neighbours of the vertices in use, one step forth and back along each axis.
  void insert_ring(const std::vector<int64_t>& steps) {
    const auto used = static_cast<int64_t>(keys.size());
    for (int64_t v = 0; v < used; ++v) {
      const int64_t key = keys[v], later = keys[std::min(v + 2, used - 1)];
      for (const int64_t step : steps) {
        prefetch(later + step);
        prefetch(later - step);
      }
      for (const int64_t step : steps) {
        insert(key + step);
        insert(key - step);
      }
    }
  }
  // The lines of two or more vertices one step apart; the last vertex v of a line is written ~v.
  std::vector<int32_t> lines(int64_t step) const {
    const auto m = static_cast<int64_t>(keys.size());
    Buffer<int32_t> next(m);
    std::vector<uint8_t> has_previous(m, 0);
    int64_t links = 0, heads = 0;
    for (int64_t begin = 0; begin < m; begin += kFetchAhead) {
      const int64_t end = std::min(m, begin + kFetchAhead);
      for (int64_t v = begin; v < end; ++v) prefetch(keys[v] + step);
      for (int64_t v = begin; v < end; ++v) {
        next[v] = find(keys[v] + step);
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

}  // namespace wsss
