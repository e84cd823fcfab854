"""The servers of a client: at which one a picture begins, and with which engines."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Mapping

import numpy as np

from ditforge.client.answer import Arrays
from ditforge.client.calls import Calls
from ditforge.client.failures import all_of, connect_error
from ditforge.client.replica import CallFailed, Replica, Served, Unfit
from ditforge.client.retry import ENDING_WAIT, WENT_AWAY, Failure, Retries
from ditforge.client.settings import ConnectionSettings
from ditforge.client.told import Told
from ditforge.errors import DitforgeError
from ditforge.model import Model

LEAST_TIMEOUT = 0.1  # seconds for a server's answer, where others took the time to connect
OTHERS = 1.0  # seconds for the other servers to say what they serve, once one has: to warn of those that are no use


class Connection:
    """One server, or several that serve the same engines. Any number of threads can use it.

    Raises UserError where no server with a model made by ditforge answers, DitforgeError where none is ready in time.
    """

    def __init__(self, settings: ConnectionSettings) -> None:
        self.settings = settings
        self._replicas = [Replica(url, settings) for url in settings.urls]
        self._turns = itertools.count()
        self._told = Told()
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
        """What the first of the servers serves that answer. Servers that are only about to be ready are waited for."""
        now = time.monotonic()
        retries = Retries(self.settings.connect_timeout, now + self.settings.connect_timeout)
        retries.failed(now)
        ending: dict[str, Failure] = {}
        while True:
            answers = self._ask_all()
            if served := next((answer for answer in answers.values() if isinstance(answer, Served)), None):
                self._warn_of_others(answers, served)
                return served
            errors: dict[str, DitforgeError] = {}
            passing = lasting = False
            for url, answer in answers.items():
                if isinstance(answer, Unfit):
                    errors[url] = answer.error
                elif isinstance(answer, CallFailed):
                    failure = answer.failure
                    if failure.ending:
                        ending[url] = failure
                    elif failure.reason == WENT_AWAY and url in ending:
                        failure = ending[url]  # it has ended, as it said, and another one may begin there
                    passing = passing or failure.passing
                    lasting = lasting or (failure.passing and not failure.ending)
                    errors[url] = connect_error(url, failure, self.settings)
            now = time.monotonic()
            wait = retries.wait(now)
            left = ENDING_WAIT - (now - (retries.first or now)) if ending and not lasting else float("inf")
            if not passing or wait is None or left <= 0:
                raise all_of(errors, "no server can be used")
            time.sleep(min(wait, left))

    def _ask_all(self) -> dict[str, Served | Unfit | CallFailed]:
        """What the servers say when they are all asked at once, in their order.

        Once one has said what it serves, the others get OTHERS seconds more; those that take longer are not in it.
        """
        answers: dict[str, Served | Unfit | CallFailed] = {}
        heard = threading.Condition()

        def ask(replica: Replica) -> None:
            answer: Served | Unfit | CallFailed
            try:
                answer = replica.describe(self.settings.connect_timeout)
            except (Unfit, CallFailed) as problem:
                if isinstance(problem, CallFailed):
                    replica.failed()
                answer = problem
            except (
                DitforgeError,
                ValueError,
            ) as closed:  # which gRPC raises once the channel is closed
                answer = Unfit(DitforgeError(str(closed)))
            with heard:
                answers[replica.url] = answer
                heard.notify()

        for replica in self._replicas:
            threading.Thread(target=ask, args=[replica], daemon=True).start()
        with heard:
            while len(answers) < len(self._replicas):
                if any(isinstance(answer, Served) for answer in answers.values()):
                    heard.wait_for(lambda: len(answers) == len(self._replicas), OTHERS)
                    break
                heard.wait()
            return {replica.url: answers[replica.url] for replica in self._replicas if replica.url in answers}

    def _warn_of_others(self, answers: dict[str, Served | Unfit | CallFailed], served: Served) -> None:
        """Warn of servers that pictures will not go to, or not now."""
        count = len(self._replicas)
        for url, answer in answers.items():
            if isinstance(answer, Unfit):
                self._told.left_out(url, answer.error.problem, count)
            elif isinstance(answer, CallFailed):
                self._told.left_out(url, connect_error(url, answer.failure, self.settings).problem, count)
            elif not answer.makes_the_same(served):
                self._told.of_engines(url, served.engines, answer.engines, count)

    def _asked(self, order: list[Replica]) -> Iterator[tuple[Replica, float]]:
        """The servers, those that failed lately last, and how many seconds each has to answer: its share of them."""
        until = time.monotonic() + self.settings.connect_timeout
        for number, replica in enumerate(sorted(order, key=lambda replica: replica.failed_lately)):
            yield replica, max((until - time.monotonic()) / (len(order) - number), LEAST_TIMEOUT)
