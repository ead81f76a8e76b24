"""Generated tokens as text while they come, up to a stop string.

With the stop string "END" and tokens "a", " E", "N", "s", "END." come out:

    token     a    " E"   "N"   "s"    "END."
    comes     a    " "    ""    ENs    ""       "E" and "EN" may still become "END": they come later
"""

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"  # a decoder's output for a character whose bytes are not all there


class TextStream:
    """The text of one continuation.

    Attributes:
      text: all that has come out.
      stopped: whether a stop string has come; it is not part of the text, and nothing comes after it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        """`decode` gives the text of tokens; `stop` are strings that end the text."""
        self.text, self.stopped = "", False
        self._decode, self._stop = decode, tuple(stop)
        self._tokens: list[int] = []

    def push(self, token: int) -> str:
        """Takes a token; gives the text that can no longer become a stop string or another character."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        ends = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._out(text[: min(ends)])
        text = text.rstrip(_INCOMPLETE)
        return self._out(text[: len(text) - self._held(text)])

    def finish(self) -> str:
        """Gives the rest, at the end of the text."""
        return "" if self.stopped else self._out(self._decode(self._tokens))

    def _held(self, text: str) -> int:
        """How many last characters may be the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _out(self, text: str) -> str:
        """The new part of a text."""
        new = text[len(self.text) :]
        self.text += new
        return new
