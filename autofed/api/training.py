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
from autofed.federation.node import ledger_path, open_data, open_public_of, run_id_of, workers_for
from autofed.federation.run_folder import Run, RunIdentity, read_weights
from autofed.federation.server_optimiser import raise_if_idle
from autofed.files import PathLike
from autofed.messages import Arrays
from autofed.plans import Plan
from autofed.preprocessing import Store
from autofed.privacy.ledger import PrivacyLedger
from autofed.training.batches import PatchLoader
from autofed.training.devices import pick_device
from autofed.training.network import build, load_weights

CROSS_VALIDATION = "cv"


@takes(TrainOptions)
def train(plan: PathLike | Plan, work: PathLike | None, run: PathLike, **keywords: Unpack[TrainKeywords]) -> Run:
    """Train all sites of a plan, from the prepared data in `work`, into the folder `run`.

    With `resume` an interrupted run goes on after its last finished round, with the same weights as if it had not been
    interrupted; with more `rounds` than before a run goes on for longer. `ValidationErrors` before any training if the
    plan, the prepared data and the run do not fit each other, or if the plan's privacy is not what it promises. In a
    `simulation` the sites' own ledgers are left alone: the run has its own, marked as such.

    With `connection`, the name of a SuperLink in Flower's configuration, the sites are on machines of their own and
    `work` is None; `say` is told what the SuperLink says.

    Args:
        plan: The plan, or its file.
        work: The folder of the prepared data of every site; None with a `connection`.
        run: The folder that the run is kept in.
        **keywords: The fields of `autofed.api.options.TrainOptions`.
    """
    job = _job(plan, None if work is None else Path(work), Run(run), TrainOptions(**keywords))
    if job.work is None:
        _train_at_sites(job)
    else:
        _train_here(job, job.work)
    return job.run


@dataclass(frozen=True)
class _Job:
    """What is to be trained, once plan, data and run are known to fit each other.

    `folds` are those asked for by their names, `public` is the folder of public images and `own` holds the plans of
    sites with a network or grid of their own, if there are such. `longer` says that the run goes on for more rounds.
    """

    run: Run
    plan: Plan
    work: Path | None
    algorithm: algorithms.Algorithm
    folds: Sequence[str]
    options: TrainOptions
    public: Path | None
    own: Mapping[str, Plan]
    stores: Mapping[str, Store]
    longer: bool

    def coordinator(self, device: str = "cpu") -> Coordinator:
        """The coordinator of this training; it trains a student on the device, where labels are shared."""
        names = (POOLED,) if self.algorithm.centralised else tuple(sorted(self.plan.agreement.patients))
        identity = _identity(self.run, names, self.options.simulation, self.public)
        images = None if self.work is None else open_public_of(self.plan, self.public, self.work)
        return Coordinator(self.run, self.plan, self.algorithm, identity, images, device)

    def begin(self, coordinator: Coordinator) -> None:
        """Make the folder a run, if it is none yet, with the sites' own plans."""
        init = None if self.options.init is None else Path(self.options.init)
        _begin(coordinator, init, self.folds, self.work, extended=self.longer)
        for site, its in self.own.items():
            its.save(self.run.folder / "sites" / site / "plan.json")


def _job(plan: PathLike | Plan, work: Path | None, run: Run, options: TrainOptions) -> _Job:
    """`ValidationErrors` if the plan, the data, the run and what was asked for do not fit each other."""
    trusted = _trusted(options)
    made = _with_choices(plan if isinstance(plan, Plan) else plans.load(plan), options.algorithm, None)
    public = resolve_public_folder(run, options.public)
    made = with_public_images(made, trusted, public, run)
    longer = options.resume and run.exists and options.rounds is not None
    made = _extended(run, made, options.rounds or 0) if longer else _with_choices(made, None, options.rounds)
    chosen, folds = algorithms.make(made.agreement.algorithm, trusted), _numbered(options.folds)
    raise_if_idle(made.agreement.server, chosen, made.agreement.algorithm.name)
    raise_if_any("train", _misplaced(work, options, centralised=chosen.centralised, folds=folds))
    own = load_site_plans(run, made, options.site_plans or {}, is_labelling=chosen.shares_pseudo_labels)
    raise_if_any("train", [*_misplaced_labels(chosen, made, options, own), *_unfit(chosen, made, own)])
    stores = {} if work is None else _stores(work, made, own)
    _refuse_other_run(run, run.plan() if longer else made, options)
    return _Job(run, made, work, chosen, folds, options, public, own, stores, longer)


