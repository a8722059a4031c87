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
from autofed.planner import private_fingerprint
from autofed.planner.algorithm import algorithm_settings, passes_per_step
from autofed.planner.annotations import partial_annotations
from autofed.planner.checks import data_problems, structure_problems
from autofed.planner.following import follow
from autofed.planner.forecast import EXPECTED_LEARNING, Forecast, SiteForecast, forecast
from autofed.planner.grids import Grid, full_resolution, low_resolution, preferred_configuration
from autofed.planner.hours import SMALLEST_BATCH, network_size
from autofed.planner.intensities import intensity
from autofed.planner.presets import PRESETS, PresetRules
from autofed.planner.private import GRADED, make_private, with_grade
from autofed.planner.reasons import Reasons, format_axes
from autofed.planner.schedules import TrainingLength, communication_rounds, fault_settings, training_recipe
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
    """The plan for the data described by a (merged) fingerprint, within a budget; for an `algorithm` if one is named.

    With an epsilon in the budget it is private (`make_private`). `ValidationErrors` if there is nothing to learn from,
    or if nothing can be planned within the budget.
    """
    budget = budget or Budget()
    plan = _plan_without_privacy(fingerprint, budget, algorithm)
    if budget.epsilon is None:
        return plan
    return make_private(plan, budget.epsilon, budget.delta, fingerprint=fingerprint, even_if_hopeless=even_if_hopeless)


