"""Public images: the same at every site, agreed on by digest, brought onto a site's own grid, and labelled there.

WORK/public/<digest>/ holds one of them on one grid, {image.b2nd, case.json}; the digest names grid, normalisation and
files, so that sites of one machine with one plan share it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from autofed.data import Case, CaseFiles, find_images, read_channels
from autofed.data.labels import Labels
from autofed.errors import collect_errors, raise_if_any
from autofed.files import digest, whole_folder
from autofed.plans import Agreement, Plan
from autofed.preprocessing.cases import InverseTransform, preprocess_case, preprocess_label
from autofed.preprocessing.store import Store, write_image, write_label

UNKNOWN = 255
"""The value of voxels of a public image whose label is not known."""

LabelMaps = Mapping[str, np.ndarray]
"""By public image: a label map (Z, Y, X), uint8, on the image's own grid, `UNKNOWN` where there is no label."""

_NAMED = 5
"""So many images are named in a message; of the others it gives the number."""


def find_public(folder: Path, channels: int) -> dict[str, CaseFiles]:
    """The images of a folder, or of the imagesTr in it; labels are not read. `ValidationErrors` if there are none."""
    inner = Path(folder) / "imagesTr"
    return find_images(inner if inner.is_dir() else Path(folder), channels)


def public_digests(images: Mapping[str, CaseFiles]) -> tuple[str, ...]:
    """What sites agree on: the name of each image, and the beginning of its files' SHA-256."""
    return tuple(f"{case} {_digest(files)}" for case, files in sorted(images.items()))


def differences(agreed: Sequence[str], here: Sequence[str]) -> list[str]:
    """How images differ from those that were agreed on, by name."""
    agreed_digests, digests = (dict(line.rsplit(" ", 1) for line in lines) for lines in (agreed, here))
    changed = [case for case in digests if case in agreed_digests and digests[case] != agreed_digests[case]]
    return [
        f"{_listed(cases)} {difference}"
        for cases, difference in (
            ([case for case in agreed_digests if case not in digests], "agreed on but not here; get the same images"),
            (
                [case for case in digests if case not in agreed_digests],
                "here but not agreed on; take what is too much away",
            ),
            (changed, "here with other content than was agreed on; get the same files"),
        )
        if cases
    ]


@dataclass(frozen=True)
class PublicImages:
    """Public images on a plan's grid: the folder of each preprocessed image, and what label values mean."""

    folders: Mapping[str, Path]
    labels: Labels

    @property
    def grids(self) -> dict[str, tuple[int, int, int]]:
        """The shape (Z, Y, X) of each image in its own file: the grid on which labels travel."""
        return {name: self.inverse(name).shape for name in self.folders}

    def image(self, name: str) -> np.ndarray:
        """The image (C, *grid) on the plan's grid."""
        image: np.ndarray = Store(self.folders, {}).image(name)[:]
        return image

    def inverse(self, name: str) -> InverseTransform:
        """The transform back onto the image's own grid."""
        return InverseTransform.load(self.folders[name] / "case.json")

    def labelled(self, maps: LabelMaps, folder: Path) -> Store:
        """The images that have labels, each a patient, with their maps on the plan's grid, stored in `folder`.

        `ValidationErrors` if a map is not of one of these images.
        """
        raise_if_any("the agreed labels", _map_problems(maps, self))
        with_labels = [name for name, label_map in maps.items() if (label_map != UNKNOWN).any()]
        target = folder / _content_digest(maps)[:16]
        if not target.is_dir():
            shutil.rmtree(folder, ignore_errors=True)  # those of earlier rounds
            with whole_folder(target) as part:
                for name in with_labels:
                    case_folder = part / self.folders[name].name
                    case_folder.mkdir(exist_ok=True)
                    write_label(case_folder, preprocess_label(maps[name], self.inverse(name)), self.labels)
        label_folders = {name: target / self.folders[name].name for name in with_labels}
        return Store(self.folders, {name: (name,) for name in with_labels}, label_folders=label_folders)


