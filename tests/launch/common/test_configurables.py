"""launch/common/configurables.py: gin files in, dataclasses out, mistakes in one line."""

import dataclasses
import typing

import pytest

from data_pipelines.documents.documents import DocumentsConfig
from launch.common import configurables
from retro_jax.config import DecoderForm, ExecutionConfig, RetroConfig
from retro_jax.errors import UserError
from retro_jax.train.record import default_settings, parse_settings, settings_text

_FILE = """
include 'sizes/tiny.gin'
WIDTH = %HALF
HALF = 64
RetroConfig.d_model = %WIDTH
RetroConfig:
    vocab_size = 100
    cca_layers = [
        1,
    ]
"""
_INCLUDED = """
RetroConfig.d_model = 7
RetroConfig.num_layers = 2
RetroConfig.num_heads = 2
RetroConfig.head_dim = 8
RetroConfig.d_ff = 32
RetroConfig.dropout = 0
"""


@pytest.fixture(name="gin_file")
def _gin_file(tmp_path):
    """A gin file that includes another, which lies in a folder beside it."""
    (tmp_path / "sizes").mkdir()
    (tmp_path / "sizes" / "tiny.gin").write_text(_INCLUDED)
    (tmp_path / "run.gin").write_text(_FILE)
    return str(tmp_path / "run.gin")


def test_files_includes_macros_and_bindings(gin_file):
    configurables.load(gin_file, ["RetroConfig.d_ff = 48", "RetroConfig.d_ff = 40"])
    config = configurables.make(RetroConfig, pad_id=3, num_heads=9)
    assert (config.d_model, config.num_layers, config.vocab_size) == (64, 2, 100)
    assert (config.d_ff, config.cca_layers) == (40, (1,))  # the last binding wins
    assert (config.pad_id, config.num_heads) == (3, 2)  # defaults only fill what is left open
    assert type(config) is RetroConfig


def test_operative_config_is_complete_sorted_and_can_be_loaded(gin_file):
    configurables.load(gin_file)
    config = configurables.make(RetroConfig, pad_id=3)
    execution = configurables.make(ExecutionConfig)
    text = configurables.operative_config()
    names = list(parse_settings(text))
    assert names == sorted(names)
    fields = [f"ExecutionConfig.{name}" for name in vars(execution)]
    fields += [f"RetroConfig.{name}" for name in vars(config) if name != "form"]
    assert names == sorted(fields)
    assert "RetroConfig.cca_layers = (1,)\n" in text
    assert "RetroConfig.dropout = 0.0\n" in text
    assert "RetroConfig.d_model = 64\n" in text
    assert "%" not in text

    path = gin_file + ".again"
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    configurables.load(path)
    assert configurables.make(RetroConfig) == config
    assert configurables.make(ExecutionConfig) == execution
    assert configurables.operative_config() == text


def test_a_decoder_of_another_form_is_written_and_read_again(gin_file):
    """By the operative configuration, and by what a run records; a binding wins over a default."""
    form = DecoderForm(norm="layer", rotary_divisors=(1.0, 0.1 + 0.2, 2.0, 3.0), gated_cca=True)
    configurables.load(gin_file, ["DecoderForm.sink_id = 9"])
    config = configurables.make(RetroConfig, positions="rotary", pad_id=3, form=form)
    assert config.form == dataclasses.replace(form, sink_id=9)
    recorded = settings_text([config])
    assert "RetroConfig.form = @DecoderForm()\n" in recorded
    for text in (configurables.operative_config(), recorded):
        path = gin_file + ".again"
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        configurables.load(path)
        assert configurables.make(RetroConfig) == config
    assert parse_settings(recorded).keys() - default_settings([config]).keys() == {
        "RetroConfig.form",
        *(f"RetroConfig.{name}" for name in ("cca_layers", "d_ff", "d_model", "head_dim")),
        *(f"RetroConfig.{name}" for name in ("num_heads", "num_layers", "vocab_size")),
    }
    plain = dataclasses.replace(config, form=DecoderForm())
    assert "form" not in settings_text([plain]).lower()


