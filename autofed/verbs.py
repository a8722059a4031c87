"""The six verbs as plain Python functions on paths and arrays; the command line only parses and calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from autofed import algorithms, plans, privacy
from autofed.case import Case, Dataset, declared_labels, disagreements, find_images, open_dataset, open_datasets
from autofed.devices import pick_device
from autofed.exchange import Arrays
from autofed.federation import rounds as loop
from autofed.federation.inprocess import InProcess
from autofed.federation.site import Site
from autofed.fingerprints import Fingerprint, measure, merge
from autofed.images import PICTURE_SLICE_MM
from autofed.images import Geometry as FileGeometry
from autofed.inference import Prediction, Predictor
from autofed.network import build, load_weights, weights_of
from autofed.parallel import Progress, silent
from autofed.planner import PRESETS, check_memory, make
from autofed.plans import Budget, Plan, Speed
from autofed.predictions import ABOUT, Predictions
from autofed.prepared import Store, open_store, pool
from autofed.prepared import preprocess as prepare_site
from autofed.problems import Problems, gathered, refuse
from autofed.runs import Identity, Run, read_weights
from autofed.scores import Report, evaluate_folder
from autofed.speed import measure_speed

PathLike = Path | str
POOLED = "pooled"


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
        found = found.with_speed(_speed(found, Budget(device=pick_device(device))))
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
    made = _plan(plan)
    if settings:
        made = made.change(dict(settings))
        check_memory(made)
    if output is not None:
        made.save(Path(output))
    return made


def preprocess(
    plan: PathLike | Plan,
    sites: Sequence[PathLike],
    work: PathLike,
    *,
    processes: int = 1,
    progress: Progress = silent,
) -> dict[str, int]:
    """Prepare the sites' data for a plan in WORK/<site>/; gives how many cases were new, by site."""
    made = _plan(plan)
    datasets = open_datasets(sites)
    refuse("the sites and the plan", [p for d in datasets for p in _disagreement(d, made)])
    return {
        d.name: prepare_site(d, made.local, Path(work), processes=processes, progress=progress)[1] for d in datasets
    }


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
    made = _with_choices(_plan(plan), algorithm, rounds)
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


def predict(
    runs: PathLike | Sequence[PathLike],
    images: PathLike | np.ndarray,
    output: PathLike | None = None,
    *,
    spacing_mm: Sequence[float] | None = None,
    model: str | None = None,
    mirroring: bool = True,
    save_probabilities: bool = False,
    device: str = "auto",
    progress: Progress = silent,
) -> Prediction | list[Path]:
    """Labels and uncertainty for new scans by the ensemble of one or more runs.

    `images` is an array (channels first; Z, Y, X or Y, X after it, the channel axis may be left out if there is one
    channel) with its `spacing_mm` (z, y, x): gives a `Prediction`. Or it is a folder or a file: writes labels, maps
    and a JSON per case to `output`, and gives the JSON files. Cases that were predicted before by the same weights
    are left as they are. `Problems`, before anything is written, if a scan or a file of somebody else would be
    written over.
    """
    folders = [Run(r) for r in ([runs] if isinstance(runs, Path | str) else runs)]
    members = [member for folder in folders for member in folder.members(model)]
    refuse("predict", [] if members else ["no run was given; name at least one"])
    load = partial(Predictor, members, device=pick_device(device), mirroring=mirroring)
    if isinstance(images, np.ndarray):
        case = _case_of(images, spacing_mm, members[0].plan)
        return load().predict(case, probabilities=save_probabilities)
    if output is None:
        raise Problems("predict", ["images in files need an output folder"])
    cases = find_images(Path(images), len(members[0].plan.agreement.channels))
    folder = Predictions(output, probabilities=save_probabilities)
    folder.refuse_clashes(cases)
    return folder.fill(cases, load(), folders, model, progress)


