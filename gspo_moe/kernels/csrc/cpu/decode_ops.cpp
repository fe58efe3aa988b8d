// Ops of decode steps on the CPU, under torch's stable ABI; schemas stand in ../../decode.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 18;  // multiplications that a thread takes at least

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

int64_t panels_of(int64_t outputs) { return (outputs + GSPO_PANEL - 1) / GSPO_PANEL; }

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

// Of weights [..., O, K] the panels [..., P, K, 16].
Tensor pack(const Tensor& weight) {
  STD_TORCH_CHECK(
      weight.dim() >= 2 && weight.is_contiguous() && weight.scalar_type() == ScalarType::Float,
      "weight must be float32, contiguous and have at least 2 dimensions");
  const int64_t last = weight.dim() - 1, outputs = weight.size(last - 1), inputs = weight.size(last);
  const int64_t panels = panels_of(outputs);
  std::vector<int64_t> sizes;
  int64_t count = 1;
  for (int64_t dim = 0; dim < last - 1; ++dim) sizes.push_back(weight.size(dim)), count *= weight.size(dim);
  sizes.insert(sizes.end(), {panels, inputs, GSPO_PANEL});
  auto packed = torch::stable::new_empty(weight, sizes);
  torch::stable::parallel_for(0, count * panels, grain(inputs), [&](int64_t first, int64_t end) {
    for (int64_t panel = first; panel < end; ++panel) {
      const int64_t output = panel % panels * GSPO_PANEL, here = std::min<int64_t>(GSPO_PANEL, outputs - output);
      const float* const from = weight.const_data_ptr<float>() + (panel / panels * outputs + output) * inputs;
      float* const to = packed.mutable_data_ptr<float>() + panel * inputs * GSPO_PANEL;
      for (int64_t input = 0; input < inputs; ++input) {
        for (int64_t each = 0; each < GSPO_PANEL; ++each) {
          to[input * GSPO_PANEL + each] = each < here ? from[each * inputs + input] : 0.0f;
        }
      }
    }
  });
  return packed;
}

Tensor linear(const Tensor& values, const Tensor& panels, int64_t outputs) {
  check(values, 2, "values");
  check(panels, 3, "panels");
  check_sizes(values.size(1) == panels.size(1) && panels.size(2) == GSPO_PANEL && panels.size(0) == panels_of(outputs));
  auto found = torch::stable::new_empty(values, {values.size(0), outputs});
  const auto rows = rows_of(values);
  const GspoPanels args = {rows.data(), values.size(0), panels.const_data_ptr<float>(), panels.size(1), outputs,
                           found.mutable_data_ptr<float>(), outputs};
  const auto run = cpu().panels;
  torch::stable::parallel_for(0, panels.size(0), grain(values.numel() * GSPO_PANEL), [&](int64_t first, int64_t last) {
    run(&args, first, last);
  });
  return found;
}

std::tuple<Tensor, Tensor> draw(const Tensor& logits, const Tensor& uniforms, double temperature) {
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  STD_TORCH_CHECK(
      logits.dim() == 2 && logits.scalar_type() == ScalarType::Float && vocab > 0 && logits.stride(1) == 1,
      "logits must be float32 [N, V] with adjacent columns");
  STD_TORCH_CHECK(
      uniforms.dim() == 1 && uniforms.scalar_type() == ScalarType::Double && uniforms.is_contiguous() &&
          uniforms.size(0) == rows,
      "uniforms must be float64 [N]");
  auto tokens = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  auto log_probs = torch::stable::new_empty(logits, {rows});
  const bool greedy = temperature == 0.0;
  const GspoDraw args = {logits.const_data_ptr<float>(), logits.stride(0), vocab, greedy ? 1.0f : (float)(1.0 / temperature),
                         greedy ? nullptr : uniforms.const_data_ptr<double>(), tokens.mutable_data_ptr<int64_t>(),
                         log_probs.mutable_data_ptr<float>()};
  const auto run = cpu().draw;
  torch::stable::parallel_for(0, rows, grain(8 * vocab), [&](int64_t first, int64_t last) { run(&args, first, last); });
  return {tokens, log_probs};
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

// Panels of both layers [E, P, K, 16].
Tensor experts(
    const Tensor& values, const Tensor& shares, const Tensor& routes, const Tensor& first_layer,
    const Tensor& second_layer, int64_t start) {
  check(values, 2, "values");
  check(shares, 2, "shares");
  check(first_layer, 4, "first_layer");
  check(second_layer, 4, "second_layer");
  STD_TORCH_CHECK(
      routes.dim() == 2 && routes.scalar_type() == ScalarType::Long && routes.is_contiguous(), "routes must be int64 [R, K]");
  const int64_t count = first_layer.size(0), hidden = values.size(1), width = second_layer.size(2), topk = routes.size(1);
  check_sizes(
      shares.size(0) == values.size(0) && shares.size(1) == topk && routes.size(0) == values.size(0) &&
      first_layer.size(1) == panels_of(2 * width) && first_layer.size(2) == hidden && first_layer.size(3) == GSPO_PANEL &&
      second_layer.size(0) == count && second_layer.size(1) == panels_of(hidden) && second_layer.size(3) == GSPO_PANEL);
  const ByExpert by(routes, start, count);
  const int64_t rows = by.choices.size();
  const GspoCpuKernels& kernels = cpu();
  std::vector<const float*> inputs(rows);
  for (int64_t row = 0; row < rows; ++row) inputs[row] = values.const_data_ptr<float>() + by.choices[row] / topk * hidden;
  const std::unique_ptr<float[]> found(new float[rows * hidden]);
  const auto run = [&](int64_t expert, float* both, float* inner, const float** inners) {
    const int64_t begin = by.ends[expert], here = by.ends[expert + 1] - begin;
    const GspoPanels first = {inputs.data() + begin, here,
                              first_layer.const_data_ptr<float>() + expert * first_layer.size(1) * hidden * GSPO_PANEL,
                              hidden, 2 * width, both, 2 * width};
    kernels.panels(&first, 0, first_layer.size(1));
    for (int64_t row = 0; row < here; ++row) {
      inners[row] = inner + row * width;
      const float share = shares.const_data_ptr<float>()[by.choices[begin + row]];
      kernels.gate(both + row * 2 * width, share, inner + row * width, width);
    }
    const GspoPanels second = {inners, here,
                               second_layer.const_data_ptr<float>() + expert * second_layer.size(1) * width * GSPO_PANEL,
                               width, hidden, found.get() + begin * hidden, hidden};
    kernels.panels(&second, 0, second_layer.size(1));
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
  library.impl("decode_pack", TORCH_BOX(&pack));
  library.impl("decode_linear", TORCH_BOX(&linear));
  library.impl("decode_draw", TORCH_BOX(&draw));
  library.impl("decode_attention", TORCH_BOX(&attention));
  library.impl("decode_experts", TORCH_BOX(&experts));
}
