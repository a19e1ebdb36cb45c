"""Loss by position past the trained length: every attention and mixed patterns; equal where nothing may differ."""

import numpy as np
import pytest
import torch

from kimi_nb.config import KimiError, ModelConfig
from kimi_nb.evals import loss_by_position
from kimi_nb.model import KimiModel

TINY = ModelConfig(vocab_size=50, d_model=16, n_layers=2, n_heads=2, max_seq_len=16)
MLA = {
    "attention.kv_lora_rank": 6,
    "attention.qk_nope_head_dim": 4,
    "attention.qk_rope_head_dim": 4,
    "attention.v_head_dim": 8,
}
NETWORKS = {
    "mha, rotated": {},
    "mha, no positions": {"position.kind": "nope"},
    "mla": {"attention.kind": "mla"} | MLA,
    "latent": {"attention.kind": "latent", "attention.n_latents": 2, "attention.chunk_size": 4},
    "kda": {"attention.kind": "kda"},
    "gdn": {"attention.kind": "gdn"},
    "kda and mla": {"attention.pattern": "kda,mla", "position.kind": "nope"} | MLA,
    "gdn and mha": {"attention.pattern": "gdn,mha", "position.kind": "nope"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_long_window_agrees_with_decoding_and_begins_as_a_short_one(name):
    """Up to the trained length as in a short window; at every position the loss of decoding token by token."""
    model = KimiModel(TINY.override(NETWORKS[name]), seed=3).eval()
    text = np.random.default_rng(1).integers(0, 50, 65)
    short, long = (loss_by_position(model, text, length, span=64, n_spans=1) for length in (16, 64))
    np.testing.assert_allclose(long[:16], short[:16], atol=2e-5)
    assert np.abs(long - short)[16:].max() > 1e-4
    ids, cache, one_by_one = torch.from_numpy(text)[None], model.make_cache(1, 64), []
    for i in range(64):
        logits = model(ids[:, i : i + 1], cache=cache).logits[0, -1]
        one_by_one.append(-logits.log_softmax(-1)[ids[0, i + 1]].item())
    np.testing.assert_allclose(long, one_by_one, atol=2e-5)


def test_learned_positions_say_where_they_end():
    """A table of positions has no entry past its end."""
    model = KimiModel(TINY.override({"position.kind": "learned"}), seed=0)
    with pytest.raises(KimiError, match="max_seq_len 16"):
        loss_by_position(model, np.arange(40), 32, span=32, n_spans=1)
