"""Operands that tests of instructions give them, and their values in Python."""

import numpy as np

_RANDOM = np.random.default_rng(7)

WORDS = np.concatenate(
    [
        np.array([0, 1, 2, 31, 32, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x80000001], np.uint32),
        _RANDOM.integers(0, 2**32, 55, dtype=np.uint64).astype(np.uint32),
    ]
)
OTHERS = _RANDOM.permutation(WORDS)
FLOATS = np.concatenate(
    [
        np.array([0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 1e-40, 3e38], np.float32),
        np.array([np.inf, -np.inf, np.nan], np.float32),
        _RANDOM.standard_normal(51).astype(np.float32) * 100,
    ]
)


def signed(x):
    return [int(v) for v in np.asarray(x).view(np.int32)]


def unsigned(x):
    return [int(v) for v in x]


def words(values):
    return np.array([v & 0xFFFFFFFF for v in values], np.uint32)


def core_matrices(x):
    """Rows x 16 of bf16 as 8x8 core matrices, the two along K next to each other."""
    rows = x.shape[0]
    return np.ascontiguousarray(x.reshape(rows // 8, 8, 2, 8).swapaxes(1, 2)).reshape(-1)
