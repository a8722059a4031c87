"""Fingerprints, and the plan that follows from them. Torch is imported only to measure the speed of a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack, get_args

from autofed import plans
from autofed.api.options import (
    PlanKeywords,
    PlanOptions,
    PrivateFingerprintKeywords,
    PrivateFingerprintOptions,
    takes,
)
from autofed.data import Dataset, disagreements, open_dataset, open_datasets
from autofed.errors import ValidationErrors, attempts, collect_errors, raise_if_any
from autofed.files import PathLike, read_json
from autofed.fingerprints import Fingerprint, measure, merge
from autofed.fingerprints import private as private_fingerprints
from autofed.fingerprints.private import PrivateFingerprint
from autofed.parallel import Progress, silent
from autofed.planner import PRESETS, check_memory, follow, make, make_private, with_grade
from autofed.planner.private_fingerprint import to_fingerprint
from autofed.plans import Budget, Device, Plan, Speed


def fingerprint(
    site: PathLike,
    output: PathLike | None = None,
    *,
    speed: bool = False,
    device: str = "auto",
    processes: int = 1,
    progress: Progress = silent,
) -> Fingerprint:
    """The fingerprint of a site, which it computes alone and can hand over: counts and sums, no case.

    Args:
        site: The site's folder, in nnU-Net's raw layout.
        output: A JSON file to write it to; nothing is written without.
        speed: Whether to measure the speed of this machine too, for a site that will train on it.
        device: The device whose speed is measured: auto (the fastest there is), cpu, cuda or mps.
        processes: How many processes read the cases.
        progress: Called with the stage, how many cases are done, and how many there are.
    """
    counts = measure(open_dataset(site), processes=processes, progress=progress)
    if speed:
        counts = counts.with_speed(_measured_speed(counts, Budget(device=_device_here(device))))
    if output is not None:
        counts.save(Path(output))
    return counts


@takes(PrivateFingerprintOptions)
def private_fingerprint(
    site: PathLike, output: PathLike | None = None, **keywords: Unpack[PrivateFingerprintKeywords]
) -> PrivateFingerprint:
    """The private fingerprint of a site, for a plan with the guarantee `epsilon`: noisy counts, charged to its ledger.

    The ledger is in WORK/<site>. The same data and guarantee give the same fingerprint again, without another charge.
    `ValidationErrors` also if `work` or `epsilon` is missing.

    Args:
        site: The site's folder, in nnU-Net's raw layout.
        output: A JSON file to write it to; nothing is written without.
        **keywords: The fields of `autofed.api.options.PrivateFingerprintOptions`.
    """
    options = PrivateFingerprintOptions(**keywords)
    raise_if_any("--private-census", _private_fingerprint_problems(options.work, options.epsilon))
    counts = _measure_privately(options, open_dataset(site), processes=options.processes, progress=options.progress)
    if options.speed:
        budget = Budget(device=_device_here(options.device))
        counts = counts.with_speed(_measured_speed(to_fingerprint(counts), budget))
    if output is not None:
        counts.save(Path(output))
    return counts


def _private_fingerprint_problems(work: PathLike | None, epsilon: float | None) -> list[str]:
    problems = []
    if not work:
        problems.append("it is charged to the site's ledger; name --work WORK, the folder for preprocessed data")
    if epsilon is None:
        problems.append("it is part of a plan's guarantee; write the --epsilon of that plan, such as 8")
    return problems


@takes(PlanOptions)
def plan(sources: Sequence[PathLike], output: PathLike | None = None, **keywords: Unpack[PlanKeywords]) -> Plan:
    """The plan for several sites, each given as its folder or as its fingerprint.

    `hours` is the time of all sites together if they train on this machine, and of each in parallel if its fingerprint
    has a speed; without it a CPU gets one hour and an accelerator nnU-Net's full training. For a `device` that is not
    here, `hours` need a speed: in the fingerprints, or as an option. `like` is a run or a plan whose weights will be
    trained further at these sites: grid, network and training settings are copied from it, and so is the algorithm
    unless one is named. With `epsilon`, network, steps and privacy parameters are planned for that guarantee, and a
    plan by which hardly anything would be learned is refused unless `even_if_hopeless`. A mechanism in the settings is
    only calibrated (see `change`). `ValidationErrors` names all problems at once.

    Args:
        sources: Folders of sites in nnU-Net's raw layout, folders that hold such in `sites`, or fingerprints.
        output: A JSON file to write the plan to; nothing is written without.
        **keywords: The fields of `autofed.api.options.PlanOptions`.
    """
    options = PlanOptions(**keywords)
    guide, budget = _check_options(options)
    merged = _merge(_fingerprints(sources, options), options.prior)
    result = _make_plan(merged, guide, _with_speeds(budget, merged, guide), options)
    _raise_if_idle(result, options.algorithm)
    if output is not None:
        result.save(Path(output))
    return result


def _check_options(options: PlanOptions) -> tuple[Plan | None, Budget]:
    """The plan to copy from, if there is one, and the budget; `ValidationErrors` with all problems of the options."""
    from autofed import algorithms

    settings, algorithm = options.by_hand, options.algorithm
    with attempts("plan") as attempt:
        guide = attempt(_load_guide, options.like)
        attempt(algorithms.find, algorithm or "fedavg", trusted=(algorithm,) if algorithm else ())
        attempt(raise_if_any, "--set", plans.unknown_fields(settings))
        budget = attempt(_budget, options)
        attempt(raise_if_any, "--like", _like_problems(options) if options.like else [])
        attempt(raise_if_any, "--epsilon", _privacy_problems(options.epsilon, options.delta, settings))
        problems = _private_fingerprint_problems(options.work, options.epsilon) if options.private_census else []
        attempt(raise_if_any, "--private-census", problems)
    return guide, budget


def _make_plan(merged: Fingerprint, guide: Plan | None, budget: Budget, options: PlanOptions) -> Plan:
    """The plan by the planner's rules, then with what is set by hand."""
    force = options.even_if_hopeless
    if guide:
        result = follow(merged, guide, str(options.like), budget, options.algorithm, even_if_hopeless=force)
    else:
        result = make(merged, budget, options.algorithm, even_if_hopeless=force)
    if not options.by_hand:
        return result
    calibrated = (options.epsilon, options.delta) if _names_mechanism(options.by_hand) else (None, None)
    return change(result, None, options.by_hand, epsilon=calibrated[0], delta=calibrated[1])


