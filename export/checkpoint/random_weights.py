"""`--random-weights`: a model's real architecture with random weights, for people who have no checkpoint of it.

The weights are made when they are needed. The pictures of such a model are noise, but it shows sizes, times and memory,
and whether every stage works.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ditforge.errors import UserError
from ditforge.export.checkpoint import hub
from ditforge.export.checkpoint.diffusers_folder import INDEX, Checkpoint, open_checkpoint
from ditforge.export.checkpoint.weights import Weights
from ditforge.export.families import find_published, published_models
from ditforge.export.graph.tracing import dry_run
from ditforge.export.network import Network
from ditforge.temporary_folder import filled, temporary_folder

SEED = 0
DTYPE = torch.bfloat16  # the large checkpoints are published in this dtype
BLOCK = 2**24 - 3  # a prime number, so that the rows of a larger tensor do not repeat
DESCRIPTIONS = {".json", ".txt", ".model"}  # the suffixes of configurations and vocabularies
CLIP_ENDS = ("<|startoftext|>", "<|endoftext|>")  # have the largest ids, because CLIP takes the largest as a text's end
T5_SPECIAL = ("<pad>", "</s>", "<unk>")
T5_TOKENS = 512  # the authors' length of T5's input; used where the tokenizer, which would say it, is missing
BYTES = 256


@contextmanager
def random_checkpoint(folder: Path, seed: int = SEED) -> Iterator[Checkpoint]:
    """Open a model with random weights: one in a diffusers folder, or a published one by a name like `flux.1-dev`.

    Only its configurations and tokenizers are read. A missing tokenizer is made (see save_tokenizer). Raises UserError
    if there is neither such a folder nor a published model of this name.
    """
    source = folder if folder.is_dir() else find_published(str(folder))
    if source is None:
        names = ", ".join(published_models())
        raise UserError(f"{folder} is not a folder", f"give one in diffusers' layout, or a name: {names}")
    open_checkpoint(source)
    with temporary_folder() as temporary:
        copy = temporary / (hub.title(source) or source.resolve().name)
        with filled(temporary):
            for path in sorted(path for path in source.rglob("*") if path.is_file() and path.suffix in DESCRIPTIONS):
                target = copy / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            opened = open_checkpoint(copy)
            make_tokenizers(opened)
        yield replace(opened, seed=seed)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a digest of the seed and of the contents of the configurations and tokenizers."""
    paths = sorted(path for path in checkpoint.folder.rglob("*") if path.is_file())
    listed = [(str(path.relative_to(checkpoint.folder)), sha256(path.read_bytes()).hexdigest()) for path in paths]
    return sha256(repr((checkpoint.seed, listed)).encode()).hexdigest()


def random_weights(network: Network, checkpoint: Checkpoint) -> Weights:
    """Return random weights for all parameters of the network. Each tensor is made when it is read."""
    folder = checkpoint.folder / network.weights
    weights = Weights(folder, {}, {}, {})
    for (name, *_), shape in dry_run(network):
        weights.shards[name], weights.shapes[name] = folder, shape
        weights.reads[name] = partial(random_tensor, f"{network.weights}.{name}", shape, checkpoint.seed or SEED)
    return weights


def random_tensor(name: str, shape: tuple[int, ...], seed: int = SEED) -> torch.Tensor:
    """Make the tensor `name` of this shape, in bfloat16.

    Biases are 0 and the weights of norms are 1. Everything else is normally distributed with a standard deviation of
    1 / sqrt(fan-in). The same name, shape and seed always give the same tensor.

    Billions of normal numbers would take minutes to draw. So only one block of 17 million is drawn. A tensor is a piece
    of it that starts at a place given by the tensor's name; a larger tensor consists of several such pieces. Tensors
    therefore share numbers, at different places: matrices differ from each other, and each has the statistics of a
    random one, but they are not independent.
    """
    if len(shape) < 2:
        return torch.zeros(shape, dtype=DTYPE) if name.endswith("bias") else torch.ones(shape, dtype=DTYPE)
    digest = sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    block = normal_block(seed)
    tensor = torch.empty(shape, dtype=DTYPE)
    for piece in tensor.view(-1).split(BLOCK):  # type: ignore[no-untyped-call]
        start = int(torch.randint(BLOCK, (), generator=generator))
        until_end = min(len(piece), BLOCK - start)
        piece[:until_end] = block[start : start + until_end]
        piece[until_end:] = block[: len(piece) - until_end]
    fan_in = math.prod(shape[1:]) if shape[0] > 1 else shape[-1]  # [1, N, D] is a table of N vectors, not a matrix
    return tensor.mul_(fan_in**-0.5)


