"""The ladder: forecasts whose intervals hold what they promise and that cannot be made afterwards; a whole climb."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_nb.config import KimiError, load_profile
from kimi_nb.phases import ladder
from kimi_nb.stats import forecast_effect, forecast_rung, score_forecast
from kimi_nb.study import Store

RUNGS = np.array([2e12, 2e13, 2e14, 4e15])
LADDER = """[tiny]
preset = plan
budget_minutes = 1
max_epochs = 1000
only = ladder
data.corpus = tinyworld
data.tokenizer = byte
data.num_documents = 200
model.d_model = 16
model.n_layers = 1
model.n_heads = 2
model.d_ff = 64
model.max_seq_len = 32
model.norm.kind = rmsnorm
model.moe.n_experts = 4
model.moe.d_expert = 32
train.steps = 12
train.batch_size = 4
train.warmup_steps = 2
train.eval_every = 6
train.eval_tokens = 512
train.test_tokens = 512
train.lr = 4e-3
ladder.seeds = 2, 2, 2
ladder.model.d_model = 16, 24, 32
ladder.model.n_layers = 1, 1, 2
ladder.model.n_heads = 2, 2, 2
ladder.model.max_seq_len = 32, 32, 32
ladder.train.batch_size = 4, 4, 8
"""


def drawn_ladder(rng, rungs, effect, drift, scatter, error=0.006):
    """Effects of one part as rungs would show them, and what the next one shows."""
    x = np.log10(RUNGS[: rungs + 1])
    truth = effect + drift * (x - x[0]) + rng.normal(0, scatter, rungs + 1)
    return truth + rng.normal(0, error, rungs + 1)


def inside(rng, rungs, times, **truth):
    """How often the intervals of 80% and of 95% hold the next rung's value."""
    held = []
    for _ in range(times):
        seen = drawn_ladder(rng, rungs, **{name: draw(rng) for name, draw in truth.items()})
        found = forecast_effect(RUNGS[:rungs], seen[:-1], [0.006] * rungs, RUNGS[rungs], 0.006)
        held.append([low <= seen[-1] <= high for low, high in map(found.interval, (0.8, 0.95))])
    return np.mean(held, axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("rungs", [1, 2, 3])
def test_intervals_hold_what_they_promise(rungs):
    """Over made-up ladders whose drift and scatter are drawn as the prior says, 80% and 95% come out as that."""
    rng = np.random.default_rng(rungs)
    truth = dict(
        effect=lambda g: 0.2, drift=lambda g: g.normal(0, 0.1), scatter=lambda g: abs(g.normal(0, 0.05))
    )  # fmt: skip
    eighty, most = inside(rng, rungs, 250, **truth)
    assert 0.72 < eighty < 0.9 and 0.9 < most < 0.995


@pytest.mark.parametrize("rungs", [1, 2])
def test_an_effect_that_stays_is_held_more_often(rungs):
    """A part without drift or scatter never surprises, and one that jumps by ten times its scatter always does."""
    rng = np.random.default_rng(0)
    still = inside(rng, rungs, 25, effect=lambda g: 0.2, drift=lambda g: 0.0, scatter=lambda g: 0.0)
    assert still.min() > 0.9
    far = forecast_effect(RUNGS[:rungs], [0.2] * rungs, [0.006] * rungs, RUNGS[rungs], 0.006).interval(0.95)
    assert not far[0] < 1.5 < far[1]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=4), st.floats(0.5, 20))
def test_a_forecast_knows_no_unit_and_no_side(seen, unit):
    """In other units, or with arm and baseline exchanged, it is the same; more certainty is a wider interval."""
    made = lambda sign, u: forecast_effect(
        RUNGS[: len(seen)], sign * u * np.array(seen), [0.01 * u] * len(seen), 4e16, 0.01 * u, 0.02 * u
    )
    low, high = made(1, 1).interval(0.8)
    assert np.allclose(made(1, unit).interval(0.8), [unit * low, unit * high], atol=1e-6 * unit)
    assert np.allclose(made(-1, 1).interval(0.8), [-high, -low], atol=1e-6)
    wide = made(1, 1).interval(0.95)
    assert wide[0] <= low <= made(1, 1).mean <= high <= wide[1]


