"""The errors for failing servers: what happened, at which server, for how long it was tried, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ditforge import install_hint
from ditforge.client.option import CA, ENCRYPT, PAIR, PLAIN, TOKEN
from ditforge.client.probe import Speaks, speaks_tls
from ditforge.client.retry import SILENT, Failure, Retries
from ditforge.client.settings import LONGEST, ConnectionSettings
from ditforge.client.tls import TLS
from ditforge.errors import DitforgeError, UserError
from ditforge.option import option

NAME_SERVER = option('Client("HOST:PORT")', "--url HOST:PORT")
START_SERVER = f"ditforge serve REPO_DIR --port PORT   starts a server; its gRPC port is named by {NAME_SERVER}"
SAME_ENGINES = "serve the same engines at every address, and behind each of them; then repeat the request"
NOT_TRUSTED = "CERTIFICATE_VERIFY_FAILED: "  # in messages of gRPC's TLS library; the reason follows it
Probe = Callable[[str, TLS | None], Speaks]  # the signature of speaks_tls
# A part of a message of gRPC or its TLS library → (what it means, what helps).
TLS_PROBLEMS = {
    "Verification Check failed": ("its certificate is for another name", f"{NAME_SERVER}, as its certificate has it"),
    "WRONG_VERSION_NUMBER": ("it speaks no TLS", PLAIN),
    "create security handshaker": ("the TLS files are damaged, or no pair", f"{CA}, {PAIR}"),
    "andshake failed": ("TLS could not be agreed on", f"{CA}; and where the server wants a certificate, {PAIR}"),
}


def connect_error(url: str, failure: Failure, settings: ConnectionSettings, probe: Probe = speaks_tls) -> DitforgeError:
    """The error for a server that could not be used at all.

    `probe` is called, to find out whether the server speaks TLS, if that may be the cause.
    """
    status = failure.status
    if status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return token_error(url, failure, settings.token)
    if failure.too_large:
        return UserError(f"what the server at {url} was asked, or what it answered, is too large: {failure.shown}", "")
    if error := tls_error(url, failure, settings, probe):
        return error
    if failure.ending:
        return DitforgeError(f"{url} is stopping: it begins no more pictures", "ask another server, or start it again")
    if failure.passing:
        waited = f"the server at {url} was not ready within {settings.connect_timeout:g} s: {failure.shown}"
        return DitforgeError(waited, f"wait for it, and look at the server's log; {longer(settings)}")
    if status == "UNAVAILABLE":
        return UserError(f"no gRPC server answers at {url}: {failure.shown}", START_SERVER)
    if status == "DEADLINE_EXCEEDED":
        return UserError(f"{url} does not answer within {settings.connect_timeout:g} s", START_SERVER)
    if status in ("UNIMPLEMENTED", "UNKNOWN", "INTERNAL"):
        return UserError(f"the server at {url} is not a Triton server: {failure.shown}", START_SERVER)
    return DitforgeError(f"the server at {url} refused: {status} {failure.shown}", "look at the server's log")


def longer(settings: ConnectionSettings) -> str:
    return f"{option(f'connect_timeout={longer_than(max(30, settings.connect_timeout))}')} waits longer"


def longer_than(seconds: float) -> str:
    """Twice as many seconds, for the advice in errors, but no more than a setting can be."""
    return f"{min(2 * seconds, LONGEST):.15g}"


def tls_error(
    url: str, failure: Failure, settings: ConnectionSettings, probe: Probe = speaks_tls
) -> DitforgeError | None:
    """The error for a connection that failed because of encryption, or None if it failed for another reason."""
    tls, said = settings.tls, failure.message
    if NOT_TRUSTED in said:
        reason = said.partition(NOT_TRUSTED)[2].partition(":")[0]
        if "expired" in reason or "not yet valid" in reason:
            return UserError(f"no encrypted connection to {url}: {reason} (its certificate)", "give it a valid one")
        trusted = f"the certificates in {tls.ca}" if tls and tls.ca else "the public authorities that gRPC brings"
        problem = f"its certificate is signed by nobody that is trusted here ({trusted}): {reason}"
        return UserError(f"no encrypted connection to {url}: {problem}", f"{CA}, with who signed its certificate")
    for mark, (problem, fix) in TLS_PROBLEMS.items():
        if mark in said:
            return UserError(f"no encrypted connection to {url}: {problem}", fix)
    closed = failure.status == "UNAVAILABLE" and ("Socket closed" in said or "reset by peer" in said.lower())
    if not closed and "status: 400" not in said and "HTTP status 400" not in said:  # nginx answers 400, without gRPC
        return None
    spoken = probe(url, tls)
    if tls is None and spoken == "TLS":
        return UserError(f"{url} wants an encrypted connection, and this one is not", f"{ENCRYPT}, or {CA}")
    if tls is None and spoken == "TLS, but not with us":
        problem = f"{url} wants an encrypted connection, and a certificate of the client (mutual TLS)"
        return UserError(problem, f"{CA}, with {PAIR}")
    if tls is not None and (spoken == "TLS, but not with us" or not closed):
        if tls.certificate is None:
            return UserError(f"{url} wants a certificate of the client (mutual TLS), and was shown none", PAIR)
        problem = f"{url} does not accept the certificate that it was shown, {tls.certificate}"
        return UserError(problem, f"{PAIR}, signed by whom the server trusts")
    return None


def all_of(errors: Mapping[str, DitforgeError], problem: str) -> DitforgeError:
    """Combine the errors of several servers, by address, into one. If there is only one error, return it unchanged."""
    first = next(iter(errors.values()))
    if len(errors) == 1:
        return first
    kind = UserError if all(isinstance(error, UserError) for error in errors.values()) else DitforgeError
    return kind(f"{problem}: {'; '.join(error.problem for error in errors.values())}", first.fix)


def call_error(url: str, what: str, failure: Failure, settings: ConnectionSettings) -> DitforgeError:
    """The error for a call of a model that failed in a way that another try does not help.

    `what` names the model and the step, e.g. "dit, step 3 of 28".
    """
    if failure.status in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return token_error(url, failure, settings.token)
    if failure.too_large:
        fix = f"a smaller picture, or fewer at once; or {option('vae_tile=512')}"
        problem = f"what the server at {url} was asked of {what}, or what it answered, is too large"
        return UserError(f"{problem}: {failure.shown}", fix)
    if failure.status == "INVALID_ARGUMENT":
        fix = f"ask for something else, or {install_hint.upgrade('client')}"
        return UserError(f"the server at {url} refuses what was asked of {what}: {failure.shown}", fix)
    return DitforgeError(f"the server at {url} could not run {what}: {failure.shown}", "look at the server's log")


def wrong_answer(url: str, what: str, wrong: object) -> DitforgeError:
    """The error for an answer that does not fit the request. `wrong` says what was expected and what came."""
    fix = f"look at the server's log; are client and server of one version?   {install_hint.upgrade('client')}"
    return DitforgeError(f"the server at {url} gave a wrong answer to {what}: {wrong}", fix)


def token_error(url: str, failure: Failure, token: str | None) -> UserError:
    """The error for a server that refuses the client's token, or its lack of one.

    The server's message can be the same in both cases, but the client knows whether it has sent a token.
    """
    if token is None and failure.status == "UNAUTHENTICATED":
        return UserError(f"the server at {url} wants a token, and none was sent", TOKEN)
    said = "" if "wants a token" in failure.shown else f": {failure.shown}"
    what = "this client" if token is None else "this token"
    return UserError(f"the server at {url} refused {what}{said}", f"{TOKEN}, with the token that the server has")


def other_engines(url: str, wanted: str, found: str) -> UserError:
    """The error for a server without the engines that the picture was begun with, `wanted`.

    `found` is the digest of the server's engines, or its message.
    """
    return UserError(f"{url} serves other engines than the picture was begun with, {wanted}: {found}", SAME_ENGINES)


def gave_up(
    what: str, failures: Mapping[str, Failure], unfit: Mapping[str, DitforgeError], retries: Retries, now: float
) -> DitforgeError:
    """The error for a call that failed until the time for repeating it was over.

    `failures` has the last failure of each server by its address, `unfit` the errors of servers that cannot be used.
    """
    each = [f"{url} {failure.reason} during {what}: {failure.shown}" for url, failure in failures.items()]
    each += [error.problem for error in unfit.values()]
    seconds = now - (now if retries.first is None else retries.first)
    tried = f" ({retries.tries} tries in {seconds:.0f} s)" if retries.tries > 1 else ""
    waits = f"{option('retry_timeout=300')} waits longer for a server that starts"
    if any(failure.reason == SILENT for failure in failures.values()):
        waits += f", and a longer {option('step_timeout')} for its answer"
    if len(each) == 1:
        return DitforgeError(f"the server at {each[0]}{tried}", f"start it again, and repeat the request; {waits}")
    return DitforgeError(f"no server is left{tried}: {'; '.join(each)}", f"start them again, and repeat it; {waits}")


def stopping(failures: Mapping[str, Failure], unfit: Mapping[str, DitforgeError]) -> DitforgeError:
    """The error for a picture that no server has begun, because the servers in `failures` are shutting down."""
    each = [f"{url} is stopping: it begins no more pictures" for url in failures]
    each += [error.problem for error in unfit.values()]
    return DitforgeError("; ".join(each), "ask another server, or start it again and repeat the request")


def too_late(what: str, failures: Mapping[str, Failure], timeout: float) -> DitforgeError:
    """The error for a picture, or for the last of several, that was not finished within `timeout` seconds."""
    each = ", ".join(f"{url} {failure.reason}" for url, failure in failures.items() if failure.reason)
    problem = f"the picture was not finished within {timeout:g} s: it was at {what}" + (
        f", where {each}" if each else ""
    )
    longer = option(f"timeout={longer_than(timeout)}")
    return DitforgeError(problem, f"{longer}, or fewer steps, or fewer or smaller pictures")


def short(engines: str) -> str:
    """The first 12 characters of a digest of engines, which is what people compare."""
    return engines[:12] or "(an older repository, which does not say which)"
