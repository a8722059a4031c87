"""The main job through the verbs, in 3D and 2D, and what happens to bad input."""

import json

import nibabel
import numpy as np
import pytest

import autofed
from autofed import plans
from autofed.api import planning
from autofed.data import images
from autofed.errors import ValidationErrors
from autofed.federation import checkpoints
from autofed.federation.checkpoints import saved_rounds
from autofed.federation.run_folder import Run
from autofed.messages import load_groups, save_groups
from tests.synthetic import ORGAN_AND_TUMOUR, make_site

SMALL = {"training.batch_size": 2, "training.steps_per_round": 2, "training.rounds": 3, "learning_rate": 0.05}
KINDS = {
    "volumes": {"dimension": 3, "channels": ("T1", "T2"), "labels": ORGAN_AND_TUMOUR},
    "pictures": {"dimension": 2, "channels": ("R", "G", "B"), "ending": ".jpg"},
}


class Federation:
    """Two sites, a test set, a plan, prepared data and a finished run, in a folder."""

    def __init__(self, root, kind):
        self.root, self.kind = root, kind
        self.sites = [
            make_site(root / "raw" / name, cases=n, **KINDS[kind]) for name, n in (("alpha", 3), ("bravo", 2))
        ]
        self.test = make_site(root / "test", cases=2, part="Ts", seed=9, **KINDS[kind])
        sizes = [8, 8, 16, 16, 16, 16]
        first = autofed.plan(self.sites, hours=0.01, device="cpu")
        stages = len(first.local.network.features)
        self.plan = autofed.plan(
            self.sites, root / "plan.json", hours=0.01, device="cpu",
            settings={**SMALL, "network.features": sizes[:stages]},
        )  # fmt: skip
        autofed.preprocess(root / "plan.json", self.sites, root / "work")
        self.run = autofed.train(root / "plan.json", root / "work", root / "run", device="cpu").folder


