// Single rows: their sums and products, and the feature maps of feature_maps.py, of which each has its formulas there.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "vector_tiles.h"

namespace rows {

using namespace tiles;

constexpr float MIN_NORM = 1e-12f, MAX_EXPONENT = 60.0f;

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

inline void scale(int64_t width, float factor, float* row) {
  for (int64_t i = 0; i < width; i++) row[i] *= factor;
}

// row / max(|row|, MIN_NORM), in place
inline void normalize(int64_t width, float* row) {
  scale(width, 1.0f / std::max(std::sqrt(dot(width, row, row)), MIN_NORM), row);
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

// exp(x - shift) of exponents in whole vectors, of which `count` are stored: zero below e^-60, and at most e^60.
inline void random_features(int64_t count, const float* exponents, float shift, float* to) {
  const auto feature = [=](Vector exponent) {
    const Vector shifted = exponent - shift, limit = fill(MAX_EXPONENT);
    return shifted < -MAX_EXPONENT ? Vector{} : exponential(limit < shifted ? limit : shifted);
  };
  const int64_t whole = count / LANES * LANES;
  for (int64_t j = 0; j < whole; j += LANES) store(to + j, feature(load(exponents + j)));
  if (whole == count) return;
  float rest[LANES];
  store(rest, feature(load(exponents + whole)));
  std::copy_n(rest, count - whole, to + whole);
}

inline void map_silu(int64_t width, const float* from, float* to) {
  for (int64_t i = 0; i < width; i++) to[i] = from[i] / (1.0f + std::exp(-from[i]));
}

inline void map_silu_l2(int64_t width, const float* from, float* to) {
  map_silu(width, from, to);
  normalize(width, to);
}

inline void map_elu(int64_t width, const float* from, float* to) {
  for (int64_t i = 0; i < width; i++)
    to[i] = std::exp(std::min(std::max(from[i], -40.0f), 0.0f)) + std::max(from[i], 0.0f);
}

inline void map_relu(int64_t width, const float* from, float* to) {
  for (int64_t i = 0; i < width; i++) to[i] = std::max(from[i], 0.0f) + 1e-3f;
}

inline void map_dpfp(int64_t dim, int64_t features, const float* from, float* to) {
  const int64_t width = 2 * dim;
  Scratch signs(width);
  for (int64_t i = 0; i < dim; i++) {
    signs[i] = std::max(from[i], 0.0f);
    signs[dim + i] = std::max(-from[i], 0.0f);
  }
  for (int64_t shift = 1; shift * width <= features; shift++, to += width)
    for (int64_t i = 0; i < width; i++) to[i] = signs[i] * signs[(i + shift * (width - 1)) % width] + 1e-6f;
}

// row (dim) times weight (dim, width)
inline void project(int64_t dim, int64_t width, const float* weight, const float* row, float* to) {
  std::fill(to, to + width, 0.0f);
  for (int64_t i = 0; i < dim; i++) add_scaled(width, row[i], weight + i * width, to);
}

// Softmax of a row (width), by a scratch of whole vectors.
inline void softmax(int64_t width, const float* from, float* scratch, float* to) {
  const int64_t padded = round_up(width);
  const float largest = *std::max_element(from, from + width);
  std::copy(from, from + width, scratch);
  std::fill(scratch + width, scratch + padded, -std::numeric_limits<float>::infinity());
  const float share = 1.0f / exponentials(padded, largest, scratch);
  for (int64_t i = 0; i < width; i++) to[i] = share * scratch[i];
}

inline void map_hedgehog(int64_t dim, int64_t width, const float* weight, const float* from, float* to) {
  Scratch projected(width), scratch(round_up(width));
  project(dim, width, weight, from, projected);
  softmax(width, projected, scratch, to);
  scale(width, -1.0f, projected);
  softmax(width, projected, scratch, to + width);
}

// Of `rank` coordinates; without a weight these are the row.
inline void map_taylor(int64_t dim, int64_t rank, const float* weight, const float* from, float* to) {
  *to++ = 1.0f;
  if (weight)
    project(dim, rank, weight, from, to);
  else
    std::copy(from, from + rank, to);
  scale(rank, 1.0f / std::sqrt(std::sqrt(static_cast<float>(rank))), to);
  const float* coordinates = to;
  to += rank;
  for (int64_t i = 0; i < rank; i++) {
    *to++ = coordinates[i] * coordinates[i] * std::sqrt(0.5f);
    for (int64_t j = i + 1; j < rank; j++) *to++ = coordinates[i] * coordinates[j];
  }
}

// What the features are divided by beforehand, so that their exponents stay small.
enum class Stabiliser { LARGEST, LENGTH };

// Of directions (features, dim). Returns the features' log scale, as queries have it.
inline float map_favor(int64_t dim, int64_t features, const float* directions, Stabiliser stabiliser, const float* from,
                       float* to) {
  const float root = 1.0f / std::sqrt(static_cast<float>(dim));
  const float half_square = 0.5f * root * dot(dim, from, from);
  Scratch exponents(round_up(features));
  for (int64_t i = 0; i < features; i++) exponents[i] = std::sqrt(root) * dot(dim, directions + i * dim, from);
  const float largest = *std::max_element(exponents + 0, exponents + features);
  std::fill(exponents + features, exponents + round_up(features), largest);
  random_features(features, exponents, stabiliser == Stabiliser::LARGEST ? largest : half_square, to);
  return largest - half_square - std::log(static_cast<float>(features));
}

}  // namespace rows
