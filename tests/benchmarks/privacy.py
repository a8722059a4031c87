"""Learning under a promise to every patient: none, naive and tuned DP-SGD, and the adaptive one, at epsilon 8 and 3.

    OMP_NUM_THREADS=1 python tests/benchmarks/privacy.py DATA -o OUT [--federation dermoscopy] [--part arms]

Runs, folders and scores as in algorithms.py: several processes share the work, and `--table` prints what is known. All
arms hold out the same fifth of a site's patients (splits.json in the prepared data), whatever their mechanism; the
ledgers are those of simulations. The noise is calibrated for `epsilon` at DELTA, at every site, for all steps.

* none: the tuned arm's network and steps with ordinary training, its batch the expected patients times patches.
* open: the open plan of algorithms.py, without privacy, for reference.
* naive: that plan's network, steps and learning rate; one patch of each drawn patient, as many patients as its batch
  has, C = 1, no average over rounds, and the plan's clip of 12 on the noised sum.
* tuned: a narrow network, more patients a step, two patches each, normalised clip, an average over rounds.
* adp: the same with the adaptive clip and a noise schedule. Its clip is normalised, too, so that all else is the same.

`--part trials` are the trainings by which settings were chosen. They are scored on held-out patients alone, those of
another federation than the settings are for. Of the arms a snapshot every tenth of the rounds is scored on held-out
patients for the rounds to 95 % of the final Dice; nothing is chosen by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _federations import (
    HELD_OUT,
    Bench,
    Experiment,
    Result,
    apart,
    bench,
    markdown,
    parser,
    points,
    score,
    spread,
    test_set,
    unet,
)
from torch.nn import functional

from autofed import api, plans
from autofed.data import CaseFiles, Dataset, find_images
from autofed.data.splits import nnunet_split
from autofed.federation import checkpoints
from autofed.federation.run_folder import GLOBAL, Run
from autofed.files import read_json, write_json
from autofed.inference.predictor import Member, Predictor
from autofed.inference.validation import case_dice
from autofed.messages import save_groups
from autofed.preprocessing import open_store, preprocess_case
from autofed.training.devices import pick_device
from autofed.training.network import build, weights_of

DELTA = 1e-4
EPSILONS = (8, 3)
SEEDS = {"dermoscopy": 3, "breast-ultrasound": 1, "hippocampus": 1}
"""Of the open plan one seed each."""

ARMS = ("none", "open", "naive", "tuned", "adp")
PARTS = ("arms", "ablation", "trials")
PUBLIC_STEPS, PUBLIC_BATCH, PUBLIC_RATE = 400, 16, 2e-3
SNAPSHOTS = 10
"""So many models of a training are scored."""

NAIVE_RATE = {"dermoscopy": 0.018, "breast-ultrasound": 0.033, "hippocampus": 0.072}
"""Two patients of a site in a step, on average: the ordinary batch."""

NARROW = {2: {**unet(2, (4, 8, 16, 32)), "deep_supervision": False}, 3: unet(3, (4, 8, 16, 32))}
LENGTH: dict[str, dict[str, Any]] = {
    "dermoscopy": {"training.rounds": 20, "steps_per_round": 10, "privacy.sampling_rate": 0.06},
    "breast-ultrasound": {"training.rounds": 25, "steps_per_round": 12, "privacy.sampling_rate": 0.1},
    "hippocampus": {"training.rounds": 20, "steps_per_round": 16, "privacy.sampling_rate": 0.1},
}
"""Chosen by the clock, some 100 s of training on a processor, before any score was known.

