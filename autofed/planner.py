"""From a fingerprint and a budget to a plan: every heuristic, pure and without torch.

The rules are those of nnU-Net (Isensee et al., Nat Methods 18:203, 2021; version 2.8.1) with two differences that are
also written into the plan's reasons: the batch cap counts the whole federation, and network, batch and number of steps
shrink to what the given machine can do in the given hours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from autofed.fingerprints import FIXED_POINT, HOUNSFIELD_RANGE, Fingerprint, is_ct, values
from autofed.images import PICTURE_SLICE_MM
from autofed.plans import (
    Agreement,
    Algorithm,
    Budget,
    Channel,
    Geometry,
    Inference,
    Intensity,
    Local,
    Network,
    Plan,
    Privacy,
    Reason,
    Rounds,
    Training,
    spaced_snapshots,
)
from autofed.problems import Problems

ANISOTROPY = 3.0
"""An axis this many times coarser than the others is treated apart (nnU-Net)."""

SMALLEST_EDGE = 4
"""No stage of the network gets a feature map with a shorter edge (nnU-Net)."""

BASE_FEATURES = 32
NARROWER = (32, 24, 16, 12, 8)
"""Widths of the first stage, tried from the left until enough steps fit into the hours."""

FULL_TRAINING = 250_000
"""Steps of a full training (nnU-Net: 1000 epochs of 250)."""

ENOUGH_STEPS = 1000
"""Fewer steps than this at a site, and a narrower network or a smaller batch learns more in the same hours."""

SMALLEST_BATCH = 2

SHORT_TRAINING = 10_000
"""Below so many steps a site the plan departs from nnU-Net's long training: see `_optimiser` and `_mirror_axes`."""

USEFUL_SHARE = 0.8
"""Share of the hours that is planned; the rest is for reading, averaging and saving, and for a machine that is shared."""

_DATASET_SHARE = 0.05
_REFERENCE = {2: (85e6, 12), 3: (560e6, 2)}  # output elements of all convolutions that fit 8 GB, at this batch size
_MOST_FEATURES = {2: 512, 3: 320}
_START_VOXELS = {2: 2048**2, 3: 256**3}


@dataclass(frozen=True)
class Topology:
    """Where the network pools: patch size (a multiple of all strides), kernels and strides per stage."""

    patch: tuple[int, ...]
    kernels: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def divisor(self) -> tuple[int, ...]:
        """Product of the strides per axis."""
        return tuple(math.prod(s) for s in zip(*self.strides, strict=True))


def make(fingerprint: Fingerprint, budget: Budget | None = None, algorithm: str = "fedavg") -> Plan:
    """The plan for the data described by a (merged) fingerprint, within a budget.

    `Problems` if there is nothing to learn from, or if the budget asks for what this version does not plan.
    """
    budget = budget or Budget()
    _refuse_what_cannot_be_planned(fingerprint, budget)
    reasons: list[Reason] = []
    geometry = _geometry(fingerprint, reasons)
    intensity = _intensity(fingerprint, reasons)
    network, training, rounds = _network_and_training(fingerprint, geometry, budget, reasons)
    declaration = fingerprint.declaration
    agreement = Agreement(
        channels=declaration.channels,
        labels=declaration.labels,
        dimension=declaration.dimension,
        patients={name: site.patients for name, site in fingerprint.sites.items()},
        algorithm=Algorithm(name=algorithm),
        training=rounds,
        privacy=Privacy(),
    )
    _say(reasons, "agreement.privacy.mechanism", "none", "no epsilon was asked for: nothing is promised")
    return Plan(
        budget=budget,
        agreement=agreement,
        local=Local(geometry=geometry, intensity=intensity, network=network, training=training),
        inference=Inference(mirror_axes=training.mirror_axes),
        reasons=tuple(reasons),
    )


def target_spacing(fingerprint: Fingerprint) -> tuple[float, float, float]:
    """Median spacing per axis; a much coarser axis takes its 10th percentile instead (nnU-Net, fullres)."""
    spacings = [values(axis.spacing_mm) for axis in fingerprint.axes]
    sizes = [float(np.median(values(axis.size))) for axis in fingerprint.axes]
    target = [float(np.median(s)) for s in spacings]
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    coarse = target[worst] > ANISOTROPY * max(target[a] for a in others)
    thin = sizes[worst] * ANISOTROPY < min(sizes[a] for a in others)
    if coarse and thin:
        target[worst] = float(np.percentile(spacings[worst], 10))
        floor = max(target[a] for a in others)
        if target[worst] < floor:
            target[worst] = floor + 1e-5
    return (target[0], target[1], target[2])


