"""Counts of look-ups: of searches by hand, of the BERT against the products of its program."""

import math
import types

import jax
import numpy as np
import pytest
from flax import nnx

from data_pipelines.evaluation.lookup_cost import (
    LookupCost,
    datastore_cost,
    embedding_operations,
    search_cost,
)
from data_pipelines.retriever.bert import Bert, BertConfig
from data_pipelines.retriever.index_kind import IndexPlan


def products(jaxpr) -> float:
    """Operations of every dot_general of a program, a scan's as often as it runs."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * depth * equation.outvars[0].aval.size
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * products(inner)
    return total


def test_the_bert_is_counted_as_its_program_multiplies():
    config = BertConfig(50, 32, 3, 4, 64, max_position_embeddings=24)
    bert = nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(bert)
    ids, lengths = np.zeros((2, 16), np.int32), np.full(2, 16, np.int32)
    program = jax.make_jaxpr(lambda p, *texts: nnx.merge(graph, p)(*texts))(params, ids, lengths)
    # The mean over a text's positions may be a product of 2 positions d operations too.
    expected = 2 * embedding_operations(config, 16)
    assert products(program.jaxpr) == pytest.approx(expected, abs=2 * 2 * 16 * 32)


@pytest.mark.parametrize(
    ("plan", "operations", "read"),
    [
        (IndexPlan("brute_force"), 2 * 8 * 1000, 4 * 8 * 1000),
        (IndexPlan("hashing", 0, 0, 4, 10), 2 * 8 * 10 + 2000, 4 * 8 * 10 + 1000),
        (IndexPlan("tree", 20, 5, 4, 10), 2 * 8 * 30 + 500, 4 * 8 * 30 + 250),
    ],
)
def test_a_search_reads_what_its_plan_says(plan, operations, read):
    assert search_cost(plan, 1000, 8) == (operations, read)


def test_costs_of_one_database_add_up():
    text = types.SimpleNamespace(vocab_size=300, pad_id=0)
    store = datastore_cost(1000, 8, IndexPlan("hashing", 0, 0, 4, 10), text)
    assert store.bytes_kept == 1000 * (2 * 8 + 2 + 1)  # keys, tokens, two codes of 4 bits
    both = store + LookupCost(1.0, 2.0, 3.0, 900)
    assert (both.operations, both.tokens) == (store.operations + 1, 1000)
