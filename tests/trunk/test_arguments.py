"""What callers from Python pass to public functions: every parameter of each, with values that cannot be."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import published
import pytest

import ditforge
from ditforge.api import BuildKeywords, ExportKeywords
from ditforge.arguments import bound_fields
from ditforge.client import TLS, AsyncClient, Client, ConnectionSettings, GenerateOptions
from ditforge.client.options import Options
from ditforge.client.settings import Settings
from ditforge.engines.build import BuildOptions
from ditforge.errors import UserError
from ditforge.export.checkpoint.source import CheckpointSource
from ditforge.export.onnx_export import ExportOptions
from ditforge.triton_repo.serve_options import ServeOptions
from ditforge.triton_repo.server import Options as ServeKeywords

MODEL = published.MODEL.model_copy(
    update={
        "name": "m",
        "latent_channels": 4,
        "default_size": 64,
        "max_size": 128,
        "default_steps": 4,
        "max_tokens": {"clip": 77},
        "t5": "absent",
    }
)
NOWHERE = "/nowhere/at/all"
STAGES: dict[str, tuple[list[str], type | None]] = {  # their paths, and their options
    "export_checkpoint": ([NOWHERE, NOWHERE], ExportKeywords),
    "build_engines": ([NOWHERE, NOWHERE], BuildKeywords),
    "write_repository": ([NOWHERE, NOWHERE], None),
    "serve": ([NOWHERE], ServeKeywords),
}
HOSTILE = [
    *(None, True, 0, 3, -1, 1.5, 10**400, float("nan"), float("inf"), 1j),
    *("", " ", "x", "3", "yes", "\0", "\ud800", "x" * 5000, b"", b"fp8", Path("x"), Path("x\0")),
    *([], [3], [None], [""], ["\0"], [("x", "y")], [("x", 1, 2)], (), {}, {3: 4}, {"x": object()}, {"x"}, range(3)),
    *(object(), print, len, np.int64(3), np.float32("nan"), np.array([1, 2]), np.zeros((2, 2)), SimpleNamespace()),
]


class Asked(Exception):
    """The request was fit for a server."""


class Unconnected:
    """What a client has of a server that knows its model, and answers nothing."""

    model = MODEL

    def begin(self) -> Unconnected:
        return self

    def infer(self, *call: object) -> None:
        raise Asked


def call(function: Callable[..., object], positional: list[Any], parameter: str, value: object) -> object:
    """Call with a value for that parameter."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    if parameter in names[: len(positional)]:
        positional = [value if name == parameter else given for name, given in zip(names, positional, strict=False)]
        return function(*positional)
    return function(*positional, **{parameter: value})


def generate(**options: object) -> object:
    return Client._over(Unconnected()).generate(**{"prompt": "a red circle", **options})  # type: ignore


def stages() -> Iterator[tuple[str, Callable[[object], object]]]:
    for name, (paths, options) in STAGES.items():
        stage = getattr(ditforge, name)
        parameters = [each for each in inspect.signature(stage).parameters if each != "options"]
        for parameter in parameters + list(options.__annotations__ if options else ()):
            yield f"{name}-{parameter}", partial(call, stage, paths, parameter)


def clients() -> Iterator[tuple[str, Callable[[object], object]]]:
    for name in ("prompt", "options", *Options.__annotations__):
        yield f"generate-{name}", lambda value, name=name: generate(**{name: value})  # type: ignore[misc]
    for kind in (ConnectionSettings, TLS, GenerateOptions):
        for field in dataclasses.fields(kind):
            if field.init:
                name = f"{kind.__name__}-{field.name}"
                yield name, lambda value, kind=kind, field=field: kind(**{field.name: value})  # type: ignore[misc]
    yield "AsyncClient-url", AsyncClient
    yield "AsyncClient-urls", lambda value: AsyncClient([value])  # type: ignore[list-item]
    for name in Settings.__annotations__:
        yield f"AsyncClient-{name}", lambda value, name=name: AsyncClient(**{name: value})  # type: ignore[misc]


ALL = dict([*stages(), *clients()])


@pytest.mark.parametrize("case", ALL)
def test_no_value_ends_in_another_error(case: str) -> None:
    """UserError with a fix, or the value is one that can be."""
    for value in HOSTILE:
        error = None
        try:
            ALL[case](value)
        except Exception as raised:
            error = raised
        fixed = isinstance(error, UserError) and error.problem and error.fix
        assert fixed or error is None or isinstance(error, Asked), f"{value!r:.80}: {error!r:.300}"


@pytest.mark.parametrize("case", dict(stages()))
@pytest.mark.parametrize("value", [object(), 1j, {"x"}], ids=["object", "complex", "set"])
def test_what_is_of_no_use_is_named(case: str, value: object) -> None:
    """Before the folder that does not exist is looked for."""
    with pytest.raises(UserError) as error:
        ALL[case](value)
    parameter = case.partition("-")[2]
    assert error.value.problem.startswith(f"{parameter} must be ")
    assert error.value.fix.startswith(f"{parameter}=")


