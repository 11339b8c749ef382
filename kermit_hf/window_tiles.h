// What both directions of the near field on a CPU share: which queries see which keys, and the keys that a task's
// queries see.
//
// Queries come in blocks, keys in tiles, both beginning at slots that are multiples of BLOCK, so that most tiles are
// seen either by all queries of a block or by none; of the others only those vectors are computed that some query sees.
// Tiles of scores are (keys, queries): a softmax then runs along whole vectors. Sinks are keys that a query sees once
// they are behind its window, met by queries that have no positions yet.
//
// A task is a span of slots, with all query heads that share a key head, so that its keys and values are packed once.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>

#include "tasks.h"
#include "vector_tiles.h"

namespace window {

using namespace tasks;
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

// Rows of a tensor (batch, heads, rows, dim) whose last axis is contiguous, or of (batch, heads, rows); null where
// there is none.
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
      const float* __restrict cosines = cos + slot * cos_stride, * __restrict sines = sin + slot * sin_stride;
      float* __restrict real = row, * __restrict imaginary = row + dim / 2;
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
  // Whether some of the queries of the vector from `column` on do not see all of these keys.
  bool hides_some(Range some, int64_t column) const {
    return some.start < padding || column < some.end - 1 + offset - ahead ||
           column + LANES > some.start + offset + behind + 1;
  }
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
inline Band sinks_from(int64_t query, int64_t sinks) {
  return {sinks, std::clamp(query, -BLOCK, BLOCK), 3 * BLOCK, 0, 0};
}

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
  int64_t tasks() const { return batch * kv_heads * spans(); }
  // So many keys a task reaches, at most.
  int64_t most_keys() const { return span() + behind() + ahead() + 2 * BLOCK; }
  // Slots of the keys that queries in these slots see, in whole tiles.
  Range reach(Range queries) const {
    const int64_t block = queries.start / BLOCK * BLOCK, first = std::max<int64_t>(block - behind(), 0) / BLOCK * BLOCK;
    return {first, std::min(queries.end + ahead(), slots)};
  }
  Band band(int64_t query_slot, int64_t key_slot, int64_t first_real) const {
    const int64_t keys = std::min(BLOCK, slots - key_slot);
    return {keys, key_slot - query_slot, behind(), ahead(), std::clamp<int64_t>(first_real - key_slot, 0, keys)};
  }
};

// Of a block of queries: its first slot, the rows of the queries' tensors, those of them that there are, and those with
// a far field.
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
  in_parallel(problem.tasks(), function);
}

// Fetches a row that comes soon, if there is one before `end`: the processor does not see by itself that rows of other
// heads lie between those of one.
inline void fetch_ahead(const Rows& rows, int64_t row, int64_t end, int64_t dim) {
  constexpr int64_t LINE = 64 / sizeof(float), ROWS_AHEAD = 12;
  const int64_t next = row + ROWS_AHEAD;
  if (next < 0 || next >= end) return;
  for (int64_t i = 0; i < dim; i += LINE) __builtin_prefetch(rows[next] + i);
}

// Rows `range` one after the other, `width` apart, with zeros up to it and for rows outside of `present`. Fetches those
// that come next, up to row `end`.
inline void pack_rows(const Rows& from, Range range, Range present, int64_t end, int64_t dim, int64_t width,
                      float* to) {
  for (int64_t row = range.start; row < range.end; row++, to += width) {
    fetch_ahead(from, row, end, dim);
    const int64_t count = present.start <= row && row < present.end ? dim : 0;
    if (count) std::memcpy(to, from[row], count * sizeof(float));
    std::fill(to + count, to + width, 0.0f);
  }
}

// The way back, for `count` rows.
inline void unpack_rows(const float* from, int64_t count, int64_t dim, int64_t width, float* to, int64_t stride) {
  for (int64_t row = 0; row < count; row++) std::memcpy(to + row * stride, from + row * width, dim * sizeof(float));
}

inline void add_rows(const float* from, int64_t count, int64_t dim, float* to, int64_t stride) {
  for (int64_t row = 0; row < count; row++) add_row(dim, from + row * dim, to + row * stride);
}

// Turns those rows of a block of queries that there are, or of gradients, forth or back.
inline void turn_rows(const Place& place, const Positions& positions, float scaling, int64_t dim, int64_t width,
                      float* rows, bool back = false) {
  const int64_t skipped = place.present.start - place.rows.start;
  positions.turn(place.slot + skipped, place.present.count(), dim, width, scaling, back, rows + skipped * width);
}

