// One token at a time, as in decoding: `window_step` with rotary positions and sinks, `delta_step` and `additive_step`
// of window_attention.py and kernel_attention.py, with their feature maps where these are elementwise. There is too
// little to do for operators of PyTorch, each of which costs more than its arithmetic: here a step is one call.
//
// States are float32, (batch, heads, 1, dim) or (batch, kv_heads, slots, dim), the last axis contiguous. One task is
// one key/value head of one text, with the query heads that share it.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "vector_tiles.h"

namespace {

using namespace tiles;

using MaybeTensor = std::optional<at::Tensor>;

// Floats that are worth a thread of their own.
constexpr int64_t GRAIN = 16384;
// As in kernel_attention.py and feature_maps.py.
constexpr float MIN_LOG_DECAY = -40.0f, MIN_NORM = 1e-12f, MIN_DENOMINATOR = 1e-30f;

// A tensor (batch, heads, seq) or (batch, heads, seq, dim); absent if there is none.
struct Tokens {
  const float* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;

  explicit Tokens(const at::Tensor& tensor)
      : data(tensor.const_data_ptr<float>()),
        batch(tensor.stride(0)),
        head(tensor.stride(1)),
        token(tensor.stride(2)) {}
  explicit Tokens(const MaybeTensor& tensor) {
    if (tensor) *this = Tokens(*tensor);
  }
  explicit operator bool() const { return data != nullptr; }
  const float* at(int64_t in_batch, int64_t in_head, int64_t in_seq = 0) const {
    return data + in_batch * batch + in_head * head + in_seq * token;
  }
};

struct Sizes {
  int64_t batch, heads, kv_heads, width, dim;

  Sizes(const at::Tensor& query, const at::Tensor& value)
      : batch(query.size(0)), heads(query.size(1)), kv_heads(value.size(1)), width(query.size(3)), dim(value.size(3)) {}
  int64_t groups() const { return heads / kv_heads; }
};

// Calls work(batch, kv_head) for all, each of which reads about `cost` floats.
template <class Work>
void for_heads(const Sizes& sizes, int64_t cost, const Work& work) {
  at::parallel_for(0, sizes.batch * sizes.kv_heads, std::max<int64_t>(1, GRAIN / std::max<int64_t>(cost, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; i++) work(i / sizes.kv_heads, i % sizes.kv_heads);
                   });
}

// Rows.

inline float dot(int64_t width, const float* a, const float* b) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; i++) sum += a[i] * b[i];
  return sum;
}

inline void add_scaled(int64_t width, float factor, const float* from, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < width; i++) to[i] += factor * from[i];
}

// to = keep * from + factor * addend
inline void renew(int64_t width, float keep, const float* from, float factor, const float* addend, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < width; i++) to[i] = keep * from[i] + factor * addend[i];
}

// Turns a row by the angles of one slot, halves as real and imaginary parts.
inline void turn(int64_t half, const float* from, const float* cos, const float* sin, float scale, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < half; i++) {
    const float real = from[i], imaginary = from[half + i];
    to[i] = scale * (real * cos[i] - imaginary * sin[i]);
    to[half + i] = scale * (imaginary * cos[i] + real * sin[i]);
  }
}

// exp(x - largest) of whole vectors, in place; returns their sum.
inline float exponentials(int64_t width, float largest, float* row) {
  Vector sum{};
  for (int64_t i = 0; i < width; i += LANES) {
    const Vector weights = exponential(load(row + i) - largest);
    store(row + i, weights);
    sum += weights;
  }
  return sum_of(sum);
}

inline float decay_of(const Tokens& log_forget, int64_t batch, int64_t head) {
  if (!log_forget) return 1.0f;
  const float log_decay = *log_forget.at(batch, head);
  return log_decay < MIN_LOG_DECAY ? 0.0f : std::exp(log_decay);
}

// Near field.

struct Near {
  Tokens keys, values, sink_keys, sink_values, far_values, far_logits;
  int64_t slots, first, num_sinks;  // the window starts at `first`
  const float *cos, *sin;
  int64_t cos_row, sin_row;
};

