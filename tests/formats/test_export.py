"""What is exported the target library reads with equal features, with no code of ours; a bad export leaves nothing."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    pipeline,
)
from typer.testing import CliRunner

import tinyclip
from tinyclip.cli import app
from tinyclip.formats import export as export_module
from tinyclip.formats import huggingface
from tinyclip.formats.export import export
from tinyclip.formats.uniform import is_uniform, pad
from tinyclip.model import CLIP, BlockConfig, CLIPConfig, ImageConfig, TextConfig, initialise, unit
from tinyclip.preprocess import Preprocess
from tinyclip.tokenizer import Tokenizer

CAPTIONS = ["A red  star, isn't it?", "two blue hearts and more words than there are places", "x"]
SMALL = Tokenizer.train(["a red star", "two blue hearts"] * 2, vocab_size=530, context_length=11)
OPENAI = Tokenizer.openai(16)
UNIFORM = CLIPConfig.uniform(
    embed_dim=6, image_size=23, patch_size=5, image_width=12, image_layers=2, text_width=8, text_layers=1,
    context_length=11, vocab_size=SMALL.vocab_size, head_dim=4, activation="quick_gelu",
)  # fmt: skip
IRREGULAR = UNIFORM.model_copy(
    update={
        "activation": "gelu",
        "norm_eps": 1e-3,
        "image": ImageConfig(
            width=12, head_dim=3, image_size=23, patch_size=5,
            blocks=(BlockConfig(heads=2, ffn=5), BlockConfig(heads=0, ffn=3), BlockConfig(heads=4, ffn=0)),
        ),
        "text": TextConfig(
            width=8, head_dim=4, context_length=11, vocab_size=SMALL.vocab_size,
            blocks=(BlockConfig(heads=1, ffn=7), BlockConfig(heads=2, ffn=1)),
        ),
    }
)  # fmt: skip
CUT = IRREGULAR.model_copy(update={"image": IRREGULAR.image.model_copy(update={"width": 11})})
OTHER_READING = Preprocess(
    size=23, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), interpolation="bilinear", resize="squash"
)


def toy(config: CLIPConfig, preprocess: Preprocess | None = None, tokenizer: Tokenizer = SMALL) -> CLIP:
    """Random weights, none of them 0 or 1."""
    preprocess = preprocess or Preprocess(size=config.image.image_size)
    generator = torch.Generator().manual_seed(0)
    model = initialise(CLIP(config, preprocess=preprocess, tokenizer=tokenizer), generator).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def noise(count: int = 3, size: tuple[int, int] = (40, 31)) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(2)
    grain = torch.randint(0, 256, (count, size[1] // 4, size[0] // 4, 3), dtype=torch.uint8, generator=generator)
    return [Image.fromarray(picture.numpy()).resize(size) for picture in grain]


def state_equal(left: CLIP, right: CLIP) -> bool:
    other = right.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in left.state_dict().items())


@torch.no_grad()
def assert_features(model: CLIP, pixels, image_BE, text_BE) -> None:
    assert (model.encode_image(pixels, normalize=True) - unit(image_BE)).abs().max() < 1e-5
    assert (model.encode_text(CAPTIONS, normalize=True) - unit(text_BE)).abs().max() < 1e-5


@pytest.mark.parametrize("preprocess", [None, OTHER_READING])
@torch.no_grad()
def test_stock_transformers_gives_the_same_features(preprocess, tmp_path):
    model = toy(UNIFORM, preprocess)
    export(model, tmp_path / "out", to="huggingface")
    theirs = CLIPModel.from_pretrained(tmp_path / "out").eval()
    processor = CLIPProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(images=noise(), text=CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    assert_features(
        model,
        inputs.pixel_values,
        theirs.get_image_features(inputs.pixel_values).pooler_output,
        theirs.get_text_features(inputs.input_ids, inputs.attention_mask).pooler_output,
    )
    back = tinyclip.load(tmp_path / "out")
    assert state_equal(back, model)
    assert (back.config, back.preprocess, back.tokenizer) == (model.config, model.preprocess, model.tokenizer)


@pytest.mark.parametrize("tokenizer, preprocess", [(OPENAI, None), (SMALL, OTHER_READING)])
@torch.no_grad()
def test_stock_open_clip_gives_the_same_features(tokenizer, preprocess, tmp_path):
    text = UNIFORM.text.model_copy(
        update={"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.context_length}
    )
    model = toy(UNIFORM.model_copy(update={"text": text}), preprocess, tokenizer)
    export(model, tmp_path / "out", to="open_clip")
    name = f"local-dir:{tmp_path / 'out'}"
    theirs, transform = open_clip.create_model_from_pretrained(name)
    pixels = torch.stack([transform(picture) for picture in noise()])
    tokens = open_clip.get_tokenizer(name)(CAPTIONS)
    theirs.eval()
    assert_features(model, pixels, theirs.encode_image(pixels), theirs.encode_text(tokens))
    assert (pixels - model.preprocess.normalise(torch.stack(list(map(model.preprocess, noise()))))).abs().max() < 0.03


REMOTE = """
import sys
sys.modules["tinyclip"] = None  # importing it is an error
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor
directory, *captions = sys.argv[1:]
model = AutoModel.from_pretrained(directory, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
inputs = processor(images=[Image.open("0.png"), Image.open("1.png"), Image.open("2.png")], text=captions, padding=True,
                   truncation=True, return_tensors="pt")
with torch.no_grad():
    output = model(**inputs, return_loss=True)
    image = model.get_image_features(pixel_values=inputs.pixel_values).pooler_output
    text = model.get_text_features(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).pooler_output
try:
    model.get_image_features(torch.zeros(1, 3, 8, 8))
except ValueError as error:
    assert "[B, 3, 23, 23]" in str(error)
model.save_pretrained("again")
assert AutoModel.from_pretrained("again", trust_remote_code=True).logit_scale == model.logit_scale
save_file({"pixels": inputs.pixel_values, "image": image, "text": text, "loss": output.loss,
           "logits": output.logits_per_image.contiguous()}, "features.safetensors")
"""


@pytest.mark.parametrize("config", [IRREGULAR, CUT], ids=["blocks that differ", "a cut width"])
@torch.no_grad()
def test_remote_code_is_exact_where_tinyclip_is_not_installed(config, tmp_path):
    model = toy(config.model_copy(update={"activation": "quick_gelu"}) if config is CUT else config)
    tinyclip.save(model, tmp_path / "model")
    home = {**os.environ, "HF_HOME": str(tmp_path / "home")}  # transformers keeps a copy of the code there
    command = [sys.executable, "-m", "tinyclip", "export", "model", "--to", "huggingface", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=home, capture_output=True, text=True)
    assert done.returncode == 0 and "read back with huggingface" in done.stderr, done.stderr
    for index, picture in enumerate(noise()):
        picture.save(tmp_path / f"{index}.png")
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "out"), *CAPTIONS]
    done = subprocess.run(command, cwd=tmp_path, env=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "features.safetensors")
    assert_features(model, theirs["pixels"], theirs["image"], theirs["text"])
    image, text = model(theirs["pixels"], model.tokenizer(CAPTIONS))
    logits = model.logit_scale.exp() * image @ text.T
    torch.testing.assert_close(theirs["logits"], logits, atol=1e-5, rtol=1e-5)
    loss = sum(torch.nn.functional.cross_entropy(matrix, torch.arange(3)) for matrix in (logits, logits.T)) / 2
    torch.testing.assert_close(theirs["loss"], loss, atol=1e-5, rtol=1e-5)
    back = tinyclip.load(tmp_path / "out")  # it is a directory of ours too
    assert state_equal(back, model) and back.config == model.config


@pytest.mark.parametrize("config", [UNIFORM, IRREGULAR], ids=["blocks alike", "blocks that differ"])
@torch.no_grad()
def test_exports_work_in_the_tasks_of_transformers(config, tmp_path):
    model, directory, picture = toy(config), str(tmp_path / "out"), noise()[0]
    export(model, directory, to="huggingface", verify=False)
    classify = pipeline("zero-shot-image-classification", model=directory, trust_remote_code=True)
    said = classify(picture, candidate_labels=["red", "blue"], hypothesis_template="a {} star")
    image_BE, text_BE = (
        model.encode_image(picture, normalize=True),
        model.encode_text(["a red star", "a blue star"], normalize=True),
    )
    expected = (model.scale * image_BE @ text_BE.T).softmax(-1)[0]
    scores = {entry["label"]: entry["score"] for entry in said}
    torch.testing.assert_close(torch.tensor([scores["red"], scores["blue"]]), expected, atol=1e-4, rtol=0)
    theirs = classify.model
    if config is UNIFORM:  # a CLIPModel has no features of pictures alone: its classes of one tower do
        theirs = CLIPVisionModelWithProjection.from_pretrained(directory).eval()
    embed = pipeline("image-feature-extraction", model=theirs, image_processor=directory)
    features = embed(picture, return_tensors=True, pool=config is IRREGULAR)
    torch.testing.assert_close(features, model.encode_image(picture), atol=1e-4, rtol=1e-4)
    ids = classify.tokenizer(CAPTIONS, padding=True, truncation=True, return_tensors="pt").input_ids
    if config is UNIFORM:
        features = CLIPTextModelWithProjection.from_pretrained(directory).eval()(ids).text_embeds
    else:
        features = theirs(input_ids=ids).pooler_output
        with pytest.raises(ValueError, match="expected input_ids, pixel_values or both, got neither"):
            theirs()
    torch.testing.assert_close(features, model.encode_text(CAPTIONS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [UNIFORM, IRREGULAR], ids=["blocks alike", "blocks that differ"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_what_transformers_saved_again_comes_back(config, dtype, tmp_path):
    model = toy(config, OTHER_READING)
    export(model, tmp_path / "out", to="huggingface", verify=False)
    theirs = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).to(dtype)
    theirs.save_pretrained(tmp_path / "again", max_shard_size="4KB" if dtype is torch.float16 else "1GB")
    AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").is_file() == (dtype is torch.bfloat16)
    back = tinyclip.load(tmp_path / "again")
    assert (back.config, back.preprocess, back.tokenizer) == (model.config, model.preprocess, model.tokenizer)
    for name, weight in back.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].to(dtype).float()), name
    inputs = AutoProcessor.from_pretrained(tmp_path / "again", trust_remote_code=True)(
        images=noise(), text=CAPTIONS, padding=True, truncation=True, return_tensors="pt"
    )
    output = theirs.float().eval()(**inputs)
    assert_features(back, inputs.pixel_values, output.image_embeds, output.text_embeds)


def test_a_reading_that_was_changed_beside_ours_is_not_overlooked(tmp_path):
    model = toy(IRREGULAR)
    export(model, tmp_path / "out", to="huggingface", verify=False)
    assert not (tmp_path / "out" / "preprocess.json").exists()  # one file says it
    processor = CLIPProcessor.from_pretrained(tmp_path / "out")
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    processor.save_pretrained(tmp_path / "out")
    assert tinyclip.load(tmp_path / "out").preprocess.mean == (0.5,) * 3
    (tmp_path / "out" / "preprocess.json").write_text(model.preprocess.model_dump_json())
    with pytest.raises(ValueError, match=r"preprocess.json: what transformers reads .* says otherwise: "):
        tinyclip.load(tmp_path / "out")


@pytest.mark.parametrize("to", ["huggingface", "open_clip", "tinyclip"])
def test_an_export_with_another_scale_fails_though_its_features_are_right(to, tmp_path, monkeypatch):
    model, target = toy(UNIFORM), export_module.TARGETS[to]

    def sabotage(written: CLIP, directory: Path) -> None:
        with torch.no_grad():
            written.logit_scale += 1e-3
        target.write(written, directory)
        with torch.no_grad():
            written.logit_scale -= 1e-3

    monkeypatch.setitem(export_module.TARGETS, to, target._replace(write=sabotage))
    with pytest.raises(ValueError, match="not written: expected .* 1e-05 in unit features, .* in logits"):
        export(model, tmp_path / "out", to=to)
    assert not list(tmp_path.iterdir())


def test_the_remote_code_needs_nothing_of_ours():
    text = huggingface.REMOTE_CODE.read_text()
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert all(line.split()[1].split(".")[0] in {"__future__", "typing", "torch", "transformers"} for line in imports)


@torch.no_grad()
def test_padding_changes_the_shape_and_no_value():
    model = toy(IRREGULAR)
    padded = pad(model)
    assert is_uniform(padded.config) and not is_uniform(model.config)
    assert set(padded.config.image.blocks) == {BlockConfig(heads=4, ffn=5)}
    pixels = torch.randn(3, 3, 23, 23)
    assert_features(model, pixels, padded.encode_image(pixels), padded.encode_text(CAPTIONS))
    uniform = toy(UNIFORM)
    assert state_equal(uniform, pad(uniform))


@pytest.mark.parametrize("to", ["huggingface", "open_clip"])
@torch.no_grad()
def test_a_padded_student_loads_everywhere_and_says_what_it_gives_up(to, tmp_path):
    model, said = toy(IRREGULAR), []
    result = export(model, tmp_path / "out", to=to, pad=True, say=said.append)
    before, after = model.config.prunable_params, pad(model).config.prunable_params
    assert f"{before:,} -> {after:,} prunable parameters" in said[0] and f"{after / before:.2f} times" in said[0]
    assert f"features differ by at most {result['max_difference']:.1e}" in said[1]
    assert result["max_difference"] < 1e-5 and result["padded"]
    if to == "huggingface":
        assert state_equal(tinyclip.load(tmp_path / "out"), pad(model))
        assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.parametrize(
    "config, to, padding, message",
    [
        (IRREGULAR, "open_clip", False, "image tower are not: its blocks differ; pad it, or export to huggingface"),
        (CUT, "open_clip", True, "the image tower cannot be padded: expected a width of whole heads of 3"),
        (CUT, "huggingface", True, "the image tower cannot be padded"),
        (UNIFORM, "caffe", False, "expected one of open_clip, huggingface, tinyclip, onnx, onnx-int8, got 'caffe'"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_and_leaves_nothing(config, to, padding, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(toy(config), tmp_path / "out", to=to, pad=padding)
    assert not list(tmp_path.iterdir())


def test_bare_weights_and_full_directories_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got bare weights"):
        export(CLIP(UNIFORM), tmp_path / "out", to="huggingface")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="expected a new or empty directory"):
        export(toy(UNIFORM), tmp_path, to="huggingface")


@pytest.mark.parametrize("broken", ["weights", "pixels", "file"])
@pytest.mark.parametrize("to", ["huggingface", "open_clip", "tinyclip"])
def test_an_export_that_reads_back_differently_fails_and_leaves_nothing(to, broken, tmp_path, monkeypatch):
    model, target = toy(UNIFORM), export_module.TARGETS[to]

    def sabotage(written: CLIP, directory: Path) -> None:
        target.write(written, directory)
        [file] = directory.glob("*.safetensors")
        if broken == "weights":
            state = load_file(file)
            largest = max(state, key=lambda name: state[name].numel())
            save_file({**state, largest: state[largest] + 1e-3 * state[largest].square()}, file, {"format": "pt"})
        elif broken == "pixels":
            for settings in directory.glob("*.json"):
                settings.write_text(settings.read_text().replace("0.48145466", "0.6"))
        else:
            file.write_bytes(b"")

    monkeypatch.setitem(export_module.TARGETS, to, target._replace(write=sabotage))
    with pytest.raises(ValueError, match="cannot read what was written" if broken == "file" else "not written"):
        export(model, tmp_path / "out", to=to)
    assert not list(tmp_path.iterdir())


def test_the_command_prints_the_difference_and_the_directory(tmp_path):
    tinyclip.save(toy(UNIFORM), tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), "--to", "open_clip", "--out"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "out")], catch_exceptions=False)
    assert done.stdout == f"{tmp_path / 'out'}\n" and "features differ by at most" in done.stderr
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "fast"), "--no-verify"], catch_exceptions=False)
    assert "not verified" in done.stderr and (tmp_path / "fast" / "open_clip_config.json").is_file()
    done = CliRunner().invoke(app, ["export", str(tmp_path / "model"), "--to", "nothing", "--out", str(tmp_path / "x")])
    assert isinstance(done.exception, ValueError) and not (tmp_path / "x").exists()


def test_models_of_other_libraries_are_converted(tmp_path):
    """Hugging Face -> open_clip -> ours -> Hugging Face, bit for bit."""
    text = UNIFORM.text.model_copy(update={"vocab_size": OPENAI.vocab_size, "context_length": OPENAI.context_length})
    model = toy(UNIFORM.model_copy(update={"text": text}), tokenizer=OPENAI)
    export(model, tmp_path / "first", to="huggingface", verify=False)
    previous = str(tmp_path / "first")
    for to, spec in (("open_clip", "local-dir:{}"), ("tinyclip", "{}"), ("huggingface", "{}")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            command = ["export", previous, "--to", to, "--out", str(tmp_path / to), "--no-verify"]
            assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
        previous = spec.format(tmp_path / to)
    for file in (tmp_path / "first").iterdir():
        again = tmp_path / "huggingface" / file.name
        if file.suffix == ".json":
            assert json.loads(again.read_text()) == json.loads(file.read_text()), file.name
        else:
            assert again.read_bytes() == file.read_bytes()
