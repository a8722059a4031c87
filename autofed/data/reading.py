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
Content = TypeVar("Content")


def read_channels(paths: tuple[Path, ...]) -> tuple[np.ndarray, Geometry]:
    """All channels of a case as one (C, Z, Y, X) array; `ValidationErrors` if files are broken or do not fit."""
    problems: list[str] = []
    parts = [part for part in (read_or_note(images.read, path, problems) for path in paths) if part]
    raise_if_any(str(paths[0].parent), problems)
    headers = [(path.name, p.geometry.header(p.array.shape)) for path, p in zip(paths, parts, strict=True)]
    problems += [problem for header in headers[1:] for problem in _grid_mismatches(headers[0], header)]
    raise_if_any(str(paths[0].parent), problems)
    return np.concatenate([p.array for p in parts]), parts[0].geometry


def read_or_note(read: Callable[[Source], Content], source: Source, problems: list[str]) -> Content | None:
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
        case_problems: list[str] = []
        headers = [
            (path.name, header) for path in files.maps if (header := read_or_note(images.header, path, case_problems))
        ]
        if not case_problems:
            firsts[case] = headers[0][1]
            case_problems = _case_problems(headers, len(files.images), channels)
        problems += [f"{case}: {p}" for p in case_problems]
    return [*problems, *_mixture_problems(firsts)]


def _case_problems(headers: list[tuple[str, Header]], scans: int, channels: tuple[str, ...]) -> list[str]:
    """What is wrong with the headers of a case; the first so many `scans` are those of its images."""
    count = sum(header.shape[0] for _, header in headers[:scans])
    mismatches = [problem for header in headers[1:] for problem in _grid_mismatches(headers[0], header)]
    if count == len(channels):
        return mismatches
    return [f"found {count} channels, dataset.json declares {describe_channels(channels)}", *mismatches]


def _mixture_problems(headers: Mapping[str, Header]) -> list[str]:
    """Flat cases among volumes, and volumes (of TIFF) without a spacing among others."""
    volumes = {case: header for case, header in headers.items() if header.shape[1] > 1}
    flat = [case for case in headers if case not in volumes]
    without_spacing = [case for case, header in volumes.items() if not header.direction]
    problems = []
    if flat and volumes:
        minority, kind = min((flat, "2D"), (list(volumes), "3D"), key=lambda group: len(group[0]))
        cases = f"{', '.join(minority[:5])} are {kind}, the others are not"
        problems.append(f"2D and 3D cases are mixed: {cases}; make two datasets of them")
    if 0 < len(without_spacing) < len(volumes):
        cases = f"the spacing of {', '.join(without_spacing[:5])} is not known, that of other cases is"
        problems.append(
            f'{cases}; write {without_spacing[0]}.json beside it, like {{"spacing": [3, 1, 1]}} (z, y, x in mm)'
        )
    return problems


def image_problems(image: np.ndarray, channels: tuple[str, ...]) -> list[str]:
    """What is wrong with the voxels (C, Z, Y, X) of a case."""
    problems = []
    for number, voxels in enumerate(image):
        nonfinite = int(np.count_nonzero(~np.isfinite(voxels)))
        if nonfinite:
            where = f"channel {number} ({', '.join(channels[number : number + 1])})"
            problems.append(f"{nonfinite} voxels of {where} are NaN or infinite; replace them before planning")
    if all(voxels.min() == voxels.max() for voxels in image):  # one channel may be: an alpha, a sequence not taken
        constants = ", ".join(f"{voxels.min():g}" for voxels in image)
        problems.append(f"the image is {constants} everywhere; export it again, or take the case out")
    return problems


def _grid_mismatches(first: tuple[str, Header], second: tuple[str, Header]) -> list[str]:
    """Where a label, or a further channel, does not lie on the first channel.

    Origins may differ: tools lose them, and what counts is voxel on voxel. A turned axis means turned voxels.
    """
    (first_name, a), (second_name, b) = first, second
    problems = []
    if b.shape[1:] != a.shape[1:]:
        problems.append(f"{second_name} has the shape {b.shape[1:]}, {first_name} {a.shape[1:]}")
    if not np.allclose(b.spacing_mm, a.spacing_mm, rtol=_SPACING_TOLERANCE):
        problems.append(f"{second_name} has the spacing {b.spacing_mm} mm, {first_name} {a.spacing_mm} mm")
    if _directions_differ(b.direction, a.direction):
        problems.append(f"{second_name} has the direction {_round(b.direction)}, {first_name} {_round(a.direction)}")
    return [f"{problem}; write both on one grid" for problem in problems]


def _directions_differ(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return len(a) == len(b) and not np.allclose(a, b, atol=_DIRECTION_TOLERANCE)


def _round(numbers: tuple[float, ...]) -> str:
    return " ".join(f"{round(v, 2) + 0:g}" for v in numbers)