@cache
def normal_block(seed: int) -> torch.Tensor:
    """Return the BLOCK normal numbers in bfloat16 from which all tensors are made."""
    return torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


def make_tokenizers(checkpoint: Checkpoint) -> None:
    """Make the tokenizers that the model's index names and whose folders are missing."""
    index = checkpoint.config("", INDEX)
    clips = 0
    for component in sorted(name for name in index if name.startswith("tokenizer") and index[name]):
        name = component.replace("tokenizer", "text_encoder")
        kind = str((index.get(name) or [None])[-1])  # the encoder's class: a tokenizer can be of several classes
        clips += kind.startswith("CLIP")
        if kind.startswith(("CLIP", "T5")) and not (checkpoint.folder / component).is_dir():
            filler = "!" if clips == 2 else CLIP_ENDS[1]
            save_tokenizer(checkpoint.folder / component, kind, checkpoint.config(name), filler)


def save_tokenizer(folder: Path, kind: str, encoder: dict[str, Any], filler: str) -> None:
    """Write an untrained tokenizer, with one token for each byte, for a text encoder of the class `kind`.

    Its vocabulary is as large as the encoder's configuration `encoder` says; the entries beyond bytes and special
    tokens occur in no text. `filler` is CLIP's padding token ("!" for a model's second CLIP, as OpenCLIP has it).
    Raises UserError if the vocabulary is too small for the bytes and special tokens.
    """
    size = encoder.get("vocab_size")
    least = 2 * BYTES + len(CLIP_ENDS) if kind.startswith("CLIP") else BYTES + len(T5_SPECIAL) + 1
    if not isinstance(size, int) or size < least:
        problem = f"a tokenizer of bytes needs a vocabulary of {least}, the text encoder of {folder.name} has {size}"
        raise UserError(problem, f"copy the tokenizer's folder {folder.name} from the checkpoint")
    if kind.startswith("CLIP"):
        save_clip_tokenizer(folder, size, encoder.get("max_position_embeddings", 77), filler)
    else:
        save_t5_tokenizer(folder, size)


def save_clip_tokenizer(folder: Path, size: int, tokens: int, filler: str) -> None:
    """Write a tokenizer of CLIP's kind with `size` tokens, without merges, for prompts of `tokens` tokens."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    known = [*letters, *(f"{letter}</w>" for letter in letters)]
    unused = [f"<|unused_{number}|>" for number in range(size - len(known) - len(CLIP_ENDS))]
    vocabulary = {token: number for number, token in enumerate([*known, *unused, *CLIP_ENDS])}
    tokenizer = CLIPTokenizer(vocabulary, merges=[], model_max_length=tokens, pad_token=filler)
    tokenizer.save_pretrained(folder)


def save_t5_tokenizer(folder: Path, size: int) -> None:
    """Write a tokenizer of T5's kind with `size` tokens: a Unigram model that knows spaces and single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = [*T5_SPECIAL, "▁", *(f"<0x{byte:02X}>" for byte in range(BYTES))]
    pieces = [*known, *(f"<unused_{number}>" for number in range(size - len(known)))]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    pad, end, unknown = T5_SPECIAL
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, pad_token=pad, eos_token=end, unk_token=unknown, model_max_length=T5_TOKENS
    ).save_pretrained(folder)
