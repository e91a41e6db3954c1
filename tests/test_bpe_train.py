"""
Training of a vocabulary against a slow twin in plain Python and against Hugging Face's tokenizers.

    python -m pytest tests/test_bpe_train.py

Reads the corpora under GPT2_SHARED_DATA where that is set.
"""

import itertools
import json
import os
import random
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

import bpe
import train_bpe
from bpe import byte_order, rank_file
from configurator import UserError
from documents import Chunk, Documents, input_source
from train_bpe import count_chunks, count_documents, train_ranks

REPO = Path(__file__).parent.parent
CLASSES = bpe.unicode_classes()
STDLIB = Path(sysconfig.get_path("stdlib"))


def pack(documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(text, offsets) of documents."""
    return np.frombuffer(b"".join(documents), np.uint8), np.cumsum([0, *map(len, documents)])


def count(documents: list[bytes]) -> Counter:
    return count_documents(*pack(documents))


def read(documents: list[bytes], bad: tuple = ()) -> Documents:
    """As documents.py reads them."""
    return Documents(*pack(documents), np.zeros(len(documents), bool), 0, bad)


def slow_twin(counts: dict[bytes, int], n_ranks: int) -> list[bytes]:
    """Textbook BPE: all pairs are counted anew for each merge. Fewer ranks if there is none left."""
    tokens = [bytes([byte]) for byte in byte_order()]
    words = [([byte_order().index(byte) for byte in piece], times) for piece, times in counts.items()]
    while len(tokens) < n_ranks:
        pairs = Counter()
        for word, times in words:
            for pair in itertools.pairwise(word):
                pairs[pair] += times
        if not pairs:
            break
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merged = len(tokens)
        tokens.append(tokens[left] + tokens[right])
        for word, _ in words:
            i = 0
            while i + 1 < len(word):
                if word[i] == left and word[i + 1] == right:
                    word[i:i + 2] = [merged]
                i += 1
    assert len(set(tokens)) == len(tokens), "two merges gave the same bytes"
    return tokens


def check_against_twin(counts: dict[bytes, int], n_ranks: int):
    expected = slow_twin(counts, n_ranks)
    assert train_ranks(counts, len(expected) + 1) == expected
    if len(expected) < n_ranks:
        with pytest.raises(UserError, match=f"--vocab_size={len(expected) + 1}$"):
            train_ranks(counts, n_ranks + 1)


# ---- counting ------------------------------------------------------------------

PATTERNS = ((bpe.LETTER, r"\p{L}"), (bpe.NUMBER, r"\p{N}"), (bpe.SPACE, r"\s"), (bpe.OTHER, "."))


def same_class(char: str) -> bool:
    """Whether the package regex, of another version of Unicode, has the character in our class."""
    theirs = next(kind for kind, pattern in PATTERNS if regex.match(pattern, char, regex.DOTALL))
    return theirs == CLASSES[ord(char)]


@settings(max_examples=600, deadline=None)
@given(st.lists(st.one_of(
    st.text(st.sampled_from("abcdethxyzAZ019 '.,_-\t\n\x00slmrv"), max_size=120),
    st.text(st.characters(exclude_categories=["Cs"]).filter(same_class), max_size=60),
    st.text(st.sampled_from(" \t\n\x85\xa0\u2003\u3000a1.'sé東"), max_size=60),
    st.text(st.sampled_from("ab "), min_size=30, max_size=90)), max_size=4))
def test_pieces_are_those_of_the_pattern(documents):
    expected = Counter(piece for text in documents for piece in regex.findall(bpe.PATTERN, text))
    assert count([text.encode() for text in documents]) == {
        piece.encode(): times for piece, times in expected.items()}


def test_documents_that_are_not_utf8_are_named():
    with pytest.raises(UnicodeDecodeError, match="in document 1"):
        count([b"good one", b"bad \xff\xfe two\xc3", b"\xe6\x9d"])


def test_a_full_table_is_emptied_and_the_count_goes_on():
    """Far more pieces than the table holds, short and long ones, many with the same first 16 bytes."""
    rng = random.Random(0)
    table = np.zeros(1 << bpe.CACHE_BITS, train_bpe.COUNT)
    pieces = {bytes(rng.choices(b"abcdefgh", k=length))
              for length in (7, 15, 16, 17, 18, 40) for _ in range(len(table) // 4)}
    pieces |= {b"y" * 200_000} | {b"z" * length for length in range(2000)} - {b""}
    pieces = sorted(pieces)
    again = pieces[::3]
    counts = count([b"\n".join(pieces), b"", b"\n".join(again)])  # the newline is a piece of its own
    assert counts.pop(b"\n") == len(pieces) + len(again) - 2
    assert counts == {piece: 1 + (i % 3 == 0) for i, piece in enumerate(pieces)}


def test_threads_and_order_do_not_matter():
    documents = [path.read_bytes() for path in sorted(STDLIB.glob("*.py"))[:60]]
    results = []
    for workers, seed in ((1, None), (2, None), (3, 2)):
        if seed is not None:
            random.Random(seed).shuffle(documents)
        chunks = [Chunk(read, (documents[i:i + 7],)) for i in range(0, len(documents), 7)]
        counts = count_chunks(chunks, workers)
        assert sum(len(piece) * times for piece, times in counts.items()) == sum(map(len, documents))
        results.append((counts, train_ranks(counts, 2000)))
    assert all(result == results[0] for result in results[1:])


def test_an_error_in_a_thread_ends_the_count():
    def read_one(i):
        return read([b"some text"], ("file 3: is corrupt",) if i == 3 else ())

    with pytest.raises(UserError, match="file 3: is corrupt; fix"):
        count_chunks((Chunk(read_one, (i,)) for i in itertools.count()), 2)  # would never end


def test_too_many_different_pieces_are_refused(monkeypatch):
    monkeypatch.setattr(train_bpe, "MAX_DISTINCT", 5)
    with pytest.raises(UserError, match="give a part of the text"):
        train_ranks(count([b"a b c d e f"]), 257)


# ---- merges --------------------------------------------------------------------

def test_bytes_are_in_gpt2s_order():
    assert [bytes([byte]) for byte in byte_order()] == bpe.load_tokenizer("gpt2").tokens[:256]


@pytest.mark.parametrize("counts", [
    {b"aaaa": 1}, {b"aaaaa": 1, b"baaab": 2}, {b"aaaaaaa": 3, b"aaab": 1},
    {b"abab": 1, b"baba": 1},  # ties
    {b"ab": 2, b"cd": 2, b"ba": 2, b"dc": 2},
    {b"abc": 5, b"ab": 3, b"bc": 4, b"xabc": 1, b"abcx": 1},  # tokens that could be cut in two ways
    {b"abcabcabc": 5, b"ab": 1, b"bca": 9, b"cabc": 2, b"bcbc": 7},
    {"ééé東京東京".encode(): 2, "東京é".encode(): 1},
    {b"a": 7}, {},
    {bytes(range(256)): 1, bytes(range(255, -1, -1)): 1},
    {b"th": 1 << 33, b"he": (1 << 33) + 1},  # counts above 32 bits
    {b"he": 1 << 33, b"th": (1 << 33) + 1},
], ids=str)
def test_chosen_counts(counts):
    check_against_twin(counts, 300)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.one_of(
    st.binary(min_size=1, max_size=12),
    st.text(st.sampled_from("ab"), min_size=1, max_size=24).map(str.encode),
    st.text(st.sampled_from("abc"), min_size=1, max_size=12).map(str.encode)),
    st.integers(1, 6), max_size=12), st.integers(257, 330))
def test_any_counts(counts, n_ranks):
    check_against_twin(counts, n_ranks)


@pytest.mark.parametrize("seed", range(6))
def test_random_text(seed):
    """Longer words over few letters: hundreds of merges, many ties, runs, overlaps."""
    rng = random.Random(seed)
    counts = {bytes(rng.choices(b"abcd"[:2 + seed % 3], k=rng.randint(1, 60))): rng.randint(1, 4)
              for _ in range(60)}
    check_against_twin(counts, 700)


def test_real_text_equals_the_twin():
    text = (STDLIB / "argparse.py").read_bytes()
    check_against_twin(count([text]), 1000)


def test_one_piece_of_a_million_bytes():
    """Of one letter, where only the doubled token is merged, and of random ones."""
    million = 1_000_000
    tokens = train_ranks(count([b"a" * million]), 257 + 19)
    assert tokens[256:] == [b"a" * 2**k for k in range(1, 20)]
    noise = bytes(random.Random(0).choices(b"abcdefghijklmnopqrstuvwxyz", k=million))
    tokens = train_ranks(count([noise]), 4096)
    assert len(tokens) == 4095 and {len(token) for token in tokens[256:256 + 26 * 26]} == {2}
    tok = bpe.tokenizer_from_ranks(rank_file(tokens), "noise")
    assert tok.decode(tok.encode(noise.decode())) == noise.decode()


# ---- against tokenizers --------------------------------------------------------

def train_tokenizers(texts: list[str], n_ranks: int) -> tuple[tokenizers.Tokenizer, list[bytes]]:
    """(tokenizers' result, its tokens by id)"""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = byte_level
    theirs.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=n_ranks, initial_alphabet=byte_level.alphabet(), show_progress=False))
    byte_of = dict(zip(sorted(byte_level.alphabet()), byte_order()))
    vocab = theirs.get_vocab()
    return theirs, [bytes(byte_of[char] for char in token) for token in sorted(vocab, key=vocab.get)]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """A few megabytes: English where there are shared data, else the standard library's sources."""
    if "GPT2_SHARED_DATA" not in os.environ:
        return [path.read_text(encoding="utf-8") for path in sorted(STDLIB.glob("*.py"))[:100]]
    import pyarrow.parquet
    path = Path(os.environ["GPT2_SHARED_DATA"]) / "openstax" / "openstax.parquet"
    with pyarrow.parquet.ParquetFile(path) as file:
        return next(file.iter_batches(300, columns=["text"]))["text"].to_pylist()


