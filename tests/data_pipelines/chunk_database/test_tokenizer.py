"""The tokeniser gives every text back, and its tokens' bytes add up, whatever the text."""

import dataclasses
import inspect

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.chunk_database import tokenizer as module
from data_pipelines.chunk_database.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from data_pipelines.documents.documents import prepare_documents
from retro_jax.errors import UserError
from tests.data_pipelines.small import TOKENIZER, documents_config, tree, write_texts

# What SentencePiece, or the escape, takes to mean something; and what code looks like.
_SNIPPETS = [
    "\u2581", "\0", "\U0010fffd", "\U0010fffd0", "\U0010fffd1", "0", "1", "2", " ", "  ", "    ", "\n",
    "\r\n", "\t", "\u2047", "\u2585", "\ufeff", "\u00a0", "\u3000", "<0x41>", "<s>", "</s>", "<unk>",
    "<pad>", "the", " the", "lobster", "e\u0301", "\U0001f99e", "日本", inspect.getsource(module._segments),
]  # fmt: skip
_UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
_TEXTS = st.lists(st.sampled_from(_SNIPPETS) | _UNICODE, max_size=40).map("".join)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_texts(folder / "texts", 60)
    prepare_documents(folder / "documents", documents_config(folder / "texts"))
    return folder / "documents" / "train"


@pytest.fixture(scope="module", params=["bpe", "unigram", "no whitespace pieces", "whole code"])
def tokenizer(request, documents, tmp_path_factory):
    config = TOKENIZER
    folder = tmp_path_factory.mktemp("trained")
    if request.param == "unigram":
        config = dataclasses.replace(config, model_type="unigram")
    elif request.param == "no whitespace pieces":
        config = dataclasses.replace(config, whitespace_pieces=False)
    elif request.param == "whole code":
        (folder / "code").mkdir()
        (folder / "code" / "a.txt").write_text(inspect.getsource(sentencepiece)[:60_000])
        prepare_documents(
            folder / "documents", documents_config(folder / "code", validation=0, test=0)
        )
        documents, config = folder / "documents" / "train", TokenizerConfig(vocab_size=1000)
    train_tokenizer(folder / "out", documents, config)
    return Tokenizer.open(folder / "out", verify=True)


@settings(max_examples=150, deadline=None)
@given(text=_TEXTS)
@example(text="".join(_SNIPPETS) * 30)
@example(text="x" * 3000 + " " * 3000 + "y")
@example(text="word " * 1000)
def test_lossless_and_bytes_exact_for_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.num_bytes(ids) == len(text.encode())
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()
    assert not len(ids) or (ids.min() > 3 and ids.max() < tokenizer.vocab_size)


