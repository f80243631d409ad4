// wsss::random_walk on CUDA: checks, allocation, stream; the kernels are in random_walk_cuda.cu.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <utility>

#include "random_walk/random_walk_check.h"

namespace wsss {
namespace {

constexpr int64_t kMaxWeights = int64_t{1} << 26;  // floats of pair weights held at once: 256 MB

// `maps` holds the seeds on entry and the result on return.
void walk_images(const at::Tensor& edges, const at::Tensor& maps, const WalkOffsets& offsets, float beta, int64_t steps,
                 at::ArrayRef<double> tails, bool transposed) {
  const int64_t batch = maps.size(0), channels = maps.size(1), h = maps.size(2), w = maps.size(3);
  auto weights = at::empty({batch, offsets.count, h, w}, maps.options());
  auto degree = at::empty({batch, h, w}, maps.options());
  const auto stream = c10::cuda::getCurrentCUDAStream().stream();
  float *u = maps.mutable_data_ptr<float>(), *z = degree.mutable_data_ptr<float>();
  walk_weights_cuda(edges.const_data_ptr<float>(), offsets, beta, batch, h, w, weights.mutable_data_ptr<float>(), z,
                    stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (transposed) walk_scale_cuda(z, true, batch, channels, h, w, u, stream);

  auto others = at::empty_like(maps), differences = at::zeros_like(maps);
  auto sums = tails.empty() ? at::Tensor() : maps.to(at::kDouble);
  double* out = tails.empty() ? nullptr : sums.mutable_data_ptr<double>();
  float *from = u, *to = others.mutable_data_ptr<float>();
  auto apply = [&](const WalkStep& step) {
    walk_step_cuda(weights.const_data_ptr<float>(), z, offsets, step, batch, channels, h, w, from, to,
                   differences.mutable_data_ptr<float>(), out, stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    std::swap(from, to);
  };
  for (size_t m = 0; m < tails.size(); ++m) {
    apply(m == 0 ? WalkStep{0.0f, 1.0f, 0.0} : WalkStep{1.0f, 2.0f, 0.0});
    apply({1.0f, 2.0f, tails[m]});
  }
  if (tails.empty()) {
    for (int64_t i = 0; i < steps; ++i) apply({0.0f, 1.0f, 0.0});
    if (steps % 2 == 1) maps.copy_(others);
  } else {
    maps.copy_(sums);
  }
  if (transposed) walk_scale_cuda(z, false, batch, channels, h, w, u, stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor random_walk_cuda(const at::Tensor& seeds, const at::Tensor& edges, int64_t radius, double beta,
                            int64_t steps, at::ArrayRef<double> tails, bool transposed) {
  check_walk(seeds, edges, radius, beta, steps);
  const int64_t batch = seeds.size(0), h = seeds.size(2), w = seeds.size(3);
  const c10::cuda::CUDAGuard guard(seeds.device());
  const auto borders = edges.contiguous();
  auto out = at::empty(seeds.sizes(), seeds.options());  // contiguous, whatever the layout of the seeds
  out.copy_(seeds);
  if (out.numel() == 0) return out;

  const WalkOffsets offsets = make_offsets(static_cast<int>(radius), h, w);
  const int64_t chunk = std::clamp<int64_t>(kMaxWeights / (std::max(offsets.count, 1) * h * w), 1, batch);
  for (int64_t b = 0; b < batch; b += chunk) {
    const int64_t size = std::min(chunk, batch - b);
    walk_images(borders.narrow(0, b, size), out.narrow(0, b, size), offsets, static_cast<float>(beta), steps, tails,
                transposed);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(wsss, CUDA, m) { m.impl("random_walk", &random_walk_cuda); }

}  // namespace wsss
