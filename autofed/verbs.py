"""The six verbs as plain Python functions on paths and arrays; the command line only parses and calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autofed import algorithms, plans, privacy
from autofed.case import Case, Dataset, Files, find_images, open_dataset, open_datasets, read_channels
from autofed.exchange import Arrays
from autofed.federation import rounds as loop
from autofed.federation.inprocess import InProcess
from autofed.federation.site import Site
from autofed.files import digest, read_json, whole_file, write_json
from autofed.fingerprints import Fingerprint, measure, merge
from autofed.images import PICTURE_SLICE_MM, ending_of, label_ending, write
from autofed.images import Geometry as FileGeometry
from autofed.inference import Prediction, Predictor
from autofed.network import build, load_weights, measure_speed, pick_device, weights_of
from autofed.parallel import Progress, silent
from autofed.planner import make
from autofed.plans import Budget, Plan
from autofed.prepared import Store, open_store, pool
from autofed.prepared import preprocess as prepare_site
from autofed.problems import Problems, refuse
from autofed.runs import GLOBAL, Run, read_weights
from autofed.scores import Report, evaluate_folder

PathLike = Path | str
POOLED = "pooled"


def fingerprint(
    site: PathLike, output: PathLike | None = None, *, processes: int = 1, progress: Progress = silent
) -> Fingerprint:
    """What a hospital can compute alone and hand over: counts and sums, no case. Written to `output` if given."""
    found = measure(open_dataset(site), processes=processes, progress=progress)
    if output is not None:
        found.save(Path(output))
    return found


def plan(
    sources: Sequence[PathLike],
    output: PathLike | None = None,
    *,
    hours: float | None = None,
    memory_gb: float = 8.0,
    device: str = "auto",
    algorithm: str = "fedavg",
    settings: Mapping[str, Any] | None = None,
    processes: int = 1,
    progress: Progress = silent,
) -> Plan:
    """The plan for several sites, each given as its folder or as the fingerprint it handed over.

    `hours` is for all sites together on this machine; without it a CPU gets one hour and an accelerator nnU-Net's full
    training. `settings` maps fields of the plan to values set by hand. `Problems` names everything at once.
    """
    algorithms.find(algorithm)
    device = pick_device(device)
    merged = merge(_fingerprints(sources, processes, progress))
    if hours is None and device == "cpu":
        hours = 1.0
    gflops = measure_speed(device, merged.declaration.dimension) if hours is not None else None
    budget = Budget.parse({"memory_gb": memory_gb, "hours": hours, "device": device, "gflops": gflops}, "the budget")
    made = make(merged, budget, algorithm)
    if settings:
        made = made.change(dict(settings))
    algorithms.make(made.agreement.algorithm)
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
    chosen = algorithms.make(made.agreement.algorithm)
    device = pick_device(device)
    stores = _stores(Path(work), made)
    folder = Run(run)
    _refuse_other_run(folder, made, resume)
    weights = _first_weights(made, init)
    pooled = algorithms.gathers(chosen)
    names = (POOLED,) if pooled else tuple(stores)
    identity = folder.identity() if folder.exists else folder.begin(made, names)
    counter = _StepCounter(made, len(stores), progress)
    sites = [
        Site(
            name,
            store,
            made,
            folder.site_folder(name),
            Path(work) / name / "ledger.jsonl",
            members=len(stores) if pooled else 1,
            device=device,
            on_step=counter,
        )
        for name, store in ({POOLED: pool(stores)} if pooled else stores).items()
    ]
    done = loop.saved_rounds(folder.rounds_folder)
    state = loop.load_state(folder.rounds_folder, done[-1]) if done else chosen.start(algorithms.Setup(made, weights))
    counter.begin(state.round)
    mechanism = privacy.find(made)
    loop.run(chosen, mechanism, made, InProcess(sites), state, folder.rounds_folder, identity.id, names)
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
    are left as they are.
    """
    folders = [Run(r) for r in ([runs] if isinstance(runs, Path | str) else runs)]
    members = [member for folder in folders for member in folder.members(model)]
    if not isinstance(images, np.ndarray):
        if output is None:
            raise Problems("predict", ["images in files need an output folder"])
        found = find_images(Path(images), len(members[0].plan.agreement.channels))
    predictor = Predictor(members, device=pick_device(device), mirroring=mirroring)
    if isinstance(images, np.ndarray):
        return predictor.predict(_case_of(images, spacing_mm, predictor.plan), probabilities=save_probabilities)
    assert output is not None
    out = Path(output)
    written = []
    progress("predicting", 0, len(found))
    problems: list[str] = []
    for i, (case, files) in enumerate(found.items()):
        try:
            written.append(_predict_case(predictor, case, files, out, save_probabilities))
        except Problems as error:
            problems += [f"{case}: {p}" for p in error.problems]
        progress("predicting", i + 1, len(found))
    _write_about(out, predictor, folders, model)
    refuse("predict", problems)
    return written


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
    report = evaluate_folder(folder, Path(labels), names, processes=processes, progress=progress)
    if output is not None:
        report.save(Path(output))
    return report


