"""Plant one wrong line at a time in a copy of the package, and see that the tests catch it.

    python -m tests.mutants                      (make mutants)
    python -m tests.mutants --only "betas"       those whose description holds the text

Each of MUTANTS is a mistake that would cost users quality or correctness without a word. It is planted in a copy of
`src` and `tests`, and only the tests named beside it are run. None of them needs ../shared, a GPU or a network, so a
fresh checkout catches all. What no test catches has survived, and the command ends with 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
WORKERS = 2
PATIENCE_S = 300
LIBRARIES = ("torch", "torch._dynamo", "open_clip", "pydantic", "tokenizers", "webdataset", "yaml")  # slow to import
Process = multiprocessing.get_context("fork").Process
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


class Mutant(NamedTuple):
    means: str
    file: str  # below src/tinyclip
    old: str  # stands there once
    new: str
    tests: tuple[str, ...]  # below tests

    @property
    def path(self) -> Path:
        return Path("src/tinyclip") / self.file


def _of(file: str, *rows: tuple[str, str, str, str]) -> Iterator[Mutant]:
    """Rows are: means, old, new, the tests as FILE::TEST, separated by spaces."""
    for means, old, new, tests in rows:
        yield Mutant(means, file, old, new, tuple(tests.split()))


STEP = "distill/test_train_reference.py::"
LOOP = f"{STEP}test_every_step_is_that_of_the_plain_loop"
PLAIN, GATES, TERMS = f"{LOOP}[published]", f"{LOOP}[gates]", f"{LOOP}[terms]"
PHASES = f"{STEP}test_every_phase_of_a_run_is_the_loop_with_a_seed_of_its_own"
EYES = "distill/test_objective.py::test_"
CUT_OFF = "distill/test_train.py::test_masks_that_were_cut_off_continue_to_the_same_bits"
EXACT = "distill/test_affinity.py::test_chunked_equals_the_definition"
CUT = "shrink/test_keep.py::test_the_cut_model_equals_the_gated_model"
NORM = "shrink/test_keep.py::test_a_gated_layernorm_is_that_of_the_open_channels_"
TOWERS = "test_model.py::test_towers_equal_open_clip"
RANKS = "test_distributed.py::test_value_and_every_gradient_equal_one_process"
BIT = "test_damage.py::test_damage_is_named_and_nothing_changes_or_what_is_said_to_be_made_again_is[a_bit-finished]"
CROPS = "data/test_loader.py::test_"

MUTANTS: tuple[Mutant, ...] = (
    *_of(
        "distill/train.py",
        ("Adam's betas swapped", "betas=(config.beta1, config.beta2)", "betas=(config.beta2, config.beta1)", PLAIN),
        ("the default eps of Adam, not the setting's", ", eps=config.eps, fused", ", fused", PLAIN),
        ("biases, norms and scales decay", '"weight_decay": 0.0}', '"weight_decay": config.weight_decay}', PLAIN),
        ("the gradient is not clipped", "config.clip_norm or math.inf", "math.inf", PLAIN),
        ("the learning rate stays at its highest", 'group["lr"] = lr', 'group["lr"] = config.lr', PLAIN),
        ("the warm-up is one step late", "self.lr * (step + 1) / self.warmup_steps",
         "self.lr * step / self.warmup_steps", PLAIN),
        ("the cosine does not end at 0", "max(1, num_steps - self.warmup_steps)", "max(1, num_steps)", PLAIN),
        ("an epoch is one step", "round((self.epochs or 0) * steps_per_epoch)", "round(self.epochs or 0)", PHASES),
        ("gates learn at the student's rate", "lr = masking.rule.log_alpha_lr", "lr = config.lr", GATES),
        ("gates have no limit", "masking.gates.clamp_()", "pass", GATES),
        ("the multipliers do not rise", "masking.constraint.ascend(sparsity, step)", "pass", GATES),
        ("the size costs nothing", "masking.constraint.penalty(sparsity, step).backward()", "pass", GATES),
        ("gates are drawn once for all steps", "seed * 1_000_003 + step)", "seed * 1_000_003)", GATES),
        ("products are never in bf16", 'enabled=config.precision == "bf16")', "enabled=False)",
         f"{STEP}test_products_are_in_bf16_and_the_loss_and_the_weights_in_fp32"),
        ("activations are never recomputed", "student.set_recompute(config.recompute)",
         "student.set_recompute(False)", f"{STEP}test_with_recomputation_every_block_is_computed_twice"),
        ("the average leans on the first weights",
         "(1 - self.decay) / (1 - self.decay**steps)", "1 - self.decay", f"{LOOP}[average]"),
        ("the student ends without its average", "    if state.average is not None:\n        state.average.swap()\n",
         "", f"{LOOP}[average]"),
        ("evaluations see the weights of the step", "with state.averaged():", "with nullcontext():",
         f"{LOOP}[average]"),
        ("a learned scale runs away", "self.student.clip_scale_()", "pass",
         f"{STEP}test_a_scale_above_its_limit_is_put_back_and_learns"),
        ("a step without a finite loss is made", 'torch.isfinite(loss + values["grad_norm"])',
         "torch.ones((), dtype=torch.bool)",
         f"{STEP}test_steps_without_a_finite_loss_change_no_weight_and_no_moment"),
        ("a step without a finite gradient is made", 'torch.isfinite(loss + values["grad_norm"])',
         "torch.isfinite(loss)", "distill/test_train.py::test_a_step_whose_gradient_alone_is_not_finite_is_skipped"),
        ("a micro-batch too short", "slice(start, start + size)", "slice(start, start + size - 1)",
         f"{LOOP}[micro-batches]"),
        ("the scale's gradient counts once for each micro-batch", "if last and scale.grad is not None:",
         "if scale.grad is not None:", f"{LOOP}[micro-batches]"),
        ("gates get no gradient from micro-batches",
         "torch.autograd.backward([z for z, _ in pairs], [grad for _, grad in pairs])", "pass",
         f"{LOOP}[gates-in-micro-batches]"),
        ("all images lose the same patches", 'Random(f"{seed}/{step}/{visit.index}")', 'Random(f"{seed}/{step}")',
         f"{LOOP}[patches]"),
        ("patches are dropped to the end", "num_steps * (1 - config.whole_images)", "num_steps", f"{LOOP}[patches]"),
        ("the teacher's images stand for its texts", "(image_BT, text_BT, teacher.scale)",
         "(text_BT, image_BT, teacher.scale)", PLAIN),
        ("a run goes on without its moments", 'parts: dict[str, Any] = {"student": self.student, "optimizer": '
         "self.optimizer}", 'parts: dict[str, Any] = {"student": self.student}', CUT_OFF),
        ("a run goes on without the moments of gates", 'parts["gate_optimizer"] = self.gate_optimizer', "pass",
         CUT_OFF),
        ("a run goes on without its multipliers", ', "constraint": self.masking.constraint}', "}", CUT_OFF),
        ("processes keep their own gradients of gates and projection", "state.share_gradients()", "pass",
         "test_parallel_runs.py::test_two_processes_train_the_model_of_one"),
    ),
    *_of(
        "compress.py",
        ("one seed for all stages", "recipe.seed * 1000 + 2 * index", "recipe.seed * 1000", PHASES),
        ("one seed for both phases of a stage", "seed=seed + 1,", "seed=seed,", PHASES),
        ("gates start where the default says", "HardConcreteGates(student.config, rule.initial_log_alpha)",
         "HardConcreteGates(student.config)", PHASES),
        ("shares are of the stage's own start", "reference_params=setup.reference_params,",
         "reference_params=student.config.prunable_params,", PHASES),
        ("a stage keeps a share of what the last one left", "int(rule.keep_params * setup.reference_params)",
         "int(rule.keep_params * student.config.prunable_params)",
         "test_compress.py::test_every_stage_and_the_run_load_as_models_within_their_budget"),
        ("gates are cut off without being multiplied in", "take(fold(student, gates.values(keep)), keep)",
         "take(student, keep)", PHASES),
    ),
    *_of("start.py", ("the teacher learns with its student", "copy.deepcopy(parent.clip)", "parent.clip", PHASES)),
    *_of(
        "distill/objective.py",
        ("the teacher's scale is the student's", "else float(objective.teacher_scale)",
         "else float(objective.student_scale)", f"{EYES}scales_are_numbers_or_the_models_own"),
        ("contrast has no weight of its own", "objective.contrastive * contrastive", "contrastive",
         f"{EYES}a_terms_weight_multiplies_it"),
        ("the affinities of teachers are added", "torch.stack(affinities).mean()", "torch.stack(affinities).sum()",
         f"{LOOP}[two-teachers]"),
        ("texts are drawn to the teacher's images", "feature_loss(text_BT, teacher[1], world=world)",
         "feature_loss(text_BT, teacher[0], world=world)", TERMS),
        ("the scale of contrast does not learn", "return self.contrastive > 0 or (", "return (", f"{LOOP}[captions]"),
    ),
    *_of(
        "distill/affinity.py",
        ("the loss counts one direction", "world.sum_(rows) + columns)", "2 * world.sum_(rows))", EXACT),
        ("student and teacher swapped",
         "kind(pairs, 0, scales.affinity), kind(pairs, 1, scales.teacher, means=True)",
         "kind(pairs, 1, scales.affinity), kind(pairs, 0, scales.teacher, means=True)", EXACT),
        ("a pair of its own pulls half as much", "sub_(2 * self.contrastive)", "sub_(self.contrastive)",
         "distill/test_affinity.py::test_both_losses_at_once_equal_their_definitions"),
        ("similarities are in bf16", "with torch.autocast(image.device.type, enabled=False):",
         "with torch.autocast(image.device.type, enabled=torch.is_autocast_enabled(image.device.type)):",
         "distill/test_affinity.py::test_scores_stay_fp32_under_autocast"),
        ("gradients shrink with the number of processes", "per_row = world.size / (2", "per_row = 1 / (2", RANKS),
    ),
    *_of(
        "distill/softmax_sums.py",
        ("the gradient comes from one direction", 'e_rk.mul_(torch.add(a_r[:, None], b_k, out=self._tile("weighted", '
         "tile)))", "e_rk.mul_(2 * a_r[:, None])", EXACT),
    ),
    *_of(
        "distill/teacher.py",
        ("a teacher's scale is its logarithm", "clip.scale.item()", "clip.logit_scale.item()",
         "distill/test_teacher.py::test_a_tinyclip_model_teaches"),
        ("a teacher of open_clip has the logarithm of its scale", "model.logit_scale.exp().item()",
         "model.logit_scale.item()",
         "distill/test_teacher.py::test_embeddings_equal_open_clip"),
    ),
    *_of(
        "distill/store.py",
        ("every view is the first", '["image"][row, visit.view]', '["image"][row, 0]',
         "distill/test_store.py::test_stored_embeddings_are_those_of_the_crops_and_captions_that_a_batch_holds"),
        ("stored vectors are not of length 1", "return unit(image_BT.float()), unit(text_BT.float())",
         "return image_BT.float(), text_BT.float()",
         "distill/test_store.py::test_stored_embeddings_are_those_of_the_crops_and_captions_that_a_batch_holds"),
        ("a stored teacher has a scale of its own", "teacher.name, teacher.embed_dim, teacher.scale",
         "teacher.name, teacher.embed_dim, 50.0",
         "distill/test_store.py::test_a_student_of_the_store_is_the_student_of_the_live_teacher"),
        ("every caption is the first", "int(first[row]) + visit.caption", "int(first[row])",
         "distill/test_store.py::test_stored_embeddings_are_those_of_the_crops_and_captions_that_a_batch_holds"),
    ),
    *_of(
        "distill/checkpoints.py",
        ("a damaged checkpoint is continued", "if not path.is_file() or _digits(path) != digits:", "if False:",
         "distill/test_checkpoints.py::test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_used"),
    ),
    *_of(
        "formats/files.py",
        ("a record's sha256 is not read", "hashlib.sha256(parts[1]).hexdigest().encode() != parts[2]", "False", BIT),
        ("digests of a directory are not compared", "if sha256_of(path) != sha256:", "if False:", BIT),
    ),
    *_of(
        "distill/store.py",
        ("a store's tensors are not compared", 'self._noted["sha256"] != _sha256(self.tensors)', "False", BIT),
        ("any vector of a store is taken", "<= NORM_TOLERANCE", "<= math.inf",
         "distill/test_store.py::test_a_damaged_part_is_told_and_the_teacher_asked_again[zeros]"),
    ),
    *_of(
        "formats/checkpoint.py",
        ("a damaged model is loaded", "    check_digests(directory)\n", "", BIT),
    ),
    *_of(
        "run.py",
        ("two calls work on one run", "lock.acquire(timeout=0)", "pass",
         "test_compress.py::test_two_calls_do_not_work_on_one_run"),
    ),
    *_of(
        "distributed.py",
        ("gradients are added up over processes", "group=self.group)\n        return tensor\n\n    def max_",
         "group=self.group)\n        return tensor.mul_(self.size)\n\n    def max_", RANKS),
        ("means over processes are sums", "for tensor in same])) / self.size", "for tensor in same]))", RANKS),
        ("processes read the same pairs", "slice(bounds[world.rank], bounds[world.rank + 1])",
         "slice(bounds[0], bounds[1])", "test_distributed.py::test_shares_of_a_batch_cover_it_once"),
    ),
    *_of(
        "shrink/masks.py",
        ("a survivor is multiplied with another value", "VALUE_SHARPNESS = 0.8", "VALUE_SHARPNESS = 1.0",
         "shrink/test_masks.py::test_gates_by_eye"),
        ("gates are likelier open than they say", "math.log(-LOW / HIGH)", "math.log(HIGH / -LOW)", GATES),
        ("gates are not stretched", "(concrete * (HIGH - LOW) + LOW).clamp(0, 1)", "concrete", GATES),
        ("gates start half closed", "default=4.0, description", "default=0.0, description",
         "shrink/test_masks.py::test_gates_by_eye"),
        ("output biases are not counted", "2 * len(config.blocks) * width  # output", "0 * width  # output",
         "shrink/test_masks.py::test_all_gates_open_are_expected_to_keep_every_parameter"),
        ("3x3 convolutions count as 1x1", "second * (9 * first + 2)", "second * (first + 2)",
         "test_model_resnet.py::test_expected_parameters_of_decided_gates_are_those_of_the_cut_model"),
        ("the target starts at 0", "return self.start + (self.end - self.start) * share", "return self.end * share",
         GATES),
        ("the quadratic multiplier starts at 0", "torch.tensor(10.0)", "torch.tensor(0.0)", GATES),
        ("the least open survive", "log_alpha.topk(count)", "(-log_alpha).topk(count)",
         "shrink/test_masks.py::test_gates_that_met_the_constraint_are_cut_as_expected"),
        ("the budget is never spent whole", "if cost <= left:", "if cost < left:",
         "shrink/test_masks.py::test_what_is_left_of_a_budget_goes_to_the_most_open_that_fit_exactly"),
        ("what is left goes to the least open", "in sorted(closed, reverse=True):", "in sorted(closed):",
         "shrink/test_masks.py::test_what_is_left_of_a_budget_goes_to_the_most_open_that_fit_exactly"),
        ("heads are cut off without their gates", "width_D[:, None] * gate_H.repeat_interleave("
         "block.attention.head_dim)", "width_D[:, None]", CUT),
    ),
    *_of(
        "shrink/keep.py",
        ("the first neurons' biases are kept", 'block["ffn.up.bias"][neurons]', 'block["ffn.up.bias"][: len(neurons)]',
         CUT),
        ("the embedding is cut in images alone", 'if ".projection." in name', 'if name == "image.projection.weight"',
         "shrink/test_keep.py::test_a_cut_embedding_is_a_slice_of_the_whole_one_before_it_is_a_unit_vector"),
    ),
    *_of(
        "shrink/inherit.py",
        ("even layers are rounded down", "(2 * i * (teacher_layers - 1) + layers - 1)",
         "(2 * i * (teacher_layers - 1))", "shrink/test_inherit.py::test_even_layers_by_eye"),
        ("neurons are judged by what they read", "ffn.up.weight.norm(dim=1) * ffn.down.weight.norm(dim=0)",
         "ffn.up.weight.norm(dim=1)", "shrink/test_inherit.py::test_largest_keeps_the_largest_by_eye"),
        ("channels are judged by blocks that go", "partial(channel_scores, tower, sizes.layers)",
         "partial(channel_scores, tower, range(len(tower.blocks)))",
         "shrink/test_inherit.py::test_channels_are_judged_by_the_layers_that_stay"),
    ),
    *_of(
        "shrink/inherit_resnet.py",
        ("the smallest are kept", "score().topk(count)", "score().topk(count, largest=False)",
         "shrink/test_inherit.py::test_largest_keeps_the_largest_by_eye"),
    ),
    *_of(
        "model.py",
        ("embeddings are not of length 1",
         "F.normalize(x_BE.to(torch.promote_types(x_BE.dtype, torch.float32)), dim=-1)",
         "x_BE.to(torch.promote_types(x_BE.dtype, torch.float32))",
         "distill/test_train.py::test_bf16_keeps_similarities_and_weights_in_fp32"),
        ("the scale is its logarithm", "self.logit_scale.exp().clamp(max=MAX_SCALE)", "self.logit_scale.clone()",
         "test_model.py::test_the_scale_is_at_most_100_and_comes_back_from_there"),
        ("a gated LayerNorm puts closed channels at the first", "torch.lerp(x.sum(-1, keepdim=True) / num_open, x",
         "torch.lerp(x[..., :1], x", CUT),
        ("a gated LayerNorm takes the variance of all channels", "open_D * stretch)", "open_D)", CUT),
        ("a gated LayerNorm takes its mean once", "x.detach().sum(-1, keepdim=True) / num_open, value=-1",
         "x.detach()[..., :1], value=0", f"{NORM}also_where_their_values_are_equal_or_nearly_so"),
        ("scores of images are not divided by sqrt(K)", "q_GQK * K**-0.5", "q_GQK", TOWERS),
        ("scores of texts are not divided by sqrt(K)", "alpha=K**-0.5", "alpha=1.0", TOWERS),
        ("texts see one token ahead", "-torch.inf).triu(1)", "-torch.inf).triu(2)", TOWERS),
        ("texts are read at their last place", "tokens_BL.argmax(-1), gates)",
         "torch.full_like(tokens_BL[:, 0], tokens_BL.shape[1] - 1), gates)", TOWERS),
        ("QuickGELU is a plain SiLU", "torch.sigmoid(1.702 * h_BLF)", "torch.sigmoid(h_BLF)", TOWERS),
        ("texts in chunks come back in another order", "to_device(order_B.argsort(), tokens_BL.device)",
         "to_device(order_B, tokens_BL.device)",
         "test_model.py::test_texts_in_chunks_of_similar_length_are_the_same_texts"),
        ("patches that are seen have the first places", "_rows(position, seen_Bn)", "position[:, : seen_Bn.shape[1]]",
         "test_model.py::test_a_vit_that_sees_all_patches_in_any_order_sees_the_picture"),
        ("the class token has no place", "(self.class_embedding + self.position[0])", "self.class_embedding", TOWERS),
        ("residual outputs do not shrink with depth", "(2 * len(tower.blocks) * D) ** -0.5", "D**-0.5",
         "test_model.py::test_initialisation_gives_every_parameter_its_published_size"),
    ),
    *_of(
        "model_resnet.py",
        ("attention pooling is not scaled", "heads(self.query(x_BLD[:, :1])) * self.head_dim**-0.5",
         "heads(self.query(x_BLD[:, :1]))",
         "test_model_resnet.py::test_it_computes_what_open_clips_does_and_has_its_gradient"),
        ("recomputation counts every batch twice", "(nullcontext(), frozen_statistics(block))",
         "(nullcontext(), nullcontext())",
         "test_model_resnet.py::test_recomputation_and_a_second_pass_change_neither_gradient_nor_statistics"),
    ),
    *_of(
        "preprocess.py",
        ("mean and standard deviation swapped", ".sub_(mean).div_(std)", ".sub_(std).div_(mean)",
         "test_preprocess.py::test_normalised_pixels_equal_open_clip"),
        ("pictures are shrunk without a filter", "mode=self.interpolation, antialias=True",
         "mode=self.interpolation, antialias=False", "test_preprocess.py::test_pixels_are_open_clip_s_within_a_level"),
        ("the top left corner is taken for the centre", "round((side - self.size) / 2)", "0 * side",
         "test_preprocess.py::test_pixels_are_open_clip_s_within_a_level"),
        ("a crop is mirrored along the diagonal", "to_pixels(image)[rows, columns]", "to_pixels(image)[columns, rows]",
         "test_preprocess.py::test_a_crop_shows_its_box"),
    ),
    *_of(
        "tokenizer.py",
        ("capitals are words of their own", '" ".join(text.split()).lower()', '" ".join(text.split())',
         "test_tokenizer.py::test_ids_equal_open_clip_on_odd_strings"),
    ),
    *_of(
        "data/decode.py",
        ("transparency is black", 'Image.new("RGBA", image.size, "white")', 'Image.new("RGBA", image.size, "black")',
         "test_preprocess.py::test_transparency_is_white"),
    ),
    *_of(
        "data/loader.py",
        ("always the first caption", "caption = draw(captions, random)", "caption = 0",
         f"{CROPS}every_caption_of_every_item_is_drawn_about_as_often"),
        ("crops are up to the whole picture", "random.uniform(*scale)", "random.uniform(scale[0], 1)",
         f"{CROPS}crops_have_the_asked_area_and_lie_inside"),
        ("crops touch the left side", "random.random() * (width - box_width), random",
         "0 * random.random() * (width - box_width), random", PLAIN),
        ("all crops have the picture's aspect", "random.uniform(*map(math.log, ASPECTS))", "0.0",
         f"{CROPS}aspects_of_a_square_picture_are_spread_around_one"),
        ("all epochs show the first view", "epoch % self.views", "0",
         f"{CROPS}views_are_functions_of_the_key_and_the_views_number"),
        ("the longest caption loses its end", "argmax(dim=1).max()) + 1]", "argmax(dim=1).max())]",
         f"{CROPS}pixels_and_tokens_belong_to_the_same_item"),
        ("a step of a continued run reads the first batches", "count(self.start_step)", "count(0)",
         f"{CROPS}workers_and_resuming_change_nothing"),
    ),
    *_of(
        "data/order.py",
        ("all epochs have one order", '_permutation(size, f"{seed}/{epoch}")', '_permutation(size, f"{seed}")',
         f"{CROPS}an_epoch_visits_every_item_once_in_its_own_order"),
        ("items of a window are in order", "return items[_permutation(", "return items\n        items[_permutation(",
         "data/test_order.py::test_items_stay_in_the_window_of_their_group"),
    ),
    *_of(
        "data/texts.py",
        ("captions are drawn without their weights", "range(len(captions)), captions.weights)[0]",
         "range(len(captions)))[0]",
         "data/test_texts.py::test_a_column_keeps_its_weight_whatever_the_number_of_its_texts"),
        ("a column of many captions weighs more", "[weight / len(own)] * len(own)", "[weight] * len(own)",
         "data/test_texts.py::test_a_column_keeps_its_weight_whatever_the_number_of_its_texts"),
    ),
    *_of(
        "data/filters.py",
        ("images that occur before stay", "seen.add(sha256)", "pass",
         "data/test_filters.py::test_what_does_not_pass_is_left_out_and_counted"),
        ("images are small by their longer side", "return min(image.size)", "return max(image.size)",
         "data/test_filters.py::test_what_does_not_pass_is_left_out_and_counted"),
    ),
    *_of(
        "data/mixture.py",
        ("a member shows its first items again", "block * BLOCK * self.shares_to", "0 * block * BLOCK * self.shares_to",
         "data/test_mixture.py::test_a_member_shows_all_its_items_once_before_it_shows_any_again"),
    ),
    *_of(
        "data/scenes.py",
        ("held-out names are trained on", "random.choice(SEEN), SEEN)", "random.choice(NAMES), NAMES)",
         "data/test_scenes.py::test_held_out_names_never_occur_in_train_and_always_in_heldout"),
    ),
    *_of(
        "evaluate/embed.py",
        ("ties count for the model", "(similarity(block) >= best_R1)", "(similarity(block) > best_R1)",
         "evaluate/test_retrieval.py::test_a_model_that_says_the_same_of_everything_scores_nothing"),
        ("images are taken for their neighbours", "torch.cat(embeddings)[rows]", "torch.cat(embeddings)[: len(rows)]",
         "evaluate/test_zeroshot.py::test_a_labelled_source_is_scored"),
        ("an image's own texts compete", " & (group_R1 != group)).sum(-1)", ").sum(-1)",
         "evaluate/test_retrieval.py::test_recall_by_eye"),
    ),
    *_of(
        "evaluate/retrieval.py",
        ("recall@k is that of k - 1", "rank <= k, image", "rank < k, image",
         "evaluate/test_retrieval.py::test_recall_by_eye"),
    ),
    *_of(
        "evaluate/zeroshot.py",
        ("a class of many words is nearer to all", "return F.normalize(sum_E, dim=-1)[row_C]", "return sum_E[row_C]",
         "evaluate/test_zeroshot.py::test_a_class_is_the_mean_over_synonyms_and_templates"),
        ("top 5 is top 4", "scores | (interval(rank_I <= 5)", "scores | (interval(rank_I < 5)",
         "evaluate/test_zeroshot.py::test_scores_of_answers_by_eye"),
        ("of equal classes the last wins", "device=label_R.device) < label_R", "device=label_R.device) > label_R",
         "evaluate/test_zeroshot.py::test_of_equally_similar_classes_the_first_wins_as_by_argmax"),
        ("words in capitals are other words", "tokenizer(list(texts)) if callable(tokenizer)", "None if tokenizer",
         "evaluate/test_zeroshot.py::test_classes_of_the_same_tokens_have_the_same_row"),
        ("only the first template counts", "for name in names for template in templates]",
         "for name in names for template in [templates[0]] * len(templates)]",
         "evaluate/test_zeroshot.py::test_a_class_is_the_mean_over_synonyms_and_templates"),
    ),
    *_of(
        "evaluate/linear_probe.py",
        ("C is swept over other decades", "10 ** (step / STEPS_PER_DECADE - 6)", "10 ** (step / STEPS_PER_DECADE - 5)",
         "evaluate/test_linear_probe.py::test_the_search_finds_a_single_peak_in_15_fits"),
        ("the last fit leaves the validation images out", "fit(everything, C, solver)", "fit(train, C, solver)",
         "evaluate/test_linear_probe.py::test_the_probe_is_the_protocol_written_out"),
        ("C is chosen among images that are fitted", "own[num_first : num_first + num_second]", "own[:num_second]",
         "evaluate/test_linear_probe.py::test_without_a_validation_split_a_fifth_of_each_class_is_held_out"),
        ("C is chosen on the images that it is fitted to", "C, everything = swept_C(train, held_out, solver)",
         "C, everything = swept_C(train, train, solver)",
         "evaluate/test_linear_probe.py::test_the_probe_is_the_protocol_written_out"),
    ),
    *_of(
        "evaluate/confidence.py",
        ("large classes weigh more", "mean = np.mean([group.mean() for group in groups])", "mean = value_N1.mean()",
         "evaluate/test_confidence.py::test_with_groups_it_is_the_mean_of_class_means_drawn_within_each_class"),
    ),
    *_of(
        "evaluate/compare.py",
        ("a loss is called a gain", "paired_difference(right.student, right.teacher, group_I)",
         "paired_difference(right.teacher, right.student, group_I)",
         "evaluate/test_compare.py::test_a_blind_student_loses_the_blue_pictures"),
    ),
    *_of(
        "evaluate/drift.py",
        ("CKA sees where embeddings lie", "return rows_NE - rows_NE.mean(0)", "return rows_NE",
         "evaluate/test_compare.py::test_cka_is_the_formula_on_gram_matrices"),
    ),
    *_of(
        "evaluate/cost.py",
        ("half of attention's products are not counted", "2 * L * L * HK", "L * L * HK",
         "evaluate/test_cost.py::test_equal_to_half_the_flops_that_torch_counts"),
    ),
    *_of(
        "formats/open_clip.py",
        ("QuickGELU is read as GELU", '"quick_gelu" if model.quick_gelu else "gelu"', '"gelu"',
         "formats/test_open_clip.py::test_the_activation_and_the_norms_are_read"),
    ),
    *_of(
        "formats/openai.py",
        ("OpenAI's models have GELU", 'activation="quick_gelu",', 'activation="gelu",',
         "formats/test_openai.py::test_an_archive_gives_the_features_of_the_model_that_was_saved"),
    ),
    *_of(
        "formats/huggingface.py",
        ("queries, keys and values in another order", 'for part in "qkv"]', 'for part in "kqv"]',
         "formats/test_huggingface.py::test_a_clip_model_of_transformers_gives_the_same_features_here"),
    ),
    *_of(
        "formats/checkpoint.py",
        ("a saved model forgets how it reads pictures", "if model.preprocess is not None:", "if False:",
         "formats/test_checkpoint.py::test_a_saved_model_comes_back"),
    ),
    *_of(
        "formats/uniform.py",
        ("queries are padded into keys", 'parts = 3 if "qkv" in name else 1', "parts = 1",
         "formats/test_export.py::test_padding_changes_the_shape_and_no_value"),
    ),
)  # fmt: skip


class Verdict(NamedTuple):
    mutant: Mutant
    killer: str | None  # the test
    seconds: float
    trouble: str | None = None  # why there is no verdict


def planted(mutant: Mutant, text: str) -> str:
    """The file's text with the mistake in it. Raises ValueError where the place is not there, or not the only one."""
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.path}: expected the text of {mutant.means!r} once, found it {count} times")
    return text.replace(mutant.old, mutant.new)


