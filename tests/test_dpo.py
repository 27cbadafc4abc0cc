"""
Tests of dpo.py: numbers worked by hand, the papers' formulas in numpy, gradients, extremes, TRL's
code, and the optimum that the theory promises.

    python -m pytest tests/test_dpo.py

Comparisons with TRL (written against 1.16) are skipped where it is not installed.
"""
import inspect
import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from dpo import (bernoulli_nll, dpo_loss, ipo_loss, kto_loss, plackett_luce_loss, rdpo_loss,
                 robust_dpo_loss)
from model import GPT, GPTConfig, pack
from weights import load, their_names


def vectors(B=32, seed=0, dtype=torch.float64, grad=False):
    """Policy and reference log-probs (w: chosen, l: rejected) and lengths of B pairs."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (2, B), generator=g).to(dtype)
    reference = -(1 + 2 * torch.rand(2, B, generator=g, dtype=dtype)) * lengths
    policy = reference + 4 * torch.randn(2, B, generator=g, dtype=dtype)
    return SimpleNamespace(
        w=policy[0].clone().requires_grad_(grad), l=policy[1].clone().requires_grad_(grad),
        ref_w=reference[0], ref_l=reference[1], n_w=lengths[0], n_l=lengths[1])


def call(loss, v, **options):
    """The objective on what its signature asks for, as train.py calls it."""
    supplied = dict(policy_chosen_logps=v.w, policy_rejected_logps=v.l,
                    reference_chosen_logps=v.ref_w, reference_rejected_logps=v.ref_l,
                    chosen_lengths=v.n_w, rejected_lengths=v.n_l)
    names = inspect.signature(loss).parameters
    return loss(**{name: x for name, x in supplied.items() if name in names}, **options)


def gradients(losses, v):
    return torch.autograd.grad(losses.sum(), (v.w, v.l), retain_graph=True)


def in_numpy(v):
    """The same numbers as arrays, and d = log pi/pi_ref(y_w) - log pi/pi_ref(y_l)."""
    a = SimpleNamespace(**{name: t.detach().numpy() for name, t in vars(v).items()})
    a.d = (a.w - a.ref_w) - (a.l - a.ref_l)
    return a


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def nll(z, label_smoothing=0.0, p=1.0):
    """-q log sigma(z) - (1 - q) log sigma(-z) in numpy."""
    q = np.asarray(p) * (1 - label_smoothing) + (1 - np.asarray(p)) * label_smoothing
    return -q * log_sigmoid(z) - (1 - q) * log_sigmoid(-z)


P = torch.rand(32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
SOFTNESS = [dict(), dict(label_smoothing=0.1), dict(label_smoothing=0.5), dict(p=P),
            dict(label_smoothing=0.2, p=P)]


def check_formula(loss, options, formula):
    """Values equal the formula's in numpy, all (B,); only the losses carry a gradient."""
    v = vectors(grad=True)
    result = call(loss, v, **options)
    for ours, expected in zip(result, formula(in_numpy(v)), strict=True):
        np.testing.assert_allclose(ours.detach(), expected, rtol=1e-9)
        assert ours.shape == v.w.shape and ours.dtype == v.w.dtype
    assert [t.requires_grad for t in result] == [True, False, False]


# --------------------------------------------------------------------------------------------------
# By hand


def test_dpo_by_hand():
    # r_w = 0.1 * (-10 - -12) =  0.2
    # r_l = 0.1 * (-20 - -15) = -0.5
    # z = 0.7;  exp(-0.7) = 0.4965853;  loss = log(1 + 0.4965853) = 0.4031860
    logps = [torch.tensor([x]) for x in (-10.0, -20.0, -12.0, -15.0)]
    losses, chosen, rejected = dpo_loss(*logps)
    assert chosen.item() == pytest.approx(0.2) and rejected.item() == pytest.approx(-0.5)
    assert losses.item() == pytest.approx(0.4031860, abs=1e-6)
    # the other way round, -log sigma(-0.7) = 0.7 + 0.4031860 = 1.1031860
    for options, expected in [
            (dict(label_smoothing=0.1), 0.4731860),        # 0.9 * 0.4031860 + 0.1 * 1.1031860
            (dict(p=0.25), 0.9281860),                     # 0.25 * 0.4031860 + 0.75 * 1.1031860
            (dict(label_smoothing=0.1, p=0.25), 0.8931860)]:    # q = 0.9 * 0.25 + 0.1 * 0.75 = 0.3
        options = {k: torch.tensor([x]) if k == 'p' else x for k, x in options.items()}
        assert dpo_loss(*logps, **options)[0].item() == pytest.approx(expected, abs=1e-6)


