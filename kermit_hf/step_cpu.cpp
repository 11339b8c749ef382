// One token at a time, as in decoding: `window_step` with rotary positions and sinks, `delta_step` and `additive_step`
// of window_attention.py and kernel_attention.py, with their feature maps where these are elementwise, and
// `layer_step`, all of it and what lies around. There is too little to do for operators of PyTorch, each of which costs
// more than its arithmetic: here a step is one call.
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

#include "feature_rows.h"
#include "vector_tiles.h"

namespace {

using namespace rows;
using namespace tiles;

using MaybeTensor = std::optional<at::Tensor>;

// Floats that are worth a thread of their own.
constexpr int64_t GRAIN = 16384;
// As in kernel_attention.py.
constexpr float MIN_LOG_DECAY = -40.0f, MIN_DENOMINATOR = 1e-30f;

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

  Sizes(int64_t batch, int64_t heads, int64_t kv_heads, int64_t width, int64_t dim)
      : batch(batch), heads(heads), kv_heads(kv_heads), width(width), dim(dim) {}
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

inline float decay_of_log(float log_decay) { return log_decay < MIN_LOG_DECAY ? 0.0f : std::exp(log_decay); }

inline float decay_of(const Tokens& log_forget, int64_t batch, int64_t head) {
  return log_forget ? decay_of_log(*log_forget.at(batch, head)) : 1.0f;
}

// Near field.

struct Near {
  Tokens keys, values, sink_keys, sink_values;
  int64_t slots, first, num_sinks;  // the window starts at `first`
  const float *cos, *sin;
  int64_t cos_row, sin_row;

  int64_t num_keys() const { return num_sinks + slots - first; }
};

// What one query reads of the far field; no value if there is nothing.
struct Far {
  const float* value = nullptr;
  float logit = 0.0f;
};

// The softmax of one query over `num_sinks` sinks, of which it sees `seen`, the slots from `first_key` on, and the far
// field.
class Query {
 public:
  Query(const Near& near, int64_t width, int64_t dim)
      : near_(near), width_(width), dim_(dim), scores_(round_up(near.num_keys() + 1)), turned_(width) {}

  void run(int64_t batch, int64_t kv_head, const float* keys, int64_t seen, int64_t first_key, const float* query,
           float scaling, const Far& far, float* output) {
    const int64_t newest = near_.slots - 1, count = near_.slots - first_key;
    turn(width_ / 2, query, near_.cos + newest * near_.cos_row, near_.sin + newest * near_.sin_row, scaling, turned_);
    float* score = scores_;
    // Keys lie turned one after the other, those of sinks first.
    for (int64_t i = 0; i < seen; i++) *score++ = dot(width_, turned_, keys + i * width_);
    keys += (near_.num_sinks + first_key - near_.first) * width_;
    for (int64_t i = 0; i < count; i++) *score++ = dot(width_, turned_, keys + i * width_);
    if (far.value) *score++ = far.logit;
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
    if (far.value) add_scaled(dim_, share * *weight, far.value, output);
  }

 private:
  const Near& near_;
  int64_t width_, dim_;
  Scratch scores_, turned_;
};

// The near field of the query heads of one key/value head, of which the window begins with slot `first_key` and `seen`
// sinks lie behind it. query_of(j), far_of(j) and output_of(j) are those of its query head j.
template <class QueryOf, class FarOf, class OutputOf>
void attend_near(const Near& near, const Sizes& sizes, int64_t batch, int64_t kv_head, int64_t first_key, int64_t seen,
                 float scaling, const QueryOf& query_of, const FarOf& far_of, const OutputOf& output_of) {
  const int64_t width = sizes.width;
  Scratch keys(near.num_keys() * width);
  float* to = keys;
  const auto turn_key = [&](const float* from, int64_t slot) {
    turn(width / 2, from, near.cos + slot * near.cos_row, near.sin + slot * near.sin_row, 1.0f, to);
    to += width;
  };
  // Sink k is turned as if it were in slot i - W + k, where i is the query's.
  const int64_t window = near.slots - near.first;
  for (int64_t i = 0; i < near.num_sinks; i++)
    turn_key(near.sink_keys.at(batch, kv_head, i), near.slots - 1 - window + i);
  for (int64_t i = near.first; i < near.slots; i++) turn_key(near.keys.at(batch, kv_head, i), i);
  Query one(near, width, sizes.dim);
  for (int64_t j = 0; j < sizes.groups(); j++)
    one.run(batch, kv_head, keys, seen, first_key, query_of(j), scaling, far_of(j), output_of(j));
}

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
                  slots,
                  first,
                  sink_key ? sink_key->size(2) : 0,
                  cos.const_data_ptr<float>(),
                  sin.const_data_ptr<float>(),
                  cos.stride(0),
                  sin.stride(0)};
  const Tokens queries(query), far_values(far_value), far_logits(far_logit);
  const int64_t* rows = first_reals ? first_reals->const_data_ptr<int64_t>() : nullptr;
  at::Tensor output = at::empty({sizes.batch, sizes.heads, 1, sizes.dim}, query.options());
  float* outputs = output.mutable_data_ptr<float>();
  for_heads(sizes, near.num_keys() * (sizes.width + sizes.dim), [&](int64_t batch, int64_t kv_head) {
    const int64_t real = rows ? rows[batch] : first_real, head = kv_head * sizes.groups();
    const int64_t first_key = std::min(std::max(first, real), slots - 1);
    // The first tokens are seen as sinks once they have left the window.
    const int64_t seen = std::min(std::max<int64_t>(slots - window - real, 0), near.num_sinks);
    attend_near(
        near, sizes, batch, kv_head, first_key, seen, static_cast<float>(scaling),
        [&](int64_t j) { return queries.at(batch, head + j); },
        [&](int64_t j) {
          return far_logits ? Far{far_values.at(batch, head + j), *far_logits.at(batch, head + j)} : Far{};
        },
        [&](int64_t j) { return outputs + (batch * sizes.heads + head + j) * sizes.dim; });
  });
  return output;
}

