// Passes of a Transformer over up to 16 rows on a GPU, drafts of several tokens, and what a round does with their logits:
// the counterpart of native.cpp. Launching some 25 kernels a layer takes far longer than the layers of a small model, so a
// whole pass, or a whole draft, is one kernel whose blocks, one for each multiprocessor, wait for each other.
//
// In a product a warp multiplies a few rows of weights, each loaded once, with all rows of numbers, which every block has
// copied into its shared memory. What the next phases need is asked for while blocks wait, so that memory is never idle.
// A row's numbers are added up in the same order whatever rows stand beside it: its bits do not depend on its company.
//
//     R rows · C width · D head size · H heads · K of keys and values · S tokens in the cache · W type of the weights
//
// Matrices lie as in nn.Linear, (outputs, inputs), the cache as in KVCache, (layers, K, S, D). All but weights is float32.

#ifndef THREADS
#define THREADS 512  // of a block
#endif
#ifndef LEAST
#define LEAST 16  // pieces of 8 weights, of the part of a row of weights that a warp multiplies
#endif
#define UNROLL _Pragma("unroll")

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
  const int64* offered;  // ids of a trimmed output layer, or null
  float *x, *queries, *mixed, *inner, *logits;  // where rows lie between phases; of a draft also one row of logits
  int64* next;  // the token drawn last
  unsigned* meeting;
  Layer layers[64];
};

extern __shared__ float4 memory[];

namespace {

constexpr int WARPS = THREADS / 32, MANY = 8;  // rows multiplied at once
constexpr int PIECE = sizeof(W) / 2;  // vectors of 16 bytes that 8 weights take
constexpr unsigned ALL = 0xffffffff;
constexpr float LOWEST = -3.402823466e38f;

// shared memory: for reductions, for sums of parts, and the rest
__device__ double* scratch() { return (double*)memory; }
__device__ float* partial() { return (float*)(memory + 32); }
__device__ float4* rest() { return memory + 32 + WARPS * MANY; }

__device__ int lane() { return threadIdx.x % 32; }
__device__ int warp() { return threadIdx.x / 32; }
__device__ int smaller(int a, int b) { return a < b ? a : b; }

#ifdef __CUDA_ARCH__
__device__ unsigned acquire(const unsigned* at) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
__device__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
#endif

// n weights that will soon be needed: all threads ask memory for them
__device__ void ahead(const W* weights, int64 n) {
  const int64 lines = n * sizeof(W) / 128;
  for (int64 i = blockIdx.x * THREADS + threadIdx.x; i < lines; i += gridDim.x * THREADS) prefetch((const char*)weights + i * 128);
}

// All blocks wait for each other, and meanwhile do `work`. The highest bit of the count changes when all are there, which
// needs no reset.
template <typename Work>
__device__ void meet(unsigned* count, Work work) {
  unsigned before = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    before = atomicAdd(count, blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u);
  }
  work();
  if (threadIdx.x == 0) {
    while (((before ^ acquire(count)) >> 31) == 0) {}
    __threadfence();
  }
  __syncthreads();
}

// one result of all threads of a block, combined in a fixed order
template <typename T, typename Combine>
__device__ T together(T value, Combine combine) {
  for (int offset = 16; offset; offset /= 2) value = combine(value, __shfl_xor_sync(ALL, value, offset));
  T* all = (T*)scratch();
  __syncthreads();
  if (lane() == 0) all[warp()] = value;
  __syncthreads();
  value = all[0];
  for (int i = 1; i < WARPS; i++) value = combine(value, all[i]);
  return value;
}
__device__ float most(float value) {
  return together(value, [](float a, float b) { return a > b ? a : b; });
}
__device__ int first(int value) {
  return together(value, [](int a, int b) { return a < b ? a : b; });
}
template <typename T>
__device__ T sum(T value) {
  return together(value, [](T a, T b) { return a + b; });
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
  return {__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u), __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xffff0000u)};
}

