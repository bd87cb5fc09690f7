"""FlashAttention-4, CuTe DSL kernels called from PyTorch (`flash_attn.cute`)."""

from collections.abc import Sequence

import numpy as np

from benchmarks import functions
from benchmarks.cases import SPARSE_TILE, Case, Pass
from benchmarks.measure import Step
from benchmarks.peers import cannot_import


def available() -> str | None:
    if reason := cannot_import("torch") or cannot_import("flash_attn.cute.interface"):
        return reason
    from benchmarks.peers.torch_step import no_gpu

    return no_gpu()


def build(case: Case, pass_: Pass) -> Step:
    from flash_attn.cute.interface import flash_attn_func

    from benchmarks.peers.torch_step import torch_step

    if case.page_size is not None:
        return torch_step(_paged(case), case, pass_, takes_pages=True, aligns_ends=True)
    # The masks that it has of its own.
    native = {"causal_lambda": {"causal": True}, "window256": {"window_size": (255, 0)}}
    options = native.get(case.name, {"causal": case.causal})
    if case.name in functions.MASKS and case.name not in native:
        return masked_step(case, pass_, with_lists=True)
    if case.kept is not None:
        kept = case.tile_lists()
        options = _lists([[]] * len(kept), kept, case.seqlen_k // SPARSE_TILE)
    return torch_step(
        lambda q, k, v: flash_attn_func(q, k, v, **options)[0],
        case,
        pass_,
        takes_all=case.kept is not None or case.name in native,
        aligns_ends=True,
    )


def masked_step(case: Case, pass_: Pass, *, with_lists: bool) -> Step:
    """A case's mask by element; ``with_lists`` also names the tiles that it fills and cuts."""
    from flash_attn.cute.interface import flash_attn_func

    from benchmarks.peers.torch_step import torch_step

    options = _mask(case) | (_mask_lists(case) if with_lists else {})
    return torch_step(
        lambda q, k, v: flash_attn_func(q, k, v, **options)[0], case, pass_, takes_all=True
    )


def _paged(case: Case):
    import torch
    from flash_attn.cute.interface import flash_attn_varlen_func

    table = torch.from_numpy(case.page_table()).cuda()
    lengths = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32, device="cuda")
    return lambda q, k, v: flash_attn_varlen_func(
        q, k, v, seqused_k=lengths, page_table=table, causal=case.causal
    )[0]


def _mask(case: Case) -> dict[str, object]:
    import torch

    library = _InKernel()
    visible = functions.mask_mod(case.name, case.seqlen_k, library)
    assert visible is not None

    def mask_mod(b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
        library.tensors = aux_tensors
        return visible(b, h, q_idx, kv_idx)

    # What its cache knows the function by.
    mask_mod.__cute_hash__ = case.name
    arrays = [torch.from_numpy(array).cuda() for array in library.arrays]
    return {"mask_mod": mask_mod, "aux_tensors": arrays or None}


def _mask_lists(case: Case) -> dict[str, object]:
    visible = functions.mask_mod(case.name, case.seqlen_k, np)
    assert visible is not None
    keys = np.arange(case.seqlen_k, dtype=np.int32)
    partial, full = [], []
    for first in range(0, case.seqlen_q, SPARSE_TILE):
        rows = np.arange(first, first + SPARSE_TILE, dtype=np.int32)[:, None]
        tiles = visible(0, 0, rows, keys).reshape(SPARSE_TILE, -1, SPARSE_TILE)
        some, every = tiles.any((0, 2)), tiles.all((0, 2))
        partial.append(np.flatnonzero(some & ~every).tolist())
        full.append(np.flatnonzero(every).tolist())
    return _lists(partial, full, case.seqlen_k // SPARSE_TILE)


class _InKernel:
    """Arrays that ``benchmarks.functions`` asks of a library, read by a kernel being traced."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.tensors = None

    def asarray(self, array: np.ndarray) -> "_Read":
        self.arrays.append(array)
        return _Read(self, len(self.arrays) - 1)


class _Read:
    def __init__(self, library: _InKernel, index: int) -> None:
        self.library, self.index = library, index

    def __getitem__(self, position):
        from cutlass import Int32
        from flash_attn.cute.utils import scalar_to_ssa

        assert self.library.tensors is not None
        return scalar_to_ssa(self.library.tensors[self.index][position[0]], Int32)


def _lists(
    partial: Sequence[Sequence[int]], full: Sequence[Sequence[int]], key_tiles: int
) -> dict[str, object]:
    """Lists of key tiles for both passes, shared by batch entries and heads."""

    def transposed(lists: Sequence[Sequence[int]]) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in range(key_tiles)]
        for m, row in enumerate(lists):
            for n in row:
                rows[n].append(m)
        return rows

    return {
        "block_sparse_tensors": _tensors(partial, full),
        "block_sparse_tensors_bwd": _tensors(transposed(partial), transposed(full)),
    }


def _tensors(partial: Sequence[Sequence[int]], full: Sequence[Sequence[int]]):
    import torch
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    def counted(lists: Sequence[Sequence[int]]):
        width = max(1, *map(len, lists))
        rows = [[*row, *[0] * (width - len(row))] for row in lists]
        counts = torch.tensor([[list(map(len, lists))]], dtype=torch.int32, device="cuda")
        return counts, torch.tensor([[rows]], dtype=torch.int32, device="cuda")

    mask_counts, mask_indices = counted(partial)
    full_counts, full_indices = counted(full)
    return BlockSparseTensorsTorch(
        mask_block_cnt=mask_counts,
        mask_block_idx=mask_indices,
        full_block_cnt=full_counts,
        full_block_idx=full_indices,
        block_size=(SPARSE_TILE, SPARSE_TILE),
    )
