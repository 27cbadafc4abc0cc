"""
prepare.py: every shape of record, every kind of file, truncation, the split, the files written and read back.

    python -m pytest tests/test_prepare.py

What goes wrong, and what it says then, is in test_bad_input.py. A test that needs GPT-2's tables skips where
they cannot be loaded (TIKTOKEN_CACHE_DIR=FOLDER names a folder that holds them).
"""
import gzip
import json
import os
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st

import prepare
from prepare import InputError, Pairs, encode_chunk, encode_pair, get_tokenizer, read_record, read_source

PAIRS = [dict(prompt=f'question {i}?', chosen=f' good {i * i}', rejected=f' bad {i}') for i in range(40)]


def read_back(folder, split='train', tokenizer='byte'):
    """Prepared data as text: [(id, prompt, [response, ...]), ...]; the end of text shows as prepare.END."""
    pairs = Pairs(folder, split)
    decode = get_tokenizer(tokenizer).decode
    return [(int(row['id']), decode(prompt.tolist()), [decode(r.tolist()) for r in responses])
            for row, (prompt, responses) in zip(pairs.table, pairs)]


def as_written(records):
    return [(i, r['prompt'], [r[k] + prepare.END for k in ('chosen', 'rejected') if k in r])
            for i, r in enumerate(records)]


# ------------------------------------------------------------------------------------------------------------
# Records


def message(role, content):
    return dict(role=role, content=content)


SYSTEM, USER = message('system', 'Be kind.'), message('user', 'Hi')
GOOD, BAD = message('assistant', 'Hello!'), message('assistant', 'Go away.')
HI, HELLO = '\n\nHuman: Hi\n\nAssistant:', [' Hello!', ' Go away.']

SHAPES = {
    'strings byte for byte': (
        dict(prompt=' \tA\r\nQ: \u00e9\u2028?  ', chosen='\n yes\x00 ', rejected='no\n\n'),
        ' \tA\r\nQ: \u00e9\u2028?  ', ['\n yes\x00 ', 'no\n\n']),
    'strings that hold Human and Assistant': (
        dict(prompt='\n\nHuman: Hi\n\nAssistant:', chosen=' a\n\nAssistant: b', rejected=' c'),
        HI, [' a\n\nAssistant: b', ' c']),
    'no comparison': (dict(prompt='Q', chosen='A'), 'Q', ['A']),
    'other keys do not matter': (dict(prompt='Q', chosen='A', rejected='B', source=[1, {}]), 'Q', ['A', 'B']),
    'ranking': (dict(prompt='Q', responses=['best', 'middle', 'worst']), 'Q', ['best', 'middle', 'worst']),
    'ranking of one': (dict(prompt='Q', responses=['only']), 'Q', ['only']),
    'transcripts': (dict(chosen=HI + ' Hello!', rejected=HI + ' Go away.'), HI, HELLO),
    'transcripts whose replies begin alike': (
        dict(chosen=HI + ' Hello!', rejected=HI + ' Hell no.'), HI, [' Hello!', ' Hell no.']),
    'transcripts of two turns': (
        dict(chosen=HI + ' Yes?' + HI + ' A', rejected=HI + ' Yes?' + HI + ' B'),
        HI + ' Yes?' + HI, [' A', ' B']),
    'chats, prompt shared': (dict(chosen=[USER, GOOD], rejected=[USER, BAD]), HI, HELLO),
    'chats, prompt shared, of several turns': (
        dict(chosen=[SYSTEM, USER, BAD, USER, GOOD], rejected=[SYSTEM, USER, BAD, USER, BAD]),
        '\n\nSystem: Be kind.' + HI + ' Go away.' + HI, HELLO),
    'chats, prompt a list beside whole chats': (
        dict(prompt=[USER], chosen=[USER, GOOD], rejected=[USER, BAD]), HI, HELLO),
    'chats, prompt a list, chats the reply alone': (
        dict(prompt=[USER], chosen=[GOOD], rejected=[BAD]), HI, HELLO),
    'chats, prompt a string beside whole chats': (
        dict(prompt='Hi', chosen=[USER, GOOD], rejected=[USER, BAD]), HI, HELLO),
    'chats, prompt a string, chats the reply alone': (
        dict(prompt='Hi', chosen=[GOOD], rejected=[BAD]), HI, HELLO),
    'chats that part early': (
        dict(chosen=[USER, GOOD, USER, GOOD], rejected=[USER, BAD]),
        HI, [' Hello!\n\nHuman: Hi\n\nAssistant: Hello!', ' Go away.']),
    'chats with the same reply': (
        dict(chosen=[USER, GOOD], rejected=[USER, GOOD]), HI, [' Hello!', ' Hello!']),
    'Alpaca': (
        dict(instruction='Add.', input='1 + 1', chosen='2', rejected='3'),
        '\n\nHuman: Add.\n1 + 1\n\nAssistant:', [' 2', ' 3']),
    'Alpaca without input': (
        dict(instruction='Hi', input='', chosen='Hello!', rejected='Go away.'), HI, HELLO),
    'Alpaca, no comparison': (dict(instruction='Hi', chosen='Hello!'), HI, [' Hello!']),
}


