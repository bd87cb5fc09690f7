"""Full pages that requests may begin with, found by the text that leads up to them."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from jax_flashcute import PageAllocator


class PrefixIndex:
    """Keeps computed pages after their request has left, as long as nobody needs the room.

    A page is known by the hash of all tokens up to its end, since keys and values depend on every
    token before them.  The index is one of the page's holders.
    """

    def __init__(self, allocator: PageAllocator):
        self._allocator = allocator
        self._pages: OrderedDict[bytes, int] = OrderedDict()  # the least recently used first

    def find(self, tokens: Sequence[int]) -> list[int]:
        """The pages of the longest known prefix, which the caller holds from now on.

        At least one token is left over, since the byte that follows comes from computing it.
        """
        known = []
        for digest in self._digests(tokens[:-1]):
            if digest not in self._pages:
                break
            known.append(digest)
        self._touch(known)
        pages = [self._pages[digest] for digest in known]
        return self._allocator.share(pages, len(pages) * self._allocator.page_size)

    def add(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Know the pages that these tokens fill; where the text is known already, nothing."""
        digests = list(self._digests(tokens))
        for digest, page in zip(digests, pages, strict=False):
            if digest not in self._pages:
                (self._pages[digest],) = self._allocator.share([page], self._allocator.page_size)
        self._touch(digests)

    @property
    def idle(self) -> int:
        """Pages that nobody but the index holds."""
        return sum(self._allocator.holders(page) == 1 for page in self._pages.values())

    def evict(self, count: int) -> int:
        """Free up to `count` idle pages, the least recently used first; how many."""
        idle = [d for d, page in self._pages.items() if self._allocator.holders(page) == 1]
        for digest in idle[:count]:
            self._allocator.free([self._pages.pop(digest)])
        return len(idle[:count])

    def _touch(self, digests: Sequence[bytes]) -> None:
        # The end of a text ages first: without its beginning it could not be found.
        for digest in reversed(digests):
            self._pages.move_to_end(digest)

    def _digests(self, tokens: Sequence[int]) -> Iterator[bytes]:
        size, digest = self._allocator.page_size, b""
        for end in range(size, len(tokens) + 1, size):
            digest = hashlib.blake2b(digest + bytes(tokens[end - size : end])).digest()
            yield digest