class Tree:
    """A copy of the package and its tests, in which one mutant at a time is planted."""

    def __init__(self, folder: Path):
        self.folder, self.said = folder, folder.with_suffix(".out")
        for part in ("src", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        shutil.copy(ROOT / "pyproject.toml", folder)

    def plant(self, mutant: Mutant) -> None:
        self._sound = (ROOT / mutant.path).read_text(encoding="utf-8")
        self._write(mutant.path, planted(mutant, self._sound))

    def restore(self, mutant: Mutant) -> None:
        self._write(mutant.path, self._sound)

    def start(self, tests: Sequence[str]) -> BaseProcess:
        """The tests in a child of this process, which has imported the libraries and nothing of the package."""
        self.said.write_text("")
        child = Process(target=self._test, args=(tests,))
        child.start()
        return child

    def _test(self, tests: Sequence[str]) -> None:
        os.setsid()  # so that what the tests start can be ended with them
        out = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(self.folder)
        source = str(self.folder / "src")
        os.environ["PYTHONPATH"] = source  # of processes that the tests start
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # pytest warns of plugins that were imported before it
        sys.path[:] = [source, *(path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "src")))]
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        import tinyclip

        assert Path(tinyclip.__file__).parent == Path(source, "tinyclip"), tinyclip.__file__
        options = ["-q", "-x", "--tb=short", "-rfE", "-p", "no:cacheprovider", f"--basetemp={self.folder / 'tmp'}"]
        sys.exit(int(pytest.main([*options, *(f"tests/{test}" for test in tests)])))

    def _write(self, path: Path, text: str) -> None:
        """And drop the compiled twin, which is told apart by size and whole seconds alone."""
        path = self.folder / path
        path.write_text(text, encoding="utf-8")
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()

    def verdict(self, mutant: Mutant, status: int | None, seconds: float) -> Verdict:
        said = self.said.read_text(encoding="utf-8", errors="replace")
        killer = FAILED.search(said)
        if status == 1 and killer:
            return Verdict(mutant, killer[1], seconds)
        if status == 0 and " passed" in said:
            return Verdict(mutant, None, seconds)
        trouble = f"no end after {PATIENCE_S} s" if status is None else said[-2000:] + f"status {status}"
        return Verdict(mutant, None, seconds, trouble)


