// The ops' implementations under torch's stable ABI: checks, outputs, and the call of a CPU or CUDA kernel.
// Schemas stand in ../ops.py. One binary serves every torch >= 2.11, CPU or CUDA build; GSPO_MOE_WITH_CUDA says that the
// CUDA objects are linked.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <Python.h>

#include <dlfcn.h>

#include <cstdlib>
#include <optional>
#include <tuple>

#include "cpu/kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t element_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return GSPO_FLOAT32;
    case ScalarType::BFloat16: return GSPO_BFLOAT16;
    case ScalarType::Half: return GSPO_FLOAT16;
    default: STD_TORCH_CHECK(false, "the kernels take float32, bfloat16 and float16");
  }
}

void check_vector(const Tensor& tensor, ScalarType type, int64_t length, const char* name) {
  STD_TORCH_CHECK(
      tensor.dim() == 1 && tensor.size(0) == length && tensor.scalar_type() == type && tensor.is_contiguous(),
      name, " must be contiguous, have ", length, " elements and the dtype of its op's documentation");
}

void check_logits(const Tensor& logits, const Tensor& targets, int64_t vocab) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [T, V]");
  STD_TORCH_CHECK(logits.size(1) <= 1 || logits.stride(1) == 1, "a row's logits must be adjacent");
  STD_TORCH_CHECK(logits.size(0) <= 1 || logits.stride(0) >= logits.size(1), "rows of logits must not overlap");
  STD_TORCH_CHECK(vocab >= 0 && vocab <= logits.size(1), "vocab must be from 0 to V");
  check_vector(targets, ScalarType::Long, logits.size(0), "targets");
}

// Tokens a thread takes at least, so that small inputs stay on one thread.
int64_t grain(int64_t columns) {
  const int64_t wanted = 32768 / (columns > 0 ? columns : 1);
  return wanted > 1 ? wanted : 1;
}

const GspoCpuKernels& cpu() {
  const GspoCpuKernels* const kernels = gspo_cpu_kernels(std::getenv("GSPO_MOE_CPU"));
  STD_TORCH_CHECK(
      kernels != nullptr,
      "GSPO_MOE_CPU must be auto, generic, or one of avx2, avx512 and avx512_bf16 that this processor has");
  return *kernels;
}

#if defined(GSPO_MOE_WITH_CUDA)
// The stable ABI tells a stream's handle from torch 2.13 on only; what compiled models ask is in every libtorch_cuda.
// Looked up in the one that is loaded, since this binary is linked without it: a CPU build of torch loads it too.
void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get != nullptr, "this torch names no current CUDA stream; install a CUDA build of torch from 2.11 on");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

template <typename Args>
void launch(const Tensor& tensor, const Args& args, const char* (*check)(const Args*), int (*run)(const Args*, void*)) {
  const char* const fault = check(&args);
  STD_TORCH_CHECK(fault == nullptr, fault);
  const auto index = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const int error = run(&args, current_stream(index));
  STD_TORCH_CHECK(error == 0, "CUDA kernel failed to start: ", gspo_cuda_error_string(error));
}
#endif

void run(const Tensor& logits, const GspoTokenStats& args) {
#if defined(GSPO_MOE_WITH_CUDA)
  if (logits.is_cuda()) return launch(logits, args, gspo_check_token_stats, gspo_token_stats);
#endif
  const auto token_stats = cpu().token_stats;
  torch::stable::parallel_for(0, args.num_tokens, grain(args.vocab), [&](int64_t first, int64_t last) {
    token_stats(&args, first, last);
  });
}

void run(const Tensor& logits, const GspoTokenBackward& args) {
#if defined(GSPO_MOE_WITH_CUDA)
  if (logits.is_cuda()) return launch(logits, args, gspo_check_token_backward, gspo_token_backward);
#endif
  const auto token_backward = cpu().token_backward;
  torch::stable::parallel_for(0, args.num_tokens, grain(args.columns), [&](int64_t first, int64_t last) {
    token_backward(&args, first, last);
  });
}

