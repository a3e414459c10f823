// Passes of a Transformer over up to 16 rows on a GPU: with sampling.cu and draft.cu, which are compiled together with this,
// the counterpart of native.cpp. Launching some 25 kernels a layer takes far longer than the layers of a small model, so a
// whole pass, or a whole draft, is one kernel whose blocks, one for each multiprocessor, wait for each other.
//
// In a product a warp multiplies a few rows of weights, each loaded once, with all rows of numbers, which every block has
// copied into its shared memory. Weights in bfloat16 meet them on tensor cores, each number as a sum of three of bfloat16,
// so that none is rounded; up to 16 rows then cost what one does. What the next phases need is asked for while blocks wait.
// A row's numbers are added up in the same order whatever rows stand beside it: its bits do not depend on its company.
//
//     R rows · C width · D head size · H heads · K of keys and values · S tokens in the cache
//
// Matrices lie as in nn.Linear, (outputs, inputs), the cache as in KVCache, (layers, K, S, D). Weights are bfloat16, all
// other numbers float32.

#ifndef THREADS
#define THREADS 512  // of a block
#endif
#ifndef SHARED
#define SHARED (224 << 10)  // bytes of shared memory that a launch asks for, always as many: to divide it anew takes time
#endif
#ifndef BLOCKS
#define BLOCKS 160  // of a launch, most; 32 divides it
#endif
#define UNROLL _Pragma("unroll")
#define AS_IT_IS _Pragma("unroll 1")  // a loop whose body is several rounds already

typedef long long int64;
typedef unsigned short bfloat16;

struct Layer {
  const float* attention_norm;
  const bfloat16 *qkv, *out;
  const float* mlp_norm;
  const bfloat16 *up, *down;
};

