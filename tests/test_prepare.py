"""
prepare.py: every shape of record and every format of file, lengths, the split, the cache, the
files written and read back, and what is said of bad input.

    python -m pytest tests/test_prepare.py -k record

The hub is a stand-in. A test that reads real data skips where its folder is absent (NANOPREF_DATA
names another one). Left out: tokenizers and chat templates, which are in test_tokenizer.py.
"""
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings as examples, strategies as st

import prepare
from configurator import InputError, configure
from prepare import Data, Pairs, encode_chunk, parse, read_record, read_source, tokenize
from tokenizer import END, Tokenizer, get_tokenizer

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get('NANOPREF_DATA', ROOT.parent / 'shared' / 'data'))
PAIRS = [dict(prompt=f'question {i}?', chosen=f' good {i * i}', rejected=f' bad {i}')
         for i in range(40)]
GOOD = dict(prompt='Q', chosen='A', rejected='B')


def read_back(folder):
    """Prepared bytes as text: [(id, prompt, [response, ...]), ...]; an end of text is END."""
    pairs, decode = Pairs(folder), get_tokenizer('byte').decode
    return [(int(pairs.table['id'][i]), decode(pairs[i][0]), [decode(r) for r in pairs[i][1]])
            for i in range(len(pairs.table))]


def as_written(records):
    return [(i, r['prompt'], [r[key] + END for key in ('chosen', 'rejected') if key in r])
            for i, r in enumerate(records)]


def files_of(folder):
    return {str(path): path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}


def refused(cfg, *parts):
    """prepare(cfg) must raise one line that holds every one of `parts`, and write no file."""
    before = files_of(Path(cfg.data_dir).parent)
    with pytest.raises(InputError) as caught:
        prepare.prepare(cfg)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert '\n' not in message and len(message) < 700
    assert files_of(Path(cfg.data_dir).parent) == before
    assert not os.path.isdir(cfg.data_dir) or os.listdir(cfg.data_dir) == []


# --------------------------------------------------------------------------------------------------
# Records


def message(role, content):
    return dict(role=role, content=content)


SYSTEM, USER = message('system', 'Be kind.'), message('user', 'Hi')
YES, NO = message('assistant', 'Hello!'), message('assistant', 'Go away.')
HI = '\n\nHuman: Hi\n\nAssistant:'

SHAPES = {
    'strings, byte for byte': (
        dict(prompt=' \tA\r\nQ: é\u2028?  ', chosen='\n yes\x00 ', rejected='no\n\n'),
        ' \tA\r\nQ: é\u2028?  ', ['\n yes\x00 ', 'no\n\n']),
    'strings that look like transcripts': (
        dict(prompt=HI, chosen=f' a{HI} b', rejected=' c'), HI, [f' a{HI} b', ' c']),
    'keys that are of no concern': (GOOD | dict(source=[1, {}], messages=None), 'Q', ['A', 'B']),
    'transcripts': (dict(chosen=HI + ' Hello!', rejected=HI + ' Go.'), HI, [' Hello!', ' Go.']),
    'transcripts of two turns': (
        dict(chosen=HI + ' Yes?' + HI + ' A', rejected=HI + ' Yes?' + HI + ' B'),
        HI + ' Yes?' + HI, [' A', ' B']),
    'transcripts whose answers begin alike': (
        dict(chosen=HI + ' Hello!', rejected=HI + ' Hell no.'), HI, [' Hello!', ' Hell no.']),
    'chats': (dict(chosen=[USER, YES], rejected=[USER, NO]), [USER], [[YES], [NO]]),
    'chats of several turns': (
        dict(chosen=[SYSTEM, USER, NO, USER, YES], rejected=[SYSTEM, USER, NO, USER, NO]),
        [SYSTEM, USER, NO, USER], [[YES], [NO]]),
    'chats that differ early': (
        dict(chosen=[USER, YES, USER, YES], rejected=[USER, NO]), [USER], [[YES, USER, YES], [NO]]),
    'chats after a prompt of messages': (
        dict(prompt=[SYSTEM, USER], chosen=[YES], rejected=[NO]), [SYSTEM, USER], [[YES], [NO]]),
    'chats that repeat a prompt of messages': (
        dict(prompt=[USER], chosen=[USER, YES], rejected=[USER, NO]), [USER], [[YES], [NO]]),
    'chats after a prompt of text': (
        dict(prompt='Hi', chosen=[YES], rejected=[NO]), [USER], [[YES], [NO]]),
    'chats that repeat a prompt of text': (
        dict(prompt='Hi', chosen=[SYSTEM, USER, YES], rejected=[SYSTEM, USER, NO]),
        [SYSTEM, USER], [[YES], [NO]]),
    'columns of UltraFeedback': (
        dict(prompt='Hi', prompt_id='5e', messages=[USER, YES], chosen=[USER, YES],
             rejected=[USER, NO], score_chosen=8.0, score_rejected=7.5), [USER], [[YES], [NO]]),
    'messages, answers of text': (
        dict(messages=[SYSTEM, USER], chosen='Hello!', rejected='Go away.'),
        [SYSTEM, USER], [[YES], [NO]]),
    'ShareGPT': (
        {'conversations': [{'from': 'human', 'value': 'Hi'}],
         'chosen': {'from': 'gpt', 'value': 'Hello!'},
         'rejected': {'from': 'gpt', 'value': 'Go away.'}}, [USER], [[YES], [NO]]),
    'Alpaca': (dict(instruction='Add.', input='1 + 1', chosen='Hello!', rejected='Go away.'),
               [message('user', 'Add.\n1 + 1')], [[YES], [NO]]),
    'Alpaca without input': (
        dict(instruction='Hi', input='', output='', chosen='Hello!', rejected='Go away.'),
        [USER], [[YES], [NO]]),
    'question and j, k': (
        dict(question='Hi', response_j='Hello!', response_k='Go away.'), [USER], [[YES], [NO]]),
    'prompt and j, k': (dict(prompt='Q', response_j='A', response_k='B'), 'Q', ['A', 'B']),
    'AlpacaEval': (
        dict(instruction='Hi', output_1='Go away.', output_2='Hello!', preference=2.0),
        [USER], [[YES], [NO]]),
    'ranking': (dict(prompt='Q', responses=['A', 'B', 'C']), 'Q', ['A', 'B', 'C']),
    'ranking by scores': (
        dict(prompt='Q', responses=list('ABCD'), scores=[1, 3, 2.5, 3]), 'Q', list('BDCA')),
    'ranking of chats': (
        dict(prompt=[USER], responses=['Hello!', [NO]]), [USER], [[YES], [NO]]),
    'no comparison': (dict(prompt='Q', chosen='A'), 'Q', ['A']),
    'no comparison, Alpaca': (dict(instruction='Hi', chosen='Hello!'), [USER], [[YES]]),
    'no comparison, messages': (dict(messages=[SYSTEM, USER, YES]), [SYSTEM, USER], [[YES]]),
    'no comparison, UltraChat': (
        dict(prompt='Hi', messages=[USER, NO, USER, YES]), [USER, NO, USER], [[YES]]),
}


