// The delta rule in chunks, forward and backward: `_DeltaChunks` of kernel_attention.py, with everything about a chunk
// of one head in a core's caches. Notation as there; states are float32, (batch, heads, seq, dim).
//
// The corrections u of a chunk solve (I + A) u = b (v - decay_in k^T S), where A[i, j] = b_i (k_i . k_j) decay[i, j]
// below the diagonal. One head goes from chunk to chunk anyway, so the system is solved for these values alone, not
// for all memories S at once.
//
// Triangular matrices, rows CHUNK apart, hold blocks on and below the diagonal only; what is above them is never read.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "tasks.h"
#include "tensors.h"
#include "vector_tiles.h"

namespace {

using namespace tasks;
using namespace tensors;
using namespace tiles;

// Longer chunks would need more work inside them, shorter ones more memories.
constexpr int64_t CHUNK = 32, BLOCK = 16;
// Chunks between two memories that the forward pass keeps: what the backward pass has of them stays in a core's second
// cache.
constexpr int64_t SPAN = 8;
// Decays below exp(MIN_LOG_DECAY) are dropped, as in kernel_attention.py.
constexpr float MIN_LOG_DECAY = -40.0f;
constexpr float MIN_NORM = 1e-12f;

// A tensor (batch, heads, seq) or (batch, heads, seq, dim), the last axis of the latter contiguous; absent if not
// defined.
struct Tokens {
  float* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;

  explicit Tokens(const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    data = tensor.data_ptr<float>();
    batch = tensor.stride(0), head = tensor.stride(1), token = tensor.stride(2);
  }
  float* at(int64_t in_batch, int64_t in_head, int64_t in_seq) const {
    return data + in_batch * batch + in_head * head + in_seq * token;
  }
};

struct Sizes {
  int64_t batch, heads, kv_heads, length, features, head_dim;

  Sizes(const at::Tensor& query, const at::Tensor& value)
      : batch(query.size(0)),
        heads(query.size(1)),
        kv_heads(value.size(1)),
        length(query.size(2)),
        features(query.size(3)),
        head_dim(value.size(3)) {}
  int64_t groups() const { return heads / kv_heads; }
  int64_t chunks() const { return (length + CHUNK - 1) / CHUNK; }
  int64_t spans() const { return (chunks() + SPAN - 1) / SPAN; }
  int64_t wide_features() const { return round_up(features); }
  int64_t wide_dim() const { return round_up(head_dim); }
  int64_t wide_memory() const { return wide_features() * wide_dim(); }
};

// Which tokens: `count` of them from `start` on, in `rows` rows, those beyond `count` zero. next: where the chunk
// starts whose turn is next, negative if there is none or not a whole one.
struct Chunk {
  int64_t start, count, rows, next;

