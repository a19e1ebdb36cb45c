"""Optimizers against float64 references, PyTorch, resumed runs and the real attention modules."""

import json
import math
import re
import subprocess
import sys
import textwrap
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kimi_nb.config import KimiError, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from kimi_nb.model import KimiModel
from kimi_nb.train import (
    Muon,
    attention_modules,
    build_optimizer,
    describe_groups,
    learning_rate,
    load_optimizer_tensors,
    muon,
    newton_schulz,
    optimizer_tensors,
    param_groups,
    polar_express,
    qk_clip_,
    qk_clip_gamma,
    set_logit_tracking,
    set_lr,
)

MLA = dict(kind="mla", kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8)
MODELS = {
    "mha dense tied": dict(),
    "mha learned untied": dict(position=dict(kind="learned"), tie_embeddings=False, ffn=dict(activation="gelu")),
    "mha moe": dict(ffn=dict(kind="moe"), moe=dict(n_experts=4, d_expert=24, n_shared_experts=1)),
    "mha moe relu": dict(ffn=dict(kind="moe", activation="relu"), moe=dict(n_experts=4, d_expert=24)),
    "mla moe": dict(
        attention=MLA | dict(q_lora_rank=10),
        ffn=dict(kind="moe"),
        moe=dict(n_experts=4, d_expert=24, router="noaux_tc"),
        first_dense_layers=1,
    ),
    "mla": dict(attention=MLA),
    "latent": dict(attention=dict(kind="latent", n_latents=2, chunk_size=4)),
    "layernorm with bias": dict(norm=dict(kind="layernorm", bias=True)),
}


def make_model(name="mha moe", **more):
    return KimiModel(
        ModelConfig(
            **(dict(d_model=32, n_layers=2, n_heads=4, d_ff=48, vocab_size=40, max_seq_len=16) | MODELS[name] | more)
        )
    )


def make_config(lr=1e-2, **optimizer):
    return TrainConfig(lr=lr, optimizer=OptimizerConfig(**optimizer))


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(0, 40, (4, 17), generator=generator)
        optimizer.zero_grad(set_to_none=True)
        out = model(tokens[:, :-1], targets=tokens[:, 1:])
        (out.loss + out.aux_loss).backward()
        optimizer.step()
    return out.loss.item()


def orthogonalised(matrix, steps=5):
    """The polynomial on the singular values, in float64: shares nothing with the iteration on matrices."""
    U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / (s.square().sum().sqrt() + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return U * s @ Vh


def reference_muon(p, grads, lr, decay, mu, nesterov, scaling, cut=1):
    p, buffer = p.double(), torch.zeros_like(p, dtype=torch.float64)
    for g in grads:
        buffer = mu * buffer + (1 - mu) * g.double()
        u = mu * buffer + (1 - mu) * g.double() if nesterov else buffer
        p = p * (1 - lr * decay)
        experts = []
        for pe, ue in zip(p.unbind() if p.ndim == 3 else [p], u.unbind() if u.ndim == 3 else [u], strict=True):
            rows, cols = ue.shape[0] // cut, ue.shape[1]
            factor = math.sqrt(max(1, rows / cols)) if scaling == "original" else 0.2 * math.sqrt(max(rows, cols))
            experts.append(pe - lr * factor * torch.cat([orthogonalised(part) for part in ue.split(rows)]))
        p = torch.stack(experts) if p.ndim == 3 else experts[0]
    return p


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-7), (torch.float32, 2e-4)])
@pytest.mark.parametrize("scaling", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_the_float64_reference(dtype, tolerance, scaling, nesterov):
    torch.manual_seed(0)
    cases = [((12, 12), 1), ((12, 5), 1), ((5, 12), 1), ((7, 40), 1), ((3, 8, 6), 1), ((3, 8, 6), 2), ((18, 6), 3)]
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape, _ in cases]
    start = [p.detach().clone() for p in params]
    optimizer = Muon(
        [dict(params=[p], splits=cut) for p, (_, cut) in zip(params, cases, strict=True)],
        lr=0.05,
        weight_decay=0.3,
        momentum=0.9,
        nesterov=nesterov,
        scaling=scaling,
    )
    grads = []
    for _ in range(4):
        grads.append([torch.randn_like(p) for p in params])
        for p, g in zip(params, grads[-1], strict=True):
            p.grad = g.clone()
        optimizer.step()
    for i, (p, (_, cut)) in enumerate(zip(params, cases, strict=True)):
        expected = reference_muon(start[i], [g[i] for g in grads], 0.05, 0.3, 0.9, nesterov, scaling, cut)
        torch.testing.assert_close(p.detach().double(), expected, atol=tolerance, rtol=0)


