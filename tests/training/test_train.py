import json
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from scipy.stats import norm
from support.cases import cases
from support.mlflow_database import mlflow_database
from support.models import agent, tiny_llama, user, with_lora
from support.training_examples import guard_settings, quick, toy_examples
from torch._dynamo.testing import CompileCounter

from guardloop.core.errors import GuardLoopError
from guardloop.core.records import EXAMPLE, write_table
from guardloop.guard.engine import Guard
from guardloop.guard.inference import packed
from guardloop.guard.prompt.renderer import Renderer
from guardloop.registry.settings import RegistrySettings
from guardloop.stages import EXAMPLES, train_guard
from guardloop.training import train as module
from guardloop.training.adapter import TRAINED, fresh_adapter, scaled
from guardloop.training.calibrate import operating_point, ranking, stricter_point, temperature
from guardloop.training.examples import split
from guardloop.training.settings import TrainingSettings
from guardloop.training.train import train

pytestmark = pytest.mark.slow

PROPERTY = settings(max_examples=cases(60), deadline=None, derandomize=True)


def scores(guard, rows):
    return np.array([verdict.score for verdict in guard.score(rows)])


@pytest.fixture(scope="module")
def toy(base, tmp_path_factory):
    """An adapter trained on the toy task, with what was said of it and seen on the way."""
    folder = tmp_path_factory.mktemp("toy")
    steps = []
    options = quick(epochs=4, rank=16, learning_rate=8e-3)
    trained = train(toy_examples(100), guard_settings(base), options, folder, lambda seed, step: steps.append(step))
    return trained, folder, steps


def test_training_learns_a_toy_task(base, toy):
    trained, folder, steps = toy
    assert trained.last_loss < 0.1 * trained.first_loss
    assert trained.validation_auprc_baseline < 0.8
    assert trained.validation_auprc > 0.95
    assert trained.steps == len(steps)
    guard = Guard.load(guard_settings(base, min_label_mass=0.95), folder)
    _, held_out = split(toy_examples(100), 0.2, 0)
    unsafe = np.array([r["target"] > 0.5 for r in held_out])
    verdicts = list(guard.score(held_out))
    found, flagged = (np.array([getattr(v, name) for v in verdicts]) for name in ("score", "flagged"))
    assert found[unsafe].mean() > found[~unsafe].mean() + 5
    assert flagged[unsafe].mean() > 0.9
    assert flagged[~unsafe].mean() <= 0.02 + np.mean(scores(Guard.load(guard_settings(base)), held_out)[~unsafe] > 0)


def test_the_facts_beside_the_adapter_say_how_it_is_used_and_was_made(base, toy):
    trained, folder, _ = toy
    metadata = json.loads((folder / "guard.json").read_text())
    assert metadata["family"] == "guardloop"
    assert metadata["base"] == str(base)
    assert metadata["threshold"] == trained.threshold
    assert metadata["training"]["examples"] + metadata["training"]["validation_examples"] == len(toy_examples(100))
    assert metadata["training"]["settings"]["rank"] == 16
    files = {"adapter_config.json", "adapter_model.safetensors", "guard.json", "README.md"}
    assert {p.name for p in folder.iterdir()} == files
    assert str(base) not in (folder / "adapter_config.json").read_text()


def observed_train(monkeypatch, *args, **kwargs):
    """Train, and return which examples were fitted and which scores the threshold was set by."""
    seen = {}

    def watched_fit(model, prefixes, labels, examples, *rest, **options):
        seen["fitted"] = [e.id for e in examples]
        return real_fit(model, prefixes, labels, examples, *rest, **options)

    def watched_point(examples, scores, *rest):
        _, mined, mined_scores, *_ = rest
        seen.update(validation=examples, scores=scores, mined=mined, mined_scores=mined_scores)
        return real_point(examples, scores, *rest)

    real_fit, real_point = module.fit, module.stricter_point
    monkeypatch.setattr(module, "fit", watched_fit)
    monkeypatch.setattr(module, "stricter_point", watched_point)
    return train(*args, **kwargs), seen


