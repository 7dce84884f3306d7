"""Maps: what is read of them, and every way of writing one wrongly."""

import pytest

from hopeprobe.errors import BadInputError
from hopeprobe.mapping import TITANS_PYTORCH, Map, read_map
from hopeprobe.mapping.spec import matching

STEP = "blocks.{layer}.memory.hook_step"


def test_what_a_map_says(edited):
    made = Map.of(edited("model", "context", 16))
    assert [p.name for p in made.points][:2] == [
        "blocks.{layer}.hook_resid_post",
        "blocks.{layer}.memory.hook_out",
    ]
    assert made.points[0].dims == ("batch", "pos", "d_model")
    assert made.points[0].editable
    (memory,) = made.memories
    assert (memory.name, memory.period, memory.decay) == ("memory", 4, "zero")
    assert memory.freeze[STEP] == float("-inf")
    (fast,) = memory.fast
    assert fast.name == "blocks.{layer}.memory.hook_fast_w"
    assert fast.initial
    assert not fast.editable


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("modle",), {}, "'modle' is not known; did you mean 'model'"),
        (("model", "contxt"), 3, "'contxt' is not known; did you mean 'context'"),
        (("model", "context"), "16", "context is '16', not a whole number"),
        (("model", "context"), True, "context is True, not a whole number"),
        (("model", "context"), 0, "context is 0, not a number of tokens"),
        (("points", "blocks.0.hook_x"), 3, "3 is not a table"),
        (("points", "blocks.0.hook_x"), {"value": "output"}, "it names no module"),
        (("points", "blocks.0.hook_x"), {"module": "a", "value": "out"}, "'out' is not where a tensor is"),
        (("points", "blocks.0.hook_x"), {"module": "a", "dims": "pos d"}, "dims begin with 'batch'"),
        (("points", "blocks.0.hook_x"), {"module": "a", "value": "module.w", "editable": True}, "cannot be edited"),
        (("memory", "memory", "period"), None, "period, the tokens between two writes, is missing"),
        (("memory", "memory", "decay"), "one", "decay is 'one', not 'init' or 'zero'"),
        (("memory", "memory", "fast"), {}, "it shows no fast weights"),
        (("memory", "memory", "fast", "w", "meta"), None, "it does not say its meta"),
        (("memory", "memory", "fast", "w", "dims"), "batch out head in", "'head' comes right after 'batch'"),
        (("memory", "memory", "fast", "w", "dims"), "batch out in", "for what one call gives of all writes"),
        (("memory", "memory", "freeze", "blocks.{layer}.memory.hook_stop"), 0.0, "is no point; did you mean"),
        (("memory", "memory", "freeze", STEP), "off", "hook_step is 'off', not a number"),
        (("points", STEP, "editable"), False, "hook_step' cannot be edited"),
        (("points", "blocks.{layer}.memory.hook_fast_w"), "layers.{layer}", "is said twice"),
        (("groups", "embed"), 3, "embed is 3, not names of modules"),
        (("groups", "embed"), ["layers.{layer}"], "must stand in its name and its modules'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(edited, path, value, message):
    with pytest.raises(BadInputError, match="the map") as caught:
        Map.of(edited(*path, value))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"[model\n", "is not TOML"), (b"\xff\xfe", "is not TOML"), (b"points = 3", "points is 3"),
     pytest.param(b"[model]\ncontext = " + b"7" * 5000, "is not TOML", id="a number of 5000 digits"),
     pytest.param(b"x = " + b"[" * 3000 + b"]" * 3000, "is not TOML", id="lists in lists")],
)  # fmt: skip
def test_a_file_that_is_no_map(tmp_path, content, message):
    file = tmp_path / "map.toml"
    file.write_bytes(content)
    with pytest.raises(BadInputError, match=message) as caught:
        read_map(file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there_and_a_name_that_is_not_known(tmp_path):
    with pytest.raises(BadInputError, match="cannot read the map"):
        read_map(tmp_path / "no.toml")
    with pytest.raises(
        BadInputError, match=r"no map is called 'titan-pytorch'.*did you mean 'titans-pytorch'"
    ):
        read_map("titan-pytorch")


def test_registered_maps_go_by_their_name():
    assert read_map("titans-pytorch") == read_map(TITANS_PYTORCH)


def test_layers_are_numbers_in_names():
    names = ["a.0.b", "a.10.b", "a.x.b", "a.0.b.0", "c.1.1", "c.1.2"]
    assert matching("a.{layer}.b", names) == [("0", "a.0.b"), ("10", "a.10.b")]
    assert matching("c.{layer}.{layer}", names) == [("1", "c.1.1")]
    assert matching("a.x.b", names) == [("", "a.x.b")]
    assert matching("a.x", names) == []