def _raise_if_idle(plan: Plan, trusted_name: str | None) -> None:
    """`ValidationErrors` if the server optimiser has no effect under the algorithm.

    An algorithm that the caller named (`trusted_name`) may be from another package.
    """
    from autofed import algorithms
    from autofed.federation.server_optimiser import raise_if_idle

    algorithm = algorithms.make(plan.agreement.algorithm, trusted=(trusted_name,) if trusted_name else ())
    raise_if_idle(plan.agreement.server, algorithm, plan.agreement.algorithm.name)


def change(
    plan: PathLike | Plan,
    output: PathLike | None,
    settings: Mapping[str, Any],
    *,
    epsilon: float | None = None,
    delta: float | None = None,
    even_if_hopeless: bool = False,
) -> Plan:
    """A plan with some fields set by hand, each recorded as a reason.

    If the plan is private, noise and guarantee stay consistent: the noise is calibrated for `epsilon` and `delta` (by
    default those of the plan), or, if the noise is set, its epsilon is computed. An open plan becomes private by
    `epsilon` alone, on its own grid (`autofed.planner.make_private`).

    Args:
        plan: The plan, or its file.
        output: A JSON file to write the new plan to; nothing is written without.
        settings: Fields of the plan, by their paths or unique endings, and their values.
        epsilon: The guarantee to calibrate the noise for.
        delta: Its delta; by default the plan's, or else the smaller of 1e-5 and 1/(10 n), n patients at the
            largest site.
        even_if_hopeless: Whether to make a plan private even if hardly anything would be learned.

    Raises:
        ValidationErrors: If a field or value is unknown, the plan no longer fits the memory, or guarantee and noise
            contradict each other.
    """
    result = plan if isinstance(plan, Plan) else plans.load(plan)
    raise_if_any("--epsilon", _privacy_problems(epsilon, delta, settings))
    if epsilon is not None and not result.agreement.privacy.is_private and not _names_mechanism(settings):
        result = make_private(result, epsilon, delta, even_if_hopeless=even_if_hopeless)
        epsilon = delta = None
    if settings:
        result = result.change(dict(settings))
        check_memory(result)
    if settings or epsilon is not None or delta is not None:
        result = _with_consistent_privacy(result, settings, epsilon, delta)
    if output is not None:
        result.save(Path(output))
    return result


