"""The layers of the package, read from its imports: docs/architecture.md as a test.

Each check is a function of a root folder that holds a package `autofed` and returns its findings, so that the tests at
the end can hand it a small bad package and see that it is found out.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

# Imports go to an earlier entry only. Within an entry they are free, but in federation, which has an order of its own.
LAYERS = (
    "errors",
    "files",
    "parallel",
    "data",
    "plans",
    "messages",
    "fingerprints",
    "privacy",
    "preprocessing",
    "training",
    "inference",
    "algorithms",
    "planner",
    "federation.model_selection",
    "federation.public_labelling",
    "federation.student",
    "federation.client",
    "federation.site",
    "federation.node",
    "federation.checkpoints",
    "federation.metrics",
    "federation.server_optimiser",
    "federation.aggregation_rules",
    "federation.aggregation",
    "federation.screening",
    "federation.rounds",
    "federation.run_folder",
    "federation.communication",
    "federation.transports",
    "federation",
    "auditing",
    "report",
    "api",
    "cli",
)

MOST_ENTRIES = 20
"""More files and folders at the top of the package than these nobody takes in at a look."""
MOST_PARAMETERS = 9
MOST_LINES = 60
MOST_WITHOUT_ARGS = 5

ALGORITHMS = sorted(path.stem for path in (REPOSITORY / "autofed" / "algorithms").glob("[!_]*.py"))

HEAVY = ("torch", "monai", "numpy", "scipy", "SimpleITK", "nibabel", "pydantic", "matplotlib", "flwr", "dp_accounting")

# What a package must do without, whatever the layers would allow.
WITHOUT = {
    "plans": ("torch", "monai"),
    "fingerprints": ("torch", "monai"),
    "planner": ("torch", "monai"),
    "algorithms": ("torch", "monai"),
    "privacy": ("autofed.data",),
}
FLOWER = "federation.transports.flower"
"""Only this folder may import Flower."""
PICKLERS = ("pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
JUNK_NAMES = ("utils", "util", "common", "helpers", "helper", "misc")
MAY_PRINT = ("cli",)
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
    def layer(self) -> str | None:
        """The listed layer it belongs to, or None."""
        return layer_of(self.name)

    def at(self, node: ast.AST) -> str:
        return f"{self.file}:{getattr(node, 'lineno', 0)}"


def layer_of(name: str) -> str | None:
    """The layer of a dotted name below autofed: federation.site, but privacy for privacy.dpsgd."""
    first, second, *_ = [*name.split("."), "", ""]
    return next((layer for layer in (f"{first}.{second}", first) if layer in LAYERS), None)


@cache
def modules(root: Path) -> tuple[Module, ...]:
    files = []
    for path in sorted((root / "autofed").rglob("*.py")):
        parts = path.relative_to(root / "autofed").with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        file = str(path.relative_to(root))
        files.append(Module(name, file, ast.parse(path.read_text(encoding="utf-8"), file), is_package))
    return tuple(files)


def imports(module: Module) -> Iterator[tuple[ast.AST, str]]:
    """Every imported name in full: `from autofed import data` gives autofed.data, `import os.path` os.path."""
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


def check_layers(root: Path) -> list[str]:
    """Imports only go to earlier layers; autofed/__init__ hands on the API lazily and is exempt."""
    problems = []
    for module in modules(root):
        for node, name in imports(module):
            target = layer_of(name.removeprefix("autofed.")) if name.startswith("autofed.") else None
            if module.layer and target and LAYERS.index(target) > LAYERS.index(module.layer):
                problems.append(f"{module.at(node)}: {module.layer} may not import {target}, which comes after it")
    return problems


def check_listed(root: Path) -> list[str]:
    """Every file belongs to a layer on the map; in federation, which has an order of its own, every file is one."""
    return [
        f"{m.file}: it is in no layer; add it to docs/architecture.md and to LAYERS in tests/test_architecture.py"
        for m in modules(root)
        if m.name and (m.layer is None or (m.layer == "federation" and m.name != "federation"))
    ]


def check_cycles(root: Path) -> list[str]:
    """No two folders import each other, directly or around, at any depth of the tree."""
    known = {module.name for module in modules(root)}
    uses: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for module in modules(root):
        for _, name in imports(module):
            for folder, user, used in _siblings(module.name, _module_of(name.removeprefix("autofed."), known)):
                uses[folder][user].add(used)
    return [problem for folder, graph in uses.items() for problem in _cycle(folder, graph)]


def _module_of(name: str, known: set[str]) -> str:
    """The longest beginning of a dotted name that is a module of the package."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def _siblings(user: str, used: str) -> Iterator[tuple[str, str, str]]:
    """The folder in which the ways to two modules part, and the entries of it that the two are in.

    A package's own __init__ hands on what is in it, which is no way around.
    """
    ways = list(zip(user.split("."), used.split("."), strict=False))
    parted = next((depth for depth, (one, other) in enumerate(ways) if one != other), None)
    if user and used and parted is not None:
        yield ".".join(user.split(".")[:parted]), ways[parted][0], ways[parted][1]


