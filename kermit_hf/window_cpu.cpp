// The near field and its merging with sinks and far field on a CPU: the formula of window_attention.py, block by block.
//
// A block of queries meets the keys it sees tile by tile, under a running softmax (Dao et al. 2022, arXiv 2205.14135) which
// starts from the far field, as one token with its own logit. Sinks come first, as keys that a query sees once they are behind
// its window, while the block has no positions yet. Tiles of scores are (keys, queries): a softmax then runs along whole vectors. Blocks and tiles begin at slots that are multiples of BLOCK, so that most tiles are
// seen either by all queries of a block or by none; of the others only those vectors are computed that some query sees.
//
// A task is a span of slots, with all query heads that share a key head, so that its keys and values are packed once.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <utility>

#include "vector_tiles.h"

namespace {

using namespace tiles;

constexpr int64_t BLOCK = 64, SPAN = 8 * BLOCK;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
// Where the largest score starts: finite, so that a logit of -inf is a weight of zero.
constexpr float LOWEST = -1e30f;

struct Range {
  int64_t start, end;
  int64_t count() const { return end - start; }
  Range clipped(int64_t size) const {
    const int64_t first = std::clamp<int64_t>(start, 0, size);
    return {first, std::clamp(end, first, size)};
  }
};

// Rows of a tensor (batch, heads, rows, dim) whose last axis is contiguous, or of (batch, heads, rows); null where there is
// none.
struct Rows {
  float* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, stride = 0;

  Rows() = default;
  Rows(const at::Tensor& tensor)
      : data(tensor.data_ptr<float>()),
        batch_stride(tensor.stride(0)),
        head_stride(tensor.stride(1)),
        stride(tensor.stride(2)) {}
  Rows(const std::optional<at::Tensor>& tensor) : Rows(tensor ? Rows(*tensor) : Rows()) {}

  Rows of(int64_t batch, int64_t head) const {
    Rows rows = *this;
    rows.data += batch * batch_stride + head * head_stride;
    return rows;
  }
  // With the first row numbered `first`.
  Rows numbered_from(int64_t first) const {
    Rows rows = *this;
    if (data) rows.data -= first * stride;
    return rows;
  }
  float* operator[](int64_t row) const { return data + row * stride; }
};

// Rotary positions by slot, see `rotate` in kermit_attention.py.
struct Positions {
  const float *cos = nullptr, *sin = nullptr;
  int64_t cos_stride = 0, sin_stride = 0;

  Positions(const std::optional<at::Tensor>& cosine, const std::optional<at::Tensor>& sine) {
    if (!cosine) return;
    cos = cosine->data_ptr<float>(), sin = sine->data_ptr<float>();
    cos_stride = cosine->stride(0), sin_stride = sine->stride(0);
  }

  // Turns rows, `width` apart, by the angles of the slots from `slot` on, forth or back, and scales them.
  void turn(int64_t slot, int64_t rows, int64_t dim, int64_t width, float scale, bool back, float* row) const {
    const float sign = back ? -1.0f : 1.0f;
    for (const float* end = row + rows * width; row < end; slot++, row += width) {
      if (cos == nullptr) {
        for (int64_t i = 0; i < dim; i++) row[i] *= scale;
        continue;
      }
      const float *__restrict cosines = cos + slot * cos_stride, *__restrict sines = sin + slot * sin_stride;
      float *__restrict real = row, *__restrict imaginary = row + dim / 2;
      for (int64_t i = 0; i < dim / 2; i++) {
        const float x = real[i], y = imaginary[i];
        real[i] = scale * (x * cosines[i] - y * (sign * sines[i]));
        imaginary[i] = scale * (y * cosines[i] + x * (sign * sines[i]));
      }
    }
  }
};

// Which of a block of queries see which of a tile of keys.
struct Band {
  int64_t keys;           // in the tile, at most BLOCK
  int64_t offset;         // from the first query's slot to the first key's
  int64_t behind, ahead;  // how many slots a query sees to either side of its own
  int64_t padding;        // so many keys, the first ones, are padding: each is seen by its own query only

  Range queries_of(int64_t key, int64_t count) const {
    return Range{key + offset - ahead, key + count + offset + behind}.clipped(BLOCK);
  }
  Range keys_of(int64_t query, int64_t count) const {
    return Range{query - offset - behind, query + count - offset + ahead}.clipped(keys);
  }
  // `queries_of` in whole vectors.
  Range columns_of(int64_t key, int64_t count) const {
    const Range queries = queries_of(key, count);
    return queries.count() == 0 ? queries : Range{queries.start / LANES * LANES, round_up(queries.end)};
  }
  bool hides_some() const { return padding > 0 || keys - 1 + offset > ahead || BLOCK - 1 - offset > behind; }
  // Scores of one key for the queries from `column` on, -inf where they do not see it.
  Vector hide(Vector scores, int64_t key, int64_t column) const {
    static const IntVector lanes = first_numbers(std::make_index_sequence<LANES>());
    const int32_t own = key + offset - column;
    const int32_t first = key < padding ? own : own - ahead;
    const int32_t last = key < padding ? own : own + behind;
    return (lanes >= first) & (lanes <= last) ? scores : fill(NOTHING);
  }

