// Gradient of log-probs and entropy, written over the logits: each is read once and written once.
#pragma once

#include "api.h"
#include "block_reduce.cuh"
#include "element.cuh"
#include "exponent.cuh"

namespace gspo {

// d/dlogit of one token's loss: -p (scaled_grad + scaled_grad_entropy (log p + entropy)), and scaled_grad at the target.
// Both gradients are already divided by the temperature.
template <bool kEntropy>
struct TokenGradient {
  float inverse_temperature;
  float log_z;
  float scaled_grad;
  float scaled_grad_entropy;
  float entropy;
  int target;  // column, or -1 where another rank has it

  __device__ float at(float logit, int column) const {
    const float exponent = fmaf(logit, inverse_temperature, -log_z) * LOG2_E;
    const float p = exp2f(exponent);
    float weight = scaled_grad;
    if (kEntropy) {
      const float log_p = fmaxf(exponent, LEAST_EXPONENT) * LN_2;
      weight = fmaf(scaled_grad_entropy, log_p + entropy, scaled_grad);
    }
    return (column == target ? scaled_grad : 0.0f) - p * weight;
  }
};

template <typename Element, bool kEntropy>
__device__ void write_gradient(typename Element::Type* row, int vocab, const TokenGradient<kEntropy>& gradient) {
  constexpr int LOADS = 4;
  const RowParts parts = split_row<Element>(row, vocab);
  auto* vectors = reinterpret_cast<uint4*>(row + parts.head);
  const int first = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
  const auto convert = [&](int vector, const uint4& packed) {
    float values[Element::COUNT];
    Element::unpack(packed, values);
    const int column = parts.head + vector * Element::COUNT;
#pragma unroll
    for (int j = 0; j < Element::COUNT; ++j) values[j] = gradient.at(values[j], column + j);
    __stcs(vectors + vector, Element::pack(values));
  };
  int i = first;
  for (; i + (LOADS - 1) * step < parts.vectors; i += LOADS * step) {
    uint4 packed[LOADS];
#pragma unroll
    for (int j = 0; j < LOADS; ++j) packed[j] = __ldcs(vectors + i + j * step);
#pragma unroll
    for (int j = 0; j < LOADS; ++j) convert(i + j * step, packed[j]);
  }
  for (; i < parts.vectors; i += step) convert(i, __ldcs(vectors + i));
  // Head and tail together are fewer than 32 elements: one a thread.
  if (first < parts.head + vocab - parts.tail_start) {
    const int column = first < parts.head ? first : parts.tail_start + first - parts.head;
    const float logit = Element::to_float(__ldcs(row + column));
    __stcs(row + column, Element::from_float(gradient.at(logit, column)));
  }
}

// Zeroes columns [from, to).
template <typename Element>
__device__ void write_zeros(typename Element::Type* row, int from, int to) {
  typename Element::Type* start = row + from;
  const RowParts parts = split_row<Element>(start, to - from);
  auto* vectors = reinterpret_cast<uint4*>(start + parts.head);
  const int first = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
  for (int i = first; i < parts.vectors; i += step) __stcs(vectors + i, make_uint4(0, 0, 0, 0));
  if (first < parts.head + to - from - parts.tail_start) {
    const int column = first < parts.head ? first : parts.tail_start + first - parts.head;
    __stcs(start + column, Element::from_float(0.0f));
  }
}

template <typename Element, bool kEntropy>
__global__ void __launch_bounds__(MAX_THREADS, 1) token_backward_kernel(const __grid_constant__ GspoTokenBackward args) {
  auto* logits = static_cast<typename Element::Type*>(args.logits_TV);
  const int vocab = static_cast<int>(args.vocab), columns = static_cast<int>(args.columns);
  for (int64_t token = blockIdx.x; token < args.num_tokens; token += gridDim.x) {
    auto* row = logits + token * args.row_stride;
    TokenGradient<kEntropy> gradient;
    gradient.scaled_grad = __ldg(args.grad_log_probs_T + token) * args.inverse_temperature;
    gradient.scaled_grad_entropy = kEntropy ? __ldg(args.grad_entropy_T + token) * args.inverse_temperature : 0.0f;
    if (gradient.scaled_grad == 0.0f && gradient.scaled_grad_entropy == 0.0f) {
      write_zeros<Element>(row, 0, columns);
      continue;
    }
    gradient.inverse_temperature = args.inverse_temperature;
    gradient.log_z = __ldg(args.log_z_T + token);
    gradient.entropy = kEntropy ? __ldg(args.entropy_T + token) : 0.0f;
    const int64_t target = __ldg(args.targets_T + token) - args.vocab_start;
    gradient.target = target >= 0 && target < args.vocab ? static_cast<int>(target) : -1;
    write_gradient<Element, kEntropy>(row, vocab, gradient);
    write_zeros<Element>(row, vocab, columns);
  }
}

}  // namespace gspo
