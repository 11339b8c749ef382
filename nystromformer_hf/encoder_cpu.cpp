// Nyström attention of an encoder on a CPU, see nystrom_attention.py for the formula; called by encoder_cpu.py.
//
// A block of tokens stays in a core's cache while everything is done with it. A task is a span of one head's tokens;
// what landmarks gather over all spans is added up in their order, so that results do not depend on the number of
// threads. The (landmarks, landmarks) matrices of a head lie in rows of `width` floats.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "tasks.h"
#include "vector_tiles.h"

namespace {

using at::Tensor;
using namespace tasks;
using namespace tiles;

constexpr int64_t BLOCK = 48, SPAN = 1056, TAPS_AT_ONCE = 11;

// One head of a tensor (batch, heads, rows, columns) with contiguous columns, or a part of its rows that was copied.
struct Head {
  float* data;
  int64_t stride;
  float* row(int64_t index) const { return data + index * stride; }
};

Head head_of(const Tensor& tensor, int64_t batch, int64_t head) {
  auto* data = const_cast<float*>(tensor.const_data_ptr<float>());
  return {data + batch * tensor.stride(0) + head * tensor.stride(1), tensor.stride(2)};
}

struct Sizes {
  int64_t batch, heads, tokens, dim, landmarks, width, spans;
  float scale;
  const int64_t* lengths;

