// wsss::lattice_filter on a Device: its bodies, and one sequence of launches for all.
#pragma once
#include <cstdint>
#include <vector>

#include "device.h"
#include "lattice/lattice_device.h"
#include "lattice/lattice_filter.h"

namespace wsss {

// rows [pixels, width] <- planes, with zeros in the surplus.
struct LatticeLoadBody {
  const float* planes;
  int64_t channels, plane, width;
  Quad* rows;
  WSSS_HOST_DEVICE void operator()(int64_t pixel, int64_t) const {
    const float* from = planes + pixel / plane * channels * plane + pixel % plane;
    for (int64_t q = 0; q < width; ++q) {
      float value[4];
      for (int j = 0; j < 4; ++j) value[j] = 4 * q + j < channels ? from[(4 * q + j) * plane] : 0.f;
      rows[pixel * width + q] = {value[0], value[1], value[2], value[3]};
    }
  }
};

struct LatticeStoreBody {
  LatticeTerm<Quad, 5> sums;
  int64_t channels, plane, width;
  float* planes;
  WSSS_HOST_DEVICE void operator()(int64_t pixel, int64_t) const {
    float* to = planes + pixel / plane * channels * plane + pixel % plane;
    const LatticeStencil<5> stencil(sums.lattice, pixel);
    for (int64_t q = 0; q < width; ++q) {
      const Quad sum = stencil.slice(sums.table, width, q) * sums.factor;
      const float value[4] = {sum.x, sum.y, sum.z, sum.w};
      for (int j = 0; j < 4; ++j) {
        if (4 * q + j < channels) to[(4 * q + j) * plane] = value[j];
      }
    }
  }
};

template <class Device>
bool lattice_filter(const Device& device, const LatticeFilterBatch& a) {
  const int64_t plane = a.h * a.w, width = (a.channels + 3) / 4;
  return run_in_parts(0, a.batch, a.images_at_once, [&](int64_t begin, int64_t end) {
    std::vector<ImageSize> sizes;
    for (int64_t b = begin; b < end; ++b) sizes.push_back({a.h, a.w, a.image + b * 3 * plane});
    const LatticeInput input(sizes, false);
    DeviceArray<LatticeTotals> counted(device.memory(), 1);
    DeviceLattice<Device, 5> lattice(device, input, a.w, plane, a.sigma_xy, a.sigma_rgb, counted.get());
    LatticeTotals totals;
    device.read(&totals, counted.get(), sizeof(totals));
    if (totals.fits == 0) return false;
    lattice.finish(totals);
    DeviceArray<Quad> rows(device.memory(), input.pixels * width);
    const int64_t offset = begin * a.channels * plane;
    device.for_each(input.pixels, 1, LatticeLoadBody{a.planes + offset, a.channels, plane, width, rows.get()});
    const auto table = lattice.filter(rows.get(), width);
    device.for_each(input.pixels, 1,
                    LatticeStoreBody{lattice.message(table, 1.f), a.channels, plane, width, a.out + offset});
    return true;
  });
}

}  // namespace wsss
