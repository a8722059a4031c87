"""Preprocessing: sites' data onto the grid of a plan."""

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
from autofed.preprocessing import preprocess as preprocess_site


def preprocess(
    plan: PathLike | Plan,
    sites: Sequence[PathLike],
    work: PathLike,
    *,
    processes: int = 1,
    progress: Progress = silent,
) -> dict[str, int]:
    """Preprocess the sites' data for a plan into `WORK/<site>/`.

    Args:
        plan: The plan, or its file.
        sites: The sites' folders in nnU-Net's raw layout, or one that holds such in `sites`.
        work: WORK, the folder for preprocessed data.
        processes: How many processes read and preprocess cases.
        progress: Called with the stage, how many cases are done, and how many there are.

    Returns:
        By site, how many cases were new.

    Raises:
        ValidationErrors: If a site's data is not what the plan was made for.
    """
    loaded = plan if isinstance(plan, Plan) else plans.load(plan)
    datasets = open_datasets(sites)
    raise_if_any("the sites and the plan", [p for d in datasets for p in _disagreements(d, loaded)])
    new = {}
    for dataset in datasets:
        _, new[dataset.name] = preprocess_site(
            dataset, loaded.local, Path(work), processes=processes, progress=progress
        )
        _copy_splits(dataset.folder, Path(work) / dataset.name)
    return new


def _copy_splits(raw: Path, work: Path) -> None:
    """Copy the splits file of a site, under nnU-Net's name or a shorter one; delete an earlier copy if it has none."""
    for name in (splits.FILE, "splits_final.json"):
        if (raw / name).is_file():
            write_json(work / splits.FILE, read_json(raw / name))
            return
    (work / splits.FILE).unlink(missing_ok=True)


def _disagreements(dataset: Dataset, plan: Plan) -> list[str]:
    """Differences between a site's data and what the plan was made for."""
    agreement, declared = plan.agreement, dataset.declaration()
    problems = [
        f"{dataset.name} declares {key} {describe_regions(declared, key)}, the plan {describe_regions(agreement, key)}"
        for key in DECLARED
        if describe_regions(declared, key) != describe_regions(agreement, key)
    ]
    labels = Labels.of(dataset)
    annotated, planned_annotated = (
        labels.with_annotated(a) for a in (dataset.annotated, agreement.annotated.get(dataset.name, ()))
    )
    if not problems and annotated != planned_annotated:
        problems.append(
            f"{dataset.name} annotated {_names(annotated)}, the plan says {_names(planned_annotated)}; plan again"
        )
    if dataset.name not in agreement.patients:
        problems.append(f"{dataset.name} is not a site of the plan, which has {', '.join(agreement.patients)}")
    return problems


def _names(labels: Labels) -> str:
    return ", ".join(labels.annotated) or "every structure"