// Rows of shared memory: first and last four of 8 numbers lie apart, so that a warp reads neighbours
__device__ float4& place(float4* x, int width, int r, int c) { return x[(2 * r + c % 2) * (width / 8) + c / 2]; }

// rows of fours `from(row, c)` into shared memory
template <typename From>
__device__ void stage(int rows, int width, From from) {
  constexpr int B = 4;
  const int n = rows * (width / 4);
  for (int start = threadIdx.x; start < n; start += B * THREADS) {
    float4 v[B];
    UNROLL for (int b = 0; b < B; b++)
      if (const int i = start + b * THREADS; i < n) v[b] = from(i / (width / 4), i % (width / 4));
    UNROLL for (int b = 0; b < B; b++)
      if (const int i = start + b * THREADS; i < n) place(rest(), width, i / (width / 4), i % (width / 4)) = v[b];
  }
  __syncthreads();
}

// the same, each row normalised by a warp; every block does so for itself, which is shorter than waiting for another
template <typename From>
__device__ void norm(int rows, int width, float eps, const float* weight, From from) {
  constexpr int B = 8;
  const int n = width / 4;
  for (int r = warp(); r < rows; r += WARPS) {
    float squares[1][1] = {};
    for (int start = lane(); start < n; start += B * 32) {
      float4 v[B], w[B];
      UNROLL for (int b = 0; b < B; b++)
        if (const int c = start + b * 32; c < n) v[b] = from(r, c), w[b] = __ldg((const float4*)weight + c);
      UNROLL for (int b = 0; b < B; b++)
        if (const int c = start + b * 32; c < n) {
          squares[0][0] += v[b].x * v[b].x + v[b].y * v[b].y + v[b].z * v[b].z + v[b].w * v[b].w;
          place(rest(), width, r, c) = {v[b].x * w[b].x, v[b].y * w[b].y, v[b].z * w[b].z, v[b].w * w[b].w};
        }
    }
    reduce(squares);
    const float scale = 1 / sqrtf(squares[0][0] / width + eps);
    for (int c = lane(); c < n; c += 32) {
      float4& v = place(rest(), width, r, c);
      v = {v.x * scale, v.y * scale, v.z * scale, v.w * scale};
    }
  }
  __syncthreads();
}

// a lane's sums of R rows x · G rows of weights, over the pieces from … to
template <int R, int G>
__device__ void multiply(const float4* x, int pieces, const W* const (&at)[G], int from, int to, float (&sums)[G][R]) {
  constexpr int B = (R * G <= 8 ? 4 : R * G <= 16 ? 3 : 2) / PIECE;  // pieces under way
  for (int start = from + lane(); start < to; start += 32 * B) {
    uint4 raw[B][G][PIECE];
    UNROLL for (int b = 0; b < B; b++) UNROLL for (int g = 0; g < G; g++) UNROLL for (int v = 0; v < PIECE; v++)
      if (const int i = start + 32 * b; i < to) raw[b][g][v] = __ldg((const uint4*)at[g] + i * PIECE + v);
    UNROLL for (int b = 0; b < B; b++) {
      const int i = start + 32 * b;
      if (i >= to) break;
      UNROLL for (int r = 0; r < R; r++) {
        const float4 p = x[2 * r * pieces + i], q = x[(2 * r + 1) * pieces + i];
        const float numbers[8] = {p.x, p.y, p.z, p.w, q.x, q.y, q.z, q.w};
        UNROLL for (int g = 0; g < G; g++) UNROLL for (int j = 0; j < 8; j++)
          sums[g][r] = __fmaf_rn(weight(raw[b][g], j), numbers[j], sums[g][r]);
      }
    }
  }
}

