"""
prepare.py: every shape of record and every format of file, lengths, the split, the cache, the
files written and read back, and what is said of bad input.

    python -m pytest tests/test_prepare.py -k record

The hub is a stand-in. A test that reads real data skips where its folder is absent (NANOPREF_DATA
names another one). Left out: chats cut by a model's template and the token that begins a prompt
(test_tokenizer.py); signals and full disks (test_robust.py).
"""
import copy
import gzip
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import prepare
from configurator import InputError, configure
from prepare import Data, Pairs, parse, read_record, read_source, tokenize
from tokenizer import END, get_tokenizer

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get('NANOPREF_DATA', ROOT.parent / 'shared' / 'data'))
BYTE = get_tokenizer('byte')
GOOD = dict(prompt='Q', chosen='A', rejected='B')
ODD = dict(prompt=' \tA,\r\nQ: é\u2028?  ', chosen='\n yes 😀 ', rejected='no\n\n')
LINES = [json.dumps(r).encode() for r in (GOOD, ODD)]
PAIRS = [dict(prompt=f'{i}?', chosen=f' good {i * i}', rejected=f' bad {i}') for i in range(40)]


def read_back(folder):
    """Prepared bytes as text: [(id, prompt, [response, ...]), ...]; an end of text is END."""
    pairs = Pairs(folder)
    return [(int(pairs.table['id'][i]), BYTE.decode(pairs[i][0]),
             [BYTE.decode(r) for r in pairs[i][1]]) for i in range(len(pairs.table))]


def as_written(records):
    return [(i, r['prompt'], [r['chosen'] + END, r['rejected'] + END])
            for i, r in enumerate(records)]


def refused(cfg, words):
    """prepare(cfg) must raise one short line that holds `words`, and leave nothing."""
    with pytest.raises(InputError) as caught:
        prepare.prepare(cfg)
    message = str(caught.value)
    assert words in message and '\n' not in message and len(message) < 700
    assert not os.path.isdir(cfg.data_dir) or not os.listdir(cfg.data_dir)


# --------------------------------------------------------------------------------------------------
# Records


def says(role, content):
    return dict(role=role, content=content)


SYSTEM, USER = says('system', 'Be kind.'), says('user', 'Hi')
YES, NO = says('assistant', 'Hello!'), says('assistant', 'Go away.')
BOTH = [[YES], [NO]]
ANSWERS = dict(chosen='Hello!', rejected='Go away.')
HI = '\n\nHuman: Hi\n\nAssistant:'


@pytest.mark.parametrize('record, prompt, responses', [
    (ODD, ODD['prompt'], [ODD['chosen'], ODD['rejected']]),
    (GOOD | dict(source=[1], messages=None, chosen_score='-'), 'Q', ['A', 'B']),
    # transcripts; the last two are the odd ones of HH
    (dict(chosen=HI + HI + ' Hello!', rejected=HI + HI + ' Hell no.'), HI + HI,
     [' Hello!', ' Hell no.']),
    (dict(chosen=HI + ' a' + HI, rejected=HI + ' b'), HI, [' a' + HI, ' b']),
    (dict(chosen=HI + ' a', rejected=HI), HI, [' a', '']),
    # chats
    (dict(chosen=[SYSTEM, USER, YES], rejected=[SYSTEM, USER, NO]), [SYSTEM, USER], BOTH),
    (dict(chosen=[USER, YES, USER, YES], rejected=[USER, NO]), [USER], [[YES, USER, YES], [NO]]),
    (dict(prompt=[SYSTEM, USER], chosen=[YES], rejected=[NO]), [SYSTEM, USER], BOTH),
    (dict(prompt=[USER], chosen=[USER, YES], rejected=[USER, NO]), [USER], BOTH),
    (dict(prompt='Hi', chosen=[YES], rejected=[NO]), [USER], BOTH),
    (dict(prompt='Hi', messages=[SYSTEM, USER, YES], score_chosen=8.0,      # UltraFeedback
          chosen=[SYSTEM, USER, YES], rejected=[SYSTEM, USER, NO]), [SYSTEM, USER], BOTH),
    (dict(messages=[SYSTEM, USER]) | ANSWERS, [SYSTEM, USER], BOTH),
    (dict(conversations=[{'from': 'human', 'value': 'Hi'}],                 # ShareGPT
          chosen={'from': 'gpt', 'value': 'Hello!'}, rejected='Go away.'), [USER], BOTH),
    # single turns
    (dict(system='Be kind.', instruction='Hi', input='') | ANSWERS, [SYSTEM, USER], BOTH),
    (dict(question='Hi', input='1 + 1', response_j='Hello!', response_k='Go away.'),
     [says('user', 'Hi\n1 + 1')], BOTH),
    (dict(instruction='Hi', output_1='Go away.', output_2='Hello!', preference=2.0), [USER], BOTH),
    # rankings
    (dict(prompt='Q', responses=['A', 'B', 'C']), 'Q', ['A', 'B', 'C']),
    (dict(prompt='Q', responses=list('ABCD'), scores=[1, 3, 2.5, 3]), 'Q', list('BDCA')),
    (dict(prompt=[USER], responses=['Hello!', [NO]]), [USER], BOTH),
    # no comparison
    (dict(prompt='Q', chosen='A'), 'Q', ['A']),
    (dict(prompt='Hi', messages=[USER, NO, USER, YES]), [USER, NO, USER], [[YES]]),
])
def test_record(record, prompt, responses):
    assert read_record(record)[:2] == (prompt, responses)


