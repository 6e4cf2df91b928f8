"""A ResNet goes through the whole story: trained, cut by masks and by rule, distilled, resumed, evaluated, exported."""

import pytest
import torch

import tinyclip
from tests.test_compress import CONTRASTIVE, DATA, EVALUATION, phase, weights
from tinyclip.compress import compress
from tinyclip.data.loader import Inputs
from tinyclip.distill.train import backward
from tinyclip.formats.export import export
from tinyclip.model import unit
from tinyclip.model_resnet import ResNetConfig
from tinyclip.recipe import Recipe, Stage
from tinyclip.run import results
from tinyclip.shrink.inherit import Inherit
from tinyclip.shrink.masks import LearnMasks
from tinyclip.start import Scratch
from tinyclip.stopping import Interrupted


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    run = tmp_path_factory.mktemp("teacher") / "run"
    shape = Scratch(
        embed_dim=16, image_size=64, image_width=8, image_layers=(2, 1, 1, 1),
        text_width=32, text_layers=2, head_dim=8, context_length=20, vocabulary=620,
    )  # fmt: skip
    stages = (Stage(name="train", distill=phase(3, objective=CONTRASTIVE)),)
    compress(Recipe(start=shape, data=DATA, stages=stages), run, say=lambda _: None)
    return run


def recipe(teacher) -> Recipe:
    return Recipe(
        teacher=str(teacher),
        data=DATA,
        stages=(
            Stage(name="auto-70", shrink=LearnMasks(keep_params=0.7), while_masking=phase(4), distill=phase(4)),
            Stage(name="manual-35", shrink=Inherit(keep_params=0.35), distill=phase(4)),
        ),
        evaluation=EVALUATION,
    )


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    run = tmp_path_factory.mktemp("student") / "run"
    compress(recipe(teacher), run, say=lambda _: None)
    return run


def test_every_stage_is_within_its_budget_and_has_scores(finished, teacher):
    whole = tinyclip.load(teacher).config.prunable_params
    for directory, share in ((finished / "0-auto-70", 0.7), (finished / "1-manual-35", 0.35)):
        model = tinyclip.load(directory)
        assert isinstance(model.config.image, ResNetConfig) and model.config.prunable_params <= share * whole
    assert all(0 <= result["scores"]["top1"] <= 1 for result in results(finished))


def test_running_statistics_were_trained_and_exported(finished, teacher, tmp_path):
    student = tinyclip.load(finished)
    assert int(student.image.bn1.num_batches_tracked) == 3 + 4 + 4 + 4  # the teacher's steps and its own
    assert export(student, tmp_path / "hf", to="huggingface", say=lambda _: None)["max_difference"] <= 1e-5


def test_an_interrupted_run_ends_with_the_same_bits(finished, teacher, tmp_path, monkeypatch):
    from tinyclip.distill import train as module

    steps = []

    def until_the_third(state, *arguments):
        steps.append(state.step)
        if len(steps) in (3, 7, 10):
            raise Interrupted("cut off", 15)
        return original(state, *arguments)

    original = module._step
    monkeypatch.setattr(module, "_step", until_the_third)
    for _ in range(4):
        try:
            compress(recipe(teacher), tmp_path / "run", say=lambda _: None)
            break
        except Interrupted:
            continue
    assert len(steps) > 12 and weights(tmp_path / "run") == weights(finished)


def test_micro_batches_count_every_picture_once(teacher):
    """A second forward pass of a micro-batch leaves the running statistics alone."""
    pixels = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = tinyclip.load(teacher).tokenizer([f"{number} red rings" for number in range(8)])

    def loss(image_BE, text_BE, _scale):
        return (image_BE * text_BE).sum(), {}

    model, expected = tinyclip.load(teacher).train(), tinyclip.load(teacher).train()
    backward(model, Inputs(pixels, tokens), None, loss, phase(1, micro_batch_size=4))
    for rows in (slice(0, 4), slice(4, 8)):
        expected(pixels[rows], tokens[rows])
    for (name, a), b in zip(model.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters() if n != "logit_scale"
    )
    assert unit(model.encode_text(["a ring"])).shape == (1, 16)
