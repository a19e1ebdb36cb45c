"""Text from models: what the cache, the batch, the stream and the seed must not change, and the command line."""

import io
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kimi_nb.cli import main
from kimi_nb.config import ModelConfig, RunConfig
from kimi_nb.data import ByteTokenizer, CharTokenizer, PairTokenizer
from kimi_nb.model import Decoder, KimiModel
from kimi_nb.train import save_model
from kimi_nb.use import (
    GenerateError,
    Generator,
    Sampling,
    TextBuilder,
    draw,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    select_cache_rows,
    to_deepseek_v3,
)

MLA = dict(kind="mla", kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8)
BASE = dict(d_model=32, n_heads=2, vocab_size=257, max_seq_len=24)
KINDS = dict(
    mha=dict(),
    learned=dict(position=dict(kind="learned")),
    latent=dict(attention=dict(kind="latent", n_latents=2, chunk_size=4)),
    mla=dict(attention=MLA, norm=dict(kind="rmsnorm")),
    odd=dict(attention=MLA | dict(kv_lora_rank=5, qk_nope_head_dim=3), norm=dict(kind="rmsnorm")),
    flash=dict(attention=MLA | dict(kv_lora_rank=5, implementation="flash"), norm=dict(kind="rmsnorm")),
    kimi=dict(
        attention=MLA,
        norm=dict(kind="rmsnorm"),
        first_dense_layers=1,
        ffn=dict(kind="moe"),
        moe=dict(router="noaux_tc", n_experts=4, d_expert=16, n_shared_experts=1),
    ),
    standard=dict(ffn=dict(kind="moe", activation="gelu"), moe=dict(n_experts=4, d_expert=16)),
)


def writer(kind="kimi", tokenizer=None, **changes):
    """A random model with opinions: its weights are larger than at the start of training."""
    model = KimiModel(ModelConfig(**(BASE | KINDS[kind] | changes)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and not name.startswith("embed_pos"):
                p.mul_(5)
    return Generator(model, tokenizer or ByteTokenizer())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [dict(greedy=True), dict(seed=1), dict(seed=1, temperature=0.7, top_k=30, top_p=0.9, repetition_penalty=1.3)],
    ids=["greedy", "sampled", "everything"],
)
def test_cache_and_stream_change_nothing(kind, options):
    g = writer(kind)
    whole = g.generate_text("The sea", 40, **options)  # over the trained 24 and over the edges of chunks
    assert whole == g.generate_text("The sea", 40, use_cache=False, **options)
    pieces = list(g.stream("The sea", 40, **options))
    assert "".join(pieces) == whole and all(pieces) and len(pieces) > 1
    assert whole == g.generate_text("The sea", 40, **options) and g.model.training


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(kind):
    g = writer(kind)
    prompts = ["Once upon a time there was", "a", "The sea", "b", "The sky", "Once upon"]
    alone = [g.generate_text(p, 30, greedy=True) for p in prompts]
    assert g.generate_text(prompts, 30, greedy=True) == alone and len(set(alone)) > 1
    ends = alone[2][5:7]  # rows that end at different times go out of the batch, and the others do not notice
    assert g.generate_text(prompts, 30, greedy=True, stop=ends) == [t.split(ends)[0] for t in alone]
    assert g.generate_text([], 3) == []


def test_cached_greedy_text_is_transformers_text():
    g = writer()
    g.tokenizer = CharTokenizer(
        "".join(map(chr, range(257))), eot=False, unknown=False
    )  # every id one character, no end
    ids = torch.tensor([[84, 104, 101]])
    expected = to_deepseek_v3(g.model.eval()).generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)[0, 3:]
    assert g.generate_text("The", 40, greedy=True) == g.tokenizer.decode(expected)


