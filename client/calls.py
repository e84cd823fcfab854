"""The calls that make one picture. Each goes to a suitable server, and is repeated if it fails and time is left."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter

from ditforge.client.answer import Arrays, Inputs, WrongAnswer
from ditforge.client.failures import (
    all_of,
    call_error,
    gave_up,
    other_engines,
    short,
    stopping,
    too_late,
    wrong_answer,
)
from ditforge.client.kept import KeptInputs
from ditforge.client.replica import Replica, Served, Unfit
from ditforge.client.retry import ENDING_WAIT, WENT_AWAY, Failure, Retries
from ditforge.client.settings import ConnectionSettings
from ditforge.client.told import Told
from ditforge.client.transport import CallFailed, Transport
from ditforge.contract import ENGINES_KEY, PICTURE_KEY
from ditforge.errors import DitforgeError
from ditforge.model import Model

JUST_BEFORE = 0.1  # seconds before the picture's time is over: a call that ends then was given no more time
log = logging.getLogger("ditforge.client")


class Calls:
    """The calls of one picture to the servers in `order`. The first server gets all of them, as long as it answers.

    `served` is the model and the engines that the picture is begun with. `told` gives the warnings about servers, each
    only once. `deadline`, of time.monotonic, is when the picture's time is over.
    """

    def __init__(
        self,
        settings: ConnectionSettings,
        order: list[Replica],
        served: Served,
        told: Told,
        transport: Transport,
        deadline: float,
    ) -> None:
        self._settings, self._order, self._served, self._told = settings, order, served, told
        self._transport, self._deadline = transport, deadline
        self._metadata = {PICTURE_KEY: uuid.uuid4().hex, **settings.metadata()}
        if served.engines:
            self._metadata[ENGINES_KEY] = served.engines
        self._kept = KeptInputs()
        self._answered = False
        self._repeats: Counter[tuple[tuple[tuple[str, str], ...], str]] = Counter()
        self._asked: dict[str, Served] = {}  # for each server that was called for this picture: what it serves
        self._wrong: dict[str, DitforgeError] = {}  # servers that gave a wrong answer, and are not asked again

    @property
    def model(self) -> Model:
        """The model that the picture is made with."""
        return self._served.model

    @property
    def repeated(self) -> str:
        """A sentence that says which servers failed, how many calls were repeated, and where the picture went on.

        Empty if no call was repeated.
        """
        parts = []
        for (failures, there), count in self._repeats.items():
            reasons: dict[str, list[str]] = {}
            for url, reason in failures:
                reasons.setdefault(url, []).append(reason)
            failed = " and ".join(f"the server {url} {' and '.join(said)}" for url, said in reasons.items())
            where = "there" if list(reasons) == [there] else f"at {there}"
            calls = "1 call was" if count == 1 else f"{count} calls were"
            parts.append(f"{failed}; {calls} repeated, and the picture went on {where}")
        return "; then ".join(parts)

    def infer(self, name: str, inputs: Inputs, step: str = "") -> Arrays:
        """Run the model `name` on `inputs`, arrays with the batch dimension first. Returns its outputs by name.

        `step` is shown in errors, e.g. "step 3 of 28". Raises UserError if the request is bad, or if no server with the
        picture's engines is left. Raises DitforgeError if a server fails in a way that another try does not help, if
        all servers fail for too long, or if the picture's time is over.
        """
        what = f"{name}, {step}" if step else name
        retries = Retries(self._settings.retry_timeout, self._deadline)
        failures: dict[str, Failure] = {}
        reasons: dict[tuple[str, str], None] = {}  # (address, reason) of each failure, in the order of their occurrence
        while True:
            unfit = dict(self._wrong)
            for replica in sorted(self._order, key=lambda replica: replica.failed_lately):
                if replica.url in self._wrong:
                    continue
                if time.monotonic() >= self._deadline:
                    raise too_late(what, failures, self._settings.timeout)
                try:
                    answer = self._try(replica, name, dict(inputs))
                except Unfit as problem:
                    unfit[replica.url] = problem.error
                    if problem.engines is not None:
                        self._told.of_engines(replica.url, self._served.engines, problem.engines, len(self._order))
                except WrongAnswer as wrong:
                    # Another try would get the same answer: the server is broken, or was not made by ditforge. Its
                    # earlier answers may have been wrong too, which cannot be known. Other servers make the rest.
                    replica.failed()
                    self._wrong[replica.url] = unfit[replica.url] = error = wrong_answer(replica.url, what, wrong)
                    self._told.left_out(replica.url, error.problem, len(self._order))
                except CallFailed as failed:
                    replica.failed()
                    failure, before = failed.failure, failures.get(replica.url)
                    if failure.reason is None:
                        raise call_error(replica.url, what, failure, self._settings) from failed
                    late = failure.status == "DEADLINE_EXCEEDED" and time.monotonic() > self._deadline - JUST_BEFORE
                    gone = failure.reason == WENT_AWAY and not self._answered
                    if not (before and (late or (gone and before.ending))):  # else what was before says more
                        failures[replica.url] = failure
                    retries.failed(time.monotonic())
                    reasons[replica.url, failure.reason] = None
                    log.info("%s %s during %s: %s", replica.url, failure.reason, what, failure.shown)
                else:
                    self._answered = True
                    if reasons:
                        self._repeats[tuple(reasons), replica.url] += 1
                    return answer
            if len(unfit) == len(self._order):
                raise all_of(unfit, "no server is left for the picture")
            now = time.monotonic()
            wait = retries.wait(now)
            # If no server has begun the picture, and all that failed are shutting down, a long wait is not worth it.
            ending = not self._answered and all(failure.ending for failure in failures.values())
            left = ENDING_WAIT - (now - (retries.first or now)) if ending else float("inf")
            if left <= 0:
                raise stopping(failures, unfit)
            if wait is None and now < self._deadline:
                raise gave_up(what, failures, unfit, retries, now)
            self._transport.sleep(min(wait or 0, left))

    def _try(self, replica: Replica, name: str, inputs: Arrays) -> Arrays:
        """Try the call at one server. Raises Unfit if the server cannot make this picture, CallFailed if it fails."""
        left = self._deadline - time.monotonic()
        try:
            served = replica.describe(min(self._settings.connect_timeout, self._settings.step_timeout, left))
        except CallFailed as failed:
            if failed.failure.reason is None:
                raise Unfit(replica.connect_error(failed.failure)) from failed
            if not failed.failure.ending or replica.url not in self._asked:
                raise
            served = self._asked[replica.url]  # it is shutting down, but still finishes the pictures that it has begun
        wanted = short(self._served.engines)
        if not served.makes_the_same(self._served):
            raise Unfit(other_engines(replica.url, wanted, short(served.engines)), served.engines)
        self._asked[replica.url] = served
        try:
            return replica.infer(name, inputs, served, self._metadata, self._deadline, self._kept)
        except CallFailed as failed:
            if failed.failure.status == "FAILED_PRECONDITION":  # another server behind the address, with other engines
                raise Unfit(other_engines(replica.url, wanted, failed.failure.shown)) from failed
            raise
