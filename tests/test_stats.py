"""Comparisons, verdicts and designs: against other implementations, and on made-up runs whose truth is known."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from kimi_nb.stats import (
    ALLOWED,
    RunSpread,
    StatsError,
    aa_calibration,
    adjust,
    against_best,
    bca_interval,
    compare,
    component_contrasts,
    correlations,
    decide,
    detectable_dz,
    drawn_cells,
    drawn_study,
    factorial,
    fit_power_law,
    judged_cells,
    more_seeds,
    nct_cdf,
    paired_power,
    pairing_gain,
    partners,
    say,
    seeds_needed,
    sign_flip_pvalue,
    simple_effects,
    t_power,
    tost_pvalue,
)
from kimi_nb.study import WORDS

DECIDED = ("supported", "contradicted")

LEVELS = {
    "attention": ("mha", "mla"),
    "norm": ("layernorm", "rmsnorm"),
    "router": ("standard", "noaux_tc"),
    "optimizer": ("adamw", "muon"),
}
SOON = settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)


def made_up(effects, n=5, noise=0.01, seed_sd=0.05, blocks=("",), seed=0, metric="test_bpb"):
    """Runs of known truth: a shared value per seed, an effect per arm, and noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for b in blocks:
        for s in range(n):
            shared = rng.normal(0, seed_sd)
            rows += [
                dict(
                    run_id=f"{b}/{a}/{s}",
                    arm=a,
                    block=b,
                    seed=s,
                    status="done",
                    **{metric: 1.9 + shared + e + rng.normal(0, noise)},
                )
                for a, e in effects.items()
            ]
    return pd.DataFrame(rows)


