"""JAX equals the PyTorch twin on every kind of row, and the comparison sees when it does not."""

import dataclasses
import json
import math

import needs_torch
import numpy as np
import pytest
from tiny_model import (
    FUSION,
    LLM,
    make_batch,
    make_model,
    pack_rows,
    random_base,
    random_trainable,
)

from affectgpt_jax.models.qformer import QFormerConfig
from affectgpt_jax.training.losses import cross_entropy
from affectgpt_jax.training.optimizer import (
    OptimizerConfig,
    learning_rate_schedule,
    make_optimizer,
)
from affectgpt_jax.training.step import make_train_step
from affectgpt_jax.weights.huggingface import save_base

torch = needs_torch.pytorch("the twin runs in PyTorch")
needs_torch.peft("the twin's adapters are PEFT's")

from benchmarks import parity, probes  # noqa: E402
from benchmarks.torch_reference.model import TUNINGS, AffectGPT  # noqa: E402
from benchmarks.torch_reference.weights import by_torch_name, load_trainable  # noqa: E402

MODEL = make_model()
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2,
    warmup_learning_rate=1e-3,
    warmup_steps=2,
    final_learning_rate=1e-3,
    clip_norm=0.5,
)


def edge_cases():
    """Rows: of maximum length; padded; a one-token answer; no modality; no audio; filler."""
    batch = make_batch([16, 11, 5, 12, 9, 0])
    assert batch["target_weights"].sum(axis=1).tolist() == [6, 6, 1, 6, 5, 0]
    for row, names in ((3, ("audio", "face")), (4, ("audio",))):
        for name in names:
            batch["present"][name][row] = False
            batch["features"][name][row] = np.nan  # what stands there must not matter
    return batch


def packed():
    """Clips that must not see each other, one of them without audio; row two has room for more."""
    alone = make_batch([9, 16, 7, 12])
    alone["present"]["audio"][2] = False
    return pack_rows(alone, [[0, 2, 3], [1]], width=32, targets=18, clips=3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    save_base(path, LLM, random_base(MODEL))
    return path


@pytest.fixture(scope="module")
def probe():
    """JAX's side, compiled once for each shape of batch."""
    run = probes.make_probe_jax(MODEL)
    return lambda batch: run(random_base(MODEL), random_trainable(MODEL), batch)


def make_twin(directory, tuning="tuned", model=MODEL):
    fusion = model.fusion and model.fusion.config
    lora = model.decoder.lora
    twin = AffectGPT.from_pretrained(directory, fusion, lora, tuning=TUNINGS[tuning])
    load_trainable(twin, random_trainable(model))
    return twin


def rows_of(ours, theirs):
    return [
        parity.compare(name, ours[name], theirs[name], parity.BOUND_OF.get(name, parity.BOUND))
        for name in theirs
    ]


# --- The model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["release", "tuned"])
def test_every_part_agrees_on_every_kind_of_row(directory, probe, tuning):
    batch = edge_cases()
    rows = rows_of(probe(batch), probes.probe_torch(make_twin(directory, tuning), batch))
    assert [row for row in rows if not row.passed] == []
    counts = {row.what: len(row.errors) for row in rows}
    assert counts == {
        "hidden states": 1 + LLM.num_hidden_layers,
        "logits": 2,
        "loss": 1,
        "gradients of LoRA": 2 * 7 * LLM.num_hidden_layers,
        "gradients of fusers": 18,
    }


def test_every_part_agrees_on_packed_rows(directory, probe):
    batch = packed()
    rows = rows_of(probe(batch), probes.probe_torch(make_twin(directory, "packed"), batch))
    assert [row for row in rows if not row.passed] == []


def test_a_model_without_adapters_or_without_fusers_agrees(directory):
    text = make_model(fusion=None)
    without_lora = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, lora=None))
    for model in (text, without_lora):
        batch = edge_cases()
        ours = probes.make_probe_jax(model)(random_base(model), random_trainable(model), batch)
        theirs = probes.probe_torch(make_twin(directory, model=model), batch)
        assert [row for row in rows_of(ours, theirs) if not row.passed] == []


