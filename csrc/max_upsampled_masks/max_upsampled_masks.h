// Maximum over bilinearly upsampled masks. Defined by kernels/max_upsampled_masks/reference.py.
//
// Letters: B images, P (image, class) pairs, h w patch grid, N = h * w, Ho Wo size of the maps.
#pragma once
#include "bilinear.h"
#include "radius_mask/radius_mask.h"

namespace wsss {

// CPU.
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
