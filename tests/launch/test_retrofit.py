"""launch.retrofit: prepare with a base's tokeniser, fit gates, evaluate; OFF is the base."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from data_pipelines.batches.batches import BatchConfig
from data_pipelines.chunk_database import ChunkDatabase
from data_pipelines.questions.prepared import QuestionBatches
from launch import evaluate, prepare, retrofit, sample
from launch.runs.trained_run import load_model, open_run
from retro_jax.errors import UserError
from retro_jax.retrofit import open_base
from retro_jax.retrofit.adapter import load_adapter
from retro_jax.retrofit.decoder import changed_tensors, load_decoder
from retro_jax.storage import files
from retro_jax.train.checkpoint import CHECKPOINTS, saved_arrays
from retro_jax.train.parameter_names import named_leaves
from tests.data import make_old_workdir as made
from tests.data_pipelines.chunk_database import base_tokenizers
from tests.launch.trained import call
from tests.retrofit.base_files import FOLDER, file_tensors

SETTINGS = """
texts/CorpusConfig.name = 'texts'
texts/CorpusConfig.kind = 'jsonl'
texts/CorpusConfig.path = {path!r}
texts/CorpusConfig.id_field = 'id'
DocumentsConfig.corpora = (@texts/CorpusConfig(),)
DocumentsConfig.validation = 0.15
DocumentsConfig.test = 0.15
TokenizerConfig.base = {base!r}
NeighboursConfig.retriever = 'bm25'
NeighboursConfig.recall_queries = 5
BatchConfig.sequence_length = 128
BatchConfig.neighbour_noise = 0.1
ExecutionConfig.kept_states = 'float16'
BatchConfig.batch_size = 8
OptimizerConfig.max_learning_rate = 0.05
OptimizerConfig.warmup_steps = 1
TrainConfig.steps = 20
TrainConfig.log_every = 1
TrainConfig.checkpoint_every = 10
"""


def write_base(folder, name="llama_tied", *, seed=0, pre="gpt-2"):
    """A random base of an architecture with a tokeniser of 401 tokens, in a Hugging Face folder."""
    base_tokenizers.train(folder, pre)
    fields = files.read_json(FOLDER / name / "config.json")
    tensors = file_tensors(FOLDER / name)
    draw = np.random.default_rng(seed)
    for key, array in tensors.items():
        if len(array) == fields["vocab_size"]:
            tensors[key] = draw.normal(0, 0.5, (416, array.shape[1])).astype(array.dtype)
    (folder / "config.json").write_bytes(files.to_json(fields | {"vocab_size": 416}))
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(name="place", scope="module")
def _place(tmp_path_factory):
    """A folder with a base, settings, and W prepared and fitted."""
    folder = tmp_path_factory.mktemp("fit")
    write_base(folder / "base")
    draw = np.random.default_rng(0)
    words = [f"word{i}" for i in range(200)]
    texts = {f"d{i}": " ".join(draw.choice(words[5 * (i // 2) :], 60)) for i in range(40)}
    lines = [json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items()]
    (folder / "texts.jsonl").write_text("".join(lines))
    path, base = str(folder / "texts.jsonl"), str(folder / "base")
    (folder / "fit.gin").write_text(SETTINGS.format(path=path, base=base))
    assert call(prepare.main, f"--gin_file={folder / 'fit.gin'}", f"--workdir={folder / 'W'}") == 0
    assert fit(folder) == 0
    return folder


def fit(folder, *more):
    """launch.retrofit in W."""
    flags = [f"--gin_file={folder / 'fit.gin'}", f"--workdir={folder / 'W'}"]
    return call(retrofit.main, *flags, f"--base={folder / 'base'}", *more)


def decoder_of(place):
    """The base alone, with the run's chunk length."""
    run = open_run(place / "W" / "retro")
    return load_decoder(open_base(place / "base"), run.model.baseline())


