"""Costs read from a program's text: by hand on short texts, and on what XLA really compiles."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from retro_jax.costs import hlo
from retro_jax.costs.program_costs import program_costs


def costs(body: str, devices: int = 8, more: str = ""):
    """Costs of an entry computation of these lines, with further computations before it."""
    return program_costs(
        hlo.parse(f"{more}\nENTRY %main (p: f32[]) -> f32[] {{\n{body}\n}}\n"), devices
    )


DOT = """
  %a = bf16[4,8,16]{2,1,0} parameter(0)
  %b = bf16[4,16,32]{2,1,0} parameter(1)
  ROOT %dot.1 = f32[4,8,32]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}
"""


def test_a_dot_counts_its_products_and_what_it_moves():
    found = costs(DOT)
    assert found.flops == 2 * 4 * 8 * 32 * 16
    assert found.hbm_bytes == 2 * 4 * 8 * 16 + 2 * 4 * 16 * 32 + 4 * 4 * 8 * 32
    assert found.collectives == ()


def test_the_chips_own_memory_is_free():
    inside = DOT.replace("bf16[4,8,16]{2,1,0}", "bf16[4,8,16]{2,1,0:T(8,128)(2,1)S(1)}")
    assert costs(DOT).hbm_bytes - costs(inside).hbm_bytes == 2 * 4 * 8 * 16


@pytest.mark.parametrize(
    ("attributes", "left", "right", "out", "flops"),
    [
        ("dim_labels=bf_io->bf", "64,16", "16,32", "64,32", 2 * 64 * 32 * 16),
        # a batch of 4 products, as TPUs write it: dilated so that one tap of the window meets data
        (
            "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            "4,8,16",
            "4,16,32",
            "4,8,32",
            2 * 4 * 8 * 32 * 16,
        ),
        # a real convolution: 3 taps, the first and last of 10 places meet two of them
        (
            "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            "2,10,5",
            "3,5,7",
            "2,10,7",
            2 * 2 * 7 * 5 * (3 * 10 - 2),
        ),
    ],
)
def test_convolutions(attributes, left, right, out, flops):
    body = f"""
  %a = bf16[{left}]{{1,0}} parameter(0)
  %b = bf16[{right}]{{1,0}} parameter(1)
  ROOT %c = f32[{out}]{{1,0}} convolution(%a, %b), {attributes}
"""
    assert costs(body).flops == flops


FUSED = """
%fused (p0: f32[100,8], p1: s32[], p2: f32[100,8], p3: f32[1,8]) -> f32[100,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[100,8]{1,0} parameter(2)
  %p3 = f32[1,8]{1,0} parameter(3)
  %zero = s32[] constant(0)
  %row = f32[1,8]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,8}
  %sum = f32[1,8]{1,0} add(%row, %p3)
  ROOT %new = f32[100,8]{1,0} dynamic-update-slice(%p2, %sum, %p1, %zero)
}
"""


def test_a_fusion_moves_the_slices_it_reads_and_the_update_it_makes():
    body = """
  %x = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[100,8]{1,0} parameter(2)
  %r = f32[1,8]{1,0} parameter(3)
  ROOT %f = f32[100,8]{1,0} fusion(%x, %i, %y, %r), kind=kLoop, calls=%fused
"""
    index, row = 4, 8 * 4
    assert costs(body, more=FUSED).hbm_bytes == row + row + row + index


def test_a_slice_in_a_fusion_within_a_fusion_counts_as_the_slice():
    more = """
%inner (q0: f32[100,8], q1: s32[]) -> f32[1,8] {
  %q0 = f32[100,8]{1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,8]{1,0} dynamic-slice(%q0, %q1, %zero), dynamic_slice_sizes={1,8}
}
%outer (p0: f32[100,8], p1: s32[]) -> f32[1,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %row = f32[1,8]{1,0} fusion(%p0, %p1), kind=kLoop, calls=%inner
  ROOT %twice = f32[1,8]{1,0} add(%row, %row)
}
"""
    body = """
  %x = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[1,8]{1,0} fusion(%x, %i), kind=kOutput, calls=%outer
