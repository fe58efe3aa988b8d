#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace {

// min(r A, clip(r) A) and whether it is the clipped branch, which has no gradient.
struct Clipped {
  double value;
  bool clipped;
};

Clipped clip(double ratio, double advantage, const GspoSequenceReduce* args) {
  const double low = 1.0 - args->clip_low, high = 1.0 + args->clip_high;
  const bool clipped = (advantage > 0 && ratio > high) || (advantage < 0 && ratio < low);
  if (advantage == 0) return {0.0, false};  // an infinite ratio times 0 would be NaN
  return {(clipped ? std::min(std::max(ratio, low), high) : ratio) * advantage, clipped};
}

void sum(const GspoSequenceReduce* args, int64_t sequence) {
  double total = 0.0, count = 0.0;
  for (int64_t token = args->cu_seqlens[sequence]; token < args->cu_seqlens[sequence + 1]; ++token) {
    if (!args->mask_T[token]) continue;
    total += (double)args->log_probs_T[token] - (double)args->old_log_probs_T[token];
    count += 1.0;
  }
  args->sums_N2[2 * sequence] = total;
  args->sums_N2[2 * sequence + 1] = count;
}

void finish(const GspoSequenceReduce* args, int64_t sequence) {
  const double count = args->sums_N2[2 * sequence + 1];
  const double ratio = count > 0 ? std::exp(args->sums_N2[2 * sequence] / count) : 1.0;
  const double share = count > 0 ? args->scale / count : 0.0;  // of a token in the loss
  const bool per_token = args->advantages_per_token != 0;
  const Clipped whole = per_token ? Clipped{0.0, false} : clip(ratio, args->advantages[sequence], args);
  double loss = 0.0, clipped_tokens = 0.0;
  for (int64_t token = args->cu_seqlens[sequence]; token < args->cu_seqlens[sequence + 1]; ++token) {
    args->grad_log_probs_T[token] = 0.0f;
    if (!args->mask_T[token]) continue;
    const double advantage = args->advantages[per_token ? token : sequence];
    const Clipped one = per_token ? clip(ratio, advantage, args) : whole;
    if (!one.clipped && advantage != 0) args->grad_log_probs_T[token] = (float)(-share * ratio * advantage);
    loss -= share * one.value;
    clipped_tokens += one.clipped;
  }
  args->ratio_N[sequence] = ratio;
  // With one advantage a sequence the result is the whole sequence's, though some of its tokens may be on other ranks.
  args->loss_N[sequence] = per_token ? loss : (count > 0 ? -args->scale * whole.value : 0.0);
  args->clipped_tokens_N[sequence] = per_token ? clipped_tokens : (whole.clipped ? count : 0.0);
}

}  // namespace

void gspo_cpu_sequence_reduce(const GspoSequenceReduce* args, int64_t first, int64_t last) {
  for (int64_t sequence = first; sequence < last; ++sequence) {
    if (args->phases & GSPO_PARTIAL) sum(args, sequence);
    if (args->phases & GSPO_FINISH) finish(args, sequence);
  }
}
