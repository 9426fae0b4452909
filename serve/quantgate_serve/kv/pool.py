"""The page pool: which KV pages are free and who still refers to the others.

Owns numbers only; the tensors live in `storage.py`. Not thread-safe: the engine is its user.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

PAGE_SIZE = 16
# The pool is laid out in stretches of so many pages: room for 256 tokens of one sequence.
_STRETCH = 16


class PoolExhaustedError(Exception):
    """Fewer pages are free than were asked for."""


class PageIntegrityError(Exception):
    """The pool's books do not match who holds its pages."""


class PagePool:
    """Reference-counted pages of `page_size` token slots each."""

    def __init__(self, num_pages: int, *, page_size: int = PAGE_SIZE) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        # 1 where a page is free, and a 0 behind the last one, which so has no free neighbour.
        self._is_free = bytearray(b"\1" * num_pages + b"\0")
        # How many pages of each stretch are free; the last stretch may be shorter.
        self._free_in = bytearray(
            min(_STRETCH, num_pages - first) for first in range(0, num_pages, _STRETCH)
        )
        # No stretch has more: where the search for the emptiest begins.
        self._most_free = _STRETCH
        self.num_free = num_pages
        self._references = [0] * num_pages
        self._is_cached = bytearray(num_pages)
        # Pages whose only reference is the prefix cache's: used, but free for whoever needs them.
        self.num_cached = 0

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int, *, after: int | None = None) -> list[int]:
        """Take `count` free pages, each with one reference; neighbours in order where it can be.

        Memory that follows on is read faster. So a sequence whose last page is `after` gets the
        next one if that is free, and each further page is the next again. Where that is taken, and
        for a new sequence, the pages go on where there is most room, a whole stretch if possible.

        Raises:
            PoolExhaustedError: fewer are free; nothing was taken.
        """
        if count > self.num_free:
            raise PoolExhaustedError(f"{count} KV pages wanted, {self.num_free} are free")
        pages: list[int] = []
        page = self.num_pages if after is None else after + 1
        for left in range(count, 0, -1):
            if not self._is_free[page]:
                page = self._find_room(left)
            self._is_free[page] = False
            self._free_in[page // _STRETCH] -= 1
            self._references[page] = 1
            pages.append(page)
            page += 1
        self.num_free -= len(pages)
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
        for page in pages:
            count = self._references[page]
            if count == 0:
                raise PageIntegrityError(f"page {page} was released more often than taken")
            self._references[page] = count - 1
            if count == 1:
                self._is_free[page] = True
                stretch = page // _STRETCH
                self._free_in[stretch] += 1
                if self._free_in[stretch] > self._most_free:
                    self._most_free = self._free_in[stretch]
                self.num_free += 1
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

    def count_freed(self, holders: Iterable[Sequence[int]]) -> int:
        """How many pages nobody but the prefix cache would hold if all of `holders` let go."""
        held = Counter(page for pages in holders for page in pages)
        return sum(
            self._references[page] - self._is_cached[page] == count for page, count in held.items()
        )

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
        self._check_free()
        for page in range(self.num_pages):
            if self._references[page] != held[page]:
                raise PageIntegrityError(
                    f"page {page} counts {self._references[page]} references, {held[page]} are held"
                )
            if self._is_free[page] != (held[page] == 0):
                raise PageIntegrityError(f"page {page} is both free and held, or neither")

    def _find_room(self, count: int) -> int:
        """Where `count` pages go on: in the longest free run of the emptiest stretch.

        What lies before the run may want to grow into it as well, and is left up to half of it.
        """
        while (stretch := self._free_in.find(self._most_free)) < 0:
            self._most_free -= 1
        first = stretch * _STRETCH
        # All of it is free, or so little, as beside a full prefix cache, that any of it will do.
        if self._most_free == _STRETCH or self._most_free < _STRETCH // 4:
            return self._is_free.find(1, first)
        # Of strings of ones the longest is the greatest.
        run = max(self._is_free[first : first + _STRETCH].split(b"\0"))
        start = self._is_free.find(run, first)
        if start == first:
            return start
        return start + max(0, min(len(run) // 2, len(run) - count))

    def _check_free(self) -> None:
        free = self._is_free.count(1)
        if free != self.num_free or self._is_free[self.num_pages]:
            raise PageIntegrityError(f"{self.num_free} pages count as free, {free} are")
        for stretch, counted in enumerate(self._free_in):
            first = stretch * _STRETCH
            free = self._is_free.count(1, first, first + _STRETCH)
            if free != counted or free > self._most_free:
                raise PageIntegrityError(
                    f"{counted} pages of the stretch from page {first} on count as free, at most "
                    f"{self._most_free} of any; {free} are"
                )
