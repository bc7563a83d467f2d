import json
from collections import Counter

import pytest

from sdtrain.errors import UserError
from sdtrain.evaluation.prompts import choose_prompts


def write_coco(path, num_images=20, captions_an_image=5):
    """Of the form of captions_val2017.json."""
    images = [{"id": 1000 + i, "file_name": f"{1000 + i:012d}.jpg", "height": 480, "width": 640, "license": 1}
              for i in range(num_images)]  # fmt: skip
    annotations = [
        {"image_id": image["id"], "id": 7 * image["id"] + c, "caption": f"Image {image['id']},  caption {c}.\n"}
        for c in range(captions_an_image)
        for image in images
    ]
    path.write_text(json.dumps({"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations}))
    return path


def test_coco_gives_one_caption_an_image(tmp_path):
    chosen = choose_prompts(write_coco(tmp_path / "captions.json"), 20, seed=0)
    assert len({text.split(",")[0] for text in chosen.texts}) == 20
    assert len({text[-2] for text in chosen.texts}) > 1  # not always the first caption
    assert all(text == " ".join(text.split()) for text in chosen.texts)
    assert "20 images, at most 1 an image, seed 0" in chosen.source


def test_beyond_the_images_each_gives_a_second_caption_and_no_caption_comes_twice(tmp_path):
    chosen = choose_prompts(write_coco(tmp_path / "captions.json"), 30, seed=0)
    counts = Counter(text.split(",")[0] for text in chosen.texts)
    assert sorted(counts.values()) == [1] * 10 + [2] * 10
    assert len(set(chosen.texts)) == 30
    assert "at most 2 an image" in chosen.source


def test_the_choice_is_the_seeds_and_more_go_on_from_fewer(tmp_path):
    path = write_coco(tmp_path / "captions.json")
    assert choose_prompts(path, 30, 0).texts[:12] == choose_prompts(path, 12, 0).texts
    assert choose_prompts(path, 12, 0).texts != choose_prompts(path, 12, 1).texts
    assert choose_prompts(path, 12, 0).digest != choose_prompts(path, 12, 1).digest


def test_the_order_of_the_annotations_changes_nothing(tmp_path):
    path = write_coco(tmp_path / "captions.json")
    before = choose_prompts(path, 25, 3).texts
    content = json.loads(path.read_text())
    content["annotations"].reverse()
    path.write_text(json.dumps(content))
    assert choose_prompts(path, 25, 3).texts == before


@pytest.mark.parametrize("content", ["[]", "{", '{"annotations": [{"image_id": 1, "caption": "a"}]}'])
def test_another_json_is_a_sentence(tmp_path, content):
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(UserError, match=r"captions\.json is not a file of COCO captions"):
        choose_prompts(tmp_path / "captions.json", 2, 0)


def test_captions_of_nothing_and_too_few_prompts_are_sentences(tmp_path):
    (tmp_path / "captions.json").write_text('{"annotations": [{"image_id": 1, "id": 2, "caption": "  "}]}')
    with pytest.raises(UserError, match="holds no caption"):
        choose_prompts(tmp_path / "captions.json", 2, 0)
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"has 2 prompts, too few for 3\. Lower --num"):
        choose_prompts(tmp_path / "prompts.txt", 3, 0)
