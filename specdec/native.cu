// Passes of a Transformer over up to 16 rows on a GPU, drafts of several tokens, and what a round does with their logits:
// the counterpart of native.cpp. Launching some 25 kernels a layer takes far longer than the layers of a small model, so a
// whole pass, or a whole draft, is one kernel whose blocks, one for each multiprocessor, wait for each other.
//
// In a product a warp multiplies a few rows of weights, each loaded once, with all rows of numbers, which every block has
// copied into its shared memory. Weights in bfloat16 meet them on tensor cores, each number as a sum of three of bfloat16,
// so that none is rounded; up to 16 rows then cost what one does. What the next phases need is asked for while blocks wait.
// A row's numbers are added up in the same order whatever rows stand beside it: its bits do not depend on its company.
//
//     R rows · C width · D head size · H heads · K of keys and values · S tokens in the cache · W type of the weights
//
// Matrices lie as in nn.Linear, (outputs, inputs), the cache as in KVCache, (layers, K, S, D). All but weights is float32.

#ifndef THREADS
#define THREADS 512  // of a block
#endif
#ifndef SHARED
#define SHARED (224 << 10)  // bytes of shared memory that a launch asks for, always as many: to divide it anew takes time
#endif
#ifndef LEAST
#define LEAST 16  // pieces of 8 weights, of the part of a row of weights that a warp multiplies
#endif
#ifndef BLOCKS
#define BLOCKS 160  // of a launch, most; 32 divides it
#endif
#define UNROLL _Pragma("unroll")
#define AS_IT_IS _Pragma("unroll 1")  // a loop whose body is several rounds already

typedef long long int64;
struct bfloat16 {
  unsigned short bits;
};

struct Layer {
  const float* attention_norm;
  const W *qkv, *out;
  const float* mlp_norm;
  const W *up, *down;
};

struct Model {
  int64 n_layers, n_heads, n_kv_heads, head_size, width, hidden, n_ids, n_offered, n_choices, squared, capacity;
  double norm_eps;
  const W* embedding;
  const float *cos, *sin, *norm;  // cos and sin (context, D/2)
  const W* head;
  const W* drawn;        // rows of the embedding of those ids, one after another
  const int64* offered;  // ids of a trimmed output layer, or null
  float *x, *queries, *mixed, *inner, *logits;  // where rows lie between phases; of a draft also one row of logits
  int64* next;  // the token drawn last
  int64 *posts, *words;  // what blocks tell each other when a token is drawn: (2, blocks, 2) and (2, choices)
  unsigned* meeting;
  Layer layers[64];
};

extern __shared__ float4 memory[];
__shared__ Model m;
__shared__ struct {
  float *keys, *values, *logits;
  int start;  // tokens in the cache before those of this pass
  unsigned share;  // 2³² ÷ half of a head: to multiply by it takes less time than to divide
} now;

namespace {

enum { QKV, OUT, UP, DOWN, HEAD };  // the products of a pass

constexpr int WARPS = THREADS / 32, MANY = 8;  // rows multiplied at once
constexpr int PIECE = sizeof(W) / 2;  // vectors of 16 bytes that 8 weights take
constexpr unsigned ALL = 0xffffffff;
constexpr float LOWEST = -3.402823466e38f, LOG2E = 1.44269504f;

// shared memory: for reductions, for sums of parts, and the rest
__device__ double* scratch() { return (double*)memory; }
__device__ float* partial() { return (float*)(memory + 32); }
__device__ float4* rest() { return memory + 32 + WARPS * MANY; }

__device__ int lane() { return threadIdx.x % 32; }
__device__ int warp() { return threadIdx.x / 32; }
__device__ int smaller(int a, int b) { return a < b ? a : b; }

#ifdef __CUDA_ARCH__
// what other threads read after they have acquired the sum was written before
__device__ void release(unsigned* at, unsigned more) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(at), "r"(more) : "memory");
}
__device__ unsigned acquire(const unsigned* at) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
// zeros unless `wanted`, without a branch: behind one, loads would not be under way together
__device__ uint4 stream(const uint4* at, bool wanted) {
  uint4 v;
  asm volatile(
      "{ .reg .pred p; setp.ne.s32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
      "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(at), "r"((int)wanted));
  return v;
}
// D (16, 8) += A (16, 16) · B (16, 8), of a warp: a lane has rows lane/4 and +8 of A and D, column lane/4 of B, of k two
// and two numbers, as of a whole in which they lie 8 apart, and of D's columns 2·(lane%4) and the next
__device__ void tensor(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// two numbers rounded to bfloat16, the first below
__device__ unsigned rounded(float a, float b) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
  return both;
}
__device__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
// 8 bytes in one piece, in no order with others; peek at two such pieces
__device__ void put(int64* at, int64 value) { asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(value) : "memory"); }
__device__ int64 peek(const int64* at) {
  int64 value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}
#endif

// n weights that will soon be needed: all threads ask memory for them
__device__ void ahead(const W* weights, int64 n) {
  const int64 lines = n * sizeof(W) / 128;
  AS_IT_IS for (int64 i = blockIdx.x * THREADS + threadIdx.x; i < lines; i += gridDim.x * THREADS)
    prefetch((const char*)weights + i * 128);
}

// All blocks wait for each other, and meanwhile do `work`. The highest bit of the count changes when all are there, which
// needs no reset; each keeps in mind what it was.
__device__ unsigned& phase() { return *(unsigned*)(memory + 27); }
template <typename Work>
__device__ void meet(Work work) {
  __syncthreads();
  if (threadIdx.x == 0) release(m.meeting, blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u);
  work();
  if (threadIdx.x == 0) {
    while (acquire(m.meeting) >> 31 == phase()) {}
    phase() ^= 1;
  }
  __syncthreads();
}

