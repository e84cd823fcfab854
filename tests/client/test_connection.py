"""What a client does before its first picture: servers of a list that are of no use, and those that are stopping."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from both_clients import BOTH, FILES
from command_line import PATIENCE, run_here
from front import Call, Front, Refusal, front
from replicas import at_step, lasting_port

from ditforge.client import Client, calls, connection, replica
from ditforge.errors import DitforgeError, DitforgeWarning
from ditforge.triton_repo.server import Server

SMALL = {"height": 32, "width": 48, "seed": 0}  # 4 steps
STOPPING = grpc.StatusCode.UNAVAILABLE, "this server is stopping and begins no more pictures"


@pytest.fixture
def between(schnell_server: Server) -> Iterator[Front]:
    with front(schnell_server.url) as passes:
        yield passes


@pytest.fixture
def another(schnell_server: Server) -> Iterator[Front]:
    with front(schnell_server.url) as passes:
        yield passes


@pytest.fixture
def stranger() -> Iterator[str]:
    """The address of a gRPC server that is not Triton."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other servers have as long to say what they serve as this machine may take."""
    monkeypatch.setattr(connection, "OTHERS", PATIENCE)


# several servers


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("make", BOTH)
def test_servers_that_are_no_use_are_warned_of_once(make: Any, between: Front, another: Front, stranger: str) -> None:
    def configure(config: object) -> None:
        config.parameters["ditforge_engines"].string_value = "0" * 64  # type: ignore[attr-defined]

    another.configure = configure
    dead = f"127.0.0.1:{lasting_port()}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with make([dead, between.url, stranger, another.url]) as client:
            for _ in range(4):
                client.generate("a", steps=1, **SMALL)
    said = [str(warning.message) for warning in caught if warning.category is DitforgeWarning]
    assert len(said) == 3, said
    assert re.match(f"{dead} is left out: no gRPC server answers at {dead}: .*Connection refused", said[0])
    assert said[1].startswith(f"{stranger} is left out: the server at {stranger} is not a Triton server")
    assert said[2].startswith(f"{another.url} is left out: it serves the engines 000000000000, and the picture was")
    assert {warning.filename for warning in caught if warning.category is DitforgeWarning} <= {__file__, *FILES}
    assert len(between.calls) == 4 * 3


@pytest.mark.usefixtures("patient")
def test_servers_that_are_fine_are_not_warned_of(between: Front, another: Front) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DitforgeWarning)
        Client([between.url, another.url]).close()


@pytest.mark.usefixtures("patient")
def test_command_line_warns_on_one_line(
    between: Front, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    dead = f"127.0.0.1:{lasting_port()}"
    urls = ("--url", dead, "--url", between.url)
    result = run_here(["generate", "a", *urls, "--steps", "1", "--out", "a.png"], monkeypatch, capfd)
    assert (result.code, result.out) == (0, "a.png\n")
    (line,) = [line for line in result.err.splitlines() if dead in line]
    assert line.startswith(f"warning: {dead} is left out: ")


# servers that are stopping: ready for nothing new, and answering what was begun


@pytest.mark.parametrize("make", BOTH)
def test_new_client_at_a_server_that_is_stopping(make: Any, between: Front) -> None:
    between.ready, between.refuse = lambda: False, lambda call: STOPPING
    started = time.monotonic()
    with pytest.raises(DitforgeError, match=f"^{between.url} is stopping: it begins no more pictures\n"):
        make(between.url, connect_timeout=PATIENCE)
    assert time.monotonic() - started < PATIENCE / 2


@pytest.mark.parametrize("make", BOTH)
def test_new_picture_at_a_server_that_is_stopping(make: Any, between: Front) -> None:
    with make(between.url, retry_timeout=PATIENCE) as client:
        between.refuse = lambda call: STOPPING
        started = time.monotonic()
        with pytest.raises(DitforgeError, match=f"^{between.url} is stopping: it begins no more pictures\n"):
            client.generate("a", **SMALL)
        assert time.monotonic() - started < PATIENCE / 2


def test_picture_in_the_middle_at_a_server_that_is_stopping(
    between: Front, schnell_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is finished there, also where the server is asked what it serves, after a pause between two steps."""
    monkeypatch.setattr(replica, "HEARD_LATELY", 0.0)
    with Client(schnell_server.url) as client:
        alone = client.generate("a", **SMALL).tobytes()
    pictures: set[str] = set()

    def refuse(call: Call) -> Refusal | None:
        return None if call.headers.get("ditforge-picture") in pictures else STOPPING

    def stop() -> None:
        pictures.update(call.headers["ditforge-picture"] for call in between.calls)
        between.ready, between.refuse = lambda: False, refuse

    with warnings.catch_warnings(), Client(between.url) as client:
        warnings.simplefilter("error", DitforgeWarning)
        assert client.generate("a", callback=at_step(1, stop), **SMALL).tobytes() == alone


@pytest.mark.parametrize("make", BOTH)
def test_every_server_is_stopping(make: Any, between: Front, another: Front) -> None:
    for one in (between, another):
        one.ready, one.refuse = lambda: False, lambda call: STOPPING
    with pytest.raises(DitforgeError, match="is stopping") as caught:
        make([between.url, another.url], connect_timeout=PATIENCE)
    assert all(f"{one.url} is stopping" in caught.value.problem for one in (between, another))


@pytest.mark.parametrize("make", BOTH)
def test_another_server_takes_the_place_of_one_that_is_stopping(
    make: Any, between: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a rolling restart behind one address, for a new client and for one that is connected."""
    for module in (connection, calls):
        monkeypatch.setattr(module, "ENDING_WAIT", PATIENCE)
    left = [3]

    def ready() -> bool:
        left[0] -= 1
        return left[0] < 0

    between.ready, between.refuse = ready, lambda call: STOPPING if left[0] >= 0 else None
    with make(between.url, connect_timeout=PATIENCE) as client:
        left[0] = 3
        between.ready = lambda: True
        between.refuse = lambda call: STOPPING if not ready() else None
        with pytest.warns(DitforgeWarning, match=f"the server {between.url} was stopping; 1 call was repeated"):
            client.generate("a", **SMALL)


@pytest.mark.parametrize("make", BOTH)
def test_server_that_is_not_ready_yet_is_waited_for(make: Any, between: Front) -> None:
    loading = grpc.StatusCode.UNAVAILABLE, "the models are starting; ask again"
    between.ready, between.refuse = lambda: False, lambda call: loading
    with pytest.raises(DitforgeError, match="was not ready within 4 s: the model text_encoders is not ready"):
        make(between.url, connect_timeout=4)  # longer than for one that is stopping


@pytest.mark.parametrize("make", BOTH)
def test_all_answers_to_connect_have_its_time_together(make: Any, schnell_server: Server) -> None:
    """Each of five may take as long, where each alone were timed."""
    with front(schnell_server.url) as between:
        between.configure = lambda config: time.sleep(1)
        between.ready = lambda: time.sleep(1) or True
        begun = time.monotonic()
        with pytest.raises(DitforgeError, match=r"within 1\.5 s"):
            make(between.url, connect_timeout=1.5)
        assert time.monotonic() < begun + 3
