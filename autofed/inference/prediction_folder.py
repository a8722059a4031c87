"""The folder that predict writes and evaluate reads: maps of each case, and a JSON that says that the case is complete.

OUT/{prediction.json, CASE.json, CASE.nii.gz, CASE_entropy.nii.gz, CASE_mutual_information.nii.gz,
CASE_probabilities.npz}, the maps in the format of the scan.

A case is finished if its JSON is there, all files that it names are there, and it holds the digest of the same inputs
(scan, weights, ensemble, requested maps). So the JSON is deleted first and written last: whenever a process is killed,
a JSON never stands beside maps that it does not describe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autofed.data import Case, CaseFiles, read_channels
from autofed.data.images import Geometry, ending_of, label_ending, write
from autofed.errors import ValidationErrors, raise_if_any
from autofed.files import digest, read_json, whole_file, write_json
from autofed.inference.predictor import Prediction, Predictor
from autofed.inference.scores import MAPS, find_references
from autofed.parallel import Progress, silent
from autofed.plans import Agreement

ABOUT = "prediction.json"
"""Holds what the label values mean and which ensemble predicts; written before the first case."""

RESERVED = ("prediction", "report")
"""The JSON of a case of this name would be prediction.json, or the report that evaluate writes here."""

_SAME_ENSEMBLE = ("weights", "plan", "mirroring", "postprocessing")


_OF_A_CASE = {"case", "images", "labels", "files"}
"""Keys of the JSON of a case that a report or a plan does not have."""


@dataclass(frozen=True)
class PredictedCase:
    """A predicted case as its JSON describes it: its images, and its maps by what they hold ("labels", "entropy" ...).

    `labels` are the structures and their values, with the keys of dataset.json.
    """

    case: str
    images: tuple[Path, ...]
    labels: Mapping[str, Any]
    maps: Mapping[str, Path]

    @property
    def has_images(self) -> bool:
        """Whether all images are still where they were."""
        return all(path.is_file() for path in self.images)


class PredictionFolder:
    """A folder of predictions; `probabilities` are written beside the labels only on request."""

    def __init__(self, folder: Path | str, *, probabilities: bool = False):
        self.folder = Path(folder)
        self.probabilities = probabilities

    def refuse_clashes(self, cases: Mapping[str, CaseFiles]) -> None:
        """`ValidationErrors` if predicting these cases would overwrite a scan, or files that predict did not write.

        Files count as predict's own if there is a prediction.json or the JSON of a case: otherwise the folder might be
        the one of the reference labels.
        """
        scans = [path for files in cases.values() for path in files.images]
        if self.folder.is_dir() and _identity(self.folder) in {_identity(path.parent) for path in scans}:
            raise ValidationErrors(str(self.folder), ["this is the folder of the images; predict into another one"])
        raise_if_any(str(self.folder), list(self._clashes(cases, {_identity(path) for path in scans})))

    def fill(
        self,
        cases: Mapping[str, CaseFiles],
        predictor: Predictor,
        runs: Sequence[Path],
        model: str,
        progress: Progress = silent,
    ) -> list[Path]:
        """Predict the cases that are not finished; gives the paths of the JSON of every case, once all were tried.

        One `ValidationErrors` names the problems of those that could not be predicted.
        """
        self._write_about(predictor, runs, model)
        written, problems = [], []
        progress("predicting", 0, len(cases))
        for done, (case, files) in enumerate(cases.items(), start=1):
            try:
                written.append(self._fill_case(case, files, predictor))
            except ValidationErrors as error:
                problems += [f"{case}: {p}" for p in error.problems]
            progress("predicting", done, len(cases))
        raise_if_any("predict", problems)
        return written

    def finished(self, cases: Mapping[str, CaseFiles], predictor: Predictor) -> list[str]:
        """The cases whose prediction by the same ensemble, with the same options, is complete."""
        return [
            case
            for case, files in cases.items()
            if self._is_finished(case, self._input_digest(files, predictor), self._names(case, files))
        ]

    def refuse_unfinished(self) -> None:
        """`ValidationErrors` if the prediction of a case is incomplete, or not by the ensemble of prediction.json.

        A folder without a prediction.json was not written by predict, and may hold anything.
        """
        about = _read(self.folder / ABOUT)
        if not about:
            return
        problems = []
        for case in find_references(self.folder)[0]:
            summary = _read(self.summary(case))
            if "asked" not in summary:
                problems.append(f"{case}: its prediction is not finished; run `autofed predict` again")
            elif any(summary[key] != about[key] for key in _SAME_ENSEMBLE if key in summary and key in about):
                problems.append(f"{case}: another ensemble predicted it than {ABOUT} says; run `autofed predict` again")
        raise_if_any(str(self.folder), problems)

    def cases(self) -> dict[str, PredictedCase]:
        """The predicted cases by their names. The mutual information of a single model is left out: it is 0."""
        cases = {}
        for path in sorted(self.folder.glob("*.json")):
            value = read_json(path)
            if not isinstance(value, dict) or not value.keys() >= _OF_A_CASE:
                continue  # a report or a plan that lies here too
            maps = {kind: self.folder / name for kind, name in value["files"].items() if name}
            if value.get("members") == 1:
                maps.pop("mutual_information", None)
            cases[value["case"]] = PredictedCase(
                value["case"], tuple(map(Path, value["images"])), value["labels"], maps
            )
        return cases

    def runs(self) -> list[Path]:
        """The folders of the runs that predicted; none where there is no prediction.json."""
        about = self.folder / ABOUT
        return [Path(run) for run in read_json(about)["runs"]] if about.is_file() else []

    def summary(self, case: str) -> Path:
        """The path of the JSON of a case."""
        return self.folder / f"{case}.json"

    def _clashes(self, cases: Mapping[str, CaseFiles], scans: set[tuple[int, int]]) -> Iterator[str]:
        is_own = (self.folder / ABOUT).is_file() or any("asked" in _read(self.summary(case)) for case in cases)
        for case, files in cases.items():
            if case.lower() in RESERVED or case.endswith(MAPS):
                yield f"no case may be called {case!r}, which names another file of this folder; rename the scan"
                continue
            for path in (self.summary(case), *(self.folder / name for name in self._names(case, files).values())):
                if path.exists() and _identity(path) in scans:
                    yield f"{case}: {path.name} is one of the images; predict into another folder"
                elif path.exists() and not is_own:
                    yield f"{case}: {path.name} is there and predict did not write it; predict into another folder"

    def _fill_case(self, case: str, files: CaseFiles, predictor: Predictor) -> Path:
        summary, names = self.summary(case), self._names(case, files)
        inputs = self._input_digest(files, predictor)
        if self._is_finished(case, inputs, names):
            return summary
        image, geometry = read_channels(files.images)
        scan = Case(case, case, image, None, geometry.spacing_mm, geometry)
        prediction = predictor.predict(scan, probabilities=self.probabilities)
        self._clear(case)
        self._write_maps(names, prediction, geometry)
        write_json(
            summary,
            {
                "case": case,
                "images": [str(p.resolve()) for p in files.images],
                **_declaration(predictor.plan.agreement),
                "files": names,
                **_spacing(geometry),
                **_statistics(prediction),
                "mirroring": predictor.mirroring,
                "postprocessing": predictor.postprocessing.model_dump(mode="json"),
                "asked": inputs,
            },
        )
        return summary

    def _is_finished(self, case: str, inputs: str, names: Mapping[str, str]) -> bool:
        summary = _read(self.summary(case))
        is_same = summary.get("asked") == inputs and summary.get("files") == names
        return is_same and all((self.folder / name).is_file() for name in names.values())

    def _clear(self, case: str) -> None:
        """Delete an earlier prediction of the case: its JSON first, then the files that it names."""
        summary = self.summary(case)
        files = _read(summary).get("files", {})
        summary.unlink(missing_ok=True)
        for name in files.values() if isinstance(files, dict) else ():
            if isinstance(name, str) and name.startswith(case) and Path(name).name == name:
                (self.folder / name).unlink(missing_ok=True)

    def _write_maps(self, names: Mapping[str, str], prediction: Prediction, geometry: Geometry) -> None:
        for field, name in names.items():
            values = getattr(prediction, field)
            if field == "probabilities":
                with whole_file(self.folder / name) as part:
                    np.savez_compressed(part, probabilities=values)
            else:
                write(self.folder / name, values, geometry)

    def _write_about(self, predictor: Predictor, runs: Sequence[Path], model: str) -> None:
        about = {
            **_declaration(predictor.plan.agreement),
            "runs": [str(run.resolve()) for run in runs],
            "model": model,
            "ensemble": [member.name for member in predictor.members],
            "mirroring": predictor.mirroring,
            "postprocessing": predictor.postprocessing.model_dump(mode="json"),
            "plan": predictor.plan.digest(),
            "weights": predictor.weights_digest,
        }
        write_json(self.folder / ABOUT, about)

    def _names(self, case: str, files: CaseFiles) -> dict[str, str]:
        """The names of a case's files by the field of `Prediction` that each holds."""
        ending = label_ending(ending_of(files.images[0]))
        names = {"labels": f"{case}{ending}", **{suffix[1:]: f"{case}{suffix}{ending}" for suffix in MAPS}}
        return names | ({"probabilities": f"{case}_probabilities.npz"} if self.probabilities else {})

    def _input_digest(self, files: CaseFiles, predictor: Predictor) -> str:
        """A digest of the scan, the ensemble and the requested maps."""
        scans = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files.paths]
        ensemble = [predictor.weights_digest, predictor.plan.inference.digest(), predictor.mirroring]
        ensemble += [predictor.postprocessing.digest()] if predictor.postprocessing else []
        return digest([*ensemble, self.probabilities, scans])


