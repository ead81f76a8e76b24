"""WikiText's tokenised text as ordinary prose: "1 @,@ 500 people ( or so ) ." -> "1,500 people (or so)."

Perplexity by word of the detokenised text has the words of the tokenised one as its denominator, so
that figures of both variants can be compared. <unk> stays: its original word is unknown.
"""

import re

_HEADING = re.compile(r"^ ((?:= )+)(.*?)((?: =)+) $")
_JOINED = re.compile(r" @([-,.])@ ")  # inside a word or a number
_LEFT = re.compile(r" ([.,;:!?%)\]}]|\.\.\.)(?= |$)")  # belongs to the word before it
_RIGHT = re.compile(r"(?:(?<= )|^)([(\[{$£€#]) ")  # belongs to the word after it
_SHORT = re.compile(r" ('(?:s|re|ve|ll|d|m|t|S)|n't)(?= |$)")
_PAIRED = re.compile(r'" (.*?) "')
_SINGLE = re.compile(r"(?:(?<= )|^)' ([^']*?) '(?= |$)")
_PLURAL = re.compile(r"(?<=s) '(?= |$)")


def detokenise(text: str) -> str:
    """The text line by line, with as many line ends as it had."""
    return "\n".join(_line(line) for line in text.split("\n"))


def _line(line: str) -> str:
    """One line; WikiText's begin and end with a space."""
    heading = _HEADING.match(line)
    if heading:
        marks = "=" * heading[1].count("=")
        return f"{marks} {_prose(heading[2])} {marks}"
    return _prose(line.strip(" "))


def _prose(text: str) -> str:
    """Words and marks, joined as they are written."""
    text = _JOINED.sub(r"\1", text)
    text = _PAIRED.sub(r'"\1"', text)
    text = _SHORT.sub(r"\1", text)
    text = _SINGLE.sub(r"'\1'", text)
    text = _PLURAL.sub("'", text)
    text = _RIGHT.sub(r"\1", text)
    before = ""
    while before != text:  # a mark may be followed by another: ") ,"
        before, text = text, _LEFT.sub(r"\1", text)
    return text
