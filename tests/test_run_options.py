"""Options of a run: a dry run, memory savers, trackers, exact repetition; and what stops it at the start."""

import json
import os
import re
import subprocess

import pytest
from training import (
    ENVIRONMENT,
    assert_same_run,
    attempt,
    command,
    losses,
    on_forward,
    read_log,
    snapshot,
    train,
    with_fault,
)

from checkpoint import load_checkpoint


def test_deterministic_runs_have_identical_logs(flags, tmp_path, shared_run):
    logs = []
    for name in "ab":
        train(flags, log_dir=tmp_path / name, deterministic="true", checkpoint_interval=0)
        logs.append((tmp_path / name / "log.txt").read_bytes())
    assert logs[0] == logs[1] and b"train" in logs[0]
    plain = read_log(shared_run(), "train", "tok_s")
    assert plain["train"] == read_log(tmp_path / "a", "train")["train"] and len(plain["tok_s"]) == 12


def test_dry_run_measures_and_writes_nothing(flags, tmp_path, shared_run):
    log_dir = shared_run()
    listing = snapshot(log_dir)
    out = train(flags, log_dir=log_dir, max_steps=7200, dry_run="true")  # beside an existing run
    assert listing == snapshot(log_dir)
    steps = re.findall(r"^step (\d+) \| loss: ([\d.]+)", out, re.M)
    assert [int(step) for step, _ in steps] == [0, 1]
    assert [loss for _, loss in steps] == [f"{loss:.6f}" for loss in losses(log_dir)[:2]], "not real steps"
    needs, of, with_val = map(float, re.search(
        r"training needs ([\d.]+) GB of the ([\d.]+) GB of .+, with validation ([\d.]+) GB;", out).groups())
    assert 0.1 < needs <= with_val < of
    tok_s, hours, minutes, seconds = (int(number.replace(",", "")) for number in re.search(
        r"([\d,]+) tok/s: 7,200 steps of 512 tokens take (\d+):(\d\d):(\d\d)", out).groups())
    assert 3600 * hours + 60 * minutes + seconds == pytest.approx(7200 * 512 / tok_s, rel=0.01, abs=1)
    # nothing is required that two steps do not need
    train(flags, log_dir=tmp_path / "other", dry_run="true", hellaswag_interval=1, hellaswag_data="nosuch")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("chunked", "most"), [(True, 4), (False, 1)])
def test_evaluation_has_no_more_rows_of_logits_than_training(flags, tmp_path, chunked, most):
    """All logits at once, as on a GPU, take more memory in eager evaluation than in a compiled step."""
    script = on_forward(tmp_path, f"""
        if not self.training and len(args) > 1:  # with targets
            open({str(tmp_path / "rows")!r}, "a").write(f"{{len(args[0])}} ")""",
                        before="" if chunked else """
        import device
        device.Device.loss_chunk = 0""")
    train(flags, 1, script, log_dir=tmp_path / "log", batch_size=4, batch_tokens=512, max_steps=4)
    assert set((tmp_path / "rows").read_text(encoding="utf-8").split()) == {str(most)}


@pytest.mark.parametrize("error", [
    'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")',
    'RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can\'t allocate memory")',
])
def test_out_of_memory_is_answered_with_the_flag(flags, tmp_path, shared_run, error):
    script = on_forward(tmp_path, f"""
        if args[0].size(0) > 1 and self.training and torch.is_grad_enabled():
            raise {error}""")
    done = attempt(flags, 1, script, log_dir=tmp_path / "log")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    flag = re.search(r"type (--batch_size=1) \(same tokens per step; now 2\)", done.stderr)[1]
    assert "--loss_chunk=16" in done.stderr and "--activation_checkpointing" in done.stderr
    # the flag works, in the same folder, as no step was made; and the run is the same
    train({**flags, **dict([flag[2:].split("=")])}, 1, script, log_dir=tmp_path / "log", dropout=0)
    assert_same_run(tmp_path / "log", shared_run(dropout=0))


def test_a_model_that_does_not_fit_is_refused_before_the_first_step(flags, tmp_path):
    """By --dry_run too, which is there to find out; on a CPU before Linux would kill it."""
    done = attempt(flags, log_dir=tmp_path / "log", dry_run="true", n_embd=2**24)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    needs, has = re.search(r"needs ([\d,.]+) GB of memory \(computed\), and .+ has ([\d,.]+) GB; type",
                           done.stderr).groups()
    assert float(needs.replace(",", "")) > 16 * 24 * 2**48 / 1e9 > float(has.replace(",", ""))
    assert "--n_embd than 16777216" in done.stderr


def test_memory_savers_change_no_number(flags, tmp_path, shared_run):
    train(flags, log_dir=tmp_path, activation_checkpointing="true", loss_chunk=50)
    assert_same_run(tmp_path, shared_run())


def test_a_device_whose_attention_leaks_the_future_is_refused(flags, tmp_path, shared_run):
    """Causal attention without the mask: nothing is trained. With --attention=plain the run is that of a
    healthy device, unless that leaks as well."""
    leak = """
        import torch.nn.functional as F
        sdpa = F.scaled_dot_product_attention
        def leaky(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
            return sdpa(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)
        F.scaled_dot_product_attention = leaky
    """
    script = with_fault(tmp_path, leak)
    done = attempt(flags, 1, script, log_dir=tmp_path / "leak")
    assert done.returncode == 2 and "numbers: type --attention=plain" in done.stderr, done.stderr
    assert not (tmp_path / "leak").exists()
    train(flags, 1, script, log_dir=tmp_path / "leak", dropout=0, attention="plain")
    assert_same_run(tmp_path / "leak", shared_run(dropout=0))
    worse = leak + "    import kernels\n        kernels.plain_attention = leaky\n"
    done = attempt(flags, 1, with_fault(tmp_path, worse), log_dir=tmp_path / "worse", attention="plain")
    assert done.returncode == 2 and "computes wrong numbers" in done.stderr
    assert not (tmp_path / "worse").exists()


