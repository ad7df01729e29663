"""What attaching costs: the bare and the attached model train in turn, in one run.

``python examples/benchmarks/overhead.py`` prints time, FLOPs and peak memory of a training step,
attached over bare, and the time of the encoder's inference. It counts the operations that attaching
adds, forward and backward, and prints which of them take the added time. The numbers are kept as
JSON. ``--grow`` instead follows the cost as the batch, the images, the feature or the number of
crops grow, and draws it.
"""

from __future__ import annotations

import argparse
import gc
import logging
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from recon_aux.probe import markdown_table

# let this file be run by its path
sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.growth import draw, grown
from benchmarks.loops import MODELS, Case, LightningLoop, OwnLoop, now
from benchmarks.methods import METHODS
from benchmarks.operations import Begun
from benchmarks.records import Record, as_text, keep, record
from benchmarks.resuming import trained_on

ON_A_CPU = ["ResNet-18, 64", "ResNet-18, 32", "tiny ResNet-18, 32"]


# --- what is measured ---


LOOPS: dict[str, type[LightningLoop] | type[OwnLoop]] = {
    "Lightning": LightningLoop,
    "own loop": OwnLoop,
}


def step_time(case: Case, args: argparse.Namespace, loop: str) -> dict[str, float]:
    """Measure a training step in milliseconds, and the ratio, round by round."""
    bare, attached = (LOOPS[loop](case, args, attached=attached) for attached in (False, True))
    rounds = []
    for index in range(args.rounds + 1):
        # the order within a round may matter
        order = (bare, attached) if index % 2 else (attached, bare)
        taken = {arm: arm.seconds(args.steps) for arm in order}
        rounds.append((taken[bare], taken[attached]))
    # the first round makes checks and allocates memory: it doesn't count
    rounds = rounds[1:]
    ratios = sorted(with_it / without for without, with_it in rounds)
    return {
        "bare ms": 1000 * median(without for without, _ in rounds),
        "attached ms": 1000 * median(with_it for _, with_it in rounds),
        "ratio": median(ratios),
        "least": ratios[0],
        "most": ratios[-1],
    }


def flops(case: Case, args: argparse.Namespace) -> dict[str, float]:
    """Count the FLOPs of a training step, attached over bare."""
    counted = []
    for attached in (False, True):
        arm = OwnLoop(case, args, attached=attached)
        arm.warm_up()
        with FlopCounterMode(display=False) as counter:
            arm.step()
        counted.append(counter.get_total_flops())
    return {
        "GFLOPs per pair": counted[0] / case.batch_size / 1e9,
        "FLOPs": counted[1] / counted[0],
    }


def operations_begun(case: Case, args: argparse.Namespace) -> dict[str, list[int]]:
    """Count the operations that the sixth step begins, forward and backward, bare and attached."""
    found = {}
    for name in ("bare", "attached"):
        arm = OwnLoop(case, args, attached=name == "attached")
        # by then the checks of the first steps are done
        for _ in range(5):
            arm.step()
        with Begun() as forward:
            loss = arm.loss()
        arm.optimizer.zero_grad()
        with Begun() as backward:
            loss.backward()
        found[f"{name} operations"] = [forward.count, backward.count]
    return found


