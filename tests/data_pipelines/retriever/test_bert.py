"""The frozen BERT against naive float64 loops, and every way in which a folder can be wrong."""

import json
import math

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from data_pipelines.retriever.bert import Bert, BertConfig, load_bert, parameter_shapes
from data_pipelines.retriever.embedder import BertFolder
from retro_jax.errors import UserError
from tests.data_pipelines.retriever import bert_folder
from tests.data_pipelines.retriever.bert_folder import CONFIG


def reference(arrays, config, ids, normalise, pooling="mean"):
    """One text [n] to its vector by the equations of the BERT paper, in float64 and in loops."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}

    def norm(x, name):
        mean, variance = x.mean(), ((x - x.mean()) ** 2).mean()
        return (x - mean) / math.sqrt(variance + config["layer_norm_eps"]) * w[
            f"{name}.weight"
        ] + w[f"{name}.bias"]

    def dense(x, name):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def activation(x):
        if config["hidden_act"] == "gelu":
            return np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])
        if config["hidden_act"] == "relu":
            return np.maximum(x, 0)
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    heads = config["num_attention_heads"]
    size = config["hidden_size"] // heads
    h = [
        norm(
            w["embeddings.word_embeddings.weight"][token]
            + w["embeddings.position_embeddings.weight"][i]
            + w["embeddings.token_type_embeddings.weight"][0],
            "embeddings.LayerNorm",
        )
        for i, token in enumerate(ids)
    ]
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}."
        q, k, v = (
            [dense(x, f"{at}attention.self.{part}") for x in h]
            for part in ("query", "key", "value")
        )
        after = []
        for i in range(len(h)):
            out = np.zeros(config["hidden_size"])
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                logits = [q[i][part] @ k[j][part] / math.sqrt(size) for j in range(len(h))]
                exp = [math.exp(x) for x in logits]
                out[part] = sum(e / sum(exp) * v[j][part] for j, e in enumerate(exp))
            x = norm(
                h[i] + dense(out, f"{at}attention.output.dense"), f"{at}attention.output.LayerNorm"
            )
            up = activation(dense(x, f"{at}intermediate.dense"))
            after.append(norm(x + dense(up, f"{at}output.dense"), f"{at}output.LayerNorm"))
        h = after
    pooled = h[0] if pooling == "cls" else sum(h) / len(h)
    return pooled / math.sqrt((pooled**2).sum()) if normalise else pooled


def texts(seed=0):
    """Four padded texts of random word pieces."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, CONFIG["vocab_size"], (4, 9)).astype(np.int32)
    return ids, np.array([9, 2, 5, 7], np.int32)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_equals_the_equations(tmp_path, normalise, activation):
    config = CONFIG | {"hidden_act": activation}
    arrays = bert_folder.weights(config)
    model = load_bert(bert_folder.write(tmp_path, config=config, normalise=normalise))
    ids, lengths = texts()
    vectors = np.asarray(model(ids, lengths))
    for i, length in enumerate(lengths):
        expected = reference(arrays, config, ids[i, :length], normalise)
        assert np.abs(vectors[i] - expected).max() < 1e-5 * np.abs(expected).max()


def test_padding_and_empty_rows_change_nothing(tmp_path):
    model = load_bert(bert_folder.write(tmp_path))
    ids, lengths = texts()
    vectors = np.asarray(model(ids, lengths))
    longer = np.asarray(
        model(np.pad(ids, ((0, 1), (0, 7)), constant_values=3), np.append(lengths, 0))
    )
    np.testing.assert_allclose(longer[:4], vectors, atol=1e-6)
    assert not longer[4].any()


def test_the_last_word_piece_of_a_text_counts(tmp_path):
    model = load_bert(bert_folder.write(tmp_path))
    ids, lengths = texts()
    changed = ids.copy()
    changed[np.arange(4), lengths - 1] += 1
    changed %= CONFIG["vocab_size"]
    before, after = np.asarray(model(ids, lengths)), np.asarray(model(changed, lengths))
    assert (np.abs(before - after).max(1) > 1e-3).all()


_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def test_the_first_berts_names_are_read(tmp_path):
    """gamma, beta and a prefix, as bert-base-uncased is published."""
    arrays, older = bert_folder.weights(), {}
    for name, array in arrays.items():
        for new, old in _OLD_NAMES.items():
            name = name.replace(new, old)
        older[name] = array
    model = load_bert(bert_folder.write(tmp_path / "a", arrays=older, prefix="bert."))
    plain = load_bert(bert_folder.write(tmp_path / "b"))
    ids, lengths = texts()
    np.testing.assert_array_equal(model(ids, lengths), plain(ids, lengths))


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        {"pooling_mode": "cls", "word_embedding_dimension": 12},
    ],
)
def test_the_first_position_is_the_vector_where_the_folder_says_so(tmp_path, pooling):
    folder = bert_folder.write(tmp_path)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    assert BertFolder.open(folder).identity["pooling"] == "cls"
    ids, lengths = texts()
    vectors = np.asarray(load_bert(folder)(ids, lengths))
    for i, length in enumerate(lengths):
        expected = reference(bert_folder.weights(), CONFIG, ids[i, :length], True, "cls")
        assert np.abs(vectors[i] - expected).max() < 1e-5 * np.abs(expected).max()