def test_merges_and_compression_are_those_of_tokenizers(corpus):
    tokens = train_ranks(count([text.encode() for text in corpus]), 8192)
    theirs, their_tokens = train_tokenizers(corpus, 8191)
    assert tokens == their_tokens
    tok = bpe.tokenizer_from_ranks(rank_file(tokens), "ours")
    ours = sum(len(tok.encode(text)) for text in corpus)
    assert abs(ours / sum(len(theirs.encode(text).ids) for text in corpus) - 1) < 0.005


def test_the_largest_vocabulary_equals_that_of_tokenizers():
    """65,536 ids: the last rank is 65,534."""
    rng = random.Random(0)
    text = " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=20)) for _ in range(50_000))
    pieces = count([text.encode()])
    tokens = train_ranks(pieces, 65_536)
    assert len(tokens) == 65_535
    assert tokens == train_tokenizers([text], 65_535)[1]
    assert train_ranks(pieces, 30_000) == tokens[:29_999]
    assert train_ranks({}, 257) == tokens[:256]


def test_the_rank_file_is_tiktokens(corpus, tmp_path):
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    tokens = train_ranks(count([text.encode() for text in corpus[:50]]), 3000)
    (tmp_path / "my.tiktoken").write_bytes(rank_file(tokens))
    ranks = load_tiktoken_bpe(str(tmp_path / "my.tiktoken"))
    assert ranks == {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("my", pat_str=bpe.PATTERN, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 2999})
    tok = bpe.load_tokenizer(str(tmp_path / "my.tiktoken"))
    assert (tok.n_vocab, tok.eot) == (3000, 2999)
    for text in [*corpus[50:60], "naïve 東京 \U0001f600 don't   x\n\n<|endoftext|>"]:
        assert tok.encode(text).tolist() == encoding.encode_ordinary(text)
        assert tok.decode(tok.encode(text)) == text


