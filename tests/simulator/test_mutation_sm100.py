"""Every synchronisation of the Blackwell kernels matters, and the simulator notices each.

Slow, half an hour of a core for the forward, a quarter for the backward of single blocks, half an
hour for that of pairs and more than one for that in passes: ``python -m pytest --run-slow -s -n 0
tests/simulator/test_mutation_sm100.py``.  ``MUTATION_WORKERS=16`` in the environment spreads the
changes over as many processes. Those of the forward, of pairs and of passes have been run on the
kernels of commit db97622, in parts: of the forward 338, 300 noticed, 38 listed; of pairs 281, 245
noticed, 2 of a barrier that nothing uses, 34 listed; of passes 519, 443 noticed, 8 of such
barriers, 68 listed. Those of passes ran with three tiles of queries and two of keys; with the
case as it is, what its fourth tiles are for (noticed) and thirteen that are listed.
"""

import dataclasses
import os
from collections import Counter

import ml_dtypes
import numpy as np
import pytest

from jax_flashcute.kernels import registry
from jax_flashcute.kernels.config.sm100 import backward_config_sm100
from jax_flashcute.kernels.key import OPTIONAL_OPERANDS
from jax_flashcute.spec import Operands
from tests.cases import Case
from tests.kernels.backward_launchers import launcher, scratch_of
from tests.kernels.test_backward_simulated import expected
from tests.simulator import mutation, simulate
from tests.simulator.compiled import kernel_of
from tests.simulator.test_mutation import same_results

BF16 = np.dtype(ml_dtypes.bfloat16)
CASE = Case(
    batch=1,
    seqlen_q=600,
    seqlen_k=1600,
    kv_heads=1,
    group=2,
    head_dim=64,
    head_dim_v=64,
    window=(None, 330),
    lengths=True,
)
"""Three tiles of work a block, of more key tiles than a ring has stages, the last one cut short."""
BACKWARD_CASE = Case(
    batch=1,
    seqlen_q=300,
    seqlen_k=260,
    kv_heads=1,
    group=2,
    head_dim=128,
    head_dim_v=128,
    window=(None, 30),
    lengths=True,
)
"""Of three blocks one is full, one cut short and one empty; more tiles than a ring has stages, the
last of each head cut short; dP and dQ in the same columns of tensor memory."""

PAIRS_CASE = dataclasses.replace(BACKWARD_CASE, group=1, seqlen_q=400, seqlen_k=600)
"""Of three pairs of blocks one is full, one has a block cut short and one without keys, and one is
empty; each loop is followed by more tiles."""
PASSES_CASE = dataclasses.replace(
    BACKWARD_CASE, group=1, seqlen_q=400, seqlen_k=776, head_dim=256, head_dim_v=256
)
"""Half the keys are there: four tiles of either side, the last of each cut short, and three empty
blocks.  With three tiles a barrier of 4 that counts 3 was not noticed: it is a phase ahead, and a
wait for it hangs, at the fourth."""
WORKERS = int(os.environ.get("MUTATION_WORKERS", "1"))


@dataclasses.dataclass(frozen=True)
class Equivalent:
    """Changes that nothing notices: of this kind, of or near this line, so many, and why.

    ``file``: whose lines are looked at, the nearest one before a change and the nearest after it.
    """

    what: str
    text: str
    count: int
    reason: str
    file: str | None = None


LOADS = (
    "the simulator lets a load end where its registers are first used (its README), so it cannot "
    "tell"
)
MET = (
    "between the wait for a warp's accesses to tensor memory, which is the whole warp's, and the "
    "arrival of one lane: the lanes have met"
)
S_READ = (
    "for dK and dQ: S of a tile's half is read before its dS is stored, and the product of that dS "
    "comes before the S that is written over it"
)
CORRECTION_FILE = "sm100/correction.py"
LOAD_FILE, REDUCE_FILE = "sm100/backward_load.py", "sm100/backward_reduce.py"
GRADIENTS_FILE = "sm100/backward_gradients.py"
PASSES_GRADIENTS_FILE = "sm100/passes_gradients.py"
PASSES_LOAD_FILE = "sm100/passes_load.py"
PASSES_PRODUCTS_FILE = "sm100/passes_products.py"
WAITS_OF_LOADS = 11
WARP_SYNCS = 14


