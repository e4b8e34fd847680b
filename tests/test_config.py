"""common/config.py: precedence, YAML as flags, and messages that say what is wrong and where."""

import argparse

import pytest
import yaml

from common.config import (
    Switch,
    duration_s,
    finite_float,
    fraction,
    make_parser,
    non_negative_float,
    parse_args,
    positive_int,
    resolved_config,
    seed_number,
)
from common.run_flags import add_run_flags
from common.runs import save_config


@pytest.fixture
def parser():
    """Flags of every kind that the scripts use."""
    parser = make_parser("A script.")
    parser.prog = "script.py"
    parser.add_argument("--lr", type=float, default=5e-5, help="learning rate")
    parser.add_argument("--model", choices=["UNet", "AttentionUNet"], default="UNet")
    parser.add_argument("--window", type=int, nargs=2, default=[-1000, 400])
    parser.add_argument("--shift", type=float, nargs="+", default=[0.0])
    parser.add_argument("--fold")
    parser.add_argument("--ema", action=Switch, default=False)
    parser.add_argument("--augment", action=Switch, default=True)
    parser.add_argument("--elastic", type=fraction, default=0.3)
    add_run_flags(
        parser,
        epochs=150,
        early_stopping=30,
        model_name="run",
        name_flags=("--model_name", "--experiment_name"),
    )
    return parser


@pytest.fixture
def yaml_file(tmp_path):
    """yaml_file(text): its path; a later one has another name."""

    def write(text, name="my.yaml"):
        (tmp_path / name).write_text(text, encoding="utf8")
        return str(tmp_path / name)

    return write


def refusal(capsys, parser, argv, **base):
    """The last line that parse_args prints when it refuses argv."""
    with pytest.raises(SystemExit) as info:
        parse_args(parser, argv, **base)
    assert info.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# ---- precedence ----


def test_command_line_over_yaml_over_default(parser, yaml_file):
    path = yaml_file("lr: 0.1\nepochs: 7\nema: true\naugment: false\nwindow: [-5, 5]\n")
    args = parse_args(parser, ["--epochs", "3", "--no-ema", "--config", path])
    assert (args.epochs, args.ema) == (3, False)  # command line, although --config stands last
    assert (args.lr, args.augment, args.window) == (0.1, False, [-5, 5])  # YAML
    assert (args.seed, args.model, args.fold) == (42, "UNet", None)  # default
    assert args.config == path


def test_base_lies_below_yaml_and_command_line(parser, yaml_file):
    base = {"lr": 1.0, "epochs": 1, "seed": 1, "ema": True}
    args = parse_args(parser, ["--lr", "3", "--config", yaml_file("lr: 2\nepochs: 2")], base=base)
    assert (args.lr, args.epochs, args.seed, args.ema) == (3.0, 2, 1, True)
    assert parse_args(parser, [], base={}).seed == 42


def test_a_file_of_another_script_gives_only_what_is_asked_for(parser, yaml_file, capsys):
    path = yaml_file("lr: 2\nepochs: 5\nnot_a_flag: 1\n")
    args = parse_args(parser, ["--config", path], from_file=("epochs", "seed"))
    assert (args.epochs, args.seed, args.lr) == (5, 42, parse_args(parser, []).lr)
    assert "unknown key 'not_a_flag'" in refusal(capsys, parser, ["--config", path])


def test_error_in_base_names_the_checkpoint(parser, capsys):
    assert "checkpoint: unknown key 'sed'; did you mean seed?" in refusal(capsys, parser, [], base={"sed": 1})


def test_of_two_configs_the_later_wins_and_the_earlier_still_counts(parser, yaml_file):
    first, second = (
        yaml_file("lr: 1\nepochs: 1\nseed: 1", "a.yaml"),
        yaml_file("epochs: 2\nseed: 2", "b.yaml"),
    )
    args = parse_args(parser, ["--config", first, "--seed", "3", f"--config={second}"])
    assert (args.lr, args.epochs, args.seed) == (1.0, 2, 3)


