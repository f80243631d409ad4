// Schema of wsss::dense_energy and its CPU implementation: shrinking, filter, value and slope in blocks of classes.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "check.h"
#include "dense_energy/dense_energy.h"
#include "dense_energy/plane_sums.h"
#include "fresh_pages.h"

namespace wsss {
namespace {

constexpr double kWeight = 1e-7;

// A block of classes: rows of `width` floats, `count` of them in use.
struct Block {
  int64_t first, count, width;
};

struct EnergySizes {
  int64_t classes, full_h, full_w, h, w;
  int64_t pixels() const { return h * w; }
  bool halved() const { return full_h == 2 * h && full_w == 2 * w; }
  int64_t num_blocks() const { return (classes + kEnergyClasses - 1) / kEnergyClasses; }
  Block block(int64_t i) const {
    const int64_t first = i * kEnergyClasses, count = std::min(kEnergyClasses, classes - first);
    return {first, count, lattice_width(count)};
  }
  // Floats of the rows of an image: block after block, where the first class of a block stands for all before it.
  int64_t rows() const {
    const Block last = block(num_blocks() - 1);
    return (last.first + last.width) * pixels();
  }
};

// The energy of one image. `rows`: first S in blocks, at the end the slope.
class ImageEnergy {
 public:
  ImageEnergy(const EnergySizes& sizes, const PlaneSums* shrink, const Lattice& lattice, const float* probs,
              const float* roi, float* rows, const FreshPages& pages)
      : sizes_(sizes), shrink_(shrink), lattice_(lattice), probs_(probs), roi_(roi), rows_(rows), top_(sizes.pixels()) {
    std::fill(top_.get(), top_.get() + sizes.pixels(), -INFINITY);
    for (int64_t i = 0; i < sizes.num_blocks(); ++i) {
      tables_.emplace_back(lattice.table_size(sizes.block(i).width));
      load(sizes.block(i), pages, tables_.back().get());
    }
  }

  // sum_k sum_i S g kappa S; rows <- factor g roi kappa S.
  double finish(const uint8_t* unlabelled, float factor) {
    const int64_t n = sizes_.pixels(), chunks = (n + kEnergyChunk - 1) / kEnergyChunk;
    Buffer<float> gate(n), factors(n);
    for (int64_t i = 0; i < n; ++i) {
      const float open = roi_[i] - top_[i];
      gate[i] = unlabelled[i] ? 1.0f : open < 0 ? 0.0f : open;
      factors[i] = factor * gate[i] * roi_[i];
    }
    std::vector<double> part(chunks, 0.0);
    for (int64_t k = 0; k < sizes_.num_blocks(); ++k) {
      const Block block = sizes_.block(k);
      float* table = tables_[k].get();
      lattice_.blur(table, block.width);
      at::parallel_for(0, chunks, 16, [&](int64_t begin, int64_t end) {
        Buffer<float> sums(kEnergyChunk * block.width);
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          const int64_t i = chunk * kEnergyChunk, count = std::min(kEnergyChunk, n - i);
          std::fill(sums.get(), sums.get() + count * block.width, 0.0f);
          lattice_.slice(table, block.width, lattice_.slice_factor(), i, i + count, sums.get(), sums.get());
          float* rows = rows_ + block.first * n + i * block.width;
          part[chunk] += energy_close(sums.get(), gate.get() + i, factors.get() + i, count, block.width, rows);
        }
      });
    }
    double total = 0;
    for (const double p : part) total += p;
    return total;
  }

 private:
  void load(const Block& block, const FreshPages& pages, float* table) {
    const int64_t h = sizes_.h, w = sizes_.w, full_w = sizes_.full_w;
    const bool alone = at::in_parallel_region() || at::get_num_threads() == 1;
    float* all = rows_ + block.first * sizes_.pixels();
    if (alone) std::fill(table, table + lattice_.table_size(block.width), 0.0f);
    at::parallel_for(0, h, 2048 / w + 1, [&](int64_t begin, int64_t end) {
      Buffer<float> tile(kEnergyClasses * kEnergyRun), mixed(shrink_ ? full_w * block.count : 0);
      std::fill(tile.get(), tile.get() + kEnergyClasses * kEnergyRun, 0.0f);
      for (int64_t y = begin; y < end; ++y) {
        for (int64_t k = 0; shrink_ && k < block.count; ++k) {
          shrink_->mix(plane(block.first + k), full_w, y, mixed.get() + k * full_w);
        }
        for (int64_t x = 0; x < w; x += kEnergyRun) {
          const int64_t i = y * w + x, count = std::min(kEnergyRun, w - x);
          for (int64_t k = 0; k < block.count; ++k) {
            float* to = tile.get() + k * kEnergyRun;
            if (shrink_) {
              shrink_->along(mixed.get() + k * full_w, x, count, to);
            } else {
              const float* from = plane(block.first + k) + 2 * y * full_w + 2 * x;
              energy_halve(from, from + full_w, count, to);
            }
            energy_max(to, count, top_.get() + i);
          }
          float* rows = all + i * block.width;
          pages.before_writing(rows, count * block.width * sizeof(float));
          energy_pack(tile.get(), roi_ + i, count, block.width, rows);
          if (alone) lattice_.splat_some(rows, block.width, i, i + count, table);
        }
      }
    });
    if (!alone) lattice_.splat(all, block.width, table);
  }
  const float* plane(int64_t k) const { return probs_ + k * sizes_.full_h * sizes_.full_w; }

