// The near field and its merging with sinks and far field on a CPU: the formula of window_attention.py, block by block.
//
// A block of queries meets the keys it sees tile by tile, under a running softmax (Dao et al. 2022, arXiv 2205.14135)
// which starts from the far field, as one token with its own logit.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "tensors.h"
#include "window_tiles.h"

namespace {

using namespace tensors;
using namespace window;

// A block of queries with its running softmax: what of each query's scores has been taken up so far.
class Block {
 public:
  explicit Block(const Problem& problem)
      : problem_(problem),
        dim_(problem.dim),
        width_(problem.width()),
        rows_(BLOCK * width_),
        queries_(BLOCK * width_),
        scores_(BLOCK * BLOCK),
        sums_(BLOCK * width_) {}

  // Starts from the far field, or from nothing. Queries have no positions yet.
  void start(const Place& place, const Rows& query, const Rows& far_value, const Rows& far_logit) {
    pack_rows(query, place.rows, place.present, problem_.length, dim_, width_, rows_);
    if (problem_.sinks) transpose(BLOCK, width_, rows_, width_, queries_, BLOCK);
    std::fill(largest_, largest_ + BLOCK, LOWEST);
    std::fill(total_, total_ + BLOCK, 0.0f);
    pack_rows(far_value, place.rows, place.far, far_value.data ? problem_.length : 0, dim_, width_, sums_);
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
    const Range columns = band.columns_of(keys.start, keys.count());
    for (int64_t column = columns.start; column < columns.end; column += LANES) {
      const bool hides_some = band.hides_some(keys, column);
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

  const Problem& problem_;
  int64_t dim_, width_;
  // Rows of queries and the same by columns; a tile (keys, BLOCK).
  Scratch rows_, queries_, scores_, sums_;
  float largest_[BLOCK], total_[BLOCK];
};

// output (batch, heads, seq, dim); of each query the largest score, and its share, one divided by the sum of all
// e^(score - largest), both (batch, heads, seq). scaling: of the scores of keys.
std::tuple<at::Tensor, at::Tensor, at::Tensor> window_forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& cos,
    const std::optional<at::Tensor>& sin, const std::optional<at::Tensor>& sink_keys,
    const std::optional<at::Tensor>& sink_values, const std::optional<at::Tensor>& far_value,
    const std::optional<at::Tensor>& far_logit, const at::Tensor& first_real, double scaling, int64_t window,
    bool is_causal) {
  const Inputs inputs{query, key, value, cos, sin, sink_keys, sink_values, far_value, far_logit, first_real};
  const Problem problem = inputs.describe(window, is_causal);
  const Parts parts(inputs, problem);
  at::Tensor output = empty_states(problem.batch, problem.heads, problem.length, problem.dim, query);
  at::Tensor largest = at::empty({problem.batch, problem.heads, problem.length}, query.options());
  at::Tensor share = at::empty_like(largest);
  const Rows outputs(output), most(largest), shares(share);

  for_tasks(problem, [&](Tasks tasks) {
    Seen seen(problem, parts);
    Block block(problem);
    const auto take = [&](const Band& band, const float* keys, const float* values, int64_t) {
      block.take_keys(band, keys, values);
    };
    for (int64_t index; tasks.next(index);) {
      const Task task(problem, index);
      if (task.queries.count()) seen.take(task);
      for_blocks(problem, task, [&](int64_t head, const Place& place) {
        block.start(place, parts.query.of(task.batch, head), parts.far_value.of(task.batch, head),
                    parts.far_logit.of(task.batch, head));
        seen.each_sink_tile(place, take);
        block.turn(place, parts.positions, scaling);
        seen.each_tile(place, take);
        block.finish(place, outputs.of(task.batch, head), most.of(task.batch, head), shares.of(task.batch, head));
      });
    }
  });
  return {output, largest, share};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(kermit_hf, m) {
  m.def(
      "window_forward(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, Tensor? sink_keys, Tensor? "
      "sink_values, "
      "Tensor? far_value, Tensor? far_logit, Tensor first_real, float scaling, int window, bool is_causal) "
      "-> (Tensor, Tensor, Tensor)",
      &window_forward);
}
