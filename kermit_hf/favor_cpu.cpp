// The feature map "favor": projection, stabiliser and exponential while a few rows of features are in the caches.
// Formulas: `FavorFeatureMap`.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "feature_rows.h"
#include "tasks.h"
#include "tensors.h"
#include "vector_tiles.h"

namespace {

using namespace rows;
using namespace tasks;
using namespace tensors;
using namespace tiles;
using at::Tensor;

constexpr int64_t ROWS = 2 * TILE_ROWS;  // tokens that are mapped at once
constexpr int64_t BLOCK = 8 * ROWS;      // tokens that a thread takes at a time
constexpr int64_t UNIT = 16;  // matrices come with rows of whole vectors of any size: see LANES in favor_cpu.py

// Sizes of states (batch, heads, seq, dims), whose last axis is contiguous, and of their features.
struct Sizes {
  int64_t batch, heads, length, dims, features, width;

  Sizes(const Tensor& states, int64_t num_features)
      : batch(states.size(0)),
        heads(states.size(1)),
        length(states.size(2)),
        dims(states.size(3)),
        features(num_features),
        width(round_up(num_features, UNIT)) {
    // The strides of an empty tensor, or of an axis of one entry, say nothing.
    TORCH_CHECK(states.stride(3) == 1 || states.size(3) == 1 || states.numel() == 0, "rows have to be contiguous");
  }

  // Calls visit(b, h, first, rows) for a few rows at a time, in parallel over blocks; `make` makes what a thread needs.
  template <class Make>
  void for_tiles(Make make) const {
    const int64_t blocks = (length + BLOCK - 1) / BLOCK;
    in_parallel(batch * heads * blocks, [&](Tasks tasks) {
      auto visit = make();
      for (int64_t i; tasks.next(i);) {
        const int64_t row = i / blocks, first = i % blocks * BLOCK, last = std::min(first + BLOCK, length);
        for (int64_t token = first; token < last; token += ROWS)
          visit(row / heads, row % heads, token, std::min(ROWS, last - token));
      }
    });
  }
};

float* row_of(const Tensor& tensor, int64_t b, int64_t h, int64_t token) {
  return tensor.data_ptr<float>() + b * tensor.stride(0) + h * tensor.stride(1) + token * tensor.stride(2);
}

// The largest of `count` numbers, in rows of whole vectors whose rest may be anything: it becomes the first number.
float largest_in(int64_t count, int64_t width, float* numbers) {
  std::fill(numbers + count, numbers + width, numbers[0]);
  Vector largest = load(numbers);
  for (int64_t j = LANES; j < width; j += LANES) largest = larger(largest, load(numbers + j));
  return largest_of(largest);
}

// projection (dims, width): the directions times head_dim^(-1/4), transposed, zeros beyond the features. Returns
// features and, of queries, their log scale; of keys, an empty tensor.
std::tuple<Tensor, Tensor> favor_forward(const Tensor& states, const Tensor& projection, int64_t features,
                                         bool are_queries) {
  const Sizes sizes(states, features);
  TORCH_CHECK(projection.is_contiguous() && projection.size(1) == sizes.width,
              "projection has to be padded and contiguous");
  const Tensor mapped = at::empty({sizes.batch, sizes.heads, sizes.length, features}, states.options());
  const Tensor log_scale = at::empty({sizes.batch, sizes.heads, are_queries ? sizes.length : 0}, states.options());
  const float* weights = projection.data_ptr<float>();
  const float half_scale = 0.5f / std::sqrt(static_cast<float>(sizes.dims)),
              log_count = std::log(static_cast<float>(features));
  sizes.for_tiles([&] {
    return [&, exponents = Scratch(ROWS * sizes.width)](int64_t b, int64_t h, int64_t first, int64_t rows) {
      product(rows, sizes.dims, sizes.width, row_of(states, b, h, first), states.stride(2), 1, weights, sizes.width,
              exponents, sizes.width);
      for (int64_t i = 0; i < rows; i++) {
        float* row = exponents + i * sizes.width;
        const float* state = row_of(states, b, h, first + i);
        float shift = half_scale * dot(sizes.dims, state, state);
        if (are_queries) {
          const float largest = largest_in(features, sizes.width, row);
          *row_of(log_scale, b, h, first + i) = largest - shift - log_count;
          shift = largest;
        }
        random_features(features, row, shift, row_of(mapped, b, h, first + i));
      }
    };
  });
  return {mapped, log_scale};
}

// Gradients of the exponents of one token, from those of its features. Returns their sum over the exponents.
float exponent_gradients(int64_t count, const float* features, const float* grads, float* to) {
  static const float largest = 0.9999f * std::exp(MAX_EXPONENT);  // beyond it the exponent is clamped
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; j++) {
    to[j] = features[j] < largest ? features[j] * grads[j] : 0.0f;
    sum += to[j];
  }
  return sum;
}

