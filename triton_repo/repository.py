"""`ditforge repo`: write a Triton model repository for a folder of engines."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from ditforge import manifest, stage_folder
from ditforge.contract import (
    DIT,
    ENGINES_PARAMETER,
    MODEL_PARAMETER,
    TEXT_ENCODERS,
    TEXT_ENCODERS_CLIP,
    TOKENIZER,
    VAE_DECODER,
    VAE_ENCODER,
)
from ditforge.errors import UserError
from ditforge.manifest import Manifest
from ditforge.model import MAX_BATCH
from ditforge.option import command, setting
from ditforge.placement import Placement
from ditforge.served_model import write_served_model
from ditforge.triton_repo import config
from ditforge.triton_repo.limits import Limits, limits_of

ENSEMBLES = (TEXT_ENCODERS, TEXT_ENCODERS_CLIP)
TEXTS = ("*/config.pbtxt", "*/1/model.py", "*/1")  # what is written anew, beside the files of the engines
NOT_TEXT = (DIT, VAE_DECODER, VAE_ENCODER)
DEFAULT_MAX_BATCH = 8
STORED_ONCE = (".plan", ".safetensors", ".pt2")  # TensorRT's engines, and the weights and packages of Inductor's
TENSORRT_BACKEND = "tensorrt"  # Triton's own backend for TensorRT, which NVIDIA's container has
NEW = "there was none before"
log = logging.getLogger(__name__)
BUILD_AGAIN = "ditforge build ONNX_DIR --gpu GPU --out DIR   again"


@dataclass(frozen=True)
class Triton:
    """A model as Triton reads it.

    config: its configuration.
    texts: the texts of further files, by their path below the model's folder.
    engine: the engine's files in the build's folder, by their path below the model's folder.
    """

    config: pb.ModelConfig
    texts: dict[str, str]
    engine: dict[str, str]


def write_repository(engines: Path, out: Path, max_batch: int | None = None, force: bool = False) -> str:
    """Write a Triton model repository for the build in the folder `engines` into the folder `out`.

    `max_batch` is the largest number of samples that Triton puts into one call of a model; by default it is 8, or what
    the engines take if that is less. With `force`, the repository of another model in `out` is replaced too.

    Returns the reason for writing; it is empty if `out` holds this repository already, and then nothing is written.
    Raises UserError if the build is damaged or does not take such batches; `out` is then as it was before.
    """
    source = manifest.read(engines, "engines")
    manifest.check_components(source, engines, (TOKENIZER, DIT, VAE_DECODER))
    known_as = "" if force else stage_folder.called(source.model.name, source.origin)
    max_batch = choose_max_batch(source, max_batch)
    known = vocabularies(engines, source)
    limits = {name: limits_of(name, part, source.model, max_batch, known) for name, part in source.components.items()}
    models = {name: make_model(source, name, limits[name]) for name in source.components}
    text = {name: component for name, component in source.components.items() if name not in NOT_TEXT}
    for name, members in config.text_ways(text).items():
        models[name] = Triton(config.ensemble(name, members, limits[TOKENIZER]), {}, {})
    components = {
        name: component.model_copy(
            update={"files": {f"{name}/{path}": component.files[file] for path, file in models[name].engine.items()}}
        )
        for name, component in source.components.items()
    }
    result = source.model_copy(
        update={"kind": "repository", "components": components, "source": cache_key(source, models, max_batch)}
    )
    reason = rewrite_reason(manifest.earlier(out, "repository"), out, result, models)
    if not reason:
        return ""
    log.info("%s is written: %s", out, reason)
    stage_folder.check_replaceable(out, "repository", TEXTS, known_as)
    for component in source.components.values():
        manifest.check_files(engines, component.files, fix=BUILD_AGAIN)
    with stage_folder.written_whole(out, "repository", own=TEXTS) as folder:
        for name, model in models.items():
            (folder / name / "1").mkdir(parents=True)  # Triton needs this folder even if it is empty
            for path, content in texts(model).items():
                (folder / name / path).write_text(content)
            for path, file in model.engine.items():
                place(engines / file, folder / name / path)
        manifest.write(result, folder)
    return reason


def check_max_batch(max_batch: int) -> None:
    """Raise UserError unless this can be the largest batch of a server."""
    if not 1 <= max_batch <= MAX_BATCH:
        problem = f"the largest batch must be from 1 to {MAX_BATCH}, got {max_batch}"
        raise UserError(problem, setting("max_batch", DEFAULT_MAX_BATCH))


def choose_max_batch(source: Manifest, max_batch: int | None) -> int:
    """Return the largest batch: `max_batch`, or by default 8, or what the engines take if that is less.

    Raises UserError if the engines do not take batches of `max_batch`.
    """
    taken = min((engine.max_batch for engine in source.engines.values() if engine.max_batch), default=None)
    if max_batch is None:
        max_batch = min(DEFAULT_MAX_BATCH, taken or DEFAULT_MAX_BATCH)
    check_max_batch(max_batch)
    if taken and max_batch > taken:
        larger = command("ditforge build ONNX_DIR --gpu GPU --batch {} --out DIR", max_batch)
        problem = f"the engines take batches of up to {taken}, not {max_batch}"
        raise UserError(problem, f"{setting('max_batch', taken)}, or {larger}")
    return max_batch


def vocabularies(engines: Path, source: Manifest) -> dict[str, int]:
    """Count the token ids of each tokenizer of the build, by the name of the tensor that holds its ids.

    Raises UserError for a file that is no tokenizer.
    """
    from tokenizers import Tokenizer

    found = {}
    for file in source.components[TOKENIZER].files:
        manifest.check_files(engines, {file: source.components[TOKENIZER].files[file]}, fix=BUILD_AGAIN)
        try:
            ids = Tokenizer.from_file(str(engines / file)).get_vocab(with_added_tokens=True).values()
        except Exception as error:  # the library raises no other
            raise UserError(f"{engines / file} is no tokenizer: {error}", BUILD_AGAIN) from None
        if not ids:
            raise UserError(f"{engines / file} is no tokenizer: it has no token", BUILD_AGAIN)
        found[f"{Path(file).stem}_ids"] = max(ids) + 1
    return found


def make_model(source: Manifest, name: str, limits: Limits) -> Triton:
    """Make the Triton model of the component `name`."""
    component, engine = source.components[name], source.engines.get(name)
    files = {f"1/{Path(file).name}": file for file in component.files}
    parameters = {config.LIMITS_PARAMETER: limits.model_dump_json(exclude_none=True)}
    if name == DIT:
        parameters[MODEL_PARAMETER] = write_served_model(source.model)
        parameters[ENGINES_PARAMETER] = manifest.digest(source.components)
    if name not in (TOKENIZER, *NOT_TEXT):
        parameters[config.MEMBER_PARAMETER] = "true"
    max_batch = limits.max_batch
    whole = engine and engine.placement == Placement()  # Triton's own backend cannot run segments or load on demand
    if engine and engine.triton_backend == TENSORRT_BACKEND and whole and has_tensorrt_backend():
        plan = Path(next(iter(component.files))).name
        return Triton(
            config.tensorrt_model(name, component, max_batch, parameters, plan, source.model), texts={}, engine=files
        )
    if engine:
        described = {Path(file).name: component.files[file] for file in component.files}
        made = engine.model_copy(update={"cache_key": {}})  # it is long, and nobody reads it there
        parameters[config.ENGINE_PARAMETER] = config.EngineSource(files=described, made=made).model_dump_json()
    module = config.TOKENIZER_MODULE if name == TOKENIZER else config.ENGINE_MODULE
    code = {"1/model.py": config.MODEL_CODE.format(module=module)}
    return Triton(config.python_model(name, component, max_batch, parameters), code, files)


def texts(model: Triton) -> dict[str, str]:
    """Return the text files of a model, by their path below its folder: its configuration and its code."""
    return {"config.pbtxt": text_format.MessageToString(model.config, as_utf8=True), **model.texts}


def cache_key(source: Manifest, models: dict[str, Triton], max_batch: int) -> dict[str, str]:
    """Everything that changes a repository: the same key, the same repository."""
    key = {"max_batch": str(max_batch)}
    for name, component in source.components.items():
        key[f"what runs {name}"] = models[name].config.platform or models[name].config.backend
        if engine := source.engines.get(name):
            key[f"compiler of {name}"] = f"{engine.compiler} {engine.compiler_version} for {engine.target}"
            key[f"placement of {name}"] = engine.placement.model_dump_json(exclude_defaults=True)
        key |= {f"sha256 of {file}": described.sha256 for file, described in component.files.items()}
    for name, model in models.items():
        key |= {f"sha256 of {name}/{p}": sha256(text.encode()).hexdigest() for p, text in texts(model).items()}
    return key


def rewrite_reason(before: Manifest | None, out: Path, wanted: Manifest, models: dict[str, Triton]) -> str:
    """Why the repository has to be written; empty if the one in `out` is the one that is wanted."""
    if before is None:
        return NEW
    if changed := manifest.first_difference(before.source, wanted.source):
        return changed
    if before.components != wanted.components or before.model != wanted.model or before.engines != wanted.engines:
        return "the manifest of the engines changed"
    for name, model in models.items():
        if not (out / name / "1").is_dir():
            return f"{name}/1 is missing"
        for path, content in texts(model).items():
            if not (out / name / path).is_file() or (out / name / path).read_text(errors="replace") != content:
                return f"{name}/{path} is missing or changed"
    for name, component in wanted.components.items():
        if not manifest.is_whole(out, {name: component}):
            return f"a file of {name} is missing or truncated"
    return ""


def place(file: Path, target: Path) -> None:
    """Give a large file a second name where the file system can, so that it is stored once; copy everything else.

    Not so the weights beside an ONNX graph: ONNX refuses to read them if they have several names.
    """
    if file.suffix in STORED_ONCE:
        with suppress(OSError):
            target.hardlink_to(file)
            return
    shutil.copyfile(file, target)


def has_tensorrt_backend() -> bool:
    """Whether the Triton that would serve has a TensorRT backend: nvidia-pytriton's has none, NVIDIA's container has.

    Where there is no Triton at all, the repository is for another machine, and so for the container.
    """
    found = shutil.which("tritonserver")
    if found:
        return (Path(found).resolve().parent.parent / "backends" / "tensorrt").is_dir()
    return importlib.util.find_spec("pytriton") is None
