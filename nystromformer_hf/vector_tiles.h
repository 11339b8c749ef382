// Vectors of floats and products of matrices that fit into a core's caches: what the CPU kernels of this package are
// made of.
//
// Matrices are pointers to floats. Those that a product reads by columns (its second factor and its result) have
// contiguous rows and a whole number of vectors as their width; `round_up` says how wide, and what is beyond the matrix
// must be finite.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#include <sys/mman.h>

namespace tiles {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16, TILE_ROWS = 6, TILE_VECTORS = 4;  // 24 of 32 registers hold sums
#elif defined(__AVX__)
constexpr int64_t LANES = 8, TILE_ROWS = 6, TILE_VECTORS = 2;  // 12 of 16
#else
constexpr int64_t LANES = 4, TILE_ROWS = 6, TILE_VECTORS = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVector __attribute__((vector_size(4 * LANES)));

inline Vector load(const float* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline void store(float* to, Vector vector) { std::memcpy(to, &vector, sizeof vector); }

inline Vector fill(float number) { return number - Vector{}; }

// The larger, or the smaller, of two numbers; the second where one of them is not a number.
#if defined(__AVX512F__)
inline Vector larger(Vector a, Vector b) { return (Vector)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vector smaller(Vector a, Vector b) { return (Vector)_mm512_min_ps((__m512)a, (__m512)b); }
#else
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }
inline Vector smaller(Vector a, Vector b) { return a < b ? a : b; }
#endif

inline int64_t round_up(int64_t count, int64_t unit = LANES) { return (count + unit - 1) / unit * unit; }

// Lane `i` is that of `i` with one bit flipped.
template <int64_t bit, int... lane>
inline Vector flip_lanes(Vector vector, std::integer_sequence<int, lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(vector, vector, (lane ^ bit)...);
#else
  return __builtin_shuffle(vector, IntVector{(lane ^ bit)...});
#endif
}

// Folds the lanes of a vector into one number, halves upon halves.
template <int64_t half = LANES / 2, class Operation>
inline float fold(Vector vector, Operation operation) {
  if constexpr (half == 0) {
    return vector[0];
  } else {
    const Vector other = flip_lanes<half>(vector, std::make_integer_sequence<int, LANES>());
    return fold<half / 2>(operation(vector, other), operation);
  }
}

inline float sum_of(Vector vector) {
  return fold(vector, [](Vector a, Vector b) { return a + b; });
}

inline float largest_of(Vector vector) { return fold(vector, larger); }

// exp of numbers up to 88, to about one unit in the last place; zero below -87, where floats become denormal.
// 2^k exp(r) with |r| <= ln 2 / 2 and the polynomial of Cephes' expf (Moshier 1989) for exp(r).
inline Vector exponential(Vector x) {
  const Vector in_range = larger(fill(-87.0f), x);  // what is not a number stays so: the second one is taken
  const Vector shifted = in_range * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: its last bits are the rounded k
  const Vector k = shifted - 12582912.0f;
  const Vector r = in_range - k * 0.693359375f - k * -2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  IntVector bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  Vector power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? Vector{} : p * power;
}

// What a product fetches while it computes: nothing.
struct NoFetcher {
  void begin_tile() {}
  void step(int64_t) {}
};

// Fetches a matrix (rows, width), whose rows lie `stride` apart, line by line into a core's second cache, a few lines
// at a time, as only so many can be on the way: with AVX-512 one at every second step of a tile, with shorter vectors,
// where that would cost more than it hides, LINES_AT_ONCE before a tile's first step.
class Fetcher {
 public:
  Fetcher() = default;  // of nothing
  Fetcher(int64_t rows, int64_t width, const float* from, int64_t stride)
      : line_(from), end_(from + width), width_(width), stride_(stride), rows_(rows) {}

  // Calls would push a product's sums out of the registers.
  __attribute__((always_inline)) void begin_tile() {
    if constexpr (LANES < 16)
      for (int64_t i = 0; i < LINES_AT_ONCE; i++) fetch_line();
  }

  __attribute__((always_inline)) void step(int64_t index) {
    if constexpr (LANES >= 16)
      if (index % 2) fetch_line();
  }

 private:
  static constexpr int64_t LINE = 64 / sizeof(float), LINES_AT_ONCE = 8;

  __attribute__((always_inline)) void fetch_line() {
    if (rows_ <= 0) return;
    __builtin_prefetch(line_, 0, 2);
    line_ += LINE;
    if (line_ < end_) return;
    end_ += stride_;
    line_ = end_ - width_;
    rows_--;
  }

  const float *line_ = nullptr, *end_ = nullptr;
  int64_t width_ = 0, stride_ = 0, rows_ = 0;
};

template <int64_t rows, int64_t vectors, class Fetch = NoFetcher>
inline void product_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
                         float* c, int64_t c_row, bool add, Fetch&& fetcher = {}) {
  Vector sums[rows][vectors];
#pragma GCC unroll 8
  for (int64_t i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int64_t j = 0; j < vectors; j++) sums[i][j] = add ? load(c + i * c_row + j * LANES) : Vector{};
  auto local = fetcher;  // in registers
  local.begin_tile();
  for (int64_t k = 0; k < depth; k++) {
    local.step(k);
    Vector columns[vectors];
#pragma GCC unroll 4
    for (int64_t j = 0; j < vectors; j++) columns[j] = load(b + k * b_row + j * LANES);
#pragma GCC unroll 8
    for (int64_t i = 0; i < rows; i++) {
      const Vector factor = fill(a[i * a_row + k * a_column]);
#pragma GCC unroll 4
      for (int64_t j = 0; j < vectors; j++) sums[i][j] += factor * columns[j];
    }
  }
  fetcher = local;
#pragma GCC unroll 8
  for (int64_t i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int64_t j = 0; j < vectors; j++) store(c + i * c_row + j * LANES, sums[i][j]);
}

// Calls work(size, start) for parts of `count` of the size `most`, and for one of what is left; sizes are constants.
template <int64_t most, class Work>
inline void cover(int64_t count, const Work& work) {
  static_assert(most <= 6);
  int64_t start = 0;
  for (; start + most <= count; start += most) work(std::integral_constant<int64_t, most>(), start);
  const auto rest = [&](auto size) {
    if constexpr (size < most) work(size, start);
  };
  switch (count - start) {
    case 5: return rest(std::integral_constant<int64_t, 5>());
    case 4: return rest(std::integral_constant<int64_t, 4>());
    case 3: return rest(std::integral_constant<int64_t, 3>());
    case 2: return rest(std::integral_constant<int64_t, 2>());
    case 1: return rest(std::integral_constant<int64_t, 1>());
  }
}

// C (rows, width) = A (rows, depth) B (depth, width), or C += A B where `add`.
// Element (i, k) of A is a[i * a_row + k * a_column]. A fetcher that is a variable goes on where it is in the next
// product.
template <class Fetch = NoFetcher>
inline void product(int64_t rows, int64_t depth, int64_t width, const float* a, int64_t a_row, int64_t a_column,
                    const float* b, int64_t b_row, float* c, int64_t c_row, bool add = false, Fetch&& fetcher = {}) {
  const auto tile = [&](auto height, int64_t i, auto vectors, int64_t j) {
    product_tile<height, vectors>(depth, a + i * a_row, a_row, a_column, b + j * LANES, b_row,
                                  c + i * c_row + j * LANES, c_row, add, fetcher);
  };
  // The loops inside read their factor again for each of those outside, from the second cache if the first is too
  // small. A few rows of A are less than so many columns of B. Not so where it is columns of A that are contiguous, and
  // with AVX-512, where a tile is as wide as most matrices.
  if (LANES < 16 && a_column == 1)
    cover<TILE_VECTORS>(width / LANES, [&](auto vectors, int64_t j) {
      cover<TILE_ROWS>(rows, [&](auto height, int64_t i) { tile(height, i, vectors, j); });
    });
  else
    cover<TILE_ROWS>(rows, [&](auto height, int64_t i) {
      cover<TILE_VECTORS>(width / LANES, [&](auto vectors, int64_t j) { tile(height, i, vectors, j); });
    });
}

// The lanes of two vectors that a transpose exchanges: of each pair of blocks of `step` lanes, the second of `a` with
// the first of `b`.
template <int64_t step, int... lane>
inline void exchange_lanes(Vector& a, Vector& b, std::integer_sequence<int, lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  const Vector first = __builtin_shufflevector(a, b, (lane & step ? LANES + lane - step : lane)...);
  b = __builtin_shufflevector(a, b, (lane & step ? LANES + lane : lane + step)...);
#else
  const Vector first = __builtin_shuffle(a, b, IntVector{(lane & step ? LANES + lane - step : lane)...});
  b = __builtin_shuffle(a, b, IntVector{(lane & step ? LANES + lane : lane + step)...});
#endif
  a = first;
}

// Transposes a square of as many vectors as a vector has lanes, by exchanging ever larger blocks off the diagonal.
template <int64_t step = 1>
inline void transpose_square(Vector* rows) {
  if constexpr (step < LANES) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; i++)
      if (!(i & step)) exchange_lanes<step>(rows[i], rows[i + step], std::make_integer_sequence<int, LANES>());
    transpose_square<2 * step>(rows);
  }
}

