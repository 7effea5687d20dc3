"""Numbers as people read them, for the terminal and the report."""

import math

_LETTERS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def count(number: float) -> str:
    """Three significant digits and a letter: 950, 12.3k, 1.23M, 4.56B, 7.89T."""
    if not math.isfinite(number) or abs(number) >= 9.995e14:
        return scientific(number)
    if abs(number) >= 999.5:
        size, letter = next(pair for pair in _LETTERS if abs(number) >= 0.9995 * pair[0])
        return _three_digits(number / size) + letter
    return str(int(number)) if number == int(number) else _three_digits(number)


def scientific(number: float) -> str:
    """Three significant digits: 1.23e18, without the plus sign and leading zeros of Python."""
    if not math.isfinite(number):
        return str(float(number))
    mantissa, exponent = f"{number:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def duration(seconds: float) -> str:
    """9.5 s, 4:05 (minutes), 2:03:04 (hours), 1d 02:03:04."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def value(item: object) -> str:
    """Any table cell: whole numbers with separators, others with four significant digits."""
    if isinstance(item, bool) or not isinstance(item, int | float):
        return "" if item is None else str(item)
    return f"{item:,}" if isinstance(item, int) else f"{item:.4g}"


def _three_digits(number: float) -> str:
    if number == 0:
        return "0"
    number = float(
        f"{number:.2e}"
    )  # Rounded first, because 9.996 has a digit more before the point.
    decimals = max(2 - math.floor(math.log10(abs(number))), 0)
    return f"{number:.{decimals}f}" if decimals <= 5 else scientific(number)