@pytest.mark.parametrize('name', SHAPES)
def test_record(name):
    record, prompt, responses = SHAPES[name]
    assert read_record(record)[:2] == (prompt, responses)


@pytest.mark.parametrize('name', SHAPES)
def test_template_chat_changes_only_prompts_of_text_before_answers_of_text(name):
    record, prompt, responses = SHAPES[name]
    if isinstance(prompt, str) and 'prompt' in record:
        prompt = [message('user', prompt)]
        responses = [[message('assistant', r)] for r in responses]
    assert read_record(record, 'chat')[:2] == (prompt, responses)


def test_numbers_of_a_record():
    assert read_record(GOOD)[2:] == (dict(p=1.0, margin=0.0), [])
    assert read_record(GOOD | dict(p=0.25, margin=-2))[2] == dict(p=0.25, margin=-2.0)
    assert read_record(GOOD | dict(p='0.25', margin=None))[2] == dict(p=0.25, margin=0.0)  # CSV
    outputs = dict(instruction='Hi', output_1='1', output_2='2')
    for preference, p, best in ((1, 1.0, '1'), (1.25, 0.75, '1'), (1.75, 0.75, '2'), (2, 1.0, '2')):
        _, responses, numbers, _ = read_record(outputs | dict(preference=preference))
        assert numbers['p'] == p and responses[0] == [message('assistant', best)]


def test_labels_from_scores():
    scored = GOOD | dict(chosen_score=2, rejected_score=0.5)
    assert read_record(scored)[2]['p'] == 1.0              # scores alone change no label
    other_names = GOOD | dict(score_chosen='2', score_rejected='0.5')
    for record in (scored, other_names):
        p = read_record(record, label_from_scores=True)[2]['p']
        assert p == pytest.approx(1 / (1 + np.exp(-1.5)))
    for high in (5000, 1e38):                              # no overflow on either side
        p, q = (read_record(GOOD | dict(chosen_score=a, rejected_score=-a), '', True)[2]['p']
                for a in (high, -high))
        assert p == 1.0 and 0 <= q < 1e-300
    assert read_record(GOOD | dict(chosen_score=0, rejected_score=1))[3] == [
        'records whose rejected response has the higher score']


def test_transcripts_that_differ_early_or_end_blank_are_kept_and_counted():
    early = ' A\n\nHuman: B\n\nAssistant: C', ' D\n\nHuman: E\n\nAssistant: F'
    prompt, responses, _, notes = read_record(dict(chosen=HI + early[0], rejected=HI + early[1]))
    assert (prompt, responses) == (HI, list(early))
    assert notes == ['transcripts that differ before their last turn']
    prompt, responses, _, notes = read_record(dict(chosen=HI + ' Yes.', rejected=HI))
    assert (prompt, responses) == (HI, [' Yes.', ''])
    assert notes == ['transcripts with a blank last turn']


