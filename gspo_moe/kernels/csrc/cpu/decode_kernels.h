// Kernels of decode steps in float32, for token_kernels.h's instruction sets: norm, gate, and attention of one new token
// a row of a cache.
//
// Queries and keys both lie along a head, so that scores are dot products: accumulators of some rows by four outputs
// stay in registers, and their lanes are added up once at the end.

namespace {

#if !defined(GSPO_SUMS_OF_4)
GSPO_INLINE void sums_of_4(const Floats parts[4], float* sums) {
  for (int output = 0; output < 4; ++output) sums[output] = sum_of_lanes(parts[output]);
}
#define GSPO_SUMS_OF_4 sums_of_4
#endif

// Without it GCC reads a weight anew for every row that it is multiplied with.
#if defined(__x86_64__)
#define GSPO_IN_REGISTER(vector) asm("" : "+x"(vector))
#else
#define GSPO_IN_REGISTER(vector)
#endif

// found[m, n] = sum over k of rows[m][k] * weight[n, k].
struct Product {
  const float* const* rows_M;
  int64_t num_rows;
  const float* weight_NK;
  int64_t inputs;
  float* found_MN;
  int64_t found_stride;
};

constexpr int kOutputs = 4;
constexpr int kRows = 6;
constexpr int kAtOnce = kLanes == 16 ? 4 : 2;  // outputs of kRows rows, for which registers are left

__attribute__((noinline)) float rest_of_dot(const float* a, const float* b, int64_t at, int64_t count) {
  float sum = 0.0f;
  for (; at < count; ++at) sum += a[at] * b[at];
  return sum;
}

// ahead: weights that will be needed next, which come from memory meanwhile; the processor foresees no page's begin.
template <int kM, int kN>
GSPO_INLINE void tile(const Product* args, int64_t row, int64_t output, const float* ahead) {
  const int64_t inputs = args->inputs;
  const float* const weight = args->weight_NK + output * inputs;
  Floats parts[kM * kN] = {};
  int64_t input = 0;
  for (; input + kLanes <= inputs; input += kLanes) {
    Floats weights[kN];
    if (ahead) {
      for (int at = 0; at < kN * kLanes; at += 16) __builtin_prefetch(ahead + kN * input + at);
    }
    for (int n = 0; n < kN; ++n) {
      weights[n] = load<Floats>(weight + n * inputs + input);
      GSPO_IN_REGISTER(weights[n]);
    }
    for (int m = 0; m < kM; ++m) {
      Floats values = load<Floats>(args->rows_M[row + m] + input);
      GSPO_IN_REGISTER(values);
      for (int n = 0; n < kN; ++n) parts[m * kN + n] += values * weights[n];
    }
  }
  float sums[kM * kN];
  for (int part = 0; part < kM * kN; part += 4) GSPO_SUMS_OF_4(parts + part, sums + part);
  if (input < inputs) {
    for (int part = 0; part < kM * kN; ++part) {
      sums[part] += rest_of_dot(args->rows_M[row + part / kN], weight + part % kN * inputs, input, inputs);
    }
  }
  for (int m = 0; m < kM; ++m) {
    memcpy(args->found_MN + (row + m) * args->found_stride + output, sums + m * kN, sizeof(float) * kN);
  }
}

float dot(const float* a, const float* b, int64_t count) {
  Floats sum = {};
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) sum += load<Floats>(a + at) * load<Floats>(b + at);
  return sum_of_lanes(sum) + rest_of_dot(a, b, at, count);
}

// Outputs of rows begin to end; fresh: the weights have yet to come from memory.
GSPO_INLINE void product_of(const Product* args, int64_t begin, int64_t end, int64_t first, int64_t last, bool fresh) {
  int64_t output = first;
  for (; output + kOutputs <= last; output += kOutputs) {
    const bool foresee = fresh && output + 2 * kOutputs <= last;
    const float* next = foresee ? args->weight_NK + (output + kOutputs) * args->inputs : nullptr;
    int64_t row = begin;
    for (; row + kRows <= end; row += kRows, next = nullptr) {
      for (int n = 0; n < kOutputs; n += kAtOnce) {
        tile<kRows, kAtOnce>(args, row, output + n, next ? next + n * args->inputs : nullptr);
      }
    }
    for (; row + 2 <= end; row += 2, next = nullptr) tile<2, kOutputs>(args, row, output, next);
    for (; row < end; ++row, next = nullptr) tile<1, kOutputs>(args, row, output, next);
  }
  for (; output < last; ++output) {
    for (int64_t row = begin; row < end; ++row) {
      args->found_MN[row * args->found_stride + output] =
          dot(args->rows_M[row], args->weight_NK + output * args->inputs, args->inputs);
    }
  }
}

void product(const Product* args, int64_t first, int64_t last) {
  // As many rows at once as leave room for weights in the first-level cache.
  const int64_t fit = 24576 / (int64_t)sizeof(float) / (args->inputs > 0 ? args->inputs : 1) / kRows * kRows;
  const int64_t rows = fit > kRows ? fit : kRows;
  for (int64_t begin = 0; begin < args->num_rows; begin += rows) {
    const int64_t end = begin + rows < args->num_rows ? begin + rows : args->num_rows;
    product_of(args, begin, end, first, last, begin == 0);
  }
}

void normalize(const float* values, const float* weight, float epsilon, float* __restrict__ found, int64_t count) {
  const float scale = 1.0f / sqrtf(dot(values, values, count) / (float)count + epsilon);
  for (int64_t at = 0; at < count; ++at) found[at] = values[at] * scale * weight[at];
}

