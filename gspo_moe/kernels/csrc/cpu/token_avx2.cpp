#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>
#define GSPO_LANES 8
#define GSPO_KERNELS gspo_cpu_avx2
#define GSPO_NAME "avx2"
#define GSPO_FLOATS_OF_FLOAT16(halves) ((Floats)_mm256_cvtph_ps((__m128i)(halves)))
#define GSPO_FLOAT16_OF_FLOATS(floats) ((Halves)_mm256_cvtps_ph((__m256)(floats), _MM_FROUND_TO_NEAREST_INT))
#define GSPO_LARGER(a, b) ((Floats)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define GSPO_WIDEN(halves) ((Words)_mm256_cvtepu16_epi32((__m128i)(halves)))
#define GSPO_NARROW(words) __builtin_convertvector(words, Halves)
#include "avx_sums.h"
#define GSPO_SUMS_OF_4(parts, sums) gspo_sums_of_4((const __m256*)(parts), sums)
#include "token_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
