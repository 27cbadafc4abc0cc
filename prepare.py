"""
Preference data, from files or the hub, to token files that train.py maps into memory.

    python prepare.py my_pairs.jsonl.gz --show=3           # look first, write nothing
    python prepare.py Anthropic/hh-rlhf:harmless-base      # the hub; a subset after the colon
    python prepare.py pairs.csv --tokenizer=my-model       # a model's tokenizer and template

train.py calls this by itself. Sources: .jsonl, .jsonl.gz, .json (one list), .csv, .tsv, .parquet,
and any data set of the hub. Shapes of records, detected from their keys:

    {"prompt": "...", "chosen": "...", "rejected": "..."}       strings, taken byte for byte
    {"chosen": "\\n\\nHuman: ...", "rejected": ...}             transcripts: they share the prompt
    {"chosen": [{"role": ..., "content": ...}], ...}            chats, with or without "prompt"
    {"messages" or "conversations": [...], "chosen": ..., ...}  chats; ShareGPT's from/value, too
    {"instruction" or "question": "...", ...}                   a user turn; "input", "system"
    {..., "response_j": "...", "response_k": "..."}             for chosen and rejected
    {..., "output_1": ..., "output_2": ..., "preference": 1}    AlpacaEval; p = 2 - preference
    {"prompt": "...", "responses": ["best", ..., "worst"]}      a ranking, or sorted by "scores"
    {"prompt": "...", "chosen": "..."}, {"messages": [...]}     no comparison: for loss = 'sft'

All may have the numbers of NUMBERS. For other shapes, set `convert` in a config file: a function
from a record to one of these, or to None to leave it out.

A chat is written by the model's own template, or as \\n\\nHuman: ... \\n\\nAssistant: ... without
one. Prompt and response are tokenized apart, and a response ends with the end-of-text token.
Output: data/NAME-KEY/ with tokens.bin (all tokens, end to end), pairs.npy (a table of where each
pair is) and meta.json. KEY is a hash of the settings, the source file and this code, so an edit
invalidates the cache. Left out: cleaning, deduplication, mixing of sources, tools in chats.
"""
import ast
import csv
import functools
import glob
import gzip
import hashlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from reprlib import repr as brief       # for messages: a value may be megabytes
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from configurator import InputError, check_choice, check_least, configure, first_line, run
from tokenizer import ASSISTANT, MARK, get_tokenizer, plain_chat

# Numbers that a record may have, with their defaults. An objective gets one by naming it.
NUMBERS = {'p': 1.0,        # the probability that chosen is better
           'margin': 0.0}   # by how much it is better, for reward models


@dataclass
class Data:
    """Settings of the data; train.Config adds its own."""
    dataset: str = ''                   # a file, or a name of the hub
    split: str = ''                     # of a hub data set; empty: train_prefs or train
    tokenizer: str = ''                 # byte, a name of tiktoken's, a folder with tokenizer.json;
                                        # empty: the model's own, gpt2 where there is no model
    template: str = ''                  # 'chat': a prompt string is a user turn
    max_length: int = 512               # tokens of a prompt with one of its responses
    max_prompt_length: int = 256        # a longer prompt loses its start; a chat, its early turns
    val_fraction: float = 0.05          # of prompts, chosen by their hash; 1.0: everything
    bad_records: str = 'error'          # or 'skip': leave them out, and count them
    convert: Callable | None = None     # record -> record of a known shape, or None
    data_dir: str = 'data'
    show: int = 0                       # print so many records, write nothing


# --------------------------------------------------------------------------------------------------
# Records: any shape -> (prompt, [best response, ..., worst], numbers)

SHAPES = ('prompt, chosen, rejected; chosen, rejected; messages or conversations; instruction or '
          'question; response_j, response_k; output_1, output_2, preference; prompt, responses')
SYNONYMS = dict(conversations='messages', question='instruction', response_j='chosen',
                response_k='rejected')
ROLES = dict(user='user', human='user', assistant='assistant', gpt='assistant', system='system')


def text_of(value, key):
    if not isinstance(value, str):
        raise InputError(f'{key!r} is of type {type(value).__name__}, not a string')
    if not value.strip():
        raise InputError(f'{key!r} is empty or blank')
    return value


