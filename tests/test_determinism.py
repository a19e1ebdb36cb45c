"""The same seed on the same machine gives the same bits, whatever the run is made of."""

import contextlib
import json
import os

import pytest
import torch
from tiny import RUN, tiny_run

from kimi_nb.train import TrainError, deterministically, fit

MLA = {
    "model.attention.kind": "mla",
    "model.attention.kv_lora_rank": 8,
    "model.attention.qk_nope_head_dim": 4,
    "model.attention.qk_rope_head_dim": 4,
    "model.attention.v_head_dim": 8,
}
MOE = {"model.ffn.kind": "moe", "model.moe.n_experts": 4, "model.moe.top_k": 2, "model.moe.d_expert": 8}
COMPONENTS = {
    **{
        f"mha {k}": {"model.attention.kind": "mha", "model.attention.implementation": k}
        for k in ("eager", "sdpa", "flash")
    },
    **{f"mla {k}": MLA | {"model.attention.implementation": k} for k in ("eager", "sdpa")},
    "latent tokens": {"model.attention.kind": "latent"},
    **{f"linear {k}": {"model.attention.kind": k} for k in ("kda", "gdn")},
    "qk_norm": {"model.attention.qk_norm": True},
    **{f"norm {k}": {"model.norm.kind": k} for k in ("layernorm", "rmsnorm")},
    **{f"position {k}": {"model.position.kind": k} for k in ("rope", "learned", "nope")},
    **{f"activation {k}": {"model.ffn.activation": k} for k in ("swiglu", "silu", "gelu", "relu", "situ")},
    **{f"router {k}": MOE | {"model.moe.router": k} for k in ("standard", "aux_tc", "noaux_tc", "quantile")},
    "shared expert": MOE | {"model.moe.router": "noaux_tc", "model.moe.n_shared_experts": 1},
    **{f"optimizer {k}": {"train.optimizer.name": k} for k in ("adam", "adamw", "muon", "muonclip")},
    "dropout": {"model.dropout": 0.2},
    "tokens after the next one": {"model.mtp_depth": 1},
    "micro-batches": {"train.micro_batch_size": 1},
    "all of Kimi": MLA
    | MOE
    | {
        "model.norm.kind": "rmsnorm",
        "model.moe.router": "noaux_tc",
        "model.ffn.activation": "swiglu",
        "train.optimizer.name": "muonclip",
        "train.optimizer.qk_clip_threshold": 0.01,
    },
}
CLOCK = {"seconds", "training_seconds", "step_seconds", "tokens_per_second", "peak_memory_mb"}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path_factory.getbasetemp() / "determinism-cache"))
    if torch.cuda.is_initialized():  # by tests before these: what cuBLAS was told is then not asked here
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def told(run, folder, **how):
    """All that a run leaves but times: what the record says, and the weights."""
    record = fit(run, folder, device="cpu", threads=1, progress=False, **how)
    assert record.status == "done" and record.provenance["deterministic"] == (
        how.get("deterministic", False) or torch.are_deterministic_algorithms_enabled()
    )
    return json.dumps([{k: v for k, v in record.metrics.items() if k not in CLOCK}, record.curves]), (
        folder / "checkpoints" / "final" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_same_seed_gives_the_same_bits(component, tmp_path):
    """Two fits of one run agree in every bit of curves, metrics and weights on the CPU.

    For each attention, norm, router, activation, position and optimizer.
    """
    run = tiny_run(train__steps=3, train__save_every=0, train__eval_every=2, train__eval_tokens=64).override(
        COMPONENTS[component]
    )
    first = told(run, tmp_path / "a")
    assert told(run, tmp_path / "b") == first
    assert told(run.override({"seed": 1}), tmp_path / "c")[1] != first[1], "the seed changes nothing"


def test_every_kind_there_is_is_among_them():
    """A kind that is added to the configuration must be added here too."""
    from typing import get_args

    from kimi_nb.config import RunConfig

    seen = [tiny_run().override(c) for c in COMPONENTS.values()]
    choose = lambda part, name: set(get_args(type(part).model_fields[name].annotation))
    at = lambda run: {
        "attention.kind": run.model.attention,
        "norm.kind": run.model.norm,
        "position.kind": run.model.position,
        "moe.router": run.model.moe,
        "ffn.activation": run.model.ffn,
        "optimizer.name": run.train.optimizer,
    }
    for name, part in at(RunConfig()).items():
        field = name.partition(".")[2]
        assert choose(part, field) == {getattr(at(r)[name], field) for r in seen}, name


FILLED = "torch.utils.deterministic.fill_uninitialized_memory"


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_deterministic_switch_refuses_nothing_and_changes_nothing_on_the_cpu(component, tmp_path, monkeypatch):
    """Every component trains under the deterministic switch and reads no memory that nobody wrote.

    On the CPU it gives the bits that it gives without the switch.
    """
    run = tiny_run(train__steps=3, train__save_every=0, train__eval_every=2, train__eval_tokens=64).override(
        COMPONENTS[component]
    )
    without = told(run, tmp_path / "a")
    assert told(run, tmp_path / "b", deterministic=True) == without
    with deterministically():  # and with NaN in every new tensor
        monkeypatch.setattr(FILLED, True)
        monkeypatch.setattr("kimi_nb.train.loop.deterministically", lambda *_: contextlib.nullcontext())
        assert torch.isnan(torch.empty(8)).all() and told(run, tmp_path / "c") == without


def switches():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        os.environ.get("KIMI_NB_DETERMINISTIC"),
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuBLAS's setting stays where CUDA has read it")
def test_the_deterministic_switch_is_put_back(monkeypatch):
    """What the switch found it leaves, after an error too."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "odd")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    torch.use_deterministic_algorithms(False)
    before = switches()
    with pytest.raises(KeyError), deterministically():
        assert switches() == (True, False, False, False, ":4096:8", "1")
        with deterministically():
            pass
        assert switches() == (True, False, False, False, ":4096:8", "1")
        raise KeyError
    assert switches() == before
    with deterministically(False):
        assert switches() == before


def test_an_operation_without_a_deterministic_form_is_named():
    """One line says which operation it is, and other errors stay what they are."""
    with (
        pytest.raises(
            TrainError,
            match=r"^put_ has no deterministic form: "
            r"choose another setting, or train without the deterministic switch$",
        ),
        deterministically(),
    ):
        torch.zeros(4).put_(torch.tensor([0]), torch.tensor([1.0]))
    with pytest.raises(RuntimeError, match="something else"), deterministically():
        raise RuntimeError("something else")


def test_cuda_in_use_before_the_switch_is_said(monkeypatch):
    """Where cuBLAS may have been started without its setting, the run is refused before anything is written."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with (
        pytest.raises(TrainError, match="CUDA was in use before CUBLAS_WORKSPACE_CONFIG was set: set it to :4096:8"),
        deterministically(),
    ):
        pass
    with deterministically(device="cpu"):  # which has no need of it, and does not pretend that it was told
        assert torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministically():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_the_record_says_whether_every_step_was_deterministic(tmp_path):
    """A run that went on without the switch is not called deterministic, nor is one that had it only at the end."""

    def stop(step, line):
        if step == 6:
            raise KeyboardInterrupt

    run, said = tiny_run(), {}
    for first in (True, False):
        for then in (True, False):
            folder = tmp_path / f"{first}{then}"
            with pytest.raises(KeyboardInterrupt):
                fit(run, folder, device="cpu", threads=1, progress=False, on_step=stop, deterministic=first)
            said[first, then] = fit(
                run, folder, device="cpu", threads=1, progress=False, deterministic=then
            ).provenance["deterministic"]
    assert said == {(True, True): True, (True, False): False, (False, True): False, (False, False): False}


