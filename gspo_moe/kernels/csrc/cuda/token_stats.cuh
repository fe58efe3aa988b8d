// Online softmax statistics of each token over a shard of the vocabulary: every logit is read once.
// (Online normalizer: Milakov and Gimelshein, arXiv 1805.02867.)
#pragma once

#include <float.h>
#include <math_constants.h>

#include "api.h"
#include "block_reduce.cuh"
#include "element.cuh"
#include "exponent.cuh"

namespace gspo {

// max is of raw logits; sum of 2^d and moment of d 2^d, d = (logit - max) * base2, base2 = log2(e) / temperature.
// max starts at the least finite float: -inf minus it is -inf, not NaN.
template <bool kEntropy>
struct RunningStats {
  float max;
  float sum;
  float moment;

  static __device__ RunningStats identity() { return {-FLT_MAX, 0.0f, 0.0f}; }

  __device__ RunningStats across(int offset) const {
    RunningStats other;
    other.max = __shfl_xor_sync(ALL_LANES, max, offset);
    other.sum = __shfl_xor_sync(ALL_LANES, sum, offset);
    other.moment = kEntropy ? __shfl_xor_sync(ALL_LANES, moment, offset) : 0.0f;
    return other;
  }

  __device__ void raise_max(float to, float base2) {
    const float step = fmaxf((max - to) * base2, LEAST_EXPONENT);
    const float factor = exp2f(step);
    if (kEntropy) moment = fmaf(step, sum, moment) * factor;
    sum *= factor;
    max = to;
  }

  __device__ void merge(RunningStats other, float base2) {
    const float top = fmaxf(max, other.max);
    raise_max(top, base2);
    other.raise_max(top, base2);
    sum += other.sum;
    moment += other.moment;
  }

  template <int COUNT>
  __device__ void absorb(const float (&logits)[COUNT], float base2) {
    float top = logits[0];
#pragma unroll
    for (int i = 1; i < COUNT; ++i) top = fmaxf(top, logits[i]);
    if (top > max) raise_max(top, base2);
    float added = 0.0f, added_moment = 0.0f;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const float exponent = (logits[i] - max) * base2;
      const float term = exp2f(exponent);
      added += term;
      if (kEntropy) added_moment = fmaf(fmaxf(exponent, LEAST_EXPONENT), term, added_moment);
    }
    sum += added;
    moment += added_moment;
  }
};

// This thread's part of a row. Four loads are on their way before the first is used, to keep memory busy.
template <typename Element, bool kEntropy>
__device__ RunningStats<kEntropy> row_stats(const typename Element::Type* row, int vocab, float base2) {
  constexpr int LOADS = 4;
  auto stats = RunningStats<kEntropy>::identity();
  const RowParts parts = split_row<Element>(row, vocab);
  const auto* vectors = reinterpret_cast<const uint4*>(row + parts.head);
  const int step = blockDim.x;
  int i = threadIdx.x;
  float logits[Element::COUNT];
  for (; i + (LOADS - 1) * step < parts.vectors; i += LOADS * step) {
    uint4 packed[LOADS];
#pragma unroll
    for (int j = 0; j < LOADS; ++j) packed[j] = __ldcs(vectors + i + j * step);
#pragma unroll
    for (int j = 0; j < LOADS; ++j) {
      Element::unpack(packed[j], logits);
      stats.absorb(logits, base2);
    }
  }
  for (; i < parts.vectors; i += step) {
    Element::unpack(__ldcs(vectors + i), logits);
    stats.absorb(logits, base2);
  }
  // Head and tail together are fewer than 32 elements: one a thread.
  const int ends = parts.head + vocab - parts.tail_start;
  if (static_cast<int>(threadIdx.x) < ends) {
    const int end = threadIdx.x;
    const int column = end < parts.head ? end : parts.tail_start + end - parts.head;
    const float logit[1] = {Element::to_float(__ldcs(row + column))};
    stats.absorb(logit, base2);
  }
  return stats;
}

template <typename Element, bool kEntropy>
__global__ void __launch_bounds__(MAX_THREADS, 1) token_stats_kernel(const __grid_constant__ GspoTokenStats args) {
  using Stats = RunningStats<kEntropy>;
  __shared__ Stats scratch[2][MAX_WARPS];
  const auto* logits = static_cast<const typename Element::Type*>(args.logits_TV);
  const float base2 = args.inverse_temperature * LOG2_E;
  int turn = 0;
  for (int64_t token = blockIdx.x; token < args.num_tokens; token += gridDim.x, turn ^= 1) {
    const auto* row = logits + token * args.row_stride;
    float target = -CUDART_INF_F;
    if (threadIdx.x == 0) {
      const int64_t column = args.targets_T[token] - args.vocab_start;
      if (column >= 0 && column < args.vocab) {
        target = Element::to_float(__ldg(row + column)) * args.inverse_temperature;
      }
    }
    const Stats part = row_stats<Element, kEntropy>(row, static_cast<int>(args.vocab), base2);
    const auto merge = [base2](Stats& into, const Stats& other) { into.merge(other, base2); };
    const Stats whole = block_reduce(part, scratch[turn], merge);
    if (threadIdx.x == 0) {
      float* written = args.stats_TS + token * (kEntropy ? 4 : 3);
      written[0] = whole.sum == 0.0f ? -CUDART_INF_F : whole.max * args.inverse_temperature;
      written[1] = whole.sum;
      written[2] = target;
      if (kEntropy) written[3] = whole.moment * LN_2;
    }
  }
}

}  // namespace gspo
