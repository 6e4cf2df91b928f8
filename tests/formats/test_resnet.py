"""ResNet-CLIPs come in from open_clip, OpenAI and the releases, and go out to open_clip and transformers, unchanged."""

import warnings

import open_clip
import pytest
import torch

from tests.formats.test_export import CAPTIONS, OTHER_READING, SMALL, noise, state_equal
from tinyclip.distill.teacher import load_teacher
from tinyclip.formats import checkpoint, zoo
from tinyclip.formats.export import export
from tinyclip.formats.open_clip import config_from_open_clip, to_open_clip
from tinyclip.formats.provenance import Origin, Provenance
from tinyclip.formats.uniform import pad
from tinyclip.model import CLIP, CLIPConfig, initialise
from tinyclip.model_resnet import BottleneckConfig, ResNetConfig
from tinyclip.preprocess import Preprocess

STOCK = CLIPConfig.uniform(
    embed_dim=6, image_size=64, image_width=4, image_layers=(1, 2, 1, 1), text_width=8, text_layers=1,
    context_length=11, vocab_size=SMALL.vocab_size, head_dim=4, activation="quick_gelu",
)  # fmt: skip
SIZES = ((3, 1),), ((8, 5), (2, 8)), ((16, 7),), ((9, 32),)  # at most the stock's: 4, 8, 16, 32
CUT = STOCK.model_copy(
    update={
        "image": ResNetConfig(
            image_size=64, width=4, head_dim=4,
            stages=tuple(tuple(BottleneckConfig(conv1=a, conv2=b) for a, b in stage) for stage in SIZES),
        )
    }
)  # fmt: skip
PREPROCESS = Preprocess(size=64)


def resnet(config: CLIPConfig = STOCK, preprocess: Preprocess = PREPROCESS) -> CLIP:
    """Random weights and running statistics."""
    generator = torch.Generator().manual_seed(0)
    model = initialise(CLIP(config, preprocess=preprocess, tokenizer=SMALL), generator).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point():
                tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
            else:
                tensor += 7
    return model


@pytest.mark.parametrize("to", ["open_clip", "huggingface", "tinyclip"])
def test_a_stock_resnet_is_read_back_with_equal_features_and_equal_weights(to, tmp_path):
    model = resnet(preprocess=OTHER_READING.model_copy(update={"size": 64}))
    model.provenance = Provenance(
        teacher=Origin(name="RN50", license="mit"), data=Origin(name="pairs"), code=Origin(name="tinyclip")
    )
    result = export(model, tmp_path / to, to=to, say=lambda _: None)
    assert result["max_difference"] <= 1e-5
    again = checkpoint.load(tmp_path / to)
    assert again.config == model.config and state_equal(again, model) and again.provenance == model.provenance
    assert again.preprocess == model.preprocess and again.tokenizer == model.tokenizer
    if to == "open_clip":
        assert load_teacher(f"local-dir:{tmp_path / to}").teach_only is not None  # its own vocabulary


@pytest.mark.parametrize("to", ["huggingface", "tinyclip"])
def test_a_cut_resnet_is_exact_there(to, tmp_path):
    model = resnet(CUT)
    assert export(model, tmp_path / to, to=to, say=lambda _: None)["max_difference"] <= 1e-5
    assert state_equal(checkpoint.load(tmp_path / to), model)


def test_a_cut_resnet_fits_open_clip_only_when_padded(tmp_path):
    model = resnet(CUT)
    with pytest.raises(ValueError, match="channels were cut inside its blocks; pad it, or export to huggingface"):
        export(model, tmp_path / "dir", to="open_clip", say=lambda _: None)
    assert not (tmp_path / "dir").exists()
    result = export(model, tmp_path / "dir", to="open_clip", pad=True, say=lambda _: None)
    assert result["max_difference"] <= 1e-5
    wide = model.config.image.model_copy(update={"stages": ((BottleneckConfig(conv1=5, conv2=1),),) * 4})
    with pytest.raises(ValueError, match="expected at most 4 inner channels in block 0 of stage 0, got 5 and 1"):
        pad(resnet(CUT.model_copy(update={"image": wide})))


