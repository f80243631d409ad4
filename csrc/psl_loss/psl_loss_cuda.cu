// CUDA kernels of psl_loss: one thread per pixel. No atomics: every sum has one order.
#include "cuda_scalar.cuh"
#include "psl_loss/psl_loss.h"

namespace wsss {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;

// What a thread of a grid with the images [first, ...) along y works on.
template <class S>
struct Pixel {
  __device__ Pixel(const PslBatch& batch, int64_t first)
      : image(first + blockIdx.y), at(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x),
        stride(batch.pixels), logits(static_cast<const S*>(batch.logits) + image * batch.classes * stride + at) {}
  const int64_t image, at, stride;
  const S* const logits;
  __device__ float logit(int64_t k) const { return widen(logits[k * stride]); }
};

// A class of the image: background or present.
__device__ __forceinline__ bool allowed(const PslBatch& batch, int64_t image, int64_t label) {
  return label == 0 || batch.present[image * (batch.classes - 1) + label - 1] != 0;
}

__device__ __forceinline__ bool label_counts(const PslBatch& batch, int64_t image, int64_t label) {
  return label != batch.ignore_index && label >= 0 && label < batch.classes && allowed(batch, image, label);
}

// The sums over all threads of a block, combined pair by pair; in thread 0.
struct Sums {
  double of[4];  // both losses, both counts
};
__device__ Sums combine_threads(const Sums& own) {
  __shared__ double values[4][kThreads];
  for (int j = 0; j < 4; ++j) values[j][threadIdx.x] = own.of[j];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      for (int j = 0; j < 4; ++j) values[j][threadIdx.x] += values[j][threadIdx.x + half];
    }
  }
  return {{values[0][0], values[1][0], values[2][0], values[3][0]}};
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    _psl_forward_kernel(const __grid_constant__ PslBatch batch, const float* __restrict__ log_weights, int64_t first,
                        double* __restrict__ parts, uint8_t* __restrict__ mask) {
  const Pixel<S> pixel(batch, first);
  Sums sums = {};
  if (pixel.at < batch.pixels) {
    const float* weights = log_weights + pixel.image * batch.classes;
    float highest = pixel.logit(0), best = highest + weights[0], sum = 0;
    int64_t winner = 0;
#pragma unroll 4
    for (int64_t k = 1; k < batch.classes; ++k) {
      const float logit = pixel.logit(k), score = logit + weights[k];
      highest = fmaxf(highest, logit);
      if (score > best) {
        best = score;
        winner = k;
      }
    }
#pragma unroll 4
    for (int64_t k = 0; k < batch.classes; ++k) sum += expf(pixel.logit(k) - highest);
    const double log_sum = logf(sum);
    const int64_t place = pixel.image * batch.pixels + pixel.at, label = batch.labels[place];
    mask[place] = static_cast<uint8_t>(winner);
    if (label_counts(batch, pixel.image, label)) {
      sums.of[0] = (highest - pixel.logit(label)) + log_sum;
      sums.of[2] = 1;
    }
    if (allowed(batch, pixel.image, winner)) {
      sums.of[1] = (highest - pixel.logit(winner)) + log_sum;
      sums.of[3] = 1;
    }
  }
  sums = combine_threads(sums);
  if (threadIdx.x == 0) {
    double* to = parts + (pixel.image * gridDim.x + blockIdx.x) * 4;
    for (int j = 0; j < 4; ++j) to[j] = sums.of[j];
  }
}

