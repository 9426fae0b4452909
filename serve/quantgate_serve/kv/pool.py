"""The page pool: which KV pages are free and who still refers to the others.

Owns numbers only; the tensors live in `storage.py`. Not thread-safe: the engine is its user.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

PAGE_SIZE = 16


class PoolExhaustedError(Exception):
    """Fewer pages are free than were asked for."""


class PageIntegrityError(Exception):
    """The pool's books do not match who holds its pages."""


class PagePool:
    """Reference-counted pages of `page_size` token slots each."""

    def __init__(self, num_pages: int, *, page_size: int = PAGE_SIZE) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._is_cached = bytearray(num_pages)
        # Pages whose only reference is the prefix cache's: used, but free for whoever needs them.
        self.num_cached = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, each with one reference; neighbours in order where they are.

        Memory that follows on is read faster, so pages come in the order in which they lie as long
        as they are released as they were taken.

        Raises:
            PoolExhaustedError: fewer are free; nothing was taken.
        """
        if count > len(self._free):
            raise PoolExhaustedError(f"{count} KV pages wanted, {len(self._free)} are free")
        if count <= 0:
            return []
        pages = self._free[-count:]
        pages.reverse()
        del self._free[-count:]
        for page in pages:
            self._references[page] = 1
        return pages

    def retain(self, pages: Sequence[int]) -> None:
        """Add one reference to each page, all of which are in use."""
        for page in pages:
            if self._references[page] == 0:
                raise PageIntegrityError(f"page {page} is free and cannot be shared")
            self.num_cached -= self._is_cached[page] and self._references[page] == 1
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference of each page; pages without references become free."""
        for page in reversed(pages):
            count = self._references[page]
            if count == 0:
                raise PageIntegrityError(f"page {page} was released more often than taken")
            self._references[page] = count - 1
            if count == 1:
                self._free.append(page)
            elif count == 2:
                self.num_cached += self._is_cached[page]

    def retain_cached(self, page: int) -> None:
        """Add the prefix cache's reference, of which a page has one at most."""
        self.retain((page,))
        self._is_cached[page] = True

    def release_cached(self, page: int) -> None:
        """Drop the prefix cache's reference."""
        self.num_cached -= self._references[page] == 1
        self._is_cached[page] = False
        self.release((page,))

    def references(self, page: int) -> int:
        return self._references[page]

    def check_integrity(self, holders: Iterable[Sequence[int]]) -> None:
        """Compare the reference counts with the pages that `holders` say they hold.

        Raises:
            PageIntegrityError: a page is free and held, held twice by one holder, leaked, or
                counted wrongly.
        """
        held: Counter[int] = Counter()
        for pages in holders:
            if len(set(pages)) != len(pages):
                raise PageIntegrityError(f"one holder has a page twice: {list(pages)}")
            held.update(pages)
        cached = sum(
            self._references[page] == 1
            for page, is_cached in enumerate(self._is_cached)
            if is_cached
        )
        if cached != self.num_cached:
            raise PageIntegrityError(
                f"{self.num_cached} pages count as held by the cache alone, {cached} are"
            )
        free = set(self._free)
        if len(free) != len(self._free):
            raise PageIntegrityError("a page is in the free list twice")
        for page in range(self.num_pages):
            if self._references[page] != held[page]:
                raise PageIntegrityError(
                    f"page {page} counts {self._references[page]} references, {held[page]} are held"
                )
            if (page in free) != (held[page] == 0):
                raise PageIntegrityError(f"page {page} is both free and held, or neither")
