import logging
import math
import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import cases
from support.models import renderer_of, tiny_llama, with_lora
from support.training_examples import adapted, encoded, gradients

from guardloop.core.errors import GuardLoopError
from guardloop.guard.inference.forward import label_logits
from guardloop.guard.prompt.verdict import LabelTokens, label_tokens
from guardloop.training import trainer as trainer_module
from guardloop.training.examples import Encoded
from guardloop.training.fit import WARMUP, batches, fit, rate_at
from guardloop.training.loss import batch_loss, label_losses
from guardloop.training.packs import Packs
from guardloop.training.settings import TrainingSettings
from guardloop.training.trainer import MAX_GRAD_NORM, Learner, Trainer, ValidationResult, label_states
from guardloop.training.watch import flops_per_token

PROPERTY = settings(max_examples=cases(60), deadline=None, derandomize=True)


def reference_loss(model, labels, examples):
    """The loss from all logits of each whole prompt, one at a time."""
    total = torch.zeros(())
    for example in examples:
        logits = model(torch.tensor([[*example.tokens, *labels.before]])).logits[0, -1]
        losses = -logits.log_softmax(-1)
        loss = example.target * losses[labels.unsafe] + (1 - example.target) * losses[labels.safe]
        total = total + example.weight * loss
    return total / sum(e.weight for e in examples)


@pytest.mark.parametrize("family", ["guardloop", "llama-guard-1", "llama-guard-3"])
def test_gradients_behind_the_shared_prefix_equal_those_of_whole_prompts(family):
    model, renderer = adapted(family), renderer_of(family)
    labels, prefixes, examples = label_tokens(renderer), renderer.prefixes, encoded(renderer)
    reference = reference_loss(model, labels, examples)
    reference.backward()
    expected = gradients(model)
    hidden, tokens = label_states(model, prefixes, labels.before, examples)
    loss = batch_loss(label_logits(model, hidden), labels, examples) / sum(e.weight for e in examples)
    loss.backward()
    found = gradients(model)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    assert found.keys() == expected.keys()
    assert all("lora_" in name for name in found)
    for name, gradient in expected.items():
        assert torch.linalg.norm(found[name] - gradient) <= 1e-4 * torch.linalg.norm(gradient), name
        assert gradient.abs().max() > 0
    assert len(prefixes[0]) < tokens < sum(len(e.tokens) + len(labels.before) for e in examples)


def test_checkpointed_gradients_equal_those_behind_the_shared_prefix():
    model, renderer = adapted(), renderer_of("guardloop")

    def first_step():
        trainer = Trainer(model, renderer.prefixes, label_tokens(renderer), TrainingSettings())
        model.train()
        return trainer._gradients(encoded(renderer), 1)[0], gradients(model)

    expected_loss, expected = first_step()
    computed = []
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.get_base_model().model.layers:
        layer.self_attn.register_forward_hook(lambda *_: computed.append(1))
    loss, found = first_step()
    assert len(computed) == 2 * len(model.get_base_model().model.layers)  # again in the backward pass
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in expected.items():
        assert torch.linalg.norm(found[name] - gradient) <= 1e-4 * torch.linalg.norm(gradient), name


@pytest.mark.parametrize("family", ["guardloop", "llama-guard-3"])
def test_the_first_step_of_fit_has_the_loss_and_gradient_of_whole_prompts(family):
    model, renderer = adapted(family), renderer_of(family)
    labels, examples = label_tokens(renderer), encoded(renderer)
    reference = reference_loss(model, labels, examples)
    reference.backward()
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients(model).values()))
    (step,) = fit(model, renderer.prefixes, labels, examples, TrainingSettings(batch_size=99, epochs=1)).steps
    assert step.loss == pytest.approx(reference.item(), rel=1e-5)
    assert step.gradient_norm == pytest.approx(norm, rel=1e-4)
    assert (step.number, step.total, step.examples) == (1, 1, len(examples))


def test_examples_behind_several_prefixes_keep_their_order():
    model, renderer = adapted(), renderer_of("guardloop")
    labels, examples = label_tokens(renderer), encoded(renderer)
    shared = renderer.prefixes[0]
    found, tokens = label_states(model, [shared[:3], [*shared, *examples[1].tokens[len(shared) :][:2]]], (), examples)
    expected, whole = label_states(model, [], (), examples)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert tokens < whole
    assert len(found) == len(examples)
    assert labels.before == ()