def test_gates_are_trained_and_a_table_has_on_and_off(place, capsys):
    """From a folder of texts and a folder of weights to losses; OFF has the base's bits."""
    run = open_run(place / "W" / "retro")
    assert run.step == 20 and run.model.form.gated_cca and run.model.cca_layers == (1, 2)
    assert run.model.form.sink_id == 0 != run.model.pad_id and run.model.form.shared_softmax
    assert run.model.form.neighbour_distance == 192
    assert np.abs(np.asarray(nnx.merge(*load_model(run)).cca.gate[...])).min() > 0
    assert (
        files.read_json(run.directory / "parents.json")["base"]
        == open_base(place / "base").fingerprint()
    )
    where = f"--workdir={place / 'W'}"
    limit = "--retrieval=in_context", "--num_neighbours=2", "--window_chunks=8"
    assert call(evaluate.main, where, *limit) == 1
    assert "are 768 tokens: expected at most 64, the context of" in capsys.readouterr().err
    assert not (place / "W" / "evaluation").exists()
    assert call(evaluate.main, where) == 0
    results = made.figures(place / "W" / "evaluation" / "test.json")
    on, off = (results[name]["bits_per_byte"] for name in ("on", "off"))
    assert on < off
    names = {path.name.split("-")[0] for path in (place / "W" / "states").iterdir()}
    assert names == {"neighbours"}  # CCA begins in layer 1
    assert not any("layers." in name for name in saved_arrays(run.directory / CHECKPOINTS, 20))

    chunks = ChunkDatabase.open(place / "W" / "chunks" / "test")
    batch = chunks.chunks(np.arange(2))[None].reshape(1, -1)
    model, base = nnx.merge(*load_model(run)), decoder_of(place)
    np.testing.assert_array_equal(model(batch), base(batch))


def test_the_adapter_is_small_and_of_its_base_alone(place, tmp_path, capsys):
    """It loads onto the untouched base to the same bits, and refuses another one."""
    where = [f"--workdir={place / 'W'}", f"--base={place / 'base'}"]
    assert call(retrofit.main, *where, f"--export={tmp_path / 'adapter'}") == 0
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir())
    assert f"adapter: {size / 1e3:,.1f} kB, what" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter.safetensors", "adapter.json"}
    assert (tmp_path / "adapter" / "adapter.safetensors").stat().st_size < 200  # 8 gates
    fitted = nnx.merge(*load_model(open_run(place / "W" / "retro")))
    again = load_adapter(tmp_path / "adapter", open_base(place / "base"))
    assert again.config == fitted.config
    for name, leaf in named_leaves(nnx.state(fitted)).items():
        np.testing.assert_array_equal(leaf, named_leaves(nnx.state(again))[name], err_msg=name)
    write_base(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"adapter was fitted to another base than .*other: expec"):
        load_adapter(tmp_path / "adapter", open_base(tmp_path / "other"))


def test_a_shared_adapter_is_used_and_trained_on(place, tmp_path, capsys):
    """Another workdir gets the fitted model without training, reads it, and goes on from it."""
    where, base = [f"--workdir={place / 'W'}"], f"--base={place / 'base'}"
    assert call(retrofit.main, *where, base, f"--export={tmp_path / 'adapter'}") == 0
    shared, data = f"--adapter={tmp_path / 'adapter'}", f"--data={place / 'W'}"
    received = [f"--workdir={tmp_path / 'V'}", data, base]
    gates = "--gin_bindings=StartConfig.gates = 1.0"  # as the settings of a fit may have
    assert call(retrofit.main, *received, shared, gates) == 0
    assert "saved as it begins" in capsys.readouterr().out
    run, fitted = (open_run(folder / "retro") for folder in (tmp_path / "V", place / "W"))
    assert run.step == 0 and run.model == fitted.model
    read = ("sequence_length", "neighbours", "neighbour_part")
    assert [getattr(run.batches, name) for name in read] == [128, 2, "both"]
    theirs, ours = (named_leaves(load_model(each)[1]) for each in (run, fitted))
    for name, leaf in ours.items():
        np.testing.assert_array_equal(theirs[name], leaf, err_msg=name)
    kept = saved_arrays(run.directory / CHECKPOINTS, 0)
    assert not any("layers." in name for name in kept) and any("cca.gate" in name for name in kept)
    asked = ["--prompt=word1 word2", "--max_tokens=3", "--temperature=0"]
    assert call(sample.main, f"--workdir={tmp_path / 'V'}", data, *asked) == 0
    assert call(retrofit.main, *received, shared) == 0
    assert "trained already, 0 steps" in capsys.readouterr().out
    replayed = [f"--replay={tmp_path / 'V'}", f"--workdir={tmp_path / 'again'}", base]
    assert call(retrofit.main, *replayed) == 0
    assert "a run of 0 steps as" in capsys.readouterr().out

    # Training on: the first losses are those that the other fit ended with, not those of the base.
    settings = f"--gin_file={place / 'fit.gin'}"
    on = f"--gin_bindings=StartConfig.adapter = '{tmp_path / 'adapter'}'"
    further = [settings, on, f"--workdir={tmp_path / 'U'}", data, base]
    assert call(retrofit.main, *further, "--gin_bindings=TrainConfig.steps = 2") == 0
    said = f"128 tokens: {place / 'base'} was trained with 64 at most"
    assert said in capsys.readouterr().out
    begun, after = (
        np.asarray(named_leaves(load_model(open_run(folder / "retro"))[1])["cca.gate"])
        for folder in (place / "W", tmp_path / "U")
    )
    assert 0 < np.abs(begun - after).max() < 0.2 < np.abs(after).max()
    parents = files.read_json(tmp_path / "U" / "retro" / "parents.json")
    assert parents["adapter"] == files.read_json(run.directory / "parents.json")["adapter"]