def polynomial(matrix, coefficients):
    """Polynomials on the singular values, in float64."""
    U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / (s.square().sum().sqrt() + 1e-7)
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return U * s @ Vh


def reference_variant(variant, p, grads, lr, decay):
    """Muon's relatives as their papers write them, momentum 0 (the update is the gradient), `original` scaling."""
    p, v = p.double(), None
    for g in grads:
        move = -lr * max(1, p.shape[0] / p.shape[1]) ** 0.5
        if variant == "polar_express":
            p = p * (1 - lr * decay) + move * polynomial(g, polar_express(5))
        elif variant == "cautious":
            step = move * orthogonalised(g)
            p = p + step - lr * decay * p * ((step * p) <= 0)
        else:
            done = orthogonalised(g)
            rows = (move / lr * done).square().mean(1, keepdim=True)
            v = 0.05 * rows if v is None else 0.95 * v + 0.05 * rows
            level = done / v.sqrt()
            p = p * (1 - lr * decay) + move * level * done.norm() / level.norm()
    return p


@pytest.mark.parametrize("variant", ["normuon", "polar_express", "cautious"])
@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (10, 5)])
def test_variants_of_muon_are_what_their_papers_say(variant, shape):
    torch.manual_seed(1)
    p = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    start, grads = p.detach().clone(), [torch.randn(shape, dtype=torch.float64) for _ in range(4)]
    optimizer = Muon([dict(params=[p], variant=variant)], lr=0.05, weight_decay=0.3, momentum=0.0)
    for g in grads:
        p.grad = g
        optimizer.step()
    torch.testing.assert_close(p.detach(), reference_variant(variant, start, grads, 0.05, 0.3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", ["none", "normuon", "polar_express", "cautious"])
@given(st.lists(st.sets(st.integers(0, 2)), min_size=1, max_size=5))
@settings(max_examples=12, deadline=None)
def test_experts_without_a_token_rest_or_drift(variant, steps):
    """At rest an expert has the weights and momentum of an optimizer that saw only the steps in which it was used."""

    def trained(choice, used, only=None):
        torch.manual_seed(2)
        p = torch.nn.Parameter(torch.randn(3, 4, 6, dtype=torch.float64))
        muon = Muon([dict(params=[p], variant=variant, idle_experts=choice)], lr=0.05, weight_decay=0.3)
        for at, experts in enumerate(used):
            grads = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(at))
            p.grad = torch.zeros_like(p)
            p.grad[list(experts)] = grads[list(experts)]
            if only is None or only in experts:
                muon.step()
        return p.detach(), muon.state[p].get("momentum_buffer", torch.zeros_like(p))

    weights, momentum = trained("rest", steps)
    for expert in range(3):
        alone, past = trained("drift", steps, only=expert)
        assert torch.equal(weights[expert], alone[expert]) and torch.equal(momentum[expert], past[expert])
    if all(experts == {0, 1, 2} for experts in steps):
        assert torch.equal(weights, trained("drift", steps)[0])


def test_what_becomes_of_idle_experts_reaches_the_optimizer_from_the_settings():
    """A run's bits and name are as before the choice existed, unless it is made."""
    model = KimiModel(ModelConfig(vocab_size=20, ffn=dict(kind="moe"), moe=dict(n_experts=4, d_expert=16)), seed=0)
    choices = {g["idle_experts"] for g in build_optimizer(model, make_config(name="muon")).optimizers[0].param_groups}
    assert choices == {"drift"}
    optimizer = build_optimizer(model, make_config(name="muon", idle_experts="rest"))
    assert {g["idle_experts"] for g in optimizer.optimizers[0].param_groups} == {"rest"}
    run = RunConfig.preset("nano")
    assert run.run_id == run.override({"train.optimizer.idle_experts": "drift"}).run_id
    assert run.run_id != run.override({"train.optimizer.idle_experts": "rest"}).run_id


def test_a_variants_state_is_saved_and_read():
    """The rows' squares of NorMuon go through a checkpoint's tensors; the next step is the same."""
    config = make_config(name="muon", variant="normuon")
    models = [make_model() for _ in range(2)]
    optimizers = [build_optimizer(model, config) for model in models]
    train(models[0], optimizers[0], 2)
    models[1].load_state_dict(models[0].state_dict())
    tensors, meta = optimizer_tensors(optimizers[0])
    assert any(name.endswith("row_squares") for name in tensors)
    load_optimizer_tensors(optimizers[1], {k: v.clone() for k, v in tensors.items()}, meta)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 1, seed=3)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_wsd_is_level_and_then_falls_in_a_line():
    """Hu et al. 2024 (arXiv 2404.06395): warm-up, a long level, and a fall in the last share of the steps."""
    c = TrainConfig(steps=50, lr=1.0, min_lr=0.0, warmup_steps=5, schedule="wsd", decay_fraction=0.2)
    rates = [learning_rate(step, c) for step in range(50)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and set(rates[5:40]) == {1.0}
    assert rates[40:] == pytest.approx([1 - (i + 1) / 10 for i in range(10)])
    assert learning_rate(80, c) == 0.0


def test_unequal_splits_are_orthogonalised_apart():
    p, g = torch.zeros(10, 4, dtype=torch.float64), torch.randn(10, 4, dtype=torch.float64)
    p.grad = g
    Muon([dict(params=[p], splits=(6, 2, 2))], lr=1.0, momentum=0.0, scaling="match_rms_adamw").step()
    expected = torch.cat([0.2 * math.sqrt(max(len(part), 4)) * orthogonalised(part) for part in g.split((6, 2, 2))])
    torch.testing.assert_close(p, -expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32), (16, 160)])
