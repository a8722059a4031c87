"""The module is what the plan says: sizes, parameters, memory, and weights that go in and out whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from autofed.errors import ValidationErrors
from autofed.plans import Network, Training, memory
from autofed.training.devices import autocast, place
from autofed.training.loss import make_loss
from autofed.training.network import build, load_weights, weights_of
from tests.plans_made import small_plan

PLANS = {
    "volumes": small_plan().local.network,
    "pictures": small_plan((1, 64, 64), ("R", "G", "B")).local.network,
    "flat slices": Network(in_channels=2, classes=4, features=(4, 8, 16), kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
                           strides=((1, 1, 1), (1, 2, 2), (2, 2, 2))),
    "residual": Network(kind="resenc", in_channels=2, classes=3, features=(4, 8, 8), blocks=(1, 3, 2),
                        kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)), strides=((1, 1, 1), (1, 2, 2), (2, 2, 2))),
    "attention": Network(kind="dcfed", in_channels=2, classes=3, features=(4, 8, 8), blocks=(1, 1, 1),
                         kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)), strides=((1, 1, 1), (1, 2, 2), (2, 2, 2))),
    "flat attention": Network(kind="dcfed", in_channels=3, classes=2, features=(4, 8), blocks=(1, 2),
                              kernels=((3, 3),) * 2, strides=((1, 1), (2, 2))),
    "two stages": Network(in_channels=1, classes=2, features=(4, 8), kernels=((3, 3),) * 2, strides=((1, 1), (2, 2))),
}  # fmt: skip
PLANS |= {
    f"{name} that drop out": PLANS[name].model_copy(update={"dropout": 0.3})
    for name in ("volumes", "residual", "flat attention")
}


@pytest.mark.parametrize("name", PLANS)
def test_stated_parameters_are_those_of_the_module(name):
    plan = PLANS[name]
    module = build(plan)
    assert sum(p.numel() for p in module.parameters()) == plan.parameters
    assert len(dict(module.named_parameters())) == len(module.state_dict())


@pytest.mark.parametrize("name", PLANS)
def test_logits_have_the_patch_size_and_halve_from_head_to_head(name):
    plan = PLANS[name]
    patch = tuple(d * 4 for d in plan.divisor)
    module = build(plan, seed=1)
    logits = module(torch.zeros(2, plan.in_channels, *patch))
    assert [tuple(x.shape) for x in logits][0] == (2, plan.classes, *patch)
    assert [np.prod(x.shape[2:]) for x in logits] == plan.stage_voxels(patch)[: len(logits)]
    module.eval()
    assert module(torch.zeros(1, plan.in_channels, *patch)).shape == (1, plan.classes, *patch)


@pytest.mark.parametrize("name", ["volumes", "residual", "attention", "flat attention"])
def test_every_parameter_learns(name):
    plan = PLANS[name]
    module = build(plan, seed=1)
    logits = module(torch.randn(1, plan.in_channels, *(d * 4 for d in plan.divisor)))
    sum(x.square().sum() for x in logits).backward()
    assert [n for n, p in module.named_parameters() if p.grad is None] == []


def test_a_seed_decides_the_weights():
    plan = PLANS["volumes"]
    torch.manual_seed(5)
    first = weights_of(build(plan, seed=1))
    torch.manual_seed(6)
    again, other = weights_of(build(plan, seed=1)), weights_of(build(plan, seed=2))
    assert all(np.array_equal(first[n], again[n]) for n in first)
    assert any(not np.array_equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize("name", ["volumes", "residual"])
def test_normalisation_starts_as_the_identity(name):
    heads = "heads."
    arrays = weights_of(build(PLANS[name], seed=1))
    norms = {n: w for n, w in arrays.items() if w.ndim == 1 and not n.startswith(heads)}
    assert norms
    assert all((w == (1 if n.endswith("weight") else 0)).all() for n, w in norms.items())


def test_weights_that_do_not_fit_are_named_all_at_once():
    weights = weights_of(build(PLANS["volumes"], seed=1))
    missing, wrong = list(weights)[:2]
    del weights[missing]
    weights[wrong] = np.zeros((1, 2, 3), np.float32)
    weights["stranger"] = np.zeros(3, np.float32)
    with pytest.raises(ValidationErrors) as error:
        load_weights(build(PLANS["volumes"]), weights)
    assert len(error.value.problems) == 3
    assert all(name in str(error.value) for name in (missing, wrong, "stranger"))


MEASURE = Path(__file__).parent / "benchmarks" / "memory.py"


def stored_bytes(plan, patch, precision):
    """What autograd stores for the way back of two patches: parameters left out, storages counted once."""
    module, found = place(build(plan, seed=0), plan, "cpu"), {}
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    loss = make_loss(Training(patch_size=patch, batch_size=2, steps_per_round=1), len(module.heads))
    image = place(torch.randn(2, plan.in_channels, *patch), plan, "cpu")
    if precision == "float32":
        known.add(image.untyped_storage().data_ptr())  # it counts among the patches
    with saved_tensors_hooks(note, lambda tensor: tensor):
        with autocast(precision, "cpu"):
            logits = module(image)
        kept = loss([part.float() for part in logits], torch.zeros(2, 1, *patch))
    del kept
    return sum(size for pointer, (size, _) in found.items() if pointer not in known)


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PLANS)
def test_stated_activations_are_those_that_autograd_stores(name, precision, deep):
    plan = PLANS[name].model_copy(update={"deep_supervision": deep})
    for narrow in (True, False):  # with channels last or first
        if not narrow:
            plan = plan.model_copy(update={"features": tuple(4 * f for f in plan.features)})
        patch = tuple(max(d * 4, 16) for d in plan.divisor)
        tape = memory.Tape(plan, patch, 2, precision).operations()
        stated = sum(operation.stores for operation in tape)
        assert stated == pytest.approx(stored_bytes(plan, patch, precision), rel=0.02)


def measured(plan, patch, what):
    task = {"network": plan.model_dump(mode="json"), "patch": patch, "batch": 2, "what": what}
    environ = {**os.environ, "PYTHONPATH": str(MEASURE.parents[2]), "OMP_NUM_THREADS": "1",
               "MALLOC_MMAP_THRESHOLD_": "131072"}  # fmt: skip
    command = [sys.executable, MEASURE, "--one", json.dumps(task)]
    return json.loads(subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells and resets the peak")
@pytest.mark.parametrize(
    ("kind", "features", "patch", "what"),
    [
        ("dcfed", (16, 32, 64), (192, 192), "bfloat16"),
        pytest.param("unet", (8, 16, 32), (48, 48, 48), "float32", marks=pytest.mark.slow),
    ],
)
def test_a_process_takes_what_the_network_states(kind, features, patch, what):
    dims, stages = len(patch), len(features)
    plan = Network(kind=kind, in_channels=1, classes=3, features=features, kernels=((3,) * dims,) * stages,
                   strides=((1,) * dims, *((2,) * dims,) * (stages - 1)),
                   blocks=() if kind == "unet" else (1,) * stages)  # fmt: skip
    found = measured(plan, patch, what)
    assert found["stated"] == pytest.approx(found["taken"], rel=0.15)


def test_an_optimiser_of_a_large_network_takes_more_than_its_activations():
    plan = Network(in_channels=1, classes=2, features=(32, 512), kernels=((3,) * 3,) * 2, strides=((1,) * 3, (2,) * 3))
    assert memory.training_bytes(plan, (4, 4, 4), 1) > 3 * 4 * plan.parameters


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["unet", "resenc", "dcfed"])
@pytest.mark.parametrize("images", [1, 2])
def test_the_gradient_does_not_depend_on_the_memory_layout(dims, kind, images):
    """Of a single image with channels last, torch 2.13 computed another one on a CPU, uncorrelated with the true."""
    plan = Network(
        in_channels=2, classes=2, kind=kind, features=(4, 8, 16), kernels=((3,) * dims,) * 3,
        strides=((1,) * dims, (2,) * dims, (2,) * dims), blocks=() if kind == "unet" else (1, 1, 1),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((images, 2) + (16,) * dims, generator=generator)
    last = torch.channels_last if dims == 2 else torch.channels_last_3d
    found = [_gradient(plan, image, layout) for layout in (torch.contiguous_format, last)]
    assert float((found[1] - found[0]).norm()) < 0.01 * float(found[0].norm())


def _gradient(plan, image, layout):
    module = build(plan, seed=0).train().to(memory_format=layout)
    outputs = module(image.to(memory_format=layout))
    sum(output.square().mul(0.1).sum() + output[:, 0].sum() for output in outputs).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters()])