def test_refuses_weights_that_are_not_finite(tmp_path):
    arrays, name = bert_folder.weights(), "encoder.layer.1.output.dense.bias"
    arrays[name][3] = np.nan
    with pytest.raises(UserError, match=f"weight {name} is not finite: expected numbers"):
        load_bert(bert_folder.write(tmp_path, arrays=arrays))


def test_a_byte_order_mark_changes_nothing(tmp_path):
    folder = bert_folder.write(tmp_path)
    for name in ("config.json", "vocab.txt", "modules.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(f"\ufeff{text}")
    assert BertFolder.open(folder).vocabulary == tuple(bert_folder.VOCABULARY)


def test_names_with_prefix_and_half_precision_weights(tmp_path):
    arrays = {n: a.astype(np.float16) for n, a in bert_folder.weights().items()}
    model = load_bert(bert_folder.write(tmp_path / "a", arrays=arrays, prefix="bert."))
    plain = load_bert(bert_folder.write(tmp_path / "b"))
    ids, lengths = texts()
    vectors = np.asarray(model(ids, lengths))
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, np.asarray(plain(ids, lengths)), atol=1e-2)


def test_a_fresh_module_has_the_stated_parameters():
    config = BertConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})
    state = nnx.to_pure_dict(nnx.state(Bert(config, rngs=nnx.Rngs(0))))
    found = state.pop("layers") | state
    assert {name: value.shape for name, value in found.items()} == parameter_shapes(config)


def test_texts_may_lie_on_several_devices(tmp_path):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    model = load_bert(bert_folder.write(tmp_path))
    ids, lengths = texts()
    alone = np.asarray(model(ids, lengths))
    graphdef, state = nnx.split(model)
    with jax.set_mesh(mesh):
        rows = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))
        state = jax.device_put(state, jax.sharding.NamedSharding(mesh, PartitionSpec()))
        run = jax.jit(lambda s, i, n: nnx.merge(graphdef, s)(i, n))
        vectors = run(state, jax.device_put(ids, rows), jax.device_put(lengths, rows))
        assert vectors.sharding.spec[0] == "data"
    np.testing.assert_allclose(np.asarray(vectors), alone, atol=1e-6)


CONFIG_ERRORS = {
    "another architecture": ({"model_type": "roberta"}, "model_type is 'roberta'"),
    "relative positions": (
        {"position_embedding_type": "relative_key"},
        "position_embedding_type is 'relative_key'",
    ),
    "an activation": ({"hidden_act": "swish"}, "BertConfig.hidden_act is 'swish'"),
    "a width": ({"hidden_size": 0}, "BertConfig.hidden_size is 0"),
    "heads": ({"num_attention_heads": 5}, "BertConfig.hidden_size is 12: expected a multiple of 5"),
    "an inner width": ({"intermediate_size": "x"}, "BertConfig.intermediate_size is 'x'"),
    "an epsilon": ({"layer_norm_eps": 0}, "BertConfig.layer_norm_eps is 0"),
    "nothing": ({"vocab_size": None}, "BertConfig.vocab_size is None"),
}


@pytest.mark.parametrize("change", CONFIG_ERRORS)
def test_refuses_a_config(tmp_path, change):
    values, message = CONFIG_ERRORS[change]
    bert_folder.write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | values))
    with pytest.raises(UserError, match=message):
        load_bert(tmp_path)


def test_refuses_a_config_that_lacks_a_field(tmp_path):
    bert_folder.write(tmp_path)
    config = {name: value for name, value in CONFIG.items() if name != "hidden_size"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json: no hidden_size"):
        load_bert(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not valid JSON"), ("[]", "holds a list: expected a JSON object")],
)
def test_refuses_a_config_that_is_no_object(tmp_path, text, message):
    bert_folder.write(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_bert(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_refuses_a_folder_that_lacks_a_file(tmp_path, name):
    bert_folder.write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name}: no such file"):
        load_bert(tmp_path)


def test_refuses_weights_that_are_damaged(tmp_path):
    bert_folder.write(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable safetensors file"):
        load_bert(tmp_path)


def test_names_the_weight_that_is_missing_or_misshapen(tmp_path):
    arrays = bert_folder.weights()
    name = "encoder.layer.1.attention.self.key.bias"
    bert_folder.write(tmp_path, arrays={n: a for n, a in arrays.items() if n != name})
    with pytest.raises(UserError, match=rf"no weight {name}: expected one of shape \(12,\)"):
        load_bert(tmp_path)
    bert_folder.write(tmp_path, arrays=arrays | {name: np.zeros(13, np.float32)})
    with pytest.raises(UserError, match=rf"{name} has shape \(13,\): expected \(12,\)"):
        load_bert(tmp_path)


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        (
            "modules.json",
            [*bert_folder.MODULES, {"type": "models.Dense"}],
            "module 'Dense': expected",
        ),
        ("modules.json", ["Transformer"], "module 'Transformer': expected an object"),
        ("modules.json", {}, "modules.json holds a dict: expected a list"),
        ("modules.json", [{"type": "m.Pooling"}], "pooling is \\[\\]: expected pooling_mode_mean"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling is .*max_tokens"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            "expected pooling_mode_mean_tokens alone, or",
        ),
        ("config.json", CONFIG | {"hidden_act": ["gelu"]}, "hidden_act is"),
    ],
)
def test_refuses_what_is_no_bert(tmp_path, file, value, message):
    folder = bert_folder.write(tmp_path)
    (folder / file).write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        load_bert(folder)