def test_compare_agrees_with_scipy_and_statsmodels():
    from statsmodels.stats.multitest import multipletests
    from statsmodels.stats.weightstats import ttost_paired

    frame = made_up({"base": 0, "a": -0.02, "b": 0.01, "c": 0}, n=11)
    result = compare(frame, "test_bpb", "base", margin=0.03).set_index("arm")
    wide = frame.pivot(index="seed", columns="arm", values="test_bpb")
    for arm, r in result.iterrows():
        x, y = wide["base"], wide[arm]
        t = scipy_stats.ttest_rel(y, x)
        assert np.isclose(r["p"], t.pvalue) and np.allclose([r.ci_low, r.ci_high], t.confidence_interval())
        assert np.isclose(r.p_welch, scipy_stats.ttest_ind(y, x, equal_var=False).pvalue)
        flips = scipy_stats.permutation_test(
            (y, x),
            lambda a, b, axis: np.mean(a - b, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=np.inf,
        )
        assert np.isclose(r.p_permutation, flips.pvalue)
        assert np.isclose(r.p_tost, ttost_paired(y.to_numpy(), x.to_numpy(), -0.03, 0.03)[0])
        assert np.isclose(r.d_z, (y - x).mean() / (y - x).std()) and r.hedges_g_low < r.hedges_g < r.hedges_g_high
        assert r.ci_boot_low < r["diff"] < r.ci_boot_high
    assert np.allclose(result.p_adj, multipletests(result["p"], method="holm")[1])


@pytest.mark.parametrize("n", [2, 3, 5, 8, 10, 30])
def test_power_agrees_with_statsmodels(n):
    from statsmodels.stats.power import TTestPower

    for d in (0.3, 0.7):
        assert np.isclose(paired_power(d, n), TTestPower().power(d, n, 0.05), atol=1e-6)
    assert np.isclose(paired_power(detectable_dz(n), n), 0.8, atol=1e-4)
    assert np.isclose(
        t_power(2.0, n - 1),
        1
        - nct_cdf(scipy_stats.t.isf(0.025, n - 1), n - 1, 2.0)
        + nct_cdf(-scipy_stats.t.isf(0.025, n - 1), n - 1, 2.0),
    )


def test_seeds_needed_is_the_first_number_with_enough_power():
    n = int(seeds_needed(0.02, 0.03))
    assert paired_power(2 / 3, n) >= 0.8 > paired_power(2 / 3, n - 1)
    assert math.isnan(seeds_needed(0.0, 1.0)) and math.isinf(seeds_needed(1e-6, 1.0))


damage = st.lists(
    st.tuples(
        st.sampled_from(["base", "a", "b"]),
        st.integers(0, 5),
        st.sampled_from(["diverged", "failed", "skipped: no GPU", "gone", "nan", "inf"]),
    ),
    max_size=8,
)


@SOON
@given(
    effects=st.tuples(*[st.sampled_from([0.0, -0.2, 0.2, -0.005, 0.03])] * 2),
    n=st.integers(1, 6),
    noise=st.sampled_from([0.0, 0.01, 0.05]),
    hurt=damage,
    margin=st.sampled_from([None, 0.02, 0.3]),
    min_effect=st.sampled_from([0.0, 0.02, 0.15]),
    correction=st.sampled_from(["holm", "bonferroni", "fdr", "none"]),
    seed=st.integers(0, 999),
)
def test_a_verdict_never_contradicts_its_numbers(effects, n, noise, hurt, margin, min_effect, correction, seed):
    frame = made_up({"base": 0, "a": effects[0], "b": effects[1]}, n, noise, seed=seed)
    for arm, s, what in hurt:
        hit = (frame.arm == arm) & (frame.seed == s)
        if what == "gone" and (frame.arm == arm).sum() > 1:
            frame = frame[~hit]
        elif what in ("nan", "inf"):
            frame.loc[hit, "test_bpb"] = float(what)
        elif what != "gone":
            frame.loc[hit, ["status", "test_bpb"]] = what, np.nan
    result = compare(frame, "test_bpb", "base", margin=margin, correction=correction)
    assert sorted(result.arm) == ["a", "b"]
    wide = (
        frame[(frame.status == "done") & np.isfinite(frame.test_bpb)]
        .pivot(index="seed", columns="arm", values="test_bpb")
        .reindex(columns=["base", "a", "b"])
    )
    for row in result.to_dict("records"):
        pairs = wide[["base", row["arm"]]].dropna()
        diff = (pairs[row["arm"]] - pairs["base"]).mean() if len(pairs) else np.nan
        assert row["n"] == len(pairs) and np.isclose(row["diff"], diff, equal_nan=True)
        assert row["n_failed"] == frame[(frame.arm == row["arm"])].status.isin(["diverged", "failed"]).sum()
        testable = row["se"] > 0
        assert testable == (not math.isnan(row["p"])) and (testable or row["note"])
        claims = [
            ("better", 0.0),
            ("worse", 0.0),
            ("different", 0.0),
            ("better", min_effect),
            ("lower", 0.0),
            ("higher", min_effect),
        ] + [("same", 0.0)] * (margin is not None)
        for direction, least in claims:
            v = decide(row, direction=direction, min_effect=least, margin=margin)
            assert v.word in WORDS and "nan" not in say(v).lower()
            assert (v.word == "not testable here") == (not testable)
            if not testable:
                assert not v.equivalent
                continue
            benefit = {"better": -1, "lower": -1, "worse": 1, "higher": 1}.get(direction, 0) * row["diff"]
            sure = row["p_adj"] < 0.05
            if direction == "same":
                assert v.equivalent == (v.word == "supported") and (
                    not v.equivalent or (row["p_tost_adj"] < 0.05 and abs(row["diff"]) < margin)
                )
                assert v.word != "contradicted" or row["ci_adj_low"] > margin or row["ci_adj_high"] < -margin
            elif direction == "different":
                assert v.word != "supported" or sure
                assert v.word != "contradicted"
            else:
                ends = sorted(
                    {"better": -1, "lower": -1}.get(direction, 1) * e for e in (row["ci_adj_low"], row["ci_adj_high"])
                )
                if v.word == "supported":
                    assert sure and benefit > 0 and benefit > least and (least == 0 or ends[0] > least)
                if v.word == "contradicted":
                    assert margin is None or abs(row["diff"]) > margin
                    assert (sure and benefit < 0) or (least > 0 and ends[1] < least)
            if v.word == "supported" and direction in ("better", "lower"):
                assert row["n_diverged"] == 0
            if v.word == "supported" and direction in ("worse", "higher"):
                assert row["n_diverged_baseline"] == 0
            assert "no difference" not in say(v) or v.equivalent
            assert v.detectable > 0


def test_known_truth_is_found_as_often_as_the_power_says():
    n, noise = 5, 0.01
    effect = detectable_dz(n) * noise * math.sqrt(2)  # a paired difference has sqrt(2) times the noise
    frame = made_up({"base": 0, "present": -effect, "absent": 0, "tiny": 0.001}, n, noise, blocks=range(400))
    result = compare(frame, "test_bpb", "base", family="block", correction="none", tests=())
    share = result.groupby("arm").verdict.value_counts(normalize=True)
    assert 0.74 < share["present"]["supported"] < 0.86 and share["present"].get("contradicted", 0) == 0
    assert share["absent"].get("supported", 0) < 0.05 and share["absent"].get("contradicted", 0) < 0.05
    same = [decide(r, direction="same", margin=0.04).word for r in result[result.arm == "tiny"].to_dict("records")]
    assert same.count("supported") > 360 and "contradicted" not in same


def test_swapping_arms_scaling_and_order_change_nothing_but_what_they_should():
    frame = made_up({"base": 0, "a": -0.02}, 6)
    one, two = compare(frame, "test_bpb", "base").iloc[0], compare(frame, "test_bpb", "a").iloc[0]
    assert (
        np.isclose(one["diff"], -two["diff"])
        and np.allclose([one.ci_low, one.ci_high], [-two.ci_high, -two.ci_low])
        and np.isclose(one["p"], two["p"])
    )
    assert (one.verdict, two.verdict) == ("supported", "contradicted")
    shuffled = compare(frame.sample(frac=1, random_state=0), "test_bpb", "base").iloc[0]
    assert np.isclose(shuffled["p"], one["p"]) and np.isclose(shuffled["diff"], one["diff"])
    scaled = compare(frame.assign(test_bpb=1000 * frame.test_bpb), "test_bpb", "base").iloc[0]
    assert np.isclose(scaled["diff"], 1000 * one["diff"]) and np.isclose(scaled["p"], one["p"])


def test_repeats_and_shared_runs_are_not_new_evidence():
    frame = made_up({"base": 0, "a": -0.02}, 4)
    again = pd.concat([frame, frame.assign(study="other"), frame.assign(run_id=frame.run_id + "b", repeat=1)])
    a, b = (compare(f, "test_bpb", "base").iloc[0] for f in (frame, again))
    assert a["n"] == b["n"] == 4 and np.isclose(a["p"], b["p"])


def test_blocks_are_never_mixed_and_a_block_without_baseline_says_so():
    frame = made_up({"base": 0, "a": -0.02}, 4, blocks=("512", "1024"))
    frame.loc[frame.block == "1024", "test_bpb"] += 5
    result = compare(frame[~((frame.block == "1024") & (frame.arm == "base"))], "test_bpb", "base").set_index("block")
    assert (
        abs(result.loc["512", "diff"]) < 0.1
        and "no run in this block" in result.loc["1024", "note"]
        and result.loc["1024", "verdict"] == "not testable here"
    )


def test_a_comparison_that_was_declared_and_lost_still_counts():
    frame = made_up({"base": 0, "a": -0.03, "gone": 0}, 4)
    frame.loc[frame.arm == "gone", ["status", "test_bpb"]] = "diverged", np.nan
    row = compare(frame, "test_bpb", "base").iloc[0]
    assert row.family_size == 2 and np.isclose(row.p_adj, 2 * row["p"])
    assert np.isclose(compare(frame, "test_bpb", "base", family_size=10).iloc[0].p_adj, 10 * row["p"])
    assert np.allclose(adjust([0.04, np.nan], "fdr"), [0.08, np.nan], equal_nan=True)
    assert np.allclose(adjust([0.01, np.nan], "bonferroni", 3), [0.03, np.nan], equal_nan=True)


@pytest.mark.parametrize(
    "call, words",
    [
        (dict(metric="test_bbp", baseline="base"), "metric 'test_bbp' is not in the table: did you mean test_bpb"),
        (dict(metric="test_bpb", baseline="bas"), "baseline 'bas' is not in the table: did you mean base"),
        (
            dict(metric="test_bpb", baseline="base", correction="homl"),
            "correction 'homl' is unknown: one of holm, bonferroni, fdr, none",
        ),
        (dict(metric="test_bpb", baseline="base", margin=-1), "margin -1 is not a margin"),
        (dict(metric="test_bpb", baseline="base", alpha=5), "alpha 5 is not a level"),
        (dict(metric="test_bpb", baseline="base", tests=("anova",)), "tests anova unknown: any of t, welch"),
        (
            dict(metric="test_bpb", baseline="base", pair_by="sead"),
            "column 'sead' is not in the table: did you mean seed",
        ),
    ],
)
def test_errors_name_what_was_given_and_what_is_allowed(call, words):
    with pytest.raises(StatsError) as e:
        compare(made_up({"base": 0, "a": 0}), **call)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_the_same_needs_a_margin_and_better_a_direction():
    row = compare(made_up({"base": 0, "a": 0}), "test_bpb", "base").iloc[0]
    with pytest.raises(StatsError, match="needs a margin"):
        decide(row, direction="same")
    with pytest.raises(StatsError, match="no better direction"):
        decide({**row, "metric": "grad_norm"})
    with pytest.raises(StatsError, match="one row and 2 match"):
        decide(compare(made_up({"base": 0, "a": 0, "b": 0}), "test_bpb", "base"))


def runs_2_4(seeds=3, noise=0.01, seed=0, synergy=0.0):
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 0.05, seeds)
    rows = [
        dict(zip(LEVELS, cell, strict=True), seed=s)
        for s in range(seeds)
        for cell in itertools.product(*LEVELS.values())
    ]
    on = lambda r: [r[f] == two[1] for f, two in LEVELS.items()]
    return pd.DataFrame(
        [
            r
            | dict(
                status="done",
                test_bpb=1.9
                + shared[r["seed"]]
                - 0.1 * on(r)[3]
                - 0.03 * on(r)[1]
                - synergy * all(on(r))
                + rng.normal(0, noise),
            )
            for r in rows
        ]
    )


