// The Gaussian sums as classes: weights, order of the points, threads.
#include "gaussian/gaussian.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace wsss {
namespace {

constexpr double kMaxScale = 1e30;  // 1 / (2 sigma^2) beyond it separates all that differs
constexpr int64_t kStripes = 64;    // parts of the tiles that tasks take in turn, for tiles differ in work by regions

// 1 / sqrt(sum of the weights inside the image) for each place on an axis.
Buffer<float> axis_norm(int64_t size, const std::vector<double>& weight) {
  const auto radius = static_cast<int64_t>(weight.size()) - 1;
  std::vector<double> reach(size + 1, 0.0);  // sum of the weights at distances 1 .. i
  for (int64_t i = 1; i <= size; ++i) reach[i] = reach[i - 1] + (i <= radius ? weight[i] : 0.0);
  Buffer<float> norm(size);
  for (int64_t i = 0; i < size; ++i) {
    norm[i] = static_cast<float>(1.0 / std::sqrt(1.0 + reach[i] + reach[size - 1 - i]));
  }
  return norm;
}

float scale_of(float sigma) { return static_cast<float>(std::min(kMaxScale, 0.5 / (double{sigma} * sigma))); }

}  // namespace

GridGaussian::GridGaussian(int64_t h, int64_t w, float sigma) : h_(h), w_(w) {
  const double widest = static_cast<double>(std::max(h, w) - 1);
  radius_ = static_cast<int64_t>(std::min(widest, std::sqrt(2.0 * kGaussianCut) * sigma));
  std::vector<double> weight(radius_ + 1, 1.0);
  for (int64_t r = 1; r <= radius_; ++r) weight[r] = std::exp(-0.5 * (r / double{sigma}) * (r / double{sigma}));
  constexpr int64_t kSurplus = kGaussianBlock - 1;
  const int64_t middle = kSurplus + radius_;
  taps_ = Buffer<float>(2 * middle + 1);
  std::fill(taps_.get(), taps_.get() + 2 * middle + 1, 0.0f);
  for (int64_t r = 0; r <= radius_; ++r) taps_[middle - r] = taps_[middle + r] = static_cast<float>(weight[r]);
  norm_x_ = axis_norm(w, weight);
  norm_y_ = axis_norm(h, weight);
}

void GridGaussian::along(const float* rows, int64_t width, float* table) const {
  const int64_t line = w_ * width, margin = radius_ * width;
  at::parallel_for(0, h_, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> padded(line + 2 * margin);
    std::fill(padded.get(), padded.get() + line + 2 * margin, 0.0f);
    for (int64_t y = begin; y < end; ++y) {
      for (int64_t x = 0; x < w_; ++x) {
        const float norm = norm_x_[x] * norm_y_[y];
        for (int64_t c = 0; c < width; ++c) padded[margin + x * width + c] = norm * rows[y * line + x * width + c];
      }
      gaussian_along(padded.get() + margin, taps_.get(), radius_, w_, width, table + y * line);
    }
  });
}

void GridGaussian::across(const float* table, int64_t width, float factor, int64_t begin, int64_t end,
                          const float* base, float* rows) const {
  constexpr int64_t kChunk = 64;
  Buffer<float> sums(std::min(end - begin, kChunk) * width);
  for (int64_t i = begin; i < end;) {
    const int64_t y = i / w_, x = i % w_, count = std::min({kChunk, end - i, w_ - x});
    const int64_t first = std::max<int64_t>(0, y - radius_), last = std::min(h_ - 1, y + radius_);
    gaussian_across(table + (first * w_ + x) * width, w_ * width,
                    taps_.get() + kGaussianBlock - 1 + radius_ + first - y, last - first + 1, count * width,
                    sums.get());
    for (int64_t k = 0; k < count; ++k) {
      const float scale = factor * norm_x_[x + k] * norm_y_[y];
      const int64_t at = (i - begin + k) * width;
      for (int64_t c = 0; c < width; ++c) rows[at + c] = base[at + c] + scale * sums[k * width + c];
    }
    i += count;
  }
}

