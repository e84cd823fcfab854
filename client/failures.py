"""What is said when servers fail: what happened, at which of them, for how long it was tried, and what to do."""

from __future__ import annotations

from collections.abc import Mapping

from ditforge.client.retry import Failure, Retries
from ditforge.client.settings import ConnectionSettings
from ditforge.errors import DitforgeError, UserError

START_SERVER = "ditforge serve REPO_DIR --port PORT   starts a server; --url HOST:PORT names its gRPC port"
SAME_ENGINES = "serve the same engines at every address, and behind each of them; then repeat the request"
TOKEN = "--token-file FILE   with a token that the server takes"
# How gRPC and its TLS library put it, and what it means.
TLS_PROBLEMS = {
    "CERTIFICATE_VERIFY_FAILED": ("its certificate is signed by nobody that is trusted here", "--tls-ca FILE"),
    "Verification Check failed": ("its certificate is for another name", "--url with the name in its certificate"),
    "WRONG_VERSION_NUMBER": ("it speaks no TLS", "leave out --tls and --tls-…"),
    "create security handshaker": ("the files are damaged, or no pair", "--tls-cert and --tls-key of a pair"),
    "andshake failed": ("TLS could not be agreed on", "--tls-ca FILE, and --tls-cert, --tls-key where it wants yours"),
}


def connect_error(url: str, failure: Failure, settings: ConnectionSettings) -> DitforgeError:
    """Why a server could not be used at all."""
    status = failure.status
    if status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return token_error(url, failure)
    for mark, (problem, fix) in TLS_PROBLEMS.items():
        if mark in failure.message:
            return UserError(f"no encrypted connection to {url}: {problem} ({failure.shown})", fix)
    if "status: 400" in failure.message or "HTTP status 400" in failure.message:  # of nginx, before gRPC is spoken
        fix = (
            "--tls where it wants an encrypted connection, --tls-cert and --tls-key where it wants a certificate; or\n"
        )
        fix += f"       {START_SERVER}"
        return UserError(f"the server at {url} does not talk to this client: {failure.shown}", fix)
    if failure.passing:
        waited = f"the server at {url} was not ready within {settings.connect_timeout:g} s: {failure.shown}"
        return DitforgeError(waited, "wait for it, and look at the server's log; --connect-timeout 60 waits longer")
    if status == "UNAVAILABLE":
        return UserError(f"no gRPC server answers at {url}: {failure.shown}", START_SERVER)
    if status == "DEADLINE_EXCEEDED":
        return UserError(f"{url} does not answer within {settings.connect_timeout:g} s", START_SERVER)
    if status in ("UNIMPLEMENTED", "UNKNOWN", "INTERNAL"):
        return UserError(f"the server at {url} is not a Triton server: {failure.shown}", START_SERVER)
    return DitforgeError(f"the server at {url} refused: {status} {failure.shown}", "look at the server's log")


def all_of(errors: Mapping[str, DitforgeError], problem: str) -> DitforgeError:
    """One error of those of each server; where there is one server, its own."""
    first = next(iter(errors.values()))
    if len(errors) == 1:
        return first
    kind = UserError if all(isinstance(error, UserError) for error in errors.values()) else DitforgeError
    return kind(f"{problem}: {'; '.join(error.problem for error in errors.values())}", first.fix)


def call_error(url: str, what: str, failure: Failure) -> DitforgeError:
    """Why a model could not be run, where another try would do no better. `what`: the model, and which step."""
    if failure.status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return token_error(url, failure)
    if failure.status == "INVALID_ARGUMENT":
        fix = "ask for something else, or pip install --upgrade 'ditforge[client]'"
        return UserError(f"the server at {url} refuses what was asked of {what}: {failure.shown}", fix)
    return DitforgeError(f"the server at {url} could not run {what}: {failure.shown}", "look at the server's log")


def token_error(url: str, failure: Failure) -> UserError:
    return UserError(f"the server at {url} wants another token: {failure.shown}", TOKEN)


def other_engines(url: str, wanted: str, found: str) -> UserError:
    """A server does not serve the engines that the picture was begun with. `found`: theirs, or what it says."""
    return UserError(f"{url} serves other engines than the picture was begun with, {wanted}: {found}", SAME_ENGINES)


def gave_up(
    what: str, failures: Mapping[str, Failure], unfit: Mapping[str, DitforgeError], retries: Retries, now: float
) -> DitforgeError:
    """A call was repeated for as long as it may be. `failures`: how servers failed last, by their addresses."""
    each = [f"{url} {failure.reason} during {what}: {failure.shown}" for url, failure in failures.items()]
    each += [error.problem for error in unfit.values()]
    seconds = now - (now if retries.first is None else retries.first)
    tried = f" ({retries.tries} tries in {seconds:.0f} s)" if retries.tries > 1 else ""
    waits = "--retry-timeout 300 waits longer for a server that starts"
    if len(each) == 1:
        return DitforgeError(f"the server at {each[0]}{tried}", f"start it again, and repeat the request; {waits}")
    return DitforgeError(f"no server is left{tried}: {'; '.join(each)}", f"start them again, and repeat it; {waits}")


def too_late(what: str, failures: Mapping[str, Failure], timeout: float) -> DitforgeError:
    """The time of the whole picture is over."""
    each = ", ".join(f"{url} {failure.reason}" for url, failure in failures.items() if failure.reason)
    problem = f"the picture was not finished within {timeout:g} s: it was at {what}" + (
        f", where {each}" if each else ""
    )
    return DitforgeError(problem, f"--timeout {2 * timeout:g}, or fewer steps, or a smaller picture")


def short(engines: str) -> str:
    """As much of engines' digest as people compare."""
    return engines[:12] or "(an older repository, which does not say which)"
