"""Starts the engine process of a server before its models ask for it, so that it has imported its libraries by then.

    python -m ditforge.engines.runtime.early FOLDER ENGINES SERVER

is how tritonserver.py runs it beside the process SERVER, which becomes Triton. ENGINES are the compilers and targets of
the engines, in JSON. PyTorch alone takes five seconds to import on some machines, about as long as Triton takes to
start. This process is a client of the engine process without an engine. It goes after a while, or when Triton ends;
the models have connected by then, and if not, they start an engine process by themselves.
"""

from __future__ import annotations

import json
import os
import select
import sys
from contextlib import suppress
from pathlib import Path

from ditforge.engines.runtime import rendezvous

STAYS = 60.0  # seconds


def main() -> None:
    """Start the process, have it prepared, and wait."""
    folder, engines, server = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    with suppress(OSError):  # the system is short of something, or Triton has ended
        watched = os.pidfd_open(server)
        connection, _ = rendezvous.connect(folder, server)
        from ditforge.engines.runtime.messages import Line  # which takes longer to import than what had to come first

        Line(connection).send({"call": "prepare", "engines": engines})
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        poll.register(connection, select.POLLRDHUP)
        poll.poll(STAYS * 1000)


if __name__ == "__main__":
    main()
