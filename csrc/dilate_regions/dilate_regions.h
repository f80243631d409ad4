// Dilation of bit-packed region maps. Defined by kernels/dilate_regions/reference.py.
//
// Bit x % 64 of word x / 64 of a packed row is column x; h w is the size of a map.
#pragma once
#include "radius_mask/radius_mask.h"

namespace wsss {

inline int64_t words_of(int64_t w) { return (w + 63) / 64; }

// Bytes of shared memory that every device has; a packed map above it needs `scratch`.
constexpr int64_t kDilateShared = 48 * 1024;

// CUDA, on `stream`. seeds [maps, h, w] bytes, out [maps, h, w] bool; scratch [maps, h, words] or null if h * words * 8 <= kDilateShared.
void dilate_regions_cuda(const uint8_t* seeds, bool* out, uint64_t* scratch, int64_t maps, int64_t h, int64_t w,
                         const Disc& disc, DeviceStream stream);

}  // namespace wsss
