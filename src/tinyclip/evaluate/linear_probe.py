"""Linear probe: how well do a model's frozen image features tell classes apart, by a logistic regression?

OpenAI's protocol (Radford et al. 2021, appendix A.3; in code in the README of openai/CLIP): the features before the
projection into the embedding space, not normalised; logistic regression by L-BFGS, at most 1,000 iterations; the
strength of the L2 penalty chosen on a validation split among 96 steps from 1e-6 to 1e6, by a search that starts with 7
values and halves the interval around the best one down to 8 steps per decade; then a fit on training and validation
images together. The paper sweeps lambda; here it is scikit-learn's C = 1 / lambda, which has the same steps.

The objective is scikit-learn's: 1/2 ||weight||^2 + C * sum of cross-entropies, the bias free. `fit_torch` minimises the
same one in chunks, on any device, and is tested against scikit-learn.

Shape legend: N training images, M test images, D features, C classes (as a suffix; the variable C is scikit-learn's),
P penalised rows, R rows in a chunk.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyclip.data.loader import LeftOut
from tinyclip.data.sources import Source
from tinyclip.evaluate.confidence import interval
from tinyclip.evaluate.embed import Model, check_finite, embed_images, texts_of

Layer = Literal["penultimate", "projected"]
Solver = Literal["auto", "sklearn", "torch"]

MAX_ITERATIONS = 1000
TOLERANCE = 1e-4  # largest element of the gradient of the objective / (C * N): scikit-learn's default
STEPS_PER_DECADE = 8
LAST_STEP = 12 * STEPS_PER_DECADE  # 1e-6 is step 0, 1e6 the last
MISSING = "the linear probe needs scikit-learn: pip install 'tinyclip[probe]'"
VALIDATION_SHARE = 0.2  # of each class, where no validation split is given
MAX_VALIDATION_SHOTS = 4  # Zhou et al., "Learning to Prompt for Vision-Language Models" (2022), for few shots
SKLEARN_MAX_ROWS = 50_000  # "auto" takes torch above, and on a GPU
LOGITS_PER_CHUNK = 2**24  # 134 MB in fp64


@dataclass(frozen=True)
class Labelled:
    """Image features and their classes, which are any integers."""

    feature_ND: Tensor
    label_N: Tensor

    def __post_init__(self) -> None:
        if len(self.feature_ND) != len(self.label_N):
            raise ValueError(f"expected a label for each of {len(self.feature_ND)} images, got {len(self.label_N)}")
        check_finite(self.feature_ND)

    def __len__(self) -> int:
        return len(self.label_N)

    def rows(self, index: Tensor) -> Labelled:
        index = index.to(self.label_N.device)
        return Labelled(self.feature_ND[index], self.label_N[index])

    def joined(self, other: Labelled) -> Labelled:
        return Labelled(
            torch.cat([self.feature_ND, other.feature_ND]),
            torch.cat([self.label_N, other.label_N]),
        )


@dataclass(frozen=True)
class Classifier:
    """Row c of the weight, fp64, is for `class_C[c]`."""

    weight_CD: Tensor
    bias_C: Tensor
    class_C: Tensor

    def predict(self, feature_MD: Tensor) -> Tensor:
        """The class of each row [M]."""
        parts = feature_MD.split(max(1, LOGITS_PER_CHUNK // len(self.class_C)))
        best = [_logits(part_RD.double(), self.weight_CD, self.bias_C).argmax(-1) for part_RD in parts]
        return self.class_C[torch.cat(best)]


# Fitting.


def fit(train: Labelled, C: float, solver: Solver = "auto") -> Classifier:
    """Minimise 1/2 ||weight||^2 + C * sum of cross-entropies, from zero.

    "auto" is scikit-learn for up to 50,000 images on the CPU, and torch else. Raises ValueError for fewer than two
    classes.
    """
    if len(train.label_N.unique()) < 2:
        raise ValueError(f"linear probe: expected at least 2 classes, got {len(train.label_N.unique())}")
    if solver == "auto":
        on_cpu = train.feature_ND.device.type == "cpu"
        solver = "sklearn" if on_cpu and len(train) <= SKLEARN_MAX_ROWS else "torch"
    return (fit_sklearn if solver == "sklearn" else fit_torch)(train, C)


def fit_sklearn(train: Labelled, C: float, *, tolerance: float = TOLERANCE) -> Classifier:
    """By scikit-learn, on the CPU in fp64. Stopping at 1,000 iterations is the protocol, and no warning."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ValueError(MISSING) from None
    model = LogisticRegression(C=C, max_iter=MAX_ITERATIONS, tol=tolerance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train.feature_ND.cpu().double().numpy(), train.label_N.cpu().numpy())
    class_C, device = torch.from_numpy(model.classes_), train.feature_ND.device
    spread_CP = _spread(len(class_C))
    weight_CD, bias_C = spread_CP @ torch.from_numpy(model.coef_), spread_CP @ torch.from_numpy(model.intercept_)
    return Classifier(weight_CD.to(device), bias_C.to(device), class_C.to(device))


