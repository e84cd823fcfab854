"""The names of T5's tensors in GGUF files of llama.cpp, and the shapes that its tools do not keep."""

from __future__ import annotations

import re
from dataclasses import replace

from ditforge.export.checkpoint.gguf_file import GgufFile
from ditforge.export.checkpoint.lazy_tensors import Lazy
from ditforge.export.checkpoint.load_report import LoadReport, shown

ENCODERS = ("t5", "t5encoder")  # what general.architecture says of T5, with and without its decoder
# llama.cpp's names (gguf: MODEL_ARCH.T5ENCODER) → those of transformers.
BLOCK = re.compile(r"enc\.blk\.(\d+)\.(\w+)\.weight")
IN_BLOCK = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_norm": "layer.0.layer_norm",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
OTHERS = {"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"}


def as_in_transformers(contents: GgufFile, report: LoadReport) -> dict[str, Lazy]:
    """Return T5's tensors by transformers' names. What is not of the encoder is added to `report`."""
    found, left = dict[str, Lazy](), []
    for name, tensor in contents.tensors.items():
        match = BLOCK.fullmatch(name)
        if name in OTHERS:
            found[OTHERS[name]] = tensor
        elif match and match[2] in IN_BLOCK:
            found[f"encoder.block.{match[1]}.{IN_BLOCK[match[2]]}.weight"] = tensor
        elif name.startswith("dec.") or name == "output.weight":
            left.append(name)
        else:
            found[name] = tensor
    if left:
        report.add(shown(left), "T5's decoder, of which no picture is made", expected=True)
    return found


def restored(name: str, tensor: Lazy) -> Lazy:
    """Return the tensor with the first dimension, of 1, that llama.cpp's tools drop: that of the table of positions."""
    if name.rpartition(".")[2] != "pos_embed" or len(tensor.shape) != 2:
        return tensor
    return replace(tensor, shape=(1, *tensor.shape), read_rows=lambda start, stop: tensor.read()[None][start:stop])
