// The lattice of a batch, step by step: one sequence of launches for every Device (device.h).
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "device.h"
#include "lattice/lattice_build.h"
#include "lattice/lattice_view.h"

namespace wsss {

struct ImageSize {
  int64_t h, w;
  const float* image;  // three planes on the device
};

// Frames and images, each with one past the last.
struct LatticeInput {
  std::vector<LatticeFrame> frames;
  std::vector<LatticeImage> images;
  int64_t pixels = 0;

  // `share`: images of one size have one frame, without colours.
  LatticeInput(const std::vector<ImageSize>& sizes, bool share) {
    int64_t points = 0;
    for (const auto& size : sizes) {
      const int64_t n = size.h * size.w;
      size_t f = 0;
      while (f < frames.size() && !(share && frames[f].points == n && frames[f].width == size.w)) ++f;
      if (f == frames.size()) {
        frames.push_back({points, pixels, share ? nullptr : size.image, n, size.w});
        points += n;
      }
      images.push_back({pixels, static_cast<int64_t>(f), frames[f].first, 0, 0, 0, 0});
      pixels += n;
    }
    frames.push_back({points, pixels, nullptr, 0, 0});
    images.push_back({pixels, 0, points, 0, 0, 0, 0});
  }
  int64_t num_frames() const { return static_cast<int64_t>(frames.size()) - 1; }
  int64_t num_images() const { return static_cast<int64_t>(images.size()) - 1; }
  int64_t num_points() const { return frames.back().first; }
};

template <class Device, int D>
class DeviceLattice {
 public:
  static constexpr int C = D + 1;

  // Starts to build; the totals arrive at `totals` on the device. Then call `finish` with a copy of them.
  DeviceLattice(const Device& device, const LatticeInput& input, int64_t stride, int64_t plane, float sigma_xy,
                float sigma_rgb, LatticeTotals* totals)
      : device_(device),
        memory_(device.memory()),
        num_pixels_(input.pixels),
        num_frames_(input.num_frames()),
        num_entries_(C * input.num_points()),
        frames_(upload(device, input.frames)),
        images_(upload(device, input.images)),
        layout_(memory_, 1),
        keys_(memory_, num_entries_),
        order_(memory_, num_entries_),
        number_(memory_, num_entries_),
        weight_(memory_, num_entries_) {
    const LatticeSource<D> source{frames_.get(), num_frames_, stride,    plane,
                                  sigma_xy,      sigma_rgb,   simplex_scale<D>()};
    const int64_t rows = num_frames_ * kLatticeRanges<D>;
    DeviceArray<int32_t> parts(memory_, rows * kReduceParts);
    device.for_each(num_frames_ * kReduceParts, 1, LatticeRangeBody<D>{source, parts.get()});
    const auto ranges = reduce_parts(device, parts, rows);
    parts.release();
    device.for_each(1, 1, LatticeLayoutBody<D>{ranges.get(), num_frames_, layout_.get()});

    DeviceArray<uint64_t> keys(memory_, num_entries_);
    DeviceArray<int32_t> order(memory_, num_entries_);
    device.for_each(num_entries_ / C, 1,
                    LatticeKeyBody<D>{source, ranges.get(), layout_.get(), keys.get(), order.get(), weight_.get()});
    device.sort_pairs(keys.get(), keys_.get(), order.get(), order_.get(), num_entries_);
    device.for_each(num_entries_, 1, LatticeHeadBody{keys_.get(), number_.get()});
    device.inclusive_sum(number_.get(), num_entries_);
    view_.num_images = input.num_images();
    device.for_each(1, 1,
                    LatticeTotalsBody<D>{frames_.get(), num_frames_, number_.get(), layout_.get(), images_.get(),
                                         view_.num_images, totals});
  }
  DeviceLattice(const DeviceLattice&) = delete;

