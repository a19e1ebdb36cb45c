"""The model: what it computes, what it shares between arms, and what it says it costs."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_nb.config import ConfigError, KimiError, ModelConfig
from kimi_nb.model import (
    KimiConfig,
    KimiModel,
    count_parameters,
    forward_flops_per_token,
    measured_forward_flops_per_token,
)

SIZES = dict(kv_lora_rank=16, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8)


@st.composite
def configs(draw):
    kind = draw(st.sampled_from(["mha", "mla", "latent"]))
    position = draw(st.sampled_from(["rope", "learned"])) if kind != "mla" else "rope"
    router = draw(st.sampled_from(["standard", "aux_tc", "noaux_tc"]))
    groups = 2 if router != "standard" and draw(st.booleans()) else 1
    layers = draw(st.integers(1, 3))
    moe = draw(st.booleans())
    return ModelConfig(
        d_model=32,
        n_heads=draw(st.sampled_from([2, 4])),
        n_layers=layers,
        d_ff=draw(st.sampled_from([None, 24])),
        vocab_size=50,
        max_seq_len=24,
        tie_embeddings=draw(st.booleans()),
        first_dense_layers=draw(st.integers(0, layers)) if moe else 0,
        norm=dict(kind=draw(st.sampled_from(["layernorm", "rmsnorm"]))),
        position=dict(kind=position),
        attention=dict(
            kind=kind,
            implementation=draw(st.sampled_from(["eager", "sdpa"])),
            qk_norm=kind != "mla" and draw(st.booleans()),
            q_lora_rank=draw(st.sampled_from([None, 8])),
            chunk_size=5,
            n_latents=2,
            **SIZES,
        ),
        ffn=dict(kind="moe" if moe else "dense", activation=draw(st.sampled_from(["swiglu", "silu", "gelu", "relu"]))),
        moe=dict(
            router=router,
            n_experts=4,
            top_k=draw(st.integers(1, 2)),
            d_expert=draw(st.sampled_from([None, 16])),
            n_shared_experts=draw(st.integers(0, 1)),
            n_group=groups,
            topk_group=1,
        ),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configs(), st.integers(0, 99))
def test_every_configuration_trains_a_step_and_sees_no_future(config, seed):
    torch.manual_seed(0)
    model = KimiModel(config, seed=seed)
    ids = torch.randint(0, 50, (2, 13))
    out = model(ids[:, :-1], targets=ids[:, 1:])
    (out.loss + out.aux_loss).backward()
    assert out.logits.shape == (2, 12, 50) and abs(out.loss.item() - math.log(50)) < 0.5
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not unused
    changed = ids[:, :-1].clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50
    model.eval()
    with torch.no_grad():
        a, b = model(ids[:, :-1]).logits, model(changed).logits
    assert torch.allclose(a[:, :-1], b[:, :-1], atol=1e-5) and not torch.allclose(a[:, -1], b[:, -1], atol=1e-5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configs(), configs())
def test_two_configurations_share_what_they_share_by_name(one, other):
    a, b = (dict(KimiModel(c, seed=5).named_parameters()) for c in (one, other))
    shared = [
        n
        for n in a.keys() & b.keys()
        if a[n].shape == b[n].shape
        and not (one.n_layers != other.n_layers and n.endswith(("o_proj.weight", "down_proj.weight", "down_proj")))
    ]
    assert "embed_tokens.weight" in shared and all(torch.equal(a[n], b[n]) for n in shared)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configs())
def test_the_formula_counts_the_flops_that_run(config):
    config = config.override(
        {"attention.implementation": "eager"} | ({"attention.kind": "mha"} if config.attention.kind == "latent" else {})
    )
    model = KimiModel(config, seed=0).eval()
    if model.moe_layers():
        return  # grouped products are not known to the counter: see the next test
    assert measured_forward_flops_per_token(model, 24) == pytest.approx(forward_flops_per_token(model, 24), rel=0.02)


def test_active_experts_cost_what_dense_layers_of_their_width_cost():
    moe = ModelConfig(vocab_size=50, ffn=dict(kind="moe"), moe=dict(n_experts=8, top_k=2, d_expert=48))
    dense = ModelConfig(vocab_size=50, d_ff=96)
    a, b = (forward_flops_per_token(KimiModel(c), 64) for c in (moe, dense))
    assert a - b == 2 * 2 * 8 * 64  # the router of two layers
    assert count_parameters(KimiModel(moe))["active"] - count_parameters(KimiModel(dense))["total"] == 2 * 8 * 64


def test_the_active_flops_of_experts_as_counted_with_batched_products(monkeypatch):
    from kimi_nb.model import experts

    monkeypatch.setattr(experts, "expert_backend", lambda *a, **how: "batched")
    model = KimiModel(
        ModelConfig(
            vocab_size=50,
            attention=dict(implementation="eager"),
            ffn=dict(kind="moe"),
            moe=dict(n_experts=4, top_k=4, d_expert=32),
        )
    ).eval()
    assert measured_forward_flops_per_token(model, 64) == pytest.approx(
        forward_flops_per_token(model, 64), rel=0.02
    )  # every expert has every token: no padding


def test_initial_values_follow_the_name_and_the_seed():
    c = ModelConfig(vocab_size=1000, d_model=128, n_layers=8)
    w = dict(KimiModel(c).named_parameters())
    assert w["embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert w["layers.3.self_attn.o_proj.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert (w["layers.0.input_layernorm.weight"] == 1).all()
    assert not torch.equal(w["layers.0.self_attn.q_proj.weight"], w["layers.1.self_attn.q_proj.weight"])
    assert torch.equal(w["embed_tokens.weight"], KimiModel(c).embed_tokens.weight) and not torch.equal(
        w["embed_tokens.weight"], KimiModel(c, seed=1).embed_tokens.weight
    )


def test_a_tied_head_is_counted_once():
    tied, free = (count_parameters(KimiModel(ModelConfig(vocab_size=100, tie_embeddings=t))) for t in (True, False))
    assert free["total"] - tied["total"] == 100 * 64 and tied["embedding"] == 100 * 64


def test_refusals():
    assert KimiConfig is ModelConfig
    with pytest.raises(ConfigError, match="vocab_size is missing"):
        KimiModel(ModelConfig())
    model = KimiModel(ModelConfig(vocab_size=10, max_seq_len=8, position=dict(kind="learned")))
    with pytest.raises(KimiError, match="learned positions end at max_seq_len 8"):
        model(torch.zeros(1, 9, dtype=torch.long))


def test_targets_left_out_are_not_scored():
    model = KimiModel(ModelConfig(vocab_size=10)).eval()
    x, y = torch.randint(0, 10, (2, 8)), torch.randint(0, 10, (2, 8))
    half = y.clone()
    half[:, 4:] = -100
    expected = torch.nn.functional.cross_entropy(model(x).logits[:, :4].flatten(0, 1), y[:, :4].flatten())
    assert torch.allclose(model(x, half).loss, expected)


@pytest.mark.parametrize("kind", ["mha", "mla", "latent"])
def test_cached_decoding_is_the_full_forward(kind):
    model = KimiModel(
        ModelConfig(vocab_size=50, max_seq_len=16, attention=dict(kind=kind, chunk_size=5, n_latents=2, **SIZES))
    ).eval()
    ids = torch.randint(0, 50, (2, 23), generator=torch.Generator().manual_seed(0))  # past the trained context
    with torch.no_grad():
        full, cache, parts = model(ids).logits, model.make_cache(2, 23), []
        for a, b in ((0, 1), (1, 6), (6, 10), *((i, i + 1) for i in range(10, 23))):
            parts.append(model(ids[:, a:b], cache=cache).logits)
    assert torch.allclose(torch.cat(parts, 1), full, atol=1e-5)
