"""To Hugging Face and back: transformers is the oracle for logits and ids, the way back is bit for bit."""

import errno
import functools
import json
import math
import os
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from hub_server import Fault, HubServer
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from training import PYTHON, RUN_THE_REST

import convert_hf
import hub
from bpe import load_tokenizer, rank_file, tokenizer_from_ranks
from checkpoint import (
    FORMAT,
    build_model,
    checkpoint_tokenizer,
    describe_model,
    describe_tokenizer,
    load_checkpoint,
    load_into,
    load_model,
    save_checkpoint,
)
from configurator import UserError
from convert_hf import derive_merges, export_hf, import_hf, load_any
from decoding import generate
from files import locked
from kernels import Linear
from model import GPT, GPTConfig
from train_bpe import count_documents, train_ranks

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["", " ", "Hello, world! It's 2024: they'll've naïve café, 東京.\n\n    return x\t\t= 1e-3  \n",
         "   \n \t\n\n  a \r\n", "🎉👩‍👩‍👧‍👦 ok🎉", "def f(self, *args):\n        yield [i for i in args]\n",
         "\x00\x7f\u00a0\u3000é",
         "a" * 70 + " " * 70 + "!" * 70]


@pytest.fixture(scope="module")
def transformers():
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module")
def tokenizers(byte_tokenizer, tmp_path_factory):
    """GPT-2's, the bytes in another order than GPT-2's, and one of 600 ids trained on Python's source."""
    text = np.frombuffer((Path(sysconfig.get_path("stdlib")) / "heapq.py").read_bytes(), np.uint8)
    pieces = count_documents(text, np.array([0, len(text)]))
    return {"gpt2": load_tokenizer("gpt2"), "bytes": load_tokenizer(str(byte_tokenizer)),
            "own": tokenizer_from_ranks(rank_file(train_ranks(pieces, 600)), "own")}


def random_state(tokenizer, vocab_size=None, **config):
    """A checkpoint's state of a random model, 2 layers of 2 heads unless `config` says other."""
    torch.manual_seed(0)
    config = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16} | config
    model = GPT(GPTConfig(vocab_size=vocab_size or tokenizer.n_vocab, n_vocab=tokenizer.n_vocab, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)  # biases and norms too, so that none can be mixed up
    return {"format": FORMAT, "step": 7, "model": model.state_dict(), "model_config": describe_model(model),
            "tokenizer": describe_tokenizer(tokenizer)}


def logits(model, idx):
    """(B, T, n_vocab), of one of ours or of transformers'."""
    with torch.no_grad():
        found = model(idx)
    return getattr(found, "logits", found)


def files_of(folder, *without):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name not in without}


def count(folder):
    """Parameters of an export."""
    return sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizers):
    """{kind: (state, folder)} of one export with each tokenizer."""
    base = tmp_path_factory.mktemp("exported")
    cases = {"gpt2": random_state(tokenizers["gpt2"], 50304),
             "own": random_state(tokenizers["own"], dropout=0.1),
             "bytes": random_state(tokenizers["bytes"], 384, n_layer=3, n_head=4)}
    for kind, state in cases.items():
        assert export_hf(state, base / kind) == []
    return {kind: (state, base / kind) for kind, state in cases.items()}


# ---- out -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "own", "bytes"])
def test_transformers_computes_the_same_logits(exported, transformers, kind):
    state, folder = exported[kind]
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    config, n_vocab = theirs.config, state["model_config"]["n_vocab"]
    idx = torch.randint(0, n_vocab, (2, 32), generator=torch.Generator().manual_seed(1))
    got, wanted = logits(theirs.eval(), idx), logits(build_model(state, "x"), idx)
    assert got.shape == wanted.shape == (2, 32, n_vocab)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    sizes = (state["model_config"][key] for key in ("n_layer", "n_head"))
    by_definition = convert_hf.hf_logits(load_file(folder / "model.safetensors"), *sizes, idx)
    torch.testing.assert_close(got, by_definition, rtol=0, atol=1e-5)
    assert theirs.dtype == torch.float32 and theirs.lm_head.weight is theirs.transformer.wte.weight
    assert config.resid_pdrop == config.attn_pdrop == config.embd_pdrop == state["model_config"]["dropout"]
    assert config.bos_token_id == config.eos_token_id == n_vocab - 1
    assert theirs.generation_config.eos_token_id == n_vocab - 1


def test_what_is_written(exported):
    _, folder = exported["gpt2"]
    tensors = load_file(folder / "model.safetensors")
    assert tensors["transformer.wte.weight"].shape == (50257, 16)
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (16, 48)
    assert "lm_head.weight" not in tensors and len(tensors) == 2 + 2 * 12 + 2
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["tie_word_embeddings"] is True
    assert config["activation_function"] == "gelu_new" and config["torch_dtype"] == "float32"
    assert config["n_ctx"] == config["n_positions"] == 32
    assert "max_length" not in json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "vocab.json", "merges.txt",
        "tokenizer.json", "tokenizer_config.json", "tokenizer.tiktoken", "README.md"}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    # as OpenAI's file begins and ends
    assert merges[:4] == ["#version: 0.2", "Ġ t", "Ġ a", "h e"] and merges[-1] == "Ġg azed"
    assert len(merges) == 50001


