"""The table has CLIP_benchmark's words and CLIP's suites, and a suite's mean is over the data sets that are there."""

import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
import torchvision
import yaml

from tests.data.test_sources import write_tar
from tests.evaluate.conftest import Pictures
from tests.evaluate.test_datasets import (
    NAMES,
    NUMBERS,
    flags,
    numbered,
    png,
    save_rows,
    write_folders,
    write_webdataset,
)
from tests.test_model import random_model, small
from tinyclip import cli
from tinyclip.evaluate import suites
from tinyclip.evaluate.datasets import Absent, LabelledSet, labelled_set
from tinyclip.evaluate.suites import (
    CLIP27,
    DATASETS,
    SUITES,
    imagenet_wnids,
    open_dataset,
    open_suite,
    run_suite,
    texts_of,
)
from tinyclip.evaluate.zeroshot import answer_scores, answers, average_precision, roc_auc
from tinyclip.formats import checkpoint
from tinyclip.model import CLIP
from tinyclip.preprocess import Preprocess
from tinyclip.tokenizer import Tokenizer

WORDS = {  # data set: class names and templates in CLIP_benchmark 1.6.2; None: the data brings them
    "food101": (None, 1),
    "cifar10": (None, 18),
    "cifar100": (None, 18),
    "birdsnap": (None, None),
    "sun397": (None, 2),
    "cars": (None, 8),
    "fgvc_aircraft": (None, 2),
    "voc2007_multilabel": (None, 1),
    "dtd": (None, 8),
    "pets": (37, 1),
    "caltech101": (102, 34),
    "flowers": (102, 1),
    "mnist": (10, 1),
    "fer2013": (7, 6),
    "stl10": (None, 2),
    "eurosat": (10, 3),
    "resisc45": (None, 4),
    "gtsrb": (43, 3),
    "kitti_closest_vehicle_distance": (4, 1),
    "country211": (211, 5),
    "pcam": (2, 2),
    "ucf101": (None, None),
    "kinetics700": (None, None),
    "clevr_count_all": (8, 1),
    "hateful_memes": (None, None),
    "renderedsst2": (None, 1),
    "imagenet1k": (1000, 80),
    "imagenetv2": (1000, 80),
    "imagenet_sketch": (1000, 80),
    "imagenet-a": (1000, 80),
    "imagenet-r": (1000, 80),
    "objectnet": (None, 80),
    "voc2007": (None, 1),
    "clevr_closest_object_distance": (6, 1),
    "diabetic_retinopathy": (5, 1),
    "dmlab": (6, 1),
    "dsprites_label_orientation": (None, 4),
    "dsprites_label_x_position": (None, 1),
    "smallnorb_label_azimuth": (None, 4),
    "smallnorb_label_elevation": (None, 4),
    "svhn": (10, 6),
}


def test_every_data_set_has_its_number_of_class_names_and_templates():
    pytest.importorskip("clip_benchmark")
    texts = {name: texts_of(name) for name in DATASETS}
    assert {name: tuple(part and len(part) for part in own) for name, own in texts.items()} == WORDS
    for name, (names, templates) in texts.items():
        assert templates is None or all("{}" in template and "{c}" not in template for template in templates), name
        if names is not None and name not in ("imagenet-a", "imagenet-r"):  # these have 200 of the 1,000
            assert len(names) == DATASETS[name].classes


def test_the_suites_are_clips_and_clip_benchmarks():
    assert len(SUITES["clip27"]) == 27 and len(SUITES["clip23"]) == 23
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    theirs = [name for name in builder.dataset_collection["vtab+"]]
    assert sorted(DATASETS[name].benchmark for name in SUITES["vtab+"]) == sorted(theirs)
    robust = [DATASETS[name].benchmark for name in SUITES["imagenet"] if name != "imagenet1k"]
    assert sorted(robust) == sorted(builder.dataset_collection["imagenet_robustness"])
    assert imagenet_wnids() == tuple(builder.all_imagenet_wordnet_ids)
    assert [name for name in CLIP27 if DATASETS[name].metric == "mean_per_class"] == [
        "fgvc_aircraft",
        "pets",
        "caltech101",
        "flowers",
    ]


def test_torchvisions_classes_take_the_tables_arguments():
    for row in DATASETS.values():
        if row.torchvision is not None:
            kind, *arguments = row.torchvision
            for own in arguments:
                inspect.signature(getattr(torchvision.datasets, kind)).bind("root", **own)