def test_a_shorter_part_of_neighbours_is_read_for_less(place, tmp_path, capsys):
    """The model, kept states, costs and texts are of 96 tokens; the context has whole neighbours."""
    part = "--gin_bindings=BatchConfig.neighbour_part = 'last_96'"
    into = [f"--workdir={tmp_path / 'V'}", f"--data={place / 'W'}"]
    asked = [f"--gin_file={place / 'fit.gin'}", *into, f"--base={place / 'base'}", part]
    steps = "--gin_bindings=TrainConfig.steps = 2"
    length = "--gin_bindings=RetroConfig.neighbour_length = 128"
    assert call(retrofit.main, *asked, steps, length) == 1
    message = "neighbour_length is 128: expected 96, as BatchConfig.neighbour_part is 'last_96'"
    assert message in capsys.readouterr().err
    assert call(retrofit.main, *asked, steps) == 0
    run = open_run(tmp_path / "V" / "retro")
    assert run.model.neighbour_length == 96 and run.batches.neighbour_part == "last_96"
    fields = files.read_json(place / "base" / "config.json")
    (place / "base" / "config.json").write_bytes(
        files.to_json(fields | {"max_position_embeddings": 1024})
    )
    scored = ["--retrieval=on,off,in_context", "--sample_chunks=4"]
    computed = "--gin_bindings=ExecutionConfig.kept_states = ''"
    for workdir in (into, [f"--workdir={place / 'W'}"]):
        assert call(evaluate.main, *workdir, *scored, computed) == 0
    short, whole = (
        files.read_json(folder / "evaluation" / "test.json")
        for folder in (tmp_path / "V", place / "W")
    )
    context = [each["context"]["corpora"] for each in (short, whole)]
    assert context[0] == context[1] and short["on"]["corpora"] != whole["on"]["corpora"]
    costs = [{name: each["cost"]["operations"] for name, each in r.items()} for r in (short, whole)]
    assert costs[0]["context"] == costs[1]["context"] and costs[0]["off"] == costs[1]["off"]
    added = [each["on"] - each["off"] for each in costs]
    assert 0.7 * added[1] < added[0] < 0.8 * added[1]
    text = ["--prompt=" + "word1 word2 " * 40, "--max_tokens=3", "--temperature=0"]
    assert call(sample.main, *into, *text) == 0
    whole_part = "--gin_bindings=BatchConfig.neighbour_part = 'both'"
    assert call(evaluate.main, *into, whole_part) == 1
    message = "neighbour_length is 96: expected 128, as BatchConfig.neighbour_part is 'both'"
    assert message in capsys.readouterr().err
    where = [into[0], f"--base={place / 'base'}"]
    assert call(retrofit.main, *where, f"--export={tmp_path / 'adapter'}") == 0
    again = [f"--workdir={tmp_path / 'U'}", into[1], where[1]]
    assert call(retrofit.main, *again, f"--adapter={tmp_path / 'adapter'}") == 0
    assert open_run(tmp_path / "U" / "retro").batches.neighbour_part == "last_96"
    (place / "base" / "config.json").write_bytes(files.to_json(fields))
    shutil.rmtree(place / "W" / "evaluation")


