"""Masks and scores as users write them: functions of a case that make ``mask_mod``, ``score_mod``.

They close over numbers and over arrays of the case's sizes, and index some of these out of bounds.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashcute import masks
from tests.arrays import random
from tests.cases import Case


@jax.custom_jvp
def without_rule(x):
    """``x``, whose derivative no kernel computes."""
    return x


@without_rule.defjvp
def _(primals, tangents):
    return primals[0], jax.lax.lgamma(primals[0]) * tangents[0]


def _integers(seed: int, high: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, shape), jnp.int32)


def alibi(case: Case):
    slopes = 2.0 ** (-8 * (jnp.arange(case.q_heads) + 1.0) / case.q_heads)
    return lambda score, b, h, q, kv: score + slopes[h] * (kv - q)


def alibi_of_numbers(case: Case):
    def score_mod(score, b, h, q, kv):
        return score + jnp.exp2(-(h + 1.0) * 8 / case.q_heads) * (kv - q).astype(jnp.float32)

    return score_mod


def soft_cap(case: Case):
    return lambda score, b, h, q, kv: 2.0 * jnp.tanh(score / 2.0)


def soft_cap_and_bias(case: Case):
    bias = random(0, case.q_heads)
    return lambda score, b, h, q, kv: 3 * jnp.tanh(score / 3) + bias[h]


def relative_bias(case: Case):
    table = random(1, case.q_heads, 65)
    return lambda score, b, h, q, kv: score + table[h, jnp.clip(kv - q, -32, 32) + 32]


def t5_buckets(case: Case):
    table = random(2, 32, case.q_heads)

    def score_mod(score, b, h, q, kv):
        distance = jnp.maximum(q - kv, 0)
        log = jnp.log(jnp.maximum(distance, 1) / 16) / math.log(128 / 16)
        far = jnp.minimum(16 + (log * 16).astype(jnp.int32), 31)
        return score + table[jnp.where(distance < 16, distance, far), h]

    return score_mod


def key_bias(case: Case):
    bias = random(3, case.batch, case.seqlen_k, dtype=jnp.bfloat16)
    return lambda score, b, h, q, kv: score + bias[b, kv]


def query_temperature(case: Case):
    temperature = jnp.exp(random(4, case.seqlen_q + case.seqlen_k) / 4)
    return lambda score, b, h, q, kv: score * temperature[jnp.maximum(q, 0)]


def two_dimensional_bias(case: Case):
    bias = random(5, case.seqlen_q, case.seqlen_k)
    return lambda score, b, h, q, kv: score + bias[q, kv]


def bias_with_fill(case: Case):
    bias = random(6, 20)
    return lambda score, b, h, q, kv: score + bias.at[kv].get(mode="fill", fill_value=-1.0)


def squared(case: Case):
    return lambda score, b, h, q, kv: score * score * 0.25


def gated(case: Case):
    return jax.checkpoint(
        lambda score, b, h, q, kv: score * jax.nn.sigmoid(score) + jax.nn.relu(score)
    )


def hidden_by_score(case: Case):
    """By infinity, and by large numbers, as which the first tiles and some rows are hidden."""
    least = jnp.finfo(jnp.float32).min

    def score_mod(score, b, h, q, kv):
        large = jnp.where(q % 3 == 0, -1e9, jnp.where(q % 3 == 1, -1e10, least))
        score = jnp.where((kv > q + 5) | (q % 7 == 3), large, score)
        return jnp.where((q + kv) % 3 == 0, score, -jnp.inf)

    return score_mod


def distance_decay(case: Case):
    def score_mod(score, b, h, q, kv):
        distance = jnp.abs(q - kv)
        decayed = score * 0.9**distance + jax.lax.stop_gradient(jnp.tanh(score))
        return jnp.where(h % 2, score - 0.1 * jnp.sqrt(distance.astype(jnp.float32)), decayed)

    return score_mod


def half_precision(case: Case):
    bias = random(7, case.q_heads, dtype=jnp.bfloat16)
    return lambda score, b, h, q, kv: (score.astype(jnp.bfloat16) + bias[h]) * 2


def by_distance(case: Case):
    """One of several functions, as ``lax.switch`` and ``lax.cond`` choose it, with its array."""
    near, far = random(15, case.q_heads, 21), random(16, case.batch, case.seqlen_k)

    def score_mod(score, b, h, q, kv):
        distance = jnp.abs(q - kv)
        choices = [
            lambda x: x + near[h, jnp.minimum(distance, 20)],
            lambda x: jax.lax.cond(h % 2 == 0, jnp.arctan, lambda x: x / 2, x),
            lambda x: x * far[b, kv],
        ]
        return jax.lax.switch(distance // 16, choices, score)

    return score_mod


def by_score(case: Case):
    """Pieces of the score, and the largest of some numbers."""
    slopes = random(17, case.q_heads)

    def score_mod(score, b, h, q, kv):
        pieces = [lambda x: -0.5 - x, lambda x: x / 2, jax.lax.erfc]
        bent = jnp.piecewise(score, [score < -0.5, (score < 0.5) & (kv % 3 > 0)], pieces)
        largest = jnp.max(jnp.stack([bent, slopes[h] * score]))
        return jnp.select([kv % 5 == 0, q % 7 == 0], [score / 4, score], largest)

    return score_mod


def decays(case: Case):
    """What a head makes of the distance's decays at a few rates."""
    weights, rates = random(19, case.q_heads, 4), jnp.exp(random(20, 4)) / 30
    return lambda score, b, h, q, kv: score + weights[h] @ jnp.exp(-rates * jnp.abs(q - kv))


