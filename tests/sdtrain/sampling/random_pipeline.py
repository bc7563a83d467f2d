"""A pipeline with random weights whose prediction does depend on latents and caption."""

import torch

from sdtrain.config import load_config
from sdtrain.formats.export import write_pipeline
from sdtrain.models.unet import build_unet
from tests.training_fixtures import write_config, write_models


def write_random(root, **diffusion):
    models = write_models(root / "models")
    config = load_config(str(write_config(root / "c.yaml", models, root / "data", diffusion=diffusion)))
    torch.manual_seed(0)
    unet = build_unet(config.unet, config.latent_size)
    with torch.no_grad():
        for parameter in unet.parameters():
            if (parameter == 0).all():
                parameter.normal_(0, 0.05)
    return write_pipeline(unet, config, root / "out")
