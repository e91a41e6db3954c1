"""The tokenizer study: figures of hand-made texts in closed form, groups of words, files written."""

import csv
import json
import subprocess
import sys
from collections import Counter
from pydoc_data.topics import topics

import numpy as np
import pytest
from conftest import ROOT

import analyze_tokenizer as study
from analyze_tokenizer import COLUMNS, GROUPS, groups_of, is_joined, make_items, measure
from bpe import rank_file, tokenizer_from_ranks
from configurator import UserError
from documents import from_texts
from model import GPT, GPTConfig
from train_bpe import train_ranks

BYTES = [bytes([b]) for b in range(256)]
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}


def corpus_of(train, val, hyphenated=()):
    return study.Corpus(Counter(train), Counter(val), Counter(dict(hyphenated)), [1, 1], [1, 1])


def tokenizer_of(*merged):
    return tokenizer_from_ranks(rank_file([*BYTES, *merged]), "hand-made")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Documents, and a jsonl file of them: pydoc's topics, an empty one and one with more than ASCII."""
    documents = [*topics.values(), "", "na\u00efve caf\u00e9 \u6771\u4eac don't well-known  x\u00b2-y\n" * 3]
    path = tmp_path_factory.mktemp("texts") / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return [text.encode() for text in documents if text], path


@pytest.fixture(scope="module")
def corpus(texts):
    return study.read_corpus(str(texts[1]), "text", 0.3)


def is_val(documents, val_fraction):
    return from_texts([(document, "", None) for document in documents], val_fraction, []).is_val


def test_figures_in_closed_form():
    # tokens:       " the" 1     "the" 1   " th" 2    "cat" 3   " 12" 3    "." 1
    val = {b" the": 3, b"the": 1, b" th": 3, b"cat": 2, b" 12": 1, b".": 2}
    items = make_items(corpus_of({b" the": 40, b"THE": 2, b"cat": 9}, val, {b" the-cat": 5}))
    row, group_rows = measure(tokenizer_of(b"th", b"the", b" the"), "trained", items, SHAPE)
    assert row["tokens"] == 3 + 1 + 3 * 2 + 2 * 3 + 3 + 2
    assert row["bytes_per_token"] == 35 / 21
    assert row["tokens_per_kb"] == pytest.approx(21 / 0.035)
    assert row["tokens_per_word"] == 16 / 9
    assert row["whole_words"] == 4 / 9
    assert row["vocab_size"] == 260
    model = GPT(GPTConfig(n_vocab=260, vocab_size=384, **SHAPE))
    assert row["embedding_params"] == 384 * 32 == model.lm_head.weight.numel()
    assert row["embedding_share"] == 384 * 32 / model.num_params()
    assert row["flops_per_token"] == model.flops_per_token(16)
    assert row["flops_per_byte"] == pytest.approx(model.flops_per_token(16) * 21 / 35)
    assert row["context_bytes"] == 16 * (35 / 21)
    groups = {of_group["group"]: of_group for of_group in group_rows}
    assert list(groups) == list(GROUPS)
    assert groups["10-99"] == {"vocabulary": "trained", "vocab_size": 260, "group": "10-99", "distinct": 2,
                               "occurrences": 4, "tokens_per_word": 1.0, "whole_words": 1.0}
    assert groups["1-9"]["tokens_per_word"] == 3.0 and groups["1-9"]["whole_words"] == 0.0
    assert groups["hyphenated"]["occurrences"] == 5
    assert groups["hyphenated"]["tokens_per_word"] == 1 + 1 + 3  # " the", "-", "cat"
    assert groups["technical"]["occurrences"] == 0 and np.isnan(groups["technical"]["whole_words"])


def test_rows_of_embedding_are_a_multiple_of_128():
    for n_vocab, rows in ((257, 384), (384, 384), (385, 512), (50257, 50304)):
        assert study.model_cost(n_vocab, 1.0, SHAPE)["embedding_params"] == rows * 32