  void finish(const LatticeTotals& totals) {
    totals_ = totals;
    const int64_t m = totals.vertices;
    corner_ = DeviceArray<int32_t>(memory_, num_entries_);
    entries_ = DeviceArray<LatticeSplat>(memory_, num_entries_);
    start_ = DeviceArray<int32_t>(memory_, m + 1);
    owner_ = DeviceArray<int32_t>(memory_, totals.owners);
    ahead_ = DeviceArray<int32_t>(memory_, C * m);
    behind_ = DeviceArray<int32_t>(memory_, C * m);
    DeviceArray<uint64_t> vertices(memory_, m);
    device_.for_each(
        num_entries_, 1,
        LatticeEntryBody<D>{frames_.get(), num_frames_, num_entries_, keys_.get(), order_.get(), number_.get(),
                            weight_.get(), corner_.get(), entries_.get(), start_.get(), vertices.get()});
    fill(device_, owner_.get(), totals.owners, -1);
    device_.for_each(m, 1,
                     LatticeOwnerBody<D>{frames_.get(), num_frames_, number_.get(), start_.get(), owner_.get()});
    fill(device_, behind_.get(), C * m, 0);
    device_.for_each(m, C, LatticeNeighbourBody<D>{vertices.get(), m, layout_.get(), ahead_.get(), behind_.get()});
    keys_.release();
    order_.release();
    number_.release();
    view_ = {images_.get(),  view_.num_images, m,           corner_.get(), weight_.get(),
             entries_.get(), start_.get(),     owner_.get(), ahead_.get(),  behind_.get()};
  }

  // Turns the filter into n_i K_ij n_j with n = (K 1 + 1e-20)^-1/2.
  void normalise() {
    DeviceArray<float> norm(memory_, num_pixels_);
    fill(device_, norm.get(), num_pixels_, 1.f);
    const auto table = filter(norm.get(), 1);
    device_.for_each(num_pixels_, 1, LatticeNormBody<D>{message(table, 1.f), norm.get()});
    device_.for_each(num_entries_, 1,
                     LatticeNormaliseBody<D>{frames_.get(), num_frames_, norm.get(), weight_.get(), entries_.get()});
  }

  // Blurred sums of `rows` [pixels, width] at the vertices [rows, width].
  template <class V>
  DeviceArray<V> filter(const V* rows, int64_t width) const {
    DeviceArray<V> table(memory_, totals_.rows * width), other(memory_, totals_.chunks * width);
    device_.for_each(totals_.chunks, width, LatticeChunkBody<V, D>{view_, rows, width, other.get()});
    device_.for_each(totals_.rows, width, LatticeCombineBody<V, D>{view_, other.get(), width, table.get()});
    for (int64_t axis = 0; axis < C; ++axis) {
      device_.for_each(totals_.rows, width, LatticeBlurBody<V, D>{view_, axis, table.get(), width, other.get()});
      std::swap(table, other);
    }
    return table;
  }

  // What `filter` returned, as a term of a sum with this weight.
  template <class V>
  LatticeTerm<V, D> message(const DeviceArray<V>& table, float weight) const {
    return {view_, table.get(), weight * lattice_slice_factor<D>};
  }

 private:
  const Device& device_;
  DeviceMemory memory_;
  int64_t num_pixels_, num_frames_, num_entries_;
  LatticeTotals totals_{};
  DeviceArray<LatticeFrame> frames_;
  DeviceArray<LatticeImage> images_;
  DeviceArray<LatticeLayout<D>> layout_;
  DeviceArray<uint64_t> keys_;
  DeviceArray<int32_t> order_, number_;
  DeviceArray<float> weight_;
  DeviceArray<int32_t> corner_, start_, owner_, ahead_, behind_;
  DeviceArray<LatticeSplat> entries_;
  LatticeView<D> view_{};
};

// Calls run(begin, end) for parts of the images [first, last) of at most `most`, and for halves of a part where it
// returns false. False if it does so for an image alone.
template <class Run>
bool run_in_parts(int64_t first, int64_t last, int64_t most, const Run& run) {
  const int64_t count = last - first;
  if (count == 0 || (count <= most && run(first, last))) return true;
  if (count == 1) return false;
  const int64_t middle = first + count / 2;
  return run_in_parts(first, middle, most, run) && run_in_parts(middle, last, most, run);
}

}  // namespace wsss
