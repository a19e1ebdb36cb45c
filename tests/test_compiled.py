"""Every arm of every phase: a layer is one graph, compiled before the first step, and a step waits for a GPU once."""

import json
import pkgutil
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import kimi_nb.phases
from kimi_nb.config import load_profile
from kimi_nb.data import prepare
from kimi_nb.plan import phase_studies
from kimi_nb.runner import distinct
from kimi_nb.study import asked_for
from kimi_nb.train import Trainer, muon

CPU = torch.device("cpu")
SMALL = {
    "data.corpus": "tinyworld",
    "data.tokenizer": "byte",
    "data.num_documents": 200,
    "data.max_tokens": None,
    "model.vocab_size": None,
    "train.batch_size": 2,
    "train.micro_batch_size": "auto",
    "train.eval_tokens": 512,
    "train.compile": True,
}
STEPS = 20
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "aten.equal", "unique")


def kind_of(run):
    """All that chooses a path through a step: words, switches, and numbers that are there or not."""
    asleep, found = run.dormant(), dict(asked_for(run))
    for path, value in run.flat().items():
        if path.startswith(("model.", "train.optimizer.", "train.grad_clip")) and path not in asleep:
            found[path] = value if isinstance(value, (str, bool)) else bool(value)
    return json.dumps(found, sort_keys=True)


def arms():
    """Phase and label of the first arm of its kind -> its run, over all phases of `quick`, asked for or not."""
    profile, found = load_profile("quick"), {}
    for module in pkgutil.iter_modules(kimi_nb.phases.__path__):
        studies = phase_studies(profile, (module.name,))
        for planned in distinct(study for group in studies.values() for study in group):
            if planned.run.train.steps:
                found.setdefault(kind_of(planned.run), (f"{module.name}/{planned.arm}", planned.run))
    return dict(found.values())


class Heard(TorchDispatchMode):
    """Operators for which a GPU's host would wait, asked by the code of a step, PyTorch's optimizers apart."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in WAITS) and "/torch/optim/" not in asked_by():
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def asked_by():
    """The file nearest to this call that is this package's or an optimizer's."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/kimi_nb/" in name or "/torch/optim/" in name:
            return name
        frame = frame.f_back
    return ""


def waits_of(run, data, monkeypatch):
    """What the host would wait for in one eager step: operators, and numbers that this package's code reads."""
    trainer, heard = Trainer(run.override({"train.compile": False}), data, CPU), Heard()
    with monkeypatch.context() as patch:
        for name in READS:
            real = getattr(torch.Tensor, name)

            def read(self, *args, _real=real, _name=name, **how):
                if "/kimi_nb/" in sys._getframe(1).f_code.co_filename:
                    heard.found.append(_name)
                return _real(self, *args, **how)

            patch.setattr(torch.Tensor, name, read)
        with heard:
            trainer.step(0)
    return heard.found


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The product of experts that bf16 on CUDA takes for every width: grouped, odd widths lengthened by zeros."""
    grouped = lambda device, dtype, d_model, width, lengthens=False: "grouped"
    monkeypatch.setattr("kimi_nb.model.experts.expert_backend", grouped)


def trained(run, data):
    """Graphs of a compiled run when it is warm, and after 20 steps with an evaluation between."""
    torch._dynamo.reset()
    counters.clear()
    trainer = Trainer(run, data, CPU)
    trainer.warm_up()
    warm = counters["stats"]["unique_graphs"]
    for step in range(STEPS):
        trainer.step(step)
        if step == STEPS // 2:
            trainer.evaluate("val")
    return warm, counters["stats"]["unique_graphs"]


@pytest.fixture
def whole_layers(monkeypatch):
    """Layers compiled as a run compiles them, a break an error, without a code generator; Newton-Schulz as it is."""
    real = nn.Module.compile
    how = dict(backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(nn.Module, "compile", lambda module, **asked: real(module, **asked, **how))
    monkeypatch.setattr(muon, "_compiled", lambda: muon.newton_schulz)
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_every_arm_of_every_phase_compiles_whole_and_once(whole_layers, as_on_a_gpu, monkeypatch):
    """Twenty steps of changing batches and an evaluation add no graph to the first step's; a step waits once."""
    wrong, data = {}, {}
    for name, asked in arms().items():
        run = asked.override(SMALL)
        if run.seq_len not in data:
            data[run.seq_len] = prepare(run.data, run.seq_len)
        try:
            warm, end = trained(run, data[run.seq_len])
            waits = waits_of(run, data[run.seq_len], monkeypatch)
        except Exception as e:
            wrong[name] = f"{type(e).__name__}: {str(e)[:300]}"
            continue
        if not 1 <= warm <= run.model.n_layers or end != warm or waits != ["tolist"]:
            wrong[name] = dict(warm=warm, end=end, waits=waits)
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["combined/attention+norm+optimizer", "combined/routing"])
def test_what_the_code_generator_makes_learns_the_same(arm, as_on_a_gpu, monkeypatch):
    """By the compiler that a run uses: losses of eager steps, and no graph after the first step's."""
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **asked: real(module, **asked, fullgraph=True))
    monkeypatch.setattr(muon, "_compiled", lambda: muon.newton_schulz)
    run = arms()[arm].override(SMALL)
    assert run.model.ffn.kind == "moe"
    data = prepare(run.data, run.seq_len)
    torch._dynamo.reset()
    counters.clear()
    compiled, eager = (Trainer(run.override({"train.compile": on}), data, CPU) for on in (True, False))
    compiled.warm_up()
    for step in range(6):
        assert compiled.step(step)["train_loss"] == pytest.approx(eager.step(step)["train_loss"], abs=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
