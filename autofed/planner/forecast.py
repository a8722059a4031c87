"""How much a private plan can be expected to learn: the ratio of its noise to the signal of its patients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from pydantic import Field

from autofed import algorithms, privacy
from autofed.files import Record
from autofed.planner.utility_model import total_noise_ratio
from autofed.plans import Plan, Positive
from autofed.privacy import guarantee
from autofed.privacy.dpsgd import DPSGD

Grade = Literal["sound", "strained", "hopeless"]

SOUND, STRAINED = 0.7, 2.0
"""A plan has that grade up to these values of `Forecast.total_ratio` (docs/decisions/0012)."""

EXPECTED_LEARNING: Mapping[Grade, str] = MappingProxyType(
    {"sound": "good", "strained": "limited", "hopeless": "hardly any"}
)
"""A grade in words that cannot be mistaken for the strength of the guarantee."""


class SiteForecast(Record):
    """One site: its patients (n), those expected in a step (q n), its noise multiplier, and the epsilon that it spends.

    `ratio` is the noise-to-signal ratio of a step: the length of the noise in its mean gradient over the bound C.
    """

    patients: Positive
    expected: float = Field(gt=0)
    noise_multiplier: float = Field(gt=0)
    epsilon: float = Field(ge=0)
    ratio: float = Field(gt=0)


class Forecast(Record):
    """The noise-to-signal ratios of a plan, and the grade that follows from them.

    `ratio` is that of a step after averaging over sites (of the worst one where each learns alone), `total_ratio` that
    of all steps together (`total_noise_ratio`).
    """

    grade: Grade
    ratio: float = Field(gt=0)
    total_ratio: float = Field(gt=0)
    sites: dict[str, SiteForecast]


def forecast(plan: Plan) -> Forecast | None:
    """The forecast for a plan; None where the mechanism does not bound single patients' gradients."""
    stated = plan.agreement.privacy
    if not stated.by_patient or stated.sampling_rate is None or stated.delta is None:
        return None
    sites = {site: _site(plan, site, patients) for site, patients in plan.agreement.patients.items()}
    ratios = {name: site.ratio for name, site in sites.items()}
    ratio = averaged_ratio(ratios, plan.agreement.site_weights) if averages_updates(plan) else max(ratios.values())
    total_ratio = total_noise_ratio(ratio, trained_parameters(plan), total_steps(plan))
    return Forecast(grade=grade(total_ratio), ratio=ratio, total_ratio=total_ratio, sites=sites)


def grade(total_ratio: float) -> Grade:
    """The grade of a training with this noise-to-signal ratio over all its steps."""
    return "sound" if total_ratio <= SOUND else "strained" if total_ratio <= STRAINED else "hopeless"


def step_ratio(noise_multiplier: float, parameters: int, expected: float) -> float:
    """Length of the noise in the mean gradient of a step over the bound C: z sqrt(d) / (q n)."""
    return noise_multiplier * math.sqrt(parameters) / expected


def averaged_ratio(ratios: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The ratio of the weighted mean over sites, whose noises are independent and whose signal is the same."""
    total = math.fsum(weights.values())
    return math.sqrt(math.fsum((weights[site] / total * ratio) ** 2 for site, ratio in ratios.items()))


def averages_updates(plan: Plan) -> bool:
    """Whether the sites' updates are averaged, and their noise with them."""
    return algorithms.stated(plan.agreement.algorithm.name).shares_weights()


def trained_parameters(plan: Plan) -> int:
    """The parameters that learn, and so get noise."""
    return plan.local.network.trained_parameters(plan.local.training.trained)


def total_steps(plan: Plan) -> int:
    """The steps of the site that takes most."""
    return plan.agreement.training.rounds * max(plan.steps_at(site) for site in plan.agreement.patients)


def _site(plan: Plan, site: str, patients: int) -> SiteForecast:
    mechanism = privacy.find_mechanism(plan, patients)
    assert isinstance(mechanism, DPSGD)  # or no single patient's gradient would be bounded
    return SiteForecast(
        patients=patients,
        expected=mechanism.expected,
        noise_multiplier=mechanism.noise_multiplier,
        epsilon=guarantee.training_epsilon(plan, plan.steps_at(site)),
        ratio=step_ratio(mechanism.gradient_noise, trained_parameters(plan), mechanism.expected),
    )
