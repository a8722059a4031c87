"""The part of a plan that all sites share and vet."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from autofed.case import site_name_problem
from autofed.files import Record
from autofed.labels import ClassOrder, Values, labels_problems
from autofed.plans.kinds import Positive


class Algorithm(Record):
    """How the sites learn together: the name of a file in autofed/algorithms and its hyper-parameters."""

    name: str = "fedavg"
    settings: dict[str, float | int | bool | str] = Field(default_factory=dict)


class Privacy(Record):
    """The mechanism that everything leaving a site passes, and its parameters (unit: one patient).

    `sampling_rate` q of patients per step, `patches_per_patient` K, `noise_multiplier` z, `clip` C; `epsilon` and
    `delta` are the promise. With the mechanism "none" nothing is promised and the parameters are None.
    """

    mechanism: str = "none"
    sampling_rate: float | None = Field(None, gt=0, le=1)
    patches_per_patient: int | None = Field(None, ge=1)
    noise_multiplier: float | None = Field(None, ge=0)
    clip: float | None = Field(None, gt=0)
    epsilon: float | None = Field(None, gt=0)
    delta: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _nothing_promised_by_none(self) -> Self:
        given = [f"{name} {value:g}" for name, value in self if name != "mechanism" and value is not None]
        if self.mechanism == "none" and given:
            raise ValueError(
                f'the mechanism "none" protects nothing, but {", ".join(given)} promises something; '
                "name a private mechanism, or leave these out"
            )
        return self


class Rounds(Record):
    """How often the sites meet; `snapshots` are the rounds whose weights make the ensemble, fixed beforehand."""

    rounds: int = Field(ge=1)
    snapshots: tuple[int, ...]

    @model_validator(mode="after")
    def _within(self) -> Self:
        if not self.snapshots or any(not 1 <= s <= self.rounds for s in self.snapshots):
            raise ValueError(f"snapshots must be rounds between 1 and {self.rounds}, found {list(self.snapshots)}")
        return self


class Agreement(Record):
    """The part of the plan that all sites share and vet; its digest names the federation's contract."""

    channels: tuple[str, ...]
    labels: dict[str, Values]
    regions_class_order: ClassOrder = ()
    dimension: Literal[2, 3]
    patients: dict[str, Positive] = Field(min_length=1)
    algorithm: Algorithm
    training: Rounds
    privacy: Privacy
    public_images: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _names_and_labels(self) -> Self:
        problems = [problem for site in self.patients if (problem := site_name_problem(site))]
        problems += labels_problems(self.labels, self.regions_class_order)
        if problems:
            raise ValueError("; ".join(problems))
        return self


def spaced_snapshots(rounds: Any, count: int = 3) -> list[int]:
    """The rounds whose weights make the ensemble: the last, and two before it, a tenth of the training apart.

    Snapshots of neighbouring rounds are nearly one model, and early ones are poor; so they are spaced, and late.
    """
    if not isinstance(rounds, int) or rounds < 1:
        return [rounds]
    gap = max(1, round(rounds / 10))
    return sorted({rounds - i * gap for i in range(count) if rounds - i * gap >= 1})
