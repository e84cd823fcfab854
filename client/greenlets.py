"""Plain functions in an event loop: each runs in a greenlet, which a coroutine drives.

Where such a function has to wait, `wait_for` hands an awaitable to the coroutine, which awaits it and then lets the
function go on. So the functions between, a user's sampler and callback among them, need not know that there is an event
loop. SQLAlchemy's asyncio support does the same.
Source: https://github.com/sqlalchemy/sqlalchemy/blob/main/lib/sqlalchemy/util/concurrency.py
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")


async def in_greenlet(function: Callable[..., T], *args: object) -> T:
    """What `function` returns, which may call `wait_for`. An error of what is waited for is raised there.

    So is asyncio.CancelledError, where the task is cancelled while the function waits.
    """
    driver = getcurrent()
    running = greenlet(function, driver)
    running.gr_context = driver.gr_context  # that of the task, as for a coroutine that it awaits
    result = running.switch(*args)
    while not running.dead:
        try:
            value = await result
        except GeneratorExit:  # the event loop has ended: nothing can be waited for any more
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
    """What `awaitable` gives; for functions that `in_greenlet` runs, and those that they call."""
    driver = getcurrent().parent
    if driver is None:
        raise RuntimeError("wait_for was called outside of in_greenlet")
    value: T = driver.switch(awaitable)
    return value