def test_factorial_agrees_with_an_analysis_of_variance():
    import statsmodels.formula.api as smf
    from statsmodels.stats.anova import anova_lm

    runs = runs_2_4()
    ours = factorial(runs, "test_bpb", LEVELS).set_index("term")
    table = anova_lm(smf.ols("test_bpb ~ C(seed) + C(attention) * C(norm) * C(router) * C(optimizer)", runs).fit())
    for term, row in ours.iterrows():
        assert np.isclose(row["p_pooled"], table.loc[":".join(f"C({f})" for f in term.split(":")), "PR(>F)"])
    assert (ours["df_pooled"] == 30).all()


def test_every_seed_gives_an_effect_once():
    runs = runs_2_4(seeds=5)
    ours = factorial(runs, "test_bpb", LEVELS).set_index("term")
    means = runs.groupby(["seed", "norm"]).test_bpb.mean().unstack()
    by_hand = scipy_stats.ttest_1samp(means["rmsnorm"] - means["layernorm"], 0)
    assert np.isclose(ours.loc["norm", "p"], by_hand.pvalue)
    assert np.allclose(ours.loc["norm", ["ci_low", "ci_high"]].astype(float), by_hand.confidence_interval())
    assert (ours["df"] == 4).all() and (ours["n"] == 5).all() and ours["n_unit"].eq("seeds").all()
    assert ours.loc[["norm", "optimizer"], "verdict"].eq("supported").all()
    assert list(ours.loc["norm", "values"]) == [0, 1, 2, 3, 4]


