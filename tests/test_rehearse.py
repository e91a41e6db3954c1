"""The parts of experiments/rehearse.py that can fail on their own; the rehearsal takes five minutes."""

import os
import signal
import subprocess
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from training import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import rehearse

import hellaswag
from bpe import load_tokenizer

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_the_corpus_has_the_columns_and_the_size_that_the_runs_need(encoding):
    files = [pq.ParquetFile(pa.BufferReader(data)) for data in rehearse.corpus().values()]
    tables = [file.read() for file in files]
    assert {*tables[0].column_names} >= {"text", "id", "dump", "url", "language_score", "token_count"}
    texts = [text for table in tables for text in table["text"].to_pylist()]
    steps = 5 * sum(len(encoding.encode_ordinary(text)) for text in texts) / 8192
    assert 85 < steps < 105  # of run D's five epochs; its worker is killed in step 45
    assert all(file.num_row_groups > 1 for file in files)


def test_the_questions_are_hellaswags(tmp_path):
    rehearse.questions(tmp_path / "questions.jsonl")
    for protocol in hellaswag.PROTOCOLS:
        found = hellaswag.read_examples(tmp_path / "questions.jsonl", load_tokenizer(), protocol, 0)
        assert len(found.items) == 20


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_only_the_worker_of_rank_1_of_this_run_is_killed(tmp_path):
    log = tmp_path / "log.txt"
    processes = [subprocess.Popen(SLEEP, env={**os.environ, "RANK": rank, "LOG": str(path)})
                 for rank, path in (("0", log), ("1", log), ("1", "another"))]
    try:
        log.write_text("44 train 3.0\n", encoding="utf-8")
        killer = threading.Thread(target=rehearse.kill_a_worker, args=(log, 45), daemon=True)
        killer.start()
        killer.join(0.3)
        assert killer.is_alive() and [process.poll() for process in processes] == [None] * 3
        log.write_text("44 train 3.0\n45 train 2.9\n", encoding="utf-8")
        killer.join(30)
        assert processes[1].wait(30) == -signal.SIGKILL
        for process in (processes[0], processes[2]):
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_command_that_fails_ends_the_rehearsal(monkeypatch, tmp_path):
    monkeypatch.setattr(rehearse, "FOLDER", tmp_path)
    with pytest.raises(subprocess.CalledProcessError):
        rehearse.call("fails", "-c", "raise SystemExit(3)")
