"""Bytes of HBM by the functions that asked for them."""

from retro_jax.costs import hlo
from retro_jax.costs.hbm_parts import OTHER, frame_functions, hbm_by_part

TEXT = """HloModule jit_train_step

FileNames
1 "retro.py"

FunctionNames
1 "train_step"
2 "Encoder.__call__"
3 "Encoder.__call__.<locals>.dropped"
4 "FeedForward.__call__"
5 "token_losses.<locals>.block_losses"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1}
2 {file_name_id=1 function_name_id=2 line=2}
3 {file_name_id=1 function_name_id=4 line=3}
4 {file_name_id=1 function_name_id=5 line=4}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=2}

%inner (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %twice = f32[8]{0} add(%q, %q), metadata={op_name="add" stack_frame_id=3}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %a = f32[8]{0} fusion(%x), kind=kLoop, calls=%inner
  %b = f32[8]{0} copy(%a)
  %c = f32[8]{0} negate(%x), metadata={op_name="neg" stack_frame_id=4}
  ROOT %d = f32[8]{0} copy(%x)
}
"""


def test_a_frame_has_its_functions_from_the_innermost_on():
    frames = frame_functions(TEXT)
    assert frames[3] == ("FeedForward.__call__", "Encoder.__call__", "train_step")
    assert frames[4] == ("token_losses.<locals>.block_losses", "train_step")


def test_what_says_nothing_belongs_to_what_it_consists_of_or_reads():
    moved = 2 * 4 * 8
    assert hbm_by_part(hlo.parse(TEXT), TEXT) == {
        "encoder: feed-forward": 2 * moved,
        "loss": moved,
        OTHER: moved,
    }