def test_newton_schulz_and_torch_muon_agree_within_bf16(shape):
    """torch.optim.Muon computes in bf16; its distance from the float64 answer bounds what can be asked."""
    torch.manual_seed(1)
    g = torch.randn(shape)
    theirs = torch.zeros(shape)
    theirs.grad = g.clone()
    torch.optim.Muon([theirs], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    theirs = -theirs / (0.2 * math.sqrt(max(shape)))
    exact = orthogonalised(g)
    bf16_error = (theirs - exact).norm() / exact.norm()
    assert (newton_schulz(g) - exact).norm() / exact.norm() < 1e-4 < bf16_error < 0.03
    ours = newton_schulz(g, dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert (ours - theirs).norm() / exact.norm() < 0.03


def test_large_matrices_take_bf16_only_where_the_processor_has_units_for_it(monkeypatch):
    """Small ones, and any on another processor, are computed in fp32; float64 stays what it is."""
    small, large = torch.randn(64, 512), torch.randn(muon.BF16_FROM, 300)
    for units in (True, False):
        monkeypatch.setattr(muon, "has_bf16_units", lambda kind, index=None, units=units: units)
        assert newton_schulz(small).dtype == torch.float32
        assert newton_schulz(large).dtype == (torch.bfloat16 if units else torch.float32)
        assert newton_schulz(large.double()).dtype == torch.float64
        assert (newton_schulz(large).double() - orthogonalised(large.double())).norm() / 16 < 0.03


@pytest.mark.parametrize("units", [(), ("_is_amx_tile_supported",), ("_is_avx512_bf16_supported",)], ids=str)
def test_a_processor_multiplies_in_bf16_by_either_of_two_units(units, monkeypatch):
    """Tiles as Intel has them, or the AVX-512 instructions that AMD has too; without either, bf16 is slow."""
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in units, raising=False)
    assert muon.has_bf16_units.__wrapped__("cpu") == bool(units)


@pytest.mark.parametrize("steps", [6, 12, 20])
def test_many_steps_on_low_rank_stay_bounded(steps):
    """Where rounding in the null space has grown to size, a singular value is still in the polynomial's band."""
    torch.manual_seed(0)
    G = torch.randn(2, 24, 2) @ torch.randn(2, 96)
    assert torch.linalg.svdvals(newton_schulz(G, steps)).max() < 1.3
    full = torch.randn(8, 24, dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(full, steps), orthogonalised(full, steps), atol=1e-6, rtol=0)


def test_one_batched_call_per_shape(monkeypatch):
    """All layers' matrices of one shape, tall or wide, in one group or several, are one batch."""
    calls = []
    monkeypatch.setattr(
        muon, "newton_schulz", lambda G, *a, **k: calls.append(tuple(G.shape)) or newton_schulz(G, *a, **k)
    )
    params = [torch.randn(s) for s in [(8, 8)] * 5 + [(16, 8), (8, 16), (3, 8, 8), (2, 32, 8)]]
    for p in params:
        p.grad = torch.randn_like(p)
    Muon([dict(params=params[:4], lr=1e-3), dict(params=params[4:-1]), dict(params=params[-1:], splits=2)]).step()
    assert sorted(calls) == [(6, 8, 16), (8, 8, 8)]


def test_no_gradient_moves_nothing_and_zero_gradient_only_decays():
    p, q = torch.ones(4, 4), torch.ones(4, 4)
    q.grad = torch.zeros(4, 4)
    Muon([p, q], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(p, torch.ones(4, 4))
    assert torch.allclose(q, torch.full((4, 4), 0.95))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Muon([torch.zeros(3)]), "shape (3,)"),
        (lambda: Muon([dict(params=[torch.zeros(5, 3)], splits=2)]), "cannot be cut into splits 2"),
        (lambda: Muon([torch.zeros(3, 3)], scaling="best"), "one of original, match_rms_adamw"),
        (lambda: Muon([torch.zeros(3, 3)], momentum=1.0), "momentum 1.0"),
        (lambda: Muon([torch.zeros(3, 3)], lr=-1), "lr -1"),
        (lambda: build_optimizer(torch.nn.LayerNorm(4), make_config(name="muon")), "finds no hidden matrix"),
        (lambda: build_optimizer(torch.nn.Identity(), make_config()), "no parameter"),
        (lambda: qk_clip_(make_model(), 1.0), "set_logit_tracking"),
    ],
)
def test_refusals_are_one_line(make, words):
    with pytest.raises(KimiError, match=re.escape(words)) as caught:
        make()
    assert "\n" not in str(caught.value)


