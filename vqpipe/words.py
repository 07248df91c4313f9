"""Words for the screen and for pages."""

from collections.abc import Sequence


def counted(number: int, plural: str) -> str:
    """`1 image`, `4,758 images`: a number and its noun, which is given in the plural."""
    singular = plural.removesuffix("es") if plural.endswith("sses") else plural.removesuffix("s")
    return f"{number:,} {singular if number == 1 else plural}"


def first_names(names: Sequence[object], most: int = 3) -> str:
    """`a, b, c and 1,000 more`: the first `most` names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def in_ranges(numbers: Sequence[int]) -> str:
    """`3,7,20-29`: numbers in their order, consecutive ones as a range."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ",".join("-".join(map(str, each)) for each in ranges)


def capitalized(text: str) -> str:
    """`k-means on MNIST` -> `K-means on MNIST`: `str.capitalize` would change the other letters."""
    return text[:1].upper() + text[1:]


def percent(share: float, digits: int = 1) -> str:
    """A share of 0..1 in percent with so many digits, never rounded up to 100 % or down to 0 %: `99.9 %`, `0.004 %`."""
    value, step = 100 * share, 10**-digits
    if share == 1:
        return "100 %"
    if 0 < value < step / 2:
        return f"{value:.1g} %"
    return f"{min(value, 100 - step) if share < 1 else value:.{digits}f} %"
