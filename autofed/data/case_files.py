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
        beside = (images.spacing_file(path) for path in self.maps)
        return (*self.maps, *dict.fromkeys(path for path in beside if path))


def find_images(folder: Path, channels: int) -> dict[str, CaseFiles]:
    """The cases of a folder of new scans: `{case}_{CCCC}{ending}`, or `{case}{ending}` where there is one file each.

    Four digits at the end count as a channel only if some file of the folder carries 0000; otherwise scan_0001 is a
    case. A single file is a folder of one case. `ValidationErrors` names the cases whose channels are not all there.
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
    raise_if_any(str(folder), problems)
    return found


def find_cases(folder: Path, ending: str) -> tuple[dict[str, CaseFiles], list[str]]:
    """The cases in imagesTr and labelsTr of a dataset, whose files all have this ending, and what is wrong."""
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
    return {case: CaseFiles(files.images, labels.get(case)) for case, files in found.items()}, problems


def _group(paths: Iterable[Path]) -> tuple[dict[str, CaseFiles], list[str]]:
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
    return {case: CaseFiles(tuple(parts[i] for i in sorted(parts))) for case, parts in found.items()}, problems


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