def evaluate(
    predictions: PathLike,
    labels: PathLike,
    output: PathLike | None = None,
    *,
    processes: int = 1,
    progress: Progress = silent,
) -> Report:
    """Dice, Jaccard and HD95 of a folder of predictions against reference labels, per case, class and site.

    `labels` is a folder of label files, or a folder of sites in raw layout, whose scores are then also given by site.
    """
    folder = Path(predictions)
    names = _label_names(folder, Path(labels))
    Predictions(folder).refuse_unfinished()
    report = evaluate_folder(folder, Path(labels), names, processes=processes, progress=progress)
    if output is not None:
        report.save(Path(output))
    return report


def _label_names(predictions: Path, labels: Path) -> dict[str, int]:
    """Names of the label values: from what predict wrote, or from the dataset.json of the references."""
    about = predictions / ABOUT
    beside = [labels / "dataset.json", labels.parent / "dataset.json", *sorted(labels.glob("*/dataset.json"))]
    source = next((p for p in (about, *beside) if p.is_file()), None)
    if source is None:
        missing = [p for p in (predictions, labels) if not p.is_dir()]
        raise Problems(
            "evaluate",
            [f"{p}: there is no such folder" for p in missing]
            or [f"nothing says what the label values mean; expected {about}, or a dataset.json beside {labels}"],
        )
    return declared_labels(source)


def _budget(hours: float | None, memory_gb: float | None, device: str, configuration: str, preset: str) -> Budget:
    """What was asked for; memory that the preset was made for, if none was given."""
    wanted: dict[str, Any] = {"device": pick_device(device), "configuration": configuration, "preset": preset}
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
    draft = make(found, budget.model_copy(update={"hours": None}))
    return measure_speed(budget.device, draft.local.axes, len(found.declaration.channels))


def _plan(source: PathLike | Plan) -> Plan:
    return source if isinstance(source, Plan) else plans.load(source)


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


def _disagreement(dataset: Dataset, made: Plan) -> list[str]:
    """Where a site's data is not what the plan was made for."""
    agreement, declared = made.agreement, dataset.declaration()
    problems = [
        f"{dataset.name} declares {what} {getattr(declared, what)}, the plan {getattr(agreement, what)}"
        for what in ("channels", "labels", "dimension")
        if getattr(declared, what) != getattr(agreement, what)
    ]
    if dataset.name not in agreement.patients:
        problems.append(f"{dataset.name} is not a site of the plan, which has {', '.join(agreement.patients)}")
    return problems


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


def _case_of(array: np.ndarray, spacing_mm: Sequence[float] | None, made: Plan) -> Case:
    """A case from an array in the shapes that people hold them in."""
    dimension, channels = made.agreement.dimension, len(made.agreement.channels)
    image = np.asarray(array, dtype=np.float32)
    if image.ndim == dimension and channels == 1:
        image = image[None]
    if image.ndim != dimension + 1 or image.shape[0] != channels:
        expected = f"({channels}, {'Z, Y, X' if dimension == 3 else 'Y, X'})"
        raise Problems("predict", [f"the array has the shape {array.shape}; expected {expected}"])
    if dimension == 3 and (spacing_mm is None or len(spacing_mm) != 3):
        raise Problems("predict", ["an array of a volume needs spacing_mm=(z, y, x)"])
    if spacing_mm is not None and not (len(spacing_mm) in (2, 3) and all(0 < s < np.inf for s in spacing_mm)):
        raise Problems("predict", [f"spacing_mm is {tuple(spacing_mm)}; expected numbers above 0 for (z, y, x)"])
    known = tuple(float(s) for s in spacing_mm) if spacing_mm is not None else (1.0, 1.0)
    spacing = known if dimension == 3 else (PICTURE_SLICE_MM, *known[-2:])
    shown = image if dimension == 3 else image[:, None]
    origin = (0.0,) * dimension if spacing_mm is not None else ()
    geometry = FileGeometry(dimension, spacing, origin, tuple(np.eye(dimension).ravel().tolist()) if origin else ())  # type: ignore[arg-type]
    return Case("array", "array", shown, None, spacing, geometry)  # type: ignore[arg-type]
