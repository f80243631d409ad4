// CUDA kernels of erase_soft and erase_hard. No atomics: every sum has one order.
#include "cuda_scalar.cuh"
#include "erase/erase_geometry.cuh"

namespace wsss {
namespace {

constexpr int kThreadsX = 32, kThreadsY = 8;

// One thread per pixel.
template <class S, class T, bool kHard>
__global__ void __launch_bounds__(kThreadsX * kThreadsY)
    _erase_apply_kernel(const S* __restrict__ images, const T* __restrict__ maps, const T* __restrict__ peaks,
                        T threshold, int64_t first, const __grid_constant__ Geometry<T> g, S* __restrict__ out) {
  const int64_t tiles = (g.width + kThreadsX - 1) / kThreadsX, b = first + blockIdx.y;
  const int64_t x = blockIdx.x % tiles * kThreadsX + threadIdx.x, y = blockIdx.x / tiles * kThreadsY + threadIdx.y;
  if (x >= g.width || y >= g.height) return;
  const T up = upsampled(maps + b * g.h * g.w, g.w, g.row(y), g.column(x));
  const T peak = peaks[kHard ? b : 0] + T(kEraseEps);
  const int64_t plane = g.height * g.width, place = b * kEraseColours * plane + y * g.width + x;
#pragma unroll
  for (int c = 0; c < kEraseColours; ++c) {
    const S pixel = images[place + c * plane];
    if constexpr (kHard) {
      if (up / peak <= threshold) {
        out[place + c * plane] = pixel;
      } else {
        narrow(T(0), out[place + c * plane]);
      }
    } else {
      narrow(widen(pixel) * (T(1) - up / peak), out[place + c * plane]);
    }
  }
}

// sums [B, h, 2, W]: for each pixel column the adjoint of Up of sum over the colours of grad * images, of the rows
// between two rows of cells. One thread per column and row of cells.
template <class S, class T>
__global__ void __launch_bounds__(kThreads)
    _erase_gather_kernel(const S* __restrict__ grad, const S* __restrict__ images, int64_t first,
                         const __grid_constant__ Geometry<T> g, T* __restrict__ sums) {
  const int64_t tiles = (g.width + kThreads - 1) / kThreads, b = first + blockIdx.y;
  const int64_t x = blockIdx.x % tiles * kThreads + threadIdx.x, cy = blockIdx.x / tiles;
  if (x >= g.width) return;
  const int64_t end = g.first_row(cy + 1);
  const int64_t plane = g.height * g.width, place = b * kEraseColours * plane + x;
  T top = 0, bottom = 0;
  for (int64_t y = g.first_row(cy); y < end; ++y) {
    const T weight = g.row(y).high_weight;
    T q = 0;
#pragma unroll
    for (int c = 0; c < kEraseColours; ++c) {
      const int64_t at = place + c * plane + y * g.width;
      q += widen(grad[at]) * widen(images[at]);
    }
    top += (T(1) - weight) * q;
    bottom += weight * q;
  }
  T* to = sums + (b * g.h + cy) * 2 * g.width + x;
  to[0] = top;
  to[g.width] = bottom;
}

// The rest of the adjoint, one thread per cell; parts: the sum of a block of adjoint * map, where the map is positive.
template <class T>
__global__ void __launch_bounds__(kThreads)
    _erase_cells_kernel(const T* __restrict__ sums, const T* __restrict__ maps, const T* __restrict__ maximum,
                        int64_t first, const __grid_constant__ Geometry<T> g, T* __restrict__ result,
                        double* __restrict__ parts) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x, n = g.cells(), w = static_cast<uint32_t>(g.w);
  const int64_t b = first + blockIdx.y;
  double along = 0;
  if (i < n) {
    const double value = maps[b * n + i];
    T flow = 0;
    if (value > 0) {
      const int64_t cy = i / w, cx = i % w;
      const T* band = sums + (b * g.h + cy) * 2 * g.width;  // [2, W] of the rows below cell cy
      const int64_t begin = cx > 0 ? g.first_column(cx - 1) : 0, end = g.first_column(cx + 1);
      double total = 0;
      for (int64_t x = begin; x < end; ++x) {
        double column = band[x];
        if (cy > 0) column += band[x - g.width];    // of the rows above
        if (cy + 1 == g.h) column += band[x + g.width];  // the last row of cells lies on both sides of its pixels
        total += weight_of(g.column(x), cx) * column;
      }
      flow = static_cast<T>(-total / (static_cast<double>(*maximum) + kEraseEps));
      along = total * value;
    }
    result[b * n + i] = flow;
  }
  along = combine_threads(along, [](double a, double b) { return a + b; });
  if (threadIdx.x == 0) parts[b * gridDim.x + blockIdx.x] = along;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    _erase_grad_maximum_kernel(const double* __restrict__ parts, int64_t count, const T* __restrict__ maximum,
                               T* __restrict__ grad_maximum) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += parts[i];
  sum = combine_threads(sum, [](double a, double b) { return a + b; });
  const double peak = static_cast<double>(*maximum) + kEraseEps;
  if (threadIdx.x == 0) *grad_maximum = static_cast<T>(sum / peak / peak);
}

template <class S, class T>
void apply(const void* images, const void* maps, const void* peaks, bool hard, double threshold,
           const EraseSizes& sizes, void* out, DeviceStream stream) {
  const Geometry<T> g(sizes);
  const int64_t tiles = (g.width + kThreadsX - 1) / kThreadsX * ((g.height + kThreadsY - 1) / kThreadsY);
  const auto kernel = hard ? _erase_apply_kernel<S, T, true> : _erase_apply_kernel<S, T, false>;
  for_images(sizes.images, [&](int64_t first, unsigned count) {
    kernel<<<dim3(static_cast<unsigned>(tiles), count), dim3(kThreadsX, kThreadsY), 0, stream>>>(
        static_cast<const S*>(images), static_cast<const T*>(maps), static_cast<const T*>(peaks),
        static_cast<T>(threshold), first, g, static_cast<S*>(out));
  });
}

template <class S, class T>
void soft_backward(const void* grad, const void* images, const void* maps, const void* maximum,
                   const EraseSizes& sizes, void* sums, double* parts, void* result, void* grad_maximum,
                   DeviceStream stream) {
  const Geometry<T> g(sizes);
  for_images(sizes.images, [&](int64_t first, unsigned count) {
    _erase_gather_kernel<S, T><<<dim3(static_cast<unsigned>(blocks_of(g.width) * g.h), count), kThreads, 0, stream>>>(
        static_cast<const S*>(grad), static_cast<const S*>(images), first, g, static_cast<T*>(sums));
  });
  const unsigned blocks = blocks_of(g.h * g.w);
  for_images(sizes.images, [&](int64_t first, unsigned count) {
    _erase_cells_kernel<T><<<dim3(blocks, count), kThreads, 0, stream>>>(
        static_cast<const T*>(sums), static_cast<const T*>(maps), static_cast<const T*>(maximum), first, g,
        static_cast<T*>(result), parts);
  });
  _erase_grad_maximum_kernel<T><<<1, kThreads, 0, stream>>>(parts, blocks * sizes.images,
                                                            static_cast<const T*>(maximum),
                                                            static_cast<T*>(grad_maximum));
}

}  // namespace

