"""The parts of a network answer for themselves; a step and a compiled layer wait for nothing."""

import copy
import math
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kimi_nb.config import AttentionConfig, ModelConfig, MoEConfig, NormConfig
from kimi_nb.model import (
    ATTENTIONS,
    FEED_FORWARDS,
    NORMS,
    RESIDUALS,
    ROUTERS,
    Attention,
    Decoder,
    KimiModel,
    KVCache,
    RotaryEmbedding,
    attention_flops_per_token,
    attention_words,
    attentions_of,
    build_cache,
    cache_bytes,
    cache_bytes_per_token,
    costs,
    expert_backend,
    experts,
    forward_flops_per_token,
    kernel_name,
    kernels,
    measured_forward_flops_per_token,
    rope_dim,
    state_bytes,
)

MLA = dict(kind="mla", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
K3 = dict(kind="kda", linear_heads=3, linear_head_dim=6, conv_kernel=3, gate_rank="full", decay_bound=-5.0)
LATENT = dict(kind="latent", n_latents=2, chunk_size=4)
EXPERTS = dict(n_experts=4, top_k=2, d_expert=16)
ARMS = dict(
    base=dict(),
    rmsnorm=dict(norm=dict(kind="rmsnorm")),
    learned=dict(position=dict(kind="learned")),
    qk_norm=dict(attention=dict(qk_norm=True)),
    eager=dict(attention=dict(implementation="eager")),
    flash=dict(attention=dict(implementation="flash")),
    mla=dict(attention=MLA, norm=dict(kind="rmsnorm")),
    mla_flash=dict(attention=MLA | dict(implementation="flash")),
    latent=dict(attention=LATENT),
    gated=dict(attention=dict(output_gate=True)),
    mla_gated=dict(attention=MLA | dict(output_gate=True)),
    kda=dict(attention=dict(kind="kda")),
    kda_eager=dict(attention=dict(kind="kda", implementation="eager")),
    gdn=dict(attention=dict(kind="gdn")),
    k3=dict(attention=K3),
    hybrid=dict(
        n_layers=4, attention=MLA | K3 | dict(pattern="kda,kda,kda,mla", output_gate=True), position=dict(kind="nope")
    ),
    nope=dict(position=dict(kind="nope")),
    mla_nope=dict(attention=MLA, position=dict(kind="nope")),
    mixed=dict(n_layers=3, attention=MLA | LATENT | dict(kind="mha", pattern="mla,latent,mha", qk_rope_head_dim=8)),
    standard=dict(ffn=dict(kind="moe", activation="silu"), moe=EXPERTS),
    aux_tc=dict(ffn=dict(kind="moe"), moe=EXPERTS | dict(router="aux_tc", seq_loss_weight=0.1)),
    kimi=dict(
        attention=MLA,
        norm=dict(kind="rmsnorm"),
        ffn=dict(kind="moe"),
        moe=EXPERTS | dict(router="noaux_tc", n_shared_experts=1),
    ),
    depth=dict(n_layers=4, residual=dict(kind="attention", block_layers=2)),
    situ=dict(ffn=dict(activation="situ")),
    situ_experts=dict(ffn=dict(kind="moe", activation="situ"), moe=EXPERTS),
    latent_experts=dict(ffn=dict(kind="moe"), moe=EXPERTS | dict(latent_dim=8, n_shared_experts=1)),
    quantile=dict(ffn=dict(kind="moe"), moe=EXPERTS | dict(router="quantile")),
    further=dict(mtp_depth=1),
)


def config_of(arm: str, **more) -> ModelConfig:
    return ModelConfig(**(dict(d_model=32, n_heads=4, vocab_size=50, max_seq_len=16) | ARMS[arm] | more))


def batch(config, B=2, T=16):
    ids = torch.randint(0, 50, (B, T + 1), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


# --- the tables ----------------------------------------------------------------------------------------------------

TABLES = {
    "attention.kind": (ATTENTIONS, AttentionConfig, "kind"),
    "norm.kind": (NORMS, NormConfig, "kind"),
    "moe.router": (ROUTERS, MoEConfig, "router"),
    "ffn.kind": (FEED_FORWARDS, type(ModelConfig().ffn), "kind"),
}


@pytest.mark.parametrize("setting", TABLES)
def test_a_table_has_what_the_settings_allow_and_each_file_says_whose_it_is(setting):
    table, section, field = TABLES[setting]
    assert tuple(table) == section.model_fields[field].annotation.__args__
    for name, cls in table.items():
        assert sys.modules[cls.__module__].__component__ == (setting, name)


class Averaging(Attention):
    """The running mean of what was seen: an attention that says only what it must."""

    kind = "averaging"

    def __init__(self, config, layer_idx=0):
        super().__init__(config, layer_idx, config.head_dim)
        self.v_proj, self.o_proj = (nn.Linear(config.d_model, config.d_model, bias=False) for _ in range(2))

    def forward(self, x, rope=None, cache=None, need_weights=False):
        v = self.v_proj(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        T = v.shape[2]
        if cache is not None:
            v = cache.append(v, v)[0]
        mean = v.cumsum(2) / torch.arange(1, v.shape[2] + 1).view(-1, 1)
        return self.o_proj(mean[:, :, -T:].transpose(1, 2).flatten(2))

    @classmethod
    def new_cache(cls, config, batch_size, max_len, device=None, dtype=torch.float32):
        return KVCache(config, batch_size, max_len, device, dtype)

    @classmethod
    def cache_numbers(cls, config, tokens):
        return 2 * config.d_model * tokens

    @classmethod
    def flops(cls, config, seq_len):
        return 0


def test_a_new_attention_is_one_class_and_one_entry(monkeypatch):
    """Model, caches, decoding, costs, kernel and words: nobody else has to know it."""
    monkeypatch.setitem(ATTENTIONS, "averaging", Averaging)
    config = config_of("base")
    config = config.model_copy(update=dict(attention=config.attention.model_copy(update=dict(kind="averaging"))))
    model = KimiModel(config).eval()
    x, y = batch(config)
    model(x, targets=y).loss.backward()
    whole = model(x).logits.detach()
    decoder, cache = Decoder(model), model.make_cache(2, 4)
    pieces = [decoder(x[:, t : t + 1], cache) for t in range(16)]
    torch.testing.assert_close(torch.stack(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    assert cache.nbytes == 2 * cache_bytes(config, 16) and costs(model)["cache_bytes_per_token"] == 2 * 2 * 32 * 4
    assert kernel_name(config) == "torch-math" and rope_dim(config) == 8
    assert ATTENTIONS["averaging"].words(config)[0] == "averaging: 4 heads × 8"
    with pytest.raises(kernels.AttentionError, match="averaging has no QK-clip"):
        model.layers[0].self_attn.clip_heads_(torch.ones(4))


def test_the_table_of_residuals_has_what_is_built():
    for name, cls in RESIDUALS.items():
        assert sys.modules[cls.__module__].__component__ == ("residual.kind", name) and cls.kind == name
    allowed = ModelConfig.model_fields["residual"].annotation.model_fields["kind"].annotation.__args__
    assert set(RESIDUALS) <= set(allowed)


def test_layers_of_several_kinds_add_up():
    """Caches, costs and words of a pattern are those of its layers."""
    config, one = (
        config_of("mixed"),
        lambda kind: (
            config_of("mixed")
            .override({"attention.pattern": None, "n_layers": 1})
            .override({"attention.kind": kind} if kind != "mha" else {})
        ),
    )
    parts = [one(kind) for kind in config.layer_kinds]
    assert [cls.kind for cls in attentions_of(config)] == ["mla", "latent", "mha"]
    for count in (lambda c: cache_bytes(c, 8), cache_bytes_per_token, lambda c: attention_flops_per_token(c, 16)):
        assert count(config) == sum(map(count, parts))
    model = KimiModel(config)
    assert [layer.self_attn.kind for layer in model.layers] == list(config.layer_kinds)
    assert [type(c).__name__ for c in model.make_cache(1)] == ["MLACache", "LatentCache", "KVCache"]
    assert attention_words(config)[0] == "layers in turn: mla, latent, mha" and state_bytes(config) == 0


# --- decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [dict(kv_lora_rank=5), dict(qk_nope_head_dim=3), dict(kv_lora_rank=7, v_head_dim=5)])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash"])
@pytest.mark.parametrize("heads", [1, 2])
def test_odd_sizes_of_mla_decode_one_token_of_one_text(sizes, implementation, heads):
    attention = MLA | dict(qk_rope_head_dim=2, implementation=implementation) | sizes
    config = ModelConfig(d_model=8, n_layers=1, n_heads=heads, vocab_size=11, max_seq_len=16, attention=attention)
    model, ids = KimiModel(config).eval(), torch.tensor([[1, 2, 3, 4]])
    whole = model(ids).logits
    assert torch.allclose(model(ids[:, :1]).logits, whole[:, :1], atol=1e-6)
    for step in (lambda ids, cache: model(ids, cache=cache).logits[:, -1], Decoder(model)):
        cache = model.make_cache(1)
        with torch.no_grad():
            pieces = [step(ids[:, t : t + 1], cache) for t in range(4)]
        torch.testing.assert_close(torch.stack(pieces, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arm", ARMS)
def test_decoding_is_the_forward_pass(arm):
    config = config_of(arm)
    model = KimiModel(config).eval().double()
    x, _ = batch(config, B=3)
    decoder, cache = Decoder(model), build_cache(config, 3, 4, dtype=torch.float64)
    pieces = [decoder(x[:, t : t + 1], cache) for t in range(16)]
    torch.testing.assert_close(torch.stack(pieces, 1), model(x).logits.detach(), rtol=1e-6, atol=1e-7)


# --- what a step waits for, and what breaks a graph ------------------------------------------------------------------

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "aten.equal", "unique")


class Waits(TorchDispatchMode):
    """Operators for which a GPU's host would wait."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in WAITS):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("arm", ARMS)
def test_a_step_asks_for_no_number(arm, tracked):
    """Forward and backward: no `.item()`, no `nonzero`, no question whether a tensor is true."""
    model = KimiModel(config_of(arm))
    for layer in model.layers:
        layer.self_attn.track_logits = tracked
    x, y = batch(model.config)
    with Waits() as waits:
        out = model(x, targets=y, logits=False)
        (out.loss + out.aux_loss).backward()
    assert waits.found == []


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("arm", ARMS)
def test_every_layer_is_one_graph(arm, tracked):
    """torch.compile refuses a break; two micro-batches and a reset compile it once."""
    torch._dynamo.reset()
    model = KimiModel(config_of(arm))
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        assert all(t.device.type == "cpu" for t in inputs if isinstance(t, torch.Tensor))
        return graph.forward

    layer = model.layers[0]
    layer.self_attn.track_logits = tracked
    x = model.residual.start(torch.randn(2, 16, 32, requires_grad=True))
    rope = model.rope(torch.arange(16)) if hasattr(model, "rope") else None
    expected = model.residual.read(copy.deepcopy(layer)(x, rope)[0])
    fast = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
    for _ in range(2):
        found = model.residual.read(fast(x, rope)[0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        found.sum().backward()
    layer.self_attn.reset_logit_max()
    fast(x, rope)
    assert len(compiled) == 1


def test_flash_looks_for_its_package_before_anything_is_traced(monkeypatch):
    package = kernels.FlashPackage(lambda *a, **k: None, "2.8.3")
    monkeypatch.setattr(kernels, "flash_attn_package", lambda: package)
    layer = KimiModel(config_of("flash")).layers[0].self_attn
    assert layer.flash_package is package and KimiModel(config_of("base")).layers[0].self_attn.flash_package is None

    def never():
        raise AssertionError("asked while computing")

    monkeypatch.setattr(kernels, "flash_attn_package", never)
    layer(torch.randn(1, 16, 32))  # on a CPU it is PyTorch's kernel


def test_logit_maxima_stay_in_the_tensor_that_is_there():
    layer = KimiModel(config_of("mla")).layers[0].self_attn
    layer.track_logits, held = True, layer.logit_max
    rope, x = RotaryEmbedding(4)(torch.arange(16)), torch.randn(2, 16, 32)
    layer(x, rope)
    seen = held.clone()
    assert layer.logit_max is held and seen.isfinite().all()
    layer(x / 100, rope)
    assert torch.equal(held, seen)  # smaller logits change nothing
    layer.reset_logit_max()
    assert layer.logit_max is held and held.tolist() == [-math.inf] * 4
    assert layer.to("meta").logit_max.is_meta and layer.to_empty(device="cpu").logit_max.max() == -math.inf
    assert layer.bfloat16().logit_max.dtype == torch.float32


# --- the model's own thrift ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["base", "kimi", "latent"])
def test_the_loss_alone_is_the_loss(arm):
    model = KimiModel(config_of(arm))
    x, y = batch(model.config)
    grads = []
    for logits in (True, False):
        model.zero_grad()
        out = model(x, targets=y, logits=logits)
        (out.loss + out.aux_loss).backward()
        grads.append([out.loss.detach(), *(p.grad for p in model.parameters())])
    assert out.logits is None and all(map(torch.equal, *grads))


@pytest.mark.parametrize("arm", ["base", "kimi", "latent", "learned"])
def test_parameters_are_drawn_once_and_no_other_draw_moves(arm, monkeypatch):
    """Each from the generator of its name; the stream that dropout uses stands where it stood."""
    drawn, draw = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: drawn.append(k) or draw(*a, **k))
    before = torch.get_rng_state()
    model = KimiModel(config_of(arm), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    on_cpu = [k for k in drawn if "generator" in k]
    assert len(on_cpu) == sum(p.ndim > 1 for p in model.parameters())
    assert all(t.isfinite().all() for t in (*model.parameters(), *model.buffers()))
    for layer in model.layers:
        if layer.sparse:
            assert (
                layer.mlp.gate.load_accumulator.tolist() == layer.mlp.gate.e_score_correction_bias.tolist() == [0] * 4
            )
    tied = model.lm_head.weight is model.embed_tokens.weight
    assert tied == model.config.tie_embeddings


def test_the_router_s_entropy_is_computed_when_it_is_read():
    model = KimiModel(config_of("kimi"))
    x, _ = batch(model.config)

    class Entropies(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += "entr" in str(func)
            return func(*args, **(kwargs or {}))

    with Entropies() as asked:
        stats = model(x).router[0]
        assert asked.n == 0 and 0 < stats.entropy <= math.log(4) + 1e-6 and asked.n == 1


# --- experts on a GPU, as far as a CPU can tell --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "backend"), [((8, 0), "batched"), ((8, 9), "batched"), ((9, 0), "grouped"), ((10, 0), "grouped")]
)
def test_the_grouped_product_is_used_where_it_is_a_kernel(monkeypatch, capability, backend):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert expert_backend("cuda:0", torch.bfloat16, 384, 1536) == backend
    assert expert_backend("cuda:0", torch.float32, 384, 1536) == "batched"
    assert experts._leaves_idle_unwritten(torch.device("cuda:0")) == (capability >= (10, 0))


def test_experts_without_tokens_have_no_gradient_whatever_a_kernel_wrote(monkeypatch):
    """As a card that leaves the gradient of an empty group unwritten."""
    monkeypatch.setattr(experts, "_leaves_idle_unwritten", lambda device: True)
    real = experts._grouped_product

    class Dirty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, stack):
            return stack.view_as(stack)

        @staticmethod
        def backward(ctx, grad):
            empty = (grad == 0).flatten(1).all(1).view(-1, 1, 1)
            return grad.masked_fill(empty, math.nan)

    monkeypatch.setattr(experts, "_grouped_product", lambda rows, stack, ends: real(rows, Dirty.apply(stack), ends))
    torch.manual_seed(0)
    w_in, w_out = torch.randn(4, 16, 8, requires_grad=True), torch.randn(4, 8, 8, requires_grad=True)
    indices = torch.tensor([[0], [2], [2]])
    y = experts.run_experts(torch.randn(3, 8), indices, torch.ones(3, 1), w_in, w_out, "swiglu", "grouped")
    y.square().sum().backward()
    for w in (w_in, w_out):
        assert w.grad.isfinite().all() and (w.grad[[1, 3]] == 0).all() and (w.grad[[0, 2]] != 0).any()


# --- costs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_counted_flops_count_the_experts(top_k, kernel):
    attention = dict(implementation=kernel)
    model = KimiModel(config_of("standard", attention=attention, moe=EXPERTS | dict(top_k=top_k))).eval()
    counted = measured_forward_flops_per_token(model, 16)
    assert counted == pytest.approx(forward_flops_per_token(model, 16), rel=0.01)
