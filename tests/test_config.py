"""Configuration: every setting matters or is refused, and what is refused is refused in one line."""

import errno
import json
import os
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_nb.config import (
    PRESETS,
    ConfigError,
    DataConfig,
    FileError,
    KimiError,
    ModelConfig,
    NormConfig,
    RunConfig,
    load_profile,
    parse_value,
    planned,
    profile_names,
    write_file,
    write_json,
)

# What each setting needs to be awake, and another value for it. `MLA` and `MOE` are bases with those parts in use.
MLA = {
    "model.attention.kind": "mla",
    "model.attention.kv_lora_rank": 16,
    "model.attention.qk_nope_head_dim": 4,
    "model.attention.qk_rope_head_dim": 4,
    "model.attention.v_head_dim": 8,
}
MOE = {"model.ffn.kind": "moe", "model.moe.n_experts": 4, "model.moe.d_expert": 16}
NOAUX = MOE | {"model.moe.router": "noaux_tc"}
GROUPS = NOAUX | {"model.moe.n_experts": 8, "model.moe.n_group": 4, "model.moe.topk_group": 2}
LATENT = {"model.attention.kind": "latent", "model.attention.chunk_size": 4, "model.attention.n_latents": 2}
KDA = {"model.attention.kind": "kda"}
MUON = {"train.optimizer.name": "muon"}
WALK = {
    "model.d_model": ({}, 48),
    "model.n_layers": ({}, 1),
    "model.n_heads": ({}, 2),
    "model.d_ff": ({}, 40),
    "model.vocab_size": ({"model.vocab_size": 300}, 400),
    "model.max_seq_len": ({"model.position.kind": "learned", "train.seq_len": 16}, 24),
    "model.dropout": ({}, 0.3),
    "model.tie_embeddings": ({}, False),
    "model.first_dense_layers": (MOE, 1),
    "model.norm.kind": ({}, "rmsnorm"),
    "model.norm.eps": ({}, 0.1),
    "model.norm.bias": ({}, True),
    "model.position.kind": ({}, "learned"),
    "model.position.theta": ({}, 100.0),
    "model.position.yarn_factor": ({}, 4.0),
    "model.attention.kind": (MLA | {"model.attention.kind": "mha"}, "mla"),
    "model.attention.pattern": (
        MLA | {"model.attention.kind": "mha", "model.attention.qk_rope_head_dim": 8},
        "mha,mla",
    ),
    "model.attention.implementation": ({}, "eager"),
    "model.attention.qk_norm": ({}, True),
    "model.attention.q_lora_rank": (MLA, 8),
    "model.attention.kv_lora_rank": (MLA, 8),
    "model.attention.qk_nope_head_dim": (MLA, 6),
    "model.attention.qk_rope_head_dim": (MLA, 6),
    "model.attention.v_head_dim": (MLA, 6),
    "model.attention.output_gate": ({}, True),
    "model.attention.linear_heads": (KDA, 2),
    "model.attention.linear_head_dim": (KDA, 6),
    "model.attention.conv_kernel": (KDA, 2),
    "model.attention.gate_rank": (KDA, "full"),
    "model.attention.decay_rank": (KDA, 3),
    "model.attention.decay_bound": (KDA, -5.0),
    "model.attention.n_latents": (LATENT, 3),
    "model.attention.chunk_size": (LATENT, 8),
    "model.ffn.kind": (MOE | {"model.ffn.kind": "dense"}, "moe"),
    "model.ffn.activation": ({}, "relu"),
    "model.moe.router": (MOE, "aux_tc"),
    "model.moe.n_experts": (MOE, 5),
    "model.moe.top_k": (MOE, 1),
    "model.moe.n_shared_experts": (MOE, 1),
    "model.moe.d_expert": (MOE, 24),
    "model.moe.n_group": (GROUPS, 2),
    "model.moe.topk_group": (GROUPS, 1),
    "model.moe.routed_scaling_factor": (MOE, 2.5),
    "model.moe.norm_topk_prob": (MOE, False),
    "model.moe.aux_loss_weight": (MOE, 0.5),
    "model.moe.seq_loss_weight": (NOAUX, 0.5),
    "model.moe.bias_update_speed": (NOAUX, 0.1),
    "model.moe.latent_dim": (MOE, 8),
    "model.residual.kind": ({}, "attention"),
    "model.residual.block_layers": ({"model.residual.kind": "attention"}, 1),
    "model.mtp_depth": ({}, 1),
    "train.steps": ({}, 5),
    "train.batch_size": ({}, 2),
    "train.micro_batch_size": ({}, 2),
    "train.seq_len": ({}, 8),
    "train.lr": ({}, 5e-3),
    "train.min_lr": ({}, 1e-4),
    "train.schedule": ({}, "linear"),
    "train.warmup_steps": ({}, 2),
    "train.decay_fraction": ({"train.schedule": "wsd"}, 0.7),
    "train.mtp_weight": ({"model.mtp_depth": 1}, 3.0),
    "train.grad_clip": ({}, 0.1),
    "train.precision": ({}, "bf16"),
    "train.compile": ({}, True),
    "train.eval_every": ({}, 1),
    "train.eval_tokens": ({}, 64),
    "train.test_tokens": ({}, 64),
    "train.save_every": ({}, 1),
    "train.optimizer.name": ({}, "adam"),
    "train.optimizer.weight_decay": ({}, 1.0),
    "train.optimizer.betas": ({}, (0.5, 0.9)),
    "train.optimizer.momentum": (MUON, 0.5),
    "train.optimizer.ns_steps": (MUON, 2),
    "train.optimizer.scaling": (MUON, "original"),
    "train.optimizer.muon_router": (MUON | MOE, True),
    "train.optimizer.expert_lr_scale": (MOE, 3.0),
    "train.optimizer.embed_lr_scale": ({}, 4.0),
    "train.optimizer.muon_split": (MUON, "heads"),
    "train.optimizer.variant": (MUON, "normuon"),
    "train.optimizer.idle_experts": (MUON | MOE | {"model.moe.n_experts": 64}, "rest"),
    "train.optimizer.qk_clip_threshold": (
        {"train.optimizer.name": "muonclip", "train.optimizer.qk_clip_threshold": 50.0},
        1e-4,
    ),
    "data.corpus": ({}, "tinyworld:0.9,pydocs:0.1"),
    "data.tokenizer": ({}, "bpe:300"),
    "data.max_tokens": ({}, 400),
    "data.num_documents": ({}, 20),
    "data.val_fraction": ({}, 0.3),
    "data.test_fraction": ({}, 0.3),
    "seed": ({}, 1),
    "repeat": ({}, 1),
}
CLOCK = {"seconds", "training_seconds", "compile_seconds", "step_seconds", "tokens_per_second", "peak_memory_mb"}


