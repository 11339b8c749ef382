// The additive rule in chunks, and its backward pass; the formulas are those of `additive_chunked` in
// kernel_attention.py.
//
// One key/value head after the other: explicit weights inside a chunk, and the memory S of everything before it, which
// stays in the caches. The feature map elu(x) + 1 is taken while the tokens of a chunk are packed. Below, q and k are
// features.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

#include "tasks.h"
#include "tensors.h"
#include "vector_tiles.h"

namespace {

using namespace tasks;
using namespace tensors;
using namespace tiles;
using at::Tensor;

constexpr int64_t CHUNK = 48;
// Chunks between two memories that the forward pass keeps: what the backward pass has of them stays in a core's second
// cache.
constexpr int64_t SPAN = 8;
constexpr float MIN_LOG_DECAY = -40.0f;
constexpr float MIN_DENOMINATOR = 1e-30f;

struct Sizes {
  int64_t batch, heads, kv_heads, length, features, dims;
  // Whole vectors, and rows of values with one more number beside them.
  int64_t feature_width, value_width, extended_width;

  Sizes(const Tensor& query, const Tensor& key, const Tensor& value)
      : batch(query.size(0)),
        heads(query.size(1)),
        kv_heads(key.size(1)),
        length(query.size(2)),
        features(query.size(3)),
        dims(value.size(3)),
        feature_width(round_up(features)),
        value_width(round_up(dims)),
        extended_width(round_up(dims + 1)) {
    // The strides of an empty tensor, or of an axis of one entry, say nothing.
    for (const Tensor* states : {&query, &key, &value})
      TORCH_CHECK(states->stride(3) == 1 || states->size(3) == 1 || states->numel() == 0, "rows have to be contiguous");
    TORCH_CHECK(key.size(2) == length && value.size(2) == length, "as many keys and values are needed as queries");
    TORCH_CHECK(heads % kv_heads == 0, heads, " query heads cannot share ", kv_heads, " key/value heads");
  }

  int64_t groups() const { return heads / kv_heads; }
  int64_t chunks() const { return (length + CHUNK - 1) / CHUNK; }
  int64_t spans() const { return (chunks() + SPAN - 1) / SPAN; }
  // A memory, transposed, with the normalizer as a row behind it.
  int64_t kept_size() const { return extended_width * feature_width; }
};

// Tokens of a tensor (batch, heads, seq, dim) or (batch, heads, seq) of any strides but that of the last axis, which is
// one.
struct Tokens {
  float* data;
  int64_t batch, head, stride;

  explicit Tokens(const Tensor& tensor)
      : data(tensor.data_ptr<float>()), batch(tensor.stride(0)), head(tensor.stride(1)), stride(tensor.stride(2)) {}

