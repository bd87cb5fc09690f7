"""Every synchronisation of the Blackwell forward matters, and the simulator notices each.

Slow, about half an hour of a core: ``python -m pytest --run-slow -s -n 0
tests/simulator/test_mutation_sm100.py``.
"""

import dataclasses
from collections import Counter

import ml_dtypes
import numpy as np
import pytest

from jax_flashcute.kernels import registry
from jax_flashcute.spec import Operands
from tests.cases import Case
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


@dataclasses.dataclass(frozen=True)
class Equivalent:
    """Changes that nothing notices: of this kind, of or near this line, so many, and why."""

    what: str
    text: str
    count: int
    reason: str


WAITS_OF_LOADS = 11
WARP_SYNCS = 7

EQUIVALENT = [
    Equivalent(
        "ignore mbarrier wait",
        "write_work(work[None, t_stage], (Int32(-1),)",
        9,
        "before the load warp ends it waits for every stage; the last products empty the last "
        "stage of V, and once they are done so are those before them, which emptied the others",
    ),
    Equivalent(
        "remove tcgen05.wait",
        "tcgen05.wait::ld",
        WAITS_OF_LOADS,
        "the simulator lets a load end where its registers are first used (its README), so it "
        "cannot tell",
    ),
    Equivalent(
        "remove bar.warp.sync",
        "with cute.arch.elect_one():",
        WARP_SYNCS,
        "between the wait for a warp's accesses to tensor memory, which is the whole warp's, "
        "and the arrival of one lane: the lanes have met",
    ),
    Equivalent(
        "ignore mbarrier wait",
        "cute.copy(tma, source[None, index]",
        1,
        "both query tiles' places are given back after the last S of both, so the wait for the "
        "first is one for the second",
    ),
]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_mutant_is_killed() -> None:
    arrays = CASE.arrays(BF16)
    operands = Operands(**arrays)
    key = registry.kernel_key(CASE.spec(), operands, "fwd", "sm_100a", 2)
    kernel = kernel_of(key).with_lines()
    names = ["query", "key", "value", *(n for n in registry.OPTIONAL_OPERANDS if n in arrays)]
    inputs = [np.asarray(arrays[name]) for name in names]
    outputs = [(operands.query.shape, BF16), (operands.query.shape[:3], np.dtype(np.float32))]
    outputs += [(s, np.dtype(n)) for s, n in registry.scratch_shapes(key, operands)]
    same = same_results(simulate(kernel, *inputs, outputs=outputs))
    report = lambda outcome: print(outcome, flush=True)  # noqa: E731
    outcomes = mutation.judge_all(kernel, inputs, outputs, same, report=report)
    assert len(outcomes) > 250
    unused = mutation.unused_barriers(outcomes)
    survivors = [o.mutant for o in outcomes if o.reason is None and o.mutant.line not in unused]
    unexplained = without_equivalents(kernel.ptx, survivors)
    assert not unexplained, "\n".join(map(str, unexplained))


def without_equivalents(ptx: str, survivors: list[mutation.Mutant]) -> list[mutation.Mutant]:
    """Those that ``EQUIVALENT`` does not explain, each entry as many as it says."""
    explained: Counter[Equivalent] = Counter()
    rest = []
    for mutant in survivors:
        lines = [mutant.before, *mutation.sources(ptx, mutant.line, "sm100/load.py", 1)]
        lines += mutation.sources(ptx, mutant.line, ".py")
        fitting = [
            e
            for e in EQUIVALENT
            if e.what == mutant.what
            and any(e.text in line for line in lines)
            and explained[e] < e.count
        ]
        if fitting:
            explained[fitting[0]] += 1
        else:
            rest.append(mutant)
    return rest
