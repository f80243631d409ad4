// CUDA kernels of par: one thread per pixel, coalesced along x, every sum in one fixed order.
#include <cfloat>

#include "par/par.h"

namespace wsss {
namespace {

constexpr int kThreadsX = 32, kThreadsY = 8;
constexpr int kChannelsAtOnce = 4;  // channels that share each load of a weight
constexpr int64_t kMaxGridZ = 65535;

__device__ __forceinline__ int64_t tap_index(const ParTaps& taps, int n, int y, int x, int h, int w) {
  const int yy = min(max(y + taps.dy[n], 0), h - 1);
  const int xx = min(max(x + taps.dx[n], 0), w - 1);
  return static_cast<int64_t>(yy) * w + xx;
}

__global__ void _par_weights_kernel(const float* __restrict__ image, const __grid_constant__ ParTaps taps,
                                    int64_t first, int h, int w, float* __restrict__ weights) {
  const int x = blockIdx.x * kThreadsX + threadIdx.x, y = blockIdx.y * kThreadsY + threadIdx.y;
  if (x >= w || y >= h) return;
  const int64_t plane = static_cast<int64_t>(h) * w, pixel = static_cast<int64_t>(y) * w + x;
  image += (first + blockIdx.z) * 3 * plane;
  weights += (first + blockIdx.z) * taps.count * plane + pixel;
  float scale[3], centre[3];
  for (int ch = 0; ch < 3; ++ch) {
    const float* colour = image + ch * plane;
    centre[ch] = colour[pixel];
    float sum = 0.f, square = 0.f;
    for (int n = 0; n < taps.count; ++n) sum += colour[tap_index(taps, n, y, x, h, w)];
    const float mean = sum / taps.count;
    for (int n = 0; n < taps.count; ++n) {
      const float d = colour[tap_index(taps, n, y, x, h, w)] - mean;
      square += d * d;
    }
    scale[ch] = 1.f / ((sqrtf(square / (taps.count - 1)) + kParEps) * kParColour);
  }
  float best = -FLT_MAX;
  for (int n = 0; n < taps.count; ++n) {
    const int64_t at = tap_index(taps, n, y, x, h, w);
    float total = 0.f;
    for (int ch = 0; ch < 3; ++ch) {
      const float d = (image[ch * plane + at] - centre[ch]) * scale[ch];
      total += d * d;
    }
    total /= -3.f;
    best = fmaxf(best, total);
    weights[n * plane] = total;
  }
  float sum = 0.f;
  for (int n = 0; n < taps.count; ++n) {
    const float e = expf(weights[n * plane] - best);
    sum += e;
    weights[n * plane] = e;
  }
  for (int n = 0; n < taps.count; ++n) weights[n * plane] = weights[n * plane] / sum + taps.place[n];
}

__global__ void _par_sweep_kernel(const float* __restrict__ from, float* __restrict__ to,
                                  const float* __restrict__ weights, const __grid_constant__ ParTaps taps,
                                  int64_t first, int channels, int h, int w) {
  const int x = blockIdx.x * kThreadsX + threadIdx.x, y = blockIdx.y * kThreadsY + threadIdx.y;
  if (x >= w || y >= h) return;
  const int64_t plane = static_cast<int64_t>(h) * w, pixel = static_cast<int64_t>(y) * w + x;
  weights += (first + blockIdx.z) * taps.count * plane + pixel;
  from += (first + blockIdx.z) * channels * plane;
  to += (first + blockIdx.z) * channels * plane + pixel;
  for (int c = 0; c < channels; c += kChannelsAtOnce) {
    const int count = min(kChannelsAtOnce, channels - c);
    float sum[kChannelsAtOnce] = {};
    for (int n = 0; n < taps.count; ++n) {
      const float weight = weights[n * plane];
      const float* at = from + c * plane + tap_index(taps, n, y, x, h, w);
#pragma unroll
      for (int i = 0; i < kChannelsAtOnce; ++i) {
        if (i < count) sum[i] += weight * at[i * plane];
      }
    }
#pragma unroll
    for (int i = 0; i < kChannelsAtOnce; ++i) {
      if (i < count) to[(c + i) * plane] = sum[i];
    }
  }
}

dim3 grid_of(int64_t images, int64_t h, int64_t w) {
  return dim3(static_cast<unsigned>((w + kThreadsX - 1) / kThreadsX),
              static_cast<unsigned>((h + kThreadsY - 1) / kThreadsY), static_cast<unsigned>(images));
}

int64_t images_at_once(int64_t left) { return left < kMaxGridZ ? left : kMaxGridZ; }

}  // namespace

void par_weights_cuda(const float* image, const ParTaps& taps, int64_t batch, int64_t h, int64_t w, float* weights,
                      DeviceStream stream) {
  for (int64_t first = 0; first < batch; first += kMaxGridZ) {
    _par_weights_kernel<<<grid_of(images_at_once(batch - first), h, w), dim3(kThreadsX, kThreadsY), 0, stream>>>(
        image, taps, first, static_cast<int>(h), static_cast<int>(w), weights);
  }
}

void par_sweep_cuda(const float* from, float* to, const float* weights, const ParTaps& taps, int64_t batch,
                    int64_t channels, int64_t h, int64_t w, DeviceStream stream) {
  for (int64_t first = 0; first < batch; first += kMaxGridZ) {
    _par_sweep_kernel<<<grid_of(images_at_once(batch - first), h, w), dim3(kThreadsX, kThreadsY), 0, stream>>>(
        from, to, weights, taps, first, static_cast<int>(channels), static_cast<int>(h), static_cast<int>(w));
  }
}

}  // namespace wsss
