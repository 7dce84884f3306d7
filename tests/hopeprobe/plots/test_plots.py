"""Which figure is drawn, of which checkpoint, and where it goes."""

import math
import subprocess
import sys

import pytest

from hopeprobe import plots
from hopeprobe.errors import BadInputError, MeasurementError
from hopeprobe.results import Results
from hopeprobe.stats import Verdict

PNG = b"\x89PNG\r\n\x1a\n"


def test_a_probe_has_its_own_figure_or_that_of_rows(levels, make):
    measured, results_of = make
    both = levels()
    both.extend(results_of(measured()))
    figures = plots.draw_all(both)
    assert list(figures) == ["cms-similarity", "demo-probe"]
    assert figures["cms-similarity"].get_suptitle().startswith("Similarity of CMS levels")
    assert figures["demo-probe"].get_suptitle() == "demo-probe: step-000200.pt, step 200"
    shown = figures._repr_html_()
    assert shown.count("data:image/png;base64,") == 2
    assert figures["demo-probe"]._repr_png_().startswith(PNG)


def test_of_several_checkpoints_one_must_be_named_or_each_is_drawn(levels):
    both = levels(checkpoint="a.pt")
    both.extend(levels(checkpoint="<b>.pt"))
    with pytest.raises(BadInputError, match=r"name one: a\.pt, <b>\.pt"):
        plots.draw(both, "cms-similarity")
    with pytest.raises(BadInputError, match=r"not measured of 'c\.pt'"):
        plots.draw(both, "cms-similarity", "c.pt")
    with pytest.raises(BadInputError, match=r"nothing was measured of 'c\.pt'"):
        plots.draw_all(both, "c.pt")
    assert "a.pt" in plots.draw(both, "cms-similarity", "a.pt").get_suptitle()
    figures = plots.draw_all(both)
    assert list(figures) == ["cms-similarity, a.pt", "cms-similarity, <b>.pt"]
    assert "<b>" not in figures._repr_html_()
    assert list(plots.draw_all(both, "a.pt")) == ["cms-similarity"]


def test_nothing_measured_is_nothing_drawn(levels, make):
    measured, results_of = make
    nothing = results_of(measured(value=math.nan, verdict=Verdict.NOT_APPLICABLE))
    with pytest.raises(MeasurementError, match=r"measured nothing of step-000200\.pt"):
        plots.draw(nothing, "demo-probe")
    assert plots.draw_all(nothing) == plots.draw_all(Results()) == {}
    with pytest.raises(BadInputError, match="did you mean 'cms-similarity'"):
        plots.draw(levels(), "cms-similarty")


def test_a_figure_is_saved_whole_or_not_at_all(tmp_path, make, drawn):
    measured, results_of = make
    figure = plots.draw(results_of(measured()), "demo-probe")
    path = plots.save(figure, tmp_path / "deep" / "x.png")
    assert path.read_bytes().startswith(PNG)
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]
    assert drawn == [figure]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInputError, match="cannot write"):
        plots.save(figure, tmp_path / "file" / "x.png")


def test_drawing_libraries_load_when_something_is_drawn():
    code = "import sys, hopeprobe.plots; assert not {'seaborn', 'matplotlib', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
