"""HellaSwag: scores against one example at a time, the texts of both protocols, bad files."""

import hashlib
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hub_server import Fault, HubServer
from training import ENVIRONMENT, ROOT, command

import hellaswag
import hub
from bpe import load_tokenizer
from checkpoint import describe_model, describe_tokenizer, save_checkpoint
from configurator import UserError
from device import resolve_device
from hellaswag import Example, Examples, clean_wikihow, evaluate, make_batches, make_rows, read_examples
from kernels import plain_attention
from model import GPT, GPTConfig
from ranks import Ranks

VOCAB = 257


def record(**changes):
    return {"ind": 4, "activity_label": "High jump", "ctx_a": "A boy runs.", "ctx_b": "the Boy",
            "ctx": "A boy runs. the Boy", "label": 2,
            "endings": ["sits.", "jumps over a bar.", "flies away.", "is a bar."], **changes}


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def sharp_model(**config):
    """A random model whose scores differ clearly from ending to ending."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{"block_size": 64, "vocab_size": 384, "n_vocab": VOCAB, "n_layer": 2, "n_head": 4,
                             "n_embd": 32, **config}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_examples(n, longest, protocol="completion"):
    """Contexts and endings of up to `longest` tokens; two endings of every fourth example are equal."""
    rng = np.random.default_rng(0)

    def text():
        return rng.integers(0, VOCAB, rng.integers(1, longest + 1))

    items = []
    for i in range(n):
        endings = [text() for _ in range(4)]
        if i % 4 == 0:
            endings[3] = endings[1].copy()
        items.append(Example(text(), endings, rng.integers(1, 40, 4).tolist(), int(rng.integers(4))))
    same = [np.full(length, 5) for length in (100, 3, 6, 9, 70)]  # truncated, only their lengths differ
    items[-1] = Example(same[0], same[1:], [1, 2, 3, 4], 1)
    return Examples(protocol, items, [])


@torch.no_grad()
def one_by_one(model, examples):
    """Log-likelihoods and numbers of scored tokens, (n, 4) each: one ending at a time, by the definition."""
    model.eval()
    T = model.config.block_size
    sums, counts = [], []
    for example in examples.items:
        for ending in example.endings:
            tokens = torch.from_numpy(np.concatenate((example.context, ending)))[-(T + 1):]
            logits, targets = model(tokens[None, :-1])[0, -len(ending):], tokens[1:][-len(ending):]
            scores = logits.double().log_softmax(dim=-1).gather(1, targets[:, None])
            sums.append(scores.sum().item())
            counts.append(len(scores))
    return np.reshape(sums, (-1, 4)), np.reshape(counts, (-1, 4))


@pytest.fixture(scope="module")
def cpu():
    return resolve_device("cpu", "float32")


CONFIGS = {"pre": {}, "post": {"norm_position": "post"}, "pruned": {"heads": (0, 3)},
           "dropout": {"dropout": 0.5}}


@pytest.mark.parametrize("longest", (20, 90))
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_scores_are_those_of_one_example_at_a_time(cpu, config, longest):
    """With 90, most contexts, and some endings by themselves, are longer than the block of 64."""
    model, examples = sharp_model(**config), random_examples(24, longest)
    sums, counts = one_by_one(model, examples)
    characters = np.array([example.characters for example in examples.items])
    labels = [example.label for example in examples.items]
    model.train()
    for forward_tokens, protocol, units in (
            (1, "completion", counts), (300, "harness", characters), (100_000, "completion", counts)):
        result = evaluate(model, examples._replace(protocol=protocol), cpu, forward_tokens)
        np.testing.assert_allclose(result.log_likelihoods, sums, rtol=1e-5)
        for scores, share, error in ((sums, result.acc, result.acc_stderr),
                                     (sums / units, result.acc_norm, result.acc_norm_stderr)):
            right = scores.argmax(1) == labels
            assert share == np.mean(right) and result.n == 24
            assert error == pytest.approx(np.std(right, ddof=1) / math.sqrt(24))
    assert model.training
    model.use_attention(plain_attention)  # gives nan where a query has no keys; torch's gives 0
    np.testing.assert_allclose(evaluate(model, examples, cpu).log_likelihoods, sums, rtol=1e-5)


def test_scores_are_in_the_dtype_of_the_device_and_finite(cpu):
    model, examples = sharp_model(), random_examples(8, 30)
    exact = evaluate(model, examples, cpu).log_likelihoods
    coarse = evaluate(model, examples, resolve_device("cpu", "bfloat16")).log_likelihoods
    assert not np.allclose(exact, coarse, rtol=1e-5)
    np.testing.assert_allclose(exact, coarse, rtol=0.1)
    model.transformer.ln_f.bias.data[0] = np.nan
    with pytest.raises(UserError, match="32 of 32 log-likelihoods are not finite"):
        evaluate(model, examples, cpu)


def test_equal_endings_have_the_same_score_and_the_first_wins(cpu):
    examples = random_examples(24, 20)
    sums = evaluate(sharp_model(), examples, cpu, 300).log_likelihoods
    assert (sums[::4, 1] == sums[::4, 3]).all()
    same = [Example(e.context, [e.endings[0]] * 4, [5] * 4, i % 4) for i, e in enumerate(examples.items)]
    result = evaluate(sharp_model(), Examples("harness", same, []), cpu)
    assert result.acc == result.acc_norm == 0.25


def test_every_process_makes_the_same_number_of_forwards(cpu, monkeypatch):
    """Three processes share a number of batches that is not a multiple of three."""
    model, examples = sharp_model(), random_examples(24, 20)
    batches = make_batches(make_rows(examples.items, 64)[0], 400)
    assert len(batches) > 3 and len(batches) % 3
    alone = evaluate(model, examples, cpu, 400).log_likelihoods
    forwards, parts = [], []
    model.register_forward_hook(lambda *_: forwards.append(rank))
    for name, fake in {"is_initialized": lambda: True, "get_world_size": lambda: 3,
                       "get_rank": lambda: rank, "all_reduce": lambda tensor: None}.items():
        monkeypatch.setattr(torch.distributed, name, fake)
    for rank in range(3):  # noqa: B007, which get_rank reads
        parts.append(evaluate(model, examples, cpu, 400).log_likelihoods)
    assert (sum(parts) == alone).all()  # bit for bit, as the batches are the same
    assert len({forwards.count(rank) for rank in range(3)}) == 1 and len(forwards) < len(batches) + 3


def test_rows_share_the_context_and_batches_stay_within_their_size():
    examples = random_examples(100, 30)
    rows, slots = make_rows(examples.items, block_size=200)
    assert len(rows) == 100  # nothing is truncated
    assert sorted(slot for row in rows for slot in row.slots) == sorted(set(slots.tolist()))
    for row, example in zip(rows, examples.items):
        distinct = {ending.tobytes(): len(ending) for ending in example.endings}
        assert row.length == len(example.context) - 1 + sum(distinct.values())
    batches = make_batches(rows, 500)
    lengths = [row.length for batch in batches for row in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(batch) * batch[0].length <= 500 for batch in batches)
    assert len(batches) < sum(lengths) / 500 * 1.3


# ---- texts and tokens ----------------------------------------------------------


@pytest.mark.parametrize("text, clean", [
    (" plain text ", "plain text"),
    ("How to swim [title] Go in. [step] Breathe", "How to swim. Go in. Breathe"),  # ".  Go" loses one space
    ("[header] How to swim [title] Go in. [step]", " How to swim. Go in. "),
    ("a   b", "a  b"),  # one pass
    ("[a [b] c]", " c]"),
    ("two [substeps] tags[x]", "two tags"),
    ("[not\nclosed]", "[not\nclosed]"),
])
def test_wikihow_tags_are_removed_as_in_the_harness(text, clean):
    assert clean_wikihow(text) == clean


def decoded(path, protocol, tok):
    item, = read_examples(path, tok, protocol).items
    return tok.decode(item.context), [tok.decode(ending) for ending in item.endings], item


def test_texts_of_both_protocols(tmp_path):
    tok = load_tokenizer()
    path = write(tmp_path / "a.jsonl", record(
        activity_label="Swimming", ctx_a="[header] How to swim [title] Go in.", ctx_b="BREATHE [step]",
        ctx="How to swim", endings=["[step] now.", "in  out", "never [title] stop", "é"]))
    context, endings, item = decoded(path, "completion", tok)
    assert (context, item.label) == ("How to swim", 2)
    assert endings == [" [step] now.", " in  out", " never [title] stop", " é"]
    context, endings, item = decoded(path, "harness", tok)
    # the space before the removed [step] moves from the context to the endings
    assert context == "Swimming: How to swim. Go in. Breathe"
    assert endings == ["  " + " now.", "  in out", "  never. stop", "  é"]
    assert item.characters == [5, 6, 11, 1]


def test_protocols_tokenize_as_tiktoken(tmp_path, encoding):
    path = write(tmp_path / "a.jsonl", record(), record(ctx_b="[step]"))  # leaves a space at the end
    encode = encoding.encode_ordinary
    for item in read_examples(path, load_tokenizer(), "completion").items:
        assert item.context.tolist() == encode("A boy runs. the Boy")
        assert [ending.tolist() for ending in item.endings] == [encode(f" {e}") for e in record()["endings"]]
    contexts = ("High jump: A boy runs. The boy", " "), ("High jump: A boy runs.", "  ")
    for item, (context, space) in zip(read_examples(path, load_tokenizer(), "harness").items, contexts):
        assert item.context.tolist() == encode(context)
        for ending, text in zip(item.endings, record()["endings"]):
            assert item.context.tolist() + ending.tolist() == encode(context + space + text)


def test_notes(tmp_path, byte_tokenizer, monkeypatch):
    path = write(tmp_path / "a.jsonl", record(), record())
    tok = load_tokenizer()
    note, = read_examples(path, tok, "harness").notes
    assert "not the public file: not comparable" in note
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert read_examples(path, tok, "harness").notes == []
    note, = read_examples(path, tok, "harness", limit=1).notes
    assert "only the first 1 of 2" in note
    note, = read_examples(path, load_tokenizer(str(byte_tokenizer)), "harness").notes
    assert "bytes" in note and "not GPT-2's" in note
    plain = record()
    del plain["ctx_a"], plain["ctx_b"]
    write(path, plain)
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert read_examples(path, tok, "completion").notes == []
    note, = read_examples(path, tok, "harness").notes
    assert "ctx is used: not comparable" in note
    assert decoded(path, "harness", tok)[0] == "High jump: A boy runs. the Boy"


def without(*keys):
    return {key: value for key, value in record().items() if key not in keys}


BAD = {
    "not JSON": ("{", "not valid JSON"),
    "not UTF-8": (b'{"ctx": "\xff"}', "not valid JSON"),
    "nested too deeply": (b"[" * 100_000, "not valid JSON"),
    "half a character": (record(ctx="a\ud83d"), "not valid JSON"),
    "no object": ("[1]", "line 3: [1], wanted an object"),
    "no ctx": (without("ctx"), "line 3: ctx is missing"),
    "no endings, no label": (without("endings", "label"), "endings is missing"),
    "no activity_label": (without("activity_label"), "activity_label is missing"),
    "ctx_a alone": (without("ctx_b"), "only one of ctx_a and ctx_b"),
    "ctx_b alone": (without("ctx_a"), "only one of ctx_a and ctx_b"),
    "label too high": (record(label=4), "label: 4, wanted a whole number, 0 to 3"),
    "label below 0": (record(label=-1), "label: -1"),
    "label of text": (record(label="4"), "label: '4', wanted a whole number"),
    "no label, as in the test set": (record(label=""), "label: ''"),
    "a list for a label": (record(label=[2]), "label: [2]"),
    "three endings": (record(endings=["a", "b", "c"]), "wanted a list of 4"),
    "a number for an ending": (record(endings=["a", "b", 3, "d"]), "endings, number 3: 3, wanted text"),
    "an empty ending": (record(endings=["a", " ", "c", "d"]), "the context or an ending has no text"),
    "an empty context": (record(ctx=" "), "the context or an ending has no text"),
}


@pytest.mark.parametrize("line, reason", BAD.values(), ids=BAD)
def test_bad_lines_are_reported(tmp_path, line, reason):
    line = json.dumps(line) if isinstance(line, dict) else line
    line = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(record()).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(UserError) as error:
        read_examples(path, load_tokenizer(), "completion")
    assert f"{path}, line 3" in str(error.value) and reason in str(error.value)
    assert "\n" not in str(error.value)
    assert len(read_examples(path, load_tokenizer(), "completion", limit=1).items) == 1


def test_labels_may_be_text_as_in_the_hubs_copy(tmp_path):
    path = write(tmp_path / "a.jsonl", *(record(label=str(i)) for i in range(4)))
    assert [item.label for item in read_examples(path, load_tokenizer(), "completion").items] == [0, 1, 2, 3]


def test_an_ending_of_nothing_but_tags_is_empty_in_harness_and_so_may_be_a_file(tmp_path):
    path = write(tmp_path / "a.jsonl", record(endings=["[step]", "b", "c", "d"]))
    assert read_examples(path, load_tokenizer(), "completion").items
    with pytest.raises(UserError, match=r"line 1: .* an ending has no text for the protocol harness; fix or"):
        read_examples(path, load_tokenizer(), "harness")
    with pytest.raises(UserError, match="no examples"):
        read_examples(write(path), load_tokenizer(), "harness")


# ---- the public file -----------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the public file; the current folder is empty."""
    body = json.dumps(record()).encode() + b"\n"
    with HubServer({"val.jsonl": body}) as server:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(hellaswag, "URL", f"{server.url}/datasets/{server.repo}/resolve/main/val.jsonl")
        monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(body).hexdigest())
        monkeypatch.setattr(hub, "FIRST_WAIT", 0.0)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield server