  float* at(int64_t b, int64_t h, int64_t token) const { return data + b * batch + h * head + token * stride; }
};

// Fetches the tokens of a chunk that begins at `first`, those of them that there are; none if it is negative.
Fetcher fetch_chunk(const Tokens& tokens, int64_t b, int64_t h, int64_t first, int64_t length, int64_t dims) {
  return {first < 0 ? 0 : std::min(CHUNK, length - first), dims, tokens.at(b, h, std::max<int64_t>(first, 0)),
          tokens.stride};
}

std::optional<Tokens> tokens_of(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tokens>(*tensor) : std::nullopt;
}

// Packing.

// exp of numbers from -80 to 0, to about two units in the last place and in two thirds of the time of `exponential`:
// 2^k is added to the exponent. A minimax polynomial of exp(r).
Vector exponential_below_zero(Vector x) {
  const Vector shifted = x * 1.44269504f + 12582912.0f;
  const Vector k = shifted - 12582912.0f;
  const Vector r = x - k * 0.693359375f - k * -2.12194440e-4f;
  Vector p = r * 0.008290314115583897f + 0.04189793020486832f;
  p = p * r + 0.1666763573884964f;
  p = p * r + 0.4999915063381195f;
  p = p * r + 0.9999997019767761f;
  p = p * r + 1.0f;
  IntVector bits, power;
  std::memcpy(&power, &shifted, sizeof power);
  std::memcpy(&bits, &p, sizeof bits);
  bits += power << 23;
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

// elu(x) + 1, as `_EluPlusOne` has it. Not-a-numbers stay what they are: the second one of two is taken.
Vector elu_plus_one(Vector x) {
  const Vector zero{};
  return exponential_below_zero(larger(fill(MIN_LOG_DECAY), smaller(zero, x))) + larger(zero, x);
}

// Rows (rows, width) into whole vectors, whose rest gets zero: `map` of them, a function of a vector.
template <class Map>
void pack_mapped(int64_t rows, int64_t width, const float* from, int64_t stride, float* to, int64_t padded, Map map) {
  const int64_t whole = width / LANES * LANES;
  for (int64_t i = 0; i < rows; i++, from += stride, to += padded) {
    for (int64_t j = 0; j < whole; j += LANES) store(to + j, map(load(from + j)));
    if (whole == padded) continue;
    float rest[LANES] = {};
    std::copy(from + whole, from + width, rest);
    store(rest, map(load(rest)));
    std::fill(std::copy(rest, rest + width - whole, to + whole), to + padded, 0.0f);
  }
}

// The features of tokens, (rows, padded).
void pack_features(bool elu, int64_t rows, int64_t features, const float* from, int64_t stride, float* to,
                   int64_t padded) {
  if (elu)
    pack_mapped(rows, features, from, stride, to, padded, elu_plus_one);
  else
    pack_mapped(rows, features, from, stride, to, padded, [](Vector x) { return x; });
}

void unpack(int64_t rows, int64_t width, const float* from, int64_t padded, float* to, int64_t stride) {
  const int64_t whole = width / LANES * LANES;
  for (int64_t i = 0; i < rows; i++, from += padded, to += stride) {
    for (int64_t j = 0; j < whole; j += LANES) store(to + j, load(from + j));
    for (int64_t j = whole; j < width; j++) to[j] = from[j];
  }
}

struct Lanes {
  int32_t numbers[LANES];
  constexpr Lanes() : numbers() {
    for (int64_t i = 0; i < LANES; i++) numbers[i] = i;
  }
  IntVector vector() const {
    IntVector vector;
    std::memcpy(&vector, numbers, sizeof vector);
    return vector;
  }
};
constexpr Lanes COLUMNS;

// Small operations on rows of whole vectors.

float dot(int64_t width, const float* a, const float* b) {
  Vector sum{};
  for (int64_t j = 0; j < width; j += LANES) sum += load(a + j) * load(b + j);
  return sum_of(sum);
}

void scale(int64_t width, float factor, float* row) {
  for (int64_t j = 0; j < width; j += LANES) store(row + j, load(row + j) * factor);
}

void copy_scaled(int64_t width, float factor, const float* from, float* to) {
  for (int64_t j = 0; j < width; j += LANES) store(to + j, load(from + j) * factor);
}

// The same of any number of entries.
float unpadded_dot(int64_t width, const float* a, const float* b) {
  const int64_t whole = width / LANES * LANES;
  float sum = dot(whole, a, b);
  for (int64_t j = whole; j < width; j++) sum += a[j] * b[j];
  return sum;
}

// to = decay from + added
void carry(int64_t count, float decay, const float* from, const float* added, float* to) {
  for (int64_t i = 0; i < count; i += LANES) store(to + i, load(from + i) * decay + load(added + i));
}

void sum_rows(int64_t rows, int64_t width, const float* matrix, float* sums) {
  for (int64_t j = 0; j < width; j += LANES) {
    Vector sum{};
    for (int64_t i = 0; i < rows; i++) sum += load(matrix + i * width + j);
    store(sums + j, sum);
  }
}

// Triangular products. Their matrices, rows of queries and columns of keys, are zero where a key comes after the query.

// Decay between the tokens of a chunk, see `_decays`.
struct Decays {
  alignas(64) float pairs[CHUNK * CHUNK];
  float in[CHUNK], out[CHUNK], all;

  void set(int64_t rows, const float* log_forget, int64_t stride) {
    alignas(64) float coarse[CHUNK] = {}, fine[CHUNK] = {};
    float coarse_sum = 0.0f, fine_sum = 0.0f;
    for (int64_t i = 0; i < rows; i++) {
      const float gate = std::max(log_forget[i * stride], 2 * MIN_LOG_DECAY);
      const float rounded = std::nearbyint(gate * 64.0f) / 64.0f;
      coarse[i] = coarse_sum += rounded;
      fine[i] = fine_sum += gate - rounded;
    }
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t j = 0; j <= i; j += LANES)
        store(pairs + i * CHUNK + j, decay((coarse[i] - load(coarse + j)) + (fine[i] - load(fine + j))));
      in[i] = decay(fill(coarse[i] + fine[i]))[0];
      out[i] = decay(fill((coarse_sum - coarse[i]) + (fine_sum - fine[i])))[0];
    }
    all = in[rows - 1];
  }

  static Vector decay(Vector log_decay) {
    const Vector zero{};
    return log_decay < MIN_LOG_DECAY ? zero : exponential(log_decay < zero ? log_decay : zero);
  }
};