void run(const Tensor& log_probs, const GspoSequenceReduce& args) {
#if defined(GSPO_MOE_WITH_CUDA)
  if (log_probs.is_cuda()) return launch(log_probs, args, gspo_check_sequence_reduce, gspo_sequence_reduce);
#endif
  gspo_cpu_sequence_reduce(&args, 0, args.num_sequences);
}

Tensor token_stats(
    const Tensor& logits, const Tensor& targets, double inverse_temperature, int64_t vocab_start, int64_t vocab,
    bool entropy) {
  check_logits(logits, targets, vocab);
  auto stats = torch::stable::new_empty(logits, {logits.size(0), entropy ? 4 : 3}, ScalarType::Float);
  GspoTokenStats args = {};
  args.logits_TV = logits.data_ptr();
  args.element_type = element_type(logits);
  args.num_tokens = logits.size(0);
  args.vocab = vocab;
  args.row_stride = logits.stride(0);
  args.targets_T = targets.const_data_ptr<int64_t>();
  args.vocab_start = vocab_start;
  args.inverse_temperature = static_cast<float>(inverse_temperature);
  args.entropy = entropy;
  args.stats_TS = stats.mutable_data_ptr<float>();
  run(logits, args);
  return stats;
}

void token_backward_(
    Tensor logits, const Tensor& targets, const Tensor& log_z, const Tensor& grad_log_probs,
    std::optional<Tensor> grad_entropy, std::optional<Tensor> entropy, double inverse_temperature,
    int64_t vocab_start, int64_t vocab) {
  check_logits(logits, targets, vocab);
  const int64_t num_tokens = logits.size(0);
  check_vector(log_z, ScalarType::Float, num_tokens, "log_z");
  check_vector(grad_log_probs, ScalarType::Float, num_tokens, "grad_log_probs");
  STD_TORCH_CHECK(grad_entropy.has_value() == entropy.has_value(), "entropy and its gradient come together");
  GspoTokenBackward args = {};
  if (entropy) {
    check_vector(*entropy, ScalarType::Float, num_tokens, "entropy");
    check_vector(*grad_entropy, ScalarType::Float, num_tokens, "grad_entropy");
    args.entropy_T = entropy->const_data_ptr<float>();
    args.grad_entropy_T = grad_entropy->const_data_ptr<float>();
  }
  args.logits_TV = logits.mutable_data_ptr();
  args.element_type = element_type(logits);
  args.num_tokens = num_tokens;
  args.vocab = vocab;
  args.columns = logits.size(1);
  args.row_stride = logits.stride(0);
  args.targets_T = targets.const_data_ptr<int64_t>();
  args.vocab_start = vocab_start;
  args.inverse_temperature = static_cast<float>(inverse_temperature);
  args.log_z_T = log_z.const_data_ptr<float>();
  args.grad_log_probs_T = grad_log_probs.const_data_ptr<float>();
  run(logits, args);
}

void accumulate_(Tensor total, const Tensor& part) {
  STD_TORCH_CHECK(
      total.is_contiguous() && part.is_contiguous() && total.numel() == part.numel() &&
          total.scalar_type() == ScalarType::Float,
      "total must be float32, and both be contiguous and of one size");
  const auto add = cpu().accumulate;
  const int64_t type = element_type(part);
  float* const sums = total.mutable_data_ptr<float>();
  const void* const parts = part.data_ptr();
  torch::stable::parallel_for(0, total.numel(), 32768, [&](int64_t first, int64_t last) {
    add(sums, parts, type, first, last);
  });
}

// x: [tokens, heads, width], the elements of a row adjacent.
GspoRows rows_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3 && (x.size(2) <= 1 || x.stride(2) == 1), "rows must be [T, H, D] with adjacent elements");
  return {x.data_ptr(), element_type(x), x.size(0), x.size(1), x.size(2), x.stride(0), x.stride(1)};
}

