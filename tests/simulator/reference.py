"""Dense attention in float64, forward and backward."""

import numpy as np


def _weights(q, k, scale, window):
    """(weights, log-sum-exp) of (B, heads, T, S) scores; rows that see nothing give 0 and -inf."""
    group = q.shape[2] // k.shape[2]
    scores = np.einsum("bqhd,bkhd->bhqk", q, np.repeat(k, group, 2)) * scale
    position, key = np.arange(q.shape[1])[:, None], np.arange(k.shape[1])[None]
    visible = np.ones((q.shape[1], k.shape[1]), bool)
    if window[0] is not None:
        visible &= key >= position - window[0]
    if window[1] is not None:
        visible &= key <= position + window[1]
    scores = np.where(visible, scores, -np.inf)
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(largest), largest, 0))
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (largest + np.log(total))[..., 0].transpose(0, 2, 1)
    return weights / np.where(total == 0, 1, total), lse


def attention(q, k, v, scale, window=(None, None)):
    """(out, lse) of (B, T, N, H), (B, S, K, H), (B, S, K, H)."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    weights, lse = _weights(q, k, scale, window)
    group = q.shape[2] // k.shape[2]
    return np.einsum("bhqk,bkhd->bqhd", weights, np.repeat(v, group, 2)), lse


def gradients(q, k, v, out_gradient, scale, window=(None, None)):
    """(dq, dk, dv) for the gradient of the output."""
    q, k, v, do = (x.astype(np.float64) for x in (q, k, v, out_gradient))
    batch, keys, kv_heads, head_dim = k.shape
    group = q.shape[2] // kv_heads
    weights, _ = _weights(q, k, scale, window)
    out = np.einsum("bhqk,bkhd->bqhd", weights, np.repeat(v, group, 2))
    products = np.einsum("bqhd,bkhd->bhqk", do, np.repeat(v, group, 2))
    row_sums = (do * out).sum(-1).transpose(0, 2, 1)[..., None]
    ds = weights * (products - row_sums) * scale
    by_head = (batch, keys, kv_heads, group, head_dim)
    return (
        np.einsum("bhqk,bkhd->bqhd", ds, np.repeat(k, group, 2)),
        np.einsum("bhqk,bqhd->bkhd", ds, q).reshape(by_head).sum(3),
        np.einsum("bhqk,bqhd->bkhd", weights, do).reshape(by_head).sum(3),
    )