@pytest.mark.parametrize('name', SHAPES)
def test_shape(name):
    record, prompt, responses = SHAPES[name]
    assert read_record(record)[:2] == (prompt, responses)


def test_template_chat_puts_the_leading_space_on_the_response():
    assert read_record(dict(prompt='Hi', chosen='Hello!', rejected='Go away.'), 'chat')[:2] == (HI, HELLO)
    assert read_record(dict(prompt='Hi', responses=['a', 'b', 'c']), 'chat')[:2] == (HI, [' a', ' b', ' c'])


@pytest.mark.parametrize('name', ['transcripts', 'chats, prompt shared', 'Alpaca'])
def test_template_chat_leaves_alone_what_is_a_chat_already(name):
    assert read_record(SHAPES[name][0], 'chat') == read_record(SHAPES[name][0])


def test_transcripts_that_part_early_and_blank_last_turns_are_kept_and_noted():
    early = dict(chosen=HI + ' A\n\nHuman: B\n\nAssistant: C', rejected=HI + ' D\n\nHuman: E\n\nAssistant: F')
    prompt, responses, _, notes = read_record(early)
    assert prompt == HI and responses == [' A\n\nHuman: B\n\nAssistant: C', ' D\n\nHuman: E\n\nAssistant: F']
    assert notes == ['transcripts that part before their last turn']
    prompt, responses, _, notes = read_record(dict(chosen=HI + ' Yes.', rejected=HI))
    assert (prompt, responses, notes) == (HI, [' Yes.', ''], ['transcripts with a blank last turn'])


def test_p_and_scores():
    record = dict(prompt='Q', chosen='A', rejected='B')
    assert read_record(record)[2] == 1.0
    assert read_record(record | dict(p=0.25))[2] == 0.25
    assert read_record(record | dict(p=None))[2] == 1.0
    scored = record | dict(chosen_score=2, rejected_score=0.5)
    assert read_record(scored)[2:] == (1.0, [])                       # scores alone change no label
    assert read_record(scored, label_from_scores=True)[2] == pytest.approx(1 / (1 + np.exp(-1.5)))
    for high in (5000, 1e308):                                        # no overflow on either side
        ps = [read_record(record | dict(chosen_score=a, rejected_score=-a), label_from_scores=True)[2]
              for a in (high, -high)]
        assert ps[0] == 1.0 and ps[1] < 1e-300
    assert read_record(record | dict(chosen_score=0, rejected_score=1))[3] == [
        'records whose rejected response has the higher score']


# ------------------------------------------------------------------------------------------------------------
# Files and the hub


@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.json', 'a.parquet'])
def test_every_format_says_the_same(name, write, settings):
    folder = prepare.prepare(settings(write(name, PAIRS)))
    assert read_back(folder) == as_written(PAIRS)


def test_blank_lines_and_windows_line_ends_are_passed_over(write, settings):
    lines = ['', json.dumps(PAIRS[0]), '  ', json.dumps(PAIRS[1])]
    folder = prepare.prepare(settings(write('a.jsonl', '\r\n'.join(lines).encode())))
    assert read_back(folder) == as_written(PAIRS[:2])


def test_a_file_without_a_last_line_end_and_of_several_gzip_members(write, settings):
    first, second = (json.dumps(r).encode() for r in PAIRS[:2])
    path = write('a.jsonl.gz', gzip.compress(first + b'\n') + gzip.compress(second))
    folder = prepare.prepare(settings(path))
    assert read_back(folder) == as_written(PAIRS[:2])


values = st.none() | st.floats(allow_nan=False) | st.text(max_size=8) | st.lists(st.text(max_size=3))


