// Dense CRF: parameters and the torch-free loops. The op is defined by kernels/dense_crf/reference.py.
//
// Letters: K classes, L live classes (those that get messages), N pixels. Class maps are planes of `plane` floats;
// inside, values are rows of `width` floats per pixel: the L live classes, then padding (lattice_width).
#pragma once
#include <cstdint>

#include "device.h"

namespace wsss {

enum class Mode { fast, ring, exact };

struct DenseCrfParams {
  float spatial_sigma, spatial_weight;
  float sigma_xy, sigma_rgb, weight;
  int64_t iterations;
  float prune;
  Mode mode;
};

// Run of pixels: `count` of them, class maps at offset `plane_at` from the start of a plane.
constexpr int64_t kCrfChunk = 64;

// class_max [K] = max(itself, Q0 = softmax(-unary)) over `n` pixels; scratch holds K * kCrfChunk floats, n <= kCrfChunk.
void crf_class_max(const float* unary, int64_t plane, int64_t classes, int64_t n, float* scratch, float* class_max);
// The classes without messages: their largest -U in `base` [n] and sum exp(-U - base) in `rest` [n].
void crf_dropped(const float* unary, int64_t plane, const int64_t* dropped, int64_t num_dropped, int64_t n, float* base,
                 float* rest);
// rows [n, width] = -unary of the live classes; -inf in the padding.
void crf_load(const float* unary, int64_t plane, const int64_t* live, int64_t num_live, int64_t n, int64_t width,
              float* rows);
// rows <- softmax over live and dropped classes, n <= kCrfChunk; base and rest may be null. top [n]: the largest
// exponent; inverse [n]: 1 / sum exp(. - top).
void crf_softmax(float* rows, int64_t n, int64_t width, const float* base, const float* rest, float* top,
                 float* inverse);
// Class maps of `n` pixels, out of the rows and, for dropped classes, of the unary.
void crf_store(const float* rows, int64_t n, int64_t width, const int64_t* live, int64_t num_live,
               const int64_t* dropped, int64_t num_dropped, const float* unary, const float* top, const float* inverse,
               int64_t plane, float* out);

// CUDA.
struct DenseCrfBatch {
  const float *unary, *image;  // [B, K, h, w], [B, 3, h, w] on the device
  float* out;                  // as unary; 0 outside the images
  int64_t batch, classes, h, w;
  const int64_t* sizes;  // on the host: a height and a width per image; null: h and w
  int64_t images_at_once;
};

// All marginals of the batch on `stream`; false if the features span too many cells. Waits for the device once per part
// of the batch, to read the number of vertices, and once more for the number of live classes if prune > 0.
bool dense_crf_cuda(const DenseCrfBatch& batch, const DenseCrfParams& params, DeviceMemory memory, DeviceStream stream);

}  // namespace wsss
