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
constexpr int64_t kDepth = 4;        // applications that follow each other down the map, on one thread
constexpr int kLeastHalf = kWalkTile / 2;  // a row of the disc is at least as wide as a tile

struct Walk {
  WalkDisc disc;
  WalkGrid grid;
  float beta;
  int64_t channels, steps;
  at::ArrayRef<double> tails;  // empty: plain steps
  bool transposed;

  int64_t applications() const { return tails.empty() ? steps : static_cast<int64_t>(2 * tails.size()); }
  WalkStep step(int64_t k) const {
    if (tails.empty() || k == 0) return {0.0f, 1.0f, 0.0};
    return {1.0f, 2.0f, k % 2 == 1 ? tails[k / 2] : 0.0};
  }
};

WalkDisc make_disc(int radius, int64_t h, int64_t w) {
  WalkDisc disc{};
  disc.radius = radius;
  disc.reach = static_cast<int>(std::min<int64_t>(radius, h)) - 1;
  for (int dy = 0; dy <= disc.reach; ++dy) {
    int half = 0;
    while (dy * dy + (half + 1) * (half + 1) < radius * radius && half + 1 < w) ++half;
    disc.half[dy] = std::max(half, kLeastHalf);
    disc.count += (dy == 0 ? 1 : 2) * (2 * disc.half[dy] + 1);
  }
  return disc;
}

WalkGrid make_grid(const WalkDisc& disc, int64_t channels, int64_t h, int64_t w) {
  WalkGrid p{};
  p.height = h;
  p.width = w;
  p.maps = channels <= kWalkPlanes ? 1 : 4;  // 4 need fewer bytes of weights, but fill cells of 4
  p.blocks = kWalkCell / p.maps;
  p.span = (w + p.blocks - 1) / p.blocks;
  p.halo = *std::max_element(disc.half, disc.half + disc.reach + 1);
  p.above = disc.reach;
  p.stride = p.span + 2 * p.halo;
  p.plane = (h + 2 * p.above) * p.stride;
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

// Whether loops over rows run on one thread here.
bool one_thread() { return at::in_parallel_region() || at::get_num_threads() == 1; }

// Fills `weights`, `degree` and `inverse`; `g` is scratch. The planes come zeroed.
void build_graph(const float* edges, const Walk& walk, float* g, float* weights, float* degree, float* inverse) {
  const WalkGrid& p = walk.grid;
  const WalkDisc& disc = walk.disc;
  std::vector<int64_t> first{0}, cells;  // of the path to each neighbour
  for (int row = 0; row < disc.rows(); ++row) {
    const int dy = WalkDisc::row(row);
    for (int dx = -disc.half[std::abs(dy)]; dx <= disc.half[std::abs(dy)]; ++dx) {
      const bool near = dy * dy + dx * dx < disc.radius * disc.radius && (dy != 0 || dx != 0);
      for (int y = std::min(dy, 0); near && y <= std::max(dy, 0); ++y) {
        for (int x = std::min(dx, 0); x <= std::max(dx, 0); ++x) {
          if (on_path(dy, dx, y, x)) cells.push_back((y * p.stride + x) * p.blocks);
        }
      }
      first.push_back(static_cast<int64_t>(cells.size()));
    }
  }
  for_rows(p.height, [&](int64_t y) { walk_gain_row(p, edges + y * p.width, walk.beta, g + p.row(y) * p.blocks); });
  for_rows(p.height, [&](int64_t y) {
    const int64_t i = p.row(y) * p.blocks;
    walk_weight_row(p, disc.count, first.data(), cells.data(), g + i, weights + y * p.span * disc.count * p.blocks,
                    degree + i, inverse + i);
  });
}

// seeds, result [channels, h, w], at most kWalkPlanes planes; degree is a plane.
void walk_channels(const float* seeds, float* result, int64_t channels, const Walk& walk, const WalkGraph& graph,
                   const float* degree) {
  const WalkGrid& p = walk.grid;
  const int64_t planes = (channels + p.maps - 1) / p.maps, size = planes * p.plane * kWalkCell;
  // Zeros: what lies around the maps has to be 0, and so does the first difference.
  auto buffer = at::zeros({3 * size}, at::kFloat), sums = at::zeros({size}, at::kDouble);
  float* maps[2] = {buffer.mutable_data_ptr<float>(), buffer.mutable_data_ptr<float>() + size};
  float* v = maps[1] + size;
  double* out = sums.mutable_data_ptr<double>();
  // Calls visit(pixel of the maps, float of the planes, float of a plane) for row y of all channels.
  auto for_pixels = [&](int64_t y, const auto& visit) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t row = (c * p.height + y) * p.width, plane = c / p.maps * p.plane, map = c % p.maps * p.blocks;
      for (int64_t r = 0; r < p.blocks; ++r) {
        const int64_t start = r * p.span, end = std::min(start + p.span, p.width);
        for (int64_t x = start, at = p.row(y); x < end; ++x, ++at) {
          visit(row + x, (plane + at) * kWalkCell + map + r, at * p.blocks + r);
        }
      }
    }
  };

  for_rows(p.height, [&](int64_t y) {
    for_pixels(y, [&](int64_t pixel, int64_t i, int64_t j) {
      maps[0][i] = walk.transposed ? seeds[pixel] * graph.inverse[j] : seeds[pixel];
      out[i] = maps[0][i];
    });
    for (int64_t k = 0; k < planes; ++k) walk_fill_halo(p, kWalkCell, maps[0] + (k * p.plane + p.row(y)) * kWalkCell);
  });
  // Applications at even places read the first map and write the second, those at odd places the other way round.
  auto apply = [&](int64_t k, int64_t y) {
    walk_step_row(p, graph, walk.step(k), planes, y, maps[k % 2], maps[1 - k % 2], v, out);
  };
  const int64_t applications = walk.applications(), depth = one_thread() ? kDepth : 1;
  for (int64_t k = 0; k < applications; k += depth) {
    if (depth == 1) {
      for_rows(p.height, [&](int64_t y) { apply(k, y); });
      continue;
    }
    // Each as far behind the one before it as it reaches down: the rows and their weights are still in the cache.
    [[maybe_unused]] const FlushSubnormals guard;
    const int64_t count = std::min(depth, applications - k);
    for (int64_t front = 0; front < p.height + (count - 1) * p.above; ++front) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t y = front - i * p.above;
        if (y >= 0 && y < p.height) apply(k + i, y);
      }
    }
  }
  const float* last = maps[applications % 2];
  for_rows(p.height, [&](int64_t y) {
    for_pixels(y, [&](int64_t pixel, int64_t i, int64_t j) {
      const float value = walk.tails.empty() ? last[i] : static_cast<float>(out[i]);
      result[pixel] = walk.transposed ? value * degree[j] : value;
    });
  });
}

