"""
Speed and memory, side by side with others, on whatever device there is.

    python bench.py                                          # everything: a first figure early, a table at the end
    python bench.py step memory --pairs=pairs.jsonl.gz       # some sections, your data
    python bench.py step --profile=True --peers=False        # where a step of ours spends its time

    step      pairs/s of one optimiser step, DPO against TRL's DPOTrainer, SimPO against its CPOTrainer
    memory    peak memory of the same steps, each contestant in a process of its own
    growth    ours alone: pairs/s and peak memory as max_length and the pairs a step grow
    prepare   tokens/s of prepare.py's whole path against tiktoken's encode_ordinary_batch over the same texts
    generate  tokens/s of GPT.generate against transformers' generate, greedy, same weights, same tokens
    start     seconds from the command to the first step of train.py

How: every figure is a ratio within one run. Contestants live in processes of their own and take turns, ours, theirs,
ours, theirs, on the same token ids and weights, while the other waits; a ratio is the median of the pairwise ones,
with its least and greatest. One round is one optimiser step from pairs to updated weights and, for DPO, one forward
of the same pairs by the reference: what a run of one epoch pays for each step. Peers run their own trainer's whole
loop, at the fastest settings of those tried (each is printed), and both sides' losses and log-probs are compared.
Utilisation: the arithmetic needed (prompt once, vocabulary at response positions, no padding) per second, against
the best rate of plain matrix products of the model's shapes in the step's dtype, taken right after the rounds.

Left out: loading and tokenising (but see prepare), evaluation, checkpoints, logging, more than one GPU, the quality of
what is learnt; weights are random. Peers that are not installed are passed over.
"""
import contextlib
import dataclasses
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

for name, value in dict(OMP_WAIT_POLICY='PASSIVE', HF_HUB_OFFLINE='1', HF_HUB_DISABLE_TELEMETRY='1',
                        TOKENIZERS_PARALLELISM='false', TRANSFORMERS_VERBOSITY='error').items():
    os.environ.setdefault(name, value)    # a contestant that waits its turn must not spin; read when torch is loaded

import numpy as np
import torch

import prepare
import train
from model import GPT, SIZES, GPTConfig, pack

HERE = os.path.dirname(os.path.abspath(__file__))
LR = 1e-6


@dataclasses.dataclass
class Options:
    pairs: str = ''             # a file that prepare.py reads; empty: synthetic pairs of HH-harmless's lengths
    model: str = 'gpt2'         # a size of model.py's, or tiny; random weights
    batch_size: int = 0         # pairs a step; 0: 8 on a CPU, 64 on a GPU
    max_length: int = 512       # tokens of a prompt with one response; a prompt may have half of it
    tokens_per_batch: int = 0   # of a micro-batch of ours; 0: train.py's default, and in growth 4096 on a CPU
    repeats: int = 3
    warmup: int = 0             # rounds not counted; 0: 1 on a CPU, 4 on a GPU
    dtype: str = 'auto'         # auto: bfloat16 too where its products are faster here; float32, bfloat16
    compile: str = 'auto'       # torch.compile of ours; auto: on a GPU; yes, no
    losses: str = 'dpo,simpo'
    orders: str = 'own,sorted'  # the data's own order; batches of pairs of like length
    search: bool = True         # try TRL's settings one by one; False: take the first of each
    lengths: str = ''           # growth: max_lengths; empty: 256,512,1024
    steps: str = ''             # growth: pairs a step; empty: 8,32 on a CPU, 8,64,256 on a GPU
    records: int = 20000        # prepare: records at least; a shorter file is repeated
    prompts: int = 16           # generate
    new_tokens: int = 128
    peers: bool = True
    profile: bool = False
    device: str = 'auto'


# ----------------------------------------------------------------------------------------------------------------
# The pairs, the arithmetic they need, the machine


