"""What an analysis is given: checkpoints opened and named, and the windows of text that each is measured on."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from hopeprobe import ranks
from hopeprobe.errors import BadInputError
from hopeprobe.subject import MissingCapability, Subject, load, placed
from hopeprobe.tokens import EvalWindows, TokenData, load_tokens

if TYPE_CHECKING:
    import torch

    from hopeprobe.tokens.sources import DataSpec

Checkpoints: TypeAlias = "str | os.PathLike[str] | Subject | Iterable[str | os.PathLike[str] | Subject]"
_BATCH_TOKENS = 4096
_BATCH_DOCUMENTS = 4  # of any length
_SHOWN = 120  # characters of a path in a message


def suitable_batch(context: int, carry: str) -> int:
    """Windows at a time: about 4,096 tokens, as every worker holds so many; more is no faster for `small`."""
    return max(1, _BATCH_TOKENS // context) if carry == "window" else _BATCH_DOCUMENTS


def as_list(checkpoints: Checkpoints) -> list[str | os.PathLike[str] | Subject]:
    """One or several as a list. Raises BadInputError when there are none."""
    if isinstance(checkpoints, str | os.PathLike | Subject):
        return [checkpoints]
    given = list(checkpoints)
    if not given:
        raise BadInputError("no checkpoint was given")
    return given


def told_apart(checkpoints: Sequence[str | os.PathLike[str] | Subject]) -> list[str]:
    """Name each checkpoint by its file, with as many folders as it takes to tell two apart, if any do."""
    paths = [c.path if isinstance(c, Subject) else Path(c) for c in checkpoints]
    names = [c.name if isinstance(c, Subject) else Path(c).name for c in checkpoints]
    for depth in range(2, 1 + max((len(p.parts) for p in paths if p), default=1)):
        twice = {name for name, count in Counter(names).items() if count > 1}
        for i, path in enumerate(paths):
            if path is not None and names[i] in twice:
                names[i] = "/".join(path.parts[-depth:])
    return names


def labelled(checkpoints: Sequence[str | os.PathLike[str] | Subject]) -> list[str]:
    """Name each checkpoint as `told_apart` does. Raises BadInputError where two have one name."""
    names = told_apart(checkpoints)
    if len(set(names)) < len(names):
        same = sorted(name for name, count in Counter(names).items() if count > 1)
        raise BadInputError(
            f"two checkpoints have one name, {', '.join(same)}, and rows could not be told apart: give each once, "
            "and subjects names of their own (`subject.name`)"
        )
    return names


@dataclass
class WindowMaker:
    """The windows of each checkpoint; those that read the same ones share them, and their fingerprint."""

    data: DataSpec | Sequence[DataSpec] | TokenData
    tokens: int | None
    split: str
    carry: str
    batch: int | None
    cache_dir: str | os.PathLike[str] | None
    loaded: dict[str, TokenData] = field(default_factory=dict)
    made: dict[tuple[str, int], EvalWindows] = field(default_factory=dict)

    def windows(self, subject: Subject) -> EvalWindows:
        """Windows of the subject's context. Raises BadInputError where the data do not fit the model."""
        text = self.text(subject.tokenizer)
        _check_vocabulary(subject, text)
        key = subject.tokenizer, subject.context
        if key not in self.made:
            size = suitable_batch(subject.context, self.carry) if self.batch is None else self.batch
            self.made[key] = EvalWindows(
                text, self.split, context=subject.context, tokens=self.tokens, batch=size, carry=self.carry
            )
        return self.made[key]

    def text(self, tokenizer: str) -> TokenData:
        """The text as a tokenizer reads it, loaded once."""
        if isinstance(self.data, TokenData):
            return self.data
        if tokenizer not in self.loaded:
            self.loaded[tokenizer] = load_tokens(self.data, tokenizer=tokenizer, cache_dir=self.cache_dir)
        return self.loaded[tokenizer]


def open_checkpoint(
    checkpoint: str | os.PathLike[str] | Subject, device: str | torch.device | None = None
) -> Subject:
    """Load a path; a subject is one already, and stays where it is unless a device is named.

    Raises BadInputError where there is nothing to open, or no such device.
    """
    if isinstance(checkpoint, Subject):
        return placed(checkpoint, device)
    try:
        return placed(load(Path(checkpoint)), device)
    except OSError as error:  # a name too long, a folder that may not be entered
        shown = os.fspath(checkpoint)
        if len(shown) > _SHOWN:
            shown = f"{shown[: _SHOWN // 2]} … {shown[-_SHOWN // 2 :]}"
        raise BadInputError(f"{shown} cannot be opened: {error.strerror or type(error).__name__}") from error


def check_no_hooks(subject: Subject) -> None:
    """Raise BadInputError for a model with somebody's hooks on it: its nulls would be measured without them."""
    active = [name for name, point in subject.module.hook_dict.items() if point.active]
    if active:
        shown = ", ".join(active[:3]) + (f" and {len(active) - 3} more" if len(active) > 3 else "")
        raise BadInputError(
            f"{subject.name} has hooks on it, at {shown}, and nulls are measured without them; take them off "
            "before analysing (handle.remove(), or leave the `with`)"
        )


def check_alike(subject: Subject, label: str, windows: EvalWindows, own_init: str) -> None:
    """Raise BadInputError where several ranks are about to measure one checkpoint and it is not the same on all."""
    if ranks.size() == 1:
        return
    from hopeprobe.nulls import weights_digest

    with contextlib.suppress(MissingCapability):
        ranks.agreed({f"weights of {label}": weights_digest(subject)})
    ranks.agreed(
        {
            "version of hopeprobe and torch": [metadata.version(name) for name in ("hopeprobe", "torch")],
            "text": windows.data.fingerprint,
            "choice of windows": windows.fingerprint,
            "own-init": own_init,
        }
    )


def _check_vocabulary(subject: Subject, data: TokenData) -> None:
    if subject.tokenizer != data.tokenizer:
        raise BadInputError(
            f"{subject.name} reads tokens of {subject.tokenizer!r}, {data.name} was tokenised by "
            f"{data.tokenizer!r}: tokenise the text for the model, load_tokens(..., tokenizer={subject.tokenizer!r})"
        )
    if subject.vocab_size < data.vocab_size:
        raise BadInputError(
            f"{subject.name} has a vocabulary of {subject.vocab_size}, {data.name} has tokens up to "
            f"{data.vocab_size - 1}: another tokenizer's text?"
        )
