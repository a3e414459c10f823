// Passes of a Transformer over a few rows, at the speed at which memory delivers its weights; and what a round does with
// their logits, which elsewhere is sampling.py: probabilities, draws, the token-wise decision.
//
// A weight is loaded once and multiplied with up to 6 rows, or 12 where there are 32 registers, while it is in its own; the
// sums of all of them stay in the core until they are complete. More rows take a block of weights that was just used out of
// the nearest cache, and the block after it is asked for meanwhile. A whole pass, or a draft of several tokens, is one call:
// what lies between two products, and the threads' waiting for each other, would otherwise take as long as the products of a
// small model.
//
// Where the processor multiplies pairs of bfloat16 numbers and adds them up in float32, rows are rounded to bfloat16 before
// a product by bfloat16 weights; elsewhere weights are widened.
//
//     R rows · C width · D head size · S tokens in the cache · L lanes · matrices as panels (outputs/L, inputs, L), W their
//     type; of pairs (outputs/L, inputs/2, L, 2)
//
// The cache is panels too, of what is multiplied: keys (layers, K, S/L, D, L), values (layers, K, D/L, S, L), so that attention
// is two products.
// A row's numbers are added up in the same order whatever rows stand beside it: its bits do not depend on its company.

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

// outputs of a panel, as many as a register has numbers; vectors of sums that one go keeps in registers
#ifdef __AVX512F__
constexpr long LANES = 16, SUMS = 24;  // of 32
#else
constexpr long LANES = 8, SUMS = 12;  // of 16
#endif
constexpr long ROWS = 12, MOST = 32;  // queries of attention at once; rows in all
constexpr long BLOCK = 64;             // columns of a block

// an array of sums is kept in registers only if no loop over it is left
#define UNROLL _Pragma("GCC unroll 32")

template <typename T>
struct Vector {
  static constexpr size_t size = LANES * sizeof(T), aligned_to = size < 64 ? size : 64;  // torch aligns to no more
  typedef T Lanes __attribute__((vector_size(size), aligned(aligned_to)));
};
template <typename T>
using Lanes = typename Vector<T>::Lanes;

struct bfloat16 {
  uint16_t bits;
  operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};

#ifdef __AVX512BF16__
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif
template <typename W>
constexpr bool paired = PAIRS && std::is_same_v<W, bfloat16>;
// what rows are multiplied as, and the columns of a panel
template <typename W, typename T>
using Factor = std::conditional_t<paired<W>, bfloat16, T>;
template <typename W>
long columns(long width) {
  return paired<W> ? (width + 1) / 2 * 2 : width;
}

template <typename T>
Lanes<T> load(const T* at) {
  return *(const Lanes<T>*)at;
}
inline Lanes<float> load(const bfloat16* at) {
  return (Lanes<float>)(__builtin_convertvector(*(const Lanes<uint16_t>*)at, Lanes<uint32_t>) << 16);
}

// Where the threads of one call wait for each other. They do so some fifty times a pass; OpenMP's own barrier calls the
// kernel each time.
struct Meetings {
  std::atomic<int> waiting{0}, held{0};
};

struct Thread {
  Meetings& meetings;
  int me, of;

  // the share of n things that is this thread's
  long begin(long n) const { return n * me / of; }
  long end(long n) const { return n * (me + 1) / of; }

  void meet() const {
    const int before = meetings.held.load();
    if (meetings.waiting.fetch_add(1) + 1 == of) {
      meetings.waiting.store(0);
      meetings.held.store(before + 1);
      return;
    }
    for (long turns = 0; meetings.held.load(std::memory_order_acquire) == before; turns++)
      if (turns > 20000) std::this_thread::yield();  // somebody else works on this machine
  }
};

template <typename Work>
void together(Work work) {
  Meetings meetings;
#pragma omp parallel
  work(Thread{meetings, omp_get_thread_num(), omp_get_num_threads()});
}

