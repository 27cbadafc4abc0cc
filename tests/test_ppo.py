"""
PPO: each equation by hand and beside plain loops in float64, the rollout, the optimum, resuming.

    python -m pytest tests/test_ppo.py

Left out: what PPO gains in the demo's world, which lab/LOG.md has.
"""
import contextlib
import functools
import json
import math
import os
import signal

import numpy as np
import pytest
import torch

from configurator import InputError
from lab import ppo
from model import GPT, GPTConfig, bias_of, pack
from tokenizer import get_tokenizer
from weights import load, load_checkpoint, save

BYTES = get_tokenizer('byte')
SIZES = GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=2, n_embd=16)
LIKES_A = 'judge = lambda prompt, texts: [text == "a" for text in texts]'
tensor = functools.partial(torch.tensor, dtype=torch.float64)


@pytest.fixture
def config(tmp_path, write):
    """config(name=value, ...) -> a PPOConfig; its random model says only 'a', 'b' or the end."""
    torch.manual_seed(3)
    model = GPT(SIZES)
    with torch.no_grad():
        model.wte.weight.mul_(8)
        model.wte.weight[:, 0] = -40
        model.wte.weight[[*b'ab', 256], 0] = 0
        model.ln_f.weight[0], model.ln_f.bias[0] = 0, 1
    save(model, str(tmp_path / 'base'))
    settings = dict(
        init_from=tmp_path / 'base', judge=write('mine.py', LIKES_A) + ':judge', tokenizer='byte',
        out_dir=tmp_path / 'run', device='cpu', max_new_tokens=3, responses=24, batch_size=8,
        max_iters=4, eval_interval=2, learning_rate=1e-2, watch='gold')

    def config(**changed):
        cfg = ppo.load_config([f'--{n}={value}' for n, value in (settings | changed).items()])
        cfg.draw_prompts = lambda n, seed: ['p:'] * n
        return cfg
    return config


def test_rewards_and_advantages_worked_by_hand():
    old, reference, lengths = tensor([-1, -2, -3]), tensor([-1.5, -2, -1]), torch.tensor([2, 1])
    rewards = ppo.token_rewards(tensor([10, 20]), old, reference, lengths, beta=0.5)
    assert rewards.tolist() == [-0.25, 10.0, 21.0]
    # deltas 1 + 0.5 * 4 - 2 = 1 and 2 - 4 = -2, of which the first has a quarter; then 4 - 8
    advantages = ppo.gae(tensor([1, 2, 4]), tensor([2, 4, 8]), lengths, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [0.5, -2.0, -4.0]
    assert ppo.whiten(tensor([1, 2, 3])).tolist() == pytest.approx([-1, 0, 1], rel=1e-6)


@pytest.mark.parametrize('gamma, lam', [(1.0, 1.0), (0.9, 0.7), (1.0, 0.0)])
def test_advantages_equal_the_sums_of_their_definition(gamma, lam):
    lengths = [3, 1, 7, 2, 7]
    rewards, values = torch.randn(2, 20, dtype=float, generator=torch.Generator().manual_seed(0))
    plain = []
    for r, v in zip(rewards.split(lengths), values.split(lengths)):
        r, v, n = r.tolist(), v.tolist() + [0.0], len(r)
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        plain += [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]
    ours = ppo.gae(rewards, values, torch.tensor(lengths), gamma, lam)
    torch.testing.assert_close(ours, tensor(plain), rtol=1e-12, atol=1e-12)


def test_the_surrogate_its_gradient_and_the_entropy_worked_by_hand():
    old = tensor([-1, -1, -1, -1])
    logps = (old + tensor([1.5, 1.5, 0.5, 0.5]).log()).requires_grad_()
    loss = ppo.clipped_loss(logps, old, tensor([1, -1, 1, -1]), clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)
    # no gradient where the ratio has gone far enough in the advantage's direction
    assert logps.grad.tolist() == pytest.approx([0, 1.5 / 4, -0.5 / 4, 0])
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(3), 0.0, -1e9]])     # 1/3 each; 3/4 and 1/4
    known = (math.log(3) + 2 * math.log(2) - 0.75 * math.log(3)) / 2
    assert ppo.entropy(logits).item() == pytest.approx(known)


def test_the_terms_equal_a_plain_loop():
    g = torch.Generator().manual_seed(0)
    new, old, advantages, values, returns = rows = torch.randn(5, 40, dtype=float, generator=g)
    terms = []
    for a, b, adv, v, r in rows.t().tolist():
        ratio = math.exp(a - b)
        clipped = min(ratio * adv, min(max(ratio, 0.7), 1.3) * adv)
        terms.append([-clipped, (v - r) ** 2, ratio - 1 - (a - b)])
    ours = [ppo.clipped_loss(new, old, advantages, 0.3), ppo.value_loss(values, returns),
            ppo.approximate_kl(new, old)]
    assert torch.stack(ours).tolist() == pytest.approx(np.mean(terms, axis=0).tolist())
    spread = (returns - values).numpy().var() / returns.numpy().var()
    assert ppo.explained_variance(values, returns).item() == pytest.approx(1 - spread)


