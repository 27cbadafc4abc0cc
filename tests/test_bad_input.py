"""
What a user can get wrong, a named case each: the message is one line that says where, and no file is harmed.

    python -m pytest tests/test_bad_input.py
    python -m pytest tests/test_bad_input.py -k gzip

Each table holds (the bad thing, what the message must say). Models are random and tiny, tokens are bytes.
"""
import contextlib
import fcntl
import gzip
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prepare
import train
from model import GPT, GPTConfig
from prepare import InputError, Pairs

ROOT = Path(__file__).resolve().parent.parent
GOOD = dict(prompt='Q', chosen='A', rejected='B')
USER, REPLY = dict(role='user', content='Hi'), dict(role='assistant', content='Yes')
OTHER = REPLY | dict(content='No')


def case(name, *values):
    """A row of a table."""
    return pytest.param(*values, id=name)


def snapshot(folder):
    return {str(path): path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}


@contextlib.contextmanager
def refused(folder, *says):
    """The block must raise InputError, a line that holds all of `says`, and change no file in `folder`."""
    before = snapshot(folder)
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert all(part in message for part in says), message
    assert '\n' not in message and len(message) < 500
    assert snapshot(folder) == before


# ------------------------------------------------------------------------------------------------------------
# Records: the second line of a file whose first is good


RECORDS = [
    # no record at all
    case('cut short', b'{"prompt": ', 'not valid JSON (Expecting value at character 13)'),
    case('single quotes', b"{'prompt': 'Q'}", 'not valid JSON (Expecting property name'),
    case('invalid UTF-8', b'{"prompt": "\xff"}', 'not valid UTF-8 (invalid start byte at byte 12)'),
    case('Latin-1', '{"prompt": "é"}'.encode('latin-1'), 'not valid UTF-8'),
    case('raw NUL byte', b'{"prompt": "a\0b"}', 'not valid JSON (Invalid control character at character 14)'),
    case('brackets without end', b'[' * 100_000, 'not valid JSON (maximum recursion depth'),
    case('integer of 5000 digits', b'{"p": ' + b'9' * 5000 + b'}', 'not valid JSON (Exceeds the limit'),
    case('a list', b'[{}]', 'a record is an object with keys, not a list'),
    case('a string', b'"text"', 'a record is an object with keys, not a str'),
    case('null', b'null', 'a record is an object with keys, not a NoneType'),
    # keys
    case('key twice', b'{"prompt": "Q", "prompt": "R", "chosen": "A"}', "the key 'prompt' stands twice"),
    case('key twice in a message', b'{"chosen": [{"role": "user", "role": "user"}]}',
         "the key 'role' stands twice"),
    case('no key', {}, "no 'prompt'; the record's keys are none"),
    case('other keys', dict(text='x', label=1), "no 'prompt'; the record's keys are 'text', 'label'"),
    case('keys that would fill the screen', {f'k\n{i}' * 99: i for i in range(9999)},
         "no 'prompt'; the record's keys are 'k\\n0k"),
    case('prompt alone', dict(prompt='Q'), "no 'chosen'; the record's keys are 'prompt'"),
    case('chosen alone', dict(chosen='A'), "no 'prompt'"),
    # strings
    case('empty prompt', GOOD | dict(prompt=''), "'prompt' is empty or blank"),
    case('blank prompt', GOOD | dict(prompt=' \n\t'), "'prompt' is empty or blank"),
    case('empty chosen', GOOD | dict(chosen=''), "'chosen' is empty or blank"),
    case('blank rejected', GOOD | dict(rejected='\u3000 '), "'rejected' is empty or blank"),
    case('null rejected', GOOD | dict(rejected=None), "'rejected' is of type NoneType, not a string"),
    case('number for a string', GOOD | dict(prompt=3), "'prompt' is of type int, not a string"),
    case('list for a prompt', GOOD | dict(prompt=['Q']), "'prompt' is of type list, not a string"),
    case('object for a response', GOOD | dict(chosen={}), "'chosen' is of type dict, not a string"),
    case('lone surrogate', GOOD | dict(prompt='a\ud800'), "'prompt' holds a lone surrogate"),
    case('lone surrogate in a response', GOOD | dict(rejected='\udfff'), "'rejected' holds a lone surrogate"),
    case('lone surrogate in a chat',
         dict(chosen=[USER, REPLY], rejected=[USER, OTHER | dict(content='\ud800')]),
         "'rejected' holds a lone surrogate"),
    # transcripts
    case('transcripts that share nothing', dict(chosen='\n\nHuman: a', rejected='\n\nHuman: b'),
         "no 'prompt', and"),
    case('transcript that is blank', dict(chosen=' ', rejected='\n\nHuman: b'), "'chosen' is empty or blank"),
    # chats
    case('one chat, one string', GOOD | dict(chosen=[REPLY]),
         "'chosen' and 'rejected' must both be lists of messages"),
    case('empty chat', dict(chosen=[], rejected=[USER, OTHER]), 'must both be lists of messages'),
    case('chat without its rejected', dict(chosen=[USER, REPLY]), 'must both be lists of messages'),
    case('lists of strings', GOOD | dict(chosen=['A'], rejected=['B']), "'chosen': a message needs"),
    case('unknown role', dict(prompt='Q', chosen=[REPLY | dict(role='tool')], rejected=[OTHER]),
         "not 'tool'"),
    case('role that is a list', dict(prompt='Q', chosen=[REPLY | dict(role=['user'])], rejected=[OTHER]),
         "not ['user']"),
    case('message without role', dict(prompt='Q', chosen=[dict(content='A')], rejected=[OTHER]), 'not None'),
    case('message without content', dict(prompt='Q', chosen=[dict(role='user')], rejected=[OTHER]),
         'a message needs'),
    case('content that is a list', dict(prompt='Q', chosen=[REPLY | dict(content=[])], rejected=[OTHER]),
         'a message needs'),
    case('bad message in the prompt', dict(prompt=[3], chosen=[REPLY], rejected=[OTHER]),
         "'prompt': a message needs"),
    case('chat that ends with the user', dict(chosen=[USER, REPLY], rejected=[USER, OTHER, USER]),
         "'rejected': what follows"),
    case('chats of the user alone', dict(chosen=[USER], rejected=[USER]), "no 'prompt'"),
    case('chat without an answer', dict(prompt=[USER], chosen=[USER], rejected=[USER, OTHER]),
         "'chosen': what follows"),
    case('chat with a blank answer', dict(chosen=[USER, REPLY | dict(content=' ')], rejected=[USER, OTHER]),
         "'chosen': what"),
    case('chats without a prompt', dict(chosen=[REPLY], rejected=[OTHER]), "no 'prompt'"),
    case('chats with an empty prompt', dict(prompt=[], chosen=[REPLY], rejected=[OTHER]),
         "'prompt' is empty or blank"),
    case('chats with a blank prompt',
         dict(chosen=[USER | dict(content=''), REPLY], rejected=[USER | dict(content=''), OTHER]),
         "'prompt' is empty or blank"),
    # Alpaca, rankings
    case('blank instruction', dict(instruction=' ', chosen='A', rejected='B'),
         "'instruction' is empty or blank"),
    case('input that is a number', dict(instruction='Q', input=3, chosen='A', rejected='B'),
         "'input' is of type int"),
    case('ranking of none', dict(prompt='Q', responses=[]), "'responses' is [], not a list"),
    case('ranking that is a string', dict(prompt='Q', responses='A'), "'responses' is 'A', not a list"),
    case('ranking with a blank', dict(prompt='Q', responses=['A', '']), "'responses' is empty or blank"),
    case('ranking with a number', dict(prompt='Q', responses=['A', 1]),
         "'responses' is of type int, not a string"),
    case('three responses after two', dict(prompt='Q', responses=['A', 'B', 'C']),
         '3 responses, where the records before have 2'),
    case('one response after two', dict(prompt='Q', chosen='A'),
         '1 responses, where the records before have 2'),
    # labels
    case('p above 1', GOOD | dict(p=1.5), "'p' is 1.5, not a probability"),
    case('p below 0', GOOD | dict(p=-0.1), "'p' is -0.1, not a probability"),
    case('p NaN', GOOD | dict(p=float('nan')), "'p' is nan, not a finite number"),
    case('p a string', GOOD | dict(p='0.5'), "'p' is '0.5', not a finite number"),
    case('p true', GOOD | dict(p=True), "'p' is True, not a finite number"),
    case('p beyond any float', GOOD | dict(p=10**400), "'p' is 1000"),
    case('margin beyond float32', GOOD | dict(margin=1e300), "'margin' is 1e+300, not a finite number"),
    case('score NaN', GOOD | dict(chosen_score=float('nan'), rejected_score=0),
         "'chosen_score' is nan, not a finite number"),
    case('score infinite', GOOD | dict(chosen_score=1, rejected_score=float('-inf')),
         "'rejected_score' is -inf, not a finite"),
    case('score a list', GOOD | dict(chosen_score=[1], rejected_score=0),
         "'chosen_score' is [1], not a finite number"),
    case('one score missing', GOOD | dict(chosen_score=1), "'chosen_score' and 'rejected_score' go together"),
]


