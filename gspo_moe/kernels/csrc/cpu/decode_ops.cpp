// Ops of decode steps on the CPU, under torch's stable ABI; schemas stand in ../../decode.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 18;  // multiplications that a thread takes at least
constexpr int64_t kBlock = 64;       // outputs at once

const GspoCpuKernels& cpu() {
  const GspoCpuKernels* const kernels = gspo_cpu_kernels(std::getenv("GSPO_MOE_CPU"));
  STD_TORCH_CHECK(kernels != nullptr, "GSPO_MOE_CPU names no kernels that this processor has");
  return *kernels;
}

void check(const Tensor& tensor, int64_t dims, const char* name) {
  STD_TORCH_CHECK(
      tensor.dim() == dims && tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Float,
      name, " must be float32, contiguous and have ", dims, " dimensions");
}

void check_sizes(bool fit) { STD_TORCH_CHECK(fit, "the sizes of a decode op's arguments do not fit each other"); }

int64_t grain(int64_t multiplications) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, multiplications)); }

std::vector<const float*> rows_of(const Tensor& matrix) {
  std::vector<const float*> rows(matrix.size(0));
  for (size_t row = 0; row < rows.size(); ++row) rows[row] = matrix.const_data_ptr<float>() + row * matrix.size(1);
  return rows;
}

Tensor norm(const Tensor& values, const Tensor& weight, double epsilon) {
  check(values, 2, "values");
  check(weight, 1, "weight");
  check_sizes(values.size(1) == weight.size(0));
  auto found = torch::stable::new_empty(values, {values.size(0), values.size(1)});
  const auto normalize = cpu().normalize;
  const int64_t count = values.size(1);
  for (int64_t row = 0; row < values.size(0); ++row) {
    normalize(values.const_data_ptr<float>() + row * count, weight.const_data_ptr<float>(), (float)epsilon,
              found.mutable_data_ptr<float>() + row * count, count);
  }
  return found;
}

Tensor linear(const Tensor& values, const Tensor& weight) {
  check(values, 2, "values");
  check(weight, 2, "weight");
  check_sizes(values.size(1) == weight.size(1));
  const int64_t outputs = weight.size(0);
  auto found = torch::stable::new_empty(values, {values.size(0), outputs});
  const auto rows = rows_of(values);
  const auto product = cpu().product;
  // By way of a block whose rows lie beside each other: those of a wide output would all fall on one set of the cache.
  torch::stable::parallel_for(0, outputs, grain(values.numel()), [&](int64_t first, int64_t last) {
    std::vector<float> block(rows.size() * kBlock);
    for (int64_t start = first; start < last; start += kBlock) {
      const int64_t count = std::min(last - start, kBlock);
      const GspoProduct args = {rows.data(), values.size(0), weight.const_data_ptr<float>() + start * weight.size(1),
                                weight.size(1), block.data(), kBlock};
      product(&args, 0, count);
      for (size_t row = 0; row < rows.size(); ++row) {
        std::copy_n(block.data() + row * kBlock, count, found.mutable_data_ptr<float>() + row * outputs + start);
      }
    }
  });
  return found;
}

Tensor attention(
    const Tensor& qkv, const Tensor& query_norm, const Tensor& key_norm, double epsilon, const Tensor& cosines,
    const Tensor& sines, const Tensor& positions, Tensor keys, Tensor values) {
  check(qkv, 4, "qkv");
  check(keys, 4, "keys");
  check(values, 4, "values");
  check(cosines, 2, "cosines");
  check(sines, 2, "sines");
  check(query_norm, 1, "query_norm");
  check(key_norm, 1, "key_norm");
  const int64_t rows = qkv.size(0), groups = qkv.size(1), size = qkv.size(3), capacity = keys.size(2);
  STD_TORCH_CHECK(
      positions.dim() == 1 && positions.scalar_type() == ScalarType::Long && positions.is_contiguous(),
      "positions must be int64 [N]");
  check_sizes(
      positions.size(0) == rows && qkv.size(2) > 2 && keys.size(0) >= rows && keys.size(1) == groups &&
      keys.size(3) == size && values.numel() == keys.numel() && values.size(2) == capacity && size % 2 == 0 &&
      cosines.size(0) >= capacity && cosines.size(1) == size && sines.numel() == cosines.numel() &&
      query_norm.size(0) == size && key_norm.size(0) == size);
  const int64_t* const at = positions.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(at[row] >= 0 && at[row] < capacity, "a position is beyond the cache");
  }
  const int64_t queries = qkv.size(2) - 2;
  auto found = torch::stable::new_empty(qkv, {rows, groups * queries * size});
  const GspoDecodeAttention args = {
      qkv.const_data_ptr<float>(), groups, queries, size, capacity, query_norm.const_data_ptr<float>(),
      key_norm.const_data_ptr<float>(), (float)epsilon, cosines.const_data_ptr<float>(), sines.const_data_ptr<float>(),
      at, keys.mutable_data_ptr<float>(), values.mutable_data_ptr<float>(), found.mutable_data_ptr<float>()};
  const auto attend = cpu().attend;
  torch::stable::parallel_for(0, rows * groups, grain(2 * queries * size * capacity), [&](int64_t first, int64_t last) {
    attend(&args, first, last);
  });
  return found;
}

