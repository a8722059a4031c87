"""The search for a private plan: grid, width, patches of a patient, sampling rate and steps, chosen together.

Candidates are (grid, width, K, q); each takes as many steps T as the hours allow, and the noise that those need. The
one of the least `predicted_loss` loss is taken. For the search noise is told by a limit theorem; the accountant decides
between the best few, and its noise is what the plan has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from autofed.planner.coarser_grids import GridCandidate
from autofed.planner.forecast import averaged, averages, step_ratio
from autofed.planner.hours import USEFUL_SHARE
from autofed.planner.learning import passes
from autofed.planner.schedules import divided
from autofed.planner.topology import memory_needed
from autofed.planner.utility_model import predicted_loss, total_noise_ratio
from autofed.plans import Network, Plan
from autofed.privacy import accounting
from autofed.privacy.dpsgd import DPSGD
from autofed.privacy.events import PrivacyEvent
from autofed.privacy.guarantee import Guarantee

WIDTHS = (4, 8, 16, 32)
"""Features of the first stage that are tried; no wider than nnU-Net's."""

PATCHES = (1, 2, 4, 8)
"""Patches of a patient for one gradient (K)."""

RATES = (0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
"""Sampling rates (q): above a half hardly anything is won by sampling."""

LEAST_EXPECTED = 1.0
"""Patients of every site expected in a step; with fewer most of its steps are noise alone."""

MOST_STEPS = 8000
"""More private steps than this are not planned, however many hours there are."""

SECONDS_A_NORMAL = 2.6e-8
"""To draw one normal number in float64 and add it (tests/benchmarks/private_step.py, 19 million parameters)."""

_NEARBY = 1.01
"""So far apart are two looks at the accountant that tell its slope."""

_JUDGED = 3
"""So many of the best candidates are held against each other by the accountant."""


@dataclass(frozen=True)
class CandidateConfiguration:
    """What a site may train: a grid and a network on it, K patches in a pass, and the seconds of a step.

    `learning` is the number of parameters that train, and so get noise. `seconds` are those of a step in which every
    site takes one pass for each of its patients, and what its algorithm adds; `drawing` those of its noise.
    """

    choice: GridCandidate
    width: int
    patches: int
    network: Network
    learning: int
    seconds: float
    drawing: float


def candidate_configurations(plan: Plan, choices: Iterable[GridCandidate]) -> Iterator[CandidateConfiguration]:
    """All that fit the memory of a plan, with what a step costs its algorithm on the machines of its budget."""
    budget, patients = plan.budget, plan.agreement.patients
    here = sum(site not in budget.site_speeds for site in patients)
    each = passes(plan.agreement.algorithm, patients, budget, private=True)
    together = {site: each[site] * count for site, count in patients.items()}
    timed = budget.is_measured(patients)
    for choice in choices:
        for width in WIDTHS if choice.own is None else choice.own.features[:1]:
            network, patch = choice.network(width), choice.shape.patch
            learning = network.trained_parameters(choice.trained)
            drawing = SECONDS_A_NORMAL * learning * max(1, here)
            for patches in PATCHES:
                if memory_needed(network, patch, patches, choice.task.preset) <= budget.memory_gb:
                    seconds = budget.seconds_per_step(network, patch, patches, together) if timed else math.nan
                    yield CandidateConfiguration(choice, width, patches, network, learning, seconds, drawing)


@dataclass(frozen=True)
class Candidate:
    """A build with q, T and the noise multiplier z, and what is foretold of it: `ratio` is of one averaged step."""

    build: CandidateConfiguration
    rate: float
    steps: int
    noise: float
    ratio: float = 0.0

    @property
    def mechanism(self) -> DPSGD:
        """What its training passes, and is charged by."""
        return DPSGD(0, self.rate, self.build.patches, 1.0, self.noise, normalised=True)

    @property
    def schedule(self) -> tuple[int, int]:
        """The rounds, and the steps of every site in one: a few of the T steps may be left over."""
        return divided(self.steps)

    @property
    def taken(self) -> int:
        """The steps that the schedule has."""
        return math.prod(self.schedule)

    def cost(self, noise: float, rounds: int, steps: int) -> tuple[PrivacyEvent, ...]:
        """What so many rounds of so many steps cost a patient with a noise multiplier."""
        return replace(self, noise=noise).mechanism.planned(rounds, steps)

    def noise_for(self, loss: float) -> float:
        """The noise multiplier with which so much Dice would be foretold lost; below 0 if none does."""
        free = replace(self, ratio=0.0).predicted_loss
        return self.noise * (loss - free) / (self.predicted_loss - free)

    @property
    def whole(self) -> float:
        """Noise over signal of all steps together (`Forecast.whole`)."""
        return total_noise_ratio(self.ratio, self.build.learning, self.steps)

    @property
    def predicted_loss(self) -> float:
        """The Dice that is likely to be lost."""
        return predicted_loss(self.whole, self.steps, self.build.width, self.build.patches) + self.build.choice.lost


@dataclass(frozen=True)
class SearchProblem:
    """What a private plan is asked for: builds to choose from, patients, a promise, and the hours.

    `census` is the noise multiplier of fingerprints that the promise has to pay for, too. Where the `coordinator_adds`
    the noise it is added once to the sum over sites: to compare with, not to plan. Sites that learn each alone
    (`averages` is false) have all of their noise. With `more` the sites have so many times the patients that the
    builds were timed for.
    """

    builds: tuple[CandidateConfiguration, ...]
    patients: Mapping[str, int]
    epsilon: float
    delta: float
    hours: float | None
    census: float | None = None
    coordinator_adds: bool = False
    averages: bool = True
    more: float = 1.0

    @classmethod
    def of(cls, plan: Plan, epsilon: float, delta: float, choices: Iterable[GridCandidate]) -> SearchProblem:
        """What is searched on these grids, within the plan's hours, beside what its promise already has to pay for."""
        patients, hours, census = plan.agreement.patients, plan.budget.hours, plan.agreement.privacy.census_noise
        ready = tuple(candidate_configurations(plan, choices))
        return cls(ready, patients, epsilon, delta, hours, census, averages=averages(plan))

    def search(self) -> list[Candidate]:
        """All candidates, the best first; none if no step fits."""
        return sorted(self._candidates(), key=lambda candidate: candidate.predicted_loss)

    def best(self) -> Candidate | None:
        """The best candidate, by the accountant; its noise is what the plan has.

        The noise of the first of the best few is calibrated. Another one is better if it keeps the promise with the
        noise at which as much would be foretold of both.
        """
        few = self.search()[:_JUDGED]
        best = self._calibrated(few[0]) if few else None
        for other in few[1:]:
            if best and self._keeps(other, other.noise_for(best.predicted_loss)):
                best = self._calibrated(other)
        return best

    @property
    def guarantee(self) -> Guarantee:
        """What is promised."""
        return Guarantee(self.epsilon, self.delta, self.census)

    def _keeps(self, candidate: Candidate, noise: float) -> bool:
        return noise > 0 and self._excess(candidate, noise) < 0

    def _calibrated(self, candidate: Candidate) -> Candidate:
        """The same with the accountant's noise. What is foretold is of all its steps, also of those left over."""
        noise = self.guarantee.least_noise(lambda z: candidate.cost(z, *candidate.schedule))
        return replace(self._weighed(replace(candidate, noise=self._for_all_steps(candidate, noise))), noise=noise)

    def _for_all_steps(self, candidate: Candidate, noise: float) -> float:
        """The noise that all steps need, from that of the schedule: by the slope of the accountant next to it."""
        if candidate.taken == candidate.steps:
            return noise
        near = noise * self._sketched(candidate.steps, candidate.rate) / self._sketched(candidate.taken, candidate.rate)
        here, there = (self._excess(candidate, z) for z in (near, _NEARBY * near))
        return near * _NEARBY ** (here / (here - there))

    def _excess(self, candidate: Candidate, noise: float) -> float:
        """The logarithm of what all steps spend over what is promised."""
        return math.log(max(self.guarantee.spent(candidate.cost(noise, 1, candidate.steps)), 1e-12) / self.epsilon)

    def _sketched(self, steps: int, rate: float) -> float:
        """About the noise for so many steps."""
        whole = accounting.inverse_square(self.epsilon, self.delta) - (self.census**-2 if self.census else 0)
        return accounting.sketched_noise(steps, rate, whole)

    def _candidates(self) -> Iterator[Candidate]:
        fewest = self.more * min(self.patients.values())
        for build in self.builds:
            for rate in (rate for rate in RATES if rate * fewest >= LEAST_EXPECTED):
                steps = self._steps(build, rate)
                noise = self._sketched(steps, rate) if steps else math.inf
                if math.isfinite(noise):
                    yield self._weighed(Candidate(build, rate, steps, noise))

    def _weighed(self, candidate: Candidate) -> Candidate:
        """With its ratio of noise to signal."""
        learning, rate = candidate.build.learning, candidate.rate
        ratios = {
            site: step_ratio(candidate.noise, learning, rate * self.more * n) for site, n in self.patients.items()
        }
        ratio = averaged(ratios, self.patients) if self.averages else max(ratios.values())
        if self.coordinator_adds:  # the noise of one site instead of the sum of all
            ratio /= math.sqrt(len(self.patients))
        return replace(candidate, ratio=ratio)

    def _steps(self, build: CandidateConfiguration, rate: float) -> int:
        """As many as the hours allow."""
        if self.hours is None:
            return MOST_STEPS
        seconds = rate * self.more * build.seconds + build.drawing
        return min(MOST_STEPS, int(self.hours * 3600 * USEFUL_SHARE / seconds))