def _with_consistent_privacy(
    plan: Plan, settings: Mapping[str, Any], epsilon: float | None, delta: float | None
) -> Plan:
    noise_is_given = _sets(settings, "noise_multiplier")
    target = plan.agreement.privacy.epsilon if epsilon is None and _sets(settings, "epsilon") else epsilon
    problems = []
    if delta is not None and not plan.agreement.privacy.is_private:
        problems.append("a delta belongs to an epsilon; write both, such as --epsilon 8 --delta 1e-5")
    if target is not None and noise_is_given:
        problems.append(_EPSILON_AND_NOISE)
    raise_if_any("--epsilon", problems)
    if not plan.agreement.privacy.is_private:
        return with_grade(plan)
    from autofed.privacy import guarantee

    fields = guarantee.consistent_fields(plan, target, delta, noise_is_given=noise_is_given)
    reasons = (_CALIBRATED, _GUARANTEED, _GUARANTEED) if guarantee.NOISE in fields else (_COMPUTED, _COMPUTED)
    return with_grade(plan.change(fields, dict(zip(fields, reasons, strict=True))))


def _privacy_problems(epsilon: float | None, delta: float | None, settings: Mapping[str, Any]) -> list[str]:
    """Problems of a guarantee, by itself and together with the fields that were set by hand."""
    problems = []
    if epsilon is not None and not 0 < epsilon < math.inf:
        problems.append(f"found an epsilon of {epsilon:g}; write one above 0, such as 8")
    if delta is not None and not 0 < delta < 1:
        problems.append(f"found a delta of {delta:g}; write one between 0 and 1, such as 1e-5")
    if epsilon is not None and _sets(settings, "mechanism", "none"):
        problems.append("an epsilon was given, and the mechanism none, which guarantees nothing; leave one out")
    if epsilon is not None and _sets(settings, "noise_multiplier"):
        problems.append(_EPSILON_AND_NOISE)
    if epsilon is not None and _sets(settings, "epsilon"):
        problems.append("an epsilon was given twice, by --epsilon and by --set; leave one out")
    return problems


def _names_mechanism(settings: Mapping[str, Any]) -> bool:
    return _sets(settings, "mechanism")


def _sets(settings: Mapping[str, Any], field: str, value: Any = None) -> bool:
    """Whether a privacy field is set by hand, under any of its names; to a given `value`, unless that is None."""
    names = (field, f"privacy.{field}", f"agreement.privacy.{field}")
    return any(name in names and value in (None, setting) for name, setting in settings.items())


_EPSILON_AND_NOISE = "an epsilon and a noise_multiplier were given; either follows from the other, so leave one out"

_CALIBRATED = "the least that keeps the promise over all steps and rounds, by the accountant"
_GUARANTEED = "the promise to every patient, for this training"
_COMPUTED = "what this noise promises over all steps and rounds, by the accountant"