def test_seeds():
    g = writer()
    one = g.generate_text("a", 20, seed=5)
    assert one == g.generate_text("a", 20, seed=5) != g.generate_text("a", 20, seed=6)
    several = g.generate_text(["a"] * 3, 20, seed=5)
    assert several[0] == one and several[1] == g.generate_text("a", 20, seed=6) and len(set(several)) == 3
    assert g.generate_text("a", 30) != g.generate_text("a", 30)  # no seed: another text
    state = torch.random.get_rng_state()
    g.generate_text("a", 3, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())  # a run's own stream is left alone


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 80), st.floats(0.01, 1.0), st.floats(0.1, 5.0), st.floats(0.3, 3.0))
def test_sampling_rules_are_transformers(seed, k, p, temperature, penalty):
    rng = torch.Generator().manual_seed(seed)
    logits, ids = torch.randn(4, 61, generator=rng) * 4, torch.randint(0, 61, (4, 17), generator=rng)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(penalise_repetition(logits, ids, penalty), expected)
    for ours, theirs in (
        (lambda z: z / temperature, TemperatureLogitsWarper(temperature)),
        (lambda z: keep_top_k(z, k), TopKLogitsWarper(k)),
        (lambda z: keep_top_p(z, p), TopPLogitsWarper(p)),
    ):
        assert torch.equal(ours(logits), theirs(ids, logits))
        expected = theirs(ids, expected)
    u = torch.rand(4, dtype=torch.float64, generator=rng)
    options = Sampling(temperature=temperature, top_k=k, top_p=p, repetition_penalty=penalty)
    assert torch.equal(options.choose(logits, ids, lambda: u), draw(expected, u))
    assert expected.gather(1, draw(expected, u)[:, None]).isfinite().all()


def test_draw_follows_the_distribution_and_never_what_is_excluded():
    z = torch.tensor([[-torch.inf, 2.0, 0.0, 1.0, -torch.inf]])
    u = torch.linspace(0, 1 - 2**-53, 20001, dtype=torch.float64)
    share = torch.bincount(draw(z.expand(20001, 5), u), minlength=5) / 20001
    torch.testing.assert_close(share, z.softmax(-1)[0], atol=2e-4, rtol=0)
    assert share[0] == share[4] == 0


def test_the_end_of_text_ends_it_and_padding_ids_are_never_drawn():
    g = writer(vocab_size=300)
    with torch.no_grad():
        g.model.lm_head.weight.zero_()  # tied: every logit is 0, ties go to the lowest id; all ids as likely
    text = g.generate_text("ab", 400, seed=0)
    assert "<|endoftext|>" not in text and len(text) < 400  # 256 came up
    with torch.no_grad():
        g.model.lm_head.weight[299] = 100.0  # the tokenizer knows nothing of it
    assert g.generate_text("ab", 5, greedy=True) is not None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([0xF0, 0x9F, 0x99, 0x82, 0xC3, 0xA9, 65, 66, 67, 10]), max_size=90),
    st.lists(st.sampled_from(["A", "AB", "BC", "CCA", "é"]), max_size=2),
)
def test_pieces_never_hold_half_a_character_and_stop_where_text_stops(data, stop):
    builder, pieces = TextBuilder(ByteTokenizer(), tuple(stop)), []
    for b in data:
        if not builder.done:
            pieces.append(builder.add(b))
            for more in (b"", b"\x9f", b"\xa9", b"A"):  # whatever comes next, nothing given has to be taken back
                assert (bytes(builder.ids) + more).decode(errors="replace").startswith("".join(pieces)) or builder.done
    pieces.append(builder.finish())
    whole = bytes(data).decode(errors="replace")
    assert (
        "".join(pieces)
        == builder.text
        == whole[: min([i for s in stop if (i := whole.find(s)) >= 0], default=len(whole))]
    )


def test_stop_strings_may_cross_tokens_and_pieces():
    g = writer(tokenizer=PairTokenizer.train(["the sea and the land and the sky"] * 9, 257))
    text = g.generate_text("the", 60, greedy=True)
    stop = text[10:13]
    cut = text[: text.index(stop)]
    assert (
        g.generate_text("the", 60, greedy=True, stop=[stop])
        == cut
        == "".join(g.stream("the", 60, greedy=True, stop=stop))
    )
    assert g.generate_text("the", 60, greedy=True, echo=True) == "the" + text


