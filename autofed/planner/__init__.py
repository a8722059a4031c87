"""From a fingerprint and a budget to a plan: every heuristic, pure and without torch.

The rules are those of nnU-Net (Isensee et al., Nat Methods 18:203, 2021; version 2.8.1). What differs is also written
into the plan's reasons: one configuration is chosen by a rule, the batch cap counts the whole federation, and network,
batch and number of steps shrink to what the machine can do in the given hours.
"""

from __future__ import annotations

from dataclasses import replace

from autofed.data import Declaration
from autofed.data.labels import Labels
from autofed.errors import ValidationErrors, raise_if_any
from autofed.fingerprints import Fingerprint
from autofed.planner import learning, private_fingerprint
from autofed.planner.annotations import annotated_at
from autofed.planner.checks import data_problems, structure_problems
from autofed.planner.following import follow
from autofed.planner.forecast import EXPECTED_LEARNING, Forecast, SiteForecast, forecast
from autofed.planner.grids import Grid, full_resolution, low_resolution, preferred
from autofed.planner.hours import SMALLEST_BATCH, size
from autofed.planner.intensities import intensity
from autofed.planner.presets import PRESETS, PresetRules
from autofed.planner.private import GRADED, make_private, with_grade
from autofed.planner.reasons import Reasons, short
from autofed.planner.schedules import TrainingLength, communication_rounds, fault_settings, training
from autofed.planner.suggestions import suggestions
from autofed.planner.topology import NetworkTask, Topology, batch_for_memory, memory_needed, patch_for_memory
from autofed.plans import (
    Agreement,
    AlgorithmSettings,
    Budget,
    Inference,
    LocalPlan,
    Network,
    Plan,
    Privacy,
    TargetGrid,
    Training,
    training_bytes,
)

__all__ = [
    "EXPECTED_LEARNING",
    "GRADED",
    "PRESETS",
    "Forecast",
    "SiteForecast",
    "check_memory",
    "follow",
    "forecast",
    "make",
    "make_private",
    "suggestions",
    "with_grade",
]


def make(
    fingerprint: Fingerprint,
    budget: Budget | None = None,
    algorithm: str | None = None,
    *,
    even_if_hopeless: bool = False,
) -> Plan:
    """The plan for the data described by a (merged) fingerprint, within a budget; by an `algorithm` if one is named.

    With an epsilon in the budget it is private (`make_private`). `ValidationErrors` if there is nothing to learn from,
    or if the budget asks for what cannot be planned.
    """
    budget = budget or Budget()
    made = _open(fingerprint, budget, algorithm)
    if budget.epsilon is None:
        return made
    return make_private(made, budget.epsilon, budget.delta, fingerprint=fingerprint, even_if_hopeless=even_if_hopeless)


def _open(fingerprint: Fingerprint, budget: Budget, algorithm: str | None) -> Plan:
    """The plan without a promise."""
    raise_if_any("the plan", [*data_problems(fingerprint, budget), *structure_problems(fingerprint)])
    reasons, preset = Reasons(), PRESETS[budget.preset]
    declaration, sites = fingerprint.declaration, tuple(fingerprint.sites)
    task = _task(declaration, preset, reasons)
    full = full_resolution(fingerprint, reasons)
    grid, batch_dice = _configuration(full, task, budget, reasons)
    found = patch_for_memory(grid, task, budget.memory_gb)
    _say_geometry(grid, found, budget, reasons)
    labelled = sum(site.labelled for site in fingerprint.sites.values())
    batch = batch_for_memory(found, grid, labelled, task, budget.memory_gb)
    passes = learning.passes(AlgorithmSettings(name=algorithm or "fedavg"), sites, budget)
    chosen = size(task, found, batch, passes, budget, reasons)
    rounds, per_round = communication_rounds(chosen.steps, len(sites), reasons)
    length = TrainingLength(per_round, chosen.steps * len(sites))
    recipe = training(found, chosen, length, batch_dice, declaration.dimension, budget, reasons)
    network = task.network(found, chosen.base)
    recipe = _precise_enough(recipe, network, reasons)
    _say_memory(network, recipe, budget, reasons)
    normalisation = intensity(fingerprint, reasons)
    annotated = annotated_at(fingerprint, reasons)
    reasons.say("agreement.privacy.mechanism", "none", "no epsilon was asked for: nothing is promised")
    private_fingerprint.add_noise_reasons(fingerprint, reasons)
    return Plan(
        budget=budget,
        agreement=Agreement(
            channels=declaration.channels,
            labels=declaration.labels,
            regions_class_order=declaration.regions_class_order,
            dimension=declaration.dimension,
            patients={name: site.patients for name, site in fingerprint.sites.items()},
            algorithm=learning.algorithm(algorithm, len(sites), reasons),
            training=rounds,
            privacy=Privacy(census_noise=fingerprint.noise.multiplier if fingerprint.noise else None),
            faults=fault_settings(len(sites), reasons),
            annotated=annotated,
        ),
        local=LocalPlan(geometry=_geometry(grid), intensity=normalisation, network=network, training=recipe),
        inference=Inference(mirror_axes=recipe.mirror_axes),
        reasons=reasons.lines,
    )


