"""What every test may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
import synthetic


@pytest.fixture
def make_site(tmp_path):
    """`synthetic.make_site` by the name of the site: make_site("alpha", cases=3) writes it and returns its folder."""

    def make(name: str = "alpha", **wanted) -> Path:
        return synthetic.make_site(tmp_path / name, **wanted)

    return make
