"""Fingerprints, and the plan that follows from them. Torch is read only where a machine's speed is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from autofed import plans
from autofed.case import disagreements, open_dataset, open_datasets
from autofed.files import PathLike
from autofed.fingerprints import Fingerprint, measure, merge
from autofed.parallel import Progress, silent
from autofed.planner import PRESETS, check_memory, make
from autofed.plans import Budget, Device, Plan, Speed
from autofed.problems import Problems, gathered, refuse


def fingerprint(
    site: PathLike,
    output: PathLike | None = None,
    *,
    speed: bool = False,
    device: str = "auto",
    processes: int = 1,
    progress: Progress = silent,
) -> Fingerprint:
    """What a hospital can compute alone and hand over: counts and sums, no case. Written to `output` if given.

    With `speed`, for a site that will train on its own machine, also how fast that is.
    """
    found = measure(open_dataset(site), processes=processes, progress=progress)
    if speed:
        found = found.with_speed(_speed(found, Budget(device=_device(device))))
    if output is not None:
        found.save(Path(output))
    return found


def plan(
    sources: Sequence[PathLike],
    output: PathLike | None = None,
    *,
    hours: float | None = None,
    memory_gb: float | None = None,
    device: str = "auto",
    algorithm: str = "fedavg",
    configuration: str = "auto",
    preset: str = "plain",
    settings: Mapping[str, Any] | None = None,
    processes: int = 1,
    progress: Progress = silent,
) -> Plan:
    """The plan for several sites, each given as its folder or as the fingerprint it handed over.

    `hours` is for all sites together on this machine, and for each at the same time if it handed over the speed of its
    own; without it a CPU gets one hour and an accelerator nnU-Net's full training. `memory_gb` defaults to what the
    preset was made for. `settings` maps fields of the plan to values set by hand. `Problems` names everything at once.
    """
    from autofed import algorithms

    _, _, budget = gathered(
        "plan",
        [
            partial(algorithms.find, algorithm, trusted=(algorithm,)),
            partial(refuse, "--set", plans.unknown_fields(settings or {})),
            partial(_budget, hours, memory_gb, device, configuration, preset),
        ],
    )
    merged = merge(_fingerprints(sources, processes, progress))
    made = make(merged, _measured(budget, merged), algorithm)
    made = change(made, None, settings or {})
    algorithms.make(made.agreement.algorithm, trusted=(algorithm,))
    if output is not None:
        made.save(Path(output))
    return made


def change(plan: PathLike | Plan, output: PathLike | None, settings: Mapping[str, Any]) -> Plan:
    """A plan with some fields set by hand, each recorded as a reason; written to `output` if given."""
    made = plan if isinstance(plan, Plan) else plans.load(plan)
    if settings:
        made = made.change(dict(settings))
        check_memory(made)
    if output is not None:
        made.save(Path(output))
    return made


def _device(wanted: str) -> Device:
    from autofed.devices import pick_device

    return pick_device(wanted)


def _budget(hours: float | None, memory_gb: float | None, device: str, configuration: str, preset: str) -> Budget:
    """What was asked for; memory that the preset was made for, if none was given."""
    wanted: dict[str, Any] = {"device": _device(device), "configuration": configuration, "preset": preset}
    if hours is not None:
        wanted["hours"] = hours
    if memory_gb is not None:
        wanted["memory_gb"] = memory_gb
    elif preset in PRESETS:
        wanted["memory_gb"] = PRESETS[preset].memory_gb
    return Budget.parse(wanted, "the budget")


def _measured(budget: Budget, merged: Fingerprint) -> Budget:
    """With the speeds that sites handed over, and this machine's if it has to train the others.

    Where a CPU trains and no hours were asked for, one hour.
    """
    speeds = {name: site.speed for name, site in merged.sites.items() if site.speed}
    here = None if len(speeds) == len(merged.sites) else _speed(merged, budget)
    budget = budget.model_copy(update={"site_speeds": speeds, "speed": here})
    return budget.model_copy(update={"hours": 1.0}) if budget.hours is None and "cpu" in budget.devices else budget


def _speed(found: Fingerprint, budget: Budget) -> Speed:
    """The speed of this machine on patches such as the plan will have, flat or not."""
    from autofed import speed

    draft = make(found, budget.model_copy(update={"hours": None}))
    return speed.measure_speed(budget.device, draft.local.axes, len(found.declaration.channels))


def _fingerprints(sources: Sequence[PathLike], processes: int, progress: Progress) -> list[Fingerprint]:
    """Fingerprints as they are, folders measured; the folders are checked against each other first, all at once."""
    if not sources:
        raise Problems("plan", ["no site was given; name the sites' folders or their fingerprints"])
    records = [Path(s) for s in sources if Path(s).suffix == ".json" and Path(s).is_file()]
    folders = [s for s in sources if Path(s) not in records]
    reading = [partial(Fingerprint.load, path) for path in records]
    *ready, datasets = gathered("the sites", [*reading, partial(open_datasets, folders)])
    declared = {", ".join(f.sites): f.declaration for f in ready} | {d.name: d.declaration() for d in datasets}
    refuse("the sites", disagreements(declared))
    measuring = [partial(measure, dataset, processes=processes, progress=progress) for dataset in datasets]
    return ready + gathered("the sites' data", measuring)
