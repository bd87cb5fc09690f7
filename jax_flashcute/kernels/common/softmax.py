"""Online softmax in base 2 over rows that a thread owns (Blackwell) or a quad of lanes shares.

Each lane holds, for every row it takes part in, some of the row's scores; the maximum is reduced
over the lanes at each tile, the sum only at the end.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from jax_flashcute.kernels.common.numbers import bits_of, float_of, select
from jax_flashcute.kernels.common.traced import Traced

LN2 = math.log(2.0)
LOG2_E = math.log2(math.e)
LARGEST_SCORE = 1e38
"""Scores above it count as it where they may be infinite: it is finite in base 2, too."""
FAR_SCORE = 2.0**27
"""From here on scores are equal or 16 apart, and in base 2 they are rounded by more than that."""
CHAINS = 4
"""Independent chains in a reduction along a row, so that latency does not bound it."""


def _reduce(values, combine):
    """Combines Python-unrolled values in a few independent chains."""
    chains = list(values[:CHAINS])
    for i, value in enumerate(values[CHAINS:]):
        chains[i % CHAINS] = combine(chains[i % CHAINS], value)
    while len(chains) > 1:
        chains = [
            combine(chains[i], chains[i + 1]) if i + 1 < len(chains) else chains[i]
            for i in range(0, len(chains), 2)
        ]
    return chains[0]


def quad_max(x: Float32) -> Float32:
    for offset in (2, 1):
        x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, offset=offset))
    return x


def quad_sum(x: Float32) -> Float32:
    for offset in (2, 1):
        x = x + cute.arch.shuffle_sync_bfly(x, offset=offset)
    return x


def exp2(x: Float32) -> Float32:
    return cute.math.exp2(x, fastmath=True)


POLYNOMIAL = (0.99992807, 0.69326099, 0.24261112, 0.05517167)
"""2**f for |f| <= 1/2, by powers of f: the cubic of least relative error, 7.5e-5 at most."""
SMALLEST_EXPONENT = -126.0
ROUNDING = 1.5 * 2.0**23
"""A float32 this large has no fraction: adding it rounds and leaves the integer in the low bits."""


def exp2_pair(x: tuple[Float32, Float32]) -> tuple[Float32, Float32]:
    """2**x of two numbers on the FMA pipes, within 7.6e-5 of it, relatively.

    x below ``SMALLEST_EXPONENT`` counts as that, -inf too; x must be below 128.  NaN stays NaN.
    """
    x0, x1 = (cute.arch.fmax(value, SMALLEST_EXPONENT, nan=True) for value in x)
    rounded = cute.arch.add_packed_f32x2((x0, x1), _twice(ROUNDING))
    whole = cute.arch.add_packed_f32x2(rounded, _twice(-ROUNDING))
    fraction = cute.arch.sub_packed_f32x2((x0, x1), whole)
    power = _twice(POLYNOMIAL[-1])
    for coefficient in POLYNOMIAL[-2::-1]:
        power = cute.arch.fma_packed_f32x2(power, fraction, _twice(coefficient))
    return cute.arch.mul_packed_f32x2(power, tuple([_two_to(value) for value in rounded]))


def _twice(value: float) -> tuple[Float32, Float32]:
    return Float32(value), Float32(value)


def _two_to(rounded: Float32) -> Float32:
    """2**n from n + ``ROUNDING``: n's low bits become the exponent's."""
    return float_of((bits_of(rounded) << 23) + Int32(0x3F800000))


class OnlineSoftmax(Traced):
    """Running maximum and sum of each row a thread takes part in.

    ``row_max`` holds the maximum that the sums and O are relative to, in units of the raw scores.
    With a rescale threshold it may lag behind the true maximum by that many powers of two, so
    probabilities may reach 2**threshold; the normalisation at the end removes the factor exactly.
    """

    def __init__(
        self,
        rows: int,
        scale: float,
        rescale_threshold: float,
        lanes_per_row: int = 4,
        *,
        any_scores: bool = False,
    ):
        """``lanes_per_row``: 4 where quads share rows, 1 where a thread owns its rows;
        ``any_scores``: these may be as large as a float32, as what hides by a large number is."""
        if lanes_per_row not in (1, 4):
            raise ValueError(f"lanes_per_row must be 1 or 4, got {lanes_per_row}")
        self.rows = rows
        self.lanes_per_row = lanes_per_row
        self.any_scores = any_scores
        self.scale = scale
        self.scale_log2 = scale * LOG2_E
        self.threshold = rescale_threshold
        self.row_max = cute.make_rmem_tensor(rows, Float32)
        self.row_sum = cute.make_rmem_tensor(rows, Float32)

    def reset(self) -> None:
        self.row_max.fill(-Float32.inf)
        self.row_sum.fill(0.0)

    @cute.jit
    def step(
        self,
        scores: cute.Tensor,
        row_scale: cute.Tensor,
        is_first: cutlass.Constexpr[bool],
        may_be_empty: cutlass.Constexpr[bool],
        shifts: list | None = None,
    ):
        """Turns a tile's raw scores into probabilities and updates the statistics.

        Args:
          scores: (rows, columns) registers, overwritten by exp2(scale_log2 * (score - row_max)).
          row_scale: (rows,) registers: the factor that O accumulated so far must take.
          is_first: no tile came before; O has nothing to rescale.
          may_be_empty: a row may have seen only hidden keys (-inf) up to here.
          shifts: for each row what is to be added to all its scores of this tile.

        Returns:
          1 where some lane of the warp has a factor other than 1, else 0.
        """
        needs_rescale = Int32(0)
        for r in cutlass.range_constexpr(self.rows):
            shift = None if const_expr(shifts is None) else shifts[r]
            base, factor = self.raise_max(scores, r, is_first, may_be_empty, shift)
            row_scale[r] = factor
            if const_expr(not is_first):
                needs_rescale = needs_rescale | Int32(factor != 1.0)
            self.exponentiate(scores, r, base, factor, is_first)
        return needs_rescale

    @cute.jit
    def raise_max(
        self,
        scores: cute.Tensor,
        r: cutlass.Constexpr[int],
        is_first: cutlass.Constexpr[bool],
        may_be_empty: cutlass.Constexpr[bool],
        shift: Float32 | None = None,
    ):
        """First half of ``step`` for row r: (what to subtract from its scores, O's factor)."""
        columns = cute.size(scores, mode=[1])
        tile_max = _reduce(
            [scores[r, c] for c in range(columns)], lambda a, b: cute.arch.fmax(a, b)
        )
        if const_expr(self.lanes_per_row == 4):
            tile_max = quad_max(tile_max)
        least_base = tile_max
        if const_expr(shift is not None):
            if const_expr(may_be_empty):
                # What is added to a row that sees no key may be NaN.
                shift = select(tile_max == -Float32.inf, Float32(0.0), shift)
            if const_expr(self.threshold > 0):
                least_base = tile_max - self.threshold / self.scale_log2
            tile_max = tile_max + shift
        previous = self.row_max[r]
        if const_expr(is_first):
            row_max = tile_max
        else:
            row_max = cute.arch.fmax(previous, tile_max)
            if const_expr(self.threshold > 0):
                # -inf - -inf is NaN and compares false, which keeps -inf: right as well.
                if not (row_max - previous) * self.scale_log2 > self.threshold:
                    row_max = previous
        self.row_max[r] = row_max
        base = row_max
        if const_expr(may_be_empty):
            base = Float32(0.0) if row_max == -Float32.inf else row_max
        factor = Float32(1.0)
        if const_expr(not is_first):
            factor = exp2((previous - base) * self.scale_log2)
        if const_expr(shift is not None):
            # A large shift absorbs the maximum: without this bound exponentials would overflow.
            base = cute.arch.fmax(base - shift, least_base, nan=True)
        return base, factor

    def unit(self, base: Float32) -> Float32 | float:
        """What brings scores and ``base`` to base 2, or to less where they are ``FAR_SCORE``.

        There it is a power of two: rounded, a base in base 2 would be far from its score.
        """
        if not self.any_scores:
            return self.scale_log2
        power = 2.0 ** math.floor(math.log2(self.scale_log2))
        is_near = cute.math.absf(base) < Float32(FAR_SCORE / self.scale)
        return select(is_near, Float32(self.scale_log2), Float32(power))

    @cute.jit
    def exponentiate(
        self,
        scores: cute.Tensor,
        r: cutlass.Constexpr[int],
        base: Float32,
        factor: Float32,
        is_first: cutlass.Constexpr[bool],
    ):
        """Second half of ``step``: row r's probabilities and sum, from ``raise_max``'s results."""
        columns = cute.size(scores, mode=[1])
        if const_expr(not is_first):
            self.row_sum[r] = self.row_sum[r] * factor
        unit = self.unit(base)
        scaled_base = base * unit
        for c in cutlass.range_constexpr(columns):
            if const_expr(self.any_scores):
                scores[r, c] = exp2(cute.math.fma(scores[r, c], unit, -scaled_base))
            else:
                scores[r, c] = exp2(scores[r, c] * unit - scaled_base)
        tile_sum = _reduce([scores[r, c] for c in range(columns)], lambda a, b: a + b)
        if const_expr(is_first):
            self.row_sum[r] = tile_sum
        else:
            self.row_sum[r] = self.row_sum[r] + tile_sum

    def exponentiate_pairs(
        self, scores: cute.Tensor, base: Float32, sums: list, polynomial_every: int
    ) -> None:
        """``exponentiate`` for some columns of one row, two an instruction, but for the row's sum.

        Args:
          scores: (columns,) registers.
          sums: pairs that add up to the sum of the columns before; taken further.
          polynomial_every: one of so many pairs is left to ``exp2_pair``, which does not give 0
            where a score is -inf; 0 for none.
        """
        unit = self.unit(base)
        scaled_base = -(base * unit)
        for c in range(0, cute.size(scores), 2):
            x = cute.arch.fma_packed_f32x2(
                (scores[c], scores[c + 1]),
                (Float32(unit), Float32(unit)),
                (scaled_base, scaled_base),
            )
            on_fma = polynomial_every > 0 and c // 2 % polynomial_every == polynomial_every - 1
            pair = exp2_pair(x) if on_fma else (exp2(x[0]), exp2(x[1]))
            scores[c], scores[c + 1] = pair
            if len(sums) < CHAINS:
                sums.append(pair)
            else:
                chain = c // 2 % CHAINS
                sums[chain] = cute.arch.add_packed_f32x2(sums[chain], pair)

    def add_to_sum(self, sums: list, factor: Float32, is_first: bool) -> None:
        """Adds ``exponentiate_pairs``'s sums to that of row 0, which takes O's ``factor``."""
        even, odd = _reduce(sums, cute.arch.add_packed_f32x2)
        tile_sum = even + odd
        self.row_sum[0] = tile_sum if is_first else self.row_sum[0] * factor + tile_sum

    @cute.jit
    def finish(self, row_scale: cute.Tensor, lse: cute.Tensor, sinks: list | None = None):
        """Final factor of O and log-sum-exp (natural log) of each row; 0 and -inf where empty.

        ``sinks``: a logit of each row that takes part in the normaliser.
        """
        for r in cutlass.range_constexpr(self.rows):
            total = self.row_sum[r]
            if const_expr(self.lanes_per_row == 4):
                total = quad_sum(total)
            if const_expr(sinks is not None):
                self.finish_with_sink(row_scale, lse, r, total, sinks[r])
            else:
                is_empty = total == 0.0
                row_scale[r] = Float32(0.0) if is_empty else cute.arch.rcp_approx(total)
                lse[r] = -Float32.inf if is_empty else self.log_sum(r, total)

    def log_sum(self, r: int, total: Float32) -> Float32:
        """The log-sum-exp of row r, in units of the scaled scores."""
        log2_total = cute.math.log2(total, fastmath=True)
        if self.any_scores:
            return self.row_max[r] * self.scale + log2_total * LN2
        return (self.row_max[r] * self.scale_log2 + log2_total) * LN2

    @cute.jit
    def finish_with_sink(
        self, row_scale: cute.Tensor, lse: cute.Tensor, r: cutlass.Constexpr[int], total, sink
    ):
        """The same for one row with a sink, which may be far above or below all scores."""
        row_base = Float32(-Float32.inf)
        if total > 0.0:
            row_base = self.row_max[r] * self.scale_log2
        sink_base = sink * LOG2_E
        base = cute.arch.fmax(row_base, sink_base)
        is_empty = base == -Float32.inf
        base = Float32(0.0) if is_empty else base
        shrink = exp2(row_base - base)
        total = total * shrink + exp2(sink_base - base)
        row_scale[r] = Float32(0.0) if is_empty else shrink * cute.arch.rcp_approx(total)
        lse[r] = -Float32.inf if is_empty else (base + cute.math.log2(total, fastmath=True)) * LN2