class Running(NamedTuple):
    mutant: Mutant
    tree: Tree
    child: BaseProcess
    started: float


def judged(mutants: Sequence[Mutant], folder: Path) -> Iterator[Verdict]:
    """Verdicts as they come, WORKERS at a time."""
    waiting, trees = list(reversed(mutants)), [Tree(folder / str(number)) for number in range(WORKERS)]
    running: list[Running] = []
    try:
        while waiting or running:
            while waiting and trees:
                mutant, tree = waiting.pop(), trees.pop()
                tree.plant(mutant)
                running.append(Running(mutant, tree, tree.start(mutant.tests), time.perf_counter()))
            wait([one.child.sentinel for one in running], timeout=1)
            for one in list(running):
                seconds = time.perf_counter() - one.started
                if one.child.is_alive() and seconds < PATIENCE_S:
                    continue
                status = None if one.child.is_alive() else one.child.exitcode
                end(one.child)
                running.remove(one)
                one.tree.restore(one.mutant)
                trees.append(one.tree)
                yield one.tree.verdict(one.mutant, status, seconds)
    finally:
        for one in running:
            end(one.child)


def end(child: BaseProcess) -> None:
    """And what it started."""
    assert child.pid is not None, "started"
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()  # one that has no group of its own yet
    child.join()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", metavar="TEXT", help="mutants whose description holds it; again")
    only = parser.parse_args(arguments).only or [""]
    mutants = [mutant for mutant in MUTANTS if any(text in mutant.means for text in only)]
    if not mutants:
        parser.error(f"--only: no mutant is described by {' or '.join(only)}")
    started, verdicts = time.perf_counter(), []
    os.environ["OMP_NUM_THREADS"] = "1"
    for library in LIBRARIES:
        import_module(library)
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name).resolve()
        tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        sound = Tree(folder / "sound")
        child = sound.start(tests)
        try:
            child.join()
        finally:
            end(child)
        if child.exitcode != 0:
            print(f"the tests fail without a mutant:\n{sound.said.read_text()[-4000:]}")
            return 1
        print(f"{len(tests)} tests pass without a mutant ({time.perf_counter() - started:.0f} s)", flush=True)
        for verdict in judged(mutants, folder):
            verdicts.append(verdict)
            word = "no verdict" if verdict.trouble else "killed" if verdict.killer else "SURVIVED"
            by = f"  {verdict.killer}" if verdict.killer else ""
            print(f"{word:10}  {verdict.seconds:5.1f} s  {verdict.mutant.file}: {verdict.mutant.means}{by}", flush=True)
            if verdict.trouble:
                print(verdict.trouble)
    alive = [verdict.mutant for verdict in verdicts if verdict.killer is None]
    seconds = time.perf_counter() - started
    print(f"{len(verdicts)} mutants, {len(verdicts) - len(alive)} killed, in {seconds:.0f} s")
    for mutant in alive:
        print(f"survived: {mutant.file}: {mutant.means}")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