  Chunk(int64_t index, int64_t step, int64_t length)
      : start(index * CHUNK),
        count(std::min(CHUNK, length - start)),
        rows(round_up(count, BLOCK)),
        next(start + (step + 1) * CHUNK <= length ? start + step * CHUNK : -1) {}
};

// Rows.

inline void scale_row(int64_t width, float factor, const float* from, float* to) {
  for (int64_t j = 0; j < width; j += LANES) store(to + j, factor * load(from + j));
}

inline void scale_rows(int64_t rows, int64_t width, const float* factors, float sign, const float* from, float* to) {
  for (int64_t i = 0; i < rows; i++) scale_row(width, sign * factors[i], from + i * width, to + i * width);
}

inline void copy_row(int64_t width, const float* from, float* to) {
  const int64_t whole = width / LANES * LANES;
  for (int64_t j = 0; j < whole; j += LANES) store(to + j, load(from + j));
  for (int64_t j = whole; j < width; j++) to[j] = from[j];
}

// `count` rows of `width` numbers into rows of `wide`, zeros around them.
void pack_wide(int64_t count, int64_t rows, int64_t width, int64_t wide, const float* from, int64_t stride, float* to) {
  for (int64_t i = 0; i < count; i++) {
    copy_row(width, from + i * stride, to + i * wide);
    for (int64_t j = width; j < wide; j++) to[i * wide + j] = 0.0f;
  }
  std::fill(to + count * wide, to + rows * wide, 0.0f);
}

void load_rows(const Tokens& tokens, const Chunk& chunk, int64_t batch, int64_t head, int64_t width, float* to) {
  pack_wide(chunk.count, chunk.rows, width, round_up(width), tokens.at(batch, head, chunk.start), tokens.token, to);
}

void unpack(int64_t count, int64_t width, int64_t wide, const float* from, float* to, int64_t stride) {
  for (int64_t i = 0; i < count; i++) copy_row(width, from + i * wide, to + i * stride);
}

void unpack_added(int64_t count, int64_t width, int64_t wide, const float* from, float* to, int64_t stride) {
  for (int64_t i = 0; i < count; i++) add_row(width, from + i * wide, to + i * stride);
}

// The dot product of each row of `a` with that of `b`; rows are a whole number of vectors.
void row_products(int64_t rows, int64_t width, const float* a, const float* b, float* products) {
  for (int64_t start = 0; start < rows; start += LANES) {
    Vector sums[LANES];
    for (int64_t i = 0; i < LANES; i++, a += width, b += width) {
      sums[i] = load(a) * load(b);
      for (int64_t j = LANES; j < width; j += LANES) sums[i] += load(a + j) * load(b + j);
    }
    transpose_square(sums);
    for (int64_t i = 1; i < LANES; i++) sums[0] += sums[i];
    store(products + start, sums[0]);
  }
}

// Fetches the tokens of a later chunk that begins at `start`; none if it is negative.
Fetcher fetch_chunk(const Tokens& tokens, int64_t start, int64_t batch, int64_t head, int64_t width) {
  return {start < 0 ? 0 : CHUNK, width, tokens.at(batch, head, std::max<int64_t>(start, 0)), tokens.token};
}

// Products with triangular matrices.

// BLOCK rows of a product; narrow ones in higher tiles than `product` has.
inline void product_block(int64_t depth, int64_t width, const float* a, int64_t a_row, int64_t a_column, const float* b,
                          int64_t b_row, float* c, int64_t c_row) {
  if constexpr (LANES == 16) {
    if (width == LANES) return product_tile<16, 1>(depth, a, a_row, a_column, b, b_row, c, c_row, false);
    if (width == 2 * LANES || width == 3 * LANES) {
      for (int64_t i = 0; i < BLOCK; i += 8)
        if (width == 2 * LANES)
          product_tile<8, 2>(depth, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, false);
        else
          product_tile<8, 3>(depth, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, false);
      return;
    }
  }
  product(BLOCK, depth, width, a, a_row, a_column, b, b_row, c, c_row);
}

// The lower blocks of A B, (rows, rows).
void product_to_lower(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_column, const float* b,
                      float* lower) {
  for (int64_t start = 0; start < rows; start += BLOCK)
    product_block(depth, start + BLOCK, a + start * a_row, a_row, a_column, b, CHUNK, lower + start * CHUNK, CHUNK);
}

// C += L B, where `lower` is L, (rows, rows).
void add_lower_product(int64_t rows, int64_t width, const float* lower, const float* b, float* c,
                       Fetcher fetcher = {}) {
  for (int64_t start = 0; start < rows; start += BLOCK)
    product(BLOCK, start + BLOCK, width, lower + start * CHUNK, CHUNK, 1, b, width, c + start * width, width, true,
            fetcher);
}

// C += L^T B.
void add_transposed_product(int64_t rows, int64_t width, const float* lower, const float* b, float* c) {
  for (int64_t start = 0; start < rows; start += BLOCK)
    product(BLOCK, rows - start, width, lower + start * CHUNK + start, 1, CHUNK, b + start * width, width,
            c + start * width, width, true);
}

// Adds to each row of a block the rows before it, these being final, times their coefficients.
void substitute_block(int64_t width, const float* coefficients, int64_t row, int64_t column, float* x, int64_t x_row) {
  for (int64_t start = 0; start < width; start += LANES) {
    Vector rows[BLOCK];
#pragma GCC unroll 16
    for (int64_t i = 0; i < BLOCK; i++) rows[i] = load(x + i * x_row + start);
#pragma GCC unroll 16
    for (int64_t j = 0; j < BLOCK; j++)
#pragma GCC unroll 16
      for (int64_t i = 1; i < BLOCK; i++)
        if (i > j) rows[i] += fill(coefficients[i * row + j * column]) * rows[j];
#pragma GCC unroll 16
    for (int64_t i = 1; i < BLOCK; i++) store(x + i * x_row + start, rows[i]);
  }
}

// Solves (I - L) x = y in place, L strictly lower: its diagonal is not read.
void solve(int64_t rows, int64_t width, const float* lower, float* x) {
  for (int64_t start = 0; start < rows; start += BLOCK) {
    const float* block = lower + start * CHUNK;
    product(BLOCK, start, width, block, CHUNK, 1, x, width, x + start * width, width, true);
    substitute_block(width, block + start, CHUNK, 1, x + start * width, width);
  }
}

// Solves (I - L)^T x = y in place, from the last row to the first.
void solve_transposed(int64_t rows, int64_t width, const float* lower, float* x) {
  for (int64_t start = rows - BLOCK; start >= 0; start -= BLOCK) {
    const int64_t end = start + BLOCK, last = end - 1;
    product(BLOCK, rows - end, width, lower + end * CHUNK + start, 1, CHUNK, x + end * width, width, x + start * width,
            width, true);
    substitute_block(width, lower + last * CHUNK + last, -1, -CHUNK, x + last * width, -width);
  }
}

// Gates.

// Decays inside a chunk: in[i] from its start up to and with i, out[j] after j to its end, all of it; between (lower):
// from after j up to and with i, zero above the diagonal. strength: b.
struct Gates {
  float strength[CHUNK], in[CHUNK], out[CHUNK], all;
  alignas(64) float between[CHUNK * CHUNK];
};

// What is no number stays so by the product, which `exponential` alone would hide.
inline Vector exp_decay(Vector log_decay) {
  return log_decay < MIN_LOG_DECAY ? Vector{} : exponential(log_decay) + 0.0f * log_decay;
}

// The sum of log gates in two parts, as `cumulative_log_decay` takes it.
void read_gates(const Chunk& chunk, const float* strength, int64_t strength_step, const float* log_forget,
                int64_t forget_step, Gates& gates) {
  alignas(64) float coarse[CHUNK], fine[CHUNK];
  float coarse_sum = 0.0f, fine_sum = 0.0f;
  for (int64_t i = 0; i < chunk.rows; i++) {
    gates.strength[i] = i < chunk.count ? strength[i * strength_step] : 0.0f;
    if (log_forget != nullptr && i < chunk.count) {
      const float gate = std::max(log_forget[i * forget_step], 2.0f * MIN_LOG_DECAY);
      const float rounded = std::nearbyint(gate * 64.0f) / 64.0f;
      coarse_sum += rounded, fine_sum += gate - rounded;
    }
    coarse[i] = coarse_sum, fine[i] = fine_sum;
  }
  for (int64_t i = 0; i < chunk.rows; i += LANES) {
    store(gates.in + i, exp_decay(load(coarse + i) + load(fine + i)));
    store(gates.out + i, exp_decay((coarse_sum - load(coarse + i)) + (fine_sum - load(fine + i))));
  }
  gates.all = gates.in[chunk.rows - 1];
  for (int64_t i = 0; i < chunk.rows; i++) {
    float* row = gates.between + i * CHUNK;
    const int64_t end = round_up(i + 1, BLOCK);
    for (int64_t j = 0; j < end; j += LANES)
      store(row + j, exp_decay((coarse[i] - load(coarse + j)) + (fine[i] - load(fine + j))));
    std::fill(row + i + 1, row + end, 0.0f);
  }
}

// Each row of a lower matrix times the decays of that row, and times factors[i] where there are factors.
void decay_lower(int64_t rows, const float* between, const float* factors, float sign, float* lower) {
  for (int64_t i = 0; i < rows; i++) {
    const float factor = factors == nullptr ? sign : sign * factors[i];
    for (int64_t j = 0; j < round_up(i + 1, BLOCK); j += LANES) {
      float* at = lower + i * CHUNK + j;
      store(at, factor * load(at) * load(between + i * CHUNK + j));
    }
  }
}

// The feature map "silu_l2": y / |y| with y = silu(x).

// 1 / x of numbers from 1 on: a guess, whose error each step of Newton's method squares.
inline Vector reciprocal(Vector x) {
#if defined(__AVX512F__)
  Vector y = (Vector)_mm512_rcp14_ps((__m512)x);
  constexpr int STEPS = 1;
#else
  // From the bits of x, within an eighth.
  IntVector bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = 0x7EF311C7 - bits;
  Vector y;
  std::memcpy(&y, &bits, sizeof y);
  constexpr int STEPS = 3;
#endif
  for (int step = 0; step < STEPS; step++) y = y * (2.0f - x * y);
  return y;
}

inline Vector sigmoid(Vector x) { return reciprocal(1.0f + exponential(0.0f - larger(x, fill(-87.0f)))); }

// Maps rows in place and keeps what divides them; rows are a whole number of vectors.
void map_rows(int64_t rows, int64_t width, float* states, float* inverse_norms) {
  for (int64_t i = 0; i < rows * width; i += LANES) store(states + i, load(states + i) * sigmoid(load(states + i)));
  row_products(rows, width, states, states, inverse_norms);
  for (int64_t i = 0; i < rows; i++) {
    inverse_norms[i] = 1.0f / std::max(std::sqrt(inverse_norms[i]), MIN_NORM);
    scale_row(width, inverse_norms[i], states + i * width, states + i * width);
  }
}

// Turns gradients of features into those of `states`, which were mapped, in place.
void map_gradient(int64_t rows, int64_t width, const float* states, const float* features, const float* inverse_norms,
                  float* gradient) {
  float along[CHUNK];
  row_products(rows, width, gradient, features, along);
  for (int64_t i = 0; i < rows; i++, states += width, features += width, gradient += width) {
    if (inverse_norms[i] >= 1.0f / MIN_NORM) along[i] = 0.0f;
    for (int64_t j = 0; j < width; j += LANES) {
      const Vector x = load(states + j), s = sigmoid(x);
      const Vector grad = (load(gradient + j) - along[i] * load(features + j)) * inverse_norms[i];
      store(gradient + j, grad * s * (1.0f + x * (1.0f - s)));
    }
  }
}

// Forward.

struct ForwardBuffers {
  Scratch states, keys, values, written, weights, system, memory;
  Gates gates;

