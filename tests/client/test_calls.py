"""What a client sends to a server, and what it makes of each way in which one can refuse."""

from __future__ import annotations

import asyncio
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from both_clients import BOTH, FILES
from command_line import ditforge, run_here
from front import Call, Front, Refusal, front

from ditforge import manifest
from ditforge.client import AsyncClient, Client, ConnectionSettings, Step, retry
from ditforge.errors import DitforgeError, DitforgeWarning, UserError
from ditforge.triton_repo.server import Server

SMALL = {"height": 32, "width": 48, "seed": 0}
MODELS = ["text_encoders", "dit", "dit", "dit", "dit", "vae_decoder"]
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full: 64 requests wait"


@pytest.fixture
def between(schnell_server: Server) -> Iterator[Front]:
    with front(schnell_server.url) as passes:
        yield passes


@pytest.fixture(scope="module")
def alone(schnell_server: Server) -> bytes:
    """The picture, as one server makes it that nothing happens to."""
    with Client(schnell_server.url) as client:
        return client.generate("a", **SMALL).tobytes()


def first(count: int, refusal: Refusal, model: str = "dit") -> Callable[[Call], Refusal | None]:
    """Refuses the first calls of a model."""
    left = [count]

    def refuse(call: Call) -> Refusal | None:
        if call.model != model or not left[0]:
            return None
        left[0] -= 1
        return refusal

    return refuse


def said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if warning.category is DitforgeWarning]


@pytest.mark.parametrize("make", BOTH)
def test_every_call_says_which_picture_it_is_of(make: Any, between: Front, schnell) -> None:
    headers = {"x-team": "red team", "x-trace-bin": b"\0\xff"}
    with make(between.url, token="s3cret", step_timeout=50, timeout=70, headers=headers) as client:
        client.generate("a", **SMALL)
        client.generate(["a", "b"], **SMALL)
    assert [call.model for call in between.calls] == MODELS * 2
    headers = [call.headers for call in between.calls]
    pictures = [each["ditforge-picture"] for each in headers]
    assert len(set(pictures[:6])) == len(set(pictures[6:])) == 1
    assert pictures[0] != pictures[6]
    assert all(len(picture) == 32 and int(picture, 16) for picture in pictures)
    digest = manifest.digest(manifest.read(schnell.engines, "engines").components)
    assert len(digest) == 64
    assert {each["ditforge-engines"] for each in headers} == {digest}
    for name, value in {"authorization": "Bearer s3cret", "x-team": "red team", "x-trace-bin": b"\0\xff"}.items():
        assert {each[name] for each in [*headers, *between.asked]} == {value}
    assert all(30 < call.timeout < 51 for call in between.calls)


def test_without_a_token_none_is_sent(between: Front) -> None:
    with Client(between.url) as client:
        client.generate("a", steps=1, **SMALL)
    assert [call.model for call in between.calls] == ["text_encoders", "dit", "vae_decoder"]
    assert not any("authorization" in call.headers for call in between.calls)


def test_a_call_gets_no_more_time_than_is_left_of_the_picture(between: Front) -> None:
    with Client(between.url, step_timeout=50, timeout=20) as client:
        client.generate("a", callback=lambda step: time.sleep(0.5), **SMALL)
    assert between.calls[0].timeout < 21  # as gRPC rounds it
    assert between.calls[-1].timeout < between.calls[0].timeout - 1.5


