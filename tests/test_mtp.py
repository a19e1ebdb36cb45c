"""Tokens after the next one: DeepSeek-V3's definition, written again in NumPy, and what only training may notice."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_run
from torch.utils.flop_counter import FlopCounterMode

from kimi_nb.config import ConfigError, ModelConfig
from kimi_nb.model import (
    Decoder,
    KimiModel,
    count_parameters,
    forward_flops_per_token,
    mtp_flops_per_token,
    training_flops_per_token,
)

SMALL = dict(d_model=16, n_layers=2, n_heads=2, vocab_size=30, max_seq_len=8, norm=dict(kind="rmsnorm"))
EXPERTS = dict(ffn=dict(kind="moe"), moe=dict(n_experts=4, top_k=2, d_expert=16, router="noaux_tc"))


def model_of(depth, **more):
    torch.manual_seed(0)
    model = KimiModel(ModelConfig(**SMALL | dict(mtp_depth=depth) | more), seed=1).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def batch(T=8, B=2):
    ids = torch.randint(0, 30, (B, T + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


# --- the definition, without the package -----------------------------------------------------------------------------


def rms(x, gain, eps):
    return gain * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def rotated(x, theta):
    """(T, H, K): neighbours turned by position."""
    T, _, K = x.shape
    angle = np.arange(T)[:, None] * theta ** (-np.arange(0, K, 2) / K)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def block(w, at, x, config):
    """Causal attention and a gated network, each added to x (T, D)."""
    T, heads = len(x), config.n_heads
    h = rms(x, w[f"{at}.input_layernorm.weight"], config.norm.eps)
    q, k, v = ((h @ w[f"{at}.self_attn.{n}_proj.weight"].T).reshape(T, heads, -1) for n in "qkv")
    q, k = rotated(q, config.position.theta), rotated(k, config.position.theta)
    scores = np.einsum("thk,shk->hts", q, k) / np.sqrt(q.shape[-1])
    scores[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf
    share = np.exp(scores - scores.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    x = x + np.einsum("hts,shk->thk", share, v).reshape(T, -1) @ w[f"{at}.self_attn.o_proj.weight"].T
    h = rms(x, w[f"{at}.post_attention_layernorm.weight"], config.norm.eps)
    gate, up = (h @ w[f"{at}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
    return x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}.mlp.down_proj.weight"].T


def reference(model, sequence):
    """The main loss and the extra one of tokens t_1 ... t_(T+1), by the paper's equations 21 to 25."""
    c, w = model.config, {name: t.numpy() for name, t in model.state_dict().items()}
    embedding, T = w["embed_tokens.weight"], len(sequence) - 1
    h = embedding[sequence[:T]]
    for i in range(c.n_layers):
        h = block(w, f"layers.{i}", h, c)

    def cross_entropy(read, first):  # read[i] predicts the token of index i + first
        logits = read @ w["lm_head.weight"].T
        logits -= logits.max(-1, keepdims=True)
        chance = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -sum(chance[i, sequence[i + first]] for i in range(len(read))) / T

    main, extra = cross_entropy(rms(h, w["norm.weight"], c.norm.eps), 1), []
    for k in range(1, c.mtp_depth + 1):
        at = f"mtp.{k - 1}"
        e = rms(embedding[sequence[k:T]], w[f"{at}.enorm.weight"], c.norm.eps)
        before = rms(h[: T - k], w[f"{at}.hnorm.weight"], c.norm.eps)
        h = block(w, f"{at}.block", np.concatenate([e, before], -1) @ w[f"{at}.eh_proj.weight"].T, c)
        extra.append(cross_entropy(rms(h, w[f"{at}.norm.weight"], c.norm.eps), 1 + k))
    return main, np.mean(extra)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_loss_is_the_paper_s(depth, tied):
    model = model_of(depth, tie_embeddings=tied, ffn=dict(activation="swiglu"))
    x, y = batch()
    sequences = torch.cat([x, y[:, -1:]], 1).numpy()
    with torch.no_grad():
        out = model(x, targets=y)
    main, extra = np.mean([reference(model, s) for s in sequences], 0)
    assert out.loss.item() == pytest.approx(main, rel=1e-6)  # the loss is taken in float32
    assert out.mtp_loss.item() == pytest.approx(extra, rel=1e-6)