 private:
  template <size_t... number>
  static IntVector first_numbers(std::index_sequence<number...>) {
    return IntVector{static_cast<int32_t>(number)...};
  }
};

// Sinks, the first of which is seen from this query on, counted from the block's first one.
Band sinks_from(int64_t query, int64_t sinks) { return {sinks, std::clamp(query, -BLOCK, BLOCK), 3 * BLOCK, 0, 0}; }

struct Problem {
  int64_t batch, heads, kv_heads, length, slots, dim, window, sinks, far_rows;  // the last queries have a far field
  bool is_causal;

  int64_t groups() const { return heads / kv_heads; }
  int64_t width() const { return round_up(dim); }
  int64_t first_far() const { return length - far_rows; }
  // Slots that a query sees behind and ahead of its own.
  int64_t behind() const { return std::min(window, slots) - 1; }
  int64_t ahead() const { return is_causal ? 0 : behind(); }
  // A span holds all keys that another one's queries see outside of their own span.
  int64_t span() const { return std::max(SPAN, round_up(behind(), BLOCK)); }
  int64_t spans() const { return (slots + span() - 1) / span(); }
  // So many keys a task reaches, at most.
  int64_t most_keys() const { return span() + behind() + ahead() + 2 * BLOCK; }
  // Slots of the keys that queries in these slots see, in whole tiles.
  Range reach(Range queries) const {
    const int64_t first = std::max<int64_t>(queries.start - behind(), 0) / BLOCK * BLOCK;
    return {first, std::min(queries.end + ahead(), slots)};
  }
  Band band(int64_t query_slot, int64_t key_slot, int64_t first_real) const {
    const int64_t keys = std::min(BLOCK, slots - key_slot);
    return {keys, key_slot - query_slot, behind(), ahead(), std::clamp<int64_t>(first_real - key_slot, 0, keys)};
  }
};

// Of a block of queries: its first slot, the rows of the queries' tensors, those of them that there are, and those with a far field.
struct Place {
  int64_t slot;
  Range rows, present, far;

  Place(const Problem& problem, int64_t slot) : slot(slot) {
    const int64_t start = slot - (problem.slots - problem.length);
    rows = {start, start + BLOCK};
    present = {std::max<int64_t>(start, 0), std::min(rows.end, problem.length)};
    far = {std::max(present.start, problem.length - problem.far_rows), present.end};
  }
};

// A span of slots of one key head.
struct Task {
  int64_t batch, kv_head, span;
  Range slots, queries;  // all slots, and those that have queries, perhaps none

  // Key heads come first: those of one token lie next to each other.
  Task(const Problem& problem, int64_t index) : batch(index / problem.kv_heads / problem.spans()) {
    kv_head = index % problem.kv_heads;
    span = index / problem.kv_heads % problem.spans();
    slots = {span * problem.span(), std::min((span + 1) * problem.span(), problem.slots)};
    queries = {std::clamp(problem.slots - problem.length, slots.start, slots.end), slots.end};
  }

  // Slots of the span and of all keys its queries see.
  Range reach(const Problem& problem) const {
    if (queries.count() == 0) return slots;
    const Range seen = problem.reach(queries);
    return {std::min(slots.start, seen.start), std::max(slots.end, seen.end)};
  }
};

template <class Function>
void for_tasks(const Problem& problem, Function function) {
  const int64_t count = problem.batch * problem.spans() * problem.kv_heads;
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { function(begin, end); });
}

// Rows `range` one after the other, `width` apart, with zeros up to it and for rows outside of `present`.
void pack_rows(const Rows& from, Range range, Range present, int64_t dim, int64_t width, float* to) {
  for (int64_t row = range.start; row < range.end; row++, to += width) {
    const int64_t count = present.start <= row && row < present.end ? dim : 0;
    if (count) std::memcpy(to, from[row], count * sizeof(float));
    std::fill(to + count, to + width, 0.0f);
  }
}

// The way back, for `count` rows.
void unpack_rows(const float* from, int64_t count, int64_t dim, int64_t width, float* to, int64_t stride) {
  for (int64_t row = 0; row < count; row++) std::memcpy(to + row * stride, from + row * width, dim * sizeof(float));
}

void add_rows(const float* from, int64_t count, int64_t dim, float* to, int64_t stride) {
  for (int64_t row = 0; row < count; row++)
    for (int64_t i = 0; i < dim; i++) to[row * stride + i] += from[row * dim + i];
}

