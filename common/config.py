"""Command lines: one parser style for all scripts, and --config, a YAML file of flags that go in front."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NoReturn

import yaml

from common import faults
from common.files import refuse_pipe
from common.messages import show_warnings_plainly

# Tokens of YAML that go a level deeper, those that come back, and how deep a file of flags may be.
OPENING = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken)
OPENING += (yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken)
CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
DEEPEST = 20


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the docstring's lines and shows defaults, but not the uninformative ones."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, "", argparse.SUPPRESS) or "%(default)" in (action.help or ""):
            return action.help or ""
        return super()._get_help_string(action) or ""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, Switch):  # without the optional value, which only old command lines use
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)


class Switch(argparse.BooleanOptionalAction):
    """--flag and --no-flag; also `--flag True` and `--flag False`, as older scripts were called."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options) -> None:
        super().__init__(option_strings, dest, **options)
        self.nargs = "?"

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        negated = option_string.startswith("--no-")
        if values is not None and (negated or values.lower() not in words):
            raise argparse.ArgumentError(self, f"{values!r} is neither True nor False; it is a switch")
        setattr(namespace, self.dest, not negated if values is None else words[values.lower()])


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without forty lines of usage in front of it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help is the script's docstring; it knows --config and accepts no abbreviations."""
    parser = _Parser(description=doc, formatter_class=_Formatter, allow_abbrev=False)
    parser.add_argument(
        "--config",
        help="YAML file of flags, each line a 'flag: value'; flags of the command line win over it, and a "
        "later --config wins over an earlier one; its line 'config: other.yaml' takes over those of a file",
    )
    return parser


def parse_args(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    *,
    base: dict | None = None,
    from_file: Collection[str] | None = None,
) -> argparse.Namespace:
    """Parse `argv`; the YAML named by --config supplies the flags that `argv` leaves out.

    The file is turned into flags in front of the command line, so argparse checks spelling, types and choices
    of both, and a required flag may come from the file. Of several --config the later ones win.

    Args:
        base: flag values in front of both, e.g. the configuration of a checkpoint that is resumed.
        from_file: the only flags that count in the file, which is made for another script; None: all.

    Raises:
        SystemExit: with one line that names the wrong key or flag and the nearest valid one, or the wrong
            value; about a file it names the file.
    """
    argv = sys.argv[1:] if argv is None else [str(a) for a in argv]
    finder = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append", default=[])
    flags = mapping_to_flags(parser, base, "checkpoint") if base else []
    for path in finder.parse_known_args(argv)[0].config:
        for file, content in read_yaml_files(parser, path):
            chosen = {key: content[key] for key in content if from_file is None or key in from_file}
            flags += mapping_to_flags(parser, chosen, file)
    valid = [option for action in parser._actions for option in action.option_strings]
    for word in argv:  # before argparse complains of a required flag, which may be the misspelled one
        if word.startswith("--") and (wrong := word.split("=")[0]) not in valid:
            parser.error(f"unknown option {word}{_nearest(wrong, valid)}; --help lists them all")
    args, unknown = parser.parse_known_args(flags + argv)
    if unknown:
        parser.error(f"unknown option {unknown[0]}{_nearest(unknown[0], valid)}; --help lists them all")
    return args


def read_yaml_files(parser: argparse.ArgumentParser, path: str | Path) -> list[tuple[Path, dict]]:
    """(file, its mapping) of a YAML file, behind the file that its key "config" names, if it has that key.

    The name counts from the folder of the file on; keys that stand in both files are left out of that one.
    Anything but a mapping, and files that name each other, end the program with a line about the file.
    """
    path, found, known = Path(path), [], set()
    while True:
        content = _read_mapping(parser, path)
        name = content.pop("config", None)
        found.insert(0, (path, {key: value for key, value in content.items() if key not in known}))
        if name is None:
            return found
        if not isinstance(name, str):
            parser.error(f"{path}: config names a file, not a {type(name).__name__}")
        known |= content.keys()
        path = (path.parent / str(name)).resolve()
        if path in [file.resolve() for file, _ in found]:
            parser.error(f"--config {path}: takes over its own lines")


def _read_mapping(parser: argparse.ArgumentParser, path: Path) -> dict:
    try:
        if path != Path(os.devnull):
            refuse_pipe(path)
    except ValueError as error:
        parser.error(f"--config {error}")
    try:
        text, depth = path.read_text(encoding="utf8"), 0
        for token in yaml.scan(text):
            if isinstance(token, yaml.AliasToken):  # a few lines of them can stand for more than memory holds
                parser.error(f"--config {path}: alias *{token.value}; write out what it stands for")
            depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
            if depth > DEEPEST:  # the time that yaml takes grows with the square of the depth
                parser.error(f"--config {path}: brackets within brackets, too deep to be read")
        content = yaml.safe_load(text)
    except OSError as error:
        parser.error(f"--config {path}: {error.strerror}")
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an impossible date
        parser.error(f"--config {path}: not valid YAML: {' '.join(str(error).split())}")
    if not isinstance(content, dict | None):
        parser.error(f"--config {path}: expected lines of 'flag: value', found a {type(content).__name__}")
    return content or {}


