"""
Preference pairs, from anywhere, to token files that train.py maps into memory.

    python prepare.py Anthropic/hh-rlhf:harmless-base     # the hub; a subset after the colon
    python prepare.py my_pairs.jsonl.gz --show=3          # look first, write nothing
    python prepare.py config/dpo_gpt2.py --max_length=512 # with a config's settings; train.py does this by itself

Sources: `demo`; a local .jsonl, .jsonl.gz, .json (one list) or .parquet file; any data set of the hub.
Records, told apart by their keys:

    {"prompt": "...", "chosen": "...", "rejected": "..."}        strings, taken byte for byte
    {"chosen": "\\n\\nHuman: ...", "rejected": "\\n\\nHuman: ..."}     transcripts: the prompt is what they share
    {"chosen": [{"role": ..., "content": ...}, ...], "rejected": [...]}        chats, with or without "prompt"
    {"instruction": "...", "input": "...", "chosen": "...", "rejected": "..."}  Alpaca
    {"prompt": "...", "responses": ["best", ..., "worst"]}       a ranking of K
    {"prompt": "...", "chosen": "..."}                           no comparison: for loss = 'sft' alone

and with any of them "p", the probability that chosen is better, or "chosen_score" and "rejected_score".

Written to data/NAME-KEY/ (KEY: a hash of the settings), each split as tokens end to end and a table of where they
are, plus meta.json. Nothing is cleaned: a bad record stops the run with its line number (or is left out and counted:
--bad_records=skip), and what truncation costs is printed.
Left out: cleaning, deduplication, mixing of sources, chat templates of other models.
"""
import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import sys
import zlib
from collections import Counter, deque
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

FORMAT = 1              # of the files written; another number means they are not readable here
END = '<|endoftext|>'
MAX_LINE = 8 * 2**20    # bytes: more than that is not a record but a file of another kind
CHUNK = 2**20           # bytes of records that one worker takes at a time


class InputError(ValueError):
    """What a user can mend: a file, a key, a value. The message is one line; the commands print it and exit with 1."""


# ----------------------------------------------------------------------------------------------------------------
# Tokenizers


@functools.cache
def get_tokenizer(name):
    """'byte' (256 bytes and the end of text, built in), or any of tiktoken's: gpt2, cl100k_base, ..."""
    import tiktoken
    if name == 'byte':
        return tiktoken.Encoding('byte', pat_str=r'[\s\S]{1,400}', mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={END: 256})
    if name not in tiktoken.list_encoding_names():
        raise InputError(f'tokenizer: {name!r} is not one of byte, {", ".join(tiktoken.list_encoding_names())}')
    try:
        return tiktoken.get_encoding(name)
    except Exception as e:    # whatever the download raised
        raise InputError(f'tokenizer: the tables of {name!r} could not be had ({str(e)[:120]}); '
                         'set TIKTOKEN_CACHE_DIR to a folder that holds them')


# ----------------------------------------------------------------------------------------------------------------
# Records: any shape -> (prompt, [chosen, rejected], p)

ROLES = {'user': 'Human', 'human': 'Human', 'assistant': 'Assistant', 'gpt': 'Assistant', 'system': 'System'}
ASSISTANT = '\n\nAssistant:'


def text_of(record, key):
    """record[key], which must be a string with something in it."""
    if key not in record:
        raise InputError(f"no {key!r}; the record's keys are {', '.join(sorted(map(str, record)))}")
    if not isinstance(record[key], str):
        raise InputError(f'{key!r} is of type {type(record[key]).__name__}, not a string')
    if not record[key].strip():
        raise InputError(f'{key!r} is empty or blank')
    return record[key]


def number_of(record, key):
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f'{key!r} is {value!r}, not a finite number')
    return float(value)


