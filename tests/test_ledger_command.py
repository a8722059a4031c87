"""`autofed ledger`: what a privacy officer is told, in figures, in sentences and as JSON."""

import json
import math

import pytest
from scipy.stats import norm
from typer.testing import CliRunner

from autofed.api import ledgers
from autofed.cli import app
from autofed.errors import ValidationErrors
from autofed.privacy import accounting
from autofed.privacy.events import PrivacyEvent
from autofed.privacy.ledger import NAME, PrivacyLedger
from tests import charges_made
from tests.charges_made import STEP

DELTA = 1e-5
RUN, OTHER = "a" * 32, "b" * 32
SCORES = PrivacyEvent(mechanism="scores", steps=1, noise_multiplier=30.0)
WHOLE = PrivacyEvent(mechanism="feddp", steps=1, noise_multiplier=2.5, unit="site")
UNPROTECTED = PrivacyEvent(mechanism="none", steps=5)


def charge(round=1, run=RUN, events=(STEP,), **more):
    return charges_made.charge(round, run, events, **more)


@pytest.fixture
def work(tmp_path):
    (tmp_path / "alpha").mkdir()
    return tmp_path


def opened(work, *charges, planned=10, simulation=False):
    path = work / "alpha" / NAME
    ledger = (PrivacyLedger.for_plan(path, "alpha", [STEP] * planned, DELTA, simulation=simulation)
              if planned else PrivacyLedger(path, "alpha", simulation=simulation))  # fmt: skip
    for each in charges:
        ledger.charge(each)
    return ledger


def call(*arguments):
    """What was printed, words apart by one space; `ValidationErrors` if the input was bad."""
    result = CliRunner().invoke(app, ["ledger", *map(str, arguments)], env={"COLUMNS": "80"})
    if isinstance(result.exception, ValidationErrors):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def test_what_was_spent_is_shown_by_run_and_mechanism(work):
    ledger = opened(work, charge(1), charge(2), charge(1, OTHER, [STEP, SCORES]))
    text = call(work / "alpha")
    both, scores = accounting.epsilon([STEP, SCORES], DELTA), accounting.epsilon([SCORES], DELTA)
    total = (
        ledger.counted()
    )  # who planned the second run had seen the first: the filter's figure, and not a smaller one
    assert total > accounting.epsilon([STEP] * 3 + [SCORES], DELTA)
    assert f"{RUN} dp-sgd patient 2 40 {accounting.rounded_up(accounting.epsilon([STEP] * 2, DELTA))}" in text
    assert f"{OTHER} scores patient 1 1 {accounting.rounded_up(scores)}" in text
    assert f"{OTHER} together {accounting.rounded_up(both)}" in text and f"{RUN} together" not in text
    assert f"all runs {accounting.rounded_up(total)}" in text
    assert "Fingerprints handed over for planning are not in this ledger" in text


def test_the_promise_is_a_sentence_with_its_epsilon_and_delta(work):
    opened(work, *(charge(round) for round in range(10)))
    text = call(work / "alpha" / NAME)
    assert (
        "Someone who sees everything that left this hospital in the trainings of this ledger can tell whether a given "
        "patient's scans were used with a success rate of at most 99.97 %, where guessing gives 50 % (epsilon 7.92 at "
        "delta 1e-05)."
    ) in text
    assert "The ceiling is epsilon 8.774 at delta 1e-05" in text and "Counted against it: 8.774; 0.0 %" in text


def test_json_holds_the_same_facts(work):
    ledger = opened(work, charge(1), charge(2))
    found = json.loads(CliRunner().invoke(app, ["ledger", str(work / "alpha"), "--json"]).stdout)
    assert ledgers.Statement.parse(found, "the ledger") == ledgers.ledger_statement(ledger)
    assert found["epsilon"] == ledger.epsilon() and found["delta"] == DELTA and found["unprotected_since"] is None
    assert found["ceiling"]["counted"] == ledger.counted() and found["ceiling"]["left"] == pytest.approx(0.8, abs=1e-6)
    assert [(m["mechanism"], m["steps"]) for m in found["runs"][0]["mechanisms"]] == [("dp-sgd", 40)]


def test_once_anything_left_unprotected_nothing_is_promised(work):
    opened(work, charge(1), charge(7, OTHER, [UNPROTECTED]), charge(8, "c" * 32, [UNPROTECTED]), planned=0)
    text = call(work / "alpha")
    assert "Nothing is promised to any patient of this hospital: something left unprotected, " in text
    assert f"for the first time in round 7 of run {OTHER}" in text and "can tell whether" not in text
    assert f"{OTHER} none patient 1 5 infinite" in text and "all runs infinite" in text
    found = ledgers.ledger_statement(PrivacyLedger.existing(work / "alpha" / NAME))
    assert found.epsilon is found.success_rate is None and found.unprotected_since == OTHER
    assert found.runs[0].epsilon == accounting.epsilon([STEP], DELTA)


def test_a_test_seed_and_a_simulation_are_told(work):
    opened(work, charge(1, seeded=True), simulation=True)
    text = call(work / "alpha")
    assert "the noise followed from a test seed" in text and "dp-sgd (test seed) patient" in text
    assert "ledger of a simulation" in text and "The ceiling is" not in text


def test_the_unit_of_a_whole_site_is_told(work):
    opened(work, charge(1, events=[WHOLE]), planned=0)
    text = call(work / "alpha")
    assert "feddp site 1 1" in text
    assert "The unit of feddp is all that the hospital holds at once, each patient included" in text
    assert "There is no ceiling" in text and "little protection" not in text


