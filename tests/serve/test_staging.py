"""Integers arrive whole, whatever was sent before; what a step gave comes back."""

import numpy as np
import torch

from quantgate_serve.staging import Staging, download


def test_arrays_arrive_with_their_shapes_and_an_earlier_upload_keeps_its_numbers() -> None:
    staging = Staging(torch.device("cpu"), capacity=8)
    first = staging.upload([np.arange(6).reshape(2, 3), np.array([], dtype=np.int64)])
    second = staging.upload([np.array([7]), np.arange(20)])  # more than the capacity
    third = staging.upload([np.array([9, 9])])
    assert first[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert first[1].shape == (0,)
    assert [tensor.tolist() for tensor in second] == [[7], list(range(20))]
    assert third[0].tolist() == [9, 9]
    assert third[0].dtype == torch.int32


def test_what_is_sent_ahead_keeps_its_numbers_while_others_are_uploaded() -> None:
    staging = Staging(torch.device("cpu"), capacity=8)
    (ahead,) = staging.send_ahead([np.arange(6).reshape(3, 2)])
    for count in (1, 7, 20):
        (other,) = staging.upload([np.full(count, 9)])
        assert other.tolist() == [9] * count
    assert ahead.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_tokens_and_whether_they_are_to_be_believed_come_back() -> None:
    assert download(torch.tensor([5, 6]), torch.tensor(True))() == ([5, 6], True)
    assert download(torch.tensor([], dtype=torch.int64), torch.tensor(False))() == ([], False)
