"""
train.py: the data of a step, the loop, resuming, evaluation, and what stops a run.

    pytest tests/test_train.py

A tiny byte-level GPT with random weights and a few dozen made-up pairs stand in for the real thing.
"""
import dataclasses
import gc
import json
import math
import os
import random

import numpy as np
import pytest
import torch

import train
from model import GPT, GPTConfig, load_checkpoint
from prepare import InputError, Pairs, prepare

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WORDS = 'the a red dog sees one old cat under blue tree and runs home'.split()


@pytest.fixture
def world(tmp_path):
    """A folder with a base model and pairs.jsonl; -> a function of overrides that gives a Config there."""
    torch.manual_seed(0)
    GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=2, n_embd=32, eos_token_id=256)).save_pretrained(tmp_path / 'base')
    rng = random.Random(0)

    def text(low, high):
        return ' '.join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))
    with open(tmp_path / 'pairs.jsonl', 'w') as f:
        for i in range(60):
            f.write(json.dumps(dict(prompt=f'{i} {text(1, 3)}', chosen=' ' + text(1, 4), rejected=' ' + text(1, 5))) + '\n')

    def config(**overrides):
        settings = dict(out_dir=tmp_path / 'run', init_from=tmp_path / 'base', dataset=tmp_path / 'pairs.jsonl', tokenizer='byte',
                        max_length=64, max_prompt_length=32, val_fraction=0.2, data_dir=tmp_path / 'data', batch_size=8,
                        tokens_per_batch=512, learning_rate=1e-3, max_iters=6, eval_interval=3, log_interval=1, device='cpu')
        return train.load_config([f'--{k}={v}' for k, v in (settings | overrides).items()])
    config.path = tmp_path
    return config


def weights(path):
    return load_checkpoint(str(path))['model']


def read_log(path):
    """log.jsonl without its header and without what a clock decides."""
    lines = [json.loads(line) for line in open(path)]
    return [{k: v for k, v in line.items() if not k.endswith('_per_s')} for line in lines[1:]]


# the data of a step -------------------------------------------------------------------------------------------------


