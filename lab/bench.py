"""
Speed and memory beside TRL, transformers and tiktoken, on whatever device there is.

    python -m lab.bench all                                  # every section; a table at the end
    python -m lab.bench step memory --pairs=pairs.jsonl      # two sections, your data
    python -m lab.bench step --model=llama --dtype=bfloat16  # the shape of SmolLM2-135M

    step      pairs/s of an optimiser step: DPO beside TRL's DPOTrainer, SimPO beside CPOTrainer
    memory    peak memory of the same steps
    growth    ours alone: pairs/s and peak memory as max_length and the pairs of a step grow
    prepare   tokens/s of prepare.py's path beside tiktoken's batch encoding of the same texts
    generate  tokens/s of sample.py's generate beside transformers': greedy, the same weights
    start     seconds from the command to the end of train.py's first step

Contestants live in processes of their own and take turns: one works while the other waits. A ratio
is the median over the rounds, with the least and the greatest. A round of `step` goes from token
ids to updated weights, and for DPO includes the forward pass of a live reference. TRL runs its own
training loop, at the fastest of the settings tried (each is printed). Both sides have the same
weights and token ids; their losses and gradient norms are compared. Utilisation counts the
arithmetic that is needed (prompt once, vocabulary at response positions, no padding) against the
fastest matrix product of the model's shapes, measured right after the rounds.

Left out: evaluation, checkpoints, several GPUs, and the quality of what is learnt (random weights).
"""
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from time import perf_counter
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.benchmark import Timer

import train
from configurator import InputError, configure, first_line, run
from model import GPT, GPTConfig
from prepare import Data, Pairs, prepare
from sample import generate
from tokenizer import get_tokenizer
from weights import load, save

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LR = 1e-6
MODELS = dict(
    gpt2=GPTConfig(), tiny=GPTConfig(n_layer=2, n_head=2, n_embd=64),
    llama=GPTConfig(block_size=8192, vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576,
                    n_inner=1536, norm='rms', gated=True, bias='none', rope_theta=100000.0,
                    model_type='llama'))
WORDS = 'the of and to in is it you that he was for on are with as his they be at one have'.split()
TABLE = []                      # rows of the last table


@dataclass
class Options:
    pairs: str = ''             # a file for prepare.py; empty: random words, as long as HH-harmless's
    tokenizer: str = 'gpt2'
    model: str = 'gpt2'         # gpt2 (124M), llama (135M) or tiny
    device: str = ''            # as in train.py, and so are the next three
    dtype: str = ''
    compile: bool | None = None
    tokens_per_batch: int = 0
    batch_size: int = 0         # pairs of a step; 0: 8 on a CPU, 64 on a GPU
    max_length: int = 512       # tokens of a prompt with one response; a prompt may have half of it
    repeats: int = 3            # rounds that count
    losses: str = 'dpo,simpo'
    orders: str = 'own,sorted'  # a fixed random order; steps of pairs of like length
    prompts: int = 16           # generate
    new_tokens: int = 128       # generate
    peers: bool = True          # step and memory: beside TRL, where it is installed


def row(section, what, unit, numbers, ratios=(), note=''):
    """A line now, and again in the last table. `numbers`: ours and, where there are some, theirs;
    `ratios`: how many times better ours is, by round."""
    ratio = ''
    if ratios:
        ratio = f'{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})'
    numbers = [f'{x:,.0f}' if x >= 1000 else f'{x:.3g}' for x in numbers]
    TABLE.append([section, what, unit, *(numbers + [''])[:2], ratio, note])
    print('* ' + ', '.join(filter(None, TABLE[-1])))


def speed_row(section, what, unit, amount, mine, other=(), note=''):
    """The speed over all rounds, each with `amount` of `unit`."""
    speeds = [amount * len(rounds) / seconds(rounds) for rounds in (mine, other) if rounds]
    ratios = [theirs['seconds'] / ours['seconds'] for ours, theirs in zip(mine, other)]
    row(section, what, f'{unit}/s', speeds, ratios, note)


def seconds(rounds):
    return sum(r['seconds'] for r in rounds)


# --------------------------------------------------------------------------------------------------
# The pairs, the arithmetic they need, the machine