def test_the_page_has_the_table():
    page = (Path(__file__).parents[2] / "docs" / "suites.md").read_text()
    for name, row in DATASETS.items():
        assert f"| `{name}` | {row.classes or '-'} | {row.split} | {row.metric} |" in page


# Finding known data sets.


def write_fer2013(root, folder="fer2013"):
    names = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]
    return write_folders(root / folder / "test", names, numbers=(0, 1, 2))


@pytest.mark.parametrize("folder", ["mnist", "wds_mnist"])
def test_a_known_data_set_is_found_under_its_names(tmp_path, folder):
    write_webdataset(tmp_path / folder, numbered(), names=(), templates=())
    found = open_dataset("mnist", tmp_path)
    assert isinstance(found, LabelledSet) and found.labels == (2, 1, 0, 1)
    assert found.class_names[2] == ("2",) and found.templates == ('a photo of the number: "{}".',)
    assert isinstance(open_dataset("mnist", tmp_path, split="train"), Absent)


def test_folders_that_clip_benchmark_numbers_in_order(tmp_path):
    write_fer2013(tmp_path)
    found = open_dataset("fer2013", tmp_path)
    assert isinstance(found, LabelledSet) and found.class_names[2] == ("fearful",) and set(found.labels) == {0, 1, 2}


def test_folders_named_after_wordnet_ids_have_their_classes(tmp_path):
    some = imagenet_wnids()[::5]
    for number, wnid in enumerate(some):
        (tmp_path / "imagenet-a" / wnid).mkdir(parents=True)
        (tmp_path / "imagenet-a" / wnid / "0.png").write_bytes(png(number % 3))
    found = open_dataset("imagenet-a", tmp_path)
    assert isinstance(found, LabelledSet) and found.labels == tuple(range(200))
    assert found.class_names[:2] == (("tench",), ("electric ray",)) and len(found.templates) == 80
    (tmp_path / "imagenet-a" / some[7] / "0.png").unlink()
    (tmp_path / "imagenet-a" / some[7]).rmdir()
    with pytest.raises(ValueError, match="imagenet-a: expected 200 classes, got 199"):
        open_dataset("imagenet-a", tmp_path)


def test_folders_of_imagenet_v2_are_class_numbers(tmp_path):
    write_folders(tmp_path / "imagenetv2" / "ImageNetV2-matched-frequency", ["0", "10", "999"])
    found = open_dataset("imagenetv2", tmp_path)
    assert isinstance(found, LabelledSet) and found.labels == (0, 10, 10, 999)


def test_objectnet_is_the_classes_that_imagenet_has(tmp_path):
    root = tmp_path / "objectnet"
    labels = {f"folder{number:03}": f"Thing {number}" for number in range(120)}
    for number, folder in enumerate(labels):
        (root / "objectnet-1.0" / "images" / folder).mkdir(parents=True)
        (root / "objectnet-1.0" / "images" / folder / "0.png").write_bytes(png(number % 3))
    (root / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    known = {f"Thing {number}": "an ImageNet name" for number in range(7, 120)}
    (root / "objectnet_to_imagenet_1k.json").write_text(json.dumps(known))
    found = open_dataset("objectnet", tmp_path)
    assert isinstance(found, LabelledSet) and found.labels == tuple(range(113))
    assert found.class_names[0] == ("thing 7",) and found.source.key(0) == "folder007/0.png"


def test_another_number_of_classes_is_refused(tmp_path):
    write_webdataset(tmp_path / "cifar10", numbered(), templates=())
    with pytest.raises(ValueError, match="cifar10: expected 10 classes, got 3"):
        open_dataset("cifar10", tmp_path)


def test_words_that_nobody_has_must_lie_beside_the_data(tmp_path):
    write_folders(tmp_path / "birdsnap" / "test", [*NAMES])
    with pytest.raises(ValueError, match="birdsnap: CLIP_benchmark has no class names and templates for it"):
        open_dataset("birdsnap", tmp_path)


def test_without_clip_benchmark_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "find_spec", lambda name: None)
    monkeypatch.setattr(suites, "_package_json", suites._package_json.__wrapped__)
    write_fer2013(tmp_path)
    with pytest.raises(ValueError, match=r"need CLIP_benchmark: pip install 'tinyclip\[suites\]'"):
        open_dataset("fer2013", tmp_path)


# A suite.


