"""Two processes: the same decoder on both, and what one process would have made of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models import InALoop
from helpers.running import run_script
from helpers.scripts.processes import (
    OPTIONS,
    first_batch,
    global_batches,
    measured_weight,
    train,
)
from helpers.versions import not_the_oldest
from helpers.weights import assert_same
from recon_aux.integrations.lightly import attach

pytestmark = pytest.mark.slow

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run(*arguments: Any, launcher: Sequence[str] = TORCHRUN) -> CompletedProcess[str]:
    return run_script("processes.py", *arguments, launcher=launcher)


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[Tensor, Tensor]]:
    """What one process starts with, and makes of the whole batches."""
    model = attach(InALoop(), **OPTIONS)
    start = {name: value.clone() for name, value in tensors(model.state_dict()).items()}
    train(model, global_batches())
    return {name: (start[name], value) for name, value in tensors(model.state_dict()).items()}


@pytest.mark.parametrize("case", ["loop", "sharded", "lightning", "searching"])
def test_two_processes_train_what_one_would(
    case: str, alone: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    if case == "sharded":
        not_the_oldest("torch 2.6 has no FSDP2 on CPUs")
    result = run(case, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    states = [tensors(torch.load(tmp_path / f"{rank}.pt")) for rank in (0, 1)]
    assert_same(*states)
    assert states[0].keys() == alone.keys()
    for name, (start, expected) in alone.items():
        # processors round differently
        near = 0.02 * (expected.double() - start.double()).abs().max().item()
        torch.testing.assert_close(states[0][name], expected, rtol=0, atol=near, msg=name)


def test_a_checkpoint_that_one_process_loaded_is_both_s(tmp_path: Path) -> None:
    result = run("loaded", tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    states = [tensors(torch.load(tmp_path / f"{rank}.pt")) for rank in (0, 1)]
    for name, value in states[0].items():
        if "extra_state" not in name:
            assert torch.equal(value, states[1][name]), name
    saved = torch.load(tmp_path / "loaded.pt")
    units = [name for name, _ in attach(InALoop(), **OPTIONS).named_buffers()]
    assert len(units) == 8
    for name in units:
        torch.testing.assert_close(states[0][name], saved[name], msg=name)


def test_units_are_those_of_all_images_also_if_processes_have_unequally_many(
    tmp_path: Path,
) -> None:
    result = run("uneven", tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    units = dict(first_batch(0, 8).named_buffers())
    assert len(units) == 8
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, expected in units.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4, msg=name)


def test_processes_agree_on_an_automatic_weight_between_those_of_each(tmp_path: Path) -> None:
    result = run("weight", tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    weights = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert weights[0] == weights[1]
    least, most = sorted(measured_weight(part) for part in (0, 1))
    assert 1 < least < weights[0] < most


@pytest.mark.parametrize("broken", [0, 1])
def test_a_step_that_fails_in_one_process_ends_both(broken: int, tmp_path: Path) -> None:
    result = run("failing", tmp_path, broken)
    assert result.returncode != 0
    assert f"[rank{broken}]: FloatingPointError: expected a finite reconst" in result.stderr
    assert "in step 4" in result.stderr


@pytest.mark.parametrize("broken", [0, 1])
def test_lightnings_own_launcher_ends_too(broken: int, tmp_path: Path) -> None:
    result = run("lightning", tmp_path, broken, launcher=[])
    assert result.returncode != 0
    assert "FloatingPointError: expected a finite loss of the task, got nan" in result.stderr


def test_a_search_for_unused_parameters_is_refused(tmp_path: Path) -> None:
    result = run("unused", tmp_path)
    assert result.returncode != 0
    assert "TypeError: expected DistributedDataParallel with find_unused_param" in result.stderr
