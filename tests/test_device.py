"""The resolver of device, dtype and compile, on this machine and on simulated ones."""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._inductor.config
from conftest import ROOT

import device as device_module
from configurator import UserError
from device import PEAK_TFLOPS, Device, peak_tflops, resolve_device, watch_memory

# What torch and the system report on each machine. sm: compute capability; bf16: the flag of the CPU's
# instructions; compiler: the error of torch.compile there, None where it works
NO_TRITON = "Cannot find a working triton installation.\nMore lines follow."
NO_MSVC = "Compiler: cl is not found."
MACHINES = {
    "linux-v100": {"sm": 70}, "linux-t4": {"sm": 75}, "linux-a100": {"sm": 80}, "linux-h200": {"sm": 90},
    "linux-rtx5090": {"sm": 120}, "linux-mi300x": {"sm": 94, "hip": "6.4"},
    "windows-gtx1660": {"sm": 75, "compiler": NO_TRITON},
    "windows-rtx4050": {"sm": 89, "compiler": NO_TRITON},
    "windows-rtx4050-triton": {"sm": 89},
    "mac-m3": {"mps": True},
    "linux-epyc": {"bf16": "avx512"}, "linux-xeon": {"bf16": "amx"}, "linux-old": {}, "linux-arm": {},
    "windows-zen4": {"bf16": "avx512", "compiler": NO_MSVC}, "windows-old": {"compiler": NO_MSVC},
    "mac-intel": {},
}
# compile: on, off (tried, did not work, one line), or never (one line, and not tried)
TABLE = """
machine                 wanted    device  dtype     scaler  compile
linux-v100              auto      cuda    float16   yes     on
linux-v100              float32   cuda    float32   no      on
linux-v100              bfloat16  error   try --dtype=float16
linux-t4                auto      cuda    float16   yes     on
linux-t4                float16   cuda    float16   yes     on
linux-t4                bfloat16  error   try --dtype=float16
linux-a100              auto      cuda    bfloat16  no      on
linux-a100              float32   cuda    float32   no      on
linux-a100              bfloat16  cuda    bfloat16  no      on
linux-a100              float16   cuda    float16   yes     on
linux-h200              auto      cuda    bfloat16  no      on
linux-rtx5090           auto      cuda    bfloat16  no      on
linux-rtx5090           float16   cuda    float16   yes     on
linux-mi300x            auto      cuda    bfloat16  no      on
linux-mi300x            float32   cuda    float32   no      on
linux-mi300x            float16   cuda    float16   yes     on
windows-gtx1660         auto      cuda    float16   yes     off
windows-gtx1660         bfloat16  error   try --dtype=float16
windows-rtx4050         auto      cuda    bfloat16  no      off
windows-rtx4050         float32   cuda    float32   no      off
windows-rtx4050         float16   cuda    float16   yes     off
windows-rtx4050-triton  auto      cuda    bfloat16  no      on
mac-m3                  auto      mps     float32   no      never
mac-m3                  float32   mps     float32   no      never
mac-m3                  bfloat16  mps     bfloat16  no      never
mac-m3                  float16   mps     float16   yes     never
linux-epyc              auto      cpu     bfloat16  no      on
linux-epyc              float32   cpu     float32   no      on
linux-epyc              bfloat16  cpu     bfloat16  no      on
linux-epyc              float16   cpu     float16   yes     on
linux-xeon              auto      cpu     bfloat16  no      on
linux-old               auto      cpu     float32   no      on
linux-old               bfloat16  cpu     bfloat16  no      on
linux-arm               auto      cpu     float32   no      on
linux-arm               float16   cpu     float16   yes     on
windows-zen4            auto      cpu     bfloat16  no      off
windows-old             auto      cpu     float32   no      off
mac-intel               auto      cpu     float32   no      on
mac-intel               half      error   wanted auto, float32
"""
ROWS = [line.split(maxsplit=3) for line in TABLE.strip().splitlines()[1:]]


def fake_machine(monkeypatch, name, sm=0, hip=None, mps=False, bf16="", compiler=None, count=2):
    """Make torch and the system report what they do on that machine; its tensors stay on the CPU. Returns two
    lists: the functions that torch.compile is called with, and the precisions set for float32 products."""
    precision = []
    if not name.startswith("linux"):
        def no_library(name):
            raise OSError(f"{name}: not found")

        monkeypatch.setattr(device_module.ctypes, "CDLL", no_library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sm > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count if sm else 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(sm, 10))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=sm // 10))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)  # old cards emulate
    monkeypatch.setattr(torch.version, "cuda", "13.0" if sm and not hip else None)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16 == "avx512")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bf16 == "amx")
    monkeypatch.setattr(device_module.shutil, "which", lambda command: None)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda n, device: ones(n))
    # settings of the process: recorded, not made
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setattr(device_module, "sdpa_kernel", lambda order, set_priority: contextlib.nullcontext())
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precision.append)
    tried = []

    def compile(function):
        tried.append(function)
        if compiler is None:
            return function

        def compiled(x):
            raise RuntimeError(compiler)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    return tried, precision


