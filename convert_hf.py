"""
GPT-2 to and from Hugging Face's format: OpenAI's weights in, your own models out. Imports nanoGPT's too.

    python convert_hf.py --source=gpt2 --out_dir=log_gpt2           # import: log_gpt2/ckpt_0000000.pt
    python convert_hf.py --source=folder/ --out_dir=log_mine        # from a folder on this disk
    python convert_hf.py --source=out/ckpt.pt --out_dir=log_nano    # from nanoGPT or build-nanogpt
    python convert_hf.py --checkpoint=log_demo --out_dir=demo_hf    # export

--source is gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded into the hub's cache: about 0.5, 1.5, 3.2 and
6.4 GB), a folder with config.json and model.safetensors, or a checkpoint of nanoGPT or build-nanogpt. A path
that holds a model takes precedence over a name. --out_dir is a new folder.

An export is a folder that GPT2LMHeadModel and GPT2TokenizerFast load:
    config.json, generation_config.json
    model.safetensors       float32; lm_head is wte, without padding rows; matrices transposed (Conv1D)
    vocab.json, merges.txt, tokenizer.json, tokenizer_config.json
    tokenizer.tiktoken      our rank file: to import a vocabulary other than GPT-2's, it must be there
    README.md               the model card: data, tokens, loss, how it was made, how to load it
Imported again, the weights are bit-identical. Pruned heads become heads of zeros: the same logits. Post-LN
and a changed model.py are refused. In a text, <|endoftext|> is the special id for transformers and ordinary
text here.

Only GPT-2's architecture is imported, and no code of a checkpoint is run. Biases that a nanoGPT model lacks
(bias=False) become zeros. nanoGPT's GELU is the exact one and ours OpenAI's tanh approximation, so the logits
of its models change by up to about 1e-3.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from bpe import EOT_TEXT, GPT2_SHA256, Tokenizer, byte_order, load_tokenizer, tokenizer_from_ranks
from checkpoint import (
    FORMAT,
    ForeignCheckpoint,
    build_model,
    check_finite,
    checkpoint_tokenizer,
    describe_tokenizer,
    holds_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    split_best,
)
from configurator import Between, OneOf, PathName, UserError, configure
from files import check, locked, not_written, read_json, read_jsonl, read_text, sync_folder, write_atomically
from model import GPT, GPTConfig
from shards import RANK_FILE

source: PathName = ""  # to import: gpt2|gpt2-medium|gpt2-large|gpt2-xl, Hugging Face's folder, nanoGPT's file
checkpoint: PathName = ""  # to export: a file, a folder for its newest, or FOLDER:best
out_dir: PathName = ""  # a new folder: a log_dir with one checkpoint (import), or a model folder (export)

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
ORGANIZATION = "openai-community"  # their owner on the hub
WEIGHTS = "model.safetensors"
# stored as (in, out) there, as (out, in) by nn.Linear
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

SIZE, ID = Between(1, 2**20), Between(0, 2**31)
SHAPE = {"n_layer": Between(1, 1000), "n_head": SIZE, "n_embd": SIZE, "vocab_size": SIZE}
# the settings of config.json that change the logits, with the values that are GPT-2's
CONFIG = {"model_type": OneOf("gpt2"), **SHAPE, "n_positions": SIZE,
          "activation_function?": OneOf("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
          "layer_norm_epsilon?": OneOf(1e-5), "scale_attn_weights?": OneOf(True),
          "scale_attn_by_inverse_layer_idx?": OneOf(False), "add_cross_attention?": OneOf(False)}
TOKENIZER = {"model": {"vocab": {str: ID}}, "added_tokens?": [{"content": str, "id": ID}]}
NANOGPT = {**SHAPE, "block_size": SIZE, "bias?": bool, "dropout?": float}  # build-nanogpt lacks the last two


# ---- import
def load_any(source: str | Path) -> dict:
    """The state of a checkpoint, on the CPU, from a model of any kind; `open_model` builds it.

    `source`: a checkpoint of ours (a file, a folder for its newest, or FOLDER:best), a file of nanoGPT or
    build-nanogpt, a folder with config.json and model.safetensors, or one of HUB_NAMES. An imported state has
    format, step (0), model, model_config, tokenizer and provenance, and no optimizers. Raises UserError.
    """
    path, name = Path(source), str(source).removeprefix(f"{ORGANIZATION}/")
    if (path / "config.json").is_file():
        return import_hf(path)
    if holds_checkpoint(path) and path.suffix not in (".json", ".safetensors"):
        try:
            return load_checkpoint(source)
        except ForeignCheckpoint:
            if not path.is_file():  # FOLDER:best; the error names the file
                raise
            return import_nanogpt(path)
    if name in HUB_NAMES:
        repo = f"{ORGANIZATION}/{name}"
        return import_hf(_download(repo), f"hub: {repo}")
    raise UserError(f"{source}: not there or not a model; name a folder with config.json and {WEIGHTS}, "
                    f"one of {', '.join(HUB_NAMES)}, or a checkpoint: a file, a log_dir or LOG_DIR:best")


def open_model(source: str | Path, device: str | torch.device) -> tuple[str, dict, GPT, Tokenizer]:
    """(name, state on the CPU, model in eval mode on `device`, tokenizer) of what load_any takes.

    An empty `source` is the folder under log*/ whose checkpoint is the newest.
    """
    name = str(source or newest_checkpoint())
    state = load_any(name)
    return name, state, build_model(state, name).to(device), checkpoint_tokenizer(state)


def _download(repo):
    """The folder in the hub's cache with config.json and model.safetensors of `repo`."""
    from huggingface_hub import constants, hf_hub_download  # here: reading folders needs no hub client
    from huggingface_hub.errors import LocalEntryNotFoundError

    import hub

    def attempt(name):
        try:
            return Path(hf_hub_download(repo, name))
        except LocalEntryNotFoundError as error:  # the reason is in its cause
            raise error.__cause__ or error from None

    try:
        # two attempts for the first: without a network the client itself tries for 25 s
        config = hub.retry(f"{repo}/config.json", lambda: attempt("config.json"), attempts=2)
        hub.retry(f"{repo}/{WEIGHTS}", lambda: attempt(WEIGHTS))
    except UserError as error:
        raise UserError(f"cannot fetch {repo} from {constants.ENDPOINT}: {error}.\nUse a mirror, with "
                        f"HF_ENDPOINT=https://...; or put config.json and {WEIGHTS} of "
                        f"https://huggingface.co/{repo} into a folder and name that folder") from error
    return config.parent


