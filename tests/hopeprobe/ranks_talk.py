"""What ranks say to each other, by torchrun: each writes what it heard."""

import contextlib
import json
import sys
from pathlib import Path

import torch

from hopeprobe import ranks
from hopeprobe.errors import BadInputError, HopeprobeError, MeasurementError


def raised(work):
    try:
        return work()
    except HopeprobeError as error:
        return f"{type(error).__name__}: {error}"


def refuse():
    raise BadInputError(f"rank {own} says no")


def refuse_from_one():
    return own if own == 0 else refuse()


def alone():
    return [ranks.size(), ranks.rank(), ranks.gathered("mine"), list(ranks.shared("abc")), ranks.first()]


def measured(number):
    if number == 3:
        raise MeasurementError("three is not measured")
    return [number, own]


def build():
    there = (folder / "built").exists()
    (folder / "built").touch()
    return there


def threads():
    """Names of this process's threads, where the system tells them."""
    return [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]


folder = Path(sys.argv[1])
with ranks.joined():
    own = ranks.rank()
    numbers = torch.tensor([0.1 * (own + 1), 1e-9, float(own)])
    ranks.summed(numbers)
    heard = {
        "size": ranks.size(),
        "shared": list(ranks.shared(range(7))),
        "gathered": ranks.gathered(own * 10),
        "gathered_on_first": ranks.gathered_on_first(own * 10),
        "on_first": ranks.on_first(alone),
        "on_first raises": raised(lambda: ranks.on_first(refuse)),
        "dealt": [raised(one.get) for one in ranks.dealt([lambda n=n: measured(n) for n in range(5)])],
        "folded": ranks.folded(lambda: [own], lambda a, b: a + b),
        "folded raises": raised(lambda: ranks.folded(refuse_from_one, lambda a, b: a)),
        "first_then_others": ranks.first_then_others(build),
        "first_then_others raises": raised(lambda: ranks.first_then_others(refuse)),
        "agreed": raised(lambda: ranks.agreed({"text": "one", "number": own // 2})),
        "summed": numbers.tolist(),
        "first": ranks.first(),
    }
    # As training does, by its optimizer: some of this looks at the job that there is.
    import torch._dynamo

    heard["threads in"] = threads()
heard["threads out"] = threads()
with contextlib.suppress(BadInputError), ranks.joined():
    heard["gathered again"] = ranks.gathered(own)
    refuse()
heard["threads after an error"] = threads()
(folder / f"heard-{own}.json").write_text(json.dumps(heard))
