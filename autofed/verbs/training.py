"""Training over all sites of a plan, on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autofed import algorithms, plans
from autofed.batches import Feeder, Workers, memory_bytes
from autofed.devices import machine_memory_bytes, pick_device
from autofed.federation.server import refuse_idle
from autofed.files import PathLike
from autofed.labels import Labels
from autofed.network import build, load_weights
from autofed.parallel import Progress, silent
from autofed.plans import Plan
from autofed.prepared import Store, open_store
from autofed.problems import Problems, refuse
from autofed.runs import Identity, Run, read_weights
from autofed.splits import ALL, FOLDS
from autofed.verbs.folds import POOLED, Folds, StepCounter

CROSS_VALIDATION = "cv"

MOST_WORKERS = 12
"""More processes than these are never busy (nnU-Net's default)."""


def train(
    plan: PathLike | Plan,
    work: PathLike,
    run: PathLike,
    *,
    algorithm: str | None = None,
    rounds: int | None = None,
    folds: Sequence[str] = (ALL,),
    init: PathLike | None = None,
    resume: bool = False,
    device: str = "auto",
    workers: Workers | None = None,
    progress: Progress = silent,
) -> Run:
    """Train all sites of a plan on this machine, round by round, into the folder `run`.

    `folds` are "all" (nobody is held out), numbers of parts of the patients that each site holds out, or "cv" for all
    five, one training after another. With `resume` an interrupted run goes on after its last finished round, with the
    same weights as if it had not been interrupted; with more `rounds` than before a run goes on for longer. `init` is
    a run or a file of weights to start from. `workers` make the patches: 0 for none beside the training itself,
    "thread" for one thread, or so many processes; by default a thread on a CPU and processes elsewhere. `Problems`
    before any training if the plan, the prepared data and the run do not fit each other.
    """
    folder, trusted = Run(run), (algorithm,) if algorithm else ()
    made = _with_choices(plan if isinstance(plan, Plan) else plans.load(plan), algorithm, None)
    extended = resume and folder.exists and rounds is not None
    made = _extended(folder, made, rounds or 0) if extended else _with_choices(made, None, rounds)
    chosen, wanted = algorithms.make(made.agreement.algorithm, trusted), _numbered(folds)
    refuse_idle(made.agreement.server, chosen, made.agreement.algorithm.name)
    stores = _stores(Path(work), made)
    _refuse_other_run(folder, folder.plan() if extended else made, resume, init)
    names = (POOLED,) if algorithms.gathers(chosen) else tuple(stores)
    identity = folder.identity() if folder.exists else Identity(sites=names)
    counter = StepCounter(made, len(wanted), progress)
    picked = pick_device(device)
    feeder = Feeder(_workers(made, picked) if workers is None else workers)
    course = Folds(folder, made, chosen, identity, stores, Path(work), picked, feeder, trusted, counter)
    course.check(wanted)
    start = None
    if init is not None:
        refuse("--init", _leaks(Path(init), wanted))
        start = read_weights(Path(init))
        load_weights(build(made.local.network), start, f"--init {init}")
    if not folder.exists:
        folder.begin(made, identity, start)
    elif extended:
        made.save(folder.folder / "plan.json")
    with feeder:
        for fold in wanted:
            course.train(fold)
    return folder


def _workers(made: Plan, device: str) -> Workers:
    """Who makes the patches if nobody says so: a thread beside a CPU's training, as many processes as fit beside a GPU.

    They may take a quarter of the memory, with what a process takes by itself.
    """
    if device == "cpu":
        return "thread"
    training, channels = made.local.training, len(made.agreement.channels)
    most = min(MOST_WORKERS, (os.cpu_count() or 1) - 1)
    fitting = (n for n in range(most, 0, -1) if memory_bytes(training, channels, n) <= machine_memory_bytes() / 4)
    return next(fitting, "thread")


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


def _with_choices(made: Plan, algorithm: str | None, rounds: int | None) -> Plan:
    choices: dict[str, Any] = {}
    if algorithm is not None and algorithm != made.agreement.algorithm.name:
        choices["algorithm.name"] = algorithm
        choices["algorithm.settings"] = {}
    if rounds is not None and rounds != made.agreement.training.rounds:
        choices["training.rounds"] = rounds
    return made.change(choices) if choices else made


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


def _stores(work: Path, made: Plan) -> dict[str, Store]:
    """The prepared data of every site of the plan; all that is missing is named at once."""
    stores: dict[str, Store] = {}
    known, problems = Labels.of(made.agreement), []
    for site, patients in sorted(made.agreement.patients.items()):
        try:
            stores[site] = open_store(work, site, made.local)
            found = len(stores[site].patients)
            if found != patients:
                problems.append(f"{site} has {found} patients with labels, the plan says {patients}; plan again")
            here, planned = stores[site].annotated, made.agreement.annotated.get(site, ())
            if known.with_annotated(here) != known.with_annotated(planned):
                problems.append(f"{site} annotated other structures than the plan says; plan and preprocess again")
        except Problems as error:
            problems += [f"{error.about}: {p}" for p in error.problems]
    refuse("the prepared data", problems)
    return stores


def _refuse_other_run(folder: Run, made: Plan, resume: bool, init: PathLike | None) -> None:
    if not folder.exists:
        folder.refuse_foreign()
        return
    problems = []
    if not resume:
        problems.append("there is a run already; add --resume to go on with it, or give another folder")
    elif folder.plan().without_reasons() != made.without_reasons():
        problems.append(_ANOTHER_PLAN)
    if resume and init is not None:
        problems.append("the run has begun, so --init comes too late; leave it out, or give another folder")
    refuse(str(folder.folder), problems)
