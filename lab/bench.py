"""
Speed and memory, side by side with others, on whatever device there is.

    python bench.py                                     # everything: first figures early, a table at the end
    python bench.py step memory --pairs=pairs.jsonl.gz  # some sections, your data
    python bench.py --profile=True                      # where a step of ours spends its time

    step      pairs/s of one optimiser step: DPO against TRL's DPOTrainer, SimPO against its CPOTrainer
    memory    peak memory of the same steps
    growth    ours alone: pairs/s and peak memory as max_length and the pairs a step grow
    prepare   tokens/s of prepare.py's whole path against tiktoken's encode_ordinary_batch of the same texts
    generate  tokens/s of GPT.generate against transformers' generate: greedy, same weights, same tokens
    start     seconds from the command to the end of train.py's first step

Every figure is a ratio within one run. The contestants live in processes of their own and take turns, ours,
theirs, ours, theirs, each waiting while the other works, on the same weights and token ids; the ratio is the
median of the pairwise ones, with the least and the greatest. A round of `step` is one optimiser step, from
pairs to updated weights, and for DPO one forward pass of the reference over the same pairs: its share in one
epoch. TRL runs its own whole training loop, at the fastest settings of those tried (each is printed),
and the two sides' losses and log-probs are compared. Utilisation counts the arithmetic that is needed (prompt
once, vocabulary at response positions, no padding) against the fastest plain matrix product of the model's
shapes in the step's dtype, measured right after the rounds.

Left out: evaluation, checkpoints, logging, several GPUs, and the quality of what is learnt (weights are
random). Peers that are not installed are passed over.
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
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.benchmark import Timer

import prepare
import train
from model import GPT, SIZES, GPTConfig

HERE = os.path.dirname(os.path.abspath(__file__))
LR = 1e-6
TABLE = []      # the rows of the last table


@dataclass
class Options:
    pairs: str = ''             # a file for prepare.py; empty: synthetic pairs, as long as HH-harmless's
    model: str = 'gpt2'         # a size of model.py's, or tiny
    device: str = 'auto'
    batch_size: int = 0         # pairs a step; 0: 8 on a CPU, 64 on a GPU
    max_length: int = 512       # tokens of a prompt with one response; a prompt may have half of it
    tokens_per_batch: int = 0   # of our micro-batches; 0: train.py's own choice
    repeats: int = 3
    warmup: int = 0             # rounds that do not count; 0: 1 on a CPU, 4 on a GPU
    dtype: str = 'auto'         # auto: bfloat16 on a GPU; on a CPU float32, and bfloat16 if it is faster
    compile: bool | None = None  # torch.compile for both sides; None: on a GPU
    losses: str = 'dpo,simpo'
    orders: str = 'own,sorted'  # the data's own order; batches of pairs of like length
    rows: int = 0               # TRL: pairs in a forward pass, gradients accumulated; 0: several are tried
    search: bool = True         # try settings one by one; False: only the first of each
    lengths: str = '256,512,1024'   # growth: max_length
    steps: str = ''             # growth: pairs a step; empty: 8,32 on a CPU, 8,64,256 on a GPU
    records: int = 10000        # prepare: a shorter file is repeated
    prompts: int = 16           # generate
    new_tokens: int = 128       # generate
    peers: bool = True
    profile: bool = False


def say(text):
    print(text, flush=True)


def row(section, what, unit, ours, theirs=None, ratios=(), note=''):
    """A line now, and again in the last table. `ratios`: pairwise, how many times better ours is."""
    ratio = f'{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})' if ratios else ''
    numbers = ['' if x is None else f'{x:,.0f}' if x >= 1000 else f'{x:.3g}' for x in (ours, theirs)]
    TABLE.append([section, what, unit, *numbers, ratio, note])
    say(f'* {section}, {what}: {numbers[0]} {unit}' + f' against {numbers[1]}, ratio {ratio}' * bool(ratio)
        + f'; {note}' * bool(note))


# ------------------------------------------------------------------------------------------------------------
# The pairs, the arithmetic they need, the machine


def synthetic_lengths(n):
    """(n, 3) lengths of prompt, chosen, rejected: log-normals fitted to the token lengths of HH-harmless's
    test split (2,312 pairs, GPT-2's BPE, end of text included): mean and deviation of their logarithms."""
    drawn = np.random.default_rng(0).normal([4.38, 3.37, 3.56], [1.00, 0.87, 0.93], (n, 3))
    return np.maximum(1, np.exp(drawn).round().astype(int)).tolist()


def get_pairs(o, max_length, n=4096):
    """[(prompt, [chosen, rejected]), ...], lists of GPT-2's token ids, in a fixed random order."""
    cfg = train.Config(dataset=o.pairs, data_dir=os.path.join(o.folder, 'data'), max_length=max_length,
                       max_prompt_length=max_length // 2, val_fraction=0.0, bad_records='skip')
    if o.pairs:
        with open(os.devnull, 'w') as devnull, contextlib.redirect_stdout(devnull):
            pairs = prepare.Pairs(prepare.prepare(cfg), 'train')
        pairs = [pairs[i] for i in range(len(pairs))]
    else:
        rng, pairs = np.random.default_rng(1), []
        for sizes in synthetic_lengths(n):
            prompt, *responses = (rng.integers(0, 50256, size) for size in sizes)
            pairs.append(prepare.truncate(prompt, responses, cfg)[:2])
    random.Random(2).shuffle(pairs)
    return [(prompt.tolist(), [r.tolist() for r in responses]) for prompt, responses in pairs if responses]


def draw_batches(pairs, batch_size, order, n):
    """n batches: one after the other, or of pairs of like length, at even distances from short to long."""
    starts = range(0, n * batch_size, batch_size)
    if order == 'sorted':
        pairs = sorted(pairs, key=lambda pair: len(pair[0]) + max(map(len, pair[1])))
        starts = [int((i + 0.5) / n * max(0, len(pairs) - batch_size)) for i in range(n)]
        random.Random(3).shuffle(starts)
    return [[pairs[i % len(pairs)] for i in range(start, start + batch_size)] for start in starts]


def needed(config, batches, loss):
    """Floating-point operations: a forward pass, a backward pass of two, and for DPO the reference's."""
    L, d, V = config['n_layer'], config['n_embd'], config['vocab_size']
    total = 0
    for prompt, (chosen, rejected) in itertools.chain(*batches):
        P, C, R = len(prompt), len(chosen), len(rejected)
        total += 2 * 12 * L * d * d * (P + C + R) + 2 * V * d * (C + R)
        total += 4 * L * d * (P * P / 2 + C * (P + C / 2) + R * (P + R / 2))
    return (4 if loss == 'dpo' else 3) * total


def matmul_rate(config, dtype, device):
    """FLOP/s of the fastest of the model's own matrix products and a square one, each at its best."""
    d, V, cpu, best = config['n_embd'], config['vocab_size'], device == 'cpu', 0.0
    tokens, square, calls = (2048, 2048, 1) if cpu else (16384, 8192, 10)
    for m, k, n in ((tokens, d, 4 * d), (tokens, 4 * d, d), (tokens // 4, d, V), (square, square, square)):
        a, b = (torch.randn(shape, device=device).to(getattr(torch, dtype)) for shape in ((m, k), (k, n)))
        out, until = torch.mm(a, b), time.perf_counter() + 0.5
        while time.perf_counter() < until:
            wait(device)
            since = time.perf_counter()
            for _ in range(calls):
                torch.mm(a, b, out=out)
            wait(device)
            best = max(best, calls * 2 * m * k * n / (time.perf_counter() - since))
    return best


def wait(device):
    if device == 'cuda':
        torch.cuda.synchronize()


def peak_memory(device):
    """The most GiB this process has had: the device's tensors, or resident memory. (Not ru_maxrss: on Linux a
    child's starts at its parent's.)"""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**30
    if os.path.exists('/proc/self/status'):
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) / 2**20 for line in f if line.startswith('VmHWM'))
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == 'darwin' else 2**20)


def machine(device):
    """Hardware, versions and commit."""
    def git(*args):
        done = subprocess.run(['git', '-C', HERE, *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ''
    name = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            name = next((line.split(':')[1].strip() for line in f if line.startswith('model name')), name)
    gpu = f'{torch.cuda.get_device_name()}; ' if device == 'cuda' else ''
    libraries = [f'{lib} {importlib.metadata.version(lib)}' for lib in (
        'torch', 'transformers', 'trl', 'tiktoken') if importlib.util.find_spec(lib)]
    changed = '+changes' if git('status', '--porcelain', '--untracked-files=no') else ''
    return (f'{gpu}{name}, {torch.get_num_threads()} threads; python {platform.python_version()}, '
            f'{", ".join(libraries)}; commit {git("rev-parse", "--short", "HEAD") or "unknown"}{changed}')


# ------------------------------------------------------------------------------------------------------------
# Processes that take turns


@contextlib.contextmanager
def started(work, **job):
    """A process that runs work(conn, job) and has said that it is ready."""
    context = multiprocessing.get_context('spawn')
    here, there = context.Pipe()
    process = context.Process(target=child, args=(work, there, job))
    process.start()
    there.close()
    c = SimpleNamespace(process=process, conn=here)
    try:
        turn(c, None)
        yield c
    finally:
        here.close()
        process.join()


def turn(c, word='go'):
    """Let the process do what `word` asks for (None: only wait until it is ready) -> its answer."""
    try:
        if word:
            c.conn.send(word)
        answer = c.conn.recv()
    except (EOFError, OSError):
        c.process.join()
        raise RuntimeError(f'the process ended with {c.process.exitcode}; out of memory?')
    if isinstance(answer, dict) and 'error' in answer:
        raise RuntimeError(answer['error'])
    return answer


def child(work, conn, job):
    log = os.open(os.path.join(job['folder'], f'{work.__name__}-{os.getpid()}'), os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        work(conn, SimpleNamespace(**job))
    except (EOFError, BrokenPipeError):      # nobody asks any more
        pass
    except Exception as e:
        with contextlib.suppress(OSError):
            conn.send(dict(error=prepare.first_line(e)))


# ------------------------------------------------------------------------------------------------------------
# A round of ours


def given_reference(pairs):
    """What both sides take for the reference's log-probs: near a random model's, for a loss unlike log 2."""
    return np.array([[-10.9 * len(r) for r in responses] for _, responses in pairs], dtype=np.float32)


def our_rounds(job):
    """A generator: None when all is set up, then a round each time: train.py's functions, as train() goes."""
    B, dpo = len(job.batches[0]), job.loss == 'dpo'
    cfg = train.Config(loss=job.loss, device=job.device, dtype=job.dtype, compile=job.compile, batch_size=B,
                       tokens_per_batch=job.tokens_per_batch)
    train.settle_machine(cfg)
    model = GPT.from_pretrained(job.weights).to(cfg.device)
    train.settle_products(model)
    pairs = [pair for batch in job.batches for pair in batch]
    reference = given_reference(pairs)
    train.compile_blocks(model, cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(cfg.beta1, cfg.beta2), weight_decay=0.0,
                                  fused=True)

    def load(k):
        if k == len(job.batches):
            return []
        mine = np.arange(k * B, (k + 1) * B)
        return [(batch, torch.from_numpy(reference[mine[members]]).to(cfg.device) if dpo else None,
                 torch.ones(len(members)).to(cfg.device))
                for members, batch in train.batches(pairs, mine, 2, cfg)]
    yield None
    waiting = load(0)
    for k in range(len(job.batches)):
        wait(cfg.device)
        begin, logps = time.perf_counter(), None
        if dpo or k == 0:      # the reference's forward pass; for SimPO only to compare
            logps = train.score(model, pairs, np.arange(k * B, (k + 1) * B), 2, cfg)
        middle = time.perf_counter()
        stats = torch.zeros(len(train.STATS), dtype=torch.float64, device=cfg.device)
        for batch, ref, p in waiting:
            with train.precision(cfg):
                sums = batch.sum_by_response(model.token_logps(batch))
            losses, chosen_rewards, rejected_rewards = train.objective(cfg, sums, batch.lengths, ref, p)
            (losses.sum() / B).backward()
            stats += train.statistics(losses, chosen_rewards, rejected_rewards, sums)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        waiting = load(k + 1)
        assert math.isfinite(norm.item()) and math.isfinite(stats[0].item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(cfg.device)
        yield dict(reference=middle - begin if dpo else 0.0, step=time.perf_counter() - middle,
                   logps=logps, loss=stats[0].item() / B, peak=peak_memory(cfg.device))


def ours(conn, job):
    rounds = our_rounds(job)
    conn.send(next(rounds))
    while True:
        conn.send(next(rounds) if conn.recv() == 'go' else matmul_rate(job.config, job.dtype, job.device))


# ------------------------------------------------------------------------------------------------------------
# A round of TRL's


def trl_settings(o):
    """What is tried, the likely best of each first. `rows`: pairs in a forward pass; fewer than a step's, and
    accumulated gradients, need less padding. `tuned`: train.settle_machine, what we do for ourselves: glibc
    keeps freed memory, and float32 products go through oneDNN. Not tried: padding_free, which TRL 1.16 turns
    off itself; offloading and gradient checkpointing, which cost time; Liger's loss, which it refuses."""
    B = o.batch_size
    if o.device == 'cpu':
        axes = dict(dtype=o.dtypes, rows=[1, B, max(1, B // 4)], attention=['sdpa', 'eager'],
                    tuned=[True, False], compile=[o.compile])
    else:
        flash = ['flash_attention_2'] * bool(importlib.util.find_spec('flash_attn'))
        axes = dict(dtype=o.dtypes, rows=[B, max(1, B // 4)], attention=['sdpa'] + flash, tuned=[False],
                    compile=[o.compile] + [False] * o.compile,
                    liger=[False] + [True] * bool(importlib.util.find_spec('liger_kernel')))
    axes['rows'] = [n for n in ([o.rows] if o.rows else axes['rows']) if B % n == 0] or [B]
    return {name: list(dict.fromkeys(values))[:None if o.search else 1] for name, values in axes.items()}


def trl(conn, job):
    """The trainer's train(), held between its steps until the next word comes through `conn`."""
    if job.tuned:
        train.settle_machine(train.Config(device=job.device))
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    B, dpo = len(job.batches[0]), job.loss == 'dpo'
    pairs = [pair for batch in job.batches for pair in batch]

    # the trainers' own tokenising gives way to the token ids that ours has, and the reference's pass over all
    # pairs at once to one before each step
    class DPO(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

        def _precompute_ref_logps(self, dataset, *args):
            return dataset

    class CPO(CPOTrainer):
        def tokenize_row(self, feature):
            prompt, responses = pairs[int(feature['prompt'])]
            row = dict(prompt_input_ids=prompt, prompt_attention_mask=[1] * len(prompt))
            for side, r in zip(('chosen', 'rejected'), responses):
                row |= {f'{side}_input_ids': prompt + r, f'{side}_attention_mask': [1] * len(prompt + r),
                        f'{side}_labels': [-100] * len(prompt) + r}
            return row

    cpu = job.device == 'cpu'
    options = dict(
        output_dir=os.path.join(job.folder, 'trl'), max_steps=len(job.batches), learning_rate=LR,
        per_device_train_batch_size=job.rows, gradient_accumulation_steps=B // job.rows, max_grad_norm=1.0,
        train_sampling_strategy='sequential', lr_scheduler_type='constant', optim='adamw_torch_fused',
        weight_decay=0.0, bf16=job.dtype == 'bfloat16', torch_compile=job.compile, use_cpu=cpu,
        gradient_checkpointing=False, use_liger_kernel=getattr(job, 'liger', False), logging_strategy='no',
        logging_nan_inf_filter=False, save_strategy='no', report_to='none', disable_tqdm=True,
        dataloader_num_workers=0 if cpu else 2, dataloader_pin_memory=not cpu)
    if dpo:
        reference = given_reference(pairs).T.tolist()
        data = Dataset.from_dict(dict(
            prompt_ids=[p for p, _ in pairs], ref_chosen_logps=reference[0], ref_rejected_logps=reference[1],
            chosen_ids=[chosen for _, (chosen, _) in pairs], rejected_ids=[r for _, (_, r) in pairs]))
        config = DPOConfig(beta=0.1, precompute_ref_log_probs=True, max_length=None, **options)
    else:
        data = Dataset.from_dict(dict(prompt=[str(i) for i in range(len(pairs))], chosen=[''] * len(pairs),
                                      rejected=[''] * len(pairs)))
        config = CPOConfig(loss_type='simpo', beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0,
                           remove_unused_columns=False, **options)
    end = '<|endoftext|>'       # a tokenizer that knows nothing else: it is asked only for its padding
    words = Tokenizer(models.WordLevel({end: 50256}, unk_token=end))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, bos_token=end, pad_token=end)
    model = AutoModelForCausalLM.from_pretrained(job.weights, dtype=torch.float32,
                                                 attn_implementation=job.attention)
    if job.tuned:
        train.settle_products(model)
    trainer = (DPO if dpo else CPO)(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    done = SimpleNamespace(rounds=0, middle=0.0, reference=0.0, logps=None, loss=0.0)
    training_step = trainer.training_step

    def keep_loss(*args, **kwargs):
        loss = training_step(*args, **kwargs)
        done.loss += loss
        return loss

    def begin():      # wait for the word; then the reference's pass
        conn.recv()
        wait(job.device)
        since, parts = time.perf_counter(), []
        stop = (done.rounds + 1) * B if dpo or done.rounds == 0 else 0
        for start in range(done.rounds * B, stop, job.rows):
            rows = [trainer.train_dataset[i] for i in range(start, start + job.rows)]
            batch = trainer._prepare_inputs(trainer.data_collator(rows))
            if dpo:
                logps = trainer.compute_ref_log_probs(trainer.model, batch)
            else:         # only to compare
                with torch.no_grad(), trainer.accelerator.autocast():
                    logps = trainer.concatenated_forward(trainer.model, batch)[:2]
            parts.append(torch.stack(logps, dim=1).float().cpu().numpy())
        done.logps, done.loss = np.concatenate(parts) if parts else None, 0.0
        done.middle = time.perf_counter()
        done.reference = done.middle - since if dpo else 0.0

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            conn.send(None)
            begin()

        def on_step_end(self, *args, **kwargs):
            wait(job.device)
            conn.send(dict(reference=done.reference, step=time.perf_counter() - done.middle, logps=done.logps,
                           loss=float(done.loss), peak=peak_memory(job.device)))
            done.rounds += 1
            begin()

    trainer.training_step = keep_loss
    trainer.add_callback(Turns())
    trainer.train()


# ------------------------------------------------------------------------------------------------------------
# Sections step, memory, growth


def describe(settings):
    rows = settings.get('rows')
    words = [settings['dtype'], settings.get('attention'), rows and f'{rows} a pass']
    return ' '.join(filter(None, words + [w for w in ('compile', 'tuned', 'liger') if settings.get(w)]))


def seconds(result):
    return result['reference'] + result['step']


def search(work, axes, job, warmup):
    """Settings changed one at a time, from the first of each axis, and kept where faster. -> [(seconds, peak
    memory, settings, first round), ...] of those that ran, fastest first."""
    tried, best, least = [], {name: values[0] for name, values in axes.items()}, math.inf
    for change in [best] + [{name: value} for name, values in axes.items() for value in values[1:]]:
        settings = best | change
        what = f'  {work.__name__}, {job["loss"]}, {describe(settings)}: '
        try:
            with started(work, **job | settings) as c:
                first, *_, last = [turn(c) for _ in range(warmup + 1)]
        except RuntimeError as e:
            say(f'{what}does not run here ({e})')
            continue
        took = seconds(last)
        tried.append((took, last['peak'], settings, first))
        say(f'{what}{len(job["batches"][0]) / took:.2f} pairs/s (step {last["step"]:.2f} s, reference '
            f'{last["reference"]:.2f} s), {last["peak"]:.2f} GiB at most')
        if took < least:
            best, least = settings, took
    return sorted(tried, key=lambda t: t[0])


def contests(o, repeats, orders):
    """Ours and TRL's, each at its fastest settings, taking turns: a contest per objective and order."""
    peers, n = o.peers and importlib.util.find_spec('trl'), o.warmup + repeats
    for loss in o.losses.split(','):
        job, our, their = dict(o.job, loss=loss), None, []
        for order in orders.split(','):
            job['batches'] = batches = draw_batches(o.data, o.batch_size, order, n)
            our = our or search(ours, dict(dtype=o.dtypes, compile=[o.compile]), job, o.warmup)
            if not our:
                break
            if peers:       # in another order only the pairs in a pass may be worth another choice
                axes = trl_settings(o)
                if their:
                    axes = {k: axes[k] if k == 'rows' else [v] for k, v in their[0][2].items()}
                first_order, their = not their, search(trl, axes, job, o.warmup)
                if first_order:
                    compare(our, their, batches[0], loss)
            with contextlib.ExitStack() as stack:
                a = stack.enter_context(started(ours, **job | our[0][2]))
                b = stack.enter_context(started(trl, **job | their[0][2])) if their else None
                mine, other = zip(*[(turn(a), turn(b) if b else None) for _ in range(n)])
                rate = turn(a, 'rate')
            apart = max([abs(m['loss'] - t['loss']) for m, t in zip(mine, other) if t], default=None)
            if their:
                say(f'  {loss}, {order}: the two losses at most {apart:.1e} apart in {n} steps')
            yield SimpleNamespace(loss=loss, order=order, batches=batches[o.warmup:], rate=rate, our=our,
                                  their=their, mine=mine[o.warmup:], other=other[o.warmup:] if their else ())


def compare(our, their, batch, loss):
    """Say how far apart the two sides' first losses and log-probs are: the same batch, the same weights."""
    lengths = np.array([[len(r) for r in responses] for _, responses in batch]) if loss == 'simpo' else 1
    for dtype in ('float32', 'bfloat16'):
        a, b = (next((t[3] for t in tried if t[2]['dtype'] == dtype), None) for tried in (our, their))
        if a and b:
            gap = np.abs(a['logps'] - b['logps'] * lengths).max()
            wrong = ': THEY DIFFER' if dtype == 'float32' and abs(a['loss'] - b['loss']) > 1e-3 else ''
            say(f'  the same numbers? {loss}, {dtype}, first batch: losses {a["loss"]:.5f} and '
                f'{b["loss"]:.5f}, log-probs of whole responses at most {gap:.1e} apart{wrong}')


def step(o):
    for c in contests(o, o.repeats, o.orders):
        o.contests.append(c)
        mine, other, pairs = list(map(seconds, c.mine)), list(map(seconds, c.other)), o.batch_size * o.repeats
        least = needed(o.config, c.batches, c.loss) / c.rate       # seconds, were there nothing but products
        what = f'{c.loss}, {"by length" if c.order == "sorted" else "own order"}, {describe(c.our[0][2])}'
        what += f'; TRL {describe(c.their[0][2])}' if other else ''
        note = f'utilisation {least / sum(mine):.0%}' + (f', TRL {least / sum(other):.0%}' if other else '')
        row('step', what, 'pairs/s', pairs / sum(mine), pairs / sum(other) if other else None,
            [t / m for m, t in zip(mine, other)], f'{note}, of {c.rate / 1e9:,.0f} GFLOP/s')


def memory(o):
    for c in [c for c in o.contests if c.order == 'own'] or contests(o, 1, 'own'):
        mine, other, note = c.mine[-1]['peak'], None, ''
        what = f'{c.loss}, {o.batch_size} pairs a step, {describe(c.our[0][2])}'
        if c.other:
            other = c.other[-1]['peak']
            what += f'; TRL {describe(c.their[0][2])}'
            note = ', '.join(f'{t[1]:.2f} for TRL {describe(t[2])}' for t in c.their[1:])
        row('memory', what, 'GiB', mine, other, [other / mine] if other else (), note)


def growth(o):
    for length in map(int, o.lengths.split(',')):
        data = get_pairs(o, length)
        for size in map(int, (o.steps or ('8,32' if o.device == 'cpu' else '8,64,256')).split(',')):
            batches = draw_batches(data, size, 'own', o.warmup + o.repeats)
            job = dict(o.job, loss='dpo', batches=batches, dtype=o.dtypes[0], compile=o.compile)
            try:
                with started(ours, **job) as c:
                    results = [turn(c) for _ in batches][o.warmup:]
                    rate = turn(c, 'rate')
            except RuntimeError as e:
                say(f'  max_length {length}, {size} pairs a step: does not run here ({e})')
                continue
            speeds = [size / seconds(r) for r in results]
            used = needed(o.config, batches[o.warmup:], 'dpo') / rate / sum(map(seconds, results))
            tokens = np.mean([len(p) + len(c) + len(r) for p, (c, r) in itertools.chain(*batches)])
            note = f'{min(speeds):.2f} to {max(speeds):.2f}; {tokens:.0f} tokens a pair, '
            note += f'{results[-1]["peak"]:.2f} GiB, utilisation {used:.0%}'
            what = f'dpo, max_length {length}, {size} pairs a step, {o.dtypes[0]}'
            row('growth', what, 'pairs/s', statistics.median(speeds), note=note)


# ------------------------------------------------------------------------------------------------------------
# Sections prepare, generate, start

WORDS = ('the of and to a in is it you that he was for on are with as his they be at one have this from or '
         'had by hot but some what there we can out other were all your when up use word how said an').split()


def text_file(o, records):
    """A .jsonl file of so many records: the pairs' file, repeated as often as it takes, or random words."""
    path = os.path.join(o.folder, f'texts-{records}.jsonl')
    with open(path, 'wb') as f:
        if o.pairs:
            lines = [raw for _, raw in prepare.read_source(o.pairs)]
            lines = [raw.strip() if isinstance(raw, bytes) else json.dumps(raw).encode() for raw in lines]
            f.writelines(line + b'\n' for line in itertools.islice(itertools.cycle(lines), records))
            return path
        rng = random.Random(4)
        for sizes in synthetic_lengths(records):
            prompt, chosen, rejected = (' '.join(rng.choices(WORDS, k=n)) for n in sizes)
            f.write(json.dumps(dict(prompt=f'\n\nHuman: {prompt}\n\nAssistant:', chosen=f' {chosen}.',
                                    rejected=f' {rejected}!')).encode() + b'\n')
    return path


def preparing(conn, job):
    tokenizer, texts = prepare.get_tokenizer('gpt2'), []
    for _, raw in prepare.read_source(job.path):
        with contextlib.suppress(prepare.InputError):
            prompt, responses, *_ = prepare.read_record(json.loads(raw))
            texts += [prompt, *responses]
    tokens = sum(map(len, tokenizer.encode_ordinary_batch(texts, num_threads=job.cores)))
    conn.send(None)
    for k in itertools.count():
        conn.recv()
        cfg = train.Config(dataset=job.path, data_dir=os.path.join(job.folder, str(k)), bad_records='skip')
        begin = time.perf_counter()
        prepare.prepare(cfg)
        middle = time.perf_counter()
        tokenizer.encode_ordinary_batch(texts, num_threads=job.cores)
        conn.send((tokens, middle - begin, time.perf_counter() - middle))


def preparation(o):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    with started(preparing, folder=o.folder, cores=cores, path=text_file(o, o.records)) as c:
        tokens, mine, other = zip(*[turn(c) for _ in range(1 + o.repeats)][1:])
    row('prepare', f'{o.records:,} records, gpt2, {cores} cores; tiktoken alone', 'tokens/s',
        tokens[0] / statistics.median(mine), tokens[0] / statistics.median(other),
        [t / m for m, t in zip(mine, other)])


def generating(conn, job):
    """Each turn generates with both, in one process: the same prompts, greedily, and nothing ends a row."""
    train.settle_machine(train.Config(device=job.device))
    dtype, longest = getattr(torch, job.dtype), max(map(len, job.prompts))
    model = GPT.from_pretrained(job.weights).to(job.device, dtype)
    train.settle_products(model)
    model.config.eos_token_id = -1
    if job.peer:
        from transformers import AutoModelForCausalLM
        theirs = AutoModelForCausalLM.from_pretrained(job.weights, dtype=dtype).to(job.device).eval()
        theirs.generation_config.eos_token_id = None
        pads = [[0] * (longest - len(p)) for p in job.prompts]
        tokens = torch.tensor([pad + p for pad, p in zip(pads, job.prompts)], device=job.device)
        mask = torch.tensor([pad + [1] * len(p) for pad, p in zip(pads, job.prompts)], device=job.device)
        options = dict(attention_mask=mask, max_new_tokens=job.new_tokens, do_sample=False, pad_token_id=0,
                       cache_implementation=job.cache)
    conn.send(None)
    while True:
        conn.recv()
        wait(job.device)
        begin = time.perf_counter()
        mine = model.generate(job.prompts, job.new_tokens, temperature=0)
        wait(job.device)
        middle = time.perf_counter()
        other = theirs.generate(tokens, **options)[:, longest:].tolist() if job.peer else mine
        wait(job.device)
        end = time.perf_counter()
        assert all(len(r) == job.new_tokens for r in mine + other)
        conn.send((middle - begin, end - middle, sum(a == b for a, b in zip(mine, other))))


def generate(o):
    prompts, n = [prompt for prompt, _ in o.data[:o.prompts]], o.prompts * o.new_tokens
    peer = o.peers and bool(importlib.util.find_spec('transformers'))
    kinds = [('float32', None)] + [('bfloat16', cache) for cache in (None, 'static') if o.device == 'cuda']
    for dtype, cache in kinds:
        job = dict(o.job, prompts=prompts, new_tokens=o.new_tokens, dtype=dtype, cache=cache, peer=peer)
        try:
            with started(generating, **job) as c:
                mine, other, same = zip(*[turn(c) for _ in range(o.warmup + o.repeats)][o.warmup:])
        except RuntimeError as e:
            say(f'  generate, {dtype}, cache {cache}: does not run here ({e})')
            continue
        what = f'{o.prompts} prompts, {o.new_tokens} new tokens, {dtype}'
        if peer:
            row('generate', f'{what}; transformers, {cache or "dynamic"} cache', 'tokens/s',
                n / statistics.median(mine), n / statistics.median(other),
                [t / m for m, t in zip(mine, other)], f'{same[-1]} of {o.prompts} rows the same tokens')
        else:
            row('generate', what, 'tokens/s', n / statistics.median(mine))


def start(o):
    """config/dpo_gpt2.py on these weights, twice: the second finds data prepared and reference cached."""
    data = text_file(o, 8 * o.batch_size)
    for compiled in sorted({False, o.compile}):
        took, said = [], 'nothing'
        command = [sys.executable, '-u', 'train.py', 'config/dpo_gpt2.py'] + [f'--{k}={v}' for k, v in dict(
            init_from=o.weights, dataset=data, data_dir=os.path.join(o.folder, 'data'), bad_records='skip',
            out_dir=os.path.join(o.folder, 'run'), overwrite=True, batch_size=o.batch_size, device=o.device,
            compile=compiled).items()]
        for _ in range(2):
            begin = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  cwd=HERE) as process:
                for line in process.stdout:
                    said = line.strip() or said
                    if 'first step after' in line:
                        took.append(time.perf_counter() - begin)
                        break
                process.kill()
            if 'first step after' not in said:
                return say(f'  start: train.py did not come to its first step; its last words: {said}')
        said = said[said.index('first step after'):]
        row('start', f'{o.batch_size} pairs a step, compile {"on" if compiled else "off"}', 's', took[1],
            note=f'data and reference there; {took[0]:.1f} before; train.py, without its imports: {said}')


def profile(o):
    """torch.profiler's table of one round of ours, in this process."""
    batches = draw_batches(o.data, o.batch_size, 'own', o.warmup + 1)
    rounds = our_rounds(SimpleNamespace(**o.job, batches=batches, loss=o.losses.split(',')[0],
                                        dtype=o.dtypes[0], compile=o.compile))
    for _ in range(1 + o.warmup):
        next(rounds)
    with torch.profiler.profile() as p:
        next(rounds)
    by = 'self_cuda_time_total' if o.device == 'cuda' else 'self_cpu_time_total'
    say(p.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=40))


# ------------------------------------------------------------------------------------------------------------
# The command

SECTIONS = dict(step=step, memory=memory, growth=growth, prepare=preparation, generate=generate, start=start)


def bf16_is_faster():
    """Does this CPU multiply bfloat16 faster than float32?"""
    single, half = (Timer('a @ a', globals=dict(a=torch.randn(512, 512).to(dtype))).timeit(4).mean
                    for dtype in (torch.float32, torch.bfloat16))
    return half < single


def main(argv):
    sections = [name for arg in argv if arg[0] != '-' for name in (SECTIONS if arg == 'all' else [arg])]
    for name in sections:
        if name not in SECTIONS:
            raise prepare.InputError(f'{name!r} is none of the sections {", ".join(SECTIONS)}, all')
    o = train.load_config([arg for arg in argv if arg[0] == '-'], Options())
    if o.model not in (*SIZES, 'tiny'):
        raise prepare.InputError(f'model: {o.model!r} is none of tiny, {", ".join(SIZES)}')
    for name, value in dict(OMP_WAIT_POLICY='PASSIVE', HF_HUB_OFFLINE='1', HF_HUB_DISABLE_TELEMETRY='1',
                            TOKENIZERS_PARALLELISM='false', TRANSFORMERS_VERBOSITY='error').items():
        os.environ.setdefault(name, value)    # for the contestants: whoever waits for its turn must not spin
    o.device = ('cuda' if torch.cuda.is_available() else 'cpu') if o.device == 'auto' else o.device
    cpu, o.contests = o.device == 'cpu', []
    o.batch_size, o.warmup = o.batch_size or (8 if cpu else 64), o.warmup or (1 if cpu else 4)
    o.compile = not cpu if o.compile is None else o.compile
    o.dtypes = [o.dtype] if o.dtype != 'auto' else ['float32'] if cpu else ['bfloat16']
    if o.dtype == 'auto' and cpu and bf16_is_faster():
        o.dtypes = ['bfloat16', 'float32']
    say(head := machine(o.device))
    with tempfile.TemporaryDirectory() as o.folder:
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SIZES.get(o.model, dict(n_layer=2, n_head=2, n_embd=64))))
        o.weights, o.config = os.path.join(o.folder, 'weights'), asdict(model.config)
        model.save_pretrained(o.weights)
        o.job = dict(folder=o.folder, weights=o.weights, config=o.config, device=o.device,
                     tokens_per_batch=o.tokens_per_batch)
        o.data = get_pairs(o, o.max_length)
        means = np.mean([[len(p), len(c), len(r)] for p, (c, r) in o.data], axis=0)
        say(f'{o.model}, {model.num_params():,} random parameters; {len(o.data):,} '
            f'{"pairs of the file" if o.pairs else "synthetic pairs"}, max_length {o.max_length}; '
            f'mean tokens of prompt, chosen, rejected: {", ".join(f"{x:.0f}" for x in means)}')
        del model
        for section in dict.fromkeys(sections or (() if o.profile else SECTIONS)):
            try:
                SECTIONS[section](o)
            except (RuntimeError, prepare.InputError) as e:
                say(f'  {section}: does not run here ({e})')
        if o.profile:
            profile(o)
    if TABLE:
        columns = ['section', 'what', 'unit', 'ours', 'theirs', 'times better (least to greatest)', 'note']
        say(f'\n{head}\n')
        for line in [columns, ['---'] * len(columns), *TABLE]:
            say('| ' + ' | '.join(line) + ' |')


if __name__ == '__main__':
    train.run(main, __doc__, sys.argv[1:] or ['all'])