// Leaves of a tile of weights or their gradients, rows `first` to `last` and as many columns, what causality leaves,
// times decay.
void mask_future(int64_t first, int64_t last, float* weights, int64_t stride, const Decays* decays) {
  for (int64_t i = first; i < last; i++, weights += stride) {
    if (decays)
      for (int64_t j = 0; j <= i; j += LANES)
        store(weights + j, load(weights + j) * load(decays->pairs + i * CHUNK + j));
    for (int64_t j = i / LANES * LANES; j < last; j += LANES)
      store(weights + j, COLUMNS.vector() <= static_cast<int32_t>(i - j) ? load(weights + j) : Vector{});
  }
}

// Forward.

struct Reading {
  Sizes sizes;
  bool elu, divide;
  Tokens query, key, value;
  std::optional<Tokens> log_forget, keep;
  Tokens numerator, denominator;

  Reading(const Sizes& sizes, bool elu, bool divide, const Tensor& query, const Tensor& key, const Tensor& value,
          const std::optional<Tensor>& log_forget, const std::optional<Tensor>& keep, const Tensor& numerator,
          const Tensor& denominator)
      : sizes(sizes),
        elu(elu),
        divide(divide),
        query(query),
        key(key),
        value(value),
        log_forget(tokens_of(log_forget)),
        keep(tokens_of(keep)),
        numerator(numerator),
        denominator(denominator) {}

  // Features of keys, (rows, feature_width), zero for a token that does not enter the memory.
  void take_keys(int64_t b, int64_t h, int64_t start, int64_t rows, float* to) const {
    pack_features(elu, rows, sizes.features, key.at(b, h, start), key.stride, to, sizes.feature_width);
    for (int64_t i = 0; keep && i < rows; i++)
      if (*keep->at(b, h, start + i) == 0.0f) std::fill_n(to + i * sizes.feature_width, sizes.feature_width, 0.0f);
  }
};

class Reader {
 public:
  explicit Reader(const Reading& reading)
      : reading_(reading),
        sizes_(reading.sizes),
        read_width_(sizes_.feature_width + CHUNK),
        keys_(CHUNK * sizes_.feature_width),
        turned_keys_(CHUNK * sizes_.feature_width),
        readers_(CHUNK * read_width_),
        read_(read_width_ * sizes_.value_width),
        values_(read_ + sizes_.feature_width * sizes_.value_width),
        numerators_(TILE_ROWS * sizes_.value_width),
        written_(TILE_ROWS * sizes_.value_width),
        normalizer_(sizes_.feature_width),
        written_sums_(sizes_.feature_width) {}

  // Takes the memory (features, dims) before the first token and leaves there that after the last one. Keeps, if
  // anything, the memory before each span.
  void run(int64_t b, int64_t h, float* matrix, float* normalizer, float* kept) {
    const int64_t features = sizes_.features, dims = sizes_.dims;
    std::fill_n(+read_, sizes_.feature_width * sizes_.value_width, 0.0f);
    unpack(features, dims, matrix, dims, read_, sizes_.value_width);
    std::fill(std::copy_n(normalizer, features, +normalizer_), normalizer_ + sizes_.feature_width, 0.0f);
    for (int64_t start = 0; start < sizes_.length; start += CHUNK) {
      const int64_t rows = std::min(CHUNK, sizes_.length - start), span = start / (SPAN * CHUNK);
      if (kept && start % (SPAN * CHUNK) == 0) keep_memory(kept + span * sizes_.kept_size());
      take_chunk(b, h, start, rows);
      for (int64_t group = 0; group < sizes_.groups(); group++) read(b, h, group, start, rows);
      write(b, h, start, rows);
    }
    unpack(features, dims, read_, sizes_.value_width, matrix, dims);
    std::copy_n(+normalizer_, features, normalizer);
  }

 private:
  // As the backward pass has it.
  void keep_memory(float* kept) const {
    const int64_t width = sizes_.feature_width;
    transpose(width, sizes_.value_width, read_, sizes_.value_width, kept, width);
    std::copy_n(+normalizer_, width, kept + sizes_.dims * width);
  }

  void take_chunk(int64_t b, int64_t h, int64_t start, int64_t rows) {
    const int64_t width = sizes_.feature_width;
    reading_.take_keys(b, h, start, rows, keys_);
    std::fill(keys_ + rows * width, keys_ + round_up(rows) * width, 0.0f);
    transpose(round_up(rows), width, keys_, width, turned_keys_, CHUNK);
    pack_mapped(rows, sizes_.dims, reading_.value.at(b, h, start), reading_.value.stride, values_, sizes_.value_width,
                [](Vector x) { return x; });
    if (reading_.log_forget) decays_.set(rows, reading_.log_forget->at(b, h, start), reading_.log_forget->stride);
  }

