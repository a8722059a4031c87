"""Who is held out: whole patients, as nnU-Net parts them, by a secret hash, or as the site wrote it down."""

import json

import pytest

from autofed.data import splits
from autofed.data.splits import Split, declared_split, hashed_split, nnunet_split, split
from autofed.errors import ValidationErrors

NAMES = [f"c{i:02d}" for i in range(12)]
PATIENTS = {"ann": ("a1", "a2"), "bob": ("b1",), "cat": ("c1",), "dan": ("d1",), "eve": ("e1",)}


@pytest.mark.parametrize(
    ("fold", "held"),
    list(enumerate((("c00", "c03", "c08"), ("c07", "c10", "c11"), ("c06", "c09"), ("c01", "c04"), ("c02", "c05")))),
)
def test_fifths_are_those_of_nnunet(fold, held):
    """Found with nnunetv2 2.8.1, generate_crossval_split of these names."""
    found = nnunet_split(NAMES[::-1], fold)
    assert found.validation == held
    assert found.train == tuple(n for n in NAMES if n not in held)


def test_fewer_than_five_patients_all_train():
    assert nnunet_split(NAMES[:4], 0) == Split(tuple(NAMES[:4]), ())
    assert len(nnunet_split(NAMES[:5], 4).validation) == 1


def test_nobody_is_held_out_of_all(tmp_path):
    assert split(PATIENTS, "all", tmp_path, private=False) == Split(tuple(PATIENTS), ())
    assert split(PATIENTS, "all", tmp_path, private=True).validation == ()


def test_a_hash_moves_nobody_when_somebody_joins():
    salt = b"secret"
    for fold in range(5):
        before, after = hashed_split(NAMES[:-1], fold, salt), hashed_split(NAMES, fold, salt)
        assert set(before.validation) == set(after.validation) - {NAMES[-1]}
    everyone = [name for fold in range(5) for name in hashed_split(NAMES, fold, salt).validation]
    assert sorted(everyone) == NAMES


def test_another_salt_gives_another_split():
    many = [f"p{i}" for i in range(100)]
    assert hashed_split(many, 0, b"one") != hashed_split(many, 0, b"two")
    assert 8 <= len(hashed_split(many, 0, b"one").validation) <= 35


def test_a_private_plan_hashes_with_a_salt_that_stays(tmp_path):
    once, again = (split(PATIENTS, "1", tmp_path, private=True) for _ in range(2))
    assert once == again == hashed_split(list(PATIENTS), 1, (tmp_path / "salt").read_bytes())
    assert len((tmp_path / "salt").read_bytes()) == 32
    split(PATIENTS, "1", tmp_path / "other", private=True)
    assert (tmp_path / "other" / "salt").read_bytes() != (tmp_path / "salt").read_bytes()


def write(folder, folds):
    path = folder / splits.FILE
    path.write_text(json.dumps(folds))
    return path


@pytest.mark.parametrize("private", [False, True])
def test_what_a_site_wrote_down_counts(tmp_path, private):
    write(tmp_path, [{"train": ["b1"], "val": ["c1"]}, {"train": ["c1", "d1"], "val": ["a2", "a1"]}])  # eve: neither
    assert split(PATIENTS, "1", tmp_path, private=private) == Split(("cat", "dan"), ("ann",))


@pytest.mark.parametrize(
    ("folds", "says"),
    [
        ({"train": []}, ["this is no split; expected a list"]),
        ([{"train": ["b1"]}], ["this is no split; expected a list"]),
        ([{"train": ["b1"], "val": [3]}], ["this is no split; expected a list"]),
        ([], ["it has 0 folds, from 0 on, and fold 0 was asked for"]),
        (
            [{"train": ["a1", "zoe"], "val": ["a2", "tim"]}],
            ["train names zoe", "val names tim", "the patient ann is in train and in val"],
        ),
        ([{"train": [], "val": ["b1"]}], ["train is empty"]),
        ([{"train": ["b1"], "val": ["a2"]}], ["ann has a1 besides, which is in neither"]),
    ],
)
def test_a_split_that_cannot_be_is_refused_with_all_that_is_wrong(tmp_path, folds, says):
    with pytest.raises(ValidationErrors) as refused:
        declared_split(write(tmp_path, folds), PATIENTS, 0)
    assert len(refused.value.problems) == len(says)
    assert all(part in problem for part, problem in zip(says, refused.value.problems, strict=True))
