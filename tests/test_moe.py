"""Experts and routers: against float64 loops and transformers, and bit for bit twice.

Over micro-batches, checkpointing and ranks.
"""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from kimi_nb.config import ModelConfig, planned
from kimi_nb.model import (
    MoE,
    RouterStats,
    expert_backend,
    group_limited_topk,
    load_statistics,
    max_violation,
    run_experts,
    sigmoid_route,
    softmax_route,
    switch_loss,
    update_biases,
)

TINY = ModelConfig(
    d_model=16, ffn={"kind": "moe"}, moe={"router": "noaux_tc", "n_experts": 8, "top_k": 2, "d_expert": 12}
)


def layer_of(config=TINY, seed=0, **moe):
    torch.manual_seed(seed)
    return MoE(config.override({f"moe.{k}": v for k, v in moe.items()}))


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def sigmoid_settings(draw):
    n_group = draw(st.sampled_from([1, 2, 4]))
    per_group = draw(st.integers(2, 5))
    topk_group = draw(st.integers(1, n_group))
    return {
        "n_experts": n_group * per_group,
        "n_group": n_group,
        "topk_group": topk_group,
        "top_k": draw(st.integers(1, topk_group * per_group)),
        "n_shared_experts": draw(st.integers(1, 2)),
        "routed_scaling_factor": draw(st.sampled_from([0.5, 1.0, 2.827])),
        "norm_topk_prob": draw(st.booleans()),
    }