def test_the_model_card_holds_what_is_known(exported, tmp_path, tokenizers):
    front, _, body = exported["own"][1].joinpath("README.md").read_text(encoding="utf-8").partition("---\n\n")
    assert front == "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
    facts = [line for line in body.splitlines() if line.startswith("- **")]
    assert [line[:9] for line in facts] == ["- **Model", "- **Vocab"]  # the state says nothing else
    assert f" {count(exported['own'][1]):,} parameters" in facts[0] and "own, 600 ids" in facts[1]

    state = random_state(tokenizers["bytes"]) | {
        "step": 20, "val_loss": 2.34567, "config": {"data_dir": "/data/books", "batch_tokens": 512},
        "provenance": {"git": "1a2b3c4", "torch": "2.13.0", "device": "H100", "world_size": 8}}
    log = "10 val_bpb 9\n20 val 2.34567\n20 val_bpb 1.25\n120 val_bpb 8\n"
    (tmp_path / "log.txt").write_text(log, encoding="utf-8")
    starts = [{"start_step": 0, "arguments": ["config/x.py", "--prompt=a b"]},
              {"start_step": 10, "arguments": ["config/x.py", "--resume"]}]
    lines = "".join(f"{json.dumps(start)}\n" for start in starts)
    (tmp_path / "runs.jsonl").write_text(lines, encoding="utf-8")
    export_hf(state, tmp_path / "out", tmp_path)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for line in ("# out", "- **Data:** books", "- **Tokens seen:** 10,240 in 20 steps",
                 "- **Validation loss:** 2.3457 nats per token, 1.2500 bits per byte",
                 "- **Command:** `python train_gpt2.py config/x.py '--prompt=a b'`",
                 "- **Made with:** git 1a2b3c4, torch 2.13.0, device H100"):
        assert line in card.splitlines(), card


def test_the_code_of_the_model_card_runs_without_a_warning(exported):
    """In a process of its own: transformers shows some warnings only once."""
    _, folder = exported["own"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = """import transformers
transformers.utils.logging.disable_progress_bar()
for kind in transformers.AutoTokenizer, transformers.GPT2TokenizerFast:
    assert kind.from_pretrained("own").model_max_length == 32
""" + card.partition("```python\n")[2].partition("```")[0]
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], cwd=folder.parent, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("<|endoftext|>Hello"), done.stderr
    assert done.stderr == ""


def test_the_pipeline_generates(exported, transformers, tokenizers):
    state, folder = exported["own"]
    pipeline = transformers.pipeline("text-generation", str(folder))
    pipeline("import heapq", do_sample=False)  # no further than the last position
    found, = pipeline("import heapq", max_new_tokens=8, do_sample=False, return_full_text=False)
    tok = tokenizers["own"]
    idx = torch.tensor(tok.encode("import heapq").astype(np.int64))[None]
    steps = generate(build_model(state, "x"), idx, 8, temperature=0.0)
    ids = torch.cat([token for token, _ in steps]).tolist()
    ids = ids[:ids.index(tok.eot)] if tok.eot in ids else ids
    assert found["generated_text"] == tok.decode(ids)


@pytest.mark.parametrize("heads", [(2, 0, 4), (0, 0, 0)])
def test_pruned_heads_become_zeros(tmp_path, transformers, tokenizers, heads):
    state = random_state(tokenizers["bytes"], n_layer=3, n_head=4, heads=heads)
    note, = export_hf(state, tmp_path / "out")
    assert f"{12 - sum(heads)} of 12 heads are pruned" in note
    idx = torch.randint(0, 257, (2, 32))
    wanted = logits(build_model(state, "x"), idx)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(theirs, idx), wanted, rtol=0, atol=1e-5)
    again = import_hf(tmp_path / "out")
    assert again["model_config"]["heads"] is None
    torch.testing.assert_close(logits(build_model(again, "x"), idx), wanted, rtol=0, atol=1e-5)


