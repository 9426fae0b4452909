"""What a caller can handle differently, one class each.

QuantgateError
├── UsageError            wrong command or configuration                      exit code 2
│   ├── SourceError       the model cannot be used
│   └── GoldenSetError    a golden set is malformed
├── ArtifactError         an artifact's bytes are not what they were          exit code 3
└── MeasurementError      a stage could not be measured; becomes a Missing, never a number
    └── ServerDied        the server ended while it was being measured
"""

from __future__ import annotations


class QuantgateError(Exception):
    """Base of everything quantgate raises for a person to read."""


class UsageError(QuantgateError):
    """Wrong command or configuration: nothing was run."""


class SourceError(UsageError):
    """The model handed in cannot be used, with the reason and what to do."""


class GoldenSetError(UsageError):
    """A golden set is malformed, with file and line."""


class ArtifactError(QuantgateError):
    """An artifact's bytes do not match its manifest."""


class MeasurementError(QuantgateError):
    """A measurement could not be made."""


class ServerDied(MeasurementError):
    """The server ended while it was being measured; the message ends with its last log lines."""
