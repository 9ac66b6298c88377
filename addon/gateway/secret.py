"""Text that must not be shown."""


class Secret(str):
    """A string that doesn't show itself."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Secret('***')" if self else "Secret('')"


def hint(secret: str) -> str:
    """Enough of a secret to recognise it by, far too little to guess it from."""
    return f"{secret[:7]}…{secret[-4:]}" if len(secret) > 20 else "…" if secret else ""
