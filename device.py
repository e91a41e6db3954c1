"""
The one place that decides where and how to compute: device, dtype, autocast, loss scaler, fused optimizer,
compile.

    dev = resolve_device("auto", "auto", compile=True)
    with dev.autocast():
        loss = model(x, y)

Nothing is asked of the hardware before `resolve_device` is called, so that flags are read first. Prints one
line, and only when compile was wanted and does not work here.
"""

import ctypes
import os
import platform
from dataclasses import dataclass

import torch

from configurator import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense peak in TFLOP/s of 16-bit matrix products that accumulate in float32, by the exact name the driver
# reports, from the vendor's data sheets (half of the "with sparsity" figure where only that is printed).
# Unknown means n/a.
PEAK_TFLOPS_16BIT = {
    "NVIDIA B200": 2250.0,
    "NVIDIA H200": 989.4,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 PCIe": 756.4,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA L40S": 362.05,
    "NVIDIA L4": 121.0,
    "NVIDIA A10": 125.0,
    "Tesla V100-SXM2-16GB": 125.0,
    "Tesla V100-SXM2-32GB": 125.0,
    "Tesla T4": 65.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
}


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

    def autocast(self):
        return torch.autocast(self.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def grad_scaler(self):
        """float16 underflows without loss scaling; for other dtypes the scaler passes everything through."""
        return torch.amp.GradScaler(self.type, enabled=self.dtype == torch.float16)

    def to_device(self, array) -> torch.Tensor:
        """A numpy array as a tensor there; on CUDA the copy overlaps with what the GPU is doing."""
        tensor = torch.from_numpy(array)
        if self.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def synchronize(self) -> None:
        """Wait for queued work, before a clock is read."""
        if self.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.type == "mps":
            torch.mps.synchronize()

    def peak_tflops(self) -> float | None:
        """Dense peak for this device and dtype, or None where it is not known."""
        return PEAK_TFLOPS_16BIT.get(self.name) if self.dtype != torch.float32 else None


def resolve_device(device: str = "auto", dtype: str = "auto", compile: bool = False,
                   local_rank: int = 0) -> Device:
    """Device for `device` (auto|cpu|cuda|cuda:N|mps) and `dtype` (auto|float32|bfloat16|float16).

    `local_rank` picks the GPU of a process under torchrun. auto dtype: bfloat16 where the hardware multiplies
    it, float16 on older CUDA cards, float32 on MPS, whose 16-bit attention has leaked future tokens (pytorch
    #195910). Raises UserError for a device or dtype that is not there.
    """
    if device == "auto":
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device!r}: wanted auto, cpu, cuda, cuda:1 or mps") from error
    if resolved.type == "cuda":
        count = torch.cuda.device_count()
        index = local_rank if resolved.index is None else resolved.index
        if index >= count:
            raise UserError(f"device={device}: wanted GPU {index}, but torch sees {count}; try --device=cpu, "
                            f"or torchrun with at most {count} processes")
        resolved = torch.device("cuda", index)
        torch.cuda.set_device(resolved)
        name = torch.cuda.get_device_name(resolved)
        auto_dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif resolved.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device=mps: this torch sees no MPS device; try --device=cpu")
        name, auto_dtype = f"Apple {platform.machine()}", "float32"
    elif resolved.type == "cpu":
        _keep_freed_memory()
        name = _cpu_name()
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        auto_dtype = "bfloat16" if has_bf16 else "float32"
    else:
        raise UserError(f"device={device!r}: wanted auto, cpu, cuda, cuda:1 or mps")
    dtype = auto_dtype if dtype == "auto" else dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: wanted auto, {', '.join(DTYPES)}")
    if resolved.type == "cuda" and dtype != "float32":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    return Device(resolved, DTYPES[dtype], compile and _compile_works(resolved), name)


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


def _compile_works(device):
    """Compile and run a toy: whether a compiler is there and works is only known by using it."""
    try:
        twice = torch.compile(_twice)
        return bool((twice(torch.ones(8, device=device)) == 2).all())
    except Exception as error:  # the compiler stack raises anything from ImportError to CalledProcessError
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(f"compile: off, torch.compile does not work here ({reason[:120]})", flush=True)
        return False


def _twice(x):
    return x * 2


def _cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
