"""files.py: what is read is what the schema says, and what is written is complete or not there."""

import errno
import json
import math
import os
import re

import pytest

import files
from configurator import Between, OneOf, UserError
from files import check, locked, read_json, replacing, write_atomically

SCHEMA = {"format": OneOf(1), "files": [{"file": re.compile("[a-z]+"), "tokens": Between(0, 9)}],
          "pair": [str, Between(0.0, 1.0)], "loss?": (None, float), "more": {str: (int, str)}}
GOOD = {"format": 1, "files": [{"file": "a", "tokens": 9}], "pair": ["x", 1], "more": {"x": 1, "y": "z"},
        "unknown": 0}


@pytest.mark.parametrize("change", [{}, {"loss": None}, {"loss": 2}, {"loss": math.nan}, {"files": []},
                                    {"more": {}}])
def test_what_the_schema_says_is_taken(change):
    assert check({**GOOD, **change}, SCHEMA, "it") == {**GOOD, **change}


@pytest.mark.parametrize("change, words", [
    ({"format": True}, "it, format: True, wanted 1"),
    ({"files": [{"file": "a"}]}, "it, files, number 1: tokens is missing"),
    ({"files": [{"file": "../a", "tokens": 1}]}, "file: '../a', wanted text like"),
    ({"files": [{"file": "a", "tokens": 10}]}, "tokens: 10, wanted a whole number, 0 to 9"),
    ({"files": [{"file": "a", "tokens": 1.0}]}, "a whole number"),
    ({"files": {}}, "a list"),
    ({"pair": ["x"]}, "a list of 2"), ({"pair": ["x", 0, 0]}, "a list of 2"),
    ({"pair": [0, 0]}, "number 1: 0, wanted text"),
    ({"pair": ["x", math.nan]}, "number 2: nan"),
    ({"loss": "x"}, "wanted null or a number"),
    ({"more": {"x": []}}, r"more, x: \[\], wanted a whole number or text"), ({"more": {1: 1}}, "a name: 1"),
    ({"more": 5}, "more: 5, wanted an object"),
])
def test_what_it_does_not_say_is_refused_by_name(change, words):
    with pytest.raises(UserError, match=words):
        check({**GOOD, **change}, SCHEMA, "it")


def test_long_and_deep_values_are_shown_in_part():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, "x" * 10**6):
        with pytest.raises(UserError) as error:
            check(value, int, "it")
        assert len(str(error.value)) < 200


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "9" * 5000, '{"format": 1', "nul"])
def test_json_that_is_corrupt_or_deep(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json", {})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        read_json(tmp_path / "pipe", {})


def test_a_mark_in_front_of_json_is_no_part_of_it(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert read_json(tmp_path / "a.json", SCHEMA) == GOOD


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomically(path, b"old")
    with pytest.raises(KeyError), replacing(path) as file:
        file.write(b"half")
        raise KeyError
    for code, words in ((errno.ENOSPC, "no space"), (errno.EIO, "cannot write")):
        def fail(_, code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(files.os, "fsync", fail)
        with pytest.raises(UserError, match=words):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_special_file_is_never_replaced(tmp_path):
    """The superuser may rename over /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        write_atomically(tmp_path / "pipe", b"x")
    assert not (tmp_path / "pipe").is_file() and len(list(tmp_path.iterdir())) == 1


def test_locks_of_several_machines(tmp_path):
    """Machine r of N takes .lock_r_of_N: each once, and all at the same time."""
    with locked(tmp_path, "build", name=".lock_0_of_2"), locked(tmp_path, "build", name=".lock_1_of_2"):
        assert {path.name for path in tmp_path.iterdir()} == {".lock_0_of_2", ".lock_1_of_2"}
        with pytest.raises(UserError, match="a build is at work"), \
                locked(tmp_path, "build", name=".lock_0_of_2"):
            pass
    assert not list(tmp_path.iterdir())


def test_a_lock_whose_holder_has_just_left(tmp_path, monkeypatch, capsys):
    """Between open and flock its file is removed, or replaced: the lock is then taken on a new file."""
    fcntl = pytest.importorskip("fcntl")
    flock, left = fcntl.flock, ["removed", "replaced"]

    def late(file, how):
        if left:
            (tmp_path / ".lock").unlink()
            if left.pop() == "replaced":
                (tmp_path / ".lock").touch()
        return flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path, "run"):
        assert not left and "process" in (tmp_path / ".lock").read_text(encoding="utf-8")
        with pytest.raises(UserError, match="a run is at work"), locked(tmp_path, "run"):
            pass
    assert not list(tmp_path.iterdir()) and "cannot be locked" not in capsys.readouterr().err