def test_post_ln_is_refused(tmp_path, tokenizers):
    with pytest.raises(UserError, match=r"Post-LN.*normalises before each block"):
        export_hf(random_state(tokenizers["bytes"], norm_position="post"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class RMSNorm(torch.nn.RMSNorm):
    def __init__(self, width, bias=True):
        super().__init__(width)
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return super().forward(x) + getattr(self, "bias", 0)


@pytest.mark.parametrize(("name", "change", "words"), [
    ("gelu", lambda x: x.relu().square(), "other logits"),
    ("nn.LayerNorm", RMSNorm, "other logits"),
    ("nn.LayerNorm", functools.partial(RMSNorm, bias=False), r"h\.0\.ln_1\.bias: missing, GPT-2 has \(16,\)"),
    ("Linear", functools.partial(Linear, bias=False), r"h\.0\.attn\.c_attn\.bias: missing"),
])
def test_a_changed_model_is_refused(tmp_path, tokenizers, monkeypatch, name, change, words):
    """By its tensors, or by a forward pass: transformers would compute something else with them."""
    monkeypatch.setattr(f"model.{name}", change)
    state = random_state(tokenizers["bytes"])
    with pytest.raises(UserError, match=f"{words}.*undo the change"):
        export_hf(state, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused(tmp_path, tokenizers):
    state = random_state(tokenizers["bytes"])
    (tmp_path / "mine").mkdir()
    export_hf(state, tmp_path / "mine")  # empty: as good as new
    before = files_of(tmp_path / "mine")
    with pytest.raises(UserError, match=r"not empty.*--out_dir=ANOTHER"):
        export_hf(state, tmp_path / "mine")
    assert files_of(tmp_path / "mine") == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from convert_hf import export_hf
from checkpoint import load_checkpoint
state, out, fsync, at = load_checkpoint(sys.argv[1]), Path(sys.argv[2]), os.fsync, 0
while True:
    def killed(file, left=[at]):
        fsync(file)
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    if os.fork() == 0:
        os.fsync = killed
        export_hf(state, out)
        os._exit(0)
    code = os.wait()[1]
    print(code, out.exists(), flush=True)
    if out.exists():
        break
    at += 1
"""


def test_a_folder_that_cannot_be_synced_is_exported(tmp_path, exported, monkeypatch):
    """Some network and FUSE file systems refuse fsync of folders, which must not cost the export."""
    state, folder = exported["bytes"]
    fsync = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    export_hf(state, tmp_path / "out")
    assert files_of(tmp_path / "out", "README.md") == files_of(folder, "README.md")


def test_an_export_that_fails_leaves_nothing(tmp_path, exported, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*out.*check the permissions"):
        export_hf(exported["bytes"][0], tmp_path / "file" / "out")

    def write(path, data):
        if path.name == "vocab.json":
            raise UserError("no space")
        path.write_bytes(data)

    monkeypatch.setattr(convert_hf, "write_atomically", write)
    with pytest.raises(UserError, match="no space"):
        export_hf(exported["bytes"][0], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_export_needs_a_name_and_leaves_other_folders_alone(tmp_path, exported, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"out_dir=\. .*choose a new folder"):
        export_hf(exported["bytes"][0], ".")
    Path("out.incomplete").mkdir()
    export_hf(exported["bytes"][0], "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.incomplete"]


def test_a_second_export_to_the_same_folder_is_refused(tmp_path, exported):
    with locked(tmp_path, "conversion", name=".out.convert_hf.incomplete.lock"):
        with pytest.raises(UserError, match="conversion is at work"):
            export_hf(exported["bytes"][0], tmp_path / "out")
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_export_leaves_nothing_that_looks_complete(tmp_path, exported):
    """Killed after each write in turn: no folder until all is written; the next export clears up."""
    state, folder = exported["bytes"]
    path = save_checkpoint(tmp_path, 7, state)
    done = subprocess.run([sys.executable, "-c", KILLED, path, tmp_path / "out"], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)
    lines = done.stdout.splitlines()  # two for each of nine files: the file, then the name in its folder
    assert lines[:-1] == ["9 False"] * 18 and lines[-1].endswith("True"), done
    assert files_of(tmp_path / "out", "README.md") == files_of(folder, "README.md")
    shutil.rmtree(tmp_path / "out")
    export_hf(state, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt_0000007.pt", "out"]


# ---- tokenizers ----------------------------------------------------------------


@pytest.fixture(scope="module")
def their_tokenizers(exported, transformers, tmp_path_factory):
    """{kind: [from tokenizer.json, from vocab.json and merges.txt alone]}"""
    found = {}
    for kind, (_, folder) in exported.items():
        bare = tmp_path_factory.mktemp(kind)
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(folder / name, bare)
        found[kind] = [transformers.GPT2TokenizerFast.from_pretrained(path) for path in (folder, bare)]
    return found


@pytest.mark.parametrize("kind", ["gpt2", "own", "bytes"])
def test_their_tokenizer_gives_our_ids(their_tokenizers, tokenizers, kind, exported):
    tok = tokenizers[kind]
    source = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8")
    for theirs in their_tokenizers[kind]:
        assert theirs.is_fast
        for text in [*TEXTS, source]:
            assert theirs(text)["input_ids"] == tok.encode(text).tolist()
            assert theirs.decode(theirs(text)["input_ids"]) == text
        assert theirs("a<|endoftext|>b")["input_ids"] == [*tok.encode("a"), tok.eot, *tok.encode("b")]
        assert theirs.eos_token_id == theirs.bos_token_id == tok.eot and len(theirs) == tok.n_vocab
        assert theirs.decode([tok.eot], skip_special_tokens=True) == ""
    assert their_tokenizers[kind][0].model_max_length == 32
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(exported[kind][1] / "tokenizer.json"))  # without tokenizer_config.json
    ids = plain.encode("a<|endoftext|>b").ids
    assert tok.eot in ids and plain.decode(ids) == "ab"


@settings(max_examples=80, deadline=None)
@given(text=st.text() | st.text("ab \n\t'slEé1.#東🎉_", max_size=60))
def test_their_tokenizer_gives_our_ids_for_any_text(their_tokenizers, tokenizers, text):
    for kind, tok in tokenizers.items():
        for theirs in their_tokenizers[kind]:
            if "<|endoftext|>" not in text:
                assert theirs(text)["input_ids"] == tok.encode(text).tolist()


SINGLE = [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize("token", [b"wxyz", b"<|endoftext|>"])
def test_a_vocabulary_that_merges_cannot_express_is_refused(tmp_path, token):
    """A part may have a higher rank than its token; wxyz is made by no merge and only looked up."""
    tokens = [*SINGLE, b"abcd", b"abc", b"ab", token, b"bc", b"aa", b"aaa"]
    assert derive_merges(tokens) == [(b"abc", b"d"), (b"ab", b"c"), (b"a", b"b"), (b"b", b"c"), (b"a", b"a"),
                                     (b"aa", b"a")]
    with pytest.raises(UserError, match="vocabulary odd has tokens that no merge makes, or a rank for <"):
        export_hf(random_state(tokenizer_from_ranks(rank_file(tokens), "odd")), tmp_path / "out")


@settings(max_examples=40, deadline=None)
@given(more=st.lists(st.text("ab", min_size=2, max_size=5), unique=True, max_size=12),
       texts=st.lists(st.text("abc", max_size=24), max_size=8))
def test_merges_of_any_vocabulary(more, texts):
    """Against `tokenizers` with the derived merges: any tokens in any order."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    tokens = [*SINGLE, *(text.encode() for text in more)]
    tok = tokenizer_from_ranks(rank_file(tokens), "any")
    vocab = {token.decode("latin-1"): i for i, token in enumerate(tokens)}
    merges = [(left.decode("latin-1"), right.decode("latin-1")) for left, right in derive_merges(tokens)]
    theirs = Tokenizer(BPE(vocab, merges, ignore_merges=True))
    for text in texts:
        assert theirs.encode(text).ids == tok.encode(text).tolist()


# ---- in ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "own", "bytes"])
def test_back_in_bit_by_bit(exported, tmp_path, kind, tokenizers):
    state, folder = exported[kind]
    again = load_any(folder)
    n_vocab = state["model_config"]["n_vocab"]
    assert again["model_config"] == state["model_config"] | {"vocab_size": n_vocab, "dropout": 0.0}
    assert again["model"].keys() == state["model"].keys()
    for name, tensor in state["model"].items():
        tensor = tensor[:n_vocab] if name in ("transformer.wte.weight", "lm_head.weight") else tensor
        assert torch.equal(again["model"][name], tensor) and again["model"][name].is_contiguous(), name
    assert again["model"]["lm_head.weight"] is again["model"]["transformer.wte.weight"]
    assert checkpoint_tokenizer(again).tokens == tokenizers[kind].tokens
    assert again["tokenizer"]["sha256"] == state["tokenizer"]["sha256"]
    assert (again["tokenizer"]["rank_file"] is None) == (kind == "gpt2")
    export_hf(again, tmp_path / "again")
    before, after = (files_of(one, "README.md") for one in (folder, tmp_path / "again"))
    if state["model_config"]["dropout"]:  # of training: not a property of the weights that come in
        before["config.json"] = before["config.json"].replace(b"0.1", b"0.0")
    assert after == before


@pytest.fixture(scope="module")
def theirs(transformers, tmp_path_factory, exported):
    """(folder that transformers wrote, its logits for idx, idx), with the tokenizer `own`."""
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=600, n_positions=24, n_embd=24, n_layer=2, n_head=3, initializer_range=0.3)).eval()
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    transformers.GPT2TokenizerFast.from_pretrained(exported["own"][1]).save_pretrained(folder)
    shutil.copy(exported["own"][1] / "tokenizer.tiktoken", folder)
    idx = torch.randint(0, 600, (2, 24))
    return folder, logits(model, idx), idx


@pytest.fixture
def folder(theirs, tmp_path):
    """A copy of their folder, to change."""
    return Path(shutil.copytree(theirs[0], tmp_path / "folder"))


def rewrite(folder, change):
    """Change the tensors of a folder: `change` takes {name: tensor}, and returns others or nothing."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def close_to(folder, theirs, atol=1e-5):
    torch.testing.assert_close(logits(build_model(import_hf(folder), "x"), theirs[2]), theirs[1], rtol=0,
                               atol=atol)


def with_buffers(folder):
    def add(tensors):
        for i in range(2):
            tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.uint8)
            tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    rewrite(folder, add)


def without_prefix(folder):
    rewrite(folder, lambda tensors: {name.removeprefix("transformer."): tensor
                                     for name, tensor in tensors.items()})


def other_names(folder):
    set_json(folder / "config.json", activation_function="gelu_pytorch_tanh", n_inner=96)


@pytest.mark.parametrize("change", [lambda folder: None, with_buffers, without_prefix, other_names])
def test_what_transformers_saves_comes_in(folder, theirs, tokenizers, change):
    """With the buffers of old versions, the names of a bare GPT2Model, and other words for the same too."""
    change(folder)
    close_to(folder, theirs)
    assert import_hf(folder)["tokenizer"]["sha256"] == tokenizers["own"].sha256


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(folder, theirs, dtype):
    rewrite(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    state = import_hf(folder)
    assert {tensor.dtype for tensor in state["model"].values()} == {torch.float32}
    wanted = load_file(folder / "model.safetensors")["transformer.wte.weight"].float()
    assert torch.equal(state["model"]["lm_head.weight"], wanted)


def test_sharded_safetensors(folder, theirs, transformers):
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    close_to(folder, theirs)
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    older = shutil.copy(lost, folder / "model-00001-of-00099.safetensors")
    with pytest.raises(UserError, match=r"safetensors: .* is in another file too; remove those"):
        import_hf(folder)
    Path(older).unlink()
    lost.unlink()
    with pytest.raises(UserError, match=r"tensors are not GPT-2's: .* missing"):
        import_hf(folder)


def test_a_padded_wte_keeps_its_rows(folder, theirs):
    """The ids beyond the tokenizer's are padding, as in our own models."""
    rewrite(folder, lambda tensors: tensors | {
        "transformer.wte.weight": torch.cat((tensors["transformer.wte.weight"], torch.randn(8, 24)))})
    set_json(folder / "config.json", vocab_size=608)
    config = import_hf(folder)["model_config"]
    assert (config["vocab_size"], config["n_vocab"]) == (608, 600)
    close_to(folder, theirs)


@pytest.mark.parametrize(("setting", "words"), [
    ({"model_type": "gpt_neo"}, "config.json, model_type: 'gpt_neo', wanted gpt2; only models of GPT-2's"),
    ({"model_type": ["gpt2"]}, "model_type"),
    ({"activation_function": "relu"}, "activation_function: 'relu', wanted gelu_new or gelu_pytorch_tanh"),
    ({"activation_function": "gelu"}, "activation_function: 'gelu'"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon: 1e-06, wanted 1e-05"),
    ({"n_inner": 48}, r"n_inner: 48, wanted null or 96"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True, wanted False"),
    ({"scale_attn_weights": False}, "scale_attn_weights: False, wanted True"),
    ({"add_cross_attention": True}, "add_cross_attention: True, wanted False"),
    ({"n_layer": "two"}, "n_layer: 'two', wanted a whole number, 1 to 1,000"),
    ({"n_head": 0}, "n_head: 0, wanted a whole number, 1 to"),
    ({"n_positions": None}, "n_positions: None, wanted a whole number"),
    ({"n_layer": 2147483648}, "n_layer: 2147483648, wanted a whole number, 1 to 1,000"),  # before any memory
    ({"n_head": 5}, "n_head=5"),
    ({"vocab_size": 599}, "vocab_size=599, but .* needs 600 to 1024 rows"),
    ({"vocab_size": 1025}, "vocab_size=1025, but .* needs 600 to 1024 rows"),
    ({"vocab_size": 601}, r"wte.weight: \(600, 24\), GPT-2 has \(601, 24\)"),
    ({"n_positions": 25}, r"wpe.weight: \(24, 24\), GPT-2 has \(25, 24\)"),
    ({"n_layer": 1}, r"h\.1\.attn\.c_attn\.bias: \(72,\), GPT-2 has none"),
    ({"n_layer": 3}, r"12 tensors are .* h\.2\.attn\.c_attn\.bias: missing, GPT-2 has \(72,\)"),
])
def test_another_model_is_refused(folder, setting, words):
    set_json(folder / "config.json", **setting)
    with pytest.raises(UserError, match=words):
        import_hf(folder)


def test_tensors_are_named(folder):
    def spoil(tensors):
        for name in ("transformer.ln_f.bias", "transformer.h.1.mlp.c_proj.weight"):
            del tensors[name]
        tensors["transformer.h.0.adapter.weight"] = torch.zeros(3)
        tensors["score.weight"] = torch.zeros(2, 24)
        tensors["transformer.h.0.attn.c_attn.weight"] = torch.zeros(72, 24)
    rewrite(folder, spoil)
    with pytest.raises(UserError) as error:
        import_hf(folder)
    for words in ("5 tensors are not GPT-2's", "ln_f.bias: missing, GPT-2 has (24,)",
                  "h.1.mlp.c_proj.weight: missing, GPT-2 has (96, 24)",
                  "h.0.adapter.weight: (3,), GPT-2 has none", "score.weight: (2, 24), GPT-2 has none",
                  "h.0.attn.c_attn.weight: (72, 24), GPT-2 has (24, 72)"):
        assert words in str(error.value)


@pytest.mark.parametrize(("name", "tensor", "words"), [
    ("lm_head.weight", torch.ones(600, 24), "lm_head.weight is not wte"),
    ("transformer.ln_f.bias", torch.zeros(24, dtype=torch.float64), "ln_f.bias is torch.float64; convert"),
    ("transformer.wte.weight", torch.zeros(599, 24), r"wte.weight: \(599, 24\), GPT-2 has \(600, 24\)"),
    ("transformer.ln_f.bias", torch.full((24,), math.nan), "nan or infinity in 1 tensors, first in ln_f"),
])
def test_wrong_tensors_are_refused(folder, name, tensor, words):
    rewrite(folder, lambda tensors: tensors | {name: tensor})
    with pytest.raises(UserError, match=words):
        import_hf(folder)


def test_a_cut_and_a_missing_file(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model.safetensors: corrupt"):
        import_hf(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model.safetensors; .* a .bin, .*save_pretrained"):
        import_hf(folder)


# ---- vocabularies that come in -------------------------------------------------


def test_another_vocabulary_than_gpt2s_needs_the_rank_file(folder, exported, tokenizers):
    """tokenizer.json or vocab.json tells whether it is GPT-2's."""
    assert import_hf(folder)["tokenizer"]["sha256"] == tokenizers["own"].sha256
    (folder / "tokenizer.tiktoken").unlink()
    for name in ("tokenizer.json", "vocab.json"):
        shutil.copy(exported["own"][1] / name, folder)
        with pytest.raises(UserError, match=rf"{name}: not GPT-2's vocabulary, .*copy tokenizer.tiktoken"):
            import_hf(folder)
        (folder / name).unlink()
    with pytest.raises(UserError, match="vocab_size=600, but gpt2 needs 50257 to 51200 rows"):
        import_hf(folder)


@pytest.mark.parametrize("kept", [[], ["vocab.json"], ["tokenizer.json"]])
def test_without_the_rank_file_it_is_gpt2s(exported, tmp_path, kept):
    for name in ["config.json", "model.safetensors", *kept]:
        shutil.copy(exported["gpt2"][1] / name, tmp_path)
    assert import_hf(tmp_path)["tokenizer"] == describe_tokenizer(load_tokenizer("gpt2"))


CORRUPT = [  # test_formats.py tries every name and value
    ("config.json", "{", r"config.json: not valid JSON"), ("config.json", "[" * 100_000, "not valid JSON"),
    ("config.json", '{"model_type": "gpt2"}', "config.json: n_layer is missing"),
    ("config.json", b"\xff\xfe{\0}\0", "is UTF-16"), ("config.json", b'{"\xe9": 1}', "is not UTF-8"),
    ("tokenizer.json", {"model": {"vocab": {"a": "0"}}}, "vocab, a: '0'"),
    ("tokenizer.json", {"model": {"vocab": {}}}, "not the vocabulary of tokenizer.tiktoken"),
    ("tokenizer.json", {"added_tokens": [{"id": 600, "content": "<pad>"}]}, "not the vocabulary of"),
    ("vocab.json", '{"a": null}', "vocab.json, a: None"),
    ("tokenizer.tiktoken", b"AA== 1\n", "line 1.*the next rank is 0"),
    ("tokenizer.tiktoken", rank_file(SINGLE), "not the vocabulary of tokenizer.tiktoken beside it"),
]


@pytest.mark.parametrize(("name", "content", "words"), CORRUPT,
                         ids=[f"{name}-{i}" for i, (name, *_) in enumerate(CORRUPT)])
def test_a_corrupt_file_of_a_folder_is_named(folder, name, content, words):
    path = folder / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text(encoding="utf-8")) | content)
    if name == "vocab.json":
        (folder / "tokenizer.json").unlink()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        load_any(folder)


# ---- checkpoints of nanoGPT and build-nanogpt --------------------------------------


class GPTConfig_of_build_nanogpt:
    """What its checkpoints pickle, as __main__.GPTConfig."""

    def __init__(self, **fields):
        self.__dict__.update(fields)

    def __setstate__(self, fields):
        raise AssertionError("code of the checkpoint was run")


GPTConfig_of_build_nanogpt.__qualname__ = GPTConfig_of_build_nanogpt.__name__ = "GPTConfig"
GPTConfig_of_build_nanogpt.__module__ = "__main__"


@pytest.fixture(scope="module")
def peers(transformers, tmp_path_factory):
    """{kind: (checkpoint, idx, logits)}; the oracle is transformers' GPT-2 with the peer's GELU.

    The names of the files say nothing about what is in them.
    """
    folder, found = tmp_path_factory.mktemp("peers"), {}
    shape = {"n_layer": 2, "n_head": 3, "n_embd": 24, "vocab_size": 50304}
    for kind, name, rows, gelu in (("nanoGPT", "model.bin", 50304, "gelu"),
                                   ("without biases", "weights.ckpt", 50257, "gelu"),
                                   ("build-nanogpt", "model_19072", 50304, "gelu_new")):
        torch.manual_seed(3)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_positions=32, activation_function=gelu, initializer_range=0.1,
            **shape | {"vocab_size": rows})).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("bias"):
                    parameter.normal_(std=0.1).mul_(kind != "without biases")
        weights = {key: tensor.T.contiguous() if key.endswith(convert_hf.CONV1D) else tensor
                   for key, tensor in model.state_dict().items()}
        args = {**shape, "block_size": 32, "vocab_size": rows}
        if kind == "without biases":  # of a compiled model, with torch < 2's mask among the tensors
            weights = {f"_orig_mod.{key}": tensor for key, tensor in weights.items()
                       if not key.endswith("bias")}
            weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        if kind == "build-nanogpt":
            saved = {"model": weights, "config": GPTConfig_of_build_nanogpt(**args), "step": 19072,
                     "val_loss": 3.0}
        else:
            args |= {"bias": kind == "nanoGPT", "dropout": 0.1}
            optimizer = torch.optim.AdamW(model.parameters())
            saved = {"model": weights, "optimizer": optimizer.state_dict(), "model_args": args, "iter_num": 5,
                     "best_val_loss": torch.tensor(3.0), "config": {"out_dir": "out", "device": "cuda"}}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules["__main__"], "GPTConfig", GPTConfig_of_build_nanogpt, raising=False)
            torch.save(saved, folder / name)
        idx = torch.randint(0, 50257, (2, 32))
        found[kind] = folder / name, idx, logits(model, idx)[..., :50257]
    return found


