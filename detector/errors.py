"""Every error that Stripwire raises on purpose.

StripwireError
├── InputError                  what the user gave cannot be used: an option, an array, a file
│   ├── DataError               a data set or image is unreadable or malformed
│   ├── ModelRefusedError       a model file is unsafe, damaged or unsupported
│   └── RepositoryError         a model repository is missing, incomplete or was altered
├── CalibrationError            the clean sample cannot support what was asked of it
├── ExportError                 the exported nets do not do what the Keras nets do
├── SetupError                  something that Stripwire needs is missing on this machine
├── RecordError                 the monitor's record cannot be written or read
└── ServerError                 the server could not start, or did not answer as it should
    ├── ServerStartError        tritonserver did not become ready
    ├── ServerUnavailableError  nothing answers at the address, after the retries
    ├── DeadlineExceededError   the answer did not come in time
    ├── RequestRejectedError    the server refused the request as invalid
    └── AccessDeniedError       the server asks for other credentials

Messages say which argument, what came, what was expected and what to do.
"""

from __future__ import annotations


class StripwireError(Exception):
    """Base of all errors that Stripwire raises on purpose."""


class InputError(StripwireError, ValueError):
    """What the user gave cannot be used."""


class DataError(InputError):
    """A data set or an image is unreadable or malformed."""


class ModelRefusedError(InputError):
    """A model file is unsafe, damaged or unsupported."""


class RepositoryError(InputError):
    """A model repository is missing, incomplete or was altered."""


class CalibrationError(InputError):
    """The clean sample cannot support what was asked of it."""


class ExportError(StripwireError):
    """The exported networks do not do what the Keras networks do."""


class SetupError(StripwireError):
    """Something that Stripwire needs is missing on this machine."""


class RecordError(StripwireError):
    """The monitor's record of feedback cannot be written or read."""


class ServerError(StripwireError):
    """The server could not start, or did not answer as it should."""


class ServerStartError(ServerError):
    """`tritonserver` did not become ready."""


class ServerUnavailableError(ServerError):
    """Nothing answers at the server's address, after the retries."""


class DeadlineExceededError(ServerError):
    """The answer did not come in time."""


class RequestRejectedError(ServerError):
    """The server refused the request as invalid."""


class AccessDeniedError(ServerError):
    """The server asks for other credentials than were sent."""
