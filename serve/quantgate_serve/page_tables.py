"""The pages of each running sequence as rows of one array, kept from step to step.

A row is written when its sequence starts and changes when that gets a page, so that the inputs of a
step are read out of an array, not collected from lists.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantgate_serve.request import Request


@dataclass(slots=True)
class _Row:
    """A row, and the list that its first `count` pages were read from."""

    index: int
    pages: list[int]
    count: int = 0


class PageTables:
    """Rows for the sequences of the last steps. A sequence only ever appends to its list of pages,
    or begins a new list: that is how a change is seen."""

    def __init__(self, *, width: int, null_page: int, num_rows: int = 8) -> None:
        """`width` pages hold the longest sequence; `null_page` stands where a row has no page."""
        self.null_page = null_page
        self._width = width
        self._hold(np.full((num_rows, width), null_page, dtype=np.int32))
        self._rows: dict[int, _Row] = {}
        self._free = [_Row(index, []) for index in reversed(range(num_rows))]

    def rows_of(self, requests: Sequence[Request]) -> NDArray[np.int64]:
        """As indices_of(), for numpy."""
        return np.array(self.indices_of(requests), dtype=np.int64)

    def indices_of(self, requests: Sequence[Request]) -> list[int]:
        """The row of each of `requests`, up to date. Others may lose theirs until they are back."""
        known = self._rows
        indices = []
        for request in requests:
            row = known.get(request.id)
            if row is None:
                row = known[request.id] = self._take(requests)
            pages = request.pages
            if row.pages is not pages or row.count != len(pages):
                self._write(row, pages)
            indices.append(row.index)
        return indices

    def _hold(self, pages: NDArray[np.int32]) -> None:
        # [R, P]: grows with the batch, so it is to be read again after rows_of().
        self.pages = pages
        # Written to as plain memory: between two steps numpy's code has left the caches, and an
        # assignment of one page takes 10 us there.
        self._memory = pages.data.cast("B").cast("i")

    def _take(self, requests: Sequence[Request]) -> _Row:
        if not self._free:
            staying = {request.id for request in requests}
            for name in [name for name in self._rows if name not in staying]:
                self._free.append(self._rows.pop(name))
        if not self._free:
            count = len(self.pages)
            more = np.full_like(self.pages, self.null_page)
            self._hold(np.concatenate([self.pages, more]))
            self._free = [_Row(index, []) for index in reversed(range(count, 2 * count))]
        return self._free.pop()

    def _write(self, row: _Row, pages: list[int]) -> None:
        known = row.count if row.pages is pages else 0
        count = len(pages)
        if count > self._width:
            raise ValueError(f"a sequence has {count} pages, its row has room for {self._width}")
        first = row.index * self._width
        self._memory[first + known : first + count] = array("i", pages[known:])
        if count < row.count:
            # What a longer sequence left here would be read as padding.
            null = array("i", [self.null_page]) * (row.count - count)
            self._memory[first + count : first + row.count] = null
        row.pages, row.count = pages, count