@pytest.mark.parametrize("checkpointed", [0.0, 0.5])
@pytest.mark.parametrize("family", ["guardloop", "llama-guard-3"])
def test_packs_have_the_loss_and_gradients_of_batches(family, checkpointed):
    model, renderer = adapted(family), renderer_of(family)
    labels, examples = label_tokens(renderer), encoded(renderer)
    packs = Packs(model, renderer.prefixes, labels.before, max_tokens=1024, checkpointed=checkpointed, compiled=False)
    pieces = packs.micro_batches(examples)
    assert sorted(e.id for piece in pieces for e in piece) == sorted(e.id for e in examples)
    assert len(pieces) < len(examples)

    def learn(packs, pieces):
        learner = Learner(model, renderer.prefixes, labels, packs)
        total = 0.0
        for piece in pieces:
            loss = learner(piece)
            loss.backward()
            total += loss.item()
        return total, gradients(model)

    (loss, found), (expected_loss, expected) = learn(packs, pieces), learn(None, [examples])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.linalg.norm(found[name] - gradient) <= 1e-4 * torch.linalg.norm(gradient), name


def test_an_example_too_long_for_a_pack_is_a_piece_by_itself():
    model, renderer = adapted(), renderer_of("guardloop")
    labels, examples = label_tokens(renderer), encoded(renderer)
    packs = Packs(model, renderer.prefixes, labels.before, max_tokens=128, compiled=False)
    long = replace(examples[0], id="long", tokens=[*examples[0].tokens, *examples[0].tokens * 3])
    pieces = packs.micro_batches([*examples, long])
    assert [long] in pieces
    assert packs.hidden([long]) is None


def test_only_the_label_position_reaches_the_loss():
    model, renderer = adapted(), renderer_of("llama-guard-3")
    labels, examples = label_tokens(renderer), encoded(renderer)
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: shapes.append(tuple(args[0].shape)))
    fit(model, renderer.prefixes, labels, examples, TrainingSettings(batch_size=4, epochs=1))
    assert sorted(shapes) == [(2, 64), (4, 64), (4, 64)]


@given(
    logits=st.lists(st.lists(st.floats(-9, 9), min_size=6, max_size=6), min_size=1, max_size=5),
    target=st.floats(0, 1, width=32),
)
@PROPERTY
def test_the_label_loss_is_a_cross_entropy_least_at_its_target(logits, target):
    labels = LabelTokens((), safe=2, unsafe=4)
    scores = torch.tensor(logits)
    count = len(logits)
    targets = torch.full((count,), target)
    loss = label_losses(scores, labels, targets).mean()
    probabilities = scores.softmax(-1)
    expected = -(target * probabilities[:, 4].log() + (1 - target) * probabilities[:, 2].log()).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    best = torch.full((count, 6), -30.0)
    best[:, 4] = math.log(max(target, 1e-12))
    best[:, 2] = math.log(max(1 - target, 1e-12))
    least = label_losses(best, labels, targets).mean()
    assert least.item() <= loss.item() + 1e-5


def test_a_weight_counts_as_that_many_examples():
    labels = LabelTokens((), safe=0, unsafe=1)
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    thrice, unsafe, safe = (Encoded("e", [0], target, weight) for target, weight in ((1, 3.0), (1, 1.0), (0, 1.0)))
    weighted = batch_loss(logits, labels, [thrice, safe])
    repeated = batch_loss(logits[[0, 0, 0, 1]], labels, [unsafe] * 3 + [safe])
    assert weighted.item() == pytest.approx(repeated.item(), rel=1e-6)


