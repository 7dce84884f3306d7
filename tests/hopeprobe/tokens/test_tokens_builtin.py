from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import pytest

from hopeprobe.errors import BadInputError
from hopeprobe.tokens.builtin import MIN_CHARACTERS, BuiltinSource

if TYPE_CHECKING:
    from pathlib import Path

LONG = "x" * MIN_CHARACTERS


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library; importing any module of it would raise."""
    files = {
        "pydoc_data/topics.py": f"topics = {{'with': '{LONG}' 'B', 'if': '{LONG}A', 'x': 's'}}",
        "zeta.py": f'"""{LONG}"""\nraise SystemExit',
        "alpha/__init__.py": f'''"""Module.

        {LONG}"""
if True:
    class Late:
        """Class."""
        def method(self):
            """Method."""
async def after():
    """After."""
''',
        "short.py": '"""Too short."""',
        "escape.py": f'"""\\d {LONG}"""',
        "broken.py": f'"""{LONG}""" (',
        "latin.py": f'# -*- coding: latin-1 -*-\n"""\xe9{LONG}"""'.encode("latin-1"),
        "test/t.py": f'"""{LONG}"""',
        "idlelib/idle_test/t.py": f'"""{LONG}"""',
        "site-packages/p.py": f'"""{LONG}"""',
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path


def test_topics_come_first_then_one_document_a_module_in_source_order(library: Path):
    documents = list(BuiltinSource(library).documents())
    assert [document.origin for document in documents] == [
        "builtin topic 'if'",
        "builtin topic 'with'",
        "builtin module alpha/__init__.py",
        "builtin module escape.py",
        "builtin module latin.py",
        "builtin module zeta.py",
    ]
    assert documents[1].text == f"{LONG}B"
    assert documents[2].text == f"Module.\n\n{LONG}\n\nClass.\n\nMethod.\n\nAfter."
    assert documents[4].text == f"é{LONG}"


def test_the_key_changes_with_content_and_names(library: Path):
    key = BuiltinSource(library).key()
    assert BuiltinSource(library).key() == key
    (library / "zeta.py").rename(library / "eta.py")
    renamed = BuiltinSource(library).key()
    (library / "eta.py").write_text(f'"""{LONG}!"""')
    assert len({key, renamed, BuiltinSource(library).key()}) == 3


def test_a_python_without_sources_says_so(tmp_path: Path):
    with pytest.raises(BadInputError, match="no standard library sources"):
        list(BuiltinSource(tmp_path).documents())


def test_the_description_has_the_python_version():
    assert BuiltinSource().describe() == {"kind": "builtin", "python": platform.python_version()}
