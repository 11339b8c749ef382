"""Slow, obvious float64 twins of the encoder's attention, written from the paper and sharing no code with the package.

One text at a time, no batch, no padding, no torch. Arrays are (heads, seq, head_dim).
"""

import numpy as np


def softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def segments(seq_len: int, num_landmarks: int) -> list[list[int]]:
    """Tokens of each segment: consecutive, sizes differing by at most one."""
    members = [[] for _ in range(num_landmarks)]
    for token in range(seq_len):
        members[token * num_landmarks // seq_len].append(token)
    return members


def inverse(matrices: list[np.ndarray], iterations: int, init: str) -> list[np.ndarray]:
    """The paper's iteration for the matrices of all heads of one text."""
    column_sums = [matrix.sum(axis=0).max() for matrix in matrices]
    result = []
    for matrix, column_sum in zip(matrices, column_sums, strict=True):
        eye = np.eye(len(matrix))
        z = matrix.T / (max(column_sums) if init == "original" else column_sum)
        for _ in range(iterations):
            az = matrix @ z
            z = z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az))) / 4
        result.append(z)
    return result


def attention_matrix(
    query: np.ndarray, key: np.ndarray, num_landmarks: int, iterations: int = 6, init: str = "original"
) -> np.ndarray:
    """(heads, seq, seq): softmax attention where the text is no longer than the landmarks, F Z B otherwise."""
    heads, seq_len, head_dim = query.shape
    scale = 1 / np.sqrt(head_dim)
    if seq_len <= num_landmarks:
        return np.stack([softmax(scale * query[h] @ key[h].T) for h in range(heads)])
    members = segments(seq_len, num_landmarks)
    query_landmarks = [np.stack([query[h][tokens].mean(axis=0) for tokens in members]) for h in range(heads)]
    key_landmarks = [np.stack([key[h][tokens].mean(axis=0) for tokens in members]) for h in range(heads)]
    middle = [softmax(scale * query_landmarks[h] @ key_landmarks[h].T) for h in range(heads)]
    z = inverse(middle, iterations, init)
    return np.stack(
        [
            softmax(scale * query[h] @ key_landmarks[h].T) @ z[h] @ softmax(scale * query_landmarks[h] @ key[h].T)
            for h in range(heads)
        ]
    )


def convolution(value: np.ndarray, kernels: np.ndarray) -> np.ndarray:
    """Kernels (heads, size); the tap ⌊size/2⌋ lies on the token itself, beyond the text there are zeros."""
    heads, seq_len, _ = value.shape
    size = kernels.shape[1]
    output = np.zeros_like(value)
    for h in range(heads):
        for t in range(seq_len):
            for j in range(size):
                if 0 <= t + j - size // 2 < seq_len:
                    output[h, t] += kernels[h, j] * value[h, t + j - size // 2]
    return output
