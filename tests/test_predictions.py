"""The folder that predict fills: nothing is written over, and what is there is whole."""

import json
import shutil

import numpy as np
import pytest

from autofed.data import CaseFiles, find_images, images
from autofed.errors import ValidationErrors
from autofed.inference import prediction_folder
from autofed.inference.postprocessing import NOTHING
from autofed.inference.prediction_folder import PredictionFolder
from autofed.inference.predictor import Member, Prediction, Predictor, Structure
from autofed.training.network import build, weights_of
from tests.plans_made import small_plan
from tests.synthetic import make_site, write_rgb

PLAN = small_plan(labels=1)
MAPS = ("labels", "entropy", "mutual_information")


class Ensemble:
    """Answers like a `Predictor`, by the scan and its own name, without a network."""

    def __init__(self, name, members=2):
        self.weights_digest, self.mirroring, self.plan = name, False, PLAN
        self.postprocessing = NOTHING
        self.members = [Member(f"{name} {i}", PLAN, dict) for i in range(members)]

    def predict(self, case, *, probabilities=False):
        drawn = np.random.default_rng([len(self.weights_digest), int(case.image.sum())]).random(case.image.shape[1:])
        share = drawn.astype(np.float32)
        return Prediction(
            labels=(share > 0.5).astype(np.uint8),
            entropy=share,
            mutual_information=share / 2,
            structures={"structure_1": Structure(7, "volume_ml", 0.007, 0.006, 0.008)},
            members=len(self.members),
            plan_digest=PLAN.digest(),
            weights_digest=self.weights_digest,
            probabilities=np.stack([1 - share, share]) if probabilities else None,
        )


ONE, OTHER = Ensemble("one"), Ensemble("another")


@pytest.fixture
def scans(tmp_path):
    """A folder of two scans, scan_000 and scan_001."""
    return make_site(tmp_path / "scan", cases=2, part="Ts", shape=(8, 10, 12)) / "imagesTs"


def fill(folder, scans, ensemble=ONE, **wanted):
    cases = find_images(scans, 1)
    out = PredictionFolder(folder, **wanted)
    out.refuse_clashes(cases)
    return out.fill(cases, ensemble, [], "global")


def said_of(folder, cases):
    with pytest.raises(ValidationErrors) as caught:
        PredictionFolder(folder).refuse_clashes(cases)
    return caught.value.problems


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_a_case_is_its_maps_and_a_json_that_names_them(scans, tmp_path):
    written = fill(tmp_path / "out", scans, OTHER, probabilities=True)
    assert [p.name for p in written] == ["scan_000.json", "scan_001.json"]
    about = json.loads(written[0].read_text())
    assert set(about["files"]) == {*MAPS, "probabilities"}
    assert all((tmp_path / "out" / name).is_file() for name in about["files"].values())
    assert (
        about["members"] == 2 and about["case"] == "scan_000" and about["labels"] == {"background": 0, "structure_1": 1}
    )
    named = {"prediction.json", *(f"{c}{e}" for c in ("scan_000", "scan_001") for e in (
        ".json", ".nii.gz", "_entropy.nii.gz", "_mutual_information.nii.gz", "_probabilities.npz"))}  # fmt: skip
    assert set(content(tmp_path / "out")) == named


def test_a_single_member_has_a_map_of_no_disagreement_and_says_that_it_is_single(scans, tmp_path):
    alone = Member("alone", PLAN, lambda: weights_of(build(PLAN.local.network, seed=1)))
    (first, _) = fill(tmp_path / "out", scans, Predictor([alone], mirroring=False))
    about = json.loads(first.read_text())
    assert about["members"] == 1
    assert not images.read(tmp_path / "out" / about["files"]["mutual_information"]).array.any()


# Nothing is written over


@pytest.mark.parametrize("numbered", [True, False])
def test_the_folder_of_the_images_is_refused(scans, numbered):
    for path in scans.iterdir():
        path.rename(path if numbered else path.with_name(path.name.replace("_0000.", ".")))
    before = content(scans)
    with pytest.raises(ValidationErrors, match="folder of the images"):
        fill(scans, scans)
    with pytest.raises(ValidationErrors, match="folder of the images"):
        fill(scans / ".." / scans.name, scans / min(before))
    assert content(scans) == before


def test_a_scan_that_lies_elsewhere_is_not_written_over(scans, tmp_path):
    """The folder of the images holds links, and one of them leads to where a label map would go."""
    scan = tmp_path / "out" / "scan_000.nii.gz"
    scan.parent.mkdir()
    shutil.move(scans / "scan_000_0000.nii.gz", scan)
    (scans / "scan_000.nii.gz").symlink_to(scan)
    before = scan.read_bytes()
    with pytest.raises(ValidationErrors, match="scan_000.nii.gz is one of the images"):
        fill(tmp_path / "out", scans)
    assert scan.read_bytes() == before


def test_files_that_predict_did_not_write_are_not_written_over(scans, tmp_path):
    labels = scans.parent / "labelsTs"
    before = content(labels)
    said = said_of(labels, find_images(scans, 1))
    assert len(said) == 2 and "scan_000.nii.gz is there and predict did not write it" in said[0]
    assert content(labels) == before


