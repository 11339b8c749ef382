// The gradient of the near field on a CPU, see window_cpu.cpp; the formulas are those of window_triton.py.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "tensors.h"
#include "window_tiles.h"

namespace {

using namespace tensors;
using namespace window;

// A block of queries on the way back: each weight is again e^(score - largest) * share.
class GradientBlock {
 public:
  explicit GradientBlock(const Problem& problem)
      : problem_(problem),
        dim_(problem.dim),
        width_(problem.width()),
        queries_(BLOCK * width_),
        query_columns_(BLOCK * width_),
        grads_(BLOCK * width_),
        grad_columns_(BLOCK * width_),
        weights_(BLOCK * BLOCK),
        grad_scores_(BLOCK * BLOCK),
        grad_queries_(BLOCK * width_) {}

  // Queries have no positions yet.
  void start(const Place& place, const Rows& query, const Rows& grad, const Rows& output, const Rows& largest,
             const Rows& share) {
    pack_rows(query, place.rows, place.present, problem_.length, dim_, width_, queries_);
    pack_rows(grad, place.rows, place.present, problem_.length, dim_, width_, grads_);
    transpose(BLOCK, width_, grads_, width_, grad_columns_, BLOCK);
    std::fill(grad_queries_ + 0, grad_queries_ + BLOCK * width_, 0.0f);
    for (int64_t query = 0; query < BLOCK; query++) {
      const int64_t row = place.rows.start + query;
      const bool exists = place.present.start <= row && row < place.present.end;
      fetch_ahead(output, row, problem_.length, dim_);
      largest_[query] = exists ? *largest[row] : 0.0f;
      share_[query] = exists ? *share[row] : 0.0f;
      agreement_[query] = exists ? dot(grads_ + query * width_, output[row]) : 0.0f;
    }
  }

  void turn(const Place& place, const Positions& positions, float scaling) {
    turn_rows(place, positions, scaling, dim_, width_, queries_);
    transpose(BLOCK, width_, queries_, width_, query_columns_, BLOCK);
  }

  // The gradients so far, and for sinks queries, have no positions again.
  void turn_back(const Place& place, const Positions& positions, float scaling, const Rows& query) {
    turn_rows(place, positions, scaling, dim_, width_, grad_queries_, true);
    if (problem_.sinks == 0) return;
    pack_rows(query, place.rows, place.present, 0, dim_, width_, queries_);
    transpose(BLOCK, width_, queries_, width_, query_columns_, BLOCK);
  }

  void take_far(const Place& place, const Rows& value, const Rows& logit, const Rows& grad_value,
                const Rows& grad_logit) {
    for (int64_t column = 0; column < BLOCK; column += LANES) {
      float logits[LANES];
      for (int64_t i = 0; i < LANES; i++) {
        const int64_t row = place.rows.start + column + i;
        logits[i] = place.far.start <= row && row < place.far.end ? *logit[row] : NOTHING;
      }
      store(weights_ + column, weigh(load(logits), column));
    }
    for (int64_t row = place.far.start; row < place.far.end; row++) {
      fetch_ahead(value, row, problem_.length, dim_);
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
  // Turns the scores of a few keys into weights, finds the scores' gradient and adds to that of the values.
  void take_rows(const Band& band, int64_t key, const float* values, float* grad_values) {
    const int64_t count = std::min(TILE_ROWS, band.keys - key);
    const Range columns = band.columns_of(key, count), seen = band.queries_of(key, count);
    product_band(count, dim_, columns, values + key * width_, width_, grad_columns_, grad_scores_ + key * BLOCK);
    for (int64_t column = columns.start; column < columns.end; column += LANES) {
      const bool hides_some = band.hides_some({key, key + count}, column);
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

  const Problem& problem_;
  int64_t dim_, width_;
  // Rows of queries and of the output's gradient, and the same by columns; tiles (keys, BLOCK).
  Scratch queries_, query_columns_, grads_, grad_columns_, weights_, grad_scores_, grad_queries_;
  float largest_[BLOCK], share_[BLOCK], agreement_[BLOCK];
};

// Gradients of keys and values which belong to other spans than that of the queries they come from, until these are
// done: (before, and without causality also after the span; tasks; keys and values; rows, dim).
class Borders {
 public:
  Borders(const Problem& problem, const at::Tensor& like)
      : rows(round_up(problem.behind(), BLOCK)),
        dim_(problem.dim),
        tasks_(problem.tasks()),
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
window_backward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                const std::optional<at::Tensor>& cos, const std::optional<at::Tensor>& sin,
                const std::optional<at::Tensor>& sink_keys, const std::optional<at::Tensor>& sink_values,
                const std::optional<at::Tensor>& far_value, const std::optional<at::Tensor>& far_logit,
                const at::Tensor& first_real, const at::Tensor& output, const at::Tensor& largest,
                const at::Tensor& share, const at::Tensor& grad, double scaling, int64_t window, bool is_causal) {
  const Inputs inputs{query, key, value, cos, sin, sink_keys, sink_values, far_value, far_logit, first_real};
  const Problem problem = inputs.describe(window, is_causal);
  const Parts parts(inputs, problem);
  check_rows(grad, "grad");
  TORCH_CHECK(grad.sizes() == query.sizes(), "the gradient has to be of the output's shape");
  at::Tensor grad_query = empty_gradient(query), grad_key = empty_gradient(key), grad_value = empty_gradient(value);
  const auto grad_far_value = empty_gradient(far_value), grad_far_logit = empty_gradient(far_logit);
  // Of each span's queries, to be summed: keys and values.
  std::optional<at::Tensor> grad_sinks;
  if (problem.sinks)
    grad_sinks =
        at::empty({2, problem.batch, problem.kv_heads, problem.spans(), problem.sinks, problem.dim}, query.options());
  const Borders borders(problem, key);

  const Rows outputs(output), most(largest), shares(share), grads(grad), grad_queries(grad_query), grad_keys(grad_key),
      grad_values(grad_value), grad_far_values(Rows(grad_far_value).numbered_from(problem.first_far())),
      grad_far_logits(Rows(grad_far_logit).numbered_from(problem.first_far()));
  const int64_t dim = problem.dim, width = problem.width();

  for_tasks(problem, [&](Tasks tasks) {
    Seen seen(problem, parts);
    const Scratch key_sums(problem.most_keys() * width), value_sums(problem.most_keys() * width);
    const Scratch sink_sums(2 * problem.sinks * width);
    GradientBlock block(problem);
    for (int64_t index; tasks.next(index);) {
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
          const int64_t own = (task.batch * problem.kv_heads + task.kv_head) * problem.spans() + task.span;
          unpack_rows(sink_sums + is_value * problem.sinks * width, problem.sinks, dim, width,
                      grad_sinks->data_ptr<float>() + (is_value * problem.tasks() + own) * problem.sinks * dim, dim);
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
  for_tasks(problem, [&](Tasks tasks) {
    for (int64_t index; tasks.next(index);) {
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
      "window_backward(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, Tensor? sink_keys, Tensor? "
      "sink_values, "
      "Tensor? far_value, Tensor? far_logit, Tensor first_real, Tensor output, Tensor largest, Tensor share, Tensor "
      "grad, "
      "float scaling, int window, bool is_causal) -> (Tensor, Tensor, Tensor, Tensor?, Tensor?, Tensor?, Tensor?)",
      &window_backward);
}