struct Greater {
  template <typename T>
  __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};
struct Lesser {
  template <typename T>
  __device__ T operator()(T a, T b) const { return a < b ? a : b; }
};
struct Plus {
  template <typename T>
  __device__ T operator()(T a, T b) const { return a + b; }
};

// one result of all lanes of a warp, or of all threads of a block, combined in a fixed order
template <typename T, typename Combine>
__device__ T of_warp(T value, Combine combine) {
  for (int offset = 16; offset; offset /= 2) value = combine(value, __shfl_xor_sync(ALL, value, offset));
  return value;
}
template <typename T, typename Combine>
__device__ T together(T value, Combine combine) {
  value = of_warp(value, combine);
  T* all = (T*)scratch();
  __syncthreads();
  if (lane() == 0) all[warp()] = value;
  __syncthreads();
  value = all[0];
  for (int i = 1; i < WARPS; i++) value = combine(value, all[i]);
  return value;
}
__device__ float most(float value) { return together(value, Greater()); }
__device__ int first(int value) { return together(value, Lesser()); }
template <typename T>
__device__ T sum(T value) { return together(value, Plus()); }
template <typename T>
__device__ T up_to(T value) {  // over lanes up to this one
  for (int offset = 1; offset < 32; offset *= 2) {
    const T other = __shfl_up_sync(ALL, value, offset);
    if (lane() >= offset) value += other;
  }
  return value;
}

// R sums of each lane → at [.][0] the warp's own of row lane/(32/R)
template <int R, int G>
__device__ void reduce(float (&sums)[G][R]) {
  UNROLL for (int step = 0; step < 5; step++) {
    const int offset = 16 >> step, half = R >> (step + 1);
    const bool upper = lane() & offset;
    UNROLL for (int g = 0; g < G; g++) {
      if (half == 0) sums[g][0] += __shfl_xor_sync(ALL, sums[g][0], offset);
      UNROLL for (int r = 0; r < R / 2; r++) {
        if (r >= half) continue;
        const float mine = upper ? sums[g][r + half] : sums[g][r], other = upper ? sums[g][r] : sums[g][r + half];
        sums[g][r] = mine + __shfl_xor_sync(ALL, other, offset);
      }
    }
  }
}

// the i-th of 8 weights
__device__ float weight(const uint4* piece, int i) {
  const uint4& v = piece[PIECE == 1 ? 0 : i / 4];
  const int j = PIECE == 1 ? i / 2 : i % 4;
  const unsigned bits = j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w;
  return __uint_as_float(PIECE == 2 ? bits : i % 2 ? bits & 0xffff0000u : bits << 16);
}

// four numbers of a row of the embedding
__device__ float4 four(const W* at) {
  if constexpr (PIECE == 2) return __ldg((const float4*)at);
  const uint2 v = __ldg((const uint2*)at);
  const unsigned high = 0xffff0000;
  return {__uint_as_float(v.x << 16), __uint_as_float(v.x & high), __uint_as_float(v.y << 16), __uint_as_float(v.y & high)};
}

// Rows of shared memory, so that lanes find them in different banks: first and last four of 8 numbers lie apart; for
// tensor cores each row is a little longer
__device__ float4& place(float4* x, int width, int r, int c) {
  return PIECE == 1 ? x[r * (width / 4 + 1) + c] : x[(2 * r + c % 2) * (width / 8) + c / 2];
}

// rows that other blocks wrote into shared memory
__device__ void stage(const float* x, int rows, int width) {
  constexpr int B = 4;
  const int fours = width / 4, n = rows * fours;
  AS_IT_IS for (int begin = threadIdx.x; begin < n; begin += B * THREADS) {
    float4 v[B];
    UNROLL for (int b = 0; b < B; b++)
      v[b] = __ldcg((const float4*)x + smaller(begin + b * THREADS, n - 1));
    UNROLL for (int b = 0; b < B; b++)
      if (const int i = begin + b * THREADS; i < n) place(rest(), width, i / fours, i % fours) = v[b];
  }
  __syncthreads();
}

// four numbers of the embedding
__device__ float4 embedded(const int64* id, int c) {
  const int64 known = __ldcg(id), row = known < 0 ? 0 : known < m.n_ids ? known : m.n_ids - 1;
  return four(m.embedding + row * m.width + 4 * c);
}

// rows of the embedding, or if there are no ids of x, normalised into shared memory, each by a warp; every block does so
// for itself, which is shorter than waiting for another
__device__ void norm(const int64* ids, const float* x, int rows, const float* weight) {
  constexpr int B = 6;
  const int width = m.width, n = width / 4;
  AS_IT_IS for (int r = warp(); r < rows; r += WARPS) {
    float squares[1][1] = {};
    AS_IT_IS for (int begin = lane(); begin < n; begin += B * 32) {
      float4 v[B], w[B];
      auto at = [=](int b) { return smaller(begin + b * 32, n - 1); };
      UNROLL for (int b = 0; b < B; b++) w[b] = __ldcg((const float4*)weight + at(b));
      if (ids) UNROLL for (int b = 0; b < B; b++) v[b] = embedded(ids + r, at(b));
      else UNROLL for (int b = 0; b < B; b++) v[b] = __ldcg((const float4*)(x + r * width) + at(b));
      UNROLL for (int b = 0; b < B; b++)
        if (const int c = begin + b * 32; c < n) {
          squares[0][0] += v[b].x * v[b].x + v[b].y * v[b].y + v[b].z * v[b].z + v[b].w * v[b].w;
          place(rest(), width, r, c) = {v[b].x * w[b].x, v[b].y * w[b].y, v[b].z * w[b].z, v[b].w * w[b].w};
        }
    }
    reduce(squares);
    const float scale = rsqrtf(__fdividef(squares[0][0], width) + (float)m.norm_eps);
    for (int c = lane(); c < n; c += 32) {
      float4& v = place(rest(), width, r, c);
      v = {v.x * scale, v.y * scale, v.z * scale, v.w * scale};
    }
  }
  __syncthreads();
}