def tiny(changes=()):
    base = {
        "data.corpus": "tinyworld",
        "data.tokenizer": "byte",
        "data.num_documents": 30,
        "model.d_model": 32,
        "model.n_heads": 4,
        "model.max_seq_len": 16,
        "train.steps": 4,
        "train.batch_size": 4,
        "train.eval_tokens": 200,
        "train.test_tokens": 200,
        "train.lr": 1e-2,
    }
    return RunConfig().changed(base | dict(changes))


def what_happens(run, folder):
    "Everything about a run that is not its name or its time."
    from kimi_nb.train import fit

    saved = []
    record = fit(
        run,
        folder,
        progress=False,
        on_step=lambda step, line: saved.append(sorted(p.name for p in (folder / "checkpoints").glob("step_*"))),
    )
    chosen = {k: record.provenance[k] for k in ("kernel", "micro_batch_size", "precision", "expert_backend", "data")}
    return {k: v for k, v in record.metrics.items() if k not in CLOCK}, record.curves, chosen, saved


def test_the_walk_is_complete():
    """Settings of what is not built yet are refused; what needs one of them sleeps."""
    run = RunConfig()
    unbuilt = planned(run)
    waiting = {path for path, need in run.dormant().items() if need.rpartition(" ")[0] in unbuilt}
    assert set(WALK) == set(run.flat()) - unbuilt.keys() - waiting