def test_fewer_seeds_are_a_wider_forecast():
    """The interval is one for what will be measured, so the next rung's seeds count."""
    rows = [dict(part="x", compute=2e12, effect=0.03, se=0.01, df=7, seeds=8)]
    one, other = (forecast_rung(pd.DataFrame(rows), 2e13, seeds=n).iloc[0] for n in (8, 2))
    assert other["high95"] - other["low95"] > one["high95"] - one["low95"]
    missed = score_forecast(pd.DataFrame([one]), pd.DataFrame([dict(part="x", effect=1.0), dict(part="y", effect=0.0)]))
    assert len(missed) == 1 and not missed["inside95"].iloc[0] and missed["sign"].iloc[0]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A profile of three rungs that train in a second each, and its store."""
    file = tmp_path / "settings.ini"
    file.write_text(LADDER)
    monkeypatch.setenv("KIMI_NB_SETTINGS", str(file))
    return load_profile("tiny"), Store(tmp_path / "results")


def test_rungs_keep_their_proportions(tiny):
    """Tokens a parameter, equal size of both attentions, experts in proportion, rates by width."""
    profile, _ = tiny
    profile = profile.model_copy(update=dict(tuned={"muon": {"train.lr": 0.04}, "adamw": {"train.lr": 0.004}}))
    climbed = ladder.rungs(profile)
    assert [rung.profile.base.model.d_model for rung in climbed] == [16, 24, 32] and climbed[
        0
    ].profile.base.train.steps == 12
    for rung in climbed:
        base = rung.profile.base
        per_size = base.train.steps * base.tokens_per_step / rung.size
        assert per_size == pytest.approx(12 * 128 / climbed[0].size, rel=0.05)
        assert base.model.moe.d_expert == 2 * base.model.d_model
        assert rung.profile.tuned["adamw"]["train.lr"] == pytest.approx(0.004 * 16 / base.model.d_model, rel=0.01)
        assert rung.profile.tuned["muon"]["train.lr"] == pytest.approx(
            0.04 * (16 / base.model.d_model) ** 0.5, rel=0.01
        )
        arm = next(arm for arm in ladder.rung_study(rung).arms if arm.name == "attention")
        assert ladder.active_size(ladder.rung_study(rung).arm_run(arm).model) == pytest.approx(rung.size, rel=0.02)


def test_a_ladder_of_unequal_lists_is_refused(tiny, tmp_path):
    """One line says how many values each list has."""
    (tmp_path / "settings.ini").write_text(LADDER.replace("ladder.seeds = 2, 2, 2", "ladder.seeds = 2, 2"))
    with pytest.raises(KimiError, match=r"3 of model.d_model.*2 of seeds: a rung needs one of each"):
        ladder.rungs(load_profile("tiny"))


@pytest.mark.parametrize(("less", "word"), [(-0.05, "supported"), (0.05, "contradicted"), (0.0, "no difference")])
def test_less_of_a_gain_after_a_longer_training_has_a_word(tiny, less, word):
    """Below zero the shorter training's gain is the larger one; without such a row nothing is said."""
    (first, *_), seeds = ladder.rungs(tiny[0]), pd.Series([0.001, -0.001, 0.0, 0.002, -0.002])
    rows = [
        ladder.contrast_row(seeds + diff, "Muon") | dict(block=block, margin=0.02)
        for block, diff in (("a", -0.1), (ladder.LESS, less))
    ]
    budgets = ladder.family_statistics(pd.DataFrame(rows))
    assert ladder.judge_longer(budgets, first).word == word
    assert ladder.judge_longer(budgets.iloc[:1], first).word == "not testable here"


