// CUDA kernels of c2am_pool. No atomics: every sum has one order.
#include "c2am_pool/c2am_pool.h"
#include "cuda_scalar.cuh"

namespace wsss {
namespace {

constexpr int kWarp = 32, kWarps = 8, kThreads = 128;
constexpr int64_t kMaxGridY = 65535;

// One warp per channel of an image.
template <class S, class T>
__global__ void __launch_bounds__(kWarp * kWarps)
    _c2am_pool_kernel(const S* __restrict__ features, const T* __restrict__ q, int64_t first, int64_t channels,
                      int64_t pixels, T* __restrict__ foreground, T* __restrict__ background) {
  const int64_t b = first + blockIdx.y, channel = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (channel >= channels) return;
  const int64_t place = b * channels + channel;
  const S* row = features + place * pixels;
  const T* weights = q + b * pixels;
  T inside = 0, outside = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < pixels; i += kWarp) {
    const T value = widen(row[i]), weight = weights[i];
    inside += value * weight;
    outside += value * (T(1) - weight);
  }
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) {
    inside += __shfl_down_sync(0xffffffffu, inside, half);
    outside += __shfl_down_sync(0xffffffffu, outside, half);
  }
  if (threadIdx.x == 0) {
    foreground[place] = inside / static_cast<T>(pixels);
    background[place] = outside / static_cast<T>(pixels);
  }
}

// grad_features, and parts [B, chunks, N]: the sum over the channels of a chunk of features * (grad_f - grad_b) / N.
// One thread per pixel and chunk.
template <class S, class T>
__global__ void __launch_bounds__(kThreads)
    _c2am_pool_backward_kernel(const T* __restrict__ grad_foreground, const T* __restrict__ grad_background,
                               const S* __restrict__ features, const T* __restrict__ q, int64_t first,
                               int64_t channels, int64_t pixels, int64_t tiles, T* __restrict__ parts,
                               S* __restrict__ grad_features) {
  const int64_t b = first + blockIdx.y, chunk = blockIdx.x / tiles, chunks = gridDim.x / tiles;
  const int64_t i = blockIdx.x % tiles * kThreads + threadIdx.x;
  if (i >= pixels) return;
  const T weight = q[b * pixels + i], share = T(1) / static_cast<T>(pixels);
  const int64_t begin = b * channels + chunk * kPoolChunk;
  const int64_t end = b * channels + min((chunk + 1) * kPoolChunk, channels);
  T flow = 0;
#pragma unroll 4
  for (int64_t c = begin; c < end; ++c) {
    const T base = grad_background[c] * share, slope = (grad_foreground[c] - grad_background[c]) * share;
    flow += widen(features[c * pixels + i]) * slope;
    narrow(base + slope * weight, grad_features[c * pixels + i]);
  }
  parts[(b * chunks + chunk) * pixels + i] = flow;
}

// One thread per pixel.
template <class T>
__global__ void __launch_bounds__(kThreads)
    _c2am_pool_logits_kernel(const T* __restrict__ parts, const T* __restrict__ q, int64_t first, int64_t chunks,
                             int64_t pixels, T* __restrict__ grad_logits) {
  const int64_t b = first + blockIdx.y, i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= pixels) return;
  T flow = 0;
  for (int64_t c = 0; c < chunks; ++c) flow += parts[(b * chunks + c) * pixels + i];
  const T weight = q[b * pixels + i];
  grad_logits[b * pixels + i] = flow * weight * (T(1) - weight);
}

// Calls f(first image, number of images) for as many images at once as a grid takes along y.
template <class F>
void for_images(int64_t images, F f) {
  for (int64_t first = 0; first < images; first += kMaxGridY) {
    f(first, static_cast<unsigned>(images - first < kMaxGridY ? images - first : kMaxGridY));
  }
}

template <class S, class T>
void pool(const void* features, const void* q, const PoolSizes& s, void* foreground, void* background,
          DeviceStream stream) {
  for_images(s.images, [&](int64_t first, unsigned count) {
    const dim3 grid(static_cast<unsigned>((s.channels + kWarps - 1) / kWarps), count);
    _c2am_pool_kernel<S, T><<<grid, dim3(kWarp, kWarps), 0, stream>>>(
        static_cast<const S*>(features), static_cast<const T*>(q), first, s.channels, s.pixels,
        static_cast<T*>(foreground), static_cast<T*>(background));
  });
}

template <class S, class T>
void pool_backward(const void* grad_foreground, const void* grad_background, const void* features, const void* q,
                   const PoolSizes& s, void* parts, void* grad_features, void* grad_logits, DeviceStream stream) {
  const int64_t tiles = (s.pixels + kThreads - 1) / kThreads, chunks = (s.channels + kPoolChunk - 1) / kPoolChunk;
  for_images(s.images, [&](int64_t first, unsigned count) {
    if (chunks > 0) {
      _c2am_pool_backward_kernel<S, T><<<dim3(static_cast<unsigned>(tiles * chunks), count), kThreads, 0, stream>>>(
          static_cast<const T*>(grad_foreground), static_cast<const T*>(grad_background),
          static_cast<const S*>(features), static_cast<const T*>(q), first, s.channels, s.pixels, tiles,
          static_cast<T*>(parts), static_cast<S*>(grad_features));
    }
    _c2am_pool_logits_kernel<T><<<dim3(static_cast<unsigned>(tiles), count), kThreads, 0, stream>>>(
        static_cast<const T*>(parts), static_cast<const T*>(q), first, chunks, s.pixels, static_cast<T*>(grad_logits));
  });
}

}  // namespace

void c2am_pool_cuda(const void* features, Scalar type, const void* q, const PoolSizes& sizes, void* foreground,
                    void* background, DeviceStream stream) {
  const auto run = type == Scalar::f32   ? pool<float, float>
                   : type == Scalar::f64 ? pool<double, double>
                   : type == Scalar::f16 ? pool<__half, float>
                                         : pool<__nv_bfloat16, float>;
  run(features, q, sizes, foreground, background, stream);
}

void c2am_pool_backward_cuda(const void* grad_foreground, const void* grad_background, const void* features,
                             Scalar type, const void* q, const PoolSizes& sizes, void* parts, void* grad_features,
                             void* grad_logits, DeviceStream stream) {
  const auto run = type == Scalar::f32   ? pool_backward<float, float>
                   : type == Scalar::f64 ? pool_backward<double, double>
                   : type == Scalar::f16 ? pool_backward<__half, float>
                                         : pool_backward<__nv_bfloat16, float>;
  run(grad_foreground, grad_background, features, q, sizes, parts, grad_features, grad_logits, stream);
}

}  // namespace wsss