@pytest.mark.parametrize("path", planned(RunConfig()))
def test_what_is_not_built_yet_is_refused(path):
    run, only = RunConfig(), planned(RunConfig())[path]
    assert only == run.flat()[path]
    other = {str: "attention", bool: True, int: 3, float: 0.5}.get(type(only), 3)
    if path.endswith("variant"):
        other = "cautious"
    with pytest.raises(ConfigError, match=f"^{path} .* is not built yet: leave it at"):
        run.changed({path: other})


@pytest.mark.parametrize("path", WALK)
def test_changing_a_setting_changes_the_run(path, tmp_path):
    base, value = WALK[path]
    before = tiny(base)
    after = before.override({path: value})
    assert after.run_id != before.run_id and after != before
    if path == "repeat":  # tells identical runs apart: the numbers must be the same
        assert what_happens(before, tmp_path / "a") == what_happens(after, tmp_path / "b")
    elif path == "train.compile":  # compiling takes too long here
        from kimi_nb.data import prepare
        from kimi_nb.train import Trainer, pick_device

        made = [Trainer(r, prepare(r.data), pick_device("cpu")) for r in (before, after)]
        compiled = [[layer._compiled_call_impl is not None for layer in t.model.layers] for t in made]
        assert [set(layers) for layers in compiled] == [{False}, {True}] and made[1].compiled
    else:
        assert what_happens(before, tmp_path / "a") != what_happens(after, tmp_path / "b")


@pytest.mark.parametrize(
    "path",
    [
        p
        for p, (base, _) in WALK.items()
        if base
        and p
        not in (
            "model.vocab_size",
            "model.max_seq_len",
            "model.attention.kind",
            "model.attention.pattern",
            "model.ffn.kind",
            "model.moe.topk_group",
        )
    ],
)
def test_a_sleeping_setting_is_refused(path):
    value, run = WALK[path][1], RunConfig()
    if path == "model.first_dense_layers" or path not in run.dormant():
        with pytest.raises(ConfigError):
            run.override({path: value})
    else:
        with pytest.raises(ConfigError, match="would have no effect"):
            run.override({path: value})


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda: ModelConfig(attention={"kind": "mlaa"}),
            "attention.kind 'mlaa' is unknown: one of mha, mla, latent, kda, gdn",
        ),
        (
            lambda: RunConfig(model={"attention": {"kind": "mlaa"}}),
            "model.attention.kind 'mlaa' is unknown: one of mha, mla, latent, kda, gdn",
        ),
        (lambda: ModelConfig(d_model=64, n_heads=6), "n_heads 6 does not divide d_model 64"),
        (
            lambda: ModelConfig(ffn={"kind": "moe"}, moe={"n_experts": 2, "top_k": 4}),
            "moe.top_k 4 is over moe.n_experts 2",
        ),
        (lambda: ModelConfig(attention={"kind": "mla"}), "attention.kv_lora_rank is missing"),
        (lambda: ModelConfig(d_model="wide"), "d_model 'wide' is not a whole number"),
        (lambda: ModelConfig(d_model=1.5), "d_model 1.5 is not a whole number"),
        (lambda: ModelConfig(d_model=True), "d_model True is not allowed: true or false is not a number"),
        (lambda: ModelConfig(d_model=0), "d_model 0 is out of range: at least 1"),
        (lambda: RunConfig(modle={}), "modle is not a setting: did you mean model?"),
        (lambda: RunConfig().override({"train.lr": "nan"}), "train.lr 'nan' is not a finite number"),
        (
            lambda: RunConfig().override({"train.optimizer.name": "muonclip", "model.attention.qk_norm": True}),
            "muonclip is not possible with model.attention.qk_norm",
        ),
        (lambda: RunConfig(train={"seq_len": 128}), "train.seq_len 128 is over model.max_seq_len 64"),
        (
            lambda: RunConfig(train={"batch_size": 8, "micro_batch_size": 3}),
            "train.micro_batch_size 3 does not divide batch_size 8",
        ),
        (lambda: DataConfig(tokenizer="bpe:100"), "tokenizer 'bpe:100' is not possible"),
        (lambda: DataConfig(tokenizer=f"bpe:{10**14}"), "at most 1,000,000"),
        (lambda: ModelConfig.preset("nanokimi"), "preset 'nanokimi' is unknown: one of nano"),
        (lambda: load_profile("enormous"), "profile 'enormous' is unknown: one of smoke"),
    ],
)
def test_refusals_are_one_line(make, line):
    with pytest.raises(ConfigError) as e:
        make()
    assert line in str(e.value) and "\n" not in str(e.value)