  ForwardBuffers(int64_t features, int64_t dim)
      : states(CHUNK * features),
        keys(features * CHUNK),
        values(CHUNK * dim),
        written(CHUNK * dim),
        weights(CHUNK * CHUNK),
        system(CHUNK * CHUNK),
        memory(features * dim) {}
};

struct Inputs {
  Tokens query, key, value, strength, log_forget;
  bool maps;  // query and key are not features yet

  void load_states(const Tokens& tokens, const Chunk& chunk, int64_t batch, int64_t head, int64_t width, float* to,
                   float* inverse_norms) const {
    load_rows(tokens, chunk, batch, head, width, to);
    if (maps) map_rows(chunk.rows, round_up(width), to, inverse_norms);
  }
  // Turns the gradient of features into that of queries or keys, in place; scratch, (rows, width), is overwritten.
  void map_back(const Tokens& tokens, const Chunk& chunk, int64_t batch, int64_t head, int64_t width,
                const float* features, const float* inverse_norms, float* gradient, float* scratch) const {
    if (!maps) return;
    load_rows(tokens, chunk, batch, head, width, scratch);
    map_gradient(chunk.rows, round_up(width), scratch, features, inverse_norms, gradient);
  }
  void load_gates(const Chunk& chunk, int64_t batch, int64_t head, Gates& gates) const {
    const float* forget = log_forget.data == nullptr ? nullptr : log_forget.at(batch, head, chunk.start);
    read_gates(chunk, strength.at(batch, head, chunk.start), strength.token, forget, log_forget.token, gates);
  }
};

// The corrections of one chunk into `buffers.written`; its keys, transposed, into `buffers.keys`.
void write_chunk(const Sizes& sizes, const Inputs& inputs, const Chunk& chunk, int64_t batch, int64_t head,
                 ForwardBuffers& buffers) {
  const int64_t rows = chunk.rows, features = sizes.wide_features(), dim = sizes.wide_dim();
  float inverse_norms[CHUNK];
  Gates& gates = buffers.gates;
  inputs.load_gates(chunk, batch, head, gates);
  inputs.load_states(inputs.key, chunk, batch, head, sizes.features, buffers.states, inverse_norms);
  transpose(rows, features, buffers.states, features, buffers.keys, CHUNK);
  product_to_lower(rows, features, buffers.states, features, 1, buffers.keys, buffers.system);
  decay_lower(rows, gates.between, gates.strength, -1.0f, buffers.system);

  load_rows(inputs.value, chunk, batch, head, sizes.head_dim, buffers.values);
  product(rows, features, dim, buffers.states, features, 1, buffers.memory, dim, buffers.written, dim, false,
          fetch_chunk(inputs.value, chunk.next, batch, head, sizes.head_dim));
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < dim; j += LANES) {
      float* at = buffers.written + i * dim + j;
      store(at, gates.strength[i] * (load(buffers.values + i * dim + j) - gates.in[i] * load(at)));
    }
  solve(rows, dim, buffers.system, buffers.written);
}

