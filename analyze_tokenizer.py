"""
Vocabulary size against fragmentation, sequence length and cost, for vocabularies trained on your own text.

    python analyze_tokenizer.py --input=openstax.parquet             # 512 to 50,257 ids, and GPT-2's own
    python analyze_tokenizer.py --input=book.txt --vocab_sizes=4096,8192 --n_layer=6 --n_head=6 --n_embd=384

Reads what fineweb.py reads. Prints tables and examples, and writes to out_dir: tokenizer_study.txt (what is
printed), .csv (a row per vocabulary), _groups.csv (a row per vocabulary and group of words) and .png. Takes
less than ten seconds for 68 MB of text, on one core.

Vocabularies are trained on one part of the text and measured on the other, as fineweb.py divides it. They
still know the genre, often the very book, which GPT-2's does not. One training to the largest size has every
smaller vocabulary as its first ranks. vocab_size counts <|endoftext|>; lengths and costs do not.

Words are the pieces of GPT-2's pattern that consist of letters, with the space before them if there is one:
of "don't", the word is "don". Every occurrence counts. The groups of words:

    unseen, 1-9, ...  by how often the word, in any case, occurs in the training text
    joined            compounds in one piece: with a capital inside ("PowerPoint"), or of two words of 4
                      letters or more, each found 100 times and more often than both together ("classroom")
    hyphenated        compounds in several pieces: "well-known" is three, and so never one token
    technical         8 letters or more, with a Greek or Latin prefix or suffix of science (TECHNICAL)

The last three go by spelling and frequency, so that no vocabulary decides what belongs to them; "reasonable"
counts as joined, and "technology" as technical.
"""

import math
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bpe import Tokenizer, load_tokenizer, rank_file, tokenizer_from_ranks
from configurator import Between, PathName, UserError, configure
from documents import input_source
from figures import csv_bytes, pyplot, save_figure, short_number, table
from files import write_atomically
from model import GPT, GPTConfig
from train_bpe import count_documents, train_ranks

input: PathName = ""  # PATH[,PATH...], each a file, a glob or a folder, as in fineweb.py
text_column = "text"  # the parquet column or jsonl field that holds the text
vocab_sizes = ""  # to train, with commas; empty = 512, 1024, ..., 32768, 50257, as far as the text allows
tokenizer: PathName = "gpt2"  # vocabulary to compare with: gpt2, or a rank file in tiktoken's format
val_fraction: Between(0.0001, 0.9999) = 0.1  # share of the text to measure on; the rest is trained on
out_dir: PathName = "tokenizer_study"  # folder for the tables and the figure
n_layer: Between(1, 10_000) = 12  # model whose cost is computed: GPT-2 small
n_head: Between(1, 10_000) = 12  # heads
n_embd: Between(1, 10**8) = 768  # width
block_size: Between(1, 2**20) = 1024  # T

SIZES = "512,1024,2048,4096,8192,16384,32768,50257"
NAMES = ("tokenizer_study.txt", "tokenizer_study.csv", "tokenizer_study_groups.csv", "tokenizer_study.png")
BANDS = ("unseen", "1-9", "10-99", "100-999", "1k-9,999", "10k+")  # by the number of digits
GROUPS = (*BANDS, "joined", "hyphenated", "technical")
PART_LETTERS, PART_COUNT = 4, 100  # the least for each of the two words in a joined one
TECHNICAL = re.compile(
    "(?:aero|bio|cardio|chromo|cyto|electro|glyco|hemo|hydro|immuno|macro|micro|mito|neuro|osteo|patho|photo|phyto"
    "|poly|pseudo|psycho|pyro|spectro|stereo|thermo)[a-z]+"
    "|[a-z]+(?:algia|cyte|ectomy|genesis|genic|graphy|itis|meter|metry|morph|ologist|ology|olysis|osis|osome|oxide"
    "|pathy|phobia|phyll|phyte|scope|scopy|sphere|synthesis|therapy|trophic|tropic|zoic|zyme)s?")
CAPITAL_INSIDE = re.compile("[a-z]{2}[A-Z][a-z]{2}")  # not "kJ", "pH" or "NaCl"
HYPHENATED = re.compile(r" ?[^\W\d_]+(?:-[^\W\d_]+)+")

COLUMNS = {  # key in a row: the two lines above its column, format, unit
    "vocabulary": ("vocab-", "ulary", "s", None), "vocab_size": ("", "ids", ",d", None),
    "bytes_per_token": ("bytes/", "token", ".3f", None), "tokens_per_word": ("tokens/", "word", ".3f", None),
    "whole_words": ("words in", "one token", ".1%", None), "tokens": ("tokens of", "the text", ",d", None),
    "tokens_per_kb": ("tokens/", "kB", ".1f", None), "context_bytes": ("context", "bytes", ",.0f", None),
    "embedding_params": ("embedding", "M params", ".3f", 1e6),
    "embedding_share": ("of all", "params", ".1%", None),
    "flops_per_token": ("MFLOPs/", "token", ",.1f", 1e6), "flops_per_byte": ("MFLOPs/", "byte", ",.1f", 1e6),
}


