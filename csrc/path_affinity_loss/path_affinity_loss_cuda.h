// wsss::path_affinity_loss on CUDA: what the binding calls. No torch header.
#pragma once
#include "device.h"
#include "path_affinity_loss/path_affinity_loss.h"

namespace wsss {

struct PathAffinityBatch {
  const float* logits;    // [B, h, w] on the device, as all that follows; not read for `kinds`
  const int64_t* labels;  // [B, h, w]
  int64_t ignore_index;   // labels outside [0, kMaxLabel] are ignored too
  int64_t batch, h, w;
  int radius;
};

// The scratch comes from `memory`, on `stream`.
// kinds [B * sources, 3]: the pairs of each kind that start at each source.
void path_kinds_cuda(const PathAffinityBatch& batch, int32_t* kinds, DeviceMemory memory, DeviceStream stream);
// won [B, h, w, 3], zero before: the pairs of each kind that each pixel has won.
void path_wins_cuda(const PathAffinityBatch& batch, int32_t* won, DeviceMemory memory, DeviceStream stream);
// losses [B, h, w], and slopes [B, h, w] unless null, from `won` and counts [3].
void path_pixels_cuda(const PathAffinityBatch& batch, const int32_t* won, const int64_t* counts, double* losses,
                      float* slopes, DeviceMemory memory, DeviceStream stream);

}  // namespace wsss
