"""One of several processes that train a guard together; `train_guard` starts them by torchrun."""

from guardloop.stages.training import train_guard
from guardloop.training.processes import child

if __name__ == "__main__":
    child(train_guard)
