"""Runs the whole pipeline on a small synthetic world.

`make demo` runs it here; `prefect deployment run build-demo` builds only the dataset, on a worker.
"""

import argparse
import hashlib
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import flow

from filters.build_options import BuildOptions
from filters.recipe import Recipe, load_recipe
from flows.build_dataset import build
from flows.support.command_line import print_figures
from flows.support.decorators import report_user_errors
from flows.support.stage_runner import StageOptions
from flows.support.task_runners import own_prefect
from flows.train_unet import train
from sdtrain.config import load_config
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import entries
from sdtrain.demo.checker import Agreement
from sdtrain.demo.record import DemoClock
from sdtrain.demo.server import serve_world
from sdtrain.demo.world import make_world, open_world
from sdtrain.training.run_dir import RunDir

if TYPE_CHECKING:
    from sdtrain.report.page import ImageSection

CONFIG = "tiny"


@dataclass(frozen=True)
class DemoDir:
    """The demo's output directory."""

    root: Path

    @property
    def world(self) -> Path:
        """Images, metadata and web server."""
        return self.root / "world"

    @property
    def data(self) -> DatasetDir:
        """The dataset."""
        return DatasetDir(self.root / "data")

    @property
    def training(self) -> RunDir:
        """The training run, one per latents and config."""
        made = "".join(entry.fingerprint for entry in entries(self.data, "encode")) + load_config(CONFIG).digest()
        return RunDir(self.root / "training" / f"{CONFIG}-{hashlib.sha256(made.encode()).hexdigest()[:8]}")

    @property
    def samples(self) -> Path:
        """Exports, sheets of samples, and the checker's verdicts."""
        return self.root / "samples"

    @property
    def report(self) -> Path:
        """The report page."""
        return self.root / "report.html"


@flow(name="build-demo")
@report_user_errors
def build_demo(output: str = "demo-output", num_rows: int = 2000) -> str:
    """Makes a small world of captioned images, serves it, and builds a dataset from it.

    Args:
        output: The demo's directory.
        num_rows: Rows of metadata.

    Returns:
        The dataset's directory.
    """
    demo = DemoDir(Path(output).absolute())
    world = make_world(demo.world, num_rows)
    with serve_world(world):
        return build(demo_recipe(demo), BuildOptions(output=str(demo.data.root)), StageOptions())


@flow(name="train-demo")
@report_user_errors
def train_demo(output: str = "demo-output", steps: int | None = None) -> str:
    """Trains the tiny UNet on the demo's latents."""
    demo = DemoDir(Path(output).absolute())
    return train(CONFIG, str(demo.data.root), str(demo.training.path), steps)


def demo_recipe(demo: DemoDir) -> Recipe:
    """The demo's recipe for its world."""
    return load_recipe("demo", BuildOptions(metadata=str(demo.world / "metadata")))


def sample_demo(demo: DemoDir) -> dict[str, Agreement]:
    """Samples all prompts from the trained and untrained models and checks them, or returns saved verdicts."""
    from sdtrain.demo.agreement import draw_sheet, export_untrained, read_results, try_model, write_results
    from sdtrain.formats.checkpoint import find_checkpoint
    from sdtrain.formats.export import export_model

    checkpoint = find_checkpoint(demo.training.path).path.name
    results = demo.samples / "agreement.json"
    known = read_results(results, checkpoint)
    if known:
        return known
    print("Sampling: 36 prompts, 50 PLMS steps ...", flush=True)
    trained = try_model(export_model(demo.training.path, demo.samples / "model"))
    draw_sheet(trained).save(demo.samples / "samples.png")
    untrained = try_model(export_untrained(CONFIG, demo.samples / "untrained"), guidance_scales=(3.0,), num_steps=10)
    draw_sheet(untrained).save(demo.samples / "untrained.png")
    found = {"seen": trained.seen, "unseen": trained.unseen, "untrained": untrained.seen}
    write_results(results, checkpoint, found)
    return found