@pytest.mark.parametrize('record, says', RECORDS)
def test_record(record, says, write, settings, tmp_path):
    line = record if isinstance(record, bytes) else json.dumps(record).encode()
    path = write('bad.jsonl', json.dumps(GOOD).encode() + b'\n' + line + b'\n')
    with refused(tmp_path, 'bad.jsonl line 2: ', says):
        prepare.prepare(settings(path))


# ------------------------------------------------------------------------------------------------------------
# Files


LINES = b''.join(json.dumps(GOOD | dict(prompt=f'Q{i}')).encode() + b'\n' for i in range(500))
LIST = b'[' + LINES.replace(b'\n', b',')[:-1] + b']'
GZIP = gzip.compress(LINES)

FILES = [
    case('gzip cut short', 'a.jsonl.gz', GZIP[:-20], 'a.jsonl.gz: cannot be read beyond line', 'EOFError'),
    case('gzip damaged', 'a.jsonl.gz', GZIP[:99] + b'\xff' * 99 + GZIP[198:],
         'a.jsonl.gz: cannot be read beyond line'),
    case('gzip with a wrong checksum', 'a.jsonl.gz', GZIP[:-8] + b'\0' * 8, 'a.jsonl.gz: cannot be read',
         'CRC'),
    case('not gzip, but named so', 'a.jsonl.gz', LINES, 'a.jsonl.gz: cannot be read beyond line 0',
         'Not a gzipped file'),
    case('gzip, but not named so', 'a.jsonl', GZIP, 'a.jsonl line 1: not valid UTF-8'),
    case('byte-order mark', 'a.jsonl', b'\xef\xbb\xbf' + LINES,
         'a.jsonl line 1: not valid JSON (Unexpected UTF-8 BOM'),
    case('UTF-16', 'a.jsonl', LINES.decode().encode('utf-16'), 'a.jsonl line 1: not valid UTF-8'),
    case('line of 10 MB', 'a.jsonl', LINES[:100] + b'x' * 10**7,
         'longer than 8 MiB; one record per line expected'),
    case('line of 10 MB in gzip', 'a.jsonl.gz', gzip.compress(b' ' * 10**7, 1),
         'a.jsonl.gz line 1: longer than 8 MiB'),
    case('empty .jsonl', 'a.jsonl', b'', 'a.jsonl: no pair is left of 0 records'),
    case('blank lines alone', 'a.jsonl', b'\n \r\n\n', 'a.jsonl: no pair is left of 0 records'),
    case('empty .jsonl.gz', 'a.jsonl.gz', gzip.compress(b''), 'a.jsonl.gz: no pair is left of 0 records'),
    case('.jsonl that is a list', 'a.jsonl', LIST,
         'a.jsonl line 1: a record is an object with keys, not a list'),
    case('empty .json', 'a.json', b'',
         "a.json: a .json file must be one list of records, and this one begins ''"),
    case('.json with an empty list', 'a.json', b'[ ]', 'a.json: no pair is left of 0 records'),
    case('.json that is an object', 'a.json', b'{"data": []}',
         'a.json: a .json file must be one list of records'),
    case('.json with a record per line', 'a.json', LINES, 'one record per line is .jsonl'),
    case('.json with a byte-order mark', 'a.json', b'\xef\xbb\xbf' + LIST, 'must be one list of records',
         '\\ufeff'),
    case('.json cut in a record', 'a.json', LIST[:-9], 'a.json record 500: not valid JSON ('),
    case('.json cut after a record', 'a.json', LIST[:-1],
         'a.json record 501: not valid JSON (Expecting value)'),
    case('.json with a bad record', 'a.json', LIST.replace(b'"Q2"', b'Q2'),
         'a.json record 3: not valid JSON (Expecting value)'),
    case('.json with a key twice', 'a.json', LIST.replace(b'"chosen"', b'"prompt"', 1),
         "a.json record 1: the key 'prompt' stands"),
    case('.json with a number', 'a.json', b'[1]',
         'a.json record 1: a record is an object with keys, not a int'),
    case('.json of two lists', 'a.json', LIST + LIST,
         'a.json: goes on after the list has ended, with record 500'),
    case('.json that is not UTF-8', 'a.json', LIST.replace(b'Q2"', b'\xff"'),
         'a.json: cannot be read beyond record 0'),
    case('.json of brackets', 'a.json', b'[' * 100_000,
         'a.json record 1: not valid JSON (maximum recursion depth'),
    case('.json with a record of 10 MB', 'a.json', b'[{"a": "' + b'x' * 10**7 + b'"}]', 'a.json record 1:'),
    case('empty parquet', 'a.parquet', b'', 'a.parquet: cannot be read beyond record 0'),
    case('parquet that is none', 'a.parquet', LINES, 'a.parquet: cannot be read beyond record 0'),
    case('parquet with other columns', 'a.parquet', [dict(a='x', b='y')],
         "a.parquet record 1: no 'prompt'; the record's keys are 'a', 'b'"),
    case('parquet with a null', 'a.parquet', [GOOD, dict(GOOD, chosen=None)],
         "a.parquet record 2: 'chosen' is of type NoneType"),
    case('table of another kind', 'a.csv', b'prompt,chosen\n',
         'a.csv: neither a .jsonl, .jsonl.gz, .json, .parquet file'),
    case('nothing to compare', 'a.jsonl', [GOOD | dict(rejected='A')] * 3,
         'a.jsonl: no pair is left of 3 records; 3 dropped: chosen and rejected identical'),
]


