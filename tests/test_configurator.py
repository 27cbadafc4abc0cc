"""
Tests of configurator.py: a config file and a command line, how commands end, atomic files.

    python -m pytest tests/test_configurator.py

Left out: which values of which settings are in range; train.py's and prepare.py's tests have that.
"""
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import configurator
import train
from configurator import InputError, atomic_write, configure, run

ROOT = Path(configurator.__file__).parent


@dataclass
class Settings:
    out_dir: str = 'out'
    resume: bool = False
    batch_size: int = 64
    learning_rate: float = 1e-3
    compile: bool | None = None
    loss: str | Callable = 'square'
    model_class: type = int


def square_options(cfg):
    """Only one loss has options: beta, a float, and average, a bool."""
    return dict(beta=0.1, average=False) if cfg.loss == 'square' else {}


def configured(*argv):
    return configure(Settings, argv, square_options)


@pytest.fixture
def config(tmp_path):
    """config('a = 1\\n') -> the path of a config file."""
    def config(text):
        (tmp_path / 'c.py').write_text(text)
        return str(tmp_path / 'c.py')
    return config


def test_code_is_a_function_or_a_class(config):
    path = config('import functools\nloss = functools.partial(max, 1)\nmodel_class = str\n')
    with pytest.raises(InputError, match='loss = functools.* is not of type str or Callable'):
        configured(path)


def test_the_command_line_comes_after_the_config_file(config):
    path = config('batch_size = 2 ** 5\nlearning_rate = batch_size / 4\nbeta = 0.5\n')
    cfg = configured(path, '--learning_rate=0.25', '--out_dir=my=dir')
    assert (cfg.batch_size, cfg.learning_rate, cfg.out_dir) == (32, 0.25, 'my=dir')
    assert cfg.options == dict(beta=0.5, average=False)
    assert configured(path, '--beta=1', '--beta=2').options['beta'] == 2.0    # the last one counts
    assert configured() == Settings()                      # the class is as it was


def test_what_a_config_file_may_use_freely(config):
    cfg = configured(config('import math\nfrom os.path import join\n_width = 3\n'
                            'class Helper: pass\ndef loss(x): return x\nmodel_class = float\n'
                            'batch_size = loss(_width)\nout_dir = join("a", "b")\n'))
    assert (cfg.batch_size, cfg.out_dir) == (3, os.path.join('a', 'b'))
    assert cfg.loss(5) == 5 and cfg.model_class is float
    assert cfg.options == {}                               # this loss has none


@pytest.mark.parametrize('arg, name, value', [
    ('--resume', 'resume', True), ('--resume=False', 'resume', False),
    ('--batch_size=1_000', 'batch_size', 1000), ('--learning_rate=3', 'learning_rate', 3.0),
    ('--learning_rate=-1e-6', 'learning_rate', -1e-6), ('--out_dir=7', 'out_dir', '7'),
    ('--out_dir=', 'out_dir', ''), ('--compile=None', 'compile', None),
    ('--compile', 'compile', True), ('--loss=cube', 'loss', 'cube'),
    ('--beta=2', 'beta', 2.0), ('--average', 'average', True)])
