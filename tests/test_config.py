import ast
import json
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import affectgpt_jax
from affectgpt_jax import build
from affectgpt_jax.cli import UsageError, make_parser
from affectgpt_jax.config import (
    CHOICES,
    FREE_ON_RESUME,
    POSITIVE,
    SECTIONS,
    ConfigError,
    check_same_run,
    find_config,
    parse_command_line,
    save_config,
    shipped_configs,
    validate,
)
from affectgpt_jax.configs import affectgpt_qwen25_7b, demo
from affectgpt_jax.data import modalities
from affectgpt_jax.models.decoder import DecoderConfig

PACKAGE = Path(affectgpt_jax.__file__).parent


def parse(*argv: str) -> tuple[ConfigDict, Path]:
    config, flags = parse_command_line(argv, make_parser("affectgpt train", "Train."))
    return config, flags.workdir


def refusal(*argv: str) -> str:
    """The message of a refused command line: one sentence that a user can read."""
    with pytest.raises((ConfigError, UsageError)) as caught:
        parse(*argv)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def leaves(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    found = {}
    for key, value in config.items():
        nested = isinstance(value, ConfigDict)
        found |= leaves(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def config_file(path: Path, *changes: str) -> str:
    """A config file that changes the demo's."""
    lines = ["from affectgpt_jax.configs import demo", "def get_config():"]
    lines += ["    c = demo.get_config()", *(f"    {change}" for change in changes), "    return c"]
    path.write_text("\n".join(lines), encoding="utf-8")
    return f"--config={path}"


# --- what is accepted ---------------------------------------------------------------------------


def test_without_arguments_it_is_the_demo():
    config, workdir = parse()
    assert leaves(config) == leaves(demo.get_config())
    assert workdir == Path("runs/demo")


@pytest.mark.parametrize("name", ["demo", "affectgpt_qwen25_7b"])
@pytest.mark.parametrize("form", ["{}", "{}.py", "configs/{}.py"])
@pytest.mark.parametrize("flag", ["--config={}", "--config {}"])
def test_shipped_configs_are_found_from_any_directory(name, form, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, workdir = parse(*flag.format(form.format(name)).split())
    expected = {"demo": demo, "affectgpt_qwen25_7b": affectgpt_qwen25_7b}[name].get_config()
    assert leaves(config) == leaves(expected)
    assert workdir == Path("runs") / name


def test_every_shipped_config_is_valid_and_says_its_command():
    assert {"demo", "affectgpt_qwen25_7b"} <= set(shipped_configs())
    for name in shipped_configs():
        validate(parse(f"--config={name}")[0])
        assert f"--config=configs/{name}.py" in Path(find_config(name)).read_text(encoding="utf-8")


def test_overrides_have_the_type_of_their_key():
    config, workdir = parse(
        "--config=demo",
        "--config.steps=7",
        "--config.optimizer.learning_rate=1e-3",
        "--config.lora.alpha=8",
        "--config.prompts=mine.toml",
        "--config.lora.targets=('q_proj', 'v_proj')",
        "--workdir=here",
    )
    expected = leaves(demo.get_config()) | {
        "steps": 7,
        "optimizer.learning_rate": 1e-3,
        "lora.alpha": 8.0,
        "prompts": "mine.toml",
        "lora.targets": ("q_proj", "v_proj"),
    }
    assert leaves(config) == expected
    assert {k: type(v) for k, v in leaves(config).items()} == {
        k: type(v) for k, v in expected.items()
    }
    assert workdir == Path("here")


def test_a_config_file_of_ones_own_names_its_workdir(tmp_path):
    config, workdir = parse(config_file(tmp_path / "mine.py", "c.steps = 3"), "--config.seed=5")
    assert leaves(config) == leaves(demo.get_config()) | {"steps": 3, "seed": 5}
    assert workdir == Path("runs/mine")


def test_overrides_may_stand_before_the_config_file():
    config, _ = parse("--config.steps=7", "--config=affectgpt_qwen25_7b")
    assert leaves(config) == leaves(affectgpt_qwen25_7b.get_config()) | {"steps": 7}


MIXED = """from affectgpt_jax.configs.affectgpt_qwen25_7b import data_set
    c.data.train = ""
    c.data.mixture.one = data_set("demo", weight=2.0)
    c.data.mixture.two = data_set("demo:1", share=0.5, label="onehot", input="audio_text")"""


def test_a_mixture_is_a_table_of_sets_whose_keys_can_be_overridden(tmp_path):
    file = config_file(tmp_path / "mine.py", MIXED)
    config, _ = parse(file, "--config.data.mixture.two.weight=0.25")
    assert config.data.mixture.two.to_dict() == {
        "source": "demo:1", "weight": 0.25, "share": 0.5, "label": "onehot", "input": "audio_text",
    }  # fmt: skip
    assert config.data.mixture.one.weight == 2.0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "data.mixture.two.weight=0",
            "config.data.mixture.two.weight is 0.0; expected a number over 0",
        ),
        ("data.mixture.two.share=1.5", "config.data.mixture.two.share is 1.5; expected a share in"),
        (
            "data.mixture.two.label=mood",
            "config.data.mixture.two.label: label 'mood': 'mood' is not",
        ),
        (
            "data.mixture.two.input=smell",
            "config.data.mixture.two.input is 'smell'; expected one of",
        ),
        ("data.mixture.two.source=", "config.data.mixture.two.source is empty"),
        ("data.mixture.two.wait=1", "config.data.mixture.two.wait is not a key; did you mean"),
        ("data.mixture.three.weight=1", "three"),
        ("data.train=demo", "config.data.train='demo' and config.data.mixture both name training"),
    ],
)
def test_a_mixture_that_cannot_be_drawn_is_refused(tmp_path, flag, message):
    file = config_file(tmp_path / "mine.py", MIXED)
    assert message in refusal(file, f"--config.{flag}")


