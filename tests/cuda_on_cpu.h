// Runs the kernels of native.cu on a CPU, for tests: what they need of CUDA, in C++. A thread is a fiber, which runs until
// it waits for others; all blocks of a launch are alive at once, and the order in which they take turns changes, but is the same every time.

#pragma once

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __noinline__ [[gnu::noinline]]
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)

struct int2 { int x, y; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { int x; };

inline Index threadIdx, blockIdx, blockDim, gridDim;
inline float4 memory[1 << 14];  // shared memory of the block that runs; others keep theirs aside

namespace on_cpu {

struct Fiber {
  ucontext_t context;
  jmp_buf at;
  bool started = false, done = false;
  std::unique_ptr<char[]> stack;
};

struct Meeting {  // of threads of a block or lanes of a warp; what they bring lies in turns in one of two rows
  int here = 0, turn = 0;
  uint64_t brought[2][1024];
};

struct Block {
  int index;
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  std::unique_ptr<char[]> memory;
};

inline jmp_buf scheduler;
inline Block* block;
inline std::vector<Block> all;
inline std::vector<int64_t> arrived;  // threads at the barriers of a cluster, since the launch
inline int blocks_of_cluster;
inline bool spinning;
inline void (*entry)(void**);
inline void** arguments;

[[gnu::noinline]] inline void yield() {
  Fiber& fiber = block->fibers[threadIdx.x];
  if (!_setjmp(fiber.at)) _longjmp(scheduler, 1);
}

inline void begin() {
  entry(arguments);
  block->fibers[threadIdx.x].done = true;
  _longjmp(scheduler, 1);
}

[[gnu::noinline]] inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

// brings a value to a meeting of n; returns, when all are there, what they brought
inline const uint64_t* meet(Meeting& meeting, int n, int me, uint64_t value) {
  const int turn = meeting.turn;
  uint64_t* row = meeting.brought[turn % 2];
  row[me] = value;
  if (++meeting.here == n) meeting.here = 0, meeting.turn++;
  while (meeting.turn == turn) yield();
  return row;
}

template <typename T>
T shuffle(T value, int from) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const int lane = threadIdx.x % 32;
  const uint64_t* row = meet(block->warps[threadIdx.x / 32], 32, lane, bits);
  std::memcpy(&value, row + (from < 0 ? lane : from), sizeof value);
  return value;
}

inline void run(void (*kernel)(void**), int blocks, int cluster, int threads, int bytes, void** given) {
  entry = kernel, arguments = given;
  gridDim.x = blocks, blockDim.x = threads;
  all = std::vector<Block>(blocks);
  arrived = std::vector<int64_t>(blocks / cluster);
  blocks_of_cluster = cluster;
  for (Block& b : all) {
    b.index = (int)(&b - all.data());
    b.fibers = std::vector<Fiber>(threads);
    b.warps = std::vector<Meeting>(threads / 32);
    b.memory = std::make_unique<char[]>(bytes);
    std::memset(b.memory.get(), 0xff, bytes);  // NaN
    for (Fiber& fiber : b.fibers) {
      fiber.stack.reset(new char[1 << 16]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = 1 << 16;
      makecontext(&fiber.context, begin, 0);
    }
  }
  bool alive = true;
  for (int turn = 0, round = 0; alive; turn++) {  // now one is the first and now another
    alive = false;
    for (int i = 0; i < blocks; i++) {
      const int b = (turn / 2 + (turn % 2 ? blocks - 1 - i : i)) % blocks;
      block = &all[b], blockIdx.x = b;
      std::memcpy(memory, block->memory.get(), bytes);
      bool left = true;
      for (spinning = false; left && !spinning;) {  // then it waits for another block
        left = false, round++;
        for (int i = 0; i < threads; i++) {
          const int t = threadIdx.x = round % 2 ? threads - 1 - i : i;
          if (!block->fibers[t].done) resume(block->fibers[t]), left |= !block->fibers[t].done;
        }
      }
      std::memcpy(block->memory.get(), memory, bytes);
      alive |= left;
    }
  }
}

template <auto kernel, typename... A, size_t... I>
void unpacked(void (*)(A...), void** given, std::index_sequence<I...>) {
  kernel(*(A*)given[I]...);
}
template <auto kernel, typename... A>
void call(void (*signature)(A...), void** given) {
  unpacked<kernel>(signature, given, std::index_sequence_for<A...>());
}
template <auto kernel>
void kernel_of(void** given) {
  call<kernel>(kernel, given);
}

}  // namespace on_cpu

inline void __syncwarp() { on_cpu::meet(on_cpu::block->warps[threadIdx.x / 32], 32, threadIdx.x % 32, 0); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t)a * b >> 32; }
inline void __syncthreads() { on_cpu::meet(on_cpu::block->all, blockDim.x, threadIdx.x, 0); }
inline int __syncthreads_or(int value) {
  const uint64_t* row = on_cpu::meet(on_cpu::block->all, blockDim.x, threadIdx.x, value != 0);
  int any = 0;
  for (int t = 0; t < blockDim.x; t++) any |= (int)row[t];
  return any;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) { return on_cpu::shuffle(value, threadIdx.x % 32 ^ mask); }