// Turns those rows of a block of queries that there are, or of gradients, forth or back.
void turn_rows(const Place& place, const Positions& positions, float scaling, int64_t dim, int64_t width, float* rows,
               bool back = false) {
  const int64_t skipped = place.present.start - place.rows.start;
  positions.turn(place.slot + skipped, place.present.count(), dim, width, scaling, back, rows + skipped * width);
}

// These columns of C (rows, BLOCK) = A (rows, depth) B (depth, BLOCK), for up to TILE_ROWS rows `a_row` apart.
void product_band(int64_t rows, int64_t depth, Range columns, const float* a, int64_t a_row, const float* b, float* c) {
  product(rows, depth, columns.count(), a, a_row, 1, b + columns.start, BLOCK, c + columns.start, BLOCK);
}

// The columns of a few rows of a tile that `columns` leaves out become zeros.
inline void clear_outside(Range columns, int64_t rows, float* tile) {
  for (int64_t row = 0; row < rows; row++, tile += BLOCK) {
    for (int64_t column = 0; column < columns.start; column += LANES) store(tile + column, Vector{});
    for (int64_t column = columns.end; column < BLOCK; column += LANES) store(tile + column, Vector{});
  }
}

// sums (BLOCK, width) += tile (keys, BLOCK)^T rows (keys, width), over those pairs that see each other.
void add_to_queries(const Band& band, const float* tile, const float* rows, int64_t width, float* sums) {
  for (int64_t query = 0; query < BLOCK; query += TILE_ROWS) {
    const int64_t count = std::min(TILE_ROWS, BLOCK - query);
    const Range keys = band.keys_of(query, count);
    product(count, keys.count(), width, tile + keys.start * BLOCK + query, 1, BLOCK, rows + keys.start * width, width,
            sums + query * width, width, true);
  }
}

// A block of queries with its running softmax: what of each query's scores has been taken up so far.
class Block {
 public:
  Block(int64_t dim, int64_t width)
      : dim_(dim),
        width_(width),
        rows_(BLOCK * width),
        queries_(BLOCK * width),
        scores_(BLOCK * BLOCK),
        sums_(BLOCK * width) {}

  // Starts from the far field, or from nothing. Queries have no positions yet.
  void start(const Place& place, const Rows& query, const Rows& far_value, const Rows& far_logit) {
    pack_rows(query, place.rows, place.present, dim_, width_, rows_);
    transpose(BLOCK, width_, rows_, width_, queries_, BLOCK);
    std::fill(largest_, largest_ + BLOCK, LOWEST);
    std::fill(total_, total_ + BLOCK, 0.0f);
    pack_rows(far_value, place.rows, place.far, dim_, width_, sums_);
    for (int64_t row = place.far.start; row < place.far.end; row++) {
      const float logit = *far_logit[row];
      largest_[row - place.rows.start] = std::max(LOWEST, logit);
      total_[row - place.rows.start] = logit > LOWEST ? 1.0f : 0.0f;
    }
    scale_sums(total_);
  }

  void turn(const Place& place, const Positions& positions, float scaling) {
    turn_rows(place, positions, scaling, dim_, width_, rows_);
    transpose(BLOCK, width_, rows_, width_, queries_, BLOCK);
  }

  void take_keys(const Band& band, const float* keys, const float* values) {
    alignas(64) float largest[BLOCK];
    std::copy(largest_, largest_ + BLOCK, largest);
    for (int64_t key = 0; key < band.keys; key += TILE_ROWS) {
      const int64_t count = std::min(TILE_ROWS, band.keys - key);
      const Range columns = band.columns_of(key, count);
      clear_outside(columns, count, scores_ + key * BLOCK);
      product_band(count, dim_, columns, keys + key * width_, width_, queries_, scores_ + key * BLOCK);
      find_largest(band, {key, key + count}, largest);
    }
    take_scores(band, largest, values);
  }

  void finish(const Place& place, const Rows& output, const Rows& largest, const Rows& share) {
    for (int64_t row = place.present.start; row < place.present.end; row++) {
      const int64_t query = row - place.rows.start;
      const float* sums = sums_ + query * width_;
      const float factor = 1.0f / total_[query];
      float* out = output[row];
      for (int64_t i = 0; i < dim_; i++) out[i] = factor * sums[i];
      *largest[row] = largest_[query];
      *share[row] = factor;
    }
  }

 private:
  // Hides what is not seen of the scores of these keys, and finds the largest score of each query.
  void find_largest(const Band& band, Range keys, float* largest) {
    const bool hides_some = band.hides_some();
    const Range columns = band.columns_of(keys.start, keys.count());
    for (int64_t column = columns.start; column < columns.end; column += LANES) {
      Vector found = load(largest + column);
      for (int64_t key = keys.start; key < keys.end; key++) {
        float* place = scores_ + key * BLOCK + column;
        Vector scores = load(place);
        if (hides_some) store(place, scores = band.hide(scores, key, column));
        found = larger(scores, found);
      }
      store(largest + column, found);
    }
  }