# ---- the script ----------------------------------------------------------------

def run_script(script: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(REPO / script), *flags], capture_output=True, text=True,
                          encoding="utf-8", timeout=300)


def test_the_script_trains_and_the_data_build_takes_it(tmp_path):
    texts = [STDLIB / f"{name}.py" for name in ("argparse", "ast", "heapq")]
    out = tmp_path / "my.tiktoken"
    (tmp_path / "books").mkdir()
    for path in texts:
        (tmp_path / "books" / f"{path.stem}.txt").write_bytes(path.read_bytes())
    flags = f"--input={tmp_path / 'books'}", "--vocab_size=1000", "--val_fraction=0", f"--out={out}"
    done = run_script("train_bpe.py", *flags)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == rank_file(train_ranks(count([path.read_bytes() for path in texts]), 1000))
    size = sum(path.stat().st_size for path in texts)
    tok = bpe.load_tokenizer(str(out))
    tokens = sum(len(tok.encode(path.read_text(encoding="utf-8"))) for path in texts)
    for part in (f"{size:,} bytes", "1,000 ids", "743 merges", tok.sha256):
        assert part in done.stdout
    command = done.stdout[done.stdout.index("python fineweb.py"):].split()
    assert f"--tokenizer={out}" in command
    built = subprocess.run([sys.executable, str(REPO / "fineweb.py"), *command[2:-1], "--val_fraction=0",
                            f"--data_dir={tmp_path / 'data'}"], capture_output=True, text=True, timeout=300)
    assert built.returncode == 0 and f"{tokens + 3:,} tokens" in built.stdout, built.stderr
    checked = run_script("bpe.py", f"--tokenizer={out}")
    assert checked.returncode == 0 and "ids equal tiktoken's" in checked.stdout
    before = out.read_bytes()
    assert run_script("train_bpe.py", *flags).returncode == 0
    other = run_script("train_bpe.py", *flags, "--vocab_size=999")
    assert other.returncode == 2 and "exists" in other.stderr and "another" in other.stderr
    assert out.read_bytes() == before


