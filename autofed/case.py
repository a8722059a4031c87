"""A hospital's dataset: what it declares, its cases, and whether several hospitals agree."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from autofed import images
from autofed.files import Record, digest, read_json
from autofed.images import Geometry
from autofed.problems import Problems, refuse

# Float headers differ in the last digits between tools; nnU-Net forgives as much.
_SPACING_TOLERANCE = 1e-3

RESERVED_SITES = ("pooled", "global")
"""What all sites' data together and their common model are called; no site may take these names."""

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


class Declaration(Record):
    """What every hospital of a federation must declare alike."""

    channels: tuple[str, ...]
    labels: dict[str, int]
    dimension: int


@dataclass(frozen=True)
class Files:
    """Where a case lies: one image file per channel, and its label map if there is one."""

    images: tuple[Path, ...]
    label: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """A folder in nnU-Net's raw layout: dataset.json, imagesTr, labelsTr. The folder's name is the site's name."""

    folder: Path
    channels: tuple[str, ...]
    labels: Mapping[str, int]
    cases: Mapping[str, Files]
    patients: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The site's name."""
        return self.folder.name

    def patient(self, case: str) -> str:
        """The patient of a case; a case whose patient is not named is a patient of its own."""
        return self.patients.get(case, case)

    def read(self, case: str) -> Case:
        """Read a case and check every voxel; `Problems` names all that is wrong with its image and its label."""
        files = self.cases[case]
        problems: list[str] = []
        scan = _attempt(read_channels, files.images, problems)
        truth = _attempt(images.read_labels, files.label, problems) if files.label else None
        problems += _image_problems(scan[0]) if scan else []
        problems += _misfits(truth, scan) if scan and truth else []
        problems += _value_problems(truth[0], self.labels) if truth else []
        refuse(f"{self.name}/{case}", problems)
        assert scan is not None, "an image that cannot be read is a problem"
        image, geometry = scan
        return Case(case, self.patient(case), image, truth[0] if truth else None, geometry.spacing_mm, geometry)

    def declaration(self) -> Declaration:
        """What this site declares; the dimension is read off the first image."""
        first = next(iter(self.cases.values()))
        depth = images.header(first.images[0]).shape[1]
        return Declaration(channels=self.channels, labels=dict(self.labels), dimension=2 if depth == 1 else 3)

    def raw_digest(self) -> str:
        """Changes when a raw file is added, removed, resized or written again."""
        paths = [self.folder / "dataset.json"]
        paths += [p for f in self.cases.values() for p in (*f.images, *([f.label] if f.label else []))]
        stats = [(str(p.relative_to(self.folder)), p.stat()) for p in sorted(paths)]
        return digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def open_dataset(folder: Path | str) -> Dataset:
    """Read a site's folder and check it as far as names and headers go; `Problems` names everything at once."""
    folder = Path(folder).resolve()
    if not (folder / "dataset.json").is_file():
        refuse(str(folder), [_no_dataset(folder)])
    description = read_json(folder / "dataset.json")
    problems = _description_problems(description)
    refuse(str(folder / "dataset.json"), problems)
    ending = str(description["file_ending"]).lower()
    channels = tuple(str(v) for _, v in sorted(_channel_names(description).items(), key=lambda kv: int(kv[0])))
    cases, problems = _find_cases(folder, ending)
    patients = description.get("patients", {})
    problems += [f"`patients` names the case {c!r}, which is not in imagesTr" for c in patients if c not in cases]
    labels = dict(sorted(description["labels"].items(), key=lambda label: label[1]))
    dataset = Dataset(folder, channels, labels, cases, patients)
    name_problem = site_name_problem(dataset.name)
    refuse(str(folder), [*([name_problem] if name_problem else []), *problems, *_header_problems(dataset)])
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
    names = [d.name for d in datasets]
    problems += [
        f"two sites are called {n!r}; rename one of the folders" for n in sorted(set(names)) if names.count(n) > 1
    ]
    problems += disagreements({d.name: d.declaration() for d in datasets})
    refuse("the sites' data", problems)
    return datasets