// The softmax of one query over `num_sinks` sinks, of which it sees `seen`, the slots from `first_key` on, and the far
// field.
class Query {
 public:
  Query(const Near& near, int64_t width, int64_t dim)
      : near_(near),
        width_(width),
        dim_(dim),
        scores_(round_up(near.num_sinks + near.slots - near.first + 1)),
        turned_(width) {}

  void run(int64_t batch, int64_t head, int64_t kv_head, const float* keys, int64_t seen, int64_t first_key,
           const float* query, float scaling, float* output) {
    const int64_t newest = near_.slots - 1, count = near_.slots - first_key;
    turn(width_ / 2, query, near_.cos + newest * near_.cos_row, near_.sin + newest * near_.sin_row, scaling, turned_);
    float* score = scores_;
    // Keys lie turned one after the other, those of sinks first.
    for (int64_t i = 0; i < seen; i++) *score++ = dot(width_, turned_, keys + i * width_);
    keys += (near_.num_sinks + first_key - near_.first) * width_;
    for (int64_t i = 0; i < count; i++) *score++ = dot(width_, turned_, keys + i * width_);
    if (near_.far_logits) *score++ = *near_.far_logits.at(batch, head);
    const int64_t all = score - scores_, padded = round_up(all);
    const float largest = *std::max_element(scores_ + 0, scores_ + all);
    std::fill(score, scores_ + padded, -std::numeric_limits<float>::infinity());
    const float share = 1.0f / exponentials(padded, largest, scores_);

    const float* weight = scores_;
    std::fill(output, output + dim_, 0.0f);
    for (int64_t i = 0; i < seen; i++)
      add_scaled(dim_, share * *weight++, near_.sink_values.at(batch, kv_head, i), output);
    for (int64_t i = first_key; i < near_.slots; i++)
      add_scaled(dim_, share * *weight++, near_.values.at(batch, kv_head, i), output);
    if (near_.far_logits) add_scaled(dim_, share * *weight, near_.far_values.at(batch, head), output);
  }

 private:
  const Near& near_;
  int64_t width_, dim_;
  Scratch scores_, turned_;
};

// Rows before first_real are padding, which only the newest token, if it is padding itself, sees of itself. first_reals
// has one for each text, or is absent where `first_real` is that of all.
at::Tensor window_step(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& cos,
                       const at::Tensor& sin, const MaybeTensor& sink_key, const MaybeTensor& sink_value,
                       const MaybeTensor& far_value, const MaybeTensor& far_logit, const MaybeTensor& first_reals,
                       int64_t first_real, double scaling, int64_t window) {
  const Sizes sizes(query, value);
  const int64_t slots = key.size(2), first = std::max<int64_t>(slots - window, 0);
  const Near near{Tokens(key),
                  Tokens(value),
                  Tokens(sink_key),
                  Tokens(sink_value),
                  Tokens(far_value),
                  Tokens(far_logit),
                  slots,
                  first,
                  sink_key ? sink_key->size(2) : 0,
                  cos.const_data_ptr<float>(),
                  sin.const_data_ptr<float>(),
                  cos.stride(0),
                  sin.stride(0)};
  const Tokens queries(query);
  const int64_t* rows = first_reals ? first_reals->const_data_ptr<int64_t>() : nullptr;
  at::Tensor output = at::empty({sizes.batch, sizes.heads, 1, sizes.dim}, query.options());
  float* outputs = output.mutable_data_ptr<float>();
  const int64_t width = sizes.width, num_keys = near.num_sinks + slots - first;
  for_heads(sizes, num_keys * (width + sizes.dim), [&](int64_t batch, int64_t kv_head) {
    const int64_t real = rows ? rows[batch] : first_real;
    const int64_t first_key = std::min(std::max(first, real), slots - 1);
    // The first tokens are seen as sinks once they have left the window.
    const int64_t seen = std::min(std::max<int64_t>(slots - window - real, 0), near.num_sinks);
    Scratch keys(num_keys * width);
    float* to = keys;
    const auto turn_key = [&](const float* from, int64_t slot) {
      turn(width / 2, from, near.cos + slot * near.cos_row, near.sin + slot * near.sin_row, 1.0f, to);
      to += width;
    };
    // Sink k is turned as if it were in slot i - W + k, where i is the query's.
    for (int64_t i = 0; i < near.num_sinks; i++) turn_key(near.sink_keys.at(batch, kv_head, i), slots - 1 - window + i);
    for (int64_t i = first; i < slots; i++) turn_key(near.keys.at(batch, kv_head, i), i);
    Query one(near, width, sizes.dim);
    for (int64_t head = kv_head * sizes.groups(); head < (kv_head + 1) * sizes.groups(); head++)
      one.run(batch, head, kv_head, keys, seen, first_key, queries.at(batch, head), static_cast<float>(scaling),
              outputs + (batch * sizes.heads + head) * sizes.dim);
  });
  return output;
}

