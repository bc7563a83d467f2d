import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sdtrain.dataset.config import EncodeConfig
from sdtrain.dataset.stage import pending
from sdtrain.dataset.tars import read_samples
from sdtrain.dataset.work import WORK
from sdtrain.encode.stage import ENCODE, drop_latents
from sdtrain.encode.text import embed_empty, embeddings_of
from sdtrain.errors import UserError
from sdtrain.formats.frozen import load_text_encoder, text_encoder_digest
from sdtrain.loading.latent_store import LatentStore
from sdtrain.models.text import tokenize
from sdtrain.plan.estimate import DatasetJob, Machines, Planner
from sdtrain.plan.rates import load_rates
from tests.sdtrain.encode.packed_fixtures import RESOLUTION, Recipe, encode, write_packed
from tests.training_fixtures import write_models

BF16 = {"text_embeddings": "bf16", "text_encoder": "demo"}


def online(captions, dtype=torch.bfloat16):
    tokenizer, encoder = load_text_encoder("demo")
    with torch.no_grad():
        return encoder.to(dtype=dtype)(tokenize(tokenizer, captions)).last_hidden_state


def stored(dataset):
    found = {}
    for shard in (0, 1):
        for key, members in read_samples(dataset.latents_tar(shard)):
            bits = np.load(io.BytesIO(members["text.npy"]))
            found[key] = (members["txt"].decode(), bits)
    return found


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_each_latent_has_its_captions_embedding_beside_it(tmp_path, dtype):
    dataset = write_packed(tmp_path)
    encode(dataset, Recipe("demo", **BF16 | {"text_embeddings": dtype}))
    for caption, bits in stored(dataset).values():
        found = embeddings_of(bits, dtype)
        expected = online([caption])[0] if dtype == "bf16" else online([caption], torch.float32)[0].half()
        torch.testing.assert_close(found, expected)  # whose batch is another: by rounding at most
    info = json.loads(dataset.latents_info.read_text())["text_embeddings"]
    width = load_text_encoder("demo")[1].config.hidden_size
    assert info == {
        "text_encoder": "demo",
        "sha256": text_encoder_digest("demo"),
        "dtype": dtype,
        "shape": [16, width],
    }


def test_without_the_option_nothing_changes_and_with_it_every_shard_is_pending(tmp_path):
    dataset = write_packed(tmp_path)
    encode(dataset, Recipe("demo"))
    assert "text_offset" not in pq.read_schema(dataset.latents_table(0)).names
    assert "text_embeddings" not in json.loads(dataset.latents_info.read_text())
    assert pending(ENCODE, dataset, Recipe("demo", text_encoder="elsewhere")) == []  # without effect, not even opened
    assert pending(ENCODE, dataset, Recipe("demo", **BF16)) == [0, 1]
    encode(dataset, Recipe("demo", **BF16))
    assert pending(ENCODE, dataset, Recipe("demo", **BF16)) == []
    other = write_models(tmp_path / "models")
    assert pending(ENCODE, dataset, Recipe("demo", **BF16 | {"text_encoder": str(other)})) == [0, 1]


def test_the_loader_reads_the_embedding_of_each_sample_and_a_removal_takes_it_away(tmp_path):
    dataset = write_packed(tmp_path)
    encode(dataset, Recipe("demo", **BF16))
    before = dict(stored(dataset).values())
    gone = f"{1:032x}"
    drop_latents(dataset.latents_table(0), {gone})
    assert "Bild 1" not in {caption for caption, _ in stored(dataset).values()}
    assert before["Bild 1"].tobytes() not in dataset.latents_tar(0).read_bytes()
    store = LatentStore(dataset.root, RESOLUTION, reads_texts=True)
    store.check_shards()
    indices = np.arange(len(store))
    fetched = store.fetch(indices, np.zeros_like(indices), 0, store.buffer(len(store), 0))
    fetched.require_whole()
    assert gone not in fetched.uids
    for position, caption in enumerate(fetched.captions):
        assert np.array_equal(fetched.texts[position], before[caption])
    assert store.text_dtype == "bf16"


def test_shards_of_two_encoders_are_not_mixed(tmp_path):
    dataset = write_packed(tmp_path)
    encode(dataset, Recipe("demo", **BF16))
    table = pq.read_table(dataset.latents_table(1))
    metadata = table.schema.metadata | {b"sdtrain.text_encoder_sha256": b"0" * 64}
    pq.write_table(table.replace_schema_metadata(metadata), dataset.latents_table(1))
    with pytest.raises(UserError, match=r"00001.tar has text embeddings of another encoder"):
        LatentStore(dataset.root, RESOLUTION, reads_texts=True).check_shards()
    LatentStore(dataset.root, RESOLUTION).check_shards()  # read by nobody


def test_the_digest_is_of_weights_and_tokenizer(tmp_path):
    assert text_encoder_digest(str(write_models(tmp_path / "a"))) == text_encoder_digest(
        str(write_models(tmp_path / "b"))
    )
    c, d = write_models(tmp_path / "c"), write_models(tmp_path / "d")
    vocabulary = json.loads((c / "tokenizer" / "tokenizer.json").read_text())
    first, second = list(vocabulary["model"]["vocab"])[:2]
    numbers = vocabulary["model"]["vocab"]
    numbers[first], numbers[second] = numbers[second], numbers[first]
    (c / "tokenizer" / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert text_encoder_digest(str(c)) != text_encoder_digest(str(d))
    assert text_encoder_digest("demo") != text_encoder_digest(str(d))


def test_the_empty_captions_embedding_leaves_the_encoder_as_it_was():
    tokenizer, encoder = load_text_encoder("demo")
    empty = embed_empty(tokenizer, encoder, torch.device("cpu"), "bf16")
    assert next(encoder.parameters()).dtype is torch.float32
    assert torch.equal(empty, online([""])[0])


def test_a_plan_counts_them():
    rates, bytes_each = load_rates(), 77 * 768 * 2
    plain, texts = (
        Planner(rates, Machines(1, "h200")).dataset(DatasetJob("mine", 512, 512, 2, 1000, has), WORK)[-1]
        for has in (False, True)
    )
    assert texts.disk_bytes - plain.disk_bytes == pytest.approx(650 * bytes_each)  # a sample, not a crop
    assert rates["text_embedding_bytes"].value == bytes_each


def test_numbers_that_fp16_cannot_hold_are_refused():
    from sdtrain.encode.text import TextEmbedder

    tokenizer, encoder = load_text_encoder("demo")
    for name, parameter in encoder.named_parameters():
        if "final_layer_norm" in name:
            parameter.data.fill_(1e6)
    with pytest.raises(UserError, match="fp16 cannot hold; store bf16"):
        TextEmbedder(tokenizer, encoder, "fp16")(["a circle"])
    with pytest.raises(ValueError, match="text_embeddings"):
        EncodeConfig(text_embeddings="fp32")