template <typename T>
T __shfl_up_sync(unsigned, T value, int by) { return on_cpu::shuffle(value, threadIdx.x % 32 - by); }
inline unsigned __ballot_sync(unsigned, bool value) {
  const uint64_t* row = on_cpu::meet(on_cpu::block->warps[threadIdx.x / 32], 32, threadIdx.x % 32, value);
  unsigned bits = 0;
  for (int i = 0; i < 32; i++) bits |= (unsigned)row[i] << i;
  return bits;
}
inline bool __any_sync(unsigned all, bool value) { return __ballot_sync(all, value); }
template <typename T>
T __shfl_sync(unsigned, T value, int from) { return on_cpu::shuffle(value, from); }
template <typename T>
T __ldg(const T* at) { return *at; }
template <typename T>
T __ldcg(const T* at) { return *at; }
inline unsigned atomicAdd(unsigned* at, unsigned value) { return std::exchange(*at, *at + value); }
inline void __threadfence() {}
inline void release(unsigned* at, unsigned more) { *at += more; }
inline unsigned acquire(const unsigned* at) {
  on_cpu::spinning = true;
  on_cpu::yield();
  return *at;
}
inline uint4 stream(const uint4* at, bool wanted) { return wanted ? *at : uint4{}; }
inline void prefetch(const void* at) { (void)*(const volatile char*)at; }  // of what must be there
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float __int_as_float(int bits) { return __uint_as_float(bits); }
inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __clz(unsigned x) { return __builtin_clz(x); }
inline void put(long long* at, long long value) { *at = value; }
inline long long peek(const long long* at) {
  on_cpu::spinning = true;
  on_cpu::yield();
  return *at;
}

// clusters: shared memory of another block lies where the scheduler keeps it
inline int cluster_size() { return on_cpu::blocks_of_cluster; }
inline int cluster_rank() { return blockIdx.x % cluster_size(); }
template <typename T>
T* distant(T* at, unsigned rank) {
  on_cpu::Block& other = on_cpu::all[blockIdx.x - cluster_rank() + rank];
  return other.index == blockIdx.x ? at : (T*)(other.memory.get() + ((char*)at - (char*)memory));
}
inline void meet_cluster() {
  const int64_t all = cluster_size() * blockDim.x, mine = ++on_cpu::arrived[blockIdx.x / cluster_size()];
  while (on_cpu::arrived[blockIdx.x / cluster_size()] < (mine + all - 1) / all * all) on_cpu::spinning = true, on_cpu::yield();
}

struct Gate {  // in the 8 bytes of an mbarrier
  int bytes;  // that are expected and have not come
  short expects, passed;
};
inline void settle(Gate& gate) {
  if (gate.expects && gate.bytes == 0) gate.expects = 0, gate.passed++;
}
inline void build(long long* gate) { *(Gate*)gate = {}; }
inline void expect(long long* at, int bytes) {
  Gate& gate = *(Gate*)at;
  gate.bytes += bytes, gate.expects = 1;
  settle(gate);
}
inline bool passes(long long* gate, int parity) {
  on_cpu::spinning = true;
  on_cpu::yield();
  return ((Gate*)gate)->passed % 2 != parity;
}
inline unsigned distance(int block) { return block; }
template <typename T>
void give(T* at, unsigned distance, T value, long long* at_gate) {
  *distant(at, distance) = value;
  Gate& gate = *(Gate*)distant(at_gate, distance);
  gate.bytes -= sizeof value;
  settle(gate);
}
inline void tensor(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  auto& warp = on_cpu::block->warps[threadIdx.x / 32];
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
  unsigned all[6][32];
  for (int i = 0; i < 6; i++) {
    const uint64_t* row = on_cpu::meet(warp, 32, lane, mine[i]);
    for (int l = 0; l < 32; l++) all[i][l] = (unsigned)row[l];
  }
  auto number = [](unsigned both, int i) { return __uint_as_float(i % 2 ? both & 0xffff0000u : both << 16); };
  for (int v = 0; v < 4; v++) {
    const int column = 2 * t + v % 2;
    for (int k = 0; k < 16; k++) {  // of lane k%8/2 of a row or a column, the second of its pairs for k from 8
      const float a = number(all[k / 8 * 2 + v / 2][g * 4 + k % 8 / 2], k), b = number(all[4 + k / 8][column * 4 + k % 8 / 2], k);
      d[v] += a * b;
    }
  }
}
inline unsigned rounded(float a, float b) {
  auto bits = [](float v) {
    const unsigned u = __float_as_int(v);
    return v != v ? 0x7fffu : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  };
  return bits(b) << 16 | bits(a);
}
inline void copy(uint4* to, const uint4* from) { *to = *from; }
inline void copied() {}
using std::isfinite;
using std::isnan;

// after the kernels: `launch` by name
#define KERNEL(name) if (std::string(kernel) == #name) return on_cpu::run(on_cpu::kernel_of<name>, blocks, cluster, threads, bytes, given);