// Far field.

// silu(x) / max(|silu(x)|, MIN_NORM)
void map_silu_l2(int64_t width, const float* from, float* to) {
  float squares = 0.0f;
  for (int64_t i = 0; i < width; i++) {
    to[i] = from[i] / (1.0f + std::exp(-from[i]));
    squares += to[i] * to[i];
  }
  const float factor = 1.0f / std::max(std::sqrt(squares), MIN_NORM);
  for (int64_t i = 0; i < width; i++) to[i] *= factor;
}

// exp(min(x, 0)) + max(x, 0)
void map_elu(int64_t width, const float* from, float* to) {
  for (int64_t i = 0; i < width; i++)
    to[i] = std::exp(std::min(std::max(from[i], -40.0f), 0.0f)) + std::max(from[i], 0.0f);
}

// Writes (log_forget, keep) one token into the memory of a head and reads it: matrix' = decay matrix + key written^T.
// numerators: of the queries, (groups, dim) each.
void write_and_read(const Sizes& sizes, float decay, const float* key, const float* written, const float* queries,
                    const float* matrix, float* renewed, float* numerators) {
  const int64_t groups = sizes.groups(), width = sizes.width, dim = sizes.dim;
  std::fill(numerators, numerators + groups * dim, 0.0f);
  for (int64_t i = 0; i < width; i++) {
    renew(dim, decay, matrix + i * dim, key[i], written, renewed + i * dim);
    for (int64_t j = 0; j < groups; j++)
      add_scaled(dim, queries[j * width + i], renewed + i * dim, numerators + j * dim);
  }
}

// The features of the queries of a head, (groups, width).
template <class Map>
void map_queries(const Sizes& sizes, const Tokens& queries, int64_t batch, int64_t kv_head, bool maps, const Map& map,
                 float* to) {
  for (int64_t j = 0; j < sizes.groups(); j++, to += sizes.width) {
    const float* query = queries.at(batch, kv_head * sizes.groups() + j);
    if (maps)
      map(sizes.width, query, to);
    else
      std::copy(query, query + sizes.width, to);
  }
}

std::tuple<at::Tensor, at::Tensor> delta_step(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                              const at::Tensor& write_strength, const MaybeTensor& log_forget,
                                              const at::Tensor& matrix, bool maps) {
  const Sizes sizes(query, value);
  const Tokens queries(query), keys(key), values(value), strengths(write_strength), forget(log_forget);
  at::Tensor numerator = at::empty({sizes.batch, sizes.heads, 1, sizes.dim}, query.options());
  at::Tensor renewed = at::empty_like(matrix);
  const int64_t width = sizes.width, dim = sizes.dim, groups = sizes.groups();
  const float* old = matrix.const_data_ptr<float>();
  float *to = renewed.mutable_data_ptr<float>(), *numerators = numerator.mutable_data_ptr<float>();
  for_heads(sizes, 2 * width * dim, [&](int64_t batch, int64_t kv_head) {
    const int64_t index = batch * sizes.kv_heads + kv_head;
    Scratch mapped((groups + 1) * width), written(dim);
    const float* own_key = keys.at(batch, kv_head);
    if (maps) {
      map_silu_l2(width, own_key, mapped + groups * width);
      own_key = mapped + groups * width;
    }
    map_queries(sizes, queries, batch, kv_head, maps, map_silu_l2, mapped);
    const float decay = decay_of(forget, batch, kv_head), strength = *strengths.at(batch, kv_head);
    // What the key recalls is replaced, as far as the strength goes.
    std::fill(written + 0, written + dim, 0.0f);
    for (int64_t i = 0; i < width; i++) add_scaled(dim, own_key[i], old + (index * width + i) * dim, written);
    const float* own_value = values.at(batch, kv_head);
    for (int64_t i = 0; i < dim; i++) written[i] = strength * (own_value[i] - decay * written[i]);
    write_and_read(sizes, decay, own_key, written, mapped, old + index * width * dim, to + index * width * dim,
                   numerators + index * groups * dim);
  });
  return {numerator, renewed};
}

