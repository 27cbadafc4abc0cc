"""
The DPO paper's sentiment experiment (Rafailov et al. 2023, section 6.1) on real film reviews.

    python -m lab.imdb FOLDER                # train_pos.jsonl.gz, ..., of records {"text", "label"}
    python -m lab.imdb stanfordnlp/imdb      # the same reviews from the hub
    python -m lab.imdb FOLDER --base=gpt2    # from GPT-2; without --base a small model from scratch

A base model learns passages of reviews. The gold reward of a text is the log-odds that it is
positive, by a classifier of the labelled reviews. The base model's own continuations are the pairs;
the better one always wins, as in the paper. DPO at several beta, and SFT on the chosen, are placed
beside the optimum (lab/optimum.py). From such certain labels DPO does not learn exp(r/beta), but
the optimum still bounds the reward at each KL. Results and picture are in out/imdb, as those of
lab/frontier.py; a finished run is not repeated.
Left out: PPO and the other methods of the paper.
"""
import dataclasses
import glob
import os
import re
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import train
from configurator import InputError, atomic_write, first_line, run
from lab import films, frontier, optimum, plot
from prepare import parse, read_source
from tokenizer import END, get_tokenizer
from weights import load, tokenizer_of

BUCKETS = 2**18     # of the classifier's features
SETTINGS = [('dpo', dict(beta=beta)) for beta in (0.5, 1.0, 2.0)] + [('sft', {})]


@dataclass
class Options(frontier.Common):
    only: str = ''       # a setting's name, such as "dpo beta=1", or a part of several names
    samples: int = 128   # responses of a policy to each of 32 prompts
    base: str = ''       # a model to start from, such as gpt2; empty: a small one, from scratch


def read_imdb(source, kind):
    """The reviews of kind 'train', 'test' or 'unsup' -> (texts, labels: 1 positive, 0 negative, -1
    unknown). `source` is a folder or a data set of the hub."""
    pattern = 'train_unsup.jsonl*' if kind == 'unsup' else f'{kind}_[np]*.jsonl*'
    files = sorted(glob.glob(os.path.join(glob.escape(source), pattern)))
    if os.path.isdir(source) and not files:
        raise InputError(f'{source}: no {pattern} in it')
    split = '' if files else kind.replace('unsup', 'unsupervised')
    names, texts, labels = {'pos': 1, 'neg': 0, 1: 1, 0: 0}, [], []
    for where, raw in (line for file in files or [source] for line in read_source(file, split)):
        record = parse(raw)
        try:
            texts.append(re.sub(r'(<br\s*/?>|\s)+', ' ', record['text']).strip())
            labels.append(-1 if kind == 'unsup' else names[record['label']])
        except (KeyError, TypeError) as e:
            raise InputError(f'{where}: not a review with a text and a label ({first_line(e)})')
    return texts, np.array(labels)


def passages(text, longest=200):
    """A review's sentences, joined up to `longest` characters; a longer sentence is left out."""
    joined = ['']
    for sentence in re.split(r'(?<=[.!?])\s+', text):
        if len(joined[-1]) + len(sentence) >= longest:
            joined.append('')
        if len(sentence) < longest:
            joined[-1] += ' ' * bool(joined[-1]) + sentence
    return joined


def cut_texts(texts, tokenizer, seed):
    """-> (prompt, rest) of each text, cut after 2 to 8 tokens as in the paper."""
    rng = np.random.default_rng(seed)
    for text in texts:
        ids, cut = tokenizer.encode(text).tolist(), int(rng.integers(2, 9))
        prompt, rest = tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:])
        # not where the cut is within a character
        if prompt + rest == text and len(ids) > cut + 2 and rest.strip():
            yield prompt, rest


def prompts_of(texts, tokenizer, seed):
    """The beginnings of reviews, as a World draws prompts."""
    openings = [passages(text)[0] for text in texts]
    prompts = [prompt for prompt, _ in cut_texts(openings, tokenizer, seed)]
    return lambda n, seed: np.random.default_rng(seed).choice(prompts, n).tolist()


def train_tokenizer(texts, folder, size=4096):
    """A byte-level BPE, learnt once -> its folder, as transformers saves one."""
    path = os.path.join(folder, 'tokenizer.json')
    if not os.path.exists(path):
        import tokenizers                # slow to load
        bpe = tokenizers.ByteLevelBPETokenizer()
        bpe.train_from_iterator(texts, size, special_tokens=[END], show_progress=False)
        os.makedirs(folder, exist_ok=True)
        with atomic_write(os.path.join(folder, 'tokenizer_config.json')) as f:
            f.write(f'{{"eos_token": "{END}"}}\n')
        with atomic_write(path) as f:
            f.write(bpe.to_str())
    return folder


def features(text):
    """Which words and pairs of neighbours a text has, as numbers below BUCKETS."""
    words = re.findall(r"[a-z']+|[!?]", text.lower())
    words += [' '.join(pair) for pair in zip(words, words[1:])]
    return sorted({zlib.crc32(word.encode()) % BUCKETS for word in words})


