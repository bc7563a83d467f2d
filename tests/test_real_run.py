"""Real photographs, captions and LAION rows through every stage, at the size of the published networks."""

from __future__ import annotations

import csv
import http.server
import io
import threading
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from filters.pipeline import stages_of
from filters.recipe import RECIPES_DIR, load_recipe
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import entries
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.dataset.tars import read_samples
from tests.full_size_vae import write_full_size_vae

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
NUM_LAION_ROWS = 3
RESOLUTION = 256

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not SHARED.exists(), reason="the real photographs are not beside this checkout"),
]


@pytest.fixture
def web():
    """A loopback server that answers each path it was taught with a file; yields (base URL, paths)."""
    pages: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = pages.get(self.path)
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", pages
    server.shutdown()
    server.server_close()


def photographs() -> list[tuple[str, str, bytes]]:
    """(name, caption, bytes) of the photographs; some are gray, some too small."""
    with (SHARED / "captions.tsv").open() as file:
        captions = {row[0]: row[1] for row in csv.reader(file, delimiter="\t") if len(row) > 1}
    files = [*sorted(SHARED.glob("photos/kodak_*.png"))[:4], *sorted(SHARED.glob("photos/varied/c*.png"))]
    return [(f.name, captions.get(f.name, captions.get(f"varied/{f.name}", f.stem)), f.read_bytes()) for f in files]


def write_metadata(path: Path, base: str, pages: dict[str, bytes]) -> int:
    rows, photos = [], photographs()
    for name, caption, content in photos:
        pages[f"/{name}"] = content
        rows.append((f"{base}/{name}", caption))
    for i, row in enumerate(pq.read_table(SHARED / "laion400m_url_text.parquet").slice(0, NUM_LAION_ROWS).to_pylist()):
        target = "/" + quote(urlsplit(row["URL"]).path.lstrip("/") + f"-{i}")
        pages[target] = photos[i][2]
        rows.append((base + target, row["TEXT"]))
    count = len(rows)
    columns = {
        "URL": [url for url, _ in rows],
        "TEXT": [text for _, text in rows],
        "WIDTH": pa.array([768] * count, pa.int32()),
        "HEIGHT": pa.array([512] * count, pa.int32()),
        "similarity": [0.3] * count,
        "pwatermark": pa.array([0.1] * count, pa.float32()),
        "punsafe": pa.array([0.01] * count, pa.float32()),
        "AESTHETIC_SCORE": pa.array([6.0] * count, pa.float32()),
    }
    pq.write_table(pa.table(columns), path)
    return count


def test_photographs_and_laion_rows_pass_through_every_stage(web, tmp_path):
    base, pages = web
    num_rows = write_metadata(tmp_path / "rows.parquet", base, pages)
    content = yaml.safe_load((RECIPES_DIR / "laion-aesthetics.yaml").read_text())
    content["select"] |= {"metadata": str(tmp_path / "rows.parquet"), "samples_per_shard": 5}
    content["download"] = {"allow_private_hosts": True}
    aesthetic = str(SHARED / "aesthetic" / "sac+logos+ava1-l14-linearMSE.pth")
    seeds = dict.fromkeys(("clip_weights", "watermark_weights", "safety_weights"), "random:0")
    content["score"] = seeds | {"clip_model": "ViT-L-14-quickgelu", "aesthetic_weights": aesthetic, "batch_size": 4}
    content["duplicates"] = {"level": "exact"}
    content["encode"] = {"vae": str(write_full_size_vae(tmp_path / "vae")), "resolution": RESOLUTION, "batch_size": 2}
    content["encode"]["min_psnr_db"] = 0  # with random weights no image comes back
    (tmp_path / "real.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    recipe, dataset = load_recipe(str(tmp_path / "real.yaml")), DatasetDir(tmp_path / "data")
    for stage in stages_of(recipe):
        run_batch(stage, dataset, recipe, pending(stage, dataset, recipe))
        assert not pending(stage, dataset, recipe)

    kept = entries(dataset, "decide")[0]
    assert kept.num_in == num_rows
    # The LAION rows show the photographs again, and two of the varied images are too small.
    assert kept.dropped["duplicate_exact"] == NUM_LAION_ROWS
    assert kept.dropped["min_side"] >= 1
    scores = pa.concat_tables(pq.read_table(dataset.scores(e.shard)) for e in entries(dataset, "score")).to_pylist()
    assert all(-13 < row["aesthetic"] < 24 for row in scores), "the bounds of the V2 head on the unit sphere"
    latents = [s for e in entries(dataset, "encode") for s in read_samples(dataset.latents_tar(e.shard))]
    assert len(latents) == kept.num_out
    for _, members in latents:
        moments = np.load(io.BytesIO(members["moments.npy"]))
        assert moments.shape == (8, RESOLUTION // 8, RESOLUTION // 8)
        assert moments.dtype == np.float16
