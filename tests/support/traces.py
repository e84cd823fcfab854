"""Graphs that tests have traced, in a folder that all processes of a run share: nothing is traced twice.

Tracing takes up to fifteen seconds for a network, and depends on neither weights nor 8-bit formats, in which most
exports of tests differ. A run begins with an empty folder, so a change of the sources is always seen.

`install()` is called by conftest.py and, for the command line in processes of its own, by startup/sitecustomize.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from hashlib import sha256
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditforge.export.graph.measure_footprint import Measured
    from ditforge.export.graph.tracing import Traced
    from ditforge.export.network import Network
    from ditforge.model import Model

FOLDER = "DITFORGE_TESTS_TRACES"  # the environment variable with the folder; without it, everything is traced
EXPORT = "ditforge.export.onnx_export"
NO_DATA = "no-data"  # where serialised initializers without values pretend to be stored
IRRELEVANT = {"_name_or_path"}  # of a configuration: where it lay


class Unknown(Exception):
    """Something of which nobody can say whether two are the same."""


def digest(network: Network) -> str:
    """Of all that determines what the network is traced to; raises Unknown where that cannot be told."""
    told = (network.name, network.build, network.inputs, network.outputs, network.dtype)
    return sha256(repr(description(told)).encode()).hexdigest()


def description(thing: object) -> object:
    """Nested tuples of plain values, equal for what is the same in every process of a run."""
    kind = f"{type(thing).__module__}.{type(thing).__qualname__}"
    if thing is None or isinstance(thing, bool | int | float | str | bytes):
        return thing
    if isinstance(thing, Mapping):
        return kind, *((description(k), description(v)) for k, v in thing.items() if k not in IRRELEVANT)
    if isinstance(thing, list | tuple):
        return kind, *map(description, thing)
    if isinstance(thing, set | frozenset):
        return kind, *sorted(map(repr, map(description, thing)))
    if isinstance(thing, ModuleType):
        return kind, thing.__name__
    if isinstance(thing, type) and "<locals>" not in thing.__qualname__:
        return kind, thing.__module__, thing.__qualname__
    if isinstance(thing, FunctionType):
        code, cells = thing.__code__, [cell.cell_contents for cell in thing.__closure__ or ()]
        where = code.co_filename, code.co_firstlineno, thing.__qualname__, code.co_freevars
        return kind, where, description([thing.__defaults__, thing.__kwdefaults__, cells])
    if isinstance(thing, MethodType):
        return kind, description([thing.__func__, thing.__self__])
    if isinstance(thing, partial):
        return kind, description([thing.func, thing.args, thing.keywords])
    if isinstance(thing, Enum) or kind in ("torch.dtype", "re.Pattern"):
        return kind, repr(thing)
    if is_dataclass(thing):
        return kind, *((field.name, description(getattr(thing, field.name))) for field in fields(thing))
    if kind.startswith("transformers.") and hasattr(thing, "to_dict"):  # a configuration
        return kind, description(vars(thing))
    raise Unknown(kind)


def shared(folder: Path, key: str, make: Callable[[], bytes]) -> bytes:
    """What `make` returned in whichever process asked first."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / key
    if not file.exists():
        with FileLock(folder / f"{key}.lock"):
            if not file.exists():
                part = folder / f"{key}.part"
                part.write_bytes(make())
                part.rename(file)
    return file.read_bytes()


def serialised(traced: Traced) -> bytes:
    """A traced network; its initializers have no values, for which ONNX has no word but data in another file."""
    import onnx_ir as ir

    model = traced.model
    valueless = [value for value in model.graph.initializers.values() if value.const_value is None]
    for value in valueless:
        assert value.dtype is not None and value.shape is not None and value.name is not None
        value.const_value = ir.ExternalTensor(NO_DATA, 0, 0, value.dtype, shape=value.shape, name=value.name)
    proto = ir.to_proto(model)
    for value in valueless:
        value.const_value = None
    calls = tuple(call.model_dump() for call in traced.calls)
    return pickle.dumps((proto.SerializeToString(), traced.aliases, calls, traced.programs))


def deserialised(data: bytes) -> Traced:
    """The reverse of `serialised`."""
    import onnx
    import onnx_ir as ir

    from ditforge.export.graph.tracing import Traced
    from ditforge.regions import Call

    graph, aliases, calls, programs = pickle.loads(data)
    model = ir.from_proto(onnx.ModelProto.FromString(graph))
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.location == NO_DATA:
            value.const_value = None
    return Traced(model, aliases, tuple(Call(**call) for call in calls), programs)


def share(module: ModuleType) -> None:
    """Make the module `ditforge.export.onnx_export` trace and measure no network that has been traced in this run."""
    traces: Callable[[Network], Traced] = module.trace  # type: ignore[attr-defined]
    measures: Callable[..., Measured] = module.measure  # type: ignore[attr-defined]

    def trace(network: Network) -> Traced:
        folder = os.environ.get(FOLDER)
        if not folder:
            return traces(network)
        try:
            key = digest(network)
        except Unknown:
            return traces(network)
        return deserialised(shared(Path(folder), key, lambda: serialised(traces(network))))

    def measure(network: Network, model: Model, *more: Any) -> Measured:
        folder = os.environ.get(FOLDER)
        if more or not folder:
            return measures(network, model, *more)
        try:
            key = sha256((digest(network) + model.model_dump_json(exclude={"name"})).encode()).hexdigest()
        except Unknown:
            return measures(network, model)

        def make() -> bytes:
            measured = measures(network, model)
            return json.dumps([measured.parameters, measured.activations, measured.flops]).encode()

        from ditforge.export.graph.measure_footprint import Measured

        parameters, *by_side = json.loads(shared(Path(folder), key, make))
        shapes = {name: tuple(shape) for name, shape in parameters.items()}
        activations, flops = ({int(side): number for side, number in found.items()} for found in by_side)
        return Measured(network, shapes, activations, flops)

    module.trace, module.measure = trace, measure  # type: ignore[attr-defined]


class Finder:
    """Finds `ditforge.export.onnx_export` as others do, and has it share what is traced once it is imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != EXPORT:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            share(module)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


def install() -> None:
    """From now on in this process; nothing is imported for it before the export is."""
    sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