  int64_t real_tokens(int64_t row) const { return lengths ? lengths[row] : tokens; }
  // The first token of a segment: that of token p is p * landmarks / real_tokens, rounded down.
  int64_t segment_start(int64_t row, int64_t segment) const {
    return (segment * real_tokens(row) + landmarks - 1) / landmarks;
  }
};

Sizes sizes_of(const Tensor& states, int64_t landmarks, const std::optional<Tensor>& lengths) {
  const int64_t tokens = states.size(2), dim = states.size(3);
  TORCH_CHECK(dim % LANES == 0, "head_dim ", dim, " is no multiple of ", LANES);
  return {states.size(0),
          states.size(1),
          tokens,
          dim,
          landmarks,
          round_up(landmarks),
          (tokens + SPAN - 1) / SPAN,
          1 / std::sqrt(static_cast<float>(dim)),
          lengths ? lengths->const_data_ptr<int64_t>() : nullptr};
}

// Calls work(batch, head) for every head, in parallel.
template <class Work>
void for_heads(const Sizes& sizes, const Work& work) {
  in_parallel(sizes.batch * sizes.heads, [&](Tasks tasks) {
    for (int64_t task; tasks.next(task);) work(task / sizes.heads, task % sizes.heads);
  });
}

// Calls work(batch, head, span, first token, token behind the last) for every span of every head, in parallel.
template <class Work>
void for_spans(const Sizes& sizes, const Work& work) {
  in_parallel(sizes.batch * sizes.heads * sizes.spans, [&](Tasks tasks) {
    for (int64_t task; tasks.next(task);) {
      const int64_t head = task / sizes.spans, span = task % sizes.spans;
      work(head / sizes.heads, head % sizes.heads, span, span * SPAN, std::min((span + 1) * SPAN, sizes.tokens));
    }
  });
}

// States (batch, heads, tokens, dim), in memory with tokens before heads.
Tensor empty_states(const Sizes& sizes) {
  const Tensor states = at::empty({sizes.batch, sizes.tokens, sizes.heads, sizes.dim});
  ask_for_huge_pages(states.data_ptr(), states.nbytes());
  return states.transpose(1, 2);
}

Tensor empty_landmarks(const Sizes& sizes, int64_t spans = 1) {
  return at::empty({sizes.batch, sizes.heads * spans, sizes.landmarks, sizes.dim});
}

void scale_rows(int64_t count, float* numbers, float factor) {
  for (int64_t i = 0; i < count; i += LANES) store(numbers + i, factor * load(numbers + i));
}

void add_to(int64_t count, float* sum, const float* numbers) {
  for (int64_t i = 0; i < count; i += LANES) store(sum + i, load(sum + i) + load(numbers + i));
}

// Adds up the parts that the spans of a head have left, (spans, landmarks, dim).
void add_spans(const Sizes& sizes, const Tensor& parts, int64_t batch, int64_t head, float* sum) {
  const int64_t count = sizes.landmarks * sizes.dim;
  std::fill(sum, sum + count, 0.0f);
  for (int64_t span = 0; span < sizes.spans; span++)
    add_to(count, sum, head_of(parts, batch, head * sizes.spans + span).data);
}

// Softmax of each row of scores (rows, width), of which the first `count` are real, in place; the others become zero. A
// few rows at a time, as each step has to wait for what the one before made of its row.
void softmax_rows(int64_t rows, int64_t width, int64_t count, float* scores) {
  constexpr int64_t GROUP = 8;
  float largest[GROUP], shares[GROUP];
  for (; rows > 0; rows -= GROUP, scores += GROUP * width) {
    const int64_t group = std::min(rows, GROUP);
    for (int64_t i = 0; i < group; i++) {
      float* row = scores + i * width;
      for (int64_t j = count; j < width; j++) row[j] = -std::numeric_limits<float>::infinity();
      Vector maximum = load(row);
      for (int64_t j = LANES; j < width; j += LANES) maximum = larger(maximum, load(row + j));
      largest[i] = largest_of(maximum);
    }
    for (int64_t i = 0; i < group; i++) {
      float* row = scores + i * width;
      Vector sum{};
      for (int64_t j = 0; j < width; j += LANES) {
        const Vector weight = exponential(load(row + j) - largest[i]);
        store(row + j, weight);
        sum += weight;
      }
      shares[i] = 1 / sum_of(sum);
    }
    for (int64_t i = 0; i < group; i++) scale_rows(width, scores + i * width, shares[i]);
  }
}

// Gradient of a softmax along rows: of its result `weights` in, of its scores, times `scale`, out.
void softmax_rows_backward(int64_t rows, int64_t width, const float* weights, float* grads, float scale) {
  for (int64_t i = 0; i < rows; i++, weights += width, grads += width) {
    Vector agreement{};
    for (int64_t j = 0; j < width; j += LANES) agreement += load(weights + j) * load(grads + j);
    const float mean = sum_of(agreement);
    for (int64_t j = 0; j < width; j += LANES) store(grads + j, scale * load(weights + j) * (load(grads + j) - mean));
  }
}

// Segment means.

void mean_of_segments(const Sizes& sizes, int64_t batch, Head states, float* means) {
  for (int64_t segment = 0; segment < sizes.landmarks; segment++, means += sizes.dim) {
    const int64_t start = sizes.segment_start(batch, segment), end = sizes.segment_start(batch, segment + 1);
    pack(1, sizes.dim, states.row(start), 0, means);
    for (int64_t token = start + 1; token < end; token++) add_to(sizes.dim, means, states.row(token));
    scale_rows(sizes.dim, means, 1.0f / static_cast<float>(end - start));
  }
}

// Gradient of the means of segments, added to that of their tokens from `first` to `end`.
void spread_over_segments(const Sizes& sizes, int64_t batch, int64_t first, int64_t end, const float* grad_means,
                          Head grads) {
  end = std::min(end, sizes.real_tokens(batch));
  for (int64_t token = first; token < end;) {
    const int64_t segment = token * sizes.landmarks / sizes.real_tokens(batch);
    const int64_t start = sizes.segment_start(batch, segment), stop = sizes.segment_start(batch, segment + 1);
    const float share = 1.0f / static_cast<float>(stop - start);
    for (; token < std::min(stop, end); token++)
      for (int64_t i = 0; i < sizes.dim; i += LANES)
        store(grads.row(token) + i, load(grads.row(token) + i) + share * load(grad_means + segment * sizes.dim + i));
  }
}

// The iterated inverse of the landmarks' attention, Z <- Z (13 I - P (15 I - P (7 I - P))) / 4 with P = A Z.

struct Square {
  int64_t size, width;
  int64_t count() const { return size * width; }
};

void multiply(Square square, const float* a, const float* b, float* c, bool add = false) {
  product(square.size, square.size, square.width, a, square.width, 1, b, square.width, c, square.width, add);
}

void multiply_transposed_first(Square square, const float* a, const float* b, float* c, bool add = false) {
  product(square.size, square.size, square.width, a, 1, square.width, b, square.width, c, square.width, add);
}

void transpose(Square square, const float* from, float* to) {
  pack_transposed(square.size, square.size, from, square.width, 1.0f, to, square.width);
}

// matrix <- diagonal I - matrix
void subtract_from_identity(Square square, float diagonal, float* matrix) {
  scale_rows(square.count(), matrix, -1.0f);
  for (int64_t i = 0; i < square.size; i++) matrix[i * square.width + i] += diagonal;
}

// What one step makes of Z: P, 7 I - P, 15 I - P (7 I - P), the whole bracket, and the next Z.
struct Step {
  float *product, *first, *second, *third, *next;
};

Step step_in(Square square, float* memory) {
  const int64_t count = square.count();
  return {memory, memory + count, memory + 2 * count, memory + 3 * count, memory + 4 * count};
}

void refine_inverse(Square square, const float* matrix, const float* inverse, Step step) {
  multiply(square, matrix, inverse, step.product);
  std::copy(step.product, step.product + square.count(), step.first);
  subtract_from_identity(square, 7.0f, step.first);
  multiply(square, step.product, step.first, step.second);
  subtract_from_identity(square, 15.0f, step.second);
  multiply(square, step.product, step.second, step.third);
  subtract_from_identity(square, 13.0f, step.third);
  multiply(square, inverse, step.third, step.next);
  scale_rows(square.count(), step.next, 0.25f);
}

// grad: of the next Z in, of this one out. Adds to grad_matrix, that of A.
void refine_inverse_backward(Square square, const float* matrix, const float* inverse, Step step, float* grad,
                             float* grad_matrix, float* memory) {
  const int64_t count = square.count();
  float *transposed = memory, *grad_bracket = memory + count, *grad_product = memory + 2 * count,
        *grad_inner = memory + 3 * count;
  scale_rows(count, grad, 0.25f);
  multiply_transposed_first(square, inverse, grad, grad_bracket);
  transpose(square, step.second, transposed);
  multiply(square, grad_bracket, transposed, grad_product);
  multiply_transposed_first(square, step.product, grad_bracket, grad_inner);
  transpose(square, step.first, transposed);
  scale_rows(count, grad_inner, -1.0f);
  multiply(square, grad_inner, transposed, grad_product, true);
  // The innermost bracket is 7 I - P: its gradient is that of P with the other sign.
  multiply_transposed_first(square, step.product, grad_inner, grad_bracket);
  for (int64_t i = 0; i < count; i += LANES) store(grad_product + i, load(grad_bracket + i) - load(grad_product + i));
  transpose(square, inverse, transposed);
  multiply(square, grad_product, transposed, grad_matrix, true);
  transpose(square, step.third, transposed);
  multiply(square, grad, transposed, grad_inner);
  multiply_transposed_first(square, matrix, grad_product, grad_inner, true);
  std::copy(grad_inner, grad_inner + count, grad);
}

// The largest sum of a column of A, and which column it is.
std::pair<float, int64_t> largest_column_sum(Square square, const float* matrix) {
  std::vector<float> sums(square.width, 0.0f);
  for (int64_t i = 0; i < square.size; i++) add_to(square.width, sums.data(), matrix + i * square.width);
  const auto largest = std::max_element(sums.begin(), sums.begin() + square.size);
  return {*largest, largest - sums.begin()};
}

// What each head divides by where the iteration starts, and the head and column that it comes from.
struct Start {
  float norm;
  int64_t head, column;
};

std::vector<Start> starts_of(const Sizes& sizes, const Tensor& attention, bool shared) {
  const Square square{sizes.landmarks, sizes.width};
  std::vector<Start> starts(sizes.batch * sizes.heads);
  for (int64_t batch = 0; batch < sizes.batch; batch++) {
    Start* row = starts.data() + batch * sizes.heads;
    for (int64_t head = 0; head < sizes.heads; head++) {
      const auto [norm, column] = largest_column_sum(square, head_of(attention, batch, head).data);
      row[head] = {norm, head, column};
    }
    if (!shared) continue;
    const Start largest =
        *std::max_element(row, row + sizes.heads, [](const Start& a, const Start& b) { return a.norm < b.norm; });
    std::fill(row, row + sizes.heads, largest);
  }
  return starts;
}

void start_inverse(Square square, const float* matrix, float norm, float* inverse) {
  transpose(square, matrix, inverse);
  scale_rows(square.count(), inverse, 1 / norm);
}

// The convolution of the values.

// Which tokens a convolution of a block reads: those from `from` to `end`, which lie inside of the row's first
// `tokens`.
struct Reach {
  int64_t from, end;
  int64_t rows() const { return std::max<int64_t>(end - from, 0); }
};

Reach reach_of(int64_t first, int64_t rows, int64_t before, int64_t taps, int64_t tokens) {
  return {std::max<int64_t>(first - before, 0), std::min(first - before + taps + rows - 1, tokens)};
}

// A head's kernel with zeros around it, as a band matrix whose element (i, k) is kernel[k - i].
class Band {
 public:
  Band(const float* kernel, int64_t taps, bool flipped) : taps_(taps), padded_(taps + 2 * TILE_ROWS, 0.0f) {
    for (int64_t j = 0; j < taps; j++) padded_[TILE_ROWS + j] = kernel[flipped ? taps - 1 - j : j];
  }

