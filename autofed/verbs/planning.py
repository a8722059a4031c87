"""Fingerprints, and the plan that follows from them. Torch is read only where a machine's speed is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from autofed import census, plans
from autofed.case import Dataset, disagreements, open_dataset, open_datasets
from autofed.census import Census
from autofed.files import PathLike, read_json
from autofed.fingerprints import Fingerprint, measure, merge
from autofed.parallel import Progress, silent
from autofed.planner import PRESETS, check_memory, follow, graded, make, protect
from autofed.planner.census import complete
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


def noised_fingerprint(
    site: PathLike,
    output: PathLike | None = None,
    *,
    work: PathLike | None,
    epsilon: float | None,
    delta: float | None = None,
    simulation: bool = False,
    speed: bool = False,
    device: str = "auto",
    processes: int = 1,
    progress: Progress = silent,
) -> Census:
    """What a hospital can hand over for a private plan of `epsilon`: counts with noise, charged to its ledger.

    That is in WORK/<site>. The same again for the same data and promise. Written to `output` if given. `Problems` also
    if `work` or `epsilon` is missing.
    """
    from autofed.verbs.census import take

    refuse("--private-census", _census_problems(work, epsilon))
    wanted: dict[str, Any] = {"simulation": simulation, "processes": processes, "progress": progress}
    found = take(open_dataset(site), str(work), epsilon, delta, **wanted)
    if speed:
        found = found.with_speed(_speed(complete(found), Budget(device=_device(device))))
    if output is not None:
        found.save(Path(output))
    return found


def _census_problems(work: PathLike | None, epsilon: float | None) -> list[str]:
    problems = []
    if not work:
        problems.append("it is charged to the site's ledger; name --work WORK, where the prepared data will be")
    if epsilon is None:
        problems.append("it is part of a plan's promise; write the --epsilon of that plan, such as 8")
    return problems


def plan(
    sources: Sequence[PathLike],
    output: PathLike | None = None,
    *,
    hours: float | None = None,
    memory_gb: float | None = None,
    device: str = "auto",
    algorithm: str | None = None,
    configuration: str = "auto",
    preset: str | None = None,
    like: PathLike | None = None,
    settings: Mapping[str, Any] | None = None,
    epsilon: float | None = None,
    delta: float | None = None,
    even_if_hopeless: bool = False,
    private_census: bool = False,
    work: PathLike | None = None,
    simulation: bool = False,
    prior: PathLike | None = None,
    processes: int = 1,
    progress: Progress = silent,
) -> Plan:
    """The plan for several sites, each given as its folder or as the fingerprint it handed over.

    `hours` is for all sites together on this machine, and for each at the same time if it handed over the speed of its
    own; without it a CPU gets one hour and an accelerator nnU-Net's full training. The `preset` is the network
    of the algorithm (dcfed has its own) or else nnU-Net's plain one, unless it is named; `memory_gb` defaults to what
    it was made for. `settings` maps fields of the plan to values set by hand. `like` is a run or a plan whose weights
    shall go on being trained at these sites: then grid, network and recipe are those of that plan, and so is
    the `algorithm` unless one is named; else the planner chooses it. `epsilon` and `delta` are the promise to every
    patient: network, steps and privacy parameters are planned for it, and refused where hardly anything would be,
    unless that is wanted (`even_if_hopeless`). Where the settings name a mechanism, it is only calibrated (see
    `change`). With `private_census` the folders are counted under noise, charged to the sites' ledgers in `work` (those
    of a `simulation` count for nobody). Where noised fingerprints do not tell enough, the plan `prior` does. `Problems`
    names everything at once.
    """
    from autofed import algorithms
    from autofed.federation.server import refuse_idle

    trusted = (algorithm,) if algorithm else ()
    by_hand = _names_mechanism(settings or {})
    promised = {} if by_hand else {"epsilon": epsilon, "delta": delta}
    guide, _, _, budget, *_ = gathered(
        "plan",
        [
            partial(_guide, like),
            partial(algorithms.find, algorithm or "fedavg", trusted=trusted),
            partial(refuse, "--set", plans.unknown_fields(settings or {})),
            partial(_budget, hours, memory_gb, device, configuration, preset or _preset(algorithm), promised),
            partial(refuse, "--like", _taken_already(memory_gb, configuration, preset) if like else []),
            partial(refuse, "--epsilon", _no_promise(epsilon, delta, settings or {})),
            partial(refuse, "--private-census", _census_problems(work, epsilon) if private_census else []),
        ],
    )
    counting = _noised(work, epsilon, delta, simulation) if private_census else measure
    merged = _merged(_fingerprints(sources, counting, processes, progress), prior)
    budget = _measured(budget, merged, guide)
    if guide:
        made = follow(merged, guide, str(like), budget, algorithm, even_if_hopeless=even_if_hopeless)
    else:
        made = make(merged, budget, algorithm, even_if_hopeless=even_if_hopeless)
    if settings:
        made = change(made, None, settings, epsilon=epsilon if by_hand else None, delta=delta if by_hand else None)
    chosen = algorithms.make(made.agreement.algorithm, trusted=trusted)
    refuse_idle(made.agreement.server, chosen, made.agreement.algorithm.name)
    if output is not None:
        made.save(Path(output))
    return made


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
    mechanism is set becomes the private one for its grid (`autofed.planner.protect`).
    """
    made = plan if isinstance(plan, Plan) else plans.load(plan)
    refuse("--epsilon", _no_promise(epsilon, delta, settings))
    if epsilon is not None and not made.agreement.privacy.promises and not _names_mechanism(settings):
        made = protect(made, epsilon, delta, even_if_hopeless=even_if_hopeless)
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
    if delta is not None and not made.agreement.privacy.promises:
        problems.append("a delta belongs to an epsilon; write both, such as --epsilon 8 --delta 1e-5")
    if wanted is not None and noise_is_given:
        problems.append(_TWICE)
    refuse("--epsilon", problems)
    if not made.agreement.privacy.promises:
        return graded(made)
    from autofed.privacy import promise

    found = promise.settled(made, wanted, delta, noise_is_given=noise_is_given)
    noise = {name: value for name, value in found.items() if name.endswith("noise_multiplier")}
    said = {name: value for name, value in found.items() if name not in noise}
    return graded(made.change(noise, _CALIBRATED).change(said, _PROMISED) if noise else made.change(said, _COMPUTED))


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
    except Problems:
        return "plain"


