"""The folder that predict fills: maps of each case, and a JSON that says that the case is whole.

OUT/{prediction.json, CASE.json, CASE.nii.gz, CASE_entropy.nii.gz, CASE_mutual_information.nii.gz,
CASE_probabilities.npz}, the maps in the format of the scan.

A case is finished if its JSON is there, answers the same question (scan, weights, ensemble, maps asked for), and all
files that it names are there. So the JSON is the first thing that goes and the last that comes: whenever a process is
killed, a JSON never stands beside maps that it does not describe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autofed.data import Case, Files, read_channels
from autofed.data.images import Geometry, ending_of, label_ending, write
from autofed.errors import ValidationErrors, raise_if_any
from autofed.federation.run_folder import GLOBAL, Run
from autofed.files import digest, read_json, whole_file, write_json
from autofed.inference.predictor import Prediction, Predictor
from autofed.inference.scores import MAPS, find_references
from autofed.parallel import Progress, silent
from autofed.plans import Agreement

ABOUT = "prediction.json"
"""Says what the label values mean and which ensemble predicts; written before the first case."""

RESERVED = ("prediction", "report")
"""The JSON of a case of this name would be prediction.json, or the report that evaluate lays down here."""

_SAME_ENSEMBLE = ("weights", "plan", "mirroring", "postprocessing")


class PredictionFolder:
    """A folder of predictions; `probabilities` are written beside the labels only if asked for."""

    def __init__(self, folder: Path | str, *, probabilities: bool = False):
        self.folder = Path(folder)
        self.probabilities = probabilities

    def refuse_clashes(self, cases: Mapping[str, Files]) -> None:
        """`ValidationErrors` if predicting these cases would write over a scan or over somebody's files.

        Files count as somebody's if neither a prediction.json nor the JSON of their case says where they are from:
        the folder might be the one of the reference labels.
        """
        scans = [path for files in cases.values() for path in files.images]
        if self.folder.is_dir() and _identity(self.folder) in {_identity(path.parent) for path in scans}:
            raise ValidationErrors(str(self.folder), ["this is the folder of the images; predict into another one"])
        raise_if_any(str(self.folder), list(self._clashes(cases, {_identity(path) for path in scans})))

    def fill(
        self,
        cases: Mapping[str, Files],
        predictor: Predictor,
        runs: Sequence[Run],
        model: str | None = None,
        progress: Progress = silent,
    ) -> list[Path]:
        """Predict the cases that are not finished; gives the JSON of every case, once all were tried.

        One `ValidationErrors` names what is wrong with those that could not be predicted.
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

    def finished(self, cases: Mapping[str, Files], predictor: Predictor) -> list[str]:
        """The cases that the same ensemble has predicted before, as it is asked now."""
        return [
            case
            for case, files in cases.items()
            if self._is_finished(case, self._question(files, predictor), self._names(case, files))
        ]

    def refuse_unfinished(self) -> None:
        """`ValidationErrors` if cases lie here that are cut off, or that another ensemble predicted than
        prediction.json says.

        A folder without a prediction.json was not filled by predict, and anything may lie in it.
        """
        about = _read(self.folder / ABOUT)
        if not about:
            return
        problems = []
        for case in find_references(self.folder)[0]:
            summary = _read(self._summary(case))
            if "asked" not in summary:
                problems.append(f"{case}: its prediction is not finished; run `autofed predict` again")
            elif any(summary[key] != about[key] for key in _SAME_ENSEMBLE if key in summary and key in about):
                problems.append(f"{case}: another ensemble predicted it than {ABOUT} says; run `autofed predict` again")
        raise_if_any(str(self.folder), problems)

    def _clashes(self, cases: Mapping[str, Files], scans: set[tuple[int, int]]) -> Iterator[str]:
        is_ours = (self.folder / ABOUT).is_file() or any("asked" in _read(self._summary(case)) for case in cases)
        for case, files in cases.items():
            if case.lower() in RESERVED or case.endswith(MAPS):
                yield f"no case may be called {case!r}, which names another file of this folder; rename the scan"
                continue
            for path in (self._summary(case), *(self.folder / name for name in self._names(case, files).values())):
                if path.exists() and _identity(path) in scans:
                    yield f"{case}: {path.name} is one of the images; predict into another folder"
                elif path.exists() and not is_ours:
                    yield f"{case}: {path.name} is there and predict did not write it; predict into another folder"

    def _fill_case(self, case: str, files: Files, predictor: Predictor) -> Path:
        summary, names = self._summary(case), self._names(case, files)
        asked = self._question(files, predictor)
        if self._is_finished(case, asked, names):
            return summary
        image, geometry = read_channels(files.images)
        scan = Case(case, case, image, None, geometry.spacing_mm, geometry)
        found = predictor.predict(scan, probabilities=self.probabilities)
        self._clear(case)
        self._write_maps(names, found, geometry)
        write_json(
            summary,
            {
                "case": case,
                "images": [str(p.resolve()) for p in files.images],
                **_declared(predictor.plan.agreement),
                "files": names,
                **_spacing(geometry),
                **_describe(found),
                "mirroring": predictor.mirroring,
                "postprocessing": predictor.postprocessing.model_dump(mode="json"),
                "asked": asked,
            },
        )
        return summary

    def _is_finished(self, case: str, asked: str, names: Mapping[str, str]) -> bool:
        found = _read(self._summary(case))
        is_same = found.get("asked") == asked and found.get("files") == names
        return is_same and all((self.folder / name).is_file() for name in names.values())

    def _clear(self, case: str) -> None:
        """Take away what an earlier prediction of the case left: its JSON first, then the files that it names."""
        summary = self._summary(case)
        named = _read(summary).get("files", {})
        summary.unlink(missing_ok=True)
        for name in named.values() if isinstance(named, dict) else ():
            if isinstance(name, str) and name.startswith(case) and Path(name).name == name:
                (self.folder / name).unlink(missing_ok=True)

    def _write_maps(self, names: Mapping[str, str], found: Prediction, geometry: Geometry) -> None:
        for what, name in names.items():
            values = getattr(found, what)
            if what == "probabilities":
                with whole_file(self.folder / name) as part:
                    np.savez_compressed(part, probabilities=values)
            else:
                write(self.folder / name, values, geometry)

    def _write_about(self, predictor: Predictor, runs: Sequence[Run], model: str | None) -> None:
        about = {
            **_declared(predictor.plan.agreement),
            "runs": [str(run.folder.resolve()) for run in runs],
            "model": model or GLOBAL,
            "ensemble": [member.name for member in predictor.members],
            "mirroring": predictor.mirroring,
            "postprocessing": predictor.postprocessing.model_dump(mode="json"),
            "plan": predictor.plan.digest(),
            "weights": predictor.weights_digest,
        }
        write_json(self.folder / ABOUT, about)

    def _summary(self, case: str) -> Path:
        return self.folder / f"{case}.json"

    def _names(self, case: str, files: Files) -> dict[str, str]:
        """The files of a case by what they hold, which is also the name of the field of its `Prediction`."""
        ending = label_ending(ending_of(files.images[0]))
        names = {"labels": f"{case}{ending}", **{suffix[1:]: f"{case}{suffix}{ending}" for suffix in MAPS}}
        return names | ({"probabilities": f"{case}_probabilities.npz"} if self.probabilities else {})

    def _question(self, files: Files, predictor: Predictor) -> str:
        """A digest that changes with the scan, the ensemble, or what is asked for."""
        scans = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files.paths]
        ensemble = [predictor.weights_digest, predictor.plan.inference.digest(), predictor.mirroring]
        ensemble += [predictor.postprocessing.digest()] if predictor.postprocessing else []
        return digest([*ensemble, self.probabilities, scans])


