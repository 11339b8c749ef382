"""One command in two processes that train together, on the CPU, as `torchrun` and `accelerate launch` start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_two_processes(*arguments: str, timeout: int = 300) -> list[subprocess.CompletedProcess]:
    """Python with `arguments` in both; the main one is first in the result. The first that fails is shown by an assertion."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    results = [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]
    assert all(result.returncode == 0 for result in results), "\n".join(result.stderr for result in results)
    return results
