"""Calls drawn at random: every argument beside every other, on sizes that divide nothing.

A number determines a call, so that one which fails can be made again.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashcute import flash_attention, make_block_mask, masks, paged_attention, scores
from jax_flashcute.block_mask import BlockMask
from jax_flashcute.dispatch import Implementation
from tests.cases import EDGE_LENGTHS

Arrays = dict[str, jax.Array]
Results = tuple[jax.Array, jax.Array]
UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
PAGED_SHARE, GRADIENT_SHARE, MAPPED_SHARE = 0.3, 0.4, 0.15
MOST_UNITS = 2.0
"""Of roundoff that a gradient may be off by."""


@dataclass(frozen=True)
class Limits:
    """Of lengths, of scores over all heads, at least ``longest**2``, and of heads of a group.

    By default a call has more tiles than a GPU has multiprocessors, at times.
    """

    longest: int = 1500
    scores: int = 2**25
    group: int = 16


SMALL = Limits(longest=350, scores=2**18, group=7)
"""For a CPU."""


@dataclass(frozen=True)
class Sizes:
    batch: int
    seqlen_q: int
    seqlen_k: int
    kv_heads: int
    group: int
    head_dim: int
    head_dim_v: int

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def scores(self) -> int:
        return self.batch * self.q_heads * self.seqlen_q * self.seqlen_k

    def full(self, dimensions: Iterable[str]) -> tuple[int, ...]:
        """The shape (B, N, T, S) with 1 where a dimension is not among ``dimensions``."""
        sizes = (self.batch, self.q_heads, self.seqlen_q, self.seqlen_k)
        return tuple(n if d in dimensions else 1 for d, n in zip("bnts", sizes, strict=True))


@dataclass
class RandomCall:
    """A call of ``flash_attention``, or of ``paged_attention``.

    Attributes:
      arrays: by name: those of the arguments, and what masks and scores close over.
      static: arguments that are no arrays.
      functions: arguments that are made of arrays, each from ``arrays``.
      closed_over: which of the arrays are for these alone.
      mapped: which have a dimension more, in front, over which the call is mapped.
      has_gradients: whether all floating-point arrays have gradients compared.
    """

    sizes: Sizes
    dtype: str
    paged: bool
    has_gradients: bool
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    static: dict = field(default_factory=dict)
    functions: dict[str, Callable[[Arrays], Any]] = field(default_factory=dict)
    closed_over: set[str] = field(default_factory=set)
    mapped: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        shapes = {name: (array.shape, str(array.dtype)) for name, array in self.arrays.items()}
        mapped = f"mapped over {self.mapped}, " if self.mapped else ""
        return f"{self.sizes}, {self.static}, {sorted(self.functions)}, {mapped}{shapes}"

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape of the LSE."""
        rows = self.arrays["query"].shape[:-1]
        return (2, *rows) if self.mapped and "query" not in self.mapped else rows

    def attend(self, arrays: Arrays, implementation: Implementation) -> Results:
        """``(out, lse)`` of the call on arrays of these names."""
        attend = functools.partial(self._attend, implementation)
        if not self.mapped:
            return attend(arrays)
        axes = {name: 0 if name in self.mapped else None for name in arrays}
        return jax.vmap(attend, in_axes=(axes,))(arrays)

    def _attend(self, implementation: Implementation, arrays: Arrays) -> Results:
        given: dict[str, Any] = {n: x for n, x in arrays.items() if n not in self.closed_over}
        given |= {name: function(arrays) for name, function in self.functions.items()}
        if "segment_ids_of_keys" in given:
            given["segment_ids"] = (given["segment_ids"], given.pop("segment_ids_of_keys"))
        attention = paged_attention if self.paged else flash_attention
        given |= {"implementation": implementation, "return_residual": True}
        return attention(**given, **self.static)


