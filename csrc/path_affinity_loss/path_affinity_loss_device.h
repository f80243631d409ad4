// path_affinity_loss on a Device: bodies and the sequence of launches.
#pragma once
#include <algorithm>

#include "device.h"
#include "path_affinity_loss/path_affinity_loss_cuda.h"

namespace wsss {

constexpr int kDirectionGroups = 8;  // items that share the directions of a source

struct PathLabelsBody {
  PathAffinityBatch batch;
  int32_t* labels;
  WSSS_HOST_DEVICE void operator()(int64_t row, int64_t x) const {
    const int64_t i = row * batch.w + x, label = batch.labels[i];
    const bool used = label != batch.ignore_index && label >= 0 && label <= kMaxLabel;
    labels[i] = used ? static_cast<int32_t>(label) : -1;
  }
};

struct PathKeysBody {
  const float* logits;
  int64_t w;
  int32_t* keys;
  WSSS_HOST_DEVICE void operator()(int64_t row, int64_t x) const { keys[row * w + x] = ordered(logits[row * w + x]); }
};

// The pixel of source (row, lane) in the batch; row counts over the images.
struct SourcePlaces {
  PathSources sources;
  int64_t h, w;
  int reach;
  WSSS_HOST_DEVICE int64_t operator()(int64_t row, int64_t lane) const {
    return (row / sources.rows * h + row % sources.rows) * w + lane + reach;
  }
};

struct PathKindsBody {
  SourcePlaces places;
  WalkOffsets offsets;
  const int32_t* labels;
  int32_t* kinds;
  WSSS_HOST_DEVICE void operator()(int64_t row, int64_t lane) const {
    const int32_t* source = labels + places(row, lane);
    int32_t found[4] = {0, 0, 0, 0};
    for (int n = 0; n < offsets.count; ++n) {
      const PairKind kind = kind_of(*source, source[offsets.dy[n] * places.w + offsets.dx[n]]);
      for (int k = 0; k < 4; ++k) found[k] += kind == k;
    }
    for (int k = 0; k < 3; ++k) kinds[3 * (row * places.sources.columns + lane) + k] = found[k];
  }
};

struct PathWinsBody {
  SourcePlaces places;
  WalkOffsets offsets;
  const int32_t *labels, *keys;
  int32_t* won;
  WSSS_HOST_DEVICE void operator()(int64_t row, int64_t lane) const {
    const int64_t start = places(row / kDirectionGroups, lane);
    for (int n = static_cast<int>(row % kDirectionGroups); n < offsets.count; n += kDirectionGroups) {
      const int dy = offsets.dy[n], dx = offsets.dx[n];
      const PairKind kind = kind_of(labels[start], labels[start + dy * places.w + dx]);
      if (kind == kNoPair) continue;
      int32_t best = INT32_MIN;  // below every key
      int64_t winner = start;
      for (int y = 0; y <= dy; ++y) {
        for (int x = dx < 0 ? dx : 0; x <= (dx < 0 ? 0 : dx); ++x) {
          if (!on_path(dy, dx, y, x)) continue;
          const int64_t pixel = start + y * places.w + x;
          if (keys[pixel] > best) {
            best = keys[pixel];
            winner = pixel;
          }
        }
      }
#ifdef __CUDA_ARCH__
      atomicAdd(won + 3 * winner + kind, 1);  // integers: no order shows
#else
      ++won[3 * winner + kind];
#endif
    }
  }
};

struct PathPixelsBody {
  const float* logits;
  int64_t w;
  const int32_t* won;
  const int64_t* counts;
  double* losses;
  float* slopes;
  WSSS_HOST_DEVICE void operator()(int64_t row, int64_t x) const {
    const int64_t i = row * w + x;
    const PixelLoss pixel = pixel_loss(logits[i], won + 3 * i, kind_scales(counts));
    losses[i] = pixel.loss;
    if (slopes != nullptr) slopes[i] = static_cast<float>(pixel.slope);
  }
};

inline SourcePlaces source_places(const PathAffinityBatch& a) {
  return {path_sources(a.radius, a.h, a.w), a.h, a.w, a.radius - 1};
}

template <class Device>
void path_kinds(const Device& device, const PathAffinityBatch& a, int32_t* kinds) {
  const SourcePlaces places = source_places(a);
  const DeviceArray<int32_t> labels(device.memory(), a.batch * a.h * a.w);
  device.for_each(a.batch * a.h, a.w, PathLabelsBody{a, labels.get()});
  device.for_each(a.batch * places.sources.rows, places.sources.columns,
                  PathKindsBody{places, make_offsets(a.radius, a.h, a.w), labels.get(), kinds});
}

template <class Device>
void path_wins(const Device& device, const PathAffinityBatch& a, int32_t* won) {
  const SourcePlaces places = source_places(a);
  const DeviceArray<int32_t> labels(device.memory(), a.batch * a.h * a.w), keys(device.memory(), a.batch * a.h * a.w);
  device.for_each(a.batch * a.h, a.w, PathLabelsBody{a, labels.get()});
  device.for_each(a.batch * a.h, a.w, PathKeysBody{a.logits, a.w, keys.get()});
  device.for_each(a.batch * places.sources.rows * kDirectionGroups, places.sources.columns,
                  PathWinsBody{places, make_offsets(a.radius, a.h, a.w), labels.get(), keys.get(), won});
}

template <class Device>
void path_pixels(const Device& device, const PathAffinityBatch& a, const int32_t* won, const int64_t* counts,
                 double* losses, float* slopes) {
  device.for_each(a.batch * a.h, a.w, PathPixelsBody{a.logits, a.w, won, counts, losses, slopes});
}

}  // namespace wsss
