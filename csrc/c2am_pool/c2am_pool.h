// Means of features weighted by q = sigmoid(logits) and by 1 - q. Defined by kernels/c2am_pool/reference.py.
//
// Letters: B images, D channels, N pixels.
#pragma once
#include <cstdint>

#include "host_device.h"
#include "scalar.h"

namespace wsss {

constexpr int64_t kPoolRows = 4;    // channels that share each load of a weight
constexpr int64_t kPoolChunk = 64;  // channels whose share of the gradient of the logits is summed on its own

// CPU. rows [count, N]; q and rest = 1 - q [N]. foreground and background [count]: the weighted sums.
void c2am_pool_rows(const float* rows, int64_t count, const float* q, const float* rest, int64_t n, float* foreground,
                    float* background);
void c2am_pool_rows(const double* rows, int64_t count, const double* q, const double* rest, int64_t n,
                    double* foreground, double* background);
// flow [N] += sum over the rows of slope * row; grad [count, N] = base + slope * q. At most kPoolRows rows.
void c2am_pool_backward_rows(const float* rows, int64_t count, const float* base, const float* slope, const float* q,
                             int64_t n, float* flow, float* grad);
void c2am_pool_backward_rows(const double* rows, int64_t count, const double* base, const double* slope,
                             const double* q, int64_t n, double* flow, double* grad);

// CUDA, on `stream`. features [B, D, N] and grad_features have the given type, all else is float, double for f64.
struct PoolSizes {
  int64_t images, channels, pixels;
};
void c2am_pool_cuda(const void* features, Scalar type, const void* q, const PoolSizes& sizes, void* foreground,
                    void* background, DeviceStream stream);
// parts [B, D / kPoolChunk rounded up, N] is scratch.
void c2am_pool_backward_cuda(const void* grad_foreground, const void* grad_background, const void* features,
                             Scalar type, const void* q, const PoolSizes& sizes, void* parts, void* grad_features,
                             void* grad_logits, DeviceStream stream);

}  // namespace wsss