def _load_guide(like: PathLike | None) -> Plan | None:
    """The plan to copy from: a file, or that of a run."""
    if like is None:
        return None
    return plans.load(Path(like) / "plan.json" if Path(like).is_dir() else like)


def _preset_of(algorithm: str | None) -> str:
    """The network preset of an algorithm; that of an unknown one is "plain", and `_check_options` reports it."""
    from autofed import algorithms

    try:
        return algorithms.find(algorithm, trusted=(algorithm,)).preset if algorithm else "plain"
    except ValidationErrors:
        return "plain"


def _like_problems(options: PlanOptions) -> list[str]:
    """Options that contradict `like`, which fixes grid and network."""
    options_set = {
        "memory": options.memory_gb is not None,
        "configuration": options.configuration != "auto",
        "preset": options.preset is not None,
    }
    return [
        f"--{name} was given, but --like copies grid and network from another plan; leave one out"
        for name, is_set in options_set.items()
        if is_set
    ]


def _device_here(name: str) -> Device:
    from autofed.training.devices import pick_device

    return pick_device(name)


def _is_here(device: Device) -> bool:
    try:
        return _device_here(device) == device
    except ValidationErrors:
        return False


def _budget(options: PlanOptions) -> Budget:
    """The budget by the options; the memory is by default what the preset was made for."""
    preset = options.preset or _preset_of(options.algorithm)
    speed = None if options.speed is None else _load_speed(options.speed, options.device)
    # a device that is named need not be on this machine: see `_with_speeds`
    is_known = speed or options.device in get_args(Device)
    device = speed.device if speed else options.device if is_known else _device_here(options.device)
    fields: dict[str, Any] = {"device": device, "configuration": options.configuration, "preset": preset}
    if not _names_mechanism(options.by_hand):
        guarantee = {"epsilon": options.epsilon, "delta": options.delta}
        fields |= {name: value for name, value in guarantee.items() if value is not None and 0 < value < math.inf}
    if options.hours is not None:
        fields["hours"] = options.hours
    if options.memory_gb is not None:
        fields["memory_gb"] = options.memory_gb
    elif preset in PRESETS:
        fields["memory_gb"] = PRESETS[preset].memory_gb
    return Budget.parse(fields, "the budget").model_copy(update={"speed": speed})


def _load_speed(source: PathLike | Speed, device: str) -> Speed:
    """A speed that was measured elsewhere: a record, or a file with one."""
    speed = source if isinstance(source, Speed) else Speed.load(Path(source))
    fits = device in ("auto", speed.device)
    raise_if_any("--speed", [] if fits else [f"it is that of {speed.device}, but --device is {device}; leave one out"])
    return speed


def _with_speeds(budget: Budget, merged: Fingerprint, guide: Plan | None = None) -> Budget:
    """The budget with the speeds in the fingerprints, and with the given or this machine's speed for the other sites.

    If a CPU trains and no hours are given, one hour. The speed of a device that is not here cannot be measured; without
    hours the plan is for nnU-Net's full training.
    """
    speeds = {name: site.speed for name, site in merged.sites.items() if site.speed}
    unmeasured = [name for name in merged.sites if name not in speeds]
    local_speed = budget.speed
    if unmeasured and local_speed is None:
        if _is_here(budget.device):
            local_speed = _measured_speed(merged, budget, guide)
        else:
            raise_if_any("--hours", [] if budget.hours is None else [_unknown_speed(budget, unmeasured)])
    budget = budget.model_copy(update={"site_speeds": speeds, "speed": local_speed if unmeasured else None})
    return budget.model_copy(update={"hours": 1.0}) if budget.hours is None and "cpu" in budget.devices else budget


def _unknown_speed(budget: Budget, sites: Sequence[str]) -> str:
    return (
        f"{budget.device} is not here, so its speed cannot be measured, and {budget.hours:g} h cannot be divided into "
        f"steps for {', '.join(sites)}; hand over fingerprints that were made there with `autofed fingerprint SITE "
        f"--speed`, or write its speed into a file, --speed speed.json, as {SPEED_BY_HAND}; without --hours the plan "
        "is for nnU-Net's full training"
    )


