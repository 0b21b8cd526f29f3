"""Replicas split over real processes, on the loopback address."""

import os
import shutil
import socket
import time

import numpy as np
import pytest

from conftest import start_example

pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(directory, num_processes, *arguments, output=None):
    """Processes with 4 devices in all."""
    arguments = [
        *("--directory", directory, "--devices", 4),
        *("--num-processes", num_processes, *arguments),
    ]
    if num_processes > 1:
        arguments += ["--coordinator", f"localhost:{free_port()}"]
    if output:
        arguments += ["--output", output]
    return [
        start_example("multi_device", *arguments, "--process-id", i, **os.environ)
        for i in range(num_processes)
    ]


def finish(processes, timeout=300):
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [(p.returncode, *o) for p, o in zip(processes, outputs, strict=True)]


def run(directory, num_processes, *arguments):
    output = directory / "result.npz"
    for code, _, stderr in finish(
        start(directory / "run", num_processes, *arguments, output=output)
    ):
        assert code == 0, stderr
    return np.load(output)


# A rate at which rounding is not amplified.
ARGUMENTS = "--rate", 0.01, "--save-every", 20


def assert_same(result, expected):
    for name, value in expected.items():
        size = np.sqrt(np.mean(value**2))
        np.testing.assert_allclose(result[name], value, atol=1e-5 * size)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"), 1, *ARGUMENTS, "--until", 40)


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_follow_the_trajectory_of_one(num_processes, alone, tmp_path):
    assert_same(run(tmp_path, num_processes, *ARGUMENTS, "--until", 40), alone)


def test_a_lost_process_ends_the_others_and_fewer_go_on(alone, tmp_path):
    directory = tmp_path / "run"
    processes = start(directory, 4, *ARGUMENTS)
    while not (directory / "20").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[2].kill()
    for i, (code, _, stderr) in enumerate(finish(processes)):
        assert code != 0
        if i != 2:
            assert f"process {i} stops, since another one was lost" in stderr

    # Back to the first checkpoint, and on with two processes.
    for step in directory.iterdir():
        if step.name != "20":
            shutil.rmtree(step)
    assert_same(run(tmp_path, 2, *ARGUMENTS, "--until", 40), alone)
