// CUDA kernels of select_regions. Integers and comparisons alone decide, so nothing depends on the order of threads.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>

#include "select_regions/select_regions.h"

namespace wsss {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kWarp = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(double x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// One warp per (image, class): the class maximum, 1 where it is not positive.
__global__ void _select_peaks_kernel(SelectArrays a, int64_t images, int n, int c) {
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (item >= images * c) return;
  const float* scores = a.scores + item / c * n * c + item % c;
  float best = -FLT_MAX;
  for (int i = threadIdx.x % 32; i < n; i += 32) best = fmaxf(best, scores[static_cast<int64_t>(i) * c]);
  for (int step = 16; step > 0; step /= 2) best = fmaxf(best, __shfl_xor_sync(kWarp, best, step));
  if (threadIdx.x % 32 == 0) a.peak[item] = best > 0 ? best : 1.f;
}

// One thread per patch.
__global__ void _select_winners_kernel(SelectArrays a, int64_t patches, int n, int c) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= patches) return;
  const float *scores = a.scores + item * c, *peak = a.peak + item / n * c;
  float best = -FLT_MAX;
  int at = -1;
  bool any = false, fine = true;
  for (int k = 0; k < c; ++k) {
    const float ratio = __fdiv_rn(scores[k], peak[k]);
    if (at < 0 || ratio > best) {
      best = ratio;
      at = k;
    }
    any |= scores[k] > 0;
    fine &= ratio == ratio;  // a NaN has no place in the order of the candidates
  }
  a.winner[item] = any && fine ? at : -1;
}

// One block per pair: the place of a candidate is the number of candidates that come before it.
__global__ void _select_order_kernel(SelectArrays a, int n, int c, int top) {
  const int64_t p = blockIdx.x, b = a.pairs[2 * p];
  const int label = static_cast<int>(a.pairs[2 * p + 1]);
  const int32_t* winner = a.winner + b * n;
  const float* scores = a.scores + b * n * c + label;
  const float peak = a.peak[b * c + label];
  int mine = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    if (winner[i] != label) continue;
    ++mine;
    const float confidence = __fdiv_rn(scores[static_cast<int64_t>(i) * c], peak);
    int before = 0;
    for (int j = 0; j < n; ++j) {
      if (winner[j] != label) continue;
      const float other = __fdiv_rn(scores[static_cast<int64_t>(j) * c], peak);
      before += other > confidence || (other == confidence && j < i);
    }
    if (before < top) a.order[p * top + before] = i;
  }
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  if (mine) atomicAdd(&total, mine);  // integers: any order gives the same sum
  __syncthreads();
  if (threadIdx.x == 0) a.count[p] = min(total, top);
}

// One warp per candidate: 32 patches of its region at a time.
template <class T>
__global__ void _select_pack_kernel(SelectArrays a, int64_t num_pairs, int n, int w, int words, Selection s) {
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (item >= num_pairs * s.top) return;
  const int64_t p = item / s.top;
  if (item % s.top >= a.count[p]) return;
  const int patch = a.order[item], y0 = patch / w, x0 = patch % w, lane = threadIdx.x % 32;
  const T* logits = static_cast<const T*>(a.logits) + (a.pairs[2 * p] * n + patch) * n;
  for (int word = 0; word < words; ++word) {
    const int i = word * 32 + lane;
    const bool covered = i < n && s.disc.contains(i / w - y0, i % w - x0) && to_float(logits[i]) > s.threshold;
    const unsigned bits = __ballot_sync(kWarp, covered);
    if (lane == 0) a.regions[item * words + word] = bits;
  }
}

__device__ __forceinline__ int shared_bits(const uint32_t* x, const uint32_t* y, int words) {
  int sum = 0;
  for (int i = threadIdx.x % 32; i < words; i += 32) sum += __popc(x[i] & y[i]);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kWarp, sum, step);
  return sum;
}

// One block per pair, one warp per candidate at a time.
__global__ void _select_expand_kernel(SelectArrays a, int n, int words, Selection s) {
  const int64_t p = blockIdx.x;
  const int count = a.count[p];
  const int32_t* order = a.order + p * s.top;
  const uint32_t* regions = a.regions + p * s.top * words;
  uint8_t* open = a.open + p * s.top;
  __shared__ int seed;
  for (int t = threadIdx.x; t < count; t += kThreads) open[t] = 1;
  if (threadIdx.x == 0) seed = 0;
  __syncthreads();
  for (int64_t turn = 0; turn < s.max_seeds; ++turn) {
    if (threadIdx.x == 0) {
      while (seed < count && !open[seed]) ++seed;  // what is closed stays closed
      if (seed < count) a.seeds[p * s.max_seeds + turn] = order[seed];
    }
    __syncthreads();
    if (seed == count) return;
    const uint32_t* region = regions + static_cast<int64_t>(seed) * words;
    const float area = fmaxf(static_cast<float>(shared_bits(region, region, words)), kLeastArea);
    for (int t = threadIdx.x / 32; t < count; t += kThreads / 32) {
      const int overlap = shared_bits(regions + static_cast<int64_t>(t) * words, region, words);
      const float ratio = __fdiv_rn(static_cast<float>(overlap), area);
      const bool joins = t == seed || (ratio >= s.low && ratio <= s.high);
      if (threadIdx.x % 32 == 0) {
        if (joins) a.members[p * n + order[t]] = true;
        if (joins || ratio > s.high) open[t] = 0;
      }
    }
    __syncthreads();
  }
}

unsigned blocks_of(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

}  // namespace

void select_winners_cuda(const SelectArrays& a, int64_t images, int64_t n, int64_t c, DeviceStream stream) {
  _select_peaks_kernel<<<blocks_of(images * c * 32), kThreads, 0, stream>>>(a, images, static_cast<int>(n),
                                                                           static_cast<int>(c));
  _select_winners_kernel<<<blocks_of(images * n), kThreads, 0, stream>>>(a, images * n, static_cast<int>(n),
                                                                        static_cast<int>(c));
}

void select_regions_cuda(const SelectArrays& a, const Selection& s, int64_t num_pairs, int64_t h, int64_t w, int64_t c,
                         DeviceStream stream) {
  const int n = static_cast<int>(h * w), words = (n + 31) / 32, width = static_cast<int>(w);
  const unsigned pairs = static_cast<unsigned>(num_pairs), warps = blocks_of(num_pairs * s.top * 32);
  _select_order_kernel<<<pairs, kThreads, 0, stream>>>(a, n, static_cast<int>(c), static_cast<int>(s.top));
  switch (a.type) {
    case Scalar::f32: _select_pack_kernel<float><<<warps, kThreads, 0, stream>>>(a, num_pairs, n, width, words, s); break;
    case Scalar::f64: _select_pack_kernel<double><<<warps, kThreads, 0, stream>>>(a, num_pairs, n, width, words, s); break;
    case Scalar::f16: _select_pack_kernel<__half><<<warps, kThreads, 0, stream>>>(a, num_pairs, n, width, words, s); break;
    case Scalar::bf16:
      _select_pack_kernel<__nv_bfloat16><<<warps, kThreads, 0, stream>>>(a, num_pairs, n, width, words, s);
      break;
  }
  _select_expand_kernel<<<pairs, kThreads, 0, stream>>>(a, n, words, s);
}

}  // namespace wsss
