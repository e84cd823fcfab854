"""Which failures are repeated, and for how long: without a server, and with a clock that only the test moves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from ditforge.client.retry import FIRST_WAIT, LONGEST_WAIT, Failure, Retries

REFUSED = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused"
UNTRUSTED = "last error: UNKNOWN: Ssl handshake failed: SSL_ERROR_SSL: CERTIFICATE_VERIFY_FAILED"


@pytest.mark.parametrize(
    ("status", "message", "reason"),
    [
        ("UNAVAILABLE", REFUSED, "went away"),
        ("UNAVAILABLE", "Socket closed", "went away"),
        ("UNAVAILABLE", "Received http2 header with status: 502", "went away"),
        ("CANCELLED", "Received RST_STREAM with error code 8", "went away"),
        ("INTERNAL", "Received RST_STREAM with error code 2", "went away"),
        ("UNAVAILABLE", "the model dit is restarting", "was restarting"),
        ("UNAVAILABLE", "the model dit is not ready", "was restarting"),
        ("INTERNAL", "Stub process 'dit_0_0' is not healthy.", "was restarting"),
        ("UNAVAILABLE", "the server is stopping", "was stopping"),
        ("NOT_FOUND", "Request for unknown model: 'dit' has no available versions", "was stopping"),
        ("RESOURCE_EXHAUSTED", "the queue is full", "was busy"),
        ("UNAVAILABLE", "Exceeds maximum queue size", "was busy"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", "did not answer in time"),
        ("INVALID_ARGUMENT", "unexpected shape for input 'x'", None),
        ("NOT_FOUND", "Request for unknown model: 'nope' is not found", None),
        ("INTERNAL", "onnxruntime: out of memory", None),
        ("FAILED_PRECONDITION", "other engines", None),
        ("UNAUTHENTICATED", "no token", None),
        ("PERMISSION_DENIED", "this token may not", None),
        ("UNIMPLEMENTED", "", None),
        ("UNAVAILABLE", UNTRUSTED, None),
        ("UNAVAILABLE", "errors resolving tls-gpu1:8001: Domain name not found", "went away"),
        ("RESOURCE_EXHAUSTED", "CLIENT: Received message larger than max (5 vs. 4)", None),
        ("RESOURCE_EXHAUSTED", "Stream removed (CLIENT: Received message larger than max (5 vs. 4))", None),
        ("RESOURCE_EXHAUSTED", "CLIENT: Sent message larger than max (5 vs. 4)", None),
        ("RESOURCE_EXHAUSTED", "SERVER: Received message larger than max (5 vs. 4)", None),
        ("RESOURCE_EXHAUSTED", "Decompressed message larger than max", None),
        ("RESOURCE_EXHAUSTED", "received metadata size exceeds hard limit (value length 5 vs. 4)", None),
        ("RESOURCE_EXHAUSTED", "Stream removed (received metadata size exceeds soft limit (5 vs. 4))", None),
        ("RESOURCE_EXHAUSTED", "to-be-sent trailing metadata size exceeds peer limit", None),
        ("RESOURCE_EXHAUSTED", "gRPC message exceeds maximum size 4: 5", None),
        ("CANCELLED", "Channel closed!", None),
        ("CANCELLED", "Locally cancelled by application!", None),
    ],
)
def test_what_is_repeated(status: str, message: str, reason: str | None) -> None:
    assert Failure(status, message).reason == reason


@pytest.mark.parametrize(
    ("status", "message", "passing"),
    [
        ("UNAVAILABLE", "the model dit is not ready", True),
        ("UNAVAILABLE", "the model dit is restarting", True),
        ("UNAVAILABLE", "Received http2 header with status: 502", True),
        ("RESOURCE_EXHAUSTED", "the queue is full", True),
        ("UNAVAILABLE", REFUSED, False),
        ("UNAVAILABLE", "errors resolving nowhere:1", False),
        ("UNAVAILABLE", "Socket closed", False),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", False),
        ("UNAUTHENTICATED", "no token", False),
    ],
)
def test_what_is_waited_for_before_a_picture_begins(status: str, message: str, passing: bool) -> None:
    assert Failure(status, message).passing is passing


def test_message_is_shown_without_what_grpc_says_of_all_addresses() -> None:
    assert Failure("UNAVAILABLE", REFUSED).shown == "UNKNOWN: ipv4:127.0.0.1:1: Connection refused"
    assert Failure("UNAVAILABLE", "Socket closed").shown == "Socket closed"


def test_waits_double_up_to_the_longest() -> None:
    asked: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        asked.append((low, high))
        return high

    retries = Retries(math.inf, math.inf, uniform)
    waits = [retries.wait(0) for _ in range(9)]
    assert asked == [(0, wait) for wait in waits]  # anything between nothing and that
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5])


times = st.floats(0, 1000)


@given(
    timeout=times,
    deadline=times,
    start=times,
    fractions=st.lists(st.floats(0, 1), min_size=200, max_size=200),
    call=st.floats(0.01, 50),
)
def test_it_ends_in_time(timeout: float, deadline: float, start: float, fractions: list[float], call: float) -> None:
    """No try begins after `timeout` from the first failure, nor after the deadline; until then there is a next one."""
    drawn = iter(fractions)
    retries = Retries(timeout, deadline, lambda low, high: low + next(drawn) * (high - low))
    now, end = start, min(start + timeout, deadline)
    for _ in range(150):
        retries.failed(now)
        wait = retries.wait(now)
        assert (wait is None) == (now >= end)
        if wait is None:
            break
        assert 0 <= wait <= LONGEST_WAIT
        assert now + wait <= end + 1e-9
        now += wait + call
    assert retries.first == start
    assert retries.tries >= 1


def test_jitter_spreads() -> None:
    waits = [Retries(60, math.inf).wait(0) or 0 for _ in range(200)]
    assert 0 <= min(waits) < FIRST_WAIT / 4 < 3 * FIRST_WAIT / 4 < max(waits) <= FIRST_WAIT