// What the queries of one head read in a chunk, into `buffers.values`.
void read_chunk(const Sizes& sizes, const Inputs& inputs, const Chunk& chunk, int64_t batch, int64_t query_head,
                ForwardBuffers& buffers) {
  const int64_t rows = chunk.rows, features = sizes.wide_features(), dim = sizes.wide_dim();
  float inverse_norms[CHUNK];
  inputs.load_states(inputs.query, chunk, batch, query_head, sizes.features, buffers.states, inverse_norms);
  product_to_lower(rows, features, buffers.states, features, 1, buffers.keys, buffers.weights);
  decay_lower(rows, buffers.gates.between, nullptr, 1.0f, buffers.weights);
  product(rows, features, dim, buffers.states, features, 1, buffers.memory, dim, buffers.values, dim, false,
          fetch_chunk(inputs.query, chunk.next, batch, query_head, sizes.features));
  scale_rows(rows, dim, buffers.gates.in, 1.0f, buffers.values, buffers.values);
  add_lower_product(rows, dim, buffers.weights, buffers.written, buffers.values);
}

// S = decay_all S + (decay_out K)^T u.
void carry(const Sizes& sizes, const Inputs& inputs, const Chunk& chunk, int64_t batch, int64_t head,
           ForwardBuffers& buffers) {
  const int64_t features = sizes.wide_features(), dim = sizes.wide_dim();
  scale_rows(chunk.rows, dim, buffers.gates.out, 1.0f, buffers.written, buffers.values);
  for (int64_t i = 0; i < features * dim; i += LANES)
    store(buffers.memory + i, buffers.gates.all * load(buffers.memory + i));
  product(features, chunk.rows, dim, buffers.keys, CHUNK, 1, buffers.values, dim, buffers.memory, dim, true,
          fetch_chunk(inputs.key, chunk.next, batch, head, sizes.features));
}

at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like) {
  return in_huge_pages(at::empty(sizes, like.options()));
}

void check(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  for (const at::Tensor* tensor : {&query, &key, &value}) {
    TORCH_CHECK(tensor->dim() == 4 && tensor->scalar_type() == at::kFloat, "states must be float32 with four axes");
    // The strides of an empty tensor, or of an axis of one entry, say nothing.
    TORCH_CHECK(tensor->stride(3) == 1 || tensor->size(3) == 1 || tensor->numel() == 0,
                "the last axis of states must be contiguous");
  }
  TORCH_CHECK(key.size(2) == query.size(2) && value.size(2) == query.size(2),
              "as many keys and values are needed as queries");
  TORCH_CHECK(key.size(1) > 0 && query.size(1) % key.size(1) == 0, "heads must be a multiple of kv_heads");
}

// Numerator and last memory; where `keeps`, also what `delta_backward` wants: the memory before each span, (batch,
// kv_heads, spans, wide_memory), and the corrections, (batch, kv_heads, seq, head_dim).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> delta_forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& strength,
    const std::optional<at::Tensor>& log_forget, const std::optional<at::Tensor>& first, bool maps, bool keeps) {
  check(query, key, value);
  const Sizes sizes(query, value);
  const int64_t features = sizes.features, head_dim = sizes.head_dim, memory_size = features * head_dim;
  at::Tensor numerator = empty({sizes.batch, sizes.heads, sizes.length, head_dim}, value);
  at::Tensor last = empty({sizes.batch, sizes.kv_heads, features, head_dim}, value);
  at::Tensor memories = empty({sizes.batch, sizes.kv_heads, keeps ? sizes.spans() : 0, sizes.wide_memory()}, value);
  at::Tensor written = empty({sizes.batch, sizes.kv_heads, keeps ? sizes.length : 0, head_dim}, value);

  const Inputs inputs{
      Tokens(query), Tokens(key), Tokens(value), Tokens(strength), Tokens(log_forget.value_or(at::Tensor())), maps};
  const Tokens outputs(numerator), corrections(written);
  const float* initial = first.has_value() ? first->data_ptr<float>() : nullptr;
  float* final = last.data_ptr<float>();
  float* kept = memories.data_ptr<float>();

  in_parallel(sizes.batch * sizes.kv_heads, [&](Tasks tasks) {
    const int64_t wide_features = sizes.wide_features(), dim = sizes.wide_dim();
    ForwardBuffers buffers(wide_features, dim);
    for (int64_t memory; tasks.next(memory);) {
      const int64_t batch = memory / sizes.kv_heads, head = memory % sizes.kv_heads;
      std::fill(buffers.memory + 0, buffers.memory + wide_features * dim, 0.0f);
      if (initial != nullptr) unpack(features, head_dim, head_dim, initial + memory * memory_size, buffers.memory, dim);
      for (int64_t index = 0; index < sizes.chunks(); index++) {
        const Chunk chunk(index, 1, sizes.length);
        if (keeps && index % SPAN == 0)
          std::copy_n(+buffers.memory, sizes.wide_memory(),
                      kept + (memory * sizes.spans() + index / SPAN) * sizes.wide_memory());
        write_chunk(sizes, inputs, chunk, batch, head, buffers);
        if (keeps)
          unpack(chunk.count, head_dim, dim, buffers.written, corrections.at(batch, head, chunk.start), head_dim);
        for (int64_t group = 0; group < sizes.groups(); group++) {
          const int64_t query_head = head * sizes.groups() + group;
          read_chunk(sizes, inputs, chunk, batch, query_head, buffers);
          unpack(chunk.count, head_dim, dim, buffers.values, outputs.at(batch, query_head, chunk.start), outputs.token);
        }
        carry(sizes, inputs, chunk, batch, head, buffers);
      }
      unpack(features, head_dim, dim, buffers.memory, final + memory * memory_size, head_dim);
    }
  });
  return {numerator, last, memories, written};
}

// Backward: the gradients of `_DeltaChunks`, from the last chunk to the first.

