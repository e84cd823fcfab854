"""Servers that are killed, frozen, stopped or started again in the middle of a picture: it is the same all the same."""

from __future__ import annotations

import re
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from both_clients import BOTH, InLoop
from command_line import assert_error, ditforge
from proxy import nginx
from replicas import Servers, at_step

from ditforge.client import Client
from ditforge.client.replica import Replica
from ditforge.errors import DitforgeError, DitforgeWarning, UserError
from ditforge.triton_repo.server import Server, start

SMALL = {"height": 32, "width": 48, "seed": 0}  # 4 steps
CALLS = ["text_encoders", "dit", "dit", "dit", "dit", "vae_decoder"]


@pytest.fixture(scope="module")
def three(schnell) -> Iterator[Servers]:
    """Three servers, some of which the test before may have ended."""
    servers = Servers(schnell.repository, 3)
    yield servers
    servers.stop()


@pytest.fixture
def servers(three: Servers) -> Servers:
    three.all_again()
    return three


@pytest.fixture(scope="module")
def alone(schnell_server: Server) -> bytes:
    """The picture, as one server makes it that nothing happens to."""
    with Client(schnell_server.url) as client:
        return client.generate("a", **SMALL).tobytes()


@pytest.fixture
def told() -> Iterator[Callable[[], list[str]]]:
    """What has been warned of since it was last asked."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def take() -> list[str]:
            messages = [str(warning.message) for warning in caught if warning.category is DitforgeWarning]
            caught.clear()
            return messages

        yield take


@pytest.fixture(scope="module")
def other(schnell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same repository, of which one byte of an engine's digest is another."""
    folder = tmp_path_factory.mktemp("other") / "repo"
    shutil.copytree(schnell.repository, folder)
    config = folder / "dit" / "config.pbtxt"
    before, name, after = config.read_text().partition('"ditforge_engines"')
    key, value, rest = after.partition('string_value: "')
    config.write_text(before + name + key + value + ("0" if rest[0] != "0" else "1") + rest[1:])
    return folder


# a list of servers: what ends none comes first, and the next tests start again what others ended


