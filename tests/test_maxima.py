"""QK-clip's maxima from the attention kernel: it gives attention written out, and a step of MuonClip is the same."""

import pytest
import torch
from tiny import tiny_run
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as flex

from kimi_nb.bench import attention_and_maxima, causal_blocks, kernel_maxima_, stages
from kimi_nb.data import prepare
from kimi_nb.model import eager_attention
from kimi_nb.train import Trainer, muon

MLA = {
    "model.attention.kind": "mla", "model.attention.kv_lora_rank": 8, "model.attention.qk_nope_head_dim": 4,
    "model.attention.qk_rope_head_dim": 4, "model.attention.v_head_dim": 8,
}  # fmt: skip
CLIP = {"train.optimizer.name": "muonclip", "train.optimizer.qk_clip_threshold": 0.001, "model.n_layers": 2}


@pytest.fixture
def written_out(monkeypatch):
    """PyTorch's own kernel-free form of it, which a CPU is refused: with the maxima and with a backward pass."""
    real = flex._apply_kernel_options

    def options(query, key, value, return_lse, kernel_options, return_aux=None):
        found = real(query, key, value, return_lse, kernel_options, None)
        return found | dict(OUTPUT_MAX=True, OUTPUT_LOGSUMEXP=True)

    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_apply_kernel_options", options)
    monkeypatch.setattr(stages, "_by_itself", lambda: flex.flex_attention)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("tokens", "width"), [(1, 4), (16, 4), (130, 6)])
def test_output_gradients_and_maxima_are_those_of_attention_written_out(tokens, width, written_out):
    draw = torch.Generator().manual_seed(tokens)
    leaves = [torch.randn(2, 3, tokens, w, generator=draw, dtype=torch.float64) for w in (4, 4, width)]
    q, k, v = (t.requires_grad_() for t in leaves)
    y, maxima = attention_and_maxima(q, k, v, 0.7, causal_blocks(tokens, "cpu"))
    expected, _, logits = eager_attention(q, k, v, 0.7)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(maxima.double(), logits.detach().amax((-1, -2)))
    assert not maxima.requires_grad
    weights = torch.randn(y.shape, generator=draw, dtype=torch.float64)
    found = torch.autograd.grad((y * weights).sum(), (q, k, v))
    for mine, theirs in zip(found, torch.autograd.grad((expected * weights).sum(), (q, k, v))):
        torch.testing.assert_close(mine, theirs)


def both_ways(run):
    """The run with maxima from the kernel, and as it is."""
    data = prepare(run.data, run.seq_len)
    kernel, blocks = (Trainer(run, data, torch.device("cpu")) for _ in range(2))
    kernel_maxima_(kernel.model, run.seq_len)
    return kernel, blocks


def check_steps(kernel, blocks, steps=6):
    """Losses, norms, largest logits and clipped heads, and the held-out loss after them."""
    clipped = 0
    for step in range(steps):
        line, expected = kernel.step(step), blocks.step(step)
        assert line["qk_clipped_heads"] == expected["qk_clipped_heads"]
        clipped += line["qk_clipped_heads"]
        for name in ("train_loss", "grad_norm", "qk_max_logit", "qk_min_gamma"):
            assert line[name] == pytest.approx(expected[name], rel=1e-4)
    assert clipped > 0
    assert kernel.evaluate("val")["loss"] == pytest.approx(blocks.evaluate("val")["loss"], rel=1e-5)


@pytest.mark.parametrize("kind", [{}, MLA], ids=["mha", "mla"])
def test_a_step_of_muonclip_is_the_same(kind, written_out, monkeypatch):
    real, asked = stages.attention_and_maxima, []
    monkeypatch.setattr(stages, "attention_and_maxima", lambda *given: asked.append(given) or real(*given))
    check_steps(*both_ways(tiny_run().override(kind | CLIP)))
    assert len(asked) == 12  # two layers, six steps; an evaluation asks for no maxima


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, MLA], ids=["mha", "mla"])
def test_a_compiled_layer_is_one_graph_with_its_maxima(kind, written_out, monkeypatch):
    real, how = nn.Module.compile, dict(backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(nn.Module, "compile", lambda module, **asked: real(module, **asked, **how))
    monkeypatch.setattr(muon, "_compiled", lambda: muon.newton_schulz)
    kernel, blocks = both_ways(tiny_run().override(kind | CLIP | {"train.compile": True}))
    counters.clear()
    kernel.warm_up()
    blocks.warm_up()
    graphs = counters["stats"]["unique_graphs"]
    check_steps(kernel, blocks)
    assert counters["stats"]["unique_graphs"] == graphs
