"""What a plan may cost, and how fast the machines are that it is made for."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from autofed.files import Record
from autofed.plans.kinds import Configuration, Device, Precision, PresetName, Shape
from autofed.plans.network import Network


class Speed(Record):
    """How fast a device trains: what a step costs by itself and for each unit of its work, and in which precision.

    Measured (`autofed.training.speed`), and recorded so that the same plan can be made again on another machine.
    Elements are those of all convolutions' outputs, operations those of forward and backward pass, voxels those of the
    patches that are augmented, all channels counted.
    """

    device: Device = "cpu"
    precision: Precision = "float32"
    seconds_per_step: float = Field(ge=0)
    seconds_per_gigaelement: float = Field(ge=0)
    seconds_per_teraflop: float = Field(ge=0)
    seconds_per_megavoxel: float = Field(ge=0)

    @model_validator(mode="after")
    def _not_free(self) -> Self:
        if self.seconds_per_step + self.seconds_per_gigaelement + self.seconds_per_teraflop <= 0:
            raise ValueError("a step costs nothing at this speed; expected one of its costs to be above 0")
        return self

    def seconds(self, network: Network, patch: Shape, batch: int) -> float:
        """Seconds of one training step. Data loading is added although it overlaps: it takes a CPU's cores too."""
        gigaelements, teraflops = network.work(patch, batch)
        megavoxels = batch * network.in_channels * math.prod(patch) / 1e6
        return (
            self.seconds_per_step
            + self.seconds_per_gigaelement * gigaelements
            + self.seconds_per_teraflop * teraflops
            + self.seconds_per_megavoxel * megavoxels
        )


class Budget(Record):
    """What the plan may cost (memory, hours, privacy) and what was asked for: preset and configuration.

    `speed` is that of this machine, `site_speeds` those that sites measured on their own. `hours` is the time that the
    training takes from start to end: sites with a speed of their own work at the same time, all others one after the
    other on this machine. All speeds are recorded, so that the same plan can be made again anywhere.
    """

    memory_gb: float = Field(8.0, gt=0, le=1e6)
    hours: float | None = Field(None, gt=0, le=1e6)
    device: Device = "cpu"
    speed: Speed | None = None
    site_speeds: dict[str, Speed] = Field(default_factory=dict)
    preset: PresetName = "plain"
    configuration: Configuration | Literal["auto"] = "auto"
    epsilon: float | None = Field(None, gt=0)
    delta: float | None = Field(None, gt=0, lt=1)

    @property
    def precision(self) -> Precision:
        """The precision that was faster on every machine."""
        speeds = [*self.site_speeds.values(), *([self.speed] if self.speed else [])]
        return "bfloat16" if speeds and all(s.precision == "bfloat16" for s in speeds) else "float32"

    @property
    def devices(self) -> tuple[Device, ...]:
        """What trains: the kinds of device of all machines whose speed is known, or the one asked for."""
        speeds = [*self.site_speeds.values(), *([self.speed] if self.speed else [])]
        return tuple(sorted({s.device for s in speeds})) or (self.device,)

    def is_measured(self, sites: Collection[str]) -> bool:
        """Whether the speed is known of every machine that trains one of the sites."""
        return self.speed is not None or set(sites) <= set(self.site_speeds)

    def seconds_per_step(
        self,
        network: Network,
        patch: Shape,
        batch: int,
        passes: Mapping[str, float],
    ) -> float:
        """Seconds until every site has taken one step: the slowest site counts.

        A step is as many passes over `batch` patches as `passes` says of each site: one, or one for each patient under
        privacy, and more where public images are trained on, too.
        """
        here = sum(count for site, count in passes.items() if site not in self.site_speeds)
        remote = [
            count * self.site_speeds[site].seconds(network, patch, batch)
            for site, count in passes.items()
            if site in self.site_speeds
        ]
        return max([*remote, *([here * self.speed.seconds(network, patch, batch)] if here and self.speed else [])])
