// Drafts of a model whose layers fit into the shared memory of one cluster of blocks; compiled together with native.cu and
// sampling.cu.
//
// A pass of a small model takes no time but for waiting: of all blocks for each other, some five times a layer. Here the
// blocks of a cluster keep the rows of a layer between them from token to token, put what they compute where the others
// need it, and wait for nothing else. Every cluster computes the same, and only the output layer is divided among all of
// them, so that the whole GPU meets once a token.
//
// What a block is given passes a gate that counts bytes. Nobody passes before all blocks have given all of their part, and
// they compute it from what was given before; so nothing is overwritten that somebody still reads.

#ifndef KEYS
#define KEYS 4  // of a warp, most
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
constexpr int HEADS = 4;  // that share keys, most

// rows of weights into shared memory; row(i) is where the i-th lies
template <typename Row>
__device__ void keep(bfloat16* to, int n_rows, int width, Row row) {
  const int pieces = width * (int)sizeof(bfloat16) / 16;
  AS_IT_IS for (int i = threadIdx.x; i < n_rows * pieces; i += THREADS)
    copy((uint4*)to + i, (const uint4*)row(i / pieces) + i % pieces);
}

// G rows of weights, of which piece(g, i) is the i-th vector of the g-th, · x; with NORM of x normalised, with gains. A lane
// gets the sum of row lane/(32/G).
template <int G, bool NORM, typename Piece>
__device__ float dot(Piece piece, const float* x, const float* gains, int width, float eps) {
  float squares = 0, sums[G] = {};
  AS_IT_IS for (int i = lane(); i < width / 8; i += 32) {
    uint4 raw[G];
    UNROLL for (int g = 0; g < G; g++) raw[g] = piece(g, i);
    const float4 p = ((const float4*)x)[2 * i], q = ((const float4*)x)[2 * i + 1];
    float numbers[8] = {p.x, p.y, p.z, p.w, q.x, q.y, q.z, q.w};
    if (NORM) {
      const float4 a = ((const float4*)gains)[2 * i], b = ((const float4*)gains)[2 * i + 1];
      const float by[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
      UNROLL for (int j = 0; j < 8; j++) squares = __fmaf_rn(numbers[j], numbers[j], squares), numbers[j] *= by[j];
    }
    UNROLL for (int j = 0; j < 8; j++) UNROLL for (int g = 0; g < G; g++) {
      const unsigned two = j / 2 == 0 ? raw[g].x : j / 2 == 1 ? raw[g].y : j / 2 == 2 ? raw[g].z : raw[g].w;
      sums[g] = __fmaf_rn(j % 2 ? second_of(two) : first_of(two), numbers[j], sums[g]);
    }
  }
  const float sum = reduce(sums);
  if (!NORM) return sum;
  return sum * rsqrtf(__fdividef(of_warp(squares, Plus()), width) + eps);
}

}  // namespace

