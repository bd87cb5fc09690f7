"""What of a mask or a score depends on the key, and how: from a traced program, without running it.

Every value of a program is uniform over the keys, affine in ``kv`` with a constant coefficient, or
arbitrary; a mask is reduced, where it can be, to a union of intervals ``lo <= kv < hi`` whose
bounds do not depend on ``kv``.  Unknown means arbitrary: nothing is guessed.

Positions and key numbers are taken to be below ``POSITION_LIMIT`` in magnitude.  Arithmetic whose
result could then leave int32 is arbitrary, so the programs' wrap-around is never reasoned away.
"""

from jax_flashcute.analysis.integers import (
    FAR,
    POSITION_LIMIT,
    Extreme,
    Linear,
    Opaque,
    Quotient,
    depends_on,
    evaluate,
    first_reaching,
    trend,
)
from jax_flashcute.analysis.key_sets import Guard, Interval, KeySet, intersection
from jax_flashcute.analysis.programs import (
    Program,
    Step,
    analyse,
    key_set,
    load_of,
    loads,
    understand,
)
from jax_flashcute.analysis.windows import (
    RowInterval,
    rising_interval,
    rising_union,
    row_interval,
    window,
    window_interval,
)

__all__ = [
    "FAR",
    "POSITION_LIMIT",
    "Extreme",
    "Guard",
    "Interval",
    "KeySet",
    "Linear",
    "Opaque",
    "Program",
    "Quotient",
    "RowInterval",
    "Step",
    "analyse",
    "depends_on",
    "evaluate",
    "first_reaching",
    "intersection",
    "key_set",
    "load_of",
    "loads",
    "rising_interval",
    "rising_union",
    "row_interval",
    "trend",
    "understand",
    "window",
    "window_interval",
]
