"""Puts the scripts on the path, and makes the data and the runs that tests share.

If GPT2_SHARED_DATA is not set, tests of real data are skipped; if it is, the data must be there.
"""

import base64
import functools
import json
import os
import random
import shutil
import signal
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

# three test files run at a time: more threads than one each would wait for each other at every small product
os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
pytest.register_assert_rewrite("training")


@pytest.fixture(autouse=True)
def excepthook(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which configure and watch_memory replace


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data named by GPT2_SHARED_DATA."""
    if "GPT2_SHARED_DATA" not in os.environ:
        pytest.skip("GPT2_SHARED_DATA is not set")
    path = Path(os.environ["GPT2_SHARED_DATA"]).resolve()
    assert path.is_dir(), f"GPT2_SHARED_DATA={path} is not a folder"
    return path


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory) -> Path:
    """A rank file of the 256 bytes and nothing else: 257 ids with EOT, so that models in tests are small."""
    path = tmp_path_factory.mktemp("tokenizer") / "bytes.tiktoken"
    ranks = (f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256))
    path.write_text("".join(ranks), encoding="ascii")
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory, byte_tokenizer) -> Path:
    """A folder as fineweb.py makes it, of a few of the standard library's sources in bytes: 4 train shards
    and 1 val shard."""
    from bpe import load_tokenizer
    from shards import RANK_FILE, write_manifest, write_shard

    data_dir = tmp_path_factory.mktemp("tiny_data")
    tok = load_tokenizer(str(byte_tokenizer))
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = []
    for split, names in {"train": ("bisect", "heapq", "this", "keyword"), "val": ("stat",)}.items():
        for i, name in enumerate(names):
            ids = tok.encode((stdlib / f"{name}.py").read_text(encoding="utf-8"))
            shard = data_dir / f"tiny_{split}_{i:06d}.npy"
            files.append(write_shard(shard, np.array([tok.eot], dtype=np.uint16), ids))
    (data_dir / RANK_FILE).write_bytes(tok.rank_file)
    write_manifest(data_dir, {"tokenizer": {"name": tok.name, "sha256": tok.sha256}, "files": files})
    return data_dir


@pytest.fixture(scope="session")
def base_flags(tiny_data, byte_tokenizer):
    """A run of 12 steps of a tiny model in float32."""
    return {"data_dir": tiny_data, "tokenizer": byte_tokenizer,
            "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "dropout": 0.1,
            "batch_size": 2, "batch_tokens": 512,
            "max_steps": 12, "warmup_steps": 3, "max_lr": 1e-2, "min_lr": 1e-3,
            "val_interval": 4, "val_tokens": 2048, "checkpoint_interval": 4, "sample_interval": 0,
            "device": "cpu", "dtype": "float32", "compile": "false", "hellaswag_interval": 0}


@pytest.fixture
def flags(base_flags):
    """A copy, for a test to change."""
    return {**base_flags}


@pytest.fixture(scope="session")
def shared_run(base_flags, tmp_path_factory):
    """shared_run(**overrides): the log_dir of that run, made once for all tests; a test may change a copy."""
    from training import train

    @functools.cache
    def run(**overrides):
        log_dir = tmp_path_factory.mktemp("shared_run") / "log"
        train(base_flags, log_dir=log_dir, **overrides)
        return log_dir
    return run


@pytest.fixture
def four_steps(shared_run, tmp_path):
    """The log_dir of a run of 4 steps, for a test to change."""
    return shutil.copytree(shared_run(max_steps=4), tmp_path / "four_steps")


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """Thirty questions in HellaSwag's format."""
    words = "the a cat dog sat ran on under mat tree and then it was red".split()
    draw, path = random.Random(0), tmp_path_factory.mktemp("hellaswag") / "questions.jsonl"

    def some(low, high):
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    records = [{"ind": i, "activity_label": "Cats", "ctx": some(2, 12), "label": draw.randrange(4),
                "endings": [some(1, 5) for _ in range(4)]} for i in range(30)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def encoding():
    """tiktoken's GPT-2."""
    import tiktoken

    from bpe import load_tokenizer

    load_tokenizer("gpt2")  # puts the vocabulary where tiktoken finds it
    return tiktoken.get_encoding("r50k_base")


# the files whose tests start many processes: first, or the last of them would run alone at the end
SLOWEST = ["train", "scale", "evaluation", "run_options", "stops", "checkpoint", "guard"]


def pytest_collection_modifyitems(items):
    names = [f"test_{name}" for name in SLOWEST]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))
