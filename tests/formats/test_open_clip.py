"""One key table, used both ways: every key of open_clip's models has its place, and comes back where it was."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tinyclip
from tinyclip.formats.export import export
from tinyclip.formats.open_clip import (
    TeachOnly,
    config_from_open_clip,
    config_to_open_clip,
    from_open_clip,
    to_open_clip,
)
from tinyclip.model import CLIP, BlockConfig, CLIPConfig, initialise
from tinyclip.preprocess import Preprocess
from tinyclip.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["a red star", "two blue hearts"] * 2, vocab_size=520, context_length=8)

TINY = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 4},
    "text_cfg": {"context_length": 9, "vocab_size": 50, "width": 24, "heads": 3, "layers": 3},
}


def changed(section: str = "", **changes) -> dict:
    return {**TINY, section: {**TINY[section], **changes}} if section else {**TINY, **changes}


def random_state(model_cfg: dict) -> dict[str, torch.Tensor]:
    import open_clip

    custom = model_cfg.get("custom_text")
    arguments = {name: value for name, value in model_cfg.items() if name != "custom_text"}
    state = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**arguments).state_dict()
    return {name: torch.randn(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("model_cfg", [TINY, changed("vision_cfg", mlp_ratio=4.9231, image_size=[23, 23])])
def test_there_and_back_is_the_same(model_cfg):
    state = random_state(model_cfg)
    config = config_from_open_clip(model_cfg)
    back = to_open_clip(from_open_clip(state, config))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) and back[name].is_contiguous() for name, tensor in state.items())
    assert config_from_open_clip(config_to_open_clip(config)) == config


def test_our_weights_come_back_too():
    model = initialise(CLIP(config_from_open_clip(TINY)), torch.Generator().manual_seed(0))
    back = from_open_clip(to_open_clip(model), model.config).state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_what_wrappers_add_is_taken_off():
    model_cfg = changed(custom_text=True)
    state = random_state(model_cfg)
    config = config_from_open_clip(model_cfg)
    plain = to_open_clip(from_open_clip(state, config))
    wrapped = {f"module.{name}": tensor for name, tensor in plain.items()}
    wrapped |= {"module.attn_mask": torch.zeros(9, 9), "module.logit_scale": plain["logit_scale"].reshape(1)}
    again = to_open_clip(from_open_clip(wrapped, config))
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.items())
    assert torch.equal(plain["token_embedding.weight"], state["text.token_embedding.weight"])


def test_every_key_is_used_or_named():
    config, state = config_from_open_clip(TINY), random_state(TINY)
    with pytest.raises(ValueError, match=r"^file: .*2 unexpected: logit_bias, visual.ls$"):
        from_open_clip({**state, "logit_bias": torch.zeros(()), "visual.ls": torch.zeros(2)}, config, where="file")
    del state["visual.proj"]
    with pytest.raises(ValueError, match=r"1 missing: visual.proj$"):
        from_open_clip(state, config)
    with pytest.raises(ValueError, match=r"visual.proj \(expected \[16, 12\], got \[12, 16\]\)"):
        from_open_clip({**state, "visual.proj": torch.zeros(12, 16)}, config)
    with pytest.raises(ValueError, match=r"visual.conv1.weight \(expected \[16, 3, 4, 4\], got \[16, 48\]\)"):
        flat = {**state, "visual.proj": torch.zeros(16, 12), "visual.conv1.weight": torch.zeros(16, 48)}
        from_open_clip(flat, config)


def test_every_config_that_open_clip_ships_is_converted_or_refused_with_a_field():
    import open_clip

    converted = []
    for name in open_clip.list_models():
        try:
            config = config_from_open_clip(open_clip.get_model_config(name))
        except TeachOnly as reason:
            assert "_cfg" in str(reason) or "init_logit_bias" in str(reason) or "norm_kwargs" in str(reason), (
                name,
                reason,
            )
            continue
        converted.append(name)
        ours = _shapes(to_open_clip(_on_meta(CLIP, config)))
        model_cfg = open_clip.get_model_config(name)
        kind = open_clip.CustomTextCLIP if model_cfg.pop("custom_text", False) else open_clip.CLIP
        assert ours == {
            k.removeprefix("text."): v for k, v in _shapes(_on_meta(kind, **model_cfg).state_dict()).items()
        }
    assert {"ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14-336", "ViT-H-14", "ViT-g-14", "ViT-bigG-14"} <= set(converted)
    assert {"RN50", "RN101-quickgelu", "RN50x4", "RN50x16", "RN50x64"} <= set(converted)
    assert not any(name.startswith(("coca", "EVA", "ViT-B-16-SigLIP", "convnext")) for name in converted)


def _on_meta(build, *arguments, **fields):
    with torch.device("meta"):
        return build(*arguments, **fields)


def _shapes(state) -> dict:
    state = state.state_dict() if isinstance(state, torch.nn.Module) else state
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize(
    "model_cfg, field",
    [
        (changed("vision_cfg", layers=[2, 2, 2]), "vision_cfg.layers"),
        (changed("vision_cfg", layers=[2, 2, 2, 0]), "vision_cfg.layers"),
        (changed("vision_cfg", layers=[2, 2, 2, 2]), "vision_cfg: image_size: expected a multiple of 32, got 16"),
        (changed("vision_cfg", patch_size=None), "vision_cfg.patch_size: expected one for 2 layers, got none"),
        (changed("vision_cfg", timm_model_name="resnet18"), "vision_cfg.timm_model_name"),
        (changed("vision_cfg", ls_init_value=0.1), "vision_cfg.ls_init_value"),
        (changed("vision_cfg", attentional_pool=True), "vision_cfg.attentional_pool"),
        (changed("vision_cfg", no_ln_pre=True), "vision_cfg.no_ln_pre"),
        (changed("vision_cfg", pool_type="avg"), "vision_cfg.pool_type"),
        (changed("vision_cfg", pos_embed_type="sin_cos_2d"), "vision_cfg.pos_embed_type"),
        (changed("vision_cfg", final_ln_after_pool=True), "vision_cfg.final_ln_after_pool"),
        (changed("vision_cfg", image_size=[16, 24]), "vision_cfg.image_size"),
        (changed("vision_cfg", width=25), "vision_cfg.width: expected a multiple of 3 heads, got 25"),
        (changed("vision_cfg", layers=10**9), "vision_cfg.layers"),
        (changed("vision_cfg", norm_kwargs={"eps": 1e-6}), "norm_kwargs"),
        (changed("text_cfg", hf_model_name="bert"), "text_cfg.hf_model_name"),
        (changed("text_cfg", hf_tokenizer_name="bert"), "text_cfg.hf_tokenizer_name"),
        (changed("text_cfg", embed_cls=True), "text_cfg.embed_cls"),
        (changed("text_cfg", no_causal_mask=True), "text_cfg.no_causal_mask"),
        (changed("text_cfg", proj_bias=True), "text_cfg.proj_bias"),
        (changed("text_cfg", act_kwargs={"approximate": "tanh"}), "text_cfg.act_kwargs"),
        (changed(multimodal_cfg={"width": 8}), "multimodal_cfg"),
        (changed(init_logit_bias=-10.0), "init_logit_bias"),
        (changed(never_heard_of="it"), "never_heard_of"),
        ({"embed_dim": 12, "vision_cfg": {}}, "text_cfg"),
    ],
)
def test_what_our_towers_lack_is_named(model_cfg, field):
    with pytest.raises(TeachOnly, match=field):
        config_from_open_clip(model_cfg)


def test_optional_fields_at_their_defaults_change_nothing():
    from dataclasses import asdict

    from open_clip import CLIPTextCfg, CLIPVisionCfg

    full = {
        "embed_dim": 12,
        "quick_gelu": False,
        "vision_cfg": {**asdict(CLIPVisionCfg()), **TINY["vision_cfg"]},
        "text_cfg": {**asdict(CLIPTextCfg()), **TINY["text_cfg"]},
    }
    assert config_from_open_clip(full) == config_from_open_clip(TINY)


def test_the_activation_and_the_norms_are_read():
    norm = {"norm_kwargs": {"eps": 1e-6}}
    model_cfg = {**changed("vision_cfg", **norm), "quick_gelu": True, "text_cfg": {**TINY["text_cfg"], **norm}}
    config = config_from_open_clip(model_cfg)
    assert (config.activation, config.norm_eps) == ("quick_gelu", 1e-6)
    assert config_from_open_clip(config_to_open_clip(config)) == config


def test_a_resnet_has_the_eps_of_its_text_tower_alone():
    """open_clip's ResNets have no LayerNorm, and it looks at no setting of one."""
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 2, "head_width": 8}
    text_cfg = {**TINY["text_cfg"], "norm_kwargs": {"eps": 1e-3}}
    config = config_from_open_clip({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text_cfg})
    assert config.norm_eps == 1e-3 and config_from_open_clip(config_to_open_clip(config)) == config
    other = {**vision, "norm_kwargs": {"eps": 1e-6}}
    assert config_from_open_clip({"embed_dim": 12, "vision_cfg": other, "text_cfg": text_cfg}) == config


