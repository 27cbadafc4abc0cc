"""
Speed and memory beside TRL, transformers and tiktoken, on whatever device there is.

    python -m lab.bench all                                    # every section; a table at the end
    python -m lab.bench step memory --pairs=pairs.jsonl        # two sections, your data
    python -m lab.bench step --model=llama --dtype=bfloat16    # the shape of SmolLM2-135M

    step      pairs/s of an optimiser step: DPO against TRL's DPOTrainer, SimPO against its CPOTrainer
    memory    peak memory of the same steps
    growth    ours alone: pairs/s and peak memory as max_length and the pairs of a step grow
    prepare   tokens/s of prepare.py's whole path against tiktoken's batch encoding of the same texts
    generate  tokens/s of sample.py's generate against transformers': greedy, from the same weights
    start     seconds from the command to the end of train.py's first step

Every figure is a ratio within one run. The contestants live in processes of their own and take turns,
each waiting while the other works; the ratio is the median over the rounds, with the least and the
greatest. A round of `step` is one optimiser step, from token ids to updated weights, and for DPO one
forward pass of the reference over the same pairs: its share in one epoch. TRL runs its own training
loop, at the fastest of the settings tried (each is printed); both sides start from the same weights,
see the same token ids, and their losses and log-probs are compared. Utilisation counts the arithmetic
that is needed (prompt once, vocabulary at response positions, no padding) against the machine's fastest
matrix product, measured right after the rounds.

Left out: evaluation, checkpoints, logging, several GPUs, and the quality of what is learnt (weights are
random). A peer that is not installed is passed over.
"""
import contextlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

import train
from configurator import InputError, configure, first_line, run
from model import GPT, GPTConfig
from prepare import Data, Pairs, prepare, read_source
from sample import generate
from tokenizer import get_tokenizer
from weights import load, save

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LR = 1e-6
REFERENCE = -10.875     # both sides' log-prob of a token by the reference: near a random model's, so
                        # that the loss is not log 2; in eighths, so that sums are exact
MODELS = dict(
    gpt2=GPTConfig(), tiny=GPTConfig(n_layer=2, n_head=2, n_embd=64),
    llama=GPTConfig(block_size=8192, vocab_size=49152, n_layer=30, n_head=9, n_embd=576, n_kv_head=3,
                    n_inner=1536, norm='rms', gated=True, bias='none', rope_theta=100000.0,
                    model_type='llama'))
TABLE = []              # the rows of the last table


@dataclass
class Options:
    pairs: str = ''             # a file for prepare.py; empty: random tokens, as long as HH-harmless's
    model: str = 'gpt2'         # gpt2 (124M), llama (135M) or tiny
    device: str = ''            # as in train.py, and so are the next three
    dtype: str = ''
    compile: bool | None = None
    tokens_per_batch: int = 0
    batch_size: int = 0         # pairs of a step; 0: 8 on a CPU, 64 on a GPU
    max_length: int = 512       # tokens of a prompt with one response; a prompt may have half of it
    repeats: int = 3            # rounds that count
    losses: str = 'dpo,simpo'
    orders: str = 'own,sorted'  # the data's own order; steps of pairs of like length
    rows: int = 0               # TRL: pairs in a forward pass, gradients accumulated; 0: several tried
    lengths: str = '256,512,1024'   # growth: max_length
    steps: str = ''             # growth: pairs of a step; empty: 8,32 on a CPU, 8,64,256 on a GPU
    records: int = 10000        # prepare: a file with fewer is repeated
    prompts: int = 16           # generate
    new_tokens: int = 128       # generate
    peers: bool = True


def say(text):
    print(text, flush=True)


def row(section, what, unit, ours, theirs=None, ratios=(), note=''):
    """A line now, and again in the last table. `ratios`: of each round, how many times better ours is."""
    ratio = f'{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})' if ratios else ''
    ours, theirs = ('' if x is None else f'{x:,.0f}' if x >= 1000 else f'{x:.3g}' for x in (ours, theirs))
    TABLE.append([section, what, unit, ours, theirs, ratio, note])
    say(f'* {section}, {what}: {ours} {unit}' + f' against {theirs}, ratio {ratio}' * bool(ratio)
        + f'; {note}' * bool(note))


