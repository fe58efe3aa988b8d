// Runs a grid on fibers. Compiled without sanitizers: it tells them itself which stack runs and what orders accesses.
//
// A block's warps run one after the other, each until all of its lanes wait or end, so that a warp gets as far ahead of
// the others as barriers let it. The order of warps, and of lanes in them, is chosen for the whole run: a kernel that
// needs a barrier and lacks it computes something else in some order.
#include "fibers.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

#define WEAK __attribute__((weak))
extern "C" {
WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
WEAK void* __tsan_get_current_fiber(void);
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void __tsan_acquire(void* address);
WEAK void __tsan_release(void* address);

// Saves what a callee must keep, stores the stack pointer at *from and goes on with the stack `to`.
void switch_stack(void** from, void* to);
}
asm(R"(
.text
.globl switch_stack
.type switch_stack, @function
switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size switch_stack, .-switch_stack
)");

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t STACK_BYTES = 128 * 1024;
constexpr int WARP = 32;
// Sanitizers see no order between two threads of a block but the one that barriers make.
constexpr unsigned TSAN_NO_SYNC = 1;

enum class State { READY, AT_BARRIER, AT_SHUFFLE, DONE };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  void* tsan = nullptr;
  int thread = 0;
  State state = State::DONE;
  const char* site = nullptr;
  unsigned barriers = 0;
  unsigned mask = 0;
  uint64_t bits = 0;
  int offset = 0;
};

std::vector<Fiber*> fibers;
std::vector<int> order;
Fiber scheduler;
Fiber* current = nullptr;
const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;
const std::function<void()>* work = nullptr;
int active = 0, waiting_at_barrier = 0, done = 0;
Options options;
// What orders accesses for TSan. They take turns: a thread that is late at one barrier, or at a block's start, must not
// find itself behind what another does at the next.
char barrier_order[2], block_order[2];
unsigned blocks_run = 0;

void resume(Fiber* to, Fiber* from) {
  const bool to_scheduler = to == &scheduler;
  if (__sanitizer_start_switch_fiber) {
    if (to_scheduler) {
      __sanitizer_start_switch_fiber(&from->fake_stack, scheduler_bottom, scheduler_size);
    } else {
      __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, STACK_BYTES);
    }
  }
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to->tsan, TSAN_NO_SYNC);
  switch_stack(&from->stack_pointer, to->stack_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
}

void wait(State state) {
  current->state = state;
  resume(&scheduler, current);
}

void fiber_main() {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
  }
  for (;;) {
    if (__tsan_acquire) __tsan_acquire(&block_order[blocks_run % 2]);
    (*work)();
    if (__tsan_release) __tsan_release(&block_order[(blocks_run + 1) % 2]);
    ++done;
    wait(State::DONE);
  }
}