struct BackwardBuffers {
  // Of a span: features of keys, and the memories before its chunks and after the last one.
  Scratch all_keys, memories;
  std::vector<Gates> all_gates{SPAN};
  // Of a chunk of it.
  float *keys = nullptr, *memory = nullptr;
  Gates* gates = nullptr;
  Scratch keys_transposed, queries, written_transposed, memory_transposed, gradient_transposed;
  Scratch grad_numerator, grad_memory, grad_written, grad_query, grad_key, scaled, weights, grad_scores, system;
  // Of the keys of a span, and of the queries of one head.
  float all_key_inverse_norms[SPAN * CHUNK], query_inverse_norms[CHUNK];
  float* key_inverse_norms = nullptr;
  // Gradient of each token's write strength, and of the sum of log gates up to it.
  float grad_strength[CHUNK], grad_sums[CHUNK];

  BackwardBuffers(int64_t features, int64_t dim)
      : all_keys(SPAN * CHUNK * features),
        memories((SPAN + 1) * features * dim),
        keys_transposed(features * CHUNK),
        queries(CHUNK * features),
        written_transposed(dim * CHUNK),
        memory_transposed(dim * features),
        gradient_transposed(dim * features),
        grad_numerator(CHUNK * dim),
        grad_memory(features * dim),
        grad_written(CHUNK * dim),
        grad_query(CHUNK * features),
        grad_key(CHUNK * features),
        scaled(CHUNK * std::max(features, dim)),
        weights(CHUNK * CHUNK),
        grad_scores(CHUNK * CHUNK),
        system(CHUNK * CHUNK) {}

  // Chooses a chunk of the span.
  void enter(const Sizes& sizes, int64_t index) {
    keys = all_keys + index * CHUNK * sizes.wide_features();
    key_inverse_norms = all_key_inverse_norms + index * CHUNK;
    memory = memories + index * sizes.wide_memory();
    gates = &all_gates[index];
  }
};

struct Gradients {
  Tokens numerator;  // given
  Tokens query, key, value, strength, log_forget;
  bool adds;  // to what those of query, key and value hold already

  // Rows of a chunk, `width` numbers in rows of whole vectors, as gradients of `tensor`, one of these three.
  void put(const Tokens& tensor, const Chunk& chunk, int64_t batch, int64_t head, int64_t width,
           const float* rows) const {
    const auto write = adds ? unpack_added : unpack;
    write(chunk.count, width, round_up(width), rows, tensor.at(batch, head, chunk.start), tensor.token);
  }
  // What the rows of the next chunk are to be added to.
  Fetcher fetch_sums(const Tokens& tensor, const Chunk& chunk, int64_t batch, int64_t head, int64_t width) const {
    return fetch_chunk(tensor, adds ? chunk.next : -1, batch, head, width);
  }
};

// Loads the keys of a chunk, and takes the memory before it to that after it.
void replay_chunk(const Sizes& sizes, const Inputs& inputs, const Tokens& written, const Chunk& chunk, int64_t batch,
                  int64_t head, BackwardBuffers& buffers) {
  const int64_t rows = chunk.rows, features = sizes.wide_features(), dim = sizes.wide_dim();
  Gates& gates = *buffers.gates;
  inputs.load_states(inputs.key, chunk, batch, head, sizes.features, buffers.keys, buffers.key_inverse_norms);
  inputs.load_gates(chunk, batch, head, gates);
  load_rows(written, chunk, batch, head, sizes.head_dim, buffers.scaled);
  scale_rows(rows, dim, gates.out, 1.0f, buffers.scaled, buffers.scaled);
  float* after = buffers.memory + sizes.wide_memory();
  for (int64_t i = 0; i < sizes.wide_memory(); i += LANES) store(after + i, gates.all * load(buffers.memory + i));
  product(features, rows, dim, buffers.keys, 1, features, buffers.scaled, dim, after, dim, true);
}

// Starts the gradients of a chunk's corrections and keys with what later chunks read.
void start_chunk(const Sizes& sizes, const Inputs& inputs, const Tokens& written, const Chunk& chunk, int64_t batch,
                 int64_t head, BackwardBuffers& buffers) {
  const int64_t rows = chunk.rows, features = sizes.wide_features(), dim = sizes.wide_dim();
  const Gates& gates = *buffers.gates;
  transpose(rows, features, buffers.keys, features, buffers.keys_transposed, CHUNK);
  load_rows(written, chunk, batch, head, sizes.head_dim, buffers.scaled);
  transpose(rows, dim, buffers.scaled, dim, buffers.written_transposed, CHUNK);

  // The last token's sum counts in all that is left after the chunk.
  std::fill(buffers.grad_sums, buffers.grad_sums + CHUNK, 0.0f);
  float products[LANES];
  for (int64_t i = 0; i < features; i += LANES) {
    row_products(LANES, dim, buffers.memory + sizes.wide_memory() + i * dim, buffers.grad_memory + i * dim, products);
    buffers.grad_sums[rows - 1] += sum_of(load(products));
  }
  transpose(features, dim, buffers.memory, dim, buffers.memory_transposed, features);
  transpose(features, dim, buffers.grad_memory, dim, buffers.gradient_transposed, features);

  product(rows, dim, features, buffers.scaled, dim, 1, buffers.gradient_transposed, features, buffers.grad_key,
          features, false, fetch_chunk(inputs.value, chunk.next, batch, head, sizes.head_dim));
  scale_rows(rows, features, gates.out, 1.0f, buffers.grad_key, buffers.grad_key);
  // Of the span whose turn is next.
  product(rows, features, dim, buffers.keys, features, 1, buffers.grad_memory, dim, buffers.grad_written, dim, false,
          fetch_chunk(inputs.key, chunk.start - SPAN * CHUNK, batch, head, sizes.features));
  scale_rows(rows, dim, gates.out, 1.0f, buffers.grad_written, buffers.grad_written);
  for (int64_t i = 0; i < features * dim; i += LANES)
    store(buffers.grad_memory + i, gates.all * load(buffers.grad_memory + i));
}