def _task(declaration: Declaration, preset: PresetRules, reasons: Reasons) -> NetworkTask:
    """What the network takes and gives; its outputs are told where they are not one for each entry of `labels`."""
    labels, entries = Labels.of(declaration), len(declaration.labels)
    if labels.channels != entries:
        kind = "one for each region, since regions overlap" if labels.is_regions else "none for ignore"
        why = f"{kind}; memory is counted for all {entries} entries of `labels` (nnU-Net)"
        reasons.say("local.network.classes", labels.channels, why)
    return NetworkTask(len(declaration.channels), labels.channels, preset, entries - labels.channels)


def check_memory(plan: Plan) -> None:
    """`ValidationErrors` if a plan, changed by hand, needs more memory than its budget has, with what would fit."""
    training, network, budget = plan.local.training, plan.local.network, plan.budget
    per_patch = memory_needed(network, training.patch_size, 1, PRESETS[budget.preset])
    # nnU-Net rounds a batch above the smallest to the nearest whole number: half a patch more than fits is in order
    needed = per_patch * (training.batch_size - (0.5 if training.batch_size > SMALLEST_BATCH else 0))
    if needed > budget.memory_gb:
        raise ValidationErrors(
            "the plan",
            [
                f"{training.batch_size} patches of {short(training.patch_size)} with {network.features[0]} features in "
                f"the first stage need about {needed:.2g} GB, the budget has {budget.memory_gb:g}; expected a smaller "
                "training.batch_size, training.patch_size or network.features, or a larger --memory"
            ],
        )


def _configuration(full: Grid, task: NetworkTask, budget: Budget, reasons: Reasons) -> tuple[Grid, bool]:
    """The grid to learn on, and whether Dice is taken over the batch: in 2d, or if a patch sees little (nnU-Net)."""
    chosen, why = preferred(full)
    if budget.configuration != "auto":
        chosen, why = budget.configuration, f"asked for; by itself the plan takes {chosen} ({why})"
    where = "local.geometry.configuration"
    if chosen == "2d":
        reasons.say(where, "2d", why)
        return replace(full, configuration="2d"), True
    coarse = _coarse(full, task, budget, wanted=chosen == "3d_lowres")
    if chosen == "3d_fullres":
        hint = f"; 3d_lowres would be {short(coarse.spacing_mm)} mm" if coarse else ""
        reasons.say(where, "3d_fullres", why + hint)
        return full, coarse is not None
    if coarse is None:
        found = "3d_lowres was asked for, but a patch at full resolution sees a quarter of the median case or more"
        raise ValidationErrors("the plan", [f"{found}; expected --configuration 3d_fullres"])
    reasons.say(where, "3d_lowres", why)
    why = "coarser, until a patch sees a quarter of a case"
    reasons.say("local.geometry.spacing_mm", short(coarse.spacing_mm), why)
    return coarse, False


def _coarse(full: Grid, task: NetworkTask, budget: Budget, wanted: bool) -> Grid | None:
    try:
        return low_resolution(full, lambda grid: patch_for_memory(grid, task, budget.memory_gb).patch)
    except ValidationErrors:
        if wanted:
            raise
        return None  # it would only have been mentioned


def _say_geometry(grid: Grid, found: Topology, budget: Budget, reasons: Reasons) -> None:
    shape = _geometry(grid).median_shape
    reasons.say("local.geometry.median_shape", shape, "median size of the cases on that grid")
    reasons.say(
        "local.training.patch_size",
        found.patch,
        f"the largest patch of the median image {shape[-grid.axes :]} that fits {budget.memory_gb:g} GB "
        f"({budget.preset}), a multiple of {found.divisor}",
    )
    reasons.say("local.network.strides", found.strides, "pool the finest axes while edges stay at 4 or more")


def _precise_enough(recipe: Training, network: Network, reasons: Reasons) -> Training:
    """In float32 where bfloat16 is not to be trusted."""
    if recipe.precision != "bfloat16" or not network.is_thin(recipe.patch_size):
        return recipe
    reasons.say(
        "local.training.precision", "float32", "a stage is two voxels deep: bfloat16 can be wrong there on a CPU"
    )
    return recipe.model_copy(update={"precision": "float32"})


def _say_memory(network: Network, recipe: Training, budget: Budget, reasons: Reasons) -> None:
    if "cpu" in budget.devices:
        needed = training_bytes(network, recipe.patch_size, recipe.batch_size, recipe.precision) / 1e9
        why = f"what a step takes in {recipe.precision} on a CPU, told from the layers, beside the process itself"
        reasons.say("local.network", f"{needed:.2g} GB", why)


def _geometry(grid: Grid) -> TargetGrid:
    z, y, x = (max(1, round(size)) for size in grid.median_shape)
    return TargetGrid(
        configuration=grid.configuration,
        transpose=grid.transpose,
        spacing_mm=grid.spacing_mm,
        median_shape=(z, y, x),
    )
