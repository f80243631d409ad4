// Schema of wsss::psl_loss and its CPU implementation.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <type_traits>
#include <vector>

#include "fresh_pages.h"
#include "psl_loss/psl_loss_check.h"

namespace wsss {
namespace {

constexpr int64_t kTile = 256;
constexpr int64_t kChunk = 8192;  // pixels of a task; their sums are added one after the other
static_assert(kTile % kPslBlock == 0 && kChunk % kTile == 0);

// The images of a batch, cut into chunks: each of one image, wherever it stands and whatever the threads.
struct Chunks {
  explicit Chunks(const at::Tensor& logits)
      : classes(logits.size(1)), pixels(logits.size(2) * logits.size(3)), each((pixels + kChunk - 1) / kChunk),
        count(logits.size(0) * each) {}
  const int64_t classes, pixels, each, count;

  // body(first pixel in the image, number of pixels) for the tiles of a chunk.
  template <class F>
  void for_each_tile(int64_t chunk, F body) const {
    const int64_t end = std::min((chunk % each + 1) * kChunk, pixels);
    for (int64_t i = chunk % each * kChunk; i < end; i += kTile) body(i, std::min(kTile, end - i));
  }
};

// Of one image: whether a class is background or present. For every value of a mask.
struct Allowed : std::array<bool, 256> {
  Allowed(const uint8_t* present, int64_t classes) : std::array<bool, 256>{true} {
    std::transform(present, present + classes - 1, begin() + 1, [](uint8_t x) { return x != 0; });
  }
};

// Planes of `count` pixels as floats: themselves, or a copy with zeros up to the next block.
template <class S>
class TileReader {
 public:
  explicit TileReader(int64_t classes) : classes_(classes) {}
  PslTile operator()(const S* from, int64_t plane, int64_t count) {
    const int64_t padded = (count + kPslBlock - 1) / kPslBlock * kPslBlock;
    if constexpr (std::is_same_v<S, float>) {
      if (count == padded) return {from, plane, classes_, count};
    }
    room_.resize(classes_ * kTile);
    for (int64_t k = 0; k < classes_; ++k) {
      float* to = room_.data() + k * kTile;
      std::transform(from + k * plane, from + k * plane + count, to, [](S x) { return static_cast<float>(x); });
      std::fill(to + count, to + padded, 0.0f);
    }
    return {room_.data(), kTile, classes_, padded};
  }

 private:
  int64_t classes_;
  std::vector<float> room_;
};

struct Sums {
  double labelled = 0, online = 0;
  int64_t labelled_count = 0, online_count = 0;
  bool broken = false, wrong = false;
  int64_t wrong_label = 0;
};

// Of one image: its labels, and which of its pixels have a loss.
struct Targets {
  Targets(const at::Tensor& all_labels, const at::Tensor& present, const Chunks& chunks, int64_t b, int64_t ignored)
      : labels(all_labels.const_data_ptr<int64_t>() + b * chunks.pixels),
        allowed(bool_bytes(present) + b * (chunks.classes - 1), chunks.classes), classes(chunks.classes),
        ignore_index(ignored) {}
  const int64_t* labels;
  const Allowed allowed;
  const int64_t classes, ignore_index;

