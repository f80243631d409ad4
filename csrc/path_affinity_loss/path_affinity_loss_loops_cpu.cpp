// The inner loops of path_affinity_loss on the CPU: no torch header, one clone per instruction set.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <utility>

#include "clones.h"
#include "path_affinity_loss/path_affinity_loss.h"

namespace wsss {
namespace {

typedef int16_t Vec16 __attribute__((vector_size(32)));
typedef int16_t Loose16 __attribute__((vector_size(32), aligned(2)));
static_assert(sizeof(Vec16) == sizeof(int16_t) * kTileLanes);

// A table holds 4 rank - kSlotZero: signed, since SSE2 has no maximum of unsigned numbers; the kind fits below.
constexpr int32_t kSlotZero = 32768;
constexpr int64_t kSlack = 64;  // behind the last row of a table, for whole vectors

WSSS_INLINE Vec16 load16(const int16_t* p) { return *reinterpret_cast<const Loose16*>(p); }
WSSS_INLINE void store16(int16_t* p, const Vec16& v) { *reinterpret_cast<Loose16*>(p) = v; }
WSSS_INLINE Vec16 larger16(const Vec16& a, const Vec16& b) { return a > b ? a : b; }

// The PairKind of each lane. Without comparisons, which GCC makes lane by lane where registers are shorter than these.
WSSS_INLINE Vec16 kinds16(const Vec16& source, const Vec16& target) {
  static_assert(kBackground == 0 && kForeground == 1 && kNegative == 2 && kNoPair == 3);
  const Vec16 change = source ^ target;
  const Vec16 differ = (change | -change) >> 15, foreground = -source >> 15, ignored = (source | target) >> 15;  // 0, -1
  return (differ & 2) | (~differ & foreground & 1) | (ignored & 3);
}

WSSS_CLONES
void highest_of_two(const int16_t* a, const int16_t* b, int64_t n, int16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::max(a[i], b[i]);
}

// The slot of each source of a row for one direction.
WSSS_CLONES
void slot_row(const int16_t* highest, const int64_t* segments, int64_t num_segments, const int16_t* source,
              const int16_t* target, int64_t columns, int16_t* slots) {
  for (int64_t x = 0; x < columns; x += kTileLanes) {
    Vec16 best = load16(highest + segments[0] + x);
    for (int64_t s = 1; s < num_segments; ++s) best = larger16(best, load16(highest + segments[s] + x));
    store16(slots + x, best | kinds16(load16(source + x), load16(target + x)));
  }
}

WSSS_CLONES
void kind_row(const int16_t* source, const int16_t* target, int64_t columns, int64_t* counts) {
  Vec16 found[3] = {};
  for (int64_t x = 0; x + kTileLanes <= columns; x += kTileLanes) {
    const Vec16 kind = kinds16(load16(source + x), load16(target + x));
    for (int k = 0; k < 3; ++k) found[k] -= (Vec16)(kind == static_cast<int16_t>(k));
  }
  for (int k = 0; k < 3; ++k) {
    for (int64_t i = 0; i < kTileLanes; ++i) counts[k] += found[k][i];
  }
  for (int64_t x = columns / kTileLanes * kTileLanes; x < columns; ++x) {
    const PairKind kind = kind_of(source[x], target[x]);
    if (kind != kNoPair) ++counts[kind];
  }
}

// Neighbours often have the same winner: four places of the row in turn, so that no increment waits for the last.
void add_to_slots(const int16_t* places, int64_t n, uint16_t* slots) {
  uint16_t* middle = slots + kSlotZero;
  const int64_t quarter = n / 4;
  const int16_t *p1 = places + quarter, *p2 = p1 + quarter, *p3 = p2 + quarter;
  for (int64_t i = 0; i < quarter; ++i) {
    ++middle[places[i]];
    ++middle[p1[i]];
    ++middle[p2[i]];
    ++middle[p3[i]];
  }
  for (int64_t i = 4 * quarter; i < n; ++i) ++middle[places[i]];
}

// Sorts by the upper half of each item; stable.
void sort_by_upper_half(std::vector<uint64_t>& items, std::vector<uint64_t>& other) {
  constexpr int bits = 11, passes = 3;
  std::array<std::array<uint32_t, 1 << bits>, passes> start{};
  const auto digit = [](uint64_t item, int pass) { return (item >> (32 + bits * pass)) & ((1 << bits) - 1); };
  for (const uint64_t item : items) {
    for (int pass = 0; pass < passes; ++pass) ++start[pass][digit(item, pass)];
  }
  for (int pass = 0; pass < passes; ++pass) {
    uint32_t total = 0;
    for (uint32_t& count : start[pass]) total += std::exchange(count, total);
    for (const uint64_t item : items) other[start[pass][digit(item, pass)]++] = item;
    items.swap(other);
  }
}

}  // namespace

PathCounter::PathCounter(const WalkOffsets& offsets, int radius, const PathTile& tile)
    : tile_(tile), radius_(radius), plane_(tile.height * tile.stride + kSlack), directions_(offsets.count),
      labels_(plane_), highest_((2 * radius - 1) * plane_), rank_(tile.height * tile.width), sorted_(rank_.size()),
      other_(rank_.size()), slots_(2 * kSlotZero) {
  for (int n = 0; n < offsets.count; ++n) {
    const int dy = offsets.dy[n], dx = offsets.dx[n], left = std::min(dx, 0), right = std::max(dx, 0);
    Direction& d = directions_[n];
    d.target = dy * tile.stride + dx;
    // The cells of a path lie next to each other in each row and in each column: the fewer parts, the better.
    const bool by_rows = dy < std::abs(dx);
    for (int i = by_rows ? 0 : left; i <= (by_rows ? dy : right); ++i) {
      int first = 0, length = 0;
      for (int j = by_rows ? left : 0; j <= (by_rows ? right : dy); ++j) {
        if (by_rows ? !on_path(dy, dx, i, j) : !on_path(dy, dx, j, i)) continue;
        if (length++ == 0) first = j;
      }
      const int table = by_rows || length == 1 ? length - 1 : radius + length - 2;
      d.segments.push_back(table * plane_ + (by_rows ? i * tile.stride + first : first * tile.stride + i));
    }
  }
}

void PathCounter::set_labels(const int64_t* labels, int64_t w, int64_t ignore_index) {
  for (int64_t y = 0; y < tile_.height; ++y) {
    for (int64_t x = 0; x < tile_.width; ++x) {
      const int64_t label = labels[y * w + x];
      labels_[y * tile_.stride + x] = label == ignore_index ? -1 : static_cast<int16_t>(label);
    }
  }
}

void PathCounter::set_logits(const float* logits, int64_t w) {
  const int64_t pixels = tile_.height * tile_.width;
  for (int64_t y = 0; y < tile_.height; ++y) {
    for (int64_t x = 0; x < tile_.width; ++x) {
      const int64_t pixel = y * tile_.width + x;
      const uint64_t key = static_cast<uint32_t>(ordered(logits[y * w + x])) ^ 0x80000000u;
      sorted_[pixels - 1 - pixel] = key << 32 | static_cast<uint64_t>(pixel);
    }
  }
  sort_by_upper_half(sorted_, other_);
  for (int64_t i = 0; i < pixels; ++i) rank_[static_cast<uint32_t>(sorted_[i])] = static_cast<uint16_t>(i);
  fill_tables();
}

void PathCounter::fill_tables() {
  int16_t* single = highest_.data();
  for (int64_t y = 0; y < tile_.height; ++y) {
    for (int64_t x = 0; x < tile_.width; ++x) {
      single[y * tile_.stride + x] = static_cast<int16_t>(4 * rank_[y * tile_.width + x] - kSlotZero);
    }
  }
  int16_t* columns = single + (radius_ - 1) * plane_;  // + (length - 1) planes
  for (int length = 2; length <= radius_; ++length) {
    int16_t* row = single + (length - 1) * plane_;
    highest_of_two(row - plane_, single + length - 1, plane_ - length + 1, row);
    int16_t* column = columns + (length - 1) * plane_;
    const int64_t jump = (length - 1) * tile_.stride;
    if (jump < plane_) highest_of_two(length == 2 ? single : column - plane_, single + jump, plane_ - jump, column);
  }
}

void PathCounter::count_kinds(int64_t* counts) {
  for (int64_t y = 0; y < tile_.rows; ++y) {
    const int16_t* source = labels_.data() + y * tile_.stride + radius_ - 1;
    for (const Direction& d : directions_) kind_row(source, source + d.target, tile_.columns, counts);
  }
}

void PathCounter::count_winners() {
  std::fill_n(slots_.begin(), 4 * rank_.size(), 0);
  std::array<int16_t, kTileColumns> places;
  for (int64_t y = 0; y < tile_.rows; ++y) {
    const int64_t start = y * tile_.stride + radius_ - 1;
    const int16_t* source = labels_.data() + start;
    for (const Direction& d : directions_) {
      slot_row(highest_.data() + start, d.segments.data(), static_cast<int64_t>(d.segments.size()), source,
               source + d.target, tile_.columns, places.data());
      add_to_slots(places.data(), tile_.columns, slots_.data());
    }
  }
}

}  // namespace wsss
