import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import renderer_of, tiny_llama, with_lora

from guardloop.errors import GuardLoopError
from guardloop.guard.forward import label_logits
from guardloop.guard.verdict import LabelTokens, label_tokens
from guardloop.training.fit import Encoded, batches, fit, hidden_of, label_loss, rate_at
from guardloop.training.settings import TrainingSettings

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
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
    labels, examples = label_tokens(renderer), encoded(renderer)
    reference = reference_loss(model, labels, examples)
    reference.backward()
    expected = gradients(model)
    examples, hidden = hidden_of(model, renderer.prefixes, labels, examples)
    targets, weights = torch.tensor([[e.target, e.weight] for e in examples]).T
    loss = label_loss(label_logits(model, hidden), labels, targets, weights)
    loss.backward()
    found = gradients(model)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    assert found.keys() == expected.keys()
    assert all("lora_" in name for name in found)
    for name, gradient in expected.items():
        assert torch.linalg.norm(found[name] - gradient) <= 1e-4 * torch.linalg.norm(gradient), name
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("family", ["guardloop", "llama-guard-3"])
def test_the_first_step_of_fit_has_the_loss_and_gradient_of_whole_prompts(family):
    model, renderer = adapted(family), renderer_of(family)
    labels, examples = label_tokens(renderer), encoded(renderer)
    reference = reference_loss(model, labels, examples)
    reference.backward()
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients(model).values()))
    (step,) = fit(model, renderer.prefixes, labels, examples, TrainingSettings(batch_rows=99, epochs=1))
    assert step.loss == pytest.approx(reference.item(), rel=1e-5)
    assert step.gradient_norm == pytest.approx(norm, rel=1e-4)
    assert (step.number, step.total, step.examples) == (1, 1, len(examples))


def test_only_the_label_position_reaches_the_loss():
    model, renderer = adapted(), renderer_of("llama-guard-3")
    labels, examples = label_tokens(renderer), encoded(renderer)
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: shapes.append(tuple(args[0].shape)))
    fit(model, renderer.prefixes, labels, examples, TrainingSettings(batch_rows=4, epochs=1))
    assert sorted(shapes) == [(2, 64), (4, 64), (4, 64)]


@given(
    logits=st.lists(st.lists(st.floats(-9, 9), min_size=6, max_size=6), min_size=1, max_size=5),
    target=st.floats(0, 1, width=32),
    weight=st.floats(0.125, 4, width=32),
)
@PROPERTY
def test_the_label_loss_is_a_cross_entropy_least_at_its_target(logits, target, weight):
    labels = LabelTokens((), safe=2, unsafe=4)
    scores = torch.tensor(logits)
    count = len(logits)
    loss = label_loss(scores, labels, torch.full((count,), target), torch.full((count,), weight))
    probabilities = scores.softmax(-1)
    expected = -(target * probabilities[:, 4].log() + (1 - target) * probabilities[:, 2].log()).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    best = torch.full((count, 6), -30.0)
    best[:, 4] = math.log(max(target, 1e-12))
    best[:, 2] = math.log(max(1 - target, 1e-12))
    least = label_loss(best, labels, torch.full((count,), target), torch.full((count,), weight))
    assert least.item() <= loss.item() + 1e-5


def test_a_weight_counts_as_that_many_examples():
    labels = LabelTokens((), safe=0, unsafe=1)
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    weighted = label_loss(logits, labels, torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0]))
    repeated = label_loss(logits[[0, 0, 0, 1]], labels, torch.tensor([1.0, 1, 1, 0]), torch.ones(4))
    assert weighted.item() == pytest.approx(repeated.item(), rel=1e-6)


def test_only_the_adapter_is_changed():
    model, renderer = adapted(), renderer_of("guardloop")
    before = {name: p.clone() for name, p in model.named_parameters()}
    fit(model, renderer.prefixes, label_tokens(renderer), encoded(renderer), TrainingSettings(epochs=1))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert not model.training


def test_steps_are_told_as_they_happen():
    model, renderer = adapted(), renderer_of("guardloop")
    told, options = [], TrainingSettings(batch_rows=4, epochs=1.5, warmup=0.5)
    args = (model, renderer.prefixes, label_tokens(renderer), encoded(renderer), options)
    steps = fit(*args, on_step=told.append)
    assert steps == told
    assert [s.number for s in steps] == [1, 2, 3, 4, 5]
    assert all(s.total == 5 and s.tokens > 0 and s.learning_rate > 0 for s in steps)


def test_a_loss_that_blows_up_names_its_examples():
    model, renderer = adapted(), renderer_of("guardloop")
    options = TrainingSettings(learning_rate=1e30, batch_rows=5, epochs=9, warmup=0)
    with pytest.raises(GuardLoopError, match=r"the loss is \S+ at step \d+ \(examples e\d(, e\d){4}\)") as error:
        fit(model, renderer.prefixes, label_tokens(renderer), encoded(renderer), options)
    assert "training.learning_rate" in error.value.remedy


def test_a_poisoned_weight_stops_the_first_step_and_leaves_the_adapter_alone():
    model, renderer = adapted(), renderer_of("guardloop")
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        model.get_base_model().model.norm.weight[0] = float("nan")
    with pytest.raises(GuardLoopError, match="the loss is nan at step 1 "):
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
)
@PROPERTY
def test_every_epoch_takes_every_example_once(lengths, rows, epochs, seed):
    examples = [Encoded(str(n), [0] * length, 0.5, 1.0) for n, length in enumerate(lengths)]
    options = TrainingSettings(batch_rows=rows, seed=seed)
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
