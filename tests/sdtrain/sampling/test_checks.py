from sdtrain.config import DiffusionConfig
from sdtrain.formats.stored_model import TRAINED_PX, StoredModel
from sdtrain.models.schedulers import sampling_scheduler
from sdtrain.sampling.checks import check_settings
from sdtrain.sampling.sampler import SampleSettings


def said(trained_px, sample_size=64, **size):
    config = {"sample_size": sample_size, TRAINED_PX: trained_px}
    scheduler = sampling_scheduler(DiffusionConfig()).config
    return check_settings(StoredModel("my-model", config, scheduler, {}, dict), SampleSettings(**size))


def test_the_size_is_said_beside_the_training_size():
    assert said([[512, 512]]) == "Images of 512 x 512 px, the size that my-model was trained on."
    assert "warning: Images of 768 x 512 px, but my-model was trained on 512 x 512" in said([[512, 512]], width=768)
    buckets = [[512, 512], [448, 576], [576, 448], [384, 640]]
    assert said(buckets, width=448, height=576) == "Images of 448 x 576 px, one of its buckets."
    assert "512 x 512, 448 x 576, 576 x 448 and 1 sizes more" in said(buckets, width=768)


def test_a_folder_that_does_not_record_its_training_size_is_said_to_be_one():
    assert said([]) == (
        "Images of 512 x 512 px: sample_size of its UNet's config, for my-model does not record its training size."
    )
    assert "Images of 256 x 512 px, not of 512 x 512: sample_size" in said([], width=256)
    assert "Images of 768 x 512 px: sample_size" in said([], sample_size=[64, 96])