def _taken_already(memory_gb: float | None, configuration: str, preset: str | None) -> list[str]:
    """What cannot be asked for where the network is given."""
    asked = {"memory": memory_gb is not None, "configuration": configuration != "auto", "preset": preset is not None}
    return [
        f"--{name} was asked for, but grid and network are those of the plan that is followed; leave out one of both"
        for name, wanted in asked.items()
        if wanted
    ]


def _device(wanted: str) -> Device:
    from autofed.devices import pick_device

    return pick_device(wanted)


def _budget(
    hours: float | None,
    memory_gb: float | None,
    device: str,
    configuration: str,
    preset: str,
    promised: Mapping[str, float | None],
) -> Budget:
    """What was asked for; memory that the preset was made for, if none was given."""
    wanted: dict[str, Any] = {"device": _device(device), "configuration": configuration, "preset": preset}
    wanted |= {name: value for name, value in promised.items() if value is not None and 0 < value < math.inf}
    if hours is not None:
        wanted["hours"] = hours
    if memory_gb is not None:
        wanted["memory_gb"] = memory_gb
    elif preset in PRESETS:
        wanted["memory_gb"] = PRESETS[preset].memory_gb
    return Budget.parse(wanted, "the budget")


def _measured(budget: Budget, merged: Fingerprint, guide: Plan | None = None) -> Budget:
    """With the speeds that sites handed over, and this machine's if it has to train the others.

    Where a CPU trains and no hours were asked for, one hour.
    """
    speeds = {name: site.speed for name, site in merged.sites.items() if site.speed}
    here = None if len(speeds) == len(merged.sites) else _speed(merged, budget, guide)
    budget = budget.model_copy(update={"site_speeds": speeds, "speed": here})
    return budget.model_copy(update={"hours": 1.0}) if budget.hours is None and "cpu" in budget.devices else budget


def _speed(found: Fingerprint, budget: Budget, guide: Plan | None = None) -> Speed:
    """The speed of this machine on patches such as the plan will have, flat or not."""
    from autofed import speed

    draft = guide or make(found, budget.model_copy(update={"hours": None, "epsilon": None, "delta": None}))
    return speed.measure_speed(budget.device, draft.local.axes, len(found.declaration.channels))


def _merged(found: Sequence[Fingerprint | Census], prior: PathLike | None) -> Fingerprint:
    """All sites together; noised counts as the fingerprint that they stand for, with the prior where noise wins.

    Noised ones beside open ones are refused: a plan's promise counts the same census at every site.
    """
    opened = [one for one in found if isinstance(one, Fingerprint)]
    noised = [one for one in found if isinstance(one, Census)]
    if opened and noised:
        sides = [", ".join(name for one in side for name in one.sites) for side in (noised, opened)]
        raise Problems("the sites", [f"the fingerprints of {sides[0]} are noised, those of {sides[1]} are not; hand "
                                     "over all with --private-census, or none"])  # fmt: skip
    refuse("--prior", ["it helps noised fingerprints, and these are not; leave it out"] if prior and opened else [])
    return complete(census.merge(noised), plans.load(prior) if prior else None, str(prior)) if noised else merge(opened)


def _noised(
    work: PathLike | None, epsilon: float | None, delta: float | None, simulation: bool
) -> Callable[..., Census]:
    """How the folders are counted under noise."""
    from autofed.verbs.census import take

    def counting(dataset: Dataset, **wanted: Any) -> Census:
        return take(dataset, str(work), epsilon, delta, simulation=simulation, **wanted)

    return counting


def _fingerprints(
    sources: Sequence[PathLike], counting: Callable[..., Fingerprint | Census], processes: int, progress: Progress
) -> list[Fingerprint | Census]:
    """Fingerprints as they are, folders measured; the folders are checked against each other first, all at once."""
    if not sources:
        raise Problems("plan", ["no site was given; name the sites' folders or their fingerprints"])
    records = [Path(s) for s in sources if Path(s).suffix == ".json" and Path(s).is_file()]
    folders = [s for s in sources if Path(s) not in records]
    reading = [partial(_load, path) for path in records]
    *ready, datasets = gathered("the sites", [*reading, partial(open_datasets, folders)])
    declared = {", ".join(f.sites): f.declaration for f in ready} | {d.name: d.declaration() for d in datasets}
    refuse("the sites", disagreements(declared))
    measuring = [partial(counting, dataset, processes=processes, progress=progress) for dataset in datasets]
    return ready + gathered("the sites' data", measuring)


def _load(path: Path) -> Fingerprint | Census:
    """A fingerprint, noised or not."""
    value = read_json(path)
    noised = isinstance(value, dict) and "noise_multiplier" in value
    return (Census if noised else Fingerprint).parse(value, str(path))
