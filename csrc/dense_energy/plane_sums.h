// Bilinear resizing of planes and its adjoint, as sums over rows and columns. Included by dense_energy_cpu.cpp alone.
#pragma once
#include <cstdint>
#include <vector>

#include "bilinear.h"
#include "dense_energy/dense_energy.h"

namespace wsss {

// One axis: each of the `size` numbers is a sum of `terms` others; absent terms have weight 0.
struct AxisSums {
  int64_t size, terms = 0;
  std::vector<int32_t> index;  // [terms, size]
  std::vector<float> weight;

  explicit AxisSums(int64_t count) : size(count), used_(count, 0) { widen(); }
  void add(int64_t at, int64_t from, float share) {
    if (share == 0 && used_[at] > 0) return;
    if (used_[at] == terms) widen();
    index[used_[at] * size + at] = static_cast<int32_t>(from);
    weight[used_[at]++ * size + at] = share;
  }

 private:
  void widen() {
    index.resize(++terms * size, 0);
    weight.resize(terms * size, 0.0f);
  }
  std::vector<int64_t> used_;
};

// Bilinear resizing of one axis, and its adjoint.
inline AxisSums resize_axis(int64_t num_in, int64_t num_out, bool adjoint) {
  AxisSums sums(adjoint ? num_in : num_out);
  const auto taps = taps_of<float>(num_in, num_out);
  for (int64_t i = 0; i < num_out; ++i) {
    sums.add(adjoint ? taps[i].low : i, adjoint ? i : taps[i].low, taps[i].low_weight);
    sums.add(adjoint ? taps[i].high : i, adjoint ? i : taps[i].high, taps[i].high_weight);
  }
  return sums;
}

// Bilinear resizing of planes in one direction or its adjoint, row by row.
struct PlaneSums {
  AxisSums rows, columns;
  std::vector<int32_t> row_index;  // [size, terms], as a row needs them
  std::vector<float> row_weight;

  PlaneSums(int64_t h_in, int64_t w_in, int64_t h_out, int64_t w_out, bool adjoint)
      : rows(resize_axis(h_in, h_out, adjoint)), columns(resize_axis(w_in, w_out, adjoint)) {
    for (int64_t y = 0; y < rows.size; ++y) {
      for (int64_t t = 0; t < rows.terms; ++t) {
        row_index.push_back(rows.index[t * rows.size + y]);
        row_weight.push_back(rows.weight[t * rows.size + y]);
      }
    }
  }
  // mixed [width] = row y before the sums along it; `from` has rows of `width`.
  void mix(const float* from, int64_t width, int64_t y, float* mixed) const {
    energy_mix_rows(from, width, &row_index[y * rows.terms], &row_weight[y * rows.terms], rows.terms, width, mixed);
  }
  void along(const float* mixed, int64_t x, int64_t n, float* out) const {
    energy_mix_columns(mixed, &columns.index[x], &columns.weight[x], columns.size, columns.terms, n, out);
  }
};

}  // namespace wsss