def _cycle(folder: str, graph: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"autofed/{folder.replace('.', '/')}: {' imports '.join(reversed(error.args[1]))}, which is a circle"]
    return []


def check_size(root: Path) -> list[str]:
    """A folder that is taken in at a look, and functions that are read in one go."""
    top = sorted(path.name for path in (root / "autofed").iterdir() if path.name != "__pycache__")
    problems = [] if len(top) <= MOST_ENTRIES else [f"autofed: {len(top)} entries, {MOST_ENTRIES} is the most: {top}"]
    for module in modules(root):
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                problems += [f"{module.at(node)}: {node.name} {found}" for found in _too_much(node, module)]
    return problems


def _too_much(function: ast.FunctionDef | ast.AsyncFunctionDef, module: Module) -> Iterator[str]:
    count = len(_parameters(function))
    is_command = module.layer == "cli" and not function.name.startswith("_")  # its options are its parameters
    if count > MOST_PARAMETERS and not is_command:
        yield f"has {count} parameters, {MOST_PARAMETERS} is the most"
    lines = (function.end_lineno or 0) - function.lineno + 1
    if lines > MOST_LINES:
        yield f"has {lines} lines, {MOST_LINES} is the most"


def check_docstrings(root: Path) -> list[str]:
    """Public functions with many parameters say what each of them is; a command's stands in its help."""
    return [
        f"{module.at(node)}: {node.name} has more than {MOST_WITHOUT_ARGS} parameters; give its docstring Args:"
        for module in modules(root)
        if module.layer != "cli"
        for node in _public_functions(module.tree)
        if len(_parameters(node)) > MOST_WITHOUT_ARGS and "Args:" not in (ast.get_docstring(node) or "")
    ]


def _public_functions(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _public_functions(node)
        elif isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
            yield node


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = function.args
    named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in named if name not in ("self", "cls")]


def check_names(root: Path) -> list[str]:
    """What two files need belongs to the lower of them."""
    return [f"{m.file}: no module is called that" for m in modules(root) if m.name.split(".")[-1] in JUNK_NAMES]


def check_forbidden_imports(root: Path) -> list[str]:
    """Flower in one folder; packages that do without torch or without scans; nothing that unpickles."""
    problems = []
    for module in modules(root):
        for node, name in imports(module):
            if within(name, "flwr") and not within(module.name, FLOWER):
                problems.append(f"{module.at(node)}: only {FLOWER.replace('.', '/')} imports Flower")
            if name.split(".")[0] in PICKLERS:
                problems.append(f"{module.at(node)}: nothing is ever unpickled, so {name} is not imported")
            for package in WITHOUT.get(module.layer or "", ()):
                if within(name, package):
                    problems.append(f"{module.at(node)}: {module.layer} does without {package}")
    return problems


def check_calls(root: Path) -> list[str]:
    """No pickles by another way, no environment variables, no prints outside the command line."""
    problems = []
    for module in modules(root):
        for node, name in [*imports(module), *_dotted(module)]:
            if name in ("torch.load", "torch.save", "allow_pickle"):
                problems.append(f"{module.at(node)}: {name}: never pickle; see load_groups and save_groups in messages")
            if name in ("os.environ", "os.environb", "os.getenv", "os.putenv") and module.name != SETS_ENVIRONMENT:
                problems.append(f"{module.at(node)}: {name}: no environment variables; settings are arguments")
            if name in ("print", "rich.print") and module.layer not in MAY_PRINT:
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
    check_layers,
    check_listed,
    check_cycles,
    check_size,
    check_docstrings,
    check_names,
    check_forbidden_imports,
    check_calls,
)


