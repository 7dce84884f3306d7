"""pytest: the fixture `mechanism`, with which a project's own tests hold its training code to a baseline.

    def test_memories_still_work(mechanism, checkpoint):
        mechanism.check(checkpoint, "tests/mechanism.json")

`pytest --mechanism-update` writes the baselines anew, with the settings and the tolerances that they have, in place of
checking; a baseline that is not there yet is made so, with the settings that `check` is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import os

    from hopeprobe.opening import Checkpoints
    from hopeprobe.regression import Baseline, Check

UPDATE = "--mechanism-update"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that writes baselines."""
    group = parser.getgroup("hopeprobe")
    group.addoption(
        UPDATE,
        action="store_true",
        help="write the baselines of mechanism statistics anew, and check nothing",
    )


@pytest.fixture(scope="session")
def mechanism(request: pytest.FixtureRequest) -> Mechanism:
    """Check checkpoints against baselines of their mechanisms' statistics; see `hopeprobe.regression`."""
    return Mechanism(update=bool(request.config.getoption(UPDATE)))


class Mechanism:
    """What the fixture gives.

    update: write baselines in place of checking.
    """

    def __init__(self, update: bool = False) -> None:
        self.update = update

    def check(
        self, checkpoints: Checkpoints, baseline: str | os.PathLike[str], data: Any = None, **settings: Any
    ) -> Check | None:
        """Fail the test where something moved or could not be measured, with the table of what; else give the check.

        checkpoints, data: as `hopeprobe.check` takes them. settings: further arguments of
        `hopeprobe.make_baseline`, for a baseline that is not there yet; one that was made with others is no pass.
        None when it was written.
        Raises BadInputError as those two.
        """
        from hopeprobe.regression import Baseline, changed, check

        __tracebackhide__ = True
        if self.update:
            self._write(checkpoints, Path(baseline), data, settings)
            return None
        if not Path(baseline).exists():
            pytest.fail(
                f"{baseline} is not there: `pytest {UPDATE}` writes it, to be committed", pytrace=False
            )
        kept = Baseline.read(baseline)
        others = changed(kept, settings)
        if others:
            pytest.fail(
                f"{baseline} was made with other settings than the test asks for ({', '.join(others)}): "
                f"`pytest {UPDATE}` writes it anew",
                pytrace=False,
            )
        found = check(checkpoints, kept, data)
        if not found.passed:
            pytest.fail(as_text(found), pytrace=False)
        return found

    def _write(self, checkpoints: Checkpoints, path: Path, data: Any, settings: dict[str, Any]) -> Baseline:
        from hopeprobe.regression import Baseline, make_baseline, renewed

        given = settings if data is None else {**settings, "data": data}
        if path.exists():
            made = renewed(Baseline.read(path), checkpoints, **given)
        else:
            made = make_baseline(checkpoints, **given)
        made.write(path)
        return made


def as_text(found: Check) -> str:
    """The check in plain lines."""
    lines = [f"hopeprobe check: {found.summary}"]
    for address, before, now, difference, interval, tolerance, finds, outcome in found.lines():
        lines.append(
            f"  {address}: {before} -> {now}, {difference} {interval}, tolerance {tolerance}, found from {finds}, "
            f"{outcome}"
        )
    lines += [f"  not measured: {message}" for message in found.missing]
    lines += [f"  note: {note}" for note in found.notes]
    return "\n".join(lines)
