"""The search for a private plan: grid, width, patches of a patient, sampling rate and steps, chosen together.

Candidates are (grid, width, K, q); each takes as many steps T as the hours allow, with the noise that those need. The
candidate of the least `predicted_loss` is taken. During the search a limit theorem estimates the noise; the accountant
decides between the best few, and its noise is what the plan has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace

from autofed.planner.algorithm import passes_per_step
from autofed.planner.coarser_grids import GridCandidate
from autofed.planner.forecast import averaged_ratio, averages_updates, step_ratio
from autofed.planner.hours import USEFUL_SHARE
from autofed.planner.schedules import rounds_and_steps
from autofed.planner.topology import memory_needed
from autofed.planner.utility_model import predicted_loss, total_noise_ratio
from autofed.plans import Network, Plan
from autofed.privacy import accounting
from autofed.privacy.dpsgd import DPSGD
from autofed.privacy.guarantee import Guarantee

WIDTHS = (4, 8, 16, 32)
"""Features of the first stage that are tried; no wider than nnU-Net's."""

PATCHES = (1, 2, 4, 8)
"""Patches of a patient for one gradient (K)."""

RATES = (0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
"""Sampling rates (q): above a half, sampling hardly lowers the noise."""

LEAST_EXPECTED = 1.0
"""Patients of every site expected in a step; with fewer, most of its steps are noise alone."""

MOST_STEPS = 8000
"""More private steps than this are not planned, however many hours there are."""

SECONDS_A_NORMAL = 2.6e-8
"""To draw one normal number in float64 and add it (tests/benchmarks/private_step.py, 19 million parameters)."""

_SLOPE_FACTOR = 1.01
"""The accountant's slope is taken between two noise multipliers of this ratio."""

_CALIBRATED = 3
"""So many of the best candidates are compared by the accountant."""


@dataclass(frozen=True)
class CandidateConfiguration:
    """What a site may train: a grid and a network on it, K patches in a pass, and the seconds of a step.

    `trained_parameters` counts the parameters that learn, and so get noise. `seconds` are those of a step in which
    every site takes one pass for each of its patients, and what its algorithm adds; `noise_seconds` those of its noise.
    """

    grid: GridCandidate
    width: int
    patches: int
    network: Network
    trained_parameters: int
    seconds: float
    noise_seconds: float


def candidate_configurations(plan: Plan, grids: Iterable[GridCandidate]) -> Iterator[CandidateConfiguration]:
    """All that fit the memory of a plan, with what a step costs its algorithm on the machines of its budget."""
    budget, patients = plan.budget, plan.agreement.patients
    local_sites = sum(site not in budget.site_speeds for site in patients)
    passes = passes_per_step(plan.agreement.algorithm, patients, budget, private=True)
    all_patients = {site: passes[site] * count for site, count in patients.items()}
    is_measured = budget.is_measured(patients)
    for grid in grids:
        for width in WIDTHS if grid.fixed_network is None else grid.fixed_network.features[:1]:
            network, patch = grid.network(width), grid.topology.patch
            trained = network.trained_parameters(grid.trained)
            noise_seconds = SECONDS_A_NORMAL * trained * max(1, local_sites)
            for patches in PATCHES:
                if memory_needed(network, patch, patches, grid.task.preset) <= budget.memory_gb:
                    seconds = (
                        budget.seconds_per_step(network, patch, patches, all_patients) if is_measured else math.nan
                    )
                    yield CandidateConfiguration(grid, width, patches, network, trained, seconds, noise_seconds)


@dataclass(frozen=True)
class Candidate:
    """A configuration with q, T and noise multiplier z; `ratio` is the noise-to-signal ratio of an averaged step."""

    configuration: CandidateConfiguration
    sampling_rate: float
    steps: int
    noise_multiplier: float
    ratio: float = 0.0

    @property
    def mechanism(self) -> DPSGD:
        """The privacy mechanism of its training, and what that spends."""
        patches = self.configuration.patches
        return DPSGD(0, self.sampling_rate, patches, 1.0, self.noise_multiplier, normalised=True)

    @property
    def schedule(self) -> tuple[int, int]:
        """The rounds, and the steps of every site in one: a few of the T steps may be left over."""
        return rounds_and_steps(self.steps)

    @property
    def scheduled_steps(self) -> int:
        """The steps that the schedule has."""
        return math.prod(self.schedule)

    def noise_for(self, loss: float) -> float:
        """The noise multiplier at which the predicted loss is `loss`; not above 0 if no noise reaches it."""
        loss_without_noise = replace(self, ratio=0.0).predicted_loss
        return self.noise_multiplier * (loss - loss_without_noise) / (self.predicted_loss - loss_without_noise)

    @property
    def total_ratio(self) -> float:
        """The noise-to-signal ratio of all steps together (`Forecast.total_ratio`)."""
        return total_noise_ratio(self.ratio, self.configuration.trained_parameters, self.steps)

    @property
    def predicted_loss(self) -> float:
        """The Dice that is likely to be lost."""
        width, patches = self.configuration.width, self.configuration.patches
        loss = predicted_loss(self.total_ratio, self.steps, width, patches)
        return loss + self.configuration.grid.outline_loss


@dataclass(frozen=True)
class SearchProblem:
    """What is searched: configurations to choose from, the patients of every site, a guarantee, and the hours.

    With `coordinator_adds_noise` the noise is added once, to the sum over sites: to compare with, not to plan. Where
    `averages_updates` is false each site learns alone, with all of its noise. The sites have `patients_factor` times
    the patients for whom the configurations were timed.
    """

    configurations: tuple[CandidateConfiguration, ...]
    patients: Mapping[str, int]
    guarantee: Guarantee
    hours: float | None
    coordinator_adds_noise: bool = False
    averages_updates: bool = True
    patients_factor: float = 1.0

    @classmethod
    def of(cls, plan: Plan, epsilon: float, delta: float, grids: Iterable[GridCandidate]) -> SearchProblem:
        """The search on these grids, within the plan's hours and with the noise of the fingerprints it rests on."""
        return cls(
            tuple(candidate_configurations(plan, grids)),
            plan.agreement.patients,
            Guarantee(epsilon, delta, plan.agreement.privacy.census_noise),
            plan.budget.hours,
            averages_updates=averages_updates(plan),
        )

    def search(self) -> list[Candidate]:
        """All candidates, the best first; none if no step fits."""
        candidates = []
        fewest = self.patients_factor * min(self.patients.values())
        for configuration in self.configurations:
            for rate in (rate for rate in RATES if rate * fewest >= LEAST_EXPECTED):
                steps = self._steps_in_hours(configuration, rate)
                noise = accounting.approximate_noise(steps, rate, *astuple(self.guarantee)) if steps else math.inf
                if math.isfinite(noise):
                    candidates.append(self._with_ratio(Candidate(configuration, rate, steps, noise)))
        return sorted(candidates, key=lambda candidate: candidate.predicted_loss)

    def best(self) -> Candidate | None:
        """The best candidate, by the accountant; its noise is what the plan has.

        The noise of the first of the best few is calibrated. Another one is better if it keeps the guarantee with the
        noise at which the predicted loss of both is the same.
        """
        best = None
        for candidate in self.search()[:_CALIBRATED]:
            if best is None or self._keeps_guarantee(candidate, candidate.noise_for(best.predicted_loss)):
                noise = self.guarantee.least_noise(
                    lambda z: replace(candidate.mechanism, noise_multiplier=z).cost(candidate.scheduled_steps)  # noqa: B023
                )  # called at once, before the next candidate
                # the ratio is that of all steps, also of those that the schedule leaves over
                for_all_steps = replace(candidate, noise_multiplier=self._noise_for_all_steps(candidate, noise))
                best = replace(self._with_ratio(for_all_steps), noise_multiplier=noise)
        return best

    def _keeps_guarantee(self, candidate: Candidate, noise_multiplier: float) -> bool:
        return noise_multiplier > 0 and self._log_excess(candidate, noise_multiplier) < 0

    def _noise_for_all_steps(self, candidate: Candidate, noise: float) -> float:
        """The noise that all steps need, from that of the schedule: by the slope of the accountant next to it."""
        steps, scheduled, rate = candidate.steps, candidate.scheduled_steps, candidate.sampling_rate
        if scheduled == steps:
            return noise
        of_all, of_scheduled = (
            accounting.approximate_noise(count, rate, *astuple(self.guarantee)) for count in (steps, scheduled)
        )
        near = noise * of_all / of_scheduled
        here, there = (self._log_excess(candidate, z) for z in (near, _SLOPE_FACTOR * near))
        return near * float(_SLOPE_FACTOR ** (here / (here - there)))

    def _log_excess(self, candidate: Candidate, noise_multiplier: float) -> float:
        """The logarithm of the epsilon that all steps spend over the epsilon of the guarantee."""
        training = replace(candidate.mechanism, noise_multiplier=noise_multiplier).cost(candidate.steps)
        spent = self.guarantee.epsilon_of((*self.guarantee.before, *training))
        return math.log(max(spent, 1e-12) / self.guarantee.epsilon)

    def _with_ratio(self, candidate: Candidate) -> Candidate:
        """The candidate with its noise-to-signal ratio."""
        noise, trained = candidate.noise_multiplier, candidate.configuration.trained_parameters
        ratios = {
            site: step_ratio(noise, trained, candidate.sampling_rate * self.patients_factor * patients)
            for site, patients in self.patients.items()
        }
        ratio = averaged_ratio(ratios, self.patients) if self.averages_updates else max(ratios.values())
        if self.coordinator_adds_noise:  # the noise of one site instead of the sum of all
            ratio /= math.sqrt(len(self.patients))
        return replace(candidate, ratio=ratio)

    def _steps_in_hours(self, configuration: CandidateConfiguration, sampling_rate: float) -> int:
        """As many steps as the hours allow."""
        if self.hours is None:
            return MOST_STEPS
        seconds = sampling_rate * self.patients_factor * configuration.seconds + configuration.noise_seconds
        return min(MOST_STEPS, int(self.hours * 3600 * USEFUL_SHARE / seconds))
