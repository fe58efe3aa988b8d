#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#endif
#include "avx512.h"
#define GSPO_KERNELS gspo_cpu_avx512_bf16
#define GSPO_NAME "avx512_bf16"
#define GSPO_BFLOAT16_OF_FLOATS(floats) ((Halves)_mm512_cvtneps_pbh((__m512)(floats)))  // subnormals become 0
#include "token_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
