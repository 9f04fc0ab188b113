"""Name everything that can go wrong for a user.

```
DiptychError            what happened, which value, what to do
├── UnknownModel        no such model here, in the cache or on the hub
├── UnsupportedModel    a model was found, of a kind diptych does not run
├── WeightsMismatch     the tensors in a file do not fill the network, or fill it twice
├── QualityLoss         a smaller model is worse than was asked for
├── BadInput            an option, a file name or a combination of them cannot be used
│   └── BadImage        a picture cannot be read
└── MissingExtra        an optional install is needed; carries the command
```

The command line turns a `DiptychError` into one line and an exit code; anything else is a bug and
keeps its traceback.
"""

from __future__ import annotations

__all__ = [
    "BadImage",
    "BadInput",
    "DiptychError",
    "MissingExtra",
    "QualityLoss",
    "UnknownModel",
    "UnsupportedModel",
    "WeightsMismatch",
]


class DiptychError(Exception):
    """Tell what happened, to which value, and what to do about it."""


class UnknownModel(DiptychError):
    """Report a model name or path that leads nowhere."""


class UnsupportedModel(DiptychError):
    """Report a model that was found but is of a kind diptych does not run."""


class WeightsMismatch(DiptychError):
    """Report tensors that do not fit the network they are meant for."""


class QualityLoss(DiptychError):
    """Report a smaller model that falls under its bound of quality."""


class BadInput(DiptychError, ValueError):
    """Report an option, a name or a combination of them that cannot be used."""


class BadImage(BadInput):
    """Report a picture that cannot be read: `name` is the file, `reason` what is wrong with it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return type(self), (self.name, self.reason)


class MissingExtra(DiptychError, ImportError):
    """Report an optional install that is needed: `extra` names it."""

    def __init__(self, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs more packages: pip install 'diptych[{extra}]'")
        self.extra = extra
        self.purpose = purpose

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str]]:
        return type(self), (self.extra, self.purpose)