def test_other_names_for_the_same_things():
    c = ModelConfig(
        n_layer=12,
        n_head=12,
        n_embd=768,
        vocab_size=50257,
        block_size=1024,
        moe={"use_moe": True, "num_experts": 8, "top_k": 2},
    )
    assert (c.n_layers, c.n_heads, c.d_model, c.max_seq_len, c.ffn.kind, c.moe.n_experts, c.moe.top_k) == (
        12,
        12,
        768,
        1024,
        "moe",
        8,
        2,
    )
    assert c.expert_width == 256 and c.override({"moe.d_expert": 384}).expert_width == 384
    wide = ModelConfig(n_embd=768, n_head=12, moe={"use_moe": True, "num_experts": 8, "top_k": 2, "d_expert": 3072})
    assert wide.expert_width == 3072
    with pytest.raises(ConfigError, match="give one of the two"):
        ModelConfig(n_embd=64, d_model=64)
    with pytest.raises(ConfigError, match="n_experts"):
        ModelConfig(n_embd=64, moe={"num_experts": "many"})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_files(name, tmp_path):
    run = RunConfig.preset(name)
    for ending in ("yaml", "json"):
        run.save(tmp_path / f"run.{ending}")
        assert RunConfig.load(tmp_path / f"run.{ending}") == run
        assert RunConfig.load(tmp_path / f"run.{ending}").run_id == run.run_id


def test_presets_have_the_sizes_they_are_known_by():
    from kimi_nb.model import KimiModel, count_parameters

    def count(name):
        return count_parameters(KimiModel(ModelConfig.preset(name), seed=None))

    assert 9e6 < count("nano")["non_embedding"] < 11e6
    assert 123e6 < count("small")["total"] < 125e6
    assert 335e6 < count("medium")["total"] < 345e6
    plan, kimi = ModelConfig.preset("plan"), ModelConfig.preset("kimi")
    plan_width = plan.moe.top_k * 2 * plan.expert_width
    kimi_width = (kimi.moe.top_k + kimi.moe.n_shared_experts) * 3 * kimi.expert_width
    assert abs(kimi_width / plan_width - 1) < 0.01  # equal active feed-forward FLOPs


def test_the_run_id_follows_the_bytes_of_a_file(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one")
    run = RunConfig(data={"corpus": str(text)})
    first = run.run_id
    text.write_text("two")
    assert run.run_id != first
    text.write_text("one")
    assert run.run_id == first


def test_yaml_reads_the_numbers_people_write(tmp_path):
    (tmp_path / "r.yaml").write_text("train: {lr: 1e-4, steps: 20, optimizer: {betas: [0.9, 0.99]}}\n")
    run = RunConfig.load(tmp_path / "r.yaml")
    assert (run.train.lr, run.train.steps, run.train.optimizer.betas) == (1e-4, 20, (0.9, 0.99))


@pytest.mark.parametrize("name", ["smoke", "quick", "standard", "paper"])
def test_profiles_load(name):
    profile = load_profile(name)
    assert (
        profile.name == name
        and profile.base.model.max_seq_len >= 64
        and profile.base.model.n_layers >= 2
        and profile.base.model.n_heads >= 4
    )
    assert name in profile_names()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[p]\ntrain.lrr = 1", "train.lrr is not a setting: did you mean train.lr"),
        ("[p]\nnorm.train.lrr = 1", "norm.train.lrr is not a setting: did you mean train.lr"),
        ("[p]\nno-phase.train.lr = 1", "no-phase.train.lr is not a setting: did you mean train.lr"),
        ("[p]\nnorm.train.lr = fast", "norm.train.lr 'fast' is not allowed"),
        ("[p]\nnorm.seeds = 0", "norm.seeds 0 is not a whole number of at least 1"),
        ("[p]\nnorm.seeds = 1000000000", "norm.seeds 1000000000 is out of range: at most 1,000"),
        ("[p]\nseeds = 1000000000", "seeds 1,000,000,000 is out of range: at most 1,000"),
        ("[p]\nseeds = many", "seeds 'many' is not a whole number"),
        ("[p]\ntrain.steps = -1", "train.steps -1 is out of range"),
        ("no section", "is not a valid INI file"),
        ("[p]\nbudget_minutes = 1\nbudget_minutes = 2", "is not a valid INI file"),
    ],
)
def test_a_broken_settings_file_names_itself_and_the_line(text, part, tmp_path):
    path = tmp_path / "settings.ini"
    path.write_text(text if "budget" in text or "section" in text else text.replace("[p]", "[p]\nbudget_minutes = 1"))
    with pytest.raises(ConfigError) as e:
        load_profile("p", path)
    assert part in str(e.value) and str(path) in str(e.value) and "\n" not in str(e.value)