def low_rank(case: Case):
    """A bias that is a product of matrices, with rows beyond the end; and a mean."""
    left = random(21, case.batch, case.seqlen_q, 4)
    right = random(22, case.seqlen_k, 4)

    def score_mod(score, b, h, q, kv):
        row = right.at[kv + h].get(mode="fill", fill_value=0.25)
        return score * jnp.mean(row) + left[b, q] @ row

    return score_mod


SCORES = {
    f.__name__: f
    for f in (
        *(alibi, alibi_of_numbers, soft_cap, soft_cap_and_bias, relative_bias, t5_buckets),
        *(key_bias, query_temperature, two_dimensional_bias, bias_with_fill, squared, gated),
        *(hidden_by_score, distance_decay, half_precision, by_distance, by_score),
        *(decays, low_rank),
    )
}


def documents(case: Case):
    ids = _integers(8, 3, case.batch, max(case.seqlen_q, case.seqlen_k))
    return lambda b, h, q, kv: ids[b, q] == ids[b, kv]


def causal_documents(case: Case):
    ids = jnp.arange(max(case.seqlen_q, case.seqlen_k)) // 50
    return lambda b, h, q, kv: (q >= kv) & (ids[q] == ids[kv])


def dilated(case: Case):
    return lambda b, h, q, kv: ((q - kv) % 2 == 0) & (jnp.abs(q - kv) < 60)


def block_diagonal(case: Case):
    return lambda b, h, q, kv: q // 16 == kv // 16


def per_head_window(case: Case):
    widths = 1 + 20 * jnp.arange(case.q_heads)
    return lambda b, h, q, kv: jnp.abs(q - kv) <= widths[h]


def per_query_window(case: Case):
    widths = _integers(9, 50, case.seqlen_q)
    return lambda b, h, q, kv: (kv <= q) & (kv > q - widths[q])


def from_bits(case: Case):
    words = jnp.asarray(
        np.random.default_rng(10).integers(0, 2**32, (case.seqlen_q, -(-case.seqlen_k // 32))),
        jnp.uint32,
    )

    def mask_mod(b, h, q, kv):
        return (words[q, kv >> 5] >> (kv & 31).astype(jnp.uint32)) & 1 == 1

    return mask_mod


def boolean_table(case: Case):
    table = random(11, case.batch, case.seqlen_k) > 0
    return lambda b, h, q, kv: table[b, kv] | (q == kv)


def nothing(case: Case):
    return lambda b, h, q, kv: kv < 0


def odd_heads_only(case: Case):
    return lambda b, h, q, kv: (h & 1 == 1) ^ (kv < 3)


def selected(case: Case):
    """The first condition that holds says which; of some keys the bits of their distance."""
    ids = _integers(18, 3, case.seqlen_k)

    def mask_mod(b, h, q, kv):
        near = jnp.abs(q - kv)
        bits = jax.lax.population_count(near) + jax.lax.clz(near)
        choices = [q >= kv, jax.lax.cond(h % 2 == 1, lambda: bits % 2 == 0, lambda: near < 40)]
        return jnp.select([ids[kv] == 0, ids[kv] == h % 3], choices, bits % 3 > 0)

    return mask_mod


MASKS = {
    f.__name__: f
    for f in (
        *(documents, causal_documents, dilated, block_diagonal, per_head_window),
        *(per_query_window, from_bits, boolean_table, nothing, odd_heads_only, selected),
    )
}


def first_keys_and_window(case: Case):
    return lambda b, h, q, kv: (kv < 20) | ((kv <= q) & (q - kv < 150))


def three_intervals(case: Case):
    return lambda b, h, q, kv: (kv < 9) | ((kv >= q - 150) & (kv < q - 100)) | (kv >= q + 30)


def outside_a_window(case: Case):
    return lambda b, h, q, kv: ~((kv >= q - 60) & (kv < q + 20))


def documents_by_offsets(case: Case):
    length = max(case.seqlen_q, case.seqlen_k)
    offsets = jnp.asarray([0, 0, 3, length // 3, length // 2, length - 9])
    return masks.documents_by_offsets(offsets, length - 9)


def prefix_of_each_sequence(case: Case):
    return masks.prefix_lm(_integers(12, case.seqlen_k, case.batch))


def interval_of_each_query(case: Case):
    low, width = (_integers(s, 200, case.batch, case.seqlen_q) for s in (13, 14))
    return lambda b, h, q, kv: (kv >= low[b, q] * 2) & (kv < low[b, q] + width[b, q] + 60)


INTERVALS = {
    f.__name__: f
    for f in (
        *(first_keys_and_window, three_intervals, outside_a_window, documents_by_offsets),
        *(prefix_of_each_sequence, interval_of_each_query),
    )
}
"""Masks that kernels take as intervals."""
