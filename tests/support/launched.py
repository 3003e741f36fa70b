"""Several programs one behind the other in the ranks of one torchrun.

``torchrun --nproc-per-node 4 launched.py 'a.py --option' b.py`` prints a line before each program.
A start is five processes that import torch, far longer than the programs; here it is paid once.
"""

from __future__ import annotations

import os
import runpy
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

import usp

_TITLE = "== program "


def launched(ranks: int, programs: list[list[str]]) -> list[str]:
    """What each program prints, run by torchrun as ``[file, *options]``; the first failure ends."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), __file__, *map(shlex.join, programs)]
    # the package under test, wherever it was imported from
    path = os.pathsep.join([str(Path(usp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[:4000]
    return run.stdout.split(_TITLE)[1:]


def _run(program: list[str]) -> None:
    if os.environ["RANK"] == "0":
        print(_TITLE + program[0], flush=True)
    sys.argv = program
    sys.path.insert(0, str(Path(program[0]).parent))  # as python does
    try:
        runpy.run_path(program[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    sys.stdout.flush()
    if dist.is_initialized():
        dist.barrier()  # every rank has printed
        dist.destroy_process_group()


def _meet_elsewhere(number: int, agent: dist.TCPStore) -> None:
    """The agent's store holds the addresses of the group that was destroyed: rank 0 opens one."""
    if os.environ["RANK"] == "0":
        with socket.socket() as free:
            free.bind((os.environ["MASTER_ADDR"], 0))
            agent.set(f"port of program {number}", str(free.getsockname()[1]))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    os.environ["MASTER_PORT"] = agent.get(f"port of program {number}").decode()


if __name__ == "__main__":
    agent = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    for number, program in enumerate(sys.argv[1:]):
        if number:
            _meet_elsewhere(number, agent)
        _run(shlex.split(program))
