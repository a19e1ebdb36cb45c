"""Attention, randomly configured: causality, caches, forms of MLA, QK-clip; transformers' DeepSeek-V3 as witness."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_nb.config import ModelConfig
from kimi_nb.model import (
    AttentionError,
    CacheError,
    RotaryEmbedding,
    apply_rope,
    build_attention,
    build_cache,
    cache_bytes,
    cache_bytes_per_token,
    kernel_name,
    rope_dim,
)

KERNELS = ("eager", "sdpa", "flash")
FEW = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def configs(draw, kinds=("mha", "mla", "latent"), kernels=KERNELS):
    """A small network of any kind, kernel and sizes."""
    kind, heads = draw(st.sampled_from(kinds)), draw(st.sampled_from((1, 2, 3)))
    attention = {"kind": kind, "implementation": draw(st.sampled_from(kernels))}
    position = {"theta": draw(st.sampled_from((100.0, 50000.0))), "yarn_factor": draw(st.sampled_from((1.0, 4.0)))}
    if kind == "mla":
        attention |= {
            "q_lora_rank": draw(st.sampled_from((None, 5))),
            "kv_lora_rank": draw(st.integers(1, 9)),
            "qk_nope_head_dim": draw(st.integers(1, 7)),
            "qk_rope_head_dim": 2 * draw(st.integers(1, 4)),
            "v_head_dim": draw(st.integers(1, 12)),
        }
    else:
        attention["qk_norm"] = draw(st.booleans())
        if draw(st.booleans()):
            position = {"kind": "learned"}
    if kind == "latent":
        attention |= {"n_latents": draw(st.integers(1, 3)), "chunk_size": draw(st.integers(1, 6))}
    return ModelConfig(d_model=8 * heads, n_heads=heads, max_seq_len=16, attention=attention, position=position)


def built(config, length, seed=0):
    """Module, input (2, length, D) and rotary table (or none), all in float64."""
    torch.manual_seed(seed)
    layer = build_attention(config).double()
    for p in layer.parameters():  # gains away from one, so that a forgotten gain shows
        if p.dim() == 1:
            torch.nn.init.normal_(p, 1, 0.3)
    p = config.position
    rotary = RotaryEmbedding(rope_dim(config), p.theta, config.max_seq_len, p.yarn_factor)
    return (
        layer,
        torch.randn(2, length, config.d_model, dtype=torch.float64),
        rotary(torch.arange(length)) if p.kind == "rope" else None,
    )


def part(rope, start, stop):
    """The rotary table of some of the positions."""
    return None if rope is None else tuple(r[start:stop] for r in rope)


@FEW
@given(configs(), st.integers(2, 20), st.data())
def test_no_token_sees_its_future(config, length, data):
    layer, x, rope = built(config, length)
    at = data.draw(st.integers(1, length - 1))
    other = x.clone()
    other[:, at:] = torch.randn_like(other[:, at:])
    x.requires_grad_()
    y = layer(x, rope)
    torch.testing.assert_close(layer(other, rope)[:, :at], y[:, :at], rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(y[:, :at].square().sum(), x)
    assert not grad[:, at:].any()
    assert grad[:, :at].abs().sum(-1).gt(0).all()


@FEW
@given(configs(), st.lists(st.integers(1, 7), min_size=1, max_size=8))
def test_decoding_in_any_pieces_equals_the_whole_and_holds_the_bytes_reported(config, pieces):
    length = sum(pieces)  # often past the trained 16
    layer, x, rope = built(config, length)
    cache, out, start = build_cache(config, 2, 3, dtype=torch.float64), [], 0
    for n in pieces:
        out.append(layer(x[:, start : start + n], part(rope, start, start + n), cache[0]))
        start += n
        assert cache[0].length == start
        assert cache[0].nbytes * config.n_layers == 2 * cache_bytes(config, start, torch.float64)
    if config.attention.kind != "latent":
        assert cache_bytes(config, length, torch.float64) == length * cache_bytes_per_token(config, torch.float64)
    torch.testing.assert_close(torch.cat(out, 1), layer(x, rope), rtol=0, atol=1e-10)


@FEW
@given(configs(), st.integers(1, 14))
def test_kernels_agree_forward_and_backward(config, length):
    results = []
    for kernel in KERNELS:
        layer, x, rope = built(config.override({"attention.implementation": kernel}), length)
        layer.track_logits = True  # eager reads its logits, the fused kernels' are computed again
        y = layer(x, rope, need_weights=True)
        results.append(
            (
                y,
                layer.last_weights,
                layer.logit_max,
                *torch.autograd.grad(y.square().sum(), list(layer.parameters()), allow_unused=True),
            )
        )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            if a is None or b is None:  # latents have no reader in a text of one chunk
                assert a is b
            else:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@FEW
@given(configs(kinds=("mha",)), st.integers(1, 9))
def test_mha_is_its_definition_token_by_token(config, length):
    layer, x, rope = built(config, length)
    heads, width, eps = config.n_heads, config.head_dim, config.norm.eps

    def turned(vector, gain, t):
        h = vector.view(heads, width)
        if gain is not None:
            h = torch.nn.functional.rms_norm(h, (width,), gain.weight, eps)
        if rope is not None:
            pair = torch.view_as_complex(h.reshape(heads, -1, 2)) * torch.polar(
                torch.ones(width // 2).double(), torch.atan2(rope[1][t], rope[0][t]).double()
            )
            h = torch.view_as_real(pair).flatten(1)
        return h

    scale = layer.scale
    rows = []
    for t in range(length):
        q = turned(layer.q_proj.weight @ x[0, t], layer.q_norm, t)
        k = torch.stack([turned(layer.k_proj.weight @ x[0, s], layer.k_norm, s) for s in range(t + 1)])
        v = torch.stack([(layer.v_proj.weight @ x[0, s]).view(heads, width) for s in range(t + 1)])
        weights = ((q * k).sum(-1) * scale).softmax(0)
        rows.append(layer.o_proj.weight @ (weights.unsqueeze(-1) * v).sum(0).flatten())
    torch.testing.assert_close(
        layer(x, rope)[0], torch.stack(rows), rtol=0, atol=1e-6
    )  # the float32 table is not exactly on the circle
    factor = config.position.yarn_factor if config.position.kind == "rope" else 1.0
    assert scale == pytest.approx(width**-0.5 * (0.1 * math.log(factor) + 1) ** 2)


@FEW
@given(configs(kinds=("mla",)), st.integers(1, 12), st.integers(1, 12))
def test_absorbed_equals_expanded(config, before, new):
    layer, x, rope = built(config, before + new)
    out = {}
    for layer.form in ("expanded", "absorbed"):
        whole = layer(x, rope)
        cache = build_cache(config, 2, before, dtype=torch.float64)[0]
        layer(x[:, :before], part(rope, 0, before), cache)
        out[layer.form] = whole, layer(x[:, before:], part(rope, before, before + new), cache)
        torch.testing.assert_close(whole[:, before:], out[layer.form][1], rtol=0, atol=1e-11)
    torch.testing.assert_close(out["expanded"], out["absorbed"], rtol=0, atol=1e-11)


@FEW
@given(configs(kinds=("mha", "mla")), st.integers(1, 150), st.integers(0, 5))
def test_clipping_scales_the_largest_logit_by_gamma(config, length, seed):
    if config.attention.qk_norm:
        config = config.override({"attention.qk_norm": False})
    layer, x, rope = built(config, length, seed)
    gamma = torch.rand(config.n_heads, dtype=torch.float64) + 0.01
    layer.track_logits = True
    layer(x, rope)
    before = layer.logit_max.clone()
    layer.reset_logit_max()
    layer.clip_heads_(gamma)
    layer(x, rope)
    torch.testing.assert_close(layer.logit_max, before * gamma, rtol=1e-10, atol=1e-14)


@FEW
@given(configs(), st.integers(2, 30))
def test_logit_maxima_are_those_of_the_weights(config, length):
    """A single forward over everything, or one per sequence: the same running maximum, and weights follow from it."""
    layer, x, rope = built(config, length)
    layer.track_logits = True
    layer(x, rope)
    whole = layer.logit_max.clone()
    layer.reset_logit_max()
    for row in x:
        layer(row[None], rope)
    torch.testing.assert_close(layer.logit_max, whole, rtol=1e-12, atol=0)
    assert torch.isfinite(whole).all()


@FEW
@given(configs(kinds=("mla",)), st.integers(1, 14))
def test_mla_is_transformers_deepseek_v3(config, length):
    ds = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3", reason="needs transformers")
    layer, x, rope = built(config, length)
    a, p = config.attention, config.position
    scaling = {"rope_type": "default", "rope_theta": p.theta}
    if p.yarn_factor > 1:
        scaling |= {
            "rope_type": "yarn",
            "factor": p.yarn_factor,
            "original_max_position_embeddings": config.max_seq_len / p.yarn_factor,
        }
        scaling |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
    theirs = ds.DeepseekV3Config(
        hidden_size=config.d_model, num_attention_heads=config.n_heads, num_key_value_heads=config.n_heads,
        q_lora_rank=a.q_lora_rank, kv_lora_rank=a.kv_lora_rank,
        qk_nope_head_dim=a.qk_nope_head_dim, qk_rope_head_dim=a.qk_rope_head_dim, v_head_dim=a.v_head_dim,
        max_position_embeddings=config.max_seq_len, rope_parameters=scaling, rope_interleave=True,
        attention_bias=False, attn_implementation="sdpa",
    )  # fmt: skip
    twin = ds.DeepseekV3Attention(theirs, 0)
    for name in (
        "q_a_layernorm",
        "kv_a_layernorm",
    ):  # their norms work in float32 whatever they are given: torch's keep float64
        if getattr(twin, name, None) is not None:
            setattr(
                twin, name, torch.nn.RMSNorm(getattr(twin, name).weight.shape, eps=getattr(twin, name).variance_epsilon)
            )
    twin.double().load_state_dict(layer.state_dict())
    mask = torch.full((length, length), float("-inf"), dtype=x.dtype).triu(1)[None, None]
    y, (z, _) = layer(x, rope), twin(x, ds.DeepseekV3RotaryEmbedding(theirs)(x, torch.arange(length)[None]), mask)
    torch.testing.assert_close(y, z, rtol=0, atol=1e-11)
    names = [n for n, _ in layer.named_parameters()]
    ours = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    want = torch.autograd.grad(z.square().sum(), [dict(twin.named_parameters())[n] for n in names])
    for name, g, w in zip(names, ours, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-9 * max(1.0, w.abs().max()), msg=lambda m, n=name: f"{n}: {m}")


@FEW
@given(st.integers(1, 8), st.integers(1, 20), st.integers(0, 10**6), st.booleans())
def test_rope_keeps_distances(half, length, shift, interleaved):
    q, k = torch.randn(2, 1, 2, length, 2 * half, dtype=torch.float64)
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)

    def products(start):
        angles = (torch.arange(length) + start)[:, None] * frequencies
        turned = [apply_rope(t, angles.cos(), angles.sin(), interleaved) for t in (q, k)]
        return turned[0] @ turned[1].transpose(-1, -2)

    torch.testing.assert_close(products(0), products(shift), rtol=0, atol=1e-7)


def test_what_cannot_run_is_refused_in_one_line():
    mha = ModelConfig(attention={"implementation": "flash"}, dropout=0.1)
    with pytest.raises(
        AttentionError, match=r"attention.implementation 'flash' cannot run: dropout 0.1 .*; use sdpa or eager$"
    ):
        kernel_name(mha)
    cache = build_cache(mha, 1, 4)[0]
    with pytest.raises(CacheError, match="build_cache"):
        build_attention(mha).eval()(torch.randn(2, 3, 64), cache=cache)