def test_padding_a_resnet_changes_no_value():
    model = resnet(CUT)
    pixels = torch.stack([PREPROCESS.normalise(PREPROCESS(picture)) for picture in noise()])
    padded = pad(model)
    assert padded.config == STOCK
    with torch.no_grad():
        torch.testing.assert_close(padded.encode_image(pixels), model.encode_image(pixels), rtol=1e-5, atol=1e-6)


def their_resnet() -> torch.nn.Module:
    torch.manual_seed(0)
    vision = {"image_size": 64, "layers": (1, 2, 1, 1), "width": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 64, "heads": 1, "layers": 1}
    return open_clip.CLIP(embed_dim=16, quick_gelu=True, vision_cfg=vision, text_cfg=text).eval()


@torch.no_grad()
@pytest.mark.parametrize("archived", [False, True])
def test_openais_resnets_say_by_their_shapes_what_they_are(archived, tmp_path):
    theirs = their_resnet()
    for name, value in (("input_resolution", 64), ("context_length", 8), ("vocab_size", 50)):
        theirs.__dict__.pop(name, None)
        theirs.register_buffer(name, torch.tensor(value))
    pixels, tokens = torch.randn(2, 3, 64, 64), torch.tensor([[48, 3, 49, 0, 0, 0, 0, 0], [48, 49, 0, 0, 0, 0, 0, 0]])
    path = tmp_path / "RN.pt"
    if archived:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.trace(theirs, (pixels, tokens), check_trace=False), path)
    else:
        torch.save(theirs.state_dict(), path)
    ours = checkpoint.load(path)
    assert isinstance(ours.config.image, ResNetConfig) and [len(s) for s in ours.config.image.stages] == [1, 2, 1, 1]
    assert ours.config.activation == "quick_gelu" and ours.preprocess == PREPROCESS
    torch.testing.assert_close(ours.encode_image(pixels), theirs.encode_image(pixels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(tokens), rtol=1e-5, atol=1e-5)


def test_a_released_resnet_is_read_by_its_name(tmp_path, monkeypatch):
    theirs = their_resnet()
    model_cfg = {
        "embed_dim": 16, "vision_cfg": {"image_size": 64, "layers": (1, 2, 1, 1), "width": 8, "patch_size": None},
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 64, "heads": 1, "layers": 1},
    }  # fmt: skip
    monkeypatch.setitem(zoo.ARCHITECTURES, "ResNet-19M-Text-19M", model_cfg)
    state = to_open_clip(checkpoint.load(_saved(theirs, tmp_path), config={**model_cfg, "quick_gelu": True}))
    wrapped = {
        ("_image_encoder.module." if name.startswith("visual.") else "_text_encoder.module.") + name: tensor
        for name, tensor in state.items()
        if name != "logit_scale"
    } | {"_logit_scale.module.logit_scale": state["logit_scale"]}
    torch.save({"state_dict": wrapped}, tmp_path / "released.pt")
    ours = checkpoint.load(f"tinyclip:ResNet-19M-Text-19M/{tmp_path / 'released.pt'}")
    assert ours.config == config_from_open_clip(model_cfg) and state.keys() == to_open_clip(ours).keys()
    for name, tensor in to_open_clip(ours).items():
        assert torch.equal(tensor, state[name])


def _saved(model: torch.nn.Module, directory):
    torch.save(model.state_dict(), directory / "theirs.pt")
    return directory / "theirs.pt"


def test_a_count_of_batches_that_is_no_whole_number_is_refused(tmp_path):
    state = to_open_clip(resnet())
    state["visual.bn1.num_batches_tracked"] = torch.tensor(7.0)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"expected whole numbers; 1 others: visual.bn1.num_batches_tracked"):
        checkpoint.load(tmp_path / "odd.pt", config=STOCK)


def test_remote_code_reads_captions_too(tmp_path):
    from transformers import AutoModel

    model = resnet(CUT)
    export(model, tmp_path / "hf", to="huggingface", say=lambda _: None)
    theirs = AutoModel.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    with torch.no_grad():
        features = theirs.get_text_features(SMALL(CAPTIONS)).pooler_output
        torch.testing.assert_close(features, model.encode_text(CAPTIONS), rtol=1e-5, atol=1e-6)
