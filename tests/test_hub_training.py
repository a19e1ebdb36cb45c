"""The wrapper under another trainer.

Gradients of one big batch however it is cut, padding on either side, routers that balance, no argument without effect.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from kimi_nb.config import ModelConfig
from kimi_nb.model import KimiModel, update_biases
from kimi_nb.use import HubError, KimiNbConfig, KimiNbForCausalLM, to_deepseek_v3

V, PAD = 40, 0
MLA = dict(kind="mla", kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8)
SIZES = dict(vocab_size=V, n_layers=2, d_model=16, n_heads=2, d_ff=24, max_seq_len=16)
DENSE = ModelConfig(**SIZES, norm=dict(kind="rmsnorm"), attention=MLA, ffn=dict(kind="dense"))
EXPERTS = dict(router="noaux_tc", n_experts=4, d_expert=8, bias_update_speed=0.01)
SPARSE = DENSE.override({"ffn.kind": "moe", **{f"moe.{name}": value for name, value in EXPERTS.items()}})


def texts(lengths, seed=0):
    """Rows of ids; none is the padding."""
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randint(1, V, (n,), generator=drawn) for n in lengths]


def padded(rows, side, first=False):
    """A batch; `first` scores a row's first token too, as whoever copies the ids into the labels does."""
    longest = max(map(len, rows))
    batch = {name: torch.zeros(len(rows), longest, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(rows), longest), -100)
    for i, row in enumerate(rows):
        begin = longest - len(row) if side == "left" else 0
        at = slice(begin, begin + len(row))
        batch["input_ids"][i, at], batch["attention_mask"][i, at] = row, 1
        batch["labels"][i, at] = row
        if not first:
            batch["labels"][i, begin] = -100
    return batch


def trained(model, rows, size, parts, side, folder, steps=1, **more):
    """Weights before minus after `steps` of transformers' Trainer, over the learning rate; and the loss it says."""
    rate = 0.1
    plain = dict(max_grad_norm=0, lr_scheduler_type="constant", optim="sgd", remove_unused_columns=False)
    quiet = dict(report_to=[], use_cpu=True, seed=3, logging_steps=1, save_strategy="no", disable_tqdm=True)
    sizes = dict(per_device_train_batch_size=size, gradient_accumulation_steps=parts, max_steps=steps)
    arguments = TrainingArguments(folder, learning_rate=rate, **sizes, **plain, **quiet)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=lambda part: padded(part, side, **more))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    gradients = {name: (before[name] - p.detach()) / rate for name, p in model.named_parameters()}
    said = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return gradients, said[0]


def true_gradients(config, rows):
    """The mean over all scored tokens of all rows, each row alone and unpadded, by the bare model."""
    model = KimiModel(config, seed=1).train()
    scored = sum(len(row) - 1 for row in rows)
    for row in rows:
        logits = model(row[None]).logits[0, :-1]
        (cross_entropy(logits, row[1:], reduction="sum") / scored).backward()
    return {f"model.{name}": p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "experts"])
def test_accumulated_gradients_are_those_of_one_big_batch(side, config, tmp_path):
    rows = texts([12, 5, 9, 3, 12, 7, 4, 10, 2, 12, 6, 8, 11, 3, 9, 5])
    expected = true_gradients(config, rows)
    losses = []
    for size, parts in ((16, 1), (4, 4), (1, 16)):
        wrapper = KimiNbForCausalLM.of(KimiModel(config, seed=1).train())
        gradients, loss = trained(wrapper, rows, size, parts, side, tmp_path)
        losses.append(loss)
        for name, expected_gradient in expected.items():
            torch.testing.assert_close(gradients[name], expected_gradient, atol=2e-5, rtol=1e-3)
    assert max(losses) - min(losses) < 1e-4


def test_balance_losses_are_accumulated_by_share(tmp_path):
    """A per-sequence balance loss is a mean over sequences: equal however equally long ones are cut."""
    weights = {"moe.seq_loss_weight": 0.5, "moe.aux_loss_weight": 0.0}  # the second is no mean over sequences
    config = DENSE.override(
        {"ffn.kind": "moe", "moe.router": "aux_tc", "moe.n_experts": 4, "moe.d_expert": 8} | weights
    )
    found = []
    for size, parts in ((16, 1), (4, 4), (1, 16)):
        wrapper = KimiNbForCausalLM.of(KimiModel(config, seed=1).train())
        found.append(trained(wrapper, texts([9] * 16), size, parts, "right", tmp_path))
    for gradients, loss in found[1:]:
        assert loss == pytest.approx(found[0][1], abs=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][0][name], atol=2e-5, rtol=1e-3)
    router = [name for name in found[0][0] if name.endswith("gate.weight")]
    without = KimiNbForCausalLM.of(KimiModel(config.override({"moe.seq_loss_weight": 0.0}), seed=1).train())
    plain, _ = trained(without, texts([9] * 16), 16, 1, "right", tmp_path)
    assert any((plain[name] - found[0][0][name]).abs().max() > 1e-4 for name in router)


