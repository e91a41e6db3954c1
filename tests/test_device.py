"""The resolver of device, dtype and compile, on hardware that is there and hardware that is only claimed."""

import numpy as np
import pytest
import torch

from configurator import UserError
from device import PEAK_TFLOPS_16BIT, Device, resolve_device


def fake_cuda(monkeypatch, name="NVIDIA H200", bf16=True, count=2):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)


@pytest.mark.parametrize(("avx512", "amx", "dtype"), [
    (True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, torch.float32)])
def test_cpu_takes_bfloat16_where_the_hardware_has_it(monkeypatch, avx512, amx, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    dev = resolve_device("cpu")
    assert dev.dtype == dtype and dev.type == "cpu" and dev.fused and not dev.compile and dev.name
    assert resolve_device("cpu", "float32").dtype == torch.float32
    with dev.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(("bf16", "dtype", "scaled"), [(True, "bfloat16", False), (False, "float16", True)])
def test_cuda(monkeypatch, bf16, dtype, scaled):
    fake_cuda(monkeypatch, bf16=bf16)
    dev = resolve_device("auto", local_rank=1)
    assert dev.device == torch.device("cuda", 1) and dev.dtype == getattr(torch, dtype) and dev.fused
    assert resolve_device("cuda:0").device == torch.device("cuda", 0)
    assert Device(torch.device("cpu"), dev.dtype, False, "").grad_scaler().is_enabled() == scaled
    with pytest.raises(UserError, match="GPU 5, but torch sees 2"):
        resolve_device("cuda:5")


def test_mps_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dev = resolve_device("auto")
    assert dev.type == "mps" and dev.dtype == torch.float32 and dev.fused


def test_peak_is_known_or_none():
    for dtype, name, peak in [(torch.bfloat16, "NVIDIA H200", 989.4), (torch.float32, "NVIDIA H200", None),
                              (torch.bfloat16, "NVIDIA H2000", None)]:
        assert Device(torch.device("cpu"), dtype, False, name).peak_tflops() == peak
    assert all(peak > 0 for peak in PEAK_TFLOPS_16BIT.values())


def test_compile_that_does_not_work_is_off_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: 1 / 0)
    assert not resolve_device("cpu", compile=True).compile
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "compile: off" in out and "division by zero" in out


def test_compile_works_here():
    assert resolve_device("cpu", compile=True).compile


def test_to_device_keeps_values():
    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    assert torch.equal(resolve_device("cpu").to_device(array), torch.arange(6).view(2, 3))


@pytest.mark.parametrize(("device", "dtype", "words"), [
    ("tpu", "auto", "wanted auto, cpu"), ("xpu", "auto", "wanted auto, cpu"), ("mps", "auto", "--device=cpu"),
    ("cpu", "half", "wanted auto, float32")])
def test_what_is_not_there(device, dtype, words):
    with pytest.raises(UserError, match=words):
        resolve_device(device, dtype)
