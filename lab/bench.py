"""
Speed and memory beside TRL, transformers and tiktoken, on whatever device there is.

    python -m lab.bench all                                  # every section, as a table
    python -m lab.bench step memory --dataset=pairs.jsonl    # your data
    python -m lab.bench step --model=llama --dtype=bfloat16  # the shape of SmolLM2-135M

    step, memory   pairs/s and peak memory of a step (either name measures both): DPO beside TRL's
                   DPOTrainer, SimPO beside CPOTrainer, at the fastest of the settings tried
    growth         ours alone: the same, as max_length and the pairs of a step grow
    prepare        tokens/s of prepare.py's path beside tiktoken's batch encoding of the same texts
    generate       tokens/s of sample.py's generate beside transformers': greedy, the same weights
    start          seconds from the command to the end of train.py's first step
    fit            what a step needs, and the largest tokens_per_batch on cards of 24 and 80 GB

Contestants live in processes of their own and take turns: one works while the other waits. A ratio
is the median over the rounds, with the least and the greatest. A round of `step` goes from token
ids to updated weights, for DPO with the forward pass of a live reference; weights and token ids are
the same, and losses and gradient norms are compared. GFLOP/s count the arithmetic that is needed:
the prompt once, the vocabulary at response positions, no padding.
Needs Linux. Left out: evaluation, checkpoints, several GPUs, what is learnt (weights are random).
"""
import contextlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib import metadata
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import train
from configurator import InputError, configure, first_line, run
from model import GPT, GPTConfig, pack
from prepare import Pairs, prepare
from sample import generate
from tokenizer import get_tokenizer
from weights import load, save



def llama(block_size, vocab_size, *sizes, model_type='llama', bias='none', **more):
    names = 'n_layer n_head n_embd n_kv_head head_dim n_inner'.split()
    return GPTConfig(block_size, vocab_size, **dict(zip(names, sizes)), norm='rms', gated=True,
                     rope_theta=1e5, model_type=model_type, bias=bias, **more)


MODELS = dict(                  # shapes of SmolLM2-135M and -360M, Qwen2.5-0.5B, ...
    tiny=GPTConfig(n_layer=2, n_head=2, n_embd=64), gpt2=GPTConfig(),
    llama=llama(8192, 49152, 30, 9, 576, 3, 64, 1536),
    smollm2_360m=llama(8192, 49152, 32, 15, 960, 5, 64, 2560),
    qwen2_5_0_5b=llama(32768, 151936, 24, 14, 896, 2, 64, 4864, model_type='qwen2', bias='qkv'),
    qwen3_0_6b=llama(40960, 151936, 28, 16, 1024, 8, 128, 3072, model_type='qwen3', qk_norm=True),
    llama3_2_1b=llama(131072, 128256, 16, 32, 2048, 8, 64, 8192))
FAILURES = RuntimeError, InputError, EOFError, OSError    # the last two: the process was killed
WORDS = 'the of and to in is it you that he was for on are with as his they be at one'.split()
WARMUP = dict(cpu=1, cuda=4)    # rounds before those that count
PROMPTS, NEW_TOKENS = 16, 128   # generate


@dataclass
class Options(train.Config):    # the dataset, lengths, device, dtype, compile, ... are train.py's
    model: str = 'gpt2'         # one of MODELS; random weights
    losses: str = 'dpo,simpo'
    orders: str = 'own,sorted'  # a fixed random order; steps of pairs of like length
    repeats: int = 3            # rounds that count
    peers: bool = True          # step and memory: beside TRL
    dataset: str = ''           # empty: random words, as long as HH-harmless's texts
    tokenizer: str = 'gpt2'     # start, with llama: byte, which has fewer tokens
    val_fraction: float = 0.0
    reference: str = 'live'
    batch_size: int = 0         # 0: 8 on a CPU, 64 on a GPU


