"""More than one process, more than one card's memory: however the work is split, the numbers are the same."""

import pytest
import torch
from training import attempt, fault, losses, read_log, signal_self, train, with_fault

import checkpoint
from checkpoint import list_checkpoints, load_checkpoint

LAYERS = ("norm_wte", "norm_wpe", "norm_h0", "norm_h1", "norm_ln_f")
STREAMS = ("train", "val", "val_bpb", "lr", "norm", *LAYERS, "hella", "hella_acc")


def values(log_dir, stream):
    return [float(value) for value in read_log(log_dir, stream)[stream].values()]


def assert_same_run(one, other, rel=1e-5):
    for stream in STREAMS:
        assert values(one, stream) == pytest.approx(values(other, stream), rel=rel), stream


def test_fsdp_equals_ddp(flags, tmp_path, questions):
    """With dropout and accumulation, and one process with a window less to judge, or a batch of HellaSwag;
    also with activations computed twice, which keeps the masks."""
    flags |= {"val_tokens": 33 * 64, "hellaswag_interval": 5, "hellaswag_data": questions,
              "grad_norm_interval": 1}
    train(flags, log_dir=tmp_path / "one")
    train(flags, 2, log_dir=tmp_path / "ddp")
    assert_same_run(tmp_path / "ddp", tmp_path / "one")
    assert len(values(tmp_path / "one", "hella")) == 3
    assert all(len(values(tmp_path / "one", stream)) == 12 for stream in LAYERS)
    out = train(flags, 2, log_dir=tmp_path / "fsdp", parallel="fsdp", sample_interval=5, max_new_tokens=4)
    assert_same_run(tmp_path / "fsdp", tmp_path / "ddp")
    assert out.count("\n> Hello") == 4  # two samples at steps 5 and 10, drawn by all, printed once
    train(flags, 2, log_dir=tmp_path / "twice", parallel="fsdp", activation_checkpointing="true")
    assert_same_run(tmp_path / "twice", tmp_path / "ddp")
    one, other = (load_checkpoint(tmp_path / name) for name in ("ddp", "fsdp"))
    assert list(one["model"]) == list(other["model"])
    for name, tensor in one["model"].items():
        torch.testing.assert_close(other["model"][name], tensor, rtol=1e-4, atol=1e-5)


def test_checkpoints_fit_any_number_of_processes(flags, tmp_path):
    """4 steps each by fsdp on 2, one process alone, fsdp on 4, ddp on 2: the run of one process."""
    train(flags, log_dir=tmp_path / "one", max_steps=16)
    flags |= {"log_dir": tmp_path / "many", "keep_checkpoints": 9}
    for last, processes, parallel in ((4, 2, "fsdp"), (8, 1, "ddp"), (12, 4, "fsdp"), (16, 2, "ddp")):
        # told to stop in its fourth step, but for the last; not by max_steps, where the cosine ends
        script = fault(tmp_path, 4 * 4 // processes if last < 16 else 0, signal_self("SIGTERM"))
        train(flags, processes, script, parallel=parallel, resume="true", max_steps=16)
        assert [checkpoint.step_of(path) for path in list_checkpoints(tmp_path / "many")][-1] == last
    assert_same_run(tmp_path / "many", tmp_path / "one")


def test_bfloat16_on_two_processes(flags, tmp_path):
    """ddp and fsdp are held to the same equality. fsdp gathers matrices in 16 bits, as autocast rounds them;
    norms, the residual stream, the sums of gradients and the weights themselves stay float32."""
    flags |= {"dtype": "bfloat16", "dropout": 0}
    train(flags, log_dir=tmp_path / "one")
    for parallel in ("ddp", "fsdp"):
        train(flags, 2, log_dir=tmp_path / parallel, parallel=parallel)
        for stream, rel in (("train", 1e-4), ("val", 1e-4), ("norm", 1e-3)):
            one = values(tmp_path / "one", stream)
            assert values(tmp_path / parallel, stream) == pytest.approx(one, rel=rel), (parallel, stream)
    weights = load_checkpoint(tmp_path / "fsdp")["model"].values()
    assert {tensor.dtype for tensor in weights} == {torch.float32}


def test_fsdp_refuses_what_it_cannot_do(flags, tmp_path):
    for wrong in ({"optimizer": "muon"}, {"dtype": "float16"}):
        done = attempt(flags, 2, log_dir=tmp_path / "log", parallel="fsdp", **wrong)
        assert done.returncode != 0 and "--parallel=ddp" in done.stderr and not (tmp_path / "log").exists()


def test_muon_with_processes_and_resume(flags, tmp_path):
    flags |= {"optimizer": "muon", "schedule": "wsd"}
    train(flags, log_dir=tmp_path / "straight")
    train(flags, 2, log_dir=tmp_path / "two")
    # Newton-Schulz in bfloat16 makes a last digit of a gradient a larger one of the update
    assert_same_run(tmp_path / "two", tmp_path / "straight", rel=1e-2)
    train(flags, log_dir=tmp_path / "adamw", optimizer="adamw")
    assert losses(tmp_path / "adamw") != losses(tmp_path / "straight")
    train(flags, log_dir=tmp_path / "broken", max_hours=1e-9)
    train(flags, log_dir=tmp_path / "broken", resume="true")
    assert read_log(tmp_path / "broken", *STREAMS) == read_log(tmp_path / "straight", *STREAMS)
    done = attempt(flags, log_dir=tmp_path / "broken", resume="true", optimizer="adamw")
    assert done.returncode == 2 and "optimizer: muon in the checkpoint, adamw now" in done.stderr


@pytest.mark.parametrize(("parallel", "n_embd"), [("ddp", 640), ("fsdp", 32)])
def test_compiled_on_two_processes(flags, tmp_path, questions, parallel, n_embd):
    """At 640 the gradients are 39 MB: DDP sends them in buckets, between which it cuts the graph."""
    flags |= {"dropout": 0, "n_embd": n_embd, "max_steps": 6, "sample_interval": 2, "max_new_tokens": 4,
              "hellaswag_interval": 2, "hellaswag_data": questions}
    train(flags, log_dir=tmp_path / "one")
    told = with_fault(tmp_path, """
        import torch._dynamo.backends.distributed as backend
        run = backend.SubmodCompiler.run_node
        def told(self, node):
            if node.op == "call_module":
                print("a part of the graph:", node.target, flush=True)
            return run(self, node)
        backend.SubmodCompiler.run_node = told
    """)
    out = train(flags, 2, told, log_dir=tmp_path / "two", compile="true", parallel=parallel)
    assert "compile on" in out and "recompiled" not in out
    assert (out.count("a part of the graph") >= 2 * 2) == (n_embd == 640)
    assert_same_run(tmp_path / "two", tmp_path / "one", rel=1e-4)
    one, two = (load_checkpoint(tmp_path / name)["model"] for name in ("one", "two"))
    assert list(one) == list(two)