@pytest.mark.slow
def test_a_climb(tiny):
    """A rung, a sealed forecast, the next rung, a score; no forecast of what has begun, none altered."""
    from kimi_nb.runner import run_study

    profile, store = tiny
    first, second, third = climbed = ladder.rungs(profile)
    assert ladder.next_rung(store, climbed) is None
    run_study(ladder.rung_study(first), store, "inprocess", progress=False)
    effects = ladder.ladder_effects(store, climbed)
    assert set(ladder.PARTS) < set(effects["part"]) and set(effects["rung"]) == {first.label}
    assert ladder.next_rung(store, climbed).name == second.name
    assert ladder.judge_longer(ladder.budget_effects(store, first), first).word == "not testable here"
    run_study(ladder.budget_study(first), store, "inprocess", progress=False)
    budgets = ladder.budget_effects(store, first)
    gains = dict(zip(budgets["block"], budgets["diff"], strict=True))
    by_arm = ladder.finished_runs(store, first).groupby("arm")["test_bpb"].mean()
    own, longest = ladder.budget_words(first, 1.0), ladder.budget_words(first, 3.0)
    assert gains[own] == pytest.approx(by_arm["optimizer"] - by_arm["base"])
    assert gains[ladder.LESS] == pytest.approx(gains[own] - gains[longest])  # both have the same two seeds
    assert ladder.judge_longer(budgets, first).n == 2
    said = ladder.seal_forecast(store, climbed, second)
    assert said["rests_on"] == {first.name: 2} and len(said["parts"]) == len(effects)
    run_study(ladder.rung_study(second), store, "inprocess", progress=False)
    assert ladder.seal_forecast(store, climbed, second) == said
    scores = ladder.scored(store, climbed)
    assert len(scores.parts) == len(said["parts"]) and scores.rungs["before"].tolist() == [True]
    assert {finding.id for finding in ladder.judge(ladder.ladder_effects(store, climbed), scores, climbed)} >= {
        "ladder attention", f"ladder attention {first.name}", "ladder forecast"
    }  # fmt: skip
    assert (
        len(ladder.worth(store, climbed, ladder.ladder_effects(store, climbed)))
        and len(ladder.gates(store, climbed)) == 2
    )
    store.begin(ladder.rung_study(third).expand()[0].run, "begun")
    with pytest.raises(KimiError, match=f"rung {third.name} has begun"):
        ladder.seal_forecast(store, climbed, third)
    file = ladder.forecast_file(store, second)
    file.write_text(file.read_text().replace('"seeds"', '"seed"').replace("made", "mode", 1))
    with pytest.raises(KimiError):
        ladder.seal_forecast(store, climbed, second)


def test_a_published_ladder_has_its_words_in_the_report():
    """Results that hold a phase by request bring its title and figures; others are as they were."""
    from kimi_nb.report import abouts

    assert abouts(("ladder", "mine"))["ladder"].main_figures == ("ladder-effects",)
    assert "ladder" not in abouts() and abouts(("mine",))["mine"].order == 99


def test_a_rung_below_the_counts_says_nothing_of_the_network(tiny, monkeypatch):
    """Attention and routing get no word there, in table, findings and guide; Muon does, and other rungs do."""
    from kimi_nb.report import answers_at

    climbed = ladder.rungs(tiny[0])
    truth = dict(attention=0.06, routing=0.0, optimizer=-0.2)
    store, reason = Made(climbed, [truth, truth]), "it has learnt less than a table"
    monkeypatch.setattr(ladder, "held_back", lambda store, rung: reason if rung.first else "")
    effects = ladder.ladder_effects(store, climbed)
    words = {(row.name_, row.part): row.word for row in effects.rename(columns=dict(name="name_")).itertuples()}
    first, second = climbed[0].name, climbed[1].name
    assert {words[first, part] for part in ladder.NETWORK} == {ladder.BELOW} and words[
        first, "optimizer"
    ] == "supported"
    assert words[second, "attention"] == "contradicted"
    scores = ladder.Scores(pd.DataFrame(), pd.DataFrame())
    said = {finding.id: finding for finding in ladder.judge(effects, scores, climbed)}
    assert said[f"ladder attention {first}"].word == "not testable here"
    assert said[f"ladder attention {first}"].reason == reason
    assert said["ladder attention"].word == "contradicted" and said[f"ladder optimizer {first}"].word == "supported"
    answers = answers_at(climbed[0].size, effects, climbed)
    assert [answer.answer for answer in answers] == ["not tested", "not tested", "yes"] and reason in answers[0].because