But for hippocampus, where a network of one stage less and 200 steps left two structures as one even without privacy.
"""

RECIPE = {"keep_momentum": True, "local.training.momentum": 0.9, "gradient_clip": 1e6}
RATES = {"dermoscopy": 0.02, "breast-ultrasound": 0.06, "hippocampus": 0.06}
"""Of the narrow private arms: the first by breast-ultrasound's held-out patients, the others by dermoscopy's."""

DP_SGD = {
    "privacy.mechanism": "dp-sgd", "privacy.patches_per_patient": 2, "privacy.clip": 1.0,
    "privacy.clipping": "normalised", "training.ema": 0.8, **RECIPE,
}  # fmt: skip
ADP = {
    **DP_SGD, "privacy.mechanism": "adp", "privacy.quantile": 0.5,
    "privacy.quantile_share": 0.05, "privacy.clip_rate": 0.5, "privacy.noise_ratio": 0.7,
}  # fmt: skip


def main() -> None:
    """Run what is missing, then print the tables."""
    told = parser(__doc__, SEEDS)
    told.add_argument("--part", action="append", choices=PARTS, help="what to run and print; may be repeated")
    told.add_argument("--only", action="append", help="the runs whose names hold this; may be repeated")
    args = told.parse_args()
    work = Private(**vars(bench(args)))
    federations, parts = args.federation or list(SEEDS), args.part or PARTS
    found = [
        run for run in wanted(federations, parts)
        if (not args.seed or run.seed in args.seed) and (not args.only or any(part in run.name for part in args.only))
    ]  # fmt: skip
    failed = 0 if args.table else work.perform(found)
    for federation in federations:
        print(table(work, federation, parts), flush=True)
    raise SystemExit(1 if failed else 0)


def wanted(federations: Sequence[str], parts: Sequence[str]) -> Iterator[Experiment]:
    """The runs, the first seed of everything first."""
    for federation in federations if "trials" in parts else ():
        yield from trials(federation)
    every = [run for federation in federations for found in arms(federation).values() for run in found]
    for seed in range(max(SEEDS.values())):
        yield from (run for run in every if run.seed == seed and "arms" in parts)
        if not seed and "ablation" in parts and "dermoscopy" in federations:
            yield from ablation().values()


def arms(federation: str) -> dict[tuple[str, int | None], list[Experiment]]:
    """By arm and epsilon, a run for every seed."""
    found = {}
    for arm in ARMS:
        for epsilon in (None,) if arm in ("none", "open") else EPSILONS:
            label = f"{arm}-{epsilon}" if epsilon else arm
            found[arm, epsilon] = [
                Experiment(federation, seed=seed, label=label, settings=settings(federation, arm, epsilon))
                for seed in range(1 if arm == "open" else SEEDS[federation])
            ]
    return found


def settings(federation: str, arm: str, epsilon: float | None = None) -> dict[str, Any]:
    """What an arm changes in the plan of the federation."""
    axes = 3 if federation == "hippocampus" else 2
    if arm == "open":
        return {"keep_momentum": True}
    if arm == "naive":
        naive = {"privacy.mechanism": "dp-sgd", "privacy.sampling_rate": NAIVE_RATE[federation], "training.ema": 0.0,
                 "privacy.patches_per_patient": 1, "privacy.clip": 1.0, "privacy.clipping": "flat",
                 "gradient_clip": 12.0}  # fmt: skip
        return {**naive, **_promise(epsilon)}
    length = {**NARROW[axes], **LENGTH[federation]}
    if arm == "none":
        rate = length.pop("privacy.sampling_rate")
        return {**length, "keep_momentum": True, "batch_size": round(2 * rate * _MEAN_PATIENTS[federation])}
    recipe = {**(ADP if arm == "adp" else DP_SGD), "learning_rate": RATES[federation]}
    return {**length, **recipe, **_promise(epsilon)}


_MEAN_PATIENTS = {"dermoscopy": 112, "breast-ultrasound": 61, "hippocampus": 28}
"""Of a site in training."""


def _promise(epsilon: float | None) -> dict[str, Any]:
    return {"privacy.epsilon": float(epsilon or 0), "privacy.delta": DELTA}


def trials(federation: str) -> list[Experiment]:
    """Short trainings by which settings were chosen, epsilon 8."""
    tuned, changes = settings(federation, "tuned", 8), TRIALS.get(federation, {})
    return [
        Experiment(federation, label=f"try-{name}", settings={**tuned, **change}) for name, change in changes.items()
    ]


TRIALS: dict[str, dict[str, dict[str, Any]]] = {
    federation: {f"rate{rate:g}".replace("0.", "."): {"learning_rate": rate} for rate in (0.02, 0.06)}
    for federation in ("breast-ultrasound", "dermoscopy")
}


def ablation() -> dict[str, Experiment]:
    """Tuned on dermoscopy at epsilon 8, each with one thing changed."""
    base = settings("dermoscopy", "tuned", 8)
    rounds = base["training.rounds"]
    changes: dict[str, dict[str, Any]] = {
        "half the width": unet(2, (2, 4, 8, 16)),
        "double width": unet(2, (8, 16, 32, 64)),
        "half the steps": {"training.rounds": rounds // 2},
        "a quarter of the steps": {"training.rounds": rounds // 4},
        "one patch": {"privacy.patches_per_patient": 1},
        "flat clip": {"privacy.clipping": "flat"},
        "five times the rate": {"learning_rate": 5 * RATES["dermoscopy"]},
        "public start": {},
        "public start, that rate": {"learning_rate": 5 * RATES["dermoscopy"]},
        "adaptive flat clip": {**ADP, "privacy.clipping": "flat"},
    }
    return {
        name: Experiment("dermoscopy", label=name.replace(",", "").replace(" ", "-"), settings={**base, **change})
        for name, change in changes.items()
    }


# --- one run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Private(Bench):
    """Runs that hold out the same patients whatever their mechanism, and score so many `rounds` of theirs."""

    rounds: int = SNAPSHOTS

    def prepare(self, federation: str) -> plans.Plan:
        """As ever; and every site says itself which fifth it holds out."""
        made, work = super().prepare(federation), self.out / federation / "work"
        for site in made.agreement.patients:
            path = work / site / "splits.json"
            if not path.is_file():
                write_json(path, [_as_cases(open_store(work, site, made.local).patients)])
        return made

    def plan_of(self, experiment: Experiment) -> plans.Plan:
        """The plan with what is the experiment's own, and the noise that its promise needs."""
        chosen = {"training.seed": experiment.seed, **experiment.settings}
        made = self.prepare(experiment.federation)
        rounds = chosen.get("training.rounds", made.agreement.training.rounds)
        chosen["training.snapshots"] = sorted(
            {max(1, round(rounds * (i + 1) / self.rounds)) for i in range(self.rounds)}
        )
        return api.change(made, None, chosen)

    def start(self, experiment: Experiment, made: plans.Plan) -> Path | None:
        """Weights from public pictures, where the experiment is about them."""
        if not experiment.label.startswith("public-start") or (self.folder(experiment) / "run" / "run.json").is_file():
            return None
        return public_start(self, experiment, made)

    def _score(self, experiment: Experiment, run: Run, made: plans.Plan) -> dict[str, Any]:
        plain = made.change({"inference.mirror_axes": []})
        curve = {}
        for member in run.members(GLOBAL, [self.fold(experiment.federation)]):
            dice = self._held_out(experiment, run, member.read(), plain)
            if means := [np.mean(list(cases.values())) for cases in dice if cases]:
                curve[member.name.rsplit(" ", 1)[-1]] = float(np.mean(means))
        found = {"test": {}, "held_out": {}} if "try" in experiment.label else super()._score(experiment, run, made)
        if experiment.label.startswith("tuned"):
            found["unaveraged"] = self._unaveraged(experiment, run, made)
        return {**found, "curve": curve, "privacy": made.agreement.privacy.model_dump()}

    def _unaveraged(self, experiment: Experiment, run: Run, made: plans.Plan) -> dict[str, Any]:
        """The scores on the test set of the last round's own weights: the very same training without the average."""
        folder = run.fold_folder(self.fold(experiment.federation))
        weights = checkpoints.load(folder, made.agreement.training.rounds).shared["weights"]
        predictor = Predictor([Member("last", made, lambda: weights)], device=pick_device(self.device), mirroring=False)
        test = test_set(self.data / experiment.federation / "test", made)
        return {GLOBAL: score(predictor, test, test.cases)}

    def _held_out(self, experiment: Experiment, run: Run, weights: Any, made: plans.Plan) -> list[dict[str, float]]:
        """Dice by held-out case on the plan's grid, site by site."""
        work, found = self.out / experiment.federation / "work", []
        for site in made.agreement.patients:
            held = read_json(run.site_folder(site, self.fold(experiment.federation)) / "split.json")["validation"]
            dice = case_dice(weights, open_store(work, site, made.local).only(held), made)
            means = {case: table[:, 0] for case, table in dice.items() if not np.isnan(table[:, 0]).all()}
            found.append({case: float(np.nanmean(row)) for case, row in means.items()})
        return found


