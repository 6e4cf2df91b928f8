"""A teacher embeds as open_clip does, whether its weights fit our towers or it only teaches."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from tinyclip.distill.teacher import load_teacher
from tinyclip.formats import checkpoint
from tinyclip.model import CLIP, CLIPConfig, initialise
from tinyclip.preprocess import Preprocess
from tinyclip.tokenizer import Tokenizer

TEXT = {"context_length": 11, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
MODELS = {
    "vit": {
        "embed_dim": 6,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 8, "head_width": 4, "patch_size": 8},
        "text_cfg": TEXT,
    },
    "resnet": {
        "embed_dim": 6,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
        "text_cfg": TEXT,
    },
    "siglip-like": {
        "embed_dim": 6,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 8, "head_width": 4, "patch_size": 8, "pool_type": "avg"},
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}
TEXTS = ["a cat", "two red dogs in a very long caption that does not fit"]


def write_local_dir(directory: Path, kind: str, **preprocess) -> str:
    """A random model of open_clip as a local-dir; returns the teacher spec."""
    import open_clip

    torch.manual_seed(0)
    model_cfg = dict(MODELS[kind])
    model = (open_clip.CustomTextCLIP if model_cfg.pop("custom_text", False) else open_clip.CLIP)(**model_cfg)
    directory.mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, directory / "open_clip_model.safetensors")
    settings = {"model_cfg": MODELS[kind], "preprocess_cfg": {**PREPROCESS, **preprocess}}
    (directory / "open_clip_config.json").write_text(json.dumps(settings))
    return f"local-dir:{directory}"


def pictures() -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((40, 30, 3), (20, 50, 3))
    return [Image.fromarray(torch.randint(0, 256, s, dtype=torch.uint8, generator=generator).numpy()) for s in sizes]


@pytest.mark.parametrize("kind", MODELS)
def test_embeddings_equal_open_clip(kind, tmp_path):
    import open_clip

    spec = write_local_dir(tmp_path / kind, kind)
    teacher = load_teacher(spec)
    model, _, transform = open_clip.create_model_and_transforms(spec)
    side = MODELS[kind]["vision_cfg"]["image_size"]
    # Of the model's size: where pictures are resized, a pixel may differ by a level (tests/test_preprocess.py).
    ready = [picture.resize((side, side)) for picture in pictures()]
    with torch.no_grad():
        image = model.eval().encode_image(torch.stack([transform(picture) for picture in ready]), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(spec)(TEXTS), normalize=True)

    reader = teacher.reader
    pixels = torch.stack([reader.preprocess(picture) for picture in ready])
    got_image, got_text = teacher.embed(pixels, reader.tokenizer(TEXTS))
    torch.testing.assert_close(got_image, image, rtol=0, atol=1e-5)
    torch.testing.assert_close(got_text, text, rtol=0, atol=1e-5)
    assert not got_image.requires_grad and got_image.dtype == torch.float32
    torch.testing.assert_close(teacher.encode_text(TEXTS, normalize=True), text, rtol=0, atol=1e-5)
    assert (teacher.embed_dim, teacher.name) == (6, spec)
    assert teacher.scale == pytest.approx(model.logit_scale.exp().item())
    assert teacher.preprocess == Preprocess(
        size=side, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bilinear", resize="squash"
    )
    assert teacher.tokenizer == Tokenizer.openai(11)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_an_embedding_has_the_same_bits_in_any_batch(kind, tmp_path):
    """So a stored one is the live one. In batches of other sizes, products sum in another order."""
    teacher = load_teacher(write_local_dir(tmp_path / kind, kind))
    generator = torch.Generator().manual_seed(0)
    side = teacher.preprocess.size
    pixels = torch.randint(0, 256, (19, 3, side, side), dtype=torch.uint8, generator=generator)
    tokens = teacher.tokenizer(["a photo of " * (number % 4) + "cat" for number in range(19)])
    whole = teacher.embed(pixels, tokens)
    for rows in (torch.randperm(19, generator=generator)[:size] for size in (1, 2, 5, 8, 17)):
        for few, all_rows in zip(teacher.embed(pixels[rows], tokens[rows]), whole, strict=True):
            assert torch.equal(few, all_rows[rows])


def test_vits_and_resnets_can_be_inherited_and_others_say_why_not(tmp_path):
    teachers = {kind: load_teacher(write_local_dir(tmp_path / kind, kind)) for kind in MODELS}
    clip = teachers["vit"].clip
    assert clip is not None and clip.config.activation == "quick_gelu" and clip.tokenizer == Tokenizer.openai(11)
    assert not clip.training and teachers["vit"].teach_only is None
    resnet = teachers["resnet"].clip
    assert resnet is not None and [len(blocks) for blocks in resnet.config.image.stages] == [1, 1, 1, 1]
    assert teachers["siglip-like"].clip is None and "vision_cfg.pool_type" in teachers["siglip-like"].teach_only
    assert not teachers["siglip-like"].model.training


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_tokens_may_be_cut_after_the_longest_caption(kind, tmp_path):
    teacher = load_teacher(write_local_dir(tmp_path / kind, kind))
    pixels, tokens = (
        torch.zeros(2, 3, *[teacher.preprocess.size] * 2, dtype=torch.uint8),
        teacher.tokenizer(["a", "b c"]),
    )
    for whole, cut in zip(teacher.embed(pixels, tokens), teacher.embed(pixels, tokens[:, :4]), strict=True):
        torch.testing.assert_close(cut, whole)


def test_a_tinyclip_model_teaches(tmp_path):
    config = CLIPConfig.uniform(
        embed_dim=6, image_size=8, patch_size=4, image_width=8, image_layers=1, text_width=8, text_layers=1,
        context_length=10, vocab_size=514, head_dim=4,
    )  # fmt: skip
    preprocess, tokenizer = Preprocess(size=8), Tokenizer.train([], vocab_size=514, context_length=10)
    model = initialise(CLIP(config, preprocess=preprocess, tokenizer=tokenizer), torch.Generator().manual_seed(0))
    teacher = load_teacher(str(checkpoint.save(model, tmp_path / "run" / "model").parent))
    assert teacher.clip is not None and teacher.scale == pytest.approx(1 / 0.07)
    pixels, tokens = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), tokenizer(["cat"])
    with torch.no_grad():
        expected_image, expected_text = model.eval()(pixels, tokens)
    image, text = teacher.embed(pixels, tokens)
    torch.testing.assert_close(image, F.normalize(expected_image, dim=-1))
    torch.testing.assert_close(text, expected_text)
    model.preprocess = None
    with pytest.raises(ValueError, match=r"a teacher needs preprocess.json and tokenizer.json"):
        load_teacher(str(checkpoint.save(model, tmp_path / "blind")))


def test_a_file_of_weights_is_read_through_its_architecture(tmp_path, monkeypatch):
    import open_clip

    path = Path(write_local_dir(tmp_path / "vit", "vit").removeprefix("local-dir:")) / "open_clip_model.safetensors"
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", MODELS["vit"])
    teacher = load_teacher(f"open_clip:ViT-tiny/{path}")
    assert teacher.clip is not None and teacher.preprocess == Preprocess(size=16)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("open_clip:ViT-B32/openai", "no architecture 'ViT-B32'; close: ViT-B-32"),
        ("open_clip:ViT-B-32", "ViT-B-32: expected weights as .*, got ''; tags: .*laion2b_s34b_b79k"),
        ("open_clip:ViT-B-32/laion9b", "expected weights as ViT-B-32/TAG or ViT-B-32/FILE, got 'laion9b'; tags: "),
        (
            "open_clip:ViT-B-32/openai",
            r"openai was trained with x\*sigmoid\(1.702x\), but ViT-B-32 computes GELU; use ViT-B-32-quickgelu/openai",
        ),
        ("local-dir:/no/such/place", "could not load local-dir:/no/such/place: .*not found"),
        ("/no/such/model", "/no/such/model: expected a model directory or a checkpoint file, found nothing"),
    ],
)
def test_a_teacher_that_cannot_be_is_one_line(spec, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_teacher(spec)
    assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    import open_clip

    def offline(*_, **__):
        raise OSError("We couldn't connect to the hub.\nCheck your internet connection.")

    monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", offline)
    with pytest.raises(ValueError, match=r"open_clip could not load hf-hub:someone/clip: .*couldn't connect") as error:
        load_teacher("hf-hub:someone/clip")
    assert "\n" not in str(error.value)


def test_broken_teachers_are_refused(tmp_path):
    from safetensors.torch import load_file

    for kind, key in (("vit", "visual.proj"), ("resnet", "visual.conv1.weight")):
        spec = write_local_dir(tmp_path / kind, kind)
        path = tmp_path / kind / "open_clip_model.safetensors"
        state = load_file(path)
        state[key].view(-1)[0] = torch.nan
        save_file(state, path)
        with pytest.raises(ValueError, match=f"expected finite weights; 1 with NaN or infinity: {key}"):
            load_teacher(spec)
        path.unlink()
        with pytest.raises(ValueError, match="could not load"):
            load_teacher(spec)


def test_pictures_with_borders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected square pictures without borders, got size .*, resize 'longest'"):
        load_teacher(write_local_dir(tmp_path / "vit", "vit", resize_mode="longest"))
