"""Published weights that recipes name."""

from __future__ import annotations

from pathlib import Path

from sdtrain.dataset.files import sha256_of
from sdtrain.models import weights
from sdtrain.models.weights import Published, random_seed

_LAION = "https://github.com/LAION-AI"
_SSCD = "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchscript.pt"
PUBLISHED = {
    "laion-aesthetic-v2-l14": Published(
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
        "sac+logos+ava1-l14-linearMSE.pth",
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    ),
    "laion-aesthetic-v1-l14": Published(
        f"{_LAION}/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
        "sa_0_4_vit_l_14_linear.pth",
        "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
    ),
    "laion-watermark-v1": Published(
        f"{_LAION}/LAION-5B-WatermarkDetection/raw/main/models/watermark_model_v1.pt", "watermark_model_v1.pt"
    ),
    "laion-nsfw-l14": Published(
        f"{_LAION}/CLIP-based-NSFW-Detector/raw/main/models/clip_ViT-L-14_openai_binary_nsfw_head.pth",
        "clip_ViT-L-14_openai_binary_nsfw_head.pth",
    ),
    "sscd-disc-mixup": Published(_SSCD, "sscd_disc_mixup.torchscript.pt"),
}


def find_weights(name: str) -> Path:
    """Returns the weights file for a known name (fetched into the cache if needed) or a path.

    UserError if there is no such file or name, the download failed, or the file is not the published one.
    """
    return weights.find_weights(name, PUBLISHED, "name another file, or null to skip, in the recipe's score")


def digest_of(name: str | None) -> str:
    """Identifies weights in a fingerprint: their digest, the name of random ones, or "none"."""
    if name is None:
        return "none"
    return name if random_seed(name) is not None else sha256_of(find_weights(name))