  // Numerators are products of one matrix with another: features and weights of the queries; the memory and the values.
  void read(int64_t b, int64_t h, int64_t group, int64_t start, int64_t rows) {
    const int64_t width = sizes_.feature_width, value_width = sizes_.value_width, head = h * sizes_.groups() + group;
    pack_features(reading_.elu, rows, sizes_.features, reading_.query.at(b, head, start), reading_.query.stride,
                  readers_, read_width_);
    Fetcher queries_ahead = fetch_chunk(reading_.query, b, head, start + CHUNK, sizes_.length, sizes_.features);
    for (int64_t i = 0; i < rows; i += TILE_ROWS) {
      const int64_t last = std::min(i + TILE_ROWS, rows);
      float *queries = readers_ + i * read_width_, *weights = queries + width;
      product(last - i, width, round_up(last), queries, read_width_, 1, turned_keys_, CHUNK, weights, read_width_,
              false, queries_ahead);
      mask_future(i, last, weights, read_width_, decays());
      if (decays())
        for (int64_t j = i; j < last; j++) scale(width, decays_.in[j], readers_ + j * read_width_);
    }
    Fetcher keys_ahead =
        fetch_chunk(reading_.key, b, h, group == 0 ? start + CHUNK : -1, sizes_.length, sizes_.features);
    for (int64_t i = 0; i < rows; i += TILE_ROWS) {
      const int64_t last = std::min(i + TILE_ROWS, rows);
      product(last - i, width + last, value_width, readers_ + i * read_width_, read_width_, 1, read_, value_width,
              numerators_, value_width, false, keys_ahead);
      for (int64_t j = i; j < last; j++)
        finish(j, numerators_ + (j - i) * value_width, reading_.numerator.at(b, head, start + j),
               reading_.denominator.at(b, head, start + j));
    }
  }

  void finish(int64_t i, const float* numerator, float* to, float* denominator) const {
    const float* query = readers_ + i * read_width_;
    Vector sum{};
    for (int64_t f = 0; f < sizes_.feature_width; f += LANES) sum += load(query + f) * load(normalizer_ + f);
    for (int64_t j = 0; j <= i; j += LANES) sum += load(query + sizes_.feature_width + j);
    *denominator = sum_of(sum);
    const float factor = reading_.divide ? 1.0f / std::max(*denominator, MIN_DENOMINATOR) : 1.0f;
    const int64_t whole = sizes_.dims / LANES * LANES;
    for (int64_t j = 0; j < whole; j += LANES) store(to + j, load(numerator + j) * factor);
    for (int64_t j = whole; j < sizes_.dims; j++) to[j] = numerator[j] * factor;
  }

  void write(int64_t b, int64_t h, int64_t start, int64_t rows) {
    const int64_t width = sizes_.feature_width, value_width = sizes_.value_width;
    if (decays())
      for (int64_t i = 0; i < rows; i++) scale(width, decays_.out[i], keys_ + i * width);
    const float decay = decays() ? decays_.all : 1.0f;
    Fetcher values_ahead = fetch_chunk(reading_.value, b, h, start + CHUNK, sizes_.length, sizes_.dims);
    for (int64_t f = 0; f < width; f += TILE_ROWS) {
      const int64_t count = std::min(TILE_ROWS, width - f);
      product(count, rows, value_width, keys_ + f, 1, width, values_, value_width, written_, value_width, false,
              values_ahead);
      carry(count * value_width, decay, read_ + f * value_width, written_, read_ + f * value_width);
    }
    sum_rows(rows, width, keys_, written_sums_);
    carry(width, decay, normalizer_, written_sums_, normalizer_);
  }

  const Decays* decays() const { return reading_.log_forget ? &decays_ : nullptr; }

  const Reading& reading_;
  const Sizes& sizes_;
  const int64_t read_width_;
  // readers_ (CHUNK, features and weights), read_ (memory and values, dims).
  Scratch keys_, turned_keys_, readers_, read_;
  float* const values_;
  Scratch numerators_, written_, normalizer_, written_sums_;
  Decays decays_;
};