HIDDEN = re.compile(
    r"layers\.\d+\.(self_attn\.\w+_proj(_with_mqa)?\.weight|mlp\.((shared_experts\.)?(gate|up|down)_proj\.weight|experts\.(gate_up|up|down)_proj))"
)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["adam", "adamw", "muon", "muonclip"])
def test_every_parameter_is_in_one_right_group(name, kind):
    model = make_model(name)
    groups = param_groups(model, make_config(name=kind, weight_decay=0.1))
    where = {n: g for g in groups for n, _ in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(where)
    assert where.keys() == {n for n, _ in model.named_parameters()}
    assert len({g["name"] for g in groups}) == len(groups)
    for n, p in model.named_parameters():
        expected = "muon" if kind.startswith("muon") and HIDDEN.fullmatch(n) else "adam" if kind == "adam" else "adamw"
        assert where[n]["kind"] == expected, n
        assert where[n]["weight_decay"] == (0.1 if p.ndim >= 2 else 0.0), n
        assert where[n].get("splits", 1) == (2 if expected == "muon" and n.endswith("gate_up_proj") else 1), n
    optimizer = build_optimizer(model, make_config(name=kind))
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        p.numel() for p in model.parameters()
    )
    assert describe_groups(optimizer).count("|") == len(groups) - 1


def test_described_in_words():
    text = describe_groups(
        build_optimizer(make_model("mha moe"), make_config(lr=1e-3, name="muon", expert_lr_scale=0.5))
    )
    assert "muon: 14 matrices, 12.8K parameters, lr 0.001, decay 0.01" in text
    assert "muon fused experts: 16 matrices, 12.3K parameters, lr 0.0005, decay 0.01" in text
    assert "adamw without decay: " in text


def test_frozen_parameters_are_left_out():
    model = make_model()
    model.embed_tokens.weight.requires_grad_(False)
    assert "embed_tokens.weight" not in {n for g in param_groups(model, make_config()) for n, _ in g["params"]}