// a lane's sums of up to R rows x · G rows of weights, over the pieces from … to
template <int R, int G>
__device__ void multiply(const float4* x, int rows, int pieces, const W* const (&at)[G], int from, int to, float (&sums)[G][R]) {
  constexpr int B = (R * G <= 16 ? 4 : 3) - PIECE;  // pieces under way
  AS_IT_IS for (int start = from + lane(); start < to; start += 32 * B) {
    uint4 raw[B][G][PIECE];
    UNROLL for (int b = 0; b < B; b++) UNROLL for (int g = 0; g < G; g++) UNROLL for (int v = 0; v < PIECE; v++)
      raw[b][g][v] = stream((const uint4*)at[g] + (start + 32 * b) * PIECE + v, start + 32 * b < to);
    UNROLL for (int b = 0; b < B; b++) {
      const int i = smaller(start + 32 * b, to - 1);
      UNROLL for (int r = 0; r < R; r++) {
        if (r >= rows) continue;
        const float4 p = x[2 * r * pieces + i], q = x[(2 * r + 1) * pieces + i];
        const float numbers[8] = {p.x, p.y, p.z, p.w, q.x, q.y, q.z, q.w};
        UNROLL for (int g = 0; g < G; g++) UNROLL for (int j = 0; j < 8; j++)
          sums[g][r] = __fmaf_rn(weight(raw[b][g], j), numbers[j], sums[g][r]);
      }
    }
  }
}

__device__ float activated(float v) {
  return m.squared ? (v < 0 ? 0 * v : v * v) : v * 0.5f * (1 + erff(v * 0.70710678f));
}

// what `deliver` will need besides sums: of queries and keys the turn of their position, else what they are added to
template <int G>
__device__ void fetch(int kind, int r, int n, int apart, int head, int c, float (&with)[G]) {
  if (kind == QKV) {
    const int at = (now.start + r) * apart + c;
    with[0] = __ldg(m.cos + at), with[1] = __ldg(m.sin + at);
  }
  if (kind == OUT || kind == DOWN)
    UNROLL for (int g = 0; g < G; g++) with[g] = __ldcg(m.x + r * n + smaller(c + g * apart, n - 1));
}

// sums of G columns that lie `apart`, of row r, go where they belong: of the c-th of all, or of a head
template <int G>
__device__ void deliver(int kind, int layer, int r, int n, int apart, int head, int c, const float (&sums)[G], const float (&with)[G]) {
  if (kind == QKV) {  // both numbers of a pair: turned, into the queries or the cache
    const int D = m.head_size, K = m.n_kv_heads, H = m.n_heads;
    const bool turned = head < H + K;
    const float cos = turned ? with[0] : 1, sin = turned ? with[1] : 0, a = sums[0] * cos - sums[1] * sin,
                b = sums[1] * cos + sums[0] * sin, factor = head < H ? LOG2E * rsqrtf(D) : 1;
    const int64 row = ((int64)layer * K + (turned ? head - H : head - H - K)) * m.capacity + now.start + r;
    float* to = head < H ? m.queries + (r * H + head) * D : (turned ? now.keys : now.values) + row * D;
    to[c] = a * factor, to[c + apart] = b * factor;
    return;
  }
  UNROLL for (int g = 0; g < G; g++) {
    if (c + g * apart >= n) return;
    const int at = r * n + c + g * apart;
    if (kind == OUT || kind == DOWN) m.x[at] = with[g] + sums[g];
    if (kind == UP) m.inner[at] = activated(sums[g]);
    if (kind == HEAD) now.logits[(int64)r * n + c + g * apart] = sums[g];
  }
}

// R rows x · all rows of weights, in groups of G that lie `apart`, of queries and so on within a head. Where groups are
// fewer than warps, several warps of a block each multiply a part.
template <int R>
__device__ void groups(int kind, int layer, int above, int rows, int width, const W* weights, int n, int apart) {
  constexpr int G = 2;
  const float4* x = rest() + above * (width / 4);
  const int pieces = width / 8, n_groups = kind == QKV ? n / 2 : apart, row = lane() / (32 / R);
  int some = 0;  // 2^some parts
  while (2 << some <= smaller(WARPS, 8) && n_groups << some + 1 <= gridDim.x * WARPS && pieces >= LEAST << some + 1) some++;
  const int parts = 1 << some, share = (pieces + parts - 1) >> some, part = warp() & (parts - 1), per_block = WARPS >> some;
  const bool leads = part == 0 && lane() % (32 / R) == 0 && above + row < rows;
  AS_IT_IS for (int begin = blockIdx.x * per_block; begin < n_groups; begin += gridDim.x * per_block) {
    const int group = begin + (warp() >> some), head = kind == QKV ? group / apart : 0, c = group - head * apart;
    float sums[G][R] = {}, result[G], with[G] = {};
    const bool delivers = leads && group < n_groups;
    if (delivers) fetch<G>(kind, above + row, n, apart, head, c, with);
    if (group < n_groups) {
      const W* at[G];
      UNROLL for (int g = 0; g < G; g++) at[g] = weights + (int64)smaller(head * 2 * apart + c + g * apart, n - 1) * width;
      multiply<R, G>(x, rows - above, pieces, at, part * share, smaller(pieces, (part + 1) * share), sums);
      reduce(sums);
    }
    UNROLL for (int g = 0; g < G; g++) result[g] = sums[g][0];
    if (parts > 1) {
      if (lane() % (32 / R) == 0) UNROLL for (int g = 0; g < G; g++) partial()[(warp() * G + g) * R + row] = result[g];
      __syncthreads();
      if (leads)
        for (int p = 1; p < parts; p++)
          UNROLL for (int g = 0; g < G; g++) result[g] += partial()[((warp() + p) * G + g) * R + row];
      __syncthreads();
    }
    if (delivers) deliver<G>(kind, layer, above + row, n, apart, head, c, result, with);
  }
}

