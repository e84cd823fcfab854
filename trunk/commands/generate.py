"""`ditforge generate`: the client, a progress bar, and pictures on disk."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditforge import terminal
from ditforge.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

    from ditforge.client import Step
    from ditforge.client.settings import ConnectionSettings

MAX_COUNT = 1000  # all of them are in memory at once
URL_HELP = "A server's gRPC port, by default localhost:8001; again for others that serve the same engines."
HEADER_HELP = "gRPC metadata to send with every call, e.g. for a proxy; again for more. NAME-bin takes base64."
TLS_HELP = "Encrypt the connection, and trust the public authorities; not needed beside the next three."


@dataclass(frozen=True)
class PictureFlags:
    """What is asked of a picture; None is the model's own. See `ditforge.client.Client.generate`."""

    seed: Annotated[int | None, typer.Option(help="The same seed, the same picture; by default random.")] = None
    steps: Annotated[int | None, typer.Option(help="Sampler steps; by default the model's.")] = None
    height: Annotated[int | None, typer.Option(help="In pixels; by default the model's.")] = None
    width: Annotated[int | None, typer.Option(help="In pixels; by default the model's.")] = None
    guidance: Annotated[float | None, typer.Option(help="How strictly the prompt is followed.")] = None
    sampler: Annotated[str | None, typer.Option(metavar="NAME", help="euler, heun, dpmpp_2m, …")] = None
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the picture should not be; needs guidance above 1.")
    ] = None
    true_cfg: Annotated[
        float | None,
        typer.Option(help="The negative prompt's scale in models that have guidance built in; by default 1, off."),
    ] = None
    skip_layer_guidance: Annotated[
        float | None, typer.Option(help="Its scale, for models that have it; 2.8 is usual, by default 0, off.")
    ] = None
    t5: Annotated[
        str | None, typer.Option(metavar="WHEN", help="always, never, or auto: not for short and plain prompts.")
    ] = None
    vae_tile: Annotated[
        int | None, typer.Option(help="Decode in tiles of this many pixels, to save memory; by default as need be.")
    ] = None


@dataclass(frozen=True)
class ConnectionFlags:
    """How servers are reached; what `ditforge.client.settings.make_settings` says of each field."""

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
        """The same as a client has it. Raises UserError for what cannot be."""
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
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    picture: PictureFlags,
    connection: ConnectionFlags,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="A .png file; by default picture-SEED.png.")] = None,
    count: Annotated[int, typer.Option(help="How many pictures, of the seeds SEED, SEED + 1, …")] = 1,
) -> None:
    """A picture for a prompt, from a running server, or from several: where one fails, it goes on at another.

    Example: ditforge generate "a large red circle" --seed 0 --out circle.png
    """
    make_pictures(prompt, connection.settings(), out, count, picture)


def make_pictures(
    prompt: str, settings: ConnectionSettings, out: Path | None, count: int, asked: PictureFlags
) -> list[Path]:
    """Make `count` pictures and write them to `out`, numbered if there are several; prints their paths.

    Everything that can be wrong with the paths is found out before the first step.
    """
    from ditforge.client.client import run
    from ditforge.client.connection import Connection
    from ditforge.client.options import GenerateOptions
    from ditforge.client.picture_file import check_writable, read_info, save_picture
    from ditforge.client.request import make_request

    if not 1 <= count <= MAX_COUNT:
        raise UserError(f"the number of pictures must be from 1 to {MAX_COUNT}, got {count}", "--count 1")
    options = GenerateOptions(**asdict(asked))
    check_writable(out or Path("picture.png"))
    with closing(Connection(settings)) as connection:
        calls = connection.begin()
        request = make_request(calls.model, [prompt] * count, options)
        with bar() as progress:
            task = progress.add_task(calls.model.name, total=request.steps, each="")
            last = progress.get_time()

            def show(step: Step) -> None:
                nonlocal last
                now = progress.get_time()
                each = f"{(now - last) * 1000:.0f} ms a step" if step.index else ""
                last = now
                progress.update(task, completed=step.index, each=each)

            images = run(calls, request, show)
            progress.update(task, completed=request.steps)
    paths = list[Path]()
    try:
        for index, image in enumerate(images):
            path = out or Path(f"picture-{read_info(image)['seed']}.png")
            if out and count > 1:
                path = out.with_stem(f"{out.stem}-{index}")
            save_picture(image, path)
            paths.append(path)
    finally:  # once all are kept: that a line cannot be printed costs no picture
        for path in paths:
            terminal.say(str(path))
    return paths


def bar() -> Progress:
    """Step, time of the last step, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),  # a model's name, as the server has it
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[each]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
