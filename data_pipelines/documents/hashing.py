"""Hashes of texts that never change, and the split of a document."""

import hashlib

HASH_BYTES = 16


def stable_hash(text: str, purpose: str) -> bytes:
    """16 bytes that depend on the text and on what they are for, and on nothing else."""
    person = purpose.encode()
    return hashlib.blake2b(text.encode(), digest_size=HASH_BYTES, person=person).digest()


def stable_fraction(text: str, purpose: str) -> float:
    """A hash as a number in [0, 1)."""
    return int.from_bytes(stable_hash(text, purpose)[:6], "big") / 2**48


def split_of(document_id: str, *, validation: float, test: float) -> str:
    """The split of a document: a function of its id alone."""
    fraction = stable_fraction(document_id, "split")
    if fraction < test:
        return "test"
    # Counted from the other end, so that a larger share of one split takes nothing from the other.
    return "validation" if fraction >= 1 - validation else "train"