@pytest.mark.parametrize("kind", ["nanoGPT", "without biases", "build-nanogpt"])
def test_a_peers_checkpoint_has_the_peers_logits(peers, kind, monkeypatch, capsys):
    """With its GELU to the last digits; with ours, nanoGPT's differ by what a note says."""
    path, idx, wanted = peers[kind]
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", GPTConfig_of_build_nanogpt, raising=False)
    state = load_any(path)
    note = capsys.readouterr().err
    model = build_model(state, "x")
    got = logits(model, idx)
    if kind != "build-nanogpt":
        assert "the logits change by up to about 1e-3" in note
        assert 1e-5 < (got - wanted).abs().max() < 2e-3
        monkeypatch.setattr("model.gelu", torch.nn.functional.gelu)
        got = logits(model, idx)
    else:
        assert note == ""
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert state["tokenizer"] == describe_tokenizer(load_tokenizer("gpt2")) and "optimizers" not in state
    assert state["provenance"] == {"imported_from": str(path)}
    assert state["model_config"]["dropout"] == 0 and state["model_config"]["n_vocab"] == 50257


def test_the_script_takes_a_peers_checkpoint_both_ways(peers, monkeypatch, capsys, tmp_path):
    path, _, _ = peers["nanoGPT"]
    run_main(monkeypatch, source=path, out_dir=tmp_path / "log")
    assert "2 layers, 3 heads, width 24, context of 32" in capsys.readouterr().out
    run_main(monkeypatch, checkpoint=path, out_dir=tmp_path / "hf")
    ours, theirs = load_checkpoint(tmp_path / "log"), import_hf(tmp_path / "hf")
    for name, tensor in theirs["model"].items():
        assert torch.equal(tensor, ours["model"][name][:len(tensor)]), name


