"""Text encoders learn to read captions before anything is painted, as FLUX.1's came pretrained.

The mean of an encoder's states must tell all that the caption says: what each of the two objects is, their relation
and the background. A transformer conditioned on such states need not learn English through noise.
"""

import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Scene, caption, training_scenes
from torch import nn
from training import Budget, optimise

from examples import Ids, Tokenize

# The possible answers to each question, None where the caption leaves it open.
ANSWERS: list[list[str | None]] = [
    [None, *COLOURS],
    [None, *SHAPES],
    [None, *SIZES],
    [None, *COLOURS],
    [None, *SHAPES],
    [None, *SIZES],
    [None, *RELATIONS],
    [None, *BACKGROUNDS],
]

Encode = Callable[[Ids], Sequence[torch.Tensor]]


def facts(scene: Scene) -> list[int]:
    """The index of the right answer to each of ANSWERS' questions."""
    answers: list[str | None] = []
    for thing in [*scene.things, None, None][:2]:
        answers += [thing.colour, thing.shape, thing.size] if thing else [None] * 3
    answers += [scene.relation, scene.background]
    return [choices.index(answer) for choices, answer in zip(ANSWERS, answers, strict=True)]


def train_reading(
    encoders: Sequence[nn.Module], tokenize: Tokenize, encode: Encode, budget: Budget, seed: int, device: torch.device
) -> float:
    """Trains the encoders in place; returns the share of fresh captions that every encoder reads without a fault.

    `encode` gives states [B, states, width] of each encoder.
    The answers are read off by a linear layer for each encoder, which is thrown away afterwards.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"reading {seed}")
    scenes = training_scenes(budget.pictures + 2048, seed)
    captions = [caption(scene, rng) for scene in scenes]
    ids = tokenize(captions)
    right = torch.tensor([facts(scene) for scene in scenes], device=device)
    sizes = [len(choices) for choices in ANSWERS]
    with torch.no_grad():
        widths = [states.shape[-1] for states in encode(tuple(part[:1] for part in ids))]
    heads = nn.ModuleList(nn.Linear(width, sum(sizes)) for width in widths).to(device)

    def read(rows: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        states = encode(tuple(part[rows] for part in ids))
        return [head(state.float().mean(1)).split(sizes, -1) for head, state in zip(heads, states, strict=True)]

    def loss(kind: None) -> torch.Tensor:
        rows = torch.randint(budget.pictures, (budget.batch,), device=device)
        total = torch.zeros((), device=device)
        for answers in read(rows):
            for question, logits in enumerate(answers):
                total = total + F.cross_entropy(logits, right[rows, question])
        return total

    optimise([(module, 1e-3) for module in (*encoders, heads)], loss, budget.steps, "reading", lambda: None)
    with torch.no_grad():
        rows = torch.arange(budget.pictures, len(scenes), device=device)
        faultless = torch.ones(len(rows), dtype=torch.bool, device=device)
        for answers in read(rows):
            for question, logits in enumerate(answers):
                faultless &= logits.argmax(-1) == right[rows, question]
    return faultless.float().mean().item()