@pytest.mark.parametrize(("machine", "wanted", "device", "rest"), ROWS,
                         ids=[f"{row[0]}-{row[1]}" for row in ROWS])
def test_table_of_platforms(monkeypatch, capsys, machine, wanted, device, rest):
    tried, precision = fake_machine(monkeypatch, machine, **MACHINES[machine])
    if device == "error":
        with pytest.raises(UserError, match=rest):
            resolve_device("auto", wanted, compile=True)
        return
    dtype, scaler, compile = rest.split()
    dev = resolve_device("auto", wanted, compile=True)
    assert dev.type == device and dev.dtype == getattr(torch, dtype) and dev.name
    autocast, grad_scaler = dev.autocast(), dev.grad_scaler()
    assert (autocast.device, autocast._enabled) == (device, dtype != "float32")
    assert dtype == "float32" or autocast.fast_dtype == dev.dtype
    assert (grad_scaler._device, grad_scaler.is_enabled()) == (device, scaler == "yes")
    assert precision == ([] if device != "cuda" else ["highest"] if dtype == "float32" else ["high"])
    assert dev.compile == (compile == "on") and bool(tried) == (compile != "never")
    out = capsys.readouterr().out
    if compile == "on":
        assert out == ""
    else:
        assert out.count("\n") == 1 and out.startswith("compile: off, ")
        assert ("#191976" if compile == "never" else MACHINES[machine]["compiler"].splitlines()[0]) in out


@pytest.mark.parametrize(("sm", "attention", "kernels"), [
    (90, "auto", ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]),
    (90, "flash", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]), (80, "math", ["MATH"]),
    (80, "auto", None), (120, "auto", None)])
def test_attention_and_memory_on_cuda(monkeypatch, sm, attention, kernels):
    """The named kernel is tried first, then those after it, and compiled code is cached for it alone; the
    user's own allocator settings stay."""
    orders = []
    fake_machine(monkeypatch, "linux", sm=sm)
    monkeypatch.setattr(device_module, "sdpa_kernel", lambda order, set_priority: orders.append(
        (order, set_priority)) or contextlib.nullcontext())
    resolve_device("cuda", attention=attention)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    found = [([kernel.name for kernel in order], priority) for order, priority in orders]
    assert found == ([(kernels, True)] if kernels else [])
    assert torch.compiler.config.cache_key_tag == f"{attention} bfloat16"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:128")
    resolve_device("cuda")
    assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:128"
    orders.clear()
    assert resolve_device("cpu", attention=attention).type == "cpu" and not orders


def test_which_gpu(monkeypatch, capsys):
    """Only the first process prints."""
    fake_machine(monkeypatch, "windows", sm=89, compiler=NO_TRITON)
    dev = resolve_device("auto", compile=True, local_rank=1)
    assert dev.device == torch.device("cuda", 1) and not dev.compile and capsys.readouterr().out == ""
    assert resolve_device("cuda:0").device == torch.device("cuda", 0)
    with pytest.raises(UserError, match="GPU 5, but torch sees 2"):
        resolve_device("cuda:5")


def test_cpu_computes_in_the_dtype_it_claims():
    for dtype in device_module.DTYPES.values():
        with resolve_device("cpu", str(dtype).removeprefix("torch.")).autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_no_driver_and_no_cuda_in_torch(monkeypatch, capsys):
    fake_machine(monkeypatch, "linux")
    with pytest.raises(UserError, match="is built without CUDA; try --device=cpu"):
        resolve_device("cuda")
    monkeypatch.setattr(device_module.shutil, "which", lambda command: f"/usr/bin/{command}")
    assert resolve_device("auto").type == "cpu" == resolve_device("auto", local_rank=1).type
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "the GPU is not used" in out and "built without CUDA" in out
    for vendor in ("cuda", "hip"):
        with monkeypatch.context() as context:
            context.setattr(torch.version, vendor, "7.0")
            assert resolve_device("auto").type == "cpu" and capsys.readouterr().out == ""
            with pytest.raises(UserError, match="finds no GPU with a driver"):
                resolve_device("cuda")


def test_peak_is_known_or_none():
    for dtype, name, peak in [(torch.bfloat16, "NVIDIA H200", 989.4), (torch.float32, "NVIDIA H200", None),
                              (torch.bfloat16, "NVIDIA H2000", None), (torch.float32, "AMD EPYC", None),
                              (torch.float16, "Tesla T4", 65.0), (torch.bfloat16, "Tesla T4", None)]:
        assert Device(torch.device("cpu"), dtype, False, name).peak_tflops() == peak