@pytest.mark.parametrize("executor", ["process", "inprocess"])
def test_workers_follow_the_switch(executor, tmp_path):
    """Runs of worker processes and of this one are trained under the switch, with the ids that they have without it."""
    from kimi_nb.runner import run_study
    from kimi_nb.study import Arm, Store, Study

    study = Study(
        name="one", base=tiny_run(train__steps=2, train__eval_every=0), baseline="a", seeds=(0,), arms=[Arm("a")]
    )
    with deterministically():
        record = run_study(study, Store(tmp_path), executor, workers=1, device="cpu", progress=False)[0]
    assert (
        record.status == "done" and record.provenance["deterministic"] and record.run_id == study.expand()[0].run.run_id
    )


def test_the_command_line_switches(tmp_path, monkeypatch):
    """`kimi-nb train --deterministic` trains under the switch and leaves none of it behind."""
    from kimi_nb.cli import main
    from kimi_nb.study import Record

    before, settings = (
        switches(),
        [f"--{k}={v}" for k, v in (RUN | {"train.steps": 2, "train.eval_every": 0, "train.save_every": 0}).items()],
    )
    for extra in ([], ["--deterministic"]):
        folder = tmp_path / f"out{len(extra)}"
        assert main(["train", "--out", str(folder), "--device", "cpu", "--quiet", *settings, *extra]) == 0
        assert Record.from_json((folder / "result.json").read_text(), "").provenance["deterministic"] == bool(extra)
    assert switches() == before