extern "C" {

// One or two tokens are read, then n are drawn, each for one of the numbers, of which all but the last are read too. These are
// ids of the whole vocabulary, as are the rows (n, n_ids). The epoch is larger by n with each launch.
__global__ void __launch_bounds__(THREADS, 1)
specdec_draft(const __grid_constant__ Model model, float* keys, float* values, int64 first, int64 second, int rows, int start,
              int n, double temperature, const double* numbers, int64* tokens, float* probs, int n_ids, int epoch) {
  for (int i = threadIdx.x; i < sizeof m / 8; i += THREADS) ((int64*)&m)[i] = ((const int64*)&model)[i];
  __syncthreads();
  const int blocks = cluster_size(), rank = cluster_rank();
  const int L = m.n_layers, C = m.width, F = m.hidden, D = m.head_size, H = m.n_heads, K = m.n_kv_heads, Q = (H + 2 * K) * D;
  const int G = H / K, n_parts = blocks / K, kv = rank % K, part = rank / K;  // a block has every n_parts-th key of a head
  const int pairs = Q / 2 / blocks, own = C / blocks, inner_own = F / blocks;  // rows of this block
  const float eps = m.norm_eps;
  const int64 capacity = m.capacity;
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
  const int of_part = G * (D + 2);
  float* const parts = inner + F;  // (K, n_parts, G, D+2): of some keys the sum of values, the highest score, the weight
  float* const of_warps = parts + (K * n_parts * of_part + 3) / 4 * 4;  // (WARPS, G, D+2), likewise
  float* const logits = of_warps + WARPS * of_part;
  int4* const turns = (int4*)(logits + (slice.each + 3) / 4 * 4);  // of each pair its column, of that the number in its head,
                                                                  // 0 for queries, 1 keys, 2 values, and which K
  float* const angles = (float*)(turns + pairs);  // cos and sin of the position
  int2* const sources = (int2*)(angles + D);  // of each number of `mixed` where its head is in parts, and its number there
  int* const offered = (int*)(sources + C);  // ids of the slice

  auto column = [=](int pair) { return (rank * pairs + pair) / (D / 2) * D + (rank * pairs + pair) % (D / 2); };
  for (int pair = threadIdx.x; pair < pairs; pair += THREADS) {
    const int at = column(pair), head = at / D;
    turns[pair] = {at, at % D, head < H ? 0 : head < H + K ? 1 : 2, (head - H + K) % K};
  }
  for (int c = threadIdx.x; c < C; c += THREADS) sources[c] = {c / D / G * n_parts * of_part + c / D % G * (D + 2), c % D};
  for (int j = threadIdx.x; j < slice.n; j += THREADS) offered[j] = id_of(slice.from + j);
  AS_IT_IS for (int l = 0; l < L; l++) {
    const Layer& layer = m.layers[l];
    bfloat16* to = kept + l * of_layer;
    keep(to, 2 * pairs, C, [&](int i) { return layer.qkv + (int64)(column(i / 2) + i % 2 * (D / 2)) * C; });
    keep(to + of_out, own, C, [&](int i) { return layer.out + (int64)(rank * own + i) * C; });
    keep(to + of_up, inner_own, C, [&](int i) { return layer.up + (int64)(rank * inner_own + i) * C; });
    keep(to + of_down, own, F, [&](int i) { return layer.down + (int64)(rank * own + i) * F; });
  }
  AS_IT_IS for (int i = threadIdx.x; i < (2 * L + 1) * C; i += THREADS) {
    const Layer& layer = m.layers[smaller(i / (2 * C), L - 1)];
    gains[i] = __ldg((i / C == 2 * L ? m.norm : i / C % 2 ? layer.mlp_norm : layer.attention_norm) + i % C);
  }
  auto bytes = [=](int gate) { return 4 * (gate == QUERY ? Q : gate == PARTS ? K * n_parts * of_part : gate == INNER ? F : C); };
  if (threadIdx.x == 0) for (int gate = 0; gate < GATES; gate++) build(gates + gate), expect(gates + gate, bytes(gate));
  copied();
  meet_cluster();  // all are there to be given something

  // a lane gives what it has to some of the blocks: of each half, or each fourth, to all of them together
  const unsigned far = distance(lane() % 16 % blocks), near = distance(lane() % 8 % blocks),
                 next = distance((lane() % 8 + 8) % blocks);
  const bool gives = lane() % 16 < blocks, gives_near = lane() % 8 < blocks, gives_next = lane() % 8 + 8 < blocks;
  const bool upper = lane() >= 16;
  const float factor = LOG2E * rsqrtf(D);
  const int first_head = threadIdx.x / D;
  const bfloat16* embedded = nullptr;
  AS_IT_IS for (int i = 0; i < rows + n - 1; i++) {
    const int position = start + i, nth = i - (rows - 1);
    const double number = nth < 0 ? 0 : __ldg(numbers + nth);
    if (nth <= 0) {
      const int64 id = i ? second : first, known = id < 0 ? 0 : id < m.n_ids ? id : m.n_ids - 1;
      embedded = m.embedding + known * C;
    }
    for (int c = threadIdx.x; c < C / 4; c += THREADS) ((float4*)x)[c] = four(embedded + 4 * c);
    for (int d = THREADS - 1 - (int)threadIdx.x; d < D; d += THREADS)
      angles[d] = d < D / 2 ? __ldg(m.cos + position * (D / 2) + d) : __ldg(m.sin + position * (D / 2) + d - D / 2);
    __syncthreads();
    AS_IT_IS for (int l = 0; l < L; l++) {
      const bfloat16* const weights = kept + l * of_layer;
      const int64 cache = l * K * capacity * D;
      const int parity = (i * L + l) % 2;
      auto pass = [=](int gate) {
        while (!passes(gates + gate, parity)) {}
        if (threadIdx.x == 0) expect(gates + gate, bytes(gate));  // of the next layer
        __syncwarp();  // lanes that found it open at different times go on together
      };

      AS_IT_IS for (int pair = warp(); pair < pairs; pair += WARPS) {
        const int4 turn = turns[pair];
        const uint4* const at = (const uint4*)(weights + 2 * pair * C);
        const float own = dot<2, true>([=](int g, int j) { return at[g * (C / 8) + j]; }, x, gains + 2 * l * C, C, eps);
        const float other = __shfl_xor_sync(ALL, own, 16), cos = angles[turn.y], sin = angles[D / 2 + turn.y];
        float v = turn.z == 2 ? own : own * cos + (upper ? other : -other) * sin;
        if (turn.z == 0) v *= factor;
        if (gives) give(qkv + turn.x + upper * (D / 2), far, v, gates + QUERY);
        if (turn.z && lane() % 16 == 0)  // every cluster writes the same, and so finds later what it wrote itself
          (turn.z == 1 ? keys : values)[cache + ((int64)turn.w * capacity + position) * D + turn.y + upper * (D / 2)] = v;
      }

      // keys and values of the tokens before are fetched while the newest come with the query
      const int d = 2 * lane();
      const bool has = d < D;
      float2 k[KEYS] = {}, v[KEYS] = {};
      auto key = [=](int b) { return part + n_parts * (warp() + WARPS * b); };
      const int64 head = cache + kv * capacity * D + d;
      UNROLL for (int b = 0; b < KEYS; b++) if (has && part < n_parts && key(b) < position) {
        k[b] = __ldcg((const float2*)(keys + head + (int64)key(b) * D));
        v[b] = __ldcg((const float2*)(values + head + (int64)key(b) * D));
      }
      pass(QUERY);
      float* const mine = parts + (kv * n_parts + part) * of_part;
      if (part < n_parts) {
        // of each head's softmax a fourth of the lanes has the highest score and the weight
        float2 q[HEADS], y[HEADS] = {};
        float highest = LOWEST, total = 0;
        UNROLL for (int g = 0; g < HEADS; g++) q[g] = has && g < G ? *(const float2*)(qkv + (kv * G + g) * D + d) : float2{0, 0};
        UNROLL for (int b = 0; b < KEYS; b++) if (key(b) <= position) {
          if (has && key(b) == position)
            k[b] = *(const float2*)(qkv + (H + kv) * D + d), v[b] = *(const float2*)(qkv + (H + K + kv) * D + d);
          float scores[HEADS];
          UNROLL for (int g = 0; g < HEADS; g++) scores[g] = __fmaf_rn(q[g].y, k[b].y, q[g].x * k[b].x);
          const float score = reduce(scores), top = fmaxf(highest, score), before = exp2f(highest - top), p = exp2f(score - top);
          highest = top, total = __fmaf_rn(total, before, p);
          UNROLL for (int g = 0; g < HEADS; g++) {
            const float by = __shfl_sync(ALL, before, 32 / HEADS * g), of = __shfl_sync(ALL, p, 32 / HEADS * g);
            y[g] = {__fmaf_rn(y[g].x, by, of * v[b].x), __fmaf_rn(y[g].y, by, of * v[b].y)};
          }
        }
        float* const of_warp = of_warps + warp() * of_part;
        UNROLL for (int g = 0; g < HEADS; g++) if (g < G && has) *(float2*)(of_warp + g * (D + 2) + d) = y[g];
        if (const int g = lane() / (32 / HEADS); lane() % (32 / HEADS) == 0 && g < G)
          *(float2*)(of_warp + g * (D + 2) + D) = {highest, total};
        __syncthreads();
        const int warps = smaller(WARPS, (position - part + n_parts) / n_parts);  // that had keys
        AS_IT_IS for (int j = threadIdx.x, g = first_head; j < G * D; j += THREADS, g = j / D) {
          const int at = j - g * D;
          const float3 all = combined(of_warps + g * (D + 2), warps, of_part, D, at);
          mine[g * (D + 2) + at] = all.x;
          if (at == 0) *(float2*)(mine + g * (D + 2) + D) = {all.y, all.z};
        }
        __syncthreads();
        AS_IT_IS for (int to = warp(); to < blocks; to += WARPS) {
          const unsigned off = distance(to);
          for (int j = lane(); j < of_part / 2; j += 32)
            give((float2*)mine + j, off, ((const float2*)mine)[j], gates + PARTS);
        }
      }
      pass(PARTS);

      AS_IT_IS for (int c = threadIdx.x; c < C; c += THREADS) {
        const int2 source = sources[c];
        const float3 all = combined(parts + source.x, smaller(n_parts, position + 1), of_part, D, source.y);
        mixed[c] = __fdividef(all.x, all.z);
      }
      __syncthreads();
      auto add = [&](const bfloat16* rows_of, const float* from, int width, int gate) {
        AS_IT_IS for (int r = warp(); r < own; r += WARPS) {
          float* const to = x + rank * own + r;
          const float before = *to;  // all lanes know it before one of them may write
          const uint4* const at = (const uint4*)(rows_of + r * width);
          const float after = before + dot<1, false>([=](int, int j) { return at[j]; }, from, nullptr, width, eps);
          if (gives && !upper) give(to, far, after, gates + gate);
        }
      };
      add(weights + of_out, mixed, C, MIDDLE);
      pass(MIDDLE);

      AS_IT_IS for (int r = 4 * warp(); r < inner_own; r += 4 * WARPS) {
        const uint4* const at = (const uint4*)(weights + of_up + r * C);
        const float v = activated(
            dot<4, true>([=](int g, int j) { return at[g * (C / 8) + j]; }, x, gains + (2 * l + 1) * C, C, eps));
        float* const to = inner + rank * inner_own + r + lane() / 8;
        if (gives_near) give(to, near, v, gates + INNER);
        if (gives_next) give(to, next, v, gates + INNER);
      }
      pass(INNER);
      add(weights + of_down, inner, F, END);
      pass(END);
    }
    if (nth < 0) continue;

    float* const row = probs + (int64)nth * n_ids;
    if (slice.n) for (int j = lowest + threadIdx.x; j < beyond; j += THREADS) row[j] = 0;
    constexpr int ROWS = 8;
    AS_IT_IS for (int r = ROWS * warp(); r < slice.n; r += ROWS * WARPS) {
      const float v = dot<ROWS, true>(([=](int g, int j) {
        return __ldg((const uint4*)(m.head + (int64)(slice.from + smaller(r + g, slice.n - 1)) * C) + j);
      }), x, gains + 2 * L * C, C, eps);
      if (const int mine = r + lane() / (32 / ROWS); lane() % (32 / ROWS) == 0 && mine < slice.n) logits[mine] = v;
    }
    __syncthreads();
    const int token = draw<4>(logits, slice, temperature, number, epoch + nth,
                              [=](int choice, float p) { row[offered[choice - slice.from]] = p; });
    const int choice = smaller(token, m.n_choices - 1);  // after a row of NaN, which the engine sees itself
    embedded = m.drawn + (int64)choice * C;
    if (blockIdx.x == 0 && threadIdx.x == 0) tokens[nth] = token < m.n_choices ? id_of(token) : n_ids;
  }
}
}
