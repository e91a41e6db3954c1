"""The model against transformers' GPT-2, closed forms, and other ways to compute the same."""

import math
import subprocess

import pytest
import torch
import torch.nn.functional as F
from training import PYTHON, ROOT

import kernels
from configurator import UserError
from kernels import attention
from model import GPT, GPTConfig

TINY = {"block_size": 16, "vocab_size": 64, "n_vocab": 61, "n_layer": 3, "n_head": 2, "n_embd": 24}


def make_model(**overrides):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**TINY, **overrides})).eval()


def random_ids(B, T, seed=1):
    return torch.randint(0, TINY["n_vocab"], (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n_layer", "n_head", "n_embd", "parameters"), [
    (12, 12, 768, 124_439_808),
    (24, 16, 1024, 354_823_168),
    (36, 20, 1280, 774_030_080),
    (48, 25, 1600, 1_557_611_200),
])
def test_parameter_counts_of_the_four_sizes(n_layer, n_head, n_embd, parameters):
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257, n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert model.num_params() == parameters


def test_counts_of_run_a():
    """The config table of run A gives 16,102,912 parameters, and 6 N + 12 L d T FLOPs per token."""
    with torch.device("meta"):
        model = GPT(GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=256))
    total = 50304 * 256 + 256 * 256 + 4 * (12 * 256**2 + 13 * 256) + 2 * 256
    assert model.num_params() == total == 16_102_912
    assert model.flops_per_token(256) == 6 * 16_037_376 + 12 * 4 * 256 * 256


def test_a_table_that_is_only_looked_up_costs_no_flops():
    """In a changed model: without wpe, as with RoPE, and with an lm_head of its own."""
    model = make_model()
    flops = model.flops_per_token(16)
    del model.transformer["wpe"]
    assert model.flops_per_token(16) == flops
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert model.flops_per_token(16) == flops