__device__ int half_heads(int n) { return __umulhi(n, now.share); }  // how often half of a head is in n

// two numbers as three sums of two of bfloat16, of which the last is exact
__device__ void split(float a, float b, unsigned (&parts)[3]) {
  UNROLL for (int i = 0; i < 3; i++) {
    parts[i] = rounded(a, b);
    a -= __uint_as_float(parts[i] << 16), b -= __uint_as_float(parts[i] & 0xffff0000);
  }
}

// The rows in shared memory · (n, width) weights in bfloat16, in tiles of 8 rows of weights, T a block at once, of queries
// and so on both numbers of 4 pairs. Each warp has some columns of them, B pieces of 32 under way; of the output layer,
// which has tiles enough for all warps, all columns.
template <int T, int B>
__device__ void tiles(int kind, int layer, int rows, int width, const W* weights, int n, int apart) {
  const float4* const x = rest();
  float2* const parts = (float2*)(rest() + rows * (width / 4 + 1));  // (WARPS, T, rows, 4)
  const int n_tiles = (n + 7) / 8, pieces = (width + 31) / 32, g = lane() / 4, t = lane() % 4;
  const bool whole = kind == HEAD;
  const int share = whole ? pieces : (pieces + WARPS - 1) / WARPS, begin = whole ? 0 : warp() * share,
            end = smaller(pieces, begin + share), workers = whole ? gridDim.x * WARPS : gridDim.x;
  AS_IT_IS for (int tile = whole ? blockIdx.x * WARPS + warp() : blockIdx.x; tile < n_tiles; tile += workers * T) {
    // what a thread will deliver: two columns of a row of the j-th tile
    struct Item { int j, r, head, c; bool wanted; };
    auto item_of = [=](int i) -> Item {
      const int j = i >= 4 * T * rows ? T : (i >= 4 * rows) + (i >= 8 * rows), pair = 4 * (tile + j * workers) + i % 4;
      const int head = kind == QKV ? half_heads(pair) : 0;
      return {j, i / 4 - j * rows, head, kind == QKV ? pair - head * apart : 2 * pair, !whole && j < T && 2 * pair < n};
    };
    const int between = kind == QKV ? apart : 1;
    Item item = item_of(threadIdx.x);
    float with[2] = {}, sums[T][4] = {};
    if (item.wanted) fetch<2>(kind, item.r, n, between, item.head, item.c, with);
    const uint4* at[T];
    UNROLL for (int i = 0; i < T; i++) {
      int row = 8 * (tile + i * workers) + g;
      if (kind == QKV) row = row / 2 + (half_heads(row / 2) + g % 2) * apart;
      at[i] = (const uint4*)(weights + (int64)smaller(row, n - 1) * width) + t;
    }
    AS_IT_IS for (int some = begin; some < end; some += B) {
      uint4 raw[B][T];
      UNROLL for (int b = 0; b < B; b++) UNROLL for (int i = 0; i < T; i++)
        raw[b][i] = stream(at[i] + 4 * (some + b), some + b < end && 32 * (some + b) + 8 * t < width && tile + i * workers < n_tiles);
      UNROLL for (int b = 0; b < B; b++) if (some + b < end) {
        unsigned a[2][4][3] = {};  // of two rows four pairs of numbers
        UNROLL for (int half = 0; half < 2; half++) if (g + 8 * half < rows && 32 * (some + b) + 8 * t < width) {
          const float4* from = x + (g + 8 * half) * (width / 4 + 1) + 8 * (some + b) + 2 * t;
          const float4 p = from[0], q = from[1];
          split(p.x, p.y, a[half][0]), split(p.z, p.w, a[half][1]), split(q.x, q.y, a[half][2]), split(q.z, q.w, a[half][3]);
        }
        UNROLL for (int s = 2; s >= 0; s--) UNROLL for (int i = 0; i < T; i++) {
          tensor(sums[i], a[0][0][s], a[1][0][s], a[0][1][s], a[1][1][s], raw[b][i].x, raw[b][i].y);
          tensor(sums[i], a[0][2][s], a[1][2][s], a[0][3][s], a[1][3][s], raw[b][i].z, raw[b][i].w);
        }
      }
    }
    if (whole) {
      UNROLL for (int i = 0; i < T; i++) UNROLL for (int v = 0; v < 4; v++) {
        const int column = 8 * (tile + i * workers) + 2 * t + v % 2, row = g + v / 2 * 8;
        if (row < rows && column < n) now.logits[(int64)row * n + column] = sums[i][v];
      }
      continue;
    }
    UNROLL for (int i = 0; i < T; i++) UNROLL for (int half = 0; half < 2; half++) if (g + 8 * half < rows)
      parts[((warp() * T + i) * rows + g + 8 * half) * 4 + t] = {sums[i][2 * half], sums[i][2 * half + 1]};
    __syncthreads();
    AS_IT_IS for (int i = threadIdx.x; i < 4 * T * rows; i += THREADS) {
      if (i != threadIdx.x && (item = item_of(i)).wanted) fetch<2>(kind, item.r, n, between, item.head, item.c, with);
      float result[2] = {};
      for (int w = 0; w < WARPS; w++) {
        const float2 part = parts[((w * T + item.j) * rows + item.r) * 4 + i % 4];
        result[0] += part.x, result[1] += part.y;
      }
      if (item.wanted) deliver<2>(kind, layer, item.r, n, between, item.head, item.c, result, with);
    }
    __syncthreads();
  }
}

