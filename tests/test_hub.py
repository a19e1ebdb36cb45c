"""Models in and out: DeepSeek-V3 as an independent witness over random configurations, and transformers' own ways."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM

from kimi_nb.config import ModelConfig, RunConfig
from kimi_nb.data import ByteTokenizer, CharTokenizer, PairTokenizer
from kimi_nb.model import KimiModel
from kimi_nb.study import Record
from kimi_nb.train import save_model
from kimi_nb.use import (
    Generator,
    HubError,
    KimiNbConfig,
    KimiNbForCausalLM,
    deepseek_obstacles,
    from_deepseek_v3,
    load_pretrained,
    save_pretrained,
    to_deepseek_v3,
)

QUIET = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MLA = dict(kind="mla", kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8)


@st.composite
def kimi_configs(draw):
    """A network of Kimi K2's parts only, of any shape."""
    pick = lambda *choices: draw(st.sampled_from(choices))
    number = lambda least, most: draw(st.integers(least, most))
    heads, layers = pick(1, 2, 3), number(1, 3)
    groups = pick(1, 2, 4)
    experts = groups * number(2, 4)
    open_groups = number(1, groups)
    moe = dict(
        router="noaux_tc",
        n_experts=experts,
        top_k=number(1, min(4, open_groups * (experts // groups))),
        n_group=groups,
        topk_group=open_groups,
        n_shared_experts=number(0, 2),
        d_expert=pick(5, 8, 16),
        routed_scaling_factor=pick(1.0, 2.827),
        norm_topk_prob=pick(False, True),
        seq_loss_weight=pick(0.0, 1e-4),
    )
    attention = dict(
        kind="mla",
        implementation=pick("eager", "sdpa", "flash"),
        q_lora_rank=pick(None, 7),
        kv_lora_rank=number(2, 16),
        qk_nope_head_dim=number(1, 8),
        qk_rope_head_dim=2 * number(1, 4),
        v_head_dim=number(1, 12),
    )
    return ModelConfig(
        d_model=8 * heads,
        n_heads=heads,
        n_layers=layers,
        d_ff=pick(None, 20),
        vocab_size=53,
        max_seq_len=16,
        tie_embeddings=pick(False, True),
        first_dense_layers=number(0, layers),
        norm=dict(kind="rmsnorm", eps=pick(1e-6, 1e-6, 1e-5, 1e-8)),
        position=dict(theta=pick(100.0, 50000.0), yarn_factor=pick(1.0, 1.0, 2.0, 4.0)),
        attention=attention,
        ffn=dict(kind="moe", activation="swiglu"),
        moe=moe,
    )


def awake(config, seed=0, dtype=torch.float32):
    """A model whose gains, biases and weights are away from where they began, so that a forgotten one shows."""
    model, g = KimiModel(config, seed=seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() == 1 else 0.15))
        for moe in model.moe_layers().values():
            moe.gate.e_score_correction_bias.copy_(torch.randn(moe.config.n_experts, generator=g) * 0.3)
    return model.to(dtype).eval()


def same_weights(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(t, right[n]) and t.dtype == right[n].dtype for n, t in left.items()
    )


# A file's tensors lie where its header ends, not at a multiple of 64 bytes as torch's own do, and MKL may then add up a
# product in another order (seen on AMD processors). Equal weights at another place give logits that differ by a few
# roundings of the largest: by up to 7 in random networks of this file, so 32 are allowed.
ROUNDINGS = 32


def agree_wherever_weights_lie(model, other, ids, prefix=""):
    """Bits on the same memory, roundings where each reads its own; `prefix` is where `model` holds `other`."""
    logits = other(ids).logits
    there = {prefix + n: p for n, p in other.named_parameters()}
    assert torch.equal(functional_call(model, there, (ids,)).logits, logits)
    allowed = ROUNDINGS * torch.finfo(logits.dtype).eps * logits.abs().max().item()
    torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=allowed)


def chosen(model, ids):
    """Logits, and every layer's experts as sorted (tokens, top_k)."""
    found, hooks = [], []
    for layer in model.layers if isinstance(model, KimiModel) else model.model.layers:
        gate = getattr(layer.mlp, "gate", None)
        if gate is None:
            continue
        if isinstance(model, KimiModel):
            hooks.append(
                gate.register_forward_hook(
                    lambda m, i, out, moe=layer.mlp: found.append(moe.route(out).indices.sort(-1)[0])
                )
            )
        else:
            hooks.append(gate.register_forward_hook(lambda m, i, out: found.append(out[2].sort(-1)[0])))
    logits = model(ids).logits
    for h in hooks:
        h.remove()
    return logits, found


def agrees(config, seed, folder):
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        ours = awake(config, seed, dtype)
        theirs = to_deepseek_v3(ours)
        assert type(theirs) is DeepseekV3ForCausalLM and theirs.dtype == dtype
        ids = torch.randint(0, 53, (2, 21), generator=torch.Generator().manual_seed(seed))  # past the trained 16
        (a, routed), (b, expected) = chosen(ours, ids), chosen(theirs, ids)
        scale = max(1.0, b.abs().max().item())
        assert (a - b).abs().max().item() <= tolerance * scale
        assert len(routed) == len(expected) == len(ours.moe_layers()) and all(map(torch.equal, routed, expected))
        for logits in (a, b):
            cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        wanted = {n.removeprefix("model."): p.grad for n, p in theirs.named_parameters()}
        s = (1e-6 / config.norm.eps) ** 0.5  # rows that write latents carry another eps as a factor
        for name, p in ours.named_parameters():
            grad = wanted[name].clone() if wanted[name] is not None else None
            if p.grad is None or grad is None:  # experts nobody chose
                assert (p.grad is None or not p.grad.any()) and (grad is None or not grad.any())
                continue
            rows = (
                config.attention.q_lora_rank
                if name.endswith("q_a_proj.weight")
                else config.attention.kv_lora_rank
                if name.endswith("kv_a_proj_with_mqa.weight")
                else 0
            )
            if rows:
                grad[:rows] *= s
            assert (p.grad - grad).abs().max() <= 1e-4 * max(1.0, grad.abs().max().item()), name
        exact = config.norm.eps == 1e-6
        theirs.save_pretrained(folder / f"deepseek-{dtype}")
        for back in (from_deepseek_v3(theirs), from_deepseek_v3(folder / f"deepseek-{dtype}")):
            assert back.config == config and not back.training
            if exact:
                assert same_weights(back, ours)
            assert (back(ids).logits - a).abs().max() <= tolerance * scale
        save_pretrained(ours, folder / f"own-{dtype}")
        back = load_pretrained(folder / f"own-{dtype}")
        assert back.config == config and same_weights(back, ours)
        agree_wherever_weights_lie(back, ours, ids)


@settings(max_examples=8, **QUIET)
@given(kimi_configs(), st.integers(0, 1000))
def test_all_kimi_models_are_deepseek_v3(tmp_path_factory, config, seed):
    agrees(config, seed, tmp_path_factory.mktemp("hub"))


@pytest.mark.slow
@settings(max_examples=50, **QUIET)
@given(kimi_configs(), st.integers(0, 1000))
def test_fifty_all_kimi_models_are_deepseek_v3(tmp_path_factory, config, seed):
    agrees(config, seed, tmp_path_factory.mktemp("hub"))


KIMI = ModelConfig(
    d_model=16,
    n_heads=2,
    vocab_size=257,
    max_seq_len=32,
    norm=dict(kind="rmsnorm"),
    attention=MLA,
    ffn=dict(kind="moe"),
    moe=dict(router="noaux_tc", n_experts=4, d_expert=8, n_shared_experts=1),
)


def test_an_export_has_the_keys_of_published_checkpoints(tmp_path):
    """Readers that know several routers take a softmax without a bias where nothing is said."""
    ours = awake(KIMI)
    ours.tokenizer = ByteTokenizer()
    theirs = to_deepseek_v3(ours)
    theirs.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    expected = dict(topk_method="noaux_tc", scoring_func="sigmoid", moe_layer_freq=1, eos_token_id=256, ep_size=1)
    expected |= dict(num_nextn_predict_layers=0, rope_theta=KIMI.position.theta, first_k_dense_replace=0)
    assert {name: said.get(name) for name in expected} == expected
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 256
    assert to_deepseek_v3(ours, CharTokenizer("abc", True, False)).config.eos_token_id == 3
    again = from_deepseek_v3(tmp_path)
    assert again.config == KIMI
    for name, value in (("scoring_func", "softmax"), ("topk_method", "greedy"), ("moe_layer_freq", 2)):
        other = to_deepseek_v3(ours)
        setattr(other.config, name, value)
        with pytest.raises(HubError, match=name):
            from_deepseek_v3(other)


def test_an_export_keeps_its_router_through_a_file(tmp_path):
    """The keys survive being loaded and saved by transformers."""
    to_deepseek_v3(awake(KIMI)).save_pretrained(tmp_path / "a")
    DeepseekV3ForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    said = json.loads((tmp_path / "b" / "config.json").read_text())
    assert said["scoring_func"] == "sigmoid" and said["topk_method"] == "noaux_tc"


def changed(**parts):
    """KIMI with whole sections given anew."""
    return ModelConfig(**{**KIMI.model_dump(), **parts})


def test_a_half_precision_model_keeps_its_bias_in_float32(tmp_path):
    ours = awake(KIMI, dtype=torch.bfloat16)
    theirs, ids = to_deepseek_v3(ours), torch.arange(128).view(16, 8)
    bias = ours.layers[1].mlp.gate.e_score_correction_bias
    assert (
        theirs.dtype == torch.bfloat16
        and torch.equal(theirs.model.layers[1].mlp.gate.e_score_correction_bias, bias)
        and bias.dtype == torch.float32
    )
    with torch.no_grad():  # the same kernels
        (a, routed), (b, expected) = chosen(theirs, ids), chosen(ours, ids)
    # another rounding may choose other experts for a token near a tie, and the rest of its row reads that token:
    # rows with the same experts are compared
    alike = [(x == y).view(16, -1).all(-1) for x, y in zip(routed, expected, strict=True)]
    same = torch.stack(alike).all(0)
    assert same.sum() >= 12 and (a - b)[same].abs().max() < 0.05 * b.abs().max()
    theirs.save_pretrained(tmp_path / "a")
    save_pretrained(ours, tmp_path / "b")
    for folder in "ab":
        assert same_weights(load_pretrained(tmp_path / folder), ours)
    with pytest.raises(HubError, match=r"norm\.eps 0.01 is not DeepSeek-V3's"):
        to_deepseek_v3(awake(changed(norm=dict(kind="rmsnorm", eps=1e-2)), dtype=torch.bfloat16))


def test_dense_and_aux_tc_models_are_deepseek_v3_too():
    for parts in (
        dict(ffn=dict(kind="dense")),
        dict(moe=KIMI.moe.model_dump() | dict(router="aux_tc")),
        dict(first_dense_layers=2),
    ):
        ours = awake(changed(**parts))  # aux_tc with a bias in its buffer, which it does not use
        ids = torch.arange(20)[None]
        torch.testing.assert_close(to_deepseek_v3(ours)(ids).logits, ours(ids).logits, atol=1e-4, rtol=0)
        assert from_deepseek_v3(to_deepseek_v3(ours)).config == ours.config


def test_every_setting_in_the_way_is_named():
    plan = KimiModel(
        changed(
            attention=dict(kind="mha"),
            norm=dict(kind="layernorm"),
            position=dict(kind="learned"),
            ffn=dict(kind="moe", activation="gelu"),
            moe=dict(router="standard"),
        )
    )
    with pytest.raises(HubError) as e:
        to_deepseek_v3(plan)
    for name in (
        "attention.kind mha",
        "norm.kind layernorm",
        "position.kind learned",
        "ffn.activation gelu",
        "moe.router standard",
    ):
        assert name in str(e.value)
    assert "\n" not in str(e.value) and deepseek_obstacles(KIMI) == []


def test_a_deepseek_model_from_elsewhere_is_read_by_its_own_fields():
    theirs = to_deepseek_v3(awake(KIMI))
    ids, logits = torch.arange(30)[None], to_deepseek_v3(awake(KIMI))(torch.arange(30)[None]).logits
    del theirs.config.kimi_nb
    torch.testing.assert_close(from_deepseek_v3(theirs)(ids).logits, logits, atol=1e-4, rtol=0)
    theirs = to_deepseek_v3(awake(KIMI))
    theirs.config.routed_scaling_factor = 2.0  # the file says something else than our note: the file counts
    assert from_deepseek_v3(theirs).config.moe.routed_scaling_factor == 2.0
    for field, value in (("hidden_act", "gelu"), ("rope_interleave", False), ("attention_bias", True)):
        theirs = to_deepseek_v3(awake(KIMI))
        setattr(theirs.config, field, value)
        with pytest.raises(HubError, match=field):
            from_deepseek_v3(theirs)


ANY = dict(
    nanogpt=dict(
        position=dict(kind="learned"),
        attention=dict(kind="mha"),
        norm=dict(kind="layernorm"),
        ffn=dict(kind="dense", activation="gelu"),
    ),
    standard=dict(
        attention=dict(kind="mha", qk_norm=True),
        moe=dict(router="standard", n_experts=4, d_expert=8),
        ffn=dict(kind="moe", activation="silu"),
    ),
    latent=dict(attention=dict(kind="latent", n_latents=2, chunk_size=4), tie_embeddings=False, ffn=dict(kind="dense")),
    kimi=dict(position=dict(yarn_factor=2.0)),
)


@pytest.mark.parametrize("name", ANY)
def test_any_configuration_is_a_transformers_model(name, tmp_path):
    ours = awake(changed(**ANY[name]))
    hf = KimiNbForCausalLM.of(ours)
    hf.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).kimi == ours.config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is KimiNbForCausalLM and same_weights(loaded.model, ours) and not loaded.training
    ids = torch.randint(0, 257, (3, 9), generator=torch.Generator().manual_seed(0))
    agree_wherever_weights_lie(loaded, ours, ids, prefix="model.")
    options = dict(max_new_tokens=14, do_sample=False, pad_token_id=256)
    alone = [loaded.generate(row[None, i:], use_cache=False, **options)[0, 9 - i :] for i, row in enumerate(ids)]
    assert torch.equal(loaded.generate(ids[:1], **options)[0, 9:], alone[0])
    mask = torch.ones_like(ids)
    for i in range(3):
        mask[i, :i] = 0
    for use_cache in (True, False):  # left padding
        assert torch.equal(
            loaded.generate(ids, attention_mask=mask, use_cache=use_cache, **options)[:, 9:], torch.stack(alone)
        )
    tokens = [t.tolist() for t in alone]
    text = Generator(ours, ByteTokenizer())
    assert text.generate_text(bytes((ids[0] % 128).tolist()).decode(), 4, greedy=True) is not None and tokens
    beams = [loaded.generate(ids, num_beams=3, use_cache=c, **options) for c in (True, False)]
    assert torch.equal(*beams)
    loss = loaded(ids, labels=ids).loss
    torch.testing.assert_close(loss, ours(ids[:, :-1], targets=ids[:, 1:]).loss)
    loaded.train()  # trains as it was loaded: router counts included
    loaded(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_padding_on_either_side_changes_no_logit():
    hf = KimiNbForCausalLM.of(awake(KIMI))
    ids = torch.randint(0, 257, (1, 8), generator=torch.Generator().manual_seed(0))
    alone = hf(ids[:, :5]).logits[0]
    for real, start in ((ids[:, :5], 3), (ids[:, :5], 0)):
        row, mask = torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.long)
        row[0, start : start + 5], mask[0, start : start + 5], row[1], mask[1] = real, 1, ids, 1
        torch.testing.assert_close(hf(row, attention_mask=mask).logits[0, start : start + 5], alone)


