#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif
#include "avx512.h"
#define GSPO_KERNELS gspo_cpu_avx512
#define GSPO_NAME "avx512"
#include "token_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