@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
def test_the_architecture_holds(check):
    findings = check(REPOSITORY)
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
        ("autofed.algorithms", ("torch", "monai")),
        *((f"autofed.algorithms.{name}", ("torch", "monai")) for name in ALGORITHMS),
        ("autofed.training.batches", ("torch", "monai")),
        ("tests.conftest", ("torch", "monai", "scipy", "SimpleITK", "matplotlib")),
    ],
)
def test_a_light_module_loads_nothing_heavy(name, heavy):
    assert check_light(REPOSITORY, name, heavy) == []


# The checks themselves: each bad package below is found out, and each good one is let through.


@pytest.fixture
def package(tmp_path):
    """Build a small autofed from {file: text}."""

    def build(files: dict[str, str]) -> Path:
        for name, text in {"__init__.py": "", **files}.items():
            path = tmp_path / "autofed" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return build


TEN = ", ".join("abcdefghij")
LONG = "def f():\n" + "    pass\n" * MOST_LINES

BAD = [
    (check_layers, "training/fit.py", "from autofed.api import train", "training may not import api"),
    (check_layers, "training/fit.py", "from autofed import inference", "training may not import inference"),
    (check_layers, "training/fit.py", "import autofed.algorithms.fedavg", "training may not import algorithms"),
    (check_layers, "training/fit.py", "from .. import api", "training may not import api"),
    (check_layers, "training/fit.py", "def f():\n    import autofed.federation.rounds", "import federation.rounds"),
    (check_layers, "training/fit.py", "if TYPE_CHECKING:\n    from autofed.cli import main", "may not import cli"),
    (check_layers, "data/splits.py", "from autofed.plans import Plan", "data may not import plans"),
    (check_layers, "data/__init__.py", "from ..plans import Plan", "data may not import plans"),
    (check_layers, "privacy/dpsgd.py", "from ..training.fit import train", "privacy may not import training"),
    (check_layers, "federation/site.py", "import autofed.federation.rounds", "may not import federation.rounds"),
    (check_layers, "federation/site.py", "from autofed.federation.transports import flower", "federation.transports"),
    (check_layers, "algorithms/fedavg.py", "import autofed.federation.site", "may not import federation.site"),
    (check_layers, "report/pages.py", "from autofed.api.demo import run", "report may not import api"),
    (check_layers, "algorithms/fedavg.py", "from autofed.federation import Site", "may not import federation,"),
    (check_listed, "tools.py", "", "add it to docs/architecture.md"),
    (check_listed, "federation/post.py", "", "add it to docs/architecture.md"),
    (check_listed, "shed/spade.py", "", "add it to docs/architecture.md"),
    (check_size, "plans/plan.py", f"def f({TEN}): ...", "f has 10 parameters, 9 is the most"),
    (check_size, "plans/plan.py", f"class A:\n    def f(self, *, {TEN}): ...", "f has 10 parameters, 9 is the most"),
    (check_size, "cli/options.py", f"def _f({TEN}): ...", "_f has 10 parameters, 9 is the most"),
    (check_size, "plans/plan.py", LONG, f"f has {MOST_LINES + 1} lines"),
    (
        check_docstrings,
        "data/reading.py",
        f"def f({TEN[:16]}): ...",
        "f has more than 5 parameters; give its docstring",
    ),
    (check_docstrings, "data/reading.py", f"class A:\n    def __init__(self, {TEN[:16]}): ...", "__init__ has more"),
    (check_names, "data/utils.py", "", "no module is called that"),
    (check_names, "helpers/__init__.py", "", "no module is called that"),
    (check_forbidden_imports, "federation/rounds.py", "import flwr", "only federation/transports/flower"),
    (check_forbidden_imports, "cli.py", "def f():\n    from flwr.app import Message", "imports Flower"),
    (check_forbidden_imports, "planner.py", "def f():\n    import torch.nn", "planner does without torch"),
    (check_forbidden_imports, "algorithms/fedavg.py", "import torch", "algorithms does without torch"),
    (check_forbidden_imports, "plans.py", "from monai.networks import nets", "plans does without monai"),
    (check_forbidden_imports, "privacy/dpsgd.py", "from autofed import data", "does without autofed.data"),
    (check_forbidden_imports, "files.py", "import pickle", "nothing is ever unpickled"),
    (check_forbidden_imports, "files.py", "from pickle import loads", "nothing is ever unpickled"),
    (check_calls, "training/network.py", "import torch\ntorch.load('x')", "torch.load: never pickle"),
    (check_calls, "training/network.py", "from torch import load", "torch.load: never pickle"),
    (check_calls, "preprocessing.py", "np.load('x', allow_pickle=True)", "allow_pickle: never pickle"),
    (check_calls, "files.py", "import os\nhome = os.environ['HOME']", "no environment variables"),
    (check_calls, "files.py", "from os import getenv", "no environment variables"),
    (check_calls, "training/fit.py", "def f():\n    print(1)", "the library does not print"),
    (check_calls, "training/fit.py", "from rich import print", "the library does not print"),
]


