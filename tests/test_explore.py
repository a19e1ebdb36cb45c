"""Explorers: what they show is the model's, weights are found, the playground writes while the notebook is free."""

import html
import re
import sys
import threading
import time

import numpy as np
import pytest
import torch
from tiny import tiny_run

from kimi_nb.config import KimiError, ModelConfig
from kimi_nb.data import ByteTokenizer
from kimi_nb.lab import (
    ALL,
    EXPLORERS,
    Subject,
    explorer_pictures,
    explorers,
    matrices,
    next_token,
    playground,
    rope_explorer,
    routed_text,
    routes,
    samples_html,
    singular_values,
    trained_runs,
    training_change,
)
from kimi_nb.model import Decoder, KimiModel
from kimi_nb.runner import run_one
from kimi_nb.study import Store
from kimi_nb.use import Generator, Sampling

MLA = dict(kind="mla", kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A run with experts, a dense run with learned positions, and one whose weights are gone."""
    store = Store(tmp_path_factory.mktemp("store"))
    runs = [
        tiny_run(model__ffn__kind="moe", model__moe__n_experts=4, train__eval_every=0),
        tiny_run(model__position__kind="learned", train__eval_every=0),
        tiny_run(seed=3, train__eval_every=0),
    ]
    for run, name in zip(runs, ("moe-s0", "dense-s0", "gone-s3"), strict=True):
        run_one(run, store, name)
    (store.folder(runs[2].run_id) / "checkpoints" / "final" / "state.json").unlink()
    return store


@pytest.fixture
def subject():
    """A random model with experts, latent attention and opinions."""
    model = KimiModel(
        ModelConfig(
            d_model=32,
            n_layers=2,
            n_heads=2,
            vocab_size=257,
            max_seq_len=64,
            attention=MLA,
            ffn=dict(kind="moe"),
            moe=dict(router="noaux_tc", n_experts=4, n_shared_experts=1, d_expert=16),
            first_dense_layers=1,
        )
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(5)
    return Subject(model, ByteTokenizer(), tiny_run(), "random")


def shown(box):
    """The open tab's explorer."""
    return box.tabs.children[box.tabs.selected_index].children[0]


# --- what is drawn -----------------------------------------------------------------------------------------------


def test_the_coloured_text_is_the_routers_decision(subject):
    """Every token's experts and weights, computed a second time from the layer's own input."""
    text, moe, seen = "The cat <b>sat</b>", subject.model.layers[1].mlp, {}
    hook = moe.register_forward_pre_hook(lambda module, args: seen.update(x=args[0].detach()))
    table = routes(subject.model, subject.tokenizer, text)
    hook.remove()
    scores = torch.sigmoid(
        seen["x"][0].double() @ moe.gate.weight.detach().double().T
    )  # (T, E); the correction bias of an untrained router is 0
    best = scores.topk(2, dim=-1)
    first = table[table["slot"] == 0]
    assert set(table["layer"]) == {1} and first["expert"].tolist() == best.indices[:, 0].tolist()
    np.testing.assert_allclose(first["weight"], (best.values[:, 0] / best.values.sum(-1)).numpy(), rtol=1e-4)
    page = routed_text(table, 4)
    assert page.count("&lt;") == page.count("&gt;") == 2 and re.sub(
        r"<[^>]+>", "", re.sub(r"<sub.*?</sub>", "", html.unescape(page.split("</div><div>")[1]))
    ).startswith("The cat ")
    with pytest.raises(KimiError, match="layer 0 has no experts: one of 1"):
        routed_text(table, 4, 0)


def test_spectra_are_numpys_and_begin_at_nothing(subject):
    values, groups = singular_values(subject.model.state_dict()), matrices(subject.model.state_dict())
    assert (
        len(groups["feed-forward in"]) == 2 + 4 + 2
    )  # gate and up of the dense layer, four experts of both in one, the shared expert
    for kind, members in groups.items():
        widths = [min(m.shape) for _, m in members]
        mine = [
            np.linalg.svd(m.double().numpy(), compute_uv=False)
            for _, m in members
            if min(m.shape) == max(set(widths), key=widths.count)
        ]
        np.testing.assert_allclose(values[kind], mine, rtol=2e-3, atol=1e-4)
    untouched = KimiModel(subject.model.config, seed=5)
    assert singular_values(training_change(untouched, tiny_run(seed=5))) == {} and singular_values(
        training_change(untouched, tiny_run(seed=6))
    )


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.5),
        dict(top_k=5),
        dict(top_p=0.6, temperature=1.3),
        dict(repetition_penalty=1.5, top_k=20),
        dict(temperature=0),
    ],
)
def test_the_sampling_picture_is_what_the_generator_draws_from(subject, options):
    _, q, _ = next_token(subject.model, subject.tokenizer, "The cat", **options)
    g = Generator(subject.model, subject.tokenizer)
    drawn = np.zeros(257)
    for row in range(300):
        asked = Sampling(max_new_tokens=1, seed=row, **options)
        rows = g._rows(["The cat"], asked)
        drawn[int(g._next(Decoder(subject.model), torch.tensor([rows[0].ids]), None, rows, asked))] += 1 / 300
    assert abs(q.sum() - 1) < 1e-4 and not drawn[q == 0].any() and np.abs(drawn - q).max() < 0.1