def test_a_diverged_run_decides_nothing_for_its_side(tiny):
    """Runs that diverged are told beside the effect of what is left, which is called unclear."""
    climbed = ladder.rungs(tiny[0])
    store = Made(climbed, [dict(attention=0.0, routing=0.0, optimizer=-0.2)])
    frame = store.frames[f"ladder-{climbed[0].name}"]
    lost = frame.iloc[:1].assign(arm="optimizer", seed=7, status="diverged", test_bpb=np.nan, run_id="lost")
    store.frames[f"ladder-{climbed[0].name}"] = pd.concat([frame, lost], ignore_index=True)
    effects = ladder.ladder_effects(store, climbed)
    said = ladder.judge(effects, ladder.Scores(pd.DataFrame(), pd.DataFrame()), climbed)
    (muon,) = [finding for finding in said if finding.id == "ladder optimizer"]
    assert muon.word == "undecided" and muon.direction == "unclear" and muon.diff < -0.19
    assert any("diverged" in caveat for caveat in muon.caveats)


@pytest.mark.parametrize(
    ("before", "seeds", "word"), [(True, 3, "supported"), (True, 4, "supported"), (False, 4, "not testable here")]
)
def test_only_a_forecast_that_was_one_counts(before, seeds, word):
    """One that was made too late is told and not counted; fewer seeds than foretold are said."""
    parts = pd.DataFrame(dict(rung=["1M"] * 3, inside95=[True] * 3, inside80=[True] * 3, sign=[True] * 3))
    rungs = pd.DataFrame([dict(rung="1M", before=before, seeds=seeds, of=4, decisions=1.0, best=True)])
    found = ladder.judge_forecasts(ladder.Scores(parts, rungs))
    assert found.word == word
    assert any("scored on 3" in caveat for caveat in found.caveats) == (seeds == 3)


def test_a_rung_may_have_its_four_cells_without_the_router(tiny):
    """They say what attention and the optimizer do there, with a caveat, and nothing of the router."""
    from kimi_nb.cli import arms_asked_for
    from kimi_nb.report import answers_at

    climbed = ladder.rungs(tiny[0])
    study = ladder.rung_study(climbed[1])
    wanted = arms_asked_for(study, ["attention", "optimizer", "attention+optimizer"])  # of `kimi-nb run --arms`
    assert {planned.arm for planned in filter(wanted, study.expand())} == set(ladder.cells_of(ladder.BARE))
    store = Made(climbed, [dict(attention=0.06, routing=0.01, optimizer=-0.2)] * 2)
    name = f"ladder-{climbed[1].name}"
    frame = store.frames[name]
    store.frames[name] = frame[frame["arm"].isin(ladder.cells_of(ladder.BARE))]
    effects = ladder.ladder_effects(store, climbed)
    mine = effects[effects["name"] == climbed[1].name].set_index("part")
    assert set(mine.index) == {"attention", "optimizer", "crossover"} and mine["bare"].all()
    assert mine["effect"].to_dict() == pytest.approx(dict(attention=0.06, optimizer=-0.2, crossover=0.0), abs=1e-3)
    said = {f.id: f for f in ladder.judge(effects, ladder.Scores(pd.DataFrame(), pd.DataFrame()), climbed)}
    assert ladder.WITHOUT_ROUTER in said["ladder attention"].caveats
    assert climbed[0].label in said["ladder routing"].claim  # the highest rung that has it
    assert ladder.rung_states(store, climbed)["state"].tolist()[1] == "2 of 2 seeds, without Kimi's router"
    answers = {a.part: a.because for a in answers_at(climbed[1].size, effects, climbed)}
    assert "with softmax routing alone" in answers["Muon"] and climbed[1].label not in answers["Kimi's router"]
    store.frames[name] = pd.concat([store.frames[name], frame[frame["arm"] == "routing"]])
    assert not ladder.ladder_effects(store, climbed).query("part == 'routing'")["name"].eq(climbed[1].name).any()