@pytest.fixture
def root(tmp_path):
    """A data root with three own data sets of plain colours, and a suite file of four and one known one."""
    write_webdataset(tmp_path / "shards", numbered(), templates=("{c}",))
    write_webdataset(tmp_path / "shards", numbered([*NUMBERS] * 3), split="train", templates=("{c}",))
    write_folders(tmp_path / "folders", ["red", "light green", "blue"], numbers=(0, 0, 0, 1, 2))
    write_folders(tmp_path / "swapped", ["n2", "n0", "n1"])  # red, light green, blue
    (tmp_path / "names.json").write_text(json.dumps({"n2": ["blue"], "n0": "light green", "n1": "red"}))
    entries = [
        {"name": "shards", "data": "shards"},
        {"name": "folders", "data": "folders", "templates": ["{}", "a {}"], "metric": "mean_per_class"},
        {"name": "swapped", "data": "swapped", "class_names": "names.json", "templates": ["{}"]},
        {"name": "gone", "data": "nowhere"},
        "mnist",
    ]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"datasets": entries}))
    return tmp_path


@pytest.fixture
def colours(model):
    model.scale = 10.0
    return model


def test_the_mean_is_over_what_is_there_and_says_what_is_not(root, colours):
    lines = []
    result = run_suite(colours, str(root / "suite.yaml"), root, say=lines.append)
    assert [*result["datasets"]] == ["shards", "folders", "swapped"] and len(lines) == 3
    assert result["absent"]["gone"] == f"no file or folder {root}/nowhere"
    assert result["absent"]["mnist"] == f"no folder mnist or wds_mnist in {root}"
    top1 = {name: scores["top1"] for name, scores in result["datasets"].items()}
    assert top1 == {"shards": 1.0, "folders": 1.0, "swapped": 0.5}  # light green twice; red and blue change places
    assert result["mean"] | {"low": 0, "high": 0} == {
        "value": pytest.approx(2.5 / 3), "low": 0, "high": 0, "of": 3, "n_datasets": 5
    }  # fmt: skip
    assert result["in_mean"] == {"shards": "top1", "folders": "mean_per_class", "swapped": "top1"}
    assert {"top1_low", "top1_high", "mean_per_class", "n", "classes"} <= result["datasets"]["folders"].keys()
    assert "top5" not in result["datasets"]["folders"]


def test_a_suite_file_alone_starts_at_its_own_folder(root):
    own = {"datasets": [{"name": "folders", "data": "folders"}]}
    (root / "own.yaml").write_text(yaml.safe_dump(own))
    present, absent = open_suite(str(root / "own.yaml"), None)
    assert [labelled.name for labelled in present] == ["folders"] and absent == []


@pytest.mark.parametrize("data", ["0.tar::1.tar?label=name", "{0..1}.parquet?label=name"])
def test_patterns_of_a_suite_file_start_at_the_root(tmp_path, data):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for number, name in enumerate(NAMES[:2]):
        files = {"1.png": png(number), "1.json": json.dumps({"name": name}).encode()}
        write_tar(tmp_path / f"{number}.tar", files)
        parquet.write_table(pa.table({"image": [files["1.png"]], "name": [name]}), tmp_path / f"{number}.parquet")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"datasets": [{"name": "own", "data": data}]}))
    [labelled], absent = open_suite(str(tmp_path / "own.yaml"), None)
    assert (len(labelled), absent) == (2, [])


def write_model(directory):
    """A random model with a vocabulary of its own, whose embeddings are far apart."""
    tokenizer = Tokenizer.train([*NAMES, "a picture of"], vocab_size=530, context_length=9)
    config = small(vocab_size=tokenizer.vocab_size, context_length=9)
    drawn = random_model(config)
    model = CLIP(config, preprocess=Preprocess(size=config.image.image_size), tokenizer=tokenizer)
    model.load_state_dict({name: 4 * value if value.ndim > 1 else value for name, value in drawn.state_dict().items()})
    checkpoint.save(model, directory)
    return directory


