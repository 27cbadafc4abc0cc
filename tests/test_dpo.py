"""
Tests of dpo.py: numbers worked by hand, the papers' formulas in float64, gradients, extremes, TRL's
code, and the optimum that the theory promises.

    python -m pytest tests/test_dpo.py

Comparisons with TRL (written against 1.16) are skipped where it is not installed.
"""
import inspect
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from conftest import randomise
from dpo import dpo_loss, ipo_loss, kto_loss, plackett_luce_loss, rdpo_loss, robust_dpo_loss
from model import GPT, GPTConfig, pack
from test_model import random_pairs
from weights import load, their_names


def vectors():
    """Log-probs of 32 pairs (w: chosen, l: rejected), d = log pi/pi_ref, lengths n; float64."""
    g = torch.Generator().manual_seed(0)
    n = torch.randint(1, 60, (2, 32), generator=g).double()
    ref = -(1 + 2 * torch.rand(2, 32, generator=g)) * n
    w, l = (t.clone().requires_grad_() for t in ref + 4 * torch.randn(2, 32, generator=g))
    return SimpleNamespace(w=w, l=l, ref_w=ref[0], ref_l=ref[1], d_w=w - ref[0], d_l=l - ref[1],
                           n_w=n[0], n_l=n[1])


def call(loss, v, **options):
    """The objective on what its signature asks for, as train.py calls it."""
    supplied = dict(policy_chosen_logps=v.w, policy_rejected_logps=v.l,
                    reference_chosen_logps=v.ref_w, reference_rejected_logps=v.ref_l,
                    chosen_lengths=v.n_w, rejected_lengths=v.n_l)
    names = inspect.signature(loss).parameters
    return loss(**{name: x for name, x in supplied.items() if name in names}, **options)


def gradients(losses, v):
    return torch.autograd.grad(losses.sum(), (v.w, v.l), retain_graph=True)


def nll(z, label_smoothing=0.0, p=1.0):
    """-q log sigma(z) - (1 - q) log sigma(-z), word for word."""
    q = p * (1 - label_smoothing) + (1 - p) * label_smoothing
    return -q * z.sigmoid().log() - (1 - q) * (-z).sigmoid().log()


def check_formula(loss, options, formula):
    """(B,) values and gradients equal the formula's; only the losses carry a gradient."""
    v = vectors()
    result, expected = call(loss, v, **options), formula(v)
    assert_close(result, expected, rtol=1e-9, atol=1e-12)
    assert_close(gradients(result[0], v), gradients(expected[0], v), rtol=1e-9, atol=1e-12)
    assert [t.requires_grad for t in result] == [True, False, False]


def check_extremes(loss, ends):
    """Finite values and gradients at every combination of the ends, for short and long texts."""
    ends = torch.tensor(ends)
    w, l, ref_w, ref_l, n = torch.cartesian_prod(*[ends] * 4, torch.tensor([1.0, 1000.0])).T
    w, l = w.clone().requires_grad_(), l.clone().requires_grad_()
    v = SimpleNamespace(w=w, l=l, ref_w=ref_w, ref_l=ref_l, n_w=n, n_l=n)
    losses, r_w, r_l = call(loss, v)
    assert all(t.isfinite().all() for t in (losses, r_w, r_l, *gradients(losses, v)))


def test_dpo_by_hand():
    # r_w = 0.1 * (-10 - -12) =  0.2
    # r_l = 0.1 * (-20 - -15) = -0.5
    # z = 0.7;  exp(-0.7) = 0.4965853;  loss = log(1 + 0.4965853) = 0.4031860
    # the other way round, -log sigma(-0.7) = 0.7 + 0.4031860 = 1.1031860
    # q = 0.9 * 0.25 + 0.1 * 0.75 = 0.3;  loss = 0.3 * 0.4031860 + 0.7 * 1.1031860 = 0.8931860
    logps = [torch.tensor([x]) for x in (-10.0, -20.0, -12.0, -15.0)]
    for options, expected in [
            ({}, 0.4031860), (dict(label_smoothing=0.1, p=torch.tensor([0.25])), 0.8931860)]:
        losses, chosen, rejected = dpo_loss(*logps, **options)
        assert chosen.item() == pytest.approx(0.2) and rejected.item() == pytest.approx(-0.5)
        assert losses.item() == pytest.approx(expected, abs=1e-6)