class Draws:
    """A generator of what calls are made of."""

    def __init__(self, number: int):
        self.rng = np.random.default_rng((21, number))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def one_of(self, *what):
        return what[int(self.rng.integers(len(what)))]

    def up_to(self, most: int) -> int:
        """From 1; every other one is as likely below the square root of ``most`` as above."""
        if self.chance(0.5):
            return int(self.rng.integers(1, most + 1))
        return int(np.exp(self.rng.uniform(0, np.log(most + 1))))

    def length(self, longest: int) -> int:
        edges = [n for n in EDGE_LENGTHS if n <= longest]
        return self.one_of(*edges) if self.chance(0.3) else self.up_to(longest)

    def head_dim(self) -> int:
        return self.one_of(64, 128) if self.chance(0.55) else 8 * int(self.rng.integers(1, 33))

    def lengths(self, batch: int, longest: int) -> np.ndarray:
        """Of sequences; one in six is empty, and one full."""
        drawn = self.rng.integers(0, longest + 1, batch)
        kinds = self.rng.integers(0, 6, batch)
        return np.select([kinds == 0, kinds == 1], [0, longest], drawn).astype(np.int32)

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape, np.float32)

    def sizes(self, limits: Limits) -> Sizes:
        T, S = (self.length(limits.longest) for _ in range(2))
        head_dim = self.head_dim()
        head_dim_v = head_dim if self.chance(0.7) else self.head_dim()
        while True:
            batch, kv_heads = (int(self.rng.integers(1, n)) for n in (5, 4))
            group = min(limits.group, self.one_of(1, 1, 2, 3, 4, 5, 7, 8, 16))
            if batch * kv_heads * group * T * S <= limits.scores:
                return Sizes(batch, T, S, kv_heads, group, head_dim, head_dim_v)


def numbers(count: int) -> range:
    """Those that ``JAX_FLASHCUTE_RANDOM``, or ``count``, and ``JAX_FLASHCUTE_RANDOM_FIRST`` say."""
    first = int(os.environ.get("JAX_FLASHCUTE_RANDOM_FIRST", "0"))
    return range(first, first + int(os.environ.get("JAX_FLASHCUTE_RANDOM", count)))


