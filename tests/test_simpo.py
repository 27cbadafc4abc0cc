"""
Tests of simpo.py: numbers worked by hand, the papers' formulas in float64, extremes, TRL's code.

    python -m pytest tests/test_simpo.py

Comparisons with TRL (written against 1.16) are skipped where it is not installed.
"""
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from simpo import cpo_loss, orpo_loss, rrhf_loss, sft_loss, simpo_loss, slic_loss
from test_dpo import (ONE_PROCESS, SOFTNESS, call, check_extremes, check_formula, nll,
                      packed_and_padded, same_gradients, vectors)
from weights import load


def test_simpo_by_hand():
    logps = [torch.tensor([-10.0]), torch.tensor([-27.0]), torch.tensor([5]), torch.tensor([10])]
    for options, r_w, r_l, expected in [
            # r_w = 2 * -10 / 5, r_l = 2 * -27 / 10, z = -4 + 5.4 - 0.5 = 0.9
            # exp(-0.9) = 0.4065697, loss = log(1.4065697)
            (dict(), -4.0, -5.4, 0.3411539),
            # -log sigma(-0.9) = 0.9 + 0.3411539;  0.8 * 0.3411539 + 0.2 * 1.2411539
            (dict(label_smoothing=0.2), -4.0, -5.4, 0.5211539),
            # z = -5 + 6.75 - 1.5 = 0.25;  exp(-0.25) = 0.7788008, loss = log(1.7788008)
            (dict(beta=2.5, gamma=1.5), -5.0, -6.75, 0.5759392)]:
        losses, chosen, rejected = simpo_loss(*logps, **options)
        assert chosen.item() == pytest.approx(r_w) and rejected.item() == pytest.approx(r_l)
        assert losses.item() == pytest.approx(expected, abs=1e-6)


def test_sft_by_hand():
    losses, chosen, rejected = sft_loss(torch.tensor([-10.0, -3.0]))     # the sum, not the mean
    assert losses.tolist() == [10.0, 3.0] and chosen is None and rejected is None


def log_odds(mean_logp):
    return torch.log(mean_logp.exp() / (1 - mean_logp.exp()))


FORMULAS = [   # function, options, the paper's formula; w and l are mean log-probs
    *((simpo_loss, dict(beta=3.0, gamma=0.7) | soft, lambda v, w, l, soft=soft: (
        nll(3 * w - 3 * l - 0.7, **soft), 3 * w, 3 * l)) for soft in SOFTNESS),
    (simpo_loss, dict(sft_weight=0.1), lambda v, w, l: (
        nll(2 * w - 2 * l - 0.5) - 0.1 * w, 2 * w, 2 * l)),
    (cpo_loss, dict(beta=0.3, sft_weight=0.7), lambda v, w, l: (
        nll(0.3 * v.w - 0.3 * v.l) - 0.7 * v.w, 0.3 * v.w, 0.3 * v.l)),
    (orpo_loss, dict(beta=0.3), lambda v, w, l: (
        -w + 0.3 * nll(log_odds(w) - log_odds(l)), 0.3 * w, 0.3 * l)),
    (slic_loss, dict(delta=2.0, sft_weight=0.7), lambda v, w, l: (
        (2 - v.w + v.l).clamp(min=0) - 0.7 * v.w, v.w, v.l)),
    (rrhf_loss, dict(sft_weight=0.7), lambda v, w, l: (
        (l - w).clamp(min=0) - 0.7 * v.w, w, l)),
]


@pytest.mark.parametrize('loss, options, formula', FORMULAS)
def test_objectives_are_their_papers_formulas(loss, options, formula):
    check_formula(loss, options, lambda v: formula(v, v.w / v.n_w, v.l / v.n_l))


@pytest.mark.parametrize('loss', [simpo_loss, cpo_loss, orpo_loss, slic_loss, rrhf_loss])
def test_objectives_are_finite_at_extremes(loss):
    """Also where a log-prob rounds to 0: an end of text after one token, learnt by heart."""
    check_extremes(loss, [0.0, -1e-9, -1.0, -3e4])


def test_simpo_does_not_depend_on_lengths():
    """Twice the length and twice the sum, so the same mean, is the same."""
    v = vectors()
    longer = SimpleNamespace(**vars(v) | dict(w=2 * v.w, n_w=2 * v.n_w, l=3 * v.l, n_l=3 * v.n_l))
    assert_close(call(simpo_loss, v), call(simpo_loss, longer), rtol=1e-12, atol=0)


@pytest.mark.parametrize('beta, gamma, label_smoothing', [(2.0, 0.5, 0.0), (10.0, 0.0, 0.15)])
def test_simpo_from_tokens_to_gradients_is_trls(beta, gamma, label_smoothing, tiny):
    """Our packed batch, and CPOTrainer.get_batch_logps (the mean over a response) on a padded one,
    in float64. TRL's gamma is in units of reward, as ours is."""
    cpo = pytest.importorskip('trl.experimental.cpo', reason='compares with TRL')
    trainer = cpo.CPOTrainer.__new__(cpo.CPOTrainer)
    trainer.__dict__.update(               # no model or data: what cpo_loss reads
        accelerator=ONE_PROCESS, loss_type='simpo', beta=beta, alpha=0.0, simpo_gamma=gamma,
        label_smoothing=label_smoothing)
    folder, theirs = tiny('gpt2')
    ours, theirs = load(folder).double(), theirs.double()
    batch, ids, attention, completion = packed_and_padded()
    logps = batch.sum_by_response(ours.token_logps(batch))
    result = simpo_loss(*logps.T, *batch.lengths.T, beta, gamma, label_smoothing)
    result[0].mean().backward()
    logits = theirs(ids, attention_mask=attention).logits
    labels = ids.masked_fill(completion == 0, -100)
    means = trainer.get_batch_logps(logits, labels, average_log_prob=True)
    their_result = trainer.cpo_loss(*means.chunk(2))
    their_result[0].mean().backward()
    assert_close(result, their_result, rtol=1e-10, atol=1e-12)
    same_gradients(ours, theirs, 1e-9)
