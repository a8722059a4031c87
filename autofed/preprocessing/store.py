"""Prepared data on disk: a site's cases, one folder each, of which a patch is read alone.

WORK/<site>/<digest>/ holds one folder per case. The digest names grid, normalisation and raw files, so changing rounds
or privacy prepares nothing again, and data prepared from other files is never taken for these.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autofed.data import Dataset, open_dataset
from autofed.data.labels import ClassOrder, Labels, Structures, Values, mask
from autofed.errors import ValidationErrors
from autofed.files import Record, digest, whole_folder, write_json
from autofed.parallel import Progress, each, silent
from autofed.plans import LocalPlan
from autofed.preprocessing.cases import PreprocessedCase, preprocess_case

if TYPE_CHECKING:
    import blosc2

LOCATIONS_PER_CLASS = 10_000
"""So many voxels of each class are stored as centres for patches (nnU-Net)."""

ANNOTATED = 0
"""The key of annotated voxels of any class, stored where there is an ignore label (nnU-Net)."""

# At most so many voxels in a chunk and in a block along (z, y, x): a patch reads whole blocks; few chunks are soon
# written.
_CHUNK = {2: (1, 256, 256), 3: (64, 64, 64)}
_BLOCK = {2: (1, 128, 128), 3: (32, 32, 32)}


class Index(Record):
    """Describes a folder of preprocessed data; written last: a folder without it is incomplete."""

    site: str
    raw: str
    raw_digest: str
    preparation: str
    labels: dict[str, Values]
    regions_class_order: ClassOrder = ()
    annotated: Structures = ()
    channels: tuple[str, ...]
    cases: dict[str, str]
    unlabelled: tuple[str, ...]


@dataclass(frozen=True)
class Store:
    """The prepared data of one site (or, for the pooled baseline, of several).

    `annotated` are the structures that were annotated there; none stand for all of them. `label_folders` are those of
    cases whose label map does not lie beside the image.
    """

    folders: Mapping[str, Path]
    patients: Mapping[str, tuple[str, ...]]
    annotated: tuple[str, ...] = ()
    label_folders: Mapping[str, Path] = field(default_factory=dict, kw_only=True)

    def image(self, case: str) -> blosc2.NDArray:
        """The image (C, *grid), on disk; indexing reads only the part asked for."""
        return _open(self.folders[case] / "image.b2nd")

    def label(self, case: str) -> blosc2.NDArray:
        """The label map (*grid), on disk."""
        return _open(self.label_folders.get(case, self.folders[case]) / "label.b2nd")

    def only(self, patients: Collection[str]) -> Store:
        """The same data with some of the patients alone."""
        chosen = {p: cases for p, cases in self.patients.items() if p in patients}
        return replace(self, patients=chosen)

    @cached_property
    def _locations(self) -> dict[str, dict[int, np.ndarray]]:
        return {}

    def locations(self, case: str) -> dict[int, np.ndarray]:
        """For each class that the case has, some of its voxels (n, 3) on the grid; regions are numbered from 1.

        With an ignore label, the key ANNOTATED holds voxels that were annotated, whatever they are.
        """
        if case not in self._locations:
            with np.load(self.label_folders.get(case, self.folders[case]) / "locations.npz") as arrays:
                self._locations[case] = {int(value): arrays[value] for value in arrays.files}
        return self._locations[case]


def preprocess(
    dataset: Dataset, local: LocalPlan, work: Path, *, processes: int = 1, progress: Progress = silent
) -> tuple[Path, int]:
    """Prepare a site's cases that are not prepared yet; gives the folder and how many cases were new.

    An interrupted run goes on where it was; `ValidationErrors` names every case that cannot be prepared.
    """
    index = _index(dataset, local)
    folder = work / dataset.name / digest([index.preparation, index.raw_digest])[:16]
    index_file = folder / "index.json"
    if index_file.is_file() and Index.load(index_file) == index:
        return folder, 0
    missing = [case for case in dataset.cases if not (folder / case / "case.json").is_file()]
    each(
        partial(_preprocess_case, local, folder),
        [_single_case(dataset, case) for case in missing],
        stage=f"preparing {dataset.name}",
        processes=processes,
        progress=progress,
    )
    index.save(index_file)
    return folder, len(missing)


def open_store(work: Path, site: str, local: LocalPlan) -> Store:
    """The prepared data of a site for this plan; `ValidationErrors` if there is none, or if the raw files changed
    since.
    """
    indexes = [Index.load(p) for p in sorted((work / site).glob("*/index.json"))]
    matching = [i for i in indexes if i.preparation == local.preprocessing_digest()]
    if not matching:
        content = "only data prepared for another plan" if indexes else "nothing"
        raise ValidationErrors(
            str(work / site), [f"found {content}; run `autofed preprocess plan.json SITE... -o {work}`"]
        )
    current = [i for i in matching if _raw_digest(i) in (None, i.raw_digest)]
    if not current:
        changed = f"the files in {matching[0].raw} changed since they were prepared; run `autofed preprocess` again"
        raise ValidationErrors(str(work / site), [changed])
    index = current[-1]
    folder = work / site / digest([index.preparation, index.raw_digest])[:16]
    by_patient: dict[str, list[str]] = {}
    for case, patient in index.cases.items():
        if case not in index.unlabelled:
            by_patient.setdefault(patient, []).append(case)
    patients = {p: tuple(cases) for p, cases in sorted(by_patient.items())}
    return Store({c: folder / c for c in index.cases}, patients, index.annotated)


def pool_stores(stores: Mapping[str, Store]) -> Store:
    """Several sites' data as one, in the order of their names; a case or patient is named with its site."""
    by_name = sorted(stores.items())
    return Store(
        {f"{site}/{case}": path for site, store in by_name for case, path in store.folders.items()},
        {
            f"{site}/{patient}": tuple(f"{site}/{case}" for case in cases)
            for site, store in by_name
            for patient, cases in store.patients.items()
        },
    )


