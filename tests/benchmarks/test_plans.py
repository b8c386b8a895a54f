"""The committed plans are those of the list, and their table says what they say."""

import json

from benchmarks import plans


def test_the_table_has_a_row_for_every_plan():
    kept = json.loads((plans.RESULTS / "plans.json").read_text(encoding="utf-8"))["plans"]
    assert [made["command"] for made in kept] == [
        " ".join([*plans.COMMAND, *flags]) for flags in plans.PLANS
    ]
    rows = plans.table(kept).splitlines()[2:]
    assert len(rows) == len(plans.PLANS)
    for row, made in zip(rows, kept):
        layout = made["plan"]["layout"]
        assert row.startswith(f"| {layout['devices']} x {made['plan']['device']['name']} |")
        assert f"| {layout['tokens_per_s']:,.0f} |" in row