@pytest.mark.parametrize(("check", "file", "text", "finding"), BAD, ids=[f"{row[0].__name__}-{row[1]}" for row in BAD])
def test_a_bad_package_is_found_out(package, check, file, text, finding):
    findings = check(package({file: text}))
    assert len(findings) == 1, findings
    assert finding in findings[0]
    assert findings[0].startswith(f"autofed/{file}")


@pytest.mark.parametrize(
    ("files", "finding"),
    [
        ({"plans/plan.py": "import autofed.data.labels", "data/labels.py": "import autofed.plans.plan"}, "autofed/: "),
        ({"data/a.py": "import autofed.data.b", "data/b.py": "from autofed.data import a"}, "autofed/data: "),
        (
            {
                "data/a/x.py": "import autofed.data.b.y",
                "data/b/y.py": "import autofed.data.c",
                "data/c.py": "import autofed.data.a.z",
                "data/a/z.py": "",
            },
            "autofed/data: ",
        ),
    ],
)
def test_a_circle_is_found_out(package, files, finding):
    findings = check_cycles(package(files))
    assert len(findings) == 1, findings
    assert findings[0].startswith(finding)
    assert "which is a circle" in findings[0]


def test_too_many_entries_are_found_out(package):
    findings = check_size(package({f"a{n}.py": "" for n in range(MOST_ENTRIES)}))  # and __init__.py
    assert [finding for finding in findings if f"{MOST_ENTRIES} is the most" in finding]


def test_a_good_package_is_let_through(package):
    root = package(
        {
            "__init__.py": "if TYPE_CHECKING:\n    from autofed.api import train\n",
            "errors.py": "import os\nos.replace('a', 'b')",
            "data/images/__init__.py": "from autofed.data.images import volumes\nfrom autofed.errors import Error",
            "data/images/volumes.py": "from . import geometry",
            "data/images/geometry.py": "",
            "data/reading.py": "from autofed.data import images",
            "planner.py": f"from autofed import __version__, plans\ndef _f({TEN[:-3]}): ...",
            "preprocessing.py": "np.load('x', allow_pickle=False)",
            "training/fit.py": "import torch\nfrom autofed.training import network",
            "training/network.py": "",
            "federation/__init__.py": "",
            "federation/rounds.py": "from autofed.federation import site\nfrom autofed.algorithms.fedavg import merge",
            "federation/site.py": "",
            "federation/transports/__init__.py": "",
            "federation/transports/flower/node.py": "import flwr\nfrom autofed.federation.transports import in_process",
            "federation/transports/in_process.py": "",
            "cli/__init__.py": "from autofed import report\nprint(1)",
            "cli/plan_commands.py": f"def plan({TEN}): ...",
        }
    )
    assert [finding for check in CHECKS for finding in check(root)] == []


def test_a_heavy_import_is_found_out(package):
    root = package({"cli.py": "from autofed import files", "files.py": "import numpy"})
    assert check_light(root, "autofed.cli", HEAVY) == ["importing autofed.cli loads numpy"]
    assert check_light(root, "autofed", HEAVY) == []
    assert "No module named 'autofed.api'" in check_light(root, "autofed.api", HEAVY)[0]
