"""
Sample text from a checkpoint, or compute how likely a text is under it.

    python generate.py                                            # the newest checkpoint under log*/
    python generate.py --checkpoint=log:best --prompt="def main(" --num_samples=3
    python generate.py --prompt=FILE:story.txt --temperature=0    # the prompt is a file's text; greedy
    echo "import os" | python generate.py --prompt=-              # the prompt is standard input
    python generate.py --prompts=lines.txt                        # one prompt per line, all in one batch
    python generate.py --interactive                              # type a line, get text; Ctrl-D ends
    python generate.py --text=book.txt                            # perplexity and bits per byte of a text

--checkpoint is a file, a folder (its newest checkpoint), FOLDER:best (its lowest val loss), or a Hugging Face
GPT-2 (gpt2). Nothing is written. The first sample is printed as it is drawn, in whole characters; the others
of the batch follow. A sample ends at <|endoftext|> or after max_new_tokens. The same seed gives the same
samples on the same device. In a prompt or a text, <|endoftext|> is ordinary text.

If a prompt is longer than the context, the model sees only its end, at least half a block_size, and a line on
stderr says so.

--text scores a file of any length as one document, in overlapping windows of block_size tokens: each token
counts once, with at least block_size - stride tokens before it. --logprobs prints for each sampled or scored
token ln of the model's own probability, before temperature, top_k and top_p.
"""

import codecs
import contextlib
import itertools
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from configurator import Between, OneOf, PathName, UserError, configure
from convert_hf import open_model
from decoding import context_start, generate
from device import resolve_device
from files import read_text

checkpoint: PathName = ""  # a file, a folder, FOLDER:best, gpt2, ...; empty = the newest under log*/
prompt = ""  # text, FILE:path, or - for standard input; empty = the beginning of a document
prompts: PathName = ""  # a text file with one prompt per line, instead of --prompt
interactive = False  # read prompts from the terminal, one per line, until Ctrl-D; the model stays loaded
num_samples: Between(1, 10_000) = 2  # samples of each prompt, drawn as one batch
max_new_tokens: Between(1, 1_000_000) = 200  # tokens per sample at most
temperature: Between(0, 1000) = 0.8  # 0 = greedy; 1 = the model's own probabilities
top_k: Between(0, 2**31) = 200  # sample among the k most likely tokens; 0 = all
top_p: Between(1e-9, 1) = 1.0  # sample among the most likely tokens that together reach this probability
text: PathName = ""  # a text file to score, instead of sampling
stride: Between(0, 2**31) = 0  # tokens between the starts of its windows; 0 = half a block_size
logprobs = False  # print ln of the probability of each token
device = "auto"  # auto|cpu|cuda|cuda:1|mps
dtype: OneOf("auto", "float32", "bfloat16", "float16") = "float32"  # fast enough for a small model
seed: Between(0, 2**63 - 1) = 1337  # of the samples


def read_prompts() -> list[str]:
    """The prompts, from --prompts, a file, standard input or the flag itself."""
    if prompts:
        lines = [line.rstrip("\r") for line in read_text(prompts).split("\n")]
        lines = [line for line in lines if line.strip()]
        if not lines:
            raise UserError(f"prompts={prompts} has no line with text; name a file with one prompt per line")
        return lines
    if prompt == "-":
        try:
            return [sys.stdin.buffer.read().decode("utf-8-sig")]
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: byte {error.start:,} is not UTF-8 ({error.reason}); convert "
                            f"it, for example with iconv") from error
    if prompt.startswith("FILE:"):
        return [read_text(Path(prompt.removeprefix("FILE:")).expanduser())]
    return [prompt]


def typed_lines() -> Iterator[list[str]]:
    """A batch of one prompt for each line that is typed, until Ctrl-D."""
    with contextlib.suppress(EOFError):
        while True:
            yield [input("> ")]


def encode_document(tok, text: str) -> np.ndarray:
    """int64 ids (1 + tokens,): every document begins with end-of-text."""
    return np.concatenate(([tok.eot], tok.encode(text))).astype(np.int64)


def print_logprobs(tok, tokens, logs) -> None:
    """Print a line per token: ln of its probability, the probability, the token."""
    print(f"{'logprob':>10} {'prob':>7}  token")
    for token, log in zip(tokens, logs):
        data = tok.decode_bytes([token])
        try:
            data = data.decode()
        except UnicodeDecodeError:
            pass  # part of a character: shown as bytes
        print(f"{log:10.4f} {math.exp(log):7.2%}  {data!r}")