// (rows, width), both whole vectors, to (width, rows); rows lie `stride` and `to_stride` apart.
inline void transpose(int64_t rows, int64_t width, const float* from, int64_t stride, float* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; i += LANES)
    for (int64_t j = 0; j < width; j += LANES) {
      Vector square[LANES];
#pragma GCC unroll 16
      for (int64_t k = 0; k < LANES; k++) square[k] = load(from + (i + k) * stride + j);
      transpose_square(square);
#pragma GCC unroll 16
      for (int64_t k = 0; k < LANES; k++) store(to + (j + k) * to_stride + i, square[k]);
    }
}

// Lets the system back new memory by huge pages where it is large: the first use of each page costs time.
inline void ask_for_huge_pages(void* memory, size_t bytes) {
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory), end = (start + bytes) / PAGE * PAGE;
  const uintptr_t first = (start + PAGE - 1) / PAGE * PAGE;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
}

// Memory for floats, aligned to cache lines, not initialised.
class Scratch {
 public:
  explicit Scratch(int64_t count) : memory_(new (std::align_val_t(64)) float[count]) {}
  operator float*() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
  };
  std::unique_ptr<float[], Free> memory_;
};

// to += from, of any number of entries.
inline void add_row(int64_t width, const float* from, float* to) {
  const int64_t whole = width / LANES * LANES;
  for (int64_t j = 0; j < whole; j += LANES) store(to + j, load(to + j) + load(from + j));
  for (int64_t j = whole; j < width; j++) to[j] += from[j];
}

// Rows (rows, width) of a matrix whose rows lie `stride` apart, one after the other.
inline void pack(int64_t rows, int64_t width, const float* from, int64_t stride, float* to) {
  for (int64_t i = 0; i < rows; i++) std::memcpy(to + i * width, from + i * stride, width * sizeof(float));
}

// The transpose, times `scale`, of a matrix (rows, width) whose rows lie `stride` apart: (width, columns), zero from
// column `rows` on.
inline void pack_transposed(int64_t rows, int64_t width, const float* from, int64_t stride, float scale, float* to,
                            int64_t columns) {
  for (int64_t j = 0; j < width; j++) {
    for (int64_t i = 0; i < rows; i++) to[j * columns + i] = scale * from[i * stride + j];
    for (int64_t i = rows; i < columns; i++) to[j * columns + i] = 0.0f;
  }
}

}  // namespace tiles
