"""The tiny CLIP: the files that ship, its training, and how well it finds the objects of clips it never saw."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer

from engines.config import SHAPES_CLIP
from tgmae.shapes.scenes import COLORS, MOTIONS, SHAPES, regenerate_objects, sample_object
from tgmae.shapes.tiny_clip import MODEL, Options, encode_text, save, train
from tgmae.shapes.tiny_clip_card import describe, write_readme
from tgmae.shapes.tiny_clip_data import SceneFrame, caption_object, make_crop_generator, make_frame, sample_crops
from tgmae.shapes.tiny_clip_eval import LabelledClip, evaluate, make_labelled_clips, score_patches

NAME = f"local-dir:{SHAPES_CLIP}"
Labelled = tuple[list[LabelledClip], list[LabelledClip]]  # with one object, with two


@pytest.fixture(scope="module")
def offline() -> Any:
    """Load the shipped CLIP with the network blocked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.socket.connect", lambda *_: pytest.fail("reached for the network"))
        yield open_clip.create_model(NAME).eval(), open_clip.get_tokenizer(NAME)


@pytest.fixture(scope="module")
def scene_frames() -> list[SceneFrame]:
    return [make_frame(index, seed=0) for index in range(40)]


@pytest.fixture(scope="module")
def labelled_clips(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    """Make clips with one object and clips with two, from a seed that neither training nor the card has used."""
    folder = tmp_path_factory.mktemp("true")
    single, double = (
        make_labelled_clips(folder / str(count), count=12, num_objects=count, workers=1, seed=88) for count in (1, 2)
    )
    return single, double


# The files that ship


def test_loads_offline_as_a_clip_of_the_usual_kind(offline: Any) -> None:
    model, tokenizer = offline
    visual = model.visual
    assert isinstance(visual, VisionTransformer)
    assert visual.pool_type == "tok"
    assert visual.attn_pool is None
    tokens = tokenizer(["a red circle moving left"])
    assert tokens.shape == (1, 77)
    assert model.token_embedding.weight.shape[0] == 49408
    with torch.inference_mode():
        text = model.encode_text(tokens, normalize=True)
        image = model.encode_image(torch.zeros(2, 3, *visual.image_size), normalize=True)
    assert text.shape == (1, MODEL["embed_dim"])
    assert image.shape == (2, MODEL["embed_dim"])


def test_the_folder_is_small_and_complete() -> None:
    assert sum(file.stat().st_size for file in SHAPES_CLIP.iterdir()) < 8e6
    config = json.loads((SHAPES_CLIP / "open_clip_config.json").read_text())
    assert config["model_cfg"] == MODEL
    assert config["preprocess_cfg"]["size"] == MODEL["vision_cfg"]["image_size"]


def test_the_card_says_how_it_was_made_and_how_well_it_does() -> None:
    card = json.loads((SHAPES_CLIP / "card.json").read_text())
    readme = (SHAPES_CLIP / "README.md").read_text()
    assert card["command"].startswith("python -m tgmae.shapes.tiny_clip --seed 0 --steps ")
    assert card["command"] in readme
    assert card["size_bytes"] == (SHAPES_CLIP / "open_clip_model.safetensors").stat().st_size
    measured = card["measured"]
    assert measured["patch_frames2"]["auc_clip"] >= 0.95
    assert measured["patch_frames2"]["masked_top"] >= 0.95
    assert min(measured["two_objects"]["first"], measured["two_objects"]["second"]) >= 0.9
    assert measured["clips"] >= 64
    for area in (measured["patch_frames1"]["auc_clip"], measured["two_objects"]["second_by_shape"]):
        assert f"{area:.3f}" in readme


@pytest.mark.slow
def test_finds_the_objects_of_clips_it_never_saw(offline: Any, labelled_clips: Labelled) -> None:
    measured = evaluate(*offline, *labelled_clips)
    for frames in (1, 2):
        assert measured[f"patch_frames{frames}"]["auc_clip"] >= 0.95
        assert measured[f"patch_frames{frames}"]["auc_slot"] >= 0.95
        assert measured[f"patch_frames{frames}"]["masked_top"] >= 0.95
        assert measured[f"patch_frames{frames}"]["visible_bottom"] >= 0.95
    assert measured["dense_clearclip"]["auc_clip"] >= 0.85
    for name in ("first", "second", "first_in_all", "second_in_all"):
        assert measured["two_objects"][name] >= 0.9
    for wording in ("a COLOR SHAPE", "a COLOR shape", "COLOR", "a shape"):
        assert measured["auc_by_wording"][wording] >= 0.9


@pytest.mark.slow
def test_untrained_weights_are_judged_as_chance(
    labelled_clips: Labelled,
) -> None:
    """The measures must not praise just anything."""
    torch.manual_seed(0)
    measured = evaluate(open_clip_untrained(), open_clip.SimpleTokenizer(), *labelled_clips)
    assert 0.2 < measured["patch_frames2"]["auc_clip"] < 0.8
    assert measured["truth_frames1"]["auc_clip"] > 0.97
    assert 0.2 < measured["two_objects"]["first"] < 0.8
    assert measured["patch_frames2"]["masked_top"] < 0.9


def test_scores_stand_at_their_patch(offline: Any, labelled_clips: Labelled) -> None:
    """A patch is scored by its own pixels alone: painting over one patch changes one score."""
    model, tokenizer = offline
    with torch.inference_mode():
        text = model.encode_text(tokenizer(["red"]), normalize=True)
    frames = labelled_clips[0][0].frames[:2].clone()
    before = score_patches(model, frames, text)
    frames[1, 32:48, 16:32] = torch.tensor([214, 40, 40], dtype=torch.uint8)
    changed = (score_patches(model, frames, text) - before).abs() > 1e-4
    assert before.shape == (1, 2, 36)
    assert changed.nonzero().tolist() == [[0, 1, 13]]


def open_clip_untrained() -> open_clip.CLIP:
    model = open_clip.CLIP(**MODEL).eval()
    open_clip.set_model_preprocess_cfg(
        model, {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    )
    return model


# Training


@pytest.mark.slow
def test_training_learns_and_is_reproducible(scene_frames: list[SceneFrame]) -> None:
    options = Options(steps=30, batch_size=128, seed=3)
    first, losses = train(options, scene_frames)
    assert np.mean(losses[-5:]) < np.mean(losses[:3]) - 0.3
    second, again = train(options, scene_frames)
    assert losses == again
    weights = second.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in first.state_dict().items())


def test_saved_weights_are_the_trained_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_clip_untrained()
    save(model, tmp_path)
    loaded = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    crops = torch.rand(4, 3, 24, 24)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.encode_image(crops), model.encode_image(crops), atol=0.02, rtol=0.01)
    card = describe(
        loaded, tmp_path, options=vars(Options()), loss=1.25, train_s=2, total_s=3,
        measured=json.loads((SHAPES_CLIP / "card.json").read_text())["measured"],
    )  # fmt: skip
    write_readme(tmp_path / "README.md", card)
    assert "Loss over the last 50 steps: 1.250" in (tmp_path / "README.md").read_text()
    assert str(Options().out) not in json.dumps(card)


