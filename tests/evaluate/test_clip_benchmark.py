"""CLIP_benchmark's own command runs our models, and its numbers are ours: on features and on pictures."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score
from torch.nn import functional as F

from tests.evaluate.test_datasets import write_webdataset
from tests.evaluate.test_suites import write_model
from tinyclip.evaluate import clip_benchmark as adapter
from tinyclip.evaluate.datasets import open_webdataset
from tinyclip.evaluate.zeroshot import Answers, answer_scores, answers, average_precision, class_ranks, roc_auc
from tinyclip.formats import checkpoint

theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
accuracy = theirs.accuracy


def features(images=500, classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    class_CE = F.normalize(torch.randn(classes, 16, generator=generator), dim=-1)
    label_I = torch.randint(classes, (images,), generator=generator)
    image_IE = F.normalize(class_CE[label_I] + torch.randn(images, 16, generator=generator), dim=-1)
    return image_IE, class_CE, label_I


@pytest.mark.parametrize("classes, twice", [(3, ()), (7, ()), (7, (1, 4))])  # two classes of one name
def test_scores_of_random_features_equal_theirs(classes, twice):
    image_IE, class_CE, label_I = features(classes=classes)
    if twice:
        class_CE[twice[1]] = class_CE[twice[0]]
    logits = 100 * image_IE @ class_CE.T
    if twice:
        logits[:, twice[1]] = logits[:, twice[0]]  # a product may differ in the last bit
    rank_I = class_ranks(image_IE, class_CE, label_I)
    said = Answers(torch.arange(500), image_IE, class_CE, label_I, logits.argmax(-1), rank_I, torch.ones(500))
    ours = answer_scores(said)
    assert ours["top1"] == (logits.argmax(-1) == label_I).double().mean()
    if not twice:  # which of equal logits is the k-th, torch.topk leaves open
        ks = (1, 5) if classes >= 5 else (1,)
        assert [ours[f"top{k}"] for k in ks] == adapter.accuracy(logits, label_I, ks)
    assert ours["mean_per_class"] == pytest.approx(balanced_accuracy_score(label_I, logits.argmax(-1)), abs=1e-12)


def test_the_replaced_function_is_theirs_where_numpy_allows_it():
    image_IE, class_CE, label_I = features()
    logits = image_IE @ class_CE.T
    try:
        expected = accuracy(logits, label_I, (1, 5))
    except TypeError as error:
        pytest.skip(f"CLIP_benchmark's accuracy does not run with this numpy: {error}")
    assert adapter.accuracy(logits, label_I, (1, 5)) == expected


def test_average_precision_equals_theirs_and_scikit_learns():
    image_IE, class_CE, _ = features()
    is_class_IC = torch.rand(500, 7, generator=torch.Generator().manual_seed(1)) < 0.2
    similarity = image_IE @ class_CE.T
    ours = [average_precision(similarity[:, c], is_class_IC[:, c])[0] for c in range(7)]
    expected = theirs.average_precision_per_class(similarity, is_class_IC.float())
    assert ours == pytest.approx(expected.tolist(), abs=1e-5)  # theirs in fp32
    assert ours[0] == pytest.approx(average_precision_score(is_class_IC[:, 0], similarity[:, 0]), abs=1e-12)


def test_the_area_under_the_curve_equals_scikit_learns():
    image_IE, class_CE, label_I = features(classes=2)
    margin = image_IE.double() @ (class_CE[1] - class_CE[0]).double()
    assert roc_auc(image_IE, class_CE, label_I) == pytest.approx(roc_auc_score(label_I, margin), abs=1e-12)


def noise(seed: int) -> bytes:
    """A picture of 12 x 20 random colours, made larger: not square, and of another size than the model's."""
    pixels = np.random.default_rng(seed).integers(256, size=(12, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((40, 24)).save(file, "PNG")
    return file.getvalue()


def test_their_command_gives_our_numbers(tmp_path):
    names = ("red", "green", "blue", "light red", "a picture", "of light")
    samples = [{"png": noise(seed), "cls": str(seed % 6).encode()} for seed in range(120)]
    write_webdataset(tmp_path / "toy", samples, names=names, templates=("a picture of {c}", "{c}"))
    write_model(tmp_path / "model")
    command = [sys.executable, "-m", "tinyclip.evaluate.clip_benchmark", "eval", "--model_type", "tinyclip"]
    command += ["--model", "model", "--no_amp", "--num_workers", "0", "--quiet", "--output", "theirs.json"]
    command += ["--dataset", "wds/toy", "--dataset_root", "toy"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "theirs.json").read_text())
    ours = answer_scores(
        answers(checkpoint.load(tmp_path / "model"), open_webdataset(tmp_path / "toy", "toy"), batch_size=32)
    )
    assert written["pretrained"] == "tinyclip" and written["task"] == "zeroshot_classification"
    assert (written["metrics"]["acc1"], written["metrics"]["acc5"]) == (ours["top1"], ours["top5"])
    assert 0 < ours["top1"] < ours["top5"] < 1
    assert written["metrics"]["mean_per_class_recall"] == pytest.approx(ours["mean_per_class"], abs=1e-12)


def test_a_model_that_is_not_there_is_a_users_mistake(monkeypatch):
    arguments = ["eval", "--model_type", "tinyclip", "--model", "gone", "--dataset", "dummy", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", *arguments])
    with pytest.raises((ValueError, FileNotFoundError), match="gone: expected a model directory"):
        adapter.main()
    assert sys.argv[-2:] == ["--pretrained", "tinyclip"]