// Shapes as in kernel_attention.py; keep (batch or 1, 1, seq) is zero at tokens that do not enter. Changes the memory,
// which is contiguous. Returns numerator, divided by the denominator where `divide`, denominator and, where `keeps`,
// what `additive_backward` wants: the memory before each span, (batch, kv_heads, spans, kept_size).
std::tuple<Tensor, Tensor, Tensor> additive_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                                    const std::optional<Tensor>& log_forget,
                                                    const std::optional<Tensor>& keep, Tensor matrix, Tensor normalizer,
                                                    bool elu, bool divide, bool keeps) {
  const Sizes sizes(query, key, value);
  const Tensor numerator = empty_states(sizes.batch, sizes.heads, sizes.length, sizes.dims, query);
  const Tensor denominator = at::empty({sizes.batch, sizes.heads, sizes.length}, query.options());
  const Tensor memories =
      at::empty({sizes.batch, sizes.kv_heads, keeps ? sizes.spans() : 0, sizes.kept_size()}, query.options());
  const Reading reading(sizes, elu, divide, query, key, value, log_forget, keep, numerator, denominator);
  float *matrices = matrix.data_ptr<float>(), *normalizers = normalizer.data_ptr<float>();
  float* kept = memories.data_ptr<float>();
  in_parallel(sizes.batch * sizes.kv_heads, [&](Tasks tasks) {
    Reader reader(reading);
    for (int64_t i; tasks.next(i);) {
      const int64_t at = i * sizes.features;
      reader.run(i / sizes.kv_heads, i % sizes.kv_heads, matrices + at * sizes.dims, normalizers + at,
                 keeps ? kept + i * sizes.spans() * sizes.kept_size() : nullptr);
    }
  });
  return {numerator, denominator, memories};
}

// Backward.
//
// Memories are transposed here and have the normalizer as their last row, `dims` + 1 rows of features: what is written
// to them, values with a one beside them, and the gradients of what is read, of a numerator with its denominator, are
// rows of one matrix. In each span, the last one first, a sweep over its chunks has the memory before each, another one
// back gathers what later chunks read.

struct Gradients {
  Reading reading;
  std::optional<Tokens> read_gradient, denominator_gradient;
  Tokens query, key, value;
  std::optional<Tokens> log_forget;
  bool adds;  // to what those of query, key and value hold already

  void put(int64_t width, const float* row, float* to) const {
    if (adds)
      add_row(width, row, to);
    else
      unpack(1, width, row, 0, to, 0);
  }
};

class Differentiator {
 public:
  explicit Differentiator(const Gradients& gradients)
      : gradients_(gradients),
        reading_(gradients.reading),
        sizes_(reading_.sizes),
        all_keys_(SPAN * CHUNK * width()),
        all_values_(SPAN * CHUNK * extended()),
        memories_((SPAN + 1) * memory_size()),
        turned_keys_(CHUNK * width()),
        decayed_keys_(CHUNK * width()),
        turned_values_(CHUNK * extended()),
        decayed_values_(CHUNK * extended()),
        queries_(CHUNK * width()),
        grads_(CHUNK * extended()),
        weights_(CHUNK * CHUNK),
        grad_weights_(CHUNK * CHUNK),
        grad_queries_(TILE_ROWS * width()),
        grad_keys_(CHUNK * width()),
        grad_values_(CHUNK * sizes_.value_width),
        grad_memory_(extended() * width()),
        turned_grad_memory_(extended() * width()),
        written_(memory_size()) {}

  // kept: the memory before each span. grad_matrix, grad_normalizer: gradient of the memory after the last token,
  // replaced by that of the memory before the first.
  void run(int64_t b, int64_t h, const float* kept, float* grad_matrix, float* grad_normalizer) {
    std::fill_n(+grad_memory_, extended() * width(), 0.0f);
    unpack_memory(grad_matrix, grad_normalizer, grad_memory_);
    for (int64_t span = sizes_.spans() - 1; span >= 0; span--) {
      const int64_t first = span * SPAN, end = std::min(first + SPAN, sizes_.chunks());
      std::copy_n(kept + span * sizes_.kept_size(), memory_size(), +memories_);
      for (int64_t chunk = first; chunk < end; chunk++) {
        enter(chunk);
        take_chunk(b, h);
        if (chunk + 1 == end && !decays()) break;
        decay_chunk(b, h);
        write_rows(values_, decayed_keys(), false);
        carry(memory_size(), decays() ? decays_.all : 1.0f, memory_, written_, memory_after());
      }
      for (int64_t chunk = end - 1; chunk >= first; chunk--) {
        enter(chunk);
        take_back(b, h);
      }
    }
    pack_memory(grad_memory_, grad_matrix, grad_normalizer);
  }

 private:
  int64_t width() const { return sizes_.feature_width; }
  int64_t extended() const { return sizes_.extended_width; }
  int64_t memory_size() const { return (sizes_.dims + 1) * width(); }
  float* memory_after() const { return memory_ + memory_size(); }
  const Decays* decays() const { return reading_.log_forget ? &decays_ : nullptr; }
  const float* decayed_keys() const { return decays() ? decayed_keys_ : keys_; }
  const float* decayed_values() const { return decays() ? decayed_values_ : values_; }