def test_help_is_printed(capsys):
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as caught:
            parse(flag)
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert "\n\nTrain.\n" in text
        assert "--workdir" in text


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        # an unknown key
        ("--config.stepz=3", "config.stepz is not a key; did you mean config.steps?"),
        ("--config.optimizer.learning_rat=1", "did you mean config.optimizer.learning_rate?"),
        (
            "--config.zzz=1",
            r"config.zzz is not a key; expected one of \['attention', .*",
        ),
        (
            "--config.data.zzz=1",
            r"config.data.zzz is not a key; expected one of \['mixture', 'test', .*",
        ),
        ("--config.steps.x=1", "config.steps is a single value"),
        ("--config.=1", "config. is not a key"),
        # a value of another type
        ("--config.steps=many", "config.steps=many: .*int"),
        ("--config.steps=1.5", "config.steps=1.5: .*int"),
        ("--config.batch_size=1e2", "config.batch_size=1e2: .*int"),
        ("--config.optimizer.learning_rate=fast", "config.optimizer.learning_rate=fast: .*float"),
        ("--config.data=demo", "config.data=demo"),
        ("--config.generate=3", "config.generate=3"),
        ("--config.seed", "[Mm]issing value for flag --config.seed"),
        # a value out of its range
        ("--config.label=mood", "config.label: label 'mood': 'mood' is not a label type"),
        ("--config.input=smell", r"config.input is 'smell'; expected one of \['audio', .*"),
        ("--config.seed=-1", "config.seed is -1; expected 0 to"),
        ("--config.demo_seed=-1", "config.demo_seed is -1; expected 0 to"),
        ("--config.data.val_share=1", r"config.data.val_share is 1.0; expected .* \[0, 1\)"),
        ("--config.data.val_share=-0.1", r"config.data.val_share is -0.1; expected"),
        (
            "--config.batch_size=64 --config.gradient_accumulation_steps=3",
            "config.batch_size=64 is not a multiple of config.gradient_accumulation_steps=3",
        ),
        (
            "--config.pack_length=63",
            "config.pack_length is 63; expected 0, or at least the 64 of config.max_tokens",
        ),
        (
            "--config.base_precision=int8 --config.generate.merge_lora=true",
            "config.generate.merge_lora='true' cannot add LoRA to quantized weights",
        ),
        # an unknown config, flag or argument
        ("--config=nosuch", r"--config=nosuch: no such file, nor .*'affectgpt_qwen25_7b', 'demo'"),
        ("--config nosuch", "--config=nosuch: no such file"),
        ("--config=configs/nosuch.py", "--config=configs/nosuch.py: no such file"),
        ("--config=elsewhere/demo.py", "--config=elsewhere/demo.py: no such file"),
        ("--config=", "--config=: no such file"),
        ("--config", "argument --config: expected one argument"),
        ("--stepz=3", "unknown argument --stepz=3; did you mean --config.steps?"),
        ("--work_dir=x", "unknown argument --work-dir=x; did you mean --workdir?"),
        ("demo", "unknown argument demo; see affectgpt train --help"),
        ("--config.verify=1 demo", "config.verify is not a key"),
        ("--config.strict_leaks demo", "unexpected argument 'demo'; flags are --config.key=value"),
        ("--workdir", "argument --workdir: expected one argument"),
    ],
)
def test_a_bad_command_line_is_refused_in_one_sentence(argv, message):
    assert re.search(message, refusal(*argv.split()))


