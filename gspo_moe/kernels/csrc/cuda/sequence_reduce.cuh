// From token log-probs to sequence ratios, clip decisions, losses and gradients: one block a sequence, one launch.
#pragma once

#include <cuda_runtime.h>

#include "api.h"
#include "block_reduce.cuh"

namespace gspo {

struct DoublePair {
  double first;
  double second;

  static __device__ DoublePair identity() { return {0.0, 0.0}; }
  __device__ DoublePair across(int offset) const {
    return {__shfl_xor_sync(ALL_LANES, first, offset), __shfl_xor_sync(ALL_LANES, second, offset)};
  }
  static __device__ void add(DoublePair& into, const DoublePair& other) {
    into.first += other.first;
    into.second += other.second;
  }
};

// min(s A, clip(s) A) takes the clipped branch, so that the gradient is 0.
__device__ inline bool is_clipped(const GspoSequenceReduce& args, double ratio, double advantage) {
  return (advantage > 0.0 && ratio > 1.0 + args.clip_high) || (advantage < 0.0 && ratio < 1.0 - args.clip_low);
}

__device__ inline double clip_objective(const GspoSequenceReduce& args, double ratio, double advantage) {
  if (advantage == 0.0) return 0.0;  // an infinite ratio times 0 would be NaN
  if (!is_clipped(args, ratio, advantage)) return ratio * advantage;
  return (advantage > 0.0 ? 1.0 + args.clip_high : 1.0 - args.clip_low) * advantage;
}

// This thread's part of: sum of log-ratios, count of response tokens.
__device__ inline DoublePair sum_log_ratios(const GspoSequenceReduce& args, int64_t start, int64_t end) {
  DoublePair part = DoublePair::identity();
#pragma unroll 4
  for (int64_t t = start + threadIdx.x; t < end; t += blockDim.x) {
    if (args.mask_T[t] == 0) continue;
    part.first += static_cast<double>(args.log_probs_T[t]) - static_cast<double>(args.old_log_probs_T[t]);
    part.second += 1.0;
  }
  return part;
}

// Writes this thread's token gradients; its part of: sum of J_it, count of clipped tokens.
__device__ inline DoublePair finish_tokens(const GspoSequenceReduce& args, int64_t start, int64_t end, double ratio,
                                           double length, double sequence_advantage) {
  DoublePair part = DoublePair::identity();
  for (int64_t t = start + threadIdx.x; t < end; t += blockDim.x) {
    float gradient = 0.0f;
    if (args.mask_T[t] != 0) {
      const double advantage = args.advantages_per_token ? args.advantages[t] : sequence_advantage;
      const bool clipped = is_clipped(args, ratio, advantage);
      part.first += clip_objective(args, ratio, advantage);
      part.second += clipped ? 1.0 : 0.0;
      if (!clipped && advantage != 0.0) gradient = static_cast<float>(-args.scale * ratio * advantage / length);
    }
    args.grad_log_probs_T[t] = gradient;
  }
  return part;
}

__device__ inline void finish_sequence(const GspoSequenceReduce& args, int64_t sequence, DoublePair sums, double ratio,
                                       DoublePair tokens) {
  const double length = sums.second;
  double objective = length > 0.0 ? tokens.first / length : 0.0;
  double clipped_tokens = tokens.second;
  if (!args.advantages_per_token) {
    // The whole sequence's, though this rank may have only part of its tokens.
    const double advantage = args.advantages[sequence];
    objective = length > 0.0 ? clip_objective(args, ratio, advantage) : 0.0;
    clipped_tokens = is_clipped(args, ratio, advantage) ? length : 0.0;
  }
  args.ratio_N[sequence] = ratio;
  args.loss_N[sequence] = -args.scale * objective;
  args.clipped_tokens_N[sequence] = clipped_tokens;
}

__global__ void __launch_bounds__(MAX_THREADS, 1) sequence_reduce_kernel(const __grid_constant__ GspoSequenceReduce args) {
  __shared__ DoublePair scratch[2][MAX_WARPS];
  __shared__ DoublePair shared_sums;
  __shared__ double shared_ratio;
  for (int64_t sequence = blockIdx.x; sequence < args.num_sequences; sequence += gridDim.x) {
    const int64_t start = args.cu_seqlens[sequence], end = args.cu_seqlens[sequence + 1];
    DoublePair sums = DoublePair::identity();
    if (args.phases & GSPO_PARTIAL) {
      sums = block_reduce(sum_log_ratios(args, start, end), scratch[0], DoublePair::add);
    }
    double* sums_2 = args.sums_N2 + 2 * sequence;
    if (threadIdx.x == 0) {
      if (args.phases & GSPO_PARTIAL) {
        sums_2[0] = sums.first;
        sums_2[1] = sums.second;
      } else {
        sums = {sums_2[0], sums_2[1]};
      }
      shared_sums = sums;
      shared_ratio = sums.second > 0.0 ? exp(sums.first / sums.second) : 1.0;
    }
    __syncthreads();
    if (args.phases & GSPO_FINISH) {
      const DoublePair whole = shared_sums;
      const double ratio = shared_ratio;
      const double advantage = args.advantages_per_token ? 0.0 : args.advantages[sequence];
      const DoublePair part = finish_tokens(args, start, end, ratio, whole.second, advantage);
      const DoublePair tokens = block_reduce(part, scratch[1], DoublePair::add);
      if (threadIdx.x == 0) finish_sequence(args, sequence, whole, ratio, tokens);
    }
    // shared_sums and scratch are written again for the next sequence.
    __syncthreads();
  }
}

}  // namespace gspo