  // Adds the convolution to rows of `result`. Row t of it is sum_j kernel[j] states[t + j - before], of states within
  // `reach`.
  void convolve(int64_t first, int64_t rows, int64_t before, Head states, Reach reach, int64_t dim, Head result) const {
    // Rows of the band overlap. A compiler that knew would keep what they share in the registers that sums need.
    int64_t row = -1;
    asm("" : "+r"(row));
    for (int64_t token = first; token < first + rows; token += TILE_ROWS) {
      const int64_t height = std::min(TILE_ROWS, first + rows - token);
      const int64_t from = std::max(token - before, reach.from),
                    end = std::min(token - before + taps_ + height - 1, reach.end);
      if (end <= from) continue;
      const float* band = padded_.data() + TILE_ROWS + from - (token - before);
      product(height, end - from, dim, band, row, 1, states.row(from), states.stride, result.row(token), result.stride,
              true);
    }
  }

 private:
  int64_t taps_;
  std::vector<float> padded_;
};

// sums[j] += sum_t grads[t] * states[t + j], for TAPS_AT_ONCE values of j and one vector's worth of columns; rows lie
// `stride` apart.
void correlate(int64_t rows, const float* grads, const float* states, int64_t stride, Vector* sums) {
  Vector local[TAPS_AT_ONCE];
  std::copy(sums, sums + TAPS_AT_ONCE, local);
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4, grads += 4 * stride, states += 4 * stride) {
    const Vector g0 = load(grads), g1 = load(grads + stride), g2 = load(grads + 2 * stride),
                 g3 = load(grads + 3 * stride);
    Vector s0 = load(states), s1 = load(states + stride), s2 = load(states + 2 * stride);
#pragma GCC unroll 16
    for (int64_t j = 0; j < TAPS_AT_ONCE; j++) {
      const Vector s3 = load(states + (j + 3) * stride);
      local[j] += g0 * s0;
      local[j] += g1 * s1;
      local[j] += g2 * s2;
      local[j] += g3 * s3;
      s0 = s1, s1 = s2, s2 = s3;
    }
  }
  for (; t < rows; t++, grads += stride, states += stride)
    for (int64_t j = 0; j < TAPS_AT_ONCE; j++) local[j] += load(grads) * load(states + j * stride);
  std::copy(local, local + TAPS_AT_ONCE, sums);
}