def test_defaults_of_dpo():
    parameters = inspect.signature(dpo_loss).parameters.values()
    assert [(p.name, p.default) for p in parameters][4:] == [
        ('beta', 0.1), ('label_smoothing', 0.0), ('p', None)]
    assert [p.name for p in parameters][:4] == [
        'policy_chosen_logps', 'policy_rejected_logps',
        'reference_chosen_logps', 'reference_rejected_logps']


# --------------------------------------------------------------------------------------------------
# The papers' formulas


@pytest.mark.parametrize('options', SOFTNESS)
@pytest.mark.parametrize('beta', [0.01, 0.1, 1.0])
def test_dpo_is_the_papers_formula(beta, options):
    """Rafailov et al. 2023, equation 7; with smoothing, Mitchell 2023, equation 3."""
    check_formula(dpo_loss, dict(beta=beta) | options, lambda v: (
        nll(beta * v.d, **options), beta * (v.w - v.ref_w), beta * (v.l - v.ref_l)))


FORMULAS = {   # the other objectives: (function, options, the paper's formula)
    'robust dpo': (robust_dpo_loss, dict(beta=0.3, label_smoothing=0.2), lambda v: (
        (0.8 * -log_sigmoid(0.3 * v.d) - 0.2 * -log_sigmoid(-0.3 * v.d)) / (1 - 0.4),
        0.3 * (v.w - v.ref_w), 0.3 * (v.l - v.ref_l))),
    'ipo': (ipo_loss, dict(beta=0.2), lambda v: (
        (v.d - 2.5) ** 2, 0.2 * (v.w - v.ref_w), 0.2 * (v.l - v.ref_l))),
    'ipo of means': (ipo_loss, dict(beta=0.2, length_average=True), lambda v: (
        ((v.w - v.ref_w) / v.n_w - (v.l - v.ref_l) / v.n_l - 2.5) ** 2,
        0.2 * (v.w - v.ref_w) / v.n_w, 0.2 * (v.l - v.ref_l) / v.n_l)),
    'r-dpo': (rdpo_loss, dict(beta=0.3, alpha=0.05), lambda v: (
        -log_sigmoid(0.3 * v.d + 0.05 * v.n_w - 0.05 * v.n_l),
        0.3 * (v.w - v.ref_w), 0.3 * (v.l - v.ref_l))),
    'kto': (kto_loss, dict(beta=0.3, reference_point=0.4), lambda v: (
        1 - 1 / (1 + np.exp(0.4 - 0.3 * (v.w - v.ref_w)))
        + 1 - 1 / (1 + np.exp(0.3 * (v.l - v.ref_l) - 0.4)),
        0.3 * (v.w - v.ref_w), 0.3 * (v.l - v.ref_l))),
}


@pytest.mark.parametrize('name', FORMULAS)
def test_other_objectives_are_their_papers_formulas(name):
    check_formula(*FORMULAS[name])


def test_robust_dpo_is_unbiased():
    """In expectation over flipped labels it is DPO on the true ones."""
    v = vectors()
    flipped = SimpleNamespace(w=v.l, l=v.w, ref_w=v.ref_l, ref_l=v.ref_w, n_w=v.n_l, n_l=v.n_w)
    a, b = (call(robust_dpo_loss, x, beta=0.3, label_smoothing=0.2)[0] for x in (v, flipped))
    assert_close(0.8 * a + 0.2 * b, call(dpo_loss, v, beta=0.3)[0])