@pytest.mark.parametrize("key", CHOICES)
def test_an_unknown_choice_is_refused(key):
    message = refusal(f"--config.{key}=magic")
    assert message == f"config.{key} is 'magic'; expected one of {CHOICES[key]}"


@pytest.mark.parametrize("key", POSITIVE)
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_that_is_not_positive_is_refused(key, value):
    assert refusal(f"--config.{key}={value}") == f"config.{key} is {value}; expected 1 or more"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("c.novelty = 1", "config.novelty is not a key"),
        ("c.optimizer.momentum = 0.9", "config.optimizer.momentum is not a key"),
        ("del c.mesh", "config.mesh is missing; the paper's recipe has 'data:-1'"),
        ("del c.generate", "config.generate is missing"),
        (
            "c = type(c)(c.to_dict() | {'steps': 1.5})",
            "config.steps is 1.5, of type float; expected int, as in 300000",
        ),
        ("c = type(c)(c.to_dict() | {'seed': True})", "config.seed is True, of type bool"),
        ("c = type(c)(c.to_dict() | {'data': 'demo'})", "config.data is 'demo', of type str"),
        (
            "c = type(c)(c.to_dict() | {'llm': {'name': 'tiny', 'size': 1}})",
            "config.llm is .*, of type ConfigDict; expected str",
        ),
        ("c.steps = 0", "config.steps is 0; expected 1 or more"),
        ("c.optimizer.learning_rate = 1e999", "learning_rate is inf; expected a finite number"),
        ("c.optimizer.clip_norm = float('nan')", "clip_norm is nan; expected a finite number"),
        ("c.steps = 10 ** 20", "config.steps is 1000.*; at most 1,000,000,000,000 is taken"),
        ("c = None", "returned None, not a ConfigDict"),
    ],
)
def test_a_config_file_that_leaves_the_schema_is_refused(change, message, tmp_path):
    assert re.search(message, refusal(config_file(tmp_path / "mine.py", change)))


@pytest.mark.parametrize(
    ("use", "argv", "message"),
    [
        (build.input_mode, "--config.input=smell", "config.input is 'smell'; expected one of"),
        (
            lambda config: build.model(config, DecoderConfig(intermediate_size=7)),
            "--config.base_precision=nf4",
            "config.base_precision='nf4' packs inputs in pairs, .* intermediate_size of 7; use",
        ),
        (build.optimizer_config, "--config.optimizer.beta1=1", "config.optimizer.beta1 is 1.0"),
        (
            lambda config: build.base_directory(config.llm),
            "--config.llm=nowhere",
            "config.llm='nowhere' is not a directory",
        ),
    ],
)
def test_what_only_the_modules_know_is_a_config_error_too(use, argv, message):
    with pytest.raises(ConfigError, match=message) as caught:
        use(parse(argv)[0])
    assert "\n" not in str(caught.value)


def test_fp8_is_refused_for_gpus_that_do_not_multiply_it(monkeypatch):
    config, llm = parse("--config.base_precision=fp8")[0], DecoderConfig()
    build.check_model(config, llm)  # on a CPU
    monkeypatch.setattr(build, "device_platform", lambda: "cuda")
    monkeypatch.setattr(build, "compute_capability", lambda: (8, 0))
    expected = (
        r"config\.base_precision='fp8' needs a GPU that multiplies fp8, compute capability 8\.9 "
        r"\(Ada, Hopper\) or later, and this one has 8\.0; use int8 or nf4"
    )
    with pytest.raises(ConfigError, match=expected):
        build.model(config, llm)
    build.check_model(config, llm, (8, 9))  # planned for another GPU than the one that is here
    with pytest.raises(ConfigError, match=expected):
        build.check_model(config, llm, (8, 0))


def test_training_says_bad_meshes_and_traces_in_one_line_and_may_be_tried_again(tmp_path):
    from affectgpt_jax import train

    workdir = f"--workdir={tmp_path}"
    for key, value in {"mesh": "rows:2", "profile_steps": "later", "input": "smell"}.items():
        with pytest.raises(SystemExit) as caught:
            train.main([f"--config.{key}={value}", workdir])
        assert re.fullmatch(rf"error: .*\b{key}\b.*{value}.*", caught.value.code)
    check_same_run(parse(workdir)[0], tmp_path)


# --- resuming -----------------------------------------------------------------------------------


def begin(config, workdir):
    """What a run does with its config before it trains."""
    check_same_run(config, workdir)
    save_config(config, workdir)


@pytest.fixture
def begun(tmp_path) -> Path:
    """The workdir of a run that has saved a checkpoint."""
    begin(parse()[0], tmp_path)
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    return tmp_path


