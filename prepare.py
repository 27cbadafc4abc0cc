"""
Preference pairs, from anywhere, to token files that train.py maps into memory.

    python prepare.py Anthropic/hh-rlhf:harmless-base      # the hub; a subset after the colon
    python prepare.py my_pairs.jsonl.gz --show=3           # look first, write nothing
    python prepare.py config/dpo_gpt2.py --split=test      # as a config says; train.py does this by itself

Sources: `demo`; a local .jsonl, .jsonl.gz, .json (one list) or .parquet file; any data set of the hub.
Records, told apart by their keys:

    {"prompt": "...", "chosen": "...", "rejected": "..."}           strings, taken byte for byte
    {"chosen": "\\n\\nHuman: ...", "rejected": "\\n\\nHuman: ..."}  transcripts: the prompt is what they share
    {"chosen": [{"role": ..., "content": ...}], "rejected": [...]}  chats, with or without "prompt"
    {"instruction": "...", "input": "...", "chosen": ..., ...}      Alpaca
    {"prompt": "...", "responses": ["best", ..., "worst"]}          a ranking of K
    {"prompt": "...", "chosen": "..."}                              no comparison: for loss = 'sft' alone

and with any of them "p", the probability that chosen is better; "chosen_score" and "rejected_score"; or a
"margin", by how much chosen is the better, for reward models.

Written to data/NAME-KEY/ (KEY: a hash of the settings), each split as tokens end to end and a table of where
they are, plus meta.json. Nothing is cleaned: a bad record stops the run with its line number (or is left out
and counted: --bad_records=skip), and what truncation costs is printed.
Left out: cleaning, deduplication, mixing of sources, chat templates of other models.
"""
import contextlib
import fcntl
import functools
import glob
import gzip
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from reprlib import repr as short    # a message is one line, and a bad value may be megabytes
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

FORMAT = 3              # of the files written; another number means they are not readable here
END = '<|endoftext|>'
MAX_LINE = 8 * 2**20    # bytes: more than that is not a record but a file of another kind
CHUNK = 2**20           # bytes of records that one worker takes at a time


class InputError(ValueError):
    """What a user can mend: a file, a key, a value. One line; the commands print it and exit with 1."""

    def __init__(self, message):
        super().__init__(' '.join(message.splitlines()))    # a name may hold anything


def first_line(e):
    """Another library's error, short enough to stand in a message of ours."""
    return f'{type(e).__name__}: {e}'.splitlines()[0][:160]


# ----------------------------------------------------------------------------------------------------------
# Tokenizers