def of_reductions(copies: int) -> list[Equivalent]:
    """Of giving tensor memory back and of the dQ warps, which have so many copies in turn."""
    return [
        Equivalent(
            "remove tcgen05.fence",
            "cute.arch.fence_view_async_shared()",
            2,
            "after the last loads of all, which have been waited for: tensor memory is only "
            "given back",
            GRADIENTS_FILE,
        ),
        Equivalent(
            "remove griddepcontrol.wait",
            "entry = Int64(batch) * heads + kv_head * kernel.group + g",
            1,
            "of the dQ warps: dQ is a product of Q, which the load warp loads after a wait of "
            "its own",
            REDUCE_FILE,
        ),
        Equivalent(
            "remove bar.warp.sync",
            "cute.autovec_copy(",
            copies,
            "between one lane's wait for its bulk reduction and stores of all over what that "
            "read: the simulator does not see a lane overwrite what another one's copy reads "
            "(its README)",
            REDUCE_FILE,
        ),
        Equivalent("remove bar.warp.sync", "if cute.arch.lane_idx() == 0:", 1, MET, REDUCE_FILE),
    ]


EQUIVALENT = [
    Equivalent(
        "ignore mbarrier wait",
        "write_work(work[None, t_stage], (Int32(-1),)",
        9,
        "before the load warp ends it waits for every stage; the last products empty the last "
        "stage of V, and once they are done so are those before them, which emptied the others",
    ),
    Equivalent(
        "wait for the other parity",
        "write_work(work[None, t_stage], (Int32(-1),)",
        2,
        "passes where it comes before the products are done: as good as ignored",
    ),
    Equivalent(
        "remove tcgen05.wait",
        "tcgen05.wait::ld",
        WAITS_OF_LOADS,
        LOADS,
    ),
    Equivalent(
        "remove bar.warp.sync",
        "with cute.arch.elect_one():",
        WARP_SYNCS,
        MET,
    ),
    Equivalent(
        "ignore mbarrier wait",
        "cute.copy(tma, source[None, index]",
        1,
        "both query tiles' places are given back after the last S of both, so the wait for the "
        "first is one for the second",
    ),
    Equivalent(
        "remove tcgen05.fence",
        "if n_min < n_max:",
        1,
        "of the first query tile's O: the same warps fence again before they give back the "
        "second's factor, which the next S waits for, and O after S",
        CORRECTION_FILE,
    ),
]
BACKWARD_EQUIVALENT = [
    Equivalent("remove tcgen05.wait", "tcgen05.wait::ld", 18, LOADS),
    Equivalent(
        "remove fence",
        "cute.arch.sync_warp()",
        1,
        "of K, whose rows are cleared before those of V: products wait for Q, too, which comes "
        "after the fence of V",
        LOAD_FILE,
    ),
    Equivalent(
        "remove bar.warp.sync",
        "with cute.arch.elect_one():",
        2,
        "of K and of V, which are read with Q and dO alone; those arrive after a wait of the whole "
        "warp, which the simulator takes for a meeting of its lanes",
        LOAD_FILE,
    ),
    Equivalent(
        "ignore mbarrier wait",
        "cute.arch.fence_view_async_tmem_load()",
        4,
        "S, waited for, is a product of Q, which was waited for, and LSE2 comes with Q; "
        "and so it is with dP, dO and dPsum",
        GRADIENTS_FILE,
    ),
    Equivalent(
        "remove bar.warp.sync", "cute.arch.fence_view_async_tmem_load()", 2, MET, GRADIENTS_FILE
    ),
    *of_reductions(4),
]

