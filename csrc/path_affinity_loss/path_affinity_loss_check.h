// Argument checks of path_affinity_loss and path_affinity_counts, for the bindings.
#pragma once
#include <optional>

#include "check.h"
#include "path_affinity_loss/path_affinity_loss.h"

namespace wsss {

inline void check_path_labels(const at::Tensor& labels, int64_t radius, const char* op) {
  TORCH_CHECK_VALUE(labels.dim() == 3, op, ": labels must have 3 dimensions, got ", labels.sizes());
  TORCH_CHECK_TYPE(at::isIntegralType(labels.scalar_type(), false), op, ": labels must hold integers, got ",
                   labels.scalar_type());
  TORCH_CHECK_VALUE(radius >= 1 && radius <= kWalkMaxRadius, op, ": radius must lie in [1, ", kWalkMaxRadius,
                    "], got ", radius);
}

inline void check_path_affinity(const at::Tensor& logits, const at::Tensor& labels, int64_t radius,
                                const std::optional<at::Tensor>& counts) {
  const char* op = "path_affinity_loss";
  check_float32(logits, 3, op, "edge_logits");
  check_path_labels(labels, radius, op);
  TORCH_CHECK_VALUE(labels.sizes() == logits.sizes(), op, ": labels must be ", logits.sizes(), ", got ",
                    labels.sizes());
  TORCH_CHECK_VALUE(labels.device() == logits.device(), op, ": edge_logits and labels must be on one device");
  if (!counts.has_value()) return;
  TORCH_CHECK_TYPE(counts->scalar_type() == at::kLong, op, ": counts must be int64, got ", counts->scalar_type());
  TORCH_CHECK_VALUE(counts->dim() == 1 && counts->size(0) == 3, op, ": counts must be [3], got ", counts->sizes());
  TORCH_CHECK_VALUE(counts->device() == logits.device(), op, ": edge_logits and counts must be on one device");
}

}  // namespace wsss
