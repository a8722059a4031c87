"""What every test may ask for. Nothing here reads torch before a test asks for something that trains."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from autofed.training import speed
from tests import plans_made, synthetic


@pytest.fixture
def make_site(tmp_path):
    """`synthetic.make_site` by the name of the site: make_site("alpha", cases=3) writes it and returns its folder."""

    def make(name: str = "alpha", **options) -> Path:
        return synthetic.make_site(tmp_path / name, **options)

    return make


@pytest.fixture(scope="session")
def ground(tmp_path_factory):
    """`small_federation.make`: a plan and the prepared data of its two sites, which no test may change."""
    from tests import small_federation

    return small_federation.make(tmp_path_factory.mktemp("federation"))


@pytest.fixture(scope="session")
def lone_site(tmp_path_factory):
    """A plan and the prepared data of one site of three cases, which no test may change."""
    from autofed.data import open_dataset
    from autofed.preprocessing import open_store, preprocess

    root, plan = tmp_path_factory.mktemp("lone_site"), plans_made.small_plan(labels=1)
    preprocess(open_dataset(synthetic.make_site(root / "alpha", cases=3)), plan.local, root / "work")
    return plan, open_store(root / "work", "alpha", plan.local)


@pytest.fixture
def one_processor(monkeypatch):
    """Commands start no processes, where they would start one for each processor; those are slow to start."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def pytest_addoption(parser):
    parser.addoption("--data", type=Path, help="the folder of federations that the slow tests walk through")


@pytest.fixture
def data(request) -> Path:
    """The folder of federations given by --data; without it the test is skipped."""
    folder = request.config.getoption("--data")
    if folder is None:
        pytest.skip("needs --data FOLDER, with <federation>/sites/<site>/ in raw layout")
    return folder


@pytest.fixture(autouse=True, scope="session")
def measured():
    """Plans made in tests find the speed of one and the same machine, and no test waits for it to be measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "measure_speed", lambda device, dimension, channels: plans_made.SPEED)
        yield


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_the_disk():
    """Files are handed to the system, and no test waits until they are on the disk; a small training waits 40 times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield
