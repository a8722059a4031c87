"""Training over all sites of a plan, on this machine or over Flower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from autofed import algorithms, plans
from autofed.batches import Feeder, Workers
from autofed.devices import pick_device
from autofed.exchange import Arrays
from autofed.federation.premises import ledger_path, open_data, open_public_of, run_of, workers_for
from autofed.federation.server import refuse_idle
from autofed.files import PathLike
from autofed.network import build, load_weights
from autofed.parallel import Progress, silent
from autofed.plans import Plan
from autofed.prepared import Store
from autofed.privacy.ledger import PrivacyLedger
from autofed.problems import Problems, gathered, refuse
from autofed.runs import Identity, Run, read_weights
from autofed.splits import ALL, FOLDS
from autofed.verbs import starts
from autofed.verbs.coordinator import Coordinator
from autofed.verbs.folds import POOLED, Folds, StepCounter
from autofed.verbs.labelling import own_plans, public_folder, with_public

CROSS_VALIDATION = "cv"


def train(
    plan: PathLike | Plan,
    work: PathLike | None,
    run: PathLike,
    *,
    algorithm: str | None = None,
    public: PathLike | None = None,
    site_plans: Mapping[str, PathLike | Plan] | None = None,
    rounds: int | None = None,
    folds: Sequence[str] = (ALL,),
    init: PathLike | None = None,
    resume: bool = False,
    device: str = "auto",
    workers: Workers | None = None,
    simulation: bool = False,
    connection: str | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda _: None,
) -> Run:
    """Train all sites of a plan on this machine, from the prepared data in `work`, into the folder `run`.

    `folds` are "all" (nobody is held out), numbers of parts of the patients that each site holds out, or "cv" for all
    five, one training after another. With `resume` an interrupted run goes on after its last finished round, with the
    same weights as if it had not been interrupted; with more `rounds` than before a run goes on for longer. `init` is
    a run or a file of weights to start from. `workers` make the patches: 0 for none beside the training itself,
    "thread" for one thread, or so many processes; by default a thread on a CPU and processes elsewhere. `Problems`
    before any training if the plan, the prepared data and the run do not fit each other, or if the plan's privacy is
    not what it promises. In a `simulation` the sites' own ledgers are left alone: the run has its own, marked as such.

    `public` is a folder of public images for an algorithm that labels them; the plan agrees on them by digest. With
    such an algorithm sites may have `site_plans`, with networks and grids of their own.

    With `connection`, the name of a SuperLink in Flower's configuration, the sites are on machines of their own and
    `work` is None; `say` is told what the SuperLink says.
    """
    folder, trusted = Run(run), (algorithm,) if algorithm and not connection else ()
    made = _with_choices(plan if isinstance(plan, Plan) else plans.load(plan), algorithm, None)
    shown = public_folder(folder, public)
    made = with_public(made, trusted, shown, folder)
    extended = resume and folder.exists and rounds is not None
    made = _extended(folder, made, rounds or 0) if extended else _with_choices(made, None, rounds)
    chosen, wanted = algorithms.make(made.agreement.algorithm, trusted), _numbered(folds)
    refuse_idle(made.agreement.server, chosen, made.agreement.algorithm.name)
    gathers = chosen.gathers
    here = (device, workers, simulation)
    refuse("train", _misplaced(connection, work, gathers=gathers, folds=wanted, here=here))
    own = own_plans(folder, made, site_plans or {}, is_labelling=chosen.labels_public)
    refuse("train", [*_misplaced_labels(chosen, made, public, init, own, connection), *_unfit(chosen, made, own)])
    stores = {} if work is None else _stores(Path(work), made, own)
    _refuse_other_run(folder, folder.plan() if extended else made, resume, init, simulation)
    names = (POOLED,) if gathers else tuple(sorted(made.agreement.patients))
    identity = _identity(folder, names, simulation, shown)
    picked = "cpu" if work is None else pick_device(device)
    pictures = None if work is None else open_public_of(made, shown, Path(work))
    coordinator = Coordinator(folder, made, chosen, identity, pictures, picked)
    train_fold: Callable[[str], None]
    until_the_end: AbstractContextManager = nullcontext()
    if work is None:
        from autofed.verbs import hospitals

        train_fold = partial(hospitals.submit, coordinator, connection=str(connection), say=say, progress=progress)
    else:
        feeder = until_the_end = Feeder(workers_for(made, picked) if workers is None else workers)
        counter = StepCounter(made, len(wanted), progress, own)
        course = Folds(coordinator, stores, Path(work), picked, feeder, trusted, counter, simulation, shown, own)
        course.check(wanted)
        train_fold = course.train
    _begin(coordinator, None if init is None else Path(init), wanted, work, extended=extended)
    for site, its in own.items():
        its.save(folder.folder / "sites" / site / "plan.json")
    with until_the_end:
        for fold in wanted:
            train_fold(fold)
    return folder


def _misplaced(
    connection: str | None, work: PathLike | None, *, gathers: bool, folds: Sequence[str], here: tuple[str, Any, bool]
) -> list[str]:
    """What is asked for here but belongs elsewhere: data lies on this machine, or at sites behind a connection."""
    if connection is None:
        missing = "WORK, the prepared data of every site, is missing; name it, or write --connection for sites on "
        return [f"{missing}machines of their own"] if work is None else []
    problems = []
    if work is not None:
        problems.append(f"over --connection the data is at the sites; leave {work} out")
    if gathers:
        problems.append("an algorithm that needs all data in one place cannot run over --connection")
    if len(folds) > 1:
        problems.append(f"over --connection one fold is trained at a time, found {', '.join(folds)}; write one --fold, "
                        "then --resume with the next")  # fmt: skip
    if here != ("auto", None, False):
        problems.append(
            "over --connection every site has its own device, workers and ledger; leave out --device, --workers and "
            "--simulation"
        )
    return problems


def _misplaced_labels(
    chosen: algorithms.Algorithm,
    made: Plan,
    public: PathLike | None,
    init: PathLike | None,
    own: Mapping[str, Plan],
    connection: str | None,
) -> list[str]:
    """What is asked for that does not go with an algorithm that labels public images, or goes with no other."""
    name = made.agreement.algorithm.name
    if not chosen.labels_public:
        asked = [("--public", public), ("--site-plan", own)]
        return [f"{option} is for sites that label public images; {name} shares weights" for option, given in asked
                if given]  # fmt: skip
    problems = []
    if init is not None:
        problems.append(f"with {name} every site starts from weights of its own, which no other has; leave --init out")
    if own and connection is not None:
        problems.append("over --connection every site has its own copy of the plan; leave --site-plan out")
    return problems


def _unfit(chosen: algorithms.Algorithm, made: Plan, own: Mapping[str, Plan]) -> list[str]:
    """What the algorithm needs and does not find: in the plan of the run, or in that of a site with its own."""
    others = ", ".join(site for site in sorted(made.agreement.patients) if site not in own)
    followed = {others: made, **own} if others else own
    return [f"{who}: {problem}" for who, plan in followed.items() for problem in chosen.plan_problems(plan)]


def _identity(folder: Run, sites: tuple[str, ...], simulation: bool, public: Path | None) -> Identity:
    if folder.exists:
        return folder.identity()
    return Identity(sites=sites, simulation=simulation, public="" if public is None else str(public.resolve()))


def _begin(
    coordinator: Coordinator, init: Path | None, folds: Sequence[str], work: PathLike | None, *, extended: bool
) -> None:
    """Make the folder a run, if it is none yet."""
    folder, made = coordinator.run, coordinator.plan
    start: Arrays | None = None
    if init is None and not folder.exists:
        refuse("local.training.trained", starts.senseless(made))
    elif init is not None:
        refuse("--init", starts.unreadable(init))
        kept = starts.kept_at_a_site(init, made)
        refuse("--init", [*_leaks(init, folds), *_uncounted(coordinator, init, work), *kept])
        start = read_weights(init)
        load_weights(build(made.local.network), start, f"--init {init}")
    if not folder.exists:
        folder.begin(made, coordinator.identity, start)
    elif extended:
        made.save(folder.folder / "plan.json")


def _numbered(folds: Sequence[str]) -> list[str]:
    """The folds by their names, each once; `Problems` names those that there cannot be."""
    names = [n for fold in folds for n in ([str(k) for k in range(FOLDS)] if fold == CROSS_VALIDATION else [str(fold)])]
    wrong = [name for name in names if name != ALL and not name.isdecimal()]
    refuse("--fold", [f"there is no fold {name!r}; write all, cv, or a number from 0 to {FOLDS - 1}" for name in wrong])
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
    if not coordinator.plan.agreement.privacy.promises or coordinator.identity.simulation or not init.is_dir():
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
    return any(run_of(charge.run) == run for charge in ledger.charges())


def _with_choices(made: Plan, algorithm: str | None, rounds: int | None) -> Plan:
    choices: dict[str, Any] = {}
    if algorithm is not None and algorithm != made.agreement.algorithm.name:
        choices["algorithm.name"] = algorithm
        choices["algorithm.settings"] = {}
    if rounds is not None and rounds != made.agreement.training.rounds:
        private = made.agreement.privacy.promises
        refuse("--rounds", [_OTHER_ROUNDS.format(rounds)] if private else [])
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
        raise Problems(str(folder.folder), [_ANOTHER_PLAN])
    length = current.agreement.training.rounds
    if rounds == length:
        return current
    unfinished = [f for f in folder.folds() if folder.finished(f) < length]
    refuse(str(folder.folder), [
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
            gathered("the prepared data", [partial(open_data, work, s, own.get(s, made)) for s in sites]),
            strict=True,
        )
    )


def _refuse_other_run(folder: Run, made: Plan, resume: bool, init: PathLike | None, simulation: bool) -> None:
    if not folder.exists:
        folder.refuse_foreign()
        return
    problems = []
    if not resume:
        problems.append("there is a run already; add --resume to go on with it, or give another folder")
    elif folder.plan().without_reasons() != made.without_reasons():
        problems.append(_ANOTHER_PLAN)
    if folder.identity().simulation != simulation:
        problems.append(_OTHER_LEDGERS[folder.identity().simulation])
    if resume and init is not None:
        problems.append("the run has begun, so --init comes too late; leave it out, or give another folder")
    refuse(str(folder.folder), problems)