@pytest.mark.parametrize("labels", ["masked", "ids"])
def test_padding_on_the_left_adds_nothing_to_the_loss(labels):
    model = KimiModel(DENSE, seed=1).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(20)
    wrapper, rows = KimiNbForCausalLM.of(model), texts([3, 7, 9])
    alone = [cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="none") for row in rows]
    for side in ("left", "right"):
        batch = padded(rows, side, first=True)
        if labels == "ids":
            batch["labels"] = batch["input_ids"]
        torch.testing.assert_close(wrapper(**batch).loss, torch.cat(alone).mean())
        torch.testing.assert_close(wrapper(**batch, num_items_in_batch=100).loss, torch.cat(alone).sum() / 100)
        if side == "right" and labels == "masked":
            shifted = torch.full_like(batch["labels"], -100)
            shifted[:, :-1] = batch["labels"][:, 1:]
            torch.testing.assert_close(wrapper(**batch, shift_labels=shifted).loss, torch.cat(alone).mean())


def test_a_hole_in_the_mask_is_no_token():
    model = KimiModel(DENSE, seed=1).eval()
    wrapper, (row,) = KimiNbForCausalLM.of(model), texts([9])
    mask, keep = torch.ones(1, 9, dtype=torch.long), [0, 1, 2, 3, 5, 6, 7, 8]
    mask[0, 4] = 0
    out = wrapper(row[None], attention_mask=mask, labels=row[None])
    logits = model(row[None, keep]).logits
    torch.testing.assert_close(out.logits[:, keep], logits)
    torch.testing.assert_close(out.loss, cross_entropy(logits[0, :-1], row[keep][1:]))


@pytest.mark.parametrize(
    ("argument", "word"),
    [
        (dict(output_hidden_states=True), "output_hidden_states"),
        (dict(output_attentions=True), "output_attentions"),
        (dict(output_router_logits=True), "output_router_logits"),
        (dict(token_type_ids=torch.ones(1, 9, dtype=torch.long)), "token_type_ids"),
        (dict(position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])), "position_ids"),
        (dict(position_ids=torch.arange(5, 14)[None]), "position_ids"),
        (dict(inputs_embeds=torch.zeros(1, 9, 16)), "inputs_embeds"),
        (dict(head_mask=torch.ones(2)), "head_mask"),
    ],
)
def test_an_argument_without_effect_is_refused(argument, word):
    wrapper, (row,) = KimiNbForCausalLM.of(KimiModel(DENSE, seed=1).eval()), texts([9])
    with pytest.raises(HubError, match=word):
        wrapper(row[None], **argument)


def test_an_argument_that_says_what_is_so_anyway_is_taken():
    wrapper, rows = KimiNbForCausalLM.of(KimiModel(DENSE, seed=1).eval()), texts([4, 9])
    batch = padded(rows, "left")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    plain = wrapper(**batch).logits
    more = dict(position_ids=positions, token_type_ids=torch.zeros_like(positions), output_attentions=False)
    assert torch.equal(wrapper(**batch, **more).logits, plain)
    assert torch.equal(wrapper(**batch, logits_to_keep=2).logits, plain[:, -2:])
    assert isinstance(wrapper(**batch, return_dict=False), tuple)


def test_settings_without_effect_are_refused(tmp_path):
    wrapper = KimiNbForCausalLM.of(KimiModel(DENSE, seed=1).eval())
    wrapper.save_pretrained(tmp_path)
    with pytest.raises(HubError, match="attn_implementation"):
        KimiNbForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with pytest.raises(HubError, match="vocab_size 40 is fixed"):
        wrapper.resize_token_embeddings(50)
    wrapper.config.output_hidden_states = True
    with pytest.raises(HubError, match="output_hidden_states"):
        wrapper(texts([3])[0][None])


