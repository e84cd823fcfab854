"""Ctrl-C ends a command with exit code 130 and without a traceback, whatever the command is doing."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from importlib.machinery import ExtensionFileLoader
from types import FrameType
from typing import NoReturn

CODE = 130  # a shell's, for what SIGINT has ended
AGAIN = 0.02  # seconds
_happened = False


def heed() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, unless it is ignored, as it is in a shell's background job."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
        # Otherwise, Python lets the signal kill the process while it ends.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, or try it again soon where that would come to nothing."""
    global _happened
    _happened = True
    if is_deaf(frame):
        again = threading.Timer(AGAIN, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
    else:
        signal.default_int_handler(number, frame)


def is_deaf(frame: FrameType | None) -> bool:
    """Whether what is executed in the frame turns an interrupt into something else.

    Native modules do while they are imported: NumPy's print a traceback, and then raise other errors. So do callbacks
    of Python's own importing, which print the interrupt and go on.
    """
    if frame is not None and frame.f_code.co_filename.startswith("<frozen importlib"):
        return True
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False


def happened() -> bool:
    """Whether Ctrl-C was pressed. Errors of native code may come from that."""
    return _happened


def command_ended() -> None:
    """Let Ctrl-C end the process at once from now on: at most, it still waits for threads."""
    if signal.getsignal(signal.SIGINT) is interrupt:
        signal.signal(signal.SIGINT, end_at_once)


def end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """End this process."""
    os._exit(CODE)


def end() -> NoReturn:
    """End the command that was interrupted. Another Ctrl-C has nothing left to interrupt."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("interrupted", file=sys.stderr)
    sys.exit(CODE)
