"""A section of RESULTS.md from a check's result: python -m tests.gpu_check.results DIR.

MFU is against the bf16 TFLOP/s of the GPU's data sheet, and missing where `sdtrain.impact.gpus` does not know it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdtrain.impact.gpus import peak_tflops
from tests.gpu_check.record import read_result

TARGETS = (164, 180)
"""Images/s at 512 px on one H200."""
PUBLISHED = 143.9
"""The best published, by one GPU of eight: MLPerf Training v5.0, mlcommons/training_results_v5.0, Dell XE9680."""
_NUM_LOSSES = 3
_SHOWN = 400


def section(result: dict[str, Any]) -> str:
    """The section, beginning with its heading."""
    figures = {stage["name"]: stage["figures"] for stage in result["stages"]}
    parts = [_head(result, figures.get("machine", {})), _stages(result["stages"]), *_findings(figures, result)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(result: dict[str, Any], machine: dict[str, Any]) -> str:
    versions, gpu = machine.get("versions", {}), machine.get("gpu", {})
    place = (
        gpu.get("name") or f"{versions.get('cpu', 'a CPU')}, {versions.get('cores', '?')} cores, no GPU, small sizes"
    )
    peak = peak_tflops(gpu["name"]) if gpu else None
    known = ", ".join(
        f"{name} {versions[name]}"
        for name in ("python", "torch", "cuda", "cudnn", "nccl", "triton", "deepspeed", "diffusers", "transformers")
        if versions.get(name)
    )
    sheet = f"{peak:g} TFLOP/s by its data sheet" if peak else "no data sheet known, so no MFU"
    lines = [
        f"## GPU check: {place}",
        f"`{result['command']}`, {result['started'][:10]}, commit {result.get('commit') or 'unknown'}. {known}. "
        f"Matrix product {machine.get('matmul_tflops', '?')} TFLOP/s, {sheet}; copy on the device "
        f"{machine.get('copy_gb_per_s', '?')} GB/s, read and written.",
    ]
    return "\n\n".join(lines)


def _stages(stages: list[dict[str, Any]]) -> str:
    rows = [f"| {s['name']} | {s['status']} | {s['seconds']:.0f} | {_last_line(s['problem'])} |" for s in stages]
    return "\n".join(["| stage | | s | |", "|---|---|---|---|", *rows])


def _findings(figures: dict[str, dict[str, Any]], result: dict[str, Any]) -> Iterator[str]:
    yield _training(figures, is_gpu=result["device"] != "cpu")
    yield _losses(figures.get("profile", {}))
    yield _ladder(figures.get("ladder", {}))
    yield _networks(figures.get("networks", {}))
    yield _table("Resumed next to undisturbed runs", figures.get("resume", {}), ("deterministic", "default"))
    for name, title in (("encode", "Encoding"), ("sample", "Sampling"), ("score", "Scoring"), ("data", "Loader")):
        yield _list(title, figures.get(name, {}))


def _training(figures: dict[str, dict[str, Any]], is_gpu: bool) -> str:
    runs = {"defaults": figures.get("profile", {}), **figures.get("best", {})}
    runs = {name: run for name, run in runs.items() if isinstance(run, dict) and "images_per_s" in run}
    if not runs:
        return ""
    columns = ("images_per_s", "mfu", "of_matmul", "memory_gb", "data_wait", "micro_batch")
    rows = [
        f"| {name} | " + " | ".join(_cell(run.get(column)) for column in columns) + " |" for name, run in runs.items()
    ]
    table = "\n".join([f"| training | {' | '.join(columns)} |", "|---|" + "---|" * len(columns), *rows])
    settings = figures.get("best", {}).get("settings")
    lines = [table, f"Settings of the best: {settings}." if settings else ""]
    return "\n\n".join([*filter(None, lines), _targets(runs) if is_gpu else ""]).strip()


def _targets(runs: dict[str, dict[str, Any]]) -> str:
    """How far 512 px is from the targets."""
    rate = max((runs[name]["images_per_s"] for name in ("defaults", "512px") if name in runs), default=None)
    if rate is None:
        return ""
    said = []
    for target in TARGETS:
        gap = rate / target - 1
        said.append(f"{target} {'reached' if gap >= 0 else 'missed'} by {abs(gap):.1%}")
    return f"Targets at 512 px: {', '.join(said)}; {rate / PUBLISHED:.2f} of the best published {PUBLISHED} images/s."


def _losses(profile: dict[str, Any]) -> str:
    if "lost_ms" not in profile:
        return ""
    wall, lost = profile["profile"]["wall_ms"], profile["lost_ms"]
    largest = [f"{name} {ms:.1f} ms ({ms / wall:.0%})" for name, ms in list(lost.items())[:_NUM_LOSSES]]
    classes = ", ".join(f"{name} {ms:.1f}" for name, ms in profile["profile"]["by_class_ms"].items())
    syncs, last = profile["syncs"], profile.get("last_micro_step_with_optimizer_step")
    with_step = f" The last one with the optimizer step took {last['wall_ms']:.1f} ms." if last else ""
    counted = f"{syncs['per_optimizer_step']} ({syncs['places']})" if syncs else "not counted on a CPU"
    return (
        f"{profile['num_micro_steps']} micro-steps of the defaults took {wall:.1f} ms: {classes}, idle "
        f"{profile['profile']['idle_ms']:.1f}. Largest losses against the peak: {'; '.join(largest)}. Host syncs in an "
        f"optimizer step: {counted}.{with_step}"
    )


def _ladder(ladder: dict[str, Any]) -> str:
    if "rungs" not in ladder:
        return ""
    rows = [
        f"| {name} | {_cell(rung.get('images_per_s'))} | {_cell(rung.get('vs_best_before'))} | "
        f"{_cell(rung.get('memory_gb'))} | {_one_line(rung.get('error') or rung.get('skipped') or '')} |"
        for name, rung in ladder["rungs"].items()
    ]
    return "\n".join(["| rung | images/s | of the best before | GB | |", "|---|---|---|---|---|", *rows])


def _networks(networks: dict[str, Any]) -> str:
    if not networks:
        return ""
    rows, kernels = [], networks.get("kernels", {})
    for name, found in networks.items():
        if name == "kernels":
            continue
        errors = found if isinstance(found, dict) else {}
        problem = "" if errors else _one_line(str(found))
        rows.append(f"| {name} | {_cell(errors.get('prediction'))} | {_cell(errors.get('gradient'))} | {problem} |")
    head = ["| next to float32 on the CPU | prediction, relative error | gradient | |", "|---|---|---|---|"]
    takes = "; ".join(f"{name}: " + ", ".join(f"{k} {v}" for k, v in sizes.items()) for name, sizes in kernels.items())
    return "\n".join([*head, *rows]) + (f"\n\nHead sizes that each kernel takes: {_one_line(takes)}." if takes else "")


def _table(title: str, figures: dict[str, Any], names: tuple[str, ...]) -> str:
    found = {name: figures[name] for name in names if name in figures}
    if not found:
        return ""
    columns = list(next(iter(found.values())))
    rows = [f"| {name} | " + " | ".join(_cell(run[column]) for column in columns) + " |" for name, run in found.items()]
    return "\n".join([f"| {title} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns), *rows])


def _list(title: str, figures: dict[str, Any]) -> str:
    return (
        f"{title}: " + ", ".join(f"{name} {_cell(value)}" for name, value in figures.items()) + "." if figures else ""
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:_SHOWN]


def _last_line(problem: str | None) -> str:
    return _one_line(problem.strip().splitlines()[-1]) if problem else ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_check.results", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="--out of the check")
    folder = parser.parse_args().folder
    if not (result := read_result(folder)):
        raise SystemExit(f"{folder} holds no result. Make one: python -m tests.gpu_check --out {folder}")
    print(section(result), end="")


if __name__ == "__main__":
    main()
