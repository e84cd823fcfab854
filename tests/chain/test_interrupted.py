"""Ctrl-C at any moment of a picture ends it, and the client can be closed: gRPC waits for ever for a call that was
interrupted while it began.
"""

from __future__ import annotations

import subprocess
import sys

from command_line import PATIENCE

from ditforge.triton_repo.server import Server

# Before calls began in threads of their own, one in thirty of these never closed.
PROGRAM = """
import os, random, signal, sys, threading
from ditforge.client import Client

signal.signal(signal.SIGINT, signal.default_int_handler)
for seed in range(60):
    client, ended = Client(sys.argv[1]), threading.Event()
    after = random.Random(seed).uniform(0, 0.25)
    interrupt = lambda: ended.wait(after) or os.kill(os.getpid(), signal.SIGINT)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        client.generate("a", steps=1000, height=64, width=64)
    except KeyboardInterrupt:
        ended.set()
    client.close()
print("closed")
"""


def test_interrupts_at_random_moments(schnell_server: Server) -> None:
    command = [sys.executable, "-c", PROGRAM, schnell_server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (0, "closed\n"), done.stderr[-2000:]
