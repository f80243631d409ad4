// Schema of wsss::class_patch_contrast and its CPU implementation.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "check.h"
#include "class_patch_contrast/class_loops.h"
#include "patch_token_contrast/contrast_check.h"

namespace wsss {
namespace {

// Class c has the label c + 1; patches of other labels get 0, the label of no class.
Chosen choose_patches(const int64_t* labels, int64_t n, int64_t classes, int64_t ignore_index) {
  Chosen chosen;
  for (int64_t i = 0; i < n; ++i) {
    if (labels[i] == ignore_index) continue;
    chosen.places.push_back(i);
    chosen.labels.push_back(labels[i] >= 1 && labels[i] <= classes ? static_cast<int32_t>(labels[i]) : 0);
  }
  return chosen;
}

Chosen choose_classes(const uint8_t* present, int64_t classes) {
  Chosen chosen;
  for (int64_t c = 0; c < classes; ++c) {
    if (!present[c]) continue;
    chosen.places.push_back(c);
    chosen.labels.push_back(static_cast<int32_t>(c + 1));
  }
  return chosen;
}

// Norms in this range: products with a unit vector neither overflow nor lose digits.
constexpr double kSmall = 1e-6, kLarge = 1e6;
constexpr int64_t kColumns = 64;

// The patches of one image where they lie; those of an unusual norm as unit vectors of their own.
struct Patches {
  Patches(const at::Tensor& tokens, const Chosen& chosen)
      : source(tokens.to(at::kFloat).contiguous()), rows(chosen.places.size()), scales(chosen.places.size()),
        own(chosen.places.size()) {
    const int64_t d = source.size(1);
    const float* from = source.const_data_ptr<float>();
    at::parallel_for(0, static_cast<int64_t>(rows.size()), kPatches, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        rows[i] = from + chosen.places[i] * d;
        const double norm = norm_of(rows[i], d);
        scales[i] = static_cast<float>(1 / norm);
        if (norm > kSmall && norm < kLarge) continue;
        own[i].assign(rows[i], rows[i] + d);
        normalise(own[i].data(), d);
        rows[i] = own[i].data();
        scales[i] = 1;
      }
    });
  }
  at::Tensor source;
  std::vector<const float*> rows;
  std::vector<float> scales;
  std::vector<std::vector<float>> own;
};

// Sums of |cos| over the pairs of an image. Unless `gradient` [C, D] is null, its rows at chosen.places, zero before,
// are set to the gradient of the class tokens.
PairSums contrast_classes(const at::Tensor& class_tokens, const Chosen& chosen, const at::Tensor& patch_tokens,
                          const Chosen& chosen_patches, PairWeights weights, float* gradient) {
  const UnitTokens units(class_tokens, chosen, kGroup);
  const Patches patches(patch_tokens, chosen_patches);
  const int64_t d = class_tokens.size(1), n = patches.rows.size(), count = chosen.places.size();
  const int64_t lanes = (count + 15) / 16 * 16;
  std::vector<float> side_by_side(d * lanes, 0.0f), products(gradient ? n * lanes : 0), lines(gradient ? count * d : 0);
  std::vector<int32_t> labels(lanes, -1);
  std::copy(chosen.labels.begin(), chosen.labels.end(), labels.begin());
  const Units own = units.units();
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t k = 0; k < d; ++k) {
      side_by_side[k * lanes + r] = own.data[(k / kPanel * own.rows + r) * kPanel + k % kPanel];
    }
  }
  const ClassPairs pairs{side_by_side.data(), labels.data(), patches.rows.data(), patches.scales.data(),
                         chosen_patches.labels.data(), lanes, n, d, weights.positive, weights.negative,
                         gradient ? products.data() : nullptr};
  PairSums total;
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t last = std::min(block + kBlock, n), groups = (last - block + kPatches - 1) / kPatches;
    PairSums parts[kBlock / kPatches];
    at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const int64_t first = block + g * kPatches;
        class_similarity(pairs, first, std::min(first + kPatches, last), parts[g].positive, parts[g].negative);
      }
    });
    for (const PairSums& part : parts) {
      total.positive += part.positive;
      total.negative += part.negative;
    }
    if (!gradient) continue;
    at::parallel_for(0, (d + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        class_gradient(pairs, count, block, last, c * kColumns, std::min((c + 1) * kColumns, d), lines.data());
      }
    });
  }
  if (!gradient) return total;
  for (int64_t r = 0; r < count; ++r) {
    float* line = gradient + chosen.places[r] * d;
    std::copy(lines.begin() + r * d, lines.begin() + (r + 1) * d, line);
    through_norm(line, own, r, d, units.norms()[r]);
  }
  return total;
}