def test_embeddings_are_the_same_without_padding(offline: Any) -> None:
    model, tokenizer = offline
    tokens = tokenizer(["red", "an orange star moving up and a blue cross spinning", "nothing but background"])
    with torch.inference_mode():
        torch.testing.assert_close(encode_text(model, tokens), model.encode_text(tokens, normalize=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"batch_size": 24}, "--batch-size must be a positive multiple of 16, got 24"),
        ({"batch_size": 0}, "--batch-size must be a positive multiple of 16, got 0"),
        ({"seed": -1}, "--seed must not be negative, got -1"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**changes)  # type: ignore[arg-type]


# Training data


def test_reprs_show_shapes_instead_of_contents(scene_frames: list[SceneFrame], labelled_clips: Labelled) -> None:
    crops = sample_crops(make_crop_generator(0), scene_frames, 2, 16, 24)
    assert repr(crops) == "Crops(images float32 [32, 3, 24, 24], 32 captions, cpu)"
    number = len(scene_frames[0].objects)
    assert repr(scene_frames[0]) == f"SceneFrame(pixels uint8 [3, 120, 160], {number} objects)"
    clip = labelled_clips[0][0]
    assert repr(clip) == f"LabelledClip(frames uint8 [8, 96, 96, 3], cpu, {clip.captions})"


