"""Which kernel serves a call, every reason why none does, and the configurations."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_flashcute import explain, masks, plan
from jax_flashcute.analysis import Interval, evaluate
from jax_flashcute.kernels import masking, registry
from jax_flashcute.kernels.config.memory import SMEM_BYTES, round_up
from jax_flashcute.kernels.config.sm90 import (
    BwdConfig,
    FwdConfig,
    backward_config,
    few_rows_config,
    forward_config,
)
from jax_flashcute.kernels.config.sm100 import (
    BwdConfigSm100,
    FwdConfigSm100,
    few_rows_config_sm100,
    forward_config_sm100,
)
from jax_flashcute.kernels.config.workspace import takes_turns
from jax_flashcute.kernels.key import OPTIONAL_OPERANDS, Direction, KernelKey
from jax_flashcute.masks import trace_score
from jax_flashcute.spec import AttentionSpec, Operands
from tests.cases import Case
from tests.simulator.test_forward_segments import call_of

HEAD_DIMS = range(8, 257, 8)
SPEC = AttentionSpec(0.125)


def shapes(
    B=2, T=300, S=400, N=4, K=2, H=64, Hv=None, dtype=jnp.bfloat16, present: tuple[str, ...] = ()
) -> Operands:
    Hv = H if Hv is None else Hv
    optional = {
        "q_offset": ((B,), jnp.int32),
        "query_seq_lengths": ((B,), jnp.int32),
        "key_value_seq_lengths": ((B,), jnp.int32),
        "bias": ((1, 1, T, S), jnp.float32),
        "mask": ((1, 1, T, S), jnp.bool_),
        "sinks": ((1, N), jnp.float32),
    }
    return Operands(
        query=jax.ShapeDtypeStruct((B, T, N, H), dtype),
        key=jax.ShapeDtypeStruct((B, S, K, H), dtype),
        value=jax.ShapeDtypeStruct((B, S, K, Hv), dtype),
        **{name: jax.ShapeDtypeStruct(*optional[name]) for name in present},
    )


# ---- reasons -------------------------------------------------------------------------------


def test_what_the_forward_serves() -> None:
    archs = ("sm_90a", "sm_100a", "sm_103a", None)
    for dtype, arch in itertools.product((jnp.bfloat16, jnp.float16), archs):
        for present in itertools.chain.from_iterable(
            itertools.combinations(OPTIONAL_OPERANDS, n) for n in range(4)
        ):
            operands = shapes(dtype=dtype, present=present)
            for spec in (SPEC, dataclasses.replace(SPEC, is_causal=True, local_window_size=(3, 4))):
                assert registry.reasons_against(spec, operands, "fwd", arch) == []


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_pair_of_head_dims_has_a_valid_forward(head_dim: int) -> None:
    for head_dim_v in HEAD_DIMS:
        operands = shapes(H=head_dim, Hv=head_dim_v)
        assert registry.reasons_against(SPEC, operands, "fwd") == []
        for config in (
            forward_config(head_dim, head_dim_v),
            forward_config_sm100(head_dim, head_dim_v),
        ):
            assert config.reasons_invalid(head_dim, head_dim_v) == []


REASONS = {
    "dtype must be one of bfloat16, float16, got float32": {"dtype": jnp.float32},
    "head_dim must be a multiple of 8 from 8 to 256, got 20": {"H": 20, "Hv": 64},
    "value head_dim must be a multiple of 8 from 8 to 256, got 264": {"Hv": 264},
    "scale must be finite and positive, got -0.5": {"scale": -0.5},
    "scale must be finite and positive, got 0.0": {"scale": 0.0},
    "scale must be finite and positive, got inf": {"scale": math.inf},
    "scale must be finite and positive, got nan": {"scale": math.nan},
    "an operand is empty": {"T": 0},
}


def reasons_against(direction: Direction = "fwd", arch=None, **changes) -> list[str]:
    fields = {f.name for f in dataclasses.fields(AttentionSpec)}
    spec = dataclasses.replace(SPEC, **{n: x for n, x in changes.items() if n in fields})
    operands = shapes(**{n: x for n, x in changes.items() if n not in fields})
    return registry.reasons_against(spec, operands, direction, arch)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("reason", REASONS)
def test_each_reason_alone(reason: str, direction: Direction) -> None:
    assert reasons_against(direction, **REASONS[reason]) == [reason]


@pytest.mark.parametrize("arch", ["sm_80", "sm_120a"])
def test_an_architecture_without_kernels(arch: str) -> None:
    for direction in ("fwd", "bwd"):
        (reason,) = reasons_against(direction, arch)
        assert reason.startswith(f"kernels exist for sm_90a, sm_100a, sm_103a, not for {arch}")
        assert ("without the tcgen05 instructions" in reason) == (arch == "sm_120a")


@pytest.mark.parametrize("arch", ["sm_100a", "sm_103a"])
def test_blackwell_has_kernels_of_its_own(arch: str) -> None:
    for direction, name, config in (
        ("fwd", "sm100_forward", FwdConfigSm100),
        ("bwd", "sm100_backward", BwdConfigSm100),
    ):
        assert reasons_against(direction, arch) == []
        key = registry.kernel_key(SPEC, shapes(), direction, arch, 148)
        assert (key.kernel, key.arch) == (name, arch)
        assert isinstance(key.config, config)
    assert reasons_against("bwd", arch, H=192, Hv=128) == []
    assert reasons_against("fwd", arch, present=("bias", "mask", "sinks")) == []
    assert reasons_against("bwd", arch, present=("mask", "sinks")) == []
    assert reasons_against("bwd", arch, H=256, Hv=256, present=("mask", "sinks")) == []
    key = registry.kernel_key(SPEC, shapes(H=256, Hv=256), "bwd", arch, 0)
    assert [each.target for each in key.config.passes] == ["value", "key", "query"]
    # LSE2 and dPsum, and no sums of dQ.
    assert len(registry.scratch_shapes(key, shapes(H=256, Hv=256))) == 2


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (FwdConfigSm100(3, 128, 1), "query_tiles must be 1 or 2, got 3"),
        (FwdConfigSm100(1, 48, 1), "tile_n must be a multiple of 32 from 32 to 128, got 48"),
        (FwdConfigSm100(1, 64, 0), "kv_stages must be at least 1, got 0"),
        (FwdConfigSm100(2, 128, 3), "shared memory: 264192 bytes needed, 232448 available"),
        (FwdConfigSm100(2, 128, 1, softmax_registers=192), "registers: 69632 needed"),
    ],
)
def test_blackwell_configurations_that_do_not_fit(config: FwdConfigSm100, reason: str) -> None:
    assert any(r.startswith(reason) for r in config.reasons_invalid(128, 128))


def test_tensor_memory_is_counted() -> None:
    (reason,) = FwdConfigSm100(2, 64, 1).reasons_invalid(64, 256)
    assert reason == "tensor memory: 640 columns needed, 512 available"


def test_all_reasons_together() -> None:
    changes = {"H": 20, "Hv": 264, "T": 0, "arch": "sm_80"}
    changes |= {"dtype": jnp.float32, "scale": math.nan}
    expected = [r for r in REASONS if not r.endswith(("-0.5", " 0.0", "inf"))]
    expected += reasons_against(arch="sm_80")
    assert sorted(reasons_against(**changes)) == sorted(expected)


def test_empty_operands_of_every_kind() -> None:
    for dimension in ("B", "T", "S"):
        assert reasons_against(**{dimension: 0}) == ["an operand is empty"]


def test_a_symbolic_head_dim() -> None:
    (h,) = jax.export.symbolic_shape("h")
    assert reasons_against(H=h, Hv=64) == ["head_dim must be a number, got the symbol h"]
    assert reasons_against(Hv=h) == ["value head_dim must be a number, got the symbol h"]


def test_symbolic_batch_lengths_and_heads_are_served() -> None:
    B, T, S, K = jax.export.symbolic_shape("b, t, s, k")
    for direction in ("fwd", "bwd"):
        assert reasons_against(direction, B=B, T=T, S=S) == []
    fixed = registry.kernel_key(SPEC, shapes(T=10**6, N=6, K=2), "fwd", "sm_90a", 132)
    symbolic = registry.kernel_key(SPEC, shapes(B, T, S, N=3 * K, K=K), "fwd", "sm_90a", 132)
    assert symbolic == fixed
    assert type(symbolic.group) is int


def test_the_backward_serves_what_the_forward_does() -> None:
    """Nothing beyond what no kernel serves: every head_dim, deterministic or not."""
    for direction, deterministic in itertools.product(("fwd", "bwd"), (False, True)):
        for head_dim, head_dim_v in itertools.product(HEAD_DIMS, HEAD_DIMS):
            assert not reasons_against(
                direction, H=head_dim, Hv=head_dim_v, deterministic=deterministic
            )


# ---- keys ----------------------------------------------------------------------------------


def forward_key(spec: AttentionSpec = SPEC, **changes) -> KernelKey:
    return registry.kernel_key(spec, shapes(**changes), "fwd", "sm_90a", 132)


def test_a_key_forgets_batch_lengths_and_heads() -> None:
    for changes in ({"B": 7}, {"T": 5000}, {"S": 1}, {"N": 8, "K": 4}):
        assert forward_key(**({"T": 4000} | changes)) == forward_key(T=4000)


def test_a_key_tells_calls_apart() -> None:
    spec = dataclasses.replace
    keys = [
        forward_key(),
        forward_key(H=72),
        forward_key(Hv=72),
        forward_key(N=6),
        forward_key(T=1),
        forward_key(dtype=jnp.float16),
        forward_key(spec(SPEC, scale=0.1)),
        forward_key(spec(SPEC, is_causal=True)),
        forward_key(spec(SPEC, local_window_size=(5, None))),
        *(forward_key(present=(name,)) for name in OPTIONAL_OPERANDS),
        forward_key(present=OPTIONAL_OPERANDS),
        registry.kernel_key(SPEC, shapes(), "bwd", "sm_90a", 132),
        registry.kernel_key(SPEC, shapes(), "fwd", "sm_90a", 114),
    ]
    assert len(set(keys)) == len(keys)
    assert len({repr(key) for key in keys}) == len(keys)


def test_what_has_a_pass_of_its_own_for_dq() -> None:
    """From head_dim 192 on, but for gradients of arrays, what is known of keys by position alone,
    and one by one."""

    def has_pass(spec: AttentionSpec = SPEC, **changes) -> bool:
        operands = shapes(**{"H": 256} | changes)
        key = registry.kernel_key(spec, operands, "bwd", "sm_90a", 132)
        # The sums of dQ, log-sum-exp and sums of rows, and what counts heads' blocks.
        absent = [array is None for array in registry.arrays_of(key)[-4:]]
        assert absent == [True, False, False, True] if key.config.dq_pass else not any(absent)
        assert len(registry.scratch_shapes(key, operands)) == 4 - sum(absent)
        return key.config.dq_pass is not None

    spec = dataclasses.replace
    first_keys = Case(window=(50, 0), mask_mod=masks.prefix_lm(4)).spec()
    assert has_pass()
    assert has_pass(H=192, Hv=128)
    assert has_pass(H=192, Hv=8)
    assert has_pass(spec(SPEC, is_causal=True, deterministic=True))
    assert has_pass(first_keys)
    assert has_pass(present=(*OPTIONAL_OPERANDS, "sinks"))
    assert not has_pass(H=128)
    assert not has_pass(H=64, Hv=256)
    assert has_pass(present=("mask",))
    assert has_pass(spec(SPEC, logits_soft_cap=5.0))
    assert has_pass(Case(mask_mod=lambda b, h, q, kv: (q + kv) % 2 == 0).spec())
    assert not has_pass(present=("bias",))
    added, _ = trace_score(lambda score, b, h, q, kv: score - 0.1 * h * (q - kv), jnp.float32)
    assert has_pass(spec(SPEC, score_mod=added))
    powers, _ = trace_score(lambda score, b, h, q, kv: jnp.exp(score), jnp.float32)
    assert not has_pass(spec(SPEC, score_mod=powers))
    assert has_pass(spec(SPEC, constants=("bias",)), present=("bias",))


def test_the_array_list_has_a_place_for_every_operand() -> None:
    for present in ((), ("query_seq_lengths",), OPTIONAL_OPERANDS):
        arrays = registry.arrays_of(forward_key(present=present, Hv=40))
        assert len(arrays) == 9
        given = [array is not None for array in arrays[3:6]]
        assert given == [name in present for name in OPTIONAL_OPERANDS]
        q, k, v, *_, out, lse, counter = arrays
        assert q == k
        assert q[1] == (1, 1, 1, 64)
        assert v == out
        assert v[1] == (1, 1, 1, 40)
        assert (lse[1], counter[1]) == ((1, 1, 1), (1,))


sides = st.none() | st.integers(0, 50)


@given(st.booleans(), sides, sides)
def test_a_window_and_causality_are_one_interval(
    is_causal: bool, left: int | None, right: int | None
) -> None:
    spec = AttentionSpec(1.0, is_causal, (left, right))
    interval = masking.interval_of(spec)
    for position in (0, 20, 60):
        for key in range(130):
            expected = (
                (not is_causal or key <= position)
                and (left is None or key >= position - left)
                and (right is None or key <= position + right)
            )
            low, high = (
                None if x is None else evaluate(x, {"q": position}, {}, min, max)
                for x in (interval.low, interval.high)
            )
            assert ((low is None or key >= low) and (high is None or key < high)) == expected


def test_no_window_is_open() -> None:
    assert masking.interval_of(SPEC) == Interval()


@given(st.integers(1, 9000), st.integers(1, 80), st.integers(1, 3))
def test_packing_pays_where_it_saves_a_tenth_of_the_rows(
    q_length: int, group: int, warpgroups: int
) -> None:
    config = FwdConfig(warpgroups, 128, 2)
    pays = registry.packing_pays(q_length, group, config)
    if group == 1 or group > 64:
        assert not pays
        return
    unpacked = group * -(-q_length // (64 * warpgroups))
    # A slab of 64 rows holds whole tokens of all heads.
    packed = -(-q_length // (warpgroups * (64 // group)))
    assert pays == (10 * packed <= 9 * unpacked)


def test_packing_in_use() -> None:
    config = forward_config(128, 128)
    assert registry.packing_pays(1, 8, config)
    assert not registry.packing_pays(10**6, 8, config)
    (t,) = jax.export.symbolic_shape("t")
    assert not registry.packing_pays(t, 8, config)


@pytest.mark.parametrize(
    ("arch", "group", "arguments", "packs"),
    [
        ("sm_90a", 4, {"cu_seqlens_q": [0, 100, 3000]}, True),
        ("sm_90a", 4, {"mask_mod": masks.documents_by_offsets(jnp.array([0, 100]), 3000)}, True),
        ("sm_90a", 3, {"cu_seqlens_q": [0, 100, 3000]}, False),
        ("sm_90a", 4, {}, False),
        ("sm_90a", 4, {"cu_seqlens_q": [0, 100, 3000], "logits_soft_cap": 9.0}, False),
        ("sm_100a", 4, {"cu_seqlens_q": [0, 100, 3000]}, False),
    ],
)
def test_rows_with_bounds_from_arrays_share_tiles(
    arch: str, group: int, arguments: dict, packs: bool
) -> None:
    spec, operands = call_of((1, 3000, 3000), heads=(group, 1), is_causal=True, **arguments)
    assert registry.kernel_key(spec, operands, "fwd", arch, 132).pack_gqa == packs


# ---- configurations ------------------------------------------------------------------------

forward_configs = st.builds(
    FwdConfig,
    warpgroups=st.integers(0, 5),
    tile_n=st.integers(0, 40).map(lambda x: 8 * x),
    kv_stages=st.integers(0, 5),
    consumer_registers=st.integers(1, 32).map(lambda x: 8 * x),
    producer_registers=st.sampled_from([24, 32, 40]),
    query_rows=st.sampled_from([8, 16, 64]),
)
head_dims = st.sampled_from(HEAD_DIMS)


@given(forward_configs, head_dims, head_dims)
def test_what_makes_a_forward_configuration_invalid(
    config: FwdConfig, head_dim: int, head_dim_v: int
) -> None:
    reasons = config.reasons_invalid(head_dim, head_dim_v)
    named = {
        "warpgroups": config.warpgroups not in (1, 2, 3),
        "tile_n": config.tile_n % 16 != 0 or not 16 <= config.tile_n <= 256,
        "kv_stages": config.kv_stages < 1,
        "query_rows": config.query_rows == 16
        or (config.query_rows == 8 and config.warpgroups != 1),
        "shared memory": shared_bytes(config, head_dim, head_dim_v) + 1024 > SMEM_BYTES,
        "registers:": 128 * config.producer_registers
        + 128 * config.warpgroups * config.consumer_registers
        > 65536,
        # S in 32 bits, P in 16 and O in 32, 64 rows by 128 threads.
        "registers a thread": config.tile_n * 64 // 128
        + config.tile_n * 64 // 256
        + round_up(head_dim_v, 16) * 64 // 128
        + 24
        > config.consumer_registers,
    }
    for name, expected in named.items():
        # Half a register is rounded one way or the other.
        if name == "registers a thread" and config.tile_n % 16:
            continue
        assert any(reason.startswith(name) for reason in reasons) == expected, (name, reasons)
    assert len(reasons) == len({reason.split(":")[0].split(" must")[0] for reason in reasons})


def shared_bytes(config: FwdConfig, head_dim: int, head_dim_v: int) -> int:
    """Q, and the stages of K and V, in 16 bits; rows padded to a multiple of 16."""
    h, hv = round_up(head_dim, 16), round_up(head_dim_v, 16)
    q = 64 * config.warpgroups * h
    return 2 * (q + config.kv_stages * config.tile_n * (h + hv))


@given(st.sampled_from([(64, 64), (128, 128), (72, 40)]))
def test_configurations_in_use_keep_their_promise(dims: tuple[int, int]) -> None:
    forward, backward = forward_config(*dims), backward_config(*dims)
    for config in (forward, backward):
        assert config.reasons_invalid(*dims) == []
        assert config.smem_bytes(*dims) <= SMEM_BYTES
        registers = config.warpgroups * config.consumer_registers + config.producer_registers
        assert 128 * registers <= 65536
        # setmaxnreg takes multiples of 8.
        assert config.consumer_registers % 8 == config.producer_registers % 8 == 0
    assert forward.tile_m == 64 * forward.warpgroups
    assert isinstance(backward, BwdConfig)
    assert backward.tile_n == 64 * backward.warpgroups


@pytest.mark.parametrize(
    ("arch", "seqlen_q", "group", "split"),
    [
        *((arch, T, 1, True) for arch in ("sm_90a", "sm_100a") for T in (1, 64)),
        *(("sm_90a", 65, 1, False), ("sm_90a", 8, 8, True), ("sm_90a", 9, 8, False)),
        *(("sm_90a", 300, 8, False), ("sm_100a", 128, 1, True), ("sm_100a", 129, 1, False)),
        *(("sm_100a", 16, 8, True), ("sm_100a", 17, 8, False)),
    ],
)
def test_only_one_row_of_tiles_is_split(arch: str, seqlen_q: int, group: int, split: bool) -> None:
    spec = AttentionSpec(0.125)
    query = jax.ShapeDtypeStruct((1, seqlen_q, 2 * group, 64), "bfloat16")
    key = jax.ShapeDtypeStruct((1, 8192, 2, 64), "bfloat16")
    operands = Operands(query=query, key=key, value=key)
    kernel = registry.kernel_key(spec, operands, "fwd", arch, 132)
    assert kernel.split_kv == split
    scratch = registry.scratch_shapes(kernel, operands)
    assert len(scratch) == (3 if split else 1)


@pytest.mark.parametrize(
    ("batch", "group", "keys", "how", "joins"),
    [
        (132, 4, 8192, {}, True),
        (40, 4, 8192, {}, False),  # so few that there are parts whatever the lengths
        (8, 4, 8192, {}, False),
        (132, 4, 8192, {"batch_invariant": True}, False),
        (132, 64, 8192, {}, True),
        (132, 64, 65536, {}, False),  # too much for one block
    ],
)
def test_parts_that_only_lengths_make_are_added_up_by_the_last_block(
    batch: int, group: int, keys: int, how: dict, joins: bool
) -> None:
    spec = dataclasses.replace(AttentionSpec(0.125), **how)
    query = jax.ShapeDtypeStruct((batch, 1, group, 64), "bfloat16")
    key = jax.ShapeDtypeStruct((batch, keys, 1, 64), "bfloat16")
    lengths = jax.ShapeDtypeStruct((batch,), "int32")
    operands = Operands(query=query, key=key, value=key, key_value_seq_lengths=lengths)
    kernel = registry.kernel_key(spec, operands, "fwd", "sm_90a", 132)
    assert kernel.split_kv
    assert kernel.config.joins_parts == joins
    scratch = registry.scratch_shapes(kernel, operands)
    assert scratch[3:] == ([((batch, 1), "int32")] if joins else [])


@pytest.mark.parametrize("is_sorted", [False, True])
def test_a_mask_that_no_kernel_evaluates_is_not_split(is_sorted: bool) -> None:
    """Its bounds are computed beforehand, which parts of the keys do without."""
    ends = jnp.asarray([5000, 300], jnp.int32)
    spec, operands = call_of(
        (2, 1, 16384),
        mask_mod=lambda b, h, q, kv: kv < (jnp.sort(ends) if is_sorted else ends)[b],
    )
    assert not registry.reasons_against(spec, operands, "fwd", "sm_90a")
    key = registry.kernel_key(spec, operands, "fwd", "sm_90a", 132)
    assert key.split_kv == (not is_sorted)
    assert (key.row_bounds is None) == (key.elements is not None) == key.split_kv


@pytest.mark.parametrize("head_dim", [8, 64, 128, 192, 256])
@pytest.mark.parametrize("head_dim_v", [8, 64, 128, 192, 256])
def test_few_rows_have_a_configuration(head_dim: int, head_dim_v: int) -> None:
    for config in (
        few_rows_config(head_dim, head_dim_v, 8),
        few_rows_config(head_dim, head_dim_v, 64),
        few_rows_config_sm100(head_dim, head_dim_v),
    ):
        assert config.tile_m == config.slab_rows
        assert not config.reasons_invalid(head_dim, head_dim_v)


@pytest.mark.parametrize(
    ("seqlen_q", "group", "rows"),
    [(1, 1, 8), (1, 8, 8), (3, 3, 64), (9, 1, 64), (5, 8, 64), (64, 1, 64)],
)
@pytest.mark.parametrize("present", [(), ("key_value_seq_lengths",)])
@pytest.mark.parametrize("keys", [512, 8192])
def test_few_queries_have_a_softmax_of_their_rows_alone(
    seqlen_q: int, group: int, rows: int, keys: int, present: tuple[str, ...]
) -> None:
    """Whether keys are divided or not: with head_dim 64 and prefill's tiles that took 1.46 times as
    long."""
    operands = shapes(64, seqlen_q, keys, N=8 * group, K=8, present=present)
    key = registry.kernel_key(SPEC, operands, "fwd", "sm_90a", 132)
    assert key.pack_gqa == (group > 1)
    assert (key.config.warpgroups, key.config.query_rows) == (1, rows)


@pytest.mark.parametrize("keys", [1, 511])
def test_few_queries_of_few_keys_have_the_configuration_of_many(keys: int) -> None:
    key = registry.kernel_key(SPEC, shapes(64, 1, keys), "fwd", "sm_90a", 132)
    assert key.config.warpgroups > 1


@pytest.mark.parametrize("present", [(), ("key_value_seq_lengths",)])
def test_heads_that_cannot_share_a_small_tile_share_a_large_one(present: tuple[str, ...]) -> None:
    """Each would load keys for itself; those of one sequence are better divided all the same."""
    for batch, is_few in ((64, False), (1, True)):
        operands = shapes(batch, 64, 8192, N=32, K=8, present=present)
        key = registry.kernel_key(SPEC, operands, "fwd", "sm_90a", 132)
        assert (key.config.tile_m == 64) == key.split_kv == is_few


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_batch_invariant_splits_do_not_follow_from_the_batch(arch: str) -> None:
    spec = dataclasses.replace(SPEC, batch_invariant=True)
    for S in (1000, 100_000):
        splits = set()
        for B in (1, 3, 500):
            operands = shapes(B, 1, S, N=16, present=("key_value_seq_lengths",))
            key = registry.kernel_key(spec, operands, "fwd", arch, 132)
            assert key.split_kv
            assert key.batch_invariant
            splits.add(registry.scratch_shapes(key, operands)[1][0][0])
        assert splits == {min(-(-S // 512), 128)}


# ---- gradients of what changes scores ------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("H", [64, 192, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_every_head_dim_has_gradients_of_biases(arch: str, H: int, deterministic: bool) -> None:
    how = {"present": ("bias",), "deterministic": deterministic, "H": H}
    assert reasons_against("bwd", arch, **how) == []


@pytest.mark.parametrize("H", [64, 256])
def test_deterministic_gradients_of_arrays_on_blackwell(H: int) -> None:
    """In passes too nothing but they has more than one order; the call without them has one kernel.

    Where the factor is read, a first run finds how large addends are.
    """
    by_head = jnp.ones(6)
    scaled, arrays = trace_score(lambda score, b, h, q, kv: score * by_head[h], jnp.float32)
    operands = dataclasses.replace(shapes(H=H), score_mod_arrays=arrays)
    keys = []
    for deterministic, constants in ((True, ()), (True, ("score_mod_arrays",)), (False, ())):
        spec = dataclasses.replace(
            SPEC, score_mod=scaled, deterministic=deterministic, constants=constants
        )
        assert not registry.reasons_against(spec, operands, "bwd", "sm_100a")
        keys.append(registry.kernel_key(spec, operands, "bwd", "sm_100a", 0))
    turns = [takes_turns(key.config) for key in keys]
    assert turns == ([True, True, False] if H == 64 else [False] * 3)
    assert [key.config.deterministic for key in keys] == [True, H == 64, False]
    # The exponent and the largest addend; how many blocks have added to dQ.
    taken = [len(registry.arrays_of(key)) for key in keys]
    assert taken[0] - taken[2] == 2 + takes_turns(keys[0].config)


def test_an_array_of_floats_is_read_by_element() -> None:
    table = jnp.ones(20)
    whole = trace_score(lambda score, b, h, q, kv: score + table.sum(), jnp.float32)
    single = trace_score(lambda score, b, h, q, kv: score * table[h] + table[q], jnp.float32)
    one = jnp.ones(1)
    only = trace_score(lambda score, b, h, q, kv: score * one[h], jnp.float32)
    for (function, arrays), served in ((whole, False), (single, True), (only, True)):
        operands = dataclasses.replace(shapes(), score_mod_arrays=arrays)
        spec = dataclasses.replace(SPEC, score_mod=function)
        reasons = registry.reasons_against(spec, operands, "bwd", "sm_90a")
        assert all("of an array of floats as a whole, at" in r or "than 16" in r for r in reasons)
        assert served == (not reasons)


@pytest.mark.parametrize(
    ("shape", "dtype", "group", "itemsize", "cluster"),
    [
        ((1, 1, 512, 512), "float32", 2, 4, 2),
        ((2, 6, 512, 512), "bfloat16", 3, 2, 1),
        ((1, 1, 512, 512), "bfloat16", 2, 2, 2),
        ((1, 1, 512, 516), "float32", 2, 4, 2),
        ((1, 1, 512, 516), "bfloat16", 2, 0, 1),
        ((1, 1, 512, 513), "float32", 2, 0, 1),
        ((1, 1, 1, 512), "float32", 2, 0, 1),
    ],
)
def test_a_bias_over_queries_and_keys(
    monkeypatch: pytest.MonkeyPatch, shape, dtype: str, group: int, itemsize: int, cluster: int
) -> None:
    """It comes by TMA where its rows begin at multiples of 16 bytes."""
    monkeypatch.setenv(plan.ARCH_VARIABLE, "sm_90a")
    query = jax.ShapeDtypeStruct((2, 512, 2 * group, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((2, shape[3], 2, 128), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    found = registry.kernel_key(
        SPEC, Operands(query, key, key, bias=bias), "fwd", "sm_90a", num_sms=132
    )
    assert (found.config.bias_itemsize, found.config.cluster) == (itemsize, cluster)
    told = explain(query, key, key, bias=bias).bias
    ways = ("TMA, to shared memory", "loads of each thread")
    assert told == (None if shape[2] == 1 else ways[0 if itemsize else 1])


ROWS, KEYS, HEADS = 512, 400, 4
TABLE = jnp.zeros((ROWS, KEYS))
OF_HEADS = jnp.zeros((HEADS, ROWS, KEYS), jnp.bfloat16)
OF_MORE_ROWS = jnp.zeros((ROWS + 1, KEYS))


@pytest.mark.parametrize(
    ("score_mod", "full"),
    [
        (lambda score, b, h, q, kv: score + TABLE[q, kv], "ts"),
        (lambda score, b, h, q, kv: OF_HEADS[h, q, kv] + score, "nts"),
        (lambda score, b, h, q, kv: score - TABLE[q, kv], None),
        (lambda score, b, h, q, kv: score + 2 * TABLE[q, kv], None),
        (lambda score, b, h, q, kv: score + TABLE[q - 1, kv], None),
        (lambda score, b, h, q, kv: score + TABLE[q, kv] + TABLE[0, kv], None),
        (lambda score, b, h, q, kv: score + TABLE.T[kv, q], None),
        (lambda score, b, h, q, kv: score + OF_MORE_ROWS[q, kv], None),
        (lambda score, b, h, q, kv: score + TABLE[q, kv].astype(jnp.bfloat16), None),
    ],
)
@pytest.mark.parametrize("feature", [None, "q_offset", "logits_soft_cap"])
def test_a_score_that_is_a_bias(score_mod, full: str | None, feature: str | None) -> None:
    """Where the array is one of rows and keys, and adding its elements is all that is done."""
    traced, arrays = trace_score(score_mod, jnp.float32)
    query = jax.ShapeDtypeStruct((2, ROWS, HEADS, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((2, KEYS, 2, 128), jnp.bfloat16)
    integers = jax.ShapeDtypeStruct((2,), jnp.int32)
    operands = Operands(query, key, key, batch_index=integers, score_mod_arrays=arrays)
    spec = dataclasses.replace(SPEC, score_mod=traced)
    if feature == "q_offset":
        operands = dataclasses.replace(operands, q_offset=integers)
    elif feature is not None:
        spec = dataclasses.replace(spec, logits_soft_cap=5.0)
    found = registry.kernel_key(spec, operands, "fwd", "sm_90a", num_sms=132)
    is_bias = full is not None and feature is None
    assert (found.elements.table is not None) == (found.config.bias_itemsize > 0) == is_bias
    if is_bias:
        assert found.elements.bias.full == full
        assert found.elements.score_mod is None
    backward = registry.kernel_key(spec, operands, "bwd", "sm_90a", num_sms=132)
    assert backward.elements.score_mod is not None
