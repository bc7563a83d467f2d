"""The demo's report: its summary, evaluation, search, images made from an image, and memorised images."""

import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from filters.memorization.check import check_samples, write_memorised
from filters.memorization.samples import draw_samples, repeated_captions
from filters.search.hits import Hit, image_of
from filters.search.search import Search
from filters.search.sheet import Cell, Row, write_sheet
from sdtrain.cli.evaluate import command_of
from sdtrain.dataset.files import scratch
from sdtrain.dataset.layout import DatasetDir
from sdtrain.demo.checker import Agreement
from sdtrain.demo.evaluation import demo_protocol, evaluate_demo
from sdtrain.demo.images import UNSEEN_PAIRS
from sdtrain.errors import UserError
from sdtrain.report.page import ImageSection
from sdtrain.report.summary import Drawn, Facts, Summary
from sdtrain.sampling.sampler import Sampler, SampleSettings, load_networks
from sdtrain.sampling.start_image import open_start_image
from sdtrain.training.run_dir import RunDir

_GUIDANCE = "Guidance"
_QUESTION, _NUM_HITS = "a red circle", 6
_NUM_CAPTIONS, _PER_CAPTION = 3, 2
_GUIDANCE_SCALE, _NUM_STEPS = 3.0, 25
_CHANGES, _STRENGTHS = ("a blue circle", "a green star"), (0.4, 0.6, 0.8, 1.0)
_SHOWN = ("red circle", "yellow square", "pink ring", "green circle", "blue square", "cyan cross")
"""The summary's images: three pairs that were seen together in training, three that were not."""