def text_file(o, n):
    """n records of random words: lengths are log-normals fitted to prompt, chosen and rejected of
    HH-harmless's test split (2,312 pairs, GPT-2's tokens)."""
    path, rng = os.path.join(o.folder, f'texts-{n}.jsonl'), random.Random(4)
    if not os.path.exists(path):
        with open(path, 'w') as f:
            for _ in range(n):
                sizes = [rng.lognormvariate(*fit) for fit in ((4.38, 1), (3.37, 0.87), (3.56, 0.93))]
                texts = [' ' + ' '.join(rng.choices(WORDS, k=1 + int(size))) for size in sizes]
                f.write(json.dumps(dict(zip(('prompt', 'chosen', 'rejected'), texts))) + '\n')
    return path


def prepared(path, tokenizer, data_dir, max_length):
    return Pairs(prepare(Data(
        dataset=path, tokenizer=tokenizer, data_dir=data_dir, val_fraction=0.0, max_length=max_length,
        max_prompt_length=max_length // 2, bad_records='skip')))


def get_pairs(o, max_length):
    """[(prompt, [chosen, rejected]), ...], lists of token ids, in a fixed random order."""
    path, data_dir = o.pairs or text_file(o, 4096), os.path.join(o.folder, 'data')
    pairs = prepared(path, o.tokenizer, data_dir, max_length)
    drawn = [pairs[i] for i in np.random.default_rng(2).permutation(pairs.train)]
    # TRL ends each response; to random weights, it matters little which ids the others are
    end = o.config.vocab_size - 1
    return [((prompt % end).tolist(), [(r[:-1] % end).tolist() + [end] for r in responses])
            for prompt, responses in drawn]


def draw_steps(pairs, batch_size, order, n):
    """The pairs of n steps: as they come, or of like length, at even distances in length."""
    starts = range(0, n * batch_size, batch_size)
    if order == 'sorted':
        pairs = sorted(pairs, key=lambda pair: len(pair[0]) + max(map(len, pair[1])))
        starts = [int((i + 0.5) / n * max(0, len(pairs) - batch_size)) for i in range(n)]
        random.Random(3).shuffle(starts)
    return [[pairs[i % len(pairs)] for i in range(start, start + batch_size)] for start in starts]


def needed(config, steps, loss):
    """Floating-point operations: a forward pass, a backward pass of two, for DPO the reference's."""
    c, width, total = config, config.n_head * config.head_dim, 0
    block = c.n_embd * (2 * width + 2 * c.n_kv_head * c.head_dim + (2 + c.gated) * c.n_inner)
    for prompt, (chosen, rejected) in itertools.chain(*steps):
        P, C, R = len(prompt), len(chosen), len(rejected)
        total += 2 * c.n_layer * block * (P + C + R) + 2 * c.vocab_size * c.n_embd * (C + R)
        total += 4 * c.n_layer * width * (P * P / 2 + C * (P + C / 2) + R * (P + R / 2))
    return (4 if loss == 'dpo' else 3) * total


def matmul_rate(pause, job):
    """FLOP/s of the fastest of the model's own matrix products and a square one."""
    c, best = job.config, 0.0
    tokens, square = (2048, 2048) if job.device == 'cpu' else (16384, 8192)
    for m, k, n in ((tokens, c.n_embd, c.n_inner), (tokens, c.n_inner, c.n_embd),
                    (tokens // 4, c.n_embd, c.vocab_size), (square, square, square)):
        a, b = (torch.randn(shape, device=job.device).to(getattr(torch, job.dtype))
                for shape in ((m, k), (k, n)))
        timer = Timer('torch.mm(a, b, out=out)', globals=dict(torch=torch, a=a, b=b, out=a @ b),
                      num_threads=torch.get_num_threads())
        best = max(best, 2 * m * k * n / min(timer.blocked_autorange(min_run_time=0.5).times))
    pause(best)


def clock(device):
    """The time when the device has done all that it was asked."""
    if device == 'cuda':
        torch.cuda.synchronize()
    return perf_counter()


def peak_memory(device):
    """The most GiB this process has had so far: tensors on a GPU, or resident memory on Linux."""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform != 'linux':
        return math.nan
    with open('/proc/self/status') as f:     # a child's ru_maxrss would start at its parent's
        return int(re.search(r'VmHWM:\s+(\d+)', f.read())[1]) / 2**20


def machine(device):
    """Hardware, versions and commit."""
    name = torch.cuda.get_device_name() if device == 'cuda' else platform.machine()
    if device == 'cpu' and os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            name = next((line.split(': ')[1].strip() for line in f if 'model name' in line), name)
    versions = [f'{library} {importlib.metadata.version(library)}' for library in (
        'torch', 'transformers', 'trl', 'tiktoken') if importlib.util.find_spec(library)]
    commit = subprocess.run(['git', '-C', ROOT, 'describe', '--always', '--dirty'],
                            capture_output=True, text=True).stdout.strip()
    return f'{name}, {torch.get_num_threads()} threads; {", ".join(versions)}; commit {commit}'


# --------------------------------------------------------------------------------------------------
# Processes that take turns


def child(work, conn, job):
    """Run work(pause, job), where pause(answer) ends a turn and waits for the next."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    def pause(answer=None):
        conn.send(answer)
        conn.recv()
    try:
        conn.recv()
        work(pause, SimpleNamespace(**job))
    except EOFError:                         # no further turn
        pass
    except Exception as e:                   # of any library: it ends a section, not the benchmark
        conn.send(RuntimeError(first_line(e)))


def take_turns(n, *contestants):
    """n rounds of each (work, job) -> for each, the list of its answers. A first turn, before any
    round, is for setting up."""
    context, running = multiprocessing.get_context('spawn'), []

    def turn(conn):
        try:
            conn.send('go')
            answer = conn.recv()
        except (EOFError, OSError):
            raise RuntimeError('the process died; out of memory?')
        if isinstance(answer, Exception):
            raise answer
        return answer
    try:
        for work, job in contestants:
            here, there = context.Pipe()
            running.append(here)
            context.Process(target=child, args=(work, there, job)).start()
            there.close()
            answer = turn(here)
        rounds = [[turn(conn) for conn in running] for _ in range(n)] or [[answer]]
    finally:
        for conn in running:
            conn.close()
        for process in multiprocessing.active_children():
            process.join()
    return [list(answers) for answers in zip(*rounds)]


def repeat(pause, device, work):
    """A turn is one call of work()."""
    pause()
    while True:
        begin, result = clock(device), work()
        pause(dict(seconds=clock(device) - begin, result=result))


# --------------------------------------------------------------------------------------------------
# Rounds of a step: ours, TRL's


def ours(pause, job):
    """The steps of train.train(), by the same functions."""
    B, pairs = len(job.steps[0]), list(itertools.chain(*job.steps))
    settings = dict(job.settings, loss=job.loss, batch_size=B, learning_rate=LR)
    cfg = train.load_config([f'--{name}={value}' for name, value in settings.items()])
    cfg.reference = 'live'
    train.setup_machine(cfg)
    model = load(job.weights).to(cfg.device)
    reference, *_ = train.make_reference(model, pairs, np.arange(len(pairs)), cfg)
    optimizer = train.make_optimizer(model, cfg)

    def load_step(k):
        return list(train.batches(pairs, np.arange(len(pairs))[k * B:(k + 1) * B], 2, cfg))
    waiting = load_step(0)
    pause()
    for k in range(len(job.steps)):
        begin, sums = clock(cfg.device), 0
        for rows, batch in waiting:
            with train.autocast(cfg):
                logps = batch.sum_by_response(model.token_logps(batch))             # (B, 2)
            reference_logps = None
            if reference is not None:
                reference_logps = batch.sum_by_response(reference(rows, batch))     # (B, 2)
            losses, *rewards = train.apply_loss(cfg, logps, reference_logps, batch.lengths,
                                                dict(p=torch.ones(len(rows)).to(cfg.device)))
            (losses.sum() / B).backward()
            sums = sums + train.metric_sums(losses, *rewards, logps)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        waiting = load_step(k + 1)
        loss, norm = sums[0].item() / B, norm.item()
        assert math.isfinite(loss) and math.isfinite(norm), 'the step is not finite'
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end = clock(cfg.device)
        pause(dict(seconds=end - begin, loss=loss, norm=norm, peak=peak_memory(cfg.device)))


def trl_options(job):
    B, cpu = len(job.steps[0]), job.device == 'cpu'
    return dict(
        output_dir=job.folder, max_steps=len(job.steps), per_device_train_batch_size=job.rows,
        gradient_accumulation_steps=B // job.rows, max_length=job.config.block_size,
        train_sampling_strategy='sequential', learning_rate=LR, lr_scheduler_type='constant',
        optim='adamw_torch_fused', weight_decay=0.0, max_grad_norm=1.0, bf16=job.dtype == 'bfloat16',
        torch_compile=job.compile, gradient_checkpointing=False, use_cpu=cpu,
        dataloader_num_workers=0 if cpu else 2, dataloader_pin_memory=not cpu, logging_steps=1,
        logging_nan_inf_filter=False, save_strategy='no', report_to='none', disable_tqdm=True,
        model_init_kwargs=dict(attn_implementation=job.attention, dtype='float32'))


def trl_trainer(job):
    """DPOTrainer, or CPOTrainer with SimPO's loss. The words of its texts are our token ids."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    if job.loss == 'dpo':
        trainer, args = DPOTrainer, DPOConfig(beta=0.1, **trl_options(job))
    else:
        simpo = dict(loss_type='simpo', beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0)
        trainer, args = CPOTrainer, CPOConfig(**simpo, **trl_options(job))
    end, last = '<|endoftext|>', job.config.vocab_size - 1
    ids = {str(i): i for i in range(last)} | {end: last}
    words = Tokenizer(models.WordLevel(ids, unk_token=end))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, pad_token=end)
    data = []
    for prompt, responses in itertools.chain(*job.steps):
        texts = [''.join(f' {i}' for i in part) for part in (prompt, *(r[:-1] for r in responses))]
        data.append(dict(prompt=texts[0], chosen=texts[1] + end, rejected=texts[2] + end))
    return trainer(model=job.weights, args=args, train_dataset=Dataset.from_list(data),
                   processing_class=tokenizer)


def trl(pause, job):
    """The trainer's own train(), which pauses after each step."""
    train.setup_machine(train.Config(device=job.device, dtype=job.dtype))    # tuned as ours is
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            pause()
            self.begin = clock(job.device)

        def on_log(self, args, state, control, logs, **kwargs):
            took = clock(job.device) - self.begin
            pause(dict(seconds=took, loss=logs['loss'], norm=logs['grad_norm'],
                       peak=peak_memory(job.device)))
            self.begin = clock(job.device)
    trainer = trl_trainer(job)
    trainer.add_callback(Turns())
    trainer.train()


# --------------------------------------------------------------------------------------------------
# Sections step, memory, growth


def describe(settings):
    compiled = ', compile' if settings['compile'] else ''
    return f'TRL {settings["attention"]}, {settings["rows"]} a pass{compiled}'


def search(o, job):
    """[(seconds, settings, peak memory), ...] of TRL's settings that run here, fastest first.

    `rows`: pairs in a forward pass; fewer than a step's, with gradients accumulated, need less
    padding. Not tried: padding_free, which TRL 1.16 turns off itself; offloading and gradient
    checkpointing, which cost time."""
    B, cpu, tried = o.batch_size, o.device == 'cpu', []
    rows = sorted({n for n in (1 if cpu else B, B // 4, B) if n and B % n == 0})
    axes = rows, ['sdpa', 'eager'] if cpu else ['sdpa'], sorted({False, o.settings['compile']})
    for values in itertools.product(*axes):
        settings = dict(zip(('rows', 'attention', 'compile'), values))
        what = f'  {job["loss"]}, {describe(settings)}: '
        try:
            last = take_turns(o.warmup + 1, (trl, job | settings))[0][-1]
        except RuntimeError as e:
            print(f'{what}does not run here ({e})')
            continue
        tried.append((last['seconds'], settings, last['peak']))
        print(f'{what}{B / last["seconds"]:.2f} pairs/s, {last["peak"]:.2f} GiB at most')
    return sorted(tried, key=lambda t: t[0])


def contest(o, loss, steps, what, peers):
    """Steps of ours and, with `peers`, of TRL's at its fastest, in turns."""
    job, what, note = dict(o.job, loss=loss, steps=steps), f'{loss}, {what}, {o.dtype}', ''
    tried = search(o, job) if peers and importlib.util.find_spec('trl') else []
    sides = [(ours, job)] + [(trl, job | settings) for _, settings, _ in tried[:1]]
    rounds = take_turns(len(steps), *sides)
    (rate,), = take_turns(0, (matmul_rate, job))
    if tried:
        what += f'; {describe(tried[0][1])}'
        apart = max(abs(a['loss'] - b['loss']) for a, b in zip(*rounds))
        norms = max(abs(a['norm'] / b['norm'] - 1) for a, b in zip(*rounds))
        differ = ': THEY DIFFER' if o.dtype == 'float32' and max(apart, norms) > 1e-3 else ''
        note = f'; losses within {apart:.0e}, gradient norms within {norms:.0e}{differ}'
    rounds = [answers[o.warmup:] for answers in rounds]
    least = needed(o.config, steps[o.warmup:], loss) / rate    # seconds, if products were all
    used = ' and '.join(f'{least / seconds(answers):.0%}' for answers in rounds)
    note = f'utilisation {used} of {rate / 1e9:,.0f} GFLOP/s{note}'
    return SimpleNamespace(what=what, note=note, tried=tried, rounds=rounds,
                           peaks=[answers[-1]['peak'] for answers in rounds])


def contests(o):
    for loss, order in itertools.product(o.losses.split(','), o.orders.split(',')):
        if (loss, order) not in o.contests:
            steps = draw_steps(o.data, o.batch_size, order, o.warmup + o.repeats)
            what = f'{order} order, {o.batch_size} pairs'
            o.contests[loss, order] = contest(o, loss, steps, what, o.peers)
        yield o.contests[loss, order]


def step(o):
    for c in contests(o):
        speed_row('step', c.what, 'pairs', o.batch_size, *c.rounds, note=c.note)


def memory(o):
    for c in contests(o):
        note = ', '.join(f'{peak:.2f} for {describe(s)}' for _, s, peak in c.tried[1:])
        row('memory', c.what, 'GiB', c.peaks, [peak / c.peaks[0] for peak in c.peaks[1:]], note)


def growth(o):
    sizes = (8, 32) if o.device == 'cpu' else (8, 64, 256)
    for length, size in itertools.product((256, 512, 1024), sizes):
        steps = draw_steps(get_pairs(o, length), size, 'own', o.warmup + o.repeats)
        c = contest(o, 'dpo', steps, f'max_length {length}, {size} pairs', peers=False)
        note = f'{c.peaks[0]:.2f} GiB, {c.note}'
        speed_row('growth', c.what, 'pairs', size, *c.rounds, note=note)


# --------------------------------------------------------------------------------------------------
# Sections prepare, generate, start


def our_prepare(pause, job):
    def work():
        data_dir = tempfile.mkdtemp(dir=job.folder)
        return prepared(job.path, job.tokenizer, data_dir, 2**20).meta['tokens']
    repeat(pause, 'cpu', work)


def tiktoken_batch(pause, job):
    tokenizer = get_tokenizer(job.tokenizer)
    pairs = prepared(job.path, job.tokenizer, tempfile.mkdtemp(dir=job.folder), 2**20)
    parts = [part for i in pairs.train for part in (pairs[i][0], *(r[:-1] for r in pairs[i][1]))]
    texts = [tokenizer.decode(part.tolist()) for part in parts]
    encode = tokenizer.encoding.encode_ordinary_batch
    repeat(pause, 'cpu', lambda: len(encode(texts, num_threads=os.cpu_count())))


def preparation(o):
    job = dict(o.job, path=o.pairs or text_file(o, 10000), tokenizer=o.tokenizer)
    mine, other = take_turns(1 + o.repeats, (our_prepare, job), (tiktoken_batch, job))
    what = f'{o.tokenizer}; tiktoken'
    speed_row('prepare', what, 'tokens', mine[0]['result'], mine[1:], other[1:])


def our_generate(pause, job):
    model = load(job.weights).to(job.device)
    repeat(pause, job.device, lambda: generate(
        model, job.prompts, job.new_tokens, {-1}, temperature=0))              # -1: nothing ends


def their_generate(pause, job):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(job.weights, dtype=torch.float32).to(job.device)
    longest = max(map(len, job.prompts))
    tokens, mask = (torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=job.device)
                    for rows in (job.prompts, [[1] * len(p) for p in job.prompts]))
    repeat(pause, job.device, lambda: model.generate(
        tokens, attention_mask=mask, max_new_tokens=job.new_tokens, do_sample=False, pad_token_id=0,
        cache_implementation=job.cache)[:, longest:].tolist())


def generation(o):
    prompts = [prompt for prompt, _ in o.data[:o.prompts]]
    for cache in ['dynamic'] + ['static'] * (o.device == 'cuda'):
        job = dict(o.job, prompts=prompts, new_tokens=o.new_tokens, cache=cache)
        mine, other = take_turns(o.warmup + o.repeats, (our_generate, job), (their_generate, job))
        same = sum(a == b for a, b in zip(mine[0]['result'], other[0]['result']))
        what = f'{o.prompts} prompts, {o.new_tokens} new tokens, float32; transformers, {cache} cache'
        speed_row('generate', what, 'tokens', o.prompts * o.new_tokens, mine[o.warmup:],
                  other[o.warmup:], f'{same} responses are the same')


def start(o):
    """config/dpo_gpt2.py on these weights, twice: the second finds data and reference prepared."""
    settings = dict(o.settings, init_from=o.weights, dataset=text_file(o, 8 * o.batch_size),
                    tokenizer=o.tokenizer, data_dir=os.path.join(o.folder, 'data'), overwrite=True,
                    out_dir=os.path.join(o.folder, 'run'), batch_size=o.batch_size)
    command = [sys.executable, '-u', 'train.py', 'config/dpo_gpt2.py']
    command += [f'--{name}={value}' for name, value in settings.items()]
    took = []
    for _ in range(2):
        begin = perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              cwd=ROOT) as process:
            for line in process.stdout:
                if line.startswith('first step'):
                    break
            else:
                raise RuntimeError(f'no first step; the last words of train.py: {line.strip()}')
            took.append(perf_counter() - begin)
            process.kill()
    note = f'data and reference prepared; {took[0]:.1f} before; without imports: {line.strip()}'
    row('start', f'{o.batch_size} pairs, {o.dtype}', 's', took[1:], note=note)


# --------------------------------------------------------------------------------------------------
# The command

SECTIONS = dict(step=step, memory=memory, growth=growth, prepare=preparation, generate=generation,
                start=start)


def read_options(argv):
    """[SECTION ...] [--name=value ...] -> (names of sections, Options). Raises InputError."""
    sections = [arg for arg in argv if not arg.startswith('-')]
    o = configure(Options, [arg for arg in argv if arg.startswith('-')])
    for name, values, choices in (
            ('section', sections, [*SECTIONS, 'all']), ('model', [o.model], list(MODELS)),
            ('losses', o.losses.split(','), ['dpo', 'simpo']),
            ('orders', o.orders.split(','), ['own', 'sorted'])):
        for value in values:
            if value not in choices:
                raise InputError(f'{name}: {value!r} is not one of {", ".join(choices)}')
    o.config, o.contests = MODELS[o.model], {}
    o.device = o.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    cpu = o.device == 'cpu'
    o.dtype = o.dtype or ('float32' if cpu else 'bfloat16')
    o.batch_size, o.warmup = o.batch_size or (8 if cpu else 64), 1 if cpu else 4
    o.settings = dict(device=o.device, dtype=o.dtype, tokens_per_batch=o.tokens_per_batch,
                      compile=not cpu if o.compile is None else o.compile)
    train.load_config([f'--{name}={value}' for name, value in o.settings.items()])
    return list(SECTIONS) if not sections or 'all' in sections else sections, o


def main(argv):
    sections, o = read_options(argv)
    sys.stdout.reconfigure(line_buffering=True)
    # for the contestants: who waits must not spin; nothing is asked of the hub
    os.environ |= dict(OMP_WAIT_POLICY='PASSIVE', HF_HUB_OFFLINE='1')
    head = f'{machine(o.device)}; {o.model}, max_length {o.max_length}'
    print(head)
    with tempfile.TemporaryDirectory() as o.folder:
        torch.manual_seed(0)
        o.weights = os.path.join(o.folder, 'weights')
        save(GPT(o.config), o.weights)
        o.job = dict(folder=o.folder, weights=o.weights, config=o.config, device=o.device,
                     dtype=o.dtype, settings=o.settings)
        o.data = get_pairs(o, o.max_length)
        for section in sections:
            try:
                SECTIONS[section](o)
            except (RuntimeError, InputError) as e:
                print(f'  {section}: does not run here ({e})')
    columns = ['section', 'what', 'unit', 'ours', 'theirs', 'times better (range)', 'note']
    print(f'\n{head}\n')
    for line in [columns, ['---'] * len(columns), *TABLE]:
        print('| ' + ' | '.join(line) + ' |')


if __name__ == '__main__':
    run(main, __doc__)
