// CUDA kernels of random_walk: one thread per pixel, coalesced along x, every sum in one fixed order.
#include "random_walk/random_walk.h"

namespace wsss {
namespace {

constexpr int kThreadsX = 32, kThreadsY = 8;
constexpr int kChannelsAtOnce = 4;  // channels that share each load of a weight
constexpr int64_t kMaxGridZ = 65535;

__device__ __forceinline__ bool inside(int y, int x, int h, int w) { return y >= 0 && y < h && x >= 0 && x < w; }

__device__ __forceinline__ float gain(float edge, float beta) {
  const float power = powf(fminf(fmaxf(1.f - edge, 0.f), 1.f), beta);
  return power < kWalkSmallest ? 0.f : power;
}

__global__ void _walk_weights_kernel(const float* __restrict__ edges, const __grid_constant__ WalkOffsets offsets,
                                     float beta, int64_t first, int h, int w, float* __restrict__ weights) {
  const int x = blockIdx.x * kThreadsX + threadIdx.x, y = blockIdx.y * kThreadsY + threadIdx.y;
  if (x >= w || y >= h) return;
  const int64_t plane = static_cast<int64_t>(h) * w, pixel = static_cast<int64_t>(y) * w + x;
  edges += (first + blockIdx.z) * plane + pixel;
  weights += (first + blockIdx.z) * offsets.count * plane + pixel;
  for (int n = 0; n < offsets.count; ++n) {
    const int dy = offsets.dy[n], dx = offsets.dx[n];
    float weight = 0.f;
    if (inside(y + dy, x + dx, h, w)) {
      float highest = 0.f;
      for (int py = 0; py <= dy; ++py) {
        for (int px = min(dx, 0); px <= max(dx, 0); ++px) {
          if (on_path(dy, dx, py, px)) highest = fmaxf(highest, edges[static_cast<int64_t>(py) * w + px]);
        }
      }
      weight = gain(highest, beta);
    }
    weights[n * plane] = weight;
  }
}

__global__ void _walk_degree_kernel(const float* __restrict__ weights, const __grid_constant__ WalkOffsets offsets,
                                    int64_t first, int h, int w, float* __restrict__ degree) {
  const int x = blockIdx.x * kThreadsX + threadIdx.x, y = blockIdx.y * kThreadsY + threadIdx.y;
  if (x >= w || y >= h) return;
  const int64_t plane = static_cast<int64_t>(h) * w, pixel = static_cast<int64_t>(y) * w + x;
  weights += (first + blockIdx.z) * offsets.count * plane + pixel;
  float sum = 0.f;
  for (int n = 0; n < offsets.count; ++n) {
    const int dy = offsets.dy[n], dx = offsets.dx[n];
    const float ahead = weights[n * plane];
    const float behind = inside(y - dy, x - dx, h, w) ? weights[n * plane - static_cast<int64_t>(dy) * w - dx] : 0.f;
    sum += ahead + behind;
  }
  degree[(first + blockIdx.z) * plane + pixel] = 1.f + sum;
}

__global__ void _walk_scale_kernel(const float* __restrict__ degree, bool divide, int64_t first, int channels, int h,
                                   int w, float* __restrict__ maps) {
  const int x = blockIdx.x * kThreadsX + threadIdx.x, y = blockIdx.y * kThreadsY + threadIdx.y;
  if (x >= w || y >= h) return;
  const int64_t plane = static_cast<int64_t>(h) * w, pixel = static_cast<int64_t>(y) * w + x;
  const float z = degree[(first + blockIdx.z) * plane + pixel];
  maps += (first + blockIdx.z) * channels * plane + pixel;
  for (int c = 0; c < channels; ++c) maps[c * plane] = divide ? maps[c * plane] / z : maps[c * plane] * z;
}

__global__ void _walk_step_kernel(const float* __restrict__ weights, const float* __restrict__ degree,
                                  const __grid_constant__ WalkOffsets offsets, const WalkStep step, int64_t first,
                                  int channels, int h, int w, const float* __restrict__ from, float* __restrict__ to,
                                  float* __restrict__ v, double* __restrict__ out) {
  const int x = blockIdx.x * kThreadsX + threadIdx.x, y = blockIdx.y * kThreadsY + threadIdx.y;
  if (x >= w || y >= h) return;
  const int64_t plane = static_cast<int64_t>(h) * w, pixel = static_cast<int64_t>(y) * w + x;
  weights += (first + blockIdx.z) * offsets.count * plane + pixel;
  const float scale = step.gain / degree[(first + blockIdx.z) * plane + pixel];
  const int64_t start = (first + blockIdx.z) * channels * plane + pixel;
  for (int c = 0; c < channels; c += kChannelsAtOnce) {
    const int count = min(kChannelsAtOnce, channels - c);
    const float* u = from + start + c * plane;
    float centre[kChannelsAtOnce], ahead[kChannelsAtOnce] = {}, behind[kChannelsAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kChannelsAtOnce; ++i) centre[i] = i < count ? u[i * plane] : 0.f;
    for (int n = 0; n < offsets.count; ++n) {
      const int dy = offsets.dy[n], dx = offsets.dx[n];
      const int64_t jump = static_cast<int64_t>(dy) * w + dx;
      if (inside(y + dy, x + dx, h, w)) {
        const float weight = weights[n * plane];
#pragma unroll
        for (int i = 0; i < kChannelsAtOnce; ++i) {
          if (i < count) ahead[i] += weight * (u[i * plane + jump] - centre[i]);
        }
      }
      if (inside(y - dy, x - dx, h, w)) {
        const float weight = weights[n * plane - jump];
#pragma unroll
        for (int i = 0; i < kChannelsAtOnce; ++i) {
          if (i < count) behind[i] += weight * (u[i * plane - jump] - centre[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kChannelsAtOnce; ++i) {
      if (i < count) {
        const int64_t at = start + (c + i) * plane;
        const float old = v[at];
        const float now = step.keep * old + scale * (ahead[i] + behind[i]);
        v[at] = now;
        to[at] = centre[i] + now;
        if (step.tail != 0.0) out[at] += step.tail * (static_cast<double>(old) + now);
      }
    }
  }
}

dim3 grid_of(int64_t images, int64_t h, int64_t w) {
  return dim3(static_cast<unsigned>((w + kThreadsX - 1) / kThreadsX),
              static_cast<unsigned>((h + kThreadsY - 1) / kThreadsY), static_cast<unsigned>(images));
}

int64_t images_at_once(int64_t left) { return left < kMaxGridZ ? left : kMaxGridZ; }

}  // namespace

void walk_weights_cuda(const float* edges, const WalkOffsets& offsets, float beta, int64_t batch, int64_t h, int64_t w,
                       float* weights, float* degree, DeviceStream stream) {
  const dim3 block(kThreadsX, kThreadsY);
  for (int64_t first = 0; first < batch; first += kMaxGridZ) {
    const dim3 grid = grid_of(images_at_once(batch - first), h, w);
    const int rows = static_cast<int>(h), columns = static_cast<int>(w);
    _walk_weights_kernel<<<grid, block, 0, stream>>>(edges, offsets, beta, first, rows, columns, weights);
    _walk_degree_kernel<<<grid, block, 0, stream>>>(weights, offsets, first, rows, columns, degree);
  }
}

void walk_scale_cuda(const float* degree, bool divide, int64_t batch, int64_t channels, int64_t h, int64_t w,
                     float* maps, DeviceStream stream) {
  for (int64_t first = 0; first < batch; first += kMaxGridZ) {
    _walk_scale_kernel<<<grid_of(images_at_once(batch - first), h, w), dim3(kThreadsX, kThreadsY), 0, stream>>>(
        degree, divide, first, static_cast<int>(channels), static_cast<int>(h), static_cast<int>(w), maps);
  }
}

void walk_step_cuda(const float* weights, const float* degree, const WalkOffsets& offsets, const WalkStep& step,
                    int64_t batch, int64_t channels, int64_t h, int64_t w, const float* from, float* to, float* v,
                    double* out, DeviceStream stream) {
  for (int64_t first = 0; first < batch; first += kMaxGridZ) {
    _walk_step_kernel<<<grid_of(images_at_once(batch - first), h, w), dim3(kThreadsX, kThreadsY), 0, stream>>>(
        weights, degree, offsets, step, first, static_cast<int>(channels), static_cast<int>(h), static_cast<int>(w),
        from, to, v, out);
  }
}

}  // namespace wsss
