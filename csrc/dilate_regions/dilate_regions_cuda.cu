// CUDA kernel of dilate_regions: one block per map packs the rows to bits, then each pixel tests its disc row by row.
#include "dilate_regions/dilate_regions.h"

namespace wsss {
namespace {

constexpr int kThreads = 256;

// Whether a bit of the columns first .. last of a packed row is set.
__device__ __forceinline__ bool any_in_range(const uint64_t* row, int first, int last) {
  for (int i = first / 64; i <= last / 64; ++i) {
    uint64_t word = row[i];
    if (i == first / 64) word &= ~uint64_t{0} << (first % 64);
    if (i == last / 64) word &= ~uint64_t{0} >> (63 - last % 64);
    if (word) return true;
  }
  return false;
}

__global__ void _dilate_regions_kernel(const uint8_t* __restrict__ seeds, bool* __restrict__ out, uint64_t* scratch,
                                       int64_t h, int w, int words, Disc disc) {
  extern __shared__ uint64_t shared[];
  seeds += blockIdx.x * h * w;
  out += blockIdx.x * h * w;
  uint64_t* packed = scratch ? scratch + blockIdx.x * h * words : shared;
  for (int64_t i = threadIdx.x; i < h * words; i += kThreads) {
    const uint8_t* from = seeds + i / words * w;
    const int begin = static_cast<int>(i % words) * 64, end = min(begin + 64, w);
    uint64_t word = 0;
    for (int x = begin; x < end; ++x) word |= static_cast<uint64_t>(from[x] != 0) << (x - begin);
    packed[i] = word;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < h * w; i += kThreads) {
    const int64_t y = i / w;
    const int x = static_cast<int>(i % w);
    int reach = w - 1;  // half-width of the disc at row distance dy; it shrinks as dy grows
    bool hit = false;
    for (int64_t dy = 0; dy < h && !hit; ++dy) {
      while (reach >= 0 && !disc.contains(dy, reach)) --reach;
      if (reach < 0) break;
      const int first = max(x - reach, 0), last = min(x + reach, w - 1);
      hit = (y - dy >= 0 && any_in_range(packed + (y - dy) * words, first, last)) ||
            (y + dy < h && any_in_range(packed + (y + dy) * words, first, last));
    }
    out[i] = hit;
  }
}

}  // namespace

void dilate_regions_cuda(const uint8_t* seeds, bool* out, uint64_t* scratch, int64_t maps, int64_t h, int64_t w,
                         const Disc& disc, DeviceStream stream) {
  const int words = static_cast<int>(words_of(w));
  const size_t bytes = scratch ? 0 : static_cast<size_t>(h) * words * 8;
  _dilate_regions_kernel<<<static_cast<unsigned>(maps), kThreads, bytes, stream>>>(seeds, out, scratch, h,
                                                                                  static_cast<int>(w), words, disc);
}

}  // namespace wsss