def speed_row(section, what, unit, amount, mine, other=(), note=''):
    """`amount` of `unit` in each of the rounds `mine` and `other`."""
    speeds = [amount * len(results) / sum(r['seconds'] for r in results) if results else None
              for results in (mine, other)]
    row(section, what, f'{unit}/s', *speeds, [t['seconds'] / m['seconds'] for m, t in zip(mine, other)], note)


# --------------------------------------------------------------------------------------------------
# The pairs, the arithmetic they need, the machine


def synthetic_lengths(n):
    """(n, 3) lengths of prompt, chosen, rejected: log-normals fitted to HH-harmless's test split (2,312
    pairs, GPT-2's tokens, end of text counted)."""
    drawn = np.random.default_rng(0).normal([4.38, 3.37, 3.56], [1.00, 0.87, 0.93], (n, 3))
    return np.maximum(1, np.exp(drawn).round().astype(int)).tolist()


def get_pairs(o, max_length, n=4096):
    """[(prompt, [chosen, rejected]), ...], lists of token ids, in a fixed random order."""
    if o.pairs:
        prepared = Pairs(prepare(Data(
            dataset=o.pairs, tokenizer='gpt2', data_dir=os.path.join(o.folder, 'data'), val_fraction=0.0,
            max_length=max_length, max_prompt_length=max_length // 2, bad_records='skip')))
        pairs = [prepared[i] for i in prepared.train]
    else:
        rng, pairs = np.random.default_rng(1), []
        for prompt, *responses in synthetic_lengths(n):
            prompt = min(prompt, max_length // 2)
            sizes = [prompt, *(min(size, max_length - prompt) for size in responses)]
            prompt, *responses = (rng.integers(0, 50256, size) for size in sizes)
            pairs.append((prompt, responses))
    random.Random(2).shuffle(pairs)
    V = o.config.vocab_size              # weights are random: which token it is makes no difference
    return [((prompt % V).tolist(), [(r % V).tolist() for r in responses]) for prompt, responses in pairs]


def draw_steps(pairs, batch_size, order, n):
    """The pairs of n steps: as they come, or of like length, at even distances from short to long."""
    starts = range(0, n * batch_size, batch_size)
    if order == 'sorted':
        pairs = sorted(pairs, key=lambda pair: len(pair[0]) + max(map(len, pair[1])))
        starts = [int((i + 0.5) / n * max(0, len(pairs) - batch_size)) for i in range(n)]
        random.Random(3).shuffle(starts)
    return [[pairs[i % len(pairs)] for i in range(start, start + batch_size)] for start in starts]


def needed(config, steps, loss):
    """Floating-point operations: a forward pass, a backward pass of two, and for DPO the reference's."""
    c, total = config, 0
    width = c.n_head * c.head_dim
    block = c.n_embd * (2 * width + 2 * c.n_kv_head * c.head_dim + (2 + c.gated) * c.n_inner)
    for prompt, (chosen, rejected) in itertools.chain(*steps):
        P, C, R = len(prompt), len(chosen), len(rejected)
        total += 2 * c.n_layer * block * (P + C + R) + 2 * c.vocab_size * c.n_embd * (C + R)
        total += 4 * c.n_layer * width * (P * P / 2 + C * (P + C / 2) + R * (P + R / 2))
    return (4 if loss == 'dpo' else 3) * total


def matmul_rate(pause, job):
    """FLOP/s of the fastest of the model's own matrix products and a square one, each at its best."""
    pause()
    c, cpu, best = job.config, job.device == 'cpu', 0.0
    tokens, square, calls = (2048, 2048, 1) if cpu else (16384, 8192, 10)
    for m, k, n in ((tokens, c.n_embd, c.n_inner), (tokens, c.n_inner, c.n_embd),
                    (tokens // 4, c.n_embd, c.vocab_size), (square, square, square)):
        a, b = (torch.randn(shape, device=job.device).to(getattr(torch, job.dtype))
                for shape in ((m, k), (k, n)))
        out, until = torch.mm(a, b), time.perf_counter() + 0.5
        while time.perf_counter() < until:
            begin = clock(job.device)
            for _ in range(calls):
                torch.mm(a, b, out=out)
            best = max(best, calls * 2 * m * k * n / (clock(job.device) - begin))
    pause(best)


def clock(device):
    """The time when all that was asked of the device is done."""
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device):
    """The most GiB this process has had so far: tensors on a GPU, or resident memory. Linux has it in
    /proc: a child's ru_maxrss starts at its parent's."""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == 'linux':
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) / 2**20 for line in f if line.startswith('VmHWM'))
    import resource                      # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def machine(device):
    """Hardware, versions and commit."""
    def git(*args):
        return subprocess.run(['git', '-C', ROOT, *args], capture_output=True, text=True).stdout.strip()
    name = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            name = next((line.split(':')[1].strip() for line in f if line.startswith('model name')), name)
    name = f'{torch.cuda.get_device_name()}; {name}' if device == 'cuda' else name
    versions = [f'{library} {importlib.metadata.version(library)}' for library in (
        'torch', 'transformers', 'trl', 'tiktoken') if importlib.util.find_spec(library)]
    changed = '+changes' if git('status', '--porcelain', '--untracked-files=no') else ''
    return (f'{name}, {torch.get_num_threads()} threads; python {platform.python_version()}, '
            f'{", ".join(versions)}; commit {git("rev-parse", "--short", "HEAD") or "unknown"}{changed}')


# --------------------------------------------------------------------------------------------------
# Processes that take turns


@contextlib.contextmanager
def started(work, job):
    """A process that runs work(pause, job). `pause(answer)` in it hands over an answer and waits for its
    next turn; the first one says that it is ready."""
    context = multiprocessing.get_context('spawn')
    here, there = context.Pipe()
    process = context.Process(target=child, args=(work, there, job))
    process.start()
    there.close()
    contestant = SimpleNamespace(process=process, conn=here)
    try:
        answer_of(contestant)
        yield contestant
    finally:
        here.close()
        process.join()


def answer_of(contestant):
    try:
        answer = contestant.conn.recv()
    except (EOFError, OSError):
        contestant.process.join()
        raise RuntimeError(f'the process ended with {contestant.process.exitcode}; out of memory?')
    if isinstance(answer, Exception):
        raise RuntimeError(str(answer))
    return answer


def child(work, conn, job):
    log = os.open(os.path.join(job['folder'], f'{work.__name__}-{os.getpid()}'), os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def pause(answer=None):
        conn.send(answer)
        conn.recv()
    try:
        work(pause, SimpleNamespace(**job))
    except (EOFError, BrokenPipeError):  # nobody asks any more
        pass
    except Exception as e:               # of any library: it is the section that ends, not the benchmark
        with contextlib.suppress(OSError):
            conn.send(RuntimeError(first_line(e)))


def take_turns(n, *contestants):
    """n rounds of each (work, job), in turns -> for each the list of its answers."""
    def turn(contestant):
        contestant.conn.send('go')
        return answer_of(contestant)
    with contextlib.ExitStack() as stack:
        ready = [stack.enter_context(started(work, job)) for work, job in contestants]
        rounds = [[turn(contestant) for contestant in ready] for _ in range(n)]
    return list(zip(*rounds))


# --------------------------------------------------------------------------------------------------
# A round of ours


def ours(pause, job):
    """Steps as in train.train(), by the same functions; the reference's pass before each."""
    B, dpo, pairs = len(job.steps[0]), job.loss == 'dpo', list(itertools.chain(*job.steps))
    cfg = train.load_config([f'--{name}={getattr(job, name)}' for name in (
        'loss', 'device', 'dtype', 'compile', 'tokens_per_batch')] + [f'--batch_size={B}'])
    cfg.learning_rate = LR
    train.setup_machine(cfg)
    model = load(job.weights).to(cfg.device)
    train.compile_model(model, cfg)
    optimizer, frozen = train.make_optimizer(model, cfg), train.live_logps(model, cfg)

    def load_step(k):
        return list(train.batches(pairs, np.arange(k * B, (k + 1) * B), 2, cfg))

    def reference_pass(k):               # -> (B, 2)
        logps = np.zeros((B, 2), dtype=np.float32)
        for rows, batch in load_step(k):
            logps[rows - k * B] = batch.sum_by_response(frozen(rows, batch)).cpu().numpy()
        return logps
    pause()
    waiting = load_step(0)
    for k in range(len(job.steps)):
        begin = clock(cfg.device)
        first = reference_pass(k) if dpo or k == 0 else None    # for SimPO only to compare
        middle, sums = clock(cfg.device), 0
        for rows, batch in waiting:
            with train.autocast(cfg):
                logps = batch.sum_by_response(model.token_logps(batch))             # (B, 2)
            reference_logps = batch.lengths * REFERENCE if dpo else None            # (B, 2)
            losses, *rewards = train.apply_loss(cfg, logps, reference_logps, batch.lengths,
                                                dict(p=torch.ones(len(rows)).to(cfg.device)))
            (losses.sum() / B).backward()
            sums = sums + train.metric_sums(losses, *rewards, logps)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        waiting = load_step(k + 1) if k + 1 < len(job.steps) else []
        loss = sums[0].item() / B
        assert math.isfinite(loss) and math.isfinite(norm.item()), 'the step is not finite'
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = clock(cfg.device) - (begin if dpo else middle)
        pause(dict(seconds=seconds, logps=first, loss=loss, peak=peak_memory(cfg.device)))


# --------------------------------------------------------------------------------------------------
# A round of TRL's


def trl_axes(o):
    """What is tried, the likely best of each first. `rows`: pairs in a forward pass; fewer than a step's,
    with gradients accumulated, need less padding. `tuned`: train.setup_machine, what we do for ourselves.
    Not tried: padding_free, which TRL 1.16 turns off itself; offloading and gradient checkpointing, which
    cost time."""
    B, cpu = o.batch_size, o.device == 'cpu'
    rows = [o.rows] if o.rows else [1, B, B // 4] if cpu else [B, B // 4]
    return dict(rows=list(dict.fromkeys(n for n in rows if n and B % n == 0)) or [B],
                attention=['sdpa', 'eager'] if cpu else ['sdpa'],
                tuned=[True, False] if cpu else [True],
                compile=[True, False] if o.compile else [False])


def describe(settings):
    words = [word for word in ('compile', 'tuned') if settings[word]]
    return ' '.join(['TRL', settings['attention'], f'{settings["rows"]} a pass', *words])


def trl_options(job):
    cpu, B = job.device == 'cpu', len(job.steps[0])
    return dict(
        output_dir=os.path.join(job.folder, 'trl'), max_steps=len(job.steps), learning_rate=LR,
        per_device_train_batch_size=job.rows, gradient_accumulation_steps=B // job.rows,
        train_sampling_strategy='sequential', lr_scheduler_type='constant', optim='adamw_torch_fused',
        max_grad_norm=1.0, weight_decay=0.0, bf16=job.dtype == 'bfloat16', torch_compile=job.compile,
        gradient_checkpointing=False, use_cpu=cpu, logging_strategy='no', logging_nan_inf_filter=False,
        save_strategy='no', report_to='none', disable_tqdm=True,
        dataloader_num_workers=0 if cpu else 2, dataloader_pin_memory=not cpu)


def trl_trainer(job):
    """DPOTrainer or CPOTrainer (loss_type 'simpo') on the token ids and weights that ours has."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    pairs = list(itertools.chain(*job.steps))

    # the trainers' tokenising gives way to the ids, and the reference's pass over all pairs at once to one
    # before each step
    class DPO(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

        def _precompute_ref_logps(self, dataset, *args):
            return dataset

    class CPO(CPOTrainer):
        def tokenize_row(self, feature):
            prompt, responses = pairs[int(feature['prompt'])]
            tokens = dict(prompt_input_ids=prompt, prompt_attention_mask=[1] * len(prompt))
            for side, r in zip(('chosen', 'rejected'), responses):
                tokens |= {f'{side}_input_ids': prompt + r, f'{side}_labels': [-100] * len(prompt) + r,
                           f'{side}_attention_mask': [1] * len(prompt + r)}
            return tokens

    if job.loss == 'dpo':
        columns = dict(prompt_ids=[prompt for prompt, _ in pairs])
        for k, side in enumerate(('chosen', 'rejected')):
            columns[f'{side}_ids'] = [responses[k] for _, responses in pairs]
            columns[f'ref_{side}_logps'] = [len(responses[k]) * REFERENCE for _, responses in pairs]
        trainer, args = DPO, DPOConfig(beta=0.1, precompute_ref_log_probs=True, max_length=None,
                                       **trl_options(job))
    else:
        columns = dict(prompt=[str(i) for i in range(len(pairs))], chosen=[''] * len(pairs),
                       rejected=[''] * len(pairs))
        trainer, args = CPO, CPOConfig(loss_type='simpo', beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0,
                                       remove_unused_columns=False, **trl_options(job))
    end = '<|endoftext|>'       # a tokenizer that knows nothing else: it is asked only for its padding
    words = Tokenizer(models.WordLevel({end: job.config.vocab_size - 1}, unk_token=end))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, bos_token=end, pad_token=end)
    model = AutoModelForCausalLM.from_pretrained(job.weights, dtype=torch.float32,
                                                 attn_implementation=job.attention)
    return trainer(model=model, args=args, train_dataset=Dataset.from_dict(columns),
                   processing_class=tokenizer)


def trl(pause, job):
    """The trainer's own train(), which pauses between its steps."""
    if job.tuned:
        train.setup_machine(train.Config(device=job.device, dtype=job.dtype))
    from transformers import TrainerCallback
    trainer, B, dpo = trl_trainer(job), len(job.steps[0]), job.loss == 'dpo'
    done = SimpleNamespace(rounds=0, begin=0.0, logps=None, loss=0.0)
    training_step = trainer.training_step

    def keep_loss(*args, **kwargs):
        loss = training_step(*args, **kwargs)
        done.loss += loss
        return loss

    def reference_pass(k):               # -> (B, 2); of SimPO's the means
        parts = []
        for start in range(k * B, (k + 1) * B, job.rows):
            rows = [trainer.train_dataset[i] for i in range(start, start + job.rows)]
            batch = trainer._prepare_inputs(trainer.data_collator(rows))
            if dpo:
                logps = trainer.compute_ref_log_probs(trainer.model, batch)
            else:
                with torch.no_grad(), trainer.accelerator.autocast():
                    logps = trainer.concatenated_forward(trainer.model, batch)[:2]
            parts.append(torch.stack(logps, dim=1).float().cpu().numpy())
        return np.concatenate(parts)

    def begin_round():
        begin, k = clock(job.device), done.rounds
        done.logps = reference_pass(k) if dpo or k == 0 else None
        done.begin, done.loss = begin if dpo else clock(job.device), 0.0

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            pause()
            begin_round()

        def on_step_end(self, *args, **kwargs):
            seconds = clock(job.device) - done.begin
            pause(dict(seconds=seconds, logps=done.logps, loss=float(done.loss),
                       peak=peak_memory(job.device)))
            done.rounds += 1
            begin_round()

    trainer.training_step = keep_loss
    trainer.add_callback(Turns())
    trainer.train()


# --------------------------------------------------------------------------------------------------
# Sections step, memory, growth


def search(axes, job, warmup):
    """TRL's settings changed one at a time, from the first of each axis, and kept where faster ->
    [(seconds, peak memory, settings), ...] of those that ran, fastest first."""
    tried, best, least = [], {name: values[0] for name, values in axes.items()}, math.inf
    for change in [{}] + [{name: value} for name, values in axes.items() for value in values[1:]]:
        settings = best | change
        what = f'  {job["loss"]}, {describe(settings)}: '
        try:
            last = take_turns(warmup + 1, (trl, job | settings))[0][-1]
        except RuntimeError as e:
            say(f'{what}does not run here ({e})')
            continue
        seconds = last['seconds']
        tried.append((seconds, last['peak'], settings))
        say(f'{what}{len(job["steps"][0]) / seconds:.2f} pairs/s, {last["peak"]:.2f} GiB at most')
        if seconds < least:
            best, least = settings, seconds
    return sorted(tried, key=lambda t: t[0])


def contests(o):
    """Ours and TRL's at its fastest, taking turns: one for each objective and order, run once."""
    for loss in o.losses.split(','):
        axes = trl_axes(o)
        for order in o.orders.split(','):
            if (loss, order) not in o.contests:
                steps, tried = draw_steps(o.data, o.batch_size, order, o.warmup + o.repeats), []
                job = dict(o.job, loss=loss, steps=steps)
                if o.peers and importlib.util.find_spec('trl'):
                    tried = search(axes, job, o.warmup)
                contestants = [(ours, job)] + [(trl, job | tried[0][2])] * bool(tried)
                mine, other = (take_turns(len(steps), *contestants) + [()])[:2]
                (rate,), = take_turns(1, (matmul_rate, job))
                if tried:                # in another order only `rows` may be worth another choice
                    axes = {name: [value] for name, value in tried[0][2].items()} | dict(rows=axes['rows'])
                o.contests[loss, order] = SimpleNamespace(
                    steps=steps[o.warmup:], rate=rate, tried=tried, mine=mine[o.warmup:],
                    other=other[o.warmup:], apart=apart(mine, other, steps, loss, o.dtype))
            what = f'{loss}, {order} order, {o.batch_size} pairs, {o.dtype}' + ' compile' * o.compile
            c = o.contests[loss, order]
            yield loss, what + f'; {describe(c.tried[0][2])}' * bool(c.tried), c


def apart(mine, other, steps, loss, dtype):
    """How far apart the two sides' numbers are, as text: the losses of all rounds, the first log-probs."""
    if not other:
        return ''
    lengths = np.array([[len(r) for r in responses] for _, responses in steps[0]]) if loss == 'simpo' else 1
    logps = np.abs(mine[0]['logps'] - other[0]['logps'] * lengths).max()
    losses = max(abs(m['loss'] - t['loss']) for m, t in zip(mine, other))
    differ = ': THEY DIFFER' if dtype == 'float32' and losses > 1e-3 else ''
    return f'losses within {losses:.0e}, log-probs within {logps:.0e}{differ}'


def step(o):
    for loss, what, c in contests(o):
        least = needed(o.config, c.steps, loss) / c.rate       # seconds, were there nothing but products
        used = [f'{least / sum(r["seconds"] for r in results):.0%}' for results in (c.mine, c.other) if results]
        note = f'utilisation {" and ".join(used)} of {c.rate / 1e9:,.0f} GFLOP/s' + f'; {c.apart}' * bool(c.other)
        speed_row('step', what, 'pairs', o.batch_size, c.mine, c.other, note)


def memory(o):
    for loss, what, c in contests(o):
        mine, *other = (results[-1]['peak'] for results in (c.mine, c.other) if results)
        note = ', '.join(f'{peak:.2f} for {describe(settings)}' for _, peak, settings in c.tried[1:])
        row('memory', what, 'GiB', mine, *other, ratios=[peak / mine for peak in other], note=note)


def growth(o):
    for length in o.lengths:
        data = get_pairs(o, length)
        for size in o.steps:
            steps = draw_steps(data, size, 'own', o.warmup + o.repeats)
            job = dict(o.job, loss='dpo', steps=steps)
            try:
                results, = take_turns(len(steps), (ours, job))
                (rate,), = take_turns(1, (matmul_rate, job))
            except RuntimeError as e:
                say(f'  max_length {length}, {size} pairs: does not run here ({e})')
                continue
            results, steps = results[o.warmup:], steps[o.warmup:]
            used = needed(o.config, steps, 'dpo') / rate / sum(r['seconds'] for r in results)
            tokens = np.mean([len(p) + len(c) + len(r) for p, (c, r) in itertools.chain(*steps)])
            speed_row('growth', f'dpo, max_length {length}, {size} pairs, {o.dtype}', 'pairs', size, results,
                      note=f'{results[-1]["peak"]:.2f} GiB, utilisation {used:.0%}, {tokens:.0f} tokens a pair')


# --------------------------------------------------------------------------------------------------
# Sections prepare, generate, start

WORDS = ('the of and to a in is it you that he was for on are with as his they be at one have this from or '
         'had by hot but what there we can out other were all your when up use word how said an').split()


def text_file(o, n):
    """A .jsonl file of n records: those of --pairs, repeated as often as it takes, or random words."""
    path = os.path.join(o.folder, f'texts-{n}.jsonl')
    if o.pairs:
        records = [raw.strip() if isinstance(raw, bytes) else json.dumps(raw).encode()
                   for _, raw in read_source(o.pairs)]
    else:
        rng, records = random.Random(4), []
        for sizes in synthetic_lengths(n):
            prompt, chosen, rejected = (' '.join(rng.choices(WORDS, k=size)) for size in sizes)
            record = dict(prompt=f'\n\nHuman: {prompt}\n\nAssistant:', chosen=f' {chosen}.', rejected=f' {rejected}!')
            records.append(json.dumps(record).encode())
    with open(path, 'wb') as f:
        f.writelines(record + b'\n' for record in itertools.islice(itertools.cycle(records), n))
    return path


def prepared(job, data_dir):
    """Run prepare.py's path, with nothing cut -> Pairs."""
    return Pairs(prepare(Data(dataset=job.path, tokenizer='gpt2', bad_records='skip', max_length=2**20,
                              max_prompt_length=2**19, data_dir=os.path.join(job.folder, data_dir))))


def our_preparation(pause, job):
    pause()
    for k in itertools.count():
        begin = time.perf_counter()
        pairs = prepared(job, f'data-{k}')
        pause(dict(seconds=time.perf_counter() - begin, tokens=pairs.meta['tokens']))


def tiktoken_batch(pause, job):
    tokenizer, pairs = get_tokenizer('gpt2'), prepared(job, 'data-texts')
    texts = [tokenizer.decode(ids) for i in range(len(pairs.table)) for ids in
             (pairs[i][0].tolist(), *(r[:-1].tolist() for r in pairs[i][1]))]
    pause()
    while True:
        begin = time.perf_counter()
        tokenizer.encoding.encode_ordinary_batch(texts, num_threads=job.cores)
        pause(dict(seconds=time.perf_counter() - begin))


def preparation(o):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    job = dict(folder=o.folder, cores=cores, path=text_file(o, o.records))
    mine, other = take_turns(1 + o.repeats, (our_preparation, job), (tiktoken_batch, job))
    speed_row('prepare', f'{o.records:,} records, gpt2, {cores} cores; tiktoken', 'tokens',
              mine[0]['tokens'], mine[1:], other[1:])


def our_generation(pause, job):
    model = load(job.weights).to(job.device, getattr(torch, job.dtype))
    pause()
    while True:
        begin = clock(job.device)
        responses = generate(model, job.prompts, job.new_tokens, {-1}, temperature=0)
        pause(dict(seconds=clock(job.device) - begin, responses=responses))


def transformers_generation(pause, job):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(job.weights, dtype=getattr(torch, job.dtype)).to(job.device)
    model.generation_config.eos_token_id = None
    longest = max(map(len, job.prompts))
    rows = [([0] * (longest - len(p)) + p, [0] * (longest - len(p)) + [1] * len(p)) for p in job.prompts]
    tokens, mask = (torch.tensor(columns, device=job.device) for columns in zip(*rows))
    pause()
    while True:
        begin = clock(job.device)
        responses = model.generate(tokens, attention_mask=mask, max_new_tokens=job.new_tokens, do_sample=False,
                                   pad_token_id=0, cache_implementation=job.cache)[:, longest:].tolist()
        pause(dict(seconds=clock(job.device) - begin, responses=responses))


def generation(o):
    """Nothing ends a response: both sides make as many tokens."""
    prompts = [prompt for prompt, _ in o.data[:o.prompts]]
    peer = o.peers and importlib.util.find_spec('transformers')
    kinds = [('float32', None)] + [('bfloat16', cache) for cache in (None, 'static') if o.device == 'cuda']
    for dtype, cache in kinds:
        job = dict(o.job, prompts=prompts, new_tokens=o.new_tokens, dtype=dtype, cache=cache)
        contestants = [(our_generation, job)] + [(transformers_generation, job)] * bool(peer)
        mine, other = (take_turns(o.warmup + o.repeats, *contestants) + [()])[:2]
        same = sum(a == b for a, b in zip(mine[0]['responses'], other[0]['responses'])) if peer else 0
        what = f'{len(prompts)} prompts, {o.new_tokens} new tokens, {dtype}'
        speed_row('generate', what + f'; transformers, {cache or "dynamic"} cache' * bool(peer), 'tokens',
                  len(prompts) * o.new_tokens, mine[o.warmup:], other[o.warmup:],
                  f'{same} rows the same tokens' * bool(peer))


def start(o):
    """config/dpo_gpt2.py on these weights, twice: the second finds data prepared and reference cached."""
    tokenizer, took, said = 'gpt2' if o.config.vocab_size >= 50257 else 'byte', [], ''
    command = [sys.executable, '-u', 'train.py', 'config/dpo_gpt2.py'] + [f'--{k}={v}' for k, v in dict(
        init_from=o.weights, dataset=text_file(o, 8 * o.batch_size), tokenizer=tokenizer, bad_records='skip',
        data_dir=os.path.join(o.folder, 'data'), out_dir=os.path.join(o.folder, 'run'), overwrite=True,
        batch_size=o.batch_size, device=o.device, dtype=o.dtype, compile=o.compile).items()]
    for _ in range(2):
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              cwd=ROOT) as process:
            for line in process.stdout:
                said = line.strip() or said
                if said.startswith('first step'):
                    took.append(time.perf_counter() - begin)
                    break
            process.kill()
    if len(took) < 2:
        raise RuntimeError(f'train.py did not come to its first step; its last words: {said}')
    row('start', f'{o.batch_size} pairs, {tokenizer}, {o.dtype}' + ' compile' * o.compile, 's', took[1],
        note=f'data and reference there; {took[0]:.1f} before; train.py without its imports: {said}')


# --------------------------------------------------------------------------------------------------
# The command

SECTIONS = dict(step=step, memory=memory, growth=growth, prepare=preparation, generate=generation, start=start)


def read_options(argv):
    """[SECTION ...] [--name=value ...] -> (names of sections, Options). Raises InputError."""
    sections = [arg for arg in argv if not arg.startswith('-')]
    for name in sections:
        if name not in (*SECTIONS, 'all'):
            raise InputError(f'{name!r} is not one of the sections {", ".join(SECTIONS)}, all')
    o = configure(Options, [arg for arg in argv if arg.startswith('-')])
    if o.model not in MODELS:
        raise InputError(f'model: {o.model!r} is not one of {", ".join(MODELS)}')
    o.config, o.device = MODELS[o.model], o.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    cpu = o.device == 'cpu'
    o.batch_size, o.warmup, o.contests = o.batch_size or (8 if cpu else 64), 1 if cpu else 4, {}
    o.dtype = o.dtype or ('float32' if cpu else 'bfloat16')
    o.compile = not cpu if o.compile is None else o.compile
    for loss in o.losses.split(','):
        train.load_config([f'--loss={loss}', f'--device={o.device}', f'--dtype={o.dtype}',
                           f'--batch_size={o.batch_size}'])
    for order in o.orders.split(','):
        if order not in ('own', 'sorted'):
            raise InputError(f'orders: {order!r} is not one of own, sorted')
    o.steps = o.steps or ('8,32' if cpu else '8,64,256')
    for name in ('lengths', 'steps'):
        try:
            setattr(o, name, [int(word) for word in getattr(o, name).split(',')])
        except ValueError:
            raise InputError(f'{name}: {getattr(o, name)!r} is not a list of whole numbers')
    if max(o.max_length, *o.lengths) > o.config.block_size:
        raise InputError(f'max_length, lengths: {o.model} has a context of {o.config.block_size}')
    if min(o.repeats, *o.steps, o.records, o.prompts, o.new_tokens) < 1:
        raise InputError('repeats, steps, records, prompts and new_tokens are at least 1')
    return list(SECTIONS) if not sections or 'all' in sections else list(dict.fromkeys(sections)), o


def main(argv):
    sections, o = read_options(argv)
    for name, value in dict(OMP_WAIT_POLICY='PASSIVE', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false',
                            TRANSFORMERS_VERBOSITY='error').items():
        os.environ.setdefault(name, value)    # for the contestants: who waits for its turn must not spin
    say(head := machine(o.device))
    with tempfile.TemporaryDirectory() as o.folder:
        torch.manual_seed(0)
        model, o.weights = GPT(o.config), os.path.join(o.folder, 'weights')
        save(model, o.weights)
        o.job = dict(folder=o.folder, weights=o.weights, config=o.config, device=o.device, dtype=o.dtype,
                     compile=o.compile, tokens_per_batch=o.tokens_per_batch)
        o.data = get_pairs(o, o.max_length)
        means = np.mean([[len(p), len(c), len(r)] for p, (c, r) in o.data], axis=0)
        say(f'{o.model}, {sum(p.numel() for p in model.parameters()):,} random parameters; {len(o.data):,} '
            f'{"pairs of the file" if o.pairs else "synthetic pairs"}, max_length {o.max_length}; '
            f'mean tokens of prompt, chosen, rejected: {", ".join(f"{x:.0f}" for x in means)}')
        del model
        for section in sections:
            try:
                SECTIONS[section](o)
            except (RuntimeError, InputError) as e:
                say(f'  {section}: does not run here ({e})')
    columns = ['section', 'what', 'unit', 'ours', 'theirs', 'times better (least to greatest)', 'note']
    say(f'\n{head}\n')
    for line in [columns, ['---'] * len(columns), *TABLE]:
        say('| ' + ' | '.join(line) + ' |')


if __name__ == '__main__':
    run(main, __doc__)