def deepseek_moe(moe: MoE, config: ModelConfig):
    """transformers' layer with our weights."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    m = config.moe
    theirs = DeepseekV3MoE(
        transformers.DeepseekV3Config(
            hidden_size=config.d_model,
            n_routed_experts=m.n_experts,
            num_experts_per_tok=m.top_k,
            moe_intermediate_size=config.expert_width,
            n_shared_experts=m.n_shared_experts,
            n_group=m.n_group,
            topk_group=m.topk_group,
            routed_scaling_factor=m.routed_scaling_factor,
            norm_topk_prob=m.norm_topk_prob,
        )
    )
    theirs.load_state_dict(moe.state_dict())
    return theirs


def close(a, b, tolerance):
    scale = max(float(b.abs().max()), 1e-6)
    return float((a - b).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-6)])
@settings(max_examples=20, deadline=None)
@given(moe=sigmoid_settings(), seed=st.integers(0, 1000))
def test_the_layer_is_transformers_deepseek_v3(dtype, tolerance, moe, seed):
    ours = layer_of(seed=seed, **moe).to(dtype)
    nn.init.uniform_(ours.gate.e_score_correction_bias, -0.8, 0.3)  # negative: a mask of zeros would show
    theirs = deepseek_moe(ours, TINY.override({f"moe.{k}": v for k, v in moe.items()})).to(dtype)
    x, upstream = tokens(2, 20, 16, seed=seed).to(dtype), tokens(2, 20, 16, seed=seed + 1).to(dtype)
    (ours_x, theirs_x) = (x.clone().requires_grad_() for _ in range(2))
    (y, stats), (_, weights, indices) = ours(ours_x, keep_choice=True), theirs.gate(x)
    ours_order, theirs_order = stats.indices.sort(-1), indices.sort(-1)
    assert torch.equal(ours_order[0], theirs_order[0])
    assert close(stats.weights.gather(1, ours_order[1]), weights.detach().gather(1, theirs_order[1]), 1e-6)
    expected = theirs(theirs_x)
    assert close(y.detach(), expected.detach(), tolerance)
    y.backward(upstream)
    expected.backward(upstream)
    assert close(ours_x.grad, theirs_x.grad, tolerance * 10)
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert close(p.grad, wanted.pop(name).grad, tolerance * 10), name
    assert not wanted


@pytest.mark.parametrize("activation", ["swiglu", "silu", "gelu", "relu"])
def test_the_standard_layer_is_a_loop_in_float64(activation):
    ours = layer_of(TINY.override({"ffn.activation": activation, "moe.router": "standard", "moe.top_k": 3}))
    x, upstream = tokens(3, 15, 16), tokens(3, 15, 16, seed=2)
    y, stats = ours(x)
    (y * upstream).sum().backward()

    slow = copy.deepcopy(ours).double()
    slow.zero_grad()
    w_in = slow.experts.gate_up_proj if activation == "swiglu" else slow.experts.up_proj
    phi = {"swiglu": F.silu, "silu": F.silu, "gelu": F.gelu, "relu": F.relu}[activation]
    rows = []
    for token in x.double().reshape(-1, 16):
        p = torch.softmax(slow.gate.weight @ token, 0)
        best = sorted(range(8), key=lambda e: -float(p[e].detach()))[:3]
        total = sum(p[e] for e in best)
        out = 0
        for e in best:
            h = w_in[e] @ token
            h = phi(h[:12]) * h[12:] if activation == "swiglu" else phi(h)
            out = out + p[e] / total * (slow.experts.down_proj[e] @ h)
        rows.append(out)
    expected = torch.stack(rows).view(3, 15, 16)
    (expected * upstream.double()).sum().backward()
    assert close(y.detach().double(), expected.detach(), 1e-5)
    for (name, p), q in zip(ours.named_parameters(), slow.parameters(), strict=True):
        assert close(p.grad.double(), q.grad, 1e-4), name
    assert int(stats.counts.sum()) == 3 * 15 * 3


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_switch_loss_is_transformers_over_top_k(top_k):
    pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = tokens(200, 8) * 2
    route = softmax_route(logits, top_k)
    ours = switch_loss(route.probs, torch.bincount(route.indices.flatten(), minlength=8))
    theirs = load_balancing_loss_func((logits,), num_experts=8, top_k=top_k)  # its load shares sum to top_k
    torch.testing.assert_close(ours, theirs / top_k)


@pytest.mark.parametrize("backend", ["grouped", "batched"])
@pytest.mark.parametrize("threads", [1, 2])
def test_twice_the_same_is_the_same_to_the_bit(backend, threads):
    torch.set_num_threads(threads)
    indices = tokens(1500, 16).topk(4)[1]

    def once():
        x, w = tokens(1500, 64).requires_grad_(), tokens(1500, 4).requires_grad_()
        w_in, w_out = tokens(16, 64, 64).requires_grad_(), tokens(16, 64, 32).requires_grad_()
        run_experts(x, indices, w, w_in, w_out, "swiglu", backend).square().sum().backward()
        return [t.grad for t in (x, w, w_in, w_out)]

    first = once()
    for _ in range(3):
        assert all(map(torch.equal, first, once()))


@pytest.mark.parametrize("router", ["standard", "aux_tc", "noaux_tc"])
def test_a_row_does_not_depend_on_the_rows_beside_it(router):
    layer, x = layer_of(router=router).eval(), tokens(4, 8, 16)
    together = layer(x)[0]
    alone = torch.cat([layer(row[None])[0] for row in x])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_the_group_mask_survives_negative_scores():
    scores = torch.rand(500, 12, generator=torch.Generator().manual_seed(0))
    bias = torch.full((12,), -3.0)
    chosen = group_limited_topk(scores, bias, n_group=4, topk_group=2, top_k=6)
    assert (torch.stack([(chosen // 3 == g).any(-1) for g in range(4)]).sum(0) == 2).all()
    assert torch.equal(chosen, group_limited_topk(scores, None, 4, 2, 6))


def test_weights_come_from_unbiased_scores_to_the_last_digit():
    logits = tokens(100, 8) - 8  # scores near 3e-4: (s + b) - b would lose half their digits
    bias = torch.linspace(-1, 1, 8)
    route = sigmoid_route(logits, 2, bias, norm_topk_prob=False)
    assert torch.equal(route.weights, logits.sigmoid().gather(1, route.indices))
    assert set(route.indices.flatten().tolist()) == {6, 7}


def test_the_router_stays_in_float32_under_autocast():
    layer, x = layer_of(n_shared_experts=1, seq_loss_weight=0.1), tokens(4, 100, 16)
    _, exact = layer(x, keep_choice=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, low = layer(x, keep_choice=True)
    assert y.dtype == torch.bfloat16
    assert (
        torch.equal(exact.indices, low.indices)
        and torch.equal(exact.weights, low.weights)
        and torch.equal(exact.aux_loss, low.aux_loss)
    )
    (y.float().sum() + low.aux_loss).backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters()
    )


LOSSES = {
    "standard": {"aux_loss_weight"},
    "aux_tc": {"aux_loss_weight", "seq_loss_weight"},
    "noaux_tc": {"seq_loss_weight"},
}


@pytest.mark.parametrize("router", list(LOSSES))
@pytest.mark.parametrize("weight", ["aux_loss_weight", "seq_loss_weight"])
def test_each_router_has_its_losses_and_no_others(router, weight):
    off = {"aux_loss_weight": 0.0, "seq_loss_weight": 0.0}
    torch.manual_seed(0)
    config = ModelConfig(
        **{**TINY.model_dump(), "moe": {**TINY.moe.model_dump(), **off, "router": router, weight: 0.5}}
    )
    layer = MoE(config)
    x = tokens(3, 20, 16) + 1.0
    stats = layer(x)[1]
    if weight not in LOSSES[router]:
        assert stats.aux_loss.item() == 0
        return
    assert stats.aux_loss.item() > 0.5  # at least one when even, times the weight; uneven here
    stats.aux_loss.backward()
    before = layer.gate.weight.detach().clone()
    with torch.no_grad():
        layer.gate.weight -= 0.05 * layer.gate.weight.grad
    assert layer(x)[1].aux_loss.item() < stats.aux_loss.item() and not torch.equal(before, layer.gate.weight)


CHANGES = {
    "router": "standard",
    "n_experts": 12,
    "top_k": 3,
    "n_shared_experts": 1,
    "d_expert": 20,
    "n_group": 4,
    "topk_group": 1,
    "routed_scaling_factor": 2.0,
    "norm_topk_prob": False,
    "aux_loss_weight": 0.5,
    "seq_loss_weight": 0.5,
    "bias_update_speed": 0.01,
    "latent_dim": 8,
}


@pytest.mark.parametrize("field", [f for f in type(TINY.moe).model_fields if f not in planned(TINY.moe)])
def test_every_setting_changes_something(field):
    base = {
        **TINY.moe.model_dump(),
        "n_group": 2 if field != "n_group" else 1,
        "topk_group": 2 if field == "topk_group" else 1,
    }
    base["router"] = "aux_tc" if field == "aux_loss_weight" else "noaux_tc"

    def outcome(moe):
        torch.manual_seed(0)
        layer = MoE(ModelConfig(**{**TINY.model_dump(), "moe": moe}))
        y, stats = layer(tokens(2, 30, 16))
        layer.update_bias()
        return [y, stats.aux_loss, layer.gate.e_score_correction_bias]

    change = {field: CHANGES[field]}
    if field == "router":
        base |= {"n_group": 1, "topk_group": 1}
    a, b = outcome(base), outcome({**base, **change})
    assert any(p.shape != q.shape or not torch.equal(p, q) for p, q in zip(a, b, strict=True))


class Stack(nn.Module):
    """Two layers, the second checkpointed as asked."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layers = how, nn.ModuleList([layer_of(seed=0), layer_of(seed=1)])

    def block(self, layer, x):
        y, stats = layer(x)
        return torch.tanh(x + y), stats  # keeps its result, so that a recomputation runs to the end

    def forward(self, x):
        for layer in self.layers:
            if self.how == "plain":
                x, _ = self.block(layer, x)
            elif self.how == "nested":
                x, _ = checkpoint(
                    lambda x, layer=layer: checkpoint(self.block, layer, x, use_reentrant=False), x, use_reentrant=False
                )
            else:
                x, _ = checkpoint(self.block, layer, x, use_reentrant=self.how == "reentrant")
        return x


