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
