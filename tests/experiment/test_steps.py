import time
from functools import partial
from pathlib import Path

import pytest

from bench.experiment.steps import Kept, Workers


def fails_beside_others(folder: Path, item: int) -> int:
    """Fails while another one is at work."""
    mark = folder / f"{item}.working"
    mark.touch()
    try:
        time.sleep(0.3)
        if item == 1 and len(list(folder.glob("*.working"))) > 1:
            raise MemoryError(f"no memory for {item}")
        time.sleep(0.3)
    finally:
        mark.unlink()
    return item * item


def always_fails(item: int) -> int:
    raise ValueError(f"{item} is wrong")


def test_what_fails_beside_others_is_done_again_by_itself(tmp_path: Path) -> None:
    with Workers(3) as workers:
        list(workers.map(abs, range(3)))  # all three are up
        assert workers.map(partial(fails_beside_others, tmp_path), range(3)) == [0, 1, 4]


def test_an_error_that_comes_again_is_raised() -> None:
    with Workers(2) as workers, pytest.raises(ValueError, match="0 is wrong"):
        workers.map(always_fails, range(2))


def test_a_step_that_failed_is_not_kept(tmp_path: Path) -> None:
    kept = Kept(tmp_path)

    def broken(folder: Path) -> None:
        (folder / "half").touch()
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        kept.make("step", 1, broken)
    made = kept.make("step", 1, lambda folder: (folder / "whole").touch())
    assert [path.name for path in made.iterdir()] == ["whole"]
    assert kept.make("step", 1, broken) == made
