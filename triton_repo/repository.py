"""`ditforge repo`: a folder of engines becomes a Triton model repository."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from ditforge import manifest
from ditforge.errors import UserError
from ditforge.manifest import Component, Manifest
from ditforge.triton_repo import config

TOKENIZER, TEXT_ENCODERS, DIT = "tokenizer", "text_encoders", "dit"
NOT_TEXT = (DIT, "vae_decoder", "vae_encoder")
DEFAULT_MAX_BATCH = 8
RUNTIME_CACHE = ".runtime-cache"  # after an engine's name: what ditforge.engines.tensorrt_runtime writes beside it
MODEL_CODE = "from ditforge.triton_repo.{module} import TritonPythonModel  # noqa: F401\n"


def write_repository(engines: Path, out: Path, max_batch: int | None = None) -> Manifest:
    """Write a Triton model repository for the build in the folder `engines` into the folder `out`.

    `max_batch` is how many samples Triton puts into one call of a model: by default 8, or what the engines take. Raises
    UserError if the build is damaged, or does not take such batches; then `out` is as it was before.
    """
    source = manifest.read(engines, "engines")
    taken = min((engine.max_batch for engine in source.engines.values() if engine.max_batch), default=None)
    if max_batch is None:
        max_batch = min(DEFAULT_MAX_BATCH, taken or DEFAULT_MAX_BATCH)
    if max_batch < 1:
        raise UserError(f"the largest batch must be at least 1, got {max_batch}", "--max-batch 8")
    if taken and max_batch > taken:
        raise UserError(
            f"the engines take batches of up to {taken}, not {max_batch}",
            f"--max-batch {taken}, or ditforge build ONNX_DIR --gpu GPU --batch {max_batch} --out DIR",
        )
    with manifest.written_whole(out, "repository", own=(TEXT_ENCODERS,)) as folder:
        components = {name: write_model(source, name, engines, folder, max_batch) for name in source.components}
        keep_caches(out, folder, components)
        text = {name: component for name, component in source.components.items() if name not in NOT_TEXT}
        write_config(config.ensemble(TEXT_ENCODERS, text, max_batch), folder)
        (folder / TEXT_ENCODERS / "1").mkdir()  # Triton wants a version folder, also where there is nothing to put in
        result = source.model_copy(update={"kind": "repository", "components": components})
        manifest.write(result, folder)
    return result


def write_model(source: Manifest, name: str, engines: Path, folder: Path, max_batch: int) -> Component:
    """Write the model of the component `name` into `folder`/NAME, and describe where its files are now."""
    component = source.components[name]
    version = folder / name / "1"
    version.mkdir(parents=True)
    manifest.check_files(engines, component.files, fix="ditforge build ONNX_DIR --gpu GPU --out DIR   again")
    files = {Path(file).name: described for file, described in component.files.items()}
    for file in component.files:
        shutil.copyfile(engines / file, version / Path(file).name)
    engine = source.engines.get(name)
    parameters = {config.MODEL_PARAMETER: source.model.model_dump_json()} if name == DIT else {}
    if engine and engine.compiler == "tensorrt" and has_tensorrt_backend():
        plan = next(iter(files))
        model = config.tensorrt_model(name, component, max_batch, parameters, plan, source.model)
    else:
        if engine:
            made = config.EngineSource(
                compiler=engine.compiler, compiler_version=engine.compiler_version, target=engine.target, files=files
            )
            parameters[config.ENGINE_PARAMETER] = made.model_dump_json()
        module = "tokenizer_model" if name == TOKENIZER else "engine_model"
        (version / "model.py").write_text(MODEL_CODE.format(module=module))
        gpu = engine is not None and engine.target != "cpu"
        model = config.python_model(name, component, max_batch, parameters, gpu)
    write_config(model, folder)
    return component.model_copy(update={"files": {f"{name}/1/{file}": files[file] for file in files}})


def keep_caches(out: Path, folder: Path, components: dict[str, Component]) -> None:
    """Keep what TensorRT-RTX compiled on the GPU, in an earlier repository `out`, of engines that stay the same."""
    try:
        before = manifest.read(out, "repository").components
    except UserError:
        return
    for name, component in components.items():
        cache = f"{name}/1/{name}{RUNTIME_CACHE}"
        if name in before and before[name].files == component.files and (out / cache).is_file():
            shutil.copyfile(out / cache, folder / cache)


def has_tensorrt_backend() -> bool:
    """Whether the Triton that would serve has a TensorRT backend: nvidia-pytriton's has none, NVIDIA's container has.

    Where there is no Triton at all, the repository is for another machine, and so for the container.
    """
    found = shutil.which("tritonserver")
    if found:
        return (Path(found).resolve().parent.parent / "backends" / "tensorrt").is_dir()
    return importlib.util.find_spec("pytriton") is None


def write_config(model: pb.ModelConfig, folder: Path) -> None:
    """Write `folder`/NAME/config.pbtxt."""
    (folder / model.name).mkdir(exist_ok=True)
    (folder / model.name / "config.pbtxt").write_text(text_format.MessageToString(model, as_utf8=True))