// The choices of experts `first` to `first` + E, by expert, then by token.
struct ByExpert {
  std::vector<int64_t> ends, choices;

  ByExpert(const Tensor& routes, int64_t start, int64_t experts) : ends(experts + 1, 0) {
    const int64_t* const route = routes.const_data_ptr<int64_t>();
    const int64_t count = routes.numel();
    const auto here = [&](int64_t choice) { return route[choice] >= start && route[choice] < start + experts; };
    for (int64_t choice = 0; choice < count; ++choice) ends[here(choice) ? route[choice] - start + 1 : 0] += here(choice);
    for (int64_t expert = 0; expert < experts; ++expert) ends[expert + 1] += ends[expert];
    choices.resize(ends[experts]);
    auto next = ends;
    for (int64_t choice = 0; choice < count; ++choice) {
      if (here(choice)) choices[next[route[choice] - start]++] = choice;
    }
  }
};

Tensor experts(
    const Tensor& values, const Tensor& shares, const Tensor& routes, const Tensor& first_layer,
    const Tensor& second_layer, int64_t start) {
  check(values, 2, "values");
  check(shares, 2, "shares");
  check(first_layer, 3, "first_layer");
  check(second_layer, 3, "second_layer");
  STD_TORCH_CHECK(
      routes.dim() == 2 && routes.scalar_type() == ScalarType::Long && routes.is_contiguous(), "routes must be int64 [R, K]");
  const int64_t count = first_layer.size(0), hidden = values.size(1), width = second_layer.size(2), topk = routes.size(1);
  check_sizes(
      shares.size(0) == values.size(0) && shares.size(1) == topk && routes.size(0) == values.size(0) &&
      first_layer.size(1) == 2 * width && first_layer.size(2) == hidden && second_layer.size(0) == count &&
      second_layer.size(1) == hidden);
  const ByExpert by(routes, start, count);
  const int64_t rows = by.choices.size();
  const GspoCpuKernels& kernels = cpu();
  std::vector<const float*> inputs(rows);
  for (int64_t row = 0; row < rows; ++row) inputs[row] = values.const_data_ptr<float>() + by.choices[row] / topk * hidden;
  const std::unique_ptr<float[]> found(new float[rows * hidden]);
  const auto run = [&](int64_t expert, float* both, float* inner, const float** inners) {
    const int64_t begin = by.ends[expert], here = by.ends[expert + 1] - begin;
    const GspoProduct first = {inputs.data() + begin, here, first_layer.const_data_ptr<float>() + expert * 2 * width * hidden,
                               hidden, both, 2 * width};
    kernels.product(&first, 0, 2 * width);
    for (int64_t row = 0; row < here; ++row) {
      inners[row] = inner + row * width;
      const float share = shares.const_data_ptr<float>()[by.choices[begin + row]];
      kernels.gate(both + row * 2 * width, share, inner + row * width, width);
    }
    const GspoProduct second = {inners, here, second_layer.const_data_ptr<float>() + expert * hidden * width, width,
                                found.get() + begin * hidden, hidden};
    kernels.product(&second, 0, hidden);
  };
  torch::stable::parallel_for(0, count, grain(rows * 3 * width * hidden / count), [&](int64_t first, int64_t last) {
    int64_t most = 0;
    for (int64_t expert = first; expert < last; ++expert) most = std::max(most, by.ends[expert + 1] - by.ends[expert]);
    const std::unique_ptr<float[]> both(new float[most * 2 * width]), inner(new float[most * width]);
    const std::unique_ptr<const float*[]> inners(new const float*[most]);
    for (int64_t expert = first; expert < last; ++expert) run(expert, both.get(), inner.get(), inners.get());
  });
  auto sums = torch::stable::new_zeros(values, {values.size(0), hidden});
  for (int64_t row = 0; row < rows; ++row) {  // a token's in the order of the experts
    float* const sum = sums.mutable_data_ptr<float>() + by.choices[row] / topk * hidden;
    for (int64_t at = 0; at < hidden; ++at) sum[at] += found.get()[row * hidden + at];
  }
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gspo_moe, CPU, library) {
  library.impl("decode_norm", TORCH_BOX(&norm));
  library.impl("decode_linear", TORCH_BOX(&linear));
  library.impl("decode_attention", TORCH_BOX(&attention));
  library.impl("decode_experts", TORCH_BOX(&experts));
}
