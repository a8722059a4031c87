"""A run that is killed at any moment goes on, and its weights in the end are those of an unbroken run, to the bit."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import autofed
from autofed.federation import metrics
from autofed.federation.run_folder import Run
from autofed.messages import load_groups
from tests.synthetic import make_site

ROUNDS = 6
KILLS = 12
PROGRAM = """
import sys, autofed
from pathlib import Path
plan, work, run = sys.argv[1:]
print("ready", flush=True)
autofed.train(plan, work, run, device="cpu", folds=["all", "2"], resume=(Path(run) / "run.json").is_file())
"""


@pytest.fixture
def ground(tmp_path):
    sites = [make_site(tmp_path / name, cases=cases) for name, cases in (("alpha", 5), ("bravo", 2))]
    first = autofed.plan(sites, hours=0.01, device="cpu")
    settings = {
        "training.rounds": ROUNDS, "training.steps_per_round": 4, "batch_size": 2, "training.ema": 0.5,
        "agreement.wire": "int8", "network.features": [4] * len(first.local.network.features),
    }  # fmt: skip
    autofed.plan(sites, tmp_path / "plan.json", hours=0.01, device="cpu", settings=settings)
    autofed.preprocess(tmp_path / "plan.json", sites, tmp_path / "work")
    return tmp_path


def start(ground: Path, run: Path) -> subprocess.Popen:
    """A training in a process of its own, once it has read its libraries."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, ground / "plan.json", ground / "work", run],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == b"ready\n", process.stderr.read()
    return process


def finish(process: subprocess.Popen) -> None:
    """Let it come to its end, and say what it said if that was not a good one."""
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()


@pytest.mark.slow
def test_killed_at_random_moments_the_weights_are_those_of_an_unbroken_run(ground):
    begin = time.monotonic()
    finish(start(ground, ground / "whole"))
    length = time.monotonic() - begin
    generator, kills = np.random.default_rng(), 0
    for _ in range(KILLS):
        process = start(ground, ground / "broken")
        try:
            process.wait(timeout=generator.uniform(0, length))
            break  # it came to its end
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    finish(start(ground, ground / "broken"))
    assert kills > 0
    whole, broken = (Run(ground / name) for name in ("whole", "broken"))
    files = sorted(p.relative_to(whole.folder) for p in whole.folder.rglob("*.safetensors"))
    assert len(files) > 10 and all((broken.folder / path).is_file() for path in files)
    for path in files:
        (ours, said), (theirs, said_too) = (load_groups(run.folder / path) for run in (whole, broken))
        assert said == said_too and ours.keys() == theirs.keys(), path
        assert all(np.array_equal(a, theirs[group][name]) for group in ours for name, a in ours[group].items()), path
    for fold in ("all", "2"):
        assert metrics.scores(whole.fold_folder(fold)) == metrics.scores(broken.fold_folder(fold))
    assert whole.postprocessing() == broken.postprocessing()