def write_chat(messages, key):
    """[{role, content}, ...] -> '\\n\\nHuman: ...\\n\\nAssistant: ...', the one template here, in HH's own form."""
    out = ''
    for m in messages:
        if not isinstance(m, dict) or m.get('role') not in ROLES or not isinstance(m.get('content'), str):
            role = m.get('role') if isinstance(m, dict) else m
            raise InputError(f'{key!r}: a message needs a content and a role (system, user or assistant), not {role!r}')
        out += f'\n\n{ROLES[m["role"]]}: {m["content"]}'
    return out


def split_chats(record):
    """Chosen and rejected as lists of messages; the prompt explicit (a list or a string), or what the two share."""
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
    responses = []
    for key, chat in zip(('chosen', 'rejected'), chats):
        text, ends = write_chat(chat[shared:], key), [chat[shared:][i:][:1] for i in (0, -1)]
        for end in ends:    # the first and the last message
            if not end or ROLES[end[0]['role']] != 'Assistant' or not end[0]['content'].strip():
                raise InputError(f'{key!r}: after the prompt must come, first and last, an assistant\'s message, not blank')
        responses.append(text.removeprefix(ASSISTANT))
    return write_chat(prompt, 'prompt') + ASSISTANT, responses


def split_transcripts(chosen, rejected):
    """Two whole transcripts: the prompt is what they share, cut after its last 'Assistant:'. -> also notes."""
    at = chosen.rfind(ASSISTANT, 0, len(os.path.commonprefix([chosen, rejected])))
    if at < 0:
        raise InputError("no 'prompt', and 'chosen' and 'rejected' are not transcripts that share an '\\n\\nAssistant:'")
    at += len(ASSISTANT)
    responses = [chosen[at:], rejected[at:]]
    notes = ['transcripts that part before their last turn'] * any('\n\nHuman:' in r for r in responses)
    notes += ['transcripts with a blank last turn'] * any(not r.strip() for r in responses)   # 4 of HH's 2,312
    return chosen[:at], responses, notes


