"""Values of settings: from TOML and the text of a command line, without rounding, and to TOML."""

import difflib
import json
import math
import re
import typing
from collections.abc import Collection, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from nanonormuon.errors import ConfigError

SHARES = 1_000_000  # shares of a mixture are in millionths


def nearest(name: str, valid: Collection[str]) -> str:
    """Return 'did you mean "X"?' for a misspelt name, else the list of valid names."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else f"expected one of {', '.join(valid)}"


def coerce(value: Any, kind: Any, where: str) -> Any:
    """Convert a TOML value or text to a type. Raises ConfigError, whose message begins with
    `where`."""
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise ConfigError(f"{where} = {value!r}: expected UTF-8 (see the locale, LANG), no \\0")
    choices = typing.get_args(kind)
    if choices and typing.get_origin(kind) is not Literal:  # a number or a keyword
        number, words = choices
        return value if value in typing.get_args(words) else coerce(value, number, where)
    if choices and value not in choices:
        raise ConfigError(f'{where} = "{value}": {nearest(str(value), choices)}')
    if choices or (kind is str and isinstance(value, str)):
        return value
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind in (int, float):
        found = parse_number(str(value))
        if found is not None and math.isfinite(found) and (kind is float or found == int(found)):
            return kind(found)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise ConfigError(f"{where} = {value!r}: expected {names[kind]}")


def parse_number(text: str) -> int | float | None:
    """Parse "524_288", "0.5M" or "1e-3"; None if it is not a number."""
    scale = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    try:
        number = Decimal(text if scale == 1 else text[:-1]) * scale  # keeps 1.005M whole
    except InvalidOperation:
        return None
    whole = number.is_finite() and number == number.to_integral_value()
    return int(number) if whole and abs(number) < 10**19 else float(number)  # 2^63 is exact


def mixture(mix: str) -> list[tuple[str, int]]:
    """Parse data.mix, "DIR=0.2, DIR=0.1", with shares in millionths. Raises ConfigError."""
    found = []
    for item in filter(None, map(str.strip, mix.split(","))):
        name, _, text = (part.strip() for part in item.rpartition("="))
        share = parse_number(text) or 0
        if not name or not 0 < share < 1 or not (parts := round(share * SHARES)):
            raise ConfigError(f'data.mix: "{item}": expected DIRECTORY=SHARE, 0 < share < 1')
        found.append((name, parts))
    if sum(parts for _, parts in found) >= SHARES:
        raise ConfigError(f'data.mix = "{mix}": expected shares that add up to less than 1')
    return found


def to_toml(
    tables: Mapping[str, Mapping[str, Any]], origin: Mapping[str, str] | None = None
) -> str:
    """Format tables of settings as TOML. origin: where each "table.key" comes from, "default" if it
    is not there; shown behind the value."""
    sections = []
    for section, table in tables.items():
        lines = [f"[{section}]\n"]
        for key, value in table.items():
            line = f"{key} = {json.dumps(value, ensure_ascii=False)}"  # JSON's values are TOML's
            if origin is not None:
                line = f"{line:<36}  # {origin.get(f'{section}.{key}', 'default')}"
            lines.append(f"{line}\n")
        sections.append("".join(lines))
    return "\n".join(sections)