def number_of(value, key):
    """A float; the text of a number, as in CSV, will do."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(np.float32(number)):
        raise InputError(f'{key!r} is {brief(value)}, not a number')
    return number


def chat_of(value, key):
    """Messages, one message, or an assistant's text -> [{role, content}, ...]"""
    if isinstance(value, str):
        return [dict(role='assistant', content=text_of(value, key))]
    messages = []
    for m in value if isinstance(value, list) else [value]:
        m = m if isinstance(m, dict) else {}
        role, content = m.get('role', m.get('from')), m.get('content', m.get('value'))
        if role not in list(ROLES) or not isinstance(content, str):
            raise InputError(f'{key!r}: a message needs a role (system, user or assistant) and a '
                             f'content, not {brief(role)} and a {type(content).__name__}')
        messages.append(dict(role=ROLES[role], content=content))
    if not messages:
        raise InputError(f'{key!r} is a list without a message')
    return messages


def responses_of(r):
    """The responses of a record with their keys, best first: [(key, value), ...]"""
    if 'responses' not in r:
        return [(key, r[key]) for key in ('chosen', 'rejected') if key in r and 'chosen' in r]
    responses, scores = r['responses'], r.get('scores')
    if not isinstance(responses, list):
        raise InputError(f"'responses' is {brief(responses)}, not a list, best first")
    if scores is not None:
        if not isinstance(scores, list) or len(scores) != len(responses):
            raise InputError("'scores' needs a number for each of the 'responses'")
        order = np.argsort([-number_of(score, 'scores') for score in scores], kind='stable')
        responses = [responses[i] for i in order]
    return [('responses', response) for response in responses]


def split_transcripts(chosen, rejected):
    """Two transcripts: the prompt is what they share, up to its last 'Assistant:'."""
    shared = len(os.path.commonprefix([chosen, rejected]))
    at = chosen.rfind(ASSISTANT, 0, shared) + len(ASSISTANT)
    if at < len(ASSISTANT):
        raise InputError("no 'prompt', and 'chosen' and 'rejected' share no 'Assistant:'")
    return chosen[:at], [chosen[at:], rejected[at:]]


def has_prompt(response):
    """True for a chat that includes its prompt: UltraFeedback's, whose "messages" repeat one."""
    return isinstance(response, list) and chat_of(response, 'chosen')[0]['role'] != 'assistant'


def split_chats(prompt, chats):
    """A prompt (messages, text or None) and chats -> (prompt, answers), lists of messages."""
    shared = 0
    if isinstance(prompt, list):
        if all(chat[:len(prompt)] == prompt for chat in chats):    # chats that repeat the prompt
            shared = len(prompt)
    else:
        shortest = min(map(len, chats))
        while shared < shortest - 1 and all(c[shared] == chats[0][shared] for c in chats):
            shared += 1
        prompt = chats[0][:shared] or [dict(role='user', content=text_of(prompt, 'prompt'))]
    answers = [chat[shared:] for chat in chats]
    ends = [m for answer in answers for m in (answer[:1] + answer[-1:] or [prompt[0]])]
    if not prompt or any(m['role'] != 'assistant' or not m['content'].strip() for m in ends):
        raise InputError("after the prompt, a chat must begin and end with an assistant's message "
                         'that is not blank')
    return prompt, answers


def read_record(record, template=''):
    """A record of any shape -> (prompt, responses, numbers). Prompt and responses are strings, or
    lists of messages. Raises InputError, which names the key that is missing, empty or wrong."""
    if not isinstance(record, dict):
        raise InputError(f'a record is an object with keys, not a {type(record).__name__}')
    r = {SYNONYMS[key]: value for key, value in record.items() if key in SYNONYMS} | record
    r = {key: value for key, value in r.items() if value is not None}    # Parquet fills gaps
    if {'output_1', 'output_2', 'preference'} <= r.keys():         # AlpacaEval
        p = 2 - number_of(r['preference'], 'preference')
        best, worst = ('output_1', 'output_2') if p >= 0.5 else ('output_2', 'output_1')
        r |= dict(chosen=r[best], rejected=r[worst], p=max(p, 1 - p))
    numbers = {name: number_of(r.get(name, default), name) for name, default in NUMBERS.items()}
    if not 0 <= numbers['p'] <= 1:
        raise InputError(f"'p' is {numbers['p']}, not a probability")

    keyed, prompt = responses_of(r), r.get('prompt')
    texts = all(isinstance(response, str) for _, response in keyed)
    if 'messages' in r and not (keyed and has_prompt(keyed[0][1])):
        prompt = chat_of(r['messages'], 'messages')
        if not keyed:                        # no comparison: the last turn is the response
            prompt, keyed, texts = prompt[:-1], [('messages', prompt[-1:])], False
    elif isinstance(prompt, list):
        prompt = chat_of(prompt, 'prompt')
    elif prompt is None and 'instruction' in r:
        text = text_of(r['instruction'], 'instruction')
        text += f'\n{r["input"]}' if r.get('input') else ''
        prompt = [dict(role='system', content=r['system'])] if r.get('system') else []
        prompt.append(dict(role='user', content=text))
    elif prompt is not None and template == 'chat' and texts:
        prompt = [dict(role='user', content=text_of(prompt, 'prompt'))]
    if not keyed or (prompt is None and len(keyed) != 2):
        keys = ', '.join(map(brief, record))[:200] or 'none'
        raise InputError(f'no shape fits the keys {keys}; known are: {SHAPES} '
                         '(or set convert, a function that makes one of them)')
    if texts and not isinstance(prompt, list):
        responses = [text_of(value, key) for key, value in keyed]
        if prompt is None:
            prompt, responses = split_transcripts(*responses)
        return text_of(prompt, 'prompt'), responses, numbers
    return *split_chats(prompt, [chat_of(value, key) for key, value in keyed]), numbers