def inference_time(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the encoder's inference, attached over bare, and whether its operations differ."""
    device = trained_on(args)
    models = [case.build(attached=attached, in_lightning=False) for attached in (False, True)]
    encoders = [model.backbone.to(device).eval() for model in models]
    view = case.views(device)[0]
    bf16 = args.precision == "bf16-mixed"

    def seconds(encoder: nn.Module) -> float:
        started = now(device)
        for _ in range(args.steps):
            encoder(view)
        return now(device) - started

    def operations(encoder: nn.Module) -> list[tuple[str, int]]:
        with torch.profiler.profile() as profile:
            encoder(view)
        events = profile.key_averages()
        return sorted((event.key, event.count) for event in events if "::" in event.key)

    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        ratios = []
        for index in range(2 * args.rounds + 1):
            order = encoders if index % 2 else encoders[::-1]
            taken = {encoder: seconds(encoder) for encoder in order}
            ratios.append(taken[encoders[1]] / taken[encoders[0]])
        bare, attached = (operations(encoder) for encoder in encoders)
    return {"inference": median(ratios[1:]), "same operations": bare == attached}


def added(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Find the operations that attaching adds to a step, and how long they take on the device.

    The time to launch them isn't counted, nor how long the device waits for that.
    """
    device = trained_on(args)
    activities = [torch.profiler.ProfilerActivity.CPU]
    time_of = "self_cpu_time_total"
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        time_of = "self_device_time_total"
    counts: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for attached in (False, True):
        arm = OwnLoop(case, args, attached=attached)
        arm.warm_up()
        now(device)
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(args.steps):
                arm.step()
            now(device)
        sign = 1 if attached else -1
        for event in profile.key_averages():
            # kernels' events are left out: operations' times include their kernels' already
            if event.key.startswith("aten::") and getattr(event, time_of):
                counts[event.key] += sign * event.count
                times[event.key] += sign * getattr(event, time_of) / 1000
    more = sorted((key for key in counts if counts[key] > 0), key=lambda key: -times[key])
    found = {key: (counts[key] / args.steps, times[key] / args.steps) for key in more}
    total = tuple(sum(values) for values in zip(*found.values(), strict=True))
    return {"added": {"all": total} | {key: found[key] for key in more[:8]}}


def peak_memory(case: Case, args: argparse.Namespace, *, attached: bool) -> float:
    """Give this process's peak memory in MiB, after it trained for a few steps."""
    arm = OwnLoop(case, args, attached=attached)
    arm.warm_up()
    arm.step()
    if arm.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    # on Linux getrusage includes the memory of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(peak) / 2**10


def memory(case: Case, args: argparse.Namespace) -> dict[str, float]:
    """Measure peak memory, attached over bare, each in a process of its own."""
    peaks = []
    # free what this process holds of the GPU: the others need it
    gc.collect()
    torch.cuda.empty_cache()
    for attached in (False, True):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            peaks.append(process.submit(peak_memory, case, args, attached=attached).result())
    return {"bare MiB": peaks[0], "attached MiB": peaks[1], "memory": peaks[1] / peaks[0]}


def waits(case: Case, args: argparse.Namespace) -> dict[str, float]:
    """Count how often a training step waits for the GPU, attached less bare."""
    if trained_on(args).type != "cuda":
        return {}
    found = []
    for attached in (False, True):
        arm = OwnLoop(case, args, attached=attached)
        arm.warm_up()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            arm.step()
            torch.cuda.set_sync_debug_mode("default")
        found.append(sum("called a synchronizing" in str(warning.message) for warning in caught))
    return {"waits": found[1] - found[0]}


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything, or only what is the same on any machine."""
    if args.count_only:
        return flops(case, args) | operations_begun(case, args)
    times = {loop: step_time(case, args, loop) for loop in LOOPS}
    kinds = (flops, operations_begun, memory, inference_time, waits, added)
    return {"time": times} | {k: value for kind in kinds for k, value in kind(case, args).items()}


# --- what is shown ---


def table(runs: list[Record]) -> str:
    """Put the cases side by side."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "bare, ms": lambda found: f"{found['time']['own loop']['bare ms']:.0f}",
        "time, Lightning": lambda found: _ratio(found["time"]["Lightning"]),
        "time, own loop": lambda found: _ratio(found["time"]["own loop"]),
        "FLOPs": lambda found: f"{found['FLOPs']:.4f}",
        "operations added": _operations,
        "memory": lambda found: f"{found['memory']:.3f}",
        "inference": lambda found: f"{found['inference']:.3f}",
        "same operations": lambda found: "yes" if found["same operations"] else "NO",
        "waits added": lambda found: str(found["waits"]),
    }
    # leave out what wasn't measured, without a GPU or with --count-only
    shown = [name for name in columns if any(_cell(columns[name], run) for run in runs)]
    grid = markdown_table(["batch", *shown])
    for run in runs:
        case = run["case"]
        name = _name(case)
        cells = [_cell(columns[column], run) for column in shown]
        grid.add_row(name, str(case["batch_size"]), *cells)
    return as_text(grid)


def details(runs: list[Record]) -> str:
    """List the operations that are added, case by case, as the profiler sees them."""
    lines = []
    for run in runs:
        found = run["results"].get("added", {})
        parts = [
            f"{key.removeprefix('aten::')} {count:.0f} ({ms:.2f})"
            for key, (count, ms) in found.items()
        ]
        if found:
            lines.append(f"{_name(run['case'])} adds operations (ms) a step: {', '.join(parts)}")
    return "\n".join(lines)


def _name(case: dict[str, Any]) -> str:
    return ", ".join(filter(None, (case["model"], case["method"], case["options"])))


def _cell(column: Callable[[dict[str, Any]], str], run: Record) -> str:
    try:
        return column(run["results"])
    except KeyError:
        return ""


def _operations(found: dict[str, Any]) -> str:
    pairs = zip(found["bare operations"], found["attached operations"], strict=True)
    return " + ".join(str(attached - bare) for bare, attached in pairs)


def _ratio(time: dict[str, float]) -> str:
    return f"{time['ratio']:.3f} ({time['least']:.3f} to {time['most']:.3f})"


# --- the command line ---


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=list(MODELS), help="all on a GPU, the small on a CPU")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    add("--options", nargs="+", default=[""], help="of attach, as in 'target_size=16, weight=2'")
    add("--batch-size", type=int, help="256 on a GPU, 32 on a CPU if not given")
    add("--rounds", type=int, default=5, help="of steps, bare and attached in turn")
    add("--steps", type=int, default=5, help="in each round, after two that don't count")
    add("--count-only", action="store_true", help="count FLOPs and operations, measure no time")
    add("--grow", action="store_true", help="follow the cost of one case as it grows, instead")
    add("--small", action="store_true", help="the first point of each curve alone")
    add("--precision", choices=["32-true", "bf16-mixed"], help="the latter on a GPU")
    add("--device", choices=["auto", "cpu", "gpu"], default="auto")
    add("--out", type=Path, default=Path("runs/overhead"))
    return parser.parse_args()