@functools.cache
def get_tokenizer(name):
    """'byte' (256 bytes and the end of text, built in), any of tiktoken's: gpt2, cl100k_base; or the first
    ranks of one, for a small model: 'gpt2:8192' knows GPT-2's 8,192 commonest pieces and <|endoftext|>."""
    import tiktoken
    if name == 'byte':
        return tiktoken.Encoding('byte', pat_str=r'[\s\S]{1,400}', special_tokens={END: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    whole, colon, ranks = name.partition(':')
    if colon and ranks.isdecimal() and len(ranks) < 9 and int(ranks) >= 256:
        whole = get_tokenizer(whole)    # merges build on lower ranks, so the first ranks are a BPE as well
        kept = {piece: rank for piece, rank in whole._mergeable_ranks.items() if rank < int(ranks)}
        return tiktoken.Encoding(name, pat_str=whole._pat_str, mergeable_ranks=kept,
                                 special_tokens={END: len(kept)})
    if name not in tiktoken.list_encoding_names():
        raise InputError(f'tokenizer: {name!r} is none of byte, {", ".join(tiktoken.list_encoding_names())}')
    try:
        return tiktoken.get_encoding(name)
    except Exception as e:    # whatever the download raised
        raise InputError(f'tokenizer: the tables of {name!r} could not be had ({first_line(e)}); '
                         'set TIKTOKEN_CACHE_DIR to a folder that holds them')


# ----------------------------------------------------------------------------------------------------------
# Records: any shape -> (prompt, [chosen, rejected], p)

ROLES = {'user': 'Human', 'human': 'Human', 'assistant': 'Assistant', 'gpt': 'Assistant', 'system': 'System'}
ASSISTANT = '\n\nAssistant:'


def text_of(record, key):
    """record[key], which must be a string with something in it."""
    if key not in record:
        raise InputError(f"no {key!r}; the record's keys are {', '.join(map(short, record))[:200] or 'none'}")
    if not isinstance(record[key], str):
        raise InputError(f'{key!r} is of type {type(record[key]).__name__}, not a string')
    if not record[key].strip():
        raise InputError(f'{key!r} is empty or blank')
    return record[key]


def number_of(record, key, most=sys.float_info.max):
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= most:
        raise InputError(f'{key!r} is {short(value)}, not a finite number')
    return float(value)


def write_chat(messages, key):
    """[{role, content}, ...] -> '\\n\\nHuman: ...\\n\\nAssistant: ...', the one template here."""
    out = ''
    for m in messages:
        role, content = (m.get('role'), m.get('content')) if isinstance(m, dict) else (m, None)
        if not (isinstance(role, str) and role in ROLES and isinstance(content, str)):
            raise InputError(f'{key!r}: a message needs a content and a role (system, user or assistant), '
                             f'not {short(role)} with a content of type {type(content).__name__}')
        out += f'\n\n{ROLES[role]}: {content}'
    return out


def split_chats(record):
    """Chosen and rejected as lists of messages; the prompt a list, a string, or what the two share."""
    chats = [record.get('chosen'), record.get('rejected')]
    if not all(isinstance(chat, list) and chat for chat in chats):
        raise InputError("'chosen' and 'rejected' must both be lists of messages, or both strings")
    prompt, shared = record.get('prompt'), 0
    if isinstance(prompt, list):
        shared = len(prompt) if all(chat[:len(prompt)] == prompt for chat in chats) else 0
    else:
        while shared < min(map(len, chats)) - 1 and chats[0][shared] == chats[1][shared]:
            shared += 1
        prompt = chats[0][:shared] or [{'role': 'user', 'content': text_of(record, 'prompt')}]
    prompt_text, responses = write_chat(prompt, 'prompt') + ASSISTANT, []
    if not any(m['content'].strip() for m in prompt):
        raise InputError("'prompt' is empty or blank")
    for key, chat in zip(('chosen', 'rejected'), chats):
        text, answer = write_chat(chat[shared:], key), chat[shared:]
        if not answer or any(ROLES[m['role']] != 'Assistant' or not m['content'].strip()
                             for m in (answer[0], answer[-1])):
            raise InputError(f"{key!r}: what follows the prompt must begin and end with an assistant's "
                             'message that is not blank')
        responses.append(text.removeprefix(ASSISTANT))
    return prompt_text, responses


def split_transcripts(chosen, rejected):
    """Two whole transcripts: the prompt is what they share, cut after its last 'Assistant:'. With notes."""
    at = chosen.rfind(ASSISTANT, 0, len(os.path.commonprefix([chosen, rejected])))
    if at < 0:
        raise InputError("no 'prompt', and 'chosen' and 'rejected' share nothing up to an 'Assistant:'")
    at += len(ASSISTANT)
    responses = [chosen[at:], rejected[at:]]
    early = any(turn in r for r in responses for turn in ('\n\nHuman:', ASSISTANT))
    notes = ['transcripts that part before their last turn'] * early
    notes += ['transcripts with a blank last turn'] * any(not r.strip() for r in responses)   # HH has a few
    return chosen[:at], responses, notes


def read_record(record, template='', label_from_scores=False):
    """A record of any shape -> (prompt, responses with the best first, p, notes, which are counted).

    Raises InputError, which names the key that is missing, empty or of the wrong type.
    """
    if not isinstance(record, dict):
        raise InputError(f'a record is an object with keys, not a {type(record).__name__}')
    notes = []
    if isinstance(record.get('chosen'), list) or isinstance(record.get('rejected'), list):
        prompt, responses = split_chats(record)
    elif 'prompt' not in record and 'instruction' not in record and 'rejected' in record:
        prompt, responses, notes = split_transcripts(text_of(record, 'chosen'), text_of(record, 'rejected'))
    else:
        if 'instruction' in record and 'prompt' not in record:
            prompt, template = text_of(record, 'instruction'), 'chat'
            prompt += '\n' + text_of(record, 'input') if record.get('input') else ''
        else:
            prompt = text_of(record, 'prompt')
        if record.get('responses') is not None:
            if not isinstance(record['responses'], list) or not record['responses']:
                raise InputError(f"'responses' is {short(record['responses'])}, not a list, best first")
            responses = [text_of({'responses': r}, 'responses') for r in record['responses']]
        else:
            responses = [text_of(record, key) for key in ('chosen', 'rejected')[:1 + ('rejected' in record)]]
        if template == 'chat':
            prompt, responses = f'\n\nHuman: {prompt}{ASSISTANT}', [' ' + r for r in responses]

    p = number_of(record, 'p') if record.get('p') is not None else 1.0
    if not 0 <= p <= 1:
        raise InputError(f"'p' is {p}, not a probability")
    keys = ('chosen_score', 'rejected_score')
    if 'score_chosen' in record:    # UltraFeedback's names
        keys = ('score_chosen', 'score_rejected')
    scores = [number_of(record, k) for k in keys if record.get(k) is not None]
    if len(scores) == 1 or (label_from_scores and not scores):
        raise InputError(f"{keys[0]!r} and {keys[1]!r} go together, and one is missing")
    if scores and scores[0] < scores[1]:
        notes.append('records whose rejected response has the higher score')
    if label_from_scores:
        p = 1 / (1 + math.exp(min(700.0, scores[1] - scores[0])))    # Bradley-Terry
    return prompt, responses, p, notes


# ----------------------------------------------------------------------------------------------------------
# Sources: anything -> a stream of (where it stands, raw record), the whole of it never in memory


def read_lines(path):
    """A .jsonl or .jsonl.gz file: (its line, bytes), blank lines passed over."""
    name, line = os.path.basename(path), 0
    try:
        with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as f:
            while raw := f.readline(MAX_LINE):
                line += 1
                if len(raw) == MAX_LINE:
                    raise InputError(f'{name} line {line}: longer than {MAX_LINE // 2**20} MiB; '
                                     'one record per line expected')
                if raw.strip():
                    yield f'{name} line {line}', raw
    except (EOFError, OSError, zlib.error) as e:
        raise InputError(f'{name}: cannot be read beyond line {line} ({first_line(e)})')


def read_list(path):
    """A .json file that is one list: (its record, bytes), found a block at a time."""
    name, count = os.path.basename(path), 0
    decode, space = json.JSONDecoder().raw_decode, re.compile(r'[\s,]*')
    try:
        with open(path, encoding='utf-8') as f:
            text, at = f.read(CHUNK).lstrip(), 1
            if not text.startswith('['):
                raise InputError(f'{name}: a .json file must be one list of records, and this one begins '
                                 f'{text[:8]!r}; one record per line is .jsonl')
            while not text.startswith(']', at := space.match(text, at).end()):
                try:
                    end = decode(text, at)[1]
                except (ValueError, RecursionError) as e:     # perhaps only cut by the block's end
                    block = f.read(CHUNK)
                    if len(text) - at > MAX_LINE:
                        raise InputError(f'{name} record {count + 1}: longer than '
                                         f'{MAX_LINE // 2**20} MiB, or not valid JSON')
                    if not block:
                        why = getattr(e, 'msg', e)
                        raise InputError(f'{name} record {count + 1}: not valid JSON ({why})')
                    text, at = text[at:] + block, 0
                else:
                    raw, at, count = text[at:end], end, count + 1
                    yield f'{name} record {count}', raw.encode()
            if (text[at + 1:] + f.read(CHUNK)).strip():
                raise InputError(f'{name}: goes on after the list has ended, with record {count}')
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f'{name}: cannot be read beyond record {count} ({first_line(e)})')


def read_parquet(path):
    from pyarrow.parquet import ParquetFile
    name, count = os.path.basename(path), 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=256):
            for record in batch.to_pylist():
                count += 1
                yield f'{name} record {count}', record
    except Exception as e:    # Arrow's, and Python's own for text or dates that it cannot hold
        raise InputError(f'{name}: cannot be read beyond record {count} ({first_line(e)})')


