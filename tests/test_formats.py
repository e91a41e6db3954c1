"""
Damaged input of every format: one line for the user, never a traceback, a hang or a silent misreading.

Each format is a valid value, how to write it, how to read it, and what may stand in it without harm. Two
kinds of damage, drawn with a fixed seed:
    names and values   each name removed, each value replaced by one of another type or out of its range;
                       refused, unless the table says why that is harmless
    bytes              flipped, removed, inserted, doubled, cut off; refused, or read as something valid
"""

import contextlib
import copy
import json
import math
import random
import re
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import test_fineweb
import torch
from checkpoint_ranks import accept, state_of, train

import files
from bpe import load_tokenizer
from checkpoint import (
    checkpoint_tokenizer,
    describe_model,
    describe_tokenizer,
    load_into,
    training_state,
    write_checkpoint,
)
from configurator import UserError
from convert_hf import export_hf, import_hf
from fineweb import verify_folder
from hellaswag import read_examples
from model import GPT, GPTConfig
from plot_log import parse_log
from runlog import START
from shards import read_manifest, read_shard, write_shard

SECONDS = 120  # for one case
GONE = re.compile("gone")  # stands for a name that was removed
WRONG = [None, True, -1, 1.5, 2**70, math.nan, "x", [], {}, ["x"], {"x": 1}]


class Format(NamedTuple):
    value: Any                        # valid
    write: Callable[[Any], None]
    read: Callable[[], Any]           # UserError if there is something wrong
    free: str = "(?!)"                # pattern of "path/to/value replacement": what makes no difference
    path: Any = None                  # the file whose bytes are damaged
    sound: Callable = lambda was, now: True  # whether what was read from damaged bytes is harmless
    wrong: tuple = ()                 # more replacements of this format


# ---- the engine
def damaged_values(value, wrong, path=()):
    """(path, replacement or GONE) of the names in nested containers, and of the first entry of each list."""
    if isinstance(value, dict):
        items = list(value.items())
    else:
        items = list(enumerate(value[:1])) if isinstance(value, list) else []
    if len(items) > 4 and len({type(item) for _, item in items}) == 1:
        items = items[:1]  # of many that are alike
    for key, item in items:
        place = (*path, key)
        if isinstance(value, dict):
            yield place, GONE
        for new in wrong:
            number = type(item) is float and type(new) in (int, float) and new > 0
            if not number and (isinstance(new, torch.Tensor) or type(new) is not type(item) or new != item):
                yield place, new
        yield from damaged_values(item, wrong, place)


def with_damage(value, path, new):
    changed = inner = copy.copy(value)
    for key in path[:-1]:
        inner[key] = copy.copy(inner[key])
        inner = inner[key]
    if new is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return changed


def damaged_bytes(data, draw):
    i, j = sorted(draw.choices(range(len(data) + 1), k=2))
    j = min(j, i + draw.choice((1, 2, 8, 100)))
    return draw.choice((
        lambda: data[:i] + bytes(byte ^ 1 << draw.randrange(8) for byte in data[i:i + 1]) + data[i + 1:],
        lambda: data[:i] + data[j:],
        lambda: data[:j] + data[i:],
        lambda: data[:i],
        lambda: data[:i] + draw.randbytes(draw.choice((1, 4, 50))) + data[i:],
        lambda: data[:i] + draw.choice((b"\xef\xbb\xbf", b"\0", b"\xff", b"[" * 3000, b"9" * 5000, b"-",
                                        b"\n", b"\\ud800", b"NaN", b"1e999")) + data[i:],
        lambda: data.decode("latin-1").encode("utf-16")))()