def row(section, what, unit, rounds, note='', amount=0, key='seconds'):
    """A line of the table. `rounds`: lists of answers of one or two contestants, ours first. What
    they needed of `key`, or the `amount` of each round by it; theirs divided by ours."""
    took = np.array([[answer[key] for answer in answers] for answers in rounds])
    numbers = [amount / x if amount else x for x in took.mean(1)]
    numbers = [f'{x:,.0f}' if x >= 1000 else f'{x:.3g}' for x in numbers] + ['']
    ratio, ratios = '', (took[1:] / took[0]).flatten()
    if len(ratios):
        ratio = f'{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})'
    return [section, what, unit, *numbers[:2], ratio, note]


def write_texts(path):
    """Records of random words. Lengths are log-normals fitted to HH-harmless's test split (2,312
    prompts, chosen and rejected responses, in tokens of GPT-2)."""
    rng = np.random.default_rng(0)
    with open(path, 'w') as f:
        for _ in range(10000):
            sizes = 1 + rng.lognormal((4.38, 3.37, 3.56), (1.00, 0.87, 0.93)).astype(int)
            texts = [' ' + ' '.join(rng.choice(WORDS, size)) for size in sizes]
            f.write(json.dumps(dict(zip(('prompt', 'chosen', 'rejected'), texts))) + '\n')
    return path


def get_pairs(cfg):
    """[(prompt, [chosen, rejected]), ...], lists of token ids, in a fixed random order."""
    pairs, end = Pairs(prepare(cfg)), MODELS[cfg.model].vocab_size - 1
    order = np.random.default_rng(2).permutation(pairs.train)
    # TRL ends each response; to random weights, it matters little which ids the others are
    return [((prompt % end).tolist(), [(r[:-1] % end).tolist() + [end] for r in responses])
            for prompt, responses in map(pairs.__getitem__, order)]


def draw_steps(pairs, batch_size, order, n):
    """The pairs of n steps: as they come, or of like length, at even distances in length."""
    starts = np.arange(n) * batch_size
    if order == 'sorted':
        pairs = sorted(pairs, key=lambda pair: len(pair[0]) + max(map(len, pair[1])))
        starts = (np.arange(n) + 0.5) / n * max(0, len(pairs) - batch_size)
        starts = np.random.default_rng(3).permutation(starts.astype(int))
    return [[pairs[(start + i) % len(pairs)] for i in range(batch_size)] for start in starts]


def needed(config, steps, loss):
    """FLOPs: a forward pass, a backward pass of two; for DPO the reference's."""
    c, width, total = config, config.n_head * config.head_dim, 0
    block = c.n_embd * (2 * width + 2 * c.n_kv_head * c.head_dim + (2 + c.gated) * c.n_inner)
    for prompt, (chosen, rejected) in itertools.chain(*steps):
        P, C, R = len(prompt), len(chosen), len(rejected)
        total += 2 * c.n_layer * block * (P + C + R) + 2 * c.vocab_size * c.n_embd * (C + R)
        total += 4 * c.n_layer * width * (P * P / 2 + C * (P + C / 2) + R * (P + R / 2))
    return (4 if loss == 'dpo' else 3) * total


def clock(device):
    """The time when the device has done all that it was asked."""
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device):
    """The most GiB this process has had: tensors on a GPU, or resident memory."""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**30
    with open('/proc/self/status') as f:     # a child's ru_maxrss would start at its parent's
        return next(int(line.split()[1]) / 2**20 for line in f if line.startswith('VmHWM'))


# --------------------------------------------------------------------------------------------------
# Processes that take turns; their work of step, memory and growth


