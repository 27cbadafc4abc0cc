"""
PPO: each equation by hand and beside plain loops in float64, the rollout, the optimum that a run
reaches, interruptions.

    python -m pytest tests/test_ppo.py

Left out: what PPO gains in the demo's world, which lab/LOG.md has.
"""
import json
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configurator import InputError
from lab import ppo
from model import GPT, GPTConfig, bias_of, pack
from tokenizer import get_tokenizer
from weights import load, load_checkpoint, save

BYTES, SIZES = get_tokenizer('byte'), dict(vocab_size=257, n_layer=1, n_head=2, n_embd=16)
LIKES_A = 'def judge(prompt, texts):\n    return [t == "a" for t in texts]\n'


def tensor(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.fixture
def config(tmp_path, write):
    """config(name=value, ...) -> a PPOConfig: short responses, judged by LIKES_A, of a random model
    that only ever says 'a', 'b' or the end."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=16, **SIZES))
    with torch.no_grad():
        model.wte.weight.mul_(8)
        model.wte.weight[:, 0] = -40
        model.wte.weight[[*b'ab', 256], 0] = 0
        model.ln_f.weight[0], model.ln_f.bias[0] = 0, 1
    save(model, str(tmp_path / 'base'))
    settings = dict(
        init_from=tmp_path / 'base', judge=write('mine.py', LIKES_A) + ':judge', tokenizer='byte',
        out_dir=tmp_path / 'run', device='cpu', max_new_tokens=3, responses=24, batch_size=8,
        max_iters=4, eval_interval=2, learning_rate=1e-2)

    def config(**changed):
        cfg = ppo.load_config([f'--{n}={value}' for n, value in (settings | changed).items()])
        cfg.draw_prompts = lambda n, seed: ['p:'] * n
        return cfg
    return config


def test_the_token_reward_is_the_kl_and_at_the_end_the_score():
    old, reference = tensor(-1, -2, -3), tensor(-1.5, -2, -1)
    rewards = ppo.token_rewards(tensor(10, 20), old, reference, torch.tensor([2, 1]), beta=0.5)
    assert rewards.tolist() == [-0.25, 10.0, 21.0]


def test_advantages_worked_by_hand():
    rewards, values = tensor(1, 2, 4), tensor(2, 4, 8)
    # the last of the first response: 2 - 4 = -2; before it 1 + 0.5 * 4 - 2 = 1, and 0.25 * -2
    advantages = ppo.gae(rewards, values, torch.tensor([2, 1]), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [0.5, -2.0, -4.0]
    assert ppo.whiten(tensor(1, 2, 3)).tolist() == pytest.approx([-1, 0, 1], rel=1e-6)


@pytest.mark.parametrize('gamma, lam', [(1.0, 1.0), (0.9, 0.7), (1.0, 0.0)])
def test_advantages_equal_the_sums_of_their_definition(gamma, lam):
    lengths = [3, 1, 7, 2, 7]
    rewards, values = torch.randn(2, 20, dtype=float, generator=torch.Generator().manual_seed(0))
    plain, start = [], 0
    for n in lengths:
        r, v = rewards[start:start + n].tolist(), values[start:start + n].tolist() + [0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        plain += [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]
        start += n
    ours = ppo.gae(rewards, values, torch.tensor(lengths), gamma, lam)
    torch.testing.assert_close(ours, tensor(*plain), rtol=1e-12, atol=1e-12)


def test_the_surrogate_and_its_gradient_worked_by_hand():
    old = tensor(-1, -1, -1, -1)
    logps = (old + tensor(1.5, 1.5, 0.5, 0.5).log()).requires_grad_()
    loss = ppo.clipped_loss(logps, old, tensor(1, -1, 1, -1), clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)
    # no gradient where the ratio has gone far enough in the advantage's direction
    assert logps.grad.tolist() == pytest.approx([0, 1.5 / 4, -0.5 / 4, 0])


def test_the_terms_equal_a_plain_loop():
    g = torch.Generator().manual_seed(0)
    new, old, advantages, values, returns = rows = torch.randn(5, 40, dtype=float, generator=g)
    surrogate, squares, kl = [], [], []
    for a, b, adv, v, r in rows.t().tolist():
        ratio = math.exp(a - b)
        surrogate.append(min(ratio * adv, min(max(ratio, 0.7), 1.3) * adv))
        squares.append((v - r) ** 2)
        kl.append(ratio - 1 - (a - b))
    assert ppo.clipped_loss(new, old, advantages, 0.3).item() == pytest.approx(-np.mean(surrogate))
    assert ppo.value_loss(values, returns).item() == pytest.approx(np.mean(squares))
    assert ppo.approximate_kl(new, old).item() == pytest.approx(np.mean(kl))
    spread = (returns - values).numpy().var() / returns.numpy().var()
    assert ppo.explained_variance(values, returns).item() == pytest.approx(1 - spread)


def test_the_entropy_of_known_distributions():
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(3), 0.0, -1e9]])
    known = (math.log(3) + 2 * math.log(2) - 0.75 * math.log(3)) / 2
    assert ppo.entropy(logits).item() == pytest.approx(known)


def test_one_packed_pass_gives_the_policys_log_probs_and_the_values_of_plain_rows():
    model = ppo.PolicyAndValue(GPT(GPTConfig(block_size=16, **SIZES)))
    torch.nn.init.normal_(model.value.weight)
    pairs, plain = [([1, 2, 3], [[97, 98, 256]]), ([5], [[98, 256]])], []
    logps, values, _ = model(batch := pack(pairs))
    assert torch.equal(logps, model.policy.token_logps(batch))
    for prompt, (response,) in pairs:
        row, index = torch.tensor([prompt + response]), torch.arange(len(prompt + response))
        h = model.policy.hidden(row, index, bias_of(index <= index[:, None]))
        plain.append(20 * h[0, len(prompt) - 1:-1] @ model.value.weight[0])
    torch.testing.assert_close(values, torch.cat(plain), rtol=1e-4, atol=1e-4)


def test_before_the_first_step_every_ratio_is_1(config):
    cfg = config()
    reference, model = load(cfg.init_from), ppo.PolicyAndValue(load(cfg.init_from))
    judges = dict(reward=ppo.load_judge(cfg.judge))
    for batch, old_logps, *_ in ppo.roll_out(model, reference, judges, BYTES, 0, cfg)[0]:
        logps = model(batch)[0]          # with gradients, as in the epochs
        assert logps.requires_grad and ((logps - old_logps).exp() == 1).all()


def test_what_has_no_end_or_no_text_earns_the_constant():
    def judge(prompts, responses):
        return [np.array([float(len(text))]) for text, in responses]
    responses = [[*b'abc', 256], [*b'abc'], [256], [*b'ab', 256]]
    cfg = SimpleNamespace(unfinished_reward=-7.5)
    assert ppo.score(judge, ['p'] * 4, responses, BYTES, cfg).tolist() == [3, -7.5, -7.5, 2]


def test_a_run_reaches_the_optimum(config):
    """On all that can be said in two tokens: 'a' and 'b' with their end, nothing, what has no end."""
    cfg = config(max_new_tokens=2, responses=256, batch_size=64, max_iters=30, beta=0.5)
    ppo.train_ppo(cfg)
    said = [[97, 256], [98, 256], [256], *([x, y] for x in b'ab' for y in b'ab')]
    batch = pack([([*BYTES.begin, *b'p:'], said)])
    reference, policy = (batch.sum_by_response(load(name).token_logps(batch))[0].detach().exp()
                         for name in (cfg.init_from, cfg.out_dir))
    optimum = reference * (torch.tensor([1.0, 0, -1, -1, -1, -1, -1]) / cfg.beta).exp()
    optimum /= optimum.sum()
    assert (optimum - reference).abs().max() > 0.2
    assert (policy - optimum).abs().max() < 0.04


@pytest.mark.parametrize('how', [SystemExit, KeyboardInterrupt])
def test_a_run_goes_on_as_if_it_had_never_ended(config, tmp_path, how):
    ppo.train_ppo(config(out_dir=tmp_path / 'whole'))
    cfg, calls = config(), []

    def draw_prompts(n, seed):
        calls.append(seed)
        if len(calls) == 3 and how is SystemExit:
            os.kill(os.getpid(), signal.SIGTERM)           # this rollout is finished and saved
        if len(calls) == 4:
            raise how                                      # the third has a line and is not saved
        return ['p:'] * n
    cfg.draw_prompts = draw_prompts
    with pytest.raises(how):
        ppo.train_ppo(cfg)
    ppo.train_ppo(config(resume=True))
    whole, parts = (load_checkpoint(tmp_path / name / 'ckpt.pt') for name in ('whole', 'run'))
    for key in ('model', 'value'):
        assert all(torch.equal(whole[key][name], t) for name, t in parts[key].items())
    whole, parts = ([json.loads(line) | dict(seconds=0) for line in (tmp_path / name / 'log.jsonl')
                     .read_text().splitlines()[1:]] for name in ('whole', 'run'))
    assert whole == parts and [line['step'] for line in whole] == [0, 1, 2, 3]


def test_a_second_judge_is_logged(config, write, tmp_path):
    second = write('second.py', 'def judge(prompt, texts):\n    return [7 for t in texts]\n')
    ppo.train_ppo(config(max_iters=1, watch=second + ':judge', unfinished_reward=7.0))
    line = json.loads((tmp_path / 'run' / 'log.jsonl').read_text().splitlines()[1])
    assert line[f'reward/{second}:judge'] == 7 and line['reward'] < 7 and line['kl'] == 0


@pytest.mark.parametrize('changed, message', [
    (dict(loss='dpo'), 'loss: PPO has none'), (dict(epochs=0), 'epochs .*1 or more')])
def test_what_does_not_fit_is_one_line(config, changed, message):
    with pytest.raises(InputError, match=message):
        config(**changed)
