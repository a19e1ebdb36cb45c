"""Figures: what they must say, the same bytes each time, the caller's settings left alone."""

import itertools
import os
import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kimi_nb.stats import StatsError, compare, correlations, factorial, fit_power_law, pictures, plots


def made_up(n=3):
    rng = np.random.default_rng(0)
    rows = [
        dict(
            run_id=f"{b}{a}{s}",
            arm=a,
            block=b,
            seed=s,
            status="done",
            **{"train.lr": lr},
            step_ms=100 + 5 * k + rng.normal(),
            test_bpb=1.9 - 0.02 * k + 0.03 * s + rng.normal(0, 0.004),
        )
        for b in ("512", "1024")
        for k, a in enumerate(("base", "muon", "mla"))
        for s in range(n)
        for lr in (1e-3,)
    ]
    frame = pd.DataFrame(rows)
    frame.loc[(frame.arm == "mla") & (frame.block == "1024"), ["status", "test_bpb"]] = "diverged", np.nan
    return frame


def made_up_curves():
    steps = np.arange(10, 201, 10)
    frame = pd.concat(
        [
            pd.DataFrame(
                dict(
                    run_id=f"{a}{s}",
                    arm=a,
                    seed=s,
                    block="512",
                    step=steps,
                    tokens=steps * 512,
                    seconds=steps * (0.1 + 0.01 * s),
                    val_loss=3 + k + np.exp(-steps / 50) + 0.1 * s,
                )
            )
            for k, a in enumerate(("base", "muon"))
            for s in range(3)
        ],
        ignore_index=True,
    )
    frame.loc[(frame.run_id == "muon0") & (frame.step > 100), "val_loss"] = np.nan
    return frame


def all_figures():
    runs, curves, rng = made_up(), made_up_curves(), np.random.default_rng(0)
    cells = pd.DataFrame(
        [
            dict(norm=a, optimizer=b, seed=s, status="done", test_bpb=2 - 0.1 * (b == "muon") + rng.normal(0, 0.01))
            for a, b in itertools.product(("ln", "rms"), ("adamw", "muon"))
            for s in range(3)
        ]
    )
    sizes = pd.DataFrame(
        [
            dict(n=n, seed=s, status="done", val_loss=1.7 + 300 * n**-0.3 + 0.01 * rng.normal())
            for n in (1e5, 1e6, 1e7, 1e8)
            for s in range(2)
        ]
    )
    yield "loss_curves", plots.loss_curves(curves, target=3.1)
    yield "forest", plots.forest(compare(runs, "test_bpb", "base", margin=0.01))
    yield "heatmap", plots.heatmap(runs, "block", "arm", "test_bpb")
    yield "lr_sensitivity", plots.lr_sensitivity(runs, "test_bpb")
    yield "pareto", plots.pareto(runs, "step_ms", "test_bpb")
    yield "interaction", pictures.interaction(cells, "norm", "optimizer", "test_bpb")
    yield "factorial_effects", pictures.factorial_effects(factorial(cells, "test_bpb", ["norm", "optimizer"]))
    yield "scaling_fit", pictures.scaling_fit(fit_power_law(sizes, "val_loss", "n", resamples=20))
    yield "power_curve", pictures.power_curve(sd=0.01)
    yield "expert_load", pictures.expert_load(rng.dirichlet(np.ones(8), 3))
    yield "expert_load over time", pictures.expert_load(rng.dirichlet(np.ones(8), (10, 2)), steps=range(10))
    yield "spectra", pictures.spectra({"Muon": rng.uniform(0.5, 1, 32), "AdamW": rng.uniform(0, 1, (3, 32))})
    yield (
        "correlation_matrix",
        pictures.correlation_matrix(
            correlations(runs.assign(seconds=runs.step_ms**2), ["test_bpb", "step_ms", "seconds"])
        ),
    )


def texts(fig):
    return [t.get_text() for t in fig.findobj(mpl.text.Text) if t.get_text()]


def test_every_figure_is_a_white_card_with_labelled_axes_and_leaves_no_trace():
    settings, open_before = dict(mpl.rcParams), plt.get_fignums()
    for name, fig in all_figures():
        assert isinstance(fig, Figure), name
        assert mpl.colors.to_rgba(fig.get_facecolor()) == (1, 1, 1, 1), name
        assert any(ax.get_xlabel() or ax.get_ylabel() for ax in fig.axes), name
        assert not any("nan" in t.lower() for t in texts(fig)), (name, texts(fig))
    assert dict(mpl.rcParams) == settings and plt.get_fignums() == open_before


