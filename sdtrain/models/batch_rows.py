"""Fills batches up to the number of rows that a network was compiled for."""

from __future__ import annotations

import torch


def fill_rows(rows: torch.Tensor, number: int) -> torch.Tensor:
    """At least `number` rows: (B, ...) with its last one repeated."""
    missing = number - len(rows)
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing > 0 else rows
