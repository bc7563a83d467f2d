"""Measures what captions are worth: two runs on the same images, with poor alt texts and with generated captions.

`make demo-captions` runs it here. It is the demo's world, but most of its alt texts say nothing of their image; the
stage `caption` asks a local server that speaks OpenAI's protocol. Both runs have the same samples, noise and steps, so
that they differ in their captions alone.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from PIL import Image, ImageDraw, ImageFont
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
from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.demo.agreement import Trial, draw_sheet, try_model
from sdtrain.demo.captioner import MODEL, serve_captioner
from sdtrain.demo.checker import Agreement
from sdtrain.demo.server import serve_world
from sdtrain.demo.world import make_world
from sdtrain.formats.export import export_model
from sdtrain.settings import parse_settings
from sdtrain.training.run_dir import RunDir

CONFIG = "tiny"
USELESS = 0.8
SOURCES = {"alt": ("alt",), "captions": ("short", "alt")}
"""Each run, and the sources that it takes a sample's caption from, first ones first."""
_PROMPT = "Name the colour and shape in the image, as in: a red circle."


@dataclass(frozen=True)
class CaptionDemo:
    """The output directory."""

    root: Path

    @property
    def data(self) -> DatasetDir:
        """The dataset of both runs."""
        return DatasetDir(self.root / "data")

    @property
    def sheet(self) -> Path:
        """Samples of both models, side by side."""
        return self.root / "captions.png"

    @property
    def figures(self) -> Path:
        """The agreement of both, with the time that it took."""
        return self.root / "captions.json"

    def training(self, name: str) -> RunDir:
        """One of the runs."""
        return RunDir(self.root / "training" / name)


def run_caption_demo(output: Path, num_rows: int, steps: int | None) -> dict[str, object]:
    """Builds, trains both models, samples them, and returns their agreement with their prompts."""
    demo, began = CaptionDemo(output.absolute()), time.monotonic()
    with own_prefect(demo.root / "prefect"):
        build_and_train(str(demo.root), num_rows, steps)
    trials = {name: try_model(export_model(demo.training(name).path, demo.root / "models" / name)) for name in SOURCES}
    draw_comparison(trials).save(demo.sheet)
    figures: dict[str, object] = {name: asdict(overall(trial)) for name, trial in trials.items()}
    figures |= {"useless_alt_texts": USELESS, "seconds": round(time.monotonic() - began, 1), "sheet": str(demo.sheet)}
    with publish(demo.figures) as temporary:
        temporary.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


@flow(name="demo-captions")
@report_user_errors
def build_and_train(output: str, num_rows: int, steps: int | None) -> None:
    """Builds the dataset with its captions, and trains both models on it.

    Args:
        output: The demo's directory.
        num_rows: Rows of metadata.
        steps: Optimizer steps of each run; by default the config's.
    """
    demo = CaptionDemo(Path(output))
    world = make_world(demo.root / "world", num_rows, useless=USELESS)
    with serve_world(world), serve_captioner() as captioner:
        build(caption_recipe(world.metadata, captioner), BuildOptions(output=str(demo.data.root)), StageOptions())
    for name in SOURCES:
        train(write_config(demo, name), str(demo.data.root), str(demo.training(name).path), steps)


def caption_recipe(metadata: Path, captioner: str) -> Recipe:
    """The demo's recipe, with captions from the server at this address."""
    recipe = load_recipe("demo", BuildOptions(metadata=str(metadata))).model_dump(mode="json")
    recipe["caption"] = {"endpoint": {"url": captioner, "model": MODEL}, "prompts": {"short": _PROMPT}, "image_px": 512}
    return parse_settings(Recipe, recipe, "demo with captions")


def write_config(demo: CaptionDemo, name: str) -> str:
    """The demo's training with captions of some sources, as a file that the launcher reads."""
    config = load_config(CONFIG).model_dump(mode="json", exclude_defaults=True)
    config["data"] = config.get("data", {}) | {"captions": {"first": list(SOURCES[name])}}
    path = demo.root / f"{CONFIG}-{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return str(path)


def overall(trial: Trial) -> Agreement:
    """Over all prompts: pairs in training, and pairs never seen together."""
    parts = trial.seen, trial.unseen
    num = sum(part.num_images for part in parts)

    def share(name: str) -> float:
        right: float = sum(getattr(part, name) * part.num_images for part in parts)
        return round(right / num, 4)

    return Agreement(share("color"), share("shape"), share("both"), num)


def draw_comparison(trials: dict[str, Trial]) -> Image.Image:
    """Draws the sheets of both models beside each other, with the share of prompts each follows."""
    font, head_px, gap_px = ImageFont.load_default(20), 44, 24
    sheets = [draw_sheet(trial) for trial in trials.values()]
    width = sum(sheet.width for sheet in sheets) + gap_px
    page = Image.new("RGB", (width, head_px + max(sheet.height for sheet in sheets)), "white")
    pen, left = ImageDraw.Draw(page), 0
    titles = {"alt": f"alt texts, {USELESS:.0%} of them useless", "captions": "generated captions"}
    for (name, trial), sheet in zip(trials.items(), sheets, strict=True):
        page.paste(sheet, (left, head_px))
        pen.text((left + 8, 10), f"{titles[name]}: {overall(trial).both:.0%} of prompts right", fill="black", font=font)
        left += sheet.width + gap_px
    return page


def main() -> int:
    """Prints the figures as JSON on the last line."""
    parser = argparse.ArgumentParser(description="Runs the demo of captions.")
    parser.add_argument("--output", type=Path, default=Path("demo-output/captions"))
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the tiny config's)")
    arguments = parser.parse_args()
    return print_figures(lambda: run_caption_demo(arguments.output, arguments.rows, arguments.steps), look_at="sheet")


if __name__ == "__main__":
    sys.exit(main())