def transposition(spacing_mm: Sequence[float]) -> tuple[int, int, int]:
    """The axis with the largest spacing comes first; the other two keep their order."""
    first = int(np.argmax(spacing_mm))
    rest = [axis for axis in range(3) if axis != first]
    return (first, rest[0], rest[1])


def median_shape(fingerprint: Fingerprint, order: Sequence[int], spacing_mm: Sequence[float]) -> list[float]:
    """Median size on the target grid, axes in the given order: a whole number each, or the half between two.

    Rounding is monotone, so extents per axis are enough.
    """
    pairs = zip((fingerprint.axes[axis] for axis in order), spacing_mm, strict=True)
    return [float(np.median(np.round(values(axis.extent_mm) / spacing))) for axis, spacing in pairs]


def topology(spacing_mm: Sequence[float], patch: Sequence[float]) -> Topology:
    """Pool the finest axes while they are long enough; a kernel becomes 3 once its axis is among the finest."""
    spacing, size = list(spacing_mm), list(patch)
    kernel = [1] * len(size)
    kernels: list[tuple[int, ...]] = []
    strides = [(1,) * len(size)]
    while pooled := _axes_to_pool(spacing, size):
        kernel = [3 if k == 3 or s / min(spacing) < 2 else 1 for k, s in zip(kernel, spacing, strict=True)]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in pooled else 1 for axis in range(len(size))))
        spacing = [s * 2 if axis in pooled else s for axis, s in enumerate(spacing)]
        size = [math.ceil(s / 2) if axis in pooled else s for axis, s in enumerate(size)]
    kernels.append((3,) * len(size))
    divisor = [math.prod(s) for s in zip(*strides, strict=True)]
    padded = tuple(math.ceil(p / d) * d for p, d in zip(patch, divisor, strict=True))
    return Topology(padded, tuple(kernels), tuple(strides))


def features(stages: int, dimension: int, base: int = BASE_FEATURES) -> tuple[int, ...]:
    """Channels per stage: doubling from `base`, up to ten (3D) or sixteen (2D) times it."""
    most = _MOST_FEATURES[dimension] * base // BASE_FEATURES
    return tuple(min(base * 2**stage, most) for stage in range(stages))


def memory_proxy(network: Network, patch: Sequence[int]) -> int:
    """Output elements of all convolutions for one patch, lower heads not counted: nnU-Net's stand-in for memory."""
    voxels = network.stage_voxels(tuple(patch))
    last = len(network.features) - 1
    down = sum(2 * f * v for f, v in zip(network.features, voxels, strict=True))
    up = sum(3 * network.features[stage] * voxels[stage] for stage in range(last))
    return down + up + network.classes * voxels[0]


def _axes_to_pool(spacing: Sequence[float], size: Sequence[float]) -> list[int]:
    long_enough = [axis for axis in range(len(size)) if size[axis] >= 2 * SMALLEST_EDGE]
    if not long_enough:
        return []
    finest = min(spacing[axis] for axis in long_enough)
    pooled = [axis for axis in long_enough if spacing[axis] / finest < 2]
    return [] if len(pooled) == 1 and size[pooled[0]] < 3 * SMALLEST_EDGE else pooled


def _refuse_what_cannot_be_planned(fingerprint: Fingerprint, budget: Budget) -> None:
    problems = [] if fingerprint.sites else ["the fingerprint names no site; merge those that the sites handed over"]
    if budget.epsilon is not None:
        problems.append("private training is not planned yet; plan without --epsilon")
    for name, site in fingerprint.sites.items():
        if site.labelled == 0:
            problems.append(f"the site {name} has no labelled case; leave it out")
    for name, counts in fingerprint.classes.items():
        if counts.cases == 0:
            problems.append(f"no case of any site has the structure {name}; remove it from `labels`")
    if problems:
        raise Problems("the plan", problems)


def _say(reasons: list[Reason], field: str, value: object, why: str) -> None:
    reasons.append(Reason(field=field, value=str(value), why=why))