@pytest.mark.parametrize(
    "base, change",
    [
        ("adam", dict(weight_decay=0.5)),
        ("adamw", dict(weight_decay=0.5)),
        ("adamw", dict(betas=(0.8, 0.9))),
        ("adamw", dict(expert_lr_scale=0.5)),
        ("adamw", dict(name="adam")),
        ("adamw", dict(name="muon")),
        ("muon", dict(weight_decay=0.5)),
        ("muon", dict(momentum=0.5)),
        ("muon", dict(ns_steps=3)),
        ("muon", dict(scaling="original")),
        ("muon", dict(muon_router=True)),
        ("muon", dict(betas=(0.8, 0.9))),
        ("muon", dict(expert_lr_scale=0.5)),
        ("adam", dict(embed_lr_scale=4.0)),
        ("adamw", dict(embed_lr_scale=4.0)),
        ("muon", dict(embed_lr_scale=4.0)),
        ("muon", dict(muon_split="heads")),
    ],
)
def test_every_setting_changes_the_training(base, change):
    model, other = make_model(), make_model()
    train(model, build_optimizer(model, make_config(name=base, weight_decay=0.01)), 3)
    train(other, build_optimizer(other, make_config(**(dict(name=base, weight_decay=0.01) | change))), 3)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_expert_learning_rate_is_that_of_experts_only():
    model = make_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, make_config(name="muon", expert_lr_scale=1e-9, weight_decay=0.0))
    set_lr(optimizer, 0.01)
    train(model, optimizer, 1)
    for n, p in model.named_parameters():
        assert (".experts." in n) == (p - before[n]).abs().max().lt(1e-7).item(), n


