"""Plain functions in an event loop: what they wait for, and what ends their waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from ditforge.client.greenlets import in_greenlet, wait_for


class Never:
    """What never comes."""

    def __await__(self) -> Iterator[None]:
        yield


async def later(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def broken() -> int:
    await asyncio.sleep(0)
    raise ZeroDivisionError


def test_results_and_errors() -> None:
    def add(a: int, b: int) -> int:
        with pytest.raises(ZeroDivisionError):
            wait_for(broken())
        return wait_for(later(a)) + wait_for(later(b))

    async def main() -> list[int]:
        return await asyncio.gather(*(in_greenlet(add, number, 1) for number in range(10)))

    assert asyncio.run(main()) == list(range(1, 11))


def test_errors_of_the_function() -> None:
    def fail() -> None:
        wait_for(later(1))
        raise KeyError("a")

    with pytest.raises(KeyError):
        asyncio.run(in_greenlet(fail))


def test_cancelled_where_it_waits() -> None:
    """It can still wait for something then, and not be cancelled after all, as a coroutine can."""
    told: list[str] = []

    def stubborn() -> int:
        try:
            wait_for(asyncio.sleep(300))
        except asyncio.CancelledError:
            told.append("cancelled")
        return wait_for(later(7))

    async def main() -> int:
        task = asyncio.create_task(in_greenlet(stubborn))
        await asyncio.sleep(0)
        task.cancel()
        return await task

    assert asyncio.run(main()) == 7
    assert told == ["cancelled"]


def test_coroutine_that_is_closed() -> None:
    """The function ends, its finally clauses run, and what they wait for is not there any more."""
    told: list[str] = []

    def function() -> None:
        try:
            wait_for(Never())
        finally:
            told.append("begin")
            wait_for(Never())
            told.append("end")

    coroutine = in_greenlet(function)
    coroutine.send(None)
    coroutine.close()
    assert told == ["begin"]


def test_outside_of_an_event_loop() -> None:
    awaitable = later(1)
    with pytest.raises(RuntimeError, match="outside of in_greenlet"):
        wait_for(awaitable)
    awaitable.close()
