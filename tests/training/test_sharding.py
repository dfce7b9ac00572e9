"""A guard that is split among two processes is trained, scored and saved as a whole one is."""

import os
import socket
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from support.models import renderer_of, tiny_llama, with_lora
from support.processes import start
from torch.distributed.tensor import DTensor
from training.test_fit import encoded, gradients
from training.test_train import guard_settings, quick, row, toy_examples

from guardloop.core.errors import GuardLoopError
from guardloop.guard.prompt.verdict import label_tokens
from guardloop.training import fit as fit_module
from guardloop.training import train as train_module
from guardloop.training import trainer as trainer_module
from guardloop.training.adapter import fresh_adapter
from guardloop.training.checkpoint import Checkpoints
from guardloop.training.examples import split
from guardloop.training.fit import fit
from guardloop.training.packs import Packs
from guardloop.training.settings import TrainingSettings
from guardloop.training.sharding import shard
from guardloop.training.train import train
from guardloop.training.trainer import Trainer

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
PATIENCE = 600  # seconds, after which two processes wait for each other in vain


def in_two_processes(work, folder):
    """What `work` returns in each of two processes that reduce and gather together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}

    def run(rank):
        os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
        PartialState._reset_state()
        PartialState(cpu=True)
        torch.save(work(), folder / f"{rank}.pt")
        torch.distributed.destroy_process_group()

    processes = [start(run, rank) for rank in (0, 1)]
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()
    assert [p.exitcode for p in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def tiny(sharded):
    """A tiny guard with an adapter, split among the processes or whole."""
    model = with_lora(tiny_llama())
    if sharded:
        shard(model, CPU)
    return model


def adapter(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_close(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.linalg.norm(found[name] - tensor) <= tolerance * torch.linalg.norm(tensor), name


def test_the_layers_are_split_and_all_else_is_whole(tmp_path):
    def work():
        model = tiny(sharded=True)
        layers = model.get_base_model().model.layers
        base = {name: p for name, p in layers.named_parameters() if "lora_" not in name}
        assert all(isinstance(p, DTensor) for p in base.values())
        assert not any(isinstance(p, DTensor) for p in set(model.parameters()) - set(base.values()))
        return sum(p.to_local().untyped_storage().nbytes() for p in base.values())

    layers = tiny_llama().model.layers
    assert in_two_processes(work, tmp_path) == [sum(p.nbytes for p in layers.parameters()) / 2] * 2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_split_guard_is_trained_as_a_whole_one(tmp_path, checkpointed):
    renderer = renderer_of("guardloop")
    labels, examples = label_tokens(renderer), encoded(renderer)
    # ten examples: in steps of three, one process computes two pieces and the other one, and in the last step none
    settings = TrainingSettings(batch_size=3, learning_rate=1e-3)

    def work(sharded=True):
        trainer_module.PACK_TOKENS = 1 if sharded else 8192
        model = tiny(sharded)
        if checkpointed:
            model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        fitted = fit(model, renderer.prefixes, labels, examples, settings)
        return [step.loss for step in fitted.steps], adapter(model)

    expected_losses, expected = work(sharded=False)
    for losses, found in in_two_processes(work, tmp_path):
        assert losses == pytest.approx(expected_losses, rel=1e-4)
        assert_close(found, expected)


@pytest.mark.parametrize("checkpointed", [0.0, 0.5])
def test_packs_of_a_split_guard_have_the_gradients_of_a_whole_one(tmp_path, checkpointed):
    renderer = renderer_of("guardloop")
    labels, examples = label_tokens(renderer), encoded(renderer)
    long = replace(examples[0], tokens=examples[0].tokens * 3)  # in no pack, and in one process only
    batch = [*encoded(renderer), long]

    def work(sharded=True):
        model = tiny(sharded)
        trainer = Trainer(model, renderer.prefixes, labels, TrainingSettings())
        if sharded:
            trainer.packs = trainer.learner.packs = Packs(
                model, renderer.prefixes, labels.before, max_tokens=1024, checkpointed=checkpointed, compiled=False
            )
        loss, _ = trainer._gradients(batch, 1)
        shares = [batch[rank::2] for rank in (0, 1)]
        return [len(trainer._fitting(share)) for share in shares], loss, gradients(model)

    _, expected_loss, expected = work(sharded=False)
    ((count, other_count), *one), (_, *other) = in_two_processes(work, tmp_path)
    assert count != other_count
    for loss, found in (one, other):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert_close(found, expected)


def test_the_training_of_a_split_guard_goes_on_from_a_checkpoint(tmp_path):
    renderer = renderer_of("guardloop")
    labels, examples = label_tokens(renderer), encoded(renderer)
    settings = TrainingSettings(batch_size=3, learning_rate=1e-3)

    def training(checkpoints, stop_at=None):
        fit_module.CHECKPOINT_STEPS = 1
        model, steps = tiny(sharded=True), []

        def on_step(step):
            steps.append(step.number)
            if step.number == stop_at:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            fit(model, renderer.prefixes, labels, examples, settings, on_step=on_step, checkpoints=checkpoints)
        return steps, adapter(model)

    kept = Checkpoints(str(tmp_path), "key")
    (_, expected), _ = in_two_processes(lambda: training(None), tmp_path)
    in_two_processes(lambda: training(kept, stop_at=2), tmp_path)
    for steps, found in in_two_processes(lambda: training(kept), tmp_path):
        assert steps == [3, 4]
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("checkpointed", [0.0, 1.0])
def test_a_split_guard_is_scored_chosen_and_saved_as_a_whole_one(base, tmp_path, monkeypatch, checkpointed):
    monkeypatch.setattr(train_module, "fresh_adapter", partial(fresh_adapter, dropout=0.0))
    options = {"batch_size": 5, "gradient_checkpointing": checkpointed}
    guard = guard_settings(base)
    long = [row(f"long-{n}", "a bomb " * 150, 1.0, "positive") for n in range(99)]
    # of the validation examples it is a batch by itself, and one process has it
    examples = [*toy_examples(15), split(long, quick().validation, 0)[1][0]]

    def work():
        train_module.fresh_adapter = partial(fresh_adapter, dropout=0.0)
        return train(examples, guard, quick(processes=2, sharded=True, **options), tmp_path / "split")

    one, other = in_two_processes(work, tmp_path)
    assert one == other
    whole = train(examples, guard, quick(**options), tmp_path / "whole")
    assert np.isclose(one.threshold, whole.threshold, rtol=1e-3)
    assert one.validation_auprc == pytest.approx(whole.validation_auprc)
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("split", "whole"))
    assert_close(found, expected, 1e-3)


def test_a_quantized_guard_is_not_split():
    model = tiny_llama()
    model.config.quantization_config = {"load_in_4bit": True}
    with pytest.raises(GuardLoopError, match="quantized guard") as error:
        shard(model, CPU)
    assert "guard.quantization" in error.value.remedy
