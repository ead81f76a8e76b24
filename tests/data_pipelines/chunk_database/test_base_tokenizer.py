"""A base model's tokeniser gives its ids, and gives every text back."""

import inspect
import json
import shutil
import sys
import unicodedata

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from data_pipelines.chunk_database import ChunkDatabase, base_tokenizer, byte_level
from data_pipelines.chunk_database.base_tokenizer import (
    check_base_tokenizer,
    prepare_base_tokenizer,
    tokenizer_files,
)
from data_pipelines.chunk_database.database import prepare_chunks
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.documents.documents import prepare_documents
from data_pipelines.workdir.verify import check_chunks, check_files, places
from retro_jax.errors import UserError
from tests.data_pipelines.chunk_database.base_tokenizers import (
    SPECIAL,
    train,
    train_sentencepiece,
    write_gguf,
)
from tests.data_pipelines.small import documents_config, tree, write_texts

_SNIPPETS = [
    "\u2581", "\0", "\x04", "\ufffd", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\ufeff", "1", "2345",
    "'s", "'LL", "don't", "<0x41>", "<s>", "</s>", "<|endoftext|>", "<|im_end|>", "<x3>", "<tool>", " <tool> ",
    "e\u0301", "é", "ﬁ", "\U0001f99e", "\U000e0041", "\U00050000", "日本", "½", "٣", "lobster", "def f(x):",
    inspect.getsource(base_tokenizer._write),
]  # fmt: skip
_UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
_TEXTS = st.lists(st.sampled_from(_SNIPPETS) | _UNICODE, max_size=30).map("".join)
_FORMS = ["gpt-2", "smollm", "llama-bpe", "qwen2", "NFC", "gguf", "missing bytes", "sentencepiece"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder by the name of how words are cut, made once."""
    made = {}

    def of(pre):
        if pre not in made:
            made[pre] = tmp_path_factory.mktemp("base")
            if pre == "sentencepiece":
                train_sentencepiece(made[pre])
            else:
                normalizer = normalizers.NFC() if pre == "NFC" else None
                train(made[pre], "gpt-2" if pre == "NFC" else pre, normalizer)
        return made[pre]

    return of


@pytest.fixture(scope="module", params=_FORMS)
def tokenizer(request, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    source = base({"gguf": "smollm", "missing bytes": "gpt-2"}.get(request.param, request.param))
    if request.param == "gguf":
        write_gguf(source, "smollm", folder / "m.gguf")
        source = folder / "m.gguf"
    elif request.param == "missing bytes":
        shutil.copytree(source, folder / "base")
        source = folder / "base"
        _without(source, [0x04, 0x13, 0xF1])
    prepare_base_tokenizer(folder / "tokenizer", source)
    return Tokenizer.open(folder / "tokenizer", verify=True)


def _without(folder, values):
    """Takes some bytes out of a vocabulary; their ids become tokens that no text has."""
    fields = json.loads((folder / "tokenizer.json").read_text())
    vocab = fields["model"]["vocab"]
    for value in values:
        vocab[f"unreachable{value}"] = vocab.pop(byte_level._characters()[value])
    (folder / "tokenizer.json").write_text(json.dumps(fields))


@settings(max_examples=150, deadline=None)
@given(text=_TEXTS)
@example(text="".join(_SNIPPETS) * 20)
@example(text=" " * 500 + "x" * 500)
def test_lossless_and_bytes_exact_for_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.num_bytes(ids) == len(text.encode()) == tokenizer.byte_lengths[ids].sum()
    assert not tokenizer.special_ids & set(ids.tolist())
    assert not {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())


@settings(max_examples=60, deadline=None)
@given(text=_TEXTS)
@example(text="it's 12345 years, WON'T\n\n   be ok  ")
@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "NFC"])
def test_ids_are_those_of_the_base(base, tmp_path_factory, pre, text):
    text = unicodedata.normalize("NFC", text).replace("<tool>", "")  # it eats spaces there
    theirs = tokenizers.Tokenizer.from_file(str(base(pre) / "tokenizer.json"))
    theirs.encode_special_tokens = True
    ours = _opened(base(pre), tmp_path_factory)
    assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids


_OPENED: dict = {}


def _opened(source, tmp_path_factory):
    """The prepared tokeniser of a source, made once."""
    if source not in _OPENED:
        place = tmp_path_factory.mktemp("opened") / "tokenizer"
        prepare_base_tokenizer(place, source)
        _OPENED[source] = Tokenizer.open(place)
    return _OPENED[source]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_gguf_has_the_ids_of_the_folder(base, pre, tmp_path):
    write_gguf(base(pre), pre, tmp_path / "m.gguf")
    prepare_base_tokenizer(tmp_path / "a", tmp_path / "m.gguf")
    prepare_base_tokenizer(tmp_path / "b", base(pre))
    a, b = Tokenizer.open(tmp_path / "a"), Tokenizer.open(tmp_path / "b")
    assert a.token_bytes == b.token_bytes
    for text in ("".join(_SNIPPETS), "year 1234567 don't WON'T\n\n  if x:\n", "    ", " a  b"):
        assert a.encode(text).tolist() == b.encode(text).tolist()
    for name in ("bos_id", "eos_id", "pad_id", "vocab_size"):
        assert getattr(a, name) == getattr(b, name)
    assert a.manifest.fact("adds_bos") == b.manifest.fact("adds_bos") == (pre == "llama-bpe")


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_gguf_becomes_the_files_of_a_folder(base, pre, tmp_path):
    """They are the same tokeniser, here and in the package that others read them with."""
    write_gguf(base(pre), pre, tmp_path / "m.gguf", padding_token_id=3, chat_template="{{ x }}")
    (tmp_path / "folder").mkdir()
    for name, data in tokenizer_files(tmp_path / "m.gguf").items():
        (tmp_path / "folder" / name).write_bytes(data)
    manifest = prepare_base_tokenizer(tmp_path / "a", tmp_path / "m.gguf")
    again = prepare_base_tokenizer(tmp_path / "b", tmp_path / "folder")
    assert again.settings == manifest.settings and again.facts == manifest.facts
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "folder" / "tokenizer.json"))
    own = tokenizers.Tokenizer.from_file(str(base(pre) / "tokenizer.json"))
    snippets = "".join(_SNIPPETS).replace("<tool>", "")  # GGUF does not know that it eats spaces
    for text in (snippets, "<|im_start|>year 1234567<x3>"):
        assert theirs.encode(text).ids == own.encode(text).ids
    settings = json.loads((tmp_path / "folder" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>" and settings["chat_template"]
    assert tokenizer_files(base(pre)) == {}


def test_digits_and_spaces(base, tmp_path_factory):
    smollm = _opened(base("smollm"), tmp_path_factory)
    assert [smollm.token_bytes[i] for i in smollm.encode("12345")] == [b"1", b"2", b"3", b"4", b"5"]
    assert smollm.encode("lobster").tolist() != smollm.encode(" lobster").tolist()
    assert smollm.decode(smollm.encode("lobster")[:1]) != " "


def test_sentencepiece_ids_are_those_of_the_base_but_for_the_space_before(base, tmp_path_factory):
    theirs = sentencepiece.SentencePieceProcessor(str(base("sentencepiece") / "tokenizer.model"))
    ours = _opened(base("sentencepiece"), tmp_path_factory)
    text = "the lobster = is\n  blue  日本 def f(x):\n"
    assert ours.encode(" " + text).tolist() == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 400)
    assert ours.manifest.fact("adds_bos")


def test_batches_equal_single_texts_for_any_number_of_threads(tokenizer):
    texts = [*_SNIPPETS, "", "".join(_SNIPPETS)]
    single = [tokenizer.encode(text).tolist() for text in texts]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == single
    one = Tokenizer.open(tokenizer.directory, threads=1)
    assert [ids.tolist() for ids in one.encode_batch(texts)] == single
    assert tokenizer.encode_batch([]) == []
    with pytest.raises(UserError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800")


def test_bytes_that_are_missing_become_special_tokens(base, tmp_path):
    shutil.copytree(base("gpt-2"), tmp_path / "base")
    _without(tmp_path / "base", [0x04, 0x13, 0xF1])
    facts = prepare_base_tokenizer(tmp_path / "out", tmp_path / "base").facts
    last = SPECIAL.index("<x8>")
    assert facts["spelt_bytes"] == {"4": last, "19": last - 1, "241": last - 2}
    ours = Tokenizer.open(tmp_path / "out")
    assert ours.token_bytes[last] == b"\x04"
    assert ours.encode("a\x04").tolist()[-1] == last
    assert ours.special_ids == set(range(last - 2))
    _without(tmp_path / "base", [*range(1, 4), *range(5, 9), 0x0B, 0x0C, 0x0E, 0x0F])
    message = (
        "lacks 14 of the bytes of UTF-8, and has 10 spare special tokens: expected a byte-level"
    )
    with pytest.raises(UserError, match=message):
        prepare_base_tokenizer(tmp_path / "more", tmp_path / "base")


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        # bos, eos and pad of documents; rows are 420.
        ({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, (0, 0, 420)),
        ({"bos_token": None, "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}, (0, 0, 3)),
        ({"bos_token": "<|im_start|>", "add_bos_token": True}, (1, 0, 420)),
        ({"pad_token": "<|endoftext|>"}, (0, 0, 420)),
        ({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}, (0, 0, 420)),
        ({"pad_token": {"content": "<x0>"}}, (0, 0, 4)),
    ],
)
def test_special_ids_of_documents(base, tmp_path, stated, expected):
    shutil.copytree(base("gpt-2"), tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(stated))
    manifest = prepare_base_tokenizer(tmp_path / "out", tmp_path / "base", vocab_size=420)
    ours = Tokenizer.open(tmp_path / "out")
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == expected
    assert ours.vocab_size == manifest.fact("vocab_size") == 420
    assert len(ours.token_bytes) == len(ours.byte_lengths) == max(420, ours.pad_id + 1)
    assert ours.decode([ours.bos_id, *ours.encode("a b"), ours.eos_id, ours.pad_id]) == "a b"
    assert ours.byte_lengths[[ours.pad_id, ours.bos_id, ours.eos_id]].tolist() == [0, 0, 0]
    assert max(ours.special_ids) < 420


def test_ids_of_config_json_count_where_no_token_is_named(base, tmp_path):
    shutil.copytree(base("gpt-2"), tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").unlink()
    ids = {"bos_token_id": 5, "eos_token_id": [0, 2], "pad_token_id": 6}
    (tmp_path / "base" / "config.json").write_text(json.dumps(ids))
    facts = prepare_base_tokenizer(tmp_path / "out", tmp_path / "base").facts
    assert (facts["bos_id"], facts["eos_id"], facts["pad_id"]) == (0, 0, 6)


@pytest.mark.parametrize("form", ["smollm", "sentencepiece"])
def test_a_chunk_database_is_made_with_it(base, tmp_path, form):
    write_texts(tmp_path / "texts", 20)
    prepare_documents(tmp_path / "w" / "documents", documents_config(tmp_path / "texts"))
    place = tmp_path / "w" / "tokenizer"
    manifest = prepare_base_tokenizer(place, base(form), vocab_size=420)
    manifest_again = prepare_base_tokenizer(place, base(form), vocab_size=420)
    assert manifest == manifest_again
    prepare_chunks(
        tmp_path / "w" / "chunks" / "train", tmp_path / "w" / "documents" / "train", place
    )
    ours, database = Tokenizer.open(place), ChunkDatabase.open(tmp_path / "w" / "chunks" / "train")
    assert database.manifest.parents["tokenizer"] == manifest.hash
    assert (database.pad_id, database.vocab_size) == (420, 420)
    rows = database.chunks(np.arange(len(database)))
    assert (rows == ours.pad_id).any()
    text = "".join(ours.decode(row) for row in rows)
    texts = [path.read_text() for path in sorted((tmp_path / "texts").iterdir())]
    assert any(each and each in text for each in texts)
    assert check_chunks(tmp_path / "w", "train", 5, 0) == "5 documents tokenised, equal"
    known = places()
    assert "files" in check_files(tmp_path / "w", "tokenizer", known["tokenizer"])


def test_another_base_does_not_pass_for_the_first(base, tmp_path):
    prepare_base_tokenizer(tmp_path / "out", base("gpt-2"))
    before = tree(tmp_path / "out")
    with pytest.raises(
        UserError, match=r"made with other settings: sha256: .* -> .*; expected the"
    ):
        prepare_base_tokenizer(tmp_path / "out", base("smollm"))
    assert tree(tmp_path / "out") == before


def _refused(source, message, **arguments):
    place = source.parent / "refused"
    with pytest.raises(UserError, match=message) as caught:
        prepare_base_tokenizer(place, source, **arguments)
    assert "\n" not in str(caught.value)
    assert str(source) in str(caught.value)
    assert not place.exists()


def _changed(source, folder, change):
    """A copy of a folder whose tokenizer.json went through `change`."""
    shutil.copytree(source, folder)
    fields = json.loads((folder / "tokenizer.json").read_text())
    change(fields)
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    return folder


def _special(fields, text):
    """A token of texts that is stated to be special, as add_special_tokens makes of it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": fields["model"]["vocab"][text], "content": text, "special": True, **flags}


@pytest.mark.parametrize(("side", "pad"), [("Left", 3), ("Right", 1)])
def test_padding_does_not_change_what_begins_a_document(base, tmp_path, side, pad):
    """Eight tokens of padding before a text are no bos, and after it bos is no padding."""
    state = {"strategy": {"Fixed": 8}, "direction": side, "pad_to_multiple_of": None}
    state |= {"pad_id": pad, "pad_type_id": 0, "pad_token": SPECIAL[pad]}
    for pre in ("llama-bpe", "gpt-2"):
        plain = prepare_base_tokenizer(tmp_path / pre, base(pre)).facts
        padded = _changed(base(pre), tmp_path / f"base {pre}", lambda f: f.update(padding=state))
        assert prepare_base_tokenizer(tmp_path / f"{pre} out", padded).facts == plain
        assert plain["adds_bos"] == (pre == "llama-bpe")


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"bos_token": "<x1>"}, "out has bos_id 1: expected 5, that of .*base"),
        ({"eos_token": "<x1>"}, None),
        ({"add_bos_token": True}, None),
    ],
)
def test_a_base_whose_special_ids_have_changed(base, tmp_path, stated, message):
    """What documents begin and end with is compared, not the vocabulary alone."""
    source = shutil.copytree(base("llama-bpe"), tmp_path / "base")
    rows = prepare_base_tokenizer(tmp_path / "out", source).settings["vocab_size"]
    check_base_tokenizer(tmp_path / "out", source, vocab_size=rows)
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | stated))
    if message is None:  # <|endoftext|> ends documents still; bos is put first already
        check_base_tokenizer(tmp_path / "out", source, vocab_size=rows)
        return
    path.write_text(json.dumps(stated | {"add_bos_token": True, "eos_token": "<|im_end|>"}))
    with pytest.raises(UserError, match=message):
        check_base_tokenizer(tmp_path / "out", source, vocab_size=rows)


