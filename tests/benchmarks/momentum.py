"""What becomes of a site's momentum between rounds: begun anew or kept, with .9 and with .99, under fedavg.

    OMP_NUM_THREADS=1 python tests/benchmarks/momentum.py DATA -o OUT [--federation hippocampus] [--quick | --full]

Runs, folders and scores as in algorithms.py; with the same OUT its fedavg runs are the ones that begin anew with .9.
Each momentum has the learning rate that plans give it: .1 with .9, and nnU-Net's .01 with .99.
"""

from __future__ import annotations

from _federations import Bench, Experiment, apart, bench, described, markdown, parser, points, spread

FEDERATIONS = ("hippocampus", "dermoscopy")
RATES = {0.9: 0.1, 0.99: 0.01}


def main() -> None:
    """Run what is missing, then print the tables."""
    args = parser(__doc__, FEDERATIONS).parse_args()
    work, federations = bench(args), args.federation or FEDERATIONS
    wanted = [run for seed in args.seed or [0] for federation in federations for run in runs(federation, seed).values()]
    failed = 0 if args.table else work.perform(wanted)
    for federation in federations:
        print(table(work, federation, args.seed or [0]), flush=True)
    raise SystemExit(1 if failed else 0)


def runs(federation: str, seed: int) -> dict[tuple[float, bool], Experiment]:
    """By momentum and whether it is kept; the plan's own choice is the plain fedavg run."""
    found = {(0.9, False): Experiment(federation, seed=seed)}
    for momentum, kept in ((0.9, True), (0.99, False), (0.99, True)):
        chosen = {"momentum": momentum, "learning_rate": RATES[momentum], "keep_momentum": kept}
        settings = {f"local.training.{name}": value for name, value in chosen.items()}
        label = f"momentum-{momentum:g}-{'kept' if kept else 'anew'}"
        found[momentum, kept] = Experiment(federation, seed=seed, label=label, settings=settings)
    return found


def table(work: Bench, federation: str, seeds: list[int]) -> str:
    """One federation as Markdown."""
    of_seed = [runs(federation, seed) for seed in seeds]
    found = {key: results for key in of_seed[0] if (results := work.results([those[key] for those in of_seed]))}
    if not found:
        return f"### {federation}\n\nNothing is finished yet.\n"
    rows = []
    for (momentum, kept), results in found.items():
        rows.append((
            f"{momentum:g}", f"{RATES[momentum]:g}", "kept" if kept else "anew", str(len(results)),
            spread([r.dice("test") for r in results]), spread([r.dice("held_out") for r in results]),
            points(apart(results, found.get((momentum, False), []))) if kept else "",
        ))  # fmt: skip
    head = ("momentum", "rate", "between rounds", "seeds", "Dice, test", "Dice, held out", "gain, points (95 %)")
    every = [result for results in found.values() for result in results]
    return "\n".join([f"### {federation}", "", described(work.plan(federation), every), markdown(head, rows)])


if __name__ == "__main__":
    main()