def test_template_chat_makes_a_prompt_string_a_user_turn():
    assert read_record(dict(prompt='Hi') | ANSWERS, 'chat')[:2] == ([USER], BOTH)
    assert read_record(dict(chosen=HI + ' a', rejected=HI + ' b'), 'chat')[0] == HI


@pytest.mark.parametrize('record, numbers', [
    (GOOD, dict(p=1, margin=0)),
    (GOOD | dict(p='0.25', margin=-2), dict(p=0.25, margin=-2)),           # CSV: text
    (dict(prompt='Q', output_1='A', output_2='B', preference=1.75), dict(p=0.75, margin=0)),
])
def test_numbers_of_a_record(record, numbers):
    assert read_record(record)[2] == pytest.approx(numbers)


@pytest.mark.parametrize('record, words', [
    (b'{"prompt": ', 'bad.jsonl line 2: not valid JSON in UTF-8'),
    (b'{"prompt": "\xff"}', 'bad.jsonl line 2: not valid JSON in UTF-8'),
    (dict(text='x\n', label=1), "no shape fits the keys 'text', 'label'"),
    (dict(chosen='A'), "no shape fits the keys 'chosen'"),
    (dict(prompt='Q', chosen='A'), 'line 2: 1 response(s), 2 in records before'),
    (dict(prompt='Q', responses='A'), "'responses' is 'A', not a list"),
    (dict(prompt='Q', responses=['A', 'B'], scores=[1]), "'scores' needs a number for each"),
    (GOOD | dict(prompt=' \n\t'), "'prompt' is empty or blank"),
    (GOOD | dict(prompt='a\ud800'), 'a lone surrogate'),
    (dict(prompt='Q', response_j='A', response_k=' '), "'rejected' is empty or blank"),
    (dict(chosen='\n\nHuman: a', rejected=HI), "'chosen' and 'rejected' share no 'Assistant:'"),
    (dict(prompt='Q', chosen=[says('tool', 'A')], rejected=[NO]), "'chosen': a message needs"),
    (dict(prompt=[says('user', [])], chosen=[YES], rejected=[NO]), "'prompt': a message needs"),
    (dict(messages=[]), "'messages' is a list without a message"),
    (dict(chosen=[USER, YES], rejected=[USER, NO, USER]), 'a chat must begin and end'),
    (dict(chosen=[USER, YES], rejected=[USER, says('assistant', ' ')]), 'that is not blank'),
    (dict(chosen=[YES], rejected=[NO]), "'prompt' is of type NoneType"),
    (GOOD | dict(p=1.5), "'p' is 1.5, not a probability"),
    (GOOD | dict(margin=float('nan')), "'margin' is nan, not a number"),
])
def test_bad_record_is_named_or_skipped_and_counted(record, words, write, settings, capsys):
    line = record if isinstance(record, bytes) else json.dumps(record).encode()
    path = write('bad.jsonl', b'\n'.join([LINES[0], line, LINES[1]]))
    refused(settings(path), words)
    folder = prepare.prepare(settings(path, bad_records='skip'))
    assert read_back(folder) == as_written([GOOD, GOOD, ODD])[::2]     # ids count the source
    assert ' 1 dropped: bad records' in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Sources


