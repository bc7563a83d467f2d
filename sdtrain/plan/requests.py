"""Counts requests to a network that is asked about images, their tokens and their price."""

from __future__ import annotations

from dataclasses import dataclass

from sdtrain.plan.rates import Rates


@dataclass(frozen=True)
class Requests:
    """What a stage asks about each image: `num` requests, at prices in US dollars per million tokens.

    `max_answer_tokens` is the recipe's limit of an answer, None if it has none.
    """

    num: int
    prompt_price: float = 0.0
    completion_price: float = 0.0
    max_answer_tokens: int | None = None

    def remarks(self, stage: str, num_requests: float, rates: Rates) -> tuple[str, ...]:
        """Their number, and their tokens and price by `rates`, or what to state for these."""
        names = f"{stage}_prompt_tokens", f"{stage}_completion_tokens"
        prompt, completion = (rates[name].value * num_requests if name in rates else None for name in names)
        about = f"{num_requests:,.0f} requests, {self.num} about each image"
        if prompt is None or completion is None:
            limit = f", an answer at most {self.max_answer_tokens}" if self.max_answer_tokens else ""
            wanted = " and ".join(f"--assume {name}=N" for name in names if name not in rates)
            return (f"{about}; their tokens and price depend on the network{limit}: state {wanted}, of one request",)
        dollars = (prompt * self.prompt_price + completion * self.completion_price) / 1e6
        price = f", {dollars:,.2f} US dollars at the recipe's prices" if dollars else ""
        return (f"{about}; {prompt:,.0f} tokens of questions and {completion:,.0f} of answers{price}",)