def _declared(agreement: Agreement) -> dict[str, Any]:
    """What the values of the label maps mean, with the keys of dataset.json."""
    return agreement.model_dump(mode="json", include={"labels", "regions_class_order"})


def _spacing(geometry: Geometry) -> dict[str, list[float]]:
    """The spacing of a TIFF stands in the JSON beside it, which here is the case's own."""
    return {"spacing": list(geometry.spacing_mm)} if geometry.in_millimetres else {}


def _describe(found: Prediction) -> dict[str, Any]:
    """What the JSON of a case says of its prediction, beside where things lie."""
    inside = found.entropy[found.labels > 0]
    return {
        "structures": {
            name: {"voxels": s.voxels, s.measure: s.size, "range_over_snapshots": [s.smallest, s.largest]}
            for name, s in found.structures.items()
        },
        "mean_entropy_inside": float(inside.mean()) if inside.size else None,
        "members": found.members,
        "plan": found.plan_digest,
        "weights": found.weights_digest,
    }


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one if there is none or it is damaged."""
    try:
        value = read_json(path)
    except ValidationErrors:
        return {}
    return value if isinstance(value, dict) else {}


def _identity(path: Path) -> tuple[int, int]:
    """The same for two names of one file: through links, and where the file system takes A and a for one letter."""
    found = path.stat()
    return found.st_dev, found.st_ino
