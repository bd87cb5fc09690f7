"""What a score adds to the products, as 16 more columns of the product, in the Hopper forward.

Where a score is ``score + a(row) + b(row) * column + c(key)``, nothing is done to single scores:

    X   a row's b as three bfloat16 numbers, each three times; a as three; 1, 1, 1; a zero
    Y   a key's distance from the first row's position as three numbers, three times; 1, 1, 1; c as
        three numbers; a zero

X Y^T is added by the tensor cores, in units of raw products.  Three bfloat16 numbers hold a
float32, and sums are in float32.  Here a is that of the first row's position, so that numbers are
no larger than what the score adds; what follows from the row alone the softmax adds to its maximum.

Where no warp is there to write such a Y, X is b as three numbers, and Y a column, of which each is
exact, three times; then the softmax adds a as well.

What a row adds to all keys of a tile alike, as a table does that is read by clipped distances, is a
part of a there; of the other tiles it is added to single scores.

Of what depends on the distance of a key alone, a warp's 16 rows have 15 more numbers than the tile
has columns: they are computed once, while the product is under way, and each score's is read from
shared memory.  Which tiles it differs in is known before the first, and these have a loop of their
own: a branch between a product and its softmax would keep the two from running side by side.  What
is affine while no sign changes, as a multiple of |q - kv| is, is so in the other tiles.

Each warpgroup writes X for itself at each tile of work; two warps beside the one that loads keys
write Y into a stage that belongs to theirs, half of it each: what they issue delays the softmax of
warps that run on the same part of the multiprocessor, for which others wait.
"""

import math
from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.memory import SmemAllocator

from jax_flashcute.kernels.common.elements import EntryElements
from jax_flashcute.kernels.common.numbers import float_of, select
from jax_flashcute.kernels.common.softmax import LOG2_E, OnlineSoftmax
from jax_flashcute.kernels.common.stretches import Stretch, leftwards
from jax_flashcute.kernels.common.tiles import round_pair, round_pairs, smem_layout, store_pairs
from jax_flashcute.kernels.common.traced import Traced
from jax_flashcute.kernels.config.memory import SMEM_BYTES, round_up
from jax_flashcute.kernels.config.sm90 import FwdConfig
from jax_flashcute.kernels.elements import ElementFunctions, program_of
from jax_flashcute.kernels.lowering.affine import Affine
from jax_flashcute.kernels.lowering.spans import Span
from jax_flashcute.kernels.sm90.fragments import (
    ADJACENT_COLUMNS,
    ROWS_PER_THREAD,
    column_step,
    first_column,
    gemm,
    row_in_slab,
    tiled_mma,
)

COLUMNS = 16
"""Of X and of Y: those of one matrix product."""
KEY_WARPS = 2
"""That write Y, where warps beside those that load keys do."""
KEYS_AT_ONCE = 32 * KEY_WARPS
"""Keys of a tile whose rows of Y these write together, a lane each."""
SCALES = (2.0**-20, 2.0**20)
"""Scales of a call between which raw products are no worse units than scaled ones."""
LARGEST = 2.0**126
"""Numbers are held below this, in either unit: what exceeds it, save infinity, counts as it."""
ROWS_PER_WARP = 16
BY_DISTANCE = ("tile", "distance", "bent")
"""Kinds of terms that may depend on the distance of a key alone."""
BARRIER = 4
"""The first of the named barriers, one for each warpgroup."""


