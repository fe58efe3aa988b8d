// CPU kernels over ranges of tokens: the same arguments and results as the CUDA launchers of ../cuda/api.h.
// Raw pointers only, so that a file compiled for one instruction set shares no inline code with another.
#pragma once

#include "../cuda/api.h"

enum { GSPO_PANEL = 16 };  // outputs of a panel

// found[m, n] = sum over k of rows[m][k] * weight[n, k], float32. A panel has the weights of GSPO_PANEL outputs for one
// input, then for the next; the last one is filled up with zeros.
struct GspoPanels {
  const float* const* rows_M;  // K adjacent elements each
  int64_t num_rows;            // M
  const float* panels_PKN;
  int64_t inputs, outputs;     // K, N of all panels
  float* found_MN;
  int64_t found_stride;        // elements from a row to the next
};

// One token of each row of logits under softmax(logits * inverse_temperature): the first whose cumulative share exceeds
// the row's uniform number, without such numbers the likeliest; and its log-prob. NaN where one is NaN or +inf, or all are -inf.
struct GspoDraw {
  const float* logits_NV;
  int64_t row_stride, vocab;
  float inverse_temperature;
  const double* uniforms_N;  // or null
  int64_t* tokens_N;
  float* log_probs_N;
};

// One new token a row of a cache, float32: norms of queries and keys, rotation, its key and value into the cache, and
// attention to the row up to itself. G key heads, Q query heads of each, D their size, P positions.
struct GspoDecodeAttention {
  const float* qkv_NGXD;       // X = Q + 2: queries, key, value
  int64_t groups, queries, size, capacity;
  const float* query_norm_D;
  const float* key_norm_D;
  float epsilon;
  const float* cos_PD;
  const float* sin_PD;
  const int64_t* positions_N;  // from 0 to P - 1
  float* keys_BGPD;            // B >= N rows
  float* values_BGPD;
  float* found_NGQD;
};

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
  // Panels first to last.
  void (*panels)(const GspoPanels* args, int64_t first, int64_t last);
  // Rows first to last.
  void (*draw)(const GspoDraw* args, int64_t first, int64_t last);
  void (*normalize)(const float* values, const float* weight, float epsilon, float* found, int64_t count);
  // found = silu(first half of both) * its second half * share, `width` elements.
  void (*gate)(const float* both, float share, float* found, int64_t width);
  // Key heads of rows first to last: row * G + key head.
  void (*attend)(const GspoDecodeAttention* args, int64_t first, int64_t last);
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