Fiber* make_fiber(int thread) {
  auto* fiber = new Fiber;
  fiber->thread = thread;
  fiber->stack = static_cast<char*>(
      mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (fiber->stack == MAP_FAILED) fail("no memory for a stack");
  auto** top = reinterpret_cast<void**>(fiber->stack + STACK_BYTES);
  // As after a call: the address to return to stands 8 bytes off a 16-byte boundary.
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(fiber_main);
  top -= 6;
  fiber->stack_pointer = top;
  if (__tsan_create_fiber) fiber->tsan = __tsan_create_fiber(0);
  return fiber;
}

void make_fibers(int threads) {
  if (__tsan_get_current_fiber && scheduler.tsan == nullptr) scheduler.tsan = __tsan_get_current_fiber();
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(make_fiber(static_cast<int>(fibers.size())));
  std::vector<int> warps(threads / WARP);
  std::iota(warps.begin(), warps.end(), 0);
  std::mt19937 random(static_cast<unsigned>(options.order));
  if (options.order == -1) std::reverse(warps.begin(), warps.end());
  if (options.order > 0) std::shuffle(warps.begin(), warps.end(), random);
  order.clear();
  for (const int warp : warps) {
    std::vector<int> lanes(WARP);
    std::iota(lanes.begin(), lanes.end(), warp * WARP);
    if (options.order == -1) std::reverse(lanes.begin(), lanes.end());
    if (options.order > 0) std::shuffle(lanes.begin(), lanes.end(), random);
    order.insert(order.end(), lanes.begin(), lanes.end());
  }
}

void open_barrier() {
  const char* site = fibers[0]->site;
  for (int i = 0; i < active; ++i) {
    if (fibers[i]->site != site) fail("threads of a block wait at different barriers");
    fibers[i]->state = State::READY;
  }
  waiting_at_barrier = 0;
}

// Lets the lanes of a shuffle go on once all of them have come.
void try_shuffle(int thread) {
  const int first_lane = thread / WARP * WARP;
  const unsigned mask = fibers[thread]->mask;
  for (int lane = 0; lane < WARP; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    if (first_lane + lane >= active) fail("a shuffle names a lane that the block has not");
    const Fiber& other = *fibers[first_lane + lane];
    if (other.state != State::AT_SHUFFLE) return;
    if (other.mask != mask) fail("lanes of a shuffle name different masks");
  }
  uint64_t bits[WARP];
  for (int lane = 0; lane < WARP; ++lane) {
    if (mask >> lane & 1) bits[lane] = fibers[first_lane + lane]->bits;
  }
  for (int lane = 0; lane < WARP; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    Fiber& fiber = *fibers[first_lane + lane];
    const int source = lane ^ fiber.offset;
    if ((mask >> source & 1) == 0) fail("a shuffle reads a lane outside its mask");
    fiber.bits = bits[source];
    fiber.state = State::READY;
  }
}

// Runs those lanes of the warp at order[first] that can go on; false where there are none.
bool run_ready(int first) {
  bool moved = false;
  for (int i = first; i < first + WARP; ++i) {
    if (fibers[order[i]]->state != State::READY) continue;
    moved = true;
    current = fibers[order[i]];
    threadIdx = {static_cast<unsigned>(order[i]), 0, 0};
    resume(current, &scheduler);
  }
  return moved;
}

void run_block(int threads) {
  active = threads;
  done = waiting_at_barrier = 0;
  for (int i = 0; i < threads; ++i) {
    fibers[i]->state = State::READY;
    fibers[i]->barriers = 0;
  }
  while (done < threads) {
    bool moved = false;
    for (int first = 0; first < threads; first += WARP) {
      while (run_ready(first)) moved = true;
    }
    if (waiting_at_barrier == threads) {
      open_barrier();
      moved = true;
    }
    if (!moved) fail("threads wait at a barrier or shuffle that others never reach");
  }
  ++blocks_run;
}

}  // namespace

void set_options(const Options& chosen) { options = chosen; }
int num_sms() { return options.num_sms; }

void fail(const char* what) {
  fprintf(stderr, "emulation: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  fflush(nullptr);
  _exit(EMULATION_FAILURE);
}

void barrier(const char* site) {
  char* order = &barrier_order[current->barriers++ % 2];
  current->site = site;
  ++waiting_at_barrier;
  if (__tsan_release) __tsan_release(order);
  wait(State::AT_BARRIER);
  if (__tsan_acquire) __tsan_acquire(order);
}

uint64_t shuffle_xor(unsigned mask, uint64_t bits, int offset) {
  if ((mask >> current->thread % WARP & 1) == 0) fail("a lane calls a shuffle whose mask leaves it out");
  current->mask = mask;
  current->bits = bits;
  current->offset = offset;
  current->state = State::AT_SHUFFLE;
  try_shuffle(current->thread);
  // The last lane to come needs no switch.
  if (current->state == State::AT_SHUFFLE) resume(&scheduler, current);
  return current->bits;
}

void run_grid(dim3 grid, dim3 block, const std::function<void()>& thread) {
  if (block.x < 1 || block.x > 1024 || block.x % WARP != 0 || block.y != 1 || block.z != 1 || grid.z != 1) fail("a launch out of range");
  gridDim = grid;
  blockDim = block;
  work = &thread;
  make_fibers(static_cast<int>(block.x));
  if (__tsan_release) __tsan_release(&block_order[blocks_run % 2]);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = {options.order == -1 ? grid.x - 1 - x : x, y, 0};
      run_block(static_cast<int>(block.x));
    }
  }
  if (__tsan_acquire) __tsan_acquire(&block_order[blocks_run % 2]);
}

}  // namespace emulation