  void unpack_memory(const float* matrix, const float* normalizer, float* rows) const {
    std::fill_n(rows, memory_size(), 0.0f);
    for (int64_t f = 0; f < sizes_.features; f++) {
      for (int64_t d = 0; d < sizes_.dims; d++) rows[d * width() + f] = matrix[f * sizes_.dims + d];
      rows[sizes_.dims * width() + f] = normalizer[f];
    }
  }

  void pack_memory(const float* rows, float* matrix, float* normalizer) const {
    for (int64_t f = 0; f < sizes_.features; f++) {
      for (int64_t d = 0; d < sizes_.dims; d++) matrix[f * sizes_.dims + d] = rows[d * width() + f];
      normalizer[f] = rows[sizes_.dims * width() + f];
    }
  }

  // What the tokens of a chunk add to a memory, or one more group of heads to it: rows^T features.
  void write_rows(const float* rows, const float* features, bool add, Fetcher ahead = {}) {
    product(sizes_.dims + 1, rows_, width(), rows, 1, extended(), features, width(), written_, width(), add, ahead);
  }

  // Chooses a chunk of the span.
  void enter(int64_t chunk) {
    start_ = chunk * CHUNK, rows_ = std::min(CHUNK, sizes_.length - start_);
    const int64_t index = chunk % SPAN;
    keys_ = all_keys_ + index * CHUNK * width();
    values_ = all_values_ + index * CHUNK * extended();
    memory_ = memories_ + index * memory_size();
  }

  // Keys, and values with a one beside them; zeros from the last token on, up to whole vectors.
  void take_chunk(int64_t b, int64_t h) {
    const int64_t whole = round_up(rows_);
    reading_.take_keys(b, h, start_, rows_, keys_);
    pack_mapped(rows_, sizes_.dims, reading_.value.at(b, h, start_), reading_.value.stride, values_, extended(),
                [](Vector x) { return x; });
    for (int64_t i = 0; i < rows_; i++) values_[i * extended() + sizes_.dims] = 1.0f;
    std::fill(keys_ + rows_ * width(), keys_ + whole * width(), 0.0f);
    std::fill(values_ + rows_ * extended(), values_ + whole * extended(), 0.0f);
  }

  void decay_chunk(int64_t b, int64_t h) {
    if (!reading_.log_forget) return;
    decays_.set(rows_, reading_.log_forget->at(b, h, start_), reading_.log_forget->stride);
    for (int64_t i = 0; i < rows_; i++) {
      copy_scaled(width(), decays_.out[i], keys_ + i * width(), decayed_keys_ + i * width());
      copy_scaled(extended(), decays_.out[i], values_ + i * extended(), decayed_values_ + i * extended());
    }
  }

  void take_back(int64_t b, int64_t h) {
    const int64_t whole = round_up(rows_);
    decay_chunk(b, h);
    transpose(whole, width(), keys_, width(), turned_keys_, CHUNK);
    transpose(whole, extended(), values_, extended(), turned_values_, CHUNK);
    transpose(extended(), width(), grad_memory_, width(), turned_grad_memory_, extended());

    float sums[CHUNK] = {};
    if (decays()) sums[rows_ - 1] = dot(memory_size(), memory_after(), grad_memory_);
    for (int64_t group = 0; group < sizes_.groups(); group++) take_back_reader(b, h, group, sums);
    // Of the span whose turn is next.
    Fetcher keys_ahead = fetch_chunk(reading_.key, b, h, start_ - SPAN * CHUNK, sizes_.length, sizes_.features);
    Fetcher values_ahead = fetch_chunk(reading_.value, b, h, start_ - SPAN * CHUNK, sizes_.length, sizes_.dims);
    for (int64_t i = 0; i < rows_; i += TILE_ROWS)
      finish_keys(b, h, i, std::min(TILE_ROWS, rows_ - i), sums, keys_ahead, values_ahead);
    if (decays()) finish_gates(b, h, sums);
    carry(memory_size(), decays() ? decays_.all : 1.0f, grad_memory_, written_, grad_memory_);
  }

