// Products of a few rows with a large matrix, at the speed at which memory delivers the matrix.
//
//     x (M, C) · Wᵀ → y (M, N), W stored as panels (N/8, C, 8): 8 outputs lie together and are multiplied at once
//
// A weight is loaded once and multiplied with up to six rows while it is in its register; the sums of all of them stay in
// the core until they are complete. More rows take a block of weights that was just used out of the nearest cache, and
// the block after it is asked for meanwhile. Compilers do neither by themselves.

#include <algorithm>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace {

constexpr long LANES = 8;  // outputs of a panel
constexpr long PLACES = 4;  // panels read at once, where the sums of so many fit into 16 registers
constexpr long ROWS = 6, MOST = 32;  // rows of one go, and in all
constexpr long BLOCK = 64, AHEAD = 64;  // columns of a block, and how far ahead weights are asked for

// an array of sums is kept in registers only if no loop over it is left
#define UNROLL _Pragma("GCC unroll 8")

template <typename T>
struct Vector {
  typedef T Lanes __attribute__((vector_size(LANES * sizeof(T))));
};

// sums (R, P) += R rows of x · P panels, over n columns; rows of x lie `width` numbers apart, panels `stride`
template <typename T, int R, int P>
void add(const T* x, long width, const T* panels, long stride, long n, typename Vector<T>::Lanes* sums) {
  using Lanes = typename Vector<T>::Lanes;
  Lanes sum[R][P];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) sum[r][p] = sums[r * P + p];
  for (long c = 0; c < n; c++) {
    Lanes weight[P];
    UNROLL for (int p = 0; p < P; p++) {
      const T* at = panels + p * stride + c * LANES;
      weight[p] = *(const Lanes*)at;
      if (P < PLACES) __builtin_prefetch(at + AHEAD * LANES);  // at four places the processor does so itself
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) sum[r][p] += weight[p] * x[r * width + c];
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) sums[r * P + p] = sum[r][p];
}

template <typename T, int P>
void multiply(const T* x, const T* panels, T* y, long rows, long width, long outputs) {
  using Lanes = typename Vector<T>::Lanes;
  constexpr decltype(&add<T, 1, P>) adds[] = {add<T, 1, P>, add<T, 2, P>, add<T, 3, P>,
                                              add<T, 4, P>, add<T, 5, P>, add<T, 6, P>};
  const long part = outputs / P, stride = part * width, block = rows > ROWS ? BLOCK : width;
#pragma omp parallel for schedule(static)
  for (long j = 0; j < part; j += LANES) {
    Lanes sums[MOST * P] = {};
    for (long c = 0; c < width; c += block)
      for (long r = 0; r < rows; r += ROWS)
        adds[std::min(ROWS, rows - r) - 1](x + r * width + c, width, panels + j * width + c * LANES, stride,
                                           std::min(block, width - c), sums + r * P);
    for (long r = 0; r < rows; r++)
      for (int p = 0; p < P; p++) *(Lanes*)(y + r * outputs + p * part + j) = sums[r * P + p];
  }
}

template <typename T>
void multiply(const void* x, const void* panels, void* y, long rows, long width, long n_panels) {
  auto run = rows <= 3 && n_panels % PLACES == 0 ? multiply<T, PLACES> : n_panels % 2 == 0 ? multiply<T, 2> : multiply<T, 1>;
  run((const T*)x, (const T*)panels, (T*)y, rows, width, n_panels * LANES);
}

}  // namespace

// what compiled programs call, without a dispatcher between
extern "C" AOTITorchError aoti_torch_cpu_few_rows(AtenTensorHandle x, AtenTensorHandle panels, AtenTensorHandle* y) {
  int64_t rows, width, n_panels;
  int32_t dtype;
  void *from, *by, *to;
  aoti_torch_get_size(x, 0, &rows);
  aoti_torch_get_size(x, 1, &width);
  aoti_torch_get_size(panels, 0, &n_panels);
  aoti_torch_get_dtype(x, &dtype);
  const bool wide = dtype == aoti_torch_dtype_float64();
  if (rows > MOST || (!wide && dtype != aoti_torch_dtype_float32())) return AOTI_TORCH_FAILURE;
  const int64_t sizes[] = {rows, n_panels * LANES}, strides[] = {n_panels * LANES, 1};
  if (auto error = aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, y)) return error;
  aoti_torch_get_data_ptr(x, &from);
  aoti_torch_get_data_ptr(panels, &by);
  aoti_torch_get_data_ptr(*y, &to);
  (wide ? multiply<double> : multiply<float>)(from, by, to, rows, width, n_panels);
  return AOTI_TORCH_SUCCESS;
}

using torch::stable::Tensor;

Tensor few_rows(Tensor x, Tensor panels) {
  AtenTensorHandle y;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_few_rows(x.get(), panels.get(), &y));
  return Tensor(y);
}

STABLE_TORCH_LIBRARY(specdec, library) { library.def("few_rows(Tensor x, Tensor panels) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(specdec, CPU, library) { library.impl("few_rows", TORCH_BOX(&few_rows)); }
