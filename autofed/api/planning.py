"""Fingerprints, and the plan that follows from them. Torch is read only where a machine's speed is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack, get_args

from autofed import plans
from autofed.api.options import NoisedFingerprintKeywords, NoisedFingerprintOptions, PlanKeywords, PlanOptions, takes
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
    """What a hospital can compute alone and hand over: counts and sums, no case. Written to `output` if given.

    With `speed`, for a site that will train on its own machine, also how fast that is.
    """
    found = measure(open_dataset(site), processes=processes, progress=progress)
    if speed:
        found = found.with_speed(_measured_speed(found, Budget(device=_device_here(device))))
    if output is not None:
        found.save(Path(output))
    return found


@takes(NoisedFingerprintOptions)
def private_fingerprint(
    site: PathLike, output: PathLike | None = None, **keywords: Unpack[NoisedFingerprintKeywords]
) -> PrivateFingerprint:
    """What a hospital can hand over for a private plan of `epsilon`: counts with noise, charged to its ledger.

    That is in WORK/<site>. The same again for the same data and promise. `ValidationErrors` also if `work` or `epsilon`
    is missing.

    Args:
        site: The site's folder, in nnU-Net's raw layout.
        output: A JSON file to write it to; nothing is written without.
        **keywords: The fields of `autofed.api.options.NoisedFingerprintOptions`.
    """
    options = NoisedFingerprintOptions(**keywords)
    raise_if_any("--private-census", _census_problems(options.work, options.epsilon))
    noised = _counted_under_noise(options, open_dataset(site), processes=options.processes, progress=options.progress)
    if options.speed:
        budget = Budget(device=_device_here(options.device))
        noised = noised.with_speed(_measured_speed(to_fingerprint(noised), budget))
    if output is not None:
        noised.save(Path(output))
    return noised


def _census_problems(work: PathLike | None, epsilon: float | None) -> list[str]:
    problems = []
    if not work:
        problems.append("it is charged to the site's ledger; name --work WORK, where the prepared data will be")
    if epsilon is None:
        problems.append("it is part of a plan's promise; write the --epsilon of that plan, such as 8")
    return problems


@takes(PlanOptions)
def plan(sources: Sequence[PathLike], output: PathLike | None = None, **keywords: Unpack[PlanKeywords]) -> Plan:
    """The plan for several sites, each given as its folder or as the fingerprint it handed over.

    `hours` is for all sites together on this machine, and for each at the same time if it handed over the speed of its
    own; without it a CPU gets one hour and an accelerator nnU-Net's full training. A `device` that is not here is
    planned for without hours, or with the speed that its sites handed over or that is given. `like` is a run or a plan
    whose weights shall go on being trained at these sites: then grid, network and recipe are those of that plan, and
    so is the `algorithm` unless one is named. With `epsilon` network, steps and privacy parameters are planned for the
    promise, and refused where hardly anything would be learned, unless that is wanted (`even_if_hopeless`). Where the
    settings name a mechanism, it is only calibrated (see `change`). `ValidationErrors` names everything at once.

    Args:
        sources: Folders of sites in nnU-Net's raw layout, folders that hold such in `sites`, or fingerprints.
        output: A JSON file to write the plan to; nothing is written without.
        **keywords: The fields of `autofed.api.options.PlanOptions`.
    """
    options = PlanOptions(**keywords)
    guide, budget = _checked(options)
    merged = _merged(_fingerprints(sources, options), options.prior)
    made = _planned(merged, guide, _with_speeds(budget, merged, guide), options)
    _refuse_idle(made, options.algorithm)
    if output is not None:
        made.save(Path(output))
    return made


def _checked(options: PlanOptions) -> tuple[Plan | None, Budget]:
    """The plan to follow, if there is one, and the budget; `ValidationErrors` with all that is wrong with the
    options.
    """
    from autofed import algorithms

    settings, named = options.by_hand, options.algorithm
    with attempts("plan") as attempt:
        guide = attempt(_guide, options.like)
        attempt(algorithms.find, named or "fedavg", trusted=(named,) if named else ())
        attempt(raise_if_any, "--set", plans.unknown_fields(settings))
        budget = attempt(_budget, options)
        attempt(raise_if_any, "--like", _taken_already(options) if options.like else [])
        attempt(raise_if_any, "--epsilon", _no_promise(options.epsilon, options.delta, settings))
        missing = _census_problems(options.work, options.epsilon) if options.private_census else []
        attempt(raise_if_any, "--private-census", missing)
    return guide, budget


def _planned(merged: Fingerprint, guide: Plan | None, budget: Budget, options: PlanOptions) -> Plan:
    """The plan by the planner's rules, then with what is set by hand."""
    hopeless = options.even_if_hopeless
    if guide:
        made = follow(merged, guide, str(options.like), budget, options.algorithm, even_if_hopeless=hopeless)
    else:
        made = make(merged, budget, options.algorithm, even_if_hopeless=hopeless)
    if not options.by_hand:
        return made
    calibrated = (options.epsilon, options.delta) if _names_mechanism(options.by_hand) else (None, None)
    return change(made, None, options.by_hand, epsilon=calibrated[0], delta=calibrated[1])