def test_frames_depend_on_seed_and_number_alone(scene_frames: list[SceneFrame]) -> None:
    again, other = make_frame(7, seed=0), make_frame(7, seed=1)
    np.testing.assert_array_equal(again.pixels, scene_frames[7].pixels)
    np.testing.assert_array_equal(again.shares, scene_frames[7].shares)
    assert np.abs(again.pixels.astype(int) - other.pixels).mean() > 5
    assert {len(frame.objects) for frame in scene_frames} == {1, 2}


def test_no_data_set_shows_a_scene_of_training(scene_frames: list[SceneFrame]) -> None:
    """The keys (seed, index) and (seed, index, 1) give different streams, even for the same seed and number."""
    for index, frame in enumerate(scene_frames):
        obj, [other] = frame.objects[0], regenerate_objects(0, index, 1)
        assert obj.texture != other.texture


def test_shares_lie_where_the_objects_are_visible(scene_frames: list[SceneFrame]) -> None:
    compared = 0
    for frame in scene_frames:
        for number, obj in enumerate(frame.objects):
            inside = frame.shares[number] == 255
            if obj.color in ("white", "pink") or inside.sum() < 100:
                continue
            pixels, wanted = frame.pixels[:, inside].T.astype(float), np.array(COLORS[obj.color], float)
            cosine = pixels @ wanted / (np.linalg.norm(pixels, axis=1) * np.linalg.norm(wanted))
            assert np.median(cosine) > 0.98, obj.caption
            compared += 1
    assert compared > 20


def test_crops_are_captioned_by_what_they_show() -> None:
    """From one frame with two objects, no third colour is ever named, and a crop without colour is background."""
    frame = next(p for p in (make_frame(i, seed=4) for i in range(50)) if len(p.objects) == 2)
    crops = sample_crops(make_crop_generator(0), [frame], 30, 16, 24)
    assert crops.images.shape == (480, 3, 24, 24)
    assert crops.images.dtype == torch.float32
    named = Counter(word for caption in crops.captions for word in caption.split() if word in COLORS)
    assert set(named) == {obj.color for obj in frame.objects}
    assert min(named.values()) > 40
    saturation = crops.images.clamp(0, 1).amax(dim=1) - crops.images.clamp(0, 1).amin(dim=1)
    empty = torch.tensor([not any(word in COLORS or word in SHAPES for word in c.split()) for c in crops.captions])
    assert 50 < int(empty.sum()) < 400
    assert saturation[empty].mean() < saturation[~empty].mean()


def test_captions_vary_in_what_they_name() -> None:
    draw = np.random.default_rng(0)
    obj = sample_object(draw, "left", "orange", "star")
    captions = Counter(caption_object(draw, obj) for _ in range(2000))
    assert captions.most_common(1)[0][0] == obj.caption == "an orange star moving left"
    for wanted in ("an orange star", "the star", "star", "orange", "an orange shape", "a shape", "a star moving left"):
        assert captions[wanted] > 5, wanted
    words = {word for caption in captions for word in caption.split()}
    assert not words & ((set(COLORS) - {"orange"}) | (set(SHAPES) - {"star"}) | (set(MOTIONS) - {"left"}))
