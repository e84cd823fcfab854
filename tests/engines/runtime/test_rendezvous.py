"""What the engine process is given by whoever starts it."""

from __future__ import annotations

import pytest

from ditforge.engines.runtime.rendezvous import hidden, shown


@pytest.mark.parametrize("gpus", [{}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "1,0"}])
def test_gpus_that_were_hidden_are_there_again(gpus: dict[str, str]) -> None:
    environment = {"PATH": "/bin"} | gpus
    without = hidden(environment)
    assert without["CUDA_VISIBLE_DEVICES"] == ""
    assert shown(without) == environment
    assert shown(environment) == environment
