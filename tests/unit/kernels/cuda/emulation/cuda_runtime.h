// What the project's CUDA sources need of CUDA, for a host compiler: kernels run on the CPU, one block at a time, each
// CUDA thread on a fiber that runs until the next barrier or shuffle (fibers.cpp).
//
// Stricter than a GPU where a GPU leaves things undefined: a shuffle whose lanes do not all come, a barrier that a thread
// leaves out, and a misaligned access end the program with a message.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// One block runs at a time, so its shared memory may be static. Static also gives it red zones under ASan.
#define __shared__ static

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulation {

[[noreturn]] void fail(const char* what);
void barrier(const char* site);
// Gives each lane of `mask` the `bits` of the lane `lane ^ offset`.
uint64_t shuffle_xor(unsigned mask, uint64_t bits, int offset);
void count_read(const void* address, size_t bytes);
void count_write(const void* address, size_t bytes);
void run_grid(dim3 grid, dim3 block, const std::function<void()>& thread);
int num_sms();

template <typename T>
void check_alignment(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) fail("misaligned address");
}

}  // namespace emulation

#define EMULATION_TEXT(x) #x
#define EMULATION_LINE(x) EMULATION_TEXT(x)
#define __syncthreads() ::emulation::barrier(__FILE__ ":" EMULATION_LINE(__LINE__))

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = emulation::shuffle_xor(mask, bits, offset);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T __ldg(const T* address) {
  emulation::check_alignment(address);
  emulation::count_read(address, sizeof(T));
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return __ldg(address);
}
template <typename T>
void __stcs(T* address, T value) {
  emulation::check_alignment(address);
  emulation::count_write(address, sizeof(T));
  *address = value;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline int min(int a, int b) { return a < b ? a : b; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid argument"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::num_sms();
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  // Few, so that few tokens are enough to give a block several.
  *blocks = 1;
  return cudaSuccess;
}
template <typename Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args), const std::decay_t<Args>& args) {
  emulation::run_grid(config->gridDim, config->blockDim, [&] { kernel(args); });
  return cudaSuccess;
}
