"""Section of a training configuration: what the model card says that no record holds."""

from __future__ import annotations

from pydantic import Field, field_validator

from sdtrain.config.resuming import Free
from sdtrain.errors import UserError
from sdtrain.impact.carbon import find_region
from sdtrain.impact.gpus import board_watts
from sdtrain.settings import Settings


class CardConfig(Settings):
    """Licence of the weights, and where and on what they were made."""

    license: Free[str] = "creativeml-openrail-m"
    """The weights' licence, as the Hub names it."""
    gated: Free[bool] = True
    """Whether the Hub asks people to agree to the licence before they may download."""
    region: Free[str | None] = None
    """Where the electricity is from, as in aws/us-east-1; null: CO2 is not computed, unless kg_per_kwh is given."""
    kg_per_kwh: Free[float | None] = Field(default=None, gt=0)
    """Carbon intensity of the grid, where you know better than the table of 2019 by region."""
    pue: Free[float] = Field(default=1.0, ge=1)
    """What the whole data centre draws over what its computers draw."""
    gpu_watts: Free[float | None] = Field(default=None, gt=0)
    """Power of a GPU where its counter cannot be read; null: as its data sheet says."""
    data_gpu: Free[str | None] = None
    """GPU that scored and encoded the images, as in "H200"; null: CPU cores. Manifests hold seconds, not devices."""
    data_cores: Free[float] = Field(default=1.0, gt=0)
    """CPU cores that each worker of the data stages kept busy."""

    @field_validator("region")
    @classmethod
    def _region_is_known(cls, name: str | None) -> str | None:
        try:
            return name and find_region(name).name
        except UserError as error:
            raise ValueError(str(error)) from error

    @field_validator("data_gpu")
    @classmethod
    def _power_is_known(cls, name: str | None) -> str | None:
        if name is not None and board_watts(name) is None:
            raise ValueError("no board power is known for this GPU; name one of NVIDIA's data-centre GPUs, as in H200")
        return name

    def intensity(self) -> float | None:
        """Kg of CO2 equivalents a kWh; None if nobody said where."""
        if self.kg_per_kwh is not None or self.region is None:
            return self.kg_per_kwh
        return find_region(self.region).kg_per_kwh
