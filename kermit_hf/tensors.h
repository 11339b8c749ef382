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

// New gradients of states, or none where there are sums of their gradients so far, to which these are added.
inline Tensors empty_gradients(const Tensors& states, const Tensors& sums) {
  Tensors gradients;
  for (size_t i = 0; i < states.size(); i++) {
    if (sums.empty()) {
      gradients.push_back(empty_gradient(states[i]));
    } else {
      const at::Tensor& sum = sums.at(i);
      TORCH_CHECK(sum.sizes() == states[i].sizes() && sum.scalar_type() == at::kFloat &&
                      (sum.stride(3) == 1 || sum.size(3) == 1),
                  "a sum of gradients must have the shape of its states, be float32 and have contiguous rows");
    }
  }
  return gradients;
}

}  // namespace tensors