@pytest.fixture(scope="module", params=list(KINDS))
def federation(request, tmp_path_factory):
    return Federation(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    return Federation(tmp_path_factory.mktemp("volumes"), "volumes")


def test_the_main_job(federation, tmp_path):
    ending = {"volumes": ".nii.gz", "pictures": ".png"}[federation.kind]
    written = autofed.predict(federation.run, federation.test / "imagesTs", tmp_path / "out")
    assert [p.name for p in written] == ["test_000.json", "test_001.json"]
    for case in ("test_000", "test_001"):
        image = next((federation.test / "imagesTs").glob(f"{case}_0000*"))
        shape = images.read(image).array.shape[1:]
        labels, geometry = images.read_labels(tmp_path / "out" / f"{case}{ending}")
        assert (
            labels.shape == shape
            and geometry == images.read_labels(federation.test / "labelsTs" / f"{case}{ending}")[1]
        )
        assert set(np.unique(labels)) <= set(federation.plan.agreement.labels.values())
        for what in ("entropy", "mutual_information"):
            found = images.read(tmp_path / "out" / f"{case}_{what}{ending}")
            assert found.array.shape[1:] == shape and found.geometry == geometry
            top = 1 if federation.kind == "volumes" else 255
            assert found.array.min() >= 0 and found.array.max() <= top
        about = json.loads((tmp_path / "out" / f"{case}.json").read_text())
        for name, value in federation.plan.agreement.labels.items():
            if value:
                structure = about["structures"][name]
                assert structure["voxels"] == int((labels == value).sum())
                if federation.kind == "volumes":
                    assert structure["volume_ml"] == pytest.approx(structure["voxels"] / 1000)  # voxels of 1 mm^3
                else:
                    assert structure["area_pixels"] == structure["voxels"]
        assert about["members"] == 3 * 2 ** len(federation.plan.inference.mirror_axes)
    report = autofed.evaluate(tmp_path / "out", federation.test / "labelsTs", tmp_path / "report.json")
    value = json.loads((tmp_path / "report.json").read_text())
    assert {"mean", "classes", "cases"} <= set(value) and len(value["cases"]) == 2
    assert set(value["mean"]) == {"dice", "jaccard", "hd95_mm"}
    assert 0 <= report.mean.dice <= 1


@pytest.mark.parametrize(
    ("options", "axes"), [({"configuration": "2d"}, 2), ({"preset": "resenc-m"}, 3), ({"preset": "dcfed"}, 3)]
)
def test_other_configurations_go_the_whole_way(volumes, tmp_path, options, axes):
    made = autofed.plan(volumes.sites, hours=0.01, device="cpu", **options)
    stages = len(made.local.network.features)
    made = autofed.plan(volumes.sites, tmp_path / "plan.json", hours=0.01, device="cpu", **options,
                        settings={**SMALL, "network.features": [8] * stages})  # fmt: skip
    assert made.local.axes == len(made.local.training.patch_size) == axes
    autofed.preprocess(made, volumes.sites, tmp_path / "work")
    run = autofed.train(tmp_path / "plan.json", tmp_path / "work", tmp_path / "run", device="cpu", rounds=1)
    autofed.predict(run.folder, volumes.test / "imagesTs", tmp_path / "out", mirroring=False)
    found = images.read_labels(tmp_path / "out" / "test_000.nii.gz")[0]
    assert found.shape == images.read_labels(volumes.test / "labelsTs" / "test_000.nii.gz")[0].shape


def test_predicting_again_leaves_finished_cases_alone(volumes, tmp_path):
    out = tmp_path / "out"
    autofed.predict(volumes.run, volumes.test / "imagesTs", out)
    before = {p: p.stat().st_mtime_ns for p in out.glob("test_*")}
    (out / "test_001.json").unlink()  # as if the run had been cut off before this case was whole
    autofed.predict(volumes.run, volumes.test / "imagesTs", out)
    changed = {p.name for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert changed and all(name.startswith("test_001") for name in changed)
    autofed.predict(volumes.run, volumes.test / "imagesTs", out, save_probabilities=True)
    with np.load(out / "test_000_probabilities.npz") as found:
        assert np.allclose(found["probabilities"].astype(float).sum(0), 1, atol=0.01)


def test_an_array_gives_what_its_file_gives(volumes, tmp_path):
    autofed.predict(volumes.run, volumes.test / "imagesTs", tmp_path, mirroring=False)
    files = sorted((volumes.test / "imagesTs").glob("test_000_*"))
    parts = [images.read(f) for f in files]
    found = autofed.predict(
        volumes.run, np.concatenate([p.array for p in parts]), spacing_mm=parts[0].geometry.spacing_mm, mirroring=False
    )
    assert np.array_equal(found.labels, images.read_labels(tmp_path / "test_000.nii.gz")[0])
    assert np.allclose(found.entropy, images.read(tmp_path / "test_000_entropy.nii.gz").array[0], atol=1e-6)


def test_an_image_of_nibabel_gives_what_its_file_gives(tmp_path):
    site = make_site(tmp_path / "alpha", cases=2)
    stages = len(autofed.plan([site], hours=0.01, device="cpu").local.network.features)
    settings = {**SMALL, "training.rounds": 1, "network.features": [4] * stages}
    made = autofed.plan([site], hours=0.01, device="cpu", settings=settings)
    autofed.preprocess(made, [site], tmp_path / "work")
    run = autofed.train(made, tmp_path / "work", tmp_path / "run", device="cpu").folder
    path = site / "imagesTr" / "alpha_000_0000.nii.gz"
    scan = nibabel.load(path)
    turned = nibabel.Nifti1Image(scan.get_fdata(), scan.affine @ np.diag([1, 2, 3, 1]))  # voxels of three edges
    nibabel.save(turned, tmp_path / "scan_0000.nii.gz")
    autofed.predict(run, tmp_path / "scan_0000.nii.gz", tmp_path / "out", mirroring=False)
    there = autofed.predict(run, turned, mirroring=False)
    assert np.array_equal(there.labels, images.read_labels(tmp_path / "out" / "scan.nii.gz")[0])
    assert np.allclose(there.entropy, images.read(tmp_path / "out" / "scan_entropy.nii.gz").array[0], atol=1e-6)
    with pytest.raises(ValidationErrors, match="a spacing of its own; leave out spacing_mm"):
        autofed.predict(run, turned, spacing_mm=(1, 1, 1))
    with pytest.raises(ValidationErrors, match="found a builtins.list; expected an array of numpy"):
        autofed.predict(run, [1, 2])
    with pytest.raises(ValidationErrors, match="need an output folder; name one, or pass an array"):
        autofed.predict(run, path)
    assert len(repr(there)) < 120 and "x" in repr(there) and "tumour" in repr(there)


@pytest.mark.parametrize(
    ("shape", "spacing", "says"),
    [
        ((3, 8, 8, 8), (1, 1, 1), "expected .2, Z, Y, X."),
        ((2, 8, 8, 8), None, "spacing_mm"),
        ((2, 8, 8, 8), (1, 0, 1), "above 0"),
        ((2, 8, 8, 8), (1, 1, float("nan")), "above 0"),
    ],
)
def test_arrays_of_another_kind_are_refused(volumes, shape, spacing, says):
    with pytest.raises(ValidationErrors, match=says):
        autofed.predict(volumes.run, np.zeros(shape), spacing_mm=spacing)


def test_several_runs_vote_together(volumes, tmp_path):
    autofed.train(
        volumes.root / "plan.json", volumes.root / "work", tmp_path / "local", algorithm="local", device="cpu"
    )
    assert Run(tmp_path / "local").models() == ["alpha", "bravo"]
    image = np.random.default_rng(0).normal(size=(2, 12, 12, 12))
    one = autofed.predict(volumes.run, image, spacing_mm=(1, 1, 1), mirroring=False)
    two = autofed.predict([volumes.run, volumes.run], image, spacing_mm=(1, 1, 1), mirroring=False)
    assert one.members == 3 and two.members == 6
    assert np.allclose(one.entropy, two.entropy, atol=1e-6)
    own = autofed.predict(tmp_path / "local", image, spacing_mm=(1, 1, 1), model="bravo")
    assert own.members == 3 and not np.array_equal(own.entropy, one.entropy)
    with pytest.raises(ValidationErrors, match="no model 'global'; choose --model from: alpha, bravo"):
        autofed.predict(tmp_path / "local", image, spacing_mm=(1, 1, 1))


def test_a_fingerprint_stands_for_its_site(volumes, tmp_path):
    autofed.fingerprint(volumes.sites[0], tmp_path / "alpha.json")
    mixed = autofed.plan([tmp_path / "alpha.json", volumes.sites[1]], hours=0.01, device="cpu")
    whole = autofed.plan(volumes.sites, hours=0.01, device="cpu")
    assert mixed.local.geometry == whole.local.geometry and mixed.local.intensity == whole.local.intensity
    assert mixed.agreement.patients == whole.agreement.patients


def test_resume_gives_the_weights_of_an_unbroken_run(volumes, tmp_path):
    class Enough(KeyboardInterrupt):
        pass

    def stop_in_round_two(stage, done, total):
        if stage == "training" and done == total // 2:
            raise Enough

    arguments = (volumes.root / "plan.json", volumes.root / "work", tmp_path / "run")
    with pytest.raises(Enough):
        autofed.train(*arguments, device="cpu", progress=stop_in_round_two)
    assert saved_rounds(tmp_path / "run" / "fold_all") == [1]
    with pytest.raises(ValidationErrors, match="add --resume"):
        autofed.train(*arguments, device="cpu")
    autofed.train(*arguments, device="cpu", resume=True)
    ends = [checkpoints.load(run / "fold_all", 3).shared["weights"] for run in (volumes.run, tmp_path / "run")]
    assert all(np.array_equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_a_run_that_was_cut_off_in_its_first_round_still_starts_from_the_weights_given(volumes, tmp_path):
    def stop_at_once(stage, done, total):
        if stage == "training" and done == 1:
            raise KeyboardInterrupt

    frozen = plans.load(volumes.root / "plan.json").change({"learning_rate": 1e-12, "training.rounds": 1})
    arguments = (frozen, volumes.root / "work", tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        autofed.train(*arguments, init=volumes.run, device="cpu", progress=stop_at_once)
    with pytest.raises(ValidationErrors, match="--init comes too late"):
        autofed.train(*arguments, init=volumes.run, device="cpu", resume=True)
    assert Run(tmp_path / "run").models() == []  # the state before any training is no model
    run = autofed.train(*arguments, device="cpu", resume=True)
    given = checkpoints.load(volumes.run / "fold_all", 3).shared["weights"]
    found = checkpoints.load(run.fold_folder(), 1).shared["weights"]
    assert all(np.allclose(given[n], found[n], atol=1e-6) for n in given)


def test_choices_that_change_nothing_do_not_stand_in_the_way_of_resuming(volumes):
    run = autofed.train(
        volumes.run / "plan.json",
        volumes.root / "work",
        volumes.run,
        rounds=3,
        algorithm="fedavg",
        resume=True,
        device="cpu",
    )
    assert run.models() == ["global"]
    with pytest.raises(ValidationErrors, match="2 rounds were asked for, 3 are planned; expected more"):
        autofed.train(volumes.run / "plan.json", volumes.root / "work", volumes.run, rounds=2, resume=True)
    other = volumes.plan.change({"learning_rate": 0.5})
    for rounds in (None, 4):
        with pytest.raises(ValidationErrors, match="another plan"):
            autofed.train(other, volumes.root / "work", volumes.run, rounds=rounds, resume=True)


def test_a_start_that_fails_leaves_no_run(volumes, tmp_path):
    plan = plans.load(volumes.root / "plan.json").change({"privacy.mechanism": "magic"})
    with pytest.raises(ValidationErrors, match="no mechanism 'magic'"):
        autofed.train(plan, volumes.root / "work", tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_plan_cannot_make_a_site_run_code(volumes, tmp_path):
    plan = plans.load(volumes.root / "plan.json").change({"algorithm.name": "os:system"})
    with pytest.raises(ValidationErrors, match="this site did not allow"):
        autofed.train(plan, volumes.root / "work", tmp_path / "run", device="cpu")


def test_pooling_is_written_into_every_sites_ledger(volumes, tmp_path):
    def lines(site):
        return len((volumes.root / "work" / site / "ledger.jsonl").read_text().splitlines())

    before = {site: lines(site) for site in ("alpha", "bravo")}
    autofed.train(
        volumes.root / "plan.json", volumes.root / "work", tmp_path / "run", algorithm="pooled", rounds=1, device="cpu"
    )
    assert {site: lines(site) - n for site, n in before.items()} == {"alpha": 1, "bravo": 1}


def test_training_starts_from_given_weights(volumes, tmp_path):
    frozen = plans.load(volumes.root / "plan.json").change({"learning_rate": 1e-12, "weight_decay": 0})
    run = autofed.train(frozen, volumes.root / "work", tmp_path / "run", init=volumes.run, rounds=1, device="cpu")
    given = checkpoints.load(volumes.run / "fold_all", 3).shared["weights"]
    found = checkpoints.load(run.fold_folder(), 1).shared["weights"]
    assert all(np.allclose(given[n], found[n], atol=1e-6) for n in given)


# --- bad input: a clear error, and nothing left behind


def test_a_run_whose_weights_do_not_fit_its_plan(volumes, tmp_path):
    import shutil

    broken = tmp_path / "run"
    shutil.copytree(volumes.run, broken)
    path = broken / "fold_all" / "round_00003" / "shared.safetensors"
    weights = load_groups(path)[0]["weights"]
    name = next(iter(weights))
    save_groups(path, {"weights": {**weights, name: weights[name][..., :1]}})
    with pytest.raises(ValidationErrors, match=f"{name} has the shape"):
        autofed.predict(broken, volumes.test / "imagesTs", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValidationErrors, match="not whole"):
        autofed.predict(broken, volumes.test / "imagesTs", tmp_path / "out")


def test_a_folder_that_is_no_run(tmp_path, volumes):
    with pytest.raises(ValidationErrors, match="not a run"):
        autofed.predict(tmp_path, volumes.test / "imagesTs", tmp_path / "out")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValidationErrors, match="holds no run"):
        autofed.train(volumes.root / "plan.json", volumes.root / "work", tmp_path, device="cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_images_that_do_not_fit_the_plan(volumes, tmp_path):
    single = make_site(tmp_path / "single", cases=1, part="Ts")
    with pytest.raises(ValidationErrors, match="found 1 channels, but the plan has 2"):
        autofed.predict(volumes.run, single / "imagesTs", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValidationErrors, match="no images"):
        autofed.predict(volumes.run, tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_predicting_into_the_folder_of_the_images_leaves_the_scans_as_they_are(volumes, tmp_path):
    scans = make_site(tmp_path / "scans", cases=1, part="Ts", **KINDS["volumes"]) / "imagesTs"
    before = {p.name: p.read_bytes() for p in scans.iterdir()}
    with pytest.raises(ValidationErrors, match="folder of the images"):
        autofed.predict(volumes.run, scans, scans)
    with pytest.raises(ValidationErrors, match="predict did not write it"):
        autofed.predict(volumes.run, scans, scans.parent / "labelsTs")
    assert {p.name: p.read_bytes() for p in scans.iterdir()} == before


def test_predicting_with_no_run(volumes):
    with pytest.raises(ValidationErrors, match="no run was given"):
        autofed.predict([], np.zeros((2, 8, 8, 8)), spacing_mm=(1, 1, 1))


@pytest.mark.parametrize("name", ["prediction.json", "dataset.json"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "`labels` must map names to values"),
        ("[1, 2]", "expected an object with `labels`"),
        ('{"labels": {"background": 0, "whole": [1, 2]}}', "regions"),
        ('{"labels": ["background", "organ"]}', "`labels` must map names to values"),
        ("{", "not JSON"),
    ],
)
def test_labels_that_nobody_can_make_sense_of(tmp_path, name, content, says):
    for folder in ("out", "labels"):
        (tmp_path / folder).mkdir()
    (tmp_path / ("out" if name == "prediction.json" else "labels") / name).write_text(content)
    with pytest.raises(ValidationErrors, match=says):
        autofed.evaluate(tmp_path / "out", tmp_path / "labels")


def test_predictions_that_were_cut_off_are_not_scored(volumes, tmp_path):
    autofed.predict(volumes.run, volumes.test / "imagesTs", tmp_path / "out", mirroring=False)
    (tmp_path / "out" / "test_001.json").unlink()
    with pytest.raises(ValidationErrors, match="test_001: its prediction is not finished"):
        autofed.evaluate(tmp_path / "out", volumes.test / "labelsTs", tmp_path / "report.json")
    assert not (tmp_path / "report.json").exists()


def test_one_broken_scan_is_named_and_the_others_are_predicted(volumes, tmp_path):
    scans = make_site(tmp_path / "scans", cases=2, part="Ts", **KINDS["volumes"])
    broken = scans / "imagesTs" / "scans_000_0001.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-3000])
    with pytest.raises(ValidationErrors, match="scans_000"):
        autofed.predict(volumes.run, scans / "imagesTs", tmp_path / "out")
    assert (tmp_path / "out" / "scans_001.json").exists()
    assert not list((tmp_path / "out").glob("scans_000*"))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"channels": ("T1",)}, ["channels", "alpha", "bravo", "T1, T2"]),
        ({"labels": {"background": 0, "lesion": 1}}, ["labels", "lesion=1", "organ=1"]),
        ({"dimension": 2, "channels": ("R", "G", "B")}, ["dimension", "2D", "3D"]),
    ],
)
def test_sites_that_disagree_are_named_with_what_they_say(tmp_path, other, says):
    first = make_site(tmp_path / "alpha", cases=2, **KINDS["volumes"])
    second = make_site(tmp_path / "bravo", cases=2, **{**KINDS["volumes"], **other})
    with pytest.raises(ValidationErrors) as error:
        autofed.plan([first, second], tmp_path / "plan.json", hours=0.01, device="cpu")
    assert all(word in str(error.value) for word in says)
    assert not (tmp_path / "plan.json").exists()


def test_problems_of_all_cases_of_all_sites_come_at_once(tmp_path):
    sites = [make_site(tmp_path / name, cases=3) for name in ("alpha", "bravo")]
    for site, value in ((sites[0], 7), (sites[1], 9)):
        path = min((site / "labelsTr").iterdir())
        label, geometry = images.read_labels(path)
        label[0, 0, 0] = value
        images.write(path, label.astype(np.uint8), geometry)
    broken = sites[1] / "imagesTr" / "bravo_002_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-1500])
    with pytest.raises(ValidationErrors) as error:
        autofed.plan(sites, tmp_path / "plan.json", hours=0.01, device="cpu")
    text = str(error.value)
    assert "[7]" in text and "[9]" in text and "bravo_002" in text
    assert len(error.value.problems) == 3 and not (tmp_path / "plan.json").exists()


def test_training_without_the_data_of_a_site(volumes, tmp_path):
    autofed.preprocess(volumes.root / "plan.json", volumes.sites[:1], tmp_path / "work")
    with pytest.raises(ValidationErrors, match="bravo.*found nothing"):
        autofed.train(volumes.root / "plan.json", tmp_path / "work", tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_preparing_a_site_that_is_not_in_the_plan(volumes, tmp_path):
    stranger = make_site(tmp_path / "stranger", cases=1, **KINDS["volumes"])
    with pytest.raises(ValidationErrors, match="stranger is not a site of the plan"):
        autofed.preprocess(volumes.root / "plan.json", [stranger], tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_site_whose_number_of_patients_changed(volumes, tmp_path):
    other = make_site(tmp_path / "alpha", cases=4, **KINDS["volumes"])
    autofed.preprocess(volumes.root / "plan.json", [other, volumes.sites[1]], tmp_path / "work")
    with pytest.raises(ValidationErrors, match="alpha has 4 patients with labels, the plan says 3"):
        autofed.train(volumes.root / "plan.json", tmp_path / "work", tmp_path / "run", device="cpu")


def test_a_plan_for_a_machine_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    site = make_site(tmp_path / "alpha", cases=2)
    made = autofed.plan([site], device="cuda", memory_gb=24)
    assert made.budget.device == "cuda" and made.budget.speed is None and made.budget.memory_gb == 24
    training = made.agreement.training.rounds * made.local.training.steps_per_round
    assert training > 240_000 and made.local.network.features[0] == 32
    with pytest.raises(
        ValidationErrors, match="cuda is not here.*cannot be divided into steps for alpha.*--speed speed.json"
    ):
        autofed.plan([site], device="cuda", hours=2)
    with pytest.raises(ValidationErrors, match="cuda is not here; this machine has"):
        autofed.fingerprint(site, speed=True, device="cuda")
    speed = json.loads(planning.SPEED_BY_HAND)
    (tmp_path / "speed.json").write_text(json.dumps(speed))
    timed = autofed.plan([site], device="cuda", hours=2, speed=tmp_path / "speed.json")
    assert timed.budget.speed.model_dump() == speed and timed.local.training.precision == speed["precision"]
    assert autofed.plan([site], hours=2, speed=timed.budget.speed) == timed
    slower = timed.budget.speed.model_copy(update={"seconds_per_step": 1.0})
    few = autofed.plan([site], hours=2, speed=slower)
    assert few.agreement.training.rounds * few.local.training.steps_per_round <= 2 * 3600
    with pytest.raises(ValidationErrors, match="--speed: it is that of cuda, but --device is cpu; leave one out"):
        autofed.plan([site], hours=2, speed=slower, device="cpu")


def test_a_private_plan_for_a_machine_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    site = make_site(tmp_path / "alpha", cases=8)
    made = autofed.plan([site], device="cuda", epsilon=8, even_if_hopeless=True)
    assert made.agreement.privacy.is_private and made.budget.hours is None and made.budget.speed is None


def test_nothing_to_plan():
    with pytest.raises(ValidationErrors, match="no site was given"):
        autofed.plan([])
    with pytest.raises(ValidationErrors, match="'fedagv' does not exist"):
        autofed.plan(["."], algorithm="fedagv")