"""
    assert costs(body, more=more).hbm_bytes == 4 * 8 + 4 + 4 * 8


@pytest.mark.parametrize(
    ("line", "kind", "groups", "received"),
    [
        (
            "all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}",
            "all-gather",
            ((0, 1, 2, 3), (4, 5, 6, 7)),
            4 * 64 * 3 / 4,
        ),
        (
            "all-reduce(%p), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add",
            "all-reduce",
            ((0, 2, 4, 6), (1, 3, 5, 7)),
            2 * 4 * 64 * 3 / 4,
        ),
        (
            "all-to-all(%p), replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}",
            "all-to-all",
            ((0, 1), (2, 3), (4, 5), (6, 7)),
            4 * 64 / 2,
        ),
        (
            "all-reduce(%p), replica_groups=mesh['a'=4,'b'=2] {'a':(2)2, 'b'}, to_apply=%add",
            "all-reduce",
            ((0, 1, 2, 3), (4, 5, 6, 7)),
            2 * 4 * 64 * 3 / 4,
        ),
        (
            "collective-permute(%p), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            ((0, 1), (1, 0)),
            4 * 64,
        ),
        (
            "all-reduce(%p), replica_groups={}, to_apply=%add",
            "all-reduce",
            (tuple(range(8)),),
            2 * 4 * 64 * 7 / 8,
        ),
    ],
)
def test_who_exchanges_and_how_much(line, kind, groups, received):
    body = f"""
  %p = f32[16]{{0}} parameter(0)
  ROOT %x = f32[64]{{0}} {line}, metadata={{op_name="jit(f)/here"}}
"""
    (found,) = costs(body).collectives
    assert (found.kind, found.groups, found.times) == (kind, groups, 1)
    assert found.received == received
    assert found.operation == "jit(f)/here"


def test_a_reduce_scatter_receives_what_it_is_given_but_its_own_part():
    body = """
  %p = f32[64]{0} parameter(0)
  ROOT %x = f32[16]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
"""
    (found,) = costs(body).collectives
    assert found.received == 4 * 64 * 3 / 4


def test_an_exchange_in_two_halves_counts_once():
    body = """
  %p = f32[16]{0} parameter(0)
  %s = (f32[16]{0}, f32[64]{0}) all-gather-start(%p), replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %d = f32[64]{0} all-gather-done(%s)
"""
    (found,) = costs(body).collectives
    assert found.received == 4 * 64 * 3 / 4
    assert costs(body).hbm_bytes == 4 * 16 + 4 * 64


@pytest.mark.parametrize(
    ("kernel", "products"), [("splash_mha_fwd_residuals", 2), ("splash_mha_dkv", 5), ("other", 0)]
)
def test_attention_kernels_make_the_blocks_below_the_diagonal(kernel, products):
    """Of 4 x 4 blocks 10, each of 16 queries, 16 keys and a head of 8."""
    found = costs(f"""
  %m = s8[1,4,4]{{2,1,0}} parameter(0)
  %q = bf16[2,3,64,8]{{3,2,1,0}} parameter(1)
  ROOT %{kernel}.1 = bf16[2,3,64,8]{{3,2,1,0}} custom-call(%m, %q, %q, %q), custom_call_target="tpu_custom_call"
""")
    assert found.flops == products * 10 * 2 * 2 * 3 * 16 * 16 * 8


@pytest.mark.parametrize(
    ("kernel", "products"), [("relative_attention", 4), ("relative_attention_gradients", 11)]
)
def test_the_kernel_for_relative_positions_is_counted_by_its_table(kernel, products):
    found = costs(f"""
  %q = bf16[2,3,64,8]{{3,2,1,0}} parameter(0)
  %r = bf16[3,80,8]{{2,1,0}} parameter(1)
  %s = f32[2,1,64]{{2,1,0}} parameter(2)
  ROOT %{kernel}.1 = bf16[2,3,64,8]{{3,2,1,0}} custom-call(%q, %q, %q, %r, %r, %s, %s, %q), custom_call_target="tpu_custom_call"