def _as_cases(patients: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """nnU-Net's fold 0 of a site, as its splits.json has it."""
    parted = nnunet_split(list(patients), int(HELD_OUT))
    return {
        "train": [case for patient in parted.train for case in patients[patient]],
        "val": [case for patient in parted.validation for case in patients[patient]],
    }


def public_start(work: Bench, experiment: Experiment, made: plans.Plan) -> Path:
    """A file with weights from the public pictures of an experiment's federation, in its folder."""
    path = work.folder(experiment) / "public.safetensors"
    if not path.is_file():
        pictures = work.data / experiment.federation / "public" / "imagesTr"
        save_groups(path, {"weights": from_public(made, pictures)})
    return path


def from_public(made: plans.Plan, pictures: Path) -> dict[str, np.ndarray]:
    """Weights that can restore pictures nobody labelled: with noise on them and squares missing.

    The network of the plan with a head for the channels instead; its own head is left as it begins.
    """
    images = torch.from_numpy(np.concatenate(list(_prepared(made, pictures))))
    network = build(made.local.network.model_copy(update={"classes": images.shape[1]}), seed=0).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=PUBLIC_RATE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(PUBLIC_STEPS):
        whole = images[torch.randint(len(images), (PUBLIC_BATCH,), generator=generator)]
        loss = functional.mse_loss(network(_spoiled(whole, generator))[0], whole)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    learned = weights_of(network)
    return {
        name: learned[name] if learned[name].shape == own.shape else own
        for name, own in weights_of(build(made.local.network, seed=0)).items()
    }


def _prepared(made: plans.Plan, pictures: Path) -> Iterator[np.ndarray]:
    """Each picture (1, C, height, width) on the plan's grid, its middle where it is larger than a patch."""
    agreement = made.agreement
    cases = {
        name: CaseFiles(files.images, None) for name, files in find_images(pictures, len(agreement.channels)).items()
    }
    dataset = Dataset(pictures, agreement.channels, agreement.labels, cases)
    for name in cases:
        image = preprocess_case(dataset.read(name), made.local.geometry, made.local.intensity).image[None, :, 0]
        for axis, size in enumerate(made.local.training.patch_size, start=2):
            missing, spare = max(0, size - image.shape[axis]), max(0, image.shape[axis] - size)
            widths = [(missing // 2, missing - missing // 2) if i == axis else (0, 0) for i in range(4)]
            image = np.pad(image, widths).take(range(spare // 2, spare // 2 + size), axis)
        yield image.astype(np.float32)


def _spoiled(whole: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise everywhere, and half of the squares of 8 x 8 set to 0."""
    shape = (len(whole), 1, whole.shape[2] // 8, whole.shape[3] // 8)
    kept = (torch.rand(shape, generator=generator) > 0.5).float()
    kept = kept.repeat_interleave(8, 2).repeat_interleave(8, 3)
    return (whole + 0.3 * torch.randn(whole.shape, generator=generator)) * kept


# --- tables ----------------------------------------------------------------------------------------------------------


def table(work: Private, federation: str, parts: Sequence[str]) -> str:
    """One federation as Markdown."""
    known = {key: work.results(runs) for key, runs in arms(federation).items()}
    known = {key: found for key, found in known.items() if found}
    lines = [f"### {federation}", ""]
    if "arms" in parts and known:
        every = [result for found in known.values() for result in found]
        lines += [
            f"delta {DELTA:g} at every site. {said(federation)} {stamp(every)}",
            "",
            of_arms(known),
            *verdicts(known),
        ]
    if "ablation" in parts and federation == "dermoscopy":
        lines += [of_ablation(work, known.get(("tuned", 8), []))]
    if "trials" in parts:
        lines += [of_trials(work, federation)]
    return "\n".join(lines)


def said(federation: str) -> str:
    """How long the tuned arms train, and with how many patients a step."""
    length = LENGTH[federation]
    rate = length["privacy.sampling_rate"]
    return f"Narrow arms: {length['training.rounds']} rounds of {length['steps_per_round']} steps, q {rate:g}."


def stamp(results: Sequence[Result]) -> str:
    """Where and when."""
    found = {
        "{machine}, {threads} threads, {precision}; {date}; {commit}".format(**r.content["about"]) for r in results
    }
    return " / ".join(sorted(found)) + "."


Known = Mapping[tuple[str, int | None], list[Result]]


def of_arms(known: Known) -> str:
    """A row for every arm and epsilon."""
    head = ("arm", "epsilon", "seeds", "noise multiplier", "Dice, test", "HD95, test", "Dice, held out",
            "rounds to 95 %", "beside none, points (95 %)", "of the gap won back, %",
            "beside tuned, points (95 %)")  # fmt: skip
    rows = []
    for (arm, epsilon), found in known.items():
        noise = found[0].content["privacy"]["noise_multiplier"]
        beside = [
            points(apart(found, known.get((other, of), []))) if known.get((other, of)) and arm in whose else ""
            for other, of, whose in (("none", None, ARMS[1:]), ("tuned", epsilon, ("adp", "naive")))
        ]
        rows.append((
            arm, str(epsilon or "-"), str(len(found)), f"{noise:.3g}" if noise else "-",
            spread([r.dice("test") for r in found]), f"{np.mean([r.hd95('test') for r in found]):.1f}",
            spread([r.dice("held_out") for r in found]), soon(found), beside[0], won_back(known, arm, epsilon),
            beside[1],
        ))  # fmt: skip
    return markdown(head, rows)


def soon(found: Sequence[Result]) -> str:
    """The first scored round at 95 % of the last one's Dice, the mean over seeds; nothing if that is next to 0."""
    reached = []
    for result in found:
        curve = {int(round): dice for round, dice in result.content["curve"].items()}
        if curve[max(curve)] < 0.05:
            return "-"
        reached.append(min(r for r, dice in curve.items() if dice >= 0.95 * curve[max(curve)]) / max(curve))
    last = max(map(int, found[0].content["curve"]))
    return f"{np.mean(reached) * last:.0f} of {last}"


def won_back(known: Known, arm: str, epsilon: int | None) -> str:
    """The share of the gap between naive and none."""
    if arm not in ("tuned", "adp") or not {("none", None), ("naive", epsilon)} <= set(known):
        return ""
    none, naive, ours = (
        {r.seed: r.dice("test") for r in known[key]} for key in (("none", None), ("naive", epsilon), (arm, epsilon))
    )
    seeds = sorted(set(none) & set(naive) & set(ours))
    top, bottom, here = (float(np.mean([found[seed] for seed in seeds])) for found in (none, naive, ours))
    return f"{100 * (here - bottom) / (top - bottom):.0f}"


def verdicts(known: Known) -> Iterator[str]:
    """Whether the adaptive one is not below the tuned one, and sooner at 95 %."""
    for epsilon in EPSILONS:
        ours, theirs = known.get(("adp", epsilon), []), known.get(("tuned", epsilon), [])
        if ours and theirs:
            difference = apart(ours, theirs)
            below = "NO" if difference[-1] < 0 else "yes"
            yield (f"* epsilon {epsilon}: adp beside tuned {points(difference)}; not below (the interval reaches 0): "
                   f"{below}; to 95 % of the final Dice {soon(ours)} rounds, tuned {soon(theirs)}")  # fmt: skip
    yield ""


def of_ablation(work: Private, tuned: Sequence[Result]) -> str:
    """Tuned at epsilon 8, and what one change makes of the same seed."""
    first = [result for result in tuned if result.seed == 0]
    rows = [(name, found) for name, run in ablation().items() if (found := work.result(run))]
    rows = [
        *(("tuned", result) for result in first),
        *(("no average", Result({**result.content, "test": result.content["unaveraged"]})) for result in first),
        *rows,
    ]
    head = ("tuned, but", "noise multiplier", "Dice, test", "HD95, test", "Dice, held out", "change, points (95 %)")
    return markdown(head, [
        (name, f"{found.content['privacy']['noise_multiplier']:.3g}", f"{found.dice('test'):.4f}",
         f"{found.hd95('test'):.1f}", f"{found.dice('held_out'):.4f}" if name != "no average" else "",
         points(apart([found], first)) if name != "tuned" else "")
        for name, found in rows
    ])  # fmt: skip


def of_trials(work: Private, federation: str) -> str:
    """What was tried, and its Dice on the held-out patients."""
    rows = []
    for run in trials(federation):
        if result := work.result(run):
            curve = result.content["curve"]
            rows.append((run.label.removeprefix("try-"), f"{curve[max(curve, key=int)]:.4f}"))
    return markdown(("trial, epsilon 8", "Dice, held out"), rows)


if __name__ == "__main__":
    main()
