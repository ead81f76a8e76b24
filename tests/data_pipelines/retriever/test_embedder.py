"""Texts to vectors: against another library's MiniLM, and what must not change them."""

import json
import pathlib
import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from data_pipelines.retriever import embedder as module
from data_pipelines.retriever.embedder import (
    BertFolder,
    Embedder,
    WordPiece,
    find_model,
    is_plain,
)
from retro_jax.errors import UserError
from tests.data_pipelines.retriever import bert_folder
from tests.data_pipelines.retriever.bert_folder import VOCABULARY

DATA = pathlib.Path(__file__).parents[2] / "data"


@pytest.fixture(scope="module")
def minilm():
    return Embedder.open("minilm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bert_folder.write(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def tiny(folder):
    return Embedder.open(folder, batch=8)


@pytest.fixture(scope="module")
def reference():
    return json.loads((DATA / "minilm_reference.json").read_text(encoding="utf-8"))


def test_minilm_equals_another_library(minilm, reference):
    vectors = minilm.embed([row["text"] for row in reference])
    expected = np.load(DATA / "minilm_reference.npy")
    assert expected.shape == vectors.shape == (20, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)
    assert np.abs(vectors - expected).max() < 1e-5


def test_minilm_word_pieces_equal_another_library(minilm, reference):
    pieces = minilm.word_piece.encode([row["text"] for row in reference])
    for i, row in enumerate(reference):
        ids = pieces.ids[pieces.ends[i] : pieces.ends[i + 1]].tolist()
        assert [101, *ids, 102] == row["word_pieces"], row["text"]


def simple_word_piece(text, vocabulary):
    """BERT's tokenisation as its paper's repository describes it, one character at a time."""
    words, word, pieces = [], "", []
    for c in unicodedata.normalize("NFD", text.lower()):
        if unicodedata.category(c) == "Mn":
            continue
        if c.isspace():
            words, word = [*words, word], ""
        elif unicodedata.category(c)[0] == "P" or (c.isascii() and not c.isalnum()):
            words, word = [*words, word, c], ""
        else:
            word += c
    for whole in filter(None, [*words, word]):
        found, start = [], 0
        while start < len(whole):
            ends = range(len(whole), start, -1)
            names = [(("##" if start else "") + whole[start:end], end) for end in ends]
            match = next(((name, end) for name, end in names if name in vocabulary), None)
            if match is None:
                found = ["[UNK]"]
                break
            found.append(match[0])
            start = match[1]
        pieces += found
    return [vocabulary[piece] for piece in pieces]


def test_word_piece_equals_a_simple_one(minilm, reference):
    vocabulary = {piece: i for i, piece in enumerate(minilm.model.vocabulary)}
    texts = [row["text"] for row in reference if "東" not in row["text"]]
    texts += ["Éclair ÀÉÎ x2y", "unaffable\tfoo_bar(baz)", "\n", "λ Ж"]
    pieces = minilm.word_piece.encode(texts)
    for i, text in enumerate(texts):
        ids = pieces.ids[pieces.ends[i] : pieces.ends[i + 1]].tolist()
        assert ids == simple_word_piece(text, vocabulary), text


def random_texts(count, seed=0):
    """Texts of 1 to 30 words, so of many lengths, some beyond what the tiny BERT reads."""
    rng = np.random.default_rng(seed)
    words = np.array(["def", "return", "a", "b+", "lobster", "crustacean", "x"])
    return [" ".join(rng.choice(words, rng.integers(1, 31))) for _ in range(count)]


def test_a_vector_depends_on_its_own_text_only(tiny):
    texts = random_texts(60)
    vectors = tiny.embed(texts)
    assert vectors.shape == (60, 12)
    alone = np.concatenate([tiny.embed([text]) for text in texts])
    np.testing.assert_allclose(vectors, alone, atol=1e-5)
    order = np.random.default_rng(1).permutation(60)
    np.testing.assert_allclose(tiny.embed([texts[i] for i in order]), vectors[order], atol=1e-5)
    assert np.unique(vectors.round(4), axis=0).shape[0] == len(set(texts))


def test_the_same_call_gives_the_same_bits(tiny):
    texts = random_texts(60)
    assert tiny.embed(texts).tobytes() == tiny.embed(texts).tobytes()


def test_texts_without_word_pieces_have_no_vector(tiny):
    vectors = tiny.embed(["a b", "", " \n\t", "x"])
    assert np.isnan(vectors).all(1).tolist() == [False, True, True, False]
    np.testing.assert_allclose(vectors[[0, 3]], tiny.embed(["a b", "x"]), atol=1e-6)
    assert tiny.embed([]).shape == (0, 12)
    assert np.isnan(tiny.embed([" "])).all()


def test_texts_are_cut_at_the_longest_length(folder, tiny):
    assert tiny.model.max_length == 40
    text = "a b " * 40
    np.testing.assert_allclose(tiny.embed([text]), tiny.embed(["a b " * 19]), atol=1e-6)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    shorter = Embedder.open(folder)
    (folder / "sentence_bert_config.json").unlink()
    np.testing.assert_allclose(shorter.embed([text]), tiny.embed(["a b a b"]), atol=1e-6)
    assert np.abs(shorter.embed([text]) - tiny.embed([text])).max() > 1e-3


def test_computed_positions_are_counted(tiny):
    pieces = tiny.word_piece.encode(["a"] * 8 + ["a b c d e f g"] * 3 + [""])
    # Eight texts of 3 positions padded to 8, then a batch of 8 rows of 9 positions padded to 16.
    assert tiny.embed_pieces(pieces)[1] == 8 * 8 + 8 * 16


@pytest.mark.parametrize(
    ("length", "padded"),
    [(3, 8), (8, 8), (9, 16), (128, 128), (129, 192), (193, 256), (300, 384), (500, 512)],
)
def test_padded_lengths_are_few(length, padded):
    assert module._padded(length) == padded


def test_case_matters_as_the_folder_says(folder, tmp_path):
    bert_folder.write(tmp_path)
    assert BertFolder.open(tmp_path).lower_case
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY[:-1], "Word"]))
    assert not BertFolder.open(tmp_path).lower_case
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert BertFolder.open(tmp_path).lower_case
    upper = WordPiece(VOCABULARY, lower_case=False).encode(["DEF"]).ids.tolist()
    assert upper == [VOCABULARY.index("[UNK]")]
    assert WordPiece(VOCABULARY, lower_case=True).encode(["DEF"]).ids.tolist() == [4]


