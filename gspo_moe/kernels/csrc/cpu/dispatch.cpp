#include "kernels.h"

#include <cstring>

const GspoCpuKernels* gspo_cpu_kernels(const char* wanted) {
  const bool any = wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, "auto") == 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (avx512_bf16 && (any || std::strcmp(wanted, "avx512_bf16") == 0)) return &gspo_cpu_avx512_bf16;
  if (avx512 && (any || std::strcmp(wanted, "avx512") == 0)) return &gspo_cpu_avx512;
  if (avx2 && (any || std::strcmp(wanted, "avx2") == 0)) return &gspo_cpu_avx2;
#endif
  return any || std::strcmp(wanted, "generic") == 0 ? &gspo_cpu_generic : nullptr;
}