# ---- the corpus ----------------------------------------------------------------


class Corpus(NamedTuple):
    """Both parts of the text, as occurrences of their pieces."""
    train: Counter  # {piece: occurrences}
    val: Counter
    hyphenated: Counter  # {hyphenated word of val: occurrences}
    documents: list[int]  # of train and of val
    sizes: list[int]      # bytes of text of each


def read_corpus(input: str, column: str, val_fraction: float) -> Corpus:
    """Count the pieces of both parts. Raises UserError if one has no text, or for an unreadable document."""
    parts, hyphenated, documents, sizes = (Counter(), Counter()), Counter(), [0, 0], [0, 0]
    for _, chunk in input_source(input, column, val_fraction).chunks():
        read = chunk.read(*chunk.args)
        if read.bad:
            raise UserError(f"{read.bad[0]}; fix or remove it, and run this again")
        for val, counts in enumerate(parts):
            text, offsets = read.part(val)
            counts.update(count_documents(text, offsets))
            documents[val] += len(offsets) - 1
            sizes[val] += len(text)
        for start, end in pairwise(offsets):  # of val
            hyphenated.update(HYPHENATED.findall(text[start:end].tobytes().decode()))
    if not all(documents):
        raise UserError(f"--input={input}: {documents[0]:,} documents to train on and {documents[1]:,} to "
                        f"measure on, but both are needed; give more text, or another --val_fraction")
    hyphenated = Counter({word.encode(): count for word, count in hyphenated.items()
                          if word.removeprefix(" ").replace("-", "").isalpha()})  # \W misses some numbers
    return Corpus(*parts, hyphenated, documents, sizes)


# ---- words and their groups ----------------------------------------------------


def as_word(piece: bytes) -> str:
    """The letters of a piece that is a word, without the space; "" for any other piece."""
    text = piece.decode("utf-8", "replace").removeprefix(" ")
    return text if text.isalpha() else ""


def is_joined(word: str, frequency: Counter) -> bool:
    """Whether a word is a compound in one piece, as defined at the top."""
    if CAPITAL_INSIDE.search(word):
        return True
    lower = word.lower()
    least = max(PART_COUNT, frequency[lower] + 1)
    return any(frequency[lower[:i]] >= least and frequency[lower[i:]] >= least
               for i in range(PART_LETTERS, len(lower) - PART_LETTERS + 1))


def groups_of(word: str, frequency: Counter) -> list[str]:
    """The band of a word's frequency, and `joined` and `technical` where they apply."""
    count = frequency[word.lower()]
    band = BANDS[min(len(str(count)), len(BANDS) - 1) if count else 0]
    technical = len(word) >= 8 and TECHNICAL.fullmatch(word.lower())
    return [band, *(["joined"] if is_joined(word, frequency) else []), *(["technical"] if technical else [])]


class Items(NamedTuple):
    """The distinct pieces of the validation text, then its distinct hyphenated words: N strings in all."""
    strings: list[bytes]
    counts: np.ndarray  # int64 (N,), occurrences
    masks: dict[str, np.ndarray]  # bool (N,): all pieces, all words, and each of GROUPS


def make_items(corpus: Corpus) -> Items:
    """The strings to encode, and the groups they belong to."""
    frequency = Counter()
    for piece, count in corpus.train.items():
        if word := as_word(piece):
            frequency[word.lower()] += count
    pieces = dict(sorted(corpus.val.items()))
    strings, counts = [*pieces, *corpus.hyphenated], [*pieces.values(), *corpus.hyphenated.values()]
    masks = {name: np.zeros(len(strings), bool) for name in ("pieces", "words", *GROUPS)}
    masks["pieces"][:len(pieces)] = True
    masks["hyphenated"][len(pieces):] = True
    for i, piece in enumerate(pieces):
        if word := as_word(piece):
            for name in ("words", *groups_of(word, frequency)):
                masks[name][i] = True
    return Items(strings, np.array(counts), masks)


# ---- measurements --------------------------------------------------------------


def count_tokens(tok: Tokenizer, strings: list[bytes]) -> np.ndarray:
    """Tokens of each string by itself, int64 (N,). No merge crosses pieces, so they add up over a text."""
    offsets = np.cumsum([0, *map(len, strings)])
    _, id_offsets = tok.encode_documents(np.frombuffer(b"".join(strings), np.uint8), offsets)
    return np.diff(id_offsets) - 1  # without <|endoftext|>


