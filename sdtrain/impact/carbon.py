"""Emissions of electricity by the region of the data centre.

Emissions = power x time x carbon intensity of the grid (Lacoste et al. 2019, "Quantifying the Carbon Emissions of
Machine Learning", arXiv:1910.09700). The table is their calculator's (github.com/mlco2/impact, data/impact.csv: eGRID
for the USA, national figures elsewhere). Grids are cleaner since 2019: state your provider's newer figure if known. We
added `aws/us-east`: the 0.3 kg/kWh that SD v1's model card implies (11,250 kg for 150,000 hours at 250 W).
"""

from __future__ import annotations

import csv
import difflib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sdtrain.errors import UserError
from sdtrain.settings import nearest

_TABLE = Path(__file__).parent / "carbon.csv"
CORE_W = 7.0
"""Assumed for a busy server core with its share of the package: 225 to 350 W for 32 to 64 cores are 4 to 10 W each."""


@dataclass(frozen=True)
class Region:
    """A region as in "aws/us-east-1"; `kg_per_kwh` is kg of CO2 equivalents."""

    name: str
    place: str
    kg_per_kwh: float


@lru_cache(maxsize=1)
def regions() -> dict[str, Region]:
    """All regions of the table, by name."""
    with _TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["region"]: Region(row["region"], row["place"], float(row["g_per_kwh"]) / 1000) for row in rows}


def find_region(name: str) -> Region:
    """The region of that name; UserError, with near names ("us-est-1" is as near to east as to west), if unknown."""
    found = regions().get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), list(regions()), n=3)
        hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else nearest(name, list(regions()))
        raise UserError(
            f"There is no region '{name}' in the table of carbon intensities.{hint} Or state your grid's own figure, "
            "kg_per_kwh."
        )
    return found


def energy_kwh(hours: float, watts: float) -> float:
    """Energy of `hours` device-hours at `watts` each."""
    return hours * watts / 1000


def emissions_kg(kwh: float, kg_per_kwh: float, pue: float = 1.0) -> float:
    """Kg of CO2 equivalents (Lacoste et al. 2019); `pue` is the whole data centre's energy over its computers'."""
    return kwh * pue * kg_per_kwh
