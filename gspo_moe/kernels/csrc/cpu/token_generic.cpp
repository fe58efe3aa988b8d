// What every processor runs: 128-bit vectors, which the compiler maps to SSE2, NEON or plain scalars.
#define GSPO_LANES 4
#define GSPO_KERNELS gspo_cpu_generic
#define GSPO_NAME "generic"
#include "token_kernels.h"