def bags(texts):
    """-> the features of all texts, end to end, and where each text's begin."""
    bags = [features(text) for text in texts]
    indices = torch.tensor([i for bag in bags for i in bag], dtype=torch.int64)
    return indices, torch.from_numpy(np.cumsum([0, *map(len, bags)])[:-1])


def fit_classifier(texts, labels, epochs=4):
    """Logistic regression on `features` -> a function: texts -> log-odds that they are positive."""
    weights = torch.nn.EmbeddingBag(BUCKETS, 1, mode='sum', _weight=torch.zeros(BUCKETS, 1))
    bias = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([*weights.parameters(), bias], lr=3e-3, weight_decay=1e-2)
    order = np.random.default_rng(0).permutation(len(texts))
    batches = [(*bags([texts[i] for i in rows]), torch.from_numpy(labels[rows]).float())
               for rows in np.array_split(order, max(1, len(texts) // 128))]
    for _ in range(epochs):
        for indices, starts, y in batches:
            logits = weights(indices, starts)[:, 0] + bias                      # (texts,)
            F.binary_cross_entropy_with_logits(logits, y).backward()
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def log_odds(texts):
        return (weights(*bags(texts))[:, 0] + bias).double().numpy()
    return log_odds


def train_base(texts, settings, out, o):
    """A language model of reviews -> its folder. It continues where it was interrupted."""
    cfg = frontier.config_of(settings | dict(
        loss='sft', out_dir=os.path.join(out, 'base'), batch_size=64, warmup_iters=100,
        val_fraction=0.01, eval_interval=1000, max_iters=o.max_iters))
    if o.base:
        cfg.init_from, cfg.learning_rate = o.base, 5e-5
    else:
        cfg.init_from = dict(n_layer=4, n_head=4, n_embd=128, block_size=cfg.max_length)
        cfg.learning_rate, cfg.grad_clip, cfg.epochs = 4e-3, 0.0, 0.5
    cuts = cut_texts((passage for text in texts for passage in passages(text)),
                     get_tokenizer(settings['tokenizer']), seed=1)
    cfg.dataset = films.write_once(os.path.join(out, 'passages.jsonl'), lambda: (
        dict(prompt=prompt, chosen=rest) for prompt, rest in cuts))
    cfg.resume = os.path.exists(os.path.join(cfg.out_dir, 'ckpt.pt'))
    train.train(cfg)
    return cfg.out_dir


def experiment(source, o):
    """Gold reward, base model and pairs; then each setting's run, its result and its reviews."""
    out, n = o.out or os.path.join('out', 'imdb'), o.pairs or 20000
    texts, labels = read_imdb(source, 'train')
    test_texts, test_labels = read_imdb(source, 'test')
    texts_of_base = texts + read_imdb(source, 'unsup')[0]
    log_odds = fit_classifier(texts, labels)
    right = np.mean((log_odds(test_texts) > 0) == test_labels)
    print(f'gold reward: a classifier, right for {right:.1%} of {len(test_texts):,} reviews')
    name = tokenizer_of(o.base) if o.base else train_tokenizer(texts_of_base, f'{out}/tokenizer')
    settings = dict(tokenizer=name, max_length=96, max_prompt_length=32,
                    data_dir=f'{out}/data')
    base, tokenizer = train_base(texts_of_base, settings, out, o), get_tokenizer(name)
    reference = load(base).to('cuda' if torch.cuda.is_available() else 'cpu')
    world = films.World(
        name, prompts_of(test_texts, tokenizer, 2), max_new_tokens=80, labels='best',
        reward=lambda prompts, responses: log_odds([p + r for p, r in zip(prompts, responses)]))
    training = dataclasses.replace(world, draw_prompts=prompts_of(texts, tokenizer, 1))
    dataset = films.pairs(base, n, 1, settings['data_dir'], training, 'imdb')
    rewards = optimum.reference_rewards(reference, world)
    jobs = frontier.unfinished(frontier.make_jobs(
        [(frontier.title(*s), *s, n) for s in SETTINGS], 1, o, reference), out)
    frontier.keep_optima(rewards, out)
    settings |= dict(init_from=base, batch_size=32, warmup_iters=10, learning_rate=2e-4)
    for job in jobs:
        line = frontier.run_job(job | dict(dataset=dataset), settings, rewards, out, world)
        frontier.keep_result(line, out)
        films.show_samples(load(frontier.run_folder(out)).to(reference.device), reference, world)
    plot.frontier(out, os.path.join(out, 'frontier.png'))


def main(argv):
    if argv[0].startswith('-'):
        raise InputError('usage: python -m lab.imdb FOLDER_OR_HUB [--name=value ...]')
    experiment(argv[0], frontier.read_options(Options, argv[1:]))


if __name__ == '__main__':
    run(main, __doc__)