# --------------------------------------------------------------------------------------------------
# Sources: a file or a hub name -> a stream of (location, raw record)


def read_file(path):
    """A file -> a stream of (where, bytes of JSON or a parsed object)."""
    name = os.path.basename(path)
    if path.endswith(('.jsonl', '.jsonl.gz')):
        with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as f:
            yield from ((f'{name} line {n}', raw) for n, raw in enumerate(f, 1) if raw.strip())
    elif path.endswith('.json'):
        with open(path, encoding='utf-8') as f:
            records = json.load(f)
        if not isinstance(records, list):
            raise InputError(f'{path}: a .json file must be one list of records; one a line is '
                             '.jsonl')
        yield from ((f'{name} record {n}', record) for n, record in enumerate(records, 1))
    elif path.endswith('.txt'):          # prompts for sample.py
        with open(path, encoding='utf-8') as f:
            yield from ((f'{name} line {n}', dict(prompt=text.rstrip('\n')))
                        for n, text in enumerate(f, 1) if text.strip())
    else:
        with open(path, encoding='utf-8-sig', newline='') as f:    # spreadsheets begin with a mark
            rows = csv.DictReader(f, dialect='excel-tab' if path.endswith('.tsv') else 'excel')
            for row in rows:
                yield f'{name} line {rows.line_num}', {k: x for k, x in row.items() if x}


def read_datasets(source, split):
    """A .parquet file, or owner/name or owner/name:subset of the hub, streamed."""
    import datasets                      # slow to load
    name, _, subset = source.partition(':')
    if source.endswith('.parquet'):
        options = dict(path='parquet', data_files=source, split='train')
    elif name == 'Anthropic/hh-rlhf':    # its subsets are folders
        options = dict(path=name, data_dir=subset or None, split=split or 'train')
    else:
        names = [split] if split else datasets.get_dataset_split_names(name, subset or None)
        default = 'train_prefs' if 'train_prefs' in names else 'train'
        options = dict(path=name, name=subset or None, split=split or default)
    for n, record in enumerate(datasets.load_dataset(streaming=True, **options), 1):
        yield f'{source} record {n}', record


def read_source(source, split=''):
    """A path or a name of the hub -> a stream of (where, bytes of JSON or a parsed object)."""
    files = ('.jsonl', '.jsonl.gz', '.json', '.csv', '.tsv', '.txt')
    is_file, where = source.endswith((*files, '.parquet')), 'the beginning'
    if is_file and not os.path.isfile(source):
        raise InputError(f'{source}: no such file')
    if not is_file and (os.path.exists(source) or source.count('/') != 1):
        raise InputError(f'{source}: neither a {", ".join(files)} or .parquet file nor owner/name '
                         'of the hub')
    try:
        for where, raw in (read_file(source) if source.endswith(files)
                           else read_datasets(source, split)):
            yield where, raw
    except InputError:
        raise
    except Exception as e:    # of gzip, json, csv, Arrow, the network: they share no class
        raise InputError(f'{source}: cannot be read after {where} ({first_line(e)})')


def parse(raw):
    """bytes of JSON -> an object. Objects stay as they are; an error of `convert` is raised."""
    if isinstance(raw, InputError):
        raise raw
    try:
        return json.loads(raw.decode()) if isinstance(raw, bytes) else raw
    except (ValueError, RecursionError) as e:
        raise InputError(f'not valid JSON in UTF-8 ({first_line(e)})')


