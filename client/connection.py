"""The servers of a client: at which one a picture begins, and with which engines."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping

import numpy as np

from ditforge.client.calls import Calls
from ditforge.client.failures import all_of, connect_error
from ditforge.client.replica import Arrays, CallFailed, Replica, Served, Unfit
from ditforge.client.retry import Retries
from ditforge.client.settings import ConnectionSettings
from ditforge.errors import DitforgeError
from ditforge.model import Model

LEAST_TIMEOUT = 0.1  # seconds for a server's answer, where others took the time to connect


class Connection:
    """One server, or several that serve the same engines. Any number of threads can use it.

    Raises UserError where no server with a model made by ditforge answers, DitforgeError where none is ready in time.
    """

    def __init__(self, settings: ConnectionSettings) -> None:
        self.settings = settings
        self._replicas = [Replica(url, settings) for url in settings.urls]
        self._turns = itertools.count()
        self._told: set[tuple[str, str]] = set()
        try:
            self._served = self._connect()
        except BaseException:
            self.close()
            raise

    @property
    def model(self) -> Model:
        """The model that pictures were last begun with."""
        return self._served.model

    def begin(self, cancelled: threading.Event | None = None) -> Calls:
        """The calls of one picture, whose time begins to count. Each picture begins at the next server.

        Its engines are those of the picture before, unless every server has changed its own.
        """
        first = next(self._turns) % len(self._replicas)
        order = self._replicas[first:] + self._replicas[:first]
        wanted, others = self._served, list[Served]()
        for replica, timeout in self._asked(order):
            try:
                served = replica.describe(timeout)
            except CallFailed:
                replica.failed()  # the picture's calls may have more time
            except Unfit:
                continue
            else:
                if served.makes_the_same(wanted):
                    break
                others.append(served)
        if len(others) == len(order):
            self._served = wanted = others[0]
        return Calls(self.settings, order, wanted, self._told, cancelled or threading.Event())

    def infer(self, name: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run the model `name` on `inputs`, each with the batch first, as a picture of this one call."""
        return self.begin().infer(name, inputs)

    def close(self) -> None:
        """Close all channels."""
        for replica in self._replicas:
            replica.close()

    def _connect(self) -> Served:
        """What the first server serves that answers. Servers that are only about to be ready are waited for."""
        now = time.monotonic()
        retries = Retries(self.settings.connect_timeout, now + self.settings.connect_timeout)
        retries.failed(now)
        while True:
            errors: dict[str, DitforgeError] = {}
            passing = False
            for replica, timeout in self._asked(self._replicas):
                try:
                    return replica.describe(timeout)
                except Unfit as problem:
                    errors[replica.url] = problem.error
                except CallFailed as failed:
                    replica.failed()
                    passing = passing or failed.failure.passing
                    errors[replica.url] = connect_error(replica.url, failed.failure, self.settings)
            wait = retries.wait(time.monotonic())
            if not passing or wait is None:
                raise all_of(errors, "no server can be used")
            time.sleep(wait)

    def _asked(self, order: list[Replica]) -> Iterator[tuple[Replica, float]]:
        """The servers, those that failed lately last, and how many seconds each has to answer: its share of them."""
        until = time.monotonic() + self.settings.connect_timeout
        for number, replica in enumerate(sorted(order, key=lambda replica: replica.failed_lately)):
            yield replica, max((until - time.monotonic()) / (len(order) - number), LEAST_TIMEOUT)
