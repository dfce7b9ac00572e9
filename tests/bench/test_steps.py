from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from bench.experiment.steps import Kept, Workers


def fails_at_first(folder: Path, item: int) -> tuple[int, int]:
    """The item, and how many others were done before it; item 1 fails when it is asked for the first time."""
    tried = folder / f"{item}.tried"
    if item == 1 and not tried.exists():
        tried.touch()
        raise MemoryError(f"no memory for {item}")
    others = len(list(folder.glob("*.done")))
    (folder / f"{item}.done").touch()
    return item, others


def always_fails(item: int) -> int:
    raise ValueError(f"{item} is wrong")


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as both:
        yield both


@pytest.mark.slow
def test_what_fails_beside_others_is_done_again_by_itself(workers: Workers, tmp_path: Path) -> None:
    made = workers.map(partial(fails_at_first, tmp_path), range(5))
    assert [item for item, _ in made] == [0, 1, 2, 3, 4]
    assert made[1] == (1, 4)  # when all others were done


@pytest.mark.slow
def test_an_error_that_comes_again_is_raised(workers: Workers) -> None:
    with pytest.raises(ValueError, match="0 is wrong"):
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