@pytest.mark.parametrize("how", ["plain", "checkpoint", "reentrant", "nested"])
def test_checkpointing_counts_each_token_once(how):
    model = Stack(how)
    for part in tokens(4, 16, 16).split(2):
        model(part.requires_grad_()).square().sum().backward()
    model.eval()
    model(tokens(4, 16, 16))
    expected = Stack("plain")
    expected(tokens(4, 16, 16))
    counts = update_biases(model.layers)
    assert (
        counts.shape == (2, 8)
        and torch.equal(counts, update_biases(expected.layers))
        and counts.sum() == 2 * 4 * 16 * 2
    )
    for a, b in zip(model.layers, expected.layers, strict=True):
        assert (
            torch.equal(a.gate.e_score_correction_bias, b.gate.e_score_correction_bias)
            and a.gate.e_score_correction_bias.any()
        )
    assert not update_biases(model.layers).any()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("router", ["standard", "aux_tc", "noaux_tc"])
def test_compiled_layers_count_and_agree(router, half):
    """In one graph: a break returns to Python in every layer. In bf16 with enough tokens that eager CPU code pads."""
    layer, x = (
        layer_of(router=router, n_shared_experts=1, seq_loss_weight=0.0 if router == "standard" else 0.1),
        tokens(8, 64, 16),
    )
    atol, rtol = (0.02, 0.05) if half else (1e-6, 1e-5)
    found = []
    torch._dynamo.reset()
    for module in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = module(x)[0]
        y.float().square().mean().backward()
        found.append((y.detach(), [p.grad.clone() for p in layer.parameters()], layer.update_bias(0.0)))
    (expected, gradients, load), (y, compiled, counted) = found
    assert y.dtype == expected.dtype == (torch.bfloat16 if half else torch.float32)
    torch.testing.assert_close(y, expected, atol=atol, rtol=rtol)
    for p, q in zip(compiled, gradients, strict=True):
        assert (p - q).norm() <= (0.02 if half else 1e-5) * q.norm()
    assert torch.equal(load, counted)