def find_data(data="", ranks=None):
    return hellaswag.find_data(str(data), ranks or Ranks())


def test_the_public_file_is_downloaded_once(server, tmp_path):
    server.faults += [Fault("drop", after=9)] * 2
    path = find_data()
    assert path.as_posix() == "hellaswag/hellaswag_val.jsonl"
    assert path.read_bytes() == server.files["val.jsonl"]
    assert find_data() == path and len(server.requests) == 3
    assert [p.name for p in (tmp_path / "hellaswag").iterdir()] == ["hellaswag_val.jsonl"]
    assert read_examples(path, load_tokenizer(), "harness").notes == []


@pytest.mark.parametrize("faults, reason", [
    ([Fault("corrupt")], "val.jsonl has sha256 "), ([Fault("status", status=404)], "404"),
    ([Fault("truncate", after=9)] * 3, "complete message body"), ([], "Connection refused")])
def test_a_failed_download_leaves_nothing_and_says_what_to_do(server, tmp_path, faults, reason):
    server.faults += faults
    if not faults:
        server.server.shutdown()
        server.server.server_close()
    with pytest.raises(UserError) as error:
        find_data()
    for text in (reason, hellaswag.URL, "give --data=FILE, or put the public file at hellaswag/"):
        assert text in str(error.value)
    assert not (tmp_path / "hellaswag").exists()


