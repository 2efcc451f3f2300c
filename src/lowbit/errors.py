"""Every error `lowbit` raises on purpose.

    LowbitError                 exit code 1: the work failed
    ├── CheckpointError         a file is damaged, missing or lies about itself
    ├── WeightError             a weight holds NaN or Inf
    ├── FormatError             bytes of a format do not mean what its layout says
    ├── VerifyError             what was written is not what was meant
    ├── ResourceError           memory limit, disk space
    └── UsageError              exit code 2: the command was wrong
        ├── UnsupportedError    no such plug-in, or a format cannot hold a scheme
        └── JournalError        the output directory belongs to something else
    QualityError                exit code 3: the result missed what was asked

Low layers raise with the fact (tensor, shape, offset, value); the stage that knows what the user typed
raises again with what to do.
"""

from __future__ import annotations


class LowbitError(Exception):
    """Root of the tree; its text is one sentence that a user can act on."""

    exit_code = 1


class CheckpointError(LowbitError):
    """A checkpoint file is damaged, missing, or lies about itself."""


class WeightError(LowbitError):
    """A weight holds a value that no grid can store."""


class FormatError(LowbitError):
    """Stored tensors do not follow the layout of the format that they claim."""


class VerifyError(LowbitError):
    """What was read back differs from what was meant."""


class ResourceError(LowbitError):
    """The machine has not enough memory or disk for what was asked."""


class UsageError(LowbitError):
    """The command cannot be carried out as it was typed."""

    exit_code = 2


class UnsupportedError(UsageError):
    """A scheme, method or format that does not exist, or two that do not go together."""


class JournalError(UsageError):
    """The output directory belongs to another run or to something else."""


class QualityError(LowbitError):
    """The result missed the quality or the budget that was asked for."""

    exit_code = 3
