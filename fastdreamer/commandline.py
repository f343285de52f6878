"""How a command begins and ends, and its options: read into values, refused in one sentence, and listed.

Options are the fields of dataclasses (nested ones are sections) of type bool, int, float, str, `str | None` or a
Literal; the string below a field is its text. Where an option takes any text, that of the field begins with what it is.
Imports nothing of ours.
"""

import ast
import contextlib
import difflib
import functools
import inspect
import itertools
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TextIO, cast, get_args, get_origin

METAVARS = {bool: "true|false", int: "N", float: "X"}
MAX_DIGITS = 30
"""Of a count: more are a slip, and would take memory to write out."""


class BadInput(Exception):
    """The user's input cannot be served. The message is one sentence that names the option and the mend.

    The command line prints it without a traceback and exits with code 2.
    """


@dataclass(frozen=True)
class Option:
    """One option: its `name` as a field, its type, its text, and the section that it belongs to."""

    name: str
    kind: Any
    text: str
    section: str

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def optional(self) -> bool:
        return type(None) in get_args(self.kind)

    def value(self, text: str, shown: str) -> Any:
        """What was written for the option, which refusals call `shown`. Raises BadInput."""
        if self.choices and text not in self.choices:
            near = f"did you mean {_nearest(text, self.choices)[0]}?" if _nearest(text, self.choices) else "take one."
            raise BadInput(f"{shown} {text} is none of {', '.join(self.choices)}: {near}")
        try:
            if self.kind is bool:
                return {"true": True, "false": False}[text.lower()]
            if self.kind is int:
                return count(text)
            if self.kind is float:
                return float(text)
        except KeyError:
            raise BadInput(f"{shown} is on or off: write true or false instead of {text}.") from None
        except ValueError:
            example = "a whole number, such as 20, 400k, 1M or 1e6" if self.kind is int else "one, such as 0.5 or 1e-4"
            raise BadInput(f"{shown} {text} is no number that it can be: write {example}.") from None
        return None if self.optional and text == "None" else text


def count(text: str) -> int:
    """A whole number as people write it: `1000000`, `1_000_000`, `1e6`, `1M`, `400k`. Raises ValueError."""
    power = {"k": 3, "m": 6, "g": 9}.get(text[-1:].lower(), 0)
    try:
        number = Decimal(text[:-1] if power else text)
        if (
            " " not in text
            and number.is_finite()
            and number.adjusted() < MAX_DIGITS
            and (whole := number.scaleb(power)) == int(whole)
        ):
            return int(whole)
    except ArithmeticError:
        pass
    raise ValueError(f"{text} is no whole number")


def options_of(kind: type[Any], section: str = "") -> list[Option]:
    """The options that the fields of a dataclass are, those of its sections behind its own."""
    texts, own, nested = _texts(kind), [], []
    for each in fields(kind):
        if isinstance(each.type, type) and is_dataclass(each.type):
            nested += options_of(each.type, each.name)
        else:
            own.append(Option(each.name, each.type, texts.get(each.name, ""), section))
    return own + nested


@functools.cache
def _texts(kind: type[Any]) -> Mapping[str, str]:
    """The strings below the fields of a dataclass."""
    body = getattr(ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0], "body", [])
    found = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            found[field.target.id] = " ".join(ast.literal_eval(below.value).split())
    return found


def read(argv: Sequence[str], options: Iterable[Option]) -> tuple[dict[str, Any], list[str]]:
    """Values by name of the options that are given, `help` among them, and the words that belong to none.

    The last of two counts. Raises BadInput.
    """
    known = {option.flag: option for option in options}
    flags = {**dict.fromkeys(known, True), **{f"--no-{f[2:]}": False for f, o in known.items() if o.kind is bool}}
    given: dict[str, Any] = {}
    words: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            given["help"] = True
            continue
        if not word.startswith("-") or word == "-":
            words.append(word)
            continue
        written, equals, text = word.partition("=")
        flag = written.replace("_", "-")
        if flag not in flags:
            near = _nearest(f"--{flag.lstrip('-')}", flags)
            raise BadInput(f"{written} is no option: {f'did you mean {near[0]}?' if near else '--help lists them.'}")
        option = known[flag if flag in known else f"--{flag.removeprefix('--no-')}"]
        if option.kind is bool:
            if equals:
                raise BadInput(f"{flag} takes no value: write {option.flag} or --no-{option.flag[2:]}.")
            given[option.name] = flags[flag]
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise BadInput(f"{flag} needs a value: write {flag} {metavar(option)}.")
            text = rest.pop(0)
        if not text:
            raise BadInput(f"{flag} needs a value: write {flag} {metavar(option)}.")
        given[option.name] = option.value(text, flag)
    return given, words


def read_file(path: Path, options: Sequence[Option]) -> dict[str, Any]:
    """Values by name of the options that a YAML file holds: a mapping, in sections or not, by itself or under `config`,
    as in a run's record. Raises BadInput."""
    import yaml

    try:
        held = yaml.safe_load(path.read_text())
    except OSError as error:
        raise BadInput(f"--config {path} cannot be read ({error.strerror}): name a YAML file of options.") from None
    # PyYAML raises what it likes for values that are none of their tag.
    except Exception as error:
        raise BadInput(f"--config {path} is no YAML ({' '.join(str(error).split())}): mend the file.") from None
    if isinstance(held, dict) and isinstance(held.get("config"), dict):
        held = held["config"]
    known, given = {option.name: option for option in options}, {}
    sections = {option.section for option in options}
    entries = [("", held)]
    while entries:
        name, value = entries.pop()
        if isinstance(value, dict) and (not name or name in sections):
            entries += [(str(key).replace("-", "_"), entry) for key, entry in value.items()]
            continue
        shown = f"--config {path}: {name}"
        if name not in known:
            near = _nearest(name, known)
            mend = f"did you mean {near[0]}?" if near else "write options as `name: value`, one a line."
            raise BadInput(f"{shown or 'it'} is no option: {mend}")
        if value is None and known[name].optional:
            given[name] = None
        elif isinstance(value, dict | list) or value is None:
            raise BadInput(f"{shown} needs one value: write {name}: {metavar(known[name])}.")
        else:
            # YAML takes a bare `off` for a truth value.
            text = "off" if value is False and known[name].kind is not bool else str(value)
            given[name] = known[name].value(text, shown)
    return given


