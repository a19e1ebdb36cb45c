"""bf16 against float64: every component, the whole model and a run, forward and backward.

On the CPU, and on a CUDA GPU where there is one.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_optim import make_config, make_model, reference_muon
from test_train import KIMI, Stop, numbers, stop_after, tiny
from torch import nn

from kimi_nb.config import ModelConfig, NormConfig
from kimi_nb.model import AttentionError, KimiModel, RotaryEmbedding, apply_rope, attention, experts, moe, norm, routing
from kimi_nb.train import build_optimizer, fit, muon

# Why these sizes: bf16 has 8 bits of mantissa, so one rounding moves a number by up to 2^-8 = 0.004 of itself
# and a vector by 0.0017 of its length; n of them, one after another, by 0.0017 sqrt(n), and the softmax turns
# an error of a logit into as large a one of a weight. Allowed is about twice what is seen: |bf16 - exact| / |exact|,
# of a component's result and of its gradients.
TOLERANCE = {
    "norm": (0.002, 0.002),      # one rounding, at the end: the statistics are float32
    "rope": (0.002, 0.002),      # the same: so are the tables
    "moe": (0.012, 0.015),       # input, weights, two products, activation, weighted sum
    "mha": (0.02, 0.03),         # input, weights, projections, rotation, softmax, sum
    "mla": (0.02, 0.03),         # one projection more, and norms between
    "latent": (0.02, 0.06),      # three attentions one after another
    "model": (0.002, 0.05),      # two layers of all this, gradients through both; the loss is a mean over many tokens
    "muon": 0.03,                # five iterations of three products, by a polynomial that enlarges what is small
    "adamw": 1e-5,               # float32
    "routing": 1e-5,             # float32, whatever is computed around it
    "resumed": 0.002,            # eight steps on a GPU, which adds in no fixed order; on the CPU not a bit may differ
}  # fmt: skip

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
BF16 = torch.bfloat16


def error(got, exact):
    got, exact = (t.detach().to("cpu", torch.float64) for t in (got, exact))
    return ((got - exact).norm() / exact.norm()).item()


def near(got, exact, limit, what="result"):
    distance = error(got, exact)
    assert distance < limit, f"{what}: {distance:.5f}"  # no NaN is


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def redraw(module, size=1.0, seed=0):
    """Matrices that keep a vector's length (times `size`), gains away from one so that a forgotten gain shows."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        nn.init.normal_(p, 0, size * p.shape[-1] ** -0.5, generator) if p.dim() > 1 else nn.init.normal_(
            p, 1, 0.3, generator
        )
    return module


def backward(y, upstream):
    y.backward(upstream.to(y))
    return y


def check(kind, y, x, module, exact_y, exact_x, exact_module):
    """The result and the gradients of the input and of every parameter."""
    forward, back = TOLERANCE[kind]
    assert y.dtype == BF16
    near(y, exact_y, forward)
    near(x.grad, exact_x.grad, back, "gradient of the input")
    for (name, p), (_, exact) in zip(module.named_parameters(), exact_module.named_parameters(), strict=True):
        near(p.grad, exact.grad, back, name)