def _refuse_idle(made: Plan, named: str | None) -> None:
    """`ValidationErrors` if the server's step does nothing under the algorithm; one that is named may be from
    elsewhere.
    """
    from autofed import algorithms
    from autofed.federation.server_optimiser import raise_if_idle

    chosen = algorithms.make(made.agreement.algorithm, trusted=(named,) if named else ())
    raise_if_idle(made.agreement.server, chosen, made.agreement.algorithm.name)


def change(
    plan: PathLike | Plan,
    output: PathLike | None,
    settings: Mapping[str, Any],
    *,
    epsilon: float | None = None,
    delta: float | None = None,
    even_if_hopeless: bool = False,
) -> Plan:
    """A plan with some fields set by hand, each recorded as a reason; written to `output` if given.

    Where it names a private mechanism, noise and promise are made one: the noise is calibrated for the `epsilon` at the
    `delta` (by default for those that the plan has), or, where the noise was set, its epsilon is computed. Without a
    delta it is the smaller of 1e-5 and a tenth of one over the patients of the largest site. An open plan for which no
    mechanism is set becomes the private one for its grid (`autofed.planner.make_private`).
    """
    made = plan if isinstance(plan, Plan) else plans.load(plan)
    raise_if_any("--epsilon", _no_promise(epsilon, delta, settings))
    if epsilon is not None and not made.agreement.privacy.is_private and not _names_mechanism(settings):
        made = make_private(made, epsilon, delta, even_if_hopeless=even_if_hopeless)
        epsilon = delta = None
    if settings:
        made = made.change(dict(settings))
        check_memory(made)
    if settings or epsilon is not None or delta is not None:
        made = _settled(made, settings, epsilon, delta)
    if output is not None:
        made.save(Path(output))
    return made


def _settled(made: Plan, settings: Mapping[str, Any], epsilon: float | None, delta: float | None) -> Plan:
    noise_is_given = _sets(settings, "noise_multiplier")
    wanted = made.agreement.privacy.epsilon if epsilon is None and _sets(settings, "epsilon") else epsilon
    problems = []
    if delta is not None and not made.agreement.privacy.is_private:
        problems.append("a delta belongs to an epsilon; write both, such as --epsilon 8 --delta 1e-5")
    if wanted is not None and noise_is_given:
        problems.append(_TWICE)
    raise_if_any("--epsilon", problems)
    if not made.agreement.privacy.is_private:
        return with_grade(made)
    from autofed.privacy import guarantee

    fields = guarantee.consistent_fields(made, wanted, delta, noise_is_given=noise_is_given)
    whys = (_CALIBRATED, _PROMISED, _PROMISED) if guarantee.NOISE in fields else (_COMPUTED, _COMPUTED)
    return with_grade(made.change(fields, dict(zip(fields, whys, strict=True))))