// Rows `first` to `end` of states, those outside of its first `tokens` being zero, one after the other.
void pack_window(int64_t first, int64_t end, int64_t tokens, int64_t dim, Head states, float* to) {
  for (int64_t token = first; token < end; token++, to += dim) {
    if (token >= 0 && token < tokens)
      pack(1, dim, states.row(token), 0, to);
    else
      std::fill(to, to + dim, 0.0f);
  }
}

// Fetches the block behind the one that begins at `token`, up to row `end`.
Fetcher next_block(Head states, int64_t dim, int64_t token, int64_t end) {
  return {std::min(BLOCK, end - token - BLOCK), dim, states.row(token + BLOCK), states.stride};
}

// Forward.

// Partial softmax of landmarks' queries over the keys of a span: column maxima and sums, and the sum of values.
struct Pool {
  float *maximum, *sum, *values;
};

// The largest number of each of as many columns as a vector has lanes; in chains, as each step waits for the last one.
Vector largest_of_columns(int64_t rows, int64_t width, const float* columns) {
  constexpr int64_t CHAINS = 4;
  Vector largest[CHAINS];
  for (int64_t i = 0; i < CHAINS; i++) largest[i] = load(columns + std::min(i, rows - 1) * width);
  int64_t row = CHAINS;
  for (; row + CHAINS <= rows; row += CHAINS)
    for (int64_t i = 0; i < CHAINS; i++) largest[i] = larger(largest[i], load(columns + (row + i) * width));
  for (; row < rows; row++) largest[0] = larger(largest[0], load(columns + row * width));
  return larger(larger(largest[0], largest[1]), larger(largest[2], largest[3]));
}

// scores (rows, width): of the block's keys against all landmarks.
void pool_block(const Sizes& sizes, int64_t rows, float* scores, const float* values, float* correction, Pool pool,
                Fetcher fetcher) {
  const int64_t width = sizes.width, dim = sizes.dim;
  for (int64_t j = 0; j < width; j += LANES) {
    const Vector before = load(pool.maximum + j);
    const Vector maximum = larger(before, largest_of_columns(rows, width, scores + j));
    Vector sum{};
    for (int64_t i = 0; i < rows; i++) {
      const Vector weight = exponential(load(scores + i * width + j) - maximum);
      store(scores + i * width + j, weight);
      sum += weight;
    }
    const Vector kept = exponential(before - maximum);
    store(correction + j, kept);
    store(pool.sum + j, load(pool.sum + j) * kept + sum);
    store(pool.maximum + j, maximum);
  }
  for (int64_t l = 0; l < sizes.landmarks; l++)
    if (correction[l] != 1.0f) scale_rows(dim, pool.values + l * dim, correction[l]);
  product(sizes.landmarks, rows, dim, scores, 1, width, values, dim, pool.values, dim, true, fetcher);
}

void pool_span(const Sizes& sizes, int64_t first, int64_t end, Head key, Head value, const float* landmark_queries,
               Pool pool) {
  const int64_t width = sizes.width, dim = sizes.dim;
  Scratch queries(dim * width), values(BLOCK * dim), scores(BLOCK * width), correction(width);
  pack_transposed(sizes.landmarks, dim, landmark_queries, dim, sizes.scale, queries, width);
  std::fill(pool.maximum, pool.maximum + width, std::numeric_limits<float>::lowest());
  std::fill(pool.sum, pool.sum + width, 0.0f);
  std::fill(pool.values, pool.values + sizes.landmarks * dim, 0.0f);
  for (int64_t token = first; token < end; token += BLOCK) {
    const int64_t rows = std::min(BLOCK, end - token);
    product(rows, dim, width, key.row(token), key.stride, 1, queries, width, scores, width, false,
            next_block(key, dim, token, end));
    pack(rows, dim, value.row(token), value.stride, values);
    pool_block(sizes, rows, scores, values, correction, pool, next_block(value, dim, token, end));
  }
}

// B V of a head from the parts that its spans have left, and the logarithm of the sum of each landmark's exponentials.
void join_pools(const Sizes& sizes, const std::vector<Pool>& pools, float* pooled, float* log_sum) {
  const int64_t dim = sizes.dim;
  std::fill(pooled, pooled + sizes.landmarks * dim, 0.0f);
  for (int64_t l = 0; l < sizes.landmarks; l++) {
    float maximum = std::numeric_limits<float>::lowest(), sum = 0.0f;
    for (const Pool& pool : pools) maximum = std::max(maximum, pool.maximum[l]);
    for (const Pool& pool : pools) {
      const float weight = std::exp(pool.maximum[l] - maximum);
      sum += weight * pool.sum[l];
      for (int64_t i = 0; i < dim; i += LANES)
        store(pooled + l * dim + i, load(pooled + l * dim + i) + weight * load(pool.values + l * dim + i));
    }
    scale_rows(dim, pooled + l * dim, 1 / sum);
    log_sum[l] = maximum + std::log(sum);
  }
}