// silu(gate) * up * share, where gate and up are the two halves of a row.
void gate(const float* both, float share, float* found, int64_t width) {
  const auto gated = [&](Floats gate, Floats up) __attribute__((always_inline)) {
    const Floats magnitude = larger(gate, -gate);
    const Floats small = power_of_two(larger(all(kLowest), -magnitude) * kLog2E);  // of exp, never above 1
    const Floats sigmoid = (gate < 0.0f ? small : all(1.0f)) / (1.0f + small);
    return gate * sigmoid * up * share;
  };
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) {
    Float32::put(found + at, gated(load<Floats>(both + at), load<Floats>(both + width + at)));
  }
  if (at < width) {
    float gates[kLanes] = {}, ups[kLanes] = {};
    memcpy(gates, both + at, sizeof(float) * (width - at));
    memcpy(ups, both + width + at, sizeof(float) * (width - at));
    Float32::put(gates, gated(load<Floats>(gates), load<Floats>(ups)));
    memcpy(found + at, gates, sizeof(float) * (width - at));
  }
}

// In the half-split convention, in place.
void turn(float* __restrict__ head, const float* cosine, const float* sine, int64_t size) {
  float* __restrict__ other = head + size / 2;
  for (int64_t at = 0; at < size / 2; ++at) {
    const float left = head[at], right = other[at];
    head[at] = left * cosine[at] - right * sine[at];
    other[at] = right * cosine[at + size / 2] + left * sine[at + size / 2];
  }
}

// Scores become exp(score * scale - the largest one); their sum.
float exponentials(float* scores, int64_t count, float scale) {
  const float largest = block_max<Float32>(scores, count);
  const auto power = [&](Floats score) __attribute__((always_inline)) {
    return power_of_two((score - largest) * (scale * kLog2E));
  };
  Floats total = {};
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) {
    const Floats values = power(load<Floats>(scores + at));
    total += values;
    Float32::put(scores + at, values);
  }
  if (at < count) {
    Tail<Float32> tail(scores + at, count - at);
    const Floats values = power(load<Floats>(tail.elements));
    total += values;
    Float32::put(tail.elements, values);
    memcpy(scores + at, tail.elements, sizeof(float) * (count - at));
  }
  return sum_of_lanes(total);
}

void weighted_sum(const float* weights, const float* values_PD, int64_t count, int64_t size, float scale, float* found) {
  int64_t at = 0;
  for (; at + 2 * kLanes <= size; at += 2 * kLanes) {
    Floats even[2] = {}, odd[2] = {};
    int64_t position = 0;
    for (; position + 2 <= count; position += 2) {
      const float* const row = values_PD + position * size + at;
      for (int part = 0; part < 2; ++part) {
        even[part] += weights[position] * load<Floats>(row + part * kLanes);
        odd[part] += weights[position + 1] * load<Floats>(row + size + part * kLanes);
      }
    }
    for (; position < count; ++position) {
      for (int part = 0; part < 2; ++part) {
        even[part] += weights[position] * load<Floats>(values_PD + position * size + at + part * kLanes);
      }
    }
    for (int part = 0; part < 2; ++part) Float32::put(found + at + part * kLanes, (even[part] + odd[part]) * scale);
  }
  for (; at < size; ++at) {
    float sum = 0.0f;
    for (int64_t position = 0; position < count; ++position) sum += weights[position] * values_PD[position * size + at];
    found[at] = sum * scale;
  }
}

void attend(const GspoDecodeAttention* args, int64_t first, int64_t last) {
  const int64_t size = args->size, queries = args->queries, capacity = args->capacity;
  float* const heads = (float*)malloc(sizeof(float) * queries * (size + capacity));
  float* const scores = heads + queries * size;
  const float** const rows = (const float**)malloc(sizeof(float*) * queries);
  for (int64_t query = 0; query < queries; ++query) rows[query] = heads + query * size;
  for (int64_t each = first; each < last; ++each) {
    const int64_t row = each / args->groups;
    const float* const qkv = args->qkv_NGXD + each * (queries + 2) * size;
    const int64_t position = args->positions_N[row], seen = position + 1;
    const float* const cosine = args->cos_PD + position * size;
    const float* const sine = args->sin_PD + position * size;
    for (int64_t query = 0; query < queries; ++query) {
      normalize(qkv + query * size, args->query_norm_D, args->epsilon, heads + query * size, size);
      turn(heads + query * size, cosine, sine, size);
    }
    float* const keys = args->keys_BGPD + each * capacity * size;
    float* const values = args->values_BGPD + each * capacity * size;
    normalize(qkv + queries * size, args->key_norm_D, args->epsilon, keys + position * size, size);
    turn(keys + position * size, cosine, sine, size);
    memcpy(values + position * size, qkv + (queries + 1) * size, sizeof(float) * size);
    const Product product_args = {rows, queries, keys, size, scores, capacity};
    product(&product_args, 0, seen);
    for (int64_t query = 0; query < queries; ++query) {
      float* const weights = scores + query * capacity;
      const float sum = exponentials(weights, seen, 1.0f / sqrtf((float)size));
      weighted_sum(weights, values, seen, size, 1.0f / sum, args->found_NGQD + (each * queries + query) * size);
    }
  }
  free(rows);
  free(heads);
}

}  // namespace