// R rows x · all rows of weights, in groups of G that lie `apart`: `then(row, first of the group, sums)` is told each
// result. Where groups are fewer than warps, several warps of a block each multiply a part.
template <int R, int G, typename Then>
__device__ void groups(const float4* x, int width, const W* weights, int n, int apart, Then then) {
  const int pieces = width / 8, n_groups = (n + G * apart - 1) / (G * apart) * apart, row = lane() / (32 / R);
  int parts = 1;
  while (2 * parts <= smaller(WARPS, 8) && n_groups * 2 * parts <= gridDim.x * WARPS && pieces >= 2 * parts * LEAST) parts *= 2;
  const int share = (pieces + parts - 1) / parts, part = warp() % parts, per_block = WARPS / parts;
  const bool leads = lane() % (32 / R) == 0;
  auto column = [=](int group) { return group / apart * (G * apart) + group % apart; };
  for (int begin = blockIdx.x * per_block; begin < n_groups; begin += gridDim.x * per_block) {
    const int group = begin + warp() / parts;
    float sums[G][R] = {};
    if (group < n_groups) {
      const W* at[G];
      UNROLL for (int g = 0; g < G; g++) at[g] = weights + (int64)smaller(column(group) + g * apart, n - 1) * width;
      multiply<R, G>(x, pieces, at, part * share, smaller(pieces, (part + 1) * share), sums);
      reduce(sums);
    }
    float result[G];
    UNROLL for (int g = 0; g < G; g++) result[g] = sums[g][0];
    if (parts == 1) {
      if (leads && group < n_groups) then(row, column(group), result);
      continue;
    }
    if (leads) UNROLL for (int g = 0; g < G; g++) partial()[(warp() * G + g) * R + row] = result[g];
    __syncthreads();
    for (int i = threadIdx.x; i < per_block * R; i += THREADS) {
      const float* from = partial() + i / R * parts * G * R + i % R;
      UNROLL for (int g = 0; g < G; g++) result[g] = from[g * R];
      for (int p = 1; p < parts; p++) UNROLL for (int g = 0; g < G; g++) result[g] += from[(p * G + g) * R];
      if (begin + i / R < n_groups) then(i % R, column(begin + i / R), result);
    }
    __syncthreads();
  }
}

// the rows in shared memory · (n, width) weights
template <int G, typename Then>
__device__ void product(int rows, int width, const W* weights, int n, int apart, Then then) {
  for (int begin = 0; begin < rows; begin += MANY) {
    const float4* x = rest() + begin * (width / 4);
    auto known = [=](int row, int column, const float (&sums)[G]) {
      if (begin + row < rows) then(begin + row, column, sums);
    };
    if (rows - begin == 1) groups<1, G>(x, width, weights, n, apart, known);
    else if (rows - begin == 2) groups<2, G>(x, width, weights, n, apart, known);
    else if (rows - begin <= 4) groups<4, G>(x, width, weights, n, apart, known);
    else groups<8, G>(x, width, weights, n, apart, known);
  }
}

// one block for each head of each row: scores, their softmax, values
__device__ void attend(const Model& m, const float* keys, const float* values, int rows, int start) {
  constexpr int B = 4;
  const int H = m.n_heads, D = m.head_size;
  float *q = (float*)rest(), *sums = q + D, *scores = sums + WARPS * D;
  for (int i = blockIdx.x; i < rows * H; i += gridDim.x) {
    const int n = start + i / H + 1;  // keys that the row sees
    const int64 head = (i % H) / (H / m.n_kv_heads) * m.capacity * D;
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += THREADS) q[d] = __ldcg(m.queries + i * D + d);
    __syncthreads();
    float highest = LOWEST;
    for (int key = warp() * B; key < n; key += WARPS * B) {
      float score[1][B] = {};
      for (int d = 2 * lane(); d < D; d += 64) {
        float2 k[B];
        UNROLL for (int b = 0; b < B; b++)
          k[b] = __ldcg((const float2*)(keys + head + (int64)smaller(key + b, n - 1) * D + d));
        UNROLL for (int b = 0; b < B; b++) score[0][b] = __fmaf_rn(q[d + 1], k[b].y, __fmaf_rn(q[d], k[b].x, score[0][b]));
      }
      reduce(score);
      const int mine = key + lane() / (32 / B);
      if (lane() % (32 / B) == 0 && mine < n) scores[mine] = score[0][0];
      if (mine < n) highest = fmaxf(highest, score[0][0]);
    }
    highest = most(highest);
    float total = 0;
    for (int key = threadIdx.x; key < n; key += THREADS) total += scores[key] = expf(scores[key] - highest);
    total = sum(total);
    for (int d = 2 * lane(); d < D; d += 64) {
      float2 y = {0, 0};
      for (int key = warp(); key < n; key += WARPS * B) {
        float2 v[B];
        UNROLL for (int b = 0; b < B; b++)
          v[b] = __ldcg((const float2*)(values + head + (int64)smaller(key + b * WARPS, n - 1) * D + d));
        UNROLL for (int b = 0; b < B; b++) {
          const float p = key + b * WARPS < n ? scores[key + b * WARPS] : 0;
          y = {__fmaf_rn(p, v[b].x, y.x), __fmaf_rn(p, v[b].y, y.y)};
        }
      }
      sums[warp() * D + d] = y.x, sums[warp() * D + d + 1] = y.y;
    }
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += THREADS) {
      float y = 0;
      for (int w = 0; w < WARPS; w++) y += sums[w * D + d];
      m.mixed[i * D + d] = y / total;
    }
  }
}