def test_a_tokeniser_of_other_weights(base, tmp_path):
    shutil.copytree(base("gpt-2"), tmp_path / "base")
    tokens = prepare_base_tokenizer(tmp_path / "out", tmp_path / "base").fact("tokens")
    message = rf"tokenizer.json has {tokens} tokens: expected those of the weights' {{}} rows"
    _refused(tmp_path / "base", message.format(tokens - 1), vocab_size=tokens - 1)
    _refused(tmp_path / "base", message.format(32_000), vocab_size=32_000)
    write_gguf(tmp_path / "base", "gpt-2", tmp_path / "m.gguf")
    _refused(tmp_path / "m.gguf", f"m.gguf has {tokens} tokens: expected", vocab_size=300)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: f.update(normalizer={"type": "Lowercase"}),
            "normalises by 'Lowercase': expected",
        ),
        (
            lambda f: f.update(pre_tokenizer=None),
            "is no byte-level BPE: expected one, or a tokenizer.m",
        ),
        (
            lambda f: f.update(pre_tokenizer={"type": "Whitespace"}),
            "is no byte-level BPE: expected one",
        ),
        (
            lambda f: f["pre_tokenizer"].update(
                type="Sequence", pretokenizers=[{"type": "Whitespace"}, dict(f["pre_tokenizer"])]
            ),
            "cuts words by 'Whitespace': expected no loss of text",
        ),
        (
            lambda f: f["model"].update(end_of_word_suffix="</w>"),
            "cannot be read|end_of_word_suffix is",
        ),
        (
            lambda f: f["model"].update(type="Mystery"),
            r"cannot be read \(.*\): expected a tokenizer.json",
        ),
        (
            lambda f: f["added_tokens"][-1].update(id=999),
            "'<tool>' has id 999: expected 3.., the next",
        ),
        (
            lambda f: f["model"]["vocab"].pop("a"),
            r"cannot be read \(.*\): expected a tokenizer.json",
        ),
        (
            lambda f: f["added_tokens"].append(_special(f, "!")),
            'tokenizer.json makes "" of a text: expected "!"',
        ),
        (
            lambda f: f.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
                    "pair": [],
                    "special_tokens": {},
                }
            ),
            r"(cannot encode a text|cannot be read) \(.*\): expected",
        ),
    ],
)
def test_bad_tokenizer_json(base, tmp_path, change, message):
    _refused(_changed(base("gpt-2"), tmp_path / "base", change), message)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"bos_token": "<bos>"}, "has no special token '<bos>': expected the bos_token"),
        ({"eos_token": "the"}, "has no special token 'the': expected the eos_token"),
        ({"pad_token_id": 399}, "has no special token 399: expected the pad_token_id"),
    ],
)
def test_bad_special_tokens(base, tmp_path, stated, message):
    shutil.copytree(base("gpt-2"), tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(stated))
    _refused(tmp_path / "base", message)


