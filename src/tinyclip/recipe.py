"""The settings of a run: stages in order, what they start from, what they train on and what is measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_serializer, model_validator

from tinyclip import __version__
from tinyclip.config import Config
from tinyclip.distill.store import StoreConfig
from tinyclip.distill.train import DataConfig, TrainConfig
from tinyclip.evaluate.scores import Evaluation
from tinyclip.formats.provenance import UNKNOWN, Licenses, Origin, Provenance, ancestors, model_origin, public
from tinyclip.model import CLIP
from tinyclip.shrink.inherit import Inherit
from tinyclip.shrink.masks import LearnMasks
from tinyclip.start import Like, Scratch


class Stage(Config):
    """One step of the progression: shrink, then distil."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="of the stage's directory")
    shrink: Annotated[Inherit | LearnMasks, Field(discriminator="kind")] | None = Field(
        default=None, description="by rule (kind: inherit) or by learned masks (kind: learn_masks)"
    )
    while_masking: TrainConfig | None = Field(default=None, description="training while masks are learned")
    distill: TrainConfig = Field(description="training of the smaller student")

    @model_validator(mode="after")
    def _masks_need_training(self) -> Self:
        if isinstance(self.shrink, LearnMasks) != (self.while_masking is not None):
            raise ValueError(f"stage {self.name}: while_masking goes with shrink.kind learn_masks, and only with it")
        return self

    @field_serializer("shrink", mode="wrap", when_used="unless-none")
    def _with_kind(self, shrink: Inherit | LearnMasks, dump: SerializerFunctionWrapHandler) -> Any:
        """A dump without defaults needs the kind too, to be read back."""
        return {"kind": shrink.kind, **dump(shrink)}


class Recipe(Config):
    """All that decides a run. `teacher` is always the original; without `start` its weights are the ones inherited."""

    teacher: str | None = Field(default=None, description="a directory, open_clip:ARCH/TAG, hf:..., tinyclip:NAME, ...")
    start: str | Scratch | Like | None = Field(
        default=None, description="the model whose weights are inherited, or a random start; else the teacher"
    )
    more_teachers: tuple[str, ...] = Field(
        default=(), description="an ensemble with `teacher`, which alone is inherited from: affinities are averaged"
    )
    store: StoreConfig | None = Field(
        default=None, description="embed the data with the teachers once, and train from that; else at every visit"
    )
    data: DataConfig
    stages: tuple[Stage, ...] = Field(min_length=1)
    evaluation: Evaluation = Evaluation()
    licenses: Licenses | None = Field(default=None, description="what is known of them; goes with the model")
    seed: int = Field(default=0, ge=0, lt=2**48, description="of random starts, data order, crops and gates")
    shard_teacher: bool = Field(
        default=False, description="split the teacher's weights over the processes, where one card cannot hold them"
    )
    device: str = Field(default="auto", description="auto: CUDA where there is one; or cpu, cuda:1, ...")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.teacher is None and self.start is None:
            raise ValueError("expected a teacher, a start, or both")
        for name in ("more_teachers", "store"):
            if self.teacher is None and getattr(self, name):
                raise ValueError(f"{name}: expected with a teacher, which this recipe has not")
        said = (self.licenses and self.licenses.more_teachers) or ()
        if said and len(said) != len(self.more_teachers):
            raise ValueError(
                f"licenses.more_teachers: expected one for each of the {len(self.more_teachers)} more_teachers, "
                f"got {len(said)}"
            )
        for stage in self.stages:
            for phase in (stage.while_masking, stage.distill):
                if self.teacher is None and phase is not None and phase.objective.needs_teacher:
                    raise ValueError(
                        f"stage {stage.name}: affinity and feature need a teacher; or contrastive=1, affinity=0"
                    )
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages: expected different names, got {', '.join(names)}")
        shares = [s.shrink.keep_params for s in self.stages if s.shrink is not None and s.shrink.keep_params]
        if shares != sorted(shares, reverse=True):
            raise ValueError(f"stages: keep_params must not rise from stage to stage, got {shares}")
        return self

    @property
    def starts_at_random(self) -> bool:
        """Whether no weights are inherited by the first stage."""
        return isinstance(self.start, Scratch | Like)

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teacher, whose weights are inherited, then the others of an ensemble."""
        return () if self.teacher is None else (self.teacher, *self.more_teachers)

    def provenance(self, name: str | None, parents: Iterable[CLIP | None]) -> Provenance:
        """Where the model that comes out of this recipe comes from; `name` is the recipe's, as the user gave it."""
        licenses = self.licenses or Licenses()
        more = zip(self.more_teachers, licenses.more_teachers or [None] * len(self.more_teachers), strict=True)
        return Provenance(
            teacher=model_origin(self.teacher, licenses.teacher) if self.teacher is not None else None,
            more_teachers=tuple(model_origin(teacher, license) for teacher, license in more) or None,
            start=model_origin(self.start, licenses.start) if isinstance(self.start, str) else None,
            data=Origin(name=public(self.data.train.public), license=licenses.data or UNKNOWN),
            recipe=name,
            code=Origin(name=f"tinyclip {__version__}", license="mit"),
            ancestors=ancestors(parent.provenance for parent in parents if parent is not None),
        )