def test_a_fresh_model_is_the_same_as_ours():
    assert same_weights(KimiNbForCausalLM(KimiNbConfig(network=KIMI.model_dump(mode="json"))).model, KimiModel(KIMI))


def test_a_checkpoint_becomes_a_folder_with_card_tokenizer_and_record(tmp_path):
    run, model = RunConfig(model=KIMI), awake(KIMI)
    save_model(tmp_path / "run" / "final", model, run, ByteTokenizer())
    record = Record.of(
        run, "done", metrics=dict(test_bpb=2.345678, odd=None), provenance=dict(device="cpu", versions=dict(torch="2"))
    )
    (tmp_path / "run" / "result.json").write_text(record.to_json())
    folder = save_pretrained(tmp_path / "run", tmp_path / "out")
    card = (folder / "README.md").read_text()
    for part in (
        "library_name: transformers",
        "test_bpb | 2.34568",
        record.run_id,
        "versions.torch",
        "attention.kv_lora_rank",
        "Intended use",
        "import kimi_nb.use.hub",
    ):
        assert part in card, part
    assert not [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pkl", ".py")]
    back = load_pretrained(folder)
    assert same_weights(back, model) and Record.from_json((folder / "record.json").read_text()) == record
    prompt = dict(prompt="Once", max_new_tokens=9, greedy=True)
    assert Generator(back).generate_text(**prompt) == Generator.from_checkpoint(tmp_path / "run").generate_text(
        **prompt
    )


def test_a_byte_pair_tokenizer_is_one_for_transformers(tmp_path):
    bpe = PairTokenizer.train(["the sea and the land and the sky"] * 9, 270)
    save_pretrained(awake(changed(vocab_size=270)), tmp_path, tokenizer=bpe)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        hf("the sky and sea").input_ids == bpe.encode("the sky and sea").tolist()
        and hf.eos_token_id == bpe.eot_id == 269
    )
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 269
    assert load_pretrained(tmp_path).tokenizer.fingerprint == bpe.fingerprint


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path):
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    save_pretrained(awake(KIMI), tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    for folder in ("nothing", "gpt", "broken", "cut"):
        with pytest.raises(HubError) as e:
            load_pretrained(tmp_path / folder)
        assert folder in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(HubError, match="not deepseek_v3"):
        from_deepseek_v3(tmp_path / "gpt")
    with pytest.raises(HubError, match="takes a KimiModel"):
        save_pretrained(to_deepseek_v3(awake(KIMI)), tmp_path / "out")
    with pytest.raises(HubError, match="inputs_embeds"):
        KimiNbForCausalLM.of(awake(KIMI))(inputs_embeds=torch.zeros(1, 2, 16))


def test_a_character_tokenizer_comes_back(tmp_path):
    chars = CharTokenizer("abc def")
    save_pretrained(awake(changed(vocab_size=chars.vocab_size)), tmp_path, tokenizer=chars)
    assert load_pretrained(tmp_path).tokenizer.fingerprint == chars.fingerprint


def test_nothing_else_loads_transformers():
    loaded = "import sys, kimi_nb.use.generate, kimi_nb.use.deepseek, kimi_nb.cli.entry"
    code = f"{loaded}; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
