// wsss::lattice_filter on CUDA.
#pragma once
#include <cstdint>

#include "device.h"

namespace wsss {

struct LatticeFilterBatch {
  const float *image, *planes;  // [B, 3, h, w], [B, K, h, w] on the device
  float* out;                   // as planes
  int64_t batch, channels, h, w;
  float sigma_xy, sigma_rgb;
  int64_t images_at_once;
};

// Filters the whole batch on `stream`; false if the features span too many cells. Waits for the device once per part of
// the batch, to read the number of vertices.
bool lattice_filter_cuda(const LatticeFilterBatch& batch, DeviceMemory memory, DeviceStream stream);

}  // namespace wsss