def _trusted(options: TrainOptions) -> tuple[str, ...]:
    """The algorithm that was named here may be from elsewhere, where all sites train on this machine."""
    return (options.algorithm,) if options.algorithm and not options.connection else ()


def _train_here(job: _Job, work: Path) -> None:
    options, device = job.options, pick_device(job.options.device)
    coordinator = job.coordinator(device)
    loader = PatchLoader(workers_for(job.plan, device) if options.workers is None else options.workers)
    counter = StepCounter(job.plan, len(job.folds), options.progress, job.own)
    course = Simulation(
        coordinator, job.stores, work, device, loader, _trusted(options), counter, options.simulation, job.public,
        job.own,
    )  # fmt: skip
    course.check(job.folds)
    job.begin(coordinator)
    with loader:
        for fold in job.folds:
            course.train(fold)


def _train_at_sites(job: _Job) -> None:
    from autofed.api import over_flower

    options, coordinator = job.options, job.coordinator()
    job.begin(coordinator)
    for fold in job.folds:
        over_flower.submit(coordinator, fold, str(options.connection), options.say, options.progress)


def _misplaced(work: Path | None, options: TrainOptions, *, centralised: bool, folds: Sequence[str]) -> list[str]:
    """What is asked for here but belongs elsewhere: data lies on this machine, or at sites behind a connection."""
    if options.connection is None:
        missing = "WORK, the prepared data of every site, is missing; name it, or write --connection for sites on "
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


def _misplaced_labels(
    chosen: algorithms.Algorithm, made: Plan, options: TrainOptions, own: Mapping[str, Plan]
) -> list[str]:
    """What is asked for that does not go with an algorithm that labels public images, or goes with no other."""
    name = made.agreement.algorithm.name
    if not chosen.shares_pseudo_labels:
        asked = [("--public", options.public), ("--site-plan", own)]
        return [f"{option} is for sites that label public images; {name} shares weights" for option, given in asked
                if given]  # fmt: skip
    problems = []
    if options.init is not None:
        problems.append(f"with {name} every site starts from weights of its own, which no other has; leave --init out")
    if own and options.connection is not None:
        problems.append("over --connection every site has its own copy of the plan; leave --site-plan out")
    return problems


def _unfit(chosen: algorithms.Algorithm, made: Plan, own: Mapping[str, Plan]) -> list[str]:
    """What the algorithm needs and does not find: in the plan of the run, or in that of a site with its own."""
    others = ", ".join(site for site in sorted(made.agreement.patients) if site not in own)
    followed = {others: made, **own} if others else own
    return [f"{who}: {problem}" for who, plan in followed.items() for problem in chosen.plan_problems(plan)]


def _identity(folder: Run, sites: tuple[str, ...], simulation: bool, public: Path | None) -> RunIdentity:
    if folder.exists:
        return folder.identity()
    return RunIdentity(sites=sites, simulation=simulation, public="" if public is None else str(public.resolve()))


def _begin(
    coordinator: Coordinator, init: Path | None, folds: Sequence[str], work: PathLike | None, *, extended: bool
) -> None:
    """Make the folder a run, if it is none yet."""
    folder, made = coordinator.run, coordinator.plan
    start: Arrays | None = None
    if init is None and not folder.exists:
        raise_if_any("local.training.trained", initial_weights.random_start_problems(made))
    elif init is not None:
        raise_if_any("--init", initial_weights.unreadable_problems(init))
        kept = initial_weights.site_only_problems(init, made)
        raise_if_any("--init", [*_leaks(init, folds), *_uncounted(coordinator, init, work), *kept])
        start = read_weights(init)
        load_weights(build(made.local.network), start, f"--init {init}")
    if not folder.exists:
        folder.begin(made, coordinator.identity, start)
    elif extended:
        made.save(folder.folder / "plan.json")


def _numbered(folds: Sequence[str]) -> list[str]:
    """The folds by their names, each once; `ValidationErrors` names those that there cannot be."""
    names = [n for fold in folds for n in ([str(k) for k in range(FOLDS)] if fold == CROSS_VALIDATION else [str(fold)])]
    wrong = [name for name in names if name != ALL and not name.isdecimal()]
    raise_if_any(
        "--fold", [f"there is no fold {name!r}; write all, cv, or a number from 0 to {FOLDS - 1}" for name in wrong]
    )
    return list(dict.fromkeys(name if name == ALL else str(int(name)) for name in names))