// Far field.

// Writes one token into the memory of a head and reads it: matrix' = decay matrix + key written^T.
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

// What the delta rule writes: what the key recalls of the matrix (width, dim) is replaced, as far as the strength goes.
void replace(int64_t width, int64_t dim, float strength, float decay, const float* key, const float* value,
             const float* matrix, float* written) {
  std::fill(written, written + dim, 0.0f);
  for (int64_t i = 0; i < width; i++) add_scaled(dim, key[i], matrix + i * dim, written);
  for (int64_t i = 0; i < dim; i++) written[i] = strength * (value[i] - decay * written[i]);
}

// row / max(denominator, MIN_DENOMINATOR), in place; returns the divisor
inline float divide(int64_t dim, float denominator, float* row) {
  const float divisor = std::max(denominator, MIN_DENOMINATOR);
  for (int64_t i = 0; i < dim; i++) row[i] /= divisor;
  return divisor;
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
    const float *own_value = values.at(batch, kv_head), *own_matrix = old + index * width * dim;
    replace(width, dim, strength, decay, own_key, own_value, own_matrix, written);
    write_and_read(sizes, decay, own_key, written, mapped, own_matrix, to + index * width * dim,
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
    renew(width, decay, old_sums + index * width, 1.0f, own_key, own_sums);
    write_and_read(sizes, decay, own_key, values.at(batch, kv_head), mapped, old + index * width * dim,
                   to + index * width * dim, read);
    for (int64_t j = 0; j < groups; j++) {
      const float total = dot(width, mapped + j * width, own_sums);
      denominators[index * groups + j] = total;
      if (divides) divide(dim, total, read + j * dim);
    }
  });
  return {numerator, denominator, renewed, renewed_normalizer};
}

// A layer.

// Sum over the taps of a causal convolution, whose last one meets `newest`; past (channels, taps - 1) moves on by one
// token.
void convolve(int64_t channels, int64_t taps, const float* weight, const float* newest, const float* past,
              float* renewed_past, float* to) {
  for (int64_t c = 0; c < channels; c++, weight += taps, past += taps - 1, renewed_past += taps - 1) {
    float sum = weight[taps - 1] * newest[c];
    for (int64_t t = 0; t + 1 < taps; t++) {
      sum += weight[t] * past[t];
      renewed_past[t] = t + 2 < taps ? past[t + 1] : newest[c];
    }
    to[c] = sum;
  }
}

// row * weight / sqrt(mean(row^2) + eps), in place
void rms_norm(int64_t width, const float* weight, float eps, float* row) {
  const float factor = 1.0f / std::sqrt(dot(width, row, row) / static_cast<float>(width) + eps);
  for (int64_t i = 0; i < width; i++) row[i] *= factor * weight[i];
}

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

inline float log_sigmoid(float x) { return std::min(x, 0.0f) - std::log1p(std::exp(-std::abs(x))); }

// Rows 1 ... of `from`, then `newest`.
void append_row(int64_t rows, int64_t width, const float* from, const float* newest, float* to) {
  std::copy(from + width, from + rows * width, to);
  std::copy(newest, newest + width, to + (rows - 1) * width);
}

