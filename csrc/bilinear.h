// Taps of bilinear resizing with half-pixel centres (align_corners=False), one axis at a time.
#pragma once
#include <cstdint>
#include <vector>

#include "host_device.h"

namespace wsss {

// The two cells that a pixel lies between on one axis, and their weights.
template <class T>
struct Tap {
  int32_t low, high;
  T low_weight, high_weight;
};

// Cells per pixel of one axis.
template <class T>
WSSS_HOST_DEVICE inline T axis_scale(int64_t num_in, int64_t num_out) {
  return static_cast<T>(static_cast<double>(num_in) / static_cast<double>(num_out));
}

// Half-pixel centres, edges clamped. On the device the product and the sum round separately, as on the host.
template <class T>
WSSS_HOST_DEVICE inline Tap<T> scaled_tap(int64_t pixel, int64_t num_in, T scale) {
#ifdef __CUDA_ARCH__
  T place;
  if constexpr (sizeof(T) == 4) {
    place = __fadd_rn(__fmul_rn(static_cast<T>(pixel) + T(0.5), scale), T(-0.5));
  } else {
    place = __dadd_rn(__dmul_rn(static_cast<T>(pixel) + T(0.5), scale), T(-0.5));
  }
#else
  T place = (static_cast<T>(pixel) + T(0.5)) * scale - T(0.5);
#endif
  place = place > 0 ? place : T(0);
  const int64_t cell = static_cast<int64_t>(place), low = cell < num_in - 1 ? cell : num_in - 1;
  const T weight = place - static_cast<T>(low);
  return {static_cast<int32_t>(low), static_cast<int32_t>(low + 1 < num_in ? low + 1 : low), T(1) - weight, weight};
}

template <class T>
WSSS_HOST_DEVICE inline Tap<T> axis_tap(int64_t pixel, int64_t num_in, int64_t num_out) {
  return scaled_tap<T>(pixel, num_in, axis_scale<T>(num_in, num_out));
}

template <class T>
inline std::vector<Tap<T>> taps_of(int64_t num_in, int64_t num_out) {
  std::vector<Tap<T>> taps(num_out);
  for (int64_t i = 0; i < num_out; ++i) taps[i] = axis_tap<T>(i, num_in, num_out);
  return taps;
}

// Pixels of one axis with the same two cells.
struct TapRun {
  int64_t begin, end;
  int32_t low, high;
};

template <class T>
inline std::vector<TapRun> runs_of(const std::vector<Tap<T>>& taps) {
  std::vector<TapRun> runs;
  for (int64_t i = 0; i < static_cast<int64_t>(taps.size()); ++i) {
    if (runs.empty() || runs.back().low != taps[i].low) runs.push_back({i, i, taps[i].low, taps[i].high});
    runs.back().end = i + 1;
  }
  return runs;
}

}  // namespace wsss