BAD = {   # the second line of a file whose first is good -> what the message says of it
    'cut short': (b'{"prompt": ', 'not valid JSON'),
    'not UTF-8': (b'{"prompt": "\xff"}', 'not valid JSON in UTF-8'),
    'brackets without end': (b'[' * 100_000, 'not valid JSON'),
    'a list': (b'[{}]', 'not a list'),
    'null': (b'null', 'not a NoneType'),
    'no key': ({}, 'no shape fits the keys none'),
    'unknown keys': (dict(text='x', label=1), "no shape fits the keys 'text', 'label'"),
    'very many keys': ({f'k\n{i}' * 99: i for i in range(999)}, 'no shape fits the keys'),
    'chosen alone': (dict(chosen='A'), "no shape fits the keys 'chosen'"),
    'no chosen': (dict(prompt='Q', rejected='B'), 'chosen'),
    'no rejected': (GOOD | dict(rejected=None), '1 responses, where the records before have 2'),
    'three responses': (dict(prompt='Q', responses=['A', 'B', 'C']), '3 responses, where'),
    'blank prompt': (GOOD | dict(prompt=' \n\t'), "'prompt' is empty or blank"),
    'blank rejected': (GOOD | dict(rejected='\u3000 '), "'rejected' is empty or blank"),
    'blank instruction': (dict(instruction=' ', chosen='A'), "'instruction' is empty or blank"),
    'blank in a ranking': (dict(prompt='Q', responses=['A', '']), "'responses' is empty or blank"),
    'number for a prompt': (GOOD | dict(prompt=3), "'prompt' is of type int, not a string"),
    'number for a response': (GOOD | dict(rejected=3), "'rejected'"),
    'list of text for a response': (GOOD | dict(chosen=['A'], rejected=['B']), "'chosen'"),
    'ranking of none': (dict(prompt='Q', responses=[]), "'responses' is []"),
    'ranking that is text': (dict(prompt='Q', responses='A'), "'responses' is 'A'"),
    'lone surrogate': (GOOD | dict(prompt='a\ud800'), 'surrogate'),
    'lone surrogate in a chat': (
        dict(prompt=[USER], chosen=[YES], rejected=[message('assistant', '\udfff')]), 'surrogate'),
    'transcripts that share nothing': (
        dict(chosen='\n\nHuman: a', rejected='\n\nHuman: b'), "'Assistant:'"),
    'blank transcript': (dict(chosen=' ', rejected=HI), "'chosen' is empty or blank"),
    'unknown role': (dict(prompt='Q', chosen=[message('tool', 'A')], rejected=[NO]), "'tool'"),
    'role that is a list': (dict(prompt='Q', chosen=[YES], rejected=[message(['user'], 'B')]),
                            "'rejected': a message needs a role"),
    'no role': (dict(prompt='Q', chosen=[dict(content='A')], rejected=[NO]), 'not None'),
    'content that is a list': (dict(prompt='Q', chosen=[message('user', [])], rejected=[NO]),
                               "'chosen': a message needs"),
    'number for a message': (dict(prompt=[3], chosen=[YES], rejected=[NO]), "'prompt': a message"),
    'chat that ends with the user': (
        dict(chosen=[USER, YES], rejected=[USER, NO, USER]), "assistant's message"),
    'chat without an answer': (
        dict(prompt=[USER], chosen=[USER], rejected=[USER, NO]), "assistant's message"),
    'chat with a blank answer': (
        dict(chosen=[USER, message('assistant', ' ')], rejected=[USER, NO]), 'blank'),
    'chats without a prompt': (dict(chosen=[YES], rejected=[NO]), 'prompt'),
    'chats without a message': (dict(prompt=[], chosen=[], rejected=[]), 'message'),
    'messages of none': (dict(messages=[]), 'message'),
    'p above 1': (GOOD | dict(p=1.5), "'p' is 1.5, not a number from 0 to 1"),
    'p that is no number': (GOOD | dict(p=float('nan')), "'p' is nan"),
    'p of 400 digits': (GOOD | dict(p=10**400), "'p' is 1000"),
    'margin beyond float32': (GOOD | dict(margin=1e300), "'margin' is 1e+300"),
    'infinite score': (GOOD | dict(chosen_score=1, rejected_score=float('-inf')),
                       "'rejected_score' is -inf, not a number"),
    'score that is a list': (GOOD | dict(score_chosen=[1]), "'score_chosen' is [1]"),
    'one score': (GOOD | dict(chosen_score=1), "'rejected_score' go together"),
    'scores of another number': (dict(prompt='Q', responses=['A', 'B'], scores=[1]), "'scores'"),
    'preference of 3': (dict(prompt='Q', output_1='A', output_2='B', preference=3),
                        "'preference' is 3, not a number from 1 to 2"),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_record_is_named_or_skipped_and_counted(name, write, settings, capsys):
    record, says = BAD[name]
    line = record if isinstance(record, bytes) else json.dumps(record).encode()
    good = json.dumps(GOOD).encode()
    path = write('bad.jsonl', b'\n'.join([good, line, good]))
    refused(settings(path), 'bad.jsonl line 2: ', says)
    folder = prepare.prepare(settings(path, bad_records='skip'))
    assert [i for i, *_ in read_back(folder)] == [0, 2]    # numbers count the source's records
    assert ' 1 dropped: bad records' in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Files and the hub


@pytest.mark.parametrize('ending', ['jsonl', 'jsonl.gz', 'json', 'csv', 'tsv', 'parquet'])
def test_every_format_says_the_same(ending, write, settings):
    records = PAIRS + [dict(prompt='a "b", c', chosen='é\tü', rejected='\n 😀\n')]
    folder = prepare.prepare(settings(write(f'a.{ending}', records)))
    assert read_back(folder) == as_written(records)


def test_a_table_saved_by_a_spreadsheet(write, settings):
    """Excel writes a byte-order mark and \\r\\n; a cell may have line breaks; numbers are text."""
    text = '\ufeffprompt,chosen,rejected,p\r\n"Q\r\nR",A,B,0.75\r\nS,C,D,\r\n'
    folder = prepare.prepare(settings(write('a.csv', text.encode())))
    assert read_back(folder) == [(0, 'Q\r\nR', ['A' + END, 'B' + END]),
                                 (1, 'S', ['C' + END, 'D' + END])]
    assert Pairs(folder).table['p'].tolist() == [0.75, 1.0]
    path = write('b.csv', 'prompt,chosen,rejected\nQ,A,B\n"R\nS",,D\n')
    refused(settings(path, data_dir=folder + '2'), 'b.csv line 4: ')


def test_blank_lines_line_ends_and_gzip_members(write, settings):
    first, second = (json.dumps(r).encode() for r in PAIRS[:2])
    for name, content in (('a.jsonl', b'\r\n'.join([b'', first, b'  ', second])),
                          ('b.jsonl.gz', gzip.compress(first + b'\n') + gzip.compress(second))):
        assert read_back(prepare.prepare(settings(write(name, content)))) == as_written(PAIRS[:2])


LINES = b''.join(json.dumps(GOOD | dict(prompt=f'Q{i}')).encode() + b'\n' for i in range(300))
LIST = b'[' + LINES.replace(b'\n', b',')[:-1] + b']'
GZIP = gzip.compress(LINES)
BAD_FILES = {
    'gzip cut short': ('a.jsonl.gz', GZIP[:-20], 'cannot be read after', 'EOFError'),
    'gzip damaged': ('a.jsonl.gz', GZIP[:99] + b'\xff' * 99 + GZIP[198:], 'cannot be read after'),
    'not gzip': ('a.jsonl.gz', LINES, 'cannot be read after', 'Not a gzipped file'),
    'gzip of another name': ('a.jsonl', GZIP, 'a.jsonl line 1: not valid JSON in UTF-8'),
    'UTF-16': ('a.jsonl', LINES.decode().encode('utf-16'), 'a.jsonl line 1: not valid JSON'),
    'empty': ('a.jsonl', b'', 'a.jsonl: no pair is left'),
    'blank lines alone': ('a.jsonl', b'\n \r\n\n', 'a.jsonl: no pair is left'),
    'a list as .jsonl': ('a.jsonl', LIST, 'a.jsonl line 1: a record is an object', 'not a list'),
    'empty .json': ('a.json', b'', 'a.json: cannot be read'),
    'object as .json': ('a.json', b'{"data": []}', 'a .json file must be one list'),
    'lines as .json': ('a.json', LINES, 'a.json: cannot be read'),
    '.json cut short': ('a.json', LIST[:-9], 'a.json: cannot be read'),
    '.json with a number': ('a.json', b'[1]', 'a.json record 1: a record is', 'not a int'),
    'not parquet': ('a.parquet', LINES, 'a.parquet: cannot be read'),
    'other columns': ('a.parquet', [dict(a='x', b='y')], 'a.parquet record 1: ', "'a', 'b'"),
    'header alone': ('a.csv', b'prompt,chosen,rejected\n', 'a.csv: no pair is left'),
    'Latin-1 table': ('a.csv', 'prompt,chosen\né,b\n'.encode('latin-1'), 'a.csv: cannot be read'),
    'another ending': ('a.txt', LINES, 'a.txt: neither a .jsonl'),
    'nothing to compare': ('a.jsonl', [GOOD | dict(rejected='A')] * 3, 'a.jsonl: no pair is left',
                           'identical', '3'),
}


@pytest.mark.parametrize('name', BAD_FILES)
def test_bad_file(name, write, settings):
    file, content, *says = BAD_FILES[name]
    refused(settings(write(file, content)), *says)


@pytest.mark.parametrize('changed, says', [
    (dict(dataset='none.jsonl'), 'none.jsonl: no such file'),
    (dict(dataset='.'), '.: neither a .jsonl'),
    (dict(dataset='pairs'), 'pairs: neither a .jsonl'),
    (dict(dataset=''), ': neither a .jsonl'),
    (dict(label_from_scores=True), "line 1: 'chosen_score' and 'rejected_score' go together"),
    (dict(max_length=3, max_prompt_length=2, truncation='drop'), 'a response did not fit'),
    (dict(tokenizer='gpt5'), "tokenizer: 'gpt5'"),
    (dict(truncation='cutt'), "truncation: 'cutt' is not one of"),
    (dict(bad_records='ignore'), "bad_records: 'ignore' is not one of"),
    (dict(template='chatml'), "template: 'chatml' is not one of"),
    (dict(val_fraction=1.5), 'val_fraction: 1.5 is not between 0 and 1'),
    (dict(max_length=1000), 'max_prompt_length: 1000 leaves no room'),
    (dict(max_prompt_length=0), 'max_prompt_length: 0'),
    (dict(data_dir='a.jsonl'), 'cannot be written (NotADirectoryError'),
])
def test_bad_settings(changed, says, write, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write('a.jsonl', [GOOD | dict(chosen='A' * 9)])
    refused(settings(**dict(dataset='a.jsonl') | changed), says)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for datasets: hub(records or an error) -> the list of calls it gets."""
    datasets = pytest.importorskip('datasets')

    def hub(records, splits=('train', 'test')):
        calls = []

        def answer(*args, **options):
            calls.append(options)
            if isinstance(records, Exception):
                raise records
            return iter(records)
        monkeypatch.setattr(datasets, 'load_dataset', answer)
        monkeypatch.setattr(datasets, 'get_dataset_split_names', lambda *args: list(splits))
        return calls
    return hub


@pytest.mark.parametrize('dataset, split, asked', [
    ('Anthropic/hh-rlhf', '', dict(split='train', data_dir=None)),
    ('Anthropic/hh-rlhf:harmless-base', 'test', dict(split='test', data_dir='harmless-base')),
    ('HuggingFaceH4/ultrafeedback_binarized', '', dict(split='train_prefs', name=None)),
    ('HuggingFaceH4/ultrafeedback_binarized', 'test_prefs', dict(split='test_prefs', name=None)),
    ('owner/pairs:english', '', dict(split='train', name='english')),
])
def test_hub(dataset, split, asked, hub, settings):
    calls = hub(PAIRS, ['train', 'train_prefs', 'test_prefs'] if 'ultra' in dataset else ['train'])
    folder = prepare.prepare(settings(dataset, split=split))
    assert calls == [dict(path=dataset.partition(':')[0], streaming=True) | asked]
    assert read_back(folder) == as_written(PAIRS)
    name = dataset.split('/')[1].replace(':', '-')
    assert os.path.basename(folder).startswith(name + '-')


def test_hub_errors(hub, settings):
    hub(ConnectionError('no\nroute'))
    refused(settings('owner/pairs'), 'owner/pairs', 'ConnectionError: no route')
    hub([PAIRS[0], dict(prompt='Q', chosen=3)])
    refused(settings('owner/pairs'), 'owner/pairs record 2: ', "'chosen'")


# --------------------------------------------------------------------------------------------------
# convert


CONVERT = """
def convert(record):
    if record['stars'] < 3:
        return None
    return dict(prompt=record['text'], chosen='{chosen}', rejected=record['reply'])
"""
REVIEWS = [dict(text=f'review {i}', stars=i, reply='no') for i in range(6)]


def convert_from(path, source):
    path.write_text(source)
    return configure(Data, [str(path)]).convert


def test_convert_makes_records_or_leaves_them_out(write, settings, tmp_path):
    convert = convert_from(tmp_path / 'mine.py', CONVERT.format(chosen='yes'))
    for name in ('a.jsonl', 'a.json'):
        folder = prepare.prepare(settings(write(name, REVIEWS), convert=convert))
        assert read_back(folder) == [        # ids count the source's records
            (i, f'review {i}', ['yes' + END, 'no' + END]) for i in (3, 4, 5)]


def test_an_edit_of_the_file_convert_is_from_prepares_anew(write, settings, tmp_path):
    path, file = write('a.jsonl', REVIEWS), tmp_path / 'mine.py'
    plain = CONVERT.format(chosen='yes')
    first = prepare.prepare(settings(path, convert=convert_from(file, plain)))
    assert prepare.prepare(settings(path, convert=convert_from(file, plain))) == first
    edited = convert_from(file, plain.replace('yes', 'maybe'))
    second = prepare.prepare(settings(path, convert=edited))
    assert second != first and read_back(second)[0][2][0] == 'maybe' + END


def test_records_that_convert_fails_on(write, settings, tmp_path, capsys):
    convert = convert_from(tmp_path / 'mine.py', CONVERT.format(chosen='yes'))
    lines = [json.dumps(r).encode() for r in (REVIEWS[4], dict(text='x'), REVIEWS[5])]
    path = write('a.jsonl', b'\n'.join([*lines, b'{"text": ']))
    refused(settings(path, convert=convert), 'a.jsonl line 2: ', "convert: KeyError: 'stars'")
    folder = prepare.prepare(settings(path, convert=convert, bad_records='skip'))
    assert [i for i, *_ in read_back(folder)] == [0, 2]
    assert ' 2 dropped: bad records' in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Tokens


@pytest.fixture
def cut(settings):
    """cut(max_length, max_prompt_length, ...) -> (prompt, responses, notes) as text, cut to fit."""
    def cut(max_length, max_prompt_length, truncation='cut', chosen='chosen', rejected='no'):
        cfg = settings('', truncation=truncation, max_length=max_length,
                       max_prompt_length=max_prompt_length)
        byte = get_tokenizer('byte')
        prompt, responses, notes = tokenize('prompt', [chosen, rejected], byte, cfg)
        return byte.decode(prompt), responses and [byte.decode(r) for r in responses], notes
    return cut


def test_truncation(cut):
    start, end = 'prompts that lost their start', 'pairs with a response that lost its end'
    both = ['chosen' + END, 'no' + END]
    assert cut(13, 6) == ('prompt', both, [])                                # all of it fits, just
    assert cut(11, 4) == ('ompt', both, [start])
    assert cut(12, 6) == ('prompt', ['chosen', 'no' + END], [end])           # END goes first
    assert cut(9, 4) == ('ompt', ['chose', 'no' + END], [start, end])
    assert cut(7, 6) == ('prompt', ['c', 'n'], [end])
    assert cut(13, 6, 'drop') == ('prompt', both, [])
    assert cut(12, 6, 'drop') == ('prompt', None, ['dropped: a response did not fit'])
    assert cut(11, 4, 'drop') == ('ompt', both, [start])


def test_responses_without_a_difference_are_dropped(cut):
    assert cut(99, 9, chosen='same', rejected='same')[1:] == (
        None, ['dropped: responses are identical'])
    _, responses, notes = cut(9, 6, chosen='same1', rejected='same2')        # once they are cut
    assert responses is None and notes[-1] == 'dropped: responses are identical'


def test_prompt_and_response_are_encoded_apart(gpt2, settings):
    prompt, (chosen, _), _ = tokenize('Hel', ['lo world', 'p'], gpt2, settings(''))
    assert prompt.tolist() == gpt2.encode('Hel').tolist()
    assert chosen.tolist() == [*gpt2.encode('lo world'), gpt2.eot]
    assert [*prompt, *chosen[:-1]] != gpt2.encode('Hello world').tolist()


def test_a_chat_is_written_out_where_there_is_no_template(settings):
    byte, cfg = get_tokenizer('byte'), settings('')
    prompt, responses, _ = tokenize([SYSTEM, USER, NO, USER], [[YES], [NO, USER, YES]], byte, cfg)
    assert byte.decode(prompt) == (
        '\n\nSystem: Be kind.\n\nHuman: Hi\n\nAssistant: Go away.\n\nHuman: Hi\n\nAssistant:')
    assert [byte.decode(r) for r in responses] == [
        ' Hello!' + END, ' Go away.\n\nHuman: Hi\n\nAssistant: Hello!' + END]


text = st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=60).filter(str.strip)


@examples(max_examples=25, deadline=None)
@given(texts=st.lists(st.tuples(text, text, text).filter(lambda t: t[1] != t[2]), min_size=1,
                      max_size=6))
def test_any_text_comes_back_from_the_files(texts):
    records = [dict(zip(('prompt', 'chosen', 'rejected'), t)) for t in texts]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'a.jsonl')
        with open(path, 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(r, ensure_ascii=r is records[0]) + '\n' for r in records)
        cfg = Data(path, tokenizer='byte', val_fraction=0.3, data_dir=folder)
        assert read_back(prepare.prepare(cfg)) == as_written(records)


@pytest.mark.parametrize('eot, dtype', [(65535, np.uint16), (65536, np.uint32)])
def test_tokens_take_two_bytes_or_four(eot, dtype, monkeypatch, write, settings):
    large = Tokenizer('large', tiktoken.Encoding(
        'large', pat_str=r'[\s\S]', mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={END: eot}))
    monkeypatch.setattr(prepare, 'get_tokenizer', lambda name: large)
    pairs = Pairs(prepare.prepare(settings(write('a.jsonl', PAIRS))))
    assert pairs.tokens.dtype == dtype
    for i, record in enumerate(PAIRS):
        prompt, responses = pairs[i]
        assert bytes(prompt.tolist()).decode() == record['prompt']
        assert [r[-1] for r in responses] == [eot, eot]


def test_rankings_and_single_responses(write, settings, capsys):
    ranked = [dict(prompt=f'{i}', responses=['a', 'bb', 'ccc', 'd'], p=0.5) for i in range(3)]
    folder = prepare.prepare(settings(write('ranked.jsonl', ranked)))
    assert read_back(folder)[2] == (2, '2', [t + END for t in ('a', 'bb', 'ccc', 'd')])
    pairs = Pairs(folder)
    assert pairs.K == 4 and pairs.table['responses'].tolist() == [[2, 3, 4, 2]] * 3
    assert pairs.table['p'].tolist() == [0.5] * 3
    single = [dict(prompt='Q', chosen='A'), dict(prompt='Q', chosen='A')]
    capsys.readouterr()
    folder = prepare.prepare(settings(write('single.jsonl', single)))
    assert read_back(folder) == as_written(single)         # one response: nothing to be equal to
    assert Pairs(folder).K == 1 and 'rejected' not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# The split


def split_of(prompts, val_fraction):
    """{prompt: is it for validation}; fails where one prompt is on both sides."""
    cfg = Data(tokenizer='byte', max_length=900, max_prompt_length=400, val_fraction=val_fraction)
    chunk = [(i, '', dict(prompt=p, chosen=f'{i}', rejected='no')) for i, p in enumerate(prompts)]
    rows = encode_chunk(chunk, cfg)[1]
    assert rows['id'].tolist() == list(range(len(prompts)))
    sides = set(zip(prompts, rows['val'].tolist()))
    assert len(sides) == len(set(prompts))
    return dict(sides)


@examples(max_examples=40, deadline=None)
@given(prompts=st.lists(text, min_size=1, max_size=20), more=st.lists(text, max_size=20),
       fraction=st.floats(0, 1), larger=st.floats(0, 1))
def test_the_split_is_by_prompt_and_stable(prompts, more, fraction, larger):
    before = split_of(prompts, fraction)
    after = split_of(more + prompts[::-1] + prompts, fraction)
    assert before.items() <= after.items()                 # more data moves no prompt
    fraction, larger = sorted([fraction, larger])
    low, high = split_of(prompts, fraction), split_of(prompts, larger)
    assert all(high[p] for p in prompts if low[p])         # nor does a larger fraction


def test_val_fraction(write, settings):
    records = [dict(prompt=f'{i}', chosen='a', rejected='b') for i in range(1000)]
    for fraction, low, high in ((0.0, 0, 0), (0.2, 150, 250), (1.0, 1000, 1000)):
        pairs = Pairs(prepare.prepare(settings(write('a.jsonl', records), val_fraction=fraction)))
        assert low <= len(pairs.val) <= high
        assert sorted([*pairs.train, *pairs.val]) == list(range(1000))
        assert pairs.table['val'][pairs.val].all() and not pairs.table['val'][pairs.train].any()


# --------------------------------------------------------------------------------------------------
# The folder


def test_report_and_meta(write, settings, capsys):
    records = [PAIRS[0], PAIRS[0], dict(prompt='Q', chosen='same', rejected='same'),
               dict(chosen=HI + ' a', rejected=HI),
               dict(prompt='long ' * 20, chosen='c' * 50, rejected='r'),
               dict(prompt='p', chosen='c' * 99, rejected='r')]
    cfg = settings(write('a.jsonl', records), max_length=80, max_prompt_length=40)
    pairs = Pairs(prepare.prepare(cfg))
    printed = capsys.readouterr().out
    total = (11 + 8 + 7) * 2 + (len(HI) + 3 + 1) + (40 + 40 + 2) + (1 + 79 + 2)
    for line in ('6 records read', f'5 kept: 5 to train on, 0 to validate, {total} tokens',
                 '1 dropped: responses are identical', '1 prompts that lost their start',
                 '2 pairs with a response that lost its end',
                 '1 transcripts with a blank last turn'):
        assert f' {line}\n' in printed
    assert [line.split() for line in printed.splitlines()[-4:]] == [
        ['tokens', '0%', '50%', '90%', '99%', '100%'], ['prompt', '1', '11', '40', '40', '40'],
        ['chosen', '3', '8', '79', '79', '79'], ['rejected', '1', '2', '7', '7', '7']]
    assert pairs.meta['tokens'] == len(pairs.tokens) == total and pairs.meta['counts']['read'] == 6


def test_parallel_and_one_process_write_the_same_bytes(monkeypatch, write, settings, tmp_path):
    rng = random.Random(0)
    lengths = [(rng.randint(1, 90), rng.randint(1, 90)) for _ in range(300)]
    records = [dict(prompt='q' * m, chosen='a' * n, rejected='b') for m, n in lengths]
    records[:0] = [GOOD | dict(rejected='A')] * 3          # the first chunk has no pair left
    path, written = write('a.jsonl', records), []
    for chunk in (2**20, 5000, 100):
        monkeypatch.setattr(prepare, 'CHUNK', chunk)
        folder = prepare.prepare(settings(path, data_dir=str(tmp_path / f'{chunk}'), max_length=120,
                                          max_prompt_length=60, val_fraction=0.3))
        written.append({file.name: file.read_bytes() for file in Path(folder).iterdir()})
    assert set(written[0]) == {'tokens.bin', 'pairs.npy', 'meta.json'}
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize('bad, says', [
    (dict(prompt='Q', chosen=' '), "a.jsonl line 31: 'chosen' is empty or blank"),
    (dict(prompt='Q', chosen='A'), 'a.jsonl line 31: 1 responses, where the records before')])
def test_a_bad_record_in_a_worker_is_named(bad, says, monkeypatch, write, settings):
    monkeypatch.setattr(prepare, 'CHUNK', 100)
    refused(settings(write('a.jsonl', PAIRS[:30] + [bad] + PAIRS[30:])), says)


def test_a_file_that_breaks_off_while_workers_run(monkeypatch, write, settings):
    monkeypatch.setattr(prepare, 'CHUNK', 100)
    refused(settings(write('a.jsonl.gz', GZIP[:-20])), 'a.jsonl.gz: cannot be read after')


def test_an_interruption_leaves_nothing(monkeypatch, write, settings):
    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(prepare, 'tokenize', interrupt)
    cfg = settings(write('a.jsonl', PAIRS))
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(cfg)
    assert os.listdir(cfg.data_dir) == []


def test_prepared_once_and_anew_where_source_or_settings_change(write, settings, capsys):
    path = write('a.jsonl', PAIRS)
    first = prepare.prepare(settings(path))
    assert 'preparing' in capsys.readouterr().out
    assert prepare.prepare(settings(path)) == first
    assert 'preparing' not in capsys.readouterr().out
    changes = dict(max_length=1500), dict(template='chat'), dict(val_fraction=0.5)
    folders = [first] + [prepare.prepare(settings(path, **changed)) for changed in changes]
    write('a.jsonl', PAIRS[:5])
    folders.append(prepare.prepare(settings(path)))
    assert len(set(folders)) == 5 and len(read_back(folders[-1])) == 5
    write('a.jsonl', [GOOD] * 5)
    assert read_back(prepare.prepare(settings(path))) == as_written([GOOD] * 5)


SWAPPED = """
right_order = responses_of
def responses_of(record):
    responses, p = right_order(record)
    return responses[::-1], p

"""


@pytest.mark.parametrize('file, edit, answer', [
    ('prepare.py', SWAPPED, (' worst', ' best')),
    ('tokenizer.py', "plain_chat = lambda messages: '#' + messages[-1]['content']\n",
     ('#best', '#worst'))])
def test_an_edit_of_the_source_prepares_anew(file, edit, answer, write, tmp_path):
    """A copy of the code is run, edited and run again: the old code's files are not taken."""
    for name in ('configurator.py', 'tokenizer.py', 'prepare.py'):
        shutil.copy(ROOT / name, tmp_path)
    write('a.jsonl', [dict(instruction='Q', chosen='best', rejected='worst')])

    def run():
        argv = [sys.executable, 'prepare.py', 'a.jsonl', '--tokenizer=byte', '--val_fraction=0.0']
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True)
        return str(tmp_path / done.stdout.splitlines()[-1])
    first = run()
    assert run() == first and read_back(first)[0][2] == [' best' + END, ' worst' + END]
    code, main, _ = (tmp_path / file).read_text().partition("if __name__ == '__main__':")
    (tmp_path / file).write_text(code + edit + main + '\n    run(main, __doc__)' * bool(main))
    assert read_back(run())[0][2] == [text + END for text in answer]


def test_two_processes_that_prepare_the_same_at_once(monkeypatch, write, settings):
    """The other one is done first: its folder stays, and what was written beside it goes."""
    cfg, write_files = settings(write('a.jsonl', PAIRS)), prepare.write_files

    def slow(stream, part, *rest):
        write_files(stream, part, *rest)
        shutil.copytree(part, part.split('.part')[0])
    monkeypatch.setattr(prepare, 'write_files', slow)
    folder = prepare.prepare(cfg)
    assert read_back(folder) == as_written(PAIRS)
    assert os.listdir(cfg.data_dir) == [os.path.basename(folder)]


# --------------------------------------------------------------------------------------------------
# The command


def test_show_writes_nothing(write, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write('a.jsonl', [dict(prompt='Why?', chosen=' So.', rejected=' Because of it.', p=0.75),
                      *PAIRS[:1], dict(prompt='bad'), *PAIRS[1:]])
    prepare.main(['a.jsonl', '--show=3', '--tokenizer=byte', '--max_length=12',
                  '--max_prompt_length=6'])
    first, second, third = capsys.readouterr().out.split('--- ')[1:]
    title, *lines = first.splitlines()
    assert 'a.jsonl line 1' in title and 'p = 0.75' in title
    assert 'pairs with a response that lost its end' in title
    assert lines == [
        f"chosen: 'Why?' | ' So.{END}'", '    4 prompt tokens, no loss; 5 response tokens, scored',
        "rejected: 'Why?' | ' Because'",
        '    4 prompt tokens, no loss; 8 response tokens, scored; cut, so no end of text']
    assert 'prompts that lost their start' in second
    assert 'a.jsonl line 3' in third and 'no shape fits' in third
    assert os.listdir(tmp_path) == ['a.jsonl']


@pytest.mark.parametrize('argv, says', [
    (['a.jsonl', '--show=1', '--max_length=200'], 'max_prompt_length: 256 leaves no room'),
    (['a.jsonl', '--shwo=1'], "did you mean 'show'?"), (['a.jsonl', '--show=x'], 'show = '),
    (['--show=1'], 'usage: python prepare.py SOURCE'), (['none.jsonl'], 'none.jsonl: no such')])
def test_bad_command(argv, says, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write('a.jsonl', PAIRS)
    with pytest.raises(InputError) as caught:
        prepare.main(argv + ['--tokenizer=byte'])
    assert says in str(caught.value) and len(files_of(tmp_path)) == 1


# --------------------------------------------------------------------------------------------------
# Real data


def real(name):
    if not (REAL / name).exists():
        pytest.skip(f'{REAL / name} is absent')
    return str(REAL / name)


def strings(record):
    return record['prompt'], [record['chosen'], record['rejected']]


def alpaca(record):
    text = record['instruction'] + '\n' * bool(record['input']) + record['input']
    return f'\n\nHuman: {text}\n\nAssistant:', [f' {record[key]}' for key in ('chosen', 'rejected')]


@pytest.mark.parametrize('name, n, expected', [
    ('ultrafeedback_1k_val.jsonl.gz', 200, strings), ('mutual_val.jsonl.gz', 886, strings),
    ('instruction_preference.json', 1100, alpaca)])
def test_real_pairs_come_back(name, n, expected, settings):
    records = [parse(raw) for _, raw in read_source(real(name))]
    pairs = [(i, *expected(r)) for i, r in enumerate(records) if r['chosen'] != r['rejected']]
    folder = prepare.prepare(settings(real(name), max_length=30_000, max_prompt_length=15_000))
    assert len(records) == n
    assert read_back(folder) == [(i, prompt, [r + END for r in rs]) for i, prompt, rs in pairs]


def test_real_transcripts_are_split_after_their_common_turns():
    early = 0
    for _, raw in read_source(real('hh_harmless.jsonl.gz')):
        record = parse(raw)
        prompt, responses, _, notes = read_record(record)
        assert [prompt + r for r in responses] == [record['chosen'], record['rejected']]
        assert prompt.startswith('\n\nHuman:') and prompt.endswith('\n\nAssistant:')
        before = {record[key].rpartition('\n\nAssistant:')[0] for key in ('chosen', 'rejected')}
        assert ('transcripts that differ before their last turn' in notes) == (len(before) > 1)
        early += len(before) > 1
    assert early > 0


def test_a_system_turn_of_a_single_question():
    record = dict(system='Be brief.', question='Q', chosen='A', rejected='B')
    prompt, responses, _, _ = read_record(record)
    assert prompt == [dict(role='system', content='Be brief.'), dict(role='user', content='Q')]
    assert responses == [[dict(role='assistant', content=text)] for text in 'AB']