def fragmentation(tokens: np.ndarray, counts: np.ndarray) -> dict:
    """Averages over all occurrences of words with `tokens` tokens that occur `counts` times, both (N,)."""
    total = int(counts.sum())
    return {"distinct": len(counts), "occurrences": total,
            "tokens_per_word": float((tokens * counts).sum() / total) if total else math.nan,
            "whole_words": float(counts[tokens == 1].sum() / total) if total else math.nan}


def model_cost(n_vocab: int, bytes_per_token: float, shape: dict) -> dict:
    """Parameters and training FLOPs of a model of this shape, with a multiple of 128 rows of embedding."""
    config = GPTConfig(n_vocab=n_vocab, vocab_size=math.ceil(n_vocab / 128) * 128, **shape)
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    embedding, flops = config.vocab_size * config.n_embd, model.flops_per_token(config.block_size)
    return {"context_bytes": config.block_size * bytes_per_token, "embedding_params": embedding,
            "embedding_share": embedding / model.num_params(), "flops_per_token": flops,
            "flops_per_byte": flops / bytes_per_token}


def measure(tok: Tokenizer, vocabulary: str, items: Items, shape: dict) -> tuple[dict, list[dict]]:
    """The row of a vocabulary, with the keys of COLUMNS, and its rows for GROUPS."""
    tokens = count_tokens(tok, items.strings)
    pieces, words = items.masks["pieces"], items.masks["words"]
    n_bytes = sum(len(string) * int(count) for string, count in zip(items.strings, items.counts * pieces))
    total = int((tokens * items.counts)[pieces].sum())
    name = {"vocabulary": vocabulary, "vocab_size": tok.n_vocab}
    average = fragmentation(tokens[words], items.counts[words])
    row = {**name, "bytes_per_token": n_bytes / total, "tokens_per_word": average["tokens_per_word"],
           "whole_words": average["whole_words"], "tokens": total, "tokens_per_kb": 1000 * total / n_bytes,
           **model_cost(tok.n_vocab, n_bytes / total, shape)}
    return row, [{**name, "group": group, **fragmentation(tokens[items.masks[group]],
                                                          items.counts[items.masks[group]])}
                 for group in GROUPS]


def train_tokenizers(pieces: Counter, sizes: list[int], fixed: bool) -> list[Tokenizer]:
    """A vocabulary of each size, all from one training. Of sizes that the text is too small for, the smaller
    ones are trained; with `fixed` or without any, UserError."""
    for end in range(len(sizes), 0, -1):
        try:
            ranks = train_ranks(pieces, sizes[end - 1])
            break
        except UserError as error:
            if fixed or end == 1:
                raise UserError(str(error).replace("--vocab_size=", "--vocab_sizes=")) from error
            print(f"left out: {sizes[end - 1]:,} ids, for which this text is too small", flush=True)
    return [tokenizer_from_ranks(rank_file(ranks[:size - 1]), str(size)) for size in sizes[:end]]


# ---- tables and figure ---------------------------------------------------------


def size_table(rows: list[dict]) -> list[str]:
    """Lines of the table of vocabularies, the first two its heading."""
    upper, lower = ([column[i] for column in COLUMNS.values()] for i in (0, 1))
    return table(upper, [lower, *([f"{row[key] / unit if unit else row[key]:{form}}"
                                   for key, (_, _, form, unit) in COLUMNS.items()] for row in rows)])


def group_table(measured: list, title: str, key: str, form: str) -> list[str]:
    """Lines of the table of one figure, with a column per group; - where it has no words."""
    rows = [[f"{row['vocabulary'][:8]} {row['vocab_size']:,}",
             *("-" if group[key] != group[key] else f"{group[key]:{form}}" for group in groups)]
            for row, groups in measured]
    return table([title, *GROUPS], rows)


def examples(toks: list[Tokenizer], items: Items) -> list[str]:
    """Lines that show how each vocabulary cuts some words of each group, drawn from the distinct ones."""
    lines = ["examples (_ is a space)"]
    for group in GROUPS:
        words = [items.strings[i] for i in np.flatnonzero(items.masks[group]) if items.strings[i][:1] == b" "]
        rows = [[tok.name[:10]] for tok in toks]
        for word in random.Random(1337).sample(words, min(5, len(words))):
            cuts = ["|".join(tok.tokens[i].decode("utf-8", "replace") for i in tok.encode(word.decode()))
                    for tok in toks]
            wider = [[*row, cut.replace(" ", "_")] for row, cut in zip(rows, cuts)]
            rows = wider if len(table(wider[0], wider[1:])[0]) <= 110 else rows
        lines += [f"{group}:", *table(rows[0], rows[1:])]
    return lines


