import json
import sys

import pytest
from PIL import Image

from filters.memorization.samples import read_samples, repeated_captions
from sdtrain import cli
from sdtrain.demo.agreement import export_untrained


@pytest.mark.long
def test_images_are_drawn_for_the_captions_that_repeat_and_not_again_in_a_second_run(
    embedded_dataset, tmp_path, monkeypatch
):
    model, out = export_untrained("tiny", tmp_path / "model"), tmp_path / "out"
    command = ["memorised", model, "--data", embedded_dataset.root, "--output", out, "--repeated-prompts", 2]
    monkeypatch.setattr(sys, "argv", ["sdtrain", *map(str, command), "--per-prompt", "1", "--steps", "2"])
    times = []
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        times.append({path.name: path.stat().st_mtime_ns for path in (out / "samples").glob("*.png")})
    assert list(times[0])
    assert times[0] == times[1]
    rows = json.loads((out / "memorised.json").read_text())["samples"]
    assert {row["prompt"] for row in rows} == {caption for caption, _ in repeated_captions(embedded_dataset, 2)}


def test_a_folders_sheets_and_hidden_files_are_no_samples(tmp_path):
    for name in ("00000.png", "b.JPG", "grid.png", "grid-1.png", "grid-12.png", "gridlock.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "._00000.png").write_bytes(b"no image")
    assert [sample.name for sample in read_samples(tmp_path)] == ["00000.png", "b.JPG", "gridlock.png"]