def test_another_family_of_language_models_agrees(tmp_path):
    model = make_model(dataclasses.replace(LLM, qkv_bias=False))  # a Llama
    save_base(tmp_path, model.decoder.config, random_base(model))
    batch = packed()
    ours = probes.make_probe_jax(model)(random_base(model), random_trainable(model), batch)
    twin = make_twin(tmp_path, "packed", model)
    assert "Llama" in type(twin.causal_lm).__name__
    assert [row for row in rows_of(ours, probes.probe_torch(twin, batch)) if not row.passed] == []


def test_every_fuser_agrees():
    qformer = QFormerConfig(width=16, heads=4, layers=1, intermediate=24)
    widths = {**FUSION.widths, "image": 7}
    fusion = dataclasses.replace(FUSION, widths=widths, qformer=qformer)
    rows = parity.compare_fusers(fusion, LLM.hidden_size, seed=0)
    assert [row for row in rows if not row.passed] == []
    assert all(len(row.errors) == 6 for row in rows), "a slot was not compared"


def test_gradients_of_qformers_agree(directory):
    qformer = QFormerConfig(width=16, heads=4, layers=1, intermediate=24)
    kinds = {"multi": "qformer", "audio": "qformer", "video": "mean"}
    model = make_model(fusion=dataclasses.replace(FUSION, qformer=qformer, kinds=kinds))
    batch = edge_cases()
    # Some of each Q-Former's tokens; row 25 is the only one of the mean head.
    batch["soft_token_index"] = np.where(
        batch["soft_token_index"] == 3, 25, 7 * batch["soft_token_index"]
    )
    ours = probes.make_probe_jax(model)(random_base(model), random_trainable(model), batch)
    theirs = probes.probe_torch(make_twin(directory, model=model), batch)
    assert [row for row in rows_of(ours, theirs) if not row.passed] == []
    assert {name.split("_")[0] for name in theirs["gradients of fusers"]} == {
        "multi",
        "audio",
        "affectgpt",
    }


# --- Training -------------------------------------------------------------------------------------


def test_training_runs_agree(directory):
    batches = [make_batch([16, 11, 7, 0], seed=seed) for seed in range(6)]
    optimizer = make_optimizer(OPTIMIZER, steps=6)
    schedule = learning_rate_schedule(OPTIMIZER, steps=6)
    step = make_train_step(MODEL, cross_entropy, optimizer, schedule, seed=0)
    train = probes.make_train_jax(step, optimizer)
    ours, losses = train(random_base(MODEL), random_trainable(MODEL), batches)
    twin = make_twin(directory)
    theirs = probes.train_torch(twin, batches, OPTIMIZER, steps=6)
    # Every update feeds the rounding of the last one back: see `parity.CURVE`.
    np.testing.assert_allclose(losses, theirs, rtol=1e-4)
    assert losses[-1] != pytest.approx(losses[0], rel=0.01), "nothing was learned"
    expected = {k: p.numpy(force=True) for k, p in twin.named_parameters() if p.requires_grad}
    row = parity.compare("parameters", by_torch_name(ours), expected, bound=1e-3)
    assert row.passed, row


# --- What turns a row red -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "red"),
    [
        (
            "llama_model.base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight",
            {"layer 1"},
        ),
        (
            "llama_model.base_model.model.model.layers.0.self_attn.k_proj.base_layer.bias",
            {"layer 0", "layer 1"},
        ),
        ("llama_model.base_model.model.model.norm.weight", {"layer 0", "layer 1"}),
        ("fc_att.bias", {"embeddings", "layer 0", "layer 1"}),
    ],
)
def test_one_wrong_weight_is_seen_where_it_acts(directory, probe, name, red):
    twin, batch = make_twin(directory), edge_cases()
    with torch.no_grad():
        twin.get_parameter(name).flatten()[3 % twin.get_parameter(name).numel()].add_(0.05)
    rows = {row.what: row for row in rows_of(probe(batch), probes.probe_torch(twin, batch))}
    hidden = rows["hidden states"]
    assert {name for name, error in hidden.errors.items() if error > hidden.bound} == red
    assert not rows["logits"].passed
    assert not rows["gradients of LoRA"].passed


