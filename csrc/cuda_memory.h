// Memory of PyTorch's caching allocator for the kernels, on the current device and stream. For the bindings.
#pragma once
#include <c10/cuda/CUDACachingAllocator.h>

#include <algorithm>

#include "device.h"

namespace wsss {

inline DeviceMemory caching_memory() {
  return {[](size_t bytes) { return c10::cuda::CUDACachingAllocator::raw_alloc(bytes); },
          [](void* pointer) { c10::cuda::CUDACachingAllocator::raw_delete(pointer); }};
}

// How many images of a batch to work on at once: about 64 floats a pixel of lattice and a few per class, in 1 GB each.
inline int64_t lattice_images_at_once(int64_t batch, int64_t classes, int64_t pixels) {
  constexpr int64_t max_floats = int64_t{1} << 28;
  return std::clamp<int64_t>(max_floats / (pixels * (classes + 64)), 1, batch);
}

}  // namespace wsss