def import_hf(folder: str | Path, origin: str = "") -> dict:
    """The state of `load_any` from a folder of Hugging Face's; `origin` goes into its provenance.

    wte keeps its number of rows: GPT-2's logits are about -30 to -100, so rows of zeros would dominate.
    """
    folder = Path(folder)
    path, weights = folder / "config.json", folder / WEIGHTS
    try:
        config = read_json(path, CONFIG)
        check(config, {"n_inner?": (None, OneOf(4 * config["n_embd"]))}, str(path))
    except UserError as error:
        raise UserError(f"{error}; only models of GPT-2's architecture can be imported") from error
    tokenizer = _read_tokenizer(folder)
    if not weights.is_file():
        raise UserError(f"{folder}: no {WEIGHTS}; make one of a .bin or of several parts with transformers: "
                        f"GPT2LMHeadModel.from_pretrained({str(folder)!r}).save_pretrained('NEW_FOLDER', "
                        f"max_shard_size='100GB')")
    try:
        stored = load_file(weights)
    except (OSError, SafetensorError, KeyError) as error:  # KeyError: a dtype that torch lacks
        raise UserError(f"{weights}: corrupt ({error}); fetch it again") from error
    return _imported(folder, {**config, "block_size": config["n_positions"]}, stored, tokenizer,
                     origin or str(folder.absolute()))


def _read_tokenizer(folder):
    """The Tokenizer of the rank file in a folder, else GPT-2's. UserError if its vocabulary is another."""
    if (path := folder / RANK_FILE).is_file():
        tokenizer = tokenizer_from_ranks(path.read_bytes(), folder.absolute().name)
    if not path.is_file() or tokenizer.sha256 == GPT2_SHA256:
        tokenizer = load_tokenizer("gpt2")
    if (path := folder / "tokenizer.json").is_file():
        saved = read_json(path, TOKENIZER)
        vocab = saved["model"]["vocab"] | {token["content"]: token["id"]
                                           for token in saved.get("added_tokens", [])}
    elif (path := folder / "vocab.json").is_file():
        vocab = read_json(path, {str: ID})
    else:
        return tokenizer
    if vocab != hf_vocabulary(tokenizer):
        raise UserError(f"{path}: not the vocabulary of {RANK_FILE}, or without that file not GPT-2's; copy "
                        f"both files from one export of convert_hf.py")
    return tokenizer