PATHS = sorted(RunConfig().flat())
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 2000),
    st.floats(allow_nan=True),
    st.sampled_from(["mla", "moe", "muon", "auto", "", "1e-3", "none", "a: b", "[1"]),
    st.lists(st.floats(0, 1), max_size=3),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.one_of(st.sampled_from(PATHS), st.text(max_size=12)), VALUES, max_size=4))
def test_override_gives_a_run_or_one_line(changes):
    base = RunConfig()
    try:
        run = base.override(changes)
    except KimiError as e:
        assert "\n" not in str(e)
    else:
        assert RunConfig(**json.loads(run.to_json())) == run
        assert (run == base) == (run.run_id == base.run_id)
        assert {k for k, v in run.flat().items() if v != base.flat()[k]} <= set(changes)


def test_settings_that_came_later_leave_ids_as_they_were():
    """At their defaults they are not in the hash; changed, they are."""
    run = RunConfig().override({"data.corpus": "tinyworld", "data.tokenizer": "byte"})
    assert run.run_id == "2a3ec4f4d2e9"
    muon = run.override({"train.optimizer.name": "muon", "train.compile": True})
    assert muon.run_id == "504e132835d5"
    for change in ({"train.optimizer.embed_lr_scale": 2.0}, {"train.optimizer.muon_split": "heads"}):
        assert muon.override(change).run_id != muon.run_id
        assert RunConfig(**muon.override(change).model_dump()).run_id == muon.override(change).run_id


PATTERN = MLA | {"model.attention.kind": "mha", "model.n_layers": 4, "model.attention.pattern": "mha,mha,mla"}


def test_a_pattern_of_layers_is_spelled_in_one_way():
    """Commas or blanks, and no longer than it must be; what it wakes is awake, and the one kind sleeps."""
    run = tiny(PATTERN | {"model.attention.qk_rope_head_dim": 8})
    assert run.model.layer_kinds == ("mha", "mha", "mla", "mha")
    for text in ("mha mha mla", "mha,mha,mla,mha,mha,mla", " mha, mha,mla "):
        assert run.override({"model.attention.pattern": text}) == run
    assert "model.attention.kv_lora_rank" not in run.dormant() and "model.attention.n_latents" in run.dormant()
    with pytest.raises(ConfigError, match=r"would have no effect: it needs model.attention.pattern none"):
        run.override({"model.attention.kind": "mla"})
    assert RunConfig(**json.loads(run.to_json())).run_id == run.run_id


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "model.attention.qk_rope_head_dim 4 is not the 8 that RoPE turns in a head of mha"),
        ({"model.attention.pattern": "mha"}, "'mha' is not several kinds of attention: set attention.kind"),
        ({"model.attention.pattern": "mha,mlaa"}, "'mlaa' in 'mha,mlaa' is unknown: kinds of attention, out of mha"),
        ({"model.n_layers": 2}, "mha,mha,mla names 3 of n_layers 2"),
    ],
)
def test_a_pattern_that_cannot_be_is_one_line(changes, line):
    with pytest.raises(ConfigError) as e:
        tiny(PATTERN | changes)
    assert line in str(e.value) and "\n" not in str(e.value)
    tiny(PATTERN | {"model.position.kind": "nope"})


def test_parts_of_attention_need_an_attention_that_has_them():
    """MHA's projections are one matrix each: to ask for their parts would change nothing."""
    muon = RunConfig().override({"train.optimizer.name": "muon"})
    with pytest.raises(ConfigError, match=r"'parts' would have no effect: it needs model.attention.kind mla, or heads"):
        muon.override({"train.optimizer.muon_split": "parts"})