def test_factorial_survives_holes_and_says_so():
    runs = runs_2_4()
    some = runs.drop(index=[3, 17, 40])
    holes = factorial(some, "test_bpb", LEVELS)  # every seed lacks a cell, so that none has the highest interaction
    assert len(holes) == 14 and (holes["df"] == 2).all() and holes.note.str.contains("unbalanced").all()
    assert abs(holes.set_index("term").loc["optimizer", "diff"] + 0.1) < 0.02
    less = factorial(runs.drop(index=[3, 4]), "test_bpb", LEVELS)  # one seed of three lacks two cells: it is left out
    assert len(less) == 15 and less["n"].eq(2).all() and less["missing_seeds"].eq("0").all()
    with pytest.raises(StatsError, match="cannot carry"):
        factorial(runs[runs.seed == 0].iloc[:4], "test_bpb", LEVELS)
    with pytest.raises(StatsError, match="exactly two"):
        factorial(runs[runs.norm == "rmsnorm"], "test_bpb", list(LEVELS))
    one = factorial(runs[runs.seed == 0], "test_bpb", LEVELS)
    assert one["verdict"].eq("not testable here").all() and one.note.str.contains("one seed").all()
    assert np.isclose(
        one["diff"], factorial(runs[runs.seed == 0], "test_bpb", LEVELS, block=None, max_order=1)["diff"][0]
    ).any()


