// A Device (csrc/device.h) without a GPU: the items of a launch run one after another, in an order of choice. Fresh
// memory holds NaN, or -1 in integers; a write just past an array is found when it is released.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

#include "device.h"

namespace wsss {

class SerialDevice {
 public:
  enum Order { kForward, kBackward, kScattered };
  explicit SerialDevice(int order) : order_(order) {}

  template <class Body>
  void for_each(int64_t rows, int64_t lanes, const Body& body) const {
    const int64_t count = rows * lanes;
    constexpr int64_t prime = 1000003;
    const bool scattered = order_ == kScattered && count % prime != 0;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t i = order_ == kBackward ? count - 1 - n : scattered ? n * prime % count : n;
      body(i / lanes, i % lanes);
    }
  }
  void sort_pairs(const uint64_t* keys, uint64_t* sorted, const int32_t* values, int32_t* sorted_values,
                  int64_t n) const {
    std::vector<int64_t> place(n);
    std::iota(place.begin(), place.end(), 0);
    std::stable_sort(place.begin(), place.end(), [&](int64_t a, int64_t b) { return keys[a] < keys[b]; });
    for (int64_t i = 0; i < n; ++i) {
      sorted[i] = keys[place[i]];
      sorted_values[i] = values[place[i]];
    }
  }
  void inclusive_sum(int32_t* values, int64_t n) const { std::partial_sum(values, values + n, values); }
  void write(void* to, const void* from, size_t bytes) const { std::memcpy(to, from, bytes); }
  void read(void* to, const void* from, size_t bytes) const {
    std::memcpy(to, from, bytes);
    ++reads;
  }
  DeviceMemory memory() const { return {&allocate, &release}; }

  static inline int64_t reads = 0, bytes_in_use = 0, bytes_at_most = 0;

 private:
  static constexpr size_t kFrame = 64;
  static void* allocate(size_t bytes) {
    const size_t padded = (bytes + kFrame - 1) / kFrame * kFrame;
    auto* start = static_cast<char*>(std::aligned_alloc(kFrame, padded + 2 * kFrame));
    if (start == nullptr) std::abort();
    std::memset(start, 0xff, padded + 2 * kFrame);
    std::memcpy(start, &bytes, sizeof(bytes));
    bytes_in_use += static_cast<int64_t>(bytes);
    bytes_at_most = std::max(bytes_at_most, bytes_in_use);
    return start + kFrame;
  }
  static void release(void* pointer) {
    char* start = static_cast<char*>(pointer) - kFrame;
    size_t bytes = 0;
    std::memcpy(&bytes, start, sizeof(bytes));
    for (size_t i = 0; i < kFrame; ++i) {
      if (static_cast<unsigned char>(start[kFrame + bytes + i]) != 0xff) {
        std::fputs("serial_device: write past the end of an array\n", stderr);
        std::abort();
      }
    }
    bytes_in_use -= static_cast<int64_t>(bytes);
    std::free(start);
  }

  int order_;
};

}  // namespace wsss
