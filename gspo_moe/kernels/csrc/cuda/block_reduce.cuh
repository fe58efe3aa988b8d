// Reductions over a block in a fixed order: lanes of a warp by shuffles, then warps through shared memory.
#pragma once

#include <cuda_runtime.h>

namespace gspo {

constexpr int WARP = 32;
constexpr int MAX_THREADS = 1024;
constexpr int MAX_WARPS = MAX_THREADS / WARP;
constexpr unsigned ALL_LANES = 0xffffffffu;

// The merge of all threads' values, valid in every lane of warp 0. merge(into, other) is associative and commutative;
// Value::identity() changes nothing it is merged into; value.across(offset) is the value of lane ^ offset.
// One barrier a call: `scratch` must not be the one of the call before, which warp 0 may still be reading.
template <typename Value, typename Merge>
__device__ Value block_reduce(Value value, Value (&scratch)[MAX_WARPS], Merge merge) {
  for (int offset = WARP / 2; offset > 0; offset /= 2) merge(value, value.across(offset));
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  if (warp != 0) return value;
  value = lane < warps ? scratch[lane] : Value::identity();
  for (int offset = WARP / 2; offset > 0; offset /= 2) merge(value, value.across(offset));
  return value;
}

}  // namespace gspo