  // Takes up a tile of scores after which each query's largest score will be `largest`.
  void take_scores(const Band& band, const float* largest, const float* values) {
    float shrink[BLOCK];
    for (int64_t column = 0; column < BLOCK; column += LANES) {
      const Vector factor = exponential(load(largest_ + column) - load(largest + column));
      store(shrink + column, factor);
      store(total_ + column, factor * load(total_ + column));
      store(largest_ + column, load(largest + column));
    }
    scale_sums(shrink);
    for (int64_t key = 0; key < band.keys; key += TILE_ROWS) {
      const int64_t count = std::min(TILE_ROWS, band.keys - key);
      const Range columns = band.columns_of(key, count);
      for (int64_t column = columns.start; column < columns.end; column += LANES) {
        const Vector most = load(largest_ + column);
        Vector total = load(total_ + column);
        for (int64_t row = key; row < key + count; row++) {
          float* place = scores_ + row * BLOCK + column;
          const Vector weights = exponential(load(place) - most);
          store(place, weights);
          total += weights;
        }
        store(total_ + column, total);
      }
    }
    add_to_queries(band, scores_, values, width_, sums_);
  }

  void scale_sums(const float* factors) {
    float* sums = sums_;
    for (int64_t query = 0; query < BLOCK; query++, sums += width_)
      for (int64_t i = 0; i < width_; i += LANES) store(sums + i, factors[query] * load(sums + i));
  }

  int64_t dim_, width_;
  // Rows of queries and the same by columns; a tile (keys, BLOCK).
  Scratch rows_, queries_, scores_, sums_;
  float largest_[BLOCK], total_[BLOCK];
};

// A block of queries on the way back: each weight is again e^(score - largest) * share.
class GradientBlock {
 public:
  GradientBlock(int64_t dim, int64_t width)
      : dim_(dim),
        width_(width),
        queries_(BLOCK * width),
        query_columns_(BLOCK * width),
        grads_(BLOCK * width),
        grad_columns_(BLOCK * width),
        weights_(BLOCK * BLOCK),
        grad_scores_(BLOCK * BLOCK),
        grad_queries_(BLOCK * width) {}

  // Queries have no positions yet.
  void start(const Place& place, const Rows& query, const Rows& grad, const Rows& output, const Rows& largest, const Rows& share) {
    take_queries(place, query);
    pack_rows(grad, place.rows, place.present, dim_, width_, grads_);
    transpose(BLOCK, width_, grads_, width_, grad_columns_, BLOCK);
    std::fill(grad_queries_ + 0, grad_queries_ + BLOCK * width_, 0.0f);
    for (int64_t query = 0; query < BLOCK; query++) {
      const int64_t row = place.rows.start + query;
      const bool exists = place.present.start <= row && row < place.present.end;
      largest_[query] = exists ? *largest[row] : 0.0f;
      share_[query] = exists ? *share[row] : 0.0f;
      agreement_[query] = exists ? dot(grads_ + query * width_, output[row]) : 0.0f;
    }
  }

  void turn(const Place& place, const Positions& positions, float scaling) {
    turn_rows(place, positions, scaling, dim_, width_, queries_);
    transpose(BLOCK, width_, queries_, width_, query_columns_, BLOCK);
  }

  // Queries, and their gradients so far, have no positions again.
  void turn_back(const Place& place, const Positions& positions, float scaling, const Rows& query) {
    take_queries(place, query);
    turn_rows(place, positions, scaling, dim_, width_, grad_queries_, true);
  }

  void take_far(const Place& place, const Rows& value, const Rows& logit, const Rows& grad_value, const Rows& grad_logit) {
    for (int64_t column = 0; column < BLOCK; column += LANES) {
      float logits[LANES];
      for (int64_t i = 0; i < LANES; i++) {
        const int64_t row = place.rows.start + column + i;
        logits[i] = place.far.start <= row && row < place.far.end ? *logit[row] : NOTHING;
      }
      store(weights_ + column, weigh(load(logits), column));
    }
    for (int64_t row = place.far.start; row < place.far.end; row++) {
      const int64_t query = row - place.rows.start;
      const float weight = weights_[query];
      const float* grad = grads_ + query * width_;
      float* to = grad_value[row];
      for (int64_t i = 0; i < dim_; i++) to[i] = weight * grad[i];
      *grad_logit[row] = weight * (dot(grad, value[row]) - agreement_[query]);
    }
  }

  // grad_keys and grad_values (keys, width) are added to.
  void take_keys(const Band& band, const float* keys, const float* values, float* grad_keys, float* grad_values) {
    for (int64_t key = 0; key < band.keys; key += TILE_ROWS) {
      const int64_t count = std::min(TILE_ROWS, band.keys - key);
      clear_outside(band.columns_of(key, count), count, grad_scores_ + key * BLOCK);
      product_band(count, dim_, band.columns_of(key, count), keys + key * width_, width_, query_columns_,
                   weights_ + key * BLOCK);
      take_rows(band, key, values, grad_values);
      const Range seen = band.queries_of(key, count);
      product(count, seen.count(), width_, grad_scores_ + key * BLOCK + seen.start, BLOCK, 1,
              queries_ + seen.start * width_, width_, grad_keys + key * width_, width_, true);
    }
    add_to_queries(band, grad_scores_, keys, width_, grad_queries_);
  }

