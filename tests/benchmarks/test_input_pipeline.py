"""The input benchmark counts every sample of both layouts."""

import json

import pytest

from benchmarks import compile_time, harness, input_pipeline, tables


def test_both_layouts_are_read_whole_and_taken_apart(tmp_path, capsys):
    out = tmp_path / "out.json"
    flags = ["--scale=tiny", "--batch=8", "--blocks=2", "--step=0.5", f"--records={tmp_path}"]
    input_pipeline.COMMAND.main([*flags, f"--out={out}"])
    report = json.loads(out.read_text())
    for found in report["layouts"].values():
        assert found["records"] == 64
        assert [block["samples"] for block in found["blocks"]] == [64, 64]
        parts = dict(found["us_per_sample"])
        assert parts.pop("together") > 0 and all(value >= 0 for value in parts.values())
    printed = capsys.readouterr().out
    assert "| share of a step |" in printed
    input_pipeline.COMMAND.main([f"--show={out}"])
    assert capsys.readouterr().out == printed


def test_the_second_compilation_comes_from_the_cache(tmp_path):
    out = tmp_path / "out.json"
    compile_time.COMMAND.main(["--scale=tiny", "--length=64", "--repeats=1", f"--out={out}"])
    report = json.loads(out.read_text())
    hits = {kind: found["hits"] for kind, found in report["seconds"].items()}
    assert hits["cold"] == [0] and hits["from the cache"][0] > 0
    assert compile_time.table(report).count("\n") == 3


@pytest.mark.parametrize("scale", ["small", "full"])  # of the machine
@pytest.mark.parametrize(
    ("module", "result"), [(input_pipeline, "input"), (compile_time, "compile_time")]
)
def test_alone_they_write_what_the_tables_read(module, result, scale, monkeypatch):
    monkeypatch.setattr(harness, "default_scale", lambda: scale)
    whole, trial = (
        module.COMMAND.result(module.COMMAND.parse(flags)) for flags in ([], ["--scale=tiny"])
    )
    (aim,) = (aim for aim in tables.AIMS if aim.result == f"{result}_small")
    assert whole == f"{result}_{scale}" and whole in (aim.result, aim.otherwise)
    assert trial not in (aim.result, aim.otherwise)
