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


class Extension(Record):
    """A training that was planned for `planned` rounds was given more of them after round `at`."""

    at: int = Field(ge=0)
    planned: int = Field(ge=1)


class Rounds(Record):
    """How often the sites meet, and what becomes of the common weights.

    `snapshots` are the rounds whose weights make the ensemble, fixed beforehand. Every `validate_every` rounds the
    sites score the model on the patients that they held out, if there are any; 0 is never. `ema` is the share of the
    old value in a moving average of the weights, round by round; with 0 the weights themselves are the model.
    """

    rounds: int = Field(ge=1)
    snapshots: tuple[int, ...]
    validate_every: int = Field(1, ge=0)
    ema: float = Field(0.0, ge=0, lt=1)
    extensions: tuple[Extension, ...] = ()

    @model_validator(mode="after")
    def _within(self) -> Self:
        if not self.snapshots or any(not 1 <= s <= self.rounds for s in self.snapshots):
            raise ValueError(f"snapshots must be rounds between 1 and {self.rounds}, found {list(self.snapshots)}")
        lengths = [*(e.planned for e in self.extensions), self.rounds]
        if lengths != sorted(set(lengths)) or any(e.at > e.planned for e in self.extensions):
            raise ValueError("extensions must make a training longer each time, and begin within its rounds")
        return self

    def validates(self, round: int) -> bool:
        """Whether the model of a round is scored: every so many rounds, and at the end."""
        return self.validate_every > 0 and (round % self.validate_every == 0 or round == self.rounds)

    def rate_at(self, rounds: float) -> float:
        """The learning rate after so many rounds, as a share of the first: (1 - t)^0.9 with t from 0 to 1 (nnU-Net).

        Where a training was given more rounds the rate does not jump: over the first tenth of what is left it goes over
        from where it was to the curve of the longer training.
        """
        rate = _poly(rounds, self._planned(0))
        for number, extension in enumerate(self.extensions):
            if rounds <= extension.at:
                return rate
            before = self._before(number).rate_at(extension.at)
            longer = self._planned(number + 1)
            share = min(1.0, 10 * (rounds - extension.at) / (longer - extension.at))
            rate = (1 - share) * before + share * _poly(rounds, longer)
        return rate

    def _planned(self, number: int) -> int:
        """The rounds that were planned after so many extensions."""
        return self.extensions[number].planned if number < len(self.extensions) else self.rounds

    def _before(self, number: int) -> Rounds:
        """The training as it was before an extension."""
        rounds = self.extensions[number].planned
        return self.model_copy(update={"rounds": rounds, "extensions": self.extensions[:number]})


def _poly(done: float, rounds: int) -> float:
    return max(0.0, 1 - done / rounds) ** 0.9


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
        if self.privacy.mechanism != "none" and self.training.validate_every:
            problems.append("a private training chooses nothing by scores: write training.validate_every 0")
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
