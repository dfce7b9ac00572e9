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
from support.models import renderer_of, tiny_llama
from support.processes import start
from support.training_examples import adapted, encoded, gradients, guard_settings, quick, row, toy_examples
from torch.distributed.tensor import DTensor

from guardloop.core.errors import GuardLoopError
from guardloop.guard.prompt.verdict import label_tokens
from guardloop.training import fit as fit_module
from guardloop.training import train as train_module
from guardloop.training import trainer as trainer_module
from guardloop.training.adapter import fresh_adapter, trained_tensors
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
SHARES = (0.0, 0.5)  # of the layers that are computed again in packs


def in_two_processes(folder, **works):
    """What each of `works` returns in each of two processes that reduce and gather together, by its name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}

    def run(rank):
        os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
        PartialState._reset_state()
        PartialState(cpu=True)
        torch.save({name: work() for name, work in works.items()}, folder / f"{rank}.pt")
        torch.distributed.destroy_process_group()

    processes = [start(run, rank) for rank in (0, 1)]
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()
    assert [p.exitcode for p in processes] == [0, 0]
    one, other = (torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    return {name: (one[name], other[name]) for name in works}


def tiny(sharded):
    """A tiny guard with an adapter, split among the processes or whole."""
    model = adapted()
    if sharded:
        shard(model, CPU)
    return model


def assert_close(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.linalg.norm(found[name] - tensor) <= tolerance * torch.linalg.norm(tensor), name


def split_bytes():
    """How much of the layers' weights this process holds."""
    model = tiny(sharded=True)
    layers = model.get_base_model().model.layers
    base = {name: p for name, p in layers.named_parameters() if "lora_" not in name}
    assert all(isinstance(p, DTensor) for p in base.values())
    assert not any(isinstance(p, DTensor) for p in set(model.parameters()) - set(base.values()))
    return sum(p.to_local().untyped_storage().nbytes() for p in base.values())


def fitted(sharded=True, checkpointed=False):
    """Losses and adapter of a short training.

    Of ten examples, in steps of three of which each is computed by itself, one process computes two and the other one,
    and in the last step none.
    """
    trainer_module.PACK_TOKENS = 1
    renderer, model = renderer_of("guardloop"), tiny(sharded)
    if checkpointed:
        model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    settings = TrainingSettings(batch_size=3, learning_rate=1e-3)
    done = fit(model, renderer.prefixes, label_tokens(renderer), encoded(renderer), settings)
    trainer_module.PACK_TOKENS = 8192
    return [step.loss for step in done.steps], trained_tensors(model)


def packed(sharded=True, checkpointed=0.0):
    """Micro-batches of each process, loss and gradients of one step in packs."""
    renderer, model = renderer_of("guardloop"), tiny(sharded)
    labels, examples = label_tokens(renderer), encoded(renderer)
    batch = [*examples, replace(examples[0], tokens=examples[0].tokens * 3)]  # in no pack, and in one process only
    trainer = Trainer(model, renderer.prefixes, labels, TrainingSettings())
    if sharded:
        trainer.packs = trainer.learner.packs = Packs(
            *(model, renderer.prefixes, labels.before), max_tokens=1024, checkpointed=checkpointed, compiled=False
        )
    loss, _ = trainer._gradients(batch, 1)
    return [len(trainer._fitting(batch[rank::2])) for rank in (0, 1)], loss, gradients(model)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What became of the guard in two processes."""
    works = {f"packed {share}": partial(packed, checkpointed=share) for share in SHARES}
    works |= {f"fitted {again}": partial(fitted, checkpointed=again) for again in (False, True)}
    return in_two_processes(tmp_path_factory.mktemp("done"), split_bytes=split_bytes, **works)


def test_the_layers_are_split_and_all_else_is_whole(done):
    layers = tiny_llama().model.layers
    assert done["split_bytes"] == (sum(p.nbytes for p in layers.parameters()) / 2,) * 2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_split_guard_is_trained_as_a_whole_one(done, checkpointed):
    expected_losses, expected = fitted(sharded=False)
    for losses, found in done[f"fitted {checkpointed}"]:
        assert losses == pytest.approx(expected_losses, rel=1e-4)
        assert_close(found, expected)


@pytest.mark.parametrize("checkpointed", SHARES)
def test_packs_of_a_split_guard_have_the_gradients_of_a_whole_one(done, checkpointed):
    _, expected_loss, expected = packed(sharded=False)
    for (count, other_count), loss, found in done[f"packed {checkpointed}"]:
        assert count != other_count
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert_close(found, expected)


def test_the_training_of_a_split_guard_goes_on_from_a_checkpoint(tmp_path):
    kept = Checkpoints(str(tmp_path), "key")

    def training(checkpoints, stop_at=None):
        fit_module.CHECKPOINT_STEPS = 1
        renderer, model, steps = renderer_of("guardloop"), tiny(sharded=True), []

        def on_step(step):
            steps.append(step.number)
            if step.number == stop_at:
                raise KeyboardInterrupt

        settings = TrainingSettings(batch_size=3, learning_rate=1e-3)
        args = (model, renderer.prefixes, label_tokens(renderer), encoded(renderer), settings)
        with suppress(KeyboardInterrupt):
            fit(*args, on_step=on_step, checkpoints=checkpoints)
        return steps, trained_tensors(model)

    in_two_processes(tmp_path, torn=partial(training, kept, stop_at=2))
    ended = in_two_processes(tmp_path, whole=partial(training, None), torn=partial(training, kept))
    _, expected = ended["whole"][0]
    for steps, found in ended["torn"]:
        assert steps == [3, 4]
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_split_guard_is_scored_chosen_and_saved_as_a_whole_one(base, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "fresh_adapter", partial(fresh_adapter, dropout=0.0))
    guard, options = guard_settings(base), {"batch_size": 5, "gradient_checkpointing": 1.0}
    long = [row(f"long-{n}", "a bomb " * 150, 1.0, "positive") for n in range(99)]
    # of the validation examples it is a batch by itself, and one process has it
    examples = [*toy_examples(15), split(long, quick().validation, 0)[1][0]]

    def work():
        train_module.fresh_adapter = partial(fresh_adapter, dropout=0.0)
        return train(examples, guard, quick(processes=2, sharded=True, **options), tmp_path / "split")

    one, other = in_two_processes(tmp_path, work=work)["work"]
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