ATTENTION = {
    "mha": {},
    "mla": {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    "latent": {"n_latents": 4, "chunk_size": 64, "qk_norm": True},
}


@on_each_device
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_attention(kind, implementation, device):
    """As training has it, float32 weights under autocast; as generation may, bf16 weights without gradients.

    From 512 tokens on, PyTorch's own kernel on the CPU.
    """
    config = ModelConfig(
        d_model=64,
        n_heads=4,
        max_seq_len=512,
        attention={"kind": kind, "implementation": implementation, **ATTENTION[kind]},
    )
    layer, x, upstream = redraw(attention.build_attention(config), 1.5), random(1, 512, 64), random(1, 512, 64, seed=2)
    tables, positions = RotaryEmbedding(attention.rope_dim(config)), torch.arange(512)
    exact, exact_x, exact_rope = copy.deepcopy(layer).double(), x.double().requires_grad_(), tables(positions)
    exact.implementation = "eager"
    wanted = backward(exact(exact_x, exact_rope), upstream)
    layer, x, rope = layer.to(device), x.to(device).requires_grad_(), tables.to(device)(positions.to(device))
    if (kind, implementation, device) == ("latent", "flash", "cuda"):
        with pytest.raises(AttentionError, match="needs a mask"), torch.autocast(device, BF16):
            layer(x, rope)
        return
    with torch.autocast(device, BF16):
        y = layer(x, rope)
    backward(y, upstream)
    check(kind, y, x, layer, wanted, exact_x, exact)
    with torch.no_grad():
        near(layer.bfloat16()(x.bfloat16(), rope), wanted, TOLERANCE[kind][0])
    name = attention.kernel_name(config, device, BF16)
    assert name == "eager" if implementation == "eager" else "flash" in name or implementation == "sdpa"


def moe_loop(layer, x, indices):
    """Expert after expert: the result, the scores that a choice is made by, and the weights of those chosen."""
    m, out = layer.config, 0
    logits = x @ layer.gate.weight.T
    scores = logits.softmax(-1) if m.router == "standard" else logits.sigmoid()
    weights = scores.gather(1, indices)
    weights = weights / weights.sum(1, keepdim=True) * m.routed_scaling_factor
    for e in range(m.n_experts):
        token, slot = (indices == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ layer.experts.gate_up_proj[e].T).chunk(2, -1)
        rows = (F.silu(gate) * up) @ layer.experts.down_proj[e].T * weights[token, slot, None]
        out = out + torch.zeros_like(x).index_add(0, token, rows)
    gate, up, down = (p.T for p in layer.shared_experts.parameters())
    return (
        out + (F.silu(x @ gate) * (x @ up)) @ down,
        scores + (layer.gate.e_score_correction_bias if m.router == "noaux_tc" else 0),
        weights,
    )


@on_each_device
@pytest.mark.parametrize("router, width", [("standard", 24), ("aux_tc", 24), ("noaux_tc", 24), ("noaux_tc", 20)])
def test_moe_with_an_expert_that_nobody_chooses(router, width, device):
    """One product over slices of rows, padded on the CPU; rows of 20 numbers start on no 16 bytes, and are batched."""
    sizes = {
        "router": router,
        "n_experts": 8,
        "top_k": 2,
        "n_shared_experts": 1,
        "d_expert": width,
        "routed_scaling_factor": 1.5,
    }
    layer = redraw(moe.MoE(ModelConfig(d_model=32, ffn={"kind": "moe", "activation": "swiglu"}, moe=sizes)))
    with torch.no_grad():
        layer.gate.weight[5, 0] = -30.0
        layer.gate.e_score_correction_bias.copy_(0.05 * random(8))
    x, upstream = random(2, 256, 32), random(2, 256, 32, seed=2)
    x[..., 0] = 1.0
    exact, exact_x = copy.deepcopy(layer).double(), x.double().requires_grad_()
    layer, x = layer.to(device), x.to(device).requires_grad_()
    with torch.autocast(device, BF16):
        y, stats = layer(x, keep_choice=True)
    backward(y, upstream)
    indices = stats.indices.cpu()
    wanted, scores, weights = moe_loop(exact, exact_x.flatten(0, 1), indices)
    backward(wanted, upstream.flatten(0, 1))
    check("moe", y.flatten(0, 1), x, layer, wanted, exact_x, exact)
    chosen, others = scores.gather(1, indices).amin(1), scores.scatter(1, indices, -1.0).amax(1)
    assert (chosen - others).min() > -TOLERANCE["routing"]
    near(stats.weights, weights, TOLERANCE["routing"])
    assert (
        stats.counts.tolist()
        == layer.gate.load_accumulator.tolist()
        == torch.bincount(indices.flatten(), minlength=8).tolist()
    )
    assert stats.counts[5] == 0 and not any(p.grad[5].any() for p in layer.experts.parameters())
    assert indices.numel() >= experts._ROWS * 8  # enough for the CPU to pad


@on_each_device
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms(kind, device):
    """Far from zero, where statistics in bf16 would be lost; the exact input is the rounded one.

    With weights of bf16 too, as a model that only reads may have.
    """
    layer = redraw(norm.build_norm(NormConfig(kind=kind, bias=kind == "layernorm"), 64))
    x, upstream = (20 * random(8, 64, 64) + 60).to(BF16), random(8, 64, 64, seed=2).to(BF16)
    exact, exact_x = copy.deepcopy(layer).double(), x.double().requires_grad_()
    centred = exact_x - exact_x.mean(-1, keepdim=True) if kind == "layernorm" else exact_x
    wanted = centred * (centred.square().mean(-1, keepdim=True) + exact.eps).rsqrt() * exact.weight + (
        exact.bias if kind == "layernorm" else 0
    )
    backward(wanted, upstream)
    layer, x = layer.to(device), x.to(device).requires_grad_()
    with torch.autocast(device, BF16):
        y = layer(x)
    backward(y, upstream)
    check("norm", y, x, layer, wanted, exact_x, exact)
    with torch.no_grad():
        read = layer.bfloat16()(x)
    assert read.dtype == BF16
    near(read, wanted, 2 * TOLERANCE["norm"][0])


@on_each_device
@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_far_from_the_start(interleaved, device):
    """At positions whose angles bf16 does not know; a module that was cast keeps its frequencies."""
    x, upstream, positions = (
        random(2, 3, 64, 16).to(BF16),
        random(2, 3, 64, 16, seed=2).to(BF16),
        torch.arange(4000, 4064),
    )
    angles = positions.double()[:, None] * 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)
    exact_x = x.double().requires_grad_()
    pairs = exact_x.unflatten(-1, (8, 2)) if interleaved else torch.stack(exact_x.chunk(2, -1), -1)
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    )
    wanted = backward(turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1), upstream)
    module, x = RotaryEmbedding(16, 10000.0).to(device).bfloat16(), x.to(device).requires_grad_()
    with torch.autocast(device, BF16):
        y = apply_rope(x, *module(positions.to(device)), interleaved)
    backward(y, upstream)
    check("rope", y, x, nn.Identity(), wanted, exact_x, nn.Identity())