@pytest.mark.parametrize("name", ["one.txt", "many.jsonl"])
def test_the_text_for_validation_is_left_out(name, tmp_path, monkeypatch, capsys):
    """The vocabulary is that of the train part alone, as fineweb.py splits the text."""
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    lines = [f"line {i} of word{i} and word{i % 7}\n" * 20 for i in range(100)]
    texts = [json.dumps({"text": line}) + "\n" for line in lines] if path.suffix == ".jsonl" else lines
    path.write_text("".join(texts), encoding="utf-8")
    kept = []
    for _, chunk in input_source(str(path), "text", 0.2).chunks():
        part = chunk.read(*chunk.args)
        kept += [part.text[part.offsets[d]:part.offsets[d + 1]].tobytes()
                 for d in np.flatnonzero(~part.is_val)]
    assert 0.6 < len(b"".join(kept)) / len("".join(lines).encode()) < 0.95
    train_bpe.train("", str(path), "text", 0.2, 300, "out.tiktoken")
    assert Path("out.tiktoken").read_bytes() == rank_file(train_ranks(count(kept), 300))
    assert "--data_dir=out_data --val_fraction=0.2\n" in capsys.readouterr().out


def test_a_vocabulary_of_the_embedded_corpus(tmp_path, monkeypatch, capsys):
    """Of an installation with two modules, and two files that fineweb.py leaves out."""
    texts = {f"{name}.py": (STDLIB / f"{name}.py").read_bytes() for name in ("heapq", "bisect")}
    for name, text in {**texts, "copy.py": texts["heapq.py"], "table.txt": b"1234 5678\n" * 100}.items():
        (tmp_path / name).write_bytes(text)
    monkeypatch.setattr("documents.sysconfig.get_path", lambda key: tmp_path)
    out = tmp_path / "out.tiktoken"
    train_bpe.train("python", "", "text", 0, 400, str(out))
    expected = rank_file(train_ranks(count([*texts.values()]), 400))
    assert out.read_bytes() == expected
    assert "fineweb.py --dataset=python --tokenizer=" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "message"), [
    ({"vocab_size": 32_768}, "type --vocab_size="), ({"out": ""}, "--out=my.tiktoken"),
    ({"input": ""}, "--input=PATH"),
    ({"out": "nowhere/my.tiktoken"}, "or its folder does not exist"), ({"out": "."}, "is a folder"),
    ({"out": "gpt2"}, "OpenAI's vocabulary"),
    ({"val_fraction": 0.9, "input": "some.txt"}, "no text found to train on.*--val_fraction"),
    ({"input": "missing.txt"}, "missing.txt"),
    ({"input": "empty.txt"}, "no text found"), ({"dataset": "python"}, "needs one text"),
    ({"dataset": "fineweb", "input": ""}, "only python"),
    ({"dataset": "python", "input": "", "out": ""}, "--dataset=python, and --out="),
])
def test_mistakes_are_named(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("some.txt").write_text("hello there hello", encoding="utf-8")
    Path("empty.txt").touch()
    settings = {"dataset": "", "input": "some.txt", "text_column": "text", "val_fraction": 0,
                "vocab_size": 257, "out": "my.tiktoken", **flags}
    with pytest.raises(UserError, match=message):
        train_bpe.train(**settings)
    assert not Path("my.tiktoken").exists()
