"""If a user gives a command the wrong kind of path, says what the path holds, and which command takes it."""

from __future__ import annotations

from pathlib import Path

from ditforge import manifest
from ditforge.errors import UserError
from ditforge.option import command

CHECKPOINT = "model_index.json"  # every checkpoint in diffusers' layout has this file
CONFIG = "config.pbtxt"  # every model in a model repository has this file
NEXT = {
    "onnx": ("ONNX graphs", "ditforge build {} --out engines   and then: ditforge repo engines --out repo"),
    "engines": ("engines", "ditforge repo {} --out repo   and then: ditforge serve repo"),
    "repository": ("a model repository", "ditforge serve {}"),
}
# The suffixes of files with weights. Some of these formats are not supported; the code that opens them says so.
WEIGHTS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx", ".json")
MAKE_REPOSITORY = "ditforge repo ENGINE_DIR --out REPO_DIR   makes one of what ditforge build wrote"


def stage_of(path: Path) -> manifest.Kind | None:
    """The stage of ditforge that wrote the folder, or None if none did or its manifest cannot be read."""
    try:
        return manifest.read_any(path).kind
    except UserError:
        return None


def no_repository(path: Path) -> UserError:
    """The error for a path that is not a model repository: what it is instead, and the command that takes it."""
    if kind := stage_of(path):
        held, form = NEXT[kind]
        if kind != "repository":
            return UserError(f"{path} holds {held}, and not a model repository", command(form, path))
        return UserError(f"the model repository {path} has lost its models", MAKE_REPOSITORY)
    if (
        path.suffix in (".safetensors", ".sft", ".gguf")
        or (path / CHECKPOINT).is_file()
        or any(path.glob("*.safetensors"))
    ):
        return UserError(f"{path} is a checkpoint, and not a model repository", command("ditforge up {}", path))
    if (path / CONFIG).is_file():
        return UserError(f"{path} is one model of a model repository", command("ditforge serve {}", path.parent))
    if inside := next(iter(sorted(path.glob(f"*/*/{CONFIG}"))), None):
        repository = inside.parent.parent
        problem = f"{path} is not a model repository, but holds one, {repository.name}"
        return UserError(problem, command("ditforge serve {}", repository))
    state = f"holds no model (no MODEL/{CONFIG})" if path.is_dir() else "is not a folder"
    return UserError(f"the model repository {path} {state}", MAKE_REPOSITORY)


def check_checkpoint(path: Path) -> None:
    """Raise UserError if a path is not a checkpoint but the output of a stage of ditforge, or another file."""
    if kind := stage_of(path):
        held, form = NEXT[kind]
        raise UserError(f"{path} holds {held}, and not a checkpoint", command(form, path))
    if not path.exists() and path.suffix.lower() in WEIGHTS:
        raise UserError(f"{path} does not exist", command("ls {}   says what there is", path.parent))
    if path.is_file() and path.suffix.lower() not in WEIGHTS and not has_header(path):
        problem = f"{path} is not a checkpoint, which is a folder in diffusers' layout, or a .safetensors or .gguf file"
        raise UserError(problem, command("give one of these; ditforge inspect {}   says what is there", path.parent))


def has_header(file: Path) -> bool:
    """Whether a file begins like a GGUF file, or like a safetensors file: with the length of an object, and that."""
    with file.open("rb") as opened:
        start = opened.read(9)
    if start.startswith(b"GGUF"):
        return True
    return len(start) == 9 and int.from_bytes(start[:8], "little") <= file.stat().st_size and start[8:] == b"{"
