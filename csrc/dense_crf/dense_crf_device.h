// wsss::dense_crf on a Device: one sequence of launches for all.
#pragma once
#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "dense_crf/dense_crf.h"
#include "dense_crf/dense_crf_bodies.h"
#include "device.h"
#include "lattice/lattice_device.h"

namespace wsss {

// rows [pixels, quads] = softmax(start + messages).
template <class Device>
void crf_step(const Device& device, int64_t pixels, int64_t quads, const Quad* start, const CrfMessages& messages,
              const CrfOthers& others, Quad* rows) {
  switch (quads) {
    case 1: return device.for_each(pixels, 1, CrfStepBody<1>{start, messages, others, rows});
    case 2: return device.for_each(pixels, 1, CrfStepBody<2>{start, messages, others, rows});
    case 3: return device.for_each(pixels, 1, CrfStepBody<3>{start, messages, others, rows});
    case 4: return device.for_each(pixels, 1, CrfStepBody<4>{start, messages, others, rows});
    case 5: return device.for_each(pixels, 1, CrfStepBody<5>{start, messages, others, rows});
    case 6: return device.for_each(pixels, 1, CrfStepBody<6>{start, messages, others, rows});
    default:
      device.for_each(pixels, quads, CrfLogitBody{start, messages, quads, rows});
      device.for_each(pixels, 1, CrfSoftmaxBody{others, quads, rows});
  }
}

template <class Device>
class CrfPart {
 public:
  CrfPart(const Device& device, const DenseCrfBatch& batch, const DenseCrfParams& params, int64_t begin, int64_t end)
      : device_(device), memory_(device.memory()), batch_(batch), params_(params), plane_(batch.h * batch.w) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t h = batch.sizes ? batch.sizes[2 * b] : batch.h, w = batch.sizes ? batch.sizes[2 * b + 1] : batch.w;
      if (h * w == 0) continue;
      sizes_.push_back({h, w, batch.image + b * 3 * plane_});
      images_.push_back({pixels_, h * w, w, b * batch.classes * plane_});
      pixels_ += h * w;
    }
  }

  // False if the keys of the vertices do not fit.
  bool run() {
    if (images_.empty()) return true;
    if (!build()) return false;
    const auto images = upload(device_, images_);
    CrfMaps maps{images.get(), num_images(), batch_.classes, batch_.w, plane_, batch_.unary, nullptr, nullptr};
    DeviceArray<int32_t> order, live;
    DeviceArray<float> others[4];
    int64_t width = batch_.classes;
    if (params_.prune > 0) {
      order = DeviceArray<int32_t>(memory_, num_images() * batch_.classes);
      live = DeviceArray<int32_t>(memory_, num_images());
      width = choose_live(maps, order.get(), live.get());
      maps.order = order.get();
      maps.live = live.get();
      for (auto& values : others) values = DeviceArray<float>(memory_, pixels_);
    }
    const int64_t quads = (std::max<int64_t>(width, 1) + 3) / 4;
    DeviceArray<Quad> start(memory_, pixels_ * quads), rows(memory_, pixels_ * quads);
    device_.for_each(pixels_, 1, CrfLoadBody{maps, quads, start.get(), others[0].get(), others[1].get()});
    const CrfOthers rest{others[0].get(), others[1].get(), others[2].get(), others[3].get()};
    crf_step(device_, pixels_, quads, start.get(), {}, rest, rows.get());
    const bool silent = !spatial_ && !bilateral_;
    for (int64_t step = 0; step < params_.iterations && !silent; ++step) {
      DeviceArray<Quad> tables[2];
      const auto messages = filter<CrfMessages>(rows.get(), quads, tables);
      crf_step(device_, pixels_, quads, start.get(), messages, rest, rows.get());
    }
    device_.for_each(pixels_, 1, CrfStoreBody{maps, quads, rows.get(), rest.top, rest.sum, batch_.out});
    return true;
  }

 private:
  int64_t num_images() const { return static_cast<int64_t>(images_.size()); }

  bool build() {
    const DenseCrfParams& p = params_;
    DeviceArray<LatticeTotals> counted(memory_, 2);
    if (p.spatial_weight > 0) {
      spatial_.emplace(device_, LatticeInput(sizes_, true), 0, 0, p.spatial_sigma, 1.f, counted.get());
    }
    if (p.weight > 0) {
      bilateral_.emplace(device_, LatticeInput(sizes_, false), batch_.w, plane_, p.sigma_xy, p.sigma_rgb,
                         counted.get() + 1);
    }
    if (!spatial_ && !bilateral_) return true;
    LatticeTotals totals[2];
    device_.read(totals, counted.get(), sizeof(totals));
    if ((spatial_ && totals[0].fits == 0) || (bilateral_ && totals[1].fits == 0)) return false;
    if (spatial_) {
      spatial_->finish(totals[0]);
      spatial_->normalise();
    }
    if (bilateral_) {
      bilateral_->finish(totals[1]);
      bilateral_->normalise();
    }
    return true;
  }

  // Both kernels applied to rows [pixels, width]; `tables` holds what the messages point to.
  template <class Messages, class V>
  Messages filter(const V* rows, int64_t width, DeviceArray<V>* tables) const {
    Messages messages{};
    if (spatial_) {
      tables[0] = spatial_->filter(rows, width);
      messages.spatial = spatial_->message(tables[0], params_.spatial_weight);
    }
    if (bilateral_) {
      tables[1] = bilateral_->filter(rows, width);
      messages.bilateral = bilateral_->message(tables[1], params_.weight);
    }
    return messages;
  }

  // Fills order [images, K] and live [images]; returns the largest number of live classes.
  int64_t choose_live(const CrfMaps& maps, int32_t* order, int32_t* live) const {
    DeviceArray<float> top(memory_, pixels_), sum(memory_, pixels_);
    device_.for_each(pixels_, 1, CrfStartBody{maps, top.get(), sum.get()});
    const int64_t planes = num_images() * batch_.classes;
    DeviceArray<float> parts(memory_, planes * kReduceParts);
    device_.for_each(planes * kReduceParts, 1, CrfClassMaxBody{maps, top.get(), sum.get(), parts.get()});
    const auto class_max = reduce_parts(device_, parts, planes);

    fill(device_, top.get(), pixels_, 1.f);
    DeviceArray<float> tables[2];
    const auto reach_of = filter<CrfReach>(top.get(), 1, tables);
    device_.for_each(num_images() * kReduceParts, 1,
                     CrfReachBody{maps.images, reach_of.spatial, reach_of.bilateral, parts.get()});
    const auto reach = reduce_parts(device_, parts, num_images());
    device_.for_each(num_images(), 1,
                     CrfLiveBody{class_max.get(), reach.get(), params_.prune, batch_.classes, order, live});
    std::vector<int32_t> counts(images_.size());
    device_.read(counts.data(), live, counts.size() * sizeof(int32_t));
    return *std::max_element(counts.begin(), counts.end());
  }

  struct CrfReach {
    LatticeTerm<float, 2> spatial;
    LatticeTerm<float, 5> bilateral;
  };

  const Device& device_;
  DeviceMemory memory_;
  const DenseCrfBatch& batch_;
  const DenseCrfParams& params_;
  int64_t plane_, pixels_ = 0;
  std::vector<ImageSize> sizes_;
  std::vector<CrfImage> images_;
  std::optional<DeviceLattice<Device, 2>> spatial_;
  std::optional<DeviceLattice<Device, 5>> bilateral_;
};

template <class Device>
bool dense_crf(const Device& device, const DenseCrfBatch& batch, const DenseCrfParams& params) {
  return run_in_parts(0, batch.batch, batch.images_at_once, [&](int64_t begin, int64_t end) {
    return CrfPart<Device>(device, batch, params, begin, end).run();
  });
}

}  // namespace wsss