GZIP = gzip.compress(b'\n'.join(json.dumps(r).encode() for r in PAIRS))


@pytest.mark.parametrize('file, content', [
    *((f'a.{ending}', [GOOD, ODD]) for ending in 'jsonl jsonl.gz json csv tsv parquet'.split()),
    ('a.jsonl', b'\r\n'.join([b'', LINES[0], b'  ', LINES[1]])),
    ('a.jsonl.gz', gzip.compress(LINES[0] + b'\n') + gzip.compress(LINES[1])),
    ('a.csv', '\ufeffprompt,chosen,rejected,p\r\nQ,A,B,\r\n'     # as spreadsheets save it
              '"{prompt}","{chosen}","{rejected}",1\r\n'.format(**ODD)),
])
def test_every_format_says_the_same(file, content, write, settings):
    assert read_back(prepare.prepare(settings(write(file, content)))) == as_written([GOOD, ODD])


@pytest.mark.parametrize('file, content, words', [
    ('a.jsonl.gz', GZIP[:-20], 'a.jsonl.gz: cannot be read after a.jsonl.gz line '),
    ('a.jsonl', [*PAIRS, GOOD | dict(chosen=' '), *PAIRS], "a.jsonl line 41: 'chosen' is empty"),
    ('a.jsonl', b'\n \r\n\n', 'a.jsonl: no pair is left'),
    ('a.jsonl', [GOOD | dict(rejected='A')] * 3, "'dropped: responses are identical': 3"),
    ('a.json', b'{"data": []}', 'a .json file must be one list'),
    ('a.json', [GOOD, 1], 'a.json record 2: a record is an object with keys, not a int'),
    ('a.parquet', [dict(a='x', b='y')], "a.parquet record 1: no shape fits the keys 'a', 'b'"),
    ('a.csv', b'prompt,chosen,rejected\nQ,A,B\n"R\nS",,D\n', 'a.csv line 4: no shape fits'),
])
def test_bad_file(file, content, words, write, settings):
    refused(settings(write(file, content)), words)


@pytest.mark.parametrize('changed, words', [
    (dict(dataset='none.jsonl'), 'none.jsonl: no such file'),
    (dict(dataset='pairs'), 'pairs: neither a .jsonl'),
    (dict(bad_records='skpi'), "bad_records: 'skpi' is not one of"),
    (dict(val_fraction=1.5), 'val_fraction: 1.5 is not between 0 and 1'),
    (dict(max_length=1000), 'max_prompt_length: 1000 leaves no room'),
])
def test_bad_settings(changed, words, write, settings):
    refused(settings(**dict(dataset=write('a.jsonl', PAIRS)) | changed), words)


@pytest.mark.parametrize('dataset, split, asked', [
    ('Anthropic/hh-rlhf:harmless', '', dict(split='train', data_dir='harmless')),
    ('owner/plain:english', '', dict(split='train', name='english')),
    ('owner/prefs', '', dict(split='train_prefs', name=None)),
    ('owner/prefs', 'test', dict(split='test', name=None)),
])
def test_hub(dataset, split, asked, settings, monkeypatch):
    datasets, calls = pytest.importorskip('datasets'), []
    splits = ['train', 'train_prefs', 'test'] if 'prefs' in dataset else ['train', 'test']
    monkeypatch.setattr(datasets, 'get_dataset_split_names', lambda *args: splits)
    monkeypatch.setattr(datasets, 'load_dataset', lambda **given: calls.append(given) or PAIRS)
    assert read_back(prepare.prepare(settings(dataset, split=split))) == as_written(PAIRS)
    assert calls == [dict(path=dataset.partition(':')[0], streaming=True) | asked]


MINE = """
tokenizer, val_fraction = 'byte', 0.0
def convert(record):    # of the stars
    if record['stars'] >= 3:
        return dict(prompt=record['text'], chosen='yes', rejected='no')
"""
REVIEWS = [dict(text=f'the review {i}', stars=i) for i in range(6)]


def test_convert_makes_records_leaves_them_out_or_is_named(write, settings, capsys):
    convert = configure(Data, [write('mine.py', MINE)]).convert
    path = write('a.jsonl', [*REVIEWS, dict(text='x')])
    refused(settings(path, convert=convert), "a.jsonl line 7: convert: KeyError: 'stars'")
    folder = prepare.prepare(settings(path, convert=convert, bad_records='skip'))
    answers = ['yes' + END, 'no' + END]
    assert read_back(folder) == [(i, f'the review {i}', answers) for i in (3, 4, 5)]
    assert ' 1 dropped: bad records' in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Tokens and their files


