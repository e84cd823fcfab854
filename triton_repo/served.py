"""What the front knows about the models of a repository before it asks Triton: it reads their configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from pydantic import ValidationError
from tritonclient.grpc import model_config_pb2 as pb

from ditforge import manifest
from ditforge.contract import ENGINES_PARAMETER
from ditforge.errors import UserError
from ditforge.folders import CONFIG
from ditforge.option import command
from ditforge.small_files import read_bytes
from ditforge.triton_repo.config import (
    ENGINE_MODULE,
    LIMITS_PARAMETER,
    MEMBER_PARAMETER,
    MODEL_CODE,
    TOKENIZER_MODULE,
)
from ditforge.triton_repo.limits import Axis, BadRequest, InputLimits, Limits, shown

UNBOUNDED = 64 << 20  # the most bytes of a request to a model that ditforge did not make and that gives no limit
LARGEST_MESSAGE = 2**31 - 1  # the most bytes that gRPC can count
ENVELOPE = 64 << 10  # the most bytes of a message without its tensors
OWN_CODE = "from ditforge."  # the code of ditforge's own models begins like this in all versions
CODES = {MODEL_CODE.format(module=module) for module in (ENGINE_MODULE, TOKENIZER_MODULE)}
AGAIN = "ditforge repo ENGINE_DIR --out {}"


@dataclass(frozen=True)
class ModelSignature:
    """What one model takes and gives: limits of its inputs, and the dtypes of its outputs by name.

    `spoils`: where it fails, its outputs are no numbers, and there is no error.
    """

    limits: Limits
    outputs: Mapping[str, str]
    spoils: bool = False

    def check_outputs(self, names: Sequence[str]) -> None:
        """Raise BadRequest unless `names` are outputs of the model, each named once; none means all of them."""
        if set(names) - set(self.outputs) or len(set(names)) < len(names):
            got = ", ".join(map(shown, names[:5]))
            raise BadRequest(f"the outputs are {', '.join(self.outputs)}, each at most once, got {got}")

    @property
    def message_bytes(self) -> int:
        """The most bytes of a request that it takes."""
        inputs = self.limits.inputs.values()
        if any(axis.most >= UNBOUNDED for one in inputs for shape in one.shapes for axis in shape):
            return UNBOUNDED + ENVELOPE
        return self.limits.request_bytes + ENVELOPE


def read_models(repository: Path) -> tuple[dict[str, ModelSignature], str]:
    """The models of a repository by name, and the digest of its engines, empty where it was not made by ditforge.

    Models that were not made by ditforge have the limits of their configuration alone. Raises UserError, which names
    the file, where one is broken or missing.
    """
    models, engines = {}, ""
    for file in sorted(repository.glob("*/config.pbtxt")):
        fix = command(AGAIN, repository)
        try:
            config = text_format.Parse(read_bytes(file), pb.ModelConfig())
            limits = limits_in(config)
        except (text_format.ParseError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is no configuration of a model: {error}", fix) from None
        except ValidationError as error:
            what = f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
            raise UserError(f"the parameter {LIMITS_PARAMETER} in {file} cannot be read: {what}", fix) from None
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}", fix) from None
        folder, spoils = file.parent, MEMBER_PARAMETER in config.parameters or config.platform == "ensemble"
        if config.backend == "python":
            check_code(folder, fix)
        outputs = {tensor.name: dtype_of(tensor.data_type) for tensor in config.output}
        models[config.name or folder.name] = ModelSignature(limits, outputs, spoils)
        if ENGINES_PARAMETER in config.parameters:
            engines = config.parameters[ENGINES_PARAMETER].string_value
    if (repository / manifest.FILE_NAME).is_file():
        for name in manifest.read(repository, "repository").components:
            if name not in models:
                problem = f"{repository} has lost the model {name}: there is no {repository / name / CONFIG}"
                raise UserError(problem, command(AGAIN, repository))
    return models, engines


def check_code(folder: Path, fix: str) -> None:
    """Raise UserError, with this `fix`, unless the model in `folder` has code, and not that of another version."""
    codes = sorted(folder.glob("[1-9]*/model.py"))
    if not codes:
        raise UserError(f"the model {folder.name} has no code: there is no {folder / '1' / 'model.py'}", fix)
    for code in codes:
        text = read_bytes(code).decode(errors="replace")
        if text.startswith(OWN_CODE) and text.count("\n") == 1 and text not in CODES:
            raise UserError(f"{folder.parent} was written by another version of ditforge", fix)


def limits_in(config: pb.ModelConfig) -> Limits:
    """Return the limits in a configuration or, without any, those that its description of the inputs implies."""
    if LIMITS_PARAMETER in config.parameters:
        return Limits.model_validate_json(config.parameters[LIMITS_PARAMETER].string_value)
    inputs = {}
    for tensor in config.input:
        axes = tuple(Axis(least=max(dim, 0), most=dim if dim >= 0 else UNBOUNDED) for dim in tensor.dims)
        inputs[tensor.name] = InputLimits(dtype=dtype_of(tensor.data_type), shapes=(axes,))
    return Limits(max_batch=config.max_batch_size, inputs=inputs)


def dtype_of(number: pb.DataType) -> str:
    """The name of a dtype on the wire, of its number in a configuration."""
    name: str = pb.DataType.Name(number)
    return name.removeprefix("TYPE_").replace("STRING", "BYTES")


def message_limit(models: dict[str, ModelSignature]) -> int:
    """Return the largest number of bytes of a message for any of the models: that of the largest picture served."""
    return min(max(model.message_bytes for model in models.values()), LARGEST_MESSAGE)
