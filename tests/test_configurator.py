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
from configurator import InputError, atomic_write, configure, first_line, read_json, run

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
    init_from: str | dict = 'gpt2'


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


# --------------------------------------------------------------------------------------------------
# Settings


def test_defaults():
    cfg = configured()
    assert cfg == Settings() and cfg.options == dict(beta=0.1, average=False)


def test_a_config_file_is_python_and_the_command_line_comes_after_it(config):
    path = config('batch_size = 2 ** 5\nlearning_rate = batch_size / 4\nbeta = 0.5\n')
    cfg = configured(path, '--learning_rate=0.25', '--out_dir=my=dir')
    assert (cfg.batch_size, cfg.learning_rate, cfg.out_dir) == (32, 0.25, 'my=dir')
    assert cfg.options == dict(beta=0.5, average=False)
    assert configured(path, '--beta=1', '--beta=2').options['beta'] == 2.0    # the last one counts
    assert Settings().batch_size == 64                      # the class is as it was


def test_names_that_a_config_file_may_use_freely(config):
    cfg = configured(config('import math\nfrom os.path import join\n_width = 3\n'
                            'class Helper: pass\ndef double(x): return 2 * x\n'
                            'batch_size = double(_width)\nout_dir = join("a", "b")\n'))
    assert (cfg.batch_size, cfg.out_dir) == (6, os.path.join('a', 'b'))


def test_functions_classes_and_dicts_as_settings(config):
    cfg = configured(config('def loss(x): return x\n'
                            'model_class = float\ninit_from = dict(n_layer=2)\n'))
    assert cfg.loss(5) == 5 and cfg.model_class is float and cfg.init_from == dict(n_layer=2)
    assert cfg.options == {}                               # this loss has none


@pytest.mark.parametrize('arg, name, value', [
    ('--resume', 'resume', True), ('--resume=False', 'resume', False),
    ('--batch_size=1_000', 'batch_size', 1000), ('--learning_rate=3', 'learning_rate', 3.0),
    ('--learning_rate=-1e-6', 'learning_rate', -1e-6), ('--out_dir=7', 'out_dir', '7'),
    ('--out_dir=', 'out_dir', ''), ('--compile=None', 'compile', None),
    ('--compile', 'compile', True), ('--loss=cube', 'loss', 'cube')])
