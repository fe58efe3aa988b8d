// What token_kernels.h takes from AVX-512, for the files that compile it for that.
#pragma once

#include <immintrin.h>

// GCC 12 takes the undefined operand of its own intrinsics for a mistake (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define GSPO_LANES 16
#define GSPO_FLOATS_OF_FLOAT16(halves) ((Floats)_mm512_cvtph_ps((__m256i)(halves)))
#define GSPO_FLOAT16_OF_FLOATS(floats) ((Halves)_mm512_cvtps_ph((__m512)(floats), _MM_FROUND_TO_NEAREST_INT))
#define GSPO_LARGER(a, b) ((Floats)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define GSPO_WIDEN(halves) ((Words)_mm512_cvtepu16_epi32((__m256i)(halves)))
#define GSPO_NARROW(words) ((Halves)_mm512_cvtepi32_epi16((__m512i)(words)))
// -inf has rest 0 here and 2 to its power is 0, so that no power need be raised to a lowest one first.
#define GSPO_ROUNDED(power) ((Floats)_mm512_roundscale_ps((__m512)(power), _MM_FROUND_TO_NEAREST_INT))
#define GSPO_REST(power) ((Floats)_mm512_reduce_ps((__m512)(power), _MM_FROUND_TO_NEAREST_INT))
#define GSPO_SCALED(value, integer) ((Floats)_mm512_scalef_ps((__m512)(value), (__m512)(integer)))

#include "avx_sums.h"
#define GSPO_SUMS_OF_4(parts, sums) gspo_sums_of_4_of_16((const __m512*)(parts), sums)
static inline __attribute__((always_inline)) void gspo_sums_of_4_of_16(const __m512* parts, float* sums) {
  __m256 halves[4];
  for (int each = 0; each < 4; ++each) {
    halves[each] = _mm256_add_ps(_mm512_castps512_ps256(parts[each]), _mm512_extractf32x8_ps(parts[each], 1));
  }
  gspo_sums_of_4(halves, sums);
}
