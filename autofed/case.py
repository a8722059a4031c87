"""A hospital's dataset: what it declares, its cases, and whether several hospitals agree."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from pydantic import field_validator

from autofed import images
from autofed.files import Record, digest, read_json
from autofed.images import Geometry, Header
from autofed.labels import (
    ClassOrder,
    Declaring,
    Labels,
    Values,
    annotated_problems,
    canonical,
    declared_order,
    declared_structures,
    labels_problems,
    said,
    value_problems,
)
from autofed.problems import Problems, refuse

# Float headers differ in the last digits between tools; nnU-Net forgives as much.
_SPACING_TOLERANCE = 1e-3
_DIRECTION_TOLERANCE = 1e-2

RESERVED_SITES = ("pooled", "global", "public", "student")
"""What all sites' data together, models without a site, and public images are called; no site may take these names."""

Source = TypeVar("Source")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Case:
    """One scan: `image` float32 (C, Z, Y, X), `label` int32 (Z, Y, X) or None, spacing (z, y, x) in mm."""

    id: str
    patient: str
    image: np.ndarray
    label: np.ndarray | None
    spacing_mm: tuple[float, float, float]
    geometry: Geometry


DECLARED = ("channels", "labels", "dimension")
"""What sites can disagree on."""


class Declares(Declaring, Protocol):
    """A declaration, or the agreement that was made of it."""

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels."""

    @property
    def dimension(self) -> int:
        """2 or 3."""


class Declaration(Record):
    """What every hospital of a federation must declare alike."""

    channels: tuple[str, ...]
    labels: dict[str, Values]
    regions_class_order: ClassOrder = ()
    dimension: int

    @field_validator("labels")
    @classmethod
    def _canonical(cls, labels: dict[str, Values]) -> dict[str, Values]:
        """In one order: two sites that list them in another order say the same."""
        return canonical(labels)


@dataclass(frozen=True)
class Files:
    """Where a case lies: one image file per channel, and its label map if there is one."""

    images: tuple[Path, ...]
    label: Path | None = None

    @property
    def maps(self) -> tuple[Path, ...]:
        """The images, and then the label if there is one."""
        return (*self.images, self.label) if self.label else self.images

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files that the case is read from: also those that say the spacing of its TIFFs."""
        beside = (images.spacing_file(path) for path in self.maps)
        return (*self.maps, *dict.fromkeys(path for path in beside if path))


@dataclass(frozen=True)
class Dataset:
    """A folder in nnU-Net's raw layout: dataset.json, imagesTr, labelsTr. The folder's name is the site's name.

    `annotated` are the structures that dataset.json says were annotated there; empty if it says nothing: all of them.
    `protocol` is what it says that all cases share: "spacing_mm" and "size", each (z, y, x).
    """

    folder: Path
    channels: tuple[str, ...]
    labels: Mapping[str, Values]
    cases: Mapping[str, Files]
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
        """Read a case and check every voxel; `Problems` names all that is wrong with its image and its label.

        That they lie on each other was seen in their headers; see `open_dataset`.
        """
        files = self.cases[case]
        problems: list[str] = []
        scan = _attempt(read_channels, files.images, problems)
        truth = _attempt(images.read_labels, files.label, problems) if files.label else None
        problems += _image_problems(scan[0], self.channels) if scan else []
        problems += value_problems(truth[0], self.labels, self.annotated) if truth else []
        refuse(f"{self.name}/{case}", problems)
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
    """Read a site's folder and check it as far as names and `headers` go; `Problems` names everything at once."""
    folder = Path(folder).resolve()
    if not (folder / "dataset.json").is_file():
        refuse(str(folder), [_no_dataset(folder)])
    description = read_json(folder / "dataset.json")
    problems = _description_problems(description)
    refuse(str(folder / "dataset.json"), problems)
    ending = str(description["file_ending"]).lower()
    channels = tuple(str(v) for _, v in sorted(_channel_names(description).items(), key=lambda kv: int(kv[0])))
    cases, problems = _find_cases(folder, ending)
    problems += _number_problems(description, cases)
    patients = description.get("patients", {})
    problems += [f"`patients` names the case {c!r}, which is not in imagesTr" for c in patients if c not in cases]
    labels, order = canonical(description["labels"]), tuple(declared_order(description))
    protocol = {name: tuple(map(float, value)) for name, value in description.get("protocol", {}).items()}
    annotated = declared_structures(description)
    dataset = Dataset(folder, channels, labels, cases, patients, order, annotated, protocol)  # type: ignore[arg-type]
    name_problem = site_name_problem(dataset.name)
    problems = [*([name_problem] if name_problem else []), *problems, *(_header_problems(dataset) if headers else [])]
    refuse(str(folder), problems)
    return dataset