void read_span(const Sizes& sizes, int64_t batch, int64_t first, int64_t end, Head query, Head value,
               const float* landmark_keys, const float* landmark_values, const Band* band, int64_t taps, Head output) {
  const int64_t width = sizes.width, dim = sizes.dim;
  Scratch keys(dim * width), scores(BLOCK * width);
  pack_transposed(sizes.landmarks, dim, landmark_keys, dim, sizes.scale, keys, width);
  for (int64_t token = first; token < end; token += BLOCK) {
    const int64_t rows = std::min(BLOCK, end - token);
    product(rows, dim, width, query.row(token), query.stride, 1, keys, width, scores, width, false,
            next_block(query, dim, token, end));
    softmax_rows(rows, width, sizes.landmarks, scores);
    product(rows, sizes.landmarks, dim, scores, width, 1, landmark_values, dim, output.row(token), output.stride, false,
            band ? next_block(value, dim, token, end) : Fetcher());
    if (!band) continue;
    const Reach reach = reach_of(token, rows, taps / 2, taps, sizes.real_tokens(batch));
    band->convolve(token, rows, taps / 2, value, reach, dim, output);
  }
}

// Output (batch, heads, tokens, dim); landmarks of queries and keys, their attention, B V (batch, heads, landmarks,
// ...) and the logarithms of its sums (batch, heads, 1, landmarks).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> nystrom_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& kernels,
    const std::optional<Tensor>& lengths, int64_t landmarks, int64_t iterations, bool shared_norm) {
  const Sizes sizes = sizes_of(query, landmarks, lengths);
  const Square square{landmarks, sizes.width};
  const int64_t dim = sizes.dim, width = sizes.width, taps = kernels ? kernels->size(1) : 0;
  const Tensor query_landmarks = empty_landmarks(sizes), key_landmarks = empty_landmarks(sizes);
  const Tensor attention = at::empty({sizes.batch, sizes.heads, landmarks, width});
  for_heads(sizes, [&](int64_t batch, int64_t head) {
    float* queries = head_of(query_landmarks, batch, head).data;
    float* scores = head_of(attention, batch, head).data;
    Scratch keys(dim * width);
    mean_of_segments(sizes, batch, head_of(query, batch, head), queries);
    mean_of_segments(sizes, batch, head_of(key, batch, head), head_of(key_landmarks, batch, head).data);
    pack_transposed(landmarks, dim, head_of(key_landmarks, batch, head).data, dim, sizes.scale, keys, width);
    product(landmarks, dim, width, queries, dim, 1, keys, width, scores, width);
    softmax_rows(landmarks, width, landmarks, scores);
  });

  const Tensor sums = at::empty({sizes.batch, sizes.heads * sizes.spans, 2, width});
  const Tensor parts = empty_landmarks(sizes, sizes.spans);
  const auto pool_of = [&](int64_t batch, int64_t head, int64_t span) -> Pool {
    const Head rows = head_of(sums, batch, head * sizes.spans + span);
    return {rows.row(0), rows.row(1), head_of(parts, batch, head * sizes.spans + span).data};
  };
  for_spans(sizes, [&](int64_t batch, int64_t head, int64_t span, int64_t first, int64_t end) {
    pool_span(sizes, first, std::min(end, sizes.real_tokens(batch)), head_of(key, batch, head),
              head_of(value, batch, head), head_of(query_landmarks, batch, head).data, pool_of(batch, head, span));
  });

  const Tensor pooled = empty_landmarks(sizes), landmark_values = empty_landmarks(sizes);
  const Tensor log_sums = at::empty({sizes.batch, sizes.heads, 1, landmarks});
  const std::vector<Start> starts = starts_of(sizes, attention, shared_norm);
  for_heads(sizes, [&](int64_t batch, int64_t head) {
    Scratch memory(5 * square.count()), inverse(square.count());
    const float* matrix = head_of(attention, batch, head).data;
    start_inverse(square, matrix, starts[batch * sizes.heads + head].norm, inverse);
    const Step step = step_in(square, memory);
    for (int64_t i = 0; i < iterations; i++) {
      refine_inverse(square, matrix, inverse, step);
      std::copy(step.next, step.next + square.count(), static_cast<float*>(inverse));
    }
    std::vector<Pool> pools;
    for (int64_t span = 0; span < sizes.spans; span++) pools.push_back(pool_of(batch, head, span));
    float* means = head_of(pooled, batch, head).data;
    join_pools(sizes, pools, means, head_of(log_sums, batch, head).data);
    product(landmarks, landmarks, dim, inverse, width, 1, means, dim, head_of(landmark_values, batch, head).data, dim);
  });

  const Tensor output = empty_states(sizes);
  for_spans(sizes, [&](int64_t batch, int64_t head, int64_t, int64_t first, int64_t end) {
    std::optional<Band> band;
    if (kernels) band.emplace(kernels->const_data_ptr<float>() + head * taps, taps, false);
    read_span(sizes, batch, first, end, head_of(query, batch, head), head_of(value, batch, head),
              head_of(key_landmarks, batch, head).data, head_of(landmark_values, batch, head).data,
              band ? &*band : nullptr, taps, head_of(output, batch, head));
  });
  return {output, query_landmarks, key_landmarks, attention, pooled, log_sums};
}

// Backward.