// sums (R, P) = or, if `onto`, += R rows of x · P panels, over n columns; rows of x lie `stride` numbers apart, panels
// `apart`
template <typename W, typename T, int R, int P>
void add(const Factor<W, T>* x, long stride, const W* panels, long apart, long n, Lanes<T>* sums, bool onto) {
  // bytes: how far ahead weights are asked for. The less is computed with a line, the nearer is quickest, as measured
  constexpr long ahead = 1024 << std::min((R - 1) / 2, 2);
  Lanes<T> sum[R][P] = {};
  if (onto) UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) sum[r][p] = sums[r * P + p];
  for (long c = 0; c < n; c += paired<W> ? 2 : 1) {
    const W* at[P];
    UNROLL for (int p = 0; p < P; p++) {
      at[p] = panels + p * apart + c * LANES;
      // each line once, into the second cache: the nearest one has too few places for all that must be under way
      if (c * LANES * sizeof(W) % 64 == 0) __builtin_prefetch((const char*)at[p] + ahead, 0, 2);
    }
#ifdef __AVX512BF16__
    if constexpr (paired<W>) {
      __m512bh weight[P];
      UNROLL for (int p = 0; p < P; p++) weight[p] = (__m512bh)_mm512_loadu_si512(at[p]);
      UNROLL for (int r = 0; r < R; r++) {
        int pair;
        std::memcpy(&pair, x + r * stride + c, sizeof pair);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        UNROLL for (int p = 0; p < P; p++) sum[r][p] = (Lanes<T>)_mm512_dpbf16_ps((__m512)sum[r][p], weight[p], both);
      }
      continue;
    }
#endif
    if constexpr (!paired<W>) {
      Lanes<T> weight[P];
      UNROLL for (int p = 0; p < P; p++) weight[p] = load(at[p]);
      UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) sum[r][p] += weight[p] * x[r * stride + c];
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) sums[r * P + p] = sum[r][p];
}

// sums (R, P) = x (R, C) · P panels
template <typename W, typename T, int P>
void multiply(const Factor<W, T>* x, long stride, long rows, const W* panels, long apart, long width, Lanes<T>* sums) {
  constexpr auto adds = []<int... R>(std::integer_sequence<int, R...>) {
    return std::array{&add<W, T, R + 1, P>...};
  }(std::make_integer_sequence<int, SUMS / P>());  // as many as there are registers for
  constexpr long most = adds.size();
  const long block = rows > most ? BLOCK : width;
  for (long c = 0; c < width; c += block)
    for (long r = 0; r < rows; r += most)
      adds[std::min(most, rows - r) - 1](x + r * stride + c, stride, panels + c * LANES, apart, std::min(block, width - c),
                                         sums + r * P, c > 0);
}

