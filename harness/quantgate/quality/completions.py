"""Many prompts to /v1/completions at once: how many travel together, in which order, and errors."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from quantgate.errors import MeasurementError


class Refused(MeasurementError):
    """The server answered, and refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """What the server can batch: prompts per HTTP request, requests in flight, and their order."""

    prompts_per_request: int = 16
    requests_in_flight: int = 4
    """Together enough to keep a batch full, with few messages."""
    shuffle_seed: int | None = None
    """None for like lengths together, so that a batch is not held by its longest prompt."""

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of prompts of these lengths, request by request."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        if self.shuffle_seed is not None:
            random.Random(self.shuffle_seed).shuffle(order)
        size = self.prompts_per_request
        return [order[start : start + size] for start in range(0, len(order), size)]


FULL_BATCHES = Batching()
UNEXPECTED = "the server's answer is not of the expected form"


class CompletionClient:
    """Sends completion requests to one server, a few at a time."""

    def __init__(self, session: aiohttp.ClientSession, url: str, batching: Batching) -> None:
        self._session = session
        self._url = f"{url}/v1/completions"
        self._slots = asyncio.Semaphore(batching.requests_in_flight)

    async def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """One completion request.

        Raises:
            Refused: the server answered with an error.
            MeasurementError: it did not answer, or not in JSON.
        """
        async with self._slots:
            try:
                async with self._session.post(self._url, json=body) as response:
                    text = await response.text()
                if response.status != 200:
                    raise Refused(f"HTTP {response.status}: {_error_message(text)}")
                payload: dict[str, Any] = json.loads(text)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                raise MeasurementError(f"{type(error).__name__}: {error}") from error
        return payload


async def complete_each(
    client: CompletionClient, body: dict[str, Any], prompts: list[list[int]]
) -> list[dict[str, Any] | str]:
    """One choice per prompt, or the reason there is none.

    Prompts travel together; when the server refuses the group each is asked alone, so that one bad
    item does not cost its neighbours their answers. A server that does not answer is not asked
    again: it would cost one timeout per item.
    """
    try:
        payload = await client.complete(body | {"prompt": prompts})
        by_index = {choice["index"]: choice for choice in payload["choices"]}
        return [by_index[i] for i in range(len(prompts))]
    except Refused as error:
        if len(prompts) == 1:
            return [str(error)]
    except MeasurementError as error:
        return [str(error)] * len(prompts)
    except (KeyError, TypeError) as error:
        return [f"{UNEXPECTED}: {error!r}"] * len(prompts)
    alone = [complete_each(client, body, [prompt]) for prompt in prompts]
    return [choice for part in await asyncio.gather(*alone) for choice in part]


def _error_message(text: str) -> str:
    """What an error answer says, in OpenAI's form or any other."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