def open_datasets(folders: Iterable[Path | str]) -> list[Dataset]:
    """Read several sites and check that they agree; all problems of all sites come in one `Problems`."""
    datasets: list[Dataset] = []
    problems: list[str] = []
    for folder in folders:
        try:
            datasets.append(open_dataset(folder))
        except Problems as error:
            problems += [f"{error.about}: {p}" for p in error.problems]
    names = [d.name.casefold() for d in datasets]  # the names of folders, which some file systems take for one
    problems += [
        f"two sites are called {n!r}; rename one of the folders" for n in sorted(set(names)) if names.count(n) > 1
    ]
    problems += disagreements({d.name: d.declaration() for d in datasets})
    refuse("the sites' data", problems)
    return datasets


def site_name_problem(name: str) -> str | None:
    """What is wrong with the name of a site, or None. It names folders, so it must not lead out of them or hide."""
    if name.lower() in RESERVED_SITES:
        return f"no site may be called {name!r}, which stands for what no single site has; give its folder another name"
    if not re.fullmatch(r"\w(?:[\w .-]{0,62}\w)?", name):
        return (
            f"the site is called {name!r}; expected up to 64 letters, digits, underscores, hyphens, dots and spaces, "
            "with a letter or digit at both ends; give its folder such a name"
        )
    return None


def disagreements(declarations: Mapping[str, Declaration]) -> list[str]:
    """One sentence for each thing the sites declare differently, naming every site and what it says."""
    problems = []
    for what in DECLARED:
        views: dict[str, list[str]] = {}
        for site, declaration in declarations.items():
            views.setdefault(in_words(declaration, what), []).append(site)
        if len(views) > 1:
            listed = "; ".join(f"{', '.join(sites)}: {value}" for value, sites in views.items())
            hint = _annotated_hint(declarations) if what == "labels" else ""
            problems.append(f"the sites disagree on {what} ({listed}); make dataset.json the same at all sites{hint}")
    return problems


def _annotated_hint(declarations: Mapping[str, Declaration]) -> str:
    """What to write where sites leave out structures that they never annotated, as local datasets may well do."""
    every = dict.fromkeys(name for declaration in declarations.values() for name in Labels.of(declaration).names)
    sites: dict[tuple[str, ...], list[str]] = {}
    for site, declaration in declarations.items():
        sites.setdefault(Labels.of(declaration).names, []).append(site)
    return "".join(
        f"; if {' and '.join(which)} never annotated {' and '.join(missing)}, write the same labels there too and "
        f'"annotated": {json.dumps(own)}'
        for own, which in sites.items()
        if (missing := [name for name in every if name not in own])
    )


def in_words(declaration: Declares, what: str) -> str:
    """What is declared of one thing, in words that are the same only if they mean the same."""
    match what:
        case "channels":
            return _say_channels(declaration.channels)
        case "labels":
            return said(canonical(declaration.labels), declaration.regions_class_order)
        case _:
            return f"{declaration.dimension}D"


