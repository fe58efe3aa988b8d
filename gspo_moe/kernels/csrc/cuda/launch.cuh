// How many threads and blocks a kernel gets, and the launch itself.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <algorithm>

#include "api.h"
#include "block_reduce.cuh"
#include "element.cuh"

namespace gspo {

// More blocks than run at a time, so that the last to finish are a small part of the whole.
constexpr int64_t WAVES = 16;
constexpr int64_t MAX_SLICES = 65535;  // gridDim.y

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline cudaError_t count_sms(int64_t* num_sms) {
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  *num_sms = count;
  return error;
}

// Small blocks where there are tokens for all multiprocessors, large ones where there are few, none wider than a row.
inline int64_t row_threads(int64_t num_tokens, int64_t row_vectors, int64_t num_sms) {
  const int64_t wanted = num_tokens >= 4 * num_sms ? 256 : num_tokens >= 2 * num_sms ? 512 : MAX_THREADS;
  return std::min(wanted, std::max<int64_t>(1, divide_up(row_vectors, WARP)) * WARP);
}

// Launches blocks for `items` of equal work along x. Where they alone do not fill the GPU, an item is cut into up to
// `max_slices` along y.
template <typename Args>
cudaError_t launch(void (*kernel)(Args), int64_t items, int64_t max_slices, int64_t threads, int64_t num_sms,
                   const Args& args, void* stream) {
  int blocks_per_sm = 0;
  const cudaError_t error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, static_cast<int>(threads), 0);
  if (error != cudaSuccess) return error;
  const int64_t resident = num_sms * std::max(blocks_per_sm, 1);
  const int64_t blocks = std::min(items, WAVES * resident);
  const int64_t slices = std::max<int64_t>(1, std::min({resident / blocks, max_slices, MAX_SLICES}));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(slices));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, args);
}

// Calls use(Element()) with the storage of an element type that the checks have let through.
template <typename Use>
cudaError_t with_element(int64_t element_type, Use use) {
  switch (element_type) {
    case GSPO_FLOAT32:
      return use(Float32());
    case GSPO_BFLOAT16:
      return use(Bfloat16());
    case GSPO_FLOAT16:
      return use(Float16());
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace gspo