def read_hub(source, split):
    """owner/name or owner/name:subset of the hub, streamed. HH's subsets are folders, others' are named."""
    import datasets
    name, _, subset = source.partition(':')
    where = {'data_dir': subset or None} if name == 'Anthropic/hh-rlhf' else {'name': subset or None}
    try:
        if not split:
            splits = datasets.get_dataset_split_names(name, subset or None) if 'name' in where else ['train']
            split = 'train_prefs' if 'train_prefs' in splits else 'train'
        for count, record in enumerate(datasets.load_dataset(name, split=split, streaming=True, **where)):
            yield f'{source} {split} record {count + 1}', record
    except Exception as e:    # no network, no such data set, no such split: errors that share no class
        raise InputError(f'{source}: no such file, and the hub did not give it ({first_line(e)})')


def read_source(source, split=''):
    """A path or a hub name -> a stream of (where, raw); raw is bytes of JSON, or an object already parsed."""
    readers = {'.jsonl': read_lines, '.jsonl.gz': read_lines, '.json': read_list, '.parquet': read_parquet}
    for ending, reader in readers.items():
        if source.endswith(ending):
            if not os.path.isfile(source):
                raise InputError(f'{source}: no such file')
            if split:
                raise InputError(f'split: {split!r} is for data sets of the hub, and {source} is a file')
            return reader(source)
    if os.path.exists(source) or source.count('/') != 1:
        raise InputError(f'{source}: neither a {", ".join(readers)} file, nor prepared data, nor '
                         'owner/name of the hub')
    return read_hub(source, split)


