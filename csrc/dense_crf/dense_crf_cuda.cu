// Kernels of dense_crf: the bodies and their sequence are in the headers.
#include "cuda_device.cuh"
#include "dense_crf/dense_crf_device.h"

namespace wsss {

bool dense_crf_cuda(const DenseCrfBatch& batch, const DenseCrfParams& params, DeviceMemory memory,
                    DeviceStream stream) {
  return dense_crf(CudaDevice(memory, stream), batch, params);
}

}  // namespace wsss
