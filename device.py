"""
Decides where and how to compute: device, dtype, autocast, loss scaler, pinned memory,
compile. And checks that the device computes the right thing.

    dev = resolve_device("auto", "auto", compile=True)
    for failure in self_test(model, dev): ...  # what this device gets wrong
    with dev.autocast():
        loss = model(x, y)

Importing it touches no hardware. It prints a line only when something that was expected is not used.
"""

import contextlib
import ctypes
import math
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from configurator import UserError
from kernels import cpu_has_bfloat16

_for_this_process = contextlib.ExitStack()  # never closed
# kernels for scaled_dot_product_attention on CUDA; the first one that supports the inputs is used
ATTENTION = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
             "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# How far attention may be from its definition, relative to its size: four roundings of the dtype, for float32
# of TF32, which a user may have allowed. One token too many or a wrong scale is far beyond that.
TOLERANCE = {torch.float32: 4e-3, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# Dense peaks in TFLOP/s of 16-bit matrix products that accumulate in float32, by the driver's name of a card.
# From the vendors' data sheets and architecture papers: half of a figure "with sparsity", a quarter for Ada
# workstation cards, whose figure is FP8 besides. GeForce: 4 FLOPs per CUDA core and clock, at the boost clock
# of the product page (white papers: 71 for the RTX 3090, 165.2 for the 4090, 209.5 for the 5090). A laptop
# GPU reaches its boost clock only at its highest power limit.
PEAK_TFLOPS = {
    "NVIDIA B200": 2250.0, "NVIDIA GH200 480GB": 989.4, "NVIDIA H200": 989.4, "NVIDIA H200 NVL": 835.5,
    "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H100 NVL": 835.5, "NVIDIA H100 PCIe": 756.4,
    "NVIDIA A100-SXM4-40GB": 312.0, "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0, "NVIDIA A40": 149.7, "NVIDIA A10": 125.0, "NVIDIA A10G": 70.0,
    "NVIDIA L40S": 362.05, "NVIDIA L40": 181.05, "NVIDIA L4": 121.0,
    "NVIDIA RTX 6000 Ada Generation": 364.2, "NVIDIA RTX 5000 Ada Generation": 261.1,
    "NVIDIA RTX 4500 Ada Generation": 158.5, "NVIDIA RTX 4000 Ada Generation": 106.9,
    "NVIDIA RTX 2000 Ada Generation": 48.0, "NVIDIA RTX A6000": 154.8, "NVIDIA RTX A5000": 111.1,
    "NVIDIA RTX A4500": 94.6, "NVIDIA RTX A4000": 76.7, "NVIDIA RTX A2000": 31.9,
    "NVIDIA RTX A2000 12GB": 31.9,
    "AMD Instinct MI300X": 1307.4, "AMD Instinct MI250X": 191.5,  # of one die: torch sees two devices
    # no bfloat16 units; P100 has no tensor cores either, and accumulates in float16
    "Tesla V100-SXM2-16GB": 125.0, "Tesla V100-SXM2-32GB": 125.0, "Tesla V100-PCIE-16GB": 112.0,
    "Tesla V100-PCIE-32GB": 112.0, "Tesla T4": 65.0, "Tesla P100-SXM2-16GB": 21.2,
    "Tesla P100-PCIE-16GB": 18.7,
    "NVIDIA GeForce RTX 3050": 18.19648, "NVIDIA GeForce RTX 3060": 25.475072,  # of 8 GB; of 12 GB
    "NVIDIA GeForce RTX 3060 Ti": 32.39424, "NVIDIA GeForce RTX 3070": 40.6272,
    "NVIDIA GeForce RTX 3070 Ti": 43.49952, "NVIDIA GeForce RTX 3080": 59.53536,  # of 10 GB
    "NVIDIA GeForce RTX 3080 Ti": 68.1984, "NVIDIA GeForce RTX 3090": 71.16288,
    "NVIDIA GeForce RTX 3090 Ti": 79.99488, "NVIDIA GeForce RTX 4050 Laptop GPU": 24.2688,
    "NVIDIA GeForce RTX 4060 Laptop GPU": 29.12256, "NVIDIA GeForce RTX 4070 Laptop GPU": 40.0896,
    "NVIDIA GeForce RTX 4080 Laptop GPU": 67.70688, "NVIDIA GeForce RTX 4060": 30.22848,
    "NVIDIA GeForce RTX 4060 Ti": 44.12928, "NVIDIA GeForce RTX 4070": 58.2912,
    "NVIDIA GeForce RTX 4070 SUPER": 70.9632, "NVIDIA GeForce RTX 4070 Ti": 80.1792,
    "NVIDIA GeForce RTX 4070 Ti SUPER": 88.19712, "NVIDIA GeForce RTX 4080": 97.47456,
    "NVIDIA GeForce RTX 4080 SUPER": 104.448, "NVIDIA GeForce RTX 4090": 165.15072,
    "NVIDIA GeForce RTX 5060": 38.35392, "NVIDIA GeForce RTX 5060 Ti": 47.407104,
    "NVIDIA GeForce RTX 5070": 61.734912, "NVIDIA GeForce RTX 5070 Ti": 87.87968,
    "NVIDIA GeForce RTX 5080": 112.551936, "NVIDIA GeForce RTX 5090": 209.50528,
}


def peak_tflops(name: str, dtype: torch.dtype) -> float | None:
    """Dense peak in TFLOP/s of a card for matrix products of `dtype`; None if unknown, as in float32."""
    no_units = dtype == torch.float32 or (dtype == torch.bfloat16 and name.startswith("Tesla"))
    return None if no_units else PEAK_TFLOPS.get(name)


@dataclass(frozen=True)
class Device:
    """What `resolve_device` found; whatever differs between devices is asked of this object."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; weights stay float32
    compile: bool  # asked for, and it works here
    name: str  # "NVIDIA H200", "AMD EPYC", ...

    @property
    def type(self) -> str:
        return self.device.type

    @property
    def loss_chunk(self) -> int:
        """The fastest GPT.loss_chunk here: rows of logits at a time, 0 for all."""
        return 1024 if self.type == "cpu" else 0

    def autocast(self):
        return torch.autocast(self.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def changing_shapes(self):
        """Around attention whose shapes change from call to call: cuDNN would plan each of them anew."""
        if self.type != "cuda":
            return contextlib.nullcontext()
        return sdpa_kernel([kernel for name, kernel in ATTENTION.items() if name != "cudnn"])

    def grad_scaler(self):
        """float16 underflows without loss scaling; for other dtypes the scaler changes nothing."""
        return torch.amp.GradScaler(self.type, enabled=self.dtype == torch.float16)

    def to_device(self, array) -> torch.Tensor:
        """A numpy array as a tensor on the device; on CUDA the copy overlaps with computation."""
        tensor = torch.from_numpy(array)
        if self.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def use(self) -> None:
        """Make this the current device of the calling thread; a new thread starts with the first GPU."""
        if self.type == "cuda":
            torch.cuda.set_device(self.device)

    def synchronize(self) -> None:
        """Wait for queued work, before a clock is read."""
        if self.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.type == "mps":
            torch.mps.synchronize()

    def peak_memory(self) -> int | None:
        """The most bytes this process has held, on the GPU or in main memory; None if unknown."""
        if self.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        if self.type == "mps":
            return torch.mps.driver_allocated_memory()
        try:
            import resource  # not on Windows
        except ImportError:
            return None
        unit = 1 if platform.system() == "Darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def total_memory(self) -> int | None:
        """Bytes of the GPU's memory, or of the machine's; None if unknown."""
        if self.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        if not hasattr(os, "sysconf"):
            return None
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def peak_tflops(self) -> float | None:
        return peak_tflops(self.name, self.dtype)


def resolve_device(device: str = "auto", dtype: str = "auto", compile: bool = False, local_rank: int = 0,
                   deterministic: bool = False, attention: str = "") -> Device:
    """Device for `device` (auto|cpu|cuda|cuda:N|mps) and `dtype` (auto|float32|bfloat16|float16).

    `local_rank` picks the GPU of a process under torchrun; only 0 prints. auto dtype: bfloat16 where the
    hardware multiplies it, float16 on older CUDA cards, float32 on MPS, whose 16-bit attention has leaked
    future tokens (pytorch #195910), and on other CPUs. A CPU takes any dtype, even one that is slow there, so
    that a GPU's path can be tried without one. torch calls ROCm devices "cuda", and so does this file.

    `attention` (one of ATTENTION, or auto: cuDNN's on Hopper) is tried first on CUDA, then those after it in
    ATTENTION; "" keeps torch's own order. `deterministic` and `attention` hold for the process: call this
    before anything else computes.

    Raises UserError if the device or dtype is unknown or not available, or if it is bfloat16 on a CUDA card
    that would emulate it.
    """
    if deterministic:
        _be_deterministic()
    if device == "auto":
        device = _best_device(local_rank)
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise UserError(f"device={device!r}: wanted auto, cpu, cuda, cuda:1 or mps")
    resolved = torch.device(device)
    if resolved.type == "cuda":
        resolved = _use_gpu(device, local_rank if resolved.index is None else resolved.index, attention)
        name = torch.cuda.get_device_name(resolved)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if dtype == "bfloat16" and not has_bf16:
            raise UserError(f"dtype=bfloat16: {name} has no bfloat16 units, and emulates them more slowly "
                            f"than it computes in float32; try --dtype=float16")
        auto_dtype = "bfloat16" if has_bf16 else "float16"
    elif resolved.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device=mps: this torch sees no MPS device; try --device=cpu")
        name, auto_dtype = f"Apple {platform.machine()}", "float32"
    else:
        _keep_freed_memory()
        name = _cpu_name()
        auto_dtype = "bfloat16" if cpu_has_bfloat16() else "float32"
    dtype = auto_dtype if dtype == "auto" else dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: wanted auto, {', '.join(DTYPES)}")
    if resolved.type == "cuda":  # TF32 for what autocast leaves in float32, but not if float32 was wanted
        torch.set_float32_matmul_precision("highest" if dtype == "float32" else "high")
        # torch's cache of compiled code ignores both
        torch.compiler.config.cache_key_tag = f"{attention} {dtype}"

    reason = _why_not_compile(resolved) if compile else None
    if reason and local_rank == 0:
        print(f"compile: off, torch.compile does not work here ({reason})", flush=True)
    return Device(resolved, DTYPES[dtype], compile and not reason, name)


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: torch's words for it differ from device to device."""
    words = ("out of memory|not enough memory|can't allocate memory|ALLOC_FAILED|"
             "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or re.search(words, str(error)) is not None


def watch_memory(dev: Device, needed: int, advice: str) -> None:
    """From now on, running out of memory ends the script with a line that says what to type: `advice`.

    Linux kills a process that fills main memory, without a message. So on a CPU this raises UserError at
    once if `needed` bytes, computed and up to 25% too high, are certainly more than the machine has.
    """
    previous_hook = sys.excepthook  # configurator's
    advice += "; analyze_compute.py computes what a setting needs, --dry_run measures it"
    total = dev.total_memory()
    if dev.type == "cpu" and total and needed > 1.25 * total:
        raise UserError(f"training needs {needed / 1e9:,.1f} GB of memory (computed), and {dev.name} has "
                        f"{total / 1e9:,.1f} GB; type {advice}")

    def explain(kind, error, trace):
        if is_out_of_memory(error):
            error = UserError(f"out of memory on {dev.name}; type {advice}")
        previous_hook(type(error), error, trace)

    sys.excepthook = explain


def _best_device(local_rank):
    """What `auto` means. Prints a line if a GPU is there that cannot be used."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    if local_rank == 0 and not _built_for_gpus() and shutil.which("nvidia-smi"):
        print(f"device: cpu, the GPU is not used: torch {torch.__version__} is built without CUDA; "
              f"install it as pytorch.org/get-started says", flush=True)
    return "cpu"


def _built_for_gpus():
    return torch.version.cuda is not None or torch.version.hip is not None


def _use_gpu(device, index, attention):
    """GPU number `index`, made the current one, with `attention` as the kernel to try first."""
    count = torch.cuda.device_count()
    if count == 0:
        reason = "finds no GPU with a driver" if _built_for_gpus() else "is built without CUDA"
        raise UserError(f"device={device}: torch {torch.__version__} {reason}; try --device=cpu, or install "
                        f"the GPU's driver, and torch as pytorch.org/get-started says")
    if index >= count:
        raise UserError(f"device={device}: wanted GPU {index}, but torch sees {count}; try --device=cpu, or "
                        f"torchrun with at most {count} processes")
    resolved = torch.device("cuda", index)
    if platform.system() == "Linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # less fragmentation
    torch.cuda.set_device(resolved)
    hopper = torch.cuda.get_device_capability(resolved)[0] == 9 and torch.version.hip is None  # or AMD's gfx9
    attention = "cudnn" if attention == "auto" and hopper else attention
    if attention in ATTENTION:
        # on Hopper torch sets its own order, that of ATTENTION, at the first call: so what comes before the
        # named kernel is switched off
        kernels = list(ATTENTION.values())
        first = kernels.index(ATTENTION[attention])
        _for_this_process.enter_context(sdpa_kernel(kernels[first:], set_priority=True))
    return resolved


def _be_deterministic():
    """Only kernels that give the same bits every time, and none that is chosen by timing.

    torch raises a RuntimeError that names the operation if it has no such kernel.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
    import torch._inductor.config  # takes a second
    torch._inductor.config.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # slow, and nothing here reads such memory


def _keep_freed_memory():
    """Let torch reuse the memory of large tensors from step to step; no effect unless libc is glibc.

    By default glibc returns every large freed buffer to the system, and the next step waits for zeroed pages
    of 4 kB again: hundreds of MB for the logits alone.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for 2 MB pages for large tensors
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large buffers
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def _why_not_compile(device):
    """A line on why torch.compile does not work here; None if it does. Only a trial shows whether there is a
    working compiler."""
    if device.type == "mps":  # a trial passes there
        return "on MPS it silently computes a wrong LayerNorm: pytorch #191976"
    try:
        twice = torch.compile(lambda x: x * 2)
        if not (twice(torch.ones(8, device=device)) == 2).all():
            return "a trial gave wrong numbers"
    except Exception as error:  # the compiler stack raises anything from ImportError to CalledProcessError
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
    return None


def _cpu_name():
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    return platform.processor() or platform.machine()


def self_test(model, dev: Device, attention=F.scaled_dot_product_attention) -> list[str]:
    """What `dev` gets wrong about `model`, a sentence each; [] for a healthy device.

    `model(idx)` gives logits (B, T, n_vocab) and has a `config` of n_vocab, block_size, n_head and n_embd;
    `attention` is what it calls, with the signature of F.scaled_dot_product_attention. Everything is tried
    with autograd, as in training, and without, as in evaluation: the kernels differ. Takes less than a second
    for 124M on a CPU. The model, its gradients and torch's global generators do not change.
    """
    return _test_causality(model, dev) + _test_attention(model.config, dev, attention)


def check_first_loss(loss: float, n_vocab: int, n_embd: int) -> str:
    """What is wrong with the loss of a new Pre-LN model; "" within 1 nat of the expected loss.

    A model that knows nothing gives every id nearly the same probability. Its loss is ln(n_vocab) plus half
    the variance of its logits, each a dot product of n_embd numbers of size 1 with as many of size 0.02. (A
    wide Post-LN model starts higher, because its output is still the embedding of its input.)
    """
    expected = math.log(n_vocab) + 0.5 * 0.02**2 * n_embd
    if abs(loss - expected) < 1:
        return ""
    return (f"the loss before the first step is {loss:.2f}, wanted about {expected:.2f}, ln({n_vocab}) and a "
            f"little more")


def _test_causality(model, dev):
    """Changing tokens from some position on must not change the logits before it."""
    n_vocab, T = model.config.n_vocab, min(model.config.block_size, 32)
    idx = torch.randint(n_vocab, (1, T), generator=torch.Generator().manual_seed(0))
    was_training, failures = model.training, []
    model.eval()
    try:
        for grad in (True, False):
            with torch.set_grad_enabled(grad), dev.autocast():
                before = model(idx.to(dev.device)).detach().float()  # (1, T, n_vocab)
                for start in (T - 1, T // 2):
                    changed = idx.clone()
                    changed[:, start:] = (changed[:, start:] + 1) % n_vocab
                    after = model(changed.to(dev.device)).detach().float()  # (1, T, n_vocab)
                    change = _rms((after - before)[:, :start], dim=(0, 2))  # (start,)
                    # kernels may rescale a softmax for a tile of rows at a time, so that a row may round
                    # differently when another changes; a leak is well above one rounding
                    if not (change <= torch.finfo(dev.dtype).eps * _rms(before)).all():
                        failures.append(
                            f"{_mode(grad)}, tokens from {start} on change the logits before them, at "
                            f"{change.argmax()} by {change.max():.2g} where logits are {_rms(before):.2g}")
    finally:
        model.train(was_training)
    return failures


def _test_attention(config, dev, attention):
    """Causal attention and its gradients must match the definition, computed in float64 on the CPU."""
    B, T, C, nh = 2, max(2, min(config.block_size, 256)), config.n_embd, config.n_head
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, 3 * C, generator=generator).to(dev.dtype)
    dy = torch.randn(B, nh, T, C // nh, generator=generator).to(dev.dtype)

    def run(attention, x, dy):
        """Output and gradients of q, k, v, all (B, nh, T, hs), from x (B, T, 3C), split as the model does."""
        x = x.requires_grad_()
        q, k, v = (part.view(B, T, nh, -1).transpose(1, 2) for part in x.split(C, dim=2))
        y = attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        with torch.no_grad():
            y_without_grad = attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        gradients = torch.autograd.grad(y, (q, k, v), dy)
        return [tensor.detach().cpu().double() for tensor in (y, y_without_grad, *gradients)]

    wanted = run(_attention_by_definition, x.double(), dy.double())
    with dev.autocast():
        got = run(attention, x.to(dev.device), dy.to(dev.device))
    failures = []
    names = (_mode(True), _mode(False), "the gradient of q", "the gradient of k", "the gradient of v")
    for name, ours, exact in zip(names, got, wanted):
        error, size = _rms(ours - exact, dim=(0, 1, 3)), _rms(exact, dim=(0, 1, 3))  # (T,)
        error = error / size.clamp(min=0.1 * _rms(exact))  # the first query's gradient is 0
        if not (error <= TOLERANCE[dev.dtype]).all():
            failures.append(f"attention differs from its definition, {name}: by {error.max():.2g} of its "
                            f"size at position {error.argmax()}, wanted at most {TOLERANCE[dev.dtype]}")
    return failures


def _attention_by_definition(q, k, v, attn_mask, dropout_p, is_causal):
    """softmax(q k^T / sqrt(hs)) v over the past; Vaswani et al. 2017, section 3.2.1."""
    T, hs = q.shape[2:]
    scores = q @ k.mT / math.sqrt(hs)  # (B, nh, T, T)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return F.softmax(scores.masked_fill(future, -math.inf), dim=-1) @ v  # (B, nh, T, hs)


def _mode(grad):
    return "with autograd" if grad else "without autograd"


def _rms(x, dim=None):
    return x.pow(2).mean(dim).sqrt()