def records_of(cfg):
    """cfg.dataset's records, converted -> a stream of (number in the source from 0, where, raw)."""
    for number, (where, raw) in enumerate(read_source(cfg.dataset, cfg.split)):
        if cfg.convert is not None:
            try:
                raw = cfg.convert(parse(raw))
            except InputError as e:
                raw = e
            except Exception as e:    # the user's code
                raw = InputError(f'convert: {first_line(e)}')
        if raw is not None:
            yield number, where, raw


# --------------------------------------------------------------------------------------------------
# Text -> tokens


def tokenize(prompt, responses, tokenizer, cfg):
    """Prompt and responses, strings or messages -> ((n,) ids, [(n,) ids, ...], notes), cut to
    length.

    Responses are None where the pair is dropped. A string prompt loses its start, a chat its early
    turns, a response its end (and with it the end of text).
    """
    if isinstance(prompt, list) and tokenizer.has_template:
        ids, responses, notes = tokenize_chat(prompt, responses, tokenizer, cfg.max_prompt_length)
        if ids is None:
            return None, None, notes
    else:
        if isinstance(prompt, list):
            prompt = plain_chat(prompt) + ASSISTANT
            responses = [plain_chat(answer).removeprefix(ASSISTANT) for answer in responses]
        ids, notes = tokenizer.encode(prompt), []
        responses = [np.append(tokenizer.encode(r), tokenizer.eot) for r in responses]
        room = cfg.max_prompt_length - len(tokenizer.begin)
        if len(ids) > room:
            ids, notes = ids[len(ids) - room:], ['prompts that lost their start']
        ids = np.concatenate([np.array(tokenizer.begin, dtype=ids.dtype), ids])
    room = cfg.max_length - len(ids)
    if max(map(len, responses)) > room:
        responses = [r[:room] for r in responses]
        notes = [*notes, 'pairs with a response that lost its end']
    if len(responses) > 1 and len({r.tobytes() for r in responses}) == 1:
        return ids, None, [*notes, 'dropped: responses are identical']
    return ids, responses, notes


def tokenize_chat(prompt, responses, tokenizer, longest):
    """As tokenize, by the model's chat template. A prompt that is too long loses whole early turns,
    never its system turn."""
    system, turns = ([prompt[0]], prompt[1:]) if prompt[0]['role'] == 'system' else ([], prompt)
    starts = [0, *(i for i, m in enumerate(turns) if i and m['role'] == 'user')]
    for start in starts:
        text = tokenizer.render(system + turns[start:], opening=True)
        ids = tokenizer.encode_rendered(text)
        if len(ids) <= longest:
            break
    else:
        return None, None, ['dropped: the chat does not fit max_prompt_length']
    answers = []
    for answer in responses:
        chat = tokenizer.render(system + turns[start:] + answer)
        rest = chat.removeprefix(text)
        if rest == chat or answer[-1]['content'].strip() not in rest.replace(MARK, ''):
            raise InputError(f"the chat template of {tokenizer.name} drops the assistant's turn")
        joined = tokenizer.encode_rendered(chat)    # in context: some open a text with a space
        answers.append(joined[len(ids):] if np.array_equal(joined[:len(ids)], ids)
                       else tokenizer.encode_rendered(rest))
    return ids, answers, ['chats that lost early turns'] * (start > 0)


def encode_record(raw, tokenizer, cfg):
    """-> (prompt, its ids, ids of the responses or None, numbers, notes)"""
    prompt, responses, numbers = read_record(parse(raw), cfg.template)
    try:
        ids, responses, notes = tokenize(prompt, responses, tokenizer, cfg)
    except UnicodeEncodeError as e:
        raise InputError(f'a lone surrogate, which is no character ({first_line(e)})')
    return prompt, ids, responses, numbers, notes


def encode(item, cfg):
    """(number, where, raw record) -> (where, row of the table without its start, bytes of the
    tokens, notes), run by a worker. The row is None where the pair is dropped."""
    number, where, raw = item
    tokenizer = get_tokenizer(cfg.tokenizer)
    try:
        prompt, ids, responses, numbers, notes = encode_record(raw, tokenizer, cfg)
    except InputError as e:
        if cfg.bad_records != 'skip':
            raise InputError(f'{where}: {e} (--bad_records=skip leaves such records out)')
        return where, None, b'', ['dropped: bad records']
    if responses is None:
        return where, None, b'', notes
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    place = hashlib.blake2b(text.encode(), digest_size=8).digest()
    val = int.from_bytes(place, 'big') < cfg.val_fraction * 2**64
    row = number, val, len(ids), [len(r) for r in responses], *numbers.values()
    tokens = np.concatenate([ids, *responses]).astype(token_dtype(tokenizer.n_vocab)).tobytes()
    return where, row, tokens, notes


