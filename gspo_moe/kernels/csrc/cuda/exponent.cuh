// Exponentials in base 2, the only one the hardware has an instruction for.
#pragma once

namespace gspo {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
// 2^LEAST_EXPONENT is 0 in float32, and LEAST_EXPONENT times it still 0, where -inf times 0 would be NaN.
constexpr float LEAST_EXPONENT = -256.0f;

}  // namespace gspo
