"""All-Kimi-Linear networks are transformers' Kimi Linear: logits, gradients, cached text, files both ways."""

import contextlib
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from kimi_nb.config import ModelConfig
from kimi_nb.model import Decoder, KimiModel
from kimi_nb.use import (
    HubError,
    KimiNbForCausalLM,
    from_kimi_linear,
    kimi_linear_obstacles,
    load_pretrained,
    model_card,
    to_deepseek_v3,
    to_kimi_linear,
)

QUIET = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=(Phase.generate,))
VOCABULARY = 53


@st.composite
def configs(draw):
    "Networks that Kimi Linear has words for, of every kind of part."
    pick = lambda *values: draw(st.sampled_from(values))
    pattern = pick("kda,mla", "mla,kda", "kda,kda,mla", "kda,kda,kda,mla")
    heads = pick(1, 2, 4)
    attention = dict(
        kind="kda", pattern=pattern, linear_heads=pick(None, 1, 3), linear_head_dim=pick(None, 4, 6),
        conv_kernel=pick(2, 3, 4), implementation=pick("eager", "sdpa"),
    )  # fmt: skip
    attention |= dict(
        q_lora_rank=pick(None, 6), kv_lora_rank=pick(4, 8), qk_nope_head_dim=pick(2, 4),
        qk_rope_head_dim=pick(2, 3), v_head_dim=pick(3, 4),
    )  # fmt: skip
    layers = len(pattern.split(",")) + pick(0, 1)
    groups = pick(1, 2)
    moe = dict(
        router=pick("noaux_tc", "aux_tc"), n_experts=4, top_k=pick(1, 2), n_shared_experts=pick(0, 1, 2), d_expert=8,
        n_group=groups, topk_group=pick(1, groups), norm_topk_prob=pick(True, False),
        routed_scaling_factor=pick(1.0, 2.446),
    )  # fmt: skip
    experts = pick(True, False)
    return ModelConfig(
        d_model=heads * pick(4, 6), n_heads=heads, n_layers=layers, d_ff=12, vocab_size=VOCABULARY, max_seq_len=16,
        tie_embeddings=pick(True, False), first_dense_layers=draw(st.integers(0, layers)) if experts else 0,
        norm=dict(kind="rmsnorm", eps=pick(1e-6, 1e-5)), position=dict(kind="nope"), attention=attention,
        ffn=dict(kind="moe" if experts else "dense"), moe=moe,
    )  # fmt: skip


@torch.no_grad()
def awake(config, seed=0, dtype=torch.float64):
    "A model in which every weight matters: larger than at the start, norms and biases not at one and zero."
    model = KimiModel(config, seed=seed).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.mul_(6)
        elif not name.endswith(("A_log", "dt_bias")):
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype), alpha=0.2)
    for moe in model.moe_layers().values():
        moe.gate.e_score_correction_bias.normal_(generator=generator).mul_(0.05)
    return model


def tokens(batch, length, seed=0):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


class Wide:
    "torch, whose float32 is float64."

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def in_float64():
    "transformers computes the delta rule, norms and routers in float32 whatever the weights are; here it does not."
    theirs = "transformers.models.kimi_linear.modeling_kimi_linear.torch"
    with mock.patch(theirs, Wide()), mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


def check_gradients(ours, theirs, config):
    "Of every weight, rows that write latents carrying their eps as a factor; a tied matrix has two of theirs."
    wanted = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    scale = (1e-6 / config.norm.eps) ** 0.5
    for name, p in ours.named_parameters():
        grad = wanted[name]
        if config.tie_embeddings and name == "embed_tokens.weight":
            grad = grad + wanted["lm_head.weight"]
        if p.grad is None or grad is None:  # experts nobody chose
            assert (p.grad is None or not p.grad.any()) and (grad is None or not grad.any())
            continue
        grad = grad.reshape(p.shape).clone()
        ranks = dict(q_a_proj=config.attention.q_lora_rank, kv_a_proj_with_mqa=config.attention.kv_lora_rank)
        grad[: ranks.get(name.split(".")[-2], 0)] *= scale
        assert (p.grad - grad).abs().max() <= 1e-7 * max(1.0, grad.abs().max().item()), name


def agrees(config, seed, folder):
    ours = awake(config, seed)
    theirs, ids = to_kimi_linear(ours), tokens(2, 37, seed)  # past the trained 16 and a chunk
    a, b = ours(ids).logits, theirs(ids).logits
    scale = max(1.0, b.abs().max().item())
    assert (a - b).abs().max() <= 1e-5 * scale
    with in_float64():
        wide = [model(ids).logits for model in (ours, theirs)]
        assert (wide[0] - wide[1]).abs().max() <= 1e-8 * scale
        for logits in wide:
            cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    check_gradients(ours, theirs, config)
    cache, decoder, past, at = ours.make_cache(2), Decoder(ours), None, 0
    with torch.no_grad():
        for n in (5, 1, 1, 30):  # the prompt, tokens, a longer piece
            out = theirs(ids[:, at : at + n], past_key_values=past, use_cache=True)
            past, piece = out.past_key_values, decoder(ids[:, at : at + n], cache)
            assert (out.logits[:, -1] - piece).abs().max() <= 1e-5 * scale
            at += n
            assert (piece - a[:, at - 1]).abs().max() <= 1e-6 * scale
        theirs.save_pretrained(folder)
        untied = config.changed({"tie_embeddings": False})
        for back in (from_kimi_linear(theirs), load_pretrained(folder)):
            assert back.config == untied and not back.training
            assert (back(ids).logits - a).abs().max() <= 1e-6 * scale
        del theirs.config.kimi_nb  # as a file of somebody else: what it says is the same network
        assert (from_kimi_linear(theirs)(ids).logits - a).abs().max() <= 1e-6 * scale