def site_name_problem(name: str) -> str | None:
    """What is wrong with the name of a site, or None. It names folders, so it must not lead out of them or hide."""
    if name.lower() in RESERVED_SITES:
        return f"no site may be called {name!r}, which stands for all sites together; give its folder another name"
    if not re.fullmatch(r"\w(?:[\w .-]{0,62}\w)?", name):
        return (
            f"the site is called {name!r}; expected up to 64 letters, digits, underscores, hyphens, dots and spaces, "
            "with a letter or digit at both ends; give its folder such a name"
        )
    return None


def declared_labels(path: Path) -> dict[str, int]:
    """The `labels` of a dataset.json or of a prediction.json; `Problems` if they are not names of whole numbers."""
    description = read_json(path)
    if not isinstance(description, dict):
        raise Problems(str(path), [f"expected an object with `labels`, found {type(description).__name__}"])
    refuse(str(path), labels_problems(description.get("labels")))
    return description["labels"]


def disagreements(declarations: Mapping[str, Declaration]) -> list[str]:
    """One sentence for each thing the sites declare differently, naming every site and what it says."""
    problems = []
    for what in ("channels", "labels", "dimension"):
        said: dict[str, list[str]] = {}
        for site, declaration in declarations.items():
            said.setdefault(_say(getattr(declaration, what)), []).append(site)
        if len(said) > 1:
            views = "; ".join(f"{', '.join(sites)}: {value}" for value, sites in said.items())
            problems.append(f"the sites disagree on {what} ({views}); make dataset.json the same at all sites")
    return problems


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
    first = parts[0]
    for path, part in zip(paths[1:], parts[1:], strict=True):
        if part.array.shape[1:] != first.array.shape[1:]:
            problems.append(f"{path.name} has the shape {part.array.shape[1:]}, channel 0 {first.array.shape[1:]}")
        if not _same_spacing(part.geometry.spacing_mm, first.geometry.spacing_mm):
            problems.append(
                f"{path.name} has the spacing {part.geometry.spacing_mm} mm, channel 0 {first.geometry.spacing_mm} mm"
            )
    refuse(str(paths[0].parent), problems)
    return np.concatenate([p.array for p in parts]), first.geometry


def _attempt(read: Callable[[Source], Found], source: Source, problems: list[str]) -> Found | None:
    """What `read` gives, or None after adding what is wrong to `problems`, each with the name of the file."""
    try:
        return read(source)
    except Problems as error:
        problems += [f"{Path(error.about).name}: {p}" for p in error.problems]
        return None