def _declaration(agreement: Agreement) -> dict[str, Any]:
    """What the values of the label maps mean, with the keys of dataset.json."""
    return agreement.model_dump(mode="json", include={"labels", "regions_class_order"})


def _spacing(geometry: Geometry) -> dict[str, list[float]]:
    """The spacing of a TIFF is read from the JSON beside it, which here is that of the case."""
    return {"spacing": list(geometry.spacing_mm)} if geometry.in_millimetres else {}


def _statistics(prediction: Prediction) -> dict[str, Any]:
    """What the JSON of a case holds of its prediction besides paths."""
    inside = prediction.entropy[prediction.labels > 0]
    return {
        "structures": {
            name: {"voxels": s.voxels, s.measure: s.size, "range_over_snapshots": [s.smallest, s.largest]}
            for name, s in prediction.structures.items()
        },
        "mean_entropy_inside": float(inside.mean()) if inside.size else None,
        "members": prediction.members,
        "plan": prediction.plan_digest,
        "weights": prediction.weights_digest,
    }


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one if there is none or it is damaged."""
    try:
        value = read_json(path)
    except ValidationErrors:
        return {}
    return value if isinstance(value, dict) else {}


def _identity(path: Path) -> tuple[int, int]:
    """Device and inode: equal for two names of one file, through links and where the file system ignores case."""
    status = path.stat()
    return status.st_dev, status.st_ino