def test_a_saved_figure_is_the_same_bytes_each_time(tmp_path):
    for folder in "ab":
        png, svg = plots.save(plots.loss_curves(made_up_curves()), tmp_path / folder / "curves.png", dpi=60)
        assert png.read_bytes()[:4] == b"\x89PNG" and b"<dc:date>" not in svg.read_bytes()
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in ("curves.png", "curves.svg")
    )
    plots.save(plots.loss_curves(made_up_curves()), tmp_path / "eps=1e-6.lr=0.001", dpi=60)
    assert (tmp_path / "eps=1e-6.lr=0.001.png").exists()


def test_the_mean_of_a_curve_is_over_the_runs_that_lasted():
    fig = plots.loss_curves(made_up_curves(), cut=0)
    lines = {line.get_label(): line for line in fig.axes[0].lines}
    muon = lines["muon (n = 2, 1 stopped early)"]
    assert np.allclose(muon.get_ydata(), 4 + np.exp(-np.arange(10, 201, 10) / 50) + 0.15)  # seeds 1 and 2
    assert any(line.get_marker() == "x" and np.allclose(line.get_xdata(), [100]) for line in fig.axes[0].lines)
    seconds = plots.loss_curves(made_up_curves(), x="seconds", cut=0).axes[0].lines[0]
    assert np.allclose(seconds.get_xdata(), np.arange(10, 201, 10) * 0.11)


@pytest.mark.parametrize("band, half", [("range", 0.1), ("sd", 0.1), ("ci", 0.1 / np.sqrt(3) * 4.302653)])
def test_a_band_is_what_its_legend_says(band, half):
    fig = plots.loss_curves(made_up_curves(), band=band, cut=0)
    edge = fig.axes[0].collections[0].get_paths()[0].vertices
    assert np.isclose(np.ptp(edge[np.isclose(edge[:, 0], 200), 1]), 2 * half)
    words = {"range": "lowest to highest", "sd": "±1 sd", "ci": "95% t interval"}[band]
    assert words in fig.axes[0].get_legend().get_title().get_text()


def test_a_forest_shows_the_numbers_of_its_table():
    result = compare(made_up(), "test_bpb", "base", margin=0.01)
    fig = plots.forest(result)
    ax, words = fig.axes[0], " ".join(texts(fig))
    thick = [line for line in ax.lines if line.get_linewidth() == 3.5]
    known = result[result.ci_low.notna()]
    assert np.allclose(
        sorted(tuple(line.get_xdata()) for line in thick), sorted(zip(known.ci_low, known.ci_high, strict=True))
    )
    assert "no run is left: 3 diverged" in words and "← better" in words and "difference from base" in words
    left, right = ax.get_xlim()
    assert left < min(0, known["diff"].min()) and right > 0


def test_what_is_written_on_a_forest_lies_inside_it_however_narrow():
    fig = plots.forest(compare(made_up(), "test_bpb", "base", margin=0.01), short=True)
    assert "p = " not in " ".join(texts(fig))
    for size in ((9.2, 2.9), (5.6, 4.0)):
        fig.set_size_inches(*size)
        FigureCanvasAgg(fig).draw()
        written = [fig.axes[0].xaxis.label, *fig.axes[0].texts, *fig.axes[0].get_yticklabels(), *fig.texts]
        edges = [text.get_window_extent() for text in written if text.get_text()]
        assert min(box.x0 for box in edges) >= 0 and max(box.x1 for box in edges) <= fig.bbox.x1 + 1, size


def test_a_grid_says_what_is_missing_and_what_diverged():
    runs = made_up()
    words = texts(plots.heatmap(runs[~((runs.arm == "muon") & (runs.block == "512"))], "block", "arm", "test_bpb"))
    assert words.count("diverged") == 1 and words.count("—") == 1 and "0.0000" not in " ".join(words)


def test_the_front_holds_what_nothing_beats():
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    kept = plots.front(x, y)
    for i in range(50):
        assert kept[i] != any(x[j] <= x[i] and y[j] <= y[i] and (x[j] < x[i] or y[j] < y[i]) for j in range(50))
    assert not plots.front([np.nan, 1], [1, 1])[0]