def test_bad_folders(base, tmp_path):
    _refused(
        tmp_path / "none", "none is no base model: expected a Hugging Face folder or a .gguf file"
    )
    (tmp_path / "base").mkdir()
    _refused(tmp_path / "base", "base has no tokeniser: expected tokenizer.json or tokenizer.model")
    (tmp_path / "base" / "tokenizer.json").write_text("{")
    _refused(tmp_path / "base", "tokenizer.json cannot be read|tokenizer.json is not valid JSON")

    def without_end(fields):
        fields["added_tokens"][0]["content"] = "<|start|>"
        fields["model"]["vocab"]["<|start|>"] = fields["model"]["vocab"].pop("<|endoftext|>")

    folder = _changed(base("gpt-2"), tmp_path / "no end", without_end)
    (folder / "tokenizer_config.json").unlink()
    _refused(folder, "has no end-of-text token: expected an eos_token")


def test_bad_sentencepiece_models(base, tmp_path, monkeypatch):
    path = tmp_path / "base" / "tokenizer.model"
    path.parent.mkdir()
    path.write_bytes((base("sentencepiece") / "tokenizer.model").read_bytes()[:1000])
    _refused(path.parent, "tokenizer.model cannot be read: expected a SentencePiece model")
    (tmp_path / "other").mkdir()
    train_sentencepiece(tmp_path / "other", byte_fallback=False, vocab_size=200)
    _refused(
        tmp_path / "other", "tokenizer.model has no pieces of single bytes: expected byte fallb"
    )
    monkeypatch.setattr(base_tokenizer, "_IDENTITY", b"")
    path.write_bytes((base("sentencepiece") / "tokenizer.model").read_bytes())
    _refused(path.parent, 'tokenizer.model makes " .*" of a text: expected "')


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model is 'llama': expected 'gpt2', byte-level BPE"),
        (
            {"pre": "tekken"},
            r"tokenizer.ggml.pre is 'tekken': expected one of \['gpt-2', 'llama-bpe'",
        ),
        ({"pre": None}, "tokenizer.ggml.pre is None: expected one of"),
        ({"tokens": None}, "has no tokenizer.ggml.tokens and merges: expected a vocabulary"),
        ({"token_type": [1, 2]}, "has 2 token types: expected 3.."),
        ({"token_type": 3}, "token_type is no list: expected integers"),
        ({"token_type": ["3"] * 400}, "token_type is no list: expected integers"),
        (
            {"bos_token_id": 77, "add_bos_token": True},
            "the bos token 77 is the text b'.*': expected a",
        ),
        ({"bos_token_id": 70_000}, "the bos token's id is 70000: expected one below 3.."),
    ],
)
def test_bad_gguf_vocabularies(base, tmp_path, changes, message):
    write_gguf(base("gpt-2"), "gpt-2", tmp_path / "m.gguf", **changes)
    _refused(tmp_path / "m.gguf", message)


