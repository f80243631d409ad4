// Prohibitive segmentation loss. Defined by kernels/psl_loss/reference.py.
//
// Letters: B images, K classes with background first, N pixels of an image, S the type of the logits.
#pragma once
#include <cstdint>

#include "host_device.h"
#include "scalar.h"

namespace wsss {

constexpr int64_t kPslMaxClasses = 255;  // the mask is uint8

// CPU: pixels of an image, planes `stride` apart. What works on tiles takes kPslBlock pixels at a time.
constexpr int64_t kPslBlock = 32;
struct PslTile {
  const float* logits;
  int64_t stride, classes, pixels;
};
// mask: the first class of the highest logit + log weight; top: the highest logit; log_sum: ln sum exp(logit - top).
// Returns whether a logit is NaN or infinite.
bool psl_forward_tile(const PslTile& tile, const float* log_weights, uint8_t* mask, float* top, float* log_sum);
// out [K, pixels] = share softmax(logits), planes `out_stride` apart.
void psl_backward_tile(const PslTile& tile, const float* share, float* out, int64_t out_stride);

// CUDA, on `stream`. All tensors are contiguous.
struct PslBatch {
  const void* logits;      // [B, K, N] of `type`
  Scalar type;             // not f64
  const int64_t* labels;   // [B, N], those outside [0, K) are not counted
  const uint8_t* present;  // [B, K - 1], not 0: the image has the class
  int64_t images, classes, pixels, ignore_index;
};
int64_t psl_parts(int64_t pixels);  // partial sums of an image
// labelled and online [B], mask [B, N], counts [B, 2]; parts [B, psl_parts(N), 4] is scratch.
void psl_loss_cuda(const PslBatch& batch, const float* log_weights, double* parts, float* labelled, float* online,
                   uint8_t* mask, int64_t* counts, DeviceStream stream);
// gradient [B, K, N] of the type of the logits; labelled and online [B] are here the gradients that come back.
void psl_loss_backward_cuda(const PslBatch& batch, const float* labelled, const float* online, const uint8_t* mask,
                            const int64_t* counts, void* gradient, DeviceStream stream);

}  // namespace wsss