def test_gpt2_small_by_default():
    shape = {key: getattr(study, key) for key in SHAPE}
    cost = study.model_cost(50257, 4.0, shape)
    assert cost["embedding_params"] == 50304 * 768
    assert cost["embedding_share"] == pytest.approx(38_633_472 / 124_475_904)
    assert cost["flops_per_token"] == 6 * (124_475_904 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert cost["flops_per_byte"] == cost["flops_per_token"] / 4


def test_a_word_is_a_piece_of_letters():
    words = {" word": "word", "word": "word", "\u00fcber": "\u00fcber", " \u6771\u4eac": "\u6771\u4eac",
             "'s": "", " 1": "", "a1": "", " ": "", "  a": "", ".": "", "-a": "", "\u0301": ""}
    assert {piece: study.as_word(piece.encode()) for piece in words} == words
    assert study.as_word(b"\xff") == study.as_word(b" a\xff") == ""


@pytest.mark.parametrize(("counts", "band"), [
    ((0,), "unseen"), ((1, 9), "1-9"), ((10, 99), "10-99"), ((100, 999), "100-999"),
    ((1000, 9999), "1k-9,999"), ((10_000, 10**7), "10k+")])
def test_the_band_is_the_decade_of_the_frequency(counts, band):
    assert all(groups_of("Word", Counter({"word": count})) == [band] for count in counts)


def test_frequency_counts_every_case_with_and_without_the_space():
    items = make_items(corpus_of({b" Word": 5, b"word": 3, b" WORD": 2, b" 1": 900},
                                 {b"wo": 1, b" word": 1, b".": 1}))
    assert items.strings == [b" word", b".", b"wo"]
    assert items.masks["10-99"].tolist() == [True, False, False]
    assert items.masks["unseen"].tolist() == [False, False, True]
    assert items.masks["words"].tolist() == [True, False, True] and items.masks["pieces"].all()


def test_joined_words():
    frequency = Counter({"class": 5000, "room": 100, "classroom": 99, "rooms": 99, "sub": 9000,
                         "under": 7000, "standing": 150, "understanding": 150})
    assert is_joined("classroom", frequency) and is_joined("Classroom", frequency)
    assert not is_joined("classrooms", frequency)  # "rooms" is too rare
    assert not is_joined("subclass", frequency)  # three letters
    assert not is_joined("understanding", frequency)  # more frequent than, or as frequent as, a part
    assert not is_joined("class", frequency) and not is_joined("Class", frequency)
    assert is_joined("PowerPoint", Counter())
    assert not any(is_joined(word, Counter()) for word in ("POWER", "Power", "kJ", "NaCl", "mRNA"))


def test_technical_words():
    for word in ("photosynthesis", "Thermodynamics", "ribosomes", "mitochondria", "spectroscopy"):
        assert "technical" in groups_of(word, Counter()), word
    for word in ("analysis", "biology", "handsome", "university", "logical", "metropolis", "antibiotics"):
        assert "technical" not in groups_of(word, Counter()), word


def test_the_parts_are_those_of_the_hash_and_nothing_is_lost(texts, corpus):
    documents, _ = texts
    val = is_val(documents, 0.3)
    assert corpus.documents == [(~val).sum(), val.sum()]
    for counts, size, part in zip((corpus.train, corpus.val), corpus.sizes, (~val, val)):
        here = [document for document, chosen in zip(documents, part) if chosen]
        assert size == sum(map(len, here)) == sum(len(piece) * count for piece, count in counts.items())
        words = Counter(word for document in here for word in document.split() if word.isalpha())
        assert all(counts.get(b" " + word, 0) + counts.get(word, 0) >= n for word, n in words.items())


def test_tokens_of_pieces_add_up_to_those_of_the_text(texts, corpus):
    tok, = study.train_tokenizers(corpus.train, [700], True)
    held_out = [text for text, chosen in zip(texts[0], is_val(texts[0], 0.3)) if chosen]
    row, _ = measure(tok, "trained", make_items(corpus), SHAPE)
    encoding = tok.to_tiktoken()
    assert row["tokens"] == sum(len(encoding.encode_ordinary(text.decode())) for text in held_out)
    assert row["bytes_per_token"] == sum(map(len, held_out)) / row["tokens"]


def test_one_txt_file_is_divided_as_fineweb_divides_it(tmp_path):
    """At the start of a line; with separators, by the hash of each document; a short text is one document."""
    lines, path = [f"line {i} of the text\n" for i in range(2000)], tmp_path / "book.txt"
    path.write_text("".join(lines), encoding="utf-8")
    corpus = study.read_corpus(str(path), "text", 0.1)
    assert corpus.documents == [1, 1] and sum(corpus.sizes) == path.stat().st_size
    assert corpus.sizes[1] - 20 < path.stat().st_size // 10 <= corpus.sizes[1]
    assert all(part[b"line"] == part[b" text"] for part in (corpus.train, corpus.val))  # complete lines

    path.write_text("<|endoftext|>".join(lines), encoding="utf-8")
    n_val = is_val([line.strip().encode() for line in lines], 0.1).sum()
    assert study.read_corpus(str(path), "text", 0.1).documents == [2000 - n_val, n_val]
    path.write_text("one document", encoding="utf-8")
    with pytest.raises(UserError, match=r"documents to train on and .* both are needed; .*--val_fraction"):
        study.read_corpus(str(path), "text", 0.1)


def test_hyphenated_words_are_found(tmp_path):
    text = "a well-known,state-of-the-art 3-x x\u00b2-y a--b -c d- \u00fcber-ich well-known\n\nwell-known"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"some words\n" * 5)

    fraction = next(f for f in np.arange(0.01, 1, 0.01) if is_val([text.encode()], f)[0])
    assert not is_val([b"some words\n" * 5], fraction)[0]
    found = study.read_corpus(str(tmp_path), "text", fraction)
    assert found.hyphenated == {b" well-known": 2, b"well-known": 1, b"state-of-the-art": 1,
                                " \u00fcber-ich".encode(): 1}


