"""What a training starts from: another run, a file of weights, or public images that it first learns from."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from autofed import pretraining
from autofed.case import Dataset
from autofed.devices import pick_device
from autofed.exchange import peek
from autofed.federation.answers import ALONE
from autofed.files import file_digest
from autofed.parallel import Progress
from autofed.plans import Plan
from autofed.prepared import Index, Store
from autofed.pretraining import Learned
from autofed.problems import Problems, refuse
from autofed.runs import Run

_EXPECTED = "expected a RUN, a file of weights (.safetensors), or a folder of public images (dataset.json and imagesTr)"


def is_public(init: Path) -> bool:
    """Whether these are images to learn from, and not a run or a file; `Problems` if it is none of the three."""
    if init.is_file():
        refuse(f"--init {init}", _of_weights(init))
        return False
    if Run(init).exists:
        return False
    if (init / "dataset.json").is_file() or (init / "imagesTr").is_dir():
        return True
    found = "a folder without run.json and without dataset.json" if init.is_dir() else "no such file or folder"
    raise Problems(f"--init {init}", [f"found {found}; {_EXPECTED}"])


def _of_weights(path: Path) -> list[str]:
    try:
        peek(path)
    except Problems as error:
        return [f"{problem}; {_EXPECTED}" for problem in error.problems]
    return []


def kept_at_a_site(init: Path, plan: Plan) -> list[str]:
    """Why no training, or no private one, may begin with a file of weights that a site keeps for itself."""
    path = init.resolve()
    if not path.is_file():
        return []
    if peek(path)[1].get(ALONE):
        return [f"{init} was trained without noise beside a private training, for its site alone, and whatever starts "
                "from it tells of that site's patients; start from other weights"]  # fmt: skip
    inside = any(folder.name == "sites" and Run(folder.parent).exists for folder in path.parents)
    if inside and plan.agreement.privacy.promises:
        return [f"{init} is what a site remembers, and no ledger knows what a private training that starts from it "
                "tells; start from the common model of a run, or from weights of other patients"]  # fmt: skip
    return []


def senseless(plan: Plan) -> list[str]:
    """Why a training of this plan cannot begin with random weights."""
    if plan.local.training.trained == "all":
        return []
    return [
        f'with "{plan.local.training.trained}" the way down stays as the training began, and random weights there '
        "know nothing; give --init a RUN, a file of weights or a folder of public images, or "
        "plan with --set training.trained=all"
    ]


def learn(
    run: Run, plan: Plan, stores: Mapping[str, Store], images: Path, *, device: str, progress: Progress
) -> Learned:
    """Weights from public images, of which those sites whose prepared data is here have none."""
    refuse(f"--init {images}", _of_sites(pretraining.open_public(plan, images), stores))
    try:
        return pretraining.learn(plan, images, run.public_folder, device=pick_device(device), progress=progress)
    finally:
        shutil.rmtree(run.public_folder, ignore_errors=True)


def _of_sites(dataset: Dataset, stores: Mapping[str, Store]) -> list[str]:
    """Which images are files of a site: its patients would be told of, and no ledger would know."""
    public = _by_size(path for files in dataset.cases.values() for path in files.images)
    problems = []
    for site, store in stores.items():
        theirs = [path for path in _raw_images(store) if path.stat().st_size in public]
        alike = [path for path in theirs if _is_among(path, public[path.stat().st_size])]
        if alike:
            problems.append(f"{len(alike)} images are files of {site} as well, such as {alike[0].name}; public images "
                            "are of nobody at the sites: take them out")  # fmt: skip
    return problems


def _by_size(paths: Iterable[Path]) -> dict[int, list[Path]]:
    """Files of one size may be the same; others need not be read to be known apart."""
    found: dict[int, list[Path]] = defaultdict(list)
    for path in paths:
        found[path.stat().st_size].append(path)
    return dict(found)


def _is_among(path: Path, others: Iterable[Path]) -> bool:
    wanted = file_digest(path)
    return any(file_digest(other) == wanted for other in others)


def _raw_images(store: Store) -> list[Path]:
    """The raw images that a site's data was prepared from, where they are on this machine."""
    indices = {folder.parent / "index.json" for folder in store.folders.values()}
    folders = [Path(Index.load(path).raw) / "imagesTr" for path in indices]
    return sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_file())
