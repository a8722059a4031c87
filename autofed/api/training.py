"""Training over all sites of a plan, on this machine or over Flower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from autofed import algorithms, plans
from autofed.api import initial_weights
from autofed.api.coordinator import Coordinator
from autofed.api.options import TrainKeywords, TrainOptions, takes
from autofed.api.public_images import load_site_plans, resolve_public_folder, with_public_images
from autofed.api.simulation import POOLED, Simulation, StepCounter
from autofed.data.splits import ALL, FOLDS
from autofed.errors import ValidationErrors, collect_errors, raise_if_any
from autofed.federation.node import open_data, open_public_of, workers_for
from autofed.federation.run_folder import Run, RunIdentity
from autofed.federation.server_optimiser import raise_if_idle
from autofed.files import PathLike
from autofed.messages import Arrays
from autofed.plans import Plan
from autofed.preprocessing import Store
from autofed.training.batches import PatchLoader
from autofed.training.devices import pick_device

CROSS_VALIDATION = "cv"


@takes(TrainOptions)
def train(plan: PathLike | Plan, work: PathLike | None, run: PathLike, **keywords: Unpack[TrainKeywords]) -> Run:
    """Train all sites of a plan, from the preprocessed data in `work`, into the folder `run`.

    With `resume` an interrupted run continues after its last finished round, with the same weights as if it had not
    been interrupted; with more `rounds` than before it is extended. `ValidationErrors` before any training if the plan,
    the preprocessed data and the run do not fit each other, or if the plan's noise does not give its guarantee. In a
    `simulation` the sites' own ledgers are not charged: the run has its own, marked as such.

    With `connection`, the name of a SuperLink in Flower's configuration, the sites are on machines of their own and
    `work` is None; `say` is called with each line that the SuperLink reports.

    Args:
        plan: The plan, or its file.
        work: The folder of the preprocessed data of every site; None with a `connection`.
        run: The folder of the run.
        **keywords: The fields of `autofed.api.options.TrainOptions`.
    """
    job = _open_job(plan, None if work is None else Path(work), Run(run), TrainOptions(**keywords))
    if job.work is None:
        _train_at_sites(job)
    else:
        _train_here(job, job.work)
    return job.run


@dataclass(frozen=True)
class _Job:
    """A training whose plan, data and run were checked against each other.

    `folds` are names, `public` is the folder of public images, and `site_plans` are those of sites with another network
    or grid. `extends`: the run exists and gets more rounds.
    """

    run: Run
    plan: Plan
    work: Path | None
    algorithm: algorithms.Algorithm
    folds: Sequence[str]
    options: TrainOptions
    public: Path | None
    site_plans: Mapping[str, Plan]
    stores: Mapping[str, Store]
    extends: bool

    def coordinator(self, device: str = "cpu") -> Coordinator:
        """The coordinator of this training. If sites share pseudo-labels, it trains a student on the device."""
        names = (POOLED,) if self.algorithm.centralised else tuple(sorted(self.plan.agreement.patients))
        identity = _identity(self.run, names, self.options.simulation, self.public)
        images = None if self.work is None else open_public_of(self.plan, self.public, self.work)
        return Coordinator(self.run, self.plan, self.algorithm, identity, images, device)

    def begin(self, coordinator: Coordinator) -> None:
        """Make the folder a run, if it is none yet, and save the plans of sites with another network or grid."""
        init = None if self.options.init is None else Path(self.options.init)
        _begin(coordinator, init, self.folds, self.work, extended=self.extends)
        for site, plan in self.site_plans.items():
            plan.save(self.run.folder / "sites" / site / "plan.json")


def _open_job(plan: PathLike | Plan, work: Path | None, run: Run, options: TrainOptions) -> _Job:
    """Check plan, data, run and options; `ValidationErrors` if they do not fit each other."""
    trusted = _trusted(options)
    result = _with_overrides(plan if isinstance(plan, Plan) else plans.load(plan), options.algorithm, None)
    public = resolve_public_folder(run, options.public)
    result = with_public_images(result, trusted, public, run)
    extends = options.resume and run.exists and options.rounds is not None
    result = (
        _with_more_rounds(run, result, options.rounds or 0)
        if extends
        else _with_overrides(result, None, options.rounds)
    )
    algorithm, folds = algorithms.make(result.agreement.algorithm, trusted), _fold_names(options.folds)
    raise_if_idle(result.agreement.server, algorithm, result.agreement.algorithm.name)
    raise_if_any("train", _location_problems(work, options, centralised=algorithm.centralised, folds=folds))
    site_plans = load_site_plans(run, result, options.site_plans or {}, is_labelling=algorithm.shares_pseudo_labels)
    raise_if_any(
        "train",
        [
            *_pseudo_label_problems(algorithm, result, options, site_plans),
            *_plan_problems(algorithm, result, site_plans),
        ],
    )
    stores = {} if work is None else _stores(work, result, site_plans)
    _refuse_other_run(run, run.plan() if extends else result, options)
    return _Job(run, result, work, algorithm, folds, options, public, site_plans, stores, extends)


def _trusted(options: TrainOptions) -> tuple[str, ...]:
    """The algorithm that the caller named may be from another package, if all sites train on this machine."""
    return (options.algorithm,) if options.algorithm and not options.connection else ()


def _train_here(job: _Job, work: Path) -> None:
    options, device = job.options, pick_device(job.options.device)
    coordinator = job.coordinator(device)
    loader = PatchLoader(workers_for(job.plan, device) if options.workers is None else options.workers)
    counter = StepCounter(job.plan, len(job.folds), options.progress, job.site_plans)
    simulation = Simulation(
        coordinator, job.stores, work, device, loader, _trusted(options), counter, options.simulation, job.public,
        job.site_plans,
    )  # fmt: skip
    simulation.check(job.folds)
    job.begin(coordinator)
    with loader:
        for fold in job.folds:
            simulation.train(fold)


def _train_at_sites(job: _Job) -> None:
    from autofed.api import over_flower

    options, coordinator = job.options, job.coordinator()
    job.begin(coordinator)
    for fold in job.folds:
        over_flower.submit(coordinator, fold, str(options.connection), options.say, options.progress)


def _location_problems(
    work: Path | None, options: TrainOptions, *, centralised: bool, folds: Sequence[str]
) -> list[str]:
    """Options that do not fit the place of the data: on this machine, or at sites behind a connection."""
    if options.connection is None:
        missing = "WORK, the preprocessed data of every site, is missing; name it, or write --connection for sites on "
        return [f"{missing}machines of their own"] if work is None else []
    problems = []
    if work is not None:
        problems.append(f"over --connection the data is at the sites; leave {work} out")
    if centralised:
        problems.append("an algorithm that needs all data in one place cannot run over --connection")
    if len(folds) > 1:
        problems.append(f"over --connection one fold is trained at a time, found {', '.join(folds)}; write one --fold, "
                        "then --resume with the next")  # fmt: skip
    if options.device != "auto" or options.workers is not None or options.simulation:
        problems.append(
            "over --connection every site has its own device, workers and ledger; leave out --device, --workers and "
            "--simulation"
        )
    return problems


def _pseudo_label_problems(
    algorithm: algorithms.Algorithm, plan: Plan, options: TrainOptions, site_plans: Mapping[str, Plan]
) -> list[str]:
    """Options that only an algorithm by pseudo-labels of public images has, or cannot have."""
    name = plan.agreement.algorithm.name
    if not algorithm.shares_pseudo_labels:
        options_set = [("--public", options.public), ("--site-plan", site_plans)]
        return [
            f"{option} is for sites that label public images; {name} shares weights"
            for option, value in options_set
            if value
        ]
    problems = []
    if options.init is not None:
        problems.append(f"with {name} every site starts from weights of its own; leave --init out")
    if site_plans and options.connection is not None:
        problems.append("over --connection every site has its own copy of the plan; leave --site-plan out")
    return problems


def _plan_problems(algorithm: algorithms.Algorithm, run_plan: Plan, site_plans: Mapping[str, Plan]) -> list[str]:
    """Requirements of the algorithm that the plan of the run, or that of a site, does not meet."""
    other_sites = ", ".join(site for site in sorted(run_plan.agreement.patients) if site not in site_plans)
    plans_by_site = {other_sites: run_plan, **site_plans} if other_sites else site_plans
    return [f"{sites}: {problem}" for sites, plan in plans_by_site.items() for problem in algorithm.plan_problems(plan)]


def _identity(folder: Run, sites: tuple[str, ...], simulation: bool, public: Path | None) -> RunIdentity:
    if folder.exists:
        return folder.identity()
    return RunIdentity(sites=sites, simulation=simulation, public="" if public is None else str(public.resolve()))


def _begin(
    coordinator: Coordinator, init: Path | None, folds: Sequence[str], work: Path | None, *, extended: bool
) -> None:
    """Make the folder a run, if it is none yet."""
    run, plan = coordinator.run, coordinator.plan
    weights: Arrays | None = None
    if init is not None:
        weights = initial_weights.load(init, coordinator, folds, work)
    elif not run.exists:
        raise_if_any("local.training.trained", initial_weights.random_start_problems(plan))
    if not run.exists:
        run.begin(plan, coordinator.identity, weights)
    elif extended:
        plan.save(run.folder / "plan.json")


def _fold_names(folds: Sequence[str]) -> list[str]:
    """The names of the folds, each once; `ValidationErrors` for unknown ones."""
    names = [n for fold in folds for n in ([str(k) for k in range(FOLDS)] if fold == CROSS_VALIDATION else [str(fold)])]
    unknown = [name for name in names if name != ALL and not name.isdecimal()]
    raise_if_any(
        "--fold", [f"there is no fold {name!r}; write all, cv, or a number from 0 to {FOLDS - 1}" for name in unknown]
    )
    return list(dict.fromkeys(name if name == ALL else str(int(name)) for name in names))


def _with_overrides(plan: Plan, algorithm: str | None, rounds: int | None) -> Plan:
    """The plan with the algorithm and the number of rounds of the options."""
    overrides: dict[str, Any] = {}
    if algorithm is not None and algorithm != plan.agreement.algorithm.name:
        overrides["algorithm.name"] = algorithm
        overrides["algorithm.settings"] = {}
    if rounds is not None and rounds != plan.agreement.training.rounds:
        is_private = plan.agreement.privacy.is_private
        raise_if_any("--rounds", [_OTHER_ROUNDS.format(rounds)] if is_private else [])
        overrides["training.rounds"] = rounds
    return plan.change(overrides) if overrides else plan


_OTHER_LEDGERS = {
    True: "the run was begun as a simulation, and charges ledgers of its own; add --simulation to continue it",
    False: "the run was begun on the sites' own ledgers; leave out --simulation to continue it",
}

_OTHER_ROUNDS = "the noise of a private plan is made for its rounds; write autofed plan PLAN --set training.rounds={}"


def _with_more_rounds(run: Run, plan: Plan, rounds: int) -> Plan:
    """The plan of a run extended to `rounds` rounds, unless it already has so many."""
    current = run.plan()
    if _without_length(current) != _without_length(plan):
        raise ValidationErrors(str(run.folder), [_ANOTHER_PLAN])
    length = current.agreement.training.rounds
    if rounds == length:
        return current
    unfinished = [f for f in run.folds() if run.finished(f) < length]
    raise_if_any(str(run.folder), [
        f"fold {f} has finished {run.finished(f)} of {length} rounds; finish it with --resume --fold {f} and the "
        "plan.json inside the run, then give more --rounds" for f in unfinished
    ])  # fmt: skip
    return current.extend(rounds)


_ANOTHER_PLAN = "the run follows another plan; resume it with the plan.json inside it and no other choices"


def _without_length(plan: Plan) -> Plan:
    training = plan.agreement.training.model_copy(update={"rounds": 1, "snapshots": (1,), "extended": ()})
    agreement = plan.agreement.model_copy(update={"training": training})
    return plan.without_reasons().model_copy(update={"agreement": agreement})


def _stores(work: Path, plan: Plan, site_plans: Mapping[str, Plan]) -> dict[str, Store]:
    """The preprocessed data of every site of the plan; one `ValidationErrors` names everything that is missing."""
    sites = sorted(plan.agreement.patients)
    return dict(
        zip(
            sites,
            collect_errors(
                "the preprocessed data", [partial(open_data, work, s, site_plans.get(s, plan)) for s in sites]
            ),
            strict=True,
        )
    )


def _refuse_other_run(run: Run, plan: Plan, options: TrainOptions) -> None:
    if not run.exists:
        run.refuse_foreign()
        return
    problems = []
    if not options.resume:
        problems.append("there is a run already; add --resume to continue it, or give another folder")
    elif run.plan().without_reasons() != plan.without_reasons():
        problems.append(_ANOTHER_PLAN)
    if run.identity().simulation != options.simulation:
        problems.append(_OTHER_LEDGERS[run.identity().simulation])
    if options.resume and options.init is not None:
        problems.append("the run has begun, so --init comes too late; leave it out, or give another folder")
    raise_if_any(str(run.folder), problems)