def shown(path: Path) -> str:
    """A path as commands on the page name it: from the current folder, if it is below that."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def summarise(model: Path, folder: Path, verdicts: Mapping[str, Agreement], again: str) -> Summary:
    """What the page says first; `folder` gets its images, once, and `again` is the command of the whole demo."""
    prompts = [f"a {pair}" for pair in _SHOWN]
    notes = ["a pair that training lacked" if tuple(pair.split()) in UNSEEN_PAIRS else "" for pair in _SHOWN]
    samples = draw_samples(model, prompts, 1, 0, folder, SampleSettings(_GUIDANCE_SCALE, _NUM_STEPS))
    files = [folder / sample.name for sample in samples]
    quoted = " ".join(f'"{prompt}"' for prompt in prompts)
    command = f"sdtrain sample {shown(model)} {quoted} --guidance {_GUIDANCE_SCALE:g} --steps {_NUM_STEPS}"
    seen = verdicts["seen"]
    shares = [(f"{100 * seen.color:.0f} %", "colours right"), (f"{100 * seen.shape:.0f} %", "shapes right")]
    return Summary(
        built="What came out: a dataset with a reason for every row that is not in it, a UNet trained on its latents, "
        "and its evaluation.",
        facts=[Facts(shares, again)],
        drawn=Drawn(list(zip(files, prompts, notes, strict=True)), command),
        curve=_GUIDANCE,
        where="The command beside a number gives it again, from the folder where the demo was started.",
    )


def evaluate(run: RunDir, data: DatasetDir) -> ImageSection:
    """The trained model over guidance scales."""
    print("Evaluating over guidance scales ...", flush=True)
    results, curve = evaluate_demo([run.path], data.root, run.path / "evaluation")
    lines = [f"{name}: {text}" for name, text in results.metrics.items()]
    text = (
        "The same prompts and the same noise at each guidance scale, as in the model card of Stable Diffusion v1. "
        "These numbers are the demo's own and compare with no others: no published network is at hand offline."
    )
    protocol = demo_protocol(data.root, run.path / "evaluation")
    named = {"prompts": shown(Path(protocol.prompts)), "reference": shown(data.root)}
    again = command_of(shown(run.path), protocol.model_copy(update=named))
    return ImageSection(_GUIDANCE, text, curve, lines, again)


def search(data: DatasetDir, sheet: Path) -> ImageSection:
    """The results of a search, as a sheet."""
    asked = Search(data)
    found = asked.by_words(_QUESTION, _NUM_HITS)
    rows = [Row(f"“{_QUESTION}”, by the words of captions", _cells(data, found))]
    if found and (image := image_of(data, found[0])):
        near = asked.by_images([image], _NUM_HITS)[0]
        rows.append(Row("Nearest to the first of these, by embedding", _cells(data, near)))
    write_sheet(sheet, f"{asked.num_images:,} images", [], rows)
    text = (
        "The training data can be searched, by caption or by image; each answer says where it is from and whether it "
        "was kept. The page with a search box, onto which images can be dropped as well:"
    )
    again = f'sdtrain search {shown(data.root)} "{_QUESTION}" --words --top {_NUM_HITS}'
    return ImageSection("Search", text, sheet, [f"sdtrain search {shown(data.root)} --serve"], again)


def modify_image(model: Path, data: DatasetDir, folder: Path) -> ImageSection:
    """Images that the model makes from a training image, by other prompts; further right less of it stays.

    Once per folder.
    """
    sheet = folder / "image-to-image.png"
    if not sheet.exists():
        folder.mkdir(parents=True, exist_ok=True)
        hits = Search(data).by_words(_QUESTION, _NUM_HITS)
        found = next(((image, hit.caption) for hit in hits if (image := image_of(data, hit))), None)
        if found is None:
            raise UserError(f"{data.root} holds no image of “{_QUESTION}” to modify. Take more rows.")
        write_modified(model, *found, sheet)
    text = (
        "Image-to-image: noise is added to a training image up to one of the last timesteps, and taken away from there "
        "with another prompt. At strength 1 nearly nothing of the image is left."
    )
    again = (
        f'sdtrain sample {shown(model)} "{_CHANGES[0]}" --image IMAGE --strength {_STRENGTHS[0]:g} '
        f"--guidance {_GUIDANCE_SCALE:g} --steps {_NUM_STEPS}"
    )
    return ImageSection("Modified images", text, sheet, command=again)


def write_modified(model: Path, start: Image.Image, caption: str, sheet: Path) -> None:
    """Writes a sheet with a row for each prompt: the image, and what is made of it at rising strengths."""
    with scratch(sheet.parent, "start") as scratch_folder:
        file = scratch_folder / "start.png"
        start.save(file)
        sampler, drawn = Sampler(load_networks(model)), []
        for strength in _STRENGTHS:
            settings = SampleSettings(_GUIDANCE_SCALE, _NUM_STEPS, start=open_start_image(file, strength))
            drawn.append(sampler.sample(_CHANGES, range(len(_CHANGES)), settings))
    rows = [
        Row(f"“{prompt}”", [Cell(start, "from", f"“{caption}”"), *_strengths([images[place] for images in drawn])])
        for place, prompt in enumerate(_CHANGES)
    ]
    write_sheet(sheet, "Image-to-image", [], rows)


def _strengths(images: list[Image.Image]) -> list[Cell]:
    return [Cell(image, f"strength {strength:g}") for image, strength in zip(images, _STRENGTHS, strict=True)]


def look_for_memorised(model: Path, data: DatasetDir, folder: Path) -> ImageSection:
    """Samples of the most repeated captions beside their nearest training images; once per folder."""
    if not (folder / "memorised.png").exists():
        print("Looking for training images among samples ...", flush=True)
        captions = [caption for caption, _ in repeated_captions(data, _NUM_CAPTIONS)]
        settings = SampleSettings(_GUIDANCE_SCALE, _NUM_STEPS)
        samples = draw_samples(model, captions, _PER_CAPTION, 0, folder / "samples", settings)
        write_memorised(check_samples(Search(data), samples), data, folder)
    found = json.loads((folder / "memorised.json").read_text())
    text = (
        "Samples for captions that repeat in training, each beside the training images nearest to it: "
        f"{found['same']} of {found['num_samples']} are the same as one. In a world of plain shapes, and with a "
        "stand-in for CLIP, nearly all are flagged as alike."
    )
    again = (
        f"sdtrain memorised {shown(model)} --data {shown(data.root)} --repeated-prompts {_NUM_CAPTIONS} "
        f"--per-prompt {_PER_CAPTION} --guidance {_GUIDANCE_SCALE:g} --steps {_NUM_STEPS}"
    )
    return ImageSection("Is anything memorised?", text, folder / "memorised.png", found["notes"], again)


def _cells(data: DatasetDir, hits: list[Hit]) -> list[Cell]:
    return [Cell(image_of(data, hit), f"{hit.similarity:.3f} {hit.status}", hit.caption) for hit in hits]
