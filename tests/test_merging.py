"""The plan of merged fingerprints against numbers taken from all cases in one list, as nnU-Net would have them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofed.data import Case, Declaration
from autofed.data.images import Geometry
from autofed.fingerprints import SiteCounts, measure_case
from autofed.fingerprints.exact import _add
from autofed.planner import make

LABELS = {"background": 0, "a": 1, "b": 2}


@dataclass(frozen=True)
class Pool:
    """Cases with the site of each."""

    channel: str
    cases: tuple[Case, ...]
    sites: tuple[str, ...]

    def merged(self):
        """Each site's fingerprint from its own cases, then all sites together."""
        return self._fingerprint(self.sites)

    def pooled(self):
        """The same cases at one site."""
        return self._fingerprint(("all",) * len(self.cases))

    def _fingerprint(self, sites):
        declaration = Declaration(channels=(self.channel,), labels=LABELS, dimension=3)
        whole = None
        for site in sorted(set(sites)):
            own = [measure_case(c, declaration) for c, s in zip(self.cases, sites, strict=True) if s == site]
            part = own[0]
            for other in own[1:]:
                part = _add(part, other)
            part = part.model_copy(
                update={"sites": {site: SiteCounts(patients=len(own), cases=len(own), labelled=len(own))}}
            )
            whole = part if whole is None else _add(whole, part)
        return whole


@st.composite
def pools(draw):
    channel = draw(st.sampled_from(["CT", "MRI", "rgb_to_0_1"]))
    count = draw(st.integers(2, 7))
    cases = []
    for number in range(count):
        shape = draw(st.tuples(st.integers(6, 40), st.integers(24, 40), st.integers(24, 40)))
        spacing = draw(st.tuples(st.sampled_from([0.9, 1.0, 2.5, 5.0]), *[st.floats(0.5, 1.5)] * 2))
        generator = np.random.default_rng(draw(st.integers(0, 2**20)))
        image = generator.normal(draw(st.floats(-300, 900)), draw(st.floats(1, 200)), (1, *shape)).astype(np.float32)
        label = generator.integers(0, 3, shape).astype(np.int32)
        cases.append(Case(f"c{number}", f"p{number}", image, label, spacing, Geometry(3, spacing, (0.0,) * 3)))
    sites = draw(st.lists(st.sampled_from(["alpha", "bravo", "charlie"]), min_size=count, max_size=count))
    return Pool(channel, tuple(cases), tuple(sites))


@settings(max_examples=40, deadline=None)
@given(pools())
def test_the_plan_of_merged_fingerprints_is_that_of_the_pooled_data(pool):
    merged, pooled = make(pool.merged()), make(pool.pooled())
    assert merged.local.geometry == pooled.local.geometry
    assert merged.local.intensity == pooled.local.intensity
    assert merged.local.network == pooled.local.network
    assert (merged.local.training.patch_size, merged.local.training.batch_size) == (
        pooled.local.training.patch_size, pooled.local.training.batch_size)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(pools())
def test_grid_and_sizes_are_those_of_a_list_of_all_cases(pool):
    geometry = make(pool.merged()).local.geometry
    spacings = np.array([c.spacing_mm for c in pool.cases])
    shapes = np.array([c.image.shape[1:] for c in pool.cases])
    target = _target(spacings, shapes)
    assert sorted(geometry.spacing_mm) == pytest.approx(sorted(target))
    ordered = target[list(geometry.transpose)]
    assert geometry.spacing_mm == pytest.approx(tuple(ordered)) and ordered[0] == ordered.max()
    sizes = np.median(np.round(spacings / target * shapes), axis=0)
    assert geometry.median_shape == tuple(round(n) for n in sizes[list(geometry.transpose)])


def _target(spacings: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """nnU-Net's target spacing, from lists."""
    target, sizes = np.median(spacings, axis=0), np.median(shapes, axis=0)
    worst = int(np.argmax(target))
    others = [a for a in range(3) if a != worst]
    if target[worst] > 3 * target[others].max() and sizes[worst] * 3 < sizes[others].min():
        target[worst] = np.percentile(spacings[:, worst], 10)
        if target[worst] < target[others].max():
            target[worst] = target[others].max() + 1e-5
    return target


@settings(max_examples=40, deadline=None)
@given(pools())
def test_intensities_are_those_of_all_cases_alike_to_one_bin(pool):
    """The mixture that nnU-Net samples from: equally many voxels of each case's foreground, however large it is."""
    channel = make(pool.merged()).local.intensity.channels[0]
    voxels = [np.sort(c.image[0][c.label > 0].astype(np.float64)) for c in pool.cases]
    mean = np.mean([v.mean() for v in voxels])
    std = np.sqrt(np.mean([np.square(v).mean() for v in voxels]) - mean**2)
    assert channel.mean == pytest.approx(mean, abs=1e-3)
    assert channel.std == pytest.approx(std, rel=1e-3)
    for share, found in ((0.005, channel.percentile_00_5), (0.995, channel.percentile_99_5)):
        bin_ = 1.0 if pool.channel == "CT" else max(abs(found) * 2**-7, 1e-6)
        below = np.mean([np.mean(v <= found + bin_) for v in voxels])
        above = np.mean([np.mean(v < found - bin_) for v in voxels])
        assert above <= share + 1e-4 and below >= share - 1e-4
