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
from helpers.versions import OLDEST, not_the_oldest
from helpers.weights import assert_same
from recon_aux.integrations.lightly import attach

pytestmark = pytest.mark.slow

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run(*arguments: Any, launcher: Sequence[str] = TORCHRUN) -> CompletedProcess[str]:
    return run_script("processes.py", *arguments, launcher=launcher)


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


# "loaded" comes first: it trains before there is a group of processes
TOGETHER = ["loaded", "loop", "lightning", "searching", "uneven", "weight", "monitored"]
TOGETHER += [*([] if OLDEST else ["sharded"]), "forgetting"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of what all cases saved: starting two processes takes longer than what they do."""
    folder = tmp_path_factory.mktemp("processes")
    result = run(",".join(TOGETHER), folder)
    assert result.returncode == 0, result.stderr[-3000:]
    (folder / "stderr").write_text(result.stderr)
    return folder


def saved_by_both(folder: Path) -> list[Any]:
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[Tensor, Tensor]]:
    """What one process starts with, and makes of the whole batches."""
    model = attach(InALoop(), **OPTIONS)
    start = {name: value.clone() for name, value in tensors(model.state_dict()).items()}
    train(model, global_batches())
    return {name: (start[name], value) for name, value in tensors(model.state_dict()).items()}


@pytest.mark.parametrize("case", ["loop", "sharded", "lightning", "searching"])
def test_two_processes_train_what_one_would(
    case: str, alone: dict[str, tuple[Tensor, Tensor]], ran: Path
) -> None:
    if case == "sharded":
        not_the_oldest("torch 2.6 has no FSDP2 on CPUs")
    states = [tensors(state) for state in saved_by_both(ran / case)]
    assert_same(*states)
    assert states[0].keys() == alone.keys()
    for name, (start, expected) in alone.items():
        # processors round differently
        near = 0.02 * (expected.double() - start.double()).abs().max().item()
        torch.testing.assert_close(states[0][name], expected, rtol=0, atol=near, msg=name)


def test_a_checkpoint_that_one_process_loaded_is_both_s(ran: Path) -> None:
    states = [tensors(state) for state in saved_by_both(ran / "loaded")]
    for name, value in states[0].items():
        if "extra_state" not in name:
            assert torch.equal(value, states[1][name]), name
    saved = torch.load(ran / "loaded" / "loaded.pt")
    units = [name for name, _ in attach(InALoop(), **OPTIONS).named_buffers()]
    assert len(units) == 8
    for name in units:
        torch.testing.assert_close(states[0][name], saved[name], msg=name)


def test_units_are_those_of_all_images_also_if_processes_have_unequally_many(ran: Path) -> None:
    units = dict(first_batch(0, 8).named_buffers())
    assert len(units) == 8
    for found in saved_by_both(ran / "uneven"):
        for name, expected in units.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4, msg=name)


def test_processes_agree_on_an_automatic_weight_between_those_of_each(ran: Path) -> None:
    weights = saved_by_both(ran / "weight")
    assert weights[0] == weights[1]
    least, most = sorted(measured_weight(part) for part in (0, 1))
    assert 1 < least < weights[0] < most


def test_both_log_what_the_first_one_measured(ran: Path) -> None:
    logged = saved_by_both(ran / "monitored")
    assert len(logged[0]) == 40 - 3
    assert logged[0] == logged[1]
    assert (ran / "stderr").read_text().count("recon_aux.Monitor:") == 1


def test_a_forgotten_add_loss_is_torchs_own_error(ran: Path) -> None:
    for said in saved_by_both(ran / "forgetting"):
        assert "Expected to have finished reduction" in said


def test_a_step_that_fails_in_one_process_ends_both(tmp_path: Path) -> None:
    result = run("failing", tmp_path, 0)
    assert result.returncode != 0
    assert "[rank0]: FloatingPointError: expected a finite loss" in result.stderr
    assert "in step 4" in result.stderr


def test_lightnings_own_launcher_ends_too(tmp_path: Path) -> None:
    result = run("lightning", tmp_path, 1, launcher=[])
    assert result.returncode != 0
    assert "FloatingPointError: expected a finite loss of the task, got nan" in result.stderr