def test_plackett_luce():
    """The probability of an order is that of drawing the best, then the best of the rest, ...; over
    all orders of four they sum to 1; with two responses it is DPO."""
    g = torch.Generator().manual_seed(0)
    policy, reference = -20 + 4 * torch.randn(2, 5, 4, generator=g, dtype=torch.float64)
    policy = policy.clone().requires_grad_()
    losses, best, worst = plackett_luce_loss(policy, reference, beta=0.3)
    rewards = 0.3 * (policy - reference).detach()
    for row, loss in zip(rewards.exp().tolist(), losses.tolist()):
        probability = math.prod(row[k] / sum(row[k:]) for k in range(4))
        assert math.exp(-loss) == pytest.approx(probability, rel=1e-10)
    assert_close((best, worst), (rewards[:, 0], rewards[:, 3]))
    assert losses.requires_grad and not best.requires_grad and not worst.requires_grad
    orders = [plackett_luce_loss(policy[:, order], reference[:, order], beta=0.3)[0]
              for order in itertools.permutations(range(4))]
    total = (-torch.stack(orders)).exp().sum(dim=0)
    assert_close(total, torch.ones(5, dtype=torch.float64))

    v = vectors(grad=True)
    ranking, reference = torch.stack([v.w, v.l], dim=1), torch.stack([v.ref_w, v.ref_l], dim=1)
    pair = plackett_luce_loss(ranking, reference, beta=0.3)
    same = call(dpo_loss, v, beta=0.3)
    assert_close(pair, same)
    assert_close(gradients(pair[0], v), gradients(same[0], v))


# --------------------------------------------------------------------------------------------------
# Gradients, and what holds for any input