def test_synergy_is_found_where_it_is_and_not_where_it_is_not():
    with_it = component_contrasts(runs_2_4(seeds=5, synergy=0.2), "test_bpb", LEVELS).set_index("term")
    without = component_contrasts(runs_2_4(seeds=5), "test_bpb", LEVELS).set_index("term")
    assert with_it.loc["synergy", "verdict"] == "supported" and without.loc["synergy", "verdict"] == "undecided"
    assert with_it.loc["synergy", "ci_low"] < -0.2 < with_it.loc["synergy", "ci_high"]


def test_correlations_cover_the_truth_and_refuse_what_is_no_data():
    x = np.random.default_rng(0).normal(size=(60, 2))
    frame = pd.DataFrame(dict(a=x[:, 0], b=0.8 * x[:, 0] + 0.6 * x[:, 1], c=x[:, 1], status="done"))
    found = correlations(frame, ["a", "b", "c"]).set_index(["a", "b"])
    assert (
        found.loc[("a", "b"), "ci_low"] < 0.8 < found.loc[("a", "b"), "ci_high"]
        and found.loc[("a", "c"), "ci_low"] < 0 < found.loc[("a", "c"), "ci_high"]
    )
    ranks = correlations(frame.assign(b=np.exp(5 * frame.a)), ["a", "b"], method="spearman")
    assert np.isclose(ranks.r[0], 1.0)
    assert correlations(frame.iloc[:3], ["a", "b"]).r.isna().all()


def test_scaling_law_with_few_sizes_says_what_it_cannot_do():
    law = lambda n: 1.7 + 300 * n**-0.3
    frame = lambda sizes: pd.DataFrame(
        [dict(n=n, seed=s, status="done", val_loss=law(n) + 0.01 * (-1) ** s) for n in sizes for s in range(2)]
    )
    with pytest.raises(StatsError, match="needs 3 sizes and 2"):
        fit_power_law(frame([1e5, 1e6]), "val_loss", "n")
    three = fit_power_law(frame([1e5, 1e6, 1e7]), "val_loss", "n", resamples=50)
    assert math.isnan(three.predicted) and "none can be held out" in three.note and "not tested" in three.note
    five = fit_power_law(frame([1e5, 3e5, 1e6, 3e6, 1e7]), "val_loss", "n", resamples=100)
    assert np.isclose(five.predicted, law(1e7), atol=0.02) and five.predicted_low < five.observed < five.predicted_high
    assert np.isclose(float(five(1e6)), law(1e6), atol=0.01)