def test_a_case_that_counts_as_a_patient_is_told(work):
    ledger = opened(work, charge(1))
    assert "names no patients" not in call(work / "alpha")
    ledger.charge(charge(2, case_is_patient=True))
    assert "one case counts as one: who has several is protected less" in call(work / "alpha")


def test_a_large_epsilon_is_called_what_it_is(work):
    opened(work, charge(1, events=[WHOLE.model_copy(update={"noise_multiplier": 0.2})]), planned=0)
    assert "An epsilon above 10 is little protection against such a test" in call(work / "alpha")


def test_before_the_first_training_nothing_has_left(work):
    opened(work)
    assert "Nothing has left this hospital in a training yet. The ceiling is" in call(work / "alpha")


# --- opening by hand


def test_a_ledger_is_opened_by_hand_once(work):
    text = call(work / "alpha", "--open", "--epsilon", 8, "--delta", "1e-6")
    assert text.startswith("alpha: ") and "The ceiling is epsilon 8 at delta 1e-06" in text and "100.0 %" in text
    opening = PrivacyLedger.existing(work / "alpha" / NAME).opening
    assert (opening.site, opening.ceiling_epsilon, opening.ceiling_delta) == ("alpha", 8, 1e-6)
    with pytest.raises(ValidationErrors, match="nothing changes its ceiling"):
        call(work / "alpha", "--open", "--epsilon", 80, "--delta", "1e-6")
    assert PrivacyLedger.existing(work / "alpha" / NAME).opening == opening


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["alpha"], "there is no ledger; .* --open"),
        (["bravo"], "there is no ledger"),
        (["alpha", "--open"], "give --epsilon, such as 8, and --delta"),
        (["bravo", "--open", "--epsilon", 8, "--delta", "1e-5"], "no folder .*bravo; prepare"),
        (["alpha", "--open", "--epsilon", "-1", "--delta", 2], "found epsilon -1 and delta 2"),
        (["alpha", "--open", "--epsilon", "1e-4", "--delta", "1e-5"], "nothing fits under epsilon 0.0001"),
    ],
)
def test_bad_input_is_told_what_to_write(work, arguments, said):
    with pytest.raises(ValidationErrors, match=said):
        call(work / arguments[0], *arguments[1:])
    assert not list(work.rglob("*.jsonl"))


def test_a_folder_of_several_sites_is_answered_with_their_names(work):
    opened(work)
    with pytest.raises(ValidationErrors, match="found the ledgers of alpha; name one of them: .*alpha"):
        call(work)


def test_a_ceiling_without_open_is_refused(work):
    opened(work)
    result = CliRunner().invoke(app, ["ledger", str(work / "alpha"), "--epsilon", "9"])
    assert result.exit_code == 2 and "go with --open" in result.output


# --- for the end of a training


def test_the_summary_of_a_run_counts_all_its_folds(work):
    ledger = opened(work, charge(1), charge(1, RUN + "-fold-2"), charge(1, OTHER))
    (line,) = ledgers.summary(ledger, RUN)
    order = ledger.opening.order
    two, three = (accounting.rounded_up(accounting.renyi_epsilon([STEP] * n, DELTA, order)) for n in (2, 3))
    every = f"all runs together cost epsilon {three} at delta 1e-05; of its ceiling 8.774 are left "
    assert line.startswith(f"alpha: this run cost epsilon {two} at delta 1e-05; {every}")
    assert line.endswith("(70.0 %)")
    assert ledgers.summary(ledger)[0].startswith(f"alpha: {every}")


def test_the_summary_says_when_nothing_is_promised(work):
    ledger = opened(work, charge(1), charge(1, OTHER, [UNPROTECTED]), planned=0, simulation=True)
    line, simulated = ledgers.summary(ledger, RUN)
    assert "this run cost epsilon" in line and "nothing is promised for all runs together" in line
    assert "simulation" in simulated
    assert "nothing is promised for this run, since something left unprotected" in ledgers.summary(ledger, OTHER)[0]


# --- the figure in the sentence


@pytest.mark.parametrize("noise", [0.5, 1.0, 5.0])
def test_no_test_of_a_gaussian_is_right_more_often_than_promised(noise):
    """The best test of a Gaussian asks whether the outcome is above one half: right in norm.cdf(1 / (2 noise))."""
    bound = accounting.success_rate(
        accounting.epsilon([WHOLE.model_copy(update={"noise_multiplier": noise})], DELTA), DELTA
    )
    assert norm.cdf(0.5 / noise) < bound < 1


def test_the_success_rate_is_reached_by_randomised_response():
    """Told the truth with chance e^epsilon / (1 + e^epsilon): right so often, and with delta nothing is hidden."""
    assert accounting.success_rate(math.log(3), 0.0) == pytest.approx(0.75)
    assert accounting.success_rate(0.0, 0.0) == 0.5 and accounting.success_rate(0.0, 1.0) == 1.0
    assert accounting.success_rate(2.0, 0.1) == pytest.approx((math.exp(2.0) + 0.1) / (1 + math.exp(2.0)))
    assert accounting.success_rate(5000.0, DELTA) == 1.0


@pytest.mark.parametrize(
    ("rate", "percent"),
    [(0.5, "50.00"), (0.99966, "99.97"), (0.999951, "99.996"), (0.9999999, "99.99999"), (1.0, "100")],
)
def test_percent_is_rounded_up_and_below_a_hundred(rate, percent):
    assert accounting.percent_at_most(rate) == percent
