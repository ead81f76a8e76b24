"""Text of any origin as HTML that shows every character and obeys none.

    <b>            &lt;b&gt;                 markup is text
    NUL, ESC       ⟨U+0000⟩ ⟨U+001B⟩         a control character is named: fonts lack its picture
    U+202E         ⟨U+202E⟩                  what turns the direction of text, or is not seen, too

Line ends and tabs stay, as pages keep white space. So do the joiners inside words and emoji.
"""

import html
import re
import unicodedata

_KEPT = "\n\t\u200c\u200d"
# Control, invisible format, half of a surrogate pair, line and paragraph separators.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_CANDIDATES = re.compile(r"[^\n\t -~]")


def visible(text: str) -> str:
    """The text with names for characters that are not seen, or that reorder others."""
    return _CANDIDATES.sub(lambda match: _shown(match[0]), text)


def escape(text: str) -> str:
    """The text as HTML, for elements and quoted attributes, with hidden characters made visible."""
    return html.escape(visible(text))


def _shown(character: str) -> str:
    """One character, or its name."""
    if character in _KEPT or unicodedata.category(character) not in _HIDDEN:
        return character
    return f"\u27e8U+{ord(character):04X}\u27e9"