def test_every_epoch_is_a_permutation_and_steps_need_no_state():
    n, size = 10, 4
    drawn = np.concatenate([train.step_indices(s, n, size, seed=3) for s in range(10)])
    for epoch in range(4):
        assert sorted(drawn[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert not np.array_equal(drawn[:n], drawn[n:2 * n])
    assert np.array_equal(train.step_indices(7, n, size, seed=3), drawn[28:32])


def test_micro_batches_hold_every_pair_once_and_fit():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 100, size=rng.integers(1, 60))
        bins = train.micro_batches(sizes, 100)
        assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
        assert all(sizes[b].sum() <= 100 for b in bins)


@pytest.mark.parametrize('changed', [
    dict(loss='dpo'), dict(loss='dpo', reference='live'), dict(loss='simpo'), dict(loss='dpo', reference_from='other')])
def test_a_compiled_run_equals_a_plain_one(changed, world, monkeypatch):
    """What is compiled belongs to its model: the policy, the reference, and what the policy's samples are compared
    with. (dynamo alone, without the compiler behind it: seconds instead of minutes.)"""
    if 'reference_from' in changed:
        torch.manual_seed(1)
        config = GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=2, n_embd=32, eos_token_id=256)
        GPT(config).save_pretrained(world.path / 'other')
        changed = changed | dict(reference_from=world.path / 'other')
    compiled, ran = torch.compile, set()

    def light(function, **options):
        traced = compiled(function, backend='eager', dynamic=options.get('dynamic'))
        return lambda *args: (ran.add(function.__name__), traced(*args))[1]
    monkeypatch.setattr(torch, 'compile', light)
    plain, traced = (train.train(world(out_dir=world.path / str(c), compile=c, eval_samples=6, **changed))
                     for c in (False, True))
    assert ran == {'hidden', 'reduce_logits'}
    assert abs(plain['eval/kl']) > 1e-3                       # of six samples: an estimate may lie below 0
    for name, value in plain.items():
        assert traced[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('changed, models', [
    (dict(), 1), (dict(reference_from='base'), 1), (dict(reference='live'), 2), (dict(eval_samples=4), 2)])
def test_a_cached_reference_is_gone_before_the_first_step(changed, models, compiled, world, monkeypatch):
    if 'reference_from' in changed:
        changed = dict(reference_from=world.path / 'base')
    alive, adamw, torch_compile = [], torch.optim.AdamW, torch.compile

    def count():
        return sum(type(o) is GPT for o in gc.get_objects())

    def counting(*args, **options):
        alive.append(count() - before)
        return adamw(*args, **options)
    gc.collect()
    before = count()
    monkeypatch.setattr(torch.optim, 'AdamW', counting)
    monkeypatch.setattr(torch, 'compile', lambda function, **options: torch_compile(function, backend='eager'))
    train.train(world(compile=compiled, max_iters=1, **changed))
    assert alive == [models]


def test_compiled_code_sees_four_sizes_and_no_fewer_tokens_than_there_are():
    for tokens_per_batch in (16384, 2048, 1000, 513):
        sizes = [train.padded(tokens, tokens_per_batch) for tokens in range(1, tokens_per_batch + 1)]
        assert all(size >= tokens for tokens, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
        assert len(set(sizes)) == 4 and sizes[-1] == tokens_per_batch and sizes[0] < tokens_per_batch / 3.9


def test_learning_rate_warms_up_and_follows_the_schedule(world):
    cfg = world(learning_rate=1.0, min_lr=0.1, warmup_iters=3, max_iters=13)
    rates = {s: [train.learning_rate(i, dataclasses.replace(cfg, schedule=s)) for i in range(14)]
             for s in ('cosine', 'linear', 'constant')}
    for rate in rates.values():
        assert rate[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates['constant'][13] == 1.0
    assert rates['linear'][8] == pytest.approx(0.55) and rates['linear'][13] == pytest.approx(0.1)
    assert rates['cosine'][8] == pytest.approx(0.55) and rates['cosine'][13] == pytest.approx(0.1)
    assert rates['cosine'][5] > rates['linear'][5]


# the loop -----------------------------------------------------------------------------------------------------------


def test_dpo_starts_at_ln_2_learns_and_says_so(world):
    cfg = world(max_iters=40, eval_interval=20, learning_rate=5e-3, schedule='constant')
    metrics = train.train(cfg)
    log = read_log(world.path / 'run' / 'log.jsonl')
    first = next(line for line in log if 'loss' in line)
    # of rewards that are zero but for rounding, which differs between batches, accuracies say nothing
    assert first['loss'] == pytest.approx(math.log(2), abs=1e-6) and abs(first['rewards/margins']) < 1e-5
    assert [line for line in log if 'loss' in line][-1]['loss'] < 0.4       # it can learn these few by heart
    assert metrics['eval/loss'] == log[-1]['eval/loss']
    assert set(first) == {'step', 'loss', 'rewards/chosen', 'rewards/rejected', 'rewards/margins', 'rewards/accuracies',
                          'logps/chosen', 'logps/rejected', 'grad_norm', 'lr'}
    assert os.path.exists(world.path / 'run' / 'best.pt')


@pytest.mark.parametrize('loss', ['dpo', 'simpo', 'sft'])
def test_micro_batches_change_nothing(world, loss):
    finals = []
    for size in (2000, 200, 130):
        train.train(world(loss=loss, tokens_per_batch=size, out_dir=world.path / f'run{size}'))
        finals.append(weights(world.path / f'run{size}' / 'ckpt.pt'))
    assert len({len(train.micro_batches([60] * 8, size)) for size in (2000, 200, 130)}) == 3
    for other in finals[1:]:
        for name, t in finals[0].items():
            # Adam divides by the gradient's size, so where a gradient is next to nothing rounding shows
            assert (t - other[name]).abs().max() < 3e-4 and (t - other[name]).abs().mean() < 1e-6, name


def test_one_step_is_plain_adamw_on_the_mean_dpo_loss(world):
    """The whole of a step, rewritten plainly: one response per row, full logits, torch's own optimiser."""
    cfg = world(max_iters=1, eval_interval=100, schedule='constant', grad_clip=0.5, weight_decay=0.1, beta=0.3)
    train.train(cfg)
    model, reference = GPT.from_pretrained(cfg.init_from), GPT.from_pretrained(cfg.init_from)
    pairs = Pairs(prepare(cfg), 'train')

    def logp(m, prompt, response):
        ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))[None]
        rows = m(ids[:, :-1]).log_softmax(-1)[0, len(prompt) - 1:]
        return rows.gather(1, ids[0, len(prompt):, None]).sum()
    losses = []
    for i in train.step_indices(0, len(pairs), 8, cfg.seed):
        prompt, (chosen, rejected) = pairs[i]
        with torch.no_grad():
            ref = logp(reference, prompt, chosen) - logp(reference, prompt, rejected)
        losses.append(-torch.nn.functional.logsigmoid(0.3 * (logp(model, prompt, chosen) - logp(model, prompt, rejected) - ref)))
    torch.stack(losses).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    logged = [line['grad_norm'] for line in read_log(world.path / 'run' / 'log.jsonl') if 'grad_norm' in line]
    assert logged == pytest.approx([float(norm)], rel=1e-4)      # which Adam's first step would not show
    groups = [dict(params=[p for p in model.parameters() if p.dim() > 1], weight_decay=0.1),
              dict(params=[p for p in model.parameters() if p.dim() == 1], weight_decay=0.0)]
    torch.optim.AdamW(groups, lr=1e-3).step()
    for name, t in weights(world.path / 'run' / 'ckpt.pt').items():
        assert (t - model.state_dict()[name]).abs().mean() < 1e-6, name


def test_cached_and_live_references_agree(world):
    for reference in ('cached', 'live'):
        train.train(world(reference=reference, out_dir=world.path / reference))
    a, b = (read_log(world.path / r / 'log.jsonl') for r in ('cached', 'live'))
    for x, y in zip(a, b, strict=True):
        for line in (x, y):
            if abs(line.get('rewards/margins', 1)) < 1e-5:     # rounding alone: its sign is anything
                line['rewards/accuracies'] = 0.5
        assert x == pytest.approx(y, rel=1e-4, abs=1e-5)


def test_the_reference_is_computed_once_for_many_runs(world, monkeypatch):
    train.train(world())
    scored = []
    score = train.score
    monkeypatch.setattr(train, 'score', lambda m, p, i, K, cfg, what='': (scored.append(what), score(m, p, i, K, cfg, what))[1])
    train.train(world(beta=0.5, learning_rate=1e-4, overwrite=True))
    assert scored and not any(what.startswith('reference') for what in scored)


def test_the_reference_is_computed_only_for_pairs_that_the_run_sees(world):
    train.train(world(max_iters=2))
    table = next(p for p in (world.path / 'data').rglob('train-reference-*'))
    assert (np.fromfile(table, '<f4').reshape(-1, 2) != 0).all(1).sum() == 16


def test_a_warning_when_both_kinds_of_response_become_less_likely():
    at = {'eval/logps/chosen': -50.0, 'eval/logps/rejected': -50.0}
    assert train.both_fall(at, {'eval/logps/chosen': -52.0, 'eval/logps/rejected': -60.0})
    assert not train.both_fall(at, {'eval/logps/chosen': -48.0, 'eval/logps/rejected': -60.0})
    assert not train.both_fall(at, at)


# evaluation ---------------------------------------------------------------------------------------------------------


def test_eval_only_writes_what_transformers_gives_for_each_response_alone(world):
    transformers = pytest.importorskip('transformers')
    cfg = world(eval_only=True, val_fraction=1.0)
    train.train(cfg)
    lines = [json.loads(line) for line in open(world.path / 'run' / 'eval.jsonl')]
    records = [json.loads(line) for line in open(cfg.dataset)]
    assert sorted(line['id'] for line in lines) == list(range(60))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(cfg.init_from).eval()
    for line in lines:
        for side in ('chosen', 'rejected'):
            prompt, response = list(records[line['id']]['prompt'].encode()), [*records[line['id']][side].encode(), 256]
            with torch.no_grad():
                logps = theirs(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            expected = sum(logps[len(prompt) + t - 1, token].item() for t, token in enumerate(response))
            assert line[f'{side}_logps'] == pytest.approx(expected, abs=1e-3)
            assert line[f'reference_{side}_logps'] == pytest.approx(expected, abs=1e-3)
            assert line[f'{side}_length'] == len(response) and line[f'{side}_reward'] == 0
    assert not os.path.exists(world.path / 'run' / 'ckpt.pt')


def test_a_tie_counts_one_half(world):
    metrics = train.train(world(eval_only=True))
    assert metrics['eval/rewards/accuracies'] == 0.5 and metrics['eval/loss'] == pytest.approx(math.log(2))


def test_eval_of_a_part_is_the_same_part_every_time(world):
    first = train.train(world(eval_only=True, eval_pairs=3, loss='simpo'))
    ids = [json.loads(line)['id'] for line in open(world.path / 'run' / 'eval.jsonl')]
    assert len(ids) == 3 and train.train(world(eval_only=True, eval_pairs=3, loss='simpo')) == first


# what stops a run ---------------------------------------------------------------------------------------------------


def test_nothing_that_is_not_a_number_reaches_the_weights(world):
    cfg = world(max_iters=6, eval_interval=100)
    model = GPT.from_pretrained(cfg.init_from)
    with torch.no_grad():
        model.wte.weight[ord('z')] = float('nan')    # a token that no pair holds is harmless in the input ...
    model.save_pretrained(cfg.init_from)             # ... but it is in every softmax
    with pytest.raises(InputError, match='evaluation: the loss of .* pairs is not finite.* numbers in the source'):
        train.train(cfg)
    assert not (world.path / 'run' / 'ckpt.pt').exists()
    with pytest.raises(InputError, match='step 0: the weights are no longer finite|step 0: loss nan'):
        train.train(world(max_iters=6, val_fraction=0.0, overwrite=True))
    assert not (world.path / 'run' / 'ckpt.pt').exists()


def test_a_run_that_is_all_warm_up_says_so(world, capsys):
    train.train(world(max_iters=1, warmup_iters=1))
    assert 'note: all 1 steps are warm-up (warmup_iters 1): the learning rate does not come to 0.001' in capsys.readouterr().out
    train.train(world(max_iters=2, warmup_iters=1, overwrite=True))
    assert 'warm-up' not in capsys.readouterr().out


def test_a_finished_or_running_run_is_not_overwritten(world):
    train.train(world(max_iters=1))
    before = (world.path / 'run' / 'ckpt.pt').read_bytes()
    with pytest.raises(InputError, match='holds a run'):
        train.train(world())
    assert (world.path / 'run' / 'ckpt.pt').read_bytes() == before
    held = train.lock(str(world.path / 'run'))
    with pytest.raises(InputError, match=f'in use by another run .process {os.getpid()}.'):
        train.train(world(overwrite=True))
    held.close()


def test_resume_refuses_other_data(world):
    train.train(world(max_iters=2))
    with open(world.path / 'pairs.jsonl', 'a') as f:
        f.write(json.dumps(dict(prompt='new', chosen=' yes', rejected=' no')) + '\n')
    with pytest.raises(InputError, match='is not the data that .* was trained on'):
        train.train(world(max_iters=4, resume=True))


def test_resume_refuses_another_reference_or_objective(world):
    train.train(world(max_iters=2))
    with pytest.raises(InputError, match="loss: 'simpo', and .* was trained with 'dpo'"):
        train.train(world(max_iters=4, resume=True, loss='simpo'))
    torch.manual_seed(5)
    GPT(GPTConfig(64, 257, 2, 2, 32, 256)).save_pretrained(world.path / 'base')      # retrained meanwhile
    with pytest.raises(InputError, match='is not the reference that .* was trained with'):
        train.train(world(max_iters=4, resume=True))


def test_eval_only_evaluates_the_run_that_is_there(world):
    last = train.train(world(max_iters=4, learning_rate=1e-2))
    before = (world.path / 'run' / 'ckpt.pt').read_bytes()
    again = train.train(world(eval_only=True))
    assert again == pytest.approx(last, rel=1e-5) and again['eval/loss'] != pytest.approx(math.log(2), abs=1e-4)
    assert (world.path / 'run' / 'ckpt.pt').read_bytes() == before
