"""The shape of the house, read from its imports: docs/architecture.md as a test.

Each check is a function of a root folder that holds a package `autofed` and returns its findings, so that the tests at
the end can hand it a small bad house and see that it is found out.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent

# Imports go down a floor, or to an earlier room of the same floor. A package is one room, free inside; only federation
# has an order of its own within.
FLOORS = (
    ("problems", "files", "parallel", "images", "labels", "case", "plans", "wire", "exchange"),
    (
        "fingerprints",
        "census",
        "privacy",
        "prepared",
        "splits",
        "batches",
        "devices",
        "attention",
        "network",
        "loss",
    ),
    (
        "uncertainty",
        "postprocessing",
        "solver",
        "fit",
        "inversion",
        "canaries",
        "speed",
        "inference",
        "validation",
        "pseudo",
        "scores",
    ),
    ("algorithms", "planner"),
    (
        "federation.selection",
        "federation.labelling",
        "federation.answers",
        "federation.deltas",
        "federation.site",
        "federation.premises",
        "federation.states",
        "federation.metrics",
        "federation.server",
        "federation.aggregation_rules",
        "federation.aggregation",
        "federation.acceptance",
        "federation.rounds",
        "federation.inprocess",
        "federation.flower",
        "federation",
    ),
    ("runs", "predictions", "verbs"),
    ("report", "demo", "cli"),
)
ALGORITHMS = sorted(path.stem for path in (HOUSE / "autofed" / "algorithms").glob("[!_]*.py"))
ORDER = tuple(room for floor in FLOORS for room in floor)

HEAVY = ("torch", "monai", "numpy", "scipy", "SimpleITK", "nibabel", "pydantic", "matplotlib", "flwr", "dp_accounting")

# What a room must do without, whatever its floor would allow.
WITHOUT = {
    "plans": ("torch", "monai"),
    "fingerprints": ("torch", "monai"),
    "census": ("torch", "monai"),
    "planner": ("torch", "monai"),
    "algorithms": ("torch", "monai"),
    "privacy": ("autofed.data.images", "autofed.data"),
}
PICKLERS = ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
JUNK_ROOMS = ("utils", "util", "common", "helpers", "helper", "misc")
SPEAKERS = ("cli", "demo")
"""Only these may print."""
SETS_ENVIRONMENT = "cli"
"""Only the command line may touch the environment: torch's threads take their manner of waiting from nowhere else."""


@dataclass(frozen=True)
class Module:
    """One file of the package: its dotted name below autofed ("" for autofed itself) and its syntax tree."""

    name: str
    file: str
    tree: ast.Module
    is_package: bool

    @property
    def room(self) -> str | None:
        """The listed room it belongs to, or None."""
        return room_of(self.name)

    def at(self, node: ast.AST) -> str:
        return f"{self.file}:{getattr(node, 'lineno', 0)}"


def room_of(name: str) -> str | None:
    """The listed room of a dotted name below autofed: federation.site, but privacy for privacy.dpsgd."""
    first, second, *_ = [*name.split("."), "", ""]
    listed = [room for room in (f"{first}.{second}", first) if room in ORDER]
    return listed[0] if listed else None


@cache
def modules(root: Path) -> tuple[Module, ...]:
    found = []
    for path in sorted((root / "autofed").rglob("*.py")):
        parts = path.relative_to(root / "autofed").with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        file = str(path.relative_to(root))
        found.append(Module(name, file, ast.parse(path.read_text(encoding="utf-8"), file), is_package))
    return tuple(found)


