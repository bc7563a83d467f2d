"""Section of a training configuration: facts for the model card that no record holds."""

from __future__ import annotations

from pydantic import Field, field_validator

from sdtrain.config.resuming import Free
from sdtrain.errors import UserError
from sdtrain.impact.carbon import find_region
from sdtrain.impact.gpus import board_watts
from sdtrain.settings import Settings


class CardConfig(Settings):
    """Licence of the weights, and place and hardware of their training."""

    license: Free[str] = "creativeml-openrail-m"
    """By its name on the Hub."""
    gated: Free[bool] = True
    """Whether the Hub asks users to accept the licence before downloading."""
    region: Free[str | None] = None
    """Origin of the electricity, as in aws/us-east-1; null: no CO2 is computed, unless kg_per_kwh is given."""
    kg_per_kwh: Free[float | None] = Field(default=None, gt=0)
    """Carbon intensity of the grid; overrides the table of 2019 by region."""
    pue: Free[float] = Field(default=1.0, ge=1)
    """Power of the whole data centre over that of its computers."""
    gpu_watts: Free[float | None] = Field(default=None, gt=0)
    """Power of a GPU without a readable counter; null: from its data sheet."""
    data_gpu: Free[str | None] = None
    """GPU that scored and encoded the images, as in "H200"; null: CPU cores. Manifests hold seconds, not devices."""
    data_cores: Free[float] = Field(default=1.0, gt=0)
    """CPU cores kept busy by each worker of the data stages."""

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
        """Kg of CO2 equivalents per kWh; None if unknown."""
        if self.kg_per_kwh is not None or self.region is None:
            return self.kg_per_kwh
        return find_region(self.region).kg_per_kwh
