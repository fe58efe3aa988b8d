// Lanes of four vectors added up, for the files that compile decode_kernels.h for AVX2 or AVX-512.
#pragma once

#include <immintrin.h>

static inline __attribute__((always_inline)) void gspo_sums_of_4(const __m256* parts, float* sums) {
  const __m256 pairs = _mm256_hadd_ps(parts[0], parts[1]), others = _mm256_hadd_ps(parts[2], parts[3]);
  const __m256 halves = _mm256_hadd_ps(pairs, others);
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}
