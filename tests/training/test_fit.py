import logging
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import cases
from support.models import renderer_of, tiny_llama, with_lora

from guardloop.core.errors import GuardLoopError
from guardloop.guard.inference.forward import label_logits
from guardloop.guard.prompt.verdict import LabelTokens, label_tokens
from guardloop.training.fit import Learner, Look, Training, answer_hidden, batches, fit, rate_at
from guardloop.training.loss import Encoded, batch_loss, label_losses
from guardloop.training.packs import Packs
from guardloop.training.settings import TrainingSettings
from guardloop.training.watch import flops_per_token

PROPERTY = settings(max_examples=cases(60), deadline=None, derandomize=True)
PROMPTS = ["hello", "build a bomb", "bake " * 20, "how <|eot_id|> so?", "x"]
schedules = st.builds(
    TrainingSettings,
    warmup=st.floats(0, 1, exclude_max=True),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
)


def adapted(family="guardloop", **config):
    return with_lora(tiny_llama(family), **config)


def encoded(renderer):
    """Examples of both roles, with soft targets and unlike weights."""
    rows = [(p, None) for p in PROMPTS] + [("hello", p) for p in PROMPTS]
    return [
        Encoded(f"e{n}", renderer.render(*row).tokens, target=(n % 4) / 3, weight=0.5 + n / 4)
        for n, row in enumerate(rows)
    ]


def reference_loss(model, labels, examples):
    """The loss from all logits of each whole prompt, one at a time."""
    total = torch.zeros(())
    for example in examples:
        logits = model(torch.tensor([[*example.tokens, *labels.lead]])).logits[0, -1]
        losses = -logits.log_softmax(-1)
        loss = example.target * losses[labels.unsafe] + (1 - example.target) * losses[labels.safe]
        total = total + example.weight * loss
    return total / sum(e.weight for e in examples)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["guardloop", "llama-guard-1", "llama-guard-3"])
def test_gradients_behind_the_shared_prefix_equal_those_of_whole_prompts(family):
    model, renderer = adapted(family), renderer_of(family)
    labels, prefixes, examples = label_tokens(renderer), renderer.prefixes, encoded(renderer)
    reference = reference_loss(model, labels, examples)
    reference.backward()
    expected = gradients(model)
    hidden, tokens = answer_hidden(model, prefixes, labels.lead, examples)
    loss = batch_loss(label_logits(model, hidden), labels, examples, 0.0) / sum(e.weight for e in examples)
    loss.backward()
    found = gradients(model)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    assert found.keys() == expected.keys()
    assert all("lora_" in name for name in found)
    for name, gradient in expected.items():
        assert torch.linalg.norm(found[name] - gradient) <= 1e-4 * torch.linalg.norm(gradient), name
        assert gradient.abs().max() > 0
    assert len(prefixes[0]) < tokens < sum(len(e.tokens) + len(labels.lead) for e in examples)


def test_checkpointed_gradients_equal_those_behind_the_shared_prefix():
    model, renderer = adapted().train(), renderer_of("guardloop")
    labels, examples = label_tokens(renderer), encoded(renderer)

    def learn():
        loss = Learner(model, renderer.prefixes, labels, 0.0)(examples)
        loss.backward()
        return loss.item(), gradients(model)

    expected_loss, expected = learn()
    again = []
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.get_base_model().model.layers:
        layer.self_attn.register_forward_hook(lambda *_: again.append(1))
    loss, found = learn()
    assert len(again) == 2 * len(model.get_base_model().model.layers)  # computed again in the backward pass
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
    labels, examples = label_tokens(renderer), with_codes(renderer)
    shared = renderer.prefixes[0]
    found, tokens = answer_hidden(model, [shared[:3], [*shared, *examples[1].tokens[len(shared) :][:2]]], (), examples)
    expected, whole = answer_hidden(model, [], (), examples)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert tokens < whole
    assert len(found) == sum(e.positions for e in examples)
    assert labels.lead == ()


