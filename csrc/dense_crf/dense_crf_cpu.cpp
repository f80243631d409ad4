// Schema of wsss::dense_crf and its CPU implementation.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "dense_crf/dense_crf.h"
#include "dense_crf/dense_crf_check.h"
#include "dense_crf/messages.h"

namespace wsss {
namespace {

// One image inside planes of `plane` floats with rows of `stride`; its own h * w pixels are numbered row by row.
struct Frame {
  int64_t classes, h, w, stride, plane;

  // Calls run(first pixel, offset in a plane, count) for stretches of the pixels [begin, end), count <= kCrfChunk.
  template <class Run>
  void for_stretches(int64_t begin, int64_t end, const Run& run) const {
    const int64_t row = stride == w ? h * w : w;
    for (int64_t i = begin; i < end;) {
      const int64_t count = std::min({kCrfChunk, end - i, row - i % row});
      run(i, i / row * stride + i % row, count);
      i += count;
    }
  }
};

constexpr int64_t kGrain = 16 * kCrfChunk;  // pixels per task

class MeanField {
 public:
  MeanField(const Frame& frame, const float* unary, float* out, Messages& messages)
      : frame_(frame), pixels_(frame.h * frame.w), unary_(unary), out_(out), messages_(messages) {}

  // Sorts the classes into live ones and those whose message stays below `prune`.
  void choose_live(float prune) {
    std::vector<float> most(frame_.classes, 0.0f);
    const float reach = prune > 0 ? largest_reach() : 0.0f;
    if (prune > 0) class_max(most.data());
    for (int64_t c = 0; c < frame_.classes; ++c) (prune > 0 && most[c] * reach < prune ? dropped_ : live_).push_back(c);
    if (live_.empty()) std::swap(live_, dropped_), messages_.clear();
  }

  void run(int64_t iterations) {
    width_ = lattice_width(live_.size());
    start_ = Buffer<float>(pixels_ * width_);
    if (!dropped_.empty()) {
      base_ = Buffer<float>(pixels_);
      rest_ = Buffer<float>(pixels_);
    }
    at::parallel_for(0, pixels_, kGrain, [&](int64_t begin, int64_t end) {
      frame_.for_stretches(begin, end, [&](int64_t i, int64_t at, int64_t count) {
        crf_load(unary_ + at, frame_.plane, live_.data(), live_.size(), count, width_, start_.get() + i * width_);
        if (dropped_.empty()) return;
        crf_dropped(unary_ + at, frame_.plane, dropped_.data(), dropped_.size(), count, base_.get() + i,
                    rest_.get() + i);
      });
    });
    if (messages_.empty()) iterations = 0;
    bool piecewise = at::in_parallel_region() || at::get_num_threads() == 1;
    for (const auto& m : messages_) piecewise = piecewise && m->piecewise();
    for (auto& m : messages_) m->resize(width_, piecewise);
    if (!piecewise && iterations > 0) q_ = Buffer<float>(pixels_ * width_);
    for (int64_t step = 0; step < iterations; ++step) piecewise ? sweep_alone(step) : sweep_shared(step);
    at::parallel_for(0, pixels_, kGrain, [&](int64_t begin, int64_t end) {
      Buffer<float> rows(kCrfChunk * width_);
      float top[kCrfChunk], inverse[kCrfChunk];
      frame_.for_stretches(begin, end, [&](int64_t i, int64_t at, int64_t count) {
        marginals(iterations, i, count, rows.get(), top, inverse);
        crf_store(rows.get(), count, width_, live_.data(), live_.size(), dropped_.data(), dropped_.size(), unary_ + at,
                  top, inverse, frame_.plane, out_ + at);
      });
    });
  }

 private:
  // max_i sum_k w_k n_i (K n)_i: the largest message of a class with Q = 1 everywhere.
  float largest_reach() const {
    Buffer<float> total(pixels_);
    std::fill(total.get(), total.get() + pixels_, 1.0f);
    for (auto& m : messages_) {
      m->resize(1, false);
      m->take(total.get());
    }
    std::fill(total.get(), total.get() + pixels_, 0.0f);
    for (const auto& m : messages_) {
      at::parallel_for(0, pixels_, kGrain, [&](int64_t begin, int64_t end) {
        m->add(begin, end, total.get() + begin, total.get() + begin);
      });
    }
    return *std::max_element(total.get(), total.get() + pixels_);
  }

  void class_max(float* most) const {
    std::mutex mutex;
    at::parallel_for(0, pixels_, kGrain, [&](int64_t begin, int64_t end) {
      Buffer<float> scratch(frame_.classes * kCrfChunk);
      std::vector<float> own(frame_.classes, 0.0f);
      frame_.for_stretches(begin, end, [&](int64_t, int64_t at, int64_t count) {
        crf_class_max(unary_ + at, frame_.plane, frame_.classes, count, scratch.get(), own.data());
      });
      const std::lock_guard lock(mutex);
      for (int64_t c = 0; c < frame_.classes; ++c) most[c] = std::max(most[c], own[c]);
    });
  }

  // rows = Q after `step` iterations for `count` pixels from `i` on.
  void marginals(int64_t step, int64_t i, int64_t count, float* rows, float* top, float* inverse) const {
    const float* start = start_.get() + i * width_;
    if (step == 0) std::copy(start, start + count * width_, rows);
    for (size_t k = 0; step > 0 && k < messages_.size(); ++k) {
      messages_[k]->add(i, i + count, k == 0 ? start : rows, rows);
    }
    const bool all = dropped_.empty();
    crf_softmax(rows, count, width_, all ? nullptr : base_.get() + i, all ? nullptr : rest_.get() + i, top, inverse);
  }

