"""
GPT-2 to and from Hugging Face's format: OpenAI's weights in, your own models out. nanoGPT's checkpoints too.

    python convert_hf.py --source=gpt2 --out_dir=log_gpt2           # theirs to ours: log_gpt2/ckpt_0000000.pt
    python convert_hf.py --source=folder/ --out_dir=log_mine        # from a folder on this disk
    python convert_hf.py --source=out/ckpt.pt --out_dir=log_nano    # from nanoGPT, or build-nanogpt
    python convert_hf.py --checkpoint=log_demo --out_dir=demo_hf    # ours to theirs

--source is gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded into the hub's cache: about 0.5, 1.5,
3.2, 6.4 GB), or a folder with config.json and model.safetensors. A folder that holds these, or checkpoints of
ours, comes before a name: with such a folder gpt2/ here, openai-community/gpt2 still names the hub's.
--out_dir is a new folder; it appears complete or not at all. Neither way needs the package transformers.

What comes out is what `GPT2LMHeadModel` and `GPT2TokenizerFast` load:
    config.json, generation_config.json
    model.safetensors       float32; wte without padding rows, lm_head is wte; matrices transposed (Conv1D)
    vocab.json, merges.txt, tokenizer.json, tokenizer_config.json
It tokenises like ours, except that <|endoftext|> in a text is the special id there, and ordinary text here.
generate.py puts it before a prompt, as training does before a document; transformers does not: type it there.
The same model comes in again bit by bit. Pruned heads come out as heads of zeros: the same logits. A model
that is not GPT-2 is refused: Post-LN, or one of a changed model.py whose tensors or logits are not GPT-2's.

What comes in needs GPT-2's architecture and a byte-level vocabulary whose last id is <|endoftext|>; whatever
differs is refused by name. Without tokenizer files, 50,257 ids are GPT-2's.

Of a checkpoint of nanoGPT or build-nanogpt the weights come in, and none of its code is run; the vocabulary
must be GPT-2's, as the file holds none. Biases that a model lacks (bias=False) are zeros here. nanoGPT's GELU
is the exact one, ours OpenAI's tanh: the logits differ by up to about 1e-3. What a file is, is decided by its
contents, not by its name.
"""

import glob
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import types
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bpe import EOT_TEXT, GPT2_SHA256, byte_order, load_tokenizer, rank_file, tokenizer_from_ranks
from checkpoint import (
    FORMAT,
    build_model,
    check_finite,
    checkpoint_tokenizer,
    describe_model,
    describe_tokenizer,
    holds_checkpoint,
    is_temporary,
    load_checkpoint,
    save_checkpoint,
)
from configurator import Between, OneOf, PathName, UserError, configure
from files import check, not_written, read_json, read_text, sync_file, sync_folder, write_atomically
from model import GPT, GPTConfig