  void finish(const Place& place, const Rows& grad_query) {
    for (int64_t row = place.present.start; row < place.present.end; row++)
      std::memcpy(grad_query[row], grad_queries_ + (row - place.rows.start) * width_, dim_ * sizeof(float));
  }

 private:
  void take_queries(const Place& place, const Rows& query) {
    pack_rows(query, place.rows, place.present, dim_, width_, queries_);
    transpose(BLOCK, width_, queries_, width_, query_columns_, BLOCK);
  }

  // Turns the scores of a few keys into weights, finds the scores' gradient and adds to that of the values.
  void take_rows(const Band& band, int64_t key, const float* values, float* grad_values) {
    const int64_t count = std::min(TILE_ROWS, band.keys - key);
    const Range columns = band.columns_of(key, count), seen = band.queries_of(key, count);
    product_band(count, dim_, columns, values + key * width_, width_, grad_columns_, grad_scores_ + key * BLOCK);
    const bool hides_some = band.hides_some();
    for (int64_t column = columns.start; column < columns.end; column += LANES) {
      for (int64_t row = key; row < key + count; row++) {
        float *weight_place = weights_ + row * BLOCK + column, *grad_place = grad_scores_ + row * BLOCK + column;
        Vector scores = load(weight_place);
        if (hides_some) scores = band.hide(scores, row, column);
        const Vector weights = weigh(scores, column);
        store(weight_place, weights);
        store(grad_place, weights * (load(grad_place) - load(agreement_ + column)));
      }
    }
    product(count, seen.count(), width_, weights_ + key * BLOCK + seen.start, BLOCK, 1, grads_ + seen.start * width_,
            width_, grad_values + key * width_, width_, true);
  }

  Vector weigh(Vector scores, int64_t column) const {
    return exponential(scores - load(largest_ + column)) * load(share_ + column);
  }

  float dot(const float* packed, const float* row) const {
    Vector sums = {};
    int64_t i = 0;
    for (; i + LANES <= dim_; i += LANES) sums += load(packed + i) * load(row + i);
    float sum = sum_of(sums);
    for (; i < dim_; i++) sum += packed[i] * row[i];
    return sum;
  }

  int64_t dim_, width_;
  // Rows of queries and of the output's gradient, and the same by columns; tiles (keys, BLOCK).
  Scratch queries_, query_columns_, grads_, grad_columns_, weights_, grad_scores_, grad_queries_;
  float largest_[BLOCK], share_[BLOCK], agreement_[BLOCK];
};

void check_rows(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.device().is_cpu(), name, " must be float32 on a CPU");
  TORCH_CHECK(tensor.dim() == 3 || tensor.size(-1) <= 1 || tensor.stride(-1) == 1, name, " must have a contiguous last axis");
}

// What both directions take: states without positions, (batch, heads or kv_heads, tokens, dim); cosine and sine, (slots or more, dim / 2)
// or more; sinks (batch, kv_heads, sinks, dim), their keys as the queries meet them; the far field of the last queries; of each row of
// the batch the first slot that is not padding.
struct Inputs {
  const at::Tensor &query, &key, &value;
  const std::optional<at::Tensor>&cos, &sin, &sink_keys, &sink_values, &far_value, &far_logit;
  const at::Tensor& first_real;

  void check(int64_t window) const {
    for (const at::Tensor* states : {&query, &key, &value}) check_rows(*states, "query, key and value");
    for (const auto* states : {&sink_keys, &sink_values, &far_value, &far_logit, &cos, &sin})
      if (*states) check_rows(**states, "a tensor of sinks, far field or positions");
    TORCH_CHECK(query.size(1) % key.size(1) == 0 && query.size(2) <= key.size(2) && key.sizes() == value.sizes() &&
                    query.size(3) == key.size(3),
                "query (batch, heads, seq, head_dim) does not fit key and value (batch, kv_heads, keys, head_dim)");
    TORCH_CHECK(window >= 1, "window must be at least 1");
    TORCH_CHECK(first_real.scalar_type() == at::kLong && first_real.is_contiguous() && first_real.numel() == query.size(0),
                "first_real must be int64 (batch,)");
    for (const auto* table : {&cos, &sin})
      TORCH_CHECK(!*table || ((*table)->size(0) >= key.size(2) && 2 * (*table)->size(1) >= query.size(3) && query.size(3) % 2 == 0),
                  "cosine and sine need a row for each of ", key.size(2), " slots and a column for each pair of coordinates");
  }

