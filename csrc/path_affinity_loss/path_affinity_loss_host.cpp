// wsss::path_affinity_loss and wsss::path_affinity_counts on CUDA: checks, allocation, stream.
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "cuda_memory.h"
#include "path_affinity_loss/path_affinity_loss_check.h"
#include "path_affinity_loss/path_affinity_loss_cuda.h"

namespace wsss {
namespace {

at::Tensor path_affinity_counts_on_cuda(const at::Tensor& labels, int64_t radius, int64_t ignore_index) {
  check_path_labels(labels, radius, "path_affinity_counts");
  const int64_t batch = labels.size(0), h = labels.size(1), w = labels.size(2);
  const c10::cuda::CUDAGuard guard(labels.device());
  const auto values = labels.to(at::kLong).contiguous();
  const PathSources sources = path_sources(static_cast<int>(radius), h, w);
  auto kinds = at::empty({batch * sources.rows * sources.columns, 3}, labels.options().dtype(at::kInt));
  const PathAffinityBatch arguments{nullptr, values.const_data_ptr<int64_t>(), ignore_index, batch, h, w,
                                    static_cast<int>(radius)};
  path_kinds_cuda(arguments, kinds.mutable_data_ptr<int32_t>(), caching_memory(),
                  c10::cuda::getCurrentCUDAStream().stream());
  return at::sum(kinds, 0, false, at::kLong);
}

std::tuple<at::Tensor, at::Tensor> path_affinity_loss_on_cuda(const at::Tensor& edge_logits, const at::Tensor& labels,
                                                              int64_t radius, int64_t ignore_index,
                                                              const std::optional<at::Tensor>& counts,
                                                              bool with_gradient) {
  check_path_affinity(edge_logits, labels, radius, counts);
  const int64_t batch = edge_logits.size(0), h = edge_logits.size(1), w = edge_logits.size(2);
  const c10::cuda::CUDAGuard guard(edge_logits.device());
  const auto stream = c10::cuda::getCurrentCUDAStream().stream();
  const auto logits = edge_logits.contiguous(), values = labels.to(at::kLong).contiguous();
  const auto options = logits.options();
  auto gradient = at::empty(with_gradient ? at::IntArrayRef({batch, h, w}) : at::IntArrayRef({0}), options);
  auto won = at::zeros({batch, h, w, 3}, options.dtype(at::kInt));
  auto losses = at::empty({batch, h, w}, options.dtype(at::kDouble));
  const PathAffinityBatch arguments{logits.const_data_ptr<float>(), values.const_data_ptr<int64_t>(), ignore_index,
                                    batch, h, w, static_cast<int>(radius)};
  path_wins_cuda(arguments, won.mutable_data_ptr<int32_t>(), caching_memory(), stream);
  // The sums of torch on CUDA add in one fixed order.
  const auto divisors = counts.has_value() ? counts->contiguous() : at::sum(won.view({-1, 3}), 0, false, at::kLong);
  path_pixels_cuda(arguments, won.const_data_ptr<int32_t>(), divisors.const_data_ptr<int64_t>(),
                   losses.mutable_data_ptr<double>(), with_gradient ? gradient.mutable_data_ptr<float>() : nullptr,
                   caching_memory(), stream);
  return {losses.sum().to(at::kFloat), gradient};
}

}  // namespace

TORCH_LIBRARY_IMPL(wsss, CUDA, m) {
  m.impl("path_affinity_counts", &path_affinity_counts_on_cuda);
  m.impl("path_affinity_loss", &path_affinity_loss_on_cuda);
}

}  // namespace wsss
