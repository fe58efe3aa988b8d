#include "sequence_reduce.cuh"

#include "launch.cuh"

int gspo_sequence_reduce(const GspoSequenceReduce* args, void* stream) {
  if (gspo_check_sequence_reduce(args) != nullptr) return cudaErrorInvalidValue;
  if (args->num_sequences == 0) return cudaSuccess;
  int64_t num_sms = 0;
  if (const cudaError_t error = gspo::count_sms(&num_sms)) return error;
  constexpr int64_t threads = 512;
  return gspo::launch(gspo::sequence_reduce_kernel, args->num_sequences, 1, threads, num_sms, *args, stream);
}
