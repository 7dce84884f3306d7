"""Any `torch.nn.Module` as a subject: a map says which of its modules are which hook points.

`subject_of` takes a module in memory, `load_mapped` a checkpoint file; both check what the map says before anything is
measured. On the command line it is `--map map.toml`. The format is described in `spec.py`.
"""

from pathlib import Path

from .spec import Map, read_map
from .subject import MappedSubject, load_mapped, subject_of

TITANS_PYTORCH = Path(__file__).with_name("titans-pytorch.toml")
"""Registered as the map `titans-pytorch`."""

__all__ = ["TITANS_PYTORCH", "Map", "MappedSubject", "load_mapped", "read_map", "subject_of"]