def fit_torch(
    train: Labelled, C: float, *, tolerance: float = TOLERANCE, dtype: torch.dtype = torch.float64
) -> Classifier:
    """The objective and its gradient by torch in chunks, on the features' device; the steps by scipy's L-BFGS.

    scikit-learn calls the same optimizer with the same limits, so both take the same path and stop at the same place.
    fp32 is for GPUs that are slow in fp64.
    """
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise ValueError(MISSING) from None
    class_C, target_N = train.label_N.unique(return_inverse=True)
    spread_CP = _spread(len(class_C)).to(train.feature_ND.device, dtype)
    shape = spread_CP.shape[1], train.feature_ND.shape[1] + 1  # the bias is the last column

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        rows = torch.from_numpy(flat).view(shape).to(spread_CP)
        loss, gradient = _objective(rows, spread_CP, train.feature_ND, target_N, 1 / (C * len(train)))
        return loss.item(), gradient.double().cpu().numpy().ravel()

    limits = {"maxiter": MAX_ITERATIONS, "maxls": 50, "gtol": tolerance, "ftol": 64 * torch.finfo(torch.float64).eps}
    with _exact_products() if dtype == torch.float32 else nullcontext():
        flat = minimize(objective, np.zeros(math.prod(shape)), method="L-BFGS-B", jac=True, options=limits).x
    rows = spread_CP.double() @ torch.from_numpy(flat).view(shape).to(spread_CP.device)
    return Classifier(rows[:, :-1], rows[:, -1], class_C)