  void take_back_reader(int64_t b, int64_t h, int64_t group, float* sums) {
    const int64_t dims = sizes_.dims, head = h * sizes_.groups() + group;
    const bool add = group > 0;
    pack_features(reading_.elu, rows_, sizes_.features, reading_.query.at(b, head, start_), reading_.query.stride,
                  queries_, width());
    for (int64_t i = 0; i < rows_; i++) take_gradients(b, head, i, grads_ + i * extended());
    Fetcher queries_ahead = fetch_chunk(reading_.query, b, head, start_ - CHUNK, sizes_.length, sizes_.features);
    Fetcher read_ahead =
        fetch_chunk(reading_.numerator, b, head, reading_.divide ? start_ - CHUNK : -1, sizes_.length, dims);
    for (int64_t i = 0; i < rows_; i += TILE_ROWS) {
      const int64_t last = std::min(i + TILE_ROWS, rows_), columns = round_up(last);
      float *weights = weights_ + i * CHUNK, *grad_weights = grad_weights_ + i * CHUNK;
      product(last - i, width(), columns, queries_ + i * width(), width(), 1, turned_keys_, CHUNK, weights, CHUNK,
              false, queries_ahead);
      mask_future(i, last, weights, CHUNK, decays());
      product(last - i, dims + 1, columns, grads_ + i * extended(), extended(), 1, turned_values_, CHUNK, grad_weights,
              CHUNK, false, read_ahead);
      mask_future(i, last, grad_weights, CHUNK, decays());
    }
    Fetcher gradients_ahead;
    if (gradients_.read_gradient)
      gradients_ahead = fetch_chunk(*gradients_.read_gradient, b, head, start_ - CHUNK, sizes_.length, dims);
    for (int64_t j = 0; j < rows_; j += TILE_ROWS) {
      const int64_t count = std::min(TILE_ROWS, rows_ - j), corner = j * CHUNK + j;
      product(count, rows_ - j, width(), grad_weights_ + corner, 1, CHUNK, queries_ + j * width(), width(),
              grad_keys_ + j * width(), width(), add, gradients_ahead);
      product(count, rows_ - j, sizes_.value_width, weights_ + corner, 1, CHUNK, grads_ + j * extended(), extended(),
              grad_values_ + j * sizes_.value_width, sizes_.value_width, add, gradients_ahead);
    }
    if (decays())
      for (int64_t i = 0; i < rows_; i++) scale(extended(), decays_.in[i], grads_ + i * extended());
    Fetcher query_sums_ahead = fetch_sums(gradients_.query, b, head, sizes_.features);
    Fetcher value_sums_ahead = add ? Fetcher() : fetch_sums(gradients_.value, b, h, dims);
    for (int64_t i = 0; i < rows_; i += TILE_ROWS) {
      const int64_t count = std::min(TILE_ROWS, rows_ - i);
      product(count, dims + 1, width(), grads_ + i * extended(), extended(), 1, memory_, width(), grad_queries_,
              width(), false, query_sums_ahead);
      product(count, i + count, width(), grad_weights_ + i * CHUNK, CHUNK, 1, keys_, width(), grad_queries_, width(),
              true, value_sums_ahead);
      for (int64_t j = i; j < i + count; j++) {
        float *grad = grad_queries_ + (j - i) * width(), *query = queries_ + j * width();
        if (decays()) sums[j] += dot(width(), grad, query);
        finish_features(grad, query, gradients_.query.at(b, head, start_ + j));
      }
    }
    write_rows(grads_, queries_, add, add ? Fetcher() : fetch_sums(gradients_.key, b, h, sizes_.features));
  }

  // Of the chunk whose turn is next, what gradients are to be added to.
  Fetcher fetch_sums(const Tokens& gradients, int64_t b, int64_t head, int64_t dims) const {
    return fetch_chunk(gradients, b, head, gradients_.adds ? start_ - CHUNK : -1, sizes_.length, dims);
  }

  // Gradients of a numerator and, beside them, of its denominator.
  void take_gradients(int64_t b, int64_t head, int64_t i, float* to) const {
    const int64_t dims = sizes_.dims;
    const float* grad = gradients_.read_gradient ? gradients_.read_gradient->at(b, head, start_ + i) : nullptr;
    float grad_denominator = 0.0f;
    if (gradients_.denominator_gradient) grad_denominator = *gradients_.denominator_gradient->at(b, head, start_ + i);
    if (!grad) {
      std::fill_n(to, extended(), 0.0f);
    } else if (!reading_.divide) {
      pack_mapped(1, dims, grad, 0, to, extended(), [](Vector x) { return x; });
    } else {
      const float denominator = *reading_.denominator.at(b, head, start_ + i);
      const Vector factor = fill(1.0f / std::max(denominator, MIN_DENOMINATOR));
      pack_mapped(1, dims, grad, 0, to, extended(), [=](Vector x) { return x * factor; });
      if (denominator > MIN_DENOMINATOR)
        grad_denominator -= unpadded_dot(dims, to, reading_.numerator.at(b, head, start_ + i));
    }
    to[dims] = grad_denominator;
  }

