// Drafts of a model whose layers fit into the shared memory of one cluster of blocks; compiled together with native.cu and
// sampling.cu.
//
// A pass of a small model takes no time but for waiting: of all blocks for each other, some five times a layer. Here the
// blocks of a cluster keep the rows of a layer between them from token to token, put what they compute where the others
// need it, and wait for nothing else. Every cluster computes the same, and only the output layer is divided among all of
// them, so that the whole GPU meets once a token.
//
// Instructions are to stay in the multiprocessor's cache from token to token: fetched anew, a line of eight takes as long as
// all that they do. So there is one code for all products of a layer, loops are not unrolled, and tables are made of what
// would take divisions.
//
// What a block is given passes a gate that counts bytes. Nobody passes before all blocks have given all of their part, and
// they compute it from what was given before; so nothing is overwritten that somebody still reads.

#ifndef KEYS
#define KEYS 4  // of a warp at once
#endif

#ifdef __CUDA_ARCH__
__device__ int cluster_size() { int n; asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(n)); return n; }
__device__ int cluster_rank() { int n; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(n)); return n; }
__device__ void meet_cluster() { asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory"); }
__device__ unsigned shared(const void* at) { return __cvta_generic_to_shared(at); }
// from a place in this block's shared memory to the same in another's
__device__ unsigned distance(int block) {
  unsigned to;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared(memory)), "r"(block));
  return to - shared(memory);
}
__device__ void give(float* at, unsigned distance, float value, int64* gate) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];"
               ::"r"(shared(at) + distance), "f"(value), "r"(shared(gate) + distance) : "memory");
}
__device__ void give(float2* at, unsigned distance, float2 value, int64* gate) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
               ::"r"(shared(at) + distance), "f"(value.x), "f"(value.y), "r"(shared(gate) + distance) : "memory");
}
__device__ void build(int64* gate) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(shared(gate)) : "memory");
}
__device__ void expect(int64* gate, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared(gate)), "r"(bytes) : "memory");
}
__device__ bool passes(int64* gate, int parity) {
  int there;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.s32 %0, 1, 0, p; }"
               : "=r"(there) : "r"(shared(gate)), "r"(parity) : "memory");
  return there;
}
__device__ void copy(uint4* to, const uint4* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared(to)), "l"(from) : "memory");
}
__device__ void copied() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif

namespace {

enum { QUERY, PARTS, MIDDLE, INNER, END, GATES };  // what blocks give each other in a layer

// rows of weights into shared memory; row(i) is where the i-th lies
template <typename Row>
__device__ void keep(bfloat16* to, int n_rows, int width, Row row) {
  AS_IT_IS for (int i = warp(); i < n_rows; i += WARPS) {
    const uint4* const from = (const uint4*)row(i);
    AS_IT_IS for (int j = lane(); j < width / 8; j += 32) copy((uint4*)to + i * (width / 8) + j, from + j);
  }
}

// adds to sums the products of eight numbers and as many weights of two rows
__device__ void add_products(float (&sums)[2], const float (&numbers)[8], uint4 one, uint4 other) {
  const unsigned raw[2][4] = {{one.x, one.y, one.z, one.w}, {other.x, other.y, other.z, other.w}};
  UNROLL for (int j = 0; j < 8; j++) UNROLL for (int r = 0; r < 2; r++)
    sums[r] = __fmaf_rn(j % 2 ? second_of(raw[r][j / 2]) : first_of(raw[r][j / 2]), numbers[j], sums[r]);
}

}  // namespace