def imports(module: Module) -> Iterator[tuple[ast.AST, str]]:
    """Every imported name in full: `from autofed import images` gives autofed.data.images, `import os.path` os.path."""
    here = ["autofed", *filter(None, module.name.split("."))]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            climb = node.level - module.is_package
            base = here[: len(here) - climb] if node.level else []
            origin = ".".join([*base, *filter(None, (node.module or "").split("."))])
            yield from ((node, f"{origin}.{alias.name}") for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def check_floors(root: Path) -> list[str]:
    """Imports only go down; autofed/__init__ hands on the verbs lazily and is exempt."""
    problems = []
    for module in modules(root):
        for node, name in imports(module):
            target = room_of(name.removeprefix("autofed.")) if name.startswith("autofed.") else None
            if module.room and target and ORDER.index(target) > ORDER.index(module.room):
                problems.append(f"{module.at(node)}: {module.room} may not import {target}, which comes after it")
    return problems


def check_rooms(root: Path) -> list[str]:
    """Every file belongs to a room on the map; in federation, which has an order within, every file is one."""
    return [
        f"{m.file}: no such room; add it to docs/architecture.md and to FLOORS in tests/test_architecture.py"
        for m in modules(root)
        if m.name and (m.room is None or (m.room == "federation" and m.name != "federation"))
    ]


def check_names(root: Path) -> list[str]:
    """What two rooms need belongs to the lower of them."""
    return [f"{m.file}: no module is called that" for m in modules(root) if m.name.split(".")[-1] in JUNK_ROOMS]


def check_forbidden_imports(root: Path) -> list[str]:
    """Flower in one room; rooms that do without torch or without images; nothing that unpickles."""
    problems = []
    for module in modules(root):
        for node, name in imports(module):
            if within(name, "flwr") and module.room != "federation.flower":
                problems.append(f"{module.at(node)}: only federation/flower imports Flower")
            if name.split(".")[0] in PICKLERS:
                problems.append(f"{module.at(node)}: nothing is ever unpickled, so {name} is not imported")
            for package in WITHOUT.get(module.room or "", ()):
                if within(name, package):
                    problems.append(f"{module.at(node)}: {module.room} does without {package}")
    return problems


def check_calls(root: Path) -> list[str]:
    """No pickles by another door, no environment variables, no prints outside the command line."""
    problems = []
    for module in modules(root):
        for node, name in [*imports(module), *_dotted(module)]:
            if name in ("torch.load", "torch.save", "allow_pickle"):
                problems.append(f"{module.at(node)}: {name}: never pickle; see load_groups and save_groups in exchange")
            if name in ("os.environ", "os.environb", "os.getenv", "os.putenv") and module.name != SETS_ENVIRONMENT:
                problems.append(f"{module.at(node)}: {name}: no environment variables; settings are arguments")
            if name in ("print", "rich.print") and module.room not in SPEAKERS:
                problems.append(f"{module.at(node)}: the library does not print; report progress through a callback")
    return problems


def _dotted(module: Module) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node, node.func.id
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield node.value, "allow_pickle"


def check_light(root: Path, name: str, heavy: tuple[str, ...]) -> list[str]:
    """Importing the module, in a process of its own, loads none of the heavy libraries."""
    script = f"import sys, json, {name}; print(json.dumps(sorted(set(sys.modules) & set({list(heavy)!r}))))"
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        return [f"importing {name} fails: {done.stderr.strip().splitlines()[-1]}"]
    return [f"importing {name} loads {library}" for library in json.loads(done.stdout)]


CHECKS: tuple[Callable[[Path], list[str]], ...] = (
    check_floors,
    check_rooms,
    check_names,
    check_forbidden_imports,
    check_calls,
)


@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
def test_the_house_stands(check):
    findings = check(HOUSE)
    assert not findings, "\n" + "\n".join(findings)


@pytest.mark.parametrize(
    ("name", "heavy"),
    [
        ("autofed", HEAVY),
        ("autofed.cli", HEAVY),
        ("autofed.plans", ("torch", "monai")),
        ("autofed.api.planning", ("torch", "monai", "scipy")),
        ("autofed.api.preprocessing", ("torch", "monai", "scipy")),
        ("autofed.planner", ("torch",)),
        ("autofed.algorithms", ("torch", "monai", "scipy")),
        *((f"autofed.algorithms.{name}", ("torch", "monai", "scipy")) for name in ALGORITHMS),
        ("autofed.training.batches", ("torch", "monai")),
    ],
)
def test_a_light_module_loads_nothing_heavy(name, heavy):
    assert check_light(HOUSE, name, heavy) == []


# The checks themselves: each bad house below is found out, and each good one is let through.


@pytest.fixture
def house(tmp_path):
    """Build a small autofed from {file: text}."""

    def build(files: dict[str, str]) -> Path:
        for name, text in {"__init__.py": "", **files}.items():
            path = tmp_path / "autofed" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return build


BAD = [
    (check_floors, "fit.py", "from autofed.api import train", "fit may not import verbs"),
    (check_floors, "fit.py", "from autofed import inference", "fit may not import inference"),
    (check_floors, "fit.py", "import autofed.algorithms.fedavg", "fit may not import algorithms"),
    (check_floors, "fit.py", "from . import verbs", "fit may not import verbs"),
    (check_floors, "fit.py", "def f():\n    import autofed.federation.rounds", "may not import federation.rounds"),
    (check_floors, "fit.py", "if TYPE_CHECKING:\n    from autofed.cli import main", "fit may not import cli"),
    (check_floors, "images/volumes.py", "from autofed.data import Case", "images may not import case"),
    (check_floors, "images/__init__.py", "from ..case import Case", "images may not import case"),
    (check_floors, "privacy/dpsgd.py", "from ..fit import train", "privacy may not import fit"),
    (check_floors, "federation/site.py", "import autofed.federation.rounds", "site may not import federation.rounds"),
    (check_floors, "federation/site.py", "from autofed.federation import flower", "may not import federation.flower"),
    (check_floors, "algorithms/fedavg.py", "import autofed.federation.site", "may not import federation.site"),
    (check_floors, "verbs.py", "from autofed.api.demo import run", "verbs may not import demo"),
    (check_floors, "algorithms/fedavg.py", "from autofed.federation import Site", "may not import federation,"),
    (check_rooms, "tools.py", "", "add it to docs/architecture.md"),
    (check_rooms, "federation/post.py", "", "add it to docs/architecture.md"),
    (check_rooms, "shed/spade.py", "", "add it to docs/architecture.md"),
    (check_names, "images/utils.py", "", "no module is called that"),
    (check_names, "helpers/__init__.py", "", "no module is called that"),
    (check_forbidden_imports, "federation/rounds.py", "import flwr", "only federation/flower"),
    (check_forbidden_imports, "cli.py", "def f():\n    from flwr.app import Message", "only federation/flower"),
    (check_forbidden_imports, "planner.py", "def f():\n    import torch.nn", "planner does without torch"),
    (check_forbidden_imports, "plans.py", "from monai.networks import nets", "plans does without monai"),
    (check_forbidden_imports, "privacy/dpsgd.py", "from autofed import images", "does without autofed.data.images"),
    (check_forbidden_imports, "files.py", "import pickle", "nothing is ever unpickled"),
    (check_forbidden_imports, "files.py", "from pickle import loads", "nothing is ever unpickled"),
    (check_calls, "network.py", "import torch\ntorch.load('x')", "torch.load: never pickle"),
    (check_calls, "network.py", "from torch import load", "torch.load: never pickle"),
    (check_calls, "prepared.py", "np.load('x', allow_pickle=True)", "allow_pickle: never pickle"),
    (check_calls, "files.py", "import os\nhome = os.environ['HOME']", "no environment variables"),
    (check_calls, "files.py", "from os import getenv", "no environment variables"),
    (check_calls, "fit.py", "def f():\n    print(1)", "the library does not print"),
    (check_calls, "fit.py", "from rich import print", "the library does not print"),
]


@pytest.mark.parametrize(("check", "file", "text", "said"), BAD, ids=[f"{row[0].__name__}-{row[1]}" for row in BAD])
def test_a_bad_house_is_found_out(house, check, file, text, said):
    findings = check(house({file: text}))
    assert len(findings) == 1, findings
    assert said in findings[0]
    assert findings[0].startswith(f"autofed/{file}")


def test_a_good_house_is_let_through(house):
    root = house(
        {
            "__init__.py": "if TYPE_CHECKING:\n    from autofed.api import train\n",
            "problems.py": "import os\nos.replace('a', 'b')",
            "images/__init__.py": "from autofed.data.images import volumes\nfrom autofed.errors import Problems",
            "images/volumes.py": "from autofed import images\nfrom . import geometry",
            "images/geometry.py": "",
            "planner.py": "from autofed import __version__, plans\nfrom autofed.fingerprints.exact import Fingerprint",
            "prepared.py": "np.load('x', allow_pickle=False)",
            "inference.py": "import torch\nfrom autofed import uncertainty",
            "federation/__init__.py": "",
            "federation/rounds.py": "from autofed.federation import site\nfrom autofed.algorithms.fedavg import merge",
            "federation/flower.py": "import flwr\nfrom autofed.federation import inprocess",
            "cli.py": "from autofed import demo\nprint(1)",
        }
    )
    assert [finding for check in CHECKS for finding in check(root)] == []


def test_a_heavy_import_is_found_out(house):
    root = house({"cli.py": "from autofed import files", "files.py": "import numpy"})
    assert check_light(root, "autofed.cli", HEAVY) == ["importing autofed.cli loads numpy"]
    assert check_light(root, "autofed", HEAVY) == []
    assert "No module named 'autofed.api'" in check_light(root, "autofed.api", HEAVY)[0]