def train(layer, batches, micro, rank=0, ranks=1):
    """Three optimizer steps, each over `micro` micro-batches, this rank's share of them; the bias after each."""
    wrapped = nn.parallel.DistributedDataParallel(layer) if ranks > 1 else layer
    optimizer, biases = torch.optim.SGD(layer.parameters(), lr=0.0), []
    for batch in batches:
        parts = batch.chunk(micro * ranks)[rank * micro : (rank + 1) * micro]
        for part in parts:
            wrapped(part)[0].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        load = layer.update_bias()
        assert int(load.sum()) == batch.shape[0] * batch.shape[1] * 2
        biases.append(layer.gate.e_score_correction_bias.clone())
    return torch.stack(biases)


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save(
            train(layer_of(bias_update_speed=0.05), tokens(3, 8, 10, 16), micro=2, rank=rank, ranks=2),
            f"{folder}/{rank}.pt",
        )
    finally:
        dist.destroy_process_group()


def test_micro_batches_give_the_bias_of_one_batch():
    batches = tokens(3, 8, 10, 16)
    whole = train(layer_of(bias_update_speed=0.05), batches, micro=1)
    assert torch.equal(whole, train(layer_of(bias_update_speed=0.05), batches, micro=4)) and not torch.equal(
        whole[0], whole[2]
    )


def test_two_ranks_give_the_bias_of_one_process(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    whole = train(layer_of(bias_update_speed=0.05), tokens(3, 8, 10, 16), micro=1)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), whole)


def test_the_bias_is_saved_and_only_moves_for_noaux_tc():
    layer = layer_of()
    layer(tokens(2, 10, 16))
    load = layer.update_bias()
    assert torch.equal(
        layer.gate.e_score_correction_bias, 0.001 * torch.sign(5.0 - load)
    )  # 40 assignments, 8 experts: down for the busy
    other = layer_of(seed=5)
    other.load_state_dict(layer.state_dict())
    assert other.gate.e_score_correction_bias.any() and torch.equal(
        other(tokens(2, 10, 16))[0], layer(tokens(2, 10, 16))[0]
    )
    for router in ("standard", "aux_tc"):
        still = layer_of(router=router)
        still(tokens(2, 10, 16))
        assert still.update_bias().sum() == 40 and not still.gate.e_score_correction_bias.any()


