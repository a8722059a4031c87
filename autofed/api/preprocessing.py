"""Sites' data onto the grid of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autofed import plans
from autofed.data import DECLARED, Dataset, describe_regions, open_datasets, splits
from autofed.data.labels import Labels
from autofed.errors import raise_if_any
from autofed.files import PathLike, read_json, write_json
from autofed.parallel import Progress, silent
from autofed.plans import Plan
from autofed.preprocessing import preprocess as prepare_site


def preprocess(
    plan: PathLike | Plan,
    sites: Sequence[PathLike],
    work: PathLike,
    *,
    processes: int = 1,
    progress: Progress = silent,
) -> dict[str, int]:
    """Prepare the sites' data for a plan in `WORK/<site>/`; gives how many cases were new, by site."""
    made = plan if isinstance(plan, Plan) else plans.load(plan)
    datasets = open_datasets(sites)
    raise_if_any("the sites and the plan", [p for d in datasets for p in _disagreement(d, made)])
    new = {}
    for dataset in datasets:
        _, new[dataset.name] = prepare_site(dataset, made.local, Path(work), processes=processes, progress=progress)
        _take_splits(dataset.folder, Path(work) / dataset.name)
    return new


def _take_splits(raw: Path, work: Path) -> None:
    """Copy the split that a site wrote down, under nnU-Net's name or a shorter one; or forget one that is gone."""
    for name in (splits.FILE, "splits_final.json"):
        if (raw / name).is_file():
            write_json(work / splits.FILE, read_json(raw / name))
            return
    (work / splits.FILE).unlink(missing_ok=True)


def _disagreement(dataset: Dataset, made: Plan) -> list[str]:
    """Where a site's data is not what the plan was made for."""
    agreement, declared = made.agreement, dataset.declaration()
    problems = [
        f"{dataset.name} declares {what} {describe_regions(declared, what)}, "
        f"the plan {describe_regions(agreement, what)}"
        for what in DECLARED
        if describe_regions(declared, what) != describe_regions(agreement, what)
    ]
    known = Labels.of(dataset)
    here, planned = (known.with_annotated(a) for a in (dataset.annotated, agreement.annotated.get(dataset.name, ())))
    if not problems and here != planned:
        problems.append(f"{dataset.name} annotated {_names(here)}, the plan says {_names(planned)}; plan again")
    if dataset.name not in agreement.patients:
        problems.append(f"{dataset.name} is not a site of the plan, which has {', '.join(agreement.patients)}")
    return problems


def _names(labels: Labels) -> str:
    return ", ".join(labels.annotated) or "every structure"