def test_its_gradient_is_the_loss_s():
    """Against differences of the float64 reference, for a matrix of every part, the shared embedding among them."""
    model = model_of(2, ffn=dict(activation="swiglu"))
    x, y = batch(B=1)
    model(x, targets=y).mtp_loss.backward()
    sequence, step = torch.cat([x, y[:, -1:]], 1)[0].numpy(), 1e-5
    for name in ("embed_tokens.weight", "layers.0.mlp.up_proj.weight", "mtp.0.eh_proj.weight", "mtp.1.hnorm.weight"):
        p = model.get_parameter(name)
        at = tuple(int(i) for i in np.unravel_index(p.grad.abs().argmax().item(), p.shape))
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                p[at] += sign * step
                found.append(reference(model, sequence)[1])
                p[at] -= sign * step
        assert p.grad[at].item() == pytest.approx((found[0] - found[1]) / (2 * step), rel=1e-4), name


@settings(max_examples=15, deadline=None)
@given(depth=st.integers(1, 3), T=st.integers(1, 6), hidden=st.integers(0, 5))
def test_what_is_not_scored_counts_nowhere(depth, T, hidden):
    """Targets of -100: the sum runs over the rest, and short texts have fewer depths."""
    model = model_of(depth)
    x, y = batch(T)
    y = y.clone()
    y[:, : min(hidden, T - 1)] = -100
    out = model(x, targets=y)
    known = model_known(model, x)
    read, _ = model.mtp(known, model.embed_tokens(x), model.embed(x)[1])
    assert len(read) == min(depth, T - 1)
    scored = (y != -100).sum()
    sums = []
    for k, h in enumerate(read, 1):
        chance = model.lm_head(h).log_softmax(-1)
        pairs = [(b, i) for b in range(2) for i in range(T - k) if y[b, i + k] != -100]
        sums.append(sum((-chance[b, i, y[b, i + k]] for b, i in pairs), torch.zeros(())))
    expected = sum(sums) / len(sums) / scored if sums else torch.tensor(0.0)
    assert out.mtp_loss.item() == pytest.approx(float(torch.as_tensor(expected).detach()), rel=1e-5, abs=1e-7)


def model_known(model, x):
    """What the last layer leaves."""
    seen = []
    hook = model.norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(x)
    hook.remove()
    return seen[0]


# --- what may depend on what ----------------------------------------------------------------------------------------

KINDS = dict(
    mha=dict(),
    mla=dict(attention=dict(kind="mla", kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8)),
    kda=dict(attention=dict(kind="kda")),
    latent=dict(attention=dict(kind="latent", chunk_size=2, n_latents=2)),
    learned=dict(position=dict(kind="learned")),
    depth=dict(residual=dict(kind="attention", block_layers=1)),
    experts=EXPERTS,
)


