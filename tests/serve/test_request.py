"""What a request asks for is known before its first step."""

import pickle
from typing import Any

import pytest

from quantgate_serve.request import SamplingParams


@pytest.mark.parametrize(
    ("asked", "is_plain"),
    [
        ({}, True),
        ({"max_tokens": 1, "ignore_eos": True, "stop": ("a",), "seed": 3, "top_p": 0.5}, True),
        ({"temperature": 0.8, "top_k": 1}, True),
        ({"temperature": 0.8}, False),
        ({"max_tokens": 0}, False),
        ({"num_logprobs": 0}, False),
        ({"logprob_token_ids": (3,)}, False),
        ({"prompt_logprobs": True}, False),
        ({"grammar": "root ::= [a-z]"}, False),
        ({"embeds": True, "max_tokens": 0}, False),
    ],
)
def test_only_the_most_likely_tokens_and_nothing_else_is_plain(
    asked: dict[str, Any], is_plain: bool
) -> None:
    params = SamplingParams(**asked)
    assert params.is_plain is is_plain
    sent = pickle.loads(pickle.dumps(params))
    assert (sent, sent.is_plain, hash(sent)) == (params, is_plain, hash(params))
