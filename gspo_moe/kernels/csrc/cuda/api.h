// C interface of the CUDA kernels: raw device pointers, sizes and a stream, no torch.
//
// Shape letters: T tokens, V columns of this rank's logits, S statistics a token, N sequences.
// x is a logit times inverse_temperature. All logarithms are natural.
//
// Every launcher returns a cudaError_t as int: 0 for success, cudaErrorInvalidValue (1) for arguments that its
// gspo_check_* function refuses, else what the launch returned. Nothing waits for the device. The current device must be
// the pointers' own. T = 0 or N = 0 is a success without a launch.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum GspoElementType { GSPO_FLOAT32 = 0, GSPO_BFLOAT16 = 1, GSPO_FLOAT16 = 2 };

// What one pass over this rank's vocabulary columns knows of each token; written float32 [T, S], row after row.
// S = 3, and 4 with entropy:
//   0  max       m = max over columns of x; -inf where there is no column or all are -inf
//   1  sum_exp   s = sum exp(x - m); 0 where m = -inf
//   2  target    x of the target; -inf where the target is no column of this rank
//   3  moment    w = sum (x - m) exp(x - m), <= 0; 0 where m = -inf
// A logit of -inf adds 0; NaN or +inf makes s (and w) NaN.
// Ranks combine as m = max m_r, s = sum s_r exp(m_r - m), w = sum (w_r + (m_r - m) s_r) exp(m_r - m) over ranks with
// s_r > 0, target = max target_r. Then log_prob = target - m - log s, entropy = log s - w / s, log_z = m + log s, and the
// target is a first choice where target == m.
struct GspoTokenStats {
  const void* logits_TV;        // element_type; columns adjacent, aligned to their own size only
  int64_t element_type;         // GspoElementType
  int64_t num_tokens;           // T
  int64_t vocab;                // columns that are tokens; padding columns beyond them are never read
  int64_t row_stride;           // elements from a row to the next, >= vocab where T > 1
  const int64_t* targets_T;     // ids in the whole vocabulary
  int64_t vocab_start;          // id of column 0
  float inverse_temperature;    // > 0
  int64_t entropy;              // 0: S = 3; 1: S = 4
  float* stats_TS;
};
const char* gspo_check_token_stats(const struct GspoTokenStats* args);  // null, or what is wrong
int gspo_token_stats(const struct GspoTokenStats* args, void* stream);

// In place, logits become the gradient of sum_t grad_log_probs_T * log_prob + grad_entropy_T * entropy:
//   inverse_temperature * (grad_log_probs * (onehot - p) - grad_entropy * p * (log p + entropy)),  p = exp(x - log_z).
// Padding columns become 0. A token whose two gradients are both 0 is written without being read, so what it held does
// not matter.
struct GspoTokenBackward {
  void* logits_TV;              // read and written
  int64_t element_type;
  int64_t num_tokens;
  int64_t vocab;
  int64_t columns;              // V, vocab and padding; <= row_stride where T > 1
  int64_t row_stride;
  const int64_t* targets_T;
  int64_t vocab_start;
  float inverse_temperature;
  const float* log_z_T;         // log sum exp x over the whole vocabulary
  const float* grad_log_probs_T;
  const float* grad_entropy_T;  // null where no gradient reaches the entropy
  const float* entropy_T;       // null exactly where grad_entropy_T is
};
const char* gspo_check_token_backward(const struct GspoTokenBackward* args);
int gspo_token_backward(const struct GspoTokenBackward* args, void* stream);

// Sums of log-ratios d = log_probs - old_log_probs over each sequence's response tokens, and from them loss and gradient
// (SPEC section 1). s_i = exp(sum d / |y_i|); clipped where A > 0 and s_i > 1 + clip_high, or A < 0
// and s_i < 1 - clip_low; J_i = min(s_i A_i, clip(s_i) A_i), with A a token its mean over response tokens; 0 for
// A = 0, though s_i overflow.
// A is one a sequence, or with advantages_per_token one a token, with the same loss and gradient for equal ones.
//
// phases: GSPO_WHOLE in one launch. Where a sequence is split over ranks, GSPO_PARTIAL writes sums_N2 only; add them up
// over the ranks, then GSPO_FINISH reads them (and no log-prob). With A a sequence the outputs are then the whole
// sequence's on each rank; with A a token loss_N and clipped_tokens_N are this rank's part, to be added up.
// Sums are float64 and taken in a fixed order: equal inputs give equal bits. A sequence with |y_i| = 0 has ratio 1, loss
// 0. Log-probs off the response, NaN included, have no effect.
enum GspoPhases { GSPO_PARTIAL = 1, GSPO_FINISH = 2, GSPO_WHOLE = 3 };

struct GspoSequenceReduce {
  int64_t phases;
  int64_t num_sequences;          // N
  const int64_t* cu_seqlens;      // [N + 1], bounds in T, never falling
  const uint8_t* mask_T;          // not 0 on response tokens
  const float* log_probs_T;       // not read by GSPO_FINISH
  const float* old_log_probs_T;   // not read by GSPO_FINISH
  double* sums_N2;                // sum of d, count of response tokens |y_i|
  int64_t advantages_per_token;   // 0: advantages is [N]; 1: [T]
  const double* advantages;       // this and what follows is not used by GSPO_PARTIAL
  double clip_low;                // epsilon_low >= 0
  double clip_high;               // epsilon_high >= 0
  double scale;                   // 1 / sequences of the mini-batch
  double* ratio_N;                // s_i
  double* loss_N;                 // -scale * J_i
  double* clipped_tokens_N;       // response tokens without gradient; gspo: 0 or |y_i|
  float* grad_log_probs_T;        // d sum(loss_N) / d log_probs; 0 off the response, not written outside cu_seqlens
};
const char* gspo_check_sequence_reduce(const struct GspoSequenceReduce* args);
int gspo_sequence_reduce(const struct GspoSequenceReduce* args, void* stream);

const char* gspo_cuda_error_string(int error);

#ifdef __cplusplus
}
#endif
