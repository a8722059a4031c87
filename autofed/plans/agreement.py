"""The part of a plan that all sites share and vet."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from autofed.data import site_name_problem
from autofed.data.labels import ClassOrder, Labels, Values, labels_problems
from autofed.files import Record
from autofed.plans.kinds import Positive, WirePrecision
from autofed.plans.privacy import Privacy


class AlgorithmSettings(Record):
    """How the sites learn together: the name of a file in autofed/algorithms and its hyper-parameters."""

    name: str = "fedavg"
    settings: dict[str, float | int | bool | str] = Field(default_factory=dict)


class AverageSettings(Record):
    """How the coordinator aggregates the sites' updates, and how far a malicious site can shift the result.

    "mean" is weighted by patients, and so is "norm-bound", for which updates are first clipped to at most `bound` times
    the median norm of all sites' updates. "median" and "trimmed-mean" count every site once, coordinate by coordinate,
    the latter without the share `trim` of the sites at either end. The `weights` of a mean are the sites' numbers of
    patients; the field has no other value any more, and stays so that a plan reads as it was written.
    """

    rule: Literal["mean", "median", "trimmed-mean", "norm-bound"] = "mean"
    weights: Literal["patients"] = "patients"
    trim: float = Field(0.2, gt=0, lt=0.5)
    bound: float = Field(1.0, ge=1)

    @field_validator("weights", mode="before")
    @classmethod
    def _by_patients(cls, weights: Any) -> Any:
        if weights == "noise":
            raise ValueError(
                'weights by noise gained nothing and are gone; write "patients", and train anew what was trained with '
                "the other"
            )
        return weights


class ServerSettings(Record):
    """The coordinator's step along the averaged update: as it is, with momentum, or Adam's."""

    optimiser: Literal["plain", "momentum", "adam"] = "plain"
    rate: float = Field(1.0, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    second_momentum: float = Field(0.99, ge=0, lt=1)
    epsilon: float = Field(1e-3, gt=0)


class FaultSettings(Record):
    """What happens when sites fail: a round counts with so many of them, and is tried so often.

    A site that has not responded within `deadline_minutes` is left out of the round; without it the coordinator waits.
    """

    least_sites: int = Field(1, ge=1)
    attempts: int = Field(3, ge=1)
    deadline_minutes: float | None = Field(None, gt=0)


class RoundSchedule(Record):
    """How often the sites meet, and what becomes of the common weights.

    `snapshots` are the rounds whose weights make the ensemble, fixed beforehand. Every `validate_every` rounds the
    sites score the model on the patients that they held out, if there are any; 0 is never. `ema` is the share of the
    old value in a moving average of the weights, round by round; with 0 the weights themselves are the model.
    `extended` are the lengths that the training had before it was given more rounds, each when it had come to its end.
    `steps_at` are the local steps in a round of sites that take fewer or more than `local.training.steps_per_round`.
    """

    rounds: int = Field(ge=1)
    snapshots: tuple[int, ...]
    validate_every: int = Field(1, ge=0)
    ema: float = Field(0.0, ge=0, lt=1)
    extended: tuple[Positive, ...] = ()
    steps_at: dict[str, Positive] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _within(self) -> Self:
        if not self.snapshots or any(not 1 <= s <= self.rounds for s in self.snapshots):
            raise ValueError(f"snapshots must be rounds between 1 and {self.rounds}, found {list(self.snapshots)}")
        if list(self._lengths) != sorted(set(self._lengths)):
            raise ValueError(f"each extension must make a training longer, found {list(self._lengths)}")
        return self

    @property
    def _lengths(self) -> tuple[int, ...]:
        return (*self.extended, self.rounds)

    def validates(self, round: int) -> bool:
        """Whether the model of a round is scored: every so many rounds, and at the end, also one that was passed."""
        return self.validate_every > 0 and (round % self.validate_every == 0 or round in self._lengths)

    def rate_at(self, rounds: float) -> float:
        """The learning rate after so many rounds, as a share of the first: (1 - t)^0.9 with t from 0 to 1 (nnU-Net).

        A training that was given more rounds when it had come to its end, and its rate to 0, climbs to the curve of the
        longer one over the first tenth of what is left, from a two-hundredth of it: the rate does not jump.
        """
        before = 0
        for length in self._lengths:
            if rounds < length or length == self.rounds:
                climbed = min(1.0, max(0.005, 10 * (rounds - before) / (length - before))) if before else 1.0
                return float(climbed * max(0.0, 1 - rounds / length) ** 0.9)
            before = length
        return 0.0


class Agreement(Record):
    """The part of the plan that all sites share and vet; its digest names the federation's contract.

    `wire` is the precision in which weights and updates travel. `annotated` names, for sites that never annotated some
    of the structures, those that they did.
    """

    channels: tuple[str, ...]
    labels: dict[str, Values]
    regions_class_order: ClassOrder = ()
    dimension: Literal[2, 3]
    patients: dict[str, Positive] = Field(min_length=1)
    algorithm: AlgorithmSettings
    training: RoundSchedule
    privacy: Privacy
    average: AverageSettings = Field(default_factory=AverageSettings)
    server: ServerSettings = Field(default_factory=ServerSettings)
    faults: FaultSettings = Field(default_factory=FaultSettings)
    wire: WirePrecision = "float32"
    annotated: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    public_images: tuple[str, ...] = ()

    @property
    def site_weights(self) -> dict[str, float]:
        """Each site's weight in an average: its number of patients, as the plan says it and never a message."""
        return {site: float(patients) for site, patients in self.patients.items()}

    @model_validator(mode="after")
    def _names_and_labels(self) -> Self:
        problems = [problem for site in self.patients if (problem := site_name_problem(site))]
        problems += labels_problems(self.labels, self.regions_class_order)
        if self.privacy.is_private and self.training.validate_every:
            problems.append("a private training chooses nothing by scores: write training.validate_every 0")
        problems += _site_problems(self)
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _site_problems(agreement: Agreement) -> list[str]:
    """Settings that name sites or structures which are not in the agreement, or more sites than there are."""
    sites, names = list(agreement.patients), Labels.of(agreement).names
    problems = [
        f"{field} names {site!r}, which is not among the sites {', '.join(sites)}"
        for field, entries in (("training.steps_at", agreement.training.steps_at), ("annotated", agreement.annotated))
        for site in entries
        if site not in sites
    ]
    problems += [
        f"annotated names {name!r} at {site}, which is no structure; the structures are {', '.join(names)}"
        for site, annotated in agreement.annotated.items()
        for name in annotated
        if name not in names
    ]
    problems += [
        f"annotated names nothing at {site}, which then teaches nothing; leave the site out of the plan"
        for site, annotated in agreement.annotated.items()
        if not annotated
    ]
    problems += [
        f"annotated says that no site annotated {name}; remove it from `labels`"
        for name in names
        if all(name not in agreement.annotated.get(site, names) for site in sites)
    ]
    if agreement.faults.least_sites > len(sites):
        least = agreement.faults.least_sites
        problems.append(f"faults.least_sites is {least}, but there are {len(sites)} sites; write {len(sites)} or less")
    return problems


def spaced_snapshots(rounds: Any, count: int = 3) -> list[int]:
    """The rounds whose weights make the ensemble: the last, and two before it, a tenth of the training apart.

    Snapshots of neighbouring rounds are nearly one model, and early ones are poor; so they are spaced, and late.
    """
    if not isinstance(rounds, int) or rounds < 1:
        return [rounds]
    gap = max(1, round(rounds / 10))
    return sorted({rounds - i * gap for i in range(count) if rounds - i * gap >= 1})
