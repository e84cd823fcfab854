"""What adapters make of FLUX's weights: ours, and what the tools that write the files make of the authors' layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import single_files
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ditforge.export.checkpoint.adapters.fusing import fuse
from ditforge.export.checkpoint.lazy_tensors import Lazy, open_tensors
from ditforge.export.checkpoint.load_report import LoadReport
from ditforge.export.families.flux_layout import LAYOUT


def lazily(module: nn.Module, folder: Path) -> dict[str, Lazy]:
    """The module's tensors in a file."""
    return stored(module.state_dict(), folder / "module.safetensors")


def stored(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> dict[str, Lazy]:
    """The tensors in that file."""
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, file, metadata)
    return open_tensors(file)


def authors_layer(dit: nn.Module, name: str) -> nn.Linear:
    """A linear of FLUX as its authors have it, such as `double_blocks.0.img_attn.qkv`."""
    written = single_files.flux_dit(dit.state_dict())
    weight = written[f"{name}.weight"]
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight.clone(), "bias": written[f"{name}.bias"].clone()})
    return layer


def merged(
    dit: nn.Module, files: list[tuple[Path, float]], folder: Path, report: LoadReport | None = None
) -> dict[str, Tensor]:
    """The DiT's tensors by diffusers' names, with the adapters."""
    fused = fuse({"transformer": lazily(dit, folder)}, files, LAYOUT, report)
    return {name: tensor.read() for name, tensor in fused["transformer"].items()}


def random_numbers(module: nn.Module, std: float = 0.3) -> None:
    """Fill all parameters that a tool starts with zeros, or with numbers that change nothing."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