def changed(peers, tmp_path, change, kind="nanoGPT"):
    """A peer's checkpoint after `change`, which takes the dict in it."""
    saved = torch.load(peers[kind][0], weights_only=True)
    change(saved)
    torch.save(saved, tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt"


@pytest.mark.parametrize(("change", "words"), [
    (lambda saved: saved["model_args"].update(vocab_size=65), "vocab_size=65, but gpt2 needs 50257 to 51200"),
    (lambda saved: saved["model_args"].update(vocab_size=128256), "vocab_size=128256, but gpt2 needs"),
    (lambda saved: saved["model_args"].update(use_rmsnorm=True), "use_rmsnorm: only GPT-2's architecture"),
    (lambda saved: saved["model_args"].update(n_layer=2147483648), "n_layer: 2147483648, wanted a"),
    (lambda saved: saved["model_args"].update(n_layer="2"), "n_layer: '2', wanted a whole number"),
    (lambda saved: saved["model_args"].pop("n_head"), "model_args: n_head is missing"),
    (lambda saved: saved["model_args"].update(n_layer=3), r"h\.2\.attn\.c_attn\.weight: missing"),
    (lambda saved: saved.update(model_args=[1]), "wanted an object"),
    (lambda saved: saved.update(model=[1]), "model: .*wanted an object"),
    (lambda saved: saved["model"].update({"lm_head.weight": torch.zeros(50304, 24)}),
     "lm_head.weight is not wte"),
    (lambda saved: saved["model"].pop("transformer.ln_f.bias"), r"ln_f.bias: missing, GPT-2 has \(24,\)"),
    (lambda saved: saved["model"].update({"transformer.h.0.attn.c_attn.weight": torch.zeros(24, 72)}),
     r"c_attn.weight: \(24, 72\), GPT-2 has \(72, 24\)"),
    (lambda saved: saved["model"].update({"transformer.ln_f.bias": "x"}), "ln_f.bias: 'x', wanted Tensor"),
    (lambda saved: [saved.pop(key) for key in ("model_args", "config")], "not a checkpoint of train_gpt2.py"),
])
def test_another_peers_checkpoint_is_refused(peers, tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        load_any(changed(peers, tmp_path, change))


def test_a_flipped_bit_of_a_peers_checkpoint_is_noticed(peers, tmp_path):
    data = bytearray(peers["nanoGPT"][0].read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "ckpt.pt").write_bytes(data)
    with pytest.raises(UserError, match=r"corrupt, .*the checksum of .* is wrong"):
        load_any(tmp_path / "ckpt.pt")
    (tmp_path / "ckpt.pt").write_bytes(data[:-1000])
    with pytest.raises(UserError, match="corrupt, or not a checkpoint"):
        load_any(tmp_path / "ckpt.pt")


class Runs:
    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


def test_no_code_of_a_peers_checkpoint_is_run(peers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = changed(peers, tmp_path, lambda saved: saved.update(config=Runs()))
    with pytest.raises(UserError, match="refused, it holds more than tensors and plain values"):
        load_any(path)
    assert not (tmp_path / "code_was_run").exists()


# ---- which model is meant ------------------------------------------------------


def test_paths_without_a_model(tmp_path, exported):
    hf, empty = exported["bytes"][1], tmp_path / "empty"
    empty.mkdir()
    for path in (tmp_path / "missing", empty, hf / "model.safetensors", hf / "config.json"):
        with pytest.raises(UserError, match=r"not there or not a model; .*one of gpt2, .* or a checkpoint"):
            load_any(path)
    torch.save({"wte.weight": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"not a checkpoint of .*save_pretrained"):
        load_any(tmp_path / "pytorch_model.bin")


def test_a_folder_called_gpt2(tmp_path, exported, monkeypatch):
    """A folder of that name that holds a model takes precedence; one without is ignored."""
    asked = []

    def download(repo, name):
        asked.append((repo, name))
        return exported["gpt2"][1] / name

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert load_any("gpt2")["provenance"] == {"imported_from": "hub: openai-community/gpt2"}
    assert asked == [("openai-community/gpt2", "config.json"), ("openai-community/gpt2", "model.safetensors")]
    shutil.copytree(exported["own"][1], tmp_path / "gpt2", dirs_exist_ok=True)
    assert load_any("gpt2")["model_config"]["n_vocab"] == 600 and len(asked) == 2
    assert load_any("openai-community/gpt2")["model_config"]["n_vocab"] == 50257
    shutil.rmtree(tmp_path / "gpt2")
    (tmp_path / "gpt2").mkdir()
    save_checkpoint(tmp_path / "gpt2", 0, load_any("openai-community/gpt2"))
    assert load_any("gpt2")["provenance"] and len(asked) == 6  # it came from the file


def test_offline_says_what_to_type(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"(?s)cannot fetch openai-community/gpt2-xl.*HF_HUB_OFFLINE.*"
                                        r"HF_ENDPOINT.*put config.json and model.safetensors"):
        load_any("gpt2-xl")


def test_no_password_of_a_mirror_is_printed(monkeypatch, capsys):
    """HF_ENDPOINT and HTTPS_PROXY may hold one, and the network's errors quote them."""
    def download(repo, name):
        raise ConnectionError(f"no route to {constants.ENDPOINT}/{repo}")

    monkeypatch.setattr(hub, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(constants, "ENDPOINT", "https://user:password@mirror.example")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match=r"from https://mirror.example: ") as caught:
        load_any("openai-community/gpt2-xl")
    printed = capsys.readouterr().err
    assert "no route to https://mirror.example/openai-community/gpt2-xl; attempt 2 of 2" in printed
    assert "password" not in printed + str(caught.value)


# ---- the script ----------------------------------------------------------------

WITHOUT = f"import sys; sys.modules['transformers'] = sys.modules['tokenizers'] = None; {RUN_THE_REST}"


def test_by_name_from_the_hub_without_transformers(tmp_path, exported):
    """A loopback hub that fails once; the checkpoint that comes of it generates, and is no run to resume."""
    state, folder = exported["gpt2"]
    files = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    with HubServer(files, repo="openai-community/gpt2-medium", prefix="") as server:
        server.faults.append(Fault("status", method="HEAD"))
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"),
                       "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [PYTHON, "-c", WITHOUT, ROOT / "convert_hf.py", "--source=gpt2-medium",
             "--out_dir=log_medium"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    log_dir = tmp_path / "log_medium"
    assert "GPT-2, 811," in done.stdout and "2 layers, 2 heads, width 16, context of 32" in done.stdout
    assert "try it: python generate.py --checkpoint=log_medium" in done.stdout
    model, again = load_model(log_dir)
    assert again["provenance"] == {"imported_from": "hub: openai-community/gpt2-medium"}
    idx = torch.randint(0, 50257, (1, 16))
    assert torch.equal(logits(model, idx), logits(build_model(state, "x"), idx))
    done = subprocess.run(
        [PYTHON, ROOT / "generate.py", "--checkpoint=log_medium", "--prompt=Hello",
         "--max_new_tokens=4", "--device=cpu"],
        cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith(b"--- step 0, sample 1 of 2\nHello"), done.stderr
    with pytest.raises(UserError, match=r"no run to resume.*--init_from="):
        load_into(log_dir, model, [], lambda values: None)


def run_main(monkeypatch, **flags):
    for key in ("source", "checkpoint", "out_dir"):
        monkeypatch.setattr(convert_hf, key, str(flags.get(key, "")))
    convert_hf.main()


def test_the_script_both_ways(tmp_path, monkeypatch, capsys, tokenizers):
    """With the model card from the run's folder."""
    state = random_state(tokenizers["bytes"], 384, heads=(2, 1))
    save_checkpoint(tmp_path, 7, state | {"config": {
        "data_dir": "x", "seed": 1, "block_size": 32, "batch_tokens": 64, "val_tokens": 64}})
    (tmp_path / "runs.jsonl").write_text('{"start_step": 0, "arguments": ["--seed=1"]}\n', encoding="utf-8")
    run_main(monkeypatch, checkpoint=tmp_path, out_dir=tmp_path / "out dir")
    out = capsys.readouterr().out
    assert "1 of 4 heads are pruned" in out and "bytes, 257 ids" in out
    assert shlex.split(out.partition("try it: ")[2])[2] == f"--checkpoint={tmp_path / 'out dir'}"
    card = (tmp_path / "out dir" / "README.md").read_text(encoding="utf-8")
    assert "`python train_gpt2.py --seed=1`" in card and "448 in 7 steps" in card
    run_main(monkeypatch, source=tmp_path / "out dir", out_dir=tmp_path / "log")
    dense = load_checkpoint(tmp_path / "log")
    assert f" {count(tmp_path / 'out dir'):,} parameters" in capsys.readouterr().out
    assert dense["model_config"]["heads"] is None


def test_weights_that_are_not_finite_are_not_converted(tmp_path, monkeypatch, tokenizers):
    state = random_state(tokenizers["bytes"])
    state["model"]["transformer.h.0.ln_1.weight"][3] = float("inf")
    save_checkpoint(tmp_path, 7, state)
    with pytest.raises(UserError, match=r"in 1 tensors, first in transformer.h.0.ln_1.weight \(1 of 16 "):
        run_main(monkeypatch, checkpoint=tmp_path, out_dir=tmp_path / "new")

    assert not (tmp_path / "new").exists()


def test_wrong_flags(tmp_path, monkeypatch, exported, tokenizers):
    save_checkpoint(tmp_path, 7, random_state(tokenizers["bytes"]))
    hf, new = exported["bytes"][1], tmp_path / "new"
    for flags, words in [
        ({}, "give --source or --checkpoint, and --out_dir"), ({"source": hf}, "and --out_dir"),
        ({"out_dir": new}, "give --source or"),
        ({"source": hf, "checkpoint": tmp_path, "out_dir": new}, "give --source or --checkpoint"),
        ({"source": tmp_path, "out_dir": new}, "train_gpt2.py already; to export it, type --checkpoint="),
        ({"checkpoint": tmp_path, "out_dir": hf}, r"not empty; .*--out_dir=ANOTHER"),
        ({"source": hf, "out_dir": tmp_path}, r"not empty; .*--out_dir=ANOTHER"),
        ({"source": "gpt3", "out_dir": new}, "gpt3: not there or not a model"),
        ({"checkpoint": "nosuch", "out_dir": new}, "nosuch: not there or not a model"),
    ]:
        with pytest.raises(UserError, match=words):
            run_main(monkeypatch, **flags)
        assert not new.exists()