def open_public(folder: Path, plan: Plan, work: Path) -> PublicImages:
    """The public images of a plan, prepared in WORK/public.

    `ValidationErrors` names the difference if the folder holds others than those agreed on, and every image that does
    not fit.
    """
    images = find_public(folder, len(plan.agreement.channels))
    raise_if_any(str(folder), differences(plan.agreement.public_images, public_digests(images)))
    raise_if_any(str(folder), _label_problems(plan.agreement))
    work = Path(work) / "public"
    tasks: list[Callable[[], Path]] = [
        lambda case=case, files=files: _preprocessed(case, files, plan, work)  # type: ignore[misc]
        for case, files in sorted(images.items())
    ]
    folders = dict(zip(sorted(images), collect_errors(str(folder), tasks), strict=True))
    return PublicImages(folders, replace(Labels.of(plan.agreement), ignore=UNKNOWN))


def _preprocessed(case: str, files: CaseFiles, plan: Plan, work: Path) -> Path:
    """The folder of a preprocessed image, which is written if it is not there yet."""
    local = plan.local
    target = work / digest([case, _digest(files), local.preprocessing_digest()])[:16]
    if not target.is_dir():
        array, geometry = read_channels(files.images)
        raise_if_any(case, _image_problems(array, plan.agreement.dimension))
        preprocessed = preprocess_case(
            Case(case, case, array, None, geometry.spacing_mm, geometry), local.geometry, local.intensity
        )
        try:
            with whole_folder(target) as part:
                write_image(part, preprocessed)
        except OSError:
            if not target.is_dir():  # else another training at the same time was quicker, with the same content
                raise
    return target


def _image_problems(image: np.ndarray, dimension: int) -> list[str]:
    problems = []
    if (image.shape[1] == 1) != (dimension == 2):
        problems.append(f"the image has {image.shape[1]} slices, the plan is {dimension}D")
    if not np.isfinite(image).all():
        problems.append("the image holds NaN or infinite values")
    return problems


def _label_problems(agreement: Agreement) -> list[str]:
    """Why labels of these structures cannot be passed on."""
    problems = []
    if agreement.annotated:
        names = ", ".join(agreement.annotated)
        problems.append(f"{names} annotated some structures only, and would teach the others that the rest is not "
                        "there; leave these sites out, or name an algorithm that shares weights")  # fmt: skip
    largest = max(Labels.of(agreement).values)
    if largest >= UNKNOWN:
        problems.append(f"labels up to {largest} do not fit a byte, of which {UNKNOWN} is taken; expected lower ones")
    return problems


def _map_problems(maps: LabelMaps, public: PublicImages) -> list[str]:
    unknown = [name for name in maps if name not in public.folders]
    grids = {name: public.inverse(name).shape for name in maps if name not in unknown}
    return [f"{name!r} is none of the public images" for name in unknown] + [
        f"{name} has labels of the shape {maps[name].shape} and {maps[name].dtype}; expected {grid} and uint8"
        for name, grid in grids.items()
        if maps[name].shape != grid or maps[name].dtype != np.uint8
    ]


def _content_digest(maps: LabelMaps) -> str:
    sha256 = hashlib.sha256()
    for name, array in sorted(maps.items()):
        sha256.update(name.encode() + b"\0" + np.ascontiguousarray(array).tobytes())
    return sha256.hexdigest()


def _listed(cases: Sequence[str]) -> str:
    named = ", ".join(sorted(cases)[:_NAMED])
    more = f" and {len(cases) - _NAMED} more" if len(cases) > _NAMED else ""
    return f"{named}{more} {'is' if len(cases) == 1 else 'are'}"


def _digest(files: CaseFiles) -> str:
    return digest([_file_digest(path, path.stat().st_mtime_ns, path.stat().st_size) for path in files.paths])[:32]


@cache
def _file_digest(path: Path, modified: int, size: int) -> str:
    """Read once, as long as the file stays as it is."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
