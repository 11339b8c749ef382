"""How many multiplications each algorithm needs, as a function of length: the numerator of "% of peak".

Matrix products only (and Nyström's convolution), each multiplication with its addition; for one head unless `heads` is
among the arguments, forward. Of a causal product only the pairs count that causality leaves, although
implementations multiply whole blocks: what they waste is their loss. The backward pass of a product is two of its size,
so a training step needs three times the forward pass; what an implementation computes twice does not count.
"""

from torch import nn


TRAINING = 3


def causal_pairs(length: int, window: int | None = None) -> int:
    """Pairs of a query and a key not behind it, and at most `window` - 1 before it."""
    window = length if window is None else min(window, length)
    return window * (window + 1) // 2 + (length - window) * window


def softmax_causal(length: int, head_dim: int) -> int:
    return 2 * head_dim * causal_pairs(length)


def softmax_bidirectional(length: int, head_dim: int) -> int:
    return 2 * head_dim * length**2


def window(length: int, head_dim: int, window_size: int, sinks: int) -> int:
    """KERMIT's near field: a window and the sink tokens behind it."""
    return 2 * head_dim * (causal_pairs(length, window_size) + max(length - window_size, 0) * sinks)


def additive(length: int, feature_dim: int, head_dim: int, chunk_size: int) -> int:
    """Additive rule in chunks: scores and values inside a chunk, one write to the memory and one reading from it."""
    chunks, rest = divmod(length, chunk_size)
    pairs = chunks * causal_pairs(chunk_size) + causal_pairs(rest)
    return pairs * (feature_dim + head_dim) + 2 * length * feature_dim * head_dim


def delta(length: int, feature_dim: int, head_dim: int, chunk_size: int) -> int:
    """Delta rule in chunks, WY form: scores of queries and of keys, the inverse of a triangular system, its products with
    values and keys, and the values inside a chunk; what the memory recalls, takes up and gives."""
    chunks, rest = divmod(length, chunk_size)
    pairs = chunks * causal_pairs(chunk_size) + causal_pairs(rest)
    inverse = (chunks * chunk_size**3 + rest**3) // 6
    return pairs * (3 * feature_dim + 2 * head_dim) + inverse + 3 * length * feature_dim * head_dim


def random_features(length: int, feature_dim: int, head_dim: int) -> int:
    """FAVOR+'s projection of queries and keys."""
    return 2 * length * feature_dim * head_dim


def nystrom(length: int, head_dim: int, landmarks: int, iterations: int = 6, taps: int = 0) -> int:
    """Encoder: F and B with their values, L, its iterated inverse, Z (B V), and a convolution of the values."""
    if length <= landmarks:
        return softmax_bidirectional(length, head_dim) + length * head_dim * taps
    inverse = 4 * iterations * landmarks**3
    return 4 * length * landmarks * head_dim + 2 * landmarks**2 * head_dim + inverse + length * head_dim * taps


def causal_nystrom(
    length: int, head_dim: int, segment_size: int, near_segments: int, sinks: int, regularized: bool = False
) -> int:
    """Decoder: exact scores and values of near field and sinks, of older landmarks, and the pooling that makes a landmark;
    where `regularized`, also the softmax of each landmark over all keys before it, L and its triangular solve."""
    behind = max(length - sinks, 0)
    segments, rest = divmod(behind, segment_size)
    sink_pairs = causal_pairs(min(sinks, length)) + behind * sinks
    # Query i of segment s: the whole segments before it, near ones token by token and older ones as a landmark each.
    sizes = [segment_size] * segments + [rest]
    near = sum(size * min(s, near_segments) * segment_size + causal_pairs(size) for s, size in enumerate(sizes))
    far = sum(size * max(s - near_segments, 0) for s, size in enumerate(sizes))
    pairs = sink_pairs + near + far + segments * segment_size
    if regularized:
        # Scores and values of B; of L and its solve likewise one product each, of segments x segments.
        pairs += causal_pairs(segments) * segment_size + causal_pairs(segments)
    return 2 * head_dim * pairs


def linear_layers(model: nn.Module, length: int, without: tuple[str, ...] = ()) -> int:
    """All linear layers of a model on `length` tokens, less those whose name ends in one of `without`."""
    return length * sum(
        layer.weight.numel()
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not name.endswith(without or "\0")
    )