// The same of numbers; returns the one that leaves.
float push(int64_t count, const float* from, float newest, float* to) {
  append_row(count, 1, from, &newest, to);
  return from[0];
}

const float* data_of(const MaybeTensor& tensor) { return tensor ? tensor->const_data_ptr<float>() : nullptr; }

float* new_data_of(const MaybeTensor& tensor) { return tensor ? tensor->mutable_data_ptr<float>() : nullptr; }

MaybeTensor made_like(const MaybeTensor& tensor) {
  return tensor ? MaybeTensor(at::empty_like(*tensor)) : MaybeTensor();
}

// As backends.py numbers them.
enum FeatureMap : int64_t { SILU, ELU, RELU, DPFP, HEDGEHOG, TAYLOR, FAVOR };

// The features of rows (dim). weight: (heads, dim, width) of HEDGEHOG and, where it projects, of TAYLOR; directions
// (features, dim) of FAVOR.
struct FeatureRows {
  FeatureMap map;
  int64_t dim, features;
  bool unit_norm;
  const float* weight;
  int64_t width = 0;

  FeatureRows(FeatureMap map, int64_t dim, int64_t features, bool unit_norm, const MaybeTensor& weight)
      : map(map),
        dim(dim),
        features(features),
        unit_norm(unit_norm),
        weight(weight ? weight->const_data_ptr<float>() : nullptr),
        width(weight ? weight->size(-1) : dim) {
    TORCH_CHECK(weight || (map != HEDGEHOG && map != FAVOR), "the feature map needs weights");
    TORCH_CHECK(map == DPFP ? features % (2 * dim) == 0 : features == fitting(weight), features,
                " features do not fit the feature map");
  }

  // Writes the features of a row of this head; returns their log scale, as queries have it.
  float write(int64_t head, Stabiliser stabiliser, const float* from, float* to) const {
    const float* of_head = weight && map != FAVOR ? weight + head * dim * width : weight;
    float log_scale = 0.0f;
    switch (map) {
      case SILU: map_silu(dim, from, to); break;
      case ELU: map_elu(dim, from, to); break;
      case RELU: map_relu(dim, from, to); break;
      case DPFP: map_dpfp(dim, features, from, to); break;
      case HEDGEHOG: map_hedgehog(dim, width, of_head, from, to); break;
      case TAYLOR: map_taylor(dim, width, of_head, from, to); break;
      case FAVOR: log_scale = map_favor(dim, features, weight, stabiliser, from, to); break;
    }
    if (unit_norm) normalize(features, to);
    return log_scale;
  }

 private:
  int64_t fitting(const MaybeTensor& weight) const {
    switch (map) {
      case HEDGEHOG: return 2 * width;
      case TAYLOR: return 1 + width + width * (width + 1) / 2;
      case FAVOR: return weight->size(0);
      default: return dim;
    }
  }
};