@pytest.mark.parametrize("seed", [2**64, 2**80, -1])
def test_a_seed_that_no_generator_takes_is_one_line(seed):
    """PyTorch's generators take 64 bits."""
    with pytest.raises(ConfigError, match=r"^seed -?\d+ is out of range: (below|at least) \d+$"):
        RunConfig(seed=seed)
    assert RunConfig(seed=2**64 - 1).seed == 2**64 - 1


@pytest.mark.parametrize("value", [10**11, 2**63, 10**400])
@pytest.mark.parametrize(
    "path",
    "model.d_model model.d_ff model.n_layers model.n_heads model.vocab_size model.max_seq_len model.mtp_depth "
    "model.moe.n_experts model.moe.d_expert model.attention.kv_lora_rank model.attention.linear_heads "
    "train.batch_size data.num_documents".split(),
)
def test_a_size_that_no_machine_holds_is_one_line(path, value):
    """It is refused where it is written, before anything of that size is counted or built."""
    with pytest.raises(ConfigError, match=rf"^{path} (a number of about )?[\d,]+( digits)? is out of range: at most "):
        RunConfig().changed({path: value})


def test_a_folder_of_very_many_files_is_no_corpus(tmp_path, monkeypatch):
    """Such as the whole disk: its files are not all listed and read to tell what the run is."""
    monkeypatch.setattr("kimi_nb.config.schema._MOST_FILES", 3)
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("a text")
    run = RunConfig().override({"data.corpus": str(tmp_path)})
    before = run.run_id
    (tmp_path / "0.txt").write_text("another text")
    assert run.run_id != before
    (tmp_path / "3.txt").write_text("a text")
    with pytest.raises(KimiError, match="holds more than 3 files: name the folder of the text alone"):
        assert run.run_id


def test_compile_is_true_false_or_auto():
    """auto compiles on CUDA alone."""
    import torch

    from kimi_nb.train import pick_compile

    run = RunConfig().override({"train.compile": "auto"})
    assert run.train.compile == "auto" and RunConfig().train.compile is False
    assert RunConfig().override({"train.compile": "true"}).train.compile is True
    answers = {kind: pick_compile("auto", torch.device(kind)) for kind in ("cpu", "cuda", "mps")}
    assert answers == {"cpu": False, "cuda": True, "mps": False}
    with pytest.raises(ConfigError, match=r"^train.compile 'maybe' is not true or false"):
        run.override({"train.compile": "maybe"})


# --- what is written, and how it is read


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**15), st.integers(0, 4))
def test_a_whole_number_is_decimal_however_it_is_written(number, zeros):
    """Leading zeros, underscores and a sign change nothing: no text is an octal, sexagesimal or hexadecimal number."""
    for text in ("0" * zeros + str(number), f"{number:_}", f"+{number}", f" {number} "):
        assert RunConfig().override(seed=text).seed == number == parse_value(text)


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("seed", "010", 10),
        ("train.steps", "0100", 100),
        ("train.steps", "2e2", 200),
        ("train.micro_batch_size", "08", 8),
        ("train.micro_batch_size", "auto", "auto"),
        ("train.lr", "1e-4", 1e-4),
        ("train.lr", "1", 1.0),
        ("train.seq_len", "none", None),
        ("train.seq_len", "null", None),
        ("train.compile", "yes", True),
        ("train.compile", "off", False),
        ("data.corpus", "010", "010"),
        ("data.corpus", "1:30", "1:30"),
        ("data.corpus", "no", "no"),
        ("data.corpus", "none", "none"),
        ("train.optimizer.betas", "[0.8, 0.9]", (0.8, 0.9)),
        ("train.optimizer.betas", "0.8, 0.9", (0.8, 0.9)),
    ],
)
def test_a_value_is_read_by_the_type_of_its_field(path, text, value, tmp_path):
    """The same from the command line and from a YAML file, whatever YAML would make of it."""
    base = RunConfig(train=dict(batch_size=16))
    assert base.override({path: text}).flat()[path] == value
    *above, leaf = path.split(".")
    lines = [f"{'  ' * i}{name}:" for i, name in enumerate(above)] + [f"{'  ' * len(above)}{leaf}: {text}"]
    (tmp_path / "run.yaml").write_text("\n".join(lines) + "\n")
    if text != "0.8, 0.9":
        assert RunConfig.load(tmp_path / "run.yaml").flat()[path] == value