def child(conn, work, *args):
    """Run work(pause, *args), where pause(answer) ends a turn and waits for the next."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    def pause(answer=None):
        conn.send(answer)
        conn.recv()
    try:
        conn.recv()
        work(pause, *args)
    except Exception as e:                   # of any library; or EOFError: there is no further turn
        conn.send(RuntimeError(first_line(e)))


def take_turns(n, *contestants):
    """A turn to set up, then n rounds of each (work, *args) in its own process -> answers."""
    context, running = multiprocessing.get_context('spawn'), []

    def turn(conn):
        conn.send('go')
        if isinstance(answer := conn.recv(), Exception):
            raise answer
        return answer
    try:
        for contestant in contestants:
            here, there = context.Pipe()
            running.append(here)
            context.Process(target=child, args=(there, *contestant)).start()
            there.close()
            turn(here)
        return list(zip(*([turn(conn) for conn in running] for _ in range(n))))
    finally:
        for conn in running:
            conn.close()
        for process in multiprocessing.active_children():
            process.join()


def repeat(pause, device, work):
    """A turn is one call of work()."""
    pause()
    while True:
        begin, result = clock(device), work()
        pause(dict(seconds=clock(device) - begin, result=result))


def ours(pause, cfg, steps):
    """The steps of train.train(), by the same functions."""
    B, pairs = cfg.batch_size, list(itertools.chain(*steps))
    cfg.options = train.loss_options(cfg)
    train.setup_machine(cfg)
    model = load(cfg.init_from).to(cfg.device)
    reference, _ = train.make_reference(model, pairs, np.arange(len(pairs)), cfg)
    optimizer = train.make_optimizer(model, cfg)

    def load_step(k):
        return list(train.batches(pairs, np.arange(len(pairs))[k * B:(k + 1) * B], 2, cfg))
    waiting = load_step(0)
    pause()
    for k in range(len(steps)):
        begin, sums = clock(cfg.device), 0
        for rows, batch in waiting:
            with train.autocast(cfg):
                logps = batch.sum_by_response(model.token_logps(batch))             # (B, 2)
            reference_logps = batch.sum_by_response(reference(rows, batch)) if reference else None
            losses, *rewards = train.apply_loss(cfg, logps, reference_logps, batch.lengths,
                                                dict(p=torch.ones(len(rows)).to(cfg.device)))
            (losses.sum() / B).backward()
            sums = sums + train.metric_sums(losses, *rewards, logps)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        waiting = load_step(k + 1)
        answer = dict(loss=sums[0].item() / B, norm=norm.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pause(answer | dict(seconds=clock(cfg.device) - begin, peak=peak_memory(cfg.device)))


def trl(pause, cfg, steps, rows, attention, compiled):
    """The train() of DPOTrainer, or of CPOTrainer with SimPO's loss; it pauses after each step. The
    words of its texts are our token ids."""
    train.setup_machine(cfg)                 # tuned as ours is
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    end, last = '<|endoftext|>', MODELS[cfg.model].vocab_size - 1
    ids = {str(i): i for i in range(last)} | {end: last}
    words = Tokenizer(models.WordLevel(ids, unk_token=end))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, pad_token=end)
    data = []
    for prompt, responses in itertools.chain(*steps):
        texts = [''.join(f' {i}' for i in part) for part in (prompt, *(r[:-1] for r in responses))]
        data.append(dict(prompt=texts[0], chosen=texts[1] + end, rejected=texts[2] + end))

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            pause()
            self.begin = clock(cfg.device)

        def on_log(self, args, state, control, logs, **kwargs):
            pause(dict(seconds=clock(cfg.device) - self.begin, loss=logs['loss'],
                       norm=logs['grad_norm'], peak=peak_memory(cfg.device)))
            self.begin = clock(cfg.device)
    trainer, config, objective = DPOTrainer, DPOConfig, dict(beta=0.1)
    if cfg.loss == 'simpo':
        trainer, config = CPOTrainer, CPOConfig
        objective = dict(loss_type='simpo', beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0)
    args = config(
        output_dir=cfg.data_dir, max_steps=len(steps), per_device_train_batch_size=rows,
        gradient_accumulation_steps=cfg.batch_size // rows, train_sampling_strategy='sequential',
        max_length=MODELS[cfg.model].block_size, learning_rate=cfg.learning_rate, adam_beta2=0.99,
        lr_scheduler_type='constant', optim='adamw_torch_fused', max_grad_norm=cfg.grad_clip,
        bf16=cfg.dtype == 'bfloat16', torch_compile=compiled, gradient_checkpointing=False,
        use_cpu=cfg.device == 'cpu', dataloader_num_workers=2 * (cfg.device == 'cuda'),
        logging_steps=1, save_strategy='no', report_to='none',
        model_init_kwargs=dict(attn_implementation=attention, dtype='float32'), **objective)
    trainer(model=cfg.init_from, args=args, train_dataset=Dataset.from_list(data),
            processing_class=tokenizer, callbacks=[Turns()]).train()


def search(cfg, steps):
    """TRL's settings that run here, fastest first: [(seconds, words, settings), ...]. Fewer pairs
    in a forward pass, with gradients accumulated, need less padding. Not tried: what costs time
    (gradient checkpointing, offloading), and padding_free, which TRL 1.16 turns off itself."""
    B, tried = cfg.batch_size, []
    rows = [n for n in sorted({1, B // 4, B}) if n and B % n == 0]
    rows, kinds = (rows, ['sdpa', 'eager']) if cfg.device == 'cpu' else (rows[1:], ['sdpa'])
    for settings in itertools.product(rows, kinds, sorted({False, cfg.compile})):
        words = f'TRL {settings[1]}, {settings[0]} a pass' + ', compile' * settings[2]
        try:
            last = take_turns(WARMUP[cfg.device] + 1, (trl, cfg, steps, *settings))[0][-1]
            tried.append((last['seconds'], words, settings))
            words += f': {B / last["seconds"]:.2f} pairs/s, {last["peak"]:.2f} GiB'
        except FAILURES as e:
            words += f': does not run here ({first_line(e)})'
        print(f'{cfg.loss}, {words}')
    return sorted(tried)


def contest(cfg, order, peers):
    """Steps of ours and, with `peers`, of TRL's at its fastest -> (words, rounds of each, note)."""
    warmup = WARMUP[cfg.device]
    steps = draw_steps(get_pairs(cfg), cfg.batch_size, order, warmup + cfg.repeats)
    tried = search(cfg, steps)[:1] if peers else []
    rounds = take_turns(len(steps), (ours, cfg, steps), *(
        (trl, cfg, steps, *settings) for *_, settings in tried))
    what = [cfg.loss, f'{order} order', f'{cfg.batch_size} pairs', cfg.dtype]
    what += ['compile'] * cfg.compile + [words for _, words, _ in tried]
    flops = needed(MODELS[cfg.model], steps[warmup:], cfg.loss)
    note = ''
    if tried:
        apart = max(abs(a[x] / b[x] - 1) for a, b in zip(*rounds) for x in ('loss', 'norm'))
        note = f', losses and gradient norms within {apart:.0e}'
    rounds = [answers[warmup:] for answers in rounds]
    rates = [f'{flops / 1e9 / sum(a["seconds"] for a in each):,.0f} GFLOP/s' for each in rounds]
    return ', '.join(what), rounds, ', '.join(rates) + note