extern "C" {

// One or two tokens are read, then n are drawn, each for one of the numbers, of which all but the last are read too. These are
// ids of the whole vocabulary, as are the rows (n, n_ids). The epoch is larger by n with each launch.
__global__ void __launch_bounds__(THREADS, 1)
specdec_draft(const __grid_constant__ Model model, float* keys, float* values, int64 first, int64 second, int rows, int start,
              int n, double temperature, const double* numbers, int64* tokens, float* probs, int n_ids, int epoch) {
  AS_IT_IS for (int i = threadIdx.x; i < sizeof m / 8; i += THREADS) ((int64*)&m)[i] = ((const int64*)&model)[i];
  __syncthreads();
  const int blocks = cluster_size(), rank = cluster_rank();
  const int L = m.n_layers, C = m.width, F = m.hidden, D = m.head_size, H = m.n_heads, K = m.n_kv_heads, Q = (H + 2 * K) * D;
  const int G = H / K, n_parts = blocks / K, kv = rank % K, part = rank / K;  // a block has every n_parts-th key of a head
  // of these a warp has every n_groups-th, for one of the heads that share them
  const int n_groups = WARPS / G, group = warp() / G, shared_head = warp() % G;
  const int pairs = Q / 2 / blocks, own = C / blocks, inner_own = F / blocks;  // rows of this block
  const float eps = m.norm_eps;
  const int capacity = m.capacity;
  const Slice slice(m.n_choices, blockIdx.x, gridDim.x);
  // what this block offers lies between its first id and the next block's
  auto id_of = [=](int choice) { return m.offered ? (int)__ldg(m.offered + choice) : choice; };
  const int lowest = slice.from ? id_of(smaller(slice.from, m.n_choices - 1)) : 0;
  const int beyond = slice.from + slice.n < m.n_choices ? id_of(slice.from + slice.n) : n_ids;

  int64* const gates = (int64*)(memory + 28);
  bfloat16* const kept = (bfloat16*)(memory + 32);
  const int of_out = 2 * pairs * C, of_up = of_out + own * C, of_down = of_up + inner_own * C, of_layer = of_down + own * F;
  float* const gains = (float*)(kept + L * of_layer);
  float* const x = gains + (2 * L + 1) * C;
  float* const qkv = x + C;  // queries, keys, values
  float* const mixed = qkv + Q;
  float* const inner = mixed + C;
  unsigned* const split_x = (unsigned*)inner;  // (3, C/2), after all layers: what x is the sum of, in bfloat16
  const int of_part = G * (D + 2);
  float* const parts = inner + F;  // (K, n_parts, G, D+2): of some keys the sum of values, the highest score, the weight
  float* const of_warps = parts + (K * n_parts * of_part + 3) / 4 * 4;  // (n_groups, G, D+2), likewise
  float* const logits = of_warps + (n_groups * of_part + 3) / 4 * 4;
  int4* const turns = (int4*)(logits + (slice.each + 3) / 4 * 4);  // of each pair its column, of that the number in its head,
                                                                  // 0 for queries, 1 keys, 2 values, and where in the cache
  int4* const products = turns + pairs;  // of each two: where weights lie, how many pairs of rows, where numbers lie, how many
                                         // times eight; gains or -1, where what comes out belongs, the gate, its bytes
  float* const angles = (float*)(products + 8);  // cos and sin of the position
  int2* const sources = (int2*)(angles + D);  // of each number of `mixed` where its head is in parts, and its number there
  int* const offered = (int*)(sources + C);  // ids of the slice

  AS_IT_IS for (int pair = threadIdx.x; pair < pairs; pair += THREADS) {
    const unsigned all = rank * pairs + pair, head = all / (D / 2u), at = all - head * (D / 2);
    const int kind = head < H ? 0 : head < H + K ? 1 : 2;
    turns[pair] = {(int)(head * D + at), (int)at, kind, (int)(((int)head - H - (kind == 2 ? K : 0)) * capacity * D + at)};
  }
  AS_IT_IS for (int c = threadIdx.x; c < C; c += THREADS) {
    const unsigned head = (unsigned)c / D, of_keys = head / G;
    sources[c] = {(int)(of_keys * n_parts * of_part + (head - of_keys * G) * (D + 2)), (int)(c - head * D)};
  }
  AS_IT_IS for (int j = threadIdx.x; j < slice.n; j += THREADS) offered[j] = id_of(slice.from + j);
  if (threadIdx.x == 0) {
    auto place = [](const float* at) { return (int)(at - (const float*)memory); };
    auto set = [=](int kind, int weights, int n_rows, const float* from, int width, int of_gains, const float* to, int gate, int n) {
      products[2 * kind] = {weights / 8, n_rows / 2, place(from), width / 8};
      products[2 * kind + 1] = {of_gains, place(to), gate, 4 * n};
    };
    set(QKV, 0, 2 * pairs, x, C, place(gains), qkv, QUERY, Q);
    set(OUT, of_out, own, mixed, C, -1, x + rank * own, MIDDLE, C);
    set(UP, of_up, inner_own, x, C, place(gains) + C, inner + rank * inner_own, INNER, F);
    set(DOWN, of_down, own, inner, F, -1, x + rank * own, END, C);
  }
  __syncthreads();
  AS_IT_IS for (int l = 0; l < L; l++) {
    const Layer& layer = m.layers[l];
    bfloat16* to = kept + l * of_layer;
    keep(to, 2 * pairs, C, [&](int i) { return layer.qkv + (int64)(turns[i / 2].x + i % 2 * (D / 2)) * C; });
    keep(to + of_out, own, C, [&](int i) { return layer.out + (int64)(rank * own + i) * C; });
    keep(to + of_up, inner_own, C, [&](int i) { return layer.up + (int64)(rank * inner_own + i) * C; });
    keep(to + of_down, own, F, [&](int i) { return layer.down + (int64)(rank * own + i) * F; });
    AS_IT_IS for (int c = threadIdx.x; c < C; c += THREADS) {
      gains[2 * l * C + c] = __ldg(layer.attention_norm + c), gains[(2 * l + 1) * C + c] = __ldg(layer.mlp_norm + c);
      gains[2 * L * C + c] = __ldg(m.norm + c);
    }
  }
  const int of_parts = 4 * K * n_parts * of_part;  // bytes
  if (threadIdx.x == 0) {
    UNROLL for (int gate = 0; gate < GATES; gate++) build(gates + gate);
    UNROLL for (int kind = 0; kind < 4; kind++) expect(gates + products[2 * kind + 1].z, products[2 * kind + 1].w);
    expect(gates + PARTS, of_parts);
  }
  copied();
  meet_cluster();  // all are there to be given something

  // each half of a warp gives what it has to all blocks
  const unsigned far = distance(lane() % 16 % blocks);
  const bool gives = lane() % 16 < blocks, upper = lane() >= 16;
  const float factor = LOG2E * rsqrtf(D);
  const int twos = G * D / 2, sets = THREADS / twos, set = threadIdx.x / twos;
  const int head_of_two = 2 * (threadIdx.x - set * twos) / D, two_of_head = 2 * (threadIdx.x - set * twos) - head_of_two * D;
  const bfloat16* embedded = nullptr;
  AS_IT_IS for (int i = 0; i < rows + n - 1; i++) {
    const int position = start + i, nth = i - (rows - 1);
    if (nth <= 0) {
      const int64 id = i ? second : first, known = id < 0 ? 0 : id < m.n_ids ? id : m.n_ids - 1;
      embedded = m.embedding + known * C;
    }
    AS_IT_IS for (int c = threadIdx.x; c < C / 4; c += THREADS) ((float4*)x)[c] = four(embedded + 4 * c);
    AS_IT_IS for (int d = THREADS - 1 - (int)threadIdx.x; d < D; d += THREADS)
      angles[d] = __ldg((d < D / 2 ? m.cos : m.sin - D / 2) + position * (D / 2) + d);
    __syncthreads();
    AS_IT_IS for (int step = 0; step < 4 * L; step++) {
      const int kind = step % 4, l = step / 4;
      auto pass = [=](int gate, int bytes) {
        while (!passes(gates + gate, (i * L + l) % 2)) {}
        if (threadIdx.x == 0) expect(gates + gate, bytes);  // of the next layer
        __syncwarp();  // lanes that found it open at different times go on together
      };
      const int4 what = products[2 * kind], where = products[2 * kind + 1];

      if (kind == OUT) {
        // keys and values of the tokens before are fetched while the newest come with the query
        const int d = 2 * lane();
        const bool has = d < D;
        const int apart = n_parts * n_groups, cache = (l * K + kv) * capacity * D + d;
        const float2 *const new_key = (const float2*)(qkv + (H + kv) * D + d), *const new_value = new_key + K * D / 2;
        float2 y = {0, 0};
        float highest = LOWEST, total = 0;
        int from = part + n_parts * group;
        AS_IT_IS for (bool waits = true; waits || from <= position; waits = false, from += KEYS * apart) {
          float2 k[KEYS], v[KEYS];
          UNROLL for (int b = 0; b < KEYS; b++) {
            const int key = from + b * apart;
            k[b] = v[b] = {0, 0};
            if (has && part < n_parts && key < position)
              k[b] = __ldcg((const float2*)(keys + cache + key * D)), v[b] = __ldcg((const float2*)(values + cache + key * D));
          }
          if (waits) pass(QUERY, 4 * Q);
          const float2 q = has ? *(const float2*)(qkv + (kv * G + shared_head) * D + d) : float2{0, 0};
          float scores[KEYS];
          UNROLL for (int b = 0; b < KEYS; b++) {
            if (has && from + b * apart == position) k[b] = *new_key, v[b] = *new_value;
            scores[b] = __fmaf_rn(q.y, k[b].y, q.x * k[b].x);
          }
          // a few lanes have the score of a key, and its weight in the softmax
          const float score = reduce(scores);
          const bool seen = from + lane() / (32 / KEYS) * apart <= position;
          const float top = fmaxf(highest, of_warp(seen ? score : LOWEST, Greater()));
          const float before = power_of_2(highest - top), p = seen ? power_of_2(score - top) : 0;
          highest = top, total = __fmaf_rn(total, before, p), y = {y.x * before, y.y * before};
          UNROLL for (int b = 0; b < KEYS; b++) {
            const float by = __shfl_sync(ALL, p, 32 / KEYS * b);
            y = {__fmaf_rn(by, v[b].x, y.x), __fmaf_rn(by, v[b].y, y.y)};
          }
        }
        if (part < n_parts) {
          if (group < n_groups) {
            UNROLL for (int offset = 16; offset >= 32 / KEYS; offset /= 2) total += __shfl_xor_sync(ALL, total, offset);
            float* const of_warp = of_warps + group * of_part + shared_head * (D + 2);
            if (has) *(float2*)(of_warp + d) = y;
            if (lane() == 0) *(float2*)(of_warp + D) = {highest, total};
          }
          __syncthreads();
          if (set < sets) {  // two numbers are combined in as many places as there are threads for, each for some of the blocks
            const float* const of_groups = of_warps + head_of_two * (D + 2);
            float* const mine = parts + (kv * n_parts + part) * of_part + head_of_two * (D + 2);
            float2 y = {0, 0}, all = {LOWEST, 0};  // the sum of values; the highest score, the weight
            AS_IT_IS for (int g = 0; g < n_groups; g++) all.x = fmaxf(all.x, of_groups[g * of_part + D]);
            AS_IT_IS for (int g = 0; g < n_groups; g++) {
              const float2 some = *(const float2*)(of_groups + g * of_part + two_of_head), it = *(const float2*)(of_groups + g * of_part + D);
              const float by = power_of_2(it.x - all.x);
              y = {__fmaf_rn(by, some.x, y.x), __fmaf_rn(by, some.y, y.y)}, all.y = __fmaf_rn(by, it.y, all.y);
            }
            AS_IT_IS for (int to = set; to < blocks; to += sets) {
              const unsigned off = distance(to);
              give((float2*)(mine + two_of_head), off, y, gates + PARTS);
              if (two_of_head == 0) give((float2*)(mine + D), off, all, gates + PARTS);
            }
          }
        }
        pass(PARTS, of_parts);

        // each half of a warp combines half of the parts, then all of them
        AS_IT_IS for (int begin = 16 * warp(); begin < C; begin += 16 * WARPS) {
          constexpr int MOST = 8;
          const int c = begin + lane() % 16, half = (n_parts + 1) / 2, from = upper ? half : 0, end = upper ? n_parts : half;
          const int2 source = sources[c];
          const float* const at = parts + source.x + from * of_part;
          float highest = LOWEST, y = 0, total = 0;
          UNROLL for (int b = 0; b < MOST; b++) if (from + b < end) highest = fmaxf(highest, at[b * of_part + D]);
          highest = fmaxf(highest, __shfl_xor_sync(ALL, highest, 16));
          UNROLL for (int b = 0; b < MOST; b++) if (from + b < end) {
            const float by = power_of_2(at[b * of_part + D] - highest);
            y = __fmaf_rn(by, at[b * of_part + source.y], y), total = __fmaf_rn(by, at[b * of_part + D + 1], total);
          }
          y += __shfl_xor_sync(ALL, y, 16), total += __shfl_xor_sync(ALL, total, 16);
          if (!upper) mixed[c] = __fdividef(y, total);
        }
        __syncthreads();
      }

      const float4* const from = (const float4*)((const float*)memory + what.z);
      const float4* const by = (const float4*)((const float*)memory + where.x + 2 * l * C);
      AS_IT_IS for (int pair = warp(); pair < what.y; pair += WARPS) {
        const uint4* const one = (const uint4*)(kept + l * of_layer) + what.x + 2 * pair * what.w;
        const int4 turn = turns[kind == QKV ? pair : 0];
        float* const to = (float*)memory + where.y + (kind == QKV ? turn.x + upper * (D / 2) : 2 * pair + upper);
        const float before = *to;  // all lanes know it before one of them may write
        float squares = 0, sums[2] = {};
        AS_IT_IS for (int j = lane(); j < what.w; j += 32) {
          const float4 p = from[2 * j], q = from[2 * j + 1];
          float numbers[8] = {p.x, p.y, p.z, p.w, q.x, q.y, q.z, q.w};
          if (where.x >= 0) {
            const float4 a = by[2 * j], b = by[2 * j + 1];
            const float gain[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
            UNROLL for (int e = 0; e < 8; e++) squares = __fmaf_rn(numbers[e], numbers[e], squares), numbers[e] *= gain[e];
          }
          add_products(sums, numbers, one[j], one[what.w + j]);
        }
        float v = reduce(sums);
        if (where.x >= 0) v *= rsqrtf(__fdividef(of_warp(squares, Plus()), C) + eps);
        if (kind == QKV) {
          const float other = __shfl_xor_sync(ALL, v, 16);
          if (turn.z < 2) v = v * angles[turn.y] + (upper ? other : -other) * angles[D / 2 + turn.y];
          if (turn.z == 0) v *= factor;
          else if (lane() % 16 == 0)  // every cluster writes the same, and so finds later what it wrote itself
            (turn.z == 1 ? keys : values)[(l * K * capacity + position) * D + turn.w + upper * (D / 2)] = v;
        } else v = kind == UP ? activated(v) : before + v;
        if (gives) give(to, far, v, gates + where.z);
      }
      if (kind != QKV) pass(where.z, where.w);
    }
    if (nth < 0) continue;

    float* const row = probs + (int64)nth * n_ids;
    if (slice.n) AS_IT_IS for (int j = lowest + threadIdx.x; j < beyond; j += THREADS) row[j] = 0;
    // x as three sums of bfloat16 for tensor cores, whose columns they are
    AS_IT_IS for (int begin = 32 * warp(); begin < C / 2; begin += THREADS) {
      float squares = 0;
      AS_IT_IS for (int c = lane(); c < C; c += 32) squares = __fmaf_rn(x[c], x[c], squares);
      const float scale = rsqrtf(__fdividef(of_warp(squares, Plus()), C) + eps);
      if (const int two = begin + lane(); two < C / 2) {
        const float2 v = ((const float2*)x)[two], gain = ((const float2*)(gains + 2 * L * C))[two];
        unsigned three[3];
        split(v.x * scale * gain.x, v.y * scale * gain.y, three);
        UNROLL for (int s = 0; s < 3; s++) split_x[s * (C / 2) + two] = three[s];
      }
    }
    __syncthreads();
    const int g = lane() / 4, t = lane() % 4;
    const uint4* const column = (const uint4*)(split_x + smaller(g, 2) * (C / 2)) + t;
    AS_IT_IS for (int r = 16 * warp(); r < slice.n; r += 16 * WARPS) {
      constexpr int B = 4;
      const uint4* const at = (const uint4*)(m.head + (int64)(slice.from + smaller(r + g, slice.n - 1)) * C) + t;
      const uint4* const below = (const uint4*)(m.head + (int64)(slice.from + smaller(r + g + 8, slice.n - 1)) * C) + t;
      float sums[4] = {};
      AS_IT_IS for (int j = 0; j < C / 8; j += 4 * B) {
        uint4 raw[B][2];
        UNROLL for (int b = 0; b < B; b++)
          raw[b][0] = stream(at + j + 4 * b, j + 4 * b < C / 8), raw[b][1] = stream(below + j + 4 * b, j + 4 * b < C / 8);
        UNROLL for (int b = 0; b < B; b++) if (j + 4 * b < C / 8) {
          const uint4 numbers = column[j + 4 * b];
          tensor(sums, raw[b][0].x, raw[b][1].x, raw[b][0].y, raw[b][1].y, numbers.x, numbers.y);
          tensor(sums, raw[b][0].z, raw[b][1].z, raw[b][0].w, raw[b][1].w, numbers.z, numbers.w);
        }
      }
      // the third column is the next lane's
      const float one = sums[0] + sums[1] + __shfl_xor_sync(ALL, sums[0], 1), other = sums[2] + sums[3] + __shfl_xor_sync(ALL, sums[2], 1);
      if (t == 0 && r + g < slice.n) logits[r + g] = one;
      if (t == 0 && r + g + 8 < slice.n) logits[r + g + 8] = other;
    }
    __syncthreads();
    const int token = draw<8>(logits, slice, temperature, __ldg(numbers + nth), epoch + nth,
                              [=](int choice, float p) { row[offered[choice - slice.from]] = p; });
    const int choice = smaller(token, m.n_choices - 1);  // after a row of NaN, which the engine sees itself
    embedded = m.drawn + (int64)choice * C;
    if (blockIdx.x == 0 && threadIdx.x == 0) tokens[nth] = token < m.n_choices ? id_of(token) : n_ids;
  }
}
}