// the rows in shared memory · (n, width) weights
__device__ void product(int kind, int layer, int rows, int width, const W* weights, int n, int apart) {
  if constexpr (PIECE == 1) {
    if (kind == OUT || kind == DOWN) tiles<1, 6>(kind, layer, rows, width, weights, n, apart);
    else tiles<3, 2>(kind, layer, rows, width, weights, n, apart);
  } else {
    AS_IT_IS for (int above = 0; above < rows; above += MANY) {
      const int left = rows - above;
      if (left == 1) groups<1>(kind, layer, above, rows, width, weights, n, apart);
      else if (left == 2) groups<2>(kind, layer, above, rows, width, weights, n, apart);
      else if (left <= 4) groups<4>(kind, layer, above, rows, width, weights, n, apart);
      else groups<8>(kind, layer, above, rows, width, weights, n, apart);
    }
  }
}

// Softmax over n parts that lie `apart`, each with a sum of values (D), the highest score and the weight of its keys:
// the same of all of them together, of the sum the d-th number. Scores are logarithms to the base 2.
__device__ float3 combined(const float* at, int n, int apart, int D, int d) {
  float highest = LOWEST, y = 0, total = 0;
  for (int i = 0; i < n; i++) highest = fmaxf(highest, at[i * apart + D]);
  for (int i = 0; i < n; i++) {
    const float weight = exp2f(at[i * apart + D] - highest);
    y = __fmaf_rn(weight, at[i * apart + d], y), total = __fmaf_rn(weight, at[i * apart + D + 1], total);
  }
  return {y, highest, total};
}

// One block for each head of each row. Each warp has some keys and its own softmax over them, of numbers T·64 apart.
template <int T>
__device__ void attend(int layer, int rows) {
  constexpr int B = 8 / T;  // keys under way
  const int H = m.n_heads, K = m.n_kv_heads, D = m.head_size, mine = lane() / (32 / B);
  float* const of_warps = (float*)rest();  // (WARPS, D+2)
  AS_IT_IS for (int i = blockIdx.x; i < rows * H; i += gridDim.x) {
    const int r = i / H, n = now.start + r + 1;  // keys that the row sees
    const int64 head = ((int64)layer * K + (i - r * H) / (H / K)) * m.capacity * D;
    auto at = [=](const float* x, int t) { return __ldcg((const float2*)(x + smaller(2 * lane() + 64 * t, D - 2))); };
    auto has = [=](int t) { return 2 * lane() + 64 * t < D; };
    float2 q[T], y[T] = {};
    UNROLL for (int t = 0; t < T; t++) q[t] = at(m.queries + i * D, t);
    float highest = LOWEST, total = 0;
    AS_IT_IS for (int key = warp() * B; key < n; key += WARPS * B) {
      float2 k[B][T], v[B][T];
      UNROLL for (int b = 0; b < B; b++) UNROLL for (int t = 0; t < T; t++) {
        const int64 row = head + (int64)smaller(key + b, n - 1) * D;
        k[b][t] = at(now.keys + row, t), v[b][t] = at(now.values + row, t);
      }
      float scores[1][B] = {};
      UNROLL for (int t = 0; t < T; t++) UNROLL for (int b = 0; b < B; b++) if (has(t))
        scores[0][b] = __fmaf_rn(q[t].y, k[b][t].y, __fmaf_rn(q[t].x, k[b][t].x, scores[0][b]));
      reduce(scores);
      const bool seen = key + mine < n;
      float top = seen ? scores[0][0] : LOWEST;
      UNROLL for (int offset = 16; offset >= 32 / B; offset /= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, offset));
      top = fmaxf(top, highest);
      const float p = seen ? exp2f(scores[0][0] - top) : 0, before = exp2f(highest - top);
      float more = p;
      UNROLL for (int offset = 16; offset >= 32 / B; offset /= 2) more += __shfl_xor_sync(ALL, more, offset);
      total = __fmaf_rn(total, before, more), highest = top;
      UNROLL for (int t = 0; t < T; t++) y[t] = {y[t].x * before, y[t].y * before};
      UNROLL for (int b = 0; b < B; b++) {
        const float weight = __shfl_sync(ALL, p, b * (32 / B));
        UNROLL for (int t = 0; t < T; t++)
          y[t] = {__fmaf_rn(weight, v[b][t].x, y[t].x), __fmaf_rn(weight, v[b][t].y, y[t].y)};
      }
    }
    __syncthreads();
    float* to = of_warps + warp() * (D + 2);
    UNROLL for (int t = 0; t < T; t++) if (has(t)) *(float2*)(to + 2 * lane() + 64 * t) = y[t];
    if (lane() == 0) *(float2*)(to + D) = {highest, total};
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += THREADS) {
      const float3 all = combined(of_warps, smaller(WARPS, (n + B - 1) / B), D + 2, D, d);
      m.mixed[i * D + d] = __fdividef(all.x, all.z);
    }
  }
}

