// What the CUDA kernels of erase share: the resize, sums over the threads of a block, grids.
#pragma once
#include "erase/erase.h"

namespace wsss {
namespace {

constexpr int kThreads = static_cast<int>(kEraseThreads);
constexpr int64_t kMaxGridY = 65535;

template <class T>
struct Geometry {
  explicit Geometry(const EraseSizes& s)
      : h(s.h), w(s.w), height(s.height), width(s.width), scale_y(axis_scale<T>(h, height)),
        scale_x(axis_scale<T>(w, width)), pixels_y(axis_scale<double>(height, h)),
        pixels_x(axis_scale<double>(width, w)) {}
  int64_t h, w, height, width;
  T scale_y, scale_x;         // cells per pixel
  double pixels_y, pixels_x;  // pixels per cell

  __device__ uint32_t cells() const { return static_cast<uint32_t>(h * w); }
  __device__ Tap<T> row(int64_t y) const { return scaled_tap<T>(y, h, scale_y); }
  __device__ Tap<T> column(int64_t x) const { return scaled_tap<T>(x, w, scale_x); }
  // The first row, or column, whose lower cell is `cell` or one behind it; the end where there is none.
  __device__ int64_t first_row(int64_t cell) const { return first(cell, h, height, scale_y, pixels_y); }
  __device__ int64_t first_column(int64_t cell) const { return first(cell, w, width, scale_x, pixels_x); }

 private:
  __device__ static int64_t first(int64_t cell, int64_t num_in, int64_t num_out, T scale, double pixels) {
    if (cell == 0) return 0;
    if (cell >= num_in) return num_out;
    const auto guess = static_cast<int64_t>((static_cast<double>(cell) + 0.5) * pixels - 0.5);
    int64_t pixel = max(min(guess, num_out) - 3, int64_t{0});  // rounding moves it by 2 at most
    while (pixel < num_out && scaled_tap<T>(pixel, num_in, scale).low < cell) ++pixel;
    return pixel;
  }
};

// Up at one pixel.
template <class T>
__device__ __forceinline__ T upsampled(const T* cells, int64_t w, const Tap<T>& row, const Tap<T>& column) {
  auto along = [&](int64_t y) {
    const T low = positive_part(cells[y * w + column.low]), high = positive_part(cells[y * w + column.high]);
    return between(low, high, column.high_weight);
  };
  return between(along(row.low), along(row.high), row.high_weight);
}

template <class T>
__device__ __forceinline__ double weight_of(const Tap<T>& tap, int64_t cell) {
  const double high = tap.high_weight;
  return (tap.low == cell ? 1 - high : 0.0) + (tap.high == cell ? high : 0.0);
}

// The results of all threads of a block, combined pair by pair; in thread 0.
template <class T, class F>
__device__ T combine_threads(T value, F combine) {
  __shared__ T values[kThreads];
  values[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) values[threadIdx.x] = combine(values[threadIdx.x], values[threadIdx.x + half]);
  }
  return values[0];
}

unsigned blocks_of(int64_t items) { return static_cast<unsigned>((items + kThreads - 1) / kThreads); }

// Calls f(first image, number of images) for as many images at once as a grid takes along y.
template <class F>
void for_images(int64_t images, F f) {
  for (int64_t first = 0; first < images; first += kMaxGridY) {
    f(first, static_cast<unsigned>(images - first < kMaxGridY ? images - first : kMaxGridY));
  }
}

}  // namespace
}  // namespace wsss