def test_one_packed_pass_gives_the_policys_log_probs_and_the_values_of_plain_rows():
    model = ppo.PolicyAndValue(GPT(SIZES))
    torch.nn.init.normal_(model.value.weight)
    pairs, plain = [([1, 2, 3], [[97, 98, 256]]), ([5], [[98, 256]])], []
    logps, values, _ = model(batch := pack(pairs))
    assert torch.equal(logps, model.policy.token_logps(batch))
    for prompt, (response,) in pairs:
        index = torch.arange(len(prompt + response))
        mask = bias_of(index <= index[:, None])
        h = model.policy.hidden(torch.tensor(prompt + response), index, mask)
        plain.append(20 * h[len(prompt) - 1:-1] @ model.value.weight[0])
    torch.testing.assert_close(values, torch.cat(plain), rtol=1e-4, atol=1e-4)


def test_before_the_first_step_every_ratio_is_1(config):
    cfg = config()
    reference, model = load(cfg.init_from), ppo.PolicyAndValue(load(cfg.init_from))
    judges = dict(reward=lambda prompts, texts: [[1.0] for _ in texts])
    for batch, old_logps, *_ in ppo.roll_out(model, reference, judges, BYTES, 0, cfg)[0]:
        logps = model(batch)[0]          # with gradients, as in the epochs
        assert logps.requires_grad and ((logps - old_logps).exp() == 1).all()


def test_what_has_no_end_or_no_text_earns_the_constant(config):
    said, cfg = [[*b'abc', 256], [*b'abc'], [256], [*b'ab', 256]], config(unfinished_reward=-7.5)
    scores = ppo.score(lambda _, texts: [[len(t)] for t, in texts], 'pqrs', said, BYTES, cfg)
    assert scores.tolist() == [3, -7.5, -7.5, 2]


def test_a_run_reaches_the_optimum(config):
    """On all that two tokens can say: 'a' and 'b' with their end, nothing, what has no end."""
    cfg = config(max_new_tokens=2, responses=256, batch_size=64, max_iters=30, beta=0.5)
    ppo.train_ppo(cfg)
    said = [[97, 256], [98, 256], [256], [*b'aa'], [*b'ab'], [*b'ba'], [*b'bb']]
    batch = pack([([*BYTES.begin, *b'p:'], said)])
    reference, policy = (batch.sum_by_response(load(name).token_logps(batch))[0].detach().exp()
                         for name in (cfg.init_from, cfg.out_dir))
    rewards = torch.tensor([1.0, 0, -1, -1, -1, -1, -1])
    optimum = (reference.log() + rewards / cfg.beta).softmax(0)
    assert (optimum - reference).abs().max() > 0.2 and (policy - optimum).abs().max() < 0.04


@pytest.mark.parametrize('how', [SystemExit, StopIteration])
def test_a_run_goes_on_as_if_it_had_never_ended(config, tmp_path, monkeypatch, how):
    ppo.train_ppo(config(out_dir=tmp_path / 'whole'))
    cfg, prompts = config(), iter([['p:'] * 24] * 3)
    if how is SystemExit:                # the first rollout is finished and saved
        cfg.draw_prompts = lambda n, seed: os.kill(os.getpid(), signal.SIGTERM) or next(prompts)
    else:                                # three have their lines, and the third is lost
        monkeypatch.setattr(ppo.train, 'catch_signals', lambda: contextlib.nullcontext([]))
        cfg.draw_prompts = lambda n, seed: next(prompts)
    with pytest.raises(how):
        ppo.train_ppo(cfg)
    ppo.train_ppo(config(resume=True))
    whole, parts = (load_checkpoint(tmp_path / name / 'ckpt.pt') for name in ('whole', 'run'))
    assert all(torch.equal(whole[key][name], t) for key in ('model', 'value')
               for name, t in parts[key].items())
    whole, parts = ([json.loads(line) | dict(seconds=0) for line in (tmp_path / name / 'log.jsonl')
                     .read_text().splitlines()[1:]] for name in ('whole', 'run'))
    assert whole == parts and [line['step'] for line in whole] == [0, 1, 2, 3]
    assert whole[0]['kl'] == 0 and whole[-1]['reward'] > whole[-1]['reward/gold']


def test_settings_that_ppo_has_not_are_refused(config):
    with pytest.raises(InputError, match='loss: PPO does not use it'):
        config(loss='dpo')