@pytest.mark.parametrize("kind", KINDS)
def test_no_position_sees_a_token_that_it_is_asked_for(kind):
    """Depth k at position i depends on tokens up to i + k, on that one too, and on none after."""
    model = model_of(2, **KINDS[kind])
    x, _ = batch(B=1)
    known = model_known(model, x)
    embedded = model.embed_tokens(x)
    whole = model.mtp(known, embedded, model.embed(x)[1])[0]
    for j in range(8):
        other = x.clone()
        other[0, j] = (x[0, j] + 1) % 30
        now = model.mtp(model_known(model, other), model.embed_tokens(other), model.embed(other)[1])[0]
        for k, (a, b) in enumerate(zip(whole, now, strict=True), 1):
            moved = ((a - b).abs().amax(-1)[0] > 1e-9).tolist()
            assert not any(moved[: max(0, j - k)])
            if j - k >= 0:
                assert moved[j - k]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_it_is_left_when_nobody_trains(kind):
    """Scores and generation are those of the model without; training reaches every parameter."""
    model, plain = model_of(2, **KINDS[kind]), KimiModel(ModelConfig(**SMALL | KINDS[kind]), seed=1).double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("mtp.")})
    x, y = batch()
    out = model(x, targets=y)
    assert torch.equal(out.loss, plain(x, targets=y).loss) and plain(x, targets=y).mtp_loss is None
    (out.loss + out.aux_loss + 0.3 * out.mtp_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval(), plain.eval()
    for further in model.mtp:
        further.register_forward_hook(lambda *a: pytest.fail("it was asked at inference"))
    assert torch.equal(model(x).logits, plain(x).logits) and model(x, targets=y).mtp_loss is None
    cache = model.make_cache(2)
    with torch.no_grad():
        pieces = [Decoder(model)(x[:, t : t + 1], cache) for t in range(8)]
    torch.testing.assert_close(torch.stack(pieces, 1), plain(x).logits.detach(), rtol=1e-6, atol=1e-7)


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mha", "experts"])
def test_it_is_counted(kind):
    """All parameters, none that serves a token at inference; FLOPs of training as PyTorch counts them."""
    more = KINDS[kind] | dict(attention=dict(implementation="eager"))
    with_it, without = (KimiModel(ModelConfig(**SMALL | dict(mtp_depth=d) | more)) for d in (2, 0))
    a, b = count_parameters(with_it), count_parameters(without)
    own = sum(p.numel() for p in with_it.mtp.parameters())
    assert a["total"] - b["total"] == own > 0
    assert a["active"] == b["active"] and a["active_non_embedding"] == b["active_non_embedding"]
    x, y = batch(B=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        with_it(x, targets=y)
    told = forward_flops_per_token(with_it, 8) + mtp_flops_per_token(with_it, 8)
    if kind == "mha":
        assert counter.get_total_flops() / 8 == pytest.approx(told, rel=0.01)
    assert training_flops_per_token(with_it, 8) == 3 * told
    assert forward_flops_per_token(with_it, 8) == forward_flops_per_token(without, 8)
    assert mtp_flops_per_token(without, 8) == 0


# --- in a run --------------------------------------------------------------------------------------------------------


def test_neutral_at_zero():
    """Depth 0 has the name it always had; the weight needs a depth, and a depth needs tokens."""
    run = tiny_run()
    told = json.dumps(run.model_dump(mode="json"))
    assert '"mtp_depth": 0' in told and run.override({"model.mtp_depth": 0}).run_id == run.run_id
    assert run.override({"model.mtp_depth": 1}).run_id != run.run_id
    with pytest.raises(ConfigError, match=r"mtp_weight .* would have no effect: it needs model.mtp_depth over 0"):
        run.override({"train.mtp_weight": 0.1})
    with pytest.raises(ConfigError, match=r"^model.mtp_depth 32 leaves nothing to predict of 32 tokens: fewer"):
        run.override({"model.mtp_depth": 32})


@pytest.mark.parametrize("name", ["adamw", "muonclip"])
def test_a_run_learns_it_in_micro_batches_and_comes_back(name, tmp_path, monkeypatch):
    """Two micro-batches are one; a checkpoint holds it; what is said of it falls; routers that look further move."""
    from kimi_nb.data import prepare
    from kimi_nb.train import Trainer, fit, load_model, pick_device

    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path / "cache"))
    experts = {"ffn.kind": "moe", "moe.n_experts": 4, "moe.d_expert": 8, "moe.router": "noaux_tc"}
    run = tiny_run(model__mtp_depth=2, train__lr=1e-2, train__optimizer__name=name)
    run = run.changed({f"model.{path}": value for path, value in experts.items()})
    data, cpu = prepare(run.data), pick_device("cpu")
    one, two = (Trainer(run.override({"train.micro_batch_size": n}), data, cpu) for n in (4, 2))
    said = [trainer.step(0) for trainer in (one, two)]
    assert said[0]["mtp_loss"] == pytest.approx(said[1]["mtp_loss"], rel=1e-5)
    torch.testing.assert_close(one.model.mtp[1].eh_proj.weight, two.model.mtp[1].eh_proj.weight, rtol=1e-3, atol=1e-4)
    assert one.model.mtp[0].block.mlp.gate.e_score_correction_bias.any()
    assert not one.model.mtp[0].block.mlp.gate.load_accumulator.any()
    assert len(said[0]["expert_load"]) == run.model.n_layers
    record = fit(run, tmp_path / "run", device="cpu", progress=False)
    told = record.curves["mtp_loss"]["value"]
    assert told[-1] < told[0] and np.isfinite(record.metrics["test_bpb"])
    assert load_model(tmp_path / "run")[0].mtp[1].eh_proj.weight.shape == (16, 32)


def test_the_weight_weighs(tmp_path, monkeypatch):
    from kimi_nb.data import prepare
    from kimi_nb.train import Trainer, pick_device

    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path / "cache"))
    run = tiny_run(model__mtp_depth=1, train__grad_clip=0.0)
    data, cpu = prepare(run.data), pick_device("cpu")
    grads = {}
    for weight in (0.1, 0.3):
        trainer = Trainer(run.override({"train.mtp_weight": weight}), data, cpu)
        trainer._accumulate(*trainer._batch(0))
        grads[weight] = trainer.model.mtp[0].eh_proj.weight.grad.clone()
    torch.testing.assert_close(grads[0.3], 3 * grads[0.1], rtol=1e-4, atol=1e-7)
