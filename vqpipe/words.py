"""Words for the screen and for pages."""


def counted(number: int, plural: str) -> str:
    """`1 image`, `4,758 images`: a number and its noun, which is given in the plural."""
    singular = plural.removesuffix("es") if plural.endswith("sses") else plural.removesuffix("s")
    return f"{number:,} {singular if number == 1 else plural}"
