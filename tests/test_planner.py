"""The rules against published plans, and what this project adds to them."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofed import planner
from autofed.algorithms.dcfed import DCFed
from autofed.errors import ValidationErrors
from autofed.planner import algorithm, grids, hours, topology
from autofed.planner.coarser_grids import grid_candidates
from autofed.planner.forecast import total_steps
from autofed.planner.grids import Grid
from autofed.planner.presets import PRESETS
from autofed.planner.private_search import candidate_configurations
from autofed.planner.topology import NetworkTask
from autofed.plans import AlgorithmSettings, Budget, Speed
from tests.plans_made import SPEED, fingerprint, reason, small_plan

PLAIN = NetworkTask(1, 2, PRESETS["plain"])


def make_plan(shape, spacing=(1.0, 1.0, 1.0), cases=20, channels=("MRI",), labels=2, sites=("all",), **budget):
    return planner.make(fingerprint(shape, spacing, cases, channels, labels, sites), Budget(**budget))


def grid(spacing, shape, configuration="3d_fullres"):
    return Grid(configuration, (0, 1, 2), spacing, shape)


# --- golden vectors: plans that nnU-Net's users published ----------


def test_hippocampus_as_nnunet_plans_it():
    """nnU-Net issue 148: 1 mm, median 36 x 50 x 35, 260 cases, 3 labels with background."""
    plan = make_plan((36, 50, 35), cases=260)
    assert plan.local.training.patch_size == (40, 56, 40)
    assert plan.local.training.batch_size == 9
    assert plan.local.network.divisor == (8, 8, 8)
    assert plan.local.network.features == (32, 64, 128, 256)


def test_ct_as_nnunet_plans_it():
    """nnU-Net issue 1838: 1.0 x 0.787 x 0.787 mm, 388 x 512 x 512."""
    plan = make_plan((388, 512, 512), (1.0, 0.787, 0.787), 100, labels=1)
    assert plan.local.training.patch_size == (112, 160, 128)
    assert plan.local.training.batch_size == 2


def test_large_pictures_as_nnunet_plans_them():
    """nnU-Net issue 2251: RGB pictures of 2848 x 4288."""
    plan = make_plan((1, 2848, 4288), (999.0, 1.0, 1.0), 100, ("R", "G", "B"), 1)
    assert plan.local.training.patch_size == (1024, 1536)
    assert plan.local.training.batch_size == 2


@pytest.mark.parametrize(
    ("spacing", "shape", "patch"),
    [
        ((2.357, 1.841, 1.841), (177, 217, 217), (128, 128, 128)),  # nnU-Net issue 2227
        ((1.545, 0.8067, 0.8067), (139, 497, 497), (56, 224, 192)),  # nnU-Net issue 1768, one step of its search
    ],
)
def test_low_resolution_grids_get_the_patches_that_nnunet_gives_them(spacing, shape, patch):
    at = grid(spacing, shape, "3d_lowres")
    network_topology = topology.patch_for_memory(at, PLAIN, 8)
    assert (network_topology.patch, topology.batch_for_memory(network_topology, at, 100, PLAIN, 8)) == (patch, 2)


def test_slices_of_volumes_as_nnunet_plans_them_with_residual_blocks():
    """nnU-Net issue 2983: ResEncUNetPlanner, 2d, 1 mm, median 138 x 167 x 133, 1000 cases; its lowres was dropped."""
    plan = make_plan((138, 167, 133), cases=1000, labels=1, configuration="2d", preset="resenc-m")
    assert plan.local.training.patch_size == (192, 160)
    assert plan.local.training.batch_size == 108
    assert plan.local.network.kind == "resenc" and plan.local.network.blocks[:5] == (1, 3, 4, 6, 6)
    assert plan.local.training.batch_dice
    with pytest.raises(ValidationErrors, match="3d_fullres"):
        make_plan((138, 167, 133), cases=1000, labels=1, configuration="3d_lowres", preset="resenc-m")


# --- grid ----------


def test_the_half_of_a_median_size_is_kept_until_the_patch_is_padded():
    """Between 40 and 41 voxels lies 40.5, which does not fit 40; nnU-Net pads it to 48."""
    data = fingerprint((40, 48, 48))
    thick = data.axes[0].model_copy(update={"extent_mm": {"40.0": 10, "41.0": 10}})
    plan = planner.make(data.model_copy(update={"axes": (thick, *data.axes[1:])}))
    assert plan.local.geometry.median_shape == (40, 48, 48)
    assert plan.local.training.patch_size == (48, 48, 48)


@pytest.mark.parametrize("spacing", [(1.0, 2.0, 2.0), (1.0, 0.5, 4.0)])
def test_the_slice_of_a_flat_volume_comes_first_whatever_its_thickness(spacing):
    plan = make_plan((1, 64, 96), spacing)
    assert plan.local.geometry.transpose == (0, 1, 2)
    assert plan.local.geometry.median_shape == (1, 64, 96)
    assert len(plan.local.training.patch_size) == 2


def test_coarse_thin_axis_takes_its_tenth_percentile():
    data = fingerprint((20, 256, 256), (5.0, 1.0, 1.0), 10)
    thick = data.axes[0].model_copy(update={"spacing_mm": {"3.0": 2, "5.0": 8}})
    spacing = grids.target_spacing(data.model_copy(update={"axes": (thick, *data.axes[1:])}))
    assert spacing == pytest.approx((3.0, 1.0, 1.0))


def test_coarse_axis_of_a_long_scan_keeps_the_median():
    assert grids.target_spacing(fingerprint((200, 256, 256), (5.0, 1.0, 1.0)))[0] == 5.0


def test_coarsest_axis_comes_first():
    assert grids.transposition((1.0, 1.0, 3.0)) == (2, 0, 1)
    assert make_plan((64, 64, 20), (1.0, 1.0, 3.0)).local.geometry.spacing_mm == (3.0, 1.0, 1.0)


# --- configuration ----------


@pytest.mark.parametrize(
    ("spacing", "shape", "configuration"),
    [
        ((1.0, 1.0, 1.0), (128, 128, 128), "3d_fullres"),
        ((5.0, 1.0, 1.0), (20, 256, 256), "3d_fullres"),
        ((5.0, 1.0, 1.0), (6, 256, 256), "2d"),
        ((10.0, 1.25, 1.25), (20, 256, 256), "2d"),
        ((2.0, 1.0, 1.0), (6, 64, 64), "3d_fullres"),
        ((1.0, 1.0, 10.0), (256, 256, 20), "2d"),
        ((1.0, 1.0, 2.0), (64, 96, 1), "2d"),
    ],
)
def test_thick_or_few_slices_are_learned_one_by_one(spacing, shape, configuration):
    plan = make_plan(shape, spacing)
    assert plan.local.geometry.configuration == configuration
    assert len(plan.local.training.patch_size) == plan.local.axes == (2 if configuration == "2d" else 3)


@pytest.mark.parametrize(
    ("spacing", "slices", "configuration"),
    [
        ((8.0, 1.0, 1.0), 20, "2d"),
        ((7.99, 1.0, 1.0), 20, "3d_fullres"),
        ((8.0, 1.25, 1.0), 20, "3d_fullres"),  # 6.4 times the larger edge of a pixel
        ((10.0, 1.25, 1.0), 20, "2d"),
        ((3.01, 1.0, 1.0), 7, "2d"),
        ((3.01, 1.0, 1.0), 8, "3d_fullres"),
        ((3.0, 1.0, 1.0), 7, "3d_fullres"),
        ((1.0, 1.0, 1.0), 2, "3d_fullres"),
        ((1.0, 1.0, 1.0), 1.5, "2d"),
    ],
)
def test_thresholds_of_thickness_and_number_hold_to_the_edge(spacing, slices, configuration):
    grid = grids.Grid("3d_fullres", (0, 1, 2), spacing, (slices, 256.0, 256.0))
    assert grids.preferred_configuration(grid)[0] == configuration


def test_a_configuration_asked_for_is_taken_and_the_own_choice_told():
    plan = make_plan((64, 64, 64), configuration="2d")
    assert plan.local.geometry.configuration == "2d" and plan.agreement.dimension == 3
    assert "by itself the plan takes 3d_fullres" in reason(plan, "local.geometry.configuration")


def test_slices_lie_along_the_coarsest_axis_also_in_2d():
    plan = make_plan((256, 200, 20), (1.0, 1.0, 10.0))
    assert plan.local.geometry.transpose == (2, 0, 1) and plan.local.geometry.median_shape == (20, 256, 200)
    assert plan.local.training.patch_size == (256, 224)


def test_pictures_have_no_other_configuration():
    with pytest.raises(ValidationErrors, match="pictures"):
        make_plan((1, 64, 64), (999.0, 1.0, 1.0), configuration="3d_fullres")


def test_a_patch_that_sees_little_brings_a_low_resolution():
    full = make_plan((388, 512, 512), (1.0, 0.787, 0.787), 100, labels=1)
    assert full.local.training.batch_dice
    assert "3d_lowres would be" in reason(full, "local.geometry.configuration")
    low = make_plan((388, 512, 512), (1.0, 0.787, 0.787), 100, labels=1, configuration="3d_lowres")
    geometry, training = low.local.geometry, low.local.training
    assert geometry.configuration == "3d_lowres" and not training.batch_dice
    assert all(a > b for a, b in zip(geometry.spacing_mm, (1.0, 0.787, 0.787), strict=True))
    assert math.prod(training.patch_size) / math.prod(geometry.median_shape) >= 0.25
    extent = [n * mm for n, mm in zip(geometry.median_shape, geometry.spacing_mm, strict=True)]
    assert extent == pytest.approx([388.0, 512 * 0.787, 512 * 0.787], rel=0.01)


def test_the_finest_axes_are_widened_alone_while_they_are_twice_as_fine():
    coarse = grids.low_resolution(grid((5.0, 1.0, 1.0), (100, 800, 800)), lambda _: (64, 256, 256))
    assert coarse.spacing_mm[0] == 5.0 and 1.9 < coarse.spacing_mm[1] < 2.1


def test_a_low_resolution_that_halves_nothing_is_dropped():
    assert grids.low_resolution(grid((1.0, 1.0, 1.0), (100, 100, 100)), lambda _: (60, 60, 60)) is None
    assert grids.low_resolution(grid((1.0, 1.0, 1.0), (105, 105, 105)), lambda _: (64, 64, 60)) is None


def test_a_patch_that_sees_enough_needs_no_low_resolution():
    plan = make_plan((36, 50, 35))
    assert not plan.local.training.batch_dice
    with pytest.raises(ValidationErrors, match="a quarter"):
        make_plan((36, 50, 35), configuration="3d_lowres")


# --- network ----------


def test_kernel_stays_flat_while_slices_are_coarse():
    network_topology = topology.topology_for_patch((5.0, 1.0, 1.0), (16, 128, 128))
    assert network_topology.kernels[0] == (1, 3, 3) and network_topology.kernels[-1] == (3, 3, 3)
    assert network_topology.strides[1] == (1, 2, 2)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.floats(0.3, 6)] * 3),
    st.tuples(*[st.integers(1, 300)] * 3),
    st.sampled_from([0.5, 2.0, 8.0, 24.0]),
    st.sampled_from(sorted(PRESETS)),
)
def test_every_patch_fits_its_network_and_memory(spacing, shape, memory, preset):
    task = NetworkTask(1, 3, PRESETS[preset])
    try:
        network_topology = topology.patch_for_memory(grid(spacing, shape), task, memory)
    except ValidationErrors as error:
        first = topology.topology_for_patch(spacing, topology.first_patch(spacing, shape))
        assert "too small for a network" in str(error) and len(first.strides) == 1
        return
    edges = zip(network_topology.patch, network_topology.divisor, strict=True)
    assert all(p % d == 0 and (p // d >= topology.SMALLEST_EDGE or d == 1) for p, d in edges)
    assert topology.memory_needed(task.network(network_topology), network_topology.patch, 2, task.preset) <= memory


@pytest.mark.parametrize(
    ("spacing", "shape", "memory"),
    [((2.0, 1.0, 1.0), (3, 512, 512), 1.0), ((2.5, 1.0, 1.0), (8, 512, 512), 0.8), ((1.0, 0.8, 0.5), (8, 512, 512), 1)],
)
def test_a_short_axis_does_not_keep_the_others_from_shrinking(spacing, shape, memory):
    network_topology = topology.patch_for_memory(grid(spacing, shape), PLAIN, memory)
    assert topology.memory_needed(PLAIN.network(network_topology), network_topology.patch, 2, PLAIN.preset) <= memory
    assert (
        make_plan(shape, spacing, memory_gb=memory, configuration="3d_fullres").local.training.patch_size
        == network_topology.patch
    )


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_more_memory_and_larger_presets_see_no_less(preset):
    task, at = NetworkTask(1, 3, PRESETS[preset]), grid((1.0, 1.0, 1.0), (300, 300, 300))
    patches = [math.prod(topology.patch_for_memory(at, task, gb).patch) for gb in (6, 12, 24, 48)]
    assert patches == sorted(patches) and patches[0] < patches[-1]


def test_images_too_small_for_any_network_are_refused():
    with pytest.raises(ValidationErrors, match="too small"):
        make_plan((8, 8, 8), (1.0, 2.0, 2.0))


def test_memory_too_small_for_any_patch_is_refused_with_what_would_do():
    with pytest.raises(ValidationErrors, match="GB are too little.*--memory"):
        make_plan((64, 64, 64), memory_gb=1e-4)


def test_batch_cap_counts_all_sites():
    """5 % of one site's voxels would allow less than 5 % of the federation's."""
    few = make_plan((36, 50, 35), cases=60).local.training.batch_size
    many = make_plan((36, 50, 35), cases=240, sites=("a", "b", "c", "d")).local.training.batch_size
    assert many > few


def test_cases_without_labels_do_not_count_for_the_batch():
    sites = ("a", "b")
    few = planner.make(fingerprint((36, 50, 35), cases=60, sites=sites))
    many = planner.make(fingerprint((36, 50, 35), cases=60, sites=sites, unlabelled=2000))
    assert few.local.training.batch_size == many.local.training.batch_size


def test_residual_presets_put_no_cap_of_five_percent():
    plain, residual = make_plan((36, 50, 35), cases=60), make_plan((36, 50, 35), cases=60, preset="resenc-m")
    assert residual.local.training.batch_size > plain.local.training.batch_size


def test_a_patch_a_third_too_large_does_not_pass():
    plan = make_plan((300, 300, 300), labels=1)
    larger = [max(plan.local.training.patch_size) + 32, *plan.local.training.patch_size[1:]]
    with pytest.raises(ValidationErrors, match="patch_size"):
        planner.check_memory(plan.change({"patch_size": larger}))


@pytest.mark.parametrize(
    ("change", "field"),
    [({"batch_size": 400}, "batch_size"), ({"features": [320, 320, 320, 320]}, "features")],
)
def test_what_a_hand_set_must_fit_the_memory(change, field):
    plan = make_plan((36, 50, 35), cases=260)
    planner.check_memory(plan)
    with pytest.raises(ValidationErrors, match=field):
        planner.check_memory(plan.change(change))


# --- hours ----------


def test_fewer_hours_make_a_narrower_network_and_say_why():
    widths = []
    for given_hours in (100, 0.4, 0.1):
        plan = make_plan((40, 56, 40), cases=100, sites=("a", "b"), hours=given_hours, speed=SPEED)
        widths.append(plan.local.network.features[0])
        why = reason(plan, "local.network.features")
        assert f"{given_hours:g} h" in why and "cpu" in why
    assert widths[0] > widths[1] > widths[2]


@pytest.mark.parametrize("sites", [("a",), ("a", "b", "c")])
@pytest.mark.parametrize("given_hours", [0.02, 0.5, 3.0])
def test_steps_fit_the_hours(sites, given_hours):
    budget = Budget(hours=given_hours, speed=SPEED)
    plan = planner.make(fingerprint((40, 56, 40), cases=102, sites=sites), budget)
    training = plan.local.training
    steps = plan.agreement.training.rounds * training.steps_per_round * len(sites)
    seconds = SPEED.seconds(plan.local.network, training.patch_size, training.batch_size) * steps
    assert 0.5 * hours.USEFUL_SHARE * given_hours * 3600 <= seconds <= given_hours * 3600


@pytest.mark.parametrize("sites", [("alpha", "bravo"), ("alpha", "bravo", "charlie", "delta")])
@pytest.mark.parametrize("here", [True, False])
def test_hours_count_what_is_learned_of_public_images_and_the_student(sites, here):
    speeds = {"speed": SPEED} if here else {"site_speeds": dict.fromkeys(sites, SPEED)}
    data, budget = fingerprint((40, 56, 40), cases=100, sites=sites), Budget(hours=0.02, **speeds)
    average, labels = (planner.make(data, budget, name) for name in ("fedavg", "dcfed"))
    assert labels.local.network == average.local.network
    at_once = 1 if here else len(sites)  # so many sites work at the same time, but only one student
    work = 2 - DCFed().begin + at_once / len(sites)
    assert total_steps(average) / total_steps(labels) == pytest.approx(work, rel=0.1)
    assert "student" in reason(labels, "agreement.algorithm.name")
    followed = [planner.follow(data, guide, "earlier.json", budget) for guide in (average, labels)]
    assert total_steps(followed[0]) / total_steps(followed[1]) == pytest.approx(work, rel=0.1)
    sooner = labels.change({"algorithm.settings": {"begin": 0.2}})
    followed[1] = planner.follow(data, sooner, "earlier.json", budget)
    assert total_steps(followed[0]) / total_steps(followed[1]) == pytest.approx(work + 0.4, rel=0.1)


@pytest.mark.parametrize("begin", ["soon", 5, -1])
def test_a_share_that_the_algorithm_will_refuse_does_not_spoil_the_hours(begin):
    default, wrong = (AlgorithmSettings(name="dcfed", settings=settings) for settings in ({}, {"begin": begin}))
    passes = [algorithm.passes_per_step(settings, ("a", "b"), Budget()) for settings in (default, wrong)]
    assert passes[0] == passes[1] == {"a": pytest.approx(1.9), "b": pytest.approx(1.9)}


def test_hours_of_a_private_training_count_the_model_that_each_site_keeps():
    data, budget = fingerprint((1, 256, 256), cases=2000), Budget(hours=0.5, speed=SPEED)
    average, labels = (planner.make(data, budget, name) for name in ("local", "dcfed"))
    (alone, *_), (taught, *_) = (
        list(candidate_configurations(plan, grid_candidates(plan))) for plan in (average, labels)
    )
    expected = 2 * (2 - DCFed().begin) + 1 / len(average.agreement.patients)
    assert taught.seconds / alone.seconds == pytest.approx(expected)


def test_the_batch_shrinks_before_the_network_narrows():
    data = fingerprint((40, 56, 40), cases=300)
    full = planner.make(data).local.training.batch_size
    plans = [planner.make(data, Budget(hours=h, speed=SPEED)) for h in (30, 6, 3, 0.7)]
    sizes = [(plan.local.network.features[0], plan.local.training.batch_size) for plan in plans]
    assert sizes[0] == (32, full)
    assert any(base == 32 and batch < full for base, batch in sizes)
    assert sizes[-1][0] < 32


def test_sites_on_machines_of_their_own_work_at_the_same_time_and_the_slowest_counts():
    data = fingerprint((40, 56, 40), cases=100, sites=("a", "b"))
    slow = SPEED.model_copy(update={"seconds_per_teraflop": 10 * SPEED.seconds_per_teraflop})
    here = Budget(hours=1, speed=SPEED)
    network = planner.make(data).local.network
    both = Budget(hours=1, site_speeds={"a": SPEED, "b": SPEED})
    uneven = Budget(hours=1, site_speeds={"a": SPEED, "b": slow})
    mixed = Budget(hours=1, site_speeds={"a": SPEED}, speed=slow)
    one_pass = SPEED.seconds(network, (40, 56, 40), 2)
    times = [
        b.seconds_per_step(network, (40, 56, 40), 2, {"a": 1, "b": 1}) / one_pass for b in (here, both, uneven, mixed)
    ]
    slowest = slow.seconds(network, (40, 56, 40), 2) / one_pass
    assert times == pytest.approx([2, 1, slowest, slowest])


def test_one_machine_without_the_precision_makes_all_do_without():
    half = SPEED.model_copy(update={"precision": "bfloat16"})
    data = fingerprint((40, 56, 40), cases=100, sites=("a", "b"))
    for speeds, precision in (({"a": half, "b": half}, "bfloat16"), ({"a": half, "b": SPEED}, "float32")):
        plan = planner.make(data, Budget(hours=1, site_speeds=speeds))
        assert plan.local.training.precision == precision


@pytest.mark.parametrize("sites", [("a", "b"), tuple(f"site_{n}" for n in range(30))])
def test_no_hours_mean_the_full_training_however_many_sites(sites):
    plan = make_plan((40, 56, 40), cases=300, sites=sites)
    training = plan.local.training
    assert (training.learning_rate, training.momentum, training.mirror_axes) == (0.01, 0.99, (0, 1, 2))
    assert "too few" not in reason(plan, "local.training.momentum") + reason(plan, "local.training.mirror_axes")


@pytest.mark.parametrize(
    ("shape", "spacing", "axes"),
    [((1, 64, 64), (999.0, 1.0, 1.0), (0, 1)), ((40, 56, 40), (1.0, 1.0, 1.0), ()), ((20, 64, 64), (10.0, 1, 1), ())],
)
def test_a_short_training_mirrors_pictures_but_not_volumes_nor_their_slices(shape, spacing, axes):
    plan = make_plan(shape, spacing, hours=0.01, speed=SPEED)
    assert plan.local.training.mirror_axes == axes and plan.local.training.momentum == 0.9
    assert ("pictures" in reason(plan, "local.training.mirror_axes")) == (axes == (0, 1))


def test_hours_too_few_for_a_single_step_say_so():
    plan = make_plan((40, 56, 40), cases=100, hours=1e-6, speed=SPEED)
    assert (plan.agreement.training.rounds, plan.local.training.steps_per_round) == (1, 1)
    assert "not even one step" in reason(plan, "local.network.features")


def test_hours_without_a_speed_are_refused():
    with pytest.raises(ValidationErrors, match="no speed"):
        make_plan((40, 56, 40), hours=1)


def test_a_speed_is_the_sum_of_its_costs():
    network = make_plan((40, 56, 40)).local.network
    elements, operations = network.work((40, 56, 40), 2)
    costs = {"step": 1, "gigaelement": 10, "teraflop": 100, "megavoxel": 1000}
    speed = Speed(**{f"seconds_per_{unit}": cost for unit, cost in costs.items()})
    expected = 1 + 10 * elements + 100 * operations + 1000 * 2 * 40 * 56 * 40 / 1e6
    assert speed.seconds(network, (40, 56, 40), 2) == pytest.approx(expected)


# --- intensities ----------


@pytest.mark.parametrize(
    ("crop_ratio", "channel", "inside"),
    [("0.5000", "MRI", True), ("0.9000", "MRI", False), ("0.5000", "nonorm", False)],
)
def test_scores_are_taken_inside_the_mask_where_cropping_removes_much(crop_ratio, channel, inside):
    data = fingerprint(channels=(channel,)).model_copy(update={"crop_ratio": {crop_ratio: 20}})
    assert planner.make(data).local.intensity.inside_mask is inside


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("CT", "ct"), ("ct", "ct"), ("MRI", "zscore"), ("anything", "zscore"), ("RGB_to_0_1", "rgb_to_0_1"),
     ("rescale_to_0_1", "rescale_to_0_1"), ("noNorm", "nonorm")],
)  # fmt: skip
def test_the_channels_name_says_how_it_is_normalised(name, scheme):
    assert planner.make(fingerprint(channels=(name,))).local.intensity.channels[0].scheme == scheme


def test_ct_takes_its_numbers_from_the_federation():
    data = fingerprint(channels=("CT",), cases=2)
    unit = 1 << 24
    # two cases of one value each: 0 HU and 100 HU; their mixture has mean 50 and standard deviation 50
    sums = data.channels[0].model_copy(
        update={"total": 100 * unit, "squares": 10_000 * unit, "histogram": {"0": unit, "100": unit}}
    )
    channel = planner.make(data.model_copy(update={"channels": (sums,)})).local.intensity.channels[0]
    assert (channel.mean, channel.std) == pytest.approx((50, 50))
    assert (channel.percentile_00_5, channel.percentile_99_5) == (0, 100)


# --- regions and ignore ----------


NESTED = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}


def test_a_region_is_an_output_each_and_ignore_is_none():
    regions = planner.make(fingerprint(labels={**NESTED, "ignore": 4}, order=(1, 2, 3)))
    assert regions.local.network.classes == 3
    assert regions.agreement.regions_class_order == (1, 2, 3) and regions.agreement.labels["core"] == (2, 3)
    assert "one for each region" in reason(regions, "local.network.classes")
    classes = planner.make(fingerprint(labels={"background": 0, "organ": 1, "ignore": 2}))
    assert classes.local.network.classes == 2 and "none for ignore" in reason(classes, "local.network.classes")
    single = planner.make(fingerprint(labels={"background": 0, "tumour": [1, 2]}, order=(1,)))
    assert single.local.network.classes == 1


def test_memory_is_counted_for_every_entry_of_labels_as_nnunet_does():
    shape = topology.topology_for_patch((1.0, 1.0, 1.0), (64, 64, 64))
    tasks = [
        NetworkTask(1, 4, PRESETS["plain"]),
        NetworkTask(1, 3, PRESETS["plain"], 1),
        NetworkTask(1, 3, PRESETS["plain"]),
    ]
    four, three_and_ignore, three = (task.memory_proxy(shape) for task in tasks)
    assert four == three_and_ignore == three + 64**3


def test_a_region_that_no_case_has_is_refused_and_an_ignore_that_nobody_used_is_not():
    data = fingerprint(labels={**NESTED, "ignore": 4}, order=(1, 2, 3))
    nowhere = data.classes["core"].model_copy(update={"cases": 0})
    planner.make(data.model_copy(update={"classes": {**data.classes, "ignore": nowhere}}))
    with pytest.raises(ValidationErrors, match="no case of any site has the structure core"):
        planner.make(data.model_copy(update={"classes": {**data.classes, "core": nowhere}}))


# --- the plan as a whole ----------


def test_every_section_of_the_plan_has_a_reason():
    plan = make_plan((32, 32, 32), hours=1, speed=SPEED)
    fields = {r.field for r in plan.reasons}
    for field in (
        "local.geometry.configuration",
        "local.geometry.spacing_mm",
        "local.geometry.transpose",
        "local.geometry.median_shape",
        "local.intensity.channels.MRI",
        "local.intensity.inside_mask",
        "local.training.patch_size",
        "local.training.batch_size",
        "local.training.batch_dice",
        "local.training.precision",
        "local.training.momentum",
        "local.training.mirror_axes",
        "local.network.features",
        "local.network.strides",
        "agreement.training.rounds",
        "agreement.training.snapshots",
        "agreement.privacy.mechanism",
    ):
        assert field in fields, field


def test_every_field_has_one_reason_and_it_is_that_of_the_plan():
    plan = make_plan((388, 512, 512), (1.0, 0.787, 0.787), 100, labels=1, configuration="3d_lowres")
    plan = plan.change({"training.rounds": 7})
    fields = [r.field for r in plan.reasons]
    assert len(fields) == len(set(fields))
    assert next(r.value for r in plan.reasons if r.field.endswith("spacing_mm")).startswith("2.")
    by_hand = next(r for r in plan.reasons if r.field == "agreement.training.rounds")
    assert by_hand.value == "7" and by_hand.why.startswith("set by hand, instead of ")


def test_the_tenth_percentile_is_named_where_it_was_taken():
    data = fingerprint((20, 256, 256), (5.0, 1.0, 1.0), 10)
    thick = data.axes[0].model_copy(update={"spacing_mm": {"3.0": 2, "5.0": 8}})
    coarse = planner.make(data.model_copy(update={"axes": (thick, *data.axes[1:])}))
    plain = make_plan((128, 128, 128))
    assert "5, is far coarser" in reason(coarse, "local.geometry.spacing_mm")
    assert "percentile" not in reason(plain, "local.geometry.spacing_mm")


def test_a_background_that_is_nowhere_is_no_problem():
    data = fingerprint()
    everywhere = data.classes["background"].model_copy(update={"cases": 0, "voxels": 0})
    planner.make(data.model_copy(update={"classes": {**data.classes, "background": everywhere}}))


def test_what_cannot_be_planned_is_refused_all_at_once():
    data = fingerprint()
    empty = data.sites["alpha"].model_copy(update={"labelled": 0})
    absent = data.classes["structure_1"].model_copy(update={"cases": 0})
    data = data.model_copy(
        update={"sites": {**data.sites, "alpha": empty}, "classes": {**data.classes, "structure_1": absent}}
    )
    with pytest.raises(ValidationErrors) as error:
        planner.make(data, Budget(delta=1e-5))
    with pytest.raises(ValidationErrors, match="names no site"):
        planner.make(data.model_copy(update={"sites": {}}))
    assert len(error.value.problems) == 3
    assert "alpha" in str(error.value) and "structure_1" in str(error.value) and "epsilon" in str(error.value)


def test_sites_average_unless_another_way_is_asked_for_or_their_steps_differ():
    plan = planner.make(fingerprint())
    assert plan.agreement.algorithm.name == "fedavg"
    assert "agreement.algorithm.name" in {reason.field for reason in plan.reasons}
    assert planner.make(fingerprint(), algorithm="scaffold").agreement.algorithm.name == "scaffold"
    uneven = plan.change({"training.steps_at": {"alpha": 3}})
    assert uneven.agreement.algorithm.name == "fednova" and uneven.steps_at("alpha") == 3
    both = plan.change({"training.steps_at": {"alpha": 3}, "algorithm.name": "fedavg"})
    assert both.agreement.algorithm.name == "fedavg"


def test_two_voxels_deep_means_float32():
    """Where a CPU's gradients in bfloat16 are rubbish (torch 2.13), no plan asks for them."""
    plan = small_plan()
    stages = len(plan.local.network.features)
    thin = {"local.training.patch_size": [2**stages, 16, 16], "precision": "bfloat16"}
    assert plan.local.network.is_thin((2**stages, 16, 16))
    with pytest.raises(ValidationErrors, match=r"becomes two voxels deep.*write local\.training\.precision float32"):
        plan.change(thin)
    assert plan.change(thin | {"precision": "float32"}).local.training.precision == "float32"
