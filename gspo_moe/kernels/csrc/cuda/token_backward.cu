#include "token_backward.cuh"

#include "launch.cuh"

int gspo_token_backward(const GspoTokenBackward* args, void* stream) {
  if (gspo_check_token_backward(args) != nullptr) return cudaErrorInvalidValue;
  if (args->num_tokens == 0 || args->columns == 0) return cudaSuccess;
  int64_t num_sms = 0;
  if (const cudaError_t error = gspo::count_sms(&num_sms)) return error;
  return gspo::with_element(args->element_type, [&](auto element) {
    using Element = decltype(element);
    const int64_t vectors = args->columns / Element::COUNT;
    const int64_t threads = gspo::row_threads(args->num_tokens, vectors, num_sms);
    auto* kernel = args->grad_entropy_T != nullptr ? gspo::token_backward_kernel<Element, true>
                                                   : gspo::token_backward_kernel<Element, false>;
    return gspo::launch(kernel, args->num_tokens, vectors / (4 * threads), threads, num_sms, *args, stream);
  });
}