// Gradients of a span's queries; what its landmarks' keys and values get goes to grad_keys and grad_values.
void read_span_backward(const Sizes& sizes, int64_t first, int64_t end, Head query, Head grad,
                        const float* landmark_keys, const float* landmark_values, Head grad_query, float* grad_keys,
                        float* grad_values) {
  const int64_t width = sizes.width, dim = sizes.dim, landmarks = sizes.landmarks;
  Scratch keys(dim * width), values(dim * width), queries(BLOCK * dim), grads(BLOCK * dim), weights(BLOCK * width),
      grad_scores(BLOCK * width);
  pack_transposed(landmarks, dim, landmark_keys, dim, sizes.scale, keys, width);
  pack_transposed(landmarks, dim, landmark_values, dim, 1.0f, values, width);
  std::fill(grad_keys, grad_keys + landmarks * dim, 0.0f);
  std::fill(grad_values, grad_values + landmarks * dim, 0.0f);
  for (int64_t token = first; token < end; token += BLOCK) {
    const int64_t rows = std::min(BLOCK, end - token);
    pack(rows, dim, query.row(token), query.stride, queries);
    pack(rows, dim, grad.row(token), grad.stride, grads);
    product(rows, dim, width, queries, dim, 1, keys, width, weights, width, false, next_block(query, dim, token, end));
    softmax_rows(rows, width, landmarks, weights);
    product(rows, dim, width, grads, dim, 1, values, width, grad_scores, width, false,
            next_block(grad, dim, token, end));
    product(landmarks, rows, dim, weights, 1, width, grads, dim, grad_values, dim, true);
    softmax_rows_backward(rows, width, weights, grad_scores, sizes.scale);
    product(rows, landmarks, dim, grad_scores, width, 1, landmark_keys, dim, grad_query.row(token), grad_query.stride);
    product(landmarks, rows, dim, grad_scores, 1, width, queries, dim, grad_keys, dim, true);
  }
}

// What the landmarks of a head hand on: their queries and keys, the logarithm of each one's sum of exponentials, and
// the gradient of their pooled values, with its mean over each landmark's weights.
struct Pooled {
  const float *queries, *log_sums, *grads, *agreements;
};

// The gradients of a head's convolution, block by block: adds that of the values to theirs, and adds up its kernel's.
class ConvolutionGradient {
 public:
  ConvolutionGradient(const Sizes& sizes, int64_t batch, const float* kernel, int64_t taps, Head value, Head grad)
      : sizes_(sizes),
        real_(sizes.real_tokens(batch)),
        taps_(taps),
        groups_(round_up(taps, TAPS_AT_ONCE)),
        flipped_(kernel, taps, true),
        value_(value),
        grad_(grad),
        grads_((BLOCK + taps) * sizes.dim),
        values_((BLOCK + groups_) * sizes.dim),
        sums_(groups_, Vector{}) {}

  void add_block(int64_t token, int64_t rows, Head grad_value) {
    const int64_t dim = sizes_.dim, before = taps_ / 2, after = taps_ - 1 - before;
    const int64_t inside = std::min(rows, real_ - token);
    const Reach reach = reach_of(token, rows, after, taps_, sizes_.tokens);
    pack(reach.rows(), dim, grad_.row(reach.from), grad_.stride, grads_);
    if (inside > 0)
      flipped_.convolve(token, inside, after, Head{grads_ - reach.from * dim, dim}, reach, dim, grad_value);
    pack_window(token - before, token - before + rows + groups_ - 1, real_, dim, value_, values_);
    for (int64_t column = 0; column < dim; column += LANES)
      for (int64_t tap = 0; tap < groups_; tap += TAPS_AT_ONCE)
        correlate(rows, grads_ + (token - reach.from) * dim + column, values_ + tap * dim + column, dim,
                  sums_.data() + tap);
  }

  // Fetches what the block behind this one needs of the gradients, and this one did not.
  Fetcher next_grads(int64_t token) const { return next_block(grad_, sizes_.dim, token + taps_ / 2, sizes_.tokens); }

  void write_kernel(float* grad_kernel) const {
    for (int64_t tap = 0; tap < taps_; tap++) grad_kernel[tap] = sum_of(sums_[tap]);
  }

 private:
  const Sizes& sizes_;
  const int64_t real_, taps_, groups_;
  const Band flipped_;
  const Head value_, grad_;
  Scratch grads_, values_;
  std::vector<Vector> sums_;
};