def test_the_identity_follows_the_files_and_holds_no_path(tmp_path):
    a = BertFolder.open(bert_folder.write(tmp_path / "a" / "bert")).identity
    b = BertFolder.open(bert_folder.write(tmp_path / "b" / "bert")).identity
    arrays = bert_folder.weights(seed=1)
    c = BertFolder.open(bert_folder.write(tmp_path / "c" / "bert", arrays=arrays)).identity
    assert a == b != c
    assert str(tmp_path) not in json.dumps(a)


def test_a_process_shares_one_embedder_of_the_same_files(tmp_path):
    first = Embedder.shared(BertFolder.open(bert_folder.write(tmp_path)))
    assert Embedder.shared(BertFolder.open(tmp_path)) is first
    bert_folder.write(tmp_path, arrays=bert_folder.weights(seed=1))
    other = Embedder.shared(BertFolder.open(tmp_path))
    assert np.abs(other.embed(["a"]) - first.embed(["a"])).max() > 1e-3


def test_refuses_what_is_no_model(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"BERT '/no/such': no such folder.*a name of minilm"):
        find_model("/no/such")
    monkeypatch.setitem(module.PACKAGED_MODELS, "minilm", ("retro-jax-no-such-package", "model"))
    with pytest.raises(UserError, match=r"retro-jax-no-such-package is not installed.*--no-deps"):
        find_model("minilm")


