"""How much a command says: --quiet and --verbose, which every command takes."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable

from ditforge.errors import DitforgeWarning, UserError
from ditforge.plain_text import plain

LOGGER = "ditforge"  # the parent of the loggers of all modules
_verbose = _quiet = False
log = logging.getLogger(__name__)


class ToStandardError(logging.Handler):
    """Writes the log to sys.stderr as it is at that moment, because a progress bar replaces it for a while."""

    def emit(self, record: logging.LogRecord) -> None:
        print(plain(self.format(record)), file=sys.stderr)


_handler = ToStandardError()


def choose(verbose: bool, quiet: bool) -> None:
    """Choose what is printed: only errors and results if `quiet`, and also the log if `verbose`.

    Raises UserError if both are true.
    """
    global _verbose, _quiet
    if verbose and quiet:
        raise UserError("--verbose and --quiet exclude each other", "leave out one of them")
    _verbose, _quiet = verbose, quiet
    if quiet:
        warnings.simplefilter("ignore", DitforgeWarning)
    logger = logging.getLogger(LOGGER)
    logger.addHandler(_handler)  # adding the same handler again has no effect
    logger.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING)
    _handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))


def choose_also(verbose: bool, quiet: bool) -> None:
    """Choose like choose(), in addition to what was chosen before."""
    choose(verbose or _verbose, quiet or _quiet)


def divert_warnings(tell: Callable[[str], object]) -> None:
    """Tell users the warnings that are for them, and leave those of libraries, which developers need, to the log."""

    def show(message: Warning | str, category: type[Warning], *args: object, **kwargs: object) -> None:
        if issubclass(category, DitforgeWarning):
            tell(str(message))
        else:
            log.info("%s: %s", category.__name__, message)

    warnings.showwarning = show


def is_quiet() -> bool:
    """Whether only errors and results are printed."""
    return _quiet