def reference_curve(model, labels, examples, options, total):
    """The losses of a plain loop over whole prompts, one at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(batches(examples, options.batch_size, 0, total)):
        loss = reference_loss(model, labels, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate_at(step, total)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_the_loss_curve_lies_on_that_of_whole_prompts(monkeypatch):
    monkeypatch.setattr(trainer_module, "PACK_TOKENS", 100)  # some steps are taken in micro-batches
    renderer = renderer_of("guardloop")
    labels, examples = label_tokens(renderer), encoded(renderer)
    options = TrainingSettings(batch_size=3, epochs=6, learning_rate=2e-3)
    fitted = fit(adapted(), renderer.prefixes, labels, examples, options)
    expected = reference_curve(adapted(), labels, examples, options, 24)
    assert [step.loss for step in fitted.steps] == pytest.approx(expected, rel=1e-3)
    assert expected[-1] < 0.5 * expected[0]


def test_only_the_adapter_is_changed():
    model, renderer = adapted(), renderer_of("guardloop")
    before = {name: p.clone() for name, p in model.named_parameters()}
    fit(model, renderer.prefixes, label_tokens(renderer), encoded(renderer), TrainingSettings(epochs=1))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert not model.training


def test_a_step_of_rows_that_weigh_nothing_teaches_nothing():
    model, renderer = adapted(), renderer_of("guardloop")
    before = {name: p.clone() for name, p in model.named_parameters()}
    idle = [replace(example, weight=0.0) for example in encoded(renderer)]
    steps = fit(model, renderer.prefixes, label_tokens(renderer), idle, TrainingSettings()).steps
    assert steps and all(step.loss == 0 and step.gradient_norm == 0 for step in steps)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_steps_are_reported_as_they_happen():
    model, renderer = adapted(), renderer_of("guardloop")
    reported, options = [], TrainingSettings(batch_size=4, epochs=1.5)
    args = (model, renderer.prefixes, label_tokens(renderer), encoded(renderer), options)
    steps = fit(*args, on_step=reported.append).steps
    assert steps == reported
    assert [s.number for s in steps] == [1, 2, 3, 4, 5]
    assert all(s.total == 5 and s.tokens > 0 and s.learning_rate > 0 for s in steps)


def test_a_loss_that_blows_up_names_its_examples():
    model, renderer = adapted(), renderer_of("guardloop")
    options = TrainingSettings(learning_rate=1e30, batch_size=5, epochs=9)
    with pytest.raises(GuardLoopError, match=r"the loss is \S+ and .* at step \d+ \(examples e\d(, e\d){4}\)") as error:
        fit(model, renderer.prefixes, label_tokens(renderer), encoded(renderer), options)
    assert "training.learning_rate" in error.value.remedy


def test_a_loss_that_explodes_without_overflow_stops_at_once():
    models = []

    @torch.no_grad()
    def spoil(step):
        models[0].get_output_embeddings().weight.mul_(50)

    with pytest.raises(GuardLoopError, match=r"the loss is \d.* at step 2 \(examples e"):
        fitted_state(before=models.append, rest={"on_step": spoil})


def test_a_poisoned_weight_stops_the_first_step_and_leaves_the_adapter_alone():
    model, renderer = adapted(), renderer_of("guardloop")
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        model.get_base_model().model.norm.weight[0] = float("nan")
    with pytest.raises(GuardLoopError, match=r"the loss is nan and .* at step 1 "):
        fit(model, renderer.prefixes, label_tokens(renderer), encoded(renderer), TrainingSettings())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@given(total=st.integers(1, 400))
@PROPERTY
def test_the_rate_rises_then_falls_within_the_training(total):
    rates = [rate_at(step, total) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    warmup = math.ceil(WARMUP * total)
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b for a, b in pairwise(rates[warmup:]))
    assert total == 1 or rates[warmup] == 1
    assert total < 300 or rates[-1] < 0.001


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=50),
    rows=st.integers(1, 12),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
)
@PROPERTY
def test_every_epoch_takes_every_example_once(lengths, rows, epochs, seed):
    examples = [Encoded(str(n), [0] * length, 0.5, 1.0) for n, length in enumerate(lengths)]
    per_epoch = math.ceil(len(examples) / rows)
    made = list(batches(examples, rows, seed, per_epoch * epochs))
    for epoch in range(epochs):
        taken = [e.id for batch in made[epoch * per_epoch : (epoch + 1) * per_epoch] for e in batch]
        assert sorted(taken) == sorted(e.id for e in examples)
    assert all(0 < len(batch) <= rows for batch in made)
    assert made == list(batches(examples, rows, seed, per_epoch * epochs))


def test_each_epoch_and_each_seed_has_an_order_of_its_own_and_each_step_a_fair_sample():
    examples = [Encoded(str(n), [0] * n, 0.5, 1.0) for n in range(640)]
    made, other = (list(batches(examples, 16, seed, 80)) for seed in (0, 1))
    assert made[:40] != made[40:]
    assert made != other
    spans = [max(lengths) - min(lengths) for lengths in ([len(e.tokens) for e in batch] for batch in made)]
    assert all(100 < span < 640 for span in spans)


def fitted_state(**options):
    """The outcome of a short training, and its adapter."""
    model, renderer, rest = adapted(), renderer_of("guardloop"), options.pop("rest", {})
    before = options.pop("before", lambda model: None)
    before(model)
    settings = TrainingSettings(**{"batch_size": 4, "epochs": 2, "learning_rate": 1e-3} | options)
    fitted = fit(model, renderer.prefixes, label_tokens(renderer), encoded(renderer), settings, **rest)
    return fitted, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_no_examples_are_refused():
    model, renderer = adapted(), renderer_of("guardloop")
    with pytest.raises(GuardLoopError, match="no examples"):
        fit(model, renderer.prefixes, label_tokens(renderer), [], TrainingSettings())


def test_micro_batches_change_nothing_but_rounding(monkeypatch):
    whole, expected = fitted_state()
    monkeypatch.setattr(trainer_module, "PACK_TOKENS", 1)
    pieces, found = fitted_state()
    assert [s.loss for s in pieces.steps] == pytest.approx([s.loss for s in whole.steps], rel=1e-4)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-4, rtol=1e-4)


def computed(model):
    """Rows and width of each forward pass of `model` behind a template, as they happen."""
    seen = []

    def note(module, args, kwargs):
        if kwargs["past_key_values"].get_seq_length():
            seen.append(tuple(kwargs["input_ids"].shape))

    model.get_base_model().model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.slow
def test_a_step_of_more_tokens_than_fit_is_computed_in_micro_batches_of_like_length(monkeypatch):
    renderer, seen = renderer_of("guardloop"), []
    prompts = [f"{n} " + "tea " * (40 * (n % 3) ** 2) for n in range(24)]
    rows = [Encoded(str(n), renderer.render(p, None).tokens, n % 2, 1.0) for n, p in enumerate(prompts)]
    found = []
    for most in (1024, 1024 * 512):
        monkeypatch.setattr(trainer_module, "PACK_TOKENS", most)
        model = adapted()
        seen.append(computed(model))
        settings = TrainingSettings(batch_size=24)
        found.append(fit(model, renderer.prefixes, label_tokens(renderer), rows, settings))
    pieces, (whole,) = seen
    assert sum(count for count, _ in pieces) == 24 == whole[0]
    assert all(count == 1 or count * width <= 1024 for count, width in pieces)
    assert sum(count * width for count, width in pieces) < 0.6 * whole[0] * whole[1]  # less padding
    assert found[0].steps[0].loss == pytest.approx(found[1].steps[0].loss, rel=1e-5)


def small_memory(rows):
    """Lets a model run out of memory where more than `rows` prompts are computed at once."""

    def check(module, args, kwargs):
        if len(kwargs["input_ids"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return lambda model: model.get_base_model().model.register_forward_pre_hook(check, with_kwargs=True)


@pytest.mark.slow
def test_where_memory_runs_out_the_same_steps_are_taken_with_less_at_once(caplog, monkeypatch):
    with caplog.at_level(logging.WARNING, "guardloop"):
        fitted, found = fitted_state(before=small_memory(1))
    told = [int(re.search(r"from here on at most (\d+) tokens", r.message)[1]) for r in caplog.records]
    assert len(told) > 1
    assert all(after <= before / 2 for before, after in pairwise(told))
    monkeypatch.setattr(trainer_module, "PACK_TOKENS", 1)
    expected_fitted, expected = fitted_state()
    assert [s.loss for s in fitted.steps] == [s.loss for s in expected_fitted.steps]
    assert [s.examples for s in fitted.steps] == [s.examples for s in expected_fitted.steps]
    assert same(found, expected)


class CompiledNowhere:
    """Packs on a GPU whose compiler cannot do them."""

    def micro_batches(self, share):
        return [share]

    def hidden(self, piece):
        raise RuntimeError("no valid Triton configs\nRequired: 131072")


def test_where_packs_cannot_be_computed_training_goes_on_without_them(caplog):
    renderer, steps = renderer_of("guardloop"), []
    for packs in (None, CompiledNowhere()):
        trainer = Trainer(adapted(), renderer.prefixes, label_tokens(renderer), TrainingSettings())
        trainer.packs = trainer.learner.packs = packs
        steps.append([trainer.step(encoded(renderer)[:4], number, 2, 1e-3) for number in (1, 2)])
    assert [s.loss for s in steps[0]] == [s.loss for s in steps[1]]
    assert [r.message for r in caplog.records if "packed" in r.message] == [
        "packed sequences: no valid Triton configs; training goes on without packing, which is slower"
    ]


def test_an_error_after_packs_have_worked_is_raised():
    renderer = renderer_of("guardloop")
    trainer = Trainer(adapted(), renderer.prefixes, label_tokens(renderer), TrainingSettings())
    trainer.step(encoded(renderer)[:4], 1, 2, 1e-3)
    trainer.packs = trainer.learner.packs = CompiledNowhere()
    with pytest.raises(RuntimeError, match="no valid Triton configs"):
        trainer.step(encoded(renderer)[:4], 2, 2, 1e-3)


def test_memory_for_no_example_at_all_is_told():
    with pytest.raises(GuardLoopError, match="out of memory with 1 examples at once") as error:
        fitted_state(before=small_memory(0))
    assert "gradient_checkpointing" in error.value.remedy


def test_packs_are_halved_to_whole_blocks_until_they_are_small(caplog, monkeypatch):
    monkeypatch.setattr(trainer_module, "PACK_TOKENS", 8704)
    model, renderer = adapted(), renderer_of("guardloop")
    labels, examples = label_tokens(renderer), encoded(renderer)
    trainer = Trainer(model, renderer.prefixes, labels, TrainingSettings())
    trainer.packs = trainer.learner.packs = Packs(
        model, renderer.prefixes, (), max_tokens=trainer.max_tokens, compiled=False
    )

    def check(module, args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.get_base_model().model.embed_tokens.register_forward_pre_hook(check)
    with pytest.raises(GuardLoopError, match="out of memory with packs of 1024 tokens") as error:
        trainer.step(examples, 1, 1, 1e-3)
    assert "training.gradient_checkpointing" in error.value.remedy
    assert [r.message for r in caplog.records] == [
        f"out of memory: from here on at most {tokens} tokens in a forward pass" for tokens in (4352, 2176, 1024)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "best"),
    [((0.5, 0.9, 0.7, 0.8), 2), ((None, None, None, None), 4), ((0.5, 0.5, 0.5, 0.5), 1), ((None, 0.2, 0.1, 0.2), 2)],
)
def test_the_best_adapter_on_the_validation_examples_is_kept(values, best):
    taken, kept, models = iter(values), {}, []

    def keep(step):
        trained = {n: p for n, p in models[0].named_parameters() if p.requires_grad}
        kept[step.number] = {n: p.detach().clone() for n, p in trained.items()}

    rest = {"validate": lambda step: ValidationResult(step, next(taken), 0.0), "on_step": keep}
    fitted, found = fitted_state(rest=rest, before=models.append, batch_size=4, epochs=4)
    assert len(fitted.steps) == 12
    assert fitted.best == ValidationResult(3 * best, values[best - 1], 0.0)
    assert [step.metrics().get("validation_auprc") for step in fitted.steps[2::3]] == list(values)
    assert all(step.benign_fpr is None for step in fitted.steps if step.number % 3)
    assert same(found, kept[3 * best])


def test_the_figures_of_a_step_are_drawn():
    fitted, _ = fitted_state()
    step = fitted.steps[0]
    metrics = step.metrics()
    assert metrics["examples_per_second"] == step.examples / step.seconds
    assert metrics["train_loss"] == step.loss
    assert 0.05 < metrics["memory_gib"] < 60
    assert "mfu" not in metrics  # a CPU's peak is not in the table


def test_the_work_of_a_token_counts_the_weights_it_meets():
    model = tiny_llama()
    attention = 64 * 64 * 2 + 64 * 32 * 2
    expected = 2 * (attention + 3 * 64 * 128 + 2 * 64) + 64
    assert flops_per_token(with_lora(model), 1.0) == 4 * expected
    assert flops_per_token(with_lora(tiny_llama()), 0.5) == 3 * expected