// These columns of C (rows, BLOCK) = A (rows, depth) B (depth, BLOCK), for up to TILE_ROWS rows `a_row` apart.
inline void product_band(int64_t rows, int64_t depth, Range columns, const float* a, int64_t a_row, const float* b,
                         float* c) {
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
inline void add_to_queries(const Band& band, const float* tile, const float* rows, int64_t width, float* sums) {
  for (int64_t query = 0; query < BLOCK; query += TILE_ROWS) {
    const int64_t count = std::min(TILE_ROWS, BLOCK - query);
    const Range keys = band.keys_of(query, count);
    product(count, keys.count(), width, tile + keys.start * BLOCK + query, 1, BLOCK, rows + keys.start * width, width,
            sums + query * width, width, true);
  }
}

inline void check_rows(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.device().is_cpu(), name, " must be float32 on a CPU");
  TORCH_CHECK(tensor.dim() == 3 || tensor.size(-1) <= 1 || tensor.stride(-1) == 1, name,
              " must have a contiguous last axis");
}

// What both directions take: states without positions, (batch, heads or kv_heads, tokens, dim); cosine and sine, (slots
// or more, dim / 2) or more; sinks (batch, kv_heads, sinks, dim), their keys as the queries meet them; the far field of
// the last queries; of each row of the batch the first slot that is not padding.
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
    TORCH_CHECK(cos.has_value() == sin.has_value() && sink_keys.has_value() == sink_values.has_value() &&
                    far_value.has_value() == far_logit.has_value(),
                "cosine and sine, keys and values of sinks, and value and logit of the far field come in pairs");
    if (sink_keys)
      TORCH_CHECK(sink_keys->sizes() == sink_values->sizes() && sink_keys->size(0) == key.size(0) &&
                      sink_keys->size(1) == key.size(1) && sink_keys->size(3) == key.size(3),
                  "sinks have to be (batch, kv_heads, sinks, head_dim)");
    if (far_value)
      TORCH_CHECK(
          far_value->size(0) == query.size(0) && far_value->size(1) == query.size(1) &&
              far_value->size(2) <= query.size(2) && far_value->size(3) == query.size(3) &&
              far_logit->sizes() == far_value->sizes().slice(0, 3),
          "the far field has to be (batch, heads, rows, head_dim), its logit (batch, heads, rows), with at most ",
          query.size(2), " rows");
    TORCH_CHECK(
        first_real.scalar_type() == at::kLong && first_real.is_contiguous() && first_real.numel() == query.size(0),
        "first_real must be int64 (batch,)");
    for (const auto* table : {&cos, &sin})
      TORCH_CHECK(
          !*table ||
              ((*table)->size(0) >= key.size(2) && 2 * (*table)->size(1) >= query.size(3) && query.size(3) % 2 == 0),
          "cosine and sine need a row for each of ", key.size(2), " slots and a column for each pair of coordinates");
  }

  Problem describe(int64_t window, bool is_causal) const {
    check(window);
    const int64_t sinks = sink_keys ? sink_keys->size(2) : 0, far_rows = far_value ? far_value->size(2) : 0;
    return {query.size(0), query.size(1), key.size(1), query.size(2), key.size(2),
            query.size(3), window,        sinks,       far_rows,      is_causal};
  }
};

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
    pack_rows(parts_.key.of(task.batch, task.kv_head), reach_, reach_, problem_.slots, dim, width, keys_);
    parts_.positions.turn(reach_.start, reach_.count(), dim, width, 1.0f, false, keys_);
    pack_rows(parts_.value.of(task.batch, task.kv_head), reach_, reach_, problem_.slots, dim, width, values_);
    if (problem_.sinks == 0) return;
    const Range sinks = {0, problem_.sinks};
    pack_rows(parts_.sink_keys.of(task.batch, task.kv_head), sinks, sinks, sinks.end, dim, width, sink_keys_);
    pack_rows(parts_.sink_values.of(task.batch, task.kv_head), sinks, sinks, sinks.end, dim, width, sink_values_);
  }

  // Calls take(band, keys, values, offset) with each tile of keys that the queries of a block see, `offset` from the
  // first one's row.
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
      const Band band =
          sinks_from(first_real_ + problem_.window + sink - place.slot, std::min(BLOCK, problem_.sinks - sink));
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
    for (int64_t slot = task.queries.start / BLOCK * BLOCK; slot < task.queries.end; slot += BLOCK)
      function(head, Place(problem, slot));
}

}  // namespace window