def test_values_have_the_type_of_the_field_or_option(arg, name, value):
    cfg = configured(arg)
    found = (vars(cfg) | cfg.options)[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize('argv, says', [
    (['--lerning_rate=1'], "did you mean 'learning_rate'?"),
    (['--avrage'], "did you mean 'average'?"),
    (['--loss=cube', '--beta=1'], 'beta'),                 # cube has no options
    (['-batch_size=1'], 'batch_size'), (['none.py'], 'none.py'),
    (['--resume', 'c.py'], 'c.py'),                        # the file comes first
    (['--batch_size=many'], 'int'), (['--batch_size=8.0'], 'int'), (['--batch_size=True'], 'int'),
    (['--resume=yes'], 'bool'), (['--compile=0'], 'bool or None'),
    (['--learning_rate=None'], 'float'), (['--learning_rate=1e999'], 'float'),
    (['--learning_rate=__import__("os").getpid()'], 'float'),       # never run
    (['--beta=high'], 'beta'), (['--model_class=GPT'], 'type')])
def test_what_a_command_line_can_get_wrong(argv, says):
    with pytest.raises(InputError) as e:
        configured(*argv)
    assert says in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('text, says', [
    ('bata = 0.1', "did you mean 'beta'?"),
    ("learning_rate = '0.1'", "learning_rate = '0.1'"),
    ("learning_rate = float('nan')", 'nan'),
    ('seed = 1\nbeta = = 2', 'line 2: SyntaxError'),
    ('_a = 1\n\nbeta = x', 'line 3: NameError'),
    ('def _f():\n    raise ValueError("one\\ntwo")\n_f()', 'line 2: ValueError: one two'),
    ('import json\n\njson.loads("")', 'line 3: JSONDecodeError'),      # raised in another file
    ('from configurator import InputError\nraise InputError("c.py: no")', 'c.py: no')])
def test_what_a_config_file_can_get_wrong(text, says, config):
    with pytest.raises(InputError) as e:
        configured(config(text))
    assert 'c.py' in str(e.value) and says in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('loss, options', [
    ('dpo', dict(beta=0.1, label_smoothing=0.0)), ('rdpo', dict(beta=0.1, alpha=0.01)),
    ('simpo', dict(beta=2.0, gamma=0.5, label_smoothing=0.0, sft_weight=0.0)), ('sft', {})])
def test_the_options_of_an_objective_are_its_parameters(loss, options):
    assert train.load_config([f'--loss={loss}']).options == options


PROGRAM = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from configurator import InputError, run
def main(argv):
    BODY
run(main, 'The help.')
"""


def command(body):
    """A program whose main is `body`, after a line that says it is ready."""
    program = PROGRAM.replace('BODY', f'print("ready", flush=True); {body}')
    process = subprocess.Popen(
        [sys.executable, '-c', program, 'x'], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | dict(PYTHONUNBUFFERED=''))
    assert process.stdout.readline() == 'ready\n'
    return process


@pytest.mark.parametrize('body, code, says', [
    ('assert argv == ["x"]', 0, ''),
    ('raise InputError("a.jsonl line 2:\\nbad")', 1, 'error: a.jsonl line 2: bad\n'),
    ('open("none.txt")', 1, "error: [Errno 2] No such file or directory: 'none.txt'\n"),
    ('raise KeyboardInterrupt', 130, ''),
    ('os.kill(os.getpid(), signal.SIGTERM)', 143, ''),
    ('[print(i, flush=True) for i in range(100_000)]', 0, '')])     # to a reader that has ended
def test_what_a_command_ends_with(body, code, says):
    process = command(body)
    process.stdout.close()
    assert process.stderr.read() == says and process.wait() == code


def test_a_bug_keeps_its_traceback():
    _, stderr = command('raise KeyError(3)').communicate()
    assert 'Traceback' in stderr and 'KeyError: 3' in stderr


@pytest.mark.parametrize('argv', [[], ['-h'], ['x', '--help']])
def test_help(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['train.py', *argv])
    run(lambda argv: pytest.fail('main runs'), '\n  The help.\n')
    assert capsys.readouterr().out == 'The help.\n'


@pytest.mark.parametrize('mode, content', [('w', 'né'), ('wb', b'\xff')])
def test_atomic_write_over_an_old_file(mode, content, tmp_path):
    (tmp_path / 'a').write_text('old')
    with atomic_write(str(tmp_path / 'a'), mode) as f:
        f.write(content)
    assert (tmp_path / 'a').read_bytes() == (content if mode == 'wb' else content.encode())
    assert os.listdir(tmp_path) == ['a']


@pytest.mark.parametrize('raised, becomes', [
    (OSError(28, 'No space left'), InputError), (RuntimeError('unexpected pos'), InputError),
    (KeyError('bug'), KeyError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_atomic_write_that_fails_leaves_the_old_file(raised, becomes, tmp_path):
    path = tmp_path / 'a'
    path.write_text('old')
    with pytest.raises(becomes) as e, atomic_write(str(path)) as f:
        f.write('new')
        f.flush()
        assert path.read_text() == 'old'                   # nobody sees half a file
        raise raised
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['a']
    if becomes is InputError:
        assert str(path) in str(e.value) and raised.args[-1] in str(e.value)