// The largest exponent, whose feature is one, gets `grad`; several equal ones share it.
void add_to_largest(int64_t count, const float* features, float grad, float* to) {
  float number = 0.0f;
#pragma omp simd reduction(+ : number)
  for (int64_t j = 0; j < count; j++) number += features[j] == 1.0f ? 1.0f : 0.0f;
  const float share = grad / number;
#pragma omp simd
  for (int64_t j = 0; j < count; j++) to[j] += features[j] == 1.0f ? share : 0.0f;
}

// directions (features, width of dims): times head_dim^(-1/4), zeros beyond dims. grad_log_scale: of queries. Returns
// the gradient of states.
Tensor favor_backward(const Tensor& states, const Tensor& directions, const Tensor& features,
                      const Tensor& grad_features, const Tensor& grad_log_scale, bool are_queries) {
  const Sizes sizes(states, features.size(3));
  for (const Tensor* rows : {&features, &grad_features})
    TORCH_CHECK(rows->stride(3) == 1 || rows->size(3) == 1 || rows->numel() == 0, "rows have to be contiguous");
  const int64_t width = round_up(sizes.dims, UNIT);
  TORCH_CHECK(directions.is_contiguous() && directions.size(1) == width, "directions have to be padded and contiguous");
  const Tensor grad_states = empty_states(sizes.batch, sizes.heads, sizes.length, sizes.dims, states);
  const float scale = 1.0f / std::sqrt(static_cast<float>(sizes.dims));
  sizes.for_tiles([&] {
    return [&, exponents = Scratch(ROWS * sizes.features), sums = Scratch(ROWS * width)](int64_t b, int64_t h,
                                                                                         int64_t first, int64_t rows) {
      float norm_grads[ROWS];
      for (int64_t i = 0; i < rows; i++) {
        const float *feature = row_of(features, b, h, first + i), *grad = row_of(grad_features, b, h, first + i);
        float* row = exponents + i * sizes.features;
        norm_grads[i] = exponent_gradients(sizes.features, feature, grad, row);
        if (!are_queries) continue;
        const float grad_scale = *row_of(grad_log_scale, b, h, first + i);
        add_to_largest(sizes.features, feature, grad_scale - norm_grads[i], row);
        norm_grads[i] = grad_scale;
      }
      product(rows, sizes.features, width, exponents, sizes.features, 1, directions.data_ptr<float>(), width, sums,
              width);
      for (int64_t i = 0; i < rows; i++) {
        const float *state = row_of(states, b, h, first + i), *sum = sums + i * width, factor = scale * norm_grads[i];
        float* to = row_of(grad_states, b, h, first + i);
        for (int64_t j = 0; j < sizes.dims; j++) to[j] = sum[j] - factor * state[j];
      }
    };
  });
  return grad_states;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(kermit_hf, m) {
  m.def("favor_forward", &favor_forward);
  m.def("favor_backward", &favor_backward);
}
