"""
Configuration and CLI: config files and --name=value into a dataclass, one-line errors, files.

    python train.py config/dpo_demo.py --beta=0.5 --resume

A config file is plain Python, and is executed. It assigns fields of the command's dataclass.
Names with a leading underscore, modules, functions and classes are ignored. A misspelt name or a
value of the wrong type is an error. Left out: nested settings, environment variables, YAML.
"""
import ast
import contextlib
import dataclasses
import difflib
import inspect
import os
import reprlib
import runpy
import signal
import sys
import traceback
import types
from collections.abc import Callable


class InputError(ValueError):
    """Something the user can fix: a file, a key, a value. Commands print its one line and exit
    with 1."""

    def __init__(self, message):
        super().__init__(' '.join(str(message).split('\n')))


def first_line(e):
    """Another library's exception, short enough to quote."""
    return ' '.join(f'{type(e).__name__}: {e}'.split())[:240]


# --------------------------------------------------------------------------------------------------
# Settings


def configure(cls, argv, options_of=lambda cfg: {}):
    """[CONFIG] [--name=value ...] -> an instance of the dataclass `cls`.

    `options_of(cfg)` returns further names with their defaults, which may depend on the fields:
    the options of the chosen objective. Their values become the dictionary `cfg.options`.
    """
    given, argv = {}, list(argv)                           # name -> (value, where it was set)
    if argv and not argv[0].startswith('-'):
        path = argv.pop(0)
        names = {f.name for f in dataclasses.fields(cls)}
        for name, value in run_config(path).items():
            free = name.startswith('_') or inspect.ismodule(value) or callable(value)
            if name in names or not free:
                given[name] = value, path
    for arg in argv:
        name, equals, text = arg.removeprefix('--').partition('=')
        if not arg.startswith('--') or not name:
            raise InputError(f'command line: {arg!r} is not of the form --name=value')
        given[name] = text if equals else 'True', 'command line'   # --resume means --resume=True

    cfg = cls()
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    for name in kinds.keys() & given.keys():
        setattr(cfg, name, checked(name, *given[name], kinds[name]))
    cfg.options = options_of(cfg)
    for name in given.keys() - kinds.keys():
        value, where = given[name]
        if name not in cfg.options:
            near = difflib.get_close_matches(name, [*kinds, *cfg.options], n=1)
            raise InputError(f'{where}: {name!r} is not a setting here'
                             + ''.join(f'; did you mean {match!r}?' for match in near))
        cfg.options[name] = checked(name, value, where, type(cfg.options[name]))
    return cfg


def run_config(path):
    if not os.path.isfile(path):
        raise InputError(f'{path}: no such config file')
    try:
        return runpy.run_path(path)
    except InputError:
        raise
    except Exception as e:
        frames = traceback.extract_tb(e.__traceback__)
        lines = [0] + [frame.lineno for frame in frames if frame.filename == path]
        line = e.lineno if isinstance(e, SyntaxError) else lines[-1]
        raise InputError(f'{path} line {line}: {first_line(e)}')


def checked(name, value, where, kind):
    """`value` as `kind`, a type or a union of types. The command line's text is read as a Python
    literal."""
    kinds = kind.__args__ if isinstance(kind, types.UnionType) else (kind,)
    if where == 'command line' and str not in kinds:
        with contextlib.suppress(ValueError, SyntaxError, TypeError):
            value = ast.literal_eval(value)
    if type(value) is int and float in kinds and int not in kinds:
        value = float(value)
    is_code = inspect.isfunction(value) or inspect.isclass(value)
    fits = type(value) in kinds or (is_code and {Callable, type} & set(kinds))
    if not fits or value != value or value in (float('inf'), -float('inf')):
        wanted = ' or '.join(k.__name__.replace('NoneType', 'None') for k in kinds)
        raise InputError(f'{where}: {name} = {reprlib.repr(value)} is not of type {wanted}')
    return value


def check_choice(cfg, **choices):
    """Raise InputError for the first of these settings that is not one of its choices."""
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            raise InputError(f'{name}: {getattr(cfg, name)!r} is not one of {allowed}')


def check_least(cfg, **least):
    """Raise InputError for the first of these settings that is less than its least value."""
    for name, low in least.items():
        if getattr(cfg, name) < low:
            raise InputError(f'{name}: {getattr(cfg, name)} is less than {low}')


# --------------------------------------------------------------------------------------------------
# Commands


def run(main, doc):
    """CLI wrapper: --help prints `doc`; an InputError becomes one line and exit code 1."""
    argv = sys.argv[1:]
    # SIGTERM unwinds the stack, so that temporary files are removed
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        if not argv or '-h' in argv or '--help' in argv:
            print(doc.strip(), flush=True)
        else:
            main(argv)
            sys.stdout.flush()           # here, where a reader that has ended is caught
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:              # the reader of our output, `head` say, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as e:
        sys.exit(f'error: {e}')


@contextlib.contextmanager
def atomic_write(path, mode='w'):
    """A file to write. A crash leaves `path` with its old content or all of the new."""
    part = f'{path}.{os.getpid()}.tmp'
    try:
        with open(part, mode, encoding=None if 'b' in mode else 'utf-8') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:    # torch.save has its own for a full disk
        raise InputError(f'{path}: could not be written ({first_line(e)}); the old file, if any, '
                         'is unchanged')
    finally:
        with contextlib.suppress(OSError):
            os.remove(part)
