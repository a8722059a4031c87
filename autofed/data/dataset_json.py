"""What dataset.json says, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autofed.data import images
from autofed.data.case_files import CaseFiles
from autofed.data.labels import annotated_problems, declared_order, labels_problems


def channel_names(description: Mapping[str, Any]) -> dict[str, str]:
    """By number, as dataset.json has them."""
    return description.get("channel_names") or description.get("modality") or {}  # the Decathlon's older key


def description_problems(description: Any) -> list[str]:
    """What is wrong with the content of dataset.json by itself."""
    if not isinstance(description, dict):
        return ["expected an object with channel_names, labels and file_ending"]
    problems = []
    names = channel_names(description)
    if not isinstance(names, dict) or sorted(names) != sorted(str(i) for i in range(len(names))) or not names:
        problems.append('`channel_names` must map "0", "1", ... to names, for example {"0": "T1"}')
    label_problems = labels_problems(description.get("labels"), declared_order(description))
    problems += label_problems
    if not label_problems and "annotated" in description:
        problems += annotated_problems(description["annotated"], description["labels"])
    if str(description.get("file_ending", "")).lower() not in images.ENDINGS:
        endings = " ".join(sorted(images.ENDINGS))
        problems.append(f"`file_ending` is {description.get('file_ending')!r}; expected one of {endings}")
    patients = description.get("patients", {})
    if not isinstance(patients, dict) or not all(isinstance(v, str) for v in patients.values()):
        problems.append('`patients` must map case to patient, for example {"case_1": "patient_1"}')
    return problems + _protocol_problems(description.get("protocol", {}))


def _protocol_problems(protocol: Any) -> list[str]:
    """What is wrong with the facts that a site declares of all its cases."""
    has_known_keys = isinstance(protocol, dict) and set(protocol) <= {"spacing_mm", "size"}
    if not has_known_keys or not all(_is_triple(value) for value in protocol.values()):
        example = '{"spacing_mm": [3, 1, 1], "size": [40, 256, 256]}'
        return [f"`protocol` is {protocol!r}; expected numbers above 0 for (z, y, x), as {example}"]
    return []


def _is_triple(value: Any) -> bool:
    numbers = isinstance(value, list) and all(type(n) in (int, float) and 0 < n < 1e6 for n in value)
    return numbers and len(value) == 3


def number_problems(description: Mapping[str, Any], cases: Mapping[str, CaseFiles]) -> list[str]:
    """nnU-Net's numTraining is never needed here, but where it is wrong, files were lost or forgotten."""
    labelled = sum(files.label is not None for files in cases.values())
    declared = description.get("numTraining", len(cases))
    if not cases or declared in (len(cases), labelled):
        return []
    counts = f"imagesTr holds {len(cases)} cases, {labelled} of them with a label"
    return [f"`numTraining` is {declared!r}, but {counts}; correct the number, or look for what is missing"]


def no_dataset(folder: Path) -> str:
    """Why a folder without dataset.json is no dataset, and which one may be meant."""
    if not folder.exists():
        return "there is no such folder"
    nested = sorted(folder.glob("sites/*/dataset.json")) or sorted(folder.glob("*/dataset.json"))
    names = ", ".join(str(path.parent.relative_to(folder)) for path in nested[:6])
    hint = f"; did you mean the folders in it ({names})?" if nested else ""
    return f"there is no dataset.json; expected nnU-Net's raw layout (dataset.json, imagesTr, labelsTr){hint}"
