// Sort and scan of cuda_device.cuh. The values number the items, so that `n` fits 32 bits, which CUB does faster.
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "cuda_device.cuh"

namespace wsss {
namespace {

struct Plus {  // CUB's own makes it choose a kernel that spills registers on sm_90
  __host__ __device__ int32_t operator()(int32_t a, int32_t b) const { return a + b; }
};

}  // namespace

cudaError_t device_sort_pairs(void* scratch, size_t& bytes, const uint64_t* keys, uint64_t* sorted,
                              const int32_t* values, int32_t* sorted_values, int64_t n, cudaStream_t stream) {
  return cub::DeviceRadixSort::SortPairs(scratch, bytes, keys, sorted, values, sorted_values, static_cast<int32_t>(n),
                                         0, 64, stream);
}

cudaError_t device_inclusive_sum(void* scratch, size_t& bytes, int32_t* values, int64_t n, cudaStream_t stream) {
  return cub::DeviceScan::InclusiveScan(scratch, bytes, values, values, Plus{}, static_cast<int32_t>(n), stream);
}

}  // namespace wsss