source: PathName = ""  # to import: gpt2|gpt2-medium|gpt2-large|gpt2-xl, a folder of Hugging Face's, a file
checkpoint: PathName = ""  # to export: a file, a folder for its newest, or FOLDER:best
out_dir: PathName = ""  # a new folder: a log_dir with one checkpoint (import), or a model folder (export)

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
ORGANIZATION = "openai-community"  # of them on the hub
GPT2_VOCAB = 50_257  # ids of its tokenizer
GPT2_PADDED = 51_200  # rows of wte at most: the next multiple of 1,024
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# stored as (in, out) there, as (out, in) by nn.Linear
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SIZE, ID = Between(1, 2**20), Between(0, 2**31)
SHAPE = {"n_layer": Between(1, 1000), "n_head": SIZE, "n_embd": SIZE, "vocab_size": SIZE}
# what the files of a folder may say for the model to be ours, as far as it bears on the logits or the ids
CONFIG = {"model_type": OneOf("gpt2"), **SHAPE, "n_positions": SIZE, "n_inner?": (None, SIZE),
          "activation_function?": OneOf("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
          "layer_norm_epsilon?": OneOf(1e-5), "scale_attn_weights?": OneOf(True),
          "scale_attn_by_inverse_layer_idx?": OneOf(False), "add_cross_attention?": OneOf(False)}
TOKENIZER = {"model": {"type": OneOf("BPE"), "vocab": {str: ID}, "merges": [([str], str)],
                       "ignore_merges?": bool},
             "normalizer?": None, "added_tokens?": [{"content": str, "id": ID}],
             "pre_tokenizer": {"type": OneOf("ByteLevel"), "add_prefix_space": OneOf(False),
                               "use_regex?": OneOf(True)}}
TOKENIZER_CONFIG = {"added_tokens_decoder?": {str: {"content": str}}, "add_prefix_space?": OneOf(False)}
NANOGPT = {**SHAPE, "block_size": SIZE, "bias?": bool, "dropout?": float}  # build-nanogpt's has no last two
PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


# ---- where a model is ----------------------------------------------------------


def load_any(source: str | Path) -> dict:
    """The state of a checkpoint, on the CPU, from a model of any kind; `checkpoint.build_model` builds it.

    `source`: a checkpoint of ours (a file, a folder for its newest, or FOLDER:best), one of nanoGPT or
    build-nanogpt, a folder with config.json and model.safetensors, or one of gpt2, gpt2-medium, gpt2-large
    and gpt2-xl. A path that holds a model comes before a name, and a line on stderr says so. An imported
    state has format, step (0), model, model_config, tokenizer and provenance, and no optimizers. Raises
    UserError with what is wrong and what to type.
    """
    path = Path(source)
    if _holds_hf(path) or (_hub_repo(source) and not holds_checkpoint(path)):
        return import_hf(source)
    if not holds_checkpoint(path):
        if not path.exists():
            raise UserError(f"{source}: not there; give one of {', '.join(HUB_NAMES)}, a folder with "
                            f"config.json and {WEIGHTS}, or a checkpoint of ours: a file, a log_dir or "
                            f"LOG_DIR:best (another model of the hub: download it, then name its folder)")
        raise UserError(f"{source}: wanted a folder with config.json and {WEIGHTS}, or with ckpt_*.pt, got "
                        f"{_listing(path)}; name a file in it, another folder, or one of "
                        f"{', '.join(HUB_NAMES)}")
    if path.is_file():
        with open(path, "rb") as file:
            begin = file.read(9)
        if b"{" in (begin[:1], begin[8:]):
            raise UserError(f"{source}: a {'JSON' if begin[:1] == b'{' else 'safetensors'} file, no "
                            f"checkpoint; name the folder that holds {WEIGHTS} and config.json")
        if (saved := _torch_file(path)) and "format" not in saved:
            return import_nanogpt(path, saved)
    if _hub_repo(source):
        _say_which(source)
    return load_checkpoint(source)


def import_nanogpt(path: Path, saved: dict) -> dict:
    """The state of `load_any`, of what `_torch_file` read of a checkpoint of nanoGPT or build-nanogpt."""
    if nanogpt := "model_args" in saved:
        place, config = f"{path}, model_args", saved["model_args"]
    elif isinstance(saved.get("config"), types.SimpleNamespace):
        place, config = f"{path}, config", vars(saved["config"])
    else:
        raise UserError(f"{path}: holds {', '.join(map(str, [*saved][:5]))}, wanted a checkpoint of "
                        f"train_gpt2.py, nanoGPT or build-nanogpt; of a .bin of Hugging Face's make a "
                        f"{WEIGHTS} with transformers' save_pretrained, and name its folder")
    check(config, NANOGPT, place)
    if more := sorted(map(str, config.keys() - {name.rstrip("?") for name in NANOGPT})):
        raise UserError(f"{place}: {', '.join(more)} is of another architecture than GPT-2; model.py has no "
                        f"other")
    rows = config["vocab_size"]
    if not GPT2_VOCAB <= rows <= GPT2_PADDED:
        raise UserError(f"{place}: vocab_size={rows}, wanted GPT-2's {GPT2_VOCAB}, or padded up to "
                        f"{GPT2_PADDED}; this model has another tokenizer, which is not in the file")
    check(saved.get("model"), {str: torch.Tensor}, f"{path}, model")
    with zipfile.ZipFile(path) as archive:
        if corrupt := archive.testzip():  # torch skips the CRCs and would load flipped bits
            raise UserError(f"{path}: corrupt, the checksum of {corrupt} is wrong; copy it again")
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=rows, n_vocab=GPT2_VOCAB, **{
            key: config[key] for key in ("block_size", "n_layer", "n_head", "n_embd")}))
    tensors = _float32(path, ((name.removeprefix("_orig_mod."), tensor)
                              for name, tensor in saved["model"].items()))
    if config.get("bias") is False:
        biases = {name.removeprefix("transformer."): torch.zeros(tensor.shape, device="cpu")
                  for name, tensor in model.named_parameters() if name.endswith(".bias")}
        tensors = biases | tensors
    weights = {name: tensors[name.removeprefix("transformer.")].clone()  # of pages of the file
               for name in _checked_names(path, model, tensors, transposed=())}
    if nanogpt:
        print("note: nanoGPT's GELU is the exact one, ours OpenAI's tanh approximation of it: the logits "
              "differ by up to about 1e-3", file=sys.stderr)
    return _imported(model, weights, load_tokenizer("gpt2"), str(path.absolute()))


