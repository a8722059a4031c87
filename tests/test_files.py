from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from pydantic import Field

from autofed.errors import ValidationErrors
from autofed.files import Record, digest, is_part, read_json, whole_file, whole_folder, write_bytes, write_json


class Inner(Record):
    name: str
    size: int = Field(gt=0)


class Outer(Record):
    inner: Inner
    values: tuple[float, ...] = ()


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_only_when_the_block_ends(tmp_path):
    path = tmp_path / "deep" / "volume.nii.gz"
    with whole_file(path) as part:
        part.write_bytes(b"new")
        assert part.name.endswith(".nii.gz")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert listing(path.parent) == ["volume.nii.gz"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    steps, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: steps.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda part, path: steps.append("replace") or replace(part, path))
    write_bytes(tmp_path / "a.bin", b"new")
    assert steps == ["fsync", "replace"] and (tmp_path / "a.bin").read_bytes() == b"new"


def test_a_failing_block_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as part:
        part.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["a.bin"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "a.bin"):
        pass
    assert listing(tmp_path) == []


def test_a_folder_replaces_the_old_one_whole(tmp_path):
    for content in ("old", "new"):
        with whole_folder(tmp_path / "cases") as part:
            (part / content).write_text(content)
    assert listing(tmp_path / "cases") == ["new"]
    assert listing(tmp_path) == ["cases"]


def test_a_failing_block_leaves_the_old_folder_and_no_litter(tmp_path):
    with whole_folder(tmp_path / "cases") as part:
        (part / "old").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "cases") as part:
        (part / "half").write_text("half")
        raise RuntimeError
    assert listing(tmp_path / "cases") == ["old"]
    assert listing(tmp_path) == ["cases"]


def test_json_goes_both_ways_and_keeps_letters_readable(tmp_path):
    value = {"hôpital": [1, 2.5, None, True], "names": {"a": "ß"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "hôpital" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_json_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "said"), [(None, "there is no such file"), (b"{", "not JSON"), (b"\xff", "not JSON")]
)
def test_json_that_cannot_be_read_is_said_clearly(tmp_path, content, said):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValidationErrors, match=said) as caught:
        read_json(path)
    assert caught.value.about == str(path)


def test_digest_knows_values_not_the_order_of_keys():
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
    assert digest({"a": [2, 3]}) != digest({"a": [3, 2]})
    assert digest(1) != digest("1")
    assert len(digest(None)) == 64


def test_a_record_goes_both_ways(tmp_path):
    record = Outer(inner=Inner(name="x", size=2), values=(1.0, 0.1))
    record.save(tmp_path / "r.json")
    again = Outer.load(tmp_path / "r.json")
    assert again == record
    assert again.digest() == record.digest()
    assert again.digest() != Outer(inner=Inner(name="x", size=3), values=(1.0, 0.1)).digest()


def test_a_record_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Inner(name="x", size=2).size = 3  # type: ignore[misc]


def test_a_record_names_everything_that_is_wrong(tmp_path):
    write_json(tmp_path / "r.json", {"inner": {"size": -1, "colour": "red"}, "values": [1, "many"]})
    with pytest.raises(ValidationErrors) as caught:
        Outer.load(tmp_path / "r.json")
    said = sorted(caught.value.problems)
    assert caught.value.about == str(tmp_path / "r.json")
    assert [line.split(":")[0] for line in said] == ["inner.colour", "inner.name", "inner.size", "values.1"]
    assert "remove it or correct its name" in said[0]
    assert "missing" in said[1]
    assert "found -1" in said[2]
    assert "found 'many'" in said[3]


def test_a_record_that_is_no_object_at_all():
    with pytest.raises(ValidationErrors, match="the file as a whole"):
        Outer.parse([1], "r.json")


def test_what_a_killed_program_leaves_is_known_as_such(tmp_path):
    seen = []
    for make in (whole_file, whole_folder):
        with contextlib.suppress(KeyError), make(tmp_path / "plan.json") as part:
            seen.append(part.name)
            raise KeyError
    assert len(seen) == 2 and all(is_part(name) for name in seen)
    assert not any(is_part(name) for name in ("plan.json", "case.part.json", ".hidden", "scan.part"))
