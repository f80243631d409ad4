// CUDA kernels of max_upsampled_masks. Forward: one thread per pixel runs through the members in ascending order.
// Backward: one thread per logit gathers from the pixels around it, so every sum has one order.
#include "cuda_scalar.cuh"
#include "max_upsampled_masks/max_upsampled_masks.h"

namespace wsss {
namespace {

constexpr int kThreadsX = 32, kThreadsY = 8, kThreads = kThreadsX * kThreadsY;
constexpr int64_t kMaxGridY = 65535;

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1. / (1. + exp(-x)); }
template <class S>
__device__ __forceinline__ auto probability(S x) {
  return sigmoid(widen(x));
}

// Distance from `at` to the interval [low, high].
__device__ __forceinline__ int away(int at, int low, int high) { return at < low ? low - at : max(at - high, 0); }

template <class S, class T>
__global__ void _max_upsampled_kernel(UpsampleArrays a, int64_t first_pair, T* __restrict__ best,
                                      int32_t* __restrict__ winner) {
  const int h = static_cast<int>(a.h), w = static_cast<int>(a.w), n = h * w;
  const int tiles = static_cast<int>((a.out_w + kThreadsX - 1) / kThreadsX);
  const int64_t left = blockIdx.x % tiles * kThreadsX, top = static_cast<int64_t>(blockIdx.x / tiles) * kThreadsY;
  const int64_t p = first_pair + blockIdx.y, image = a.pairs[2 * p];
  const int64_t x = left + threadIdx.x, y = top + threadIdx.y;
  const Tap<T> row = axis_tap<T>(min(y, a.out_h - 1), h, a.out_h), column = axis_tap<T>(min(x, a.out_w - 1), w, a.out_w);
  // The cells that this block touches.
  const int y_low = axis_tap<T>(top, h, a.out_h).low, x_low = axis_tap<T>(left, w, a.out_w).low;
  const int y_high = axis_tap<T>(min(top + kThreadsY, a.out_h) - 1, h, a.out_h).high;
  const int x_high = axis_tap<T>(min(left + kThreadsX, a.out_w) - 1, w, a.out_w).high;
  __shared__ unsigned chosen[kThreadsY];  // one bit per patch of a chunk: a member whose disc reaches this block
  T value = 0;
  int won = -1;
  if (image >= 0 && image < a.images) {
    const S* masks = static_cast<const S*>(a.logits) + image * n * n;
    for (int start = 0; start < n; start += kThreads) {
      const int patch = start + threadIdx.y * kThreadsX + threadIdx.x;
      const bool mine = patch < n && a.members[p * n + patch] &&
                        a.disc.contains(away(patch / w, y_low, y_high), away(patch % w, x_low, x_high));
      const unsigned bits = __ballot_sync(0xffffffffu, mine);
      if (threadIdx.x == 0) chosen[threadIdx.y] = bits;
      __syncthreads();
      for (int group = 0; group < kThreadsY; ++group) {
        for (unsigned rest = chosen[group]; rest; rest &= rest - 1) {
          const int k = start + group * 32 + __ffs(rest) - 1, ky = k / w, kx = k % w;
          const S* mask = masks + static_cast<int64_t>(k) * n;
          auto cell = [&](int cy, int cx) {
            return a.disc.contains(cy - ky, cx - kx) ? probability(mask[cy * w + cx]) : T(0);
          };
          const T upper = column.low_weight * cell(row.low, column.low) + column.high_weight * cell(row.low, column.high);
          const T lower = column.low_weight * cell(row.high, column.low) + column.high_weight * cell(row.high, column.high);
          const T v = row.low_weight * upper + row.high_weight * lower;
          if (v > value) {
            value = v;
            won = k;
          }
        }
      }
      __syncthreads();
    }
  }
  if (x < a.out_w && y < a.out_h) {
    const int64_t place = (p * a.out_h + y) * a.out_w + x;
    best[place] = value;
    winner[place] = won;
  }
}

// Pixels first .. last around the cells cell-1 .. cell+1 of one axis; a few more than those that the cell touches.
__device__ __forceinline__ void pixel_range(int cell, int64_t num_in, int64_t num_out, int64_t& first, int64_t& last) {
  const double scale = static_cast<double>(num_out) / static_cast<double>(num_in);
  first = cell == 0 ? 0 : max(static_cast<int64_t>((cell - 0.5) * scale - 0.5) - 2, int64_t{0});
  last = cell == num_in - 1 ? num_out - 1 : min(static_cast<int64_t>((cell + 1.5) * scale - 0.5) + 2, num_out - 1);
}

template <class T>
__device__ __forceinline__ T weight_of(const Tap<T>& tap, int cell) {
  return (tap.low == cell ? tap.low_weight : T(0)) + (tap.high == cell ? tap.high_weight : T(0));
}

// One block per row of the mask matrix.
template <class S, class T>
__global__ void _max_upsampled_backward_kernel(UpsampleArrays a, const T* __restrict__ grad,
                                               const int32_t* __restrict__ winner, S* __restrict__ result) {
  const int h = static_cast<int>(a.h), w = static_cast<int>(a.w), n = h * w;
  const int64_t image = blockIdx.x / n, pixels = a.out_h * a.out_w;
  const int patch = static_cast<int>(blockIdx.x % n);
  const S* logits = static_cast<const S*>(a.logits) + static_cast<int64_t>(blockIdx.x) * n;
  result += static_cast<int64_t>(blockIdx.x) * n;
  for (int q = threadIdx.x; q < n; q += kThreads) {
    const int cy = q / w, cx = q % w;
    T sum = 0;
    if (a.disc.contains(cy - patch / w, cx - patch % w)) {
      int64_t y_first, y_last, x_first, x_last;
      pixel_range(cy, h, a.out_h, y_first, y_last);
      pixel_range(cx, w, a.out_w, x_first, x_last);
      for (int64_t p = 0; p < a.num_pairs; ++p) {
        if (a.pairs[2 * p] != image || !a.members[p * n + patch]) continue;
        for (int64_t y = y_first; y <= y_last; ++y) {
          const T row = weight_of(axis_tap<T>(y, h, a.out_h), cy);
          if (row == T(0)) continue;
          const int64_t line = p * pixels + y * a.out_w;
          for (int64_t x = x_first; x <= x_last; ++x) {
            if (winner[line + x] == patch) sum += row * weight_of(axis_tap<T>(x, w, a.out_w), cx) * grad[line + x];
          }
        }
      }
      const T value = probability(logits[q]);
      sum = sum * value * (1 - value);
    }
    narrow(sum, result[q]);
  }
}

template <class S, class T>
void launch(const UpsampleArrays& a, void* best, int32_t* winner, DeviceStream stream) {
  const int64_t tiles = (a.out_w + kThreadsX - 1) / kThreadsX * ((a.out_h + kThreadsY - 1) / kThreadsY);
  for (int64_t first = 0; first < a.num_pairs; first += kMaxGridY) {
    const int64_t count = a.num_pairs - first < kMaxGridY ? a.num_pairs - first : kMaxGridY;
    _max_upsampled_kernel<S, T><<<dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(count)),
                                  dim3(kThreadsX, kThreadsY), 0, stream>>>(a, first, static_cast<T*>(best), winner);
  }
}