struct Model {
  int64 n_layers, n_heads, n_kv_heads, head_size, width, hidden, n_ids, n_offered, n_choices, squared, capacity;
  double norm_eps;
  const bfloat16* embedding;
  const float *cos, *sin, *norm;  // cos and sin (context, D/2)
  const bfloat16* head;
  const int64* offered;  // ids of a trimmed output layer, or null
  const bfloat16* drawn;  // rows of the embedding of those ids, one after another, or of all
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

constexpr int WARPS = THREADS / 32;
constexpr unsigned ALL = 0xffffffff;
constexpr float LOWEST = -3.402823466e38f, LOG2E = 1.44269504f;

// shared memory: first for reductions, then for some single things that are named where they are used, and the rest
__device__ double* scratch() { return (double*)memory; }
__device__ float4* rest() { return memory + 32; }

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
__device__ void ahead(const bfloat16* weights, int64 n) {
  const int64 lines = n * sizeof(bfloat16) / 128;
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

// R sums of each lane → the warp's own of row lane/(32/R)
template <int R>
__device__ float reduce(float (&sums)[R]) {
  UNROLL for (int step = 0; step < 5; step++) {
    const int offset = 16 >> step, half = R >> (step + 1);
    const bool upper = lane() & offset;
    if (half == 0) sums[0] += __shfl_xor_sync(ALL, sums[0], offset);
    UNROLL for (int r = 0; r < R / 2; r++) {
      if (r >= half) continue;
      const float mine = upper ? sums[r + half] : sums[r], other = upper ? sums[r] : sums[r + half];
      sums[r] = mine + __shfl_xor_sync(ALL, other, offset);
    }
  }
  return sums[0];
}

__device__ float first_of(unsigned two) { return __uint_as_float(two << 16); }
__device__ float second_of(unsigned two) { return __uint_as_float(two & 0xffff0000); }

// four numbers of a row of the embedding
__device__ float4 four(const bfloat16* at) {
  const uint2 v = __ldg((const uint2*)at);
  return {first_of(v.x), second_of(v.x), first_of(v.y), second_of(v.y)};
}

// Rows of shared memory are a little longer than they need be, so that lanes find numbers of all rows in different banks
__device__ float4& place(int width, int r, int c) { return rest()[r * (width / 4 + 1) + c]; }

// rows that other blocks wrote into shared memory
__device__ void stage(const float* x, int rows, int width) {
  constexpr int B = 4;
  const int fours = width / 4, n = rows * fours;
  AS_IT_IS for (int begin = threadIdx.x; begin < n; begin += B * THREADS) {
    float4 v[B];
    UNROLL for (int b = 0; b < B; b++)
      v[b] = __ldcg((const float4*)x + smaller(begin + b * THREADS, n - 1));
    UNROLL for (int b = 0; b < B; b++)
      if (const int i = begin + b * THREADS; i < n) place(width, i / fours, i % fours) = v[b];
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
    float squares = 0;
    AS_IT_IS for (int begin = lane(); begin < n; begin += B * 32) {
      float4 v[B], w[B];
      auto at = [=](int b) { return smaller(begin + b * 32, n - 1); };
      UNROLL for (int b = 0; b < B; b++) w[b] = __ldcg((const float4*)weight + at(b));
      if (ids) UNROLL for (int b = 0; b < B; b++) v[b] = embedded(ids + r, at(b));
      else UNROLL for (int b = 0; b < B; b++) v[b] = __ldcg((const float4*)(x + r * width) + at(b));
      UNROLL for (int b = 0; b < B; b++)
        if (const int c = begin + b * 32; c < n) {
          squares += v[b].x * v[b].x + v[b].y * v[b].y + v[b].z * v[b].z + v[b].w * v[b].w;
          place(width, r, c) = {v[b].x * w[b].x, v[b].y * w[b].y, v[b].z * w[b].z, v[b].w * w[b].w};
        }
    }
    const float scale = rsqrtf(__fdividef(of_warp(squares, Plus()), width) + (float)m.norm_eps);
    for (int c = lane(); c < n; c += 32) {
      float4& v = place(width, r, c);
      v = {v.x * scale, v.y * scale, v.z * scale, v.w * scale};
    }
  }
  __syncthreads();
}

__device__ float activated(float v) {
  return m.squared ? (v < 0 ? 0 * v : v * v) : v * 0.5f * (1 + erff(v * 0.70710678f));
}

// what `deliver` will need besides sums: of queries and keys the turn of their position, else what they are added to
__device__ float2 fetch(int kind, int r, int n, int c) {
  if (kind == QKV) {
    const int at = (now.start + r) * (m.head_size / 2) + c;
    return {__ldg(m.cos + at), __ldg(m.sin + at)};
  }
  if (kind == OUT || kind == DOWN) return __ldcg((const float2*)(m.x + r * n + c));
  return {0, 0};
}

// Two sums of row r go where they belong: of the c-th column of all and the next, or of a head the c-th and that half a
// head away
__device__ void deliver(int kind, int layer, int r, int n, int head, int c, float2 sums, float2 with) {
  if (kind == QKV) {  // turned, into the queries or the cache
    const int D = m.head_size, K = m.n_kv_heads, H = m.n_heads;
    const bool turned = head < H + K;
    const float cos = turned ? with.x : 1, sin = turned ? with.y : 0, a = sums.x * cos - sums.y * sin,
                b = sums.y * cos + sums.x * sin, factor = head < H ? LOG2E * rsqrtf(D) : 1;
    const int64 row = ((int64)layer * K + (turned ? head - H : head - H - K)) * m.capacity + now.start + r;
    float* to = (head < H ? m.queries + (r * H + head) * D : (turned ? now.keys : now.values) + row * D) + c;
    to[0] = a * factor, to[D / 2] = b * factor;
  } else if (kind == UP) {
    *(float2*)(m.inner + r * n + c) = {activated(sums.x), activated(sums.y)};
  } else {
    *(float2*)(m.x + r * n + c) = {with.x + sums.x, with.y + sums.y};
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

// The rows in shared memory · (n, width) weights, in tiles of 8 rows of weights, T a block at once, of queries and so on
// both numbers of 4 pairs. Each warp has some columns of them, B pieces of 32 under way; of the output layer, which has
// tiles enough for all warps, all columns.
template <int T, int B>
__device__ void tiles(int kind, int layer, int rows, int width, const bfloat16* weights, int n) {
  float2* const parts = (float2*)&place(width, rows, 0);  // (WARPS, T, rows, 4)
  const int n_tiles = (n + 7) / 8, pieces = (width + 31) / 32, half_head = m.head_size / 2, g = lane() / 4, t = lane() % 4;
  const bool whole = kind == HEAD;
  const int share = whole ? pieces : (pieces + WARPS - 1) / WARPS, begin = whole ? 0 : warp() * share,
            end = smaller(pieces, begin + share), workers = whole ? gridDim.x * WARPS : gridDim.x;
  AS_IT_IS for (int tile = whole ? blockIdx.x * WARPS + warp() : blockIdx.x; tile < n_tiles; tile += workers * T) {
    // what a thread will deliver: two columns of a row of the j-th tile
    struct Item { int j, r, head, c; bool wanted; };
    auto item_of = [=](int i) -> Item {
      const int j = i >= 4 * T * rows ? T : (i >= 4 * rows) + (i >= 8 * rows), pair = 4 * (tile + j * workers) + i % 4;
      const int head = kind == QKV ? half_heads(pair) : 0;
      return {j, i / 4 - j * rows, head, kind == QKV ? pair - head * half_head : 2 * pair, !whole && j < T && 2 * pair < n};
    };
    Item item = item_of(threadIdx.x);
    float sums[T][4] = {};
    float2 with = {0, 0};
    if (item.wanted) with = fetch(kind, item.r, n, item.c);
    const uint4* at[T];
    UNROLL for (int i = 0; i < T; i++) {
      int row = 8 * (tile + i * workers) + g;
      if (kind == QKV) row = row / 2 + (half_heads(row / 2) + g % 2) * half_head;
      at[i] = (const uint4*)(weights + (int64)smaller(row, n - 1) * width) + t;
    }
    AS_IT_IS for (int some = begin; some < end; some += B) {
      uint4 raw[B][T];
      UNROLL for (int b = 0; b < B; b++) UNROLL for (int i = 0; i < T; i++)
        raw[b][i] = stream(at[i] + 4 * (some + b), some + b < end && 32 * (some + b) + 8 * t < width && tile + i * workers < n_tiles);
      UNROLL for (int b = 0; b < B; b++) if (some + b < end) {
        unsigned a[2][4][3] = {};  // of two rows four pairs of numbers
        UNROLL for (int half = 0; half < 2; half++) if (g + 8 * half < rows && 32 * (some + b) + 8 * t < width) {
          const float4* from = &place(width, g + 8 * half, 8 * (some + b) + 2 * t);
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
      if (i != threadIdx.x && (item = item_of(i)).wanted) with = fetch(kind, item.r, n, item.c);
      float2 result = {0, 0};
      for (int w = 0; w < WARPS; w++) {
        const float2 part = parts[((w * T + item.j) * rows + item.r) * 4 + i % 4];
        result.x += part.x, result.y += part.y;
      }
      if (item.wanted) deliver(kind, layer, item.r, n, item.head, item.c, result, with);
    }
    __syncthreads();
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
      float scores[B] = {};
      UNROLL for (int t = 0; t < T; t++) UNROLL for (int b = 0; b < B; b++) if (has(t))
        scores[b] = __fmaf_rn(q[t].y, k[b][t].y, __fmaf_rn(q[t].x, k[b][t].x, scores[b]));
      const float score = reduce(scores);
      const bool seen = key + mine < n;
      float top = seen ? score : LOWEST;
      UNROLL for (int offset = 16; offset >= 32 / B; offset /= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, offset));
      top = fmaxf(top, highest);
      const float p = seen ? exp2f(score - top) : 0, before = exp2f(highest - top);
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
    const bfloat16* weights =
        kind == HEAD ? m.head : kind == QKV ? layer.qkv : kind == OUT ? layer.out : kind == UP ? layer.up : layer.down;
    if (kind == OUT || kind == DOWN) tiles<1, 6>(kind, l, rows, kind == DOWN ? F : C, weights, C);
    else tiles<3, 2>(kind, l, rows - skipped, C, weights, kind == HEAD ? N : kind == QKV ? Q : F);
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

}  // namespace