class AddedTerms:
    """Whether and how the forward adds terms by a product; no traced values."""

    def __init__(
        self,
        functions: ElementFunctions,
        config: FwdConfig,
        scale: float,
        packed: bool,
        in_order: bool,
        has_idle_warp: bool,
    ):
        """``scale``: of the call; ``packed``: rows of one product are of different heads.

        ``in_order``: a tile of work visits one range of key tiles, from right to left.
        ``has_idle_warp``: of the producer's warpgroup.
        """
        self.functions = functions
        self.in_order, self.has_idle_warp = in_order, has_idle_warp
        self.config = config
        self.scale = scale
        self.kinds = functions.added_kinds(packed) or frozenset()
        self.by_distance = self._is_by_distance(packed)
        self.splits_stretches = in_order and self.by_distance and "distance" not in self.kinds
        if not self.splits_stretches:
            # Then every tile's numbers are computed by distance.
            self.kinds = frozenset("distance" if x == "bent" else x for x in self.kinds)
        self.multiplies = bool(self.kinds & {"affine", "key", "bent"})
        # Then maxima take no part in what is affine.
        affine = self.kinds & {"affine", "bent"}
        self.by_position = in_order and has_idle_warp and bool(affine)
        self.is_staged = "key" in self.kinds or self.by_position
        # In base 2 what is held may not exceed ``LARGEST`` either.
        self.largest = LARGEST * min(1.0, 1 / (scale * LOG2_E)) if scale > 0 else 0.0

    def serves(self, head_dim: int, head_dim_v: int) -> bool:
        """Whether it can do all that a call does to scores."""
        of_tiles = self.config.smem_bytes(head_dim, head_dim_v)
        return (
            bool(self.kinds)
            and ("distance" not in self.kinds or self.by_distance)
            and SCALES[0] <= self.scale <= SCALES[1]
            and of_tiles + self.smem_bytes() + 3072 * bool(self.smem_bytes()) <= SMEM_BYTES
            and (self.in_order or not self.is_staged)
            and (self.has_idle_warp or not self.is_staged)
        )

    def _is_by_distance(self, packed: bool) -> bool:
        if packed or not self.kinds & set(BY_DISTANCE):
            return False
        program = program_of(self.functions.score_mod, self.functions.keys)
        addends = [value for value, _ in program.addends() or ()]
        varying = [x for x in addends if program.kind_of(x) in BY_DISTANCE]
        return all(program.is_of_distance(value) for value in varying)

    def multiplies_in(self, is_varying: bool | None) -> bool:
        """Whether X Y^T is added in a loop of ``WarpgroupTerms.loops``."""
        return bool(self.kinds & {"affine", "key"}) or ("bent" in self.kinds and not is_varying)

    @property
    def distances(self) -> int:
        """Room for the numbers of a warp's rows and a tile's columns by distance."""
        return round_up(self.config.tile_n + ROWS_PER_WARP - 1, 32)

    def smem_bytes(self) -> int:
        """Of X, of Y, and of numbers by distance."""
        config = self.config
        x = COLUMNS * config.tile_m
        y = COLUMNS * config.tile_n * self.y_stages
        numbers = self.distances * 4 * config.warpgroups
        return 2 * self.multiplies * (x + y) + 4 * self.by_distance * numbers

    @property
    def y_stages(self) -> int:
        """Of Y: each belongs to a stage of keys, or to a warpgroup."""
        return self.config.kv_stages if self.is_staged else self.config.warpgroups

    def allocate(self, allocator: SmemAllocator) -> tuple:
        """X, Y and (distances, warps) in shared memory; None for what is not needed."""
        warpgroups, sD = self.config.warpgroups, None
        if self.by_distance:
            layout = cute.make_layout((self.distances, 4 * warpgroups))
            sD = allocator.allocate_tensor(Float32, layout, 16)
        if not self.multiplies:
            return None, None, sD
        layouts = (
            smem_layout(BFloat16, 64, COLUMNS, warpgroups),
            smem_layout(BFloat16, self.config.tile_n, COLUMNS, self.y_stages),
        )
        sX, sY = (
            allocator.allocate_tensor(BFloat16, x.outer, 1024, swizzle=x.inner) for x in layouts
        )
        return sX, sY, sD


class Terms(Traced):
    """Terms of a head of a batch entry, scaled as raw products are."""

    def __init__(self, plan: AddedTerms, entry: EntryElements, head: Int32):
        """``head``: of all rows, where terms of the key or the distance need one."""
        self.plan = plan
        self.entry = entry
        self.head = head
        self.of_head = entry.known_of(head=head)
        self.addends: list[tuple] = []
        if entry.elements.functions.score_mod is not None:
            self.program = entry.elements.programs["score_mod"]
            self.addends = self.program.addends()

    def _of_program(self, known: dict, kind: str) -> list:
        """The score's addends of one kind, each a number or ``Affine``."""
        found = []
        for value, is_subtracted in self.addends:
            if self.program.kind_of(value) == kind:
                term = self.program.addend(known["score_mod"], value)
                if is_subtracted:
                    term = Affine.negative(term) if isinstance(term, Affine) else -term
                found.append(term)
        return found

    def _of_bias(self, known: dict, kind: str) -> list[Float32]:
        bias = self.entry.elements.functions.bias
        if bias is None or kind != ("key" if "s" in bias.full else "row"):
            return []
        return [Float32(self.entry.load(self.entry.elements.bias, bias, known))]

    def _raw(self, terms: list[Float32]) -> Float32:
        if not terms:
            return Float32(0.0)
        total = sum(terms[1:], start=terms[0])
        raw = total * Float32(1.0 / self.plan.scale)
        # Infinity hides, and what is finite does not.
        largest, size = self.plan.largest, cute.math.absf(raw)
        bound = select(raw > Float32(0.0), Float32(largest), Float32(-largest))
        is_finite = cute.math.absf(total) < Float32(Float32.inf)
        return select((size > Float32(largest)) & is_finite, bound, raw)


