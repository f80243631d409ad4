// The resize of erase on the CPU, pixel by pixel.
#pragma once
#include "erase/erase.h"

namespace wsss {

// What all images share. A band is a run of pixel rows between the same two rows of cells.
template <class T>
struct EraseAxes {
  EraseAxes(int64_t map_h, int64_t map_w, int64_t image_h, int64_t image_w)
      : h(map_h), w(map_w), height(image_h), width(image_w), rows(taps_of<T>(h, height)), columns(taps_of<T>(w, width)),
        bands(runs_of(rows)), runs(runs_of(columns)) {
    for (const Tap<T>& tap : columns) weights.push_back(tap.high_weight);
  }
  const int64_t h, w, height, width;
  const std::vector<Tap<T>> rows, columns;
  const std::vector<TapRun> bands, runs;
  std::vector<T> weights;  // of the right cell, for each pixel column
};

// Up at one pixel. Not inlined: wherever it is called, it rounds alike.
template <class T>
__attribute__((noinline)) T erase_upsampled(const T* cells, int64_t w, const Tap<T>& row, const Tap<T>& column) {
  auto along = [&](int64_t y) {
    return between(positive_part(cells[y * w + column.low]), positive_part(cells[y * w + column.high]),
                   column.high_weight);
  };
  return between(along(row.low), along(row.high), row.high_weight);
}

// Calls f(value) for the corner pixels of `rows` x `columns`; between four cells Up is largest at a corner.
template <class T, class F>
void for_each_erase_corner(const T* cells, const EraseAxes<T>& a, const TapRun& rows, const TapRun& columns, F f) {
  for (const int64_t y : {rows.begin, rows.end - 1}) {
    for (const int64_t x : {columns.begin, columns.end - 1}) f(erase_upsampled(cells, a.w, a.rows[y], a.columns[x]));
  }
}

// The largest value of Up of a map.
template <class T>
T erase_peak(const T* cells, const EraseAxes<T>& a) {
  T best = 0;
  for (const TapRun& rows : a.bands) {
    for (const TapRun& columns : a.runs) {
      for_each_erase_corner(cells, a, rows, columns, [&](T value) { best = larger_or_nan(best, value); });
    }
  }
  return best;
}

}  // namespace wsss
