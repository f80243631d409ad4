// The types that tensors of numbers are stored in.
#pragma once

namespace wsss {

enum class Scalar { f32, f64, f16, bf16 };

}  // namespace wsss