void check_like(const Tensor& tensor, const Tensor& x, int64_t size, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_contiguous() && tensor.numel() == size && tensor.scalar_type() == x.scalar_type(), name,
      " must be contiguous, of x's dtype and fit its shape");
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  GspoRmsNorm args = {};
  args.x = rows_of(x);
  check_like(weight, x, args.x.width, "weight");
  const int64_t rows = args.x.tokens * args.x.heads;
  auto out = torch::stable::new_empty(x, {args.x.tokens, args.x.heads, args.x.width});
  auto scale = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  args.weight = weight.data_ptr();
  args.eps = static_cast<float>(eps);
  args.out = out.mutable_data_ptr();
  args.scale = scale.mutable_data_ptr<float>();
  const auto run_rows = cpu().rms_norm;
  torch::stable::parallel_for(0, rows, grain(args.x.width), [&](int64_t first, int64_t last) {
    run_rows(&args, first, last);
  });
  return {out, scale};
}

// Rows whose share of the weight's gradient is summed in one go, whatever the number of threads.
constexpr int64_t kNormBlock = 512;

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& scale) {
  GspoRmsNormBackward args = {};
  args.x = rows_of(x);
  args.grad = rows_of(grad);
  const int64_t rows = args.x.tokens * args.x.heads, blocks = (rows + kNormBlock - 1) / kNormBlock;
  STD_TORCH_CHECK(
      args.grad.tokens == args.x.tokens && args.grad.heads == args.x.heads && args.grad.width == args.x.width &&
          args.grad.element_type == args.x.element_type,
      "grad must be of x's shape and dtype");
  check_like(weight, x, args.x.width, "weight");
  check_vector(scale, ScalarType::Float, rows, "scale");
  auto grad_x = torch::stable::new_empty(x, {args.x.tokens, args.x.heads, args.x.width});
  auto grad_weight = torch::stable::new_empty(x, {blocks, args.x.width}, ScalarType::Float);
  args.weight = weight.data_ptr();
  args.scale = scale.const_data_ptr<float>();
  args.grad_x = grad_x.mutable_data_ptr();
  float* const sums = grad_weight.mutable_data_ptr<float>();
  const auto run_rows = cpu().rms_norm_backward;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t start = block * kNormBlock, end = start + kNormBlock;
      run_rows(&args, sums + block * args.x.width, start, end < rows ? end : rows);
    }
  });
  return {grad_x, grad_weight};
}

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool backward) {
  GspoRotary args = {};
  args.x = rows_of(x);
  STD_TORCH_CHECK(args.x.width % 2 == 0, "rows must have an even number of elements");
  check_like(cos, x, args.x.tokens * args.x.width, "cos");
  check_like(sin, x, args.x.tokens * args.x.width, "sin");
  auto out = torch::stable::new_empty(x, {args.x.tokens, args.x.heads, args.x.width});
  args.cos_TD = cos.data_ptr();
  args.sin_TD = sin.data_ptr();
  args.backward = backward;
  args.out = out.mutable_data_ptr();
  const auto run_rows = cpu().rotary;
  torch::stable::parallel_for(0, args.x.tokens * args.x.heads, grain(args.x.width), [&](int64_t first, int64_t last) {
    run_rows(&args, first, last);
  });
  return out;
}

GspoSequenceReduce sequences(const Tensor& log_probs, const Tensor& old_log_probs, const Tensor& mask, const Tensor& cu_seqlens) {
  const int64_t num_tokens = log_probs.size(0);
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "cu_seqlens must be [N + 1]");
  check_vector(log_probs, ScalarType::Float, num_tokens, "log_probs");
  check_vector(old_log_probs, ScalarType::Float, num_tokens, "old_log_probs");
  check_vector(mask, ScalarType::Bool, num_tokens, "mask");
  check_vector(cu_seqlens, ScalarType::Long, cu_seqlens.size(0), "cu_seqlens");
  GspoSequenceReduce args = {};
  args.num_sequences = cu_seqlens.size(0) - 1;
  args.cu_seqlens = cu_seqlens.const_data_ptr<int64_t>();
  args.mask_T = static_cast<const uint8_t*>(mask.data_ptr());
  args.log_probs_T = log_probs.const_data_ptr<float>();
  args.old_log_probs_T = old_log_probs.const_data_ptr<float>();
  return args;
}

