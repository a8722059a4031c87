"""Fingerprints and plans that tests start from, made from numbers instead of files."""

from __future__ import annotations

from autofed.data import Declaration
from autofed.fingerprints import AxisCounts, ChannelSums, ClassCounts, Fingerprint, SiteCounts
from autofed.planner import make
from autofed.plans import Budget, Plan, Speed

SPEED = Speed(seconds_per_step=0.001, seconds_per_gigaelement=0.5, seconds_per_teraflop=5.0, seconds_per_megavoxel=0.05)


def fingerprint(
    shape=(32, 32, 32),
    spacing_mm=(1.0, 1.0, 1.0),
    cases=20,
    channels=("MRI",),
    labels=2,
    sites=("alpha", "bravo"),
    unlabelled=0,
    order=(),
) -> Fingerprint:
    """A federation whose cases all have one shape and spacing; `unlabelled` more of them at the first site.

    `labels` are the names with their values, or how many structures there are; regions have a class `order`.
    """
    if isinstance(labels, int):
        labels = {"background": 0} | {f"structure_{i}": i for i in range(1, labels + 1)}
    every = cases // len(sites) * len(sites) + unlabelled
    axes = tuple(
        AxisCounts(spacing_mm={repr(s): every}, extent_mm={repr(s * n): every}, size={str(n): every})
        for s, n in zip(spacing_mm, shape, strict=True)
    )
    return Fingerprint(
        declaration=Declaration(channels=channels, labels=labels, regions_class_order=order,
                                dimension=2 if shape[0] == 1 else 3),
        sites={s: SiteCounts(patients=cases // len(sites), labelled=cases // len(sites),
                             cases=cases // len(sites) + (unlabelled if s == sites[0] else 0)) for s in sites},
        axes=axes,
        crop_ratio={"1.0000": every},
        channels=tuple(ChannelSums(cases=cases, histogram={"0": cases << 24}) for _ in channels),
        classes={name: ClassCounts(cases=cases, voxels=10, volume=10) for name in labels},
    )  # fmt: skip


def small_plan(
    shape=(16, 16, 16), channels=("MRI",), labels=2, sites=("alpha", "bravo"), cases=8, order=(), **settings
) -> Plan:
    """A plan whose network is small enough to train inside a test: 4 features, one step a round, three rounds."""
    spacing_mm = (999.0, 1.0, 1.0) if shape[0] == 1 else (1.0, 1.0, 1.0)
    data = fingerprint(shape, spacing_mm, cases, channels, labels, sites, order=order)
    plan = make(data, Budget(hours=0.01, speed=SPEED))
    stages = len(plan.local.network.features)
    changes = {
        "network.features": [4] * stages,
        "training.batch_size": 2,
        "training.steps_per_round": 1,
        "training.rounds": 3,
        "keep_momentum": False,
        **settings,
    }
    return plan.change(changes)


def reason(plan: Plan, field: str) -> str:
    """The last reason for the value of a field of a plan."""
    return next(reason.why for reason in reversed(plan.reasons) if reason.field == field)
