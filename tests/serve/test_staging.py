"""Uploaded integers arrive whole, whatever was uploaded before."""

import numpy as np
import torch

from quantgate_serve.staging import Staging


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
