"""Where an engine is in memory, and when. The memory plan decides it, the manifest keeps it, and loading follows it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

RESIDENT, ON_DEMAND, STREAMED, CPU = "resident", "on-demand", "streamed", "cpu"


class Placement(BaseModel):
    """Where the engine of one network is in memory, and when.

    device: the device that computes it and has its memory: "gpu", which stands for whatever the engines are built for,
        or "cpu" beside a GPU.
    segments: the number of engines into which the network is cut. They run one after the other.
    on_demand: how many of these, counted from the end, are loaded for each call and then freed. Others are resident.
    slots: how many of the segments that are loaded on demand have room at a time. With 2, the next one is loaded while
        one computes; or all of them are loaded once, and stream their weights through that room, if they can.
    weight_budget: the bytes of weights that an engine keeps in the GPU's memory, if its compiler can stream the others
        from the machine's memory in each call. None stands for all of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Literal["gpu", "cpu"] = "gpu"
    segments: int = Field(default=1, ge=1)
    on_demand: int = Field(default=0, ge=0)
    slots: int = Field(default=1, ge=1, le=2)
    weight_budget: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.on_demand > self.segments:
            raise ValueError(f"{self.on_demand} of {self.segments} segments cannot be loaded on demand")
        return self

    @property
    def residency(self) -> str:
        """The placement in one word: resident, on-demand (if any segment is), streamed, or cpu."""
        if self.device == "cpu":
            return CPU
        return ON_DEMAND if self.on_demand else RESIDENT if self.weight_budget is None else STREAMED