def sample(model, tok, dev, step: int, texts: list[str]) -> None:
    """Print a continuation of each text, the first one as it is drawn."""
    batch = [dev.to_device(encode_document(tok, text)) for text in texts]  # (T_b,) each
    longest = max(map(len, batch))
    hidden = context_start(longest, model.config.block_size)
    if hidden:
        print(f"note: the {'longest ' if prompts else ''}prompt has {longest} tokens and the context "
              f"{model.config.block_size}: the model does not see the first {hidden}", file=sys.stderr)

    generator = torch.Generator(dev.device).manual_seed(seed)
    rows, logs, clock = [[] for _ in texts], [[] for _ in texts], [time.perf_counter()]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds back half a character
    print(f"--- step {step}, sample 1 of {len(texts)}\n{texts[0]}", end="", flush=True)
    with dev.changing_shapes(), dev.autocast():
        steps = generate(model, batch, max_new_tokens, temperature, top_k, top_p, generator)
        for tokens, logits in steps:
            values = logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]  # (B,)
            for row, log, token, value in zip(rows, logs, tokens.tolist(), values.tolist()):
                if not row or row[-1] != tok.eot:
                    row.append(token)
                    log.append(value)
            clock.append(time.perf_counter())
            if rows[0][-1] != tok.eot:
                print(decoder.decode(tok.decode_bytes(rows[0][-1:])), end="", flush=True)
            if all(row[-1] == tok.eot for row in rows):
                break
    print(decoder.decode(b"", final=True))

    for i, (text, row, log) in enumerate(zip(texts, rows, logs), start=1):
        if i > 1:
            print(f"--- sample {i} of {len(texts)}\n{text}{tok.decode([t for t in row if t != tok.eot])}")
        if logprobs:
            print_logprobs(tok, row, log)
    seconds = statistics.median(after - before for before, after in itertools.pairwise(clock))
    print(f"{1 / seconds:,.1f} tok/s per text (median over {len(clock) - 1} tokens)", file=sys.stderr)


@torch.no_grad()
def token_losses(model, ids: np.ndarray, stride: int, dev) -> np.ndarray:
    """Nats of ids[1:], float32 (n,), each token given at least the block_size - stride tokens before it.

    Windows of block_size tokens start `stride` apart (Hugging Face's documentation, "Perplexity of
    fixed-length models"), and each scores the tokens that earlier windows did not reach. The last window ends
    with the text.
    """
    T, n = model.config.block_size, len(ids) - 1
    starts = np.array([*range(0, n - T, stride), max(0, n - T)])
    reached = np.concatenate(([0], starts[:-1] + T))  # by earlier windows
    losses = np.empty(n, np.float32)
    rows = max(1, 2**14 // T)  # windows per batch
    for i in range(0, len(starts), rows):
        windows = starts[i:i + rows, None] + np.arange(min(T, n))  # (B, T)
        new = windows >= reached[i:i + rows, None]
        targets = np.where(new, ids[windows + 1], -100)
        with dev.autocast():
            loss = model(dev.to_device(ids[windows]), dev.to_device(targets), reduction="none")  # (B, T)
        losses[windows[new]] = loss.float().cpu().numpy()[new]
    return losses


def score(model, tok, dev, content: str) -> None:
    """Print perplexity and bits per byte of `content`, the text of the file."""
    T = model.config.block_size
    step = stride or max(1, T // 2)
    if step > T:
        raise UserError(f"stride={stride} exceeds the context of {T} tokens and would skip tokens; type "
                        f"--stride={T} or less")

    ids = encode_document(tok, content)
    losses = token_losses(model, ids, step, dev)
    if logprobs:
        print_logprobs(tok, ids[1:].tolist(), (-losses).tolist())

    nats, n_bytes = float(losses.sum(dtype=np.float64)), len(content.encode())
    print(f"{text}: {nats / len(losses):.4f} nats per token, perplexity {math.exp(nats / len(losses)):.2f}, "
          f"{nats / math.log(2) / n_bytes:.4f} bits per byte; {len(losses):,} tokens, {n_bytes:,} bytes, "
          f"windows of {min(T, len(losses))} tokens, stride {step}")


def main() -> None:
    if sum(map(bool, (prompt, prompts, interactive, text))) > 1:
        raise UserError("give only one of --prompt, --prompts, --interactive and --text")
    batches = typed_lines() if interactive else [[read_text(text)] if text else read_prompts()]
    if text and not batches[0][0]:
        raise UserError(f"text={text} is an empty file; name one with text to score")

    dev = resolve_device(device, dtype)
    source, state, model, tok = open_model(checkpoint, dev.device)
    print(f"checkpoint: {source}, step {state['step']}", file=sys.stderr)
    for texts in batches:
        if text:
            score(model, tok, dev, texts[0])
        else:
            sample(model, tok, dev, state["step"], [text for text in texts for _ in range(num_samples)])


if __name__ == "__main__":
    configure(globals())
    main()
