"""A training that is stopped, at any moment and by any means, goes on and ends as if it had not been."""

import json
import logging
import os
import random
import signal
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from support.models import renderer_of, tiny_llama, with_lora
from support.processes import start
from support.root import ROOT
from support.services import S3Server
from support.training_examples import guard_settings, quick, toy_examples

from guardloop.core.records import EXAMPLE, write_table
from guardloop.guard.prompt.verdict import label_tokens
from guardloop.stages import EXAMPLES, train_guard
from guardloop.stages import training as stage_module
from guardloop.training import fit as fit_module
from guardloop.training import train as train_module
from guardloop.training import trainer as trainer_module
from guardloop.training.adapter import fresh_adapter
from guardloop.training.checkpoint import Checkpoints
from guardloop.training.examples import encode
from guardloop.training.fit import fit
from guardloop.training.processes import train_in_processes
from guardloop.training.settings import TrainingSettings
from guardloop.training.train import train
from guardloop.training.trainer import ValidationResult

pytestmark = pytest.mark.slow

ADAPTER = "adapter_model.safetensors"


class Stopped(Exception):  # noqa: N818
    """Stands for whatever ends a process."""


@pytest.fixture(autouse=True)
def checkpoints(monkeypatch, tmp_path):
    """Where checkpoints are kept, of each step."""
    monkeypatch.setattr(fit_module, "CHECKPOINT_STEPS", 1)
    monkeypatch.setenv("GUARDLOOP_WORK", str(tmp_path / "kept"))
    return tmp_path / "kept"


def run(place, stop_at=None, dropout=0.2):
    """Train a tiny guard with checkpoints at `place`; returns what came of it, the adapter, and the steps taken."""
    settings = TrainingSettings(batch_size=8, epochs=2, rank=2, learning_rate=1e-3)
    renderer = renderer_of("guardloop")
    torch.manual_seed(0)
    model = fresh_adapter(tiny_llama(), settings, dropout)
    taken = []

    def on_step(step):
        taken.append(step.number)
        if step.number == stop_at:
            raise Stopped

    def validate(step):
        return ValidationResult(step, {5: 0.9}.get(step, 0.7), 0.0)

    args = (model, renderer.prefixes, label_tokens(renderer), encode(toy_examples(20), renderer), settings)
    kept = Checkpoints(str(place), "key") if place else None
    fitted = fit(*args, on_step=on_step, validate=validate, checkpoints=kept)
    return fitted, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, taken


@pytest.fixture(scope="module")
def undisturbed():
    """What comes of the training of `run` that nothing stops."""
    return run(None)


def losses(fitted):
    return [step.loss for step in fitted.steps]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("stops", "every"), [((1,), 1), ((9,), 1), ((7,), 4), ((2, 5, 6, 8), 1), ((2,), 4)])
def test_a_training_goes_on_from_its_last_checkpoint(undisturbed, tmp_path, monkeypatch, stops, every):
    monkeypatch.setattr(fit_module, "CHECKPOINT_STEPS", every)
    expected, adapter, _ = undisturbed
    assert len(expected.steps) == 10
    for stop in stops:
        with pytest.raises(Stopped):
            run(tmp_path, stop)
    fitted, found, taken = run(tmp_path)
    assert taken[0] == stops[-1] // every * every + 1
    assert losses(fitted) == losses(expected)
    assert fitted.best == expected.best
    assert fitted.best.step == 5
    assert same(found, adapter)


def test_a_training_goes_on_with_the_memory_that_it_had(tmp_path, monkeypatch):
    seen = []
    real = trainer_module.Trainer._fitting
    monkeypatch.setattr(
        trainer_module.Trainer, "_fitting", lambda self, rows: seen.append(self.max_tokens) or real(self, rows)
    )
    monkeypatch.setattr(trainer_module, "PACK_TOKENS", 300)
    with pytest.raises(Stopped):
        run(tmp_path, 2)
    monkeypatch.setattr(trainer_module, "PACK_TOKENS", 8192)
    run(tmp_path)
    assert set(seen) == {300}


