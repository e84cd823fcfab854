"""The calls of one picture: each at a server that can answer it, and again where one fails, while there is time."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Mapping

import numpy as np

from ditforge.client.failures import all_of, call_error, connect_error, gave_up, other_engines, short, too_late
from ditforge.client.replica import Arrays, CallFailed, Replica, Served, Unfit
from ditforge.client.retry import Failure, Retries
from ditforge.client.settings import ConnectionSettings
from ditforge.errors import DitforgeError, DitforgeWarning
from ditforge.model import Model

log = logging.getLogger("ditforge.client")


class Calls:
    """What one picture asks of the servers `order`, the first of which is asked as long as it answers.

    `served` is what the picture is begun with. Its time begins now. `told` has the (address, engines) of servers that
    somebody was warned of, and is added to. What is waited for ends where `cancelled` is set.
    """

    def __init__(
        self,
        settings: ConnectionSettings,
        order: list[Replica],
        served: Served,
        told: set[tuple[str, str]],
        cancelled: threading.Event,
    ) -> None:
        self._settings, self._order, self._served, self._told = settings, order, served, told
        self._cancelled = cancelled
        self._deadline = time.monotonic() + settings.timeout
        self._headers = {"ditforge-picture": uuid.uuid4().hex, **settings.headers()}
        if served.engines:
            self._headers["ditforge-engines"] = served.engines
        self._repeated = 0
        self._failures: Counter[str] = Counter()

    @property
    def model(self) -> Model:
        """The model that the picture is made with."""
        return self._served.model

    @property
    def repeated(self) -> str:
        """How many calls were repeated, and why; empty where none was."""
        if not self._repeated:
            return ""
        calls = "1 call was" if self._repeated == 1 else f"{self._repeated} calls were"
        return f"{calls} repeated: {', '.join(f'{what} ({count})' for what, count in self._failures.items())}"

    def infer(self, name: str, inputs: Mapping[str, np.ndarray], step: str = "") -> Arrays:
        """Run the model `name` on `inputs`, each with the batch first; errors say at which `step` that was.

        Raises UserError for a bad request and where no server of the picture's engines is left, DitforgeError if a
        server fails for good or all of them for too long, and asyncio.CancelledError once `cancelled` is set.
        """
        what = f"{name}, {step}" if step else name
        retries = Retries(self._settings.retry_timeout, self._deadline)
        failures: dict[str, Failure] = {}
        reasons: set[str] = set()
        while True:
            unfit: dict[str, DitforgeError] = {}
            for replica in sorted(self._order, key=lambda replica: replica.failed_lately):
                if self._cancelled.is_set():
                    raise asyncio.CancelledError
                if time.monotonic() >= self._deadline:
                    raise too_late(what, failures, self._settings.timeout)
                try:
                    answer = self._try(replica, name, dict(inputs))
                except Unfit as problem:
                    unfit[replica.url] = problem.error
                    self._tell(replica.url, problem.engines)
                except CallFailed as failed:
                    replica.failed()
                    failures[replica.url] = failure = failed.failure
                    if failure.reason is None:
                        raise call_error(replica.url, what, failure) from failed
                    retries.failed(time.monotonic())
                    reasons.add(f"{replica.url} {failure.reason}")
                    log.info("%s %s during %s: %s", replica.url, failure.reason, what, failure.shown)
                else:
                    self._repeated += bool(reasons)
                    self._failures.update(reasons)
                    return answer
            if len(unfit) == len(self._order):
                raise all_of(unfit, "no server is left for the picture")
            now = time.monotonic()
            wait = retries.wait(now)
            if wait is None and now < self._deadline:
                raise gave_up(what, failures, unfit, retries, now)
            self._cancelled.wait(wait or 0)

    def _try(self, replica: Replica, name: str, inputs: Arrays) -> Arrays:
        """Raises Unfit where the server is not one of the picture's, CallFailed where it fails."""
        left = self._deadline - time.monotonic()
        try:
            served = replica.describe(min(self._settings.connect_timeout, self._settings.step_timeout, left))
        except CallFailed as failed:
            if failed.failure.reason is None:
                raise Unfit(connect_error(replica.url, failed.failure, self._settings)) from failed
            raise
        wanted = short(self._served.engines)
        if not served.makes_the_same(self._served):
            raise Unfit(other_engines(replica.url, wanted, short(served.engines)), served.engines)
        try:
            return replica.infer(name, inputs, served.max_batch, self._headers, self._deadline)
        except CallFailed as failed:
            if failed.failure.status == "FAILED_PRECONDITION":  # one of several servers behind the address
                raise Unfit(other_engines(replica.url, wanted, failed.failure.shown)) from failed
            raise

    def _tell(self, url: str, engines: str | None) -> None:
        """Warn, once, of a server that is left out for its engines, if there are others."""
        if engines is None or len(self._order) == 1 or (url, engines) in self._told:
            return
        self._told.add((url, engines))
        mine, theirs = short(self._served.engines), short(engines)
        problem = f"{url} is left out: it serves the engines {theirs}, and the picture was begun with {mine}"
        warnings.warn(problem, DitforgeWarning, stacklevel=2)
