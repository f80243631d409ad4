// Schema of wsss::erase_maximum and its CPU implementation.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "erase/erase_axes.h"
#include "erase/erase_check.h"

namespace wsss {
namespace {

at::Tensor erase_maximum_cpu(const at::Tensor& maps, int64_t height, int64_t width) {
  check_erase_maps(maps, height, width, "erase_maximum");
  auto result = at::zeros({}, maps.options());
  if (maps.size(0) == 0 || height == 0 || width == 0) return result;
  const auto values = maps.contiguous();
  AT_DISPATCH_FLOATING_TYPES(maps.scalar_type(), "erase_maximum", [&] {
    const EraseAxes<scalar_t> axes(maps.size(1), maps.size(2), height, width);
    const scalar_t* cells = values.const_data_ptr<scalar_t>();
    std::vector<scalar_t> peaks(maps.size(0));
    at::parallel_for(0, maps.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) peaks[b] = erase_peak(cells + b * axes.h * axes.w, axes);
    });
    scalar_t best = 0;
    for (const scalar_t peak : peaks) best = larger_or_nan(best, peak);
    *result.mutable_data_ptr<scalar_t>() = best;
  });
  return result;
}

// total [h, w] += the weights of the cells at the pixels where Up is `maximum`; returns the number of these pixels.
template <class T>
int64_t add_ties(const T* cells, const EraseAxes<T>& a, T maximum, double* total) {
  int64_t count = 0;
  for (const TapRun& rows : a.bands) {
    for (const TapRun& columns : a.runs) {
      bool found = false;
      for_each_erase_corner(cells, a, rows, columns, [&](T value) { found |= value == maximum; });
      if (!found) continue;
      double *top = total + rows.low * a.w, *bottom = total + rows.high * a.w;
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        for (int64_t x = columns.begin; x < columns.end; ++x) {
          const Tap<T>&row = a.rows[y], &column = a.columns[x];
          if (erase_upsampled(cells, a.w, row, column) != maximum) continue;
          ++count;
          const double right = column.high_weight, down = row.high_weight;
          top[column.low] += (1 - down) * (1 - right);
          top[column.high] += (1 - down) * right;
          bottom[column.low] += down * (1 - right);
          bottom[column.high] += down * right;
        }
      }
    }
  }
  return count;
}

at::Tensor erase_maximum_backward_cpu(const at::Tensor& grad, const at::Tensor& maximum, const at::Tensor& maps,
                                      int64_t height, int64_t width) {
  check_erase_maps(maps, height, width, "erase_maximum_backward");
  check_erase_scalar(grad, maps, "erase_maximum_backward", "grad");
  check_erase_scalar(maximum, maps, "erase_maximum_backward", "maximum");
  auto result = at::zeros(maps.sizes(), maps.options());
  const int64_t batch = maps.size(0), cells = maps.size(1) * maps.size(2);
  if (batch == 0 || height == 0 || width == 0) return result;
  const auto values = maps.contiguous();
  AT_DISPATCH_FLOATING_TYPES(maps.scalar_type(), "erase_maximum_backward", [&] {
    const EraseAxes<scalar_t> axes(maps.size(1), maps.size(2), height, width);
    const scalar_t* from = values.const_data_ptr<scalar_t>();
    const scalar_t top = *maximum.const_data_ptr<scalar_t>();
    if (top == 0) return;  // no cell is positive
    std::vector<double> totals(batch * cells);
    std::vector<int64_t> counts(batch);
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) counts[b] = add_ties(from + b * cells, axes, top, &totals[b * cells]);
    });
    int64_t count = 0;
    for (const int64_t c : counts) count += c;
    const double share = static_cast<double>(*grad.const_data_ptr<scalar_t>()) / static_cast<double>(count);
    scalar_t* to = result.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < batch * cells; ++i) {
      if (from[i] > 0) to[i] = static_cast<scalar_t>(totals[i] * share);
    }
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("erase_maximum(Tensor maps, int height, int width) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("erase_maximum_backward(Tensor grad, Tensor maximum, Tensor maps, int height, int width) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("erase_maximum", &erase_maximum_cpu);
  m.impl("erase_maximum_backward", &erase_maximum_backward_cpu);
}

}  // namespace wsss