def test_statistics_of_known_loads():
    found = load_statistics(torch.tensor([[5, 5, 5, 5], [8, 8, 4, 0]]))
    assert (
        found["experts_used"] == [1.0, 0.75]
        and found["max_vio"] == pytest.approx([0.0, 0.6])
        and found["mean_max_vio"] == pytest.approx(0.3)
    )
    assert found["load_cv"] == pytest.approx([0.0, (11 / 25) ** 0.5]) and found["load_evenness"][0] == pytest.approx(
        1.0
    )
    assert float(max_violation(torch.tensor([0, 0, 0, 9]))) == 3.0


def test_stats_are_asked_for_and_detached():
    layer, x = layer_of(), tokens(2, 10, 16)
    y, stats = layer(x)
    assert isinstance(stats, RouterStats) and stats.indices is None and stats.weights is None
    assert (
        not stats.counts.requires_grad
        and not stats.entropy.requires_grad
        and 0 < float(stats.entropy) <= torch.log(torch.tensor(8.0))
    )
    _, stats = layer(x, keep_choice=True)
    assert stats.indices.shape == stats.weights.shape == (20, 2) and torch.equal(
        torch.bincount(stats.indices.flatten(), minlength=8), stats.counts
    )
    one = layer(x[:, :1])[0]
    torch.testing.assert_close(one, y[:, :1], atol=1e-6, rtol=1e-5)


def test_the_backend_is_named_for_the_record():
    assert expert_backend("cpu", torch.float32, 384, 1536) in ("grouped", "batched")
    assert expert_backend("cpu", torch.float64, 384, 1536) == "batched"


@pytest.mark.slow
def test_the_bias_balances_a_model_on_a_skewed_stream():
    """Tokens with Zipf frequencies, repeated from a few positions back.

    Validation load over 51,200 tokens, with and without balancing.
    """
    from kimi_nb.model import KimiModel

    vocab, length = 128, 32
    config = ModelConfig(
        d_model=32,
        n_layers=2,
        n_heads=2,
        vocab_size=vocab,
        max_seq_len=length,
        ffn={"kind": "moe"},
        moe={"router": "noaux_tc", "n_experts": 8, "top_k": 2, "d_expert": 16},
    )
    share = torch.arange(1, vocab + 1.0) ** -1.0

    def batch(n, draw):
        ids = torch.multinomial(share, n * (length + 1), replacement=True, generator=draw).view(n, length + 1)
        ids[:, 1::2] = (ids[:, :-1:2] * 3 + 1) % vocab  # every second token follows from the one before it
        return ids[:, :-1], ids[:, 1:]

    def validation_load(speed):
        torch.manual_seed(0)
        model, draw = KimiModel(config), torch.Generator().manual_seed(1)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
        for _ in range(800):
            ids, targets = batch(16, draw)
            model(ids, targets=targets).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            update_biases(model.moe_layers().values(), speed)
        model.eval()
        with torch.no_grad():
            parts = [
                model(ids).router
                for ids, _ in (batch(400, torch.Generator().manual_seed(seed)) for seed in (2, 3, 4, 5))
            ]
        counts = sum(torch.stack([s.counts for s in part]) for part in parts)
        assert int(counts[0].sum()) == 2 * 51_200
        return max_violation(counts).tolist()

    still, moving = validation_load(0.0), validation_load(None)
    assert min(still) > 0.5 and max(moving) < 0.1, (still, moving)


def test_a_quantile_over_micro_batches_is_that_of_the_batch(tmp_path, monkeypatch):
    """Four micro-batches, two and one: the same bias after a step, and experts that then share the load."""
    from tiny import tiny_run

    from kimi_nb.data import prepare
    from kimi_nb.train import Trainer, pick_device

    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path / "cache"))
    experts = {"ffn.kind": "moe", "moe.n_experts": 4, "moe.d_expert": 8, "moe.router": "quantile"}
    run = tiny_run().changed({f"model.{path}": value for path, value in experts.items()})
    data, biases = prepare(run.data), []
    for size in (4, 2, 1):
        trainer = Trainer(run.override({"train.micro_batch_size": size}), data, pick_device("cpu"))
        trainer.step(0)
        biases.append(trainer.moe[0].gate.e_score_correction_bias.clone())
    assert biases[0].abs().max() > 1e-3
    for bias in biases[1:]:
        torch.testing.assert_close(bias, biases[0], atol=2e-5, rtol=0)
