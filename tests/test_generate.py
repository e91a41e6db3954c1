"""The sampling script: prompts, seeds, streaming, scoring a text, and the errors of wrong flags."""

import contextlib
import io
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training import PYTHON, load_model

import decoding
import generate as script
from bpe import load_tokenizer
from checkpoint import describe_model, describe_tokenizer, save_checkpoint
from configurator import UserError
from device import resolve_device
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_tokenizer):
    """A working folder with log_a/ and, newer, log_b/: random models over bytes, context 32."""
    folder = tmp_path_factory.mktemp("generate")
    for i, name in enumerate(("log_a", "log_b")):
        torch.manual_seed(i)
        model = GPT(GPTConfig(block_size=32, vocab_size=384, n_vocab=257, n_layer=2, n_head=2, n_embd=32))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        (folder / name).mkdir()
        path = save_checkpoint(folder / name, i, {
            "step": i, "model": model.state_dict(), "model_config": describe_model(model),
            "tokenizer": describe_tokenizer(load_tokenizer(str(byte_tokenizer)))})
        os.utime(path, (1e9 + i, 1e9 + i))
    return folder


def generate(folder, *flags, stdin=b""):
    """The script as its users start it."""
    return subprocess.run([PYTHON, str(ROOT / "generate.py"), "--device=cpu", *flags], cwd=folder,
                          input=stdin, capture_output=True)