def _objective(
    rows: Tensor, spread_CP: Tensor, feature_ND: Tensor, target_N: Tensor, penalty: float
) -> tuple[Tensor, Tensor]:
    """penalty / 2 * ||weight||^2 + mean cross-entropy, and its gradient, of P rows [P, D + 1]."""
    weight_CD, bias_C = (spread_CP @ rows).split([rows.shape[1] - 1, 1], dim=1)
    loss, gradient = rows.new_zeros(()), rows.new_zeros(len(spread_CP), rows.shape[1])
    num_rows = max(1, LOGITS_PER_CHUNK // len(spread_CP))
    for part_RD, target_R in zip(feature_ND.split(num_rows), target_N.split(num_rows), strict=True):
        part_RD = part_RD.to(rows.dtype)
        log_p_RC = _logits(part_RD, weight_CD, bias_C[:, 0]).log_softmax(-1)
        loss += F.nll_loss(log_p_RC, target_R, reduction="sum")
        error_RC = log_p_RC.exp() - F.one_hot(target_R, len(spread_CP))
        gradient[:, :-1] += error_RC.T @ part_RD
        gradient[:, -1] += error_RC.sum(0)
    gradient = spread_CP.T @ gradient / len(feature_ND)
    gradient[:, :-1] += penalty * rows[:, :-1]
    return loss / len(feature_ND) + penalty / 2 * rows[:, :-1].square().sum(), gradient


def _spread(num_classes: int) -> Tensor:
    """[C, P]: what makes C rows of the P that are penalised. Of two classes scikit-learn fits the difference alone."""
    return torch.eye(num_classes).double() if num_classes > 2 else torch.tensor([[-0.5], [0.5]]).double()


def _logits(feature_RD: Tensor, weight_CD: Tensor, bias_C: Tensor) -> Tensor:
    return torch.addmm(bias_C, feature_RD, weight_CD.T)


@contextmanager
def _exact_products() -> Iterator[None]:
    """fp32 products in fp32, whatever the global setting: in TF32 or bf16 the line search fails."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# Choosing C.


def best_C(accuracy: Callable[[float], float]) -> float:
    """The C of 10^(-6 + step / 8), step = 0 to 96, that the search finds; of equal ones the smallest.

    It looks at every 16th step, then at 8, 4, 2 and 1 beside the best so far: 15 fits.
    """

    @cache
    def at(step: int) -> float:
        return accuracy(_C(step))

    width = 2 * STEPS_PER_DECADE
    peak = max(range(0, LAST_STEP + 1, width), key=at)
    while width > 1:
        width //= 2
        peak = max((step for step in (peak - width, peak, peak + width) if 0 <= step <= LAST_STEP), key=at)
    return _C(peak)


def _C(step: int) -> float:
    return 10 ** (step / STEPS_PER_DECADE - 6)


def swept_C(train: Labelled, validation: Labelled, solver: Solver = "auto") -> float:
    """The C whose fit on `train` is most often right on `validation`."""

    def accuracy(C: float) -> float:
        return (fit(train, C, solver).predict(validation.feature_ND) == validation.label_N).double().mean().item()

    return best_C(accuracy)


def split(label_N: Tensor, count: Callable[[int], tuple[int, int]], seed: int) -> tuple[Tensor, Tensor]:
    """Two disjoint sets of rows, drawn class by class: `count` says how many of a class's n go into each."""
    generator = torch.Generator().manual_seed(seed)
    first, second = [], []
    for number in label_N.unique().tolist():
        own = (label_N == number).nonzero()[:, 0].cpu()
        own = own[torch.randperm(len(own), generator=generator)]
        num_first, num_second = count(len(own))
        first.append(own[:num_first])
        second.append(own[num_first : num_first + num_second])
    return torch.cat(first), torch.cat(second)


# Scores.


def linear_probe(
    train_ND: Tensor,
    train_label_N: Tensor,
    test_MD: Tensor,
    test_label_M: Tensor,
    *,
    validation: tuple[Tensor, Tensor] | None = None,
    solver: Solver = "auto",
    seed: int = 0,
    name: str = "probe",
) -> dict[str, float]:
    """Accuracies on the test features in [0, 1], `NAME_top1` and `NAME_mean_per_class`, with intervals; and NAME_C,
    NAME_n, NAME_train_n and NAME_classes.

    C is chosen on `validation`, features and labels, which are then trained on as well; without them, on a fifth of
    each class of the training set. Labels are integers. Raises ValueError for fewer than two classes, and for test or
    validation images of a class that is not trained on.
    """
    train, test = Labelled(train_ND, train_label_N), Labelled(test_MD, test_label_M)
    _check_classes(train, {"test": test_label_M} | ({} if validation is None else {"validation": validation[1]}))
    if validation is None:
        fitted, held_out = (train.rows(rows) for rows in split(train.label_N, _hold_out, seed))
        C, everything = swept_C(fitted, held_out, solver), train
    else:
        held_out = Labelled(*validation)
        C, everything = swept_C(train, held_out, solver), train.joined(held_out)
    right_M = fit(everything, C, solver).predict(test.feature_ND) == test.label_N
    return (
        interval(right_M).scores(f"{name}_top1")
        | interval(right_M, test.label_N).scores(f"{name}_mean_per_class")
        | {
            f"{name}_C": C,
            f"{name}_n": len(test),
            f"{name}_train_n": len(everything),
            f"{name}_classes": len(train.label_N.unique()),
        }
    )


def few_shot(
    train_ND: Tensor,
    train_label_N: Tensor,
    test_MD: Tensor,
    test_label_M: Tensor,
    *,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (0, 1, 2),
    solver: Solver = "auto",
    name: str = "probe",
) -> dict[str, float]:
    """`NAME_Kshot_top1`, the mean over seeds, with its interval over test images; its standard deviation over seeds,
    `NAME_Kshot_top1_std`; NAME_Kshot_seeds and NAME_n.

    A seed draws K training images of each class, and up to 4 others on which C is chosen, which are not trained on.
    Raises ValueError for a class with too few images.
    """
    train, test = Labelled(train_ND, train_label_N), Labelled(test_MD, test_label_M)
    _check_classes(train, {"test": test_label_M})
    if not seeds or min(shots, default=0) < 1:
        raise ValueError(f"few-shot probe: expected shots of at least 1 and seeds, got {[*shots]} and {[*seeds]}")
    scores: dict[str, float] = {}
    for k in shots:
        right = torch.stack([_few_shot(train, test, k, seed, solver) for seed in seeds]).double()
        scores |= interval(right.mean(0)).scores(f"{name}_{k}shot_top1")
        if len(seeds) > 1:
            scores[f"{name}_{k}shot_top1_std"] = statistics.stdev(right.mean(1).tolist())
        scores[f"{name}_{k}shot_seeds"] = len(seeds)
    return scores | {f"{name}_n": len(test)}


def _few_shot(train: Labelled, test: Labelled, k: int, seed: int, solver: Solver) -> Tensor:
    """Whether each test image [M] is classified rightly."""
    wanted = k, min(k, MAX_VALIDATION_SHOTS)
    fewest = int(train.label_N.unique(return_counts=True)[1].min())
    if fewest < sum(wanted):
        raise ValueError(
            f"{k}-shot probe: expected {wanted[0]} + {wanted[1]} images of each class to train on and to choose C on, "
            f"got a class with {fewest}"
        )
    few, validation = (train.rows(rows) for rows in split(train.label_N, lambda _: wanted, seed))
    return fit(few, swept_C(few, validation, solver), solver).predict(test.feature_ND) == test.label_N


def _hold_out(n: int) -> tuple[int, int]:
    """Of a class with n images, how many to train on and to choose C on: at least one of each where n > 1."""
    held_out = min(n - 1, max(1, round(VALIDATION_SHARE * n)))
    return n - held_out, held_out


def _check_classes(train: Labelled, others: Mapping[str, Tensor]) -> None:
    known = set(train.label_N.tolist())
    for what, label_M in others.items():
        unknown = sorted(set(label_M.tolist()) - known)
        if unknown or not len(label_M):
            got = f"{len(unknown)} other classes (the first is {unknown[0]})" if unknown else "none"
            raise ValueError(f"linear probe: expected {what} images of the {len(known)} classes trained on, got {got}")
    if len(known) == len(train):
        raise ValueError("linear probe: expected at least 2 training images of some class, got one of each")


# A model's features.


def features(
    model: Model,
    source: Source,
    *,
    layer: Layer = "penultimate",
    batch_size: int = 64,
    workers: int = 0,
    left_out: LeftOut | None = None,
    name: str | None = None,
) -> tuple[list[tuple[str, ...]], Tensor]:
    """Labels, and features [N, D] on the CPU in fp32, of the images that have a label and can be read.

    The others are counted in `left_out`, the set by `name`.

    "penultimate": what goes into the image tower's last linear layer. A ViT: the class token after the last norm; a
    ResNet: the output of attention pooling. "projected": the embedding. Neither is normalised. Raises ValueError for
    the penultimate layer of a model that is not ours.
    """
    labels = texts_of(source, source.label, "labels", left_out, name)
    reading = {"batch_size": batch_size, "workers": workers, "left_out": left_out, "name": name}
    with _encoder(model, layer) as encode:
        return embed_images(model, source, labels, encode=lambda pixels: encode(pixels).float(), **reading)


@contextmanager
def _encoder(model: Model, layer: Layer) -> Iterator[Callable[[Tensor], Tensor]]:
    encode = partial(model.encode_image, normalize=False)
    if layer == "projected":
        yield encode
        return
    projection = getattr(getattr(getattr(model, "clip", model), "image", None), "projection", None)
    if layer != "penultimate" or not isinstance(projection, nn.Module):
        raise ValueError(f"linear probe: this model has no layer {layer!r}; take 'projected'")
    seen: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    def before_projection(pixels: Tensor) -> Tensor:
        encode(pixels)
        return seen.pop()

    try:
        yield before_projection
    finally:
        handle.remove()


def probe(
    model: Model,
    train_source: Source,
    test_source: Source,
    *,
    validation_source: Source | None = None,
    layer: Layer = "penultimate",
    shots: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    solver: Solver = "auto",
    batch_size: int = 64,
    workers: int = 0,
    left_out: LeftOut | None = None,
) -> dict[str, float]:
    """`linear_probe` of a model's features, or with `shots` `few_shot`; scores are named LAYER_probe_...

    Classes are told apart by their label, name and synonyms. Features are held on the model's device. What is left out
    is counted in `left_out`, of a training or validation set as NAME (train) or (validation). Raises ValueError for
    sources without labels or images, and as `features`, `linear_probe` and `few_shot` do.
    """
    numbers: dict[tuple[str, ...], int] = {}

    reading: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "left_out": left_out}

    def labelled(source: Source, part: str = "") -> tuple[Tensor, Tensor]:
        names, feature_ND = features(model, source, layer=layer, name=source.name + part, **reading)
        label_N = torch.tensor([numbers.setdefault(own, len(numbers)) for own in names])
        return feature_ND.to(model.device), label_N.to(model.device)

    sets, name = (*labelled(train_source, " (train)"), *labelled(test_source)), f"{layer}_probe"
    if shots is not None:
        if validation_source is not None:
            raise ValueError("few-shot probe: takes its validation images from the training source, and no other")
        return few_shot(*sets, shots=shots, seeds=seeds, solver=solver, name=name)
    validation = None if validation_source is None else labelled(validation_source, " (validation)")
    return linear_probe(*sets, validation=validation, solver=solver, name=name)
