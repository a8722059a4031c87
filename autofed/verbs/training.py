"""Training over all sites of a plan, on this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from autofed import algorithms, plans, privacy
from autofed.devices import pick_device
from autofed.exchange import Arrays
from autofed.federation import rounds as loop
from autofed.federation.inprocess import InProcess
from autofed.federation.site import Site
from autofed.files import PathLike
from autofed.network import build, load_weights, weights_of
from autofed.parallel import Progress, silent
from autofed.plans import Plan
from autofed.prepared import Store, open_store, pool
from autofed.problems import Problems, refuse
from autofed.runs import Identity, Run, read_weights

POOLED = "pooled"


def train(
    plan: PathLike | Plan,
    work: PathLike,
    run: PathLike,
    *,
    algorithm: str | None = None,
    rounds: int | None = None,
    init: PathLike | None = None,
    resume: bool = False,
    device: str = "auto",
    progress: Progress = silent,
) -> Run:
    """Train all sites of a plan on this machine, round by round, into the folder `run`.

    With `resume` an interrupted run goes on after its last finished round, with the same weights as if it had not
    been interrupted. `init` is a run or a file of weights to start from. `Problems` before any training if the plan,
    the prepared data and the run do not fit each other.
    """
    made = _with_choices(plan if isinstance(plan, Plan) else plans.load(plan), algorithm, rounds)
    trusted = (algorithm,) if algorithm else ()
    chosen = algorithms.make(made.agreement.algorithm, trusted)
    stores = _stores(Path(work), made)
    folder = Run(run)
    _refuse_other_run(folder, made, resume, init)
    held = {POOLED: pool(stores)} if algorithms.gathers(chosen) else stores
    identity = folder.identity() if folder.exists else Identity(sites=tuple(held))
    counter = _StepCounter(made, len(stores), progress)
    open_site = partial(Site, plan=made, run=identity.id, device=pick_device(device), trusted=trusted, on_step=counter)
    ledgers = {name: Path(work) / name / "ledger.jsonl" for name in stores}
    sites = []
    for name, store in held.items():
        own = ledgers if name == POOLED else {name: ledgers[name]}
        sites.append(open_site(name, store, folder=folder.site_folder(name), ledgers=own))
    if not folder.exists:
        folder.begin(made, identity, chosen.start(algorithms.Setup(made, _first_weights(made, init))))
    state = loop.load_state(folder.rounds_folder, loop.saved_rounds(folder.rounds_folder)[-1])
    counter.begin(state.round)
    door = InProcess(sites)
    loop.run(chosen, privacy.find(made), made, door, state, folder.rounds_folder, identity.id, identity.sites)
    return folder


def _with_choices(made: Plan, algorithm: str | None, rounds: int | None) -> Plan:
    choices: dict[str, Any] = {}
    if algorithm is not None and algorithm != made.agreement.algorithm.name:
        choices["algorithm.name"] = algorithm
        choices["algorithm.settings"] = {}
    if rounds is not None and rounds != made.agreement.training.rounds:
        choices["training.rounds"] = rounds
    return made.change(choices) if choices else made


def _stores(work: Path, made: Plan) -> dict[str, Store]:
    """The prepared data of every site of the plan; all that is missing is named at once."""
    stores: dict[str, Store] = {}
    problems = []
    for site, patients in sorted(made.agreement.patients.items()):
        try:
            stores[site] = open_store(work, site, made.local)
            found = len(stores[site].patients)
            if found != patients:
                problems.append(f"{site} has {found} patients with labels, the plan says {patients}; plan again")
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
        problems.append("the run follows another plan; resume it with the plan.json inside it and no other choices")
    if resume and init is not None:
        problems.append("the run has begun, so --init comes too late; leave it out, or give another folder")
    refuse(str(folder.folder), problems)


def _first_weights(made: Plan, init: PathLike | None) -> Arrays:
    network = build(made.local.network, seed=made.local.training.seed)
    if init is not None:
        load_weights(network, read_weights(Path(init)), f"--init {init}")
    return weights_of(network)


class _StepCounter:
    """Tells the progress how many of all steps of all sites are done."""

    def __init__(self, made: Plan, sites: int, progress: Progress):
        self.per_round = sites * made.local.training.steps_per_round
        self.total = self.per_round * made.agreement.training.rounds
        self.progress = progress
        self.done = 0

    def begin(self, rounds: int) -> None:
        self.done = rounds * self.per_round
        self.progress("training", self.done, self.total)

    def __call__(self) -> None:
        self.done = min(self.done + 1, self.total)
        self.progress("training", self.done, self.total)