def test_no_head_of_a_table_is_a_raw_column_name():
    result = compare(made_up(), "test_bpb", "base", margin=0.01)
    frame = result.assign(of_first=0.5, saved_per_million=0.1, p_next=0.2, active_non_embedding_parameters=10)
    heads = plots.table(frame).columns
    assert [head for head in heads if "_" in head] == [] and len(set(heads)) == len(heads)
    assert "active parameters without embeddings" in heads and "nats saved per million parameters" in heads
    assert {row[list(heads).index("metric")] for row in plots.table(frame).rows} == {"test bits per byte"}


def test_one_far_effect_does_not_squeeze_the_others():
    """An effect ten times the others' leaves the frame with an arrow, and its number stands at the side."""
    rows = [
        dict(
            arm=arm,
            baseline="none",
            metric="test_bpb",
            diff=diff,
            ci_low=diff - 0.02,
            ci_high=diff + 0.02,
            p=0.01,
            n=48,
        )
        for arm, diff in dict(optimizer=-0.36, attention=-0.02, norm=0.01, routing=0.015).items()
    ]
    ax = plots.forest(pd.DataFrame(rows)).axes[0]
    left, right = ax.get_xlim()
    assert -0.1 < left < -0.04 and 0.035 < right < 0.1
    assert "off the axis" in texts(ax.figure) and any(text.startswith("−0.3600") for text in texts(ax.figure))
    arrows = [line for line in ax.lines if line.get_marker() == "<"]
    assert len(arrows) == 1 and np.isclose(arrows[0].get_xdata()[0], left)


def test_the_bars_of_an_interaction_are_the_designs_own_error():
    """A third factor's large effect is no error of the two that are drawn: the half-width is the model's."""
    rng = np.random.default_rng(0)
    cells = itertools.product(("ln", "rms"), ("mha", "mla"), ("adamw", "muon"), range(5))
    rows = [
        dict(norm=a, attention=b, optimizer=c, seed=s, status="done", test_bpb=2 - (c == "muon") + rng.normal(0, 0.01))
        for a, b, c, s in cells
    ]
    found = pictures.cell_intervals(pd.DataFrame(rows), "test_bpb", ("norm", "attention"), ["optimizer"])
    assert (found["n"] == 10).all() and found["half"].between(0.003, 0.012).all()
    blind = pictures.cell_intervals(pd.DataFrame(rows), "test_bpb", ("norm", "attention"))
    assert (blind["half"] > 0.2).all()  # the third factor left in


def test_tables_round_and_show_what_is_missing():
    result = compare(made_up(), "test_bpb", "base")
    out = plots.table(result, ["arm", "block", "diff", "p_adj", "verdict"])
    rows = [line.strip("| ").split(" | ") for line in out.splitlines()]
    assert len(rows) == 2 + len(result) and rows[0] == ["arm", "block", "difference", "p (corrected)", "verdict"]
    gone = next(r for r in rows if r[:2] == ["mla", "1024"])
    assert gone[2:4] == ["—", "—"] and gone[4] == "not testable here"
    assert out._repr_markdown_() == out
    means = plots.table(made_up(), ["test_bpb"], by=["arm", "block"])
    assert "| mla | 1024 | — |" in means and "± " in means and "test bits per byte (bits/byte)" in means
    assert [plots.cell(v) for v in (0.0, float("inf"), 3, "a|b", None)] == ["0", "—", "3", "a\\|b", "—"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.loss_curves(made_up_curves(), "test_los"),
        lambda: plots.heatmap(made_up(), "x", "arm", "test_bpb"),
        lambda: plots.table(made_up(), ["nothing"]),
        lambda: plots.loss_curves(made_up_curves(), band="std"),
        lambda: plots.loss_curves(made_up_curves(), block="2048"),
        lambda: pictures.expert_load(np.ones(4)),
        lambda: plots.forest(compare(made_up(), "test_bpb", "base").iloc[:0]),
        lambda: plots.pareto(made_up().assign(test_bpb=np.nan), "step_ms", "test_bpb"),
    ],
)
def test_a_figure_that_cannot_be_drawn_says_why_in_one_line(draw):
    with pytest.raises(StatsError) as e:
        draw()
    assert "\n" not in str(e.value) and len(str(e.value)) > 20


def test_figures_need_no_screen():
    code = (
        "from kimi_nb.stats import power_curve, save; import tempfile; "
        "print(save(power_curve(), tempfile.mkdtemp() + '/p')[0].stat().st_size > 1000)"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")}
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.strip()
        == "True"
    )