@contextlib.contextmanager
def time_limit():
    def expired(number, frame):
        raise TimeoutError(f"not done after {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def attempt(read):
    """What `read` made of it; None for a UserError."""
    with time_limit(), contextlib.suppress(UserError):
        return read()


def wrong_values(form):
    """(how many, descriptions of those that were read as if nothing were wrong, or ended in a traceback)"""
    failures, count = [], 0
    for path, new in damaged_values(form.value, [*WRONG, *form.wrong]):
        shown = "gone" if new is GONE else "tensor" if isinstance(new, torch.Tensor) else repr(new)
        what = f"{'/'.join(map(str, path))} {shown}"
        form.write(with_damage(form.value, path, new))
        count += 1
        try:
            accepted = attempt(form.read) is not None
        except Exception as error:
            failures.append(f"{what}: {type(error).__name__}: {error}")
        else:
            if accepted and not re.fullmatch(form.free, what):
                failures.append(f"{what}: accepted")
    return count, failures


def wrong_bytes(form, n, seed=0):
    failures, draw = [], random.Random(seed)
    form.write(form.value)
    was, data = copy.deepcopy(form.read()), form.path.read_bytes()
    for number in range(n):
        changed = damaged_bytes(data, draw)
        form.path.write_bytes(changed)
        try:
            now = attempt(form.read)
            if now is not None and not form.sound(was, now):
                failures.append(f"bytes, number {number}: accepted")
        except Exception as error:
            failures.append(f"bytes, number {number}: {type(error).__name__}: {error}")
    form.path.write_bytes(data)
    return n, failures


def same(one, other):
    if isinstance(one, torch.Tensor) or isinstance(one, np.ndarray):
        return type(one) is type(other) and one.shape == other.shape and bool((one == other).all())
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() \
            and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return isinstance(other, (list, tuple)) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def write_json(path):
    return lambda value: path.write_text(json.dumps(value), encoding="utf-8")


# ---- the formats
def of_checkpoint(folder, byte_tokenizer):
    model = GPT(GPTConfig(block_size=16, vocab_size=257, n_vocab=257, n_layer=1, n_head=2, n_embd=8))
    optimizers = model.configure_optimizers("muon", 0.1, 1e-3, (0.9, 0.95), fused=True)
    train(model, optimizers, 0, 1)
    path, tokenizer = folder / "ckpt_0000001.pt", describe_tokenizer(load_tokenizer(str(byte_tokenizer)))
    scaler = {"scale": 2.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 9,
              "_growth_tracker": 0}
    value = {**state_of(1, model, optimizers), "tokenizer": tokenizer, "scaler": scaler, "val_loss": 2.5}
    value = copy.deepcopy(value)  # the model's own tensors will be overwritten
    for optimizer in value["optimizers"]:
        optimizer["param_groups"] = [{"params": group["params"]} for group in optimizer["param_groups"]]

    def read():
        values = load_into(path, model, optimizers, accept)
        checkpoint_tokenizer(values)
        return {**values, **training_state(model, optimizers)}

    free = "|".join((
        "provenance.*|config/data_dir 'x'|config/optimizer 'x'",  # only told, or compared with today's
        "(data|val_data/0|tokenizer/name) 'x'",
        "(val_loss|best) None",
        "train_loss (-1|nan)",  # of a step that was skipped
        r"guard/recent \[\]|scaler {}",
        "model_config/heads gone"))
    wrong = torch.zeros(3, 5), torch.zeros((), dtype=torch.int64)
    return {"checkpoint": Format(value, lambda state: write_checkpoint(path, state), read, free, path, same,
                                 wrong)}


def of_shards(folder, byte_tokenizer):
    """The manifest of a build, checked by --verify, and headers."""
    texts = (f"document {i}\n" for i in range(300))
    (folder / "text.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8")
    data_dir = test_fineweb.build(folder / "data", input=folder / "text.txt", tokenizer=byte_tokenizer,
                                  shard_tokens=1500, num_workers=1)
    path = data_dir / "manifest.json"
    value = json.loads(path.read_text(encoding="utf-8"))

    def facts(manifest):
        """What a reader of the shards goes by; the rest is only reported."""
        files = [{key: record[key] for key in ("file", "tokens", "sha256")} for record in manifest["files"]]
        return {"files": files, "eot": manifest["eot"], "format": manifest["format"]}

    def read():
        verify_folder(data_dir)
        return read_manifest(data_dir, built=True)

    free = "|".join((
        "(settings|source).*",  # compared with those of a new build
        "(text_bytes|empty_documents|bad_documents|splits/[a-z]+/(tokens|text_bytes)).*",  # only reported
        "tokenizer/name 'x'"))
    formats = {"manifest": Format(value, write_json(path), read, free, path,
                                  lambda was, now: same(facts(was), facts(now)))}
    for suffix in (".npy", ".bin"):
        shard = folder / f"x_train_000000{suffix}"
        formats[suffix] = Format(np.arange(3, dtype=np.uint16),
                                 lambda ids, shard=shard: write_shard(shard, ids),
                                 lambda shard=shard: np.array(read_shard(shard)), path=shard,
                                 sound=lambda was, now: len(now) == len(was))
    return formats


def of_log(folder, byte_tokenizer):
    path = folder / "log.txt"

    def write(lines):
        lines = lines if isinstance(lines, list) else [lines]
        path.write_text("".join((" ".join(map(str, line)) if isinstance(line, list) else str(line)) + "\n"
                                for line in lines), encoding="utf-8")

    value = [[10, "train", 5.25], [10, "lr", 0.5], [20, "val", 5.5]]
    return {"log": Format({"lines": value}, lambda all: write(all.get("lines", "gone")),
                          lambda: parse_log(path),
                          r"lines \[\]|lines/0/2 (-1|nan)|lines/0/1 .*|lines/0/0 [0-9]{5,}", path,
                          lambda was, now: all(type(step) is int and step >= 0 and type(number) is float
                                               for some in now.values() for step, number in some.items()))}


def of_hellaswag(folder, byte_tokenizer):
    path, tokenizer = folder / "questions.jsonl", load_tokenizer(str(byte_tokenizer))
    value = {"ind": 1, "activity_label": "Cats", "ctx": "a cat", "ctx_a": "a cat", "ctx_b": "then",
             "endings": ["sat", "ran", "lay", "ate"], "label": 1}

    def write(record):
        lines = (json.dumps(one) + "\n" for one in (value, record, value))
        path.write_text("".join(lines), encoding="utf-8")

    return {"hellaswag": Format(value, write, lambda: read_examples(path, tokenizer, "harness"),
                                "ind .*|(activity_label|ctx|ctx_a|ctx_b|endings/0) 'x'", path,
                                lambda was, now: all(len(item.endings) == 4 and 0 <= item.label < 4
                                                     for item in now.items), (4,))}


def of_hugging_face(folder, byte_tokenizer):
    model = GPT(GPTConfig(block_size=16, vocab_size=257, n_vocab=257, n_layer=1, n_head=2, n_embd=8))
    state = {"step": 0, "model": model.state_dict(), "model_config": describe_model(model),
             "tokenizer": describe_tokenizer(load_tokenizer(str(byte_tokenizer)))}
    export_hf(state, folder / "hf")
    export_hf(state, folder / "slow")
    (folder / "slow" / "tokenizer.json").unlink()  # so that vocab.json counts

    def same_shapes(was, now):  # the numbers have no checksum there
        shapes = [{name: tensor.shape for name, tensor in state["model"].items()} for state in (was, now)]
        return shapes[0] == shapes[1]

    def sound(was, now):
        return same(was["model"], now["model"]) and was["tokenizer"]["sha256"] == now["tokenizer"]["sha256"]

    read_of_config = ("vocab_size|n_positions|n_embd|n_layer|n_head|model_type|n_inner|activation_function|"
                      "layer_norm_epsilon")
    free = {"hf/config.json": f"(?!{read_of_config}).*|(activation_function|layer_norm_epsilon|n_inner) gone",
            "hf/tokenizer.json": "(?!model( |/vocab)|added_tokens).*|added_tokens (gone|\\[\\])|"
                                 "added_tokens/0/(?!id|content).*",
            "slow/vocab.json": "(?!)"}
    formats = {}
    for name, pattern in free.items():
        path = folder / name
        formats[name] = Format(json.loads(path.read_text(encoding="utf-8")), write_json(path),
                               lambda path=path: import_hf(path.parent), pattern, path, sound)
    for name in ("slow/tokenizer.tiktoken", "hf/model.safetensors"):
        path = folder / name
        formats[name] = Format(path.read_bytes(), path.write_bytes, lambda path=path: import_hf(path.parent),
                               path=path, sound=same_shapes if name.endswith("safetensors") else sound)
    return formats


def of_run_records(folder, byte_tokenizer):
    path = folder / "runs.jsonl"
    value = {"config": {"init_from": "gpt2"}, "launchers": ["host 1"], "arguments": ["--seed=2"]}
    free = (r"config ({}|{'x': 1})|config/init_from (gone|'x')|launchers gone|"
            r"(launchers|arguments)(/0 'x'| \[\]| \['x'\])")
    return {"runs": Format(
        value, lambda record: path.write_text(json.dumps(record) + "\n", encoding="utf-8"),
        lambda: files.read_jsonl(path, START), free, path)}


FORMATS = [of_checkpoint, of_shards, of_log, of_hellaswag, of_hugging_face, of_run_records]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing waits for the disk."""
    monkeypatch.setattr(files.os, "fsync", lambda _: None)


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_damage_is_refused(make, tmp_path, byte_tokenizer, capsys):
    failures, count = [], 0
    for name, form in make(tmp_path, byte_tokenizer).items():
        form.write(form.value)
        assert form.read() is not None, name
        if isinstance(form.value, dict):
            n, found = wrong_values(form)
            count, failures = count + n, failures + [f"{name}: {line}" for line in found]
        n, found = wrong_bytes(form, 60)
        count, failures = count + n, failures + [f"{name}: {line}" for line in found]
        form.write(form.value)
    capsys.readouterr()  # progress bars
    assert count >= 90  # else nothing was tried
    assert not failures, f"{len(failures)} of {count}:\n" + "\n".join(failures)
