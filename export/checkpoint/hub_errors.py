"""Turn the errors of huggingface_hub into ditforge's errors, which say what happened and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ditforge import write_errors
from ditforge.errors import DitforgeError, UserError
from ditforge.export.checkpoint.hub import Reference, nearest_repository

# The base class of httpx's errors. It is taken from here because huggingface_hub 1 and 2 use different packages of it.
HTTP_ERROR: type[BaseException] = HfHubHTTPError.__bases__[0]
LOG_IN = "hf auth login"
AGAIN = "the same command again goes on where this one stopped"


class Unreachable(DitforgeError):
    """The Hub does not answer, or answers wrongly. The files in the cache can still be used."""


@contextmanager
def explained(reference: Reference) -> Iterator[None]:
    """Within this context, turn errors of huggingface_hub and of the system into UserError or DitforgeError."""
    try:
        yield
    except DitforgeError:
        raise
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError, HTTP_ERROR) as error:
        raise explain(error, reference) from error


def explain(error: BaseException, reference: Reference) -> DitforgeError:
    """Return the error to raise in place of the library's `error` about `reference`."""
    here, page = reference.repository, f"{constants.ENDPOINT}/{reference.repository}"
    if isinstance(error, GatedRepoError):
        if get_token():
            problem = f"{here} is gated, and your token's account has not been given access"
            return UserError(problem, f"accept its terms at {page} with that account, or: {LOG_IN}")
        return UserError(f"{here} is gated: its terms must be accepted first", f"accept them at {page}, then: {LOG_IN}")
    if isinstance(error, RepositoryNotFoundError):
        problem = f"{reference} is no file or folder here, and {constants.ENDPOINT} has no repository {here} for you"
        meant = nearest_repository(here.split("/")[1])
        if meant and meant != here:
            return UserError(problem, f"{meant}   is one that is called like it")
        return UserError(problem, f"check the path, or the name; if the repository is private: {LOG_IN}")
    if isinstance(error, RevisionNotFoundError):
        problem = f"{here} has no revision {reference.revision}: no branch, tag or commit of that name"
        return UserError(problem, f"{page}/commits/main lists commits; without @{reference.revision}, it is the newest")
    if isinstance(error, DisabledRepoError):
        return UserError(f"access to {here} is disabled", f"{page} may say why; take another repository")
    if isinstance(error, HFValidationError):
        return UserError(f"{reference} is no file or folder here, and no name of a repository: {error}", "check it")
    if isinstance(error, HfHubHTTPError):
        return _refused(error, reference)
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError, HTTP_ERROR)):
        problem = f"the connection to {constants.ENDPOINT} failed: {_cause(error)}"
        return Unreachable(problem, f"check the network; {AGAIN}")
    return _not_written(error, reference)


def _refused(error: HfHubHTTPError, reference: Reference) -> DitforgeError:
    """Return the error for an HTTP error status with which the Hub answered."""
    status = error.response.status_code
    if isinstance(error, EntryNotFoundError):
        return UserError(f"{reference} is not in the repository", "check the file's name")
    if status in (401, 403):
        said = error.server_message or "it says no more"
        return UserError(f"{constants.ENDPOINT} refuses your token ({status}): {said}", f"{LOG_IN}, or unset HF_TOKEN")
    wait = "wait some minutes" if status == 429 else "wait, or see https://status.huggingface.co"
    return Unreachable(f"{constants.ENDPOINT} answered {status} about {reference}", f"{wait}; {AGAIN}")


def _not_written(error: BaseException, reference: Reference) -> DitforgeError:
    """Return the error for a file that could not be written, or was not downloaded completely."""
    cache = constants.HF_HUB_CACHE
    if isinstance(error, OSError) and error.errno in write_errors.FULL:
        problem = f"the disk of {cache} became full while {reference} was downloaded"
        return UserError(problem, f"free some space: {AGAIN}; or HF_HOME=DIR with a folder on a larger disk")
    if isinstance(error, OSError) and error.errno is not None:
        fix = write_errors.fix(error, "HF_HOME=DIR with a folder that can be written")
        return UserError(f"cannot write {cache}: {write_errors.reason(error)}", fix)
    return Unreachable(f"{reference} was not downloaded whole: {_short(error)}", AGAIN)


def _cause(error: BaseException) -> str:
    """Return the text of the original error, which the library wraps in errors with advice of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _short(error)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