@settings(max_examples=100, deadline=None)
@given(text=_TEXTS)
@example(text=inspect.getsource(module))
@example(text=" " * 1000 + "a" + " " * 1000)
def test_cutting_into_segments_changes_no_token(tokenizer, text):
    whole = tokenizer.encoding.model.encode(module._escape(text))
    assert tokenizer.encode(text).tolist() == whole


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_bytes_of_any_tokens_add_up(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    split = data.draw(st.integers(0, len(ids)))
    decoded = tokenizer.decode_bytes(ids)
    assert tokenizer.decode_bytes(ids[:split]) + tokenizer.decode_bytes(ids[split:]) == decoded
    assert tokenizer.num_bytes(ids) == len(decoded) == tokenizer.byte_lengths[ids].sum()
    assert tokenizer.decode(np.array(ids, np.int32)) == decoded.decode(errors="replace")


def test_batches_equal_single_texts_for_any_number_of_threads(tokenizer):
    texts = [*_SNIPPETS, "", "".join(_SNIPPETS) * 5, ""]
    single = [tokenizer.encode(text).tolist() for text in texts]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == single
    threaded = Tokenizer.open(tokenizer.directory, threads=3)
    assert [ids.tolist() for ids in threaded.encode_batch(texts)] == single
    assert tokenizer.encode_batch([]) == []


def test_special_tokens(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.token_bytes[:4] == [b""] * 4
    assert tokenizer.special_ids == {0, 1, 2, 3}
    assert (
        len(tokenizer.token_bytes) == tokenizer.vocab_size == tokenizer.manifest.fact("vocab_size")
    )
    for character in "\u2581\0\U0010fffd":
        assert len(tokenizer.encode(character)) == 1, "an escape is one token of its own"
    for text in ("<s>", "</s>", "<unk>", "<pad>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([1, *tokenizer.encode("a b"), 2, 0, 0]) == "a b"


def test_a_character_split_between_tokens_has_exact_bytes(tokenizer):
    ids = tokenizer.encode("\U0001f99e")
    assert len(ids) == 4
    assert [tokenizer.num_bytes(ids[i : i + 1]) for i in range(4)] == [1] * 4
    assert tokenizer.decode(ids[:3]) == "\ufffd"


def test_lone_surrogates_are_no_text(tokenizer):
    with pytest.raises(UserError, match="lone surrogate at character 2: expected valid Unicode"):
        tokenizer.encode_batch(["fine", "ab\ud800c"])


def test_whitespace_pieces_are_a_setting(documents, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.txt").write_text("def f(x):\n        return x\n" * 50)
    prepare_documents(tmp_path / "d", documents_config(tmp_path / "t", validation=0, test=0))
    counts = []
    for allowed in (True, False):
        config = TokenizerConfig(vocab_size=290, whitespace_pieces=allowed)
        train_tokenizer(tmp_path / str(allowed), tmp_path / "d" / "train", config)
        counts.append(len(Tokenizer.open(tmp_path / str(allowed)).encode("        return")))
    assert counts[0] < counts[1]


def test_training_is_byte_identical_and_done_once(documents, tmp_path):
    manifest = train_tokenizer(tmp_path / "a", documents, TOKENIZER)
    assert train_tokenizer(tmp_path / "b", documents, TOKENIZER) == manifest
    before = tree(tmp_path / "a")
    assert before == tree(tmp_path / "b")
    assert train_tokenizer(tmp_path / "a", documents, TOKENIZER) == manifest
    other = dataclasses.replace(TOKENIZER, vocab_size=315)
    with pytest.raises(UserError, match="vocab_size: 320 -> 315; expected the same"):
        train_tokenizer(tmp_path / "a", documents, other)
    assert tree(tmp_path / "a") == before
    parent = Manifest.open(documents, "documents")
    Manifest.open(tmp_path / "a", "tokenizer", {"documents": (parent, documents)})


def test_the_training_sample_is_bounded_and_by_hash(documents, tmp_path):
    total = Manifest.open(documents, "documents").fact("bytes")
    sizes = set()
    for seed in range(3):
        config = dataclasses.replace(
            TOKENIZER, vocab_size=310, max_training_bytes=total // 2, seed=seed
        )
        size = train_tokenizer(tmp_path / str(seed), documents, config).fact("training_bytes")
        assert total // 8 < size <= total // 2
        sizes.add(size)
    assert len(sizes) > 1, "another seed should take another sample"
    everything = train_tokenizer(tmp_path / "all", documents, TOKENIZER).fact("training_bytes")
    assert everything > max(sizes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 263}, "vocab_size is 263: expected more than 263"),
        ({"model_type": "word"}, "model_type is 'word': expected 'bpe' or 'unigram'"),
        ({"character_coverage": 0.0}, "character_coverage is 0.0: expected a share from 0 to 1"),
        ({"max_training_bytes": 0}, "max_training_bytes is 0: expected a positive number"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(UserError, match=f"TokenizerConfig.{message}"):
        TokenizerConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 50_000}, "vocab_size is 50000: SentencePiece cannot train it .*50000"),
        ({"vocab_size": 270}, "vocab_size is 270: SentencePiece cannot train it"),
        ({"max_training_bytes": 1}, "max_training_bytes is 1: expected enough for one"),
    ],
)
def test_text_and_settings_that_do_not_fit_claim_nothing(documents, tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        train_tokenizer(tmp_path / "out", documents, dataclasses.replace(TOKENIZER, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    train_tokenizer(tmp_path / "out", documents, TOKENIZER)


def test_opening_what_is_not_there(tmp_path, documents):
    with pytest.raises(UserError, match=r"has no manifest.json"):
        Tokenizer.open(tmp_path)
    with pytest.raises(UserError, match="holds 'documents': expected 'tokenizer'"):
        Tokenizer.open(documents)