def find_images(folder: Path, channels: int) -> dict[str, Files]:
    """The cases of a folder of new scans: `{case}_{CCCC}{ending}`, or `{case}{ending}` where there is one file each.

    Four digits at the end count as a channel only if some file of the folder carries 0000; otherwise scan_0001 is a
    case. A single file is a folder of one case. `Problems` names the cases whose channels are not all there.
    """
    folder = Path(folder)
    paths = [folder] if folder.is_file() else sorted(folder.iterdir()) if folder.is_dir() else []
    found, problems = _group(p for p in paths if images.ending_of(p) and not p.name.startswith("."))
    if not found:
        problems = [f"no images were found; expected files such as case_0000{images.volumes.NIFTI[0]}"]
    for case, files in found.items():
        count, wrong = _count_channels(files.images)
        problems += [f"{case}: {w}" for w in wrong]
        if not wrong and count != channels:
            problems.append(f"{case}: found {count} channels, but the plan has {channels}")
    refuse(str(folder), problems)
    return found


def read_channels(paths: tuple[Path, ...]) -> tuple[np.ndarray, Geometry]:
    """All channels of a case as one (C, Z, Y, X) array; `Problems` if files are broken or do not fit."""
    problems: list[str] = []
    parts = [part for part in (_attempt(images.read, path, problems) for path in paths) if part]
    refuse(str(paths[0].parent), problems)
    heads = [(path.name, p.geometry.header(p.array.shape)) for path, p in zip(paths, parts, strict=True)]
    problems += [problem for other in heads[1:] for problem in _misfits(heads[0], other)]
    refuse(str(paths[0].parent), problems)
    return np.concatenate([p.array for p in parts]), parts[0].geometry


def _attempt(read: Callable[[Source], Found], source: Source, problems: list[str]) -> Found | None:
    """What `read` gives, or None after adding what is wrong to `problems`, each with the name of the file."""
    try:
        return read(source)
    except Problems as error:
        problems += [f"{Path(error.about).name}: {p}" for p in error.problems]
        return None


def _say_channels(channels: tuple[str, ...]) -> str:
    return f"{len(channels)} ({', '.join(channels)})"


def _no_dataset(folder: Path) -> str:
    if not folder.exists():
        return "there is no such folder"
    inside = sorted(p.parent.name for p in folder.glob("*/dataset.json"))
    hint = f"; did you mean the folders in it ({', '.join(inside[:6])})?" if inside else ""
    return f"there is no dataset.json; expected nnU-Net's raw layout (dataset.json, imagesTr, labelsTr){hint}"


def _channel_names(description: Mapping[str, Any]) -> dict[str, str]:
    return description.get("channel_names") or description.get("modality") or {}  # the Decathlon's older key


def _description_problems(description: Any) -> list[str]:
    if not isinstance(description, dict):
        return ["expected an object with channel_names, labels and file_ending"]
    problems = []
    names = _channel_names(description)
    if not isinstance(names, dict) or sorted(names) != sorted(str(i) for i in range(len(names))) or not names:
        problems.append('`channel_names` must map "0", "1", ... to names, for example {"0": "T1"}')
    wrong = labels_problems(description.get("labels"), declared_order(description))
    problems += wrong
    if not wrong and "annotated" in description:
        problems += annotated_problems(description["annotated"], description["labels"])
    if str(description.get("file_ending", "")).lower() not in images.ENDINGS:
        known = " ".join(sorted(images.ENDINGS))
        problems.append(f"`file_ending` is {description.get('file_ending')!r}; expected one of {known}")
    patients = description.get("patients", {})
    if not isinstance(patients, dict) or not all(isinstance(v, str) for v in patients.values()):
        problems.append('`patients` must map case to patient, for example {"case_1": "patient_1"}')
    return problems + _protocol_problems(description.get("protocol", {}))


def _protocol_problems(protocol: Any) -> list[str]:
    """What is wrong with the facts that a site declares of all its cases."""
    known = isinstance(protocol, dict) and set(protocol) <= {"spacing_mm", "size"}
    if not known or not all(_is_triple(value) for value in protocol.values()):
        example = '{"spacing_mm": [3, 1, 1], "size": [40, 256, 256]}'
        return [f"`protocol` is {protocol!r}; expected numbers above 0 for (z, y, x), as {example}"]
    return []