def look_closer(demo: DemoDir) -> "list[ImageSection]":
    """Evaluates the model, modifies an image, searches the data, and looks for memorised images."""
    from flows import demo_report
    from sdtrain.formats.checkpoint import find_checkpoint
    from sdtrain.model_card import measure_representation, write_card

    checkpoint = find_checkpoint(demo.training.path).path.name
    memorised, modified = (demo.samples / f"{what}-{checkpoint}" for what in ("memorised", "modified"))
    evaluated = demo_report.evaluate(demo.training, demo.data)
    measure_representation(demo.training.path)
    write_card(demo.training.path)  # now with the evaluation
    return [
        evaluated,
        demo_report.modify_image(demo.samples / "model", demo.data, modified),
        demo_report.search(demo.data, demo.root / "search.png"),
        demo_report.look_for_memorised(demo.samples / "model", demo.data, memorised),
    ]


def write_demo_report(demo: DemoDir, verdicts: dict[str, Agreement], sections: "list[ImageSection]") -> Path:
    """Writes the demo's report page."""
    from filters.decide.losses import heavy_losses
    from filters.inspect.report import limits_of, rule_thresholds, scores_note
    from flows.demo_report import shown, summarise
    from sdtrain.formats.checkpoint import find_checkpoint
    from sdtrain.report.page import Report, SampleSection, write_report

    again = f"python -m flows.demo --output {shown(demo.root)}"
    data, run = shown(demo.data.root), shown(demo.training.path)
    drawn = demo.samples / f"summary-{find_checkpoint(demo.training.path).path.name}"
    names = {
        "seen": ("trained", "pairs seen in training"),
        "unseen": ("trained", "pairs never seen together (red frames)"),
        "untrained": ("untrained", "pairs seen in training"),
    }
    samples = SampleSection(
        demo.samples / "samples.png",
        "Prompts are “a COLOUR SHAPE”; every image has its own seed. A checker that looks at pixels only says which "
        "colour and shape it sees, over guidance scales 3 to 8.",
        [(*names[name], v.num_images, v.color, v.shape) for name, v in verdicts.items()],
        again,
    )
    report = Report(
        title="sdtrain demo: from metadata to images",
        lead="A little world of coloured shapes, selected, downloaded, scored, deduplicated, packed, encoded and "
        "trained on, all on this machine.",
        dataset=demo.data,
        limits=limits_of(demo_recipe(demo)),
        thresholds=list(rule_thresholds(demo_recipe(demo))),
        scores_note=scores_note(demo_recipe(demo)),
        warn=partial(heavy_losses, recipe=demo_recipe(demo)),
        place=data,
        summary=summarise(demo.samples / "model", drawn, verdicts, again),
        training=demo.training,
        training_command=f"deepspeed sdtrain/train.py --config {CONFIG} --data {data} --output {run}",
        samples=samples,
        sections=sections,
        card=demo.training.path / "README.md",
        find_image=open_world(demo.world).image_of,
    )
    return write_report(report, demo.report)


def run_demo(output: Path, num_rows: int, steps: int | None) -> dict[str, float | str]:
    """Runs everything in order; returns the demo's metrics."""
    demo = DemoDir(output.absolute())
    clock = DemoClock(demo.root)
    with own_prefect(demo.root / "prefect"):
        build_demo(str(demo.root), num_rows)
        train_demo(str(demo.root), steps)
    verdicts = sample_demo(demo)
    report = write_demo_report(demo, verdicts, look_closer(demo))
    clock.record(verdicts, demo.training.path, demo.data.root, num_rows, steps)
    figures: dict[str, float | str] = {"seconds": round(clock.seconds, 1)}
    for name, verdict in verdicts.items():
        figures |= {f"color_{name}": round(verdict.color, 3), f"shape_{name}": round(verdict.shape, 3)}
    return figures | {"report": str(report)}


def main() -> int:
    """Prints the metrics as JSON on the last line."""
    parser = argparse.ArgumentParser(description="Runs the demo.")
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the tiny config's)")
    arguments = parser.parse_args()
    return print_figures(lambda: run_demo(arguments.output, arguments.rows, arguments.steps), look_at="report")


if __name__ == "__main__":
    sys.exit(main())
