// CUDA kernels of erase_maximum. No atomics: every sum has one order.
#include "erase/erase_geometry.cuh"

namespace wsss {
namespace {

// The pixels [y0, y1) x [x0, x1) between the cells (cy, cx) and (cy + 1, cx + 1). Up is largest at a corner of them.
template <class T>
struct Block {
  __device__ Block(const Geometry<T>& g, int64_t cy, int64_t cx)
      : y0(g.first_row(cy)), y1(g.first_row(cy + 1)), x0(g.first_column(cx)), x1(g.first_column(cx + 1)) {}
  int64_t y0, y1, x0, x1;

  template <class F>
  __device__ void for_each_corner(const T* cells, const Geometry<T>& g, F f) const {
    if (y0 >= y1 || x0 >= x1) return;
    for (int i = 0; i < 4; ++i) f(upsampled(cells, g.w, g.row(i < 2 ? y0 : y1 - 1), g.column(i % 2 ? x1 - 1 : x0)));
  }

  // Calls f(row, column) for the pixels where Up is `maximum`.
  template <class F>
  __device__ void for_each_tie(const T* cells, const Geometry<T>& g, T maximum, F f) const {
    bool found = false;
    for_each_corner(cells, g, [&](T value) { found |= value == maximum; });
    if (!found) return;
    for (int64_t y = y0; y < y1; ++y) {
      const Tap<T> row = g.row(y);
      for (int64_t x = x0; x < x1; ++x) {
        const Tap<T> column = g.column(x);
        if (upsampled(cells, g.w, row, column) == maximum) f(row, column);
      }
    }
  }
};

// One block per image.
template <class T>
__global__ void __launch_bounds__(kThreads)
    _erase_peaks_kernel(const T* __restrict__ maps, const __grid_constant__ Geometry<T> g, T* __restrict__ peaks) {
  const T* cells = maps + blockIdx.x * g.h * g.w;
  T best = 0;
  const uint32_t w = static_cast<uint32_t>(g.w);
  for (uint32_t i = threadIdx.x; i < g.cells(); i += kThreads) {
    const Block<T> block(g, i / w, i % w);
    block.for_each_corner(cells, g, [&](T value) { best = larger_or_nan(best, value); });
  }
  best = combine_threads(best, [](T a, T b) { return larger_or_nan(a, b); });
  if (threadIdx.x == 0) peaks[blockIdx.x] = best;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    _erase_maximum_kernel(const T* __restrict__ peaks, int64_t images, T* __restrict__ maximum) {
  T best = 0;
  for (int64_t i = threadIdx.x; i < images; i += kThreads) best = larger_or_nan(best, peaks[i]);
  best = combine_threads(best, [](T a, T b) { return larger_or_nan(a, b); });
  if (threadIdx.x == 0) *maximum = best;
}

// counts [B]: the number of pixels where Up is the maximum. One block per image.
template <class T>
__global__ void __launch_bounds__(kThreads)
    _erase_count_kernel(const T* __restrict__ maximum, const T* __restrict__ maps,
                        const __grid_constant__ Geometry<T> g, int64_t* __restrict__ counts) {
  const T* cells = maps + blockIdx.x * g.h * g.w;
  int64_t count = 0;
  const uint32_t w = static_cast<uint32_t>(g.w);
  for (uint32_t i = threadIdx.x; i < g.cells(); i += kThreads) {
    const Block<T> block(g, i / w, i % w);
    block.for_each_tie(cells, g, *maximum, [&](const Tap<T>&, const Tap<T>&) { ++count; });
  }
  count = combine_threads(count, [](int64_t a, int64_t b) { return a + b; });
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

// One thread per cell.
template <class T>
__global__ void __launch_bounds__(kThreads)
    _erase_maximum_backward_kernel(const T* __restrict__ grad, const T* __restrict__ maximum,
                                   const T* __restrict__ maps, const int64_t* __restrict__ counts, int64_t images,
                                   int64_t first, const __grid_constant__ Geometry<T> g, T* __restrict__ result) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x, n = g.cells(), w = static_cast<uint32_t>(g.w);
  if (i >= n) return;
  const T* cells = maps + (first + blockIdx.y) * n;
  T value = 0;
  if (cells[i] > T(0)) {
    int64_t count = 0;
    for (int64_t b = 0; b < images; ++b) count += counts[b];
    const int64_t cy = i / w, cx = i % w;
    double total = 0;
    for (int64_t y = max(cy - 1, int64_t{0}); y <= cy; ++y) {
      for (int64_t x = max(cx - 1, int64_t{0}); x <= cx; ++x) {
        Block<T>(g, y, x).for_each_tie(cells, g, *maximum, [&](const Tap<T>& row, const Tap<T>& column) {
          total += weight_of(row, cy) * weight_of(column, cx);
        });
      }
    }
    value = static_cast<T>(total * (static_cast<double>(*grad) / static_cast<double>(count)));
  }
  result[(first + blockIdx.y) * n + i] = value;
}

template <class T>
void maximum_backward(const void* grad, const void* maximum, const void* maps, const EraseSizes& sizes, int64_t* counts,
                      void* result, DeviceStream stream) {
  const Geometry<T> g(sizes);
  const auto* top = static_cast<const T*>(maximum);
  const auto* cells = static_cast<const T*>(maps);
  _erase_count_kernel<T><<<static_cast<unsigned>(sizes.images), kThreads, 0, stream>>>(top, cells, g, counts);
  for_images(sizes.images, [&](int64_t first, unsigned count) {
    _erase_maximum_backward_kernel<T><<<dim3(blocks_of(g.h * g.w), count), kThreads, 0, stream>>>(
        static_cast<const T*>(grad), top, cells, counts, sizes.images, first, g, static_cast<T*>(result));
  });
}

template <class T>
void peaks_of(const void* maps, const EraseSizes& sizes, void* peaks, DeviceStream stream) {
  _erase_peaks_kernel<T><<<static_cast<unsigned>(sizes.images), kThreads, 0, stream>>>(
      static_cast<const T*>(maps), Geometry<T>(sizes), static_cast<T*>(peaks));
}

template <class T>
void maximum_of(const void* peaks, int64_t images, void* maximum, DeviceStream stream) {
  _erase_maximum_kernel<T><<<1, kThreads, 0, stream>>>(static_cast<const T*>(peaks), images, static_cast<T*>(maximum));
}

}  // namespace

void erase_peaks_cuda(const void* maps, Scalar type, const EraseSizes& sizes, void* peaks, DeviceStream stream) {
  type == Scalar::f64 ? peaks_of<double>(maps, sizes, peaks, stream) : peaks_of<float>(maps, sizes, peaks, stream);
}

void erase_maximum_cuda(const void* peaks, Scalar type, int64_t images, void* maximum, DeviceStream stream) {
  type == Scalar::f64 ? maximum_of<double>(peaks, images, maximum, stream)
                      : maximum_of<float>(peaks, images, maximum, stream);
}

void erase_maximum_backward_cuda(const void* grad, const void* maximum, const void* maps, Scalar type,
                                 const EraseSizes& sizes, int64_t* counts, void* result, DeviceStream stream) {
  type == Scalar::f64 ? maximum_backward<double>(grad, maximum, maps, sizes, counts, result, stream)
                      : maximum_backward<float>(grad, maximum, maps, sizes, counts, result, stream);
}

}  // namespace wsss
