"""What labelling public images costs: time for one more member and for an ensemble, and bytes of what travels.

    OMP_NUM_THREADS=1 python tests/benchmarks/labelling.py DATA -o OUT [--federation breast-ultrasound]

Networks of the federation's plan (QUICK) with random weights, three members. "One by one" is what `predict` does with
each member: view by view, in float32. All ways are timed in one run, one after the other.
"""

from __future__ import annotations

import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from _federations import QUICK, Bench, bench, markdown, parser

from autofed.api.public_images import with_public_images
from autofed.federation.public_labelling import Labeller
from autofed.inference.predictor import mirrored_probabilities
from autofed.messages import quantization
from autofed.plans import Plan
from autofed.preprocessing import PublicImages, open_public
from autofed.training.devices import pick_device
from autofed.training.network import build, weights_of

MEMBERS = 3


def main() -> None:
    """Time and count for each federation."""
    args = parser(__doc__, QUICK).parse_args()
    work, rows = bench(args), []
    for federation in args.federation or ["breast-ultrasound"]:
        rows.append((federation, *measured(work, federation)))
    head = (
        "federation",
        "images",
        "one by one, s",
        "first member, s",
        "one more, s",
        "raw, MB",
        "zlib, MB",
        "sent, MB",
    )
    print(f"{torch.get_num_threads()} threads\n\n{markdown(head, rows)}")


def measured(work: Bench, federation: str) -> tuple[str, ...]:
    """Seconds and megabytes."""
    folder = work.data / federation / "public"
    made = with_public_images(work.prepare(federation).change({"algorithm.name": "dcfed"}), (), folder)
    public = open_public(folder, made, work.out / federation / "work")
    members = [weights_of(build(made.local.network, seed=seed)) for seed in range(MEMBERS)]
    device = pick_device(work.device)
    with tempfile.TemporaryDirectory() as said:
        labeller, answers = Labeller(public, made, Path(said), device), dict[str, np.ndarray]()
        before = seconds(lambda: one_by_one(made, public, device))
        first = seconds(lambda: labeller.label(members[:1]))
        labeller.label(members[:-1])
        more = seconds(lambda: answers.update(labeller.label(members)))
    return (str(len(public.folders)), f"{before:.1f}", f"{first:.1f}", f"{more:.1f}", *megabytes(answers))


def one_by_one(made: Plan, public: PublicImages, device: str) -> None:
    """All members over all images and views, in float32."""
    for seed in range(MEMBERS):
        network = build(made.local.network, seed=seed).to(device).eval()
        for name in public.folders:
            for _ in mirrored_probabilities(network, public.image(name), made, made.inference.mirror_axes, device):
                pass


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def megabytes(answers: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """As they are, packed by zlib alone, and as they travel."""
    raw = b"".join(array.tobytes() for array in answers.values())
    sent = quantization.encode(answers, quantization.DEFLATED)["values"].nbytes
    return tuple(f"{count / 1e6:.1f}" for count in (len(raw), len(zlib.compress(raw)), sent))


if __name__ == "__main__":
    main()
