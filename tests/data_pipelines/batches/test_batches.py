"""Batches: rows against an obvious implementation, every target once an epoch, pure in (seed, t, i)."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.batches.batches import (
    BatchConfig,
    Batches,
    check_neighbour_length,
    neighbour_length,
)
from retro_jax.config import PRESETS
from retro_jax.errors import UserError
from tests.data_pipelines.fakes import FakeDatabase, FakeTable, M

FIELDS = ("tokens", "targets", "documents", "corpus", "neighbours")

documents = st.lists(st.integers(1, 6), min_size=1, max_size=8)
layouts = st.lists(st.tuples(st.sampled_from("abc"), documents), min_size=1, max_size=5)


def config(chunks=4, **settings):
    """A small configuration; sequences of `chunks` chunks."""
    return BatchConfig(
        **{"sequence_length": chunks * M, "batch_size": 3, "prefetch": 2, **settings}
    )


def epoch_of(batches):
    """All rows of the first epoch of an unweighted run, as (chunk ids, batch of one row)."""
    total = sum(batches.sequences.values())
    size = batches.config.batch_size
    return [batches.rows(row // size, [row % size]) for row in range(total)]


def assert_equal(left, right):
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(left, field), getattr(right, field), field)


def chunk_of_row(database):
    """Which chunk a row of tokens is: tokens are numbered through the database."""
    return {tuple(row): i for i, row in enumerate(database.rows)}


def obvious_row(database, table, retrieval, *, ids, k):
    """One sequence from its chunk ids (None for padding), token by token."""
    pad = database.pad_id
    tokens, targets, neighbours = [], [], []
    for i in ids:
        row = [pad] * M if i is None else list(database.rows[i])
        following = pad if i is None or ends(database, i) else database.rows[i + 1][0]
        tokens += row
        targets += [*row[1:], following]
        slots = [-1] * k if i is None else table.table[i][:k]
        for j in slots:
            neighbours.append([pad] * 2 * M if j < 0 else list(retrieval.value(j)))
    return tokens, targets, np.array(neighbours).reshape(len(ids), k, 2 * M)


@settings(max_examples=40, deadline=None)
@given(
    layout=layouts, chunks=st.integers(1, 6), k=st.integers(1, 3), seed=st.integers(0, 2**32 - 1)
)
def test_rows_equal_the_obvious_implementation(layout, chunks, k, seed):
    database = FakeDatabase(layout, seed, vocab_size=None)
    retrieval = FakeDatabase([("r", [2, 1, 5])], seed + 1)
    table = FakeTable.random(database, retrieval, 3, seed)
    batches = Batches(config(chunks, seed=seed, neighbours=k), database, table, retrieval)
    known = chunk_of_row(database)
    for batch in epoch_of(batches):
        rows = batch.tokens.reshape(chunks, M)
        ids = [known[tuple(row)] if row.any() else None for row in rows]
        tokens, targets, neighbours = obvious_row(database, table, retrieval, ids=ids, k=k)
        np.testing.assert_array_equal(batch.tokens[0], tokens)
        np.testing.assert_array_equal(batch.targets[0], targets)
        np.testing.assert_array_equal(batch.neighbours[0], neighbours)
        name = batches.corpora[batch.corpus[0]]
        assert all(any(i in part for part in database.corpora[name]) for i in ids if i is not None)
        assert_consecutive(database, ids, batch.documents[0])


def assert_consecutive(database, ids, documents):
    """Chunks run through the corpus's ring; equal numbers mean one document, read in its order."""
    present = [i for i in ids if i is not None]
    assert present
    assert ids == present + [None] * (len(ids) - len(present))
    assert list(documents[len(present) :]) == [-1] * (len(ids) - len(present))
    for (a, i), (b, j) in itertools.combinations(zip(documents, present), 2):
        if a == b:
            assert database.document_of[i] == database.document_of[j]
            assert i < j
        else:
            assert database.document_of[i] != database.document_of[j] or i > j