def _torch_file(path):
    """The dict in a file of torch.save, its tensors not read yet; {} of any other file.

    Runs none of its code: build-nanogpt's GPTConfig, a pickled class, becomes a namespace of its fields.
    """
    try:
        theirs = [(types.SimpleNamespace, name)
                  for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)
                  if name.endswith(".GPTConfig")]
        with torch.serialization.safe_globals(theirs):
            saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # a dozen types; load_checkpoint says what is wrong
        return {}
    return saved if isinstance(saved, dict) else {}


def _imported(model, weights, tokenizer, origin):
    """The state of `load_any` of weights without lm_head, which is wte."""
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return {"format": FORMAT, "step": 0, "model": weights, "model_config": describe_model(model),
            "tokenizer": describe_tokenizer(tokenizer), "provenance": {"imported_from": origin}}


def import_hf(source: str | Path) -> dict:
    """The state of `load_any`, of a folder of Hugging Face's or a name on the hub, without transformers.

    The model is in float32, its vocab_size the rows of wte, its n_vocab the tokenizer's ids (the same, but
    for a padded wte), its dropout 0.
    """
    folder, origin, repo = Path(source), str(Path(source).absolute()), _hub_repo(source)
    if repo and not _holds_hf(folder):
        if folder.exists():
            print(f"note: the folder {source} here holds no model; taking {repo} from the hub",
                  file=sys.stderr)
        folder, origin = _download(repo), f"hub: {repo}"
    elif repo:
        _say_which(source)
    config = _read_config(folder)
    rows = config["vocab_size"]
    tokenizer = _read_tokenizer(folder, rows)
    if rows < tokenizer.n_vocab:
        raise UserError(f"{folder}: vocab_size={rows} in config.json, wanted {tokenizer.n_vocab} at least, "
                        f"one for each id of its tokenizer; fix the folder, or take another")
    tensors = _read_tensors(folder)
    # No rows beyond those there: GPT-2's logits are about -30 to -100, and rows of zeros, whose logits
    # are 0, would take all the probability of the softmax that training differentiates.
    wanted = GPTConfig(block_size=config["n_positions"], vocab_size=rows, n_vocab=tokenizer.n_vocab,
                       **{key: config[key] for key in ("n_layer", "n_head", "n_embd")})
    with torch.device("meta"):
        model = GPT(wanted)
    weights = {name: tensors[name.removeprefix("transformer.")]
               for name in _checked_names(folder, model, tensors, transposed=CONV1D)}
    weights = {name: tensor.T.contiguous() if name.endswith(CONV1D) else tensor
               for name, tensor in weights.items()}
    return _imported(model, weights, tokenizer, origin)


def _holds_hf(folder):
    return (folder / "config.json").is_file()


def _hub_repo(source):
    """Full name on the hub of one of HUB_NAMES, with or without it given, else None."""
    name = str(source).removeprefix(f"{ORGANIZATION}/")
    return f"{ORGANIZATION}/{name}" if name in HUB_NAMES else None


def _say_which(source):
    print(f"note: {source} is the folder {Path(source).absolute()}, not the hub's model; "
          f"for that one type {_hub_repo(source)}, or move the folder", file=sys.stderr)


def _listing(folder):
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ["a file"]
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5) or "an empty one"


def _download(repo):
    """The folder in the hub's cache that has config.json and model.safetensors of `repo`."""
    # here, so that who only reads folders needs no client of the hub
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    import hub

    def attempt(name):
        try:
            return Path(hf_hub_download(repo, name))
        except LocalEntryNotFoundError as error:  # the reason is in its cause
            raise error.__cause__ or error from None

    try:
        # two attempts for the first: without a network the client tries for 25 s of its own
        config = hub.retry(f"{repo}/config.json", lambda: attempt("config.json"), attempts=2)
        hub.retry(f"{repo}/{WEIGHTS}", lambda: attempt(WEIGHTS))
    except UserError as error:
        raise UserError(
            f"cannot fetch {repo} from {constants.ENDPOINT}: {error}.\n"
            f"Other ways: a mirror, with HF_ENDPOINT=https://...; or put config.json and {WEIGHTS} of "
            f"https://huggingface.co/{repo} into a folder and give that folder's path instead") from error
    return config.parent