@pytest.mark.parametrize("kind", ["adam", "adamw", "muon", "muonclip"])
@pytest.mark.parametrize("name", ["mha dense tied", "mha learned untied"])
def test_embedding_learning_rate_is_that_of_embeddings_and_head_only(name, kind):
    """Tokens, positions and head, tied or not; with every optimizer, and the schedule leaves the ratio alone."""
    model, other = make_model(name), make_model(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    how = dict(name=kind, weight_decay=0.0)
    optimizer = build_optimizer(model, make_config(embed_lr_scale=1e-9, **how))
    set_lr(optimizer, 0.01)
    train(model, optimizer, 1)
    train(other, build_optimizer(other, make_config(lr=0.01, **how)), 1)
    for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if n.startswith(("embed_", "lm_head")):
            assert (p - before[n]).abs().max() < 1e-7 < (q - before[n]).abs().max(), n
        else:
            assert torch.equal(p, q), n
    groups = [g for g in optimizer.param_groups if "embeddings" in g["name"]]
    assert [g["lr"] for g in groups] == [pytest.approx(1e-11)]


def slices(name, p, model, split):
    """(row indices) of the matrices of a parameter of attention that are orthogonalised apart, written out by hand."""
    a, H, rows = model.config.attention, model.config.n_heads, torch.arange(p.shape[0])
    leaf = name.split(".")[-2]
    sizes = {
        "q_proj": (a.qk_nope_head_dim, a.qk_rope_head_dim),
        "q_b_proj": (a.qk_nope_head_dim, a.qk_rope_head_dim),
        "kv_b_proj": (a.qk_nope_head_dim, a.v_head_dim),
    }
    if a.kind != "mla":
        heads = rows.view(H, -1)
        return list(heads) if split == "heads" and leaf in ("q_proj", "k_proj", "v_proj") else [rows]
    if leaf == "kv_a_proj_with_mqa" and split != "fused":
        return [rows[: a.kv_lora_rank], rows[a.kv_lora_rank :]]
    if leaf not in sizes or split == "fused":
        return [rows]
    of_head = rows.view(H, -1).split(sizes[leaf], 1)  # (H, rows of the part) each
    return [head for part in of_head for head in part] if split == "heads" else [part.flatten() for part in of_head]


@pytest.mark.parametrize("split", ["fused", "parts", "heads"])
@pytest.mark.parametrize("name", ["mla", "mla moe", "mha dense tied", "latent"])
@pytest.mark.parametrize("scaling", ["original", "match_rms_adamw"])
def test_muon_takes_attention_apart_as_the_float64_reference_does(name, split, scaling):
    """Every row of every projection, and the number of matrices that is said."""
    model = make_model(name).double()
    config = make_config(lr=0.1, name="muon", muon_split=split, scaling=scaling, momentum=0.0, weight_decay=0.0)
    optimizer = build_optimizer(model, config)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.manual_seed(3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    n_matrices = 0
    for n, p in model.named_parameters():
        if ".self_attn." not in n or not HIDDEN.fullmatch(n):
            continue
        expected = before[n].clone()
        for rows in slices(n, p, model, split):
            shape = (len(rows), p.shape[1])
            factor = math.sqrt(max(1, shape[0] / shape[1])) if scaling == "original" else 0.2 * math.sqrt(max(shape))
            expected[rows] -= 0.1 * factor * orthogonalised(p.grad[rows])
            n_matrices += 1
        torch.testing.assert_close(p.detach(), expected, atol=1e-6, rtol=0, msg=n)
    assert n_matrices == {
        ("mla", "fused"): 8, ("mla", "parts"): 14, ("mla", "heads"): 38,
        ("mla moe", "fused"): 10, ("mla moe", "parts"): 16, ("mla moe", "heads"): 40,
    }.get((name, split), 8 if split != "heads" else 26)  # fmt: skip
    told = describe_groups(optimizer)
    assert (" apart" in told) == (split == "heads")
    assert ("+" in told) == ("mla" in name and split != "fused")


def test_a_split_that_does_not_fit_is_refused():
    """Blocks and sizes must fill the rows."""
    for how in (dict(blocks=3), dict(blocks=2, splits=(2, 1)), dict(blocks=2, splits=3)):
        with pytest.raises(KimiError, match=r"cannot be cut into splits .* in . blocks: they must fill its 8 rows"):
            Muon([dict(params=[torch.zeros(8, 3)], **how)])


def test_adamw_beside_original_muon_steps_as_far_as_match_rms_adamw():
    """In square matrices both scalings are one optimizer, up to what the learning rate means."""
    lr = 0.2 * 32**0.5 * 1e-3
    finals = []
    for scaling, rate in (("match_rms_adamw", 1e-3), ("original", lr)):
        model = make_model("mha dense tied", d_ff=32)
        train(model, build_optimizer(model, make_config(lr=rate, name="muon", scaling=scaling, weight_decay=0.0)), 3)
        finals.append(model)
    for (n, a), (_, b) in zip(finals[0].named_parameters(), finals[1].named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=n)


@pytest.mark.parametrize("kind", ["adam", "adamw", "muon", "muonclip"])
def test_resumed_from_a_file_it_steps_bitwise_alike(kind, tmp_path):
    config = make_config(name=kind, expert_lr_scale=0.5)
    model = make_model("mla moe")
    optimizer = build_optimizer(model, config)
    train(model, optimizer, 3)
    set_lr(optimizer, 3e-3)
    tensors, meta = optimizer_tensors(optimizer)
    save_file(tensors, tmp_path / "optimizer.safetensors")
    meta = json.dumps(meta)
    resumed = make_model("mla moe")
    resumed.load_state_dict(model.state_dict())
    other = build_optimizer(resumed, config)
    load_optimizer_tensors(other, load_file(tmp_path / "optimizer.safetensors"), json.loads(meta))
    plain = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert plain == [{k: v for k, v in g.items() if k != "params"} for g in other.param_groups]
    again, _ = optimizer_tensors(other)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k], tensors[k]) and again[k].dtype == tensors[k].dtype for k in tensors)
    load_optimizer_tensors(other, tensors, json.loads(meta))  # from memory: a copy, or both would go on sharing it
    assert not {t.data_ptr() for t in optimizer_tensors(other)[0].values()} & {t.data_ptr() for t in tensors.values()}
    train(model, optimizer, 3, seed=1)
    train(resumed, other, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    # and through torch's own state_dict
    third = make_model("mla moe")
    third.load_state_dict(model.state_dict())
    copy = build_optimizer(third, config)
    copy.load_state_dict(deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2, seed=2)
    train(third, copy, 2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), third.parameters(), strict=True))


def test_state_of_another_run_is_refused():
    model = make_model()
    optimizer = build_optimizer(model, make_config(name="muon"))
    train(model, optimizer, 1)
    tensors, meta = optimizer_tensors(optimizer)
    with pytest.raises(KimiError, match="grouped differently"):
        load_optimizer_tensors(build_optimizer(make_model(), make_config(name="adamw")), tensors, meta)
    with pytest.raises(KimiError, match="in one only"):
        load_optimizer_tensors(build_optimizer(make_model("mha dense tied"), make_config(name="muon")), tensors, meta)
    with pytest.raises(KimiError, match="has shape"):
        load_optimizer_tensors(build_optimizer(make_model(vocab_size=41), make_config(name="muon")), tensors, meta)
    with pytest.raises(KimiError, match="belongs to no parameter"):
        load_optimizer_tensors(optimizer, tensors | {"ghost.weight/exp_avg": torch.zeros(2)}, meta)