def test_values_of_the_command_line_have_the_type_of_the_field(arg, name, value):
    found = getattr(configured(arg), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize('arg, value', [('--beta=2', 2.0), ('--average', True)])
def test_options_have_the_type_of_their_default(arg, value):
    found = configured(arg).options[arg[2:].partition('=')[0]]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize('argv, says', [
    (['--lerning_rate=1'], "command line: 'lerning_rate' is not a setting here; did you mean "
                           "'learning_rate'?"),
    (['--avrage'], "'avrage' is not a setting here; did you mean 'average'?"),
    (['--xyz=1'], "command line: 'xyz' is not a setting here"),
    (['--loss=cube', '--beta=1'], "command line: 'beta' is not a setting here"),    # cube has none
    (['--options={}'], "'options' is not a setting here"),
    (['-batch_size=1'], "'-batch_size=1' is not of the form --name=value"),
    (['--=1'], "'--=1' is not of the form --name=value"),
    (['--resume', 'c.py'], "'c.py' is not of the form --name=value"),     # the file is first
    (['none.py'], 'none.py: no such config file'),
    (['--batch_size=many'], "command line: batch_size = 'many' is not of type int"),
    (['--batch_size=8.0'], 'batch_size = 8.0 is not of type int'),
    (['--batch_size=True'], 'batch_size = True is not of type int'),
    (['--batch_size='], "batch_size = '' is not of type int"),
    (['--resume=yes'], "resume = 'yes' is not of type bool"),
    (['--resume=1'], 'resume = 1 is not of type bool'),
    (['--compile=0'], 'compile = 0 is not of type bool or None'),
    (['--learning_rate=None'], 'learning_rate = None is not of type float'),
    (['--learning_rate=1e999'], 'learning_rate = inf is not of type float'),
    (['--learning_rate=__import__("os").getpid()'], 'is not of type float'),  # never run
    (['--beta=high'], "command line: beta = 'high' is not of type float"),
    (['--model_class=GPT'], "model_class = 'GPT' is not of type type")])
def test_what_a_command_line_can_get_wrong(argv, says):
    with pytest.raises(InputError) as e:
        configured(*argv)
    assert says in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('text, says', [
    ('bata = 0.1', ": 'bata' is not a setting here; did you mean 'beta'?"),
    ('zzzz = 3', ": 'zzzz' is not a setting here"),
    ("learning_rate = '0.1'", ": learning_rate = '0.1' is not of type float"),
    ("learning_rate = float('nan')", ': learning_rate = nan is not of type float'),
    ('out_dir = []', ': out_dir = [] is not of type str'),
    ('def batch_size(): pass', ': batch_size = <function'),
    ('seed = 1\nbeta = = 2', ' line 2: SyntaxError: invalid syntax'),
    ('_a = 1\n\nbeta = x', " line 3: NameError: name 'x' is not defined"),
    ('def _f():\n    raise ValueError("one\\ntwo")\n_f()', ' line 2: ValueError: one two'),
    ('import json\n\njson.loads("")', ' line 3: JSONDecodeError'),      # raised in another file
    ('import no_such_module', ' line 1: ModuleNotFoundError'),
    ('open("none.txt")', ' line 1: FileNotFoundError')])
def test_what_a_config_file_can_get_wrong(text, says, config):
    path = config(text)
    with pytest.raises(InputError) as e:
        configured(path)
    assert str(e.value).startswith(path + says) and '\n' not in str(e.value)


def test_an_input_error_in_a_config_file_says_its_own(config):
    with pytest.raises(InputError, match='^films: no$'):
        configured(config("from configurator import InputError\nraise InputError('films: no')"))


@pytest.mark.parametrize('loss, options', [
    ('dpo', dict(beta=0.1, label_smoothing=0.0)), ('simpo', dict(beta=2.0, gamma=0.5)),
    ('rdpo', dict(alpha=0.01)), ('ipo', dict(length_average=False)), ('sft', {})])
def test_the_options_of_an_objective_are_its_parameters(loss, options):
    cfg = train.load_config([f'--loss={loss}'])
    assert cfg.options.items() >= options.items()
    assert not cfg.options.keys() & {'p', 'chosen_lengths', 'policy_chosen_logps'}


def test_the_options_of_an_objective_in_a_config_file(config):
    path = config('def loss(policy_chosen_logps, policy_rejected_logps, margin, delta=1.0):\n'
                  '    z = policy_chosen_logps - policy_rejected_logps - delta\n'
                  '    return (-z).clamp(min=0.0), z, z\n')
    assert train.load_config([path, '--delta=2']).options == dict(delta=2.0)
    with pytest.raises(InputError, match="'beta' is not a setting here"):
        train.load_config([path, '--beta=2'])


# --------------------------------------------------------------------------------------------------
# Commands


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from configurator import InputError, run
def main(argv):
    {body}
run(main, '\\n  The help.\\n')
"""


def command(body, *argv):
    """(exit code, stdout, stderr) of a program whose main is `body`."""
    program = PROGRAM.format(root=str(ROOT), body=body)
    done = subprocess.run([sys.executable, '-c', program, *argv], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize('body, expected', [
    ('print(argv)', (0, "['x']\n", '')),
    ('raise InputError("a.jsonl line 2:\\nbad")', (1, '', 'error: a.jsonl line 2: bad\n')),
    ('open("none.txt")', (1, '', "error: [Errno 2] No such file or directory: 'none.txt'\n")),
    ('raise KeyboardInterrupt', (130, '', '')),
    ('import os, signal; os.kill(os.getpid(), signal.SIGTERM)', (143, '', '')),
    ('raise BrokenPipeError', (0, '', ''))])
def test_what_a_command_ends_with(body, expected):
    assert command(body, 'x') == expected


def test_a_bug_keeps_its_traceback():
    code, _, stderr = command('raise KeyError(3)', 'x')
    assert code == 1 and 'Traceback' in stderr and 'KeyError: 3' in stderr


@pytest.mark.parametrize('argv', [[], ['-h'], ['x', '--help']])
def test_help(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['train.py', *argv])
    run(lambda argv: pytest.fail('main runs'), '\n  The help.\n')
    assert capsys.readouterr().out == 'The help.\n'


def test_a_reader_that_ends_early_ends_a_command_quietly():
    program = PROGRAM.format(root=str(ROOT), body='[print("line", i) for i in range(100_000)]')
    process = subprocess.Popen([sys.executable, '-c', program, 'x'], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == 'line 0\n'
    process.stdout.close()
    assert process.stderr.read() == '' and process.wait() == 0


# --------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize('mode, old, new', [('w', 'alt', 'né'), ('wb', b'alt', b'\xff')])
def test_atomic_write_of_a_new_file_and_over_an_old_one(mode, old, new, tmp_path):
    path = tmp_path / 'a'
    for content in (old, new):
        with atomic_write(str(path), mode) as f:
            f.write(content)
        assert path.read_bytes() == (content if mode == 'wb' else content.encode())
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
        assert str(e.value).startswith(f'{path}: could not be written')
        assert raised.args[-1] in str(e.value)


def test_atomic_write_of_a_process_that_is_killed(tmp_path):
    """kill -9 in the middle: the old file is there, untouched."""
    path = tmp_path / 'a'
    path.write_text('old')
    program = (f'import os, sys; sys.path.insert(0, {str(ROOT)!r})\n'
               'from configurator import atomic_write\n'
               f'with atomic_write({str(path)!r}) as f:\n'
               '    f.write("new"); f.flush(); os.kill(os.getpid(), 9)')
    assert subprocess.run([sys.executable, '-c', program]).returncode == -9
    assert path.read_text() == 'old'


def test_atomic_write_into_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match='none/a: could not be written .*No such file'):
        with atomic_write(str(tmp_path / 'none' / 'a')) as f:
            f.write('x')


def test_read_json(tmp_path):
    path = tmp_path / 'a.json'
    assert read_json(str(path), missing={}) == {}
    with pytest.raises(InputError, match='a.json: not a JSON file .*FileNotFoundError'):
        read_json(str(path))
    path.write_text('{"a": [1, null]}')
    assert read_json(str(path)) == dict(a=[1, None])
    for content, says in ((b'{"a": ', 'not a JSON file'), (b'\xff', 'not a JSON file'),
                          (b'[1]', 'not an object but a list')):
        path.write_bytes(content)
        with pytest.raises(InputError, match=says):
            read_json(str(path), missing={})


def test_first_line():
    line = first_line(ValueError('one\n  two ' + 'x' * 999))
    assert line.startswith('ValueError: one two x') and len(line) == 160