SPEED_BY_HAND = (
    '{"device": "cuda", "precision": "bfloat16", "seconds_per_step": 0.01, "seconds_per_gigaelement": 0.01, '
    '"seconds_per_teraflop": 0.05, "seconds_per_megavoxel": 0.02}'
)


def _measured_speed(counts: Fingerprint, budget: Budget, guide: Plan | None = None) -> Speed:
    """The speed of this machine on patches of the plan's dimension, 2D or 3D."""
    from autofed.training import speed

    draft = guide or make(counts, budget.model_copy(update={"hours": None, "epsilon": None, "delta": None}))
    return speed.measure_speed(budget.device, draft.local.axes, len(counts.declaration.channels))


def _merge(fingerprints: Sequence[Fingerprint | PrivateFingerprint], prior: PathLike | None) -> Fingerprint:
    """All sites together. Private fingerprints are completed from the prior where noise hides the counts.

    Private and exact ones are not mixed: a plan's guarantee counts the same private fingerprint at every site.
    """
    exact = [fingerprint for fingerprint in fingerprints if isinstance(fingerprint, Fingerprint)]
    private = [fingerprint for fingerprint in fingerprints if isinstance(fingerprint, PrivateFingerprint)]
    if exact and private:
        sides = [", ".join(name for fingerprint in side for name in fingerprint.sites) for side in (private, exact)]
        raise ValidationErrors(
            "the sites",
            [
                f"the fingerprints of {sides[0]} are private, those of {sides[1]} are not; make "
                "all with --private-census, or none"
            ],
        )
    raise_if_any(
        "--prior",
        ["it completes private fingerprints, and these are not private; leave it out"] if prior and exact else [],
    )
    return (
        to_fingerprint(private_fingerprints.merge(private), plans.load(prior) if prior else None, str(prior))
        if private
        else merge(exact)
    )


def _measure_privately(
    options: PlanOptions | PrivateFingerprintOptions, dataset: Dataset, *, processes: int, progress: Progress
) -> PrivateFingerprint:
    from autofed.api.private_fingerprinting import take_private_fingerprint

    return take_private_fingerprint(
        dataset, str(options.work), options.epsilon, options.delta, simulation=options.simulation,
        processes=processes, progress=progress,
    )  # fmt: skip


def _fingerprints(sources: Sequence[PathLike], options: PlanOptions) -> list[Fingerprint | PrivateFingerprint]:
    """The fingerprints in files, and those of folders, which are checked against each other before any is measured."""
    if not sources:
        raise ValidationErrors("plan", ["no site was given; name the sites' folders or their fingerprints"])
    records = [Path(s) for s in sources if Path(s).suffix == ".json" and Path(s).is_file()]
    folders = [s for s in sources if Path(s) not in records]
    with attempts("the sites' data") as attempt:
        loaded = [attempt(_load, path) for path in records]
        datasets = attempt(open_datasets, folders)
    declared = {", ".join(f.sites): f.declaration for f in loaded} | {d.name: d.declaration() for d in datasets}
    raise_if_any("the sites", disagreements(declared))
    count_cases: Callable[..., Fingerprint | PrivateFingerprint] = measure
    if options.private_census:
        count_cases = partial(_measure_privately, options)
    tasks = [partial(count_cases, d, processes=options.processes, progress=options.progress) for d in datasets]
    return loaded + collect_errors("the sites' data", tasks)


def _load(path: Path) -> Fingerprint | PrivateFingerprint:
    """A fingerprint from its file, private or exact."""
    value = read_json(path)
    is_private = isinstance(value, dict) and "noise_multiplier" in value
    return (PrivateFingerprint if is_private else Fingerprint).parse(value, str(path))