def random_call(number: int, limits: Limits | None = None) -> RandomCall:
    """The call of a number."""
    draws, limits = Draws(number), limits or Limits()
    paged = draws.chance(PAGED_SHARE)
    sizes = draws.sizes(limits)
    heads = sizes.batch * sizes.q_heads
    if paged or draws.chance(0.2):
        few = 1 if draws.chance(0.5) else min(sizes.seqlen_q, draws.up_to(64))
        many = min(limits.scores // (heads * few), draws.up_to(8 * limits.longest))
        sizes = dataclasses.replace(sizes, seqlen_q=few, seqlen_k=max(many, 1))
    elif draws.chance(0.3) and sizes.seqlen_q**2 * heads <= limits.scores:
        sizes = dataclasses.replace(sizes, seqlen_k=sizes.seqlen_q)
    call = RandomCall(
        sizes=sizes,
        dtype=draws.one_of("bfloat16", "bfloat16", "float16"),
        paged=paged,
        has_gradients=not paged and draws.chance(GRADIENT_SHARE),
    )
    (add_pages if paged else add_rows)(call, draws)
    add_functions(call, draws)
    if draws.chance(0.15):
        call.static["logits_soft_cap"] = draws.one_of(1.5, 5.0, 30.0)
    if draws.chance(0.2):
        call.arrays["sinks"] = draws.normal(sizes.q_heads)
    if draws.chance(0.15):
        call.static["scale"] = draws.one_of(0.05, 0.1, 0.3)
    if draws.chance(MAPPED_SHARE):
        add_dimension(call, draws)
    return call


def add_dimension(call: RandomCall, draws: Draws) -> None:
    """Some arrays become two: themselves, and others that hold NaN where these do."""
    others = [{n} for n in call.arrays if n not in ("key", "value", "k_pages", "v_pages")]
    for names in [*others, {"key", "value"}]:
        if names <= call.arrays.keys() and draws.chance(0.5):
            call.mapped |= names
    call.mapped = call.mapped or {"query"}
    for name in call.mapped:
        array = call.arrays[name]
        if name.endswith("lengths"):
            other = array // 2
        elif array.dtype in (bool, np.uint32):
            other = ~array
        else:
            other = -array if array.dtype == np.float32 else array
        call.arrays[name] = np.stack([array, other])


def add_pages(call: RandomCall, draws: Draws) -> None:
    """Query, pages, table and lengths; slots that no sequence uses hold NaN."""
    sizes, rng, arrays = call.sizes, draws.rng, call.arrays
    page_size = 2 ** int(rng.integers(0, 10))
    B, T, K = sizes.batch, sizes.seqlen_q, sizes.kv_heads
    lengths = draws.lengths(B, sizes.seqlen_k)
    most = -(-sizes.seqlen_k // page_size) + int(rng.integers(0, 3))
    num_pages = B * most + int(rng.integers(0, 3))
    table = rng.permutation(num_pages)[: B * most].reshape(B, most)
    if draws.chance(0.3):
        shared = int(rng.integers(0, most + 1))
        table[:, :shared] = table[0, :shared]
    used = np.zeros((num_pages, page_size), bool)
    for row, length in zip(table, lengths, strict=True):
        tokens = np.arange(length)
        used[row[tokens // page_size], tokens % page_size] = True
        row[-(-length // page_size) :] = rng.choice([-1, num_pages, 2**31 - 1, -(2**31)])
    for name, width in (("k_pages", sizes.head_dim), ("v_pages", sizes.head_dim_v)):
        pages = draws.normal(num_pages, page_size, K, width)
        arrays[name] = np.where(used[..., None, None], pages, np.nan)
    arrays["page_table"], arrays["kv_lengths"] = table.astype(np.int32), lengths
    queries = (B, T, sizes.q_heads, sizes.head_dim)
    if draws.chance(0.3):
        arrays["q_lengths"] = draws.lengths(B, T)
        arrays["query"] = draws.normal(*queries)
        poison(arrays, "query", np.arange(T) >= arrays["q_lengths"][:, None])
    elif draws.chance(0.3):
        ends = np.cumsum([0, *rng.integers(0, T + 1, B)]).astype(np.int32)
        arrays["cu_seqlens_q"] = ends
        call.static["max_q_length"] = T
        arrays["query"] = draws.normal(int(ends[-1]) + 3, *queries[2:])
        arrays["query"][int(ends[-1]) :] = np.nan
    else:
        arrays["query"] = draws.normal(*queries)
    call.static["is_causal"] = draws.chance(0.8)
    if draws.chance(0.2):
        arrays["q_offset"] = rng.integers(-T, sizes.seqlen_k + 1, B).astype(np.int32)
    if draws.chance(0.25):
        add_window(call, draws)


def add_rows(call: RandomCall, draws: Draws) -> None:
    """Query, key and value, and the arguments that pages do not have."""
    sizes, rng, arrays, static = call.sizes, draws.rng, call.arrays, call.static
    B, T, S = sizes.batch, sizes.seqlen_q, sizes.seqlen_k
    arrays["query"] = draws.normal(B, T, sizes.q_heads, sizes.head_dim)
    arrays["key"] = draws.normal(B, S, sizes.kv_heads, sizes.head_dim)
    arrays["value"] = draws.normal(B, S, sizes.kv_heads, sizes.head_dim_v)
    match draws.one_of("causal", "causal", "window", "compressed", "all", "all", "all"):
        case "causal":
            static["is_causal"] = True
            if draws.chance(0.2):
                add_window(call, draws)
        case "window":
            add_window(call, draws)
        case "compressed":
            static["compress_factor"] = draws.one_of(2, 4, 5, 16)
            static["complete_only"] = draws.chance(0.5)
    match draws.one_of("start", "start", "end", "each"):
        case "end":
            arrays["q_offset"] = np.asarray(S - T, np.int32)
        case "each":
            arrays["q_offset"] = rng.integers(-T, S + 1, B).astype(np.int32)
    if draws.chance(0.3):
        arrays["key_value_seq_lengths"] = lengths = draws.lengths(B, S)
        poison(arrays, "key", np.arange(S) >= lengths[:, None])
        poison(arrays, "value", np.arange(S) >= lengths[:, None])
    if draws.chance(0.2):
        arrays["query_seq_lengths"] = lengths = draws.lengths(B, T)
        poison(arrays, "query", np.arange(T) >= lengths[:, None])
    if draws.chance(0.2):
        add_segments(call, draws)
    if draws.chance(0.2):
        dimensions = "".join(d for d in "bnts" if draws.chance(0.5))
        arrays["bias"] = draws.normal(*sizes.full(dimensions))
    if draws.chance(0.15):
        dimensions = "".join(d for d in "bnts" if draws.chance(0.5))
        arrays["mask"] = rng.random(sizes.full(dimensions)) < 0.7
    elif draws.chance(0.1):
        shape = (*sizes.full("t" + draws.one_of("", "b", "n", "bn"))[:3], -(-S // 32))
        arrays["packed_mask"] = rng.integers(0, 2**32, shape, np.uint32)
    static["deterministic"] = draws.chance(0.3)


def add_window(call: RandomCall, draws: Draws) -> None:
    longest = max(call.sizes.seqlen_q, call.sizes.seqlen_k)
    sides = [None if draws.chance(0.3) else draws.up_to(longest) - 1 for _ in range(2)]
    call.static["local_window_size"] = tuple(sides)


def add_segments(call: RandomCall, draws: Draws) -> None:
    """Ids, sorted or not, of one or of two sequences, or boundaries; padding holds NaN."""
    sizes, rng, arrays = call.sizes, draws.rng, call.arrays
    B, T, S = sizes.batch, sizes.seqlen_q, sizes.seqlen_k
    segments = int(rng.integers(1, 6))
    names = {"query": T, "key": S, "value": S}

    def ids(length: int, *, in_order: bool) -> np.ndarray:
        drawn = rng.integers(0, segments, (B, length))
        padding = np.arange(length) >= length - length // 7
        if in_order:
            return np.where(padding, -1, np.sort(drawn, axis=1)).astype(np.int32)
        return np.where(rng.random((B, length)) < 0.1, -1, drawn).astype(np.int32)

    def boundaries(length: int) -> np.ndarray:
        ends = np.sort(rng.integers(0, length + 1, (B, segments + 1)), axis=1)
        ends[:, 0] = 0
        return ends.astype(np.int32)

    alike = T == S and draws.chance(0.7)
    if draws.chance(0.5):
        in_order = draws.chance(0.6)
        arrays["segment_ids"] = of_queries = ids(T, in_order=in_order)
        of_keys = of_queries if alike else ids(S, in_order=in_order)
        if not alike:
            arrays["segment_ids_of_keys"] = of_keys
        padding = {"query": of_queries < 0, "key": of_keys < 0, "value": of_keys < 0}
    else:
        arrays["cu_seqlens_q"] = of_queries = boundaries(T)
        of_keys = of_queries if alike else boundaries(S)
        if not alike:
            arrays["cu_seqlens_k"] = of_keys
        ends = {"query": of_queries, "key": of_keys, "value": of_keys}
        padding = {n: np.arange(names[n]) >= x[:, -1:] for n, x in ends.items()}
    call.static["positions"] = draws.one_of("sequence", "segment")
    for name, rows in padding.items():
        poison(arrays, name, rows)


def poison(arrays: dict[str, np.ndarray], name: str, rows: np.ndarray) -> None:
    """NaN in these rows, (B, length), of an array."""
    arrays[name] = np.where(rows[..., None, None], np.float32(np.nan), arrays[name])


def add_functions(call: RandomCall, draws: Draws) -> None:
    """Masks and scores that are functions, and lists of tiles."""
    sizes = call.sizes
    if draws.chance(0.35) and "compress_factor" not in call.static:
        call.functions["mask_mod"] = random_mask(call, draws, "mask")
    if draws.chance(0.25):
        call.functions["score_mod"] = random_score(call, draws)
    lists = not call.paged and draws.chance(0.12)
    if not lists:
        return
    tile = draws.one_of((128, 128), (128, 128), (128, 256), (64, 64), (256, 128))
    if "mask_mod" in call.functions and draws.chance(0.6):
        mask_mod, B, N = call.functions["mask_mod"], sizes.batch, sizes.q_heads

        def of_mask(arrays: Arrays) -> BlockMask:
            return make_block_mask(
                mask_mod(arrays),
                *(B, N, sizes.seqlen_q, sizes.seqlen_k),
                tile_m=tile[0],
                tile_n=tile[1],
                q_offset=arrays.get("q_offset", 0),
            )

        # Positions within segments are others than those that a list is made by.
        if call.static.get("positions") != "segment":
            call.functions["block_mask"] = of_mask
            return
    shape = (-(-sizes.seqlen_q // tile[0]), -(-sizes.seqlen_k // tile[1]))
    lead = draws.one_of(1, sizes.batch), draws.one_of(1, sizes.q_heads)
    kinds = draws.rng.choice([0, 1, 2], (*lead, *shape), p=[0.4, 0.35, 0.25])
    lengths = {"q_length": sizes.seqlen_q, "kv_length": sizes.seqlen_k}
    call.functions["block_mask"] = lambda _: BlockMask.from_blocks(
        kinds == 1, kinds == 2, **lengths, tile_m=tile[0], tile_n=tile[1]
    )


def random_mask(call: RandomCall, draws: Draws, name: str) -> Callable[[Arrays], masks.Mask]:
    """A mask, or what two of them make together; ``name`` starts those of its arrays."""
    if draws.chance(0.3) and len(name) < 6:
        first, second = (random_mask(call, draws, f"{name}{i}") for i in range(2))
        if draws.chance(0.5):
            return lambda arrays: first(arrays) & second(arrays)
        return lambda arrays: first(arrays) | second(arrays)
    sizes, rng = call.sizes, draws.rng
    longest = max(sizes.seqlen_q, sizes.seqlen_k)
    n, m = draws.up_to(longest), draws.up_to(longest)

    def closed_over(array: np.ndarray) -> None:
        call.arrays[name] = array.astype(np.int32)
        call.closed_over.add(name)

    match int(rng.integers(0, 11)):
        case 0:
            return lambda _: masks.sliding_window(n, m - 1)
        case 1:
            return lambda _: masks.chunked(n)
        case 2:
            return lambda _: masks.block_diagonal(n, m)
        case 3:
            closed_over(draws.lengths(sizes.batch, sizes.seqlen_k))
            return lambda arrays: masks.prefix_lm(arrays[name])
        case 4:
            return lambda _: masks.dilated(n, min(m, 7))
        case 5:
            ids = rng.integers(0, 4, (sizes.batch, longest))
            closed_over(np.sort(ids, axis=1) if draws.chance(0.5) else ids)
            return lambda arrays: masks.documents(arrays[name])
        case 6:
            ends = np.sort(rng.integers(0, longest + 1, int(rng.integers(2, 6))))
            closed_over(ends)
            return lambda arrays: masks.documents_by_offsets(arrays[name], longest)
        case 7:
            closed_over(draws.lengths(sizes.batch, sizes.seqlen_k))
            return lambda arrays: masks.padding(arrays[name])
        case 8:
            return lambda _: masks.Mask(lambda b, h, q, kv: kv < n) | masks.sliding_window(m)
        case 9:
            return lambda _: ~masks.sliding_window(n, m)
        case _:
            return lambda _: masks.Mask(lambda b, h, q, kv: (q * 3 + kv + h + b) % 5 != 0)


def random_score(call: RandomCall, draws: Draws) -> Callable[[Arrays], scores.ScoreMod]:
    """A score; its floating-point arrays change it by about as much as they are changed."""
    N, arrays, distance = call.sizes.q_heads, call.arrays, 20
    call.closed_over.add("table")
    match int(draws.rng.integers(0, 6)):
        case 0:
            return lambda _: scores.alibi(scores.alibi_slopes(N))
        case 1:
            arrays["table"] = draws.normal(N, 2 * distance + 1)

            def relative(given: Arrays):
                table = given["table"]
                return lambda score, b, h, q, kv: (
                    score + table[h, jnp.clip(kv - q, -distance, distance) + distance]
                )

            return relative
        case 2:
            arrays["table"] = draws.normal(N)
            return lambda given: scores.head_bias(given["table"])
        case 3:
            arrays["table"] = draws.normal(N, call.sizes.seqlen_k)
            return lambda given: scores.key_bias(given["table"])
        case 4:
            return lambda _: scores.softcap(3.0)
        case _:
            arrays["table"] = draws.rng.uniform(0.5, 1.5, N).astype(np.float32)

            def scaled(given: Arrays):
                table = given["table"]
                return lambda score, b, h, q, kv: score * table[h]

            return scaled


MAIN = ("query", "key", "value")


def program(call: RandomCall, implementation: Implementation) -> Callable:
    """A function of arrays and of the cotangents of out and LSE.

    It returns ``(out, lse)``, gradients by name, and from the reference ``seen``, (B, S, K): what
    all rows give a key, each its probability times how large its gradients of scores may be.
    """

    def run(arrays: Arrays, d_out: jax.Array, d_lse: jax.Array):
        attend = functools.partial(call.attend, implementation=implementation)
        if not call.has_gradients:
            return attend(arrays), {}, None
        floating = {n: x for n, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        results, pull = jax.vjp(lambda changed: attend(arrays | changed), floating)
        gradients = pull((d_out, d_lse))[0]
        if implementation != "reference":
            return results, gradients, None
        of_rows = jnp.broadcast_to(magnitude(d_out, d_lse)[..., None], d_out.shape)
        return results, gradients, pull((of_rows, jnp.zeros_like(d_lse)))[0]["value"][..., 0]

    return run


def magnitude(d_out, d_lse):
    """Of a row's gradients of scores over its probabilities: ``dO V - delta + dLSE``."""
    return 2 * jnp.linalg.norm(d_out, axis=-1) + jnp.abs(d_lse)


def check(call: RandomCall, implementation: Implementation = "cute") -> None:
    """An implementation's results against the reference's in float32 from the same operands."""
    unit = UNIT_ROUNDOFF[call.dtype]
    rounded = (*MAIN, "k_pages", "v_pages")
    given = {
        n: jnp.asarray(x, call.dtype if n in rounded else None) for n, x in call.arrays.items()
    }
    wide = {n: x.astype(jnp.float32) if n in rounded else x for n, x in given.items()}
    draw, rows = np.random.default_rng(1), call.rows
    d_out = jnp.asarray(draw.standard_normal((*rows, call.sizes.head_dim_v)), call.dtype)
    d_lse = jnp.asarray(draw.standard_normal(rows), jnp.float32)

    exact = jax.jit(
        program(call, "reference"), compiler_options={"xla_backend_optimization_level": 0}
    )(wide, d_out.astype(jnp.float32), d_lse)
    (want_out, want_lse), wanted, seen = jax.tree.map(np.asarray, exact)
    assert not np.isnan(want_out).any()
    (out, lse), found, _ = jax.jit(program(call, implementation))(given, d_out, d_lse)
    out = np.asarray(out, np.float32)
    np.testing.assert_allclose(out, want_out, atol=4 * unit, rtol=4 * unit, err_msg="out")
    np.testing.assert_allclose(lse, want_lse, atol=3e-4, rtol=3e-5, err_msg="lse")
    assert (out[np.isneginf(want_lse)] == 0).all(), "out of rows that see nothing"
    if call.has_gradients:
        of_rows = np.asarray(magnitude(d_out.astype(jnp.float32), d_lse))
        check_gradients(call, found, wanted, of_rows * ~np.isneginf(want_lse), seen)


def check_gradients(
    call: RandomCall,
    found: Arrays,
    wanted: dict[str, np.ndarray],
    of_rows: np.ndarray,
    seen: np.ndarray,
) -> None:
    """Gradients by name; ``of_rows`` and ``seen`` as ``magnitude`` and ``program`` have them.

    Probabilities, gradients of scores and results are rounded to 16 bits: a row may be off by so
    many units of the terms that it is a sum of, and of the smallest number there is for each term.
    """
    sizes, unit = call.sizes, UNIT_ROUNDOFF[call.dtype]
    smallest = float(jnp.finfo(call.dtype).smallest_subnormal)
    width = sizes.head_dim**0.5 * call.static.get("scale", sizes.head_dim**-0.5)
    of_query = of_rows.sum(0) if call.mapped and "query" not in call.mapped else of_rows
    rows_of_key = sizes.seqlen_q * sizes.group
    terms = {
        "query": (width * of_query, sizes.seqlen_k),
        "key": (width * seen, rows_of_key),
        "value": (seen, rows_of_key),
    }
    for name, want in wanted.items():
        error = np.asarray(found[name], np.float32) - want
        if name in MAIN:
            size, error = np.linalg.norm(want, axis=-1), np.linalg.norm(error, axis=-1)
            magnitudes, count = terms[name]
            least = count * smallest * want.shape[-1] ** 0.5
            within = MOST_UNITS * unit * (size + magnitudes) + least * (magnitudes > 0)
        else:
            size, error = np.linalg.norm(want), np.linalg.norm(error)
            within = MOST_UNITS * unit * (size + np.linalg.norm(of_rows))
        worst = np.max(error / np.maximum(within, 1e-30))
        assert (error <= within).all(), f"gradient of {name}: {worst} times what it may be off"