def in_parallel(work, items):
    """work(item) of every item, in order, in as many processes as there are cores."""
    first = list(itertools.islice(items, 257))
    if len(first) < 257:                 # not worth starting processes
        yield from map(work, first)
        return
    fork = multiprocessing.get_context('fork' if sys.platform == 'linux' else 'spawn')
    with fork.Pool(initializer=leave_signals) as pool:
        yield from pool.imap(work, itertools.chain(first, items), chunksize=256)
        pool.close()
        pool.join()      # terminate() would signal a worker that has just forked: it would clean up


def leave_signals():
    """In a worker: Ctrl-C reaches all processes; the first one acts on it and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# --------------------------------------------------------------------------------------------------
# The files


def token_dtype(n_vocab):
    return np.uint16 if n_vocab <= 2**16 else np.uint32


def table_dtype(K):
    """A row of pairs.npy: where a pair's tokens start, its number in the source, lengths,
    NUMBERS."""
    return np.dtype([('start', '<i8'), ('id', '<i8'), ('val', '?'), ('prompt', '<i4'),
                     ('responses', '<i4', (K,)), *((name, '<f4') for name in NUMBERS)])


def source_texts(*objects):
    """The source files of functions and classes, and all that these import but for installed
    packages: part of a cache's key, so that no edit goes unnoticed."""
    installed = tuple(sysconfig.get_paths()[name] for name in ('stdlib', 'purelib', 'platlib'))
    texts, paths = {}, [f.__code__.co_filename for x in objects for c in getattr(x, '__mro__', [x])
                        for f in (c, *vars(c).values()) if inspect.isfunction(f)]
    while paths:
        path = os.path.abspath(paths.pop())
        if path in texts or path.startswith(installed) or not path.endswith('.py'):
            continue
        with open(path, encoding='utf-8') as f:
            texts[path] = f.read()
        for node in ast.walk(ast.parse(texts[path])):
            names = []
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f'{node.module}.{name}' for name in names)]
            modules = [sys.modules.get(name) for name in names]
            paths += [m.__file__ for m in modules if getattr(m, '__file__', None)]
    return sorted(texts.values())


def check_data(cfg):
    check_choice(cfg, bad_records=('error', 'skip'), template=('', 'chat'))
    check_least(cfg, show=0)
    if not 0 <= cfg.val_fraction <= 1:
        raise InputError(f'val_fraction: {cfg.val_fraction} is not between 0 and 1')
    if not 1 <= cfg.max_prompt_length < cfg.max_length:
        raise InputError(f'max_prompt_length: {cfg.max_prompt_length} leaves no room for a '
                         f'response in max_length {cfg.max_length}')


