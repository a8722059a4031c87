"""Which files belong to which case, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from autofed.data import images
from autofed.errors import ValidationErrors, raise_if_any


@dataclass(frozen=True)
class CaseFiles:
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
        spacing_files = (images.spacing_file(path) for path in self.maps)
        return (*self.maps, *dict.fromkeys(path for path in spacing_files if path))


def find_images(folder: Path, channels: int) -> dict[str, CaseFiles]:
    """The cases of a folder of new scans: `{case}_{CCCC}{ending}`, or `{case}{ending}` where there is one file each.

    Four digits at the end count as a channel only if some file of the folder carries 0000; otherwise scan_0001 is a
    case. A single file is a folder of one case. `ValidationErrors` names the cases whose channels are not all there.
    """
    folder = Path(folder)
    paths = [folder] if folder.is_file() else sorted(folder.iterdir()) if folder.is_dir() else []
    cases, problems = _group(p for p in paths if images.ending_of(p) and not p.name.startswith("."))
    if not cases:
        problems = [f"no images were found; expected files such as case_0000{images.volumes.NIFTI[0]}"]
    for case, files in cases.items():
        count, unreadable = _count_channels(files.images)
        problems += [f"{case}: {sentence}" for sentence in unreadable]
        if not unreadable and count != channels:
            problems.append(f"{case}: found {count} channels, but the plan has {channels}")
    raise_if_any(str(folder), problems)
    return cases


def find_cases(folder: Path, ending: str) -> tuple[dict[str, CaseFiles], list[str]]:
    """The cases in imagesTr and labelsTr of a dataset, whose files all have this ending, and what is wrong."""
    scans, problems = _files_of_ending(folder / "imagesTr", ending)
    cases, further_problems = _group(scans)
    problems += further_problems
    if not cases:
        return {}, [f"imagesTr holds no {ending} files; expected files such as case_0000{ending}"]
    label_ending = images.label_ending(ending)
    maps, further_problems = _files_of_ending(folder / "labelsTr", label_ending)
    problems += further_problems
    labels = {_stem(p): p for p in maps}
    problems += [f"labelsTr/{p.name} belongs to no image in imagesTr" for c, p in labels.items() if c not in cases]
    if not labels:
        problems.append(f"labelsTr holds no {label_ending} files; at least one case needs a label")
    return {case: CaseFiles(files.images, labels.get(case)) for case, files in cases.items()}, problems


def _group(paths: Iterable[Path]) -> tuple[dict[str, CaseFiles], list[str]]:
    """Files by case. A file may hold several channels (RGB): what counts is what is inside, not how many there are.

    Where no file is a channel 0000, numbers at the end are part of the case's name.
    """
    name_parts = {path: _case_and_channel(path) for path in paths}
    numbered = any(channel == 0 for _, channel in name_parts.values())
    files_by_case: dict[str, dict[int, Path]] = {}
    problems = []
    for path in name_parts:
        case, channel = (name_parts[path][0], name_parts[path][1] or 0) if numbered else (_stem(path), 0)
        first_path = files_by_case.setdefault(case, {}).setdefault(channel, path)
        if first_path != path:
            problems.append(f"{case}: both {first_path.name} and {path.name} are channel {channel}; remove one of them")
    problems += [
        f"{case}: found files numbered {sorted(channels)}; expected 0 to {max(channels)}"
        for case, channels in files_by_case.items()
        if len(channels) != max(channels) + 1
    ]
    return {
        case: CaseFiles(tuple(channels[i] for i in sorted(channels))) for case, channels in files_by_case.items()
    }, problems


def _case_and_channel(path: Path) -> tuple[str, int | None]:
    """The two parts of `{case}_{CCCC}`; a name that does not end in four digits has no channel."""
    stem = _stem(path)
    head, _, tail = stem.rpartition("_")
    return (head, int(tail)) if head and re.fullmatch("[0-9]{4}", tail) else (stem, None)


def _stem(path: Path) -> str:
    return path.name[: -len(images.ending_of(path))]


def _count_channels(paths: tuple[Path, ...]) -> tuple[int, list[str]]:
    try:
        return sum(images.header(p).shape[0] for p in paths), []
    except ValidationErrors as error:
        return 0, [f"{Path(error.about).name}: {p}" for p in error.problems]


def _files_of_ending(folder: Path, ending: str) -> tuple[list[Path], list[str]]:
    """The files of one ending, .PNG like .png, a name once; and which others have the same name.

    A leading dot is what file systems leave behind ("._case.nii.gz").
    """
    same_names: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if images.ending_of(path) and not path.name.startswith("."):
            same_names.setdefault(_stem(path).casefold(), []).append(path)
    files_by_name = {_stem(p): p for paths in same_names.values() for p in paths if images.ending_of(p) == ending}
    problems = [
        f"{folder.name} holds {' and '.join(p.name for p in paths)}, one name but for endings and capitals; keep one"
        for paths in same_names.values()
        if len(paths) > 1 and any(p in files_by_name.values() for p in paths)
    ]
    return list(files_by_name.values()), problems
