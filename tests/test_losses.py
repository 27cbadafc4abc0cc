"""
Tests of dpo.py and simpo.py: numbers worked by hand, the papers' formulas, TRL's own code, what must hold for any
input, and the optimum that the theory promises.

    python -m pytest tests/test_losses.py

The comparisons with TRL run where trl is installed (written against 1.16) and are skipped elsewhere.
"""
import inspect
import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpo import dpo_loss, ipo_loss, kto_loss, plackett_luce_loss, rdpo_loss, robust_dpo_loss
from model import GPT, GPTConfig, pack, their_name
from simpo import cpo_loss, orpo_loss, rrhf_loss, sft_loss, simpo_loss, slic_loss


def vectors(B=32, seed=0, dtype=torch.float64, grad=False):
    """Policy and reference log-probs of B pairs, chosen and rejected, and lengths: as a language model's look."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (2, B), generator=g)
    reference = -(1 + 2 * torch.rand(2, B, generator=g, dtype=torch.float64)) * lengths
    policy = reference + 4 * torch.randn(2, B, generator=g, dtype=torch.float64)
    policy, reference = policy.to(dtype), reference.to(dtype)
    return *(t.clone().requires_grad_(grad) for t in policy), *reference, *lengths


def numpy_loss(z, label_smoothing=0.0, p=None):
    """-q log sigma(z) - (1-q) log sigma(-z) in numpy, with -log sigma(z) = log(1 + exp(-z))."""
    q = 1.0 if p is None else p
    q = q * (1 - label_smoothing) + (1 - q) * label_smoothing
    return q * np.logaddexp(0, -z) + (1 - q) * np.logaddexp(0, z)


SOFTNESS = [dict(), dict(label_smoothing=0.1), dict(label_smoothing=0.5), dict(p=True),
            dict(label_smoothing=0.2, p=True)]


def soft(options, B):
    """`p=True` stands for random soft labels."""
    if 'p' not in options:
        return options
    return options | dict(p=torch.rand(B, generator=torch.Generator().manual_seed(7), dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------------------
# By hand


def test_dpo_by_hand():
    # r_w = 0.1 * (-10 - -12) =  0.2
    # r_l = 0.1 * (-20 - -15) = -0.5
    # z = 0.2 + 0.5 = 0.7;  exp(-0.7) = 0.4965853;  loss = log(1 + 0.4965853) = 0.4031860
    arguments = *map(torch.tensor, ([-10.0], [-20.0], [-12.0], [-15.0])),
    losses, chosen, rejected = dpo_loss(*arguments)
    assert chosen.item() == pytest.approx(0.2) and rejected.item() == pytest.approx(-0.5)
    assert losses.item() == pytest.approx(0.4031860, abs=1e-6)
    # the other way round, -log sigma(-0.7) = 0.7 + 0.4031860 = 1.1031860; smoothing 0.1:
    # 0.9 * 0.4031860 + 0.1 * 1.1031860 = 0.3628674 + 0.1103186 = 0.4731860
    losses, _, _ = dpo_loss(*arguments, label_smoothing=0.1)
    assert losses.item() == pytest.approx(0.4731860, abs=1e-6)
    # p = 0.25: 0.25 * 0.4031860 + 0.75 * 1.1031860 = 0.1007965 + 0.8273895 = 0.9281860
    losses, _, _ = dpo_loss(*arguments, p=torch.tensor([0.25]))
    assert losses.item() == pytest.approx(0.9281860, abs=1e-6)
    # both: q = 0.9 * 0.25 + 0.1 * 0.75 = 0.3: 0.3 * 0.4031860 + 0.7 * 1.1031860 = 0.1209558 + 0.7722302 = 0.8931860
    losses, _, _ = dpo_loss(*arguments, label_smoothing=0.1, p=torch.tensor([0.25]))
    assert losses.item() == pytest.approx(0.8931860, abs=1e-6)


def test_simpo_by_hand():
    # r_w = 2 * -10 / 5 = -4
    # r_l = 2 * -27 / 10 = -5.4
    # z = -4 + 5.4 - 0.5 = 0.9;  exp(-0.9) = 0.4065697;  loss = log(1 + 0.4065697) = 0.3411539
    arguments = *map(torch.tensor, ([-10.0], [-27.0])), *map(torch.tensor, ([5], [10]))
    losses, chosen, rejected = simpo_loss(*arguments)
    assert chosen.item() == pytest.approx(-4.0) and rejected.item() == pytest.approx(-5.4)
    assert losses.item() == pytest.approx(0.3411539, abs=1e-6)
    # smoothing 0.2: -log sigma(-0.9) = 0.9 + 0.3411539 = 1.2411539
    # 0.8 * 0.3411539 + 0.2 * 1.2411539 = 0.2729231 + 0.2482308 = 0.5211539
    losses, _, _ = simpo_loss(*arguments, label_smoothing=0.2)
    assert losses.item() == pytest.approx(0.5211539, abs=1e-6)
    # beta 2.5, gamma 1.5: r_w = -5, r_l = -6.75, z = 0.25;  exp(-0.25) = 0.7788008;  loss = log(1.7788008) = 0.5759392
    losses, chosen, rejected = simpo_loss(*arguments, beta=2.5, gamma=1.5)
    assert chosen.item() == pytest.approx(-5.0) and rejected.item() == pytest.approx(-6.75)
    assert losses.item() == pytest.approx(0.5759392, abs=1e-6)


def test_sft_by_hand():
    losses, chosen, rejected = sft_loss(torch.tensor([-10.0, -3.0]))     # the sum over the response, not the mean
    assert losses.tolist() == [10.0, 3.0] and chosen is None and rejected is None


# ----------------------------------------------------------------------------------------------------------------
# The papers


@pytest.mark.parametrize('options', SOFTNESS)
@pytest.mark.parametrize('beta', [0.01, 0.1, 1.0])
def test_dpo_is_the_papers_formula(beta, options):
    """Rafailov et al. 2023, equation 7; with smoothing, Mitchell 2023 (cDPO), equation 3."""
    w, l, ref_w, ref_l, _, _ = vectors()
    options = soft(options, len(w))
    losses, chosen, rejected = dpo_loss(w, l, ref_w, ref_l, beta=beta, **options)
    w, l, ref_w, ref_l = (t.numpy() for t in (w, l, ref_w, ref_l))
    z = beta * (w - ref_w) - beta * (l - ref_l)
    np.testing.assert_allclose(losses, numpy_loss(z, **{k: np.asarray(v) for k, v in options.items()}), rtol=1e-12)
    np.testing.assert_allclose(chosen, beta * (w - ref_w), rtol=1e-12)
    np.testing.assert_allclose(rejected, beta * (l - ref_l), rtol=1e-12)


@pytest.mark.parametrize('options', SOFTNESS)
@pytest.mark.parametrize('beta, gamma', [(2.0, 0.5), (2.5, 1.375), (10.0, 3.0), (1.0, 0.0)])
def test_simpo_is_the_papers_formula(beta, gamma, options):
    """Meng et al. 2024, equation 6."""
    w, l, _, _, n_w, n_l = vectors()
    options = soft(options, len(w))
    losses, chosen, rejected = simpo_loss(w, l, n_w, n_l, beta=beta, gamma=gamma, **options)
    w, l, n_w, n_l = (t.numpy() for t in (w, l, n_w, n_l))
    z = beta / n_w * w - beta / n_l * l - gamma
    np.testing.assert_allclose(losses, numpy_loss(z, **{k: np.asarray(v) for k, v in options.items()}), rtol=1e-12)
    np.testing.assert_allclose(chosen, beta / n_w * w, rtol=1e-12)
    np.testing.assert_allclose(rejected, beta / n_l * l, rtol=1e-12)


def test_defaults_are_the_documented_ones():
    def defaults(f):
        parameters = inspect.signature(f).parameters.items()
        return {k: v.default for k, v in parameters if v.default is not inspect.Parameter.empty}
    assert defaults(dpo_loss) == dict(beta=0.1, label_smoothing=0.0, p=None)
    assert defaults(simpo_loss) == dict(beta=2.0, gamma=0.5, label_smoothing=0.0, p=None, sft_weight=0.0)
    assert list(inspect.signature(dpo_loss).parameters)[:4] == [
        'policy_chosen_logps', 'policy_rejected_logps', 'reference_chosen_logps', 'reference_rejected_logps']
    assert list(inspect.signature(simpo_loss).parameters)[:4] == [
        'policy_chosen_logps', 'policy_rejected_logps', 'chosen_lengths', 'rejected_lengths']


# ----------------------------------------------------------------------------------------------------------------
# TRL's code, on the same log-probs


class OneProcess:
    """What TRL's losses ask of its accelerator."""
    device = torch.device('cpu')

    def gather(self, tensor):
        return tensor
    gather_for_metrics = gather


