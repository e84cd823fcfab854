"""AsyncClient: what it has beside Client, which is an event loop, cancelled tasks, and no threads."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
from both_clients import connections
from command_line import PATIENCE, eventually
from front import Call, Front, Refusal, front
from PIL import Image
from replicas import lasting_port

from ditforge.client import AsyncClient, Client, ConnectionSettings, Step
from ditforge.client.samplers import find_sampler
from ditforge.errors import DitforgeError, DitforgeWarning, UserError
from ditforge.triton_repo.server import Server

SMALL = {"height": 32, "width": 48, "seed": 0}  # 4 steps


@pytest.fixture
def between(schnell_server: Server) -> Iterator[Front]:
    with front(schnell_server.url) as passes:
        yield passes


class Held:
    """Holds calls of a model at the server until their clients do not wait any more, and counts those."""

    def __init__(self, model: str) -> None:
        self.model, self.began, self.cancelled = model, 0, 0

    def __call__(self, call: Call) -> Refusal | None:
        if call.model == self.model:
            self.began += 1
            until = time.monotonic() + PATIENCE
            while call.active() and time.monotonic() < until:
                time.sleep(0.005)
            self.cancelled += not call.active()
        return None


async def soon(condition: Callable[[], object]) -> None:
    """Wait until something holds."""
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "it did not come true in time"
        await asyncio.sleep(0.01)


def others() -> set[asyncio.Task[object]]:
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


# cancelled


@pytest.mark.parametrize("model", ["text_encoders", "dit", "vae_decoder"])
def test_cancelling_the_task_cancels_the_call(between: Front, model: str) -> None:
    held = Held(model)

    async def main() -> None:
        async with AsyncClient(between.url) as client:
            between.refuse = held
            task = asyncio.create_task(client.generate("a", **SMALL))
            await soon(lambda: held.began)
            assert held.cancelled == 0
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await soon(lambda: held.cancelled)
            await soon(lambda: not others())
            between.refuse = lambda call: None
            await client.generate("a", **SMALL)  # and the client can go on

    asyncio.run(main())
    assert (held.began, held.cancelled) == (1, 1)


def test_one_of_several_is_cancelled(between: Front) -> None:
    with Client(between.url) as client:
        alone = client.generate("a", **SMALL).tobytes()

    async def main() -> Image.Image:
        async with AsyncClient(between.url) as client:
            tasks = [asyncio.create_task(client.generate("a", **SMALL)) for _ in range(4)]
            await soon(lambda: len(between.calls) > 10)
            for task in tasks[1:]:
                task.cancel()
            await asyncio.wait(tasks)
            assert sum(task.cancelled() for task in tasks) >= 1
            return await tasks[0]

    assert asyncio.run(main()).tobytes() == alone


def test_time_that_is_up(between: Front) -> None:
    held = Held("dit")

    async def main() -> None:
        async with AsyncClient(between.url) as client:
            between.refuse = held
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.generate("a", **SMALL), 0.5)
            await soon(lambda: held.cancelled)

    asyncio.run(main())


def test_cancelled_while_it_connects(between: Front) -> None:
    """The task that connects is cancelled; another one that waits for that connects then."""
    asked = threading.Event()
    between.ready = lambda: asked.set() or time.sleep(0.5) or True

    async def main() -> None:
        client = AsyncClient([between.url, f"127.0.0.1:{lasting_port()}"])
        tasks = [asyncio.create_task(client.connect()) for _ in range(2)]
        await soon(asked.is_set)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        await tasks[1]
        await client.close()
        assert not others()

    asyncio.run(main())
    eventually(lambda: connections(between.url) == 0)  # gRPC closes them in the background


# no threads


def test_many_pictures_at_once(schnell_server: Server) -> None:
    count, threads = 50, set[int]()

    def note(step: Step) -> None:
        threads.add(threading.active_count())
        assert threading.current_thread() is threading.main_thread()

    async def main() -> list[Image.Image]:
        before = threading.active_count()
        async with AsyncClient(schnell_server.url) as client:
            options = {**SMALL, "steps": 2, "callback": note}
            pictures = [client.generate("a", **{**options, "seed": seed}) for seed in range(count)]
            images = await asyncio.gather(*pictures)
        assert max(threads) <= before + 2  # gRPC's own
        assert not others()
        return images

    images = asyncio.run(main())
    eventually(lambda: connections(schnell_server.url) == 0)  # gRPC closes them in the background
    assert len({image.tobytes() for image in images}) == count
    with Client(schnell_server.url) as client:
        for seed in (0, count - 1):
            difference = np.abs(
                np.asarray(client.generate("a", **{**SMALL, "steps": 2, "seed": seed}), np.int16) - images[seed]
            )
            assert difference.max() <= 1


def test_event_loop_goes_on_meanwhile(between: Front) -> None:
    held = Held("dit")

    async def main() -> None:
        async with AsyncClient(between.url) as client:
            between.refuse = held
            task = asyncio.create_task(client.generate("a", **SMALL))
            await soon(lambda: held.began)
            begun = time.monotonic()
            await asyncio.sleep(0.1)
            assert time.monotonic() - begun < 5  # of the 300 that the call may take
            task.cancel()

    asyncio.run(main())


# plain functions


def test_samplers_and_callbacks_are_plain_functions(between: Front) -> None:
    """They run in the task: its context is theirs, and what they raise ends the picture."""
    variable = ContextVar("variable", default=0)
    seen: list[int] = []

    def own(*arguments: Any) -> Any:
        seen.append(variable.get())
        return find_sampler("euler")(*arguments)

    def note(step: Step) -> None:
        seen.append(variable.get())
        assert asyncio.get_running_loop().is_running()

    def fail(step: Step) -> None:
        raise ZeroDivisionError

    async def picture(client: AsyncClient, number: int) -> Image.Image:
        variable.set(number)
        return await client.generate("a", sampler=own, callback=note, **SMALL)

    async def main() -> None:
        async with AsyncClient(between.url) as client:
            one, two = await asyncio.gather(picture(client, 1), picture(client, 2))
            assert one.tobytes() == two.tobytes()
            with pytest.raises(ZeroDivisionError):
                await client.generate("a", callback=fail, **SMALL)

    asyncio.run(main())
    assert sorted(seen) == [1] * 5 + [2] * 5


# warnings


def test_warnings_name_the_line_that_asked(between: Front) -> None:
    between.refuse = lambda call: None
    dead = f"127.0.0.1:{lasting_port()}"
    here = inspect.currentframe()
    assert here is not None

    async def main() -> list[int]:
        lines = [inspect.currentframe().f_lineno + 1]  # type: ignore[union-attr]
        async with AsyncClient([dead, between.url]) as client:
            long = "red " * 3000
            lines.append(inspect.currentframe().f_lineno + 1)  # type: ignore[union-attr]
            await client.generate(long, **SMALL)
            lines.append(inspect.currentframe().f_lineno + 1)  # type: ignore[union-attr]
            task = asyncio.create_task(client.generate(long, **SMALL))
            await task
        with Client(between.url) as blocking:
            lines.append(inspect.currentframe().f_lineno + 1)  # type: ignore[union-attr]
            blocking.generate(long, **SMALL)
        return lines

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lines = asyncio.run(main())
    caught = [warning for warning in caught if warning.category is DitforgeWarning]
    assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, line) for line in lines]
    assert str(caught[0].message).startswith(f"{dead} is left out")
    assert "was cut" in str(caught[1].message)


def test_warning_of_one_line_is_given_once(between: Front) -> None:
    async def main() -> None:
        async with AsyncClient(between.url) as client:
            for _ in range(3):
                await client.generate("red " * 3000, **SMALL)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        asyncio.run(main())
    assert len([warning for warning in caught if warning.category is DitforgeWarning]) == 1


# connected, closed, and elsewhere


def test_model_and_closing(between: Front) -> None:
    async def main() -> None:
        client = AsyncClient(between.url)
        with pytest.raises(DitforgeError, match=r"not connected\nfix: +await client.connect\(\)"):
            _ = client.model
        assert await client.connect() is client
        assert client.model.name == "random-schnell"
        assert await client.connect() is client  # twice does no harm
        await client.close()
        await client.close()
        for what in (client.generate("a"), client.connect()):
            with pytest.raises(DitforgeError, match="this AsyncClient is closed"):
                await what
        await AsyncClient(between.url).close()  # never used

    asyncio.run(main())
    eventually(lambda: connections(between.url) == 0)  # gRPC closes them in the background


def test_closing_ends_pictures(between: Front) -> None:
    held = Held("dit")

    async def main() -> None:
        client = await AsyncClient(between.url).connect()
        between.refuse = held
        task = asyncio.create_task(client.generate("a", **SMALL))
        await soon(lambda: held.began)
        await client.close()
        with pytest.raises(DitforgeError, match=f"^the connection to {between.url} is closed\n"):
            await task
        await soon(lambda: held.cancelled)

    asyncio.run(main())


def test_closing_one_of_two_that_share_a_connection(between: Front) -> None:
    held, settings = Held("dit"), ConnectionSettings((between.url,))

    async def main() -> None:
        first, second = await AsyncClient(settings).connect(), await AsyncClient(settings).connect()
        assert connections(between.url) == 1
        between.refuse = held
        tasks = [asyncio.create_task(client.generate("a", **SMALL)) for client in (first, second)]
        await soon(lambda: held.began == 2)
        await first.close()
        with pytest.raises(DitforgeError, match="is closed"):
            await tasks[0]
        await soon(lambda: held.cancelled)
        assert not tasks[1].done()
        assert (held.cancelled, connections(between.url)) == (1, 1)
        await second.close()
        with pytest.raises(DitforgeError, match="is closed"):
            await tasks[1]

    asyncio.run(main())
    eventually(lambda: held.cancelled == 2 and connections(between.url) == 0)


def test_another_event_loop(between: Front) -> None:
    client = AsyncClient(between.url)
    asyncio.run(client.connect())
    for what in (client.generate("a"), client.connect()):
        with pytest.raises(UserError, match="another event loop"):
            asyncio.run(what)
    asyncio.run(client.close())  # the other one has ended, and its connections with it


def test_connecting_is_tried_again(between: Front) -> None:
    async def main() -> None:
        client = AsyncClient(between.url, connect_timeout=0.5)
        between.ready = lambda: False
        with pytest.raises(DitforgeError, match="is not ready"):
            await client.connect()
        between.ready = lambda: True
        await client.connect()
        await client.close()

    asyncio.run(main())