def _no_promise(epsilon: float | None, delta: float | None, settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with numbers that shall be a promise, by themselves and beside what was set by hand."""
    problems = []
    if epsilon is not None and not 0 < epsilon < math.inf:
        problems.append(f"found an epsilon of {epsilon:g}; write one above 0, such as 8")
    if delta is not None and not 0 < delta < 1:
        problems.append(f"found a delta of {delta:g}; write one between 0 and 1, such as 1e-5")
    if epsilon is not None and _sets(settings, "mechanism", "none"):
        problems.append("an epsilon was asked for, and the mechanism none, which promises nothing; leave one out")
    if epsilon is not None and _sets(settings, "noise_multiplier"):
        problems.append(_TWICE)
    if epsilon is not None and _sets(settings, "epsilon"):
        problems.append("an epsilon was asked for, and one was set; write one of both")
    return problems


def _names_mechanism(settings: Mapping[str, Any]) -> bool:
    return _sets(settings, "mechanism")


def _sets(settings: Mapping[str, Any], field: str, value: Any = None) -> bool:
    """Whether a field of the privacy is set by hand, by any of its names; to a `value` if one is given."""
    names = (field, f"privacy.{field}", f"agreement.privacy.{field}")
    return any(name in names and value in (None, found) for name, found in settings.items())


_TWICE = "an epsilon and a noise_multiplier were given; either follows from the other, so leave one out"

_CALIBRATED = "the least that keeps the promise over all steps and rounds, by the accountant"
_PROMISED = "the promise to every patient, for this training"
_COMPUTED = "what this noise promises over all steps and rounds, by the accountant"


def _guide(like: PathLike | None) -> Plan | None:
    """The plan to follow, by itself or inside a run."""
    if like is None:
        return None
    return plans.load(Path(like) / "plan.json" if Path(like).is_dir() else like)


def _preset(algorithm: str | None) -> str:
    """The network of the algorithm that was asked for; if that is none, that is said elsewhere."""
    from autofed import algorithms

    try:
        return algorithms.find(algorithm, trusted=(algorithm,)).preset if algorithm else "plain"
    except ValidationErrors:
        return "plain"


def _taken_already(options: PlanOptions) -> list[str]:
    """What cannot be asked for where the network is given."""
    asked = {
        "memory": options.memory_gb is not None,
        "configuration": options.configuration != "auto",
        "preset": options.preset is not None,
    }
    return [
        f"--{name} was asked for, but grid and network are those of the plan that is followed; leave out one of both"
        for name, is_asked in asked.items()
        if is_asked
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
    """What was asked for; memory that the preset was made for, if none was given."""
    preset = options.preset or _preset(options.algorithm)
    speed = None if options.speed is None else _given_speed(options.speed, options.device)
    # a device that is named need not be here: see `_with_speeds`
    is_known = speed or options.device in get_args(Device)
    device = speed.device if speed else options.device if is_known else _device_here(options.device)
    asked: dict[str, Any] = {"device": device, "configuration": options.configuration, "preset": preset}
    if not _names_mechanism(options.by_hand):
        promised = {"epsilon": options.epsilon, "delta": options.delta}
        asked |= {name: value for name, value in promised.items() if value is not None and 0 < value < math.inf}
    if options.hours is not None:
        asked["hours"] = options.hours
    if options.memory_gb is not None:
        asked["memory_gb"] = options.memory_gb
    elif preset in PRESETS:
        asked["memory_gb"] = PRESETS[preset].memory_gb
    return Budget.parse(asked, "the budget").model_copy(update={"speed": speed})


def _given_speed(given: PathLike | Speed, device: str) -> Speed:
    """A speed that was not measured here: a record, or a file with one."""
    speed = given if isinstance(given, Speed) else Speed.load(Path(given))
    fits = device in ("auto", speed.device)
    raise_if_any("--speed", [] if fits else [f"it is that of {speed.device}, but --device is {device}; leave one out"])
    return speed


def _with_speeds(budget: Budget, merged: Fingerprint, guide: Plan | None = None) -> Budget:
    """With the speeds that sites handed over, and the one given or this machine's for those that did not.

    Where a CPU trains and no hours were asked for, one hour. A device that is not here is not measured, and only a
    training as long as nnU-Net's can be planned for it then.
    """
    speeds = {name: site.speed for name, site in merged.sites.items() if site.speed}
    rest = [name for name in merged.sites if name not in speeds]
    here = budget.speed
    if rest and here is None:
        if _is_here(budget.device):
            here = _measured_speed(merged, budget, guide)
        else:
            raise_if_any("--hours", [] if budget.hours is None else [_unknown_speed(budget, rest)])
    budget = budget.model_copy(update={"site_speeds": speeds, "speed": here if rest else None})
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


def _measured_speed(found: Fingerprint, budget: Budget, guide: Plan | None = None) -> Speed:
    """The speed of this machine on patches such as the plan will have, flat or not."""
    from autofed.training import speed

    draft = guide or make(found, budget.model_copy(update={"hours": None, "epsilon": None, "delta": None}))
    return speed.measure_speed(budget.device, draft.local.axes, len(found.declaration.channels))


def _merged(found: Sequence[Fingerprint | PrivateFingerprint], prior: PathLike | None) -> Fingerprint:
    """All sites together; noised counts as the fingerprint that they stand for, with the prior where noise wins.

    Noised ones beside open ones are refused: a plan's promise counts the same census at every site.
    """
    opened = [one for one in found if isinstance(one, Fingerprint)]
    noised = [one for one in found if isinstance(one, PrivateFingerprint)]
    if opened and noised:
        sides = [", ".join(name for one in side for name in one.sites) for side in (noised, opened)]
        raise ValidationErrors(
            "the sites",
            [
                f"the fingerprints of {sides[0]} are noised, those of {sides[1]} are not; hand "
                "over all with --private-census, or none"
            ],
        )
    raise_if_any(
        "--prior", ["it helps noised fingerprints, and these are not; leave it out"] if prior and opened else []
    )
    return (
        to_fingerprint(private_fingerprints.merge(noised), plans.load(prior) if prior else None, str(prior))
        if noised
        else merge(opened)
    )


def _counted_under_noise(
    options: PlanOptions | NoisedFingerprintOptions, dataset: Dataset, *, processes: int, progress: Progress
) -> PrivateFingerprint:
    from autofed.api.private_fingerprinting import take_private_fingerprint

    return take_private_fingerprint(
        dataset, str(options.work), options.epsilon, options.delta, simulation=options.simulation,
        processes=processes, progress=progress,
    )  # fmt: skip


def _fingerprints(sources: Sequence[PathLike], options: PlanOptions) -> list[Fingerprint | PrivateFingerprint]:
    """Fingerprints as they are, folders measured; the folders are checked against each other first, all at once."""
    if not sources:
        raise ValidationErrors("plan", ["no site was given; name the sites' folders or their fingerprints"])
    records = [Path(s) for s in sources if Path(s).suffix == ".json" and Path(s).is_file()]
    folders = [s for s in sources if Path(s) not in records]
    with attempts("the sites' data") as attempt:
        ready = [attempt(_load, path) for path in records]
        datasets = attempt(open_datasets, folders)
    declared = {", ".join(f.sites): f.declaration for f in ready} | {d.name: d.declaration() for d in datasets}
    raise_if_any("the sites", disagreements(declared))
    counting: Callable[..., Fingerprint | PrivateFingerprint] = measure
    if options.private_census:
        counting = partial(_counted_under_noise, options)
    measuring = [partial(counting, d, processes=options.processes, progress=options.progress) for d in datasets]
    return ready + collect_errors("the sites' data", measuring)


def _load(path: Path) -> Fingerprint | PrivateFingerprint:
    """A fingerprint, noised or not."""
    value = read_json(path)
    noised = isinstance(value, dict) and "noise_multiplier" in value
    return (PrivateFingerprint if noised else Fingerprint).parse(value, str(path))