@hypothesis_settings(max_examples=40, deadline=None)
@given(records=st.lists(st.dictionaries(st.sampled_from('abc'), values), max_size=5),
       chunk=st.integers(1, 60), indent=st.sampled_from([None, 0, 3]), ascii_only=st.booleans())
def test_a_json_list_is_read_in_blocks_of_any_size(records, chunk, indent, ascii_only):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, 'CHUNK', chunk)
        path = os.path.join(folder, 'a.json')
        with open(path, 'w', encoding='utf-8', newline='') as f:
            json.dump(records, f, indent=indent, ensure_ascii=ascii_only)
        assert [prepare.parse(raw) for _, raw in read_source(path)] == records


def fake_hub(monkeypatch, records, splits):
    """datasets, as far as prepare.py uses it; -> the calls that it gets."""
    import datasets
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return iter(records)
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    monkeypatch.setattr(datasets, 'get_dataset_split_names', lambda name, subset=None: splits)
    return calls


@pytest.mark.parametrize('dataset, split, expected', [
    ('Anthropic/hh-rlhf', '', dict(split='train', data_dir=None)),
    ('Anthropic/hh-rlhf:harmless-base', 'test', dict(split='test', data_dir='harmless-base')),
    ('HuggingFaceH4/ultrafeedback_binarized', '', dict(split='train_prefs', name=None)),
    ('HuggingFaceH4/ultrafeedback_binarized', 'test_prefs', dict(split='test_prefs', name=None)),
    ('someone/pairs:english', '', dict(split='train', name='english')),
])
def test_hub(monkeypatch, settings, dataset, split, expected):
    splits = ['train_sft', 'train_prefs', 'test_prefs'] if 'ultra' in dataset else ['train', 'test']
    calls = fake_hub(monkeypatch, PAIRS, splits)
    folder = prepare.prepare(settings(dataset, split=split))
    assert calls == [(dataset.partition(':')[0], dict(streaming=True) | expected)]
    assert os.path.basename(folder).startswith(dataset.split('/')[1].replace(':', '-') + '-')
    assert read_back(folder) == as_written(PAIRS)


# ------------------------------------------------------------------------------------------------------------
# Tokens


@pytest.fixture
def cut(settings):
    """cut(max_length, max_prompt_length, ...) -> (prompt, responses, notes) of a pair: text, cut to fit."""
    def cut(max_length, max_prompt_length, truncation='cut', prompt='prompt', chosen='chosen', rejected='no'):
        cfg = settings('', truncation=truncation, max_length=max_length, max_prompt_length=max_prompt_length)
        record, byte = dict(prompt=prompt, chosen=chosen, rejected=rejected), get_tokenizer('byte')
        prompt, responses, _, _, notes = encode_pair(record, byte, cfg)
        return byte.decode(prompt.tolist()), responses and [byte.decode(r.tolist()) for r in responses], notes
    return cut


def test_truncation(cut):
    lost_start, lost_end = 'prompts that lost their start', 'pairs with a response that lost its end'
    whole = ['chosen<|endoftext|>', 'no<|endoftext|>']
    assert cut(13, 6) == ('prompt', whole, [])                                    # all of it fits, just
    assert cut(11, 4) == ('ompt', whole, [lost_start])
    assert cut(12, 6) == ('prompt', ['chosen', 'no<|endoftext|>'], [lost_end])    # the end of text goes first
    assert cut(9, 4) == ('ompt', ['chose', 'no<|endoftext|>'], [lost_start, lost_end])
    assert cut(7, 6) == ('prompt', ['c', 'n'], [lost_end])
    assert cut(13, 6, 'drop') == ('prompt', whole, [])
    assert cut(12, 6, 'drop') == ('prompt', None, ['dropped: a response did not fit'])
    assert cut(11, 4, 'drop') == ('ompt', whole, [lost_start])


def test_pairs_without_a_difference_are_dropped(cut):
    assert cut(99, 9, chosen='same', rejected='same')[1:] == (
        None, ['dropped: chosen and rejected identical'])
    assert cut(9, 6, chosen='same1', rejected='same2')[1:] == (
        None, ['pairs with a response that lost its end', 'dropped: identical once cut'])


