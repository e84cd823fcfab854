"""What adapters make of FLUX's weights: ours, and what the tools that write the files make of the authors' layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import single_files
import torch
from lycoris.modules.full import FullModule
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from ditforge.export.checkpoint.adapters.fusing import fuse
from ditforge.export.checkpoint.lazy_tensors import Lazy, open_tensors
from ditforge.export.checkpoint.load_report import LoadReport
from ditforge.export.families.flux_layout import LAYOUT

# Fused layers, one with its halves turned round in diffusers, and one that is the same in both layouts.
LAYERS = ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1", "final_layer.adaLN_modulation.1", "img_in")


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


def written_by_lycoris(module: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter of a layer as LyCORIS saves it."""
    if isinstance(module, FullModule):
        return {f"{name}.diff": module.weight, f"{name}.diff_b": module.bias}
    state = getattr(module, "custom_state_dict", module.state_dict)() or module.state_dict()
    return {f"{name}.{key}": tensor for key, tensor in state.items()}


@torch.no_grad()
def effective(module: nn.Module, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias that a linear has with its adapter, from its outputs for unit vectors and zeros.

    LyCORIS 4.1.3 multiplies by alpha / rank twice where it merges LoHa and LoKr, and once where it trains them.
    """
    inputs = torch.cat((torch.zeros(1, layer.in_features), torch.eye(layer.in_features)))
    bias, *columns = module.eval()(inputs)
    return torch.stack(columns, dim=1) - bias[:, None], bias


def check_against_lycoris(
    dit: nn.Module,
    make: Callable[[nn.Module], nn.Module],
    folder: Path,
    strength: float = 1.0,
    layers: Sequence[str] = LAYERS,
    std: float = 0.3,
) -> None:
    """Our weights of the authors' layers are those that LyCORIS computes with, and all others are as they were."""
    tensors, expected = {}, {}
    for number, name in enumerate(layers):
        layer = authors_layer(dit, name)
        adapter = make(layer)
        random_numbers(adapter, std)
        prefixed = f"lycoris_{name.replace('.', '_')}" if number % 2 else f"diffusion_model.{name}"
        tensors |= written_by_lycoris(adapter, prefixed)
        adapter.multiplier = strength
        weight, bias = effective(adapter, layer)
        expected |= {f"{name}.weight": weight} | ({f"{name}.bias": bias} if isinstance(adapter, FullModule) else {})
    stored(tensors, folder / "a.safetensors")
    state = single_files.flux_dit(merged(dit, [(folder / "a.safetensors", strength)], folder))
    for name, before in single_files.flux_dit(dit.state_dict()).items():
        if name not in expected:
            assert torch.equal(state[name], before), name
            continue
        assert not torch.allclose(state[name], before, atol=1e-3)
        torch.testing.assert_close(state[name], expected[name], rtol=1e-4, atol=1e-4)


def saved_by_peft(dit: nn.Module, config: PeftConfig, folder: Path, std: float = 0.3) -> dict[str, Tensor]:
    """Make a random adapter, save it as PEFT does, and return the DiT's tensors as PEFT reads and merges it.

    Reading matters: PEFT writes patterns in the order of the alphabet, and the first one that matches wins.
    """
    clean = deepcopy(dit)
    model = get_peft_model(dit, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    model.save_pretrained(folder)
    model = PeftModel.from_pretrained(clean, folder)
    return {name: tensor.detach().clone() for name, tensor in model.merge_and_unload().state_dict().items()}


def check_against_peft(config: PeftConfig, folder: Path, make: Callable[[], nn.Module], std: float = 0.3) -> None:
    """PEFT's folder gives the weights that PEFT merges. `make` makes the DiT, which PEFT changes in place."""
    theirs = saved_by_peft(make(), config, folder / "peft", std)
    dit = make()
    ours = merged(dit, [(folder / "peft" / "adapter_model.safetensors", 1.0)], folder)
    assert ours.keys() == theirs.keys()
    assert sum(not torch.equal(tensor, dit.state_dict()[name]) for name, tensor in ours.items()) > 2
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-4)
