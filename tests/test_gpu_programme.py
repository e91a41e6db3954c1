"""gpu.py on the CPU: every step runs, a failure neither stops the others nor counts as done, and what is
done is not repeated."""

import json
import shutil
import subprocess
import sys

from training import ENVIRONMENT, PYTHON, ROOT

import gpu
from bpe import cache_file, load_tokenizer

STEPS = ["machine", "speed_auto", "speed_flash", "shakespeare", "openstax4m", "tests", "inference",
         "gpu_12gb", "openstax"]


def rehearse(folder, minutes):
    done = subprocess.run([PYTHON, str(ROOT / "gpu.py"), "--device=cpu", f"--minutes={minutes}",
                           f"--data={folder}/data", f"--out_dir={folder}/out", f"--log_dir={folder}/log"],
                          capture_output=True, text=True, timeout=500, env=ENVIRONMENT)
    print(done.stdout + done.stderr)
    lines = (folder / "out_cpu" / "summary.jsonl").read_text(encoding="utf-8").splitlines()
    return done.returncode, [json.loads(line) for line in lines]


def test_rehearsal(tmp_path, tiny_data, questions):
    load_tokenizer("gpt2")
    data, out = tmp_path / "data", tmp_path / "out_cpu"
    for name in ("openstax4m", "openstax"):  # without a manifest, bytes pass for GPT-2's ids
        shutil.copytree(tiny_data, data / name, ignore=shutil.ignore_patterns("manifest.json"))
    (data / "tokenizer").mkdir()
    shutil.copy(cache_file(), data / "tokenizer")
    shutil.copy(questions, data / "hellaswag_val.jsonl")

    returncode, first = rehearse(tmp_path, minutes=60)
    assert returncode == 1 and [record["step"] for record in first] == STEPS
    assert [record["step"] for record in first if record["returncode"]] == ["shakespeare"]  # it has no data

    shutil.copytree(data / "openstax", data / "shakespeare")
    returncode, records = rehearse(tmp_path, minutes=60)
    assert returncode == 0 and records[:-1] == first and records[-1]["step"] == "shakespeare"
    step = {record["step"]: record for record in records}
    assert all(record["seconds"] > 0 and record["commit"] and record["device"] == "cpu" for record in records)
    assert step["machine"]["matmul_tflops"] > 0 and "torch" in step["machine"]
    for name in STEPS[1:5]:
        assert step[name]["last_step"] == 4 and step[name]["first_step"] == 0
        assert step[name]["peak_memory_gb"] > 0
        assert min(step[name][stream] for stream in ("train", "val", "tok_s")) > 0
        assert "matmul_share" in step[name] or not name.startswith("speed")
        assert (out / f"{name}.log.txt").exists()
    assert step["tests"]["skipped"] > 0 or step["tests"]["passed"] > 0
    assert step["inference"]["sample_tok_s"] > 0 and len(step["inference"]["hellaswag_seconds"]) == 2
    assert step["gpu_12gb"]["computed_peak_mib"] == 8826 and step["gpu_12gb"]["dry_run_gb"] > 0
    assert step["openstax"]["first_step"] == [0, 1] and 0 <= step["openstax"]["hella"] <= 1
    assert (out / "openstax.png").exists() and sum(path.stat().st_size for path in out.iterdir()) < 16e6

    assert rehearse(tmp_path, minutes=0) == (0, records)


def test_a_step_that_takes_too_long_and_tests_that_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "out_dir", str(tmp_path))
    monkeypatch.setattr(gpu, "log_dir", str(tmp_path))
    said = "FAILED tests/test_a.py::test_b - x\n1 failed, 12 passed, 3 skipped, 4 deselected in 5.00s"
    assert gpu.run("tests", 60, [[sys.executable, "-c", f"print({said!r}); exit(1)"]]) == (
        1, {"failed": 1, "passed": 12, "skipped": 3})
    returncode, figures = gpu.run("late", 2, [
        ["sh", "-c", "echo peak memory 7.5 GB; exec sleep 600"]])
    assert returncode == 124 and figures == {"peak_memory_gb": 7.5}