@settings(max_examples=4, **QUIET)
@given(configs(), st.integers(0, 1000))
def test_all_kimi_linear_models_are_kimi_linear(tmp_path_factory, config, seed):
    agrees(config, seed, tmp_path_factory.mktemp("kl"))


@pytest.mark.slow
@settings(max_examples=50, **QUIET)
@given(configs(), st.integers(1001, 2000))
def test_fifty_all_kimi_linear_models_are_kimi_linear(tmp_path_factory, config, seed):
    agrees(config, seed, tmp_path_factory.mktemp("kl"))


HYBRID = ModelConfig(
    d_model=16, n_heads=2, n_layers=4, vocab_size=VOCABULARY, max_seq_len=32, norm=dict(kind="rmsnorm"),
    position=dict(kind="nope"), ffn=dict(kind="moe"), moe=dict(router="noaux_tc", n_experts=4, d_expert=8),
    attention=dict(
        kind="kda", pattern="kda,kda,kda,mla", kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4
    ),
)  # fmt: skip


def test_left_padded_batches_are_continued_alike():
    """Padding is no text: not to the convolution, not to the state, not to the cache of MLA."""
    ours = awake(HYBRID, seed=3)
    theirs, wrapped = to_kimi_linear(ours), KimiNbForCausalLM.of(ours)
    texts = [tokens(1, n, n)[0] for n in (3, 9, 6)]
    longest = max(map(len, texts))
    ids = torch.stack([torch.cat([text.new_zeros(longest - len(text)), text]) for text in texts])
    mask = (torch.arange(longest) >= torch.tensor([longest - len(text) for text in texts]).view(-1, 1)).long()
    how = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    new = [model.generate(ids, attention_mask=mask, **how)[:, longest:] for model in (wrapped, theirs)]
    alone = [theirs.generate(text[None], **how)[0, len(text) :] for text in texts]
    assert torch.equal(*new) and torch.equal(new[0], torch.stack(alone))
    assert len({tuple(row.tolist()) for row in new[0]}) > 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention.output_gate": True}, "attention.output_gate True"),
        ({"attention.gate_rank": "full"}, "attention.gate_rank full (needs head)"),
        ({"attention.decay_bound": -5.0}, "attention.decay_bound -5.0"),
        ({"attention.pattern": "gdn,kda,mla"}, "a layer of kind gdn"),
        ({"attention.pattern": None}, "no layer of kind mla (needs one)"),
        ({"moe.latent_dim": 8}, "moe.latent_dim 8"),
        ({"ffn.activation": "situ"}, "ffn.activation 'situ'"),
        ({"residual.kind": "attention"}, "residual.kind 'attention'"),
        ({"position.kind": "rope"}, "position.kind 'rope'"),
        ({"moe.router": "standard"}, "moe.router standard"),
        ({"vocab_size": None}, "vocab_size none"),
    ],
)
def test_what_kimi_linear_has_no_words_for_is_named(change, words):
    (named,) = [line for line in kimi_linear_obstacles(HYBRID.changed(change)) if words in line]
    if change != {"vocab_size": None}:
        with pytest.raises(HubError, match="Kimi Linear cannot express") as e:
            to_kimi_linear(KimiModel(HYBRID.changed(change), seed=None))
        assert named in str(e.value) and "\n" not in str(e.value)


def test_a_full_gate_of_a_head_s_width_is_one_all_the_same():
    assert kimi_linear_obstacles(HYBRID.override({"attention.gate_rank": 8})) == []
    assert kimi_linear_obstacles(ModelConfig.preset("kimi_linear")) == []
    named = " ".join(kimi_linear_obstacles(ModelConfig.preset("k3")))
    parts = "output_gate", "residual.kind", "latent_dim", "situ", "gate_rank full", "decay_bound"
    assert all(part in named for part in parts) and "quantile" not in named


def test_a_hybrid_is_no_deepseek():
    with pytest.raises(HubError, match=r"attention.pattern kda,kda,kda,mla \(needs None\)"):
        to_deepseek_v3(KimiModel(HYBRID, seed=None))
    assert "to_kimi_linear" in model_card(KimiModel(HYBRID)) and "kda and mla" in model_card(KimiModel(HYBRID))


def test_a_model_of_other_words_is_refused():
    theirs = to_kimi_linear(awake(HYBRID))
    theirs.config.hidden_act = "gelu"
    with pytest.raises(HubError, match=r"hidden_act 'gelu' \(needs 'silu'\)"):
        from_kimi_linear(theirs)
