"""A comparison is fair: an arm changes what it declares, sees its baseline's batches, and starts from its values."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_run

from kimi_nb.config import load_profile
from kimi_nb.data import Batches
from kimi_nb.model import KimiModel
from kimi_nb.phases import combined, contest
from kimi_nb.plan import phase_studies
from kimi_nb.stats import component_contrasts, factorial
from kimi_nb.study import Arm, Store, Study, with_factors

# what may differ because it is how long an arm trains, not what it trains on
LENGTH = {"train.steps", "train.warmup_steps", "train.eval_every"}


def plain(value):
    return json.loads(json.dumps(value, default=str))


def studies(profile):
    return [s for group in phase_studies(load_profile(profile)).values() for s in group]


@pytest.mark.parametrize("profile", ["smoke", "quick", "standard", "paper"])
def test_an_arm_changes_only_what_it_declares(profile):
    """Every run of every study is the base with its block's and its arm's settings, and with nothing else."""
    seen = 0
    for study in studies(profile):
        arms, base = {(a.block, a.name): a for a in study.arms}, study.base.flat()
        for p in study.expand():
            declared = {**study.blocks.get(p.block, {}), **arms[p.block, p.arm].delta, "seed": p.seed}
            flat = p.run.flat()
            changed = {k for k in flat if plain(flat[k]) != plain(base[k])}
            assert changed <= declared.keys(), (study.name, p.arm, changed - declared.keys())
            assert all(plain(flat[k]) == plain(v) for k, v in declared.items()), (study.name, p.arm)
            seen += 1
    assert seen >= dict(smoke=20, quick=80, standard=150, paper=200)[profile]


@pytest.mark.parametrize("profile", ["smoke", "quick", "standard", "paper"])
def test_what_decides_the_batches_is_the_same_in_a_block(profile):
    """Text, tokenizer, context, batch size and seed make the batches.

    They are equal in a block, unless the text is what the study is about.
    """
    for study in studies(profile):
        about = {k for a in study.arms for k in a.delta if k.startswith("data.")}
        for (block, seed), runs in by_block(study).items():
            base = runs[study.baseline]
            for arm, run in runs.items():
                same = {k: v for k, v in run.data.model_dump(mode="json").items() if f"data.{k}" not in about} == {
                    k: v for k, v in base.data.model_dump(mode="json").items() if f"data.{k}" not in about
                }
                assert same and (run.seq_len, run.train.batch_size, run.seed) == (
                    base.seq_len,
                    base.train.batch_size,
                    seed,
                ), (study.name, block, arm)
        assert not about or study.name.startswith("scaling"), f"{study.name} compares arms on different texts: {about}"


def by_block(study):
    found = {}
    for p in study.expand():
        found.setdefault((p.block, p.seed), {})[p.arm] = p.run
    return found


def test_batches_follow_from_those_alone():
    """Two arms' batches are the same arrays, in the same order, at every step; another seed's are not."""
    tokens = np.arange(5000, dtype=np.int32)
    runs = next(iter(by_block(next(s for s in studies("quick") if s.name == "combined")).values()))
    made = [Batches(tokens, r.train.batch_size, r.seq_len, r.seed) for r in runs.values()]
    other = Batches(tokens, made[0].batch_size, made[0].seq_len, 1)
    assert len(made) == 16
    for step in (0, 1, 7, 299):
        first = made[0].batch(step)
        assert all(np.array_equal(a, b) for m in made[1:] for a, b in zip(first, m.batch(step), strict=True))
        assert not np.array_equal(first[0], other.batch(step)[0])


@pytest.mark.parametrize("profile", ["smoke", "quick", "standard"])
def test_parameters_that_arms_share_start_equal(profile):
    """A parameter with the name and shape of one in the baseline starts at its values; other seeds start elsewhere."""
    compared = 0
    for study in studies(profile):
        for (block, seed), runs in by_block(study).items():
            if seed != study.seeds[0]:
                continue
            known = {}

            def start(run, seed=seed, known=known):
                config = run.model.override({"vocab_size": 300})
                if config not in known:
                    known[config] = dict(KimiModel(config, seed=seed).named_parameters())
                return known[config]

            base = start(runs[study.baseline])
            for arm, run in runs.items():
                mine = start(run)
                for name in base.keys() & mine.keys():
                    if base[name].shape == mine[name].shape:
                        assert torch.equal(base[name], mine[name]), (study.name, block, arm, name)
                        compared += 1
    assert compared > 200
    a, b = (KimiModel(run.model.override({"vocab_size": 300}), seed=s).embed_tokens.weight for s in (0, 1))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("profile", ["smoke", "quick", "standard", "paper"])
def test_arms_train_on_equal_tokens(profile):
    """In a block every arm takes as many tokens as the baseline, unless length is what the study varies."""
    for study in studies(profile):
        varies = any(LENGTH & a.delta.keys() for a in study.arms)
        for runs in by_block(study).values():
            tokens = {r.train.steps * r.tokens_per_step for r in runs.values()}
            assert len(tokens) == 1 or varies, (study.name, tokens)
            assert not varies or study.phase in ("baseline", "benchmarks") or study.name == "contest-budget", study.name


def by_embedding_alone(study, noise=0.002):
    """Runs whose loss depends on the rate of the embedding alone: best at 0.032, 0.1 worse for each factor of four."""
    rng, rows = np.random.default_rng(0), []
    shared = dict(zip(study.seeds, rng.normal(0, 0.05, len(study.seeds)), strict=True))
    for p in study.expand():
        rate = p.run.train.lr * p.run.train.optimizer.embed_lr_scale
        bits = 2.5 + 0.05 * abs(np.log2(rate / 0.032)) + shared[p.seed] + rng.normal(0, noise)
        rows.append(dict(run_id=p.run_id, arm=p.arm, block=p.block, seed=p.seed, status="done", test_bpb=bits))
    return pd.DataFrame(rows)


def rates(adamw, muon):
    """The profile `quick` with tuned rates: (matrices, factor on the embedding's) for each optimizer."""
    two = dict(adamw=(4e-3, adamw), muon=(1.6e-2, muon))
    values = two | {"adamw-single": (4e-3, 1.0), "muon-single": (1.6e-2, 1.0)}
    tuned = {n: {"train.lr": lr, "train.optimizer.embed_lr_scale": s} for n, (lr, s) in values.items()}
    profile = load_profile("quick")
    return profile.model_copy(update=dict(tuned=tuned, base=profile.base.override(tuned["adamw"])))


def words_of_the_factorial(profile):
    """RQ1 to RQ5 and what stands inside levels, from runs by the embedding's rate alone."""
    study = combined.study(profile).with_seeds(5)
    frame = with_factors(by_embedding_alone(study))
    factors = combined.factors_of(study)
    effects = factorial(frame, "test_bpb", factors, margin=study.margin)
    contrasts = component_contrasts(frame, "test_bpb", factors, margin=study.margin)
    found = combined.judge(effects, contrasts, combined.inside(frame, study, effects))
    return {finding.id: finding.word for finding in found}


def test_an_effect_of_the_embeddings_rate_is_not_reported_as_one_of_the_matrix_optimizer():
    """With a rate of its own for the embedding Muon makes no difference; with one rate for all it seems to."""
    fair = words_of_the_factorial(rates(adamw=8.0, muon=2.0))
    assert fair["RQ4"] == "no difference" and not {"supported", "contradicted"} & set(fair.values())
    trap = words_of_the_factorial(rates(adamw=1.0, muon=1.0))
    assert trap["RQ4"] == "supported"
    found = contest.judge_rates(contest.rate_contrasts(by_embedding_alone(contest.one_rate_study(rates(8.0, 2.0)))))
    words = {finding.id: finding.word for finding in found}
    assert words["C1 gain, one rate"] == "supported" and words["C1 gain, two rates"] == "no difference"


def test_losses_by_document_are_those_of_the_record(tmp_path):
    """Saved weights scored again give every run's own bits per byte, and the text's error widens the interval."""
    from kimi_nb.evals import decide_with_text, score_documents, scored_documents
    from kimi_nb.runner import run_studies
    from kimi_nb.stats import compare, decide

    store = Store(tmp_path)
    arms = [Arm("base", {}), Arm("fast", {"train.lr": 4e-3})]
    study = Study(name="toy", base=tiny_run(), arms=arms, baseline="base", seeds=(0, 1), margin=0.02)
    run_studies([study], store, executor="inprocess", progress=False)
    assert score_documents(store, "toy") == 4 and score_documents(store, "toy") == 0
    scores, frame = scored_documents(store, "toy"), store.frame("toy")
    sums = scores.groupby(["arm", "seed"])[["nats", "bytes"]].sum()
    again = sums["nats"] / sums["bytes"] / np.log(2)
    assert np.allclose(again, frame.set_index(["arm", "seed"])["test_bpb"].loc[again.index], atol=1e-5)
    row = compare(frame, "test_bpb", "base", margin=0.02).iloc[0].to_dict()
    plain, both = decide(row), decide_with_text(row, scores)
    assert both.ci_high - both.ci_low > 0 and "another sample of text as well" in " ".join(both.caveats)
    assert both.df > plain.df and "not another sample of text" in " ".join(plain.caveats)


@settings(max_examples=10, deadline=None)
@given(
    text=st.floats(0.0, 0.2),
    noise=st.floats(1e-4, 0.02),
    effect=st.floats(-0.1, 0.1),
    seeds=st.integers(3, 8),
)
def test_another_text_never_makes_an_effect_surer(text, noise, effect, seeds):
    """With the error of the text an interval holds the one over seeds, and no word becomes a stronger one."""
    from kimi_nb.stats import beside_text

    rng, rows, scores = np.random.default_rng(0), [], []
    sizes, gains = rng.integers(200, 2000, 30), rng.normal(effect, text, 30)
    for seed in range(seeds):
        for arm in ("off", "on"):
            nats = sizes * math.log(2) * (2 + (arm == "on") * gains + rng.normal(0, noise))
            scores.append(pd.DataFrame(dict(arm=arm, seed=seed, document=range(30), nats=nats, bytes=sizes)))
            bits = nats.sum() / sizes.sum() / math.log(2)
            rows.append(dict(arm=arm, part=arm, seed=seed, status="done", test_bpb=bits))
    table = factorial(pd.DataFrame(rows), "test_bpb", {"part": ("off", "on")}, margin=0.02)
    row = beside_text(table, pd.concat(scores)).iloc[0]
    assert row["text_low"] <= row["ci_low"] and row["text_high"] >= row["ci_high"] and row["text_documents"] == 30
    if "unclear" in row["in_words"]:
        assert row["text_words"] in (row["in_words"], "unclear")


def test_published_scores_by_document_are_those_of_the_records():
    """The documents of every run of the factorial add up to its test bits per byte."""
    from kimi_nb.evals import scored_documents
    from kimi_nb.plan import published

    store = published("quick")
    scores, frame = scored_documents(store, "combined"), store.frame("combined").set_index(["arm", "seed"])
    sums = scores.groupby(["arm", "seed"])[["nats", "bytes"]].sum()
    assert len(sums) == len(frame) == 80
    again = sums["nats"] / sums["bytes"] / math.log(2)
    assert np.allclose(again, frame["test_bpb"].loc[again.index], atol=1e-5)
