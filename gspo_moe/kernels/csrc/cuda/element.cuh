// Logits in memory: 16 bytes at a time where a row allows it, one element at a time at its ends.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace gspo {

// How one element type is stored. COUNT elements make 16 bytes.
struct Float32 {
  using Type = float;
  static constexpr int COUNT = 4;

  static __device__ float to_float(float value) { return value; }
  static __device__ float from_float(float value) { return value; }
  static __device__ void unpack(const uint4& packed, float (&values)[COUNT]) {
    values[0] = __uint_as_float(packed.x);
    values[1] = __uint_as_float(packed.y);
    values[2] = __uint_as_float(packed.z);
    values[3] = __uint_as_float(packed.w);
  }
  static __device__ uint4 pack(const float (&values)[COUNT]) {
    return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                      __float_as_uint(values[3]));
  }
};

struct Bfloat16 {
  using Type = uint16_t;
  static constexpr int COUNT = 8;

  static __device__ float to_float(uint16_t value) { return __uint_as_float(static_cast<uint32_t>(value) << 16); }
  static __device__ uint16_t from_float(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
  static __device__ void unpack(const uint4& packed, float (&values)[COUNT]) {
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = __uint_as_float(words[i] << 16);
      values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static __device__ uint4 pack(const float (&values)[COUNT]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
      words[i] = __bfloat16_as_ushort(pair.x) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

struct Float16 {
  using Type = uint16_t;
  static constexpr int COUNT = 8;

  static __device__ float to_float(uint16_t value) { return __half2float(__ushort_as_half(value)); }
  static __device__ uint16_t from_float(float value) { return __half_as_ushort(__float2half_rn(value)); }
  static __device__ void unpack(const uint4& packed, float (&values)[COUNT]) {
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = to_float(static_cast<uint16_t>(words[i]));
      values[2 * i + 1] = to_float(static_cast<uint16_t>(words[i] >> 16));
    }
  }
  static __device__ uint4 pack(const float (&values)[COUNT]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = from_float(values[2 * i]) | static_cast<uint32_t>(from_float(values[2 * i + 1])) << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

// A row in three parts: `head` elements up to the first 16-byte boundary, `vectors` of 16 bytes, and the tail.
struct RowParts {
  int head;
  int vectors;
  int tail_start;
};

template <typename Element>
__device__ RowParts split_row(const typename Element::Type* row, int columns) {
  constexpr int size = sizeof(typename Element::Type);
  const int to_boundary = static_cast<int>((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16) / size;
  const int head = min(to_boundary, columns);
  const int vectors = (columns - head) / Element::COUNT;
  return {head, vectors, head + vectors * Element::COUNT};
}

}  // namespace gspo