def source_of(cfg):
    """cfg.dataset; or, where that is 'demo', the file that demo.py makes."""
    if cfg.dataset != 'demo':
        return cfg.dataset
    import demo    # imported here: it needs the model, which needs this file
    return demo.pairs_file(cfg)


def unique_keys(pairs):
    record = dict(pairs)
    if len(record) < len(pairs):
        key = next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
        raise InputError(f'the key {short(key)} stands twice')
    return record


def parse(raw):
    """raw -> an object; bytes must be JSON in UTF-8."""
    if not isinstance(raw, bytes):
        return raw
    try:
        return json.loads(raw.decode('utf-8'), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as e:
        raise InputError(f'not valid UTF-8 ({e.reason} at byte {e.start})')
    except json.JSONDecodeError as e:
        raise InputError(f'not valid JSON ({e.msg.removesuffix(" at")} at character {e.pos + 1})')
    except InputError:    # of unique_keys
        raise
    except (ValueError, RecursionError) as e:    # thousands of digits, or of brackets
        raise InputError(f'not valid JSON ({e})')


# ----------------------------------------------------------------------------------------------------------
# Text -> tokens, in chunks of records, in as many processes as there are cores


def index_dtype(K):
    """A row of the table: where a pair's tokens begin, its record's number in the source, labels, lengths."""
    return np.dtype([('offset', '<u8'), ('id', '<u8'), ('p', '<f4'), ('margin', '<f4'),
                     ('prompt', '<u4'), ('responses', '<u4', (K,))])


def encode(tokenizer, text, key):
    """Text as text: '<|endoftext|>' inside it becomes ordinary tokens, never the special one."""
    try:
        text.encode('utf-8')
    except UnicodeEncodeError:
        raise InputError(f'{key!r} holds a lone surrogate, which is no character')
    return tokenizer.encode_to_numpy(text, disallowed_special=())


def truncate(prompt, responses, cfg):
    """Token arrays -> (prompt, responses, notes). The prompt loses its start, a response its end (and with it
    the end of text), or the pair is dropped: responses None."""
    notes = []
    if len(prompt) > cfg.max_prompt_length:
        prompt = prompt[len(prompt) - cfg.max_prompt_length:]
        notes.append('prompts that lost their start')
    room = cfg.max_length - len(prompt)
    if max(map(len, responses)) > room:
        if cfg.truncation == 'drop':
            return prompt, None, ['dropped: a response did not fit']
        responses = [r[:room] for r in responses]
        notes.append('pairs with a response that lost its end')
        if len(responses) > 1 and len({r.tobytes() for r in responses}) == 1:
            return prompt, None, [*notes, 'dropped: identical once cut']
    return prompt, responses, notes


def encode_pair(record, tokenizer, cfg):
    """-> (prompt's tokens, responses' tokens, p, hashes of prompt and pair, notes on what happened); the
    responses are None where the pair is dropped."""
    prompt, texts, p, notes = read_record(record, cfg.template, cfg.label_from_scores)
    names = ('chosen', 'rejected') if len(texts) <= 2 else ('responses',) * len(texts)
    tokens = encode(tokenizer, prompt, 'prompt')
    responses = [np.append(encode(tokenizer, t, name), tokenizer.eot_token) for t, name in zip(texts, names)]
    hashes = [hashlib.blake2b(text.encode(), digest_size=8).digest()
              for text in (prompt, '\0'.join([prompt, *texts]))]
    if len(set(texts)) == 1 < len(texts):
        return tokens, None, p, hashes, [*notes, 'dropped: chosen and rejected identical']
    tokens, responses, cut = truncate(tokens, responses, cfg)
    return tokens, responses, p, hashes, notes + cut


# What decides the prepared files; the same fields, with their meaning, stand in train.py's Config.
SETTINGS = ('dataset', 'split', 'tokenizer', 'template', 'max_length', 'max_prompt_length', 'truncation',
            'val_fraction', 'bad_records', 'label_from_scores')
FILES = ('train.bin', 'train.idx', 'val.bin', 'val.idx')
HASHES = 'hashes.tmp'   # of every pair, 8 bytes each, until the duplicates are counted


def encode_chunk(chunk, cfg, K=None):
    """[(id, where, raw), ...] -> ({split: (tokens, table)}, hashes of the pairs, counts, first bad record).
    Runs in a worker. Every pair must have K responses; None: as many as the first has."""
    tokenizer = get_tokenizer(cfg.tokenizer)
    parts = {'train': ([], []), 'val': ([], [])}
    counts, pair_hashes, first_bad = Counter(read=len(chunk)), [], ''
    for number, where, raw in chunk:
        try:
            record = parse(raw)
            prompt, responses, p, (prompt_hash, pair_hash), notes = encode_pair(record, tokenizer, cfg)
            margin = number_of(record, 'margin', 3e38) if record.get('margin') is not None else 0.0
            K = K or (responses and len(responses))
            if responses and len(responses) != K:
                raise InputError(f'{len(responses)} responses, where the records before have {K}')
        except InputError as e:
            if cfg.bad_records != 'skip':
                raise InputError(f'{where}: {e} (--bad_records=skip leaves such records out)')
            counts['dropped: bad records'] += 1
            first_bad = first_bad or f'{where}: {e}'
            continue
        counts.update(notes)
        pair_hashes.append(pair_hash)
        if responses:
            split = 'val' if int.from_bytes(prompt_hash, 'big') < cfg.val_fraction * 2**64 else 'train'
            tokens, rows = parts[split]
            tokens += [prompt, *responses]
            rows.append((0, number, p, margin, len(prompt), [len(r) for r in responses]))
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    return {split: (np.concatenate(tokens).astype(dtype), np.array(rows, dtype=index_dtype(K)))
            for split, (tokens, rows) in parts.items() if rows}, b''.join(pair_hashes), counts, first_bad


def chunks_of(source):
    chunk, size = [], 0
    for number, (where, raw) in enumerate(source):
        chunk.append((number, where, raw))
        size += len(raw) if isinstance(raw, bytes) else 2000
        if size > CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def in_parallel(chunks, cfg):
    """encode_chunk of every chunk, in order, with no more of them in memory than keep the cores busy."""
    K = None
    for chunk in chunks:            # in this process, until there is a pair: all others must be like it
        result = encode_chunk(chunk, cfg)
        yield result
        K = next((table['responses'].shape[1] for _, table in result[0].values()), None)
        if K:
            break
    first = list(itertools.islice(chunks, 2))
    chunks = itertools.chain(first, chunks)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    if len(first) < 2 or workers == 1:
        yield from (encode_chunk(chunk, cfg, K) for chunk in chunks)
        return
    fork = multiprocessing.get_context('fork' if sys.platform == 'linux' else 'spawn')
    with ProcessPoolExecutor(workers, fork, initializer=leave_signals) as pool:
        try:
            with signals_held():
                pool.submit(int)    # starts the workers
            pending = deque()
            for chunk in chunks:
                pending.append(pool.submit(encode_chunk, chunk, cfg, K))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise InputError('a process that encodes records was killed, perhaps for want of memory')
        finally:
            pool.shutdown(cancel_futures=True)


def leave_signals():
    """A worker: Ctrl-C, which all processes get, is for the first to act on; it ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def signals_held():
    """Ctrl-C and SIGTERM wait: Python drops an exception that comes, from their handlers, amid a fork."""
    came = []
    handlers = [(s, signal.signal(s, lambda number, frame: came.append(number)))
                for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for s, handler in handlers:
            signal.signal(s, handler)
    for number in came[:1]:
        signal.raise_signal(number)


def prepare(cfg):
    """Make the token files of cfg.dataset, unless they are there, and return their folder.

    `cfg` has the fields in SETTINGS, and data_dir. Raises InputError at a bad record; nothing is left behind.
    """
    if os.path.exists(os.path.join(cfg.dataset, 'meta.json')):      # prepared before, given by its folder
        return cfg.dataset
    source = source_of(cfg)
    stream = read_source(source, cfg.split)                         # says at once that there is none
    settings = {name: getattr(cfg, name) for name in SETTINGS}
    stamp = stamp_of(source)
    key = hashlib.sha256(json.dumps([FORMAT, settings, stamp], sort_keys=True).encode()).hexdigest()[:8]
    stem = os.path.basename(cfg.dataset.rstrip('/')).split('.')[0].replace(':', '-')
    folder = os.path.join(cfg.data_dir, f'{stem}-{key}')
    if os.path.exists(os.path.join(folder, 'meta.json')):
        return folder

    print(f'preparing {cfg.dataset} -> {folder}')
    part, ours = f'{folder}.part-{os.getpid()}-{time.time_ns()}', None      # renamed when whole
    try:
        os.makedirs(part)
        ours = hold(part)                                           # until this process ends, however it does
        for left in glob.glob(glob.escape(folder) + '.part-*'):     # by one that was killed
            if left != part and (free := hold(left)):
                shutil.rmtree(left, ignore_errors=True)
                os.close(free)
        write_files(stream, part, settings)
        if stamp_of(source) != stamp:
            raise InputError(f'{source}: changed while it was read')
        if not os.path.exists(os.path.join(folder, 'meta.json')):   # or another process was faster
            os.rename(part, folder)
    except BrokenPipeError:                                         # of what reads our report, not the folder
        raise
    except OSError as e:
        raise InputError(f'{folder}: cannot be written ({first_line(e)})')
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if ours:
            os.close(ours)
    return folder


def hold(folder):
    """Lock a folder. -> its file descriptor, or None where another process has it, or it is gone"""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError:
        os.close(descriptor)


def stamp_of(source):
    return [os.stat(source).st_size, os.stat(source).st_mtime_ns] if os.path.isfile(source) else []


def write_files(stream, part, settings):
    """The stream's records, encoded, into the folder `part`; prints what became of them."""
    cfg = SimpleNamespace(**settings)
    counts, kept, tokens_kept, first_bad, longest_pair = Counter(), Counter(), Counter(), '', 0
    lengths = [Counter(), Counter(), Counter()]            # of the prompts, the best and the worst responses
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(os.path.join(part, name), 'wb')) for name in (*FILES, HASHES)}
        bar = stack.enter_context(tqdm(unit=' pairs', disable=None, leave=False))
        for parts, more_hashes, more, bad in in_parallel(chunks_of(stream), cfg):
            counts.update(more)
            bar.update(more['read'])
            files[HASHES].write(more_hashes)
            first_bad = first_bad or bad
            for split, (tokens, table) in parts.items():
                K, sizes = table['responses'].shape[1], table['prompt'] + table['responses'].sum(1)
                longest_pair = max(longest_pair, int(sizes.max()))
                for counter, column in zip(lengths, (table['prompt'], *table['responses'].T[[0, -1]])):
                    counter.update(column.tolist())
                table['offset'] = tokens_kept[split] + np.cumsum(sizes) - sizes
                kept[split] += len(table)
                tokens_kept[split] += len(tokens)
                files[f'{split}.bin'].write(tokens)
                files[f'{split}.idx'].write(table)
    if first_bad:
        counts[f'dropped: bad records, the first of them {first_bad}'] = counts.pop('dropped: bad records')
    if not kept:
        what = ''.join(f'; {n} {note}' for note, n in counts.items() if note.startswith('dropped'))
        raise InputError(f'{cfg.dataset}: no pair is left of {counts["read"]} records{what}')
    tokenizer, duplicates = get_tokenizer(cfg.tokenizer), count_duplicates(os.path.join(part, HASHES))
    meta = dict(format=FORMAT, settings=settings, n_vocab=tokenizer.n_vocab, eos=tokenizer.eot_token,
                token_bytes=2 if tokenizer.n_vocab <= 2**16 else 4, responses=K,
                longest_pair=longest_pair, duplicates=duplicates, counts=counts,
                pairs=dict(train=0, val=0) | kept, tokens=dict(train=0, val=0) | tokens_kept,
                sha256={name: file_hash(os.path.join(part, name)) for name in FILES})
    with open(os.path.join(part, 'meta.json'), 'w', encoding='utf-8') as f:
        json.dump(meta | dict(seal=seal(meta)), f, indent=1)
    print(report(meta, lengths))