P = torch.rand(32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
SOFTNESS = [dict(), dict(label_smoothing=0.1), dict(p=P), dict(label_smoothing=0.2, p=P)]
FORMULAS = [   # function, options, the paper's formula
    *((dpo_loss, dict(beta=0.3) | soft, lambda v, soft=soft: (
        nll(0.3 * (v.d_w - v.d_l), **soft), 0.3 * v.d_w, 0.3 * v.d_l)) for soft in SOFTNESS),
    (robust_dpo_loss, dict(beta=0.3, label_smoothing=0.2), lambda v: (
        (0.8 * nll(0.3 * (v.d_w - v.d_l)) - 0.2 * nll(-0.3 * (v.d_w - v.d_l))) / (1 - 0.4),
        0.3 * v.d_w, 0.3 * v.d_l)),
    (ipo_loss, dict(beta=0.2), lambda v: (
        (v.d_w - v.d_l - 2.5) ** 2, 0.2 * v.d_w, 0.2 * v.d_l)),
    (ipo_loss, dict(beta=0.2, length_average=True), lambda v: (
        (v.d_w / v.n_w - v.d_l / v.n_l - 2.5) ** 2, 0.2 * v.d_w / v.n_w, 0.2 * v.d_l / v.n_l)),
    (rdpo_loss, dict(beta=0.3, alpha=0.05), lambda v: (
        nll(0.3 * v.d_w - 0.3 * v.d_l + 0.05 * v.n_w - 0.05 * v.n_l), 0.3 * v.d_w, 0.3 * v.d_l)),
    (kto_loss, dict(beta=0.3, reference_point=0.4), lambda v: (
        1 - 1 / (1 + torch.exp(0.4 - 0.3 * v.d_w)) + 1 - 1 / (1 + torch.exp(0.3 * v.d_l - 0.4)),
        0.3 * v.d_w, 0.3 * v.d_l)),
]


@pytest.mark.parametrize('loss, options, formula', FORMULAS)
def test_objectives_are_their_papers_formulas(loss, options, formula):
    check_formula(loss, options, formula)


@pytest.mark.parametrize('loss', [dpo_loss, robust_dpo_loss, ipo_loss, rdpo_loss, kto_loss])
def test_objectives_are_finite_at_extremes(loss):
    check_extremes(loss, [-1e-3, -1.0, -3e4])


def test_plackett_luce():
    """The probability of drawing the best, then the best of the rest, ...; of two it is DPO."""
    policy, reference = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    losses, best, worst = plackett_luce_loss(policy, reference, beta=0.3)
    rewards = 0.3 * (policy - reference)
    for row, loss in zip(rewards.exp().tolist(), losses.tolist()):
        probability = math.prod(row[k] / sum(row[k:]) for k in range(4))
        assert math.exp(-loss) == pytest.approx(probability, rel=1e-10)
    assert_close((best, worst), (rewards[:, 0], rewards[:, 3]))
    v = vectors()
    pair = plackett_luce_loss(torch.stack([v.w, v.l], 1), torch.stack([v.ref_w, v.ref_l], 1), 0.3)
    dpo = call(dpo_loss, v, beta=0.3)
    assert_close(pair, dpo)
    assert_close(gradients(pair[0], v), gradients(dpo[0], v))


def test_robust_dpo_is_unbiased():
    """In expectation over flipped labels it is DPO on the true ones."""
    v = vectors()
    flipped = SimpleNamespace(w=v.l, l=v.w, ref_w=v.ref_l, ref_l=v.ref_w, n_w=v.n_l, n_l=v.n_w)
    a, b = (call(robust_dpo_loss, x, beta=0.3, label_smoothing=0.2)[0] for x in (v, flipped))
    assert_close(0.8 * a + 0.2 * b, call(dpo_loss, v, beta=0.3)[0])


@pytest.mark.parametrize('loss, label_smoothing', [
    (dpo_loss, -0.1), (dpo_loss, 0.51), (dpo_loss, math.nan), (robust_dpo_loss, 0.5)])
def test_label_smoothing_out_of_range(loss, label_smoothing):
    with pytest.raises(ValueError, match=f'label_smoothing {label_smoothing}'):
        call(loss, vectors(), label_smoothing=label_smoothing)


def test_dpo_converges_to_the_optimum():
    """With every pair labelled by sigma(r_i - r_j), DPO's minimum is pi*(y|x) = pi_ref(y|x)
    exp(r(x, y) / beta) / Z(x), the paper's equation 4. Through the real model: of three tokens, 2
    ends a text, and a response has at most two, so there are 7 of them."""
    responses = [[2], [0, 2], [1, 2], [0, 0], [0, 1], [1, 0], [1, 1]]
    batch = pack([(prompt, responses) for prompt in ([0, 1], [1, 1, 0])])
    model = randomise(GPT(GPTConfig(block_size=5, vocab_size=3, n_layer=1, n_head=2, n_embd=16)))

    def policy():                                          # (2, 7)
        return batch.sum_by_response(model.token_logps(batch))

    def kl():
        return (target.exp() * (target - policy())).sum(dim=1).max()
    g = torch.Generator().manual_seed(0)
    reference, rewards = policy().detach(), torch.randn(2, 7, generator=g)
    assert reference.exp().sum(dim=1).tolist() == pytest.approx([1, 1], abs=1e-5)
    target = (reference + rewards / 0.5).log_softmax(dim=1)
    assert kl() > 0.1
    i, j = torch.combinations(torch.arange(7)).T
    p = torch.sigmoid(rewards[:, i] - rewards[:, j])       # (2, 21)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(250):
        logps = [table[:, k] for table in (policy(), reference) for k in (i, j)]
        dpo_loss(*logps, beta=0.5, p=p)[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert kl() < 1e-3


ONE_PROCESS = SimpleNamespace(    # what TRL's losses ask of its accelerator
    device=torch.device('cpu'), gather=lambda t: t, gather_for_metrics=lambda t: t)


def packed_and_padded():
    """Six pairs, packed for us and padded for TRL: chosen rows, then rejected rows; (12, t) tokens,
    the attention mask, and a mask that is 1 on the responses."""
    pairs = random_pairs(6)
    rows = [(prompt, responses[k]) for k in (0, 1) for prompt, responses in pairs]
    kinds = ([p + r for p, r in rows], [[1] * len(p + r) for p, r in rows],
             [[0] * len(p) + [1] * len(r) for p, r in rows])
    return pack(pairs), *(pad_sequence([torch.tensor(row) for row in kind], batch_first=True)
                          for kind in kinds)


def same_gradients(ours, theirs, tolerance):
    for name, p in ours.named_parameters():
        (their_name,), transposed = their_names(name, ours.config)
        g = theirs.get_parameter(their_name).grad
        assert (p.grad - (g.t() if transposed else g)).norm() <= tolerance * g.norm(), name


@pytest.mark.parametrize('loss, options, loss_type', [
    (dpo_loss, dict(), 'sigmoid'), (robust_dpo_loss, dict(label_smoothing=0.2), 'robust'),
    (ipo_loss, dict(length_average=True), 'ipo'), (kto_loss, dict(), 'apo_zero')])
def test_from_tokens_to_gradients_is_trls(loss, options, loss_type, tiny):
    """The full way: our batch, log-probs, sums, loss and gradients; and DPOTrainer._compute_loss on
    a padded batch through transformers' GPT-2 with TRL's own fused head."""
    trl = pytest.importorskip('trl', reason='compares with TRL')
    folder, theirs = tiny('gpt2')
    ours, trainer = load(folder), trl.DPOTrainer.__new__(trl.DPOTrainer)
    trainer.__dict__.update(                               # no data: what _compute_loss reads
        model=SimpleNamespace(training=True), accelerator=ONE_PROCESS, beta=0.3, ld_alpha=None,
        label_smoothing=options.get('label_smoothing', 0.0), loss_types=[loss_type],
        loss_weights=[1.0], f_divergence_type='reverse_kl', precompute_ref_logps=True,
        aux_loss_enabled=False, use_weighting=False, _metrics=dict(train=defaultdict(list)),
        _total_train_tokens=0, _tp_size=1)
    trl.trainer.utils.add_fused_lm_head(
        theirs, outputs=('log_probs', 'entropy', 'mean_logits', 'is_top1'))
    batch, ids, attention, completion = packed_and_padded()
    logps = batch.sum_by_response(ours.token_logps(batch))
    noise = torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))
    (w, l), (ref_w, ref_l), (n_w, n_l) = logps.T, (logps.detach() + noise).T, batch.lengths.T
    v = SimpleNamespace(w=w, l=l, ref_w=ref_w, ref_l=ref_l, n_w=n_w, n_l=n_l)
    losses, chosen, _ = call(loss, v, beta=0.3, **options)
    losses.mean().backward()
    their_loss = trainer._compute_loss(theirs, dict(
        input_ids=ids, attention_mask=attention, completion_mask=completion,
        ref_chosen_logps=ref_w, ref_rejected_logps=ref_l), return_outputs=False)
    their_loss.backward()
    assert losses.mean().item() == pytest.approx(their_loss.item(), rel=1e-5)
    if loss is not ipo_loss:                               # TRL logs rewards of sums there
        their_chosen, = trainer._metrics['train']['rewards/chosen']
        assert chosen.mean().item() == pytest.approx(their_chosen, rel=1e-4)
    same_gradients(ours, theirs, 1e-5)
