"""Whether ONNX Runtime can use the GPU of this machine, and what to do if not."""

from __future__ import annotations

from pathlib import Path

from ditforge import install_hint
from ditforge.errors import UserError
from ditforge.local_gpu import why_not_here
from ditforge.option import command

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
PROBE = (  # an ONNX model of one operator: y is x
    b'\x08\x08:9\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01pZ\x10\n\x01x\x12\x0b\n\t\x08\x01\x12\x05\n\x03\x12\x01nb\x10'
    b"\n\x01y\x12\x0b\n\t\x08\x01\x12\x05\n\x03\x12\x01nB\x04\n\x00\x10\r"
)


def check_here(graph: Path, compiler: str, target: str) -> None:
    """Raise UserError, with the command that helps, if the engine is for another GPU, or the CUDA provider is missing.

    The version that compiled it does not matter: what it wrote is a graph, which other versions read.
    """
    rebuild = command("ditforge build ONNX_DIR --gpu local --compiler {} --out DIR   and then ditforge repo", compiler)
    if why := why_not_here([target]):
        raise UserError(f"engines like {graph} do not run here: {why}", f"a machine with {target}; or {rebuild}")
    if why := why_no_provider():
        raise UserError(why, replacing())


def why_no_provider() -> str:
    """The reason why this ONNX Runtime cannot use a GPU; empty if its package has the CUDA provider."""
    import onnxruntime as ort

    if CUDA in ort.get_available_providers():
        return ""
    return f"the ONNX Runtime that is installed ({ort.__version__}) is the one for CPUs: it has no CUDA provider"


def replacing() -> str:
    """The command that puts ONNX Runtime for GPUs in the place of the one for CPUs, which has the same module."""
    pip = install_hint.pip()
    return f"{pip} uninstall onnxruntime onnxruntime-gpu, then {install_hint.install('onnxruntime-gpu')}"


def check_provider(said: str) -> None:
    """Raise UserError if ONNX Runtime cannot use its CUDA provider: it would execute on the CPU, after one warning.

    `said` is what was printed when CUDA's libraries were looked for.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        if ort.InferenceSession(PROBE, options, providers=[CUDA, CPU], enable_fallback=0).get_providers()[0] == CUDA:
            return
    except Exception as error:  # ONNX Runtime's errors have no common class
        said = str(error)
        said = said[max(said.find("CUDA failure"), 0) :]
    why = f": {' '.join(said.split())[:300]}" if said else ""
    raise UserError(
        f"ONNX Runtime {ort.__version__} cannot use its CUDA provider{why}",
        f"{install_hint.install('onnxruntime-gpu')}   (it brings CUDA's libraries, which need a recent driver)",
    )
