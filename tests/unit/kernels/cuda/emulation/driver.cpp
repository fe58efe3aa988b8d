// Runs the launchers of api.h on cases from a file: driver CASES RESULTS ORDER. emulation.py writes and reads the files.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "api.h"
#include "fibers.h"

extern "C" __attribute__((weak)) void __asan_poison_memory_region(void const volatile*, size_t);
extern "C" __attribute__((weak)) void __asan_unpoison_memory_region(void const volatile*, size_t);

namespace emulation {
[[noreturn]] void fail(const char* what);

namespace {

constexpr size_t GUARD = 64;
constexpr unsigned char PATTERN = 0xa5;

// Bytes of a case at an address `offset` bytes past a multiple of 16, between guards.
struct Buffer {
  int64_t field, offset, bytes, counted;
  std::vector<unsigned char> memory;

  unsigned char* data() {
    const auto start = reinterpret_cast<uintptr_t>(memory.data()) + GUARD;
    return memory.data() + GUARD + (16 - start % 16) % 16 + offset;
  }
  unsigned char* end() { return memory.data() + memory.size(); }
  void guard(bool closed) {
    auto* change = closed ? __asan_poison_memory_region : __asan_unpoison_memory_region;
    if (change == nullptr) return;
    change(memory.data(), data() - memory.data());
    change(data() + bytes, end() - data() - bytes);
  }
  void check() {
    for (auto* byte = memory.data(); byte < end(); ++byte) {
      if ((byte < data() || byte >= data() + bytes) && *byte != PATTERN) fail("a kernel wrote outside its buffer");
    }
  }
};

FILE* input;
FILE* output;
const unsigned char* counted_start = nullptr;
int64_t counted_bytes = 0, bytes_read = 0, bytes_written = 0;

bool is_counted(const void* address) {
  const auto* byte = static_cast<const unsigned char*>(address);
  return byte >= counted_start && byte < counted_start + counted_bytes;
}

void read_bytes(void* to, size_t bytes) {
  if (bytes > 0 && fread(to, bytes, 1, input) != 1) fail("the case file ends early");
}

int64_t read_number() {
  int64_t number = 0;
  read_bytes(&number, sizeof number);
  return number;
}

void write_bytes(const void* from, size_t bytes) {
  if (bytes > 0 && fwrite(from, bytes, 1, output) != 1) fail("no space for results");
}

void read_buffer(Buffer& buffer) {
  buffer.field = read_number();
  buffer.offset = read_number();
  buffer.bytes = read_number();
  buffer.counted = read_number();
  buffer.memory.assign(GUARD + 16 + buffer.offset + buffer.bytes + GUARD, PATTERN);
  read_bytes(buffer.data(), buffer.bytes);
}

int launch(int64_t kernel, void* args) {
  switch (kernel) {
    case 0:
      return gspo_token_stats(static_cast<GspoTokenStats*>(args), nullptr);
    case 1:
      return gspo_token_backward(static_cast<GspoTokenBackward*>(args), nullptr);
    case 2:
      return gspo_sequence_reduce(static_cast<GspoSequenceReduce*>(args), nullptr);
    default:
      fail("no such kernel");
  }
}

void run_case(int order) {
  const int64_t kernel = read_number();
  Options options;
  options.order = order;
  options.num_sms = static_cast<int>(read_number());
  set_options(options);
  std::vector<int64_t> args(read_number() / sizeof(int64_t));
  read_bytes(args.data(), args.size() * sizeof(int64_t));
  std::vector<Buffer> buffers(read_number());
  bytes_read = bytes_written = counted_bytes = 0;
  for (Buffer& buffer : buffers) {
    read_buffer(buffer);
    args[buffer.field / sizeof(int64_t)] = reinterpret_cast<int64_t>(buffer.data());
    if (buffer.counted) {
      counted_start = buffer.data();
      counted_bytes = buffer.bytes;
    }
    buffer.guard(true);
  }
  const int64_t result[] = {launch(kernel, args.data()), bytes_read, bytes_written};
  write_bytes(result, sizeof result);
  for (Buffer& buffer : buffers) {
    buffer.guard(false);
    buffer.check();
    write_bytes(buffer.data(), buffer.bytes);
  }
}

}  // namespace

void count_read(const void* address, size_t bytes) {
  if (is_counted(address)) bytes_read += bytes;
}
void count_write(const void* address, size_t bytes) {
  if (is_counted(address)) bytes_written += bytes;
}

}  // namespace emulation

int main(int argc, char** argv) {
  if (argc != 4) emulation::fail("usage: driver CASES RESULTS ORDER");
  emulation::input = fopen(argv[1], "rb");
  emulation::output = fopen(argv[2], "wb");
  if (emulation::input == nullptr || emulation::output == nullptr) emulation::fail("cannot open the files");
  for (int64_t left = emulation::read_number(); left > 0; --left) emulation::run_case(atoi(argv[3]));
  return fclose(emulation::output);
}