@pytest.mark.parametrize("checkpointed", [0.0, 0.5])
@pytest.mark.parametrize("family", ["guardloop", "llama-guard-3"])
def test_packs_have_the_loss_and_gradients_of_batches(family, checkpointed):
    model, renderer = adapted(family), renderer_of(family)
    labels, examples = label_tokens(renderer), with_codes(renderer)
    packs = Packs(model, renderer.prefixes, labels.lead, largest=1024, checkpointed=checkpointed, compiled=False)
    pieces = packs.pieces(examples)
    assert sorted(e.id for piece in pieces for e in piece) == sorted(e.id for e in examples)
    assert len(pieces) < len(examples)

    def learn(packs, pieces):
        learner = Learner(model, renderer.prefixes, labels, 0.3, packs)
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
    packs = Packs(model, renderer.prefixes, labels.lead, largest=128, compiled=False)
    long = replace(examples[0], id="long", tokens=[*examples[0].tokens, *examples[0].tokens * 3])
    pieces = packs.pieces([*examples, long])
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
    loss = label_losses(scores, labels, targets, torch.ones(count)).mean()
    probabilities = scores.softmax(-1)
    expected = -(target * probabilities[:, 4].log() + (1 - target) * probabilities[:, 2].log()).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    best = torch.full((count, 6), -30.0)
    best[:, 4] = math.log(max(target, 1e-12))
    best[:, 2] = math.log(max(1 - target, 1e-12))
    least = label_losses(best, labels, targets, torch.ones(count)).mean()
    assert least.item() <= loss.item() + 1e-5


def lesson(target, weight=1.0, **values):
    return Encoded("e", [0], target, weight, **values)


def test_a_weight_counts_as_that_many_examples():
    labels = LabelTokens((), safe=0, unsafe=1)
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    weighted = batch_loss(logits, labels, [lesson(1.0, 3.0), lesson(0.0)], 0.0)
    repeated = batch_loss(logits[[0, 0, 0, 1]], labels, [lesson(1.0)] * 3 + [lesson(0.0)], 0.0)
    assert weighted.item() == pytest.approx(repeated.item(), rel=1e-6)


shares = st.floats(0.01, 0.99)


@given(target=shares, mass=st.floats(0.5, 1), other=st.lists(st.floats(-5, 5), min_size=5, max_size=5))
@PROPERTY
def test_a_replayed_row_costs_its_divergence_from_the_default_guard(target, mass, other):
    labels = LabelTokens((), safe=2, unsafe=4)
    mass = 1.0 if mass > 0.98 else mass
    row = [lesson(target, replayed_mass=mass)]
    logits = torch.full((1, 5), -60.0)
    for token, share in ((2, mass * (1 - target)), (4, mass * target), (0, 1 - mass)):
        logits[0, token] = math.log(max(share, 1e-30))
    same = logits.clone().requires_grad_()
    loss = batch_loss(same, labels, row, 0.0)
    (gradient,) = torch.autograd.grad(loss, same)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert gradient.abs().max() < 1e-5
    p = torch.tensor([other]).softmax(-1)[0]
    divergence = sum(
        q * math.log(q / p) if q else 0.0
        for q, p in ((mass * target, p[4]), (mass * (1 - target), p[2]), (1 - mass, p[0] + p[1] + p[3]))
    )
    assert batch_loss(torch.tensor([other]), labels, row, 0.0).item() == pytest.approx(float(divergence), abs=1e-4)


def test_a_replayed_row_and_a_lesson_have_the_same_gradient_where_the_label_mass_was_one():
    labels = LabelTokens((), safe=0, unsafe=1)
    logits = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses = [batch_loss(logits, labels, [lesson(0.3, replayed_mass=mass)], 0.0) for mass in (None, 1.0)]
    one, other = (torch.autograd.grad(loss, logits)[0] for loss in losses)
    torch.testing.assert_close(one, other)


def with_codes(renderer):
    """Examples of which some carry a trusted, written answer."""
    lead = len(label_tokens(renderer).lead)
    answer = (*renderer.answer("unsafe\nO2,O1")[lead:], renderer.tokenizer.eos_token_id)
    return [replace(e, answer=answer) if n % 3 == 0 else e for n, e in enumerate(encoded(renderer))]