def test_ray_nodes_are_told(tmp_path, monkeypatch):
    """A node has an environment of its own: the task itself says that the switch is on."""
    from kimi_nb.runner import pool as runner
    from kimi_nb.study import Arm, Store, Study

    @contextlib.contextmanager
    def cluster(*_):
        yield "a cluster", 1, 0, 1

    def elsewhere(ray, jobs, task, *_, **__):
        monkeypatch.delenv("KIMI_NB_DETERMINISTIC", raising=False)
        torch.use_deterministic_algorithms(False)
        for key, how in jobs.items():
            yield key, "done", task(*how)

    monkeypatch.setattr(runner, "_cluster", cluster)
    monkeypatch.setattr(runner, "spread", elsewhere)
    said = []
    for on in (True, False):
        study = Study(
            name="one", base=tiny_run(train__steps=2, train__eval_every=0), baseline="a", seeds=(0,), arms=[Arm("a")]
        )
        with deterministically(on):
            said.append(
                runner.run_study(study, Store(tmp_path / str(on)), "ray", device="cpu", progress=False)[0].provenance[
                    "deterministic"
                ]
            )
    assert said == [True, False]


def test_flash_attn_is_told():
    """PyTorch's switch does not reach the flash-attn package: its own argument is given, and only then."""
    from kimi_nb.model import call_flash_attn

    seen = []

    def stand_in(q, k, v, **how):
        seen.append(how.get("deterministic", False))
        return q

    tensors = [torch.ones(1, 1, 2, 4)] * 3
    call_flash_attn(stand_in, *tensors, 1.0, True)
    with deterministically():
        call_flash_attn(stand_in, *tensors, 1.0, True)
    assert seen == [False, True]


def test_spread_sees_a_difference(monkeypatch):
    """The measurement of repeats is 0 for equal bits, and not for others."""
    from kimi_nb.bench import step as repeats

    run, real, seeds = tiny_run(train__steps=2, train__eval_every=0, train__save_every=0), repeats.fit, iter((0, 0, 1))
    zero = repeats.repeat_spread(run, 2, "cpu", True, threads=1)
    assert (zero["loss"], zero["weight"], zero["steps"]) == (0.0, 0.0, 2)
    monkeypatch.setattr(repeats, "fit", lambda run, *a, **k: real(run.override({"seed": next(seeds)}), *a, **k))
    other = repeats.repeat_spread(run, 3, "cpu", threads=1)
    assert other["loss"] > 0 and other["weight"] > 0 and other["steps"] == 0


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: kimi-nb bench --only repeats measures it on one"
)
@pytest.mark.parametrize(
    "component", ["mla sdpa", "latent tokens", "router noaux_tc", "optimizer muonclip", "dropout", "all of Kimi"]
)
def test_the_switch_gives_the_same_bits_on_a_gpu(component, record_property):
    """With the switch repeats on a GPU differ in no bit; how far they differ without is reported."""
    from kimi_nb.bench import spread_with_and_without

    on, off = spread_with_and_without(
        tiny_run(train__steps=20, train__save_every=0, train__eval_every=0, train__batch_size=32).override(
            COMPONENTS[component]
        ),
        3,
        "cuda",
    )
    print(f"{component}: without the switch {off}")
    record_property("without", str(off))
    assert on["loss"] == on["weight"] == 0.0