def test_smaller_vocabularies_are_prefixes_of_the_largest(corpus):
    toks = study.train_tokenizers(corpus.train, [257, 300, 900], False)
    assert [tok.n_vocab for tok in toks] == [257, 300, 900]
    for tok in toks:
        assert tok.tokens[:-1] == train_ranks(corpus.train, tok.n_vocab) == toks[-1].tokens[:tok.n_vocab - 1]


def test_sizes_that_the_text_is_too_small_for(capsys):
    """They are left out, unless the user named them or none is left."""
    pieces = Counter({b"abc": 2})  # two merges
    assert [tok.n_vocab for tok in study.train_tokenizers(pieces, [258, 300, 400], False)] == [258]
    assert capsys.readouterr().out.count("left out: ") == 2
    for sizes, fixed in (([257, 300], True), ([300], False)):
        with pytest.raises(UserError, match=r"vocab_size=300; .*--vocab_sizes=259$"):
            study.train_tokenizers(pieces, sizes, fixed)


def test_the_script(tmp_path, texts, byte_tokenizer):
    command = [sys.executable, str(ROOT / "analyze_tokenizer.py"), f"--input={texts[1]}", "--out_dir=study",
               "--vocab_sizes=512,257,1024", f"--tokenizer={byte_tokenizer}",
               "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "study"
    assert sorted(path.name for path in folder.iterdir()) == sorted(study.NAMES)
    assert (folder / "tokenizer_study.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    report = (folder / "tokenizer_study.txt").read_text(encoding="utf-8")
    assert report in done.stdout and max(map(len, done.stdout.splitlines())) <= 110

    rows = list(csv.DictReader((folder / "tokenizer_study.csv").open(encoding="utf-8")))
    assert list(rows[0]) == list(COLUMNS)
    assert [(row["vocabulary"], row["vocab_size"]) for row in rows] == [
        ("trained", "257"), ("trained", "512"), ("trained", "1024"), ("bytes", "257")]
    convert = {"s": str, "d": int, "f": float, "%": float}
    for row in rows:  # each line of the table is the row of the CSV, rounded
        values = [convert[form[-1]](row[key]) for key, (*_, form, _) in COLUMNS.items()]
        cells = [f"{value / unit if unit else value:{form}}"
                 for value, (*_, form, unit) in zip(values, COLUMNS.values())]
        assert cells in [line.split() for line in report.splitlines()]
        flops = float(row["flops_per_token"]), float(row["flops_per_byte"])
        assert cells[-2:] == [f"{f / 1e6:,.1f}" for f in flops]  # MFLOPs, say the headings
    for row in (rows[0], rows[3]):  # no merges: one token per byte, whoever trained it
        assert float(row["bytes_per_token"]) == 1.0 and float(row["tokens_per_kb"]) == 1000.0
        assert row["flops_per_byte"] == f"{float(row['flops_per_token'])}"
    compression = [float(row["bytes_per_token"]) for row in rows[:3]]
    assert compression == sorted(set(compression))
    group_rows = list(csv.DictReader((folder / "tokenizer_study_groups.csv").open(encoding="utf-8")))
    assert [row["group"] for row in group_rows] == [*GROUPS] * 4
    assert {row["vocabulary"] for row in group_rows[-len(GROUPS):]} == {"bytes"}
    assert all(float(row["whole_words"]) == 0 for row in group_rows if row["group"] == "hyphenated")


@pytest.mark.parametrize(("settings", "words"), [
    ({"vocab_sizes": "512,many"}, "wanted different numbers"), ({"vocab_sizes": "256"}, "from 257"),
    ({"vocab_sizes": "512,512"}, "wanted different numbers"), ({"vocab_sizes": "65537"}, "to 65536"),
    ({"vocab_sizes": ","}, "wanted different numbers"), ({"input": ""}, "--input=PATH"),
    ({"n_head": 5}, "multiple of n_head")])
def test_settings_that_cannot_be_studied(settings, words, monkeypatch, tmp_path):
    for key, value in {"input": "a.txt", "out_dir": str(tmp_path), **settings}.items():
        monkeypatch.setattr(study, key, value)
    with pytest.raises(UserError, match=words):
        study.check_settings()


@pytest.mark.parametrize("name", study.NAMES)
def test_existing_files_are_kept(name, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "input", "a.txt")
    monkeypatch.setattr(study, "out_dir", str(tmp_path))
    assert study.check_settings()[0] == [512, 1024, 2048, 4096, 8192, 16384, 32768, 50257]
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{name} exists: delete it .*--out_dir"):
        study.check_settings()