def preprocessed_sites(work: Path) -> list[str]:
    """The sites that have prepared data in a folder."""
    return sorted(p.parent.parent.name for p in Path(work).glob("*/*/index.json"))


def _index(dataset: Dataset, local: LocalPlan) -> Index:
    return Index(
        site=dataset.name,
        raw=str(dataset.folder),
        raw_digest=dataset.raw_digest(),
        preparation=local.preprocessing_digest(),
        labels=dict(dataset.labels),
        regions_class_order=dataset.regions_class_order,
        annotated=dataset.annotated,
        channels=dataset.channels,
        cases={case: dataset.patient(case) for case in dataset.cases},
        unlabelled=tuple(case for case, files in dataset.cases.items() if files.label is None),
    )


def _raw_digest(index: Index) -> str | None:
    """The digest of the raw files as they are now, or None if they are not here (prepared data may be moved alone)."""
    if not Path(index.raw).is_dir():
        return None
    try:
        return open_dataset(index.raw, headers=False).raw_digest()
    except ValidationErrors:
        return "unreadable"


def _single_case(dataset: Dataset, case: str) -> Dataset:
    """A dataset of one of its cases: all that a worker is sent."""
    return replace(dataset, cases={case: dataset.cases[case]}, patients={case: dataset.patient(case)})


def _preprocess_case(local: LocalPlan, folder: Path, dataset: Dataset) -> None:
    (case,) = dataset.cases
    preprocessed = preprocess_case(dataset.read(case), local.geometry, local.intensity)
    with whole_folder(folder / case) as part:
        write_image(part, preprocessed)
        if preprocessed.label is not None:
            write_label(part, preprocessed.label, Labels.of(dataset).with_annotated(dataset.annotated))


def write_image(folder: Path, preprocessed: PreprocessedCase) -> None:
    """Write a preprocessed image and its inverse transform."""
    _write(folder / "image.b2nd", preprocessed.image)
    write_json(folder / "case.json", preprocessed.inverse.model_dump(mode="json"))


def write_label(folder: Path, label: np.ndarray, labels: Labels) -> None:
    """Write a label map on the plan's grid, and where its structures are."""
    _write(folder / "label.b2nd", label)
    locations: dict[str, Any] = dict(_find_locations(label, labels))
    np.savez(folder / "locations.npz", **locations)


def _open(path: Path) -> blosc2.NDArray:
    import blosc2  # imported here since it takes longer than preprocessing a small case, and not everyone reads arrays

    return blosc2.open(str(path), mode="r")


def _write(path: Path, array: np.ndarray) -> None:
    """Store ([C,] Z, Y, X) in chunks of blocks. Level 1: higher ones take much longer and make nothing smaller."""
    import blosc2

    blosc2.set_nthreads(1)
    flat = 2 if array.shape[-3] == 1 else 3
    chunks = [_even(n, most) for n, most in zip(array.shape[-3:], _CHUNK[flat], strict=True)]
    blocks = [_even(n, most) for n, most in zip(chunks, _BLOCK[flat], strict=True)]
    blosc2.asarray(
        array,
        urlpath=str(path),
        mode="w",
        chunks=(*array.shape[:-3], *chunks),
        blocks=(*array.shape[:-3], *blocks),
        cparams={"codec": blosc2.Codec.ZSTD, "clevel": 1, "nthreads": 1},
    )


def _even(size: int, most: int) -> int:
    """The length of the fewest equal pieces that are no longer than `most`."""
    return math.ceil(size / math.ceil(size / most))


def _find_locations(label: np.ndarray, labels: Labels) -> Iterator[tuple[str, np.ndarray]]:
    """Per class or region that was annotated: all voxels, or of many 10 000 or 1 %, whichever is more (nnU-Net)."""
    generator = np.random.default_rng(1234)
    masks = {
        number: mask(label, values)
        for number, (name, values) in enumerate(labels.structures, start=1)
        if labels.is_annotated(name)
    }
    if labels.ignore is not None:
        masks[ANNOTATED] = label != labels.ignore
    for key, voxels in masks.items():
        indices = np.flatnonzero(voxels)
        if not len(indices):
            continue
        count = max(LOCATIONS_PER_CLASS, len(indices) // 100)
        if len(indices) > count:
            indices = generator.choice(indices, count, replace=False)
        yield str(key), np.stack(np.unravel_index(indices, label.shape), axis=1).astype(np.int32)