@pytest.mark.parametrize('name, content, says', [case(c.id, *c.values[:2], c.values[2:]) for c in FILES])
def test_file(name, content, says, write, settings, tmp_path):
    path = write(name, content)
    with refused(tmp_path, *says):
        prepare.prepare(settings(path))
    assert not (tmp_path / 'data').exists() or not os.listdir(tmp_path / 'data')


def test_damaged_parquet(write, settings, tmp_path):
    path = write('a.parquet', [GOOD | dict(prompt=f'Q{i}' * 9) for i in range(2000)])
    whole = Path(path).read_bytes()
    for damaged in (whole[:-100], whole[:200] + b'\xff' * 2000 + whole[2200:]):
        write('a.parquet', damaged)
        with refused(tmp_path, 'a.parquet: cannot be read beyond record'):
            prepare.prepare(settings(path))


@pytest.mark.parametrize('changed, says', [
    case('no such file', dict(dataset='none.jsonl'), 'none.jsonl: no such file'),
    case('a folder, not of ours', dict(dataset='.'), '.: neither a .jsonl'),
    case('neither file nor hub', dict(dataset='pairs'), 'pairs: neither a .jsonl'),
    case('empty name', dict(dataset=''), ': neither a .jsonl'),
    case('split of a file', dict(split='test'), "split: 'test' is for data sets of the hub"),
    case('labels from scores that are not there', dict(label_from_scores=True),
         "a.jsonl line 1: 'chosen_score' and"),
    case('all too long', dict(max_length=3, max_prompt_length=2, truncation='drop', dataset='long.jsonl'),
         '2 dropped: a response did not fit'),
    case('all bad, and skipped', dict(bad_records='skip', dataset='bad.jsonl'),
         "1 dropped: bad records, the first of them bad.jsonl line 1: no 'chosen'"),
    case('unknown tokenizer', dict(tokenizer='gpt5'), "tokenizer: 'gpt5' is none of byte, "),
    case('data_dir that is a file', dict(data_dir='a.jsonl'), 'cannot be written (NotADirectoryError'),
])
def test_settings(changed, says, write, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write('a.jsonl', [GOOD])
    write('long.jsonl', [GOOD | dict(chosen='A' * 9)] * 2)
    write('bad.jsonl', [dict(prompt='Q')])
    with refused(tmp_path, says):
        prepare.prepare(settings('a.jsonl', **changed) if 'dataset' not in changed else settings(**changed))


def test_records_of_different_kinds_far_apart(write, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, 'CHUNK', 10)
    path = write('a.jsonl', [GOOD, dict(prompt='Q', chosen='A')])
    with refused(tmp_path, 'a.jsonl line 2: 1 responses, where the records before have 2'):
        prepare.prepare(settings(path))


def test_hub_errors(settings, tmp_path, monkeypatch):
    import datasets

    def fail(*args, **options):
        raise ConnectionError(*message)
    monkeypatch.setattr(datasets, 'get_dataset_split_names', fail)
    monkeypatch.setattr(datasets, 'load_dataset', fail)
    for message in ([], ['no\nroute']):
        with refused(tmp_path, 'someone/pairs: no such file, and the hub did not give it (ConnectionError'):
            prepare.prepare(settings('someone/pairs'))


# ------------------------------------------------------------------------------------------------------------
# A small world: two models, pairs prepared, a run that was finished


BASE = ['--dataset=a.jsonl', '--tokenizer=byte', '--max_length=64', '--max_prompt_length=32',
        '--val_fraction=0.3', '--init_from=tiny', '--out_dir=out', '--batch_size=4', '--tokens_per_batch=256',
        '--device=cpu']


@pytest.fixture(scope='module')
def first_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp('world')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pairs = [dict(prompt=f'question {i}', chosen=f' good {i}', rejected=f' bad {i}') for i in range(20)]
        singles = [dict(prompt=f'{i}', chosen='a') for i in range(20)]
        for name, records in (('a.jsonl', pairs), ('single.jsonl', singles)):
            Path(name).write_text(''.join(json.dumps(r) + '\n' for r in records))
        sizes = dict(tiny=(64, 257, 16), short=(32, 257, 16), other=(64, 1000, 16), wide=(64, 257, 32))
        for name, (context, vocab, d) in sizes.items():
            GPT(GPTConfig(context, vocab, 1, 2, d, eos_token_id=256)).save_pretrained(name)
        precision = torch.get_float32_matmul_precision()
        train.train(train.load_config([*BASE, '--max_iters=2']))
        torch.set_float32_matmul_precision(precision)
    return folder


@pytest.fixture
def world(first_world, tmp_path, monkeypatch):
    """A copy of it to spoil: the current folder."""
    shutil.copytree(first_world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    precision = torch.get_float32_matmul_precision()
    yield tmp_path
    torch.set_float32_matmul_precision(precision)


# ------------------------------------------------------------------------------------------------------------
# Prepared folders


def edit(path, change):
    """The file's bytes, as change(bytes) makes them."""
    Path(path).write_bytes(change(Path(path).read_bytes()))


def flip(path, at):
    edit(path, lambda b: b[:at] + bytes([b[at] ^ 1]) + b[at + 1:])


def edit_json(path, **changed):
    edit(path, lambda b: json.dumps(json.loads(b) | changed).encode())


@pytest.mark.parametrize('spoil, says', [
    case('tokens cut short', lambda d: edit(d / 'train.bin', lambda b: b[:-2]),
         'train.bin: missing, or changed'),
    case('a byte of the tokens flipped', lambda d: edit(d / 'train.bin', lambda b: bytes([b[0] ^ 1]) + b[1:]),
         'train.bin: missing, or'),
    case('tokens gone', lambda d: os.remove(d / 'train.bin'), 'train.bin: missing, or changed'),
    case('tokens emptied', lambda d: edit(d / 'train.bin', lambda b: b''), 'train.bin: missing, or changed'),
    case('table cut short', lambda d: edit(d / 'train.idx', lambda b: b[:-1]),
         'train.idx: missing, or changed'),
    case('splits swapped', lambda d: shutil.copy(d / 'val.idx', d / 'train.idx'),
         'train.idx: missing, or changed'),
    case('meta.json edited by hand', lambda d: edit_json(d / 'meta.json', n_vocab=50257),
         'meta.json: changed since'),
    case('meta.json of another tokenizer',
         lambda d: edit(d / 'meta.json', lambda b: b.replace(b'"byte"', b'"gpt2"')),
         'meta.json: changed since'),
    case('meta.json of another format', lambda d: edit_json(d / 'meta.json', format=99),
         'format 99, this version reads'),
    case('meta.json cut short', lambda d: edit(d / 'meta.json', lambda b: b[:50]),
         'meta.json: not the meta.json of prepared data'),
    case('meta.json empty', lambda d: edit(d / 'meta.json', lambda b: b''),
         'meta.json: not the meta.json of prepared data'),
    case('meta.json that is a list', lambda d: edit(d / 'meta.json', lambda b: b'[]'),
         'meta.json: not the meta.json of prepared'),
    case('meta.json of something else', lambda d: edit(d / 'meta.json', lambda b: b'{}'),
         'meta.json: not the meta.json of prepared'),
    case('meta.json that is not text', lambda d: edit(d / 'meta.json', lambda b: b'\xff'),
         'meta.json: not the meta.json of prepared'),
    case('meta.json gone', lambda d: os.remove(d / 'meta.json'),
         'meta.json: not the meta.json of prepared data'),
])
def test_prepared_data(spoil, says, world):
    folder = next((world / 'data').glob('a-*'))
    spoil(folder)
    with refused(world, str(folder), says):
        Pairs(str(folder), 'train')


# ------------------------------------------------------------------------------------------------------------
# Config files and command lines


@pytest.mark.parametrize('text, says', [
    case('misspelt key', 'bata = 0.1', "c.py: 'bata' is not a name of the config; 'beta' is"),
    case('helper that is no field', 'zzzz = 3', "c.py: 'zzzz' is not a name of the config"),
    case('string for a number', "beta = '0.1'", "c.py: beta = '0.1' is not of type float or None"),
    case('float for an int', 'batch_size = 8.0', 'c.py: batch_size = 8.0 is not of type int'),
    case('bool for an int', 'seed = True', 'c.py: seed = True is not of type int'),
    case('int for a bool', 'resume = 1', 'c.py: resume = 1 is not of type bool'),
    case('None for a number', 'learning_rate = None', 'c.py: learning_rate = None is not of type float'),
    case('NaN', "learning_rate = float('nan')", 'c.py: learning_rate = nan is not of type float'),
    case('a list', 'dataset = []', 'c.py: dataset = [] is not of type str'),
    case('syntax error', 'seed = 1\nbeta = = 2', 'c.py line 2: SyntaxError: invalid syntax'),
    case('unknown name', 'seed = 1\n\nbeta = x', "c.py line 3: NameError: name 'x' is not defined"),
    case('error of several lines', "raise ValueError('one\\ntwo')", 'c.py line 1: ValueError: one'),
    case('error in a module that it calls', "import json\n\njson.loads('')", 'c.py line 3: JSONDecodeError'),
    case('import that fails', 'import no_such_module', 'c.py line 1: ModuleNotFoundError'),
    case('integer beyond any float', 'beta = 10**400', 'c.py: beta = '),
    case('value out of range', 'batch_size = 0', 'batch_size: 0 is less than 1'),
])
def test_config_file(text, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('c.py').write_text(text)
    with refused(tmp_path, says):
        train.load_config(['c.py'])


@pytest.mark.parametrize('argv, says', [
    case('misspelt name', ['--lerning_rate=1'],
         "command line: 'lerning_rate' is not a name of the config; 'learning_rate' is"),
    case('name without a value', ['--beta'], "command line: '--beta' is not of the form --name=value"),
    case('one dash', ['-beta=1'], "command line: '-beta=1' is not of the form --name=value"),
    case('two configs', ['c.py', 'c.py'], "command line: 'c.py' is not of the form --name=value"),
    case('missing config file', ['none.py'], 'none.py: no such config file'),
    case('word for a number', ['--batch_size=many'], "command line: batch_size = 'many' is not of type int"),
    case('word for a bool', ['--resume=yes'], "command line: resume = 'yes' is not of type bool"),
    case('nothing for a number', ['--seed='], "command line: seed = '' is not of type int"),
    case('infinity', ['--beta=1e999'], 'command line: beta = inf is not of type float or None'),
    case('set that cannot be', ['--beta={[]: 1}'], 'command line: beta = '),
    case('nested without end', ['--beta=' + '-' * 50_000 + '1'], 'command line: beta = '),
    case('integer beyond any float', ['--beta=1' + '0' * 400], 'command line: beta = '),
    case('unknown objective', ['--loss=ppo'], "loss: 'ppo' is not one of 'sft', 'dpo'"),
    case('unknown schedule', ['--schedule=step'], "schedule: 'step' is not one of"),
    case('unknown truncation', ['--truncation=keep'], "truncation: 'keep' is not one of"),
    case('unknown template', ['--template=llama'], "template: 'llama' is not one of"),
    case('unknown reference', ['--reference=none'], "reference: 'none' is not one of"),
    case('unknown precision', ['--dtype=float16'], "dtype: 'float16' is not one of"),
    case('batch of none', ['--batch_size=0'], 'batch_size: 0 is less than 1'),
    case('learning rate below 0', ['--learning_rate=-1e-6'], 'learning_rate: -1e-06 is less than 0'),
    case('val_fraction above 1', ['--val_fraction=1.5'], 'val_fraction: 1.5 is not between 0 and 1'),
    case('label_smoothing above a half', ['--label_smoothing=0.6'],
         'label_smoothing: 0.6 is not between 0 and 0.5'),
    case('momentum of 1', ['--beta1=1.0'], 'beta1: 1.0'),
    case('seed too large', [f'--seed={2**70}'], 'seed: '),
    case('beta of 0', ['--beta=0'], 'beta: 0'),
    case('heads that do not divide the width', ['--init_from=scratch', '--n_embd=16', '--n_head=3'],
         'n_head: 3'),
    case('prompt that fills max_length', ['--max_length=256'],
         'max_prompt_length: 256 leaves no room for a response'),
    case('max_iters and epochs', ['--max_iters=5', '--epochs=1'], 'max_iters, epochs: give one of the two'),
    case('gamma with dpo', ['--gamma=0.5'], "gamma: ignored with loss = 'dpo'"),
    case('beta with sft', ['--loss=sft', '--beta=0.5'], "beta: ignored with loss = 'sft'"),
    case('label_smoothing with sft', ['--loss=sft', '--label_smoothing=0.1'],
         "label_smoothing: ignored with loss = 'sft'"),
    case('reference with simpo', ['--loss=simpo', '--reference=live'],
         "reference: ignored with loss = 'simpo'"),
    case('layers of a model that has its own', ['--n_layer=3'], "n_layer: ignored with init_from = 'gpt2'"),
])
def test_command_line(argv, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('c.py').write_text('')
    with refused(tmp_path, says):
        train.load_config(argv)


@pytest.mark.parametrize('argv, says', [
    case('nothing', [], 'usage: python prepare.py CONFIG_OR_SOURCE'),
    case('options alone', ['--show=3'], 'usage: python prepare.py'),
    case('a word to show', ['a.jsonl', '--show=all'], '--show=all is not a number'),
    case('missing file', ['none.jsonl', '--show=1'], 'none.jsonl: no such file'),
    case('bad record shown', ['bad.jsonl', '--show=1', '--tokenizer=byte'], "bad.jsonl line 1: no 'chosen'"),
])
def test_prepare_command(argv, says, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write('bad.jsonl', [dict(prompt='Q')])
    with refused(tmp_path, says):
        prepare.main(argv)


# ------------------------------------------------------------------------------------------------------------
# Models and checkpoints


def edit_tensors(path, change):
    from safetensors.torch import load_file, save_file
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def reshape(tensors):
    tensors['transformer.wpe.weight'] = torch.zeros(64, 8)


def add(tensors):
    tensors['transformer.h.0.extra.weight'] = torch.zeros(3)


def plant(path):
    """A checkpoint that, unpickled, would write a file."""
    class Plant:
        def __reduce__(self):
            return os.mkdir, (str(path) + '-was-run',)
    Path(path).write_bytes(pickle.dumps(dict(model=Plant(), model_config={}, config={})))


def plant_zip(path):
    class Plant:
        def __reduce__(self):
            return os.mkdir, (str(path) + '-was-run',)
    torch.save(dict(model=Plant(), model_config={}, config={}), path)


def edit_checkpoint(path, **changed):
    torch.save(torch.load(path, weights_only=True) | changed, path)


CONFIG_JSON, WEIGHTS = 'tiny/config.json', 'tiny/model.safetensors'

MODELS = [
    case('nothing there', lambda: None, './none', 'no such file or folder'),
    case('run that was never made', lambda: None, 'out/none', 'out/none: no such file or folder'),
    case('folder without config.json', lambda: os.remove(CONFIG_JSON), 'tiny',
         'neither a model folder (config.json) nor'),
    case('folder without weights', lambda: os.remove(WEIGHTS), 'tiny',
         'tiny: no model.safetensors or pytorch_model.bin'),
    case('config.json cut short', lambda: edit(CONFIG_JSON, lambda b: b[:20]), 'tiny',
         'config.json: not valid JSON'),
    case('config.json not UTF-8', lambda: edit(CONFIG_JSON, lambda b: b'\xff'), 'tiny',
         'config.json: not valid JSON'),
    case('config.json that is a list', lambda: edit(CONFIG_JSON, lambda b: b'[]'), 'tiny', "config.json: no 'n_embd'"),
    case('other model_type', lambda: edit_json(CONFIG_JSON, model_type='llama'), 'tiny',
         "model_type is 'llama'"),
    case('other activation', lambda: edit_json(CONFIG_JSON, activation_function='relu'), 'tiny',
         "activation_function is 'relu'"),
    case('config.json without n_embd', lambda: edit(CONFIG_JSON, lambda b: b.replace(b'n_embd', b'hidden')),
         'tiny', 'n_embd'),
    case('config.json without vocab_size', lambda: edit(CONFIG_JSON, lambda b: b.replace(b'vocab_', b'')),
         'tiny', "no 'vocab_size'"),
    case('layers in words', lambda: edit_json(CONFIG_JSON, n_layer='1'), 'tiny', "tiny: n_layer is '1', not a number"),
    case('no heads', lambda: edit_json(CONFIG_JSON, n_head=0), 'tiny', 'tiny: n_head is 0, not a number of 1 or more'),
    case('heads that do not divide', lambda: edit_json(CONFIG_JSON, n_head=3), 'tiny',
         'tiny: n_head: 3 does not divide n_embd 16'),
    case('more layers than there are', lambda: edit_json(CONFIG_JSON, n_layer=2), 'tiny',
         'no tensor h.1.ln_1.weight'),
    case('no layers', lambda: edit_json(CONFIG_JSON, n_layer=0), 'tiny', 'n_layer is 0'),
    case('longer context than there is', lambda: edit_json(CONFIG_JSON, n_positions=99), 'tiny',
         'wpe.weight has shape (64, 16), expected (99, 16)'),
    case('missing tensor', lambda: edit_tensors(WEIGHTS, lambda t: t.pop('transformer.ln_f.bias')), 'tiny',
         'no tensor ln_f.bias'),
    case('surplus tensor', lambda: edit_tensors(WEIGHTS, add), 'tiny',
         "tensor h.0.extra.weight is not one of GPT-2's"),
    case('wrong-shaped tensor', lambda: edit_tensors(WEIGHTS, reshape), 'tiny',
         'wpe.weight has shape (64, 8), expected (64, 16)'),
    case('safetensors cut short', lambda: edit(WEIGHTS, lambda b: b[:-100]), 'tiny',
         'model.safetensors: not a whole model file'),
    case('safetensors empty', lambda: edit(WEIGHTS, lambda b: b''), 'tiny',
         'model.safetensors: not a whole model file'),
    case('safetensors of another kind', lambda: edit(WEIGHTS, lambda b: LINES), 'tiny',
         'model.safetensors: not a whole model file'),
    case('safetensors with a huge header', lambda: edit(WEIGHTS, lambda b: struct.pack('<Q', 2**60) + b),
         'tiny', 'not a whole model file'),
    case('shards without a map',
         lambda: os.rename(WEIGHTS, 'tiny/x') or Path(WEIGHTS + '.index.json').write_text('{}'), 'tiny',
         'tiny/model.safetensors.index.json: no weight_map'),
    case('shard missing', lambda: os.rename(WEIGHTS, 'tiny/x') or Path(WEIGHTS + '.index.json').write_text(
        '{"weight_map": {"transformer.wte.weight": "part-1.safetensors"}}'), 'tiny',
         'part-1.safetensors: no such file'),
    case('checkpoint cut short', lambda: edit('out/ckpt.pt', lambda b: b[:5000]), 'out',
         'out/ckpt.pt: not a whole model file'),
    case('checkpoint empty', lambda: edit('out/ckpt.pt', lambda b: b''), 'out',
         'out/ckpt.pt: not a whole model file'),
    case('checkpoint that is text', lambda: edit('out/ckpt.pt', lambda b: LINES), 'out',
         'out/ckpt.pt: not a whole model file'),
    case('checkpoint of something else', lambda: torch.save([1], 'out/ckpt.pt'), 'out',
         'out/ckpt.pt: not a model file but a list'),
    case('checkpoint of another shape', lambda: edit_checkpoint('out/ckpt.pt', model_config=dict(
        block_size=64, vocab_size=257, n_layer=1, n_head=2, n_embd=32, eos_token_id=256)), 'out',
         'tensor wte.weight has shape (257, 16), expected (257, 32)'),
    case('checkpoint with other settings',
         lambda: edit_checkpoint('out/ckpt.pt', model_config=dict(layers=3)), 'out',
         "out/ckpt.pt: GPTConfig.__init__() got an unexpected keyword argument 'layers'"),
    case('checkpoint without tensors', lambda: edit_checkpoint('out/ckpt.pt', model=dict(a=1)), 'out',
         'out/ckpt.pt: no tensor wte.weight'),
    case('a pickle planted as a checkpoint', lambda: plant('out/ckpt.pt'), 'out',
         'out/ckpt.pt: not a whole model file'),
    case('a pickle planted in a checkpoint', lambda: plant_zip('out/ckpt.pt'), 'out',
         'out/ckpt.pt: not a whole model file'),
]


@pytest.mark.parametrize('spoil, name, says', MODELS)
def test_model(spoil, name, says, world):
    spoil()
    with refused(world, says):
        GPT.from_pretrained(name)
    assert not os.path.exists('out/ckpt.pt-was-run')


# ------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize('argv, says', [
    case('out_dir holds a run', [], 'out_dir: out holds a run; --resume=True goes on with it'),
    case('out_dir is a file', ['--out_dir=a.jsonl'], 'out_dir: a.jsonl cannot be written'),
    case('out_dir below a file', ['--out_dir=a.jsonl/x'], 'out_dir: a.jsonl/x cannot be written'),
    case('nothing to resume', ['--out_dir=new', '--resume=True'], 'resume: there is no new/ckpt.pt'),
    case('resumed on other data', ['--resume=True', '--val_fraction=0.5', '--loss=simpo'],
         'is not the data that out/ckpt.pt was trained on'),
    case('resumed with another shape', ['--resume=True', '--init_from=wide'],
         'out/ckpt.pt: a model of another shape than wide'),
    case('missing model', ['--out_dir=new', '--init_from=out/none'], 'out/none: no such file or folder'),
    case('missing init_config', ['--out_dir=new', '--init_from=out/none', '--init_config=none.py'],
         'none.py: no such config file'),
    case('context too short', ['--out_dir=new', '--init_from=short'],
         'max_length: 64 exceeds the context of short, 32'),
    case('tokenizer of another model', ['--out_dir=new', '--init_from=other'],
         "tokenizer: 'byte' has 257 tokens, and other was made for 1000"),
    case('pair too long for a micro-batch', ['--out_dir=new', '--tokens_per_batch=16'],
         'tokens_per_batch: 16 is less than the longest pair'),
    case('nothing to compare', ['--out_dir=new', '--dataset=single.jsonl'],
         "single.jsonl has 1 responses to a prompt; loss = 'dpo'"),
    case('no pair to train on', ['--out_dir=new', '--val_fraction=1.0'],
         'val_fraction: 1.0 leaves no pair to train on'),
    case('no pair to evaluate', ['--out_dir=new', '--val_fraction=0.0', '--eval_only=True'],
         'val_fraction: 0.0 leaves no pair to evaluate'),
    case('prepared otherwise', ['--out_dir=new', '--dataset=DATA', '--max_length=63'],
         'max_length: 63, but data/a-'),
    case('no such device', ['--out_dir=new', '--device=tpu'], "device: 'tpu' is not to be had here"),
])
def test_run(argv, says, world):
    data = next(Path('data').glob('a-*'))
    cfg = train.load_config([*BASE, *(arg.replace('DATA', str(data)) for arg in argv)])
    prepare.prepare(cfg)    # before the snapshot: pairs may be prepared before it turns out what does not fit
    with refused(world, says):
        train.train(cfg)
    assert not os.path.exists('new')


@pytest.mark.parametrize('spoil, says', [
    case('best.pt in place of ckpt.pt', lambda: shutil.copy('out/best.pt', 'out/ckpt.pt'),
         'out/ckpt.pt: not a whole checkpoint, but weights alone'),
    case('log.jsonl gone', lambda: os.remove('out/log.jsonl'), 'out/log.jsonl: missing, and resume goes on'),
    case('ckpt.pt cut short', lambda: edit('out/ckpt.pt', lambda b: b[:5000]),
         'out/ckpt.pt: not a whole model file'),
    case('a bit of a weight in ckpt.pt flipped', lambda: flip('out/ckpt.pt', 3000),
         'out/ckpt.pt: not a whole model file (damaged:'),
    case('the log cut short', lambda: edit('out/log.jsonl', lambda b: b[:-1]),
         'out/log.jsonl: shorter than when out/ckpt.pt was written'),
    case('the data changed under the run', lambda: flip(next(Path('data').glob('a-*/train.bin')), 0),
         'train.bin: missing, or changed since it was prepared'),
    case('a step that is a word', lambda: edit_checkpoint('out/ckpt.pt', step='3'), 'not a whole checkpoint'),
    case('an optimizer of another model', lambda: edit_checkpoint('out/ckpt.pt', optimizer=dict(
        state={}, param_groups=[])), 'out/ckpt.pt: does not fit the model (loaded state dict has a different'),
])
def test_resume(spoil, says, world):
    spoil()
    with refused(world, says):
        train.train(train.load_config([*BASE, '--resume=True', '--max_iters=2']))


def test_resume_with_fewer_steps_than_were_taken(world, monkeypatch):
    monkeypatch.setattr(train, 'learning_rate', lambda step, cfg: pytest.fail('goes on') if step > 5 else 0.0)
    with refused(world, 'max_iters: 1'):
        train.train(train.load_config([*BASE, '--resume=True', '--max_iters=1']))


# ------------------------------------------------------------------------------------------------------------
# From end to end: exit code 1, and one line that begins with 'error: '


COMMANDS = {
    'bad record': (['prepare.py', 'bad.jsonl', '--tokenizer=byte'],
                   "error: bad.jsonl line 1: no 'chosen'; the record's keys are 'prompt'"),
    'out_dir in use': (['train.py', *BASE, '--overwrite=True'],
                       'error: out_dir: out is in use by another run (process 123)'),
    'planted pickle': (['train.py', *BASE, '--init_from=planted', '--out_dir=new'],
                       'error: planted/ckpt.pt: not a whole model file'),
}


@pytest.fixture(scope='module')
def commands(first_world, tmp_path_factory):
    """{name: (folder, files before, process)}: all run side by side, as most of the time is loading torch."""
    running = {}
    with contextlib.ExitStack() as stack:
        for name, (argv, _) in COMMANDS.items():
            folder = tmp_path_factory.mktemp('command') / 'world'
            shutil.copytree(first_world, folder)
            (folder / 'bad.jsonl').write_text('{"prompt": "Q"}\n')
            (folder / 'planted').mkdir()
            plant(folder / 'planted' / 'ckpt.pt')
            (folder / 'out' / 'lock').write_text('123')
            lock = stack.enter_context(open(folder / 'out' / 'lock'))
            fcntl.flock(lock, fcntl.LOCK_EX)             # this process is the other run
            before = snapshot(folder)
            running[name] = folder, before, subprocess.Popen(
                [sys.executable, str(ROOT / argv[0]), *argv[1:]], cwd=folder, stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL, text=True)
        for _, _, process in running.values():
            process.errors = process.communicate(timeout=120)[1]
    return running


@pytest.mark.parametrize('name', COMMANDS)
def test_command(name, commands):
    folder, before, process = commands[name]
    line, = process.errors.splitlines()
    assert line.startswith(COMMANDS[name][1]) and process.returncode == 1
    assert snapshot(folder) == before
    assert not (folder / 'planted' / 'ckpt.pt-was-run').exists()
