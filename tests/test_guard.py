"""Bad steps never spoil a run: all processes skip them together and count them, and too many stop it."""

import math
import re

import pytest
from training import attempt, losses, read_log, train, with_fault

from checkpoint import list_checkpoints, load_checkpoint
from shards import TokenStream, WindowLoader

# Micro-batch `call` of the process `rank` has a loss of `factor` times what it should be; every process notes
# a hash of its weights before each of its micro-batches.
FAULT = """
import hashlib
import model
forward, calls = model.GPT.forward, 0
def faulty(self, *args, **kwargs):
    global calls
    out = forward(self, *args, **kwargs)
    if self.training and out.dim() == 0:
        rank, calls = os.environ.get("RANK", "0"), calls + 1
        if rank == "{rank}" and calls - 1 in {calls}:
            out = out * float("{factor}")
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in self.parameters())).hexdigest()
        with open(f"{folder}/weights_{{rank}}", "a") as file:
            file.write(digest + "\\n")
    return out
model.GPT.forward = faulty
"""


def faulty(folder, rank=0, calls=(), factor="nan"):
    return with_fault(folder, FAULT.format(rank=rank, calls=list(calls), factor=factor, folder=folder))


@pytest.mark.parametrize("factor", ["nan", "inf"])
def test_a_bad_loss_of_one_process_is_skipped_by_both(flags, tmp_path, tiny_data, factor):
    """2 processes x 2 micro-steps; rank 1's second micro-batch of step 5 is bad.

    One process skips the same step.
    """
    script = faulty(tmp_path, rank=1, calls=[5 * 2 + 1], factor=factor)
    out = train(flags, 2, script, log_dir=tmp_path / "log")
    weights = [(tmp_path / f"weights_{rank}").read_text(encoding="utf-8").split() for rank in (0, 1)]
    assert weights[0] == weights[1], "the weights of the processes differ"
    before = [weights[0][2 * step] for step in range(12)]
    assert before[6] == before[5] and len(set(before)) == 11, "only step 5 leaves the weights as they were"
    log = read_log(tmp_path / "log", "skipped", "skipped_window")
    assert log["skipped"] == {5: "1"}
    assert "step 5 | skipped: loss" in out and ", skipped: 1\n" in out
    # where the bad batch came from: window 6 of the step's 8, as the loader gives them
    stream = TokenStream(tiny_data, "train")
    window = WindowLoader(stream, 64, 512, 1337, 257).window_ids(5)[6]
    path, token = stream.locate(int(window) * 64)
    assert log["skipped_window"] == {5: str(window)}
    assert f"highest loss: rank 1, micro-step 1, {path.name}:{token}" in out
    guard = load_checkpoint(tmp_path / "log")["guard"]
    assert guard["skipped"] == 1 and guard["in_row"] == 0 and len(guard["recent"]) == 11
    train(flags, 1, faulty(tmp_path, calls=[5 * 4 + 3], factor=factor), log_dir=tmp_path / "one")
    one, two = (losses(tmp_path / name) for name in ("one", "log"))
    assert [step for step, loss in enumerate(one) if not math.isfinite(loss)] == [5]
    assert two == pytest.approx(one, rel=1e-5, nan_ok=True)


def test_bad_steps_in_a_row_stop_the_run(flags, tmp_path):
    script = faulty(tmp_path, calls=range(6 * 4, 1000))
    done = attempt(flags, 1, script, log_dir=tmp_path / "log", max_bad_steps=3)
    assert done.returncode == 1, done.stderr
    assert "3 steps in a row were skipped, the last, 8," in done.stderr
    # it holds the weights after step 5, and a count of the two bad steps since
    newest = list_checkpoints(tmp_path / "log")[-1]
    assert newest.name == "ckpt_0000008.pt" and f"Last good checkpoint: {newest}" in done.stderr
    assert load_checkpoint(newest)["guard"]["in_row"] == 2
    # without the fault the run continues from there
    assert ", skipped: 2\n" in train(flags, log_dir=tmp_path / "log", resume="true")
    assert load_checkpoint(tmp_path / "log")["guard"]["in_row"] == 0
    # and bad steps that are not in a row do not stop it
    script = faulty(tmp_path, calls=[4 * step for step in (2, 3, 5, 6, 8, 9)])
    assert ", skipped: 6\n" in train(flags, 1, script, log_dir=tmp_path / "other", max_bad_steps=3)


def test_spikes_are_skipped_and_do_not_count_as_normal(flags, tmp_path):
    flags |= {"max_steps": 140, "warmup_steps": 1, "val_interval": 0, "checkpoint_interval": 0,
              "grad_clip": 0, "batch_tokens": 128, "max_lr": 1e-4, "min_lr": 1e-4}
    spikes = [20, 132, 133, 134, 137]  # the first before the window of 128 is full
    script = faulty(tmp_path, calls=spikes, factor="3")
    train(flags, 1, script, log_dir=tmp_path / "off")
    assert not read_log(tmp_path / "off", "skipped")["skipped"], "off by default"
    out = train(flags, 1, script, log_dir=tmp_path / "on", max_z_score=8)
    skipped = read_log(tmp_path / "on", "skipped")["skipped"]
    assert list(skipped) == spikes[1:] and skipped[137] == "4"
    assert re.search(r"step 132 \| skipped: loss \d+\.\d+, \d+\.\d deviations above \d+\.\d+", out)
    recent = load_checkpoint(tmp_path / "on")["guard"]["recent"]
    assert len(recent) == 128 and all(loss < 10 for loss, _ in recent[20:])
    # the window is in the checkpoint: stopped between the spikes, the run skips the same ones
    train(flags, 1, script, log_dir=tmp_path / "cut", max_z_score=8, max_steps=136)
    script = faulty(tmp_path, calls=[137 - 136], factor="3")
    out = train(flags, 1, script, log_dir=tmp_path / "cut", max_z_score=8, resume="true")
    assert read_log(tmp_path / "cut", "train", "skipped") == read_log(tmp_path / "on", "train", "skipped")


def test_an_overflow_of_float16_halves_the_scale(flags, tmp_path):
    script = faulty(tmp_path, calls=[4 * 4], factor="inf")
    train(flags, 1, script, log_dir=tmp_path / "log", dtype="float16", max_steps=6)
    state = load_checkpoint(tmp_path / "log")
    assert state["guard"]["skipped"] == 1 and state["scaler"]["scale"] == 2.0**15
    assert read_log(tmp_path / "log", "skipped")["skipped"] == {4: "1"}


def test_a_loss_scale_that_was_too_large_is_no_bad_step(flags, tmp_path):
    """Gradients overflow, losses do not: the scale comes down, and nothing is counted."""
    large = """
        import torch
        make = torch.amp.GradScaler
        torch.amp.GradScaler = lambda *args, **kwargs: make(*args, init_scale=2.0**22, **kwargs)
    """
    out = train(flags, 1, with_fault(tmp_path, large), log_dir=tmp_path / "log", dtype="float16",
                max_bad_steps=2)
    overflows = [step for step, norm in read_log(tmp_path / "log", "norm")["norm"].items()
                 if not math.isfinite(float(norm))]
    assert overflows[:3] == [0, 1, 2], "the test must overflow more often in a row than bad steps may"
    assert out.count(" | loss scale ") == len(overflows)
    state = load_checkpoint(tmp_path / "log")
    assert state["guard"]["skipped"] == 0 and state["scaler"]["scale"] == 2.0 ** (22 - len(overflows))
    assert len(state["guard"]["recent"]) == 12 - len(overflows)
    assert not read_log(tmp_path / "log", "skipped")["skipped"]