def step(o):
    for loss, order in itertools.product(o.losses.split(','), o.orders.split(',')):
        what, rounds, note = contest(replace(o, loss=loss), order, o.peers)
        yield row('step', what, 'pairs/s', rounds, note, o.batch_size)
        yield row('memory', what, 'GiB', [answers[-1:] for answers in rounds], key='peak')


def growth(o):
    sizes = (8, 32) if o.device == 'cpu' else (8, 64, 256)
    for length, size in itertools.product((256, 512, 1024), sizes):
        cfg = replace(o, max_length=length, max_prompt_length=length // 2, batch_size=size)
        what, rounds, note = contest(cfg, 'own', peers=False)
        yield row('growth', f'max_length {length}, {what}', 'pairs/s', rounds,
                  f'{rounds[0][-1]["peak"]:.2f} GiB, {note}', size)


def our_prepare(pause, cfg):
    repeat(pause, 'cpu', lambda: prepare(replace(cfg, data_dir=tempfile.mkdtemp(dir=cfg.data_dir))))


def their_prepare(pause, cfg):
    tokenizer, pairs = get_tokenizer(cfg.tokenizer), Pairs(prepare(cfg))
    texts = [tokenizer.decode(part.tolist()) for i in pairs.train
             for part in (pairs[i][0], *(r[:-1] for r in pairs[i][1]))]
    encode = tokenizer.encoding.encode_ordinary_batch
    repeat(pause, 'cpu', lambda: len(encode(texts, num_threads=os.cpu_count())))


def preparation(o):
    uncut = replace(o, max_length=2**20, max_prompt_length=2**19)
    rounds = take_turns(1 + o.repeats, (our_prepare, uncut), (their_prepare, uncut))
    tokens = len(Pairs(rounds[0][0]['result']).tokens)
    rounds = [answers[1:] for answers in rounds]
    yield row('prepare', f'{o.tokenizer}; tiktoken', 'tokens/s', rounds, amount=tokens)


def our_generate(pause, cfg, prompts):
    model = load(cfg.init_from).to(cfg.device)
    repeat(pause, cfg.device, lambda: generate(
        model, prompts, NEW_TOKENS, ends={-1}, temperature=0))             # -1: nothing ends


def their_generate(pause, cfg, prompts):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(cfg.init_from).to(cfg.device)
    tokens, mask = (pad_sequence(list(map(torch.tensor, rows)), True, 0, 'left').to(cfg.device)
                    for rows in (prompts, [[1] * len(prompt) for prompt in prompts]))
    repeat(pause, cfg.device, lambda: model.generate(
        tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False,
        pad_token_id=0)[:, tokens.size(1):].tolist())


def generation(o):
    prompts = [prompt for prompt, _ in get_pairs(o)[:PROMPTS]]
    rounds = take_turns(1 + o.repeats, (our_generate, o, prompts), (their_generate, o, prompts))
    same = sum(a == b for a, b in zip(*(answers[0]['result'] for answers in rounds)))
    what = f'{PROMPTS} prompts, {NEW_TOKENS} new tokens, float32; transformers'
    yield row('generate', what, 'tokens/s', [answers[1:] for answers in rounds],
              f'{same} responses are the same', PROMPTS * NEW_TOKENS)


def start(o):
    """config/dpo_gpt2.py on these weights, twice: the second finds data and reference prepared."""
    names = 'init_from dataset tokenizer data_dir batch_size device dtype compile'
    command = [sys.executable, '-u', 'train.py', 'config/dpo_gpt2.py', '--max_iters=8',
               '--overwrite', f'--out_dir={o.data_dir}/run',
               *(f'--{name}={getattr(o, name)}' for name in names.split())]
    took = []
    for _ in range(2):
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            if not any(line.startswith('first step') for line in process.stdout):
                raise RuntimeError('train.py has not come to its first step')
            took.append(time.perf_counter() - begin)
            process.kill()
    yield row('start', f'{o.batch_size} pairs, {o.dtype}', 's', [[dict(seconds=took[1])]],
              f'data and reference prepared; {took[0]:.1f} before')


def kept_bytes(config, T):
    """What autograd keeps of a forward pass over T tokens, half of them of responses, in bf16; of
    attention its inputs and output alone, as FlexAttention does."""
    def attention(q, k, v, mask):
        return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True,
                                              enable_gqa=True)[0]

    def keep(t):
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes(), t               # alive, so no address twice
        return t
    gpt, kept, half = GPT(config), {}, [0] * (T // 2)
    with mock.patch('model.attention', attention), torch.autocast('cpu', torch.bfloat16), \
            torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        gpt.token_logps(pack([(half, [half[T // 4:], half[T // 4:]])]))
    return sum(size for data_ptr, (size, _) in kept.items()
               if data_ptr not in {p.data_ptr() for p in gpt.parameters()})


def fit(o):
    """A formula from models of one and two layers. Fixed: float32 weights, gradients and Adam's two
    averages, bf16 weights, 2 GB for logits and the driver. A token: what a layer keeps, times the
    layers, and the rest. A response token: a row of the head's softmax, too."""
    for name, config in MODELS.items():
        small = [[kept_bytes(replace(config, n_layer=n, vocab_size=1024), T) for T in (256, 512)]
                 for n in (1, 2)]
        one, two = ((more - less) / 256 for less, more in small)
        token = one + (config.n_layer - 1) * (two - one) + (config.vocab_size - 1024)
        with torch.device('meta'):
            n = sum(p.numel() for p in GPT(config).parameters())
        limits = [max(0, int((card * 1e9 - 18 * n - 2e9) / token)) // 1024 * 1024
                  for card in (24, 80)]
        yield ['fit', f'{name}, {n / 1e6:.0f}M parameters', 'MB a token', f'{token / 1e6:.2f}', '',
               '', f'{(18 * n + 2e9) / 1e9:.1f} GB fixed; tokens_per_batch on 24 and 80 GB: '
               f'{limits[0]:,} and {limits[1]:,}']


SECTIONS = dict(step=step, memory=step, growth=growth, prepare=preparation, generate=generation,
                start=start, fit=fit)


def main(argv):
    sections = {arg for arg in argv if not arg.startswith('-')}
    o = configure(Options, [arg for arg in argv if arg.startswith('-')])
    names = [*sections, o.model, *o.losses.split(','), *o.orders.split(',')]
    if unknown := {*names} - {*SECTIONS, 'all', *MODELS, 'dpo', 'simpo', 'own', 'sorted'}:
        raise InputError(f'{unknown.pop()!r} is no section, model, loss or order')
    train.load_config([f'--device={o.device}', f'--dtype={o.dtype}'])    # raises InputError
    train.setup_machine(o)
    o.batch_size = o.batch_size or (8 if o.device == 'cpu' else 64)
    os.environ |= dict(OMP_WAIT_POLICY='PASSIVE', HF_HUB_OFFLINE='1')    # who waits must not spin
    with open('/proc/cpuinfo') as f:
        cpu = f.read().partition('model name\t: ')[2].partition('\n')[0]
    versions = [f'{d.name} {d.version}' for d in metadata.distributions()
                if d.name in ('torch', 'transformers', 'trl', 'tiktoken')]
    print(*[torch.cuda.get_device_name() if o.device == 'cuda' else cpu, *versions,
            f'{torch.get_num_threads()} threads', o.model, f'max_length {o.max_length}'], sep=', ')
    print('\n| section | what | unit | ours | theirs | ratio | note |\n' + '| --- ' * 7 + '|')
    table = sys.stdout                   # what others say goes to stderr
    with tempfile.TemporaryDirectory() as o.data_dir, contextlib.redirect_stdout(sys.stderr):
        o.init_from = os.path.join(o.data_dir, 'weights')
        torch.manual_seed(0)
        save(GPT(MODELS[o.model]), o.init_from)
        o.dataset = o.dataset or write_texts(os.path.join(o.data_dir, 'words.jsonl'))
        for section in dict.fromkeys(f for name, f in SECTIONS.items() if {name, 'all'} & sections):
            try:
                for line in section(o):
                    print('| ' + ' | '.join(line) + ' |', file=table, flush=True)
            except FAILURES as e:
                print(f'{section.__name__}: does not run here ({first_line(e)})')


if __name__ == '__main__':
    run(main, __doc__)