// Through the weights and what the queries of one head read of the memory.
void read_backward(const Sizes& sizes, const Inputs& inputs, const Gradients& gradients, const Chunk& chunk,
                   int64_t batch, int64_t query_head, BackwardBuffers& buffers) {
  const int64_t rows = chunk.rows, features = sizes.wide_features(), dim = sizes.wide_dim();
  const Gates& gates = *buffers.gates;
  inputs.load_states(inputs.query, chunk, batch, query_head, sizes.features, buffers.queries,
                     buffers.query_inverse_norms);
  load_rows(gradients.numerator, chunk, batch, query_head, sizes.head_dim, buffers.grad_numerator);
  product_to_lower(rows, features, buffers.queries, features, 1, buffers.keys_transposed, buffers.weights);
  decay_lower(rows, gates.between, nullptr, 1.0f, buffers.weights);
  add_transposed_product(rows, dim, buffers.weights, buffers.grad_numerator, buffers.grad_written);

  product_to_lower(rows, dim, buffers.grad_numerator, dim, 1, buffers.written_transposed, buffers.grad_scores);
  decay_lower(rows, gates.between, nullptr, 1.0f, buffers.grad_scores);
  add_transposed_product(rows, features, buffers.grad_scores, buffers.queries, buffers.grad_key);
  scale_rows(rows, dim, gates.in, 1.0f, buffers.grad_numerator, buffers.grad_numerator);
  product(rows, dim, features, buffers.grad_numerator, dim, 1, buffers.memory_transposed, features, buffers.grad_query,
          features, false, fetch_chunk(inputs.query, chunk.next, batch, query_head, sizes.features));
  add_lower_product(rows, features, buffers.grad_scores, buffers.keys, buffers.grad_query,
                    gradients.fetch_sums(gradients.query, chunk, batch, query_head, sizes.features));
  product(features, rows, dim, buffers.queries, 1, features, buffers.grad_numerator, dim, buffers.grad_memory, dim,
          true, fetch_chunk(gradients.numerator, chunk.next, batch, query_head, sizes.head_dim));

  float read[CHUNK];
  row_products(rows, features, buffers.grad_query, buffers.queries, read);
  for (int64_t i = 0; i < rows; i++) buffers.grad_sums[i] += read[i];
  inputs.map_back(inputs.query, chunk, batch, query_head, sizes.features, buffers.queries, buffers.query_inverse_norms,
                  buffers.grad_query, buffers.scaled);
  gradients.put(gradients.query, chunk, batch, query_head, sizes.features, buffers.grad_query);
}

// Through the corrections, back to values, keys and the memory before the chunk.
void write_backward(const Sizes& sizes, const Inputs& inputs, const Tokens& written, const Gradients& gradients,
                    const Chunk& chunk, int64_t batch, int64_t head, BackwardBuffers& buffers) {
  const int64_t rows = chunk.rows, features = sizes.wide_features(), dim = sizes.wide_dim();
  const Gates& gates = *buffers.gates;
  load_rows(written, chunk, batch, head, sizes.head_dim, buffers.scaled);
  float reads[CHUNK], is_read[CHUNK];
  row_products(rows, dim, buffers.grad_written, buffers.scaled, reads);
  row_products(rows, features, buffers.grad_key, buffers.keys, is_read);
  for (int64_t i = 0; i < rows; i++) buffers.grad_sums[i] += reads[i] - is_read[i];
  product_to_lower(rows, features, buffers.keys, features, 1, buffers.keys_transposed, buffers.system);
  decay_lower(rows, gates.between, gates.strength, -1.0f, buffers.system);
  solve_transposed(rows, dim, buffers.system, buffers.grad_written);

  load_rows(inputs.value, chunk, batch, head, sizes.head_dim, buffers.scaled);
  row_products(rows, dim, buffers.grad_written, buffers.scaled, buffers.grad_strength);
  for (int64_t i = 0; i < rows; i++) buffers.grad_sums[i] -= gates.strength[i] * buffers.grad_strength[i];

  // The gradient of the strictly lower part of K K^T, before the write strengths: of b K that goes to b and to K.
  product_to_lower(rows, dim, buffers.grad_written, dim, 1, buffers.written_transposed, buffers.grad_scores);
  decay_lower(rows, gates.between, nullptr, -1.0f, buffers.grad_scores);
  for (int64_t i = 0; i < rows; i++) buffers.grad_scores[i * CHUNK + i] = 0.0f;
  scale_rows(rows, dim, gates.in, -1.0f, buffers.grad_written, buffers.scaled);
  float* grad_written_key = buffers.grad_query;
  product(rows, dim, features, buffers.scaled, dim, 1, buffers.memory_transposed, features, grad_written_key, features,
          false, fetch_chunk(written, chunk.start - SPAN * CHUNK, batch, head, sizes.head_dim));
  add_lower_product(rows, features, buffers.grad_scores, buffers.keys, grad_written_key,
                    gradients.fetch_sums(gradients.key, chunk, batch, head, sizes.features));
  scale_rows(rows, dim, gates.strength, 1.0f, buffers.scaled, buffers.scaled);
  product(features, rows, dim, buffers.keys_transposed, CHUNK, 1, buffers.scaled, dim, buffers.grad_memory, dim, true,
          gradients.fetch_sums(gradients.value, chunk, batch, head, sizes.head_dim));

  float through_write[CHUNK];
  row_products(rows, features, grad_written_key, buffers.keys, through_write);
  for (int64_t i = 0; i < rows; i++) {
    buffers.grad_strength[i] += through_write[i];
    for (int64_t j = i * features; j < (i + 1) * features; j += LANES)
      store(buffers.grad_key + j, load(buffers.grad_key + j) + gates.strength[i] * load(grad_written_key + j));
  }
  scale_rows(rows, CHUNK, gates.strength, 1.0f, buffers.grad_scores, buffers.grad_scores);
  add_transposed_product(rows, features, buffers.grad_scores, buffers.keys, buffers.grad_key);
  scale_rows(rows, dim, gates.strength, 1.0f, buffers.grad_written, buffers.grad_written);

  inputs.map_back(inputs.key, chunk, batch, head, sizes.features, buffers.keys, buffers.key_inverse_norms,
                  buffers.grad_key, buffers.scaled);
  gradients.put(gradients.key, chunk, batch, head, sizes.features, buffers.grad_key);
  gradients.put(gradients.value, chunk, batch, head, sizes.head_dim, buffers.grad_written);
}