def test_a_value_that_is_missing_misshapen_or_not_a_number_is_red():
    good = {"a": np.ones(3), "b": np.ones(2)}
    assert parity.compare("x", good, good).value == 0
    for bad in ({"a": np.ones(3)}, good | {"a": np.ones((3, 1))}, good | {"c": np.ones(1)}):
        row = parity.compare("x", bad, good)
        assert not row.passed
        assert row.value == math.inf
    row = parity.compare("x", {"a": np.full(3, math.nan), "b": 2 * np.ones(2)}, good)
    assert not row.passed
    assert row.note == "a"


def test_what_is_zero_must_be_zero():
    zero, noise = {"a": np.zeros(3)}, {"a": np.full(3, 1e-30)}
    assert parity.compare("x", zero, zero).passed
    assert not parity.compare("x", noise, zero).passed


def test_the_bias_of_a_key_is_measured_on_the_scale_of_its_weight():
    true = {"self.key.weight": np.full(4, 2.0), "self.key.bias": np.zeros(4)}
    noise = true | {"self.key.bias": np.full(4, 1e-6)}
    assert parity.errors_of(noise, true)["self.key.bias"] == pytest.approx(5e-7)


def test_rounding_is_judged_by_the_median_tensor_over_draws():
    draws = [{"a": 1e-3, "b": 4e-2, "c": 0.0}, {"a": 4e-3, "b": 1e-2, "c": 0.0}]
    assert parity.compare_rounding("x", draws, draws).value == 1
    half = [{name: error / 2 for name, error in draw.items()} for draw in draws]
    assert parity.compare_rounding("x", half, draws).value == pytest.approx(0.5)
    worse = parity.compare_rounding("x", draws, half)
    assert worse.value == pytest.approx(2)
    assert not worse.passed
    inexact = [draw | {"b": 0.0} for draw in draws]  # exact in PyTorch alone
    assert math.isnan(parity.compare_rounding("x", [{"b": 0.1}], [{"b": 0.0}]).value)
    assert parity.compare_rounding("x", inexact, inexact).value == 1


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path):
    return ["--device=cpu", f"--out={tmp_path / 'results' / 'parity.json'}"]


def test_the_command_compares_all_on_the_base_that_ships(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probes, "HEADS", {"attention": probes.HEADS["attention"]})
    sizes = ["--batch-size=2", "--steps=2", "--draws=1"]
    with pytest.raises(SystemExit) as end:
        parity.COMMAND.main([*arguments, *sizes])
    report = json.loads((tmp_path / "results" / "parity.json").read_text())
    # A single draw of bfloat16's errors is luck; it may be red here.
    red = [row["what"] for row in report["rows"] if not row["passed"]]
    assert [what for what in red if not what.startswith("bfloat16")] == []
    assert end.value.code == bool(red)
    assert len(report["rows"]) == 15
    assert len(report["curves"]["jax"]) == len(report["curves"]["torch"]) == 2
    assert (tmp_path / "results" / "parity.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    parity.COMMAND.main(["--show", str(tmp_path / "results" / "parity.json")])
    assert capsys.readouterr().out == shown


def test_a_red_row_is_the_exit_status(arguments, monkeypatch, capsys):
    report = {
        "environment": {},
        "settings": dict(llm="tiny", device="cpu", batch_size=1, length=1, seed=0, wall_s=1.0),
        "curves": {"jax": [1.0, 0.5], "torch": [1.1, 0.6], "jax_nudged": [1.2, 0.7]},
    }
    for error, status in ((1e-6, 0), (1e-3, 1)):
        row = parity.Row("hidden states", {"a": error}, error, parity.BOUND, "a")
        report["rows"] = [row.as_json()]
        monkeypatch.setattr(parity, "check", lambda *_: report)
        with pytest.raises(SystemExit) as end:
            parity.COMMAND.main(arguments)
        assert end.value.code == status
        assert ("**red**" in capsys.readouterr().out) == status


def test_a_base_that_is_not_there_is_one_sentence(arguments):
    with pytest.raises(SystemExit, match="error: config.llm='/no/such/model' is not a directory"):
        parity.COMMAND.main([*arguments, "--llm=/no/such/model"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_sentence():
    with pytest.raises(SystemExit, match="error: --device=cuda, but JAX and PyTorch found no GPU"):
        parity.COMMAND.main(["--device=cuda"])