def test_prompt_and_response_are_encoded_apart(gpt2, settings):
    record = dict(prompt='Hel', chosen='lo world', rejected='p')
    prompt, responses, *_ = encode_pair(record, gpt2, settings(''))
    assert prompt.tolist() == gpt2.encode('Hel')
    assert responses[0].tolist() == gpt2.encode('lo world') + [gpt2.eot_token]
    assert [*gpt2.encode('Hel'), *gpt2.encode('lo world')] != gpt2.encode('Hello world')


@pytest.mark.parametrize('name', ['byte', 'gpt2'])
def test_the_text_of_special_tokens_is_ordinary_text(name, request):
    tokenizer = request.getfixturevalue('gpt2') if name == 'gpt2' else get_tokenizer('byte')
    tokens = prepare.encode(tokenizer, 'a<|endoftext|>b', 'prompt').tolist()
    assert tokenizer.eot_token not in tokens and tokenizer.decode(tokens) == 'a<|endoftext|>b'


some_text = st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=60).filter(str.strip)


@hypothesis_settings(max_examples=25, deadline=None,
                     suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.tuples(some_text, some_text, some_text).filter(lambda t: t[1] != t[2]), min_size=1,
                      max_size=6))
def test_any_text_comes_back_from_the_files(texts, settings):
    records = [dict(zip(('prompt', 'chosen', 'rejected'), t)) for t in texts]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'a.jsonl')
        with open(path, 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(r, ensure_ascii=i % 2 == 0) + '\n' for i, r in enumerate(records))
        assert read_back(prepare.prepare(settings(path, data_dir=folder))) == as_written(records)


@pytest.mark.parametrize('eot, bytes_each, dtype', [(65535, 2, np.uint16), (65536, 4, np.uint32)])
def test_tokens_take_two_bytes_or_four(monkeypatch, write, settings, eot, bytes_each, dtype):
    big = tiktoken.Encoding('big', pat_str=r'[\s\S]', mergeable_ranks={bytes([i]): i for i in range(256)},
                            special_tokens={prepare.END: eot})
    monkeypatch.setattr(prepare, 'get_tokenizer', lambda name: big)
    folder = prepare.prepare(settings(write('a.jsonl', PAIRS)))
    pairs = Pairs(folder, 'train')
    assert pairs.tokens.dtype == dtype
    assert pairs.meta['token_bytes'] == bytes_each and pairs.meta['eos'] == eot
    assert os.path.getsize(os.path.join(folder, 'train.bin')) == bytes_each * pairs.meta['tokens']['train']
    assert [r[-1] for _, responses in pairs for r in responses] == [eot] * 2 * len(PAIRS)
    assert bytes(pairs[7][0].tolist()).decode() == PAIRS[7]['prompt']


# ------------------------------------------------------------------------------------------------------------
# The split


def split_of(prompts, val_fraction):
    """{prompt: the split it falls into}; a prompt in both would be in neither."""
    cfg = SimpleNamespace(tokenizer='byte', template='', label_from_scores=False, bad_records='error',
                          truncation='cut', max_length=900, max_prompt_length=400, val_fraction=val_fraction)
    records = [dict(prompt=p, chosen=f'{i}', rejected='no') for i, p in enumerate(prompts)]
    parts = encode_chunk([(i, '', r) for i, r in enumerate(records)], cfg)[0]
    ids = {split: table['id'].tolist() for split, (_, table) in parts.items()}
    sides = {split: {prompts[i] for i in some} for split, some in ids.items()}
    assert not sides.get('train', set()) & sides.get('val', set())
    assert sorted(i for some in ids.values() for i in some) == list(range(len(prompts)))
    return {p: split for split, some in sides.items() for p in some}


@hypothesis_settings(max_examples=40, deadline=None)
@given(prompts=st.lists(some_text, min_size=1, max_size=20), more=st.lists(some_text, max_size=20),
       fraction=st.floats(0, 1), larger=st.floats(0, 1))
def test_the_split_is_by_prompt_and_stable(prompts, more, fraction, larger):
    before = split_of(prompts, fraction)
    after = split_of(more + prompts[::-1] + prompts, fraction)
    assert before.items() <= after.items()                                       # new records move no old one
    fraction, larger = sorted([fraction, larger])
    low, high = split_of(prompts, fraction), split_of(prompts, larger)
    assert all(high[p] == 'val' for p in prompts if low[p] == 'val')             # nor does a larger fraction