// Gradients of the gates of a chunk. A gate counts in every sum from its token on; clamped ones get none.
void store_gate_gradients(const Inputs& inputs, const Gradients& gradients, const Chunk& chunk, int64_t batch,
                          int64_t head, const BackwardBuffers& buffers) {
  for (int64_t i = 0; i < chunk.count; i++)
    *gradients.strength.at(batch, head, chunk.start + i) = buffers.grad_strength[i];
  if (inputs.log_forget.data == nullptr) return;
  float sum = 0.0f;
  for (int64_t i = chunk.rows - 1; i >= 0; i--) {
    sum += buffers.grad_sums[i];
    if (i >= chunk.count) continue;
    const bool clamped = *inputs.log_forget.at(batch, head, chunk.start + i) < 2.0f * MIN_LOG_DECAY;
    *gradients.log_forget.at(batch, head, chunk.start + i) = clamped ? 0.0f : sum;
  }
}

// The gradients of a span, whose memory at its start is in `buffers`; the gradient of the memory goes from its end to
// its start.
void span_backward(const Sizes& sizes, const Inputs& inputs, const Tokens& written, const Gradients& gradients,
                   int64_t span, int64_t batch, int64_t head, BackwardBuffers& buffers) {
  const int64_t first = span * SPAN, count = std::min(SPAN, sizes.chunks() - first);
  for (int64_t index = 0; index < count; index++) {
    buffers.enter(sizes, index);
    replay_chunk(sizes, inputs, written, Chunk(first + index, 1, sizes.length), batch, head, buffers);
  }
  for (int64_t index = count - 1; index >= 0; index--) {
    const Chunk chunk(first + index, -1, sizes.length);
    buffers.enter(sizes, index);
    start_chunk(sizes, inputs, written, chunk, batch, head, buffers);
    for (int64_t group = 0; group < sizes.groups(); group++)
      read_backward(sizes, inputs, gradients, chunk, batch, head * sizes.groups() + group, buffers);
    write_backward(sizes, inputs, written, gradients, chunk, batch, head, buffers);
    store_gate_gradients(inputs, gradients, chunk, batch, head, buffers);
  }
}

// Gradients of query, key and value are added to `sums`, if there are any, or else returned; also those of write
// strength, log_forget (empty without it) and the first memory.
std::tuple<Tensors, at::Tensor, at::Tensor, at::Tensor> delta_backward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& strength,
    const std::optional<at::Tensor>& log_forget, const at::Tensor& memories, const at::Tensor& written,
    const at::Tensor& grad_numerator, const at::Tensor& grad_last, bool maps, const Tensors& sums) {
  check(query, key, value);
  TORCH_CHECK(memories.is_contiguous() && grad_last.is_contiguous(), "memories must be contiguous");
  const Sizes sizes(query, value);
  const int64_t features = sizes.features, head_dim = sizes.head_dim, memory_size = features * head_dim;
  check_sums(sums, {query, key, value});
  const Tensors grads = sums.empty() ? empty_gradients({query, key, value}) : Tensors(),
                &targets = sums.empty() ? grads : sums;
  at::Tensor grad_strength = at::empty_like(strength), grad_first = at::empty_like(grad_last);
  at::Tensor grad_forget = log_forget.has_value() ? at::empty_like(*log_forget) : at::empty({0}, value.options());

  const at::Tensor forget = log_forget.value_or(at::Tensor());
  const Inputs inputs{Tokens(query), Tokens(key), Tokens(value), Tokens(strength), Tokens(forget), maps};
  const Gradients gradients{Tokens(grad_numerator), Tokens(targets[0]),
                            Tokens(targets[1]),     Tokens(targets[2]),
                            Tokens(grad_strength),  Tokens(forget.defined() ? grad_forget : forget),
                            !sums.empty()};
  const Tokens corrections(written);
  const float *kept = memories.data_ptr<float>(), *grad_after = grad_last.data_ptr<float>();
  float* first = grad_first.data_ptr<float>();

  in_parallel(sizes.batch * sizes.kv_heads, [&](Tasks tasks) {
    const int64_t wide_features = sizes.wide_features(), dim = sizes.wide_dim();
    BackwardBuffers buffers(wide_features, dim);
    for (int64_t memory; tasks.next(memory);) {
      const int64_t batch = memory / sizes.kv_heads, head = memory % sizes.kv_heads;
      pack_wide(features, wide_features, head_dim, dim, grad_after + memory * memory_size, head_dim,
                buffers.grad_memory);
      for (int64_t span = sizes.spans() - 1; span >= 0; span--) {
        std::copy_n(kept + (memory * sizes.spans() + span) * sizes.wide_memory(), sizes.wide_memory(),
                    +buffers.memories);
        span_backward(sizes, inputs, corrections, gradients, span, batch, head, buffers);
      }
      unpack(features, head_dim, dim, buffers.grad_memory, first + memory * memory_size, head_dim);
    }
  });
  return {grads, grad_strength, grad_forget, grad_first};
}

// The norm of what was read: y = weight x / sqrt(mean(x^2) + eps) for rows x of contiguous states.

// Sums over blocks of this many rows make the gradient of the weight, whatever the number of threads.
constexpr int64_t NORM_ROWS = 4096;

// factors[i] = 1 / sqrt(mean(x_i^2) + eps).
void norm_factors(int64_t rows, int64_t width, int64_t wide, const float* x, float eps, float* factors) {
  row_products(rows, wide, x, x, factors);
  for (int64_t i = 0; i < rows; i++) factors[i] = 1.0f / std::sqrt(factors[i] / width + eps);
}

void check_norm(const at::Tensor& states, const at::Tensor& weight) {
  TORCH_CHECK(states.scalar_type() == at::kFloat && states.is_contiguous(), "states must be float32 and contiguous");
  TORCH_CHECK(weight.scalar_type() == at::kFloat && weight.is_contiguous() && weight.numel() == states.size(-1),
              "the weight must be float32, one number for each of a state");
}

