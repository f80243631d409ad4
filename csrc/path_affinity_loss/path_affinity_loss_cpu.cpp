// Schemas of wsss::path_affinity_loss and wsss::path_affinity_counts and their CPU implementation.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <tuple>
#include <vector>

#include "path_affinity_loss/path_affinity_loss_check.h"

namespace wsss {
namespace {

constexpr int64_t kRowsAtLeast = 16;  // per task

using Counts = std::array<int64_t, 3>;

// A batch of maps cut into tiles; a tile depends on its image alone.
struct Tiles {
  Tiles(int64_t images, int64_t height, int64_t width, int64_t chosen_radius)
      : h(height), w(width), radius(static_cast<int>(chosen_radius)), offsets(make_offsets(radius, h, w)),
        sources(path_sources(radius, h, w)), down((sources.rows + kTileRows - 1) / kTileRows),
        across((sources.columns + kTileColumns - 1) / kTileColumns), count(images * down * across) {}

  // body(tile, number of the image, first pixel of the tile in it), for tiles of about the same size.
  void for_each(int64_t begin, int64_t end, const std::function<void(const PathTile&, int64_t, int64_t)>& body) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / across % down, column = i % across;
      const int64_t top = sources.rows * row / down, bottom = sources.rows * (row + 1) / down;
      const int64_t left = sources.columns * column / across, right = sources.columns * (column + 1) / across;
      body(path_tile(bottom - top, right - left, radius), i / (down * across), top * w + left);
    }
  }

  const int64_t h, w;
  const int radius;
  const WalkOffsets offsets;
  const PathSources sources;
  const int64_t down, across, count;
};

at::Tensor checked_labels(const at::Tensor& labels, int64_t ignore_index, const char* op) {
  auto values = labels.to(at::kLong).contiguous();
  const int64_t* label = values.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < values.numel(); ++i) {
    TORCH_CHECK_VALUE((label[i] >= 0 && label[i] <= kMaxLabel) || label[i] == ignore_index, op,
                      ": labels must lie in [0, ", kMaxLabel, "] or be ", ignore_index, " (ignored), got ", label[i]);
  }
  return values;
}

at::Tensor path_affinity_counts_cpu(const at::Tensor& labels, int64_t radius, int64_t ignore_index) {
  check_path_labels(labels, radius, "path_affinity_counts");
  const auto values = checked_labels(labels, ignore_index, "path_affinity_counts");
  const Tiles tiles(labels.size(0), labels.size(1), labels.size(2), radius);
  std::vector<Counts> found(tiles.count);
  at::parallel_for(0, tiles.count, 1, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    tiles.for_each(begin, end, [&](const PathTile& tile, int64_t image, int64_t first) {
      PathCounter counter(tiles.offsets, tiles.radius, tile);
      counter.set_labels(values.const_data_ptr<int64_t>() + image * tiles.h * tiles.w + first, tiles.w, ignore_index);
      counter.count_kinds(found[i++].data());
    });
  });
  auto out = at::zeros({3}, labels.options().dtype(at::kLong));
  for (const Counts& part : found) {
    for (int k = 0; k < 3; ++k) out.mutable_data_ptr<int64_t>()[k] += part[k];
  }
  return out;
}

// won [B, h, w, 3], zero before: how many pairs of each kind each pixel has won.
void count_wins(const float* logits, const int64_t* labels, int64_t ignore_index, const Tiles& tiles, int32_t* won) {
  at::parallel_for(0, tiles.count, 1, [&](int64_t begin, int64_t end) {
    tiles.for_each(begin, end, [&](const PathTile& tile, int64_t image, int64_t first) {
      const int64_t start = image * tiles.h * tiles.w + first;
      PathCounter counter(tiles.offsets, tiles.radius, tile);
      counter.set_labels(labels + start, tiles.w, ignore_index);
      counter.set_logits(logits + start, tiles.w);
      counter.count_winners();
      for (int64_t y = 0; y < tile.height; ++y) {
        for (int64_t x = 0; x < tile.width; ++x) {
          const uint16_t* own = counter.won(y, x);
          for (int k = 0; k < 3; ++k) {
            // Tiles share pixels. These are integers: the order of the additions leaves no trace.
            if (own[k] != 0) std::atomic_ref(won[3 * (start + y * tiles.w + x) + k]).fetch_add(own[k]);
          }
        }
      }
    });
  });
}

Counts sum_of(const int32_t* won, int64_t pixels) {
  Counts total{};
  for (int64_t i = 0; i < pixels; ++i) {
    for (int k = 0; k < 3; ++k) total[k] += won[3 * i + k];
  }
  return total;
}

std::tuple<at::Tensor, at::Tensor> path_affinity_loss_cpu(const at::Tensor& edge_logits, const at::Tensor& labels,
                                                          int64_t radius, int64_t ignore_index,
                                                          const std::optional<at::Tensor>& counts, bool with_gradient) {
  check_path_affinity(edge_logits, labels, radius, counts);
  const auto values = checked_labels(labels, ignore_index, "path_affinity_loss");
  const auto logits = edge_logits.contiguous();
  const int64_t batch = logits.size(0), h = logits.size(1), w = logits.size(2);
  const auto options = logits.options();
  auto gradient = at::empty(with_gradient ? at::IntArrayRef({batch, h, w}) : at::IntArrayRef({0}), options);
  const Tiles tiles(batch, h, w, radius);
  auto wins = at::zeros({batch, h, w, 3}, options.dtype(at::kInt));
  const int32_t* won = wins.const_data_ptr<int32_t>();
  const float* z = logits.const_data_ptr<float>();
  count_wins(z, values.const_data_ptr<int64_t>(), ignore_index, tiles, wins.mutable_data_ptr<int32_t>());

  Counts divisors = sum_of(won, batch * h * w);
  if (counts.has_value()) {
    const auto given = counts->contiguous();
    std::copy_n(given.const_data_ptr<int64_t>(), 3, divisors.data());
    for (const int64_t n : divisors) TORCH_CHECK_VALUE(n >= 0, "path_affinity_loss: counts must be >= 0, got ", n);
  }
  const KindScales scales = kind_scales(divisors.data());
  float* slope = with_gradient ? gradient.mutable_data_ptr<float>() : nullptr;
  std::vector<double> losses(batch * h);  // of a row each, so that the sum does not depend on the threads
  at::parallel_for(0, batch * h, kRowsAtLeast, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = row * w; i < (row + 1) * w; ++i) {
        const PixelLoss pixel = pixel_loss(z[i], won + 3 * i, scales);
        losses[row] += pixel.loss;
        if (slope != nullptr) slope[i] = static_cast<float>(pixel.slope);
      }
    }
  });
  double loss = 0;
  for (const double part : losses) loss += part;
  return {at::full({}, loss, options), gradient};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("path_affinity_counts(Tensor labels, int radius, int ignore_index) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def(
      "path_affinity_loss(Tensor edge_logits, Tensor labels, int radius, int ignore_index, Tensor? counts, "
      "bool with_gradient) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("path_affinity_counts", &path_affinity_counts_cpu);
  m.impl("path_affinity_loss", &path_affinity_loss_cpu);
}

}  // namespace wsss
