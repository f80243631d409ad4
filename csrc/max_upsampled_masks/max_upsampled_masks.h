// Maximum over bilinearly upsampled masks. Defined by kernels/max_upsampled_masks/reference.py.
//
// Letters: B images, P (image, class) pairs, h w patch grid, N = h * w, Ho Wo size of the maps.
#pragma once
#include "radius_mask/radius_mask.h"

namespace wsss {

// The two cells that a pixel lies between on one axis, and their weights.
template <class T>
struct Tap {
  int32_t low, high;
  T low_weight, high_weight;
};

// Half-pixel centres, edges clamped. On the device the product and the sum round separately, as on the host.
template <class T>
WSSS_BOTH inline Tap<T> axis_tap(int64_t pixel, int64_t num_in, int64_t num_out) {
  const T scale = static_cast<T>(static_cast<double>(num_in) / static_cast<double>(num_out));
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

// CPU. Pixels of one axis with the same two cells.
struct TapRun {
  int64_t begin, end;
  int32_t low, high;
};
constexpr int64_t kUpsampleLanes = 8;  // arrays of pixels have room for that many more than they hold
// One row of cells to one row of pixels; low and high are the weights of each pixel.
void upsample_row(const float* cells, const std::vector<TapRun>& runs, const float* low, const float* high, float* out);
void upsample_row(const double* cells, const std::vector<TapRun>& runs, const double* low, const double* high,
                  double* out);

// A member of a pair, upsampled along x, over the pixel rows that lie between two rows of cells.
template <class T>
struct BandMember {
  const T *top, *bottom;
  int64_t begin, end;  // pixel columns beyond which both rows are 0
  int32_t patch;
};
template <class T>
struct Band {
  const BandMember<T>* members;
  int64_t num_members, rows, width;
  const Tap<T>* taps;  // of each row; their weights alone are used
};
// best and winner [rows, width] are updated: a larger value takes the pixel.
void max_band(const Band<float>& band, float* best, int32_t* winner);
void max_band(const Band<double>& band, double* best, int32_t* winner);

// CUDA, on `stream`. best, grad and total are float32, float64 for float64 logits.
struct UpsampleArrays {
  const void* logits;      // [B, N, N]
  Scalar type;             // of the logits
  const int64_t* pairs;    // [P, 2]
  const uint8_t* members;  // [P, N]
  int64_t images, num_pairs, h, w, out_h, out_w;
  Disc disc;
};
void max_upsampled_masks_cuda(const UpsampleArrays& a, void* best, int32_t* winner, DeviceStream stream);
void max_upsampled_masks_backward_cuda(const UpsampleArrays& a, const void* grad, const int32_t* winner, void* result,
                                       DeviceStream stream);

}  // namespace wsss
