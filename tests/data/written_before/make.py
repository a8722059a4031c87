"""Write the example that tests/test_written_before.py reads: what autofed left on disk before it was laid out anew.

    OMP_NUM_THREADS=1 python tests/data/written_before/make.py /tmp/before/example

It is kept to show how the example came about, and runs with the autofed of the commit that README.md names; a later one
must read what lies here, not write it again. What a command leaves behind and nothing ever reads is removed.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

import autofed
from autofed import report, speed, verbs
from autofed.exchange import Failure, Message, Release, Request, from_bytes, to_bytes
from autofed.federation import states
from autofed.files import write_json
from autofed.plans import load
from autofed.privacy.ledger import PrivacyLedger
from tests import trained_weights
from tests.plans_made import SPEED
from tests.synthetic import ORGAN_AND_TUMOUR, make_site

MODIFIED = 1_700_000_000
"""When every raw file was written, in seconds: prepared data remember it, and git does not."""

CASES = {"alpha": 3, "bravo": 2}
VOLUMES = {"dimension": 3, "channels": ("T1",), "labels": ORGAN_AND_TUMOUR, "shape": (8, 10, 8)}
PICTURES = {"dimension": 2, "channels": ("grey",), "shape": (14, 12)}
TRAINING = {"training.batch_size": 2, "training.steps_per_round": 2, "training.rounds": 3, "learning_rate": 0.05}
HERE = {"device": "cpu", "workers": 0}


def main(root: Path) -> None:
    """Everything, each kind of training in a folder of its own."""
    speed.measure_speed = lambda device, dimension, channels: SPEED
    write_open(root / "open")
    write_private(root / "private")
    write_scaffold(root / "scaffold")
    write_dcfed(root / "dcfed")
    write_messages(root / "messages")
    plans = {path.parent.name: load(path) for path in sorted(root.glob("*/plan.json"))}
    write_json(root / "plans.json", {name: [plan.digest(), plan.agreement.digest()] for name, plan in plans.items()})
    for leftover in [*root.rglob("*.lock"), *root.rglob("lock"), *root.rglob("events.out.tfevents.*")]:
        leftover.unlink()
    shutil.make_archive(str(root), "xztar", root)
    write_json(root.with_name("weights.json"), trained_weights.measured(root.with_name("scratch")))


def write_raw(folder: Path, kind: dict) -> list[Path]:
    """Two sites, each of which says itself whom it holds out, and a test set."""
    sites = [make_site(folder / "sites" / name, cases=cases, **kind) for name, cases in CASES.items()]
    for site, cases in zip(sites, CASES.values(), strict=True):
        names = [f"{site.name}_{i:03d}" for i in range(cases)]
        write_json(site / "splits.json", [{"train": names[1:], "val": names[:1]}])
    make_site(folder / "test", cases=2, part="Ts", seed=9, **kind)
    for path in folder.rglob("*"):
        os.utime(path, (MODIFIED, MODIFIED))
    return sites


def make_plan(folder: Path, sites: list[Path], settings: dict, **options) -> Path:
    """plan.json, of a network with few features."""
    wanted = {"hours": 0.01, "device": "cpu", **options}
    stages = len(autofed.plan(sites, **wanted).local.network.features)
    features = {"network.features": [2, 4, 4, 4, 4, 4][:stages]}
    autofed.plan(sites, folder / "plan.json", settings={**TRAINING, **features, **settings}, **wanted)
    return folder / "plan.json"


def write_open(folder: Path) -> None:
    """FedAvg in volumes, on all patients and with a fold held out; fingerprints, predictions, scores and their page."""
    sites = write_raw(folder / "raw", VOLUMES)
    for site in sites:
        autofed.fingerprint(site, folder / f"{site.name}.json")
    plan = make_plan(folder, sites, {"snapshots": [2, 3]})
    autofed.preprocess(plan, sites, folder / "work")
    run = autofed.train(plan, folder / "work", folder / "run", folds=["all", "0"], **HERE).folder
    test = folder / "raw" / "test"
    autofed.predict(run, test / "imagesTs", folder / "predictions", device="cpu")
    scores = autofed.evaluate(folder / "predictions", test / "labelsTs", folder / "predictions" / "report.json")
    report.page(scores, folder / "predictions", test / "labelsTs", [run], folder / "scratch.html")
    (folder / "scratch.html").unlink()
    write_json(folder / "expected.json", {"dice": scores.mean.dice})


def write_private(folder: Path) -> None:
    """DP-SGD in pictures from a noised census, cut off after two of three rounds."""
    sites = write_raw(folder / "raw", PICTURES)
    work, promise = folder / "work", {"epsilon": 8.0}
    for site in sites:
        verbs.noised_fingerprint(site, folder / f"{site.name}.json", work=work, **promise)
    prior = make_plan(folder / "prior", sites, {})
    more = {"patches_per_patient": 1, "snapshots": [3]}
    plan = make_plan(folder, [folder / f"{site.name}.json" for site in sites], more, **promise,
                     even_if_hopeless=True, prior=prior)  # fmt: skip
    autofed.preprocess(plan, sites, work)
    train_and_stop(plan, work, folder / "run", rounds=2)
    ledgers = {site.name: PrivacyLedger.existing(work / site.name / "ledger.jsonl") for site in sites}
    write_json(folder / "expected.json", {
        name: {"epsilon": ledger.epsilon(), "counted": ledger.counted(), "charges": len(ledger.charges())}
        for name, ledger in ledgers.items()
    })  # fmt: skip


def write_scaffold(folder: Path) -> None:
    """SCAFFOLD with messages in 8 bits, cut off after two of three rounds, and the weights that it ends with."""
    sites = write_raw(folder / "raw", PICTURES)
    plan = make_plan(folder, sites, {"snapshots": [3], "wire": "int8", "training.ema": 0.5}, algorithm="scaffold")
    autofed.preprocess(plan, sites, folder / "work")
    train_and_stop(plan, folder / "work", folder / "run", rounds=2)
    shutil.copytree(folder / "run", folder / "scratch")
    run = autofed.train(plan, folder / "work", folder / "scratch", resume=True, **HERE)
    shutil.copytree(run.fold_folder("all") / "round_00003", folder / "end")
    shutil.rmtree(folder / "scratch")


def write_dcfed(folder: Path) -> None:
    """DCFed in pictures: a model of its own for each site, agreed labels, and a student."""
    sites = write_raw(folder / "raw", PICTURES)
    public = make_site(folder / "raw" / "public", cases=2, seed=5, **PICTURES) / "imagesTr"
    settings = {"exchanges": 2, "begin": 0.3, "confidence": 0.5, "doubt": 1.0, "share": 0.0, "settled": 0.0}
    chosen = {"snapshots": [3], "algorithm.settings": settings}
    plan = make_plan(folder, sites, chosen, algorithm="dcfed")
    autofed.preprocess(plan, sites, folder / "work")
    run = autofed.train(plan, folder / "work", folder / "run", public=public, **HERE)
    write_json(folder / "expected.json", {"models": run.models()})


def train_and_stop(plan: Path, work: Path, run: Path, rounds: int) -> None:
    """A training that is cut off in the round after these."""

    class Enough(KeyboardInterrupt):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "training" and run.is_dir() and states.saved_rounds(run / "fold_all")[-1:] == [rounds]:
            raise Enough

    with suppress(Enough):
        autofed.train(plan, work, run, progress=stop, **HERE)
    assert states.saved_rounds(run / "fold_all") == [rounds]


def write_messages(folder: Path) -> None:
    """The bytes of each kind of message, with arrays of every kind and in every precision, and what they hold."""
    rng = np.random.default_rng(0)
    floats = {"stem.weight": rng.normal(size=(3, 2, 5)), "stem.bias": rng.normal(size=300), "nothing": np.zeros((0, 4))}
    weights = {name: array.astype(np.float32) for name, array in floats.items()}
    maps = {"case_000": rng.integers(0, 3, (2, 6, 5), np.uint8), "case_001": np.full((1, 4, 4), 255, np.uint8)}
    kinds = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "bool")
    numbers = {kind: np.array([[0, 1, 1]]).astype(kind) for kind in kinds}
    messages: dict[str, Message] = {
        f"{wire}_{kind}": message
        for wire in ("float32", "bfloat16", "int8")
        for kind, message in (
            ("request", Request("0f" * 16, 3, "train", {"weights": weights}, 2, precision(wire, "weights"))),
            ("release", Release("0f" * 16, 3, "alpha", {"update": weights, "metrics": {"loss": np.float32([0.5])}}, {},
                                precision(wire, "update"))),
        )
    }  # fmt: skip
    messages |= {
        "maps_request": Request("0f" * 16 + "-fold-0", 1, "train", {"agreed": maps}),
        "maps_release": Release("0f" * 16 + "-fold-0", 1, "bravo", {"answers": maps, "numbers": numbers}),
        "validate": Request("0f" * 16, 3, "validate", {}, 3),
        "failure": Failure("0f" * 16, 2, "alpha", "out-of-memory"),
    }
    folder.mkdir(parents=True)
    for name, message in messages.items():
        (folder / f"{name}.bin").write_bytes(to_bytes(message))
    read = {name: from_bytes((folder / f"{name}.bin").read_bytes()) for name in messages}
    write_json(folder / "expected.json", {name: trained_weights.in_words(message) for name, message in read.items()})


def precision(wire: str, group: str) -> dict[str, str]:
    """How a group travels, as a message says it."""
    return {} if wire == "float32" else {group: wire}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