def test_an_unknown_encoding(base, tmp_path):
    prepare_base_tokenizer(tmp_path / "out", base("gpt-2"))
    path = tmp_path / "out" / "manifest.json"
    path.write_text(path.read_text().replace("byte-level BPE", "word pieces"))
    with pytest.raises(UserError, match="has an encoding 'word pieces': expected one of"):
        Tokenizer.open(tmp_path / "out")


def test_without_the_package_tokenizers(base, tmp_path, monkeypatch):
    folder = shutil.copytree(base("gpt-2"), tmp_path / "base")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    _refused(folder, r"tokenizers is not installed: expected `pip install retro-jax\[fit\]`")


def test_a_file_by_itself_is_a_tokeniser(tmp_path):
    """As the packages tokenizers and SentencePiece save one; other files beside it do not count."""
    train(tmp_path)
    train_sentencepiece(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 7, "bos_token_id": 5}')
    text = "a  b 日本\t\0 \u2581 <s>"
    for name, file in (("tokenizer.json", "mine.json"), ("tokenizer.model", "mine.model")):
        (tmp_path / name).rename(tmp_path / file)
        tokenizer = base_tokenizer.open_base_tokenizer(tmp_path / file)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)  # as SentencePiece declares them
    with pytest.raises(UserError, match=r"none.json is no base model"):
        base_tokenizer.open_base_tokenizer(tmp_path / "none.json")
