"""One of torchrun's processes, as `guardloop.stages` is, without dropout: each process would draw one of its own."""

from functools import partial

from guardloop.stages.training import train_guard
from guardloop.training import train
from guardloop.training.adapter import fresh_adapter
from guardloop.training.processes import child

if __name__ == "__main__":
    train.fresh_adapter = partial(fresh_adapter, dropout=0.0)
    child(train_guard)
