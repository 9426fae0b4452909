"""What waits for a client's task between two of its turns."""

import asyncio
from typing import Any

import pytest

from quantgate_serve.http.exchange import ClientGoneError, Inbox, closing_with
from quantgate_serve.http.extensions import LEAVING
from quantgate_serve.request import Delta, Request, SamplingParams


def delta(num_output: int) -> Delta:
    return Delta(Request([5], SamplingParams()), num_output, "a", False)


def test_what_one_step_brings_is_taken_at_once_and_in_order() -> None:
    async def run() -> list[int]:
        inbox = Inbox()
        waiting = asyncio.ensure_future(inbox.take())
        await asyncio.sleep(0)
        for count in (1, 2, 3):
            inbox.put(delta(count))
        return [found.num_output for found in await waiting]

    assert asyncio.run(run()) == [1, 2, 3]


def test_what_came_before_anybody_waited_is_not_lost_nor_told_twice() -> None:
    async def run() -> None:
        inbox = Inbox()
        inbox.put(delta(1))
        assert len(await inbox.take()) == 1
        later = asyncio.ensure_future(inbox.take())
        await asyncio.sleep(0)
        assert not later.done()
        inbox.put(delta(2))
        assert [found.num_output for found in await later] == [2]

    asyncio.run(run())


@pytest.mark.parametrize("leaves_first", [False, True])
def test_a_client_that_leaves_ends_the_wait(leaves_first: bool) -> None:
    async def run() -> None:
        inbox = Inbox()
        watching: list[Any] = []
        with closing_with({"extensions": {LEAVING: watching.append}}, inbox):
            (leave,) = watching
            if leaves_first:
                leave()
                inbox.put(delta(1))  # nobody is there to hear it
            taking = asyncio.ensure_future(inbox.take())
            await asyncio.sleep(0)
            leave()
            with pytest.raises(ClientGoneError):
                await asyncio.wait_for(taking, 5)
        assert watching[1:] == [None]

    asyncio.run(run())


def test_what_comes_after_a_cancelled_wait_is_kept() -> None:
    async def run() -> None:
        inbox = Inbox()
        waiting = asyncio.ensure_future(inbox.take())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
        inbox.put(delta(1))
        assert len(await inbox.take()) == 1

    asyncio.run(run())


def test_a_reader_that_will_have_it_is_told_instead_of_the_task_that_waits() -> None:
    async def run() -> None:
        read: list[int] = []

        def reader(deltas: list[Delta]) -> bool:
            takes = all(found.num_output < 3 for found in deltas)
            if takes:
                read.extend(found.num_output for found in deltas)
            return takes

        inbox = Inbox(reader)
        inbox.put(delta(0))
        await asyncio.sleep(0)
        assert read == []  # nobody waits: what the task does not know cannot overtake it
        assert [found.num_output for found in await inbox.take()] == [0]
        taking = asyncio.ensure_future(inbox.take())
        await asyncio.sleep(0)
        for count in (1, 2):
            inbox.put(delta(count))
        await asyncio.sleep(0)
        assert read == [1, 2]
        assert not taking.done()
        inbox.put(delta(3))
        assert [found.num_output for found in await taking] == [3]

    asyncio.run(run())


def test_a_fault_of_the_reader_is_the_task_s() -> None:
    async def run() -> None:
        def reader(_: list[Delta]) -> bool:
            raise ValueError("a fault")

        inbox = Inbox(reader)
        taking = asyncio.ensure_future(inbox.take())
        await asyncio.sleep(0)
        inbox.put(delta(1))
        with pytest.raises(ValueError, match="a fault"):
            await taking

    asyncio.run(run())


def test_a_closed_inbox_tells_no_reader() -> None:
    async def run() -> None:
        read: list[Delta] = []
        inbox = Inbox(lambda deltas: not read.extend(deltas))
        taking = asyncio.ensure_future(inbox.take())
        await asyncio.sleep(0)
        inbox.put(delta(1))
        inbox.close()
        with pytest.raises(ClientGoneError):
            await taking
        assert read == []

    asyncio.run(run())