def copy_to_huggingface(model):
    """transformers' GPT2LMHeadModel with our weights: same names, matrices transposed."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()
    state = {}
    for name, tensor in model.state_dict().items():
        is_conv1d = any(name.endswith(f"{part}.weight") for part in ("c_attn", "c_proj", "c_fc"))
        state[name] = tensor.T.contiguous() if is_conv1d else tensor
    theirs.load_state_dict(state, strict=True)
    return theirs


def test_logits_and_loss_equal_transformers():
    model = make_model()
    for parameter in model.parameters():  # biases and norms too must matter, so none may be 0 or 1
        torch.nn.init.normal_(parameter, std=0.3)
    theirs = copy_to_huggingface(model)
    idx = random_ids(3, 16)
    with torch.no_grad():
        expected = theirs(idx, labels=idx)
        torch.testing.assert_close(model(idx), expected.logits[..., :61], atol=1e-5, rtol=1e-5)
        in_training = model.train()(idx[:, :-1], idx[:, 1:])
        evaluated = model.eval()(idx[:, :-1], idx[:, 1:])
    torch.testing.assert_close(in_training, expected.loss, atol=1e-5, rtol=1e-5)
    # evaluated without the padding ids, as after an export
    without = F.cross_entropy(expected.logits[:, :-1, :61].reshape(-1, 61), idx[:, 1:].reshape(-1))
    torch.testing.assert_close(evaluated, without, atol=1e-5, rtol=1e-5)
    assert evaluated < in_training - 0.01


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_a_later_token_changes_no_earlier_logit(norm_position):
    model = make_model(norm_position=norm_position)
    idx = random_ids(2, 16)
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 61
    with torch.no_grad():
        before, after = model(idx), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_a_block_is_torchs_encoder_layer(norm_position):
    """torch.nn.TransformerEncoderLayer, which was written from the paper, with copied weights."""
    model = make_model(norm_position=norm_position, n_layer=1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    block, C = model.transformer.h[0], model.config.n_embd
    theirs = torch.nn.TransformerEncoderLayer(
        C, model.config.n_head, 4 * C, dropout=0.0, activation=lambda x: F.gelu(x, approximate="tanh"),
        batch_first=True, norm_first=norm_position == "pre")
    for target, source in ((theirs.self_attn.out_proj, block.attn.c_proj), (theirs.linear1, block.mlp.c_fc),
                           (theirs.linear2, block.mlp.c_proj), (theirs.norm1, block.ln_1),
                           (theirs.norm2, block.ln_2)):
        target.load_state_dict(source.state_dict())
    theirs.self_attn.in_proj_weight.data.copy_(block.attn.c_attn.weight)
    theirs.self_attn.in_proj_bias.data.copy_(block.attn.c_attn.bias)
    x = torch.randn(2, 16, C, generator=torch.Generator().manual_seed(3))
    mask = torch.nn.Transformer.generate_square_subsequent_mask(16)
    with torch.no_grad():
        torch.testing.assert_close(block(x), theirs(x, src_mask=mask, is_causal=True), atol=1e-5, rtol=1e-4)


def test_initialisation():
    """std 0.02, residual projections 0.02 / sqrt(2 n_layer), biases 0, norms 1; first loss near ln(vocab)."""
    model = make_model(n_layer=8, n_embd=192, block_size=128, vocab_size=512, n_vocab=500)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            wanted = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert abs(parameter.std().item() / wanted - 1) < 0.05, name
        else:
            assert torch.all(parameter == (0.0 if name.endswith("bias") else 1.0)), name
    idx = torch.randint(0, 500, (4, 129), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert abs(model(idx[:, :-1], idx[:, 1:]).item() - math.log(512)) < 0.1


def test_one_batch_is_learned_by_heart():
    model = make_model().train()
    optimizer, = model.configure_optimizers("adamw", 0.0, 3e-3, (0.9, 0.95), fused=False)
    idx = random_ids(2, 17)
    for _ in range(150):
        loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_decay_on_matrices_only():
    model = make_model()
    optimizer, = model.configure_optimizers("adamw", 0.1, 1e-3, (0.9, 0.95), fused=True)
    decay, rest = optimizer.param_groups
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    assert {id(p) for p in decay["params"]} == {id(p) for p in model.parameters() if p.dim() == 2}
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_dropout_acts_in_training_only():
    model = make_model(dropout=0.5)
    idx = random_ids(2, 16)
    with torch.no_grad():
        assert torch.equal(model(idx), model(idx))
        model.train()
        assert not torch.equal(model(idx), model(idx))
    given = []
    model.use_attention(lambda *args, dropout_p, **kwargs: given.append(dropout_p) or attention(
        *args, dropout_p=dropout_p, **kwargs))
    model(idx)
    model.eval()(idx)
    assert given == [0.5] * model.config.n_layer + [0.0] * model.config.n_layer


@pytest.mark.parametrize(("overrides", "words"), [
    ({"n_embd": 25}, "try --n_embd=26"),
    ({"vocab_size": 60}, "try --vocab_size=128"),
    ({"norm_position": "mid"}, "wanted pre or post"),
    ({"dropout": 1.0}, "dropout"),
    ({"n_layer": 0}, "n_layer=0"),
    ({"heads": (2, 3, 1)}, "3 numbers of 0 to 2"),
])
def test_impossible_shapes(overrides, words):
    with pytest.raises(UserError, match=words):
        GPTConfig(**{**TINY, **overrides})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu():
    torch.set_float32_matmul_precision("highest")  # whatever an earlier test's resolve_device set
    model, idx = make_model(), random_ids(2, 16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # as initialised, logits are smaller than the tolerance
    with torch.no_grad():
        expected = model(idx)
        torch.testing.assert_close(model.cuda()(idx.cuda()).cpu(), expected, atol=1e-3, rtol=1e-3)


def test_activation_checkpointing_changes_nothing_but_memory():
    """Dropout too: the second forward of a block draws the masks of the first."""
    idx, found, saved = random_ids(2, 17), [], []

    def note(tensor):
        saved.append(tensor.numel())
        return tensor

    for on in (False, True):
        model = make_model(dropout=0.3).train()
        model.activation_checkpointing = on
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, torch.Tensor.detach):
            torch.manual_seed(1)
            loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        found.append((loss, [p.grad for p in model.parameters()], sum(saved)))
    (loss, grads, memory), (loss_on, grads_on, memory_on) = found
    assert torch.equal(loss, loss_on) and all(map(torch.equal, grads, grads_on))
    assert memory_on < 0.6 * memory


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = make_model()
    adamw, muon = model.configure_optimizers("muon", 0.1, 1e-3, (0.9, 0.95), fused=False)
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, torch.optim.Muon)
    name_of = {id(p): name for name, p in model.named_parameters()}
    names = [{name_of[id(p)] for group in opt.param_groups for p in group["params"]} for opt in (adamw, muon)]
    assert names[1] == {n for n in name_of.values() if ".h." in n and n.endswith("weight") and "ln" not in n}
    assert names[0] == set(name_of.values()) - names[1] and "transformer.wte.weight" in names[0]
    with pytest.raises(UserError, match="wanted adamw or muon"):
        model.configure_optimizers("sgd", 0.1, 1e-3, (0.9, 0.95), fused=False)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_muon_multiplies_in_bfloat16_only_where_the_processor_does(has_bfloat16, monkeypatch):
    monkeypatch.setattr(kernels, "cpu_has_bfloat16", lambda: has_bfloat16)
    grad = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    weights = [torch.zeros(16, 8, requires_grad=True) for _ in range(2)]
    for weight, kind in zip(weights, (kernels.Muon, torch.optim.Muon)):
        weight.grad = grad.clone()
        kind([weight], lr=1.0, weight_decay=0.0).step()
    ours, theirs = weights
    assert torch.equal(ours, theirs) == has_bfloat16
    x = grad.double() / grad.double().norm()
    for _ in range(5):  # Jordan et al. 2024: Newton-Schulz
        gram = x.T @ x
        x = 3.4445 * x + x @ (2.0315 * gram @ gram - 4.7750 * gram)
    distance = (ours + math.sqrt(2) * x).abs().max()  # sqrt(rows / columns), torch's scale
    assert distance < 1e-5 or has_bfloat16


TWO_BACKWARDS_OF_DDP = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from model import GPT, GPTConfig
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
model = torch.nn.parallel.DistributedDataParallel(GPT(GPTConfig(**{TINY}, heads=(2, 0, 1))))
idx = torch.arange(16).view(2, 8)
for _ in range(2):
    model(idx, idx).backward()
os._exit(0)  # torch 2.13 may hang where a process lives on after its DDP module
"""


def test_ddp_finds_a_gradient_for_every_parameter_of_a_layer_without_heads():
    """DDP waits for the gradients of all parameters, and its second forward fails where one had none."""
    done = subprocess.run([PYTHON, "-c", TWO_BACKWARDS_OF_DDP], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