  Problem describe(int64_t window, bool is_causal) const {
    check(window);
    const int64_t sinks = sink_keys ? sink_keys->size(2) : 0, far_rows = far_value ? far_value->size(2) : 0;
    return {query.size(0), query.size(1), key.size(1), query.size(2), key.size(2), query.size(3), window, sinks, far_rows, is_causal};
  }
};

// (batch, heads, seq, dim), which lies in memory as (batch, seq, heads, dim).
at::Tensor empty_states(const at::Tensor& like) {
  at::Tensor states = at::empty({like.size(0), like.size(2), like.size(1), like.size(3)}, like.options()).transpose(1, 2);
  ask_for_huge_pages(states.data_ptr(), states.nbytes());
  return states;
}

struct Parts {
  Rows query, key, value, sink_keys, sink_values, far_value, far_logit;
  Positions positions;
  const int64_t* first_real;

  Parts(const Inputs& inputs, const Problem& problem)
      : query(inputs.query),
        key(inputs.key),
        value(inputs.value),
        sink_keys(inputs.sink_keys),
        sink_values(inputs.sink_values),
        far_value(Rows(inputs.far_value).numbered_from(problem.first_far())),
        far_logit(Rows(inputs.far_logit).numbered_from(problem.first_far())),
        positions(inputs.cos, inputs.sin),
        first_real(inputs.first_real.data_ptr<int64_t>()) {}
};

// What the queries of a task see, packed: turned keys, values and sinks.
class Seen {
 public:
  Seen(const Problem& problem, const Parts& parts)
      : problem_(problem),
        parts_(parts),
        keys_(problem.most_keys() * problem.width()),
        values_(problem.most_keys() * problem.width()),
        sink_keys_(problem.sinks * problem.width()),
        sink_values_(problem.sinks * problem.width()) {}

  void take(const Task& task) {
    const int64_t dim = problem_.dim, width = problem_.width();
    reach_ = task.reach(problem_);
    first_real_ = parts_.first_real[task.batch];
    pack_rows(parts_.key.of(task.batch, task.kv_head), reach_, reach_, dim, width, keys_);
    parts_.positions.turn(reach_.start, reach_.count(), dim, width, 1.0f, false, keys_);
    pack_rows(parts_.value.of(task.batch, task.kv_head), reach_, reach_, dim, width, values_);
    if (problem_.sinks == 0) return;
    const Range sinks = {0, problem_.sinks};
    pack_rows(parts_.sink_keys.of(task.batch, task.kv_head), sinks, sinks, dim, width, sink_keys_);
    pack_rows(parts_.sink_values.of(task.batch, task.kv_head), sinks, sinks, dim, width, sink_values_);
  }

  // Calls take(band, keys, values, offset) with each tile of keys that the queries of a block see, `offset` from the first one's row.
  template <class Take>
  void each_tile(const Place& place, Take take) const {
    const Range seen = problem_.reach({place.slot, place.slot + BLOCK});
    for (int64_t slot = seen.start; slot < seen.end; slot += BLOCK) {
      const Band band = problem_.band(place.slot, slot, first_real_);
      if (band.padding == band.keys && band.offset != 0) continue;
      const int64_t offset = (slot - reach_.start) * problem_.width();
      take(band, keys_ + offset, values_ + offset, offset);
    }
  }

  // Likewise of sinks: each is seen once it lies behind the window.
  template <class Take>
  void each_sink_tile(const Place& place, Take take) const {
    for (int64_t sink = 0; sink < problem_.sinks; sink += BLOCK) {
      const Band band = sinks_from(first_real_ + problem_.window + sink - place.slot, std::min(BLOCK, problem_.sinks - sink));
      const int64_t offset = sink * problem_.width();
      if (band.queries_of(0, band.keys).count()) take(band, sink_keys_ + offset, sink_values_ + offset, offset);
    }
  }

 private:
  const Problem& problem_;
  const Parts& parts_;
  Scratch keys_, values_, sink_keys_, sink_values_;
  Range reach_ = {0, 0};
  int64_t first_real_ = 0;
};

// Calls function(head, place) for the blocks of queries of a task.
template <class Function>
void for_blocks(const Problem& problem, const Task& task, Function function) {
  if (task.queries.count() == 0) return;
  for (int64_t head = task.kv_head * problem.groups(); head < (task.kv_head + 1) * problem.groups(); head++)
    for (int64_t slot = task.queries.start / BLOCK * BLOCK; slot < task.queries.end; slot += BLOCK) function(head, Place(problem, slot));
}