def test_each_picture_begins_at_the_next_server(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    infer = Replica.infer

    def noted(self: Replica, *arguments: object) -> dict[str, np.ndarray]:
        asked.append(self.url)
        return infer(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Replica, "infer", noted)
    with Client(servers.urls) as client:
        for _ in range(4):
            client.generate("a", steps=1, **SMALL)
    a, b, c = servers.urls
    assert asked == [a] * 3 + [b] * 3 + [c] * 3 + [a] * 3


@pytest.mark.parametrize("settings", [{"step_timeout": 1}, {"keepalive": 0.3, "keepalive_timeout": 0.5}])
@pytest.mark.parametrize("make", BOTH)
def test_server_that_freezes(make: Any, servers: Servers, alone: bytes, told, settings: dict[str, float]) -> None:
    frozen = servers.urls[0]
    try:
        with make(servers.urls, **settings) as client:
            started = time.monotonic()
            freeze = at_step(1, lambda: servers.kill(frozen, signal.SIGSTOP))
            assert client.generate("a", callback=freeze, **SMALL).tobytes() == alone
            assert time.monotonic() - started < 15  # with the defaults, 20 and more
            silent = f"the server {frozen} did not answer in time; 1 call was repeated"
            assert told() == [f"{silent}, and the picture went on at {servers.urls[1]}"]
            client.generate("a", **SMALL)
            assert told() == []  # it is not asked again for a while
    finally:
        servers.kill(frozen, signal.SIGCONT)


def test_only_server_freezes(servers: Servers) -> None:
    (frozen, *_) = servers.urls
    freeze = at_step(1, lambda: servers.kill(frozen, signal.SIGSTOP))
    silent = f"the server at {frozen} did not answer in time during dit, step 3 of 4: .*tries in"
    try:
        with Client(frozen, step_timeout=0.5, retry_timeout=0.8) as client, pytest.raises(DitforgeError, match=silent):
            client.generate("a", callback=freeze, **SMALL)
        servers.kill(frozen, signal.SIGCONT)
        late = "the picture was not finished within 3 s: it was at dit, step 3 of 4"
        with Client(frozen, timeout=3) as client, pytest.raises(DitforgeError, match=late):
            client.generate("a", callback=freeze, **SMALL)
    finally:
        servers.kill(frozen, signal.SIGCONT)


@pytest.mark.parametrize(("make", "first"), [(Client, 0), (InLoop, 2), (Client, 4)])
def test_servers_that_are_killed_during_calls(
    make: Any, servers: Servers, alone: bytes, told, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """Two of three, one in each of two successive calls; the three cases go through all of a picture's."""
    answered: list[str] = []
    dying: list[str] = []
    infer = Replica.infer

    def frozen_then_killed(self: Replica, name: str, *arguments: object) -> dict[str, np.ndarray]:
        if len(dying) < 2 and len(answered) == first + len(dying):
            dying.append(self.url)
            servers.kill(self.url, signal.SIGSTOP)  # so that the call is certainly not answered before
            threading.Timer(0.2, servers.kill, [self.url]).start()
        answer = infer(self, name, *arguments)  # type: ignore[arg-type]
        answered.append(name)
        return answer

    monkeypatch.setattr(Replica, "infer", frozen_then_killed)
    with make(servers.urls) as client:
        assert client.generate("a", **SMALL).tobytes() == alone
    assert answered == CALLS
    assert dying == servers.urls[:2]
    one, two, three = servers.urls
    went_on = "went away; 1 call was repeated, and the picture went on at"
    assert told() == [f"the server {one} {went_on} {two}; then the server {two} {went_on} {three}"]


def test_only_server_starts_again(servers: Servers, alone: bytes, told) -> None:
    (only, *_) = servers.urls

    def end() -> None:
        servers.kill(only)
        threading.Thread(target=servers.start_again, args=[only]).start()

    with Client(only) as client:
        assert client.generate("a", callback=at_step(1, end), **SMALL).tobytes() == alone
        (message,) = told()
        assert re.fullmatch(f"the server {only} w.*; 1 call was repeated, and the picture went on there", message)
        assert client.generate("a", **SMALL).tobytes() == alone


def test_one_server_that_answers_suffices(servers: Servers, alone: bytes, tmp_path: Path) -> None:
    dead, *living = servers.urls
    servers.kill(dead)
    servers.running[0].wait()
    with Client([dead, *living]) as client:
        assert client.generate("a", **SMALL).tobytes() == alone
    options = ("--url", dead, "--url", living[0], "--seed", "0", "--out", "a.png")
    assert ditforge("generate", "a", *options, cwd=tmp_path).code == 0


# other engines


def test_server_of_other_engines_is_left_out(servers: Servers, other: Path, alone: bytes, told) -> None:
    a, b, _ = servers.urls
    servers.kill(b)
    servers.start_again(b, other)
    try:
        with Client([a, b], retry_timeout=0.5) as client:
            for _ in range(4):
                assert client.generate("a", **SMALL).tobytes() == alone
            (message,) = told()
            assert re.fullmatch(f"{b} is left out: it serves the engines \\w{{12}}, and the .* with \\w{{12}}", message)
            with pytest.raises(DitforgeError, match=f"{a} went away during .*; {b} serves other engines than"):
                client.generate("a", callback=at_step(0, lambda: servers.kill(a)), **SMALL)
            assert told() == []
    finally:
        servers.kill(b)


def test_server_that_starts_again_with_other_engines(servers: Servers, other: Path, told) -> None:
    (only, *_) = servers.urls

    def replace() -> None:
        servers.kill(only)
        servers.start_again(only, other)

    try:
        with Client(only) as client:
            with pytest.raises(UserError, match=f"{only} serves other engines than the picture was begun with, "):
                client.generate("a", callback=at_step(1, replace), **SMALL)
            client.generate("a", **SMALL)  # but the next picture begins with these
        assert told() == []
    finally:
        servers.kill(only)


# a proxy before the servers


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_behind_nginx(servers: Servers, alone: bytes, told, tmp_path: Path, number: int) -> None:
    end = at_step(1, lambda: servers.kill(servers.urls[1], number))
    with nginx(tmp_path / "nginx", servers.urls) as url, Client(url) as client:
        assert client.generate("a", callback=end, **SMALL).tobytes() == alone
        for _ in range(3):  # each of which nginx begins at the next server, and some at one that is gone
            assert client.generate("a", **SMALL).tobytes() == alone
        assert client.generate("a", height=384, width=384, steps=1).size == (384, 384)
    assert all(re.search(r"; [1-6] calls? w\w+ repeated, and the picture went on", message) for message in told())


# what nothing helps against


def test_every_server_is_gone(servers: Servers) -> None:
    urls = servers.urls

    def end() -> None:
        for url in urls:
            servers.kill(url)

    gone = f"no server is left .*: {urls[0]} went away during dit, step 2 of 4: .*; {urls[1]} went away .*; {urls[2]}"
    with Client(urls, retry_timeout=1) as client:
        with pytest.raises(DitforgeError, match=gone) as caught:
            client.generate("a", callback=at_step(0, end), **SMALL)
        assert "retry_timeout=" in caught.value.fix
    started = time.monotonic()
    with pytest.raises(UserError, match=f"no server can be used: no gRPC server answers at {urls[0]}"):
        Client(urls, connect_timeout=60)
    assert time.monotonic() - started < 20


def test_engine_whose_velocity_is_nan(schnell, tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    shutil.copytree(schnell.repository, repository)
    code = (Path(__file__).parents[1] / "support" / "nan_model.py").read_text()
    (repository / "dit" / "1" / "model.py").write_text(code)
    with start(repository, port=0) as server:
        result = ditforge("generate", "a", "--url", server.url, "--out", "a.png", cwd=tmp_path)
    assert_error(result, "velocity is not finite", "dit, step 3 of 4", "ditforge verify", code=1)
    assert not (tmp_path / "a.png").exists()
