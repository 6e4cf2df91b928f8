"""Every term and scale of the objective acts as its setting says, and says what it is without it. CPU only."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tinyclip.distill.affinity import affinity_loss_reference
from tinyclip.distill.objective import Objective, projection, total_loss
from tinyclip.model import MAX_SCALE

B, E, T = 5, 4, 6
LEARNED, TEACHERS_OWN = 14.0, 80.0


def unit(columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(B, columns, generator=generator, dtype=torch.float64), dim=-1)


STUDENT = unit(E, 1), unit(E, 2)
TEACHER = unit(T, 3), unit(T, 4)
SAME_SIZE_TEACHER = unit(E, 3), unit(E, 4)


def loss_of(objective: Objective, *, teacher=SAME_SIZE_TEACHER, learned_scale=None, project=None):
    scale = torch.tensor(LEARNED, dtype=torch.float64) if learned_scale is None else learned_scale
    targets = () if teacher is None else [(*teacher, TEACHERS_OWN)]
    return total_loss(objective, *STUDENT, scale, targets, project)


def only(**terms) -> Objective:
    return Objective(**({"affinity": 0} | terms))


def test_the_default_is_the_published_recipe_affinity_alone_with_both_scales_50():
    loss, terms = loss_of(Objective())
    torch.testing.assert_close(loss, affinity_loss_reference(*STUDENT, 50.0, *SAME_SIZE_TEACHER, 50.0))
    assert terms.keys() == {"affinity_kl"}


@pytest.mark.parametrize("name", ["affinity", "contrastive", "feature"])
def test_a_terms_weight_multiplies_it(name):
    once, _ = loss_of(only(**{name: 1}))
    thrice, terms = loss_of(only(**{name: 3}))
    assert once > 0
    torch.testing.assert_close(thrice, 3 * once)
    assert terms.keys() == {{"affinity": "affinity_kl"}.get(name, name)}


def test_the_loss_is_the_weighted_sum_and_the_terms_are_reported_unweighted():
    loss, terms = loss_of(Objective(affinity=0.5, contrastive=2, feature=3))
    alone = {name: loss_of(only(**{name: 1}))[0] for name in ("affinity", "contrastive", "feature")}
    torch.testing.assert_close(loss, 0.5 * alone["affinity"] + 2 * alone["contrastive"] + 3 * alone["feature"])
    torch.testing.assert_close(terms["contrastive"], alone["contrastive"])
    torch.testing.assert_close(terms["feature"], alone["feature"])
    assert not any(term.requires_grad for term in terms.values())


def test_affinity_kl_is_zero_where_the_student_agrees_and_above_it_elsewhere():
    _, terms = loss_of(Objective(), teacher=STUDENT)
    assert abs(terms["affinity_kl"]) < 1e-12
    _, terms = loss_of(Objective())
    assert terms["affinity_kl"] > 0.1


@pytest.mark.parametrize(
    "settings, student_scale, teacher_scale",
    [
        ({"student_scale": 20, "teacher_scale": 30}, 20, 30),
        ({"student_scale": "learned"}, LEARNED, 50),
        ({"teacher_scale": "teacher"}, 50, TEACHERS_OWN),
        ({"student_scale": "learned", "teacher_scale": "teacher"}, LEARNED, TEACHERS_OWN),
    ],
)
def test_scales_are_numbers_or_the_models_own(settings, student_scale, teacher_scale):
    loss, _ = loss_of(Objective(**settings))
    torch.testing.assert_close(
        loss, affinity_loss_reference(*STUDENT, student_scale, *SAME_SIZE_TEACHER, teacher_scale)
    )


@pytest.mark.parametrize(
    "settings, learns",
    [
        ({}, False),
        ({"student_scale": "learned"}, True),
        ({"teacher_scale": "teacher"}, False),
        ({"affinity": 0, "feature": 1}, False),
        ({"contrastive": 0.1}, True),  # the contrastive term has the learned scale, always
    ],
)
def test_the_students_scale_learns_where_a_term_uses_it(settings, learns):
    scale = torch.tensor(LEARNED, dtype=torch.float64, requires_grad=True)
    image, text = (embedding.clone().requires_grad_() for embedding in STUDENT)
    loss, _ = total_loss(Objective(**settings), image, text, scale, [(*SAME_SIZE_TEACHER, TEACHERS_OWN)], None)
    loss.backward()
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in (image, text))
    assert (scale.grad is not None and bool(scale.grad != 0)) == learns


@pytest.mark.parametrize(
    "feature, student_dim, teacher_dim, wanted",
    [(1, E, T, True), (1, E, E, False), (0, E, T, False), (0.5, T, E, True)],
)
def test_embeddings_are_projected_only_for_the_feature_term_and_only_where_sizes_differ(
    feature, student_dim, teacher_dim, wanted
):
    project = projection(Objective(feature=feature), student_dim, teacher_dim)
    assert (project is not None) == wanted
    if project is not None:
        assert (project.in_features, project.out_features, project.bias) == (student_dim, teacher_dim, None)


def test_the_projection_is_used_and_trained():
    project = projection(only(feature=1), E, T)
    assert project is not None
    project.double()
    loss, _ = loss_of(only(feature=1), teacher=TEACHER, project=project)
    cosines = [
        torch.nn.functional.cosine_similarity(project(mine), theirs, dim=-1).mean()
        for mine, theirs in zip(STUDENT, TEACHER, strict=True)
    ]
    torch.testing.assert_close(loss, 1 - (cosines[0] + cosines[1]) / 2)
    loss.backward()
    assert project.weight.grad is not None and project.weight.grad.abs().max() > 0


def test_affinity_needs_no_projection_between_sizes():
    loss, _ = loss_of(Objective(), teacher=TEACHER)
    torch.testing.assert_close(loss, affinity_loss_reference(*STUDENT, 50.0, *TEACHER, 50.0))


def test_the_feature_term_is_0_for_the_teachers_embeddings_and_2_for_their_opposites():
    assert loss_of(only(feature=1), teacher=STUDENT)[0].item() == pytest.approx(0, abs=1e-12)
    opposite = tuple(-embedding for embedding in STUDENT)
    assert loss_of(only(feature=1), teacher=opposite)[0].item() == pytest.approx(2, abs=1e-12)


def test_contrast_alone_needs_no_teacher():
    assert not only(contrastive=1).needs_teacher
    assert Objective().needs_teacher and only(feature=1).needs_teacher
    loss, terms = loss_of(only(contrastive=2), teacher=None)
    torch.testing.assert_close(loss, 2 * terms["contrastive"])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"affinity": 0}, "at least one of affinity, contrastive, feature must be above 0"),
        ({"affinity": -1}, "affinity\n.*greater than or equal to 0"),
        ({"student_scale": 0}, "student_scale: expected a number above 0, got 0"),
        ({"teacher_scale": -50}, "teacher_scale: expected a number above 0, got -50"),
        ({"student_scale": "teacher"}, "student_scale"),
        ({"teacher_scale": "learned"}, "teacher_scale"),
        ({"contrast": 1}, "contrast\n.*not permitted"),
        ({"affinity": float("nan")}, "affinity"),
        ({"student_scale": float("inf")}, "student_scale"),
        ({"teacher_scale": float("nan")}, "teacher_scale"),
    ],
)
def test_an_objective_that_means_nothing_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        Objective(**settings)


class ScalarReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU."""

    reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"feature": 0.5},
        {"student_scale": "learned"},
        {"contrastive": 1.0},
        {"contrastive": 1.0, "student_scale": "learned", "teacher_scale": "teacher"},
        {"student_scale": 100.0},
        {"teacher_scale": "teacher"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_step_waits_for_the_device(settings, dtype):
    image, text = (x.to(dtype).clone().requires_grad_() for x in STUDENT)
    scale = torch.tensor(LEARNED, dtype=dtype, requires_grad=True)
    teacher = [x.to(dtype) for x in SAME_SIZE_TEACHER]
    with ScalarReads() as mode:
        loss, _ = total_loss(Objective(**settings), image, text, scale, [(*teacher, MAX_SCALE)], None)
        loss.backward()
    assert mode.reads == 0