  // Adds what later chunks read of these tokens.
  void finish_keys(int64_t b, int64_t h, int64_t first, int64_t count, float* sums, Fetcher& keys_ahead,
                   Fetcher& values_ahead) {
    const int64_t value_width = sizes_.value_width;
    float *grad_keys = grad_keys_ + first * width(), *grad_values = grad_values_ + first * value_width;
    product(count, sizes_.dims + 1, width(), decayed_values() + first * extended(), extended(), 1, grad_memory_,
            width(), grad_keys, width(), true, keys_ahead);
    product(count, width(), value_width, decayed_keys() + first * width(), width(), 1, turned_grad_memory_, extended(),
            grad_values, value_width, true, values_ahead);
    for (int64_t i = first; i < first + count; i++, grad_keys += width(), grad_values += value_width) {
      const float* key = keys_ + i * width();
      if (decays()) sums[i] -= dot(width(), grad_keys, key);
      finish_features(grad_keys, key, gradients_.key.at(b, h, start_ + i));
      gradients_.put(sizes_.dims, grad_values, gradients_.value.at(b, h, start_ + i));
    }
  }

  // Through the feature map, whose derivative is min(feature, 1) for elu(x) + 1, also where padding made the feature
  // zero.
  void finish_features(float* grad, const float* features, float* to) const {
    for (int64_t f = 0; reading_.elu && f < width(); f += LANES) {
      store(grad + f, load(grad + f) * smaller(fill(1.0f), load(features + f)));
    }
    gradients_.put(sizes_.features, grad, to);
  }

  // Every gate between two tokens scales what the later one reads of the earlier: see `_DeltaChunks`.
  void finish_gates(int64_t b, int64_t h, const float* sums) const {
    float sum = 0.0f;
    for (int64_t i = rows_ - 1; i >= 0; i--) {
      sum += sums[i];
      const bool clamped = *reading_.log_forget->at(b, h, start_ + i) < 2 * MIN_LOG_DECAY;
      *gradients_.log_forget->at(b, h, start_ + i) = clamped ? 0.0f : sum;
    }
  }

  const Gradients& gradients_;
  const Reading& reading_;
  const Sizes& sizes_;
  // Of a span: what is read of keys and values, and the memories before its chunks and after the last one.
  Scratch all_keys_, all_values_, memories_;
  Scratch turned_keys_, decayed_keys_, turned_values_, decayed_values_, queries_, grads_, weights_, grad_weights_;
  Scratch grad_queries_, grad_keys_, grad_values_, grad_memory_, turned_grad_memory_, written_;
  // Of the chunk that is entered.
  float *keys_ = nullptr, *values_ = nullptr, *memory_ = nullptr;
  Decays decays_;
  int64_t start_ = 0, rows_ = 0;
};

// Given also what `additive_forward` returned, and the gradients of these and of the last memory, None being zero.
// Changes the latter, contiguous, into the gradients of the first memory. Those of query, key and value are added to
// `sums`, if there are any, or else returned; also that of log_forget.
std::tuple<Tensors, std::optional<Tensor>> additive_backward(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& log_forget,
    const std::optional<Tensor>& keep, const Tensor& numerator, const Tensor& denominator, const Tensor& memories,
    const std::optional<Tensor>& grad_numerator, const std::optional<Tensor>& grad_denominator, Tensor grad_matrix,
    Tensor grad_normalizer, bool elu, bool divide, const Tensors& sums) {
  const Sizes sizes(query, key, value);
  check_sums(sums, {query, key, value});
  const Tensors grads = sums.empty() ? empty_gradients({query, key, value}) : Tensors(),
                &targets = sums.empty() ? grads : sums;
  std::optional<Tensor> grad_log_forget;
  if (log_forget) grad_log_forget = at::empty({sizes.batch, sizes.kv_heads, sizes.length}, query.options());
  const Reading reading(sizes, elu, divide, query, key, value, log_forget, keep, numerator, denominator);
  const Gradients gradients{reading,
                            tokens_of(grad_numerator),
                            tokens_of(grad_denominator),
                            Tokens(targets[0]),
                            Tokens(targets[1]),
                            Tokens(targets[2]),
                            tokens_of(grad_log_forget),
                            !sums.empty()};
  const float* kept = memories.data_ptr<float>();
  float *grad_matrices = grad_matrix.data_ptr<float>(), *grad_normalizers = grad_normalizer.data_ptr<float>();
  in_parallel(sizes.batch * sizes.kv_heads, [&](Tasks tasks) {
    Differentiator differentiator(gradients);
    for (int64_t i; tasks.next(i);) {
      const int64_t at = i * sizes.features;
      differentiator.run(i / sizes.kv_heads, i % sizes.kv_heads, kept + i * sizes.spans() * sizes.kept_size(),
                         grad_matrices + at * sizes.dims, grad_normalizers + at);
    }
  });
  return {grads, grad_log_forget};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(kermit_hf, m) {
  m.def("additive_forward", &additive_forward);
  m.def("additive_backward", &additive_backward);
}