def test_an_adapter_of_the_papers_form_is_used(place, tmp_path):
    """Encoder and CCA are trained without naming them, and come along."""
    sizes = {"d_model": 16, "num_heads": 2, "head_dim": 8, "d_ff": 16}
    fields = [f"RetroConfig.encoder_{name} = {size}" for name, size in sizes.items()]
    fields += ["DecoderForm.gated_cca = False", "ExecutionConfig.kept_states = ''"]
    form = [f"--gin_bindings={each}" for each in [*fields, "TrainConfig.steps = 2"]]
    shared, base = [f"--data={place / 'W'}"], f"--base={place / 'base'}"
    fitted = [f"--gin_file={place / 'fit.gin'}", f"--workdir={tmp_path / 'P'}", *shared, *form]
    assert call(retrofit.main, *fitted, base) == 0
    for name, more in (("P", []), ("V", [f"--adapter={tmp_path / 'P-adapter'}"])):
        where = [f"--workdir={tmp_path / name}", base]
        if more:
            assert call(retrofit.main, *where, *shared, *more) == 0
        assert call(retrofit.main, *where, f"--export={tmp_path / name}-adapter") == 0
    one, other = (tmp_path / f"{name}-adapter" / "adapter.safetensors" for name in "PV")
    assert one.read_bytes() == other.read_bytes()


def test_questions_without_passages_train_on_what_answers_read(place, tmp_path):
    """A part of neighbours is the end of a database's chunk, as the live database has it."""
    lines = [json.dumps({"question": f"word{i} word{i + 1}", "answers": ["x"]}) for i in range(4)]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    asked = f"--questions=asked={tmp_path / 'q.jsonl'}"
    assert call(prepare.main, f"--workdir={place / 'W'}", asked) == 0
    config = BatchConfig(sequence_length=192, batch_size=4, questions="asked", prefetch=0)
    whole, short = (
        QuestionBatches.read(place / "W", dataclasses.replace(config, neighbour_part=part))
        .rows(0)
        .neighbours
        for part in ("both", "last_96")
    )
    np.testing.assert_array_equal(short, whole[..., 32:])
    assert (whole[..., :32] != whole[..., 96:]).any()
    shutil.rmtree(place / "W" / "questions")


def test_a_trained_base_is_exported_and_fitted(place, tmp_path, capsys):
    """Without CCA the base itself learns; it becomes a folder, on which a fit begins."""
    into = [f"--workdir={tmp_path / 'U'}", f"--data={place / 'W'}"]
    settings, base = f"--gin_file={place / 'fit.gin'}", f"--base={place / 'base'}"
    own = {"cca_layers": (), "vocab_size": 416}
    changes = [f"RetroConfig.{name} = {value}" for name, value in own.items()]
    changes += ["StartConfig.trained = ('layers.attention.*',)", "ExecutionConfig.kept_states = ''"]
    changes += [f"BatchConfig.neighbour{name} = 0" for name in ("s", "_noise")]
    changes += ["TrainConfig.steps = 2"]
    trained = [f"--gin_bindings={each}" for each in changes]
    assert call(retrofit.main, settings, *into, base, *trained) == 0
    folder = tmp_path / "adapted"
    assert call(retrofit.main, into[0], base, f"--export={folder}") == 0
    assert "with 18 tensors of" in capsys.readouterr().out
    ours, theirs = open_base(place / "base"), open_base(folder)
    params = named_leaves(load_model(open_run(tmp_path / "U" / "retro"))[1])
    changed = changed_tensors(ours, params)
    assert len(changed) == 18
    for name, before in ours.stream():
        np.testing.assert_allclose(
            theirs.read(name), changed.get(name, before), rtol=2**-8 if name in changed else 0
        )
    fitted = [f"--workdir={tmp_path / 'V'}", into[1], f"--base={folder}"]
    assert call(retrofit.main, settings, *fitted, "--gin_bindings=TrainConfig.steps = 2") == 0
    assert open_run(tmp_path / "V" / "retro").model.has_retrieval
    assert call(retrofit.main, into[0], base, f"--export={folder}") == 1
    assert "adapted is there already: expected no directory" in capsys.readouterr().err


