"""Who trains and who is held out: always whole patients, never some of their cases."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autofed.errors import raise_if_any
from autofed.files import read_json, write_bytes

FOLDS = 5
ALL = "all"
"""The fold that holds out nobody."""

FILE = "splits.json"

_SEED = 12345  # nnU-Net's

Patients = Mapping[str, Sequence[str]]
"""The cases of each patient."""


@dataclass(frozen=True)
class Split:
    """The patients that a site trains on, and those that it holds out."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


def split(patients: Patients, fold: str, folder: Path, *, private: bool) -> Split:
    """A site's split for a fold, "all" or a number from 0; `folder` is where the site keeps its private files.

    As the site's splits.json says if there is one; else by fifths, and by a secret salt if the plan is private.
    """
    if fold == ALL:
        return Split(tuple(sorted(patients)), ())
    if (path := folder / FILE).is_file():
        return declared_split(path, patients, int(fold))
    raise_if_any(
        "a split by fifths", [f"there is no fold {fold}; write 0 to {FOLDS - 1}"] if int(fold) >= FOLDS else []
    )
    if private:
        return hashed_split(list(patients), int(fold), _salt(folder / "salt"))
    return nnunet_split(list(patients), int(fold))


def nnunet_split(patients: Sequence[str], fold: int) -> Split:
    """One of five parts of the patients is held out, the parts being those that nnU-Net would make of these names.

    A site with fewer than five holds out none: it would lose more in training than a score of so few is worth.
    """
    names = sorted(patients)
    if len(names) < FOLDS:
        return Split(tuple(names), ())
    order = np.arange(len(names))
    np.random.RandomState(_SEED).shuffle(order)
    held_out = {names[i] for i in np.array_split(order, FOLDS)[fold]}
    return _split_by(names, held_out)


def hashed_split(patients: Sequence[str], fold: int, salt: bytes) -> Split:
    """A patient's part follows from their own name and the site's secret salt, and from no other patient.

    So one patient more or less moves nobody else, which is what the privacy of a patient is measured against; and
    whoever does not know the salt cannot tell from a name in which part it is.
    """
    names = sorted(patients)
    fold_of = {name: int.from_bytes(hashlib.sha256(salt + name.encode()).digest()[:8]) % FOLDS for name in names}
    return _split_by(names, {name for name in names if fold_of[name] == fold})


def declared_split(path: Path, patients: Patients, fold: int) -> Split:
    """The split that a site wrote down, as nnU-Net does: a list of {"train": [cases], "val": [cases]}, one a fold.

    Patients that are in neither are left out. `ValidationErrors` names what is wrong with it, all at once.
    """
    folds = read_json(path)
    raise_if_any(str(path), _form_problems(folds, fold))
    patient_of = {case: patient for patient, cases in patients.items() for case in cases}
    sides = {side: list(dict.fromkeys(folds[fold][side])) for side in ("train", "val")}
    raise_if_any(str(path), _content_problems(sides, patient_of))
    raise_if_any(str(path), _divided_patient_problems(sides, patients, patient_of))
    train, validation = (tuple(sorted({patient_of[case] for case in sides[side]})) for side in ("train", "val"))
    return Split(train, validation)


def _salt(path: Path) -> bytes:
    """The site's secret, made once from the operating system's randomness."""
    if not path.is_file():
        write_bytes(path, secrets.token_bytes(32))
    return path.read_bytes()


def _split_by(names: Sequence[str], held_out: set[str]) -> Split:
    return Split(tuple(n for n in names if n not in held_out), tuple(n for n in names if n in held_out))


def _form_problems(folds: Any, fold: int) -> list[str]:
    expected = 'expected a list of {"train": [cases], "val": [cases]}, one for each fold'
    if not isinstance(folds, list) or not all(_is_fold(entry) for entry in folds):
        return [f"this is no split; {expected}"]
    if fold >= len(folds):
        return [f"it has {len(folds)} folds, from 0 on, and fold {fold} was asked for; name those that there are"]
    return []


def _is_fold(entry: Any) -> bool:
    sides = [entry.get(side) for side in ("train", "val")] if isinstance(entry, dict) else [None]
    return all(isinstance(side, list) and all(isinstance(case, str) for case in side) for side in sides)


def _divided_patient_problems(
    sides: Mapping[str, Sequence[str]], patients: Patients, patient_of: Mapping[str, str]
) -> list[str]:
    split_cases = {case for cases in sides.values() for case in cases}
    return [
        f"{patient} has {', '.join(c for c in patients[patient] if c not in split_cases)} besides, which is in "
        "neither; name all cases of a patient or none"
        for patient in sorted({patient_of[case] for case in split_cases})
        if not split_cases.issuperset(patients[patient])
    ]


def _content_problems(sides: Mapping[str, Sequence[str]], patient_of: Mapping[str, str]) -> list[str]:
    problems = [f"{side} names {case}, which is no case with a label here" for side, cases in sides.items()
                for case in cases if case not in patient_of]  # fmt: skip
    patients = {side: {patient_of[case] for case in cases if case in patient_of} for side, cases in sides.items()}
    both = sorted(patients["train"] & patients["val"])
    problems += [f"the patient {patient} is in train and in val; hold out whole patients" for patient in both]
    return problems if patients["train"] else [*problems, "train is empty; name the cases to train on"]