// R tokens after others; the logits of those from the `wanted`-th on, unless there is no place for them. The loop calls
// every function from one place only, so that the code of a layer stays in the instruction cache.
__device__ void pass(const int64* ids, int rows, int wanted) {
  const int C = m.width, F = m.hidden, N = m.n_offered, Q = (m.n_heads + 2 * m.n_kv_heads) * m.head_size;
  AS_IT_IS for (int i = blockIdx.x * THREADS + threadIdx.x; i < rows * (C / 4); i += gridDim.x * THREADS)
    ((float4*)m.x)[i] = embedded(ids + i / (C / 4), i % (C / 4));
  const int steps = 4 * m.n_layers + (now.logits ? 1 : 0);
  AS_IT_IS for (int step = 0; step < steps; step++) {
    const int l = step / 4, kind = l == m.n_layers ? HEAD : step % 4;
    const Layer& layer = m.layers[l];
    const int skipped = kind == HEAD ? wanted : 0;
    if (kind == OUT || kind == DOWN) stage(kind == OUT ? m.mixed : m.inner, rows, kind == OUT ? C : F);
    else norm(step ? nullptr : ids, m.x + skipped * C, rows - skipped,
              kind == HEAD ? m.norm : kind == QKV ? layer.attention_norm : layer.mlp_norm);
    const W* weights = kind == HEAD ? m.head : kind == QKV ? layer.qkv : kind == OUT ? layer.out : kind == UP ? layer.up : layer.down;
    const int outputs = kind == HEAD ? N : kind == QKV ? Q : kind == UP ? F : C;
    product(kind, l, rows - skipped, kind == DOWN ? F : C, weights, outputs, kind == QKV ? m.head_size / 2 : (outputs + 1) / 2);
    if (kind == HEAD) return;
    AS_IT_IS for (int after = 0; after < (kind == QKV ? 2 : 1); after++) {
      if (after && m.head_size <= 64) attend<1>(l, rows);
      else if (after) attend<4>(l, rows);
      meet([&] {
        if (kind == QKV && !after) ahead(layer.out, C * C), ahead(layer.up, F * C);
        else if (kind == QKV) ahead(layer.down, F * C);
        else if (kind == OUT && l + 1 < m.n_layers) ahead(m.layers[l + 1].qkv, Q * C);
        else if (kind == OUT && now.logits) ahead(m.head, smaller(N, 8192) * C);
      });
    }
  }
}

__device__ float divisor_of(double temperature) { return temperature > 1.17549435e-38 ? (float)temperature : 1.17549435e-38f; }

// which of n numbers one of some blocks looks after
struct Slice {
  int each, from, n;
  __device__ Slice(int all, int block, int blocks)
      : each((all + blocks - 1) / blocks), from(smaller(all, block * each)), n(smaller(all, from + each) - from) {}
};

// A number and when it was told, in one piece: who finds the second has the first, whatever order others see.
__device__ void tell(int64* at, float what, int epoch) { put(at, (int64)epoch << 32 | (unsigned)__float_as_int(what)); }
template <int B>
__device__ void listen(const int64* at, int apart, int n, int epoch, float (&heard)[B]) {  // n of them
  for (bool all = n <= 0; !all;) {
    int64 raw[B];
    UNROLL for (int b = 0; b < B; b++) raw[b] = peek(at + apart * smaller(b, n - 1));
    all = true;
    UNROLL for (int b = 0; b < B; b++) heard[b] = __int_as_float((int)raw[b]), all = all && (int)(raw[b] >> 32) == epoch;
  }
  __syncwarp();  // lanes that waited for different blocks go on together
}

// What a warp hears from some blocks, each of which told two numbers: those of the blocks that a lane listens to, in order.
struct Heard {
  static constexpr int B = BLOCKS / 32;  // blocks of a lane, most
  int each, begin, n;
  float one[B], other[B];
  __device__ Heard(const int64* posts, int blocks, int epoch)
      : each((blocks + 31) / 32), begin(lane() * each), n(smaller(each, blocks - begin)) {
    float both[2 * B];
    UNROLL for (int b = 0; b < 2 * B; b++) both[b] = 0;
    listen(posts + 2 * begin, 1, 2 * n, epoch, both);
    UNROLL for (int b = 0; b < B; b++) one[b] = b < n ? both[2 * b] : 0, other[b] = b < n ? both[2 * b + 1] : 0;
  }
};

// Softmax of logits that are divided among blocks. Each tells the greatest of its own and their weight, or at temperature 0
// its place, hears the others' and knows the rest: of all of them the greatest, the sum of weights, and whether one is
// not finite.
struct Softmax {
  float rate, highest;
  bool greedy, odd;
  __device__ Softmax(double temperature) : rate(LOG2E / divisor_of(temperature)), highest(LOWEST), greedy(temperature == 0) {}
  __device__ float weight_of(float v) const { return exp2f((v - highest) * rate); }
  __device__ void tell_own(int64* post, float weight, int at, int epoch) const {  // a NaN for a weight if there is an odd one
    tell(post, greedy && isnan(weight) ? weight : highest, epoch);
    tell(post + 1, greedy ? __int_as_float(at) : weight, epoch);
  }
  __device__ void hear(Heard& heard) {  // weights are then of the greatest of all
    float top = LOWEST;
    odd = false;
    UNROLL for (int b = 0; b < Heard::B; b++) if (b < heard.n)
      top = fmaxf(top, heard.one[b]), odd = odd || isnan(heard.one[b]) || !greedy && isnan(heard.other[b]);
    highest = of_warp(top, Greater()), odd = __any_sync(ALL, odd);
    if (!greedy) UNROLL for (int b = 0; b < Heard::B; b++) heard.other[b] = b < heard.n ? heard.other[b] * weight_of(heard.one[b]) : 0;
  }
  __device__ int place(const Heard& heard) const {  // of the first of the greatest, at temperature 0
    int at = 0x7fffffff;
    UNROLL for (int b = 0; b < Heard::B; b++) if (b < heard.n && heard.one[b] == highest) at = smaller(at, __float_as_int(heard.other[b]));
    return of_warp(at, Lesser());
  }
};

