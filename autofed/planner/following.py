"""A plan for more, fewer or other sites under which the training of existing weights continues."""

from __future__ import annotations

from autofed.data import DECLARED, describe_regions
from autofed.data.labels import Labels
from autofed.errors import raise_if_any
from autofed.fingerprints import Fingerprint
from autofed.planner.algorithm import passes_per_step
from autofed.planner.annotations import partial_annotations
from autofed.planner.checks import data_problems
from autofed.planner.grids import full_resolution
from autofed.planner.hours import fitting_steps
from autofed.planner.private import make_private
from autofed.planner.reasons import Reasons, format_axes
from autofed.planner.schedules import communication_rounds, fault_settings
from autofed.plans import Agreement, AlgorithmSettings, Budget, FaultSettings, Plan, Privacy, RoundSchedule

_NETWORK_BUDGET = ("memory_gb", "preset", "configuration")
"""Fields of the budget that belong to the network, and are kept with it."""


def follow(
    fingerprint: Fingerprint,
    reference: Plan,
    source: str,
    budget: Budget | None = None,
    algorithm: str | None = None,
    *,
    even_if_hopeless: bool = False,
) -> Plan:
    """The plan for the data of a (merged) fingerprint under which weights trained by the plan `reference` stay valid.

    Grid, normalisation, network and recipe are those of the reference. Patients, rounds and steps follow from the
    fingerprint and the budget, and under privacy so does the recipe.

    Args:
        fingerprint: Of the sites that are to train.
        reference: The plan by which the weights were trained.
        source: What the reasons call the reference.
        budget: Hours, speeds and epsilon; memory, preset and configuration are the reference's.
        algorithm: Instead of the reference's.
        even_if_hopeless: Give a private plan although hardly anything would be learned.

    Raises:
        ValidationErrors: All at once in which the sites declare another task, and what else prevents the plan.
    """
    budget = (budget or Budget()).model_copy(update={name: getattr(reference.budget, name) for name in _NETWORK_BUDGET})
    raise_if_any("the plan", [*_differences(fingerprint, reference, source), *data_problems(fingerprint, budget)])
    reasons, training, sites = Reasons(), reference.local.training, tuple(fingerprint.sites)
    _add_reference_reasons(fingerprint, reference, source, reasons)
    settings = _algorithm(reference, source, algorithm, reasons)
    passes = passes_per_step(settings, sites, budget)
    steps = fitting_steps(reference.local.network, training.patch_size, training.batch_size, passes, budget)
    rounds, per_round = communication_rounds(steps, len(sites), reasons)
    within = "no hours were given: as long as nnU-Net's" if budget.hours is None else f"fit {budget.hours:g} h"
    reasons.record("local.training.steps_per_round", per_round, f"{steps} steps at every site in all; {within}")
    rounds = _with_uneven_steps(reference, source, rounds, per_round, sites, reasons)
    training = training.model_copy(update={"steps_per_round": per_round})
    faults, annotated = fault_settings(len(sites), reasons), partial_annotations(fingerprint, reasons)
    plan = Plan(
        budget=budget,
        agreement=_agreement(fingerprint, reference, rounds, faults, settings, annotated),
        local=reference.local.model_copy(update={"training": training}),
        inference=reference.inference,
        reasons=reasons.lines,
    )
    if budget.epsilon is None:
        return plan
    return make_private(plan, budget.epsilon, budget.delta, keep_network=True, even_if_hopeless=even_if_hopeless)


def _differences(fingerprint: Fingerprint, reference: Plan, source: str) -> list[str]:
    """Where the sites declare another task than that of the reference."""
    declaration, agreement = fingerprint.declaration, reference.agreement
    problems = [
        f"the sites declare {what} {describe_regions(declaration, what)}, "
        f"{source} has {describe_regions(agreement, what)}; weights mean nothing for another task: "
        "make dataset.json say the same, or plan without --like"
        for what in DECLARED
        if describe_regions(declaration, what) != describe_regions(agreement, what)
    ]
    if agreement.privacy.is_private:
        problems.append(f"{source} is private, and its noise is made for its own patients; plan without --like")
    return problems


def _algorithm(reference: Plan, source: str, name: str | None, reasons: Reasons) -> AlgorithmSettings:
    settings = reference.agreement.algorithm
    why = f"as in {source}, with its settings"
    if name not in (None, settings.name):
        why = f"asked for; {source} has {settings.name}"
        settings = AlgorithmSettings(name=str(name))
    reasons.record(
        "agreement.algorithm", settings.name, f"{why}; averages, the server's step and the wire are as there"
    )
    return settings


def _with_uneven_steps(
    reference: Plan, source: str, rounds: RoundSchedule, per_round: int, sites: tuple[str, ...], reasons: Reasons
) -> RoundSchedule:
    """The rounds in which sites that took fewer or more steps than others do so in the same proportion."""
    share = per_round / reference.local.training.steps_per_round
    before = reference.agreement.training.steps_at.items()
    steps_at = {site: max(1, round(share * steps)) for site, steps in before if site in sites}
    if steps_at:
        listed = ", ".join(f"{site}: {steps}" for site, steps in steps_at.items())
        reasons.record("agreement.training.steps_at", listed, f"as many for each of the other sites' as in {source}")
    return rounds.model_copy(update={"steps_at": steps_at})


def _agreement(
    fingerprint: Fingerprint,
    reference: Plan,
    rounds: RoundSchedule,
    faults: FaultSettings,
    algorithm: AlgorithmSettings,
    annotated: dict[str, tuple[str, ...]],
) -> Agreement:
    """The reference's, for these patients and rounds."""
    agreement, sites = reference.agreement, fingerprint.sites
    return Agreement(**{
        **dict(agreement),
        "patients": {name: site.patients for name, site in sites.items()},
        "algorithm": algorithm,
        "training": rounds.model_copy(update={"ema": agreement.training.ema}),
        "faults": agreement.faults.model_copy(update={"least_sites": faults.least_sites}),
        "annotated": annotated,
        "privacy": Privacy(census_noise=fingerprint.noise.multiplier if fingerprint.noise else None),
    })  # fmt: skip


def _add_reference_reasons(fingerprint: Fingerprint, reference: Plan, source: str, reasons: Reasons) -> None:
    """What is the reference's, with its own reasons, and what these sites alone would have got."""
    for line in reference.reasons:
        if line.field.startswith(("local.", "inference.")):
            reasons.record(line.field, line.value, f"as in {source}: {line.why}", line.code)
    local = reference.local
    spacing = format_axes(local.geometry.spacing_mm)
    own = format_axes(full_resolution(fingerprint, Reasons()).spacing_mm)
    alone = "" if own == spacing else f"; these sites' cases alone would be planned at {own}"
    grid = f"as in {source}, since weights mean nothing on another grid{alone}"
    reasons.record("local.geometry.spacing_mm", spacing, grid)
    rate = f"as in {source}, also from given weights: one recipe; set a tenth where they should change little"
    reasons.record("local.training.learning_rate", local.training.learning_rate, rate)
    absent = [name for name in Labels.of(reference.agreement).names if fingerprint.classes[name].cases == 0]
    if absent:
        why = "no case of these sites has it, so what is known of it can only be forgotten"
        reasons.record("agreement.labels", ", ".join(absent), why)
