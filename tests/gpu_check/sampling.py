"""Stage `sample`: 16 images with 50 PLMS steps and guidance, from prompts to PNG files."""

from __future__ import annotations

from dataclasses import replace

from sdtrain.sampling.batch import make_jobs
from tests.benchmarks.sample import SIZE, Size, ours, timed, write_model
from tests.gpu_check.child import Check

NUM_IMAGES, NUM_STEPS = 16, 50
SMALL = replace(SIZE, side_px=64, unet=(32, 32, 64, 64), vae=(32, 32, 32, 32))
_COMPILING_S = 60


def sample(check: Check) -> None:
    size: Size = SMALL if check.is_small else SIZE
    num_images, num_steps = (2, 5) if check.is_small else (NUM_IMAGES, NUM_STEPS)
    model = write_model(check.work / "pipeline", size)
    jobs = make_jobs([f"a painting of thing number {number}" for number in range(num_images)], 0, 1)
    check.record(side_px=size.side_px, num_images=num_images, num_steps=num_steps)
    for compiling in ("off",) if check.is_small else ("off", "regional"):
        if compiling != "off" and check.seconds_left() < _COMPILING_S:
            check.record(**{f"compile_{compiling}": f"skipped: {check.seconds_left():.0f} s were left"})
            continue
        draw = ours(model, check.work / f"drawn-{compiling}", num_images, compiling)
        draw(jobs, 1)
        wall_s, _ = timed(draw, jobs, num_steps)
        check.record(**{f"compile_{compiling}": {"images_per_s": round(num_images / wall_s, 3)}})
        drawn = list((check.work / f"drawn-{compiling}").rglob("*.png"))
        check.expect(len(drawn) == num_images, f"{len(drawn)} images were written, not {num_images}")