def _geometry(fingerprint: Fingerprint, reasons: list[Reason]) -> Geometry:
    spacing = target_spacing(fingerprint)
    flat = fingerprint.declaration.dimension == 2
    order = (0, 1, 2) if flat else transposition(spacing)
    moved = (spacing[order[0]], spacing[order[1]], spacing[order[2]])
    shape = median_shape(fingerprint, order, moved)
    geometry = Geometry(
        configuration="2d" if flat else "3d_fullres",
        transpose=order,
        spacing_mm=moved,
        median_shape=tuple(max(1, round(size)) for size in shape),
    )
    where = "local.geometry."
    _say(reasons, where + "configuration", geometry.configuration, "pictures" if flat else "volumes of many slices")
    _say(reasons, where + "spacing_mm", _short(moved), _spacing_reason(fingerprint, spacing))
    first = "the one slice of a picture comes first" if flat else "the axis with the largest spacing comes first"
    _say(reasons, where + "transpose", order, first)
    _say(reasons, where + "median_shape", geometry.median_shape, "median size of the cases on that grid")
    return geometry


def _spacing_reason(fingerprint: Fingerprint, spacing_mm: Sequence[float]) -> str:
    medians = [round(float(np.median(values(axis.spacing_mm))), 4) for axis in fingerprint.axes]
    unit = "pixels: pictures have no millimetres" if spacing_mm[0] >= PICTURE_SLICE_MM else "mm"
    return (
        f"median over {fingerprint.cases} cases of all sites, {_short(medians)} {unit}; "
        "a far coarser axis takes its 10th percentile"
    )


def _intensity(fingerprint: Fingerprint, reasons: list[Reason]) -> Intensity:
    channels = []
    for name, sums in zip(fingerprint.declaration.channels, fingerprint.channels, strict=True):
        channel = _ct(sums) if is_ct(name) else Channel(scheme=_scheme(name))
        channels.append(channel)
        why = "values of the federation's foreground" if is_ct(name) else "by the channel's name, per image"
        _say(reasons, f"local.intensity.channels.{name}", channel.scheme, why)
    ratio = float(np.median(values(fingerprint.crop_ratio)))
    inside = ratio < 0.75 and any(c.scheme == "zscore" for c in channels)
    _say(
        reasons,
        "local.intensity.inside_mask",
        inside,
        f"cropping to non-zero voxels keeps {ratio:.0%} of an image; "
        "z-scores use only those voxels if it is less than 75 %",
    )
    return Intensity(channels=tuple(channels), inside_mask=inside)


def _scheme(channel: str):
    known = {"rescale_to_0_1", "rgb_to_0_1", "nonorm"}
    return channel.lower() if channel.lower() in known else "zscore"


def _ct(sums) -> Channel:
    """Mean and standard deviation of the mixture of all cases (the variance between sites is in it), percentiles."""
    mean = sums.total / sums.cases / FIXED_POINT
    square = sums.squares / sums.cases / FIXED_POINT
    masses = np.zeros(HOUNSFIELD_RANGE[1] - HOUNSFIELD_RANGE[0] + 1)
    for value, mass in sums.histogram.items():
        masses[int(value) - HOUNSFIELD_RANGE[0]] = mass
    share = np.cumsum(masses) / masses.sum()
    low, high = (float(np.searchsorted(share, p) + HOUNSFIELD_RANGE[0]) for p in (0.005, 0.995))
    return Channel(
        scheme="ct",
        mean=mean,
        std=max(math.sqrt(max(square - mean**2, 0.0)), 1e-8),
        percentile_00_5=low,
        percentile_99_5=high,
    )


def _network(fingerprint: Fingerprint, shape: Topology, base: int = BASE_FEATURES) -> Network:
    dimension = len(shape.patch)
    return Network(
        in_channels=len(fingerprint.declaration.channels),
        classes=len(fingerprint.declaration.labels),
        features=features(len(shape.strides), dimension, base),
        kernels=shape.kernels,
        strides=shape.strides,
    )


def first_patch(spacing_mm: Sequence[float], shape: Sequence[float]) -> list[float]:
    """A patch of the same extent in mm along every axis, as large as nnU-Net starts with, within the median image."""
    inverse = 1 / np.asarray(spacing_mm, float)
    scale = (_START_VOXELS[len(inverse)] / np.prod(inverse)) ** (1 / len(inverse))
    return [min(round(edge), size) for edge, size in zip(inverse * scale, shape, strict=True)]


