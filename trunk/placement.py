"""Where an engine is in memory, and when: made by the memory plan, kept in the manifest, obeyed when it is loaded."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

RESIDENT, ON_DEMAND, CPU = "resident", "on-demand", "cpu"


class Placement(BaseModel):
    """Where one network's engine is, and when.

    device: whose memory it takes, and who computes it: "gpu", which stands for what the engines are built for, or
        "cpu" beside a GPU.
    segments: into how many engines the network is cut, which run one after the other.
    on_demand: how many of these, the last ones, are loaded for each call and then freed. The others are resident.
    weight_budget: the bytes of weights that an engine keeps in the GPU's memory, where its compiler can stream the
        others from the machine's memory in each call. None: all of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Literal["gpu", "cpu"] = "gpu"
    segments: int = Field(default=1, ge=1)
    on_demand: int = Field(default=0, ge=0)
    weight_budget: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.on_demand > self.segments:
            raise ValueError(f"{self.on_demand} of {self.segments} segments cannot be loaded on demand")
        return self

    @property
    def residency(self) -> str:
        """In one word: resident, on-demand (part of it, at least), or cpu."""
        return CPU if self.device == "cpu" else ON_DEMAND if self.on_demand else RESIDENT
