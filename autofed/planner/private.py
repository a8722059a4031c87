"""From a plan without privacy to a private one: guarantee, noise and expected learning; or why there is none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from autofed import algorithms
from autofed.errors import ValidationErrors, raise_if_any
from autofed.fingerprints import Fingerprint
from autofed.planner.coarser_grids import grid_candidates, unchanged_grid
from autofed.planner.forecast import SOUND, STRAINED, forecast
from autofed.planner.private_search import LEAST_EXPECTED, RATES, Candidate, CandidateConfiguration, SearchProblem
from autofed.planner.schedules import rounds_reason
from autofed.planner.suggestions import infeasible_reason
from autofed.planner.utility_model import learning_rate
from autofed.plans import Plan
from autofed.privacy import accounting
from autofed.privacy.guarantee import DELTA, EPSILON, NOISE


def make_private(
    plan: Plan,
    epsilon: float,
    delta: float | None = None,
    *,
    fingerprint: Fingerprint | None = None,
    keep_network: bool = False,
    even_if_hopeless: bool = False,
) -> Plan:
    """The private plan for the data, grid and hours of a plan without privacy: (epsilon, delta) for every patient.

    The guarantee includes the cost of private fingerprints, if the plan rests on such.

    Args:
        plan: The plan without privacy.
        epsilon: The epsilon of the guarantee for each patient.
        delta: Its delta; by default that of `accounting.default_delta` for the largest site.
        fingerprint: Says how large the structures are; coarser grids are searched only with it.
        keep_network: Grid and network stay, as where trained weights are to be used.
        even_if_hopeless: Give the plan although hardly anything would be learned.

    Raises:
        ValidationErrors: No plan keeps the guarantee, or hardly anything would be learned; names the nearest plan that
            works.
    """
    delta = delta or accounting.default_delta(max(plan.agreement.patients.values()))
    raise_if_any("--epsilon", guarantee_problems(plan, delta))
    grids = [unchanged_grid(plan)] if keep_network else grid_candidates(plan, fingerprint)
    problem = SearchProblem.of(plan, epsilon, delta, grids)
    best = problem.best()
    if best is None:
        raise ValidationErrors("--epsilon", [_no_candidate_fits(plan, problem)])
    decisions = [
        *_sampling_fields(problem, best), *_network_fields(plan, best.configuration), *_training_fields(plan, best)
    ]  # fmt: skip
    changed = plan.change({field: value for field, value, _ in decisions}, {field: why for field, _, why in decisions})
    fields = {NOISE: best.noise_multiplier, EPSILON: epsilon, DELTA: delta}
    whys = {NOISE: _LEAST_NOISE, EPSILON: _ASKED_FOR, DELTA: _ASKED_FOR if plan.budget.delta else _DEFAULT_DELTA}
    private_plan = with_grade(changed.change(fields, whys))
    expected = forecast(private_plan)
    if expected and expected.grade == "hopeless" and not even_if_hopeless:
        raise ValidationErrors("--epsilon", [infeasible_reason(problem, best)])
    return private_plan


def guarantee_problems(plan: Plan, delta: float) -> Iterator[str]:
    """Why no plan can keep such a guarantee at these sites, all at once."""
    patients = plan.agreement.patients
    most = max(patients.values())
    name = plan.agreement.algorithm.name
    if algorithms.stated(name).centralised:
        yield (f"{name} puts all data in one place, where no site's guarantee holds; plan another algorithm, or no "
               "epsilon")  # fmt: skip
    if delta >= 1 / most:
        yield (f"a delta of {delta:g} allows one of {1 / delta:.0f} patients to be given away, a site has {most}; "
               f"write one far below {1 / most:.2g}, such as --delta {accounting.default_delta(most):g}")  # fmt: skip
    least = math.ceil(LEAST_EXPECTED / RATES[-1])
    for site, count in patients.items():
        if count < least:
            yield (f"the site {site} has {count} patient, and at most every second one is drawn for a step: most "
                   f"steps would be noise alone; expected {least} or more, or leave the site out")  # fmt: skip


def _no_candidate_fits(plan: Plan, problem: SearchProblem) -> str:
    hours = f"{problem.hours:g} h" if problem.hours else "the hours"
    return (f"not one private step at every site fits {hours} of {', '.join(plan.budget.devices)} in "
            f"{plan.budget.memory_gb:g} GB, or the private fingerprints spend the whole epsilon; "
            "give more of them")  # fmt: skip


GRADED = "agreement.privacy"
"""The field of the reason whose value is the grade."""


def with_grade(plan: Plan) -> Plan:
    """The plan with its grade among the reasons, or with none where there is no forecast."""
    expected = forecast(plan)
    if expected is None:
        return plan.without_reason(GRADED)
    why = (
        f"the noise of all steps is {expected.total_ratio:.2g} times as long as what patients can say, of one averaged "
        f"step {expected.ratio:.3g} times; up to {SOUND:g} is sound, above {STRAINED:g} hopeless"
    )
    return plan.with_reason(GRADED, expected.grade, why)


Decision = tuple[str, Any, str]


def _sampling_fields(problem: SearchProblem, candidate: Candidate) -> Iterator[Decision]:
    """How patients are sampled for a step, and how their gradients are bounded."""
    rate = candidate.sampling_rate
    sampled = ", ".join(f"{rate * n:.3g} of {n} at {site}" for site, n in problem.patients.items())
    step, where = candidate.mechanism, "agreement.privacy."
    yield f"{where}mechanism", step.name, "single patients' gradients are bounded, and noised at their site"
    yield f"{where}sampling_rate", step.sampling_rate, f"patients expected in a step: {sampled}; {_TOGETHER}"
    yield f"{where}patches_per_patient", step.patches_per_patient, f"{_TRUER}; {_TOGETHER}"
    yield f"{where}clip", step.clip, "a unit: every gradient gets this length, and the learning rate says the rest"
    yield f"{where}clipping", "normalised", "how long a patient's gradient is need not be known"


def _network_fields(plan: Plan, configuration: CandidateConfiguration) -> Iterator[Decision]:
    """The grid and the network on it, where they differ from the plan's without privacy."""
    grid, network = configuration.grid, configuration.network
    if grid.factor > 1:
        coarser = f"{grid.factor:g} times coarser than without privacy: {_COARSER}"
        coarser = f"{coarser}; {grid.outline_loss:.3f} Dice foretold lost"
        yield "local.geometry.spacing_mm", list(grid.geometry.spacing_mm), f"{coarser}; {_TOGETHER}"
        yield "local.geometry.median_shape", list(grid.geometry.median_shape), "median size of the cases on that grid"
        yield "local.training.patch_size", list(grid.topology.patch), "the largest that fits, on that grid"
    if network.strides != plan.local.network.strides:
        yield "local.network.strides", [list(step) for step in network.strides], _SHALLOW
        yield "local.network.kernels", [list(kernel) for kernel in network.kernels], "one for each stage"
        yield "local.network.blocks", list(network.blocks), "one for each stage"
    trained = configuration.trained_parameters
    share = "all" if trained == network.parameters else trained
    noise = f"{network.parameters} parameters, {share} of which train and get noise"
    yield "local.network.features", list(network.features), f"{noise}; {_TOGETHER}"


