"""Small tokenisers in the forms in which base models come."""

import io
import json
import pathlib

import gguf
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, processors, trainers

from tests.data_pipelines.small import write_texts

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", *(f"<x{i}>" for i in range(9))]
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def words_of(pre: str) -> pre_tokenizers.PreTokenizer:
    """How a base cuts words, by the name that GGUF gives it."""
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "gpt-2":
        return whole
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    pattern = LLAMA_WORDS.replace("{1,3}", "") if pre == "qwen2" else LLAMA_WORDS
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, bytes_only])


def train(folder: pathlib.Path, pre: str = "gpt-2", normalizer: object = None) -> None:
    """Writes a byte-level BPE of 400 tokens as a Hugging Face folder has it."""
    write_texts(folder / "texts", 30)
    model = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    model.pre_tokenizer = words_of(pre)
    if normalizer is not None:
        model.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [path.read_text() for path in sorted((folder / "texts").iterdir())]
    model.train_from_iterator([*texts, "year 1234567 don't WON'T\n\n  if x:\n"], trainer)
    model.add_tokens([tokenizers.AddedToken("<tool>", lstrip=True)])
    if pre == "llama-bpe":
        model.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    model.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_gguf(folder: pathlib.Path, pre: str, path: pathlib.Path, /, **changes: object) -> None:
    """The tokeniser of a folder as a GGUF file; `changes` are settings, None for none."""
    fields = json.loads((folder / "tokenizer.json").read_text())
    vocab = dict(fields["model"]["vocab"])
    types = dict.fromkeys(vocab.values(), gguf.TokenType.NORMAL)
    for token in fields["added_tokens"]:
        vocab[token["content"]] = token["id"]
        special = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
        types[token["id"]] = special
    merges = fields["model"]["merges"]
    settings = {
        "model": "gpt2",
        "pre": pre,
        "tokens": sorted(vocab, key=vocab.__getitem__),
        "token_type": [int(types[i]) for i in sorted(types)],
        "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in merges],
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in settings.items():
        key = f"tokenizer.{name}" if name == "chat_template" else f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def train_sentencepiece(folder: pathlib.Path, **settings: object) -> None:
    """Writes a SentencePiece model as Llama 2 has it: byte pieces, a space put before a text."""
    write_texts(folder / "texts", 30)
    texts = [path.read_text().replace("\0", "") for path in sorted((folder / "texts").iterdir())]
    model = io.BytesIO()
    chosen = {
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 0.9995,
        "minloglevel": 2,
    } | settings
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **chosen
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
