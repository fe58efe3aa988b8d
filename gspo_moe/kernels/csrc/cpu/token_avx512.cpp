#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif
#include <immintrin.h>
// GCC 12 takes the undefined operand of its own intrinsics for a mistake (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define GSPO_LANES 16
#define GSPO_KERNELS gspo_cpu_avx512
#define GSPO_NAME "avx512"
#define GSPO_FLOATS_OF_FLOAT16(halves) ((Floats)_mm512_cvtph_ps((__m256i)(halves)))
#define GSPO_FLOAT16_OF_FLOATS(floats) ((Halves)_mm512_cvtps_ph((__m512)(floats), _MM_FROUND_TO_NEAREST_INT))
#define GSPO_LARGER(a, b) ((Floats)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define GSPO_WIDEN(halves) ((Words)_mm512_cvtepu16_epi32((__m256i)(halves)))
#define GSPO_NARROW(words) ((Halves)_mm512_cvtepi32_epi16((__m512i)(words)))
#include "token_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
