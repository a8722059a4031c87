"""A site's dataset in nnU-Net's raw layout, and its cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from autofed.data import images
from autofed.data.case_files import CaseFiles, find_cases
from autofed.data.dataset_json import channel_names, description_problems, no_dataset, number_problems
from autofed.data.declaration import Declaration, disagreements, site_name_problem
from autofed.data.images import Geometry
from autofed.data.labels import Values, canonical, declared_order, declared_structures, value_problems
from autofed.data.reading import header_problems, image_problems, read_channels, read_or_note
from autofed.errors import ValidationErrors, prefixed_problems, raise_if_any
from autofed.files import digest, read_json


@dataclass(frozen=True)
class Case:
    """One scan: `image` float32 (C, Z, Y, X), `label` int32 (Z, Y, X) or None, spacing (z, y, x) in mm."""

    id: str
    patient: str
    image: np.ndarray
    label: np.ndarray | None
    spacing_mm: tuple[float, float, float]
    geometry: Geometry


@dataclass(frozen=True)
class Dataset:
    """A folder in nnU-Net's raw layout: dataset.json, imagesTr, labelsTr. The folder's name is the site's name.

    `annotated` are the structures that dataset.json says were annotated there; empty if it says nothing: all of them.
    `protocol` is what it says that all cases share: "spacing_mm" and "size", each (z, y, x).
    """

    folder: Path
    channels: tuple[str, ...]
    labels: Mapping[str, Values]
    cases: Mapping[str, CaseFiles]
    patients: Mapping[str, str] = field(default_factory=dict)
    regions_class_order: tuple[int, ...] = ()
    annotated: tuple[str, ...] = ()
    protocol: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The site's name."""
        return self.folder.name

    def patient(self, case: str) -> str:
        """The patient of a case; a case whose patient is not named is a patient of its own."""
        return self.patients.get(case, case)

    def read(self, case: str) -> Case:
        """Read a case and check every voxel; `ValidationErrors` names all that is wrong with its image and its label.

        That image and label share a grid was checked in their headers; see `open_dataset`.
        """
        files = self.cases[case]
        problems: list[str] = []
        scan = read_or_note(read_channels, files.images, problems)
        truth = read_or_note(images.read_labels, files.label, problems) if files.label else None
        problems += image_problems(scan[0], self.channels) if scan else []
        problems += value_problems(truth[0], self.labels, self.annotated) if truth else []
        raise_if_any(f"{self.name}/{case}", problems)
        assert scan is not None, "an image that cannot be read is a problem"
        image, geometry = scan
        return Case(case, self.patient(case), image, truth[0] if truth else None, geometry.spacing_mm, geometry)

    def declaration(self) -> Declaration:
        """What this site declares; the dimension is read off the first image."""
        first = next(iter(self.cases.values()))
        depth = images.header(first.images[0]).shape[1]
        return Declaration(
            channels=self.channels,
            labels=dict(self.labels),
            regions_class_order=self.regions_class_order,
            dimension=2 if depth == 1 else 3,
        )

    def raw_digest(self) -> str:
        """Changes when a raw file is added, removed, resized or written again."""
        paths = [self.folder / "dataset.json"]
        paths += [path for files in self.cases.values() for path in files.paths]
        stats = [(str(p.relative_to(self.folder)), p.stat()) for p in sorted(paths)]
        return digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def open_dataset(folder: Path | str, *, headers: bool = True) -> Dataset:
    """Read a site's folder and check it as far as names and `headers` go; `ValidationErrors` names everything at
    once.
    """
    folder = Path(folder).resolve()
    if not (folder / "dataset.json").is_file():
        raise_if_any(str(folder), [no_dataset(folder)])
    description = read_json(folder / "dataset.json")
    problems = description_problems(description)
    raise_if_any(str(folder / "dataset.json"), problems)
    ending = str(description["file_ending"]).lower()
    channels = tuple(str(v) for _, v in sorted(channel_names(description).items(), key=lambda kv: int(kv[0])))
    cases, problems = find_cases(folder, ending)
    problems += number_problems(description, cases)
    patients = description.get("patients", {})
    problems += [f"`patients` names the case {c!r}, which is not in imagesTr" for c in patients if c not in cases]
    labels, order = canonical(description["labels"]), tuple(declared_order(description))
    protocol = {name: tuple(map(float, value)) for name, value in description.get("protocol", {}).items()}
    annotated = declared_structures(description)
    dataset = Dataset(folder, channels, labels, cases, patients, order, annotated, protocol)  # type: ignore[arg-type]
    name_problem = site_name_problem(dataset.name)
    header_mistakes = header_problems(cases, channels) if headers else []
    problems = [*([name_problem] if name_problem else []), *problems, *header_mistakes]
    raise_if_any(str(folder), problems)
    return dataset


def site_folders(folders: Iterable[Path | str]) -> list[Path]:
    """The same folders, but for one that is a whole federation: in its place those that it holds in `sites`."""
    return [site for folder in map(Path, folders) for site in _sites_in(folder) or [folder]]


def _sites_in(folder: Path) -> list[Path]:
    if (folder / "dataset.json").is_file():
        return []
    return sorted(path.parent for path in folder.glob("sites/*/dataset.json"))


def open_datasets(folders: Iterable[Path | str]) -> list[Dataset]:
    """Read several sites and check that they agree; all problems of all sites come in one `ValidationErrors`.

    A folder that holds sites in `sites` stands for these.
    """
    datasets: list[Dataset] = []
    problems: list[str] = []
    for folder in site_folders(folders):
        try:
            datasets.append(open_dataset(folder))
        except ValidationErrors as error:
            problems += prefixed_problems(error)
    names = [d.name.casefold() for d in datasets]  # the names of folders, which some file systems take for one
    problems += [
        f"two sites are called {n!r}; rename one of the folders" for n in sorted(set(names)) if names.count(n) > 1
    ]
    problems += disagreements({d.name: d.declaration() for d in datasets})
    raise_if_any("the sites' data", problems)
    return datasets