def _is_triple(value: Any) -> bool:
    numbers = isinstance(value, list) and all(type(n) in (int, float) and 0 < n < 1e6 for n in value)
    return numbers and len(value) == 3


def _stem(path: Path) -> str:
    return path.name[: -len(images.ending_of(path))]


def _case_and_channel(path: Path) -> tuple[str, int | None]:
    """The two parts of `{case}_{CCCC}`; a name that does not end in four digits has no channel."""
    stem = _stem(path)
    head, _, tail = stem.rpartition("_")
    return (head, int(tail)) if head and re.fullmatch("[0-9]{4}", tail) else (stem, None)


def _group(paths: Iterable[Path]) -> tuple[dict[str, Files], list[str]]:
    """Files by case. A file may hold several channels (RGB): what counts is what is inside, not how many there are.

    Where no file is a channel 0000, numbers at the end are part of the case's name.
    """
    parted = {path: _case_and_channel(path) for path in paths}
    numbered = any(channel == 0 for _, channel in parted.values())
    found: dict[str, dict[int, Path]] = {}
    problems = []
    for path in parted:
        case, channel = (parted[path][0], parted[path][1] or 0) if numbered else (_stem(path), 0)
        other = found.setdefault(case, {}).setdefault(channel, path)
        if other != path:
            problems.append(f"{case}: both {other.name} and {path.name} are channel {channel}; remove one of them")
    problems += [
        f"{case}: found files numbered {sorted(parts)}; expected 0 to {max(parts)}"
        for case, parts in found.items()
        if len(parts) != max(parts) + 1
    ]
    return {case: Files(tuple(parts[i] for i in sorted(parts))) for case, parts in found.items()}, problems


def _count_channels(paths: tuple[Path, ...]) -> tuple[int, list[str]]:
    try:
        return sum(images.header(p).shape[0] for p in paths), []
    except Problems as error:
        return 0, [f"{Path(error.about).name}: {p}" for p in error.problems]


def _find_cases(folder: Path, ending: str) -> tuple[dict[str, Files], list[str]]:
    scans, problems = _named(folder / "imagesTr", ending)
    found, more = _group(scans)
    problems += more
    if not found:
        return {}, [f"imagesTr holds no {ending} files; expected files such as case_0000{ending}"]
    label_ending = images.label_ending(ending)
    maps, more = _named(folder / "labelsTr", label_ending)
    problems += more
    labels = {_stem(p): p for p in maps}
    problems += [f"labelsTr/{p.name} belongs to no image in imagesTr" for c, p in labels.items() if c not in found]
    if not labels:
        problems.append(f"labelsTr holds no {label_ending} files; at least one case needs a label")
    return {case: Files(files.images, labels.get(case)) for case, files in found.items()}, problems


def _named(folder: Path, ending: str) -> tuple[list[Path], list[str]]:
    """The files of one ending, .PNG like .png, a name once; and which others have the same name.

    A leading dot is what file systems leave behind ("._case.nii.gz").
    """
    alike: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if images.ending_of(path) and not path.name.startswith("."):
            alike.setdefault(_stem(path).casefold(), []).append(path)
    chosen = {_stem(p): p for paths in alike.values() for p in paths if images.ending_of(p) == ending}
    problems = [
        f"{folder.name} holds {' and '.join(p.name for p in paths)}, one name but for endings and capitals; keep one"
        for paths in alike.values()
        if len(paths) > 1 and any(p in chosen.values() for p in paths)
    ]
    return list(chosen.values()), problems


def _number_problems(description: Mapping[str, Any], cases: Mapping[str, Files]) -> list[str]:
    """nnU-Net's numTraining is never needed here, but where it is wrong, files were lost or forgotten."""
    labelled = sum(files.label is not None for files in cases.values())
    said = description.get("numTraining", len(cases))
    if not cases or said in (len(cases), labelled):
        return []
    found = f"imagesTr holds {len(cases)} cases, {labelled} of them with a label"
    return [f"`numTraining` is {said!r}, but {found}; correct the number, or look for what is missing"]