def read_record(record, template='', label_from_scores=False):
    """One record of any shape -> (prompt, responses, p, notes): strings, best response first; notes are counted.

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
        if isinstance(record.get('responses'), list):
            responses = [text_of({'responses': r}, 'responses') for r in record['responses']]
        else:
            responses = [text_of(record, key) for key in ('chosen', 'rejected')[:1 + ('rejected' in record)]]
        if template == 'chat':
            prompt, responses = f'\n\nHuman: {prompt}{ASSISTANT}', [' ' + r for r in responses]

    p = number_of(record, 'p') if record.get('p') is not None else 1.0
    if not 0 <= p <= 1:
        raise InputError(f"'p' is {p}, not a probability")
    scores = [number_of(record, key) for key in ('chosen_score', 'rejected_score') if record.get(key) is not None]
    if len(scores) == 1 or (label_from_scores and not scores):
        raise InputError("'chosen_score' and 'rejected_score' go together, and one is missing")
    if scores and scores[0] < scores[1]:
        notes.append('records whose rejected response has the higher score')
    if label_from_scores:
        p = 1 / (1 + math.exp(min(700.0, scores[1] - scores[0])))    # Bradley-Terry
    return prompt, responses, p, notes


# ----------------------------------------------------------------------------------------------------------------
# Sources: anything -> a stream of (where it stands, raw record), the whole of it never in memory


def read_lines(path):
    """A .jsonl or .jsonl.gz file: (its line, bytes), blank lines passed over."""
    name = os.path.basename(path)
    line = 0
    try:
        with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as f:
            while raw := f.readline(MAX_LINE):
                line += 1
                if line == 1 and raw.startswith(b'\xef\xbb\xbf'):
                    raise InputError(f'{name}: begins with a byte-order mark; save it as UTF-8 without one')
                if len(raw) == MAX_LINE:
                    raise InputError(f'{name} line {line}: longer than {MAX_LINE // 2**20} MiB; one record per line expected')
                if raw.strip():
                    yield f'{name} line {line}', raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise InputError(f'{name}: the gzip data breaks off or is damaged after line {line} ({e})')


def read_list(path):
    """A .json file that is one list: (its record, object), parsed a block at a time."""
    name, decoder, count = os.path.basename(path), json.JSONDecoder(object_pairs_hook=unique_keys), 0
    try:
        with open(path, encoding='utf-8') as f:
            text, at, more = f.read(CHUNK).lstrip(), 1, True
            if not text.startswith('['):
                raise InputError(f'{name}: a .json file must be one list of records; one record per line is .jsonl')
            while True:
                while at < len(text) and (text[at].isspace() or (text[at] == ',' and count)):
                    at += 1
                try:
                    if text[at:at + 1] == ']':
                        return
                    record, at = decoder.raw_decode(text, at)
                    count += 1
                    yield f'{name} record {count}', record
                except InputError as e:
                    raise InputError(f'{name} record {count + 1}: {e}')
                except json.JSONDecodeError as e:
                    block = f.read(CHUNK)
                    if not block or len(text) - at > MAX_LINE:
                        raise InputError(f'{name} record {count + 1}: not valid JSON ({e.msg})')
                    text, at = text[at:] + block, 0
    except UnicodeDecodeError as e:
        raise InputError(f'{name}: not valid UTF-8 after record {count} ({e.reason})')


def read_parquet(path):
    import pyarrow
    from pyarrow.parquet import ParquetFile
    name, count = os.path.basename(path), 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=256):
            for record in batch.to_pylist():
                count += 1
                yield f'{name} record {count}', record
    except (pyarrow.ArrowInvalid, OSError) as e:
        raise InputError(f'{name}: not a whole parquet file ({str(e).splitlines()[0][:120]})')


def read_hub(source, split):
    """owner/name or owner/name:subset of the hub, streamed. HH's subsets are folders, others' are configurations."""
    import datasets
    name, _, subset = source.partition(':')
    where = {'data_dir': subset or None} if name == 'Anthropic/hh-rlhf' else {'name': subset or None}
    try:
        if not split:
            splits = datasets.get_dataset_split_names(name, subset or None) if 'name' in where else ['train']
            split = 'train_prefs' if 'train_prefs' in splits else 'train'
        for count, record in enumerate(datasets.load_dataset(name, split=split, streaming=True, **where)):
            yield f'{source} {split} record {count + 1}', record
    except Exception as e:    # no network, no such data set, no such split: the library's errors share no class
        raise InputError(f'{source}: no such file, and the hub did not give it '
                         f'({type(e).__name__}: {str(e).strip().splitlines()[0][:160]})')


def read_source(source, split=''):
    """A stream of (where, raw) from a path or a hub name; raw is a line of bytes, or an object already parsed."""
    readers = {'.jsonl': read_lines, '.jsonl.gz': read_lines, '.json': read_list, '.parquet': read_parquet}
    for ending, reader in readers.items():
        if source.endswith(ending):
            if not os.path.isfile(source):
                raise InputError(f'{source}: no such file')
            if split:
                raise InputError(f'split: {split!r} is for data sets of the hub, and {source} is a file')
            return reader(source)
    if os.path.exists(source) or source.count('/') != 1:
        raise InputError(f'{source}: neither a {", ".join(readers)} file, nor prepared data, nor owner/name of the hub')
    return read_hub(source, split)


def unique_keys(pairs):
    record = dict(pairs)
    if len(record) < len(pairs):
        key = next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
        raise InputError(f'the key {key!r} stands twice')
    return record


def parse(where, raw):
    """raw -> an object; a line of bytes must be JSON in UTF-8."""
    if not isinstance(raw, bytes):
        return raw
    try:
        return json.loads(raw.decode('utf-8'), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as e:
        raise InputError(f'not valid UTF-8 ({e.reason} at byte {e.start})')
    except json.JSONDecodeError as e:
        raise InputError(f'not valid JSON ({e.msg} at column {e.colno})')
    except RecursionError:
        raise InputError('not valid JSON (nested too deeply)')


# ----------------------------------------------------------------------------------------------------------------
# Text -> tokens, in chunks of records, in as many processes as there are cores


def index_dtype(K):
    """A row of the table: where a pair's tokens begin, its record's number in the source, its label, its lengths."""
    return np.dtype([('offset', '<u8'), ('id', '<u8'), ('p', '<f4'), ('prompt', '<u4'), ('responses', '<u4', (K,))])


def encode(tokenizer, text, key):
    """Text as text: '<|endoftext|>' inside it becomes ordinary tokens, never the special one."""
    try:
        text.encode('utf-8')
    except UnicodeEncodeError:
        raise InputError(f'{key!r} holds a lone surrogate, which is no character')
    return tokenizer.encode_to_numpy(text, disallowed_special=())


def truncate(prompt, responses, cfg):
    """Token arrays -> (prompt, responses, what happened). The prompt loses its start, a response its end (and with it
    the end of text), or the pair is dropped."""
    cut = set()
    if len(prompt) > cfg.max_prompt_length:
        prompt = prompt[len(prompt) - cfg.max_prompt_length:]
        cut.add('prompts that lost their start')
    room = cfg.max_length - len(prompt)
    if max(map(len, responses)) > room:
        if cfg.truncation == 'drop':
            return prompt, None, {'dropped: a response did not fit'}
        responses = [r[:room] for r in responses]
        cut.add('pairs with a response that lost its end')
    return prompt, responses, cut


def encode_pair(record, tokenizer, cfg):
    """-> (prompt tokens, responses' tokens, p, hash of the prompt, hash of the pair, counts of what happened), the
    responses None where the pair is dropped."""
    prompt_text, texts, p, notes = read_record(record, cfg.template, cfg.label_from_scores)
    end = np.array([tokenizer.eot_token], dtype=np.uint32)
    names = ('chosen', 'rejected') if len(texts) <= 2 else ('responses',) * len(texts)
    prompt = encode(tokenizer, prompt_text, 'prompt')
    responses = [np.concatenate([encode(tokenizer, t, name), end]) for t, name in zip(texts, names)]
    counts = Counter(notes)
    keys = [hashlib.blake2b(part.encode(), digest_size=8).digest() for part in (prompt_text, '\0'.join([prompt_text, *texts]))]
    if len(texts) > 1 and len(set(texts)) == 1:
        counts['dropped: chosen and rejected identical'] += 1
        return prompt, None, p, *keys, counts
    prompt, cut_responses, cut = truncate(prompt, responses, cfg)
    counts.update(cut)
    if cut_responses and len(texts) > 1 and len({r.tobytes() for r in cut_responses}) == 1:
        counts['dropped: identical once cut'] += 1
        cut_responses = None
    return prompt, cut_responses, p, *keys, counts


# What decides the prepared files; the same fields, with their meaning, stand in train.py's Config.
SETTINGS = ('dataset', 'split', 'tokenizer', 'template', 'max_length', 'max_prompt_length', 'truncation',
            'val_fraction', 'bad_records', 'label_from_scores')


def encode_chunk(chunk, cfg):
    """[(id, where, raw), ...] -> ({split: (tokens, table)}, hashes of the pairs, counts). Runs in a worker."""
    tokenizer = get_tokenizer(cfg.tokenizer)
    parts = {'train': ([], []), 'val': ([], [])}
    counts, hashes, K = Counter(read=len(chunk)), [], None
    for number, where, raw in chunk:
        try:
            prompt, responses, p, prompt_hash, pair_hash, notes = encode_pair(parse(where, raw), tokenizer, cfg)
            K = K or (responses and len(responses))
            if responses and len(responses) != K:
                raise InputError(f'{len(responses)} responses, where the records before have {K}')
        except InputError as e:
            if cfg.bad_records == 'skip':
                counts['dropped: bad records (the first is: ' + f'{where}: {e})'] += 1
                continue
            raise InputError(f'{where}: {e}')
        counts.update(notes)
        hashes.append(pair_hash)
        if responses is not None:
            split = 'val' if int.from_bytes(prompt_hash, 'big') < cfg.val_fraction * 2**64 else 'train'
            tokens, rows = parts[split]
            tokens += [prompt, *responses]
            rows.append((0, number, p, len(prompt), [len(r) for r in responses]))
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    return {split: (np.concatenate(tokens).astype(dtype), np.array(rows, dtype=index_dtype(K)))
            for split, (tokens, rows) in parts.items() if rows}, b''.join(hashes), counts


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
    """encode_chunk over a stream of chunks, in order, with no more of them in memory than keep the cores busy."""
    first = [chunk for _, chunk in zip(range(2), chunks)]
    workers = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    if len(first) < 2 or workers == 1:
        for chunk in itertools.chain(first, chunks):
            yield encode_chunk(chunk, cfg)
        return
    get_tokenizer(cfg.tokenizer)    # once, before the workers fork and share it
    with multiprocessing.get_context('fork' if sys.platform == 'linux' else 'spawn').Pool(workers) as pool:
        pending = deque()
        for chunk in itertools.chain(first, chunks):
            pending.append(pool.apply_async(encode_chunk, (chunk, cfg)))
            if len(pending) > 2 * workers:
                yield pending.popleft().get()
        while pending:
            yield pending.popleft().get()


def prepare(cfg):
    """Make the token files of cfg.dataset, unless they are there, and return their folder.

    `cfg` has the fields in SETTINGS, and data_dir. Raises InputError at the first bad record; nothing is left behind.
    """
    if os.path.exists(os.path.join(cfg.dataset, 'meta.json')):      # prepared before, given by its folder
        return cfg.dataset
    source = demo_source(cfg) if cfg.dataset == 'demo' else cfg.dataset
    stream = read_source(source, cfg.split)                         # says at once where there is no such thing
    settings = {name: getattr(cfg, name) for name in SETTINGS}
    stamp = [os.stat(source).st_size, os.stat(source).st_mtime_ns] if os.path.isfile(source) else []
    key = hashlib.sha256(json.dumps([FORMAT, settings, stamp], sort_keys=True).encode()).hexdigest()[:8]
    stem = os.path.basename(cfg.dataset.rstrip('/')).split('.')[0].replace(':', '-')
    folder = os.path.join(cfg.data_dir, f'{stem}-{key}')
    if os.path.exists(os.path.join(folder, 'meta.json')):
        return folder

    print(f'preparing {cfg.dataset} -> {folder}')
    part = f'{folder}.part-{os.getpid()}'                           # renamed when whole
    os.makedirs(part)
    try:
        write_files(stream, part, settings, SimpleNamespace(**settings))
        os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return folder


def write_files(stream, part, settings, cfg):
    """The stream's records, encoded, into the folder `part`; prints what became of them."""
    counts, kept, tokens_kept = Counter(), Counter(), Counter()
    histogram = np.zeros((3, cfg.max_length + 1), dtype=np.int64)   # of the lengths of prompts, best and worst responses
    longest, K = 0, None
    bar = tqdm(unit=' pairs', disable=None, leave=False)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(os.path.join(part, name), 'wb'))
                 for name in ('train.bin', 'train.idx', 'val.bin', 'val.idx', 'hashes')}
        sums = {name: hashlib.sha256() for name in files}

        def write(name, data):
            files[name].write(data)
            sums[name].update(data)
        for parts, hashes, more in in_parallel(chunks_of(stream), cfg):
            counts.update(more)
            bar.update(more['read'])
            files['hashes'].write(hashes)
            for split, (tokens, table) in parts.items():
                lengths = np.column_stack([table['prompt'], table['responses']])       # (pairs, 1 + K)
                K = K or table['responses'].shape[1]
                if K != table['responses'].shape[1]:
                    raise InputError(f'{cfg.dataset}: some records have {K} responses and some {lengths.shape[1] - 1}')
                table['offset'] = tokens_kept[split] + np.concatenate([[0], np.cumsum(lengths.sum(1))])[:-1]
                for row, column in zip(histogram, (0, 1, -1)):
                    row += np.bincount(lengths[:, column], minlength=len(row))
                longest = max(longest, int(lengths.sum(1).max()))
                kept[split] += len(table)
                tokens_kept[split] += len(tokens)
                write(f'{split}.bin', tokens.tobytes())
                write(f'{split}.idx', table.tobytes())
    bar.close()
    hashes = np.memmap(os.path.join(part, 'hashes'), dtype='<u8', mode='r') if counts['read'] else np.zeros(0)
    duplicates = len(hashes) - len(np.unique(hashes))
    del hashes
    os.remove(os.path.join(part, 'hashes'))
    if not kept.total():
        raise InputError(f'{cfg.dataset}: no pair is left of {counts["read"]} records')
    tokenizer = get_tokenizer(cfg.tokenizer)
    meta = dict(format=FORMAT, settings=settings, responses=K, n_vocab=tokenizer.n_vocab, eos=tokenizer.eot_token,
                token_bytes=2 if tokenizer.n_vocab <= 2**16 else 4, longest_pair=longest,
                pairs={s: kept[s] for s in ('train', 'val')}, tokens={s: tokens_kept[s] for s in ('train', 'val')},
                duplicates=duplicates, counts=dict(counts), sha256={f: sums[f].hexdigest() for f in sums if f != 'hashes'})
    with open(os.path.join(part, 'meta.json'), 'w', encoding='utf-8') as f:
        json.dump(meta, f, indent=1)
    print(report(meta, histogram))


