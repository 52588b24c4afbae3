"""What the figures and names of profile.json may be, so that what reads it need not ask again.

The bounds are far from what is ever measured; within them no arithmetic of ours fails or overflows.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from m2dexport.errors import one_line
from m2dexport.strict import is_name

_LONGEST_LINE = 2000  # characters, of one that has to be escaped


def _line(text: str) -> str:
    return text if text.isprintable() else one_line(text, _LONGEST_LINE)


def _printable(text: str) -> str:
    if not is_name(text):
        raise ValueError("should be a name that can be printed")
    return text


def _part(text: str) -> str:
    found = re.fullmatch("([1-9][0-9]{0,3})/([1-9][0-9]{0,3})", text)
    if found is None or int(found[1]) > int(found[2]):
        raise ValueError("should be a shard such as 1/2")
    return text


Name = Annotated[str, AfterValidator(_printable)]
#: A text of any kind; one that cannot be printed is read as a line in which that is escaped.
Line = Annotated[str, AfterValidator(_line)]
Shard = Annotated[str, AfterValidator(_part)]
Natural = Annotated[int, Field(ge=0, le=1 << 53)]
Count = Annotated[int, Field(ge=1, le=1 << 53)]
#: In points; correlations can be below 0.
Points = Annotated[float, Field(ge=-1000, le=1000)]
#: Holds whatever follows from two of the positive ones and their intervals.
Figure = Annotated[float, Field(ge=-1e40, le=1e40)]
#: What a duration in ms, or a ratio of two, may be.
LEAST, MOST = 1e-6, 1e9
Positive = Annotated[float, Field(ge=LEAST, le=MOST)]
Elapsed = Annotated[float, Field(ge=0, le=1e12)]