PAIRS_EQUIVALENT = [
    Equivalent("remove tcgen05.wait", "tcgen05.wait::ld", 16, LOADS),
    *(
        Equivalent(
            "ignore mbarrier wait",
            text,
            2,
            "S, waited for, is a product of Q of both blocks, waited for by the first, and LSE2 "
            "comes with Q; and so it is with dP, dO and dPsum",
            GRADIENTS_FILE,
        )
        for text in ("cute.arch.fence_view_async_tmem_load()", "ds_row += phase & zero")
    ),
    Equivalent(
        "remove bar.warp.sync",
        "return *following_q",
        2,
        "the lanes have met after their stores of dS, where dP is given back, and the one that "
        "arrives fences after that",
        GRADIENTS_FILE,
    ),
    *of_reductions(2),
    Equivalent(
        "remove fence",
        "cute.arch.sync_warp()",
        2,
        "of K and of V, whose rows are cleared before those of K^T: products wait for Q, too, "
        "which comes after the fence of K^T",
        LOAD_FILE,
    ),
    Equivalent(
        "remove fence",
        "cute.arch.sync_warp()",
        1,
        "of K^T: dQ alone reads it, after dS, which the gradient warps fence when they have waited "
        "for Q, which comes after K^T is cleared",
        LOAD_FILE,
    ),
    Equivalent(
        "remove bar.warp.sync",
        "with cute.arch.elect_one():",
        2,
        "of K and of V: products wait for Q, too, which comes after the lanes have met at K^T",
        LOAD_FILE,
    ),
    Equivalent(
        "remove bar.warp.sync",
        "with cute.arch.elect_one():",
        1,
        "of K^T, which is read after Q; that arrives after a wait of the whole warp, which the "
        "simulator takes for a meeting of its lanes",
        LOAD_FILE,
    ),
]
PASSES_EQUIVALENT = [
    Equivalent("remove tcgen05.wait", "tcgen05.wait::ld", 31, LOADS),
    Equivalent(
        "remove bar.warp.sync",
        "cute.arch.sync_warp()",
        2,
        "for dV, of K, which is read with Q alone, and of the first half of dO, which is read "
        "after S of the second half: Q of either arrives after a wait of the whole warp, which "
        "the simulator takes for a meeting of its lanes",
        LOAD_FILE,
    ),
    Equivalent(
        "remove bar.warp.sync",
        "cute.arch.sync_warp()",
        2,
        "for dK, of K, for dQ, of Q: products wait for V, or dO, too, where the lanes meet later",
        LOAD_FILE,
    ),
    Equivalent(
        "remove bar.warp.sync",
        "cute.arch.sync_warp()",
        2,
        "for dK, of V, for dQ, of dO: read with the tiles alone, which arrive after a wait of the "
        "whole warp, which the simulator takes for a meeting of its lanes",
        LOAD_FILE,
    ),
    Equivalent(
        "remove fence",
        "cute.arch.fence_view_async_shared()",
        1,
        "for dV, of the first half of dO: where it has rows to clear so has the second half of Q, "
        "which is cleared and fenced later, and whose S comes before the product of dO",
        LOAD_FILE,
    ),
    Equivalent(
        "remove fence",
        "cute.arch.fence_view_async_shared()",
        2,
        "for dK, of K, for dQ, of Q: products wait for V, or dO, too, which has as many rows and "
        "is cleared and fenced later",
        LOAD_FILE,
    ),
    Equivalent(
        "ignore mbarrier wait",
        "b = mma.make_fragment_B(part.partition_B(others))",
        4,
        S_READ,
        PASSES_PRODUCTS_FILE,
    ),
    Equivalent(
        "remove tcgen05.fence",
        "b = mma.make_fragment_B(part.partition_B(others))",
        4,
        S_READ,
        PASSES_PRODUCTS_FILE,
    ),
    Equivalent(
        "ignore mbarrier wait",
        "gemm(mma, acc, a, b[None, None, None, stage], accumulate)",
        2,
        "for dK, of dS of the half before: dO of this half, which was waited for, came into the "
        "one stage that the gradient warps give back after they have stored dS",
        PASSES_PRODUCTS_FILE,
    ),
    Equivalent(
        "remove tcgen05.commit",
        "gemm(mma, acc, a, b[None, None, None, stage], accumulate)",
        3,
        "of the last product of all, which gives back a stage that no tile follows in",
        PASSES_PRODUCTS_FILE,
    ),
    Equivalent(
        "ignore mbarrier wait",
        "cute.arch.fence_view_async_tmem_load()",
        3,
        "S, waited for, is a product of Q, which was waited for, and LSE2 comes with Q; "
        "and so it is with dP, dO and dPsum",
        PASSES_GRADIENTS_FILE,
    ),
    Equivalent("remove bar.warp.sync", "cute.arch.sync_warp()", 5, MET, PASSES_GRADIENTS_FILE),
    Equivalent(
        "remove bar.warp.sync",
        "start = m * ROWS + half * HALF",
        1,
        "for dK, of LSE2: its stage is given back by the product of dS, too, which the lanes "
        "store, and meet, after they have read LSE2",
        PASSES_GRADIENTS_FILE,
    ),
    Equivalent("remove tcgen05.fence", "cute.arch.sync_warp()", 2, S_READ, PASSES_GRADIENTS_FILE),
    Equivalent(
        "remove tcgen05.fence",
        "cute.arch.fence_view_async_shared()",
        3,
        "after the last loads of all, which have been waited for: tensor memory is only given back",
        PASSES_GRADIENTS_FILE,
    ),
    Equivalent(
        "ignore mbarrier wait",
        "has_tail = rows_here < self.kernel.config.half",
        1,
        "for dQ, of V's one stage before a tile's first half: the place of K, waited for before, "
        "is given back by a product that comes after the last of V's",
        PASSES_LOAD_FILE,
    ),
]
BACKWARDS = {
    "alone": (BACKWARD_CASE, BACKWARD_EQUIVALENT, 200),
    "pairs": (PAIRS_CASE, PAIRS_EQUIVALENT, 250),
    "passes": (PASSES_CASE, PASSES_EQUIVALENT, 400),
}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_mutant_is_killed() -> None:
    arrays = CASE.arrays(BF16)
    # Maxima grow in the tile that is visited last, too: O is rescaled before its last product.
    arrays["key"] = arrays["key"].at[:, :128].multiply(8)
    operands = Operands(**arrays)
    key = registry.kernel_key(CASE.spec(), operands, "fwd", "sm_100a", 2)
    kernel = kernel_of(key).with_lines()
    names = ["query", "key", "value", *(n for n in OPTIONAL_OPERANDS if n in arrays)]
    inputs = [np.asarray(arrays[name]) for name in names]
    outputs = [(operands.query.shape, BF16), (operands.query.shape[:3], np.dtype(np.float32))]
    scratch = registry.scratch_shapes(key, operands)
    judge(kernel, inputs, outputs, scratch, EQUIVALENT, least=250)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", BACKWARDS)