@pytest.mark.parametrize(
    "text", ["1:30", "0x10", "0o10", "1:2:3", "true", "yes", "2001-01-01", "1e400", "٣", "1" * 5000]
)
def test_what_is_no_decimal_number_is_refused(text):
    for path in ("seed", "train.lr"):
        with pytest.raises(ConfigError) as e:
            RunConfig().override({path: text})
        assert path in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 200


@pytest.mark.timeout(20)
def test_a_settings_file_is_bounded(tmp_path):
    """Aliases of aliases, a section that holds itself, a device, a pipe, a huge file, a long name: one line at once."""
    laughs = "a0: &a0 [" + ",".join("x" * 10) + "]\n"
    laughs += "".join(f"a{i}: &a{i} [" + ",".join([f"*a{i - 1}"] * 10) + "]\n" for i in range(1, 12))
    for text in (
        laughs,
        f"{laughs}train:\n  optimizer:\n    betas: *a11\n",
        "train: &a [*a]\n",
        "model: &m {norm: *m}\n",
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match="alias"):
            RunConfig.load(tmp_path / "bad.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "large.yaml").write_text("# \n" * (1 << 20))
    for path in (
        "/dev/zero",
        tmp_path / "pipe.yaml",
        tmp_path,
        tmp_path / "large.yaml",
        tmp_path / ("x" * 300),
        "a\0b",
    ):
        with pytest.raises(ConfigError) as e:
            RunConfig.load(path)
        assert "\n" not in str(e.value)


def test_an_alias_and_a_merge_key_still_work(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model:\n  norm: &n {kind: layernorm, bias: true}\ntrain: {steps: 010, lr: !!float '1e-3'}\n"
    )
    run = RunConfig.load(tmp_path / "run.yaml")
    assert run.model.norm.bias is True and run.train.steps == 10 and run.train.lr == 1e-3
    (tmp_path / "arm.yaml").write_text("kind: layernorm\n<<: {eps: 1e-3}\n")
    assert NormConfig.load(tmp_path / "arm.yaml").eps == 1e-3


# --- what differs


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(["seed", "train.steps", "model.d_ff", "train.eval_every"]), st.integers(1, 9)))
def test_what_differs_is_what_was_changed(changes):
    base = RunConfig()
    new = base.changed(changes)
    delta = new.delta_from(base)
    assert base.changed(delta) == new and base.differing(changes) == delta
    assert new.delta_from(base, awake=True).keys() <= delta.keys() and base.delta_from(base) == {}


def test_a_change_may_sleep_where_an_override_may_not():
    asleep = RunConfig().changed({"model.attention.kv_lora_rank": 8})
    assert asleep.delta_from(RunConfig()) == {"model.attention.kv_lora_rank": 8}
    assert asleep.delta_from(RunConfig(), awake=True) == {}
    with pytest.raises(ConfigError, match="would have no effect"):
        RunConfig().override({"model.attention.kv_lora_rank": 8})


# --- files


def test_a_file_is_written_whole_or_refused_in_a_line(tmp_path, monkeypatch):
    """The old file stays, nothing is left beside it, and the error is one of ours and the system's at once."""
    path = write_json(tmp_path / "new" / "a.json", dict(b=1, a=[2]))
    before = path.read_bytes()
    monkeypatch.setattr(
        os, "replace", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    with pytest.raises(FileError) as e:
        write_file(path, "other")
    assert isinstance(e.value, KimiError) and isinstance(e.value, OSError) and e.value.errno == errno.ENOSPC
    assert "free some space" in str(e.value) and "\n" not in str(e.value)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["a.json"]
    monkeypatch.undo()
    for bad in (tmp_path / ("x" * 300), tmp_path / "absent" / "a.txt", path / "under-a-file"):
        with pytest.raises(FileError, match="make the folder writable"):
            write_file(bad, "text")
    again = pickle.loads(pickle.dumps(e.value))
    assert str(again) == str(e.value)
