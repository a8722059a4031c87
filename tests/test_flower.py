"""Flower's transport: in one process, where it agrees with `InProcess` to the bit, and for real over TLS."""

from __future__ import annotations

import json

import numpy as np
import pytest

import autofed
from autofed import algorithms
from autofed.exchange import from_bytes, load_groups
from autofed.federation.flower.answers import client_app
from autofed.federation.flower.records import packed, unpacked
from autofed.federation.flower.transport import OverFlower
from autofed.federation.premises import request_name
from autofed.problems import Problems
from autofed.runs import Identity, Run
from autofed.verbs.coordinator import Coordinator
from tests.plans_made import small_plan
from tests.synthetic import TUMOUR, make_site

flwr_app = pytest.importorskip("flwr.app")

from flwr.proto.node_pb2 import NodeInfo  # noqa: E402
from flwr.serverapp import Grid  # noqa: E402
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects  # noqa: E402
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

CASES = {"alpha": 6, "bravo": 3}
SHARED = [name for name in algorithms.names() if not getattr(algorithms.find(name), "gathers", False)]


class OneProcess(Grid):
    """A grid whose nodes answer at once, in this process; what travels is taken apart and put together as by Flower.

    `nodes` are the configurations of the nodes, `names` those that they are registered under, `silent` never answer.
    """

    run = property(lambda self: None)

    def __init__(self, nodes, names=(), silent=()):
        self.nodes, self.names, self.silent = dict(enumerate(nodes, 7)), dict(enumerate(names, 7)), set(silent)
        self.waiting, self.sent = {}, []
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 2, 3

    def set_run(self, run): ...

    def create_message(self, *_, **__): ...

    def send_and_receive(self, messages, *, timeout=None): ...

    def get_node_ids(self):
        return list(self.nodes)

    def get_nodes(self):
        return [NodeInfo(node_id=n, name=self.names.get(n, "")) for n in self.nodes]

    def push_messages(self, messages):
        return [self._push(message) for message in messages]

    def _push(self, message):
        node, number, message = message.metadata.dst_node_id, f"m{len(self.sent)}", travel(message)
        message.metadata.__dict__["_message_id"] = number
        self.sent.append((node, message))
        config = self.nodes[node]
        if config.get("site") not in self.silent:
            context = flwr_app.Context(1, node, config, flwr_app.RecordDict(), {})
            self.waiting[number] = travel(client_app(message, context))
        return number

    def pull_messages(self, message_ids):
        return [self.waiting.pop(m) for m in message_ids if m in self.waiting]


def travel(message):
    """The message after its bytes were on the wire."""
    contents = {number: part.deflate() for number, part in get_all_nested_objects(message).items()}
    return inflate_object_from_contents(message.object_id, contents)


class Ground:
    """Two sites with disks of their own, and one where everything is in one place."""

    def __init__(self, root):
        self.root = root
        sites = [make_site(root / "raw" / name, cases=cases) for name, cases in CASES.items()]
        self.plan = small_plan(labels=TUMOUR, cases=4).change({"agreement.patients": CASES})
        self.plan.save(root / "plan.json")
        autofed.preprocess(self.plan, sites, root / "work")
        for site in sites:
            autofed.preprocess(self.plan, [site], root / site.name / "work")

    def nodes(self, folder, plan):
        plan.save(folder / "agreed.json")
        return [self.node(folder, name) for name in CASES]

    def node(self, folder, name):
        return {"site": name, "work": str(self.root / name / "work"), "plan": str(folder / "agreed.json"),
                "memory": str(folder / name), "device": "cpu"}  # fmt: skip

    def with_algorithm(self, name):
        return self.plan.change({"algorithm.name": name}) if name != "fedavg" else self.plan


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground(tmp_path_factory.mktemp("flower"))


def reach(nodes, plan, name="0" * 32, **wanted):
    return OverFlower(OneProcess(nodes, **wanted), plan, name, patience_seconds=0)


