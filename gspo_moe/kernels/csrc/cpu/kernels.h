// CPU kernels over ranges of tokens: the same arguments and results as the CUDA launchers of ../cuda/api.h.
// Raw pointers only, so that a file compiled for one instruction set shares no inline code with another.
#pragma once

#include "../cuda/api.h"

// Rows of `width` adjacent elements, `heads` for each token; strides in elements.
struct GspoRows {
  const void* data;
  int64_t element_type;  // GspoElementType
  int64_t tokens, heads, width;
  int64_t token_stride, head_stride;
};

// out = x * scale * weight with scale = 1 / sqrt(mean x^2 + eps) of each row.
struct GspoRmsNorm {
  GspoRows x;
  const void* weight;
  float eps;
  void* out;     // contiguous
  float* scale;  // of each row
};

struct GspoRmsNormBackward {
  GspoRows x, grad;
  const void* weight;
  const float* scale;
  void* grad_x;  // contiguous
};

// out = x * cos + [-right half, left half] * sin; backward: what takes out's gradient to x's.
struct GspoRotary {
  GspoRows x;
  const void *cos_TD, *sin_TD;  // of x's type, contiguous
  int64_t backward;
  void* out;  // contiguous
};

struct GspoCpuKernels {
  const char* name;
  // Tokens first to last of args; a row's result depends on no other row and not on the range.
  void (*token_stats)(const GspoTokenStats* args, int64_t first, int64_t last);
  void (*token_backward)(const GspoTokenBackward* args, int64_t first, int64_t last);
  // total += part over elements first to last; element_type is part's.
  void (*accumulate)(float* total, const void* part, int64_t element_type, int64_t first, int64_t last);
  void (*rms_norm)(const GspoRmsNorm* args, int64_t first, int64_t last);
  // grad_weight: written, of these rows alone.
  void (*rms_norm_backward)(const GspoRmsNormBackward* args, float* grad_weight, int64_t first, int64_t last);
  void (*rotary)(const GspoRotary* args, int64_t first, int64_t last);
};

extern const GspoCpuKernels gspo_cpu_generic;
#if defined(__x86_64__)
extern const GspoCpuKernels gspo_cpu_avx2;
extern const GspoCpuKernels gspo_cpu_avx512;
extern const GspoCpuKernels gspo_cpu_avx512_bf16;
#endif

// The best that this processor runs; GSPO_MOE_CPU=generic|avx2|avx512|avx512_bf16 asks for one. Null for an unknown
// name or one that does not run here.
const GspoCpuKernels* gspo_cpu_kernels(const char* wanted);

// Sequences first to last, float64, in order of the tokens.
void gspo_cpu_sequence_reduce(const GspoSequenceReduce* args, int64_t first, int64_t last);