@pytest.fixture(scope="module")
def local_dir(tmp_path_factory):
    """What tinyclip writes for open_clip."""
    config = CLIPConfig.uniform(
        embed_dim=4, image_size=23, patch_size=23, image_width=4, image_layers=1, text_width=4, text_layers=1,
        context_length=8, vocab_size=TOKENIZER.vocab_size, head_dim=4,
    )  # fmt: skip
    model = CLIP(config, preprocess=Preprocess(size=23), tokenizer=TOKENIZER)
    model = initialise(model, torch.Generator().manual_seed(0)).eval()
    return export(model, tmp_path_factory.mktemp("exports") / "out", to="open_clip", verify=False)["directory"]


def copied(local_dir, directory, **changes):
    shutil.copytree(local_dir, directory)
    file = directory / "open_clip_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return directory


@pytest.mark.parametrize(
    "preprocess_cfg",
    [
        {},
        None,
        {"mean": None, "interpolation": None, "size": 99, "unknown": 1},  # the size is the model's
        {"mean": 0.5, "std": [0.5, 0.6, 0.7]},
        {"mean": 0, "fill_color": 128},
        {"interpolation": "random", "resize_mode": "squash"},
        {"interpolation": "bilinear", "resize_mode": None, "mode": "RGB"},
    ],
)
def test_pictures_are_read_as_open_clip_does_with_the_same_directory(preprocess_cfg, local_dir, tmp_path):
    import open_clip

    directory = copied(local_dir, tmp_path / "dir", preprocess_cfg=preprocess_cfg)
    picture = Image.effect_mandelbrot((90, 62), (-3, -2.5, 2, 2.5), 100).resize((40, 31)).convert("RGB")
    _, transform = open_clip.create_model_from_pretrained(f"local-dir:{directory}")
    ours = tinyclip.load(directory).preprocess
    levels = (
        (ours.normalise(ours(picture)[None])[0] - transform(picture)).abs() * 255 * torch.tensor(ours.std).view(3, 1, 1)
    )
    assert levels.max() < 1.1


