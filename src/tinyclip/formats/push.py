"""A model -> a repository on the Hugging Face hub: files that were read back, and the model card."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from tinyclip.formats import weights
from tinyclip.formats.card import Record, card
from tinyclip.formats.export import export
from tinyclip.model import CLIP


def prepare(
    model: CLIP, directory: str | Path, name: str, *, to: str, record: Record, say: Callable[[str], None] = print
) -> Path:
    """Write what `push` uploads into a new directory: a verified export, and README.md. Raises as `export` does."""
    _check_name(name)
    directory = Path(export(model, directory, to=to, say=say)["directory"])
    (directory / "README.md").write_text(card(model, name, to=to, record=record), encoding="utf-8")
    return directory


def push(
    model: CLIP,
    name: str,
    *,
    to: str = "huggingface",
    private: bool = False,
    update: bool = False,
    record: Record = Record(),  # noqa: B008  immutable
    say: Callable[[str], None] = print,
) -> str:
    """Upload a model as USER/NAME and return its address; with `update` into a repository that may be there.

    The hub and the token are those of huggingface_hub: HF_ENDPOINT, and HF_TOKEN or `hf auth login`. Raises ValueError,
    one line, without a token, without a network, where the repository exists, and as `export` does.
    """
    import huggingface_hub

    _check_name(name)
    if huggingface_hub.get_token() is None:
        raise ValueError(f"push {name}: expected a token of the hub that may write: set HF_TOKEN, or `hf auth login`")
    hub = huggingface_hub.HfApi(library_name="tinyclip")
    with tempfile.TemporaryDirectory() as scratch:
        files = prepare(model, Path(scratch) / "files", name, to=to, record=record, say=say)
        try:
            address = hub.create_repo(name, private=private, exist_ok=update)
            hub.upload_folder(repo_id=name, folder_path=files, commit_message="Upload with tinyclip")
        except Exception as error:  # whatever the network, the hub or its client raises
            if getattr(getattr(error, "response", None), "status_code", None) == 409:
                raise ValueError(f"push {name}: the repository exists; --update adds a commit to it") from None
            causes = [error, error.__cause__] if isinstance(error.__cause__, Exception) else [error]
            reason = " ".join(map(weights.first_line, causes))
            raise ValueError(f"push {name}: the hub did not take it: {reason}") from None
    return str(address)


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"push: {weights.first_line(error)}") from None
    if "/" not in name:
        raise ValueError(f"push: expected USER/NAME, got {name!r}")
