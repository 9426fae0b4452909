"""The integers of one step, in numpy: what every way of computing it begins with.

Shapes: T tokens of the step in C chunks, R rows of a page table, P pages of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantgate_serve.page_tables import PageTables
from quantgate_serve.scheduler import Chunk

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Chunks lie one after another, decodes (of one token each) first.

    Per token: `ids`, `positions` and `slots` [T], a slot being page * page_size + offset. Per
    chunk: `starts`, `lengths`, `firsts` (its first token in the step) and `rows` (of `table`) [C].
    """

    num_decodes: int
    ids: Integers
    positions: Integers
    slots: Integers
    starts: Integers
    lengths: Integers
    firsts: Integers
    rows: Integers
    table: NDArray[np.int32]  # [R, P], which the next step's inputs may change


def build_inputs(
    chunks: Sequence[Chunk], tables: PageTables, *, num_decodes: int, page_size: int
) -> StepInputs:
    """The inputs of `chunks`, the first `num_decodes` of which decode."""
    count = len(chunks)
    rows = tables.rows_of([chunk.request for chunk in chunks])
    starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
    ids = [chunk.request.token_ids[chunk.start] for chunk in chunks[:num_decodes]]
    lengths: Integers
    firsts: Integers
    if count == num_decodes:
        lengths, firsts = np.ones(count, dtype=np.int64), np.arange(count)
        positions, token_rows = starts, rows
    else:
        for chunk in chunks[num_decodes:]:
            ids += chunk.request.token_ids[chunk.start : chunk.start + chunk.length]
        lengths = np.array([chunk.length for chunk in chunks], dtype=np.int64)
        firsts = lengths.cumsum() - lengths
        positions = np.arange(len(ids)) + (starts - firsts).repeat(lengths)
        token_rows = rows.repeat(lengths)
    at, offsets = np.divmod(positions, page_size)
    return StepInputs(
        num_decodes=num_decodes,
        ids=np.array(ids, dtype=np.int64),
        positions=positions,
        slots=tables.pages[token_rows, at].astype(np.int64) * page_size + offsets,
        starts=starts,
        lengths=lengths,
        firsts=firsts,
        rows=rows,
        table=tables.pages,
    )