def patch_for_memory(
    fingerprint: Fingerprint, spacing_mm: Sequence[float], shape: Sequence[float], memory_gb: float
) -> tuple[Topology, int]:
    """The largest patch that fits, with its topology, and the batch size (nnU-Net's shrink loop)."""
    dimension = len(spacing_mm)
    elements, reference_batch = _REFERENCE[dimension]
    allowed = elements * memory_gb / 8
    found = topology(spacing_mm, first_patch(spacing_mm, shape))
    if len(found.strides) < 2:
        raise Problems(
            "the plan",
            [
                f"the median image ({_short(shape)}) is too small for a network that halves it even once; "
                f"expected an axis of at least {3 * SMALLEST_EDGE} voxels among the finest"
            ],
        )
    while memory_proxy(_network(fingerprint, found), found.patch) / reference_batch * 2 > allowed:
        smaller = _shrink(found, spacing_mm, shape)
        if smaller.patch == found.patch or len(smaller.strides) < 2:
            break  # there is nothing left to shorten: the smallest patch it is
        found = smaller
    proxy = memory_proxy(_network(fingerprint, found), found.patch)
    batch = round(allowed / proxy * reference_batch)
    federation_voxels = float(np.prod(shape)) * fingerprint.cases
    cap = round(federation_voxels * _DATASET_SHARE / math.prod(found.patch))
    return found, max(2, min(batch, cap))


def _shrink(found: Topology, spacing_mm: Sequence[float], shape: Sequence[float]) -> Topology:
    """Shorten the axis that is longest beside the median image, by the divisor that it has after shortening."""
    ratios = np.asarray(found.patch) / np.asarray(shape)
    axis = len(ratios) - 1 - int(np.argmax(ratios[::-1]))
    tried = list(found.patch)
    tried[axis] -= found.divisor[axis]
    step = topology(spacing_mm, tried).divisor[axis]
    patch = list(found.patch)
    patch[axis] = max(SMALLEST_EDGE, patch[axis] - step)
    return topology(spacing_mm, patch)


