import pytest
import torch

from sdtrain.config import load_config
from sdtrain.encode.text import embed_empty
from sdtrain.errors import UserError
from sdtrain.formats.frozen import load_text_encoder, vae_scaling_factor
from sdtrain.loading.loader import BatchMaker
from sdtrain.loading.sources import open_samples
from sdtrain.train import train
from sdtrain.training.run_dir import RunDir
from tests.sdtrain.encode.packed_fixtures import Recipe, encode, write_packed
from tests.training_fixtures import write_config, write_models


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Eight samples with their captions' embeddings."""
    dataset = write_packed(tmp_path_factory.mktemp("texts") / "data")
    encode(dataset, Recipe("demo", text_embeddings="bf16", text_encoder="demo"))
    return dataset


def config_of(folder, dataset, texts, **changes):
    data = {"root": str(dataset.root), "resolution": 64, "text_embeddings": texts}
    changes = {"vae": "demo", "text_encoder": "demo", "caption_dropout": 0.4, "steps": 6, "data": data} | changes
    return load_config(str(write_config(folder / "run.yaml", dataset.root, dataset.root, **changes)))


def test_cached_embeddings_give_the_losses_of_online_encoding(tmp_path, dataset, ranks):
    losses = {}
    for texts in ("online", "cached"):
        run = RunDir(tmp_path / texts)
        train(config_of(tmp_path, dataset, texts), run, ranks)
        losses[texts] = [float(row["loss"]) for row in run.log.rows()]
    assert losses["cached"] == pytest.approx(losses["online"], rel=1e-3)
    goes_on = config_of(tmp_path, dataset, "cached", steps=7)
    assert train(goes_on, RunDir(tmp_path / "online"), ranks) == 7  # changes nothing that makes another run


def test_a_batch_has_the_stored_embeddings_and_that_of_nothing_for_dropped_captions(tmp_path, dataset):
    config = config_of(tmp_path, dataset, "cached")
    tokenizer, encoder = load_text_encoder("demo")
    store = open_samples(config, vae_scaling_factor("demo"))
    empty = embed_empty(tokenizer, encoder, torch.device("cpu"), store.text_dtype)
    maker = BatchMaker(store, tokenizer, config, 0, 1, empty)
    nothing, num_dropped = BatchMaker(store, tokenizer, config, 0, 1).make(0, 0), 0
    assert nothing.context is None
    for step in range(4):
        batch = maker.make(step, 0)
        assert batch.context.dtype is torch.bfloat16
        online = encoder.to(torch.bfloat16)(batch.token_ids).last_hidden_state
        torch.testing.assert_close(batch.context, online)
        dropped = (batch.token_ids == maker._tokens([""])).all(dim=1)
        assert all(torch.equal(row, empty) for row in batch.context[dropped])
        num_dropped += int(dropped.sum())
    assert 0 < num_dropped < 16
    assert maker.make(1, 1).to(torch.device("cpu")).context.shape == (4, *empty.shape)


def test_other_encoders_and_latents_without_embeddings_are_refused(tmp_path, dataset, ranks):
    other = write_models(tmp_path / "models")
    config = config_of(tmp_path, dataset, "cached", text_encoder=str(other))
    with pytest.raises(UserError, match=r"are of another text encoder or tokenizer \(demo\) than"):
        open_samples(config, vae_scaling_factor("demo"))
    plain = write_packed(tmp_path / "plain")
    encode(plain, Recipe("demo"))
    with pytest.raises(UserError, match=r"have no text embeddings. Encode with `encode: \{text_embeddings: bf16\}`"):
        open_samples(config_of(tmp_path, plain, "cached"), vae_scaling_factor("demo"))
    with pytest.raises(UserError, match="cached beside latents, which online_vae does not read"):
        load_config(
            str(write_config(tmp_path / "x.yaml", other, other, data={"online_vae": True, "text_embeddings": "cached"}))
        )


def test_several_datasets_must_store_the_same_numbers(tmp_path, dataset):
    half = write_packed(tmp_path / "half")
    encode(half, Recipe("demo", text_embeddings="fp16", text_encoder="demo"))
    sources = [{"root": str(place.root)} for place in (dataset, half)]
    data = {"sources": sources, "resolution": 64, "text_embeddings": "cached"}
    with pytest.raises(UserError, match=r"are in fp16, and those in .* in bf16"):
        open_samples(config_of(tmp_path, dataset, "cached", data=data), vae_scaling_factor("demo"))
