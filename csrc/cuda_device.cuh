// The Device (device.h) that is a GPU. Throws std::runtime_error with CUDA's words when a call fails.
#pragma once
#include <stdexcept>
#include <string>

#include "device.h"

namespace wsss {

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
}

constexpr int kForEachThreads = 256;

// threadIdx.x: lane, so that lanes of a row are neighbours in memory; threadIdx.y: row.
template <class Body>
__global__ void __launch_bounds__(kForEachThreads)
    _for_each_kernel(int64_t rows, int64_t lanes, const __grid_constant__ Body body) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  for (int64_t lane = threadIdx.x; lane < lanes; lane += blockDim.x) body(row, lane);
}

// In device_sort_cuda.cu, so that CUB is compiled once. `scratch` null: `bytes` becomes the size that it needs.
cudaError_t device_sort_pairs(void* scratch, size_t& bytes, const uint64_t* keys, uint64_t* sorted,
                              const int32_t* values, int32_t* sorted_values, int64_t n, cudaStream_t stream);
cudaError_t device_inclusive_sum(void* scratch, size_t& bytes, int32_t* values, int64_t n, cudaStream_t stream);

class CudaDevice {
 public:
  CudaDevice(DeviceMemory memory, cudaStream_t stream) : memory_(memory), stream_(stream) {}

  template <class Body>
  void for_each(int64_t rows, int64_t lanes, const Body& body) const {
    if (rows == 0 || lanes == 0) return;
    const int64_t x = lanes < kForEachThreads ? lanes : kForEachThreads, y = kForEachThreads / x;
    const dim3 block(static_cast<unsigned>(x), static_cast<unsigned>(y));
    _for_each_kernel<<<static_cast<unsigned>((rows + y - 1) / y), block, 0, stream_>>>(rows, lanes, body);
    check_cuda(cudaGetLastError());
  }
  void sort_pairs(const uint64_t* keys, uint64_t* sorted, const int32_t* values, int32_t* sorted_values,
                  int64_t n) const {
    with_scratch([&](void* scratch, size_t& bytes) {
      return device_sort_pairs(scratch, bytes, keys, sorted, values, sorted_values, n, stream_);
    });
  }
  void inclusive_sum(int32_t* values, int64_t n) const {
    with_scratch([&](void* scratch, size_t& bytes) {
      return device_inclusive_sum(scratch, bytes, values, n, stream_);
    });
  }
  void write(void* to, const void* from, size_t bytes) const {
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_));
  }
  void read(void* to, const void* from, size_t bytes) const {
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_));
    check_cuda(cudaStreamSynchronize(stream_));
  }
  DeviceMemory memory() const { return memory_; }

 private:
  template <class Run>
  void with_scratch(const Run& run) const {
    size_t bytes = 0;
    check_cuda(run(nullptr, bytes));
    const DeviceArray<char> scratch(memory_, static_cast<int64_t>(bytes > 0 ? bytes : 1));
    check_cuda(run(scratch.get(), bytes));
  }
  DeviceMemory memory_;
  cudaStream_t stream_;
};

}  // namespace wsss
