"""Where time goes: nested and concurrent operations, parts by name, gaps."""

import pytest

from benchmarks.profile_table import (
    COMMAND,
    Event,
    Trace,
    account,
    bottleneck,
    exclusive,
    overview,
    part_of,
    read_program,
    share_out,
)

PROGRAM = """HloModule jit_train_step

%fused (p: f32[2]) -> f32[2] {
  %p = f32[2] parameter(0)
  ROOT %product = f32[2] dot(%p, %p), metadata={op_name="jvp(Decoder)/layers_0/q_proj/dot_general"}
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2] parameter(0)
  %fusion.1 = f32[2] fusion(%a), kind=kOutput, calls=%fused, metadata={op_name="jvp(Decoder)/add"}
  %low.2 = f32[2] dot(%a, %a), metadata={op_name="jit(f)/layers_0/q_proj/low_rank/dot_general"}
  %reduce.3 = f32[2] all-reduce(%a), metadata={op_name="jit(f)/layers_0/q_proj/low_rank/add"}
  ROOT %exp.4 = f32[2] exponential(%a), metadata={op_name="jit(f)/jvp(lm_head)/exp"}
}
"""
PARTS = {
    "fusion.1": "frozen matmuls",
    "low.2": "LoRA",
    "reduce.3": "communication",
    "exp.4": "lm_head",
}


def test_an_operation_belongs_to_the_part_that_it_was_written_for():
    found = read_program(PROGRAM)
    assert {name: found[name] for name in PARTS} == PARTS


@pytest.mark.parametrize(
    ("kind", "scopes", "part"),
    [
        (
            "fusion",
            "jit(f)/transpose(jvp(Decoder))/layers_1/attention/exp",
            "attention",
        ),
        ("dot", "jit(f)/jvp(Fusion)/face/dot_general", "heads and fusion"),
        ("fusion", "jit(f)/jvp(Decoder)/layers_0/mul", "norms, rotary, SwiGLU, residuals"),
        ("add", "jit(f)/transpose(jvp(Decoder))/add", "norms, rotary, SwiGLU, residuals"),
        (
            "dot",
            "jit(f)/jvp(Decoder)/layers_0/q_proj_k_proj_v_proj/dot",
            "frozen matmuls",
        ),
        ("copy-start", "", "host and device"),
        ("copy", "", "copies and zeros"),
        ("add", "", "other"),
    ],
)
def test_parts_go_by_kind_and_scope(kind, scopes, part):
    assert part_of(kind, scopes) == part


def test_a_caller_has_only_the_time_outside_of_what_it_calls():
    events = [Event(0, 10, "loop"), Event(2, 5, "a"), Event(3, 4, "b"), Event(6, 7, "a")]
    times = {}
    for event in exclusive(events):
        times[event.name] = times.get(event.name, 0) + event.end - event.start
    assert times == {"loop": 6, "a": 3, "b": 1}


def test_a_moment_is_shared_by_what_runs_in_it():
    times, gaps = share_out([Event(0, 4, "a"), Event(2, 6, "b"), Event(8, 9, "a")])
    assert times == {"a": 2 + 1 + 1, "b": 1 + 2} and gaps == [(6, 8)]


def test_a_matmul_without_scopes_is_of_the_part_that_reads_its_result():
    program = """HloModule jit_train_step

%fused (p: f32[2]) -> f32[2] {
  %p = f32[2] parameter(0)
  ROOT %product = f32[2] dot(%p, %p), lhs_batch_dims={0}
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %p.1 = f32[2] parameter(0)
  %fusion.1 = f32[2] fusion(%p.1), kind=kCustom, calls=%fused
  %copy.2 = f32[2] copy(%fusion.1)
  %fusion.3 = f32[2] fusion(%p.1), kind=kCustom, calls=%fused
  ROOT %exp.4 = f32[2] exponential(%copy.2), metadata={op_name="layers/attention/exp"}
}
"""
    found = read_program(program)
    assert found["fusion.1"] == "attention"
    assert found["fusion.3"] == "other"


def test_gaps_are_input_wait_or_idle():
    lane = [("p", Event(0, 2, "fusion.1")), ("p", Event(6, 8, "exp.4"))]
    found = account(Trace([lane], [Event(3, 5, "data_wait")]), {"p": read_program(PROGRAM)}, 2)
    assert found == pytest.approx(
        {
            k: v / 2e9
            for k, v in (("frozen matmuls", 2), ("lm_head", 2), ("input wait", 2), ("idle", 2))
        }
    )


def test_the_bottleneck_is_the_most_time_above_what_flops_take():
    found = {"seconds": {"a": 6.0, "b": 4.0}, "floors": {"a": 5.0}}
    assert bottleneck(found) == "b: 40%"


def test_profiles_stand_side_by_side():
    of = {"workload": "small", "scale": "tiny", "packed": False, "batch": None, "floors": {}}
    one = of | {"seconds": {"a": 0.003, "b": 0.001}}
    two = of | {"workload": "affectgpt", "packed": True, "batch": 3, "seconds": {"c": 0.1}}
    assert overview([one, two]).splitlines() == [
        "| part | small, tiny | affectgpt 3, packed, tiny |",
        "|---|---|---|",
        "| a | 3.0 ms, 75.0% |  |",
        "| b | 1.0 ms, 25.0% |  |",
        "| c |  | 100.0 ms, 100.0% |",
        "| all | 4 ms | 100 ms |",
        "| most to gain in | a: 75% | c: 100% |",
    ]


def test_a_folder_without_a_profile_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*about.json is missing; make a profile with"):
        COMMAND.main([str(tmp_path)])


def test_a_profile_without_programs_is_refused(tmp_path):
    for name in ("about", "block"):
        (tmp_path / f"{name}.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"error: .* holds no program-\*.hlo; make a profile with"):
        COMMAND.main([str(tmp_path)])