template <class S, class T>
void launch_backward(const UpsampleArrays& a, const void* grad, const int32_t* winner, void* result,
                     DeviceStream stream) {
  _max_upsampled_backward_kernel<S, T><<<static_cast<unsigned>(a.images * a.h * a.w), kThreads, 0, stream>>>(
      a, static_cast<const T*>(grad), winner, static_cast<S*>(result));
}

}  // namespace

void max_upsampled_masks_cuda(const UpsampleArrays& a, void* best, int32_t* winner, DeviceStream stream) {
  switch (a.type) {
    case Scalar::f32: return launch<float, float>(a, best, winner, stream);
    case Scalar::f64: return launch<double, double>(a, best, winner, stream);
    case Scalar::f16: return launch<__half, float>(a, best, winner, stream);
    case Scalar::bf16: return launch<__nv_bfloat16, float>(a, best, winner, stream);
  }
}

void max_upsampled_masks_backward_cuda(const UpsampleArrays& a, const void* grad, const int32_t* winner, void* result,
                                       DeviceStream stream) {
  switch (a.type) {
    case Scalar::f32: return launch_backward<float, float>(a, grad, winner, result, stream);
    case Scalar::f64: return launch_backward<double, double>(a, grad, winner, result, stream);
    case Scalar::f16: return launch_backward<__half, float>(a, grad, winner, result, stream);
    case Scalar::bf16: return launch_backward<__nv_bfloat16, float>(a, grad, winner, result, stream);
  }
}

}  // namespace wsss
