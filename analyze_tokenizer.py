"""
Vocabulary size against fragmentation, sequence length and cost, for vocabularies trained on your own text.

    python analyze_tokenizer.py --input=openstax.parquet             # 512 to 50,257 ids, and GPT-2's own
    python analyze_tokenizer.py --input=books/ --vocab_sizes=4096,8192 --n_layer=6 --n_head=6 --n_embd=384

Reads what fineweb.py reads. Prints tables and examples, and writes them to out_dir: tokenizer_study.txt (what
is printed), .csv (a row per vocabulary), _groups.csv (a row per vocabulary and group of words) and .png.
Takes less than ten seconds for 68 MB of text, on one core.

A hash of each document decides its side: vocabularies are trained on one, and all is measured on the other,
so that none is judged on text it was fitted to. The trained ones still know the genre, often the very book,
which GPT-2's own does not: at the same size the corpus makes the difference. A training is a sequence of
merges, so that one to the largest size has every smaller vocabulary as its first ranks. vocab_size counts
<|endoftext|>; lengths and costs do not, as it is the same one token per document for all.

Words are the pieces of GPT-2's pattern that consist of letters, with the space before them if there is one:
of "don't", the word is "don". Every occurrence counts. The groups of words:

    unseen, 1-9, ...  by how often the letters, in any case, are a word of the training side
    joined            compounds in one piece: with a capital inside ("PowerPoint"), or of two words of 4
                      letters or more, each found 100 times or more, and more often than both together
                      ("classroom")
    hyphenated        compounds in several pieces: "well-known" is three, and so never one token
    technical         8 letters or more, beginning or ending with one of the Greek and Latin forms that the
                      sciences make terms of (TECHNICAL has them)

The last three go by spelling and frequency alone, so that no vocabulary has a say in what belongs to them;
"reasonable" counts as joined, and "technology" as technical.
"""

import csv
import io
import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bpe import Tokenizer, load_tokenizer, rank_file, tokenizer_from_ranks
from configurator import Between, PathName, UserError, configure
from documents import input_source
from files import write_atomically
from model import GPT, GPTConfig
from train_bpe import count_documents, train_ranks

input: PathName = ""  # PATH[,PATH...], each a file, a glob or a folder of .parquet, .jsonl[.gz|.zst] or .txt
text_column = "text"  # the parquet column or jsonl field that holds the text
vocab_sizes = "512,1024,2048,4096,8192,16384,32768,50257"  # to train, <|endoftext|> counted
tokenizer: PathName = "gpt2"  # what they are compared with: gpt2, or a rank file in tiktoken's format
val_fraction: Between(0.0001, 0.9999) = 0.1  # share of the documents to measure on; the others are trained on
out_dir: PathName = "tokenizer_study"  # where the tables and the figure go
n_layer: Between(1, 10_000) = 12  # the model whose cost is counted: GPT-2 small
n_head: Between(1, 10_000) = 12  # heads
n_embd: Between(1, 10**8) = 768  # width
block_size: Between(1, 2**20) = 1024  # T

NAMES = ("tokenizer_study.txt", "tokenizer_study.csv", "tokenizer_study_groups.csv", "tokenizer_study.png")
BANDS = ("unseen", "1-9", "10-99", "100-999", "1k-9,999", "10k+")  # by the number of digits
GROUPS = (*BANDS, "joined", "hyphenated", "technical")
PART_LETTERS, PART_COUNT = 4, 100  # of each of the two words in a joined one, at least
TECHNICAL_LETTERS = 8
TECHNICAL = re.compile(
    "(?:aero|bio|cardio|chromo|cyto|electro|glyco|hemo|hydro|immuno|macro|micro|mito|neuro|osteo|patho|photo|phyto"
    "|poly|pseudo|psycho|pyro|spectro|stereo|thermo)[a-z]+"
    "|[a-z]+(?:algia|cyte|ectomy|genesis|genic|graphy|itis|meter|metry|morph|ologist|ology|olysis|osis|osome|oxide"
    "|pathy|phobia|phyll|phyte|scope|scopy|sphere|synthesis|therapy|trophic|tropic|zoic|zyme)s?")