def test_probes_are_of_the_sets_with_training_images(root):
    model = checkpoint.load(write_model(root / "model"))
    result = run_suite(model, str(root / "suite.yaml"), root, probe=True, say=lambda line: None)
    scores = result["datasets"]["shards"]
    assert scores["penultimate_probe_top1"] == 1.0 and scores["penultimate_probe_train_n"] == 12
    assert result["probe_absent"].keys() == {"folders", "swapped"}
    assert "names no `train` images" in result["probe_absent"]["folders"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("datasets: [cifar11]", "unknown data set cifar11 \\(known: food101, cifar10"),
        ("datasets: [mnist, mnist]", "mnist is named twice"),
        ("datasets: []", "datasets"),
        ("datasets: [{name: mnist, metric: accuracy}]", "datasets.0: mnist has no data"),
        ("datasets: [{name: a, data: folders, metrics: b}]", "datasets.0.metrics: Extra"),
        ("datasets: [{name: a, data: folders, metric: accurate}]", "datasets.0.metric: Input should be"),
        ("datasets: [{name: a, data: folders, templates: [no place]}]", "a: expected templates like"),
        ("datasets: [{name: a, data: folders, class_names: two.txt}]", "a: expected 3 class names, as many as labels"),
        ("datasets: [{name: a, data: folders, class_names: gone.txt}]", "gone.txt"),
        ("datasets: [{name: a, data: gone}]", "none of its 1 data sets is there; a: no file or folder"),
        ("datasets: {", "not YAML"),
    ],
)
def test_a_wrong_suite_file_is_one_line(root, colours, content, message):
    (root / "two.txt").write_text("red\nblue\n")
    (root / "wrong.yaml").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        run_suite(colours, str(root / "wrong.yaml"), root)
    assert "\n" not in str(error.value)


def test_what_datasets_saved_can_be_ones_own_or_known(root, colours):
    save_rows(root / "saved", ["blue", "red", "light green"])
    (root / "own.yaml").write_text("datasets: [{name: own, data: saved, templates: ['{}']}]")
    assert run_suite(colours, str(root / "own.yaml"), root)["datasets"]["own"]["top1"] == 1.0
    train, _ = open_suite(str(root / "own.yaml"), root, split="train")
    assert [len(labelled) for labelled in train] == [1]
    save_rows(root / "mnist", ["blue", "red", "light green"])
    with pytest.raises(ValueError, match="mnist: 3 of 3 classes of the data are not among its 10 class names"):
        open_dataset("mnist", root)


def test_unknown_suites_roots_and_models_without_text_are_one_line(root, colours):
    with pytest.raises(ValueError, match="suite clip28: .*suites: clip27, clip23, imagenet, vtab\\+"):
        run_suite(colours, "clip28", root)
    with pytest.raises(ValueError, match="expected the folder that data sets lie in: --data-root"):
        run_suite(colours, "clip27", None)
    with pytest.raises(FileNotFoundError, match="no such folder of data sets"):
        run_suite(colours, "clip27", root / "gone")
    colours.encode_text = None
    with pytest.raises(ValueError, match="expected a model with a text tower"):
        run_suite(colours, str(root / "suite.yaml"), root)


def test_the_command_prints_and_writes_a_suite(root, monkeypatch, capsys):
    arguments = ["evaluate", write_model(root / "model"), "--suite", root / "suite.yaml", "--data-root", root]
    monkeypatch.setattr(sys, "argv", ["tinyclip", *map(str, arguments), "--out", str(root / "evaluation.json")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr().out
    assert stop.value.code in (None, 0) and "mean of 3 of 5 data sets" in shown and "absent: gone: no file" in shown
    written = json.loads((root / "evaluation.json").read_text())
    monkeypatch.setattr(sys, "argv", ["tinyclip", *map(str, arguments), "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    assert json.loads(capsys.readouterr().out) == written and written["mean"]["of"] == 3


# What a model answers.


def test_answers_are_kept_image_by_image(colours):
    source = Pictures(("red", [], ("red",)), (None, [], ("red",)), ("green", [], ("blue",)), ("blue", [], ("blue",)))
    said = answers(colours, labelled_set("toy", source, ["{}"]), batch_size=2)
    assert said.item_I.tolist() == [0, 2, 3] and said.label_I.tolist() == [1, 0, 0]
    assert said.predicted_I.tolist() == [1, 0, 0]  # green is as similar to red as to blue: the first is predicted
    assert said.rank_I.tolist() == [1, 1, 1]
    similarity = said.image_IE.double() @ said.class_CE.double().T
    torch.testing.assert_close(said.confidence_I, (10 * similarity).softmax(-1).amax(-1))
    scores = answer_scores(said)
    assert (scores["top1"], scores["mean_per_class"], scores["n"], scores["classes"]) == (1, 1, 3, 2)


def test_areas_under_the_curve_by_eye():
    classes, label = torch.eye(2), torch.tensor([0, 0, 1, 1])
    image = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5], [0.1, 0.9]])
    assert roc_auc(image, classes, label) == 3.5 / 4  # of four pairs three are in order and one is a tie


def test_average_precision_by_eye():
    similarity = torch.tensor([0.9, 0.8, 0.7, 0.6])
    exact, eleven = average_precision(similarity, torch.tensor([True, False, True, False]))
    assert exact == pytest.approx((1 + 2 / 3) / 2)
    assert eleven == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)  # recalls 0 to 0.5, then 0.6 to 1
    tied = average_precision(torch.zeros(2), torch.tensor([True, False]))
    assert tied == (0.5, 0.5)