# ---- in ------------------------------------------------------------------------


def _read_json(path, schema):
    try:
        return read_json(path, schema)
    except UserError as error:
        raise UserError(f"{error}; fetch it again, or take another model: only GPT-2 as OpenAI released it, "
                        f"with a byte-level tokenizer, comes in") from error


def _read_config(folder):
    """config.json as a dict, once every setting in it that bears on the logits is one that our model has."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: wanted a folder with config.json and {WEIGHTS}, got {_listing(folder)}; "
                        f"name another, or one of {', '.join(HUB_NAMES)}")
    config = _read_json(path, CONFIG)
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise UserError(f"{path}: n_inner={config['n_inner']}, wanted null or {4 * config['n_embd']} "
                        f"(4 n_embd); model.py has no other")
    return config


def _read_tensors(folder):
    """{name without "transformer.": float32 tensor} of all files, without the buffers of old versions."""
    files = [WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        if not (folder / INDEX).is_file():
            others = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "no weights"
            raise UserError(f"{folder}: wanted {WEIGHTS} or {INDEX}, got {others}; of a .bin, which can run "
                            f"code when it is read, make one with transformers: "
                            f"GPT2LMHeadModel.from_pretrained({str(folder)!r}).save_pretrained('new_folder')")
        files = sorted(set(_read_json(folder / INDEX, {"weight_map": {str: str}})["weight_map"].values()))
        if odd := [name for name in files if not re.fullmatch(r"[^/\\\0]+\.safetensors", name)]:
            raise UserError(f"{folder / INDEX}: {odd[0]!r}, wanted the name of a .safetensors file beside "
                            f"it; fetch it again")

    def load(file):
        try:
            return load_file(folder / file).items()
        except (OSError, SafetensorError, KeyError) as error:  # KeyError: a dtype that torch lacks
            raise UserError(f"{folder / file}: missing or corrupt ({error}); fetch it again") from error

    return _float32(folder, itertools.chain.from_iterable(map(load, files)))


def _float32(place, stored: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """{name without "transformer.": float32 tensor} of (name, tensor) pairs, without the buffers of old
    versions."""
    tensors, wrong = {}, []
    for stored_name, tensor in stored:
        name = stored_name.removeprefix("transformer.")
        if re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", name):
            continue  # the causal mask and its -1e4
        if name in tensors:
            wrong.append(f"{stored_name} occurs twice, wanted it once")
        elif tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            wrong.append(f"{stored_name} is {tensor.dtype}, wanted float32, float16 or bfloat16")
        tensors[name] = tensor.float()
    if wrong:
        raise UserError(f"{place}: {'; '.join(wrong)}; convert them, or take another copy")
    return tensors


def _checked_names(place, model, tensors, transposed):
    """The names of the model's tensors, the tied lm_head left out, once `tensors` are those and fit.

    Those whose names end in `transposed` are (in, out) in `tensors`.
    """
    shapes = {name: tuple(tensor.shape[::-1] if name.endswith(transposed) else tensor.shape)
              for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    wanted = {name.removeprefix("transformer."): shape for name, shape in shapes.items()}
    wrong = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in tensors]
    wrong += [f"not wanted {name} {tuple(tensors[name].shape)}"
              for name in sorted(tensors.keys() - wanted.keys() - {"lm_head.weight"})]
    wrong += [f"{name} is {tuple(tensors[name].shape)}, wanted {shape}" for name, shape in wanted.items()
              if name in tensors and tuple(tensors[name].shape) != shape]
    if wrong:
        raise UserError(f"{place}: its tensors are not those of its config:\n    "
                        + "\n    ".join(wrong) + "\nfetch it again, or fix the config")
    head = tensors.get("lm_head.weight")
    if head is not None and not torch.equal(head, tensors["wte.weight"]):
        raise UserError(f"{place}: lm_head.weight is not wte.weight; in GPT-2 they are one matrix (tied), "
                        f"and model.py has no other")
    return list(shapes)


# ---- vocabularies --------------------------------------------------------------


def byte_characters() -> list[str]:
    """The character that stands for each byte in GPT-2's vocab.json: itself, if Latin-1 prints it, else the
    next one from U+0100 on, so that no token has spaces or control characters in it."""
    order, characters = byte_order(), [""] * 256
    printed = order.index(0)  # 0 is the first byte that has no character of its own
    for place, byte in enumerate(order):
        characters[byte] = chr(byte if place < printed else 256 + place - printed)
    return characters


def derive_merges(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair that merging makes each token of, in the order of ranks; none for those that it never makes.

    Ours (and tiktoken's) rule joins two neighbours if they make a token, whatever they are; Hugging Face's,
    if they are in a list. But no others come up than these: as long as nothing is merged across the ends of
    a token-to-be, its bytes are merged as they would be alone, which is one way for each token.
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


def _read_tokenizer(folder, rows):
    """The Tokenizer of a folder's files; GPT-2's where there are none and wte has GPT-2's rows."""
    found = _read_vocabulary(folder)
    if found is None:
        if rows != GPT2_VOCAB:
            raise UserError(f"{folder}: no tokenizer.json, no vocab.json, and vocab_size={rows}, not "
                            f"GPT-2's {GPT2_VOCAB}; put the tokenizer's files there")
        return load_tokenizer("gpt2")
    path, tokens, got, looks_up_first = found
    characters = byte_characters()
    wanted = [(_text(left, characters), _text(right, characters)) for left, right in derive_merges(tokens)]
    if got != wanted:
        place = next((i for i, pair in enumerate(zip(got, wanted)) if pair[0] != pair[1]),
                     min(len(got), len(wanted)))
        one, other = (" ".join(some[place]) if place < len(some) else "none" for some in (got, wanted))
        raise UserError(f"{path}: of {len(got)} merges number {place + 1} is {one!r}, wanted {other!r} by "
                        f"the order of the ids, which is what bpe.py goes by: it would cut texts otherwise")
    if len(wanted) < len(tokens) - 256 and not looks_up_first:
        raise UserError(f"{path}: {len(tokens) - 256 - len(wanted)} tokens that no merge makes, and no "
                        f"ignore_merges=true; bpe.py, which looks up whole words, would cut texts otherwise")
    ranks = rank_file(tokens)
    is_gpt2 = hashlib.sha256(ranks).hexdigest() == GPT2_SHA256
    return tokenizer_from_ranks(ranks, "gpt2" if is_gpt2 else folder.absolute().name)