def test_pictures_need_no_widgets(subject, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    pictures = explorer_pictures(subject)
    assert {"Attention by layer and head", "Experts of every token", "RoPE's clocks"} <= set(pictures) and all(
        isinstance(p, str) or p.axes for p in pictures.values()
    )
    assert "&lt;i&gt;" in samples_html(subject.model, subject.tokenizer, "<i>", [{}], 3)


# --- the widgets -------------------------------------------------------------------------------------------------


def test_runs_with_weights_are_offered_and_every_tab_opens(store):
    assert [label.split(" · ")[0] for label in trained_runs(store)] == ["dense-s0", "moe-s0"]
    box = explorers(store)
    for label in list(trained_runs(str(store.path))):
        box.pick.value = label
        assert label in html.unescape(box.message.value)
        for i, name in enumerate(EXPLORERS):
            box.tabs.selected_index = i
            view = shown(box)
            if label.startswith("dense") and name == "Experts":
                assert "has no experts" in view.value
            else:
                assert view.message.value == "", (label, name)


def test_a_tab_is_made_when_it_is_opened(store, monkeypatch):
    made = []
    for name in list(EXPLORERS):
        monkeypatch.setitem(EXPLORERS, name, lambda s, name=name: made.append(name) or rope_explorer(None))
    box = explorers(store, "RoPE")
    assert made == ["RoPE"]
    box.tabs.selected_index = 0
    box.tabs.selected_index = 4
    assert made == ["RoPE", "Attention"]


def test_a_control_redraws_and_a_refusal_is_said_in_its_place(subject):
    box = explorers(subject)
    view = shown(box)
    before = view.picture.children[0].value
    view.controls["layer"].value = 1
    after = view.picture.children[0].value
    assert before != after and before[:4] == b"\x89PNG"
    view.controls["head"].value = 1
    one = view.picture.children[0].value
    view.controls["layer"].value = ALL
    assert len({before, after, one, view.picture.children[0].value}) == 4  # no choice changes nothing
    view.controls["text"].value = "long " * 50
    assert "the model reads 2 to 64" in view.message.value and view.picture.children == ()
    view.controls["text"].value, view.controls["layer"].value = "short", ALL
    assert view.message.value == "" and view.picture.children


def test_a_damaged_checkpoint_is_said_and_the_rest_goes_on(store, tmp_path):
    import shutil

    shutil.copytree(store.path, tmp_path / "copy")
    copy = Store(tmp_path / "copy")
    label, folder = next(iter(trained_runs(copy).items()))
    (folder / "checkpoints" / "final" / "model.safetensors").write_bytes(b"nothing")
    box = explorers(copy)
    assert box.pick.value == label and "is damaged or was altered" in box.message.value
    box.pick.value = list(trained_runs(copy))[1]
    assert "damaged" not in box.message.value and shown(box).picture.children


def test_the_playground_writes_while_the_notebook_is_free(subject, monkeypatch):
    go_on, stream = threading.Event(), Generator.stream
    monkeypatch.setattr(
        Generator, "stream", lambda self, prompt, **o: (go_on.wait(30) and piece for piece in stream(self, prompt, **o))
    )
    play = playground(subject)
    play.controls["max_new_tokens"].value, play.controls["prompt"].value = 40, "The cat"
    play.write()
    assert play.thread.is_alive() and play.text == "" and play.controls["go"].disabled  # it waits, and we are here
    go_on.set()
    play.thread.join(60)
    assert play.text == Generator(subject.model, subject.tokenizer).generate_text(
        "The cat", 40, temperature=0.8, seed=0
    )
    assert "tokens in" in play.message.value and not play.controls["go"].disabled and play.controls["stop"].disabled


def test_the_playground_stops_when_asked_and_says_what_is_wrong(subject, monkeypatch):
    monkeypatch.setattr(Generator, "stream", lambda self, prompt, **o: (time.sleep(0.01) or "x" for _ in range(2000)))
    play = playground(subject)
    play.write()
    time.sleep(0.2)
    play.halt()
    play.thread.join(10)
    assert 0 < len(play.text) < 1000 and "stopped" in play.message.value
    monkeypatch.setattr(
        Generator,
        "stream",
        lambda self, prompt, **o: (_ for _ in ()).throw(KimiError("the model's logits are not numbers")),
    )
    play.write()
    play.thread.join(10)
    assert "are not numbers" in html.unescape(play.message.value) and not play.controls["go"].disabled


def test_without_a_store_there_is_rope_and_a_model_to_train(monkeypatch, subject):
    monkeypatch.setattr(Subject, "example", classmethod(lambda cls, **changes: time.sleep(0.2) or subject))
    box = explorers(None)
    assert "Choose a model" in shown(box).value
    box.tabs.selected_index = 4
    assert shown(box).picture.children
    box.tabs.selected_index = 0
    box.pick.value = box.pick.options[-1]
    box.thread.join(30) if box.thread else None
    assert box.subject is subject and shown(box).picture.children