void erase_apply_cuda(const void* images, Scalar type, const void* maps, const void* peaks, bool hard, double threshold,
                      const EraseSizes& sizes, void* out, DeviceStream stream) {
  switch (type) {
    case Scalar::f32: return apply<float, float>(images, maps, peaks, hard, threshold, sizes, out, stream);
    case Scalar::f64: return apply<double, double>(images, maps, peaks, hard, threshold, sizes, out, stream);
    case Scalar::f16: return apply<__half, float>(images, maps, peaks, hard, threshold, sizes, out, stream);
    case Scalar::bf16: return apply<__nv_bfloat16, float>(images, maps, peaks, hard, threshold, sizes, out, stream);
  }
}

void erase_soft_backward_cuda(const void* grad, const void* images, Scalar type, const void* maps, const void* maximum,
                              const EraseSizes& sizes, void* sums, double* parts, void* result, void* grad_maximum,
                              DeviceStream stream) {
  const auto run = type == Scalar::f32   ? soft_backward<float, float>
                   : type == Scalar::f64 ? soft_backward<double, double>
                   : type == Scalar::f16 ? soft_backward<__half, float>
                                         : soft_backward<__nv_bfloat16, float>;
  run(grad, images, maps, maximum, sizes, sums, parts, result, grad_maximum, stream);
}

}  // namespace wsss