// Into `result`, which may be `states`.
void rms_norm_forward(const at::Tensor& states, const at::Tensor& weight, double eps, at::Tensor result) {
  check_norm(states, weight);
  check_norm(result, weight);
  const int64_t width = states.size(-1), wide = round_up(width), rows = states.numel() / width;
  if (!result.is_same(states)) in_huge_pages(result);
  const float *from = states.data_ptr<float>(), *weights = weight.data_ptr<float>();
  float* to = result.data_ptr<float>();
  in_parallel((rows + NORM_ROWS - 1) / NORM_ROWS, [&](Tasks tasks) {
    Scratch x(CHUNK * wide), scale(wide);
    float factors[CHUNK];
    pack_wide(1, 1, width, wide, weights, width, scale);
    for (int64_t block; tasks.next(block);) {
      const int64_t last = std::min((block + 1) * NORM_ROWS, rows);
      for (int64_t row = block * NORM_ROWS; row < last; row += CHUNK) {
        const int64_t count = std::min(CHUNK, last - row);
        pack_wide(count, CHUNK, width, wide, from + row * width, width, x);
        norm_factors(CHUNK, width, wide, x, static_cast<float>(eps), factors);
        for (int64_t i = 0; i < count; i++)
          for (int64_t j = 0; j < wide; j += LANES)
            store(x + i * wide + j, load(scale + j) * (factors[i] * load(x + i * wide + j)));
        unpack(count, width, wide, x, to + row * width, width);
      }
    }
  });
}

// Rows of a tensor (batch, heads, seq, width), counted through, into rows of `wide`, zeros behind them.
void gather_rows(const at::Tensor& tensor, int64_t first, int64_t count, int64_t wide, float* to) {
  const int64_t heads = tensor.size(1), length = tensor.size(2), width = tensor.size(3);
  const Tokens tokens(tensor);
  for (int64_t row = first; row < first + count; row++, to += wide)
    pack_wide(1, 1, width, wide, tokens.at(row / length / heads, row / length % heads, row % length), width, to);
}

// Gradients of states and weight: with n = x factor and g = weight grad, factor (g - n mean(g n)), and sum(grad n).
std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& states, const at::Tensor& weight,
                                                     const at::Tensor& grad, double eps) {
  const int64_t width = states.size(-1);
  check_norm(states, weight);
  TORCH_CHECK(states.dim() == 4 && grad.sizes() == states.sizes() && (grad.stride(3) == 1 || width == 1),
              "the gradient must have contiguous rows, and four axes as states");
  const int64_t wide = round_up(width), rows = states.numel() / width;
  const int64_t blocks = (rows + NORM_ROWS - 1) / NORM_ROWS;
  at::Tensor grad_states = in_huge_pages(at::empty_like(states)), grad_weight = at::empty_like(weight);
  const float *from = states.data_ptr<float>(), *weights = weight.data_ptr<float>();
  float *to = grad_states.data_ptr<float>(), *total = grad_weight.data_ptr<float>();
  Scratch sums(blocks * wide);
  std::fill(sums + 0, sums + blocks * wide, 0.0f);
  in_parallel(blocks, [&](Tasks tasks) {
    Scratch x(CHUNK * wide), g(CHUNK * wide), scale(wide);
    float factors[CHUNK], along[CHUNK];
    pack_wide(1, 1, width, wide, weights, width, scale);
    for (int64_t block; tasks.next(block);) {
      const int64_t last = std::min((block + 1) * NORM_ROWS, rows);
      float* sum = sums + block * wide;
      for (int64_t row = block * NORM_ROWS; row < last; row += CHUNK) {
        const int64_t count = std::min(CHUNK, last - row);
        pack_wide(count, CHUNK, width, wide, from + row * width, width, x);
        gather_rows(grad, row, count, wide, g);
        std::fill(g + count * wide, g + CHUNK * wide, 0.0f);
        norm_factors(CHUNK, width, wide, x, static_cast<float>(eps), factors);
        for (int64_t i = 0; i < CHUNK; i++)
          for (int64_t j = 0; j < wide; j += LANES) {
            const Vector n = factors[i] * load(x + i * wide + j), d = load(g + i * wide + j);
            store(sum + j, load(sum + j) + d * n);
            store(x + i * wide + j, n);
            store(g + i * wide + j, load(scale + j) * d);
          }
        row_products(CHUNK, wide, x, g, along);
        for (int64_t i = 0; i < count; i++)
          for (int64_t j = 0; j < wide; j += LANES) {
            const Vector across = load(g + i * wide + j) - along[i] / width * load(x + i * wide + j);
            store(g + i * wide + j, factors[i] * across);
          }
        unpack(count, width, wide, g, to + row * width, width);
      }
    }
  });
  for (int64_t j = 0; j < width; j++) {
    total[j] = 0.0f;
    for (int64_t block = 0; block < blocks; block++) total[j] += sums[block * wide + j];
  }
  return {grad_states, grad_weight};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(kermit_hf, m) {
  m.def(
      "delta_forward(Tensor query, Tensor key, Tensor value, Tensor write_strength, Tensor? log_forget, "
      "Tensor? matrix, bool maps, bool keeps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "delta_backward(Tensor query, Tensor key, Tensor value, Tensor write_strength, Tensor? log_forget, "
      "Tensor memories, Tensor written, Tensor grad_numerator, Tensor grad_last, bool maps, Tensor(a!)[] sums) "
      "-> (Tensor[], Tensor, Tensor, Tensor)");
  m.def("rms_norm_forward(Tensor states, Tensor weight, float eps, Tensor(a!) result) -> ()");
  m.def("rms_norm_backward(Tensor states, Tensor weight, Tensor grad, float eps) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(kermit_hf, CPU, m) {
  m.impl("delta_forward", delta_forward);
  m.impl("delta_backward", delta_backward);
  m.impl("rms_norm_forward", rms_norm_forward);
  m.impl("rms_norm_backward", rms_norm_backward);
}