def _header_problems(dataset: Dataset) -> list[str]:
    """What the headers alone give away, over all cases."""
    problems: list[str] = []
    firsts: dict[str, Header] = {}
    for case, files in dataset.cases.items():
        found: list[str] = []
        heads = [(path.name, head) for path in files.maps if (head := _attempt(images.header, path, found))]
        if not found:
            firsts[case] = heads[0][1]
            found = _case_problems(heads, len(files.images), dataset.channels)
        problems += [f"{case}: {p}" for p in found]
    return [*problems, *_mixture_problems(firsts)]


def _case_problems(heads: list[tuple[str, Header]], scans: int, channels: tuple[str, ...]) -> list[str]:
    """What is wrong with the headers of a case; the first so many `scans` are those of its images."""
    count = sum(head.shape[0] for _, head in heads[:scans])
    misfits = [problem for other in heads[1:] for problem in _misfits(heads[0], other)]
    if count == len(channels):
        return misfits
    return [f"found {count} channels, dataset.json declares {_say_channels(channels)}", *misfits]


def _mixture_problems(heads: Mapping[str, Header]) -> list[str]:
    """Flat cases among volumes, and volumes (of TIFF) without a spacing among others."""
    volumes = {case: head for case, head in heads.items() if head.shape[1] > 1}
    flat = [case for case in heads if case not in volumes]
    unknown = [case for case, head in volumes.items() if not head.direction]
    problems = []
    if flat and volumes:
        few, kind = min((flat, "2D"), (list(volumes), "3D"), key=lambda group: len(group[0]))
        found = f"{', '.join(few[:5])} are {kind}, the others are not"
        problems.append(f"2D and 3D cases are mixed: {found}; make two datasets of them")
    if 0 < len(unknown) < len(volumes):
        found = f"the spacing of {', '.join(unknown[:5])} is not known, that of other cases is"
        problems.append(f'{found}; write {unknown[0]}.json beside it, like {{"spacing": [3, 1, 1]}} (z, y, x in mm)')
    return problems


def _image_problems(image: np.ndarray, channels: tuple[str, ...]) -> list[str]:
    problems = []
    for number, voxels in enumerate(image):
        bad = int(np.count_nonzero(~np.isfinite(voxels)))
        if bad:
            where = f"channel {number} ({', '.join(channels[number : number + 1])})"
            problems.append(f"{bad} voxels of {where} are NaN or infinite; replace them before planning")
    if all(voxels.min() == voxels.max() for voxels in image):  # one channel may be: an alpha, a sequence not taken
        found = ", ".join(f"{voxels.min():g}" for voxels in image)
        problems.append(f"the image is {found} everywhere; export it again, or take the case out")
    return problems


def _misfits(first: tuple[str, Header], other: tuple[str, Header]) -> list[str]:
    """Where a label, or a further channel, does not lie on the first channel.

    Origins may differ: tools lose them, and what counts is voxel on voxel. A turned axis means turned voxels.
    """
    (name, head), (other_name, found) = first, other
    problems = []
    if found.shape[1:] != head.shape[1:]:
        problems.append(f"{other_name} has the shape {found.shape[1:]}, {name} {head.shape[1:]}")
    if not np.allclose(found.spacing_mm, head.spacing_mm, rtol=_SPACING_TOLERANCE):
        problems.append(f"{other_name} has the spacing {found.spacing_mm} mm, {name} {head.spacing_mm} mm")
    if _are_turned(found.direction, head.direction):
        problems.append(f"{other_name} has the direction {_round(found.direction)}, {name} {_round(head.direction)}")
    return [f"{problem}; write both on one grid" for problem in problems]


def _are_turned(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return len(a) == len(b) and not np.allclose(a, b, atol=_DIRECTION_TOLERANCE)


def _round(numbers: tuple[float, ...]) -> str:
    return " ".join(f"{round(v, 2) + 0:g}" for v in numbers)
