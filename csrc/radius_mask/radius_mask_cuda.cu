// CUDA kernels of radius_mask: one block per row of the mask matrix, every element computed by one thread.
#include "cuda_scalar.cuh"
#include "radius_mask/radius_mask.h"

namespace wsss {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1. / (1. + exp(-x)); }

// Forward: a = logits, b unused. Backward: a = incoming gradient, b = the result of the forward.
template <class T, bool kBackward>
__global__ void _radius_mask_kernel(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out, int h, int w,
                                    Disc disc) {
  const int n = h * w;
  const int64_t row = blockIdx.x, offset = row * n;
  const int patch = static_cast<int>(row % n), y0 = patch / w, x0 = patch % w;
  int y = threadIdx.x / w, x = threadIdx.x % w;
  const int step_y = kThreads / w, step_x = kThreads % w;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    decltype(widen(T{})) value = 0;
    if (disc.contains(y - y0, x - x0)) {
      value = widen(a[offset + i]);
      if constexpr (kBackward) {
        const auto p = widen(b[offset + i]);
        value = value * (1 - p) * p;
      } else {
        value = sigmoid(value);
      }
    }
    narrow(value, out[offset + i]);
    y += step_y;
    x += step_x;
    if (x >= w) {
      x -= w;
      ++y;
    }
  }
}

template <class T, bool kBackward>
void launch(const void* a, const void* b, void* out, int64_t rows, int64_t h, int64_t w, const Disc& disc,
            DeviceStream stream) {
  _radius_mask_kernel<T, kBackward><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
      static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(out), static_cast<int>(h),
      static_cast<int>(w), disc);
}

template <bool kBackward>
void launch_type(const void* a, const void* b, void* out, Scalar type, int64_t rows, int64_t h, int64_t w,
                 const Disc& disc, DeviceStream stream) {
  switch (type) {
    case Scalar::f32: return launch<float, kBackward>(a, b, out, rows, h, w, disc, stream);
    case Scalar::f64: return launch<double, kBackward>(a, b, out, rows, h, w, disc, stream);
    case Scalar::f16: return launch<__half, kBackward>(a, b, out, rows, h, w, disc, stream);
    case Scalar::bf16: return launch<__nv_bfloat16, kBackward>(a, b, out, rows, h, w, disc, stream);
  }
}

}  // namespace

void radius_mask_cuda(const void* logits, void* out, Scalar type, int64_t rows, int64_t h, int64_t w, const Disc& disc,
                      DeviceStream stream) {
  launch_type<false>(logits, nullptr, out, type, rows, h, w, disc, stream);
}

void radius_mask_backward_cuda(const void* grad, const void* out, void* result, Scalar type, int64_t rows, int64_t h,
                               int64_t w, const Disc& disc, DeviceStream stream) {
  launch_type<true>(grad, out, result, type, rows, h, w, disc, stream);
}

}  // namespace wsss
