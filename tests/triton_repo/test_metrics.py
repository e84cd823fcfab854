"""The port of metrics, whoever reads there and however slowly."""

from __future__ import annotations

import socket
import threading
import urllib.request
from contextlib import ExitStack
from pathlib import Path

from command_line import eventually

from ditforge.triton_repo.metrics import MOST_CONNECTIONS, Metrics


def test_those_who_ask_slowly_keep_nobody_out(tmp_path: Path) -> None:
    port = Metrics(["dit"]).serve("127.0.0.1", 0, tmp_path / "none", lambda: 0)
    before = threading.active_count()
    with ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(10 * MOST_CONNECTIONS)
        ]
        for connection in slow:
            connection.sendall(b"GET /metr")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            assert b"ditforge_ready 0.0" in answer.read()
        eventually(lambda: threading.active_count() <= before + MOST_CONNECTIONS)