// An index out of `all` weights for a uniform number, by inversion in float64, by a warp that has heard what the weights
// of each block's slice add up to, and looks at S of them a lane at once: load(from, n, weights). If nothing has a
// weight, `all`.
template <int S, typename Load>
__device__ int search(const float (&parts)[Heard::B], const Heard& heard, int blocks, int all, double number, double& sums, Load load) {
  double own = 0, before;
  UNROLL for (int b = 0; b < Heard::B; b++) own += parts[b];
  before = up_to(own), sums = __shfl_sync(ALL, before, 31), before -= own;
  if (!(sums > 0)) return all;
  const double wanted = number * sums;
  int chosen = -1, last = -1, found = all;
  double start = 0;
  UNROLL for (int b = 0; b < Heard::B; b++) {
    if (parts[b] > 0 && before <= wanted) chosen = heard.begin + b, start = before;
    before += parts[b];
  }
  const int by = 31 - __clz(__ballot_sync(ALL, chosen >= 0));  // the last lane; there is one, for the first weight begins at 0
  chosen = __shfl_sync(ALL, chosen, by), start = __shfl_sync(ALL, start, by);
  const Slice there(all, chosen, blocks);
  for (int some = 0; some < there.n && found == all; some += 32 * S) {
    const int from = there.from + some + lane() * S, n = smaller(S, there.from + there.n - from);
    float weights[S];
    load(from, n, weights);
    own = 0;
    UNROLL for (int b = 0; b < S; b++) weights[b] = b < n ? weights[b] : 0, own += weights[b];
    before = up_to(own);
    const double these = __shfl_sync(ALL, before, 31);
    before += start - own, start += these;
    UNROLL for (int b = 0; b < S; b++) {
      before += weights[b];
      if (weights[b] > 0) last = from + b;
      if (weights[b] > 0 && before > wanted) found = smaller(found, from + b);
    }
    found = of_warp(found, Lesser());
  }
  return found < all ? found : of_warp(last, Greater());  // sums round differently than the total: the last with a weight
}

struct Drawn {
  float highest, scale;
  int token;
};
__device__ Drawn& drawn() { return *(Drawn*)(memory + 31); }  // a warp tells its block

// One token, and the row that it is drawn from, by all blocks, each of which has its slice of the logits in shared memory;
// keep(choice, probability) for each of them. What was told is overwritten two epochs later, when all must have heard it.
// The choice for a row that is not finite is n_choices. One warp of a block does it: others would have to be waited for.
template <int S, typename Keep>
__device__ int draw(const float* logits, const Slice& slice, double temperature, double number, int epoch, Keep keep) {
  const int all = m.n_choices;
  Softmax softmax(temperature);
  if (warp() == 0) {
    int64 *posts = m.posts + epoch % 2 * 2 * BLOCKS, *words = m.words + (int64)(epoch % 2) * all;
    float weight = 0;
    int at = all;
    AS_IT_IS for (int begin = lane(); begin < slice.n; begin += 32 * S) UNROLL for (int s = 0; s < S; s++)
      if (const int i = begin + 32 * s; i < slice.n) softmax.highest = fmaxf(softmax.highest, logits[i]);
    softmax.highest = of_warp(softmax.highest, Greater());
    AS_IT_IS for (int begin = lane(); begin < slice.n; begin += 32 * S) UNROLL for (int s = 0; s < S; s++)
      if (const int i = begin + 32 * s; i < slice.n) {
        const float v = logits[i];
        tell(words + slice.from + i, v, epoch);
        weight += softmax.weight_of(v) + v * 0;  // NaN unless all are finite
        if (v == softmax.highest) at = smaller(at, slice.from + i);
      }
    weight = of_warp(weight, Plus());
    if (softmax.greedy) at = of_warp(at, Lesser());
    if (lane() == 0) softmax.tell_own(posts + 2 * blockIdx.x, weight, at, epoch);
    Heard heard(posts, gridDim.x, epoch);
    softmax.hear(heard);
    int token = all;
    double sums = 1;
    if (!softmax.odd && softmax.greedy) token = softmax.place(heard);
    else if (!softmax.odd) token = search<S>(heard.other, heard, gridDim.x, all, number, sums, [=](int from, int n, float (&weights)[S]) {
      listen(words + from, 1, n, epoch, weights);
      UNROLL for (int b = 0; b < S; b++) weights[b] = b < n ? softmax.weight_of(weights[b]) : 0;
    });
    if (lane() == 0) drawn() = {softmax.highest, 1 / (float)sums, token};
  }
  __syncthreads();
  const Drawn now = drawn();
  softmax.highest = now.highest;
  for (int i = threadIdx.x; i < slice.n; i += THREADS) {
    const float one = softmax.greedy ? slice.from + i == now.token : softmax.weight_of(logits[i]) * now.scale;
    keep(slice.from + i, now.token == all ? __int_as_float(0x7fc00000) : one);
  }
  __syncthreads();
  return now.token;
}

}  // namespace