def test_a_folder_that_an_interrupted_predict_left_is_its_own(scans, tmp_path):
    fill(tmp_path / "out", scans)
    (tmp_path / "out" / "prediction.json").unlink()
    (tmp_path / "out" / "scan_001.json").unlink()
    assert len(fill(tmp_path / "out", scans)) == 2


@pytest.mark.parametrize("name", ["prediction", "Prediction", "report", "a_entropy"])
def test_cases_whose_files_have_another_meaning_are_refused(tmp_path, name):
    scan = tmp_path / "scans" / f"{name}.png"
    write_rgb(scan, np.zeros((3, 4, 4), np.uint8))
    (said,) = said_of(tmp_path, {name: CaseFiles((scan,))})
    assert f"no case may be called {name!r}" in said


# What is there is whole


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_a_json_never_stands_beside_the_maps_of_another_ensemble(scans, tmp_path, monkeypatch, killed_at):
    out = tmp_path / "out"
    fill(out, scans, ONE)
    writes = []

    def write(path, array, geometry):
        writes.append(path)
        if len(writes) == killed_at:
            raise KeyboardInterrupt
        images.write(path, array, geometry)

    monkeypatch.setattr(prediction_folder, "write", write)
    with pytest.raises(KeyboardInterrupt):
        fill(out, scans, OTHER)
    assert not (out / "scan_000.json").exists()
    left = [path.name for path in out.glob("scan_000*")]
    assert len(left) == killed_at - 1  # and nothing of the earlier ensemble
    assert json.loads((out / "scan_001.json").read_text())["weights"] == ONE.weights_digest
    monkeypatch.undo()
    fill(out, scans, OTHER)
    fill(tmp_path / "fresh", scans, OTHER)
    assert content(out) == content(tmp_path / "fresh")


@pytest.mark.parametrize("gone", ["", "_entropy", "_mutual_information"])
def test_a_case_with_a_file_missing_is_predicted_again(scans, tmp_path, gone):
    fill(tmp_path / "out", scans)
    before = content(tmp_path / "out")
    (tmp_path / "out" / f"scan_000{gone}.nii.gz").unlink()
    fill(tmp_path / "out", scans)
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"files": 3}', '{"files": {"labels": "../scan/dataset.json"}}'])
def test_a_case_with_a_damaged_json_is_predicted_again(scans, tmp_path, text):
    fill(tmp_path / "out", scans)
    before = content(tmp_path / "out")
    (tmp_path / "out" / "scan_000.json").write_text(text)
    fill(tmp_path / "out", scans)
    assert content(tmp_path / "out") == before
    assert (tmp_path / "scan" / "dataset.json").is_file()


def test_finished_cases_are_left_alone(scans, tmp_path):
    out = tmp_path / "out"
    fill(out, scans)
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("scan_*")}
    fill(out, scans)
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("scan_*")} == times


def test_maps_that_are_no_longer_asked_for_go(scans, tmp_path):
    fill(tmp_path / "out", scans, probabilities=True)
    fill(tmp_path / "out", scans)
    assert not list((tmp_path / "out").glob("*.npz"))


def test_a_scan_that_changed_is_predicted_again(scans, tmp_path):
    fill(tmp_path / "out", scans)
    before = content(tmp_path / "out")
    image = images.read(scans / "scan_000_0000.nii.gz")
    images.write(scans / "scan_000_0000.nii.gz", image.array[0] + 1, image.geometry)
    fill(tmp_path / "out", scans)
    after = content(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {
        "scan_000.json", "scan_000.nii.gz", "scan_000_entropy.nii.gz", "scan_000_mutual_information.nii.gz"
    }  # fmt: skip


def test_what_is_cut_off_or_mixed_is_refused(scans, tmp_path):
    out = tmp_path / "out"
    fill(out, scans)
    PredictionFolder(out).refuse_unfinished()
    about = (out / "prediction.json").read_text()
    (out / "scan_000.json").unlink()
    with pytest.raises(ValidationErrors, match="scan_000: its prediction is not finished"):
        PredictionFolder(out).refuse_unfinished()
    fill(out, scans, OTHER)
    PredictionFolder(out).refuse_unfinished()
    (out / "prediction.json").write_text(about)
    with pytest.raises(ValidationErrors) as caught:
        PredictionFolder(out).refuse_unfinished()
    assert len(caught.value.problems) == 2 and "another ensemble" in caught.value.problems[0]
    (out / "prediction.json").unlink()
    PredictionFolder(out).refuse_unfinished()  # not filled by predict, as far as anybody can tell


def test_a_case_that_cannot_be_predicted_is_named_and_the_others_are(scans, tmp_path):
    path = scans / "scan_000_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:-300])
    steps = []
    cases = find_images(scans, 1)
    with pytest.raises(ValidationErrors, match="scan_000: scan_000_0000.nii.gz: "):
        PredictionFolder(tmp_path / "out").fill(cases, ONE, [], "global", progress=lambda *step: steps.append(step))
    assert (tmp_path / "out" / "scan_001.json").is_file() and not list((tmp_path / "out").glob("scan_000*"))
    assert [done for _, done, _ in steps] == [0, 1, 2]
