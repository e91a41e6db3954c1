"""The sampling script: prompts, seeds, streaming, and what a wrong flag says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bpe import load_tokenizer
from checkpoint import describe_model, describe_tokenizer, save_checkpoint
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_tokenizer):
    """A working folder with log_a/ and, newer, log_b/: random models over bytes, context 32."""
    folder = tmp_path_factory.mktemp("generate")
    for i, name in enumerate(("log_a", "log_b")):
        torch.manual_seed(i)
        model = GPT(GPTConfig(32, 384, 257, 2, 2, 32))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        (folder / name).mkdir()
        path = save_checkpoint(folder / name, i, {
            "step": i, "model": model.state_dict(), "model_config": describe_model(model),
            "tokenizer": describe_tokenizer(load_tokenizer(str(byte_tokenizer)))})
        os.utime(path, (1e9 + i, 1e9 + i))
    return folder


def generate(folder, *flags, stdin=b""):
    return subprocess.run([sys.executable, str(ROOT / "generate.py"), "--device=cpu", *flags], cwd=folder,
                          input=stdin, capture_output=True)


def samples(folder, *flags, stdin=b""):
    done = generate(folder, *flags, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode("utf-8")  # strict: half a character would raise


def test_the_newest_checkpoint_is_the_default(folder):
    assert samples(folder, "--max_new_tokens=5").startswith("--- step 1, sample 1 of 2\n")
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
    assert out == samples(folder, "--prompt=-", stdin=text.encode())


def test_a_prompt_longer_than_the_context_sees_its_end_only(folder):
    """Context 32: of 1 + 60 prompt tokens the model sees those from 32 on; what is before does not matter."""
    done = generate(folder, "--temperature=0", f"--prompt={'x' * 30}{'y' * 30}", "--num_samples=1")
    assert done.returncode == 0 and b"the model does not see the first 32" in done.stderr
    other = generate(folder, "--temperature=0", f"--prompt={'z' * 30}{'y' * 30}", "--num_samples=1")
    assert done.stdout.split(b"y" * 30)[1] == other.stdout.split(b"y" * 30)[1]


def test_it_stops_at_the_end_of_the_text(tmp_path, byte_tokenizer):
    """A model that says a, b, EOT and then c: nothing after EOT is printed."""
    tok = load_tokenizer(str(byte_tokenizer))
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 257, 257, 1, 1, 64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight.normal_()
        model.transformer.ln_f.weight.fill_(20.0)  # an id's logit is its similarity to the position's vector
        for position, token in enumerate([ord("a"), ord("b"), tok.eot, ord("c")]):
            model.transformer.wpe.weight[position] = 100 * model.transformer.wte.weight[token]
    save_checkpoint(tmp_path, 0, {
        "step": 0, "model": model.state_dict(), "model_config": describe_model(model),
        "tokenizer": describe_tokenizer(tok)})
    out = samples(tmp_path, f"--checkpoint={tmp_path}", "--temperature=0", "--max_new_tokens=10")
    assert out == "--- step 0, sample 1 of 2\nab\n--- sample 2 of 2\nab\n"


def test_special_tokens_in_a_prompt_are_text(folder):
    out = samples(folder, "--prompt=<|endoftext|>", "--max_new_tokens=3", "--num_samples=1")
    assert out.split("\n", 1)[1].startswith("<|endoftext|>")


@pytest.mark.parametrize(("flags", "words"), [
    (["--checkpoint=nosuch"], "checkpoint nosuch: not there"),
    (["--prompt=FILE:nosuch.txt"], "No such file"),
    (["--temperature=-1"], "temperature=-1.0"),
    (["--top_p=0"], "top_p=0.0"),
    (["--num_samples=0"], "num_samples=0"),
    (["--max_tokens=5"], "did you mean max_new_tokens"),
])
def test_mistakes_exit_2(folder, flags, words):
    done = generate(folder, *flags)
    assert done.returncode == 2 and words in done.stderr.decode() and done.stdout == b"", done.stderr


def test_no_checkpoint_at_all(tmp_path):
    done = generate(tmp_path)
    assert done.returncode == 2 and b"make demo" in done.stderr
