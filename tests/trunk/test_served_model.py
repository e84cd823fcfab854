"""What a server says of its model: a client of today with servers of other years, and the other way round."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ditforge.model import Model
from ditforge.served_model import CLIENT, ClientTooOld, read_served_model, write_served_model

# What the first version wrote. Nobody may change it: servers that say this are to be served by all later clients.
FIRST = """
{"name": "sd35-tiny", "latent_channels": 16, "vae_factor": 8, "size_multiple": 16, "default_size": 128,
 "max_size": 512, "min_size": 1, "sizes": [[64, 128]], "default_steps": 20, "guidance": "classifier-free",
 "default_guidance": 3.5, "skip_layers": {"blocks": 6, "layers": [1, 2], "scale": 2.8, "start": 0.01, "stop": 0.2},
 "schedule": {"kind": "fixed", "shift": 3.0, "sigma_min": 0.001, "time_shift": "exponential", "base_tokens": 256,
              "max_tokens": 4096, "base_shift": 0.5, "max_shift": 1.15, "patch_size": 2},
 "max_tokens": {"clip_l": 77, "clip_g": 77, "t5": 64}, "t5": "optional", "vae_tile": null}
"""
# What the first client needs: a server of later years says this much, or raises minimum_client.
NEEDED = {"name", "latent_channels", "vae_factor", "size_multiple", "default_size", "max_size", "default_steps"}
NEEDED |= {"guidance", "default_guidance", "schedule", "max_tokens"}


def test_the_first_description_is_read_for_ever() -> None:
    model = read_served_model(FIRST)
    assert (model.name, model.sizes, model.t5) == ("sd35-tiny", ((64, 128),), "optional")
    assert model.skip_layers and model.skip_layers.layers == (1, 2)
    assert model.schedule.sigma_min == 0.001


def test_what_is_written_is_read_back() -> None:
    model = read_served_model(FIRST)
    assert read_served_model(write_served_model(model)) == model


def test_the_first_client_reads_what_is_written_now() -> None:
    """It knew the fields of FIRST alone, and asked for those that are NEEDED."""
    said = json.loads(write_served_model(read_served_model(FIRST)))
    assert said["minimum_client"] == 1
    assert said.keys() >= NEEDED
    required = {name for name, field in Model.model_fields.items() if field.is_required()}
    assert required <= NEEDED, "a new field needs a default: servers of last year do not send it"


@pytest.mark.parametrize("place", [(), ("schedule",), ("skip_layers",)])
def test_fields_of_next_year_are_left_out(place: tuple[str, ...]) -> None:
    said = inner = json.loads(FIRST)
    for name in place:
        inner = inner[name]
    inner["of_next_year"] = {"nested": [1]}
    assert read_served_model(json.dumps(said)) == read_served_model(FIRST)


def test_a_description_that_asks_for_more_than_this_client() -> None:
    said = {**json.loads(FIRST), "guidance": "of next year", "minimum_client": CLIENT + 1, "written_by": "9.0"}
    with pytest.raises(ClientTooOld, match=r"level 2, written by ditforge 9.0, and this client has level 1"):
        read_served_model(json.dumps(said))


@pytest.mark.parametrize("said", ["[]", "{", "null", '{"name": 1}', json.dumps({"minimum_client": "x"})])
def test_what_is_no_description(said: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of the kinds that there are, each says what is wrong
        read_served_model(said)
