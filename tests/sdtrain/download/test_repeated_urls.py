"""A URL that several rows of a shard name is fetched once, and each row has its own outcome."""

import hashlib
import io
from collections import Counter

import pytest
from PIL import Image

from sdtrain.dataset.stage import pending
from sdtrain.dataset.tars import read_samples
from sdtrain.download.retry import retry_failed
from sdtrain.download.stage import DOWNLOAD
from tests.sdtrain.download.download_fixtures import encoded, photo, prepare, serve_site


@pytest.fixture(scope="module")
def online():
    with serve_site() as site:
        site.serve_photos(4)
        yield site


@pytest.fixture
def site(online):
    online.asked, online.status = Counter(), {}
    return online


def test_every_row_of_a_repeated_url_has_its_own_sample(site, tmp_path):
    urls = [site.url("photo/0.jpg"), *[site.url("photo/1.jpg")] * 4, site.url("photo/0.jpg")]
    build = prepare(tmp_path, urls)
    (report,) = build.run()
    assert site.asked == {"photo/0.jpg": 1, "photo/1.jpg": 1}
    assert (report.num_in, report.num_out) == (6, 6)
    rows = build.rows()
    assert [row["url"] for row in rows] == urls
    assert len({row["uid"] for row in rows}) == 6
    samples = dict(read_samples(build.dataset.images_tar(0)))
    assert list(samples) == [row["key"] for row in rows]
    content = build.dataset.images_tar(0).read_bytes()
    for row in rows:
        sample = samples[row["key"]]
        assert row["sha256"] == hashlib.sha256(site.bodies[row["url"].split("/", 3)[3]]).hexdigest()
        assert sample["txt"].decode() == row["caption"]
        assert content[row["picture_offset"] :][: row["picture_bytes"]] == sample["jpg"]
        assert Image.open(io.BytesIO(sample["jpg"])).size == (row["width"], row["height"])
    assert len({row["picture_offset"] for row in rows}) == 6
    assert len({samples[row["key"]]["jpg"] for row in rows}) == 2


def test_repeated_urls_give_the_samples_that_shards_of_one_row_would(site, tmp_path):
    urls = [site.url("photo/2.jpg")] * 3
    together, apart = prepare(tmp_path / "together", urls), prepare(tmp_path / "apart", urls, per_shard=1)
    together.run()
    apart.run()
    assert site.asked["photo/2.jpg"] == 1 + 3
    found, expected = ([parts for _, parts in samples_of(build)] for build in (together, apart))
    assert [(parts["jpg"], parts["txt"]) for parts in found] == [(parts["jpg"], parts["txt"]) for parts in expected]
    places = {"key", "picture_offset"}
    assert [without(row, places) for row in together.rows()] == [without(row, places) for row in apart.rows()]


def samples_of(build):
    for shard in sorted((build.dataset.root / "images").glob("*.tar")):
        yield from read_samples(shard)


def without(row, names):
    return {name: value for name, value in row.items() if name not in names}


def test_urls_are_compared_as_they_are_requested(site, tmp_path):
    url = site.url("photo/0.jpg")
    same = [url, f" {url}\n", url.replace("http:", "HTTP:"), f"{url}#top", url.replace("/photo", "\\photo")]
    site.bodies |= {f"photo/0.jpg?{letter}": site.bodies["photo/0.jpg"] for letter in "ab"}
    build = prepare(tmp_path, [*same, f"{url}?a", f"{url}?b"])
    build.run()
    assert site.asked == {"photo/0.jpg": 1, "photo/0.jpg?a": 1, "photo/0.jpg?b": 1}
    assert [row["reason"] for row in build.rows()] == [None] * 7
    assert len({row["sha256"] for row in build.rows()}) == 1


def test_each_row_is_compared_with_its_own_digests_and_size(site, tmp_path):
    body = site.bodies["photo/3.jpg"]
    md5, sha256 = hashlib.md5(body).hexdigest(), hashlib.sha256(body).hexdigest()
    rows = [{"md5": md5}, {"md5": "0" * 32}, {"sha256": sha256, "width": 96, "height": 64}, {"sha256": "0" * 64}, {}]
    build = prepare(tmp_path, [site.url("photo/3.jpg")] * 5, rows=rows)
    build.run()
    assert site.asked == {"photo/3.jpg": 1}
    assert [row["reason"] for row in build.rows()] == [None, "hash_mismatch", None, "hash_mismatch", None]
    assert [row["size_in_metadata"] for row in build.rows()] == [None, None, "same", None, None]


def test_a_failure_is_the_failure_of_all_its_rows(site, tmp_path):
    site.bodies |= {"page": b"<html>", "busy": b"x"}
    site.status = {"busy": 503}
    names = ["missing", "page", "busy"] * 2
    build = prepare(tmp_path, [*map(site.url, names), "ftp://a.example/b.jpg", "ftp://a.example/b.jpg"], retries=1)
    (report,) = build.run()
    assert site.asked == {"missing": 1, "page": 1, "busy": 2}  # the second request is a retry
    reasons = ["http_404", "not_an_image", "http_503"] * 2 + ["url_not_allowed"] * 2
    assert [row["reason"] for row in build.rows()] == reasons
    assert report.dropped == {"http_404": 2, "http_503": 2, "not_an_image": 2, "url_not_allowed": 2}


def test_a_retry_fetches_a_repeated_url_once(site, tmp_path):
    site.status = {"photo/1.jpg": 503}
    build = prepare(tmp_path, [site.url("photo/1.jpg"), site.url("photo/0.jpg"), site.url("photo/1.jpg")])
    build.run()
    site.status, site.asked = {}, Counter()
    (report,) = retry_failed(build.dataset, build.recipe)
    assert site.asked == {"photo/1.jpg": 1}
    assert report.num_out == 3
    assert pending(DOWNLOAD, build.dataset, build.recipe) == []


def test_a_shard_is_finished_when_the_last_of_many_repeated_urls_is(site, tmp_path):
    site.bodies |= {f"many/{n}.jpg": encoded(photo(n)) for n in range(10)}
    urls = [site.url(f"many/{n % 10}.jpg") for n in range(60)]
    build = prepare(tmp_path, urls, per_shard=20, connections=3)
    reports = build.run()
    assert sorted(report.shard for report in reports) == [0, 1, 2]
    assert [report.num_out for report in reports] == [20, 20, 20]
    assert set(site.asked.values()) == {3}  # once in each shard
