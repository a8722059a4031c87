"""A plan for more, fewer or other sites under which weights that were trained before go on being trained."""

from __future__ import annotations

from autofed.data import DECLARED, describe_regions
from autofed.data.labels import Labels
from autofed.errors import raise_if_any
from autofed.fingerprints import Fingerprint
from autofed.planner.annotations import annotated_at
from autofed.planner.checks import data_problems
from autofed.planner.grids import full_resolution
from autofed.planner.hours import fitting_steps
from autofed.planner.learning import passes
from autofed.planner.private import make_private
from autofed.planner.reasons import Reasons, short
from autofed.planner.schedules import communication_rounds, fault_settings
from autofed.plans import Agreement, AlgorithmSettings, Budget, FaultSettings, Plan, Privacy, RoundSchedule

_MADE_FOR = ("memory_gb", "preset", "configuration")
"""What the budget says of the network, and goes with it."""


def follow(
    fingerprint: Fingerprint,
    guide: Plan,
    source: str,
    budget: Budget | None = None,
    algorithm: str | None = None,
    *,
    even_if_hopeless: bool = False,
) -> Plan:
    """The plan for the data of a (merged) fingerprint that keeps what weights trained by the plan `guide` rest on.

    Grid, normalisation, network and recipe are the guide's, as is the way of learning together unless an `algorithm` is
    named; patients, rounds and steps follow from the fingerprint and the budget, and under privacy so does the recipe.
    The reasons call the guide `source`.
    `Problems` names all at once in which the sites declare another task, and what else stands in the way.
    """
    budget = (budget or Budget()).model_copy(update={name: getattr(guide.budget, name) for name in _MADE_FOR})
    raise_if_any("the plan", [*_differences(fingerprint, guide, source), *data_problems(fingerprint, budget)])
    reasons, training, sites = Reasons(), guide.local.training, tuple(fingerprint.sites)
    _say_kept(fingerprint, guide, source, reasons)
    chosen = _algorithm(guide, source, algorithm, reasons)
    counted = passes(chosen, sites, budget)
    steps = fitting_steps(guide.local.network, training.patch_size, training.batch_size, counted, budget)
    rounds, per_round = communication_rounds(steps, len(sites), reasons)
    within = "no hours were given: as long as nnU-Net's" if budget.hours is None else f"fit {budget.hours:g} h"
    reasons.say("local.training.steps_per_round", per_round, f"{steps} steps at every site in all; {within}")
    rounds = _with_uneven_steps(guide, source, rounds, per_round, sites, reasons)
    training = training.model_copy(update={"steps_per_round": per_round})
    least, annotated = fault_settings(len(sites), reasons), annotated_at(fingerprint, reasons)
    made = Plan(
        budget=budget,
        agreement=_agreement(fingerprint, guide, rounds, least, chosen, annotated),
        local=guide.local.model_copy(update={"training": training}),
        inference=guide.inference,
        reasons=reasons.lines,
    )
    if budget.epsilon is None:
        return made
    return make_private(made, budget.epsilon, budget.delta, keep_network=True, even_if_hopeless=even_if_hopeless)


def _differences(fingerprint: Fingerprint, guide: Plan, source: str) -> list[str]:
    """Where the sites declare what weights of the guide know nothing of."""
    declared, agreed = fingerprint.declaration, guide.agreement
    problems = [
        f"the sites declare {what} {describe_regions(declared, what)}, "
        f"{source} has {describe_regions(agreed, what)}; weights mean nothing for another task: "
        "make dataset.json say the same, or plan without --like"
        for what in DECLARED
        if describe_regions(declared, what) != describe_regions(agreed, what)
    ]
    if agreed.privacy.promises:
        problems.append(f"{source} is private, and its noise is made for its own patients; plan without --like")
    return problems


def _algorithm(guide: Plan, source: str, wanted: str | None, reasons: Reasons) -> AlgorithmSettings:
    agreed = guide.agreement.algorithm
    kept = wanted in (None, agreed.name)
    chosen = agreed if kept else AlgorithmSettings(name=str(wanted))
    why = f"as in {source}, with its settings" if kept else f"asked for; {source} has {agreed.name}"
    reasons.say("agreement.algorithm", chosen.name, f"{why}; averages, the server's step and the wire are as there")
    return chosen


def _with_uneven_steps(
    guide: Plan, source: str, rounds: RoundSchedule, per_round: int, sites: tuple[str, ...], reasons: Reasons
) -> RoundSchedule:
    """The rounds in which sites that took fewer or more steps than others do so in the same proportion."""
    share = per_round / guide.local.training.steps_per_round
    taken = guide.agreement.training.steps_at.items()
    steps_at = {site: max(1, round(share * steps)) for site, steps in taken if site in sites}
    if steps_at:
        shown = ", ".join(f"{site}: {steps}" for site, steps in steps_at.items())
        reasons.say("agreement.training.steps_at", shown, f"as many for each of the other sites' as in {source}")
    return rounds.model_copy(update={"steps_at": steps_at})


def _agreement(
    fingerprint: Fingerprint,
    guide: Plan,
    rounds: RoundSchedule,
    least: FaultSettings,
    algorithm: AlgorithmSettings,
    annotated: dict[str, tuple[str, ...]],
) -> Agreement:
    """The guide's, for these patients and rounds."""
    agreed, sites = guide.agreement, fingerprint.sites
    return Agreement(**{
        **dict(agreed),
        "patients": {name: site.patients for name, site in sites.items()},
        "algorithm": algorithm,
        "training": rounds.model_copy(update={"ema": agreed.training.ema}),
        "faults": agreed.faults.model_copy(update={"least_sites": least.least_sites}),
        "annotated": annotated,
        "privacy": Privacy(census_noise=fingerprint.noise.multiplier if fingerprint.noise else None),
    })  # fmt: skip


def _say_kept(fingerprint: Fingerprint, guide: Plan, source: str, reasons: Reasons) -> None:
    """What was taken from the guide, each with the guide's own reason, and what these sites alone would have had."""
    for line in guide.reasons:
        if line.field.startswith(("local.", "inference.")):
            reasons.say(line.field, line.value, f"as in {source}: {line.why}", line.code)
    local = guide.local
    own, spacing = short(full_resolution(fingerprint, Reasons()).spacing_mm), short(local.geometry.spacing_mm)
    alone = "" if own == spacing else f"; these sites' cases alone would be planned at {own}"
    grid = f"as in {source}, since weights mean nothing on another grid{alone}"
    reasons.say("local.geometry.spacing_mm", spacing, grid)
    rate = f"as in {source}, also from given weights: one recipe; set a tenth where they should change little"
    reasons.say("local.training.learning_rate", local.training.learning_rate, rate)
    lost = [name for name in Labels.of(guide.agreement).names if fingerprint.classes[name].cases == 0]
    if lost:
        why = "no case of these sites has it, so what is known of it can only be forgotten"
        reasons.say("agreement.labels", ", ".join(lost), why)