def run(folder, *flags):
    """(what the script writes to stdout, and to stderr), in this process, which has torch already."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True), io.StringIO()
    here = Path.cwd()
    argv, sys.argv = sys.argv, ["generate.py", "--device=cpu", *flags]
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / "generate.py"), run_name="__main__")
    finally:
        os.chdir(here)
        sys.argv = argv
    return out.buffer.getvalue().decode("utf-8"), err.getvalue()  # strict: half a character would raise


def samples(folder, *flags):
    return run(folder, *flags)[0]


def test_the_newest_checkpoint_is_the_default(folder):
    done = generate(folder, "--max_new_tokens=5")
    assert done.returncode == 0 and done.stdout.startswith(b"--- step 1, sample 1 of 2\n"), done.stderr
    assert samples(folder, "--max_new_tokens=5", "--checkpoint=log_a").startswith("--- step 0,")


def test_seeds(folder):
    one, same, other = (samples(folder, f"--seed={seed}") for seed in (1, 1, 2))
    assert one == same != other
    first, second = one.split("--- sample 2 of 2\n")
    assert first.split("\n", 1)[1].strip() != second.strip()


def test_greedy_is_the_same_for_every_seed_and_sample(folder):
    out = samples(folder, "--temperature=0", "--prompt=abc", "--seed=1")
    assert out == samples(folder, "--temperature=0", "--prompt=abc", "--seed=2")
    first, second = out.split("--- sample 2 of 2\n")
    assert first.split("\n", 1)[1] == second  # the streamed sample is printed like the other


def test_prompt_from_flag_file_and_standard_input(folder):
    text = "a = b # naïve: ünïcode\n"
    (folder / "prompt.txt").write_text(text, encoding="utf-8")
    out = samples(folder, f"--prompt={text}")
    assert out.split("\n", 1)[1].startswith(text)
    assert out == samples(folder, "--prompt=FILE:prompt.txt")
    assert out.encode() == generate(folder, "--prompt=-", stdin=text.encode()).stdout


def test_a_prompt_longer_than_the_context_sees_its_end_only(folder):
    """Context 32: of 1 + 60 prompt tokens the model sees those from 32 on; what is before does not matter."""
    out, err = run(folder, "--temperature=0", f"--prompt={'x' * 30}{'y' * 30}", "--num_samples=1")
    assert "the model does not see the first 32" in err
    other, _ = run(folder, "--temperature=0", f"--prompt={'z' * 30}{'y' * 30}", "--num_samples=1")
    assert out.split("y" * 30)[1] == other.split("y" * 30)[1]


def test_prompts_of_a_file_are_one_batch(folder):
    """Each is continued greedily as it is alone, whatever the lengths of the others."""
    lines = ["a", "abc\x0cdef\u2028ghi", "x" * 45]  # these end a line for str.splitlines only
    (folder / "prompts.txt").write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n\r\n").encode())
    flags = ["--temperature=0", "--num_samples=1", "--max_new_tokens=40"]
    out = samples(folder, "--prompts=prompts.txt", *flags)
    parts = re.split("--- (?:step 1, )?sample . of .\n", out)[1:]
    for line, part in zip(lines, parts, strict=True):
        alone = samples(folder, f"--prompt={line}", *flags)
        assert alone.split("\n", 1)[1] == part


def save_model_of(folder, tok, text, end):
    """A checkpoint of a model that generates the bytes of `text`, by position, and EOT at position `end`."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=257, n_vocab=257, n_layer=1, n_head=1, n_embd=64))
    ids = [*text.encode()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight.normal_()
        model.transformer.ln_f.weight.fill_(20.0)  # an id's logit is its similarity to the position's vector
        for position, token in enumerate([*ids[:end], tok.eot, *ids[end:]]):
            model.transformer.wpe.weight[position] = 100 * model.transformer.wte.weight[token]
    save_checkpoint(folder, 0, {
        "step": 0, "model": model.state_dict(), "model_config": describe_model(model),
        "tokenizer": describe_tokenizer(tok)})


def test_interactive_answers_each_line_until_the_end(folder):
    flags = ("--max_new_tokens=5", "--num_samples=1", "--checkpoint=log_a")
    done = generate(folder, "--interactive", *flags, stdin=b"import os\ndef f(")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(b"checkpoint: log_a, step 0\n")
    expected = [samples(folder, f"--prompt={text}", *flags) for text in ("import os", "def f(")]
    assert done.stdout.decode() == "> " + "> ".join(expected) + "> "


def test_it_stops_at_the_end_of_the_text(tmp_path, byte_tokenizer):
    """The model generates a, the two bytes of é, EOT, c: complete characters, and nothing after EOT."""
    save_model_of(tmp_path, load_tokenizer(str(byte_tokenizer)), "aéc", 3)
    out = samples(tmp_path, f"--checkpoint={tmp_path}", "--temperature=0", "--max_new_tokens=10")
    assert out == "--- step 0, sample 1 of 2\naé\n--- sample 2 of 2\naé\n"
    out = samples(tmp_path, f"--checkpoint={tmp_path}", "--temperature=0", "--logprobs", "--num_samples=1")
    shown = [line.split()[-1] for line in out.splitlines()[3:]]
    assert shown == ["'a'", "b'\\xc3'", "b'\\xa9'", "'<|endoftext|>'"]


def read_logprobs(out):
    """[[logprob, ...] per sample] of the printed tables."""
    tables = out.split("   logprob    prob  token\n")[1:]
    return [[float(line[:10]) for line in table.splitlines() if re.fullmatch(r" *-?\d+\.\d{4} .*", line)]
            for table in tables]


def test_logprobs_are_the_models_own(folder):
    """Before temperature and top_k: their sum over a sample is its loss by --text and by the model."""
    out = samples(folder, "--prompt=", "--num_samples=2", "--logprobs", "--max_new_tokens=9", "--top_k=5",
                  "--checkpoint=log_b")
    model, _ = load_model(folder / "log_b")
    generator = torch.Generator().manual_seed(1337)
    steps = decoding.generate(model, [torch.tensor([256])] * 2, 9, 0.8, 5, generator=generator)
    rows = torch.stack([token for token, _ in steps], dim=1)  # (2, 9)
    with torch.no_grad():
        logits = model(torch.cat((torch.full((2, 1), 256), rows[:, :-1]), dim=1))
    expected = logits.log_softmax(-1).gather(2, rows[:, :, None])[:, :, 0]
    for found, row in zip(read_logprobs(out), expected.tolist(), strict=True):
        assert found == pytest.approx(row[:len(found)], abs=1e-4) and len(found) >= 1


def slow_losses(model, ids, stride):
    """Nats of ids[1:]: the window of each token and its loss, one by one."""
    T, losses = model.config.block_size, []
    starts = sorted({*range(0, max(1, len(ids) - 1 - T), stride), max(0, len(ids) - 1 - T)})
    for target in range(1, len(ids)):
        start = next(start for start in starts if target <= start + T)
        assert target - start >= min(target, T - stride + 1)
        logits = model(torch.tensor(ids[None, start:target]))[0, -1]
        losses.append(-logits.log_softmax(-1)[ids[target]].item())
    return np.array(losses)


@pytest.mark.parametrize("n", [1, 5, 32, 33, 48, 49, 100])
@pytest.mark.parametrize("stride", [1, 7, 16, 32])
def test_every_token_of_a_text_is_scored_once(folder, n, stride):
    model, _ = load_model(folder / "log_a")
    ids = np.random.default_rng(n).integers(0, 257, n + 1)
    with torch.no_grad():
        expected = slow_losses(model, ids, stride)
    losses = script.token_losses(model, ids, stride, resolve_device("cpu", "float32"))
    np.testing.assert_allclose(losses, expected, atol=2e-5, rtol=1e-5)


def test_a_text_gets_perplexity_and_bits_per_byte(folder):
    text = "naïve <|endoftext|> text\n" * 5
    (folder / "text.txt").write_text(text, encoding="utf-8")
    out = samples(folder, "--text=text.txt", "--checkpoint=log_a")
    assert out == samples(folder, "--text=text.txt", "--checkpoint=log_a", "--stride=16")
    out = samples(folder, "--text=text.txt", "--stride=8", "--logprobs", "--checkpoint=log_a")
    tok = load_tokenizer(str(load_rank_file(folder)))
    ids = np.concatenate(([tok.eot], tok.encode(text))).astype(np.int64)
    model, _ = load_model(folder / "log_a")
    losses = script.token_losses(model, ids, 8, resolve_device("cpu", "float32"))
    assert read_logprobs(out) == [pytest.approx((-losses).tolist(), abs=1e-4)]
    nats, n_bytes = losses.mean(), len(text.encode())
    assert out.splitlines()[-1] == (
        f"text.txt: {nats:.4f} nats per token, perplexity {math.exp(nats):.2f}, "
        f"{losses.sum() / math.log(2) / n_bytes:.4f} bits per byte; {n_bytes:,} tokens, {n_bytes:,} bytes, "
        f"windows of 32 tokens, stride 8")


def load_rank_file(folder):
    """The rank file that a checkpoint carries, as a file."""
    path = folder / "ranks.tiktoken"
    path.write_bytes(load_model(folder / "log_a")[1]["tokenizer"]["rank_file"].numpy().tobytes())
    return path


def test_each_sample_ends_at_its_own_end_of_text(tmp_path, byte_tokenizer):
    """Two prompts, whose ends the same model of positions says two steps apart."""
    save_model_of(tmp_path, load_tokenizer(str(byte_tokenizer)), "aabcd", 5)
    (tmp_path / "prompts.txt").write_text("x\nxyz\n", encoding="utf-8")
    for first, flags in enumerate(([], ["--logprobs"])):
        out = samples(tmp_path, f"--checkpoint={tmp_path}", "--temperature=0", "--prompts=prompts.txt",
                      "--num_samples=1", "--max_new_tokens=9", *flags)
        assert [line for line in out.splitlines() if line[:1] == "x"] == ["xabcd", "xyzcd"]
        assert first == 0 or [len(table) for table in read_logprobs(out)] == [5, 3]


def test_special_tokens_in_a_prompt_are_text(folder):
    out = samples(folder, "--prompt=<|endoftext|>", "--max_new_tokens=3", "--num_samples=1")
    assert out.split("\n", 1)[1].startswith("<|endoftext|>")


@pytest.mark.parametrize(("flags", "words"), [
    (["--checkpoint=nosuch"], "nosuch: not there or not a model; name a folder"),
    (["--prompts=blank.txt"], "prompts=blank.txt has no line with text"),
    (["--text=empty.txt"], "is an empty file"),
    *((flag, words) for flag in (["--text=latin.txt"], ["--prompts=latin.txt"], ["--prompt=FILE:latin.txt"])
      for words in ("byte 3 is not UTF-8", "latin.txt")),
    *(([flag], "this text is UTF-16; convert it") for flag in (
        "--text=utf16.txt", "--prompts=utf16.txt", "--prompt=FILE:utf16.txt")),
    (["--text=."], ".: not a regular file"),
    *((["--prompts=blank.txt", flag], "only one of --prompt, --prompts, --interactive") for flag in (
        "--prompt=a", "--text=blank.txt")), (["--text=blank.txt", "--prompt=a"], "only one of --prompt"),
    (["--text=blank.txt", "--stride=33"], "--stride=32 or less"),
])
def test_mistakes_are_named(folder, flags, words):
    for name, content in {"empty": b"", "blank": b"\n \n", "latin": b"caf\xe9 au lait",
                          "utf16": "text".encode("utf-16")}.items():
        (folder / f"{name}.txt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        run(folder, *flags)
    assert words in str(caught.value)


@pytest.mark.parametrize("flag", ["--prompt=FILE:nosuch.txt", "--prompts=nosuch.txt", "--text=nosuch.txt"])
def test_a_missing_file_is_named(folder, flag):
    """configure's hook turns it into a line and exit code 2."""
    with pytest.raises(FileNotFoundError, match=r"nosuch\.txt"):
        run(folder, flag)


def test_a_byte_order_mark_is_not_part_of_a_text(folder, monkeypatch):
    """Some editors write one: a prompt, a line of prompts and a text are the same with and without it."""
    flags = ["--temperature=0", "--num_samples=1", "--max_new_tokens=5"]
    for name, mark in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        (folder / f"{name}.txt").write_bytes(mark + b"abc")
    for flag in ("--prompt=FILE:", "--prompts="):
        assert samples(folder, f"{flag}plain.txt", *flags) == samples(folder, f"{flag}marked.txt", *flags)
    assert samples(folder, "--text=plain.txt").partition(":")[2] == \
        samples(folder, "--text=marked.txt").partition(":")[2]
    for stdin, words in ((b"\xef\xbb\xbfabc", None), (b"caf\xe9 au lait", "input: byte 3 is not UTF-8"),
                         ("text".encode("utf-16"), "input: byte 0 is not UTF-8")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        if words is None:
            assert samples(folder, "--prompt=-", *flags) == samples(folder, "--prompt=abc", *flags)
        else:
            with pytest.raises(UserError, match=words):
                run(folder, "--prompt=-", *flags)


def test_a_home_folder_is_found(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME" if os.name != "nt" else "USERPROFILE", str(folder))
    monkeypatch.chdir(tmp_path)
    (folder / "home.txt").write_text("abc", encoding="utf-8")
    for flag in ("--prompt=FILE:~/home.txt", "--prompts=~/home.txt", "--text=~/home.txt"):
        assert samples(tmp_path, "--checkpoint=~/log_a", "--max_new_tokens=1", flag)


def test_weights_that_are_not_finite_get_no_perplexity(folder, tmp_path):
    model, state = load_model(folder / "log_a")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, :2] = math.nan
        model.transformer.ln_f.bias[3] = math.inf
    save_checkpoint(tmp_path, 0, {**state, "model": model.state_dict()})
    (tmp_path / "text.txt").write_text("abc", encoding="utf-8")
    with pytest.raises(UserError, match=r"nan or infinity in 2 tensors, first in transformer\.h\.1\.mlp\."
                                        r"c_fc\.weight \(2 of 4,096 numbers\); take an earlier checkpoint"):
        run(tmp_path, f"--checkpoint={tmp_path}", "--text=text.txt")


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(UserError, match="make demo"):
        run(tmp_path)


def test_the_manuals_example_runs(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model, tok = GPT(GPTConfig(block_size=64, n_layer=1, n_head=1, n_embd=8)), load_tokenizer()
    (tmp_path / "log_demo").mkdir()
    save_checkpoint(tmp_path / "log_demo", 0, {
        "step": 0, "model": model.state_dict(), "model_config": describe_model(model),
        "tokenizer": describe_tokenizer(tok)})
    monkeypatch.chdir(tmp_path)
    manual = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", manual, re.DOTALL)
    block, = (block for block in blocks if "generate" in block)
    exec(compile(block, "evaluate.md", "exec"), {})
    assert capsys.readouterr().out.count("torch.Size([2, 50257])") == 50
