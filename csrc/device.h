// Kernels that run on the GPU and, in tests, item by item on the host: no torch header, no CUDA header.
//
// A body is a struct with `void operator()(int64_t row, int64_t lane) const`, one item of a launch; the items of one
// launch are independent of each other. A Device runs bodies and owns the rest of what differs:
//   for_each(rows, lanes, body)                         all items, lanes next to each other
//   sort_pairs(keys, sorted, values, sorted_values, n)  stable, by ascending uint64 keys; int32 values
//   inclusive_sum(values, n)                            int32, in place
//   write(to, from, bytes), read(to, from, bytes)       to and from the device; `read` waits for it
//   memory()                                            where arrays come from
// CudaDevice is in cuda_device.cuh, the serial one in tests/kernels/serial_device.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "host_device.h"

namespace wsss {

// Released memory may be handed out again to later work of the same stream.
struct DeviceMemory {
  void* (*allocate)(size_t bytes);
  void (*release)(void* pointer);
};

// Uninitialised memory on the device.
template <class T>
class DeviceArray {
 public:
  DeviceArray() = default;
  DeviceArray(DeviceMemory memory, int64_t size) : memory_(memory) {
    if (size > 0) data_ = static_cast<T*>(memory.allocate(static_cast<size_t>(size) * sizeof(T)));
  }
  DeviceArray(DeviceArray&& other) noexcept : memory_(other.memory_), data_(std::exchange(other.data_, nullptr)) {}
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~DeviceArray() { release(); }
  void release() {
    if (data_ != nullptr) memory_.release(std::exchange(data_, nullptr));
  }
  T* get() const { return data_; }

 private:
  DeviceMemory memory_{};
  T* data_ = nullptr;
};

// A copy of `items` on the device.
template <class Device, class T>
DeviceArray<T> upload(const Device& device, const std::vector<T>& items) {
  DeviceArray<T> array(device.memory(), static_cast<int64_t>(items.size()));
  device.write(array.get(), items.data(), items.size() * sizeof(T));
  return array;
}

template <class T>
struct FillBody {
  T* to;
  T value;
  WSSS_HOST_DEVICE void operator()(int64_t i, int64_t) const { to[i] = value; }
};

template <class Device, class T>
void fill(const Device& device, T* to, int64_t size, T value) {
  device.for_each(size, 1, FillBody<T>{to, value});
}

// to [row] = the largest of kReduceGroup values.
constexpr int64_t kReduceGroup = 64;
constexpr int64_t kReduceParts = kReduceGroup * kReduceGroup;  // partial results that `reduce_parts` takes

template <class T>
struct ReduceBody {
  const T* from;
  T* to;
  WSSS_HOST_DEVICE void operator()(int64_t row, int64_t) const {
    T most = from[row * kReduceGroup];
    for (int64_t i = 1; i < kReduceGroup; ++i) {
      const T value = from[row * kReduceGroup + i];
      most = value > most ? value : most;
    }
    to[row] = most;
  }
};

// parts [rows, kReduceParts] -> the largest of each row; an array of `rows` values.
template <class Device, class T>
DeviceArray<T> reduce_parts(const Device& device, const DeviceArray<T>& parts, int64_t rows) {
  DeviceArray<T> groups(device.memory(), rows * kReduceGroup), most(device.memory(), rows);
  device.for_each(rows * kReduceGroup, 1, ReduceBody<T>{parts.get(), groups.get()});
  device.for_each(rows, 1, ReduceBody<T>{groups.get(), most.get()});
  return most;
}

// Four floats that are loaded and stored at once.
struct alignas(16) Quad {
  float x, y, z, w;
};
WSSS_HOST_DEVICE inline Quad operator+(const Quad& a, const Quad& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}
WSSS_HOST_DEVICE inline Quad operator*(const Quad& a, float s) { return {a.x * s, a.y * s, a.z * s, a.w * s}; }

// Index of the last of `items` whose Field is <= at; items[0] is. Field ascends.
template <auto Field, class Item>
WSSS_HOST_DEVICE inline int64_t find_last(const Item* items, int64_t count, int64_t at) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (items[middle].*Field <= at ? low : high) = middle;
  }
  return low;
}

}  // namespace wsss