def report(meta, histogram):
    """What became of the records, as a table: what was read, kept, cut and dropped, and the lengths that remain."""
    counts = dict(meta['counts'])
    lines = [f'{counts.pop("read"):>9,} records read',
             f'{sum(meta["pairs"].values()):>9,} kept: {meta["pairs"]["train"]:,} to train on, {meta["pairs"]["val"]:,} to '
             f'validate, {sum(meta["tokens"].values()):,} tokens']
    lines += [f'{n:>9,} {what}' for what, n in sorted(counts.items())]
    lines += [f'{meta["duplicates"]:>9,} exact duplicates of another record (kept)']
    lines += [f'{"tokens":>9}  ' + ''.join(f'{f"{q}%":>7}' for q in (0, 50, 90, 99, 100))]
    names = ('prompt', 'chosen', 'rejected') if meta['responses'] == 2 else ('prompt', 'best', 'worst')
    for name, row in list(zip(names, histogram))[:1 + meta['responses']]:
        below = row.cumsum() / row.sum()
        lines.append(f'{name:>9}  ' + ''.join(f'{int((below < max(q / 100, 1e-12)).sum()):>7}' for q in (0, 50, 90, 99, 100)))
    return '\n'.join(lines)


def demo_source(cfg):
    import demo    # imported here: it needs the model, which needs this file
    return demo.pairs_file(cfg)


