"""analyze_compute.py against the model itself: its parameters, its FLOPs and the tensors it keeps."""

import json
import re
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import analyze_compute as study
from analyze_compute import count_flops, count_memory, count_parameters, largest_batch_size
from configurator import UserError, configure
from model import GPT, GPTConfig
from shards import read_header

GPT2_SMALL = GPTConfig()
COMPONENTS = {  # pattern of a parameter's name: the component it is counted in
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


def test_the_causal_column_counts_the_pairs_that_are_not_masked():
    config = shape(layers=3, width=64, T=19)
    pairs = int(torch.ones(19, 19).tril().sum())
    plain, causal = count_flops(config), count_flops(config, causal=True)
    assert causal.pop(study.ATTENTION) * 19 == pytest.approx(3 * 2 * 2 * 64 * pairs)
    assert plain.pop(study.ATTENTION) * 19 == 3 * 2 * 2 * 64 * 19 * 19
    assert plain == causal


def test_at_the_crossovers_attention_takes_as_much_as_the_matrices():
    report = "\n".join(study.cost_lines(shape(layers=2, width=64, V=128)))
    lengths = [int(n) for n in re.findall(r"at n = .*= (\d+)$", report, re.M)]
    assert lengths == [384, 6 * 64 + 128 // 4]
    for n, with_output in zip(lengths, (False, True)):
        flops = count_flops(shape(layers=2, width=64, V=128, T=n))
        attention, output = flops.pop(study.ATTENTION), flops.pop("output layer")
        assert attention == sum(flops.values()) - flops["biases, norms (convention)"] + output * with_output


# ---- memory


def saved_bytes(model, x, dtype):
    """Bytes of distinct storages that autograd saves in a forward pass up to the logits, without weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(dtype):
        logits = model(x)
    assert logits.requires_grad  # the graph is alive, so no address was reused
    return sum(storages.values())


def autocast(dtype):
    return torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("config", [shape(), shape(3, 2, 32, 17, 130), shape(norm="post"),
                                    shape(dropout=0.1), shape(norm="post", dropout=0.1)])
def test_activations_are_what_autograd_keeps(config, dtype, monkeypatch):
    """To the byte, with dropout as on CUDA: masks of one byte, and fused into attention."""
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *args, dropout_p, **kwargs: fused(*args, **kwargs))
    monkeypatch.setattr(F, "dropout",
                        lambda x, p, training: torch.native_dropout(x, p, training)[0] if p else x)
    B = 3
    parts = count_memory(config, B, dtype.itemsize).parts
    targets = 8 * B * config.block_size  # not part of a forward pass up to the logits
    expected = parts["activations"] + parts["16-bit copies of matrices"] - targets
    assert saved_bytes(GPT(config).train(), ids(config, B), dtype) == expected


class MemoryTracker(TorchDispatchMode):
    """The peak of the bytes of live tensors, beginning with `tensors`."""

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


def measured_peak(config, B, dtype, chunk, checkpointing):
    """Peak of the bytes of all tensors in a second micro-step: weights, gradients and moments too."""
    model = GPT(config).train()
    model.loss_chunk, model.activation_checkpointing = chunk, checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, y = ids(config, B), ids(config, B, 1)
    for tracked in (False, True):
        moments = [value for state in optimizer.state.values() for value in state.values()]
        gradients = [p.grad for p in model.parameters() if tracked]
        with MemoryTracker([x, y, *moments, *model.parameters(), *gradients]) as tracker:
            with autocast(dtype):
                loss = model(x, y)
            loss.backward()
        optimizer.step()
    return tracker.peak


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("config", "B", "chunk", "checkpointing", "slack"), [
    (shape(3, 4, 64, 32, 2048), 8, 0, False, 0.01),  # logits
    (shape(6, 4, 64, 64, 128), 8, 0, False, 0.15),   # blocks
    (shape(2, 4, 64, 8, 8192), 1, 0, False, 0.01),   # embedding
    (shape(3, 4, 64, 32, 2048, norm="post"), 8, 0, False, 0.01),
    (shape(3, 4, 64, 32, 2048), 8, 0, True, 0.08),
    (shape(6, 4, 64, 64, 128), 8, 0, True, 0.15),
    (shape(3, 4, 64, 32, 2048), 8, 64, False, 0.2),
    (shape(6, 4, 64, 64, 256), 8, 64, False, 0.15),
    (shape(6, 4, 64, 64, 2048), 8, 64, True, 0.25),
])
def test_the_peak_is_never_above_what_is_computed(config, B, chunk, checkpointing, slack, dtype):
    peak = measured_peak(config, B, dtype, chunk, checkpointing)
    computed = count_memory(config, B, dtype.itemsize, chunk, checkpointing).peak
    assert peak <= computed * 1.001  # a few scalars are not counted
    assert computed <= peak * (1 + slack)


def test_static_memory_is_sixteen_bytes_per_parameter():
    parts = count_memory(GPT2_SMALL, 1).parts
    assert sum(n for name, n in parts.items() if name.endswith(", float32")) == 16 * 124_475_904
    assert parts["16-bit copies of matrices"] == 2 * (12 * 12 * 768**2 + 50304 * 768)
    assert count_memory(GPT2_SMALL, 1, 4).parts["16-bit copies of matrices"] == 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_those_of_the_optimizers(name):
    config = shape(3)
    model = GPT(config)
    optimizers = model.configure_optimizers(name, 0.1, 1e-3, (0.9, 0.95), fused=False)
    model(ids(config, 1), ids(config, 1)).backward()
    kept = 0
    for optimizer in optimizers:
        optimizer.step()
        kept += sum(value.numel() * value.element_size() for state in optimizer.state.values()
                    for key, value in state.items() if key != "step")
    assert count_memory(config, 1, optimizer=name).parts["moments, float32"] == kept


def test_a_chunk_of_all_rows_is_no_chunk():
    for chunk in (2048, 10**9):
        assert count_memory(GPT2_SMALL, 2, loss_chunk=chunk) == count_memory(GPT2_SMALL, 2)


@pytest.mark.parametrize("options", [
    {}, {"loss_chunk": 1024}, {"activation_checkpointing": True},
    {"width": 4, "loss_chunk": 512, "activation_checkpointing": True, "optimizer": "muon"}])
@pytest.mark.parametrize("card", [3, 6, 11.5, 24])
def test_the_largest_batch_size_fits_and_the_next_does_not(options, card):
    divisors = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96]
    best = divisors.index(largest_batch_size(GPT2_SMALL, 96, card, **options))
    needed = [count_memory(GPT2_SMALL, n, **options).card for n in divisors[best:best + 2]]
    assert best == 0 or needed[0] <= card * 2**30
    assert divisors[best] == 96 or needed[1] > card * 2**30


def settings_of(*argv):
    return configure({"__file__": study.__file__, **vars(study), **study.train_settings()}, list(argv))


@pytest.mark.parametrize("gigabytes", [4, 6, 8, 12, 24])
def test_presets_fit_their_cards(gigabytes):
    name = f"config/gpu_{gigabytes}gb.py"
    preset = settings_of(name)
    config, sequences, _ = study.check_settings(preset)
    assert config == GPT2_SMALL and sequences == 512 and sequences % preset["batch_size"] == 0
    assert preset["data_dir"] == study.train_settings()["data_dir"]
    memory = count_memory(config, preset["batch_size"], 2, preset["loss_chunk"],
                          preset["activation_checkpointing"])
    assert memory.peak < memory.card < 0.9 * gigabytes * 2**30  # a desktop needs some of it
    manual = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| {gigabytes} GB \| `{name}` \|(.*)\|$", manual, re.M)[1]
    numbers = [int(n.replace(",", "")) for n in re.findall(r" ([\d,]+) (?=\||$)", row)]
    peaks = (memory.peak / 2**20, memory.card / 2**20)
    assert numbers == [preset["batch_size"], preset["loss_chunk"], *map(round, peaks)]


# ---- speed


def figures_of(lines):
    """{name: figure} of the lines of a measured speed."""
    return dict(re.split("  +", line) for line in lines[1:])


def test_run_a_at_the_speed_its_author_states(capsys):
    card = "NVIDIA GeForce RTX 4050 Laptop GPU"
    flags = ("--tok_s=10369", f"--gpus={card}", "--peak_tflops=70")
    study.main(settings_of("config/rtx4050_15m.py", *flags), {})
    report = capsys.readouterr().out
    assert re.search(r"^total +16,102,912$", report, re.M)
    assert f"both: {6 * 16_037_376 + 12 * 4 * 256 * 256:,} = 6 N + 12 L d T" in report
    assert figures_of(report[report.index("speed (measured"):].splitlines()) == {
        "tokens/s": "10,369", "sequences/s": "40.5", "seconds per step": "0.79", "TFLOP/s": "1.03",
        f"MFU: of 24.3 TFLOP/s, {card}": "4.25%", "MFU: of 70.0 TFLOP/s, --peak_tflops": "1.47%",
        "the run: steps": "2,848", "the run: tokens": "23,330,816", "the run: minutes": "37.5"}


def test_two_gpus_an_unknown_peak_and_an_epoch_of_the_data(tiny_data):
    tokens = sum(read_header(path)[0] for path in tiny_data.glob("*_train_*.npy"))
    peaks, settings = {"NVIDIA H200": 989.4, "Voodoo": None}, settings_of(f"--data_dir={tiny_data}")
    shown = figures_of(study.speed_lines(GPT2_SMALL, 989.4e12 / 855_383_040, 2, peaks, settings))
    assert shown["MFU: of 989.4 TFLOP/s, NVIDIA H200"] == "50.00%" and shown["TFLOP/s"] == "989.40"
    assert shown["MFU: no peak known for Voodoo; give --peak_tflops"] == "n/a"
    assert shown["an epoch: tokens"] == f"{tokens:,}" and shown["the run: steps"] == "19,073"


def test_time_of_the_run():
    settings = settings_of("--mfu=0.5", "--max_steps=1000", "--peak_tflops=100", "--dtype=bfloat16")
    lines = study.time_lines(GPT2_SMALL, study.peaks_of(["NVIDIA H200", "Tesla T4"], settings), settings)
    tok_s = 0.5 * 989.4e12 / 855_383_040
    assert lines[1].split()[-3:] == ["989.4", f"{tok_s:,.0f}", f"{1000 * 524_288 / tok_s / 3600:.3f}"]
    assert lines[2].split() == ["Tesla", "T4", *["n/a"] * 3]  # no bfloat16
    assert lines[3].split()[:2] == ["--peak_tflops", "100.0"]
    assert study.peaks_of(["Tesla T4"], settings_of()) == {"Tesla T4": 65.0}  # auto: float16 there


# ---- the script


def test_the_settings_are_those_of_train_gpt2():
    done = subprocess.run([sys.executable, str(ROOT / "train_gpt2.py"), "--help"], check=True,
                          capture_output=True, text=True, encoding="utf-8")
    shown = dict(re.findall(r"^  --(\w+)=(.*?)  +\w", done.stdout, re.M))
    settings = study.train_settings()
    assert settings.pop("__annotations__").keys() > {"mfu", "n_layer"}
    assert shown == {key: str(value) for key, value in settings.items()}
    own = {"gpus", "mfu", "tok_s", "out_dir"}
    assert len(shown) > 30 and not own & shown.keys()


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.name)
def test_every_config_is_analyzed(path, capsys):
    chosen = settings_of(str(path))
    if chosen["tokenizer"]:
        chosen["vocab_size"] = 4096  # its file is the user's to make
    study.main(chosen, {})  # which compares the counts with the model's
    report = capsys.readouterr().out
    assert max(map(len, report.splitlines())) <= 110 and "speed (measured" not in report
    assert ("not num_epochs" in report) == (chosen["num_epochs"] > 0)


def test_the_vocabulary_is_that_of_the_shards(tiny_data):
    config, *_ = study.check_settings(settings_of(f"--data_dir={tiny_data}"))
    assert (config.n_vocab, config.vocab_size) == (257, 384)
    with pytest.raises(UserError, match="257 ids"):
        study.check_settings(settings_of(f"--data_dir={tiny_data}", "--vocab_size=200"))
    config, *_ = study.check_settings(settings_of("--data_dir=not_built_yet"))
    assert (config.n_vocab, config.vocab_size) == (50_257, 50_304)


def test_a_changed_model_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"the run in --log_dir has n_layer=6: leave out --n_layer"):
        study.main(settings_of(), {"config": {"n_layer": 6}})
    monkeypatch.setattr(GPT, "num_params", lambda model: 1_000_000)
    with pytest.raises(UserError, match=r"has 1,000,000 parameters .* not 124,475,904 .*--dry_run"):
        study.main(settings_of(), {})


def test_the_script_reads_a_run_and_writes_what_it_prints(tmp_path):
    """A run of two starts; the first step was slow, the last line is incomplete."""
    starts = [{"config": {"n_layer": 2, "batch_size": size, "retired": 1, "num_epochs": 2.5, "max_steps": 9,
                          "tokenizer": "own", "vocab_size": 50304},
               "device": "NVIDIA H200", "world_size": 8, "arguments": []} for size in (2, 4)]
    text = "".join(f"{json.dumps(start)}\n" for start in starts)
    (tmp_path / "runs.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "own").mkdir()  # shards, named like the vocabulary
    speeds = enumerate(("5", "2e+06", "1000.5", "3000000"))
    lines = [f"{step} train 3\n{step} tok_s {speed}\n" for step, speed in speeds]
    (tmp_path / "log.txt").write_text("".join([*lines, "4 to"]), encoding="utf-8")
    command = [sys.executable, str(ROOT / "analyze_compute.py"), "--log_dir=.", "--dtype=float32",
               "--peak_tflops=1000", "--out_dir=study"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "study"
    assert sorted(path.name for path in folder.iterdir()) == sorted(study.NAMES)
    assert (folder / "compute.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    report = (folder / "compute.txt").read_text(encoding="utf-8")
    assert report in done.stdout and report.startswith("2 layers, 12 heads") and "batch_size=4" in report
    assert "max_steps=9: " in report  # which the run derived from num_epochs
    mfu = 3 * sum(count_flops(GPTConfig(n_layer=2)).values()) * 2e6 / 1e15 / 8
    assert re.search(rf"^MFU: of 1,000.0 TFLOP/s, --peak_tflops +{mfu:.2%}$", report, re.M)
    given = subprocess.run([*command[:-1], "--tok_s=5e5"], cwd=tmp_path, capture_output=True, text=True,
                           encoding="utf-8")
    assert f"{2 * mfu:.2%}" in given.stdout  # of one GPU, whatever the run had
    for name in study.NAMES:
        with pytest.raises(UserError, match=rf"{name} exists: delete it .*--out_dir"):
            study.check_settings(settings_of(f"--out_dir={folder}"))
        (folder / name).unlink()
    for name in ("log.txt", "runs.jsonl"):
        (tmp_path / name).write_text("", encoding="utf-8")
        with pytest.raises(UserError, match=r"no run with speeds .*--tok_s=VALUE"):
            study.find_run(str(tmp_path))


@pytest.mark.parametrize(("flags", "words"), [
    (["--mfu=0"], "mfu=0: wanted 0.001 to 1"), (["--mfu=40"], "to 1"), (["--batch_size=0"], "batch_size=0"),
    (["--batch_size=3"], "try --batch_tokens=525312"), (["--dtype=half"], "wanted auto, float32"),
    (["--gpus=RTX 4050"], "try NVIDIA GeForce RTX 4050 Laptop GPU"), (["--gpus=Voodoo"], "--peak_tflops=VAL"),
    (["--n_head=7"], "multiple of n_head"), (["--vocab_size=100"], "50257 ids"),
    (["--loss_chunk=-1"], "wanted 0 to"), (["--tok_s=-1"], "wanted 0 to"),
    (["--batchsize=4"], "did you mean batch_size"), (["--optimizer=sgd"], "wanted adamw or muon")])
def test_mistakes_are_named(flags, words):
    with pytest.raises(UserError, match=words):
        study.check_settings(settings_of(*flags))