@pytest.mark.parametrize('options', SOFTNESS)
def test_dpo_gradient(options):
    """-beta sigma(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l)), below the paper's equation 7.
    With soft labels the weight is q - sigma(r_w - r_l)."""
    v, beta = vectors(grad=True), 0.3
    losses, r_w, r_l = call(dpo_loss, v, beta=beta, **options)
    p, eps = options.get('p', torch.ones_like(r_w)), options.get('label_smoothing', 0.0)
    weight = (1 - eps) * p + eps * (1 - p) - torch.sigmoid(r_w - r_l)
    expected = -beta * weight, beta * weight
    assert_close(gradients(losses, v), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize('options', SOFTNESS)
def test_dpo_is_log_2_where_the_policy_is_the_reference(options):
    """Whatever the labels: a policy that has not moved prefers neither."""
    v = vectors()
    losses, chosen, rejected = dpo_loss(v.w, v.l, v.w, v.l, beta=5.0, **options)
    assert_close(losses, torch.full_like(losses, math.log(2)), rtol=1e-12, atol=0)
    assert not chosen.any() and not rejected.any()


def test_labels():
    """p = 1 is a hard label, p = 0 swaps the pair, smoothing of eps is p = 1 - eps, and both
    together are one label q."""
    z, one = torch.linspace(-5, 5, 32, dtype=torch.float64), torch.ones(32, dtype=torch.float64)
    hard = bernoulli_nll(z)
    assert_close(bernoulli_nll(z, p=one), hard, rtol=1e-14, atol=0)
    assert_close(bernoulli_nll(z, p=0 * one), bernoulli_nll(-z), rtol=1e-14, atol=0)
    assert_close(bernoulli_nll(z, 0.2), bernoulli_nll(z, p=0.8 * one))
    assert_close(bernoulli_nll(z, 0.2, P), bernoulli_nll(z, p=0.8 * P + 0.2 * (1 - P)))
    assert_close(bernoulli_nll(z, 0.5, P), (hard + bernoulli_nll(-z)) / 2)


@pytest.mark.parametrize('loss, label_smoothing', [
    (dpo_loss, -0.1), (dpo_loss, 0.51), (dpo_loss, math.nan), (robust_dpo_loss, 0.5)])
def test_label_smoothing_out_of_range(loss, label_smoothing):
    with pytest.raises(ValueError, match=f'{label_smoothing} is not between 0 and 0.5'):
        call(loss, vectors(), label_smoothing=label_smoothing)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('loss, options', [
    (dpo_loss, dict()), (dpo_loss, dict(beta=10.0, label_smoothing=0.1)),
    *((loss, options) for loss, options, _ in FORMULAS.values())])
def test_objectives_are_finite_at_extremes(loss, options, dtype):
    ends = torch.tensor([-1e-3, -1.0, -3e4], dtype=dtype)
    for n in (1.0, 1000.0):
        w, l, ref_w, ref_l = torch.cartesian_prod(ends, ends, ends, ends).T                # (81,)
        w, l, lengths = w.clone().requires_grad_(), l.clone().requires_grad_(), 0 * w + n
        v = SimpleNamespace(w=w, l=l, ref_w=ref_w, ref_l=ref_l, n_w=lengths, n_l=lengths)
        losses, r_w, r_l = call(loss, v, **options)
        grads = gradients(losses, v)
        assert all(t.isfinite().all() for t in (losses, r_w, r_l, *grads))
        if loss is dpo_loss and not options:               # far on the wrong side: full weight
            wrong = r_w - r_l < -500
            assert wrong.any() and torch.equal(grads[0][wrong], grads[0][wrong] * 0 - 0.1)


# --------------------------------------------------------------------------------------------------
# TRL's code, on the same pairs


class OneProcess:
    """What TRL's losses ask of its accelerator."""
    device = torch.device('cpu')

    def gather_for_metrics(self, tensor):
        return tensor
    gather = gather_for_metrics


def trl_trainer(loss_type, label_smoothing):
    """A DPOTrainer without model or data: what DPOTrainer._compute_loss reads of it."""
    trl = pytest.importorskip('trl', reason='compares with TRL')
    if not hasattr(trl.DPOTrainer, '_compute_loss'):
        pytest.skip(f'trl {trl.__version__} has no DPOTrainer._compute_loss')
    trainer = trl.DPOTrainer.__new__(trl.DPOTrainer)
    trainer.__dict__.update(
        model=SimpleNamespace(training=True), accelerator=OneProcess(), beta=0.3,
        label_smoothing=label_smoothing, loss_types=[loss_type], loss_weights=[1.0], ld_alpha=None,
        f_divergence_type='reverse_kl', precompute_ref_logps=True, aux_loss_enabled=False,
        use_weighting=False, _metrics=dict(train=defaultdict(list)), _total_train_tokens=0,
        _tp_size=1)
    return trainer


def packed_and_padded(vocab=61):
    """Six pairs, packed for us and padded for TRL: chosen rows, then rejected rows; (12, t) tokens,
    the attention mask, and a mask that is 1 on the responses."""
    rng = np.random.default_rng(0)
    texts = [[rng.integers(vocab, size=n).tolist() for n in lengths]
             for lengths in rng.integers(1, 11, size=(6, 3))]
    pairs = [(prompt, responses) for prompt, *responses in texts]
    rows = [(prompt, responses[k]) for k in (0, 1) for prompt, responses in pairs]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids, attention, completion = torch.zeros(3, len(rows), longest, dtype=torch.int64)
    for i, (prompt, response) in enumerate(rows):
        n = len(prompt) + len(response)
        ids[i, :n], attention[i, :n] = torch.tensor([*prompt, *response]), 1
        completion[i, len(prompt):n] = 1
    return pack(pairs), ids, attention, completion


def same_gradients(ours, theirs, tolerance):
    for name, p in ours.named_parameters():
        (their_name,), transposed = their_names(name, ours.config)
        g = theirs.get_parameter('transformer.' + their_name).grad
        assert (p.grad - (g.t() if transposed else g)).norm() <= tolerance * g.norm(), name


@pytest.mark.parametrize('loss, options, loss_type, label_smoothing', [
    (dpo_loss, dict(), 'sigmoid', 0.0), (robust_dpo_loss, dict(label_smoothing=0.2), 'robust', 0.2),
    (ipo_loss, dict(length_average=True), 'ipo', 0.0), (kto_loss, dict(), 'apo_zero', 0.0)])
def test_from_tokens_to_gradients_is_trls(loss, options, loss_type, label_smoothing, tiny):
    """The full way: our batch, log-probs, sums, loss and gradients; and DPOTrainer._compute_loss on
    a padded batch through transformers' GPT-2 with TRL's own fused head."""
    folder, theirs = tiny('gpt2')
    ours, trainer = load(folder), trl_trainer(loss_type, label_smoothing)
    utils = pytest.importorskip('trl.trainer.utils', reason='compares with TRL')
    utils.add_fused_lm_head(theirs, outputs=('log_probs', 'entropy', 'mean_logits', 'is_top1'))
    batch, ids, attention, completion = packed_and_padded()
    logps = batch.sum_by_response(ours.token_logps(batch))
    noise = torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))
    reference = logps.detach() + noise
    v = SimpleNamespace(w=logps[:, 0], l=logps[:, 1], ref_w=reference[:, 0], ref_l=reference[:, 1],
                        n_w=batch.lengths[:, 0], n_l=batch.lengths[:, 1])
    losses, chosen, _ = call(loss, v, beta=0.3, **options)
    losses.mean().backward()
    their_loss = trainer._compute_loss(theirs, dict(
        input_ids=ids, attention_mask=attention, completion_mask=completion,
        ref_chosen_logps=v.ref_w, ref_rejected_logps=v.ref_l), return_outputs=False)
    their_loss.backward()
    metrics = trainer._metrics['train']
    assert losses.mean().item() == pytest.approx(their_loss.item(), rel=1e-5)
    assert v.w.mean().item() == pytest.approx(metrics['logps/chosen'][0], rel=1e-5)
    if loss is not ipo_loss:                               # TRL logs rewards of sums there
        assert chosen.mean().item() == pytest.approx(metrics['rewards/chosen'][0], rel=1e-4)
    same_gradients(ours, theirs, 1e-5)