class Made:
    """A store of made-up rung records: each part's effect is known, the seeds differ a little."""

    path = "none"

    def __init__(self, climbed, effects):
        self.climbed, self.frames, rng = climbed, {}, np.random.default_rng(4)
        for rung, there in zip(climbed, effects):
            rows = []
            for arm in ladder.rung_study(rung).arms if there else ():
                on = [part for part in ladder.PARTS if part in arm.name.split("+")]
                for seed in range(rung.seeds):
                    bpb = 2.0 + 0.01 * seed + rng.normal(0, 1e-4) + sum(there[part] for part in on)
                    rows.append(dict(run_id=f"{arm.name}{seed}", arm=arm.name, seed=seed, status="done", test_bpb=bpb))
            self.frames[f"ladder-{rung.name}"] = pd.DataFrame(rows)

    def studies(self):
        return {name: None for name, frame in self.frames.items() if len(frame)}

    def frame(self, name, stale=False):
        return self.frames[name]

    def get(self, run_id):
        """No record stands behind a row."""

    def manifest(self, name):
        return next(ladder.rung_study(rung) for rung in self.climbed if name == f"ladder-{rung.name}"), {}


def test_the_decision_guide_answers_by_size_and_says_where_it_extrapolates(tiny):
    """A measured rung answers near itself, a forecast beyond, and an incomplete ladder says that it is waiting."""
    from kimi_nb.report import answers_at, ladder_advice

    climbed = ladder.rungs(tiny[0])
    words, shown = ladder_advice(None, climbed)
    assert shown is None and words.lower().count(": waiting") == 3
    truth = dict(attention=0.06, routing=0.0, optimizer=-0.2)
    store = Made(climbed, [truth, truth])
    assert ladder.rung_states(store, climbed)["state"].tolist() == ["there", "there", "waiting"]
    words, shown = ladder_advice(store, climbed)
    assert f"rung {climbed[2].name}: waiting" in words and str(shown).count("extrapolated") >= 3
    effects = ladder.ladder_effects(store, climbed)
    here, beyond = (answers_at(rung.size, effects, climbed) for rung in climbed[1:])
    assert [answer.answer for answer in here] == ["no", "no difference", "yes"]
    assert not any(answer.extrapolated for answer in here)
    far = answers_at(climbed[1].size * 40, effects, climbed)
    assert all(answer.extrapolated and answer.because.startswith("Extrapolated, 40.0 times above") for answer in far)
    assert {answer.extrapolated for answer in beyond} == {climbed[2].size > 1.5 * climbed[1].size}
    between = answers_at((climbed[0].size * climbed[1].size) ** 0.5, effects, climbed)  # twice as far as a rung reaches
    assert {answer.extrapolated for answer in between} == {climbed[1].size > 1.5**2 * climbed[0].size}
    held = effects.assign(held=["too little" if name == climbed[1].name else "" for name in effects["name"]])
    beyond = answers_at(climbed[1].size * 40, held, climbed)
    assert all(f"from {climbed[0].label}." in answer.because for answer in beyond)
    partly = Made(climbed, [truth])
    partly.frames["ladder-" + climbed[0].name] = partly.frames["ladder-" + climbed[0].name].query("seed == 0")
    words, shown = ladder_advice(partly, climbed)
    assert shown is None and f"rung {climbed[0].name}: waiting (".lower() in words.lower()


@pytest.mark.slow
def test_a_ladder_stands_first_in_slides_and_paper_and_leaves_no_trace_where_there_is_none():
    """Its figure is on the second slide and its section before those of the other phases."""
    from kimi_nb.plan import published
    from kimi_nb.report import Evidence, abouts, build_paper, build_slides

    e, climb = Evidence(published("quick")), Evidence(published("quick"))
    climb.outcomes["ladder"], climb.about = climb.outcomes["rope"], abouts(["ladder"])
    with_it, without = build_slides(e, {}, ladder=climb), build_slides(e, {})
    assert with_it[1].title == "How effects move with compute" and with_it[1].figure is not None
    assert all(slide.title != with_it[1].title for slide in without)
    sections = lambda doc: [block.title for block in doc.blocks if getattr(block, "level", 0) == 1]
    heads = sections(build_paper(e, ladder=climb))
    assert heads.index("The ladder") < heads.index("Optimizers")
    assert "The ladder" not in sections(build_paper(e))