def _say(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    return f"{len(value)} ({', '.join(value)})" if isinstance(value, tuple) else f"{value}D"


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
    problems += labels_problems(description.get("labels"))
    if str(description.get("file_ending", "")).lower() not in images.ENDINGS:
        known = " ".join(sorted(images.ENDINGS))
        problems.append(f"`file_ending` is {description.get('file_ending')!r}; expected one of {known}")
    patients = description.get("patients", {})
    if not isinstance(patients, dict) or not all(isinstance(v, str) for v in patients.values()):
        problems.append('`patients` must map case to patient, for example {"case_1": "patient_1"}')
    return problems


def labels_problems(labels: Any) -> list[str]:
    """What is wrong with a map of structures to label values, as dataset.json and plans declare it."""
    if not isinstance(labels, dict) or not labels:
        return ['`labels` must map names to values, for example {"background": 0, "kidney": 1}']
    if any(isinstance(v, list) for v in labels.values()):
        return ["`labels` holds regions (lists of values), which are not supported; give one value per structure"]
    if "ignore" in labels:
        return ["`labels` holds `ignore`, which is not supported; leave unannotated cases without a label file"]
    values = list(labels.values())
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    if not whole or labels.get("background") != 0 or sorted(values) != list(range(len(values))) or len(values) < 2:
        return [f"`labels` must be background 0 and then 1, 2, ... without a gap; found {_say(labels)}"]
    return []


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
    found, problems = _group(_named(folder / "imagesTr", ending))
    if not found:
        return {}, [f"imagesTr holds no {ending} files; expected files such as case_0000{ending}"]
    label_ending = images.label_ending(ending)
    maps = _named(folder / "labelsTr", label_ending)
    labels = {_stem(p): p for p in maps}
    twice = [(p.name, labels[_stem(p)].name) for p in maps if p != labels[_stem(p)]]
    problems += [f"labelsTr holds {one} and {other} for one case; keep one of them" for one, other in twice]
    problems += [f"labelsTr/{p.name} belongs to no image in imagesTr" for c, p in labels.items() if c not in found]
    if not labels:
        problems.append(f"labelsTr holds no {label_ending} files; at least one case needs a label")
    return {case: Files(files.images, labels.get(case)) for case, files in found.items()}, problems


def _named(folder: Path, ending: str) -> list[Path]:
    """The files of one ending, .PNG like .png; a leading dot is what file systems leave behind ("._case.nii.gz")."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(p for p in found if images.ending_of(p) == ending and not p.name.startswith("."))


def _header_problems(dataset: Dataset) -> list[str]:
    """What the headers alone give away: shapes and spacings that differ, 3D among 2D, too many channels in a file."""
    problems: list[str] = []
    depths: dict[int, list[str]] = {2: [], 3: []}
    for case, files in dataset.cases.items():
        try:
            heads = [images.header(p) for p in files.images]
            label = images.header(files.label) if files.label else heads[0]
        except Problems as error:
            problems += [f"{case}: {p}" for p in error.problems]
            continue
        depths[2 if heads[0].shape[1] == 1 else 3].append(case)
        count = sum(head.shape[0] for head in heads)
        if count != len(dataset.channels):
            problems.append(f"{case}: found {count} channels, dataset.json declares {_say(dataset.channels)}")
        for head in (*heads[1:], label):
            if head.shape[1:] != heads[0].shape[1:]:
                problems.append(
                    f"{case}: image and label (or two channels) differ in shape, "
                    f"{heads[0].shape[1:]} and {head.shape[1:]}"
                )
            elif not _same_spacing(head.spacing_mm, heads[0].spacing_mm):
                problems.append(
                    f"{case}: image and label (or two channels) differ in spacing, "
                    f"{heads[0].spacing_mm} and {head.spacing_mm} mm"
                )
    if depths[2] and depths[3]:
        few = min(depths.items(), key=lambda kv: len(kv[1]))
        problems.append(
            f"2D and 3D cases are mixed: {', '.join(few[1][:5])} are {few[0]}D, the others are not; "
            "make two datasets of them"
        )
    return problems


def _image_problems(image: np.ndarray) -> list[str]:
    bad = int(np.count_nonzero(~np.isfinite(image)))
    return [f"{bad} voxels are NaN or infinite; replace them before planning"] if bad else []


def _misfits(truth: tuple[np.ndarray, Geometry], scan: tuple[np.ndarray, Geometry]) -> list[str]:
    """Where a label does not lie on its image."""
    (label, label_geometry), (image, geometry) = truth, scan
    problems = []
    if label.shape != image.shape[1:]:
        problems.append(f"the label has the shape {label.shape}, the image {image.shape[1:]}")
    if not _same_spacing(label_geometry.spacing_mm, geometry.spacing_mm):
        problems.append(f"the label has the spacing {label_geometry.spacing_mm} mm, the image {geometry.spacing_mm} mm")
    return problems


def _value_problems(label: np.ndarray, labels: Mapping[str, int]) -> list[str]:
    unknown = sorted({int(v) for v in np.unique(label)} - set(labels.values()))
    if not unknown:
        return []
    return [f"the label holds the values {unknown}, but dataset.json declares only {_say(dict(labels))}"]


def _same_spacing(a: Iterable[float], b: Iterable[float]) -> bool:
    return bool(np.allclose(list(a), list(b), rtol=_SPACING_TOLERANCE))