# --------------------------------------------------------------------------------------------------
# The optimum: with every pair of a small space of responses, labelled by sigma(r_i - r_j), DPO's
# minimum is pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x), the paper's equation 4


def optimum(reference_logps, rewards, beta):
    return (reference_logps + rewards / beta).log_softmax(dim=1)


def kl(logp, logq):
    return (logp.exp() * (logp - logq)).sum(dim=1).max().item()


def test_the_optimum_is_where_dpo_stands_still():
    """A softmax over 6 responses to each of 3 prompts: the gradient of its logits vanishes at pi*,
    and nowhere near. There implicit rewards are the true ones, up to a number for each prompt."""
    g, beta = torch.Generator().manual_seed(0), 0.5
    reference = torch.randn(3, 6, generator=g, dtype=torch.float64).log_softmax(dim=1)
    rewards = torch.randn(3, 6, generator=g, dtype=torch.float64)
    i, j = torch.combinations(torch.arange(6)).T
    p = torch.sigmoid(rewards[:, i] - rewards[:, j]).view(-1)

    def dpo_of_all_pairs(logits):
        policy = logits.log_softmax(dim=1)
        flat = [t[:, index].reshape(-1) for t in (policy, reference) for index in (i, j)]
        return dpo_loss(*flat, beta=beta, p=p)
    target = optimum(reference, rewards, beta)
    for logits, stands in ((target, True), (reference, False), (target + 0.01 * rewards, False)):
        logits = logits.clone().requires_grad_()
        losses, r_i, r_j = dpo_of_all_pairs(logits)
        gradient, = torch.autograd.grad(losses.sum(), logits)
        assert (gradient.norm() < 1e-12) == stands and (stands or gradient.norm() > 1e-3)
        assert stands == torch.allclose((r_i - r_j).view(3, -1), rewards[:, i] - rewards[:, j])


def test_dpo_converges_to_the_optimum_through_the_gpt():
    """The same through the real model. Three tokens, one of which ends a text, and at most two to a
    response: 7 responses in all, of different lengths. 2 prompts, 21 pairs each, packed."""
    torch.manual_seed(0)
    beta, eot = 0.5, 2
    responses = [[eot], [0, eot], [1, eot], [0, 0], [0, 1], [1, 0], [1, 1]]
    prompts = [[0, 1], [1, 1, 0]]
    model = GPT(GPTConfig(block_size=5, vocab_size=3, n_layer=1, n_head=2, n_embd=16))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    rankings = pack([(prompt, responses) for prompt in prompts])

    @torch.no_grad()
    def distribution():                                    # (2, 7)
        return rankings.sum_by_response(model.token_logps(rankings))
    reference, rewards = distribution(), torch.randn(2, 7)
    assert reference.exp().sum(dim=1).tolist() == pytest.approx([1, 1], abs=1e-5)
    target = optimum(reference, rewards, beta)
    assert kl(target, reference) > 0.1
    i, j = torch.combinations(torch.arange(7)).T
    batch = pack([(prompt, [responses[a], responses[b]])
                  for prompt in prompts for a, b in zip(i, j)])
    p = torch.sigmoid(rewards[:, i] - rewards[:, j]).view(-1)
    ref_i, ref_j = reference[:, i].reshape(-1), reference[:, j].reshape(-1)

    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=200)
    for _ in range(200):
        logps = batch.sum_by_response(model.token_logps(batch))
        dpo_loss(*logps.T, ref_i, ref_j, beta=beta, p=p)[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert kl(target, distribution()) < 1e-3
