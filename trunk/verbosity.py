"""How much a command says: --quiet and --verbose, which every command takes."""

from __future__ import annotations

import logging
import sys
import warnings

from ditforge.errors import DitforgeWarning, UserError

LOGGER = "ditforge"  # above those of all modules
_quiet = False


class ToStandardError(logging.Handler):
    """What is logged goes to standard error as it is by then: a progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


_handler = ToStandardError()


def choose(verbose: bool, quiet: bool) -> None:
    """Quiet: errors and results alone. Verbose: what is logged too. Raises UserError for both."""
    global _quiet
    if verbose and quiet:
        raise UserError("--verbose and --quiet exclude each other", "leave out one of them")
    _quiet = quiet
    if quiet:
        warnings.simplefilter("ignore", DitforgeWarning)
    logger = logging.getLogger(LOGGER)
    logger.addHandler(_handler)  # once, however often
    logger.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING)
    _handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))


def is_quiet() -> bool:
    """Whether only errors and results are printed."""
    return _quiet
