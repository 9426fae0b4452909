"""The embedding of a request comes out of its chunks' sums, whatever the chunks were."""

import numpy as np
import pytest

from quantgate_serve.embedding import add_hidden, embedding_of
from quantgate_serve.request import Request, SamplingParams


def request_of(*chunks: tuple[int, list[float]]) -> Request:
    request = Request([1, 2, 3], SamplingParams(max_tokens=0, embeds=True))
    for start, hidden_sum in chunks:
        add_hidden(request, start, np.array(hidden_sum, dtype=np.float32))
    return request


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([], None),
        ([(0, [3.0, 4.0])], (0.6, 0.8)),
        ([(0, [1.0, 4.0]), (2, [2.0, 0.0])], (0.6, 0.8)),
        ([(0, [9.0, 9.0]), (2, [9.0, 0.0]), (0, [3.0, 4.0])], (0.6, 0.8)),  # preempted
        ([(0, [0.0, 0.0])], (0.0, 0.0)),
    ],
)
def test_an_embedding_is_the_direction_of_all_chunks_since_the_last_beginning(
    chunks: list[tuple[int, list[float]]], expected: tuple[float, ...] | None
) -> None:
    found = embedding_of(request_of(*chunks))
    assert found == (None if expected is None else pytest.approx(expected))