def _training_fields(plan: Plan, candidate: Candidate) -> Iterator[Decision]:
    """How long and how fast."""
    rounds, per_round = candidate.schedule
    yield "agreement.training.rounds", rounds, rounds_reason(per_round, len(plan.agreement.patients))
    in_all = f"{candidate.scheduled_steps} steps of every site in all"
    yield "local.training.steps_per_round", per_round, f"{in_all}; {_TOGETHER}"
    if plan.agreement.training.steps_at:
        yield "agreement.training.steps_at", {}, "one noise keeps one promise where every site takes as many steps"
    yield (
        "local.training.batch_size",
        candidate.configuration.patches,
        "the patches of one patient are one backward pass",
    )
    yield "local.training.learning_rate", learning_rate(candidate.total_ratio, candidate.steps), _RATE
    yield "local.training.momentum", 0.9, "an average over ten steps, so that noise of long ago is forgotten"
    yield "local.training.keep_momentum", True, "rounds are too short to gather it anew"
    yield "local.training.gradient_clip", NO_CLIP, "patients are bounded one by one; this would shorten steps unawares"
    yield "agreement.average.weights", "patients", "weights by noise gained nothing, and lean to the largest site"


_TOGETHER = "grid, width, patches, rate and steps were chosen together, for the least loss foretold"
_TRUER = "so many patches make a patient's one gradient truer, at no cost in privacy"
_COARSER = "more steps in the hours, and fewer weights, each of which gets noise"
_SHALLOW = "without the deepest stages, whose few voxels hold most of the parameters"
_RATE = "as far as noise may carry the weights: smaller for more noise and more steps (docs/decisions/0012)"
_ASKED_FOR = "asked for"
_LEAST_NOISE = "the least that keeps the promise over all releases, by the accountant"
_DEFAULT_DELTA = "the smaller of 1e-5 and a tenth of one over the patients of the largest site"

NO_CLIP = 1e6
"""A `gradient_clip` that never clips."""