def _read_vocabulary(folder):
    """(file, tokens by id, merges, whether whole words are looked up first), or None without such files."""
    added, looks_up_first = {}, False
    if (path := folder / "tokenizer_config.json").is_file():
        decoder = _read_json(path, TOKENIZER_CONFIG).get("added_tokens_decoder", {})
        added = {token["content"]: int(i) if re.fullmatch("[0-9]{1,9}", i) else -1
                 for i, token in decoder.items()}
    if (path := folder / "tokenizer.json").is_file():
        saved = _read_json(path, TOKENIZER)
        added |= {token["content"]: token["id"] for token in saved.get("added_tokens", [])}
        vocab, merges = saved["model"]["vocab"], saved["model"]["merges"]
        looks_up_first = saved["model"].get("ignore_merges", False)
    elif (path := folder / "vocab.json").is_file():
        if not (folder / "merges.txt").is_file():
            raise UserError(f"{folder}: vocab.json without merges.txt; put that there too")
        if (folder / "added_tokens.json").is_file():
            added |= _read_json(folder / "added_tokens.json", {str: ID})
        vocab = _read_json(path, {str: ID})
        lines = read_text(folder / "merges.txt").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    else:
        return None
    tokens = _tokens_of(path, {**vocab, **added}, [text for text in added if text != EOT_TEXT])
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    return path, tokens, pairs, looks_up_first


def _tokens_of(path, vocab, others):
    """The tokens by id, without EOT, of {token in byte_characters: id}."""
    texts = {i: text for text, i in vocab.items()}
    last = len(vocab) - 1
    if others:
        raise UserError(f"{path}: added tokens {', '.join(map(repr, others))}; wanted {EOT_TEXT} alone, as "
                        f"bpe.py has no other special token")
    if sorted(texts) != list(range(last + 1)) or texts.get(last) != EOT_TEXT:
        raise UserError(f"{path}: {EOT_TEXT} has id {vocab.get(EOT_TEXT)} and the {last + 1} ids are "
                        f"{min(texts, default=None)} to {max(texts, default=None)}; wanted 0 to {last}, "
                        f"{EOT_TEXT} the last, as bpe.py numbers them")
    bytes_of = {character: byte for byte, character in enumerate(byte_characters())}
    odd = [texts[i] for i in range(last) if not bytes_of.keys() >= set(texts[i])]
    if odd:
        raise UserError(f"{path}: {len(odd)} tokens are not byte-level, first {odd[0]!r}; wanted GPT-2's "
                        f"characters for bytes, as bpe.py has that kind of vocabulary only")
    return [bytes(bytes_of[character] for character in texts[i]) for i in range(last)]