def test_the_config_is_remembered_as_json(begun):
    stored = json.loads((begun / "config.json").read_text(encoding="utf-8"))
    assert stored == json.loads(demo.get_config().to_json())


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=1", "seed"),
        ("batch_size=32", "batch_size"),
        ("optimizer.learning_rate=1.0", "optimizer.learning_rate"),
        ("lora.targets=('q_proj',)", "lora.targets"),
        ("base_precision=int8", "base_precision"),
    ],
)
def test_a_workdir_of_another_run_is_refused(begun, override, key):
    before = (begun / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=rf"holds a run with config\.{key}=.* another --workdir"):
        begin(parse(f"--config.{override}")[0], begun)
    assert (begun / "config.json").read_bytes() == before


def test_a_run_may_be_resumed_elsewhere_and_with_other_reports(begun):
    assert {"llm", "mesh", "log_every"} <= set(FREE_ON_RESUME)
    begin(parse()[0], begun)
    changes = (
        "log_every=2",
        "max_to_keep=5",
        "profile_steps=1:2",
        "generate.batch_size=8",
        "llm=/moved",
    )
    begin(parse(*(f"--config.{change}" for change in changes))[0], begun)


def test_a_run_may_be_longer_only_where_its_learning_rate_does_not_follow_its_length(tmp_path):
    for config, refused in (("demo", True), ("affectgpt_qwen25_7b", False)):
        workdir = tmp_path / config
        (workdir / "checkpoints" / "100").mkdir(parents=True)
        begin(parse(f"--config={config}")[0], workdir)
        longer = parse(f"--config={config}", "--config.steps=900000")[0]
        if refused:
            with pytest.raises(ConfigError, match=r"config\.steps"):
                begin(longer, workdir)
        else:
            begin(longer, workdir)


def test_a_run_cannot_end_before_the_step_it_has_reached(tmp_path):
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    begin(parse("--config=affectgpt_qwen25_7b")[0], tmp_path)
    begin(parse("--config=affectgpt_qwen25_7b", "--config.steps=100")[0], tmp_path)
    with pytest.raises(ConfigError, match=r"a run of 100 steps, but config\.steps is 99"):
        begin(parse("--config=affectgpt_qwen25_7b", "--config.steps=99")[0], tmp_path)


def test_a_run_that_saved_nothing_does_not_bind_its_workdir(tmp_path):
    begin(parse("--config.mesh=rows:2")[0], tmp_path)
    config = parse("--config.seed=1")[0]
    begin(config, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (stored["mesh"], stored["seed"]) == (config.mesh, 1)


# --- the schema ---------------------------------------------------------------------------------


def reads() -> tuple[set[str], set[str]]:
    """Dotted names in the commands' code, and those whose keys are all passed on (`**name`)."""
    dotted, whole = set(), set()
    for path in [*PACKAGE.glob("*.py"), PACKAGE / "training" / "loop.py"]:
        if path.name == "config.py":  # it checks every key and uses none
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                dotted.add(re.sub(r"^(self\._?|program\.)", "", ast.unparse(node)))
            elif isinstance(node, ast.keyword) and node.arg is None:
                whole.add(ast.unparse(node.value))
            elif isinstance(node, ast.Dict):
                values = zip(node.keys, node.values, strict=True)
                whole |= {ast.unparse(value) for key, value in values if key is None}
    return dotted, whole


def test_every_key_of_the_schema_is_read():
    dotted, whole = reads()

    def is_read(key: str) -> bool:
        names = {f"config.{key}"} | ({key} if "." in key else set())
        return bool(names & dotted) or f"config.{key.rpartition('.')[0]}" in whole

    # `build.fusion_config` reads these by the names of the registry.
    of_heads = {f"projectors.{key}" for key in modalities.projectors()}
    keys = leaves(affectgpt_qwen25_7b.get_config()).keys()
    assert of_heads <= keys
    dead = [key for key in keys - of_heads if not is_read(key)]
    assert not dead
    # What runs that go on from another one have beside it, also read as `section.KEY`.
    for name, make in SECTIONS.items():
        dead = [k for k in make() if not {f"{name}.{k}", f"section.{k}"} & dotted]
        assert not dead


def test_every_key_that_is_read_is_in_the_schema():
    schema = affectgpt_qwen25_7b.get_config()
    schema.update({name: make() for name, make in SECTIONS.items()})
    keys = leaves(schema).keys() | schema.keys() | {"data.mixture"}
    found = {name.removeprefix("config.") for name in reads()[0] if name.startswith("config.")}
    found = {re.sub(r"\.(items|values|to_dict)$", "", name) for name in found} - {
        "to_dict",
        "to_json",
        "copy_and_resolve_references",
    }
    assert found <= keys