def lead(run, plan, nodes, fold="all"):
    """A training over the grid, in the folder of a run."""
    identity = run.identity() if run.exists else Identity(sites=tuple(CASES))
    if not run.exists:
        run.begin(plan, identity, None)
    transport = reach(nodes, plan, request_name(identity.id, fold))
    transport.meet(holding_out=fold != "all")
    chosen = algorithms.make(plan.agreement.algorithm)
    Coordinator(run, plan, chosen, identity).train(fold, transport)
    return transport


def kept(folder):
    """Every array in the safetensors files below a folder, by file, group and name."""
    return {
        f"{path.relative_to(folder)}/{group}/{name}": array
        for path in sorted(folder.rglob("*.safetensors"))
        for group, arrays in load_groups(path)[0].items()
        for name, array in arrays.items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", SHARED)
def test_every_algorithm_ends_as_on_one_machine(ground, tmp_path, name):
    plan = ground.with_algorithm(name)
    here = autofed.train(plan, ground.root / "work", tmp_path / "here", device="cpu")
    there = Run(tmp_path / "there")
    lead(there, plan, ground.nodes(tmp_path, plan))
    pairs = [(there.rounds_folder, here.rounds_folder)]
    for site in CASES:
        (folder,) = (tmp_path / site).glob("*/fold_all")
        pairs.append((folder / "memory", here.site_folder(site) / "memory"))
    assert all(same(kept(a), kept(b)) for a, b in pairs)
    assert any(kept(a) for a, _ in pairs)


def test_a_fold_holds_out_the_sites_own_patients_and_is_scored(ground, tmp_path):
    here = autofed.train(ground.plan, ground.root / "work", tmp_path / "here", folds=("1",), device="cpu")
    there = Run(tmp_path / "there")
    lead(there, ground.plan, ground.nodes(tmp_path, ground.plan), fold="1")
    assert there.held_out("1") == here.held_out("1") != {}
    (sides,) = (tmp_path / "alpha").glob("*/fold_1/split.json")
    assert json.loads(sides.read_text()) == json.loads((here.site_folder("alpha", "1") / "split.json").read_text())
    with pytest.raises(Problems, match="no site holds out a patient"):
        alone = ground.plan.change({"faults.least_sites": 1}).change({"agreement.patients": {"bravo": 3}})
        reach(ground.nodes(tmp_path, alone)[1:], alone, request_name("0" * 32, "1")).meet(holding_out=True)


def test_a_site_that_is_silent_until_the_deadline_is_not_in_the_answer(ground, tmp_path):
    plan = ground.plan.change({"faults.deadline_minutes": 0.001})
    transport = reach(ground.nodes(tmp_path, plan), plan)
    transport.meet()
    transport.grid.silent.add("bravo")
    answers = transport(dict.fromkeys(CASES, b"rubbish"))
    assert answers.keys() == {"alpha"}
    assert from_bytes(answers["alpha"]).code == "failed"


def test_requests_as_large_as_a_network_arrive_whole():
    data = np.random.default_rng(0).bytes((12 << 20) + 3)
    assert unpacked(packed({"agreement": "a"}, data)) == ({"agreement": "a"}, data)


# --- who is who


def changed(node, **new):
    return {**node, **new}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a, b: [a], 'no node takes part as bravo; start its SuperNode with site="bravo"'),
        (lambda a, b: [a, changed(b, site="brovo")], "bravo cannot|no node takes part as bravo"),
        (lambda a, b: [a, b, changed(b)], "two nodes call themselves bravo: 8 and 9"),
        (lambda a, b: [a, changed(b, work="/nowhere")], "bravo cannot take part; why is in its own site.log"),
        (lambda a, b: [a, {"site": "bravo"}], "the node 8 cannot read its --node-config"),
    ],
)
def test_who_does_not_fit_is_named(ground, tmp_path, change, says):
    with pytest.raises(Problems, match=says):
        reach(change(*ground.nodes(tmp_path, ground.plan)), ground.plan).meet()