def _network_and_training(
    fingerprint: Fingerprint, geometry: Geometry, budget: Budget, reasons: list[Reason]
) -> tuple[Network, Training, Rounds]:
    sites = len(fingerprint.sites)
    found, batch = _patch(fingerprint, geometry, budget, reasons)
    base, batch_size, steps = _fit_to_hours(fingerprint, found, batch, budget, reasons)
    network = _network(fingerprint, found, base)
    _say(reasons, "local.network.strides", network.strides, "pool the finest axes while edges stay at 4 or more")
    rounds, per_round = _meetings(steps // sites, sites, reasons)
    training = _training(found, batch_size, per_round, steps // sites, budget, reasons)
    return network, training, rounds


def _patch(fingerprint: Fingerprint, geometry: Geometry, budget: Budget, reasons: list[Reason]) -> tuple[Topology, int]:
    dimension = fingerprint.declaration.dimension
    shape = median_shape(fingerprint, geometry.transpose, geometry.spacing_mm)[-dimension:]
    found, batch = patch_for_memory(fingerprint, geometry.spacing_mm[-dimension:], shape, budget.memory_gb)
    _say(
        reasons,
        "local.training.patch_size",
        found.patch,
        f"the largest patch of the median image {geometry.median_shape[-dimension:]} that fits "
        f"{budget.memory_gb:g} GB with two patches in a batch, a multiple of {found.divisor}",
    )
    return found, batch


def _meetings(steps_per_site: int, sites: int, reasons: list[Reason]) -> tuple[Rounds, int]:
    """The rounds, and the steps at each site in one."""
    rounds, per_round = _rounds(steps_per_site)
    _say(
        reasons,
        "agreement.training.rounds",
        rounds,
        f"{per_round} steps at each of {sites} sites "
        "a round: about twice as many rounds as steps in one, so that sites do not drift apart",
    )
    snapshots = tuple(spaced_snapshots(rounds))
    _say(reasons, "agreement.training.snapshots", snapshots, "late and spaced: neighbours are nearly one model")
    return Rounds(rounds=rounds, snapshots=snapshots), per_round


def _training(
    found: Topology, batch_size: int, steps_per_round: int, steps_per_site: int, budget: Budget, reasons: list[Reason]
) -> Training:
    rate, momentum = _optimiser(steps_per_site)
    width = max(found.patch) / found.patch[0]
    training = Training(
        patch_size=found.patch,
        batch_size=batch_size,
        steps_per_round=steps_per_round,
        learning_rate=rate,
        momentum=momentum,
        mirror_axes=_mirror_axes(len(found.patch), steps_per_site),
        rotate_in_plane_only=len(found.patch) == 3 and width > ANISOTROPY,
        batch_dice=len(found.patch) == 2,
        precision=budget.speed.precision if budget.speed else "float32",
    )
    whys = {
        "precision": "the faster one of float32 and bfloat16 where the speed was measured",
        "momentum": f"learning rate {rate:g}; it starts anew each round, and a training of under {SHORT_TRAINING} "
        "steps a site is too short for .99",
        "mirror_axes": "pictures have no up and down; volumes lie alike in the scanner, and "
        f"under {SHORT_TRAINING} steps a site are too few to also learn their mirror images",
        "rotate_in_plane_only": f"the patch is {width:.1f} times as wide as deep; "
        f"above {ANISOTROPY:g} it is augmented slice by slice",
    }
    for field, why in whys.items():
        _say(reasons, "local.training." + field, getattr(training, field), why)
    return training


def _fit_to_hours(
    fingerprint: Fingerprint, found: Topology, batch: int, budget: Budget, reasons: list[Reason]
) -> tuple[int, int, int]:
    """First-stage width, batch size and total steps: the widest network that gets enough steps in the hours."""
    if budget.hours is None or budget.speed is None:
        _say(reasons, "local.network.features", BASE_FEATURES, "no hours were given: nnU-Net's full width")
        _say(reasons, "local.training.batch_size", batch, _batch_reason(batch))
        return BASE_FEATURES, batch, FULL_TRAINING
    sites = len(fingerprint.sites)
    for base, size in _candidates(batch):
        network = _network(fingerprint, found, base)
        steps = affordable_steps(network, found.patch, size, budget)
        if steps >= ENOUGH_STEPS * sites:
            break
    steps = max(sites, min(steps, FULL_TRAINING))
    seconds = budget.speed.seconds(network, found.patch, size)
    fits = f"{steps} steps of {seconds:.2g} s in all fit {budget.hours:g} h on this {budget.device}"
    wish = f"of the first stages {NARROWER} the widest that leaves at least {ENOUGH_STEPS} steps to each of {sites} sites"
    if steps < ENOUGH_STEPS * sites:
        wish = f"even the narrowest network gets fewer than the {ENOUGH_STEPS} a site wished for: give more hours"
    _say(reasons, "local.network.features", base, f"{fits}; {wish}")
    _say(
        reasons,
        "local.training.batch_size",
        size,
        _batch_reason(batch) + ("; smaller here, so that enough steps fit the hours" if size < batch else ""),
    )
    return base, size, steps


def _batch_reason(batch: int) -> str:
    return f"memory and 5 % of the federation's voxels allow {batch} (nnU-Net counts one dataset, here all sites count)"


def _candidates(batch: int) -> Iterator[tuple[int, int]]:
    """Width first, then batch: a smaller batch costs less quality than a narrower network."""
    for base in NARROWER:
        size = batch
        while size > SMALLEST_BATCH:
            yield base, size
            size = max(SMALLEST_BATCH, size // 2)
        yield base, size


def affordable_steps(network: Network, patch: tuple[int, ...], batch: int, budget: Budget) -> int:
    """Training steps that fit the hours."""
    assert budget.hours is not None and budget.speed is not None
    return int(budget.hours * 3600 * USEFUL_SHARE / budget.speed.seconds(network, patch, batch))


def _rounds(steps_per_site: int) -> tuple[int, int]:
    rounds = max(1, min(steps_per_site, round(math.sqrt(2 * steps_per_site))))
    return rounds, max(1, steps_per_site // rounds)


def _optimiser(steps_per_site: int) -> tuple[float, float]:
    """Learning rate and momentum: nnU-Net's for a long training, a shorter memory for a short one."""
    return (0.01, 0.99) if steps_per_site >= SHORT_TRAINING else (0.1, 0.9)


def _mirror_axes(dimension: int, steps_per_site: int) -> tuple[int, ...]:
    """All axes (nnU-Net), but none for volumes in a short training."""
    return tuple(range(dimension)) if dimension == 2 or steps_per_site >= SHORT_TRAINING else ()


def _short(numbers: Sequence[float]) -> str:
    return " x ".join(f"{n:g}" for n in numbers)
