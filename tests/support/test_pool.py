"""The pool of workers itself: results, failures of every kind, recovery, speed, poison."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist
from pool import Pool, RemoteError


@pytest.fixture(scope="module")
def small() -> Pool:
    """A pool of its own: these tests break it on purpose."""
    pool = Pool(3)
    yield pool
    pool.close()


def identity(value: object) -> tuple[int, object]:
    return dist.get_rank(), value


def package() -> str:
    import usp

    return usp.__file__


def test_workers_run_what_the_tests_run(pool) -> None:
    """And not the sources in the folder where pytest was started."""
    assert pool.run(package, ranks=1) == [package()]


def raises(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ArithmeticError(f"on purpose on {rank}")


def refuses() -> None:
    raise ValueError("3 is not 4")


def skips() -> None:
    pytest.importorskip("no_such_library", reason="it is not installed")


def exits(rank: int) -> None:
    if dist.get_rank() == rank:
        print("last words", file=sys.stderr, flush=True)
        os._exit(7)


def waits_for(rank: int) -> None:
    if dist.get_rank() != rank:
        dist.recv(torch.empty(1), src=rank)


def raises_while_others_wait() -> None:
    if dist.get_rank() == 0:
        raise ArithmeticError("the others wait for me")
    dist.recv(torch.empty(1), src=0)


def total(value: float) -> float:
    tensor = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(tensor)
    return tensor.item()


def fresh_memory() -> list[torch.Tensor]:
    like = torch.zeros(5, 7)
    return [
        torch.empty(11),
        torch.empty_like(like),
        like.new_empty(3, dtype=torch.bfloat16),
        torch.empty_strided((2, 3), (3, 1), dtype=torch.float64),
        torch.zeros(0).resize_(4),
    ]


def threads() -> int:
    return torch.get_num_threads()


def test_results_come_by_rank(small: Pool) -> None:
    assert small.run(identity, "x", ranks=3) == [(0, "x"), (1, "x"), (2, "x")]
    assert small.run(identity, None, ranks=1) == [(0, None)]


def test_tensors_travel_unchanged(small: Pool) -> None:
    sent = torch.randn(3, 5).to(torch.bfloat16)
    for rank, (_, received) in enumerate(small.run(identity, sent, ranks=2)):
        assert torch.equal(received, sent), rank


def test_a_world_holds_only_those_who_take_part(small: Pool) -> None:
    for ranks in (1, 2, 3, 2, 1):
        assert small.run(total, 2.0, ranks=ranks) == [ranks * (ranks + 1.0)] * ranks


def test_an_exception_names_its_rank_and_traceback(small: Pool) -> None:
    with pytest.raises(RemoteError, match="rank 1: ArithmeticError: on purpose on 1") as caught:
        small.run(raises, 1, ranks=3)
    assert caught.value.rank == 1
    assert "in raises" in caught.value.details
    assert small.run(total, 1.0, ranks=3) == [6.0] * 3


def test_a_refusal_or_a_skip_on_all_ranks_keeps_the_workers(small: Pool) -> None:
    small.run(identity, 0, ranks=3)
    starts = small.starts
    outcomes = small.outcomes(refuses, ranks=3)
    assert [(e.rank, e.kind, e.message) for e in outcomes] == [
        (rank, "ValueError", "3 is not 4") for rank in range(3)
    ]
    with pytest.raises(pytest.skip.Exception, match=r"^it is not installed$"):
        small.run(skips, ranks=3)
    assert small.run(total, 1.0, ranks=3) == [6.0] * 3
    assert small.starts == starts


def test_a_dead_worker_leaves_its_exit_code_and_last_words(small: Pool) -> None:
    outcomes = small.outcomes(exits, 2, ranks=3)
    assert outcomes[:2] == [None, None]
    assert (outcomes[2].kind, outcomes[2].rank) == ("Died", 2)
    assert "exit code 7" in outcomes[2].message
    assert "last words" in outcomes[2].details
    assert small.run(total, 1.0, ranks=3) == [6.0] * 3


def test_a_hang_ends_and_says_where(small: Pool) -> None:
    began = time.monotonic()
    outcomes = small.outcomes(waits_for, 1, ranks=3, timeout=1.0)
    assert time.monotonic() - began < 10
    assert outcomes[1] is None
    for rank in (0, 2):
        assert outcomes[rank].kind == "Hang"
        assert "hanging: ranks [0, 2]" in outcomes[rank].message
        assert "in waits_for" in outcomes[rank].details
    assert small.run(total, 1.0, ranks=3) == [6.0] * 3


def test_the_cause_is_raised_and_not_the_wait_for_it(small: Pool) -> None:
    began = time.monotonic()
    with pytest.raises(RemoteError, match="the others wait for me"):
        small.run(raises_while_others_wait, ranks=3, timeout=250)
    assert time.monotonic() - began < 20


def test_a_lambda_is_refused(small: Pool) -> None:
    with pytest.raises(ValueError, match="cannot import"):
        small.run(lambda: None, ranks=1)


def test_fresh_memory_is_poisoned(small: Pool) -> None:
    for tensor in small.run(fresh_memory, ranks=1)[0]:
        assert tensor.isnan().all()


def test_one_thread_each(small: Pool) -> None:
    assert small.run(threads, ranks=3) == [1, 1, 1]


def test_hundreds_of_cases_a_second(small: Pool) -> None:
    small.run(total, 1.0, ranks=3)
    batches = []
    for _ in range(10):
        began = time.monotonic()
        for _ in range(20):
            small.run(total, 1.0, ranks=3)
        batches.append(time.monotonic() - began)
    # the quickest: others may use this machine too
    assert min(batches) < 0.2, f"20 trivial cases took {min(batches):.2f} s"