def count_duplicates(path):
    """How many of a file's 8-byte hashes stand in it already; it is sorted on the disk, and removed."""
    hashes, found = np.memmap(path, '<u8', mode='r+'), 0
    hashes.sort()
    for i in range(0, len(hashes), 2**20):
        block = hashes[i:i + 2**20 + 1]
        found += int((block[1:] == block[:-1]).sum())
    os.remove(path)
    return found


def report(meta, lengths):
    """What became of the records: a table of what was read, kept, cut, dropped, and of the lengths left."""
    counts, pairs = dict(meta['counts']), meta['pairs']
    lines = [f'{counts.pop("read"):>9,} records read',
             f'{sum(pairs.values()):>9,} kept: {pairs["train"]:,} to train on, {pairs["val"]:,} to validate, '
             f'{sum(meta["tokens"].values()):,} tokens']
    lines += [f'{n:>9,} {what}' for what, n in sorted(counts.items())]
    lines += [f'{meta["duplicates"]:>9,} exact duplicates of another record (kept)']
    percents = (0, 50, 90, 99, 100)
    lines += [f'{"tokens":>9}  ' + ''.join(f'{f"{q}%":>7}' for q in percents)]
    names = ('prompt', 'chosen', 'rejected') if meta['responses'] <= 2 else ('prompt', 'best', 'worst')
    for name, counter in list(zip(names, lengths))[:1 + meta['responses']]:
        values = sorted(counter)
        ranks = np.cumsum([counter[value] for value in values])
        row = [values[np.searchsorted(ranks, -(-q * ranks[-1] // 100))] for q in percents]
        lines.append(f'{name:>9}  ' + ''.join(f'{value:>7}' for value in row))
    return '\n'.join(lines)


# ----------------------------------------------------------------------------------------------------------
# Reading the files back


def file_hash(path):
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def seal(meta):
    """A hash of what meta.json says: edited by hand, it would no longer fit the tokens."""
    rest = {key: value for key, value in meta.items() if key != 'seal'}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_meta(folder):
    """meta.json of prepared data. Raises InputError where it is missing, not ours, or was edited."""
    path = os.path.join(folder, 'meta.json')
    try:
        with open(path, encoding='utf-8') as f:
            meta = json.load(f)
        number, whole = meta['format'], meta.get('seal') == seal(meta)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        raise InputError(f'{path}: not the meta.json of prepared data ({first_line(e)})')
    if number != FORMAT:
        raise InputError(f'{path}: format {number}, this version reads {FORMAT}; delete the folder')
    if not whole:
        raise InputError(f'{path}: changed since it was prepared; delete the folder')
    return meta


class Pairs:
    """One split of prepared data, mapped into memory. pairs[i] -> (prompt, [response, ...]): token ids."""

    def __init__(self, folder, split):
        self.folder, self.split, self.meta = folder, split, read_meta(folder)
        self.table = self.map_file(f'{split}.idx', index_dtype(self.meta['responses']))
        self.tokens = self.map_file(f'{split}.bin', '<u2' if self.meta['token_bytes'] == 2 else '<u4')
        self.stamps = {path: stamp_of(path) for path in (os.path.join(folder, f'{split}.{kind}')
                                                         for kind in ('bin', 'idx'))}
        self.hash = ''.join(self.meta['sha256'][f'{split}.{kind}'][:16] for kind in ('bin', 'idx'))

    def map_file(self, name, dtype):
        """Checked first: reading a gigabyte takes a second, and training on changed data takes the run."""
        path = os.path.join(self.folder, name)
        if not os.path.isfile(path) or file_hash(path) != self.meta['sha256'][name]:
            raise InputError(f'{path}: missing, or changed since it was prepared; delete the folder')
        return np.memmap(path, dtype, mode='r') if os.path.getsize(path) else np.zeros(0, dtype)

    def check_unchanged(self):
        """Raise InputError where the mapped files have changed since they were opened."""
        for path, stamp in self.stamps.items():
            if stamp_of(path) not in (stamp, []):          # deleted, it still is what it was to us
                raise InputError(f'{path}: changed while it was in use; nothing was written after that')

    def __len__(self):
        return len(self.table)

    def __getitem__(self, i):
        row = self.table[i]
        ends = int(row['offset']) + np.cumsum([row['prompt'], *row['responses']])
        prompt = self.tokens[int(row['offset']):ends[0]]
        return prompt, [self.tokens[a:b] for a, b in zip(ends, ends[1:])]


# ----------------------------------------------------------------------------------------------------------
# The command


def show(cfg, n):
    """Print the first n records as training will see them: `|` where a response begins, what was cut."""
    source = read_source(source_of(cfg), cfg.split)      # says at once that there is none
    tokenizer = get_tokenizer(cfg.tokenizer)
    for where, raw in itertools.islice(source, n):
        try:
            prompt, responses, p, _, notes = encode_pair(parse(raw), tokenizer, cfg)
        except InputError as e:
            if cfg.bad_records != 'skip':
                raise InputError(f'{where}: {e} (--bad_records=skip leaves such records out)')
            print(f'--- {where}; left out: {e}')
            continue
        print('; '.join([f'--- {where}', *[f'p = {p:.3f}'] * (p != 1), *notes]))
        responses = responses or []
        for name, r in zip(('chosen', 'rejected') if len(responses) <= 2 else itertools.count(1), responses):
            text = [tokenizer.decode(t.tolist()) for t in (prompt, r)]
            print(f'{name}: {text[0]!r} | {text[1]!r}')
            print(f'    {len(prompt)} prompt tokens, no loss; {len(r)} response tokens, scored'
                  + ('' if r[-1] == tokenizer.eot_token else '; cut, so no end of text'))


def main(argv):
    import train   # imported here: it imports this file; it knows the config
    shown = [a.removeprefix('--show=') for a in argv if a.startswith('--show=')]
    argv = [a for a in argv if not a.startswith('--show=')]
    if not argv or argv[0].startswith('-'):
        raise InputError('usage: python prepare.py CONFIG_OR_SOURCE [--show=N] [--name=value ...]')
    if not all(n.isdecimal() for n in shown):
        raise InputError(f'command line: --show={shown[0]} is not a number of records')
    if argv[0] == 'demo':    # its records come from a model, which that config names
        argv[0] = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'config', 'dpo_demo.py')
    if not argv[0].endswith('.py'):
        argv = [f'--dataset={argv[0]}', *argv[1:]]
    cfg = train.load_config(argv)
    if shown:
        show(cfg, int(shown[0]))
    else:
        print(prepare(cfg))


if __name__ == '__main__':
    import prepare   # by its name, as train.py imports it: one module, one InputError
    import train
    train.run(prepare.main, __doc__, sys.argv[1:])