// R tokens after `start` others; the logits of those from the `wanted`-th on, unless there is no place for them
__device__ void pass(const Model& m, float* keys, float* values, const int64* ids, int rows, int start, int wanted, float* logits) {
  const int C = m.width, F = m.hidden, H = m.n_heads, K = m.n_kv_heads, D = m.head_size, half = D / 2, N = m.n_offered;
  const int64 cached = (int64)K * m.capacity * D;  // numbers of a layer
  const float factor = 1 / sqrtf(D), eps = m.norm_eps;
  auto embedded = [&](int r, int c) {
    const int64 id = __ldcg(ids + r);
    return four(m.embedding + (id < 0 ? 0 : id < m.n_ids ? id : m.n_ids - 1) * C + 4 * c);
  };
  auto residual = [&](int r, int c) { return __ldcg((const float4*)(m.x + r * C) + c); };
  auto onto = [&](int r, int column, const float (&sums)[2]) {
    for (int g = 0, c = column; g < 2 && c < C; g++, c += C / 2) m.x[r * C + c] = __ldcg(m.x + r * C + c) + sums[g];
  };
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < rows * (C / 4); i += gridDim.x * THREADS)
    ((float4*)m.x)[i] = embedded(i / (C / 4), i % (C / 4));
  for (int l = 0; l < m.n_layers; l++) {
    const Layer& layer = m.layers[l];
    if (l == 0) norm(rows, C, eps, layer.attention_norm, embedded);
    else norm(rows, C, eps, layer.attention_norm, residual);
    product<2>(rows, C, layer.qkv, (H + 2 * K) * D, half, [&](int r, int column, const float (&sums)[2]) {
      const int head = column / D, d = column % D, position = start + r;
      float a = sums[0], b = sums[1];
      if (head < H + K) {
        const float cos = __ldg(m.cos + position * half + d), sin = __ldg(m.sin + position * half + d);
        a = sums[0] * cos - sums[1] * sin, b = sums[1] * cos + sums[0] * sin;
      }
      float* to = m.queries + (r * H + head) * D + d;
      if (head < H) a *= factor, b *= factor;
      else if (head < H + K) to = keys + l * cached + ((int64)(head - H) * m.capacity + position) * D + d;
      else to = values + l * cached + ((int64)(head - H - K) * m.capacity + position) * D + d;
      to[0] = a, to[half] = b;
    });
    meet(m.meeting, [&] { ahead(layer.out, (int64)C * C), ahead(layer.up, (int64)F * C); });
    attend(m, keys + l * cached, values + l * cached, rows, start);
    meet(m.meeting, [&] { ahead(layer.down, (int64)F * C); });
    stage(rows, C, [&](int r, int c) { return __ldcg((const float4*)(m.mixed + r * C) + c); });
    product<2>(rows, C, layer.out, C, C / 2, onto);
    meet(m.meeting, [&] {
      if (l + 1 < m.n_layers) ahead(m.layers[l + 1].qkv, (int64)(H + 2 * K) * D * C);
      else if (logits) ahead(m.head, (int64)smaller(N, 8192) * C);
    });
    norm(rows, C, eps, layer.mlp_norm, residual);
    product<2>(rows, C, layer.up, F, F / 2, [&](int r, int column, const float (&sums)[2]) {
      for (int g = 0; g < 2; g++) {
        const float v = sums[g];
        m.inner[r * F + column + g * (F / 2)] = m.squared ? (v < 0 ? 0 * v : v * v) : v * 0.5f * (1 + erff(v * 0.70710678f));
      }
    });
    meet(m.meeting, [] {});
    stage(rows, F, [&](int r, int c) { return __ldcg((const float4*)(m.inner + r * F) + c); });
    product<2>(rows, F, layer.down, C, C / 2, onto);
    meet(m.meeting, [] {});
  }
  if (!logits) return;
  norm(rows - wanted, C, eps, m.norm, [&](int r, int c) { return residual(wanted + r, c); });
  product<4>(rows - wanted, C, m.head, N, (N + 3) / 4, [&](int r, int column, const float (&sums)[4]) {
    for (int g = 0, c = column; g < 4 && c < N; g++, c += (N + 3) / 4) logits[(int64)r * N + c] = sums[g];
  });
}