  bool known(int64_t label) const { return label >= 0 && label < classes; }
  bool counts(int64_t label) const { return label != ignore_index && known(label) && allowed[label]; }
};

template <class S>
Sums forward_chunk(const Chunks& chunks, int64_t chunk, const S* logits, const float* log_weights,
                   const Targets& targets, uint8_t* mask) {
  Sums sums;
  TileReader<S> read(chunks.classes);
  uint8_t winners[kTile];
  float top[kTile], log_sum[kTile];
  chunks.for_each_tile(chunk, [&](int64_t first, int64_t count) {
    const PslTile tile = read(logits + first, chunks.pixels, count);
    sums.broken |= psl_forward_tile(tile, log_weights, winners, top, log_sum);
    std::copy_n(winners, count, mask + first);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t label = targets.labels[first + i];
      const float* pixel = tile.logits + i;
      if (targets.counts(label)) {
        sums.labelled += (top[i] - pixel[label * tile.stride]) + log_sum[i];
        ++sums.labelled_count;
      } else if (!targets.known(label) && label != targets.ignore_index) {
        sums.wrong = true;
        sums.wrong_label = label;
      }
      if (targets.allowed[winners[i]]) {
        sums.online += (top[i] - pixel[winners[i] * tile.stride]) + log_sum[i];
        ++sums.online_count;
      }
    }
  });
  return sums;
}

// share: of the two gradients that come back, divided by the pixels counted.
template <class S>
void backward_chunk(const Chunks& chunks, int64_t chunk, const S* logits, const Targets& targets,
                    const uint8_t* mask, float labelled, float online, const FreshPages& pages, S* gradient) {
  TileReader<S> read(chunks.classes);
  std::vector<float> room(chunks.classes * kTile);
  float share[kTile];
  const int64_t begin = chunk % chunks.each * kChunk, size = std::min(kChunk, chunks.pixels - begin);
  for (int64_t k = 0; k < chunks.classes; ++k) {
    pages.before_writing(gradient + k * chunks.pixels + begin, size * sizeof(S));
  }
  chunks.for_each_tile(chunk, [&](int64_t first, int64_t count) {
    const PslTile tile = read(logits + first, chunks.pixels, count);
    float* out = room.data();
    int64_t stride = kTile;
    if constexpr (std::is_same_v<S, float>) {
      if (count == tile.pixels) {
        out = gradient + first;
        stride = chunks.pixels;
      }
    }
    const int64_t* labels = targets.labels + first;
    const uint8_t* winners = mask + first;
    for (int64_t i = 0; i < count; ++i) {
      share[i] = (targets.counts(labels[i]) ? labelled : 0) + (targets.allowed[winners[i]] ? online : 0);
    }
    std::fill(share + count, share + tile.pixels, 0.0f);
    psl_backward_tile(tile, share, out, stride);
    for (int64_t i = 0; i < count; ++i) {
      if (targets.counts(labels[i])) out[labels[i] * stride + i] -= labelled;
      if (targets.allowed[winners[i]]) out[winners[i] * stride + i] -= online;
    }
    if (out != room.data()) return;
    for (int64_t k = 0; k < chunks.classes; ++k) {
      std::transform(out + k * kTile, out + k * kTile + count, gradient + k * chunks.pixels + first,
                     [](float x) { return static_cast<S>(x); });
    }
  });
}

// Calls f with a value of the type of x, one of those that check_psl_inputs lets through.
template <class F>
void with_type_of(const at::Tensor& x, F f) {
  if (x.scalar_type() == at::kHalf) return f(at::Half());
  if (x.scalar_type() == at::kBFloat16) return f(at::BFloat16());
  f(0.0f);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> psl_loss_cpu(const at::Tensor& logits,
                                                                        const at::Tensor& log_weights,
                                                                        const at::Tensor& labels,
                                                                        const at::Tensor& present,
                                                                        int64_t ignore_index) {
  check_psl_loss(logits, log_weights, labels, present);
  const int64_t batch = logits.size(0);
  const Chunks chunks(logits);
  auto labelled = at::empty({batch}, log_weights.options()), online = at::empty({batch}, log_weights.options());
  auto mask = at::empty(labels.sizes(), logits.options().dtype(at::kByte));
  auto counts = at::empty({batch, 2}, labels.options());
  const auto z = logits.contiguous(), weights = log_weights.contiguous(), given = labels.contiguous();
  const auto tags = present.contiguous();
  std::vector<Sums> parts(chunks.count);
  uint8_t* winners = mask.mutable_data_ptr<uint8_t>();
  with_type_of(logits, [&]<class S>(S) {
    const S* from = z.const_data_ptr<S>();
    at::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / chunks.each;
        const Targets targets(given, tags, chunks, b, ignore_index);
        parts[i] = forward_chunk(chunks, i, from + b * chunks.classes * chunks.pixels,
                                 weights.const_data_ptr<float>() + b * chunks.classes, targets,
                                 winners + b * chunks.pixels);
      }
    });
  });
  for (int64_t b = 0; b < batch; ++b) {
    Sums sum;
    for (int64_t i = b * chunks.each; i < (b + 1) * chunks.each; ++i) {
      const Sums& part = parts[i];
      TORCH_CHECK_VALUE(!part.broken, "psl_loss: logits must be finite, got NaN or infinity");
      TORCH_CHECK_VALUE(!part.wrong, "psl_loss: labels must lie in [0, ", chunks.classes - 1, "] or be ", ignore_index,
                        " (ignored), got ", part.wrong_label);
      sum.labelled += part.labelled;
      sum.online += part.online;
      sum.labelled_count += part.labelled_count;
      sum.online_count += part.online_count;
    }
    int64_t* count = counts.mutable_data_ptr<int64_t>() + 2 * b;
    count[0] = sum.labelled_count;
    count[1] = sum.online_count;
    labelled.mutable_data_ptr<float>()[b] = static_cast<float>(sum.labelled / std::max<int64_t>(count[0], 1));
    online.mutable_data_ptr<float>()[b] = static_cast<float>(sum.online / std::max<int64_t>(count[1], 1));
  }
  return {labelled, online, mask, counts};
}