def moved(optimizer, p, grads, splits=1, **settings):
    """How far one of PyTorch's own optimizers moves each of the matrices that a parameter holds."""
    cut = lambda t: [part.clone() for m in (t.unbind() if t.ndim == 3 else [t]) for part in m.chunk(splits)]
    pieces = cut(p)
    theirs = optimizer(pieces, **settings)
    for g in grads:
        for piece, part in zip(pieces, cut(g), strict=True):
            piece.grad = part
        theirs.step()
    return torch.cat(pieces).view(p.shape) - p


@on_each_device
def test_optimizer_steps(device, monkeypatch):
    """All shapes of a model at once, stacks among them: how far three steps move every parameter."""
    if device == "cpu":  # compute as a GPU does
        monkeypatch.setattr(muon, "BF16_FROM", 1)
        monkeypatch.setattr(muon, "has_bf16_units", lambda *_: True)
    model = make_model("mla moe").to(device)
    optimizer = build_optimizer(model, make_config(name="muon", weight_decay=0.1))
    before = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}
    grads = {
        name: [random(*p.shape, seed=100 * step + i) for step in range(3)] for i, (name, p) in enumerate(before.items())
    }
    for step in range(3):
        for name, p in model.named_parameters():
            p.grad = grads[name][step].to(device)
        optimizer.step()
    for group in optimizer.param_groups:
        how = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        for name, p in zip(group["param_names"], group["params"], strict=True):
            start, mine = before.pop(name), grads[name]
            ours = p.detach().cpu() - start
            if group["kind"] == "adamw":
                exact = moved(
                    torch.optim.AdamW,
                    start.double(),
                    [g.double() for g in mine],
                    **how,
                    betas=group["betas"],
                    eps=group["eps"],
                    foreach=False,
                )
                near(ours, exact, TOLERANCE["adamw"], name)
            else:
                momentum, scaling, splits = group["momentum"], group["scaling"], group["splits"]
                exact = reference_muon(start, mine, *how.values(), momentum, True, scaling, splits) - start
                theirs = moved(
                    torch.optim.Muon,
                    start.to(device),
                    [g.to(device) for g in mine],
                    splits,
                    **how,
                    momentum=momentum,
                    adjust_lr_fn=scaling,
                )
                near(ours, exact, min(TOLERANCE["muon"], 1.5 * error(theirs, exact)), name)
                near(ours, theirs, TOLERANCE["muon"], name)
    assert not before


