"""Steps of training in whatever version of autofed is found first: part of step_time.py --before.

    python _steps.py WORK SITE LOCAL STEPS

LOCAL is the `local` section of a plan as JSON, of which fields are dropped that this version does not know. Prints, as
JSON, mean seconds of making the patches of a step alone, of learning from one, and of both together as `fit` has them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from autofed.plans import LocalPlan, Training
from autofed.preprocessing import open_store
from autofed.privacy.none import NoPrivacy
from autofed.training import batches
from autofed.training.fit import Learner

MAKING_PER_STEP = 4


def main(work: str, site: str, section: str, count: str) -> None:
    """Measure and print."""
    value = json.loads(section)
    value["training"] = {k: v for k, v in value["training"].items() if k in Training.model_fields}
    local, steps = LocalPlan.parse(value, "the plan"), int(count)
    store = open_store(Path(work), site, local)
    learner = Learner(local.network, local.training, "cpu")
    optimiser = torch.optim.SGD(learner.module.parameters(), lr=1e-4, momentum=0.9, nesterov=True)

    def stream(length: int):
        sampler = NoPrivacy(local.training.batch_size).sampler(list(store.patients), (1,))
        return batches.stream(store, (next(sampler) for _ in range(length)), local.training, (1,))

    def learn(patches: batches.PatchBatch) -> None:
        gradient = learner.gradient(patches, [])
        for parameter, part in zip(learner.module.parameters(), gradient, strict=True):
            parameter.grad = part
        torch.nn.utils.clip_grad_norm_(learner.module.parameters(), local.training.gradient_clip)
        optimiser.step()

    (first,) = next(stream(1))
    for _ in range(3):  # to warm up
        learn(first)
    found = {
        "making": clocked(lambda: [None for _ in stream(MAKING_PER_STEP * steps)]) / (MAKING_PER_STEP * steps),
        "learning": clocked(lambda: [learn(first) for _ in range(steps)]) / steps,
        "together": clocked(lambda: [learn(groups[0]) for groups in stream(steps)]) / steps,
    }
    print(json.dumps(found))


def clocked(work) -> float:
    """Seconds that the work took."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main(*sys.argv[1:])