@pytest.mark.parametrize(
    "preprocess_cfg, message",
    [
        ({"resize_mode": "longest"}, "expected square pictures without borders"),
        ({"resize_mode": "fill"}, "preprocess_cfg: resize_mode"),
        ({"interpolation": "nearest"}, "preprocess_cfg: interpolation"),
        ({"mode": "L"}, "preprocess_cfg: mode"),
        ({"mean": [0.5, 0.5]}, "preprocess_cfg: mean"),
        ({"std": [0.5, 0, 0.5]}, "preprocess_cfg: std"),
        ([1], "preprocess_cfg: expected an object, got list"),
    ],
)
def test_a_reading_that_is_not_ours_is_named(preprocess_cfg, message, local_dir, tmp_path):
    directory = copied(local_dir, tmp_path / "dir", preprocess_cfg=preprocess_cfg)
    with pytest.raises(ValueError, match=rf"open_clip_config.json: {message}") as error:
        tinyclip.load(directory)
    assert "\n" not in str(error.value)


def test_the_file_of_weights_is_the_one_that_open_clip_takes(local_dir, tmp_path):
    import open_clip

    directory = copied(local_dir, tmp_path / "dir")
    state = load_file(directory / "open_clip_model.safetensors")
    (directory / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="open_clip_model.safetensors: expected a checkpoint file, found none"):
        tinyclip.load(directory)
    names = ["b.bin", "a.pth", "z.safetensors", "model.safetensors", "open_clip_pytorch_model.bin"]
    for number, name in enumerate(names):
        other = {**state, "logit_scale": torch.tensor(float(number))}
        (save_file if name.endswith("safetensors") else torch.save)(other, directory / name)
        theirs = open_clip.create_model(f"local-dir:{directory}").logit_scale.item()
        assert tinyclip.load(directory).logit_scale.item() == theirs, name


def test_a_vocabulary_of_its_own_is_looked_for_in_the_directory_whatever_its_name(local_dir, tmp_path):
    directory = copied(local_dir, tmp_path / "dir")
    file = directory / "open_clip_config.json"
    file.write_text(file.read_text().replace('"tokenizer.json"', '"openai/clip-vit-base-patch32"'))
    assert tinyclip.load(directory).tokenizer == TOKENIZER


def test_a_directory_that_our_towers_lack_is_named(local_dir, tmp_path):
    directory = copied(local_dir, tmp_path / "dir", model_cfg=changed("vision_cfg", no_ln_pre=True))
    with pytest.raises(TeachOnly, match="open_clip_config.json: open_clip's vision_cfg.no_ln_pre=True has no"):
        tinyclip.load(directory)


@pytest.mark.parametrize(
    "block", [BlockConfig(heads=1, ffn=64), BlockConfig(heads=2, ffn=60), BlockConfig(heads=0, ffn=64)]
)
def test_a_shrunk_student_is_not_passed_off_as_open_clips(block):
    uniform = config_from_open_clip(TINY)
    image = uniform.image.model_copy(update={"blocks": (*uniform.image.blocks, block)})
    config = CLIPConfig(embed_dim=12, image=image, text=uniform.text)
    with pytest.raises(ValueError, match="those of the image tower are not"):
        config_to_open_clip(config)
    if not block.heads:
        with pytest.raises(ValueError, match="no block without heads"):
            to_open_clip(CLIP(config))
