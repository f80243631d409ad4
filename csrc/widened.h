// Rows of half precision in the type that is computed in.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace wsss {

// `count` values as T: themselves, or a copy in `room`, which grows as needed.
template <class S, class T>
const T* widened(const S* values, int64_t count, std::vector<T>& room) {
  if constexpr (std::is_same_v<S, T>) {
    return values;
  } else {
    room.resize(count);
    std::transform(values, values + count, room.begin(), [](S x) { return static_cast<T>(x); });
    return room.data();
  }
}

}  // namespace wsss
