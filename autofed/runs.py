"""A run on disk: its plan, its identity, its rounds, and the models that can be taken from it.

RUN/{plan.json, run.json, fold_all/{metrics.jsonl, round_<r>/}, sites/<site>/{site.log, memory/, releases/}}
"""

from __future__ import annotations

import uuid
from pathlib import Path

from pydantic import Field

from autofed import plans
from autofed.exchange import Arrays, ServerState, load_groups
from autofed.federation.rounds import save_state, saved_rounds, shared_path
from autofed.files import Record, is_part
from autofed.inference import Member
from autofed.plans import Plan
from autofed.problems import Problems, refuse

GLOBAL = "global"


_BEGINNING = ("plan.json", "fold_all")


class Identity(Record):
    """Names a run: `id` goes into every request, so that a site knows a question it has answered before."""

    id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    sites: tuple[str, ...]


class Run:
    """The folder of a run."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    @property
    def rounds_folder(self) -> Path:
        """Where the states and the metrics are (training on all cases)."""
        return self.folder / "fold_all"

    def site_folder(self, site: str) -> Path:
        """What belongs to a site in this run."""
        return self.folder / "sites" / site

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.folder / "run.json").is_file()

    def refuse_foreign(self) -> None:
        """`Problems` if the folder holds anything but what a run that was cut off at its very beginning may leave."""
        found = [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []
        foreign = sorted(name for name in found if name not in _BEGINNING and not is_part(name))
        refuse(str(self.folder), ["it holds no run but other files; give another folder"] if foreign else [])

    def begin(self, plan: Plan, identity: Identity, state: ServerState) -> None:
        """Write plan and first state, then the identity: from then on the folder is a run."""
        plan.save(self.folder / "plan.json")
        save_state(self.rounds_folder, state, plan)
        identity.save(self.folder / "run.json")

    def identity(self) -> Identity:
        """Who this run is; `Problems` if the folder is no run."""
        if not self.exists:
            raise Problems(str(self.folder), ["this is not a run; make one with `autofed train plan.json WORK -o RUN`"])
        return Identity.load(self.folder / "run.json")

    def plan(self) -> Plan:
        """The plan that the run follows."""
        self.identity()
        return plans.load(self.folder / "plan.json")

    def models(self) -> list[str]:
        """The models that can be predicted with: "global" if there is a common one, and sites with one of their own."""
        rounds = self._trained_rounds()
        common = [GLOBAL] if rounds and "weights" in load_groups(shared_path(self.rounds_folder, rounds[-1]))[0] else []
        own = sorted(p.parent.name for p in self.folder.glob("sites/*/memory") if any(p.iterdir()))
        return common + own

    def members(self, model: str | None) -> list[Member]:
        """The ensemble of a model: its snapshots, or the last round if the run has not come that far.

        Without a name the common model is taken. `Problems` lists the models there are.
        """
        plan, there = self.plan(), self.models()
        wanted = model or GLOBAL
        if wanted not in there:
            found = ", ".join(there) or "none yet: no round has finished"
            raise Problems(str(self.folder), [f"there is no model {wanted!r}; choose --model from: {found}"])
        files = self._files(wanted)
        chosen = [r for r in plan.agreement.training.snapshots if r in files] or [max(files)]
        return [Member(f"{self.folder.name}/{wanted} round {r}", plan, _Reader(files[r])) for r in chosen]

    def _files(self, model: str) -> dict[int, Path]:
        if model == GLOBAL:
            return {r: shared_path(self.rounds_folder, r) for r in self._trained_rounds()}
        found = (self.site_folder(model) / "memory").glob("round_*.safetensors")
        return {int(p.stem.removeprefix("round_")): p for p in found}

    def _trained_rounds(self) -> list[int]:
        """The saved rounds but the 0th, which is the state before any training."""
        return [r for r in saved_rounds(self.rounds_folder) if r > 0]


class _Reader:
    """Reads weights when they are needed, so that an ensemble is never in memory as a whole."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self) -> Arrays:
        groups, _ = load_groups(self.path)
        if "weights" not in groups:
            raise Problems(str(self.path), ["there are no weights in this file"])
        return groups["weights"]


def read_weights(source: Path) -> Arrays:
    """Weights to start from: of a run's last round, or of a safetensors file that a run wrote."""
    source = Path(source)
    if source.is_file():
        return _Reader(source)()
    return Run(source).members(None)[-1].read()