@pytest.mark.parametrize('max_length, max_prompt_length, prompt, responses', [
    (13, 6, 'prompt', ['chosen' + END, 'chose' + END]),    # all of it fits, just
    (12, 6, 'prompt', ['chosen', 'chose' + END]),          # END goes first
    (11, 6, 'prompt', None),                               # cut, they are the same
    (10, 4, 'ompt', ['chosen', 'chose' + END]),
])
def test_truncation(max_length, max_prompt_length, prompt, responses, settings):
    cfg = settings('', max_length=max_length, max_prompt_length=max_prompt_length)
    ids, cut, _ = tokenize('prompt', ['chosen', 'chose'], BYTE, cfg)
    assert BYTE.decode(ids) == prompt and (cut and [BYTE.decode(r) for r in cut]) == responses


def test_prompt_and_response_are_encoded_apart(gpt2, settings):
    prompt, (chosen, _), _ = tokenize('Hel', ['lo world', 'p'], gpt2, settings(''))
    assert prompt.tolist() == gpt2.encode('Hel').tolist()
    assert chosen.tolist() == [*gpt2.encode('lo world'), gpt2.eot]


def test_a_chat_is_written_out_where_there_is_no_template(settings):
    prompt, responses, _ = tokenize([SYSTEM, USER], [[YES], [NO, USER, YES]], BYTE, settings(''))
    assert BYTE.decode(prompt) == '\n\nSystem: Be kind.' + HI
    assert [BYTE.decode(r) for r in responses] == [
        ' Hello!' + END, ' Go away.' + HI + ' Hello!' + END]


@pytest.mark.parametrize('eot, size', [(65535, 2), (65536, 4)])
def test_tokens_take_two_bytes_or_four(eot, size, monkeypatch, write, settings):
    large = copy.copy(BYTE)
    large.n_vocab, large.eot = eot + 1, eot
    monkeypatch.setattr(prepare, 'get_tokenizer', lambda name: large)
    pairs = Pairs(prepare.prepare(settings(write('a.jsonl', PAIRS))))
    assert pairs.tokens.itemsize == size
    assert [r.tolist() for r in pairs[39][1]] == [[*b' good 1521', eot], [*b' bad 39', eot]]


@pytest.mark.parametrize('responses', [['A'], ['a', 'bb', 'ccc', 'd']])
def test_one_response_or_many(responses, write, settings):
    records = [dict(prompt=f'{i}', responses=responses, p=0.5) for i in range(3)]
    folder = prepare.prepare(settings(write('a.jsonl', records)))
    assert read_back(folder) == [(i, f'{i}', [r + END for r in responses]) for i in range(3)]
    assert Pairs(folder).table['p'].tolist() == [0.5] * 3


def test_the_split_is_by_prompt_and_stable(write, settings):
    def split(prompts, fraction):
        """{prompt: is it for validation}; fails where a prompt is on both sides."""
        records = [dict(prompt=p, chosen=f'{i}', rejected='no') for i, p in enumerate(prompts)]
        pairs = Pairs(prepare.prepare(settings(write('a.jsonl', records), val_fraction=fraction)))
        sides = {(p, i in pairs.val) for i, p in enumerate(prompts)}
        assert len(sides) == len(set(prompts)) and len(pairs.train) + len(pairs.val) == len(prompts)
        return dict(sides)

    many = [f'{i}' for i in range(600)]
    before, after, larger = split(many[:200] * 2, 0.2), split(many[::-1], 0.2), split(many, 0.4)
    assert before.items() <= after.items()                 # more data moves no prompt
    assert all(larger[p] for p in many if after[p])        # nor does a larger fraction
    assert 90 < sum(after.values()) < 150
    assert not any(split(many, 0.0).values()) and all(split(many, 1.0).values())


