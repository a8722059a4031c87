"""Regions and partly annotated scans, from the raw files to the scores and the pictures."""

import json

import numpy as np
import pytest

import autofed
from autofed.data import images
from autofed.data.labels import Labels
from autofed.errors import ValidationErrors
from autofed.preprocessing import open_store
from autofed.report import draw_predictions, page
from tests.synthetic import REGIONS, make_site

SMALL = {"training.batch_size": 2, "training.steps_per_round": 2, "training.rounds": 2, "learning_rate": 0.05}
REGIONAL = {"labels": REGIONS, "order": (1, 2)}
KINDS = {
    "volumes": {"dimension": 3, **REGIONAL},
    "pictures": {"dimension": 2, "channels": ("R", "G", "B"), **REGIONAL},
    "classes": {"dimension": 2, "labels": {"background": 0, "organ": 1, "tumour": 2, "ignore": 3}},
}


@pytest.fixture(scope="module", params=list(KINDS))
def federation(request, tmp_path_factory):
    """One site annotated in part, one in full, who declare the same; and a run of both, predicted on a test set."""
    root, kind = tmp_path_factory.mktemp(request.param), KINDS[request.param]
    sites = [
        make_site(root / name, cases=2, annotated=share, **kind) for name, share in (("alpha", 0.6), ("bravo", 1.0))
    ]
    test = make_site(root / "test", cases=2, part="Ts", seed=9, annotated=0.7, **kind)
    stages = len(autofed.plan(sites, hours=0.01, device="cpu").local.network.features)
    settings = {**SMALL, "network.features": [8, 8, 16, 16, 16, 16][:stages]}
    autofed.plan(sites, root / "plan.json", hours=0.01, device="cpu", settings=settings)
    autofed.preprocess(root / "plan.json", sites, root / "work")
    run = autofed.train(root / "plan.json", root / "work", root / "run", device="cpu")
    autofed.predict(run.folder, test / "imagesTs", root / "out", save_probabilities=True)
    return root


def overlap(a, b):
    return round(2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b)), 6)


def test_a_federation_of_partly_and_fully_annotated_sites(federation):
    plan = autofed.plans.load(federation / "plan.json")
    labels = Labels.of(plan.agreement)
    found = {}
    for site in ("alpha", "bravo"):
        store = open_store(federation / "work", site, plan.local)
        found[site] = set(np.unique(np.concatenate([store.label(f"{site}_00{i}")[:].ravel() for i in range(2)])))
    assert found == {"alpha": {0, 1, 2, 3}, "bravo": {0, 1, 2}}
    assert plan.local.network.classes == labels.channels == (2 if labels.is_regions else 3)
    losses = [json.loads(line) for line in (federation / "run" / "fold_all" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and "NaN" not in json.dumps(losses)


def test_a_prediction_holds_what_regions_are_painted_with_and_nothing_else(federation):
    about = json.loads((federation / "out" / "prediction.json").read_text())
    labels = Labels.declared(about["labels"], about.get("regions_class_order", ()))
    assert labels == Labels.of(autofed.plans.load(federation / "plan.json").agreement)
    for case in ("test_000", "test_001"):
        value = json.loads((federation / "out" / f"{case}.json").read_text())
        label = images.read_labels(federation / "out" / value["files"]["labels"])[0]
        assert set(np.unique(label)) <= {0, 1, 2} == labels.values
        assert list(value["structures"]) == list(labels.names)
        for name, values in labels.structures:
            assert value["structures"][name]["voxels"] == np.isin(label, values).sum()
        with np.load(federation / "out" / value["files"]["probabilities"]) as stored:
            assert stored["probabilities"].shape == (labels.channels, *label.shape)


def test_regions_are_scored_whole_and_ignored_voxels_not_at_all(federation):
    """The network has learned next to nothing, so the predictions scored are made up; what predict wrote comes last."""
    truth = {path.name: images.read_labels(path) for path in (federation / "test" / "labelsTs").iterdir()}
    labels = Labels.of(autofed.plans.load(federation / "plan.json").agreement)
    made_up = {}
    for name, (reference, geometry) in truth.items():
        made_up[name] = np.roll(np.where(reference == 3, 2, reference), 2, axis=-1)  # something where nobody knows
        images.write(federation / "other" / name, made_up[name].astype(np.uint8), geometry)
    report = autofed.evaluate(federation / "other", federation / "test" / "labelsTs")
    for name, values in labels.structures:
        by_hand = [
            overlap(np.isin(made_up[n], values) & (r != 3), np.isin(r, values)) for n, (r, _) in sorted(truth.items())
        ]
        assert [case.classes[name].dice for case in report.cases] == pytest.approx(by_hand, abs=2e-6)
    assert set(report.classes) == set(labels.names)
    assert set(autofed.evaluate(federation / "out", federation / "test" / "labelsTs").classes) == set(labels.names)


def test_pictures_and_the_page_are_drawn(federation):
    assert len(draw_predictions(federation / "out")) == 2
    references = federation / "test" / "labelsTs"
    report = autofed.evaluate(federation / "out", references)
    page(report, federation / "out", references, [federation / "run"], federation / "out" / "report.html")
    text = (federation / "out" / "report.html").read_text()
    assert "No picture" not in text and text.count("<img") >= 2


def test_sites_that_paint_regions_otherwise_are_refused(tmp_path):
    one = make_site(tmp_path / "alpha", cases=1, **KINDS["volumes"])
    two = make_site(tmp_path / "bravo", cases=1, dimension=3, labels=REGIONS | {"whole": [1, 2, 3], "ignore": 4},
                    order=(3, 2))  # fmt: skip
    with pytest.raises(
        ValidationErrors, match=r"disagree on labels \(alpha: .*ignore=3, painted 1, 2; bravo: .*painted 3, 2"
    ):
        autofed.plan([one, two], hours=0.01, device="cpu")
    made = autofed.plan([one], hours=0.01, device="cpu")
    moved = make_site(tmp_path / "moved" / "alpha", cases=1, dimension=3, labels=REGIONS | {"whole": [1, 2, 3],
                      "ignore": 4}, order=(3, 2))  # fmt: skip
    with pytest.raises(
        ValidationErrors, match=r"declares labels .*painted 3, 2, the plan background=0, whole=\[1, 2\]"
    ):
        autofed.preprocess(made, [moved], tmp_path / "work")