def put(config: Any, given: Mapping[str, Any]) -> Any:
    """The nested configuration with the options that are given."""
    changed = {}
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value) and not isinstance(value, type):
            changed[each.name] = put(value, given)
        elif each.name in given:
            changed[each.name] = given[each.name]
    return replace(config, **changed)


def command(
    kind: type[Any], argv: Sequence[str], *, usage: str, examples: Sequence[str], wanted: str = "run folder"
) -> Any:
    """A command of one section: fields without a default are words, as many as there are where they are a tuple.
    `wanted` is what they are.

    Prints the help and raises SystemExit where it is asked for. Raises BadInput.
    """
    positional = [each for each in fields(kind) if each.default is MISSING]
    options = [option for option in options_of(kind) if option.name not in {each.name for each in positional}]
    given, words = read(argv, options)
    if given.pop("help", False):
        defaults = {each.name: each.default for each in fields(kind)}
        print(listing(usage, inspect.getdoc(kind) or "", {"Options": options}, defaults, examples))
        raise SystemExit(0)
    (only,) = positional
    if not words or (len(words) > 1 and only.type is str):
        what = "name" if not words else f"{words[1]!r} is one too many: name"
        raise BadInput(f"{what} {f'a {wanted}' if only.type is str else f'{wanted}s'}, as in: {examples[0]}")
    return kind(**{only.name: words[0] if only.type is str else tuple(words)}, **given)


def metavar(option: Option) -> str:
    """What stands for an option's value."""
    if option.choices:
        return "|".join(option.choices)
    if option.kind in METAVARS:
        return METAVARS[option.kind]
    return option.text.split()[0].strip(":,").upper()


def listing(
    usage: str,
    text: str,
    titled: Mapping[str, Iterable[Option]],
    defaults: Mapping[str, Any],
    examples: Sequence[str],
) -> str:
    """The help: every option below its section's title, with its default and its text; examples at the end."""
    width = min(shutil.get_terminal_size().columns, 100)
    wrap = functools.partial(textwrap.fill, width=width, break_on_hyphens=False)
    lines = [f"usage: {usage}", "", wrap(text)]
    for title, options in titled.items():
        lines += ["", f"{title}:"]
        for option in options:
            default = defaults.get(option.name)
            head = (
                f"{option.flag} | --no-{option.flag[2:]}" if option.kind is bool else f"{option.flag} {metavar(option)}"
            )
            shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else default
            lines.append(wrap(head + ("" if shown in (None, "") else f"  ({shown})"), initial_indent="  "))
            lines.append(wrap(option.text, initial_indent="      ", subsequent_indent="      "))
    return "\n".join([*lines, "", "Examples:", *(f"  {example}" for example in examples)])


def _nearest(name: str, names: Iterable[str]) -> list[str]:
    """Of the names the one that is nearest in spelling, if one is near."""
    folded = {known.lower(): known for known in names}
    return [folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)]


def ended(work: Callable[[], None], interrupted: str) -> int:
    """Does a command's work, and gives its exit code: 0; 2 with one sentence for BadInput; 130 with `interrupted` for
    Ctrl-C, of which a second one does not wait for what is being closed.

    What is said to a reader that has gone, a full disk or nobody, goes to standard error where there is one.
    """

    def note(*_: object) -> None:
        signal.signal(signal.SIGINT, lambda *_: _end_at_once(interrupted))
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    with _unbroken_streams():
        try:
            work()
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(interrupted, file=sys.stderr)
            return 128 + signal.SIGINT
        finally:
            signal.signal(signal.SIGINT, before)
    return 0


@contextlib.contextmanager
def loading(interrupted: str) -> Iterator[None]:
    """While libraries load, Ctrl-C ends the process at once: raised inside them it can come out as anything."""
    before = signal.signal(signal.SIGINT, lambda *_: _end_at_once(interrupted))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def start(main: Callable[[], int]) -> None:
    """Runs a command as what its process is for."""
    try:
        code = main()
    finally:
        # Only libraries close down from here on: nothing of theirs is worth a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def _end_at_once(words: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{words}\n".encode())
    os._exit(128 + signal.SIGINT)


class _Unbroken:
    """A text stream that goes over to the next of several where one cannot be written any more."""

    def __init__(self, *streams: TextIO | None) -> None:
        self._streams = [stream for stream in streams if stream is not None]
        self._unsaid = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streams[0] if self._streams else sys.__stderr__, name)

    def isatty(self) -> bool:
        return bool(self._streams) and self._streams[0].isatty()

    def write(self, text: str) -> int:
        self._unsaid += text
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        text, self._unsaid = self._unsaid, ""
        while self._streams and text:
            try:
                self._streams[0].write(text)
                self._streams[0].flush()
                return
            except (OSError, ValueError):
                # What its buffer still holds would be tried again when the process ends.
                with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), self._streams.pop(0).fileno())


@contextlib.contextmanager
def _unbroken_streams() -> Iterator[None]:
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The next file opened would be taken for standard output.
            os.open(os.devnull, os.O_RDWR)
    out, error = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(TextIO, _Unbroken(out, error)), cast(TextIO, _Unbroken(error, out))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = out, error
