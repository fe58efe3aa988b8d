// What the kernels rely on, checked on the host before every launch. What pointers point to is the caller's to know.
#include <cuda_runtime.h>

#include "api.h"

namespace {

// A column index, and one grid's stride beyond it, fit an int.
constexpr int64_t MAX_COLUMNS = int64_t{1} << 30;

bool known_type(int64_t element_type) { return element_type >= GSPO_FLOAT32 && element_type <= GSPO_FLOAT16; }

bool aligned(const void* pointer, int64_t element_type) {
  const uintptr_t size = element_type == GSPO_FLOAT32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(pointer) % size == 0;
}

const char* check_rows(int64_t element_type, const void* logits, int64_t num_tokens, int64_t columns,
                       int64_t row_stride, const int64_t* targets, float inverse_temperature) {
  if (!known_type(element_type)) return "element_type must be a GspoElementType";
  if (num_tokens < 0) return "num_tokens must not be negative";
  if (columns < 0 || columns > MAX_COLUMNS) return "columns must be between 0 and 2^30";
  if (num_tokens > 1 && row_stride < columns) return "row_stride must not be less than the columns of a row";
  if (!(inverse_temperature > 0.0f && inverse_temperature <= 3.4e38f)) return "inverse_temperature must be positive";
  if (num_tokens > 0 && columns > 0 && logits == nullptr) return "logits_TV must not be null";
  if (!aligned(logits, element_type)) return "logits_TV must be aligned to its elements";
  if (num_tokens > 0 && targets == nullptr) return "targets_T must not be null";
  return nullptr;
}

}  // namespace

const char* gspo_check_token_stats(const GspoTokenStats* args) {
  if (args->entropy != 0 && args->entropy != 1) return "entropy must be 0 or 1";
  if (args->num_tokens > 0 && args->stats_TS == nullptr) return "stats_TS must not be null";
  return check_rows(args->element_type, args->logits_TV, args->num_tokens, args->vocab, args->row_stride,
                    args->targets_T, args->inverse_temperature);
}

const char* gspo_check_token_backward(const GspoTokenBackward* args) {
  if (args->vocab < 0 || args->vocab > args->columns) return "vocab must be between 0 and columns";
  if ((args->grad_entropy_T == nullptr) != (args->entropy_T == nullptr)) {
    return "grad_entropy_T and entropy_T must be given together";
  }
  if (args->num_tokens > 0 && (args->log_z_T == nullptr || args->grad_log_probs_T == nullptr)) {
    return "log_z_T and grad_log_probs_T must not be null";
  }
  return check_rows(args->element_type, args->logits_TV, args->num_tokens, args->columns, args->row_stride,
                    args->targets_T, args->inverse_temperature);
}

const char* gspo_check_sequence_reduce(const GspoSequenceReduce* args) {
  if (args->phases < GSPO_PARTIAL || args->phases > GSPO_WHOLE) return "phases must be a GspoPhases";
  if (args->num_sequences < 0) return "num_sequences must not be negative";
  if (args->num_sequences == 0) return nullptr;
  if (args->cu_seqlens == nullptr || args->sums_N2 == nullptr) return "cu_seqlens and sums_N2 must not be null";
  if (args->phases == GSPO_PARTIAL) return nullptr;
  if (args->advantages == nullptr) return "advantages must not be null";
  if (args->ratio_N == nullptr || args->loss_N == nullptr || args->clipped_tokens_N == nullptr) {
    return "ratio_N, loss_N and clipped_tokens_N must not be null";
  }
  if (args->advantages_per_token != 0 && args->advantages_per_token != 1) return "advantages_per_token must be 0 or 1";
  if (!(args->clip_low >= 0.0 && args->clip_high >= 0.0)) return "clip_low and clip_high must not be negative";
  return nullptr;
}

const char* gspo_cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
