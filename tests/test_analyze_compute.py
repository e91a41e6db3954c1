"""What analyze_compute.py counts, against the model itself: parameters, FLOPs, and the tensors it keeps."""

import io
import re
import subprocess
import sys
import weakref
from contextlib import redirect_stdout

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import analyze_compute as study
from analyze_compute import count_flops, count_memory, count_parameters, largest_batch_size
from configurator import UserError, configure
from model import GPT, Block, GPTConfig

PRESETS = (4, 6, 8, 12, 24)  # GB
GPT2_SMALL = GPTConfig()
COMPONENTS = {  # of a parameter's name: the component it is counted under
    r"transformer\.wte\.weight": "token embedding", r"transformer\.wpe\.weight": "position embedding",
    r"transformer\.h\.\d+\.attn\.c_attn\..*": "attention, qkv",
    r"transformer\.h\.\d+\.attn\.c_proj\..*": "attention, projection",
    r"transformer\.h\.\d+\.mlp\.c_fc\..*": "MLP, up", r"transformer\.h\.\d+\.mlp\.c_proj\..*": "MLP, down",
    r"transformer\.h\.\d+\.ln_[12]\..*": "norms of the blocks", r"transformer\.ln_f\..*": "final norm",
}


def shape(layers=2, heads=4, width=64, T=32, V=96, norm="pre", dropout=0.0):
    return GPTConfig(block_size=T, vocab_size=V, n_vocab=V, n_layer=layers, n_head=heads, n_embd=width,
                     dropout=dropout, norm_position=norm)


shapes = st.builds(lambda layers, heads, head_size, *rest: shape(layers, heads, heads * head_size, *rest),
                   st.integers(1, 4), st.integers(1, 4), st.sampled_from([2, 8, 10]), st.integers(1, 33),
                   st.integers(3, 200), st.sampled_from(["pre", "post"]))


def ids(config, B, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (B, config.block_size), generator=generator)


# ---- parameters and FLOPs


@given(shapes)
@settings(max_examples=40, deadline=None)
def test_parameters_are_the_models_component_by_component(config):
    with torch.device("meta"):
        model = GPT(config)
    counted = dict.fromkeys(count_parameters(config), 0)
    for name, parameter in model.named_parameters():
        component, = (component for pattern, component in COMPONENTS.items() if re.fullmatch(pattern, name))
        counted[component] += parameter.numel()
    assert count_parameters(config) == counted and sum(counted.values()) == model.num_params()
    assert 3 * sum(count_flops(config).values()) == model.flops_per_token(config.block_size)


@pytest.mark.parametrize("config", [shape(), shape(3, 2, 20, 9, 41), shape(norm="post"), shape(1, 1, 8, 5)])
def test_flops_are_those_of_the_models_matrix_products(config):
    B, model = 2, GPT(config)
    x, y = ids(config, B), ids(config, B, 1)
    counted = []
    for backward in (False, True):
        # attention as plain products; the fused kernels compute p once more in the backward pass
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss = model(x, y)
            if backward:
                loss.backward()
        counted.append(counter.get_total_flops() / x.numel())
    flops = count_flops(config)
    products = sum(flops.values()) - flops["biases, norms (convention)"]
    assert counted == [products, 3 * products]


def test_causal_credit_counts_the_pairs_that_are_not_masked():
    config = shape(layers=3, width=64, T=19)
    pairs = int(torch.ones(19, 19).tril().sum())
    name = "attention, q k^T and p v"
    assert count_flops(config, causal=True)[name] * 19 == pytest.approx(3 * 2 * 2 * 64 * pairs)
    assert count_flops(config)[name] * 19 == 3 * 2 * 2 * 64 * 19 * 19
    others = [{key: n for key, n in count_flops(config, causal).items() if key != name} for causal in (0, 1)]
    assert others[0] == others[1]


def test_at_the_crossovers_both_terms_are_equal():
    lengths = list(study.crossovers(shape(layers=2, width=64, V=128)).values())
    assert lengths == [384, 767, 6 * 64 + 128 / 4]
    for n, causal, output in zip(lengths, (False, True, False), (False, False, True)):
        flops = count_flops(shape(layers=2, width=64, V=128, T=int(n)), causal)
        attention = flops["attention, q k^T and p v"]
        convention, last = flops["biases, norms (convention)"], flops["output layer"]
        assert attention == sum(flops.values()) - attention - convention - (0 if output else last)


# ---- memory


