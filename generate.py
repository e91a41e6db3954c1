"""
Sample text from a checkpoint.

    python generate.py                                            # the newest checkpoint under log*/
    python generate.py --checkpoint=log --prompt="def main(" --num_samples=3
    python generate.py --prompt=FILE:story.txt --temperature=0    # the prompt is a file's text; greedy
    echo "import os" | python generate.py --prompt=-              # the prompt is standard input

Reads one checkpoint, which is enough; writes nothing. The first sample appears as it is drawn, always as
whole characters; the others, drawn in the same batch, follow. A sample ends at <|endoftext|> or after
max_new_tokens. The same seed gives the same samples on the same device. In a prompt, <|endoftext|> is
ordinary text.

A prompt longer than the context is legal: the model sees its last part only, between a half and a whole
block_size of tokens, and a line on stderr says so (model.context_start).
"""

import codecs
import sys
from pathlib import Path

import numpy as np
import torch

from checkpoint import checkpoint_tokenizer, load_model
from configurator import UserError, configure
from device import resolve_device
from model import context_start

checkpoint = ""  # a .pt file, or a folder whose newest is meant; empty = the newest under log*/
prompt = ""  # text, FILE:path, or - for standard input; empty = the beginning of a document
num_samples = 2  # samples, drawn as one batch
max_new_tokens = 200  # tokens per sample at most
temperature = 0.8  # 0 = greedy; 1 = the model's own probabilities
top_k = 200  # keep the k likeliest tokens; 0 = all
top_p = 1.0  # keep the likeliest tokens that together reach this probability
device = "auto"  # auto|cpu|cuda|cuda:1|mps
dtype = "float32"  # auto|float32|bfloat16|float16; small models gain nothing from fewer bits here
seed = 1337  # of the samples


def newest_checkpoint() -> Path:
    """The folder under log*/ in which a checkpoint was written last."""
    found = sorted(Path().glob("log*/ckpt_*.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("no checkpoint under log*/; name one with --checkpoint=FILE_OR_FOLDER, "
                        "or train one with make demo")
    return found[-1].parent


def read_prompt(text: str) -> str:
    """The prompt itself, from a file (FILE:path) or standard input (-) where that is asked for."""
    if text == "-":
        return sys.stdin.buffer.read().decode("utf-8", errors="replace")
    if text.startswith("FILE:"):
        try:
            return Path(text.removeprefix("FILE:")).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"prompt={text}: {error.strerror}; "
                            f"give --prompt=FILE:PATH of a readable file") from error
    return text


def main() -> None:
    if num_samples < 1 or max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise UserError(f"num_samples={num_samples}, max_new_tokens={max_new_tokens}, "
                        f"temperature={temperature}, top_k={top_k}, top_p={top_p}: "
                        f"wanted at least 1, at least 1, at least 0, at least 0, and 0 < top_p <= 1")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed}: wanted 0 to 2**63 - 1")
    dev = resolve_device(device, dtype)
    model, state = load_model(checkpoint or newest_checkpoint(), dev.device)
    tok = checkpoint_tokenizer(state)
    text = read_prompt(prompt)
    # every document begins with EOT
    idx = np.concatenate(([tok.eot], tok.encode(text))).astype(np.int64)  # (T,)
    hidden = context_start(idx.size, model.config.block_size)
    if hidden:
        print(f"note: the prompt is {idx.size} tokens, the context {model.config.block_size}: "
              f"the model does not see the first {hidden}", file=sys.stderr)
    generator = torch.Generator(dev.device).manual_seed(seed)
    rows = [[] for _ in range(num_samples)]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds back half a character
    print(f"--- step {state['step']}, sample 1 of {num_samples}\n{text}", end="", flush=True)
    with dev.autocast():
        batch = dev.to_device(idx).repeat(num_samples, 1)  # (num_samples, T)
        for tokens, _ in model.generate(batch, max_new_tokens, temperature, top_k, top_p, generator):
            for row, token in zip(rows, tokens.tolist()):
                if tok.eot not in row:
                    row.append(token)
            if rows[0][-1] != tok.eot:
                print(decoder.decode(tok.decode_bytes(rows[0][-1:])), end="", flush=True)
            if all(row[-1] == tok.eot for row in rows):
                break
    print(decoder.decode(b"", final=True))
    for i, row in enumerate(rows[1:], start=2):
        print(f"--- sample {i} of {num_samples}\n{text}{tok.decode([t for t in row if t != tok.eot])}")


if __name__ == "__main__":
    configure(globals())
    main()