@pytest.mark.parametrize("scale", [0.25, 1.0, 1.5])
def test_the_chosen_strength_is_saved_with_the_adapter(monkeypatch, base, tmp_path, scale):
    options = quick(scales=[scale])
    trained, seen = observed_train(monkeypatch, toy_examples(), guard_settings(base), options, tmp_path / "one")
    assert trained.scale == scale
    loaded = Guard.load(guard_settings(base), tmp_path / "one")
    assert loaded.threshold == trained.threshold
    np.testing.assert_allclose(scores(loaded, seen["validation"]), seen["scores"], atol=1e-4)
    np.testing.assert_allclose(scores(loaded, seen["mined"]), seen["mined_scores"], atol=1e-4)
    assert {row["id"] for row in seen["mined"]} == set(seen["fitted"])  # there is no replay among them
    plain = scores(Guard.load(guard_settings(base)), seen["validation"])
    assert np.abs(plain - seen["scores"]).max() > 0.01


def test_the_best_strength_on_the_held_out_examples_is_kept(monkeypatch, base, tmp_path):
    by_scale = iter([0.1, 0.2, 0.9, 0.4, None])  # the look at the end is at full strength; the default comes last
    monkeypatch.setattr(module, "ranking", lambda *args: next(by_scale, 0.9))
    options = quick(scales=[0.25, 0.5, 0.75])
    trained, seen = observed_train(monkeypatch, toy_examples(), guard_settings(base), options, tmp_path / "one")
    assert trained.scale == 0.5
    assert [t.validation_auprc for t in trained.trials] == [0.2, 0.9, 0.4]
    assert [t.chosen for t in trained.trials] == [False, True, False]
    loaded = Guard.load(guard_settings(base), tmp_path / "one")
    np.testing.assert_allclose(scores(loaded, seen["validation"]), seen["scores"], atol=1e-4)


@pytest.mark.parametrize(("scale", "options"), [(0.5, {}), (1.0, {"top_layers": 0.5, "rank": 3})])
def test_a_second_round_goes_on_from_the_first_adapter(monkeypatch, base, toy, tmp_path, scale, options):
    _, first, _ = toy
    default = guard_settings(base, adapter=str(first))
    second = quick(scales=[scale], learning_rate=1e-3, **options)
    trained, seen = observed_train(monkeypatch, toy_examples(), default, second, tmp_path / "two")
    assert trained.validation_auprc_baseline > 0.9
    loaded = Guard.load(guard_settings(base), tmp_path / "two")
    np.testing.assert_allclose(scores(loaded, seen["validation"]), seen["scores"], atol=1e-4)
    before = scores(Guard.load(guard_settings(base), first), seen["validation"])
    assert np.abs(before - seen["scores"]).max() > 0.01