@pytest.mark.parametrize(
    ("binding", "expected"),
    [
        ("RetroConfg.d_ff = 8", "unknown configurable 'RetroConfg': did you mean 'RetroConfig'?"),
        ("RetroConfig.dff = 8", "unknown parameter of RetroConfig 'dff': did you mean 'd_ff'?"),
        ("RetroConfg:\n  d_ff = 1", "unknown configurable 'RetroConfg'"),
        ("RetroConfig.d_ff = 'a'", "RetroConfig.d_ff is 'a': expected int"),
        ("RetroConfig.d_ff = True", "RetroConfig.d_ff is True: expected int"),
        ("RetroConfig.d_ff = 1.5", "RetroConfig.d_ff is 1.5: expected int"),
        ("RetroConfig.positions = 1", "RetroConfig.positions is 1: expected str"),
        (
            "RetroConfig.cca_layers = ['a']",
            "RetroConfig.cca_layers is ('a',): expected tuple[int, ...]",
        ),
        ("RetroConfig.d_ff = 0", "RetroConfig.d_ff is 0: expected a positive integer"),
        ("RetroConfig.d_ff = %HLF", "unknown macro 'HLF': did you mean 'HALF'?"),
        ("HALF = [%HALF]", "macro 'HALF' is defined by itself"),
        ("RetroConfig.d_ff = @ExecutionConfig()", "expected int"),
        ("RetroConfig.d_ff = @ExecConfig()", "unknown configurable 'ExecConfig'"),
        ("x/RetroConfig.d_ff = 2", "unknown scope (no @ refers to it) 'x/RetroConfig'"),
        ("RetroConfig.d_ff = ", "bad syntax in 'RetroConfig.d_ff =': Unable to parse value."),
        ("RetroConfig.d_ff = (1,", "bad syntax in 'RetroConfig.d_ff = (1,': "),
        ("RetroConfig.positions = rotary", "a string needs quotes"),
        ("RetroConfig.d_ff 8", "bad syntax"),
        ("import os", "'import' is not supported"),
        ("include 'missing.gin'", "missing.gin (No such file or directory), expected a gin file"),
    ],
)
def test_mistakes_name_the_thing(binding, expected, gin_file):
    def build() -> None:
        configurables.load(gin_file, [binding])
        configurables.make(RetroConfig)

    with pytest.raises(UserError) as error:
        build()
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_mistakes_in_a_file_name_file_and_line(gin_file):
    with open(gin_file, "a", encoding="utf-8") as file:
        file.write("RetroConfig.dropuot = 0.1\n")
    with pytest.raises(UserError, match=r"run\.gin:11: unknown parameter of RetroConfig 'dropuot'"):
        configurables.load(gin_file)
    with open(gin_file, "w", encoding="utf-8") as file:
        file.write("\nRetroConfig.d_ff = 3 4\n")
    with pytest.raises(UserError, match=r"run\.gin:2: bad syntax in 'RetroConfig.d_ff = 3 4'"):
        configurables.load(gin_file)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"--gin_file: cannot read .*none\.gin .No such file"):
        configurables.load(str(tmp_path / "none.gin"))
    (tmp_path / "latin.gin").write_bytes(b"A = '\xe9'\n")
    with pytest.raises(UserError, match="it is not UTF-8 text"):
        configurables.load(str(tmp_path / "latin.gin"))
    (tmp_path / "loop.gin").write_text("include 'loop.gin'\n")
    with pytest.raises(UserError, match=r"loop\.gin includes itself"):
        configurables.load(str(tmp_path / "loop.gin"))


_TWO_CORPORA = [
    "DocumentsConfig.corpora = [@wiki/CorpusConfig(), @code/CorpusConfig()]",
    "CorpusConfig.max_documents = 9",
    "wiki/CorpusConfig.name = 'wiki'",
    "wiki/CorpusConfig.kind = 'wikipedia'",
    "code/CorpusConfig.name = 'code'",
]


def test_one_class_with_several_values():
    configurables.load(None, [*_TWO_CORPORA, "code/CorpusConfig.kind = 'stdlib'"])
    wiki, code = configurables.make(DocumentsConfig).corpora
    assert (wiki.name, wiki.kind, wiki.max_documents) == ("wiki", "wikipedia", 9)
    assert (code.name, code.kind, code.max_documents) == ("code", "stdlib", 9)
    text = configurables.operative_config()
    assert "DocumentsConfig.corpora = (@wiki/CorpusConfig(), @code/CorpusConfig())\n" in text
    assert "code/CorpusConfig.max_documents = 9\ncode/CorpusConfig.name = 'code'\n" in text
    assert "wiki/CorpusConfig.text_field = 'text'\n" in text  # defaults too
    configurables.load(None, text.splitlines())
    assert configurables.make(DocumentsConfig).corpora == (wiki, code)


@pytest.mark.parametrize(
    ("binding", "expected"),
    [
        ("code/CorpusConfig.path = '/x'", "code/CorpusConfig.kind has no value: expected one in"),
        ("code/CorpusConfig.kind = 'txt'", "code/CorpusConfig.kind is 'txt': expected one of"),
        ("code/CorpusConfig.knd = 'text'", "unknown parameter of CorpusConfig 'knd'"),
        ("cod/CorpusConfig.kind = 'text'", "'cod/CorpusConfig': did you mean 'code/CorpusConfig'?"),
        ("DocumentsConfig.corpora = [1]", "DocumentsConfig.corpora is (1,): expected tuple["),
    ],
)
def test_mistakes_in_one_of_several_name_it(binding, expected):
    def build() -> None:
        configurables.load(None, [*_TWO_CORPORA, binding])
        configurables.make(DocumentsConfig)

    with pytest.raises(UserError) as error:
        build()
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_every_class_of_the_table_is_a_dataclass_whose_types_can_be_checked():
    for name in configurables.TABLE:
        cls = configurables.configurable(name)
        assert dataclasses.is_dataclass(cls)
        assert set(typing.get_type_hints(cls)) >= {field.name for field in dataclasses.fields(cls)}


def test_a_field_without_a_value_is_named():
    configurables.load(None, ["RetroConfig.vocab_size = 10"])
    with pytest.raises(UserError, match=r"RetroConfig\.d_model has no value"):
        configurables.make(RetroConfig)