// All of the gradients of a span's keys and values: through the landmarks that read them, through those that keys are
// part of (grad_landmark_keys), and through the convolution; zero for padding. What the landmarks' queries get goes to
// grad_queries.
void pool_span_backward(const Sizes& sizes, int64_t batch, int64_t first, int64_t end, Head key, Head value,
                        Pooled pooled, const float* grad_landmark_keys, ConvolutionGradient* convolution, Head grad_key,
                        Head grad_value, float* grad_queries) {
  const int64_t width = sizes.width, dim = sizes.dim, landmarks = sizes.landmarks, real = sizes.real_tokens(batch);
  Scratch queries(dim * width), grads(dim * width), log_sums(width), agreements(width), keys(BLOCK * dim),
      weights(BLOCK * width), grad_scores(BLOCK * width);
  pack_transposed(landmarks, dim, pooled.queries, dim, sizes.scale, queries, width);
  pack_transposed(landmarks, dim, pooled.grads, dim, 1.0f, grads, width);
  pack_transposed(landmarks, 1, pooled.log_sums, 1, 1.0f, log_sums, width);
  pack_transposed(landmarks, 1, pooled.agreements, 1, 1.0f, agreements, width);
  std::fill(grad_queries, grad_queries + landmarks * dim, 0.0f);
  for (int64_t token = first; token < end; token += BLOCK) {
    const int64_t rows = std::min(BLOCK, end - token), inside = std::clamp<int64_t>(real - token, 0, rows);
    if (inside > 0) {
      pack(inside, dim, key.row(token), key.stride, keys);
      product(inside, dim, width, keys, dim, 1, queries, width, weights, width, false,
              next_block(key, dim, token, end));
      product(inside, dim, width, value.row(token), value.stride, 1, grads, width, grad_scores, width, false,
              next_block(value, dim, token, end));
      for (int64_t i = 0; i < inside * width; i += LANES) {
        const Vector weight = exponential(load(weights + i) - load(log_sums + i % width));
        store(weights + i, weight);
        store(grad_scores + i, sizes.scale * weight * (load(grad_scores + i) - load(agreements + i % width)));
      }
      product(inside, landmarks, dim, weights, width, 1, pooled.grads, dim, grad_value.row(token), grad_value.stride,
              false, convolution ? convolution->next_grads(token) : Fetcher());
      product(inside, landmarks, dim, grad_scores, width, 1, pooled.queries, dim, grad_key.row(token), grad_key.stride);
      product(landmarks, inside, dim, grad_scores, 1, width, keys, dim, grad_queries, dim, true);
    }
    for (int64_t i = token + inside; i < token + rows; i++) {
      std::fill(grad_key.row(i), grad_key.row(i) + dim, 0.0f);
      std::fill(grad_value.row(i), grad_value.row(i) + dim, 0.0f);
    }
    spread_over_segments(sizes, batch, token, token + rows, grad_landmark_keys, grad_key);
    if (convolution) convolution->add_block(token, rows, grad_value);
  }
}