def test_training_works_and_gradscaler_can_drive_it():
    """fp16 training scales gradients: a good step is the plain step, a step with an overflow is skipped whole."""
    losses = {}
    for kind in ("adam", "adamw", "muon"):
        model = make_model()
        optimizer = build_optimizer(model, make_config(lr=3e-3, name=kind))
        first = train(model, optimizer, 1)
        for _ in range(15):
            losses[kind] = train(model, optimizer, 1)
        assert losses[kind] < first - 0.3, (kind, first, losses[kind])
    plain, scaled = make_model(), make_model()
    a, b = build_optimizer(plain, make_config(name="muon")), build_optimizer(scaled, make_config(name="muon"))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    train(plain, a, 1)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 40, (4, 17), generator=generator)

    def scaled_step(poison=False):
        b.zero_grad(set_to_none=True)
        out = scaled(tokens[:, :-1], targets=tokens[:, 1:])
        scaler.scale(out.loss + out.aux_loss).backward()
        if poison:
            scaled.norm.weight.grad[0] = math.inf
        scaler.unscale_(b)
        scaler.step(b)
        scaler.update()

    scaled_step()
    for x, y in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-3)
    before = [p.detach().clone() for p in scaled.parameters()]
    scaled_step(poison=True)
    assert all(torch.equal(x, y) for x, y in zip(before, scaled.parameters(), strict=True))


def nanogpt_lr(it, lr, min_lr, warmup_iters, lr_decay_iters):
    """get_lr of nanoGPT's train.py, past its warm-up."""
    if it > lr_decay_iters:
        return min_lr
    ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (lr - min_lr)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_schedule_properties(data):
    steps = data.draw(st.integers(1, 300))
    warmup = data.draw(st.integers(0, steps))
    lr = data.draw(st.floats(1e-6, 1.0))
    min_lr = data.draw(st.one_of(st.none(), st.floats(0, 1).map(lambda f: f * lr)))
    schedule = data.draw(st.sampled_from(["cosine", "linear", "constant", "wsd"]))
    c = TrainConfig(steps=steps, warmup_steps=warmup, lr=lr, min_lr=min_lr, schedule=schedule)
    lrs = [learning_rate(s, c) for s in range(steps)]
    slack = 1e-12 * lr
    assert all(min(c.end_lr, lr / max(1, warmup)) - slack <= x <= lr + slack for x in lrs)
    assert lrs[0] > 0 or min_lr == 0
    assert all(a < b for a, b in pairwise(lrs[:warmup]))
    assert all(a >= b - slack for a, b in pairwise(lrs[warmup:]))
    if warmup:
        assert math.isclose(lrs[0], lr / warmup)
        assert math.isclose(lrs[warmup - 1], lr)
    if steps - 1 > warmup:
        assert math.isclose(lrs[-1], lr if schedule == "constant" else c.end_lr, abs_tol=slack)
        if schedule == "cosine":
            assert all(
                math.isclose(lrs[s], nanogpt_lr(s, lr, c.end_lr, warmup, steps - 1), abs_tol=slack)
                for s in range(warmup, steps)
            )
    past = learning_rate(steps + 50, c)
    assert past == lr if schedule == "constant" else math.isclose(past, c.end_lr, abs_tol=slack)


def test_set_lr_keeps_the_groups_ratios():
    optimizer = build_optimizer(make_model(), make_config(name="muon", scaling="original", expert_lr_scale=0.25))
    set_lr(optimizer, 0.5)
    for group in optimizer.param_groups:
        beside = 1.0 if group["kind"] == "muon" else 5 / 32**0.5
        assert group["lr"] == pytest.approx(0.5 * min(1.0, beside) * (0.25 if "experts" in group["name"] else 1.0))


# QK-clip on the real attention modules


def exploding(name, implementation, scale=30.0):
    spec = MODELS[name]
    model = make_model(name, attention=spec.get("attention", {}) | dict(implementation=implementation))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".self_attn." in n and "norm" not in n and p.ndim == 2 and "o_proj" not in n:
                p.mul_(scale if n.startswith("layers.0") else 1.0)
    return model.eval()


