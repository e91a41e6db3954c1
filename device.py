"""
The one place that decides where and how to compute: device, dtype, autocast, loss scaler, fused optimizer,
pinned memory, compile. And the one that checks that what was decided computes the right thing.

    dev = resolve_device("auto", "auto", compile=True)
    for sentence in self_test(model, dev): ...  # what this device gets wrong
    with dev.autocast():
        loss = model(x, y)

Nothing is asked of the hardware before `resolve_device` is called, so that flags are read first. What a
device can do is found out by doing it on a toy, not from its name or from the operating system. Prints a line
only where something is off that could have been expected on.
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

_for_this_process = contextlib.ExitStack()  # never closed
# what scaled_dot_product_attention may use on CUDA; the first that can do it is taken
ATTENTION = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
             "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# How far attention may be from its definition, relative to its size: four roundings of the dtype, for float32
# of TF32, which a user may have allowed. A token too many or a wrong scale is far beyond.
TOLERANCE = {torch.float32: 4e-3, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# By the name that the driver reports: dense peaks in TFLOP/s of float32, bfloat16 and float16 matrix products
# that accumulate in float32, from the vendor's data sheets and architecture papers; half of what is printed
# where that is "with sparsity", a quarter for Ada workstation cards, whose figure is FP8 besides. float32 is
# the rate without TF32, which resolve_device leaves off for it.
PEAK_TFLOPS = {
    "NVIDIA B200": (75.0, 2250.0, 2250.0),
    "NVIDIA GH200 480GB": (66.9, 989.4, 989.4),
    "NVIDIA H200": (66.9, 989.4, 989.4),
    "NVIDIA H200 NVL": (60.0, 835.5, 835.5),
    "NVIDIA H100 80GB HBM3": (66.9, 989.4, 989.4),
    "NVIDIA H100 NVL": (60.0, 835.5, 835.5),
    "NVIDIA H100 PCIe": (51.2, 756.4, 756.4),
    "NVIDIA A100-SXM4-40GB": (19.5, 312.0, 312.0),
    "NVIDIA A100-SXM4-80GB": (19.5, 312.0, 312.0),
    "NVIDIA A100-PCIE-40GB": (19.5, 312.0, 312.0),
    "NVIDIA A100 80GB PCIe": (19.5, 312.0, 312.0),
    "NVIDIA A40": (37.4, 149.7, 149.7),
    "NVIDIA A10": (31.2, 125.0, 125.0),
    "NVIDIA A10G": (35.0, 70.0, 70.0),
    "NVIDIA L40S": (91.6, 362.05, 362.05),
    "NVIDIA L40": (90.5, 181.05, 181.05),
    "NVIDIA L4": (30.3, 121.0, 121.0),
    "NVIDIA RTX 6000 Ada Generation": (91.1, 364.2, 364.2),
    "NVIDIA RTX 5000 Ada Generation": (65.3, 261.1, 261.1),
    "NVIDIA RTX 4500 Ada Generation": (39.6, 158.5, 158.5),
    "NVIDIA RTX 4000 Ada Generation": (26.7, 106.9, 106.9),
    "NVIDIA RTX 2000 Ada Generation": (12.0, 48.0, 48.0),
    "NVIDIA RTX A6000": (38.7, 154.8, 154.8),
    "NVIDIA RTX A5000": (27.8, 111.1, 111.1),
    "NVIDIA RTX A4500": (23.7, 94.6, 94.6),
    "NVIDIA RTX A4000": (19.2, 76.7, 76.7),
    "NVIDIA RTX A2000": (8.0, 31.9, 31.9),
    "NVIDIA RTX A2000 12GB": (8.0, 31.9, 31.9),
    # no bfloat16 units; P100 has no tensor cores either, and its float16 accumulates in float16
    "Tesla V100-SXM2-16GB": (15.7, None, 125.0),
    "Tesla V100-SXM2-32GB": (15.7, None, 125.0),
    "Tesla V100-PCIE-16GB": (14.0, None, 112.0),
    "Tesla V100-PCIE-32GB": (14.0, None, 112.0),
    "Tesla T4": (8.1, None, 65.0),
    "Tesla P100-SXM2-16GB": (10.6, None, 21.2),
    "Tesla P100-PCIE-16GB": (9.3, None, 18.7),
    "AMD Instinct MI300X": (163.4, 1307.4, 1307.4),
    "AMD Instinct MI250X": (47.9, 191.5, 191.5),  # half the card: torch sees its two dies as two devices
}

# GeForce cards: CUDA cores and boost clock in MHz, from the product pages. A core makes 2 float32 FLOPs per
# clock; the tensor cores beside it make twice that in 16 bit when they accumulate in float32, in all three of
# these generations (white papers: 35.6 and 71 for the RTX 3090, 82.6 and 165.2 for the 4090, 104.8 and 209.5
# for the 5090). Of a laptop's range it is the highest clock, which it reaches only with the power for it.
GEFORCE = {
    "NVIDIA GeForce RTX 3050": (2560, 1777),  # the 8 GB card
    "NVIDIA GeForce RTX 3060": (3584, 1777),
    "NVIDIA GeForce RTX 3060 Ti": (4864, 1665),
    "NVIDIA GeForce RTX 3070": (5888, 1725),
    "NVIDIA GeForce RTX 3070 Ti": (6144, 1770),
    "NVIDIA GeForce RTX 3080": (8704, 1710),  # the 10 GB card
    "NVIDIA GeForce RTX 3080 Ti": (10240, 1665),
    "NVIDIA GeForce RTX 3090": (10496, 1695),
    "NVIDIA GeForce RTX 3090 Ti": (10752, 1860),
    "NVIDIA GeForce RTX 4050 Laptop GPU": (2560, 2370),
    "NVIDIA GeForce RTX 4060 Laptop GPU": (3072, 2370),
    "NVIDIA GeForce RTX 4070 Laptop GPU": (4608, 2175),
    "NVIDIA GeForce RTX 4080 Laptop GPU": (7424, 2280),
    "NVIDIA GeForce RTX 4060": (3072, 2460),
    "NVIDIA GeForce RTX 4060 Ti": (4352, 2535),
    "NVIDIA GeForce RTX 4070": (5888, 2475),
    "NVIDIA GeForce RTX 4070 SUPER": (7168, 2475),
    "NVIDIA GeForce RTX 4070 Ti": (7680, 2610),
    "NVIDIA GeForce RTX 4070 Ti SUPER": (8448, 2610),
    "NVIDIA GeForce RTX 4080": (9728, 2505),
    "NVIDIA GeForce RTX 4080 SUPER": (10240, 2550),
    "NVIDIA GeForce RTX 4090": (16384, 2520),
    "NVIDIA GeForce RTX 5060": (3840, 2497),
    "NVIDIA GeForce RTX 5060 Ti": (4608, 2572),
    "NVIDIA GeForce RTX 5070": (6144, 2512),
    "NVIDIA GeForce RTX 5070 Ti": (8960, 2452),
    "NVIDIA GeForce RTX 5080": (10752, 2617),
    "NVIDIA GeForce RTX 5090": (21760, 2407),
}


def peak_tflops(name: str, dtype: torch.dtype) -> float | None:
    """Dense peak in TFLOP/s of the card that the driver calls `name`, for matrix products of `dtype`.

    None where it is not known, or where the card has no units for that dtype.
    """
    if name in GEFORCE:
        cores, boost_mhz = GEFORCE[name]
        float32 = 2 * cores * boost_mhz / 1e6
        return float32 if dtype == torch.float32 else 2 * float32
    column = (torch.float32, torch.bfloat16, torch.float16).index(dtype)
    return PEAK_TFLOPS[name][column] if name in PEAK_TFLOPS else None


@dataclass
class Device:
    """What `resolve_device` found; everything that differs between devices is asked of this object."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; weights stay float32
    compile: bool  # whether torch.compile works here
    name: str  # "NVIDIA H200", "AMD EPYC", ...

    @property
    def type(self) -> str:
        return self.device.type

    @property
    def fused(self) -> bool:
        """Whether AdamW has a one-pass kernel here."""
        return self.type in ("cuda", "cpu", "mps")

    @property
    def pinned(self) -> bool:
        """Whether batches go through page-locked memory, from which a copy overlaps with computation."""
        return self.type == "cuda"

    @property
    def loss_chunk(self) -> int:
        """GPT.loss_chunk that is fastest here: rows of logits at a time, 0 for all."""
        return 1024 if self.type == "cpu" else 0

    def autocast(self):
        return torch.autocast(self.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def changing_shapes(self):
        """Around attention whose shapes change from call to call: cuDNN would prepare each of them anew."""
        if self.type != "cuda":
            return contextlib.nullcontext()
        return sdpa_kernel([kernel for name, kernel in ATTENTION.items() if name != "cudnn"])

    def grad_scaler(self):
        """float16 underflows without loss scaling; for other dtypes the scaler passes everything through."""
        return torch.amp.GradScaler(self.type, enabled=self.dtype == torch.float16)

    def to_device(self, array) -> torch.Tensor:
        """A numpy array as a tensor there; out of pinned memory without waiting for the copy."""
        tensor = torch.from_numpy(array)
        if self.pinned:
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def use(self) -> None:
        """Make this the device of the calling thread, which is otherwise the first GPU."""
        if self.type == "cuda":
            torch.cuda.set_device(self.device)

    def synchronize(self) -> None:
        """Wait for queued work, before a clock is read."""
        if self.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.type == "mps":
            torch.mps.synchronize()

    def peak_memory(self) -> int | None:
        """The most bytes this process has held, of the GPU or in main memory; None where that is unknown."""
        if self.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        if self.type == "mps":
            return torch.mps.driver_allocated_memory()
        try:
            import resource  # Windows has none
        except ImportError:
            return None
        unit = 1 if platform.system() == "Darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def total_memory(self) -> int | None:
        """Bytes of the GPU's memory, or of the machine's; None where that is unknown."""
        if self.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        if not hasattr(os, "sysconf"):
            return None
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def peak_tflops(self) -> float | None:
        """Dense peak for this device and dtype, or None where it is not known."""
        return peak_tflops(self.name, self.dtype)


def resolve_device(device: str = "auto", dtype: str = "auto", compile: bool = False, local_rank: int = 0,
                   deterministic: bool = False, attention: str = "") -> Device:
    """Device for `device` (auto|cpu|cuda|cuda:N|mps) and `dtype` (auto|float32|bfloat16|float16).

    `local_rank` picks the GPU of a process under torchrun; only 0 prints. auto dtype: bfloat16 where the
    hardware multiplies it, float16 on older CUDA cards, float32 on MPS, whose 16-bit attention has leaked
    future tokens (pytorch #195910), and on other CPUs. A CPU takes any dtype that is asked for, also where it
    is slow, so that a GPU's path can be tried without one. ROCm is "cuda" to torch, and so it is here.
    `attention` (one of ATTENTION, or auto: cuDNN's on Hopper) is tried first on CUDA, else torch's own order
    holds. `deterministic` and `attention` hold for the process: call this before anything else computes.

    Raises UserError for a device or dtype that is not there, that this torch has no kernels for, and for
    bfloat16 on a CUDA card that would emulate it.
    """
    if deterministic:
        _be_deterministic()
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() else "cpu")
        if device == "cpu" and not _built_for_gpus() and shutil.which("nvidia-smi") and local_rank == 0:
            print(f"device: cpu, the GPU is not used: torch {torch.__version__} is built without CUDA; "
                  f"pytorch.org/get-started has the one with it", flush=True)
        if device == "cpu" and torch.xpu.is_available() and local_rank == 0:
            print("device: cpu, the Intel GPU is not used: nothing here was tried on one", flush=True)
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device!r}: wanted auto, cpu, cuda, cuda:1 or mps") from error
    if resolved.type == "cuda":
        count = torch.cuda.device_count()
        index = local_rank if resolved.index is None else resolved.index
        if count == 0:
            reason = "finds no GPU with a driver" if _built_for_gpus() else "is built without CUDA"
            raise UserError(f"device={device}: torch {torch.__version__} {reason}; try --device=cpu, or "
                            f"install the GPU's driver and the torch that pytorch.org/get-started has for it")
        if index >= count:
            raise UserError(f"device={device}: wanted GPU {index}, but torch sees {count}; try --device=cpu, "
                            f"or torchrun with at most {count} processes")
        resolved = torch.device("cuda", index)
        if platform.system() == "Linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # less fragmentation
        torch.cuda.set_device(resolved)
        capability = torch.cuda.get_device_capability(resolved)
        if attention == "auto" and capability[0] == 9 and torch.version.hip is None:  # Hopper, not AMD's gfx9
            attention = "cudnn"
        if attention in ATTENTION:
            order = sorted(ATTENTION, key=lambda name: name != attention)
            _for_this_process.enter_context(
                sdpa_kernel([ATTENTION[name] for name in order], set_priority=True))
        name = torch.cuda.get_device_name(resolved)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        auto_dtype = "bfloat16" if has_bf16 else "float16"
        if dtype == "bfloat16" and not has_bf16:
            raise UserError(f"dtype=bfloat16: {name} has no bfloat16 units, and emulates them more slowly "
                            f"than it computes in float32; try --dtype=float16")
    elif resolved.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device=mps: this torch sees no MPS device; try --device=cpu")
        name, auto_dtype = f"Apple {platform.machine()}", "float32"
    elif resolved.type == "cpu":
        _keep_freed_memory()
        name = _cpu_name()
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        auto_dtype = "bfloat16" if has_bf16 else "float32"
    elif resolved.type == "xpu":
        raise UserError(f"device={device}: Intel GPUs are not supported; try --device=cpu")
    else:
        raise UserError(f"device={device!r}: wanted auto, cpu, cuda, cuda:1 or mps")
    dtype = auto_dtype if dtype == "auto" else dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: wanted auto, {', '.join(DTYPES)}")
    if resolved.type == "cuda":  # TF32 for what autocast leaves in float32, and none where float32 was wanted
        torch.set_float32_matmul_precision("highest" if dtype == "float32" else "high")
    dev = Device(resolved, DTYPES[dtype], False, name)
    _require_kernels(dev)
    if compile:
        reason = _why_not_compile(dev.device)
        dev.compile = reason is None
        if reason is not None and local_rank == 0:
            print(f"compile: off, torch.compile does not work here ({reason})", flush=True)
    return dev


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory ran out: torch's words for it differ from device to device."""
    words = ("out of memory|not enough memory|can't allocate memory|ALLOC_FAILED|"
             "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or re.search(words, str(error)) is not None


def explain_out_of_memory(name: str, advice: str) -> None:
    """From now on, running out of memory ends the script with a line that says what to type: `advice`."""
    exit_with_message = sys.excepthook  # configurator's

    def explain(kind, error, trace):
        if is_out_of_memory(error):
            error = UserError(f"out of memory on {name}; type {advice}; analyze_compute.py computes what a "
                              f"setting needs, --dry_run measures it")
        exit_with_message(type(error), error, trace)

    sys.excepthook = explain


def _built_for_gpus():
    return torch.version.cuda is not None or torch.version.hip is not None


def _be_deterministic():
    """Only kernels that give the same bits every time, and no choice of kernel by a stopwatch.

    torch raises a RuntimeError that names the operation where it has no such kernel.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
    import torch._inductor.config  # takes a second
    torch._inductor.config.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time; nothing here reads it unwritten


def _require_kernels(dev):
    """Raise UserError unless this torch computes a toy on this device: a wheel without kernels for a card
    imports, counts the card and allocates on it, and fails at the first launch."""
    try:
        _run_toy(dev)
    except Exception as error:  # RuntimeError mostly; MPS raises TypeError for a dtype it does not know
        if "no kernel image" in str(error):
            major, minor = torch.cuda.get_device_capability(dev.device)
            raise UserError(
                f"device={dev.device}: {dev.name} is sm_{major}{minor}, and torch {torch.__version__} has "
                f"kernels for {', '.join(torch.cuda.get_arch_list())} only; install another build of torch "
                f"from pytorch.org/get-started (an older CUDA for an older card), or try --device=cpu"
            ) from error
        dtype = str(dev.dtype).removeprefix("torch.")
        raise UserError(
            f"device={dev.device}, dtype={dtype}: attention fails on {dev.name} ({_first_line(error)}); "
            f"try --dtype=float32 or --device=cpu") from error


def _run_toy(dev):
    """A matrix product and attention, forward and backward."""
    x = torch.eye(16, device=dev.device).view(1, 1, 16, 16).requires_grad_()
    with dev.autocast():
        y = x @ x
        y = F.scaled_dot_product_attention(y, y, y, is_causal=True)
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    gradient.sum().item()  # a GPU reports what went wrong when it is waited for


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def _keep_freed_memory():
    """Let torch reuse the memory of large tensors from step to step; without effect where libc is not glibc.

    By default glibc hands every large freed buffer back to the system, and the next step waits for zeroed
    pages of 4 kB again: of the logits alone, hundreds of MB.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for 2 MB pages for large tensors
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large buffers
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
    except (OSError, AttributeError):
        pass


def _why_not_compile(device):
    """None where a toy compiles and runs, which is the only way to know that a compiler is there and works;
    else the reason, in a line."""
    if device.type == "mps":  # runs a toy, and then gets a LayerNorm wrong
        return "on MPS it computes wrong values without a word: pytorch #191976"
    try:
        twice = torch.compile(_twice)
        if not (twice(torch.ones(8, device=device)) == 2).all():
            return "a toy came out wrong"
    except Exception as error:  # the compiler stack raises anything from ImportError to CalledProcessError
        return _first_line(error)
    return None


def _twice(x):
    return x * 2


def _cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def self_test(model, dev: Device, attention=F.scaled_dot_product_attention) -> list[str]:
    """What `dev` gets wrong about `model`, a sentence each; an empty list is a healthy device.

    `model(idx)` gives logits (B, T, n_vocab) and has a `config` of n_vocab, block_size, n_head and n_embd;
    `attention` is what it calls, with the signature of F.scaled_dot_product_attention. Everything is tried
    with autograd, as training does, and without, as evaluation does: the kernels differ. Takes less than a
    second for 124M on a CPU; the model, its gradients and torch's global generators stay as they were.
    """
    return _test_causality(model, dev) + _test_attention(model.config, dev, attention)


def check_first_loss(loss: float, n_vocab: int, n_embd: int) -> list[str]:
    """What is wrong with the loss of a new Pre-LN model: nothing, [], within 1 nat of what is expected.

    A model that knows nothing gives every id nearly the same chance: ln(n_vocab), and half the variance of
    its logits, each a product of n_embd numbers of size 1 and as many of size 0.02. (A wide Post-LN model
    starts higher, because its output still is the embedding of its input.)
    """
    expected = math.log(n_vocab) + 0.5 * 0.02**2 * n_embd
    if abs(loss - expected) < 1:
        return []
    return [(f"the loss before the first step is {loss:.2f}, wanted about {expected:.2f}, ln({n_vocab}) and "
             f"a little more")]


def _test_causality(model, dev):
    """Changing tokens from some position on must leave the logits before it as they are."""
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
                    # Kernels may rescale a softmax for a tile of rows at a time, so that rows round
                    # differently when others change; a leak is well above what one rounding can do
                    if not (change <= torch.finfo(dev.dtype).eps * _rms(before)).all():
                        failures.append(
                            f"{_mode(grad)}, tokens from {start} on change the logits before them, at "
                            f"{change.argmax()} by {change.max():.2g} where logits are {_rms(before):.2g}")
    finally:
        model.train(was_training)
    return failures


def _test_attention(config, dev, attention):
    """Causal attention and its gradients must be those of the definition in float64 on the CPU."""
    B, T, C, nh = 2, max(2, min(config.block_size, 256)), config.n_embd, config.n_head
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, 3 * C, generator=generator).to(dev.dtype)
    dy = torch.randn(B, nh, T, C // nh, generator=generator).to(dev.dtype)

    def run(attention, x, dy):
        """Output and gradients of q, k, v, all (B, nh, T, hs), from x (B, T, 3C), split as the model does."""
        x = x.requires_grad_()
        q, k, v = (part.view(B, T, nh, -1).transpose(1, 2) for part in x.split(C, dim=2))
        if x.device.type == "mps":
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
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
