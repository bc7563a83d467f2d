"""Images of a dataset on S3 are used again where their selection has changed, on whatever machine."""

from __future__ import annotations

import pytest

from sdtrain.dataset.lock import lock_to_change
from sdtrain.dataset.open import dataset_at
from sdtrain.dataset.sync import keep_local
from tests.sdtrain.dataset.s3.s3_fixtures import BUCKET
from tests.sdtrain.download.download_fixtures import prepare, serve_site


@pytest.mark.parametrize("machine", ["same", "empty"])
def test_a_grown_shard_fetches_its_images_from_s3_and_not_from_the_web(store, tmp_path, machine):
    with serve_site() as site:
        urls = site.serve_photos(4)
        first = dataset_at(f"s3://{BUCKET}/grown-{machine}", tmp_path / "first")
        with lock_to_change(first, "sdtrain build"):
            build = prepare(first.root, urls[:3])
            keep_local(first, kept=False)
            build.run()
        assert not first.images_tar(0).exists()
        site.asked.clear()

        then = first if machine == "same" else dataset_at(first.url, tmp_path / "then")
        with lock_to_change(then, "sdtrain build"):
            (report,) = prepare(then.root, urls).run()
        assert report.num_out == 4
        assert site.asked == {"photo/3.jpg": 1}
    assert store.objects(f"grown-{machine}").keys() >= {"images/00000.tar", "manifest/download/00000.json"}