extern "C" {

// R tokens are read; then n are drawn, each for one of the numbers, of which all but the last are read too. If n is 0 the
// logits (R, N) are written, unless null. The epoch is larger by n with each launch.
__global__ void __launch_bounds__(THREADS, 1)
specdec_run(const __grid_constant__ Model model, float* keys, float* values, const int64* ids, int rows, int start,
            float* logits, int n, double temperature, const double* numbers, int64* tokens, float* probs, int epoch) {
  for (int i = threadIdx.x; i < sizeof m / 8; i += THREADS) ((int64*)&m)[i] = ((const int64*)&model)[i];
  AS_IT_IS for (int i = 0; i == 0 || i < n; i++) {
    __syncthreads();
    if (threadIdx.x == 0) {
      const int64 half = m.head_size / 2;
      now = {keys, values, n ? m.logits : logits, start, (unsigned)(0xffffffff / half + 1)};
      if (i == 0) phase() = acquire(m.meeting) >> 31;  // it cannot change before this block is there
    }
    __syncthreads();
    pass(ids, rows, n ? rows - 1 : 0);
    if (n == 0) return;
    meet([] {});
    const Slice slice(m.n_choices, blockIdx.x, gridDim.x);
    float* own = (float*)rest();
    for (int j = threadIdx.x; j < slice.n; j += THREADS) own[j] = __ldcg(m.logits + slice.from + j);
    __syncthreads();
    float* const row = probs + (int64)i * m.n_choices;
    const int token = draw<12>(own, slice, temperature, numbers[i], epoch + i, [=](int choice, float p) { row[choice] = p; });
    const int known = smaller(token, m.n_choices - 1);  // after a row of NaN, which the engine sees itself
    if (blockIdx.x == 0 && threadIdx.x == 0) tokens[i] = token, *m.next = m.offered ? m.offered[known] : known;
    if (i + 1 < n) meet([] {});
    ids = m.next, start += rows, rows = 1;
  }
}

// logits whose rows lie `stride` apart → probs (R, n), as sampling.Sampling without filters; a row that is not finite
// becomes NaN. As many blocks for each row; the epoch is another at each launch.
__global__ void __launch_bounds__(THREADS, 1)
specdec_probabilities(const float* logits, int64 stride, int n, int rows, double temperature, float* probs, int64* posts, int epoch) {
  const int blocks = gridDim.x / rows, r = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const Slice slice(n, block, blocks);
  logits += r * stride + slice.from, probs += (int64)r * n + slice.from, posts += 2 * r * blocks;
  float* own = (float*)rest();
  float weight = 0;
  int at = n;
  Softmax softmax(temperature);
  for (int i = threadIdx.x; i < slice.n; i += THREADS) own[i] = __ldcg(logits + i), softmax.highest = fmaxf(softmax.highest, own[i]);
  softmax.highest = most(softmax.highest);
  for (int i = threadIdx.x; i < slice.n; i += THREADS) {
    weight += softmax.weight_of(own[i]) + own[i] * 0;
    if (own[i] == softmax.highest) at = smaller(at, slice.from + i);
  }
  weight = sum(weight);
  if (softmax.greedy) at = first(at);
  if (warp() == 0) {
    if (lane() == 0) softmax.tell_own(posts + 2 * block, weight, at, epoch);
    Heard heard(posts, blocks, epoch);
    softmax.hear(heard);
    float sums = 0;
    UNROLL for (int b = 0; b < Heard::B; b++) sums += heard.other[b];
    sums = of_warp(sums, Plus());
    const int token = softmax.odd ? n : softmax.greedy ? softmax.place(heard) : 0;
    if (lane() == 0) drawn() = {softmax.highest, 1 / sums, token};
  }
  __syncthreads();
  const Drawn now = drawn();
  softmax.highest = now.highest;
  for (int i = threadIdx.x; i < slice.n; i += THREADS) {
    const float one = softmax.greedy ? slice.from + i == now.token : softmax.weight_of(own[i]) * now.scale;
    probs[i] = now.token == n ? __int_as_float(0x7fc00000) : one;
  }
}

// the rule sampling.token_wise; numbers (k+1). All blocks find how many drafts stay, and each has its slice of what p
// has more than q, and of p in case that is nothing. The epoch is another at each launch.
__global__ void __launch_bounds__(THREADS, 1)
specdec_decide(const int64* drafted, const float* q, const float* p, const double* numbers, int k, int n, int64* decision,
               int64* posts, int epoch) {
  constexpr int S = 12;
  int accepted = k;
  for (int i = k - 1 - (int)threadIdx.x; i >= 0; i -= THREADS)
    if (!(numbers[i] < (double)(p[(int64)i * n + drafted[i]] / q[(int64)i * n + drafted[i]]))) accepted = i;
  accepted = first(accepted);
  p += (int64)accepted * n, q += (int64)accepted * n;
  const bool all_stay = accepted == k;
  auto left = [=](int i) { const float v = all_stay ? 0 : __ldg(p + i) - __ldg(q + i); return v < 0 ? 0.f : v; };  // a NaN stays one
  const Slice slice(n, blockIdx.x, gridDim.x);
  float of_left = 0, of_p = 0;
  for (int i = threadIdx.x; i < slice.n; i += THREADS) of_left += left(slice.from + i), of_p += __ldg(p + slice.from + i);
  of_left = sum(of_left), of_p = sum(of_p);
  if (warp() != 0) return;
  if (lane() == 0) tell(posts + 2 * blockIdx.x, of_left, epoch), tell(posts + 2 * blockIdx.x + 1, of_p, epoch);
  if (blockIdx.x != 0) return;
  const Heard heard(posts, gridDim.x, epoch);
  bool covered = true;  // nothing is left of p
  UNROLL for (int b = 0; b < Heard::B; b++) if (b < heard.n) covered = covered && heard.one[b] == 0;
  covered = !__any_sync(ALL, !covered);
  double sums;
  float parts[Heard::B];
  UNROLL for (int b = 0; b < Heard::B; b++) parts[b] = covered ? heard.other[b] : heard.one[b];
  const int following = search<S>(parts, heard, gridDim.x, n, numbers[k], sums, [=](int from, int n, float (&weights)[S]) {
    UNROLL for (int b = 0; b < S; b++) weights[b] = b < n ? (covered ? __ldg(p + from + b) : left(from + b)) : 0;
  });
  if (lane() == 0) decision[0] = accepted, decision[1] = following;
}
}
