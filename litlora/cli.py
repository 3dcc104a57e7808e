"""The command line: `litlora COMMAND --flags`. Torch is imported only when a command is known: --help is quick."""

from __future__ import annotations

import _thread
import contextlib
import dataclasses
import difflib
import errno
import importlib
import inspect
import io
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from litlora.errors import InputError

COMMANDS = {
    "inspect": "show what the model will see of the data, before training",
    "plan": "say beforehand what a finetuning run will hold, and whether it fits",
    "finetune_lora": "finetune a model with LoRA or QLoRA",
    "generate": "generate text from a base, base + adapter, or merged model",
    "chat": "hold a conversation in the terminal",
    "merge_lora": "merge adapters into the base model's weights",
    "validate": "validation loss of a base, base + adapter, or merged model",
    "report": "put finetuning runs side by side",
    "download": "fetch a model from the Hugging Face hub",
    "convert": "make a Hugging Face directory of Meta's original checkpoint",
}
BARE = {"download": "REPO_ID ", "report": "DIRECTORY... "}  # what is given without a flag
EPILOG = """Every command takes --help, --config FILE.yaml (flags override it), --print_config and --debug (tracebacks).
`litlora completion` prints a script that completes commands and flags in bash and zsh."""
# What a command may end with that is no bug: its message says all.
CLEAN_ERRORS = ("VerifyError", "TrainingError")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `litlora` and of scripts/*.py."""
    if "--debug" not in (sys.argv if argv is None else argv):  # what threads and destructors end with
        sys.unraisablehook = _unraisable
        threading.excepthook = lambda _: None
    code = call(argv)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the leaving, too, without a word
    sys.exit(code)


def _unraisable(ignored: sys.UnraisableHookArgs) -> None:
    if issubclass(ignored.exc_type, KeyboardInterrupt):  # it met a destructor: once more, for the program
        _thread.interrupt_main()


def call(argv: Sequence[str] | None = None) -> int:
    """Runs a command line. Returns 0: well, 1: failed, 2: bad input, 130: interrupted."""
    debug = False
    try:
        # before torch starts: packs differ in length, and what one frees shall serve the next
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        arguments = list(sys.argv[1:] if argv is None else argv)
        debug = "--debug" in arguments
        arguments = [argument for argument in arguments if argument != "--debug"]
        code = _dispatch(arguments)
        if sys.stdout is not None:  # None: closed before we began
            sys.stdout.flush()
    except InputError as error:
        code = _fail(f"error: {error}", 2, debug)
    except KeyboardInterrupt:
        code = _fail("interrupted", 130, debug)
    except BrokenPipeError:  # `litlora generate … | head`
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except SystemExit as error:  # --help and --print_config
        known = error.code is None or isinstance(error.code, int)
        code = int(error.code or 0) if known else _fail(f"error: {error.code}", 1, debug)
    except MemoryError:
        fix = "a smaller file, batch or model; --debug shows where"
        code = _fail(f"error: out of memory on the host\n  fix:    {fix}", 1, debug)
    except OSError as error:
        if error.errno is not None and error.filename is not None:  # rights, a name that is too long
            code = _fail(f"error: {InputError(str(error.strerror), where=error.filename)}", 2, debug)
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):  # while writing: no name comes with these
            code = _fail(f"error: {error.strerror}\n  fix:    free some space, and run again", 1, debug)
        else:
            code = _fail(_internal(error), 1, debug)
    except BaseException as error:  # a panic in a library of Rust is no Exception
        if type(error).__name__ in CLEAN_ERRORS:
            code = _fail(f"error: {error}", 1, debug)
        else:
            code = _fail(_internal(error), 1, debug)
    return code


def _internal(error: BaseException) -> str:
    first = next(iter(str(error).splitlines()), "")[:500]  # torch adds its C++ frames
    return f"internal error: {type(error).__name__}: {first}\n  fix:    run again with --debug and report it"


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
        return code
    with contextlib.suppress(OSError, ValueError):  # nobody listens any more
        print(message, file=sys.stderr)
    return code


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["help"] and len(arguments) > 1:  # litlora help COMMAND
        arguments = [arguments[1], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from litlora import __version__

        print(f"litlora {__version__}")
        return 0
    name = arguments[0]
    if name == "completion":
        from litlora.completion import completion

        if arguments[1:] in (["-h"], ["--help"]):
            print("usage: litlora completion\n\nPrint a script that completes commands and flags in bash and zsh.")
            return 0
        if len(arguments) > 1:
            raise InputError("completion takes no flags", got=" ".join(arguments[1:]), fix="leave them out")
        print(completion(COMMANDS))
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        raise InputError(
            "unknown command",
            got=name,
            wanted=", ".join(COMMANDS),
            fix=f"did you mean `litlora {close[0]}`?" if close else "litlora --help",
        )
    # torch's CPU threads spin while they wait for each other, which on a busy machine takes the time that the others
    # need: with a short spin two threads are as fast alone and several times faster beside another program
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    module = importlib.import_module(f"litlora.commands.{name}")
    args, given = parse(name, module, arguments[1:])
    if "given" in inspect.signature(module.run).parameters:
        module.run(args, given=given)
    else:
        module.run(args)
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    what = "Finetune Llama-style language models with LoRA and QLoRA."
    return "\n".join(["usage: litlora COMMAND [flags]", "", what, "", "commands:", *lines, "", EPILOG])


def make_parser(name: str, module: Any) -> Any:
    """The parser of one command, its flags those of the command's `Args`."""
    import jsonargparse

    description = inspect.getdoc(module.Args) or COMMANDS[name]
    parser = jsonargparse.ArgumentParser(
        prog=f"litlora {name}",
        description=description.split("\n\n")[0],
        epilog="--debug shows the traceback of an error.",
        usage=f"litlora {name} {BARE.get(name, '')}[--config FILE.yaml] [flags]",
        exit_on_error=False,
        allow_abbrev=False,
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file of these flags; flags given beside it win")
    # only download has an argument without a flag: litlora download REPO_ID
    parser.add_class_arguments(module.Args, None, as_positional=name == "download", sub_configs=False)
    parser._action_groups[-1].title = "flags"  # else the description's first line once more
    return parser


def parse(name: str, module: Any, arguments: list[str]) -> tuple[Any, frozenset[str]]:
    """The command's Args and the names of the flags that were given (on the line or in a config).

    Raises InputError for what does not parse, with the nearest right name for an unknown flag or key.
    """
    import jsonargparse

    parser = make_parser(name, module)
    for file in _values_of("config", arguments):
        _check_config(file)
    if name == "report":
        arguments = _bare_words(arguments, "runs")
    arguments = _join_lists(arguments, module.Args)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            namespace = parser.parse_args(arguments)
            given = parser.parse_args(arguments, defaults=False)
    except (jsonargparse.ArgumentError, SystemExit, ValueError, TypeError, OSError) as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        raise _explained(str(error), module.Args, arguments) from None
    fields = [field.name for field in dataclasses.fields(module.Args)]
    optional = {field.name: "None" in str(field.type) for field in dataclasses.fields(module.Args)}
    values = {field: getattr(namespace, field) for field in fields}
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    values |= _verbatim(arguments, module.Args, values)
    for field, value in values.items():
        if value is None and not optional[field]:
            raise InputError("a flag without a value", where=f"--{field}", got="null", fix="take it out of the config")
        if any("\0" in str(part) for part in (value if isinstance(value, tuple) else [value])):
            raise InputError("a NUL byte in a flag's value", where=f"--{field}", got=repr(str(value))[:100])
    keys = frozenset(key for key in fields if key in given)  # null, too
    return module.Args(**values), keys


def _bare_words(arguments: list[str], flag: str) -> list[str]:
    """`litlora report out/a out/b` is `litlora report --runs out/a --runs out/b`."""
    found: list[str] = []
    value = False  # whether a word belongs to the flag before it
    for argument in arguments:
        is_flag = argument.startswith("--") or argument == "-h"
        found.append(argument if is_flag or value else f"--{flag}={argument}")
        value = is_flag and "=" not in argument and argument not in ("-h", "--help", "--print_config")
    return found


def _join_lists(arguments: list[str], args: type) -> list[str]:
    """`--x a --x b` for a flag that takes several values becomes one JSON list, `--x=["a", "b"]`: that takes any text
    as it is (spaces, commas, brackets, a leading #)."""
    several = {f.name for f in dataclasses.fields(args) if str(f.type).startswith(("tuple[", "list["))}
    joined: list[str] = []
    values: dict[str, list[str]] = {}
    position = 0
    while position < len(arguments):
        flag, equals, value = arguments[position].partition("=")
        name = flag[2:] if flag.startswith("--") and flag[2:] in several else None
        if name is not None and (equals or position + 1 < len(arguments)):
            position += not equals
            values.setdefault(name, []).append(value if equals else arguments[position])
        else:
            joined.append(arguments[position])
        position += 1
    return joined + [f"--{name}={json.dumps(found)}" for name, found in values.items()]


def _verbatim(arguments: list[str], args: type, values: dict[str, Any]) -> dict[str, str]:
    """Texts that YAML takes for nothing, such as `--prompt "### Question"`; only `null` means nothing."""
    optional = {f.name for f in dataclasses.fields(args) if str(f.type) == "str | None" and values[f.name] is None}
    found = {name: text for name in optional for text in _values_of(name, arguments)}
    return {name: text for name, text in found.items() if text != "null"}


def _values_of(name: str, arguments: list[str]) -> Iterator[str]:
    """What a flag is set to on the line: `--name value` or `--name=value`."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, equals, value = argument.partition("=")
        if flag == f"--{name}":
            yield value if equals else following


def _check_config(file: str) -> None:
    """Raises InputError, naming file and line, unless it is a flat table of names and values."""
    from litlora.flat_yaml import read_flat_yaml

    if "config" in read_flat_yaml(Path(file)):
        raise InputError("a config that names another", where=file, fix="--config may be given several times")


def _explained(message: str, args: type, arguments: Sequence[str]) -> InputError:
    """jsonargparse's message, in our form."""
    known = [field.name for field in dataclasses.fields(args)] + ["config", "print_config", "help", "debug"]
    message = re.sub(r"\s+", " ", message).strip()
    for pattern in (
        r"(?i)unrecognized arguments: -*([\w.+-]+)",
        r"Key '([\w.]+)' is not expected",
        r"Option '([\w.]+)' is not accepted",
        r"[Nn]o action for key \"?'?([\w.]+)",
    ):
        found = re.search(pattern, message)
        if found:
            close = difflib.get_close_matches(found.group(1), known, n=1, cutoff=0.5)
            fix = f"did you mean --{close[0]}?" if close else "see --help"
            kind = "flag" if f"--{found.group(1)}" in " ".join(arguments) else "flag or config key"
            return InputError(f"unknown {kind}", got=found.group(1), fix=fix)
    found = re.search(r'Key "?([\w.]+)"? is required|the following arguments are required: (.+)', message)
    if found:
        return InputError(
            "a required flag is missing", wanted=f"--{found.group(1) or found.group(2)}", fix="see --help"
        )
    found = re.search(r'Parser key "([\w.]+)": (.*)', message)
    if found:
        where, reason = f"--{found.group(1)}", found.group(2)
        types = re.search(r"Expected an? (.+?)\. Got value: (.*)", reason) or re.search(
            r"Subtypes: \[(.+?)\] Errors: .* Given value: (.*)", reason
        )
        if types is None:
            return InputError("a flag's value does not fit", where=where, got=reason[:300], fix="see --help")
        wanted = re.sub(r"<class '(\w+)'>", r"\1", types.group(1)).replace("typing.", "").replace("NoneType", "null")
        return InputError("a flag's value does not fit", where=where, got=types.group(2)[:100], wanted=wanted)
    return InputError("the command line does not parse", got=message[:400], fix="see --help")
