// One source for each instruction set; the including file sets GSPO_LANES, GSPO_KERNELS and GSPO_NAME.
//
// A row is read in blocks that stay in the first-level cache: the block's maximum first, then its sums relative to the
// maximum so far (online softmax, arXiv 1805.02867). Within a block sums are float32 by lane, across blocks float64.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

namespace {

constexpr int kLanes = GSPO_LANES;
constexpr int64_t kBlock = 4096;  // columns; 16 KB of float32
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

#define GSPO_INLINE static inline __attribute__((always_inline))

GSPO_INLINE Floats all(float value) { return value - Floats{}; }

template <typename Vector>
GSPO_INLINE Vector load(const void* from) {
  Vector value;
  memcpy(&value, from, sizeof value);
  return value;
}

// What the compiler does not find an instruction for by itself, where the including file does not name one.
#if !defined(GSPO_LARGER)
#define GSPO_LARGER(a, b) ((a) > (b) ? (a) : (b))
#define GSPO_WIDEN(halves) __builtin_convertvector(halves, Words)
#define GSPO_NARROW(words) __builtin_convertvector(words, Halves)
#endif

// The second where either is NaN.
GSPO_INLINE Floats larger(Floats a, Floats b) { return GSPO_LARGER(a, b); }

GSPO_INLINE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

GSPO_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

#if !defined(GSPO_FLOATS_OF_FLOAT16)
GSPO_INLINE float float_of_float16(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  const float magnitude = bits_to_float(rest << 13) * 0x1p112f;  // moves the exponent's bias, subnormals included
  return bits_to_float(sign | float_to_bits(magnitude));
}

GSPO_INLINE uint16_t float16_of_float(float value) {
  const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;  // rounds to 2^16 or is more
  if (rest < 0x38800000) {                       // subnormal: the sum's last mantissa bit is 2^-24
    return sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000);
  }
  return sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
}

GSPO_INLINE Floats GSPO_FLOATS_OF_FLOAT16(Halves halves) {
  Floats floats;
  for (int lane = 0; lane < kLanes; ++lane) floats[lane] = float_of_float16(halves[lane]);
  return floats;
}

GSPO_INLINE Halves GSPO_FLOAT16_OF_FLOATS(Floats floats) {
  Halves halves;
  for (int lane = 0; lane < kLanes; ++lane) halves[lane] = float16_of_float(floats[lane]);
  return halves;
}
#endif

#if !defined(GSPO_BFLOAT16_OF_FLOATS)
GSPO_INLINE Halves GSPO_BFLOAT16_OF_FLOATS(Floats value) {
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  const Words quiet = Words{} + 0x7fc0;
  return GSPO_NARROW(value != value ? quiet : rounded);
}
#endif

struct Float32 {
  typedef float Element;
  static constexpr Element kMinusInfinity = -INFINITY;
  GSPO_INLINE Floats get(const Element* from) { return load<Floats>(from); }
  GSPO_INLINE void put(Element* to, Floats value) { memcpy(to, &value, sizeof value); }
};

struct Bfloat16 {
  typedef uint16_t Element;
  static constexpr Element kMinusInfinity = 0xff80;
  GSPO_INLINE Floats get(const Element* from) {
    return (Floats)(GSPO_WIDEN(load<Halves>(from)) << 16);
  }
  GSPO_INLINE void put(Element* to, Floats value) {
    const Halves halves = GSPO_BFLOAT16_OF_FLOATS(value);
    memcpy(to, &halves, sizeof halves);
  }
};

struct Float16 {
  typedef uint16_t Element;
  static constexpr Element kMinusInfinity = 0xfc00;
  GSPO_INLINE Floats get(const Element* from) { return GSPO_FLOATS_OF_FLOAT16(load<Halves>(from)); }
  GSPO_INLINE void put(Element* to, Floats value) {
    const Halves halves = GSPO_FLOAT16_OF_FLOATS(value);
    memcpy(to, &halves, sizeof halves);
  }
};

// The last columns of a row as a whole vector, filled up with -inf.
template <typename Type>
struct Tail {
  typename Type::Element elements[kLanes];
  Tail(const typename Type::Element* from, int64_t count) {
    for (int lane = 0; lane < kLanes; ++lane) elements[lane] = lane < count ? from[lane] : Type::kMinusInfinity;
  }
};

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLowest = -88.0f;  // exp of it and of less is 0 below; -inf times 0 would be NaN

#if !defined(GSPO_ROUNDED)
// The integer next to a power of two's exponent in its low bits, and the rest, from -0.5 to 0.5 and exact.
struct Exponent {
  Floats rest;
  Words integer;
};

GSPO_INLINE Exponent split(Floats power) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
  power = larger(all(-127.0f), power);
  const Floats shifted = power + shift;
  return {power - (shifted - shift), (Words)shifted};
}

