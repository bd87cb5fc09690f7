"""The forward on keys and values in pages, in simulation, against the dense reference.

Slots and pages that no sequence uses hold NaN, and entries of the table beyond a sequence's length
hold numbers of no page.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashcute import masks, reference
from jax_flashcute.ffi.call import other_inputs
from jax_flashcute.kernels import description, registry
from jax_flashcute.kernels.common.splits import PART_TILES
from jax_flashcute.kernels.config.sm90 import FwdConfig
from jax_flashcute.kernels.config.splits import lone_tile_time, parts_cost
from jax_flashcute.kernels.key import KernelKey
from jax_flashcute.spec import AttentionSpec, Operands
from tests.simulator import simulate
from tests.simulator.test_forward_features import compiled

SPEC = AttentionSpec(0.125, is_causal=True)
WINDOW = dataclasses.replace(SPEC, local_window_size=(40, 0))
WIDE = AttentionSpec(0.125, local_window_size=(900, 20))
DILATED = dataclasses.replace(SPEC, mask_mod=masks.trace_mask(masks.dilated(90, 3))[0])
FIRST = masks.Mask(lambda b, h, q, kv: kv < 70) | masks.sliding_window(40)
FIRST_KEYS = dataclasses.replace(SPEC, mask_mod=masks.trace_mask(FIRST)[0])
PREFIXES, PREFIX_ARRAYS = masks.trace_mask(masks.prefix_lm(jnp.array([0, 90])))
PREFIXES = dataclasses.replace(SPEC, is_causal=False, mask_mod=PREFIXES)
CAPPED = dataclasses.replace(SPEC, logits_soft_cap=5.0)
BF16 = jnp.dtype("bfloat16")


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of ``paged_attention``, as its checked arguments are; ``queries``: their lengths."""

    page_size: int
    lengths: tuple[int, ...]
    head_dim: int = 64
    head_dim_v: int = 64
    group: int = 1
    kv_heads: int = 1
    seqlen_q: int = 1
    queries: tuple[int, ...] | None = None
    pages: str = "permuted"
    spec: AttentionSpec = SPEC
    mask_arrays: tuple[jax.Array, ...] = ()
    sinks: bool = False
    num_sms: int = 2

    def operands(self) -> Operands:
        rng = np.random.default_rng(self.page_size)
        B, K, page_size = len(self.lengths), self.kv_heads, self.page_size
        most = -(-max(self.lengths) // page_size) + 1
        num_pages = B * most + 2
        table = rng.permutation(num_pages)[: B * most].reshape(B, most)
        if self.pages == "shared":
            table[:] = table[0]
        elif self.pages == "repeated":
            table[:] = table[:, :1]
        lengths = np.asarray(self.lengths, np.int32)
        used = np.zeros((num_pages, page_size), bool)
        for row, length in zip(table, lengths, strict=True):
            tokens = np.arange(length)
            used[row[tokens // page_size], tokens % page_size] = True
            row[-(-length // page_size) :] = rng.choice([-1, num_pages, 2**31 - 1, -(2**31)])

        def pages(width: int) -> jax.Array:
            values = rng.standard_normal((num_pages, page_size, K, width))
            return jnp.asarray(np.where(used[..., None, None], values, np.nan), BF16)

        rows = lengths if self.queries is None else np.asarray(self.queries, np.int32)
        rows = np.minimum(rows, self.seqlen_q) if self.queries else self.seqlen_q
        query = rng.standard_normal((B, self.seqlen_q, K * self.group, self.head_dim))
        return Operands(
            query=jnp.asarray(query, BF16),
            key=pages(self.head_dim),
            value=pages(self.head_dim_v),
            q_offset=jnp.asarray(lengths - rows, jnp.int32),
            query_seq_lengths=jnp.asarray(rows, jnp.int32) if self.queries else None,
            key_value_seq_lengths=jnp.asarray(lengths),
            page_table=jnp.asarray(table, jnp.int32),
            batch_index=jnp.arange(B) if self.spec.mask_mod is not None else None,
            mask_mod_arrays=self.mask_arrays,
            sinks=jnp.linspace(-1.0, 1.0, K * self.group)[None] if self.sinks else None,
        )


def check(call: Call, table: jax.Array | None = None, **how) -> KernelKey:
    """Simulate the kernel that a call gets, on another ``table`` if there is one."""
    operands = call.operands()
    if table is not None:
        operands = dataclasses.replace(operands, page_table=table)
    return check_operands(call, operands, **how)[0]


def check_operands(call: Call, operands: Operands, arch: str = "sm_90a", **how):
    """The kernel of a call on these operands; O, LSE and its scratch as it leaves them."""
    spec = call.spec
    assert not registry.reasons_against(spec, operands, "fwd", arch)
    key = registry.kernel_key(spec, operands, "fwd", arch, call.num_sms)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == BF16 else x, operands)
    want = reference.attention(spec, wide)
    inputs = [operands.query, operands.key, operands.value, *other_inputs(key, spec, operands)]
    rows = operands.query.shape[:3]
    outputs = [((*rows, call.head_dim_v), BF16), (rows, np.dtype(np.float32))]
    outputs += [(s, np.dtype(n)) for s, n in registry.scratch_shapes(key, operands)]
    out, lse, *scratch = simulate(
        compiled(key), *(np.asarray(x) for x in inputs), outputs=outputs, **how
    )
    np.testing.assert_allclose(out.astype(np.float32), want.out, atol=0.02, rtol=0.02)
    np.testing.assert_allclose(lse, want.lse, atol=2e-4, rtol=1e-5)
    return key, out, lse, *scratch


CASES = {
    "1_prefill_128_40": Call(1, (0, 7, 157), 128, 40, seqlen_q=70, queries=(3, 1, 70), group=2),
    "4_prefill_128_64": Call(4, (0, 7, 157), 128, 64, seqlen_q=70, queries=(3, 1, 70), group=2),
    "8_prefill_128_72": Call(8, (0, 7, 8, 9, 157), 128, 72, seqlen_q=70, queries=(3, 1, 0, 70, 65)),
    "512_chunk_72_40": Call(512, (700, 257), 72, 40, seqlen_q=64, group=3, pages="shared"),
}
SLOW_CASES = {
    "2_window": Call(2, (150, 3), seqlen_q=140, spec=WINDOW, kv_heads=2),
    "4_72": Call(4, (300, 5), 72, seqlen_q=5, group=3, pages="shared"),
    "4_256": Call(4, (0, 133, 70), 256, 256, seqlen_q=3, group=2),
    "1_192_128": Call(1, (133, 1), 192, 128, seqlen_q=130),
    "16_192_128": Call(16, (17, 133, 70), 192, 128, seqlen_q=150),
    "32_repeated": Call(32, (64, 96, 32), 128, 128, seqlen_q=20, group=8, pages="repeated"),
    "64_sinks_cap": Call(64, (65, 300), seqlen_q=9, spec=CAPPED, group=2, sinks=True),
    "4_sinks_cap": Call(4, (65, 300), seqlen_q=9, spec=CAPPED, group=2, sinks=True),
    "16_dilated": Call(16, (65, 300), seqlen_q=9, spec=DILATED, group=2),
    "4_prefixes": Call(
        4, (70, 300), 72, seqlen_q=140, group=3, spec=PREFIXES, mask_arrays=PREFIX_ARRAYS
    ),
    "4_first_keys": Call(4, (0, 133, 500), 72, seqlen_q=5, group=3, spec=FIRST_KEYS),
    "64_first_keys": Call(64, (65, 700), seqlen_q=200, spec=FIRST_KEYS),
    "128_window": Call(128, (129, 400, 127), 128, 128, seqlen_q=200, spec=WINDOW),
    "256_256": Call(256, (257, 600), 256, 256, seqlen_q=40),
}


@pytest.mark.parametrize(
    "call",
    [
        *(pytest.param(c, id=n) for n, c in CASES.items()),
        *(pytest.param(c, id=n, marks=pytest.mark.slow) for n, c in SLOW_CASES.items()),
    ],
)
def test_prefill(call: Call) -> None:
    assert not check(call).split_kv


def in_any_order(
    cases: dict[str, Call], always: tuple[str, str, str], slow: list[tuple[str, str]]
) -> pytest.MarkDecorator:
    """One case by name, ``timing`` and ``warps``; where slow tests run, all in each other order."""
    slow_cases = [pytest.param(n, *how, marks=pytest.mark.slow) for n in cases for how in slow]
    return pytest.mark.parametrize(("name", "timing", "warps"), [always, *slow_cases])


GATHERED_CASES = {
    "2_72_40": Call(2, (0, 7, 157), 72, 40, seqlen_q=70, group=2),
    "1": Call(1, (130, 257), seqlen_q=140, group=4, kv_heads=2),
    "2_128": Call(2, (300, 1, 133), 128, 128, seqlen_q=150, pages="shared", num_sms=3),
    "1_192_128": Call(1, (133, 1), 192, 128, seqlen_q=130, pages="repeated", num_sms=1),
    "8": Call(8, (130, 257, 9), seqlen_q=140, group=4, kv_heads=2),
    "32_128": Call(32, (300, 1, 133), 128, 128, seqlen_q=150, pages="shared", num_sms=3),
    "2_full": Call(2, (133, 301), seqlen_q=20, group=3, spec=AttentionSpec(0.125)),
}


@pytest.fixture
def gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pages are gathered however few tiles of queries visit them."""
    monkeypatch.setattr(registry, "LEAST_GATHERED_VISITS", 1)


@pytest.mark.usefixtures("gathers")
@in_any_order(
    GATHERED_CASES,
    ("2_72_40", "early", "adversarial"),
    [("shuffled", "seeded"), ("late", "adversarial")],
)
def test_pages_gathered_as_the_kernel_goes(name: str, timing: str, warps: str) -> None:
    key = check(GATHERED_CASES[name], timing=timing, warps=warps, seed=10)
    assert description.page_copies(key) == "TMA, once gathered"


@pytest.mark.slow
@pytest.mark.usefixtures("gathers")
def test_a_gathered_page_out_of_range_is_zeros() -> None:
    call = Call(2, (100, 37), 72, 40, seqlen_q=70)
    table = call.operands().page_table
    assert table is not None
    for number in (-1, 2**31 - 1):
        check(call, table=table.at[:, 2].set(number))


SPLIT_CASES = {
    "1_groups_of_8": Call(1, (901, 0, 15), group=8, num_sms=16),
    "2_decode": Call(2, (901, 0, 15), group=8, num_sms=16),
    "16_decode": Call(16, (1101, 0, 15), 128, 128, group=8, num_sms=16),
}
SLOW_SPLIT_CASES = {
    # Parts of seven tiles, as long as the sequences' keys together allow: four, three and one.
    "16_long_parts": Call(16, (2901, 2500, 700), group=8, num_sms=4),
    "1_window": Call(1, (2001, 900), 72, 40, seqlen_q=2, group=7, spec=WIDE, num_sms=16),
    "4_256": Call(4, (801, 300), 256, 256, group=3, num_sms=16),
    "4_decode": Call(4, (901, 0, 15), 128, 128, group=8, num_sms=16),
    "8_first_keys": Call(8, (2001, 90), seqlen_q=2, group=7, spec=FIRST_KEYS, num_sms=16),
    "64_shared": Call(64, (1500, 1500, 90), 128, 128, seqlen_q=3, pages="shared", num_sms=32),
    "512_192_128": Call(512, (1025, 511), 192, 128, group=16, num_sms=16),
}


@pytest.mark.parametrize(
    "call",
    [
        *(pytest.param(c, id=n) for n, c in SPLIT_CASES.items()),
        *(pytest.param(c, id=n, marks=pytest.mark.slow) for n, c in SLOW_SPLIT_CASES.items()),
    ],
)
def test_split_kv(call: Call) -> None:
    assert check(call, timing="shuffled", warps="adversarial").split_kv


# As many tiles as multiprocessors: only lengths make parts, and the last one's block adds them up.
JOINED_CASES = {
    "16_256": Call(16, (2100, 100), 256, 256, group=2, num_sms=2),
    "2_sinks_cap": Call(
        2, (2100, 0, 1300), 256, 256, seqlen_q=2, spec=CAPPED, sinks=True, num_sms=3
    ),
    "64_groups_of_8": Call(64, (4200, 100), 128, 128, seqlen_q=2, group=8, num_sms=2),
}


@in_any_order(
    JOINED_CASES,
    ("16_256", "shuffled", "adversarial"),
    [("early", "seeded"), ("late", "adversarial")],
)
def test_parts_that_the_last_block_adds_up(name: str, timing: str, warps: str) -> None:
    key = check(JOINED_CASES[name], timing=timing, warps=warps, seed=4)
    assert isinstance(key.config, FwdConfig)
    assert key.config.joins_parts


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(2901, 2500, 700), (4000, 1), (3000, 60, 60)])
def test_parts_are_those_that_the_estimate_finds_cheapest(lengths: tuple[int, ...]) -> None:
    call = Call(16, lengths, group=8, num_sms=4)
    key, _, _, _, o_parts, lse_parts = check_operands(call, call.operands())
    tiles = [-(-n // key.tile[1]) for n in lengths]
    most = len(o_parts)
    parts = {n: [max(1, min(-(-t // n), most)) for t in tiles] for n in PART_TILES}
    lone = lone_tile_time(key.config, key.head_dim, key.head_dim_v, key.num_sms, key.page_size)
    rest = (sum(tiles), max(tiles), most, key.num_sms, lone)
    costs = {n: parts_cost(n, sum(parts[n]), *rest) for n in parts}
    chosen = parts[min(costs, key=costs.__getitem__)]
    # A row in one part leaves none behind; what is never written stays NaN.
    written = np.isfinite(lse_parts[:, :, 0, 0]).sum(0)
    np.testing.assert_array_equal(written, [n if n > 1 else 0 for n in chosen])


BLACKWELL_CASES = {
    "8_prefill_128_72": CASES["8_prefill_128_72"],
    "1_decode": Call(1, (1101, 0, 1, 15), group=3, num_sms=16),
}
ALL_CASES = CASES | SLOW_CASES | SPLIT_CASES | SLOW_SPLIT_CASES
SLOW_BLACKWELL_CASES = {n: c for n, c in ALL_CASES.items() if n not in BLACKWELL_CASES}


@pytest.mark.parametrize(
    "call",
    [
        *(pytest.param(c, id=n) for n, c in BLACKWELL_CASES.items()),
        *(pytest.param(c, id=n, marks=pytest.mark.slow) for n, c in SLOW_BLACKWELL_CASES.items()),
    ],
)
def test_blackwell(call: Call) -> None:
    key = check(call, timing="shuffled", warps="adversarial", arch="sm_100a")
    assert key.kernel == "sm100_forward"


@pytest.mark.slow
@pytest.mark.parametrize(("timing", "warps"), [("early", "seeded"), ("late", "adversarial")])
@pytest.mark.parametrize("name", CASES)
def test_prefill_under_any_timing(name: str, timing: str, warps: str) -> None:
    check(CASES[name], timing=timing, warps=warps, seed=5)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(
    "call",
    [
        Call(4, (100, 37), 72, 40, seqlen_q=3),
        Call(4, (100, 37), 64, 64, seqlen_q=70),
        Call(16, (100, 37), 72, 40, seqlen_q=3),
    ],
    ids=["4", "4_prefill", "16"],
)
def test_a_page_out_of_range_reads_as_zeros(call: Call, arch: str) -> None:
    table = call.operands().page_table
    assert table is not None
    for number in (-1, 2**31 - 1):
        check(call, table=table.at[:, 2].set(number), arch=arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_a_sequence_does_not_depend_on_the_batch(arch: str) -> None:
    spec = AttentionSpec(0.125, is_causal=True, batch_invariant=True)
    call = Call(16, (1300, 90, 700), group=8, kv_heads=2, num_sms=16, spec=spec)
    operands = call.operands()
    key, out, lse, *_ = check_operands(call, operands, arch)
    assert key.split_kv
    batched = ("query", "q_offset", "key_value_seq_lengths", "page_table")
    for b in range(3):
        alone = {name: getattr(operands, name)[b : b + 1] for name in batched}
        alone_key, alone_out, alone_lse, *_ = check_operands(
            call, dataclasses.replace(operands, **alone), arch
        )
        assert alone_key == key
        np.testing.assert_array_equal(alone_out[0], out[b])
        np.testing.assert_array_equal(alone_lse[0], lse[b])