# ----------------------------------------------------------------------------------------------------------------
# Reading the files back


def read_meta(folder):
    """meta.json of prepared data. Raises InputError where it is missing, not ours, or does not fit the files."""
    path = os.path.join(folder, 'meta.json')
    try:
        with open(path, encoding='utf-8') as f:
            meta = json.load(f)
        if meta['format'] != FORMAT:
            raise InputError(f'{path}: format {meta["format"]}, this version reads {FORMAT}; delete the folder')
        for split in ('train', 'val'):
            row = index_dtype(meta['responses']).itemsize
            for name, size in ((f'{split}.bin', meta['tokens'][split] * meta['token_bytes']), (f'{split}.idx', meta['pairs'][split] * row)):
                found = os.path.getsize(os.path.join(folder, name))
                if found != size:
                    raise InputError(f'{os.path.join(folder, name)}: {found} bytes, {size} expected; delete the folder to prepare anew')
        return meta
    except (OSError, TypeError, KeyError, json.JSONDecodeError) as e:
        raise InputError(f'{path}: not the meta.json of prepared data ({type(e).__name__}: {e})')


class Pairs:
    """One split of prepared data, mapped into memory. pairs[i] -> (prompt, [response, ...]), arrays of token ids."""

    def __init__(self, folder, split, verify=True):
        meta = read_meta(folder)
        self.folder, self.split, self.meta = folder, split, meta
        if verify:   # reading a gigabyte takes a second; training on changed data takes the run
            for name in (f'{split}.bin', f'{split}.idx'):
                with open(os.path.join(folder, name), 'rb') as f:
                    if hashlib.file_digest(f, 'sha256').hexdigest() != meta['sha256'][name]:
                        raise InputError(f'{os.path.join(folder, name)}: changed since it was prepared; '
                                         'delete the folder to prepare anew')
        self.hash = meta['sha256'][f'{split}.bin'][:16] + meta['sha256'][f'{split}.idx'][:16]
        n, dtype = meta['pairs'][split], '<u2' if meta['token_bytes'] == 2 else '<u4'
        path = os.path.join(folder, split)
        row = index_dtype(meta['responses'])
        self.table = np.memmap(path + '.idx', dtype=row, mode='r') if n else np.zeros(0, row)
        self.tokens = np.memmap(path + '.bin', dtype=dtype, mode='r') if n else np.zeros(0, dtype)

    def __len__(self):
        return len(self.table)

    def __getitem__(self, i):
        row = self.table[i]
        ends = int(row['offset']) + np.cumsum([row['prompt'], *row['responses']])
        prompt = self.tokens[int(row['offset']):ends[0]]
        return prompt, [self.tokens[a:b] for a, b in zip(ends, ends[1:])]