@pytest.mark.parametrize(
    ("refusal", "why"),
    [
        (FULL, "was busy"),
        ((grpc.StatusCode.UNAVAILABLE, "the model dit is restarting"), "was restarting"),
        ((grpc.StatusCode.UNAVAILABLE, "the server is stopping"), "was stopping"),
        ((grpc.StatusCode.INTERNAL, "Stub process 'dit_0_0' is not healthy."), "was restarting"),
        ((grpc.StatusCode.DEADLINE_EXCEEDED, "the step took too long"), "did not answer in time"),
    ],
)
@pytest.mark.parametrize("make", BOTH)
def test_what_passes_is_repeated(
    make: Any, between: Front, alone: bytes, refusal: Refusal, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    between.refuse = first(3, refusal)
    with (
        caplog.at_level(logging.INFO, "ditforge.client"),
        warnings.catch_warnings(record=True) as caught,
        make(between.url) as client,
    ):
        warnings.simplefilter("always")
        assert client.generate("a", **SMALL).tobytes() == alone
    repeated = "1 call was repeated, and the picture went on there"
    assert said(caught) == [f"the server {between.url} {why}; {repeated}"]
    assert caught[0].filename in (__file__, *FILES)
    logged = [record.getMessage() for record in caplog.records if record.name == "ditforge.client"]
    assert logged == [f"{between.url} {why} during dit, step 1 of 4: {refusal[1]}"] * 3


@pytest.mark.parametrize(
    ("refusal", "kind", "problem"),
    [
        (
            (grpc.StatusCode.INVALID_ARGUMENT, "latents has rank 5"),
            UserError,
            "refuses .* dit, .*: latents has rank 5",
        ),
        ((grpc.StatusCode.UNAUTHENTICATED, "no token"), UserError, "wants a token, and none was sent"),
        ((grpc.StatusCode.PERMISSION_DENIED, "not you"), UserError, "refused this client: not you"),
        (
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER: Sent message larger than max (5 vs. 4)"),
            UserError,
            "too large",
        ),
        ((grpc.StatusCode.INTERNAL, "out of memory"), DitforgeError, "could not run dit, step 1 of 4: out of memory"),
        ((grpc.StatusCode.FAILED_PRECONDITION, "12ab"), UserError, "serves other engines than the picture .*: 12ab"),
    ],
)
@pytest.mark.parametrize("make", BOTH)
def test_what_does_not_pass_is_not_repeated(
    make: Any, between: Front, refusal: Refusal, kind: type[DitforgeError], problem: str
) -> None:
    between.refuse = first(1, refusal)
    with make(between.url) as client:
        with pytest.raises(DitforgeError, match=problem) as caught:
            client.generate("a", **SMALL)
        assert type(caught.value) is kind
        assert between.url in caught.value.problem
        assert [call.model for call in between.calls] == MODELS[:2]
        client.generate("a", **SMALL)  # and the client can go on


@pytest.mark.parametrize("make", BOTH)
def test_it_gives_up_after_the_retry_timeout(make: Any, between: Front) -> None:
    between.refuse = lambda call: FULL
    with make(between.url, retry_timeout=1) as client:
        started = time.monotonic()
        with pytest.raises(DitforgeError, match=r"was busy during text_encoders: the queue.*tries in 1 s") as caught:
            client.generate("a", **SMALL)
        assert 1 <= time.monotonic() - started < 20
    assert "retry_timeout=" in caught.value.fix
    assert 2 <= len(between.calls) <= 30  # 0.1, 0.2, 0.4 … s apart


@pytest.mark.parametrize("make", BOTH)
def test_the_pictures_time_ends_it_all(make: Any, between: Front) -> None:
    between.refuse = lambda call: FULL
    late = r"not finished within 3 s: it was at text_encoders, where .* was busy"
    with make(between.url, timeout=3) as client, pytest.raises(DitforgeError, match=late):
        client.generate("a", **SMALL)


@pytest.mark.parametrize("make", BOTH)
def test_a_last_try_without_time_hides_no_reason(make: Any, between: Front) -> None:
    """The server has refused before, in words. That it does not answer in what is left of the time says less."""

    def refuse(call: Call) -> Refusal:
        if len(between.calls) > 1:
            time.sleep(3)
        return FULL

    between.refuse = refuse
    late = r"not finished within 3 s: it was at text_encoders, where .* was busy"
    with make(between.url, timeout=3) as client, pytest.raises(DitforgeError, match=late):
        client.generate("a", **SMALL)
    assert len(between.calls) == 2


def test_a_cancelled_task_waits_for_no_retry(between: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    between.refuse = lambda call: FULL if call.model == "dit" else None
    monkeypatch.setattr(retry, "FIRST_WAIT", 1000.0)

    async def main() -> float:
        async with AsyncClient(between.url, retry_timeout=600) as client:
            task = asyncio.create_task(client.generate("a", **SMALL))
            while len(between.calls) < 2:
                await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return time.monotonic()

    cancelled = asyncio.run(main())
    assert time.monotonic() - cancelled < 10
    assert len(between.calls) == 2


def test_command_line_says_on_one_line_that_it_retried(between: Front, tmp_path: Path) -> None:
    between.refuse = first(1, FULL)
    result = ditforge("generate", "a", "--url", between.url, "--seed", "0", "--out", "a.png", cwd=tmp_path)
    assert (result.code, result.out) == (0, "a.png\n")
    lines = [line for line in result.err.splitlines() if "repeated" in line]
    went_on = "1 call was repeated, and the picture went on there"
    assert lines == [f"warning: the server {between.url} was busy; {went_on}"]


# which connections calls go through


def test_clients_of_the_same_settings_share_connections(between: Front) -> None:
    settings = ConnectionSettings((between.url,))
    with Client(settings) as first:
        with Client(settings) as second, Client(between.url) as stranger, Client(replace(settings)) as equal:
            for client in (first, second, stranger, equal):
                client.generate("a", steps=1, **SMALL)
        first.generate("a", steps=1, **SMALL)  # which goes on though the other one was closed
    a, b, c, d, again = [call.peer for call in between.calls][::3]
    assert a == b == again
    assert len({a, c, d}) == 3


def test_settings_that_are_ready_with_some_changed(between: Front) -> None:
    with Client(ConnectionSettings((between.url,), token="s3cret"), headers={"x-team": "red"}) as client:
        client.generate("a", steps=1, **SMALL)
    assert {(call.headers["authorization"], call.headers["x-team"]) for call in between.calls} == {
        ("Bearer s3cret", "red")
    }


def test_the_pictures_of_a_command_share_its_time(
    between: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also those of different options, which are requests of their own."""
    between.change = lambda call, answer: time.sleep(0.6)
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text('a\n{"prompt": "b", "sampler": "heun"}\n')
    options = ("--prompts", "prompts.txt", "--steps", "1", "--height", "32", "--width", "32")
    times = ("--timeout", "20", "--step-timeout", "50")
    result = run_here(["generate", "--url", between.url, *options, *times], monkeypatch, capfd)
    assert result.code == 0, result.err
    first, second = [call.timeout for call in between.calls if call.model == "text_encoders"]
    assert 15 < first < 21
    assert 0 < second < first - 1  # it is 1.8, which gRPC rounds


def test_headers_of_the_command_line(between: Front, tmp_path: Path) -> None:
    options = (
        "--header",
        "x-team: red",
        "--header",
        "x-trace-bin:AP8=",
        "--keepalive",
        "5",
        "--keepalive-timeout",
        "5",
    )
    result = ditforge("generate", "a", "--url", between.url, "--steps", "1", *options, "--out", "a.png", cwd=tmp_path)
    assert result.code == 0, result.err
    assert {call.headers["x-team"] for call in between.calls} == {"red"}
    assert {call.headers["x-trace-bin"] for call in between.calls} == {b"\0\xff"}


# what networks make


def nan_in(model: str, tensor: str, nth: int) -> Callable[[Call, object], None]:
    """Puts a NaN into an output of the nth answer of a model."""
    count = [0]

    def change(call: Call, answer: object) -> None:
        count[0] += call.model == model
        if call.model == model and count[0] == nth:
            (index,) = (i for i, output in enumerate(answer.outputs) if output.name == tensor)  # type: ignore[attr-defined]
            values = np.frombuffer(answer.raw_output_contents[index], np.float32).copy()  # type: ignore[attr-defined]
            values[5] = np.nan
            answer.raw_output_contents[index] = values.tobytes()  # type: ignore[attr-defined]

    return change


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_velocity_that_is_nan(between: Front, sampler: str) -> None:
    between.change = nan_in("dit", "velocity", 3)
    steps: list[Step] = []
    broken = r"velocity is not finite .* 1 of 384 elements: dit, step 3 of 4"
    with Client(between.url) as client, pytest.raises(DitforgeError, match=broken):
        client.generate("a", callback=steps.append, sampler=sampler, **SMALL)
    assert len(steps) == 2
    assert len(between.calls) == 1 + 3


@pytest.mark.parametrize("tensor", ["prompt_embeds", "pooled_embeds"])
def test_embeddings_that_are_nan(between: Front, tensor: str) -> None:
    between.change = nan_in("text_encoders", tensor, 1)
    broken = f"{tensor} is not finite .*: text_encoders\n.*ditforge verify"
    with Client(between.url) as client, pytest.raises(DitforgeError, match=broken):
        client.generate("a", **SMALL)
    assert len(between.calls) == 1


def test_picture_of_one_colour(between: Front) -> None:
    def change(call: Call, answer: object) -> None:
        if call.model == "vae_decoder":
            half = len(answer.raw_output_contents[0]) // 2  # type: ignore[attr-defined]
            answer.raw_output_contents[0] = answer.raw_output_contents[0][:half] + bytes(half)  # type: ignore[attr-defined]

    between.change = change
    with warnings.catch_warnings(record=True) as caught, Client(between.url) as client:
        warnings.simplefilter("always")
        client.generate(["a", "b"], **SMALL)
    assert said(caught) == ["picture 2 of 2 is of one colour everywhere, (0, 0, 0): vae_decoder may have failed"]
    assert caught[0].filename == __file__