// One block per image.
__global__ void __launch_bounds__(kThreads)
    _psl_sums_kernel(const double* __restrict__ parts, int64_t num_parts, float* __restrict__ labelled,
                     float* __restrict__ online, int64_t* __restrict__ counts) {
  const int64_t image = blockIdx.x;
  Sums sums = {};
  for (int64_t i = threadIdx.x; i < num_parts; i += kThreads) {
    for (int j = 0; j < 4; ++j) sums.of[j] += parts[(image * num_parts + i) * 4 + j];
  }
  sums = combine_threads(sums);
  if (threadIdx.x != 0) return;
  for (int term = 0; term < 2; ++term) {
    (term == 0 ? labelled : online)[image] = static_cast<float>(sums.of[term] / fmax(sums.of[term + 2], 1.0));
    counts[2 * image + term] = static_cast<int64_t>(sums.of[term + 2]);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    _psl_backward_kernel(const __grid_constant__ PslBatch batch, const float* __restrict__ labelled,
                         const float* __restrict__ online, const uint8_t* __restrict__ mask,
                         const int64_t* __restrict__ counts, int64_t first, S* __restrict__ gradient) {
  const Pixel<S> pixel(batch, first);
  if (pixel.at >= batch.pixels) return;
  const int64_t place = pixel.image * batch.pixels + pixel.at;
  const int64_t label = batch.labels[place], winner = mask[place];
  const bool has_label = label_counts(batch, pixel.image, label);
  const bool has_winner = winner < batch.classes && allowed(batch, pixel.image, winner);
  const auto share = [&](const float* grad, int term) {
    return static_cast<float>(grad[pixel.image] / fmax(static_cast<double>(counts[2 * pixel.image + term]), 1.0));
  };
  const float by_label = has_label ? share(labelled, 0) : 0.0f, by_winner = has_winner ? share(online, 1) : 0.0f;
  S* to = gradient + (pixel.logits - static_cast<const S*>(batch.logits));
  float highest = pixel.logit(0), sum = 0;
#pragma unroll 4
  for (int64_t k = 1; k < batch.classes; ++k) highest = fmaxf(highest, pixel.logit(k));
#pragma unroll 4
  for (int64_t k = 0; k < batch.classes; ++k) sum += expf(pixel.logit(k) - highest);
  const float factor = (by_label + by_winner) / sum;
#pragma unroll 4
  for (int64_t k = 0; k < batch.classes; ++k) {
    float slope = expf(pixel.logit(k) - highest) * factor;
    if (k == label) slope -= by_label;
    if (k == winner) slope -= by_winner;
    narrow(slope, to[k * pixel.stride]);
  }
}

// Calls f(first image, grid) for as many images at once as a grid takes along y.
template <class F>
void for_images(const PslBatch& batch, F f) {
  const auto blocks = static_cast<unsigned>(psl_parts(batch.pixels));
  for (int64_t first = 0; first < batch.images; first += kMaxGridY) {
    const int64_t count = batch.images - first < kMaxGridY ? batch.images - first : kMaxGridY;
    f(first, dim3(blocks, static_cast<unsigned>(count)));
  }
}

template <class S>
void forward(const PslBatch& batch, const float* log_weights, double* parts, float* labelled, float* online,
             uint8_t* mask, int64_t* counts, DeviceStream stream) {
  for_images(batch, [&](int64_t first, dim3 grid) {
    _psl_forward_kernel<S><<<grid, kThreads, 0, stream>>>(batch, log_weights, first, parts, mask);
  });
  _psl_sums_kernel<<<static_cast<unsigned>(batch.images), kThreads, 0, stream>>>(parts, psl_parts(batch.pixels),
                                                                                labelled, online, counts);
}

template <class S>
void backward(const PslBatch& batch, const float* labelled, const float* online, const uint8_t* mask,
              const int64_t* counts, void* gradient, DeviceStream stream) {
  for_images(batch, [&](int64_t first, dim3 grid) {
    _psl_backward_kernel<S><<<grid, kThreads, 0, stream>>>(batch, labelled, online, mask, counts, first,
                                                           static_cast<S*>(gradient));
  });
}

}  // namespace

int64_t psl_parts(int64_t pixels) { return (pixels + kThreads - 1) / kThreads; }

void psl_loss_cuda(const PslBatch& batch, const float* log_weights, double* parts, float* labelled,
                   float* online, uint8_t* mask, int64_t* counts, DeviceStream stream) {
  const auto run = batch.type == Scalar::f32   ? forward<float>
                   : batch.type == Scalar::f16 ? forward<__half>
                                               : forward<__nv_bfloat16>;
  run(batch, log_weights, parts, labelled, online, mask, counts, stream);
}

void psl_loss_backward_cuda(const PslBatch& batch, const float* labelled, const float* online, const uint8_t* mask,
                            const int64_t* counts, void* gradient, DeviceStream stream) {
  const auto run = batch.type == Scalar::f32   ? backward<float>
                   : batch.type == Scalar::f16 ? backward<__half>
                                               : backward<__nv_bfloat16>;
  run(batch, labelled, online, mask, counts, gradient, stream);
}

}  // namespace wsss
