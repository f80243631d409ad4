// Schema of wsss::erase_soft and wsss::erase_hard and their CPU implementation.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "erase/erase_axes.h"
#include "erase/erase_check.h"
#include "widened.h"

namespace wsss {
namespace {

constexpr int64_t kBandsAtOnce = 4;

// out = images, row by row, times the keep factor that keep_row(image, top, bottom, weight, keep) writes.
template <class S, class T, class F>
void apply(const S* images, const T* maps, const EraseAxes<T>& a, int64_t batch, bool select, S* out, F keep_row) {
  const int64_t bands = static_cast<int64_t>(a.bands.size()), pixels = a.height * a.width;
  at::parallel_for(0, batch * bands, kBandsAtOnce, [&](int64_t begin, int64_t end) {
    std::vector<T> top(a.width), bottom(a.width), keep(a.width), to(a.width), from;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / bands;
      const TapRun& band = a.bands[item % bands];
      const T* cells = maps + b * a.h * a.w;
      erase_widen_row(cells + band.low * a.w, a.runs, a.weights.data(), top.data());
      erase_widen_row(cells + band.high * a.w, a.runs, a.weights.data(), bottom.data());
      for (int64_t y = band.begin; y < band.end; ++y) {
        keep_row(b, top.data(), bottom.data(), a.rows[y].high_weight, keep.data());
        for (int64_t c = 0; c < kEraseColours; ++c) {
          const int64_t place = (b * kEraseColours + c) * pixels + y * a.width;
          const T* row = widened(images + place, a.width, from);
          if constexpr (std::is_same_v<S, T>) {
            erase_apply_row(row, keep.data(), select, a.width, out + place);
          } else {
            erase_apply_row(row, keep.data(), select, a.width, to.data());
            std::transform(to.begin(), to.end(), out + place, [](T x) { return static_cast<S>(x); });
          }
        }
      }
    }
  });
}

at::Tensor erase_soft_cpu(const at::Tensor& images, const at::Tensor& maps, const at::Tensor& maximum) {
  check_erase(images, maps, "erase_soft");
  check_erase_scalar(maximum, maps, "erase_soft", "maximum");
  auto out = at::empty(images.sizes(), images.options());
  if (out.numel() == 0) return out;
  const auto pixels = images.contiguous(), values = maps.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, images.scalar_type(), "erase_soft", [&] {
    using T = at::opmath_type<scalar_t>;
    const EraseAxes<T> axes(maps.size(1), maps.size(2), images.size(2), images.size(3));
    const T scale = T(1) / (*maximum.const_data_ptr<T>() + T(kEraseEps));
    apply(pixels.const_data_ptr<scalar_t>(), values.const_data_ptr<T>(), axes, images.size(0), false,
          out.mutable_data_ptr<scalar_t>(), [&](int64_t, const T* top, const T* bottom, T weight, T* keep) {
            erase_soft_row(top, bottom, weight, scale, axes.width, keep);
          });
  });
  return out;
}

at::Tensor erase_hard_cpu(const at::Tensor& images, const at::Tensor& maps, double threshold) {
  check_erase(images, maps, "erase_hard");
  auto out = at::empty(images.sizes(), images.options());
  if (out.numel() == 0) return out;
  const auto pixels = images.contiguous(), values = maps.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, images.scalar_type(), "erase_hard", [&] {
    using T = at::opmath_type<scalar_t>;
    const EraseAxes<T> axes(maps.size(1), maps.size(2), images.size(2), images.size(3));
    const T* cells = values.const_data_ptr<T>();
    std::vector<T> peaks(images.size(0));
    at::parallel_for(0, images.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) peaks[b] = erase_peak(cells + b * axes.h * axes.w, axes) + T(kEraseEps);
    });
    apply(pixels.const_data_ptr<scalar_t>(), cells, axes, images.size(0), true,
          out.mutable_data_ptr<scalar_t>(), [&](int64_t b, const T* top, const T* bottom, T weight, T* keep) {
            erase_hard_row(top, bottom, weight, peaks[b], static_cast<T>(threshold), axes.width, keep);
          });
  });
  return out;
}

