"""The log of the process that serves, which strangers cannot fill."""

from __future__ import annotations

import logging

import pytest

from ditforge.triton_repo import log
from ditforge.triton_repo.log import LONGEST, MOST, PERIOD, Short, Sparing


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written of records of the logger `spared`, whose clock is `now`."""
    written: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(self.format(record))

    handler = Handler()
    handler.addFilter(Sparing())
    handler.setFormatter(Short("%(message)s"))
    logger = logging.getLogger("spared")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    return written


def test_one_line_of_code_is_heard_only_so_often(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(log.time, "monotonic", lambda: now)

    def write(number: int) -> None:
        logging.getLogger("spared").error("refused %s", number)

    for number in range(MOST + 7):
        write(number)
    assert lines == [f"refused {number}" for number in range(MOST)]
    logging.getLogger("spared").error("something else")
    assert lines[-1] == "something else"
    now = PERIOD + 1
    write(99)
    assert lines[-1] == "refused 99 (7 like this were left out)"
    write(100)
    assert lines[-1] == "refused 100"


def test_long_records_are_cut(lines: list[str]) -> None:
    try:
        raise ValueError("x" * 50_000 + " at the end")
    except ValueError:
        logging.getLogger("spared").exception("y" * 50_000)
    assert len(lines[0]) < 2 * LONGEST + 100
    assert "(50000 characters)" in lines[0]
    assert lines[0].endswith(" at the end")
