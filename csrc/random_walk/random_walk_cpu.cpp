// Schema of wsss::random_walk and its CPU implementation.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "random_walk/random_walk_check.h"

namespace wsss {
namespace {

constexpr int64_t kRowsAtLeast = 8;  // per task

struct Walk {
  WalkOffsets offsets;
  WalkGrid grid;
  float beta;
  int64_t channels, steps;
  at::ArrayRef<double> tails;  // empty: plain steps
  bool transposed;
};

int64_t round_up(int64_t x) { return (x + kWalkLanes - 1) / kWalkLanes * kWalkLanes; }

WalkGrid make_grid(const WalkOffsets& offsets, int64_t h, int64_t w) {
  int64_t reach_y = 0, reach_x = 0;
  for (int n = 0; n < offsets.count; ++n) {
    reach_y = std::max<int64_t>(reach_y, offsets.dy[n]);
    reach_x = std::max<int64_t>(reach_x, std::abs(offsets.dx[n]));
  }
  WalkGrid p{};
  p.height = h;
  p.width = w;
  p.columns = round_up(w);
  const int64_t margin = round_up(reach_x);  // left of each row; what lies right of a row is the margin of the next
  p.stride = margin + p.columns;
  p.origin = reach_y * p.stride + margin;
  p.plane = (h + 2 * reach_y) * p.stride + margin;
  return p;
}

// While one lives, its thread rounds subnormal numbers to 0: behind edges the walk makes them in masses, and each costs
// a hundred cycles on x86.
class FlushSubnormals {
#if defined(__SSE2__)
 public:
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }  // flush to zero, subnormals are zero
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

void for_rows(int64_t height, const std::function<void(int64_t)>& row) {
  at::parallel_for(0, height, kRowsAtLeast, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const FlushSubnormals guard;
    for (int64_t y = begin; y < end; ++y) row(y);
  });
}

// Fills `weights`, `degree` and `inverse`; `g` is scratch. All planes come zeroed.
WalkGraph build_graph(const float* edges, const Walk& walk, float* g, float* weights, float* degree, float* inverse) {
  const WalkGrid& p = walk.grid;
  WalkGraph graph{weights, inverse, walk.offsets.count, {}};
  std::vector<std::vector<int64_t>> paths(graph.count);
  for (int n = 0; n < graph.count; ++n) {
    const int dy = walk.offsets.dy[n], dx = walk.offsets.dx[n];
    graph.jump[n] = dy * p.stride + dx;
    for (int y = 0; y <= dy; ++y) {
      for (int x = std::min(dx, 0); x <= std::max(dx, 0); ++x) {
        if (on_path(dy, dx, y, x)) paths[n].push_back(y * p.stride + x);
      }
    }
  }
  for_rows(p.height, [&](int64_t y) {
    walk_gain_row(edges + y * p.width, walk.beta, p.width, g + p.origin + y * p.stride);
  });
  for_rows(p.height, [&](int64_t y) {
    const int64_t row = p.origin + y * p.stride;
    for (int n = 0; n < graph.count; ++n) {
      walk_weight_row(g + row, paths[n].data(), static_cast<int>(paths[n].size()), p.columns,
                      weights + n * p.plane + row);
    }
  });
  for_rows(p.height, [&](int64_t y) { walk_degree_row(graph, p, y, degree, inverse); });
  return graph;
}

// seeds, result [channels, h, w], at most kWalkChannels; degree is a padded plane.
void walk_channels(const float* seeds, float* result, int64_t channels, const Walk& walk, const WalkGraph& graph,
                   const float* degree) {
  const WalkGrid& p = walk.grid;
  const int64_t maps = channels * p.plane, pixels = p.height * p.width;
  // Zeros: the margins have to be 0, and so does the first difference.
  auto buffer = at::zeros({3 * maps}, at::kFloat), sums = at::zeros({maps}, at::kDouble);
  float* from = buffer.mutable_data_ptr<float>();
  float* to = from + maps;
  float* v = to + maps;
  double* out = sums.mutable_data_ptr<double>();

  for_rows(p.height, [&](int64_t y) {
    const int64_t row = p.origin + y * p.stride;
    for (int64_t c = 0; c < channels; ++c) {
      const float* source = seeds + c * pixels + y * p.width;
      for (int64_t x = 0; x < p.width; ++x) {
        const float value = walk.transposed ? source[x] * graph.inverse[row + x] : source[x];
        from[c * p.plane + row + x] = value;
        out[c * p.plane + row + x] = value;
      }
    }
  });
  auto apply = [&](const WalkStep& step) {
    for_rows(p.height, [&](int64_t y) { walk_step_row(graph, p, step, channels, y, from, to, v, out); });
    std::swap(from, to);
  };
  for (size_t m = 0; m < walk.tails.size(); ++m) {
    apply(m == 0 ? WalkStep{0.0f, 1.0f, 0.0} : WalkStep{1.0f, 2.0f, 0.0});
    apply({1.0f, 2.0f, walk.tails[m]});
  }
  if (walk.tails.empty()) {
    for (int64_t i = 0; i < walk.steps; ++i) apply({0.0f, 1.0f, 0.0});
  }
  for_rows(p.height, [&](int64_t y) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t row = p.origin + y * p.stride, at = c * p.plane + row;
      float* target = result + c * pixels + y * p.width;
      for (int64_t x = 0; x < p.width; ++x) {
        const float value = walk.tails.empty() ? from[at + x] : static_cast<float>(out[at + x]);
        target[x] = walk.transposed ? value * degree[row + x] : value;
      }
    }
  });
}