def test_refuses_a_bad_vocabulary(tmp_path):
    bert_folder.write(tmp_path)
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY[3:]))
    with pytest.raises(UserError, match=r"vocab\.txt: no \[CLS\]"):
        BertFolder.open(tmp_path)
    path.write_text("\n".join([*VOCABULARY, "more"]))
    with pytest.raises(UserError, match=r"vocab\.txt has 146 word pieces: expected at most 145"):
        BertFolder.open(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(
        UserError, match=r"vocab\.txt has byte 0xff at offset 0: expected a WordPiece"
    ):
        BertFolder.open(tmp_path)


def test_refuses_a_length_beyond_the_positions(tmp_path):
    bert_folder.write(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 512}')
    with pytest.raises(UserError, match="max_seq_length is 512: expected 3 to 40"):
        BertFolder.open(tmp_path)


def test_refuses_a_folder_without_weights(tmp_path):
    bert_folder.write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        _ = BertFolder.open(tmp_path).identity


def test_importing_the_pipeline_imports_neither_tensorflow_nor_scann():
    code = (
        "import sys, data_pipelines.retriever.neighbours, data_pipelines.retriever\n"
        "sys.exit(bool({'tensorflow', 'scann'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_tensorflow_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match=r"TensorFlow cannot be imported.*retro-jax\[data\]"):
        module.import_tensorflow()


@pytest.mark.parametrize("lower_case", [True, False])
def test_a_few_plain_texts_have_the_same_pieces_without_tensorflow(
    minilm, reference, lower_case, monkeypatch
):
    """On every plain character, alone and in words, with MiniLM's vocabulary; others need TensorFlow."""
    cut = WordPiece(minilm.model.vocabulary, lower_case)
    plain = [c for c in map(chr, range(0x3000)) if is_plain(c)]
    assert len(plain) == 98 + 18 + 63 + 122 + 96 + 17
    texts = [f"{c}{c} x{c}y {c}. A{c}" for c in plain]
    texts += [chr(i) * 40 + " [SEP] ##ing [UNK] don't --x" for i in range(33, 127)]
    texts += [row["text"] for row in reference if is_plain(row["text"])]
    texts += [(pathlib.Path(module.__file__).read_text())[i * 300 :][:300] for i in range(30)]
    texts = [text for text in texts if is_plain(text)]
    wanted = cut.encode(texts)
    found = [cut.encode_few([text]) for text in texts]
    for i, pieces in enumerate(found):
        assert pieces.ids.tolist() == wanted.ids[wanted.ends[i] : wanted.ends[i + 1]].tolist(), (
            texts[i]
        )
    for text in ("straße", "\u03a3", "日本", "a\u0301", "x" * 60, "\u2026", "\u00ad"):
        assert not is_plain(text)
    monkeypatch.setattr(module, "import_tensorflow", lambda: pytest.fail("TensorFlow is imported"))
    assert WordPiece(minilm.model.vocabulary, lower_case).encode_few(["The river"]).lengths == [2]


def test_a_folder_as_transformers_saves_it_today(tmp_path):
    plain = Embedder.open(bert_folder.write(tmp_path / "plain"))
    folder = bert_folder.write(tmp_path / "today")
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer.json").write_text(bert_folder.tokenizer_json())
    today = Embedder.open(folder)
    assert today.model.vocabulary == plain.model.vocabulary
    assert today.model.lower_case and "tokenizer.json" in today.model.identity["sha256"]
    texts = ["Def lobster", "return crustacean 7!"]
    np.testing.assert_array_equal(today.embed(texts), plain.embed(texts))
    (folder / "tokenizer.json").write_text(bert_folder.tokenizer_json(normalizer__lowercase=False))
    assert not BertFolder.open(folder).lower_case


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__type": "Unigram"}, r"model.type is 'Unigram': expected 'WordPiece'"),
        (
            {"model__vocab": {"[UNK]": 0, "a": 2}},
            r"model.vocab: expected word pieces with the ids 0",
        ),
        ({"model__vocab": [["a", 0]]}, r"model.vocab: expected word pieces"),
        ({"model__vocab": {"[UNK]": 0}}, r"no \[CLS\]: expected a WordPiece vocabulary"),
        ({"normalizer__type": "NFC"}, r"the normalizer is 'NFC': expected 'BertNormalizer'"),
        ({"normalizer__strip_accents": False}, r"lowercase is True and strip_accents False"),
    ],
)
def test_a_tokenizer_json_of_another_kind_is_named(tmp_path, changes, message):
    folder = bert_folder.write(tmp_path / "bert")
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer.json").write_text(bert_folder.tokenizer_json(**changes))
    with pytest.raises(UserError, match=rf"tokenizer.json: {message}"):
        BertFolder.open(folder)


def test_an_older_folder_of_sentence_transformers(tmp_path):
    """Its BERT is in 0_Transformer, its pooling and prompts beside that."""
    root = bert_folder.write(tmp_path / "root")
    modules = [dict(module) for module in bert_folder.MODULES]
    modules[0]["path"] = "0_Transformer"
    (root / "modules.json").write_text(json.dumps(modules))
    (root / "0_Transformer").mkdir()
    for name in ("config.json", "vocab.txt", "model.safetensors"):
        (root / name).rename(root / "0_Transformer" / name)
    (root / "config_sentence_transformers.json").write_text('{"prompts": {"query": "q: "}}')
    model = BertFolder.open(root)
    assert model.name == "root" and model.prefixes.query == "q: " and model.config.normalise
    plain = Embedder.open(bert_folder.write(tmp_path / "plain"))
    np.testing.assert_array_equal(Embedder(model).embed(["lobster"]), plain.embed(["lobster"]))


def test_pieces_that_no_text_is_cut_into_do_no_harm(tmp_path):
    """A piece that comes again has its last id, as in transformers; NUL and long pieces have none."""
    folder = bert_folder.write(tmp_path / "bert")
    pieces = [*bert_folder.VOCABULARY[:-4], "lobster", "a\0", "x" * 400, bert_folder.VOCABULARY[-1]]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    model = BertFolder.open(folder)
    assert len(set(model.vocabulary)) == len(pieces)
    word_piece = WordPiece(model.vocabulary, model.lower_case)
    for encode in (word_piece.encode, word_piece.encode_few):
        assert encode(["lobster def"]).ids.tolist() == [len(pieces) - 4, pieces.index("def")]