def test_a_failed_write_leaves_nothing(server, tmp_path, monkeypatch):
    def no_rename(*paths):
        raise OSError(13, "Permission denied")

    monkeypatch.setattr("os.replace", no_rename)
    with pytest.raises(UserError, match=r"cannot write .*; give --data=FILE"):
        find_data()
    assert list((tmp_path / "hellaswag").iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_on_one_process_fails_on_all(server, tmp_path, rank):
    """Rank 0 looks first; each rank learns of the other's failure by `gather`."""
    gathered = []

    def gather(mine):
        gathered.append(mine)
        theirs = "" if len(gathered) == 1 + rank else f"rank {1 - rank} cannot read it"
        return [mine, theirs] if rank == 0 else [theirs, mine]

    ranks = SimpleNamespace(master=rank == 0, gather=gather)
    with pytest.raises(UserError, match=f"rank {1 - rank} cannot read it"):
        find_data(write(tmp_path / "own.jsonl", record()), ranks)
    assert gathered == [""] * (2 - rank)
    gathered.clear()
    with pytest.raises(UserError, match="none.jsonl: No such file" if rank == 0 else "rank 0 cannot read it"):
        find_data("none.jsonl", ranks)


def test_an_existing_file_is_not_downloaded(server, tmp_path):
    path = write(tmp_path / "own.jsonl", record())
    assert find_data(path) == path
    with pytest.raises(UserError, match=r"none.jsonl: No such file or directory; give --data=FILE"):
        find_data("none.jsonl")
    (tmp_path / "hellaswag").mkdir()
    write(tmp_path / "hellaswag" / "hellaswag_val.jsonl", record(), record())
    with pytest.raises(UserError, match=rf"_val.jsonl has sha256 .*, not {hellaswag.SHA256}; give --data"):
        find_data()
    assert not server.requests


# ---- the script ----------------------------------------------------------------


def save_model(folder, byte_tokenizer, **config):
    model = sharp_model(**config)
    save_checkpoint(folder, 7, {"step": 7, "model": model.state_dict(), "model_config": describe_model(model),
                                "tokenizer": describe_tokenizer(load_tokenizer(str(byte_tokenizer)))})
    return model


def test_script_alone_and_under_torchrun(tmp_path, byte_tokenizer):
    model = save_model(tmp_path, byte_tokenizer)
    rng = np.random.default_rng(0)
    endings = [["".join(map(chr, rng.integers(97, 123, rng.integers(1, 30)))) for _ in range(4)]
               for _ in range(21)]
    path = write(tmp_path / "a.jsonl", *(record(endings=e, label=i % 4) for i, e in enumerate(endings)))
    flags = {"checkpoint": tmp_path, "data": path, "device": "cpu", "dtype": "float32", "forward_tokens": 400}
    outputs = []
    for processes in (1, 2):
        done = subprocess.run(command(flags, processes, ROOT / "hellaswag.py", python=sys.executable),
                              capture_output=True, text=True, timeout=240,
                              env={**ENVIRONMENT, "PYTHON_EXEC": sys.executable})
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append([line for line in done.stdout.splitlines() if line])
    lines = [[" | ".join(line.split(" | ")[:4]) for line in output[1:]] for output in outputs]
    assert lines[0] == lines[1] and len(lines[0]) == 4  # two scores, two notes, each once
    dev, tok = resolve_device("cpu", "float32"), load_tokenizer(str(byte_tokenizer))
    for line, protocol in zip(lines[0], hellaswag.PROTOCOLS):
        result = evaluate(model, read_examples(path, tok, protocol), dev)
        assert line == hellaswag.format_result(protocol, result)
    assert lines[0][2].startswith("note: ") and lines[0][3].startswith("note: ")


# ---- real data -----------------------------------------------------------------


def test_real_examples(shared_data, cpu, encoding):
    path, tok = shared_data / "hellaswag" / "hellaswag_val.jsonl", load_tokenizer()
    model = sharp_model(block_size=128, vocab_size=50304, n_vocab=50257)
    for protocol in hellaswag.PROTOCOLS:
        examples = read_examples(path, tok, protocol)
        assert len(examples.items) == 10_042
        first = examples.items[0]
        context = "A man is sitting on a roof. he"
        context = "Roof shingle removal: " + context if protocol == "harness" else context
        assert first.context.tolist() == encoding.encode_ordinary(context) and first.label == 3
        assert first.endings[3].tolist() == encoding.encode_ordinary(" starts pulling up roofing on a roof.")
        assert first.characters[3] == len("starts pulling up roofing on a roof.")
        some = examples._replace(items=examples.items[::400])
        result = evaluate(model, some, cpu, 4096)
        np.testing.assert_allclose(result.log_likelihoods, one_by_one(model, some)[0], rtol=1e-5)
