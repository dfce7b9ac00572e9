"""A training that is stopped, at any moment and by any means, goes on and ends as if it had not been."""

import json
import logging
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from support.models import renderer_of, tiny_llama, with_lora
from support.services import S3Server
from training.test_train import guard_settings, quick, toy_examples

from guardloop.core.records import EXAMPLE, write_table
from guardloop.guard.prompt.verdict import label_tokens
from guardloop.stages import EXAMPLES, train_guard
from guardloop.training.adapter import fresh_adapter
from guardloop.training.checkpoint import Checkpoints
from guardloop.training.fit import Look, fit
from guardloop.training.settings import TrainingSettings
from guardloop.training.train import encode, train

pytestmark = pytest.mark.slow

ADAPTER = "adapter_model.safetensors"


class Stopped(Exception):  # noqa: N818
    """Stands for whatever ends a process."""


def run(place, stop_at=None, **options):
    """Train a tiny guard with checkpoints at `place`; returns what came of it, the adapter, and the steps taken."""
    values = {"batch_size": 8, "epochs": 2, "rank": 2, "dropout": 0.2, "checkpoint_steps": 1, "learning_rate": 1e-3}
    settings = TrainingSettings(**values | {"eval_steps": 3, "patience": 0} | options)
    renderer = renderer_of("guardloop")
    torch.manual_seed(settings.seed)
    model = fresh_adapter(tiny_llama(), settings)
    taken = []

    def on_step(step):
        taken.append(step.number)
        if step.number == stop_at:
            raise Stopped

    def look(step):
        return Look(step, {3: 0.5, 6: 0.9}.get(step, 0.7), 0.0)

    examples = [encode(row, renderer) for row in toy_examples(20)]
    args = (model, renderer.prefixes, label_tokens(renderer), examples, settings)
    fitted = fit(*args, on_step=on_step, look=look, checkpoints=Checkpoints(str(place), "key") if place else None)
    return fitted, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, taken


def losses(fitted):
    return [step.loss for step in fitted.steps]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("stops", "every"), [((1,), 1), ((4,), 1), ((9,), 1), ((7,), 4), ((2, 5, 6, 8), 1), ((2,), 4)])
def test_a_training_goes_on_from_its_last_checkpoint(tmp_path, stops, every):
    expected, adapter, _ = run(None)
    assert len(expected.steps) == 10
    for stop in stops:
        with pytest.raises(Stopped):
            run(tmp_path, stop, checkpoint_steps=every)
    fitted, found, taken = run(tmp_path, checkpoint_steps=every)
    assert taken[0] == stops[-1] // every * every + 1
    assert losses(fitted) == losses(expected)
    assert fitted.best == expected.best
    assert fitted.best.step == 6
    assert same(found, adapter)


def test_the_patience_of_a_training_is_not_renewed(tmp_path):
    options = {"eval_steps": 1, "patience": 3}
    expected, adapter, _ = run(None, **options)
    assert len(expected.steps) == 4
    with pytest.raises(Stopped):
        run(tmp_path, 3, **options)
    fitted, found, _ = run(tmp_path, **options)
    assert losses(fitted) == losses(expected)
    assert same(found, adapter)


def test_a_store_keeps_checkpoints_too(tmp_path, monkeypatch, caplog):
    _, adapter, _ = run(None)
    with S3Server(tmp_path / "s3") as store:
        for name, value in store.client_environment.items():
            monkeypatch.setenv(name, value)
        place = f"s3://{store.bucket}/checkpoints"
        with pytest.raises(Stopped):
            run(place, 5)
        with caplog.at_level(logging.INFO, "guardloop"):
            _, found, taken = run(place)
    assert taken[0] == 6
    assert f"going on after step 5, from {place}/key.safetensors" in caplog.text
    assert same(found, adapter)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 64])
def test_a_broken_checkpoint_means_a_new_beginning(tmp_path, damage, caplog):
    with pytest.raises(Stopped):
        run(tmp_path, 5)
    path = tmp_path / "key.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    _, found, taken = run(tmp_path)
    assert "is broken; training begins anew" in caplog.text
    assert taken[0] == 1
    assert same(found, run(None)[1])