def prepare(cfg):
    """Tokenize cfg.dataset unless cached -> the folder. Raises InputError and leaves nothing."""
    check_data(cfg)
    settings = {f.name: getattr(cfg, f.name) for f in fields(Data)
                if f.name not in ('convert', 'data_dir', 'show')}
    settings['tokenizer'] = cfg.tokenizer or 'gpt2'
    made_of = [settings, source_texts(prepare, *([cfg.convert] if cfg.convert else []))]
    tokenizer_files = [os.path.join(settings['tokenizer'], name) for name in ('*token*', '*.jinja')]
    for pattern in (glob.escape(cfg.dataset), *tokenizer_files):
        made_of += [[path, os.stat(path).st_size, os.stat(path).st_mtime_ns]
                    for path in sorted(glob.glob(pattern)) if os.path.isfile(path)]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]
    stem = os.path.basename(cfg.dataset).split('.')[0].replace(':', '-')
    folder = os.path.join(cfg.data_dir, f'{stem}-{key}')
    if os.path.exists(os.path.join(folder, 'meta.json')):
        return folder
    print(f'preparing {cfg.dataset} -> {folder}', flush=True)
    part = f'{folder}.part-{os.getpid()}'
    try:
        os.makedirs(part)
        write_files(records_of(cfg), part, settings)
        if not os.path.exists(folder):                     # another process may have been faster
            os.rename(part, folder)
    except OSError as e:
        raise InputError(f'{folder}: cannot be written ({first_line(e)})')
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def write_files(records, folder, settings):
    counts, rows, start, digest = Counter(), [], 0, hashlib.sha256()
    work = functools.partial(encode, cfg=SimpleNamespace(**settings))
    n_vocab = get_tokenizer(settings['tokenizer']).n_vocab      # once, before processes fork
    with open(os.path.join(folder, 'tokens.bin'), 'wb') as f:
        for where, row, tokens, notes in tqdm(
                in_parallel(work, records), unit=' pairs', disable=None, leave=False):
            K = len(rows[0][4]) if rows else 0
            if row and rows and len(row[3]) != K:
                if settings['bad_records'] != 'skip':
                    raise InputError(f'{where}: {len(row[3])} response(s), {K} in records before '
                                     '(--bad_records=skip leaves such records out)')
                row, notes = None, ['dropped: bad records']
            counts.update(['records read', *notes])
            if row:
                f.write(tokens)
                digest.update(tokens)
                rows.append((start, *row))
                start += row[2] + sum(row[3])
    if not rows:
        raise InputError(f'{settings["dataset"]}: no pair is left of the records: {dict(counts)}')
    table = np.array(rows, dtype=table_dtype(len(rows[0][4])))
    np.save(os.path.join(folder, 'pairs.npy'), table)
    digest.update(table)
    meta = dict(settings=settings, n_vocab=n_vocab, counts=counts, hash=digest.hexdigest())
    with open(os.path.join(folder, 'meta.json'), 'w', encoding='utf-8') as f:
        json.dump(meta, f, indent=1)
    val = int(table['val'].sum())
    summary = dict(counts) | {
        'pairs to train on': len(table) - val, 'pairs to validate': val,
        'tokens, longest prompt': table['prompt'].max(),
        'tokens, longest response': table['responses'].max()}
    print('\n'.join(f'{n:>9,} {what}' for what, n in summary.items()))


class Pairs:
    """Prepared data, mapped into memory. pairs[i] -> (prompt, [response, ...]), arrays of token
    ids. `train` and `val` are the rows of each split."""

    def __init__(self, folder):
        self.folder = folder
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            self.meta = json.load(f)
        self.table = np.load(os.path.join(folder, 'pairs.npy'))
        self.tokens = np.memmap(os.path.join(folder, 'tokens.bin'),
                                token_dtype(self.meta['n_vocab']), mode='r')
        self.train, self.val = np.flatnonzero(~self.table['val']), np.flatnonzero(self.table['val'])
        self.K = self.table['responses'].shape[1]

    def __getitem__(self, i):
        row = self.table[i]
        ends = int(row['start']) + np.cumsum([row['prompt'], *row['responses']])
        responses = [self.tokens[a:b] for a, b in zip(ends, ends[1:])]
        return self.tokens[int(row['start']):ends[0]], responses


# --------------------------------------------------------------------------------------------------
# The command


def show(cfg):
    """Print the first records as training sees them: where a response begins, what was cut."""
    check_data(cfg)
    tokenizer = get_tokenizer(cfg.tokenizer or 'gpt2')
    for _, where, raw in itertools.islice(records_of(cfg), cfg.show):
        try:
            _, ids, responses, numbers, notes = encode_record(raw, tokenizer, cfg)
        except InputError as e:
            print(f'--- {where}: an error: {e}')
            continue
        print('; '.join([f'--- {where}', *notes, *(f'{k} = {x:g}' for k, x in numbers.items())]))
        for k, r in enumerate(responses or []):
            name = ('chosen', 'rejected')[k] if len(responses) <= 2 else f'response {k + 1}'
            print(f'{name}: {tokenizer.decode(ids.tolist())!r} | {tokenizer.decode(r.tolist())!r}')
            end = '' if set(r.tolist()) & tokenizer.ends else '; cut, so no end of text'
            print(f'    {len(ids)} prompt tokens, no loss; {len(r)} response tokens, scored{end}')


def main(argv):
    if argv[0].startswith('-'):
        raise InputError('usage: python prepare.py SOURCE [--show=N] [--name=value ...]')
    cfg = configure(Data, [f'--dataset={argv[0]}', *argv[1:]])
    if cfg.show:
        show(cfg)
    else:
        print(prepare(cfg))


if __name__ == '__main__':
    run(main, __doc__)
