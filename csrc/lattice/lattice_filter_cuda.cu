// Kernels of lattice_filter: the bodies and their sequence are in the headers.
#include "cuda_device.cuh"
#include "lattice/lattice_filter_device.h"

namespace wsss {

bool lattice_filter_cuda(const LatticeFilterBatch& batch, DeviceMemory memory, DeviceStream stream) {
  return lattice_filter(CudaDevice(memory, stream), batch);
}

}  // namespace wsss