CAPITAL_INSIDE = re.compile("[a-z]{2}[A-Z][a-z]{2}")  # not "kJ", "pH" or "NaCl"
HYPHENATED = re.compile(r" ?[^\W\d_]+(?:-[^\W\d_]+)+")
EXAMPLES_SEED = 1337  # of the words shown
WIDTH = 110  # of the tables

# key in a row: the two lines above its column, the column's width and format, the unit it is shown in
COLUMNS = {
    "vocabulary": ("vocab-", "ulary", 8, ".8s", None),
    "vocab_size": ("", "ids", 6, ",d", None),
    "bytes_per_token": ("bytes/", "token", 7, ".3f", None),
    "tokens_per_word": ("tokens/", "word", 8, ".3f", None),
    "whole_words": ("words", "whole", 7, ".1%", None),
    "tokens": ("tokens of", "the text", 13, ",d", None),
    "tokens_per_kb": ("tokens/", "kB", 8, ".1f", None),
    "context_bytes": ("context", "bytes", 8, ",.0f", None),
    "embedding_params": ("embedding", "M params", 10, ".3f", 1e6),
    "embedding_share": ("of all", "params", 7, ".1%", None),
    "flops_per_token": ("MFLOPs/", "token", 9, ",.1f", 1e6),
    "flops_per_byte": ("MFLOPs/", "byte", 8, ",.1f", 1e6),
}


# ---- the corpus ----------------------------------------------------------------


class Corpus(NamedTuple):
    """Both sides of the text, as occurrences of their pieces."""
    train: Counter  # {piece: occurrences}
    val: Counter
    hyphenated: Counter  # {hyphenated word of val: occurrences}
    documents: list[int]  # of train and of val
    sizes: list[int]      # bytes of text of each


def read_corpus(input: str, column: str, val_fraction: float) -> Corpus:
    """Count the pieces of both sides. Raises UserError if there is no text for one of them."""
    sides, hyphenated, documents, sizes = (Counter(), Counter()), Counter(), [0, 0], [0, 0]
    for _, chunk in input_source(input, column, val_fraction).chunks():
        text, offsets, is_val, _, bad = chunk.read(*chunk.args)
        if bad:
            raise UserError(f"{bad[0]}; fix or remove it, and run this again")
        for side, counts in enumerate(sides):
            chosen = choose(text, offsets, is_val == side)
            counts.update(count_documents(*chosen))
            documents[side] += int(np.sum(is_val == side))
            sizes[side] += len(chosen[0])
        for d in np.flatnonzero(is_val):
            hyphenated.update(HYPHENATED.findall(text[offsets[d]:offsets[d + 1]].tobytes().decode()))
    if not all(documents):
        raise UserError(f"--input={input}: got {documents[0]} documents to train on and {documents[1]} to "
                        f"measure on, wanted both; give more text or another --val_fraction")
    hyphenated = Counter({word.encode(): count for word, count in hyphenated.items()
                          if word.removeprefix(" ").replace("-", "").isalpha()})  # [^\W\d_] has some numbers
    return Corpus(*sides, hyphenated, documents, sizes)


