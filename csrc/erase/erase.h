// Erasing the region of a class from images. Defined by kernels/erase/reference.py.
//
// Letters: B images, H W their pixels, h w the class maps. "Up" is the bilinear resize of the positive part of a map.
#pragma once
#include "bilinear.h"
#include "host_device.h"
#include "scalar.h"

namespace wsss {

constexpr double kEraseEps = 1e-5;
constexpr int64_t kEraseColours = 3;
constexpr int64_t kEraseMaxSide = int64_t{1} << 24;  // beyond, float32 does not tell neighbouring pixels apart

template <class T>
WSSS_HOST_DEVICE inline T positive_part(T value) {
  return value < T(0) ? T(0) : value;  // a NaN stays one
}

// Bilinear interpolation in this form gives a plateau its exact value, and no value beyond its ends.
template <class T>
WSSS_HOST_DEVICE inline T between(T low, T high, T weight) {
#ifdef __CUDA_ARCH__
  return fma(weight, high - low, low);
#else
  return low + weight * (high - low);
#endif
}

// The larger one, NaN if one is.
template <class T>
WSSS_HOST_DEVICE inline T larger_or_nan(T best, T value) {
  return value > best || value != value ? value : best;
}

// CPU. Rows of pixels. `top` and `bottom` are the two rows of cells around a row of pixels, resized along x; `weight`
// is that of the bottom one.
void erase_widen_row(const float* cells, const std::vector<TapRun>& runs, const float* weights, float* out);
void erase_widen_row(const double* cells, const std::vector<TapRun>& runs, const double* weights, double* out);
// keep = 1 - Up * scale.
void erase_soft_row(const float* top, const float* bottom, float weight, float scale, int64_t width, float* keep);
void erase_soft_row(const double* top, const double* bottom, double weight, double scale, int64_t width, double* keep);
// keep = 1 where Up / peak <= threshold, else 0.
void erase_hard_row(const float* top, const float* bottom, float weight, float peak, float threshold, int64_t width,
                    float* keep);
void erase_hard_row(const double* top, const double* bottom, double weight, double peak, double threshold,
                    int64_t width, double* keep);
// out = pixels * keep; `select`: pixels where keep is not 0.
void erase_apply_row(const float* pixels, const float* keep, bool select, int64_t width, float* out);
void erase_apply_row(const double* pixels, const double* keep, bool select, int64_t width, double* out);
// With q = sum over the colours of grad * pixels: top += (1 - weight) q, bottom += weight q.
void erase_gather_row(const float* const* grad, const float* const* pixels, float weight, int64_t width, float* top,
                      float* bottom);
void erase_gather_row(const double* const* grad, const double* const* pixels, double weight, int64_t width, double* top,
                      double* bottom);

// CUDA, on `stream`. Images and gradients of images have the given type; all else is float, double for f64.
struct EraseSizes {
  int64_t images, h, w, height, width;
};
constexpr int64_t kEraseThreads = 128;
// peaks [B]: the largest value of Up of each image.
void erase_peaks_cuda(const void* maps, Scalar type, const EraseSizes& sizes, void* peaks, DeviceStream stream);
// maximum [1]: the largest of peaks [B].
void erase_maximum_cuda(const void* peaks, Scalar type, int64_t images, void* maximum, DeviceStream stream);
// counts [B] is scratch.
void erase_maximum_backward_cuda(const void* grad, const void* maximum, const void* maps, Scalar type,
                                 const EraseSizes& sizes, int64_t* counts, void* result, DeviceStream stream);
// peaks: [1] for all images, with `hard` [B].
void erase_apply_cuda(const void* images, Scalar type, const void* maps, const void* peaks, bool hard, double threshold,
                      const EraseSizes& sizes, void* out, DeviceStream stream);
// sums [B, h, 2, W] of float (double) and parts [B, h * w / kEraseThreads rounded up] are
// scratch.
void erase_soft_backward_cuda(const void* grad, const void* images, Scalar type, const void* maps, const void* maximum,
                              const EraseSizes& sizes, void* sums, double* parts, void* result, void* grad_maximum,
                              DeviceStream stream);

}  // namespace wsss