def test_a_slow_first_step_and_a_late_compilation(flags, tmp_path):
    """The first step sleeps 8 s, as if it compiled: counted in the time left, the 10 steps after step 1 would
    take 40 s. In step 2 torch's count of graphs goes up, which is reported."""
    script = on_forward(tmp_path, """
        time.sleep(8 * (self.training and calls == 1))
        if self.training and calls == 2 * 4 + 2:
            torch._dynamo.utils.counters["stats"]["unique_graphs"] += 1""")
    out = train(flags, 1, script, log_dir=tmp_path / "log", val_interval=0)
    (ms, minutes, seconds), = re.findall(r"^step 1 .* dt: ([\d.]+)ms .* eta: 0:(\d+):(\d+)$", out, re.M)
    assert 60 * int(minutes) + int(seconds) == pytest.approx(10 * float(ms) / 1000, abs=1)
    assert re.findall(r"^step (\d+) \| recompiled: 1 graphs, 0 before", out, re.M) == ["2"]


def test_a_wrong_initialisation_stops_at_the_first_step(flags, tmp_path):
    wide = """
        import torch, model
        init = model.GPT.__init__
        def wide(self, config):
            init(self, config)
            with torch.no_grad():
                self.transformer["wte"].weight *= 50
        model.GPT.__init__ = wide
    """
    done = attempt(flags, 1, with_fault(tmp_path, wide), log_dir=tmp_path / "log")
    assert done.returncode == 2 and "wanted about 5.96, ln(384)" in done.stderr
    train(flags, log_dir=tmp_path / "log", max_steps=4)  # fixed, it starts there: no step was made
    # it may be on purpose
    train(flags, 1, with_fault(tmp_path, wide), log_dir=tmp_path / "wide", first_loss_check="false")


def test_adamws_part_under_muon_has_a_rate_of_its_own(flags, tmp_path):
    train(flags, log_dir=tmp_path, max_steps=4, optimizer="muon", adamw_lr_scale=0.25)
    *_, lr = read_log(tmp_path, "lr")["lr"].values()
    adamw, muon = ({group["lr"] for group in optimizer["param_groups"]}
                   for optimizer in load_checkpoint(tmp_path)["optimizers"])
    assert (*adamw, *muon) == pytest.approx((0.25 * float(lr), float(lr)))


WANDB = """
import json, sys
def hook(*error):
    raise SystemExit(9)
class Run:
    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")
    def finish(self):
        assert sys.excepthook is not hook
    def log(self, values):
        with open("{path}", "a") as file:
            file.write(json.dumps(values) + "\\n")
def init(**settings):
    sys.excepthook = hook
    with open("{path}", "a") as file:
        file.write(json.dumps({{"init": [settings["id"], settings["resume"]]}}) + "\\n")
    return Run()
"""


def test_trackers_continue_in_the_same_run(flags, tmp_path, monkeypatch):
    """W&B is a stand-in for the package, which needs an account or a server."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in" / "wandb.py").write_text(WANDB.format(path=tmp_path / "calls"), encoding="utf-8")
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(tmp_path / "stand_in"))
    flags |= {"log_dir": tmp_path / "log", "wandb": "true", "tensorboard": "true"}
    train(flags, max_hours=1e-9)
    train(flags, resume="true")
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text(encoding="utf-8").splitlines()]
    starts = [call["init"] for call in calls if "init" in call]
    assert len(starts) == 2 and starts[0] == starts[1] and starts[0][1] == "allow"
    train_losses = {call["step"]: call["train"] for call in calls if "train" in call}
    assert list(train_losses.values()) == pytest.approx(losses(tmp_path / "log"), rel=1e-6)
    events = EventAccumulator(str(tmp_path / "log" / "tensorboard"))
    events.Reload()
    log = read_log(tmp_path / "log", "train", "val", "lr")
    for stream in log:
        scalars = {event.step: event.value for event in events.Scalars(stream)}
        assert scalars == pytest.approx({step: float(v) for step, v in log[stream].items()}, rel=1e-6), stream


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_runs(flags, tmp_path, package):
    missing = f"""
        import importlib.util
        find = importlib.util.find_spec
        def find_others(name, *rest):
            return None if name == {package!r} else find(name, *rest)
        importlib.util.find_spec = find_others
    """
    done = attempt(flags, 1, with_fault(tmp_path, missing), log_dir=tmp_path / "log", **{package: "true"})
    assert done.returncode == 2 and f"pip install {package}" in done.stderr
    assert not (tmp_path / "log").exists()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_a_bar_in_a_terminal(flags, tmp_path):
    """With the time left of the run, and other lines above it."""
    termios = pytest.importorskip("termios")
    ours, theirs = os.openpty()
    termios.tcsetwinsize(ours, (24, 120))
    process = subprocess.Popen(command(flags, log_dir=tmp_path / "log"), stdout=theirs, stderr=theirs,
                               env=ENVIRONMENT)
    os.close(theirs)
    screen = b""
    try:
        while part := os.read(ours, 65536):
            screen += part
    except OSError:  # Linux's way to say that the other end is closed
        pass
    assert process.wait(timeout=60) == 0, screen.decode()
    screen = screen.decode()
    assert re.search(r"100%\|.*\| 12/12 steps, 0:00:00 left, loss \d", screen), screen
    assert "loss " in screen and "step 3 | loss" not in screen and "step 8 | val loss" in screen
    assert len(read_log(tmp_path / "log", "train")["train"]) == 12
