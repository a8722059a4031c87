"""Flower's transport: in one process, where it agrees with `InProcess` to the bit, and for real over TLS."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from flwr import app as flwr_app
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

import autofed
from autofed import algorithms
from autofed.api import over_flower
from autofed.api.coordinator import Coordinator
from autofed.api.public_images import with_public_images
from autofed.errors import ValidationErrors
from autofed.federation.node import SiteNode, open_public_of, request_name
from autofed.federation.run_folder import Run, RunIdentity
from autofed.federation.transports.flower.client_app import client_app
from autofed.federation.transports.flower.records import packed, unpacked
from autofed.federation.transports.flower.transport import OverFlower
from autofed.messages import Failure, Request, from_bytes, load_groups, to_bytes
from autofed.privacy.ledger import PrivacyLedger
from tests.equality import same_arrays
from tests.loopback import CONNECTION, Network
from tests.plans_made import small_plan
from tests.small_federation import PRIVATE, private
from tests.synthetic import TUMOUR, make_site

CASES = {"alpha": 6, "bravo": 3}
SHARED = [name for name in algorithms.names() if not algorithms.find(name).centralised]


class OneProcess(Grid):
    """A grid whose nodes answer at once, in this process; what travels is taken apart and put together as by Flower.

    `nodes` are the configurations of the nodes, `names` those that they are registered under. Those that are `silent`
    never answer, those that are `behind` hand on each reply when the next message comes, and `late` ones once `free`.
    """

    run = property(lambda self: None)

    def __init__(self, nodes, names=(), silent=(), behind=(), late=()):
        self.nodes, self.names, self.silent = dict(enumerate(nodes, 7)), dict(enumerate(names, 7)), set(silent)
        self.behind = {node: {} for node in behind}
        self.late, self.held_up = set(late), {}
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
            reply = {number: travel(client_app(message, context))}
            ready = reply
            if node in self.behind:
                ready, self.behind[node] = self.behind[node], reply
            (self.held_up if node in self.late else self.waiting).update(ready)
        return number

    def free(self):
        """Whoever was late has answered."""
        self.waiting |= self.held_up
        self.late = set()

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
        make_site(root / "public", cases=2, shape=(14, 16, 15))
        self.plan.save(root / "plan.json")
        autofed.preprocess(self.plan, sites, root / "work")
        for site in sites:
            autofed.preprocess(self.plan, [site], root / site.name / "work")

    def nodes(self, folder, plan):
        plan.save(folder / "agreed.json")
        return [self.node(folder, name) for name in CASES]

    def node(self, folder, name):
        return {"site": name, "work": str(self.root / name / "work"), "plan": str(folder / "agreed.json"),
                "memory": str(folder / name), "device": "cpu", "public": str(self.root / "public")}  # fmt: skip

    def with_algorithm(self, name):
        plan = self.plan.change({"algorithm.name": name}) if name != "fedavg" else self.plan
        return with_public_images(plan, (), self.root / "public")

    def public(self, name):
        return self.root / "public" if algorithms.find(name).shares_pseudo_labels else None


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground(tmp_path_factory.mktemp("flower"))


def reach(nodes, plan, name="0" * 32, **wanted):
    return OverFlower(OneProcess(nodes, **wanted), plan, name, patience_seconds=0)


def lead(run, plan, nodes, fold="all"):
    """A training over the grid, in the folder of a run."""
    pictures = nodes[0]["public"]
    identity = run.identity() if run.exists else RunIdentity(sites=tuple(CASES), public=pictures)
    if not run.exists:
        run.begin(plan, identity, None)
    transport = reach(nodes, plan, request_name(identity.id, fold))
    transport.meet(holding_out=fold != "all")
    chosen = algorithms.make(plan.agreement.algorithm)
    public = open_public_of(plan, Path(pictures), run.folder)
    Coordinator(run, plan, chosen, identity, public).train(fold, transport)
    return transport


def kept(folder):
    """Every array in the safetensors files below a folder, by file, group and name."""
    return {
        f"{path.relative_to(folder)}/{group}/{name}": array
        for path in sorted(folder.rglob("*.safetensors"))
        for group, arrays in load_groups(path)[0].items()
        for name, array in arrays.items()
    }


@pytest.mark.parametrize("name", SHARED)
def test_every_algorithm_ends_as_on_one_machine(ground, tmp_path, name):
    plan = ground.with_algorithm(name)
    here = autofed.train(plan, ground.root / "work", tmp_path / "here", device="cpu", public=ground.public(name))
    there = Run(tmp_path / "there")
    lead(there, plan, ground.nodes(tmp_path, plan))
    assert all(run.log_path.read_text().count(": round ") == plan.agreement.training.rounds for run in (here, there))
    pairs = [(there.fold_folder(), here.fold_folder())]
    for site in CASES:
        (folder,) = (tmp_path / site).glob("*/fold_all")
        pairs.append((folder / "memory", here.site_folder(site) / "memory"))
    stored = [(kept(a), kept(b)) for a, b in pairs]  # a site of an algorithm without memory keeps nothing
    assert all(same_arrays(a, b) or not (a or b) for a, b in stored)
    assert any(a for a, _ in stored)


@pytest.mark.parametrize("mechanism", PRIVATE)
def test_every_mechanism_ends_as_on_one_machine(tmp_path, monkeypatch, mechanism):
    """With one and the same secret for all answers, which a site would never take."""
    monkeypatch.setattr("autofed.federation.site.secrets.token_bytes", bytes)
    ground = Ground(tmp_path / "ground")
    plan = private(ground.plan, mechanism)
    here = autofed.train(plan, ground.root / "work", tmp_path / "here", device="cpu", simulation=True)
    there = Run(tmp_path / "there")
    lead(there, plan, ground.nodes(tmp_path, plan))
    assert same_arrays(kept(there.fold_folder()), kept(here.fold_folder()))
    for site in CASES:
        own = PrivacyLedger.existing(ground.root / site / "work" / site / "ledger.jsonl")
        assert own.epsilon() == PrivacyLedger.existing(here.ledgers_folder / f"{site}.jsonl").epsilon() < np.inf
        assert not (ground.root / "work" / site / "ledger.jsonl").exists()  # a simulation leaves it alone


def test_a_site_whose_plan_promises_too_much_does_not_take_part(ground, tmp_path):
    plan = private(ground.plan, "dp-sgd").change({"privacy.epsilon": 0.5})
    with pytest.raises(ValidationErrors, match="spend epsilon"):
        SiteNode(**ground.nodes(tmp_path, plan)[0]).check()
    assert SiteNode(**ground.nodes(tmp_path, plan)[0]).handshake("0" * 32).agreement == ""


def test_what_sites_remember_between_messages_is_on_their_disks(ground, tmp_path):
    plan = ground.plan.change({"agreement.wire": "int8", "keep_momentum": True, "training.ema": 0.5})
    here = autofed.train(plan, ground.root / "work", tmp_path / "here", device="cpu")
    there = Run(tmp_path / "there")
    lead(there, plan, ground.nodes(tmp_path, plan))
    assert same_arrays(kept(there.fold_folder()), kept(here.fold_folder()))


def test_a_fold_holds_out_the_sites_own_patients_and_is_scored(ground, tmp_path):
    here = autofed.train(ground.plan, ground.root / "work", tmp_path / "here", folds=("1",), device="cpu")
    there = Run(tmp_path / "there")
    lead(there, ground.plan, ground.nodes(tmp_path, ground.plan), fold="1")
    assert there.held_out("1") == here.held_out("1") != {}
    (sides,) = (tmp_path / "alpha").glob("*/fold_1/split.json")
    assert json.loads(sides.read_text()) == json.loads((here.site_folder("alpha", "1") / "split.json").read_text())
    with pytest.raises(ValidationErrors, match="no site holds out a patient"):
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


def test_a_node_that_is_one_reply_behind_is_nudged(ground, tmp_path):
    transport = reach(ground.nodes(tmp_path, ground.plan), ground.plan, behind=(8,))
    transport.patience_seconds, transport.nudge_seconds = 30, 0.1
    transport.meet()
    assert transport(dict.fromkeys(CASES, b"rubbish")).keys() == set(CASES)


def test_a_node_that_is_busy_at_first_takes_part_once_it_answers(ground, tmp_path):
    plan = ground.plan.change({"faults.least_sites": 1})
    transport = reach(ground.nodes(tmp_path, plan), plan, late=(8,))
    transport.meet(least=1)
    requests = dict.fromkeys(CASES, b"rubbish")
    assert transport(requests).keys() == {"alpha"}
    transport.grid.free()
    assert transport(requests).keys() == set(CASES)


def test_a_reply_that_is_none_of_ours_is_no_answer(ground, tmp_path, monkeypatch):
    said = []
    transport = reach(ground.nodes(tmp_path, ground.plan), ground.plan)
    transport.meet()
    transport.say = said.append
    monkeypatch.setattr("autofed.federation.transports.flower.client_app.packed", lambda *_: flwr_app.RecordDict({}))
    assert transport({"alpha": b"rubbish"}) == {}
    assert "it is none of autofed's" in said[-1]


def test_requests_as_large_as_a_network_arrive_whole():
    data = np.random.default_rng(0).bytes((12 << 20) + 3)
    assert unpacked(packed({"agreement": "a"}, data)) == ({"agreement": "a"}, data)


# --- who is who


def changed(node, **new):
    return {**node, **new}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a, b: [a], "no node takes part as bravo; start `autofed site --name bravo` there"),
        (lambda a, b: [a, b, changed(b)], "two nodes call themselves bravo: 8 and 9"),
        (lambda a, b: [a, changed(b, work="/nowhere")], "bravo cannot take part; why is in its own site.log"),
        (lambda a, b: [a, {"site": "bravo"}], "the node 8 cannot read its --node-config"),
        (lambda a, b: [a, changed(b, colour="red")], "the node 8 cannot read its --node-config"),
    ],
)
def test_who_does_not_fit_is_named(ground, tmp_path, change, says):
    with pytest.raises(ValidationErrors, match=says):
        reach(change(*ground.nodes(tmp_path, ground.plan)), ground.plan).meet()


def test_a_stranger_gets_no_request_and_is_named_when_a_site_is_missing(ground, tmp_path):
    plan, said = ground.plan, []
    three = ground.plan.change({"agreement.patients": {**CASES, "charlie": 3}})
    alpha, bravo = ground.nodes(tmp_path, three)
    three.save(tmp_path / "agreed.json")
    make_site(tmp_path / "raw" / "charlie", cases=3)
    autofed.preprocess(three, [tmp_path / "raw" / "charlie"], tmp_path / "work")
    charlie = changed(ground.node(tmp_path, "charlie"), work=str(tmp_path / "work"))
    with pytest.raises(ValidationErrors, match=r"no node takes part as bravo \(there is charlie\)"):
        reach([alpha, charlie], plan).meet()
    alpha, bravo = (changed(n, plan=str(ground.root / "plan.json")) for n in (alpha, bravo))
    transport = reach([alpha, charlie, bravo], plan)
    transport.say = said.append
    transport.meet()
    transport(dict.fromkeys(CASES, b"rubbish"))
    assert [node for node, _ in transport.grid.sent[3:]] == [7, 9]
    assert said == ["a node calls itself charlie, which is no site of the plan; it takes no part"]


def test_a_node_is_only_the_site_that_its_key_was_registered_for(ground, tmp_path):
    nodes = ground.nodes(tmp_path, ground.plan)
    reach(nodes, ground.plan, names=("alpha", "bravo")).meet()
    with pytest.raises(ValidationErrors, match="the node registered as bravo calls itself alpha"):
        reach(nodes, ground.plan, names=("bravo", "alpha")).meet()


@pytest.mark.parametrize(("field", "part"), [("training.rounds", "agreement"), ("training.batch_size", "local part")])
def test_a_site_that_agreed_to_another_plan_is_named(ground, tmp_path, field, part):
    other = ground.plan.change({field: 1})
    with pytest.raises(
        ValidationErrors, match=f"alpha has agreed to a plan with another {part}.*hand it the plan.json"
    ):
        reach(ground.nodes(tmp_path, ground.plan), other).meet()


def test_a_run_that_has_begun_goes_on_with_the_least_sites_of_the_plan(ground, tmp_path):
    plan, said = ground.plan.change({"faults.least_sites": 1}), []
    transport = reach(ground.nodes(tmp_path, plan)[:1], plan)
    transport.say = said.append
    with pytest.raises(ValidationErrors, match="no node takes part as bravo"):
        transport.meet()
    transport.meet(least=1)
    assert "no node takes part as bravo" in said[-1]
    transport.grid.nodes[8] = ground.node(tmp_path, "bravo")  # it is there for the next round
    assert transport(dict.fromkeys(CASES, b"rubbish")).keys() == set(CASES)


# --- what a site answers


def ask(ground, tmp_path, request, agreement=None, **other):
    (node, _) = ground.nodes(tmp_path, ground.plan)
    premises = SiteNode.parse(changed(node, **other), "a node")
    return from_bytes(premises.answer(to_bytes(request), agreement or ground.plan.agreement.digest()))


@pytest.mark.parametrize(
    ("request_", "other"),
    [
        (Request("0" * 32, 1, "train"), {"agreement": "another"}),
        (Request("../../escape", 1, "train"), {}),
        (Request("0" * 32 + "-fold-9", 1, "train"), {}),
        (Request("0" * 32, 1, "train"), {"work": "/nowhere"}),
        (Request("0" * 32, 1, "train"), {"plan": "/nowhere/plan.json"}),
        (Request("0" * 32, 1, "train"), {"site": "mallory"}),
    ],
)
def test_what_a_site_cannot_answer_crosses_the_door_as_a_code(ground, tmp_path, request_, other):
    found = ask(ground, tmp_path, request_, **other)
    assert found == Failure(request_.run, 1, other.get("site", "alpha"), "failed")
    assert (tmp_path / "alpha" / "site.log").read_text()
    assert not list(tmp_path.rglob("releases")) and not (tmp_path / "escape").exists()


# --- for real


def test_between_machines(ground, tmp_path, monkeypatch):
    """Training ends as on one machine; what fails at the SuperLink fails at the keyboard; no key, no entry."""
    plan = ground.plan.change({"training.rounds": 2})  # every message to a site starts a process there
    plan.save(tmp_path / "plan.json")
    with Network(tmp_path) as network:
        for site in CASES:
            key = network.key(f"{site}.key")
            network.register(key, site)
            network.site(site, key, tmp_path / "plan.json", ground.root / site / "work", tmp_path / site)
        network.node("stranger", network.key("stranger.key"), {"site": "alpha"})
        words = (f"{tmp_path}/plan.json", "--connection", CONNECTION, "-o")
        done = network.autofed("train", *words, f"{tmp_path}/run")
        assert done.returncode == 0, network.everything(done)
        assert "round 2 of 2: 2 of 2 sites answered" in done.stderr
        monkeypatch.setenv("FLWR_HOME", network.env["FLWR_HOME"])
        with pytest.raises(ValidationErrors, match="bravo has agreed to a plan with another agreement"):
            autofed.train(plan, None, tmp_path / "other", rounds=1, connection=CONNECTION)
        assert network.processes["stranger"].wait(60) != 0, network.log("stranger")
    here = autofed.train(plan, ground.root / "work", tmp_path / "here", device="cpu")
    assert same_arrays(kept(tmp_path / "run" / "fold_all"), kept(here.fold_folder())) and kept(here.fold_folder())


def test_a_superlink_that_flower_does_not_know(ground, tmp_path):
    with pytest.raises(ValidationErrors, match="SuperLink connection 'nowhere' not found"):
        autofed.train(ground.plan, None, tmp_path / "run", connection="nowhere")


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"site": "mallory"}, "mallory is not among the sites of the plan, which are alpha, bravo"),
        ({"work": "nowhere"}, "nowhere/alpha: found nothing"),
        ({"key": "nowhere.key"}, "nowhere.key: there is no such file"),
    ],
)
def test_a_site_that_could_take_part_in_nothing_says_so_at_once(ground, tmp_path, wanted, says):
    places = {"site": "alpha", "plan": ground.root / "plan.json", "work": ground.root / "alpha" / "work"}
    keys = {name: wanted.pop(name) for name in ("key",) if name in wanted}
    with pytest.raises(ValidationErrors, match=says):
        over_flower.serve_site(SiteNode(**(places | {"memory": tmp_path} | wanted)), "localhost:1", **keys)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"work": None}, "WORK, the preprocessed data of every site, is missing"),
        ({"work": "work", "connection": "x"}, "the data is at the sites; leave work out"),
        ({"work": None, "connection": "x", "algorithm": "pooled"}, "needs all data in one place"),
        ({"work": None, "connection": "x", "folds": ("0", "1")}, "one fold is trained at a time, found 0, 1"),
        ({"work": None, "connection": "x", "device": "cpu"}, "every site has its own device"),
    ],
)
def test_what_belongs_elsewhere_is_refused(ground, tmp_path, wanted, says):
    with pytest.raises(ValidationErrors, match=says):
        autofed.train(ground.plan, run=tmp_path / "run", **wanted)
    assert not (tmp_path / "run").exists()