def _label_names(predictions: Path, labels: Path) -> dict[str, int]:
    """Names of the label values: from what predict wrote, or from the dataset.json of the references."""
    about = predictions / "prediction.json"
    beside = [labels / "dataset.json", labels.parent / "dataset.json", *sorted(labels.glob("*/dataset.json"))]
    source = next((p for p in (about, *beside) if p.is_file()), None)
    if source is None:
        missing = [p for p in (predictions, labels) if not p.is_dir()]
        raise Problems(
            "evaluate",
            [f"{p}: there is no such folder" for p in missing]
            or [f"nothing says what the label values mean; expected {about}, or a dataset.json beside {labels}"],
        )
    return read_json(source)["labels"]


def _plan(source: PathLike | Plan) -> Plan:
    return source if isinstance(source, Plan) else plans.load(source)


def _fingerprints(sources: Sequence[PathLike], processes: int, progress: Progress) -> list[Fingerprint]:
    """Fingerprints as they are, folders measured; the folders are checked against each other first, all at once."""
    if not sources:
        raise Problems("plan", ["no site was given; name the sites' folders or their fingerprints"])
    records = [Path(s) for s in sources if Path(s).suffix == ".json" and Path(s).is_file()]
    datasets = open_datasets([s for s in sources if Path(s) not in records])
    ready = [Fingerprint.load(path) for path in records]
    measured: list[Fingerprint] = []
    problems: list[str] = []
    for dataset in datasets:
        try:
            measured.append(measure(dataset, processes=processes, progress=progress))
        except Problems as error:
            problems += error.problems
    refuse("the sites' data", problems)
    return ready + measured


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
    if rounds is not None:
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


def _refuse_other_run(folder: Run, made: Plan, resume: bool) -> None:
    if not folder.exists:
        if folder.folder.exists() and any(folder.folder.iterdir()):
            raise Problems(str(folder.folder), ["the folder is not empty and holds no run; give another one"])
        return
    problem = None
    if not resume:
        problem = "there is a run already; add --resume to go on with it, or give another folder"
    elif folder.plan().digest() != made.digest():
        problem = "the run follows another plan; resume it with the plan.json inside it"
    refuse(str(folder.folder), [problem] if problem else [])


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
    known = tuple(float(s) for s in spacing_mm) if spacing_mm is not None else (1.0, 1.0)
    spacing = known if dimension == 3 else (PICTURE_SLICE_MM, *known[-2:])
    shown = image if dimension == 3 else image[:, None]
    origin = (0.0,) * dimension if spacing_mm is not None else ()
    geometry = FileGeometry(dimension, spacing, origin, tuple(np.eye(dimension).ravel().tolist()) if origin else ())  # type: ignore[arg-type]
    return Case("array", "array", shown, None, spacing, geometry)  # type: ignore[arg-type]


def _predict_case(predictor: Predictor, case: str, files: Files, out: Path, probabilities: bool) -> Path:
    """Predict one case and write its files, the JSON last: a case whose JSON is there is whole."""
    summary = out / f"{case}.json"
    asked = digest(
        [
            predictor.weights_digest,
            predictor.plan.inference.digest(),
            predictor.mirroring,
            probabilities,
            [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files.images],
        ]
    )
    if summary.is_file() and read_json(summary).get("asked") == asked:
        return summary
    image, geometry = read_channels(files.images)
    found = predictor.predict(Case(case, case, image, None, geometry.spacing_mm, geometry), probabilities=probabilities)
    ending = label_ending(ending_of(files.images[0]))
    names = {
        "labels": f"{case}{ending}",
        "entropy": f"{case}_entropy{ending}",
        "mutual_information": f"{case}_mutual_information{ending}",
    }
    for what, name in names.items():
        write(out / name, getattr(found, what), geometry)
    if found.probabilities is not None:
        names["probabilities"] = f"{case}_probabilities.npz"
        with whole_file(out / names["probabilities"]) as part:
            np.savez_compressed(part, probabilities=found.probabilities)
    inside = found.entropy[found.labels > 0]
    write_json(
        summary,
        {
            "case": case,
            "images": [str(p.resolve()) for p in files.images],
            "labels": predictor.plan.agreement.labels,
            "files": names,
            "structures": {
            name: {"voxels": s.voxels, s.measure: s.size, "range_over_snapshots": [s.smallest, s.largest]}
            for name, s in found.structures.items()
        },
            "mean_entropy_inside": float(inside.mean()) if inside.size else None,
            "members": found.members,
            "plan": found.plan_digest,
            "weights": found.weights_digest,
            "asked": asked,
        },
    )
    return summary


def _write_about(out: Path, predictor: Predictor, folders: Sequence[Run], model: str | None) -> None:
    write_json(
        out / "prediction.json",
        {
            "labels": predictor.plan.agreement.labels,
            "runs": [str(folder.folder.resolve()) for folder in folders],
            "model": model or GLOBAL,
            "ensemble": [member.name for member in predictor.members],
            "mirroring": predictor.mirroring,
        },
    )
