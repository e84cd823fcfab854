"""`ditforge generate`: the client, a progress bar, and pictures on disk."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditforge import terminal, verbosity
from ditforge.errors import UserError
from ditforge.option import setting
from ditforge.picture_flags import OutputFlags, PictureFlags, PromptFlags
from ditforge.plain_text import plain

if TYPE_CHECKING:
    from PIL import Image

    from ditforge.client import Client, Step
    from ditforge.client.request import Request
    from ditforge.client.settings import ConnectionSettings
    from ditforge.model import Model


URL_HELP = "A server's gRPC port, by default localhost:8001; again for others that serve the same engines."
HEADER_HELP = "gRPC metadata to send with every call, e.g. for a proxy; again for more. NAME-bin takes base64."
TLS_HELP = "Encrypt the connection, and trust the public authorities; not needed beside the next three."


@dataclass(frozen=True)
class ConnectionFlags:
    """How servers are reached. The docstring of `ditforge.client.Client` describes each setting."""

    url: Annotated[list[str] | None, typer.Option("--url", metavar="HOST:PORT", help=URL_HELP)] = None
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="How long the pictures may take in all.")] = 1800
    connect_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait at first for a server that starts or is silent.")
    ] = 10
    step_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long a server may take for a call, before it is repeated.")
    ] = 300
    retry_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long a call that failed is repeated; 0: at each server once.")
    ] = 60
    keepalive: Annotated[
        float, typer.Option(metavar="SECONDS", help="How often a server that is busy with a call is asked if it lives.")
    ] = 10
    keepalive_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long it may take to answer that.")
    ] = 10
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file with the token that the server wants, and nothing else.")
    ] = None
    tls: Annotated[bool, typer.Option("--tls", help=TLS_HELP)] = False
    tls_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM: encrypt, and trust who signed these certificates.")
    ] = None
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM: our own certificate, for a server that asks for it.")
    ] = None
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="PEM: the key to our certificate.")] = None
    header: Annotated[list[str] | None, typer.Option("--header", metavar="NAME:VALUE", help=HEADER_HELP)] = None

    def settings(self) -> ConnectionSettings:
        """Make a client's settings of these options. Raises UserError for a wrong value, or a file that is wrong."""
        from ditforge.client.address import DEFAULT_URL
        from ditforge.client.headers import read_headers
        from ditforge.client.option import TOKEN
        from ditforge.client.settings import make_settings
        from ditforge.client.tls import TLS
        from ditforge.credentials import read_token

        encrypted = self.tls or self.tls_ca or self.tls_cert or self.tls_key
        return make_settings(
            self.url or DEFAULT_URL,
            timeout=self.timeout,
            connect_timeout=self.connect_timeout,
            step_timeout=self.step_timeout,
            retry_timeout=self.retry_timeout,
            keepalive=self.keepalive,
            keepalive_timeout=self.keepalive_timeout,
            token=read_token(self.token_file, TOKEN) if self.token_file else None,
            tls=TLS(self.tls_ca, self.tls_cert, self.tls_key) if encrypted else None,
            headers=read_headers(self.header or []),
        )


def generate(
    picture: PictureFlags,
    output: OutputFlags,
    source: PromptFlags,
    connection: ConnectionFlags,
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows.")] = None,
) -> None:
    """A picture for a prompt, from one running server or several. Where one fails, it goes on at another.

    The paths and the seeds of the pictures are printed. What made a picture is kept in it; ditforge inspect shows it.

    Example: ditforge generate "a large red circle" --seed 0 --size 16:9 -o circle.png
    """
    from ditforge.client import Client
    from ditforge.client.prompts import make_requests

    prompts, repeated = source.read(prompt, picture.values())
    output.check(len(prompts))
    with Client(connection.settings()) as client:
        if repeated not in (None, client.model.name) and not verbosity.is_quiet():
            warning = f"that picture is of {plain(repeated)}, and the server has {client.model.name}"
            print(f"warning: {warning}", file=sys.stderr)
        requests = make_requests(client.model, prompts, output.count, picture.seed)
        paths = check_paths(output, requests, client.model, len(prompts))
        with closing(run_all(client, requests, connection.timeout)) as made:
            save_all(made, paths, output.grid)


def save_all(made: Iterable[tuple[Request, list[Image.Image]]], paths: list[Path], grid: Path | None) -> None:
    """Write the pictures of each request as soon as they are made, and then the grid. Print the paths at the end."""
    from ditforge.client.grid import make_grid
    from ditforge.client.picture_file import write_picture

    written: list[tuple[Path, int]] = []
    images: list[Image.Image] = []
    try:
        for request, pictures in made:
            for image, seed in zip(pictures, request.seeds, strict=True):
                path = paths[len(written)]
                write_picture(image, path)
                written.append((path, seed))
            images += pictures if grid else []
        if grid:
            write_picture(make_grid(images), grid, "grid")
    finally:  # printed after all are written, so that no picture is lost if a line cannot be printed
        tell_paths(written)
    if grid:
        terminal.say(str(grid))


def check_paths(output: OutputFlags, requests: list[Request], model: Model, prompts: int) -> list[Path]:
    """The paths of the pictures. Raises UserError if a picture, or the grid, cannot be written to its path.

    This is also so if its file format cannot hold a picture of that size or with such parameters.
    """
    from ditforge.client.grid import grid_size
    from ditforge.client.picture_file import check_fits, check_writable

    paths = output.paths([seed for request in requests for seed in request.seeds], prompts)
    pictures = [(request, index) for request in requests for index in range(len(request.prompts))]
    for path, (request, index) in zip(paths, pictures, strict=True):
        check_writable(path)
        check_fits(path, (request.width, request.height), request.parameters(index, model))
    if output.grid:
        if output.grid.resolve() in [path.resolve() for path in paths]:
            other = output.grid.with_stem(f"{output.grid.stem}-grid")
            raise UserError(f"{output.grid} is both the grid and a picture", setting("grid", str(other)))
        columns, width, height = grid_size([(request.width, request.height) for request, _ in pictures])
        parameters = [request.parameters(index, model) for request, index in pictures]
        check_fits(output.grid, (width, height), {"columns": columns, "pictures": parameters}, "grid")
    return paths


def run_all(
    client: Client, requests: list[Request], timeout: float
) -> Generator[tuple[Request, list[Image.Image]], None, None]:
    """Yield each request and its pictures once they are made, with a bar over the steps of all requests.

    Raises DitforgeError if they are not all made within `timeout` seconds.
    """
    total, finished, last = sum(request.steps for request in requests), 0, time.monotonic()
    deadline = last + timeout
    with terminal.progress("generate", unit="equal steps") as report:

        def show(step: Step) -> None:
            nonlocal last
            now = time.monotonic()
            each = f", {(now - last) * 1000:.0f} ms a step" if step.index else ""
            last = now
            report(f"{client.model.name}{each}", finished + step.index, total)

        for request in requests:
            images = client.run_request(request, show, deadline)
            finished += request.steps
            report(client.model.name, finished, total)
            yield request, images


def tell_paths(written: list[tuple[Path, int]]) -> None:
    """Print the paths and seeds of pictures. If standard output is not a terminal, seeds go to standard error."""
    for path, seed in written:
        if sys.stdout.isatty():
            terminal.say(f"{path}  seed {seed}")
        else:
            if not verbosity.is_quiet():
                print(f"{path}: seed {seed}", file=sys.stderr)
            terminal.say(str(path))
