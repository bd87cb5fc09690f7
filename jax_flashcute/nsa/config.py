"""The sizes of native sparse attention."""

from dataclasses import dataclass

from jax_flashcute.given import whole


@dataclass(frozen=True)
class NSAConfig:
    """Sizes, all in tokens but for ``num_selected``; they need not divide the length.

    Attributes:
      block: keys that are compressed to one, and that are selected together.
      num_selected: blocks that the rows of a query tile see, those that are forced in included.
        Where more are forced in, all of those are seen.
      window: keys that a row sees in the window, itself included.
      query_tile: query rows that share a selection.
      complete_only: a row sees compressed blocks only once all of their keys are past or its own.
        Without it, a row also sees the block it stands in, whose mean holds up to ``block - 1``
        later keys: information of the future leaks into the present, as in upstream NSA kernels.
      force_first: the first block is always selected.

    Raises:
      ValueError: a size is no positive integer.
    """

    block: int = 64
    num_selected: int = 16
    window: int = 512
    query_tile: int = 256
    complete_only: bool = False
    force_first: bool = True

    def __post_init__(self):
        for name in ("block", "num_selected", "window", "query_tile"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))
