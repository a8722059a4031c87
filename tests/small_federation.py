"""A federation of two small sites, and how to train it without the verbs: what tests of the loop start from."""

from __future__ import annotations

from autofed import algorithms
from autofed.algorithms import RunSetup
from autofed.data import open_dataset
from autofed.federation import checkpoints
from autofed.federation import rounds as loop
from autofed.federation.aggregation import Aggregator
from autofed.federation.site import Site, SiteData, SiteIdentity, SiteStorage
from autofed.federation.transports.in_process import InProcess
from autofed.messages import load_groups
from autofed.preprocessing import find_public, open_public, open_store, pool_stores, preprocess, public_digests
from autofed.privacy import guarantee
from autofed.training.network import build, weights_of
from tests.plans_made import small_plan
from tests.synthetic import make_site

CASES = {"alpha": 2, "bravo": 3}
SITES = tuple(CASES)


def make(root):
    """A plan and the prepared data of its sites."""
    plan = small_plan(labels=1, cases=4)
    stores = {}
    for name, cases in CASES.items():
        preprocess(open_dataset(make_site(root / name, cases=cases)), plan.local, root / "work")
        stores[name] = open_store(root / "work", name, plan.local)
    make_site(root / "public", cases=2, shape=(14, 16, 15))
    return plan.change({"agreement.patients": CASES}), stores


OPEN = {
    "begin": 0.0, "exchanges": 3, "weight": 1.0, "ramp": 0.0,
    "confidence": 0.5, "doubt": 1.0, "share": 0.0, "settled": 0.0,
}  # fmt: skip
"""Sites are asked in every of three rounds, and nearly everything passes: so early nobody is sure of anything."""


def labelled(ground, settings=OPEN):
    """The plan agreed on the public images of a ground, with every gate open, and the images."""
    plan, stores = ground
    plan = plan.change({"algorithm.settings": settings})
    work = next(iter(next(iter(stores.values())).folders.values())).parents[2]
    folder = work.parent / "public"
    found = public_digests(find_public(folder, 1))
    plan = plan.model_copy(update={"agreement": plan.agreement.model_copy(update={"public_images": found})})
    return plan, open_public(folder, plan, work)


PRIVATE = {
    "dp-sgd": {"privacy.mechanism": "dp-sgd", "sampling_rate": 0.6},
    "adp": {"privacy.mechanism": "adp", "sampling_rate": 0.6, "clipping": "flat"},
    "feddp": {"privacy.mechanism": "feddp"},
}
"""What makes the plan private, by mechanism."""


def private(plan, mechanism, **more):
    """The plan with a private mechanism and an honest promise."""
    made = plan.change(PRIVATE.get(mechanism, {}) | more)
    found = guarantee.consistent_fields(made, None, None, noise_is_given=True)
    return made.change(found) if found else made


def sharing():
    """The names of the algorithms whose sites share weights."""
    return [name for name in algorithms.names() if "update" in algorithms.find(name).released]


def with_algorithm(plan, name):
    return plan.change({"algorithm.name": name}) if name != plan.agreement.algorithm.name else plan


def site_of(
    name, store, plan, folder, ledgers, *, run="r", held=None, public=None, simulation=False, kind=Site, **options
):
    """A site on the CPU, whose draws are named as it is."""
    storage = SiteStorage(folder, ledgers, simulation)
    return kind(SiteIdentity(name, run), plan, SiteData(store, held, public), storage, **options)


def sites_of(plan, stores, folder, run_id, **options):
    algorithm = algorithms.make(plan.agreement.algorithm)
    held = {"pooled": pool_stores(stores)} if algorithm.centralised else stores
    ledgers = {n: folder / n / "ledger.jsonl" for n in stores}
    return [
        site_of(
            n,
            s,
            plan,
            folder / "sites" / n,
            {k: p for k, p in ledgers.items() if n in (k, "pooled")},
            run=run_id,
            **options,
        )
        for n, s in held.items()
    ]


def train(
    ground, folder, name="fedavg", *, state=None, turned=False, transport=None, run_id="r", settings=None, **options
):
    plan, stores = ground
    plan = with_algorithm(plan, name)
    grids = {}
    if algorithms.find(name).shares_pseudo_labels:
        plan, public = labelled((plan, stores), OPEN if settings is None else settings)
        grids, options = public.grids, {**options, "public": public}
    sites = sites_of(plan, dict(reversed(stores.items())) if turned else stores, folder, run_id, **options)
    algorithm = algorithms.make(plan.agreement.algorithm)
    state = state or algorithm.start(RunSetup(plan, weights_of(build(plan.local.network, seed=1)), grids))
    names = tuple(s.name for s in sites)
    carrier = (transport or InProcess)(sites)
    return loop.run_rounds(
        loop.RunContext(algorithm, Aggregator.of(plan, names), plan, carrier, folder / "rounds", run_id, names), state
    )


def final_arrays(folder, plan):
    """Everything the run ended with: the common state, or what each site remembers."""
    last = plan.agreement.training.rounds
    arrays = dict(checkpoints.load(folder / "rounds", last).shared.get("weights", {}))
    for memory in sorted(folder.glob(f"sites/*/memory/round_{last:05d}.safetensors")):
        groups = load_groups(memory)[0].items()
        arrays |= {f"{memory.parent.parent.name}/{g}/{n}": a for g, group in groups for n, a in group.items()}
    return arrays
