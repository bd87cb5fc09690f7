"""FlashAttention-4, CuTe DSL kernels called from PyTorch (`flash_attn.cute`)."""

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
    if case.kept is None:
        # The masks that it has of its own.
        native = {"causal_lambda": {"causal": True}, "window256": {"window_size": (255, 0)}}
        options = native.get(case.name, {"causal": case.causal})
        return torch_step(
            lambda q, k, v: flash_attn_func(q, k, v, **options)[0],
            case,
            pass_,
            takes_all=case.name in native,
            aligns_ends=True,
        )
    lists = case.tile_lists()
    transposed = [[m for m, row in enumerate(lists) if n in row] for n in range(len(lists))]
    forward, backward = _full_tiles(lists), _full_tiles(transposed)

    def attention(query, key, value):
        found = flash_attn_func(
            query,
            key,
            value,
            block_sparse_tensors=forward,
            block_sparse_tensors_bwd=backward,
        )
        return found[0]

    return torch_step(attention, case, pass_, takes_all=True)


def _paged(case: Case):
    import torch
    from flash_attn.cute.interface import flash_attn_varlen_func

    table = torch.from_numpy(case.page_table()).cuda()
    lengths = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32, device="cuda")
    return lambda q, k, v: flash_attn_varlen_func(
        q, k, v, seqused_k=lengths, page_table=table, causal=case.causal
    )[0]


def _full_tiles(lists: list[list[int]]):
    """Lists of tiles that need no mask, shared by batch entries and heads."""
    import torch
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    width = max(map(len, lists))
    rows = [[*row, *[0] * (width - len(row))] for row in lists]
    counts = torch.tensor([[list(map(len, lists))]], dtype=torch.int32, device="cuda")
    indices = torch.tensor([[rows]], dtype=torch.int32, device="cuda")
    return BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=torch.zeros_like(indices),
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=(SPARSE_TILE, SPARSE_TILE),
    )