def test_every_mutant_of_the_backward_is_killed(name: str) -> None:
    case, equivalent, least = BACKWARDS[name]
    config = backward_config_sm100(case.head_dim, case.head_dim_v, may_pair=name == "pairs")
    kernel = launcher(case, "bfloat16", config=config, arch="sm_100a").compiled().with_lines()
    inputs, gradients = expected(case, "bfloat16")
    outputs = [(gradients[name].shape, BF16) for name in ("query", "key", "value")]
    judge(kernel, inputs, outputs, scratch_of(case, config), equivalent, least)


def judge(kernel, inputs, outputs, scratch, equivalent: list[Equivalent], least: int) -> None:
    """Fails where a change that is not ``equivalent`` survives, or ``least`` are not tried."""
    count = len(outputs)
    outputs = outputs + [(shape, np.dtype(name)) for shape, name in scratch]
    same = same_results(simulate(kernel, *inputs, outputs=outputs), count)
    report = lambda outcome: print(outcome, flush=True)  # noqa: E731
    outcomes = mutation.judge_all(kernel, inputs, outputs, same, report=report, workers=WORKERS)
    assert len(outcomes) > least
    unused = mutation.unused_barriers(outcomes)
    survivors = [o.mutant for o in outcomes if o.reason is None and o.mutant.line not in unused]
    unexplained = without_equivalents(kernel.ptx, survivors, equivalent)
    assert not unexplained, "\n".join(map(str, unexplained))


def without_equivalents(
    ptx: str, survivors: list[mutation.Mutant], equivalent: list[Equivalent]
) -> list[mutation.Mutant]:
    """Those that ``equivalent`` does not explain, each entry as many as it says."""
    explained: Counter[Equivalent] = Counter()
    rest = []
    for mutant in survivors:
        fitting = [
            e
            for e in equivalent
            if e.what == mutant.what and explained[e] < e.count and is_near(ptx, mutant, e)
        ]
        if fitting:
            explained[fitting[0]] += 1
        else:
            rest.append(mutant)
    return rest


def is_near(ptx: str, mutant: mutation.Mutant, entry: Equivalent) -> bool:
    lines = [mutant.before]
    if entry.file is not None:
        lines += mutation.sources(ptx, mutant.line, entry.file, 1)
    else:
        lines += mutation.sources(ptx, mutant.line, "sm100/load.py", 1)
        lines += mutation.sources(ptx, mutant.line, ".py")
    return any(entry.text in line for line in lines)
