"""Views of a checkpoint as readers of a format expect its parts."""

from __future__ import annotations

from lowbit.stages._experts import apart
from lowbit.stages._text_part import text_part
from lowbit.stages.checkpoint import Checkpoint


def view_for(source: Checkpoint, form: str | None) -> Checkpoint:
    """What of a checkpoint a format holds, under the names that its readers know; raises like `text_part`."""
    return apart(text_part(source, form), form)
