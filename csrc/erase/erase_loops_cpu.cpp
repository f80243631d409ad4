// The inner loops of erase on the CPU: no torch header, one clone per instruction set.
#include "clones.h"
#include "erase/erase.h"

namespace wsss {
namespace {

template <class T>
WSSS_INLINE void widen_row(const T* cells, const std::vector<TapRun>& runs, const T* weights, T* __restrict__ out) {
  for (const TapRun& run : runs) {
    const T low = positive_part(cells[run.low]), high = positive_part(cells[run.high]);
    for (int64_t x = run.begin; x < run.end; ++x) out[x] = between(low, high, weights[x]);
  }
}

template <class T>
WSSS_INLINE void soft_row(const T* top, const T* bottom, T weight, T scale, int64_t width, T* __restrict__ keep) {
  for (int64_t x = 0; x < width; ++x) keep[x] = T(1) - between(top[x], bottom[x], weight) * scale;
}

template <class T>
WSSS_INLINE void hard_row(const T* top, const T* bottom, T weight, T peak, T threshold, int64_t width,
                          T* __restrict__ keep) {
  for (int64_t x = 0; x < width; ++x) {
    keep[x] = between(top[x], bottom[x], weight) / peak <= threshold ? T(1) : T(0);
  }
}

template <class T>
WSSS_INLINE void apply_row(const T* pixels, const T* keep, bool select, int64_t width, T* __restrict__ out) {
  if (select) {
    for (int64_t x = 0; x < width; ++x) out[x] = keep[x] != T(0) ? pixels[x] : T(0);
  } else {
    for (int64_t x = 0; x < width; ++x) out[x] = pixels[x] * keep[x];
  }
}

template <class T>
WSSS_INLINE void gather_row(const T* const* grad, const T* const* pixels, T weight, int64_t width, T* __restrict__ top,
                            T* __restrict__ bottom) {
  static_assert(kEraseColours == 3);
  const T *g0 = grad[0], *g1 = grad[1], *g2 = grad[2], *p0 = pixels[0], *p1 = pixels[1], *p2 = pixels[2];
  for (int64_t x = 0; x < width; ++x) {
    const T q = g0[x] * p0[x] + g1[x] * p1[x] + g2[x] * p2[x];
    top[x] += (T(1) - weight) * q;
    bottom[x] += weight * q;
  }
}

}  // namespace

WSSS_CLONES
void erase_widen_row(const float* cells, const std::vector<TapRun>& runs, const float* weights, float* out) {
  widen_row(cells, runs, weights, out);
}
WSSS_CLONES
void erase_widen_row(const double* cells, const std::vector<TapRun>& runs, const double* weights, double* out) {
  widen_row(cells, runs, weights, out);
}

WSSS_CLONES
void erase_soft_row(const float* top, const float* bottom, float weight, float scale, int64_t width, float* keep) {
  soft_row(top, bottom, weight, scale, width, keep);
}
WSSS_CLONES
void erase_soft_row(const double* top, const double* bottom, double weight, double scale, int64_t width, double* keep) {
  soft_row(top, bottom, weight, scale, width, keep);
}

WSSS_CLONES
void erase_hard_row(const float* top, const float* bottom, float weight, float peak, float threshold, int64_t width,
                    float* keep) {
  hard_row(top, bottom, weight, peak, threshold, width, keep);
}
WSSS_CLONES
void erase_hard_row(const double* top, const double* bottom, double weight, double peak, double threshold,
                    int64_t width, double* keep) {
  hard_row(top, bottom, weight, peak, threshold, width, keep);
}

WSSS_CLONES
void erase_apply_row(const float* pixels, const float* keep, bool select, int64_t width, float* out) {
  apply_row(pixels, keep, select, width, out);
}
WSSS_CLONES
void erase_apply_row(const double* pixels, const double* keep, bool select, int64_t width, double* out) {
  apply_row(pixels, keep, select, width, out);
}

WSSS_CLONES
void erase_gather_row(const float* const* grad, const float* const* pixels, float weight, int64_t width, float* top,
                      float* bottom) {
  gather_row(grad, pixels, weight, width, top, bottom);
}
WSSS_CLONES
void erase_gather_row(const double* const* grad, const double* const* pixels, double weight, int64_t width, double* top,
                      double* bottom) {
  gather_row(grad, pixels, weight, width, top, bottom);
}

}  // namespace wsss