def measure_growth(args: argparse.Namespace, batch_size: int) -> None:
    """Measure one case as it grows, keep the numbers and draw the curves."""
    curves: dict[str, list[tuple[int, float, float]]] = {}
    started = time.perf_counter()
    base = Case("tiny ResNet-18, 32", batch_size=batch_size)
    for what, cases in grown(base, small=args.small).items():
        curves[what] = [
            (value, step_time(case, args, "own loop")["ratio"], flops(case, args)["FLOPs"])
            for value, case in track(cases, what)
        ]
        kept = record(args, trained_on(args), time.perf_counter() - started, curves)
        keep(args.out / "growth.json", kept)
    draw(curves, args.out / "growth.png")
    print(f"saved growth.json and growth.png in {args.out}")


def measure_cases(args: argparse.Namespace, cases: list[Case]) -> None:
    """Measure every case, keep the numbers and print the table."""
    runs: list[Record] = []
    for case in track(cases, "measuring"):
        started = time.perf_counter()
        found = measure(case, args)
        seconds = time.perf_counter() - started
        runs.append(record(args, trained_on(args), seconds, found, case=vars(case)))
        keep(args.out / "overhead.json", runs)
    text = f"{table(runs)}\n{details(runs)}\n"
    print(text)
    (args.out / "table.md").write_text(text)
    print(f"saved in {args.out}")


def main() -> None:
    """Read the command line, measure, print the table."""
    args = parse_options()
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    gpu = trained_on(args).type == "cuda"
    args.precision = args.precision or ("bf16-mixed" if gpu else "32-true")
    batch_size = args.batch_size or (256 if gpu else 32)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.grow:
        measure_growth(args, batch_size)
    else:
        models = args.models or (list(MODELS) if gpu or args.count_only else ON_A_CPU)
        arms = product(models, args.methods, args.options)
        measure_cases(args, [Case(m, method, batch_size, options=o) for m, method, o in arms])


if __name__ == "__main__":
    main()