// Everything between the projections of a layer and its output projection, of texts whose window (batch, kv_heads,
// window, dim), if there is one, is full of real tokens and has all sinks behind it. All tensors are whole. The rule is
// the additive one if there is a normalizer, and otherwise the delta rule, whose features have unit norm.
//
// query, key, value (batch, 1, channels each), before the convolution (channels, 1, taps), if there is one, whose past
// is conv_tail (batch, channels, taps - 1); write_logit, forget_logit (batch, 1, kv_heads): gates before their sigmoid;
// write_strength, log_forget (batch, kv_heads, window): those of the window; query_norm, key_norm (dim): weights, if
// there are any; matrix (batch, kv_heads, features, dim), normalizer (batch, kv_heads, features); far_norm (dim);
// query_weight, key_weight: see `FeatureRows`. With a window also far_query (heads, dim), far_bias (heads); cos, sin
// (window + 1, dim).
//
// Returns the output (batch, 1, heads * dim), then keys, values, write_strength, matrix, normalizer, log_forget and
// conv_tail with the new token.
std::tuple<at::Tensor, at::Tensor, at::Tensor, MaybeTensor, at::Tensor, MaybeTensor, MaybeTensor, MaybeTensor>
layer_step(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const MaybeTensor& write_logit,
           const MaybeTensor& forget_logit, const MaybeTensor& conv_weight, const MaybeTensor& conv_tail,
           const MaybeTensor& query_norm, const MaybeTensor& key_norm, const at::Tensor& keys, const at::Tensor& values,
           const MaybeTensor& write_strength, const MaybeTensor& log_forget, const at::Tensor& sink_keys,
           const at::Tensor& sink_values, const at::Tensor& matrix, const MaybeTensor& normalizer,
           const MaybeTensor& far_query, const MaybeTensor& far_bias, const MaybeTensor& far_norm,
           const MaybeTensor& query_weight, const MaybeTensor& key_weight, const MaybeTensor& cos,
           const MaybeTensor& sin, int64_t feature_map, double norm_eps, double scaling) {
  const int64_t batch_size = keys.size(0), kv_heads = keys.size(1), window = keys.size(2), dim = keys.size(3);
  const int64_t heads = query.size(2) / dim, features = matrix.size(2), taps = conv_weight ? conv_weight->size(2) : 1;
  const Sizes sizes(batch_size, heads, kv_heads, dim, dim), far_sizes(batch_size, heads, kv_heads, features, dim);
  const bool is_additive = normalizer.has_value();
  TORCH_CHECK(is_additive || (write_strength && far_norm), "the delta rule needs write strengths and a norm");
  TORCH_CHECK(write_strength.has_value() == write_logit.has_value(), "write strengths need a new one");
  TORCH_CHECK(log_forget.has_value() == forget_logit.has_value(), "gates need a new one");
  TORCH_CHECK(conv_tail.has_value() == conv_weight.has_value(), "a convolution needs a past");
  TORCH_CHECK(query_norm.has_value() == key_norm.has_value(), "queries and keys are normed together");
  TORCH_CHECK(window == 0 || (far_query && far_bias && cos && sin), "a window needs a far logit and positions");
  const FeatureMap map = static_cast<FeatureMap>(feature_map);
  const FeatureRows query_features(map, dim, features, !is_additive, query_weight);
  const FeatureRows key_features(map, dim, features, !is_additive, key_weight);
  const Stabiliser of_keys = is_additive ? Stabiliser::LENGTH : Stabiliser::LARGEST;
  const int64_t groups = sizes.groups(), channels = (heads + 2 * kv_heads) * dim;
  const float eps = static_cast<float>(norm_eps), scale = static_cast<float>(scaling);

  at::Tensor output = at::empty({batch_size, 1, heads * dim}, query.options());
  at::Tensor new_keys = at::empty_like(keys), new_values = at::empty_like(values);
  at::Tensor new_matrix = at::empty_like(matrix);
  const MaybeTensor new_strength = made_like(write_strength), new_normalizer = made_like(normalizer);
  const MaybeTensor new_forget = made_like(log_forget), new_tail = made_like(conv_tail);
  float *forget_to = new_data_of(new_forget), *tail_to = new_data_of(new_tail);
  float *strength_to = new_data_of(new_strength), *sums_to = new_data_of(new_normalizer);
  float *outputs = output.mutable_data_ptr<float>(), *keys_to = new_keys.mutable_data_ptr<float>();
  float *values_to = new_values.mutable_data_ptr<float>(), *matrix_to = new_matrix.mutable_data_ptr<float>();
  const float *key_from = keys.const_data_ptr<float>(), *value_from = values.const_data_ptr<float>();
  const float *strength_from = data_of(write_strength), *matrix_from = matrix.const_data_ptr<float>();
  const float* sums_from = data_of(normalizer);
  const float *forget_from = data_of(log_forget), *tail_from = data_of(conv_tail), *taps_of = data_of(conv_weight);
  const float *queries = query.const_data_ptr<float>(), *own_keys = key.const_data_ptr<float>();
  const float *own_values = value.const_data_ptr<float>(), *writes = data_of(write_logit);
  const float *forgets = data_of(forget_logit), *norm_of_queries = data_of(query_norm),
              *norm_of_keys = data_of(key_norm);
  const float *directions = data_of(far_query), *biases = data_of(far_bias), *norm_of_far = data_of(far_norm);
  // With the new token's, slots begin with the second one of `cos`.
  const int64_t angles = window ? cos->stride(0) : 0;
  const Near near{Tokens(new_keys),
                  Tokens(new_values),
                  Tokens(sink_keys),
                  Tokens(sink_values),
                  window,
                  0,
                  sink_keys.size(2),
                  window ? data_of(cos) + angles : nullptr,
                  window ? data_of(sin) + angles : nullptr,
                  angles,
                  angles};
  for_heads(sizes, (4 * window + 2 * features) * dim, [&](int64_t batch, int64_t kv_head) {
    const int64_t index = batch * kv_heads + kv_head, head = kv_head * groups, row = window * dim;
    Scratch own((groups + 2) * dim), mapped((groups + 1) * features), written(dim), log_scales(groups);
    Scratch far_scratch(window ? groups * dim : 0);
    float *own_key = own + groups * dim, *own_value = own_key + dim, *far_key = mapped + groups * features;
    float *own_output = outputs + (batch * heads + head) * dim, *far_values = window ? far_scratch : own_output;

    const auto take = [&](int64_t count, const float* from, int64_t channel, float* to) {
      if (!taps_of) return void(std::copy(from, from + count, to));
      const int64_t place = (batch * channels + channel) * (taps - 1);
      convolve(count, taps, taps_of + channel * taps, from, tail_from + place, tail_to + place, to);
    };
    take(groups * dim, queries + (batch * heads + head) * dim, head * dim, own);
    take(dim, own_keys + index * dim, (heads + kv_head) * dim, own_key);
    take(dim, own_values + index * dim, (heads + kv_heads + kv_head) * dim, own_value);
    if (norm_of_queries) {
      for (int64_t j = 0; j < groups; j++) rms_norm(dim, norm_of_queries, eps, own + j * dim);
      rms_norm(dim, norm_of_keys, eps, own_key);
    }
    float strength = writes ? sigmoid(writes[index]) : 0.0f, log_decay = forgets ? log_sigmoid(forgets[index]) : 0.0f;
    const float *leaving_key = own_key, *leaving_value = own_value;
    if (window) {
      leaving_key = key_from + index * row;
      leaving_value = value_from + index * row;
      append_row(window, dim, leaving_key, own_key, keys_to + index * row);
      append_row(window, dim, leaving_value, own_value, values_to + index * row);
      if (strength_from)
        strength = push(window, strength_from + index * window, strength, strength_to + index * window);
      if (forget_from) log_decay = push(window, forget_from + index * window, log_decay, forget_to + index * window);
    }

    // What leaves the window, or without one the new token, enters the memory.
    const float* old_matrix = matrix_from + index * features * dim;
    const float decay = decay_of_log(log_decay);
    key_features.write(kv_head, of_keys, leaving_key, far_key);
    for (int64_t j = 0; j < groups; j++)
      log_scales[j] = query_features.write(head + j, Stabiliser::LARGEST, own + j * dim, mapped + j * features);
    float* own_sums = is_additive ? sums_to + index * features : nullptr;
    if (is_additive)
      renew(features, decay, sums_from + index * features, 1.0f, far_key, own_sums);
    else
      replace(features, dim, strength, decay, far_key, leaving_value, old_matrix, written);
    write_and_read(far_sizes, decay, far_key, is_additive ? leaving_value : written, mapped, old_matrix,
                   matrix_to + index * features * dim, far_values);
    const auto far_of = [&](int64_t j) {
      float* far_value = far_values + j * dim;
      if (!is_additive) {
        rms_norm(dim, norm_of_far, eps, far_value);
        return Far{far_value, 0.0f};
      }
      const float divisor = divide(dim, dot(features, mapped + j * features, own_sums), far_value);
      return Far{far_value, std::log(divisor) + log_scales[j]};
    };
    if (!window) {
      for (int64_t j = 0; j < groups; j++) far_of(j);
      return;
    }
    attend_near(
        near, sizes, batch, kv_head, 0, near.num_sinks, scale, [&](int64_t j) { return own + j * dim; },
        [&](int64_t j) {
          Far far = far_of(j);
          far.logit += dot(dim, directions + (head + j) * dim, own + j * dim) + biases[head + j];
          return far;
        },
        [&](int64_t j) { return own_output + j * dim; });
  });
  return {output, new_keys, new_values, new_strength, new_matrix, new_normalizer, new_forget, new_tail};
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
  m.def(
      "layer_step(Tensor query, Tensor key, Tensor value, Tensor? write_logit, Tensor? forget_logit, Tensor? "
      "conv_weight, Tensor? conv_tail, Tensor? query_norm, Tensor? key_norm, Tensor keys, Tensor values, Tensor? "
      "write_strength, Tensor? log_forget, Tensor sink_keys, Tensor sink_values, Tensor matrix, Tensor? normalizer, "
      "Tensor? far_query, Tensor? far_bias, Tensor? far_norm, Tensor? query_weight, Tensor? key_weight, "
      "Tensor? cos, Tensor? sin, int feature_map, float norm_eps, float scaling) -> (Tensor, Tensor, Tensor, Tensor?, "
      "Tensor, Tensor?, Tensor?, Tensor?)");
}

TORCH_LIBRARY_IMPL(kermit_hf, CPU, m) {
  m.impl("window_step", window_step);
  m.impl("delta_step", delta_step);
  m.impl("additive_step", additive_step);
  m.impl("layer_step", layer_step);
}
