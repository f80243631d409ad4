// Kernels of path_affinity_loss: the bodies and their sequence are in the headers.
#include "cuda_device.cuh"
#include "path_affinity_loss/path_affinity_loss_device.h"

namespace wsss {

void path_kinds_cuda(const PathAffinityBatch& batch, int32_t* kinds, DeviceMemory memory, DeviceStream stream) {
  path_kinds(CudaDevice(memory, stream), batch, kinds);
}

void path_wins_cuda(const PathAffinityBatch& batch, int32_t* won, DeviceMemory memory, DeviceStream stream) {
  path_wins(CudaDevice(memory, stream), batch, won);
}

void path_pixels_cuda(const PathAffinityBatch& batch, const int32_t* won, const int64_t* counts, double* losses,
                      float* slopes, DeviceMemory memory, DeviceStream stream) {
  path_pixels(CudaDevice(memory, stream), batch, won, counts, losses, slopes);
}

}  // namespace wsss
