#include "emulation.h"

#include <csetjmp>
#include <cstdarg>
#include <memory>

#include <sys/mman.h>
#include <ucontext.h>

__thread Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr unsigned WARP = 32;
constexpr unsigned MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 128 << 10;
// What a block may have without asking for more.
constexpr size_t SHARED_BYTES = 48 << 10;
constexpr unsigned char POISON = 0xff;

enum class State { Ready, AtWarp, AtBlock, Done };

struct Fiber {
  jmp_buf context;
  bool created;
  State state;
  int line;
  // Slots alternate, as a lane may reach its next exchange before the others have read this one.
  unsigned parity;
};

struct Machine {
  jmp_buf scheduler;
  Fiber fibers[MAX_THREADS];
  emulated::Slot slots[MAX_THREADS / WARP][2][WARP];
  unsigned char* stacks;
  unsigned current;
  unsigned num_threads;
  const char* (*entry)(const emulated::Args&, bool);
  emulated::Args args;
  size_t shared_size;
  alignas(16) unsigned char shared[SHARED_BYTES];
  char error[512];

  Machine() : fibers{}, error{} {
    void* memory = mmap(nullptr, MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    stacks = memory == MAP_FAILED ? nullptr : static_cast<unsigned char*>(memory);
  }
  ~Machine() {
    if (stacks) munmap(stacks, MAX_THREADS * STACK_BYTES);
  }
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;
};

thread_local std::unique_ptr<Machine> owner;
__thread Machine* machine;

void yield(State state, int line) {
  Fiber& fiber = machine->fibers[machine->current];
  fiber.state = state;
  fiber.line = line;
  // Unlike swapcontext these two make no system call.
  if (_setjmp(fiber.context) == 0) _longjmp(machine->scheduler, 1);
}

void fiber_main() {
  for (;;) {
    machine->entry(machine->args, true);
    yield(State::Done, 0);
  }
}

// Runs a thread to its next barrier.
void resume(unsigned index) {
  Fiber& fiber = machine->fibers[index];
  machine->current = index;
  threadIdx = {index, 0, 0};
  if (_setjmp(machine->scheduler) != 0) return;
  if (fiber.created) _longjmp(fiber.context, 1);
  fiber.created = true;
  static __thread ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = machine->stacks + index * STACK_BYTES;
  context.uc_stack.ss_size = STACK_BYTES;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

[[gnu::format(printf, 1, 2)]] bool error(const char* format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(machine->error, sizeof(machine->error), format, list);
  va_end(list);
  return false;
}

// Whether threads first..first+count all wait as the first one does.
bool together(unsigned first, unsigned count) {
  const Fiber* fibers = machine->fibers + first;
  for (unsigned i = 1; i < count; ++i) {
    if (fibers[i].state == fibers[0].state && fibers[i].line == fibers[0].line) continue;
    const char* names[] = {"ready", "in a warp operation", "at a barrier", "done"};
    return error("thread %u is %s (line %d) while thread %u is %s (line %d)", first,
                 names[int(fibers[0].state)], fibers[0].line, first + i, names[int(fibers[i].state)], fibers[i].line);
  }
  return true;
}

void release(unsigned first, unsigned count) {
  for (unsigned i = first; i < first + count; ++i) machine->fibers[i].state = State::Ready;
}

// Runs the lanes of a warp until they wait for the block or are done.
bool run_warp(unsigned first, bool reversed) {
  while (machine->fibers[first].state == State::Ready) {
    for (unsigned i = 0; i < WARP; ++i) {
      resume(first + (reversed ? WARP - 1 - i : i));
      if (machine->error[0]) return false;
    }
    bool in_warp = false;
    for (unsigned i = 0; i < WARP; ++i) in_warp |= machine->fibers[first + i].state == State::AtWarp;
    if (!in_warp) return true;
    if (!together(first, WARP)) return false;
    release(first, WARP);
  }
  return true;
}

bool run_block(bool reversed) {
  const unsigned num_threads = machine->num_threads;
  std::memset(machine->shared, POISON, SHARED_BYTES);
  machine->shared_size = 0;
  release(0, num_threads);
  do {
    for (unsigned i = 0; i < num_threads; i += WARP) {
      if (!run_warp(reversed ? num_threads - WARP - i : i, reversed)) return false;
    }
    if (machine->fibers[0].state == State::Done || machine->fibers[num_threads - 1].state == State::Done) {
      // Warps may leave before the others do, but then no barrier may follow.
      for (unsigned i = 0; i < num_threads; ++i) {
        if (machine->fibers[i].state != State::Done) {
          return error("thread %u waits at line %d for threads that are done", i, machine->fibers[i].line);
        }
      }
      break;
    }
    if (!together(0, num_threads)) return false;
    release(0, num_threads);
  } while (true);
  // All of it is poison if the first byte is, and every byte equals the next.
  const unsigned char* rest = machine->shared + machine->shared_size;
  const size_t size = SHARED_BYTES - machine->shared_size;
  const bool intact = size == 0 || (rest[0] == POISON && std::memcmp(rest, rest + 1, size - 1) == 0);
  return intact || error("something past shared memory was written");
}

}  // namespace

namespace emulated {

void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(machine->error, sizeof(machine->error), format, list);
  va_end(list);
  _longjmp(machine->scheduler, 1);
}

void sync_block(int line) { yield(State::AtBlock, line); }

const Slot* exchange(const void* data, size_t size, int line) {
  const unsigned index = machine->current;
  Slot* slots = machine->slots[index / WARP][machine->fibers[index].parity++ % 2];
  std::memcpy(slots[index % WARP].bytes, data, size);
  yield(State::AtWarp, line);
  return slots;
}

void* shared_memory(size_t size) {
  if (machine->shared_size != 0 && machine->shared_size != size) fail("a kernel has two pieces of shared memory");
  if (size > SHARED_BYTES) fail("%zu bytes of shared memory, and %zu are allowed", size, SHARED_BYTES);
  machine->shared_size = size;
  return machine->shared;
}

}  // namespace emulated

// Null on success, or a message that lives until this thread's next launch.
extern "C" const char* aha_emulated_launch(const char* (*entry)(const emulated::Args&, bool), const unsigned* grid,
                                           unsigned num_threads, const emulated::Args* args, bool reversed) {
  if (const char* problem = entry(*args, false)) return problem;
  if (num_threads == 0 || num_threads > MAX_THREADS || num_threads % WARP != 0) {
    return "a block has 32 to 1024 threads in whole warps";
  }
  // A failed launch leaves fibers in the middle of a kernel, so it takes a new machine.
  if (!owner || owner->error[0]) owner = std::make_unique<Machine>();
  machine = owner.get();
  if (!machine->stacks) return "no memory for the stacks";
  machine->num_threads = num_threads;
  machine->entry = entry;
  machine->args = *args;
  blockDim = {num_threads, 1, 1};
  gridDim = {grid[0], grid[1], grid[2]};
  const size_t num_blocks = size_t(grid[0]) * grid[1] * grid[2];
  for (size_t i = 0; i < num_blocks; ++i) {
    const size_t block = reversed ? num_blocks - 1 - i : i;
    blockIdx = {unsigned(block % grid[0]), unsigned(block / grid[0] % grid[1]), unsigned(block / grid[0] / grid[1])};
    if (!run_block(reversed)) return machine->error;
  }
  return nullptr;
}