def test_learned_positions_slide_a_window():
    g = writer("learned")
    long = "far more than the context it was trained on"
    for use_cache in (True, False):
        assert g.generate_text(long, 8, seed=0, use_cache=use_cache) == g.generate_text(long[-24:], 8, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_cache_can_be_reordered(kind):
    model = writer(kind).model.eval()
    ids = torch.randint(0, 257, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model.make_cache(3, 4)
        model(ids[:, :6], cache=cache)
        order = torch.tensor([2, 0])
        select_cache_rows(cache, order)
        for t in range(6, 20):  # over the edges of chunks
            torch.testing.assert_close(
                Decoder(model)(ids[order, t : t + 1], cache),
                model(ids[order, : t + 1]).logits[:, -1],
                atol=1e-4,
                rtol=1e-4,
            )


@st.composite
def decodable(draw):
    """Every kind of part a decoder meets."""
    pick = lambda *values: draw(st.sampled_from(values))
    attention = pick(
        dict(), dict(qk_norm=True), MLA, MLA | dict(q_lora_rank=10), dict(kind="latent", n_latents=2, chunk_size=4)
    ) | dict(implementation=pick("eager", "sdpa", "flash"))
    position = (
        pick(dict(), dict(yarn_factor=4.0), dict(kind="learned"))
        if attention.get("kind") != "mla"
        else pick(dict(), dict(yarn_factor=4.0))
    )
    kind = pick("dense", "moe")
    moe = dict(
        router=pick("standard", "aux_tc", "noaux_tc"),
        n_experts=4,
        top_k=pick(1, 2),
        d_expert=16,
        n_shared_experts=pick(0, 2),
        routed_scaling_factor=pick(1.0, 2.5),
    )
    return ModelConfig(
        d_model=32,
        n_heads=pick(2, 4),
        n_layers=2,
        vocab_size=61,
        max_seq_len=24,
        tie_embeddings=pick(True, False),
        first_dense_layers=pick(0, 1) if kind == "moe" else 0,
        attention=attention,
        position=position,
        norm=pick(dict(kind="rmsnorm"), dict(), dict(bias=True)),
        ffn=dict(kind=kind, activation=pick("swiglu", "gelu", "relu")),
        moe=moe,
    )


def awake(config, dtype=torch.float32):
    """No parameter at its start: gains off one, biases off zero."""
    model, rng = KimiModel(config).to(dtype).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(3 if p.dim() > 1 and not name.startswith("embed_pos") else 1).add_(
                torch.randn(p.shape, generator=rng, dtype=dtype) * (0.2 if p.dim() == 1 else 0)
            )
        for moe in model.moe_layers().values():
            moe.gate.e_score_correction_bias.normal_(0, 0.2, generator=rng)
    return model


@settings(max_examples=80, deadline=None, derandomize=True)
@given(decodable(), st.sampled_from([1, 1, 3]), st.integers(1, 9), st.integers(1, 20), st.booleans())
def test_the_decoder_gives_the_logits_of_the_whole_text(config, batch, prompt, room, double):
    model = awake(config, torch.float64 if double else torch.float32)
    ids = torch.randint(0, 61, (batch, 14), generator=torch.Generator().manual_seed(room))
    decoder, cache = Decoder(model), model.make_cache(batch, room)  # most have to grow
    logits = [decoder(ids[:, :prompt], cache)] + [decoder(ids[:, t : t + 1], cache) for t in range(prompt, 14)]
    with torch.no_grad():
        expected = model(ids).logits[:, prompt - 1 :]
    tolerance = (1e-6 if config.ffn.kind == "moe" else 1e-10) if double else 1e-5  # routers work in float32
    torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=0, atol=tolerance * expected.abs().max().item())
    assert cache.length == 14


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_sees_weights_that_change_and_leaves_what_it_does_not_know_to_the_model(kind):
    ids = torch.tensor([[5]])
    for dtype in (torch.float32, torch.bfloat16):
        model = writer(kind).model.eval().to(dtype)
        decoder, caches = Decoder(model), [model.make_cache(1, 4) for _ in range(2)]
        for _ in range(3):
            with torch.no_grad():
                torch.testing.assert_close(
                    decoder(ids, caches[0]), model(ids, cache=caches[1]).logits[:, -1], rtol=1e-4, atol=1e-5
                )
                for p in model.parameters():
                    p.mul_(1.1)


def test_tokenizer_that_comes_with_the_model_or_bytes_with_a_warning(monkeypatch):
    model = writer().model
    with pytest.warns(UserWarning, match="bytes"):
        assert Generator(model).tokenizer.kind == "byte"
    model.tokenizer = CharTokenizer("abc")
    assert Generator(model).tokenizer is model.tokenizer
    large = KimiModel(ModelConfig(d_model=8, n_heads=2, n_layers=1, vocab_size=50304))
    gpt2 = PairTokenizer.train(["abc"], 257)
    monkeypatch.setattr(PairTokenizer, "from_hub", lambda name: gpt2)
    assert Generator(large).tokenizer is gpt2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(temperature=-1), "temperature -1"),
        (dict(temperature=float("nan")), "temperature nan"),
        (dict(top_k=-1), "top_k -1"),
        (dict(top_p=1.5), "top_p 1.5"),
        (dict(repetition_penalty=0), "repetition_penalty 0"),
        (dict(max_new_tokens=-1), "max_new_tokens -1"),
        (dict(stop=[""]), "stop"),
        (dict(topk=1), "topk is not an option"),
        (dict(prompt=3), "prompt 3"),
        (dict(seed=1.5), "seed 1.5"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, words):
    with pytest.raises(GenerateError, match=words) as e:
        writer().generate_text(**(dict(prompt="a") | options))
    assert "\n" not in str(e.value)


