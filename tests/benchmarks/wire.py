"""What a precision of the wire saves in bytes and costs in Dice: fedavg in float32, bfloat16 and int8.

    OMP_NUM_THREADS=1 python tests/benchmarks/wire.py DATA -o OUT [--federation hippocampus] [--quick | --full]

Runs, folders and scores as in algorithms.py; with the same OUT its fedavg runs are the float32 ones. Bytes are those of
the whole messages, counted where the transport carries them. The first round is counted too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from _federations import Bench, Experiment, Result, apart, bench, described, markdown, parser, points, spread

FEDERATIONS = ("hippocampus", "dermoscopy")
SEEDS = 3
WIRES = ("float32", "bfloat16", "int8")
FEWER, LOST = 3.8, 0.003
"""What is aimed at: so many times fewer bytes in both directions, and Dice lost at most."""


def main() -> None:
    """Run what is missing, then print the tables."""
    args = parser(__doc__, FEDERATIONS).parse_args()
    work, federations = bench(args), args.federation or FEDERATIONS
    wanted = [runs(federation, wire)[seed] for seed in args.seed or range(SEEDS) for federation in federations
              for wire in WIRES]  # fmt: skip
    failed = 0 if args.table else work.perform(wanted)
    for federation in federations:
        print(table(work, federation), flush=True)
    raise SystemExit(1 if failed else 0)


def runs(federation: str, wire: str) -> list[Experiment]:
    """One for each seed; those in float32 are the plain fedavg runs."""
    if wire == WIRES[0]:
        return [Experiment(federation, seed=seed) for seed in range(SEEDS)]
    return [
        Experiment(federation, seed=seed, label=f"wire-{wire}", settings={"agreement.wire": wire})
        for seed in range(SEEDS)
    ]


def table(work: Bench, federation: str) -> str:
    """One federation as Markdown."""
    found = {wire: results for wire in WIRES if (results := work.results(runs(federation, wire)))}
    plain = found.get(WIRES[0])
    if not plain:
        return f"### {federation}\n\nNothing is finished yet.\n"
    head = ("wire", "seeds", "KB to a site a round", "from it", "fewer, times", "Dice, test", "change, points (95 %)")
    every = [result for results in found.values() for result in results]
    text = [f"### {federation}", "", described(work.plan(federation), every)]
    text.append(markdown(head, (row(wire, results, plain) for wire, results in found.items())))
    return "\n".join([*text, *verdicts(found, plain)])


def row(wire: str, results: Sequence[Result], plain: Sequence[Result]) -> tuple[str, ...]:
    """Bytes and Dice of a precision."""
    (down, up), (down0, up0) = traffic(results), traffic(plain)
    return (
        wire, str(len(results)), f"{down / 1e3:.1f}", f"{up / 1e3:.1f}", f"{down0 / down:.2f}, {up0 / up:.2f}",
        spread([r.dice("test") for r in results]), points(apart(results, plain)) if wire != WIRES[0] else "",
    )  # fmt: skip


def traffic(results: Sequence[Result]) -> tuple[float, float]:
    """Bytes to a site and from it in a round, the mean over sites, rounds and seeds."""
    return tuple(
        float(np.mean([r.content["watched"][way] / r.content["watched"]["rounds"] / sites(r) for r in results]))
        for way in ("down", "up")
    )  # type: ignore[return-value]


def sites(result: Result) -> int:
    """How many there are."""
    return len(result.content["held_out"])


def verdicts(found: dict[str, list[Result]], plain: Sequence[Result]) -> Iterator[str]:
    """Whether what is aimed at is reached."""
    for wire, results in found.items():
        lost = apart(results, plain)
        if wire == WIRES[0] or not lost:
            continue
        fewer = min(before / now for before, now in zip(traffic(plain), traffic(results), strict=True))
        reached = "yes" if fewer >= FEWER and -lost[0] <= LOST else "NO"
        yield (f"* {wire}: {fewer:.2f} times fewer bytes (aim: {FEWER:g}), {-100 * lost[0]:+.2f} points of Dice lost "
               f"(aim: {100 * LOST:g} at most): {reached}")  # fmt: skip
    yield ""


if __name__ == "__main__":
    main()
