"""From an open plan to a private one: the promise, what it takes, and what it is worth; or why it cannot be had."""

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
from autofed.planner.schedules import why_rounds
from autofed.planner.suggestions import infeasible_reason
from autofed.planner.utility_model import learning_rate
from autofed.plans import Plan
from autofed.privacy import accounting


def make_private(
    plan: Plan,
    epsilon: float,
    delta: float | None = None,
    *,
    fingerprint: Fingerprint | None = None,
    keep_network: bool = False,
    even_if_hopeless: bool = False,
) -> Plan:
    """The private plan for the data, grid and hours of an open one: every patient gets `epsilon` at `delta`.

    The promise pays for the noised fingerprints that the open plan rests on, if it does. Coarser grids are looked at
    where the `fingerprint` says how large the structures are. With `keep_network` grid and network stay, as where
    trained weights are to be used. `ValidationErrors` if it cannot be, or if hardly anything would be learned, unless
    that is wanted (`even_if_hopeless`); it names the nearest plan that can.
    """
    delta = delta or accounting.default_delta(max(plan.agreement.patients.values()))
    raise_if_any("--epsilon", promise_problems(plan, delta))
    grids = [unchanged_grid(plan)] if keep_network else grid_candidates(plan, fingerprint)
    question = SearchProblem.of(plan, epsilon, delta, grids)
    found = question.best()
    if found is None:
        raise ValidationErrors("--epsilon", [_nothing_fits(plan, question)])
    made = _written(plan, question, found)
    told = forecast(made)
    if told and told.grade == "hopeless" and not even_if_hopeless:
        raise ValidationErrors("--epsilon", [infeasible_reason(question, found)])
    return made


def promise_problems(plan: Plan, delta: float) -> Iterator[str]:
    """Why no plan can keep such a promise at these sites, all at once."""
    patients = plan.agreement.patients
    most = max(patients.values())
    name = plan.agreement.algorithm.name
    if algorithms.stated(name).centralised:
        yield f"{name} puts all data in one place, where no site's promise holds; plan another algorithm, or no epsilon"
    if delta >= 1 / most:
        yield (f"a delta of {delta:g} allows one of {1 / delta:.0f} patients to be given away, a site has {most}; "
               f"write one far below {1 / most:.2g}, such as --delta {accounting.default_delta(most):g}")  # fmt: skip
    for site, found in patients.items():
        least = math.ceil(LEAST_EXPECTED / RATES[-1])
        if found < least:
            yield (f"the site {site} has {found} patient, and at most every second one is drawn for a step: most "
                   f"steps would be noise alone; expected {least} or more, or leave the site out")  # fmt: skip


def _nothing_fits(plan: Plan, question: SearchProblem) -> str:
    hours = f"{question.hours:g} h" if question.hours else "the hours"
    return (f"not one private step at every site fits {hours} of {', '.join(plan.budget.devices)} in "
            f"{plan.budget.memory_gb:g} GB, or the promise is spent on the census; give more of them")  # fmt: skip


def _written(plan: Plan, question: SearchProblem, found: Candidate) -> Plan:
    """The open plan with what was found, each with its reason, and the noise that the accountant says."""
    decided = [*_drawing(question, found), *_building(plan, found.build), *_learning(plan, found)]
    made = plan.change({field: value for field, value, _ in decided}, {field: why for field, _, why in decided})
    settled = question.guarantee.fields(found.noise)
    promised = _PROMISED | ({} if plan.budget.delta else {"agreement.privacy.delta": _DELTA})
    return with_grade(made.change(settled, {name: promised.get(name, "asked for") for name in settled}))


GRADED = "agreement.privacy"
"""What the reason whose value is the grade names as its field."""


def with_grade(plan: Plan) -> Plan:
    """The plan with its grade among the reasons, or with none where it cannot be told."""
    told = forecast(plan)
    if told is None:
        return plan.without_reason(GRADED)
    why = (
        f"the noise of all steps is {told.whole:.2g} times as long as what patients can say, of one averaged step "
        f"{told.ratio:.3g} times; up to {SOUND:g} is sound, above {STRAINED:g} hopeless"
    )
    return plan.said(GRADED, told.grade, why)


