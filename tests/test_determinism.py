"""The same seed on the same machine gives the same bits, whatever the run is made of."""

import json

import pytest
from tiny import tiny_run

from kimi_nb.train import fit

MLA = {"model.attention.kind": "mla", "model.attention.kv_lora_rank": 8, "model.attention.qk_nope_head_dim": 4, "model.attention.qk_rope_head_dim": 4, "model.attention.v_head_dim": 8}
MOE = {"model.ffn.kind": "moe", "model.moe.n_experts": 4, "model.moe.top_k": 2, "model.moe.d_expert": 8}
COMPONENTS = {
    **{f"mha {k}": {"model.attention.kind": "mha", "model.attention.implementation": k} for k in ("eager", "sdpa", "flash")},
    **{f"mla {k}": MLA | {"model.attention.implementation": k} for k in ("eager", "sdpa")},
    "latent tokens": {"model.attention.kind": "latent"},
    "qk_norm": {"model.attention.qk_norm": True},
    **{f"norm {k}": {"model.norm.kind": k} for k in ("layernorm", "rmsnorm")},
    **{f"position {k}": {"model.position.kind": k} for k in ("rope", "learned")},
    **{f"activation {k}": {"model.ffn.activation": k} for k in ("swiglu", "silu", "gelu", "relu")},
    **{f"router {k}": MOE | {"model.moe.router": k} for k in ("standard", "aux_tc", "noaux_tc")},
    "shared expert": MOE | {"model.moe.router": "noaux_tc", "model.moe.n_shared_experts": 1},
    **{f"optimizer {k}": {"train.optimizer.name": k} for k in ("adam", "adamw", "muon", "muonclip")},
    "dropout": {"model.dropout": 0.2},
    "micro-batches": {"train.micro_batch_size": 1},
    "all of Kimi": MLA | MOE | {"model.norm.kind": "rmsnorm", "model.moe.router": "noaux_tc", "model.ffn.activation": "swiglu", "train.optimizer.name": "muonclip", "train.optimizer.qk_clip_threshold": 0.01},
}
CLOCK = {"seconds", "training_seconds", "step_seconds", "tokens_per_second", "peak_memory_mb"}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("KIMI_NB_CACHE", str(tmp_path_factory.getbasetemp() / "determinism-cache"))


def told(run, folder):
    """All that a run leaves but times: what the record says, and the weights."""
    record = fit(run, folder, device="cpu", threads=1, progress=False)
    assert record.status == "done"
    return json.dumps([{k: v for k, v in record.metrics.items() if k not in CLOCK}, record.curves]), (folder / "checkpoints" / "final" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_same_seed_gives_the_same_bits(component, tmp_path):
    """Two fits of one run agree in every bit of curves, metrics and weights on the CPU, for each attention, norm, router, activation, position and optimizer."""
    run = tiny_run(train__steps=3, train__save_every=0, train__eval_every=2, train__eval_tokens=64).override(COMPONENTS[component])
    first = told(run, tmp_path / "a")
    assert told(run, tmp_path / "b") == first
    assert told(run.override({"seed": 1}), tmp_path / "c")[1] != first[1], "the seed changes nothing"


def test_every_kind_there_is_is_among_them():
    """A kind that is added to the configuration must be added here too."""
    from typing import get_args

    from kimi_nb.config import RunConfig

    seen = [tiny_run().override(c) for c in COMPONENTS.values()]
    choose = lambda part, name: set(get_args(type(part).model_fields[name].annotation))
    at = lambda run: {"attention.kind": run.model.attention, "norm.kind": run.model.norm, "position.kind": run.model.position, "moe.router": run.model.moe, "ffn.activation": run.model.ffn, "optimizer.name": run.train.optimizer}
    for name, part in at(RunConfig()).items():
        field = name.partition(".")[2]
        assert choose(part, field) == {getattr(at(r)[name], field) for r in seen}, name
