"""How far a long clustering is, told to whoever shows it."""


class Watch:
    """Hears of phases and of the vectors worked through in each; this one is silent."""

    def phase(self, title: str, total: int) -> None:
        """A new count begins, of about `total` vectors; a vector looked at in two passes counts twice."""

    def advance(self, vectors: int) -> None:
        """So many more are done, on all ranks together."""

    def note(self, text: str) -> None:
        """A short text to show beside the count."""