void walk_one_image(const float* edges, const float* seeds, float* result, const Walk& walk) {
  const WalkGrid& p = walk.grid;
  auto buffer = at::zeros({(3 + walk.offsets.count) * p.plane}, at::kFloat);  // zeros: the margins have to be 0
  float* g = buffer.mutable_data_ptr<float>();
  float* degree = g + p.plane;
  float* inverse = degree + p.plane;
  const WalkGraph graph = build_graph(edges, walk, g, inverse + p.plane, degree, inverse);
  // A few channels at a time go through all applications, so that they stay in the cache beside the weights.
  for (int64_t c = 0; c < walk.channels; c += kWalkChannels) {
    const int64_t start = c * p.height * p.width;
    walk_channels(seeds + start, result + start, std::min(kWalkChannels, walk.channels - c), walk, graph, degree);
  }
}

at::Tensor random_walk_cpu(const at::Tensor& seeds, const at::Tensor& edges, int64_t radius, double beta, int64_t steps,
                           at::ArrayRef<double> tails, bool transposed) {
  check_walk(seeds, edges, radius, beta, steps);
  const int64_t batch = seeds.size(0), channels = seeds.size(1), h = seeds.size(2), w = seeds.size(3);
  const auto values = seeds.contiguous(), borders = edges.contiguous();
  auto result = at::empty({batch, channels, h, w}, seeds.options());
  if (result.numel() == 0) return result;

  const WalkOffsets offsets = make_offsets(static_cast<int>(radius), h, w);
  const Walk walk{offsets, make_grid(offsets, h, w), static_cast<float>(beta), channels, steps, tails, transposed};
  auto images = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      walk_one_image(borders.const_data_ptr<float>() + b * h * w, values.const_data_ptr<float>() + b * channels * h * w,
                     result.mutable_data_ptr<float>() + b * channels * h * w, walk);
    }
  };
  // Enough images for all threads: each takes whole images, and the loops inside run on one thread.
  if (batch >= at::get_num_threads()) {
    at::parallel_for(0, batch, 1, images);
  } else {
    images(0, batch);
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def(
      "random_walk(Tensor seeds, Tensor edges, int radius, float beta, int steps, float[] tails, bool transposed) -> "
      "Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(wsss, CPU, m) { m.impl("random_walk", &random_walk_cpu); }

}  // namespace wsss