def biases(model):
    return [moe.gate.e_score_correction_bias.clone() for moe in model.moe_layers().values()]


def test_another_trainers_steps_balance_the_experts(tmp_path):
    """The bias moves once a step, by the loads of all its micro-batches, as our own trainer moves it."""
    rows = texts([9] * 16)
    wrapper = KimiNbForCausalLM.of(KimiModel(SPARSE, seed=1).train())
    trained(wrapper, rows, 4, 4, "right", tmp_path)
    expected = KimiModel(SPARSE, seed=1).train()
    expected(torch.stack(rows))
    update_biases(expected.moe_layers().values())
    assert any(bias.any() for bias in biases(expected))
    for mine, theirs in zip(biases(wrapper.model), biases(expected), strict=True):
        assert torch.equal(mine, theirs)
    assert not any(moe.gate.load_accumulator.any() for moe in wrapper.model.moe_layers().values())


def test_a_plain_loop_balances_the_experts_and_evens_their_load():
    torch.manual_seed(0)
    wrapper = KimiNbForCausalLM.of(KimiModel(SPARSE, seed=1)).train()
    with torch.no_grad():
        for moe in wrapper.model.moe_layers().values():
            moe.gate.weight[0] += 1.0  # one expert draws away from the others
    optimizer = torch.optim.AdamW(wrapper.parameters(), 1e-4)
    for _ in range(5):
        ids = torch.randint(0, V, (4, 16))
        wrapper(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = biases(wrapper.model)
    assert all(bias.any() and bias.abs().max() <= 0.05 + 1e-6 for bias in moved)
    wrapper.eval()
    wrapper(ids, labels=ids)
    optimizer.step()  # nothing was counted since: nothing moves
    assert all(torch.equal(a, b) for a, b in zip(moved, biases(wrapper.model), strict=True))


def test_only_the_model_that_was_trained_moves_and_a_bare_one_is_left_to_its_trainer():
    ids = torch.arange(1, 13)[None]
    trained_one, other = (KimiNbForCausalLM.of(KimiModel(SPARSE, seed=s).train()) for s in (1, 2))
    bare = KimiModel(SPARSE, seed=3).train()
    shell = KimiNbForCausalLM.of(bare)  # as saving makes one, while another trainer has the model
    for model in (trained_one, other):
        model(ids, labels=ids).loss.backward()
    bare(ids).logits.sum().backward()
    for model in (trained_one, bare):
        torch.optim.SGD(model.parameters(), 1e-3).step()
    assert any(bias.any() for bias in biases(trained_one.model))
    assert not any(bias.any() for model in (other.model, bare) for bias in biases(model))
    assert shell.model is bare and all(moe.gate.load_accumulator.any() for moe in bare.moe_layers().values())


def test_an_optimizer_that_is_none_of_torchs_is_said_when_the_model_is_saved(tmp_path):
    ids = torch.arange(1, 13)[None]
    wrapper = KimiNbForCausalLM.of(KimiModel(SPARSE, seed=1).train())
    wrapper(ids, labels=ids).loss.backward()
    with pytest.warns(UserWarning, match="biases have not moved"):
        wrapper.save_pretrained(tmp_path)
    wrapper.balance_routers()
    assert any(bias.any() for bias in biases(wrapper.model))


def test_the_same_gradients_as_a_stock_deepseek(tmp_path):
    rows = texts([12] * 8)
    ours, _ = trained(KimiNbForCausalLM.of(KimiModel(DENSE, seed=1).train()), rows, 2, 4, "right", tmp_path)
    theirs, _ = trained(to_deepseek_v3(KimiModel(DENSE, seed=1).train()), rows, 2, 4, "right", tmp_path)
    for name, gradient in theirs.items():
        mine = ours.get(name if name in ours else f"model.{name}")
        torch.testing.assert_close(mine, gradient, atol=2e-5, rtol=1e-3)


def test_what_looks_further_is_not_trained_here():
    """One line, before anything is computed; scoring works."""
    config = ModelConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=30, max_seq_len=8, mtp_depth=1)
    wrapper = KimiNbForCausalLM(KimiNbConfig(network=config.model_dump(mode="json")))
    ids = torch.arange(16).view(2, 8)
    with pytest.raises(HubError, match=r"^model.mtp_depth 1 is trained by kimi-nb train alone"):
        wrapper.train()(ids, labels=ids)
    assert wrapper.eval()(ids, labels=ids).loss.isfinite()
