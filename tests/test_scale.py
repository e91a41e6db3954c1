"""More than one process, more than one card's memory: however the work is split, the numbers are the same."""

import pytest
import torch
from training import (
    LAYERS,
    STREAMS,
    assert_same_run,
    attempt,
    command,
    fault,
    losses,
    read_log,
    run_by_hand,
    signal_self,
    train,
    values,
    with_fault,
)

from checkpoint import list_checkpoints, load_checkpoint

ALL_STREAMS = (*STREAMS, *LAYERS, "hella", "hella_acc")
MESH = """
import torch.distributed.fsdp as fsdp
shard = fsdp.fully_shard
def checked(module, *, mesh, **options):
    assert mesh.device_type == "cpu"
    return shard(module, mesh=mesh, **options)
fsdp.fully_shard = checked
"""


def test_fsdp_equals_ddp(flags, tmp_path, questions):
    """With dropout and accumulation, where one process has a val window less than the other, or a batch of
    HellaSwag; also with activations computed twice, which keeps the masks. Without a mesh, fully_shard takes
    the accelerator of the machine, also for --device=cpu."""
    flags |= {"val_tokens": 33 * 64, "hellaswag_interval": 5, "hellaswag_data": questions,
              "grad_norm_interval": 1}
    train(flags, log_dir=tmp_path / "one")
    train(flags, 2, log_dir=tmp_path / "ddp")
    assert_same_run(tmp_path / "ddp", tmp_path / "one", ALL_STREAMS)
    assert len(values(tmp_path / "one", "hella")) == 3
    assert all(len(values(tmp_path / "one", stream)) == 12 for stream in LAYERS)
    out = train(flags, 2, with_fault(tmp_path, MESH), log_dir=tmp_path / "fsdp", parallel="fsdp",
                sample_interval=5, max_new_tokens=4)
    assert_same_run(tmp_path / "fsdp", tmp_path / "ddp", ALL_STREAMS)
    assert out.count("\n> Hello") == 4  # two samples at steps 5 and 10, drawn by all, printed once
    train(flags, 2, log_dir=tmp_path / "twice", parallel="fsdp", activation_checkpointing="true")
    assert_same_run(tmp_path / "twice", tmp_path / "ddp", ALL_STREAMS)
    one, other = (load_checkpoint(tmp_path / name) for name in ("ddp", "fsdp"))
    assert list(one["model"]) == list(other["model"])
    for name, tensor in one["model"].items():
        torch.testing.assert_close(other["model"][name], tensor, rtol=1e-4, atol=1e-5)