def mapping_to_flags(parser: argparse.ArgumentParser, mapping: dict, origin: str | Path) -> list[str]:
    """{'epochs': 5, 'amp': 'off', 'ema': False, 'fold': None} -> ['--epochs=5', '--amp=off', '--no-ema'].

    None leaves a flag out. `origin` (a file) stands in front of the message about a wrong key or value.
    """
    by_name = {
        option[2:]: action
        for action in parser._actions
        for option in action.option_strings
        if action.dest not in ("help", "config", "resume") and re.match("--(?!no-)", option)
    }
    flags: list[str] = []
    for key, value in mapping.items():
        action = by_name.get(str(key))
        if action is None:
            parser.error(f"{origin}: unknown key '{key}'{_nearest(str(key), list(by_name))}")
        if value is None:
            continue
        option = f"--{key}"
        if isinstance(action, Switch):
            if not isinstance(value, bool):
                parser.error(f"{origin}: {key} is a switch: true or false, not {repr(value)[:60]}")
            words = [option if value else f"--no-{key}"]
        elif isinstance(value, bool):  # YAML 1.1 reads a bare `off` as False
            spellings = ("on", "yes", "true") if value else ("off", "no", "false")
            spelling = next((s for s in spellings if s in (action.choices or ())), None)
            if spelling is None:
                parser.error(f"{origin}: {key} needs a value, not {str(value).lower()}")
            words = [f"{option}={spelling}"]
        elif isinstance(value, (list, tuple)) and any(isinstance(v, (list, tuple, dict)) for v in value):
            parser.error(f"{origin}: {key} holds a list within a list; it needs values side by side")
        elif isinstance(value, (list, tuple)):
            # The blank: argparse takes a bare -1e-05 for an option.
            words = [option, *(f" {v}" if isinstance(v, float) and v < 0 else str(v) for v in value)]
        elif isinstance(value, dict):
            parser.error(
                f"{origin}: {key} holds a section; write each flag as a line 'flag: value', without sections"
            )
        else:
            words = [f"{option}={value}"]
        _check_flag(parser, action, words, origin)
        flags += words
    return flags


def _check_flag(
    parser: argparse.ArgumentParser, action: argparse.Action, words: list[str], origin: str | Path
) -> None:
    """Let argparse check a flag from a file by itself, while it is known which file it comes from."""
    checker = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    checker._add_action(action)
    try:
        surplus = checker.parse_known_args(words)[1]
    except argparse.ArgumentError as error:
        parser.error(f"{origin}: {error}")
    if surplus:
        parser.error(f"{origin}: argument {words[0]}: too many values, {len(surplus)} left over")


def resolved_config(args: argparse.Namespace, leave_out: Sequence[str] = ("config", "resume")) -> dict:
    """Flag values as plain types, for config.yaml and checkpoints."""
    return {k: v for k, v in sorted(vars(args).items()) if k not in leave_out}


def duration_s(text: str) -> float:
    """'90' (seconds), '45s', '30m', '2h', '1.5h', '1h30m', '2d' -> seconds. For argparse's `type=`."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    has_units = text and "".join(n + u for n, u in parts) == text
    seconds = sum(float(n) * units[u] for n, u in parts) if has_units else _number(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a duration above zero; write 90s, 45m, 2h or 1h30m"
        )
    return seconds


def run_script(main: Callable[[], object]) -> NoReturn:
    """`main()` of a script: its number is the exit code. Ctrl-C ends it with one line, and so does what went
    wrong with machine or files (see `faults.sentence`); warnings take one line each."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # else a file name that is not UTF-8 could not be printed
            stream.reconfigure(errors="backslashreplace")
    show_warnings_plainly()
    try:
        with faults.ending_in_a_sentence():
            code = main()
    except KeyboardInterrupt as stop:
        print(str(stop) or "\nstopped by the user; what was finished is kept", file=sys.stderr)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def non_negative_int(text: str) -> int:
    """For argparse's `type=`: a whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def positive_int(text: str) -> int:
    """For argparse's `type=`: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def positive_float(text: str) -> float:
    """For argparse's `type=`: a number above 0."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def non_negative_float(text: str) -> float:
    """For argparse's `type=`: a number, 0 or more."""
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def finite_float(text: str) -> float:
    """For argparse's `type=`: any number but NaN and infinity."""
    value = _number(text)
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def seed_number(text: str) -> int:
    """For argparse's `type=`: a whole number that every random generator takes as its seed."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def fraction(text: str) -> float:
    """For argparse's `type=`: a number in [0, 1]."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _nearest(word: str, valid: list[str]) -> str:
    match = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else f"; valid: {', '.join(sorted(valid))}"