def own_key(warp: Int32) -> Int32:
    """This lane's among ``KEYS_AT_ONCE``."""
    return 32 * warp + cute.arch.lane_idx()


class KeyTerms(Terms):
    """Y of each tile of keys, by warps beside the one that loads them."""

    def __init__(
        self,
        plan: AddedTerms,
        entry: EntryElements,
        head: Int32,
        reference: Int32,
        warp: Int32,
    ):
        """
        Args:
          reference: the key from which distances are counted, near those of the rows.
          warp: which of ``KEY_WARPS``.
        """
        super().__init__(plan, entry, head)
        self.reference = reference
        self.first = own_key(warp)

    def read(self, n: Int32) -> list[Float32]:
        """The terms of this lane's keys of a tile, on their way from memory."""
        found = []
        for step in range(0, self.plan.config.tile_n, KEYS_AT_ONCE):
            if "key" not in self.plan.kinds:
                found.append(Float32(0.0))
                continue
            key = n * self.plan.config.tile_n + step + self.first
            known = self.entry.both(self.of_head, self.entry.keys(key))
            found.append(self._raw(self._of_program(known, "key") + self._of_bias(known, "key")))
        return found

    @cute.jit
    def write(self, terms: list, sY: cute.Tensor, n: Int32, stage: Int32):
        """Writes Y of tile n from ``read``."""
        tile_n, is_half = self.plan.config.tile_n, not self.plan.by_position
        for i in cutlass.range_constexpr(len(terms)):
            column = self.first + KEYS_AT_ONCE * i
            numbers = (*_thrice(1.0), *thirds(terms[i]))
            if const_expr(self.plan.by_position):
                place = n * tile_n + column - self.reference
                numbers = (*thirds(Float32(place)) * 3, *numbers)
            else:
                # Of the second half of a row; the first one is zeros.
                numbers = (Float32(0.0), *numbers)
            if const_expr(tile_n % KEYS_AT_ONCE == 0):
                _store_row(sY[None, None, stage], column, numbers, is_half)
            else:
                if column < tile_n:
                    _store_row(sY[None, None, stage], column, numbers, is_half)
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()


@cute.jit
def clear_terms(plan: cutlass.Constexpr[AddedTerms], sY: cute.Tensor, warp: Int32):
    """Zeros in all stages of Y: where ``KeyTerms`` writes nothing X is 0, but 0 * NaN is not."""
    for stage in cutlass.range_constexpr(plan.y_stages):
        for step in cutlass.range_constexpr(0, plan.config.tile_n, KEYS_AT_ONCE):
            column = step + own_key(warp)
            if column < plan.config.tile_n:
                _store_row(sY[None, None, stage], column, ())


