// Tensors that the CPU kernels make: states and gradients, laid out so that nobody has to copy them.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <optional>
#include <vector>

#include "vector_tiles.h"

namespace tensors {

inline at::Tensor in_huge_pages(at::Tensor tensor) {
  tiles::ask_for_huge_pages(tensor.data_ptr(), tensor.nbytes());
  return tensor;
}

// (batch, heads, seq, dim), which lies in memory as (batch, seq, heads, dim).
inline at::Tensor empty_states(int64_t batch, int64_t heads, int64_t length, int64_t dim, const at::Tensor& like) {
  return in_huge_pages(at::empty({batch, length, heads, dim}, like.options())).transpose(1, 2);
}

// As `like` lies in memory. The last axis of states (batch, heads, seq, dim) is contiguous, also where another one's
// stride is one, too, and a tensor of its own may order the two either way.
inline at::Tensor empty_gradient(const at::Tensor& like) {
  at::Tensor gradient = at::empty_like(like);
  if (like.dim() == 4 && gradient.stride(3) != 1) gradient = at::empty(like.sizes(), like.options());
  return in_huge_pages(gradient);
}

inline std::optional<at::Tensor> empty_gradient(const std::optional<at::Tensor>& like) {
  return like ? std::optional(empty_gradient(*like)) : std::nullopt;
}

using Tensors = std::vector<at::Tensor>;

inline Tensors empty_gradients(const Tensors& states) {
  Tensors gradients;
  for (const at::Tensor& each : states) gradients.push_back(empty_gradient(each));
  return gradients;
}

// Sums of gradients so far of these states, or none at all. A kernel that adds to them takes each entry for one of its
// own.
inline void check_sums(const Tensors& sums, const Tensors& states) {
  if (sums.empty()) return;
  TORCH_CHECK(sums.size() == states.size(), "there have to be sums for all states or for none");
  for (size_t i = 0; i < sums.size(); i++) {
    TORCH_CHECK(sums[i].sizes() == states[i].sizes() && sums[i].scalar_type() == at::kFloat &&
                    (sums[i].stride(3) == 1 || sums[i].size(3) == 1 || sums[i].numel() == 0),
                "a sum of gradients must have the shape of its states, be float32 and have contiguous rows");
    for (int64_t axis = 0; axis < sums[i].dim(); axis++)
      TORCH_CHECK(sums[i].stride(axis) != 0 || sums[i].size(axis) <= 1, "a sum of gradients must not be expanded");
  }
}

}  // namespace tensors