Decision = tuple[str, Any, str]


def _drawing(question: SearchProblem, found: Candidate) -> Iterator[Decision]:
    """Whom a step draws, and what becomes of a patient's gradient."""
    drawn = ", ".join(f"{found.rate * n:.3g} of {n} at {site}" for site, n in question.patients.items())
    step, where = found.mechanism, "agreement.privacy."
    yield f"{where}mechanism", step.name, "single patients' gradients are bounded, and noised at their site"
    yield f"{where}sampling_rate", step.sampling_rate, f"patients expected in a step: {drawn}; {_TOGETHER}"
    yield f"{where}patches_per_patient", step.patches_per_patient, f"{_TRUER}; {_TOGETHER}"
    yield f"{where}clip", step.clip, "a unit: every gradient gets this length, and the learning rate says the rest"
    yield f"{where}clipping", "normalised", "how long a patient's gradient is need not be known"


def _building(plan: Plan, build: CandidateConfiguration) -> Iterator[Decision]:
    """The grid and the network on it, where they are others than the open plan's."""
    choice, network = build.choice, build.network
    if choice.factor > 1:
        coarse = (
            f"{choice.factor:g} times coarser than without privacy: {_COARSER}; {choice.lost:.3f} Dice foretold lost"
        )
        yield "local.geometry.spacing_mm", list(choice.geometry.spacing_mm), f"{coarse}; {_TOGETHER}"
        yield "local.geometry.median_shape", list(choice.geometry.median_shape), "median size of the cases on that grid"
        yield "local.training.patch_size", list(choice.shape.patch), "the largest that fits, on that grid"
    if network.strides != plan.local.network.strides:
        yield "local.network.strides", [list(step) for step in network.strides], _SHALLOW
        yield "local.network.kernels", [list(kernel) for kernel in network.kernels], "one for each stage"
        yield "local.network.blocks", list(network.blocks), "one for each stage"
    learning = "all" if build.learning == network.parameters else build.learning
    noise = f"{network.parameters} parameters, {learning} of which train and get noise"
    yield "local.network.features", list(network.features), f"{noise}; {_TOGETHER}"


def _learning(plan: Plan, found: Candidate) -> Iterator[Decision]:
    """How long and how fast."""
    rounds, per_round = found.schedule
    yield "agreement.training.rounds", rounds, why_rounds(per_round, len(plan.agreement.patients))
    yield (
        "local.training.steps_per_round",
        per_round,
        f"{found.taken} steps of every site in all; {_TOGETHER}",
    )
    if plan.agreement.training.steps_at:
        yield "agreement.training.steps_at", {}, "one noise keeps one promise where every site takes as many steps"
    yield "local.training.batch_size", found.build.patches, "the patches of one patient are one backward pass"
    yield "local.training.learning_rate", learning_rate(found.whole, found.steps), _RATE
    yield "local.training.momentum", 0.9, "an average over ten steps, so that noise of long ago is forgotten"
    yield "local.training.keep_momentum", True, "rounds are too short to gather it anew"
    yield "local.training.gradient_clip", NO_CLIP, "patients are bounded one by one; this would shorten steps unawares"
    yield "agreement.average.weights", "patients", "weights by noise gained nothing, and lean to the largest site"


_TOGETHER = "grid, width, patches, rate and steps were chosen together, for the least loss foretold"
_TRUER = "so many patches make a patient's one gradient truer, at no cost in privacy"
_COARSER = "more steps in the hours, and fewer weights, each of which gets noise"
_SHALLOW = "without the deepest stages, whose few voxels hold most of the parameters"
_RATE = "as far as noise may carry the weights: smaller for more noise and more steps (docs/decisions/0012)"
_PROMISED = {
    "agreement.privacy.noise_multiplier": "the least that keeps the promise over all releases, by the accountant"
}
_DELTA = "the smaller of 1e-5 and a tenth of one over the patients of the largest site"

NO_CLIP = 1e6
"""A `gradient_clip` that never clips."""
