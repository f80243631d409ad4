// Bodies of the dense CRF on the device (device.h). The op is defined by kernels/dense_crf/reference.py.
//
// Letters: K classes, L live classes of an image (those that get messages). Pixels are numbered over the images, values
// are rows of `quads` Quads per pixel: the L live classes, then padding.
#pragma once
#include <cmath>
#include <cstdint>

#include "device.h"
#include "lattice/lattice_view.h"

namespace wsss {

struct CrfImage {
  int64_t pixel;  // its first
  int64_t points, width;
  int64_t offset;  // of its class maps in the batch
};

// The class maps of a batch.
struct CrfMaps {
  const CrfImage* images;
  int64_t num_images, classes, stride, plane;
  const float* unary;
  const int32_t* order;  // [images, K] live classes, then the others; null: all live
  const int32_t* live;   // [images] L

  WSSS_HOST_DEVICE int64_t image_of(int64_t pixel) const {
    return find_last<&CrfImage::pixel>(images, num_images, pixel);
  }
  // Where class 0 of a pixel lies in the class maps.
  WSSS_HOST_DEVICE int64_t place(const CrfImage& image, int64_t local) const {
    const auto pixel = static_cast<uint32_t>(local), width = static_cast<uint32_t>(image.width);
    return image.offset + pixel / width * stride + pixel % width;
  }
  WSSS_HOST_DEVICE int64_t num_live(int64_t image) const { return order == nullptr ? classes : live[image]; }
  WSSS_HOST_DEVICE int64_t class_at(int64_t image, int64_t k) const {
    return order == nullptr ? k : order[image * classes + k];
  }
};

WSSS_HOST_DEVICE inline float larger(float a, float b) { return a > b ? a : b; }

// Largest of -U and the sum of exp(-U - largest) over the classes that come `first` to last in the order of the image.
WSSS_HOST_DEVICE inline void crf_total(const CrfMaps& maps, int64_t image, int64_t place, int64_t first, float& top,
                                       float& sum) {
  top = -INFINITY;
  sum = 0.f;
  for (int64_t k = first; k < maps.classes; ++k) {
    top = larger(top, -maps.unary[place + maps.class_at(image, k) * maps.plane]);
  }
  for (int64_t k = first; k < maps.classes; ++k) {
    sum += expf(-maps.unary[place + maps.class_at(image, k) * maps.plane] - top);
  }
}

// top, sum [pixels]: `crf_total` over all classes.
struct CrfStartBody {
  CrfMaps maps;  // before the choice of live classes
  float *top, *sum;
  WSSS_HOST_DEVICE void operator()(int64_t pixel, int64_t) const {
    const int64_t b = maps.image_of(pixel);
    const int64_t place = maps.place(maps.images[b], pixel - maps.images[b].pixel);
    crf_total(maps, b, place, 0, top[pixel], sum[pixel]);
  }
};

// parts [images, K, kReduceParts]: maxima of Q0 over some pixels each.
struct CrfClassMaxBody {
  CrfMaps maps;
  const float *top, *sum;
  float* parts;
  WSSS_HOST_DEVICE void operator()(int64_t row, int64_t) const {
    const int64_t plane = row / kReduceParts, c = plane % maps.classes;
    const CrfImage& image = maps.images[plane / maps.classes];
    float most = 0.f;
    for (int64_t i = row % kReduceParts; i < image.points; i += kReduceParts) {
      const int64_t pixel = image.pixel + i;
      const float logit = -maps.unary[maps.place(image, i) + c * maps.plane];
      most = larger(most, expf(logit - top[pixel]) / sum[pixel]);
    }
    parts[row] = most;
  }
};

// parts [images, kReduceParts]: maxima of the message of a class with Q = 1 everywhere.
struct CrfReachBody {
  const CrfImage* images;
  LatticeTerm<float, 2> spatial;
  LatticeTerm<float, 5> bilateral;
  float* parts;
  WSSS_HOST_DEVICE void operator()(int64_t row, int64_t) const {
    const CrfImage& image = images[row / kReduceParts];
    float most = 0.f;
    for (int64_t i = row % kReduceParts; i < image.points; i += kReduceParts) {
      float sum = 0.f;
      spatial.add<1>(image.pixel + i, 1, 0, &sum);
      bilateral.add<1>(image.pixel + i, 1, 0, &sum);
      most = larger(most, sum);
    }
    parts[row] = most;
  }
};

// One image: its classes in order, those whose message may reach `prune` first.
struct CrfLiveBody {
  const float *class_max, *reach;  // [images, K], [images]
  float prune;
  int64_t classes;
  int32_t *order, *live;
  WSSS_HOST_DEVICE void operator()(int64_t b, int64_t) const {
    int32_t count = 0;
    for (const bool alive : {true, false}) {
      for (int64_t c = 0; c < classes; ++c) {
        if ((class_max[b * classes + c] * reach[b] >= prune) != alive) continue;
        order[b * classes + count++] = static_cast<int32_t>(c);
      }
      if (alive) live[b] = count;
    }
  }
};

// start [pixels, quads] = -U of the live classes, -inf in the padding. base, rest [pixels]: `crf_total` over the other
// classes; null where all are live.
struct CrfLoadBody {
  CrfMaps maps;
  int64_t quads;
  Quad* start;
  float *base, *rest;
  WSSS_HOST_DEVICE void operator()(int64_t pixel, int64_t) const {
    const int64_t b = maps.image_of(pixel), live = maps.num_live(b);
    const int64_t place = maps.place(maps.images[b], pixel - maps.images[b].pixel);
    for (int64_t q = 0; q < quads; ++q) {
      float value[4];
      for (int j = 0; j < 4; ++j) {
        const int64_t k = 4 * q + j;
        value[j] = k < live ? -maps.unary[place + maps.class_at(b, k) * maps.plane] : -INFINITY;
      }
      start[pixel * quads + q] = {value[0], value[1], value[2], value[3]};
    }
    if (base != nullptr) crf_total(maps, b, place, live, base[pixel], rest[pixel]);
  }
};

// What the softmax of a pixel needs besides its row, and leaves behind; all null where every class is live.
struct CrfOthers {
  const float *base, *rest;
  float *top, *sum;  // largest exponent, sum of exp(. - top) over all classes
};

// row <- softmax over the live classes in it and the others.
template <int N>
WSSS_HOST_DEVICE inline void softmax_row(int64_t pixel, int64_t quads, const CrfOthers& others, Quad* row) {
  const int64_t count = N > 0 ? N : quads;
  float top = others.base != nullptr ? others.base[pixel] : -INFINITY;
  for (int64_t q = 0; q < count; ++q) {
    top = larger(top, larger(larger(row[q].x, row[q].y), larger(row[q].z, row[q].w)));
  }
  Quad sums{};
  for (int64_t q = 0; q < count; ++q) {
    row[q] = {expf(row[q].x - top), expf(row[q].y - top), expf(row[q].z - top), expf(row[q].w - top)};
    sums = sums + row[q];
  }
  float sum = (sums.x + sums.y) + (sums.z + sums.w);
  if (others.base != nullptr) {
    sum += others.rest[pixel] * expf(others.base[pixel] - top);
    others.top[pixel] = top;
    others.sum[pixel] = sum;
  }
  for (int64_t q = 0; q < count; ++q) row[q] = row[q] * (1.f / sum);
}

struct CrfMessages {
  LatticeTerm<Quad, 2> spatial;
  LatticeTerm<Quad, 5> bilateral;
};

// rows = softmax(start + messages), for rows of N Quads.
template <int N>
struct CrfStepBody {
  const Quad* start;
  CrfMessages messages;
  CrfOthers others;
  Quad* rows;
  WSSS_HOST_DEVICE void operator()(int64_t pixel, int64_t) const {
    Quad row[N];
    for (int q = 0; q < N; ++q) row[q] = start[pixel * N + q];
    messages.spatial.template add<N>(pixel, N, 0, row);
    messages.bilateral.template add<N>(pixel, N, 0, row);
    softmax_row<N>(pixel, N, others, row);
    for (int q = 0; q < N; ++q) rows[pixel * N + q] = row[q];
  }
};

// The same for wider rows, in two launches: one lane per Quad, then one item per pixel.
struct CrfLogitBody {
  const Quad* start;
  CrfMessages messages;
  int64_t quads;
  Quad* rows;
  WSSS_HOST_DEVICE void operator()(int64_t pixel, int64_t lane) const {
    Quad logit = start[pixel * quads + lane];
    messages.spatial.add<1>(pixel, quads, lane, &logit);
    messages.bilateral.add<1>(pixel, quads, lane, &logit);
    rows[pixel * quads + lane] = logit;
  }
};

struct CrfSoftmaxBody {
  CrfOthers others;
  int64_t quads;
  Quad* rows;
  WSSS_HOST_DEVICE void operator()(int64_t pixel, int64_t) const {
    softmax_row<0>(pixel, quads, others, rows + pixel * quads);
  }
};

struct CrfStoreBody {
  CrfMaps maps;
  int64_t quads;
  const Quad* rows;
  const float *top, *sum;  // as in CrfOthers
  float* out;
  WSSS_HOST_DEVICE void operator()(int64_t pixel, int64_t) const {
    const int64_t b = maps.image_of(pixel), live = maps.num_live(b);
    const int64_t place = maps.place(maps.images[b], pixel - maps.images[b].pixel);
    const float* row = reinterpret_cast<const float*>(rows + pixel * quads);
    for (int64_t k = 0; k < live; ++k) out[place + maps.class_at(b, k) * maps.plane] = row[k];
    for (int64_t k = live; k < maps.classes; ++k) {
      const int64_t at = place + maps.class_at(b, k) * maps.plane;
      out[at] = expf(-maps.unary[at] - top[pixel]) / sum[pixel];
    }
  }
};

}  // namespace wsss