def test_a_checkpoint_that_cannot_be_written_does_not_stop_the_training(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    _, found, _ = run(tmp_path / "file" / "below")
    assert "no checkpoint was kept, training goes on" in caplog.text
    assert same(found, run(None)[1])


def test_another_training_does_not_go_on_from_it(base, tmp_path):
    options = {"checkpoints": str(tmp_path / "kept"), "checkpoint_steps": 1}

    def stop(seed, step):
        raise Stopped

    guard = guard_settings(base)
    for examples, settings in (
        (toy_examples(20), quick(**options)),
        (toy_examples(21), quick(**options)),
        (toy_examples(20), quick(**options, seed=1)),
        (toy_examples(20), quick(**options, learning_rate=1e-3)),
        (toy_examples(20), quick(**options)),
    ):
        with pytest.raises(Stopped):
            train(examples, guard, settings, tmp_path / "one", stop)
    assert len(list((tmp_path / "kept").iterdir())) == 4


def test_a_policy_or_default_adapter_that_was_edited_makes_another_training(base, tmp_path):
    options = quick(checkpoints=str(tmp_path / "kept"), checkpoint_steps=1, min_examples=2)
    policy, adapter = tmp_path / "policy.yaml", tmp_path / "adapter"
    policy.write_text("S1: {name: Weapons, description: a bomb}")
    with_lora(tiny_llama()).save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    guard = guard_settings(base, policy=str(policy), adapter=str(adapter))

    def stop(seed, step):
        raise Stopped

    for edit in (
        lambda: None,
        lambda: policy.write_text("S1: {name: Weapons, description: a knife}"),
        lambda: (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1})),
        lambda: (adapter / "guard.json").write_text('{"threshold": 0.5}'),
    ):
        edit()
        with pytest.raises(Stopped):
            train(toy_examples(10), guard, options, tmp_path / "one", stop)
    assert len(list((tmp_path / "kept").iterdir())) == 4


def killed_at(base, folder, step_to_die):
    """Train in a process of its own, which is killed a random moment after `step_to_die` began."""
    fork = multiprocessing.get_context("fork")
    steps = fork.Value("i", 0)

    def work():
        torch.set_num_threads(1)
        options = quick(checkpoints=str(folder / "kept"), checkpoint_steps=1, batch_size=4, eval_steps=7, dropout=0.1)
        train(
            toy_examples(60),
            guard_settings(base),
            options,
            folder,
            lambda seed, step: setattr(steps, "value", step.number),
        )
        os._exit(0)

    process = fork.Process(target=work)
    process.start()
    while process.is_alive() and (step_to_die is None or steps.value < step_to_die):
        time.sleep(0.001)
    if step_to_die is not None:
        time.sleep(random.random() * 0.03)
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode, steps.value


def test_a_training_killed_at_random_steps_ends_with_the_same_adapter(base, tmp_path):
    assert killed_at(base, tmp_path / "whole", None)[0] == 0
    random.seed(os.getpid())
    for step in sorted(random.sample(range(1, 12), 4)):
        code, reached = killed_at(base, tmp_path / "torn", step)
        assert code == -signal.SIGKILL, reached
        assert (tmp_path / "torn" / "kept").is_dir()
        assert not (tmp_path / "torn" / ADAPTER).exists()
    assert killed_at(base, tmp_path / "torn", None)[0] == 0
    for name in (ADAPTER, "adapter_config.json"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "torn" / "kept").iterdir())


def test_two_processes_train_the_adapter_of_one(base, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_table(toy_examples(21), EXAMPLE, tmp_path / EXAMPLES)
    guard = guard_settings(base).plain()
    figures = {}
    for count in (1, 2):
        options = quick(  # at this rate the threshold does not come out near 0, where rounding is large beside it
            processes=count,
            learning_rate=5e-3,
            dropout=0.0,
            batch_size=5,
            micro_rows=2,
            seeds=2,
            checkpoints=str(tmp_path / "kept"),
        )
        figures[count] = train_guard(tmp_path, tmp_path / str(count), guard, options.plain(), {})
    one, two = (load_file(tmp_path / str(count) / ADAPTER) for count in (1, 2))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=1e-5)
    assert figures[2] == pytest.approx(figures[1], rel=1e-4)