// output (batch, heads, seq, dim); of each query the largest score, and its share, one divided by the sum of all
// e^(score - largest), both (batch, heads, seq). scaling: of the scores of keys.
std::tuple<at::Tensor, at::Tensor, at::Tensor>
window_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& cos,
               const std::optional<at::Tensor>& sin, const std::optional<at::Tensor>& sink_keys,
               const std::optional<at::Tensor>& sink_values, const std::optional<at::Tensor>& far_value,
               const std::optional<at::Tensor>& far_logit, const at::Tensor& first_real, double scaling, int64_t window,
               bool is_causal) {
  const Inputs inputs{query, key, value, cos, sin, sink_keys, sink_values, far_value, far_logit, first_real};
  const Problem problem = inputs.describe(window, is_causal);
  const Parts parts(inputs, problem);
  at::Tensor output = empty_states(query);
  at::Tensor largest = at::empty({problem.batch, problem.heads, problem.length}, query.options());
  at::Tensor share = at::empty_like(largest);
  const Rows outputs(output), most(largest), shares(share);

  for_tasks(problem, [&](int64_t begin, int64_t end) {
    Seen seen(problem, parts);
    Block block(problem.dim, problem.width());
    const auto take = [&](const Band& band, const float* keys, const float* values, int64_t) { block.take_keys(band, keys, values); };
    for (int64_t index = begin; index < end; index++) {
      const Task task(problem, index);
      if (task.queries.count()) seen.take(task);
      for_blocks(problem, task, [&](int64_t head, const Place& place) {
        block.start(place, parts.query.of(task.batch, head), parts.far_value.of(task.batch, head), parts.far_logit.of(task.batch, head));
        seen.each_sink_tile(place, take);
        block.turn(place, parts.positions, scaling);
        seen.each_tile(place, take);
        block.finish(place, outputs.of(task.batch, head), most.of(task.batch, head), shares.of(task.batch, head));
      });
    }
  });
  return {output, largest, share};
}

// As `like` lies in memory, if it is dense.
at::Tensor empty_gradient(const at::Tensor& like) {
  at::Tensor gradient = at::empty_like(like);
  ask_for_huge_pages(gradient.data_ptr(), gradient.nbytes());
  return gradient;
}

std::optional<at::Tensor> empty_gradient(const std::optional<at::Tensor>& like) {
  return like ? std::optional(empty_gradient(*like)) : std::nullopt;
}

// Gradients of keys and values which belong to other spans than that of the queries they come from, until these are done:
// (before, and without causality also after the span; tasks; keys and values; rows, dim).
class Borders {
 public:
  Borders(const Problem& problem, const at::Tensor& like)
      : rows(round_up(problem.behind(), BLOCK)),
        dim_(problem.dim),
        tasks_(problem.batch * problem.kv_heads * problem.spans()),
        partial_(at::empty({problem.is_causal ? 1 : 2, tasks_, 2, rows, problem.dim}, like.options())),
        data_(partial_.data_ptr<float>()) {
    ask_for_huge_pages(partial_.data_ptr(), partial_.nbytes());
  }

  // The `count` rows next to the span.
  float* before(int64_t task, bool is_value, int64_t count) const {
    return data_ + ((task * 2 + is_value + 1) * rows - count) * dim_;
  }
  float* after(int64_t task, bool is_value) const { return data_ + ((tasks_ + task) * 2 + is_value) * rows * dim_; }

  const int64_t rows;

