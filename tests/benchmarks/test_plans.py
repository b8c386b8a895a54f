"""The committed plans are those of the list, and their table says what they say."""

from benchmarks import harness, plans


def test_the_table_has_a_row_for_every_plan():
    report = harness.load(harness.RESULTS / "plans.json")
    kept = report["plans"]
    assert [made["command"] for made in kept] == [
        " ".join([*plans.PLAN, *flags]) for flags in plans.PLANS
    ]
    rows = plans.table(report).splitlines()[2:]
    for row, made in zip(rows[: len(plans.PLANS)], kept, strict=True):
        layout = made["plan"]["layout"]
        assert row.startswith(f"| {layout['devices']} x {made['plan']['device']['name']} |")
        assert f"| {layout['tokens_per_s']:,.0f} |" in row