def test_a_store_keeps_checkpoints_too(undisturbed, tmp_path, monkeypatch, caplog):
    adapter = undisturbed[1]
    with S3Server(tmp_path / "s3") as store:
        for name, value in store.client_environment.items():
            monkeypatch.setenv(name, value)
        place = f"s3://{store.bucket}/checkpoints"
        with pytest.raises(Stopped):
            run(place, 5)
        with caplog.at_level(logging.INFO, "guardloop"):
            _, found, taken = run(place)
    assert taken[0] == 6
    assert f"training goes on after step 5, from {place}/key.safetensors" in caplog.text
    assert same(found, adapter)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 64])
def test_a_broken_checkpoint_means_a_new_beginning(undisturbed, tmp_path, damage, caplog):
    with pytest.raises(Stopped):
        run(tmp_path, 5)
    path = tmp_path / "key.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    _, found, taken = run(tmp_path)
    assert "is broken: training begins anew" in caplog.text
    assert taken[0] == 1
    assert same(found, undisturbed[1])


def test_a_checkpoint_that_cannot_be_written_does_not_stop_the_training(undisturbed, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    _, found, _ = run(tmp_path / "file" / "below")
    assert "no checkpoint was kept; training goes on" in caplog.text
    assert same(found, undisturbed[1])


def test_another_training_does_not_go_on_from_it(base, tmp_path, checkpoints):
    def stop(seed, step):
        raise Stopped

    for examples, settings, seed in (
        (toy_examples(20), quick(), 0),
        (toy_examples(21), quick(), 0),
        (toy_examples(20), quick(), 1),
        (toy_examples(20), quick(learning_rate=1e-3), 0),
        (toy_examples(20), quick(), 0),
    ):
        with pytest.raises(Stopped):
            train(examples, guard_settings(base), settings, tmp_path / "one", stop, seed=seed)
    assert len(list(checkpoints.iterdir())) == 4


def test_a_policy_or_baseline_adapter_that_was_edited_makes_another_training(base, tmp_path, checkpoints):
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
            train(toy_examples(10), guard, quick(batch_size=4), tmp_path / "one", stop)
    assert len(list(checkpoints.iterdir())) == 4


def work(base, folder):
    """Train in a process of its own, with a checkpoint after each step."""
    fit_module.CHECKPOINT_STEPS = 1
    progress = folder.with_suffix(".steps")

    def on_step(seed, step):
        progress.write_text(str(step.number))

    train(toy_examples(40), guard_settings(base), quick(batch_size=4), folder, on_step)


def killed_at(base, folder, step_to_die):
    """Train in a process that is killed a random moment after `step_to_die` was taken; its exit code."""
    progress = folder.with_suffix(".steps")
    progress.write_text("")
    process = start(work, base, folder)
    while process.is_alive() and (step_to_die is None or int(progress.read_text() or 0) < step_to_die):
        time.sleep(0.001)
    if step_to_die is not None:
        time.sleep(random.random() * 0.03)
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode


def test_a_training_killed_at_random_steps_ends_with_the_same_adapter(base, tmp_path, checkpoints):
    assert killed_at(base, tmp_path / "whole", None) == 0
    random.seed(os.getpid())
    for step in sorted(random.sample(range(1, 12), 3)):
        assert killed_at(base, tmp_path / "torn", step) == -signal.SIGKILL
        assert list(checkpoints.iterdir())
        assert not (tmp_path / "torn" / ADAPTER).exists()
    assert killed_at(base, tmp_path / "torn", None) == 0
    for name in (ADAPTER, "adapter_config.json"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(checkpoints.iterdir())


def test_two_processes_train_the_adapter_of_one(base, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    monkeypatch.setattr(train_module, "fresh_adapter", partial(fresh_adapter, dropout=0.0))
    monkeypatch.setattr(
        stage_module, "train_in_processes", lambda count, _, rest: train_in_processes(count, "support.no_dropout", rest)
    )
    write_table(toy_examples(21), EXAMPLE, tmp_path / EXAMPLES)
    figures = {}
    for count in (1, 2):  # at this rate the threshold does not come out near 0, where rounding is large beside it
        options = quick(processes=count, learning_rate=5e-3, batch_size=5, seeds=2).plain()
        figures[count] = train_guard(tmp_path, tmp_path / str(count), guard_settings(base).plain(), options, {})
    one, two = (load_file(tmp_path / str(count) / ADAPTER) for count in (1, 2))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=1e-5)
    assert figures[2] == pytest.approx(figures[1], rel=1e-4)
