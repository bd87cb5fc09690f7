"""Lengths and offset of one batch entry, where arrays of them may be absent."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr


@cute.jit
def entry_lengths(
    mQOffset: cute.Tensor | None,
    mQLengths: cute.Tensor | None,
    mKVLengths: cute.Tensor | None,
    q_length: Int32,
    kv_length: Int32,
    batch: Int32,
):
    """(position of query row 0, query length, key length), clamped to the arrays' lengths."""
    offset = mQOffset[batch] if const_expr(mQOffset is not None) else Int32(0)
    queries = Int32(q_length)
    keys = Int32(kv_length)
    if const_expr(mQLengths is not None):
        queries = cutlass.max(cutlass.min(mQLengths[batch], queries), Int32(0))
    if const_expr(mKVLengths is not None):
        keys = cutlass.max(cutlass.min(mKVLengths[batch], keys), Int32(0))
    return offset, queries, keys