class WarpgroupTerms(Terms):
    """What is added to a tile of work of a warpgroup: Python that makes straight-line code."""

    def __init__(
        self,
        plan: AddedTerms,
        entry: EntryElements,
        queries: list[dict],
        head: Int32,
        first_token: Int32,
        operands: tuple,
        slab: Int32,
        thread: Int32,
        reference: Int32,
    ):
        """
        Args:
          queries: of the thread's rows.
          head: of all rows, where terms of the key or the distance need one.
          reference: that of ``KeyTerms``.
          first_token: of the warpgroup's rows.
          operands: of ``AddedTerms.allocate``.
        """
        super().__init__(plan, entry, head)
        self.queries = queries
        self.reference = reference
        self.sX, self.sY, self.sD = operands
        self.first_token = first_token
        self.slab = slab
        self.thread = thread
        # The first tile is as those are where terms vary.
        self.of_first = True if plan.splits_stretches else None
        self.row_constants = [self._row_constant(query) for query in queries]

    # ---- of rows, tiles and distances --------------------------------------------------------

    def _row_constant(self, query: dict) -> Float32:
        return self._raw(self._of_program(query, "row") + self._of_bias(query, "row"))

    def _affine(self, first: Int32, keeps_signs: bool) -> list[list[Affine]]:
        """Each row's affine terms where column 0 is key ``first``; not scaled.

        ``keeps_signs``: with those that are affine in this tile.
        """
        found: list[list[Affine]] = [[] for _ in self.queries]
        if "affine" in self.plan.kinds:
            _, rows = self.entry.along(self.queries, first)
            found = [self._of_program(row, "affine") for row in rows]
        if keeps_signs and "bent" in self.plan.kinds:
            program = self.program.between_bends
            for terms, query in zip(found, self.queries, strict=True):
                key = Affine(first, Int32(1))
                known = {"score_mod": program.given(query["score_mod"], kv_idx=key)}
                terms += self._of_program(known, "bent")
        return found

    def shifts(self, n: Int32, is_varying: bool | None) -> tuple[list[Float32] | None, Int32]:
        """What the softmax adds to each row of tile n, and whether ``vary`` has work to do.

        ``is_varying``: that of ``loops``, where it is known.
        """
        kinds = self.plan.kinds
        by_tile = is_varying is None and "tile" in kinds
        of_rows = {"row"} | (set() if self.plan.by_position else {"affine", "bent"})
        if not kinds & of_rows and not by_tile:
            return None, Int32(0)
        found = []
        rows = self._affine(n * self.plan.config.tile_n, is_varying is False)
        for constant, terms in zip(self.row_constants, rows, strict=True):
            for term in terms if not self.plan.by_position else ():
                constant = constant + self._raw([term.base])
            found.append(constant)
        if "distance" in kinds or not by_tile:
            return found, Int32(0)
        first = n * self.plan.config.tile_n
        is_same = Boolean(True)
        for query in self.queries:
            is_same = is_same & self._is_same(query, first, self._last_key(first))
        differs = select(is_same, Int32(0), Int32(1)) != 0
        varies = Int32(cute.arch.vote_any_sync(differs))
        of_first = self.entry.keys(first)
        for r, query in enumerate(self.queries):
            for term in self._of_program(self.entry.both(query, of_first), "tile"):
                found[r] = select(varies == 0, found[r] + self._raw([term]), found[r])
        return found, varies

    def _common_of(self, n: Int32) -> Float32:
        """What is added by distance to all of the slab's rows and of tile n's keys alike."""
        of_key = self.entry.keys(cutlass.max(n, Int32(0)) * self.plan.config.tile_n)
        return self._raw(self._of_program(self.entry.both(self.queries[0], of_key), "tile"))

    def _last_key(self, first: Int32) -> Int32:
        """Of a tile that begins with key ``first``."""
        return cutlass.min(first + self.plan.config.tile_n, Int32(self.entry.kv_length)) - 1

    def _is_even(self, query: dict, first: Int32, last: Int32) -> Boolean:
        """Whether a row's terms by distance are the same for all of some keys, or affine."""
        is_even = Boolean(True)
        if "tile" in self.plan.kinds:
            is_even = self._is_same(query, first, last)
        bends = [i for value, _ in self.addends for i in self._bends_of(value)]
        if bends:
            keys = Span(first, last)
            is_even = is_even & self.program.have_signs(query["score_mod"], bends, keys)
        return is_even

    def _bends_of(self, value) -> list[int]:
        return self.program.bends(value) if self.program.kind_of(value) == "bent" else []

    def _is_same(self, query: dict, first: Int32, last: Int32) -> Boolean:
        """Whether the terms of a row are the same for all of some keys."""
        indices = [i for value, _ in self.addends for i in self.program.reads_by_bounds(value)]
        return self.program.are_points(query["score_mod"], indices, Span(first, last))

    @cute.jit
    def varying_tiles(self, n_min: Int32, n_max: Int32):
        """The first of these tiles, and one past the last, outside of which what is added is as
        ``_is_even`` has it; each lane looks at other tiles."""
        tile_n = self.plan.config.tile_n
        low, high = Int32(n_max), Int32(n_min)
        # Of a distance the slab's rows are its first one, and keys that lie further left.
        query = self.entry.queries(self.head, self.first_token)
        for i in cutlass.range((n_max - n_min + 31) // 32, unroll=1):
            n = n_min + 32 * i + self.thread % 32
            is_even = self._is_even(query, n * tile_n - 63, self._last_key(n * tile_n))
            is_found = (n < n_max) & (select(is_even, Int32(0), Int32(1)) != 0)
            low = select(is_found, cutlass.min(low, n), low)
            high = select(is_found, cutlass.max(high, n + 1), high)
        low = cute.arch.warp_redux_sync(low, kind="min")
        high = cute.arch.warp_redux_sync(high, kind="max")
        return cute.arch.make_warp_uniform(low), cute.arch.make_warp_uniform(high)

    def loops(self, stretches: list[Stretch], n_min: Int32, n_max: Int32) -> list[tuple]:
        """``stretches``, and of each whether terms by distance vary in it.

        Where that is known beforehand, one whose tiles need no mask falls into three.
        """
        if not self.plan.splits_stretches:
            return [(stretch, None) for stretch in stretches]
        low, high = self.varying_tiles(n_min, n_max)
        found = []
        for stretch in stretches:
            if stretch.is_masked:
                found.append((stretch, True))
                continue
            end = stretch.tile(Int32(0)) + 1
            begin = end - stretch.count
            high = cutlass.min(cutlass.max(high, begin), end)
            low = cutlass.min(cutlass.max(low, begin), high)
            for first, last, varies in ((high, end, False), (low, high, True), (begin, low, False)):
                part = stretch._replace(count=last - first, tile=leftwards(last))
                found.append((part, varies))
        return found

    def prepare(self, n: Int32, is_varying: bool | None) -> None:
        """What ``vary`` reads, where it will for sure."""
        if self._adds_numbers(is_varying):
            self._write_numbers(n)

    def _asks_whether_varying(self, is_varying: bool | None) -> bool:
        return is_varying is None and "tile" in self.plan.kinds

    def _adds_numbers(self, is_varying: bool | None) -> bool:
        return is_varying is True or "distance" in self.plan.kinds

    @cute.jit
    def vary(
        self,
        scores: cute.Tensor,
        n: Int32,
        varies: Int32,
        may_be_beyond: cutlass.Constexpr[bool],
        is_varying: cutlass.Constexpr,
    ):
        """Adds to single scores of tile n what is not the same for all keys of a row."""
        if const_expr(self._adds_numbers(is_varying)):
            self._add_numbers(scores)
        elif const_expr(self._asks_whether_varying(is_varying)):
            if varies != 0:
                if const_expr(self.plan.by_distance):
                    self._write_numbers(n)
                    self._add_numbers(scores)
                else:
                    self._add_to_each(scores, n, may_be_beyond)

    def _write_numbers(self, n: Int32) -> None:
        """What is added by distance, of this warp's rows and tile n."""
        warp, lane = self.thread // 32, self.thread % 32
        numbers = self.sD[None, self.slab * 4 + warp]
        last_key = (n + 1) * self.plan.config.tile_n - 1
        least = self.entry.position(self.first_token + ROWS_PER_WARP * warp) - last_key
        # The numbers of the tile before have been read.
        cute.arch.sync_warp()
        for first in range(0, self.plan.distances, 32):
            place = {"q_idx": least + first + lane, "kv_idx": Int32(0)}
            known = {"score_mod": self.program.given(self.of_head["score_mod"], **place)}
            terms = [term for kind in BY_DISTANCE for term in self._of_program(known, kind)]
            numbers[first + lane] = self._raw(terms)
        cute.arch.sync_warp()

    def _add_numbers(self, scores: cute.Tensor) -> None:
        warp, lane = self.thread // 32, self.thread % 32
        numbers = self.sD[None, self.slab * 4 + warp]
        own = lane // 4 + self.plan.config.tile_n - 1 - first_column(self.thread)
        for c in range(cute.size(scores, mode=[1])):
            for r in range(ROWS_PER_THREAD):
                scores[r, c] = scores[r, c] + numbers[own + (8 * r - column_step(c))]

    def _add_to_each(self, scores: cute.Tensor, n: Int32, may_be_beyond: bool) -> None:
        first = n * self.plan.config.tile_n + first_column(self.thread)
        column = self.entry.along_keys(self.queries, first, may_be_beyond, ADJACENT_COLUMNS)
        inverse = Float32(1.0 / self.plan.scale)
        for c in range(cute.size(scores, mode=[1])):
            for r, known in enumerate(column(column_step(c))):
                # Without ``_raw``'s bound: it would cost as much again.
                for term in self._of_program(known, "tile"):
                    scores[r, c] = cute.math.fma(term, inverse, scores[r, c])

    # ---- X and Y ------------------------------------------------------------------------------

    @cute.jit
    def start(self):
        """X, and Y where no other warp writes it; all of the warpgroup's threads meet."""
        if const_expr(self.plan.multiplies):
            self.store_steps(self.reference, False)
            if const_expr(not self.plan.is_staged):
                tile_n = self.plan.config.tile_n
                for first in cutlass.range_constexpr(0, tile_n, 128):
                    column = self.thread + first
                    if column < tile_n:
                        tile = self.sY[None, None, self.slab]
                        _store_row(tile, column, _thrice(Float32(column)))
            cute.arch.fence_view_async_shared()
            self.join()

    def enter(
        self, softmax: OnlineSoftmax, count: Int32, tile_of: Callable, is_varying: bool | None
    ) -> "CommonTerm | None":
        """Before a loop: X, and what is added by distance to all scores of a tile alike."""
        last = cutlass.max(tile_of(Int32(0)), Int32(0))
        nearest = cutlass.min(self.reference // self.plan.config.tile_n, last)
        self.write_steps(cutlass.max(nearest, last + 1 - count), is_varying)
        if is_varying is not False or "tile" not in self.plan.kinds:
            return None
        tile_n = self.plan.config.tile_n
        query = self.entry.queries(self.head, self.first_token)
        keys = (last + 1 - count) * tile_n - 63, self._last_key(last * tile_n)
        is_common = select(self._is_same(query, *keys), Int32(1), Int32(0))
        common = CommonTerm(softmax, self.plan.largest, is_common)
        common.lower(select(count > 0, self._common_of(last), Float32(0.0)))
        return common

    def at_tile(self, common: "CommonTerm | None", n: Int32) -> None:
        """At tile n, when no product is under way; ``common``: of ``enter``."""
        if common is not None:
            self._follow(common, n)

    @cute.jit
    def _follow(self, common: "CommonTerm", n: Int32):
        if common.is_common == 0:
            common.restore()
            common.lower(self._common_of(n))

    @cute.jit
    def write_steps(self, n: Int32, is_varying: cutlass.Constexpr):
        """X of a loop with tile n, where loops differ in it."""
        if const_expr("bent" in self.plan.kinds and self.plan.multiplies_in(is_varying)):
            # All have waited for the products that read the one before.
            self.join()
            self.store_steps(n * self.plan.config.tile_n, is_varying is False)
            cute.arch.fence_view_async_shared()
            self.join()

    @cute.jit
    def store_steps(self, first: Int32, keeps_signs: cutlass.Constexpr[bool]):
        """Writes X from ``_affine`` of each row at a key."""
        rows = self._affine(first, keeps_signs)
        for r in cutlass.range_constexpr(ROWS_PER_THREAD):
            base, step, inverse = Float32(0.0), Float32(0.0), Float32(1.0 / self.plan.scale)
            for term in rows[r]:
                base, step = base + term.base, step + term.step
            if const_expr(self.plan.by_position):
                base = cute.math.fma(step, Float32(self.reference - first), base)
            steps = thirds(step * inverse)
            if const_expr(self.plan.is_staged):
                steps = [each for each in steps for _ in range(3)]
                bases = thirds(self._raw([base])) if self.plan.by_position else _thrice(0.0)
                numbers = (*steps, *bases, *_thrice(1.0))
            else:
                numbers = (*steps, *_thrice(1.0))
            if self.thread % 4 == 0:
                _store_row(self.sX[None, None, self.slab], row_in_slab(self.thread, r), numbers)

    @cute.jit
    def join(self):
        """Waits until all of the warpgroup's threads have written."""
        cute.arch.barrier(barrier_id=BARRIER + self.slab, number_of_threads=128)

    def may_hide(self, is_varying: bool | None) -> bool:
        """Whether what is added may be -inf, with which the softmax has to reckon."""
        return not self.plan.kinds <= ({"tile"} if is_varying is False else set())

    def multiplies(self, is_varying: bool | None) -> bool:
        return self.plan.multiplies_in(is_varying)

    def multiply(self, acc_S: cute.Tensor, k_stage: Int32, is_varying: bool | None) -> None:
        """Issues acc_S += X Y^T, the last of a group of products."""
        if not self.multiplies(is_varying):
            return
        source = warpgroup.OperandSource.SMEM
        mma = tiled_mma(BFloat16, self.plan.config.tile_n, OperandMajorMode.K, source)
        part = mma.get_slice(0)
        tX = mma.make_fragment_A(part.partition_A(self.sX))[None, None, None, self.slab]
        stage = k_stage if self.plan.is_staged else self.slab
        tY = mma.make_fragment_B(part.partition_B(self.sY))[None, None, None, stage]
        gemm(mma, acc_S, tX, tY, True, begins=False)


class CommonTerm(Traced):
    """What is added to all scores of a loop alike: meanwhile maxima are less by it instead."""

    def __init__(self, softmax: OnlineSoftmax, largest: float, is_common: Int32):
        """``is_common``: 1 where it is one number for the loop, 0 where each tile has its own."""
        self.softmax = softmax
        self.largest = largest
        self.is_common = is_common
        self.term = cute.make_rmem_tensor(1, Float32)
        self.before = cute.make_rmem_tensor(ROWS_PER_THREAD, Float32)
        self.lowered = cute.make_rmem_tensor(ROWS_PER_THREAD, Float32)

    def lower(self, term: Float32) -> None:
        softmax, infinity = self.softmax, Float32(Float32.inf)
        self.term[0] = term
        for r in range(ROWS_PER_THREAD):
            self.before[r] = softmax.row_max[r]
            lowered = softmax.row_max[r] - term
            # Infinity hides: no score comes near.
            lowered = select(term == -infinity, Float32(self.largest), lowered)
            softmax.row_max[r] = lowered
            self.lowered[r] = lowered
            # NaN, which no maximum keeps, and what has none.
            poison = select(term < infinity, Float32(0.0), Float32(math.nan))
            softmax.row_sum[r] = softmax.row_sum[r] + poison

    def restore(self) -> None:
        """A maximum that has not grown is what it was: a large term has rounded it meanwhile."""
        for r in range(ROWS_PER_THREAD):
            row_max = self.softmax.row_max[r]
            grown = row_max + self.term[0]
            self.softmax.row_max[r] = select(row_max == self.lowered[r], self.before[r], grown)


class NoTerms(Traced):
    """Where nothing is added."""

    def nothing(self, *_):
        return None

    multiplies = start = enter = at_tile = multiply = prepare = vary = nothing
    may_hide = nothing
    of_first = None

    def shifts(self, *_) -> tuple[None, Int32]:
        return None, Int32(0)

    def loops(self, stretches: list[Stretch], *_) -> list[tuple]:
        return [(stretch, None) for stretch in stretches]


def thirds(x: Float32) -> tuple[Float32, Float32, Float32]:
    """Three bfloat16 numbers of which x is the sum, save for bits below 2**-133."""
    high = _rounded(x)
    rest = x - high
    # Infinity less itself is no number, and NaN is one of the three already.
    rest = select(rest == rest, rest, Float32(0.0))
    middle = _rounded(rest)
    return high, middle, rest - middle


def _rounded(x: Float32) -> Float32:
    """The nearest bfloat16 number, as half of a pair: one alone takes the exponentials' unit."""
    return float_of(round_pair(BFloat16, Float32(0.0), x))


def _thrice(x) -> tuple[Float32, Float32, Float32]:
    return Float32(x), Float32(x), Float32(x)


@cute.jit
def _store_row(
    tile: cute.Tensor, row: Int32, numbers: tuple, is_half: cutlass.Constexpr[bool] = False
):
    """Stores numbers, then zeros, as a row of X or Y, or as the second half of one."""
    values = cute.make_rmem_tensor(COLUMNS // 2 if is_half else COLUMNS, Float32)
    values.fill(0.0)
    for i in cutlass.range_constexpr(len(numbers)):
        values[i] = numbers[i]
    store_pairs(tile, row, int(is_half), round_pairs(BFloat16, values))