GSPO_INLINE Floats times_power_of_two(Floats value, Words integer) {
  return value * (Floats)((integer + 127) << 23);  // 0 for -127
}
#else
struct Exponent {
  Floats rest, integer;
};

GSPO_INLINE Exponent split(Floats power) { return {GSPO_REST(power), GSPO_ROUNDED(power)}; }

GSPO_INLINE Floats times_power_of_two(Floats value, Floats integer) { return GSPO_SCALED(value, integer); }
#endif

// 2^power for powers from -inf to a little above 0, to 2 units in the last place (2.3 without fused multiply-add), beside
// which stands the rounding of the power itself; 0 or subnormal below -126, NaN for NaN.
GSPO_INLINE Floats power_of_two(Floats power) {
  const auto [f, integer] = split(power);
  // Minimax polynomial with 2^0 = 1, relative error 9e-8 before rounding.
  Floats value = all(1.326472691214597e-3f);
  value = value * f + 9.671512660323301e-3f;
  value = value * f + 5.550733744199181e-2f;
  value = value * f + 2.402224208492444e-1f;
  value = value * f + 6.931469775985056e-1f;
  value = value * f + 1.0f;
  return times_power_of_two(value, integer);
}

GSPO_INLINE float sum_of_lanes(Floats value) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) value[lane] += value[lane + width];
  }
  return value[0];
}

GSPO_INLINE float max_of_lanes(Floats value) {
  float found = value[0];
  for (int lane = 1; lane < kLanes; ++lane) found = value[lane] > found ? value[lane] : found;
  return found;
}

template <typename Type>
float block_max(const typename Type::Element* row, int64_t count) {
  Floats best[4] = {all(-INFINITY), all(-INFINITY), all(-INFINITY), all(-INFINITY)};
  int64_t column = 0;
  for (; column + 4 * kLanes <= count; column += 4 * kLanes) {
    for (int part = 0; part < 4; ++part) best[part] = larger(Type::get(row + column + part * kLanes), best[part]);
  }
  for (; column + kLanes <= count; column += kLanes) best[0] = larger(Type::get(row + column), best[0]);
  if (column < count) best[0] = larger(Type::get(Tail<Type>(row + column, count - column).elements), best[0]);
  return max_of_lanes(larger(larger(best[0], best[1]), larger(best[2], best[3])));
}

struct Sums {
  double sum_exp, moment;
};

template <typename Type, bool kEntropy>
Sums block_sums(const typename Type::Element* row, int64_t count, float scale, float max) {
  Floats sum[4] = {}, moment[4] = {};
  const auto add = [&](const typename Type::Element* from, int part) __attribute__((always_inline)) {
    const Floats below = Type::get(from) - max;  // exactly 0 at the maximum, whatever the temperature
    const Floats value = power_of_two(below * (scale * kLog2E));
    sum[part] += value;
    if (kEntropy) moment[part] += larger(all(kLowest), below * scale) * value;
  };
  int64_t column = 0;
  for (; column + 4 * kLanes <= count; column += 4 * kLanes) {
    // The next block comes from memory meanwhile, or the search for its maximum would wait for it.
    const auto* const next = (const char*)(row + column + kBlock);
    for (int byte = 0; byte < 4 * kLanes * (int)sizeof(*row); byte += 64) __builtin_prefetch(next + byte);
    for (int part = 0; part < 4; ++part) add(row + column + part * kLanes, part);
  }
  for (; column + kLanes <= count; column += kLanes) add(row + column, 0);
  if (column < count) add(Tail<Type>(row + column, count - column).elements, 0);
  return {sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])),
          kEntropy ? sum_of_lanes((moment[0] + moment[1]) + (moment[2] + moment[3])) : 0.0};
}

template <typename Type>
float one(const typename Type::Element* from) {
  return Type::get(Tail<Type>(from, 1).elements)[0];
}

template <typename Type, bool kEntropy>
void row_stats(const GspoTokenStats* args, int64_t token) {
  const auto* row = (const typename Type::Element*)args->logits_TV + token * args->row_stride;
  const float scale = args->inverse_temperature;
  float max = -INFINITY;  // of the logits themselves
  Sums total = {0.0, 0.0};
  for (int64_t start = 0; start < args->vocab; start += kBlock) {
    const int64_t count = args->vocab - start < kBlock ? args->vocab - start : kBlock;
    const float found = block_max<Type>(row + start, count);
    if (found > max) {
      if (max > -INFINITY) {
        const double shift = ((double)max - found) * scale, shrink = exp(shift);
        total.moment = shrink > 0 ? (total.moment + shift * total.sum_exp) * shrink : 0.0;
        total.sum_exp *= shrink;
      }
      max = found;
    }
    const Sums block = block_sums<Type, kEntropy>(row + start, count, scale, max > -INFINITY ? max : 0.0f);
    total.sum_exp += block.sum_exp;
    total.moment += block.moment;
  }
  const int64_t target = args->targets_T[token] - args->vocab_start;
  float* stats = args->stats_TS + token * (kEntropy ? 4 : 3);
  stats[0] = max * scale;
  stats[1] = (float)total.sum_exp;
  stats[2] = target >= 0 && target < args->vocab ? one<Type>(row + target) * scale : -INFINITY;
  if (kEntropy) stats[3] = (float)total.moment;
}