def synthetic_lengths(n, seed=0):
    """(n, 3) lengths of prompt, chosen, rejected with their end of text: log-normals whose mean and deviation of the
    logarithm are those of HH-harmless's test split (2,312 pairs) under GPT-2's BPE."""
    return np.exp(np.random.default_rng(seed).normal([4.38, 3.37, 3.56], [1.00, 0.87, 0.93], (n, 3))).astype(int) + 1


def get_pairs(o, folder, max_length, n=4096):
    """[(prompt, [chosen, rejected]), ...], lists of GPT-2's token ids, in a fixed random order."""
    cfg = train.Config(dataset=o.pairs, data_dir=os.path.join(folder, 'data'), max_length=max_length,
                       max_prompt_length=max_length // 2, val_fraction=0.0, bad_records='skip')
    if o.pairs:
        with open(os.devnull, 'w') as devnull, contextlib.redirect_stdout(devnull):
            pairs = prepare.Pairs(prepare.prepare(cfg), 'train')
        pairs = [(p.tolist(), [c.tolist(), r.tolist()]) for p, (c, r) in (pairs[i] for i in range(len(pairs)))]
    else:
        rng, pairs = np.random.default_rng(1), []
        for sizes in synthetic_lengths(n):
            p, c, r = (rng.integers(0, 50256, size) for size in sizes)
            p, (c, r), _ = prepare.truncate(p, [c, r], cfg)
            pairs.append((p.tolist(), [c.tolist(), r.tolist()]))
    random.Random(2).shuffle(pairs)
    return pairs


def draw_batches(pairs, batch_size, order, n):
    """n batches; sorted: of the whole data laid out by length, at even distances from its shortest to its longest."""
    if order == 'sorted':
        pairs = sorted(pairs, key=lambda pair: len(pair[0]) + max(map(len, pair[1])))
        starts = [int((i + 0.5) / n * (len(pairs) - batch_size)) for i in range(n)]
        random.Random(3).shuffle(starts)
    else:
        starts = range(0, n * batch_size, batch_size)
    return [[pairs[i % len(pairs)] for i in range(s, s + batch_size)] for s in starts]


def needed(config, pairs, passes):
    """Floating-point operations that `passes` forward passes' worth of these pairs need (a backward pass is two)."""
    L, d, V = config['n_layer'], config['n_embd'], config['vocab_size']
    total = 0
    for prompt, (chosen, rejected) in pairs:
        P, C, R = len(prompt), len(chosen), len(rejected)
        total += 2 * 12 * L * d * d * (P + C + R) + 2 * V * d * (C + R)
        total += 4 * L * d * (P * P / 2 + C * (P + C / 2) + R * (P + R / 2))
    return passes * total


def matmul_rate(config, dtype, device, tokens=2048):
    """FLOP/s of the fastest of the model's own matrix products and a square one, each the best of some."""
    d, V, square = config['n_embd'], config['vocab_size'], 2048 if device == 'cpu' else 8192
    tokens, best = tokens if device == 'cpu' else 8 * tokens, 0.0
    for m, k, n in ((tokens, d, 4 * d), (tokens, 4 * d, d), (tokens // 2, d, V), (square, square, square)):
        a, b = (torch.randn(*shape, device=device).to(getattr(torch, dtype)) for shape in ((m, k), (k, n)))
        out, until = torch.mm(a, b), time.perf_counter() + 0.5
        while time.perf_counter() < until:
            wait(device)
            t = time.perf_counter()
            for _ in range(1 if device == 'cpu' else 10):
                torch.mm(a, b, out=out)
            wait(device)
            best = max(best, (1 if device == 'cpu' else 10) * 2 * m * k * n / (time.perf_counter() - t))
    return best


def wait(device):
    if device == 'cuda':
        torch.cuda.synchronize()


def peak_bytes(device):
    """The most memory that this process has held: the device's, or resident memory. (ru_maxrss would start from the
    parent's: it outlives exec, and VmHWM does not.)"""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated()
    if os.path.exists('/proc/self/status'):
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith('VmHWM'))
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def machine(device):
    """Hardware, versions and commit, in lines."""
    name = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            name = next((line.split(':')[1].strip() for line in f if line.startswith('model name')), name)
    name = f'{name}, {torch.get_num_threads()} threads'
    if device == 'cuda':
        name = f'{torch.cuda.get_device_name()}; {name}'

    def git(*args):
        done = subprocess.run(['git', '-C', HERE, *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ''
    import importlib.metadata as metadata
    versions = [f'{lib} {metadata.version(lib)}' for lib in ('torch', 'transformers', 'trl', 'tiktoken')
                if importlib.util.find_spec(lib)]
    commit = git('rev-parse', '--short', 'HEAD') + ('+changes' if git('status', '--porcelain') else '')
    return f'{name}\npython {platform.python_version()}, {", ".join(versions)}; commit {commit or "unknown"}'


# ----------------------------------------------------------------------------------------------------------------
# Processes that take turns


def start(work, **job):
    """A process that runs work(conn, job) and has said that it is ready."""
    context = multiprocessing.get_context('spawn')
    conn, theirs = context.Pipe()
    process = context.Process(target=child, args=(work, theirs, job))
    process.start()
    theirs.close()
    c = SimpleNamespace(process=process, conn=conn)
    hear(c)
    return c


def hear(c):
    try:
        answer = c.conn.recv()
    except EOFError:
        c.process.join()
        answer = dict(error=f'the process ended with {c.process.exitcode} (out of memory?)')
    if isinstance(answer, dict) and 'error' in answer:
        c.process.join()
        raise RuntimeError(answer['error'])
    return answer


def turn(c, word='go'):
    c.conn.send(word)
    return hear(c)


def stop(c):
    try:
        c.conn.send(None)
    except OSError:
        pass
    c.process.join()


def child(work, conn, job):
    log = os.open(os.path.join(job['folder'], f'{work.__name__}-{os.getpid()}.log'), os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        work(conn, SimpleNamespace(**job))
    except EOFError:      # the parent is gone
        pass
    except BaseException as e:
        conn.send(dict(error=f'{type(e).__name__}: {(str(e).strip().splitlines() or [""])[0][:200]}'))


# ----------------------------------------------------------------------------------------------------------------
# The step: ours


def our_rounds(job):
    """A generator: first None, when all is set up, then one round of train.py's own step after the other."""
    cfg = train.Config(loss=job.loss, device=job.device, dtype=job.dtype, compile=job.compile, learning_rate=LR,
                       batch_size=len(job.batches[0]), tokens_per_batch=job.tokens_per_batch)
    train.settle_machine(cfg)
    model = GPT.from_pretrained(job.weights).to(cfg.device)
    pairs = [pair for batch in job.batches for pair in batch]
    reference = given_reference(pairs)
    if cfg.compile:
        model.hidden = torch.compile(model.hidden, dynamic=cfg.device == 'cpu')
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(cfg.beta1, cfg.beta2), weight_decay=0.0, fused=True)

    def load(k):    # as train.py's load_step does
        if k >= len(job.batches):
            return []
        indices = np.arange(k * cfg.batch_size, (k + 1) * cfg.batch_size)
        return [(batch, torch.tensor(reference[indices[members]]).to(cfg.device) if job.loss == 'dpo' else None,
                 torch.ones(len(members)).to(cfg.device)) for members, batch in train.batches(pairs, indices, 2, cfg)]
    yield None
    waiting = load(0)
    for k in range(len(job.batches)):
        wait(cfg.device)
        t0, logps = time.perf_counter(), None
        if job.loss == 'dpo' or k == 0:     # the reference's forward pass; for SimPO only to compare
            logps = train.score(model, pairs, np.arange(k * cfg.batch_size, (k + 1) * cfg.batch_size), 2, cfg)
        t1 = time.perf_counter()
        stats = torch.zeros(len(train.STATS), dtype=torch.float64, device=cfg.device)
        for batch, ref, p in waiting:       # from here on the loop of train.train
            with train.precision(cfg):
                sums = batch.sum_by_response(model.token_logps(batch))
            losses, chosen_rewards, rejected_rewards = train.objective(cfg, sums, batch.lengths, ref, p)
            (losses.sum() / cfg.batch_size).backward()
            stats += train.statistics(losses, chosen_rewards, rejected_rewards, sums)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        waiting = load(k + 1)
        assert math.isfinite(norm.item()) and math.isfinite(stats[0].item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(cfg.device)
        t2 = time.perf_counter()
        yield dict(reference=t1 - t0 if job.loss == 'dpo' else 0.0, step=t2 - t1, logps=logps,
                   loss=stats[0].item() / cfg.batch_size, peak=peak_bytes(cfg.device))


def given_reference(pairs):
    """Reference log-probs that both sides are given, near a random model's, so that the loss is not just log 2."""
    return np.array([[-10.9 * len(r) for r in responses] for _, responses in pairs], dtype=np.float32)


def ours(conn, job):
    rounds = our_rounds(job)
    conn.send(next(rounds))
    for word in iter(conn.recv, None):
        conn.send(next(rounds) if word == 'go' else matmul_rate(job.config, job.dtype, job.device))


# ----------------------------------------------------------------------------------------------------------------
# The step: TRL's trainers, their whole loop, held between steps by a callback


# What is tried for TRL, the first value of each first. tuned: train.settle_machine, so glibc keeps freed memory and
# float32 products go through oneDNN, as ours do. Not tried, and why: padding_free, which TRL 1.16 itself turns off;
# its gradient checkpointing and activation offloading, which cost time; Liger's loss, which it refuses for DPO.
# logits_to_keep it has no more: its DPO head is chunked, over response positions alone on a GPU, over all on a CPU.
def trl_settings(device, dtypes, compiled):
    if device == 'cpu':
        return dict(dtype=dtypes, tuned=[True, False], attention=['sdpa', 'eager'], compile=[False])
    return dict(dtype=dtypes, tuned=[False], compile=[True, False] if compiled else [False],
                attention=['sdpa'] + ['flash_attention_2'] * bool(importlib.util.find_spec('flash_attn')) + ['eager'],
                liger=[False] + [True] * bool(importlib.util.find_spec('liger_kernel')))


def trl(conn, job):
    """One round for each word that comes through `conn`: the trainer's train() runs until its next on_step_end."""
    if job.tuned:
        train.settle_machine(train.Config(device=job.device))
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    B, dpo = len(job.batches[0]), job.loss == 'dpo'
    pairs = [pair for batch in job.batches for pair in batch]
    end = '<|endoftext|>'
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({end: 50256}, unk_token=end)),
                                        eos_token=end, pad_token=end)    # only its padding is ever asked for
    model = AutoModelForCausalLM.from_pretrained(job.weights, attn_implementation=job.attention, dtype=torch.float32)
    options = dict(
        output_dir=os.path.join(job.folder, 'trl'), per_device_train_batch_size=B, max_steps=len(job.batches),
        train_sampling_strategy='sequential', learning_rate=LR, lr_scheduler_type='constant', weight_decay=0.0,
        optim='adamw_torch_fused', max_grad_norm=1.0, bf16=job.dtype == 'bfloat16', use_cpu=job.device == 'cpu',
        gradient_checkpointing=False, logging_strategy='no', logging_nan_inf_filter=False, save_strategy='no',
        report_to='none', disable_tqdm=True, torch_compile=job.compile, use_liger_kernel=getattr(job, 'liger', False),
        dataloader_num_workers=0 if job.device == 'cpu' else 2, dataloader_pin_memory=job.device == 'cuda')

    class Kept:                 # what the trainers are given in place of text: the same token ids as ours
        def training_step(self, *args, **kwargs):
            self.kept_loss = super().training_step(*args, **kwargs)
            return self.kept_loss

    class DPO(Kept, DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def _precompute_ref_logps(self, dataset, *args, **kwargs):
            return dataset      # given as columns; its forward pass is timed below, round by round

    class CPO(Kept, CPOTrainer):
        def tokenize_row(self, feature, model=None):
            prompt, responses = pairs[int(feature['prompt'])]
            row = dict(prompt_input_ids=prompt, prompt_attention_mask=[1] * len(prompt))
            for side, r in zip(('chosen', 'rejected'), responses):
                row |= {f'{side}_input_ids': prompt + r, f'{side}_attention_mask': [1] * len(prompt + r),
                        f'{side}_labels': [-100] * len(prompt) + r}
            return row

    reference = given_reference(pairs)
    if dpo:
        data = Dataset.from_dict(dict(
            prompt_ids=[p for p, _ in pairs], chosen_ids=[r[0] for _, r in pairs], rejected_ids=[r[1] for _, r in pairs],
            ref_chosen_logps=reference[:, 0].tolist(), ref_rejected_logps=reference[:, 1].tolist()))
        config = DPOConfig(beta=0.1, loss_type='sigmoid', precompute_ref_log_probs=True, max_length=None, **options)
    else:
        data = Dataset.from_dict(dict(prompt=[str(i) for i in range(len(pairs))], chosen=[''] * len(pairs),
                                      rejected=[''] * len(pairs)))
        config = CPOConfig(beta=2.0, simpo_gamma=0.5, loss_type='simpo', cpo_alpha=0.0, max_length=4096,
                           remove_unused_columns=False, **options)
    trainer = (DPO if dpo else CPO)(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    now = SimpleNamespace(round=0, since=0.0, seconds=0.0, logps=None)

    def begin():                # wait for the turn; the reference's pass, and the clock of the step
        if conn.recv() is None:
            raise EOFError
        wait(job.device)
        t, now.logps = time.perf_counter(), None
        if dpo or now.round == 0:
            rows = [trainer.train_dataset[i] for i in range(now.round * B, (now.round + 1) * B)]
            batch = trainer._prepare_inputs(trainer.data_collator(rows))
            if dpo:
                logps = trainer.compute_ref_log_probs(trainer.model, batch)
            else:
                with torch.no_grad(), trainer.accelerator.autocast():
                    logps = trainer.concatenated_forward(trainer.model, batch)[:2]
            now.logps = torch.stack(logps, dim=1).float().cpu().numpy()
            del batch, logps
        wait(job.device)
        now.since = time.perf_counter()
        now.seconds = now.since - t if dpo else 0.0

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            conn.send(None)
            begin()

        def on_step_end(self, *args, **kwargs):
            wait(job.device)
            conn.send(dict(reference=now.seconds, step=time.perf_counter() - now.since, logps=now.logps,
                           loss=trainer.kept_loss.item(), peak=peak_bytes(job.device)))
            now.round += 1
            begin()

    trainer.add_callback(Turns())
    trainer.train()


# ----------------------------------------------------------------------------------------------------------------
# Sections step and memory


def describe(settings):
    words = [settings['dtype'], settings.get('attention'), *(w for w in ('compile', 'tuned', 'liger') if settings.get(w))]
    return ' '.join(filter(None, words))


def seconds(result):
    return result['reference'] + result['step']


def search(work, axes, job, warmup):
    """The fastest settings, changing one at a time from the first of each axis. -> [(seconds, peak, settings), ...] of
    those that ran, fastest first."""
    tried, best = [], {name: values[0] for name, values in axes.items()}

    def measure(settings):
        took = math.inf
        try:
            with started(work, **job | settings) as c:
                last = [turn(c) for _ in range(warmup + 1)][-1]
            took, pairs = seconds(last), len(job['batches'][0])
            tried.append((took, last['peak'], settings))
            say(f'  {work.__name__}, {job["loss"]}, {describe(settings)}: {pairs / took:.2f} pairs/s (of {took:.2f} s a step '
                f'{last["reference"]:.2f} for the reference), {last["peak"] / 2**30:.2f} GiB')
        except RuntimeError as e:
            say(f'  {work.__name__}, {job["loss"]}, {describe(settings)}: does not run here ({e})')
        return took
    least = measure(best)
    for name, values in axes.items():
        for value in values[1:]:
            took = measure(best | {name: value})
            if took < least:
                best, least = best | {name: value}, took
    return sorted(tried, key=lambda t: t[0])


def steps(o, repeats, orders):
    """Ours and TRL's, each at its fastest settings, in turn: yields a dictionary for each objective and order."""
    peers, n = o.peers and importlib.util.find_spec('trl'), o.warmup + repeats
    for loss in o.losses.split(','):
        job = dict(o.job, loss=loss, tokens_per_batch=o.tokens_per_batch or 16384)
        for order in orders.split(','):
            job['batches'] = draw_batches(o.data, o.batch_size, order, n)
            if order == orders.split(',')[0]:
                our = search(ours, dict(dtype=o.dtypes, compile=[o.compiled]), job, o.warmup)
                their = search(trl, trl_settings(o), job, o.warmup) if peers else []
            with contextlib.ExitStack() as stack:
                a = stack.enter_context(started(ours, **job | our[0][2]))
                b = stack.enter_context(started(trl, **job | their[0][2])) if their else None
                both = [(turn(a), turn(b) if b else None) for _ in range(n)]
                rate = turn(a, 'rate')
            mine, other = zip(*both)
            if their:
                say('  ' + agreement(mine, other, job['batches'], loss))
            yield dict(loss=loss, order=order, batches=job['batches'][o.warmup:], rate=rate, our=our, their=their,
                       mine=mine[o.warmup:], other=other[o.warmup:] if their else None)


def agreement(mine, other, batches, loss):
    """A line: how far apart the two sides' losses are in every step, and log-probs (summed over a response) before any."""
    lengths = np.array([[len(r) for r in responses] for _, responses in batches[0]])
    theirs = other[0]['logps'] * (lengths if loss == 'simpo' else 1)
    gap = np.abs(mine[0]['logps'] - theirs)
    apart = max(abs(m['loss'] - t['loss']) for m, t in zip(mine, other))
    return (f'same numbers? losses {mine[0]["loss"]:.5f} and {other[0]["loss"]:.5f} in the first step, at most {apart:.0e} apart in '
            f'{len(mine)}; log-probs {gap.max():.0e} nats apart, {(gap / np.abs(theirs)).max():.0e} of them'
            + ('' if apart < 1e-3 else ': NOT THE SAME'))


def step(o):
    for r in steps(o, o.repeats, o.orders):
        mine, passes, pairs = [seconds(m) for m in r['mine']], 4 if r['loss'] == 'dpo' else 3, o.batch_size * o.repeats
        used = sum(needed(o.config, batch, passes) for batch in r['batches']) / r['rate']
        what = f'{r["loss"]}, {"batches by length" if r["order"] == "sorted" else "data\'s order"}'
        our, other = r['our'][0][2], None
        if r['other']:
            other = [seconds(t) for t in r['other']]
            what += f'; TRL {describe(r["their"][0][2])}'
        row('step', f'{what}; ours {describe(our)}', 'pairs/s', [pairs / sum(mine)], other and [pairs / sum(other)],
            other and [b / a for a, b in zip(mine, other)],
            f'utilisation {used / sum(mine):.0%}' + (f' and {used / sum(other):.1%}' if other else '')
            + f' of {r["rate"] / 1e9:,.0f} GFLOP/s')
        o.steps_done.append(r)


def memory(o):
    for r in o.steps_done or steps(o, 1, 'own'):
        if r['order'] != 'own':
            continue
        mine = max(m['peak'] for m in r['mine']) / 2**30
        row('memory', f'{r["loss"]}; ours {describe(r["our"][0][2])}', 'GiB', [mine], *([
            [max(t['peak'] for t in r['other']) / 2**30], None, f'TRL {describe(r["their"][0][2])}']) if r['other'] else ())
