"""Trains the UNet on latents.

    deepspeed sdtrain/train.py [--config NAME|FILE] [--data DIR] [--output DIR] [--init_from DIR] [--steps N]

Also runs under torchrun and plain Python, on GPUs or CPU cores. Resumes from its newest checkpoint on any number of
ranks, with the samples and noise of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # Launchers put this file's folder first on the path, where our modules would shadow others of the same name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from sdtrain.config import TrainConfig, load_config
from sdtrain.errors import UserError, user_error_of
from sdtrain.precision import choose, warning_if_slow
from sdtrain.preflight.checks import Check, require
from sdtrain.preflight.training import late_checks
from sdtrain.redaction import hide_secrets_in_logs, holds_secret
from sdtrain.settings import parse_settings
from sdtrain.training.run_dir import RunDir

if TYPE_CHECKING:
    from sdtrain.training.distributed import Ranks
    from sdtrain.training.watchdog import Watchdog

# Imports that need torch are inside functions: flows import `configure`, and mistakes are reported at once.


def train(
    config: TrainConfig,
    run_dir: RunDir,
    ranks: Ranks,
    deepspeed_json: Path | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> int:
    """Trains until `config.steps` from the newest checkpoint; returns the step reached.

    `deepspeed_json` overrides our DeepSpeed settings. If `stop_requested` is true on any rank between two steps,
    training ends with a checkpoint. UserError if latents, weights or settings do not fit, the
    loss is not finite, or the disk is full.
    """
    # DeepSpeed chooses its accelerator on import, so it must not be imported before `join`.
    from sdtrain.training.energy import EnergyRecorder
    from sdtrain.training.micro_batch import decide_micro_batch
    from sdtrain.training.monitor import Monitor
    from sdtrain.training.optimizer import learning_rate, set_learning_rate
    from sdtrain.training.state import TrainingState
    from sdtrain.training.throughput import Progress

    config = _with_precision(config, run_dir, ranks)
    _require(late_checks(config, run_dir.path), ranks)
    config = decide_micro_batch(config, run_dir, ranks)
    energy = EnergyRecorder(run_dir.path, ranks)
    state = TrainingState(config, run_dir, ranks, deepspeed_json)
    first_step = state.checkpoints.restore()
    progress = Progress(run_dir, config, ranks, state.begin(first_step))
    if ranks.is_first:
        _make_known(run_dir.path)
    monitor = Monitor(config, run_dir, ranks, state, first_step)
    batches = progress.timed(state.batches(first_step))
    step = first_step

    with energy, state.checkpoints, _watchdog(config, run_dir, ranks) as watchdog:
        while step < config.steps and not ranks.any(stop_requested() or state.checkpoints.have_failed()):
            lr = learning_rate(step, config.optimizer, config.schedule)
            set_learning_rate(state.engine.optimizer, lr)
            seen = []
            for batch in watchdog.follow(state.micro_batches(batches), step, lambda batch: batch.moments.shape):
                weighted, unweighted = state.losses(batch)  # samples z_0, adds noise, predicts and compares
                state.engine.backward(weighted.mean())
                state.engine.step()  # the last of them renews weights and average
                seen.append((unweighted, batch.timesteps))
            was_applied = state.step_was_applied(step)
            progress.add(seen[-state.accumulation :], was_applied)  # fp16 may have repeated the step
            step += 1
            watchdog.at(step, "logging")
            if step % config.log_every == 0 or step == config.steps:
                metrics = state.metrics(lr)
                monitor.log(step, metrics, progress.line(step, metrics))
                state.guard.check(step)
                energy.add(step)
            monitor.on_step_end(step, progress, watchdog.at)
            if step % config.checkpoint.every == 0 and step < config.steps:
                watchdog.at(step, "a checkpoint")
                with progress.paused():
                    progress.check(step)
                    state.checkpoints.save(step)
            watchdog.at(step, "agreement to go on")
        watchdog.at(step, "the last checkpoint")
        progress.check(step)
        state.checkpoints.finish(step, first_step)
        energy.add(step)
    monitor.close()
    if ranks.is_first:
        _write_card(run_dir.path)
    return step


def _watchdog(config: TrainConfig, run_dir: RunDir, ranks: Ranks) -> Watchdog:
    from sdtrain.training.watchdog import Watchdog

    compile_timeout_s = 0.0 if config.speed.compile == "off" else config.guard.compile_timeout_s
    return Watchdog(run_dir.path, ranks, config.guard.stall_timeout_s, compile_timeout_s=compile_timeout_s)


def _require(checks: Sequence[Check], ranks: Ranks) -> None:
    """Runs the checks on the first rank and raises its UserError on all ranks, so that none waits."""
    problem = ""
    if ranks.is_first:
        try:
            require(checks)
        except UserError as error:
            problem = str(error)
    (said,) = ranks.gather([problem] if ranks.is_first else [])
    if said:
        raise UserError(said)


def _with_precision(config: TrainConfig, run_dir: RunDir, ranks: Ranks) -> TrainConfig:
    """Replaces `precision: auto` by the run's earlier choice, or by the first rank's."""
    config = run_dir.with_kept_precision(config)
    if config.precision != "auto":
        if ranks.is_first and (warning := warning_if_slow(config.precision, ranks.device)):
            print(f"warning: {warning}", flush=True)
        return config
    choice = choose(ranks.device) if ranks.is_first else None
    if choice:
        print(f"precision {choice.precision} (auto): {choice.reason}", flush=True)
    is_half = ranks.any(choice is not None and choice.precision == "bf16")
    return config.model_copy(update={"precision": "bf16" if is_half else "fp32"})


def _make_known(run: Path) -> None:
    """Makes the run known to its datasets; those that cannot be written only lead to a warning."""
    from sdtrain.exposure.known_runs import make_known

    try:
        said = make_known(run)
    except UserError as error:  # a run before this one has a damaged record
        said = [str(error)]
    for sentence in said:
        print(f"note: {sentence}", flush=True)


def _write_card(run: Path) -> None:
    """Writes the model card; after hours of training, a damaged record only leads to a warning."""
    from sdtrain.model_card import write_card

    try:
        write_card(run)
    except UserError as error:
        print(f"warning: no model card was written. {error} Then: sdtrain card {run}", flush=True)


class StopRequest:
    """Records SIGTERM and SIGINT, so that training stops between steps with a checkpoint."""

    def __init__(self) -> None:
        self._requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def __call__(self) -> bool:
        """Whether a signal has arrived."""
        return self._requested

    def _request(self, number: int, frame: Any) -> None:
        self._requested = True


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; launchers add --local_rank."""
    parser = argparse.ArgumentParser(prog="sdtrain/train.py", description="Trains the UNet on latents.")
    parser.add_argument("--config", default="tiny", help="name of a config (default: tiny) or a YAML file")
    parser.add_argument("--data", help="dataset directory with latents/ (default: the config's data.root)")
    parser.add_argument("--output", help="run directory (default: runs/NAME)")
    parser.add_argument(
        "--init_from", "--init-from", help="run, checkpoint, diffusers folder or CompVis file to start from"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps of the whole run")
    parser.add_argument("--deepspeed", action="store_true", help="accepted for launchers; always on")
    parser.add_argument("--deepspeed_config", type=Path, help="DeepSpeed JSON laid over our settings")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def configure(
    name: str, data: str | None = None, steps: int | None = None, init_from: str | None = None
) -> TrainConfig:
    """Loads a config and applies the command line's overrides; UserError for an unknown config or a bad value."""
    content = load_config(name).model_dump(exclude_unset=True)  # so that only settings named in the file count as set
    if data is not None:
        content["data"] = content.get("data", {}) | {"root": data, "sources": ()}
    if steps is not None:
        content["steps"] = steps
    if init_from is not None:
        content["init_from"] = init_from
    config = parse_settings(TrainConfig, content, f"config '{name}' with overrides")
    for place in (config.init_from, *(source.root for source in config.data.all_sources)):
        if place and holds_secret(place):  # everybody could read it in the launcher's command line
            raise UserError(
                f"{place} was given with a password or query, which training does not use: give a directory, or "
                "s3://BUCKET/PREFIX with credentials in the environment."
            )
    return config


def run(arguments: argparse.Namespace) -> None:
    """Trains as the command line says; UserError for a mistake that the user can fix."""
    config = configure(arguments.config, arguments.data, arguments.steps, arguments.init_from)
    from sdtrain.loading.sources import require_samples
    from sdtrain.training.distributed import (
        join,
        make_cublas_deterministic,
        rank_from_environment,
        world_size_from_environment,
    )

    config.require_share(world_size_from_environment())
    run_dir = RunDir(Path(arguments.output or Path("runs") / config.name))
    run_dir.check_config(config)
    done = run_dir.finished_step()
    if done is not None and done >= config.steps:
        if rank_from_environment() == 0:
            print(f"{run_dir.path} is finished: {done} steps. Give a larger --steps to go on, or another --output.")
        return
    require_samples(config.data)
    if config.speed.deterministic:
        make_cublas_deterministic()
    with run_dir.lock() if rank_from_environment() == 0 else nullcontext():
        ranks = join(arguments.local_rank)
        # Not before: waiting for a first rank that has failed, a process would not hear the launcher's SIGTERM.
        stop_requested = StopRequest()
        try:
            train(config, run_dir, ranks, arguments.deepspeed_config, stop_requested)
        finally:
            ranks.close()


def main() -> int:
    """Returns the exit code: 0 when finished or stopped with a checkpoint, 2 for a user error."""
    hide_secrets_in_logs()
    try:
        run(parse_arguments())
    except Exception as error:
        from sdtrain.training.distributed import rank_from_environment

        problem = user_error_of(error)
        if problem is None:
            raise
        if rank_from_environment() == 0:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        return 2
    finally:
        # Another signal while Python shuts down would turn success into failure.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return 0


if __name__ == "__main__":
    sys.exit(main())
