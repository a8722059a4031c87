"""Reading the files of a case, and what is wrong with their headers and voxels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from autofed.data import images
from autofed.data.case_files import CaseFiles
from autofed.data.declaration import describe_channels
from autofed.data.images import Geometry, Header
from autofed.errors import ValidationErrors, raise_if_any

# Float headers differ in the last digits between tools; nnU-Net forgives as much.
_SPACING_TOLERANCE = 1e-3
_DIRECTION_TOLERANCE = 1e-2

Source = TypeVar("Source")
Found = TypeVar("Found")


def read_channels(paths: tuple[Path, ...]) -> tuple[np.ndarray, Geometry]:
    """All channels of a case as one (C, Z, Y, X) array; `ValidationErrors` if files are broken or do not fit."""
    problems: list[str] = []
    parts = [part for part in (attempt(images.read, path, problems) for path in paths) if part]
    raise_if_any(str(paths[0].parent), problems)
    heads = [(path.name, p.geometry.header(p.array.shape)) for path, p in zip(paths, parts, strict=True)]
    problems += [problem for other in heads[1:] for problem in _misfits(heads[0], other)]
    raise_if_any(str(paths[0].parent), problems)
    return np.concatenate([p.array for p in parts]), parts[0].geometry


def attempt(read: Callable[[Source], Found], source: Source, problems: list[str]) -> Found | None:
    """What `read` gives, or None after adding what is wrong to `problems`, each with the name of the file."""
    try:
        return read(source)
    except ValidationErrors as error:
        problems += [f"{Path(error.about).name}: {p}" for p in error.problems]
        return None


def header_problems(cases: Mapping[str, CaseFiles], channels: tuple[str, ...]) -> list[str]:
    """What the headers alone give away, over all cases."""
    problems: list[str] = []
    firsts: dict[str, Header] = {}
    for case, files in cases.items():
        found: list[str] = []
        heads = [(path.name, head) for path in files.maps if (head := attempt(images.header, path, found))]
        if not found:
            firsts[case] = heads[0][1]
            found = _case_problems(heads, len(files.images), channels)
        problems += [f"{case}: {p}" for p in found]
    return [*problems, *_mixture_problems(firsts)]


def _case_problems(heads: list[tuple[str, Header]], scans: int, channels: tuple[str, ...]) -> list[str]:
    """What is wrong with the headers of a case; the first so many `scans` are those of its images."""
    count = sum(head.shape[0] for _, head in heads[:scans])
    misfits = [problem for other in heads[1:] for problem in _misfits(heads[0], other)]
    if count == len(channels):
        return misfits
    return [f"found {count} channels, dataset.json declares {describe_channels(channels)}", *misfits]


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


def image_problems(image: np.ndarray, channels: tuple[str, ...]) -> list[str]:
    """What is wrong with the voxels (C, Z, Y, X) of a case."""
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
