"""Where training first met a value that is not finite, in words: sequence, token, layer, memory or level."""

from __future__ import annotations

from torch import Tensor

from hopeprobe.hooks import watching_finite
from hopeprobe.model.hope import HopeModel


def first_not_finite(model: HopeModel, tokens: Tensor, first: int = 0, of: int | None = None) -> str | None:
    """Run a batch (B, T + 1) again and name the first value that is not finite; None where no hook point shows one.

    Of several sequences the one in which it comes earliest is named, and how many others there are. Where `tokens` are
    a part of the batch, `first` is the number of its first sequence, and `of` how many the batch has.
    """
    with watching_finite(model) as origins:
        model(tokens.to(model.embed.device))
    if not origins:
        return None
    row = min(origins, key=lambda one: (origins[one].token, one))
    last = first + len(tokens) - 1
    looked_at = (
        f"the {len(tokens)} sequences" if of in (None, len(tokens)) else f"sequences {first} to {last}"
    )
    more = f"; {len(origins)} of {looked_at} are not finite" if len(origins) > 1 else ""
    return f"sequence {first + row} of the batch, {origins[row]}{more}"