# Other figures that NVIDIA publishes: float32 TFLOP/s, half the dense 16-bit rate, and "AI TOPS", which are
# sparse FP8 with float16 accumulation on Ada, 8 times that rate, and sparse FP4 on Blackwell, 16 times.
PUBLISHED_FLOAT32 = {"3050": 9.1, "3060": 12.7, "3060 Ti": 16.2, "3070": 20.3, "3070 Ti": 21.7, "3080": 29.8,
                     "3080 Ti": 34.1, "3090": 35.6, "3090 Ti": 40.0, "4090": 82.6, "5090": 104.8}
AI_TOPS_ADA = {"4050 Laptop GPU": 194, "4060 Laptop GPU": 233, "4070 Laptop GPU": 321, "4080 Laptop GPU": 542,
               "4060": 242, "4060 Ti": 353, "4070": 466, "4070 SUPER": 568, "4070 Ti": 641,
               "4070 Ti SUPER": 706, "4080": 780, "4080 SUPER": 836, "4090": 1321}
AI_TOPS_BLACKWELL = {"5060": 614, "5060 Ti": 759, "5070": 988, "5070 Ti": 1406, "5080": 1801, "5090": 3352}


def test_geforce_peaks_follow_from_other_published_figures():
    checked = set()
    for published, factor in [(PUBLISHED_FLOAT32, 0.5), (AI_TOPS_ADA, 8), (AI_TOPS_BLACKWELL, 16)]:
        for card, figure in published.items():
            name = f"NVIDIA GeForce RTX {card}"
            assert peak_tflops(name, torch.bfloat16) * factor == pytest.approx(figure, rel=0.005), name
            checked.add(name)
    assert checked == {name for name in PEAK_TFLOPS if "GeForce" in name}


def test_compile_that_computes_something_else_is_off(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: x * 3)
    assert not resolve_device("cpu", compile=True).compile
    out = capsys.readouterr().out
    assert out == "compile: off, torch.compile does not work here (a trial gave wrong numbers)\n"


def test_compile_works_here(capsys):
    assert resolve_device("cpu", compile=True).compile
    assert capsys.readouterr().out == ""


@pytest.fixture
def reproducible_again(monkeypatch):
    """Undoes what a process otherwise keeps."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with torch._inductor.config.patch(deterministic=False):
        yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_deterministic_sets_every_switch(reproducible_again):
    resolve_device("cpu")
    assert not torch.are_deterministic_algorithms_enabled() and not torch._inductor.config.deterministic
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    precision = torch.get_float32_matmul_precision()
    resolve_device("cpu", deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and torch._inductor.config.deterministic
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize(("device", "dtype", "words"), [
    ("tpu", "auto", "wanted auto, cpu"), ("cuda:x", "auto", "wanted auto, cpu"),
    ("mps", "auto", "--device=cpu"), ("cpu", "half", "wanted auto, float32")])
def test_what_is_not_there(device, dtype, words):
    with pytest.raises(UserError, match=words):
        resolve_device(device, dtype)


TWO_EQUAL_RUNS = """
import torch
from device import resolve_device
from model import GPT, GPTConfig
dev = resolve_device("cuda", deterministic=True, compile={compile})
gradients = []
for _ in range(2):
    torch.manual_seed(0)
    config = GPTConfig(block_size=128, vocab_size=512, n_vocab=500, n_layer=2, n_head=4, n_embd=256,
                       dropout=0.1)
    model = GPT(config).to(dev.device)
    step = torch.compile(model, dynamic=False) if dev.compile else model
    idx = torch.randint(500, (8, 128), device=dev.device)
    with dev.autocast():
        step(idx, idx.roll(-1, 1)).backward()
    gradients.append([p.grad.clone() for p in model.parameters()])
print(all(torch.equal(a, b) for a, b in zip(*gradients)))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_deterministic_gradients_on_cuda(compile):
    out = subprocess.run([sys.executable, "-c", TWO_EQUAL_RUNS.format(compile=compile)], cwd=ROOT,
                         capture_output=True, text=True, timeout=300)
    assert out.stdout.split() == ["True"], out.stdout + out.stderr


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])])
def test_to_device_keeps_values(device):
    dev = resolve_device("auto" if device == "cuda" else device)
    assert dev.type == device and (device == "cpu" or dev.dtype != torch.float32)
    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    assert torch.equal(dev.to_device(array).cpu(), torch.arange(6).view(2, 3))


def test_memory_is_refused_only_where_it_is_certainly_too_little(monkeypatch):
    """What is computed may be 25% too high."""
    monkeypatch.setattr(Device, "total_memory", lambda self: 1000)
    cpu = resolve_device("cpu", "float32")
    watch_memory(cpu, 1240, "--batch_size=1")
    with pytest.raises(UserError, match=r"of memory \(computed\), .*; type --batch_size=1; "):
        watch_memory(cpu, 1260, "--batch_size=1")