@settings(max_examples=30, deadline=None)
@given(layout=layouts, chunks=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_every_token_is_a_target_exactly_once_an_epoch(layout, chunks, seed):
    database = FakeDatabase(layout, seed, vocab_size=None)
    batches = Batches(config(chunks, seed=seed, neighbours=0), database)
    total = sum(batches.sequences.values())
    firsts = {row[0] for i, row in enumerate(database.rows) if i == 0 or is_start(database, i)}
    expected = sorted(set(database.rows[database.rows > 0]) - firsts)
    for epoch in range(2):
        rows = [epoch * total + row for row in range(total)]
        seen = [batches.rows(row // 3, [row % 3]).targets for row in rows]
        seen = np.concatenate(seen)
        assert sorted(seen[seen > 0]) == expected


def is_start(database, i):
    return database.document_of[i] != database.document_of[i - 1]


def test_targets_never_cross_documents():
    database = FakeDatabase([("a", [1, 2, 3, 1, 1, 4])], vocab_size=None)
    last_tokens = {row[row > 0][-1] for i, row in enumerate(database.rows) if ends(database, i)}
    assert len(last_tokens) == 6
    batches = Batches(config(neighbours=0), database)
    for step in range(6):
        batch = batches.rows(step)
        for token, target in zip(batch.tokens.ravel(), batch.targets.ravel()):
            ends_here = token == 0 or token in last_tokens
            assert target == (0 if ends_here else token + 1)


def ends(database, i):
    return i + 1 == len(database) or database.document_of[i + 1] != database.document_of[i]


def test_documents_that_fill_the_ring_do_not_read_their_own_future():
    database = FakeDatabase([("a", [10])], vocab_size=None)
    batches = Batches(config(neighbours=0), database)
    for step in range(8):
        batch = batches.rows(step)
        for tokens, numbers in zip(batch.tokens[:, ::M], batch.documents):
            for number in set(numbers) - {-1}:
                assert np.all(np.diff(tokens[numbers == number]) == M)


def test_padding_id_is_the_databases():
    database = FakeDatabase([("a", [2, 1])], pad_id=1000, vocab_size=1000)
    table = FakeTable.of(database, database, np.full((3, 2), -1))
    batch = Batches(config(), database, table, database).rows(0, [0])
    assert np.all(batch.neighbours == 1000)
    assert np.all(batch.tokens[0, 3 * M :] == 1000)
    np.testing.assert_array_equal(batch.targets == 1000, batch.targets >= 1000)
    assert 0 not in batch.targets[0, 3 * M :]


@pytest.fixture(scope="module")
def mixed():
    """Two corpora of unlike size, in three ranges, with neighbours."""
    layout = [("small", [1, 3, 2]), ("large", [4, 1, 2, 5] * 6), ("small", [2, 2])]
    database = FakeDatabase(layout, vocab_size=None)
    return database, FakeTable.random(database, database, 2)


@pytest.mark.parametrize("mixture", [None, {"small": 1.0, "large": 2.5}])
def test_any_division_of_rows_gives_the_same_global_batch(mixed, mixture):
    database, table = mixed
    batches = Batches(config(batch_size=8, mixture=mixture), database, table, database)
    for step in (0, 3, 1000):
        whole = batches.rows(step)
        assert whole.tokens.shape == (8, 4 * M)
        assert whole.neighbours.shape == (8, 4, 2, 2 * M)
        for hosts in (2, 4, 8):
            for host in range(hosts):
                mine = range(host, 8, hosts)
                part = Batches(batches.config, database, table, database).rows(step, mine)
                for field in FIELDS:
                    expected = getattr(whole, field)[list(mine)]
                    np.testing.assert_array_equal(getattr(part, field), expected)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_iterate_from_a_step_equals_rows(mixed, prefetch):
    database, table = mixed
    batches = Batches(config(prefetch=prefetch), database, table, database)
    for step, batch in zip(range(7, 12), batches.iterate(7)):
        assert_equal(batch, batches.rows(step))
    for step, batch in zip(range(2, 4), batches.iterate(2, rows=[2, 0])):
        assert_equal(batch, batches.rows(step, [2, 0]))


def test_epochs_differ_in_order_and_offset():
    database = FakeDatabase([("a", [3] * 40)], vocab_size=None)
    batches = Batches(config(chunks=8, batch_size=15, neighbours=0), database)
    firsts = [batches.rows(epoch).tokens[:, 0] // M - 1 for epoch in range(8)]
    offsets = [set(first % 8) for first in firsts]
    assert sorted(offset.pop() for offset in offsets) == list(range(8))
    orders = {tuple((first - min(first)) // 8) for first in firsts}
    assert len(orders) == 8


@pytest.mark.parametrize(
    ("part", "kept"), [("chunk", slice(0, M)), ("continuation", slice(M, None))]
)
def test_one_part_of_the_neighbours_is_the_rest_as_padding(mixed, part, kept):
    database, table = mixed
    whole = Batches(config(), database, table, database).rows(0, [0, 1, 2]).neighbours
    some = Batches(config(neighbour_part=part), database, table, database).rows(0, [0, 1, 2])
    expected = np.full_like(whole, database.pad_id)
    expected[..., kept] = whole[..., kept]
    assert (expected != whole).any()
    np.testing.assert_array_equal(some.neighbours, expected)


@pytest.mark.parametrize("length", [1, 96, 127])
def test_the_last_tokens_of_the_neighbours_are_a_shorter_array(mixed, length):
    """Without padding for the rest, and R is the part's."""
    database, table = mixed
    whole = Batches(config(), database, table, database).rows(0, [0, 1, 2]).neighbours
    part = f"last_{length}"
    some = Batches(config(neighbour_part=part), database, table, database).rows(0, [0, 1, 2])
    assert neighbour_length(part) == length and neighbour_length("both") == 2 * M
    np.testing.assert_array_equal(some.neighbours, whole[..., 2 * M - length :])


def test_noise_gives_a_part_of_the_chunks_another_chunks_neighbours(mixed):
    """The rest is as without; any division of rows has the same; all of them are some chunk's."""
    database, table = mixed
    batches = Batches(config(batch_size=64, neighbour_noise=0.3), database, table, database)
    plain = Batches(config(batch_size=64), database, table, database).rows(2)
    noisy = batches.rows(2)
    np.testing.assert_array_equal(noisy.tokens, plain.tokens)
    present = plain.documents >= 0
    differs = (noisy.neighbours != plain.neighbours).any(axis=(2, 3))
    assert not differs[~present].any() and 0.2 < differs[present].mean() < 0.4
    every = database.values(table.ids(np.arange(len(database)), 2))
    known = {one.tobytes() for one in every.astype(noisy.neighbours.dtype)}
    assert {one.tobytes() for one in noisy.neighbours[differs]} <= known
    some = batches.rows(2, [5, 1])
    np.testing.assert_array_equal(some.neighbours, noisy.neighbours[[5, 1]])
    # The batch says which: all that differ, and those whose other chunk has the same neighbours.
    assert batches.noise and not (differs & ~noisy.noise).any() and not noisy.noise[~present].any()
    assert 0.2 < noisy.noise[present].mean() < 0.4
    np.testing.assert_array_equal(some.noise, noisy.noise[[5, 1]])
    assert plain.noise is None and not Batches(config(), database, table, database).noise


def test_a_chunk_that_is_drawn_for_itself_has_no_noise():
    database = FakeDatabase([("a", [1])], vocab_size=None)
    table = FakeTable.of(database, database, np.zeros((1, 2)))
    batch = Batches(config(neighbour_noise=1.0), database, table, database).rows(0)
    assert not batch.noise.any()


def test_a_part_of_the_chunks_gets_the_neighbours_after_the_nearest(mixed):
    """Of 2 a chunk the nearest, or the second where further ones are drawn; by rows as by the batch."""
    database, table = mixed
    settings = {"batch_size": 64, "neighbours": 1}
    nearest = Batches(config(**settings), database, table, database).rows(2)
    pairs = Batches(config(batch_size=64), database, table, database).rows(2).neighbours
    batches = Batches(config(**settings, further_neighbours=0.3), database, table, database)
    found = batches.rows(2)
    np.testing.assert_array_equal(found.tokens, nearest.tokens)
    second = (found.neighbours == pairs[:, :, 1:]).all(axis=(2, 3))
    first = (found.neighbours == pairs[:, :, :1]).all(axis=(2, 3))
    assert (first | second).all() and found.noise is None
    told = (pairs[:, :, 0] != pairs[:, :, 1]).any(axis=-1)  # from one another
    assert 0.2 < second[told].mean() < 0.4
    np.testing.assert_array_equal(batches.rows(2, [5, 1]).neighbours, found.neighbours[[5, 1]])
    every = Batches(config(**settings, further_neighbours=1.0), database, table, database).rows(2)
    np.testing.assert_array_equal(every.neighbours, pairs[:, :, 1:])


def test_further_neighbours_need_twice_as_many_in_the_table(mixed):
    database, table = mixed
    with pytest.raises(
        UserError, match=r"further_neighbours is 0\.5: expected 0, or a table of 4 nei"
    ):
        Batches(config(further_neighbours=0.5), database, table, database)


def test_questions_have_no_further_neighbours_and_say_nothing_of_noise():
    """Their passages are given: none come after them, and none are drawn."""
    with pytest.raises(
        UserError, match=r"further_neighbours is 0\.5: expected 0 where .*questions"
    ):
        config(further_neighbours=0.5, questions="facts")
    assert config(neighbour_noise=0.1).noise
    assert not config(neighbour_noise=0.1, questions="facts").noise


def test_seeds_differ_and_repeat(mixed):
    database, _ = mixed
    first, again, other = (
        Batches(config(seed=seed, neighbours=0), database).rows(5).tokens for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_mixture_proportions(mixed):
    database, _ = mixed
    weights = {"small": 0.3, "large": 0.1}
    batches = Batches(config(batch_size=40, neighbours=0, mixture=weights), database)
    for steps in (range(1), range(50)):
        corpora = np.concatenate([batches.rows(step).corpus for step in steps])
        large, small = np.bincount(corpora, minlength=2)
        assert (batches.corpora, small) == (["large", "small"], 3 * large)


def test_mixture_leaves_out_what_it_does_not_name(mixed):
    database, _ = mixed
    batches = Batches(config(neighbours=0, mixture={"small": 5}), database)
    assert batches.sequences == {"small": 3}
    every = np.concatenate([batches.rows(step).tokens for step in range(10)])
    assert set(every[every > 0]) <= set(database.rows[:6].ravel()) | set(database.rows[-4:].ravel())


def test_fewer_chunks_than_a_sequence_is_one_padded_row():
    database = FakeDatabase([("a", [2, 1])], vocab_size=None)
    batches = Batches(config(chunks=8, batch_size=2, neighbours=0), database)
    for step in range(3):
        batch = batches.rows(step)
        np.testing.assert_array_equal(batch.tokens[0, : 3 * M], database.rows.ravel())
        assert not batch.tokens[:, 3 * M :].any()
        np.testing.assert_array_equal(batch.documents, [[0, 0, 1, -1, -1, -1, -1, -1]] * 2)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("sequence_length", 100, "a positive multiple of the chunk length 64"),
        ("sequence_length", 0, "a positive multiple of the chunk length 64"),
        ("batch_size", 0, "a positive number of rows"),
        ("neighbours", -1, "a number of neighbours"),
        ("seed", -1, "an integer from 0"),
        ("prefetch", -1, "a number of batches"),
        ("mixture", {}, "positive weights"),
        ("neighbour_part", "half", "one of"),
        ("neighbour_part", "last_0", "last_N with N from 1 to 127"),
        ("neighbour_part", "last_128", "last_N with N from 1 to 127"),
        ("neighbour_part", "last_-1", "last_N with N from 1 to 127"),
        ("neighbour_part", "last_9.5", "last_N with N from 1 to 127"),
        ("neighbour_part", 96, "last_N with N from 1 to 127"),
        ("mixture", {"a": 0.0}, "positive weights"),
        ("mixture", {"a": "1"}, "positive weights"),
    ],
)
def test_bad_settings_are_one_line(field, value, rule):
    with pytest.raises(UserError, match=rule) as caught:
        BatchConfig(**{field: value})
    assert f"BatchConfig.{field} is {value!r}" in str(caught.value)


def test_unknown_corpus_names_the_nearest(mixed):
    with pytest.raises(UserError, match=r"'smal'.*expected one of small$"):
        Batches(config(neighbours=0, mixture={"smal": 1.0}), mixed[0])


@pytest.mark.parametrize("chunks", [4500, 3000])
def test_long_and_short_corpora_visit_every_sequence_once_an_epoch(chunks):
    database = FakeDatabase([("a", [1] * chunks)], vocab_size=None)
    batches = Batches(config(chunks=1, batch_size=500, neighbours=0), database)
    orders = []
    for epoch in range(2):
        steps = range(epoch * chunks // 500, (epoch + 1) * chunks // 500)
        orders.append(np.concatenate([batches.rows(step).tokens[:, 0] for step in steps]))
        np.testing.assert_array_equal(np.sort(orders[-1]), database.rows[:, 0])
        assert np.mean(orders[-1] == np.sort(orders[-1])) < 0.01
    assert np.mean(orders[0] == orders[1]) < 0.01


def test_a_row_does_not_depend_on_the_corpora_beside_it():
    one, other = ("a", [3, 1, 4] * 5), ("b", [2, 2])
    mixture = {"a": 1.0}
    rows = [
        Batches(config(neighbours=0, mixture=mixture), FakeDatabase(layout, vocab_size=None)).rows(
            2
        )
        for layout in ([one], [one, other])
    ]
    np.testing.assert_array_equal(rows[0].tokens, rows[1].tokens)


def test_tables_that_do_not_fit_are_refused(mixed):
    database, table = mixed
    with pytest.raises(UserError, match="neighbours is 3: expected at most 2, which fake/neighb"):
        Batches(config(neighbours=3), database, table, database)
    with pytest.raises(UserError, match="neighbours is 2: expected a neighbour table, or 0"):
        Batches(config(), database)
    other = FakeDatabase([("a", [1])])
    told = "fake/neighbours/train and fake/chunks/train do not belong together: expected the {}"
    for role, databases in {"chunks": (other, database), "database": (database, other)}.items():
        with pytest.raises(UserError, match=told.format(role)):
            Batches(config(), databases[0], table, databases[1])


def test_a_chunk_that_is_not_there_is_not_compared():
    """A model that reads by shared tokens needs the neighbours' own chunks."""
    strict = dataclasses.replace(PRESETS["172m"], min_shared_tokens=0.4)
    check_neighbour_length(BatchConfig(neighbour_part="chunk"), strict)
    message = (
        "min_shared_tokens is 0.4: expected 0, as BatchConfig.neighbour_part is 'continuation'"
    )
    with pytest.raises(UserError, match=message):
        check_neighbour_length(BatchConfig(neighbour_part="continuation"), strict)