@pytest.mark.parametrize(
    ("case", "value", "words"),
    [
        ("export_checkpoint-checkpoint", None, 'a path, as a string that .*, got None\nfix:   checkpoint="PATH"'),
        ("export_checkpoint-out", "", "out must be a path, as a string that is not empty .*, got ''"),
        ("export_checkpoint-out", b"x", "out must be a path, .*, got b'x'"),
        ("export_checkpoint-base", "x" * 5000, "base must be a path that this system can have"),
        ("export_checkpoint-loras", "nofile", "loras must be a list, got 'nofile'"),
        ("export_checkpoint-loras", [3], r'loras must be a list of paths, or .*, got 3\nfix:   loras=\[\("FILE", 1.0'),
        ("export_checkpoint-loras", [("a", float("nan"))], "loras must be .* a finite number"),
        ("export_checkpoint-random_weights", "yes", "random_weights must be True or False, got 'yes'"),
        ("export_checkpoint-precision", b"fp8", "precision must be a string, got b'fp8'"),
        ("export_checkpoint-gpu", "", "gpu must be a string that is not empty, got ''"),
        ("build_engines-batch", True, "batch must be an integer, got True\nfix:   batch=NUMBER"),
        ("build_engines-batch", 1.5, "batch must be an integer, got 1.5"),
        ("build_engines-gpu_memory", "3", "gpu_memory must be a number, got '3'"),
        ("build_engines-planned", 3, "planned must be a function, got 3"),
        ("write_repository-max_batch", "3", "max_batch must be an integer, got '3'"),
        ("write_repository-force", "x", "force must be True or False, got 'x'"),
        ("serve-port", "8001", "port must be an integer from 0 to 65535"),
        ("serve-insecure", 1, "insecure must be True or False, got 1"),
        ("serve-timeout", True, "timeout must be above 0"),
        ("serve-on_event", 3, "on_event must be a function, got 3"),
        ("generate-prompt", 3, "a prompt is of the type int, and not a string"),
        ("generate-callback", 3, "callback must be a function, got 3"),
        ("generate-callback", lambda: None, r"the callback \(\) cannot be called as one: too many"),
        ("generate-schedule", len, r"the schedule len\(obj, /\) cannot be called as one: too many"),
        ("generate-steps", True, "steps must be from 1 to 1000, got True"),
        ("AsyncClient-url", None, "addresses are strings, HOST:PORT, got None"),
        ("ConnectionSettings-urls", (3,), r"addresses are strings, HOST:PORT, got \(3,\)"),
        ("ConnectionSettings-urls", "localhost:8001", "addresses are strings, HOST:PORT, got 'localhost:8001'"),
        ("ConnectionSettings-timeout", 10**400, "timeout must be above 0 and at most 604800 seconds"),
    ],
)
def test_what_is_said_of_a_wrong_type(case: str, value: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ALL[case](value)


@pytest.mark.parametrize(
    ("case", "value"),
    [
        ("build_engines-batch", np.int64(2)),
        ("build_engines-gpu_memory", np.float32(20)),
        ("build_engines-gpu_memory", Fraction(41, 2)),
        ("build_engines-out", Path("out")),
        ("write_repository-max_batch", np.uint8(2)),
        ("serve-port", np.int64(0)),
        ("serve-log", "a.log"),
        ("serve-extra_args", ["--cache-config=local,size=1048576"]),
    ],
)
def test_what_can_be_is_taken(case: str, value: object) -> None:
    """And then the folder is missed, which is the first thing that is wrong."""
    with pytest.raises(UserError, match=f"{NOWHERE} is not a folder"):
        ALL[case](value)


@pytest.mark.parametrize(("name", "value"), [("seed", np.int64(3)), ("seed", [np.uint8(3)]), ("steps", np.int32(2))])
def test_numbers_of_numpy_are_taken_for_pictures(name: str, value: object) -> None:
    with pytest.raises(Asked):
        generate(**{name: value})


@pytest.mark.parametrize(
    ("misuse", "words"),
    [
        (lambda: ditforge.write_repository(NOWHERE), "write_repository cannot be called so: missing .* 'out'"),  # type: ignore[call-arg]
        (lambda: ditforge.write_repository(NOWHERE, NOWHERE, max_bach=3), "no option 'max_bach'\nfix:   max_batch=…"),  # type: ignore[call-arg]
        (lambda: ditforge.serve(NOWHERE, **{"repository": NOWHERE}), "multiple values for argument 'repository'"),  # type: ignore[arg-type]
        (lambda: ditforge.serve(NOWHERE, **{"repo": NOWHERE}), "no option 'repo'"),  # type: ignore[arg-type]
        (lambda: Client._over(Unconnected()).generate("x", prompt="x"), "multiple values for argument 'prompt'"),  # type: ignore
        (lambda: Client(NOWHERE, url=NOWHERE), "multiple values for argument 'url'"),  # type: ignore
        (lambda: GenerateOptions(stepz=3), "no option 'stepz'\nfix:   steps=…"),  # type: ignore[call-arg]
        (lambda: TLS(cert="x"), "no option 'cert'\nfix:   .*ca, certificate, key"),  # type: ignore[call-arg]
        (lambda: ConnectionSettings(url="x"), "no option 'url'\nfix:   urls=…"),  # type: ignore[call-arg]
        (lambda: TLS(None, None, None, None), r"TLS cannot be called so: too many .*\nfix:   TLS\(ca=None, "),  # type: ignore[call-arg]
    ],
)
def test_calls_that_do_not_fit(misuse: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        misuse()


def test_the_options_are_the_fields_of_the_records() -> None:
    def fields(*records: Any) -> set[str]:
        return {field.name for record in records for field in dataclasses.fields(record)}

    assert set(ExportKeywords.__annotations__) == fields(CheckpointSource, ExportOptions) - {"path"} | {"gpu"}
    assert set(BuildKeywords.__annotations__) == fields(BuildOptions)
    assert set(ServeKeywords.__annotations__) == set(ServeOptions.model_fields) - {"repo"}


def test_signatures_stay_as_they_are() -> None:
    """For help(), and for editors."""

    @dataclasses.dataclass
    class Plain:
        a: int = 1

    assert inspect.signature(bound_fields(Plain)) == inspect.signature(Plain)
    assert list(inspect.signature(ditforge.build_engines).parameters) == [
        *("onnx", "out", "progress", "planned", "options")
    ]
    assert str(ditforge.build_engines.__doc__).startswith("Compile what")