def _plan_without_privacy(fingerprint: Fingerprint, budget: Budget, algorithm: str | None) -> Plan:
    raise_if_any("the plan", [*data_problems(fingerprint, budget), *structure_problems(fingerprint)])
    reasons, preset = Reasons(), PRESETS[budget.preset]
    declaration, sites = fingerprint.declaration, tuple(fingerprint.sites)
    task = _task(declaration, preset, reasons)
    full_grid = full_resolution(fingerprint, reasons)
    grid, batch_dice = _grid_and_batch_dice(full_grid, task, budget, reasons)
    topology = patch_for_memory(grid, task, budget.memory_gb)
    _add_geometry_reasons(grid, topology, budget, reasons)
    labelled_cases = sum(site.labelled for site in fingerprint.sites.values())
    batch = batch_for_memory(topology, grid, labelled_cases, task, budget.memory_gb)
    passes = passes_per_step(AlgorithmSettings(name=algorithm or "fedavg"), sites, budget)
    size = network_size(task, topology, batch, passes, budget, reasons)
    rounds, per_round = communication_rounds(size.steps, len(sites), reasons)
    length = TrainingLength(per_round, size.steps * len(sites))
    recipe = training_recipe(topology, size, length, batch_dice, declaration.dimension, budget, reasons)
    network = task.network(topology, size.base_features)
    recipe = _with_safe_precision(recipe, network, reasons)
    _add_memory_reason(network, recipe, budget, reasons)
    normalisation = intensity(fingerprint, reasons)
    annotated = partial_annotations(fingerprint, reasons)
    reasons.record("agreement.privacy.mechanism", "none", "no epsilon was asked for: nothing is promised")
    private_fingerprint.add_noise_reasons(fingerprint, reasons)
    return Plan(
        budget=budget,
        agreement=Agreement(
            channels=declaration.channels,
            labels=declaration.labels,
            regions_class_order=declaration.regions_class_order,
            dimension=declaration.dimension,
            patients={name: site.patients for name, site in fingerprint.sites.items()},
            algorithm=algorithm_settings(algorithm, len(sites), reasons),
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
    """Inputs and outputs of the network, with a reason where outputs are not one for each entry of `labels`."""
    labels, entries = Labels.of(declaration), len(declaration.labels)
    if labels.channels != entries:
        kind = "one for each region, since regions overlap" if labels.is_regions else "none for ignore"
        why = f"{kind}; memory is counted for all {entries} entries of `labels` (nnU-Net)"
        reasons.record("local.network.classes", labels.channels, why)
    return NetworkTask(len(declaration.channels), labels.channels, preset, entries - labels.channels)


def check_memory(plan: Plan) -> None:
    """`ValidationErrors` if a plan that was changed by hand needs more memory than its budget has."""
    training, network, budget = plan.local.training, plan.local.network, plan.budget
    per_patch = memory_needed(network, training.patch_size, 1, PRESETS[budget.preset])
    # nnU-Net rounds a batch above the smallest to the nearest whole number: half a patch more than fits is in order
    needed = per_patch * (training.batch_size - (0.5 if training.batch_size > SMALLEST_BATCH else 0))
    if needed > budget.memory_gb:
        raise ValidationErrors(
            "the plan",
            [
                f"{training.batch_size} patches of {format_axes(training.patch_size)} with {network.features[0]} "
                f"features in the first stage need about {needed:.2g} GB, the budget has {budget.memory_gb:g}; "
                "expected a smaller training.batch_size, training.patch_size or network.features, or a larger --memory"
            ],
        )


def _grid_and_batch_dice(full_grid: Grid, task: NetworkTask, budget: Budget, reasons: Reasons) -> tuple[Grid, bool]:
    """The grid to learn on, and whether Dice is taken over the batch: in 2d, or if a patch sees little (nnU-Net)."""
    configuration, why = preferred_configuration(full_grid)
    if budget.configuration != "auto":
        configuration, why = budget.configuration, f"asked for; by itself the plan takes {configuration} ({why})"
    where = "local.geometry.configuration"
    if configuration == "2d":
        reasons.record(where, "2d", why)
        return replace(full_grid, configuration="2d"), True
    coarse_grid = _low_resolution(full_grid, task, budget, required=configuration == "3d_lowres")
    if configuration == "3d_fullres":
        hint = f"; 3d_lowres would be {format_axes(coarse_grid.spacing_mm)} mm" if coarse_grid else ""
        reasons.record(where, "3d_fullres", why + hint)
        return full_grid, coarse_grid is not None
    if coarse_grid is None:
        problem = "3d_lowres was asked for, but a patch at full resolution sees a quarter of the median case or more"
        raise ValidationErrors("the plan", [f"{problem}; expected --configuration 3d_fullres"])
    reasons.record(where, "3d_lowres", why)
    why = "coarser, until a patch sees a quarter of a case"
    reasons.record("local.geometry.spacing_mm", format_axes(coarse_grid.spacing_mm), why)
    return coarse_grid, False


def _low_resolution(full_grid: Grid, task: NetworkTask, budget: Budget, required: bool) -> Grid | None:
    try:
        return low_resolution(full_grid, lambda grid: patch_for_memory(grid, task, budget.memory_gb).patch)
    except ValidationErrors:
        if required:
            raise
        return None  # it would only have been mentioned in a reason


def _add_geometry_reasons(grid: Grid, topology: Topology, budget: Budget, reasons: Reasons) -> None:
    shape = _geometry(grid).median_shape
    reasons.record("local.geometry.median_shape", shape, "median size of the cases on that grid")
    reasons.record(
        "local.training.patch_size",
        topology.patch,
        f"the largest patch of the median image {shape[-grid.axes :]} that fits {budget.memory_gb:g} GB "
        f"({budget.preset}), a multiple of {topology.divisor}",
    )
    reasons.record("local.network.strides", topology.strides, "pool the finest axes while edges stay at 4 or more")


def _with_safe_precision(recipe: Training, network: Network, reasons: Reasons) -> Training:
    """The recipe in float32 where bfloat16 is not reliable."""
    if recipe.precision != "bfloat16" or not network.is_thin(recipe.patch_size):
        return recipe
    reasons.record(
        "local.training.precision", "float32", "a stage is two voxels deep: bfloat16 can be wrong there on a CPU"
    )
    return recipe.model_copy(update={"precision": "float32"})


def _add_memory_reason(network: Network, recipe: Training, budget: Budget, reasons: Reasons) -> None:
    if "cpu" in budget.devices:
        needed = training_bytes(network, recipe.patch_size, recipe.batch_size, recipe.precision) / 1e9
        why = f"what a step takes in {recipe.precision} on a CPU, told from the layers, beside the process itself"
        reasons.record("local.network", f"{needed:.2g} GB", why)


def _geometry(grid: Grid) -> TargetGrid:
    z, y, x = (max(1, round(size)) for size in grid.median_shape)
    return TargetGrid(
        configuration=grid.configuration,
        transpose=grid.transpose,
        spacing_mm=grid.spacing_mm,
        median_shape=(z, y, x),
    )
