"""What every test may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from autofed.training import speed
from tests import plans_made, synthetic


@pytest.fixture
def make_site(tmp_path):
    """`synthetic.make_site` by the name of the site: make_site("alpha", cases=3) writes it and returns its folder."""

    def make(name: str = "alpha", **wanted) -> Path:
        return synthetic.make_site(tmp_path / name, **wanted)

    return make


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