PixelGaussian::PixelGaussian(const float* image, int64_t h, int64_t w, int64_t stride, int64_t plane, float sigma_xy,
                             float sigma_rgb) {
  const int64_t n = h * w, tiles = (n + kGaussianTile - 1) / kGaussianTile, padded = tiles * kGaussianTile;
  TORCH_CHECK_VALUE(n > 0 && n < INT32_MAX, "gaussian: too many points, got ", n);
  points_.num_points = n;
  points_.num_tiles = tiles;
  points_.scale_xy = scale_of(sigma_xy);
  points_.scale_rgb = scale_of(sigma_rgb);
  Buffer<float> features(5 * n);
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    features[i] = static_cast<float>(i % w);
    features[n + i] = static_cast<float>(i / w);
    for (int64_t c = 0; c < 3; ++c) {
      const float value = image[c * plane + i / w * stride + i % w];
      features[(2 + c) * n + i] = value;
      finite = finite && std::isfinite(value);
    }
  }
  TORCH_CHECK_VALUE(finite, "gaussian: the image must be finite");
  order_ = Buffer<int32_t>(n);
  for (int64_t i = 0; i < n; ++i) order_[i] = static_cast<int32_t>(i);
  sort(0, n, features.get());

  const int64_t boxes = (tiles + 7) / 8 * 8;
  features_ = Buffer<float>(5 * padded);
  boxes_ = Buffer<float>(10 * boxes);
  for (int k = 0; k < 5; ++k) {
    float* feature = features_.get() + k * padded;
    float *low = boxes_.get() + 2 * k * boxes, *high = low + boxes;
    for (int64_t i = 0; i < padded; ++i) feature[i] = features[k * n + order_[std::min(i, n - 1)]];
    std::fill(low, low + 2 * boxes, 0.0f);
    for (int64_t t = 0; t < tiles; ++t) {
      const auto [least, most] = std::minmax_element(feature + t * kGaussianTile, feature + (t + 1) * kGaussianTile);
      low[t] = *least;
      high[t] = *most;
    }
    points_.feature[k] = feature;
    points_.low[k] = low;
    points_.high[k] = high;
  }
}

// Halves the points along the widest side of their box until they are tiles.
void PixelGaussian::sort(int64_t begin, int64_t end, const float* features) {
  int32_t* const order = order_.get();
  if (end - begin <= kGaussianTile) return std::sort(order + begin, order + end);
  const int64_t n = points_.num_points;
  const float* axis = nullptr;
  float widest = -1.0f;
  for (int k = 0; k < 5; ++k) {
    const float* feature = features + k * n;
    float low = feature[order[begin]], high = low;
    for (int64_t i = begin; i < end; ++i) {
      low = std::min(low, feature[order[i]]);
      high = std::max(high, feature[order[i]]);
    }
    const float extent = (high - low) * std::sqrt(k < 2 ? points_.scale_xy : points_.scale_rgb);
    if (extent > widest) widest = extent, axis = feature;
  }
  const int64_t tiles = (end - begin + kGaussianTile - 1) / kGaussianTile, middle = begin + tiles / 2 * kGaussianTile;
  std::nth_element(order + begin, order + middle, order + end, [axis](int32_t a, int32_t b) {
    return std::pair(axis[a], a) < std::pair(axis[b], b);
  });
  sort(begin, middle, features);
  sort(middle, end, features);
}

void PixelGaussian::normalise() {
  const int64_t n = points_.num_points;
  Buffer<float> sums(n);
  std::fill(sums.get(), sums.get() + n, 1.0f);
  filter(sums.get(), 1, 1.0f, sums.get());
  norm_ = Buffer<float>(n);
  for (int64_t i = 0; i < n; ++i) norm_[i] = 1.0f / std::sqrt(sums[i] + 1e-20f);
}

void PixelGaussian::filter(const float* rows, int64_t width, float factor, float* out) const {
  const int64_t n = points_.num_points;
  const auto norm = [&](int64_t pixel) { return norm_.get() == nullptr ? 1.0f : norm_[pixel]; };
  Buffer<float> values(n * width);
  at::parallel_for(0, n, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float scale = norm(order_[i]);
      const float* from = rows + order_[i] * width;
      for (int64_t c = 0; c < width; ++c) values[i * width + c] = scale * from[c];
    }
  });
  const int64_t part = (points_.num_tiles + kStripes - 1) / kStripes;
  at::parallel_for(0, part * kStripes, 1, [&](int64_t begin, int64_t end) {
    Buffer<double> sums(kGaussianTile * width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t tile = task % kStripes * part + task / kStripes;
      if (tile >= points_.num_tiles) continue;
      gaussian_tile(points_, tile, values.get(), width, sums.get());
      const int64_t first = tile * kGaussianTile, last = std::min(n, first + kGaussianTile);
      for (int64_t i = first; i < last; ++i) {
        const double scale = double{factor} * norm(order_[i]);
        for (int64_t c = 0; c < width; ++c) {
          out[order_[i] * width + c] = static_cast<float>(scale * sums[(i - first) * width + c]);
        }
      }
    }
  });
}

}  // namespace wsss