def choose(text: np.ndarray, offsets: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(text, offsets) of the documents where `chosen`, bool (D,), is True."""
    sizes = np.diff(offsets)
    return text[:offsets[-1]][np.repeat(chosen, sizes)], np.cumsum([0, *sizes[chosen]])


# ---- words and their groups ----------------------------------------------------


def as_word(piece: bytes) -> str:
    """The letters of a piece that is a word, without its space; empty for any other piece."""
    text = piece.decode("utf-8", "replace").removeprefix(" ")
    return text if text.isalpha() else ""


def is_joined(word: str, frequency: Counter) -> bool:
    """Whether a word is a compound in one piece, as the docstring above defines it."""
    if CAPITAL_INSIDE.search(word):
        return True
    lower = word.lower()
    least = max(PART_COUNT, frequency[lower] + 1)
    return any(frequency[lower[:i]] >= least and frequency[lower[i:]] >= least
               for i in range(PART_LETTERS, len(lower) - PART_LETTERS + 1))


def groups_of(word: str, frequency: Counter) -> list[str]:
    """The band of a word's frequency, and `joined` or `technical` where it is one."""
    count = frequency[word.lower()]
    groups = [BANDS[min(len(str(count)), len(BANDS) - 1) if count else 0]]
    if is_joined(word, frequency):
        groups.append("joined")
    if len(word) >= TECHNICAL_LETTERS and TECHNICAL.fullmatch(word.lower()):
        groups.append("technical")
    return groups


class Items(NamedTuple):
    """The distinct pieces of the measured side, then its distinct hyphenated words: N strings in all."""
    strings: list[bytes]
    counts: np.ndarray  # int64 (N,), occurrences
    masks: dict[str, np.ndarray]  # bool (N,): all pieces, all words, and each of GROUPS


def make_items(corpus: Corpus) -> Items:
    """List what is to be encoded, and which of it belongs to which group."""
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


# ---- what is measured ----------------------------------------------------------


def count_tokens(tok: Tokenizer, strings: list[bytes]) -> np.ndarray:
    """Tokens of each string by itself, int64 (N,); no merge crosses pieces, so they add up over a text."""
    offsets = np.cumsum([0, *map(len, strings)])
    _, id_offsets = tok.encode_documents(np.frombuffer(b"".join(strings), np.uint8), offsets)
    return np.diff(id_offsets) - 1  # without <|endoftext|>


def fragmentation(tokens: np.ndarray, counts: np.ndarray) -> dict:
    """Of words of `tokens` tokens each, found `counts` times: the averages over all occurrences."""
    total = int(counts.sum())
    return {"distinct": len(counts), "occurrences": total,
            "tokens_per_word": float((tokens * counts).sum() / total) if total else math.nan,
            "whole_words": float(counts[tokens == 1].sum() / total) if total else math.nan}


def model_cost(n_vocab: int, bytes_per_token: float, shape: dict) -> dict:
    """Parameters and training FLOPs of a model of this shape; it has a multiple of 128 rows of embedding."""
    config = GPTConfig(n_vocab=n_vocab, vocab_size=math.ceil(n_vocab / 128) * 128, **shape)
    with torch.device("meta"):  # shapes without memory
        model = GPT(config)
    embedding, flops = config.vocab_size * config.n_embd, model.flops_per_token(config.block_size)
    return {"context_bytes": config.block_size * bytes_per_token, "embedding_params": embedding,
            "embedding_share": embedding / model.num_params(), "flops_per_token": flops,
            "flops_per_byte": flops / bytes_per_token}


def measure(tok: Tokenizer, vocabulary: str, items: Items, shape: dict) -> tuple[dict, list[dict]]:
    """The row of a vocabulary, keyed as COLUMNS, and its rows of GROUPS."""
    tokens = count_tokens(tok, items.strings)
    pieces, words = items.masks["pieces"], items.masks["words"]
    n_bytes = sum(len(string) * int(count) for string, count in zip(items.strings, items.counts * pieces))
    total = int((tokens * items.counts)[pieces].sum())
    name = {"vocabulary": vocabulary, "vocab_size": tok.n_vocab}
    of_words = fragmentation(tokens[words], items.counts[words])
    row = {**name, "bytes_per_token": n_bytes / total, "tokens_per_word": of_words["tokens_per_word"],
           "whole_words": of_words["whole_words"], "tokens": total, "tokens_per_kb": 1000 * total / n_bytes,
           **model_cost(tok.n_vocab, n_bytes / total, shape)}
    return row, [{**name, "group": group, **fragmentation(tokens[items.masks[group]],
                                                          items.counts[items.masks[group]])}
                 for group in GROUPS]


def train_tokenizers(pieces: Counter, sizes: list[int]) -> list[Tokenizer]:
    """A vocabulary of each size, all from one training. Raises UserError if the text is too small for one."""
    try:
        ranks = train_ranks(pieces, max(sizes))
    except UserError as error:
        raise UserError(f"the largest of --vocab_sizes, {max(sizes)}, cannot be trained: {error}") from error
    return [tokenizer_from_ranks(rank_file(ranks[:size - 1]), str(size)) for size in sizes]


# ---- what is shown -------------------------------------------------------------


def size_table(rows: list[dict]) -> list[str]:
    """Lines of the table of vocabularies, the first two its heading."""
    lines = [" ".join(column[i].rjust(column[2]) for column in COLUMNS.values()) for i in (0, 1)]
    for row in rows:
        lines.append(" ".join(f"{row[key] / unit if unit else row[key]:>{width}{form}}"
                              for key, (_, _, width, form, unit) in COLUMNS.items()))
    return lines


def group_line(head: str, values: list, form: str) -> str:
    """A line of a table with one column per group; `-` where a group has no words."""
    shown = ("-" if value != value else f"{value:{form}}" for value in values)
    cells = (f" {cell:>{max(len(group), 9)}s}" for group, cell in zip(GROUPS, shown))
    return f"{head:>16.16s}{''.join(cells)}"


def group_table(group_rows: list[dict], key: str, form: str) -> list[str]:
    """Lines of the table of one figure, a row per vocabulary."""
    lines = [group_line("ids", GROUPS, "s")]
    for first in range(0, len(group_rows), len(GROUPS)):
        of_one = group_rows[first:first + len(GROUPS)]
        head = f"{of_one[0]['vocabulary'][:8]} {of_one[0]['vocab_size']:,}"
        lines.append(group_line(head, [row[key] for row in of_one], form))
    return lines


def examples(toks: list[Tokenizer], items: Items) -> list[str]:
    """Lines that show how each vocabulary cuts some words of each group, drawn from its distinct ones."""
    lines = ["examples (_ is a space)"]
    for group in GROUPS:
        words = [items.strings[i] for i in np.flatnonzero(items.masks[group]) if items.strings[i][:1] == b" "]
        words = random.Random(EXAMPLES_SEED).sample(words, min(5, len(words)))
        table = [f"{tok.name:>10.10s}" for tok in toks]
        for word in words:
            cuts = ["|".join(tok.tokens[i].decode("utf-8", "replace") for i in tok.encode(word.decode()))
                    for tok in toks]
            longest = max(map(len, cuts))
            wider = [f"{line}  {cut.replace(' ', '_'):{longest}s}" for line, cut in zip(table, cuts)]
            table = wider if len(wider[0]) <= WIDTH else table
        lines += [f"{group}:", *(line.rstrip() for line in table)]
    return lines


def to_csv(rows: list[dict]) -> bytes:
    """The rows below their keys; a figure that does not exist is empty."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value != value else value for key, value in row.items()} for row in rows)
    return file.getvalue().encode()


def draw(rows: list[dict], group_rows: list[dict]) -> bytes:
    """The figure, PNG: compression, words kept whole, fragmentation and cost over the vocabulary's size."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    sizes = [row["vocab_size"] for row in rows]  # the last is not one of the trained
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")

    def plot(axis, values, label, color):
        axis.plot(sizes[:-1], values[:-1], color=color, marker="o", markersize=4, linewidth=1.4, label=label)
        axis.plot(sizes[-1], values[-1], color=color, marker="*", markersize=12, markeredgecolor="black",
                  markeredgewidth=0.6)

    def of_group(group, key):
        return [row[key] for row in group_rows if row["group"] == group]

    plot(axes[0, 0], [row["bytes_per_token"] for row in rows], "text that was held out", "C0")
    axes[0, 0].set(title="Compression", ylabel="bytes per token")
    for group, color in zip(BANDS, plt.get_cmap("viridis")(np.linspace(0, 0.9, len(BANDS)))):
        plot(axes[0, 1], of_group(group, "whole_words"), group, color)
    axes[0, 1].set(title="Words kept whole, by frequency in the training text", ylabel="share of occurrences")
    for i, group in enumerate(("hyphenated", "unseen", "1-9", "technical", "joined")):
        plot(axes[1, 0], of_group(group, "tokens_per_word"), group, f"C{i}")
    plot(axes[1, 0], [row["tokens_per_word"] for row in rows], "all words", "black")
    axes[1, 0].set(title="Fragmentation", ylabel="tokens per word", ylim=(0, None))
    whole = [row["flops_per_byte"] / 1e6 for row in rows]
    output = [6 * row["embedding_params"] / row["bytes_per_token"] / 1e6 for row in rows]
    plot(axes[1, 1], whole, "whole model", "black")
    plot(axes[1, 1], [w - o for w, o in zip(whole, output)], "blocks", "C0")
    plot(axes[1, 1], output, "output layer", "C1")
    axes[1, 1].set(title=f"Training cost: {n_layer} layers, {n_embd} wide, T = {block_size}",
                   ylabel="MFLOPs per byte of text", ylim=(0, None))
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(set(sizes)))
        axis.xaxis.set_major_formatter(FuncFormatter(format_size))
        axis.minorticks_off()
        axis.set_xlabel(f"vocabulary size (star: {rows[-1]['vocabulary']})")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=75)
    plt.close(figure)
    return file.getvalue()


