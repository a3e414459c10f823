// What is done with logits on a GPU: tokens are drawn, rows become probabilities, a draft is decided on; and the kernel of a
// pass after which something may be drawn. Compiled together with native.cu.
//
// A row of a vocabulary is divided among blocks, which tell each other once what the others must know.

namespace {

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
  int token;  // `all` of a row that is not finite
  // of the index at, whose logit is v
  __device__ float probability(Softmax softmax, int at, float v, int all) const {
    softmax.highest = highest;
    if (token == all) return __int_as_float(0x7fc00000);
    return softmax.greedy ? at == token : softmax.weight_of(v) * scale;
  }
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
    int64 *posts = m.posts + (epoch & 1) * 2 * BLOCKS, *words = m.words + (int64)(epoch & 1) * all;
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
  for (int i = threadIdx.x; i < slice.n; i += THREADS)
    keep(slice.from + i, now.probability(softmax, slice.from + i, logits[i], all));
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
  for (int i = threadIdx.x; i < slice.n; i += THREADS) probs[i] = now.probability(softmax, slice.from + i, own[i], n);
}

// the rule sampling.token_wise or, `as_block`, sampling.block; numbers (k+1). Of every row that may be the one after the last
// draft that stays, each block tells of its slice what scale·p has more than q, and what p has in case that is nothing; the
// first block decides. posts (k+1, blocks, 2); the epoch is another at each launch.
__global__ void __launch_bounds__(THREADS, 1)
specdec_decide(const int64* drafted, const float* q, const float* p, const double* numbers, int k, int n, int as_block,
               int64* decision, int64* posts, int epoch) {
  constexpr int S = 12;
  float* const scales = (float*)rest();  // (k+1), all 1 for the token-wise rule
  float* const coins = scales + k + 1;  // (k)
  int accepted = k;
  for (int i = k - 1 - (int)threadIdx.x; i >= 0; i -= THREADS) {
    coins[i] = p[(int64)i * n + drafted[i]] / q[(int64)i * n + drafted[i]];
    if (!as_block && !(numbers[i] < (double)coins[i])) accepted = i;
  }
  if (as_block) __syncthreads();
  else accepted = first(accepted);
  if (threadIdx.x == 0) {
    scales[0] = 1;
    for (int i = 0; i < k; i++) scales[i + 1] = !as_block || scales[i] * coins[i] > 1 ? 1 : scales[i] * coins[i];
  }
  __syncthreads();
  auto left = [=](int r, int i) {
    const float v = r == k ? 0 : scales[r] * __ldg(p + (int64)r * n + i) - __ldg(q + (int64)r * n + i);
    return v < 0 ? 0.f : v;  // a NaN stays one
  };
  const Slice slice(n, blockIdx.x, gridDim.x);
  auto post_of = [=](int r) { return posts + 2 * r * gridDim.x; };
  AS_IT_IS for (int r = warp(); r <= k; r += WARPS) if (as_block || r == accepted) {
    float of_left = 0, of_p = 0;
    for (int i = slice.from + lane(); i < slice.from + slice.n; i += 32) of_left += left(r, i), of_p += __ldg(p + (int64)r * n + i);
    of_left = of_warp(of_left, Plus()), of_p = of_warp(of_p, Plus());
    if (lane() == 0) tell(post_of(r) + 2 * blockIdx.x, of_left, epoch), tell(post_of(r) + 2 * blockIdx.x + 1, of_p, epoch);
  }
  if (blockIdx.x != 0) return;
  if (as_block) {  // the last draft whose coin falls well stays, with all before it
    AS_IT_IS for (int r = 1 + warp(); r < k; r += WARPS) {
      const Heard heard(post_of(r), gridDim.x, epoch);
      float uncovered = 0;
      UNROLL for (int b = 0; b < Heard::B; b++) uncovered += heard.one[b];
      uncovered = of_warp(uncovered, Plus());
      const float refused = uncovered + (1 - scales[r]);
      if (lane() == 0) coins[r - 1] = refused > 0 ? uncovered / refused : 1;
    }
    if (threadIdx.x == 0 && k) coins[k - 1] = scales[k];
    __syncthreads();
    accepted = 0;
    for (int i = threadIdx.x; i < k; i += THREADS) if (numbers[i] < (double)coins[i]) accepted = i + 1;
    accepted = together(accepted, Greater());
  }
  if (warp() != 0) return;
  const Heard heard(post_of(accepted), gridDim.x, epoch);
  bool covered = true;  // nothing is left of p
  UNROLL for (int b = 0; b < Heard::B; b++) if (b < heard.n) covered = covered && heard.one[b] == 0;
  covered = !__any_sync(ALL, !covered);
  double sums;
  float parts[Heard::B];
  UNROLL for (int b = 0; b < Heard::B; b++) parts[b] = covered ? heard.other[b] : heard.one[b];
  const int following = search<S>(parts, heard, gridDim.x, n, numbers[k], sums, [=](int from, int n_some, float (&weights)[S]) {
    UNROLL for (int b = 0; b < S; b++)
      weights[b] = b < n_some ? (covered ? __ldg(p + (int64)accepted * n + from + b) : left(accepted, from + b)) : 0;
  });
  if (lane() == 0) decision[0] = accepted, decision[1] = following;
}
}
