"""The rules against published plans, and what this project adds to them."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofed import planner
from autofed.plans import Budget
from autofed.problems import Problems
from tests.plans_made import fingerprint


def test_hippocampus_as_nnunet_plans_it():
    """nnU-Net issue 148: 1 mm, median 36 x 50 x 35, 260 cases, 3 labels with background."""
    made = planner.make(fingerprint((36, 50, 35), (1.0, 1.0, 1.0), 260, labels=2, sites=("all",)))
    assert made.local.training.patch_size == (40, 56, 40)
    assert made.local.training.batch_size == 9
    assert made.local.network.divisor == (8, 8, 8)
    assert made.local.network.features == (32, 64, 128, 256)


def test_ct_as_nnunet_plans_it():
    """nnU-Net issue 1838: 1.0 x 0.787 x 0.787 mm, 388 x 512 x 512."""
    made = planner.make(fingerprint((388, 512, 512), (1.0, 0.787, 0.787), 100, labels=1, sites=("all",)))
    assert made.local.training.patch_size == (112, 160, 128)
    assert made.local.training.batch_size == 2


def test_large_pictures_as_nnunet_plans_them():
    """nnU-Net issue 2251: RGB pictures of 2848 x 4288."""
    made = planner.make(fingerprint((1, 2848, 4288), (999.0, 1.0, 1.0), 100, ("R", "G", "B"), 1, sites=("all",)))
    assert made.local.training.patch_size == (1024, 1536)
    assert made.local.training.batch_size == 2


@pytest.mark.parametrize(
    ("spacing", "shape", "patch"),
    [
        ((2.357, 1.841, 1.841), (177, 217, 217), (128, 128, 128)),  # nnU-Net issue 2227
        ((1.545, 0.8067, 0.8067), (139, 497, 497), (56, 224, 192)),  # nnU-Net issue 1768
    ],
)
def test_low_resolution_grids_get_the_patches_that_nnunet_gives_them(spacing, shape, patch):
    found, batch = planner.patch_for_memory(fingerprint(shape, spacing, 100, labels=1), spacing, shape, 8)
    assert (found.patch, batch) == (patch, 2)


def test_small_pictures_fit_whole_as_in_nnunet():
    """nnU-Net issue 2983, a residual network: only what comes before the memory is counted is the same."""
    assert planner.topology((1.0, 1.0), planner.first_patch((1.0, 1.0), (167, 133))).patch == (192, 160)


def test_the_half_of_a_median_size_is_kept_until_the_patch_is_padded():
    """Between 40 and 41 voxels lies 40.5, which does not fit 40; nnU-Net pads it to 48."""
    data = fingerprint((40, 48, 48))
    thick = data.axes[0].model_copy(update={"extent_mm": {"40.0": 10, "41.0": 10}})
    made = planner.make(data.model_copy(update={"axes": (thick, *data.axes[1:])}))
    assert made.local.geometry.median_shape == (40, 48, 48)
    assert made.local.training.patch_size == (48, 48, 48)


@pytest.mark.parametrize("spacing", [(1.0, 2.0, 2.0), (1.0, 0.5, 4.0)])
def test_the_slice_of_a_flat_volume_comes_first_whatever_its_thickness(spacing):
    made = planner.make(fingerprint((1, 64, 96), spacing))
    assert made.local.geometry.transpose == (0, 1, 2)
    assert made.local.geometry.median_shape == (1, 64, 96)
    assert len(made.local.training.patch_size) == 2


@pytest.mark.parametrize(
    ("kept", "channel", "inside"), [("0.5000", "MRI", True), ("0.9000", "MRI", False), ("0.5000", "nonorm", False)]
)
def test_scores_are_taken_inside_the_mask_where_cropping_removes_much(kept, channel, inside):
    data = fingerprint(channels=(channel,)).model_copy(update={"crop_ratio": {kept: 20}})
    assert planner.make(data).local.intensity.inside_mask is inside


def test_coarse_thin_axis_takes_its_tenth_percentile():
    print_ = fingerprint((20, 256, 256), (5.0, 1.0, 1.0), 10)
    thick = print_.axes[0].model_copy(update={"spacing_mm": {"3.0": 2, "5.0": 8}})
    spacing = planner.target_spacing(print_.model_copy(update={"axes": (thick, *print_.axes[1:])}))
    assert spacing == pytest.approx((3.0, 1.0, 1.0))


def test_coarse_axis_of_a_long_scan_keeps_the_median():
    assert planner.target_spacing(fingerprint((200, 256, 256), (5.0, 1.0, 1.0)))[0] == 5.0


def test_coarsest_axis_comes_first():
    assert planner.transposition((1.0, 1.0, 3.0)) == (2, 0, 1)
    assert planner.make(fingerprint((64, 64, 20), (1.0, 1.0, 3.0))).local.geometry.spacing_mm == (3.0, 1.0, 1.0)


def test_kernel_stays_flat_while_slices_are_coarse():
    found = planner.topology((5.0, 1.0, 1.0), (16, 128, 128))
    assert found.kernels[0] == (1, 3, 3) and found.kernels[-1] == (3, 3, 3)
    assert found.strides[1] == (1, 2, 2)


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.floats(0.3, 6)] * 3), st.tuples(*[st.integers(16, 300)] * 3), st.sampled_from([2.0, 8.0, 24.0]))
def test_every_patch_fits_its_network_and_memory(spacing, shape, memory):
    data = fingerprint(shape, spacing)
    found, batch = planner.patch_for_memory(data, spacing, shape, memory)
    assert all(p % d == 0 and p // d >= planner.SMALLEST_EDGE for p, d in zip(found.patch, found.divisor, strict=True))
    assert batch >= 2
    proxy = planner.memory_proxy(planner._network(data, found), found.patch)
    assert proxy <= 560e6 * memory / 8 or math.prod(found.patch) <= 32**3


def test_images_too_small_for_any_network_are_refused():
    with pytest.raises(Problems, match="too small"):
        planner.make(fingerprint((8, 8, 8), (1.0, 2.0, 2.0)))


def test_fewer_hours_make_a_narrower_network_and_say_why():
    data = fingerprint((40, 56, 40), cases=100)
    widths = []
    for hours in (100, 1, 0.1):
        made = planner.make(data, Budget(hours=hours, gflops=100))
        widths.append(made.local.network.features[0])
        why = next(r.why for r in made.reasons if r.field == "local.network.features")
        assert f"{hours:g} h" in why and "cpu" in why
    assert widths[0] > widths[1] > widths[2]


def test_steps_fit_the_hours():
    budget = Budget(hours=0.5, gflops=100)
    made = planner.make(fingerprint((40, 56, 40), cases=100), budget)
    training = made.local.training
    steps = made.agreement.training.rounds * training.steps_per_round * 2
    gflops = 3 * made.local.network.forward_gflops(training.patch_size) * training.batch_size * steps
    assert gflops / budget.gflops <= 0.5 * 3600


def test_batch_cap_counts_all_sites():
    """5 % of one site's voxels would allow less than 5 % of the federation's."""
    few = planner.make(fingerprint((36, 50, 35), cases=60, sites=("a",))).local.training.batch_size
    many = planner.make(fingerprint((36, 50, 35), cases=240, sites=("a", "b", "c", "d"))).local.training.batch_size
    assert many > few


def test_ct_takes_its_numbers_from_the_federation():
    data = fingerprint(channels=("CT",), cases=2)
    unit = planner.FIXED_POINT
    # two cases of one value each: 0 HU and 100 HU; their mixture has mean 50 and standard deviation 50
    sums = data.channels[0].model_copy(
        update={"total": 100 * unit, "squares": 10_000 * unit, "histogram": {"0": unit, "100": unit}}
    )
    channel = planner.make(data.model_copy(update={"channels": (sums,)})).local.intensity.channels[0]
    assert (channel.mean, channel.std) == pytest.approx((50, 50))
    assert (channel.percentile_00_5, channel.percentile_99_5) == (0, 100)


def test_every_section_of_the_plan_has_a_reason():
    made = planner.make(fingerprint(), Budget(hours=1, gflops=100))
    fields = {r.field for r in made.reasons}
    for field in (
        "local.geometry.spacing_mm",
        "local.training.patch_size",
        "local.training.batch_size",
        "local.network.features",
        "agreement.training.rounds",
        "agreement.privacy.mechanism",
    ):
        assert field in fields  # fmt: skip


def test_what_cannot_be_planned_is_refused_all_at_once():
    data = fingerprint()
    empty = data.sites["alpha"].model_copy(update={"labelled": 0})
    absent = data.classes["structure_1"].model_copy(update={"cases": 0})
    data = data.model_copy(
        update={"sites": {**data.sites, "alpha": empty}, "classes": {**data.classes, "structure_1": absent}}
    )
    with pytest.raises(Problems) as error:
        planner.make(data, Budget(epsilon=8.0))
    with pytest.raises(Problems, match="names no site"):
        planner.make(data.model_copy(update={"sites": {}}))
    assert len(error.value.problems) == 3
    assert "alpha" in str(error.value) and "structure_1" in str(error.value) and "epsilon" in str(error.value)
