"""The fixed groups that every interval is computed over.

Documents are dealt in turn, by their ordinal in the stream, into `GROUPS` groups, so that a document's group
does not depend on batch size, split or rank. Groups, never tokens, are the units of the jackknife: tokens of
one document are not independent.
"""

from __future__ import annotations

GROUPS = 64
"""Number of groups; the leading axis of every accumulator."""

MIN_GROUPS = 32
"""Fewest non-empty groups for which an interval is claimed."""