// a number as it is multiplied by weights
template <typename W, typename T>
Factor<W, T> factor(T x) {
  if constexpr (paired<W>) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;  // which rounding could make an infinity
    return bfloat16{uint16_t((nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else {
    return x;
  }
}

// rows of them, for one thread
template <typename W, typename T>
const Factor<W, T>* factors(const T* x, long& stride, long rows, long width) {
  if constexpr (paired<W>) {
    static thread_local std::vector<bfloat16> rounded;
    const long to = columns<W>(width) + 32;  // were it a power of two, more rows than a set of the cache holds would share one
    rounded.assign(rows * to, bfloat16{0});
    for (long r = 0; r < rows; r++)
      for (long c = 0; c < width; c++) rounded[r * to + c] = factor<W>(x[r * stride + c]);
    stride = to;
    return rounded.data();
  } else {
    return x;
  }
}

// calls `go` with the numbers of panels to multiply at once, the largest first. Never one while two are left: a core loads no
// more numbers at a time than it multiplies, so a number of a row, once loaded, had better serve two
template <typename Go>
void several_at_once(long rows, Go go) {
  if (rows <= SUMS / 4) go(std::integral_constant<int, 4>());
  go(std::integral_constant<int, 2>());
  go(std::integral_constant<int, 1>());
}

// A thread's share of x (R, C) · panels: `then(row, panel, sums)` is told each result. It is one piece whatever the number of
// rows, so that a cache which only this thread uses may still hold it from the pass before; several panels at once, from
// places far apart.
template <typename W, typename T, typename Then>
void product(Thread t, const T* from, long stride, long rows, const void* panels, long n_panels, long width, Then then) {
  const auto* x = factors<W>(from, stride, rows, width);
  const long size = columns<W>(width) * LANES, end = t.end(n_panels);
  long first = t.begin(n_panels);
  several_at_once(rows, [&](auto places) {
    constexpr int P = decltype(places)::value;
    const long part = (end - first) / P;
    for (long j = first; j < first + part; j++) {
      Lanes<T> sums[MOST * P];
      multiply<W, T, P>(x, stride, rows, (const W*)panels + j * size, part * size, width, sums);
      for (long r = 0; r < rows; r++)
        for (int p = 0; p < P; p++) then(r, j + p * part, sums[r * P + p]);
    }
    first += part * P;
  });
}

// y (R, panels · L) = x (R, C) · panels that lie side by side in a cache, by one thread
template <typename W, typename T>
void small_product(const W* x, long stride, long rows, const W* panels, long apart, long n_panels, long width, T* y,
                   long y_stride) {
  long j = 0;
  several_at_once(rows, [&](auto places) {
    constexpr int P = decltype(places)::value;
    for (; j + P <= n_panels; j += P) {
      Lanes<T> sums[ROWS * P];
      multiply<W, T, P>(x, stride, rows, panels + j * apart, apart, width, sums);
      for (long r = 0; r < rows; r++)
        for (int p = 0; p < P; p++) *(Lanes<T>*)(y + r * y_stride + (j + p) * LANES) = sums[r * P + p];
    }
  });
}

// One number at a time, or by a library's call, exponentials take a good part of the time of the products beside them: in
// float32 a register at once. float64 is for tests.

inline Lanes<double> exp(Lanes<double> x) {
  for (int i = 0; i < LANES; i++) x[i] = std::exp(x[i]);
  return x;
}
inline Lanes<float> exp(Lanes<float> x) {  // 2ⁿ · eʳ, |r| ≤ log(2)/2, the series of eʳ up to r⁷
  const Lanes<float> given = x;
  x = x < -87.f ? -87.f : x > 88.f ? 88.f : x;
  const Lanes<float> n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // rounds to an integer
  const Lanes<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log(2) in two parts
  Lanes<float> series = r * (1 / 5040.f) + 1 / 720.f;
  for (float factor : {1 / 120.f, 1 / 24.f, 1 / 6.f, 0.5f, 1.f, 1.f}) series = series * r + factor;
  const Lanes<float> power = (Lanes<float>)((__builtin_convertvector(n, Lanes<int32_t>) + 127) << 23);
  return given < -87.f ? 0 : series * power;
}

inline Lanes<double> erf(Lanes<double> x) {
  for (int i = 0; i < LANES; i++) x[i] = std::erf(x[i]);
  return x;
}
inline Lanes<float> erf(Lanes<float> x) {  // Abramowitz and Stegun 1964, 7.1.26
  const Lanes<float> size = x < 0 ? -x : x, t = 1 / (1 + 0.3275911f * size);
  Lanes<float> series = t * 1.061405429f;
  for (float factor : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) series = (series + factor) * t;
  const Lanes<float> positive = 1 - series * exp(-size * size);
  return x < 0 ? -positive : positive;
}

template <typename T, typename Function>
void each(T* x, long n, Function function) {
  Lanes<T> v{};
  for (; n >= LANES; n -= LANES, x += LANES) {
    std::memcpy(&v, x, sizeof v);
    v = function(v);
    std::memcpy(x, &v, sizeof v);
  }
  std::memcpy(&v, x, n * sizeof(T));
  v = function(v);
  std::memcpy(x, &v, n * sizeof(T));
}

template <typename Sum, typename T>
Sum sum(const T* x, long n) {
  Sum total = 0;
#pragma omp simd reduction(+ : total)
  for (long i = 0; i < n; i++) total += Sum(x[i]);
  return total;
}

template <typename T>
T greatest(const T* x, long n) {  // passes over NaN, so a compiler would take them one by one
  T most = -std::numeric_limits<T>::infinity();
  Lanes<T> v, mosts = most + Lanes<T>{};
  for (; n >= LANES; n -= LANES, x += LANES) {
    std::memcpy(&v, x, sizeof v);
    mosts = mosts < v ? v : mosts;
  }
  for (long i = 0; i < LANES; i++) most = std::max(most, mosts[i]);
  for (long i = 0; i < n; i++) most = std::max(most, x[i]);
  return most;
}

// x (n) → exp((x − max x) ÷ temperature), over its sum
template <typename T>
void softmax(T* x, long n, T temperature) {
  const T most = greatest(x, n);
  each(x, n, [=](Lanes<T> v) { return exp((v - most) / temperature); });
  const T scale = 1 / sum<T>(x, n);
  for (long i = 0; i < n; i++) x[i] *= scale;
}

// What all threads know of a part of a row: sums over parts are the same whoever makes them.
template <typename T>
struct Part {
  T greatest, finite, total;  // logit; their sum, which is finite if they are; sum of exponentials
  double mass;                // sum of probabilities
};

constexpr long PART = 256;
long parts(long n) { return (n + PART - 1) / PART; }

// logits (R, n), rows `stride` apart, become probabilities where they are, as sampling.Sampling without filters; a row that
// is not finite becomes NaN. They are complete after the next meeting, as are the parts (R, parts). Of each row a thread takes
// about what it has multiplied itself.
template <typename T>
void probabilities(Thread t, T* rows, long n_rows, long stride, long n, double temperature, Part<T>* all) {
  const long many = parts(n);
  auto mine = [=](long r, auto work) {
    for (long j = t.begin(many); j < t.end(many); j++)
      work(rows + r * stride + j * PART, std::min(PART, n - j * PART), all[r * many + j]);
  };
  for (long r = 0; r < n_rows; r++)
    mine(r, [](T* x, long size, Part<T>& part) {
      part.greatest = greatest(x, size);
      part.finite = sum<T>(x, size);
    });
  t.meet();
  for (long r = 0; r < n_rows; r++) {
    const Part<T>* row = all + r * many;
    T finite = 0;
    for (long j = 0; j < many; j++) finite += row[j].finite;
    const auto less = [](const Part<T>& a, const Part<T>& b) { return a.greatest < b.greatest; };
    const Part<T>& first = *std::max_element(row, row + many, less);
    const T most = first.greatest, by = std::max(T(temperature), std::numeric_limits<T>::min());
    mine(r, [&](T* x, long size, Part<T>& part) {
      if (!std::isfinite(finite)) {
        std::fill_n(x, size, std::numeric_limits<T>::quiet_NaN());
      } else if (temperature == 0) {
        T* const place = &part == &first ? std::find(x, x + size, most) : nullptr;
        std::fill_n(x, size, T(0));
        if (place) *place = 1;
      } else {
        each(x, size, [=](Lanes<T> v) { return exp((v - most) / by); });
      }
      part.total = sum<T>(x, size);
    });
  }
  t.meet();
  for (long r = 0; r < n_rows; r++) {
    T total = 0;
    for (long j = 0; j < many; j++) total += all[r * many + j].total;
    mine(r, [=](T* x, long size, Part<T>& part) {
      for (long i = 0; i < size; i++) x[i] /= total;
      part.mass = sum<double>(x, size);
    });
  }
}

// One index out of probs (n) for a uniform number, by inversion in float64, as sampling.Randomness; n for a row of NaN.
// `mass(part)` is what a part of them adds up to.
template <typename T, typename Mass>
long choose(const T* probs, long n, Mass mass, double number) {
  double total = 0, before = 0;
  for (long j = 0; j < parts(n); j++) total += mass(j);
  if (std::isnan(total)) return n;
  const double goal = number * total;
  long j = 0;
  for (; j + 1 < parts(n) && before + mass(j) <= goal; j++) before += mass(j);
  for (long i = j * PART; i < n; i++)
    if ((before += double(probs[i])) > goal) return i;
  for (long i = n; i-- > 0;)  // where sums round differently than the total: the last index that has a probability
    if (probs[i] > 0) return i;
  return n;
}

struct Layer {
  const void *attention_norm, *qkv, *out, *mlp_norm, *up, *down;
};

struct Model {
  long n_layers, n_heads, n_kv_heads, head_size, width, hidden, n_ids, n_offered, n_choices, squared, capacity;
  double norm_eps;
  const void *embedding, *cos, *sin, *norm, *head;  // cos and sin (context, D/2)
  const int64_t* offered;  // ids of a trimmed output layer, or null
  const Layer* layers;
};

long padded(long n) { return (n + LANES - 1) / LANES * LANES; }

template <typename W, typename T>
struct Pass {
  using Cached = Factor<W, T>;
  const Model& m;
  Cached *keys, *values;
  const long C = padded(m.width), D = m.head_size, K = m.n_kv_heads, H = m.n_heads, S = m.capacity;
  const long qkv_width = padded((H + 2 * K) * D), N = padded(m.n_offered);
  std::unique_ptr<T, decltype(&std::free)> memory{nullptr, std::free};
  T *x, *normed, *qkv, *queries, *mixed, *hidden, *scores;  // queries are of type Cached, and have more room than they need

  Pass(const Model& model, void* keys, void* values, long rows, int threads)
      : m(model), keys((Cached*)keys), values((Cached*)values) {
    T** const places[] = {&x, &normed, &qkv, &queries, &mixed, &hidden, &scores};
    const long sizes[] = {rows * C, threads * rows * C, rows * qkv_width, H * rows * D, rows * C, rows * padded(m.hidden),
                          threads * ROWS * (padded(S) + padded(D))};
    long total = 0;
    for (long size : sizes) total += (size + 15) / 16 * 16;
    memory.reset((T*)std::aligned_alloc(64, total * sizeof(T)));
    T* at = memory.get();
    for (int i = 0; i < 7; i++) *places[i] = at, at += (sizes[i] + 15) / 16 * 16;
  }

  T* norm(Thread t, long rows, const void* weight) {  // every thread for itself, which is shorter than waiting for others
    T* y = normed + t.me * rows * C;
    for (long r = 0; r < rows; r++) {
      const T *from = x + r * C, *w = (const T*)weight;
      T squares = 0;
#pragma omp simd reduction(+ : squares)
      for (long c = 0; c < m.width; c++) squares += from[c] * from[c];
      const T scale = 1 / std::sqrt(squares / m.width + T(m.norm_eps));
      for (long c = 0; c < m.width; c++) y[r * C + c] = from[c] * scale * w[c];
    }
    return y;
  }

  // turns a head's numbers by their position's angles; `to` takes them one by one
  template <typename To>
  void rotate(const T* from, long position, T factor, To to) {
    const T *cos = (const T*)m.cos + position * (D / 2), *sin = (const T*)m.sin + position * (D / 2);
    for (long d = 0; d < D / 2; d++) {
      const T a = from[d], b = from[d + D / 2];
      to(d, (a * cos[d] - b * sin[d]) * factor);
      to(d + D / 2, (b * cos[d] + a * sin[d]) * factor);
    }
  }

  // panels of keys have positions as outputs and numbers of the head as inputs, those of values the reverse
  const long key_panel = LANES * columns<W>(D), value_panel = LANES * columns<W>(S);
  Cached* keys_of(long layer, long head) { return keys + (layer * K + head) * padded(S) / LANES * key_panel; }
  Cached* values_of(long layer, long head) { return values + (layer * K + head) * padded(D) / LANES * value_panel; }
  static long within(long output, long input) {
    return paired<W> ? (input / 2 * LANES + output % LANES) * 2 + input % 2 : input * LANES + output % LANES;
  }

  void place(Thread t, long layer, long rows, long start) {  // qkv → queries (H, R, D) and the cache
    const T scale = 1 / std::sqrt(T(D));
    for (long i = t.begin(rows * (H + K)); i < t.end(rows * (H + K)); i++) {
      const long r = i / (H + K), h = i % (H + K), position = start + r;
      const T* from = qkv + r * qkv_width + h * D;
      if (h < H) {
        Cached* to = (Cached*)queries + (h * rows + r) * D;
        rotate(from, position, scale, [=](long d, T number) { to[d] = factor<W>(number); });
        continue;
      }
      Cached *key = keys_of(layer, h - H) + position / LANES * key_panel, *value = values_of(layer, h - H);
      rotate(from, position, T(1), [=](long d, T number) { key[within(position, d)] = factor<W>(number); });
      for (long d = 0; d < D; d++) value[d / LANES * value_panel + within(d, position)] = factor<W>(from[K * D + d]);
      if (paired<W> && r + 1 == rows && position % 2 == 0 && position + 1 < S)  // the other one of the pair is multiplied too
        for (long d = 0; d < D; d++) value[d / LANES * value_panel + within(d, position + 1)] = Cached{};
    }
  }

  void attend(Thread t, long layer, long rows, long start) {
    const long end = start + rows, group = H / K * rows;  // queries of one key-value head lie together
    T* probs = scores + t.me * ROWS * (padded(S) + padded(D));
    T* y = probs + ROWS * padded(S);
    for (long i = t.begin(H * rows), n; i < t.end(H * rows); i += n) {
      const long head = i / group;
      n = std::min({ROWS, t.end(H * rows) - i, (head + 1) * group - i});
      small_product((Cached*)queries + i * D, D, n, keys_of(layer, head), key_panel, padded(end) / LANES, D, probs, padded(S));
      for (long q = 0; q < n; q++) {
        const long visible = start + (i + q) % rows + 1;
        softmax(probs + q * padded(S), visible, T(1));
        std::fill(probs + q * padded(S) + visible, probs + q * padded(S) + end, T(0));
      }
      long stride = padded(S);
      const Cached* weights = factors<W>(probs, stride, n, end);
      small_product(weights, stride, n, values_of(layer, head), value_panel, padded(D) / LANES, end, y, padded(D));
      for (long q = 0; q < n; q++) std::copy_n(y + q * padded(D), D, mixed + (i + q) % rows * C + (i + q) / rows * D);
    }
  }

  Lanes<T> activated(Lanes<T> v) const {
    if (m.squared) return v < 0 ? 0 * v : v * v;
    return v * T(0.5) * (1 + erf(v * T(M_SQRT1_2)));
  }

  // R tokens after `start` others; the logits of the last n_logits of them, each of N numbers
  void read(Thread t, const int64_t* ids, long rows, long start, long n_logits, T* to) {
    const long F = padded(m.hidden);
    auto store = [](T* y, long stride) {
      return [=](long r, long j, Lanes<T> sums) { *(Lanes<T>*)(y + r * stride + j * LANES) = sums; };
    };
    auto onto = [=, this](long r, long j, Lanes<T> sums) { *(Lanes<T>*)(x + r * C + j * LANES) += sums; };
    auto activate = [=, this](long r, long j, Lanes<T> sums) { *(Lanes<T>*)(hidden + r * F + j * LANES) = activated(sums); };
    for (long r = t.begin(rows); r < t.end(rows); r++) {
      const W* from = (const W*)m.embedding + ids[r] * m.width;
      std::fill(x + r * C + m.width, x + (r + 1) * C, T(0));
      for (long c = 0; c < m.width; c++) x[r * C + c] = from[c];
    }
    t.meet();
    for (long i = 0; i < m.n_layers; i++) {
      const Layer& layer = m.layers[i];
      product<W>(t, norm(t, rows, layer.attention_norm), C, rows, layer.qkv, qkv_width / LANES, m.width,
                 store(qkv, qkv_width));
      t.meet();
      place(t, i, rows, start);
      t.meet();
      attend(t, i, rows, start);
      t.meet();
      product<W>(t, mixed, C, rows, layer.out, C / LANES, m.width, onto);
      t.meet();
      product<W>(t, norm(t, rows, layer.mlp_norm), C, rows, layer.up, F / LANES, m.width, activate);
      t.meet();
      product<W>(t, hidden, F, rows, layer.down, C / LANES, m.hidden, onto);
      t.meet();
    }
    if (n_logits)
      product<W>(t, norm(t, rows, m.norm) + (rows - n_logits) * C, C, n_logits, m.head, N / LANES, m.width, store(to, N));
  }

  // n tokens, each drawn for one of the numbers, after R others of which none is in the cache yet; as ids of the vocabulary,
  // or as indices of their rows, where one after the last says that a row is NaN
  void draw(Thread t, const int64_t* ids, long rows, long start, long n, double temperature, const double* numbers,
            bool as_ids, int64_t* tokens, T* probs, Part<T>* all, int64_t* next) {
    for (long i = 0; i < n; i++) {
      T* row = probs + i * N;
      read(t, ids, rows, start, 1, row);
      t.meet();
      probabilities(t, row, 1, N, m.n_choices, temperature, all);
      t.meet();
      if (t.me == 0) {
        const long index = choose(row, m.n_choices, [=](long j) { return all[j].mass; }, numbers[i]);
        const long token = std::min(index, m.n_choices - 1);  // after a row of NaN, which the engine sees itself
        *next = m.offered ? m.offered[token] : token;
        tokens[i] = as_ids ? *next : index;
      }
      t.meet();
      ids = next, start += rows, rows = 1;
    }
  }
};

// the rule sampling.token_wise or, `as_block`, sampling.block; rows q (k, n) and p (k+1, n) lie `q_stride` and `p_stride`
// apart; numbers (k+1)
template <typename T>
void decide(bool as_block, const int64_t* drafted, const T* q, long q_stride, const T* p, long p_stride, const double* numbers,
            long k, long n, int64_t* accepted, int64_t* next) {
  auto choose_from = [=](const T* probs) {
    std::vector<double> mass(parts(n));
    for (long j = 0; j < parts(n); j++) mass[j] = sum<double>(probs + j * PART, std::min(PART, n - j * PART));
    return choose(probs, n, [&](long j) { return mass[j]; }, numbers[k]);
  };
  auto ratio = [=](long i) { return p[i * p_stride + drafted[i]] / q[i * q_stride + drafted[i]]; };
  auto rest = std::make_unique_for_overwrite<T[]>(n);
  long of = -1;  // the row whose rest lies there
  T total = 0;
  auto leave = [&](long r, T scale) {  // what scale·p has more than q
    if (of == r) return;
    const T *of_p = p + r * p_stride, *of_q = q + r * q_stride;
    for (long i = 0; i < n; i++) {
      const T v = scale * of_p[i] - of_q[i];
      rest[i] = v < 0 ? T(0) : v;  // a NaN stays one
    }
    total = sum<T>(rest.get(), n), of = r;
  };
  std::vector<T> scales(k + 1, 1);
  long i = 0;
  if (as_block) {  // the last draft whose coin falls well stays, with all before it
    for (; i < k; i++) scales[i + 1] = std::min(scales[i] * ratio(i), T(1));  // a NaN stays one
    for (; i > 0; i--) {
      if (scales[i] == 0) continue;  // and so is its coin
      T coin = scales[k];
      if (i < k) {
        leave(i, scales[i]);
        const T refused = total + (1 - scales[i]);
        coin = refused > 0 ? total / refused : 1;
      }
      if (numbers[i - 1] < double(coin)) break;
    }
  } else {
    while (i < k && numbers[i] < double(ratio(i))) i++;
  }
  *accepted = i;
  if (i == k) {
    *next = choose_from(p + k * p_stride);
    return;
  }
  leave(i, scales[i]);
  for (long j = 0; j < n; j++) rest[j] /= total;
  *next = choose_from(total == 0 ? p + i * p_stride : rest.get());
}

bool known(const int64_t* ids, long n, long n_ids) {
  return std::all_of(ids, ids + n, [=](int64_t id) { return 0 <= id && id < n_ids; });
}

// calls `work` with types: 0 float32, 1 float64, 2 bfloat16 weights in float32 arithmetic
template <typename Work>
void typed(int type, Work work) {
  if (type == 0) work(float{}, float{});
  if (type == 1) work(double{}, double{});
  if (type == 2) work(bfloat16{}, float{});
}

}  // namespace

// What is given ids returns whether it knows them; if not, it does nothing.
extern "C" {

long specdec_lanes() { return LANES; }
bool specdec_pairs() { return PAIRS; }

void specdec_multiply(int type, const void* x, long rows, long width, const void* panels, long n_panels, void* y) {
  typed(type, [&](auto w, auto number) {
    using W = decltype(w);
    using T = decltype(number);
    together([=](Thread t) {
      product<W>(t, (const T*)x, width, rows, panels, n_panels, width, [=](long r, long j, Lanes<T> sums) {
        *(Lanes<T>*)((T*)y + (r * n_panels + j) * LANES) = sums;
      });
    });
  });
}

bool specdec_read(int type, const Model* model, void* keys, void* values, const int64_t* ids, long rows, long start,
                  long n_logits, void* logits) {
  if (!known(ids, rows, model->n_ids)) return false;
  typed(type, [&](auto w, auto number) {
    using T = decltype(number);
    Pass<decltype(w), T> pass(*model, keys, values, rows, omp_get_max_threads());
    together([&](Thread t) { pass.read(t, ids, rows, start, n_logits, (T*)logits); });
  });
  return true;
}

// as `read`, of all rows, whose logits become probabilities
bool specdec_probabilities(int type, const Model* model, void* keys, void* values, const int64_t* ids, long rows, long start,
                           double temperature, void* probs) {
  if (!known(ids, rows, model->n_ids)) return false;
  typed(type, [&](auto w, auto number) {
    using T = decltype(number);
    Pass<decltype(w), T> pass(*model, keys, values, rows, omp_get_max_threads());
    std::vector<Part<T>> all(rows * parts(model->n_choices));
    together([&](Thread t) {
      pass.read(t, ids, rows, start, rows, (T*)probs);
      t.meet();
      probabilities(t, (T*)probs, rows, pass.N, model->n_choices, temperature, all.data());
    });
  });
  return true;
}

bool specdec_draw(int type, const Model* model, void* keys, void* values, const int64_t* ids, long rows, long start, long n,
                  double temperature, const double* numbers, bool as_ids, int64_t* tokens, void* probs) {
  if (!known(ids, rows, model->n_ids)) return false;
  typed(type, [&](auto w, auto number) {
    using T = decltype(number);
    Pass<decltype(w), T> pass(*model, keys, values, rows, omp_get_max_threads());
    std::vector<Part<T>> all(parts(model->n_choices));
    int64_t next;
    together([&](Thread t) {
      pass.draw(t, ids, rows, start, n, temperature, numbers, as_ids, tokens, (T*)probs, all.data(), &next);
    });
  });
  return true;
}

bool specdec_decide(int type, bool as_block, const int64_t* drafted, const void* q, long q_stride, const void* p, long p_stride,
                    const double* numbers, long k, long n, int64_t* accepted, int64_t* next) {
  if (!known(drafted, k, n)) return false;
  typed(type, [&](auto, auto number) {
    using T = decltype(number);
    decide(as_block, drafted, (const T*)q, q_stride, (const T*)p, p_stride, numbers, k, n, accepted, next);
  });
  return true;
}
}