# ----------------------------------------------------------------------------------------------------------------
# The command


def show(cfg, n):
    """Print the first n records as training will see them: `|` where the response begins, what was cut, the mask."""
    tokenizer = get_tokenizer(cfg.tokenizer)
    source = demo_source(cfg) if cfg.dataset == 'demo' else cfg.dataset
    for _, (where, raw) in zip(range(n), read_source(source, cfg.split)):
        try:
            prompt, responses, p, _, _, notes = encode_pair(parse(where, raw), tokenizer, cfg)
        except InputError as e:
            raise InputError(f'{where}: {e}')
        print(f'--- {where}' + (f', p = {p:.3f}' if p != 1 else '') + ''.join(f'; {note}' for note in notes))
        for name, r in zip(('chosen', 'rejected') if responses and len(responses) <= 2 else itertools.count(1), responses or ()):
            text = [tokenizer.decode(list(map(int, t))) for t in (prompt, r)]
            print(f'{name}: {text[0]!r} | {text[1]!r}')
            print(f'    {len(prompt)} prompt tokens, no loss; {len(r)} response tokens, scored'
                  + ('' if r[-1] == tokenizer.eot_token else '; cut, so no end of text'))


def main(argv):
    import train   # imported here: it imports this file; it knows the config
    n = [a for a in argv if a.startswith('--show=')]
    argv = [a for a in argv if not a.startswith('--show=')]
    if not argv or argv[0].startswith('-'):
        raise InputError('usage: python prepare.py CONFIG_OR_SOURCE [--show=N] [--name=value ...]')
    if not argv[0].endswith('.py'):
        argv = [f'--dataset={argv[0]}', *argv[1:]]
    cfg = train.load_config(argv)
    if n:
        show(cfg, int(n[0].removeprefix('--show=')) if n[0].removeprefix('--show=').isdigit() else 1)
    else:
        print(prepare(cfg))


if __name__ == '__main__':
    import prepare   # by its name, as train.py imports it: one module, one InputError
    try:
        prepare.main(sys.argv[1:])
    except prepare.InputError as e:
        sys.exit(f'error: {e}')