def trl_dpo_trainer(beta, loss_type='sigmoid', label_smoothing=0.0):
    """A DPOTrainer without model or data, holding what DPOTrainer._compute_loss reads."""
    trl = pytest.importorskip('trl', reason='compares with TRL')
    if not hasattr(trl.DPOTrainer, '_compute_loss'):
        pytest.skip(f'trl {trl.__version__} has no DPOTrainer._compute_loss')
    trainer = trl.DPOTrainer.__new__(trl.DPOTrainer)
    trainer.__dict__.update(
        model=SimpleNamespace(training=True), accelerator=OneProcess(), beta=beta, label_smoothing=label_smoothing,
        loss_types=[loss_type], loss_weights=[1.0], f_divergence_type='reverse_kl', precompute_ref_logps=True,
        ld_alpha=None, aux_loss_enabled=False, use_weighting=False, _metrics=dict(train=defaultdict(list)),
        _total_train_tokens=0, _tp_size=1)
    return trainer


def trl_dpo(w, l, ref_w, ref_l, lengths=(1, 1), **options):
    """Loss and rewards of one pair, by DPOTrainer._compute_loss: its model is a stand-in that returns our log-probs, all
    of a response's at its first token."""
    trainer = trl_dpo_trainer(**options)
    logps = torch.stack([w, l])[:, None]
    logps = torch.cat([logps, logps.new_zeros(2, int(max(lengths)) - 1)], dim=1)             # (chosen and rejected, t)
    completion = torch.tensor([[i > 0 and i <= n for i in range(int(max(lengths)) + 1)] for n in lengths]).long()

    def model(**inputs):
        nothing = torch.zeros_like(logps.detach())
        return SimpleNamespace(log_probs=logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    inputs = dict(input_ids=torch.zeros_like(completion), attention_mask=torch.ones_like(completion),
                  completion_mask=completion, ref_chosen_logps=ref_w[None], ref_rejected_logps=ref_l[None])
    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    metrics = trainer._metrics['train']
    return loss, metrics['rewards/chosen'][0], metrics['rewards/rejected'][0]


@pytest.mark.parametrize('loss_type, label_smoothing', [('sigmoid', 0.0), ('aot', 0.0), ('aot', 0.15)])
def test_dpo_is_trls(loss_type, label_smoothing):
    """TRL's 'sigmoid' has no label smoothing any more; its 'aot' has, and is DPO when a batch is a single pair (it sorts
    the log-ratios within the batch, which leaves one alone)."""
    w, l, ref_w, ref_l, _, _ = vectors(B=12, grad=True)
    losses, chosen, rejected = dpo_loss(w, l, ref_w, ref_l, beta=0.3, label_smoothing=label_smoothing)
    ours = torch.autograd.grad(losses.sum(), (w, l))
    their_losses, their_chosen, their_rejected = zip(*(
        trl_dpo(*pair, beta=0.3, loss_type=loss_type, label_smoothing=label_smoothing)
        for pair in zip(w, l, ref_w, ref_l)))
    theirs = torch.autograd.grad(sum(their_losses), (w, l))
    torch.testing.assert_close(losses, torch.stack(their_losses), rtol=1e-12, atol=0)
    np.testing.assert_allclose(chosen, their_chosen, rtol=1e-12)
    np.testing.assert_allclose(rejected, their_rejected, rtol=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def trl_cpo_trainer(beta, gamma=0.0, label_smoothing=0.0, loss_type='simpo'):
    """A CPOTrainer without model or data, holding what CPOTrainer.cpo_loss reads."""
    pytest.importorskip('trl', reason='compares with TRL')
    try:
        from trl.experimental.cpo import CPOTrainer
    except ImportError:                                      # before TRL put it among the experiments
        CPOTrainer = pytest.importorskip('trl.trainer.cpo_trainer', reason='compares with TRL').CPOTrainer
    trainer = CPOTrainer.__new__(CPOTrainer)
    trainer.__dict__.update(accelerator=OneProcess(), loss_type=loss_type, beta=beta, simpo_gamma=gamma,
                            label_smoothing=label_smoothing, alpha=0.0)
    return trainer


@pytest.mark.parametrize('label_smoothing', [0.0, 0.15])
@pytest.mark.parametrize('beta, gamma', [(2.0, 0.5), (2.5, 1.375), (10.0, 0.0)])
def test_simpo_is_trls(beta, gamma, label_smoothing):
    """CPOTrainer.cpo_loss with loss_type 'simpo', on mean log-probs. (TRL's gamma is in units of reward, as ours.)"""
    w, l, _, _, n_w, n_l = vectors(grad=True)
    result = simpo_loss(w, l, n_w, n_l, beta=beta, gamma=gamma, label_smoothing=label_smoothing)
    theirs = trl_cpo_trainer(beta, gamma, label_smoothing).cpo_loss(w / n_w, l / n_l)
    torch.testing.assert_close(result, theirs, rtol=1e-12, atol=1e-12)
    gradients, their_gradients = (torch.autograd.grad(r[0].sum(), (w, l)) for r in (result, theirs))
    torch.testing.assert_close(gradients, their_gradients, rtol=1e-10, atol=1e-14)


def packed_and_padded(tmp_path):
    """One tiny GPT, ours and as transformers loads it, and some pairs, packed and as TRL pads them: the chosen rows,
    then the rejected rows, and a mask that is 1 on the responses."""
    transformers = pytest.importorskip('transformers', reason='compares with TRL')
    torch.manual_seed(0)
    ours = GPT(GPTConfig(block_size=32, vocab_size=61, n_layer=2, n_head=2, n_embd=16, eos_token_id=60))
    with torch.no_grad():
        for p in ours.parameters():
            p += 0.3 * torch.randn_like(p)
    ours.save_pretrained(str(tmp_path))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(str(tmp_path)).eval()
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(6):
        P, C, R = rng.integers(1, 11, size=3)
        pairs.append((rng.integers(61, size=P).tolist(), [rng.integers(61, size=n).tolist() for n in (C, R)]))
    rows = [(prompt, responses[k]) for k in (0, 1) for prompt, responses in pairs]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids, attention, completion = torch.zeros(3, len(rows), longest, dtype=torch.int64).unbind()
    for i, (prompt, response) in enumerate(rows):
        n = len(prompt) + len(response)
        ids[i, :n], attention[i, :n], completion[i, len(prompt):n] = torch.tensor([*prompt, *response]), 1, 1
    return ours, theirs, pairs, ids, attention, completion


def same_gradients(ours, theirs):
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        their, transposed = their_name(name)
        g = gradients['transformer.' + their]
        g = g.t() if transposed else g
        assert (p.grad - g).norm() <= 1e-5 * g.norm(), name


def test_dpo_from_tokens_to_gradients_is_trls(tmp_path):
    """The whole way: our packed batch, log-probs, sums, loss and gradients, and TRL's DPOTrainer._compute_loss on a
    padded batch through transformers' GPT-2 with TRL's own fused head."""
    ours, theirs, pairs, ids, attention, completion = packed_and_padded(tmp_path)
    trainer = trl_dpo_trainer(beta=0.3)
    utils = pytest.importorskip('trl.trainer.utils', reason='compares with TRL')
    utils.add_fused_lm_head(theirs, outputs=('log_probs', 'entropy', 'mean_logits', 'is_top1'))
    batch = pack(pairs)
    logps = batch.sum_by_response(ours.token_logps(batch))
    reference = logps.detach() + torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    losses, chosen, _ = dpo_loss(logps[:, 0], logps[:, 1], reference[:, 0], reference[:, 1], beta=0.3)
    losses.mean().backward()
    loss = trainer._compute_loss(theirs, dict(
        input_ids=ids, attention_mask=attention, completion_mask=completion,
        ref_chosen_logps=reference[:, 0], ref_rejected_logps=reference[:, 1]), return_outputs=False)
    loss.backward()
    metrics = trainer._metrics['train']
    assert losses.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    assert logps[:, 0].mean().item() == pytest.approx(metrics['logps/chosen'][0], rel=1e-5)
    assert logps[:, 1].mean().item() == pytest.approx(metrics['logps/rejected'][0], rel=1e-5)
    assert chosen.mean().item() == pytest.approx(metrics['rewards/chosen'][0], rel=1e-4)
    same_gradients(ours, theirs)


def test_simpo_from_tokens_to_gradients_is_trls(tmp_path):
    """The same for SimPO: CPOTrainer.get_batch_logps (the mean over a response) and CPOTrainer.cpo_loss."""
    ours, theirs, pairs, ids, attention, completion = packed_and_padded(tmp_path)
    trainer = trl_cpo_trainer(2.0, 0.5, 0.0)
    batch = pack(pairs)
    logps = batch.sum_by_response(ours.token_logps(batch))
    losses, _, _ = simpo_loss(logps[:, 0], logps[:, 1], batch.lengths[:, 0], batch.lengths[:, 1])
    losses.mean().backward()
    logits = theirs(ids, attention_mask=attention).logits
    means = trainer.get_batch_logps(logits, ids.masked_fill(completion == 0, -100), average_log_prob=True)
    their_losses, _, _ = trainer.cpo_loss(*means.chunk(2))
    their_losses.mean().backward()
    torch.testing.assert_close(losses, their_losses, rtol=1e-5, atol=1e-6)
    same_gradients(ours, theirs)


# ----------------------------------------------------------------------------------------------------------------
# What must hold for any input


@pytest.mark.parametrize('beta', [0.01, 0.1, 5.0])
@pytest.mark.parametrize('options', SOFTNESS)
def test_dpo_is_ln_2_where_the_policy_is_the_reference(beta, options):
    """Whatever the labels: r_w = r_l = 0, and a policy that has not moved prefers neither."""
    _, _, w, l, _, _ = vectors()
    losses, chosen, rejected = dpo_loss(w, l, w, l, beta=beta, **soft(options, len(w)))
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=1e-12, atol=0)
    assert not chosen.any() and not rejected.any()


@pytest.mark.parametrize('options', SOFTNESS)
def test_dpo_gradient(options):
    """-beta sigma(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l)), the gradient below equation 7 of the paper. With
    soft labels the weight sigma(r_l - r_w) becomes q - sigma(r_w - r_l): q sigma(-z) - (1 - q) sigma(z)."""
    w, l, ref_w, ref_l, _, _ = vectors(grad=True)
    options, beta = soft(options, len(w)), 0.3
    losses, r_w, r_l = dpo_loss(w, l, ref_w, ref_l, beta=beta, **options)
    losses.sum().backward()
    if not options:
        weight = torch.sigmoid(r_l - r_w)
    else:
        p, smoothing = options.get('p', torch.ones_like(r_w)), options.get('label_smoothing', 0.0)
        weight = (1 - smoothing) * p + smoothing * (1 - p) - torch.sigmoid(r_w - r_l)
    torch.testing.assert_close(w.grad, -beta * weight, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(l.grad, beta * weight, rtol=1e-10, atol=1e-14)


def test_simpo_gradient():
    """-beta sigma(r_l - r_w + gamma) (grad log pi(y_w) / |y_w| - grad log pi(y_l) / |y_l|), the paper's equation 7."""
    w, l, _, _, n_w, n_l = vectors(grad=True)
    losses, r_w, r_l = simpo_loss(w, l, n_w, n_l, beta=2.0, gamma=0.7)
    losses.sum().backward()
    weight = torch.sigmoid(r_l - r_w + 0.7)
    torch.testing.assert_close(w.grad, -2.0 * weight / n_w, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(l.grad, 2.0 * weight / n_l, rtol=1e-10, atol=1e-14)


def both_losses():
    """(name, function of the policy's log-probs (w, l) and options), for what DPO and SimPO have in common."""
    *_, ref_w, ref_l, n_w, n_l = vectors()
    return [('dpo', lambda w, l, **options: dpo_loss(w, l, ref_w, ref_l, **options)),
            ('simpo', lambda w, l, **options: simpo_loss(w, l, n_w, n_l, **options))]


@pytest.mark.parametrize('loss', [f for _, f in both_losses()], ids=[name for name, _ in both_losses()])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_shapes_dtypes_and_detached_rewards(loss, dtype):
    w, l, *_ = vectors(grad=True, dtype=dtype)
    losses, chosen, rejected = loss(w, l)
    assert losses.shape == chosen.shape == rejected.shape == (32,)
    assert losses.requires_grad and not chosen.requires_grad and not rejected.requires_grad
    assert (losses > 0).all()
    single = vectors(dtype=dtype)
    assert dpo_loss(*single[:4])[0].dtype == simpo_loss(*single[:2], *single[4:])[0].dtype == dtype


@pytest.mark.parametrize('loss', [f for _, f in both_losses()], ids=[name for name, _ in both_losses()])
def test_hard_labels_are_soft_labels_of_one(loss):
    w, l, *_ = vectors(grad=True)
    hard, soft_ = loss(w, l), loss(w, l, p=torch.ones(32, dtype=torch.float64))
    torch.testing.assert_close(hard, soft_, rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.autograd.grad(hard[0].sum(), (w, l)), torch.autograd.grad(soft_[0].sum(), (w, l)),
                               rtol=1e-14, atol=0)


@pytest.mark.parametrize('loss', [f for _, f in both_losses()], ids=[name for name, _ in both_losses()])
def test_smoothing_is_a_soft_label(loss):
    """eps = 0.2 says of every label what p = 0.8 says of one."""
    w, l, *_ = vectors()
    for smoothing in (0.2, 0.5):
        p = torch.full((32,), 1 - smoothing, dtype=torch.float64)
        torch.testing.assert_close(loss(w, l, label_smoothing=smoothing), loss(w, l, p=p))


def test_p_zero_swaps_the_pair():
    w, l, ref_w, ref_l, _, _ = vectors()
    losses, r_w, r_l = dpo_loss(w, l, ref_w, ref_l, p=torch.zeros(32, dtype=torch.float64))
    swapped, s_w, s_l = dpo_loss(l, w, ref_l, ref_w)
    torch.testing.assert_close(losses, swapped, rtol=1e-12, atol=0)
    torch.testing.assert_close((r_w, r_l), (s_l, s_w))


def test_simpo_does_not_see_lengths():
    """A response of twice the length and twice the sum, so of the same mean, is the same to SimPO. Not so to DPO."""
    w, l, ref_w, ref_l, n_w, n_l = vectors()
    longer = simpo_loss(2 * w, 3 * l, 2 * n_w, 3 * n_l)
    torch.testing.assert_close(simpo_loss(w, l, n_w, n_l), longer, rtol=1e-12, atol=0)
    assert not torch.allclose(dpo_loss(w, l, ref_w, ref_l)[0], dpo_loss(2 * w, 3 * l, 2 * ref_w, 3 * ref_l)[0])


def test_gamma_is_a_margin_in_units_of_reward():
    """Where chosen wins by gamma exactly, SimPO's loss is ln 2; more of it asks for more."""
    w, l, n = torch.tensor([-10.0]), torch.tensor([-15.0]), torch.tensor([10])
    assert simpo_loss(w, l, n, n, beta=2.0, gamma=1.0)[0].item() == pytest.approx(math.log(2))       # -2 + 3 - 1 = 0
    losses = [simpo_loss(w, l, n, n, beta=2.0, gamma=gamma)[0].item() for gamma in (0.0, 0.5, 1.0, 2.0)]
    assert losses == sorted(losses) and len(set(losses)) == 4


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('options', [dict(), dict(label_smoothing=0.1), dict(p=0.0), dict(p=1.0),
                                     dict(p=0.3, label_smoothing=0.5)])
@pytest.mark.parametrize('beta', [0.1, 10.0])
def test_finite_at_extreme_log_ratios(dtype, options, beta):
    ratios = torch.tensor([1e4, -1e4, 0.0], dtype=dtype)
    for a, b in itertools.product(ratios, ratios):
        w, l = (a[None] - 2e4).requires_grad_(), (b[None] - 2e4).requires_grad_()
        zero = torch.full((1,), -2e4, dtype=dtype)
        some = options | (dict(p=torch.tensor([options['p']], dtype=dtype)) if 'p' in options else {})
        one = torch.ones(1, dtype=torch.int64)
        for losses, r_w, r_l in (dpo_loss(w, l, zero, zero, beta=beta, **some),
                                 simpo_loss(w, l, one, one, beta=beta, **some)):
            gradients = torch.autograd.grad(losses.sum(), (w, l))
            for t in (losses, r_w, r_l, *gradients):
                assert t.isfinite().all()
            assert all(g.abs() <= beta for g in gradients)
            if not options:                                  # a pair that is wholly wrong pulls with all its weight
                z = (r_w - r_l).item()
                assert z > -1e3 or gradients[0].item() == pytest.approx(-beta)


@pytest.mark.parametrize('label_smoothing', [-0.1, 0.51, 1.0, math.nan])
def test_label_smoothing_out_of_range(label_smoothing):
    w, l, ref_w, ref_l, n_w, n_l = vectors()
    with pytest.raises(ValueError, match='label_smoothing'):
        dpo_loss(w, l, ref_w, ref_l, label_smoothing=label_smoothing)
    with pytest.raises(ValueError, match='label_smoothing'):
        simpo_loss(w, l, n_w, n_l, label_smoothing=label_smoothing)


# ----------------------------------------------------------------------------------------------------------------
# The other objectives: the papers' formulas again (written in numpy, one line each), and TRL's where it has them


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def log_odds(mean_logp):
    return np.log(np.exp(mean_logp) / (1 - np.exp(mean_logp)))


# v holds the arrays w, l (the policy's), ref_w, ref_l, n_w, n_l, and d = log pi/pi_ref(y_w) - log pi/pi_ref(y_l)
FORMULAS = {
    'robust dpo': (robust_dpo_loss, dict(beta=0.3, label_smoothing=0.2), lambda v: (
        (0.8 * -log_sigmoid(0.3 * v.d) - 0.2 * -log_sigmoid(-0.3 * v.d)) / (1 - 0.4),
        0.3 * (v.w - v.ref_w), 0.3 * (v.l - v.ref_l))),
    'robust dpo, nothing flipped': (robust_dpo_loss, dict(label_smoothing=0.0), lambda v: (
        -log_sigmoid(0.1 * v.d), 0.1 * (v.w - v.ref_w), 0.1 * (v.l - v.ref_l))),
    'ipo': (ipo_loss, dict(beta=0.2), lambda v: (
        (v.d - 2.5) ** 2, 0.2 * (v.w - v.ref_w), 0.2 * (v.l - v.ref_l))),
    'ipo of means': (ipo_loss, dict(beta=0.2, length_average=True), lambda v: (
        ((v.w - v.ref_w) / v.n_w - (v.l - v.ref_l) / v.n_l - 2.5) ** 2, None, None)),
    'r-dpo': (rdpo_loss, dict(beta=0.3, alpha=0.05), lambda v: (
        -log_sigmoid(0.3 * v.d + 0.05 * v.n_w - 0.05 * v.n_l), 0.3 * (v.w - v.ref_w), 0.3 * (v.l - v.ref_l))),
    'kto': (kto_loss, dict(beta=0.3, reference_point=0.4), lambda v: (
        1 - np.exp(log_sigmoid(0.3 * (v.w - v.ref_w) - 0.4)) + 1 - np.exp(log_sigmoid(0.4 - 0.3 * (v.l - v.ref_l))),
        0.3 * (v.w - v.ref_w), 0.3 * (v.l - v.ref_l))),
    'simpo with sft': (simpo_loss, dict(beta=2.0, gamma=0.5, sft_weight=0.1), lambda v: (
        -log_sigmoid(2 * v.w / v.n_w - 2 * v.l / v.n_l - 0.5) - 0.1 * v.w / v.n_w, 2 * v.w / v.n_w, 2 * v.l / v.n_l)),
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


def call(loss, w, l, ref_w, ref_l, n_w, n_l, **options):
    """The loss on what its signature names, as train.py calls it."""
    given = dict(policy_chosen_logps=w, policy_rejected_logps=l,
                 reference_chosen_logps=ref_w, reference_rejected_logps=ref_l,
                 chosen_lengths=n_w, rejected_lengths=n_l)
    return loss(**{k: v for k, v in given.items() if k in inspect.signature(loss).parameters}, **options)


@pytest.mark.parametrize('name', FORMULAS)
def test_other_objectives_are_their_papers_formulas(name):
    loss, options, formula = FORMULAS[name]
    *logps, n_w, n_l = vectors(grad=True)
    tensors = *logps, n_w.double(), n_l.double()             # a float times whole numbers would be float32
    result = call(loss, *tensors, **options)
    assert result[0].requires_grad and not result[1].requires_grad and not result[2].requires_grad
    v = SimpleNamespace(**dict(zip(('w', 'l', 'ref_w', 'ref_l', 'n_w', 'n_l'), (t.detach().numpy() for t in tensors))))
    v.d = (v.w - v.ref_w) - (v.l - v.ref_l)
    for ours, paper in zip(result, formula(v)):
        assert ours.shape == (32,)
        if paper is not None:
            np.testing.assert_allclose(ours.detach(), paper, rtol=1e-9)


@pytest.mark.parametrize('name', FORMULAS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_other_objectives_are_finite_at_extremes(name, dtype):
    loss, options, _ = FORMULAS[name]
    ends = torch.tensor([-1e-3, -1.0, -1e4, -3e4], dtype=dtype)
    w, l, ref_w, ref_l = (t.clone() for t in torch.cartesian_prod(ends, ends, ends, ends).unbind(1))
    w.requires_grad_(), l.requires_grad_()
    for n in (1, 1000):
        lengths = torch.full(w.shape, n)
        losses, r_w, r_l = call(loss, w, l, ref_w, ref_l, lengths, lengths, **options)
        assert all(t.isfinite().all() for t in (losses, r_w, r_l, *torch.autograd.grad(losses.sum(), (w, l))))


def test_orpo_is_finite_where_the_model_is_certain():
    """A log-prob that rounds to 0: an end of text after one token, learnt by heart."""
    for w, l in ((0.0, -5.0), (-5.0, 0.0), (0.0, 0.0)):
        w, l = torch.tensor([w], requires_grad=True), torch.tensor([l], requires_grad=True)
        losses, _, _ = orpo_loss(w, l, torch.tensor([1]), torch.tensor([1]))
        assert all(t.isfinite().all() for t in (losses, *torch.autograd.grad(losses.sum(), (w, l))))


def test_robust_dpo_is_unbiased():
    """In expectation over flipped labels it is DPO on the true ones."""
    w, l, ref_w, ref_l, _, _ = vectors()
    options = dict(beta=0.3, label_smoothing=0.2)
    as_is, flipped = robust_dpo_loss(w, l, ref_w, ref_l, **options)[0], robust_dpo_loss(l, w, ref_l, ref_w, **options)[0]
    torch.testing.assert_close(0.8 * as_is + 0.2 * flipped, dpo_loss(w, l, ref_w, ref_l, beta=0.3)[0])
    for label_smoothing in (-0.1, 0.5, 1.0, math.nan):
        with pytest.raises(ValueError, match='label_smoothing'):
            robust_dpo_loss(w, l, ref_w, ref_l, label_smoothing=label_smoothing)


def test_plackett_luce():
    """The chance of an order is that of drawing the best, then the best of what is left, ...; over all orders of four it
    sums to 1; of two responses it is DPO."""
    g = torch.Generator().manual_seed(0)
    policy, reference = (-20 + 4 * torch.randn(5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    losses, best, worst = plackett_luce_loss(policy.requires_grad_(), reference, beta=0.3)
    rewards = 0.3 * (policy - reference).detach()
    for row, loss in zip(rewards.exp().tolist(), losses.tolist()):
        chance = math.prod(row[k] / sum(row[k:]) for k in range(4))
        assert math.exp(-loss) == pytest.approx(chance, rel=1e-10)
    torch.testing.assert_close((best, worst), (rewards[:, 0], rewards[:, 3]))
    assert losses.requires_grad and not best.requires_grad and not worst.requires_grad
    orders = [plackett_luce_loss(policy[:, order], reference[:, order], beta=0.3)[0]
              for order in itertools.permutations(range(4))]
    torch.testing.assert_close((-torch.stack(orders)).exp().sum(dim=0), torch.ones(5, dtype=torch.float64))

    w, l, ref_w, ref_l, _, _ = vectors(grad=True)
    pair = plackett_luce_loss(torch.stack([w, l], dim=1), torch.stack([ref_w, ref_l], dim=1), beta=0.3)
    same = dpo_loss(w, l, ref_w, ref_l, beta=0.3)
    torch.testing.assert_close(pair, same)
    torch.testing.assert_close(torch.autograd.grad(pair[0].sum(), (w, l)), torch.autograd.grad(same[0].sum(), (w, l)))


@pytest.mark.parametrize('loss, loss_type, options', [
    (robust_dpo_loss, 'robust', dict(label_smoothing=0.2)), (ipo_loss, 'ipo', dict(length_average=True)),
    (kto_loss, 'apo_zero', dict(reference_point=0.0))])
def test_other_objectives_with_a_reference_are_trls(loss, loss_type, options):
    """By DPOTrainer._compute_loss. Its 'apo_zero' is KTO's loss about a reference point of 0; its IPO is of means."""
    w, l, ref_w, ref_l, n_w, n_l = vectors(B=12)
    ours, _, _ = call(loss, w, l, ref_w, ref_l, n_w, n_l, beta=0.3, **options)
    smoothing = options.get('label_smoothing', 0.0)
    theirs = [trl_dpo(*numbers, lengths=lengths, beta=0.3, loss_type=loss_type, label_smoothing=smoothing)[0]
              for numbers, lengths in zip(zip(w, l, ref_w, ref_l), zip(n_w, n_l))]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-12, atol=0)


def test_other_objectives_without_a_reference_are_trls():
    """CPOTrainer.cpo_loss, to which TRL adds its likelihood term outside, and ORPOTrainer.odds_ratio_loss likewise."""
    w, l, _, _, n_w, n_l = vectors()
    theirs = trl_cpo_trainer(0.3, loss_type='sigmoid').cpo_loss(w, l)
    torch.testing.assert_close(cpo_loss(w, l, beta=0.3, sft_weight=0.0), theirs, rtol=1e-12, atol=1e-12)
    theirs = trl_cpo_trainer(1.0, loss_type='hinge').cpo_loss(w, l)
    torch.testing.assert_close(slic_loss(w, l, delta=1.0, sft_weight=0.0), theirs, rtol=1e-12, atol=1e-12)
    try:
        from trl.experimental.orpo import ORPOTrainer
    except ImportError:
        pytest.skip('this trl has no trl.experimental.orpo')
    trainer = ORPOTrainer.__new__(ORPOTrainer)
    trainer.__dict__.update(accelerator=OneProcess(), beta=0.3)
    losses, chosen, rejected, _, _ = trainer.odds_ratio_loss(w / n_w, l / n_l)
    ours = orpo_loss(w, l, n_w, n_l, beta=0.3)
    torch.testing.assert_close(ours[0], -w / n_w - losses, rtol=1e-5, atol=1e-5)         # TRL's is in float32
    torch.testing.assert_close(ours[1:], (chosen.double(), rejected.double()), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------
# The optimum: with every pair of a small space of responses, each labelled by sigma(r_i - r_j), the minimum of DPO is
# pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x), equation 4 of the paper


def optimum(reference_logps, rewards, beta):
    return (reference_logps + rewards / beta).log_softmax(dim=1)


def kl(logp, logq):
    return (logp.exp() * (logp - logq)).sum(dim=1).max().item()


def all_pairs(n):
    """Every pair of n responses: (indices of the chosen, of the rejected)."""
    return torch.tensor(list(itertools.combinations(range(n), 2))).unbind(1)


def test_dpo_converges_to_the_optimum():
    """A softmax over 6 responses to each of 3 prompts, trained until it stands still."""
    g, beta = torch.Generator().manual_seed(0), 0.5
    reference = torch.randn(3, 6, generator=g, dtype=torch.float64).log_softmax(dim=1)
    rewards = torch.randn(3, 6, generator=g, dtype=torch.float64)
    target = optimum(reference, rewards, beta)
    logits = reference.clone().requires_grad_()
    i, j = all_pairs(6)
    p = torch.sigmoid(rewards[:, i] - rewards[:, j]).view(-1)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-10, line_search_fn='strong_wolfe')

    def step():
        optimizer.zero_grad()
        policy = logits.log_softmax(dim=1)
        flat = [t.reshape(-1) for t in (policy[:, i], policy[:, j], reference[:, i], reference[:, j])]
        loss = dpo_loss(*flat, beta=beta, p=p)[0].mean()
        loss.backward()
        return loss

    assert kl(target, reference) > 0.1                       # there was a way to go
    optimizer.step(step)
    assert kl(target, logits.detach().log_softmax(dim=1)) < 1e-6
    # and the rewards it ends with are the true ones, up to a number for each prompt (equation 5)
    policy = logits.detach().log_softmax(dim=1)
    flat = [t.reshape(-1) for t in (policy[:, i], policy[:, j], reference[:, i], reference[:, j])]
    _, r_i, r_j = dpo_loss(*flat, beta=beta)
    torch.testing.assert_close((r_i - r_j).view(3, -1), rewards[:, i] - rewards[:, j], atol=1e-3, rtol=0)


def test_dpo_converges_to_the_optimum_through_the_gpt():
    """The same through the real model: three tokens are all the words there are, one of them ends a text, and a response
    is cut after two: 7 responses, all that there is, of different lengths. 2 prompts, 21 pairs each, packed."""
    torch.manual_seed(0)
    eos, beta = 2, 0.5
    responses = [[eos], [0, eos], [1, eos], [0, 0], [0, 1], [1, 0], [1, 1]]
    prompts = [[0, 1], [1, 1, 0]]
    model = GPT(GPTConfig(block_size=5, vocab_size=3, n_layer=1, n_head=2, n_embd=16, eos_token_id=eos))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    everything = pack([(prompt, responses) for prompt in prompts])

    def logps():
        """(2, 7), but for rounding a distribution in every row."""
        with torch.no_grad():
            return everything.sum_by_response(model.token_logps(everything))

    reference = logps()
    rewards = torch.randn(2, 7, generator=torch.Generator().manual_seed(1))
    target = optimum(reference, rewards, beta)
    i, j = all_pairs(7)
    batch = pack([(prompt, [responses[a], responses[b]]) for prompt in prompts for a, b in zip(i, j)])
    p = torch.sigmoid(rewards[:, i] - rewards[:, j]).view(-1)
    ref_i, ref_j = reference[:, i].reshape(-1), reference[:, j].reshape(-1)

    assert reference.exp().sum(dim=1).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert kl(target, reference) > 0.1
    steps = 200
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        both = batch.sum_by_response(model.token_logps(batch))
        dpo_loss(both[:, 0], both[:, 1], ref_i, ref_j, beta=beta, p=p)[0].mean().backward()
        optimizer.step(), optimizer.zero_grad(), schedule.step()
    assert kl(target, logps()) < 1e-3