// `work(i, load(i))` for a warp's share of n numbers, several under way
template <typename Load, typename Work>
__device__ void each(int n, Load load, Work work) {
  constexpr int B = 8;
  const int share = (n + WARPS - 1) / WARPS, end = smaller(n, (warp() + 1) * share);
  for (int i = warp() * share + lane(); i < end; i += 32 * B) {
    float v[B];
    UNROLL for (int b = 0; b < B; b++) if (i + 32 * b < end) v[b] = load(i + 32 * b);
    UNROLL for (int b = 0; b < B; b++) if (i + 32 * b < end) work(i + 32 * b, v[b]);
  }
}

// logits (n) → probabilities, as sampling.Sampling without filters, by one block; a row that is not finite becomes NaN
__device__ void probabilities(const float* logits, int n, double temperature, float* probs) {
  auto load = [=](int i) { return __ldcg(logits + i); };
  const float divisor = temperature > 1.17549435e-38 ? (float)temperature : 1.17549435e-38f;
  float highest = LOWEST, total = 0;
  each(n, load, [&](int, float v) { highest = fmaxf(highest, v), total += v; });
  highest = most(highest), total = sum(total);
  if (!isfinite(total)) {
    each(n, load, [=](int i, float) { probs[i] = total - total; });  // a NaN either way
  } else if (temperature == 0) {
    int at = n;
    each(n, load, [&](int i, float v) { if (v == highest) at = smaller(at, i); });
    at = first(at);
    each(n, load, [=](int i, float) { probs[i] = i == at; });
  } else {
    total = 0;
    each(n, load, [&](int i, float v) { total += probs[i] = expf((v - highest) / divisor); });
    const float scale = 1 / sum(total);
    each(n, [=](int i) { return probs[i]; }, [=](int i, float v) { probs[i] = v * scale; });  // each thread its own
  }
  __syncthreads();
}