template <typename Type, bool kEntropy>
void row_backward(const GspoTokenBackward* args, int64_t token) {
  auto* row = (typename Type::Element*)args->logits_TV + token * args->row_stride;
  const float grad = args->grad_log_probs_T[token];
  const float grad_entropy = kEntropy ? args->grad_entropy_T[token] : 0.0f;
  if (grad == 0.0f && grad_entropy == 0.0f) {
    memset(row, 0, sizeof(*row) * args->columns);
    return;
  }
  const float scale = args->inverse_temperature, log_z = args->log_z_T[token];
  const float entropy = kEntropy ? args->entropy_T[token] : 0.0f;
  const auto gradient = [&](const typename Type::Element* from) __attribute__((always_inline)) {
    const Floats log_p = Type::get(from) * scale - log_z;
    const Floats p = power_of_two(log_p * kLog2E);
    if (!kEntropy) return p * (grad * -scale);
    return p * (grad + grad_entropy * (larger(all(kLowest), log_p) + entropy)) * -scale;
  };
  const int64_t target = args->targets_T[token] - args->vocab_start;
  const bool here = target >= 0 && target < args->vocab;
  float at_target = 0.0f;
  if (here) at_target = gradient(Tail<Type>(row + target, 1).elements)[0] + grad * scale;
  int64_t column = 0;
  for (; column + kLanes <= args->vocab; column += kLanes) Type::put(row + column, gradient(row + column));
  const int64_t rest = args->vocab - column;
  if (rest) {
    Tail<Type> tail(row + column, rest);
    Type::put(tail.elements, gradient(tail.elements));
    memcpy(row + column, tail.elements, sizeof(*row) * rest);
  }
  if (here) {
    typename Type::Element elements[kLanes];
    Type::put(elements, all(at_target));
    row[target] = elements[0];
  }
  memset(row + args->vocab, 0, sizeof(*row) * (args->columns - args->vocab));
}

template <typename Type>
void stats_of(const GspoTokenStats* args, int64_t first, int64_t last) {
  const auto row = args->entropy ? row_stats<Type, true> : row_stats<Type, false>;
  for (int64_t token = first; token < last; ++token) row(args, token);
}

template <typename Type>
void backward_of(const GspoTokenBackward* args, int64_t first, int64_t last) {
  const auto row = args->grad_entropy_T ? row_backward<Type, true> : row_backward<Type, false>;
  for (int64_t token = first; token < last; ++token) row(args, token);
}

void token_stats(const GspoTokenStats* args, int64_t first, int64_t last) {
  if (args->element_type == GSPO_FLOAT32) return stats_of<Float32>(args, first, last);
  if (args->element_type == GSPO_BFLOAT16) return stats_of<Bfloat16>(args, first, last);
  return stats_of<Float16>(args, first, last);
}

void token_backward(const GspoTokenBackward* args, int64_t first, int64_t last) {
  if (args->element_type == GSPO_FLOAT32) return backward_of<Float32>(args, first, last);
  if (args->element_type == GSPO_BFLOAT16) return backward_of<Bfloat16>(args, first, last);
  return backward_of<Float16>(args, first, last);
}

template <typename Type>
void add_to(float* total, const void* part, int64_t first, int64_t last) {
  const auto* const from = (const typename Type::Element*)part;
  for (; first + kLanes <= last; first += kLanes) Float32::put(total + first, load<Floats>(total + first) + Type::get(from + first));
  for (; first < last; ++first) total[first] += one<Type>(from + first);
}

void accumulate(float* total, const void* part, int64_t element_type, int64_t first, int64_t last) {
  if (element_type == GSPO_FLOAT32) return add_to<Float32>(total, part, first, last);
  if (element_type == GSPO_BFLOAT16) return add_to<Bfloat16>(total, part, first, last);
  return add_to<Float16>(total, part, first, last);
}

#include "layer_kernels.h"

}  // namespace

#include "decode_kernels.h"
#include "panel_kernels.h"

const GspoCpuKernels GSPO_KERNELS = {
    GSPO_NAME, token_stats, token_backward, accumulate, rms_norm, rms_norm_backward, rotary,
    panels, draw, normalize, gate, attend};
