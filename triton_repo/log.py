"""The log of the process that serves. Its growth is limited, because requests of strangers can cause records."""

from __future__ import annotations

import logging
import time

MOST = 20  # records of one line of code within PERIOD
PERIOD = 60.0  # seconds
LONGEST = 2000  # characters of a message, and of a traceback


class Sparing(logging.Filter):
    """Lets at most MOST records of each line of code pass within PERIOD seconds.

    The next record says how many were left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[str, int], tuple[float, int]] = {}  # when a period began, and how many there were

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written; its message then is a cut one where it is too long."""
        place, now = (record.pathname, record.lineno), time.monotonic()
        begun, count = self.seen.get(place, (now, 0))
        left_out = 0
        if now - begun > PERIOD:
            left_out = max(count - MOST, 0)
            begun, count = now, 0
        self.seen[place] = begun, count + 1
        if count >= MOST:
            return False
        message = record.getMessage()
        if len(message) > LONGEST:
            message = f"{message[:LONGEST]}… ({len(message)} characters)"
        if left_out:
            message += f" ({left_out} like this were left out)"
        record.msg, record.args = message, ()
        return True


class Short(logging.Formatter):
    """Shortens tracebacks by leaving out their beginning."""

    def formatException(self, ei) -> str:  # type: ignore[no-untyped-def]  # as logging has it
        """Format the traceback. If it is too long, its last lines are kept, because they say what happened."""
        text = super().formatException(ei)
        return text if len(text) <= LONGEST else f"…{text[-LONGEST:]}"


def set_up() -> None:
    """Write to standard error, which is the log file."""
    handler = logging.StreamHandler()
    handler.setFormatter(Short("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(Sparing())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
