"""Describes the dataset that a recipe asks for as plans see it: its sizes, stages and requests to servers."""

from __future__ import annotations

from filters.caption_config import PROMPTS
from filters.recipe import Recipe
from sdtrain.dataset.work import CAPTIONS_HERE, WORK, Work
from sdtrain.endpoint.config import EndpointConfig
from sdtrain.plan.estimate import DatasetJob
from sdtrain.plan.requests import Requests


def dataset_job(recipe: Recipe, num_rows: int | None) -> DatasetJob:
    """The dataset of `num_rows` selected rows; None takes the recipe's known number."""
    return DatasetJob(
        recipe.name,
        recipe.download.image_size,
        recipe.encode.resolution,
        recipe.encode.num_crops,
        num_rows,
        has_texts=recipe.encode.text_embeddings != "none",
        has_urls_together=recipe.select.shuffle_by == "url",
        requests=_requests(recipe),
    )


def planned_work(recipe: Recipe) -> dict[str, Work | None]:
    """The work of the recipe's stages, in order, without loading what the stages load."""
    caption = recipe.caption
    optional = {
        "caption": (caption.is_on, CAPTIONS_HERE if caption.model else WORK["caption"] if caption.endpoint else None),
        "ask": (bool(recipe.questions), WORK["ask"]),
    }
    stages = {name: optional.get(name, (True, work)) for name, work in WORK.items()}
    return {name: work for name, (is_on, work) in stages.items() if is_on}


def _requests(recipe: Recipe) -> dict[str, Requests]:
    """What is asked about each image, by stage."""
    caption = recipe.caption
    found = {}
    if caption.is_generated:
        num = len(caption.prompts or PROMPTS)
        found["caption"] = Requests(num, *_prices(caption.endpoint), max_answer_tokens=caption.max_tokens)
    if recipe.questions:
        found["ask"] = Requests(len(recipe.questions), *_prices(recipe.asked.endpoint))
    return found


def _prices(endpoint: EndpointConfig | None) -> tuple[float, float]:
    return (endpoint.prompt_price, endpoint.completion_price) if endpoint else (0.0, 0.0)
