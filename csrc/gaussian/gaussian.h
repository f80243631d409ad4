// Gaussian sums over the pixels of one image on the CPU: sum_j exp(-|f_i - f_j|^2 / 2) v_j. Terms below e^-18 may be
// left out. kernels/lattice.py, exact_filter, is the definition.
//
// Letters: n = h * w pixels, numbered row by row. Values are rows of `width` floats: 1, 4 or a multiple of 8. Every sum
// has one order, whatever the threads.
#pragma once
#include <cstdint>

#include "lattice/lattice.h"

namespace wsss {

constexpr float kGaussianCut = 18.0f;  // the exponent beyond which terms may be left out
constexpr int kGaussianTile = 32;      // points per tile, a multiple of 8

// n_i K_ij n_j with n = (K 1)^-1/2 and f = (x, y) / sigma: a sum along the rows, then one across them.
class GridGaussian {
 public:
  GridGaussian(int64_t h, int64_t w, float sigma);

  int64_t table_size(int64_t width) const { return h_ * w_ * width; }
  // table [n, width] = the sums along the rows of the image, of all pixels and over all threads.
  void along(const float* rows, int64_t width, float* table) const;
  // rows of the pixels [begin, end) = base + factor * the sums across; `base` and `rows` are those of `begin` and may be
  // equal.
  void across(const float* table, int64_t width, float factor, int64_t begin, int64_t end, const float* base,
              float* rows) const;

 private:
  int64_t h_, w_, radius_;
  Buffer<float> taps_;  // kGaussianBlock - 1 zeros, weights from -radius to radius, as many zeros
  Buffer<float> norm_x_, norm_y_;
};

// The points in an order that keeps near ones together, each feature a plane of whole tiles; surplus points repeat the
// last one. Features are (x, y) in pixels and (r, g, b) as they came: their differences are exact for 8-bit images.
struct GaussianPoints {
  int64_t num_points, num_tiles;
  float scale_xy, scale_rgb;  // 1 / (2 sigma^2)
  const float* feature[5];
  const float *low[5], *high[5];  // boxes of the tiles, padded to a multiple of 8
};

// f = (x, y) / sigma_xy, (r, g, b) / sigma_rgb: direct sums between tiles of points that are near enough.
class PixelGaussian {
 public:
  // image: 3 planes of `plane` floats with rows of `stride`. Throws c10::ValueError when they are not finite.
  PixelGaussian(const float* image, int64_t h, int64_t w, int64_t stride, int64_t plane, float sigma_xy,
                float sigma_rgb);

  // Turns the filter into n_i K_ij n_j with n = (K 1 + 1e-20)^-1/2.
  void normalise();
  // out [n, width] = factor * sums of the rows [n, width], over all threads.
  void filter(const float* rows, int64_t width, float factor, float* out) const;

 private:
  void sort(int64_t begin, int64_t end, const float* features);

  GaussianPoints points_;
  Buffer<int32_t> order_;  // pixel of each point
  Buffer<float> features_, boxes_, norm_;
};

// The loops, in gaussian_loops_cpu.cpp.
constexpr int kGaussianBlock = 4;  // outputs of `gaussian_along` that share the loads
// to [n, width] = sum over r in [-radius, radius] of weight(r) from[i + r]; `from` has `radius` rows before and after.
void gaussian_along(const float* from, const float* taps, int64_t radius, int64_t n, int64_t width, float* to);
// to [n] = sum over t < count of weight[t] from[t * stride + i].
void gaussian_across(const float* from, int64_t stride, const float* weight, int64_t count, int64_t n, float* to);
// sums [kGaussianTile, width] of the points of one tile; values [num_points, width] in the order of the points.
void gaussian_tile(const GaussianPoints& points, int64_t tile, const float* values, int64_t width, double* sums);

}  // namespace wsss