def import_nanogpt(path: Path) -> dict:
    """The state of `load_any` from a checkpoint of nanoGPT or build-nanogpt, whose vocabulary is GPT-2's.

    Runs none of its code: the GPTConfig that build-nanogpt's script pickles is read as a namespace.
    """
    try:
        with torch.serialization.safe_globals([(types.SimpleNamespace, "__main__.GPTConfig")]):
            saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of any type, as the namespace may be given any state
        raise UserError(f"{path}: refused, it holds more than tensors, plain values and the fields of a "
                        f"GPTConfig, and loading that could run code; name another checkpoint") from error
    config = saved.get("model_args", saved.get("config")) if isinstance(saved, dict) else None
    if isinstance(config, types.SimpleNamespace):
        config = vars(config)
    if config is None:
        raise UserError(f"{path}: not a checkpoint of train_gpt2.py, nanoGPT or build-nanogpt; if it is "
                        f"Hugging Face's, name its folder")
    check(config, NANOGPT, f"{path}, model_args")
    if unknown := sorted(map(str, config.keys() - {name.rstrip("?") for name in NANOGPT})):
        raise UserError(f"{path}: {', '.join(unknown)}: only GPT-2's architecture can be imported")
    check(saved, {"model": {str: torch.Tensor}}, str(path))
    stored = saved["model"]
    if config.get("bias") is False:  # expanded zeros take no memory, and the shapes are not checked yet
        stored = {name: torch.zeros(1).expand(shape) for name, shape in gpt2_shapes(config).items()
                  if name.endswith(".bias")} | stored
    if "model_args" in saved:
        print("note: nanoGPT's GELU is the exact one, ours OpenAI's tanh approximation: the logits change by "
              "up to about 1e-3", file=sys.stderr)
    return _imported(path, config, stored, load_tokenizer("gpt2"), str(path.absolute()), nn_linear=True)