def test_prompts_that_cannot_be_are_refused():
    with pytest.raises(GenerateError, match="token 256, the model's vocabulary has 200"):
        writer(vocab_size=200).generate_text("")
    with pytest.raises(GenerateError, match="empty"):
        writer(tokenizer=CharTokenizer("abc", eot=False)).generate_text("")
    assert writer().generate_text("", 4, greedy=True) is not None  # begins at the end of the text before
    assert writer().generate_text("abc", 0) == ""
    g = writer()
    with torch.no_grad():
        g.model.norm.weight.fill_(float("nan"))
    with pytest.raises(GenerateError, match="diverged"):
        g.generate_text("a")


@pytest.fixture
def checkpoint(tmp_path):
    g = writer()
    return save_model(tmp_path / "run" / "final", g.model, RunConfig(model=g.model.config), g.tokenizer).parent


def test_command_line(checkpoint, capsys, monkeypatch):
    g = Generator.from_checkpoint(checkpoint)
    command = ["generate", "--checkpoint", str(checkpoint), "--device", "cpu", "--max-new-tokens", "12"]
    text = g.generate_text("Sea", 12, seed=3, top_k=40)
    for more in ([], ["--stream"], ["--no-cache"]):
        assert main([*command, "--prompt", "Sea", "--seed", "3", "--top-k", "40", *more]) == 0
        assert capsys.readouterr().out == f"Sea{text}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Sea\nSky\n\n"))
    assert main([*command, "--interactive", "--greedy"]) == 0
    assert capsys.readouterr().out == "".join(g.generate_text(p, 12, greedy=True) + "\n" for p in ("Sea", "Sky"))
    for wrong in (["--temperature", "-1", "--prompt", "a"], [], ["--top-p", "0", "--prompt", "a", "--stream"]):
        assert main([*command, *wrong]) == 2
        out = capsys.readouterr()
        assert out.out == "" and out.err.startswith("kimi-nb: error: ") and out.err.count("\n") == 1