// sums [2, w]: the adjoint of Up of q = sum over the colours of grad * images, of one band to its two rows of cells.
template <class S, class T>
class BandGradient {
 public:
  explicit BandGradient(const EraseAxes<T>& axes) : a_(axes), top_(a_.width), bottom_(a_.width) {}
  void operator()(const S* grad, const S* images, const TapRun& band, double* sums) {
    std::fill(top_.begin(), top_.end(), T(0));
    std::fill(bottom_.begin(), bottom_.end(), T(0));
    for (int64_t y = band.begin; y < band.end; ++y) {
      const T *g[kEraseColours], *x[kEraseColours];
      for (int64_t c = 0; c < kEraseColours; ++c) {
        const int64_t place = c * a_.height * a_.width + y * a_.width;
        g[c] = widened(grad + place, a_.width, rooms_[2 * c]);
        x[c] = widened(images + place, a_.width, rooms_[2 * c + 1]);
      }
      erase_gather_row(g, x, a_.rows[y].high_weight, a_.width, top_.data(), bottom_.data());
    }
    std::fill(sums, sums + 2 * a_.w, 0.0);
    along_x(top_.data(), sums);
    along_x(bottom_.data(), sums + a_.w);
  }

 private:
  void along_x(const T* row, double* to) const {
    for (const TapRun& run : a_.runs) {
      double all = 0, right = 0;
      for (int64_t x = run.begin; x < run.end; ++x) {
        all += row[x];
        right += static_cast<double>(a_.weights[x]) * row[x];
      }
      to[run.low] += all - right;
      to[run.high] += right;
    }
  }
  const EraseAxes<T>& a_;
  std::vector<T> top_, bottom_, rooms_[2 * kEraseColours];
};

std::tuple<at::Tensor, at::Tensor> erase_soft_backward_cpu(const at::Tensor& grad, const at::Tensor& images,
                                                           const at::Tensor& maps, const at::Tensor& maximum) {
  check_erase_soft_backward(grad, images, maps, maximum);
  auto result = at::zeros(maps.sizes(), maps.options());
  auto grad_maximum = at::zeros({}, maps.options());
  if (images.numel() == 0) return {result, grad_maximum};
  const auto flow = grad.contiguous(), pixels = images.contiguous(), values = maps.contiguous();
  const int64_t batch = images.size(0), cells = maps.size(1) * maps.size(2), w = maps.size(2);
  const int64_t colours = kEraseColours * images.size(2) * images.size(3);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, images.scalar_type(), "erase_soft_backward", [&] {
    using T = at::opmath_type<scalar_t>;
    const EraseAxes<T> axes(maps.size(1), w, images.size(2), images.size(3));
    const int64_t bands = static_cast<int64_t>(axes.bands.size());
    std::vector<double> sums(batch * bands * 2 * w), total(batch * cells);
    at::parallel_for(0, batch * bands, kBandsAtOnce, [&](int64_t begin, int64_t end) {
      BandGradient<scalar_t, T> gather(axes);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t image = item / bands * colours;
        gather(flow.const_data_ptr<scalar_t>() + image, pixels.const_data_ptr<scalar_t>() + image,
               axes.bands[item % bands], &sums[item * 2 * w]);
      }
    });
    for (int64_t item = 0; item < batch * bands; ++item) {
      const TapRun& band = axes.bands[item % bands];
      double* to = &total[item / bands * cells];
      for (int64_t x = 0; x < w; ++x) {
        to[band.low * w + x] += sums[item * 2 * w + x];
        to[band.high * w + x] += sums[item * 2 * w + w + x];
      }
    }
    const double peak = static_cast<double>(*maximum.const_data_ptr<T>()) + kEraseEps;
    const T* from = values.const_data_ptr<T>();
    T* to = result.mutable_data_ptr<T>();
    double along = 0;  // sum over the pixels of q Up, which is that over the cells of the adjoint times their values
    for (int64_t i = 0; i < batch * cells; ++i) {
      if (!(from[i] > 0)) continue;
      to[i] = static_cast<T>(-total[i] / peak);
      along += total[i] * from[i];
    }
    *grad_maximum.mutable_data_ptr<T>() = static_cast<T>(along / peak / peak);
  });
  return {result, grad_maximum};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wsss, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("erase_soft(Tensor images, Tensor maps, Tensor maximum) -> Tensor", tags);
  m.def("erase_soft_backward(Tensor grad, Tensor images, Tensor maps, Tensor maximum) -> (Tensor, Tensor)", tags);
  m.def("erase_hard(Tensor images, Tensor maps, float threshold) -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("erase_soft", &erase_soft_cpu);
  m.impl("erase_soft_backward", &erase_soft_backward_cpu);
  m.impl("erase_hard", &erase_hard_cpu);
}

}  // namespace wsss