def test_val_fraction(write, settings):
    path = write('a.jsonl', [dict(prompt=f'{i}', chosen='a', rejected='b') for i in range(1000)])
    for fraction, low, high in ((0.0, 0, 0), (0.2, 150, 250), (1.0, 1000, 1000)):
        folder = prepare.prepare(settings(path, val_fraction=fraction))
        train, val = Pairs(folder, 'train'), Pairs(folder, 'val')
        assert low <= len(val) <= high and len(train) + len(val) == 1000
        assert sorted([*train.table['id'], *val.table['id']]) == list(range(1000))


# ------------------------------------------------------------------------------------------------------------
# The folder


def test_counts(write, settings, capsys):
    records = [PAIRS[0], PAIRS[0], dict(prompt='Q', chosen='same', rejected='same'),
               dict(chosen=HI + ' a', rejected=HI), dict(prompt='long ' * 20, chosen='c' * 50, rejected='r'),
               dict(prompt='p', chosen='c' * 99, rejected='r')]
    cfg = settings(write('a.jsonl', records), max_length=80, max_prompt_length=40)
    pairs = Pairs(prepare.prepare(cfg), 'train')
    printed = capsys.readouterr().out
    for line in ('6 records read', '5 kept: 5 to train on, 0 to validate',
                 '1 dropped: chosen and rejected identical', '1 prompts that lost their start',
                 '2 pairs with a response that lost its end', '1 transcripts with a blank last turn',
                 '1 exact duplicates of another record (kept)', f'{len(pairs.tokens)} tokens'):
        assert f' {line}' in printed
    assert [line.split() for line in printed.splitlines()[-3:]] == [
        ['prompt', '1', '11', '40', '40', '40'], ['chosen', '3', '8', '79', '79', '79'],
        ['rejected', '1', '2', '7', '7', '7']]
    assert pairs.meta['pairs'] == dict(train=5, val=0) and pairs.meta['tokens']['train'] == len(pairs.tokens)
    assert pairs.meta['responses'] == 2 and pairs.meta['duplicates'] == 1
    assert pairs.meta['longest_pair'] == 40 + 40 + 2


def test_bad_records_can_be_left_out(write, settings, capsys):
    lines = [json.dumps(r) for r in PAIRS[:3]]
    lines[1:1] = ['{"prompt": "Q"}', 'not JSON', json.dumps(dict(prompt='Q', responses=['a', 'b', 'c']))]
    folder = prepare.prepare(settings(write('a.jsonl', '\n'.join(lines).encode()), bad_records='skip'))
    assert [i for i, *_ in read_back(folder)] == [0, 4, 5]            # numbers of the source's records
    assert "3 dropped: bad records, the first of them a.jsonl line 2: no 'chosen'" in capsys.readouterr().out
    listed = [PAIRS[0], dict(prompt='Q', chosen=3), PAIRS[1]]
    folder = prepare.prepare(settings(write('b.json', listed), bad_records='skip'))
    assert [i for i, *_ in read_back(folder)] == [0, 2]


def test_rankings_and_single_responses(write, settings, capsys):
    ranked = [dict(prompt=f'{i}', responses=['a', 'bb', 'ccc'], p=0.5) for i in range(3)]
    folder = prepare.prepare(settings(write('ranked.jsonl', ranked)))
    assert read_back(folder)[2] == (2, '2', [t + prepare.END for t in ('a', 'bb', 'ccc')])
    assert Pairs(folder, 'train').table['p'].tolist() == [0.5] * 3 and 'worst' in capsys.readouterr().out
    single = [dict(prompt='Q', chosen='A'), dict(prompt='Q', chosen='B')]
    folder = prepare.prepare(settings(write('single.jsonl', single)))
    assert read_back(folder) == as_written(single)
    assert Pairs(folder, 'train').meta['responses'] == 1 and 'rejected' not in capsys.readouterr().out


def test_parallel_and_one_process_write_the_same_bytes(monkeypatch, write, settings, tmp_path):
    rng = random.Random(0)
    lengths = [(rng.randint(1, 90), rng.randint(1, 90)) for _ in range(300)]
    path = write('a.jsonl', [dict(prompt='q' * m, chosen='a' * n, rejected='b') for m, n in lengths])
    written = []
    for workers, chunk in ((1, 2**20), (1, 999), (2, 999), (3, 50)):
        monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(workers)), raising=False)
        monkeypatch.setattr(prepare, 'CHUNK', chunk)
        folder = prepare.prepare(settings(path, data_dir=str(tmp_path / f'{workers}-{chunk}'), max_length=120,
                                          max_prompt_length=60, val_fraction=0.3))
        written.append({file.name: file.read_bytes() for file in Path(folder).iterdir()})
    first, *rest = written
    assert set(first) == {'train.bin', 'train.idx', 'val.bin', 'val.idx', 'meta.json'}
    assert all(files == first for files in rest)