def test_an_adapter_of_other_settings_or_base_is_refused(place, tmp_path, capsys):
    """One line, and no run."""
    where = [f"--workdir={place / 'W'}", f"--base={place / 'base'}"]
    assert call(retrofit.main, *where, f"--export={tmp_path / 'adapter'}") == 0
    write_base(tmp_path / "other", seed=1)
    shared = f"--adapter={tmp_path / 'adapter'}"
    into = [f"--workdir={tmp_path / 'V'}", f"--data={place / 'W'}"]
    of_base, of_other = where[1], f"--base={tmp_path / 'other'}"
    layers = "--gin_bindings=RetroConfig.cca_layers = (2,)"
    gates = "--gin_bindings=StartConfig.gates = 1.0"
    begin = f"--gin_bindings=StartConfig.adapter = '{tmp_path / 'adapter'}'"
    for more, status, message in (
        ([shared, of_other], 1, "was fitted to another base than"),
        ([shared, of_base, layers], 1, "RetroConfig.cca_layers is (2,): expected (1, 2), that of"),
        (
            [of_base, begin, gates, "--gin_bindings=TrainConfig.steps = 1"],
            1,
            "StartConfig.gates is 1.0: expected 0 with StartConfig.ad",
        ),
        ([f"--adapter={tmp_path}", of_base], 1, "adapter.json is missing: expected that of an"),
        ([shared], 2, "--base is missing: expected a Hugging Face folder"),
        ([shared, of_base, "--export=elsewhere"], 2, "--export and --adapter: expected one of"),
    ):
        assert call(retrofit.main, *into, *more) == status
        assert message in capsys.readouterr().err
        assert not (tmp_path / "V" / "retro").exists()
    # A first adapter, which does not say how texts were read, and one that is not there.
    path = tmp_path / "adapter" / "adapter.json"
    path.write_bytes(files.to_json({n: x for n, x in files.read_json(path).items() if n != "read"}))
    assert call(retrofit.main, *into, of_base, shared) == 1
    assert "expected BatchConfig.sequence_length in the settings" in capsys.readouterr().err
    none = "--gin_bindings=StartConfig.adapter = 'none'"
    given = [f"--gin_file={place / 'fit.gin'}", *into, of_base, none]
    assert call(retrofit.main, *given) == 1
    assert "none/adapter.json is missing: expected that of an adapter" in capsys.readouterr().err
    trained = [f"--gin_file={place / 'fit.gin'}", *where, shared]
    assert call(retrofit.main, *trained) == 1  # W has a run of other settings
    assert (
        "belongs to a run of other settings: TrainConfig.steps 20 -> 0" in capsys.readouterr().err
    )


def test_a_fitted_run_is_replayed_to_the_same_bits(place, tmp_path, capsys):
    """From its record and the base; with another base it is refused."""
    write_base(tmp_path / "other", seed=1)
    flags = [f"--replay={place / 'W'}", f"--workdir={tmp_path / 'again'}"]
    assert call(retrofit.main, *flags, f"--base={tmp_path / 'other'}") == 1
    assert "was trained on base" in capsys.readouterr().err
    assert call(retrofit.main, *flags, f"--base={place / 'base'}") == 0
    assert "bit for bit" in capsys.readouterr().out
    (once, again) = (folder / "retro" for folder in (place / "W", tmp_path / "again"))
    assert (once / "config.gin").read_text() == (again / "config.gin").read_text()


def test_what_does_not_belong_together_is_refused(place, tmp_path, capsys):
    """Another base's tokeniser, a base that is none, no base; nothing is written."""
    write_base(tmp_path / "other", seed=1, pre="smollm")
    flags = [f"--gin_file={place / 'fit.gin'}", f"--workdir={place / 'W'}"]
    before = sorted(path.name for path in (place / "W").iterdir())
    for base, status, message in (
        (f"--base={tmp_path / 'other'}", 1, "is not the tokeniser of"),
        (f"--base={tmp_path}", 1, "config.json is missing"),
        ("--nobaseline", 2, "--base is missing: expected a Hugging Face folder"),
    ):
        assert call(retrofit.main, *flags, base) == status
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in (place / "W").iterdir()) == before
    assert fit(place) == 0
    assert "trained already, 20 steps" in capsys.readouterr().out


