// Checks that both bindings of random_walk share.
#pragma once
#include "check.h"
#include "random_walk/random_walk.h"

namespace wsss {

inline void check_walk(const at::Tensor& seeds, const at::Tensor& edges, int64_t radius, double beta, int64_t steps) {
  check_float32(seeds, 4, "random_walk", "seeds");
  check_float32(edges, 3, "random_walk", "edges");
  TORCH_CHECK_VALUE(edges.sizes() == at::IntArrayRef({seeds.size(0), seeds.size(2), seeds.size(3)}),
                    "random_walk: edges ", edges.sizes(), " do not fit seeds ", seeds.sizes());
  TORCH_CHECK_VALUE(seeds.device() == edges.device(), "random_walk: seeds and edges must be on one device");
  TORCH_CHECK_VALUE(radius >= 1 && radius <= kWalkMaxRadius, "random_walk: radius must lie in [1, ", kWalkMaxRadius,
                    "], got ", radius);
  TORCH_CHECK_VALUE(beta > 0, "random_walk: beta must be > 0, got ", beta);
  TORCH_CHECK_VALUE(steps >= 0 && steps <= kWalkMaxSteps, "random_walk: steps must lie in [0, ", kWalkMaxSteps,
                    "], got ", steps);
}

}  // namespace wsss
