// The CUDA code of path_affinity_loss on the SerialDevice, for test_path_affinity_serial.py.
#include "path_affinity_loss/path_affinity_loss_device.h"
#include "serial_device.h"

extern "C" {

// sizes: batch, h, w. own [3] gets the sums of `won`; `counts` null: these divide.
void path_affinity_serial(const float* logits, const int64_t* labels, int64_t ignore_index, const int64_t* sizes,
                          int radius, const int64_t* counts, int64_t* own, int32_t* kinds, int32_t* won,
                          double* losses, float* slopes, int order) {
  const wsss::SerialDevice device(order);
  const wsss::PathAffinityBatch batch{logits, labels, ignore_index, sizes[0], sizes[1], sizes[2], radius};
  wsss::path_kinds(device, batch, kinds);
  wsss::path_wins(device, batch, won);
  for (int64_t i = 0; i < sizes[0] * sizes[1] * sizes[2]; ++i) {
    for (int k = 0; k < 3; ++k) own[k] += won[3 * i + k];
  }
  wsss::path_pixels(device, batch, won, counts != nullptr ? counts : own, losses, slopes);
}

}  // extern "C"
