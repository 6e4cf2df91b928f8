"""Released checkpoints, manual, automatic and straight from the trainer, give the reference's features; no key is lost.

The files in ../shared/golden have the released key formats and random weights; the reference computed the features.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyclip.formats import checkpoint, weights
from tinyclip.formats.open_clip import config_from_open_clip, to_open_clip
from tinyclip.formats.release import from_release, is_release, plain, pruned
from tinyclip.model import CLIP, BlockConfig, CLIPConfig, ImageConfig, TextConfig, initialise


@pytest.fixture(scope="module")
def golden(shared):
    return shared / "golden"


def read(golden, name: str):
    """The tensors of a golden file, and the published config that goes with it."""
    settings = json.loads((golden / f"{name.split('_')[0]}_checkpoint_config.json").read_text())
    return weights.read(golden / name), config_from_open_clip(settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "file, expected, features",
    [
        ("manual_checkpoint.pt", "manual_checkpoint_expected", "expected"),
        ("manual_checkpoint.safetensors", "manual_checkpoint_expected", "expected"),
        ("auto_checkpoint.pt", "auto_expected", "checkpoint"),
        ("auto_checkpoint.safetensors", "auto_expected", "checkpoint"),
        ("auto_checkpoint_trainer.pt", "auto_expected", "pruned"),
    ],
)
@torch.no_grad()
def test_released_files_give_the_references_features(file, expected, features, dtype, golden):
    config = golden / f"{file.split('_')[0]}_checkpoint_config.json"
    model = checkpoint.load(golden / file, config=config)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    model, stored = model.to(dtype), load_file(golden / f"{expected}.safetensors")
    pixels, tokens = stored["pixels"].to(dtype), stored["tokens"]
    ours = {
        "image_features": model.encode_image(pixels),
        "text_features": model.encode_text(tokens),
        "image_features_normalized": model.encode_image(pixels, normalize=True),
        "text_features_normalized": model.encode_text(tokens, normalize=True),
        "logit_scale_exp": model.scale,
    }
    for name, value in ours.items():
        reference = stored[f"{features}/{str(dtype).removeprefix('torch.')}/{name}"]
        relative = 1e-10 if dtype == torch.float64 else 1e-5
        assert (value - reference).abs().max() <= relative * reference.abs().max(), name


def test_a_pruned_model_has_exactly_the_sizes_of_the_file(golden):
    state, dense = read(golden, "auto_checkpoint.pt")
    model = from_release(state, dense)
    kept = json.loads((golden / "auto_expected.json").read_text())
    for name in ("image", "text"):
        tower, sizes = getattr(model.config, name), kept["kept"][name]
        assert tower.width == sizes["hidden_kept"]
        assert [block.heads for block in tower.blocks] == sizes["heads_kept"]
        assert [block.ffn for block in tower.blocks] == sizes["intermediate_kept"]
    headless = model.image.blocks[1].attention.bias
    assert torch.equal(headless, torch.zeros(44))  # the reference drops the bias of a block without heads
    num_read = sum(parameter.numel() for parameter in model.parameters()) - 44 - 32  # one such block in each tower
    assert num_read == sum(tensor.numel() for tensor in state.values())


@pytest.mark.parametrize("ffn", [(20, 21), (20, 20)], ids=["blocks that differ", "blocks all alike"])
def test_a_pruned_file_is_read_by_its_shapes_however_alike_its_blocks_are(ffn):
    def config(*ffn: int) -> CLIPConfig:
        image = ImageConfig(
            width=12, head_dim=4, blocks=[BlockConfig(heads=3, ffn=size) for size in ffn], image_size=8, patch_size=4
        )
        text = TextConfig(width=8, head_dim=4, blocks=[BlockConfig(heads=2, ffn=9)], context_length=5, vocab_size=9)
        return CLIPConfig(embed_dim=6, image=image, text=text)

    small = initialise(CLIP(config(*ffn)), torch.Generator().manual_seed(0))
    state = to_open_clip(small)
    wrappers = ("image_encoder_without_ddp.", "text_encoder_without_ddp.", "_logit_scale.module.")
    wrapped = {
        wrappers[2 if name == "logit_scale" else not name.startswith("visual.")] + name: weight
        for name, weight in state.items()
    }
    loaded = from_release(wrapped, config(48, 48))
    assert loaded.config == small.config
    assert all(torch.equal(weight, state[name]) for name, weight in to_open_clip(loaded).items())
    deeper = config(48, 48, 48)  # a block of it is gone: it adds nothing
    assert from_release(wrapped, deeper).config == small.config


def test_a_manual_model_keeps_its_config(golden):
    state, config = read(golden, "manual_checkpoint.pt")
    assert from_release(state, config).config == config


@pytest.mark.parametrize(
    "image, text, scale",
    [
        ("_image_encoder.module.", "_text_encoder.module.", "_logit_scale.module."),
        ("image_encoder_without_ddp.", "text_encoder_without_ddp.", "_logit_scale.module.module."),
        ("_image_encoder.", "_text_encoder.", "_logit_scale."),
        ("module.", "module.", "module."),
        ("", "", "_logit_scale."),
    ],
)
def test_every_wrapper_seen_in_releases_is_taken_off(image, text, scale, golden):
    state, config = read(golden, "manual_checkpoint.pt")
    bare = plain(state)

    def wrapper(name: str) -> str:
        return image if name.startswith("visual.") else scale if name == "logit_scale" else text

    wrapped = {wrapper(name) + name: tensor for name, tensor in bare.items()}
    assert is_release(wrapped) == (image != "module.")
    assert plain(wrapped).keys() == bare.keys()
    from_release(wrapped, config)


def test_names_that_are_there_twice_must_agree(golden):
    state, config = read(golden, "auto_checkpoint_trainer.pt")
    assert len(state) == 195 and len(plain(state)) == 98
    name = "image_encoder_without_ddp.visual.proj"
    for other in (state[name] + 1, state[name].half(), state[name][:1]):
        with pytest.raises(ValueError, match=r"^here: visual.proj is there twice, with different values$"):
            from_release({**state, name: other}, config, where="here")


@pytest.mark.parametrize("file", ["manual_checkpoint.pt", "auto_checkpoint.pt"])
def test_every_key_is_used_or_named(file, golden):
    state, config = read(golden, file)
    for name in ("_image_encoder.module.visual.extra", "_image_encoder.l0_module.loga", "epoch"):
        with pytest.raises(ValueError, match=r"^here: .*1 unexpected: \S*(extra|loga|epoch)$"):
            from_release({**state, name: torch.zeros(2)}, config, where="here")
    for name in state:
        if "c_fc.weight" not in name and "in_proj_weight" not in name:
            rest = {other: tensor for other, tensor in state.items() if other != name}
            with pytest.raises(ValueError, match=r"^here: .*(missing: |expected )"):
                from_release(rest, config, where="here")
    # Without the weight that says how many neurons a block has, the others of its branch are left over.
    counts = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    rest = {name: tensor for name, tensor in state.items() if not name.endswith(counts)}
    with pytest.raises(ValueError, match=r"unexpected: visual.transformer.resblocks.0."):
        from_release(rest, config)


def replaced(state: dict, ending: str, tensor: torch.Tensor) -> dict:
    return {name: tensor if name.endswith(ending) else old for name, old in state.items()}


@pytest.mark.parametrize(
    "ending, shape, message",
    [
        ("visual.transformer.resblocks.0.attn.in_proj_weight", (37, 44), "expected 1 to 4 times 36 rows, got 37"),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", (180, 44), "expected 1 to 4 times 36 rows, got 180"),
        ("visual.transformer.resblocks.0.mlp.c_fc.weight", (193, 44), "expected 1 to 192 times 1 rows, got 193"),
        ("visual.transformer.resblocks.0.mlp.c_fc.weight", (0, 44), "expected 1 to 192 times 1 rows, got 0"),
        ("visual.transformer.resblocks.0.mlp.c_fc.weight", (44,), "c_fc.weight with 2 axes, got shape .44.$"),
        ("ln_final.weight", (37,), "ln_final.weight: expected a width of 1 to 36, got 37"),
        ("ln_final.weight", (31,), "of another shape"),
        ("visual.ln_post.weight", (0,), "expected a width of 1 to 48, got 0"),
    ],
)
def test_sizes_that_pruning_cannot_leave_are_refused(ending, shape, message, golden):
    state, config = read(golden, "auto_checkpoint.pt")
    with pytest.raises(ValueError, match=message):
        from_release(replaced(state, ending, torch.zeros(shape)), config)


def test_another_config_is_not_taken_for_a_pruned_model(golden):
    state, config = read(golden, "manual_checkpoint.pt")
    deeper = config.text.model_copy(update={"blocks": config.text.blocks * 2})
    with pytest.raises(ValueError, match=r"missing: .*transformer.resblocks.2"):
        from_release(state, config.model_copy(update={"text": deeper}))


def test_blocks_that_are_gone_entirely_add_nothing(golden):
    state, config = read(golden, "manual_checkpoint.pt")
    rest = {name: tensor for name, tensor in plain(state).items() if not name.startswith("transformer.resblocks.0.")}
    assert pruned(config, rest).text.blocks == (BlockConfig(heads=0, ffn=0), config.text.blocks[1])
    rest = {name: tensor for name, tensor in plain(state).items() if not name.startswith("visual.transformer.resb")}
    assert pruned(config, rest).image.blocks == (BlockConfig(heads=0, ffn=0),)
    tokens = torch.tensor([[95, 3, 96] + [0] * 13])
    assert torch.isfinite(from_release(rest, config).encode_text(tokens)).all()


def test_a_key_with_a_path_or_an_endless_shape_is_refused(golden, tmp_path):
    state, config = read(golden, "manual_checkpoint.pt")
    for key in ("../../etc/passwd", "/etc/passwd", "a\\b", "line\nbreak", "", " "):
        for suffix, write in ((".safetensors", save_file), (".pt", torch.save)):
            path = tmp_path / f"keys{suffix}"
            write({**state, key: torch.zeros(2)}, path)
            with pytest.raises(ValueError, match="keys.*: expected names of tensors, got ") as error:
                checkpoint.load(path, config=config)
            assert "\n" not in str(error.value)
    name = "_image_encoder.module.visual.proj"
    for tensor in (torch.zeros(1).expand(10**6, 10**6), torch.zeros(4, 4).to_sparse()):
        torch.save({**state, name: tensor}, tmp_path / "huge.pt")
        with pytest.raises(
            ValueError, match="huge.pt: (.*: expected a tensor that the file holds|expected tensors only)"
        ):
            checkpoint.load(tmp_path / "huge.pt", config=config)