 private:
  int64_t dim_, tasks_;
  at::Tensor partial_;
  float* data_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::optional<at::Tensor>, std::optional<at::Tensor>,
           std::optional<at::Tensor>, std::optional<at::Tensor>>
window_backward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& cos,
                const std::optional<at::Tensor>& sin, const std::optional<at::Tensor>& sink_keys,
                const std::optional<at::Tensor>& sink_values, const std::optional<at::Tensor>& far_value,
                const std::optional<at::Tensor>& far_logit, const at::Tensor& first_real, const at::Tensor& output,
                const at::Tensor& largest, const at::Tensor& share, const at::Tensor& grad, double scaling, int64_t window,
                bool is_causal) {
  const Inputs inputs{query, key, value, cos, sin, sink_keys, sink_values, far_value, far_logit, first_real};
  const Problem problem = inputs.describe(window, is_causal);
  const Parts parts(inputs, problem);
  check_rows(grad, "grad");
  at::Tensor grad_query = empty_gradient(query), grad_key = empty_gradient(key), grad_value = empty_gradient(value);
  const auto grad_far_value = empty_gradient(far_value), grad_far_logit = empty_gradient(far_logit);
  // Of each span's queries, to be summed: keys and values.
  std::optional<at::Tensor> grad_sinks;
  if (problem.sinks)
    grad_sinks = at::empty({2, problem.batch, problem.kv_heads, problem.spans(), problem.sinks, problem.dim}, query.options());
  const Borders borders(problem, key);

  const Rows outputs(output), most(largest), shares(share), grads(grad), grad_queries(grad_query), grad_keys(grad_key),
      grad_values(grad_value), grad_far_values(Rows(grad_far_value).numbered_from(problem.first_far())),
      grad_far_logits(Rows(grad_far_logit).numbered_from(problem.first_far()));
  const int64_t dim = problem.dim, width = problem.width();

  for_tasks(problem, [&](int64_t begin, int64_t end) {
    Seen seen(problem, parts);
    const Scratch key_sums(problem.most_keys() * width), value_sums(problem.most_keys() * width);
    const Scratch sink_sums(2 * problem.sinks * width);
    GradientBlock block(dim, width);
    for (int64_t index = begin; index < end; index++) {
      const Task task(problem, index);
      const Range reach = task.reach(problem);
      seen.take(task);
      std::fill(key_sums + 0, key_sums + reach.count() * width, 0.0f);
      std::fill(value_sums + 0, value_sums + reach.count() * width, 0.0f);
      std::fill(sink_sums + 0, sink_sums + 2 * problem.sinks * width, 0.0f);

      for_blocks(problem, task, [&](int64_t head, const Place& place) {
        const Rows queries = parts.query.of(task.batch, head);
        block.start(place, queries, grads.of(task.batch, head), outputs.of(task.batch, head), most.of(task.batch, head),
                    shares.of(task.batch, head));
        block.take_far(place, parts.far_value.of(task.batch, head), parts.far_logit.of(task.batch, head),
                       grad_far_values.of(task.batch, head), grad_far_logits.of(task.batch, head));
        block.turn(place, parts.positions, scaling);
        seen.each_tile(place, [&](const Band& band, const float* keys, const float* values, int64_t offset) {
          block.take_keys(band, keys, values, key_sums + offset, value_sums + offset);
        });
        block.turn_back(place, parts.positions, scaling, queries);
        seen.each_sink_tile(place, [&](const Band& band, const float* keys, const float* values, int64_t offset) {
          block.take_keys(band, keys, values, sink_sums + offset, sink_sums + problem.sinks * width + offset);
        });
        block.finish(place, grad_queries.of(task.batch, head));
      });

      for (const bool is_value : {false, true}) {
        if (grad_sinks) {
          const int64_t tasks = problem.batch * problem.kv_heads * problem.spans();
          const int64_t own = (task.batch * problem.kv_heads + task.kv_head) * problem.spans() + task.span;
          unpack_rows(sink_sums + is_value * problem.sinks * width, problem.sinks, dim, width,
                      grad_sinks->data_ptr<float>() + (is_value * tasks + own) * problem.sinks * dim, dim);
        }
        float* sums = is_value ? value_sums : key_sums;
        if (!is_value) parts.positions.turn(reach.start, reach.count(), dim, width, 1.0f, true, sums);
        const Rows own = (is_value ? grad_values : grad_keys).of(task.batch, task.kv_head);
        const int64_t earlier = task.slots.start - reach.start;
        unpack_rows(sums + earlier * width, task.slots.count(), dim, width, own[task.slots.start], own.stride);
        unpack_rows(sums, earlier, dim, width, borders.before(index, is_value, earlier), dim);
        if (is_causal) continue;
        unpack_rows(sums + (task.slots.end - reach.start) * width, reach.end - task.slots.end, dim, width,
                    borders.after(index, is_value), dim);
      }
    }
  });

  // Each span takes what its neighbours have for it.
  for_tasks(problem, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; index++) {
      const Task task(problem, index);
      for (const bool is_value : {false, true}) {
        const Rows own = (is_value ? grad_values : grad_keys).of(task.batch, task.kv_head);
        if (task.span + 1 < problem.spans()) {
          const int64_t next = index + problem.kv_heads;
          const int64_t count = task.slots.end - Task(problem, next).reach(problem).start;
          add_rows(borders.before(next, is_value, count), count, dim, own[task.slots.end - count], own.stride);
        }
        if (!is_causal && task.span > 0) {
          const int64_t last = index - problem.kv_heads;
          const int64_t count = Task(problem, last).reach(problem).end - task.slots.start;
          add_rows(borders.after(last, is_value), count, dim, own[task.slots.start], own.stride);
        }
      }
    }
  });
  std::optional<at::Tensor> grad_sink_keys, grad_sink_values;
  if (grad_sinks) grad_sink_keys = grad_sinks->select(0, 0).sum(2), grad_sink_values = grad_sinks->select(0, 1).sum(2);
  return {grad_query, grad_key, grad_value, grad_sink_keys, grad_sink_values, grad_far_value, grad_far_logit};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(kermit_hf, m) {
  m.def(
      "window_forward(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, Tensor? sink_keys, Tensor? sink_values, "
      "Tensor? far_value, Tensor? far_logit, Tensor first_real, float scaling, int window, bool is_causal) "
      "-> (Tensor, Tensor, Tensor)",
      &window_forward);
  m.def(
      "window_backward(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, Tensor? sink_keys, Tensor? sink_values, "
      "Tensor? far_value, Tensor? far_logit, Tensor first_real, Tensor output, Tensor largest, Tensor share, Tensor grad, "
      "float scaling, int window, bool is_causal) -> (Tensor, Tensor, Tensor, Tensor?, Tensor?, Tensor?, Tensor?)",
      &window_backward);
}