def test_a_yaml_file_takes_over_the_lines_of_another(parser, tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    first, second, third = tmp_path / "first.yaml", tmp_path / "second.yaml", tmp_path / "sub" / "third.yaml"
    first.write_text("lr: 0.5\nepochs: 7\n")
    second.write_text("config: first.yaml\nlr: 0.25\n")
    third.write_text("config: ../second.yaml\n")
    args = parse_args(parser, ["--config", str(third), "--model_name", "a"])
    assert (args.lr, args.epochs) == (0.25, 7)
    assert parse_args(parser, ["--config", str(third), "--model_name", "a", "--lr", "1"]).lr == 1
    third.write_text("config: ../second.yaml\nlerning: 3\n")
    assert "third.yaml: unknown key 'lerning'" in refusal(capsys, parser, ["--config", str(third)])
    third.write_text("config: ../second.yaml\n")
    first.write_text("lerning: 3\n")
    assert "first.yaml: unknown key 'lerning'" in refusal(capsys, parser, ["--config", str(third)])
    first.write_text("config: sub/third.yaml\n")
    assert "third.yaml: takes over its own lines" in refusal(capsys, parser, ["--config", str(third)])
    first.write_text("config: nothing.yaml\n")
    assert "nothing.yaml: No such file" in refusal(capsys, parser, ["--config", str(third)])


def test_config_with_equals_sign(parser, yaml_file):
    assert parse_args(parser, [f"--config={yaml_file('lr: 2')}"]).lr == 2.0


def test_argv_may_hold_paths_and_numbers(parser, tmp_path):
    args = parse_args(parser, ["--model_name", tmp_path, "--epochs", 4, "--window", -3, 3])
    assert (args.model_name, args.epochs, args.window) == (str(tmp_path), 4, [-3, 3])


def test_argv_defaults_to_that_of_the_process(parser, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--epochs", "9"])
    assert parse_args(parser).epochs == 9


def test_required_flag_may_come_from_yaml(parser, yaml_file, capsys):
    parser.add_argument("--data_path", required=True)
    assert parse_args(parser, ["--config", yaml_file("data_path: d")]).data_path == "d"
    assert "required: --data_path" in refusal(capsys, parser, ["--config", yaml_file("lr: 1")])


# ---- config.yaml repeats the run ----


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--ema", "--no-augment", "--deterministic"],
        ["--window", "-1024", "325", "--shift", "-0.00001", "-2.5", "1e30", "--seed", "7"],
        [
            "--lr",
            "1e-3",
            "--elastic",
            "0",
            "--time_budget",
            "1h30m",
            "--amp",
            "off",
            "--model",
            "AttentionUNet",
        ],
        ["--fold", "0", "--model_name", "a: b # 'c' äö", "--device", ""],
        ["--fold", "null", "--model_name", "1e-3"],
        ["--fold", "yes", "--model_name=-x two\nlines"],
    ],
)
def test_saved_config_gives_equal_args(parser, tmp_path, argv):
    args = parse_args(parser, argv)
    save_config(tmp_path / "config.yaml", resolved_config(args))
    again = parse_args(parser, ["--config", tmp_path / "config.yaml"])
    assert resolved_config(again) == resolved_config(args)
    assert vars(again).keys() == vars(args).keys()


def test_resolved_config_leaves_out_what_must_not_repeat(parser, yaml_file):
    config = resolved_config(parse_args(parser, ["--config", yaml_file("lr: 1"), "--resume"]))
    assert "config" not in config and "resume" not in config
    assert config["lr"] == 1.0 and list(config) == sorted(config)
    assert yaml.safe_load(yaml.safe_dump(config)) == config


# ---- values in the file ----


@pytest.mark.parametrize(
    "text, expected",
    [
        ("amp: off", {"amp": "off"}),  # YAML 1.1 reads False
        ("amp: 'off'", {"amp": "off"}),
        ("lr: 1e-3", {"lr": 1e-3}),  # PyYAML reads a string
        ("lr: 1", {"lr": 1.0}),
        ("fold: 0", {"fold": "0"}),
        ("fold:", {"fold": None}),
        ("experiment_name: other", {"model_name": "other"}),
        ("seed: 3", {"seed": 3}),
        ("time_budget: 30m", {"time_budget": 1800.0}),
        ("window: [-1024, 325]", {"window": [-1024, 325]}),
        ("shift: [-1.0e-5, -.inf]", {"shift": [-1e-5, float("-inf")]}),
        ("shift: -1.0e-5", {"shift": [-1e-5]}),
        ("", {}),
        ("# only a comment", {}),
    ],
)
def test_values_arrive_with_the_type_of_the_flag(parser, yaml_file, text, expected):
    args, defaults = parse_args(parser, ["--config", yaml_file(text)]), parse_args(parser, [])
    assert {**vars(args), "config": None} == {**vars(defaults), **expected}
    assert all(type(vars(args)[k]) is type(v) for k, v in expected.items())


