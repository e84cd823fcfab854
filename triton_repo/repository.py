"""`ditforge repo`: a folder of engines becomes a Triton model repository."""

from __future__ import annotations

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
MODEL_CODE = "from ditforge.triton_repo.{module} import TritonPythonModel  # noqa: F401\n"


def write_repository(engines: Path, out: Path, max_batch: int = DEFAULT_MAX_BATCH) -> Manifest:
    """Write a Triton model repository for the build in the folder `engines` into the folder `out`.

    `max_batch` is how many samples Triton puts into one call of a model. Raises UserError if the build is damaged; then
    `out` is as it was before.
    """
    if max_batch < 1:
        raise UserError(f"the largest batch must be at least 1, got {max_batch}", "--max-batch 8")
    source = manifest.read(engines, "engines")
    with manifest.written_whole(out, "repository", own=(TEXT_ENCODERS,)) as folder:
        components = {name: write_model(source, name, engines, folder, max_batch) for name in source.components}
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
    parameters = {}
    if name == DIT:
        parameters[config.MODEL_PARAMETER] = source.model.model_dump_json()
    if name in source.engines:
        engine = source.engines[name]
        made = config.EngineSource(compiler=engine.compiler, target=engine.target, files=files)
        parameters[config.ENGINE_PARAMETER] = made.model_dump_json()
    module = "tokenizer_model" if name == TOKENIZER else "engine_model"
    (version / "model.py").write_text(MODEL_CODE.format(module=module))
    write_config(config.python_model(name, component, max_batch, parameters), folder)
    return component.model_copy(update={"files": {f"{name}/1/{file}": files[file] for file in files}})


def write_config(model: pb.ModelConfig, folder: Path) -> None:
    """Write `folder`/NAME/config.pbtxt."""
    (folder / model.name).mkdir(exist_ok=True)
    (folder / model.name / "config.pbtxt").write_text(text_format.MessageToString(model, as_utf8=True))