// One index out of n probabilities, or what is proportional to them, for a uniform number, by inversion in float64, as
// sampling.Randomness; n for NaN. By one block: which warp's share is it in, then which number of that share.
template <typename Load>
__device__ int choose(Load load, int n, double number) {
  const int share = (n + WARPS - 1) / WARPS;
  double own = 0, total = 0, before = 0;
  each(n, load, [&](int, float v) { own += v; });
  for (int offset = 16; offset; offset /= 2) own += __shfl_xor_sync(ALL, own, offset);
  __syncthreads();
  if (lane() == 0) scratch()[warp()] = own;
  __syncthreads();
  for (int w = 0; w < WARPS; w++) total += scratch()[w];
  if (!(total > 0)) return n;
  const double wanted = number * total;
  int chosen = 0;
  double sums = 0;
  for (int w = 0; w < WARPS && sums <= wanted; w++) {
    const double part = scratch()[w];
    if (part > 0) chosen = w, before = sums;
    sums += part;
  }
  const int end = smaller(n, (chosen + 1) * share), some = (share + THREADS - 1) / THREADS;
  const int from = smaller(end, chosen * share + (int)threadIdx.x * some), to = smaller(end, from + some);
  own = 0;
  for (int i = from; i < to; i++) own += load(i);
  double up_to = own;  // over lanes up to this one
  for (int offset = 1; offset < 32; offset *= 2) {
    const double other = __shfl_up_sync(ALL, up_to, offset);
    if (lane() >= offset) up_to += other;
  }
  __syncthreads();
  if (lane() == 31) scratch()[warp()] = up_to;
  __syncthreads();
  for (int w = 0; w < warp(); w++) before += scratch()[w];
  before += up_to - own;
  int found = n, last = -1;  // where sums round differently than the total, the last that has a probability
  for (int i = from; i < to; i++) {
    const float v = load(i);
    before += v;
    if (v > 0) last = i;
    if (v > 0 && before > wanted && found == n) found = i;
  }
  found = first(found), last = -first(-last);
  return found < n ? found : last;
}

}  // namespace

extern "C" {

// R tokens are read; then n are drawn, each for one of the numbers, of which all but the last are read too. If n is 0 the
// logits (R, N) are written, unless null.
__global__ void __launch_bounds__(THREADS, 1)
specdec_run(const __grid_constant__ Model m, float* keys, float* values, const int64* ids, int rows, int start, float* logits,
            int n, double temperature, const double* numbers, int64* tokens, float* probs) {
  const int n_choices = m.n_choices;
  for (int i = 0; i == 0 || i < n; i++) {
    pass(m, keys, values, ids, rows, start, n ? rows - 1 : 0, n ? m.logits : logits);
    if (n == 0) return;
    meet(m.meeting, [] {});
    if (blockIdx.x == 0) {
      float* row = probs + (int64)i * n_choices;
      probabilities(m.logits, n_choices, temperature, row);
      const int token = choose([=](int j) { return row[j]; }, n_choices, numbers[i]);
      const int known = smaller(token, n_choices - 1);  // after a row of NaN, which the engine sees itself
      if (threadIdx.x == 0) tokens[i] = token, *m.next = m.offered ? m.offered[known] : known;
    }
    if (i + 1 < n) meet(m.meeting, [] {});
    ids = m.next, start += rows, rows = 1;
  }
}

// logits whose rows lie `stride` apart → probs (rows, n), a block for each row
__global__ void __launch_bounds__(THREADS, 1)
specdec_probabilities(const float* logits, int64 stride, int n, double temperature, float* probs) {
  probabilities(logits + blockIdx.x * stride, n, temperature, probs + (int64)blockIdx.x * n);
}

// the rule sampling.token_wise, by one block; numbers (k+1)
__global__ void __launch_bounds__(THREADS, 1)
specdec_decide(const int64* drafted, const float* q, const float* p, const double* numbers, int k, int n, int64* decision) {
  int accepted = k;
  for (int i = k - 1 - (int)threadIdx.x; i >= 0; i -= THREADS)
    if (!(numbers[i] < (double)(p[(int64)i * n + drafted[i]] / q[(int64)i * n + drafted[i]]))) accepted = i;
  accepted = first(accepted);
  p += (int64)accepted * n, q += (int64)accepted * n;
  const double number = numbers[k];
  bool covered = true;  // nothing of p is left
  int following = n;
  if (accepted < k) {
    auto left = [=](int i) { const float v = __ldg(p + i) - __ldg(q + i); return v < 0 ? 0.f : v; };  // a NaN stays one
    each(n, left, [&](int, float v) { covered = covered && v == 0; });
    covered = !__syncthreads_or(!covered);
    if (!covered) following = choose(left, n, number);
  }
  if (covered) following = choose([=](int i) { return __ldg(p + i); }, n, number);
  if (threadIdx.x == 0) decision[0] = accepted, decision[1] = following;
}
}