def format_size(size, position):
    return f"{size:,.0f}" if size % 1024 else f"{size / 1024:.0f}k"


def check_settings() -> tuple[list[int], dict]:
    """(sizes in order, the model's shape) of the settings. Raises UserError for what cannot be studied."""
    sizes = sorted({int(size) for size in vocab_sizes.split(",") if size.strip().isdecimal()})
    if len(sizes) != len(vocab_sizes.split(",")) or sizes[0] < 257 or sizes[-1] > 1 << 16:
        raise UserError(f"--vocab_sizes={vocab_sizes}: wanted different numbers with commas between them, "
                        f"from 257 (256 bytes and <|endoftext|>) to 65536 (ids are uint16)")
    if not input:
        raise UserError("got no text, wanted some to study; name it with --input=PATH")
    for path in (Path(out_dir, name) for name in NAMES):
        if path.exists():
            raise UserError(f"{path} is there already; delete it yourself if you no longer need it, or give "
                            f"another --out_dir=...")
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size}
    GPTConfig(**shape)  # raises if the numbers do not fit together
    return sizes, shape


def main() -> None:
    sizes, shape = check_settings()
    other = load_tokenizer(tokenizer)
    corpus = read_corpus(input, text_column, val_fraction)
    print("; ".join(f"{name}: {documents:,} documents, {size:,} bytes" for name, documents, size
                    in zip(("trained on", "measured on"), corpus.documents, corpus.sizes)), flush=True)
    trained, items = train_tokenizers(corpus.train, sizes), make_items(corpus)
    measured = [measure(tok, "trained", items, shape) for tok in trained]
    measured.append(measure(other, other.name, items, shape))
    rows = [row for row, _ in measured]
    group_rows = [row for _, of_groups in measured for row in of_groups]
    of_one = group_rows[:len(GROUPS)]
    shown = dict.fromkeys((trained[0], trained[len(trained) // 2], trained[-1], other))
    report = [*size_table(rows), "",
              "tokens per word", *group_table(group_rows, "tokens_per_word", ".3f"), "",
              "share of words kept whole", *group_table(group_rows, "whole_words", ".1%"),
              group_line("distinct", [row["distinct"] for row in of_one], ",d"),
              group_line("occurrences", [row["occurrences"] for row in of_one], ",d"), "",
              *examples([*shown], items)]
    print("\n".join(report))
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    contents = ("\n".join([*report, ""]).encode(), to_csv(rows), to_csv(group_rows), draw(rows, group_rows))
    for name, content in zip(NAMES, contents):
        write_atomically(folder / name, content)
    print(f"written to {folder}: {', '.join(NAMES)}")


if __name__ == "__main__":
    configure(globals())
    main()