Tensor sequence_sums(const Tensor& log_probs, const Tensor& old_log_probs, const Tensor& mask, const Tensor& cu_seqlens) {
  auto args = sequences(log_probs, old_log_probs, mask, cu_seqlens);
  auto sums = torch::stable::new_empty(log_probs, {args.num_sequences, 2}, ScalarType::Double);
  args.phases = GSPO_PARTIAL;
  args.sums_N2 = sums.mutable_data_ptr<double>();
  run(log_probs, args);
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sequence_reduce(
    const Tensor& log_probs, const Tensor& old_log_probs, const Tensor& mask, const Tensor& cu_seqlens,
    const Tensor& advantages, bool advantages_per_token, std::optional<Tensor> sums, double clip_low, double clip_high,
    double scale) {
  auto args = sequences(log_probs, old_log_probs, mask, cu_seqlens);
  const int64_t count = args.num_sequences;
  check_vector(advantages, ScalarType::Double, advantages_per_token ? log_probs.size(0) : count, "advantages");
  auto all_sums = sums ? *sums : torch::stable::new_empty(log_probs, {count, 2}, ScalarType::Double);
  STD_TORCH_CHECK(
      all_sums.dim() == 2 && all_sums.size(0) == count && all_sums.size(1) == 2 && all_sums.is_contiguous() &&
          all_sums.scalar_type() == ScalarType::Double,
      "sums must be float64 [N, 2]");
  auto ratio = torch::stable::new_empty(log_probs, {count}, ScalarType::Double);
  auto loss = torch::stable::new_empty(log_probs, {count}, ScalarType::Double);
  auto clipped_tokens = torch::stable::new_empty(log_probs, {count}, ScalarType::Double);
  auto grad = torch::stable::new_zeros(log_probs, {log_probs.size(0)});
  args.phases = sums ? GSPO_FINISH : GSPO_WHOLE;
  args.sums_N2 = all_sums.mutable_data_ptr<double>();
  args.advantages_per_token = advantages_per_token;
  args.advantages = advantages.const_data_ptr<double>();
  args.clip_low = clip_low;
  args.clip_high = clip_high;
  args.scale = scale;
  args.ratio_N = ratio.mutable_data_ptr<double>();
  args.loss_N = loss.mutable_data_ptr<double>();
  args.clipped_tokens_N = clipped_tokens.mutable_data_ptr<double>();
  args.grad_log_probs_T = grad.mutable_data_ptr<float>();
  run(log_probs, args);
  return {loss, ratio, clipped_tokens, grad};
}

}  // namespace

#define GSPO_IMPLEMENT(library)                              \
  library.impl("token_stats", TORCH_BOX(&token_stats));         \
  library.impl("token_backward_", TORCH_BOX(&token_backward_)); \
  library.impl("sequence_sums", TORCH_BOX(&sequence_sums));     \
  library.impl("sequence_reduce", TORCH_BOX(&sequence_reduce));

STABLE_TORCH_LIBRARY_IMPL(gspo_moe, CPU, library) {
  GSPO_IMPLEMENT(library)
  library.impl("accumulate_", TORCH_BOX(&accumulate_));
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  library.impl("rotary", TORCH_BOX(&rotary));
}

#if defined(GSPO_MOE_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(gspo_moe, CUDA, library) { GSPO_IMPLEMENT(library) }
#endif

// An importable module, so that setuptools places it and Python finds it; importing it registers the ops.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Kernels of gspo_moe.", -1, nullptr};
  PyObject* const made = PyModule_Create(&module);
  if (made == nullptr) return nullptr;
#if defined(GSPO_MOE_WITH_CUDA)
  PyModule_AddIntConstant(made, "with_cuda", 1);
#else
  PyModule_AddIntConstant(made, "with_cuda", 0);
#endif
  const GspoCpuKernels* const kernels = gspo_cpu_kernels(std::getenv("GSPO_MOE_CPU"));
#define GSPO_TEXT_OF(name) #name
#define GSPO_TEXT(name) GSPO_TEXT_OF(name)
  // build.library_fingerprint of these sources, which the loader compares with those that lie beside the library.
  PyModule_AddStringConstant(made, "sources", GSPO_TEXT(GSPO_MOE_SOURCES));
  PyModule_AddStringConstant(made, "cpu", kernels ? kernels->name : "");
  return made;
}