def saved_bytes(model, x, dtype):
    """Bytes of distinct storages that autograd keeps of a forward pass up to the logits, without weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(dtype):
        logits = model(x)
    assert logits.requires_grad  # and so all that was kept is still there, none of it at a reused address
    return sum(storages.values())


def autocast(dtype):
    return torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("config", [shape(), shape(3, 2, 32, 17, 130), shape(norm="post"),
                                    shape(dropout=0.1), shape(norm="post", dropout=0.1)])
def test_activations_are_what_autograd_keeps(config, dtype, monkeypatch):
    """To the byte, with dropout as CUDA has it: masks of one byte, and attention that is fused with it."""
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *args, dropout_p, **kwargs: fused(*args, **kwargs))
    monkeypatch.setattr(F, "dropout",
                        lambda x, p, training: torch.native_dropout(x, p, training)[0] if p else x)
    B = 3
    parts = count_memory(config, B, dtype.itemsize).parts
    targets = 8 * B * config.block_size  # which the forward pass up to the logits does not see
    expected = parts["activations"] + parts["16-bit copies of matrices"] - targets
    assert saved_bytes(GPT(config).train(), ids(config, B), dtype) == expected


class MemoryTracker(TorchDispatchMode):
    """The most bytes of tensors that were alive at once since it was made, from what it was shown on."""

    def __init__(self, tensors):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0
        self.see(tensors)

    def see(self, tensors):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def forget(self, key, size):
        self.alive.remove(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.see(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        return out


def piece_of_loss(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")


def loss_of(model, x, y, chunk):
    """The mean loss; in chunks of rows, each is computed again for its gradients."""
    if not chunk:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    hidden = model.transformer.wte(x) + model.transformer.wpe(torch.arange(x.size(1)))
    for block in model.transformer.h:
        hidden = block(hidden)
    hidden = model.transformer.ln_f(hidden).flatten(0, 1)
    return sum(checkpoint(piece_of_loss, rows, model.lm_head.weight, targets, use_reentrant=False)
               for rows, targets in zip(hidden.split(chunk), y.flatten().split(chunk))) / y.numel()


def micro_step(model, x, y, dtype, chunk):
    with autocast(dtype):
        loss = loss_of(model, x, y, chunk)
    loss.backward()


def measured_peak(config, B, dtype, chunk, checkpointing, monkeypatch):
    """Bytes of all tensors at the worst moment of a second micro-step, weights, gradients and moments too."""
    if checkpointing:
        forward = Block.forward
        monkeypatch.setattr(Block, "forward",
                            lambda block, *args: checkpoint(forward, block, *args, use_reentrant=False))
    model = GPT(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, y = ids(config, B), ids(config, B, 1)
    micro_step(model, x, y, dtype, chunk)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    tracker = MemoryTracker([x, y, *moments, *model.parameters(), *(p.grad for p in model.parameters())])
    with tracker:
        micro_step(model, x, y, dtype, chunk)
    return tracker.peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("config", "B", "chunk", "checkpointing", "slack"), [
    (shape(3, 4, 64, 32, 2048), 8, 0, False, 0.01),  # logits
    (shape(6, 4, 64, 64, 128), 8, 0, False, 0.15),   # blocks
    (shape(2, 4, 64, 8, 8192), 1, 0, False, 0.01),   # embedding
    (shape(3, 4, 64, 32, 2048, norm="post"), 8, 0, False, 0.01),
    (shape(3, 4, 64, 32, 2048), 8, 0, True, 0.08),
    (shape(6, 4, 64, 64, 128), 8, 0, True, 0.15),
    (shape(3, 4, 64, 32, 2048), 8, 64, False, 0.15),
    (shape(6, 4, 64, 64, 256), 8, 64, False, 0.15),
    (shape(6, 4, 64, 64, 2048), 8, 64, True, 0.25),
])
def test_the_peak_is_never_above_what_is_computed(config, B, chunk, checkpointing, slack, dtype, monkeypatch):
    peak = measured_peak(config, B, dtype, chunk, checkpointing, monkeypatch)
    computed = count_memory(config, B, dtype.itemsize, chunk, checkpointing).peak
    assert peak <= computed * 1.001  # a few scalars are not counted
    assert computed <= peak * (1 + slack)


def test_static_memory_is_sixteen_bytes_per_parameter():
    parts = count_memory(GPT2_SMALL, 1).parts
    assert sum(n for name, n in parts.items() if name.endswith(", float32")) == 16 * 124_475_904
    assert parts["16-bit copies of matrices"] == 2 * (12 * 12 * 768**2 + 50304 * 768)
    assert count_memory(GPT2_SMALL, 1, 4).parts["16-bit copies of matrices"] == 0


def test_moments_are_those_of_the_optimizers():
    config = shape(3)
    model = GPT(config)
    hidden = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if not any(p is other for other in hidden)]
    for name, optimizers in {"adamw": [torch.optim.AdamW(model.parameters())],
                             "muon": [torch.optim.Muon(hidden), torch.optim.AdamW(rest)]}.items():
        model(ids(config, 1), ids(config, 1)).backward()
        kept = 0
        for optimizer in optimizers:
            optimizer.step()
            kept += sum(value.numel() * value.element_size() for state in optimizer.state.values()
                        for key, value in state.items() if key != "step")
        assert count_memory(config, 1, optimizer=name).parts["moments, float32"] == kept


def test_a_chunk_of_all_rows_is_no_chunk():
    assert count_memory(GPT2_SMALL, 2, 2, 2048) == count_memory(GPT2_SMALL, 2, 2, 10**9) \
        == count_memory(GPT2_SMALL, 2)


@pytest.mark.parametrize("how", [
    {}, {"loss_chunk": 1024}, {"activation_checkpointing": True},
    {"width": 4, "loss_chunk": 512, "activation_checkpointing": True, "optimizer": "muon"}])
def test_the_largest_batch_size_fits_and_the_next_does_not(how):
    for card in (3, 6, 11.5, 24):
        best = largest_batch_size(GPT2_SMALL, 96, card, **how)
        divisors = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96]
        assert best in divisors
        if best:
            assert count_memory(GPT2_SMALL, best, **how).card <= card * 2**30
        if best < 96:
            after = divisors[divisors.index(best) + 1]
            assert count_memory(GPT2_SMALL, after, **how).card > card * 2**30


def settings_of(*argv):
    return configure({"__file__": study.__file__, **vars(study), **study.train_settings()}, list(argv))


@pytest.mark.parametrize("gigabytes", PRESETS)
def test_presets_fit_their_cards(gigabytes, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # configure replaces it
    name = f"config/gpu_{gigabytes}gb.py"
    preset = settings_of(name)
    config, sequences, _ = study.check_settings(preset)
    assert config == GPT2_SMALL and sequences == 512 and sequences % preset["batch_size"] == 0
    assert preset["data_dir"] == study.train_settings()["data_dir"]
    memory = count_memory(config, preset["batch_size"], 2, preset["loss_chunk"],
                          preset["activation_checkpointing"])
    assert memory.peak < memory.card < 0.9 * gigabytes * 2**30  # a desktop needs some of it
    row = re.search(rf"^\| `{name}` \|(.*)\|$", (ROOT / "RESULTS.md").read_text(encoding="utf-8"), re.M)[1]
    numbers = [int(n.replace(",", "")) for n in re.findall(r" ([\d,]+) (?=\||$)", row)]
    peaks = (memory.peak / 2**20, memory.card / 2**20, gigabytes * 1024)
    assert numbers == [preset["batch_size"], preset["loss_chunk"], *map(round, peaks)]


# ---- run A


def test_run_a_and_what_its_author_states():
    lines = "\n".join(study.run_a_lines())
    flops = 6 * 16_037_376 + 12 * 4 * 256 * 256
    assert 3 * sum(count_flops(study.RUN_A).values()) == flops
    for figure in ("16,102,912", "+999,296", f"{flops:,}", "1.03 TFLOP/s", "1.47% of the 70", "4.25% of its",
                   "4.03% of 70", "0 of 34,560"):
        assert figure in lines
    # the other countings, from the model itself
    with torch.device("meta"):
        for what, changes in {"three layers": {"n_layer": 3},
                              "a vocabulary of 50,257": {"vocab_size": 50257},
                              "without the position embedding": {}}.items():
            model = GPT(GPTConfig(**{**vars(study.RUN_A), **changes}))
            count = model.num_params() - (model.transformer.wpe.weight.numel() if not changes else 0)
            assert re.search(rf"^{what} +{count:,} ", lines, re.M), what
        model = GPT(study.RUN_A)
    no_bias = sum(p.numel() for name, p in model.named_parameters()
                  if not (name.endswith("bias") and "ln_" not in name))
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    narrow = model.num_params() - sum(2 * (block.mlp.c_fc.weight.numel() // 4) + 256
                                      for block in model.transformer.h)
    for what, count in (("without biases", no_bias), ("without biases and norms", matrices),
                        ("an MLP of 3 d", narrow)):
        assert re.search(rf"^{what} +{count:,} ", lines, re.M), what
    totals = study.countings_of_run_a()
    assert {model.num_params(), no_bias, matrices, narrow} <= totals.keys()


# ---- the script


def test_the_settings_are_those_of_train_gpt2():
    done = subprocess.run([sys.executable, str(ROOT / "train_gpt2.py"), "--help"], check=True,
                          capture_output=True, text=True, encoding="utf-8")
    shown = dict(re.findall(r"^  --(\w+)=(.*?)  +\w", done.stdout, re.M))
    settings = study.train_settings()
    assert settings.pop("__annotations__").keys() > {"mfu", "n_layer"}
    assert shown == {key: str(value) for key, value in settings.items()}
    own = {"gpus", "mfu", "dollars_per_hour", "gpu_memory_gb", "out_dir"}
    assert len(shown) > 30 and not own & shown.keys()


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.name)
def test_every_config_is_analyzed(path, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    chosen = settings_of(str(path))
    if chosen["tokenizer"]:
        chosen["vocab_size"] = 4096  # its file is the user's to make
    out = io.StringIO()
    with redirect_stdout(out):
        study.main(chosen)  # which compares the counts with the model's
    assert max(map(len, out.getvalue().splitlines())) <= 110
    assert ("MFU of run A" in out.getvalue()) == (path.name == "rtx4050_15m.py")
    assert ("the data decide" in out.getvalue()) == (chosen["num_epochs"] > 0)


def test_a_changed_model_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(GPT, "num_params", lambda model: 1_000_000)
    with pytest.raises(UserError, match=r"has 1,000,000 parameters .* not 124,475,904 .*--dry_run"):
        study.main(settings_of())


def test_time_and_cost(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    chosen = settings_of("--mfu=0.5", "--dollars_per_hour=3", "--max_steps=1000", "--peak_tflops=100")
    lines = study.time_lines(GPT2_SMALL, torch.bfloat16, ["NVIDIA H200", "Tesla T4"], chosen)
    tok_s = 0.5 * 989.4e12 / 855_383_040
    hours = 1000 * 524_288 / tok_s / 3600
    assert lines[1].split()[-4:] == ["989.4", f"{tok_s:,.0f}", f"{hours:.3f}", f"{3 * hours:.2f}"]
    assert lines[2].split() == ["Tesla", "T4", *["n/a"] * 4]  # no bfloat16
    assert lines[3].split()[:2] == ["--peak_tflops", "100.0"]
    free = study.time_lines(GPT2_SMALL, torch.float16, ["Tesla T4"], {**chosen, "dollars_per_hour": 0.0})
    assert "dollars" not in free[0] and free[1].split()[2] == "65.0" and len(free[1].split()) == 5


def test_the_script_writes_what_it_prints_and_overwrites_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "analyze_compute.py"), "config/rtx4050_15m.py", "--gpu_memory_gb=6",
               "--dtype=float32", "--out_dir=study"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "study").iterdir()) == sorted(study.NAMES)
    assert (tmp_path / "study/compute.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    report = (tmp_path / "study/compute.txt").read_text(encoding="utf-8")
    assert report in done.stdout and "16,102,912" in report and "float32, MFU 40% (computed)" in report
    assert re.search(r"^6 GiB ", report, re.M) and not re.search(r"^8 GiB ", report, re.M)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert again.returncode == 2 and "delete it yourself" in again.stderr and "--out_dir=" in again.stderr


@pytest.mark.parametrize(("flags", "words"), [
    (["--mfu=0"], "mfu=0: wanted 0.001 to 1"), (["--mfu=40"], "to 1"), (["--batch_size=0"], "batch_size=0"),
    (["--batch_size=3"], "try --batch_tokens=525312"), (["--dtype=half"], "wanted auto, float32"),
    (["--gpus=RTX 4050"], "try NVIDIA GeForce RTX 4050 Laptop GPU"), (["--gpus=Voodoo"], "--peak_tflops=VAL"),
    (["--n_head=7"], "multiple of n_head"), (["--vocab_size=100"], "50257 ids"),
    (["--loss_chunk=-1"], "wanted 0 to"), (["--dollars_per_hour=-1"], "wanted 0 to"),
    (["--batchsize=4"], "did you mean batch_size"), (["--optimizer=sgd"], "wanted adamw or muon")])
def test_mistakes_are_named(flags, words, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(UserError, match=words):
        study.check_settings(settings_of(*flags))