@pytest.mark.parametrize("name", ["mha dense tied", "mla", "mla moe"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_qk_clip_fires_on_exploded_heads_and_then_is_quiet(name, implementation):
    model = exploding(name, implementation)
    assert len(attention_modules(model)) == 2
    set_logit_tracking(model)
    tokens = torch.randint(0, 40, (6, 16), generator=torch.Generator().manual_seed(0))

    def seen():
        for part in tokens.split(2):
            model(part)
        return torch.cat([m.logit_max.clone() for _, m in attention_modules(model)])

    before = seen()
    tau = before[:4].median().item()
    assert before[:4].max() > tau > before[4:].max(), "the first layer must explode and the second must not"
    weights = {n: p.clone() for n, p in model.named_parameters()}
    report = qk_clip_(model, tau)
    first, second = report.per_layer.values()
    assert report.n_heads == 8
    assert report.n_clipped == first["n_clipped"] == int((before > tau).sum())
    assert second == dict(n_clipped=0, max_logit=pytest.approx(before[4:].max().item()), min_gamma=1.0)
    assert report.max_logit == pytest.approx(before.max().item())
    assert report.min_gamma == pytest.approx(tau / before.max().item())
    assert all(
        torch.equal(p, weights[n]) for n, p in model.named_parameters() if not n.startswith("layers.0.self_attn")
    )
    assert all(m.logit_max.max() == -math.inf for _, m in attention_modules(model))
    # the first layer's input has not changed: its heads stand exactly at the threshold, the others where they were
    torch.testing.assert_close(seen()[:4], before[:4].clamp(max=tau), rtol=1e-4, atol=1e-4)
    assert qk_clip_(model, tau * 1.001).n_clipped == 0


@torch.no_grad()
def test_qk_clip_leaves_a_small_model_bitwise_alone_and_survives_overflow():
    model = make_model("mla")
    weights = [p.clone() for p in model.parameters()]
    set_logit_tracking(model)
    model(torch.arange(16)[None])
    report = qk_clip_(model, 100.0)
    assert (report.n_clipped, report.min_gamma) == (0, 1.0)
    assert -math.inf < report.max_logit < 100
    attention_modules(model)[0][1].logit_max = torch.tensor([math.inf, math.nan, 1.0, 2.0])
    assert qk_clip_(model, 100.0).n_clipped == 0
    assert qk_clip_(model, 100.0).max_logit == -math.inf
    assert qk_clip_gamma(torch.tensor([math.inf, math.nan, 200.0, 2.0]), 100.0).tolist() == [1.0, 1.0, 0.5, 1.0]
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


RANKS = """
    import sys, torch, torch.distributed as dist
    from kimi_nb.config import ModelConfig
    from kimi_nb.model import KimiModel
    from kimi_nb.train import attention_modules, qk_clip_, set_logit_tracking
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
    model = KimiModel(ModelConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=40, max_seq_len=16))
    set_logit_tracking(model)
    for i, (_, m) in enumerate(attention_modules(model)):
        m.logit_max = torch.tensor([200.0, 1.0, 1.0, 1.0]) if rank == i else torch.ones(4)
    report = qk_clip_(model, 100.0)
    layers = [x["n_clipped"] for x in report.per_layer.values()]
    weight = round(sum(p.double().abs().sum().item() for p in model.parameters()), 9)
    print(report.n_clipped, report.max_logit, report.min_gamma, *layers, weight)
    dist.destroy_process_group()
"""


def test_qk_clip_takes_the_maximum_over_ranks(tmp_path, repo):
    """Each rank saw another head explode: both must clip both, and stay identical."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(RANKS), str(r), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=repo,
        )
        for r in range(2)
    ]
    outs = [p.communicate(timeout=120) for p in ranks]
    assert all(p.returncode == 0 for p in ranks), outs[0][1] + outs[1][1]
    assert outs[0][0] == outs[1][0]
    assert outs[0][0].startswith("2 200.0 0.5 1 1 ")


def test_every_shape_of_matrices_has_its_graph(monkeypatch):
    """Dynamo by itself stops after eight: a network of Kimi K3's parts has more, and would go on uncompiled."""
    real = torch.compile
    torch._dynamo.reset()
    muon._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, **how, backend="eager", fullgraph=True))
    for n in range(1, 10):
        G = torch.randn(n, 4, 6, generator=torch.Generator().manual_seed(n))
        torch.testing.assert_close(muon.compiled_newton_schulz(G), muon.newton_schulz(G, dtype=muon.ns_dtype(G)))
    muon._compiled.cache_clear()
    torch._dynamo.reset()