def test_report(write, settings, capsys):
    records = [*PAIRS[9:12], GOOD | dict(rejected='A'),
               dict(prompt='long ' * 20, chosen='c' * 50, rejected='r')]
    prepare.prepare(settings(write('a.jsonl', records), max_length=80, max_prompt_length=40))
    assert capsys.readouterr().out.partition('\n')[2] == """\
        5 records read
        1 dropped: responses are identical
        1 prompts that lost their start
        1 pairs with a response that lost its end
        4 pairs to train on
        0 pairs to validate
       40 tokens, longest prompt
       40 tokens, longest response
"""


def test_workers_keep_the_order(write, settings):
    records = [dict(prompt='q' * (1 + i * 7 % 90), chosen='a' * (1 + i * 11 % 90), rejected='b')
               for i in range(1000)]
    assert read_back(prepare.prepare(settings(write('a.jsonl', records)))) == as_written(records)


@pytest.mark.parametrize(
    'edited', ['prepare.py', 'tokenizer.py', 'mine.py', 'helper.py', 'a.jsonl'])
def test_an_edit_prepares_anew_and_nothing_else_does(edited, write, tmp_path, monkeypatch, capsys):
    """A copy of the code is imported and run; and again, unchanged, edited, with a setting."""
    for name in ('prepare.py', 'tokenizer.py'):
        shutil.copy(ROOT / name, tmp_path)
    write('mine.py', MINE + 'from helper import unused as _\n')
    write('helper.py', 'unused = 1    # the helper\n')
    write('a.jsonl', REVIEWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def prepared(*given):
        for name in ('tokenizer', 'prepare', 'helper'):
            monkeypatch.delitem(sys.modules, name, raising=False)
        new = importlib.import_module('prepare')
        return new.prepare(configure(new.Data, ['mine.py', '--dataset=a.jsonl', *given]))
    first = prepared()
    assert prepared() == first
    content = Path(edited).read_text()
    Path(edited).write_text(content.replace('the', 'The', 1))      # the size stays
    assert len({first, prepared(), prepared('--max_length=600')}) == 3
    assert capsys.readouterr().out.count('preparing') == 3


# --------------------------------------------------------------------------------------------------
# The command, and real data


def test_show_writes_nothing(write, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write('a.jsonl', [dict(prompt='Why?', chosen=' So.', rejected=' Because of it.', p=0.75),
                      dict(prompt='bad')])
    prepare.main(['a.jsonl', '--show=2', '--tokenizer=byte', '--max_length=12',
                  '--max_prompt_length=6'])
    *first, last = capsys.readouterr().out.splitlines()
    assert first == [
        '--- a.jsonl line 1; pairs with a response that lost its end; p = 0.75; margin = 0',
        f"chosen: 'Why?' | ' So.{END}'", '    4 prompt tokens, no loss; 5 response tokens, scored',
        "rejected: 'Why?' | ' Because'",
        '    4 prompt tokens, no loss; 8 response tokens, scored; cut, so no end of text']
    assert last.startswith("--- a.jsonl line 2: an error: no shape fits the keys 'prompt'")
    assert os.listdir(tmp_path) == ['a.jsonl']


def real(name):
    if not (REAL / name).exists():
        pytest.skip(f'{REAL / name} is absent')
    return str(REAL / name)


def alpaca(record):
    text = record['instruction'] + '\n' * bool(record['input']) + record['input']
    return dict(prompt=f'\n\nHuman: {text}\n\nAssistant:', chosen=' ' + record['chosen'],
                rejected=' ' + record['rejected'])


@pytest.mark.parametrize('name, n, written', [
    ('ultrafeedback_1k_val.jsonl.gz', 200, dict), ('mutual_val.jsonl.gz', 886, dict),
    ('instruction_preference.json', 1100, alpaca)])
def test_real_pairs_come_back(name, n, written, settings):
    records = [written(parse(raw)) for _, raw in read_source(real(name))]
    folder = prepare.prepare(settings(real(name), max_length=30_000, max_prompt_length=15_000))
    kept = [row for row in as_written(records) if row[2][0] != row[2][1]]
    assert len(records) == n and read_back(folder) == kept


def test_real_transcripts_are_split_after_their_common_turns():
    for _, raw in read_source(real('hh_harmless.jsonl.gz')):
        record = parse(raw)
        prompt, responses, _ = read_record(record)
        assert [prompt + r for r in responses] == [record['chosen'], record['rejected']]
        assert prompt.startswith('\n\nHuman:') and prompt.endswith('\n\nAssistant:')
        assert '\n\nAssistant:' not in os.path.commonprefix(responses)