def test_checkpoints_fit_any_number_of_processes(flags, tmp_path, shared_run):
    """Some steps each by fsdp on 2, one process, fsdp on 4, ddp on 2, one process: a run of one process."""
    flags |= {"log_dir": tmp_path / "many", "keep_checkpoints": 9}
    for steps, last, processes, parallel in ((3, 3, 2, "fsdp"), (3, 6, 1, "ddp"), (4, 10, 4, "fsdp"),
                                             (3, 13, 2, "ddp"), (3, 16, 1, "ddp")):
        # all but the last are stopped in their last step; not by max_steps, where the cosine ends
        script = fault(tmp_path, steps * 4 // processes if last < 16 else 0, signal_self("SIGTERM"))
        train(flags, processes, script, parallel=parallel, resume="true", max_steps=16)
        assert list_checkpoints(tmp_path / "many")[-1].name == f"ckpt_{last:07d}.pt"
    assert_same_run(tmp_path / "many", shared_run(max_steps=16))


def test_bfloat16_on_two_processes(flags, tmp_path):
    """ddp and fsdp must be equally close. fsdp gathers matrices in 16 bits, as autocast rounds them;
    norms, the residual stream, the sums of gradients and the weights themselves stay float32."""
    flags |= {"dtype": "bfloat16", "dropout": 0}
    train(flags, log_dir=tmp_path / "one")
    for parallel in ("ddp", "fsdp"):
        train(flags, 2, log_dir=tmp_path / parallel, parallel=parallel)
        assert_same_run(tmp_path / parallel, tmp_path / "one", ["train", "val"], rel=1e-4)
        assert_same_run(tmp_path / parallel, tmp_path / "one", ["norm"], rel=1e-3)
    weights = load_checkpoint(tmp_path / "fsdp")["model"].values()
    assert {tensor.dtype for tensor in weights} == {torch.float32}


@pytest.mark.parametrize(("wrong", "words"), [
    ({"optimizer": "muon"}, "--parallel=ddp"), ({"dtype": "float16"}, "--parallel=ddp"),
    ({"device": "cuda:0"}, "one device for 2 processes; type --device=cuda")])
def test_what_two_processes_cannot_do_is_refused(flags, tmp_path, wrong, words):
    """Before they wait for each other."""
    line = command({**flags, "parallel": "fsdp", **wrong}, log_dir=tmp_path / "log")
    (returncode, _, err), = run_by_hand([line], world_size=2)
    assert returncode == 2 and words in err and not (tmp_path / "log").exists(), err


def test_muon_with_processes_and_resume(flags, tmp_path):
    flags |= {"optimizer": "muon", "schedule": "wsd", "grad_norm_interval": 1}
    streams = (*STREAMS, *LAYERS)
    train(flags, log_dir=tmp_path / "straight")
    train(flags, 2, log_dir=tmp_path / "two")
    # Newton-Schulz in bfloat16 turns a rounding error of a gradient into a larger one of the update
    assert_same_run(tmp_path / "two", tmp_path / "straight", streams, rel=1e-2)
    train(flags, log_dir=tmp_path / "adamw", optimizer="adamw")
    assert losses(tmp_path / "adamw") != losses(tmp_path / "straight")
    train(flags, log_dir=tmp_path / "broken", max_hours=1e-9)
    train(flags, log_dir=tmp_path / "broken", resume="true")
    assert read_log(tmp_path / "broken", *streams) == read_log(tmp_path / "straight", *streams)
    done = attempt(flags, log_dir=tmp_path / "broken", resume="true", optimizer="adamw")
    assert done.returncode == 2 and "optimizer: muon in the checkpoint, adamw now" in done.stderr


@pytest.mark.parametrize(("parallel", "n_embd"), [("ddp", 640), ("fsdp", 32)])
def test_compiled_on_two_processes(flags, tmp_path, questions, parallel, n_embd):
    """At 640 the gradients are 39 MB: DDP sends them in buckets, between which it cuts the graph."""
    flags |= {"dropout": 0, "n_embd": n_embd, "max_steps": 6, "sample_interval": 2, "max_new_tokens": 4,
              "grad_norm_interval": 2, "hellaswag_interval": 2, "hellaswag_data": questions}
    train(flags, log_dir=tmp_path / "one")
    script = with_fault(tmp_path, """
        import torch._dynamo.backends.distributed as backend
        run = backend.SubmodCompiler.run_node
        def reported(self, node):
            if node.op == "call_module":
                print("a part of the graph:", node.target, flush=True)
            return run(self, node)
        backend.SubmodCompiler.run_node = reported
    """)
    out = train(flags, 2, script, log_dir=tmp_path / "two", compile="true", parallel=parallel)
    assert "compile on" in out and "recompiled" not in out
    assert (out.count("a part of the graph") >= 2 * 2) == (n_embd == 640)
    assert_same_run(tmp_path / "two", tmp_path / "one", (*STREAMS, "hella", "hella_acc"), rel=1e-4)
    assert_same_run(tmp_path / "two", tmp_path / "one", LAYERS, rel=1e-2)  # rounding has grown for 4 steps
    one, two = (load_checkpoint(tmp_path / name)["model"] for name in ("one", "two"))
    assert list(one) == list(two)