at::Tensor psl_loss_backward_cpu(const at::Tensor& grad_labelled, const at::Tensor& grad_online,
                                 const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& present,
                                 const at::Tensor& mask, const at::Tensor& counts, int64_t ignore_index) {
  check_psl_loss_backward(grad_labelled, grad_online, logits, labels, present, mask, counts);
  const Chunks chunks(logits);
  auto gradient = at::empty(logits.sizes(), logits.options());
  const FreshPages pages(gradient.numel() * gradient.element_size());
  const auto z = logits.contiguous(), given = labels.contiguous(), tags = present.contiguous();
  const auto winners = mask.contiguous(), numbers = counts.contiguous();
  const auto labelled = grad_labelled.contiguous(), online = grad_online.contiguous();
  const auto share = [&](const at::Tensor& grad, int64_t b, int64_t term) {
    const int64_t count = std::max<int64_t>(numbers.const_data_ptr<int64_t>()[2 * b + term], 1);
    return static_cast<float>(grad.const_data_ptr<float>()[b] / static_cast<double>(count));
  };
  with_type_of(logits, [&]<class S>(S) {
    const S* from = z.const_data_ptr<S>();
    S* to = gradient.mutable_data_ptr<S>();
    at::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / chunks.each, image = b * chunks.classes * chunks.pixels;
        const Targets targets(given, tags, chunks, b, ignore_index);
        backward_chunk(chunks, i, from + image, targets, winners.const_data_ptr<uint8_t>() + b * chunks.pixels,
                       share(labelled, b, 0), share(online, b, 1), pages, to + image);
      }
    });
  });
  return gradient;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wsss, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "psl_loss(Tensor logits, Tensor log_weights, Tensor labels, Tensor present, int ignore_index) -> "
      "(Tensor, Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "psl_loss_backward(Tensor grad_labelled, Tensor grad_online, Tensor logits, Tensor labels, Tensor present, "
      "Tensor mask, Tensor counts, int ignore_index) -> Tensor",
      tags);
}

TORCH_LIBRARY_IMPL(wsss, CPU, m) {
  m.impl("psl_loss", &psl_loss_cpu);
  m.impl("psl_loss_backward", &psl_loss_backward_cpu);
}

}  // namespace wsss