  EnergySizes sizes_;
  const PlaneSums* shrink_;  // null: to half the size
  const Lattice& lattice_;
  const float *probs_, *roi_;
  float* rows_;
  Buffer<float> top_;  // largest probability
  std::vector<Buffer<float>> tables_;
};

std::tuple<at::Tensor, at::Tensor> dense_energy_cpu(const at::Tensor& probs, const at::Tensor& image,
                                                    const at::Tensor& roi, const at::Tensor& unlabelled,
                                                    double sigma_xy, double sigma_rgb, bool with_gradient) {
  check_float32(probs, 4, "dense_energy", "probs");
  check_float32(image, 4, "dense_energy", "image");
  check_float32(roi, 3, "dense_energy", "roi");
  const int64_t batch = probs.size(0);
  const EnergySizes sizes{probs.size(1), probs.size(2), probs.size(3), image.size(2), image.size(3)};
  TORCH_CHECK_VALUE(image.size(0) == batch && image.size(1) == 3, "dense_energy: image does not fit probs ",
                    probs.sizes());
  TORCH_CHECK_VALUE(roi.sizes() == at::IntArrayRef({batch, sizes.h, sizes.w}), "dense_energy: roi does not fit image ",
                    image.sizes());
  TORCH_CHECK_TYPE(unlabelled.scalar_type() == at::kBool, "dense_energy: unlabelled must be bool, got ",
                   unlabelled.scalar_type());
  TORCH_CHECK_VALUE(unlabelled.sizes() == roi.sizes(), "dense_energy: unlabelled does not fit roi ", roi.sizes());
  TORCH_CHECK_VALUE(sigma_xy > 0 && sigma_rgb > 0, "dense_energy: the standard deviations must be > 0");
  TORCH_CHECK_VALUE(std::max(sizes.full_h, sizes.full_w) < INT32_MAX, "dense_energy: probs are too large");
  const int64_t n = sizes.pixels();
  TORCH_CHECK_VALUE(probs.numel() > 0 && n > 0, "dense_energy: probs and image must not be empty");
  auto slope = at::empty({with_gradient ? batch : 0, sizes.rows()}, probs.options());
  float* slopes = slope.mutable_data_ptr<float>();
  const FreshPages pages(slope.numel() * sizeof(float));

  const auto p = probs.contiguous(), colours = image.contiguous(), inside = roi.contiguous();
  const auto ignored = unlabelled.contiguous();
  std::vector<PlaneSums> shrink;
  if (!sizes.halved()) shrink.emplace_back(sizes.full_h, sizes.full_w, sizes.h, sizes.w, false);
  const double factor = kWeight / static_cast<double>(batch);
  std::vector<double> energy(batch);
  over_images(batch, [&](int64_t b) {
    const auto features = pixel_features(colours.const_data_ptr<float>() + b * 3 * n, sizes.h, sizes.w, sizes.w, n,
                                         static_cast<float>(sigma_xy), static_cast<float>(sigma_rgb));
    const Lattice lattice(features, n, 5);
    const Buffer<float> own(with_gradient ? 0 : sizes.rows());
    float* rows = with_gradient ? slopes + b * sizes.rows() : own.get();
    ImageEnergy one(sizes, shrink.empty() ? nullptr : shrink.data(), lattice,
                    p.const_data_ptr<float>() + b * sizes.classes * sizes.full_h * sizes.full_w,
                    inside.const_data_ptr<float>() + b * n, rows, pages);
    energy[b] = one.finish(bool_bytes(ignored) + b * n, static_cast<float>(-2 * factor));
  });
  double total = 0;
  for (const double e : energy) total += e;
  return {at::full({}, -factor * total, probs.options()), slope};
}

// Calls run(image, block) for all blocks of all images.
template <class Run>
void over_blocks(int64_t batch, const EnergySizes& sizes, const Run& run) {
  at::parallel_for(0, batch * sizes.num_blocks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i / sizes.num_blocks(), sizes.block(i % sizes.num_blocks()));
  });
}