def _text(token, characters):
    return "".join(characters[byte] for byte in token)


# ---- out -----------------------------------------------------------------------


def export_hf(state: dict, out_dir: str | Path) -> list[str]:
    """Write a checkpoint's model and tokenizer as the new folder `out_dir`; returns what a user should know.

    The folder appears by a rename, so that it is complete if it is there. Raises UserError if it exists and
    is not empty, if the model is Post-LN or not GPT-2 any more, and where the disk does not do.
    """
    out = check_out_dir(out_dir)
    model, tokenizer = build_model(state, "to export"), checkpoint_tokenizer(state)
    config, notes = model.config, []
    if config.norm_position != "pre":
        raise UserError("this model is Post-LN (norm_position=post), which Hugging Face's GPT-2 cannot be: "
                        "it normalises before each block, and after the last; only Pre-LN can be exported")
    if config.n_vocab != tokenizer.n_vocab:
        raise UserError(f"this model predicts {config.n_vocab} ids, and its tokenizer has "
                        f"{tokenizer.n_vocab}; wanted a checkpoint as train_gpt2.py writes it")
    gone = sum(config.n_head - config.heads_of(layer) for layer in range(config.n_layer))
    if gone:
        notes.append(f"{gone} of {config.n_layer * config.n_head} heads are pruned, which the format cannot "
                     f"hold: they are zeros in it; the logits are the same, the size is the dense model's")
    tensors = _tensors_out(config, state["model"])
    check_architecture(model, tensors)
    files, reachable = _tokenizer_files(tokenizer, config.block_size)
    if not reachable:
        notes.append("some tokens are made by no merge, only looked up whole: load this tokenizer with "
                     "AutoTokenizer, as vocab.json and merges.txt alone cannot say so")
    ids = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    files |= {
        "config.json": {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.n_vocab,
            "n_positions": config.block_size, "n_embd": config.n_embd, "n_layer": config.n_layer,
            "n_head": config.n_head, "n_inner": None, "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5, "resid_pdrop": config.dropout, "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout, "initializer_range": 0.02, "tie_word_embeddings": True,
            "use_cache": True, "torch_dtype": "float32", **ids},
        # without a pad_token_id transformers says at each call that it takes EOT
        # and without a max_length it runs beyond the last position
        "generation_config.json": {"pad_token_id": tokenizer.eot, "max_length": config.block_size, **ids},
    }
    temporary = out.with_name(f"{out.name}.convert_hf.{os.getpid()}.tmp")
    _remove_temporaries(out)
    try:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        with open(temporary / WEIGHTS, "rb+") as file:
            sync_file(file)
        for name, value in files.items():
            text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False) + "\n"
            write_atomically(temporary / name, text.encode())
        shutil.copymode(temporary / "config.json", temporary / WEIGHTS)  # else its owner alone may read it
        sync_folder(temporary)
        if out.exists():  # and is empty; not every system renames over that
            out.rmdir()
        os.replace(temporary, out)
        sync_folder(out.parent)
    except SafetensorError as error:  # it has the number of the system's error in its text alone
        number = re.search(r"os error (\d+)", str(error))
        raise not_written(out, OSError(int(number[1]) if number else 0, str(error))) from error
    except OSError as error:
        raise not_written(out, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return notes


def _remove_temporaries(out):
    """Remove what killed exports to `out` have left, but not the folder of one that is at work."""
    if os.name == "nt":  # where the signal 0 would end the process
        return
    for path in out.parent.glob(f"{glob.escape(out.name)}.convert_hf.*.tmp"):
        try:
            os.kill(int(path.suffixes[-2][1:]), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (OSError, ValueError, OverflowError):  # another user's, or no folder of ours
            pass


def check_out_dir(out_dir: str | Path) -> Path:
    """Raises UserError unless the folder is new or empty."""
    out = Path(out_dir)
    # a killed import leaves a temporary file
    if out.exists() and (not out.is_dir() or any(not is_temporary(path.name) for path in out.iterdir())):
        raise UserError(f"out_dir={out_dir} is there already and not empty; give the name of a new folder "
                        f"with --out_dir=ANOTHER, or remove this one")
    return out


def _tensors_out(config, weights):
    """{name: tensor} as transformers stores them. wte without its padding rows, and for lm_head too."""
    tensors = {}
    for name, tensor in weights.items():
        if name == "lm_head.weight":
            continue
        if name == "transformer.wte.weight":
            tensor = tensor[: config.n_vocab]
        if config.heads and ".attn.c_attn." in name:
            # (3, nh * hs) rows, and behind those of Q, of K and of V zeros for the heads that are gone
            parts = tensor.unflatten(0, (3, -1))
            missing = config.n_embd - parts.size(1)
            tensor = torch.cat((parts, parts.new_zeros(3, missing, *parts.shape[2:])), dim=1).flatten(0, 1)
        if config.heads and name.endswith("attn.c_proj.weight"):
            missing = config.n_embd - tensor.size(1)
            tensor = torch.cat((tensor, tensor.new_zeros(config.n_embd, missing)), dim=1)
        if name.endswith(CONV1D):
            tensor = tensor.T
        tensors[name] = tensor.float().contiguous()
    return tensors


def check_architecture(model: GPT, tensors: dict[str, torch.Tensor]) -> None:
    """Raises UserError unless GPT2LMHeadModel with the exported `tensors` is `model`.

    model.py may have been changed, and config.json cannot tell: transformers would load the tensors, and
    compute other logits with them.
    """
    config, C, T = model.config, model.config.n_embd, model.config.block_size
    shapes = {"wte.weight": (config.n_vocab, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i in range(config.n_layer):
        for name, shape in (("ln_1", (C,)), ("attn.c_attn", (C, 3 * C)), ("attn.c_proj", (C, C)),
                            ("ln_2", (C,)), ("mlp.c_fc", (C, 4 * C)), ("mlp.c_proj", (4 * C, C))):
            shapes[f"h.{i}.{name}.weight"], shapes[f"h.{i}.{name}.bias"] = shape, shape[-1:]
    found = {name.removeprefix("transformer."): tuple(tensor.shape) for name, tensor in tensors.items()}
    cure = "model.py has been changed, and this format has only GPT-2; undo the change to export"
    differing = [f"{name}: {found.get(name, 'none')}, GPT-2 has {shapes.get(name, 'none')}"
                 for name in sorted(found.keys() | shapes.keys()) if found.get(name) != shapes.get(name)]
    if differing:
        raise UserError(f"this model's tensors are not GPT-2's: {'; '.join(differing[:5])}: {cure}")
    idx = torch.randint(config.n_vocab, (1, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(idx), hf_logits(tensors, config.n_layer, config.n_head, idx)
    difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if not difference <= 1e-4 * largest:  # rounding in float32 makes about 1e-6 of it
        raise UserError(f"transformers would compute other logits with these weights, by up to "
                        f"{difference:.3g} where the largest is {largest:.3g}: {cure}")


def hf_logits(tensors: dict[str, torch.Tensor], n_layer: int, n_head: int, idx: torch.Tensor) -> torch.Tensor:
    """What GPT2LMHeadModel computes with exported tensors, written out in float32; no line of model.py."""
    def norm(x, name):
        weight, bias = (tensors[f"transformer.{name}.{kind}"] for kind in ("weight", "bias"))
        return F.layer_norm(x, weight.shape, weight, bias, eps=1e-5)

    def linear(x, name):  # Conv1D
        return x @ tensors[f"transformer.{name}.weight"] + tensors[f"transformer.{name}.bias"]

    T = idx.size(1)
    wte = tensors["transformer.wte.weight"]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)  # (T, T)
    x = wte[idx] + tensors["transformer.wpe.weight"][:T]  # (B, T, C)
    for h in (f"h.{i}" for i in range(n_layer)):
        q, k, v = (part.unflatten(2, (n_head, -1)).transpose(1, 2)  # (B, nh, T, hs)
                   for part in linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").chunk(3, dim=2))
        scores = (q @ k.mT / math.sqrt(q.size(3))).masked_fill(future, -math.inf)  # (B, nh, T, T)
        x = x + linear((scores.softmax(dim=3) @ v).transpose(1, 2).flatten(2), f"{h}.attn.c_proj")
        u = linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")  # (B, T, 4C)
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))  # gelu_new
        x = x + linear(u, f"{h}.mlp.c_proj")
    return norm(x, "ln_f") @ wte.T  # (B, T, V)


def _tokenizer_files(tokenizer, block_size):
    """({file name: its JSON value or text}, whether merging makes every token)."""
    tokens, characters = tokenizer.tokens[:-1], byte_characters()
    if EOT_TEXT.encode() in tokens:
        raise UserError(f"vocabulary {tokenizer.name} has a rank for the text {EOT_TEXT}, which in "
                        f"vocab.json is the special id {tokenizer.eot}; the format cannot hold both")
    vocab = {_text(token, characters): i for i, token in enumerate(tokens)} | {EOT_TEXT: tokenizer.eot}
    merges = [f"{_text(left, characters)} {_text(right, characters)}"
              for left, right in derive_merges(tokens)]
    reachable = len(merges) == len(tokens) - 256
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    special = {"id": tokenizer.eot, "content": EOT_TEXT, "single_word": False, "lstrip": False,
               "rstrip": False, "normalized": False, "special": True}
    settings = {
        # GPT2Tokenizer builds its own model from the vocabulary and the merges, and would lose ignore_merges
        "tokenizer_class": "GPT2Tokenizer" if reachable else "PreTrainedTokenizerFast",
        "model_max_length": block_size, "bos_token": EOT_TEXT, "eos_token": EOT_TEXT, "unk_token": EOT_TEXT,
        "add_prefix_space": False, "clean_up_tokenization_spaces": False}
    return {
        "vocab.json": vocab,
        "merges.txt": "".join(f"{line}\n" for line in ["#version: 0.2", *merges]),
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special],
            "normalizer": None, "pre_tokenizer": PRE_TOKENIZER, "post_processor": byte_level,
            "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                      "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": not reachable, "vocab": vocab, "merges": merges}},
        "tokenizer_config.json": settings,
    }, reachable


# ---- the script ----------------------------------------------------------------


def main() -> None:
    if bool(source) == bool(checkpoint) or not out_dir:
        raise UserError(
            f"got --source={source} --checkpoint={checkpoint} --out_dir={out_dir}; wanted one of the first "
            f"two and the last:\n"
            f"    python convert_hf.py --source=gpt2 --out_dir=log_gpt2       # Hugging Face's to ours\n"
            f"    python convert_hf.py --checkpoint=log --out_dir=gpt2_hf     # ours to Hugging Face's")
    given, name = Path(source or checkpoint), shlex.quote(out_dir)
    out = check_out_dir(out_dir)
    ours = "format" in _torch_file(given) if given.is_file() else holds_checkpoint(given)
    if source and ours and not _holds_hf(given):
        raise UserError(f"source={source} is a checkpoint of ours already; to export it, type "
                        f"--checkpoint={shlex.quote(source)} in place of --source")
    if checkpoint and _holds_hf(given):
        raise UserError(f"checkpoint={checkpoint} is a folder of Hugging Face's; to import it, type "
                        f"--source={shlex.quote(checkpoint)} in place of --checkpoint")
    state = load_any(source or checkpoint)
    tokenizer = checkpoint_tokenizer(state)
    if source:
        check_finite(((key, tensor) for key, tensor in state["model"].items() if key != "lm_head.weight"),
                     source)
        out.mkdir(parents=True, exist_ok=True)
        written = save_checkpoint(out, 0, state)
        notes = []
        following = [f"python generate.py --checkpoint={name} --prompt=Hello",
                     f"python train_gpt2.py config/finetune_gpt2.py --init_from={name} --data_dir=DATA"]
    else:
        notes, written = export_hf(state, out), out
        code = (f"from transformers import pipeline; "
                f"print(pipeline('text-generation', {str(out)!r})('Hello')[0]['generated_text'])")
        plain = re.fullmatch(r"[\w./: -]+", str(out))  # nothing in it that a shell would take for more
        following = [f'python -c "{code}"' if plain else f"python -c {shlex.quote(code)}"]
    config = GPTConfig(**state["model_config"])
    with torch.device("meta"):
        model = GPT(config)
    padding = (config.vocab_size - config.n_vocab) * config.n_embd
    print(f"model       {config.n_layer} layers, {config.n_head} heads, n_embd {config.n_embd}, context "
          f"{config.block_size}: {model.num_params() - padding:,} parameters")
    print(f"tokenizer   {tokenizer.name}, {tokenizer.n_vocab:,} ids, {EOT_TEXT} = {tokenizer.eot}")
    for note in notes:
        print(f"note        {note}")
    print(f"wrote       {written}")
    print("next: " + "\n      ".join(following))


if __name__ == "__main__":
    configure(globals())
    main()