def draw(measured: list, path: Path) -> None:
    """The figure: compression, words in one token, fragmentation and cost over the size of the vocabulary."""
    rows = [row for row, _ in measured]
    sizes = [row["vocab_size"] for row in rows]  # the last is not one of the trained

    def by_group(names, key):
        return {name if name.isalpha() else f"{name} times": [groups[GROUPS.index(name)][key]
                                                              for _, groups in measured] for name in names}

    cost = [row["flops_per_byte"] / 1e6 for row in rows]
    output = [6 * row["embedding_params"] / row["bytes_per_token"] / 1e6 for row in rows]
    panels = {
        ("Compression", "bytes per token"): {"held-out text": [row["bytes_per_token"] for row in rows]},
        ("Words in one token, by count in training", "share of occurrences"): by_group(BANDS, "whole_words"),
        ("Fragmentation", "tokens per word"): {
            "all words": [row["tokens_per_word"] for row in rows],
            **by_group(("hyphenated", "unseen", "1-9", "technical", "joined"), "tokens_per_word")},
        (f"Training cost: {n_layer} layers, {n_embd} wide, T = {block_size:,}", "MFLOPs per byte of text"): {
            "model": cost, "blocks": [c - o for c, o in zip(cost, output)], "output layer": output},
    }
    figure, axes = pyplot().subplots(2, 2, figsize=(10, 8.4), layout="constrained")
    for axis, ((title, ylabel), lines) in zip(axes.flat, panels.items()):
        for label, values in lines.items():
            line, = axis.plot(sizes[:-1], values[:-1], marker="o", markersize=4, linewidth=1.4, label=label)
            axis.plot(sizes[-1], values[-1], "*", color=line.get_color(), markersize=12, mec="black", mew=0.6)
        axis.set(title=title, ylabel=ylabel, ylim=(0, None), xscale="log",
                 xlabel=f"vocabulary size (star: {rows[-1]['vocabulary']}, {sizes[-1]:,})")
        axis.set_xticks([2**k for k in range(8, 17) if min(sizes) <= 2**k <= max(sizes)])
        axis.xaxis.set_major_formatter(short_number)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=3, columnspacing=1)
    save_figure(figure, path)


def check_settings() -> tuple[list[int], dict]:
    """(sizes in order, the model's shape) of the settings. Raises UserError for mistakes in them."""
    names = (vocab_sizes or SIZES).split(",")
    sizes = sorted({int(name) if name.strip().isdecimal() else 0 for name in names})
    if len(sizes) != len(names) or sizes[0] < 257 or sizes[-1] > 1 << 16:
        raise UserError(f"--vocab_sizes={vocab_sizes}: wanted different numbers with commas between them, "
                        f"from 257 (256 bytes and <|endoftext|>) to 65536 (ids are uint16)")
    if not input:
        raise UserError("no text to study; name it with --input=PATH")
    for path in (Path(out_dir, name) for name in NAMES):
        if path.exists():
            raise UserError(f"{path} exists: delete it if you no longer need it, or type another --out_dir")
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size}
    GPTConfig(**shape)  # raises UserError if the numbers do not fit together
    return sizes, shape


def main() -> None:
    sizes, shape = check_settings()
    other = load_tokenizer(tokenizer)
    corpus = read_corpus(input, text_column, val_fraction)
    for name, documents, size in zip(("trained on", "measured on"), corpus.documents, corpus.sizes):
        print(f"{name} {documents:,} documents, {size:,} bytes", flush=True)
    trained, items = train_tokenizers(corpus.train, sizes, bool(vocab_sizes)), make_items(corpus)
    measured = [measure(tok, "trained", items, shape) for tok in trained]
    measured.append(measure(other, other.name, items, shape))
    rows = [row for row, _ in measured]
    counts = [[key, *(f"{row[key]:,}" for row in measured[0][1])] for key in ("distinct", "occurrences")]
    shown = dict.fromkeys((trained[0], trained[len(trained) // 2], trained[-1], other))
    report = [*size_table(rows), "", *group_table(measured, "tokens per word", "tokens_per_word", ".3f"), "",
              *group_table(measured, "words in one token", "whole_words", ".1%"), "",
              *table(["words of each group", *GROUPS], counts), "", *examples([*shown], items)]
    print("\n".join(report))
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / NAMES[0], "\n".join([*report, ""]).encode())
    write_atomically(folder / NAMES[1], csv_bytes(rows))
    write_atomically(folder / NAMES[2], csv_bytes([row for _, groups in measured for row in groups]))
    draw(measured, folder / NAMES[3])
    print(f"written to {folder}: {', '.join(NAMES)}")


if __name__ == "__main__":
    configure(globals())
    main()