void check_arguments(const at::Tensor& class_tokens, const at::Tensor& patch_tokens, const at::Tensor& labels,
                     const at::Tensor& present) {
  const char* op = "class_patch_contrast";
  check_tokens(class_tokens, op, "class_tokens");
  check_tokens(patch_tokens, op, "patch_tokens");
  TORCH_CHECK_VALUE(patch_tokens.size(0) == class_tokens.size(0) && patch_tokens.size(2) == class_tokens.size(2), op,
                    ": patch_tokens must be [", class_tokens.size(0), ", N, ", class_tokens.size(2), "], got ",
                    patch_tokens.sizes());
  check_labels(labels, patch_tokens, op);
  TORCH_CHECK_TYPE(present.scalar_type() == at::kBool, op, ": present must be bool, got ", present.scalar_type());
  TORCH_CHECK_VALUE(present.sizes() == class_tokens.sizes().slice(0, 2), op, ": present must be ",
                    class_tokens.sizes().slice(0, 2), ", got ", present.sizes());
}

std::tuple<at::Tensor, at::Tensor> class_patch_contrast_cpu(const at::Tensor& class_tokens,
                                                            const at::Tensor& patch_tokens, const at::Tensor& labels,
                                                            const at::Tensor& present, int64_t ignore_index,
                                                            bool with_gradient) {
  check_arguments(class_tokens, patch_tokens, labels, present);
  const int64_t images = class_tokens.size(0), c = class_tokens.size(1), d = class_tokens.size(2);
  const int64_t n = patch_tokens.size(1);
  const auto classes = labels.to(at::kLong).contiguous(), tags = present.contiguous();
  int64_t positive = 0, negative = 0;
  std::vector<Chosen> rows, columns;
  for (int64_t b = 0; b < images; ++b) {
    rows.push_back(choose_classes(bool_bytes(tags) + b * c, c));
    columns.push_back(choose_patches(classes.const_data_ptr<int64_t>() + b * n, n, c, ignore_index));
    int64_t own = 0;
    for (const int32_t label : columns[b].labels) own += label > 0 && bool_bytes(tags)[b * c + label - 1];
    positive += own;
    negative += static_cast<int64_t>(rows[b].places.size() * columns[b].places.size()) - own;
  }
  const auto options = class_tokens.options().dtype(at::kFloat);
  auto gradient = with_gradient ? at::zeros({images, c, d}, options) : at::empty({0}, options);
  const PairWeights weights{static_cast<float>(-0.5 / (positive + 1.0)), static_cast<float>(0.5 / (negative + 1.0))};
  PairSums sums;
  for (int64_t b = 0; b < images; ++b) {
    if (rows[b].places.empty() || columns[b].places.empty()) continue;
    float* lines = with_gradient ? gradient.mutable_data_ptr<float>() + b * c * d : nullptr;
    const PairSums part = contrast_classes(class_tokens.select(0, b), rows[b], patch_tokens.select(0, b), columns[b],
                                           weights, lines);
    sums.positive += part.positive;
    sums.negative += part.negative;
  }
  return {at::full({}, contrast_loss(sums, positive, negative), options), gradient};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def(
      "class_patch_contrast(Tensor class_tokens, Tensor patch_tokens, Tensor labels, Tensor present, "
      "int ignore_index, bool with_gradient) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(wsss, CPU, m) { m.impl("class_patch_contrast", &class_patch_contrast_cpu); }

}  // namespace wsss
