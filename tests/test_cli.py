"""The command line: every verb from the shell, exit codes, and messages without tracebacks."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import typer
from PIL import Image

import autofed
from autofed.cli import app, main
from tests import plans_made
from tests.synthetic import make_site


def call(monkeypatch, capsys, *arguments):
    """Exit code and what was printed."""
    monkeypatch.setattr(sys, "argv", ["autofed", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def test_the_verbs_from_the_shell(tmp_path, monkeypatch, capsys, request):
    sites = [make_site(tmp_path / name, cases=2) for name in ("alpha", "bravo")]
    test = make_site(tmp_path / "test", cases=1, part="Ts")

    def good(*arguments):
        code, text = call(monkeypatch, capsys, *arguments)
        assert code == 0, text
        return text

    assert "2 cases" in good("fingerprint", sites[0], "-o", tmp_path / "alpha.json")  # by a process per processor
    request.getfixturevalue("one_processor")
    text = good("plan", tmp_path / "alpha.json", sites[1], "-o", tmp_path / "plan.json", "--hours", "0.01",
                "--set", "training.rounds=2", "--set", "network.features=[4,4,4]",
                "--set", "training.steps_per_round=1", "--device", "cpu")  # fmt: skip
    assert "set by hand" in text
    value = json.loads((tmp_path / "plan.json").read_text())
    assert value["agreement"]["training"]["rounds"] == 2
    assert "batch_dice" not in text and "batch_dice" in good("plan", tmp_path / "plan.json", "--explain")
    text = good("plan", tmp_path / "plan.json", "--json")  # and a warning of few steps on the error stream
    assert json.JSONDecoder().raw_decode(text)[0] == value
    text = good("plan", tmp_path / "plan.json", "--set", "training.rounds=1", "-o", tmp_path / "other.json")
    assert "written to" in text and "instead of" in text
    assert json.loads((tmp_path / "other.json").read_text())["agreement"]["training"]["rounds"] == 1
    code, text = call(monkeypatch, capsys, "plan", tmp_path / "plan.json", "--hours", "2", "--preset", "resenc-m")
    assert code == 2 and "hours was given, but" in text and "preset was given, but" in text
    assert "no file was written" in good("plan", tmp_path / "plan.json")
    assert "2 cases preprocessed" in good("preprocess", tmp_path / "plan.json", *sites, "-o", tmp_path / "work")
    assert "preprocessed before" in good("preprocess", tmp_path / "plan.json", *sites, "-o", tmp_path / "work")
    text = good("train", tmp_path / "plan.json", tmp_path / "work", "-o", tmp_path / "run", "--rounds", "1",
                "--algorithm", "fedavg", "--device", "cpu")  # fmt: skip
    assert "models: global" in text and "training loss" in text and "nobody was held out" in text
    assert "what predicts: run/global round 1" in text and f"autofed predict {tmp_path / 'run'} -i IMAGES" in text
    text = good("predict", tmp_path / "run", "-i", test / "imagesTs", "-o", tmp_path / "out", "--no-mirroring")
    assert "pictures" in text and list((tmp_path / "out" / "pictures").glob("*.png"))
    assert "what predicts: run/global round 1" in text and "out: 1 cases" in text and "before" not in text
    text = good("predict", tmp_path / "run", "-i", test / "imagesTs", "-o", tmp_path / "out", "--no-mirroring")
    assert "1 of them were predicted before by the same weights" in text
    text = good("evaluate", tmp_path / "out", test / "labelsTs", "-o", tmp_path / "report.json")
    assert (
        "Dice" in text
        and " mm" in text
        and (tmp_path / "report.json").is_file()
        and (tmp_path / "report.html").is_file()
    )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["plan", "nowhere", "-o", "plan.json"], 2, "no such folder"),
        (["plan", ".", "-o", "plan.json", "--set", "rounds"], 2, "FIELD=VALUE"),
        (["plan", ".", "-o", "plan.json", "--algorithm", "magic"], 2, "the algorithms are"),
        (["plan", ".", "-o", "plan.json", "--device", "abacus"], 2, "abacus"),
        (["plan", ".", "-o", "plan.json", "--preset", "huge"], 2, "resenc-xl"),
        (["plan", ".", "-o", "plan.json", "--configuration", "4d"], 2, "3d_lowres"),
        (["plan", ".", "-o", "plan.json", "--hours", "-1", "--memory", "0"], 2, "memory_gb"),
        (["plan", ".", "-o", "plan.json", "--set", "training.round=3"], 2, "no field training.round"),
        (["plan", ".", "-o", "plan.json", "--set", "rounds=3", "--set", "rounds=4"], 2, "set twice"),
        (["plan", ".", "-o", "plan.json", "--set", "rounds=3", "--set", "training.rounds=4"], 2, "is set 2 times"),
        (["plan", ".", "-o", "plan.json", "--algorithm", "magic", "--hours", "-1", "--set", "a=1"], 2, "3 problems"),
        (["train", "plan.json", "WORK", "-o", "RUN"], 2, "no such file"),
        (["predict", "RUN", "-i", "x", "-o", "OUT"], 2, "not a run"),
        (["evaluate", "OUT", "LABELS"], 2, "no such folder"),
        (["explode"], 2, "explode"),
    ],
)
def test_bad_input_is_a_message_and_exit_code_two(tmp_path, monkeypatch, capsys, arguments, code, says):
    monkeypatch.chdir(tmp_path)
    found, text = call(monkeypatch, capsys, *arguments)
    assert found == code and says in text and "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_processor")
def test_a_site_hands_over_its_speed_only_if_it_says_so(tmp_path, monkeypatch, capsys):
    sites = [make_site(tmp_path / name, cases=2) for name in ("alpha", "bravo")]
    prints = []
    for site in sites:
        for options in ((), ("--speed", "--device", "cpu")):
            prints.append(tmp_path / f"{site.name}{len(options)}.json")
            assert call(monkeypatch, capsys, "fingerprint", site, "-o", prints[-1], *options)[0] == 0
    quiet, speedy = prints[::2], prints[1::2]
    values = [json.loads(call(monkeypatch, capsys, "plan", *p, "--hours", "1", "--device", "cpu", "--json")[1])
              for p in (quiet, speedy)]  # fmt: skip
    assert [sorted(v["budget"]["site_speeds"]) for v in values] == [[], ["alpha", "bravo"]]
    assert [v["budget"]["speed"] is None for v in values] == [False, True]
    alone, together = (v["agreement"]["training"]["rounds"] for v in values)
    assert together > alone or values[0]["local"]["network"] != values[1]["local"]["network"]


@pytest.mark.usefixtures("one_processor")
def test_field_names_are_whole_however_narrow_the_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    sites = [make_site(tmp_path / name, cases=2) for name in ("alpha", "bravo")]
    code, text = call(monkeypatch, capsys, "plan", *sites, "--hours", "0.01", "--device", "cpu", "--explain")
    assert code == 0 and "local.training.rotate_in_plane_only" in text


def test_distances_between_pictures_without_a_spacing_are_told_in_pixels(tmp_path, monkeypatch, capsys):
    for folder, columns in (("out", slice(4, 8)), ("labels", slice(2, 8))):
        label = np.zeros((1, 12, 12), np.uint8)
        label[:, 4:8, columns] = 1
        (tmp_path / folder).mkdir()
        Image.fromarray(label[0]).save(tmp_path / folder / "a.png")
    (tmp_path / "labels" / "dataset.json").write_text('{"labels": {"background": 0, "cell": 1}}')
    code, text = call(monkeypatch, capsys, "evaluate", tmp_path / "out", tmp_path / "labels")
    assert code == 0, text
    assert text.count("HD95 2.00 px") == 2 and "2.00 mm" not in text
    assert json.loads((tmp_path / "out" / "report.json").read_text())["mean"]["hd95_mm"] == 2.0


def test_a_plan_of_hardly_any_steps_ends_with_a_warning(tmp_path, monkeypatch, capsys):
    private = {"privacy.mechanism": "dp-sgd", "privacy.noise_multiplier": 1.0}  # its forecast says what few steps give
    for rounds, settings, is_warned in ((1, {}, True), (200, {}, False), (1, private, False)):
        plans_made.small_plan().change({"training.rounds": rounds, **settings}).save(tmp_path / "plan.json")
        monkeypatch.setattr(sys, "argv", ["autofed", "plan", str(tmp_path / "plan.json"), "--json"])
        with pytest.raises(SystemExit):
            main()
        shown = capsys.readouterr()
        assert json.loads(shown.out)["agreement"]["training"]["rounds"] == rounds
        said = shown.err.strip().splitlines()[-1:]
        assert [line.startswith("warning: this plan takes only") for line in said] == [True] * is_warned


def test_help_names_every_verb(monkeypatch, capsys):
    code, text = call(monkeypatch, capsys, "--help")
    assert code == 0
    verbs = (
        "fingerprint",
        "plan",
        "preprocess",
        "train",
        "run",
        "predict",
        "evaluate",
        "demo",
        "site",
        "ledger",
        "audit",
    )
    for verb in verbs:
        assert verb in text
    assert len(app.registered_commands) == len(verbs)


def test_flower_is_asked_for_by_name_where_it_is_missing(tmp_path, monkeypatch, capsys):
    plans_made.small_plan().save(tmp_path / "plan.json")
    theirs = ("flwr", "autofed.federation.transports.flower", "autofed.api.over_flower")
    for name in [name for name in sys.modules if name.startswith(theirs)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("autofed.federation.transports.flower", raising=False)
    monkeypatch.delattr("autofed.api.over_flower", raising=False)
    monkeypatch.setitem(sys.modules, "flwr", None)
    code, text = call(monkeypatch, capsys, "train", tmp_path / "plan.json", "-o", tmp_path / "RUN", "--connection", "x")
    assert code == 2 and 'pip install "autofed[flower]"' in text and not (tmp_path / "RUN").exists()


@pytest.mark.parametrize("options", [(), ("--key", "k"), ("--key", "k", "--ca", "c", "--insecure")])
def test_a_site_needs_a_key_and_a_certificate_or_says_that_it_wants_neither(monkeypatch, capsys, options):
    words = ("site", "plan.json", "WORK", "--name", "alpha", "-o", "MEMORY", "--superlink", "localhost:1", *options)
    code, text = call(monkeypatch, capsys, *words)
    assert code == 2 and "give both --key and --ca, or --insecure alone" in text


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("autofed.api.training.train", interrupted)
    code, text = call(monkeypatch, capsys, "train", "plan.json", "WORK", "-o", "RUN")
    assert code == 130 and "add --resume" in text


def test_as_a_program():
    done = subprocess.run([sys.executable, "-c", "from autofed.cli import main; main()", "train", "--help"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0 and "--resume" in done.stdout


def test_a_promise_is_planned_shown_and_refused(tmp_path, monkeypatch, capsys):
    few, many = plans_made.small_plan(cases=8), plans_made.small_plan(cases=4000)
    few.save(tmp_path / "few.json")
    many.save(tmp_path / "many.json")
    asked = ("--epsilon", "8", "-o", tmp_path / "private.json")
    code, text = call(monkeypatch, capsys, "plan", tmp_path / "few.json", *asked)
    assert code == 2 and "hardly anything would be learned" in text and not (tmp_path / "private.json").exists()
    code, text = call(monkeypatch, capsys, "plan", tmp_path / "few.json", *asked, "--even-if-hopeless")
    assert code == 0 and "expected learning: hardly any;" in text and "times as many patients" in text
    code, text = call(monkeypatch, capsys, "plan", tmp_path / "many.json", *asked, "--explain")
    assert code == 0 and "protection: weak at epsilon 8 (delta 1e-05)" in text
    assert "success rate of at most 99.97 %" in text
    shown = text.replace("expected learning", "")
    assert "expected learning:" in text and not any(word in shown.split() for word in ("sound", "strained"))
    code, text = call(monkeypatch, capsys, "plan", tmp_path / "private.json")
    table = next(line for line in text.splitlines() if line.startswith("alpha"))
    assert "2000" in table and "8.00" in table
    code, text = call(monkeypatch, capsys, "plan", tmp_path / "many.json", "--epsilon", "0", "--delta", "2")
    assert code == 2 and "found an epsilon of 0" in text and "found a delta of 2" in text


# --- help, hints and what comes before any work


def commands():
    program = typer.main.get_command(app)
    return program, program.commands


def shown_by(monkeypatch, capsys, *arguments):
    """What is printed, as one line of words."""
    code, text = call(monkeypatch, capsys, *arguments)
    assert code == 0, text
    return " ".join(text.split())


@pytest.mark.parametrize("name", sorted(commands()[1]))
def test_help_is_whole_and_right(monkeypatch, capsys, name):
    text = shown_by(monkeypatch, capsys, name, "-h")
    assert text == shown_by(monkeypatch, capsys, name, "--help")
    assert "\\" not in text and "Positional arguments" not in text
    for parameter in commands()[1][name].params:
        assert parameter.help, f"{name} says nothing of {parameter.name}"
        assert " ".join(parameter.help.split()) in text


def test_the_help_of_the_program_shows_the_usual_steps_and_whole_summaries(monkeypatch, capsys):
    program, named = commands()
    text = shown_by(monkeypatch, capsys, "-h")
    assert "..." not in text.partition("Commands:")[2].partition("The usual steps")[0]
    for command in named.values():
        assert command.short_help.endswith(".") and command.short_help in text
    steps = text.partition("The usual steps")[2]
    places = [steps.index(f"autofed {verb} ") for verb in ("plan", "preprocess", "train", "predict", "evaluate")]
    assert places == sorted(places)
    assert program.name == "autofed"


def test_the_version_is_told(monkeypatch, capsys):
    assert shown_by(monkeypatch, capsys, "--version") == f"autofed {autofed.__version__}"


def test_names_are_completed():
    asked = {"_AUTOFED_COMPLETE": "complete_bash", "COMP_WORDS": "autofed pre", "COMP_CWORD": "1"}
    script = "import sys; sys.argv = ['autofed']; from autofed.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | asked, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.stdout.split() == ["preprocess", "predict"], done.stderr


def test_who_misspells_a_command_is_shown_the_right_one_once(monkeypatch, capsys):
    code, text = call(monkeypatch, capsys, "prediction")
    assert code == 2 and text.count("Did you mean") == 1 and "'predict'" in text


@pytest.mark.parametrize(
    "words",
    [
        "site plan.json WORK --name alpha -o MEMORY --superlink localhost:1 --key k",
        "plan SITE --work WORK",
        "plan SITE --set rounds",
        "ledger SITE --epsilon 8",
        "train plan.json WORK -o RUN --site-plan alpha",
    ],
)
def test_a_wrong_use_is_told_before_anything_heavy_is_loaded(words):
    script = f"import sys; from autofed.cli import app\ntry: app({words.split()!r}, standalone_mode=False)\n"
    script += "except Exception as e: print(type(e).__name__, sorted({'torch', 'numpy', 'flwr'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "BadParameter []", done.stderr


@pytest.mark.usefixtures("one_processor")
def test_the_folder_of_a_federation_stands_for_its_sites(tmp_path, monkeypatch, capsys):
    for name in ("sites/alpha", "sites/bravo", "test"):
        (tmp_path / "sites").mkdir(exist_ok=True)
        make_site(tmp_path / name, cases=2)
    code, text = call(monkeypatch, capsys, "plan", tmp_path, "-o", tmp_path / "plan.json", "--hours", "0.01",
                      "--device", "cpu")  # fmt: skip
    assert code == 0, text
    patients = json.loads((tmp_path / "plan.json").read_text())["agreement"]["patients"]
    assert patients == {"alpha": 2, "bravo": 2}
    code, text = call(monkeypatch, capsys, "preprocess", tmp_path / "plan.json", tmp_path, "-o", tmp_path / "WORK")
    assert code == 0 and "alpha: 2 cases preprocessed" in text and "bravo: 2 cases preprocessed" in text
    code, text = call(monkeypatch, capsys, "fingerprint", tmp_path, "-o", tmp_path / "one.json")
    assert code == 2 and "did you mean the folders in it (sites/alpha, sites/bravo)?" in text


def test_a_refusal_says_once_what_it_is_about(tmp_path, monkeypatch, capsys):
    code, text = call(monkeypatch, capsys, "plan", tmp_path / "nowhere")
    assert code == 2 and text.lstrip().startswith(
        f"error: the sites' data: {tmp_path / 'nowhere'}: there is no such folder"
    )