// key_mask is zero where a token does not enter the memory.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> additive_step(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const MaybeTensor& log_forget,
    const MaybeTensor& key_mask, const at::Tensor& matrix, const at::Tensor& normalizer, bool elu, bool divides) {
  const Sizes sizes(query, value);
  const Tokens queries(query), keys(key), values(value), forget(log_forget), mask(key_mask);
  at::Tensor numerator = at::empty({sizes.batch, sizes.heads, 1, sizes.dim}, query.options());
  at::Tensor denominator = at::empty({sizes.batch, sizes.heads, 1}, query.options());
  at::Tensor renewed = at::empty_like(matrix), renewed_normalizer = at::empty_like(normalizer);
  const int64_t width = sizes.width, dim = sizes.dim, groups = sizes.groups();
  const float *old = matrix.const_data_ptr<float>(), *old_sums = normalizer.const_data_ptr<float>();
  float *to = renewed.mutable_data_ptr<float>(), *sums = renewed_normalizer.mutable_data_ptr<float>();
  float *numerators = numerator.mutable_data_ptr<float>(), *denominators = denominator.mutable_data_ptr<float>();
  for_heads(sizes, 2 * width * dim, [&](int64_t batch, int64_t kv_head) {
    const int64_t index = batch * sizes.kv_heads + kv_head;
    Scratch mapped((groups + 1) * width);
    float* own_key = mapped + groups * width;
    if (elu)
      map_elu(width, keys.at(batch, kv_head), own_key);
    else
      std::copy(keys.at(batch, kv_head), keys.at(batch, kv_head) + width, own_key);
    if (mask && *mask.at(batch, kv_head) == 0.0f) std::fill(own_key, own_key + width, 0.0f);
    map_queries(sizes, queries, batch, kv_head, elu, map_elu, mapped);
    const float decay = decay_of(forget, batch, kv_head);
    float *own_sums = sums + index * width, *read = numerators + index * groups * dim;
    for (int64_t i = 0; i < width; i++) own_sums[i] = decay * old_sums[index * width + i] + own_key[i];
    write_and_read(sizes, decay, own_key, values.at(batch, kv_head), mapped, old + index * width * dim,
                   to + index * width * dim, read);
    for (int64_t j = 0; j < groups; j++) {
      const float total = dot(width, mapped + j * width, own_sums);
      denominators[index * groups + j] = total;
      if (!divides) continue;
      for (int64_t i = 0; i < dim; i++) read[j * dim + i] /= std::max(total, MIN_DENOMINATOR);
    }
  });
  return {numerator, denominator, renewed, renewed_normalizer};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(kermit_hf, m) {
  m.def(
      "window_step(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor? sink_key, Tensor? "
      "sink_value, "
      "Tensor? far_value, Tensor? far_logit, Tensor? first_reals, int first_real, float scaling, int window) -> "
      "Tensor");
  m.def(
      "delta_step(Tensor query, Tensor key, Tensor value, Tensor write_strength, Tensor? log_forget, Tensor matrix, "
      "bool maps) -> (Tensor, Tensor)");
  m.def(
      "additive_step(Tensor query, Tensor key, Tensor value, Tensor? log_forget, Tensor? key_mask, Tensor matrix, "
      "Tensor normalizer, bool elu, bool divides) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(kermit_hf, CPU, m) {
  m.impl("window_step", window_step);
  m.impl("delta_step", delta_step);
  m.impl("additive_step", additive_step);
}
