"""
Tests of simpo.py: numbers worked by hand, the papers' formulas in numpy, gradients, extremes, TRL's
code.

    python -m pytest tests/test_simpo.py

Comparisons with TRL (written against 1.16) are skipped where it is not installed. Labels (p and
label_smoothing) are those of dpo.py and tested there, too.
"""
import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from dpo import dpo_loss
from simpo import cpo_loss, orpo_loss, rrhf_loss, sft_loss, simpo_loss, slic_loss
from test_dpo import (SOFTNESS, OneProcess, call, check_formula, gradients, log_sigmoid, nll,
                      packed_and_padded, same_gradients, vectors)
from weights import load


def log_odds(mean_logp):
    return np.log(np.exp(mean_logp) / (1 - np.exp(mean_logp)))


# --------------------------------------------------------------------------------------------------
# By hand


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


def test_defaults_of_simpo():
    parameters = inspect.signature(simpo_loss).parameters.values()
    assert [(p.name, p.default) for p in parameters][4:] == [
        ('beta', 2.0), ('gamma', 0.5), ('label_smoothing', 0.0), ('p', None), ('sft_weight', 0.0)]
    assert [p.name for p in parameters][:4] == ['policy_chosen_logps', 'policy_rejected_logps',
                                                'chosen_lengths', 'rejected_lengths']


# --------------------------------------------------------------------------------------------------
# The papers' formulas, and gradients


@pytest.mark.parametrize('options', SOFTNESS)
@pytest.mark.parametrize('beta, gamma', [(2.0, 0.5), (10.0, 3.0), (1.0, 0.0)])
def test_simpo_is_the_papers_formula(beta, gamma, options):
    """Meng et al. 2024, equation 6."""
    check_formula(simpo_loss, dict(beta=beta, gamma=gamma) | options, lambda v: (
        nll(beta / v.n_w * v.w - beta / v.n_l * v.l - gamma, **options),
        beta / v.n_w * v.w, beta / v.n_l * v.l))


FORMULAS = {   # (function, options, the paper's formula)
    'simpo with sft': (simpo_loss, dict(sft_weight=0.1), lambda v: (
        -log_sigmoid(2 * v.w / v.n_w - 2 * v.l / v.n_l - 0.5) - 0.1 * v.w / v.n_w,
        2 * v.w / v.n_w, 2 * v.l / v.n_l)),
    'cpo': (cpo_loss, dict(beta=0.3, sft_weight=0.7), lambda v: (
        -log_sigmoid(0.3 * v.w - 0.3 * v.l) - 0.7 * v.w, 0.3 * v.w, 0.3 * v.l)),
    'orpo': (orpo_loss, dict(beta=0.3), lambda v: (
        -v.w / v.n_w - 0.3 * log_sigmoid(log_odds(v.w / v.n_w) - log_odds(v.l / v.n_l)),
        0.3 * v.w / v.n_w, 0.3 * v.l / v.n_l)),
    'slic': (slic_loss, dict(delta=2.0, sft_weight=0.7), lambda v: (
        np.maximum(0, 2 - v.w + v.l) - 0.7 * v.w, v.w, v.l)),
    'rrhf': (rrhf_loss, dict(sft_weight=0.7), lambda v: (
        np.maximum(0, v.l / v.n_l - v.w / v.n_w) - 0.7 * v.w, v.w / v.n_w, v.l / v.n_l)),
}


@pytest.mark.parametrize('name', FORMULAS)
def test_other_objectives_are_their_papers_formulas(name):
    check_formula(*FORMULAS[name])


def test_simpo_gradient():
    """-beta sigma(r_l - r_w + gamma) (grad log pi(y_w) / |y_w| - grad log pi(y_l) / |y_l|), the
    paper's equation 7."""
    v = vectors(grad=True)
    losses, r_w, r_l = call(simpo_loss, v, beta=2.0, gamma=0.7)
    weight = torch.sigmoid(r_l - r_w + 0.7)
    expected = -2.0 * weight / v.n_w, 2.0 * weight / v.n_l
    assert_close(gradients(losses, v), expected, rtol=1e-10, atol=1e-14)


# --------------------------------------------------------------------------------------------------
# What holds for any input


def test_simpo_does_not_depend_on_lengths():
    """Twice the length and twice the sum, so the same mean, is the same to SimPO. Not so to DPO."""
    v = vectors()
    longer = SimpleNamespace(w=2 * v.w, l=3 * v.l, n_w=2 * v.n_w, n_l=3 * v.n_l,
                             ref_w=2 * v.ref_w, ref_l=3 * v.ref_l)
    assert_close(call(simpo_loss, v), call(simpo_loss, longer), rtol=1e-12, atol=0)
    assert not torch.allclose(call(dpo_loss, v)[0], call(dpo_loss, longer)[0])


@pytest.mark.parametrize('label_smoothing', [-0.1, 0.51, math.nan])
def test_label_smoothing_out_of_range(label_smoothing):
    with pytest.raises(ValueError, match='label_smoothing'):
        call(simpo_loss, vectors(), label_smoothing=label_smoothing)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('loss, options', [
    (simpo_loss, dict()), (simpo_loss, dict(beta=10.0, gamma=3.0, label_smoothing=0.1)),
    *((loss, options) for loss, options, _ in FORMULAS.values())])
def test_objectives_are_finite_at_extremes(loss, options, dtype):
    """Also where a log-prob rounds to 0: an end of text after one token, learnt by heart."""
    ends = torch.tensor([0.0, -1e-9, -1.0, -3e4], dtype=dtype)
    for n in (1.0, 1000.0):
        w, l = (t.clone().requires_grad_() for t in torch.cartesian_prod(ends, ends).T)    # (16,)
        lengths = torch.full_like(w, n)
        v = SimpleNamespace(w=w, l=l, n_w=lengths, n_l=lengths, ref_w=None, ref_l=None)
        losses, r_w, r_l = call(loss, v, **options)
        assert all(t.isfinite().all() for t in (losses, r_w, r_l, *gradients(losses, v)))
        assert losses.dtype == r_w.dtype == dtype


# --------------------------------------------------------------------------------------------------
# TRL's code, on the same numbers


def trl_trainer(beta, gamma, label_smoothing):
    """A CPOTrainer without model or data: what CPOTrainer.cpo_loss reads of it."""
    trainers = pytest.importorskip('trl.experimental.cpo', reason='compares with TRL')
    trainer = trainers.CPOTrainer.__new__(trainers.CPOTrainer)
    trainer.__dict__.update(accelerator=OneProcess(), loss_type='simpo', beta=beta, alpha=0.0,
                            simpo_gamma=gamma, label_smoothing=label_smoothing)
    return trainer


@pytest.mark.parametrize('beta, gamma, label_smoothing', [(2.0, 0.5, 0.0), (10.0, 0.0, 0.15)])
def test_simpo_from_tokens_to_gradients_is_trls(beta, gamma, label_smoothing, tiny):
    """Our packed batch, and CPOTrainer.get_batch_logps (the mean over a response) on a padded one,
    in float64. TRL's gamma is in units of reward, as ours is."""
    folder, theirs = tiny('gpt2')
    ours, theirs = load(folder).double(), theirs.double()
    trainer = trl_trainer(beta, gamma, label_smoothing)
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