def product(folder):
    """What the adapter in `folder` adds to each weight."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in weights if name.endswith("lora_A.weight")]
    strength = config["lora_alpha"] / config["r"]
    return {n: strength * weights[f"{n}.lora_B.weight"] @ weights[f"{n}.lora_A.weight"] for n in names}


def test_the_strength_of_a_second_round_lies_between_both_guards(base, toy, tmp_path):
    _, first, _ = toy
    default = guard_settings(base, adapter=str(first))
    for scale in (1.0, 0.25, 1e-6):
        train(toy_examples(), default, quick(scales=[scale], learning_rate=1e-3), tmp_path / str(scale))
    old, (full, quarter, none) = product(first), (product(tmp_path / str(scale)) for scale in (1.0, 0.25, 1e-6))
    for name, weight in old.items():
        torch.testing.assert_close(none[name], weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(quarter[name], weight + 0.25 * (full[name] - weight), atol=1e-5, rtol=1e-4)
        assert (full[name] - weight).abs().max() > 1e-4


def test_what_is_held_out_is_not_fitted(monkeypatch, base, tmp_path):
    examples = [r | {"group": f"g{n // 3}"} for n, r in enumerate(toy_examples())]
    _, seen = observed_train(monkeypatch, examples, guard_settings(base), quick(), tmp_path / "one")
    groups = {r["id"]: r["group"] for r in examples}
    fitted, held_out = ({groups[i] for i in ids} for ids in (seen["fitted"], [r["id"] for r in seen["validation"]]))
    assert fitted
    assert held_out
    assert not fitted & held_out


def test_the_same_seed_gives_the_same_adapter_and_another_does_not(base, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(toy_examples(20), guard_settings(base), quick(validation=0.1), tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_responses_are_trained_as_responses(monkeypatch, base, tmp_path):
    examples = [r | {"response": f"answer {r['id']}"} if n % 2 else r for n, r in enumerate(toy_examples())]
    calls = []
    real = module.load_renderer

    def watched(settings):
        renderer = real(settings)
        for name in ("render_all", "render_windows"):  # examples that are fitted, and those of the validation split
            real_one = getattr(renderer, name)
            setattr(renderer, name, lambda rows, real_one=real_one: calls.extend(rows) or real_one(rows))
        return renderer

    monkeypatch.setattr(module, "load_renderer", watched)
    train(examples, guard_settings(base), quick(), tmp_path / "one")
    assert {(r["prompt"], r["response"]) for r in examples} == set(calls)


@pytest.mark.parametrize(("target", "kind"), [(1.0, "unsafe"), (0.0, "safe"), (0.5, "safe")])
def test_examples_of_one_kind_are_refused(base, tmp_path, target, kind):
    examples = [r | {"target": target} for r in toy_examples()]
    with pytest.raises(GuardLoopError, match=f"every example is {kind}"):
        train(examples, guard_settings(base), quick(), tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_no_examples_are_refused(base, tmp_path):
    with pytest.raises(GuardLoopError, match="there are no examples"):
        train([], guard_settings(base), quick(), tmp_path / "one")


def test_only_the_top_layers_get_an_adapter_where_asked(monkeypatch, base, tmp_path):
    options = quick(top_layers=0.5)
    _, seen = observed_train(monkeypatch, toy_examples(), guard_settings(base), options, tmp_path / "one")
    weights = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert all(".layers.1." in name for name in weights)
    assert len(weights) == 2 * 7  # every linear layer
    loaded = Guard.load(guard_settings(base), tmp_path / "one")
    np.testing.assert_allclose(scores(loaded, seen["validation"]), seen["scores"], atol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scales": []},
        {"scales": [0.0]},
        {"scales": [-1.0]},
        {"processes": 1, "sharded": True},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        TrainingSettings(**wrong)


def test_a_validation_set_without_positives_still_gives_an_adapter(base, tmp_path):
    examples = toy_examples()
    _, held_out = split(examples, 0.2, 0)
    dropped = {r["id"] for r in held_out if r["target"] > 0.5}
    kept = [r for r in examples if r["id"] not in dropped]
    trained = train(kept, guard_settings(base), quick(), tmp_path / "one")
    assert trained.validation_auprc is None
    assert (tmp_path / "one" / "adapter_model.safetensors").is_file()


rows = st.lists(st.sampled_from("abcdefghij"), max_size=40).map(
    lambda groups: [{"id": str(n), "group": group} for n, group in enumerate(groups)]
)


@given(rows=rows, share=st.floats(0.05, 0.85), seed=st.integers(0, 9))
@PROPERTY
def test_a_split_keeps_groups_whole(rows, share, seed):
    training, held_out = split(rows, share, seed)
    assert sorted(r["id"] for r in [*training, *held_out]) == sorted(r["id"] for r in rows)
    assert not {r["group"] for r in training} & {r["group"] for r in held_out}
    assert split(rows, share, seed) == (training, held_out)
    assert split(rows[::-1], share, seed)[1] == held_out[::-1]


def test_a_split_holds_out_about_its_share_and_another_seed_another_part():
    rows = [{"id": str(n), "group": str(n)} for n in range(2000)]
    _, one = split(rows, 0.2, 1)
    _, two = split(rows, 0.2, 2)
    assert 340 < len(one) < 460
    assert one != two


score = st.floats(-20, 20, width=32)
held_out = st.lists(
    st.tuples(
        score,
        score,
        st.sampled_from([0.0, 0.25, 0.9, 1.0]),
        st.sampled_from(["hard_negative", "passed", "positive", "replay_blocked"]),
    ),
    max_size=40,
)


@given(values=held_out, baseline_threshold=st.floats(-5, 5), share=st.floats(0, 0.9))
@PROPERTY
def test_the_operating_point_flags_few_more_of_the_safe_prompts_and_as_many_as_it_may(
    values, baseline_threshold, share
):
    examples = [{"kind": kind, "target": target} for _, _, target, kind in values]
    after, before = (np.array([v[i] for v in values], dtype=np.float32) for i in (0, 1))
    threshold = operating_point(examples, after, before, baseline_threshold, share)
    never = np.array([float(row["kind"] in ("hard_negative", "passed")) for row in examples])
    weighed = np.array([0.0 if row["kind"] == "replay_blocked" else 1 - row["target"] for row in examples])
    guesses = [safe for safe in (never, weighed) if safe.any()]
    if not guesses:
        assert threshold == baseline_threshold
        return
    one_more = []
    for safe in guesses:
        allowed = safe[before > baseline_threshold].sum() + share * safe.sum()
        assert safe[after > threshold].sum() <= allowed + 1e-6
        let_through = after[(safe > 0) & (after < threshold)]
        one_more.append(safe[after >= let_through.max()].sum() > allowed - 1e-6 or allowed >= safe.sum() - 1e-6)
    assert any(one_more)  # it is no higher than it must be


@given(values=held_out, taught=held_out, baseline_threshold=st.floats(-5, 5), share=st.floats(0, 0.9))
@PROPERTY
def test_the_threshold_holds_for_the_held_out_and_with_the_taught(values, taught, baseline_threshold, share):
    after, before = (np.array([v[i] for v in values], dtype=np.float32) for i in (0, 1))
    more = np.array([v[0] for v in taught], dtype=np.float32)
    held, known = ([{"kind": kind, "target": target} for _, _, target, kind in rows] for rows in (values, taught))
    threshold = stricter_point(held, after, before, known, more, baseline_threshold, share)
    for examples, scores in ((held, after), ([*held, *known], np.concatenate([after, more]))):
        safe = np.array([row["kind"] in ("hard_negative", "passed") for row in examples], dtype=bool)
        flagged_before = (safe[: len(held)] & (before > baseline_threshold)).sum()
        assert (safe & (scores > threshold)).sum() <= flagged_before + share * safe.sum() + 1e-6
    assert threshold >= operating_point(held, after, before, baseline_threshold, share)


def test_the_taught_prompts_keep_a_threshold_from_few_prompts_from_being_off_by_chance():
    draw, share = np.random.default_rng(0), 0.02
    beyond = {"alone": [], "both": []}
    for _ in range(200):
        held, known = draw.normal(size=60), draw.normal(-0.1, size=240)  # it lets through what it was taught a bit more
        rows = [{"kind": "passed", "target": 0.0}] * 300
        alone = operating_point(rows[:60], held, np.full(60, -9.0), 0.0, share)
        both = stricter_point(rows[:60], held, np.full(60, -9.0), rows[60:], known, 0.0, share)
        for name, point in (("alone", alone), ("both", both)):
            beyond[name].append(norm.sf(point) > 2 * share)
    assert np.mean(beyond["alone"]) > 0.2
    assert np.mean(beyond["both"]) < np.mean(beyond["alone"]) / 2


def test_the_operating_point_holds_where_safe_prompts_that_look_unsafe_draw_blocked_responses():
    draw = np.random.default_rng(0)
    unsafe = draw.random(4000) < 0.2
    scores = draw.normal(np.where(unsafe, 2.0, 0.0))
    if_safe = 1 / (1 + np.exp(-scores))
    blocked = draw.random(4000) < np.where(unsafe, 0.95, if_safe)
    odds = 0.2 / 0.8 * np.exp(2 * scores - 2) * np.where(blocked, 0.95 / if_safe, 0.05 / (1 - if_safe))
    examples = [
        {"kind": "positive" if b else "passed", "target": t}
        for b, t in zip(blocked, (odds / (1 + odds)).tolist(), strict=True)
    ]
    threshold = operating_point(examples, scores, np.full(4000, -1.0), 0.0, 0.05)
    assert 0.04 < (scores[~unsafe] > threshold).mean() < 0.06
    never_blocked = np.quantile(scores[~blocked], 0.95)
    assert (scores[~unsafe] > never_blocked).mean() > 0.1


@given(values=st.lists(st.tuples(score, st.floats(0, 1, width=32)), min_size=1, max_size=30))
@PROPERTY
def test_ranking_asks_for_both_kinds_and_knows_the_best_order(values):
    targets = [target for _, target in values]
    examples = [{"kind": "positive", "target": target} for target in targets]
    found = ranking(examples, np.array([m for m, _ in values], dtype=np.float32))
    one_kind = len({target > 0.5 for target in targets}) == 1
    assert (found is None) == one_kind
    assume(not one_kind)
    assert 0 < found <= 1
    assert ranking(examples, np.array(targets, dtype=np.float32)) == pytest.approx(1)


def test_ranking_leaves_replay_out():
    examples = [{"kind": "positive", "target": 1.0}, {"kind": "passed", "target": 0.0}]
    replayed = [*examples, {"kind": "replay_traffic", "target": 0.0}]
    assert ranking(examples, np.array([1.0, 0.0])) == ranking(replayed, np.array([1.0, 0.0, 9.0])) == 1


@given(scale=st.floats(0.05, 2))
@settings(PROPERTY, max_examples=cases(10))
def test_a_scaled_adapter_is_itself_again_afterwards(scale):
    model = fresh_adapter(with_lora(tiny_llama()), TrainingSettings(rank=4))
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B[TRAINED].weight)
    before = [{name: layer.get_delta_weight(name) for name in layer.lora_A} for layer in layers]
    with scaled(model, scale):
        for layer, deltas in zip(layers, before, strict=True):
            torch.testing.assert_close(layer.get_delta_weight(TRAINED), scale * deltas[TRAINED])
            assert torch.equal(layer.get_delta_weight("default"), deltas["default"])
    for layer, deltas in zip(layers, before, strict=True):
        assert all(torch.equal(layer.get_delta_weight(name), delta) for name, delta in deltas.items())


def test_another_strength_of_the_adapter_needs_no_other_code(monkeypatch):
    torch._dynamo.reset()
    compiled = CompileCounter()
    monkeypatch.setattr(packed, "_fresh_compile", lambda layer: torch.compile(layer, backend=compiled, dynamic=False))
    model = fresh_adapter(tiny_llama(), TrainingSettings(rank=2)).eval()
    counts = []
    for scale in (1.0, 0.5):
        with scaled(model, scale), torch.inference_mode():
            packed.PackedForward(model, [1, 2, 3], 128)([[4, 5], [6]])
        counts.append(compiled.frame_count)
    assert counts[0] == counts[1] > 0


def test_the_default_guards_own_adapter_is_trained_on_as_it_answers():
    model = fresh_adapter(with_lora(tiny_llama(), lora_dropout=0.9), TrainingSettings(rank=4), dropout=0.0)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.train()(ids).logits, model.eval()(ids).logits)


def test_the_saved_weights_are_finite_and_of_the_adapter_only(toy):
    _, folder, _ = toy
    weights = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name and torch.isfinite(w).all() for name, w in weights.items())


def test_what_was_learnt_of_prompts_leaves_both_roles_scored(base, toy):
    guard = Guard.load(guard_settings(base), toy[1])
    assert np.isfinite(scores(guard, [*user("a bomb", "a cake"), *agent(("hello", "a cake"))])).all()


def test_the_best_of_several_seeds_is_kept(base, tmp_path):
    options = quick(seeds=2, scales=[0.5, 1.0])
    trained = train(toy_examples(), guard_settings(base), options, tmp_path / "both", seed=4)
    assert [(t.seed, t.scale) for t in trained.trials] == [(4, 0.5), (4, 1.0), (5, 0.5), (5, 1.0)]
    (chosen,) = [t for t in trained.trials if t.chosen]
    assert chosen.validation_auprc == max(t.validation_auprc for t in trained.trials) == trained.validation_auprc
    assert (trained.seed, trained.scale) == (chosen.seed, chosen.scale)
    first = train(toy_examples(), guard_settings(base), quick(scales=[0.5, 1.0]), tmp_path / "one", seed=4)
    assert [t.validation_auprc for t in first.trials] == [t.validation_auprc for t in trained.trials[:2]]


def test_an_earlier_seed_that_was_better_is_the_one_saved(monkeypatch, base, tmp_path):
    by_seed = iter([0.9, 0.9, 0.5, 0.5])  # each is looked at when it ends, and ranked
    monkeypatch.setattr(module, "ranking", lambda *args: next(by_seed, 0.1))
    trained, seen = observed_train(monkeypatch, toy_examples(), guard_settings(base), quick(seeds=2), tmp_path / "one")
    assert trained.seed == 0
    loaded = Guard.load(guard_settings(base), tmp_path / "one")
    np.testing.assert_allclose(scores(loaded, seen["validation"]), seen["scores"], atol=1e-4)


def test_the_card_tells_where_the_adapter_comes_from(base, toy):
    trained, folder, _ = toy
    card = (folder / "README.md").read_text()
    metadata = json.loads((folder / "guard.json").read_text())
    assert card.startswith("---\nlibrary_name: peft\ntags:")
    assert metadata["data_hash"] in card
    assert f"| {trained.seed} | 1.0 | {trained.validation_auprc:.3f} |" in card
    assert "| learning_rate | 0.008 |" in card
    assert f"`{base}`" in card


@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_is_trained_and_scored_alike(monkeypatch, base, tmp_path, quantization):
    guard = guard_settings(base, quantization=quantization)
    options = quick(epochs=3, learning_rate=8e-3)
    trained, seen = observed_train(monkeypatch, toy_examples(), guard, options, tmp_path / "one")
    assert trained.last_loss < 0.5 * trained.first_loss
    loaded = Guard.load(guard, tmp_path / "one")
    # on CPUs with AVX512-BF16, bitsandbytes scores 4-bit weights in bfloat16 where no gradient is wanted
    rounding = 0.1 if quantization == "nf4" else 1e-3
    np.testing.assert_allclose(scores(loaded, seen["validation"]), seen["scores"], atol=rounding)


def test_gradient_checkpointing_changes_no_bit_where_the_same_is_computed(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Renderer, "_prefix", lambda self, turns: [])  # with checkpointing, prompts are computed whole
    for name, share in (("off", 0.0), ("on", 1.0)):
        options = quick(gradient_checkpointing=share)
        train(toy_examples(20), guard_settings(base), options, tmp_path / name)
    off, on = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("off", "on"))
    assert on.keys() == off.keys()
    assert all(torch.equal(on[name], weight) for name, weight in off.items())


@given(true=st.floats(0.2, 5), seed=st.integers(0, 9))
@PROPERTY
def test_the_temperature_is_the_one_that_made_the_targets(true, seed):
    found = np.random.default_rng(seed).normal(0, 3, 50)
    examples = [{"target": 1 / (1 + np.exp(-m / true)), "weight": 1.0} for m in found]
    assert temperature(examples, found) == pytest.approx(true, rel=1e-2)
    assert temperature([], np.zeros(0)) == 1


def test_a_stage_is_watched_in_mlflow_on_the_terminal_and_in_the_log(base, tmp_path, monkeypatch, caplog):
    database = mlflow_database(tmp_path / "mlflow.db")
    events = tmp_path / "events.jsonl"
    monkeypatch.setenv("GUARDLOOP_RUN_ID", "run-1")
    monkeypatch.setenv("GUARDLOOP_EVENTS", str(events))
    write_table(toy_examples(), EXAMPLE, tmp_path / EXAMPLES)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    registry = RegistrySettings()
    training = quick(seeds=2).plain()
    figures = train_guard(tmp_path, tmp_path / "one", guard_settings(base).plain(), training, registry.plain())
    client = MlflowClient(database)
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    watched = {"train_loss", "gradient_norm", "learning_rate", "examples_per_second", "tokens_per_second"}
    watched |= {"memory_gib", "validation_auprc", "benign_fpr"}
    assert set(run.data.metrics) == {f"seed_{seed}/{name}" for seed in (0, 1) for name in watched}
    assert len(client.get_metric_history(run.info.run_id, "seed_1/train_loss")) == figures["steps"]
    reported = [json.loads(line) for line in events.read_text().splitlines()]
    assert any(re.search(r"loss [\d.]+, [\d.]+ examples/s", event.get("note", "")) for event in reported)
    assert re.search(r"training on \d+ examples \(\d+ unsafe\), \d+ more for validation: 7 steps", caplog.text)
    assert re.search(r"AUPRC on the validation examples: 0\.\d+, the baseline's 0\.\d+\. Threshold", caplog.text)