def test_no_test_cries_wolf_and_pairing_pays():
    table = aa_calibration(RunSpread.equal(0.01, 0.03), n_seeds=5, n_sim=300, seed=1).set_index("test")
    assert table.drop("bootstrap").ok.all() and table.loc["bootstrap", "note"] == "offered from 10 pairs on"
    assert 0.02 < table.loc["t", "rate"] < 0.09 and table.loc["permutation", "rate"] == 0
    gain = pairing_gain(made_up({"base": 0, "a": 0}, 40, 0.01, 0.03), "test_bpb", "base").gain[0]
    assert 5 < gain < 20  # (0.03² + 0.01²) / 0.01² = 10
    assert more_seeds(compare(made_up({"base": 0, "a": 0}, 3), "test_bpb", "base"), effect=0.005).more[0] > 5


def test_small_samples_are_refused_not_guessed():
    assert (
        np.isnan(bca_interval(np.arange(9.0))).all()
        and math.isnan(sign_flip_pvalue([1.0]))
        and math.isnan(tost_pvalue(0.1, 0.0, 2, 0.2))
    )
    assert math.isnan(paired_power(1.0, 1))


def test_importing_is_light():
    code = (
        "import sys, kimi_nb.stats.verdict, kimi_nb.stats.design, kimi_nb.stats.plots, kimi_nb.stats.pictures; "
        "print(sorted({'torch', 'matplotlib', 'scipy', 'statsmodels', 'seaborn'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@settings(max_examples=120, deadline=None)
@given(
    diff=st.floats(-0.1, 0.1),
    se=st.floats(1e-5, 0.1),
    n=st.integers(2, 12),
    margin=st.sampled_from([0.005, 0.02, 0.08]),
    direction=st.sampled_from(["better", "worse", "lower", "higher", "different"]),
    family=st.integers(1, 15),
    least=st.sampled_from([0.0, 0.01, 0.05]),
    given_by=st.sampled_from(["claim", "row"]),
)
def test_a_difference_inside_the_margin_never_decides(diff, se, n, margin, direction, family, least, given_by):
    """Whatever its sign, its p value, its family and what is claimed; the margin may come with the comparison."""
    p = 2 * scipy_stats.t.sf(abs(diff) / se, n - 1)
    row = dict(arm="a", baseline="b", metric="test_bpb", diff=diff, se=se, df=n - 1.0, n=n, n_unit="seeds")
    row |= dict(p_adj=min(1.0, family * p), family_size=family, correction="bonferroni")
    row |= dict(margin=margin) if given_by == "row" else {}
    found = decide(row, direction=direction, min_effect=least, margin=None if given_by == "row" else margin)
    assert found.margin == margin
    if abs(diff) <= margin or found.size == "within":
        assert found.word in ("no difference", "undecided")
    if found.size == "within":
        assert found.word == "no difference" and -margin < found.ci_low and found.ci_high < margin
    if found.word == "supported":
        assert found.direction in {"lower": ("better",), "higher": ("worse",)}.get(
            direction, (direction,) if direction != "different" else ("better", "worse")
        )
    same = decide(row, direction="same", margin=margin)
    assert same.word != "contradicted" or abs(diff) > margin


def small_effects(scale, seeds, noise, seed):
    """A factorial whose true effects are inside a margin of 0.02."""
    rng, runs = np.random.default_rng(seed), runs_2_4(seeds, noise, seed)
    true = dict(zip(LEVELS, scale * rng.uniform(-0.008, 0.008, 4)))
    shift = sum(true[f] * (runs[f] == two[1]) for f, two in LEVELS.items())
    arms = ["+".join(f for f, two in LEVELS.items() if r[f] == two[1]) or "base" for r in runs.to_dict("records")]
    clean = 1.9 + runs["seed"] * 0.01 + rng.normal(0, noise, len(runs))
    return runs.assign(test_bpb=clean + shift, arm=arms)


@settings(max_examples=3, deadline=None)
@given(seeds=st.sampled_from([3, 5]), noise=st.sampled_from([1e-4, 1e-3]), seed=st.integers(0, 10**6))
def test_no_path_to_a_finding_decides_what_is_inside_the_margin(seeds, noise, seed):
    """Pairs, main effects, interactions, parts alone and on top, effects inside levels, the best cell."""
    runs = small_effects(1.0, seeds, noise, seed)
    effects = factorial(runs, "test_bpb", LEVELS, margin=0.02)
    inside = [(f, ("optimizer",)) for f in LEVELS if f != "optimizer"] + partners(effects)
    tables = [
        effects,
        component_contrasts(runs, "test_bpb", LEVELS, margin=0.02),
        simple_effects(runs, "test_bpb", LEVELS, inside, margin=0.02),
        compare(runs, "test_bpb", "base", margin=0.02),
    ]
    for table in tables:
        near = table[table["diff"].abs() <= 0.02]
        assert len(near) and not near["verdict"].isin(DECIDED).any()
        for row in near.to_dict("records"):
            assert not {decide(row, direction=d).word for d in ("better", "worse", "different")} & set(DECIDED)


@settings(max_examples=4, deadline=None)
@given(
    seed_sd=st.sampled_from([0.0, 0.05]),
    own=st.lists(st.sampled_from([0.0, 0.01, 0.04]), min_size=4, max_size=4),
    noise=st.tuples(st.sampled_from([0.005, 0.03]), st.sampled_from([0.005, 0.03])),
    noisy=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
def test_false_alarms_keep_their_rate_whatever_the_spread(seed_sd, own, noise, noisy, seed):
    """With 3, 5 and 8 seeds at most 1.2 times the declared rate; the error pooled over all runs does not keep it."""
    spread = RunSpread(seed_sd, tuple(own), noise, noisy, tuple(LEVELS))
    for n in (3, 5, 8):
        found = judged_cells(*drawn_cells(spread, n, 12_000, np.random.default_rng(seed)))
        rates = (found.p[:, :4] < 0.05).mean(axis=0)
        assert rates.max() <= ALLOWED * 0.05, (n, rates)
        if max(own) == 0.04 and max(noise) == 0.005:
            assert (found.p_pooled[:, int(np.argmax(own))] < 0.05).mean() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["quick", "standard"])
def test_false_alarms_keep_their_rate_under_the_spread_of_the_records(profile):
    """Drawn from what the published factorial shows, judged by the very functions that judge it."""
    from kimi_nb.plan import published
    from kimi_nb.stats import run_spread
    from kimi_nb.study import FACTORS, with_factors

    store = published(profile)
    spread = run_spread(with_factors(store.frame("combined", stale=True)), "test_loss", FACTORS)
    assert max(spread.factor_sd) > 0
    for n in (3, 5, 8):
        table = aa_calibration(spread, n, n_sim=400, seed=n)
        assert table.loc[table["used"] & table["rate"].notna(), "ok"].all(), table
        assert table.loc[~table["used"], "rate"].min() > ALLOWED * 0.05
        wrong = [
            (factorial(drawn_study(spread, n, seed=1000 * n + i), "test_bpb", names_of(spread))["p"][:4] < 0.05).sum()
            for i in range(125)
        ]
        sure = scipy_stats.binomtest(int(np.sum(wrong)), 500).proportion_ci(0.99)
        assert sure.low <= ALLOWED * 0.05, (n, sure)


def names_of(spread):
    """Its factors with their levels."""
    return dict.fromkeys(spread.names, ("off", "on"))


def test_the_truly_best_arm_is_hardly_ever_called_worse():
    wrong = 0
    for seed in range(20):
        frame = made_up({"a": 0.0, "b": 0.0001, "c": 0.0001}, 5, 0.01, seed=seed)
        wrong += not against_best(frame, "test_bpb").set_index("arm").loc["a", "may_be_best"]
    assert wrong <= 3