@on_each_device
def test_the_whole_model_with_all_parts(device, monkeypatch):
    """Given the same experts; rounding sends few tokens elsewhere by itself."""
    config = tiny(
        KIMI, {"model.dropout": 0.0, "model.attention.implementation": "flash", "model.moe.seq_loss_weight": 0.01}
    ).model.override({"vocab_size": 257})
    tokens = torch.randint(0, 257, (2, 32, 16), generator=torch.Generator().manual_seed(0))
    choose, choices, found = routing.group_limited_topk, [], []
    monkeypatch.setattr(
        routing, "group_limited_topk", lambda *how: choices.append(choose(*how)) or choices[0].to(choices[-1])
    )
    for where, half in (("cpu", False), (device, True)):
        model = redraw(KimiModel(config)).to(where)
        with torch.autocast(where, BF16, enabled=half):
            out = model(*tokens.to(where))
        (out.loss + out.aux_loss).backward()
        found.append((out, {name: p.grad for name, p in model.named_parameters()}))
    (full, grads), (half, half_grads) = found
    full_choice, half_choice = (c.cpu().sort(-1)[0] for c in choices)
    assert (full_choice != half_choice).any(-1).float().mean() < 0.05
    assert half.logits.dtype == BF16 and half.loss.dtype == torch.float32
    near(half.loss, full.loss, TOLERANCE["model"][0])
    near(half.aux_loss, full.aux_loss, TOLERANCE["model"][0])
    for name, g in grads.items():
        near(half_grads[name], g, TOLERANCE["model"][1], name)


@on_each_device
def test_a_run_names_its_machine_and_goes_on_where_it_stopped(device, tmp_path):
    dropout = 0.1 if device == "cuda" else 0.0  # which the CPU's flash kernel refuses
    run = tiny(
        KIMI,
        {
            "train.precision": "bf16",
            "model.attention.implementation": "flash",
            "model.dropout": dropout,
            "train.save_every": 3,
            "train.eval_every": 4,
        },
    )
    whole = fit(run, tmp_path / "whole", device=device, progress=False, threads=1)
    assert (whole.status, whole.provenance["device"], whole.provenance["precision"]) == ("done", device, "bf16")
    assert "flash" in whole.provenance["kernel"] and whole.provenance["expert_backend"] == "grouped"
    if device == "cuda":
        assert (
            whole.provenance["device_name"] == torch.cuda.get_device_name() and "cpu" not in whole.provenance["kernel"]
        )
    with pytest.raises(Stop):
        fit(run, tmp_path / "broken", device=device, progress=False, threads=1, on_step=stop_after(5))
    steps = []
    again = fit(
        run,
        tmp_path / "broken",
        device=device,
        progress=False,
        threads=1,
        on_step=lambda step, line: steps.append(step),
    )
    assert steps == [4, 5, 6, 7, 8] and again.provenance["device"] == device
    if device == "cpu":
        assert numbers(again) == numbers(whole) and again.curves == whole.curves
    for name in ("train_loss", "val_loss"):
        assert again.curves[name]["value"] == pytest.approx(whole.curves[name]["value"], rel=TOLERANCE["resumed"])
    assert again.metrics["val_loss"] == pytest.approx(whole.metrics["val_loss"], rel=TOLERANCE["resumed"])
