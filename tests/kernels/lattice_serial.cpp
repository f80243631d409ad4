// The CUDA code of lattice_filter and dense_crf on the SerialDevice, for test_lattice_serial.py.
#include "dense_crf/dense_crf_device.h"
#include "lattice/lattice_filter_device.h"
#include "serial_device.h"

extern "C" {

int lattice_filter_serial(const float* image, const float* planes, float* out, int64_t batch, int64_t channels,
                          int64_t h, int64_t w, float sigma_xy, float sigma_rgb, int64_t images_at_once, int order) {
  const wsss::LatticeFilterBatch a{image, planes, out, batch, channels, h, w, sigma_xy, sigma_rgb, images_at_once};
  return wsss::lattice_filter(wsss::SerialDevice(order), a);
}

int dense_crf_serial(const float* unary, const float* image, float* out, int64_t batch, int64_t classes, int64_t h,
                     int64_t w, const float* params, int64_t iterations, const int64_t* sizes, int64_t images_at_once,
                     int order) {
  const wsss::DenseCrfBatch a{unary, image, out, batch, classes, h, w, sizes, images_at_once};
  const wsss::DenseCrfParams p{params[0], params[1], params[2], params[3], params[4], iterations, params[5]};
  return wsss::dense_crf(wsss::SerialDevice(order), a, p);
}

// Since the last call.
int64_t reads() { return std::exchange(wsss::SerialDevice::reads, 0); }

int64_t bytes_at_most() {
  const int64_t bytes = wsss::SerialDevice::bytes_at_most;
  wsss::SerialDevice::bytes_at_most = wsss::SerialDevice::bytes_in_use;
  return bytes;
}

}  // extern "C"