  void sweep_alone(int64_t step) {
    Buffer<float> rows(kCrfChunk * width_);
    float top[kCrfChunk], inverse[kCrfChunk];
    for (auto& m : messages_) m->begin_pieces();
    for (int64_t i = 0; i < pixels_; i += kCrfChunk) {
      const int64_t count = std::min(kCrfChunk, pixels_ - i);
      marginals(step, i, count, rows.get(), top, inverse);
      for (auto& m : messages_) m->take_piece(i, i + count, rows.get());
    }
    for (auto& m : messages_) m->end_pieces();
  }

  void sweep_shared(int64_t step) {
    at::parallel_for(0, pixels_, kGrain, [&](int64_t begin, int64_t end) {
      float top[kCrfChunk], inverse[kCrfChunk];
      for (int64_t i = begin; i < end; i += kCrfChunk) {
        marginals(step, i, std::min(kCrfChunk, end - i), q_.get() + i * width_, top, inverse);
      }
    });
    for (auto& m : messages_) m->take(q_.get());
  }

  Frame frame_;
  int64_t pixels_, width_ = 0;
  const float* unary_;
  float* out_;
  Messages& messages_;
  std::vector<int64_t> live_, dropped_;
  Buffer<float> start_, base_, rest_, q_;  // -U in rows; the dropped classes; Q in rows
};

// The spatial kernel of one size of image, the same for all images of that size.
struct Spatial {
  std::shared_ptr<const Lattice> lattice;  // in fast mode
  std::shared_ptr<const GridGaussian> grid;

  Spatial(int64_t h, int64_t w, float sigma, Mode mode) {
    if (mode != Mode::fast) {
      grid = std::make_shared<GridGaussian>(h, w, sigma);
    } else {
      lattice = normalised<Lattice>(pixel_features(nullptr, h, w, 0, 0, sigma, 1.0f), h * w, 2);
    }
  }
  std::unique_ptr<Message> message(float weight) const {
    if (grid != nullptr) return std::make_unique<GridMessage>(grid, weight);
    return std::make_unique<LatticeMessage>(lattice, weight);
  }
};

void one_image(const Frame& frame, const float* unary, const float* image, float* out, const Spatial* spatial,
               const DenseCrfParams& p) {
  Messages messages;
  if (spatial != nullptr) messages.push_back(spatial->message(p.spatial_weight));
  const int64_t h = frame.h, w = frame.w;
  if (p.weight > 0 && p.mode == Mode::exact) {
    auto sums = normalised<PixelGaussian>(image, h, w, frame.stride, frame.plane, p.sigma_xy, p.sigma_rgb);
    messages.push_back(std::make_unique<PixelMessage>(std::move(sums), h * w, p.weight));
  } else if (p.weight > 0) {
    const double scale = p.mode == Mode::ring ? kRingScale : 1.0;
    const auto features = pixel_features(image, h, w, frame.stride, frame.plane, static_cast<float>(p.sigma_xy / scale),
                                         static_cast<float>(p.sigma_rgb / scale));
    auto lattice = normalised<Lattice>(features, h * w, 5, p.mode == Mode::ring);
    messages.push_back(std::make_unique<LatticeMessage>(std::move(lattice), p.weight));
  }
  MeanField field(frame, unary, out, messages);
  field.choose_live(p.prune);
  field.run(p.iterations);
}

at::Tensor dense_crf_cpu(const at::Tensor& unary, const at::Tensor& image, double spatial_sigma, double spatial_weight,
                         double sigma_xy, double sigma_rgb, double weight, int64_t iterations, double prune,
                         at::IntArrayRef sizes, c10::string_view mode) {
  check_dense_crf(unary, image, spatial_sigma, sigma_xy, sigma_rgb, iterations, sizes);
  const int64_t batch = unary.size(0), classes = unary.size(1), h = unary.size(2), w = unary.size(3);
  const auto energies = unary.contiguous(), colours = image.contiguous();
  auto out = sizes.empty() ? at::empty({batch, classes, h, w}, unary.options())
                           : at::zeros({batch, classes, h, w}, unary.options());
  if (out.numel() == 0) return out;

  const DenseCrfParams params{static_cast<float>(spatial_sigma), static_cast<float>(spatial_weight),
                              static_cast<float>(sigma_xy),      static_cast<float>(sigma_rgb),
                              static_cast<float>(weight),        iterations,
                              static_cast<float>(prune),     mode_of(mode)};
  const auto size_of = [&](int64_t b) {
    return sizes.empty() ? std::pair(h, w) : std::pair(sizes[2 * b], sizes[2 * b + 1]);
  };
  std::map<std::pair<int64_t, int64_t>, Spatial> spatial;  // one per size of the batch
  for (int64_t b = 0; b < batch && spatial_weight > 0; ++b) {
    const auto [own_h, own_w] = size_of(b);
    if (own_h * own_w > 0) spatial.try_emplace({own_h, own_w}, own_h, own_w, params.spatial_sigma, params.mode);
  }
  const float* from = energies.const_data_ptr<float>();
  const float* from_image = colours.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  over_images(batch, [&](int64_t b) {
    const auto size = size_of(b);
    const Frame frame{classes, size.first, size.second, w, h * w};
    if (frame.h * frame.w == 0) return;
    const auto found = spatial.find(size);
    one_image(frame, from + b * classes * h * w, from_image + b * 3 * h * w, to + b * classes * h * w,
              found == spatial.end() ? nullptr : &found->second, params);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def(
      "dense_crf(Tensor unary, Tensor image, float spatial_sigma, float spatial_weight, float sigma_xy, "
      "float sigma_rgb, float weight, int iterations, float prune, int[] sizes, str mode='fast') -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(wsss, CPU, m) { m.impl("dense_crf", &dense_crf_cpu); }

}  // namespace wsss