def test_yaml_does_not_touch_other_lists(parser, yaml_file):
    args = parse_args(parser, ["--config", yaml_file("shift: [1, 2]\nwindow: [0, 1]"), "--window", "7", "8"])
    assert (args.shift, args.window) == ([1.0, 2.0], [7, 8])
    assert parse_args(parser, []).shift == [0.0]


@pytest.mark.parametrize(
    "text, message",
    [
        ("epoch: 3", "unknown key 'epoch'; did you mean epochs?"),
        ("batchsize_xyz: 3", "unknown key 'batchsize_xyz'; valid: amp, "),
        ("no-ema: true", "unknown key 'no-ema'"),
        ("1: 2", "unknown key '1'"),
        ("lr:\n  value: 3", "lr holds a section; write each flag as a line 'flag: value'"),
        ("ema: 'yes'", "ema is a switch: true or false, not 'yes'"),
        ("ema: 1", "ema is a switch: true or false, not 1"),
        ("epochs: true", "epochs needs a value, not true"),
        ("amp: on", "amp needs a value, not true"),
        ("lr: fast", "argument --lr: invalid float value: 'fast'"),
        ("epochs: 2.5", "argument --epochs: '2.5' is not a whole number of at least 1"),
        ("elastic: 7", "argument --elastic: '7' is not a number between 0 and 1"),
        ("model: VNet", "argument --model: invalid choice: 'VNet' (choose from"),
        ("window: 3", "argument --window: expected 2 arguments"),
        ("window: [1, 2, 3]", "argument --window: too many values, 1 left over"),
        ("lr: [1, 2]", "argument --lr: too many values, 1 left over"),
        ("lr: []", "argument --lr: expected one argument"),
        ("window: [1, deep]", "argument --window: invalid int value: 'deep'"),
    ],
)
def test_wrong_key_or_value_names_the_file(parser, yaml_file, capsys, text, message):
    path = yaml_file(text)
    assert f"{path}: {message}" in refusal(capsys, parser, ["--config", path])


def test_the_same_wrong_value_on_the_command_line_does_not_blame_the_file(parser, yaml_file, capsys):
    path = yaml_file("lr: 1")
    message = refusal(capsys, parser, ["--config", path, "--lr", "fast"])
    assert "argument --lr: invalid float value: 'fast'" in message and path not in message


@pytest.mark.parametrize(
    "content, message",
    [
        (b"- lr\n- epochs\n", "expected lines of 'flag: value', found a list"),
        (b"lr 0.1", "expected lines of 'flag: value', found a str"),
        (b"lr: [1, 2", "not valid YAML"),
        (b"lr: !!python/object/apply:os.getcwd []", "not valid YAML"),
        (b"model_name: \xff\xfe", "not valid YAML"),
        (b"model_name: 2024-13-45", "not valid YAML"),
    ],
)
def test_file_that_is_no_mapping(parser, tmp_path, capsys, content, message):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    assert f"--config {path}: {message}" in refusal(capsys, parser, ["--config", path])


def test_missing_file_and_folder(parser, tmp_path, capsys):
    assert f"--config {tmp_path}/no.yaml: No such file" in refusal(
        capsys, parser, ["--config", f"{tmp_path}/no.yaml"]
    )
    assert f"--config {tmp_path}: a folder, pipe or device" in refusal(capsys, parser, ["--config", tmp_path])
    message = refusal(capsys, parser, ["--config"])
    assert message == "script.py: error: argument --config: expected one argument"


