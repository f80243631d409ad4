// Gated dense energy on the CPU: the torch-free loops. The op is defined by kernels/dense_energy/reference.py.
//
// Letters: K classes, H W pixels of the full size, h w of the lattice. Class maps are planes; inside, values are rows
// of `width` floats per pixel of the lattice, as in lattice.h, for a block of classes. The slope stays in such rows.
#pragma once
#include <cstdint>

#include "lattice/lattice.h"

namespace wsss {

constexpr int64_t kEnergyClasses = 32;  // of a block: its table of vertices should stay in the L2 cache
constexpr int64_t kEnergyRun = 256;     // pixels of a tile [classes, kEnergyRun]
constexpr int64_t kEnergyChunk = 64;    // pixels whose sums are used while they are in the cache

// out [n] = sum_t weight[t] from[index[t] * stride + i].
void energy_mix_rows(const float* from, int64_t stride, const int32_t* index, const float* weight, int64_t terms,
                     int64_t n, float* out);
// out [n] = sum_t weight[t * step + i] from[index[t * step + i]].
void energy_mix_columns(const float* from, const int32_t* index, const float* weight, int64_t step, int64_t terms,
                        int64_t n, float* out);
// out [n] = means of 2 x 2 pixels of two rows; the reverse: each number times `scale` at two places of two rows.
void energy_halve(const float* low, const float* high, int64_t n, float* out);
void energy_double(const float* from, int64_t n, float scale, float* low, float* high);

// top [n] = max(itself, from); NaN wins.
void energy_max(const float* from, int64_t n, float* top);
// rows [n, width] = the transposed tile times roi [n].
void energy_pack(const float* tile, const float* roi, int64_t n, int64_t width, float* rows);
// planes = the transposed rows [n, width], of which `classes` are wanted.
void energy_unpack(const float* rows, int64_t n, int64_t width, int64_t classes, int64_t plane, float* planes);
// sum_i gate[i] <values_i, sums_i> over rows [n, width]; values <- factor[i] sums.
float energy_close(const float* sums, const float* gate, const float* factor, int64_t n, int64_t width, float* values);

}  // namespace wsss