// out [B, K, H, W] of slopes at half the size.
void spread_halves(const float* slope, int64_t batch, const EnergySizes& sizes, float scale, float* out) {
  const int64_t n = sizes.pixels(), full = sizes.full_h * sizes.full_w;
  const FreshPages pages(batch * sizes.classes * full * sizeof(float));
  const int64_t band = std::max<int64_t>(1, 4096 / sizes.full_w);  // rows of the lattice: 32 KiB of a plane
  over_blocks(batch, sizes, [&](int64_t b, const Block& block) {
    Buffer<float> tile(kEnergyClasses * kEnergyRun);
    const float* from = slope + b * sizes.rows() + block.first * n;
    float* to = out + (b * sizes.classes + block.first) * full;
    for (int64_t y = 0; y < sizes.h; ++y) {
      const int64_t ahead = std::min(band, sizes.h - y);
      for (int64_t k = 0; y % band == 0 && k < block.count; ++k) {
        pages.before_writing(to + k * full + 2 * y * sizes.full_w, 2 * ahead * sizes.full_w * sizeof(float));
      }
      for (int64_t x = 0; x < sizes.w; x += kEnergyRun) {
        const int64_t count = std::min(kEnergyRun, sizes.w - x);
        energy_unpack(from + (y * sizes.w + x) * block.width, count, block.width, block.count, kEnergyRun, tile.get());
        for (int64_t k = 0; k < block.count; ++k) {
          float* row = to + k * full + 2 * y * sizes.full_w + 2 * x;
          energy_double(tile.get() + k * kEnergyRun, count, 0.25f * scale, row, row + sizes.full_w);
        }
      }
    }
  });
}

// The same of any size.
void spread_any(const float* slope, int64_t batch, const EnergySizes& sizes, float scale, float* out) {
  const int64_t n = sizes.pixels(), full = sizes.full_h * sizes.full_w;
  const PlaneSums spread(sizes.full_h, sizes.full_w, sizes.h, sizes.w, true);
  over_blocks(batch, sizes, [&](int64_t b, const Block& block) {
    Buffer<float> planes(block.count * n), mixed(sizes.w);
    energy_unpack(slope + b * sizes.rows() + block.first * n, n, block.width, block.count, n, planes.get());
    for (int64_t i = 0; i < block.count * n; ++i) planes[i] *= scale;
    float* to = out + (b * sizes.classes + block.first) * full;
    for (int64_t k = 0; k < block.count; ++k) {
      for (int64_t y = 0; y < sizes.full_h; ++y) {
        spread.mix(planes.get() + k * n, sizes.w, y, mixed.get());
        spread.along(mixed.get(), 0, sizes.full_w, to + k * full + y * sizes.full_w);
      }
    }
  });
}

at::Tensor dense_energy_backward_cpu(const at::Tensor& grad, const at::Tensor& slope, at::IntArrayRef shape, int64_t h,
                                     int64_t w) {
  check_float32(grad, 0, "dense_energy_backward", "grad");
  check_float32(slope, 2, "dense_energy_backward", "slope");
  const bool valid = shape.size() == 4 && std::all_of(shape.begin(), shape.end(), [](int64_t s) {
    return s >= 0 && s < INT32_MAX;
  });
  const bool fits = h > 0 && w > 0 && h < INT32_MAX && w < INT32_MAX && h * w <= slope.numel();
  TORCH_CHECK_VALUE(valid && fits, "dense_energy_backward: no such shape: ", shape, " from ", h, " x ", w);
  auto out = at::empty(shape, slope.options());
  if (out.numel() == 0) return out;
  const EnergySizes sizes{shape[1], shape[2], shape[3], h, w};
  TORCH_CHECK_VALUE(slope.size(0) == shape[0] && slope.size(1) == sizes.rows(), "dense_energy_backward: slope ",
                    slope.sizes(), " does not fit ", shape);
  const auto rows = slope.contiguous();
  const auto spread = sizes.halved() ? spread_halves : spread_any;
  spread(rows.const_data_ptr<float>(), shape[0], sizes, *grad.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def(
      "dense_energy(Tensor probs, Tensor image, Tensor roi, Tensor unlabelled, float sigma_xy, float sigma_rgb, "
      "bool with_gradient) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def("dense_energy_backward(Tensor grad, Tensor slope, int[] shape, int h, int w) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("dense_energy", &dense_energy_cpu);
  m.impl("dense_energy_backward", &dense_energy_backward_cpu);
}

}  // namespace wsss