def test_a_bad_record_in_a_worker_is_named_and_leaves_nothing(monkeypatch, write, settings, tmp_path):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(prepare, 'CHUNK', 100)
    path = write('a.jsonl', PAIRS[:30] + [dict(prompt='Q', chosen=3)] + PAIRS[30:])
    with pytest.raises(InputError, match="^a.jsonl line 31: 'chosen' is of type int, not a string"):
        prepare.prepare(settings(path))
    assert os.listdir(tmp_path / 'data') == []


def test_any_failure_leaves_no_folder_behind(monkeypatch, write, settings, tmp_path):
    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(prepare, 'encode_pair', interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(settings(write('a.jsonl', PAIRS)))
    assert os.listdir(tmp_path / 'data') == []


def test_prepared_once_and_anew_where_source_or_settings_change(write, settings, capsys):
    path = write('a.jsonl', PAIRS)
    first = prepare.prepare(settings(path))
    assert 'preparing' in capsys.readouterr().out
    assert prepare.prepare(settings(path)) == first
    assert prepare.prepare(settings(first)) == first                             # given by its folder
    assert 'preparing' not in capsys.readouterr().out
    changes = dict(max_length=1_500), dict(template='chat'), dict(val_fraction=0.5)
    others = [prepare.prepare(settings(path, **changed)) for changed in changes]
    write('a.jsonl', PAIRS[:5])
    others.append(prepare.prepare(settings(path)))
    assert len({first, *others}) == 5 and len(Pairs(others[-1], 'train')) == 5


def test_two_processes_that_prepare_the_same_at_once(monkeypatch, write, settings):
    """The other one is done first: its folder is taken, and what was written beside it goes."""
    cfg, write_files = settings(write('a.jsonl', PAIRS)), prepare.write_files

    def slow(stream, part, options):
        write_files(stream, part, options)
        os.rename(part, part.split('.part')[0])
        write_files(read_source(cfg.dataset), os.makedirs(part) or part, options)
    monkeypatch.setattr(prepare, 'write_files', slow)
    folder = prepare.prepare(cfg)
    assert read_back(folder) == as_written(PAIRS) and os.listdir(cfg.data_dir) == [os.path.basename(folder)]


def test_pairs_of_an_empty_split(write, settings):
    val = Pairs(prepare.prepare(settings(write('a.jsonl', PAIRS))), 'val')
    assert len(val) == 0 and val.table['id'].shape == (0,)


# ------------------------------------------------------------------------------------------------------------
# The command


def test_show_writes_nothing(write, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write('a.jsonl', [dict(prompt='Why?', chosen=' So.', rejected=' Because of it.', p=0.75), *PAIRS,
                      dict(prompt='bad'), dict(prompt='Q', chosen='same', rejected='same')])
    options = ['--tokenizer=byte', '--max_length=12', '--max_prompt_length=6']
    prepare.main(['a.jsonl', '--show=2', *options])
    printed = capsys.readouterr().out
    assert printed.startswith("""\
--- a.jsonl line 1; p = 0.750; pairs with a response that lost its end
chosen: 'Why?' | ' So.<|endoftext|>'
    4 prompt tokens, no loss; 5 response tokens, scored
rejected: 'Why?' | ' Because'
    4 prompt tokens, no loss; 8 response tokens, scored; cut, so no end of text
--- a.jsonl line 2; prompts that lost their start; pairs with a response that lost its end
""") and 'line 3' not in printed
    assert os.listdir(tmp_path) == ['a.jsonl']


def test_the_command_prepares_a_source_or_what_a_config_says(write, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write('a.jsonl', PAIRS)
    (tmp_path / 'c.py').write_text("dataset = 'a.jsonl'\ntokenizer = 'byte'\nval_fraction = 0.0\n")
    folders = []
    for argv in ('a.jsonl --tokenizer=byte --val_fraction=0.0', 'c.py', 'c.py --max_length=300'):
        prepare.main(argv.split())
        folders.append(capsys.readouterr().out.splitlines()[-1])
    assert folders[0] == folders[1] != folders[2] and read_back(folders[0]) == as_written(PAIRS)
