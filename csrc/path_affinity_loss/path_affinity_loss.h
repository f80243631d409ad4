// Affinity loss on the paths of an edge map: the parts shared by CPU and GPU, without torch. The op is defined by
// kernels/path_affinity_loss/reference.py; directions and paths are those of random_walk.h.
//
// The loss of a pair depends on its kind and on one pixel alone, the winner: the first of the highest logits on its path.
// So the pairs are counted by kind and winner, in integers, whose sum no order changes; what is left is per pixel.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "host_device.h"
#include "random_walk/random_walk.h"

namespace wsss {

constexpr double kAffinityEps = 1e-5;
constexpr int64_t kMaxLabel = 32766;

enum PairKind { kBackground, kForeground, kNegative, kNoPair };

WSSS_HOST_DEVICE constexpr double kind_weight(int kind) { return kind == kNegative ? 0.5 : 0.25; }

// Labels are >= 0 here, ignored ones < 0.
WSSS_HOST_DEVICE constexpr PairKind kind_of(int32_t source, int32_t target) {
  if (source < 0 || target < 0) return kNoPair;
  return source != target ? kNegative : source == 0 ? kBackground : kForeground;
}

// Integers in the order of the numbers: -0 and 0 are one, NaN is the highest.
WSSS_HOST_DEVICE inline int32_t ordered(float x) {
  if (x != x) return INT32_MAX;
  x += 0.0f;
  int32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits < 0 ? bits ^ INT32_MAX : bits;
}

// The pixels whose half of the neighbourhood lies inside the map: rows from 0, columns from radius - 1.
struct PathSources {
  int64_t rows, columns;
};
inline PathSources path_sources(int radius, int64_t h, int64_t w) {
  const int64_t rows = h - radius + 1, columns = w - 2 * radius + 2;
  return rows > 0 && columns > 0 ? PathSources{rows, columns} : PathSources{0, 0};
}

// Divides the sums of the kinds: weight / (pairs of the kind + eps).
struct KindScales {
  double of[3];
};
WSSS_HOST_DEVICE inline KindScales kind_scales(const int64_t* counts) {
  KindScales s;
  for (int k = 0; k < 3; ++k) s.of[k] = kind_weight(k) / (static_cast<double>(counts[k]) + kAffinityEps);
  return s;
}

struct PixelLoss {
  double loss, slope;  // slope: d loss / d logit
};
// The part of the pairs that a pixel of this logit has won, `won` of each kind.
WSSS_HOST_DEVICE inline PixelLoss pixel_loss(float logit, const int32_t* won, const KindScales& scales) {
  const double t = exp(-fabs(static_cast<double>(logit))), big = 1 / (1 + t), small = t * big;
  const double edge = logit >= 0 ? big : small, affinity = logit >= 0 ? small : big;
  const double positive = won[kBackground] * scales.of[kBackground] + won[kForeground] * scales.of[kForeground];
  const double negative = won[kNegative] * scales.of[kNegative];
  PixelLoss p{0, 0};
  if (positive != 0) p.loss -= positive * log(affinity + kAffinityEps);
  if (negative != 0) p.loss -= negative * log(edge + kAffinityEps);
  p.slope = edge * affinity * (positive / (affinity + kAffinityEps) - negative / (edge + kAffinityEps));
  return p;
}

// CPU: a rectangle of sources with all pixels that their paths touch, `reach` = radius - 1 more on the left, on the
// right and below. Its pixels are numbered row by row, `stride` a row.
constexpr int64_t kTileRows = 32, kTileColumns = 128;
constexpr int64_t kTileLanes = 16;
constexpr int64_t kTilePixels = 16384;  // at most: 4 slots for each fill 16 bits
static_assert((kTileRows + kWalkMaxRadius - 1) * (kTileColumns + 2 * kWalkMaxRadius - 2) <= kTilePixels);

struct PathTile {
  int64_t rows, columns;          // of sources
  int64_t height, width, stride;  // of pixels; columns rounded up to whole vectors fit into a row
};
inline PathTile path_tile(int64_t rows, int64_t columns, int radius) {
  const int64_t reach = radius - 1, lanes = (columns + kTileLanes - 1) / kTileLanes * kTileLanes;
  return {rows, columns, rows + reach, columns + 2 * reach, lanes + 2 * reach};
}

class PathCounter {
 public:
  PathCounter(const WalkOffsets& offsets, int radius, const PathTile& tile);
  // The labels [height, width] of a tile lie w apart, those equal to `ignore_index` take no part.
  void set_labels(const int64_t* labels, int64_t w, int64_t ignore_index);
  void set_logits(const float* logits, int64_t w);
  // Number of pairs of each kind, added to `counts` [3]. Needs the labels.
  void count_kinds(int64_t* counts);
  // Number of pairs that each pixel has won. Needs labels and logits.
  void count_winners();
  // [4]: how many pairs of each kind the pixel (y, x) of the tile has won.
  const uint16_t* won(int64_t y, int64_t x) const { return slots_.data() + 4 * rank_[y * tile_.width + x]; }

 private:
  struct Direction {
    int64_t target;                 // from the source
    std::vector<int64_t> segments;  // where in `highest_` the parts of the path start
  };
  void fill_tables();

  PathTile tile_;
  int radius_;
  int64_t plane_;  // of a table
  std::vector<Direction> directions_;
  std::vector<int16_t> labels_;    // [height, stride], -1: no pair
  std::vector<int16_t> highest_;   // [2 radius - 1, plane]: of 1 .. radius pixels in a row, of 2 .. radius in a column
  std::vector<uint16_t> rank_;     // [height, width]: ascending by logit, equal ones from the last to the first
  std::vector<uint64_t> sorted_, other_;
  std::vector<uint16_t> slots_;    // [rank, kind]; enough, as fewer than 10,000 paths lead over a pixel
};

}  // namespace wsss