def test_a_sample_is_scored_beside_neighbours_in_context(place):
    """Random neighbours, and k of them before the text; sums, bytes and files are of the sample alone."""
    fields = files.read_json(place / "base" / "config.json") | {"max_position_embeddings": 1024}
    (place / "base" / "config.json").write_bytes(files.to_json(fields))
    kinds = "on,off,random,in_context,random_in_context,tokens"
    asked = [f"--retrieval={kinds}", "--in_context=1", "--sample_chunks=4"]
    assert call(evaluate.main, f"--workdir={place / 'W'}", *asked) == 0
    results = made.figures(place / "W" / "evaluation" / "test.json")
    mixtures = {"tokens", "context+tokens"}
    assert set(results) == {
        *("on", "off", "random", "context", "context_1", "context+random"),
        *mixtures,
    }
    facts = files.read_json(place / "W" / "evaluation" / "test.json")
    for name in mixtures:  # tuned on a sample of the validation split
        assert 0 < facts[name]["tokens"]["tuned_on_tokens"] <= 4 * 64
    sizes = {(each["bytes"], each["tokens"]) for each in results.values()}
    ((size, tokens),) = sizes
    assert tokens <= 4 * 64 and tokens <= size < 10 * tokens
    assert len({each["bits_per_byte"] for each in results.values()}) == 8
    costs = {name: facts[name]["cost"] for name in ("context", "context+random")}
    assert len({each["operations"] for each in costs.values()}) == 1
    assert costs["context+random"]["lookup_operations"] < costs["context"]["lookup_operations"]
    table = (place / "W" / "evaluation" / "test.md").read_text()
    assert "in context, k = 1" in table and "neighbours in context" in table
    for folder in ("evaluation", "token_memory"):
        shutil.rmtree(place / "W" / folder)


def test_fitted_and_existing_models_continue_texts(place, tmp_path, capsys):
    """With retrieval and without, and a base alone, which needs no workdir."""
    where, long = f"--workdir={place / 'W'}", "--prompt=" + "word1 word2 " * 9
    asked = ["--prompt=word1 word2", "--max_tokens=9", "--temperature=0"]
    assert call(sample.main, where, long, *asked[1:]) == 0
    assert call(sample.main, where, *asked, "--retrieval=off") == 0
    (on, off) = (
        files.read_json(path)
        for path in sorted(
            (place / "W" / "samples").glob("*.json"), key=lambda p: p.stat().st_mtime
        )
    )
    assert on["neighbours"] == 2 and on["samples"][0]["chunks"][0]["neighbours"]
    again = tmp_path / "again"
    again.mkdir()
    capsys.readouterr()
    assert call(sample.main, f"--base={place / 'base'}", f"--workdir={again}", *asked) == 0
    (path,) = (again / "samples").glob("*.json")
    alone = files.read_json(path)
    # The fitted model with retrieval off is the base.
    assert alone["samples"][0]["tokens"] == off["samples"][0]["tokens"]
    assert alone["model"]["base"] == open_base(place / "base").fingerprint()
    # The same weights with other settings are another model; asked again, the sample is the same.
    shutil.copytree(place / "base", tmp_path / "edited")
    config = tmp_path / "edited" / "config.json"
    config.write_bytes(files.to_json(files.read_json(config) | {"rms_norm_eps": 0.5}))
    for base in (tmp_path / "edited", tmp_path / "edited", place / "base"):
        assert call(sample.main, f"--base={base}", f"--workdir={again}", *asked) == 0
        assert len(list((again / "samples").glob("*.json"))) == 2
    path.unlink()
    assert call(sample.main, f"--base={place / 'base'}", *asked, "--token_memory") == 1
    assert "--token_memory=True without a database" in capsys.readouterr().err
    assert call(sample.main, where, *asked, "--token_memory") == 1
    assert "has no token mixture of this checkpoint" in capsys.readouterr().err
    assert call(sample.main, f"--base={place / 'base'}", *asked, "--retrieval=on") == 1
    assert "--retrieval=on with --base: expected off" in capsys.readouterr().err
