"""Linear attentions and networks of mixed layers: causality, forms, caches, costs, clipping, precision."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kimi_nb.config import ConfigError, ModelConfig, RunConfig
from kimi_nb.model import (
    Decoder,
    KimiModel,
    build_attention,
    cache_bytes,
    cache_bytes_per_token,
    costs,
    forward_flops_per_token,
    init_parameters,
    kernel_name,
    measured_forward_flops_per_token,
    state_bytes,
)
from kimi_nb.train import qk_clip_, rows_of, set_logit_tracking

FEW = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=(Phase.generate,)
)
SIZES = dict(kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8, n_latents=2, chunk_size=4)


@st.composite
def linear_configs(draw):
    "A layer of KDA or of its control, of any sizes and gates."
    pick = lambda *values: draw(st.sampled_from(values))
    kind, heads = pick("kda", "kda", "gdn"), pick(1, 2, 3)
    attention = dict(
        kind=kind, linear_heads=pick(None, 2), linear_head_dim=pick(None, 3, 5), conv_kernel=pick(1, 2, 4),
        gate_rank=pick("head", "full", 2),
    )  # fmt: skip
    if kind == "kda":
        attention |= dict(decay_rank=pick("head", "full", 2), decay_bound=pick(None, -5.0))
    return ModelConfig(d_model=4 * heads, n_heads=heads, n_layers=1, max_seq_len=16, attention=attention)


def built(config, length):
    "A layer in float64, its decays from weak to strong, and an input."
    torch.manual_seed(0)
    layer = build_attention(config)
    init_parameters(layer, 3, 1)
    layer = layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(8 if p.ndim > 1 else 1)
        layer.o_norm.weight.normal_(1, 0.3)
        layer.forget_gate.dt_bias += 3
    return layer, torch.randn(2, length, config.d_model, dtype=torch.float64)


@FEW
@given(linear_configs(), st.integers(2, 70), st.data())
def test_no_token_sees_its_future(config, length, data):
    layer, x = built(config, length)
    at = data.draw(st.integers(1, length - 1))
    other = x.clone()
    other[:, at:] = torch.randn_like(other[:, at:])
    x.requires_grad_()
    y = layer(x)
    torch.testing.assert_close(layer(other)[:, :at], y[:, :at], rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(y[:, :at].square().sum(), x)
    assert not grad[:, at:].any() and not torch.equal(layer(other)[:, at:], y[:, at:])


@FEW
@given(linear_configs(), st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_any_pieces_equal_the_whole_and_the_memory_does_not_grow(config, pieces):
    layer, x = built(config, sum(pieces))
    cache, out = layer.new_cache(config, 2, 3, dtype=torch.float64), []
    held = cache.nbytes
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            out.append(layer(piece, cache=cache))
        torch.testing.assert_close(torch.cat(out, 1), layer(x), rtol=0, atol=1e-10)
    assert cache.length == sum(pieces)
    assert (
        cache.nbytes
        == held
        == 2 * cache_bytes(config, sum(pieces), torch.float64)
        == 2 * state_bytes(config, torch.float64)
    )
    assert cache_bytes_per_token(config) == 0


@FEW
@given(linear_configs(), st.sampled_from((1, 2, 15, 32, 33, 50)))
def test_chunks_are_the_definition_forward_and_backward(config, length):
    results = []
    for kernel in ("eager", "sdpa"):
        layer, x = built(config.override({"attention.implementation": kernel}), 1)
        x = torch.randn(2, length, config.d_model, generator=torch.Generator().manual_seed(1)).double()
        y = layer(x, need_weights=True)
        grads = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        results.append([y, layer.last_weights, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_whole_layer_has_the_gradient_of_its_output():
    layer, x = built(ModelConfig(d_model=4, n_heads=2, n_layers=1, attention=dict(kind="kda")), 5)
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(),))
    names = [name for name, _ in layer.named_parameters()]

    def of(*parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (x.detach(),)).sum()

    assert torch.autograd.gradcheck(of, [p.detach().requires_grad_() for p in layer.parameters()])


# --- networks of several kinds ------------------------------------------------------------------------------------


NETWORKS = dict(
    hybrid="kda,kda,kda,mla", control="gdn,mla", turned="mha,kda", latent="latent,gdn", all="mha,kda,latent,gdn",
    pure=None,
)  # fmt: skip


def network(pattern, **more):
    kind = dict(pattern=pattern) if pattern else dict(kind="kda")
    config = dict(d_model=16, n_heads=2, n_layers=4, vocab_size=31, max_seq_len=16, attention=SIZES | kind)
    return KimiModel(ModelConfig(**(config | more)), seed=1).double().eval()


@pytest.mark.parametrize("residual", ["sum", "attention"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_several_kinds_decodes_what_it_computes(name, residual):
    """Causal, and at every position the same through its caches, of whatever kinds they are."""
    pattern = NETWORKS[name]
    more = dict(residual=dict(kind=residual))
    if pattern in ("kda,kda,kda,mla", "gdn,mla"):
        more |= dict(position=dict(kind="nope"))
    model = network(pattern, **more)
    ids = torch.randint(0, 31, (2, 40), generator=torch.Generator().manual_seed(0))
    whole = model(ids).logits.detach()
    changed = ids.clone()
    changed[:, 25:] = (changed[:, 25:] + 1) % 31
    torch.testing.assert_close(model(changed).logits[:, :25].detach(), whole[:, :25], rtol=0, atol=1e-12)
    decoder, cache = Decoder(model), model.make_cache(2, 4)
    pieces = [decoder(ids[:, :3], cache)] + [decoder(ids[:, t : t + 1], cache) for t in range(3, 40)]
    torch.testing.assert_close(torch.stack(pieces, 1), whole[:, 2:], rtol=0, atol=1e-10)
    assert cache.nbytes == 2 * cache_bytes(model.config, 40, torch.float64)
    cache.keep_rows(torch.tensor([1, 0, 1]))
    again = decoder(torch.tensor([[5], [5], [5]]), cache)
    assert torch.equal(again[0], again[2]) and not torch.equal(again[0], again[1])


def test_costs_of_a_hybrid_are_what_its_layers_cost():
    model = network("kda,kda,kda,mla", position=dict(kind="nope"))
    config, found = model.config, costs(model)
    assert found["cache_bytes_per_token"] == (6 + 4) * 4  # one layer of four
    assert found["state_bytes"] == 3 * 4 * (2 * 8 * 8 + 3 * 3 * 16)
    conv = 2 * sum(p.numel() for name, p in model.named_parameters() if "conv1d" in name)
    counted = measured_forward_flops_per_token(copy.deepcopy(model).float(), 16)
    assert counted + conv == pytest.approx(forward_flops_per_token(model, 16), rel=1e-9)
    assert kernel_name(config) == "delta-chunks + torch-flash-cpu"
    assert kernel_name(config.override({"attention.implementation": "eager"})) == "eager"


def test_qk_clip_finds_what_it_can_scale():
    """Layers without logits are passed by; a network that has no others is refused."""
    model = network("kda,mla")
    set_logit_tracking(model)
    before = [p.clone() for p in model.layers[0].parameters()]
    key = model.layers[1].self_attn.kv_b_proj.weight.clone()
    model(torch.arange(10)[None])
    report = qk_clip_(model, 1e-6)
    assert report.n_clipped == 4 and all(map(torch.equal, before, model.layers[0].parameters()))
    assert not torch.equal(key, model.layers[1].self_attn.kv_b_proj.weight)
    clip = {"train.optimizer.name": "muonclip", "model.n_layers": 2}
    sizes = {f"model.attention.{k}": v for k, v in SIZES.items()} | {"model.attention.qk_rope_head_dim": 4}
    base = RunConfig().changed(sizes)
    assert base.changed(clip | {"model.attention.pattern": "kda,mla"}).train.optimizer.name == "muonclip"
    for attention in ({"kind": "kda"}, {"pattern": "kda,gdn"}, {"pattern": "mla,latent", "qk_rope_head_dim": 16}):
        with pytest.raises(ConfigError, match="muonclip is not possible"):
            base.changed(clip | {f"model.attention.{k}": v for k, v in attention.items()})


def test_muon_takes_heads_apart():
    model = network("kda,mla", position=dict(kind="nope"))
    found = rows_of(model, "heads")
    for name in ("q_proj", "k_proj", "v_proj", "g_b_proj"):
        rows = found[f"layers.0.self_attn.{name}.weight"]
        assert rows.blocks == 2 and tuple(rows.splits) == (8,) and rows.apart
    assert not any("conv" in name or "f_a_proj" in name for name in found)


@pytest.mark.parametrize("kind", ["kda", "gdn"])
def test_half_precision_keeps_the_state_wide(kind):
    config = ModelConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=31, max_seq_len=64, attention=dict(kind=kind))
    exact = KimiModel(config, seed=2).eval()
    half = copy.deepcopy(exact).bfloat16()
    ids = torch.arange(60)[None] % 31
    cache = half.make_cache(1, 8)
    with torch.no_grad():
        expected = exact(ids).logits
        assert cache[0].state.dtype == torch.float32 and cache[0].tail.dtype == torch.bfloat16
        assert (half(ids, cache=cache).logits.float() - expected).abs().max() < 0.05
        assert cache.nbytes == cache_bytes(config, 60, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert (exact(ids).logits.float() - expected).abs().max() < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        out = exact(ids, targets=ids)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in exact.parameters() if p.grad is not None)


def test_what_a_linear_layer_has_no_use_for_sleeps():
    run = RunConfig().override({"model.attention.kind": "kda"})
    asleep = run.dormant()
    for name in ("position.kind", "position.theta", "attention.qk_norm", "attention.output_gate"):
        assert f"model.{name}" in asleep
    with pytest.raises(ConfigError, match="would have no effect"):
        run.override({"model.position.kind": "nope"})
    sized = run.override({"model.attention.linear_heads": 2, "model.attention.linear_head_dim": 8})
    with pytest.raises(ConfigError, match="would have no effect"):
        sized.override({"model.n_heads": 2})
    assert run.override({"model.position.kind": "learned"}).model.position.kind == "learned"
    control = RunConfig().override({"model.attention.kind": "gdn"})
    with pytest.raises(ConfigError, match=r"attention.kind kda"):
        control.override({"model.attention.decay_bound": -5.0})