// Gradients of query, key and value, and of the kernels (batch, heads, spans, taps) before they are summed.
std::tuple<Tensor, Tensor, Tensor, Tensor> nystrom_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                            const Tensor& value, const std::optional<Tensor>& kernels,
                                                            const std::optional<Tensor>& lengths,
                                                            const Tensor& query_landmarks, const Tensor& key_landmarks,
                                                            const Tensor& attention, const Tensor& pooled,
                                                            const Tensor& log_sums, int64_t iterations,
                                                            bool shared_norm) {
  const Sizes sizes = sizes_of(query, query_landmarks.size(2), lengths);
  const Square square{sizes.landmarks, sizes.width};
  const int64_t dim = sizes.dim, width = sizes.width, landmarks = sizes.landmarks,
                taps = kernels ? kernels->size(1) : 0;
  const std::vector<Start> starts = starts_of(sizes, attention, shared_norm);

  // Z of each head, and everything its iteration went through.
  const Tensor iterates = at::empty({sizes.batch, sizes.heads, iterations * 5 + 1, square.count()});
  const Tensor landmark_values = empty_landmarks(sizes);
  const auto inverse_of = [&](int64_t batch, int64_t head, int64_t iteration) {
    return head_of(iterates, batch, head).row(iteration * 5);
  };
  const auto step_of = [&](int64_t batch, int64_t head, int64_t iteration) {
    return step_in(square, inverse_of(batch, head, iteration) + square.count());
  };
  for_heads(sizes, [&](int64_t batch, int64_t head) {
    const float* matrix = head_of(attention, batch, head).data;
    start_inverse(square, matrix, starts[batch * sizes.heads + head].norm, inverse_of(batch, head, 0));
    for (int64_t i = 0; i < iterations; i++)
      refine_inverse(square, matrix, inverse_of(batch, head, i), step_of(batch, head, i));
    product(landmarks, landmarks, dim, inverse_of(batch, head, iterations), width, 1, head_of(pooled, batch, head).data,
            dim, head_of(landmark_values, batch, head).data, dim);
  });

  const Tensor grad_query = empty_states(sizes), grad_key = empty_states(sizes), grad_value = empty_states(sizes);
  const Tensor key_parts = empty_landmarks(sizes, sizes.spans), value_parts = empty_landmarks(sizes, sizes.spans);
  for_spans(sizes, [&](int64_t batch, int64_t head, int64_t span, int64_t first, int64_t end) {
    const int64_t part = head * sizes.spans + span;
    read_span_backward(sizes, first, end, head_of(query, batch, head), head_of(grad, batch, head),
                       head_of(key_landmarks, batch, head).data, head_of(landmark_values, batch, head).data,
                       head_of(grad_query, batch, head), head_of(key_parts, batch, part).data,
                       head_of(value_parts, batch, part).data);
  });

  const Tensor grad_pooled = empty_landmarks(sizes), grad_landmark_keys = empty_landmarks(sizes);
  const Tensor grad_attention = at::zeros({sizes.batch, sizes.heads, landmarks, width});
  std::vector<float> grad_norms(sizes.batch * sizes.heads);
  for_heads(sizes, [&](int64_t batch, int64_t head) {
    const float *matrix = head_of(attention, batch, head).data, *inverse = inverse_of(batch, head, iterations);
    float* grad_matrix = head_of(grad_attention, batch, head).data;
    Scratch grad_values(landmarks * dim), transposed(dim * width), grad_inverse(square.count()),
        memory(4 * square.count());
    add_spans(sizes, key_parts, batch, head, head_of(grad_landmark_keys, batch, head).data);
    add_spans(sizes, value_parts, batch, head, grad_values);
    product(landmarks, landmarks, dim, inverse, 1, width, grad_values, dim, head_of(grad_pooled, batch, head).data,
            dim);
    pack_transposed(landmarks, dim, head_of(pooled, batch, head).data, dim, 1.0f, transposed, width);
    product(landmarks, dim, width, grad_values, dim, 1, transposed, width, grad_inverse, width);
    for (int64_t i = iterations - 1; i >= 0; i--)
      refine_inverse_backward(square, matrix, inverse_of(batch, head, i), step_of(batch, head, i), grad_inverse,
                              grad_matrix, memory);
    // The iteration starts from A transposed and divided by its norm.
    const float norm = starts[batch * sizes.heads + head].norm;
    const float* start = inverse_of(batch, head, 0);
    Vector agreement{};
    for (int64_t i = 0; i < square.count(); i += LANES) agreement += load(grad_inverse + i) * load(start + i);
    grad_norms[batch * sizes.heads + head] = -sum_of(agreement) / norm;
    transpose(square, grad_inverse, memory);
    scale_rows(square.count(), memory, 1 / norm);
    add_to(square.count(), grad_matrix, memory);
  });
  for (int64_t batch = 0; batch < sizes.batch; batch++)
    for (int64_t head = 0; head < sizes.heads; head++) {
      const Start start = starts[batch * sizes.heads + head];
      const Head matrix = head_of(grad_attention, batch, start.head);
      for (int64_t i = 0; i < landmarks; i++) matrix.row(i)[start.column] += grad_norms[batch * sizes.heads + head];
    }

  const Tensor grad_landmark_queries = empty_landmarks(sizes),
               agreements = at::empty({sizes.batch, sizes.heads, 1, landmarks});
  for_heads(sizes, [&](int64_t batch, int64_t head) {
    const float *means = head_of(pooled, batch, head).data, *grads = head_of(grad_pooled, batch, head).data;
    float* grad_scores = head_of(grad_attention, batch, head).data;
    for (int64_t l = 0; l < landmarks; l++) {
      Vector agreement{};
      for (int64_t i = l * dim; i < (l + 1) * dim; i += LANES) agreement += load(means + i) * load(grads + i);
      head_of(agreements, batch, head).data[l] = sum_of(agreement);
    }
    softmax_rows_backward(landmarks, width, head_of(attention, batch, head).data, grad_scores, sizes.scale);
    product(landmarks, landmarks, dim, grad_scores, width, 1, head_of(key_landmarks, batch, head).data, dim,
            head_of(grad_landmark_queries, batch, head).data, dim);
    product(landmarks, landmarks, dim, grad_scores, 1, width, head_of(query_landmarks, batch, head).data, dim,
            head_of(grad_landmark_keys, batch, head).data, dim, true);
  });

  const Tensor query_parts = empty_landmarks(sizes, sizes.spans);
  const Tensor grad_kernels = at::empty({sizes.batch, sizes.heads, sizes.spans, taps});
  for_spans(sizes, [&](int64_t batch, int64_t head, int64_t span, int64_t first, int64_t end) {
    const Head keys = head_of(grad_key, batch, head), values = head_of(grad_value, batch, head);
    const Pooled landmark{head_of(query_landmarks, batch, head).data, head_of(log_sums, batch, head).data,
                          head_of(grad_pooled, batch, head).data, head_of(agreements, batch, head).data};
    std::optional<ConvolutionGradient> convolution;
    if (kernels)
      convolution.emplace(sizes, batch, kernels->const_data_ptr<float>() + head * taps, taps,
                          head_of(value, batch, head), head_of(grad, batch, head));
    pool_span_backward(sizes, batch, first, end, head_of(key, batch, head), head_of(value, batch, head), landmark,
                       head_of(grad_landmark_keys, batch, head).data, convolution ? &*convolution : nullptr, keys,
                       values, head_of(query_parts, batch, head * sizes.spans + span).data);
    if (convolution) convolution->write_kernel(head_of(grad_kernels, batch, head).row(span));
  });
  for_heads(sizes, [&](int64_t batch, int64_t head) {
    Scratch sum(landmarks * dim);
    add_spans(sizes, query_parts, batch, head, sum);
    add_to(landmarks * dim, head_of(grad_landmark_queries, batch, head).data, sum);
  });
  for_spans(sizes, [&](int64_t batch, int64_t head, int64_t, int64_t first, int64_t end) {
    spread_over_segments(sizes, batch, first, end, head_of(grad_landmark_queries, batch, head).data,
                         head_of(grad_query, batch, head));
  });
  return {grad_query, grad_key, grad_value, grad_kernels};
}

TORCH_LIBRARY_FRAGMENT(nystromformer_hf, m) {
  m.def("nystrom_forward", nystrom_forward);
  m.def("nystrom_backward", nystrom_backward);
}

}  // namespace
