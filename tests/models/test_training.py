"""What the training scripts share and only a GPU uses: compiled blocks, here without the code that inductor writes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import random_flux
import random_sd3
import torch
from diffusers import DiffusionPipeline
from torch._dynamo.utils import counters
from training import compile_blocks


@pytest.fixture
def counted() -> Iterator[dict[str, dict[str, int]]]:
    """What TorchDynamo counts in the meantime."""
    torch.compiler.reset()
    counters.clear()
    yield counters
    torch.compiler.reset()


def run(pipeline: DiffusionPipeline) -> torch.Tensor:
    """The transformer's output for what the pipeline gives it in its one step."""
    with torch.no_grad():
        return pipeline("a red circle", height=64, width=64, num_inference_steps=1, output_type="latent").images


@pytest.mark.parametrize(
    ("pipeline", "kinds"),
    [
        (random_flux.schnell, 3),  # of two streams, of one, and of one whose input is a slice
        (random_sd3.medium, 3),  # with two attentions, with one, and the last
    ],
)
def test_blocks_of_a_kind_are_compiled_once(pipeline, kinds: int, counted: dict[str, dict[str, int]]) -> None:
    made = pipeline()
    made.set_progress_bar_config(disable=True)
    made.transformer.eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.transformer.parameters():  # so that no block is the identity
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    torch.manual_seed(0)
    expected = run(made)
    assert counted["stats"]["unique_graphs"] == 0
    compile_blocks(made.transformer, "eager")
    torch.manual_seed(0)
    # The same operators on the same numbers, but for the rounding of sums: float32's, 6e-8, through some layers.
    torch.testing.assert_close(run(made), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert counted["stats"]["unique_graphs"] == kinds
    assert not counted["graph_break"]