def test_an_image_of_several_classes(tmp_path, colours):
    samples = [{"png": png(number), "npy": flags(*row)} for number, row in enumerate(((1, 0, 0), (0, 1, 1), (0, 0, 1)))]
    (write_webdataset(tmp_path / "many", samples, templates=("{c}",), shards=1) / "dataset_type.txt").write_text(
        "multilabel"
    )
    entry = {"name": "many", "data": "many", "metric": "map_11point"}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"datasets": [entry]}))
    scores = run_suite(colours, str(tmp_path / "s.yaml"), tmp_path)["datasets"]["many"]
    ends = {f"{name}_{end}" for name in ("map", "map_11point") for end in ("low", "high")}
    assert scores.keys() == {"map", "map_11point", "n", "classes"} | ends
    assert 0.5 < scores["map"] <= 1 and scores["map_low"] <= scores["map"] <= scores["map_high"]
    entry["metric"] = "accuracy"
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"datasets": [entry]}))
    with pytest.raises(ValueError, match="many: accuracy is not for images of several classes; only map_11point"):
        run_suite(colours, str(tmp_path / "s.yaml"), tmp_path)


def test_images_of_several_classes_are_not_probed(tmp_path, colours):
    samples = [{"png": png(number), "npy": flags(1, number == 1, number == 2)} for number in range(3)]
    write_webdataset(tmp_path / "many", samples, templates=("{c}",))
    write_webdataset(tmp_path / "many", samples, templates=("{c}",), split="train")
    (tmp_path / "many" / "dataset_type.txt").write_text("multilabel")
    entry = {"name": "many", "data": "many", "metric": "map_11point"}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"datasets": [entry]}))
    assert (
        "several classes" in run_suite(colours, str(tmp_path / "s.yaml"), tmp_path, probe=True)["probe_absent"]["many"]
    )


@pytest.mark.parametrize(
    "metric, message",
    [("map_11point", "map_11point wants images with several classes"), ("mean_top1_top5", "at least 5 classes")],
)
def test_a_metric_that_the_data_does_not_allow_is_refused(colours, metric, message):
    source = Pictures(("red", [], ("red",)), ("blue", [], ("blue",)))
    with pytest.raises(ValueError, match=message):
        answer_scores(answers(colours, labelled_set("toy", source)), metric)


def test_words_of_a_suite_file_come_before_those_beside_the_data(tmp_path):
    write_webdataset(tmp_path / "own", numbered())
    entry = {"name": "own", "data": "own", "templates": ["a drawing of {}"]}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"datasets": [entry, {"name": "too", "data": "own"}]}))
    (ours, theirs), _ = open_suite(str(tmp_path / "suite.yaml"), None)
    assert ours.templates == ("a drawing of {}",) and theirs.templates == ("a {} picture.",)


def test_what_torchvision_does_not_split_is_not_trained_on(tmp_path):
    """Its SUN397 is the same images either way."""
    for name in ("a/abbey", "z/zoo"):
        (tmp_path / "SUN397" / name).mkdir(parents=True)
        (tmp_path / "SUN397" / name / "sun_x.jpg").write_bytes(b"")
    (tmp_path / "SUN397" / "ClassName.txt").write_text("/a/abbey\n/z/zoo\n")
    row = suites.DATASETS["sun397"]
    assert suites._from_torchvision("sun397", row, tmp_path, "train") is None
    assert len(suites._from_torchvision("sun397", row, tmp_path, "test")) == 2


def test_the_means_interval_by_eye():
    """Half widths of 3 and 4 points are 5 of the sum, and 2.5 of the mean."""
    a = {"top1": 0.4, "top1_low": 0.37, "top1_high": 0.43}
    b = {"map": 0.6, "map_low": 0.56, "map_high": 0.64}
    mean = suites._mean({"a": a, "b": b}, {"a": "top1", "b": "map"})
    assert mean == pytest.approx({"value": 0.5, "low": 0.475, "high": 0.525})
    assert suites._mean({"a": a, "b": {"map": 0.6}}, {"a": "top1", "b": "map"}) == {"value": pytest.approx(0.5)}