@pytest.mark.parametrize("family", ["llama-guard-1", "llama-guard-3"])
def test_written_categories_are_learnt_at_their_own_positions(family):
    model, renderer = adapted(family), renderer_of(family)
    labels, prefixes, examples = label_tokens(renderer), renderer.prefixes, with_codes(renderer)
    reference = reference_loss(model, labels, examples) * sum(e.weight for e in examples)
    for e in examples:
        if e.answer:
            row = [*e.tokens, *labels.lead, *e.answer]
            logits = model(torch.tensor([row])).logits[0, -len(e.answer) : -1]
            cost = torch.nn.functional.cross_entropy(logits, torch.tensor(e.answer[1:]))
            reference = reference + 0.25 * e.weight * e.target * cost
    reference.backward()
    expected = gradients(model)
    hidden, _ = answer_hidden(model, prefixes, labels.lead, examples)
    assert len(hidden) == sum(e.positions for e in examples) > len(examples)
    loss = batch_loss(label_logits(model, hidden), labels, examples, 0.25)
    loss.backward()
    found = gradients(model)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    for name, gradient in expected.items():
        assert torch.linalg.norm(found[name] - gradient) <= 1e-4 * torch.linalg.norm(gradient), name


def reference_curve(model, labels, examples, options, total):
    """The losses of a plain loop over whole prompts, one at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    losses = []
    for step, batch in enumerate(batches(examples, options, total)):
        loss = reference_loss(model, labels, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, options.clip)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate_at(step, total, options)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_the_loss_curve_lies_on_that_of_whole_prompts_over_fifty_steps():
    renderer = renderer_of("guardloop")
    labels, examples = label_tokens(renderer), encoded(renderer)
    options = TrainingSettings(batch_size=3, epochs=12.5, learning_rate=1e-3, micro_rows=2)
    fitted = fit(adapted(), renderer.prefixes, labels, examples, options)
    expected = reference_curve(adapted(), labels, examples, options, 50)
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
    options = TrainingSettings(epochs=1, weight_decay=0.0)
    steps = fit(model, renderer.prefixes, label_tokens(renderer), idle, options).steps
    assert steps and all(step.loss == 0 and step.gradient_norm == 0 for step in steps)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_steps_are_told_as_they_happen():
    model, renderer = adapted(), renderer_of("guardloop")
    told, options = [], TrainingSettings(batch_size=4, epochs=1.5, warmup=0.5)
    args = (model, renderer.prefixes, label_tokens(renderer), encoded(renderer), options)
    steps = fit(*args, on_step=told.append).steps
    assert steps == told
    assert [s.number for s in steps] == [1, 2, 3, 4, 5]
    assert all(s.total == 5 and s.tokens > 0 and s.learning_rate > 0 for s in steps)


def test_a_loss_that_blows_up_names_its_examples():
    model, renderer = adapted(), renderer_of("guardloop")
    options = TrainingSettings(learning_rate=1e30, batch_size=5, epochs=9, warmup=0)
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


@given(options=schedules, total=st.integers(1, 400))
@PROPERTY
def test_the_rate_rises_then_falls_within_the_training(options, total):
    rates = [rate_at(step, total, options) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    warmup = math.ceil(options.warmup * total)
    assert warmup <= total
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b for a, b in pairwise(rates[warmup:]))
    if warmup < total:
        assert rates[warmup] == 1
    else:
        assert max(rates) >= 0.5


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_ends_near_nothing(schedule):
    assert rate_at(999, 1000, TrainingSettings(schedule=schedule)) < 0.01


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=50),
    rows=st.integers(1, 12),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
    order=st.sampled_from(["length", "random"]),
)
@PROPERTY
def test_every_epoch_takes_every_example_once(lengths, rows, epochs, seed, order):
    examples = [Encoded(str(n), [0] * length, 0.5, 1.0) for n, length in enumerate(lengths)]
    options = TrainingSettings(batch_size=rows, seed=seed, order=order)
    per_epoch = math.ceil(len(examples) / rows)
    made = list(batches(examples, options, per_epoch * epochs))
    for epoch in range(epochs):
        taken = [e.id for batch in made[epoch * per_epoch : (epoch + 1) * per_epoch] for e in batch]
        assert sorted(taken) == sorted(e.id for e in examples)
    assert all(0 < len(batch) <= rows for batch in made)
    assert made == list(batches(examples, options, per_epoch * epochs))


def test_another_seed_gives_another_order():
    examples = [Encoded(str(n), [0] * n, 0.5, 1.0) for n in range(60)]
    first, second = (list(batches(examples, TrainingSettings(seed=seed), 4)) for seed in (0, 1))
    assert first != second


@pytest.mark.parametrize(("order", "least", "most"), [("length", 0, 16), ("random", 100, 640)])
def test_a_step_is_of_like_lengths_or_a_fair_sample(order, least, most):
    examples = [Encoded(str(n), [0] * n, 0.5, 1.0) for n in range(640)]
    made = list(batches(examples, TrainingSettings(batch_size=16, order=order), 80))
    spans = [max(lengths) - min(lengths) for lengths in ([len(e.tokens) for e in batch] for batch in made)]
    assert all(least < span < most for span in spans)
    assert made[:40] != made[40:]  # each epoch in an order of its own


def fitted_state(**options):
    """The outcome of a short training, and its adapter."""
    model, renderer, rest = adapted(), renderer_of("guardloop"), options.pop("rest", {})
    before = options.pop("before", lambda model: None)
    before(model)
    settings = TrainingSettings(**{"batch_size": 4, "epochs": 4, "learning_rate": 1e-3, "dropout": 0.0} | options)
    fitted = fit(model, renderer.prefixes, label_tokens(renderer), encoded(renderer), settings, **rest)
    return fitted, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_no_examples_are_refused():
    model, renderer = adapted(), renderer_of("guardloop")
    with pytest.raises(GuardLoopError, match="no examples"):
        fit(model, renderer.prefixes, label_tokens(renderer), [], TrainingSettings())


@pytest.mark.parametrize("micro_rows", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_micro_batches_change_nothing_but_rounding(micro_rows):
    (whole, expected), (pieces, found) = fitted_state(), fitted_state(micro_rows=micro_rows)
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


def test_a_step_of_more_tokens_than_a_pack_is_computed_in_pieces_of_like_length():
    renderer, seen = renderer_of("guardloop"), []
    prompts = [f"{n} " + "tea " * (40 * (n % 3) ** 2) for n in range(24)]
    rows = [Encoded(str(n), renderer.render(p, None).tokens, n % 2, 1.0) for n, p in enumerate(prompts)]
    found = []
    for most in (1024, 1024 * 512):
        model = adapted()
        seen.append(computed(model))
        settings = TrainingSettings(batch_size=24, epochs=1, dropout=0.0, order="random", pack_tokens=most)
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
def test_where_memory_runs_out_the_same_steps_are_taken_in_smaller_pieces(caplog):
    with caplog.at_level(logging.WARNING, "guardloop"):
        fitted, found = fitted_state(before=small_memory(1), batch_size=4)
    assert [r.message for r in caplog.records] == [
        "out of memory: from here on 2 examples in a forward pass",
        "out of memory: from here on 1 examples in a forward pass",
    ]
    expected_fitted, expected = fitted_state(micro_rows=1)
    assert [s.loss for s in fitted.steps] == [s.loss for s in expected_fitted.steps]
    assert [s.examples for s in fitted.steps] == [s.examples for s in expected_fitted.steps]
    assert same(found, expected)


class CompiledNowhere:
    """Packs on a GPU whose compiler cannot do them."""

    largest = 8192

    def pieces(self, share):
        return [share]

    def hidden(self, piece):
        raise RuntimeError("no valid Triton configs\nRequired: 131072")


def test_where_packs_cannot_be_computed_training_goes_on_without_them(caplog):
    renderer, steps = renderer_of("guardloop"), []
    for packs in (None, CompiledNowhere()):
        training = Training(
            adapted(), renderer.prefixes, label_tokens(renderer), TrainingSettings(dropout=0.0, batch_size=4)
        )
        training.packs = training.learner.packs = packs
        steps.append([training.take(encoded(renderer)[:4], number, 2) for number in (1, 2)])
    assert [s.loss for s in steps[0]] == [s.loss for s in steps[1]]
    assert [r.message for r in caplog.records if "packs" in r.message] == [
        "packs: no valid Triton configs; training goes on without them, which is slower"
    ]


def test_an_error_after_packs_have_worked_is_raised():
    renderer = renderer_of("guardloop")
    training = Training(adapted(), renderer.prefixes, label_tokens(renderer), TrainingSettings(batch_size=4))
    training.take(encoded(renderer)[:4], 1, 2)
    training.packs = training.learner.packs = CompiledNowhere()
    with pytest.raises(RuntimeError, match="no valid Triton configs"):
        training.take(encoded(renderer)[:4], 2, 2)


def test_memory_for_no_example_at_all_is_told():
    with pytest.raises(GuardLoopError, match="out of memory with 1 examples") as error:
        fitted_state(before=small_memory(0))
    assert "gradient_checkpointing" in error.value.remedy


def test_packs_are_halved_to_whole_squares():
    model, renderer = adapted(), renderer_of("guardloop")
    packs = Packs(model, renderer.prefixes, (), largest=8704, compiled=False)
    sizes = [packs.largest]
    while packs.halve():
        sizes.append(packs.largest)
    assert sizes == [8704, 4352, 2176, 1024]
    assert packs.largest == 1024


def test_packs_without_the_memory_are_named(caplog):
    model, renderer = adapted(), renderer_of("guardloop")
    labels, examples = label_tokens(renderer), encoded(renderer)
    training = Training(model, renderer.prefixes, labels, TrainingSettings())
    training.packs = training.learner.packs = Packs(model, renderer.prefixes, (), largest=2048, compiled=False)

    def check(module, args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.get_base_model().model.embed_tokens.register_forward_pre_hook(check)
    with pytest.raises(GuardLoopError, match="out of memory with a pack of 1024 tokens") as error:
        training.take(examples, 1, 1)
    assert "training.pack_tokens" in error.value.remedy
    assert [r.message for r in caplog.records] == [
        "out of memory: from here on a pack of 1024 tokens in a forward pass"
    ]


def looks(*values):
    """What the held-out examples seem to show, step after step: AUPRC, or AUPRC and benign FPR."""
    taken = iter(values)
    return lambda step: Look(step, *value) if isinstance(value := next(taken), tuple) else Look(step, value, 0.0)


@pytest.mark.parametrize(
    ("values", "limit", "best"),
    [
        ((0.5, 0.9, 0.7, 0.8), 1.0, 2),
        (((0.9, 0.3), (0.5, 0.1), (0.6, 0.1), (0.95, 0.2)), 0.15, 3),
        pytest.param(((0.9, 0.3), (0.5, 0.2), (0.6, 0.4), (0.95, 0.5)), 0.1, 2, marks=pytest.mark.slow),
        pytest.param((None, None, None, None), 1.0, 4, marks=pytest.mark.slow),
        pytest.param((0.5, 0.5, 0.5, 0.5), 1.0, 1, marks=pytest.mark.slow),
    ],
)
def test_the_best_adapter_within_the_limit_is_kept(values, limit, best):
    options = {"eval_steps": 3, "batch_size": 10, "epochs": 12, "fpr_limit": limit, "patience": 0}
    fitted, found = fitted_state(rest={"look": looks(*values)}, **options)
    assert fitted.best.step == 3 * best
    assert [s.number for s in fitted.steps if s.held_out_auprc is not None or values[0] is None] != []
    kept = {}

    def keep(step):
        kept.update({step.number: {n: p.detach().clone() for n, p in trained.items()}})

    model = adapted()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    renderer = renderer_of("guardloop")
    settings = TrainingSettings(learning_rate=1e-3, dropout=0.0, **options)
    fit(model, renderer.prefixes, label_tokens(renderer), encoded(renderer), settings, on_step=keep)
    assert same(found, kept[3 * best])


def test_training_ends_where_nothing_gets_better():
    values = [0.5, 0.6, 0.55, 0.58, 0.7]
    fitted, _ = fitted_state(rest={"look": looks(*values)}, eval_steps=2, patience=2, epochs=9)
    assert fitted.best.step == 4
    assert len(fitted.steps) == 8
    assert fitted.steps[3].metrics()["held_out_auprc"] == 0.6


def test_the_rates_of_a_step_are_told():
    fitted, _ = fitted_state()
    step = fitted.steps[0]
    told = step.metrics()
    assert told["examples_per_second"] == step.examples / step.seconds
    assert told["train_loss"] == step.loss
    assert 0.05 < told["memory_gib"] < 60
    assert "mfu" not in told  # a CPU's peak is not in the table


def test_the_work_of_a_token_counts_the_weights_it_meets():
    model = tiny_llama()
    attention = 64 * 64 * 2 + 64 * 32 * 2
    expected = 2 * (attention + 3 * 64 * 128 + 2 * 64) + 64
    assert flops_per_token(with_lora(model), 1.0) == 4 * expected
    assert flops_per_token(with_lora(tiny_llama()), 0.5) == 3 * expected