""")
    assert found.flops == products * 10 * 2 * 2 * 3 * 16 * 16 * 8


SHORT = {
    "relative": "%u = bf16[1,24] parameter(4)\n%v = bf16[1,24] parameter(5)\n%w = bf16[64,24] parameter(6)",
    "rotary": "%u = f32[16,8] parameter(4)\n%v = f32[16,8] parameter(5)\n"
    "%w = f32[32,8] parameter(6)\n%z = f32[32,8] parameter(7)",
}


@pytest.mark.parametrize(
    ("kernel", "positions", "products"),
    [
        ("short_attention", "relative", 16 * (2 * 32 + 64)),
        ("short_attention_gradients", "relative", 16 * (5 * 32 + 3 * 64)),
        ("short_attention", "rotary", 16 * 2 * 32 + 48 * 8),
        ("short_attention_gradients", "rotary", 16 * 5 * 32 + 2 * 48 * 8),
    ],
)
def test_the_kernel_over_few_keys_is_counted_by_its_keys_and_positions(kernel, positions, products):
    """16 queries and 32 keys of three heads of 8; 64 distances, or a matrix [8, 8] that turns."""
    more = ", %z" if positions == "rotary" else ""
    found = costs(f"""
  %q = bf16[6,16,24]{{2,1,0}} parameter(0)
  %k = bf16[6,32,48]{{2,1,0}} parameter(1)
  %f = f32[6,1,16]{{2,1,0}} parameter(2)
  %g = f32[6,1,32]{{2,1,0}} parameter(3)
{SHORT[positions]}
  ROOT %{kernel}.1 = bf16[6,16,24]{{2,1,0}} custom-call(%q, %k, %f, %g, %u, %v, %w{more}, %q), custom_call_target="tpu_custom_call"
""")
    assert found.flops == 2 * 6 * 24 * products


LOOP = """
%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]{0}) parameter(0)
  %n = s32[] get-tuple-element(%q), index=0
  %x = f32[8]{0} get-tuple-element(%q), index=1
  %y = f32[8]{0} negate(%x)
  ROOT %out = (s32[], f32[8]{0}) tuple(%n, %y)
}
%condition (c: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %c = (s32[], f32[8]{0}) parameter(0)
  %at = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%at, %limit), direction=LT
}
"""


@pytest.mark.parametrize(
    ("known", "condition", "times"),
    [
        ("", LOOP, 12),  # libtpu, before it makes machine code
        (', backend_config={"known_trip_count":{"n":"5"}}', LOOP, 5),
        ("", LOOP.replace("direction=LT", "direction=GT"), 1),
        ("", LOOP.replace("constant(12)", "get-tuple-element(%c), index=0"), 1),
    ],
)
def test_a_loop_runs_as_often_as_the_compiler_or_its_condition_says(known, condition, times):
    loop = (
        "  %t = (s32[], f32[8]{0}) parameter(0)\n  ROOT %w = (s32[], f32[8]{0}) "
        f"while(%t), condition=%condition, body=%body{known}"
    )
    assert costs(loop, more=condition).hbm_bytes == times * 2 * 4 * 8


def test_a_compiled_loop_counts_as_often_as_it_runs():
    """Weights gathered over one axis for each of 5 layers, partial sums added over the other."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), (AxisType.Explicit,) * 2, devices=jax.devices()[:8])

    def layer(x, w):
        w = jax.sharding.reshard(w, P(None, "b"))
        wide = jnp.einsum("bd,df->bf", x, w, out_sharding=P("a", "b"))
        return jnp.einsum("bf,df->bd", wide, w, out_sharding=P("a", None)), None

    def struct(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    x, w = struct((16, 32), P("a")), struct((5, 32, 64), P(None, "a", "b"))
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda x, w: jax.lax.scan(layer, x, w)[0]).lower(x, w).compile()
    found = program_costs(hlo.parse(compiled.as_text()), 8)
    assert found.flops == 5 * 2 * (2 * 4 * 32 * 32)
    gather, reduce = sorted(found.collectives, key=lambda c: c.kind)
    assert (gather.kind, gather.times, reduce.kind, reduce.times) == (
        "all-gather",
        5,
        "all-reduce",
        5,
    )
    assert gather.groups == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert gather.received == 4 * 32 * 32 * 3 / 4
    assert reduce.received == 2 * 4 * 4 * 32 / 2
