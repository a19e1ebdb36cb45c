"""A workplace small enough for tests: runs of milliseconds, notebooks of two cells, processes that start at once."""

import functools
import multiprocessing
import os
import time
from pathlib import Path

import nbformat

RUN = {
    "model.d_model": 16, "model.n_layers": 1, "model.n_heads": 2, "model.d_ff": 32, "model.max_seq_len": 32,
    "data.corpus": "tinyworld", "data.tokenizer": "byte", "data.num_documents": 60,
    "train.batch_size": 4, "train.steps": 12, "train.eval_every": 6, "train.eval_tokens": 256, "train.test_tokens": 256,
    "train.save_every": 3, "train.lr": 1e-3, "train.warmup_steps": 0,
}  # fmt: skip

SETTINGS = (
    "[tiny]\nbudget_minutes = 1\nmax_epochs = 1000\nseeds = 2\nmodel.attention.kv_lora_rank = 8\n"
    "model.attention.qk_nope_head_dim = 4\nmodel.attention.qk_rope_head_dim = 4\nmodel.attention.v_head_dim = 8\n"
    "model.moe.d_expert = 16\n"
)
PHASES = {"baseline": "01_baseline", "norm": "03_norm"}


def tiny_run(**changes):
    """A run of 12 steps; `train__steps=40` changes a setting."""
    from kimi_nb.config import RunConfig

    return RunConfig().override(RUN | {k.replace("__", "."): v for k, v in changes.items()})


def settings_text(**changes):
    """settings.ini with the one profile `tiny`."""
    values = RUN | {k.replace("__", "."): v for k, v in changes.items()}
    grids = {"baseline.train.steps": f"0, 2, {values['train.steps']}", "norm.train.lr": values["train.lr"]}
    return SETTINGS + "".join(f"{k} = {v}\n" for k, v in (values | grids).items())


def write_notebook(path, cells, tags=("parameters",)):
    """A notebook of code cells, the first of them tagged."""
    made = [
        nbformat.v4.new_code_cell(text, metadata=dict(tags=list(tags)) if i == 0 else {})
        for i, text in enumerate(cells)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=made, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
        ),
        path,
    )
    return path


def phase_cells(phase, then=""):
    """Parameters, and the outcome; `then` comes before it."""
    finding = "Finding(id='RQ0', claim='It runs.', word='supported', reason='It ran.')"
    return [
        "profile = 'tiny'\nresults = ''\nseeds = 0",
        f"{then}\nfrom kimi_nb.config import load_profile\nfrom kimi_nb.study import Finding, Store, record_outcome\n"
        f"record_outcome(Store(results), '{phase}', load_profile(profile), [{finding}])",
    ]


class Workplace:
    """A folder with settings.ini, phase notebooks and a results folder that `kimi-nb` takes for a checkout."""

    def __init__(self, path, phases=tuple(PHASES), **changes):
        self.path, self.results = Path(path), Path(path) / "results"
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "settings.ini").write_text(settings_text(**changes))
        for phase in phases:
            self.phase(phase)

    def phase(self, name, then="", cells=None, tags=("parameters",)):
        """(Re)write a phase's notebook."""
        return write_notebook(
            self.path / "nbs" / "phases" / f"{PHASES[name]}.ipynb", cells or phase_cells(name, then), tags
        )

    def environment(self):
        return {"KIMI_NB_SETTINGS": str(self.path / "settings.ini"), "KIMI_NB_RESULTS": str(self.results)}


def in_process(notebook, target, parameters, cwd):
    """What papermill does, without a kernel: for tests of everything else."""
    from papermill.exceptions import PapermillExecutionError

    nb, space = nbformat.read(notebook, as_version=4), {}
    nb.cells.insert(1, nbformat.v4.new_code_cell("\n".join(f"{k} = {v!r}" for k, v in parameters.items())))
    try:
        for i, cell in enumerate(nb.cells, 1):
            try:
                exec(cell.source, space)
            except Exception as e:
                raise PapermillExecutionError(i, i, cell.source, type(e).__name__, str(e), []) from None
    finally:
        nbformat.write(nb, target)


@functools.cache
def forks():
    """Processes that are forked from one that has imported torch: each starts in milliseconds."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(
        ["kimi_nb.train.loop", "kimi_nb.runner.pool", "kimi_nb.study.store", "kimi_nb.plan.run"]
    )
    return server


def start(target, *args):
    """A forked process, running."""
    process = forks().Process(target=_with_environment, args=(target, dict(os.environ), *args))
    process.start()
    return process


def _with_environment(target, environment, *args):
    os.environ.update(environment)
    target(*args)


def wait_until(condition, seconds=60.0, what="it"):
    """Poll; a test fails when it takes too long."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.01)
    return found


def hang(store, study, arm):
    """Every run of an arm will stand still when it starts: it waits for a checkpoint's file that nobody writes."""
    for p in study.expand():
        if p.arm == arm:
            folder = store.begin(p.run, f"{p.study}-{p.arm}-s{p.seed}") / "checkpoints" / "step_00000001"
            folder.mkdir(parents=True)
            os.mkfifo(folder / "state.json")
