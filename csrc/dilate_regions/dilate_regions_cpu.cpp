// Schema of wsss::dilate_regions and its CPU implementation: the disc as an OR of shifted rows of bits.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "check.h"
#include "dilate_regions/dilate_regions.h"

namespace wsss {
namespace {

constexpr uint64_t kOnes = 0x0101010101010101;
constexpr bool kLittleEndian = std::endian::native == std::endian::little;

// Column x of a row of bytes becomes bit x, 0 where the byte is 0; at most 64 columns.
uint64_t pack(const uint8_t* from, int64_t count) {
  uint64_t word = 0;
  int64_t x = 0;
  for (; kLittleEndian && x + 8 <= count; x += 8) {  // the product gathers the low bits of 8 bytes in its top byte
    uint64_t bytes;
    std::memcpy(&bytes, from + x, 8);
    // A bool tensor may be a view of other bytes than 0 and 1.
    bytes = (((bytes & 0x7f * kOnes) + 0x7f * kOnes) | bytes) >> 7 & kOnes;
    word |= (bytes * 0x0102040810204080 >> 56) << x;
  }
  for (; x < count; ++x) word |= static_cast<uint64_t>(from[x] != 0) << x;
  return word;
}

void unpack(uint64_t word, int64_t count, bool* to) {
  int64_t x = 0;
  for (; kLittleEndian && x + 8 <= count; x += 8) {  // byte i keeps bit i, then its top bit says whether it is not 0
    uint64_t bytes = (word >> x & 0xff) * kOnes & 0x8040201008040201;
    bytes = (bytes + 0x7f * kOnes) >> 7 & kOnes;
    std::memcpy(to + x, &bytes, 8);
  }
  for (; x < count; ++x) to[x] = word >> x & 1;
}

// into |= row shifted by k columns in both directions; bits may leave the row on the right, where nobody looks.
void spread(const uint64_t* row, int64_t words, int64_t k, uint64_t* into) {
  const int64_t far = k / 64;
  const int bits = static_cast<int>(k % 64);
  for (int64_t i = far; i < words; ++i) {
    into[i] |= row[i - far] << bits;
    into[i - far] |= row[i] >> bits;
    if (bits && i > far) {
      into[i] |= row[i - far - 1] >> (64 - bits);
      into[i - far - 1] |= row[i] << (64 - bits);
    }
  }
}

class Map {
 public:
  Map(int64_t h, int64_t w, const std::vector<int64_t>& half)
      : h_(h), w_(w), words_(words_of(w)), half_(half), row_(words_), wide_(words_), result_(h * words_) {}

  void dilate(const uint8_t* seeds, bool* out) {
    std::fill(result_.begin(), result_.end(), 0);
    for (int64_t y = 0; y < h_; ++y) {
      uint64_t any = 0;
      for (int64_t i = 0; i < words_; ++i) any |= row_[i] = pack(seeds + y * w_ + i * 64, columns(i));
      if (any == 0) continue;
      if (words_ == 1) {
        spread_word(y, any);
      } else {
        spread_row(y);
      }
    }
    for (int64_t y = 0; y < h_; ++y) {
      for (int64_t i = 0; i < words_; ++i) unpack(result_[y * words_ + i], columns(i), out + y * w_ + i * 64);
    }
  }

 private:
  int64_t columns(int64_t word) const { return std::min<int64_t>(64, w_ - word * 64); }

  // The disc narrows with the distance: from the farthest row inwards, each row needs a few shifts more.
  void spread_word(int64_t y, uint64_t row) {
    uint64_t wide = 0;
    int64_t reached = -1;
    for (int64_t dy = static_cast<int64_t>(half_.size()) - 1; dy >= 0; --dy) {
      while (reached < half_[dy]) {
        ++reached;
        wide |= row << reached | row >> reached;
      }
      if (y >= dy) result_[y - dy] |= wide;
      if (y + dy < h_) result_[y + dy] |= wide;
    }
  }

  // The same for rows of several words.
  void spread_row(int64_t y) {
    std::fill(wide_.begin(), wide_.end(), 0);
    int64_t reached = -1;
    for (int64_t dy = static_cast<int64_t>(half_.size()) - 1; dy >= 0; --dy) {
      while (reached < half_[dy]) spread(row_.data(), words_, ++reached, wide_.data());
      for (const int64_t to : {y - dy, y + dy}) {
        if (to < 0 || to >= h_) continue;
        for (int64_t i = 0; i < words_; ++i) result_[to * words_ + i] |= wide_[i];
      }
    }
  }

  const int64_t h_, w_, words_;
  const std::vector<int64_t>& half_;
  std::vector<uint64_t> row_, wide_, result_;
};

at::Tensor dilate_regions_cpu(const at::Tensor& seeds, int64_t limit, bool chebyshev) {
  TORCH_CHECK_VALUE(seeds.dim() == 4, "dilate_regions: seeds must be [B, M, h, w], got ", seeds.sizes());
  TORCH_CHECK_TYPE(seeds.scalar_type() == at::kBool, "dilate_regions: seeds must be bool, got ", seeds.scalar_type());
  const int64_t h = seeds.size(2), w = seeds.size(3);
  const auto maps = seeds.contiguous();
  auto out = at::empty(seeds.sizes(), seeds.options());
  if (out.numel() == 0) return out;
  const auto half = half_widths({limit, chebyshev}, h, w);
  const uint8_t* from = bool_bytes(maps);
  bool* to = out.mutable_data_ptr<bool>();
  at::parallel_for(0, seeds.size(0) * seeds.size(1), 16, [&](int64_t begin, int64_t end) {
    Map map(h, w, half);
    for (int64_t m = begin; m < end; ++m) map.dilate(from + m * h * w, to + m * h * w);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(wsss, m) {
  m.def("dilate_regions(Tensor seeds, int limit, bool chebyshev) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(wsss, CPU, m) { m.impl("dilate_regions", &dilate_regions_cpu); }

}  // namespace wsss