def _imported(place, config, stored, tokenizer, origin, nn_linear=False):
    """The state of `load_any` from {name: tensor}. UserError unless they are GPT-2's of the sizes in `config`
    and `tokenizer`.

    nn_linear: matrices are (out, in), as in our checkpoints.
    """
    tensors = {}
    for stored_name, tensor in stored.items():
        name = stored_name.removeprefix("_orig_mod.").removeprefix("transformer.")
        if re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", name):
            continue  # the causal mask, which older versions stored
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16) \
                or tensor.layout != torch.strided or tensor.is_meta:
            raise UserError(f"{place}: {name} is {tensor.dtype}, {tensor.layout}, on {tensor.device}; "
                            f"convert it to a dense tensor of float32, float16 or bfloat16")
        tensors[name] = tensor.float()

    rows, n_vocab = config["vocab_size"], tokenizer.n_vocab
    padded = math.ceil(n_vocab / 1024) * 1024
    if not n_vocab <= rows <= padded:
        raise UserError(f"{place}: vocab_size={rows}, but {tokenizer.name} needs {n_vocab} to {padded} rows; "
                        f"a vocabulary other than GPT-2's needs the {RANK_FILE} of an export")
    shapes = gpt2_shapes(config)
    if nn_linear:
        shapes = {name: shape[::-1] if name.endswith(CONV1D) else shape for name, shape in shapes.items()}
    head = tensors.pop("lm_head.weight", None)
    _check_shapes(place, tensors, shapes, "fetch it again, or correct its config")
    if head is not None and not torch.equal(head, tensors["wte.weight"]):
        raise UserError(f"{place}: lm_head.weight is not wte.weight; in GPT-2 they are one matrix (tied), "
                        f"so this model cannot be imported")
    check_finite(tensors.items(), str(place))

    weights = {f"transformer.{name}": tensor.T.contiguous() if name.endswith(CONV1D) and not nn_linear
               else tensor for name, tensor in tensors.items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    sizes = {key: config[key] for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
    return {"format": FORMAT, "step": 0, "model": weights,
            "model_config": dataclasses.asdict(GPTConfig(**sizes, n_vocab=n_vocab)),
            "tokenizer": describe_tokenizer(tokenizer), "provenance": {"imported_from": origin}}


# ---- what GPT-2 is
def gpt2_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a GPT2Model's tensors; matrices are (in, out)."""
    C = config["n_embd"]
    shapes = {"wte.weight": (config["vocab_size"], C), "wpe.weight": (config["block_size"], C),
              "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i in range(config["n_layer"]):
        for name, shape in (("ln_1", (C,)), ("attn.c_attn", (C, 3 * C)), ("attn.c_proj", (C, C)),
                            ("ln_2", (C,)), ("mlp.c_fc", (C, 4 * C)), ("mlp.c_proj", (4 * C, C))):
            shapes[f"h.{i}.{name}.weight"], shapes[f"h.{i}.{name}.bias"] = shape, shape[-1:]
    return shapes


def _check_shapes(place, tensors, shapes, advice):
    """UserError unless `tensors` have these names and shapes."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [f"{name}: {found.get(name, 'missing')}, GPT-2 has {shapes.get(name, 'none')}"
             for name in sorted(found.keys() | shapes.keys()) if found.get(name) != shapes.get(name)]
    if wrong:
        raise UserError(f"{place}: {len(wrong)} tensors are not GPT-2's: {'; '.join(wrong[:6])}: {advice}")


def check_architecture(model: GPT, tensors: dict[str, torch.Tensor]) -> None:
    """Raises UserError unless GPT2LMHeadModel with the exported `tensors` computes what `model` does.

    config.json cannot express a change of model.py: transformers would load the tensors and compute other
    logits.
    """
    config, T = model.config, model.config.block_size
    advice = "model.py has been changed, and this format holds only GPT-2; undo the change to export"
    _check_shapes("this model", {name.removeprefix("transformer."): t for name, t in tensors.items()},
                  gpt2_shapes(dataclasses.asdict(config) | {"vocab_size": config.n_vocab}), advice)
    idx = torch.randint(config.n_vocab, (1, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(idx), hf_logits(tensors, config.n_layer, config.n_head, idx)
    difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if not difference <= 1e-4 * largest:  # rounding in float32 makes about 1e-6 of it
        raise UserError(f"transformers would compute other logits with these weights, by up to "
                        f"{difference:.3g} where the largest is {largest:.3g}: {advice}")


def hf_logits(tensors: dict[str, torch.Tensor], n_layer: int, n_head: int, idx: torch.Tensor) -> torch.Tensor:
    """What GPT2LMHeadModel computes with exported tensors, written out in float32; no line of model.py."""
    def norm(x, name):
        weight, bias = (tensors[f"transformer.{name}.{kind}"] for kind in ("weight", "bias"))
        return F.layer_norm(x, weight.shape, weight, bias, eps=1e-5)

    def linear(x, name):  # Conv1D
        return x @ tensors[f"transformer.{name}.weight"] + tensors[f"transformer.{name}.bias"]

    wte = tensors["transformer.wte.weight"]
    x = wte[idx] + tensors["transformer.wpe.weight"][: idx.size(1)]  # (B, T, C)
    for h in (f"h.{i}" for i in range(n_layer)):
        q, k, v = (part.unflatten(2, (n_head, -1)).transpose(1, 2)  # (B, nh, T, hs)
                   for part in linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        x = x + linear(y.transpose(1, 2).flatten(2), f"{h}.attn.c_proj")
        u = F.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), approximate="tanh")  # (B, T, 4C)
        x = x + linear(u, f"{h}.mlp.c_proj")
    return norm(x, "ln_f") @ wte.T  # (B, T, V)


# ---- export
def export_hf(state: dict, out_dir: str | Path, log_dir: Path | None = None) -> None:
    """Write a checkpoint's model and tokenizer as the new folder `out_dir`.

    log_dir: the folder of the run, whose records go into the model card. `out_dir` appears by a rename, so a
    killed export leaves none. UserError if it is not empty, the model is not GPT-2, or the disk is full.
    """
    out = check_out_dir(out_dir)
    model, tokenizer = build_model(state, "to export"), checkpoint_tokenizer(state)
    config = model.config
    if config.norm_position != "pre":
        raise UserError("this model is Post-LN (norm_position=post) and cannot be exported: Hugging Face's "
                        "GPT-2 normalises before each block; train one with --norm_position=pre")
    tensors = _hf_tensors(config, state["model"])
    check_architecture(model, tensors)
    ids = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    files = {
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
        "config.json": _json({
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.n_vocab,
            "n_positions": config.block_size, "n_ctx": config.block_size,  # llama.cpp reads n_ctx
            "n_embd": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head, "n_inner": None,
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout, "attn_pdrop": config.dropout, "initializer_range": 0.02,
            "tie_word_embeddings": True, "use_cache": True, "torch_dtype": "float32", **ids}),
        # without these transformers warns at each call, and generates 256 tokens however short the context is
        "generation_config.json": _json({"pad_token_id": tokenizer.eot, **ids,
                                         "max_new_tokens": min(256, math.ceil(config.block_size / 2))}),
        **_tokenizer_files(tokenizer, config.block_size),
        "README.md": model_card(out.name, describe(state, log_dir)).encode()}

    incomplete = out.with_name(f".{out.name}.convert_hf.incomplete")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out.parent, "conversion", name=f"{incomplete.name}.lock"):
            shutil.rmtree(incomplete, ignore_errors=True)  # of a killed export
            try:
                incomplete.mkdir()
                for name, data in files.items():
                    write_atomically(incomplete / name, data)
                if out.exists():  # and is empty; Windows does not rename over it
                    out.rmdir()
                os.replace(incomplete, out)
                sync_folder(out.parent)
            finally:
                shutil.rmtree(incomplete, ignore_errors=True)
    except OSError as error:
        raise not_written(out, error) from error


def check_out_dir(out_dir: str | Path) -> Path:
    """Raises UserError unless the folder is new or empty."""
    out = Path(out_dir)
    if not out.name or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"out_dir={out_dir} has no name or is not empty; choose a new folder with "
                        f"--out_dir=ANOTHER, or remove this one")
    return out


def _json(value):
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _hf_tensors(config, weights):
    """{name: tensor} as transformers stores them: without lm_head and the padding rows of wte."""
    tensors = {}
    for name, tensor in weights.items():
        if name == "lm_head.weight":
            continue
        if name == "transformer.wte.weight":
            tensor = tensor[: config.n_vocab]
        if config.heads and ".attn.c_attn." in name:
            # (3, nh * hs) rows; after those of Q, of K and of V, zeros for the pruned heads
            parts = tensor.unflatten(0, (3, -1))
            missing = config.n_embd - parts.size(1)
            tensor = torch.cat((parts, parts.new_zeros(3, missing, *parts.shape[2:])), dim=1).flatten(0, 1)
        if config.heads and name.endswith("attn.c_proj.weight"):
            tensor = F.pad(tensor, (0, config.n_embd - tensor.size(1)))  # (C, nh * hs) -> (C, C)
        if name.endswith(CONV1D):
            tensor = tensor.T
        tensors[name] = tensor.float().contiguous()
    return tensors


def describe(state: dict, log_dir: Path | None = None) -> dict[str, str]:
    """{heading: fact} of a checkpoint and of the records of its run in `log_dir`, without absolute paths."""
    shape, run, made = (state.get(key, {}) for key in ("model_config", "config", "provenance"))
    n_params = sum(map(math.prod, gpt2_shapes(shape | {"vocab_size": shape["n_vocab"]}).values()))
    step, loss = state["step"], state.get("val_loss")
    commands, bits = [], []
    if run and log_dir:
        starts = read_jsonl(log_dir / "runs.jsonl", {"start_step": int, "arguments": [str]})
        commands = [map(_without_folders, start["arguments"]) for start in starts if not start["start_step"]]
        log = read_text(log_dir / "log.txt") if (log_dir / "log.txt").exists() else ""
        bits = re.findall(rf"^{step} val_bpb (\d+\.?\d*)$", log, re.MULTILINE)
    heads, all_heads = shape.get("heads"), shape["n_layer"] * shape["n_head"]
    facts = {
        "Model": f"GPT-2, {n_params:,} parameters: {shape['n_layer']} layers, {shape['n_head']} heads, width "
                 f"{shape['n_embd']}, context of {shape['block_size']:,} tokens",
        "Pruning": heads and f"{all_heads - sum(heads)} of {all_heads} heads are pruned; exported, they are "
                             f"zeros and take their full space",
        "Vocabulary": f"{state['tokenizer']['name']}, {shape['n_vocab']:,} ids",
        "Imported from": _without_folders(made.get("imported_from", "")),
        "Initial weights": _without_folders(run.get("init_from", "")),
        "Data": run and Path(run["data_dir"]).name,
        "Tokens seen": run and f"{step * run['batch_tokens']:,} in {step:,} steps",
        "Validation loss": loss and f"{loss:.4f} nats per token"
                           + (f", {float(bits[-1]):.4f} bits per byte" if bits else ""),
        "Command": commands and f"`{shlex.join(['python', 'train_gpt2.py', *commands[-1]])}`",
        "Made with": ", ".join(f"{key} {made[key]}" for key in ("git", "torch", "device") if key in made)}
    return {heading: fact for heading, fact in facts.items() if fact}


def _without_folders(text):
    """A path or --key=path, reduced to the name if the path is absolute: model cards are published."""
    return "=".join(Path(part).name if Path(part).is_absolute() else part for part in text.split("="))


def model_card(name: str, facts: dict[str, str]) -> str:
    """The README.md of an export."""
    lines = "\n".join(f"- **{heading}:** {fact}" for heading, fact in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A language model that continues text. It has not been trained to follow instructions.

{lines}

Load it from this folder, or from the hub as OWNER/NAME:

```python
from transformers import pipeline

generator = pipeline("text-generation", {json.dumps(name)})
print(generator("{EOT_TEXT}Hello", max_new_tokens=20)[0]["generated_text"])
```

`{EOT_TEXT}` begins a document, as in training.
"""


# ---- vocabularies
def hf_vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """{token: id} of vocab.json, <|endoftext|> last. Each byte of a token stands there as one character:
    itself if Latin-1 prints it, else the next one from U+0100 on, so without spaces and control characters.
    """
    order = byte_order()
    printed = order.index(0)  # the first byte that has no character of its own
    characters = {byte: chr(byte if i < printed else 256 + i - printed) for i, byte in enumerate(order)}
    texts = (token.decode("latin-1").translate(characters) for token in tokenizer.tokens[:-1])
    return {text: i for i, text in enumerate(texts)} | {EOT_TEXT: tokenizer.eot}


def derive_merges(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair from which merging makes each token, by rank; tokens that no merge makes are left out.

    Ours (and tiktoken's) rule joins any two neighbours that make a token; Hugging Face's, only pairs in a
    list. These pairs suffice: until something is merged across its ends, the bytes of a future token are
    merged as they would be alone, which happens in one way for each token.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            rank, i = min((ranks.get(left + right, len(tokens)), i)
                          for i, (left, right) in enumerate(itertools.pairwise(parts)))
            if rank == len(tokens):
                break
            parts[i : i + 2] = [tokens[rank]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _tokenizer_files(tokenizer, block_size):
    """{name: bytes} of the files of a tokenizer."""
    vocab = hf_vocabulary(tokenizer)
    text = dict(zip(tokenizer.tokens, vocab))  # {token: as in vocab.json}
    merges = [f"{text[left]} {text[right]}" for left, right in derive_merges(tokenizer.tokens[:-1])]
    if len(vocab) < tokenizer.n_vocab or len(merges) < tokenizer.n_vocab - 257:
        raise UserError(f"vocabulary {tokenizer.name} has tokens that no merge makes, or a rank for "
                        f"{EOT_TEXT}; a model with it cannot be exported")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    special = {"id": tokenizer.eot, "content": EOT_TEXT, "single_word": False, "lstrip": False,
               "rstrip": False, "normalized": False, "special": True}
    return {
        RANK_FILE: tokenizer.rank_file,
        "vocab.json": _json(vocab),
        "merges.txt": "".join(f"{line}\n" for line in ["#version: 0.2", *merges]).encode(),
        "tokenizer.json": _json({
            "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
            "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
            "added_tokens": [special],
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                      "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": False, "vocab": vocab, "merges": merges}}),
        "tokenizer_config.json": _json({
            "tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size, "bos_token": EOT_TEXT,
            "eos_token": EOT_TEXT, "unk_token": EOT_TEXT, "add_prefix_space": False,
            "clean_up_tokenization_spaces": False})}


# ---- the script
def main() -> None:
    if bool(source) == bool(checkpoint) or not out_dir:
        raise UserError("give --source=MODEL to import it or --checkpoint=LOG_DIR to export it, and "
                        "--out_dir=NEW_FOLDER")
    out = written = check_out_dir(out_dir)
    state, log_dir = load_any(source or checkpoint), None
    if checkpoint:
        path, _ = split_best(checkpoint)
        log_dir = path if path.is_dir() else path.parent
        export_hf(state, out, log_dir)
    elif "imported_from" in state.get("provenance", {}):
        check_out_dir(out).mkdir(parents=True, exist_ok=True)  # once more, as a download takes long
        written = save_checkpoint(out, 0, state)
    else:
        raise UserError(f"source={source} is a checkpoint of train_gpt2.py already; to export it, type "
                        f"--checkpoint={shlex.quote(source)}")
    for heading, fact in describe(state, log_dir).items():
        print(f"{heading + ':':16} {fact}")
    print(f"wrote {written}; try it: python generate.py --checkpoint={shlex.quote(out_dir)} --prompt=Hello")


if __name__ == "__main__":
    configure(globals())
    main()