void walk_one_image(const float* edges, const float* seeds, float* result, const Walk& walk) {
  const WalkGrid& p = walk.grid;
  auto shared = at::zeros({3 * p.plane * p.blocks}, at::kFloat);  // zeros: what lies around the map has to be 0
  auto weights = at::empty({p.height * p.span * walk.disc.count * p.blocks}, at::kFloat);
  float* g = shared.mutable_data_ptr<float>();
  float *degree = g + p.plane * p.blocks, *inverse = degree + p.plane * p.blocks;
  build_graph(edges, walk, g, weights.mutable_data_ptr<float>(), degree, inverse);
  const WalkGraph graph{weights.const_data_ptr<float>(), inverse, walk.disc};
  // A few channels at a time go through all applications, so that they stay in the cache beside the weights.
  const int64_t planes = (walk.channels + p.maps - 1) / p.maps, parts = (planes + kWalkPlanes - 1) / kWalkPlanes;
  const int64_t most = (planes + parts - 1) / parts * p.maps;
  for (int64_t c = 0; c < walk.channels; c += most) {
    const int64_t start = c * p.height * p.width;
    walk_channels(seeds + start, result + start, std::min(most, walk.channels - c), walk, graph, degree);
  }
}

at::Tensor random_walk_cpu(const at::Tensor& seeds, const at::Tensor& edges, int64_t radius, double beta, int64_t steps,
                           at::ArrayRef<double> tails, bool transposed) {
  check_walk(seeds, edges, radius, beta, steps);
  const int64_t batch = seeds.size(0), channels = seeds.size(1), h = seeds.size(2), w = seeds.size(3);
  const auto values = seeds.contiguous(), borders = edges.contiguous();
  auto result = at::empty({batch, channels, h, w}, seeds.options());
  if (result.numel() == 0) return result;

  const WalkDisc disc = make_disc(static_cast<int>(radius), h, w);
  const Walk walk{disc, make_grid(disc, channels, h, w), static_cast<float>(beta), channels, steps, tails, transposed};
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
