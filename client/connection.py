"""The servers of a client. This decides at which server a picture begins, and with which engines."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterator, Mapping

from typing_extensions import Self

from ditforge.client.answer import Arrays, Inputs
from ditforge.client.blocking import Blocking
from ditforge.client.calls import Calls
from ditforge.client.failures import all_of
from ditforge.client.replica import Replica, Served, Unfit
from ditforge.client.retry import ENDING_WAIT, WENT_AWAY, Failure, Retries
from ditforge.client.settings import ConnectionSettings
from ditforge.client.told import Told
from ditforge.client.transport import CallFailed, Transport
from ditforge.errors import DitforgeError
from ditforge.model import Model

LEAST_TIMEOUT = 0.1  # seconds that a server gets to answer even if other servers have used up connect_timeout
OTHERS = 1.0  # seconds that the other servers get to answer after the first one has, to warn of those without use


class Connection:
    """The connection to one server, or to several that serve the same engines.

    With the default transport, any number of threads can use it. Another `transport` may have other rules.
    """

    def __init__(self, settings: ConnectionSettings, transport: Transport | None = None) -> None:
        self.settings = settings
        self._transport = transport or Blocking()
        self._replicas = [Replica(url, settings, self._transport) for url in settings.urls]
        self._turns = itertools.count()
        self._told = Told()
        self._known: Served | None = None  # the model and engines that the last picture was begun with

    def connect(self) -> Self:
        """Connect, unless that was done already. The other methods connect by themselves if it is needed.

        Raises UserError if no server with a model made by ditforge answers, and DitforgeError if no server becomes
        ready in time. After an error, the connection is closed.
        """
        if self._known is None:
            try:
                self._known = self._connect()
            except BaseException:
                self.close()
                raise
        return self

    @property
    def model(self) -> Model:
        """The model that the last picture was begun with."""
        return self._served.model

    @property
    def _served(self) -> Served:
        self.connect()
        assert self._known is not None
        return self._known

    def begin(self, deadline: float | None = None) -> Calls:
        """Return the calls of a new picture. Each picture begins at the next server.

        The picture has to be finished by `deadline` of time.monotonic, by default within `timeout` from now on. It is
        made with the engines of the picture before, unless every server now has other engines.
        """
        deadline = time.monotonic() + self.settings.timeout if deadline is None else deadline
        wanted, others = self._served, list[Served]()
        first = next(self._turns) % len(self._replicas)
        order = self._replicas[first:] + self._replicas[:first]
        for replica, timeout in self._asked(order, deadline):
            try:
                served = replica.describe(timeout)
            except CallFailed:
                replica.failed()  # it stays in the order: the calls of the picture may wait longer for it
            except Unfit:
                continue
            else:
                if served.makes_the_same(wanted):
                    break
                others.append(served)
        if len(others) == len(order):
            self._known = wanted = others[0]
        return Calls(self.settings, order, wanted, self._told, self._transport, deadline)

    def infer(self, name: str, inputs: Inputs) -> Arrays:
        """Run the model `name` once on `inputs`, arrays with the batch dimension first, like a picture of one call."""
        return self.begin().infer(name, inputs)

    def close(self) -> None:
        """Close all channels."""
        for replica in self._replicas:
            replica.close()

    def _connect(self) -> Served:
        """Ask all servers, and return what the first one in the list that answers serves.

        Waits, up to connect_timeout, if none answers but one is starting. Raises DitforgeError if none can be used.
        """
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
            for replica, answer in answers.items():
                url = replica.url
                if isinstance(answer, Unfit):
                    errors[url] = answer.error
                elif isinstance(answer, CallFailed):
                    failure = answer.failure
                    if failure.ending:
                        ending[url] = failure
                    elif failure.reason == WENT_AWAY and url in ending:
                        failure = ending[url]  # it has shut down as announced, and another may start at its address
                    passing = passing or failure.passing
                    lasting = lasting or (failure.passing and not failure.ending)
                    errors[url] = replica.connect_error(failure)
            now = time.monotonic()
            wait = retries.wait(now)
            left = ENDING_WAIT - (now - (retries.first or now)) if ending and not lasting else float("inf")
            if not passing or wait is None or left <= 0:
                raise all_of(errors, "no server can be used")
            self._transport.sleep(min(wait, left))

    def _ask_all(self) -> dict[Replica, Served | Unfit | CallFailed]:
        """Ask all servers at the same time what they serve. Returns their answers in the order of the addresses.

        When one server has answered, the others get OTHERS seconds more. Servers that take longer are left out.
        """

        def ask(replica: Replica) -> Served | Unfit | CallFailed:
            try:
                return replica.describe(self.settings.connect_timeout)
            except CallFailed as problem:
                replica.failed()
                return problem
            except Unfit as problem:
                return problem
            except DitforgeError as closed:
                return Unfit(closed)

        questions = [functools.partial(ask, replica) for replica in self._replicas]
        answers = self._transport.at_once(questions, lambda answer: isinstance(answer, Served), OTHERS)
        return {replica: answer for replica, answer in zip(self._replicas, answers, strict=True) if answer is not None}

    def _warn_of_others(self, answers: Mapping[Replica, Served | Unfit | CallFailed], served: Served) -> None:
        """Warn about the servers that no picture will be sent to, or not for now."""
        count = len(self._replicas)
        for replica, answer in answers.items():
            if isinstance(answer, Unfit):
                self._told.left_out(replica.url, answer.error.problem, count)
            elif isinstance(answer, CallFailed):
                self._told.left_out(replica.url, replica.connect_error(answer.failure).problem, count)
            elif not answer.makes_the_same(served):
                self._told.of_engines(replica.url, served.engines, answer.engines, count)

    def _asked(self, order: list[Replica], deadline: float) -> Iterator[tuple[Replica, float]]:
        """Yield each server and the seconds that it has to answer: its share of connect_timeout, or of the time left.

        Servers that failed recently come last.
        """
        until = min(time.monotonic() + self.settings.connect_timeout, deadline)
        for number, replica in enumerate(sorted(order, key=lambda replica: replica.failed_lately)):
            yield replica, max((until - time.monotonic()) / (len(order) - number), LEAST_TIMEOUT)