# ---- the command line ----


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--epoch", "3"], "unknown option --epoch; did you mean --epochs?"),
        (["--epoch=3"], "unknown option --epoch=3; did you mean --epochs?"),
        (["--no-emma"], "unknown option --no-emma; did you mean --no-ema?"),
        (["--determin"], "unknown option --determin; did you mean --deterministic?"),  # no abbreviations
        (["--conf", "x.yaml"], "unknown option --conf; did you mean --config?"),
        (["--qqqq"], "unknown option --qqqq; valid: "),
        (["stray"], "unknown option stray"),
    ],
)
def test_unknown_option_names_the_nearest(parser, capsys, argv, message):
    assert message in refusal(capsys, parser, argv)


def test_help_shows_docstring_and_defaults_but_no_empty_ones(parser, capsys):
    with pytest.raises(SystemExit) as info:
        parse_args(parser, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert info.value.code == 0
    assert "A script." in shown
    assert "learning rate (default: 5e-05)" in shown
    assert "default: None" not in shown and "(default: False) (default" not in shown


# ---- types ----


@pytest.mark.parametrize(
    "text, seconds",
    [("90", 90), ("45s", 45), ("30m", 1800), ("2h", 7200), ("1.5h", 5400), ("1h30m", 5400), ("2d", 172800)]
    + [("0.5", 0.5), ("1e3", 1000), ("1h0m", 3600)],
)
def test_durations(text, seconds):
    assert duration_s(text) == seconds and isinstance(duration_s(text), float)


@pytest.mark.parametrize(
    "text", ["0", "0s", "0h0m", "-5", "-5m", "abc", "inf", "nan", "", "m", "5 m", "1h30", "5x", "1h-30m"]
)
def test_no_durations(text):
    with pytest.raises(
        argparse.ArgumentTypeError, match="not a duration above zero; write 90s, 45m, 2h or 1h30m"
    ):
        duration_s(text)


def test_duration_in_the_parser(parser, capsys):
    assert parse_args(parser, ["--time_budget", "1h30m"]).time_budget == 5400.0
    assert "--time_budget: '-5' is not a duration" in refusal(capsys, parser, ["--time_budget", "-5"])


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (non_negative_float, {"0": 0.0, "1e-3": 0.001}, ["-1e-9", "nan", "inf", "", "one"]),
        (finite_float, {"-1350": -1350.0, "0": 0.0}, ["nan", "inf", "-inf", "1e400", "HU"]),
        (seed_number, {"0": 0, "4294967295": 2**32 - 1}, ["4294967296", "-1", "1.0", "nan", ""]),
    ],
)
def test_numbers_of_a_range(kind, good, bad):
    for text, value in good.items():
        assert kind(text) == value
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
            kind(text)


def test_positive_int_and_fraction():
    assert positive_int("7") == 7
    assert (fraction("0"), fraction("1"), fraction("0.25")) == (0.0, 1.0, 0.25)
    for text in ("0", "-1", "1.0", "", "x", "1e3", "+1"):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number of at least 1"):
            positive_int(text)
    for text in ("-0.1", "1.1", "nan", "inf", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="between 0 and 1"):
            fraction(text)


@pytest.mark.parametrize(
    "words, value",
    [
        (["--use_wandb"], True),
        (["--no-use_wandb"], False),
        (["--use_wandb", "False"], False),
        (["--use_wandb", "true"], True),
        (["--use_wandb=no"], False),
        (["--use_wandb", "--lr", "1"], True),
        ([], False),
    ],
)
def test_switch_takes_a_word_too(words, value):
    parser = make_parser("A script.")
    parser.add_argument("--use_wandb", action=Switch, default=False, help="log")
    parser.add_argument("--lr", type=float, default=1.0, help="rate")
    assert parse_args(parser, words).use_wandb is value


@pytest.mark.parametrize("words", [["--use_wandb", "maybe"], ["--no-use_wandb", "False"]])
def test_switch_refuses_other_words(words, capsys):
    parser = make_parser("A script.")
    parser.add_argument("--use_wandb", action=Switch, default=False, help="log")
    with pytest.raises(SystemExit):
        parse_args(parser, words)
    assert "neither True nor False" in capsys.readouterr().err
