"""The privacy mechanism that protects everything leaving a site, as numbers: what it needs, and no other field."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from autofed.files import Record

NONE = "none"

_STEPS = ("sampling_rate", "patches_per_patient", "clip", "clipping", "noise_multiplier")
_NEEDS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    NONE: (),
    "dp-sgd": _STEPS,
    "adp": (*_STEPS, "quantile", "quantile_share", "clip_rate", "noise_ratio"),
    "feddp": ("clip", "noise_multiplier"),
})  # fmt: skip
GUARANTEE_FIELDS = ("epsilon", "delta", "score_noise", "census_noise")
"""Fields that any private mechanism may have."""

BY_PATIENT = ("dp-sgd", "adp")
"""The mechanisms that take every step from single patients' gradients."""

_DEFAULTS: Mapping[str, Any] = MappingProxyType({
    "sampling_rate": 0.2, "patches_per_patient": 2, "clip": 1.0, "clipping": "normalised", "noise_multiplier": 1.0,
    "quantile": 0.5, "quantile_share": 0.05, "clip_rate": 0.5, "noise_ratio": 1.0,
})  # fmt: skip


def default(mechanism: str, field: str) -> Any:
    """What a mechanism that was named by hand begins with; a clip that follows norms is not normalised away."""
    return "flat" if (mechanism, field) == ("adp", "clipping") else _DEFAULTS[field]


def mechanisms() -> tuple[str, ...]:
    """The names of the mechanisms that there are."""
    return tuple(_NEEDS)


def needs(mechanism: str) -> tuple[str, ...]:
    """The fields that a mechanism cannot do without; none of one that does not exist."""
    return _NEEDS.get(mechanism, ())


class Privacy(Record):
    """The mechanism that everything leaving a site passes, and its parameters (unit: one patient).

    "dp-sgd" and "adp" draw every patient of a site with probability `sampling_rate` (q) for a step, take
    `patches_per_patient` (K) patches of each for one gradient, bound its length by `clip` (C) and add noise of
    `noise_multiplier` (z) times C. `clipping` is "flat" (what is shorter stays as it is) or "normalised" (every
    gradient gets nearly the length C). "adp" has the clip follow the `quantile` of the patients' gradient norms: in a
    round by exp of `clip_rate` times how far it is off, for `quantile_share` of what a step spends. Its noise in the
    last round is `noise_ratio` times that of the first, in equal factors between. "feddp" adds noise of z times C to a
    whole round's update, bounded by C.

    `epsilon` and `delta` are the privacy guarantee. With `score_noise` the sites release the scores of their held-out
    patients in the end, with noise of that multiplier; without it scores stay at the sites. `census_noise` is the noise
    multiplier of the private fingerprints that the plan is based on, if it is: the guarantee covers them too. With the
    mechanism "none" there is no guarantee and all others are None. `noise_response` means nothing any more: it stays
    None, or the 0 of a plan that was written before, whose digest then stays as well.
    """

    mechanism: str = NONE
    sampling_rate: float | None = Field(None, gt=0, le=1)
    patches_per_patient: int | None = Field(None, ge=1)
    clip: float | None = Field(None, gt=0)
    clipping: Literal["flat", "normalised"] | None = None
    noise_multiplier: float | None = Field(None, gt=0)
    quantile: float | None = Field(None, gt=0, lt=1)
    quantile_share: float | None = Field(None, gt=0, lt=1)
    clip_rate: float | None = Field(None, ge=0)
    noise_ratio: float | None = Field(None, gt=0)
    noise_response: float | None = None
    score_noise: float | None = Field(None, gt=0)
    census_noise: float | None = Field(None, gt=0)
    epsilon: float | None = Field(None, gt=0)
    delta: float | None = Field(None, gt=0, lt=1)

    @field_validator("noise_response")
    @classmethod
    def _retired(cls, value: float | None) -> float | None:
        if value:
            raise ValueError(f"found {value:g}, but noise that responds to the clip was removed, since no training won "
                             "by it; leave it out")  # fmt: skip
        return value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        fields = [name for name, value in self if name != "mechanism" and value is not None]
        spending = [name for name in fields if name != "census_noise"]
        if self.mechanism == NONE and spending:
            listed = ", ".join(f"{name} {getattr(self, name)}" for name in spending)
            raise ValueError(f'the mechanism "none" protects nothing, but {listed} promises something; '
                             "name a private mechanism, or leave these out")  # fmt: skip
        if self.mechanism not in _NEEDS or self.mechanism == NONE:
            return self  # `privacy.find` says which there are
        missing = [name for name in needs(self.mechanism) if name not in fields]
        foreign = [name for name in fields if name not in (*needs(self.mechanism), *GUARANTEE_FIELDS, "noise_response")]
        problems = [f"the mechanism {self.mechanism!r} needs {', '.join(missing)}"] if missing else []
        problems += [f"the mechanism {self.mechanism!r} has no {', '.join(foreign)}; leave it out"] if foreign else []
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def is_private(self) -> bool:
        """Whether there is a mechanism that protects anything."""
        return self.mechanism != NONE

    @property
    def by_patient(self) -> bool:
        """Whether every step is made of single patients' gradients."""
        return self.mechanism in BY_PATIENT
