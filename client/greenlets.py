"""Runs plain functions in an event loop. Each runs in a greenlet, and a coroutine drives the greenlet.

If such a function has to wait, `wait_for` hands an awaitable to the coroutine, which awaits it and then lets the
function go on. The functions in between, such as a user's sampler and callback, need not know of the event loop.
SQLAlchemy's asyncio support works in the same way.
Source: https://github.com/sqlalchemy/sqlalchemy/blob/main/lib/sqlalchemy/util/concurrency.py
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")


async def in_greenlet(function: Callable[..., T], *args: object) -> T:
    """Run `function`, which may call `wait_for`, in a greenlet. Returns its result.

    If an awaitable fails, `wait_for` raises its error in the function. It raises asyncio.CancelledError in the function
    if the task is cancelled while the function waits.
    """
    driver = getcurrent()
    running = greenlet(function, driver)
    running.gr_context = driver.gr_context  # the function sees the task's context variables, as a coroutine would
    result = running.switch(*args)
    while not running.dead:
        try:
            value = await result
        except GeneratorExit:  # the event loop has ended, so that nothing can be awaited any more
            while not running.dead:
                running.throw(GeneratorExit)
            raise
        except BaseException:
            result = running.throw(*sys.exc_info())
        else:
            result = running.switch(value)
    returned: T = result
    return returned


def wait_for(awaitable: Awaitable[T]) -> T:
    """Wait for `awaitable` and return its result.

    Only functions that `in_greenlet` runs, and functions that these call, can use it. Raises RuntimeError elsewhere.
    """
    driver = getcurrent().parent
    if driver is None:
        raise RuntimeError("wait_for was called outside of in_greenlet")
    value: T = driver.switch(awaitable)
    return value