def _leaks(init: Path, folds: Sequence[str]) -> list[str]:
    """A run has learned from patients that a fold of this one would hold out."""
    held = [fold for fold in folds if fold != ALL]
    if not held or not init.is_dir():
        return []
    return [
        f"the run {init} has trained on patients that fold {', '.join(held)} holds out, so its scores would be worth "
        "nothing; train with --fold all, or name a file with weights of other patients"
    ]


def _uncounted(coordinator: Coordinator, init: Path, work: PathLike | None) -> list[str]:
    """What a run to start from has told of the same patients, and no ledger that counts has written down."""
    if not coordinator.plan.agreement.privacy.is_private or coordinator.identity.simulation or not init.is_dir():
        return []
    run = Run(init)
    same = sorted(set(run.plan().agreement.patients) & set(coordinator.plan.agreement.patients))
    if run.identity().simulation and same:
        return [f"{init} is a simulation on patients of {', '.join(same)}, and no ledger knows what it tells of them; "
                "start from another run, or simulate this one too"]  # fmt: skip
    paths = [ledger_path(Path(work), site) for site in same] if work else []
    unknown = [p for p in paths if not p.is_file() or not _knows(PrivacyLedger.existing(p), run.identity().id)]
    return [f"{init} was trained on patients of {path.parent.name}, but {path} knows nothing of it; start from another "
            "run, or train it again from this WORK" for path in unknown]  # fmt: skip


def _knows(ledger: PrivacyLedger, run: str) -> bool:
    return any(run_id_of(charge.run) == run for charge in ledger.charges())


def _with_choices(made: Plan, algorithm: str | None, rounds: int | None) -> Plan:
    choices: dict[str, Any] = {}
    if algorithm is not None and algorithm != made.agreement.algorithm.name:
        choices["algorithm.name"] = algorithm
        choices["algorithm.settings"] = {}
    if rounds is not None and rounds != made.agreement.training.rounds:
        private = made.agreement.privacy.is_private
        raise_if_any("--rounds", [_OTHER_ROUNDS.format(rounds)] if private else [])
        choices["training.rounds"] = rounds
    return made.change(choices) if choices else made


_OTHER_LEDGERS = {
    True: "the run was begun as a simulation, and charges ledgers of its own; add --simulation to go on with it",
    False: "the run was begun on the sites' own ledgers; leave out --simulation to go on with it",
}

_OTHER_ROUNDS = "the noise of a private plan is made for its rounds; write autofed plan PLAN --set training.rounds={}"


def _extended(folder: Run, made: Plan, rounds: int) -> Plan:
    """The plan of a run that goes on to `rounds` rounds, whether or not its plan says so already."""
    current = folder.plan()
    if _without_length(current) != _without_length(made):
        raise ValidationErrors(str(folder.folder), [_ANOTHER_PLAN])
    length = current.agreement.training.rounds
    if rounds == length:
        return current
    unfinished = [f for f in folder.folds() if folder.finished(f) < length]
    raise_if_any(str(folder.folder), [
        f"fold {f} has finished {folder.finished(f)} of {length} rounds; finish it with --resume --fold {f} and the "
        "plan.json inside the run, then ask for more" for f in unfinished
    ])  # fmt: skip
    return current.extend(rounds)


_ANOTHER_PLAN = "the run follows another plan; resume it with the plan.json inside it and no other choices"


def _without_length(made: Plan) -> Plan:
    training = made.agreement.training.model_copy(update={"rounds": 1, "snapshots": (1,), "extended": ()})
    agreement = made.agreement.model_copy(update={"training": training})
    return made.without_reasons().model_copy(update={"agreement": agreement})


def _stores(work: Path, made: Plan, own: Mapping[str, Plan]) -> dict[str, Store]:
    """The prepared data of every site of the plan; all that is missing is named at once."""
    sites = sorted(made.agreement.patients)
    return dict(
        zip(
            sites,
            collect_errors("the prepared data", [partial(open_data, work, s, own.get(s, made)) for s in sites]),
            strict=True,
        )
    )


def _refuse_other_run(folder: Run, made: Plan, options: TrainOptions) -> None:
    if not folder.exists:
        folder.refuse_foreign()
        return
    problems = []
    if not options.resume:
        problems.append("there is a run already; add --resume to go on with it, or give another folder")
    elif folder.plan().without_reasons() != made.without_reasons():
        problems.append(_ANOTHER_PLAN)
    if folder.identity().simulation != options.simulation:
        problems.append(_OTHER_LEDGERS[folder.identity().simulation])
    if options.resume and options.init is not None:
        problems.append("the run has begun, so --init comes too late; leave it out, or give another folder")
    raise_if_any(str(folder.folder), problems)
